//! Several devices: through virtual time, each with its own clock, and over real threads.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tale_models::device::DeviceSpec;
use tale_models::kv::PrefixCache;
use tale_models::testing::{Script, ScriptedRunner, clip_model, text_model};
use tale_models::{ClientId, Error, Event, LoadedModel, Request, Runner, SessionId};

use super::command::{Command, Order};
use super::ledger::Ledger;
use super::mailbox::Mailbox;
use super::peers::Peer;
use super::replicas::{Replica, Replicas};
use super::tests::{ALONE, Dice, VirtualClock, clip, slow, text};
use super::worker::{Clock, DeviceWorker};
use super::{Engine, EngineError, EngineOptions, SubmitOptions};
use crate::places::Places;

const TEXT: usize = 0;
const CLIPS: usize = 1;
/// Two clips run at a time on a device.
const CAPACITY: usize = 100;
const CLIP_BYTES: usize = 40;

struct Device {
    worker: DeviceWorker<VirtualClock>,
    clock: VirtualClock,
    commands: Receiver<Command>,
    is_idle: bool,
    /// That it worked.
    seconds: f64,
}

struct Waiting {
    mailbox: Arc<Mailbox>,
    waker: Waker,
    client: ClientId,
    arrived: Duration,
    has_begun: bool,
}

impl Device {
    /// It has something to do from now on.
    fn wake(&mut self, now: Duration) {
        if std::mem::take(&mut self.is_idle) {
            self.clock.advance(now.saturating_sub(self.clock.now()));
        }
    }
}

struct Told {
    id: SessionId,
    told: Arc<Mutex<Vec<SessionId>>>,
}

impl std::task::Wake for Told {
    fn wake(self: Arc<Self>) {
        self.told.lock().expect("no panic inside").push(self.id);
    }
}

impl Waiting {
    /// Whether that was all.
    fn read(&mut self, now: Duration, longest_waits: &mut BTreeMap<ClientId, Duration>) -> bool {
        while let Poll::Ready(event) = self.mailbox.poll(&self.waker) {
            match event {
                Some(Event::Started) => {
                    self.has_begun = true;
                    let longest = longest_waits.entry(self.client).or_default();
                    *longest = (*longest).max(now.saturating_sub(self.arrived));
                }
                Some(_) => (),
                None => return true,
            }
        }
        false
    }
}

/// A text model and one of clips on each of several devices.
struct Fleet {
    devices: Vec<Device>,
    models: [Replicas; 2],
    sessions: BTreeMap<SessionId, Waiting>,
    /// Those that were told that there is something to read.
    told: Arc<Mutex<Vec<SessionId>>>,
    next_id: u64,
    /// The longest time from arrival to the first step, by client.
    longest_waits: BTreeMap<ClientId, Duration>,
}

