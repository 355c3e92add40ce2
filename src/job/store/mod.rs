//! Where jobs live: rows that survive the process, and the rules by which nodes share them.
//!
//! Owns: what a row holds, who may write it when, and the order in which rows are worked off. What a job asks for, how far it is and what came of it are text that
//! the store keeps and does not read. Does not know: models, sessions, files, HTTP.
//!
//! # Time
//! Each store has one clock, which all nodes that share it go by: PostgreSQL's own, or that of the only process. No moment of a
//! node's clock is ever compared with one of another's; nodes hand over durations.
//!
//! # Leases
//! A node that claims a job holds a [`Lease`] with the job's *epoch*, which every claim raises. Each write of a job's holder names
//! the lease, and the store refuses it with [`StoreError::Fenced`] where the epoch is another one, or the job is not running: the
//! job is somebody else's then, and whatever the node has of it is void. A lease ends after [`Claimer::lease`] without
//! [`JobStore::renew`]; [`JobStore::reap`] gives such jobs back to the queue.

use std::fmt;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;

use super::JobId;
use crate::places::NoPlace;

mod clock;
pub mod flow;
mod memory;
mod postgres;
mod row;
mod sql;
mod sqlite;
mod transaction;
mod works;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod kill;
#[cfg(test)]
mod outage;
#[cfg(test)]
mod simulation;

pub use memory::MemoryStore;
pub use postgres::PostgresStore;
pub use sqlite::SqliteStore;

/// How urgent a job is. A class has so many times the device time of the next one while both wait; none waits for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// Somebody looks at a screen.
    Interactive,
    /// Everything else.
    Standard,
    /// Whenever there is time.
    Batch,
}

impl Priority {
    /// All of them, most urgent first.
    pub const ALL: [Self; 3] = [Self::Interactive, Self::Standard, Self::Batch];

    /// Its name, in the API and in stores.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Standard => "standard",
            Self::Batch => "batch",
        }
    }
}

/// A job as it is ordered.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// Its name.
    pub id: JobId,
    /// Whose it is: jobs of one owner share its turn. At most 255 bytes.
    pub owner: String,
    /// How urgent.
    pub priority: Priority,
    /// The model that makes it; only nodes that serve it claim it.
    pub model: String,
    /// What is asked for.
    pub spec: String,
    /// Device time that it is expected to take, in seconds; above 0.
    pub cost_seconds: f64,
    /// Nobody claims it before so much time has gone.
    pub wait: Duration,
    /// It fails if it has not ended by then.
    pub deadline: Option<Duration>,
    /// The owner's name for the order, and a hash of what the owner sent: the same name and hash is the same job.
    pub idempotency: Option<Idempotency>,
    /// Who hears of its end.
    pub webhook: Option<String>,
}

/// The owner's name for an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Idempotency {
    /// At most 255 bytes.
    pub key: String,
    /// Of everything that the client sent.
    pub request_hash: [u8; 32],
}

/// A job as it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct JobRecord {
    /// Its name.
    pub id: JobId,
    /// Whose it is.
    pub owner: String,
    /// How urgent.
    pub priority: Priority,
    /// The model that makes it.
    pub model: String,
    /// What was asked for.
    pub spec: String,
    /// Device time that it is expected to take, in seconds.
    pub cost_seconds: f64,
    /// Where it stands.
    pub state: RecordState,
    /// When it was ordered.
    pub created: SystemTime,
    /// When its device first began.
    pub started: Option<SystemTime>,
    /// When the state became terminal.
    pub ended: Option<SystemTime>,
    /// When it fails if it has not ended.
    pub deadline: Option<SystemTime>,
    /// How often it was claimed and not handed over.
    pub attempts: u32,
    /// How often in a row a node that held it went silent before it had come further.
    pub crashes: u32,
    /// What its holder said last of how far it is, with the number of that; volatile. Numbers rise by one with each change of the
    /// state or the progress, from 0 when it was ordered, whichever node holds it.
    pub progress: Option<String>,
    /// Number of the last change of state or progress.
    pub change: u64,
    /// Where its holder goes on from.
    pub checkpoint: Option<String>,
    /// Somebody wants it to end.
    pub is_cancelled: bool,
}

/// Where a job stands.
#[derive(Debug, Clone, PartialEq)]
pub enum RecordState {
    /// Nobody has it.
    Queued,
    /// A node has it.
    Running {
        /// The node's name.
        node: String,
    },
    /// It is made.
    Completed {
        /// What came of it.
        result: String,
        /// Bytes that are kept for it.
        file_bytes: u64,
    },
    /// It ended without a result.
    Failed {
        /// For programs.
        code: String,
        /// For people.
        message: String,
    },
    /// Its owner did not want it any more.
    Cancelled,
}

