//! The thread of a device: drain commands, admit sessions, let the arbiter pick a runner, step it, publish events.
//!
//! Owns: the runners, the ledger, the sessions that wait and run. Clients take turns in front of each model. A step that fails or panics ends its own sessions and
//! no others. Does not know: which thread it runs on, or what time is (a [`Clock`] is given), so that tests drive it
//! through virtual time.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use tale_models::device::{Placement, give_back_freed_memory};
use tale_models::memory::PhaseBytes;
use tale_models::request::Phase;
use tale_models::runner::StepPlan;
use tale_models::{ClientId, Error, Event, Events, Request, Runner, SessionId};

use super::SubmitOptions;
use super::arbiter::{Arbiter, Candidate, RunnerKey};
use super::command::{Command, Neighbour, Order};
use super::gauges::{Gauges, ModelGauges};
use super::ledger::{Ledger, Owner, Shortage};
use super::mailbox::Mailbox;
use super::peers::Peer;
use super::shapes::Shape;
use crate::places::{Place, Places};

mod loading;
mod moving;
mod saving;
mod slot;

use self::loading::AllComing;
use self::slot::{Slot, Waiting};

/// How often a session whose memory is not free may be overtaken by later ones that need memory too.
const MAX_OVERTAKEN: usize = 64;

const IS_THERE: &str = "sessions are of runners that are there: this is a bug";

/// For how long memory of steps is kept for the next ones when there is nothing to do.
const MEMORY_KEPT: Duration = Duration::from_secs(2);

/// A runner and the name of its model.
type Named = (String, Box<dyn Runner>);

/// Says what is wrong with the device, if it will not work again.
pub(super) type Health = Box<dyn Fn() -> Result<(), Error> + Send>;

/// Where time comes from.
pub(super) trait Clock {
    /// Time since some fixed moment.
    fn now(&self) -> Duration;
}

/// Real time.
pub(super) struct WallClock(Instant);

impl Default for WallClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for WallClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// Everything that one device thread owns.
pub(super) struct DeviceWorker<C> {
    clock: C,
    slots: BTreeMap<RunnerKey, Slot>,
    /// Models on their way.
    coming: AllComing,
    /// Where they will live, if there is a device.
    placement: Option<Placement>,
    gauges: Arc<Gauges>,
    arbiter: Arbiter,
    ledger: Ledger,
    events: Events,
    /// Whether something has changed since the last time that no session that waits could be admitted.
    admission_due: bool,
    /// Those that wait and those that run.
    sessions: HashMap<SessionId, Live>,
    /// Sessions whose checkpoints are wanted and that the last step has brought on.
    moved: Vec<SessionId>,
    /// Nothing begins any more.
    is_handing_over: bool,
    /// Asked when a step has failed.
    health: Health,
    /// They have news that their readers have not heard of. Waking threads takes long, and a device that computes has that time.
    to_wake: Vec<Arc<Mailbox>>,
}

struct Live {
    client: ClientId,
    model: RunnerKey,
    shape: Option<Shape>,
    mailbox: Arc<Mailbox>,
    submitted: Duration,
    predicted_seconds: f64,
    /// Of the predicted seconds, those that are still in the backlog.
    left_seconds: f64,
    /// Tokens that were asked for, and those that came; of a picture nothing.
    tokens: (usize, usize),
    /// Whether the runner has it.
    is_handed_over: bool,
    /// `None` once it has begun.
    place: Option<Place>,
    options: SubmitOptions,
    /// The last checkpoint that was made of it.
    saved: Option<saving::Saved>,
    last_tokens: Option<Duration>,
}

