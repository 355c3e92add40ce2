//! The step-wise engine: one thread per device owns its runners and its memory ledger; everybody else holds handles.
//!
//! [`Engine`] is the cloneable handle: cards, submission, status, shutdown. A request goes to the device on which it is expected to
//! end first. [`Session`] is one running generation: reading it follows the work, dropping it cancels the work within one step.
//! Deliberately does not know: HTTP, jobs, media, tensors.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tale_models::device::{DeviceSpec, WeightDtype};
use tale_models::diffusion::DiffusionRequest;
use tale_models::family::{LoadOptions, TextEncoders};
use tale_models::runner::RunnerStatus;
use tale_models::runner::text::lookup::PromptLookup;
use tale_models::{ClientId, LoadedModel, ModelCard, ModelSource, Request, SessionCheckpoint, SessionId};

use self::catalogue::{Catalogue, Entry};
use self::coming::{Checkpoints, Loader, NoLoader};
use self::command::{Command, Order};
use self::device::DeviceHandle;
use self::mailbox::Mailbox;
use self::replicas::{Chosen, Replica};
use crate::places::{Place, Places};

mod affinity;
pub mod arbiter;
pub mod assignment;
mod catalogue;
pub mod coming;
mod command;
mod device;
mod error;
mod gauges;
mod groups;
pub mod ledger;
mod lifecycle;
mod loading;
mod mailbox;
mod memory;
mod peers;
mod rates;
mod replicas;
mod residency;
mod session;
mod shapes;
mod worker;

pub use catalogue::{LoadProgress, ModelReport, ModelState, ServedModel};
pub use error::EngineError;
pub use lifecycle::{Begun, When, Wish};
pub use loading::Planned;
pub(crate) use loading::{capacity_bytes, place_text_encoders, plan};
pub use session::Session;

/// A checkpoint to serve and the name that clients use for it.
#[derive(Debug, Clone)]
pub struct ModelSpec {
    /// `model` of the API.
    pub name: String,
    /// Where it lies.
    pub source: ModelSource,
    /// The devices that may hold it; empty where all may.
    pub devices: Vec<DeviceSpec>,
    /// How many of them do; `None`: all that were named, or, where none was, as many as have room.
    pub replicas: Option<NonZeroUsize>,
    /// How many devices share it, which then have no other model; `None` where each of its devices has all of it.
    pub tensor_parallel: Option<NonZeroUsize>,
    /// Of a model of pictures or clips: 2, where one device predicts the positive and another the negative branch of guidance. They have
    /// no other model.
    pub guidance_devices: Option<NonZeroUsize>,
    /// How its tokens are guessed, if at all; `None` leaves that to the options of all models.
    pub prompt_lookup: Option<Option<PromptLookup>>,
    /// Whether it is loaded when it is asked for, and not at the start.
    pub on_demand: bool,
    /// It is unloaded when nobody has used it for so long; `None`: never for that.
    pub idle_unload: Option<Duration>,
}

impl ModelSpec {
    /// On whatever devices have room for it, with the options of all models.
    pub fn new(name: impl Into<String>, source: impl Into<ModelSource>) -> Self {
        Self {
            name: name.into(),
            source: source.into(),
            devices: Vec::new(),
            replicas: None,
            tensor_parallel: None,
            guidance_devices: None,
            prompt_lookup: None,
            on_demand: false,
            idle_unload: None,
        }
    }
}

/// Where and how models run.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// The devices, at least one.
    pub devices: Vec<DeviceSpec>,
    /// Dtype in which weight matrices are kept.
    pub weight_dtype: WeightDtype,
    /// Sizes of what runners allocate.
    pub load: LoadOptions,
    /// Where text encoders are, in place of what `load` says; `None`: on the device where everything fits, else there on
    /// demand, those of the model with the largest ones first.
    pub text_encoders: Option<TextEncoders>,
    /// Bytes of memory that models and sessions may take together on each device; `None` is what it has to give.
    pub memory_bytes: Option<usize>,
    /// Most sessions of one model that have been submitted and not begun; clients share them ([`crate::places::Places`]).
    pub max_queued_sessions: usize,
    /// How long requests that work with a model may take to end when it is unloaded and nobody said otherwise.
    pub drain: Duration,
}

