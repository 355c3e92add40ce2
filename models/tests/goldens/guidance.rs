//! True CFG, the guidance interval and CFG-Zero*, on the checkpoints of the families.

use std::path::Path;

use serde_json::Value;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::DiffusionRequest;
use tale_models::diffusion::parameters::{
    CFG_ZERO_STAR, GUIDANCE_INTERVAL, GUIDANCE_SCALE, HEIGHT, MAX_SEQUENCE_LENGTH, NEGATIVE_PROMPT, NUM_FRAMES,
    NUM_INFERENCE_STEPS, PROMPT, SEED, TRUE_CFG_SCALE, WIDTH, ZERO_INIT_STEPS,
};
use tale_models::family::LoadOptions;
use tale_models::parameter::Options;
use tale_models::request::{Event, Request};
use tale_models::runner::Runner;
use tale_models::{DiffusionCard, ModelCard};

use crate::support::{case_dir, golden_json, golden_tensors, psnr, run_to_end};

const MIN_PSNR: f64 = 50.0;

/// Through the runner, from the request to the bytes, with the branches of guidance in one pass and one by one.
#[test]
fn pictures_and_clips_are_the_reference_ones() {
    let tensors = golden_tensors("guidance");
    for (i, run) in runs().iter().enumerate() {
        let name = format!("run {i} ({})", run["checkpoint"]);
        let checkpoint = case_dir(run["checkpoint"].as_str().unwrap()).join("checkpoint");
        let expected: Vec<u8> = tensors[&format!("run{i}.pixels")].flatten_all().unwrap().to_vec1().unwrap();
        for (max_denoise_rows, at_once) in [(4, 2), (1, 1)] {
            let (card, mut runner) = load(&checkpoint, max_denoise_rows);
            let request = request(run, &card);
            let plan = runner.plan(&Request::Diffusion(request.clone()));
            assert_eq!(plan.branches_at_once(), Some(at_once), "{name}");
            let found = psnr(&pixels(&mut *runner, &request), &expected);
            println!("{name}, {at_once} at once: {found:.1} dB");
            assert!(found >= MIN_PSNR, "{name}, {at_once} at once: {found:.1} dB");
        }
    }
}

fn runs() -> Vec<Value> {
    golden_json("guidance")["runs"].as_array().unwrap().clone()
}

fn request(run: &Value, card: &DiffusionCard) -> DiffusionRequest {
    let size = |field: &str| run[field].as_u64().map(|value| value as usize);
    let interval = |interval: &Vec<Value>| [interval[0].as_f64().unwrap(), interval[1].as_f64().unwrap()];
    let options = Options::default()
        .with(&PROMPT, run["prompt"].as_str().unwrap().to_owned())
        .with(&NEGATIVE_PROMPT, run["negative_prompt"].as_str().map(str::to_owned))
        .with(&WIDTH, size("width"))
        .with(&HEIGHT, size("height"))
        .with(&NUM_FRAMES, size("num_frames"))
        .with(&NUM_INFERENCE_STEPS, size("steps"))
        .with(&GUIDANCE_SCALE, run["guidance_scale"].as_f64())
        .with(&TRUE_CFG_SCALE, run["true_cfg_scale"].as_f64())
        .with(&GUIDANCE_INTERVAL, run["guidance_interval"].as_array().map(interval))
        .with(&CFG_ZERO_STAR, run["cfg_zero_star"].as_bool())
        .with(&ZERO_INIT_STEPS, size("zero_init_steps"))
        .with(&SEED, run["seed"].as_u64())
        .with(&MAX_SEQUENCE_LENGTH, size("max_sequence_length"));
    card.resolve(&options, 0).unwrap()
}

fn placement() -> Placement {
    Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap()
}

fn load(checkpoint: &Path, max_denoise_rows: usize) -> (DiffusionCard, Box<dyn Runner>) {
    let options = LoadOptions { max_denoise_rows, ..Default::default() };
    let loaded = tale_models::load(checkpoint, &placement(), &options, &mut |_| ()).unwrap();
    let ModelCard::Diffusion(card) = loaded.card else { panic!("makes pictures or clips") };
    (card, loaded.runner)
}

/// The bytes of all frames, in order.
fn pixels(runner: &mut dyn Runner, request: &DiffusionRequest) -> Vec<u8> {
    let mut pixels = Vec::new();
    run_to_end(runner, std::slice::from_ref(request), |_, _, event| {
        if let Event::Frames(frames) = event {
            pixels.extend(frames.iter().flat_map(|frame| frame.rgb.clone()));
        }
    });
    pixels
}
