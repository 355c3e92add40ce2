//! The way of one session's events from the device thread to whoever reads them.
//!
//! The device thread never waits for a reader, and a slow reader never makes a queue grow beyond a bound. Text and progress
//! that it has not taken yet are joined (text is appended, progress replaced), so that they take a handful of events (a picture
//! has three small previews at most, with progress between them) and at most the bytes of the answer itself: `max_tokens`
//! tokens, with as many logarithms as one answer may have. Of checkpoints there is the latest, behind all that came before it.
//! Frames are not joined, so that whoever takes them has those of one
//! step in its hands: where too many bytes of them wait, the mailbox is *full*, and the device thread leaves the session out of
//! its steps until there is room again.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::task::{Poll, Waker};

use tale_models::Event;
use tale_models::memory::MAX_UNREAD_FRAME_BYTES;

/// Shared by the device thread, which posts, and one reader.
#[derive(Debug)]
pub(super) struct Mailbox {
    state: Mutex<State>,
    /// Full with so many bytes of frames.
    max_frame_bytes: usize,
}

#[derive(Debug, Default)]
struct State {
    events: VecDeque<Event>,
    /// Of the frames among them.
    frame_bytes: usize,
    /// Since the device thread has heard of it.
    is_full: bool,
    closed: bool,
    /// Its reader has gone.
    is_abandoned: bool,
    reader: Option<Waker>,
}

impl State {
    fn add(&mut self, event: Event) {
        self.frame_bytes += frame_bytes(&event);
        if matches!(event, Event::Checkpoint(_)) {
            self.drop_checkpoint();
        }
        let rest = match self.events.back_mut() {
            Some(last) => join(last, event),
            None => Some(event),
        };
        self.events.extend(rest);
    }

    /// Drops the checkpoint that nobody has taken, of which there is one at most; events that it kept apart are joined.
    fn drop_checkpoint(&mut self) {
        let Some(at) = self.events.iter().position(|event| matches!(event, Event::Checkpoint(_))) else { return };
        self.events.remove(at);
        let next = if at > 0 { self.events.remove(at) } else { None };
        let rest = next.and_then(|next| join(&mut self.events[at - 1], next));
        rest.into_iter().for_each(|event| self.events.insert(at, event));
    }
}

impl Default for Mailbox {
    fn default() -> Self {
        Self::of_frame_bytes(MAX_UNREAD_FRAME_BYTES)
    }
}

impl Mailbox {
    /// Full with so many bytes of frames.
    pub(super) fn of_frame_bytes(max_frame_bytes: usize) -> Self {
        Self { state: Mutex::default(), max_frame_bytes }
    }

    /// Adds an event of which the reader hears with [`Mailbox::wake`]: one that is awake before that takes it.
    pub(super) fn put(&self, event: Event) {
        self.lock().add(event);
    }

    /// As [`Mailbox::put`]; nothing follows.
    pub(super) fn put_last(&self, event: Event) {
        let mut state = self.lock();
        state.add(event);
        state.closed = true;
    }

    /// Tells the reader that there is something.
    pub(super) fn wake(&self) {
        wake(self.lock());
    }

    /// Whether it has become full since the last time that there was room: then [`Mailbox::has_room_again`] says once, to the
    /// reader, that there is.
    pub(super) fn becomes_full(&self) -> bool {
        let mut state = self.lock();
        let was_full = state.is_full;
        state.is_full |= state.frame_bytes >= self.max_frame_bytes;
        state.is_full && !was_full
    }

    /// Whether it was full and is so no longer; said once.
    pub(super) fn has_room_again(&self) -> bool {
        let mut state = self.lock();
        let has_room = state.frame_bytes < self.max_frame_bytes;
        has_room && std::mem::take(&mut state.is_full)
    }

