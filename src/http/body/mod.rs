//! From the bytes of a request to a typed body: bounded, timed, and with the path of the field that is wrong.
//!
//! Owns: media types, bounds, JSON and forms, and the words of what is wrong with a field's kind. Does not know: which fields
//! a body has, nor what they mean.

use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, header};

pub(super) use self::reader::{of_field, read};
use self::value::{Object, Value};
use super::error::ApiError;
use super::openai::{self, Field};

mod encoding;
mod form;
mod reader;
pub(super) mod upload;
pub(super) mod value;

/// Most bytes of a body: a prompt of a million tokens has about half of them.
pub const MAX_BODY_BYTES: usize = 8 << 20;
/// Most bytes of a body with pictures in it.
pub const MAX_PICTURE_BODY_BYTES: usize = 32 << 20;
/// Bytes that are read and thrown away after that, so that a client that only then looks for an answer gets it.
const MAX_DISCARDED_BYTES: usize = 64 << 20;
/// In this time a body has to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// The JSON body of a request, without those of OpenAI's `fields` that ask for nothing.
pub(super) async fn json(request: Request, fields: &[&[Field]]) -> Result<Object, ApiError> {
    let mut body = json_value(request, MAX_BODY_BYTES).await?;
    openai::settle(fields, &mut body)?;
    body.into_object()
}

/// The JSON body of a request, as a tree.
pub(super) async fn json_value(request: Request, max_bytes: usize) -> Result<Value, ApiError> {
    if !has_media_type(request.headers(), "application/json") {
        return Err(ApiError::media_type("application/json"));
    }
    let (parts, body) = request.into_parts();
    Value::from_json(&read_bytes(&parts.headers, body, max_bytes).await?)
}

/// A body of at most `max_bytes` that is JSON, or a form whose fields mean the same, as a tree.
pub(super) async fn json_or_form_value(request: Request, max_bytes: usize) -> Result<Value, ApiError> {
    let is_json = has_media_type(request.headers(), "application/json");
    if !is_json && !has_media_type(request.headers(), "multipart/form-data") {
        return Err(ApiError::media_type("application/json or multipart/form-data"));
    }
    let (parts, body) = request.into_parts();
    let body = read_bytes(&parts.headers, body, max_bytes).await?;
    match is_json {
        true => Value::from_json(&body),
        false => form::read(Request::from_parts(parts, Body::from(body))).await,
    }
}

fn has_media_type(headers: &HeaderMap, expected: &str) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().is_some_and(|media_type| media_type.trim().eq_ignore_ascii_case(expected))
}

/// All of a body, decompressed; `max_bytes` bounds what comes and what it becomes.
async fn read_bytes(headers: &HeaderMap, body: Body, max_bytes: usize) -> Result<Bytes, ApiError> {
    let encoding = encoding::of(headers)?;
    let collected = tokio::time::timeout(BODY_TIMEOUT, collect(body, max_bytes)).await;
    let bytes = collected.map_err(|_| ApiError::body_timeout())??;
    let Some(encoding) = encoding else { return Ok(bytes) };
    let decoded = tokio::task::spawn_blocking(move || encoding::decode(encoding, &bytes, max_bytes)).await;
    decoded.map_err(|_| ApiError::internal("the decompression panicked"))?
}

async fn collect(mut body: Body, max_bytes: usize) -> Result<Bytes, ApiError> {
    let announced = body.size_hint().lower();
    if announced <= max_bytes as u64 {
        let mut collected = Vec::with_capacity(announced as usize);
        loop {
            match next_data(&mut body).await? {
                None => return Ok(collected.into()),
                Some(data) if collected.len() + data.len() > max_bytes => break,
                Some(data) => collected.extend_from_slice(&data),
            }
        }
    }
    let mut discarded = 0;
    while let Some(data) = next_data(&mut body).await? {
        discarded += data.len();
        if discarded > MAX_DISCARDED_BYTES {
            break;
        }
    }
    Err(ApiError::too_large(max_bytes))
}

async fn next_data(body: &mut Body) -> Result<Option<Bytes>, ApiError> {
    loop {
        let frame = std::future::poll_fn(|context| std::pin::Pin::new(&mut *body).poll_frame(context)).await;
        match frame {
            None => return Ok(None),
            Some(Err(_)) => return Err(ApiError::malformed("the body ended early")),
            // Trailers say nothing here.
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}
