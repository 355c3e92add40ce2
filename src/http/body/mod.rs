//! From the bytes of a request to a typed body: bounded, timed, and with the path of the field that is wrong.
//!
//! Owns: media types, bounds, JSON and forms, and the words of what is wrong with a field's kind. A body comes in two
//! steps: [`receive`] waits for its bytes, [`Received::read`] computes what they say. Does not know: which fields a body
//! has, nor what they mean.

use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use tale_models::ClientId;
use tale_models::cancel::CancelToken;
use tokio::time::{Instant, timeout_at};

use self::encoding::Encoding;
use self::memory::Held;
pub(super) use self::reader::{of_field, read};
use self::value::{Room, Value};
use super::cold_start::{self, ALLOW_COLD_START};
use super::error::ApiError;
use super::{AppState, client};
use crate::compute::Compute;

mod encoding;
mod form;
pub(super) mod memory;
mod reader;
pub(super) mod upload;
pub(super) mod value;

/// Most bytes of a body: a prompt of a million tokens has about half of them.
pub const MAX_BODY_BYTES: usize = 8 << 20;
/// Most bytes of a body with pictures in it.
pub const MAX_PICTURE_BODY_BYTES: usize = 32 << 20;
/// Memory that bodies and the pictures in them may take together when nothing else is configured.
pub const DEFAULT_MAX_BODY_MEMORY: usize = 1 << 30;
/// Bytes that are read and thrown away after that, so that a client that only then looks for an answer gets it.
const MAX_DISCARDED_BYTES: usize = 64 << 20;
/// In this time a body has to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time in which nothing of a body arrives.
const MAX_BODY_PAUSE: Duration = Duration::from_secs(10);
/// After this time a body has to have come at [`MIN_BODY_BYTES_PER_SECOND`].
const BODY_GRACE: Duration = Duration::from_secs(5);
/// Least pace of a body, on average since [`BODY_GRACE`].
const MIN_BODY_BYTES_PER_SECOND: usize = 4 << 10;

/// So much of a body is taken in one go; then other connections have their turn.
const TURN_BYTES: usize = 256 << 10;

/// What a body may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Json,
    /// JSON, or a form whose fields mean the same.
    JsonOrForm,
}

/// A body that is there, as it came, and the memory that it takes.
#[derive(Debug)]
pub(super) struct Received {
    /// Whose it is.
    pub(super) client: ClientId,
    bytes: Bytes,
    encoding: Option<Encoding>,
    /// The content type of a form, which says how its parts are told apart.
    form_type: Option<String>,
    /// Most bytes once it is decompressed.
    max_bytes: usize,
    /// Its head says that it waits for its model.
    allows_cold_start: bool,
    held: Held,
}

/// Waits for all bytes of a body. Refused at once while the server could not do what it asks for.
pub(super) async fn receive(
    state: &AppState,
    request: Request,
    format: Format,
    max_bytes: usize,
) -> Result<Received, ApiError> {
    let client = client::of(&request);
    let allows_cold_start = cold_start::is_allowed_by_head(&request)?;
    state.engine()?;
    state.admission().check(client)?;
    let (parts, body) = request.into_parts();
    let form_type = form_type(&parts.headers, format)?;
    let encoding = encoding::of(&parts.headers)?;
    let mut held = state.body_memory().hold(client);
    let bytes = collect(body, max_bytes, &mut held).await?;
    Ok(Received { client, bytes, encoding, form_type, max_bytes, allows_cold_start, held })
}

impl Received {
    /// The same of a request for which there is nothing to wait for, whatever its head says of that.
    pub(super) fn not_waiting(self) -> Self {
        Self { allows_cold_start: false, ..self }
    }

    /// What `read` makes of the body as a tree, whose fields have the room that `room_of` says, and the memory that is
    /// still held. Computed on the threads for that unless it is little.
    pub(super) async fn read<T: Send + 'static>(
        self,
        compute: &Compute,
        room_of: impl Fn(&str) -> Room + Send + 'static,
        read: impl FnOnce(Value) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<(T, Held), ApiError> {
        let (bytes, is_plain) = (self.bytes.len(), self.encoding.is_none() && self.form_type.is_none());
        let work = move |cancelled: &CancelToken| {
            let (value, held) = self.value(&room_of, cancelled)?;
            Ok((read(value)?, held))
        };
        // A few bytes that are compressed may be many.
        if is_plain { compute.run_sized(bytes, work).await? } else { compute.run(bytes, work).await? }
    }

