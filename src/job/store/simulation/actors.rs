//! Who uses a store in a simulated schedule.

use super::*;

/// For how long claims last.
const LEASE: Duration = Duration::from_secs(30);
/// Most jobs of a node.
const ROOM: usize = 2;

/// Orders jobs, and changes its mind; an order whose answer is lost is given again.
pub async fn client(world: Rc<World>, num_jobs: u32) {
    let dice = &world.dice;
    let mut ids = Vec::new();
    for number in 0..num_jobs {
        world.sleep(dice.up_to(Duration::from_secs(12))).await;
        let order = NewJob {
            id: JobId::generate(crate::job::JobKind::Video),
            owner: dice.below(3).to_string(),
            priority: Priority::ALL[dice.below(3) as usize],
            model: "wan".to_owned(),
            spec: String::new(),
            cost_seconds: 1.0 + dice.below(9) as f64,
            wait: if dice.once_in(5) { dice.up_to(Duration::from_secs(20)) } else { Duration::ZERO },
            deadline: dice.once_in(6).then(|| Duration::from_secs(20) + dice.up_to(Duration::from_secs(90))),
            idempotency: dice.once_in(2).then(|| Idempotency { key: number.to_string(), request_hash: [1; 32] }),
            webhook: Some("https://hooks.example".to_owned()),
        };
        loop {
            let answer = world
                .call(async |store| store.submit(order.clone()).await, |books, answer| books.ordered(&order, answer))
                .await;
            match answer {
                Ok(_) => break ids.push(order.id),
                Err(_) => world.sleep(dice.up_to(Duration::from_secs(6))).await,
            }
        }
        let id = ids[dice.below(ids.len() as u64) as usize];
        match dice.below(6) {
            0 => {
                let _ =
                    world.call(async |store| store.cancel(id).await, |books, answer| books.cancelled(id, answer)).await;
            }
            1 => {
                let _ =
                    world.call(async |store| store.retry(id).await, |books, answer| books.retried(id, answer)).await;
            }
            2 if dice.once_in(4) => {
                let _ =
                    world.call(async |store| store.remove(id).await, |books, answer| books.removed(id, answer)).await;
            }
            3 => {
                let priority = Priority::ALL[dice.below(3) as usize];
                let _ = world.call(async |store| store.prioritise(id, priority).await, |_, _| ()).await;
            }
            _ => {}
        }
    }
    world.books.borrow_mut().all_ordered = true;
}

/// A node: claims, computes, renews, checkpoints, ends. It does not look at its own clock, so that after standing still it writes
/// with leases that are long over.
pub async fn node(world: Rc<World>, number: u32) {
    let dice = &world.dice;
    let mut held: Vec<(Claimed, u64)> = Vec::new();
    loop {
        let is_alone = held.iter().any(|(claimed, _)| claimed.is_alone);
        if held.len() < ROOM && !is_alone {
            let claimer = Claimer {
                node: number.to_string(),
                models: vec!["wan".to_owned()],
                lease: LEASE,
                is_free: held.is_empty(),
            };
            let answer = world
                .call(async |store| store.claim(&claimer).await, |books, answer| books.claimed(&claimer, answer))
                .await;
            if let Ok(Some(claimed)) = answer {
                held.push((claimed, 1 + dice.below(6)));
            }
        }
        let leases: Vec<_> = held.iter().map(|(claimed, _)| claimed.lease.clone()).collect();
        if !leases.is_empty() && !dice.once_in(4) {
            let answer = world
                .call(
                    async |store| store.renew(&leases, LEASE).await,
                    |books, answer| books.renewed(&leases, LEASE, answer),
                )
                .await;
            if let Ok(answers) = answer {
                // One in a few nodes does not listen, and finds out when it writes.
                let listens = !dice.once_in(5);
                let mut answers = answers.into_iter();
                held.retain(|_| answers.next() != Some(Renewed::Lost) || !listens);
            }
        }
        let mut kept = Vec::new();
        for (claimed, steps) in held {
            world.sleep(dice.up_to(Duration::from_secs(4))).await;
            if let Some(steps) = step(&world, &claimed.lease, steps).await {
                kept.push((claimed, steps));
            }
        }
        held = kept;
        world.sleep(dice.up_to(Duration::from_secs(3))).await;
    }
}

