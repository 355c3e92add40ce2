//! Clips whose VAE works in tiles.

use std::sync::Arc;

use serde_json::Value;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::parameters::{
    GUIDANCE_SCALE, HEIGHT, INPUT_REFERENCE, NUM_FRAMES, NUM_INFERENCE_STEPS, PROMPT, SEED, VAE_TILING, WIDTH,
};
use tale_models::diffusion::{DiffusionCard, DiffusionRequest};
use tale_models::family::LoadOptions;
use tale_models::parameter::Options;
use tale_models::request::{Frame, Phase};
use tale_models::runner::Runner;
use tale_models::{Event, Events, ModelCard, Request, SessionId};

use crate::support::{case_dir, golden_json, golden_tensors, psnr};

/// Of each frame.
const MIN_PSNR: f64 = 50.0;

/// What a request gives: its frames, the frames that came at once, and the steps of the VAE's two phases.
struct Made {
    frames: Vec<Frame>,
    portions: Vec<usize>,
    encode_steps: usize,
    decode_steps: usize,
}

fn make(runner: &mut dyn Runner, request: &DiffusionRequest) -> Made {
    runner.submit(SessionId(1), Request::Diffusion(request.clone())).expect("accepted");
    let mut events = Events::default();
    let mut made = Made { frames: Vec::new(), portions: Vec::new(), encode_steps: 0, decode_steps: 0 };
    while let Some(plan) = runner.next() {
        made.encode_steps += usize::from(plan.phase == Phase::VaeEncode);
        runner.step(&mut events).expect("a step");
        for (_, event) in events.drain() {
            match event {
                Event::Frames(frames) => {
                    made.portions.push(frames.len());
                    made.frames.extend(frames);
                }
                Event::Progress { phase: Phase::VaeDecode, done, .. } => made.decode_steps = done,
                Event::Failed(error) => panic!("{error}"),
                _ => (),
            }
        }
    }
    made
}

#[test]
fn clips_in_tiles_are_the_reference_ones() {
    let (golden, tensors) = (golden_json("clip-tiling"), golden_tensors("clip-tiling"));
    for (run, facts) in golden["runs"].as_array().expect("runs").iter().enumerate() {
        let (card, mut runner) = load(facts["checkpoint"].as_str().expect("a case"));
        let bytes_of = |name: &str| -> Option<Vec<u8>> {
            let tensor = tensors.get(&format!("run{run}.{name}"))?;
            Some(tensor.flatten_all().and_then(|x| x.to_vec1()).expect("bytes"))
        };
        let options = |vae_tiling| options(facts, bytes_of("input")).with(&VAE_TILING, vae_tiling);
        let asked = card.resolve(&options(Some(true)), 0).expect("valid");
        let expected = bytes_of("frames").expect("frames");
        let frame_bytes = expected.len() / asked.canvas.num_frames;
        let worst = |made: &Made| {
            let frames = made.frames.iter().zip(expected.chunks_exact(frame_bytes));
            frames.map(|(found, expected)| psnr(&found.rgb, expected)).fold(f64::INFINITY, f64::min)
        };

        let tiled = make(&mut *runner, &asked);
        assert_eq!(tiled.frames.len(), asked.canvas.num_frames);
        println!("clip tiling run {run}: {:.1} dB in {} steps", worst(&tiled), tiled.decode_steps);
        assert!(worst(&tiled) >= MIN_PSNR, "run {run}: {:.1} dB", worst(&tiled));
        // One step for each latent frame of each tile; with the last of them the first frames are there, and each later
        // portion is handed out by a step.
        let calls = |field: &str| facts[field].as_u64().expect("a number") as usize;
        assert_eq!(tiled.decode_steps, calls("decoder_calls") + tiled.portions.len() - 1, "run {run}");
        assert_eq!(tiled.encode_steps, calls("encoder_calls"), "run {run}");

        // Where there is room for whole frames nobody asks for tiles; where there is none the plan does.
        let whole = card.resolve(&options(None), 0).expect("valid");
        assert!(!whole.vae_tiling);
        let untiled = make(&mut *runner, &whole);
        assert_eq!((untiled.decode_steps, &untiled.portions), (tiled.portions.len(), &tiled.portions), "run {run}");
        assert!(worst(&untiled) < MIN_PSNR, "run {run}: tiles make no difference");
        let ModelCard::Diffusion(small) = ModelCard::Diffusion(card.clone()).with_room(1) else {
            panic!("makes clips")
        };
        assert_eq!(small.resolve(&options(None), 0).expect("valid"), asked);
    }
}

/// At a published size, of the published VAE: tiles are for memory.
#[test]
fn a_clip_in_tiles_takes_less_memory() {
    let config = tale_models::vae::wan::WanVaeConfig::default();
    for (frames, latents) in [(21, (60, 104)), (21, (90, 160)), (33, (90, 160))] {
        let bytes = |tiled| config.peak_decode_bytes(frames, latents, tiled, candle_core::DType::BF16);
        println!("{frames} latent frames of {latents:?}: {} and {} MiB", bytes(true) >> 20, bytes(false) >> 20);
        assert!(2 * bytes(true) < bytes(false), "{latents:?}: {} and {}", bytes(true), bytes(false));
    }
}

fn options(facts: &Value, input: Option<Vec<u8>>) -> Options {
    let number = |field: &str| facts[field].as_u64().map(|value| value as usize);
    let (width, height) = (number("width"), number("height"));
    let frame = |rgb| Frame { width: width.expect("a width"), height: height.expect("a height"), rgb };
    Options::default()
        .with(&PROMPT, facts["prompt"].as_str().expect("a prompt").to_owned())
        .with(&INPUT_REFERENCE, input.map(|rgb| Arc::new(frame(rgb))))
        .with(&WIDTH, width)
        .with(&HEIGHT, height)
        .with(&NUM_FRAMES, number("num_frames"))
        .with(&NUM_INFERENCE_STEPS, number("num_inference_steps"))
        .with(&GUIDANCE_SCALE, facts["guidance_scale"].as_f64())
        .with(&SEED, facts["seed"].as_u64())
}

fn load(case: &str) -> (DiffusionCard, Box<dyn Runner>) {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("the CPU");
    let path = case_dir(case).join("checkpoint");
    let loaded = tale_models::load(&path, &placement, &LoadOptions::default(), &mut |_| ()).expect("loads");
    let ModelCard::Diffusion(card) = loaded.card else { panic!("{case} makes clips") };
    (card, loaded.runner)
}
