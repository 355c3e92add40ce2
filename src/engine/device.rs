//! One device as the rest of the engine sees it: its thread, where commands go, what it publishes.
//!
//! Owns: how such a thread starts and ends. Does not know: where models come from.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};

use tale_models::device::{DeviceSpec, Placement, keep_freed_memory, on_threads_of};
use tale_models::{LoadedModel, ModelCard};

use super::command::Command;
use super::gauges::{Gauges, ModelGauges};
use super::ledger::{Ledger, Owner};
use super::peers::Peer;
use super::worker::{DeviceWorker, Health, WallClock};
use super::{DeviceStatus, EngineError};
use crate::places::Places;

/// A device that computes.
#[derive(Debug)]
pub(super) struct DeviceHandle {
    pub(super) spec: DeviceSpec,
    pub(super) commands: Arc<Sender<Command>>,
    pub(super) gauges: Arc<Gauges>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// A model, and the queue in which its sessions wait.
pub(super) struct OnDevice {
    pub(super) name: String,
    pub(super) model: LoadedModel,
    pub(super) queue: Arc<Places>,
}

/// What a device's thread has made before it begins to work.
pub(super) struct Loaded {
    pub(super) models: Vec<OnDevice>,
    /// What parts of models take here that other devices lead.
    pub(super) parts_bytes: usize,
    /// For them and their sessions together.
    pub(super) capacity_bytes: usize,
    pub(super) health: Health,
    /// Where further models will live, if there is a device.
    pub(super) placement: Option<Placement>,
}

/// What the others hear of that.
pub(super) struct Prepared {
    /// In the order of the device's runners. Of the replicas of a model one card is taken.
    pub(super) cards: Vec<(String, Option<ModelCard>)>,
    pub(super) gauges: Arc<Gauges>,
    /// In the same order as the cards.
    pub(super) models: Vec<Arc<ModelGauges>>,
}

/// A device whose models are being loaded.
pub(super) struct Starting {
    spec: DeviceSpec,
    pub(super) commands: Arc<Sender<Command>>,
    thread: JoinHandle<()>,
    prepared: Receiver<Result<Prepared, EngineError>>,
    peers: Sender<Vec<Vec<Peer>>>,
}

impl Starting {
    /// Starts the thread, which makes what `load` says, and works when it knows its peers.
    pub(super) fn new(
        spec: DeviceSpec,
        load: impl FnOnce() -> Result<Loaded, EngineError> + Send + 'static,
    ) -> Result<Self, EngineError> {
        let (commands, receiver) = channel();
        let (tell, prepared) = sync_channel(1);
        let (peers, others) = channel();
        let work = move || match load().and_then(prepare) {
            Ok((ready, worker)) => {
                // The receiver is gone only when the caller is, and then there are no peers either.
                let _ = tell.send(Ok(ready));
                // Weights are where they stay; what follows comes again with every step.
                keep_freed_memory();
                if let Ok(peers) = others.recv() {
                    worker.beside(peers).run(&receiver);
                }
            }
            Err(error) => drop(tell.send(Err(error))),
        };
        let on_its_threads = move || {
            if let Err(error) = on_threads_of(spec, work) {
                tracing::error!(%error, "the device's threads could not be started");
            }
        };
        let thread = Builder::new().name(format!("device-{spec}")).spawn(on_its_threads);
        let thread = thread.map_err(|error| EngineError::Thread(error.to_string()))?;
        Ok(Self { spec, commands: Arc::new(commands), thread, prepared, peers })
    }

    /// Waits until its models are loaded.
    pub(super) fn prepared(&self) -> Result<Prepared, EngineError> {
        let ended = |_| EngineError::Thread(format!("{}: it ended while it loaded a model", self.spec));
        self.prepared.recv().map_err(ended)?
    }

    /// Lets it work.
    pub(super) fn begin(self, gauges: Arc<Gauges>, peers: Vec<Vec<Peer>>) -> DeviceHandle {
        let Self { spec, commands, thread, peers: others, .. } = self;
        // An error means that the thread has ended, which its gauges say.
        let _ = others.send(peers);
        DeviceHandle { spec, commands, gauges, thread: Mutex::new(Some(thread)) }
    }
}

impl DeviceHandle {
    pub(super) fn status(&self) -> DeviceStatus {
        DeviceStatus {
            device: self.spec,
            alive: self.gauges.is_alive(),
            problem: self.gauges.problem(),
            ledger_used_bytes: self.gauges.ledger_used_bytes.load(Relaxed),
            ledger_capacity_bytes: self.gauges.ledger_capacity_bytes.load(Relaxed),
        }
    }

    /// Whether sessions of it have not ended, and it works on them.
    pub(super) fn is_busy(&self) -> bool {
        self.gauges.is_alive() && self.gauges.live() > 0
    }

    /// Tells it to end its sessions after its step, and to begin none. An error means that it has ended already.
    pub(super) fn hand_over(&self) {
        let _ = self.commands.send(Command::HandOver);
    }

    /// Tells it to end after its step. An error means that it has ended already.
    pub(super) fn stop(&self) {
        let _ = self.commands.send(Command::Stop);
    }

    /// Waits until it has ended.
    pub(super) fn join(&self) {
        let thread = self.thread.lock().expect("nothing panics while it holds the handle: this is a bug").take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(device = %self.spec, "the device's thread had panicked");
        }
    }
}

/// Books the models' memory and puts cards and runners into the hands that need them.
fn prepare(loaded: Loaded) -> Result<(Prepared, DeviceWorker<WallClock>), EngineError> {
    let Loaded { models, parts_bytes, capacity_bytes, health, placement } = loaded;
    let mut ledger = Ledger::new(capacity_bytes);
    // That they fit was seen before anything was loaded.
    ledger.reserve(Owner::Parts, parts_bytes.min(capacity_bytes)).expect("an empty ledger has room: this is a bug");
    let (mut cards, mut runners, mut queues) = (Vec::new(), Vec::new(), Vec::new());
    for (index, OnDevice { name, model, queue }) in models.into_iter().enumerate() {
        ledger.reserve(Owner::Model(index), model.resident_bytes).map_err(|shortage| EngineError::Load {
            model: name.clone(),
            source: Box::new(tale_models::Error::OutOfMemory {
                phase: None,
                needed_bytes: shortage.needed_bytes,
                free_bytes: shortage.free_bytes,
            }),
        })?;
        runners.push((name.clone(), model.runner));
        cards.push((name, Some(model.card)));
        queues.push(queue);
    }
    let room_bytes = ledger.session_capacity_bytes();
    runners.iter_mut().for_each(|(_, runner)| runner.set_room(room_bytes));
    let worker = DeviceWorker::new(runners, queues, ledger, WallClock::default()).watching(health).at(placement);
    let (gauges, models) = (worker.gauges(), worker.model_gauges());
    Ok((Prepared { cards, gauges, models }, worker))
}
