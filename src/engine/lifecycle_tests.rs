//! Models that come and go: on a device's thread through virtual time, and in an engine over real threads.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tale_models::device::{DeviceSpec, Placement};
use tale_models::request::Phase;
use tale_models::testing::{Script, ScriptedRunner, text_model};
use tale_models::{ClientId, Error, Event, LoadedModel, Runner, SessionId};

use super::arbiter::is_text;
use super::assignment::Sizes;
use super::coming::{Arrival, Arrived, Begin, Loadable, Loader, Loading};
use super::command::Command;
use super::ledger::{Ledger, Owner};
use super::mailbox::Mailbox;
use super::tests::{ALONE, Dice, VirtualClock, text};
use super::worker::DeviceWorker;
use super::{Engine, EngineError, EngineOptions, ModelSpec, ModelState, Session, When, Wish};
use crate::places::Places;

/// Bytes of one scripted step of loading.
const STEP: usize = 10;

struct ScriptedLoading {
    model: Option<LoadedModel>,
    read: usize,
    total: usize,
    on_step: Box<dyn FnMut() -> Result<(), Error> + Send>,
}

impl Loading for ScriptedLoading {
    fn advance(&mut self) -> Result<Option<LoadedModel>, Error> {
        (self.on_step)()?;
        if self.read < self.total {
            self.read = (self.read + STEP).min(self.total);
            return Ok(None);
        }
        Ok(self.model.take())
    }

    fn bytes(&self) -> (usize, usize) {
        (self.read, self.total)
    }
}

fn words(script: Script, resident_bytes: usize) -> LoadedModel {
    LoadedModel { resident_bytes, ..text_model(script).expect("made") }
}

/// What becomes of a loading.
type Hears<T> = Receiver<Result<T, Error>>;

/// An order to load `resident_bytes`, and whoever hears of it.
fn arrival(
    resident_bytes: usize,
    script: Script,
    on_step: impl FnMut() -> Result<(), Error> + Send + 'static,
) -> (Arrival, Hears<()>, Hears<Arrived>) {
    let loading = ScriptedLoading {
        model: Some(words(script, resident_bytes)),
        read: 0,
        total: resident_bytes,
        on_step: Box::new(on_step),
    };
    let begin: Begin = Box::new(|_: Option<&Placement>| Ok(Box::new(loading) as Box<dyn Loading>));
    let (begun, hears_begun) = channel();
    let (told, hears) = channel();
    let (name, queue, progress) = ("more".to_owned(), Places::new(8), Arc::default());
    (Arrival { name, queue, resident_bytes, begin, progress, begun, told }, hears_begun, hears)
}

/// While a model is read in steps of 100 ms a token stream waits for one of them at a time, and both come to their ends.
#[test]
fn a_token_stream_waits_for_one_step_of_a_loading_at_most() {
    let (clock, log) = (VirtualClock::default(), Arc::new(Mutex::new(Vec::<Phase>::new())));
    let (of_steps, of_log) = (clock.clone(), log.clone());
    let on_step = move |plan: tale_models::runner::StepPlan, _: &[SessionId]| {
        of_steps.advance(Duration::from_millis(10));
        of_log.lock().expect("no panic inside").push(plan.phase);
        Ok(())
    };
    let runner = ScriptedRunner::new(Script { on_step: Box::new(on_step), ..Script::default() });
    let runners = vec![("words".to_owned(), Box::new(runner) as Box<dyn Runner>)];
    let mut worker = DeviceWorker::new(runners, vec![Places::new(8)], Ledger::new(1000), clock.clone());
    let (of_loading, of_log) = (clock, log.clone());
    let (arrival, begun, hears) = arrival(500, Script::default(), move || {
        of_loading.advance(Duration::from_millis(100));
        of_log.lock().expect("no panic inside").push(Phase::Load);
        Ok(())
    });
    let progress = arrival.progress.clone();
    worker.order(1, ALONE, 0, text(2000), Arc::default()).expect("nobody waits");
    worker.handle(Command::Load(7, Box::new(arrival)));
    begun.try_recv().expect("told at once").expect("there is room");
    assert_eq!(worker.ledger().used_bytes(), 500, "reserved before it is read");
    while hears.try_recv().is_err() {
        assert!(worker.turn());
    }
    assert_eq!(progress.bytes(), (500, 500));
    let steps = log.lock().expect("no panic inside").clone();
    assert_eq!(steps.iter().filter(|phase| **phase == Phase::Load).count(), 51, "one more builds");
    for between in steps.split(|phase| is_text(*phase)) {
        assert!(between.len() <= 1, "{between:?}");
    }
    // It works, beside the other.
    let mailbox = Arc::new(Mailbox::default());
    worker.order(2, ALONE, 7, text(3), mailbox).expect("nobody waits");
    while worker.turn() {}
    assert_eq!(worker.ledger().held_bytes(Owner::Model(7)), 500);
    let (done, hears) = channel();
    worker.handle(Command::Unload(7, done));
    hears.try_recv().expect("done at once");
    assert_eq!(worker.ledger().used_bytes(), 0);
}

