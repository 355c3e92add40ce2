//! Clips whose VAE works in tiles.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::DType;
use serde_json::Value;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::parameters::{
    GUIDANCE_SCALE, HEIGHT, INPUT_REFERENCE, MAX_SEQUENCE_LENGTH, NUM_FRAMES, NUM_INFERENCE_STEPS, PROMPT, SEED,
    VAE_TILING, WIDTH,
};
use tale_models::diffusion::{DiffusionCard, DiffusionRequest};
use tale_models::family::LoadOptions;
use tale_models::parameter::Options;
use tale_models::request::{Frame, Phase};
use tale_models::runner::{Runner, RunnerStatus};
use tale_models::vae::cogvideox::CogVideoXVaeConfig;
use tale_models::vae::hunyuan_video::HunyuanVaeConfig;
use tale_models::vae::wan::WanVaeConfig;
use tale_models::{Event, Events, ModelCard, Request, SessionId};
use tempfile::TempDir;

use crate::support::{case_dir, copy_folder, golden_json, golden_tensors, psnr};

/// One of each family.
pub const CASES: [&str; 3] = ["clip-tiling", "cogvideox-tiling", "hunyuan-video-tiling"];
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
    for case in CASES {
        check_case(case);
    }
}

fn check_case(case: &str) {
    let tensors = golden_tensors(case);
    for (run, facts) in runs(case).iter().enumerate() {
        let checkpoint = Checkpoint::of(facts);
        let (card, mut runner) = load(&checkpoint);
        let bytes_of = |name: &str| -> Option<Vec<u8>> {
            let tensor = tensors.get(&format!("run{run}.{name}"))?;
            Some(tensor.flatten_all().and_then(|x| x.to_vec1()).expect("bytes"))
        };
        let options = |vae_tiling| options(facts, bytes_of("input")).with(&VAE_TILING, vae_tiling);
        let asked = card.resolve(&options(Some(true)), 0).expect("valid");
        let kept = kept_frames(facts, asked.canvas.num_frames);
        let expected = bytes_of("frames").expect("frames");
        let frame_bytes = expected.len() / kept.len();
        let worst = |made: &Made| {
            let frames = kept.iter().map(|index| &made.frames[*index]).zip(expected.chunks_exact(frame_bytes));
            frames.map(|(found, expected)| psnr(&found.rgb, expected)).fold(f64::INFINITY, f64::min)
        };

        let tiled = make(&mut *runner, &asked);
        assert_eq!(tiled.frames.len(), asked.canvas.num_frames);
        println!("{case} run {run}: {:.1} dB in {} steps", worst(&tiled), tiled.decode_steps);
        assert!(worst(&tiled) >= MIN_PSNR, "{case} run {run}: {:.1} dB", worst(&tiled));
        // One step for each portion of each tile.
        let calls = |field: &str| facts[field].as_u64().expect("a number") as usize;
        assert_eq!(tiled.decode_steps, calls("decoder_calls"), "{case} run {run}");
        assert_eq!(tiled.encode_steps, calls("encoder_calls"), "{case} run {run}");

        // Where there is room for whole frames nobody asks for tiles; where there is none the plan does.
        let whole = card.resolve(&options(None), 0).expect("valid");
        assert!(!whole.vae_tiling);
        let untiled = make(&mut *runner, &whole);
        assert_eq!((untiled.decode_steps, &untiled.portions), (tiled.portions.len(), &tiled.portions), "run {run}");
        assert!(worst(&untiled) < MIN_PSNR, "{case} run {run}: tiles make no difference");
        let ModelCard::Diffusion(small) = ModelCard::Diffusion(card.clone()).with_room(1) else {
            panic!("makes clips")
        };
        assert_eq!(small.resolve(&options(None), 0).expect("valid"), asked);
    }
}

