//! Whose turn it is.

use std::collections::HashMap;

use proptest::prelude::*;
use proptest::strategy::ValueTree;

use super::*;

on_every_store!(much: a_classs_share_is_its_weight who_was_away_has_saved_nothing a_model_that_nobody_serves_holds_nobody_up what_it_really_cost_counts a_hand_over_costs_no_turn waiting_for_later_saves_nothing flows_are_forgotten);

mod order {
    use super::super::*;

    on_every_store!(many: the_order_is_that_of_the_rules);

    fn many() -> Retention {
        Retention { max_active_jobs: 10_000, ..Retention::default() }
    }

    /// The same random history in this store and in the one in memory, which asks [`crate::job::store::flow`].
    async fn the_order_is_that_of_the_rules(rig: Rig) {
        super::the_order_is_that_of_the_rules(rig).await;
    }
}

mod greedy {
    use super::super::*;

    on_every_store!(thousands: one_with_fifty_times_the_load);

    fn thousands() -> Retention {
        Retention { max_active_jobs: 100_000, ..Retention::default() }
    }

    async fn one_with_fifty_times_the_load(rig: Rig) {
        super::one_with_fifty_times_the_load(rig).await;
    }
}

/// Makes the next job, and says whose it was.
async fn serve(rig: &Rig) -> (String, Priority) {
    let claimed = rig.claim("a").await;
    rig.store.finish(&claimed.lease, completed(0)).await.expect("held");
    (claimed.record.owner, claimed.record.priority)
}

async fn a_classs_share_is_its_weight(rig: Rig) {
    for priority in Priority::ALL {
        for _ in 0..45 {
            rig.order(NewJob { priority, ..job("a") }).await;
        }
    }
    let mut served = HashMap::new();
    for _ in 0..42 {
        *served.entry(serve(&rig).await.1).or_insert(0) += 1;
    }
    assert_eq!(Priority::ALL.map(|priority| served[&priority]), [32, 8, 2]);
}

/// One owner offers 50 times as many jobs as each of nine others, all of different costs; two nodes work.
async fn one_with_fifty_times_the_load(rig: Rig) {
    let cost = |seed: usize| 0.5 + (seed * 7919 % 97) as f64 / 40.0;
    let mut seed = 0;
    let mut offer = async |owner: usize, count: usize| {
        for _ in 0..count {
            seed += 1;
            rig.order(NewJob { cost_seconds: cost(seed), ..job(&format!("owner-{owner}")) }).await;
        }
    };
    let mut seconds = [0.0; 10];
    let mut running: Vec<Claimed> = Vec::new();
    for round in 0..20 {
        // The others offer what they get and a little more, so that each of them always has something waiting.
        let count = if round == 0 { 4 } else { 1 };
        for owner in 1..10 {
            offer(owner, count).await;
        }
        offer(0, 50 * count).await;
        for _ in 0..10 {
            running.push(rig.claim(if running.is_empty() { "a" } else { "b" }).await);
            if running.len() == 2 {
                let ended = running.remove(0);
                let cost_seconds = Some(ended.record.cost_seconds);
                let outcome = Outcome::Completed { result: String::new(), file_bytes: 0, cost_seconds };
                rig.store.finish(&ended.lease, outcome).await.expect("held");
                let owner: usize = ended.record.owner["owner-".len()..].parse().expect("a number");
                seconds[owner] += ended.record.cost_seconds;
            }
        }
    }
    let sum: f64 = seconds.iter().sum();
    let squares: f64 = seconds.iter().map(|x| x * x).sum();
    let jain = sum * sum / (seconds.len() as f64 * squares);
    assert!(jain >= 0.98, "Jain {jain:.4}: {seconds:?}");
}

async fn who_was_away_has_saved_nothing(rig: Rig) {
    for _ in 0..20 {
        rig.order(job("busy")).await;
    }
    rig.order(job("away")).await;
    for _ in 0..11 {
        serve(&rig).await;
    }
    for _ in 0..5 {
        rig.order(job("away")).await;
        rig.order(job("new")).await;
    }
    let mut served = HashMap::new();
    for _ in 0..9 {
        *served.entry(serve(&rig).await.0).or_insert(0) += 1;
    }
    assert_eq!((served["busy"], served["away"], served["new"]), (3, 3, 3));
}

async fn a_model_that_nobody_serves_holds_nobody_up(rig: Rig) {
    rig.order(NewJob { model: "unserved".to_owned(), ..job("stuck") }).await;
    for _ in 0..20 {
        rig.order(job("busy")).await;
    }
    for _ in 0..10 {
        serve(&rig).await;
    }
    for _ in 0..10 {
        rig.order(job("new")).await;
    }
    let mut served = HashMap::new();
    for _ in 0..8 {
        *served.entry(serve(&rig).await.0).or_insert(0) += 1;
    }
    assert_eq!(
        (served["busy"], served["new"]),
        (4, 4),
        "the new one does not begin at the time of the one that is stuck"
    );
}

