//! `GET /v1/jobs/{id}/events`: what happens to a job, as server-sent events; the past first, then as it comes.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::error::ApiError;
use super::path::Id;
use super::videos::WireFailure;
use super::{AppState, sse};
use crate::job::feed::{JobEvent, JobFeed};
use crate::job::preview::{self, Preview};
use crate::job::{JobId, Progress, UnknownJob};

/// Writes that may wait for a slow client; further events wait in the feed.
const MAX_WAITING_WRITES: usize = 2;

pub(super) async fn events(
    State(state): State<AppState>,
    Id(id): Id,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let id: JobId = id.parse()?;
    let feed = state.jobs().feed(id).ok_or(UnknownJob)?;
    // A reader that comes back says what it has seen (WHATWG HTML, 9.2.4).
    let last_seen = headers.get("last-event-id").and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let (writes, receiver) = mpsc::channel::<Result<Bytes, Infallible>>(MAX_WAITING_WRITES);
    tokio::spawn(follow(id, feed, last_seen.map_or(0, |last| last.saturating_add(1)), writes));
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
            sse::write_event(&mut buffer, *number, wire.kind, &wire);
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
