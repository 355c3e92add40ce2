//! The step-wise engine: one thread per device owns its runners and its memory ledger; everybody else holds handles.
//!
//! [`Engine`] is the cloneable handle: cards, submission, status, shutdown. [`Session`] is one running generation:
//! reading it follows the work, dropping it cancels the work within one step. Deliberately does not know: HTTP, jobs,
//! media, tensors.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant, SystemTime};

use tale_models::device::{DeviceMemory, DeviceSpec, Placement, WeightDtype, keep_freed_memory};
use tale_models::family::{LoadOptions, TextEncoders};
use tale_models::loading;
use tale_models::runner::RunnerStatus;
use tale_models::runner::text::lookup::PromptLookup;
use tale_models::{ClientId, Event, LoadedModel, ModelCard, ModelSource, Request, SessionId};

use self::ledger::{Ledger, Owner};
use self::mailbox::Mailbox;
use self::worker::{Command, DeviceWorker, Order, WallClock};
use crate::places::{NoPlace, Place, Places};

pub mod arbiter;
pub mod ledger;
mod mailbox;
mod memory;
mod residency;
mod worker;

/// A checkpoint to serve and the name that clients use for it.
#[derive(Debug, Clone)]
pub struct ModelSpec {
    /// `model` of the API.
    pub name: String,
    /// Where it lies.
    pub source: ModelSource,
    /// How its tokens are guessed, if at all; `None` leaves that to the options of all models.
    pub prompt_lookup: Option<Option<PromptLookup>>,
}

impl ModelSpec {
    /// With the options of all models.
    pub fn new(name: impl Into<String>, source: impl Into<ModelSource>) -> Self {
        Self { name: name.into(), source: source.into(), prompt_lookup: None }
    }
}

/// Where and how models run.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// The device of all models.
    pub device: DeviceSpec,
    /// Dtype in which weight matrices are kept.
    pub weight_dtype: WeightDtype,
    /// Sizes of what runners allocate.
    pub load: LoadOptions,
    /// Where text encoders are, in place of what `load` says; `None`: on the device where everything fits, else there on
    /// demand, those of the model with the largest ones first.
    pub text_encoders: Option<TextEncoders>,
    /// Bytes of device memory that models and sessions may take together; `None` is what the device has to give.
    pub memory_bytes: Option<usize>,
    /// Most sessions of one model that have been submitted and not begun; clients share them ([`Places`]).
    pub max_queued_sessions: usize,
}

/// Sessions that may wait for one model when nothing else is configured.
pub const DEFAULT_MAX_QUEUED_SESSIONS: usize = 256;

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            device: DeviceSpec::default(),
            weight_dtype: WeightDtype::default(),
            load: LoadOptions::default(),
            text_encoders: None,
            memory_bytes: None,
            max_queued_sessions: DEFAULT_MAX_QUEUED_SESSIONS,
        }
    }
}