async fn what_it_really_cost_counts(rig: Rig) {
    for owner in ["cheap", "dear"] {
        for _ in 0..10 {
            rig.order(job(owner)).await;
        }
    }
    let mut served = HashMap::new();
    for _ in 0..10 {
        let claimed = rig.claim("a").await;
        let owner = claimed.record.owner.clone();
        let cost_seconds = Some(if owner == "dear" { 4.0 } else { 1.0 });
        let outcome = Outcome::Completed { result: String::new(), file_bytes: 0, cost_seconds };
        rig.store.finish(&claimed.lease, outcome).await.expect("held");
        *served.entry(owner).or_insert(0) += 1;
    }
    assert_eq!((served["cheap"], served["dear"]), (8, 2));
}

async fn a_hand_over_costs_no_turn(rig: Rig) {
    let first = rig.order(job("a")).await;
    for _ in 0..3 {
        rig.order(job("b")).await;
    }
    for round in 0..5 {
        let claimed = rig.claim("a").await;
        assert_eq!(claimed.record.id, first, "round {round}");
        if round % 2 == 0 {
            rig.store.give_back(&claimed.lease, Return::HandOver).await.expect("held");
        } else {
            rig.store.checkpoint(&claimed.lease, "so far").await.expect("held");
            rig.advance(OVER);
            rig.store.reap().await.expect("reaped");
        }
    }
}

async fn waiting_for_later_saves_nothing(rig: Rig) {
    let hour = Duration::from_secs(3600);
    for _ in 0..4 {
        rig.order(NewJob { wait: hour, ..job("later") }).await;
    }
    for _ in 0..30 {
        rig.order(job("busy")).await;
    }
    for _ in 0..15 {
        serve(&rig).await;
    }
    rig.order(job("later")).await;
    rig.advance(hour * 2);
    let mut served = HashMap::new();
    for _ in 0..8 {
        *served.entry(serve(&rig).await.0).or_insert(0) += 1;
    }
    assert_eq!((served["busy"], served["later"]), (4, 4));
}

async fn flows_are_forgotten(rig: Rig) {
    let ids = async |jobs: Vec<JobRecord>| jobs.into_iter().map(|job| job.id).collect::<Vec<_>>();
    let one = rig.end(job("gone"), completed(1)).await;
    for _ in 0..5 {
        rig.end(job("busy"), completed(1)).await;
    }
    rig.store.remove(one.id).await.expect("there");
    rig.store.retain().await.expect("done");
    // Whether it is forgotten or not, who comes back begins where the others are.
    let (first, second) = (rig.order(job("gone")).await, rig.order(job("busy")).await);
    assert_eq!(ids(rig.store.queue(10).await.expect("a queue")).await, [first, second]);
    assert_eq!(ids(rig.store.queue(1).await.expect("a queue")).await, [first]);
}

/// A step of a random history.
#[derive(Debug, Clone)]
enum Step {
    Order { owner: u8, priority: usize, cost: u16, model: bool, wait: bool, deadline: bool },
    Claim { is_free: bool, both: bool },
    End { which: usize, how: u8 },
    Wait(u8),
    Reap,
    Retain,
    Prioritise { which: usize, priority: usize },
    Cancel { which: usize },
    Retry { which: usize },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let order = (0u8..4, 0usize..3, 1u16..400, any::<bool>(), prop::bool::weighted(0.2), prop::bool::weighted(0.1));
    let step = prop_oneof![
        6 => order.prop_map(|(owner, priority, cost, model, wait, deadline)| Step::Order {
            owner, priority, cost, model, wait, deadline
        }),
        5 => (any::<bool>(), any::<bool>()).prop_map(|(is_free, both)| Step::Claim { is_free, both }),
        4 => (any::<usize>(), 0u8..6).prop_map(|(which, how)| Step::End { which, how }),
        1 => (0u8..40).prop_map(Step::Wait),
        1 => Just(Step::Reap),
        1 => Just(Step::Retain),
        1 => (any::<usize>(), 0usize..3).prop_map(|(which, priority)| Step::Prioritise { which, priority }),
        1 => any::<usize>().prop_map(|which| Step::Cancel { which }),
        1 => any::<usize>().prop_map(|which| Step::Retry { which }),
    ];
    prop::collection::vec(step, 300)
}

