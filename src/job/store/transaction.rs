//! What the works on jobs ask of a store: a transaction over rows, and a way to run works in one.
//!
//! Owns: the boundary between what happens to jobs, which is the same in all stores, and how rows are kept. Does not know:
//! databases.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;

use super::row::{Ended, Moment, Row};
use super::{Claimer, Filter, Listing, Message, Page, Priority, Retention, StoreError};
use crate::job::JobId;

/// The jobs of one owner and one priority.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowName {
    /// The owner.
    pub owner: String,
    /// The priority.
    pub priority: Priority,
}

impl FlowName {
    /// The flow of a row.
    pub fn of(row: &Row) -> Self {
        Self { owner: row.record.owner.clone(), priority: row.record.priority }
    }
}

/// Rows as they stand, held until the end, when all changes are kept or none. A work looks first and changes rows afterwards, so that
/// whoever refuses it has changed nothing.
///
/// Locks are taken in one order, so that no two transactions wait for each other: places, jobs, flows, turns; several jobs by
/// flow and age, so that several flows come in their order.
#[async_trait]
pub trait Transaction: Send {
    /// The time, the same until the end.
    async fn now(&mut self) -> Result<Moment, StoreError>;

    /// Nobody else counts places until the end.
    async fn hold_places(&mut self) -> Result<(), StoreError>;

    /// Jobs that have not ended, in all and of this owner.
    async fn num_active(&mut self, owner: &str) -> Result<(usize, usize), StoreError>;

    /// A job as it stands, held by nobody.
    async fn look(&mut self, id: JobId) -> Result<Option<Row>, StoreError>;

    /// A job, which nobody else changes until the end.
    async fn hold(&mut self, id: JobId) -> Result<Option<Row>, StoreError>;

    /// The job that the owner has ordered under this name.
    async fn ordered(&mut self, owner: &str, key: &str) -> Result<Option<Row>, StoreError>;

    /// Adds a job, and gives it its place by time of order.
    async fn insert(&mut self, row: &mut Row) -> Result<(), StoreError>;

    /// Keeps what has changed of a job.
    async fn update(&mut self, row: &Row) -> Result<(), StoreError>;

    /// Forgets a job.
    async fn delete(&mut self, id: JobId) -> Result<(), StoreError>;

    /// The job whose turn it is, held; [`Row::is_for`] says among which, [`super::flow`] in which order. One that is held elsewhere
    /// is somebody else's.
    async fn next(&mut self, claimer: &Claimer) -> Result<Option<Row>, StoreError>;

    /// Jobs that have lapsed, as [`Row::has_lapsed`] says, held, by flow and age. One that is held elsewhere is not among them.
    async fn lapsed(&mut self) -> Result<Vec<Row>, StoreError>;

    /// Jobs that have ended.
    async fn ended(&mut self) -> Result<Vec<Ended>, StoreError>;

    /// Forgets an ended job; `None` when it is gone or has not ended any more.
    async fn take_ended(&mut self, seq: i64) -> Result<Option<Row>, StoreError>;

    /// A page of a list; `None` when `page.after` names no job.
    async fn page(&mut self, filter: &Filter, page: &Page) -> Result<Option<Listing>, StoreError>;

    /// Running jobs by age, then those that may be claimed in their order, then those whose time has not come.
    async fn queue(&mut self, limit: usize) -> Result<Vec<Row>, StoreError>;

    /// The time of a flow, held; `None` when it has none yet.
    async fn time(&mut self, flow: &FlowName) -> Result<Option<i64>, StoreError>;

    /// Sets the time of a flow.
    async fn set_time(&mut self, flow: &FlowName, time: i64) -> Result<(), StoreError>;

    /// Whether a job of the flow keeps it awake, as [`Row::is_rousing`] says.
    async fn is_awake(&mut self, flow: &FlowName) -> Result<bool, StoreError>;

    /// The turn of a model.
    async fn turn(&mut self, model: &str) -> Result<Option<i64>, StoreError>;

    /// Sets the turn of a model.
    async fn set_turn(&mut self, model: &str, turn: i64) -> Result<(), StoreError>;

    /// Forgets flows without jobs whose time a turn has passed, and turns of models without jobs where no flow is left.
    async fn forget_flows(&mut self) -> Result<(), StoreError>;

    /// Adds a message, due at once.
    async fn post(&mut self, message: &Message) -> Result<(), StoreError>;

    /// Messages that are due, oldest first; they are due again after `lease`, with one attempt more.
    async fn due(&mut self, limit: usize, lease: Duration) -> Result<Vec<Message>, StoreError>;

    /// A message is due again after so long, or gone.
    async fn settle(&mut self, message: &str, again: Option<Duration>) -> Result<(), StoreError>;

    /// Writes something that means nothing.
    async fn touch(&mut self) -> Result<(), StoreError>;

    /// There is news for whoever waits, once this is kept.
    async fn announce(&mut self) -> Result<(), StoreError>;
}

/// Something that is done with jobs, as a whole or not at all. It may be done anew when a store asks for that, so it changes nothing
/// of its own.
#[async_trait]
pub trait Work: fmt::Debug + Send + Sync + 'static {
    /// What it finds or makes.
    type Answer: Send + 'static;

    /// Whether what it wrote has to survive a loss of power; what does not costs no wait for a disk.
    const IS_DURABLE: bool = true;

    /// Does it.
    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<Self::Answer, StoreError>;
}

/// Runs works.
#[async_trait]
pub trait Executor: fmt::Debug + Send + Sync {
    /// How much is kept.
    fn retention(&self) -> Retention;

    /// Does a work, and keeps what it changed. A work that has begun is finished even if nobody waits for it any more.
    async fn write<W: Work>(&self, work: W) -> Result<W::Answer, StoreError>;

    /// Does a work that changes nothing, beside those that do.
    async fn read<W: Work>(&self, work: W) -> Result<W::Answer, StoreError>;

    /// Waits until something is announced, at most so long.
    async fn wait(&self, at_most: Duration);
}