/// Why the engine could not be started, or refused a request.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Two models were given one name.
    #[error("two models are called `{name}`")]
    DuplicateModel {
        /// The name.
        name: String,
    },
    /// A model could not be loaded.
    #[error("model `{model}`: {source}")]
    Load {
        /// Its name.
        model: String,
        /// Why.
        source: Box<tale_models::Error>,
    },
    /// The device could not be opened.
    #[error(transparent)]
    Open(Box<tale_models::Error>),
    /// The device's thread could not be started, or has died.
    #[error("device thread: {0}")]
    Thread(String),
    /// More memory is configured than the device has.
    #[error("memory: {needed_bytes} bytes are configured, {device} has {free_bytes} free")]
    Memory {
        /// The device.
        device: DeviceSpec,
        /// Bytes asked for.
        needed_bytes: usize,
        /// Bytes that nobody holds.
        free_bytes: usize,
    },
    /// No model has this name.
    #[error("there is no model `{name}`; this server has: {}", known.join(", "))]
    UnknownModel {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// The model's queue has no place for this client.
    #[error("requests already wait for model `{model}`: {reason}")]
    Busy {
        /// The model.
        model: String,
        /// The bound that is met.
        reason: NoPlace,
    },
    /// The engine shuts down, or its device thread has died.
    #[error("the server takes no new work: it is shutting down")]
    Draining,
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

/// One model as the rest of the server sees it.
#[derive(Debug, Clone)]
pub struct ServedModel {
    /// `model` of the API.
    pub name: String,
    /// Limits, defaults, tokenizer.
    pub card: Arc<ModelCard>,
    /// When it was loaded.
    pub created: SystemTime,
}

/// The cloneable handle of a running engine. The device thread ends when the last handle and session are dropped.
#[derive(Debug, Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    models: Vec<ServedModel>,
    gauges: Arc<Gauges>,
    next_session: AtomicU64,
    /// Its length is bounded: a submission holds a place of the model's queue, a cancellation needs a submission, and what
    /// has room again was full.
    commands: Sender<Command>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Numbers that the device thread publishes and everybody may read.
#[derive(Debug, Default)]
struct Gauges {
    models: Vec<ModelGauges>,
    draining: AtomicBool,
    dead: AtomicBool,
    ledger_used_bytes: AtomicUsize,
    ledger_capacity_bytes: AtomicUsize,
}

#[derive(Debug)]
struct ModelGauges {
    /// Sessions that are submitted and not begun hold a place.
    queue: Arc<Places>,
    /// Submitted and not ended.
    live: AtomicUsize,
    running: AtomicUsize,
    waiting: AtomicUsize,
    kv_blocks_used: AtomicUsize,
    kv_blocks_total: AtomicUsize,
}

/// A snapshot of the engine for readiness and metrics.
#[derive(Debug, Clone)]
pub struct EngineStatus {
    /// One per model, in the order of [`Engine::models`].
    pub models: Vec<ModelStatus>,
    /// New work is refused.
    pub draining: bool,
    /// The device thread lives.
    pub alive: bool,
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
    /// What the runner holds.
    pub runner: RunnerStatus,
}

impl Engine {
    /// Starts the device thread, opens the device there and loads the models; returns when all are loaded or the first
    /// has failed. `on_component` hears (model, component) before each component is read.
    pub fn load(
        models: Vec<ModelSpec>,
        options: EngineOptions,
        on_component: impl FnMut(&str, &str) + Send + 'static,
    ) -> Result<Engine, EngineError> {
        check_names(models.iter().map(|model| model.name.as_str()))?;
        let loading = options.clone();
        Self::spawn(options, move || load_models(models, &loading, on_component))
    }

    /// Starts the device thread over models that are loaded already. They must not hold memory of a GPU, which only
    /// the thread that opened it may use.
    pub fn start(models: Vec<(String, LoadedModel)>, options: EngineOptions) -> Result<Engine, EngineError> {
        check_names(models.iter().map(|(name, _)| name.as_str()))?;
        let capacity_bytes = options.memory_bytes.unwrap_or_else(memory::default_capacity_bytes);
        Self::spawn(options, move || Ok(Loaded { models, capacity_bytes }))
    }

    fn spawn(
        options: EngineOptions,
        load: impl FnOnce() -> Result<Loaded, EngineError> + Send + 'static,
    ) -> Result<Engine, EngineError> {
        let (commands, receiver) = channel();
        let (loaded, is_loaded) = sync_channel(1);
        let max_queued_sessions = options.max_queued_sessions;
        let thread = std::thread::Builder::new()
            .name(format!("device-{}", options.device))
            .spawn(move || match load().and_then(|loaded| prepare(loaded, max_queued_sessions)) {
                Ok((models, worker)) => {
                    // The receiver is gone only when the caller is.
                    let _ = loaded.send(Ok((models, worker.gauges())));
                    // Weights are where they stay; what follows comes again with every step.
                    keep_freed_memory();
                    worker.run(&receiver);
                }
                Err(error) => drop(loaded.send(Err(error))),
            })
            .map_err(|error| EngineError::Thread(error.to_string()))?;
        let (models, gauges) =
            is_loaded.recv().map_err(|_| EngineError::Thread("it panicked while it loaded a model".into()))??;
        let shared =
            Shared { models, gauges, next_session: AtomicU64::new(1), commands, thread: Mutex::new(Some(thread)) };
        Ok(Engine { shared: Arc::new(shared) })
    }

    /// The models, in the order in which they were given.
    pub fn models(&self) -> &[ServedModel] {
        &self.shared.models
    }

    /// The card of the model with this name.
    pub fn card(&self, name: &str) -> Option<Arc<ModelCard>> {
        self.models().iter().find(|model| model.name == name).map(|model| model.card.clone())
    }

    /// The model with this name, or the error that names those there are.
    pub fn model(&self, name: &str) -> Result<&ServedModel, EngineError> {
        self.models().iter().find(|model| model.name == name).ok_or_else(|| self.unknown(name))
    }

    /// Hands a validated request of a client to the device thread. Never waits.
    pub fn submit(&self, model: &str, client: ClientId, request: Request) -> Result<Session, EngineError> {
        self.submit_if(model, client, request, None)
    }

    /// As [`Engine::submit`], but when its turn comes the session begins only if `may_begin` agrees; else it ends without
    /// an end, before its first step.
    pub fn submit_if(
        &self,
        model: &str,
        client: ClientId,
        request: Request,
        may_begin: Option<MayBegin>,
    ) -> Result<Session, EngineError> {
        let index = self.index(model)?;
        if !self.takes_work() {
            return Err(EngineError::Draining);
        }
        let place = self.shared.gauges.models[index].queue.take(client);
        let place = place.map_err(|reason| EngineError::Busy { model: model.to_owned(), reason })?;
        self.hand_over(index, client, request, place, may_begin)
    }

    /// As [`Engine::submit_if`], for the next part of work whose part before has ended: it has a place in the queue whoever
    /// else waits, and is taken until the engine stops. One part at a time is the caller's to keep.
    pub fn submit_further(
        &self,
        model: &str,
        client: ClientId,
        request: Request,
        may_begin: Option<MayBegin>,
    ) -> Result<Session, EngineError> {
        let index = self.index(model)?;
        let place = self.shared.gauges.models[index].queue.take_further(client);
        self.hand_over(index, client, request, place, may_begin)
    }

    fn index(&self, model: &str) -> Result<usize, EngineError> {
        self.models().iter().position(|served| served.name == model).ok_or_else(|| self.unknown(model))
    }

    fn hand_over(
        &self,
        index: usize,
        client: ClientId,
        request: Request,
        place: Place,
        may_begin: Option<MayBegin>,
    ) -> Result<Session, EngineError> {
        let shared = &self.shared;
        let gauges = &shared.gauges.models[index];
        gauges.live.fetch_add(1, Relaxed);
        let id = SessionId(shared.next_session.fetch_add(1, Relaxed));
        let mailbox = Arc::new(Mailbox::default());
        let order = Order { id, client, model: index, request, mailbox: mailbox.clone(), place, may_begin };
        shared.commands.send(Command::Submit(order)).map_err(|_| EngineError::Draining)?;
        Ok(Session { id, mailbox, commands: shared.commands.clone(), ended: false })
    }

    /// Whether new work is taken.
    pub fn takes_work(&self) -> bool {
        !self.shared.gauges.draining.load(Relaxed) && self.is_alive()
    }

    /// Whether the device thread lives.
    pub fn is_alive(&self) -> bool {
        !self.shared.gauges.dead.load(Relaxed)
    }

    /// What the engine holds now.
    pub fn status(&self) -> EngineStatus {
        let gauges = &self.shared.gauges;
        let models = self.models().iter().zip(&gauges.models);
        EngineStatus {
            models: models.map(|(model, gauges)| gauges.snapshot(&model.name)).collect(),
            draining: gauges.draining.load(Relaxed),
            alive: self.is_alive(),
            ledger_used_bytes: gauges.ledger_used_bytes.load(Relaxed),
            ledger_capacity_bytes: gauges.ledger_capacity_bytes.load(Relaxed),
        }
    }

    /// Refuses new work from now on; what runs goes on.
    pub fn drain(&self) {
        self.shared.gauges.draining.store(true, Relaxed);
    }

    /// Refuses new work, gives what runs the time `drain` to finish, cancels the rest and ends the device thread.
    /// Blocks until then, one step longer than `drain` at most.
    pub fn shutdown(&self, drain: Duration) {
        self.drain();
        let deadline = Instant::now() + drain;
        while self.has_live_sessions() && self.is_alive() && Instant::now() < deadline {
            std::thread::sleep(SHUTDOWN_POLL);
        }
        // An error means that the thread has ended already.
        let _ = self.shared.commands.send(Command::Stop);
        let thread = self.shared.thread.lock().expect("nothing panics while it holds the handle: this is a bug").take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the device thread had panicked");
        }
    }

    fn has_live_sessions(&self) -> bool {
        self.shared.gauges.models.iter().any(|model| model.live.load(Relaxed) > 0)
    }

    fn unknown(&self, name: &str) -> EngineError {
        let known = self.models().iter().map(|model| model.name.clone()).collect();
        EngineError::UnknownModel { name: name.to_owned(), known }
    }
}