/// Between two tiles of either phase, and after each.
#[test]
fn a_clip_cancelled_between_tiles_leaves_nothing() {
    for case in CASES {
        let tensors = golden_tensors(case);
        let runs = runs(case);
        let (run, facts) = runs.iter().enumerate().max_by_key(|(_, run)| run["encoder_calls"].as_u64()).expect("runs");
        let (card, mut runner) = load(&Checkpoint::of(facts));
        let input = tensors[&format!("run{run}.input")].flatten_all().and_then(|x| x.to_vec1()).expect("bytes");
        let request = card.resolve(&options(facts, Some(input)).with(&VAE_TILING, true), 0).expect("valid");
        let mut cancelled = HashMap::new();
        for steps in 0.. {
            runner.submit(SessionId(1), Request::Diffusion(request.clone())).expect("accepted");
            let mut events = Events::default();
            for _ in 0..steps {
                runner.step(&mut events).expect("a step");
            }
            let Some(next) = runner.next() else { break };
            *cancelled.entry(next.phase).or_insert(0) += 1;
            runner.cancel(SessionId(1));
            assert_eq!(runner.status(), RunnerStatus::default(), "{case}: after {steps} steps");
            assert!(runner.next().is_none());
        }
        let calls = |field: &str| facts[field].as_u64().expect("a number");
        assert_eq!(cancelled[&Phase::VaeEncode], calls("encoder_calls"), "{case}");
        assert_eq!(cancelled[&Phase::VaeDecode], calls("decoder_calls"), "{case}");
    }
}

/// The runs of a case.
pub fn runs(case: &str) -> Vec<Value> {
    golden_json(case)["runs"].as_array().expect("runs").clone()
}

/// Numbers of the frames that the golden has.
pub fn kept_frames(facts: &Value, num_frames: usize) -> Vec<usize> {
    match facts["kept_frames"].as_array() {
        Some(kept) => kept.iter().map(|index| index.as_u64().expect("a number") as usize).collect(),
        None => (0..num_frames).collect(),
    }
}

/// A case's checkpoint, or a copy whose VAE was made for another size.
pub enum Checkpoint {
    Own(PathBuf),
    Copied(TempDir),
}

impl Checkpoint {
    pub fn of(facts: &Value) -> Self {
        let own = case_dir(facts["checkpoint"].as_str().expect("a case")).join("checkpoint");
        if facts["sample_height"].is_null() {
            return Self::Own(own);
        }
        let copy = TempDir::new().expect("a folder");
        copy_folder(&own, copy.path());
        let path = copy.path().join("vae/config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
        for field in ["sample_height", "sample_width"] {
            config[field] = facts[field].clone();
        }
        std::fs::write(&path, config.to_string()).expect("written");
        Self::Copied(copy)
    }

    pub fn path(&self) -> &Path {
        match self {
            Self::Own(path) => path,
            Self::Copied(copy) => copy.path(),
        }
    }
}

/// At published sizes, of the published VAEs: tiles are for memory.
#[test]
fn a_clip_in_tiles_takes_less_memory() {
    let (wan, cogvideox) = (WanVaeConfig::default(), CogVideoXVaeConfig::default());
    let hunyuan = HunyuanVaeConfig::default();
    // Frames, rows and columns of latents, and by how many times less the tiles must take.
    let check = |family: &str, latents: [usize; 3], least: f64, bytes: &dyn Fn(bool) -> usize| {
        let times = bytes(false) as f64 / bytes(true) as f64;
        println!("{family} {latents:?}: {} and {} MiB, {times:.1} times", bytes(true) >> 20, bytes(false) >> 20);
        assert!(times > least, "{family} {latents:?}: {} and {}", bytes(true), bytes(false));
    };
    for latents @ [frames, height, width] in [[21, 60, 104], [21, 90, 160], [33, 90, 160]] {
        check("Wan2.1", latents, 2.0, &|tiled| wan.peak_decode_bytes(frames, (height, width), tiled, DType::BF16));
    }
    for latents @ [frames, height, width] in [[13, 60, 90], [21, 96, 170], [33, 90, 160], [41, 96, 170]] {
        let bytes = |tiled| cogvideox.peak_decode_bytes(frames, (height, width), tiled, DType::BF16);
        check("CogVideoX", latents, 2.5, &bytes);
    }
    for latents in [[33, 68, 120], [33, 90, 160]] {
        check("HunyuanVideo", latents, 5.0, &|tiled| hunyuan.peak_decode_bytes(latents, tiled, DType::BF16));
    }
}

pub fn options(facts: &Value, input: Option<Vec<u8>>) -> Options {
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
        .with(&MAX_SEQUENCE_LENGTH, number("max_sequence_length"))
}

fn load(checkpoint: &Checkpoint) -> (DiffusionCard, Box<dyn Runner>) {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("the CPU");
    let loaded = tale_models::load(checkpoint.path(), &placement, &LoadOptions::default(), &mut |_| ()).expect("loads");
    let ModelCard::Diffusion(card) = loaded.card else { panic!("makes clips") };
    (card, loaded.runner)
}