impl Fleet {
    /// `slowness` of each device: how long its steps take.
    fn new(slowness: &[u64], seed: u64, fails: impl Fn(usize) -> bool + Send + Clone + 'static) -> Self {
        let queues = [Places::new(1 << 20), Places::new(1 << 20)];
        let (mut devices, mut senders) = (Vec::new(), Vec::new());
        for (index, slowness) in slowness.iter().copied().enumerate() {
            let clock = VirtualClock::default();
            let runner = |name: &str, footprint_bytes, max_batch| {
                let (clock, mut dice, fails) = (clock.clone(), Dice(seed + index as u64), fails.clone());
                let on_step = move |_, sessions: &[SessionId]| {
                    let spread = dice.roll(200) as u64;
                    clock.advance(Duration::from_micros(slowness * (900 + spread) * (1 + sessions.len() as u64)));
                    if fails(index) { Err(Error::Device("it fell off the bus".into())) } else { Ok(()) }
                };
                // A script knows no clients: no more sessions than run at a time, so that all turns are the worker's.
                let max_sessions = max_batch;
                let script = Script {
                    max_batch,
                    max_sessions,
                    footprint_bytes,
                    on_step: Box::new(on_step),
                    ..Script::default()
                };
                (name.to_owned(), Box::new(ScriptedRunner::new(script)) as Box<dyn Runner>)
            };
            let runners = vec![runner("text", 0, 8), runner("clips", CLIP_BYTES, 2)];
            let fails = fails.clone();
            let health = move || if fails(index) { Err(Error::Device("it fell off the bus".into())) } else { Ok(()) };
            let worker = DeviceWorker::new(runners, queues.to_vec(), Ledger::new(CAPACITY), clock.clone());
            let (sender, commands) = channel();
            senders.push(Arc::new(sender));
            let worker = worker.watching(Box::new(health));
            devices.push(Device { worker, clock, commands, is_idle: true, seconds: 0.0 });
        }
        let gauges: Vec<Vec<Arc<super::gauges::ModelGauges>>> =
            devices.iter().map(|device: &Device| device.worker.model_gauges()).collect();
        let devices = devices.into_iter().enumerate().map(|(index, device)| {
            let others = (0..slowness.len()).filter(|other| *other != index);
            let peers = |runner: usize| {
                others.clone().map(|of| Peer::new(&senders[of], gauges[of][runner].clone(), runner)).collect()
            };
            let worker = device.worker.beside(vec![peers(TEXT), peers(CLIPS)]);
            Device { worker, ..device }
        });
        let devices = devices.collect();
        let replicas = |runner: usize| {
            let replica = |(device, gauges): (usize, &Vec<Arc<super::gauges::ModelGauges>>)| {
                let gauges = gauges[runner].clone();
                Replica { device, gauges, runner }
            };
            let commands: Vec<Arc<Sender<Command>>> = senders.clone();
            Replicas::new(gauges.iter().enumerate().map(replica).collect(), commands.into())
        };
        let models = [replicas(TEXT), replicas(CLIPS)];
        let (sessions, longest_waits) = (BTreeMap::new(), BTreeMap::new());
        Self { devices, models, sessions, told: Arc::default(), next_id: 0, longest_waits }
    }

    fn arrive(&mut self, now: Duration, client: ClientId, model: usize, request: Request) {
        self.next_id += 1;
        let id = SessionId(self.next_id);
        let replicas = &self.models[model];
        let place = replicas.queue().take_further(client);
        let chosen = replicas.choose(client, &request, PrefixCache::PerClient).expect("a device is left");
        let mailbox = Arc::new(Mailbox::default());
        let order = Order {
            id,
            client,
            model,
            request,
            mailbox: mailbox.clone(),
            place,
            options: SubmitOptions::default(),
            predicted_seconds: chosen.seconds,
        };
        replicas.commands[chosen.index].send(Command::Submit(order)).expect("it hears");
        let device = replicas.on[chosen.index].device;
        let waker = Waker::from(Arc::new(Told { id, told: self.told.clone() }));
        let mut session = Waiting { mailbox, waker, client, arrived: now, has_begun: false };
        assert!(!session.read(now, &mut self.longest_waits), "it has not begun");
        self.sessions.insert(id, session);
        self.devices[device].wake(now);
    }

    /// Lets the device whose clock is behind the others' work until all have come to `until`, or have nothing to do.
    fn run(&mut self, until: Duration) {
        loop {
            let ready = self.devices.iter().enumerate().filter(|(_, device)| !device.is_idle);
            let Some((index, before)) = ready.map(|(index, device)| (index, device.clock.now())).min_by_key(|of| of.1)
            else {
                return;
            };
            if before >= until {
                return;
            }
            let device = &mut self.devices[index];
            device.is_idle = !device.worker.work(&device.commands);
            let now = device.clock.now();
            device.seconds += (now - before).as_secs_f64();
            self.check_work_is_shared(index);
            // Those that were given something.
            self.devices
                .iter_mut()
                .filter(|device| !device.worker.gauges().is_idle())
                .for_each(|device| device.wake(now));
            self.read(now);
        }
    }

    /// After a step of a device nothing waits there while another one, that could do it, has nothing to do.
    fn check_work_is_shared(&self, index: usize) {
        let gauges = |other: usize| self.devices[other].worker.gauges();
        let is_free = |other: usize| other != index && gauges(other).is_alive() && gauges(other).is_idle();
        if gauges(index).is_alive() && (0..self.devices.len()).any(is_free) {
            for runner in [TEXT, CLIPS] {
                assert!(!self.devices[index].worker.has_waiting(runner), "model {runner} waits on device {index}");
            }
        }
    }

    /// Takes what there is of sessions that were told of it.
    fn read(&mut self, now: Duration) {
        for id in std::mem::take(&mut *self.told.lock().expect("no panic inside")) {
            let is_over = self.sessions.get_mut(&id).is_some_and(|session| session.read(now, &mut self.longest_waits));
            if is_over {
                self.sessions.remove(&id);
            }
        }
    }