/// How often a shutdown looks whether the last session has ended.
const SHUTDOWN_POLL: Duration = Duration::from_millis(5);

impl ModelGauges {
    fn new(max_queued_sessions: usize) -> Self {
        Self {
            queue: Places::new(max_queued_sessions),
            live: AtomicUsize::default(),
            running: AtomicUsize::default(),
            waiting: AtomicUsize::default(),
            kv_blocks_used: AtomicUsize::default(),
            kv_blocks_total: AtomicUsize::default(),
        }
    }

    fn publish(&self, status: RunnerStatus) {
        self.running.store(status.running, Relaxed);
        self.waiting.store(status.waiting, Relaxed);
        self.kv_blocks_used.store(status.kv_blocks_used, Relaxed);
        self.kv_blocks_total.store(status.kv_blocks_total, Relaxed);
    }

    fn snapshot(&self, name: &str) -> ModelStatus {
        ModelStatus {
            name: name.to_owned(),
            queued: self.queue.taken(),
            live: self.live.load(Relaxed),
            runner: RunnerStatus {
                running: self.running.load(Relaxed),
                waiting: self.waiting.load(Relaxed),
                kv_blocks_used: self.kv_blocks_used.load(Relaxed),
                kv_blocks_total: self.kv_blocks_total.load(Relaxed),
            },
        }
    }
}

