//! Networks that are read while sessions wait for them.

use super::*;
use crate::request::Phase;

/// Text encoders of three steps; how often they were begun to be read, and how many are being read or there.
fn lending(fails_at: Option<usize>) -> (DiffusionRunner<Toy>, Arc<AtomicUsize>, Arc<AtomicUsize>) {
    let begun = Arc::new(AtomicUsize::new(0));
    let held = Arc::new(AtomicUsize::new(0));
    let (count, hold) = (begun.clone(), held.clone());
    let begin = move || {
        count.fetch_add(1, Ordering::Relaxed);
        let arriving = Arriving::new(Toy::new(), 3).counted_in(&hold).failing_at(fails_at);
        Ok(Box::new(arriving) as Box<dyn Loading<Toy>>)
    };
    let encoders = OnDemand::reading(vec!["text_encoder".into()], 1000, Box::new(begin));
    (DiffusionRunner::new(Toy::new(), 4).with_text_encoders(Some(encoders)), begun, held)
}

fn held(held: &Arc<AtomicUsize>) -> usize {
    held.load(Ordering::Relaxed)
}

#[test]
fn encoders_are_read_in_steps_for_all_that_wait_and_leave_with_the_last() {
    let (mut runner, begun, holds) = lending(None);
    submit(&mut runner, 1, request("one", 1));
    assert_eq!(runner.next().map(|plan| plan.phase), Some(Phase::Load));
    assert_eq!(step(&mut runner), [(1, "started".to_owned()), (1, "load 1/3".to_owned())]);
    submit(&mut runner, 2, request("two", 2));
    let joined = step(&mut runner);
    assert!(joined.contains(&(2, "load 2/3".to_owned())), "{joined:?}");
    step(&mut runner);
    assert_eq!(runner.next().map(|plan| (plan.phase, plan.sessions)), Some((Phase::Encode, 2)));
    assert_eq!(held(&holds), 1);
    step(&mut runner);
    assert_eq!(held(&holds), 0, "nobody waits for them");
    let rest = run(&mut runner);
    assert_eq!(rest[&1][..], alone(request("one", 1))[2..]);
    assert_eq!(begun.load(Ordering::Relaxed), 1);
    submit(&mut runner, 3, request("three", 3));
    run(&mut runner);
    assert_eq!((begun.load(Ordering::Relaxed), held(&holds)), (2, 0));
}

#[test]
fn whoever_leaves_last_in_the_middle_of_a_load_takes_it_along() {
    let (mut runner, begun, holds) = lending(None);
    (1..=2).for_each(|id| submit(&mut runner, id, request("one", id)));
    step(&mut runner);
    runner.cancel(SessionId(1));
    assert_eq!(held(&holds), 1, "one still waits");
    runner.cancel(SessionId(2));
    assert_eq!(held(&holds), 0);
    assert_empty(&runner);
    submit(&mut runner, 3, request("one", 3));
    run(&mut runner);
    assert_eq!((begun.load(Ordering::Relaxed), held(&holds)), (2, 0), "read from the beginning");
}

#[test]
fn a_load_that_fails_ends_those_that_wait_and_leaves_nothing() {
    for fails_at in 1..=3 {
        let (mut runner, begun, holds) = lending(Some(fails_at));
        submit(&mut runner, 1, request("one", 1));
        submit(&mut runner, 2, request("two", 2));
        let all = run(&mut runner);
        for id in [1, 2] {
            assert!(all[&id].last().is_some_and(|event| event.starts_with("failed")), "{all:?}");
        }
        assert_eq!((begun.load(Ordering::Relaxed), held(&holds)), (1, 0));
        submit(&mut runner, 3, request("three", 3));
        assert!(run(&mut runner)[&3].last().is_some_and(|event| event.starts_with("failed")));
        assert_eq!(begun.load(Ordering::Relaxed), 2, "tried anew");
    }
}

/// Networks in f32 of ten steps, for whatever overflows.
fn mending() -> (DiffusionRunner<Toy>, Arc<AtomicUsize>) {
    let holds = Arc::new(AtomicUsize::new(0));
    let hold = holds.clone();
    let runner = DiffusionRunner::new(Toy::new(), 4).retrying(Box::new(move |_, _, _| {
        let loading = Box::new(Arriving::new(Toy::wide(), 10).counted_in(&hold));
        Ok(ReadInF32 { loading, weight_bytes: 100, work_bytes: Box::new(|request| request.prompt.text.len()) })
    }));
    (runner, holds)
}

/// The others have their turns between the steps of one that is mended, and it ends as if it had been wide.
#[test]
fn mending_is_done_in_steps_between_those_of_others() {
    for wrong in ["denoise", "late decode"] {
        let (mut runner, holds) = mending();
        let overflowing = request(&format!("overflow in {wrong}"), 1);
        submit(&mut runner, 1, overflowing.clone());
        submit(&mut runner, 2, with(request("beside it", 2), |request| request.sampling.num_inference_steps = 40));
        let mut phases = Vec::new();
        let mut events = Vec::new();
        while let Some(plan) = runner.next() {
            phases.push(plan.phase);
            events.extend(step(&mut runner));
        }
        assert_empty(&runner);
        assert_eq!(held(&holds), 0);
        let is_load = |phase: &Phase| *phase == Phase::Load;
        assert!(phases.iter().filter(|phase| is_load(phase)).count() >= 10, "{wrong}: {phases:?}");
        let in_a_row = phases.windows(2).filter(|pair| pair.iter().all(is_load)).count();
        assert_eq!(in_a_row, 0, "{wrong}: the other one waits for one step at most: {phases:?}");
        let mut wide = DiffusionRunner::new(Toy::wide(), 4);
        submit(&mut wide, 1, overflowing);
        let found: Vec<String> = events.into_iter().filter(|(id, _)| *id == 1).map(|(_, event)| event).collect();
        assert_eq!(found, run(&mut wide)[&1], "{wrong}");
    }
}

#[test]
fn whoever_leaves_in_the_middle_of_its_mending_takes_the_networks_along() {
    let (mut runner, holds) = mending();
    (1..=2).for_each(|id| submit(&mut runner, id, request("overflow in denoise", id)));
    (0..5).for_each(|_| drop(step(&mut runner)));
    assert_eq!((held(&holds), runner.borrowed_bytes()), (1, 100 + 19), "both wait for the same");
    runner.cancel(SessionId(1));
    assert_eq!((held(&holds), runner.borrowed_bytes()), (1, 100 + 19));
    runner.cancel(SessionId(2));
    assert_eq!((held(&holds), runner.borrowed_bytes()), (0, 0));
    assert_empty(&runner);
}
