//! `GET /v1/models` and `GET /v1/models/{id}`.

use axum::Json;
use axum::extract::State;
use serde::Serialize;

use super::error::ApiError;
use super::path::Id;
use super::{AppState, unix_seconds};
use crate::engine::ModelReport;

#[derive(Serialize)]
pub(super) struct WireModel {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
}

#[derive(Serialize)]
pub(super) struct WireModels {
    object: &'static str,
    data: Vec<WireModel>,
}

impl From<&ModelReport> for WireModel {
    fn from(model: &ModelReport) -> Self {
        Self { id: model.name.clone(), object: "model", created: unix_seconds(model.created), owned_by: "tale" }
    }
}

pub(super) async fn list(State(state): State<AppState>) -> Result<Json<WireModels>, ApiError> {
    let data = state.engine()?.models().iter().map(WireModel::from).collect();
    Ok(Json(WireModels { object: "list", data }))
}

/// Names may hold slashes, as those of Hugging Face do.
pub(super) async fn retrieve(State(state): State<AppState>, Id(name): Id) -> Result<Json<WireModel>, ApiError> {
    Ok(Json((&state.engine()?.report(&name)?).into()))
}
