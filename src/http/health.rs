//! `/livez`, `/readyz`, `/metrics`.

use axum::Router;
use axum::extract::State;
use axum::handler::Handler;
use axum::http::header;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tale_models::ModelCard;
use tale_models::diffusion::Medium;

use super::error::ApiError;
use super::{AppState, browsers};
use crate::engine::{ModelReport, ModelState};
use crate::job::failure::INSUFFICIENT_STORAGE;
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

/// The models are loaded, each has a device that lives, and new work is taken. A disk that takes no clips is said; a server with
/// nothing else to do is not ready then. Models that come on demand or were unloaded are no reason not to be ready; they are named.
pub(super) async fn ready(State(state): State<AppState>) -> Result<String, ApiError> {
    let engine = state.engine()?;
    if let Some(problem) = engine.problem() {
        return Err(problem.into());
    }
    let models = engine.models();
    let away = models.iter().filter(|model| model.state != ModelState::Ready).map(away);
    let away: String = away.collect();
    let Some(problem) = state.outputs().problem() else { return Ok(format!("ready\n{away}")) };
    let makes_clips = |card: &ModelCard| matches!(card, ModelCard::Diffusion(card) if card.medium() == Medium::Video);
    let cards = engine.cards();
    let clips = cards.iter().filter(|card| makes_clips(card)).count();
    match clips {
        0 => Ok(format!("ready\n{away}")),
        all if all == cards.len() => Err(problem.into()),
        _ => Ok(format!("ready, but for clips ({INSUFFICIENT_STORAGE}): {problem}\n{away}")),
    }
}

/// A line about a model that is not there.
fn away(model: &ModelReport) -> String {
    let ModelReport { name, state, progress, .. } = model;
    let progress = progress.map(|of| format!(", {} of {} bytes are read", of.read_bytes, of.total_bytes));
    format!("{name}: {}{}\n", state.as_str(), progress.unwrap_or_default())
}

/// In the text format of Prometheus.
pub(super) async fn metrics(State(state): State<AppState>) -> Response {
    if let Some(engine) = state.loaded_engine() {
        telemetry::publish_engine(&engine.status());
    }
    telemetry::publish_jobs(state.jobs().num_active().await);
    let content_type = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (content_type, telemetry::metrics_handle().render()).into_response()
}
