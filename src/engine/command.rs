//! What a device's thread is asked for.
//!
//! Owns: the words. Does not know: who asks, or what becomes of it.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use tale_models::{ClientId, Request, SessionId};

use super::SubmitOptions;
use super::arbiter::RunnerKey;
use super::coming::Arrival;
use super::gauges::ModelGauges;
use super::mailbox::Mailbox;
use crate::places::Place;

/// What handles ask of the device thread.
#[derive(Debug)]
// Most commands are the large one, and each is moved twice.
#[allow(clippy::large_enum_variant)]
pub(super) enum Command {
    /// Begin a session.
    Submit(Order),
    /// Forget a session; it may have ended already.
    Cancel(SessionId),
    /// The mailbox of a session was full and has room again; the session may have ended already.
    Unpause(SessionId),
    /// Say what a session needs to go on elsewhere; it may have ended already.
    Checkpoint(SessionId),
    /// End everything, each session that can with what it needs to go on elsewhere; begin nothing more.
    HandOver,
    /// Begin to load a model, whose runner will have this key.
    Load(RunnerKey, Box<Arrival>),
    /// From now on a runner has these peers; said when it is so.
    Join(RunnerKey, Vec<Neighbour>, Sender<()>),
    /// End the sessions of a runner, and free what its model holds, loaded or not; said when it is done.
    Unload(RunnerKey, Sender<()>),
    /// Cancel everything and end the thread.
    Stop,
}

/// Another device that holds a runner's model.
#[derive(Debug)]
pub(super) struct Neighbour {
    pub(super) commands: Arc<Sender<Command>>,
    /// Of the model there.
    pub(super) gauges: Arc<ModelGauges>,
    /// Which of its runners has the model.
    pub(super) runner: RunnerKey,
}

/// A session that is ordered.
#[derive(Debug)]
pub(super) struct Order {
    /// Its id, greater than all before.
    pub(super) id: SessionId,
    /// Whose it is.
    pub(super) client: ClientId,
    /// The runner of its model.
    pub(super) model: RunnerKey,
    /// Validated.
    pub(super) request: Request,
    /// Where its events go.
    pub(super) mailbox: Arc<Mailbox>,
    /// In the model's queue, until it begins.
    pub(super) place: Place,
    /// See there.
    pub(super) options: SubmitOptions,
    /// What it was expected to take where it was sent first; in the backlog of its device.
    pub(super) predicted_seconds: f64,
}
