//! Pictures whose VAE works in tiles.

use std::sync::Arc;
use tale_models::diffusion::parameters::{
    GUIDANCE_SCALE, HEIGHT, IMAGE, NUM_INFERENCE_STEPS, PROMPT, SEED, STRENGTH, VAE_TILING, WIDTH,
};
use tale_models::parameter::Options;

use tale_kernels::work::count;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::DiffusionCard;
use tale_models::diffusion::DiffusionRequest;
use tale_models::family::LoadOptions;
use tale_models::request::{Frame, Phase};
use tale_models::runner::Runner;
use tale_models::{Event, Events, ModelCard, Request, SessionId};

use crate::support::{case_dir, golden_json, golden_tensors, psnr};

const MIN_PSNR: f64 = 50.0;

/// The picture, and the tiles that were told.
fn picture(runner: &mut dyn Runner, request: DiffusionRequest) -> (Frame, usize) {
    runner.submit(SessionId(1), Request::Diffusion(request)).expect("accepted");
    let (mut events, mut picture, mut tiles) = (Events::default(), None, 0);
    while runner.next().is_some() {
        runner.step(&mut events).expect("a step");
        for (_, event) in events.drain() {
            match event {
                Event::Frames(frames) => picture = frames.into_iter().next(),
                Event::Progress { phase: Phase::VaeDecode, done, total } => {
                    tiles += 1;
                    assert_eq!((done, picture.is_some()), (tiles, done == total));
                }
                Event::Failed(error) => panic!("{error}"),
                _ => (),
            }
        }
    }
    (picture.expect("a picture"), tiles)
}

#[test]
fn pictures_in_tiles_are_the_reference_ones() {
    let (golden, tensors) = (golden_json("tiling"), golden_tensors("tiling"));
    for (run, facts) in golden["runs"].as_array().expect("runs").iter().enumerate() {
        let (card, mut runner) = load(facts["checkpoint"].as_str().expect("a case"));
        let number = |field: &str| facts[field].as_u64().map(|value| value as usize);
        let options = |vae_tiling| {
            Options::default()
                .with(&PROMPT, facts["prompt"].as_str().expect("a prompt").to_owned())
                .with(&WIDTH, number("width"))
                .with(&HEIGHT, number("height"))
                .with(&NUM_INFERENCE_STEPS, number("num_inference_steps"))
                .with(&GUIDANCE_SCALE, facts["guidance_scale"].as_f64())
                .with(&SEED, facts["seed"].as_u64())
                .with(&VAE_TILING, vae_tiling)
        };
        let asked = card.resolve(&options(Some(true)), 0).expect("valid");
        let expected: Vec<u8> =
            tensors[&format!("run{run}.image")].flatten_all().and_then(|x| x.to_vec1()).expect("a picture");
        let (found, tiles) = picture(&mut *runner, asked.clone());
        let distance = psnr(&found.rgb, &expected);
        println!("tiling run {run}: {distance:.1} dB in {tiles} tiles");
        assert!(distance >= MIN_PSNR, "run {run}: {distance:.1} dB");
        assert_eq!(Some(tiles), number("tiles"), "run {run}");

        // Where there is room for the whole picture nobody asks for tiles; where there is none the plan does.
        let whole = card.resolve(&options(None), 0).expect("valid");
        assert!(!whole.vae_tiling);
        let (untiled, steps) = picture(&mut *runner, whole.clone());
        assert_eq!(steps, 1);
        assert!(psnr(&untiled.rgb, &expected) < 45.0, "run {run}: tiles make no difference");
        let bytes = |request: &DiffusionRequest| {
            let plan = runner.plan(&Request::Diffusion(request.clone()));
            plan.phases().iter().find(|of| of.phase == Phase::VaeDecode).map(|of| of.bytes).expect("is planned")
        };
        assert!(bytes(&asked) < bytes(&whole), "run {run}: {} and {} bytes", bytes(&asked), bytes(&whole));
        let ModelCard::Diffusion(small) = ModelCard::Diffusion(card.clone()).with_room(bytes(&asked)) else {
            panic!("makes pictures")
        };
        assert_eq!(small.resolve(&options(None), 0).expect("valid"), asked);
    }
}