/// What does not fit is refused before it is read, and a loading that fails gives back what it had.
#[test]
fn a_loading_that_ends_early_leaves_nothing() {
    let waiting = ScriptedRunner::new(Script { footprint_bytes: 60, max_sessions: 1, ..Script::default() });
    let runners = vec![("words".to_owned(), Box::new(waiting) as Box<dyn Runner>)];
    let mut worker = DeviceWorker::new(runners, vec![Places::new(8)], Ledger::new(100), VirtualClock::default());
    let (too_large, begun, _hears) = arrival(101, Script::default(), || Ok(()));
    worker.handle(Command::Load(7, Box::new(too_large)));
    let error = begun.try_recv().expect("told").expect_err("no room").to_string();
    assert_eq!(error, "not enough memory: 101 bytes needed, 100 free");
    // Two sessions of 60 bytes: one runs, the other waits and has to have its room when its turn comes.
    for id in [1, 2] {
        worker.order(id, ALONE, 0, text(2), Arc::default()).expect("few wait");
    }
    let (large, begun, _hears) = arrival(41, Script::default(), || Ok(()));
    worker.handle(Command::Load(8, Box::new(large)));
    let error = begun.try_recv().expect("told").expect_err("no room").to_string();
    assert_eq!(error, "not enough memory: 41 bytes needed, 40 free");
    let mut steps = 0;
    let (failing, begun, hears) = arrival(40, Script::default(), move || {
        steps += 1;
        match steps {
            3 => Err(Error::checkpoint("/models/more", "a file has ended early")),
            _ => Ok(()),
        }
    });
    worker.handle(Command::Load(9, Box::new(failing)));
    begun.try_recv().expect("told").expect("there is room");
    while worker.turn() {}
    let error = hears.try_recv().expect("told").err().expect("it failed").to_string();
    assert!(error.contains("a file has ended early"), "{error}");
    assert_eq!(worker.ledger().used_bytes(), 0);
    // One that panics is no different.
    let (panicking, begun, hears) = arrival(40, Script::default(), || std::panic::resume_unwind(Box::new("script")));
    worker.handle(Command::Load(10, Box::new(panicking)));
    begun.try_recv().expect("told").expect("there is room");
    while worker.turn() {}
    assert!(matches!(hears.try_recv().expect("told"), Err(Error::Panicked(_))));
    assert_eq!(worker.ledger().used_bytes(), 0);
}

/// Models by name: what they take, and how often each has been loaded.
#[derive(Default)]
struct Scripts {
    resident_bytes: BTreeMap<String, usize>,
    /// Said for each step of a session of weights at this path.
    steps: Arc<Mutex<BTreeMap<String, usize>>>,
    /// While set, no loading goes on.
    hold: Arc<AtomicBool>,
    /// Loadings fail at their last step.
    fails: Arc<AtomicBool>,
    loaded: AtomicUsize,
}

impl std::fmt::Debug for Scripts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scripts")
    }
}