impl RecordState {
    /// Its name, in the API and in stores.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running { .. } => "in_progress",
            Self::Completed { .. } => "completed",
            Self::Failed { .. } => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing follows, but for a retry.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Completed { .. } | Self::Failed { .. } | Self::Cancelled)
    }
}

/// What became of an order.
#[derive(Debug, Clone, PartialEq)]
pub enum Submitted {
    /// It is a new job.
    New(JobRecord),
    /// The same order was given before.
    Known(JobRecord),
}

/// A node that looks for work.
#[derive(Debug, Clone)]
pub struct Claimer {
    /// Its name, which no other node has.
    pub node: String,
    /// The models that it serves.
    pub models: Vec<String>,
    /// For how long a claim lasts without being renewed.
    pub lease: Duration,
    /// It works on no other job: one that has been there for two crashes goes to such a node alone.
    pub is_free: bool,
}

/// The right to write a job.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Lease {
    /// The job.
    pub id: JobId,
    /// Its epoch.
    pub epoch: u64,
}

/// A job that this node has now.
#[derive(Debug, Clone)]
pub struct Claimed {
    /// The right to it.
    pub lease: Lease,
    /// It, running.
    pub record: JobRecord,
    /// The node must claim no other while it has this one, which has crashed with its node before.
    pub is_alone: bool,
}

/// What a renewal says of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewed {
    /// It lasts on.
    Held,
    /// It lasts on, and the job's owner wants it to end: the holder finishes it with [`Outcome::Cancelled`].
    Cancelled,
    /// It is somebody else's, or has ended.
    Lost,
}

/// How a job ends.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// With a result.
    Completed {
        /// What came of it.
        result: String,
        /// Bytes that are kept for it.
        file_bytes: u64,
        /// Device time that it took, in seconds; the owner's turn is corrected by it.
        cost_seconds: Option<f64>,
    },
    /// Without.
    Failed {
        /// For programs.
        code: String,
        /// For people.
        message: String,
    },
    /// As its owner wanted.
    Cancelled,
}

/// Why a holder gives a job back to the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Return {
    /// The node ends or has other work: it counts as no attempt.
    HandOver,
    /// It failed in a way that another attempt may not; not before so much time has gone.
    Retry(Duration),
}

/// Which jobs of a list.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Of this owner.
    pub owner: Option<String>,
    /// Of this kind.
    pub kind: Option<super::JobKind>,
    /// In this state, as [`RecordState::as_str`] has it.
    pub state: Option<&'static str>,
    /// Of this model.
    pub model: Option<String>,
}

/// Which part of a list.
#[derive(Debug, Clone, Copy)]
pub struct Page {
    /// The job before the first.
    pub after: Option<JobId>,
    /// Most jobs.
    pub limit: usize,
    /// By time of order.
    pub order: Order,
}

/// By time of order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Oldest first.
    Ascending,
    /// Newest first.
    Descending,
}

/// Part of a list.
#[derive(Debug)]
pub struct Listing {
    /// In the order asked for.
    pub jobs: Vec<JobRecord>,
    /// There are more behind.
    pub has_more: bool,
}

/// How much a store keeps.
#[derive(Debug, Clone, Copy)]
pub struct Retention {
    /// Most jobs that have not ended; owners share them.
    pub max_active_jobs: usize,
    /// Most jobs that have; the oldest goes first, and its file with it.
    pub max_ended_jobs: usize,
    /// Most bytes of finished files; the oldest goes first.
    pub max_file_bytes: u64,
    /// For how long ended jobs are kept at most.
    pub max_age: Option<Duration>,
}

impl Default for Retention {
    fn default() -> Self {
        Self { max_active_jobs: 256, max_ended_jobs: 1000, max_file_bytes: 10 << 30, max_age: None }
    }
}

/// A message to somebody that a job has ended, which is to be sent until it has arrived.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Its name, the same at every attempt.
    pub id: String,
    /// Where to.
    pub url: String,
    /// The job.
    pub job: JobId,
    /// Its state, as [`RecordState::as_str`] has it.
    pub state: String,
    /// When it ended.
    pub ended: SystemTime,
    /// How often it was tried before.
    pub attempts: u32,
}

/// What goes wrong between a node and its store.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The write is of a lease that has ended; nothing was written.
    #[error("the job is no longer this node's")]
    Fenced,
    /// No job has this name.
    #[error("there is no such job")]
    Unknown,
    /// What was asked for cannot be done in the state that the job is in.
    #[error("the job is {state}")]
    WrongState {
        /// Its state, as [`RecordState::as_str`] has it.
        state: &'static str,
    },
    /// Too many jobs have not ended, in all or of this owner.
    #[error("jobs are waiting or running: {0}")]
    Full(NoPlace),
    /// The owner has used the key for another request.
    #[error("the idempotency key was used for another request")]
    KeyReused,
    /// The database does not answer, or not now; asking again may help. Nothing is known of a write that was under way.
    #[error("the job store is not available: {0}")]
    Unavailable(String),
    /// The disk of the store takes no more.
    #[error("the disk of the job store is full")]
    DiskFull,
    /// The store was written by a newer version.
    #[error("the job store has schema {found}; this version knows {known}: start a newer tale")]
    NewerSchema {
        /// Its schema.
        found: i64,
        /// The newest that is known.
        known: i64,
    },
    /// Another process has the store.
    #[error("{path} is in use by another process")]
    InUse {
        /// The folder.
        path: String,
    },
    /// What is read makes no sense.
    #[error("the job store is damaged: {0}")]
    Damaged(String),
}

