//! Jobs in one file of SQLite, which one process has.
//!
//! Owns: the file, who may open it, one task that writes. Does not know: what happens to jobs.
//!
//! Works that come while others are being written wait, and are then written together: one wait for the disk serves them all (group
//! commit). Reads go beside, on connections of their own.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::sqlite::{
    Sqlite, SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow,
    SqliteSynchronous,
};
use sqlx::{ConnectOptions, Connection};
use tokio::sync::{mpsc, oneshot};

use super::clock::{Clock, News};
use super::row::{CRASHES_ALONE, Ended, Moment, Row, micros, since_1970, system_time};
use super::sql::sql_transaction;
use super::transaction::{Executor, FlowName, Transaction, Work};
use super::works::Recover;
use super::{Claimer, Filter, Idempotency, JobRecord, Listing, Message, Order, Page, Retention, StoreError};
use crate::job::JobId;

#[cfg(test)]
mod tests;

#[allow(missing_docs, reason = "a statement says what it does")]
mod sql {
    use super::super::sql::{columns, statements};

    statements!(
        seq: "integer primary key autoincrement",
        hold: "",
        skip: "",
        skip_message: "",
        models: "select value from json_each($2)"
    );
}

/// Most works that share a commit.
const MAX_BATCH: usize = 256;
/// Works that wait for the one that writes; more wait to be taken.
const MAX_WAITING: usize = 1024;
/// Connections that read.
const NUM_READERS: u32 = 4;
/// For how long anything waits for a lock of the file, which only a program beside this one can hold.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// Jobs in a file.
#[derive(Debug)]
pub struct SqliteStore {
    retention: Retention,
    clock: Arc<Clock>,
    news: Arc<News>,
    works: mpsc::Sender<Box<dyn Pending>>,
    readers: SqlitePool,
}

impl SqliteStore {
    /// Opens the file `jobs.sqlite` of a folder, both of which are made where they are missing. Jobs that ran when the process before
    /// ended wait again, one crash more. [`StoreError::InUse`] while another process has it.
    pub async fn open(dir: &Path, retention: Retention) -> Result<Self, StoreError> {
        Self::open_with(dir, retention, SqliteConnectOptions::new()).await
    }

    async fn open_with(dir: &Path, retention: Retention, options: SqliteConnectOptions) -> Result<Self, StoreError> {
        let lock = lock(dir)?;
        let path = dir.join("jobs.sqlite");
        private_file(&path)?;
        let clock = Arc::new(Clock::default());
        let news = Arc::new(News::default());
        let options = options
            .filename(&path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(LOCK_TIMEOUT)
            .disable_statement_logging();
        let mut writer =
            Writer { options: options.clone(), clock: clock.clone(), news: news.clone(), connection: None };
        writer.migrate().await?;
        let readers = SqlitePoolOptions::new()
            .max_connections(NUM_READERS)
            .acquire_timeout(LOCK_TIMEOUT)
            .connect_lazy_with(options.read_only(true));
        let (works, inbox) = mpsc::channel(MAX_WAITING);
        tokio::spawn(writer.run(inbox, lock));
        let store = Self { retention, clock, news, works, readers };
        let num_lost = store.write(Recover).await?;
        if num_lost > 0 {
            tracing::warn!(num_lost, "jobs were running when the process before ended; they wait again");
        }
        Ok(store)
    }

    /// What tests turn its clock with.
    #[cfg(test)]
    pub fn hand(&self) -> &super::clock::Hand {
        self.clock.hand()
    }
}

fn unavailable(path: &Path, error: std::io::Error) -> StoreError {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => StoreError::DiskFull,
        _ => StoreError::Unavailable(format!("{}: {error}", path.display())),
    }
}

/// Makes the folder, and takes it until the file is closed.
fn lock(dir: &Path) -> Result<fs::File, StoreError> {
    let failed = |error| unavailable(dir, error);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    let path = dir.join("jobs.lock");
    let file =
        fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(failed)?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StoreError::InUse { path: dir.display().to_string() }),
        Err(error) => Err(unavailable(&path, error.into())),
    }
}

/// Makes a file that nobody else may read; those that SQLite makes beside it have its mode.
fn private_file(path: &PathBuf) -> Result<(), StoreError> {
    let failed = |error| unavailable(path, error);
    let file =
        fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path).map_err(failed)?;
    file.set_permissions(fs::Permissions::from_mode(0o600)).map_err(failed)
}

/// What SQLite says, as ours (<https://sqlite.org/rescode.html>).
fn failure(error: sqlx::Error) -> StoreError {
    let sqlx::Error::Database(told) = &error else { return StoreError::Unavailable(error.to_string()) };
    let code = told.code().and_then(|code| code.parse::<i32>().ok()).unwrap_or(0) & 0xff;
    match code {
        // FULL
        13 => StoreError::DiskFull,
        // READONLY
        8 => StoreError::Unavailable("its file cannot be written: is the disk mounted read-only?".to_owned()),
        // CORRUPT, NOTADB; ERROR, which is a statement that the tables do not fit
        11 | 26 | 1 => StoreError::Damaged(told.message().to_owned()),
        _ => StoreError::Unavailable(told.message().to_owned()),
    }
}

#[async_trait]
impl Executor for SqliteStore {
    fn retention(&self) -> Retention {
        self.retention
    }

