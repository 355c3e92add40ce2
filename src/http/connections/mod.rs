//! From a listener to the routes: which connections there are, how long each may wait, and when one ends.
//!
//! Owns: the accept loop, bounds of number and time, half-closed and vanished clients, answers to what is no request.
//! HTTP/1 itself is hyper's. Does not know: routes, bodies, what a request is about.
//!
//! Beside the connections that there may be stands a small reserve, for requests that are answered at once: health, and
//! for all others why there is no place. Its connections yield to one another in the same way.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::Request;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use self::refusal::Refusal;
use self::register::Register;
use self::wire::Wire;
use super::Peer;
use super::error::ApiError;

mod driver;
mod framing;
mod limits;
mod listen;
mod refusal;
mod register;
mod rousing;
mod wire;

pub use limits::{ConnectionLimits, DEFAULT_MAX_CONNECTIONS};
pub use listen::listen;

/// After an error of accept the next try waits this long, and twice as long after each further one, up to the most.
const MIN_BACKOFF: Duration = Duration::from_millis(10);
const MAX_BACKOFF: Duration = Duration::from_secs(1);
/// Errors of accept are told at most this often.
const ERROR_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Connections of the reserve.
const RESERVE: usize = 32;
/// A client that has vanished without a word is asked after this silence, then at these intervals, this often.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 6;
/// What the system holds of an answer that its client does not read. Left to itself it takes 4 MiB for each connection, all of
/// which is copied in the moment in which many ask. So much is under way at a gigabyte a second within a network of 0.2 ms.
const SEND_BUFFER_BYTES: usize = 256 << 10;

/// What a listener answers.
pub(super) struct Routes {
    /// Where there is a place.
    pub(super) all: Router,
    /// In the reserve; its fallback is [`crowded`].
    pub(super) reserve: Router,
}

/// Serves `routes` on `listener` until `stop` is true and the last answer is sent. Dropping it closes all connections.
pub(super) async fn serve(
    listener: TcpListener,
    routes: Routes,
    limits: ConnectionLimits,
    mut stop: watch::Receiver<bool>,
) {
    let places = Register::new(limits.most());
    let reserve = Register::new((RESERVE, RESERVE));
    let patience = limits.patience();
    let mut tasks = JoinSet::new();
    let mut accepting = Accepting::new(listener);
    let stopping = stop.clone();
    let mut stopped = std::pin::pin!(async move { stop.wait_for(|stop| *stop).await.is_ok() });
    loop {
        let (stream, peer) = tokio::select! {
            biased;
            _ = &mut stopped => break,
            // A task that panicked has said so.
            Some(_) = tasks.join_next() => continue,
            accepted = accepting.next(&places) => accepted,
        };
        let (register, router) = match places.make_room(peer).await {
            Ok(()) => (&places, routes.all.clone()),
            Err(refusal) if reserve.make_room(peer).await.is_ok() => {
                (&reserve, routes.reserve.clone().layer(Extension(refusal)))
            }
            // Even those who would only hear of that are too many.
            Err(_) => continue,
        };
        let wire = Arc::new(Wire::new(stream, peer));
        let place = register.enter(wire.clone());
        let stopping = stopping.clone();
        tasks.spawn(async move {
            // Here, so that the next connection need not wait for it.
            configure(wire.stream());
            driver::drive(wire, router, patience, stopping).await;
            drop(place);
        });
    }
    drop(accepting);
    while tasks.join_next().await.is_some() {}
}

/// Tells a client of the reserve why there is no place for its request, and to connect again for the next one.
pub(super) async fn crowded(request: Request) -> Response {
    let error = request.extensions().get::<Refusal>().map(ApiError::from);
    let mut response = error.unwrap_or_else(ApiError::no_route).into_response();
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// Takes connections from a listener, whatever happens.
struct Accepting {
    listener: TcpListener,
    backoff: Duration,
    last_told: Option<Instant>,
    untold: u64,
}

impl Accepting {
    fn new(listener: TcpListener) -> Self {
        Self { listener, backoff: MIN_BACKOFF, last_told: None, untold: 0 }
    }

    /// The next connection. Dropping the future loses none.
    async fn next(&mut self, register: &Register) -> (TcpStream, Peer) {
        loop {
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    self.backoff = MIN_BACKOFF;
                    return (stream, Peer::of_socket(address));
                }
                // Of the connection, which its client has given up.
                Err(error) if is_of_connection(&error) => (),
                Err(error) => {
                    self.tell(&error);
                    // Files are short, most likely.
                    register.kick_idle(None);
                    tokio::time::sleep(self.backoff).await;
                    self.backoff = (2 * self.backoff).min(MAX_BACKOFF);
                }
            }
        }
    }

    fn tell(&mut self, error: &io::Error) {
        if self.last_told.is_some_and(|last| last.elapsed() < ERROR_LOG_INTERVAL) {
            self.untold += 1;
            return;
        }
        tracing::error!(%error, untold = self.untold, "connections cannot be accepted");
        self.last_told = Some(Instant::now());
        self.untold = 0;
    }
}

fn is_of_connection(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::ConnectionRefused)
}

fn configure(stream: &TcpStream) {
    use rustix::net::sockopt;
    // Streams send many small writes; waiting to join them would be felt.
    let configured = stream.set_nodelay(true).and_then(|()| {
        sockopt::set_socket_send_buffer_size(stream, SEND_BUFFER_BYTES)?;
        sockopt::set_socket_keepalive(stream, true)?;
        sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
        sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
        Ok(sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?)
    });
    if let Err(error) = configured {
        tracing::debug!(%error, "a socket could not be configured");
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn every_request_has_its_peer() {
        let listener = TcpListener::bind("[::]:0").await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let peer = |request: axum::extract::Request| async move {
            Peer::of(&request).map_or("nobody".to_owned(), |Peer(address)| address.to_string())
        };
        let (_never, stop) = watch::channel(false);
        let router = Router::new().route("/known", get(peer)).fallback(peer);
        let routes = Routes { all: router, reserve: Router::new() };
        tokio::spawn(serve(listener, routes, ConnectionLimits::default(), stop));
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
        let get = |path: &str, then: &str| format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: {then}\r\n\r\n");
        let requests = [get("/known", "keep-alive"), get("/unknown", "close")].concat();
        stream.write_all(requests.as_bytes()).await.expect("sent");
        let mut answers = String::new();
        stream.read_to_string(&mut answers).await.expect("read");
        assert_eq!(answers.matches("\r\n\r\n127.0.0.1").count(), 2, "{answers}");
    }
}
