//! `GET /v1/videos/{id}/content`: the file, or a part of it.

use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::PathBuf;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use tale_models::parameter::{Declaration, Parameter};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio_stream::wrappers::ReceiverStream;

use super::{job, query, status};
use crate::http::AppState;
use crate::http::error::ApiError;
use crate::http::path::Id;
use crate::job::{ClipFile, JobState};

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 64 << 10;
/// Chunks that may wait for a slow client.
const MAX_WAITING_CHUNKS: usize = 4;

static VARIANT: Parameter<String> =
    Parameter::choice("variant", &["video"], "There are no thumbnails or spritesheets.");

/// The query of a file.
pub(in crate::http) static CONTENT_QUERY: &[&Declaration] = &[&VARIANT.declaration];

pub(in crate::http) async fn content(
    State(state): State<AppState>,
    Id(id): Id,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    match query(&uri, CONTENT_QUERY)?.get("variant").map(String::as_str) {
        None | Some("video") => (),
        Some(_) => return Err(ApiError::field("variant", "must be video; there are no thumbnails or spritesheets")),
    }
    let job = job(&state, &id)?;
    let JobState::Completed(file) = job.state else {
        let message = format!("the video is {}; its content is there once it is completed", status(&job.state));
        return Err(ApiError::not_completed(message));
    };
    let range = headers.get(header::RANGE).and_then(|range| range.to_str().ok());
    let mut response = match parse_range(range, file.bytes) {
        Wanted::Whole => send(file.clone(), 0..file.bytes, StatusCode::OK),
        Wanted::Part(part) => {
            let content_range = format!("bytes {}-{}/{}", part.start, part.end - 1, file.bytes);
            with_range(send(file, part, StatusCode::PARTIAL_CONTENT), &content_range)
        }
        Wanted::Impossible => {
            let content_range = format!("bytes */{}", file.bytes);
            return Ok(with_range(StatusCode::RANGE_NOT_SATISFIABLE.into_response(), &content_range));
        }
    };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(job.format.media_type()));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    Ok(response)
}

fn with_range(mut response: Response, content_range: &str) -> Response {
    if let Ok(value) = HeaderValue::from_str(content_range) {
        response.headers_mut().insert(header::CONTENT_RANGE, value);
    }
    response
}

fn send(file: ClipFile, part: Range<u64>, status: StatusCode) -> Response {
    let (chunks, receiver) = mpsc::channel(MAX_WAITING_CHUNKS);
    let length = part.end - part.start;
    spawn_blocking(move || {
        if let Err(error) = read(file.path, part, &chunks) {
            // The client sees that the body is shorter than announced.
            tracing::warn!(%error, "a clip could not be read to its end");
            let _ = chunks.blocking_send(Err(error));
        }
    });
    let mut response = (status, Body::from_stream(ReceiverStream::new(receiver))).into_response();
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    response
}

fn read(path: PathBuf, part: Range<u64>, chunks: &mpsc::Sender<std::io::Result<Bytes>>) -> std::io::Result<()> {
    let mut file = std::fs::File::open(path)?;
    file.seek(SeekFrom::Start(part.start))?;
    let mut left = (part.end - part.start) as usize;
    while left > 0 {
        let mut chunk = vec![0; left.min(CHUNK_BYTES)];
        file.read_exact(&mut chunk)?;
        left -= chunk.len();
        if chunks.blocking_send(Ok(chunk.into())).is_err() {
            // The client has gone.
            return Ok(());
        }
    }
    Ok(())
}

/// Which bytes a `Range` header wants.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Whole,
    Part(Range<u64>),
    Impossible,
}

/// One range of bytes. What is not understood, several ranges among it, is ignored, as RFC 9110 (14.2) allows.
fn parse_range(header: Option<&str>, length: u64) -> Wanted {
    let Some((first, last)) = header.and_then(|h| h.strip_prefix("bytes=")).and_then(|range| range.split_once('-'))
    else {
        return Wanted::Whole;
    };
    let (first, last) = match (first.parse::<u64>().ok(), last.parse::<u64>().ok()) {
        (Some(first), Some(last)) if last >= first => (first, last),
        (Some(first), None) if last.is_empty() => (first, u64::MAX),
        (None, Some(0)) if first.is_empty() => return Wanted::Impossible,
        (None, Some(suffix)) if first.is_empty() => (length.saturating_sub(suffix), u64::MAX),
        _ => return Wanted::Whole,
    };
    if first >= length {
        return Wanted::Impossible;
    }
    Wanted::Part(first..last.saturating_add(1).min(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_one_part_or_everything() {
        let check = |header, wanted| assert_eq!(parse_range(Some(header), 100), wanted, "{header}");
        check("bytes=0-9", Wanted::Part(0..10));
        check("bytes=90-", Wanted::Part(90..100));
        check("bytes=90-1000", Wanted::Part(90..100));
        check("bytes=-10", Wanted::Part(90..100));
        check("bytes=-1000", Wanted::Part(0..100));
        check("bytes=100-", Wanted::Impossible);
        check("bytes=-0", Wanted::Impossible);
        check("bytes=9-0", Wanted::Whole);
        check("bytes=0-1,5-6", Wanted::Whole);
        check("items=0-1", Wanted::Whole);
        assert_eq!(parse_range(None, 100), Wanted::Whole);
    }
}
