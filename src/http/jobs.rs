//! `/v1/jobs`: orders, whatever they make: the list, one of them, what is done with it, and what happens to it as server-sent events, the
//! past first, then as it comes.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Uri};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Serialize;
use tale_models::parameter::{Declaration, Parameter};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::body::value::{Room, Value};
use super::body::{self, Format};
use super::diffusion::MAX_MODEL_BYTES;
use super::error::ApiError;
use super::path::Id;
use super::videos::WireFailure;
use super::{AppState, pages, parameters, sse, unix_seconds};
use crate::job::feed::{JobEvent, JobFeed};
use crate::job::node::QueuePlace;
use crate::job::preview::{self, Preview};
use crate::job::store::{Filter, Priority};
use crate::job::{Job, JobId, JobState, Progress};

/// Writes that may wait for a slow client; further events wait in the feed.
const MAX_WAITING_WRITES: usize = 2;

/// A job as `/v1/jobs` shows it: the order and not what it makes, which `url` has.
#[derive(Debug, Serialize)]
pub(super) struct WireJob {
    id: String,
    object: &'static str,
    status: &'static str,
    progress: u8,
    model: String,
    priority: &'static str,
    created_at: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    started_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ended_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deadline_at: Option<u64>,
    /// How often a node has begun it.
    attempts: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue_position: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    eta_seconds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<WireFailure>,
    /// Where what it makes is shown.
    url: String,
}

impl WireJob {
    fn new(job: &Job, place: Option<QueuePlace>) -> Self {
        Self {
            id: job.id.to_string(),
            object: "job",
            status: job.state.as_str(),
            progress: job.progress.percent,
            model: job.model.clone(),
            priority: job.priority.as_str(),
            created_at: unix_seconds(job.created),
            started_at: job.started.map(unix_seconds),
            ended_at: job.ended.map(unix_seconds),
            deadline_at: job.deadline.map(unix_seconds),
            attempts: job.attempts,
            queue_position: place.map(|place| place.position),
            eta_seconds: place.and_then(|place| place.eta_seconds).map(|seconds| seconds.ceil() as u64),
            error: if let JobState::Failed(failure) = &job.state { Some(failure.into()) } else { None },
            url: format!("/v1/videos/{}", job.id),
        }
    }
}

/// A page of jobs.
#[derive(Debug, Serialize)]
struct WireJobs {
    object: &'static str,
    data: Vec<WireJob>,
    first_id: Option<String>,
    last_id: Option<String>,
    has_more: bool,
}

static STATUS: Parameter<String> = Parameter::choice("status", STATUSES, "Jobs that stand there; all when absent.");
const STATUSES: &[&str] = &["queued", "in_progress", "completed", "failed", "cancelled"];
static MODEL: Parameter<String> = Parameter::text("model", MAX_MODEL_BYTES, "Jobs of this model; of all when absent.");

/// The query of the list.
pub(super) static LIST_QUERY: &[&Declaration] = &[
    &pages::AFTER.declaration,
    &pages::LIMIT.declaration,
    &pages::ORDER.declaration,
    &STATUS.declaration,
    &MODEL.declaration,
];

/// `GET /v1/jobs`.
pub(super) async fn list(State(state): State<AppState>, uri: Uri) -> Result<Response, ApiError> {
    let query = pages::query(&uri, LIST_QUERY)?;
    let page = pages::page(&query, "names no job")?;
    let status = match query.get("status") {
        None => None,
        Some(status) => match STATUSES.iter().find(|known| *known == status) {
            Some(status) => Some(*status),
            None => return Err(ApiError::field("status", format!("must be one of {}", STATUSES.join(", ")))),
        },
    };
    let filter = Filter { state: status, model: query.get("model").cloned(), ..Filter::default() };
    let (jobs, has_more) = pages::listed(state.jobs().list(&filter, &page).await, "names no job")?;
    let data: Vec<WireJob> = jobs.iter().map(|job| WireJob::new(job, None)).collect();
    let ids = (data.first().map(|job| job.id.clone()), data.last().map(|job| job.id.clone()));
    let jobs = WireJobs { object: "list", data, first_id: ids.0, last_id: ids.1, has_more };
    Ok(Json(jobs).into_response())
}

/// `GET /v1/jobs/{id}`.
pub(super) async fn retrieve(State(state): State<AppState>, Id(id): Id) -> Result<Json<WireJob>, ApiError> {
    let job = state.jobs().get(id.parse()?).await?;
    let place = if job.state == JobState::Queued { state.jobs().place(&job).await? } else { None };
    Ok(Json(WireJob::new(&job, place)))
}

/// `POST /v1/jobs/{id}/cancel`: it stays in the list, without a file.
pub(super) async fn cancel(State(state): State<AppState>, Id(id): Id) -> Result<Json<WireJob>, ApiError> {
    Ok(Json(WireJob::new(&state.jobs().cancel(id.parse()?).await?, None)))
}

/// `POST /v1/jobs/{id}/retry`: one that failed waits again and goes on from what it had, one that was cancelled begins anew.
pub(super) async fn retry(State(state): State<AppState>, Id(id): Id) -> Result<Json<WireJob>, ApiError> {
    state.engine()?;
    Ok(Json(WireJob::new(&state.jobs().retry(id.parse()?).await?, None)))
}

