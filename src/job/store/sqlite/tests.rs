//! What only a store in a file has: the file, who opens it, and how it fails.

use std::time::Instant;

use sqlx::Executor as _;

use super::super::conformance::{LEASE, OVER, claimer, completed, job, refused};
use super::super::{JobStore, NewJob};
use super::*;

async fn open(dir: &Path) -> SqliteStore {
    let began = Instant::now();
    loop {
        // The task of the store before closes the file some time after the store has gone.
        match SqliteStore::open(dir, Retention::default()).await {
            Err(StoreError::InUse { .. }) if began.elapsed() < Duration::from_secs(60) => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            store => break store.expect("opened"),
        }
    }
}

#[tokio::test]
async fn each_statement_is_prepared() {
    let dir = tempfile::tempdir().expect("a folder");
    let _store = open(dir.path()).await;
    let options = SqliteConnectOptions::new().filename(dir.path().join("jobs.sqlite"));
    let mut connection = options.connect().await.expect("connected");
    for statement in sql::ALL {
        let prepared = (&mut connection).prepare(sqlx::SqlStr::from_static(statement)).await;
        prepared.unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
}

#[tokio::test]
async fn jobs_are_there_after_the_process_and_running_ones_have_crashed() {
    let dir = tempfile::tempdir().expect("a folder");
    let (waiting, running, ended) = (job("a"), job("a"), job("a"));
    let store = open(dir.path()).await;
    for order in [&ended, &running, &waiting] {
        store.submit(order.clone()).await.expect("room");
    }
    let first = store.claim(&claimer("a")).await.expect("a claim").expect("one waits");
    let finished = store.finish(&first.lease, completed(5)).await.expect("held");
    let zombie = store.claim(&claimer("a")).await.expect("a claim").expect("one waits").lease;
    drop(store);
    let store = open(dir.path()).await;
    assert_eq!(store.get(ended.id).await.expect("there"), finished);
    let record = store.get(running.id).await.expect("there");
    assert_eq!((record.state.as_str(), record.crashes, record.attempts), ("queued", 1, 1));
    assert_eq!(store.get(waiting.id).await.expect("there").crashes, 0);
    refused(store.finish(&zombie, completed(1)).await, "Fenced");
    let again = store.claim(&claimer("a")).await.expect("a claim").expect("one waits");
    assert_eq!((again.lease.id, again.lease.epoch), (running.id, 2), "its flow paid for no crash");
    assert_eq!(store.num_active().await.expect("a number"), 2);
}

#[tokio::test]
async fn a_folder_has_one_process() {
    let dir = tempfile::tempdir().expect("a folder");
    let _store = open(dir.path()).await;
    let told = SqliteStore::open(dir.path(), Retention::default()).await.expect_err("it is in use").to_string();
    assert_eq!(told, format!("{} is in use by another process", dir.path().display()));
}

#[tokio::test]
async fn nobody_else_reads_the_files() {
    let parent = tempfile::tempdir().expect("a folder");
    let dir = parent.path().join("state").join("deep");
    let store = open(&dir).await;
    store.submit(job("a")).await.expect("room");
    let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!(mode(&dir), 0o700);
    let files: Vec<_> = fs::read_dir(&dir).expect("there").map(|file| file.expect("there").path()).collect();
    assert!(files.len() >= 3, "{files:?}");
    for file in files {
        assert_eq!(mode(&file), 0o600, "{}", file.display());
    }
}

/// Does something to the file while nobody has it.
async fn behind_its_back(dir: &Path, statement: &'static str) {
    let options = SqliteConnectOptions::new().filename(dir.join("jobs.sqlite"));
    let mut connection = options.connect().await.expect("connected");
    sqlx::raw_sql(statement).execute(&mut connection).await.expect("done");
    connection.close().await.expect("closed");
}

#[tokio::test]
async fn other_schemas_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    drop(open(dir.path()).await);
    drop(open(dir.path()).await);
    behind_its_back(dir.path(), "insert into tale_schema values (7, 'later')").await;
    let told = SqliteStore::open(dir.path(), Retention::default()).await.expect_err("it is newer").to_string();
    assert_eq!(told, "the job store has schema 7; this version knows 1: start a newer tale");
    behind_its_back(dir.path(), "delete from tale_schema; insert into tale_schema values (1, 'other')").await;
    refused(SqliteStore::open(dir.path(), Retention::default()).await, "Damaged");
    let file = tempfile::tempdir().expect("a folder");
    fs::write(file.path().join("jobs.sqlite"), "no database ".repeat(200)).expect("written");
    refused(SqliteStore::open(file.path(), Retention::default()).await, "Damaged");
    let taken = file.path().join("file");
    fs::write(&taken, "").expect("written");
    refused(SqliteStore::open(&taken, Retention::default()).await, "Unavailable");
}