/// How long running work may go on when it should end, and nothing else is said.
pub const DEFAULT_DRAIN: Duration = Duration::from_secs(30);
/// Sessions that may wait for one model when nothing else is configured.
pub const DEFAULT_MAX_QUEUED_SESSIONS: usize = 256;

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            devices: vec![DeviceSpec::default()],
            weight_dtype: WeightDtype::default(),
            load: LoadOptions::default(),
            text_encoders: None,
            memory_bytes: None,
            max_queued_sessions: DEFAULT_MAX_QUEUED_SESSIONS,
            drain: DEFAULT_DRAIN,
        }
    }
}

/// Asked on the device thread when the turn of a session comes; must not wait.
#[derive(Clone)]
pub struct MayBegin(Arc<dyn Fn() -> bool + Send + Sync>);

impl MayBegin {
    /// As `agrees` says then.
    pub fn when(agrees: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(agrees))
    }
}

impl std::fmt::Debug for MayBegin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MayBegin")
    }
}

/// How a session is begun.
#[derive(Debug, Clone, Default)]
pub struct SubmitOptions {
    /// When its turn comes the session begins only if this agrees; else it ends without an end, before its first step.
    pub may_begin: Option<MayBegin>,
    /// Whether it says now and then what it needs to go on elsewhere ([`tale_models::Event::Checkpoint`]): after its first denoising step, from
    /// then on as often as takes a fiftieth of its time, and when [`Engine::hand_over`] ends it.
    pub checkpoints: bool,
    /// Where it goes on from, in place of its beginning. A checkpoint that does not fit ends it with
    /// [`tale_models::Error::NotResumable`].
    pub resume: Option<Arc<SessionCheckpoint>>,
}

impl From<Option<MayBegin>> for SubmitOptions {
    fn from(may_begin: Option<MayBegin>) -> Self {
        Self { may_begin, ..Self::default() }
    }
}

/// The cloneable handle of a running engine. The threads of devices end when the last handle and session are dropped.
#[derive(Debug, Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    catalogue: Catalogue,
    devices: Vec<DeviceHandle>,
    loader: Arc<dyn Loader>,
    options: EngineOptions,
    /// One model at a time looks for room.
    placing: Mutex<()>,
    draining: AtomicBool,
    next_session: AtomicU64,
    next_runner: AtomicUsize,
    /// That load or unload models now.
    num_threads: AtomicUsize,
}

/// A snapshot of the engine for readiness and metrics.
#[derive(Debug, Clone)]
pub struct EngineStatus {
    /// One per model, in the order of [`Engine::models`].
    pub models: Vec<ModelStatus>,
    /// One per device.
    pub devices: Vec<DeviceStatus>,
    /// New work is refused.
    pub draining: bool,
    /// A device lives for each model.
    pub alive: bool,
}

impl EngineStatus {
    /// Bytes reserved by models and sessions, on all devices.
    pub fn ledger_used_bytes(&self) -> usize {
        self.devices.iter().map(|device| device.ledger_used_bytes).sum()
    }
}

/// A snapshot of one device.
#[derive(Debug, Clone)]
pub struct DeviceStatus {
    /// Which one.
    pub device: DeviceSpec,
    /// It takes work.
    pub alive: bool,
    /// Why not, where that is known.
    pub problem: Option<String>,
    /// Bytes reserved by models and sessions.
    pub ledger_used_bytes: usize,
    /// Bytes in all.
    pub ledger_capacity_bytes: usize,
}

/// A snapshot of one model.
#[derive(Debug, Clone)]
pub struct ModelStatus {
    /// `model` of the API.
    pub name: String,
    /// Sessions submitted and not begun.
    pub queued: usize,
    /// Sessions submitted and not ended.
    pub live: usize,
    /// What its runners hold.
    pub runner: RunnerStatus,
}

impl Engine {
    /// Starts a thread per device, opens the devices there and loads the models, but for those that are loaded on demand; returns
    /// when all are loaded or the first has failed. `on_component` hears (model, component) before each component is read.
    pub fn load(
        models: Vec<ModelSpec>,
        options: EngineOptions,
        on_component: impl FnMut(&str, &str) + Send + 'static,
    ) -> Result<Engine, EngineError> {
        check_names(models.iter().map(|model| model.name.as_str()))?;
        let models = groups::resolved(models, &options.devices)?;
        let at_once = models.iter().filter(|model| !model.on_demand).cloned().collect();
        let ready = loading::load(at_once, &options, on_component)?;
        let engine = Self::of(ready, models, options.clone(), Arc::new(Checkpoints(options)));
        for entry in &engine.shared.catalogue.entries {
            let spec = entry.state().spec.clone();
            if spec.on_demand {
                lifecycle::check(&engine.shared, &spec)?;
            }
        }
        Ok(engine)
    }

