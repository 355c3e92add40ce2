//! Orders: what is kept of them, names that are used twice, places.

use super::*;

on_every_store!(much: what_is_ordered_is_kept_whole the_same_order_is_the_same_job a_hundred_equal_orders_are_one_job a_lost_answer_is_told_again nothing_is_known_of_others);

mod places {
    use super::super::*;

    on_every_store!(four: owners_share_the_places concurrent_orders_do_not_exceed_the_places);

    fn four() -> Retention {
        Retention { max_active_jobs: 4, ..Retention::default() }
    }

    async fn owners_share_the_places(rig: Rig) {
        for _ in 0..3 {
            rig.order(job("a")).await;
        }
        refused(rig.store.submit(job("a")).await, "Full(Share { limit: 4, held: 3 })");
        rig.order(job("b")).await;
        refused(rig.store.submit(job("c")).await, "Full(Full { limit: 4 })");
        assert_eq!(rig.store.num_active().await.expect("a number"), 4);
        let claimed = rig.claim("a").await;
        refused(rig.store.submit(job("c")).await, "Full");
        rig.store.finish(&claimed.lease, failed()).await.expect("held");
        rig.order(job("c")).await;
        refused(rig.store.retry(claimed.record.id).await, "Full");
    }

    async fn concurrent_orders_do_not_exceed_the_places(rig: Rig) {
        let orders = (0..24).map(|owner| {
            let store = rig.store.clone();
            tokio::spawn(async move { store.submit(job(&owner.to_string())).await.is_ok() })
        });
        let mut taken = 0;
        for order in orders.collect::<Vec<_>>() {
            taken += usize::from(order.await.expect("no panic"));
        }
        assert_eq!((taken, rig.store.num_active().await.expect("a number")), (4, 4));
    }
}

async fn what_is_ordered_is_kept_whole(rig: Rig) {
    let order = NewJob {
        priority: Priority::Batch,
        cost_seconds: 2.625,
        deadline: Some(Duration::from_secs(3600)),
        idempotency: Some(Idempotency { key: "k".repeat(255), request_hash: [0xfe; 32] }),
        webhook: Some("https://hooks.example/end".to_owned()),
        id: JobId::generate(JobKind::Image),
        ..job("Ünï")
    };
    let Submitted::New(record) = rig.store.submit(order.clone()).await.expect("room") else { panic!("it is new") };
    assert_eq!(rig.get(order.id).await, record);
    assert_eq!((record.owner, record.model, record.spec), (order.owner, order.model, order.spec));
    assert_eq!((record.priority, record.cost_seconds), (Priority::Batch, 2.625));
    assert_eq!((record.state, record.attempts, record.crashes, record.change), (RecordState::Queued, 0, 0, 0));
    assert_eq!((record.started, record.ended, record.progress, record.checkpoint), (None, None, None, None));
    let patience = record.deadline.expect("asked for").duration_since(record.created).expect("later");
    assert!((3599..=3601).contains(&patience.as_secs()), "{patience:?}");
    assert!(!record.is_cancelled);
}

fn named(key: &str, hash: u8) -> NewJob {
    NewJob { idempotency: Some(Idempotency { key: key.to_owned(), request_hash: [hash; 32] }), ..job("a") }
}

async fn the_same_order_is_the_same_job(rig: Rig) {
    let first = rig.order(named("k", 1)).await;
    let Submitted::Known(again) = rig.store.submit(named("k", 1)).await.expect("the same") else {
        panic!("it is known")
    };
    assert_eq!(again, rig.get(first).await);
    refused(rig.store.submit(named("k", 2)).await, "KeyReused");
    rig.order(named("another", 2)).await;
    rig.order(NewJob { owner: "b".to_owned(), ..named("k", 2) }).await;
    rig.store.remove(first).await.expect("there");
    rig.order(named("k", 2)).await;
}

async fn a_hundred_equal_orders_are_one_job(rig: Rig) {
    let orders = (0..100).map(|_| {
        let store = rig.store.clone();
        tokio::spawn(async move { store.submit(named("k", 1)).await.expect("taken") })
    });
    let (mut new, mut ids) = (0, std::collections::HashSet::new());
    for order in orders.collect::<Vec<_>>() {
        let (is_new, record) = match order.await.expect("no panic") {
            Submitted::New(record) => (1, record),
            Submitted::Known(record) => (0, record),
        };
        new += is_new;
        ids.insert(record.id);
    }
    assert_eq!((new, ids.len(), rig.store.num_active().await.expect("a number")), (1, 1, 1));
}

async fn a_lost_answer_is_told_again(rig: Rig) {
    let order = job("a");
    rig.order(order.clone()).await;
    let again = rig.store.submit(order.clone()).await.expect("the same");
    assert_eq!(again, Submitted::Known(rig.get(order.id).await));
    assert_eq!(rig.store.num_active().await.expect("a number"), 1);
}

async fn nothing_is_known_of_others(rig: Rig) {
    let id = JobId::generate(JobKind::Video);
    let store = &rig.store;
    refused(store.get(id).await, "Unknown");
    refused(store.cancel(id).await, "Unknown");
    refused(store.retry(id).await, "Unknown");
    refused(store.prioritise(id, Priority::Batch).await, "Unknown");
    refused(store.remove(id).await, "Unknown");
    let lease = Lease { id, epoch: 1 };
    refused(store.start(&lease).await, "Fenced");
    refused(store.progress(&lease, "1").await, "Fenced");
    refused(store.checkpoint(&lease, "1").await, "Fenced");
    refused(store.finish(&lease, failed()).await, "Fenced");
    refused(store.give_back(&lease, Return::HandOver).await, "Fenced");
    assert_eq!(store.renew(&[lease], LEASE).await.expect("an answer"), [Renewed::Lost]);
    rig.claim_nothing("a").await;
    store.check().await.expect("it can write");
    assert!(store.reap().await.expect("nothing").is_empty());
    assert!(store.retain().await.expect("nothing").is_empty());
    assert!(store.messages(5, LEASE).await.expect("none").is_empty());
    store.settle("none", None).await.expect("gone before");
    assert_eq!(store.renew(&[], LEASE).await.expect("an answer"), []);
}
