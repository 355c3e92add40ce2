//! The step-wise engine: one thread per device owns its runners and its memory ledger; everybody else holds handles.
//!
//! [`Engine`] is the cloneable handle: cards, submission, status, shutdown. A request goes to the device on which it is expected to
//! end first. [`Session`] is one running generation: reading it follows the work, dropping it cancels the work within one step.
//! Deliberately does not know: HTTP, jobs, media, tensors.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::Sender;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant, SystemTime};

use tale_models::device::{DeviceSpec, WeightDtype};
use tale_models::family::{LoadOptions, TextEncoders};
use tale_models::runner::RunnerStatus;
use tale_models::runner::text::lookup::PromptLookup;
use tale_models::{ClientId, Event, LoadedModel, ModelCard, ModelSource, Request, SessionCheckpoint, SessionId};

use self::command::{Command, Order};
use self::device::DeviceHandle;
use self::mailbox::Mailbox;
use self::replicas::{Chosen, Replica, Replicas};
use crate::places::{NoPlace, Place};

mod affinity;
pub mod arbiter;
pub mod assignment;
mod command;
mod device;
mod gauges;
pub mod ledger;
mod loading;
mod mailbox;
mod memory;
mod peers;
mod rates;
mod replicas;
mod residency;
mod worker;

pub use loading::Planned;
pub(crate) use loading::{capacity_bytes, place_text_encoders, plan};

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
    /// How its tokens are guessed, if at all; `None` leaves that to the options of all models.
    pub prompt_lookup: Option<Option<PromptLookup>>,
}

impl ModelSpec {
    /// On whatever devices have room for it, with the options of all models.
    pub fn new(name: impl Into<String>, source: impl Into<ModelSource>) -> Self {
        Self { name: name.into(), source: source.into(), devices: Vec::new(), replicas: None, prompt_lookup: None }
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
}

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
    /// A device could not be opened.
    #[error(transparent)]
    Open(Box<tale_models::Error>),
    /// Devices that cannot be used together, or that a model cannot have.
    #[error("{0}")]
    Devices(String),
    /// A model fits on no device that may hold it.
    #[error(
        "model `{model}` fits on no device: with a request it takes {needed_bytes} bytes, and {device}, which has most room for it, has \
         {free_bytes} beside its other models"
    )]
    NoRoom {
        /// Its name.
        model: String,
        /// See there.
        device: DeviceSpec,
        /// See there.
        needed_bytes: usize,
        /// See there.
        free_bytes: usize,
    },
    /// All devices that hold a model have failed.
    #[error("no device is left for model `{model}`: {problems}")]
    Failed {
        /// Its name.
        model: String,
        /// What is wrong with them.
        problems: String,
    },
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

/// How a session is begun.
#[derive(Debug, Clone, Default)]
pub struct SubmitOptions {
    /// When its turn comes the session begins only if this agrees; else it ends without an end, before its first step.
    pub may_begin: Option<MayBegin>,
    /// Whether it says now and then what it needs to go on elsewhere ([`Event::Checkpoint`]): after its first denoising step, from
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

/// One model as the rest of the server sees it.
#[derive(Debug, Clone)]
pub struct ServedModel {
    /// `model` of the API.
    pub name: String,
    /// Limits, defaults, tokenizer.
    pub card: Arc<ModelCard>,
    /// When it was loaded.
    pub created: SystemTime,
    /// Where it lies.
    pub devices: Vec<DeviceSpec>,
}

/// The cloneable handle of a running engine. The threads of devices end when the last handle and session are dropped.
#[derive(Debug, Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    models: Vec<ServedModel>,
    /// One per model.
    replicas: Vec<Replicas>,
    devices: Vec<DeviceHandle>,
    prefix_cache: tale_models::kv::PrefixCache,
    draining: AtomicBool,
    next_session: AtomicU64,
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
    /// Starts a thread per device, opens the devices there and loads the models; returns when all are loaded or the first
    /// has failed. `on_component` hears (model, component) before each component is read.
    pub fn load(
        models: Vec<ModelSpec>,
        options: EngineOptions,
        on_component: impl FnMut(&str, &str) + Send + 'static,
    ) -> Result<Engine, EngineError> {
        check_names(models.iter().map(|model| model.name.as_str()))?;
        Ok(Self::of(loading::load(models, &options, on_component)?, &options))
    }

    /// Starts a thread over models that are loaded already, as if for the first device. They must not hold memory of a GPU, which
    /// only the thread that opened it may use.
    pub fn start(models: Vec<(String, LoadedModel)>, options: EngineOptions) -> Result<Engine, EngineError> {
        Self::start_on(vec![models], options)
    }

    /// As [`Engine::start`], with the models of each device.
    pub fn start_on(models: Vec<Vec<(String, LoadedModel)>>, options: EngineOptions) -> Result<Engine, EngineError> {
        for models in &models {
            check_names(models.iter().map(|(name, _)| name.as_str()))?;
        }
        Ok(Self::of(loading::start(models, &options)?, &options))
    }

    fn of(ready: loading::Ready, options: &EngineOptions) -> Self {
        let loading::Ready { models, devices } = ready;
        let (models, replicas) = models.into_iter().unzip();
        let shared = Shared {
            models,
            replicas,
            devices,
            prefix_cache: options.load.prefix_cache,
            draining: AtomicBool::default(),
            next_session: AtomicU64::new(1),
        };
        Engine { shared: Arc::new(shared) }
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
        let index = self.index(model)?;
        if !self.takes_work() {
            return Err(EngineError::Draining);
        }
        let place = self.shared.replicas[index].queue().take(client);
        let place = place.map_err(|reason| EngineError::Busy { model: model.to_owned(), reason })?;
        self.send(index, client, request, place, options.into())
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
        let index = self.index(model)?;
        let place = self.shared.replicas[index].queue().take_further(client);
        self.send(index, client, request, place, options.into())
    }

