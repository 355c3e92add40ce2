//! One suite over all stores: what [`JobStore`] says, each method and each error.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use super::clock::Hand;
use super::*;
use crate::job::JobKind;

mod crashes;
mod fairness;
mod leases;
mod lists;
mod messages;
mod orders;

/// Gives a clock's hand to who turns it.
type HandOf = dyn Fn(&dyn Fn(&Hand)) + Send + Sync;

/// A store to be tried, and its clock.
pub struct Rig {
    /// It.
    pub store: Arc<dyn JobStore>,
    /// Its clock's hand.
    hand: Box<HandOf>,
    /// What goes with the test.
    _guard: Box<dyn std::any::Any + Send>,
}

impl Rig {
    /// So much time goes by.
    pub fn advance(&self, by: Duration) {
        (self.hand)(&|hand| hand.advance(by));
    }

    /// Does something to its clock's hand.
    pub fn turn(&self, turn: &dyn Fn(&Hand)) {
        (self.hand)(turn);
    }

    /// Its clock stops.
    pub fn stop_clock(&self, at: i64) {
        (self.hand)(&|hand| hand.stop(at));
    }

    /// Claims, and has to get one.
    pub async fn claim(&self, node: &str) -> Claimed {
        self.store.claim(&claimer(node)).await.expect("a claim").expect("a job waits")
    }

    /// Claims, and has to get none.
    pub async fn claim_nothing(&self, node: &str) {
        let claimed = self.store.claim(&claimer(node)).await.expect("a claim");
        assert!(claimed.is_none(), "{claimed:?}");
    }

    /// Orders a job.
    pub async fn order(&self, job: NewJob) -> JobId {
        let id = job.id;
        match self.store.submit(job).await.expect("room") {
            Submitted::New(record) => assert_eq!((record.id, record.state), (id, RecordState::Queued)),
            Submitted::Known(record) => panic!("{record:?} was known"),
        }
        id
    }

    /// The job as it stands.
    pub async fn get(&self, id: JobId) -> JobRecord {
        self.store.get(id).await.expect("there")
    }

    /// Its state's name.
    pub async fn state(&self, id: JobId) -> &'static str {
        self.get(id).await.state.as_str()
    }

    /// Orders, claims, and ends a job.
    pub async fn end(&self, job: NewJob, outcome: Outcome) -> JobRecord {
        let id = self.order(job).await;
        let claimed = self.claim("a").await;
        assert_eq!(claimed.record.id, id);
        self.store.finish(&claimed.lease, outcome).await.expect("held")
    }
}

/// How long claims last here.
pub const LEASE: Duration = Duration::from_secs(30);
/// A little longer.
pub const OVER: Duration = Duration::from_secs(31);

/// A node that serves all models of this suite.
pub fn claimer(node: &str) -> Claimer {
    Claimer { node: node.to_owned(), models: vec!["wan".to_owned(), "flux".to_owned()], lease: LEASE, is_free: true }
}

/// An order.
pub fn job(owner: &str) -> NewJob {
    NewJob {
        id: JobId::generate(JobKind::Video),
        owner: owner.to_owned(),
        priority: Priority::Standard,
        model: "wan".to_owned(),
        spec: r#"{"prompt": "ein Käfer läuft 🐞"}"#.to_owned(),
        cost_seconds: 1.0,
        wait: Duration::ZERO,
        deadline: None,
        idempotency: None,
        webhook: None,
    }
}

/// A result.
pub fn completed(file_bytes: u64) -> Outcome {
    Outcome::Completed { result: "made".to_owned(), file_bytes, cost_seconds: None }
}

/// No result.
pub fn failed() -> Outcome {
    Outcome::Failed { code: "broken".to_owned(), message: "it broke".to_owned() }
}

/// Compares the name of an error, and shows the whole of it.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: Result<T, StoreError>, name: &str) {
    let told = format!("{result:?}");
    assert!(told.starts_with(&format!("Err({name}")), "{told} is no {name}");
}

/// The kinds of stores.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// In memory.
    Memory,
    /// In a file.
    Sqlite,
    /// On a server.
    Postgres,
}

/// An empty store; `None` where there is none of that kind, which is told.
pub async fn open(kind: Kind, retention: Retention) -> Option<Rig> {
    match kind {
        Kind::Memory => {
            let store = Arc::new(MemoryStore::new(retention));
            let clock = store.clone();
            Some(Rig { store, hand: Box::new(move |turn| turn(clock.hand())), _guard: Box::new(()) })
        }
        Kind::Sqlite => {
            let dir = tempfile::tempdir().expect("a folder");
            let store = Arc::new(SqliteStore::open(dir.path(), retention).await.expect("opened"));
            let clock = store.clone();
            Some(Rig { store, hand: Box::new(move |turn| turn(clock.hand())), _guard: Box::new(dir) })
        }
        Kind::Postgres => {
            let url = postgres_url().await?;
            let store = Arc::new(PostgresStore::connect(&url, retention).await.expect("connected"));
            let clock = store.clone();
            Some(Rig { store, hand: Box::new(move |turn| turn(clock.hand())), _guard: Box::new(()) })
        }
    }
}

/// The URL of an empty place in the server that tests are given; `None` where there is none, which is told.
pub async fn postgres_url() -> Option<String> {
    let Ok(server) = std::env::var("TALE_TEST_POSTGRES") else {
        eprintln!("NOT RUN: there is no PostgreSQL (scripts/postgres starts one)");
        return None;
    };
    let name = format!("t{}", uuid::Uuid::now_v7().simple());
    let mut connection = <sqlx::PgConnection as sqlx::Connection>::connect(&server).await.expect("the server answers");
    let made = sqlx::raw_sql(sqlx::AssertSqlSafe(format!("create schema {name}"))).execute(&mut connection).await;
    made.expect("made");
    let mark = if server.contains('?') { '&' } else { '?' };
    Some(format!("{server}{mark}application_name={name}&options=-c%20search_path%3D{name}"))
}

/// Runs a case over a store.
pub async fn try_on<F: Future<Output = ()>>(kind: Kind, retention: Retention, case: impl FnOnce(Rig) -> F) {
    if let Some(rig) = open(kind, retention).await {
        case(rig).await;
    }
}

/// Makes a test of each case for each kind of store. Cases are functions of a [`Rig`]; those of a list share how much is kept.
macro_rules! on_every_store {
    ($retention:ident: $($case:ident)*) => {
        on_every_store!(@kind memory Memory $retention $($case)*);
        on_every_store!(@kind sqlite Sqlite $retention $($case)*);
        on_every_store!(@kind postgres Postgres $retention $($case)*);
    };
    (@kind $module:ident $kind:ident $retention:ident $($case:ident)*) => {
        mod $module {
            use crate::job::store::conformance::{Kind, try_on};
            $(#[tokio::test]
            async fn $case() {
                try_on(Kind::$kind, super::$retention(), super::$case).await;
            })*
        }
    };
}
use on_every_store;

/// What is kept by default.
pub fn much() -> Retention {
    Retention::default()
}
