//! Models come to a device and go while others work there.
//!
//! Owns: the steps of their loading, which take turns with those of runners, and the books of their memory. Does not know: which
//! models should be there ([`crate::engine::lifecycle`]), or how one is read ([`crate::engine::coming`]).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::Sender;

use tale_models::device::give_back_freed_memory;
use tale_models::request::Phase;
use tale_models::runner::StepPlan;
use tale_models::{Error, LoadedModel, SessionId};

use super::slot::Slot;
use super::{Clock, DeviceWorker, guarded};
use crate::engine::arbiter::{Candidate, RunnerKey};
use crate::engine::coming::{Arrival, Arrived, Loading, Progress};
use crate::engine::gauges::ModelGauges;
use crate::engine::ledger::{Owner, Shortage};
use crate::places::Places;

/// A model on its way to this device.
pub(super) struct Coming {
    name: String,
    queue: Arc<Places>,
    loading: Box<dyn Loading>,
    progress: Arc<Progress>,
    /// Hears of its end.
    told: Sender<Result<Arrived, Error>>,
}

/// By the key that its runner will have.
pub(super) type AllComing = BTreeMap<RunnerKey, Coming>;

impl<C: Clock> DeviceWorker<C> {
    /// What models on their way would do next.
    pub(super) fn loading_steps(&self) -> impl Iterator<Item = Candidate> {
        let plan = StepPlan { phase: Phase::Load, sessions: 0, amount: 0.0 };
        self.coming.keys().map(move |runner| Candidate { runner: *runner, plan })
    }

    /// Reserves the memory of a model and begins to load it, or says what is in the way.
    pub(super) fn begin_to_load(&mut self, runner: RunnerKey, arrival: Arrival) {
        let Arrival { name, queue, resident_bytes, begin, progress, begun, told } = arrival;
        if let Err(error) = self.reserve_for_model(runner, resident_bytes) {
            // An error means that nobody waits any longer: then there is nothing to load either.
            return drop(begun.send(Err(error)));
        }
        let placement = self.placement.as_ref();
        match guarded(|| begin(placement)) {
            Ok(loading) => {
                self.arbiter.enter(runner, 1.0);
                self.coming.insert(runner, Coming { name, queue, loading, progress, told });
                let _ = begun.send(Ok(()));
                self.room_has_changed();
            }
            Err(error) => {
                self.ledger.release(Owner::Model(runner));
                let _ = begun.send(Err(error));
            }
        }
    }

    /// A session that has been accepted keeps its room.
    fn reserve_for_model(&mut self, runner: RunnerKey, resident_bytes: usize) -> Result<(), Error> {
        if let Some(problem) = self.gauges.problem() {
            return Err(Error::Device(problem));
        }
        let largest = self.slots.values().flat_map(|slot| slot.queue.waiting.iter());
        let largest = largest.map(|waiting| waiting.footprint_bytes).max().unwrap_or(0);
        let for_waiting = self.ledger.session_capacity_bytes().saturating_sub(largest);
        let free_bytes = self.ledger.free_bytes().min(for_waiting);
        let short = |needed_bytes| Error::OutOfMemory { phase: None, needed_bytes, free_bytes };
        if resident_bytes > free_bytes {
            return Err(short(resident_bytes));
        }
        let reserved = self.ledger.reserve(Owner::Model(runner), resident_bytes);
        reserved.map_err(|Shortage { needed_bytes, .. }| short(needed_bytes))
    }

    /// One bounded step of a model's loading.
    pub(super) fn load_on(&mut self, candidate: Candidate) {
        let runner = candidate.runner;
        let Some(coming) = self.coming.get_mut(&runner) else { return };
        let before = self.clock.now();
        let outcome = guarded(|| coming.loading.advance());
        coming.progress.note(runner, coming.loading.bytes());
        let cost = self.clock.now().saturating_sub(before);
        self.arbiter.report(candidate, cost);
        match outcome {
            Ok(None) => (),
            Ok(Some(model)) => self.has_come(runner, model),
            Err(error) => {
                self.has_not_come(runner, error);
                if let Err(problem) = (self.health)() {
                    self.quarantine(&problem);
                }
            }
        }
    }