impl<C: Clock> DeviceWorker<C> {
    /// A worker over runners whose own memory is booked in `ledger` already, by their positions, and whose sessions hold places of
    /// `queues` until they begin. All have equal shares of device time.
    pub(super) fn new(
        runners: Vec<(String, Box<dyn Runner>)>,
        queues: Vec<Arc<Places>>,
        ledger: Ledger,
        clock: C,
    ) -> Self {
        let gauges = Arc::new(Gauges::default());
        gauges.ledger_capacity_bytes.store(ledger.capacity_bytes(), Relaxed);
        gauges.room_bytes.store(ledger.session_capacity_bytes(), Relaxed);
        let slot = |(key, ((name, runner), queue)): (RunnerKey, (Named, Arc<Places>))| {
            let gauges = ModelGauges::new(gauges.clone(), queue);
            gauges.resident_bytes.store(ledger.held_bytes(Owner::Model(key)), Relaxed);
            (key, Slot::new(&name, runner, Arc::new(gauges)))
        };
        let worker = Self {
            clock,
            arbiter: Arbiter::new(&vec![1.0; runners.len()]),
            slots: runners.into_iter().zip(queues).enumerate().map(slot).collect(),
            coming: AllComing::new(),
            placement: None,
            moved: Vec::new(),
            is_handing_over: false,
            health: Box::new(|| Ok(())),
            gauges,
            ledger,
            events: Events::default(),
            admission_due: false,
            sessions: HashMap::new(),
            to_wake: Vec::new(),
        };
        worker.publish_gauges();
        worker
    }

    /// The same, that knows the other devices of each runner's model.
    pub(super) fn beside(mut self, peers: Vec<Vec<Peer>>) -> Self {
        self.slots.values_mut().zip(peers).for_each(|(slot, peers)| slot.peers = peers);
        self
    }

    /// The same, that asks after each step that failed whether its device will work again.
    pub(super) fn watching(mut self, health: Health) -> Self {
        self.health = health;
        self
    }

    /// The same, that can load models.
    pub(super) fn at(mut self, placement: Option<Placement>) -> Self {
        self.placement = placement;
        self
    }

    /// Numbers that this worker publishes.
    pub(super) fn gauges(&self) -> Arc<Gauges> {
        self.gauges.clone()
    }

    /// Those of each runner, in the order of their keys.
    pub(super) fn model_gauges(&self) -> Vec<Arc<ModelGauges>> {
        self.slots.values().map(|slot| slot.gauges.clone()).collect()
    }

