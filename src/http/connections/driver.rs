//! One connection from its first byte to its last: hyper over a [`Wire`], with the limits of time.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io::ErrorKind;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderMap, Request, Response, Version, header};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::Service as HyperService;
use rustix::net::{Shutdown, shutdown};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Sleep, sleep_until, timeout};
use tower_service::Service as TowerService;

use super::framing::{Chunk, Framing};
use super::limits::Patience;
use super::refusal::Refusal;
use super::rousing::Rousing;
use super::wire::{Due, Hangup, Wire, WireIo};
use crate::http::error::ApiError;
use crate::http::sse;
use crate::telemetry;

/// How long a client may still send after an answer that is the last one, and how much: closing a socket with something
/// unread in it makes the system throw away the answer as well.
const LINGER: Duration = Duration::from_secs(1);
const MAX_LINGER_BYTES: usize = 4 << 20;

/// How a connection came to its end.
enum End {
    /// hyper says so.
    Over,
    /// With words of ours.
    Refused(Refusal),
    /// Nobody is there any more, or nothing was going on.
    Closed,
}

/// Serves what comes over a connection until it ends, or `stop` is true and its last answer is sent.
pub(super) async fn drive(wire: Arc<Wire>, router: Router, patience: Patience, stop: watch::Receiver<bool>) {
    // What was worked on for a client that is gone ends with this.
    let end = answer(wire.clone(), router, patience, stop).await;
    let has_unread = wire.has_unread();
    wire.end();
    let last_words = async {
        match end {
            End::Over if has_unread => linger(wire.stream()).await,
            End::Over | End::Closed => (),
            End::Refused(refusal) => refuse(wire.stream(), &refusal).await,
        }
    };
    tokio::select! {
        () = last_words => (),
        () = poll_fn(|context| wire.poll_kicked(context)) => (),
    }
}

async fn answer(wire: Arc<Wire>, router: Router, patience: Patience, mut stop: watch::Receiver<bool>) -> End {
    let service = Serving { router, wire: wire.clone() };
    let mut builder = http1::Builder::new();
    // A wire tells half a close from a whole one, and has times of its own.
    builder.half_close(true).header_read_timeout(None);
    let mut connection = pin!(builder.serve_connection(WireIo(wire.clone()), service));
    let mut stopped = pin!(async move { stop.wait_for(|stop| *stop).await.is_ok() });
    let mut waits = Waits::new(wire.clone(), patience);
    let mut is_stopping = false;
    let mut look = |context: &mut Context<'_>| {
        loop {
            if !is_stopping && stopped.as_mut().poll(context).is_ready() {
                is_stopping = true;
                connection.as_mut().graceful_shutdown();
            }
            let over = connection.as_mut().poll(context);
            if let Some(refusal) = wire.refusal() {
                return Poll::Ready(End::Refused(refusal));
            }
            if let Poll::Ready(result) = over {
                if let Err(error) = result {
                    tracing::debug!(%error, "a connection ended early");
                }
                return Poll::Ready(End::Over);
            }
            match waits.poll(context) {
                Poll::Ready(Wait::Over) => return Poll::Ready(End::Closed),
                Poll::Ready(Wait::Again) => (),
                Poll::Pending => return Poll::Pending,
            }
        }
    };
    let rousing = Rousing::new();
    poll_fn(|context| rousing.poll(context, &mut look)).await
}

/// What may end a connection besides hyper.
struct Waits {
    wire: Arc<Wire>,
    patience: Patience,
    sleep: Pin<Box<Sleep>>,
    /// When `sleep` ends; no later than the deadline of the wire. `None` while nothing is waited for.
    armed: Option<Instant>,
    hangup: Option<Hangup>,
}

enum Wait {
    /// The connection is.
    Over,
    /// hyper should look again.
    Again,
}

impl Waits {
    fn new(wire: Arc<Wire>, patience: Patience) -> Self {
        let sleep = Box::pin(sleep_until(Instant::now().into()));
        Self { wire, patience, sleep, armed: None, hangup: None }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Wait> {
        if self.wire.poll_kicked(context).is_ready() || self.wire.poll_gone(context, &mut self.hangup).is_ready() {
            return Poll::Ready(Wait::Over);
        }
        loop {
            let Some(deadline) = self.wire.deadline(&self.patience) else { return Poll::Pending };
            // A later deadline than what the timer is set to is looked at when that is over: streams of short requests
            // would otherwise set it twice for each.
            if self.armed.is_none_or(|armed| deadline < armed) {
                self.sleep.as_mut().reset(deadline.into());
                self.armed = Some(deadline);
            }
            if self.sleep.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            self.armed = None;
            let now = Instant::now();
            match self.wire.due(&self.patience, now) {
                Due::Nothing => (),
                Due::Close => return Poll::Ready(Wait::Over),
                Due::Refuse => return Poll::Ready(Wait::Again),
                Due::Probe if self.wire.probe(now).is_err() => return Poll::Ready(Wait::Over),
                Due::Probe => return Poll::Ready(Wait::Again),
            }
        }
    }
}

/// The routes, as hyper asks them.
struct Serving {
    router: Router,
    wire: Arc<Wire>,
}

impl HyperService<Request<Incoming>> for Serving {
    type Response = Response<Answer>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        self.wire.begin(framing(request.body()), request.version() == Version::HTTP_10);
        let request = self.wire.peer().mark(request.map(Body::new));
        let answer = self.router.clone().call(request);
        let wire = self.wire.clone();
        Box::pin(async move {
            let answer = answer.await?;
            let is_events = is_events(answer.headers());
            wire.begin_answer(is_events);
            Ok(answer.map(|body| Answer { body, wire, is_events }))
        })
    }
}

/// The body of a request, as hyper understood its head.
fn framing(body: &Incoming) -> Option<Framing> {
    match hyper::body::Body::size_hint(body).exact() {
        Some(0) => None,
        Some(length) => Some(Framing::Length(length)),
        None => Some(Framing::Chunked(Chunk::Size(0))),
    }
}

fn is_events(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"))
}

/// The body of an answer, which tells its wire when hyper has had all of it.
struct Answer {
    body: Body,
    wire: Arc<Wire>,
    is_events: bool,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        match Pin::new(&mut self.body).poll_frame(context) {
            // Each frame of such a body is whole events, so that a comment may stand between two.
            Poll::Pending if self.is_events && self.wire.take_comment_due() => {
                Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(sse::COMMENT)))))
            }
            frame => frame,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.wire.end_answer();
    }
}

/// Tells a client why its connection ends, and ends it.
async fn refuse(stream: &TcpStream, refusal: &Refusal) {
    let error = ApiError::from(refusal);
    telemetry::record_request("(none)", "OTHER", error.status().as_u16(), Duration::ZERO);
    // The answer fits into any socket's buffer; a client whose buffer is full does not read.
    match stream.try_write(&error.to_http1()) {
        Ok(_) => linger(stream).await,
        Err(error) => tracing::debug!(%error, "a refusal could not be sent"),
    }
}

/// Ends our half of a connection and reads what the client still sends, for a while.
async fn linger(stream: &TcpStream) {
    if shutdown(stream, Shutdown::Write).is_err() {
        return;
    }
    let _ = timeout(LINGER, async {
        let mut discarded = 0;
        let mut buffer = [0; 4096];
        while discarded < MAX_LINGER_BYTES && stream.readable().await.is_ok() {
            match stream.try_read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => discarded += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => (),
                Err(_) => return,
            }
        }
    })
    .await;
}
