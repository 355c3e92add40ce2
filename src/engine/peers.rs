//! The other devices that hold a model, as a device's thread sees them.
//!
//! Owns: the way of a session that has not begun from a device that is busy to one that has nothing to do. A device knows the others
//! weakly: it keeps none of their threads from ending.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Weak};

use super::command::{Command, Order};
use super::gauges::Gauges;

/// Another device that holds a model.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    commands: Weak<Sender<Command>>,
    gauges: Arc<Gauges>,
    /// Which of its runners has the model.
    runner: usize,
}

impl Peer {
    pub(super) fn new(commands: &Arc<Sender<Command>>, gauges: Arc<Gauges>, runner: usize) -> Self {
        Self { commands: Arc::downgrade(commands), gauges, runner }
    }

    /// Whether it had nothing to do; it expects something then.
    pub(super) fn take_idleness(&self) -> bool {
        self.gauges.take_idleness()
    }

    /// There is nothing for it after all.
    pub(super) fn give_idleness_back(&self) {
        self.gauges.set_idle(true);
    }

    pub(super) fn is_alive(&self) -> bool {
        self.gauges.is_alive()
    }

    pub(super) fn backlog_seconds(&self) -> f64 {
        self.gauges.backlog_seconds()
    }

    /// Hands a session over; it comes back where the other's thread has ended.
    pub(super) fn give(&self, order: Order) -> Result<(), Box<Order>> {
        let Some(commands) = self.commands.upgrade() else { return Err(Box::new(order)) };
        let predicted = order.predicted_seconds;
        let gauges = &self.gauges.models[self.runner];
        gauges.live.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.gauges.add_backlog(predicted);
        let command = Command::Submit(Order { model: self.runner, ..order });
        commands.send(command).map_err(|unsent| {
            gauges.live.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
            self.gauges.subtract_backlog(predicted);
            match unsent.0 {
                Command::Submit(order) => Box::new(order),
                _ => unreachable!("what comes back is what was sent: this is a bug"),
            }
        })
    }
}
