//! `GET /v1/videos`: the videos that are kept, page by page.
//!
//! Does not know: how a video is shown.

use axum::Json;
use axum::extract::State;
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tale_models::parameter::Declaration;

use super::wire::WireVideo;
use crate::http::error::ApiError;
use crate::http::{AppState, pages};
use crate::job::store::Filter;
use crate::job::{Job, JobKind};

/// What is wrong with a page behind nothing.
const NO_VIDEO: &str = "names no video";
/// What a video counts for when a page of them is written.
const LISTED_BYTES: usize = 4 << 10;
/// The query of the list.
pub(in crate::http) static LIST_QUERY: &[&Declaration] =
    &[&pages::AFTER.declaration, &pages::LIMIT.declaration, &pages::ORDER.declaration];

/// `GET /v1/videos`.
pub(in crate::http) async fn list(State(state): State<AppState>, uri: Uri) -> Result<Response, ApiError> {
    let page = pages::page(&pages::query(&uri, LIST_QUERY)?, NO_VIDEO)?;
    let filter = Filter { kind: Some(JobKind::Video), ..Filter::default() };
    let (jobs, has_more) = pages::listed(state.jobs().list(&filter, &page).await, NO_VIDEO)?;
    let num_bytes = jobs.len() * LISTED_BYTES;
    Ok(state.compute().run_sized(num_bytes, move |_| Json(WireVideos::new(&jobs, has_more)).into_response()).await?)
}

/// A page of the list.
#[derive(Debug, Serialize)]
struct WireVideos {
    object: &'static str,
    data: Vec<WireVideo>,
    first_id: Option<String>,
    last_id: Option<String>,
    has_more: bool,
}

impl WireVideos {
    fn new(jobs: &[Job], has_more: bool) -> Self {
        let data: Vec<_> = jobs.iter().map(WireVideo::from).collect();
        Self {
            object: "list",
            first_id: data.first().map(|video| video.id.clone()),
            last_id: data.last().map(|video| video.id.clone()),
            has_more,
            data,
        }
    }
}
