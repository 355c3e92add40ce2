//! Jobs in a database of PostgreSQL, which several nodes share.
//!
//! Owns: connections, how long anything waits for the server, what is tried again. Does not know: what happens to jobs.
//!
//! All time is the server's. Transactions lock rows in one order (see [`Transaction`]), claims leave to others what others hold, and
//! what the server ends because of others is begun anew. Whoever waits for news is woken by `NOTIFY`, which may get lost: looking
//! again is what is relied upon.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::ConnectOptions;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgListener, PgPool, PgPoolOptions, PgRow, PgSslMode, Postgres};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::clock::{Hand, News};
use super::row::{CRASHES_ALONE, Ended, Moment, Row, micros, since_1970, system_time};
use super::sql::sql_transaction;
use super::transaction::{Executor, FlowName, Transaction, Work};
use super::{Claimer, Filter, Idempotency, JobRecord, Listing, Message, Order, Page, Retention, StoreError};
use crate::job::JobId;

#[cfg(test)]
mod tests;

#[allow(missing_docs, reason = "a statement says what it does")]
mod sql {
    use super::super::sql::{columns, statements};

    statements!(
        seq: "bigint generated always as identity primary key",
        hold: " for update",
        skip: " for update of tale_jobs skip locked",
        skip_message: " for update skip locked",
        models: "select jsonb_array_elements_text($2::jsonb)"
    );

    /// The server's clock. That of the transaction would be the time at which it began.
    pub const NOW: &str = "select (extract(epoch from clock_timestamp()) * 1000000)::bigint";
    pub const LOCK: &str = "select pg_advisory_xact_lock($1)";
    pub const TELL: &str = "select pg_notify('tale_jobs', '')";
}

/// Connections of a node, one of which listens.
const MAX_CONNECTIONS: u32 = 8;
/// For how long a work waits for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// For how long it may be at work.
const WORK_TIMEOUT: Duration = Duration::from_secs(5);
/// What the server holds a node to, which may stand still in the middle of a transaction.
const LIMITS: [(&str, &str); 3] =
    [("statement_timeout", "4000"), ("lock_timeout", "3000"), ("idle_in_transaction_session_timeout", "5000")];
/// For how long tables may take to be brought to this version, or another node to do so.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(300);
/// How often a work is begun that the server has ended because of others.
const MAX_TRIES: u32 = 5;
/// Keys of the locks that nodes agree on; the first half are bytes of the name.
const PLACES: i64 = 0x7461_6c65_0000_0001;
const MIGRATION: i64 = 0x7461_6c65_0000_0002;

/// Jobs in a database.
#[derive(Debug)]
pub struct PostgresStore {
    retention: Retention,
    shared: Arc<Shared>,
    listener: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    pool: PgPool,
    news: News,
    hand: Hand,
}

impl PostgresStore {
    /// Connects to the database of a URL, and brings its tables to this version. [`StoreError::Unavailable`] where it does not answer.
    pub async fn connect(url: &str, retention: Retention) -> Result<Self, StoreError> {
        let options = options(url)?;
        let pool = PgPoolOptions::new()
            .max_connections(MAX_CONNECTIONS)
            .acquire_timeout(CONNECT_TIMEOUT)
            .connect_lazy_with(options);
        let shared = Arc::new(Shared { pool, news: News::default(), hand: Hand::default() });
        let migrated = timeout(MIGRATION_TIMEOUT, shared.migrate()).await;
        migrated.unwrap_or_else(|_| Err(StoreError::Unavailable("its tables are being changed".to_owned())))?;
        let listener = tokio::spawn(listen(shared.clone()));
        Ok(Self { retention, shared, listener })
    }

    /// What tests turn its clock with: that of this node's view of it.
    #[cfg(test)]
    pub fn hand(&self) -> &Hand {
        &self.shared.hand
    }
}