fn check_names<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), EngineError> {
    let mut seen = BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(EngineError::DuplicateModel { name: name.to_owned() });
        }
    }
    Ok(())
}

/// Models, and the memory that they and their sessions share.
struct Loaded {
    models: Vec<(String, LoadedModel)>,
    capacity_bytes: usize,
}

/// Opens the device and loads the models, all on the calling thread: the device's.
fn load_models(
    models: Vec<ModelSpec>,
    options: &EngineOptions,
    mut on_component: impl FnMut(&str, &str),
) -> Result<Loaded, EngineError> {
    let placement = Placement::open(options.device, options.weight_dtype).map_err(cannot_open)?;
    let capacity_bytes = capacity_bytes(options, placement.memory().map_err(cannot_open)?)?;
    let text_encoders = place_text_encoders(&models, options, capacity_bytes)?;
    let mut free_bytes = capacity_bytes;
    let mut loaded = Vec::with_capacity(models.len());
    for (model, text_encoders) in models.into_iter().zip(text_encoders) {
        let ModelSpec { name, source, prompt_lookup } = model;
        if text_encoders == TextEncoders::OnDemand {
            tracing::info!(model = name, "text encoders are read when prompts are encoded, and leave the device after");
        }
        let mut on_component = |component: &str| on_component(&name, component);
        let is_of_text = prompt_lookup.is_some();
        let prompt_lookup = prompt_lookup.unwrap_or(options.load.prompt_lookup);
        let load = LoadOptions { text_encoders, prompt_lookup, ..options.load.clone() };
        let fits = Fits { device: options.device, weight_dtype: options.weight_dtype, free_bytes, is_of_text };
        match fits.load(&source, &placement, &load, &mut on_component) {
            Ok(model) => {
                free_bytes = free_bytes.saturating_sub(model.resident_bytes);
                loaded.push((name, model));
            }
            Err(error) => return Err(EngineError::Load { model: name, source: Box::new(error) }),
        }
    }
    Ok(Loaded { models: loaded, capacity_bytes })
}

/// Where the text encoders of each model are, on a device of this capacity.
pub(crate) fn place_text_encoders(
    models: &[ModelSpec],
    options: &EngineOptions,
    capacity_bytes: usize,
) -> Result<Vec<TextEncoders>, EngineError> {
    if let Some(text_encoders) = options.text_encoders {
        return Ok(vec![text_encoders; models.len()]);
    }
    let dry = Placement::in_host_memory(options.device, options.weight_dtype);
    let choice = |model: &ModelSpec| {
        residency::Choice::of(&model.source, &dry, &options.load)
            .map_err(|error| EngineError::Load { model: model.name.clone(), source: Box::new(error) })
    };
    Ok(residency::choose(&models.iter().map(choice).collect::<Result<Vec<_>, _>>()?, capacity_bytes))
}

fn cannot_open(error: tale_models::Error) -> EngineError {
    EngineError::Open(Box::new(error))
}

/// What is configured, or most of what the device has; `gpu` is absent on the CPU. A GPU cannot give more than is free;
/// the CPU's memory may be configured beyond that, since the operating system takes it from elsewhere.
pub(crate) fn capacity_bytes(options: &EngineOptions, gpu: Option<DeviceMemory>) -> Result<usize, EngineError> {
    match (options.memory_bytes, gpu) {
        (Some(needed_bytes), Some(DeviceMemory { free_bytes, .. })) if needed_bytes > free_bytes => {
            Err(EngineError::Memory { device: options.device, needed_bytes, free_bytes })
        }
        (Some(bytes), _) => Ok(bytes),
        (None, Some(gpu)) => Ok(gpu.usable_bytes()),
        (None, None) => Ok(memory::default_capacity_bytes()),
    }
}

