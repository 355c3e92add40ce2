//! From a listener to the routes: which connections there are, how long each may wait, and when one ends.
//!
//! Owns: the accept loop, bounds of number and time, half-closed and vanished clients, answers to what is no request.
//! HTTP/1 itself is hyper's. Does not know: routes, bodies, what a request is about.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use self::register::Register;
use self::wire::Wire;
use super::Peer;

mod driver;
mod framing;
mod limits;
mod listen;
mod refusal;
mod register;
mod wire;

pub use limits::{ConnectionLimits, DEFAULT_MAX_CONNECTIONS};
pub use listen::listen;

/// After an error of accept the next try waits this long, and twice as long after each further one, up to the most.
const MIN_BACKOFF: Duration = Duration::from_millis(10);
const MAX_BACKOFF: Duration = Duration::from_secs(1);
/// Errors of accept are told at most this often.
const ERROR_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Refused clients that are told so at once; further ones are closed without a word.
const MAX_TOLD: usize = 32;
/// A client that has vanished without a word is asked after this silence, then at these intervals, this often.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 6;

/// Serves `router` on `listener` until `stop` is true and the last answer is sent. Dropping it closes all connections.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    limits: ConnectionLimits,
    mut stop: watch::Receiver<bool>,
) {
    let register = Register::new(limits.most());
    let patience = limits.patience();
    let mut tasks = JoinSet::new();
    let mut refused = JoinSet::new();
    let mut accepting = Accepting::new(listener);
    let stopping = stop.clone();
    let mut stopped = std::pin::pin!(async move { stop.wait_for(|stop| *stop).await.is_ok() });
    loop {
        let (stream, peer) = tokio::select! {
            biased;
            _ = &mut stopped => break,
            // A task that panicked has said so.
            Some(_) = tasks.join_next() => continue,
            Some(_) = refused.join_next() => continue,
            accepted = accepting.next(&register) => accepted,
        };
        match register.make_room(peer).await {
            Ok(()) => {
                let wire = Arc::new(Wire::new(stream, peer));
                let place = register.enter(wire.clone());
                let driving = driver::drive(wire, router.clone(), patience, stopping.clone());
                tasks.spawn(async move {
                    driving.await;
                    drop(place);
                });
            }
            Err(refusal) if refused.len() < MAX_TOLD => {
                refused.spawn(async move { driver::refuse(&stream, &refusal).await });
            }
            Err(_) => (),
        }
    }
    drop(accepting);
    while tasks.join_next().await.is_some() {}
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
                    configure(&stream);
                    return (stream, Peer::of_socket(address));
                }
                // Of the connection, which its client has given up.
                Err(error) if is_of_connection(&error) => (),
                Err(error) => {
                    self.tell(&error);
                    // Files are short, most likely.
                    register.kick_one(None);
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
        tokio::spawn(serve(listener, router, ConnectionLimits::default(), stop));
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
        let get = |path: &str, then: &str| format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: {then}\r\n\r\n");
        let requests = [get("/known", "keep-alive"), get("/unknown", "close")].concat();
        stream.write_all(requests.as_bytes()).await.expect("sent");
        let mut answers = String::new();
        stream.read_to_string(&mut answers).await.expect("read");
        assert_eq!(answers.matches("\r\n\r\n127.0.0.1").count(), 2, "{answers}");
    }
}