    async fn write<W: Work>(&self, work: W) -> Result<W::Answer, StoreError> {
        let gone = || StoreError::Unavailable("the task that writes has ended".to_owned());
        let (reply, answer) = oneshot::channel();
        let pending = Box::new(Waiter { work, result: None, reply });
        self.works.send(pending).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    async fn read<W: Work>(&self, work: W) -> Result<W::Answer, StoreError> {
        let mut transaction = self.readers.begin().await.map_err(failure)?;
        let now = Some(self.clock.now());
        let mut reading = SqliteTransaction { connection: &mut transaction, now, has_news: false };
        work.perform(&mut reading).await
    }

    async fn wait(&self, at_most: Duration) {
        self.news.wait(at_most).await;
    }
}

/// A work that waits to be written.
#[async_trait]
trait Pending: Send {
    fn is_durable(&self) -> bool;

    /// Does it. An error is one of the store's; that a work is refused is kept for who waits.
    async fn perform(&mut self, transaction: &mut dyn Transaction) -> Result<(), StoreError>;

    /// Tells who waits, if anybody does any more.
    fn answer(self: Box<Self>, kept: Result<(), StoreError>);
}

struct Waiter<W: Work> {
    work: W,
    result: Option<Result<W::Answer, StoreError>>,
    reply: oneshot::Sender<Result<W::Answer, StoreError>>,
}

#[async_trait]
impl<W: Work> Pending for Waiter<W> {
    fn is_durable(&self) -> bool {
        W::IS_DURABLE
    }

    async fn perform(&mut self, transaction: &mut dyn Transaction) -> Result<(), StoreError> {
        match self.work.perform(transaction).await {
            Err(error @ (StoreError::Unavailable(_) | StoreError::DiskFull | StoreError::Damaged(_))) => Err(error),
            result => {
                self.result = Some(result);
                Ok(())
            }
        }
    }

    fn answer(self: Box<Self>, kept: Result<(), StoreError>) {
        let never = || Err(StoreError::Unavailable("it was not begun".to_owned()));
        let result = match kept {
            Ok(()) => self.result.unwrap_or_else(never),
            Err(error) => Err(error),
        };
        let _ = self.reply.send(result);
    }
}

/// The only one that writes.
struct Writer {
    options: SqliteConnectOptions,
    clock: Arc<Clock>,
    news: Arc<News>,
    /// None after an error: what state it is in is not known then.
    connection: Option<SqliteConnection>,
}

impl Writer {
    async fn run(mut self, mut inbox: mpsc::Receiver<Box<dyn Pending>>, _lock: fs::File) {
        let mut batch = Vec::with_capacity(MAX_BATCH);
        while inbox.recv_many(&mut batch, MAX_BATCH).await > 0 {
            let kept = self.commit(&mut batch).await;
            if let Err(error) = &kept {
                tracing::error!(%error, works = batch.len(), "jobs could not be written");
                self.connection = None;
            }
            for pending in batch.drain(..) {
                pending.answer(kept.clone());
            }
        }
        if let Some(connection) = self.connection {
            let _ = connection.close().await;
        }
    }

    /// Writes works together: all of them, or none.
    async fn commit(&mut self, batch: &mut [Box<dyn Pending>]) -> Result<(), StoreError> {
        let is_durable = batch.iter().any(|pending| pending.is_durable());
        let (clock, news) = (self.clock.clone(), self.news.clone());
        let connection = self.connect().await?;
        // Read by SQLite at the commit. What need not survive a loss of power is in the log that a later commit waits for.
        let begin = if is_durable {
            "pragma synchronous = full; begin immediate"
        } else {
            "pragma synchronous = normal; begin immediate"
        };
        sqlx::raw_sql(begin).execute(&mut *connection).await.map_err(failure)?;
        let mut has_news = false;
        for pending in batch {
            let mut transaction = SqliteTransaction { connection, now: Some(clock.now()), has_news: false };
            pending.perform(&mut transaction).await?;
            has_news |= transaction.has_news;
        }
        sqlx::raw_sql("commit").execute(&mut *connection).await.map_err(failure)?;
        if has_news {
            news.announce();
        }
        Ok(())
    }

    async fn connect(&mut self) -> Result<&mut SqliteConnection, StoreError> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.options.connect().await.map_err(failure)?,
        };
        Ok(self.connection.insert(connection))
    }

    async fn migrate(&mut self) -> Result<(), StoreError> {
        let now = Some(self.clock.now());
        let connection = self.connect().await?;
        sqlx::raw_sql("begin immediate").execute(&mut *connection).await.map_err(failure)?;
        SqliteTransaction { connection, now, has_news: false }.migrate().await?;
        sqlx::raw_sql("commit").execute(&mut *connection).await.map(|_| ()).map_err(failure)
    }
}

struct SqliteTransaction<'a> {
    connection: &'a mut SqliteConnection,
    now: Option<Moment>,
    has_news: bool,
}

impl SqliteTransaction<'_> {
    async fn time_now(&mut self) -> Result<Moment, StoreError> {
        unreachable!("it is set when the transaction begins: this is a bug")
    }

    /// Nobody else writes in any case.
    async fn lock_places(&mut self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn tell(&mut self) -> Result<(), StoreError> {
        self.has_news = true;
        Ok(())
    }
}

sql_transaction!(SqliteTransaction, Sqlite, SqliteRow);
