//! Errors as the OpenAI API spells them, and the one `match` from what went wrong to a status.
//!
//! A message names fields, limits, numbers and models that are served; it never repeats a text that a client wrote into a
//! field. Names of fields that a client made up are said, up to [`MAX_PARAM_BYTES`].

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::compute::ComputeError;
use crate::engine::{EngineError, LoadProgress, ModelState};
use crate::job::UnknownJob;
use crate::job::failure::INSUFFICIENT_STORAGE;
use crate::job::node::NodeError;
use crate::job::output::StorageProblem;
use crate::job::store::StoreError;
use crate::media::MediaError;

/// Seconds after which a client may try again when a queue was full.
const RETRY_AFTER_BUSY: u32 = 1;
/// Seconds after which a client may try again when the server loads or shuts down.
const RETRY_AFTER_UNREADY: u32 = 5;

/// An answer that is not the one hoped for.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    body: ErrorBody,
    retry_after: Option<u32>,
    /// Whether the client should hear which encodings there are.
    accept_encoding: bool,
}

/// Longest path of a field that an error repeats; what is longer is cut.
const MAX_PARAM_BYTES: usize = 128;

fn shortened(mut param: String) -> String {
    if param.len() > MAX_PARAM_BYTES {
        param.truncate(param.floor_char_boundary(MAX_PARAM_BYTES));
        param.push('\u{2026}');
    }
    param
}

/// `error` of the body.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ErrorBody {
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
    /// Of the model that is being loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<WireProgress>,
}

/// Bytes of a model that are read, and those that are to be read in all.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct WireProgress {
    read_bytes: usize,
    total_bytes: usize,
}

impl From<LoadProgress> for WireProgress {
    fn from(LoadProgress { read_bytes, total_bytes }: LoadProgress) -> Self {
        Self { read_bytes, total_bytes }
    }
}

