//! The other devices that hold a model, as a device's thread sees them.
//!
//! Owns: the way of a session that has not begun from a device that is busy to one that has nothing to do. A device knows the others
//! weakly: it keeps none of their threads from ending.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Weak};

use super::arbiter::RunnerKey;
use super::command::{Command, Order};
use super::gauges::ModelGauges;
use super::shapes::Shape;

/// Another device that holds a model.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    commands: Weak<Sender<Command>>,
    /// Of the model there.
    gauges: Arc<ModelGauges>,
    /// Which of its runners has the model.
    runner: RunnerKey,
}

impl Peer {
    pub(super) fn new(commands: &Arc<Sender<Command>>, gauges: Arc<ModelGauges>, runner: RunnerKey) -> Self {
        Self { commands: Arc::downgrade(commands), gauges, runner }
    }

    /// Whether it had nothing to do; it expects something then.
    pub(super) fn take_idleness(&self) -> bool {
        self.gauges.device.take_idleness()
    }

    /// There is nothing for it after all.
    pub(super) fn give_idleness_back(&self) {
        self.gauges.device.set_idle(true);
    }

    pub(super) fn is_alive(&self) -> bool {
        self.gauges.device.is_alive()
    }

    pub(super) fn backlog_seconds(&self) -> f64 {
        self.gauges.device.backlog_seconds()
    }

    /// Hands a session over; it comes back where the other's thread has ended.
    pub(super) fn give(&self, order: Order) -> Result<(), Box<Order>> {
        let Some(commands) = self.commands.upgrade() else { return Err(Box::new(order)) };
        let predicted = order.predicted_seconds;
        let shape = Shape::of(&order.request);
        self.gauges.enter(shape, predicted);
        let command = Command::Submit(Order { model: self.runner, ..order });
        commands.send(command).map_err(|unsent| {
            self.gauges.leave(shape, predicted);
            match unsent.0 {
                Command::Submit(order) => Box::new(order),
                _ => unreachable!("what comes back is what was sent: this is a bug"),
            }
        })
    }
}
