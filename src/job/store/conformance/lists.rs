//! Lists, and what is kept.

use super::*;

on_every_store!(much: pages_join_to_the_whole_list filters_narrow_lists);

mod few {
    use super::super::*;

    on_every_store!(three: the_oldest_ended_jobs_go_first);

    fn three() -> Retention {
        Retention { max_ended_jobs: 3, max_file_bytes: 100, ..Retention::default() }
    }

    async fn the_oldest_ended_jobs_go_first(rig: Rig) {
        let running = rig.order(job("z")).await;
        rig.claim("z").await;
        let mut ids = Vec::new();
        for bytes in [10, 10, 10, 10] {
            ids.push(rig.end(job("a"), completed(bytes)).await.id);
            rig.advance(Duration::from_millis(1));
        }
        let gone = rig.store.retain().await.expect("done");
        assert_eq!(gone.iter().map(|job| job.id).collect::<Vec<_>>(), [ids[0]], "by number");
        assert_eq!(gone[0].state, RecordState::Completed { result: "made".to_owned(), file_bytes: 10 });
        let big = rig.end(job("a"), completed(95)).await.id;
        rig.advance(Duration::from_millis(1));
        let gone: Vec<_> = rig.store.retain().await.expect("done").iter().map(|job| job.id).collect();
        assert_eq!(gone, ids[1..], "by bytes, oldest first");
        let huge = rig.end(job("a"), completed(1000)).await.id;
        rig.advance(Duration::from_millis(1));
        assert_eq!(rig.store.retain().await.expect("done").len(), 1);
        refused(rig.store.get(big).await, "Unknown");
        assert_eq!(rig.state(huge).await, "completed");
        let failed = rig.end(job("a"), failed()).await.id;
        assert_eq!(rig.store.retain().await.expect("done").len(), 1, "the newest is one without bytes");
        assert_eq!(rig.state(failed).await, "failed");
        assert_eq!(rig.state(running).await, "in_progress");
        assert!(rig.store.retain().await.expect("done").is_empty());
    }
}

mod aged {
    use super::super::*;

    const DAY: Duration = Duration::from_secs(86400);

    on_every_store!(a_day: what_is_too_old_goes);

    fn a_day() -> Retention {
        Retention { max_age: Some(DAY), ..Retention::default() }
    }

    async fn what_is_too_old_goes(rig: Rig) {
        let old = rig.end(job("a"), completed(1)).await.id;
        rig.advance(DAY / 2);
        let new = rig.end(job("a"), completed(1)).await.id;
        let waiting = rig.order(job("a")).await;
        assert!(rig.store.retain().await.expect("done").is_empty());
        rig.advance(DAY / 2);
        let gone: Vec<_> = rig.store.retain().await.expect("done").iter().map(|job| job.id).collect();
        assert_eq!(gone, [old]);
        rig.advance(DAY / 2);
        let gone: Vec<_> = rig.store.retain().await.expect("done").iter().map(|job| job.id).collect();
        assert_eq!(gone, [new], "the newest too");
        assert_eq!(rig.state(waiting).await, "queued");
    }
}

async fn pages_join_to_the_whole_list(rig: Rig) {
    let mut ids = Vec::new();
    for _ in 0..7 {
        ids.push(rig.order(job("a")).await);
    }
    for order in [Order::Ascending, Order::Descending] {
        for limit in [1, 3, 7, 100] {
            let (mut seen, mut after) = (Vec::new(), None);
            loop {
                let listing = rig.store.list(&Filter::default(), &Page { after, limit, order }).await.expect("known");
                assert!(listing.jobs.len() <= limit);
                seen.extend(listing.jobs.iter().map(|job| job.id));
                after = seen.last().copied();
                if !listing.has_more {
                    break;
                }
            }
            if order == Order::Descending {
                seen.reverse();
            }
            assert_eq!(seen, ids);
        }
        let after = Some(JobId::generate(JobKind::Video));
        refused(rig.store.list(&Filter::default(), &Page { after, limit: 3, order }).await, "Unknown");
        let none = rig.store.list(&Filter::default(), &Page { after: None, limit: 0, order }).await.expect("known");
        assert!(none.jobs.is_empty() && none.has_more);
    }
}

async fn filters_narrow_lists(rig: Rig) {
    let done = rig.end(job("a"), completed(1)).await.id;
    let failed = rig.end(job("b"), failed()).await.id;
    let picture = rig.order(NewJob { id: JobId::generate(JobKind::Image), model: "flux".to_owned(), ..job("a") }).await;
    let running = rig.order(job("c")).await;
    rig.claim("a").await;
    rig.claim("a").await;
    let waiting = rig.order(job("b")).await;
    let cancelled = rig.order(job("b")).await;
    rig.store.cancel(cancelled).await.expect("it waits");
    let find = async |filter: Filter| -> Vec<JobId> {
        let page = Page { after: None, limit: 10, order: Order::Ascending };
        rig.store.list(&filter, &page).await.expect("listed").jobs.into_iter().map(|job| job.id).collect()
    };
    let all = Filter::default;
    assert_eq!(find(all()).await, [done, failed, picture, running, waiting, cancelled]);
    assert_eq!(find(Filter { owner: Some("a".to_owned()), ..all() }).await, [done, picture]);
    assert_eq!(find(Filter { kind: Some(JobKind::Image), ..all() }).await, [picture]);
    assert_eq!(find(Filter { model: Some("flux".to_owned()), ..all() }).await, [picture]);
    assert_eq!(find(Filter { state: Some("completed"), ..all() }).await, [done]);
    assert_eq!(find(Filter { state: Some("failed"), ..all() }).await, [failed]);
    assert_eq!(find(Filter { state: Some("queued"), ..all() }).await, [waiting]);
    assert_eq!(find(Filter { state: Some("in_progress"), ..all() }).await, [picture, running]);
    assert_eq!(find(Filter { state: Some("cancelled"), owner: Some("b".to_owned()), ..all() }).await, [cancelled]);
    assert!(find(Filter { state: Some("cancelled"), owner: Some("a".to_owned()), ..all() }).await.is_empty());
    let page = Page { after: Some(done), limit: 1, order: Order::Ascending };
    let filter = Filter { owner: Some("b".to_owned()), ..all() };
    let listing = rig.store.list(&filter, &page).await.expect("listed");
    assert_eq!((listing.jobs[0].id, listing.has_more), (failed, true));
}