    /// Works until told to stop or until no handle is left. Sleeps while there is nothing to do.
    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        loop {
            match commands.try_recv() {
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return,
                Ok(command) => self.handle(command),
                Err(TryRecvError::Empty) if self.turn() => (),
                Err(TryRecvError::Empty) => {
                    self.gauges.set_idle(true);
                    let command = next_command(commands);
                    self.gauges.set_idle(false);
                    match command {
                        None | Some(Command::Stop) => return,
                        Some(command) => self.handle(command),
                    }
                }
            }
        }
    }

    /// One command; computes nothing.
    pub(super) fn handle(&mut self, command: Command) {
        match command {
            Command::Submit(order) => self.submit(order),
            Command::Cancel(id) => self.cancel(id),
            Command::Unpause(id) => self.unpause(id),
            Command::Checkpoint(id) => self.save(id),
            Command::HandOver => self.hand_over(),
            Command::Load(runner, arrival) => self.begin_to_load(runner, *arrival),
            Command::Join(runner, peers, done) => {
                let peer = |of: Neighbour| Peer::new(&of.commands, of.gauges, of.runner);
                if let Some(slot) = self.slots.get_mut(&runner) {
                    slot.peers = peers.into_iter().map(peer).collect();
                }
                // Whoever asked may have gone.
                let _ = done.send(());
            }
            Command::Unload(runner, done) => {
                self.unload(runner);
                let _ = done.send(());
            }
            Command::Stop => (),
        }
    }

    fn submit(&mut self, order: Order) {
        let Order { id, client, model, request, mailbox, place, options, predicted_seconds } = order;
        let max_tokens = match &request {
            Request::Text(request) => request.max_tokens,
            Request::Diffusion(_) => 0,
        };
        let is_abandoned = mailbox.is_abandoned();
        let live = Live {
            client,
            model,
            shape: Shape::of(&request),
            mailbox,
            submitted: self.clock.now(),
            predicted_seconds,
            left_seconds: predicted_seconds,
            tokens: (max_tokens, 0),
            is_handed_over: false,
            place: Some(place),
            options,
            saved: None,
            last_tokens: None,
        };
        self.sessions.insert(id, live);
        if is_abandoned {
            // Its reader went while it was on its way from one device to another.
            return self.cancel(id);
        }
        if self.is_handing_over {
            return self.fail(id, Error::HandedOver);
        }
        if !self.gauges.is_alive() {
            return self.give_away(id, request);
        }
        if let Err(error) = self.enqueue(id, client, model, request) {
            self.fail(id, error);
        }
    }

    /// Admits what fits and does one step; `false` when there is nothing to do, or the device has failed.
    pub(super) fn turn(&mut self) -> bool {
        if !self.gauges.is_alive() {
            self.wake_readers();
            return false;
        }
        self.admit();
        let next = |(runner, slot): (&RunnerKey, &Slot)| {
            let plan = slot.runner.next()?;
            Some(Candidate { runner: *runner, plan })
        };
        let candidates: Vec<_> = self.slots.iter().filter_map(next).chain(self.loading_steps()).collect();
        let picked = self.arbiter.pick(&candidates);
        match picked {
            Some(candidate) => {
                self.step(candidate);
                self.publish_events();
                self.save_due();
                self.offer();
            }
            None => self.wake_readers(),
        }
        self.publish_gauges();
        picked.is_some()
    }

    fn enqueue(&mut self, id: SessionId, client: ClientId, model: RunnerKey, request: Request) -> Result<(), Error> {
        let slot = self.slot(model);
        let plan = guarded(|| Ok(slot.runner.plan(&request)))?;
        let (footprint_bytes, free_bytes) = (plan.peak_bytes(), self.ledger.session_capacity_bytes());
        if let Some(PhaseBytes { phase, bytes: needed_bytes }) = plan.peak().filter(|peak| peak.bytes > free_bytes) {
            return Err(Error::OutOfMemory { phase: Some(phase), needed_bytes, free_bytes });
        }
        let waiting = Waiting { id, request, footprint_bytes, overtaken: 0 };
        self.slot_mut(model).queue.waiting.push_back(client, waiting);
        self.admission_due = true;
        Ok(())
    }

    /// Hands waiting sessions whose memory can be reserved to their runners, in the order of turns per model. Other models
    /// may overtake a session that needs more memory than is free, but not for ever.
    fn admit(&mut self) {
        if !std::mem::take(&mut self.admission_due) {
            return;
        }
        let mut blocked = BTreeSet::new();
        let mut memory_is_kept = false;
        while let Some(model) = self.next_to_admit(&blocked) {
            let Slot { queue, runner, .. } = self.slot(model);
            let Some((client, waiting)) = queue.next() else { return };
            let (id, bytes, is_overdue) = (waiting.id, waiting.footprint_bytes, waiting.overtaken >= MAX_OVERTAKEN);
            let must_wait = (memory_is_kept && bytes > 0)
                || !queue.may_begin(client, runner.max_sessions())
                || self.ledger.reserve(Owner::Session(id), bytes).is_err();
            if must_wait {
                memory_is_kept |= is_overdue;
                blocked.insert(model);
            } else {
                self.begin(model, client);
                if bytes > 0 {
                    self.count_overtaken(model, id);
                }
            }
        }
    }

    /// The model that is not blocked and whose next session came first.
    fn next_to_admit(&self, blocked: &BTreeSet<RunnerKey>) -> Option<RunnerKey> {
        let open = self.slots.iter().filter(|(model, _)| !blocked.contains(model));
        let next = open.filter_map(|(model, slot)| Some((slot.queue.next()?.1.id, *model)));
        next.min().map(|(_, model)| model)
    }

    /// A session of `model` has got memory before older ones of other models.
    fn count_overtaken(&mut self, model: RunnerKey, id: SessionId) {
        let others = self.slots.iter_mut().filter(|(other, _)| **other != model);
        let older = others.flat_map(|(_, slot)| slot.queue.waiting.iter_mut()).filter(|waiting| waiting.id < id);
        older.for_each(|waiting| waiting.overtaken += 1);
    }

    fn begin(&mut self, model: RunnerKey, client: ClientId) {
        let Some(Waiting { id, request, .. }) = self.slot_mut(model).queue.take(client) else { return };
        let Some(live) = self.sessions.get_mut(&id) else { return };
        live.is_handed_over = true;
        let resumed = live.options.resume.clone();
        if live.options.may_begin.take().is_some_and(|may_begin| !may_begin.0()) {
            return self.cancel(id);
        }
        let runner = &mut self.slot_mut(model).runner;
        let submitted = guarded(|| match resumed {
            Some(checkpoint) => runner.resume_for(client, id, request, checkpoint),
            None => runner.submit_for(client, id, request),
        });
        if let Err(error) = submitted {
            // A submission that panicked half-way may have left something.
            runner.cancel(id);
            self.fail(id, error);
        }
    }

    /// Readers hear of what the step before said while the device is at this one.
    fn step(&mut self, candidate: Candidate) {
        if self.coming.contains_key(&candidate.runner) {
            self.wake_readers();
            return self.load_on(candidate);
        }
        if let Err(shortage) = self.reserve_borrowed(candidate.runner) {
            return self.end_for_want_of_memory(candidate, shortage);
        }
        let before = self.clock.now();
        let runner = &mut self.slot_mut(candidate.runner).runner;
        let launched = guarded(|| runner.launch());
        self.wake_readers();
        let mut events = std::mem::take(&mut self.events);
        let Slot { runner, .. } = self.slot_mut(candidate.runner);
        let outcome = launched.and_then(|()| guarded(|| runner.collect(&mut events)));
        let evicted = if outcome.is_err() { runner.evict_step() } else { Vec::new() };
        self.events = events;
        let cost = self.clock.now().saturating_sub(before);
        self.arbiter.report(candidate, cost);
        let Slot { metrics, gauges, .. } = self.slot(candidate.runner);
        metrics.step(candidate.plan.phase, cost);
        gauges.rates().learn(&candidate.plan, cost.as_secs_f64());
        if let Err(error) = outcome {
            let StepPlan { phase, sessions, .. } = candidate.plan;
            let phase = phase.as_str();
            tracing::error!(phase, sessions, evicted = evicted.len(), %error, "a step failed; its sessions are ended");
            evicted.into_iter().for_each(|id| self.events.emit(id, Event::Failed(error.restate())));
            // A part of a model may be gone with another device.
            let problem = self.slot(candidate.runner).runner.problem();
            if let Err(problem) = problem.map_or_else(|| (self.health)(), Err) {
                return self.quarantine(&problem);
            }
        }
        self.give_back_borrowed(candidate.runner);
    }

    /// Reserves what the next step of a runner needs beside what its sessions have.
    fn reserve_borrowed(&mut self, runner: RunnerKey) -> Result<(), Shortage> {
        let needed_bytes = self.slot(runner).runner.borrowed_bytes();
        self.ledger.resize(Owner::Borrowed(runner), needed_bytes)
    }

    /// Gives back what a runner no longer needs. More is reserved before the step that needs it.
    fn give_back_borrowed(&mut self, runner: RunnerKey) {
        let needed = self.slot(runner).runner.borrowed_bytes();
        let held = self.ledger.held_bytes(Owner::Borrowed(runner));
        if needed < held && self.ledger.resize(Owner::Borrowed(runner), needed).is_ok() {
            self.admission_due = true;
        }
    }

    /// Ends the sessions of a step whose memory there is not.
    fn end_for_want_of_memory(&mut self, candidate: Candidate, shortage: Shortage) {
        let phase = candidate.plan.phase;
        let Shortage { needed_bytes, free_bytes } = shortage;
        tracing::warn!(
            phase = phase.as_str(),
            needed_bytes,
            free_bytes,
            "no memory for a step; its sessions are ended"
        );
        for id in self.slot_mut(candidate.runner).runner.evict_next() {
            let error = Error::OutOfMemory { phase: Some(phase), needed_bytes, free_bytes };
            self.events.emit(id, Event::Failed(error));
        }
        self.give_back_borrowed(candidate.runner);
    }

    fn wake_readers(&mut self) {
        self.to_wake.drain(..).for_each(|mailbox| mailbox.wake());
    }

    /// Puts what was said into the mailboxes and does the books of sessions that have ended.
    fn publish_events(&mut self) {
        let now = self.clock.now();
        let mut events = std::mem::take(&mut self.events);
        let mut drained = events.drain().peekable();
        while let Some((id, event)) = drained.next() {
            let is_followed = drained.peek().is_some_and(|(next, _)| *next == id);
            self.publish(id, event, now, is_followed);
        }
        drop(drained);
        self.events = events;
    }

    /// `is_followed` by another event of this session at once: waking the reader for each would take longer than the step.
    fn publish(&mut self, id: SessionId, event: Event, now: Duration, is_followed: bool) {
        let Some(live) = self.sessions.get_mut(&id) else { return };
        let slot = self.slots.get_mut(&live.model).expect(IS_THERE);
        let metrics = &slot.metrics;
        match &event {
            Event::Started if live.place.take().is_some() => {
                live.options.resume = None;
                metrics.queue_time(now.saturating_sub(live.submitted));
            }
            Event::Text { tokens, .. } if !tokens.is_empty() => {
                live.tokens.1 += tokens.len();
                let (wanted, done) = live.tokens;
                live.is_so_far(&self.gauges, done as f64 / wanted.max(1) as f64);
                match live.last_tokens.replace(now) {
                    Some(last) => metrics.inter_token(tokens.len(), now.saturating_sub(last)),
                    None => metrics.first_token(tokens.len(), now.saturating_sub(live.submitted)),
                }
            }
            Event::Progress { phase: phase @ (Phase::Denoise | Phase::VaeDecode), done, total } => {
                if *phase == Phase::Denoise {
                    live.is_so_far(&self.gauges, *done as f64 / (*total).max(1) as f64);
                }
                if live.options.checkpoints {
                    self.moved.push(id);
                }
            }
            Event::Finished { reason, usage } => metrics.finished(*reason, *usage),
            Event::Failed(Error::HandedOver) => metrics.handed_over(),
            Event::Failed(_) => metrics.failed(),
            _ => (),
        }
        let is_terminal = event.is_terminal();
        if is_terminal {
            // First the books, then the news: who hears of the end finds the memory free.
            if let Some(mailbox) = self.forget(id) {
                mailbox.put_last(event);
                self.to_wake.push(mailbox);
            }
        } else {
            live.mailbox.put(event);
            if is_followed {
                return;
            }
            // The reader may take it all before this line, and its command that there is room comes after it.
            if live.mailbox.becomes_full() {
                slot.runner.pause(id);
            }
            self.to_wake.push(live.mailbox.clone());
        }
    }

    /// There is room for frames of a session again.
    fn unpause(&mut self, id: SessionId) {
        if let Some(live) = self.sessions.get(&id) {
            self.slots.get_mut(&live.model).expect(IS_THERE).runner.unpause(id);
        }
    }

    fn fail(&mut self, id: SessionId, error: Error) {
        let now = self.clock.now();
        self.publish(id, Event::Failed(error), now, false);
    }

    fn cancel(&mut self, id: SessionId) {
        let Some(live) = self.sessions.get(&id) else { return };
        let model = live.model;
        self.slot_mut(model).metrics.cancelled();
        self.withdraw(id, model);
        if let Some(mailbox) = self.forget(id) {
            mailbox.close();
        }
    }

    /// Takes a session out of its runner and out of the queue before it.
    fn withdraw(&mut self, id: SessionId, model: RunnerKey) {
        self.slot_mut(model).runner.cancel(id);
        self.give_back_borrowed(model);
        self.slot_mut(model).queue.waiting.retain(|waiting| waiting.id != id);
    }

    /// Takes a session that its runner no longer holds out of all books.
    fn forget(&mut self, id: SessionId) -> Option<Arc<Mailbox>> {
        self.unbook(id).map(|live| live.mailbox)
    }

    fn unbook(&mut self, id: SessionId) -> Option<Live> {
        let live = self.sessions.remove(&id)?;
        self.ledger.release(Owner::Session(id));
        self.admission_due = true;
        let slot = self.slot_mut(live.model);
        slot.gauges.leave(live.shape, live.left_seconds);
        if live.is_handed_over {
            slot.queue.give_back(live.client);
        }
        Some(live)
    }

    fn publish_gauges(&self) {
        for slot in self.slots.values() {
            slot.gauges.publish(slot.runner.status());
        }
        self.gauges.ledger_used_bytes.store(self.ledger.used_bytes(), Relaxed);
    }

    /// Sessions are of runners that are there.
    fn slot(&self, model: RunnerKey) -> &Slot {
        self.slots.get(&model).expect(IS_THERE)
    }

    fn slot_mut(&mut self, model: RunnerKey) -> &mut Slot {
        self.slots.get_mut(&model).expect(IS_THERE)
    }
}