#[tokio::test]
async fn a_full_disk_is_told_and_nothing_else_is_lost() {
    let dir = tempfile::tempdir().expect("a folder");
    let options = SqliteConnectOptions::new().pragma("max_page_count", "200");
    let store = SqliteStore::open_with(dir.path(), Retention::default(), options).await.expect("opened");
    let mut taken = Vec::new();
    let big = || NewJob { spec: "x".repeat(30_000), ..job("a") };
    loop {
        let order = big();
        let id = order.id;
        match store.submit(order).await {
            Ok(_) => taken.push(id),
            Err(error) => {
                assert!(matches!(error, StoreError::DiskFull), "{error:?}");
                break;
            }
        }
    }
    assert!(taken.len() > 5, "{}", taken.len());
    assert_eq!(store.num_active().await.expect("a number"), taken.len());
    for id in &taken[..3] {
        store.remove(*id).await.expect("there");
    }
    store.submit(big()).await.expect("there is room again");
    store.check().await.expect("it can write");
}

#[tokio::test]
async fn a_disk_that_cannot_be_written_is_told() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path()).await;
    let statement = sqlx::query(sql::TOUCH).bind(1i64);
    let error = statement.execute(&store.readers).await.expect_err("readers do not write");
    let told = failure(error).to_string();
    assert!(told.contains("read-only") && told.starts_with("the job store is not available"), "{told}");
}

#[tokio::test]
async fn leases_do_not_go_by_peoples_clocks() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path()).await;
    store.submit(job("a")).await.expect("room");
    let lease = store.claim(&claimer("a")).await.expect("a claim").expect("one waits").lease;
    // The clock of a store takes the time of people's clocks once, when it begins; turning it is all that moves it.
    assert!(store.reap().await.expect("reaped").is_empty());
    store.hand().advance(LEASE / 2);
    assert!(store.reap().await.expect("reaped").is_empty());
    store.hand().advance(OVER);
    assert_eq!(store.reap().await.expect("reaped").len(), 1);
    refused(store.finish(&lease, completed(1)).await, "Fenced");
}

/// How many durable orders a second: `cargo test --release ... orders_in_a_second -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn orders_in_a_second() {
    for submitters in [1, 32] {
        let dir = tempfile::tempdir_in(".").expect("a folder");
        let retention = Retention { max_active_jobs: 1 << 30, ..Retention::default() };
        let store = Arc::new(SqliteStore::open(dir.path(), retention).await.expect("opened"));
        let began = Instant::now();
        let tasks: Vec<_> = (0..submitters)
            .map(|owner| {
                let store = store.clone();
                tokio::spawn(async move {
                    let mut count = 0;
                    while began.elapsed() < Duration::from_secs(3) {
                        store.submit(job(&owner.to_string())).await.expect("room");
                        count += 1;
                    }
                    count
                })
            })
            .collect();
        let mut count = 0;
        for task in tasks {
            count += task.await.expect("no panic");
        }
        println!("{submitters} submitters: {:.0} orders/s", f64::from(count) / began.elapsed().as_secs_f64());
    }
}
