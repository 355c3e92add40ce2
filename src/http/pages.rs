//! Pages of lists of jobs: their queries, and what is wrong with one.

use std::collections::BTreeMap;

use axum::http::Uri;
use tale_models::parameter::{Declaration, Parameter};

use super::error::ApiError;
use crate::job::node::NodeError;
use crate::job::store::{Order, Page};
use crate::job::{Job, JobId};

/// Longest name of a job.
pub(super) const MAX_ID_BYTES: usize = 64;
/// Jobs of a page when the client does not say.
const DEFAULT_PAGE: usize = 20;
/// Most jobs of a page.
const MAX_PAGE: usize = 100;
/// Longest query of a request.
const MAX_QUERY_BYTES: usize = 1024;

pub(super) static AFTER: Parameter<String> =
    Parameter::text("after", MAX_ID_BYTES, "The one behind which the page begins; the first page when absent.");

pub(super) static LIMIT: Parameter<usize> =
    Parameter::integer("limit", 1, MAX_PAGE, "Most of the page; 20 when absent.");

pub(super) static ORDER: Parameter<String> =
    Parameter::choice("order", &["asc", "desc"], "By the time when they were ordered; desc when absent.");

/// The page that a query asks for; `unknown` is what is wrong with one behind nothing.
pub(super) fn page(query: &BTreeMap<String, String>, unknown: &'static str) -> Result<Page, ApiError> {
    let after = query.get("after").map(|after| after.parse::<JobId>());
    let after = after.transpose().map_err(|_| ApiError::field("after", unknown))?;
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

/// What a node found of a page.
pub(super) fn listed(
    found: Result<(Vec<Job>, bool), NodeError>,
    unknown: &'static str,
) -> Result<(Vec<Job>, bool), ApiError> {
    found.map_err(|error| if error.is_unknown() { ApiError::field("after", unknown) } else { error.into() })
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