impl Live {
    /// Of what was predicted, so much is done.
    fn is_so_far(&mut self, gauges: &Gauges, done: f64) {
        let left = self.predicted_seconds * (1.0 - done).max(0.0);
        gauges.subtract_backlog((self.left_seconds - left).max(0.0));
        self.left_seconds = self.left_seconds.min(left);
    }
}

#[cfg(test)]
impl<C: Clock> DeviceWorker<C> {
    /// What [`super::Engine::submit`] counts and sends.
    pub(super) fn order(
        &mut self,
        id: u64,
        client: ClientId,
        model: RunnerKey,
        request: Request,
        mailbox: Arc<Mailbox>,
    ) -> Result<(), crate::places::NoPlace> {
        self.order_with(id, client, model, (request, SubmitOptions::default()), mailbox)
    }

    /// The same, as [`super::Engine::submit_if`].
    pub(super) fn order_with(
        &mut self,
        id: u64,
        client: ClientId,
        model: RunnerKey,
        (request, options): (Request, SubmitOptions),
        mailbox: Arc<Mailbox>,
    ) -> Result<(), crate::places::NoPlace> {
        let gauges = &self.slot(model).gauges;
        let place = gauges.queue.take(client)?;
        gauges.enter(Shape::of(&request), 0.0);
        let (id, predicted_seconds) = (SessionId(id), 0.0);
        self.submit(Order { id, client, model, request, mailbox, place, options, predicted_seconds });
        Ok(())
    }

