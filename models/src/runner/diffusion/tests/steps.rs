//! What sessions are told and become, step by step.

use super::*;

#[test]
fn session_tells_its_whole_story_in_order() {
    let events = alone(guided("a fox", "rain"));
    let story: Vec<&str> = events.iter().map(|event| event.split(" [").next().unwrap_or_default()).collect();
    let expected = [
        "started",
        "encode 1/1",
        "denoise 1/3",
        "denoise 2/3",
        "denoise 3/3",
        "frames",
        "vae_decode 1/2",
        "frames",
        "vae_decode 2/2",
        "finished",
    ];
    assert_eq!(story, expected);
}

/// Frames in tiles: every tile is a step that is told, and the frames are whole with the last one.
#[test]
fn tiles_are_steps_and_frames_come_last() {
    let events = alone(with(request("in tiles", 1), |request| {
        (request.canvas.num_frames, request.canvas.width) = (3, 3);
        request.sampling.num_inference_steps = 1;
    }));
    let decoding: Vec<&str> = events[3..].iter().map(|event| event.split(" [").next().unwrap_or_default()).collect();
    assert_eq!(decoding, ["vae_decode 1/3", "vae_decode 2/3", "frames", "vae_decode 3/3", "finished"]);
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    submit(
        &mut runner,
        1,
        with(request("in tiles", 1), |request| (request.canvas.num_frames, request.canvas.width) = (3, 3)),
    );
    while !step(&mut runner).iter().any(|(_, event)| event == "vae_decode 1/3") {}
    runner.cancel(SessionId(1));
    assert_empty(&runner);
}

/// Between two chunks, as where nobody takes its frames.
#[test]
fn a_paused_session_waits_while_others_go_on_and_makes_the_same_frames() {
    let clip = |seed| with(request("one", seed), |request| request.canvas.num_frames = 4);
    let expected = alone(clip(1));
    for goes_on in [true, false] {
        let mut runner = DiffusionRunner::new(Toy::new(), 4);
        submit(&mut runner, 1, clip(1));
        let mut events = Vec::new();
        while !events.iter().any(|event: &String| event.starts_with("frames")) {
            events.extend(step(&mut runner).into_iter().map(|(_, event)| event));
        }
        runner.pause(SessionId(1));
        runner.pause(SessionId(9));
        assert_eq!(runner.next(), None);
        submit(&mut runner, 2, clip(2));
        while runner.next().is_some() {
            assert!(step(&mut runner).iter().all(|(id, _)| *id == 2), "the first one is paused");
        }
        assert_eq!(runner.status().running, 1, "it keeps what it has");
        match goes_on {
            true => {
                [1, 1, 9].into_iter().for_each(|id| runner.unpause(SessionId(id)));
                events.extend(run(&mut runner).remove(&1).expect("it goes on"));
                assert_eq!(events, expected);
            }
            false => {
                runner.cancel(SessionId(1));
                runner.unpause(SessionId(1));
                assert_empty(&runner);
            }
        }
    }
}

#[test]
fn guidance_extrapolates_from_the_negative_prediction() {
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    submit(&mut runner, 1, with(guided("123456", "12"), |request| request.sampling.num_inference_steps = 1));
    (0..2).for_each(|_| drop(step(&mut runner)));
    let Stage::Latents(found) = &runner.session(SessionId(1)).stage else { panic!("denoising is done") };
    // At timestep 1000 the branches predict 6 - x and 2 - x; 2 - x + 3 * 4 = 14 - x; x + (14 - x) / 2.
    let noise = TorchGenerator::new(1).randn(4);
    let found = values(&found.values);
    for (found, noise) in found.iter().zip(noise) {
        assert!((found - (noise + 14.0) / 2.0).abs() < 1e-5);
    }
}

