//! The models of the server by name: which are there, which come and go.
//!
//! Owns: what is known of each, and who works with one. Does not know: how one comes and goes ([`super::lifecycle`]).

use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant, SystemTime};

use tale_models::ModelCard;
use tale_models::device::DeviceSpec;
use tokio::sync::watch;

use super::coming::Progress;
use super::replicas::Replicas;
use super::{EngineError, ModelSpec};
use crate::places::Places;

/// How long a model that could not be loaded is left alone by requests.
const RETRY_AFTER_FAILURE: Duration = Duration::from_secs(5);

const NOTHING_PANICS: &str = "nothing panics while it holds this: this is a bug";

/// Whether a model is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelState {
    /// It is being loaded, and nothing of that name is there yet.
    Loading,
    /// It takes requests.
    Ready,
    /// It takes none any more, and what runs is ended.
    Unloading,
    /// It is not there.
    Unloaded,
    /// It is not there, since it could not be loaded.
    Failed,
}

impl ModelState {
    /// As the API calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Unloading => "unloading",
            Self::Unloaded => "unloaded",
            Self::Failed => "failed",
        }
    }
}

/// Bytes of files that are read for a model, on all devices that load it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// So far.
    pub read_bytes: usize,
    /// In all; 0 while that is not known.
    pub total_bytes: usize,
}

/// What is known of a model.
#[derive(Debug, Clone)]
pub struct ModelReport {
    /// `model` of the API.
    pub name: String,
    /// Whether it is there.
    pub state: ModelState,
    /// When it was loaded, or, where it is not, when the server began.
    pub created: SystemTime,
    /// Where it lies.
    pub devices: Vec<DeviceSpec>,
    /// Of weights that are being read, also of such as will take the place of those that are there.
    pub progress: Option<LoadProgress>,
    /// Why the last loading failed.
    pub problem: Option<String>,
}

/// A model that is loaded. Whoever holds it has it until it is dropped: it is unloaded after that, within bounds of time.
#[derive(Debug)]
pub struct ServedModel {
    /// `model` of the API.
    pub name: String,
    /// When it was loaded.
    pub created: SystemTime,
    /// Where it lies.
    pub devices: Vec<DeviceSpec>,
    pub(super) replicas: Replicas,
    /// For the room that sessions have.
    card: Mutex<(usize, Arc<ModelCard>)>,
    /// Sessions are sent to its devices.
    is_open: RwLock<bool>,
}

impl ServedModel {
    pub(super) fn new(name: String, card: ModelCard, devices: Vec<DeviceSpec>, replicas: Replicas) -> Self {
        let room_bytes = replicas.room_bytes();
        let card = Mutex::new((room_bytes, Arc::new(card.with_room(room_bytes))));
        Self { name, created: SystemTime::now(), devices, replicas, card, is_open: RwLock::new(true) }
    }

    /// Limits, defaults, tokenizer. Any of its devices takes what the card allows: it is for the one with the least room, which is
    /// less when further models come.
    pub fn card(&self) -> Arc<ModelCard> {
        let room_bytes = self.replicas.room_bytes();
        let mut card = self.card.lock().expect(NOTHING_PANICS);
        if card.0 != room_bytes {
            if let ModelCard::Diffusion(of_diffusion) = &*card.1 {
                card.1 = Arc::new(ModelCard::Diffusion(of_diffusion.clone().with_room(room_bytes)));
            }
            card.0 = room_bytes;
        }
        card.1.clone()
    }

    /// While what is returned is held, what is sent to a device arrives before it is told to unload; `None` once it was.
    pub(super) fn opened(&self) -> Option<RwLockReadGuard<'_, bool>> {
        Some(self.is_open.read().expect(NOTHING_PANICS)).filter(|is_open| **is_open)
    }

    /// From now on nothing more is sent to its devices.
    pub(super) fn close(&self) {
        *self.is_open.write().expect(NOTHING_PANICS) = false;
    }

    /// Whether somebody works with it, beside those that hold it as one of the catalogue's, who are `keepers`.
    pub(super) fn is_used(self: &Arc<Self>, keepers: usize) -> bool {
        Arc::strong_count(self) > keepers || self.replicas.live() > 0
    }
}

/// What is done with a model.
#[derive(Debug, Clone)]
pub(super) enum Work {
    Loading(Arc<Progress>),
    Unloading,
}

/// One model.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    /// Sessions that wait for it, whichever weights and devices they are for.
    pub(super) queue: Arc<Places>,
    /// Requests that wait until it is loaded.
    pub(super) early: Arc<Places>,
    created: SystemTime,
    state: Mutex<State>,
}

/// What changes of it.
#[derive(Debug)]
pub(super) struct State {
    /// As what it is loaded the next time.
    pub(super) spec: ModelSpec,
    pub(super) current: Option<Arc<ServedModel>>,
    /// One at a time.
    pub(super) work: Option<Work>,
    /// Why it could not be loaded, and when that was.
    failure: Option<(String, Instant)>,
    /// Whether a request loads it.
    comes_back: bool,
    last_used: Instant,
}

