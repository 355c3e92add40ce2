//! What is refused, cancelled, wrong, or not finite.

use super::*;

#[test]
fn pictures_are_refused_where_none_are_taken() {
    let mut runner = DiffusionRunner::new(Toy { takes_pictures: false, ..Toy::new() }, 4);
    let refused = runner.submit(SessionId(1), Request::Diffusion(edit([9; 4], None, 1)));
    assert!(matches!(refused, Err(Error::InvalidRequest { field, .. }) if field == "image"));
    assert_empty(&runner);
}

#[test]
fn cancel_at_any_step_leaves_nothing() {
    for steps in 0..7 {
        let mut runner = DiffusionRunner::new(Toy::new(), 4);
        submit(&mut runner, 1, guided("a fox", "rain"));
        (0..steps).for_each(|_| drop(step(&mut runner)));
        assert_eq!(runner.status().running + runner.status().waiting, usize::from(steps < 6));
        runner.cancel(SessionId(1));
        assert_empty(&runner);
    }
}

#[test]
fn cancelled_session_takes_no_further_part() {
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    (1..=3).for_each(|id| submit(&mut runner, id, request("same", id)));
    (0..2).for_each(|_| drop(step(&mut runner)));
    runner.cancel(SessionId(2));
    runner.cancel(SessionId(99));
    let rest = run(&mut runner);
    assert!(!rest.contains_key(&2));
    assert_eq!(rest[&1].last().map(String::as_str), Some("finished"));
    assert_eq!(rest[&3].last().map(String::as_str), Some("finished"));
}

/// A step that fails takes its own sessions with it and no others.
#[test]
fn failing_step_fails_its_own_sessions() {
    for how in ["error", "panic"] {
        for (phase, others_in_the_step) in [("encode", true), ("denoise", true), ("decode", false)] {
            let mut runner = DiffusionRunner::new(Toy::new(), 2);
            submit(&mut runner, 1, request(&format!("{how} in {phase}"), 1));
            submit(&mut runner, 2, request("beside it", 2));
            // Its prompts have another length, and so a pass of their own.
            let other = with(guided("else", "where"), |request| {
                request.prompt.max_sequence_length = 7;
                request.sampling.num_inference_steps = 6;
            });
            submit(&mut runner, 3, other);
            let all = run(&mut runner);
            let ends = |id: u64| all[&id].last().map(String::as_str).unwrap_or_default().to_owned();
            assert!(ends(1).starts_with("failed"), "{how} {phase}: {all:?}");
            assert_eq!(ends(2).starts_with("failed"), others_in_the_step, "{how} {phase}: {all:?}");
            assert_eq!(
                all[&3],
                alone(with(guided("else", "where"), |request| request.sampling.num_inference_steps = 6))
            );
            let terminal = |event: &&String| event.starts_with("failed") || *event == "finished";
            assert!(all.values().all(|events| events.iter().filter(terminal).count() == 1));
        }
    }
}

#[test]
fn values_that_are_not_finite_fail_that_session_alone() {
    for (prompt, phase) in
        [("nan in encode", "denoise"), ("nan in denoise", "denoise"), ("nan in decode", "vae_decode")]
    {
        let mut runner = DiffusionRunner::new(Toy::new(), 4);
        submit(&mut runner, 1, request(prompt, 1));
        submit(&mut runner, 2, request("beside it", 2));
        let all = run(&mut runner);
        let last = all[&1].last().expect("events");
        assert!(last.contains("not finite") && last.contains(phase), "{last}");
        assert!(!all[&1].iter().any(|event| event.starts_with("frames")));
        assert_eq!(all[&2], alone(request("beside it", 2)));
    }
}

/// A session that overflows is what it would be if it did not, one that is not finite in f32 either fails, and whoever
/// shares their steps hears nothing of it.
#[test]
fn what_overflows_is_done_once_more_in_f32() {
    for (wrong, phase, reads) in
        [("denoise", Phase::Denoise, 3), ("decode", Phase::VaeDecode, 1), ("late decode", Phase::VaeDecode, 1)]
    {
        let read = Arc::new(AtomicUsize::new(0));
        let count = read.clone();
        let mut runner = DiffusionRunner::new(Toy::new(), 4).retrying(Box::new(move |components, of, _| {
            assert_eq!((components, of), (&["net"][..], phase));
            count.fetch_add(1, Ordering::Relaxed);
            let loading = Box::new(Arriving::new(Toy::wide(), 2));
            Ok(ReadInF32 { loading, weight_bytes: 0, work_bytes: Box::new(|_| 0) })
        }));
        let overflowing = format!("overflow in {wrong}");
        submit(&mut runner, 1, request(&overflowing, 1));
        submit(&mut runner, 2, request("beside it", 2));
        let all = run(&mut runner);
        let mut wide = DiffusionRunner::new(Toy::wide(), 4);
        submit(&mut wide, 1, request(&overflowing, 1));
        assert_eq!(all[&1], run(&mut wide)[&1], "{wrong}");
        assert_eq!(all[&2], alone(request("beside it", 2)), "{wrong}");
        assert_eq!(read.load(Ordering::Relaxed), reads, "{wrong}: one for each step that needs it");
        submit(&mut runner, 3, request(&format!("nan in {wrong}"), 3));
        submit(&mut runner, 4, request("beside it", 2));
        let all = run(&mut runner);
        let last = all[&3].last().expect("events");
        assert!(last.contains("not finite") && last.contains(phase.as_str()), "{last}");
        assert_eq!(all[&4], alone(request("beside it", 2)), "{wrong}");
    }
}

#[test]
fn without_the_memory_for_f32_a_session_fails_with_the_figures() {
    for wrong in ["denoise", "decode"] {
        let mut runner = DiffusionRunner::new(Toy::new(), 4).retrying(Box::new(|_, phase, _| {
            Err(Error::OutOfMemory { phase: Some(phase), needed_bytes: 77, free_bytes: 66 })
        }));
        submit(&mut runner, 1, request(&format!("overflow in {wrong}"), 1));
        submit(&mut runner, 2, request("beside it", 2));
        let all = run(&mut runner);
        let last = all[&1].last().expect("events");
        assert!(last.contains("77 bytes needed") && last.contains("66 free"), "{last}");
        assert_eq!(all[&2], alone(request("beside it", 2)), "{wrong}");
    }
}

#[test]
fn text_requests_and_too_many_sessions_are_refused() {
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    let refused = runner.submit(SessionId(0), Request::Text(TextRequest::greedy(vec![1], 1)));
    assert!(matches!(refused, Err(Error::InvalidRequest { .. })));
    (0..MAX_SESSIONS as u64).for_each(|id| submit(&mut runner, id, request("one", id)));
    let refused = runner.submit(SessionId(9999), Request::Diffusion(request("one", 0)));
    assert!(matches!(refused, Err(Error::TooManySessions { limit: MAX_SESSIONS })));
}
