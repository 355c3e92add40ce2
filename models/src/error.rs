//! The one error type of this crate: closed, with data in its fields, each error made where the facts are known.

use std::path::PathBuf;

use crate::phase::Phase;
use crate::session_checkpoint::refusal::Refusal;

/// What can go wrong while reading a checkpoint, accepting a request or computing a step.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the checkpoint is absent, unreadable, or not what its name promises.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, in words.
        problem: String,
    },
    /// A tensor that the architecture needs is in none of the checkpoint's files.
    #[error("{}: tensor `{tensor}` is missing, expected with shape {expected:?}", path.display())]
    MissingTensor {
        /// The folder or file that was searched.
        path: PathBuf,
        /// Full name of the tensor.
        tensor: String,
        /// Shape that the configuration implies.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than `config.json` implies.
    #[error("{}: tensor `{tensor}` has shape {found:?}, expected {expected:?}", path.display())]
    TensorShape {
        /// The file that holds the tensor.
        path: PathBuf,
        /// Full name of the tensor.
        tensor: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape that the configuration implies.
        expected: Vec<usize>,
    },
    /// No family recognises the checkpoint.
    #[error("{}: unknown architecture {found}; supported: {supported}", path.display())]
    UnknownArchitecture {
        /// The checkpoint.
        path: PathBuf,
        /// What its configuration says it is.
        found: String,
        /// Names of the families that this build knows.
        supported: String,
    },
    /// A request asks for something that the model cannot do; the client's fault.
    #[error("{field}: {problem}")]
    InvalidRequest {
        /// The field, as the client spells it.
        field: String,
        /// What is wrong and what is allowed.
        problem: String,
    },
    /// The model's chat template failed at a conversation; not the client's fault.
    #[error("the model's chat template cannot be rendered: {0}")]
    ChatTemplate(String),
    /// The prompt (and the tokens asked for) do not fit the model's context.
    #[error(
        "the prompt has {}{prompt_tokens} tokens, {limit} fit this model's context with one token of answer",
        if *is_exact { "" } else { "at least " }
    )]
    ContextLength {
        /// Tokens of the prompt, or so many at least.
        prompt_tokens: usize,
        /// Whether they were counted to the end.
        is_exact: bool,
        /// Most prompt tokens that the model takes.
        limit: usize,
    },
    /// Whoever asked does not wait any longer.
    #[error("nobody waits for the result any longer")]
    Cancelled,
    /// The model was taken from its device before the work was done.
    #[error("the model was unloaded before this was done")]
    Unloaded,
    /// The device has too little memory, found out before anything is computed.
    #[error("not enough memory: {needed_bytes} bytes needed{}, {free_bytes} free", in_phase(*phase))]
    OutOfMemory {
        /// The phase of a request that needs them; `None` for what a model takes.
        phase: Option<Phase>,
        /// Bytes that the work needs.
        needed_bytes: usize,
        /// Bytes that are free.
        free_bytes: usize,
    },
    /// The runner holds as many sessions as it may; one has to end first.
    #[error("the model is busy with {limit} requests; try again later")]
    TooManySessions {
        /// Most sessions of the runner.
        limit: usize,
    },
    /// The requested device or dtype cannot be had in this build or on this machine.
    #[error("device: {0}")]
    Device(String),
    /// The model produced NaN or infinity.
    #[error("the model produced a value that is not finite in phase {phase}")]
    NotFinite {
        /// Where.
        phase: &'static str,
    },
    /// A tensor operation failed.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A session cannot go on from the checkpoint that it was to go on from; it can begin anew.
    #[error("the checkpoint {0}")]
    NotResumable(Refusal),
    /// This process hands its work over: another one goes on from the session's last checkpoint, or begins it anew.
    #[error("the server is shutting down and hands its work over; try again")]
    HandedOver,
    /// A step panicked; its sessions are gone, the runner lives.
    #[error("a step panicked: {0}")]
    Panicked(String),
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

fn in_phase(phase: Option<Phase>) -> String {
    phase.map_or(String::new(), |phase| format!(" in phase {}", phase.as_str()))
}

impl Error {
    /// A [`Error::Checkpoint`] from anything printable.
    pub fn checkpoint(path: impl Into<PathBuf>, problem: impl ToString) -> Self {
        Self::Checkpoint { path: path.into(), problem: problem.to_string() }
    }

    /// An [`Error::InvalidRequest`] that names the field.
    pub fn invalid(field: impl Into<String>, problem: impl ToString) -> Self {
        Self::InvalidRequest { field: field.into(), problem: problem.to_string() }
    }

    /// The same truth once more, for each further session that the same failed step ends.
    pub fn restate(&self) -> Self {
        match self {
            Self::Checkpoint { path, problem } => Self::Checkpoint { path: path.clone(), problem: problem.clone() },
            Self::MissingTensor { path, tensor, expected } => {
                Self::MissingTensor { path: path.clone(), tensor: tensor.clone(), expected: expected.clone() }
            }
            Self::TensorShape { path, tensor, found, expected } => Self::TensorShape {
                path: path.clone(),
                tensor: tensor.clone(),
                found: found.clone(),
                expected: expected.clone(),
            },
            Self::UnknownArchitecture { path, found, supported } => {
                Self::UnknownArchitecture { path: path.clone(), found: found.clone(), supported: supported.clone() }
            }
            Self::InvalidRequest { field, problem } => {
                Self::InvalidRequest { field: field.clone(), problem: problem.clone() }
            }
            Self::ChatTemplate(problem) => Self::ChatTemplate(problem.clone()),
            &Self::ContextLength { prompt_tokens, is_exact, limit } => {
                Self::ContextLength { prompt_tokens, is_exact, limit }
            }
            Self::Cancelled => Self::Cancelled,
            Self::Unloaded => Self::Unloaded,
            &Self::OutOfMemory { phase, needed_bytes, free_bytes } => {
                Self::OutOfMemory { phase, needed_bytes, free_bytes }
            }
            &Self::TooManySessions { limit } => Self::TooManySessions { limit },
            Self::Device(problem) => Self::Device(problem.clone()),
            &Self::NotFinite { phase } => Self::NotFinite { phase },
            // candle's error cannot be cloned; its text is all that anybody reads.
            Self::Tensor(error) => Self::Tensor(candle_core::Error::Msg(error.to_string())),
            Self::NotResumable(refusal) => Self::NotResumable(refusal.clone()),
            Self::HandedOver => Self::HandedOver,
            Self::Panicked(text) => Self::Panicked(text.clone()),
        }
    }
}
