//! Requests that wait for a model that is not there.
//!
//! Owns: how a request says that it does. Does not know: how the model comes.

use axum::extract::Request;
use tale_models::parameter::Parameter;

use super::error::ApiError;

/// A field of what generates.
pub(super) static ALLOW_COLD_START: Parameter<bool> = Parameter::boolean(
    "allow_cold_start",
    "Wait while a model is loaded that is not there yet, in place of 503; the header `X-Allow-Cold-Start: true` says the same. \
     False when absent.",
);

/// The same in the head of a request.
const HEADER: &str = "x-allow-cold-start";

/// Whether the head of a request says that it waits; other values than `true` and `false` are refused.
pub(super) fn is_allowed_by_head(request: &Request) -> Result<bool, ApiError> {
    match request.headers().get(HEADER).map(|value| value.as_bytes()) {
        None | Some(b"false") => Ok(false),
        Some(b"true") => Ok(true),
        Some(_) => Err(ApiError::field(HEADER, "must be true or false")),
    }
}