    /// Starts a thread over models that are loaded already, as if for the first device. They must not hold memory of a GPU, which
    /// only the thread that opened it may use.
    pub fn start(models: Vec<(String, LoadedModel)>, options: EngineOptions) -> Result<Engine, EngineError> {
        Self::start_on(vec![models], options)
    }

    /// As [`Engine::start`], with the models of each device.
    pub fn start_on(models: Vec<Vec<(String, LoadedModel)>>, options: EngineOptions) -> Result<Engine, EngineError> {
        Self::start_with(models, Vec::new(), options, Arc::new(NoLoader))
    }

    /// As [`Engine::start_on`], with further models that are loaded later, and where all come from then.
    pub fn start_with(
        models: Vec<Vec<(String, LoadedModel)>>,
        further: Vec<ModelSpec>,
        options: EngineOptions,
        loader: Arc<dyn Loader>,
    ) -> Result<Engine, EngineError> {
        for models in &models {
            let further = further.iter().map(|model| model.name.as_str());
            check_names(models.iter().map(|(name, _)| name.as_str()).chain(further))?;
        }
        let ready = loading::start(models, &options)?;
        let given = ready.models.iter().map(|model| ModelSpec::new(model.name.clone(), ModelSource::default()));
        let given = given.filter(|given| further.iter().all(|model| model.name != given.name));
        let specs = given.chain(further.iter().cloned()).collect();
        Ok(Self::of(ready, specs, options, loader))
    }

    fn of(ready: loading::Ready, specs: Vec<ModelSpec>, options: EngineOptions, loader: Arc<dyn Loader>) -> Self {
        let loading::Ready { mut models, devices } = ready;
        let next_runner = AtomicUsize::new(specs.len());
        let entry = |spec: ModelSpec| {
            let at = models.iter().position(|model| model.name == spec.name);
            let current = at.map(|at| models.swap_remove(at));
            let places = || Places::new(options.max_queued_sessions);
            let queue = current.as_ref().map_or_else(places, |current| current.replicas.queue().clone());
            Entry::new(spec, queue, places(), current)
        };
        let catalogue = Catalogue::new(specs.into_iter().map(entry).collect());
        let shared = Shared {
            catalogue,
            devices,
            loader,
            options,
            placing: Mutex::default(),
            draining: AtomicBool::default(),
            next_session: AtomicU64::new(1),
            next_runner,
            num_threads: AtomicUsize::default(),
        };
        Engine { shared: Arc::new(shared) }
    }

    /// The models, in the order in which they were given, whether they are there or not.
    pub fn models(&self) -> Vec<ModelReport> {
        self.shared.catalogue.entries.iter().map(Entry::report).collect()
    }

    /// What is known of the model with this name, or the error that names those there are.
    pub fn report(&self, name: &str) -> Result<ModelReport, EngineError> {
        self.shared.catalogue.entry(name).map(Entry::report)
    }

    /// The cards of the models that are there.
    pub fn cards(&self) -> Vec<Arc<ModelCard>> {
        let current = |entry: &Entry| entry.state().current.as_ref().map(|current| current.card());
        self.shared.catalogue.entries.iter().filter_map(current).collect()
    }

    /// The card of the model with this name, if it is there.
    pub fn card(&self, name: &str) -> Option<Arc<ModelCard>> {
        self.model(name).ok().map(|model| model.card())
    }

    /// The model with this name, if it is there. It stays there while what is returned is held, within bounds of time.
    pub fn model(&self, name: &str) -> Result<Arc<ServedModel>, EngineError> {
        self.shared.catalogue.entry(name)?.current()
    }

    /// As [`Engine::model`], for a request: a model that comes on demand and is not there begins to be loaded.
    pub fn ask(&self, name: &str) -> Result<Arc<ServedModel>, EngineError> {
        let entry = self.shared.catalogue.entry(name)?;
        let is_wanted = !self.is_draining() && entry.state().is_wanted_by_requests(Instant::now());
        if is_wanted {
            match lifecycle::begin_to_load(&self.shared, self.index(name)?, Wish::default()) {
                // Somebody else was faster.
                Ok(_) | Err(EngineError::AtWork { .. } | EngineError::AlreadyLoaded { .. }) => (),
                Err(error) => return Err(error),
            }
        }
        entry.current()
    }