impl Loader for Scripts {
    fn loadable(&self, model: &ModelSpec, _device: DeviceSpec, _free_bytes: usize) -> Result<Loadable, Error> {
        self.loaded.fetch_add(1, Relaxed);
        let resident_bytes = self.resident_bytes[&model.name];
        let (steps, path) = (self.steps.clone(), model.source.path.display().to_string());
        let on_step = move |_, _: &[SessionId]| {
            *steps.lock().expect("no panic inside").entry(path.clone()).or_default() += 1;
            std::thread::sleep(Duration::from_micros(200));
            Ok(())
        };
        let script = Script { on_step: Box::new(on_step), ..Script::default() };
        let (hold, fails) = (self.hold.clone(), self.fails.clone());
        let mut steps_done = 0;
        let loading = ScriptedLoading {
            model: Some(words(script, resident_bytes)),
            read: 0,
            total: resident_bytes,
            on_step: Box::new(move || {
                steps_done += 1;
                std::thread::sleep(Duration::from_micros(200));
                while hold.load(Relaxed) && steps_done > 1 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                match fails.load(Relaxed) {
                    true => Err(Error::checkpoint("/models", "a disk that fails")),
                    false => Ok(()),
                }
            }),
        };
        let begin: Begin = Box::new(|_| Ok(Box::new(loading) as Box<dyn Loading>));
        Ok(Loadable { sizes: Sizes { resident_bytes, request_bytes: 0 }, begin })
    }
}

fn on_demand(name: &str) -> ModelSpec {
    ModelSpec { on_demand: true, ..ModelSpec::new(name, std::path::Path::new("/models/first")) }
}

/// An engine of so many devices of 100 bytes each, whose models are all on demand.
fn engine(models: Vec<ModelSpec>, devices: usize, scripts: Scripts) -> (Engine, Arc<Scripts>) {
    let scripts = Arc::new(scripts);
    let options = EngineOptions { memory_bytes: Some(100), drain: Duration::from_secs(20), ..EngineOptions::default() };
    let none = (0..devices).map(|_| Vec::new()).collect();
    (Engine::start_with(none, models, options, scripts.clone()).expect("starts"), scripts)
}

fn sizes(of: &[(&str, usize)]) -> Scripts {
    let resident_bytes = of.iter().map(|(name, bytes)| ((*name).to_owned(), *bytes)).collect();
    Scripts { resident_bytes, ..Scripts::default() }
}

#[track_caller]
fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn state(engine: &Engine, name: &str) -> ModelState {
    engine.report(name).expect("known").state
}

fn load(engine: &Engine, name: &str, wish: Wish) -> Result<(), EngineError> {
    engine.load_model(name, wish)?.recv().expect("told")
}

#[track_caller]
fn load_and_wait(engine: &Engine, name: &str) {
    load(engine, name, Wish::default()).expect("there is room");
    wait_for("loaded", || state(engine, name) == ModelState::Ready);
}

fn end_of(session: Session) -> Option<Event> {
    let mut session = session;
    std::iter::from_fn(|| session.blocking_recv()).last()
}

#[test]
fn a_model_comes_and_goes() {
    let (engine, _) = engine(vec![on_demand("a"), on_demand("b")], 1, sizes(&[("a", 60), ("b", 60)]));
    assert_eq!(state(&engine, "a"), ModelState::Unloaded);
    let refused = engine.submit("a", ALONE, text(2)).expect_err("not there");
    assert_eq!(refused.to_string(), "model `a` is not loaded");
    load_and_wait(&engine, "a");
    let report = engine.report("a").expect("known");
    assert_eq!((report.devices, report.progress), (vec![DeviceSpec::Cpu], None));
    assert_eq!(engine.status().ledger_used_bytes(), 60);
    let again = load(&engine, "a", Wish::default()).expect_err("it is there");
    assert!(matches!(again, EngineError::AlreadyLoaded { .. }), "{again}");
    assert!(matches!(end_of(engine.submit("a", ALONE, text(2)).expect("served")), Some(Event::Finished { .. })));
    engine.unload_model("a", None).expect("it is there");
    wait_for("unloaded", || state(&engine, "a") == ModelState::Unloaded);
    assert_eq!(engine.status().ledger_used_bytes(), 0);
    let again = engine.unload_model("a", None).expect_err("it has gone").to_string();
    assert_eq!(again, "model `a` is not loaded: there is nothing to unload");
    assert!(matches!(engine.unload_model("c", None), Err(EngineError::UnknownModel { .. })));
}