    fn check_empty(&self) {
        assert!(self.sessions.is_empty(), "{:?} have no end", self.sessions.keys());
        for device in &self.devices {
            let gauges = device.worker.gauges();
            assert_eq!(device.worker.ledger().used_bytes(), 0);
            assert!(device.worker.model_gauges().iter().all(|model| model.live() == 0 && model.queue.taken() == 0));
            // What is left is the rounding of many sums.
            assert!(gauges.backlog_seconds() < 1e-3, "{}", gauges.backlog_seconds());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5))]

    /// 5 cases of 20,000 arrivals. One client asks for forty times as much as four others together. What these ask for is
    /// less than their shares of the devices, whatever the devices are: so they wait for little but what runs.
    #[test]
    fn no_device_idles_while_work_waits_and_nobody_starves(seed in any::<u64>(), num_devices in 2..5usize) {
        let mut dice = Dice(seed);
        let slowness: Vec<u64> = (0..num_devices).map(|_| 1 + dice.roll(4) as u64).collect();
        let mut fleet = Fleet::new(&slowness, seed, |_| false);
        let mut now = Duration::ZERO;
        let speed: f64 = slowness.iter().map(|slowness| 1.0 / *slowness as f64).sum();
        // Stretches of too much work and of too little.
        let gap = |arrival: usize| (if arrival % 2000 < 1500 { 1800.0 } else { 40_000.0 } / speed) as usize;
        for arrival in 0..20_000 {
            now += Duration::from_micros(dice.roll(gap(arrival)) as u64);
            fleet.run(now);
            let client = ClientId(if dice.roll(41) < 40 { 0 } else { 1 + dice.roll(4) as u64 });
            match dice.roll(8) {
                0 => fleet.arrive(now, client, CLIPS, clip(1 + dice.roll(3))),
                _ => fleet.arrive(now, client, TEXT, text(1 + dice.roll(3))),
            }
        }
        fleet.run(Duration::MAX);
        fleet.check_empty();
        let patient = fleet.longest_waits[&ClientId(0)];
        for client in 1..5 {
            let waited = fleet.longest_waits[&ClientId(client)];
            prop_assert!(waited < patient / 4, "client {client} waited {waited:?}, the one who asks for most {patient:?}");
        }
    }
}

/// Requests go where they end first: a device that is four times as fast gets four times the work.
#[test]
fn devices_get_work_as_they_are_fast() {
    let mut fleet = Fleet::new(&[1, 4], 7, |_| false);
    let mut dice = Dice(3);
    let mut now = Duration::ZERO;
    for _ in 0..2000 {
        now += Duration::from_micros(dice.roll(18_000) as u64);
        fleet.run(now);
        fleet.arrive(now, ALONE, CLIPS, clip(3));
    }
    fleet.run(Duration::MAX);
    fleet.check_empty();
    let end = fleet.devices.iter().map(|device| device.clock.now()).max().unwrap_or_default().as_secs_f64();
    let busy: Vec<f64> = fleet.devices.iter().map(|device| device.seconds / end).collect();
    assert!(busy.iter().all(|share| *share > 0.5), "{busy:?}");
    assert!(end < 1.1 * now.as_secs_f64(), "{end} s for work of {now:?}");
}