#[test]
fn pictures_to_begin_from_are_encoded_in_tiles() {
    let (golden, tensors) = (golden_json("tiling"), golden_tensors("tiling"));
    for (run, facts) in golden["edits"].as_array().expect("edits").iter().enumerate() {
        let (card, mut runner) = load(facts["checkpoint"].as_str().expect("a case"));
        let pixels = |name: &str| -> Vec<u8> {
            tensors[&format!("edit{run}.{name}")].flatten_all().and_then(|x| x.to_vec1()).expect("a picture")
        };
        let number = |field: &str| facts[field].as_u64().expect("a number") as usize;
        let (width, height) = (number("width"), number("height"));
        let options = |vae_tiling| {
            Options::default()
                .with(&PROMPT, facts["prompt"].as_str().expect("a prompt").to_owned())
                .with(&IMAGE, Arc::new(Frame { width, height, rgb: pixels("input") }))
                .with(&STRENGTH, facts["strength"].as_f64())
                .with(&NUM_INFERENCE_STEPS, number("num_inference_steps"))
                .with(&GUIDANCE_SCALE, facts["guidance_scale"].as_f64())
                .with(&SEED, facts["seed"].as_u64())
                .with(&VAE_TILING, vae_tiling)
        };
        let (tiled, whole) =
            (card.resolve(&options(true), 0).expect("valid"), card.resolve(&options(false), 0).expect("valid"));
        let work = |runner: &mut dyn Runner, request: &DiffusionRequest| {
            runner.submit(SessionId(2), Request::Diffusion(request.clone())).expect("accepted");
            let (mut events, mut flops) = (Events::default(), Vec::new());
            while let Some(plan) = runner.next().filter(|plan| plan.phase != Phase::Denoise) {
                let (step, counted) = count(|| runner.step(&mut events));
                step.expect("a step");
                if plan.phase == Phase::VaeEncode {
                    flops.push(counted.total().flops);
                }
            }
            runner.cancel(SessionId(2));
            flops
        };
        let (of_tiles, of_whole) = (work(&mut *runner, &tiled), work(&mut *runner, &whole));
        assert_eq!((of_tiles.len(), of_whole.len()), (number("tiles"), 1), "each tile is a step");
        assert!(of_tiles.iter().sum::<f64>() > of_whole[0], "tiles overlap");
        assert!(of_tiles.iter().all(|tile| *tile < of_whole[0]), "and each of them is less than the whole");
        let bytes = |request: &DiffusionRequest| {
            let plan = runner.plan(&Request::Diffusion(request.clone()));
            plan.phases().iter().find(|of| of.phase == Phase::VaeEncode).map(|of| of.bytes).expect("is planned")
        };
        assert!(bytes(&tiled) < bytes(&whole), "edit {run}: {} and {} bytes", bytes(&tiled), bytes(&whole));
        let expected = pixels("image");
        let distance = psnr(&picture(&mut *runner, tiled).0.rgb, &expected);
        println!("tiling edit {run}: {distance:.1} dB");
        assert!(distance >= MIN_PSNR, "edit {run}: {distance:.1} dB");
        assert!(
            psnr(&picture(&mut *runner, whole).0.rgb, &expected) < MIN_PSNR,
            "edit {run}: tiles make no difference"
        );
    }
}

fn load(case: &str) -> (DiffusionCard, Box<dyn Runner>) {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("the CPU");
    let path = case_dir(case).join("checkpoint");
    let loaded = tale_models::load(&path, &placement, &LoadOptions::default(), &mut |_| ()).expect("loads");
    let ModelCard::Diffusion(card) = loaded.card else { panic!("{case} makes pictures") };
    (card, loaded.runner)
}
