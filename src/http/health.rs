//! `/livez`, `/readyz`, `/metrics`.

use axum::Router;
use axum::extract::State;
use axum::handler::Handler;
use axum::http::header;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::error::ApiError;
use super::{AppState, browsers};
use crate::telemetry;

/// What the health listener answers, and other listeners when they are crowded; not measured. `other` is told to all else.
pub(super) fn router<T: 'static>(state: AppState, other: impl Handler<T, AppState>) -> Router {
    Router::new()
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .method_not_allowed_fallback(|| async { ApiError::no_method() })
        .fallback(other)
        .layer(from_fn_with_state(state.clone(), browsers::check))
        .with_state(state)
}

/// The process answers.
pub(super) async fn live() -> &'static str {
    "ok\n"
}

/// The models are loaded, the device lives, and new work is taken.
pub(super) async fn ready(State(state): State<AppState>) -> Result<&'static str, ApiError> {
    state.engine().map(|_| "ready\n")
}

/// In the text format of Prometheus.
pub(super) async fn metrics(State(state): State<AppState>) -> Response {
    if let Some(engine) = state.loaded_engine() {
        telemetry::publish_engine(&engine.status());
    }
    telemetry::publish_jobs(state.jobs().num_active());
    let content_type = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (content_type, telemetry::metrics_handle().render()).into_response()
}
