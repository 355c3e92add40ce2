//! Sessions that go on in another runner, from where they were after any of their steps.

use proptest::prelude::*;

use super::*;
use crate::session_checkpoint::fields::Writer;
use crate::session_checkpoint::{Identity, Refusal, SessionCheckpoint, digest_of};

fn identity() -> Identity {
    Identity { weights: [7; 32], device: "a toy".to_owned() }
}

fn runner_of(model: Toy) -> DiffusionRunner<Toy> {
    DiffusionRunner::new(model, 4).identified_as(Some(identity())).retrying(Box::new(move |_, _, _| {
        let loading = Box::new(Arriving::new(Toy::wide(), 2));
        Ok(ReadInF32 { loading, weight_bytes: 1000, work_bytes: Box::new(|_| 10) })
    }))
}

fn resume(
    runner: &mut DiffusionRunner<Toy>,
    id: u64,
    request: DiffusionRequest,
    checkpoint: &SessionCheckpoint,
) -> Result<()> {
    let stored = SessionCheckpoint::from_bytes(checkpoint.as_bytes().to_vec()).expect("as it was written");
    runner.resume_for(ClientId::default(), SessionId(id), Request::Diffusion(request), Arc::new(stored))
}

fn save(runner: &mut DiffusionRunner<Toy>, id: u64) -> Option<Arc<SessionCheckpoint>> {
    runner.checkpoint(SessionId(id)).expect("a checkpoint can be made")
}

/// Events but for those before the first denoising step, which a session has again.
fn from_the_loop_on(events: Vec<String>) -> Vec<String> {
    let is_before =
        |event: &String| event == "started" || event.starts_with("encode") || event.starts_with("vae_encode");
    events.into_iter().filter(|event| !is_before(event)).collect()
}

/// Interrupted after each number of steps, alone and beside another session that goes on; how often there was a checkpoint.
fn check(new: impl Fn() -> Toy, request: &DiffusionRequest) -> usize {
    let mut whole = runner_of(new());
    submit(&mut whole, 1, request.clone());
    let whole = from_the_loop_on(run(&mut whole).remove(&1).expect("events"));
    let mut saved = 0;
    for steps in 0.. {
        for has_company in [false, true] {
            let mut first = runner_of(new());
            submit(&mut first, 1, request.clone());
            if has_company {
                submit(&mut first, 2, with(request.clone(), |request| request.sampling.seed = 99));
            }
            let mut events = Vec::new();
            for _ in 0..steps {
                if first.next().is_none() {
                    return saved;
                }
                events.extend(step(&mut first).into_iter().filter(|(id, _)| *id == 1).map(|(_, event)| event));
            }
            if events.last().is_some_and(|last| last == "finished") {
                continue;
            }
            let told =
                events.iter().filter_map(|event| event.strip_prefix("frames ")).map(|f| f.matches(',').count() + 1);
            let told: usize = told.sum();
            let checkpoint = save(&mut first, 1);
            let company = run(&mut first).remove(&2);
            let Some(checkpoint) = checkpoint else {
                assert!(from_the_loop_on(events).is_empty(), "there is none before the loop alone");
                continue;
            };
            saved += 1;
            assert_eq!(checkpoint.frames_done(), told);
            let mut second = runner_of(new());
            resume(&mut second, 1, request.clone(), &checkpoint).expect("its own");
            if has_company {
                submit(&mut second, 2, with(request.clone(), |request| request.sampling.seed = 99));
            }
            events.extend(run(&mut second).remove(&1).expect("it goes on"));
            assert_eq!(from_the_loop_on(events), whole, "after {steps} steps, company: {has_company}");
            assert!(company.is_none_or(|events| events.last().is_some_and(|last| last == "finished")));
        }
    }
    unreachable!("a session ends")
}

#[test]
fn a_session_that_goes_on_elsewhere_says_what_is_missing() {
    let clip = |request| with(request, |request| request.canvas.num_frames = 4);
    let previewed = with(clip(request("one", 3)), |request| request.partial_images = 2);
    assert!(check(Toy::new, &previewed) >= 2 * 7, "at each boundary from the loop on");
    assert!(check(Toy::new, &clip(guided("one", "other"))) > 0);
    let interval = with(clip(guided("one", "other")), |request| request.guidance.interval = [0.0, 0.5]);
    assert!(check(Toy::new, &interval) > 0);
}

#[test]
fn what_the_loop_began_from_is_there_again() {
    assert!(check(Toy::new, &edit([9, 1, 200, 3], None, 4)) > 0);
    assert!(check(Toy::new, &edit([9, 1, 200, 3], Some([255, 0, 255, 0]), 4)) > 0);
}

#[test]
fn experts_take_over_in_their_turn() {
    let two = || Toy { boundary: Some(500.0), ..Toy::new() };
    assert!(check(two, &with(guided("one", "other"), |request| request.sampling.num_inference_steps = 4)) > 0);
}

/// Whichever part of a step was under way: the prediction or the pixels that overflow, the networks that are read.
#[test]
fn what_is_mended_is_mended_there_too() {
    for wrong in ["denoise", "decode", "late decode"] {
        let overflowing = with(request(&format!("overflow in {wrong}"), 1), |request| request.canvas.num_frames = 3);
        assert!(check(Toy::new, &overflowing) > 10, "{wrong}");
    }
}

#[test]
fn frames_in_tiles_are_told_once() {
    let tiled = with(request("tiles", 1), |request| {
        request.canvas.num_frames = 3;
        request.canvas.width = 3;
    });
    assert!(check(Toy::new, &tiled) > 0);
}