    /// Nothing will follow: the reader gets what is left, then `None`.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        wake(state);
    }

    /// Its reader goes.
    pub(super) fn abandon(&self) {
        self.lock().is_abandoned = true;
    }

    /// Whether its reader has gone.
    pub(super) fn is_abandoned(&self) -> bool {
        self.lock().is_abandoned
    }

    /// The next event; `None` once the mailbox is closed and empty.
    pub(super) fn poll(&self, waker: &Waker) -> Poll<Option<Event>> {
        let mut state = self.lock();
        if let Some(event) = state.events.pop_front() {
            state.frame_bytes -= frame_bytes(&event);
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
        self.state.lock().expect("no code panics while it holds a mailbox: this is a bug")
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

/// Bytes of the frames of an event.
fn frame_bytes(event: &Event) -> usize {
    match event {
        Event::Frames(frames) => frames.iter().map(|frame| frame.rgb.len()).sum(),
        _ => 0,
    }
}

/// Joins `event` to the one before it, or gives it back.
fn join(last: &mut Event, event: Event) -> Option<Event> {
    match (last, event) {
        (Event::Text { tokens, text, logprobs }, Event::Text { tokens: more_tokens, text: more, logprobs: told }) => {
            tokens.extend(more_tokens);
            text.push_str(&more);
            logprobs.extend(told);
            None
        }
        (Event::Progress { phase, done, total }, Event::Progress { phase: next, done: d, total: t })
            if *phase == next =>
        {
            (*done, *total) = (d, t);
            None
        }
        (_, event) => Some(event),
    }
}

#[cfg(test)]
impl Mailbox {
    /// Bytes of frames that nobody has taken, and whether the device thread has heard that they are too many.
    pub(super) fn frames(&self) -> (usize, bool) {
        let state = self.lock();
        (state.frame_bytes, state.is_full)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::task::Wake;

    use super::*;
    use tale_models::request::{FinishReason, Frame, Phase, PlacedLogprobs, TokenLogprobs, Usage};
    use tale_models::testing::checkpoint_of;

    fn text(token: u32) -> Event {
        let logprobs = TokenLogprobs { token, logprob: -0.5, top: Box::default() };
        let logprobs = vec![PlacedLogprobs { offset: token as usize, logprobs }];
        Event::Text { tokens: vec![token], text: "x".into(), logprobs }
    }

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
        mailbox.put(Event::Started);
        for token in 0..1000 {
            mailbox.put(text(token));
        }
        for done in 1..=50 {
            mailbox.put(Event::Progress { phase: Phase::Denoise, done, total: 50 });
        }
        mailbox.put(Event::Finished { reason: FinishReason::Stop, usage: Usage::default() });
        let taken = take(&mailbox);
        assert_eq!(taken.len(), 4);
        assert!(taken[1].contains("999") && taken[1].contains(&"x".repeat(1000)));
        assert_eq!(taken[1].matches("logprob: -0.5").count(), 1000);
        assert!(taken[2].contains("done: 50"));
    }

    fn frames(count: usize) -> Event {
        let frame = Frame { width: 2, height: 1, rgb: vec![0; 6] };
        Event::Frames(vec![frame; count])
    }

    #[test]
    fn frames_fill_a_mailbox_until_the_reader_takes_them() {
        let mailbox = Mailbox::of_frame_bytes(12);
        let progress = |done| Event::Progress { phase: Phase::VaeDecode, done, total: 3 };
        mailbox.put(frames(1));
        assert!(!mailbox.becomes_full() && !mailbox.has_room_again());
        mailbox.put(progress(1));
        mailbox.put(frames(3));
        assert!(mailbox.becomes_full(), "24 of 12 bytes");
        mailbox.put(progress(2));
        assert!(!mailbox.becomes_full(), "as it was before");
        // The frames of each step are an event of their own.
        for (has_room, takes) in [(false, "Frames"), (false, "Progress"), (true, "Frames"), (false, "Progress")] {
            let Poll::Ready(Some(event)) = mailbox.poll(Waker::noop()) else { panic!("four events wait") };
            assert!(format!("{event:?}").starts_with(takes), "{event:?}");
            assert_eq!(mailbox.has_room_again(), has_room, "after {takes}");
        }
        mailbox.put(frames(2));
        assert!(mailbox.becomes_full(), "once more");
    }

    /// As the job that keeps them relies on: what was told before a checkpoint is taken before it.
    #[test]
    fn the_latest_checkpoint_takes_the_place_of_the_one_before_behind_what_was_told() {
        let mailbox = Mailbox::default();
        let progress = |done| Event::Progress { phase: Phase::Denoise, done, total: 50 };
        let checkpoint = |frames| Event::Checkpoint(Arc::new(checkpoint_of(frames)));
        for done in 1..=50 {
            mailbox.put(progress(done));
            mailbox.put(checkpoint(0));
        }
        mailbox.put(frames(1));
        mailbox.put(checkpoint(1));
        mailbox.put(frames(2));
        let taken = take(&mailbox);
        assert_eq!(taken.len(), 4, "{taken:?}");
        assert!(taken[0].contains("done: 50") && taken[1].starts_with("Frames"), "{taken:?}");
        assert!(taken[2].contains("1 frames done") && taken[3].starts_with("Frames"), "{taken:?}");
        mailbox.put(checkpoint(3));
        mailbox.put(checkpoint(4));
        assert!(matches!(&take(&mailbox)[..], [only] if only.contains("4 frames done")));
    }

    #[test]
    fn text_never_fills_a_mailbox() {
        let mailbox = Mailbox::of_frame_bytes(1);
        (0..100).for_each(|token| mailbox.put(text(token)));
        assert!(!mailbox.becomes_full());
    }

    #[test]
    fn a_reader_hears_of_what_is_put_when_it_is_woken() {
        struct Told(AtomicUsize);
        impl Wake for Told {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Relaxed);
            }
        }
        let told = Arc::new(Told(AtomicUsize::new(0)));
        for end in [Mailbox::wake, Mailbox::close] {
            let mailbox = Mailbox::default();
            told.0.store(0, Relaxed);
            assert!(mailbox.poll(&Waker::from(told.clone())).is_pending());
            mailbox.put(text(1));
            mailbox.put_last(Event::Started);
            assert_eq!(told.0.load(Relaxed), 0);
            end(&mailbox);
            assert_eq!(told.0.load(Relaxed), 1);
            assert!(take(&mailbox)[0].contains("Text"));
            assert!(matches!(mailbox.poll(Waker::noop()), Poll::Ready(None)));
        }
    }

    #[test]
    fn closing_keeps_what_is_left_and_ends_the_stream() {
        let mailbox = Mailbox::default();
        assert!(mailbox.poll(Waker::noop()).is_pending());
        mailbox.put(Event::Started);
        mailbox.close();
        assert!(matches!(mailbox.poll(Waker::noop()), Poll::Ready(Some(Event::Started))));
        assert!(matches!(mailbox.poll(Waker::noop()), Poll::Ready(None)));
    }
}
