//! Holders that go silent, jobs that take their nodes with them, deadlines.

use super::*;

on_every_store!(much: silence_gives_a_job_back the_third_crash_in_a_row_is_the_last a_checkpoint_counts_crashes_anew a_job_with_two_crashes_runs_alone deadlines_end_jobs whole_rows_after_dropped_writes);

/// Claims a job and goes silent.
async fn crash(rig: &Rig, node: &str) -> JobRecord {
    let claimed = rig.claim(node).await;
    rig.advance(OVER);
    let mut reaped = rig.store.reap().await.expect("reaped");
    assert_eq!(reaped.len(), 1);
    assert_eq!(reaped[0].id, claimed.record.id);
    reaped.remove(0)
}

async fn silence_gives_a_job_back(rig: Rig) {
    let id = rig.order(job("a")).await;
    let claimed = rig.claim("a").await;
    rig.store.progress(&claimed.lease, "half").await.expect("held");
    assert!(rig.store.reap().await.expect("reaped").is_empty());
    rig.advance(Duration::from_secs(29));
    assert!(rig.store.reap().await.expect("reaped").is_empty(), "the lease lasts");
    rig.claim_nothing("b").await;
    rig.advance(Duration::from_secs(2));
    let reaped = rig.store.reap().await.expect("reaped");
    assert_eq!(reaped, [rig.get(id).await]);
    assert_eq!(
        (reaped[0].state.as_str(), reaped[0].crashes, reaped[0].attempts, reaped[0].change),
        ("queued", 1, 1, 3)
    );
    assert!(rig.store.reap().await.expect("reaped").is_empty(), "once");
    assert_eq!(rig.claim("b").await.record.attempts, 2);
}

async fn the_third_crash_in_a_row_is_the_last(rig: Rig) {
    let id = rig.order(job("a")).await;
    assert_eq!(crash(&rig, "a").await.crashes, 1);
    assert_eq!(crash(&rig, "b").await.crashes, 2);
    let record = crash(&rig, "c").await;
    let RecordState::Failed { code, .. } = &record.state else { panic!("{record:?}") };
    assert_eq!((code.as_str(), record.crashes, record.attempts), ("crashed", 3, 3));
    assert!(record.ended.is_some());
    rig.claim_nothing("a").await;
    rig.store.retry(id).await.expect("it failed");
    assert_eq!(crash(&rig, "a").await.crashes, 1, "they count anew");
}

async fn a_checkpoint_counts_crashes_anew(rig: Rig) {
    let id = rig.order(job("a")).await;
    for round in 0..5 {
        crash(&rig, "a").await;
        let claimed = rig.claim("a").await;
        assert_eq!((claimed.record.crashes, claimed.is_alone), (1, false), "round {round}");
        rig.store.checkpoint(&claimed.lease, &round.to_string()).await.expect("held");
        assert_eq!(rig.get(id).await.crashes, 0);
        rig.store.give_back(&claimed.lease, Return::HandOver).await.expect("held");
    }
}

async fn a_job_with_two_crashes_runs_alone(rig: Rig) {
    let bad = rig.order(job("a")).await;
    crash(&rig, "a").await;
    crash(&rig, "a").await;
    let good = rig.order(job("b")).await;
    let busy = Claimer { is_free: false, ..claimer("busy") };
    let claimed = rig.store.claim(&busy).await.expect("a claim").expect("the other one waits");
    assert_eq!((claimed.record.id, claimed.is_alone), (good, false));
    assert!(rig.store.claim(&busy).await.expect("a claim").is_none());
    let claimed = rig.claim("free").await;
    assert_eq!((claimed.record.id, claimed.is_alone), (bad, true));
    rig.store.finish(&claimed.lease, completed(1)).await.expect("held");
}

async fn deadlines_end_jobs(rig: Rig) {
    let minute = Duration::from_secs(60);
    let running = rig.order(NewJob { deadline: Some(minute), ..job("a") }).await;
    let lease = rig.claim("a").await.lease;
    let waiting = rig.order(NewJob { deadline: Some(minute), ..job("a") }).await;
    let patient = rig.order(NewJob { deadline: Some(minute * 10), wait: minute, ..job("a") }).await;
    rig.advance(minute + Duration::from_secs(1));
    rig.store.renew(std::slice::from_ref(&lease), LEASE).await.expect("an answer");
    let claimed = rig.claim("b").await;
    assert_eq!(claimed.record.id, patient, "what is too late is not begun");
    let mut reaped: Vec<_> = rig.store.reap().await.expect("reaped").into_iter().map(|job| job.id).collect();
    reaped.sort();
    assert_eq!(reaped, [running, waiting]);
    for id in [running, waiting] {
        let RecordState::Failed { code, .. } = rig.get(id).await.state else { panic!("it is over") };
        assert_eq!(code, "deadline_exceeded");
    }
    refused(rig.store.finish(&lease, completed(1)).await, "Fenced");
    rig.store.finish(&claimed.lease, completed(1)).await.expect("in time");
}

/// Writes whose callers go away at some moment happen as a whole or not at all.
async fn whole_rows_after_dropped_writes(rig: Rig) {
    for round in 0u32..30 {
        let order = NewJob {
            idempotency: Some(Idempotency { key: round.to_string(), request_hash: [7; 32] }),
            webhook: Some("https://hooks.example".to_owned()),
            ..job("a")
        };
        let patience = Duration::from_micros(u64::from(round) * 150);
        let _ = tokio::time::timeout(patience, rig.store.submit(order.clone())).await;
        // The same order again ends the doubt, whatever became of the first.
        let id = match rig.store.submit(order).await.expect("room") {
            Submitted::New(record) | Submitted::Known(record) => record.id,
        };
        let _ = tokio::time::timeout(patience, rig.store.claim(&claimer("a"))).await;
        let record = rig.get(id).await;
        let epoch = u64::from(record.attempts);
        let lease = match record.state {
            RecordState::Running { .. } => Lease { id, epoch },
            _ => match rig.store.claim(&claimer("a")).await.expect("a claim") {
                Some(claimed) => claimed.lease,
                // The first claim went through just now.
                None => Lease { id, epoch: 1 },
            },
        };
        assert_eq!((lease.id, lease.epoch), (id, 1), "one claim at most");
        let _ = tokio::time::timeout(patience, rig.store.finish(&lease, completed(9))).await;
        match rig.store.finish(&lease, completed(9)).await {
            Ok(_) | Err(StoreError::Fenced) => {}
            Err(error) => panic!("{error}"),
        }
        let record = rig.get(id).await;
        assert_eq!((record.state.as_str(), record.attempts, record.change), ("completed", 1, 2));
        assert_eq!(rig.store.messages(10, LEASE).await.expect("messages").len(), 1, "one for one end");
        assert_eq!(rig.store.num_active().await.expect("a number"), 0);
    }
}
