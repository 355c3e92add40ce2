//! What only a store on a server has: other nodes, and a server that fails.
//!
//! They need a server: `scripts/postgres cargo test ...` starts one, and gives its URL.

use std::time::Instant;

use sqlx::{Connection, Executor as _};

use super::super::conformance::{LEASE, OVER, claimer, completed, job, postgres_url, refused};
use super::super::{JobStore, RecordState, Renewed, Return, Submitted};
use super::*;

/// A node on a place of its own in the test's server, which others may join.
async fn node(url: &str) -> PostgresStore {
    let retention = Retention { max_active_jobs: 100_000, ..Retention::default() };
    PostgresStore::connect(url, retention).await.expect("connected")
}

async fn admin(url: &str) -> PgConnection {
    PgConnection::connect(url).await.expect("connected")
}

#[tokio::test]
async fn each_statement_is_prepared() {
    let Some(url) = postgres_url().await else { return };
    let _store = node(&url).await;
    let mut connection = admin(&url).await;
    for statement in sql::ALL.iter().chain(&[sql::NOW, sql::LOCK, sql::TELL]) {
        let prepared = (&mut connection).prepare(sqlx::SqlStr::from_static(statement)).await;
        prepared.unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
}

#[tokio::test]
async fn nodes_that_start_at_once_make_the_tables_once() {
    let Some(url) = postgres_url().await else { return };
    let nodes = (0..6).map(|_| {
        let url = url.clone();
        tokio::spawn(async move { node(&url).await })
    });
    for node in nodes.collect::<Vec<_>>() {
        node.await.expect("no panic").check().await.expect("it can write");
    }
    let mut connection = admin(&url).await;
    sqlx::raw_sql("insert into tale_schema values (9, 'later')").execute(&mut connection).await.expect("done");
    let told = PostgresStore::connect(&url, Retention::default()).await.expect_err("it is newer").to_string();
    assert_eq!(told, "the job store has schema 9; this version knows 1: start a newer tale");
}

#[tokio::test]
async fn nodes_share_jobs_and_wake_each_other() {
    let Some(url) = postgres_url().await else { return };
    let (one, other) = (node(&url).await, Arc::new(node(&url).await));
    // Its listener has its connection once it has been woken for the first time.
    other.news(Duration::from_secs(30)).await;
    let waiter = {
        let other = other.clone();
        tokio::spawn(async move {
            let began = Instant::now();
            loop {
                if let Some(claimed) = other.claim(&claimer("other")).await.expect("a claim") {
                    break (claimed, began.elapsed());
                }
                other.news(Duration::from_secs(60)).await;
            }
        })
    };
    let order = job("a");
    one.submit(order.clone()).await.expect("room");
    let (claimed, waited) = waiter.await.expect("no panic");
    assert!(waited < Duration::from_secs(50), "{waited:?}");
    assert_eq!(one.get(order.id).await.expect("there").state, RecordState::Running { node: "other".to_owned() });
    assert!(one.claim(&claimer("one")).await.expect("a claim").is_none());
    one.cancel(order.id).await.expect("it runs");
    let answers = other.renew(std::slice::from_ref(&claimed.lease), LEASE).await.expect("an answer");
    assert_eq!(answers, [Renewed::Cancelled]);
    // A node whose own clock is a day ahead, as `hand` makes it, is the test's stand-in for time that goes by.
    one.hand().advance(OVER);
    assert_eq!(one.reap().await.expect("reaped").len(), 1);
    refused(other.finish(&claimed.lease, completed(1)).await, "Fenced");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_told_soon() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = free.local_addr().expect("bound").port();
    let url = format!("postgres://tale@127.0.0.1:{port}/tale");
    // It takes connections, and says nothing.
    let began = Instant::now();
    refused(PostgresStore::connect(&url, Retention::default()).await, "Unavailable");
    assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
    drop(free);
    refused(PostgresStore::connect(&url, Retention::default()).await, "Unavailable");
    refused(PostgresStore::connect("mysql://nobody", Retention::default()).await, "Unavailable");
    for mode in ["require", "verify-full"] {
        let told = PostgresStore::connect(&format!("{url}?sslmode={mode}"), Retention::default()).await;
        let told = told.expect_err("it is not encrypted").to_string();
        assert!(told.contains("speaks no TLS"), "{told}");
    }
}

#[tokio::test]
async fn what_the_server_says_is_told_apart() {
    let Some(url) = postgres_url().await else { return };
    let mut connection = admin(&url).await;
    let mut told = async |code: &str| {
        let statement = format!("do $$ begin raise exception using errcode = '{code}', message = 'm'; end $$");
        let raised = sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&mut connection).await;
        failure(raised.expect_err("raised"))
    };
    assert!(matches!(told("53100").await, StoreError::DiskFull));
    for code in ["40001", "40P01"] {
        assert!(is_worth_another_try(&told(code).await), "{code}");
    }
    for code in ["25006", "53300", "57P01", "55P03", "57014", "08006"] {
        let error = told(code).await;
        assert!(matches!(error, StoreError::Unavailable(_)) && !is_worth_another_try(&error), "{code}: {error:?}");
    }
    for code in ["XX001", "42P01", "22021"] {
        assert!(matches!(told(code).await, StoreError::Damaged(_)), "{code}");
    }
    let read_only = format!("{url}%20-c%20default_transaction_read_only%3Don");
    let told = PostgresStore::connect(&read_only, Retention::default()).await.expect_err("it makes tables").to_string();
    assert_eq!(told, "the job store is not available: the database is read-only");
}

