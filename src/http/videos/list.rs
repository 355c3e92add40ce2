//! `GET /v1/videos`: the videos that are kept, page by page.
//!
//! Owns: the query and the order of pages. Does not know: how a video is shown.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tale_models::parameter::{Declaration, Parameter};

use super::fields::MAX_ID_BYTES;
use super::wire::WireVideo;
use crate::http::AppState;
use crate::http::error::ApiError;
use crate::job::JobId;
use crate::job::board::{Listing, Order, Page};

/// Jobs of a page when the client does not say.
const DEFAULT_PAGE: usize = 20;
/// Most jobs of a page.
const MAX_PAGE: usize = 100;
/// What a video counts for when a page of them is written.
const LISTED_BYTES: usize = 4 << 10;
/// Longest query of a request.
const MAX_QUERY_BYTES: usize = 1024;

static AFTER: Parameter<String> =
    Parameter::text("after", MAX_ID_BYTES, "The video behind which the page begins; the first page when absent.");

static LIMIT: Parameter<usize> = Parameter::integer("limit", 1, MAX_PAGE, "Most videos of the page; 20 when absent.");

static ORDER: Parameter<String> =
    Parameter::choice("order", &["asc", "desc"], "By the time when they were ordered; desc when absent.");

/// The query of the list.
pub(in crate::http) static LIST_QUERY: &[&Declaration] = &[&AFTER.declaration, &LIMIT.declaration, &ORDER.declaration];

/// `GET /v1/videos`.
pub(in crate::http) async fn list(State(state): State<AppState>, uri: Uri) -> Result<Response, ApiError> {
    let page = page(&uri)?;
    let listing = state.jobs().list(&page).ok_or_else(|| ApiError::field("after", "names no video"))?;
    let num_bytes = listing.jobs.len() * LISTED_BYTES;
    Ok(state.compute().run_sized(num_bytes, move |_| Json(WireVideos::from(&listing)).into_response()).await?)
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

impl From<&Listing> for WireVideos {
    fn from(listing: &Listing) -> Self {
        let data: Vec<_> = listing.jobs.iter().map(WireVideo::from).collect();
        Self {
            object: "list",
            first_id: data.first().map(|video| video.id.clone()),
            last_id: data.last().map(|video| video.id.clone()),
            has_more: listing.has_more,
            data,
        }
    }
}

fn page(uri: &Uri) -> Result<Page, ApiError> {
    let query = query(uri, LIST_QUERY)?;
    let after = query.get("after").map(|after| after.parse::<JobId>());
    let after = after.transpose().map_err(|_| ApiError::field("after", "names no video"))?;
    let limit = match query.get("limit") {
        None => DEFAULT_PAGE,
        Some(limit) => match limit.parse() {
            Ok(limit @ 1..=MAX_PAGE) => limit,
            _ => return Err(ApiError::field("limit", format!("must be a whole number from 1 to {MAX_PAGE}"))),
        },
    };
    let order = match query.get("order").map(String::as_str) {
        Some("asc") => Order::Ascending,
        None | Some("desc") => Order::Descending,
        Some(_) => return Err(ApiError::field("order", "must be asc or desc")),
    };
    Ok(Page { after, limit, order })
}

/// The query of a request; a name that is not `known` is refused.
pub(super) fn query(uri: &Uri, known: &[&Declaration]) -> Result<BTreeMap<String, String>, ApiError> {
    if uri.query().is_some_and(|query| query.len() > MAX_QUERY_BYTES) {
        return Err(ApiError::malformed(format!("the query is longer than {MAX_QUERY_BYTES} bytes")));
    }
    let parsed = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(uri);
    let pairs = parsed.map_err(|_| ApiError::malformed("the query cannot be read"))?.0;
    let known: Vec<&str> = known.iter().map(|declaration| declaration.name).collect();
    if let Some((name, _)) = pairs.iter().find(|(name, _)| !known.contains(&name.as_str())) {
        let problem = format!("is not known here; expected one of {}", known.join(", "));
        return Err(ApiError::field_code(name, "unknown_parameter", problem));
    }
    Ok(pairs.into_iter().collect())
}