/// Pictures and clips of one shape go to one device as long as sharing steps there costs less than a step of their own elsewhere.
#[test]
fn sessions_of_one_shape_go_together_where_that_is_cheaper() {
    let mut fleet = Fleet::new(&[1, 1], 1, |_| false);
    // Steps cost 1 + sessions: a second one takes half as much as the first.
    for sessions in [1, 2] {
        let amount = sessions as f64;
        let plan = tale_models::runner::StepPlan { phase: tale_models::request::Phase::Denoise, sessions, amount };
        for replica in &fleet.models[CLIPS].on {
            (0..500).for_each(|_| replica.gauges.rates().learn(&plan, 1.0 + amount));
        }
    }
    let live = |fleet: &Fleet| [0, 1].map(|device| fleet.devices[device].worker.model_gauges()[CLIPS].live());
    let of_shape = |width: usize, height: usize| {
        let Request::Diffusion(mut request) = clip(10) else { unreachable!("a clip") };
        (request.canvas.width, request.canvas.height) = (width, height);
        Request::Diffusion(request)
    };
    fleet.arrive(Duration::ZERO, ALONE, CLIPS, of_shape(16, 32));
    fleet.arrive(Duration::ZERO, ALONE, CLIPS, of_shape(32, 16));
    assert_eq!(live(&fleet), [1, 1], "what shares nothing goes where nothing is");
    // Which would end sooner on an idle device, but here none is.
    fleet.arrive(Duration::ZERO, ALONE, CLIPS, of_shape(32, 16));
    assert_eq!(live(&fleet), [1, 2], "beside its like");
    fleet.arrive(Duration::ZERO, ALONE, CLIPS, of_shape(16, 32));
    assert_eq!(live(&fleet), [2, 2], "beside its like");
    // Nothing is known of three in a step: it is taken to cost as much as one alone.
    fleet.arrive(Duration::ZERO, ALONE, CLIPS, of_shape(16, 32));
    fleet.arrive(Duration::ZERO, ALONE, CLIPS, of_shape(16, 32));
    assert_eq!(live(&fleet), [3, 3]);
    fleet.run(Duration::MAX);
    fleet.check_empty();
}

#[test]
fn a_device_that_fails_gives_its_work_to_the_others() {
    let has_failed = Arc::new(AtomicBool::new(false));
    let fails = has_failed.clone();
    let mut fleet = Fleet::new(&[1, 1], 1, move |device| device == 0 && fails.load(Relaxed));
    for _ in 0..20 {
        fleet.arrive(Duration::ZERO, ALONE, CLIPS, clip(50));
    }
    fleet.run(Duration::from_millis(20));
    let begun = fleet.sessions.values().filter(|session| session.has_begun).count();
    assert_eq!(begun, 4, "two on each");
    has_failed.store(true, Relaxed);
    fleet.run(Duration::from_millis(30));
    let gauges = fleet.devices[0].worker.gauges();
    assert_eq!(gauges.problem().as_deref(), Some("device: it fell off the bus"));
    assert_eq!(fleet.sessions.len(), 18, "those that had begun there have ended");
    fleet.arrive(Duration::from_millis(30), ALONE, TEXT, text(2));
    fleet.run(Duration::MAX);
    fleet.check_empty();
    assert!(fleet.models[TEXT].is_alive());
}

#[test]
fn a_prompt_goes_where_its_beginning_was_read() {
    let mut fleet = Fleet::new(&[1, 1, 1], 1, |_| false);
    let chosen = |fleet: &mut Fleet, prompt: Vec<u32>| {
        let request = Request::Text(tale_models::request::TextRequest::greedy(prompt, 1));
        let before: Vec<usize> = fleet.devices.iter().map(live).collect();
        fleet.arrive(Duration::ZERO, ALONE, TEXT, request);
        let after: Vec<usize> = fleet.devices.iter().map(live).collect();
        (0..3).find(|device| before[*device] != after[*device]).expect("it went somewhere")
    };
    fn live(device: &Device) -> usize {
        device.worker.model_gauges()[TEXT].live()
    }
    // What tokens cost is learned everywhere.
    for token in 0..12 {
        chosen(&mut fleet, vec![token; 300]);
        fleet.run(Duration::MAX);
    }
    let system: Vec<u32> = (100..400).collect();
    let first = chosen(&mut fleet, system.clone());
    fleet.run(Duration::MAX);
    for question in 0..10 {
        let prompt = system.iter().copied().chain([question; 9]).collect();
        assert_eq!(chosen(&mut fleet, prompt), first);
        fleet.run(Duration::MAX);
    }
}

fn models(name: &str, make: impl Fn() -> LoadedModel, devices: usize) -> Vec<Vec<(String, LoadedModel)>> {
    (0..devices).map(|_| vec![(name.to_owned(), make())]).collect()
}

#[test]
fn two_devices_work_side_by_side() {
    let options = EngineOptions { memory_bytes: Some(1 << 20), ..EngineOptions::default() };
    let make = || clip_model(slow(Duration::from_millis(20)));
    let engine = Engine::start_on(models("clips", make, 2), options).expect("starts");
    assert_eq!(
        engine.models()[0].devices,
        [DeviceSpec::CpuPart { part: 0, of: 2 }, DeviceSpec::CpuPart { part: 1, of: 2 }]
    );
    let begun = Instant::now();
    let sessions: Vec<_> = (0..2).map(|_| engine.submit("clips", ALONE, clip(5)).expect("accepted")).collect();
    for mut session in sessions {
        let events: Vec<_> = std::iter::from_fn(|| session.blocking_recv()).collect();
        assert!(matches!(events.last(), Some(Event::Finished { .. })), "{events:?}");
    }
    // Each has eight steps of 20 ms.
    assert!(begun.elapsed() < Duration::from_millis(300), "{:?}", begun.elapsed());
    assert_eq!(engine.status().devices.len(), 2);
    engine.shutdown(Duration::from_secs(5));
}