    pub(super) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// As between two commands of [`DeviceWorker::run`]: whether there was something to do.
    pub(super) fn work(&mut self, commands: &Receiver<Command>) -> bool {
        self.gauges.set_idle(false);
        commands.try_iter().for_each(|command| self.handle(command));
        let worked = self.turn();
        self.gauges.set_idle(!worked);
        worked
    }

    pub(super) fn has_waiting(&self, runner: RunnerKey) -> bool {
        self.slot(runner).has_waiting()
    }

    pub(super) fn has_work(&self, runner: RunnerKey) -> bool {
        self.slot(runner).runner.next().is_some()
    }
}

/// However the thread ends, nobody waits for it for ever.
impl<C> Drop for DeviceWorker<C> {
    fn drop(&mut self) {
        self.gauges.dead.store(true, Relaxed);
        self.to_wake.drain(..).for_each(|mailbox| mailbox.wake());
        for (_, live) in self.sessions.drain() {
            live.mailbox.close();
        }
    }
}

/// The next command, whenever it comes; `None` when no handle is left. After a pause the host's memory that the last steps
/// used is the system's again.
fn next_command(commands: &Receiver<Command>) -> Option<Command> {
    match commands.recv_timeout(MEMORY_KEPT) {
        Ok(command) => Some(command),
        Err(RecvTimeoutError::Disconnected) => None,
        Err(RecvTimeoutError::Timeout) => {
            give_back_freed_memory();
            commands.recv().ok()
        }
    }
}

/// Runs model code; a panic becomes an error.
fn guarded<T>(work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    // Unwind safety: after a failure the runner is told to forget the sessions whose state may be half-written.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
        Err(Error::Panicked(text.unwrap_or_else(|| "no message".into())))
    })
}
