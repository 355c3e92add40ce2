//! The `{id}` of a path.
//!
//! Owns: its extraction, with an error in the API's shape. Does not know: what it names.

use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts;

use super::error::ApiError;

/// What stands in the path for `{id}`, with its percent signs decoded.
pub(super) struct Id(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = ApiError;

    /// 404 for bytes that are no text: nothing has such a name.
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        path.map(|Path(id)| Self(id)).map_err(|_| ApiError::no_route())
    }
}
