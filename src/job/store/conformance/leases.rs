//! Claims, writes of holders, and those that are refused.

use super::*;

on_every_store!(much: a_job_goes_its_way only_nodes_that_can_claim every_write_of_a_zombie_is_refused a_renewed_lease_lasts_on a_hand_over_is_no_attempt a_retry_waits cancel_reaches_a_waiting_and_a_running_job a_removed_job_is_nobodys a_job_is_tried_again priorities_change_while_waiting one_job_has_one_holder news_wakes);

async fn a_job_goes_its_way(rig: Rig) {
    let id = rig.order(job("a")).await;
    let claimed = rig.claim("node-1").await;
    assert_eq!((claimed.lease.clone(), claimed.is_alone), (Lease { id, epoch: 1 }, false));
    assert_eq!(claimed.record, rig.get(id).await);
    assert_eq!(claimed.record.state, RecordState::Running { node: "node-1".to_owned() });
    assert_eq!((claimed.record.attempts, claimed.record.change, claimed.record.started), (1, 1, None));
    rig.claim_nothing("node-2").await;
    rig.store.start(&claimed.lease).await.expect("held");
    let started = rig.get(id).await.started;
    assert!(started.is_some());
    rig.advance(Duration::from_secs(1));
    rig.store.start(&claimed.lease).await.expect("held");
    assert_eq!(rig.get(id).await.started, started, "only the first time counts");
    rig.store.progress(&claimed.lease, "a quarter").await.expect("held");
    rig.store.progress(&claimed.lease, "half").await.expect("held");
    assert_eq!(rig.store.checkpoint(&claimed.lease, "file-1").await.expect("held"), None);
    assert_eq!(rig.store.checkpoint(&claimed.lease, "file-2").await.expect("held").as_deref(), Some("file-1"));
    let record = rig.get(id).await;
    assert_eq!((record.progress.as_deref(), record.checkpoint.as_deref()), (Some("half"), Some("file-2")));
    assert_eq!(record.change, 3);
    let outcome =
        Outcome::Completed { result: "a clip".to_owned(), file_bytes: u64::from(u32::MAX) + 7, cost_seconds: None };
    let ended = rig.store.finish(&claimed.lease, outcome).await.expect("held");
    let state = RecordState::Completed { result: "a clip".to_owned(), file_bytes: u64::from(u32::MAX) + 7 };
    assert_eq!((ended.state.clone(), ended.change, ended.ended.is_some()), (state, 4, true));
    assert_eq!(rig.get(id).await, ended);
    assert_eq!(rig.store.num_active().await.expect("a number"), 0);
    refused(rig.store.finish(&claimed.lease, failed()).await, "Fenced");
    refused(rig.store.cancel(id).await, r#"WrongState { state: "completed" }"#);
    refused(rig.store.retry(id).await, r#"WrongState { state: "completed" }"#);
    refused(rig.store.prioritise(id, Priority::Batch).await, r#"WrongState { state: "completed" }"#);
}

async fn only_nodes_that_can_claim(rig: Rig) {
    let later = rig.order(NewJob { wait: Duration::from_secs(60), ..job("a") }).await;
    let other = rig.order(NewJob { model: "flux".to_owned(), ..job("a") }).await;
    let only = |models: &[&str]| Claimer { models: models.iter().map(|m| m.to_string()).collect(), ..claimer("a") };
    for models in [vec![], vec!["wan"], vec!["w%", "'); drop table jobs; --"]] {
        assert!(rig.store.claim(&only(&models)).await.expect("a claim").is_none(), "{models:?}");
    }
    let claimed = rig.store.claim(&only(&["sdxl", "flux"])).await.expect("a claim").expect("it waits");
    assert_eq!(claimed.record.id, other);
    rig.advance(Duration::from_secs(61));
    assert_eq!(rig.claim("a").await.record.id, later);
}

/// Every write of a holder, which has to be refused, and leaves the job as it is.
async fn refuse_all(rig: &Rig, lease: &Lease) {
    let before = rig.store.get(lease.id).await.ok();
    let store = &rig.store;
    refused(store.start(lease).await, "Fenced");
    refused(store.progress(lease, "zombie").await, "Fenced");
    refused(store.checkpoint(lease, "zombie").await, "Fenced");
    for outcome in [completed(5), failed(), Outcome::Cancelled] {
        refused(store.finish(lease, outcome).await, "Fenced");
    }
    refused(store.give_back(lease, Return::HandOver).await, "Fenced");
    refused(store.give_back(lease, Return::Retry(Duration::ZERO)).await, "Fenced");
    assert_eq!(store.renew(std::slice::from_ref(lease), LEASE).await.expect("an answer"), [Renewed::Lost]);
    assert_eq!(store.get(lease.id).await.ok(), before);
}

async fn every_write_of_a_zombie_is_refused(rig: Rig) {
    let id = rig.order(job("a")).await;
    let zombie = rig.claim("a").await.lease;
    rig.advance(OVER);
    assert_eq!(rig.store.reap().await.expect("reaped").len(), 1);
    refuse_all(&rig, &zombie).await;
    let second = rig.claim("b").await.lease;
    assert_eq!(second, Lease { id, epoch: 2 });
    refuse_all(&rig, &zombie).await;
    refuse_all(&rig, &Lease { id, epoch: 3 }).await;
    rig.store.give_back(&second, Return::HandOver).await.expect("held");
    refuse_all(&rig, &second).await;
    let third = rig.claim("a").await.lease;
    rig.store.finish(&third, completed(1)).await.expect("held");
    refuse_all(&rig, &third).await;
    refuse_all(&rig, &zombie).await;
}

async fn a_renewed_lease_lasts_on(rig: Rig) {
    rig.order(job("a")).await;
    rig.order(job("a")).await;
    let (kept, lost) = (rig.claim("a").await.lease, rig.claim("b").await.lease);
    let unknown = Lease { id: JobId::generate(JobKind::Video), epoch: 1 };
    for _ in 0..4 {
        rig.advance(Duration::from_secs(20));
        let answers = rig.store.renew(&[unknown.clone(), kept.clone()], LEASE).await.expect("an answer");
        assert_eq!(answers, [Renewed::Lost, Renewed::Held]);
    }
    let reaped = rig.store.reap().await.expect("reaped");
    assert_eq!(reaped.iter().map(|job| job.id).collect::<Vec<_>>(), [lost.id]);
    assert_eq!(rig.store.renew(&[lost, kept], LEASE).await.expect("an answer"), [Renewed::Lost, Renewed::Held]);
}

async fn a_hand_over_is_no_attempt(rig: Rig) {
    let id = rig.order(job("a")).await;
    for epoch in 1..5 {
        let claimed = rig.claim("a").await;
        assert_eq!((claimed.lease.epoch, claimed.record.attempts), (epoch, 1));
        rig.store.checkpoint(&claimed.lease, "so far").await.expect("held");
        rig.store.give_back(&claimed.lease, Return::HandOver).await.expect("held");
        let record = rig.get(id).await;
        assert_eq!((record.state, record.attempts, record.crashes), (RecordState::Queued, 0, 0));
        assert_eq!(record.checkpoint.as_deref(), Some("so far"));
    }
}

async fn a_retry_waits(rig: Rig) {
    let id = rig.order(job("a")).await;
    let claimed = rig.claim("a").await;
    rig.store.give_back(&claimed.lease, Return::Retry(Duration::from_secs(10))).await.expect("held");
    rig.claim_nothing("a").await;
    assert_eq!((rig.state(id).await, rig.get(id).await.attempts), ("queued", 1));
    rig.advance(Duration::from_secs(11));
    let claimed = rig.claim("a").await;
    assert_eq!((claimed.record.id, claimed.record.attempts), (id, 2));
}

async fn cancel_reaches_a_waiting_and_a_running_job(rig: Rig) {
    let (waiting, running) = (job("a"), job("a"));
    let running = rig.order(running).await;
    let lease = rig.claim("a").await.lease;
    let waiting = rig.order(waiting).await;
    let record = rig.store.cancel(waiting).await.expect("it waits");
    assert_eq!((record.state, record.ended.is_some(), record.change), (RecordState::Cancelled, true, 1));
    refused(rig.store.cancel(waiting).await, r#"WrongState { state: "cancelled" }"#);
    let record = rig.store.cancel(running).await.expect("it runs");
    assert_eq!((record.state.as_str(), record.is_cancelled, record.change), ("in_progress", true, 1));
    rig.store.cancel(running).await.expect("it still runs");
    assert_eq!(rig.store.renew(std::slice::from_ref(&lease), LEASE).await.expect("an answer"), [Renewed::Cancelled]);
    let record = rig.store.finish(&lease, Outcome::Cancelled).await.expect("held");
    assert_eq!(record.state, RecordState::Cancelled);
    rig.claim_nothing("a").await;
    // A holder that gives it back, or goes silent, is as good as one that ends it.
    for reap in [false, true] {
        let id = rig.order(job("a")).await;
        let lease = rig.claim("a").await.lease;
        rig.store.cancel(id).await.expect("it runs");
        if reap {
            rig.advance(OVER);
            rig.store.reap().await.expect("reaped");
        } else {
            rig.store.give_back(&lease, Return::HandOver).await.expect("held");
        }
        assert_eq!(rig.state(id).await, "cancelled");
    }
}

async fn a_removed_job_is_nobodys(rig: Rig) {
    let id = rig.order(job("a")).await;
    let lease = rig.claim("a").await.lease;
    assert_eq!(rig.store.remove(id).await.expect("there").state.as_str(), "in_progress");
    refused(rig.store.get(id).await, "Unknown");
    refuse_all(&rig, &lease).await;
    assert_eq!(rig.store.num_active().await.expect("a number"), 0);
    let waits = rig.order(job("a")).await;
    rig.store.remove(waits).await.expect("there");
    rig.claim_nothing("a").await;
    let ended = rig.end(job("a"), completed(7)).await;
    assert_eq!(rig.store.remove(ended.id).await.expect("there"), ended);
}

async fn a_job_is_tried_again(rig: Rig) {
    let hour = Duration::from_secs(3600);
    let id = rig.order(NewJob { deadline: Some(hour), ..job("a") }).await;
    refused(rig.store.retry(id).await, r#"WrongState { state: "queued" }"#);
    let lease = rig.claim("a").await.lease;
    refused(rig.store.retry(id).await, r#"WrongState { state: "in_progress" }"#);
    rig.store.checkpoint(&lease, "so far").await.expect("held");
    rig.store.finish(&lease, failed()).await.expect("held");
    rig.advance(hour * 2);
    let record = rig.store.retry(id).await.expect("it failed");
    assert_eq!((record.state.as_str(), record.ended, record.change), ("queued", None, 3));
    assert_eq!(record, rig.get(id).await);
    assert!(rig.store.reap().await.expect("reaped").is_empty(), "its deadline counts from the retry");
    let claimed = rig.claim("a").await;
    assert_eq!((claimed.lease.epoch, claimed.record.checkpoint.as_deref()), (2, Some("so far")));
    rig.store.cancel(id).await.expect("it runs");
    rig.store.finish(&claimed.lease, Outcome::Cancelled).await.expect("held");
    rig.store.retry(id).await.expect("it was cancelled");
    let claimed = rig.claim("a").await;
    assert!(!claimed.record.is_cancelled);
    rig.store.finish(&claimed.lease, completed(1)).await.expect("held");
}

async fn priorities_change_while_waiting(rig: Rig) {
    let (first, second) = (rig.order(job("a")).await, rig.order(job("a")).await);
    let record = rig.store.prioritise(first, Priority::Batch).await.expect("it waits");
    assert_eq!((record.priority, record.change), (Priority::Batch, 0));
    rig.store.prioritise(first, Priority::Batch).await.expect("it still waits");
    let served = rig.claim("a").await;
    assert_eq!(served.record.id, first, "both flows begin at the same time, and it is older");
    refused(rig.store.prioritise(first, Priority::Standard).await, r#"WrongState { state: "in_progress" }"#);
    rig.store.prioritise(second, Priority::Interactive).await.expect("it waits");
    assert_eq!(rig.get(second).await.priority, Priority::Interactive);
    assert_eq!(rig.claim("a").await.record.priority, Priority::Interactive);
}

async fn one_job_has_one_holder(rig: Rig) {
    for _ in 0..20 {
        rig.order(job("a")).await;
    }
    let claims = (0..40).map(|node| {
        let store = rig.store.clone();
        tokio::spawn(async move { store.claim(&claimer(&node.to_string())).await.expect("a claim") })
    });
    let mut ids = std::collections::HashSet::new();
    let mut found = 0;
    for claim in claims.collect::<Vec<_>>() {
        if let Some(claimed) = claim.await.expect("no panic") {
            assert_eq!(claimed.lease.epoch, 1);
            assert!(ids.insert(claimed.record.id), "{claimed:?} was claimed before");
            found += 1;
        }
    }
    // A claim may find that what it looks at is held by another one, and nothing else waits.
    while let Some(claimed) = rig.store.claim(&claimer("last")).await.expect("a claim") {
        assert!(ids.insert(claimed.record.id));
        found += 1;
    }
    assert_eq!(found, 20);
}

async fn news_wakes(rig: Rig) {
    // The first may return for what was before.
    rig.store.news(Duration::from_millis(50)).await;
    let waiter = {
        let store = rig.store.clone();
        tokio::spawn(async move {
            let began = std::time::Instant::now();
            store.news(Duration::from_secs(60)).await;
            began.elapsed()
        })
    };
    // Whether it listens yet or not: news that comes before is not lost on who is about to wait.
    rig.order(job("a")).await;
    let waited = waiter.await.expect("no panic");
    assert!(waited < Duration::from_secs(50), "{waited:?}");
}
