//! Checkpoints on their way from a runner to whoever keeps them, and back.

use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use tale_models::request::Frame;
use tale_models::session_checkpoint::Refusal;
use tale_models::testing::{Script, checkpoint_of};
use tale_models::{Error, Event, Request, SessionCheckpoint, SessionId};

use super::command::Command;
use super::mailbox::Mailbox;
use super::tests::{ALONE, VirtualClock, clip, clips, engine, long_clip, slow, text};
use super::worker::DeviceWorker;
use super::{Engine, EngineError, SubmitOptions};

/// What the reader of one session has taken.
#[derive(Default)]
struct Taken {
    /// Of the session that it goes on from.
    frames_before: usize,
    frames: Vec<Frame>,
    checkpoint: Option<Arc<SessionCheckpoint>>,
    num_checkpoints: usize,
    end: Option<Event>,
}

impl Taken {
    fn take(&mut self, event: Event) {
        assert!(self.end.is_none(), "{event:?} follows the end");
        match event {
            Event::Frames(frames) => self.frames.extend(frames),
            Event::Checkpoint(checkpoint) => {
                let told = self.frames_before + self.frames.len();
                assert_eq!(checkpoint.frames_done(), told, "what it counts was told before");
                self.checkpoint = Some(checkpoint);
                self.num_checkpoints += 1;
            }
            event if event.is_terminal() => self.end = Some(event),
            _ => (),
        }
    }

    fn take_all(&mut self, mailbox: &Mailbox) {
        while let Poll::Ready(Some(event)) = mailbox.poll(Waker::noop()) {
            self.take(event);
        }
    }

    fn all_of(mailbox: &Mailbox) -> Self {
        let mut taken = Self::default();
        taken.take_all(mailbox);
        taken
    }

    fn is_handed_over(&self) -> bool {
        matches!(self.end, Some(Event::Failed(Error::HandedOver)))
    }
}

fn order(worker: &mut DeviceWorker<VirtualClock>, id: u64, request: Request, options: SubmitOptions) -> Arc<Mailbox> {
    let mailbox = Arc::new(Mailbox::default());
    worker.order_with(id, ALONE, 0, (request, options), mailbox.clone()).expect("there is a place");
    mailbox
}

fn kept() -> SubmitOptions {
    SubmitOptions { checkpoints: true, ..SubmitOptions::default() }
}

fn resumed(checkpoint: Option<Arc<SessionCheckpoint>>) -> SubmitOptions {
    SubmitOptions { resume: checkpoint, ..kept() }
}

/// Encoding, three steps and six chunks: handed over after each number of steps, to another worker.
#[test]
fn a_clip_that_is_handed_over_at_any_step_goes_on_with_the_frames_that_are_missing() {
    let mut whole = clips(Script::default(), 100);
    let mailbox = order(&mut whole, 1, long_clip(3), kept());
    let mut num_steps = 0;
    while whole.turn() {
        num_steps += 1;
    }
    let expected = Taken::all_of(&mailbox);
    assert!(matches!(expected.end, Some(Event::Finished { .. })));
    assert_eq!((num_steps, expected.frames.len()), (10, 21));

    for steps in 0..num_steps {
        for is_read_at_once in [true, false] {
            let mut first = clips(Script { footprint_bytes: 40, ..Script::default() }, 100);
            let mailbox = order(&mut first, 1, long_clip(3), kept());
            let mut taken = Taken::default();
            for _ in 0..steps {
                assert!(first.turn());
                if is_read_at_once {
                    taken.take_all(&mailbox);
                }
            }
            first.handle(Command::HandOver);
            taken.take_all(&mailbox);
            assert!(taken.is_handed_over(), "{:?}", taken.end);
            assert_eq!(taken.checkpoint.is_some(), steps > 0, "after {steps} steps");
            assert!(is_read_at_once || taken.num_checkpoints <= 1, "those that nobody takes are replaced");
            assert_eq!(first.ledger().used_bytes(), 0);
            assert!(!first.turn(), "nothing is left to do");

            let mut second = clips(Script::default(), 100);
            let mailbox = order(&mut second, 9, long_clip(3), resumed(taken.checkpoint));
            let mut left = 0;
            while second.turn() {
                left += 1;
            }
            let mut rest = Taken { frames_before: taken.frames.len(), ..Taken::default() };
            rest.take_all(&mailbox);
            assert!(matches!(rest.end, Some(Event::Finished { .. })), "{:?}", rest.end);
            assert_eq!(left, num_steps - steps, "nothing is done twice");
            let frames: Vec<Frame> = taken.frames.into_iter().chain(rest.frames).collect();
            assert!(frames == expected.frames, "after {steps} steps");
        }
    }
}