/// What a model has to be to be loaded.
struct Fits {
    device: DeviceSpec,
    weight_dtype: WeightDtype,
    /// What it may take.
    free_bytes: usize,
    /// Whether something is said of it that only a language model can have.
    is_of_text: bool,
}

impl Fits {
    /// What a model takes is known from its headers, so that a model too large is refused before a tensor is read, and so is
    /// one that cannot be loaded.
    fn load(
        &self,
        source: &ModelSource,
        placement: &Placement,
        load: &LoadOptions,
        on_component: &mut dyn FnMut(&str),
    ) -> Result<LoadedModel, tale_models::Error> {
        let dry = Placement::in_host_memory(self.device, self.weight_dtype);
        let (inspection, _) = loading::plan_quietly(source, &dry, load)?;
        let (needed_bytes, free_bytes) = (inspection.resident_bytes(), self.free_bytes);
        let (family, makes) = (inspection.family, inspection.makes);
        if let Some(problem) = inspection.into_problem() {
            return Err(problem);
        }
        if self.is_of_text && makes != "text" {
            let problem = format!("models of family {family} make no tokens that could be guessed");
            return Err(tale_models::Error::checkpoint(&source.path, problem));
        }
        if needed_bytes > free_bytes {
            return Err(tale_models::Error::OutOfMemory { phase: None, needed_bytes, free_bytes });
        }
        loading::load(source, placement, load, on_component)
    }
}

/// Books the models' memory and puts cards and runners into the hands that need them.
fn prepare(
    loaded: Loaded,
    max_queued_sessions: usize,
) -> Result<(Vec<ServedModel>, DeviceWorker<WallClock>), EngineError> {
    let Loaded { models, capacity_bytes } = loaded;
    let mut ledger = Ledger::new(capacity_bytes);
    let (mut cards, mut runners) = (Vec::with_capacity(models.len()), Vec::with_capacity(models.len()));
    for (index, (name, model)) in models.into_iter().enumerate() {
        ledger.reserve(Owner::Model(index), model.resident_bytes).map_err(|shortage| EngineError::Load {
            model: name.clone(),
            source: Box::new(tale_models::Error::OutOfMemory {
                phase: None,
                needed_bytes: shortage.needed_bytes,
                free_bytes: shortage.free_bytes,
            }),
        })?;
        runners.push((name.clone(), model.runner));
        cards.push((name, model.card));
    }
    let room_bytes = ledger.session_capacity_bytes();
    runners.iter_mut().for_each(|(_, runner)| runner.set_room(room_bytes));
    let served = cards.into_iter().map(|(name, card)| ServedModel {
        name,
        card: Arc::new(card.with_room(room_bytes)),
        created: SystemTime::now(),
    });
    let served = served.collect();
    Ok((served, DeviceWorker::new(runners, ledger, max_queued_sessions, WallClock::default())))
}

/// One running generation. Dropping it before its end cancels the device work within one step.
#[derive(Debug)]
pub struct Session {
    id: SessionId,
    mailbox: Arc<Mailbox>,
    commands: Sender<Command>,
    ended: bool,
}

impl Session {
    /// Its id, unique in this process.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// The next event. Events that were not taken in time come joined: text appended, progress replaced by the latest. While
    /// too many frames wait to be taken ([`tale_models::memory::MAX_UNREAD_FRAME_BYTES`]) the session has no steps. `None` after
    /// the terminal event, or without one when the engine was shut down.
    pub async fn recv(&mut self) -> Option<Event> {
        std::future::poll_fn(|context| self.poll_recv(context)).await
    }

    /// As [`Session::recv`], for streams written by hand.
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let polled = self.mailbox.poll(context.waker());
        if let Poll::Ready(event) = &polled {
            self.ended |= event.as_ref().is_none_or(Event::is_terminal);
            if matches!(event, Some(Event::Frames(_))) && self.mailbox.has_room_again() {
                // An error means that the device thread has ended.
                let _ = self.commands.send(Command::Resume(self.id));
            }
        }
        polled
    }

    /// As [`Session::recv`], on a thread that may block.
    pub fn blocking_recv(&mut self) -> Option<Event> {
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        loop {
            match self.poll_recv(&mut Context::from_waker(&waker)) {
                Poll::Ready(event) => return event,
                Poll::Pending => std::thread::park(),
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.ended {
            // An error means that the device thread, and the work with it, has ended.
            let _ = self.commands.send(Command::Cancel(self.id));
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

#[cfg(test)]
mod tests;