/// The same random history in this store and in the one in memory, whose clocks stand still together.
async fn the_order_is_that_of_the_rules(rig: Rig) {
    const START: i64 = 1_700_000_000_000_000;
    let mut runner = proptest::test_runner::TestRunner::default();
    let steps = steps().new_tree(&mut runner).expect("a history").current();
    let oracle = open(Kind::Memory, Retention { max_active_jobs: 10_000, ..Retention::default() }).await;
    let oracle = oracle.expect("memory is there");
    rig.stop_clock(START);
    oracle.stop_clock(START);
    compare(&rig, &oracle, &steps).await;
}

async fn all(rig: &Rig) -> Vec<JobRecord> {
    let page = Page { after: None, limit: 100_000, order: Order::Ascending };
    rig.store.list(&Filter::default(), &page).await.expect("listed").jobs
}

async fn compare(rig: &Rig, oracle: &Rig, steps: &[Step]) {
    let mut leases: Vec<Lease> = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        let ids: Vec<_> = all(oracle).await.iter().map(|record| record.id).collect();
        let target = match step {
            Step::End { which, .. } if !leases.is_empty() => Target::Lease(leases.swap_remove(which % leases.len())),
            Step::Prioritise { which, .. } | Step::Cancel { which } | Step::Retry { which } if !ids.is_empty() => {
                Target::Job(ids[which % ids.len()])
            }
            Step::End { .. } | Step::Prioritise { .. } | Step::Cancel { .. } | Step::Retry { .. } => continue,
            _ => Target::Job(JobId::generate(JobKind::Video)),
        };
        let (ours, theirs) = (take(rig, step, &target).await, take(oracle, step, &target).await);
        assert_eq!(format!("{ours:?}"), format!("{theirs:?}"), "step {index}: {step:?}");
        if let Ok(Took::Claimed(Some(claimed))) = theirs {
            leases.push(claimed.lease);
        }
        let queue = rig.store.queue(1000).await.expect("a queue");
        assert_eq!(queue, oracle.store.queue(1000).await.expect("a queue"), "after step {index}: {step:?}");
    }
    assert_eq!(all(rig).await, all(oracle).await);
}

/// What a step is done with.
enum Target {
    Job(JobId),
    Lease(Lease),
}

/// What came of a step.
#[derive(Debug)]
#[allow(dead_code, reason = "compared by what they print")]
enum Took {
    Claimed(Option<Claimed>),
    Job(JobRecord),
    Jobs(Vec<JobRecord>),
    Ordered(Submitted),
    Nothing,
}

async fn take(rig: &Rig, step: &Step, target: &Target) -> Result<Took, StoreError> {
    let store = &rig.store;
    match (step, target) {
        (Step::Order { owner, priority, cost, model, wait, deadline }, Target::Job(id)) => {
            let order = NewJob {
                id: *id,
                priority: Priority::ALL[*priority],
                cost_seconds: f64::from(*cost) / 16.0,
                model: if *model { "wan" } else { "flux" }.to_owned(),
                wait: Duration::from_secs(if *wait { 25 } else { 0 }),
                deadline: deadline.then_some(Duration::from_secs(95)),
                ..job(&owner.to_string())
            };
            store.submit(order).await.map(Took::Ordered)
        }
        (Step::Claim { is_free, both }, _) => {
            let mut claimer = Claimer { is_free: *is_free, ..claimer("a") };
            claimer.models.truncate(if *both { 2 } else { 1 });
            store.claim(&claimer).await.map(Took::Claimed)
        }
        (Step::End { how, .. }, Target::Lease(lease)) => {
            let cost_seconds = Some(2.5);
            let made = Outcome::Completed { result: String::new(), file_bytes: 1, cost_seconds };
            match how {
                0 | 1 => store.finish(lease, made).await.map(Took::Job),
                2 => store.finish(lease, failed()).await.map(Took::Job),
                3 => store.give_back(lease, Return::HandOver).await.map(|()| Took::Nothing),
                4 => store.give_back(lease, Return::Retry(Duration::from_secs(15))).await.map(|()| Took::Nothing),
                // Its holder goes silent.
                _ => Ok(Took::Nothing),
            }
        }
        (Step::Wait(seconds), _) => {
            rig.advance(Duration::from_secs(u64::from(*seconds)));
            Ok(Took::Nothing)
        }
        (Step::Reap, _) => store.reap().await.map(Took::Jobs),
        (Step::Retain, _) => store.retain().await.map(Took::Jobs),
        (Step::Prioritise { priority, .. }, Target::Job(id)) => {
            store.prioritise(*id, Priority::ALL[*priority]).await.map(Took::Job)
        }
        (Step::Cancel { .. }, Target::Job(id)) => store.cancel(*id).await.map(Took::Job),
        (Step::Retry { .. }, Target::Job(id)) => store.retry(*id).await.map(Took::Job),
        (step, _) => unreachable!("{step:?} has another target"),
    }
}