/// Checkpoints that take no time: one after each of them but the first, which encodes.
#[test]
fn checkpoints_come_where_they_are_wanted_or_asked_for() {
    let mut worker = clips(Script::default(), 100);
    let silent = order(&mut worker, 1, long_clip(3), SubmitOptions::default());
    let asked = order(&mut worker, 2, long_clip(3), SubmitOptions::default());
    let kept = order(&mut worker, 3, long_clip(3), kept());
    let mut of_asked = Taken::default();
    let mut of_kept = Taken::default();
    let mut steps = 0;
    while worker.turn() {
        steps += 1;
        if steps == 2 || steps == 7 {
            worker.handle(Command::Checkpoint(SessionId(2)));
        }
        of_asked.take_all(&asked);
        of_kept.take_all(&kept);
    }
    worker.handle(Command::Checkpoint(SessionId(2)));
    assert_eq!(Taken::all_of(&silent).num_checkpoints, 0);
    assert_eq!(of_asked.num_checkpoints, 2);
    // The last step ends it.
    assert_eq!((of_kept.num_checkpoints, steps), (8, 10));
}

#[test]
fn what_does_not_fit_ends_with_an_error_of_its_own_and_others_go_on() {
    let mut worker = clips(Script { weights: 1, ..Script::default() }, 100);
    let one = Arc::new(checkpoint_of(0));
    let refused = order(&mut worker, 1, clip(3), resumed(Some(one)));
    let other = order(&mut worker, 2, clip(3), kept());
    while worker.turn() {}
    let refused = Taken::all_of(&refused);
    assert!(matches!(refused.end, Some(Event::Failed(Error::NotResumable(Refusal::Weights)))), "{:?}", refused.end);
    assert!(matches!(Taken::all_of(&other).end, Some(Event::Finished { .. })));
}

/// A reader that lags holds its session up; that has a checkpoint all the same.
#[test]
fn a_paused_session_is_handed_over_with_the_frames_that_wait() {
    let mut worker = clips(Script::default(), 100);
    let mailbox = Arc::new(Mailbox::of_frame_bytes(1));
    worker.order_with(1, ALONE, 0, (long_clip(3), kept()), mailbox.clone()).expect("there is a place");
    while worker.turn() {}
    worker.handle(Command::HandOver);
    let taken = Taken::all_of(&mailbox);
    assert!(taken.is_handed_over());
    assert_eq!(taken.checkpoint.expect("it has begun").frames_done(), 4);
}

#[test]
fn an_engine_that_hands_over_ends_everything_and_begins_nothing() {
    let engine = engine(slow(Duration::from_millis(5)), 8);
    let follow = |engine: &Engine, options: SubmitOptions| {
        engine.submit_if("clips", ALONE, clip(100_000), options).expect("accepted")
    };
    let mut kept = follow(&engine, kept());
    let mut silent = follow(&engine, SubmitOptions::default());
    while !matches!(kept.blocking_recv(), Some(Event::Checkpoint(_))) {}
    silent.checkpoint_now();
    while !matches!(silent.blocking_recv(), Some(Event::Checkpoint(_))) {}
    engine.hand_over();
    let late = engine.submit_if("clips", ALONE, clip(1), None).expect_err("nothing begins");
    assert!(matches!(late, EngineError::Draining));
    let mut further = engine.submit_further("clips", ALONE, clip(1), None).expect("it has a place");
    let ended = |session: &mut super::Session| {
        let mut taken = Taken::default();
        while let Some(event) = session.blocking_recv() {
            taken.take(event);
        }
        assert!(taken.is_handed_over(), "{:?}", taken.end);
        taken.num_checkpoints
    };
    assert!(ended(&mut kept) > 0);
    assert_eq!((ended(&mut silent), ended(&mut further)), (0, 0));
    engine.shutdown(Duration::from_secs(20));
}

#[test]
fn text_is_handed_over_without_a_checkpoint() {
    let mut worker = clips(Script::default(), 100);
    let mailbox = order(&mut worker, 1, text(100), kept());
    assert!(worker.turn() && worker.turn());
    worker.handle(Command::Checkpoint(SessionId(1)));
    worker.handle(Command::HandOver);
    let taken = Taken::all_of(&mailbox);
    assert!(taken.is_handed_over() && taken.checkpoint.is_none());
}
