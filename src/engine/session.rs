//! One running generation, as whoever ordered it sees it.
//!
//! Owns: reading its events, and telling the devices when its reader goes. Does not know: what the events say.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use tale_models::{Event, SessionId};

use super::command::Command;
use super::mailbox::Mailbox;

/// One running generation. Dropping it before its end cancels the device work within one step.
#[derive(Debug)]
pub struct Session {
    pub(super) id: SessionId,
    pub(super) mailbox: Arc<Mailbox>,
    /// Of all devices that may have it: before its first step it may go from one to another.
    pub(super) commands: Arc<[Arc<Sender<Command>>]>,
    pub(super) ended: bool,
}

impl Session {
    /// Its id, unique in this process.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// The next event. Events that were not taken in time come joined: text appended, progress replaced by the latest. While
    /// too many frames wait to be taken ([`tale_models::memory::MAX_UNREAD_FRAME_BYTES`]) the session has no steps. `None` after
    /// the terminal event, or without one when the engine was shut down.
    pub async fn recv(&mut self) -> Option<Event> {
        std::future::poll_fn(|context| self.poll_recv(context)).await
    }

    /// As [`Session::recv`], for streams written by hand.
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let polled = self.mailbox.poll(context.waker());
        if let Poll::Ready(event) = &polled {
            self.ended |= event.as_ref().is_none_or(Event::is_terminal);
            if matches!(event, Some(Event::Frames(_))) && self.mailbox.has_room_again() {
                self.tell(|| Command::Unpause(self.id));
            }
        }
        polled
    }

    /// Has the session say between its next two steps what it needs to go on elsewhere, whether it does so by itself or not:
    /// an [`Event::Checkpoint`], or nothing where it has not come so far.
    pub fn checkpoint_now(&self) {
        self.tell(|| Command::Checkpoint(self.id));
    }

    /// Those that do not have it do nothing. An error means that a device's thread, and the work with it, has ended.
    fn tell(&self, command: impl Fn() -> Command) {
        self.commands.iter().for_each(|commands| drop(commands.send(command())));
    }

    /// As [`Session::recv`], on a thread that may block.
    pub fn blocking_recv(&mut self) -> Option<Event> {
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        loop {
            match self.poll_recv(&mut Context::from_waker(&waker)) {
                Poll::Ready(event) => return event,
                Poll::Pending => std::thread::park(),
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.ended {
            self.mailbox.abandon();
            self.tell(|| Command::Cancel(self.id));
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}
