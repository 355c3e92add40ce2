//! The device worker through virtual time, and the engine's handles over a real thread.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tale_models::checkpoint::STEP_BYTES;
use tale_models::diffusion::{Canvas, DiffusionRequest, Prompt, Sampling};
use tale_models::request::{Phase, TextRequest};
use tale_models::runner::{RunnerStatus, StepPlan};
use tale_models::solver::names::Scheduler;
use tale_models::testing::{FRAMES_PER_DECODE, Script, ScriptedRunner, clip_model, picture_model};
use tale_models::{ClientId, Error, Event, Request, Runner, SessionId};

use super::arbiter::is_text;
use super::command::Command;
use super::ledger::{Ledger, Owner};
use super::mailbox::Mailbox;
use super::worker::{Clock, DeviceWorker};
use super::{Engine, EngineError, EngineOptions, MayBegin};
use crate::places::{NoPlace, Places};
use tale_models::device::{DeviceMemory, DeviceSpec};

pub(super) fn text(max_tokens: usize) -> Request {
    Request::Text(TextRequest { ignore_eos: true, ..TextRequest::greedy(vec![1], max_tokens) })
}

pub(super) fn clip(num_inference_steps: usize) -> Request {
    let prompt = Prompt { text: "x".into(), max_sequence_length: 8 };
    let canvas = Canvas { width: 16, height: 16, num_frames: 5, fps: 8 };
    let scheduler = Scheduler::named("flow_euler").unwrap();
    Request::Diffusion(DiffusionRequest::new(prompt, canvas, Sampling::new(scheduler, num_inference_steps, 0)))
}

/// Frames of the clips of the simulation: more than a mailbox of it takes.
const CLIP_FRAMES: usize = 21;

pub(super) fn long_clip(num_inference_steps: usize) -> Request {
    let Request::Diffusion(mut request) = clip(num_inference_steps) else { unreachable!("a clip") };
    request.canvas.num_frames = CLIP_FRAMES;
    Request::Diffusion(request)
}

/// Time that only moves when a scripted step says so.
#[derive(Clone, Default)]
pub(super) struct VirtualClock(Arc<AtomicU64>);

impl VirtualClock {
    pub(super) fn advance(&self, time: Duration) {
        self.0.fetch_add(time.as_nanos() as u64, Relaxed);
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Relaxed))
    }
}

/// splitmix64: enough to drive a test, and the same everywhere.
#[derive(Clone)]
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % sides as u64) as usize
    }
}

/// Which sessions each runner has stepped, in order, since the log was last read.
type StepLog = Arc<Mutex<Vec<(usize, Vec<SessionId>)>>>;

/// A client of its own.
pub(super) const ALONE: ClientId = ClientId(0);
/// More than ever wait.
const MAX_QUEUED: usize = 10_000;
const CAPACITY: usize = 1000;
const MODEL_BYTES: usize = 100;
/// Bytes per session of each model: text needs none, two clips fit beside a picture or three clips alone.
const FOOTPRINTS: [usize; 3] = [0, 120, 300];

/// Bytes of one frame of a clip.
const FRAME_BYTES: usize = 16 * 16 * 3;
/// With so many bytes of frames a mailbox of the simulation is full: after two steps of whoever does not read.
const MAILBOX_BYTES: usize = 6 * FRAME_BYTES;

fn worker_of(
    runners: Vec<(String, Box<dyn Runner>)>,
    ledger: Ledger,
    max_queued: usize,
    clock: VirtualClock,
) -> DeviceWorker<VirtualClock> {
    let queues = runners.iter().map(|_| Places::new(max_queued)).collect();
    DeviceWorker::new(runners, queues, ledger, clock)
}

struct World {
    worker: DeviceWorker<VirtualClock>,
    log: StepLog,
    readers: BTreeMap<SessionId, Reader>,
    /// Said by readers, and not heard by the worker yet.
    unpaused: Vec<SessionId>,
    next_id: u64,
    turns_without_step: [usize; 3],
}