    /// As [`Engine::ask`], and waits until the model is there: as one of those who may wait for it.
    pub async fn ask_and_wait(&self, name: &str, client: ClientId) -> Result<Arc<ServedModel>, EngineError> {
        let entry = self.shared.catalogue.entry(name)?;
        let mut changes = self.shared.catalogue.changes();
        let mut place = None;
        loop {
            let away = match self.ask(name) {
                Ok(model) => return Ok(model),
                Err(away) => away,
            };
            if self.is_draining() {
                return Err(EngineError::Draining);
            }
            match &away {
                EngineError::NotLoaded { state: ModelState::Loading, .. } => (),
                EngineError::NotLoaded { state: ModelState::Unloading, comes_back: true, .. } => (),
                _ => return Err(away),
            }
            if place.is_none() {
                let busy = |reason| EngineError::Busy { model: name.to_owned(), reason };
                place = Some(entry.early.take(client).map_err(busy)?);
            }
            changes.changed().await.map_err(|_| EngineError::Draining)?;
        }
    }

    /// Begins to unload the models that nobody has used for as long as they may be idle. Somebody has to look now and then.
    pub fn unload_idle(&self) {
        lifecycle::unload_idle(&self.shared, Instant::now());
    }

    /// Begins to load a model that is not there, or other weights or devices in place of those that it has. What is returned tells
    /// whether there is room and it has begun; [`Engine::report`] says how it goes.
    pub fn load_model(&self, name: &str, wish: Wish) -> Result<Begun, EngineError> {
        lifecycle::begin_to_load(&self.shared, self.index(name)?, wish)
    }

    /// Begins to unload a model: it takes no requests any more, and those that work with it may take `drain`, or what the options
    /// say, to end.
    pub fn unload_model(&self, name: &str, drain: Option<Duration>) -> Result<(), EngineError> {
        lifecycle::begin_to_unload(&self.shared, self.index(name)?, drain.unwrap_or(self.shared.options.drain))
    }

    /// Hands a validated request of a client to the device thread. Never waits.
    pub fn submit(&self, model: &str, client: ClientId, request: Request) -> Result<Session, EngineError> {
        self.submit_if(model, client, request, SubmitOptions::default())
    }

    /// As [`Engine::submit`], with these options, or with nothing but [`SubmitOptions::may_begin`].
    pub fn submit_if(
        &self,
        model: &str,
        client: ClientId,
        request: Request,
        options: impl Into<SubmitOptions>,
    ) -> Result<Session, EngineError> {
        self.submit_to(&*self.model(model)?, client, request, options)
    }

    /// As [`Engine::submit_if`], to weights that the caller has: it has made the request for their card.
    pub fn submit_to(
        &self,
        model: &ServedModel,
        client: ClientId,
        request: Request,
        options: impl Into<SubmitOptions>,
    ) -> Result<Session, EngineError> {
        if !self.takes_work() {
            return Err(EngineError::Draining);
        }
        let place = model.replicas.queue().take(client);
        let place = place.map_err(|reason| EngineError::Busy { model: model.name.clone(), reason })?;
        self.send(model, client, request, place, options.into())
    }

    /// As [`Engine::submit_if`], for the next part of work whose part before has ended: it has a place in the queue whoever
    /// else waits, and is taken until the engine stops. One part at a time is the caller's to keep.
    pub fn submit_further(
        &self,
        model: &str,
        client: ClientId,
        request: Request,
        options: impl Into<SubmitOptions>,
    ) -> Result<Session, EngineError> {
        let model = self.model(model)?;
        let place = model.replicas.queue().take_further(client);
        self.send(&model, client, request, place, options.into())
    }

    /// Device time that a request is expected to take on the fastest of its model's devices, in seconds; `None` while nothing is known
    /// of them.
    pub fn predicted_seconds(&self, model: &str, request: &DiffusionRequest) -> Option<f64> {
        self.model(model).ok()?.replicas.predicted_seconds(&Request::Diffusion(request.clone()))
    }

    fn index(&self, name: &str) -> Result<usize, EngineError> {
        let catalogue = &self.shared.catalogue;
        catalogue.entry(name)?;
        Ok(catalogue.entries.iter().position(|entry| entry.name == name).expect("it was just there: this is a bug"))
    }

