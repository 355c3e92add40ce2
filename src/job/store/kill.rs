//! Processes that are killed while they order, claim and end jobs: what was acknowledged is there afterwards, once.
//!
//! The test starts its own program again as the process that is killed, which says on its standard output what was acknowledged.
//! `scripts/chaos/store-kill` does so for as long as it is asked to.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use super::conformance::{claimer, completed, job, postgres_url};
use super::*;

/// Where the process that is killed finds its store: a folder, or a URL.
const PLACE: &str = "TALE_KILL_PLACE";
/// How often it is killed; few times unless somebody asks for more.
const KILLS: &str = "TALE_KILLS";
/// So short that jobs of a process that was killed soon are somebody else's.
const LEASE: Duration = Duration::from_millis(200);

async fn open(place: &str) -> Arc<dyn JobStore> {
    let retention = Retention { max_active_jobs: 1 << 20, ..Retention::default() };
    if place.starts_with("postgres:") {
        return Arc::new(PostgresStore::connect(place, retention).await.expect("connected"));
    }
    loop {
        match SqliteStore::open(place.as_ref(), retention).await {
            Err(StoreError::InUse { .. }) => tokio::time::sleep(Duration::from_millis(2)).await,
            store => break Arc::new(store.expect("opened")),
        }
    }
}

/// The process that is killed: some tasks order, claim and end jobs without pause.
#[tokio::test]
#[ignore = "the part of another test that is killed"]
async fn victim() {
    let Ok(place) = std::env::var(PLACE) else { return };
    let store = open(&place).await;
    let tasks = (0..4).map(|task| tokio::spawn(toil(store.clone(), task)));
    for task in tasks.collect::<Vec<_>>() {
        task.await.expect("no panic");
    }
}