#[test]
fn what_does_not_fit_is_refused_with_bytes_and_device() {
    let always = ModelSpec { on_demand: false, ..on_demand("a") };
    let (engine, scripts) = engine(vec![always, on_demand("b")], 1, sizes(&[("a", 60), ("b", 60)]));
    load_and_wait(&engine, "a");
    let error = load(&engine, "b", Wish::default()).expect_err("no room").to_string();
    assert!(error.contains("model `b` fits on no device: with a request it takes 60 bytes, and cpu"), "{error}");
    assert!(error.contains("has 40 beside its other models"), "{error}");
    let report = engine.report("b").expect("known");
    assert_eq!((report.state, report.problem), (ModelState::Failed, Some(error)));
    assert_eq!(engine.status().ledger_used_bytes(), 60);
    let nowhere = Wish { devices: vec![DeviceSpec::Cuda(3)], ..Wish::default() };
    let error = load(&engine, "b", nowhere).expect_err("no such device").to_string();
    assert!(error.contains("cuda:3 is none of this server's devices: cpu"), "{error}");
    engine.unload_model("a", None).expect("it is there");
    wait_for("unloaded", || state(&engine, "a") == ModelState::Unloaded);
    scripts.fails.store(true, Relaxed);
    load(&engine, "b", Wish::default()).expect("it begins");
    wait_for("failed", || state(&engine, "b") == ModelState::Failed);
    assert!(engine.report("b").expect("known").problem.expect("why").contains("a disk that fails"));
    assert_eq!(engine.status().ledger_used_bytes(), 0);
}

/// Sessions that run when a model goes have their time, and then end with an error.
#[test]
fn an_unloading_waits_for_what_runs_and_not_for_ever() {
    let (engine, _) = engine(vec![on_demand("a")], 1, sizes(&[("a", 60)]));
    load_and_wait(&engine, "a");
    let short = engine.submit("a", ALONE, text(50)).expect("served");
    engine.unload_model("a", None).expect("it is there");
    assert!(engine.submit("a", ALONE, text(1)).is_err(), "no further ones");
    assert!(matches!(end_of(short), Some(Event::Finished { .. })));
    wait_for("unloaded", || state(&engine, "a") == ModelState::Unloaded);
    load_and_wait(&engine, "a");
    let endless = engine.submit("a", ALONE, text(4000)).expect("served");
    engine.unload_model("a", Some(Duration::from_millis(20))).expect("it is there");
    let end = end_of(endless);
    assert!(matches!(end, Some(Event::Failed(Error::Unloaded))), "{end:?}");
    wait_for("unloaded", || state(&engine, "a") == ModelState::Unloaded);
    let status = engine.status();
    assert_eq!((status.ledger_used_bytes(), status.models[0].live, status.models[0].queued), (0, 0, 0));
}

/// New weights take the place of old ones while requests come: none fails, those that have begun end on the old ones.
#[test]
fn weights_are_swapped_under_load() {
    for (resident_bytes, when) in [(40, None), (60, None), (40, Some(When::After))] {
        let (engine, scripts) = engine(vec![on_demand("a")], 2, sizes(&[("a", resident_bytes)]));
        let both = Wish { devices: [0, 1].map(|part| DeviceSpec::CpuPart { part, of: 2 }).to_vec(), ..Wish::default() };
        load(&engine, "a", both).expect("there is room");
        wait_for("loaded", || state(&engine, "a") == ModelState::Ready);
        let is_over = AtomicBool::new(false);
        let old = engine.model("a").expect("it is there");
        let answered = std::thread::scope(|scope| {
            let clients = (0..4).map(|client| {
                let (engine, is_over) = (&engine, &is_over);
                scope.spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
                    let mut answered = 0;
                    while !is_over.load(Relaxed) || answered < 5 {
                        let client = ClientId(client);
                        // As a request does that has time: beside the old ones it finds weights at once.
                        let model = runtime.block_on(engine.ask_and_wait("a", client)).expect("it comes");
                        let session = engine.submit_to(&model, client, text(20), None).expect("taken");
                        let end = end_of(session);
                        assert!(matches!(end, Some(Event::Finished { .. })), "{end:?}");
                        answered += 1;
                    }
                    answered
                })
            });
            let clients: Vec<_> = clients.collect();
            let path = Some("/models/second".into());
            load(&engine, "a", Wish { path, when, ..Wish::default() }).expect("it begins");
            if resident_bytes == 40 && when.is_none() {
                // It is there all the while, since the new ones are loaded beside it.
                assert!(engine.model("a").is_ok());
            }
            // Whoever holds the old weights has them.
            let held = engine.submit_to(&old, ALONE, text(5), None).expect("taken");
            assert!(matches!(end_of(held), Some(Event::Finished { .. })));
            drop(old);
            wait_for("swapped", || {
                let model = engine.model("a");
                model.is_ok_and(|model| {
                    model.devices.len() == 2 && scripts.steps.lock().expect("no panic").contains_key("/models/second")
                })
            });
            is_over.store(true, Relaxed);
            clients.into_iter().map(|client| client.join().expect("no request failed")).sum::<usize>()
        });
        assert!(answered >= 20);
        wait_for("the old ones are gone", || engine.status().ledger_used_bytes() == 2 * resident_bytes);
        let before = scripts.steps.lock().expect("no panic").get("/models/first").copied();
        end_of(engine.submit("a", ALONE, text(5)).expect("served"));
        assert_eq!(scripts.steps.lock().expect("no panic").get("/models/first").copied(), before);
    }
}

