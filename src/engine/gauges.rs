//! Numbers that a device's thread publishes and everybody may read.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use tale_models::runner::RunnerStatus;

use super::rates::Rates;
use super::shapes::{Shape, Shapes};
use crate::places::Places;

/// Of one device.
#[derive(Debug, Default)]
pub(super) struct Gauges {
    /// Sessions of all its runners that are submitted and not ended.
    live: AtomicUsize,
    /// The thread has ended, or takes no work since the device has failed.
    pub(super) dead: AtomicBool,
    /// Why the device takes no work, where that is known.
    problem: Mutex<Option<String>>,
    /// The thread has nothing to do. Whoever sets it to false gives it something.
    idle: AtomicBool,
    /// Nanoseconds that all its sessions will still take, as far as that was predicted.
    backlog: AtomicU64,
    pub(super) ledger_used_bytes: AtomicUsize,
    pub(super) ledger_capacity_bytes: AtomicUsize,
    /// What sessions may take beside the models that are there.
    pub(super) room_bytes: AtomicUsize,
}

/// Of one runner.
#[derive(Debug)]
pub(super) struct ModelGauges {
    /// Of the device.
    pub(super) device: Arc<Gauges>,
    /// Sessions that are submitted and not begun hold a place. All replicas of a model have one queue.
    pub(super) queue: Arc<Places>,
    /// Submitted and not ended.
    live: AtomicUsize,
    /// What its model holds all the time.
    pub(super) resident_bytes: AtomicUsize,
    running: AtomicUsize,
    waiting: AtomicUsize,
    kv_blocks_used: AtomicUsize,
    kv_blocks_total: AtomicUsize,
    rates: Mutex<Rates>,
    /// Of the live ones.
    shapes: Mutex<Shapes>,
}

const NOTHING_PANICS: &str = "nothing panics while it holds this: this is a bug";

impl Gauges {
    /// Sessions that are submitted and not ended.
    pub(super) fn live(&self) -> usize {
        self.live.load(Relaxed)
    }

    pub(super) fn is_alive(&self) -> bool {
        !self.dead.load(Relaxed)
    }

    pub(super) fn problem(&self) -> Option<String> {
        self.problem.lock().expect(NOTHING_PANICS).clone()
    }

    pub(super) fn fail(&self, problem: String) {
        *self.problem.lock().expect(NOTHING_PANICS) = Some(problem);
        self.dead.store(true, Relaxed);
    }

    pub(super) fn set_idle(&self, is_idle: bool) {
        self.idle.store(is_idle, Relaxed);
    }

    /// Whether it had nothing to do; it is taken to have something from now on.
    pub(super) fn take_idleness(&self) -> bool {
        self.is_alive() && self.idle.swap(false, Relaxed)
    }

    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.idle.load(Relaxed)
    }

    pub(super) fn backlog_seconds(&self) -> f64 {
        self.backlog.load(Relaxed) as f64 * 1e-9
    }

    fn add_backlog(&self, seconds: f64) {
        self.backlog.fetch_add(nanoseconds(seconds), Relaxed);
    }

    /// Less than nothing is never left: both are rounded.
    pub(super) fn subtract_backlog(&self, seconds: f64) {
        let less = nanoseconds(seconds);
        let subtract = |backlog: u64| Some(backlog.saturating_sub(less));
        // The closure never refuses.
        let _ = self.backlog.fetch_update(Relaxed, Relaxed, subtract);
    }
}

/// Casts of floats saturate.
fn nanoseconds(seconds: f64) -> u64 {
    (seconds * 1e9).round() as u64
}

impl ModelGauges {
    /// Of a runner whose sessions wait in this queue.
    pub(super) fn new(device: Arc<Gauges>, queue: Arc<Places>) -> Self {
        Self {
            device,
            queue,
            live: AtomicUsize::default(),
            resident_bytes: AtomicUsize::default(),
            running: AtomicUsize::default(),
            waiting: AtomicUsize::default(),
            kv_blocks_used: AtomicUsize::default(),
            kv_blocks_total: AtomicUsize::default(),
            rates: Mutex::default(),
            shapes: Mutex::default(),
        }
    }

    /// Sessions that are submitted and not ended.
    pub(super) fn live(&self) -> usize {
        self.live.load(Relaxed)
    }

    /// A session more is submitted, or comes from another device, which is expected to take so many seconds.
    pub(super) fn enter(&self, shape: Option<Shape>, seconds: f64) {
        if let Some(shape) = shape {
            self.shapes.lock().expect(NOTHING_PANICS).add(shape);
        }
        self.live.fetch_add(1, Relaxed);
        self.device.live.fetch_add(1, Relaxed);
        self.device.add_backlog(seconds);
    }

    /// A session has ended, or goes to another device, with so many of its seconds left.
    pub(super) fn leave(&self, shape: Option<Shape>, seconds: f64) {
        if let Some(shape) = shape {
            self.shapes.lock().expect(NOTHING_PANICS).remove(shape);
        }
        self.live.fetch_sub(1, Relaxed);
        self.device.live.fetch_sub(1, Relaxed);
        self.device.subtract_backlog(seconds);
    }

    /// Live sessions of this shape.
    pub(super) fn live_of(&self, shape: Shape) -> usize {
        self.shapes.lock().expect(NOTHING_PANICS).count(shape)
    }

    pub(super) fn rates(&self) -> MutexGuard<'_, Rates> {
        self.rates.lock().expect(NOTHING_PANICS)
    }

    pub(super) fn publish(&self, status: RunnerStatus) {
        self.running.store(status.running, Relaxed);
        self.waiting.store(status.waiting, Relaxed);
        self.kv_blocks_used.store(status.kv_blocks_used, Relaxed);
        self.kv_blocks_total.store(status.kv_blocks_total, Relaxed);
    }

    pub(super) fn runner(&self) -> RunnerStatus {
        RunnerStatus {
            running: self.running.load(Relaxed),
            waiting: self.waiting.load(Relaxed),
            kv_blocks_used: self.kv_blocks_used.load(Relaxed),
            kv_blocks_total: self.kv_blocks_total.load(Relaxed),
        }
    }
}
