//! The way of one session's events from the device thread to whoever reads them.
//!
//! The device thread never waits for a reader, and a slow reader never makes a queue grow: what it has not taken yet is
//! joined (text is appended, progress replaced, frames appended), so that a mailbox holds a handful of events (a picture has
//! three small previews at most, with progress between them) and at
//! most the bytes of the answer itself: `max_tokens` tokens or the frames of one clip. Joining also means that a reader
//! that comes late takes all that is ready at once.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::task::{Poll, Waker};

use tale_models::Event;

/// Shared by the device thread, which posts, and one reader.
#[derive(Debug, Default)]
pub(super) struct Mailbox(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    events: VecDeque<Event>,
    closed: bool,
    reader: Option<Waker>,
}

impl Mailbox {
    /// Adds an event and wakes the reader.
    pub(super) fn post(&self, event: Event) {
        wake(self.with(event));
    }

    /// Adds an event of which the reader hears with the next one, or with the end: one that is awake before that takes it.
    pub(super) fn put(&self, event: Event) {
        drop(self.with(event));
    }

    fn with(&self, event: Event) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        let rest = match state.events.back_mut() {
            Some(last) => join(last, event),
            None => Some(event),
        };
        state.events.extend(rest);
        state
    }

    /// Nothing will follow: the reader gets what is left, then `None`.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        wake(state);
    }

    /// The next event; `None` once the mailbox is closed and empty.
    pub(super) fn poll(&self, waker: &Waker) -> Poll<Option<Event>> {
        let mut state = self.lock();
        if let Some(event) = state.events.pop_front() {
            return Poll::Ready(Some(event));
        }
        if state.closed {
            return Poll::Ready(None);
        }
        match &mut state.reader {
            Some(reader) => reader.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
        Poll::Pending
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no code panics while it holds a mailbox: this is a bug")
    }
}

/// Wakes after the lock is gone, so that the reader does not run into it.
fn wake(mut state: MutexGuard<'_, State>) {
    let reader = state.reader.take();
    drop(state);
    if let Some(reader) = reader {
        reader.wake();
    }
}

/// Joins `event` to the one before it, or gives it back.
fn join(last: &mut Event, event: Event) -> Option<Event> {
    match (last, event) {
        (Event::Text { tokens, text }, Event::Text { tokens: more_tokens, text: more_text }) => {
            tokens.extend(more_tokens);
            text.push_str(&more_text);
            None
        }
        (Event::Progress { phase, done, total }, Event::Progress { phase: next, done: d, total: t })
            if *phase == next =>
        {
            (*done, *total) = (d, t);
            None
        }
        (Event::Frames(frames), Event::Frames(more)) => {
            frames.extend(more);
            None
        }
        (_, event) => Some(event),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::task::Wake;

    use super::*;
    use tale_models::request::{FinishReason, Phase, Usage};

    fn take(mailbox: &Mailbox) -> Vec<String> {
        let mut taken = Vec::new();
        while let Poll::Ready(Some(event)) = mailbox.poll(Waker::noop()) {
            taken.push(format!("{event:?}"));
        }
        taken
    }

    #[test]
    fn a_late_reader_gets_everything_in_a_handful_of_events() {
        let mailbox = Mailbox::default();
        mailbox.post(Event::Started);
        for token in 0..1000 {
            mailbox.post(Event::Text { tokens: vec![token], text: "x".into() });
        }
        for done in 1..=50 {
            mailbox.post(Event::Progress { phase: Phase::Denoise, done, total: 50 });
        }
        mailbox.post(Event::Finished { reason: FinishReason::Stop, usage: Usage::default() });
        let taken = take(&mailbox);
        assert_eq!(taken.len(), 4);
        assert!(taken[1].contains("999") && taken[1].contains(&"x".repeat(1000)));
        assert!(taken[2].contains("done: 50"));
    }

    #[test]
    fn what_is_put_is_told_with_what_follows() {
        struct Told(AtomicUsize);
        impl Wake for Told {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Relaxed);
            }
        }
        let told = Arc::new(Told(AtomicUsize::new(0)));
        for end in [|mailbox: &Mailbox| mailbox.post(Event::Started), Mailbox::close] {
            let mailbox = Mailbox::default();
            told.0.store(0, Relaxed);
            assert!(mailbox.poll(&Waker::from(told.clone())).is_pending());
            mailbox.put(Event::Text { tokens: vec![1], text: "x".into() });
            assert_eq!(told.0.load(Relaxed), 0);
            end(&mailbox);
            assert_eq!(told.0.load(Relaxed), 1);
            assert!(take(&mailbox)[0].contains("Text"));
        }
    }

    #[test]
    fn closing_keeps_what_is_left_and_ends_the_stream() {
        let mailbox = Mailbox::default();
        assert!(mailbox.poll(Waker::noop()).is_pending());
        mailbox.post(Event::Started);
        mailbox.close();
        assert!(matches!(mailbox.poll(Waker::noop()), Poll::Ready(Some(Event::Started))));
        assert!(matches!(mailbox.poll(Waker::noop()), Poll::Ready(None)));
    }
}
