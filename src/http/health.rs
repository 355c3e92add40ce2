//! `/livez`, `/readyz`, `/metrics`.

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::AppState;
use super::error::ApiError;
use crate::telemetry;

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