impl State {
    fn state(&self) -> ModelState {
        match (&self.current, &self.work, &self.failure) {
            (Some(_), ..) => ModelState::Ready,
            (None, Some(Work::Loading(_)), _) => ModelState::Loading,
            (None, Some(Work::Unloading), _) => ModelState::Unloading,
            (None, None, Some(_)) => ModelState::Failed,
            (None, None, None) => ModelState::Unloaded,
        }
    }

    fn progress(&self) -> Option<LoadProgress> {
        let Some(Work::Loading(progress)) = &self.work else { return None };
        let (read_bytes, total_bytes) = progress.bytes();
        Some(LoadProgress { read_bytes, total_bytes })
    }

    /// Whether a request that finds it away loads it.
    pub(super) fn is_wanted_by_requests(&self, now: Instant) -> bool {
        let has_just_failed = |at: Instant| now.saturating_duration_since(at) < RETRY_AFTER_FAILURE;
        self.comes_back
            && self.current.is_none()
            && self.work.is_none()
            && !self.failure.as_ref().is_some_and(|(_, at)| has_just_failed(*at))
    }

    /// Whether it is there, comes back by itself, and nobody works with it.
    pub(super) fn may_make_room(&self) -> bool {
        let is_idle = self.current.as_ref().is_some_and(|current| !current.is_used(1));
        self.spec.on_demand && self.work.is_none() && is_idle
    }

    pub(super) fn last_used(&self) -> Instant {
        self.last_used
    }

    /// Takes out what is there, if nobody has worked with it for as long as it may be idle.
    pub(super) fn take_idle(&mut self, now: Instant) -> Option<Arc<ServedModel>> {
        let allowed = self.spec.idle_unload?;
        let current = self.current.as_ref().filter(|_| self.work.is_none())?;
        if current.is_used(1) {
            self.last_used = now;
        }
        if now.saturating_duration_since(self.last_used) < allowed {
            return None;
        }
        self.comes_back = true;
        self.take()
    }

    /// Takes out what is there: no further request gets it.
    pub(super) fn take(&mut self) -> Option<Arc<ServedModel>> {
        let current = self.current.take()?;
        self.work = Some(Work::Unloading);
        Some(current)
    }

    /// It is not there because somebody said so: requests do not load it, if it is not one that comes on demand.
    pub(super) fn is_put_away(&mut self) {
        self.comes_back = self.spec.on_demand;
    }

    /// These weights are there from now on, as `spec` says; those that were before are returned.
    pub(super) fn becomes(&mut self, spec: ModelSpec, model: Arc<ServedModel>) -> Option<Arc<ServedModel>> {
        (self.spec, self.failure, self.last_used) = (spec, None, Instant::now());
        self.current.replace(model)
    }

    pub(super) fn has_failed(&mut self, problem: String) {
        self.failure = Some((problem, Instant::now()));
    }
}

impl Entry {
    /// One that is loaded, or will be.
    pub(super) fn new(spec: ModelSpec, queue: Arc<Places>, early: Arc<Places>, current: Option<ServedModel>) -> Self {
        let state = State {
            comes_back: spec.on_demand,
            current: current.map(Arc::new),
            work: None,
            failure: None,
            last_used: Instant::now(),
            spec,
        };
        Self { name: state.spec.name.clone(), queue, early, created: SystemTime::now(), state: Mutex::new(state) }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect(NOTHING_PANICS)
    }

    pub(super) fn report(&self) -> ModelReport {
        let state = self.state();
        let current = state.current.as_ref();
        ModelReport {
            name: self.name.clone(),
            state: state.state(),
            created: current.map_or(self.created, |current| current.created),
            devices: current.map_or_else(Vec::new, |current| current.devices.clone()),
            progress: state.progress(),
            problem: state.failure.as_ref().map(|(problem, _)| problem.clone()),
        }
    }

    /// What is there, for a request.
    pub(super) fn current(&self) -> Result<Arc<ServedModel>, EngineError> {
        let mut state = self.state();
        if let Some(current) = state.current.clone() {
            state.last_used = Instant::now();
            return Ok(current);
        }
        Err(EngineError::NotLoaded {
            model: self.name.clone(),
            state: state.state(),
            progress: state.progress(),
            problem: state.failure.as_ref().map(|(problem, _)| problem.clone()),
            comes_back: state.comes_back,
        })
    }
}

/// All of them; which names there are is known from the beginning.
#[derive(Debug)]
pub(super) struct Catalogue {
    pub(super) entries: Vec<Entry>,
    changed: watch::Sender<()>,
}

impl Catalogue {
    pub(super) fn new(entries: Vec<Entry>) -> Self {
        Self { entries, changed: watch::Sender::new(()) }
    }

    pub(super) fn entry(&self, name: &str) -> Result<&Entry, EngineError> {
        self.entries.iter().find(|entry| entry.name == name).ok_or_else(|| EngineError::UnknownModel {
            name: name.to_owned(),
            known: self.entries.iter().map(|entry| entry.name.clone()).collect(),
        })
    }

    /// Tells those that wait for a model that something has come, gone or failed.
    pub(super) fn tell(&self) {
        self.changed.send_replace(());
    }

    /// Hears of that, from now on.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}