/// The steps outside of the interval take the positive prediction alone, and no row is computed for more.
#[test]
fn outside_of_its_interval_guidance_costs_nothing_and_does_nothing() {
    let steps = 4;
    let request = with(guided("123456", "12"), |request| {
        request.guidance.interval = [0.25, 0.75];
        request.sampling.num_inference_steps = steps;
    });
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    submit(&mut runner, 1, request);
    step(&mut runner);
    (0..steps).for_each(|_| drop(step(&mut runner)));
    assert_eq!(*runner.model().passes.lock().expect("lock"), [(0, 1), (0, 2), (0, 2), (0, 1)]);
    let Stage::Latents(found) = &runner.session(SessionId(1)).stage else { panic!("denoising is done") };
    let expected = TorchGenerator::new(1).randn(4).into_iter().map(|mut x| {
        for (index, timestep) in [1.0, 0.75, 0.5, 0.25].into_iter().enumerate() {
            let (positive, negative) = (6.0 - x * timestep, 2.0 - x * timestep);
            let guided = (1..3).contains(&index);
            x += 0.5 * if guided { negative + 3.0 * (positive - negative) } else { positive };
        }
        x
    });
    let found = values(&found.values);
    assert!(found.into_iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-5));
}

/// A toy session needs 16 bytes a branch: with less than 32 its branches go one after the other, and those of two sessions
/// two at once, whatever the bound on rows.
#[test]
fn where_both_branches_do_not_fit_each_has_a_pass_of_its_own() {
    let of_rows = |room_bytes: usize, max_rows, sessions: u64| {
        let mut runner = DiffusionRunner::new(Toy::new(), max_rows);
        runner.set_room(room_bytes);
        for id in 0..sessions {
            submit(&mut runner, id, with(guided("a fox", "rain"), |request| request.sampling.num_inference_steps = 1));
        }
        let plan = runner.plan(&Request::Diffusion(guided("a fox", "rain")));
        run(&mut runner);
        let passes = runner.model().passes.lock().expect("lock").iter().map(|(_, rows)| *rows).collect::<Vec<_>>();
        (plan.peak_bytes(), plan.branches_at_once(), passes)
    };
    assert_eq!(of_rows(32, 4, 1), (32, Some(2), vec![2]));
    assert_eq!(of_rows(31, 4, 1), (16, Some(1), vec![1, 1]));
    assert_eq!(of_rows(31, 4, 2), (16, Some(1), vec![2, 2]));
    assert_eq!(of_rows(32, 4, 2), (32, Some(2), vec![4]));
    assert_eq!(of_rows(32, 1, 1), (16, Some(1), vec![1, 1]));
    // What does not fit either way is planned in the smaller way, and refused by the caller.
    assert_eq!(of_rows(8, 4, 1), (16, Some(1), vec![1, 1]));
    let apart = |request: DiffusionRequest| {
        let mut runner = DiffusionRunner::new(Toy::new(), 4);
        runner.set_room(31);
        submit(&mut runner, 1, request);
        run(&mut runner).remove(&1).expect("the session had events")
    };
    assert_eq!(apart(guided("a fox", "rain")), alone(guided("a fox", "rain")));
}

/// CFG-Zero*: nobody is asked in the first steps; then the negative prediction is the multiple of itself that is closest.
#[test]
fn zero_star_leaves_the_first_steps_out_and_scales_the_negative_prediction() {
    let request = with(guided("123456", "12"), |request| {
        request.guidance.zero_star = Some(ZeroStar { zero_init_steps: 2 });
        request.guidance.interval = [0.0, 0.75];
        request.sampling.num_inference_steps = 4;
    });
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    submit(&mut runner, 1, request);
    (0..5).for_each(|_| drop(step(&mut runner)));
    assert_eq!(*runner.model().passes.lock().expect("lock"), [(0, 2), (0, 1)]);
    let Stage::Latents(found) = &runner.session(SessionId(1)).stage else { panic!("denoising is done") };
    let noise = TorchGenerator::new(1).randn(4);
    let predicted = |wanted: f32, timestep: f32, x: &[f32]| x.iter().map(|x| wanted - x * timestep).collect::<Vec<_>>();
    let (positive, negative) = (predicted(6.0, 0.5, &noise), predicted(2.0, 0.5, &noise));
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let factor = dot(&positive, &negative) / dot(&negative, &negative);
    let guided = positive.iter().zip(negative).map(|(p, n)| n * factor + 3.0 * (p - n * factor));
    let expected = noise.iter().zip(guided).map(|(x, flow)| x + flow / 2.0).map(|x| x + (6.0 - x * 0.25) / 2.0);
    for (found, expected) in values(&found.values).into_iter().zip(expected) {
        assert!((found - expected).abs() < 1e-4, "{found}, not {expected}");
    }
}

