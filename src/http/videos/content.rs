//! `GET /v1/videos/{id}/content`: the file or a still beside it, or a part of that.
//!
//! A file is opened before the head of the answer is sent, so that one that is not there is an error with a status, and
//! stays open until the last byte: a video that is removed meanwhile is still sent whole. Bytes are read when the client
//! takes them; one that does not holds one chunk, and no thread.

use std::future::Future;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use tale_models::parameter::{Declaration, Parameter};

use self::open::{OpenFile, OpenFiles};
use super::job;
use crate::http::AppState;
use crate::http::error::ApiError;
use crate::http::files::FileWork;
use crate::http::pages::query;
use crate::http::path::Id;
use crate::http::stored::completed;
use crate::media::Still;

mod open;

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 64 << 10;
/// Most videos that are read at a time, each by any number of clients; each is one open file.
const MAX_OPEN_FILES: usize = 128;
/// Most chunks that are read at a time.
const MAX_READS: usize = 16;

static OPEN_FILES: OpenFiles = OpenFiles::new(MAX_OPEN_FILES);
static READS: FileWork = FileWork::new(MAX_READS);

static VARIANT: Parameter<String> = Parameter::choice(
    "variant",
    VARIANTS,
    "The video when absent; a thumbnail is the first frame as WebP, a spritesheet up to 16 frames as JPEG.",
);
/// What there is of a video.
const VARIANTS: &[&str] = &["video", "thumbnail", "spritesheet"];

/// The query of a file.
pub(in crate::http) static CONTENT_QUERY: &[&Declaration] = &[&VARIANT.declaration];

pub(in crate::http) async fn content(
    State(state): State<AppState>,
    Id(id): Id,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let still = match query(&uri, CONTENT_QUERY)?.get("variant").map(String::as_str) {
        None | Some("video") => None,
        Some("thumbnail") => Some(Still::Thumbnail),
        Some("spritesheet") => Some(Still::Spritesheet),
        Some(_) => return Err(ApiError::field("variant", format!("must be one of {}", VARIANTS.join(", ")))),
    };
    let job = job(&state, &id).await?;
    let files = completed(&job)?;
    let file = match still {
        None => &files.clip,
        Some(still) => files.still(still).ok_or_else(ApiError::removed)?,
    };
    let media_type = still.map_or(job.spec.file.encoding.format().media_type(), Still::media_type);
    let open = OPEN_FILES.open(job.id, file.clone()).await?;
    let range = headers.get(header::RANGE).and_then(|range| range.to_str().ok());
    let mut response = match parse_range(range, file.bytes) {
        Wanted::Whole => send(open, 0..file.bytes, StatusCode::OK),
        Wanted::Part(part) => {
            let content_range = format!("bytes {}-{}/{}", part.start, part.end - 1, file.bytes);
            with_range(send(open, part, StatusCode::PARTIAL_CONTENT), &content_range)
        }
        Wanted::Impossible => {
            let content_range = format!("bytes */{}", file.bytes);
            return Ok(with_range(StatusCode::RANGE_NOT_SATISFIABLE.into_response(), &content_range));
        }
    };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    Ok(response)
}

fn with_range(mut response: Response, content_range: &str) -> Response {
    if let Ok(value) = HeaderValue::from_str(content_range) {
        response.headers_mut().insert(header::CONTENT_RANGE, value);
    }
    response
}

fn send(file: Arc<OpenFile>, part: Range<u64>, status: StatusCode) -> Response {
    let length = part.end - part.start;
    let chunks = Chunks { file, left: part, reading: None };
    let mut response = (status, Body::from_stream(chunks)).into_response();
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    response
}

/// The bytes of a part of a file, one chunk at a time, each read when it is asked for.
struct Chunks {
    file: Arc<OpenFile>,
    left: Range<u64>,
    reading: Option<Reading>,
}

type Reading = Pin<Box<dyn Future<Output = io::Result<Bytes>> + Send>>;

impl Stream for Chunks {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.left.is_empty() {
            return Poll::Ready(None);
        }
        let Self { file, left, reading } = &mut *self;
        let reading = reading.get_or_insert_with(|| Box::pin(read(file.clone(), left.clone())));
        let chunk = ready!(reading.as_mut().poll(context));
        self.reading = None;
        match &chunk {
            Ok(bytes) => self.left.start += bytes.len() as u64,
            Err(error) => {
                // The client sees that the body is shorter than announced.
                tracing::warn!(%error, "a clip could not be read to its end");
                self.left.end = self.left.start;
            }
        }
        Poll::Ready(Some(chunk))
    }
}

/// The first chunk of what is left.
async fn read(file: Arc<OpenFile>, left: Range<u64>) -> io::Result<Bytes> {
    let length = usize::try_from(left.end - left.start).unwrap_or(usize::MAX).min(CHUNK_BYTES);
    let read = move || {
        let mut chunk = vec![0; length];
        file.read_exact_at(&mut chunk, left.start).map(|()| Bytes::from(chunk))
    };
    READS.run(read).await.map_err(|_| io::Error::other("the reading panicked"))?
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
    use axum::body::HttpBody;

    use super::*;
    use crate::job::JobId;
    use crate::job::JobKind;
    use crate::job::files::StoredFile;

    /// The next chunk of a body.
    async fn chunk(body: &mut Body) -> Option<io::Result<Bytes>> {
        let frame = std::future::poll_fn(|context| HttpBody::poll_frame(Pin::new(&mut *body), context)).await?;
        Some(frame.map_err(io::Error::other).map(|frame| frame.into_data().expect("there are no trailers")))
    }

    #[test]
    fn readers_that_take_nothing_hold_no_thread_and_no_removal_cuts_them() {
        const BYTES: u64 = 20 * CHUNK_BYTES as u64 + 1;
        let dir = tempfile::tempdir().expect("made");
        let path = dir.path().join("clip");
        std::fs::File::create(&path).and_then(|file| file.set_len(BYTES)).expect("writable");
        let clip = StoredFile { path: path.clone(), bytes: BYTES };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().max_blocking_threads(1).build();
        let all = async {
            let open = OPEN_FILES.open(JobId::generate(JobKind::Video), clip).await.expect("there");
            let mut readers: Vec<Body> =
                (0..9).map(|_| send(open.clone(), 0..BYTES, StatusCode::OK).into_body()).collect();
            for reader in &mut readers {
                assert_eq!(chunk(reader).await.expect("some").expect("readable").len(), CHUNK_BYTES);
            }
            std::fs::remove_file(&path).expect("there");
            let (mut last, mut bytes) = (readers.pop().expect("some"), CHUNK_BYTES);
            while let Some(chunk) = chunk(&mut last).await {
                bytes += chunk.expect("readable").len();
            }
            assert_eq!(bytes as u64, BYTES);
        };
        let bounded = async { tokio::time::timeout(std::time::Duration::from_secs(10), all).await };
        runtime.expect("starts").block_on(bounded).expect("others hold the only thread");
    }

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