/// A work that meets others at its rows for the first times.
#[derive(Debug)]
struct Unlucky {
    left: std::sync::atomic::AtomicU32,
}

#[async_trait]
impl Work for Unlucky {
    type Answer = i64;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<i64, StoreError> {
        let turn = transaction.turn("wan").await?.unwrap_or(0);
        transaction.set_turn("wan", turn + 1).await?;
        let left = self.left.load(std::sync::atomic::Ordering::Relaxed);
        if left == 0 {
            return Ok(turn + 1);
        }
        self.left.store(left - 1, std::sync::atomic::Ordering::Relaxed);
        Err(StoreError::Unavailable(format!("{AGAIN}deadlock detected")))
    }
}

#[tokio::test]
async fn what_was_ended_because_of_others_is_begun_anew() {
    let Some(url) = postgres_url().await else { return };
    let store = node(&url).await;
    let unlucky = |left: u32| Unlucky { left: left.into() };
    assert_eq!(store.write(unlucky(3)).await.expect("the fourth time"), 1, "what was begun before is undone");
    refused(store.write(unlucky(MAX_TRIES)).await, "Unavailable");
    assert_eq!(store.write(unlucky(0)).await.expect("at once"), 2);
}

#[tokio::test]
async fn a_lost_connection_is_made_anew() {
    let Some(url) = postgres_url().await else { return };
    let store = node(&url).await;
    let mut connection = admin(&url).await;
    let order = job("a");
    store.submit(order.clone()).await.expect("room");
    // Each test has a name of its own for its connections.
    let end = "select pg_terminate_backend(pid) from pg_stat_activity \
               where application_name = current_setting('application_name') and pid <> pg_backend_pid()";
    for _ in 0..3 {
        let ended = sqlx::raw_sql(end).execute(&mut connection).await.expect("ended");
        assert!(ended.rows_affected() >= 1);
        assert_eq!(store.get(order.id).await.expect("it connects again").id, order.id);
        store.check().await.expect("it can write");
    }
}

#[tokio::test]
async fn a_row_that_somebody_holds_is_left_to_them() {
    let Some(url) = postgres_url().await else { return };
    let store = node(&url).await;
    let (held, free) = (job("a"), job("a"));
    store.submit(held.clone()).await.expect("room");
    store.submit(free.clone()).await.expect("room");
    let mut connection = admin(&url).await;
    let mut other = connection.begin().await.expect("begun");
    let id = held.id.to_string();
    sqlx::query("select 1 from tale_jobs where id = $1 for update").bind(id).execute(&mut *other).await.expect("held");
    let claimed = store.claim(&claimer("a")).await.expect("a claim").expect("one is free");
    assert_eq!(claimed.record.id, free.id, "it does not wait for the first");
    assert!(store.claim(&claimer("a")).await.expect("a claim").is_none());
    // A write that has to have the row waits for a bounded time.
    refused(store.cancel(held.id).await, "Unavailable");
    other.rollback().await.expect("free again");
    store.cancel(held.id).await.expect("it waits");
}

/// Claims, ends, crashes, reaps and orders from several nodes at once: nobody waits for each other in a circle, and all adds up.
#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_add_up() {
    let Some(url) = postgres_url().await else { return };
    let nodes: Vec<_> = [node(&url).await, node(&url).await, node(&url).await].into_iter().map(Arc::new).collect();
    let mut tasks = Vec::new();
    for task in 0..9usize {
        let store = nodes[task % nodes.len()].clone();
        tasks.push(tokio::spawn(async move {
            let mut ended = 0;
            for round in 0..25usize {
                let owner = ["a", "b", "c"][(task + round) % 3];
                let priority = super::super::Priority::ALL[round % 3];
                let order = super::super::NewJob { priority, ..job(owner) };
                let Submitted::New(_) = store.submit(order).await.expect("room") else { panic!("it is new") };
                let Some(claimed) = store.claim(&claimer(&task.to_string())).await.expect("a claim") else { continue };
                match round % 5 {
                    // It goes silent; who reaps is ahead of its time.
                    0 => {}
                    1 => store.give_back(&claimed.lease, Return::HandOver).await.or_else(fenced).expect("held"),
                    _ => match store.finish(&claimed.lease, completed(1)).await {
                        Ok(_) => ended += 1,
                        Err(StoreError::Fenced) => {}
                        Err(error) => panic!("{error}"),
                    },
                }
                store.reap().await.expect("reaped");
                if round % 7 == 0 {
                    store.retain().await.expect("done");
                }
            }
            ended
        }));
    }
    let mut ended = 0;
    for task in tasks {
        ended += task.await.expect("no panic");
    }
    nodes[0].hand().advance(OVER);
    nodes[0].reap().await.expect("reaped");
    while let Some(claimed) = nodes[0].claim(&claimer("last")).await.expect("a claim") {
        nodes[0].finish(&claimed.lease, completed(1)).await.expect("held");
        ended += 1;
    }
    assert_eq!((ended, nodes[1].num_active().await.expect("a number")), (9 * 25, 0));
}

fn fenced(error: StoreError) -> Result<(), StoreError> {
    if matches!(error, StoreError::Fenced) { Ok(()) } else { Err(error) }
}
