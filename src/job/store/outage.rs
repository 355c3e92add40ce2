//! A server that is killed, stands still and comes back, while nodes work on jobs: nothing waits for long, nothing is lost, and all
//! goes on by itself. `scripts/chaos/store-outages` does the harm, and runs this with the seconds it takes in
//! `TALE_OUTAGE_SECONDS`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::conformance::{claimer, completed, job, postgres_url};
use super::*;

/// What nodes were told.
#[derive(Default)]
struct Told {
    ordered: BTreeSet<JobId>,
    ended: BTreeMap<JobId, u64>,
    unavailable: usize,
    /// The longest that a call took.
    longest: Duration,
    /// When a call went through last, and for how long none did at most.
    answered: Option<Instant>,
    silence: Duration,
}

type Shared = Arc<Mutex<Told>>;

/// Makes a call until it is answered, as far as it goes: nothing is known of one that is not.
async fn insist<T>(told: &Shared, call: impl AsyncFn() -> Result<T, StoreError>) -> Result<T, StoreError> {
    loop {
        let began = Instant::now();
        let answer = call().await;
        {
            let mut told = told.lock().expect("no panic");
            told.longest = told.longest.max(began.elapsed());
            match &answer {
                Err(StoreError::Unavailable(_)) => told.unavailable += 1,
                _ => {
                    let silence = told.answered.replace(Instant::now()).map_or(Duration::ZERO, |last| last.elapsed());
                    told.silence = told.silence.max(silence);
                    return answer;
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn toil(store: Arc<PostgresStore>, told: Shared, name: String, until: Instant) {
    let claimer = Claimer { lease: Duration::from_secs(4), ..claimer(&name) };
    while Instant::now() < until {
        let order = job(&name);
        insist(&told, async || store.submit(order.clone()).await).await.expect("room");
        assert!(told.lock().expect("no panic").ordered.insert(order.id));
        insist(&told, async || store.reap().await).await.expect("reaped");
        // A claim whose answer is lost is somebody else's after its lease.
        let Some(claimed) = insist(&told, async || store.claim(&claimer).await).await.expect("a claim") else {
            continue;
        };
        let lease = &claimed.lease;
        match insist(&told, async || store.finish(lease, completed(lease.epoch)).await).await {
            Ok(_) => {
                let before = told.lock().expect("no panic").ended.insert(lease.id, lease.epoch);
                assert_eq!(before, None, "{lease:?} ended twice");
            }
            // It was reaped, or the first answer was lost and it has ended.
            Err(StoreError::Fenced) => {}
            Err(error) => panic!("{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
#[ignore = "the server has to be harmed meanwhile: scripts/chaos/store-outages"]
async fn work_goes_on_after_outages() {
    let seconds = std::env::var("TALE_OUTAGE_SECONDS").map_or(20, |seconds| seconds.parse().expect("a number"));
    let url = postgres_url().await.expect("a server");
    let retention = Retention { max_active_jobs: 1 << 20, max_ended_jobs: 1 << 20, ..Retention::default() };
    let told = Shared::default();
    let until = Instant::now() + Duration::from_secs(seconds);
    let nodes = tokio::task::LocalSet::new();
    let mut tasks = Vec::new();
    for node in 0..2 {
        let store = Arc::new(PostgresStore::connect(&url, retention).await.expect("connected"));
        for task in 0..3 {
            tasks.push(nodes.spawn_local(toil(store.clone(), told.clone(), format!("{node}-{task}"), until)));
        }
    }
    nodes.await;
    for task in tasks {
        task.await.expect("no panic");
    }
    let store = PostgresStore::connect(&url, retention).await.expect("connected");
    let page = Page { after: None, limit: 1 << 30, order: Order::Ascending };
    let all = store.list(&Filter::default(), &page).await.expect("listed").jobs;
    let all: BTreeMap<_, _> = all.into_iter().map(|record| (record.id, record)).collect();
    let told = told.lock().expect("no panic");
    for id in &told.ordered {
        assert!(all.contains_key(id), "{id} was acknowledged and is lost");
    }
    for (id, epoch) in &told.ended {
        // The epoch of who ended it stands in the result's place for bytes: no later holder has written.
        let expected = RecordState::Completed { result: "made".to_owned(), file_bytes: *epoch };
        assert_eq!(all[id].state, expected);
    }
    println!(
        "{} orders and {} ends acknowledged, none lost or twice; {} calls told that it is not available; the longest took {:.1} s; \
         for {:.1} s none was answered",
        told.ordered.len(),
        told.ended.len(),
        told.unavailable,
        told.longest.as_secs_f64(),
        told.silence.as_secs_f64(),
    );
    assert!(told.longest < Duration::from_secs(12), "a call took {:?}", told.longest);
}