    fn value(self, room_of: &dyn Fn(&str) -> Room, cancelled: &CancelToken) -> Result<(Value, Held), ApiError> {
        let Self { mut bytes, encoding, form_type, max_bytes, allows_cold_start, mut held, .. } = self;
        if let Some(encoding) = encoding {
            bytes = encoding::decode(encoding, &bytes, max_bytes, &mut held, cancelled)?;
        }
        if cancelled.is_cancelled() {
            // Nobody hears it.
            return Err(ApiError::malformed("the client has gone"));
        }
        // The texts of the tree are copies; those of a form are copied once on the way.
        let num_bytes = bytes.len();
        held.add(if form_type.is_some() { 2 * num_bytes } else { num_bytes })?;
        let value = match form_type {
            None => Value::of_body(&bytes, room_of, &mut held)?,
            Some(content_type) => form::read(bytes.clone(), content_type)?,
        };
        drop(bytes);
        held.give_back(num_bytes);
        Ok((if allows_cold_start { waiting_for_model(value) } else { value }, held))
    }
}

/// What the head says is said as by the field, which may say something else itself.
fn waiting_for_model(body: Value) -> Value {
    match body {
        Value::Object(mut fields) => {
            let name = ALLOW_COLD_START.declaration.name;
            if fields.get(name).is_none_or(|value| matches!(value, Value::Null)) {
                fields.insert(name.to_owned(), Value::Bool(true));
            }
            Value::Object(fields)
        }
        other => other,
    }
}

/// The content type of a form, `None` for JSON; other media types are refused.
fn form_type(headers: &HeaderMap, format: Format) -> Result<Option<String>, ApiError> {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    match format {
        _ if media_type.eq_ignore_ascii_case("application/json") => Ok(None),
        Format::Json => Err(ApiError::media_type("application/json")),
        Format::JsonOrForm if media_type.eq_ignore_ascii_case("multipart/form-data") => {
            Ok(Some(content_type.to_owned()))
        }
        Format::JsonOrForm => Err(ApiError::media_type("application/json or multipart/form-data")),
    }
}

/// All bytes of a body. Memory is taken as they arrive, whatever was announced.
async fn collect(body: Body, max_bytes: usize, held: &mut Held) -> Result<Bytes, ApiError> {
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    let mut arriving = Arriving::new(body);
    if announced > max_bytes {
        arriving.discard().await?;
        return Err(ApiError::too_large(max_bytes));
    }
    let Some(first) = arriving.next().await? else { return Ok(Bytes::new()) };
    if arriving.body.is_end_stream() && first.len() <= max_bytes {
        held.add(first.len())?;
        return Ok(first);
    }
    let mut collected = Vec::new();
    let mut next = Some(first);
    while let Some(data) = next {
        if let Err(error) = append(&mut collected, &data, announced, max_bytes, held) {
            drop((collected, data));
            held.shrink_to(0);
            arriving.discard().await?;
            return Err(error);
        }
        next = arriving.next().await?;
    }
    Ok(collected.into())
}

/// Adds what has arrived. The room doubles, up to what was announced (0: nothing was).
fn append(
    collected: &mut Vec<u8>,
    data: &[u8],
    announced: usize,
    max_bytes: usize,
    held: &mut Held,
) -> Result<(), ApiError> {
    let length = collected.len() + data.len();
    if length > max_bytes {
        return Err(ApiError::too_large(max_bytes));
    }
    if length > collected.capacity() {
        let most = if announced == 0 { max_bytes } else { announced.max(length) };
        let capacity = (2 * length).min(most);
        held.add(capacity - collected.capacity())?;
        collected.reserve_exact(capacity - collected.len());
    }
    collected.extend_from_slice(data);
    Ok(())
}

/// A body that arrives at a pace.
struct Arriving {
    body: Body,
    begun: Instant,
    /// When something last arrived.
    last: Instant,
    bytes: usize,
}

impl Arriving {
    fn new(body: Body) -> Self {
        let now = Instant::now();
        Self { body, begun: now, last: now, bytes: 0 }
    }

    /// When more has to have arrived.
    fn deadline(&self) -> Instant {
        let seconds_of_pace = (self.bytes / MIN_BODY_BYTES_PER_SECOND) as u64;
        let by_pace = self.begun + BODY_GRACE + Duration::from_secs(seconds_of_pace);
        by_pace.min(self.begun + BODY_TIMEOUT).min(self.last + MAX_BODY_PAUSE)
    }