/// Keeps jobs. Each method is one transaction: it has happened as a whole, durably, when it returns, or not at all.
#[async_trait]
pub trait JobStore: Send + Sync + fmt::Debug {
    /// Adds a job, or finds the one that the same order has made before. [`StoreError::Full`], [`StoreError::KeyReused`].
    async fn submit(&self, job: NewJob) -> Result<Submitted, StoreError>;

    /// The job as it stands. [`StoreError::Unknown`].
    async fn get(&self, id: JobId) -> Result<JobRecord, StoreError>;

    /// A page of the jobs that pass the filter. [`StoreError::Unknown`] when `page.after` names no job.
    async fn list(&self, filter: &Filter, page: &Page) -> Result<Listing, StoreError>;

    /// Takes the job whose turn it is among those that the claimer can make, whose time has come and that nobody has.
    async fn claim(&self, claimer: &Claimer) -> Result<Option<Claimed>, StoreError>;

    /// Makes leases last on from now, all or none; the answers are in their order.
    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewed>, StoreError>;

    /// The holder's device has begun; only the first time counts. [`StoreError::Fenced`].
    async fn start(&self, lease: &Lease) -> Result<(), StoreError>;

    /// Says how far the job is. Volatile: a store may forget it when it ends. [`StoreError::Fenced`].
    async fn progress(&self, lease: &Lease, progress: &str) -> Result<(), StoreError>;

    /// Where another holder would go on from; the job has come further, so that its crashes count from 0 again. Gives the one
    /// before, which nobody needs any more. [`StoreError::Fenced`].
    async fn checkpoint(&self, lease: &Lease, checkpoint: &str) -> Result<Option<String>, StoreError>;

    /// Ends the job, with the message to who wants to hear of it. [`StoreError::Fenced`].
    async fn finish(&self, lease: &Lease, outcome: Outcome) -> Result<JobRecord, StoreError>;

    /// Gives the job back to the queue. [`StoreError::Fenced`].
    async fn give_back(&self, lease: &Lease, why: Return) -> Result<(), StoreError>;

    /// Wants a job to end: at once where it waits, by its holder where it runs. [`StoreError::WrongState`] where it has ended.
    async fn cancel(&self, id: JobId) -> Result<JobRecord, StoreError>;

    /// Puts a job that has failed or was cancelled into the queue again, from its last checkpoint. [`StoreError::WrongState`].
    async fn retry(&self, id: JobId) -> Result<JobRecord, StoreError>;

    /// Makes a job that waits more or less urgent. [`StoreError::WrongState`].
    async fn prioritise(&self, id: JobId, priority: Priority) -> Result<JobRecord, StoreError>;

    /// Forgets a job, whatever its state, and gives what it was: its holder is fenced from then on. [`StoreError::Unknown`].
    async fn remove(&self, id: JobId) -> Result<JobRecord, StoreError>;

    /// Puts jobs whose holders have gone silent back into the queue, one crash more; fails those that have crashed for the third
    /// time in a row (`crashed`), and those whose deadline has passed (`deadline_exceeded`). Gives those that have changed.
    async fn reap(&self) -> Result<Vec<JobRecord>, StoreError>;

    /// Takes out ended jobs that are more than is kept, oldest first; the newest stays whatever its size. Gives them, so that their files can go.
    async fn retain(&self) -> Result<Vec<JobRecord>, StoreError>;

    /// The jobs that wait for their turn and those that run, in the order in which they will be claimed, at most `limit`.
    async fn queue(&self, limit: usize) -> Result<Vec<JobRecord>, StoreError>;

    /// How many jobs have not ended.
    async fn num_active(&self) -> Result<usize, StoreError>;

    /// Messages that are due, each leased to the caller for `lease`.
    async fn messages(&self, limit: usize, lease: Duration) -> Result<Vec<Message>, StoreError>;

    /// A message has arrived or is given up (`None`), or is due again after so long.
    async fn settle(&self, message: &str, again: Option<Duration>) -> Result<(), StoreError>;

    /// Waits until there may be something new: a job that can be claimed, a job that is to end. Also returns after `at_most`, since news may get lost.
    async fn news(&self, at_most: Duration);

    /// Whether the store answers and could write now; for readiness.
    async fn check(&self) -> Result<(), StoreError>;
}
