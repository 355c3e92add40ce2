//! The bytes of one connection, between its socket and hyper.
//!
//! hyper is handed one head at a time, and of a body no byte of what follows it. So it is known at each moment whether a
//! request is awaited, arriving, worked on or answered, which the time limits, the choice of a connection to close and
//! the answers to malformed heads all rest on. Does not know: limits, hyper's driver, what a request is about.
//!
//! A client that closes its sending half (FIN) may still want its answer, and one that has gone for good sends the same
//! FIN. The difference shows only when something is sent to it: a system that has closed its end answers with RST. So
//! what is awaited meanwhile is the socket's error, after something that every client skips: `100 Continue` before an
//! answer of HTTP/1.1 (RFC 9110, 15.2), a comment within a stream of events. Other answers that have begun are the
//! probe themselves, and HTTP/1.0 has none: such a client counts as there until its answer is written.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use hyper::rt::{Read, ReadBufCursor, Write};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::framing::{Framing, head_length};
use super::limits::{MAX_HEAD_BYTES, Patience};
use super::refusal::Refusal;
use crate::http::Peer;

/// Bytes that are read at once while a head is awaited, and of a body.
const HEAD_READ_BYTES: usize = 8 << 10;
const BODY_READ_BYTES: usize = 64 << 10;
/// Time between two probes of a client that has closed its sending half.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// What a client that waits for an answer skips, asked for or not (RFC 9110, 15.2).
const PROBE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// A connection's socket, and how far its client and hyper have come.
#[derive(Debug)]
pub(super) struct Wire {
    stream: TcpStream,
    peer: Peer,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// What the client sent and hyper has not been given; at most a head and a read.
    ahead: BytesMut,
    /// The client has closed its sending half.
    has_ended: bool,
    stage: Stage,
    answer: Answer,
    /// A request has come over this connection.
    has_served: bool,
    is_http10: bool,
    /// Waits for `ahead` to be given.
    reader: Option<Waker>,
    /// hyper may hold bytes that the socket has not taken.
    is_unflushed: bool,
    /// Since when the socket takes nothing.
    stalled_since: Option<Instant>,
    next_probe: Option<Instant>,
    is_comment_due: bool,
    refusal: Option<Refusal>,
    /// Asked to make room for another connection.
    is_kicked: bool,
    /// Waits for that.
    driver: Option<Waker>,
}

/// How far a request has come.
#[derive(Debug)]
enum Stage {
    /// Nothing of it is there.
    Idle { since: Instant },
    /// A part of its head is there.
    Head { since: Instant },
    /// Its head is whole; hyper has not had all of it, or has not passed it on.
    Handed { left: usize, since: Instant },
    /// A handler has it.
    Body(Framing),
    /// It is whole.
    Done,
    /// There will be no more; what still comes is thrown away.
    Over { since: Instant },
}

/// How far an answer has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// Nobody has been asked.
    None,
    /// A handler works on it.
    Awaited,
    /// It has begun.
    Begun { is_events: bool },
    /// hyper has all of it.
    Given,
    /// The socket has all of it.
    Sent,
}

/// What hyper's read comes to.
enum Given {
    /// This many bytes of `ahead`.
    Bytes(usize),
    /// The client sends no more.
    End,
    /// Nothing before something else has happened.
    Nothing,
    /// First something must come.
    Read,
}

/// What has to happen when a wait is over.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Due {
    Nothing,
    Close,
    /// The wire has the refusal.
    Refuse,
    Probe,
}

/// Which connections go first when there are too many; the lesser ones do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Idleness {
    /// Its last answer is sent.
    Over(Instant),
    /// No request has ever come.
    Silent(Instant),
    /// It waits for one more.
    Idle(Instant),
}

impl Wire {
    pub(super) fn new(stream: TcpStream, peer: Peer) -> Self {
        let state = State {
            ahead: BytesMut::new(),
            has_ended: false,
            stage: Stage::Idle { since: Instant::now() },
            answer: Answer::None,
            has_served: false,
            is_http10: false,
            reader: None,
            is_unflushed: false,
            stalled_since: None,
            next_probe: None,
            is_comment_due: false,
            refusal: None,
            is_kicked: false,
            driver: None,
        };
        Self { stream, peer, state: Mutex::new(state) }
    }