/// Sessions that are dropped while they may be on their way from one device to another leave nothing behind.
#[test]
fn what_is_dropped_on_its_way_is_gone() {
    let options = EngineOptions { memory_bytes: Some(1 << 20), max_queued_sessions: 1000, ..EngineOptions::default() };
    let steps = Arc::new(AtomicU64::new(0));
    let counted = steps.clone();
    let make = move || {
        let counted = counted.clone();
        let on_step = move |_, _: &[SessionId]| {
            counted.fetch_add(1, Relaxed);
            std::thread::sleep(Duration::from_micros(100));
            Ok(())
        };
        text_model(Script { max_batch: 1, on_step: Box::new(on_step), ..Script::default() }).expect("made")
    };
    let engine = Engine::start_on(models("words", make, 3), options).expect("starts");
    let mut dice = Dice(5);
    let mut held = Vec::new();
    for _ in 0..2000 {
        if let Ok(session) = engine.submit("words", ClientId(dice.roll(50) as u64), text(1 + dice.roll(4))) {
            held.push(session);
        }
        if dice.roll(10) == 0 {
            std::thread::sleep(Duration::from_micros(200));
        }
        if held.len() > 20 || dice.roll(3) == 0 {
            let index = dice.roll(held.len().max(1));
            if index < held.len() {
                drop(held.swap_remove(index));
            }
        }
    }
    drop(held);
    let dropped = Instant::now();
    while engine.status().models[0].live > 0 || engine.status().models[0].queued > 0 {
        assert!(dropped.elapsed() < Duration::from_secs(5), "{:?}", engine.status());
        std::thread::yield_now();
    }
    assert!(steps.load(Relaxed) > 0);
}

#[test]
fn a_step_that_fails_is_no_device_that_fails() {
    let on_step = |_, _: &[SessionId]| -> tale_models::Result<()> { Err(Error::Device("no answer".into())) };
    let script = Script { on_step: Box::new(on_step), ..Script::default() };
    let options = EngineOptions { memory_bytes: Some(1 << 20), ..EngineOptions::default() };
    let engine = Engine::start(vec![("clips".into(), clip_model(script))], options).expect("starts");
    for _ in 0..2 {
        let mut session = engine.submit("clips", ALONE, clip(1)).expect("accepted");
        let events: Vec<_> = std::iter::from_fn(|| session.blocking_recv()).collect();
        assert!(matches!(events.last(), Some(Event::Failed(_))), "{events:?}");
    }
    assert!(engine.is_alive() && engine.problem().is_none());
    engine.shutdown(Duration::ZERO);
    let error = engine.submit("clips", ALONE, clip(1)).expect_err("over");
    assert!(matches!(error, EngineError::Draining), "{error}");
}

/// The other models are served, and the one that is lost says why.
#[test]
fn a_model_without_a_device_is_refused_alone() {
    let options = EngineOptions { memory_bytes: Some(1 << 20), ..EngineOptions::default() };
    let words = text_model(Script::default()).expect("made");
    let models = vec![vec![("clips".to_owned(), clip_model(Script::default()))], vec![("words".to_owned(), words)]];
    let engine = Engine::start_on(models, options).expect("starts");
    engine.shared.devices[0].gauges.fail("it fell off the bus".into());
    let error = engine.submit("clips", ALONE, clip(1)).expect_err("lost").to_string();
    assert_eq!(error, "no device is left for model `clips`: cpu:0/2: it fell off the bus");
    assert_eq!(engine.problem().map(|problem| problem.to_string()), Some(error));
    assert!(engine.is_alive() && !engine.status().alive);
    let mut session = engine.submit("words", ALONE, text(2)).expect("served");
    let events: Vec<_> = std::iter::from_fn(|| session.blocking_recv()).collect();
    assert!(matches!(events.last(), Some(Event::Finished { .. })), "{events:?}");
}
