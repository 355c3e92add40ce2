//! What the engine refuses, and what it could not do.

use tale_models::device::DeviceSpec;

use super::catalogue::{LoadProgress, ModelState};
use crate::places::NoPlace;

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
    /// A part of a model that several devices share does not fit on one of them.
    #[error("model `{model}`: its part on {device} takes {needed_bytes} bytes, {free_bytes} are there")]
    NoRoomForPart {
        /// Its name.
        model: String,
        /// See there.
        device: DeviceSpec,
        /// See there.
        needed_bytes: usize,
        /// See there.
        free_bytes: usize,
    },
    /// A model that several devices share comes with the server and goes with it.
    #[error("model `{model}` is shared by several devices; it is loaded when the server starts, and stays")]
    Stays {
        /// Its name.
        model: String,
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
    /// The model is not there now.
    #[error("model `{model}` is {}", not_loaded(*state, *progress, problem.as_deref()))]
    NotLoaded {
        /// Its name.
        model: String,
        /// What it is instead.
        state: ModelState,
        /// How far it has come, while it is loaded.
        progress: Option<LoadProgress>,
        /// Why it could not be loaded, where that was tried.
        problem: Option<String>,
        /// Whether requests load it.
        comes_back: bool,
    },
    /// The model is being loaded or unloaded.
    #[error("model `{model}` is being {doing}; one thing at a time")]
    AtWork {
        /// Its name.
        model: String,
        /// What is done with it.
        doing: &'static str,
    },
    /// There is nothing to unload.
    #[error("model `{model}` is not loaded: there is nothing to unload")]
    NothingToUnload {
        /// Its name.
        model: String,
    },
    /// The model is there as it is wanted.
    #[error("model `{model}` is loaded already; a path or devices load it anew")]
    AlreadyLoaded {
        /// Its name.
        model: String,
    },
}

fn not_loaded(state: ModelState, progress: Option<LoadProgress>, problem: Option<&str>) -> String {
    match (state, progress, problem) {
        (_, Some(LoadProgress { read_bytes, total_bytes }), _) if total_bytes > 0 => {
            format!("being loaded: {read_bytes} of {total_bytes} bytes are read")
        }
        (ModelState::Loading, ..) => "being loaded".into(),
        (ModelState::Unloading, ..) => "being unloaded".into(),
        (ModelState::Failed, _, Some(problem)) => format!("not loaded, since that failed: {problem}"),
        _ => "not loaded".into(),
    }
}