/// Handed over a second time before its first step, or between its prompt's.
#[test]
fn a_session_that_has_not_come_further_has_the_checkpoint_that_it_came_with() {
    let mut first = runner_of(Toy::new());
    submit(&mut first, 1, request("one", 1));
    (0..3).for_each(|_| drop(step(&mut first)));
    let checkpoint = save(&mut first, 1).expect("two steps are done");
    let mut second = runner_of(Toy { encode_steps: 2, ..Toy::new() });
    resume(&mut second, 1, request("one", 1), &checkpoint).expect("its own");
    for _ in 0..2 {
        assert_eq!(save(&mut second, 1).expect("the same").as_bytes(), checkpoint.as_bytes());
        step(&mut second);
    }
    assert_eq!(save(&mut second, 1).expect("the same").as_bytes(), checkpoint.as_bytes());
    assert!(step(&mut second).iter().any(|(_, event)| event == "denoise 3/3"));
}

#[test]
fn nothing_is_saved_of_what_is_unknown_or_of_a_runner_without_identity() {
    let mut runner = runner_of(Toy::new());
    assert!(save(&mut runner, 1).is_none());
    let mut nameless = DiffusionRunner::new(Toy::new(), 4);
    submit(&mut nameless, 1, request("one", 1));
    (0..2).for_each(|_| drop(step(&mut nameless)));
    assert!(save(&mut nameless, 1).is_none());
    submit(&mut runner, 1, request("one", 1));
    (0..2).for_each(|_| drop(step(&mut runner)));
    let checkpoint = save(&mut runner, 1).expect("a step is done");
    let refused = resume(&mut nameless, 2, request("one", 1), &checkpoint).expect_err("it has no identity");
    assert!(matches!(refused, Error::NotResumable(Refusal::Unsupported)));
    let refused = resume(&mut runner, 2, request("one", 2), &checkpoint).expect_err("another seed");
    assert!(matches!(refused, Error::NotResumable(Refusal::Request)));
    assert_eq!(runner.status().running + runner.status().waiting, 1, "what is refused is not held");
}

/// Only one parameter differs, or one pixel.
#[test]
fn requests_are_told_apart_by_everything_that_they_say() {
    let image = |red| edit([red, 2, 3, 4], Some([255, 0, 0, 0]), 1);
    let all = [
        request("one", 1),
        request("one", 2),
        request("two", 1),
        guided("one", "two"),
        guided("one", "three"),
        with(request("one", 1), |request| request.canvas.num_frames = 3),
        with(request("one", 1), |request| request.sampling.eta = Some(0.5)),
        with(request("one", 1), |request| request.guidance.zero_star = Some(ZeroStar { zero_init_steps: 1 })),
        image(1),
        image(9),
        edit([1, 2, 3, 4], Some([0, 255, 0, 0]), 1),
        edit([1, 2, 3, 4], None, 1),
    ];
    let digests: std::collections::BTreeSet<_> = all.iter().map(digest_of).collect();
    assert_eq!(digests.len(), all.len());
    assert_eq!(digest_of(&image(1)), digest_of(&image(1)));
}

/// A checkpoint of a request after two steps, or with its latents, whose state is another one. Its seal is right.
fn forged(is_denoised: bool, forge: impl FnOnce(&mut Vec<u8>)) -> (DiffusionRequest, SessionCheckpoint) {
    let request = with(guided("one", "other"), |request| request.canvas.num_frames = 3);
    let mut runner = runner_of(Toy::new());
    submit(&mut runner, 1, request.clone());
    (0..if is_denoised { 6 } else { 3 }).for_each(|_| drop(step(&mut runner)));
    let mut state = Writer::default();
    runner.session(SessionId(1)).save(&mut state).expect("written");
    let mut bytes = state.as_bytes().to_vec();
    forge(&mut bytes);
    let digest = digest_of(&request);
    (request, SessionCheckpoint::seal(&identity(), digest, 0, &Writer::of(bytes)))
}

#[test]
fn a_state_that_cannot_be_ends_its_own_session_alone() {
    let (request_of, checkpoint) = forged(false, |bytes| bytes.truncate(bytes.len() - 1));
    let mut runner = runner_of(Toy::new());
    resume(&mut runner, 1, request_of, &checkpoint).expect("what is wrong shows when it is needed");
    submit(&mut runner, 2, request("beside it", 2));
    let all = run(&mut runner);
    let last = all[&1].last().expect("events");
    assert_eq!(last, "failed: the checkpoint has a state that does not fit: it ends too early");
    assert_eq!(all[&2], alone(request("beside it", 2)));
}

proptest! {
    /// As a forger would write it: refused, or run to its end.
    #[test]
    fn no_state_brings_a_runner_down(
        is_denoised in any::<bool>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        len in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (request_of, checkpoint) = forged(is_denoised, |bytes| {
            for (at, byte) in &edits {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            if let Some(len) = len {
                bytes.truncate(len.index(bytes.len()));
            }
        });
        let mut runner = runner_of(Toy::new());
        if resume(&mut runner, 1, request_of, &checkpoint).is_ok() {
            let events = run(&mut runner).remove(&1).expect("it ends");
            let last = events.last().expect("events");
            prop_assert!(last == "finished" || last.contains("checkpoint") || last.contains("not finite"), "{}", last);
        }
        assert_empty(&runner);
    }
}
