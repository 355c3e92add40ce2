//! Server-sent events: how they are written, and the comment that keeps a silent connection open.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde::Serialize;
use tale_models::Event;
use tokio::time::{Instant, Sleep, sleep};

use super::error::ApiError;
use crate::engine::Session;

/// The end of an OpenAI stream.
pub(super) const DONE: &[u8] = b"data: [DONE]\n\n";
/// A line that every reader of events skips.
pub(super) const COMMENT: &[u8] = b": still working\n\n";
/// Silence after which a comment is sent, so that nothing between here and the client closes the connection.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How long a stream waits for its first event before its status is sent: work that fails at once fails with a status.
const FIRST_EVENT_GRACE: Duration = Duration::from_millis(50);

/// Room for what most events say: a buffer that grows to that from nothing is copied and overwritten six times.
const USUAL_BYTES: usize = 256;

/// `data: {json}`.
pub(super) fn write_data(buffer: &mut Vec<u8>, data: &impl Serialize) {
    buffer.reserve(USUAL_BYTES);
    buffer.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *buffer, data).expect("our types serialize into memory: this is a bug");
    buffer.extend_from_slice(b"\n\n");
}

/// `id:`, `event:` and `data:`.
pub(super) fn write_event(buffer: &mut Vec<u8>, id: &str, name: &str, data: &impl Serialize) {
    buffer.extend_from_slice(format!("id: {id}\nevent: {name}\n").as_bytes());
    write_data(buffer, data);
}

/// `event:` and `data:`.
pub(super) fn write_named(buffer: &mut Vec<u8>, name: &str, data: &impl Serialize) {
    buffer.extend_from_slice(format!("event: {name}\n").as_bytes());
    write_data(buffer, data);
}

/// Waits a moment for a session to begin or fail. `Started` comes first and streams do not tell it.
pub(super) async fn first_event(session: &mut Session) -> Result<(), ApiError> {
    match tokio::time::timeout(FIRST_EVENT_GRACE, session.recv()).await {
        Ok(Some(Event::Failed(error))) => Err(error.into()),
        Ok(None) => Err(ApiError::unready("shutting_down", "the server is shutting down")),
        Ok(Some(Event::Started)) | Err(_) => Ok(()),
        Ok(Some(_)) => Err(ApiError::internal("the answer began before its session")),
    }
}

/// A response whose body is a stream of events; nobody on the way may keep or collect it.
pub(super) fn response(body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Gives a comment after each [`KEEP_ALIVE`] of silence.
#[derive(Default)]
pub(super) struct KeepAlive(Option<Pin<Box<Sleep>>>);

impl KeepAlive {
    /// Something was sent.
    pub(super) fn reset(&mut self) {
        if let Some(sleep) = &mut self.0 {
            sleep.as_mut().reset(Instant::now() + KEEP_ALIVE);
        }
    }

    /// The comment, once it is due.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> Poll<Bytes> {
        let sleep = self.0.get_or_insert_with(|| Box::pin(sleep(KEEP_ALIVE)));
        match sleep.as_mut().poll(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) => {
                sleep.as_mut().reset(Instant::now() + KEEP_ALIVE);
                Poll::Ready(Bytes::from_static(COMMENT))
            }
        }
    }
}