    pub(super) fn peer(&self) -> Peer {
        self.peer
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A handler is asked; `framing` is the body as hyper understood it, `None` where there is none.
    pub(super) fn begin(&self, framing: Option<Framing>, is_http10: bool) {
        let mut state = self.state();
        state.stage = framing.map_or(Stage::Done, Stage::Body);
        state.answer = Answer::Awaited;
        state.has_served = true;
        state.is_http10 = is_http10;
    }

    /// The handler has answered; the body is to come.
    pub(super) fn begin_answer(&self, is_events: bool) {
        self.state().answer = Answer::Begun { is_events };
    }

    /// hyper has taken the last of the answer's body, or given it up.
    pub(super) fn end_answer(&self) {
        self.state().answer = Answer::Given;
    }

    /// Whether a stream of events should show that its client is there.
    pub(super) fn take_comment_due(&self) -> bool {
        std::mem::take(&mut self.state().is_comment_due)
    }

    /// Why the connection has to end with an answer that no handler made.
    pub(super) fn refusal(&self) -> Option<Refusal> {
        self.state().refusal.clone()
    }

    /// hyper is gone.
    pub(super) fn end(&self) {
        self.state().stage = Stage::Over { since: Instant::now() };
    }

    /// Whether closing now would throw away what the client still sends, and our answer with it.
    pub(super) fn has_unread(&self) -> bool {
        let state = self.state();
        !state.has_ended && (!state.ahead.is_empty() || matches!(state.stage, Stage::Body(_)))
    }

    /// `None` while a request is worked on, and once the connection closes.
    pub(super) fn idleness(&self) -> Option<Idleness> {
        let state = self.state();
        if state.is_kicked { None } else { state.idleness() }
    }

    /// Asks an idle connection to close.
    pub(super) fn kick(&self) {
        let mut state = self.state();
        state.is_kicked = true;
        if let Some(driver) = state.driver.take() {
            driver.wake();
        }
    }

    /// Ready when the connection was asked to close and still may.
    pub(super) fn poll_kicked(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        // A request may have come meanwhile.
        if std::mem::take(&mut state.is_kicked) && state.idleness().is_some() {
            return Poll::Ready(());
        }
        if !state.driver.as_ref().is_some_and(|driver| driver.will_wake(context.waker())) {
            state.driver = Some(context.waker().clone());
        }
        Poll::Pending
    }

    /// When the wait is over that this connection is in.
    pub(super) fn deadline(&self, patience: &Patience) -> Option<Instant> {
        let state = self.state();
        let waits = match state.stage {
            Stage::Idle { since } if state.has_served => Some(since + patience.idle),
            Stage::Idle { since } | Stage::Head { since } | Stage::Handed { since, .. } => {
                Some(since + patience.header)
            }
            Stage::Body(_) | Stage::Done => state.next_probe,
            Stage::Over { .. } => None,
        };
        let stalls = state.stalled_since.map(|since| since + patience.send);
        waits.into_iter().chain(stalls).min()
    }

    /// What to do now that `deadline` may have passed.
    pub(super) fn due(&self, patience: &Patience, now: Instant) -> Due {
        if self.deadline(patience).is_none_or(|deadline| now < deadline) {
            return Due::Nothing;
        }
        let mut state = self.state();
        match state.stage {
            _ if state.stalled_since.is_some_and(|since| now >= since + patience.send) => Due::Close,
            Stage::Idle { .. } => Due::Close,
            Stage::Head { .. } | Stage::Handed { .. } => {
                state.refusal.get_or_insert(Refusal::HeadTimeout(patience.header));
                Due::Refuse
            }
            Stage::Body(_) | Stage::Done => Due::Probe,
            Stage::Over { .. } => Due::Nothing,
        }
    }

    /// Sends what tells a client that has closed its sending half from one that has gone. `Err` when it has gone.
    pub(super) fn probe(&self, now: Instant) -> io::Result<()> {
        let mut state = self.state();
        state.next_probe = Some(now + PROBE_INTERVAL);
        match state.answer {
            Answer::Awaited if state.is_http10 || state.is_unflushed => Ok(()),
            Answer::Awaited => match self.stream.try_write(PROBE) {
                Ok(sent) if sent == PROBE.len() => Ok(()),
                // Whose buffer has no room for a line, before an answer, reads nothing.
                Ok(_) => Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
                Err(error) => Err(error),
            },
            Answer::Begun { is_events: true } => {
                state.is_comment_due = true;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Reads ahead while a whole request is worked on. Ready when the client has gone.
    pub(super) fn poll_gone(self: &Arc<Self>, context: &mut Context<'_>, error: &mut Option<Hangup>) -> Poll<()> {
        let mut state = self.state();
        let is_working = !matches!(state.answer, Answer::None | Answer::Sent) && matches!(state.stage, Stage::Done);
        if !is_working {
            return Poll::Pending;
        }
        while !state.has_ended && state.ahead.len() < MAX_HEAD_BYTES {
            match self.poll_fill(&mut state, context, HEAD_READ_BYTES) {
                Poll::Ready(Ok(())) => (),
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
        if state.has_ended && state.next_probe.is_none() {
            state.next_probe = Some(Instant::now());
        }
        drop(state);
        error.get_or_insert_with(|| self.clone().hangup()).as_mut().poll(context)
    }

    /// Ready when the socket has an error.
    fn hangup(self: Arc<Self>) -> Hangup {
        Box::pin(async move {
            // An error of the wait is no better than one of the socket.
            let _ = self.stream.ready(Interest::ERROR).await;
        })
    }

    /// Something more in `ahead`, or the end.
    fn poll_fill(&self, state: &mut State, context: &mut Context<'_>, bytes: usize) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(context))?;
            // Not before there is something to put there.
            state.ahead.reserve(bytes);
            match self.read(&mut state.ahead) {
                Ok(0) => {
                    state.has_ended = true;
                    return Poll::Ready(Ok(()));
                }
                Ok(_) => return Poll::Ready(Ok(())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Reads into the room of `ahead`, once. What does not fill it is all that was there, so that the next wait is not for a
    /// read that finds nothing: the socket counts as not ready until the system says otherwise.
    fn read(&self, ahead: &mut BytesMut) -> io::Result<usize> {
        let room = ahead.capacity() - ahead.len();
        let mut taken = Err(io::ErrorKind::WouldBlock.into());
        // What comes between the read and the end of `try_io` is not forgotten: that forgets no later readiness than the one
        // that it began with.
        let _ = self.stream.try_io(Interest::READABLE, || {
            taken = self.stream.try_read_buf(ahead);
            let is_all = taken.as_ref().is_ok_and(|count| (1..room).contains(count));
            if is_all { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        taken
    }

    fn poll_give(&self, context: &mut Context<'_>, buffer: &mut ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let state = &mut *self.state();
        loop {
            match state.give(buffer.remaining()) {
                Given::Bytes(count) => {
                    buffer.put_slice(&state.ahead[..count]);
                    state.ahead.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Given::End => return Poll::Ready(Ok(())),
                Given::Nothing => {
                    state.reader = Some(context.waker().clone());
                    return Poll::Pending;
                }
                Given::Read => {
                    let bytes = if matches!(state.stage, Stage::Body(_)) { BODY_READ_BYTES } else { HEAD_READ_BYTES };
                    let before = state.ahead.len();
                    ready!(self.poll_fill(state, context, bytes))?;
                    state.arrived(before);
                }
            }
        }
    }

    fn poll_take(&self, context: &mut Context<'_>, parts: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let mut state = self.state();
        if state.refusal.is_some() || state.answer == Answer::None {
            // Nobody was asked, so hyper has refused a head by itself; our words follow.
            let status = parts.iter().find(|part| !part.is_empty()).map(|part| Refusal::of_status_line(part));
            state.refusal = state.refusal.take().or(status);
            return Poll::Ready(Ok(parts.iter().map(|part| part.len()).sum()));
        }
        state.is_unflushed = true;
        loop {
            if self.stream.poll_write_ready(context)?.is_pending() {
                state.stalled_since.get_or_insert_with(Instant::now);
                return Poll::Pending;
            }
            match self.stream.try_write_vectored(parts) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
                taken => {
                    state.stalled_since = None;
                    return Poll::Ready(taken);
                }
            }
        }
    }

    /// hyper has nothing left to send for now.
    fn flushed(&self) {
        let mut state = self.state();
        state.is_unflushed = false;
        state.stalled_since = None;
        if state.answer == Answer::Given {
            state.answer = Answer::Sent;
            state.await_next();
        }
    }
}

impl State {
    /// `None` while a request is worked on.
    fn idleness(&self) -> Option<Idleness> {
        match self.stage {
            Stage::Over { since } => Some(Idleness::Over(since)),
            _ if self.answer != Answer::None || self.refusal.is_some() => None,
            Stage::Idle { since } | Stage::Head { since } if !self.has_served => Some(Idleness::Silent(since)),
            Stage::Idle { since } | Stage::Head { since } => Some(Idleness::Idle(since)),
            _ => None,
        }
    }

    /// hyper may be given at most `room` bytes.
    fn give(&mut self, room: usize) -> Given {
        if self.refusal.is_some() {
            return Given::Nothing;
        }
        match &mut self.stage {
            Stage::Done => {
                self.await_next();
                if matches!(self.stage, Stage::Done) { Given::Nothing } else { self.give(room) }
            }
            Stage::Idle { .. } if !self.ahead.is_empty() => {
                // Bytes of the head were there before it was awaited.
                self.arrived(0);
                if matches!(self.stage, Stage::Handed { .. }) { self.give(room) } else { self.read_or_end() }
            }
            // What is left of a head whose rest will not come is nobody's.
            Stage::Idle { .. } | Stage::Head { .. } => self.read_or_end(),
            Stage::Over { .. } => Given::End,
            Stage::Handed { left: 0, .. } => {
                // Both have read the head with the same parser.
                self.refusal = Some(Refusal::Malformed("the request cannot be read"));
                Given::Nothing
            }
            Stage::Handed { left, .. } => {
                let count = room.min(*left);
                *left -= count;
                Given::Bytes(count)
            }
            Stage::Body(_) if self.ahead.is_empty() => self.read_or_end(),
            Stage::Body(framing) => {
                let count = self.ahead.len().min(room);
                match framing.take(&self.ahead[..count]) {
                    Ok(taken) => {
                        if framing.is_done() {
                            self.stage = Stage::Done;
                        }
                        Given::Bytes(taken)
                    }
                    Err(refusal) => {
                        self.refusal = Some(refusal);
                        Given::Nothing
                    }
                }
            }
        }
    }

    fn read_or_end(&self) -> Given {
        match self.refusal {
            Some(_) => Given::Nothing,
            None if self.has_ended => Given::End,
            None => Given::Read,
        }
    }

    /// Bytes have come behind the first `before`: looks for the head's end, if a head is awaited.
    fn arrived(&mut self, before: usize) {
        if let Stage::Idle { .. } = self.stage {
            // Empty lines before a head mean nothing (RFC 9112, 2.2).
            let skipped = self.ahead.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
            self.ahead.advance(skipped);
            if self.ahead.is_empty() {
                return;
            }
            self.stage = Stage::Head { since: Instant::now() };
        } else if !matches!(self.stage, Stage::Head { .. }) {
            return;
        } else if self.ahead.len() < MAX_HEAD_BYTES && !self.ahead[before..].contains(&b'\n') {
            // Reading the whole head again for each of its bytes would be work without a bound.
            return;
        }
        let Stage::Head { since } = self.stage else { return };
        match head_length(&self.ahead) {
            Ok(Some(left)) => self.stage = Stage::Handed { left, since },
            Ok(None) => (),
            Err(refusal) => self.refusal = Some(refusal),
        }
    }

    /// Waits for the next request, once this one is whole and its answer sent.
    fn await_next(&mut self) {
        if self.answer != Answer::Sent || !matches!(self.stage, Stage::Done) {
            return;
        }
        self.answer = Answer::None;
        self.stage = Stage::Idle { since: Instant::now() };
        self.next_probe = None;
        self.is_comment_due = false;
        if self.ahead.is_empty() {
            // An idle connection keeps no memory.
            self.ahead = BytesMut::new();
        }
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

/// Waits for a socket's error.
pub(super) type Hangup = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A wire as hyper wants it.
pub(super) struct WireIo(pub(super) Arc<Wire>);

impl Read for WireIo {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        self.0.poll_give(context, &mut buffer)
    }
}

impl Write for WireIo {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.poll_take(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.poll_take(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.flushed();
        Poll::Ready(Ok(()))
    }

    /// The connection's driver closes the socket, after what hyper has no part in.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