    /// The next bytes; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        loop {
            let deadline = self.deadline();
            let frame = std::future::poll_fn(|context| std::pin::Pin::new(&mut self.body).poll_frame(context));
            match timeout_at(deadline, frame).await.map_err(|_| ApiError::body_timeout())? {
                None => return Ok(None),
                Some(Err(_)) => return Err(ApiError::malformed("the body ended early")),
                // Trailers say nothing here.
                Some(Ok(frame)) => {
                    let Ok(data) = frame.into_data() else { continue };
                    let turn = self.bytes / TURN_BYTES;
                    self.bytes += data.len();
                    self.last = Instant::now();
                    if self.bytes / TURN_BYTES > turn {
                        tokio::task::yield_now().await;
                    }
                    return Ok(Some(data));
                }
            }
        }
    }

    /// Reads what is left, up to a bound, and keeps nothing of it.
    async fn discard(&mut self) -> Result<(), ApiError> {
        let mut discarded = 0;
        while let Some(data) = self.next().await? {
            discarded += data.len();
            if discarded > MAX_DISCARDED_BYTES {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;
    use http_body::Frame;

    use super::memory::BodyMemory;
    use super::*;

    /// A body of `pieces`, each so long after the one before; it ends only when `ends`.
    fn slow(pieces: Vec<(Duration, usize)>, ends: bool) -> Body {
        Body::new(Pieces { pieces: pieces.into_iter(), wait: None, ends })
    }

    struct Pieces {
        pieces: std::vec::IntoIter<(Duration, usize)>,
        wait: Option<(std::pin::Pin<Box<tokio::time::Sleep>>, usize)>,
        ends: bool,
    }

    impl HttpBody for Pieces {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            mut self: std::pin::Pin<&mut Self>,
            context: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            use std::task::Poll;
            if self.wait.is_none() {
                self.wait = self.pieces.next().map(|(wait, bytes)| (Box::pin(tokio::time::sleep(wait)), bytes));
            }
            let ends = self.ends;
            match &mut self.wait {
                None if ends => Poll::Ready(None),
                None => Poll::Pending,
                Some((sleep, bytes)) => {
                    let bytes = *bytes;
                    std::task::ready!(sleep.as_mut().poll(context));
                    self.wait = None;
                    Poll::Ready(Some(Ok(Frame::data(vec![b' '; bytes].into()))))
                }
            }
        }
    }

    /// Bytes that arrived or status of the refusal, and after how many seconds.
    async fn arrival(pieces: Vec<(Duration, usize)>, ends: bool) -> (Result<usize, u16>, u64) {
        let begun = Instant::now();
        let collected = collect(slow(pieces, ends), 1 << 20, &mut BodyMemory::new(1 << 30).hold(ClientId(0))).await;
        let found = collected.map(|bytes| bytes.len()).map_err(|error| error.into_response().status().as_u16());
        (found, begun.elapsed().as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_body_is_cut() {
        let second = Duration::from_secs(1);
        assert_eq!(arrival(vec![], false).await, (Err(408), 5), "nothing in the time of grace");
        assert_eq!(arrival(vec![(second, 1); 100], true).await, (Err(408), 5), "below the least pace");
        assert_eq!(arrival(vec![(second, 8 << 10); 10], true).await, (Ok(80 << 10), 10), "at twice the pace");
        assert_eq!(arrival(vec![(second, 8 << 10); 100], true).await, (Err(408), 30), "longer than any body");
        let stalls = vec![(second, 512 << 10), (second * 20, 1)];
        assert_eq!(arrival(stalls, true).await, (Err(408), 11), "longer than any pause");
    }

    #[tokio::test]
    async fn memory_is_taken_for_what_arrives_and_not_for_what_is_announced() {
        let memory = BodyMemory::new(1 << 20);
        let mut held = memory.hold(ClientId(0));
        let mut collected = Vec::new();
        append(&mut collected, b"{", 32 << 20, 32 << 20, &mut held).expect("one byte");
        assert!(held.bytes() < 16, "{}", held.bytes());
        let piece = vec![b' '; 300 << 10];
        for _ in 0..2 {
            append(&mut collected, &piece, 32 << 20, 32 << 20, &mut held).expect("there");
        }
        assert_eq!(held.bytes(), collected.capacity());
        let refused = append(&mut collected, &piece, 32 << 20, 32 << 20, &mut held).expect_err("not there");
        assert_eq!(refused.into_response().status(), 503);
        drop(held);
        let body = slow(vec![(Duration::ZERO, 600 << 10), (Duration::ZERO, 600 << 10)], true);
        let mut held = memory.hold(ClientId(0));
        let refused = collect(body, 32 << 20, &mut held).await.expect_err("not there");
        assert_eq!((refused.into_response().status().as_u16(), held.bytes()), (503, 0));
    }
}