#[test]
fn sessions_at_different_timesteps_share_a_pass_and_equal_the_lone_ones() {
    let requests = [
        request("one", 1),
        with(request("two two", 2), |request| request.sampling.num_inference_steps = 5),
        guided("three", "no"),
        guided("four four", "never"),
        with(request("five", 3), |request| request.canvas.num_frames = 1),
        with(request("two two", 4), |request| request.sampling.num_inference_steps = 7),
        with(guided("six", "no"), |request| {
            request.guidance.interval = [0.0, 0.5];
            request.sampling.num_inference_steps = 6;
        }),
        with(guided("seven", "no"), |request| request.guidance.true_cfg_scale = Some(2.0)),
        with(guided("eight", "no"), |request| request.guidance.zero_star = Some(ZeroStar { zero_init_steps: 1 })),
    ];
    for max_rows in 1..6 {
        let mut runner = DiffusionRunner::new(Toy::new(), max_rows);
        let mut found = HashMap::<u64, Vec<String>>::new();
        for (id, request) in requests.iter().enumerate() {
            submit(&mut runner, id as u64, request.clone());
            for (id, event) in step(&mut runner) {
                found.entry(id).or_default().push(event);
            }
        }
        for (id, events) in run(&mut runner) {
            found.entry(id).or_default().extend(events);
        }
        let passes = runner.model().passes.lock().expect("lock").clone();
        assert!(passes.iter().all(|(_, rows)| *rows <= max_rows), "{passes:?}");
        assert!(max_rows == 1 || passes.iter().any(|(_, rows)| *rows > 1), "{passes:?}");
        for (id, request) in requests.iter().enumerate() {
            assert_eq!(found[&(id as u64)], alone(request.clone()), "{max_rows} rows, session {id}");
        }
    }
}

#[test]
fn bytes_round_as_numpy_does() {
    // 0.5 / 255 is halfway between 0 and 1, and 1.5 / 255 between 1 and 2: both go to the even one.
    for (value, byte) in [(-7.0, 0), (-1.0, 0), (1.0, 255), (3.0, 255), (0.0, 128), (-1.0 + 1.2 / 127.5, 1)] {
        assert_eq!(to_byte(value), byte, "{value}");
    }
}

#[test]
fn previews_show_where_the_steps_lead_and_change_nothing() {
    let plain = alone(request("twelve chars", 3));
    let with = alone(with(request("twelve chars", 3), |request| request.partial_images = 2));
    let previews: Vec<&String> = with.iter().filter(|event| event.starts_with("preview")).collect();
    assert_eq!(previews.len(), 2);
    let place = |wanted: &str| with.iter().position(|event| event.starts_with(wanted)).expect("it is there");
    assert_eq!(place("preview 0"), place("denoise 1/3") + 1);
    assert_eq!(place("preview 1"), place("denoise 2/3") + 1);
    let others: Vec<String> = with.iter().filter(|event| !event.starts_with("preview")).cloned().collect();
    assert_eq!(others, plain);
    // The toy's clean sample after its first step: the wanted value, whatever the noise was.
    assert_eq!(previews[0], "preview 0 of 120");
}

/// A session beside it that asks for none pays nothing and gets none.
#[test]
fn only_those_that_ask_get_previews() {
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    submit(&mut runner, 1, with(request("one", 1), |request| request.partial_images = 1));
    submit(&mut runner, 2, request("one", 2));
    let events = run(&mut runner);
    let previews = |id: u64| events[&id].iter().filter(|event| event.starts_with("preview")).count();
    assert_eq!((previews(1), previews(2)), (1, 0));
}