/// The body.
#[derive(Serialize)]
pub(super) struct ErrorEnvelope<'a> {
    pub(super) error: &'a ErrorBody,
}

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let kind = if status.is_client_error() { "invalid_request_error" } else { "server_error" };
        let body = ErrorBody { message: message.into(), kind, param: None, code: Some(code), progress: None };
        Self { status, body, retry_after: None, accept_encoding: false }
    }

    /// 400: this field is wrong.
    pub(super) fn field(param: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        Self::field_code(param, "invalid_value", problem)
    }

    /// 400 with a code of its own.
    pub(super) fn field_code(param: impl Into<String>, code: &'static str, problem: impl std::fmt::Display) -> Self {
        let param = shortened(param.into());
        let mut error = Self::new(StatusCode::BAD_REQUEST, code, format!("{param}: {problem}"));
        error.body.param = Some(param);
        error
    }

    /// 400: the body cannot be read at all.
    pub(super) fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_body", message)
    }

    /// 415.
    pub(super) fn media_type(expected: &str) -> Self {
        let message = format!("the content type must be {expected}");
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
    }

    /// 415: a compressed body; `name` is said where it is an encoding that others know.
    pub(super) fn encoding(name: Option<&str>) -> Self {
        let name = name.map(|name| format!(" {name}")).unwrap_or_default();
        let message = format!("the content encoding{name} is not supported; must be gzip or deflate");
        let error = Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_encoding", message);
        Self { accept_encoding: true, ..error }
    }

    /// 413.
    pub(super) fn too_large(limit_bytes: usize) -> Self {
        let message = format!("the body is larger than {limit_bytes} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
    }

    /// 408.
    pub(super) fn body_timeout() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", "the body did not arrive in time")
    }

    /// 400: the head of a request, of which no text is repeated.
    pub(super) fn invalid_head(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_head", message)
    }

    /// 431.
    pub(super) fn head_too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "request_head_too_large", message)
    }

    /// 414.
    pub(super) fn path_too_long() -> Self {
        Self::new(StatusCode::URI_TOO_LONG, "path_too_long", "the path is too long")
    }

    /// 408: the head, not the body.
    pub(super) fn head_timeout(message: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", message)
    }

    /// 503: a connection more than there may be.
    pub(super) fn too_many_connections(message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "too_many_connections", message);
        error.retry_after = Some(RETRY_AFTER_BUSY);
        error
    }

    /// 403: a web page, or a name of this server, that is not configured.
    pub(super) fn forbidden(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, code, message)
    }

    /// 404: no such route.
    pub(super) fn no_route() -> Self {
        Self::new(StatusCode::NOT_FOUND, "unknown_url", "there is nothing at this path")
    }

    /// 404: answers are not kept.
    pub(super) fn no_stored_response() -> Self {
        let message = "responses are not stored here (store is false), and cannot be had again by their ids";
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// 405.
    pub(super) fn no_method() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path does not take this method")
    }

    /// 409: a clip that is not there yet, or will never be.
    pub(super) fn not_completed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "video_not_completed", message)
    }

    /// 429: the queue with this many places is full.
    pub(super) fn busy(message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message);
        error.body.kind = "rate_limit_error";
        error.retry_after = Some(RETRY_AFTER_BUSY);
        error
    }

    /// 503: the memory for bodies is taken.
    pub(super) fn no_body_memory(limit_bytes: usize) -> Self {
        let message = format!("the {limit_bytes} bytes of memory for bodies (max_body_memory) are taken");
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "body_memory_full", message);
        error.retry_after = Some(RETRY_AFTER_BUSY);
        error
    }

    /// 410: the file of a clip is not there any more.
    pub(super) fn removed() -> Self {
        Self::new(StatusCode::GONE, "removed", "the file of this video was removed")
    }

    /// 503: not yet, or not any more.
    pub(super) fn unready(code: &'static str, message: &str) -> Self {
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, code, message);
        error.retry_after = Some(RETRY_AFTER_UNREADY);
        error
    }

    /// 503: a model that is not there. Whoever hears that it comes may ask again.
    fn not_loaded(message: &str, state: ModelState, progress: Option<LoadProgress>, comes_back: bool) -> Self {
        let code = match state {
            ModelState::Loading => "model_loading",
            ModelState::Failed => "model_failed",
            _ => "model_not_loaded",
        };
        let mut error = Self::unready(code, message);
        error.body.progress = progress.map(WireProgress::from);
        if !comes_back && state != ModelState::Loading {
            error.retry_after = None;
        }
        error
    }

    /// 403: how models could be loaded and unloaded.
    pub(super) fn no_model_management() -> Self {
        let message = "clients may not load and unload models here; model_management = true in the server's configuration, or \
                       --model-management, lets them";
        Self::forbidden("model_management_off", message)
    }

    /// 500: something of ours; `what` is logged with its cause by the caller.
    pub(super) fn internal(what: &str) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", what)
    }

    /// The same error about a field, or a part of it, that the client spells differently.
    pub(super) fn renamed(mut self, from: &str, to: &str) -> Self {
        let rest = self.body.param.as_deref().and_then(|param| param.strip_prefix(from));
        let part = rest.filter(|rest| rest.is_empty() || rest.starts_with(['.', '['])).map(str::to_owned);
        if let Some(part) = part {
            self.body.message = self.body.message.replacen(from, to, 1);
            self.body.param = Some(format!("{to}{part}"));
        }
        self
    }

    /// The same error, whose cause is what a field of the request refers to.
    pub(super) fn about(mut self, param: &str) -> Self {
        self.body.message = format!("{param}: {}", self.body.message);
        self.body.param = Some(param.to_owned());
        self
    }

    /// The same error about a part of a field that the client knows as a whole: its message still names the part.
    pub(super) fn within(mut self, part: &str, whole: &str) -> Self {
        if self.body.param.as_deref() == Some(part) {
            self.body.message = format!("{whole}: {}", self.body.message.replacen(": ", " ", 1));
            self.body.param = Some(whole.to_owned());
        }
        self
    }

    /// The status.
    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    /// A whole answer of HTTP/1.1, for clients whose request was never one.
    pub(super) fn to_http1(&self) -> Vec<u8> {
        let body = serde_json::to_vec(&ErrorEnvelope { error: &self.body })
            .expect("our types serialize into memory: this is a bug");
        let reason = self.status.canonical_reason().unwrap_or_default();
        let mut head = format!("HTTP/1.1 {} {reason}\r\n", self.status.as_str());
        if let Some(seconds) = self.retry_after {
            head.push_str(&format!("retry-after: {seconds}\r\n"));
        }
        head.push_str(&format!(
            "content-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            body.len()
        ));
        [head.into_bytes(), body].concat()
    }

    /// What went wrong, in words.
    pub(super) fn message(&self) -> &str {
        &self.body.message
    }

    /// `error` of the body, for streams whose status has been sent already.
    pub(super) fn body(&self) -> &ErrorBody {
        &self.body
    }
}

impl From<ComputeError> for ApiError {
    fn from(error: ComputeError) -> Self {
        match error {
            ComputeError::Full { .. } => Self::busy(error.to_string()),
            ComputeError::Panicked => Self::internal("the request could not be worked on"),
        }
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        match error {
            EngineError::UnknownModel { known, .. } => {
                let problem = format!("is not served here; there are: {}", known.join(", "));
                Self { status: StatusCode::NOT_FOUND, ..Self::field_code("model", "model_not_found", problem) }
            }
            EngineError::Busy { .. } => Self::busy(message),
            EngineError::Draining => Self::unready("shutting_down", &message),
            EngineError::Failed { .. } => Self::unready("device_lost", &message),
            EngineError::NotLoaded { state, progress, comes_back, .. } => {
                Self::not_loaded(&message, state, progress, comes_back)
            }
            EngineError::NoRoom { .. } => Self::new(StatusCode::SERVICE_UNAVAILABLE, "out_of_memory", message),
            EngineError::AtWork { .. }
            | EngineError::AlreadyLoaded { .. }
            | EngineError::NothingToUnload { .. }
            | EngineError::Stays { .. } => Self::new(StatusCode::CONFLICT, "model_state", message),
            EngineError::Devices(problem) => Self::field("devices", problem),
            EngineError::Load { source, .. } => Self::field_code("path", "invalid_checkpoint", source),
            EngineError::DuplicateModel { .. }
            | EngineError::NoRoomForPart { .. }
            | EngineError::Open(_)
            | EngineError::Memory { .. }
            | EngineError::Thread(_) => Self::internal("the engine did not start"),
        }
    }
}