async fn toil(store: Arc<dyn JobStore>, task: u32) {
    let claimer = Claimer { lease: LEASE, ..claimer(&task.to_string()) };
    for round in 0u64.. {
        let order = NewJob { webhook: Some("https://hooks.example".to_owned()), ..job(&task.to_string()) };
        let id = order.id;
        store.submit(order).await.expect("room");
        println!("ordered {id}");
        store.reap().await.expect("reaped");
        let Some(claimed) = store.claim(&claimer).await.expect("a claim") else { continue };
        println!("claimed {} {}", claimed.lease.id, claimed.lease.epoch);
        let made = async {
            store.start(&claimed.lease).await?;
            store.progress(&claimed.lease, "half").await?;
            store.checkpoint(&claimed.lease, &round.to_string()).await?;
            if round % 5 == 0 {
                return store.give_back(&claimed.lease, Return::HandOver).await;
            }
            store.finish(&claimed.lease, completed(round)).await?;
            println!("ended {} {}", claimed.lease.id, claimed.lease.epoch);
            Ok(())
        };
        match made.await {
            Ok(()) | Err(StoreError::Fenced) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// What processes have said.
#[derive(Default)]
struct Said {
    ordered: BTreeSet<JobId>,
    /// With the epoch of who ended it.
    ended: BTreeMap<JobId, u64>,
    claimed: BTreeSet<(JobId, u64)>,
    /// Ended, looked at, and taken out.
    settled: BTreeSet<JobId>,
    messages: BTreeSet<JobId>,
}

impl Said {
    fn hear(&mut self, line: &str) {
        let words: Vec<_> = line.split(' ').collect();
        let id = || words[1].parse().expect("the name of a job");
        let epoch = || words[2].parse().expect("a number");
        match words[0] {
            "ordered" => assert!(self.ordered.insert(id()), "{line} twice"),
            "ended" => assert_eq!(self.ended.insert(id(), epoch()), None, "{line} twice"),
            "claimed" => assert!(self.claimed.insert((id(), epoch())), "{line} twice"),
            // What the frame of tests says.
            _ => {}
        }
    }

    /// Holds what was said against what is there.
    async fn check(&mut self, store: &dyn JobStore) {
        let page = Page { after: None, limit: usize::MAX >> 1, order: Order::Ascending };
        let there = store.list(&Filter::default(), &page).await.expect("listed").jobs;
        let there: BTreeMap<_, _> = there.into_iter().map(|record| (record.id, record)).collect();
        for id in self.ordered.difference(&self.settled) {
            assert!(there.contains_key(id), "{id} was acknowledged and is lost");
        }
        for id in self.ended.keys().filter(|id| !self.settled.contains(id)) {
            assert_eq!(there[id].state.as_str(), "completed", "the end of {id} was acknowledged and is lost");
        }
        for (id, epoch) in &self.claimed {
            assert!(self.ended.get(id).is_none_or(|last| epoch <= last), "{id} was claimed after its end");
        }
        loop {
            let messages = store.messages(1000, Duration::from_secs(3600)).await.expect("messages");
            if messages.is_empty() {
                break;
            }
            for message in messages {
                assert!(self.messages.insert(message.job), "{message:?} twice");
                assert!(there[&message.job].state.is_terminal(), "{message:?} of a job that has not ended");
                store.settle(&message.id, None).await.expect("settled");
            }
        }
        for (id, record) in there.iter().filter(|(_, record)| record.state.is_terminal()) {
            assert!(self.messages.contains(id), "{record:?} has ended and nobody is told");
            self.settled.insert(*id);
            store.remove(*id).await.expect("there");
        }
    }
}

/// Kills a process so many times, each at another moment after its first order, and looks at the store after each.
fn kill(place: &str, kills: u64, longest: Duration) {
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    let mut said = Said::default();
    let mut moments = 0x9e37_79b9_u64;
    for _ in 0..kills {
        let mut victim = Command::new(std::env::current_exe().expect("a program"))
            .args(["--exact", &format!("{}::victim", module()), "--ignored", "--nocapture"])
            .env(PLACE, place)
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let output = BufReader::new(victim.stdout.take().expect("piped"));
        let mut lines = output.lines().map(|line| line.expect("readable"));
        // It has begun when it has ordered something.
        let first = lines.by_ref().find(|line| line.starts_with("ordered"));
        said.hear(&first.expect("it orders before it ends"));
        moments = moments.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_micros((moments >> 32) % longest.as_micros() as u64));
        victim.kill().expect("killed");
        let status = victim.wait().expect("gone");
        assert_eq!(status.signal(), Some(9), "it was at work until then");
        lines.for_each(|line| said.hear(&line));
        runtime.block_on(async { said.check(&*open(place).await).await });
    }
    runtime.block_on(async {
        let store = open(place).await;
        tokio::time::sleep(LEASE).await;
        store.reap().await.expect("reaped");
        while let Some(claimed) = store.claim(&claimer("last")).await.expect("a claim") {
            store.finish(&claimed.lease, completed(1)).await.expect("held");
        }
        said.check(&*store).await;
        assert_eq!(store.num_active().await.expect("a number"), 0);
    });
    println!(
        "{kills} kills: {} orders and {} ends acknowledged, none lost or twice",
        said.ordered.len(),
        said.ended.len()
    );
}

/// Where this module is, as the frame of tests names it.
fn module() -> &'static str {
    module_path!().split_once("::").expect("within a crate").1
}

fn kills(few: u64) -> u64 {
    std::env::var(KILLS).map_or(few, |kills| kills.parse().expect("a number"))
}

#[test]
fn nothing_acknowledged_is_lost_from_a_file() {
    let dir = tempfile::tempdir().expect("a folder");
    kill(dir.path().to_str().expect("a name"), kills(8), Duration::from_millis(60));
}

#[test]
fn nothing_acknowledged_is_lost_from_a_server() {
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    let Some(url) = runtime.block_on(postgres_url()) else { return };
    kill(&url, kills(8), Duration::from_millis(250));
}