impl Drop for PostgresStore {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

fn options(url: &str) -> Result<PgConnectOptions, StoreError> {
    let options = PgConnectOptions::from_str(url).map_err(|error| StoreError::Unavailable(error.to_string()))?;
    let mode = options.get_ssl_mode();
    if !matches!(mode, PgSslMode::Disable | PgSslMode::Allow | PgSslMode::Prefer) {
        let mode = format!("{mode:?}").to_lowercase();
        let told = format!("sslmode={mode} was asked for, and this version speaks no TLS to databases");
        return Err(StoreError::Unavailable(told));
    }
    let name = options.get_application_name().unwrap_or("tale").to_owned();
    Ok(options.application_name(&name).options(LIMITS).disable_statement_logging())
}

/// Announces what other nodes, and this one, have announced; begins anew as long as there is somebody who may want to know.
async fn listen(shared: Arc<Shared>) {
    const PAUSE: Duration = Duration::from_secs(1);
    loop {
        if let Ok(mut listener) = PgListener::connect_with(&shared.pool).await
            && listener.listen("tale_jobs").await.is_ok()
        {
            shared.news.announce();
            while let Ok(Some(_)) = listener.try_recv().await {
                shared.news.announce();
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// What the server says, as ours (<https://www.postgresql.org/docs/15/errcodes-appendix.html>).
fn failure(error: sqlx::Error) -> StoreError {
    let told = match &error {
        sqlx::Error::Database(told) => told,
        sqlx::Error::PoolTimedOut => {
            let told = format!("there was no connection to it within {} s", CONNECT_TIMEOUT.as_secs());
            return StoreError::Unavailable(told);
        }
        _ => return StoreError::Unavailable(error.to_string()),
    };
    let code = told.code().unwrap_or_default();
    match (&*code, code.get(..2).unwrap_or_default()) {
        ("53100", _) => StoreError::DiskFull,
        ("25006", _) => StoreError::Unavailable("the database is read-only".to_owned()),
        // Ended because of others, and so begun anew.
        ("40001" | "40P01", _) => StoreError::Unavailable(format!("{AGAIN}{}", told.message())),
        // Damaged pages; statements that the tables do not fit; values that they do not take.
        (_, "XX" | "42" | "22" | "23") => StoreError::Damaged(told.message().to_owned()),
        _ => StoreError::Unavailable(told.message().to_owned()),
    }
}

/// What an error that another try may not meet begins with.
const AGAIN: &str = "others were at the same rows: ";

fn is_worth_another_try(error: &StoreError) -> bool {
    matches!(error, StoreError::Unavailable(told) if told.starts_with(AGAIN))
}

#[async_trait]
impl Executor for PostgresStore {
    fn retention(&self) -> Retention {
        self.retention
    }

    async fn write<W: Work>(&self, work: W) -> Result<W::Answer, StoreError> {
        let shared = self.shared.clone();
        let work = Arc::new(work);
        // On a task of its own, so that a caller who goes away leaves no transaction open.
        let done = tokio::spawn(async move { shared.write(work).await });
        done.await.unwrap_or_else(|error| Err(StoreError::Unavailable(error.to_string())))
    }

    async fn read<W: Work>(&self, work: W) -> Result<W::Answer, StoreError> {
        let shared = self.shared.clone();
        let done = tokio::spawn(async move { shared.once(&work, None).await });
        done.await.unwrap_or_else(|error| Err(StoreError::Unavailable(error.to_string())))
    }

    async fn wait(&self, at_most: Duration) {
        self.shared.news.wait(at_most).await;
    }
}

impl Shared {
    /// Brings the tables to the newest version that is known, one node at a time.
    async fn migrate(&self) -> Result<(), StoreError> {
        let mut connection = self.pool.acquire().await.map_err(failure)?.detach();
        execute(&mut connection, "begin; set local statement_timeout = 0; set local lock_timeout = 0").await?;
        let mut transaction = PostgresTransaction { connection: &mut connection, hand: &self.hand, now: None };
        transaction.lock_tables().await?;
        transaction.migrate().await?;
        execute(&mut connection, "commit").await
    }

    async fn write<W: Work>(&self, work: Arc<W>) -> Result<W::Answer, StoreError> {
        // What need not survive a loss of power does not wait for the disk.
        let begin = if W::IS_DURABLE {
            "begin isolation level read committed"
        } else {
            "begin isolation level read committed; set local synchronous_commit = off"
        };
        for attempt in 1..MAX_TRIES {
            match self.once(&*work, Some(begin)).await {
                Err(error) if is_worth_another_try(&error) => {
                    tracing::debug!(%error, attempt, "a transaction is begun anew");
                    tokio::time::sleep(Duration::from_millis(5) * attempt).await;
                }
                result => return result,
            }
        }
        self.once(&*work, Some(begin)).await
    }

    /// Does a work within a time, in a transaction if it begins one. A connection that is not known to be whole is closed.
    async fn once<W: Work>(&self, work: &W, begin: Option<&'static str>) -> Result<W::Answer, StoreError> {
        let mut connection = self.pool.acquire().await.map_err(failure)?;
        match timeout(WORK_TIMEOUT, self.perform(&mut connection, work, begin)).await {
            Ok((result, true)) => result,
            Ok((result, false)) => {
                close(connection);
                result
            }
            Err(_) => {
                close(connection);
                Err(StoreError::Unavailable(format!("it has not answered for {} s", WORK_TIMEOUT.as_secs())))
            }
        }
    }

    /// Also whether the connection is outside of any transaction again.
    async fn perform<W: Work>(
        &self,
        connection: &mut PgConnection,
        work: &W,
        begin: Option<&'static str>,
    ) -> (Result<W::Answer, StoreError>, bool) {
        if let Some(begin) = begin
            && let Err(error) = execute(connection, begin).await
        {
            return (Err(error), false);
        }
        let mut transaction = PostgresTransaction { connection, hand: &self.hand, now: None };
        let result = work.perform(&mut transaction).await;
        let end = match (&result, begin) {
            (Ok(_), Some(_)) => execute(connection, "commit").await,
            (Err(_), Some(_)) => execute(connection, "rollback").await,
            (_, None) => Ok(()),
        };
        match (result, end) {
            (Ok(answer), Ok(())) => (Ok(answer), true),
            (Ok(_), Err(error)) => (Err(error), false),
            (Err(error), end) => (Err(error), end.is_ok()),
        }
    }
}

async fn execute(connection: &mut PgConnection, statement: &'static str) -> Result<(), StoreError> {
    sqlx::raw_sql(statement).execute(connection).await.map(|_| ()).map_err(failure)
}

/// Closes the socket, and waits for nothing.
fn close(connection: PoolConnection<Postgres>) {
    drop(connection.detach());
}

struct PostgresTransaction<'a> {
    connection: &'a mut PgConnection,
    hand: &'a Hand,
    now: Option<Moment>,
}

impl PostgresTransaction<'_> {
    async fn time_now(&mut self) -> Result<Moment, StoreError> {
        let row = self.one(sqlx::query(sql::NOW)).await?;
        let now = row.map(|row| column(&row, 0)).transpose()?.unwrap_or(0);
        Ok(self.hand.turned(Moment { steady: now, wall: now }))
    }

    async fn lock_places(&mut self) -> Result<(), StoreError> {
        self.do_it(sqlx::query(sql::LOCK).bind(PLACES)).await
    }

    async fn lock_tables(&mut self) -> Result<(), StoreError> {
        self.do_it(sqlx::query(sql::LOCK).bind(MIGRATION)).await
    }

    async fn tell(&mut self) -> Result<(), StoreError> {
        self.do_it(sqlx::query(sql::TELL)).await
    }
}

sql_transaction!(PostgresTransaction, Postgres, PgRow);
