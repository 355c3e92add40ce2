//! Why a job failed, in what its owner is told.
//!
//! Owns: codes and words. Does not know: HTTP.

use std::borrow::Cow;

use tale_models::Error;

use crate::engine::EngineError;

/// Code of a failure for want of a disk that takes the clip.
pub const INSUFFICIENT_STORAGE: &str = "insufficient_storage";

/// A short truth for the owner of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// For programs.
    pub code: Cow<'static, str>,
    /// For people.
    pub message: String,
    /// A device failed: another one may do better.
    pub is_of_device: bool,
}

impl Failure {
    /// No disk takes the clip.
    pub fn insufficient_storage(problem: impl ToString) -> Self {
        Self { code: INSUFFICIENT_STORAGE.into(), message: problem.to_string(), is_of_device: false }
    }

    /// Something of ours went wrong; the log says what.
    pub fn internal(message: &str) -> Self {
        tracing::error!(message, "a clip could not be made");
        Self { code: "internal_error".into(), message: "the clip could not be encoded".into(), is_of_device: false }
    }

    /// The server stops before the clip is whole.
    pub fn shutdown() -> Self {
        Self { code: "shutdown".into(), message: "the server was shut down".into(), is_of_device: false }
    }

    /// What was promised when the job was ordered cannot be made any more.
    pub fn changed(message: String) -> Self {
        Self { code: "invalid_request".into(), message, is_of_device: false }
    }

    /// The engine does not take the next part.
    pub fn of_engine(error: &EngineError) -> Self {
        match error {
            EngineError::Draining => Self::shutdown(),
            error => Self::internal(&error.to_string()),
        }
    }

    /// Of a session that failed.
    pub fn of(error: &Error) -> Self {
        if let Error::HandedOver = error {
            return Self::shutdown();
        }
        let code = match error {
            Error::OutOfMemory { .. } => "out_of_memory",
            Error::TooManySessions { .. } => "queue_full",
            Error::InvalidRequest { .. } => "invalid_request",
            Error::NotFinite { .. } => "not_finite",
            _ => "internal_error",
        };
        let message = match error {
            Error::OutOfMemory { .. }
            | Error::TooManySessions { .. }
            | Error::InvalidRequest { .. }
            | Error::NotFinite { .. } => error.to_string(),
            _ => "the device failed while it worked on this clip".into(),
        };
        let is_of_device = matches!(error, Error::Device(_));
        Self { code: code.into(), message, is_of_device }
    }
}