    fn index(&self, model: &str) -> Result<usize, EngineError> {
        self.models().iter().position(|served| served.name == model).ok_or_else(|| self.unknown(model))
    }

    fn send(
        &self,
        index: usize,
        client: ClientId,
        request: Request,
        place: Place,
        options: SubmitOptions,
    ) -> Result<Session, EngineError> {
        let shared = &self.shared;
        let replicas = &shared.replicas[index];
        let Some(Chosen { index: chosen, seconds: predicted_seconds }) =
            replicas.choose(client, &request, shared.prefix_cache)
        else {
            return Err(self.failed(index));
        };
        let id = SessionId(shared.next_session.fetch_add(1, Relaxed));
        let mailbox = Arc::new(Mailbox::default());
        let session = Session { id, mailbox: mailbox.clone(), commands: replicas.commands.clone(), ended: false };
        let Replica { runner, .. } = replicas.on[chosen];
        let order = Order { id, client, model: runner, request, mailbox, place, options, predicted_seconds };
        replicas.commands[chosen].send(Command::Submit(order)).map_err(|_| EngineError::Draining)?;
        Ok(session)
    }

    fn failed(&self, index: usize) -> EngineError {
        let devices = self.shared.replicas[index].on.iter().map(|replica| &self.shared.devices[replica.device]);
        let problem = |device: &DeviceHandle| {
            let problem = device.gauges.problem().unwrap_or_else(|| "its thread has ended".into());
            format!("{}: {problem}", device.spec)
        };
        let problems = devices.map(problem).collect::<Vec<_>>().join("; ");
        EngineError::Failed { model: self.models()[index].name.clone(), problems }
    }

    /// Whether new work is taken.
    pub fn takes_work(&self) -> bool {
        !self.shared.draining.load(Relaxed) && self.is_alive()
    }

    /// Whether a device lives.
    pub fn is_alive(&self) -> bool {
        self.shared.devices.iter().any(|device| device.gauges.is_alive())
    }

    /// What is wrong, if no device is left for some model; others may be served.
    pub fn problem(&self) -> Option<EngineError> {
        let lost = self.shared.replicas.iter().position(|replicas| !replicas.is_alive());
        lost.map(|index| self.failed(index))
    }

    /// What the engine holds now.
    pub fn status(&self) -> EngineStatus {
        EngineStatus {
            models: (0..self.models().len()).map(|index| self.model_status(index)).collect(),
            devices: self.shared.devices.iter().map(DeviceHandle::status).collect(),
            draining: self.shared.draining.load(Relaxed),
            alive: self.problem().is_none(),
        }
    }

    fn model_status(&self, index: usize) -> ModelStatus {
        let on = &self.shared.replicas[index].on;
        let gauges = on.iter().map(|replica| &*replica.gauges);
        let mut runner = RunnerStatus::default();
        for of in gauges.clone().map(gauges::ModelGauges::runner) {
            runner.running += of.running;
            runner.waiting += of.waiting;
            runner.kv_blocks_used += of.kv_blocks_used;
            runner.kv_blocks_total += of.kv_blocks_total;
        }
        ModelStatus {
            name: self.models()[index].name.clone(),
            queued: self.shared.replicas[index].queue().taken(),
            live: gauges.map(gauges::ModelGauges::live).sum(),
            runner,
        }
    }

    /// Refuses new work from now on; what runs goes on.
    pub fn drain(&self) {
        self.shared.draining.store(true, Relaxed);
    }

    /// Refuses new work and ends what runs at the next boundary between two steps: each session ends with
    /// [`tale_models::Error::HandedOver`], those whose checkpoints are wanted and that have come so far with an
    /// [`Event::Checkpoint`] before it. Does not wait for it; [`Engine::shutdown`] does.
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

    fn unknown(&self, name: &str) -> EngineError {
        let known = self.models().iter().map(|model| model.name.clone()).collect();
        EngineError::UnknownModel { name: name.to_owned(), known }
    }
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

/// One running generation. Dropping it before its end cancels the device work within one step.
#[derive(Debug)]
pub struct Session {
    id: SessionId,
    mailbox: Arc<Mailbox>,
    /// Of all devices that may have it: before its first step it may go from one to another.
    commands: Arc<[Arc<Sender<Command>>]>,
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
                self.tell(|| Command::Unpause(self.id));
            }
        }
        polled
    }

    /// Has the session say between its next two steps what it needs to go on elsewhere, whether it does so by itself or not:
    /// an [`Event::Checkpoint`], or nothing where it has not come so far.
    pub fn checkpoint_now(&self) {
        self.tell(|| Command::Checkpoint(self.id));
    }

    /// Those that do not have it do nothing. An error means that a device's thread, and the work with it, has ended.
    fn tell(&self, command: impl Fn() -> Command) {
        self.commands.iter().for_each(|commands| drop(commands.send(command())));
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
            self.mailbox.abandon();
            self.tell(|| Command::Cancel(self.id));
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
mod fleet_tests;
#[cfg(test)]
mod saving_tests;
#[cfg(test)]
mod tests;
