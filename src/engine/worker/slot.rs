//! A runner of a device, and what stands in front of it.
//!
//! Owns: the queue of one runner, in which clients take turns. Does not know: memory, other runners.

use std::collections::HashMap;
use std::sync::Arc;

use tale_models::runner::fair_queue::FairQueue;
use tale_models::{ClientId, Request, Runner, SessionId};

use crate::engine::gauges::ModelGauges;
use crate::engine::peers::Peer;
use crate::places::may_take;
use crate::telemetry::ModelMetrics;

/// A runner and everything that is there for it alone.
pub(super) struct Slot {
    pub(super) runner: Box<dyn Runner>,
    pub(super) metrics: ModelMetrics,
    pub(super) gauges: Arc<ModelGauges>,
    pub(super) queue: Queue,
    /// The other devices of its model.
    pub(super) peers: Vec<Peer>,
}

impl Slot {
    /// Nothing waits for it yet.
    pub(super) fn new(name: &str, runner: Box<dyn Runner>, gauges: Arc<ModelGauges>) -> Self {
        Self { runner, metrics: ModelMetrics::new(name), gauges, queue: Queue::default(), peers: Vec::new() }
    }

    /// Whether sessions have not begun.
    pub(super) fn has_waiting(&self) -> bool {
        !self.queue.waiting.is_empty() || self.runner.status().waiting > 0
    }
}

/// What stands in front of one runner.
#[derive(Default)]
pub(super) struct Queue {
    /// Their memory is not reserved yet.
    pub(super) waiting: FairQueue<Waiting>,
    /// How many sessions of each client the runner has; no client stands here with none.
    held: HashMap<ClientId, usize>,
}

impl Queue {
    /// Whose turn it is, and its session.
    pub(super) fn next(&self) -> Option<(ClientId, &Waiting)> {
        self.waiting.turns(|client| self.held(client)).peek()
    }

    fn held(&self, client: ClientId) -> usize {
        self.held.get(&client).copied().unwrap_or(0)
    }

    /// Whether a runner of so many places takes one more session of this client: one client leaves some to the others.
    pub(super) fn may_begin(&self, client: ClientId, max_sessions: usize) -> bool {
        let held: usize = self.held.values().sum();
        may_take(self.held(client), max_sessions.saturating_sub(held))
    }

    pub(super) fn take(&mut self, client: ClientId) -> Option<Waiting> {
        let waiting = self.waiting.take(client)?;
        *self.held.entry(client).or_default() += 1;
        Some(waiting)
    }

    /// The runner has one session of this client less.
    pub(super) fn give_back(&mut self, client: ClientId) {
        let held = self.held(client).saturating_sub(1);
        match held {
            0 => self.held.remove(&client),
            held => self.held.insert(client, held),
        };
    }
}

/// A session in front of a runner.
pub(super) struct Waiting {
    pub(super) id: SessionId,
    pub(super) request: Request,
    pub(super) footprint_bytes: usize,
    pub(super) overtaken: usize,
}