    fn send(
        &self,
        model: &ServedModel,
        client: ClientId,
        request: Request,
        place: Place,
        options: SubmitOptions,
    ) -> Result<Session, EngineError> {
        let (shared, replicas) = (&self.shared, &model.replicas);
        let Some(_opened) = model.opened() else {
            let (model, state) = (model.name.clone(), ModelState::Unloading);
            return Err(EngineError::NotLoaded { model, state, progress: None, problem: None, comes_back: false });
        };
        let Some(Chosen { index: chosen, seconds: predicted_seconds }) =
            replicas.choose(client, &request, shared.options.load.prefix_cache)
        else {
            return Err(self.failed(model));
        };
        let id = SessionId(shared.next_session.fetch_add(1, Relaxed));
        let mailbox = Arc::new(Mailbox::default());
        let session = Session { id, mailbox: mailbox.clone(), commands: replicas.commands.clone(), ended: false };
        let Replica { runner, .. } = replicas.on[chosen];
        let order = Order { id, client, model: runner, request, mailbox, place, options, predicted_seconds };
        replicas.commands[chosen].send(Command::Submit(order)).map_err(|_| EngineError::Draining)?;
        Ok(session)
    }

    fn failed(&self, model: &ServedModel) -> EngineError {
        let devices = model.replicas.on.iter().map(|replica| &self.shared.devices[replica.device]);
        let problem = |device: &DeviceHandle| {
            let problem = device.gauges.problem().unwrap_or_else(|| "its thread has ended".into());
            format!("{}: {problem}", device.spec)
        };
        let problems = devices.map(problem).collect::<Vec<_>>().join("; ");
        EngineError::Failed { model: model.name.clone(), problems }
    }

    /// Whether new work is taken.
    pub fn takes_work(&self) -> bool {
        !self.is_draining() && self.is_alive()
    }

    fn is_draining(&self) -> bool {
        self.shared.draining.load(Relaxed)
    }

    /// Whether a device lives.
    pub fn is_alive(&self) -> bool {
        self.shared.devices.iter().any(|device| device.gauges.is_alive())
    }

    /// What is wrong, if no device is left for some model; others may be served.
    pub fn problem(&self) -> Option<EngineError> {
        let lost = |entry: &Entry| entry.state().current.clone().filter(|current| !current.replicas.is_alive());
        self.shared.catalogue.entries.iter().find_map(lost).map(|lost| self.failed(&lost))
    }

    /// What the engine holds now.
    pub fn status(&self) -> EngineStatus {
        EngineStatus {
            models: self.shared.catalogue.entries.iter().map(model_status).collect(),
            devices: self.shared.devices.iter().map(DeviceHandle::status).collect(),
            draining: self.is_draining(),
            alive: self.problem().is_none(),
        }
    }

    /// Refuses new work from now on; what runs goes on.
    pub fn drain(&self) {
        self.shared.draining.store(true, Relaxed);
        self.shared.catalogue.tell();
    }

    /// Refuses new work and ends what runs at the next boundary between two steps: each session ends with
    /// [`tale_models::Error::HandedOver`], those whose checkpoints are wanted and that have come so far with an
    /// [`tale_models::Event::Checkpoint`] before it. Does not wait for it; [`Engine::shutdown`] does.
    pub fn hand_over(&self) {
        self.drain();
        self.shared.devices.iter().for_each(DeviceHandle::hand_over);
    }

    /// Refuses new work, gives what runs the time `drain` to finish, cancels the rest and ends the threads of devices.
    /// Blocks until then, one step longer than `drain` at most.
    pub fn shutdown(&self, drain: Duration) {
        self.drain();
        let deadline = Instant::now() + drain;
        while self.shared.devices.iter().any(DeviceHandle::is_busy) && Instant::now() < deadline {
            std::thread::sleep(SHUTDOWN_POLL);
        }
        self.shared.devices.iter().for_each(DeviceHandle::stop);
        self.shared.devices.iter().for_each(DeviceHandle::join);
    }
}

/// Of a model that is not there nothing but its name and who waits for it.
fn model_status(entry: &Entry) -> ModelStatus {
    let mut status =
        ModelStatus { name: entry.name.clone(), queued: entry.queue.taken(), live: 0, runner: RunnerStatus::default() };
    let state = entry.state();
    for replica in state.current.iter().flat_map(|current| &current.replicas.on) {
        let of = replica.gauges.runner();
        status.live += replica.gauges.live();
        status.runner.running += of.running;
        status.runner.waiting += of.waiting;
        status.runner.kv_blocks_used += of.kv_blocks_used;
        status.runner.kv_blocks_total += of.kv_blocks_total;
    }
    status
}

/// How often a shutdown looks whether the last session has ended.
const SHUTDOWN_POLL: Duration = Duration::from_millis(5);

fn check_names<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), EngineError> {
    let mut seen = BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(EngineError::DuplicateModel { name: name.to_owned() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod fleet_tests;
#[cfg(test)]
mod lifecycle_tests;
#[cfg(test)]
mod saving_tests;
#[cfg(test)]
mod tests;