/// Of a request that was refused, or of a session that failed.
impl From<tale_models::Error> for ApiError {
    fn from(error: tale_models::Error) -> Self {
        use tale_models::Error;
        match error {
            Error::InvalidRequest { field, problem } => Self::field(field, problem),
            Error::ContextLength { .. } => {
                Self::new(StatusCode::BAD_REQUEST, "context_length_exceeded", error.to_string())
            }
            // Not 429: the same request can never fit, and waiting does not help.
            Error::OutOfMemory { .. } => Self::new(StatusCode::SERVICE_UNAVAILABLE, "out_of_memory", error.to_string()),
            Error::TooManySessions { .. } => Self::busy(error.to_string()),
            Error::Unloaded => Self::unready("model_unloaded", &error.to_string()),
            Error::NotFinite { .. } => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "not_finite", error.to_string()),
            Error::ChatTemplate(_) => {
                tracing::error!(%error, "a conversation could not be rendered");
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "chat_template_failed", error.to_string())
            }
            Error::HandedOver => Self::unready("shutting_down", &error.to_string()),
            Error::Checkpoint { .. }
            | Error::MissingTensor { .. }
            | Error::TensorShape { .. }
            | Error::UnknownArchitecture { .. }
            | Error::Device(_)
            | Error::Tensor(_)
            | Error::Cancelled
            | Error::NotResumable(_)
            | Error::Panicked(_) => Self::internal("the device failed while it worked on this request"),
        }
    }
}

impl From<MediaError> for ApiError {
    fn from(error: MediaError) -> Self {
        match error {
            MediaError::Compression { allowed, .. } => Self::field("output_compression", allowed),
            error => {
                tracing::error!(%error, "a picture could not be encoded");
                Self::internal("the picture could not be encoded")
            }
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let message = error.to_string();
        match error {
            StoreError::Unknown => UnknownJob.into(),
            StoreError::Full(_) => Self::busy(message),
            StoreError::WrongState { .. } => Self::new(StatusCode::CONFLICT, "wrong_state", message),
            StoreError::KeyReused => Self::new(StatusCode::UNPROCESSABLE_ENTITY, "idempotency_key_reused", message),
            StoreError::DiskFull => Self::new(StatusCode::INSUFFICIENT_STORAGE, INSUFFICIENT_STORAGE, message),
            // The database's own words are for the log.
            StoreError::Unavailable(_) => {
                tracing::warn!(%error, "a request could not be answered");
                Self::unready("store_unavailable", "the job store does not answer; try again")
            }
            StoreError::Fenced | StoreError::NewerSchema { .. } | StoreError::InUse { .. } | StoreError::Damaged(_) => {
                tracing::error!(%error, "the job store cannot be used");
                Self::internal("the job store cannot be used")
            }
        }
    }
}

impl From<NodeError> for ApiError {
    fn from(error: NodeError) -> Self {
        match error {
            NodeError::Store(error) => error.into(),
            NodeError::Storage(problem) => problem.into(),
            NodeError::Spec(error) => {
                tracing::error!(%error, "a job cannot be shown");
                Self::internal(&error.to_string())
            }
        }
    }
}

impl From<StorageProblem> for ApiError {
    /// 507: the same order may be taken when somebody has made room.
    fn from(problem: StorageProblem) -> Self {
        Self::new(StatusCode::INSUFFICIENT_STORAGE, INSUFFICIENT_STORAGE, problem.to_string())
    }
}

impl From<UnknownJob> for ApiError {
    fn from(error: UnknownJob) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", error.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(ErrorEnvelope { error: &self.body })).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.accept_encoding {
            response.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("gzip, deflate"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_of_a_field_is_cut() {
        let name = "\u{e4}".repeat(1 << 20);
        let error = ApiError::field(name.as_str(), "is not known");
        assert_eq!(error.body.param, Some(format!("{}\u{2026}", &name[..MAX_PARAM_BYTES])));
        assert!(error.body.message.ends_with("\u{2026}: is not known"), "{}", error.body.message);
        assert_eq!(ApiError::field("a".repeat(MAX_PARAM_BYTES), "x").body.param.map(|param| param.len()), Some(128));
    }

    #[test]
    fn a_template_that_fails_is_not_the_clients_fault() {
        let error = ApiError::from(tale_models::Error::ChatTemplate("invalid operation (in chat_template:3)".into()));
        assert_eq!(error.status, StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!((error.body.kind, error.body.code), ("server_error", Some("chat_template_failed")));
        assert!(error.body.param.is_none() && error.body.message.contains("chat_template:3"), "{error:?}");
    }
}