#[tokio::test]
async fn a_request_that_has_time_waits_until_a_model_is_there() {
    let (engine, scripts) = engine(vec![on_demand("a")], 1, sizes(&[("a", 60)]));
    scripts.hold.store(true, Relaxed);
    let Err(away) = engine.ask("a") else { panic!("it is not there") };
    assert!(matches!(away, EngineError::NotLoaded { state: ModelState::Loading, comes_back: true, .. }), "{away}");
    wait_for("it reads", || engine.report("a").expect("known").progress.is_some_and(|of| of.read_bytes == STEP));
    let Err(away) = engine.ask("a") else { panic!("it is not there") };
    assert_eq!(away.to_string(), "model `a` is being loaded: 10 of 60 bytes are read");
    let waits = tokio::spawn({
        let engine = engine.clone();
        async move { engine.ask_and_wait("a", ALONE).await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!waits.is_finished());
    scripts.hold.store(false, Relaxed);
    assert_eq!(waits.await.expect("no panic").expect("it comes").name, "a");
    assert_eq!(scripts.loaded.load(Relaxed), 1, "many requests load it once");
    // One that an operator keeps away does not come.
    let (engine, _) = self::engine(vec![ModelSpec { on_demand: false, ..on_demand("a") }], 1, sizes(&[("a", 60)]));
    let Err(away) = engine.ask_and_wait("a", ALONE).await else { panic!("it does not come") };
    assert!(matches!(away, EngineError::NotLoaded { state: ModelState::Unloaded, comes_back: false, .. }), "{away}");
}

#[tokio::test]
async fn who_waits_for_a_model_that_fails_hears_of_it() {
    let (engine, scripts) = engine(vec![on_demand("a")], 1, sizes(&[("a", 60)]));
    scripts.fails.store(true, Relaxed);
    let Err(away) = engine.ask_and_wait("a", ALONE).await else { panic!("it does not come") };
    assert!(away.to_string().contains("a disk that fails"), "{away}");
    assert!(matches!(away, EngineError::NotLoaded { state: ModelState::Failed, .. }), "{away}");
    // Requests do not try it again at once.
    let loaded = scripts.loaded.load(Relaxed);
    assert!(engine.ask("a").is_err() && scripts.loaded.load(Relaxed) == loaded);
}

/// Where the room is short, of the models on demand that nobody uses the one goes that was used longest ago.
#[tokio::test]
async fn models_on_demand_make_room_for_each_other() {
    let names = ["a", "b", "c"];
    let specs = names.map(on_demand).to_vec();
    let (engine, _) = engine(specs, 1, sizes(&[("a", 40), ("b", 40), ("c", 40)]));
    for name in ["a", "b"] {
        engine.ask_and_wait(name, ALONE).await.expect("there is room");
    }
    drop(engine.ask("a").expect("it is there"));
    let is_there = || names.map(|name| state(&engine, name) == ModelState::Ready);
    engine.ask_and_wait("c", ALONE).await.expect("b goes");
    assert_eq!(is_there(), [true, false, true]);
    // What is used does not go, and where nothing can go nothing does.
    let held = [engine.ask("a").expect("there"), engine.ask("c").expect("there")];
    let Err(away) = engine.ask_and_wait("b", ALONE).await else { panic!("no room") };
    assert!(away.to_string().contains("40 bytes, and cpu"), "{away}");
    assert_eq!(is_there(), [true, false, true]);
    drop(held);
    assert_eq!(engine.status().ledger_used_bytes(), 80);
}

#[test]
fn what_nobody_uses_is_unloaded() {
    let spec = ModelSpec { on_demand: false, idle_unload: Some(Duration::from_secs(60)), ..on_demand("a") };
    let (engine, _) = engine(vec![spec], 1, sizes(&[("a", 60)]));
    load_and_wait(&engine, "a");
    let later = |seconds| super::lifecycle::unload_idle(&engine.shared, Instant::now() + Duration::from_secs(seconds));
    let held = engine.model("a").expect("there");
    later(100);
    assert_eq!(state(&engine, "a"), ModelState::Ready, "somebody has it");
    drop(held);
    later(150);
    assert_eq!(state(&engine, "a"), ModelState::Ready, "50 s after it was seen in use");
    later(161);
    wait_for("unloaded", || state(&engine, "a") == ModelState::Unloaded);
    // It comes back with the next request that wants it.
    assert!(engine.ask("a").is_err());
    wait_for("loaded", || state(&engine, "a") == ModelState::Ready);
}

/// A thousand operations in any order: every session ends once, and in the end the books hold what is loaded.
#[test]
fn races_of_loads_unloads_submissions_and_cancellations_leave_nothing() {
    let names = ["a", "b", "c"];
    let (engine, _) = engine(names.map(on_demand).to_vec(), 2, sizes(&[("a", 40), ("b", 50), ("c", 60)]));
    let at_work = || engine.shared.num_threads.load(Relaxed);
    let mut dice = Dice(11);
    let mut sessions: Vec<Session> = Vec::new();
    let mut ended = [0; 3];
    for _ in 0..1000 {
        let name = names[dice.roll(3)];
        match dice.roll(10) {
            0 => drop(engine.load_model(name, Wish::default())),
            1 => {
                let path = Some(["/models/first", "/models/second"][dice.roll(2)].into());
                drop(engine.load_model(name, Wish { path, ..Wish::default() }));
            }
            2 => drop(engine.unload_model(name, Some(Duration::from_millis(dice.roll(5) as u64)))),
            3 if !sessions.is_empty() => drop(sessions.swap_remove(dice.roll(sessions.len()))),
            4 if !sessions.is_empty() => match end_of(sessions.swap_remove(dice.roll(sessions.len()))) {
                Some(Event::Finished { .. }) => ended[0] += 1,
                Some(Event::Failed(Error::Unloaded)) => ended[1] += 1,
                end => panic!("{end:?}"),
            },
            5 => std::thread::sleep(Duration::from_millis(dice.roll(4) as u64)),
            _ => match engine.submit(name, ClientId(dice.roll(4) as u64), text(1 + dice.roll(30))) {
                Ok(session) => sessions.push(session),
                Err(EngineError::NotLoaded { .. } | EngineError::Busy { .. }) => ended[2] += 1,
                Err(error) => panic!("{error}"),
            },
        }
    }
    for session in sessions {
        let end = end_of(session);
        assert!(matches!(end, Some(Event::Finished { .. } | Event::Failed(Error::Unloaded))), "{end:?}");
    }
    // Whether an unloading ends one is chance.
    assert!(ended[0] > 0 && ended[2] > 0, "{ended:?}");
    let rests = || {
        names
            .iter()
            .all(|name| [ModelState::Ready, ModelState::Unloaded, ModelState::Failed].contains(&state(&engine, name)))
    };
    let loaded_bytes = || {
        let bytes = |name: &&str| match engine.model(name) {
            Ok(model) => {
                model.devices.len()
                    * [("a", 40), ("b", 50), ("c", 60)].iter().find(|(of, _)| of == name).expect("known").1
            }
            Err(_) => 0,
        };
        names.iter().map(bytes).sum::<usize>()
    };
    wait_for("all rests", || {
        let status = engine.status();
        let is_empty = status.models.iter().all(|model| model.live == 0 && model.queued == 0);
        rests() && is_empty && status.ledger_used_bytes() == loaded_bytes()
    });
    wait_for("no thread is left", || at_work() == 0);
    for name in names {
        let _ = engine.unload_model(name, None);
    }
    wait_for("nothing is held", || engine.status().ledger_used_bytes() == 0);
}