/// A step of a job; the steps that are left, or `None` when it is somebody else's or has ended.
async fn step(world: &World, lease: &Lease, steps: u64) -> Option<u64> {
    let dice = &world.dice;
    let has_gone = |error: StoreError| matches!(error, StoreError::Fenced).then_some(());
    let gone = match dice.below(8) {
        0 => world
            .call(
                async |store| store.start(lease).await,
                |books, answer| assert_eq!(books.written(lease, answer).is_some(), answer.is_ok()),
            )
            .await
            .err()
            .and_then(has_gone),
        1 | 2 => world
            .call(async |store| store.progress(lease, "a step").await, |books, answer| books.progressed(lease, answer))
            .await
            .err()
            .and_then(has_gone),
        3 => world
            .call(async |store| store.checkpoint(lease, "file").await, |books, answer| books.kept(lease, answer))
            .await
            .err()
            .and_then(has_gone),
        4 if dice.once_in(3) => {
            let why = if dice.once_in(2) { Return::HandOver } else { Return::Retry(Duration::from_secs(5)) };
            let call = world.call(
                async |store| store.give_back(lease, why).await,
                |books, answer| books.given_back(lease, why, answer),
            );
            // Whether it was given back or not is not known when the answer is lost: it is written to again, as by a zombie.
            match call.await {
                Ok(()) => Some(()),
                Err(error) => has_gone(error),
            }
        }
        _ if steps == 0 => {
            let outcome = match dice.below(4) {
                0 => Outcome::Failed { code: "broken".to_owned(), message: String::new() },
                1 => Outcome::Cancelled,
                _ => Outcome::Completed { result: "clip".to_owned(), file_bytes: 1, cost_seconds: Some(3.0) },
            };
            let call = world
                .call(async |store| store.finish(lease, outcome).await, |books, answer| books.finished(lease, answer));
            match call.await {
                Ok(_) => Some(()),
                Err(error) => has_gone(error),
            }
        }
        _ => None,
    };
    if gone.is_some() { None } else { Some(steps.saturating_sub(1)) }
}

/// Reaps, counts, and takes out what is more than is kept, which is nothing here.
pub async fn keeper(world: Rc<World>) {
    loop {
        world.sleep(Duration::from_secs(1) + world.dice.up_to(Duration::from_secs(2))).await;
        let _ = world.call(async |store| store.reap().await, |books, answer| books.reaped(answer)).await;
        let count = world
            .call(
                async |store| store.num_active().await,
                |books, answer| assert_eq!(*answer.as_ref().expect("a number"), books.num_active()),
            )
            .await;
        drop(count);
        if world.dice.once_in(4) {
            let _ = world
                .call(async |store| store.retain().await, |_, answer| assert!(answer.as_ref().is_ok_and(Vec::is_empty)))
                .await;
        }
    }
}

/// Takes messages to where they belong; some have to be taken more than once.
pub async fn postman(world: Rc<World>) {
    loop {
        world.sleep(world.dice.up_to(Duration::from_secs(8))).await;
        let taken = world.call(async |store| store.messages(3, LEASE).await, |_, _| ()).await;
        for message in taken.unwrap_or_default() {
            let again = world.dice.once_in(3).then(|| world.dice.up_to(Duration::from_secs(20)));
            if again.is_none() {
                world.books.borrow_mut().told.insert(message.id.clone());
            }
            let _ = world.call(async |store| store.settle(&message.id, again).await, |_, _| ()).await;
        }
    }
}

/// At the end: what the store has is what the books say, and nothing else.
pub fn audit(world: &World) {
    let books = world.books.borrow();
    (world.drive)(Box::pin(async {
        let store = &world.rig.store;
        let page = Page { after: None, limit: 1000, order: Order::Ascending };
        let all = store.list(&Filter::default(), &page).await.expect("listed").jobs;
        assert_eq!(all.len(), books.jobs.len(), "no order that was acknowledged is lost");
        for record in all {
            let job = &books.jobs[&record.id];
            let found = (record.state.as_str(), record.attempts, record.crashes, record.change);
            assert_eq!(found, (job.state, job.attempts, job.crashes, job.change), "{record:?}");
            assert!(record.state.is_terminal());
        }
        for id in &books.removed {
            assert!(matches!(store.get(*id).await, Err(StoreError::Unknown)));
        }
        assert!(store.queue(1000).await.expect("a queue").is_empty());
        assert_eq!(books.told.len(), books.ends, "one message for each end");
    }));
}
