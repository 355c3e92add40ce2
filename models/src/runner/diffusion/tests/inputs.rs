//! What is encoded, for whom, and what the loop begins from.

use super::*;

#[test]
fn one_prompt_of_many_sessions_is_encoded_once() {
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    (0..4).for_each(|seed| submit(&mut runner, seed, request("same", seed)));
    run(&mut runner);
    assert_eq!(*runner.model().encoded.lock().expect("lock"), ["same"]);
}

/// Positive and negative ones of all that wait, up to the bound; an absent one is the empty text unless the family says
/// otherwise, and other lengths wait for a pass of their own.
#[test]
fn prompts_that_wait_are_encoded_in_one_pass() {
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    submit(&mut runner, 0, guided("a fox", "rain"));
    submit(&mut runner, 1, with(request("shorter", 1), |request| request.prompt.max_sequence_length = 7));
    submit(&mut runner, 2, guided("rain", "a fox"));
    submit(
        &mut runner,
        3,
        with(guided("a boat", ""), |request| request.guidance.negative_prompt = Some(NegativePrompt::Absent)),
    );
    submit(&mut runner, 4, guided("", "a boat"));
    (5..10).for_each(|id| submit(&mut runner, id, request(&format!("number {id}"), id)));
    let all = run(&mut runner);
    let expected = ["a fox, rain, a boat, , number 5, number 6, number 7, number 8", "shorter", "number 9"];
    assert_eq!(*runner.model().encoded.lock().expect("lock"), expected);
    assert_eq!(all[&2], alone(guided("rain", "a fox")));
}

#[test]
fn a_family_may_have_its_own_idea_of_an_absent_prompt() {
    let toy = Toy { absent_is_empty: false, ..Toy::new() };
    let mut runner = DiffusionRunner::new(toy, 4);
    submit(
        &mut runner,
        1,
        with(guided("a boat", ""), |request| request.guidance.negative_prompt = Some(NegativePrompt::Absent)),
    );
    run(&mut runner);
    assert_eq!(*runner.model().encoded.lock().expect("lock"), ["a boat"]);
}

#[test]
fn a_picture_is_encoded_after_the_prompts_and_left_out_steps_are_not_counted() {
    let events = alone(edit([9; 4], None, 1));
    let story: Vec<&str> = events.iter().map(|event| event.split(" [").next().unwrap_or_default()).take(5).collect();
    assert_eq!(story, ["started", "encode 1/1", "vae_encode 1/1", "denoise 1/2", "denoise 2/2"]);
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    submit(&mut runner, 1, edit([9; 4], None, 1));
    step(&mut runner);
    assert_eq!(runner.next().map(|plan| plan.phase), Some(Phase::VaeEncode));
}

#[test]
fn one_picture_of_many_sessions_is_encoded_once_and_sampled_by_each() {
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    (0..4).for_each(|seed| submit(&mut runner, seed, edit([9; 4], None, seed)));
    submit(&mut runner, 9, edit([8; 4], None, 0));
    run(&mut runner);
    assert_eq!(*runner.model().encoded.lock().expect("lock"), ["one", "picture 9", "picture 8"]);
    assert_ne!(latents_after(&edit([9; 4], None, 1), 0), latents_after(&edit([9; 4], None, 2), 0));
}

/// The first draw is the posterior's, the second one the noise; at the second of three timesteps two thirds of it.
#[test]
fn the_loop_begins_from_the_noisy_picture() {
    let mut generator = TorchGenerator::new(5);
    let (sampled, noise) = (generator.randn(4), generator.randn(4));
    let found = latents_after(&edit([1, 2, 3, 4], None, 5), 0);
    for (i, found) in found.iter().enumerate() {
        let expected = 2.0 * (1.0 + i as f32 + 0.5 * sampled[i]) + noise[i] * 2.0 / 3.0;
        assert!((found - expected).abs() < 1e-4, "{found}, {expected}");
    }
}

/// Between steps the kept part is as noisy as the loop, after the last one it is the picture; the rest is the loop's.
#[test]
fn what_the_mask_leaves_out_stays_the_picture() {
    let mask = Some([127, 128, 0, 255]);
    let mut generator = TorchGenerator::new(5);
    let (sampled, noise) = (generator.randn(4), generator.randn(4));
    let picture = |i: usize| 2.0 * (1.0 + i as f32 + 0.5 * sampled[i]);
    let (whole, after_one) = (edit([1, 2, 3, 4], None, 5), latents_after(&edit([1, 2, 3, 4], mask, 5), 1));
    let after_all = latents_after(&edit([1, 2, 3, 4], mask, 5), 2);
    for i in [0, 2] {
        assert!((after_one[i] - picture(i) - noise[i] / 3.0).abs() < 1e-4, "{after_one:?}");
        assert!((after_all[i] - picture(i)).abs() < 1e-4, "{after_all:?}");
    }
    let free = latents_after(&whole, 2);
    for i in [1, 3] {
        assert_eq!(after_all[i], free[i]);
    }
}

/// A mask at full strength begins from noise alone; without a mask the picture still shines through.
#[test]
fn a_mask_at_full_strength_begins_from_noise() {
    let whole = |mask| {
        let mut request = edit([200; 4], mask, 5);
        request.edit = request.edit.map(|edit| Edit { strength: 1.0, first_step: 0, ..edit });
        latents_after(&request, 0)
    };
    let mut generator = TorchGenerator::new(5);
    let (_, noise) = (generator.randn(4), generator.randn(4));
    assert_eq!(whole(Some([255; 4])), noise);
    assert!(whole(None).iter().all(|value| *value > 300.0));
}

/// Whoever comes while a pass is under way has one of its own; who is cancelled in the middle of one takes no part in its
/// results.
#[test]
fn a_pass_of_several_steps_is_gone_on_with_by_those_that_began_it() {
    let mut runner = DiffusionRunner::new(Toy { encode_steps: 3, ..Toy::new() }, 4);
    (1..=3).for_each(|id| submit(&mut runner, id, request("same", id)));
    assert!(step(&mut runner).contains(&(1, "encode 1/3".to_owned())));
    submit(&mut runner, 4, request("same", 4));
    runner.cancel(SessionId(2));
    let all = run(&mut runner);
    assert_eq!(*runner.model().encoded.lock().expect("lock"), ["same", "same"]);
    let encoding = |id: u64| all[&id].iter().filter(|event| event.starts_with("encode")).count();
    assert_eq!((encoding(1), encoding(3), encoding(4)), (2, 2, 3));
    assert!(!all.contains_key(&2));
    let without = |events: &[String]| -> Vec<String> {
        events.iter().filter(|event| !event.starts_with("encode") && *event != "started").cloned().collect()
    };
    assert_eq!(without(&all[&3]), without(&alone(request("same", 3))));
}

#[test]
fn a_pass_that_all_have_left_is_forgotten() {
    let mut runner = DiffusionRunner::new(Toy { encode_steps: 3, ..Toy::new() }, 4);
    (1..=2).for_each(|id| submit(&mut runner, id, request("same", id)));
    step(&mut runner);
    (1..=2).for_each(|id| runner.cancel(SessionId(id)));
    assert_empty(&runner);
}