    fn has_come(&mut self, runner: RunnerKey, model: LoadedModel) {
        let LoadedModel { card, runner: mut driver, resident_bytes, .. } = model;
        // What it takes was foretold by its headers.
        if let Err(Shortage { needed_bytes, free_bytes }) = self.ledger.resize(Owner::Model(runner), resident_bytes) {
            drop(driver);
            return self.has_not_come(runner, Error::OutOfMemory { phase: None, needed_bytes, free_bytes });
        }
        let Some(Coming { name, queue, told, .. }) = self.coming.remove(&runner) else { return };
        let gauges = Arc::new(ModelGauges::new(self.gauges.clone(), queue));
        gauges.resident_bytes.store(resident_bytes, Relaxed);
        driver.set_room(self.ledger.session_capacity_bytes());
        self.slots.insert(runner, Slot::new(&name, driver, gauges.clone()));
        // The time of its loading is nothing that the runner owes.
        self.arbiter.leave(runner);
        self.arbiter.enter(runner, 1.0);
        self.room_has_changed();
        let _ = told.send(Ok(Arrived { card, gauges }));
    }

    fn has_not_come(&mut self, runner: RunnerKey, error: Error) {
        let Some(Coming { name, told, .. }) = self.coming.remove(&runner) else { return };
        tracing::error!(model = name, %error, "the model could not be loaded");
        self.gone(runner);
        let _ = told.send(Err(error));
    }

    /// Ends the sessions that a model still has, and frees what it holds.
    pub(super) fn unload(&mut self, runner: RunnerKey) {
        let of_runner = self.sessions.iter().filter(|(_, live)| live.model == runner);
        let mut ids: Vec<SessionId> = of_runner.map(|(id, _)| *id).collect();
        ids.sort_unstable();
        for id in ids {
            let Slot { runner: driver, queue, .. } = self.slot_mut(runner);
            // What panics now is dropped next.
            let _ = guarded(|| {
                driver.cancel(id);
                Ok(())
            });
            queue.waiting.retain(|waiting| waiting.id != id);
            self.fail(id, Error::Unloaded);
        }
        if let Some(slot) = self.slots.remove(&runner) {
            slot.gauges.publish(Default::default());
            let dropped = guarded(|| {
                drop(slot);
                Ok(())
            });
            if let Err(error) = dropped {
                tracing::error!(%error, "a model could not be dropped");
            }
        }
        if let Some(Coming { loading, .. }) = self.coming.remove(&runner) {
            drop(loading);
        }
        self.gone(runner);
    }

    /// No runner has this key any more.
    fn gone(&mut self, runner: RunnerKey) {
        self.ledger.release(Owner::Borrowed(runner));
        self.ledger.release(Owner::Model(runner));
        self.arbiter.leave(runner);
        give_back_freed_memory();
        self.room_has_changed();
    }

    /// Models have come or gone: what sessions may take is more or less, and requests that wait are planned for that.
    fn room_has_changed(&mut self) {
        let room_bytes = self.ledger.session_capacity_bytes();
        self.gauges.room_bytes.store(room_bytes, Relaxed);
        for Slot { runner, queue, .. } in self.slots.values_mut() {
            runner.set_room(room_bytes);
            for waiting in queue.waiting.iter_mut() {
                if let Ok(plan) = guarded(|| Ok(runner.plan(&waiting.request))) {
                    waiting.footprint_bytes = plan.peak_bytes();
                }
            }
        }
        self.admission_due = true;
        self.publish_gauges();
    }

    /// The device has failed: nothing comes any more.
    pub(super) fn stop_loading(&mut self, problem: &Error) {
        let coming: Vec<RunnerKey> = self.coming.keys().copied().collect();
        coming.into_iter().for_each(|runner| self.has_not_come(runner, problem.restate()));
    }
}