/// The fields of a change of priority.
pub(super) static PRIORITY_FIELDS: &[&Declaration] = &[&PRIORITY.declaration];
static PRIORITY: Parameter<String> =
    Parameter::choice("priority", &["interactive", "standard", "batch"], "How urgent it is from now on.").required();
/// Most bytes of the body of a change of priority.
const MAX_PRIORITY_BYTES: usize = 1024;

/// `POST /v1/jobs/{id}/priority`: of one that waits.
pub(super) async fn prioritise(
    State(state): State<AppState>,
    Id(id): Id,
    request: Request,
) -> Result<Json<WireJob>, ApiError> {
    let id: JobId = id.parse()?;
    let received = body::receive(&state, request, Format::Json, MAX_PRIORITY_BYTES).await?;
    let read = |body: Value| parameters::take(&mut body.into_object()?, PRIORITY_FIELDS, &[]);
    let (given, _held) = received.read(state.compute(), |_| Room::SMALL, read).await?;
    let name = given.options.get(&PRIORITY).unwrap_or_default();
    let priority = Priority::ALL.into_iter().find(|priority| priority.as_str() == name).unwrap_or(Priority::Standard);
    Ok(Json(WireJob::new(&state.jobs().prioritise(id, priority).await?, None)))
}

/// `GET /v1/jobs/{id}/events`.
pub(super) async fn events(
    State(state): State<AppState>,
    Id(id): Id,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let id: JobId = id.parse()?;
    let feed = state.jobs().feed(id).await?;
    // A reader that comes back says what it has seen (WHATWG HTML, 9.2.4), maybe of another node.
    let last_seen = headers.get("last-event-id").and_then(|value| value.to_str().ok());
    let next = last_seen.map_or(0, |name| feed.number_after(name));
    let (writes, receiver) = mpsc::channel::<Result<Bytes, Infallible>>(MAX_WAITING_WRITES);
    tokio::spawn(follow(id, feed, next, writes));
    Ok(sse::response(Body::from_stream(ReceiverStream::new(receiver))))
}

/// Writes events until the job has ended or the client has gone.
async fn follow(id: JobId, feed: Arc<JobFeed>, mut next: usize, writes: mpsc::Sender<Result<Bytes, Infallible>>) {
    loop {
        let events = tokio::select! {
            () = writes.closed() => return,
            events = tokio::time::timeout(sse::KEEP_ALIVE, feed.after(next)) => events,
        };
        let Ok(events) = events else {
            if writes.send(Ok(Bytes::from_static(sse::COMMENT))).await.is_err() {
                return;
            }
            continue;
        };
        let mut buffer = Vec::new();
        let is_last = events.last().is_none_or(|(_, event)| event.is_terminal());
        for (number, event) in &events {
            let wire = WireEvent::new(id, event);
            sse::write_event(&mut buffer, &feed.name(*number), wire.kind, &wire);
            next = number + 1;
        }
        if writes.send(Ok(buffer.into())).await.is_err() || is_last {
            return;
        }
    }
}

/// One event; fields that it does not have are left out.
#[derive(Serialize)]
struct WireEvent {
    #[serde(rename = "type")]
    kind: &'static str,
    id: String,
    #[serde(skip_serializing_if = "Option::is_none", flatten)]
    progress: Option<WireProgress>,
    #[serde(skip_serializing_if = "Option::is_none", flatten)]
    preview: Option<WirePreview>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<WireFailure>,
}

/// A small picture; what OpenAI's streams of images call alike has the same names.
#[derive(Serialize)]
struct WirePreview {
    partial_image_index: usize,
    size: String,
    output_format: &'static str,
    b64_json: String,
}

#[derive(Serialize)]
struct WireProgress {
    phase: Option<&'static str>,
    done: usize,
    total: usize,
    percent: u8,
    /// What is left of the phase at its pace so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    eta_seconds: Option<f64>,
}

impl WireEvent {
    fn new(id: JobId, event: &JobEvent) -> Self {
        let empty = |kind| Self { kind, id: id.to_string(), progress: None, preview: None, bytes: None, error: None };
        match event {
            JobEvent::Queued => empty("queued"),
            JobEvent::Started => empty("started"),
            JobEvent::Progress(progress) => Self { progress: Some(progress.into()), ..empty("progress") },
            JobEvent::Preview(preview) => {
                let progress = Some((&preview.progress).into());
                Self { progress, preview: Some(preview.into()), ..empty("preview") }
            }
            JobEvent::Finished(files) => Self { bytes: Some(files.clip.bytes), ..empty("finished") },
            JobEvent::Failed(failure) => Self { error: Some(failure.into()), ..empty("failed") },
            JobEvent::Cancelled => empty("cancelled"),
        }
    }
}

impl From<&Preview> for WirePreview {
    fn from(preview: &Preview) -> Self {
        let (width, height) = preview.size;
        Self {
            partial_image_index: preview.index,
            size: format!("{width}x{height}"),
            output_format: preview::FORMAT.as_str(),
            b64_json: BASE64.encode(&preview.bytes),
        }
    }
}

impl From<&Progress> for WireProgress {
    fn from(progress: &Progress) -> Self {
        Self {
            phase: progress.phase.map(|phase| phase.as_str()),
            done: progress.done,
            total: progress.total,
            percent: progress.percent,
            eta_seconds: progress.eta.map(|eta| (eta.as_secs_f64() * 1000.0).round() / 1000.0),
        }
    }
}
