//! What a client hears whose request never came as far as a handler.

use std::time::Duration;

use axum::http::StatusCode;

use super::limits::{MAX_CHUNK_BYTES, MAX_HEAD_BYTES, MAX_HEADERS};
use crate::http::error::ApiError;

/// Why a connection ends with an answer of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The head is no head of HTTP/1.
    Malformed(&'static str),
    HeadTooLarge,
    TooManyHeaders,
    /// hyper refused the head with this status.
    Status(StatusCode),
    /// The head did not arrive within this time.
    HeadTimeout(Duration),
    ChunkTooLarge,
    /// As many connections as there may be do work.
    TooManyConnections(usize),
    /// As many connections of the client's address as there may be do work.
    TooManyOfAddress(usize),
}

impl Refusal {
    /// Of what hyper wrote by itself: `HTTP/1.1 414 ...`.
    pub(super) fn of_status_line(bytes: &[u8]) -> Self {
        let status = bytes.get(9..12).and_then(|digits| StatusCode::from_bytes(digits).ok());
        Self::Status(status.unwrap_or(StatusCode::BAD_REQUEST))
    }
}

impl From<&Refusal> for ApiError {
    fn from(refusal: &Refusal) -> Self {
        match refusal {
            Refusal::Malformed(problem) => Self::invalid_head(*problem),
            Refusal::HeadTooLarge => {
                Self::head_too_large(format!("the request's head is larger than {MAX_HEAD_BYTES} bytes"))
            }
            Refusal::TooManyHeaders => {
                Self::head_too_large(format!("the request has more than {MAX_HEADERS} header fields"))
            }
            Refusal::Status(StatusCode::URI_TOO_LONG) => Self::path_too_long(),
            Refusal::Status(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE) => {
                Self::head_too_large("the request's head is too large")
            }
            Refusal::Status(_) => {
                Self::invalid_head("a header that says where the request ends, or its path, cannot be read")
            }
            Refusal::HeadTimeout(time) => {
                Self::head_timeout(format!("the request's head did not arrive within {} seconds", time.as_secs_f32()))
            }
            Refusal::ChunkTooLarge => Self::too_large(MAX_CHUNK_BYTES as usize),
            Refusal::TooManyConnections(limit) => {
                Self::too_many_connections(format!("{limit} connections (max_connections) are busy"))
            }
            Refusal::TooManyOfAddress(limit) => Self::too_many_connections(format!(
                "{limit} connections of this address (max_connections_per_address) are busy"
            )),
        }
    }
}
