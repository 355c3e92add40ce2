//! A picture as server-sent events: previews while it is made, then the whole picture.
//!
//! The device thread posts events into the session's mailbox and waits for nobody. One task follows the mailbox and writes
//! into a short channel; a client that reads slowly holds up that task, and one that goes away ends it, which drops the
//! session and so cancels the work.

use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::response::Response;
use serde::Serialize;
use tale_models::Event;
use tale_models::diffusion::DiffusionRequest;
use tale_models::request::{Frame, Usage};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tokio_stream::wrappers::ReceiverStream;

use super::Encoding;
use crate::compute::Compute;
use crate::engine::Session;
use crate::http::body::memory::Held;
use crate::http::error::{ApiError, ErrorEnvelope};
use crate::http::sse;
use crate::parameters::EffectiveParameters;

/// Events that may lie ready for a client: as many as a picture has, with the last one.
const MAX_UNSENT_EVENTS: usize = 4;

/// What the events of an endpoint are called.
#[derive(Debug, Clone, Copy)]
pub(super) struct Names {
    partial_image: &'static str,
    completed: &'static str,
}

/// Of `/v1/images/generations`.
pub(super) const GENERATION: Names =
    Names { partial_image: "image_generation.partial_image", completed: "image_generation.completed" };

/// Of `/v1/images/edits`.
pub(super) const EDIT: Names = Names { partial_image: "image_edit.partial_image", completed: "image_edit.completed" };

/// What all events of a stream share.
pub(super) struct Head {
    pub(super) names: Names,
    pub(super) created_at: u64,
    pub(super) encoding: Encoding,
    pub(super) parameters: EffectiveParameters,
    pub(super) request: DiffusionRequest,
    pub(super) compute: Compute,
    /// The memory of the pictures that the request brought.
    pub(super) _held: Held,
}

/// The answer, once the session has begun; work that fails at once fails with a status.
pub(super) async fn respond(head: Head, mut session: Session) -> Result<Response, ApiError> {
    sse::first_event(&mut session).await?;
    let (writes, body) = mpsc::channel(MAX_UNSENT_EVENTS);
    tokio::spawn(write(head, session, writes));
    Ok(sse::response(Body::from_stream(ReceiverStream::new(body))))
}

/// Writes until the last event, or until nobody reads.
async fn write(head: Head, mut session: Session, writes: mpsc::Sender<Result<Bytes, Infallible>>) {
    let mut picture = None;
    let mut comment_due = Instant::now() + sse::KEEP_ALIVE;
    loop {
        let event = tokio::select! {
            () = writes.closed() => return,
            event = timeout_at(comment_due, session.recv()) => event,
        };
        let (bytes, is_last) = match event {
            Err(_) => (Ok(Bytes::from_static(sse::COMMENT)), false),
            Ok(Some(Event::Preview { index, frame })) => (head.partial_image(index, frame).await, false),
            Ok(Some(Event::Frames(frames))) => {
                picture = frames.into_iter().next_back();
                continue;
            }
            Ok(Some(Event::Finished { usage, .. })) => (head.completed(picture.take(), usage).await, true),
            Ok(Some(Event::Failed(error))) => (Err(error.into()), true),
            Ok(Some(Event::Started | Event::Progress { .. } | Event::Checkpoint(_))) => continue,
            Ok(Some(Event::Prompt(_) | Event::Text { .. })) => continue,
            Ok(None) => (Err(super::cut_off()), true),
        };
        // The status has been sent: an error is the last event.
        let is_last = is_last || bytes.is_err();
        let bytes = bytes.unwrap_or_else(|error| {
            let mut buffer = Vec::new();
            sse::write_data(&mut buffer, &ErrorEnvelope { error: error.body() });
            buffer.into()
        });
        if writes.send(Ok(bytes)).await.is_err() || is_last {
            return;
        }
        comment_due = Instant::now() + sse::KEEP_ALIVE;
    }
}

impl Head {
    async fn partial_image(&self, index: usize, frame: Frame) -> Result<Bytes, ApiError> {
        let size = (self.request.canvas.width, self.request.canvas.height);
        let b64_json = self.encoding.encode_preview(&self.compute, frame, size).await?;
        let event = self.event(self.names.partial_image, Some(index), None);
        Ok(self.compute.run(b64_json.len(), move |_| event.write(b64_json)).await?)
    }

    async fn completed(&self, picture: Option<Frame>, usage: Usage) -> Result<Bytes, ApiError> {
        let picture = picture.ok_or_else(|| ApiError::internal("the model finished without a picture"))?;
        let b64_json = self.encoding.encode(&self.compute, picture, self.parameters.clone()).await?;
        let Usage { prompt_tokens, completion_tokens, .. } = usage;
        let whole = Whole {
            usage: WireUsage {
                input_tokens: prompt_tokens,
                input_tokens_details: TokensDetails { image_tokens: 0, text_tokens: prompt_tokens },
                output_tokens: completion_tokens,
                total_tokens: prompt_tokens + completion_tokens,
            },
            skipped_passes: super::skipped_passes(&self.request, usage),
            partial_images: self.request.partial_images,
            metadata: self.encoding.metadata,
            num_reference_images: super::num_reference_images(&self.request),
            parameters: self.parameters.clone(),
        };
        let event = self.event(self.names.completed, None, Some(whole));
        Ok(self.compute.run(b64_json.len(), move |_| event.write(b64_json)).await?)
    }

    /// An event, still without its picture.
    fn event(&self, kind: &'static str, index: Option<usize>, whole: Option<Whole>) -> WireEvent {
        WireEvent {
            kind,
            b64_json: String::new(),
            partial_image_index: index,
            created_at: self.created_at,
            size: format!("{}x{}", self.request.canvas.width, self.request.canvas.height),
            quality: "auto",
            background: "opaque",
            output_format: self.encoding.format.as_str(),
            whole,
        }
    }
}

/// One event in OpenAI's shape.
#[derive(Serialize)]
struct WireEvent {
    #[serde(rename = "type")]
    kind: &'static str,
    b64_json: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    partial_image_index: Option<usize>,
    created_at: u64,
    size: String,
    quality: &'static str,
    background: &'static str,
    output_format: &'static str,
    #[serde(flatten)]
    whole: Option<Whole>,
}

impl WireEvent {
    /// The event with its picture.
    fn write(self, b64_json: String) -> Bytes {
        let mut buffer = Vec::new();
        sse::write_named(&mut buffer, self.kind, &Self { b64_json, ..self });
        buffer.into()
    }
}

/// What the last event has beside the picture.
#[derive(Serialize)]
struct Whole {
    usage: WireUsage,
    #[serde(skip_serializing_if = "Option::is_none")]
    skipped_passes: Option<usize>,
    partial_images: usize,
    metadata: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    num_reference_images: Option<usize>,
    #[serde(flatten)]
    parameters: EffectiveParameters,
}

/// Pictures are not counted in tokens, so that its numbers are 0; clients expect the field.
#[derive(Serialize)]
struct WireUsage {
    input_tokens: usize,
    input_tokens_details: TokensDetails,
    output_tokens: usize,
    total_tokens: usize,
}

#[derive(Serialize)]
struct TokensDetails {
    image_tokens: usize,
    text_tokens: usize,
}