struct Reader {
    mailbox: Arc<Mailbox>,
    frames: usize,
    terminals: usize,
    /// It has read the end.
    is_over: bool,
    cancelled: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        let (clock, log) = (VirtualClock::default(), StepLog::default());
        let mut ledger = Ledger::new(CAPACITY);
        let runners = FOOTPRINTS.iter().enumerate().map(|(index, &footprint_bytes)| {
            ledger.reserve(Owner::Model(index), MODEL_BYTES).expect("fits");
            let (clock, log, mut dice) = (clock.clone(), log.clone(), Dice(seed + index as u64));
            let on_step = move |_, sessions: &[SessionId]| {
                clock.advance(Duration::from_millis(1 + dice.roll(20) as u64));
                log.lock().expect("no panic inside").push((index, sessions.to_vec()));
                match dice.roll(200) {
                    0 => Err(Error::NotFinite { phase: "script" }),
                    // As a panic, without the panic hook's noise.
                    1 => std::panic::resume_unwind(Box::new("script")),
                    _ => Ok(()),
                }
            };
            let script = Script { max_batch: 3, footprint_bytes, on_step: Box::new(on_step), ..Script::default() };
            (format!("model-{index}"), Box::new(ScriptedRunner::new(script)) as Box<dyn Runner>)
        });
        let runners = runners.collect();
        let worker = worker_of(runners, ledger, MAX_QUEUED, clock);
        let (readers, unpaused) = (BTreeMap::new(), Vec::new());
        Self { worker, log, readers, unpaused, next_id: 0, turns_without_step: [0; 3] }
    }

    fn arrive(&mut self, dice: &mut Dice) {
        let model = dice.roll(3);
        let request = if model == 0 { text(1 + dice.roll(12)) } else { long_clip(1 + dice.roll(6)) };
        self.next_id += 1;
        let id = SessionId(self.next_id);
        let mailbox = Arc::new(Mailbox::of_frame_bytes(MAILBOX_BYTES));
        let reader = Reader { mailbox, frames: 0, terminals: 0, is_over: false, cancelled: false };
        let client = ClientId(dice.roll(3) as u64);
        self.worker.order(id.0, client, model, request, reader.mailbox.clone()).expect("few wait");
        self.readers.insert(id, reader);
    }

    fn cancel_one(&mut self, dice: &mut Dice) {
        if self.next_id > 0 {
            // Often one that has ended already: that must change nothing.
            let id = SessionId(1 + dice.roll(self.next_id as usize) as u64);
            self.worker.handle(Command::Cancel(id));
            if let Some(reader) = self.readers.get_mut(&id) {
                reader.cancelled = true;
            }
        }
    }

    /// One turn of the worker, and everything that must hold after any turn. Each reader takes events as long as `reads`.
    fn turn(&mut self, reads: impl FnMut() -> bool) -> bool {
        self.unpaused.drain(..).for_each(|id| self.worker.handle(Command::Unpause(id)));
        let is_full = |(id, reader): (&SessionId, &Reader)| reader.mailbox.frames().1.then_some(*id);
        let paused: BTreeSet<SessionId> = self.readers.iter().filter_map(is_full).collect();
        let worked = self.worker.turn();
        assert!(self.worker.ledger().used_bytes() <= CAPACITY);
        let steps = std::mem::take(&mut *self.log.lock().expect("no panic inside"));
        for (_, sessions) in &steps {
            for id in sessions {
                assert!(!self.readers[id].cancelled, "{id:?} stepped after it was cancelled");
                assert!(!paused.contains(id), "{id:?} stepped while nobody took its frames");
            }
        }
        for reader in self.readers.values() {
            let (bytes, _) = reader.mailbox.frames();
            assert!(bytes < MAILBOX_BYTES + FRAMES_PER_DECODE * FRAME_BYTES, "{bytes} bytes wait");
        }
        self.check_waits(&steps);
        self.read(reads);
        worked
    }

    fn check_waits(&mut self, steps: &[(usize, Vec<SessionId>)]) {
        for runner in 0..3 {
            let stepped = steps.iter().any(|(r, _)| *r == runner);
            let has_work = self.worker.has_work(runner);
            self.turns_without_step[runner] =
                if stepped || !has_work { 0 } else { self.turns_without_step[runner] + 1 };
            // Costs are 1 to 20 ms: two others may each catch up on one step of 20 ms in steps of 1 ms, text in between.
            assert!(self.turns_without_step[runner] < 200, "runner {runner} starves");
        }
    }

    fn read(&mut self, mut reads: impl FnMut() -> bool) {
        for (id, reader) in &mut self.readers {
            while reads() && !reader.is_over {
                match reader.mailbox.poll(Waker::noop()) {
                    Poll::Pending => break,
                    Poll::Ready(Some(event)) => {
                        assert_eq!(reader.terminals, 0, "{event:?} follows a terminal event");
                        reader.terminals += usize::from(event.is_terminal());
                        reader.frames += if let Event::Frames(frames) = &event { frames.len() } else { 0 };
                        let is_whole =
                            !matches!(event, Event::Finished { .. }) || [0, CLIP_FRAMES].contains(&reader.frames);
                        assert!(is_whole, "{id:?} finished with {} frames", reader.frames);
                    }
                    Poll::Ready(None) => {
                        assert!(reader.cancelled || reader.terminals == 1, "{id:?} ended without an end");
                        reader.is_over = true;
                    }
                }
                if reader.mailbox.has_room_again() {
                    self.unpaused.push(*id);
                }
            }
        }
        self.readers.retain(|_, reader| !reader.is_over);
    }

    fn check_empty(&self) {
        assert!(self.readers.is_empty(), "sessions without an end: {:?}", self.readers.keys().collect::<BTreeSet<_>>());
        assert_eq!(self.worker.ledger().used_bytes(), 3 * MODEL_BYTES);
        for gauges in self.worker.model_gauges() {
            let found = (gauges.queue.taken(), gauges.live(), gauges.runner());
            assert_eq!(found, (0, 0, RunnerStatus::default()));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    /// 8 cases of 20 000 turns: arrivals, cancels, failures, panics and ends in any order.
    #[test]
    fn every_session_ends_once_and_leaves_nothing(seed in any::<u32>(), arrivals in 20usize..60) {
        let (mut world, mut dice) = (World::new(u64::from(seed)), Dice(u64::from(seed)));
        for _ in 0..20_000 {
            if dice.roll(100) < arrivals && world.readers.len() < 64 {
                world.arrive(&mut dice);
            }
            if dice.roll(100) < 5 {
                world.cancel_one(&mut dice);
            }
            // Some read at once and others let it lie.
            world.turn(|| dice.roll(4) > 0);
        }
        while world.turn(|| true) || !world.readers.is_empty() {}
        world.check_empty();
    }
}

#[test]
fn a_session_that_can_never_fit_fails_at_once() {
    let (clock, ledger) = (VirtualClock::default(), Ledger::new(100));
    let runner = ScriptedRunner::new(Script { footprint_bytes: 101, ..Script::default() });
    let mut worker = worker_of(vec![("clips".into(), Box::new(runner) as Box<dyn Runner>)], ledger, 1, clock);
    let mailbox = Arc::new(Mailbox::default());
    worker.order(1, ALONE, 0, clip(1), mailbox.clone()).expect("nobody waits");
    let Poll::Ready(Some(Event::Failed(error))) = mailbox.poll(Waker::noop()) else { panic!("no failure") };
    assert_eq!(error.to_string(), "not enough memory: 101 bytes needed in phase denoise, 100 free");
    let Error::OutOfMemory { needed_bytes: 101, free_bytes: 100, .. } = error else { panic!("{error:?}") };
    assert!(!worker.turn());
}

#[test]
fn a_large_session_is_overtaken_but_not_for_ever() {
    let (clock, log) = (VirtualClock::default(), StepLog::default());
    let runner = |index: usize, footprint_bytes| {
        let (clock, log) = (clock.clone(), log.clone());
        let on_step = move |_, sessions: &[SessionId]| {
            clock.advance(Duration::from_millis(1));
            log.lock().expect("no panic inside").push((index, sessions.to_vec()));
            Ok(())
        };
        let script = Script { max_batch: 4, footprint_bytes, on_step: Box::new(on_step), ..Script::default() };
        (format!("model-{index}"), Box::new(ScriptedRunner::new(script)) as Box<dyn Runner>)
    };
    let mut worker = worker_of(vec![runner(0, 60), runner(1, 100)], Ledger::new(120), MAX_QUEUED, clock.clone());
    let submit = |worker: &mut DeviceWorker<_>, id: u64, model| {
        worker.order(id, ALONE, model, clip(1), Arc::default()).expect("few wait");
    };
    submit(&mut worker, 1, 0);
    submit(&mut worker, 2, 1);
    // A stream of small sessions that would hold half of the memory for ever.
    for id in 3..1000 {
        submit(&mut worker, id, 0);
    }
    while worker.turn() {}
    let steps = log.lock().expect("no panic inside");
    let first_large = steps.iter().position(|(runner, _)| *runner == 1).expect("the large one ran");
    let before: BTreeSet<_> = steps[..first_large].iter().flat_map(|(_, sessions)| sessions).collect();
    assert!(before.len() <= 70, "{} sessions overtook it", before.len());
}

/// A worker over one model of clips.
pub(super) fn clips(script: Script, capacity: usize) -> DeviceWorker<VirtualClock> {
    let runners = vec![("clips".to_owned(), Box::new(ScriptedRunner::new(script)) as Box<dyn Runner>)];
    worker_of(runners, Ledger::new(capacity), MAX_QUEUED, VirtualClock::default())
}

/// Waking is work of the host: it has the time of the next step for it, where there is one.
#[test]
fn readers_hear_of_a_step_while_the_next_one_runs() {
    type Log = Arc<Mutex<Vec<&'static str>>>;
    struct Told(Log);
    impl std::task::Wake for Told {
        fn wake(self: Arc<Self>) {
            self.0.lock().expect("no panic inside").push("told");
        }
    }
    let two_steps = ["launched", "collected", "launched", "told", "collected"];
    for (max_tokens, expected) in [(1, &["launched", "collected", "told"][..]), (2, &two_steps)] {
        let log = Log::default();
        let (launches, steps) = (log.clone(), log.clone());
        let script = Script {
            on_launch: Box::new(move || launches.lock().expect("no panic inside").push("launched")),
            on_step: Box::new(move |_, _| {
                steps.lock().expect("no panic inside").push("collected");
                Ok(())
            }),
            ..Script::default()
        };
        let runners = vec![("text".to_owned(), Box::new(ScriptedRunner::new(script)) as Box<dyn Runner>)];
        let mut worker = worker_of(runners, Ledger::new(1), 1, VirtualClock::default());
        let (mailbox, waker) = (Arc::new(Mailbox::default()), Waker::from(Arc::new(Told(log.clone()))));
        worker.order(1, ALONE, 0, text(max_tokens), mailbox.clone()).expect("nobody waits");
        assert!(mailbox.poll(&waker).is_pending());
        while worker.turn() {}
        assert_eq!(*log.lock().expect("no panic inside"), expected);
    }
}

#[test]
fn clients_take_turns_in_front_of_a_model_whose_memory_is_short() {
    let begun = Arc::new(Mutex::new(Vec::<u64>::new()));
    let told = begun.clone();
    let on_step = move |_, sessions: &[SessionId]| {
        let mut begun = told.lock().expect("no panic inside");
        let new: Vec<u64> = sessions.iter().map(|id| id.0).filter(|id| !begun.contains(id)).collect();
        begun.extend(new);
        Ok(())
    };
    let mut worker = clips(Script { footprint_bytes: 100, on_step: Box::new(on_step), ..Script::default() }, 100);
    let orders = (1..=100).map(|id| (id, 7)).chain([(101, 8), (102, 8), (103, 9)]);
    for (id, client) in orders {
        worker.order(id, ClientId(client), 0, clip(1), Arc::default()).expect("few wait");
    }
    while worker.turn() {}
    let begun = begun.lock().expect("no panic inside");
    assert_eq!(begun[..7], [1, 101, 103, 2, 102, 3, 4]);
    assert_eq!(begun.len(), 103, "all are made");
}

#[test]
fn one_client_does_not_take_all_sessions_of_a_runner() {
    let mut worker = clips(Script { max_sessions: 4, ..Script::default() }, 100);
    let held = |worker: &DeviceWorker<VirtualClock>| {
        let RunnerStatus { running, waiting, .. } = worker.model_gauges()[0].runner();
        running + waiting
    };
    for id in 1..=100 {
        worker.order(id, ClientId(7), 0, clip(1000), Arc::default()).expect("few wait");
    }
    assert!(worker.turn());
    assert_eq!(held(&worker), 3);
    worker.order(101, ClientId(8), 0, clip(1000), Arc::default()).expect("few wait");
    assert!(worker.turn());
    assert_eq!(held(&worker), 4);
}

/// Encoders of 9.5 GB from a disk of 1 GB/s would be one step of ten seconds.
#[test]
fn a_token_stream_waits_for_one_bounded_step_while_encoders_are_read() {
    const ENCODER_BYTES: usize = 9_500_000_000;
    const BYTES_PER_SECOND: f64 = 1e9;
    let (clock, log) = (VirtualClock::default(), Arc::new(Mutex::new(Vec::<(Phase, Duration)>::new())));
    let runner = |name: &str, encoder_bytes: usize| {
        let (clock, log) = (clock.clone(), log.clone());
        let mut bytes_left = encoder_bytes;
        let on_step = move |plan: StepPlan, _: &[SessionId]| {
            let cost = match plan.phase {
                Phase::Load => {
                    let read = bytes_left.min(STEP_BYTES);
                    bytes_left -= read;
                    Duration::from_secs_f64(read as f64 / BYTES_PER_SECOND)
                }
                Phase::Prefill | Phase::Decode => Duration::from_millis(10),
                _ => Duration::from_millis(100),
            };
            clock.advance(cost);
            log.lock().expect("no panic inside").push((plan.phase, cost));
            Ok(())
        };
        let script = Script { encoder_bytes, on_step: Box::new(on_step), ..Script::default() };
        (name.to_owned(), Box::new(ScriptedRunner::new(script)) as Box<dyn Runner>)
    };
    let runners = vec![runner("text", 0), runner("clips", ENCODER_BYTES)];
    let mut worker = worker_of(runners, Ledger::new(1 << 40), 1, clock.clone());
    // The stream outlasts the clip.
    for (id, model, request) in [(1, 0, text(2000)), (2, 1, clip(4))] {
        worker.order(id, ALONE, model, request, Arc::default()).expect("nobody waits");
    }
    while worker.has_work(1) || log.lock().expect("no panic inside").is_empty() {
        assert!(worker.turn());
    }
    let steps = log.lock().expect("no panic inside").clone();
    let loads = steps.iter().filter(|(phase, _)| *phase == Phase::Load);
    assert_eq!(loads.clone().count(), ENCODER_BYTES.div_ceil(STEP_BYTES));
    let longest = Duration::from_secs_f64(STEP_BYTES as f64 / BYTES_PER_SECOND);
    assert!(loads.clone().all(|(_, cost)| *cost <= longest));
    // Between two text steps there is one other step at most, and it is bounded.
    for between in steps.split(|(phase, _)| is_text(*phase)) {
        assert!(between.len() <= 1, "{between:?}");
        assert!(between.iter().all(|(_, cost)| *cost <= longest), "{between:?}");
    }
    let told = steps.iter().map(|(phase, _)| *phase).collect::<BTreeSet<_>>();
    assert!(told.contains(&Phase::VaeDecode), "the clip was made: {told:?}");
}

/// What a step borrows is reserved while it is held, and where it is not there the sessions of that step end and no others.
#[test]
fn what_steps_borrow_is_in_the_books() {
    for (capacity, fits) in [(150, true), (149, false)] {
        let script = Script { footprint_bytes: 100, borrowed_bytes: 50, ..Script::default() };
        let runner = Box::new(ScriptedRunner::new(script)) as Box<dyn Runner>;
        let runners = vec![("clips".to_owned(), runner)];
        let mut worker = worker_of(runners, Ledger::new(capacity), 1, VirtualClock::default());
        let mailbox = Arc::new(Mailbox::default());
        worker.order(1, ALONE, 0, clip(2), mailbox.clone()).expect("nobody waits");
        let mut used = Vec::new();
        while worker.turn() {
            used.push(worker.ledger().used_bytes());
        }
        let events = std::iter::from_fn(|| match mailbox.poll(Waker::noop()) {
            Poll::Ready(event) => event,
            Poll::Pending => None,
        });
        let last = events.last();
        match fits {
            true => {
                // Encoding, two denoising steps, two chunks: the first denoising step finds it reserved after its turn.
                assert_eq!(used, [100, 150, 100, 100, 0]);
                assert!(matches!(last, Some(Event::Finished { .. })), "{last:?}");
            }
            false => {
                assert_eq!(used, [100, 0]);
                let Some(Event::Failed(error)) = last else { panic!("{last:?}") };
                assert_eq!(error.to_string(), "not enough memory: 50 bytes needed in phase denoise, 49 free");
            }
        }
        assert_eq!(worker.ledger().used_bytes(), 0);
    }
}

/// Of two clips of one model the first is not read: it waits with as many frames as its mailbox takes, the other one and a token
/// stream that nobody reads end, and what became of the first goes on, or goes, when its reader does.
#[test]
fn a_session_whose_frames_nobody_takes_waits_alone() {
    for goes_on in [true, false] {
        let steps = Arc::new(Mutex::new(Vec::<SessionId>::new()));
        let runner = |footprint_bytes| {
            let steps = steps.clone();
            let on_step = move |_, sessions: &[SessionId]| {
                steps.lock().expect("no panic inside").extend(sessions);
                Ok(())
            };
            let script = Script { footprint_bytes, on_step: Box::new(on_step), ..Script::default() };
            Box::new(ScriptedRunner::new(script)) as Box<dyn Runner>
        };
        let runners = vec![("clips".to_owned(), runner(100)), ("text".to_owned(), runner(0))];
        let mut worker = worker_of(runners, Ledger::new(200), MAX_QUEUED, VirtualClock::default());
        let mailboxes: Vec<_> = (0..3).map(|_| Arc::new(Mailbox::of_frame_bytes(MAILBOX_BYTES))).collect();
        let orders = [(0, long_clip(2)), (0, long_clip(2)), (1, text(2000))];
        for ((id, (model, request)), mailbox) in (1..).zip(orders).zip(&mailboxes) {
            worker.order(id, ALONE, model, request, mailbox.clone()).expect("few wait");
        }
        let mut frames = [0; 3];
        let mut read = |worker: &mut DeviceWorker<_>, number: usize| -> bool {
            let mailbox = &mailboxes[number];
            while let Poll::Ready(event) = mailbox.poll(Waker::noop()) {
                let Some(event) = event else { return true };
                frames[number] += if let Event::Frames(frames) = &event { frames.len() } else { 0 };
                if mailbox.has_room_again() {
                    worker.handle(Command::Unpause(SessionId(1 + number as u64)));
                }
            }
            false
        };
        while worker.turn() {
            read(&mut worker, 1);
        }
        let taken = steps.lock().expect("no panic inside").clone();
        let steps_of = |id: u64| taken.iter().filter(|of| of.0 == id).count();
        // Encoding, two denoising steps, and two or six chunks.
        assert_eq!([1, 2, 3].map(steps_of), [5, 9, 2000]);
        assert_eq!(mailboxes[0].frames(), (2 * FRAMES_PER_DECODE * FRAME_BYTES, true));
        assert_eq!(worker.ledger().used_bytes(), 100, "it keeps what it holds");
        assert!(!worker.turn() && read(&mut worker, 2), "the text is whole");
        match goes_on {
            true => {
                while !read(&mut worker, 0) {
                    assert!(worker.turn());
                }
                assert_eq!(frames, [CLIP_FRAMES, CLIP_FRAMES, 0]);
            }
            false => {
                worker.handle(Command::Cancel(SessionId(1)));
                // What its reader had said before that is heard after it.
                worker.handle(Command::Unpause(SessionId(1)));
                assert!(!worker.turn());
            }
        }
        assert_eq!(worker.ledger().used_bytes(), 0);
        assert_eq!(worker.model_gauges()[0].runner(), RunnerStatus::default());
    }
}

pub(super) fn engine(script: Script, max_queued_sessions: usize) -> Engine {
    let options = EngineOptions { max_queued_sessions, memory_bytes: Some(1 << 20), ..EngineOptions::default() };
    Engine::start(vec![("clips".into(), clip_model(script))], options).expect("starts")
}

pub(super) fn slow(step: Duration) -> Script {
    let on_step = move |_, _: &[SessionId]| {
        std::thread::sleep(step);
        Ok(())
    };
    Script { max_batch: 1, on_step: Box::new(on_step), ..Script::default() }
}

#[test]
fn a_session_can_be_followed_to_its_end() {
    let engine = engine(Script::default(), 4);
    let mut session = engine.submit("clips", ALONE, clip(3)).expect("accepted");
    let mut frames = 0;
    let mut last = None;
    while let Some(event) = session.blocking_recv() {
        frames += if let Event::Frames(new) = &event { new.len() } else { 0 };
        last = Some(event);
    }
    assert_eq!(frames, 5);
    assert!(matches!(last, Some(Event::Finished { .. })), "{last:?}");
}

/// Frames of 12 MiB, four at a time: the first four fill the mailbox.
#[test]
fn frames_that_nobody_takes_stop_a_session_until_it_is_read_or_dropped() {
    let steps = Arc::new(AtomicU64::new(0));
    let counted = steps.clone();
    let on_step = move |_, _: &[SessionId]| {
        counted.fetch_add(1, Relaxed);
        Ok(())
    };
    let engine = engine(Script { on_step: Box::new(on_step), ..Script::default() }, 4);
    let Request::Diffusion(mut request) = clip(1) else { unreachable!("a clip") };
    request.canvas = Canvas { width: 2048, height: 2048, num_frames: 13, fps: 8 };
    for is_read in [true, false] {
        steps.store(0, Relaxed);
        let mut session = engine.submit("clips", ALONE, Request::Diffusion(request.clone())).expect("accepted");
        let begun = Instant::now();
        while steps.load(Relaxed) < 3 {
            assert!(begun.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(steps.load(Relaxed), 3, "encoding, denoising, one chunk");
        if is_read {
            let mut frames = 0;
            while let Some(event) = session.blocking_recv() {
                frames += if let Event::Frames(new) = &event { new.len() } else { 0 };
            }
            assert_eq!((frames, steps.load(Relaxed)), (13, 6));
        }
        drop(session);
        while engine.status().models[0].live > 0 || engine.status().models[0].runner != RunnerStatus::default() {
            assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", engine.status());
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_session_whose_turn_finds_that_it_may_not_begin_ends_without_a_step() {
    let steps = Arc::new(AtomicU64::new(0));
    let counted = steps.clone();
    let on_step = move |_, _: &[SessionId]| {
        counted.fetch_add(1, Relaxed);
        Ok(())
    };
    let engine = engine(Script { on_step: Box::new(on_step), ..Script::default() }, 4);
    for (agrees, ends) in [(false, 0), (true, 1)] {
        let may_begin = Some(MayBegin::when(move || agrees));
        let mut session = engine.submit_if("clips", ALONE, clip(1), may_begin).expect("accepted");
        let events: Vec<_> = std::iter::from_fn(|| session.blocking_recv()).collect();
        assert_eq!(events.iter().filter(|event| event.is_terminal()).count(), ends, "{events:?}");
        assert_eq!(steps.load(Relaxed) > 0, agrees);
    }
    assert_eq!(engine.status().models[0].live, 0);
}

#[test]
fn dropping_a_session_stops_the_work_within_one_step() {
    let engine = engine(slow(Duration::from_millis(5)), 4);
    let mut session = engine.submit("clips", ALONE, clip(1000)).expect("accepted");
    assert!(matches!(session.blocking_recv(), Some(Event::Started)));
    drop(session);
    let dropped = Instant::now();
    while engine.status().models[0].live > 0 || engine.status().models[0].runner != RunnerStatus::default() {
        assert!(dropped.elapsed() < Duration::from_millis(500), "{:?}", engine.status());
        std::thread::yield_now();
    }
}

#[test]
fn a_full_queue_is_busy_and_names_its_bound() {
    let engine = engine(slow(Duration::from_millis(2)), 2);
    let mut first = engine.submit("clips", ALONE, clip(1000)).expect("accepted");
    assert!(matches!(first.blocking_recv(), Some(Event::Started)));
    let waiting = [engine.submit("clips", ALONE, clip(1)), engine.submit("clips", ALONE, clip(1))];
    assert!(waiting.iter().all(Result::is_ok));
    let error = engine.submit("clips", ALONE, clip(1)).expect_err("full");
    assert!(matches!(error, EngineError::Busy { reason: NoPlace::Full { limit: 2 }, .. }), "{error}");
    drop(waiting);
    let freed = Instant::now();
    while engine.submit("clips", ALONE, clip(1)).is_err() {
        assert!(freed.elapsed() < Duration::from_secs(2));
        std::thread::yield_now();
    }
}

#[test]
fn shutdown_lets_work_finish_and_cancels_what_is_late() {
    let patient = engine(slow(Duration::from_millis(1)), 4);
    let mut session = patient.submit("clips", ALONE, clip(3)).expect("accepted");
    patient.shutdown(Duration::from_secs(20));
    let events: Vec<_> = std::iter::from_fn(|| session.blocking_recv()).collect();
    assert!(matches!(events.last(), Some(Event::Finished { .. })), "{events:?}");
    assert!(matches!(patient.submit("clips", ALONE, clip(1)), Err(EngineError::Draining)));

    let hasty = engine(slow(Duration::from_millis(1)), 4);
    let mut session = hasty.submit("clips", ALONE, clip(100_000)).expect("accepted");
    hasty.shutdown(Duration::from_millis(20));
    let events: Vec<_> = std::iter::from_fn(|| session.blocking_recv()).collect();
    assert!(!events.iter().any(Event::is_terminal), "cut off, so without an end: {events:?}");
}

#[test]
fn models_that_do_not_fit_or_share_a_name_are_refused() {
    let mut large = picture_model(Script::default());
    large.resident_bytes = 101;
    let options = || EngineOptions { memory_bytes: Some(100), ..EngineOptions::default() };
    let error = Engine::start(vec![("big".into(), large)], options()).expect_err("too large");
    assert_eq!(error.to_string(), "model `big`: not enough memory: 101 bytes needed, 100 free");
    let twins = vec![("a".into(), picture_model(Script::default())), ("a".into(), picture_model(Script::default()))];
    assert!(matches!(Engine::start(twins, options()), Err(EngineError::DuplicateModel { .. })));
}

#[test]
fn a_gpu_gives_what_is_free_less_a_reserve_or_what_is_configured() {
    let gpu = DeviceMemory { free_bytes: 20 << 30, total_bytes: 24 << 30 };
    let capacity = |memory_bytes, gpu| {
        let options = EngineOptions { devices: vec![DeviceSpec::Cuda(1)], memory_bytes, ..EngineOptions::default() };
        super::capacity_bytes(&options, DeviceSpec::Cuda(1), gpu).map_err(|error| error.to_string())
    };
    assert_eq!(capacity(None, Some(gpu)), Ok(gpu.usable_bytes()));
    assert!(gpu.usable_bytes() < gpu.free_bytes);
    assert_eq!(capacity(Some(20 << 30), Some(gpu)), Ok(20 << 30));
    let more = capacity(Some((20 << 30) + 1), Some(gpu));
    assert_eq!(more, Err("memory: 21474836481 bytes are configured, cuda:1 has 21474836480 free".to_owned()));
    // The CPU's memory may be configured freely.
    assert_eq!(capacity(Some(usize::MAX), None), Ok(usize::MAX));
    assert!(capacity(None, None).is_ok_and(|bytes| bytes > 0));
}
