//! True CFG, the guidance interval, CFG-Zero* and the first-block cache, on the checkpoints of the families.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tale_models::diffusion::parameters::{
    ACCELERATION, CFG_ZERO_STAR, GUIDANCE_INTERVAL, GUIDANCE_SCALE, HEIGHT, MAX_SEQUENCE_LENGTH, NEGATIVE_PROMPT,
    NUM_FRAMES, NUM_INFERENCE_STEPS, PROMPT, SEED, TRUE_CFG_SCALE, WIDTH, ZERO_INIT_STEPS,
};
use tale_models::parameter::Options;

use candle_core::Tensor;
use serde_json::Value;

use tale_kernels::work::count;
use tale_models::checkpoint::Manifest;

use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::{Acceleration, DiffusionRequest};
use tale_models::families::flux::FluxModel;
use tale_models::families::wan::WanModel;
use tale_models::family::LoadOptions;
use tale_models::request::{Event, Events, Phase, Request, SessionId};
use tale_models::rng::TorchGenerator;
use tale_models::runner::Runner;
use tale_models::runner::diffusion::block_cache::{BlockCache, MAX_CONSECUTIVE_SKIPS};
use tale_models::runner::diffusion::course::FIRST_EXPERT;
use tale_models::runner::diffusion::{DenoiseRow, DiffusionModel};
use tale_models::{DiffusionCard, ModelCard};
use tempfile::TempDir;

use crate::support::{
    case_dir, conditioning, copy_folder, edit_tensors, golden_json, golden_tensors, psnr, run_to_end,
};

const MIN_PSNR: f64 = 50.0;
/// The cache itself costs about 50 dB: a wrong one must not pass for a right one.
const MIN_PSNR_OF_CACHE: f64 = 65.0;

/// Through the runner, from the request to the bytes.
#[test]
fn pictures_and_clips_are_the_reference_ones() {
    let tensors = golden_tensors("guidance");
    for (i, run) in runs().iter().enumerate() {
        let name = format!("run {i} ({})", run["checkpoint"]);
        let checkpoint = Checkpoint::of(run);
        let (card, mut runner) = load(&checkpoint.path, 4);
        let request = request(run, &card);
        let answer = &answers(&mut *runner, std::slice::from_ref(&request))[0];
        let expected: Vec<u8> = tensors[&format!("run{i}.pixels")].flatten_all().unwrap().to_vec1().unwrap();
        let found = psnr(&answer.pixels, &expected);
        let wanted = if request.acceleration == Acceleration::None { MIN_PSNR } else { MIN_PSNR_OF_CACHE };
        assert!(found >= wanted, "{name}: {found:.1} dB");
        let skips: usize = patterns(run).iter().map(|pattern| pattern.matches('-').count()).sum();
        assert_eq!(answer.skipped_passes, skips, "{name}: passes skipped");
    }
}

#[test]
fn the_cache_skips_the_passes_that_the_reference_skips() {
    assert_eq!(golden_json("guidance")["max_consecutive_skips"], MAX_CONSECUTIVE_SKIPS);
    let mut checked = 0;
    for run in runs().iter().filter(|run| !run["skips"].is_null()) {
        let checkpoint = Checkpoint::of(run);
        let found = match run["checkpoint"].as_str().unwrap() {
            "wan-b" => skips(&wan(&checkpoint.path), run),
            _ => skips(&flux(&checkpoint.path), run),
        };
        assert_eq!(found, patterns(run), "{run}");
        checked += found.len();
    }
    assert!(checked >= 7, "{checked} branches");
}

/// The loop of the runner, one row at a time: for each branch `x` where a pass was computed and `-` where it was skipped.
fn skips<M: DiffusionModel>(model: &M, run: &Value) -> Vec<String> {
    let request = request(run, model.card());
    let threshold = model.card().cache_threshold(&request).unwrap();
    let branches = conditioning(model, &request);
    let mut caches: Vec<BlockCache> = branches.iter().map(|_| BlockCache::new(threshold)).collect();
    let mut found = vec![String::new(); branches.len()];
    let mut generator = TorchGenerator::new(request.sampling.seed);
    let mut latents = model.initial_latents(&request, &mut generator).unwrap();
    let mut solver = model.course(&request).unwrap().solver;
    let steps = request.sampling.num_inference_steps;
    for step in 0..steps {
        let timestep = solver.timesteps()[step];
        let guided = request.guidance.is_guided_at(step, steps);
        let mut predict = |branch: usize| {
            let (conditioning, cache) = (&branches[branch], &mut caches[branch]);
            let row = DenoiseRow { latents: &latents, timestep, conditioning, request: &request };
            let before = cache.skipped();
            let cached = model.cached_prediction().unwrap();
            let prediction = cached.predict_cached(FIRST_EXPERT, &[row], &mut [&mut *cache]).unwrap().remove(0);
            found[branch].push(if cache.skipped() > before { '-' } else { 'x' });
            prediction
        };
        let positive = predict(0);
        let prediction = match guided {
            false => positive,
            true => {
                let negative = predict(1);
                (&negative + ((positive - &negative).unwrap() * request.guidance.cfg_scale()).unwrap()).unwrap()
            }
        };
        latents = solver.step(step, &prediction, &latents, &mut generator).unwrap();
    }
    found
}

#[test]
fn at_threshold_0_the_cache_changes_no_bit() {
    for case in ["flux-dev", "flux-schnell"] {
        check_threshold_0(case, &flux(&case_dir(case).join("checkpoint")));
    }
    check_threshold_0("wan-b", &wan(&case_dir("wan-b").join("checkpoint")));
}

fn check_threshold_0<M: DiffusionModel>(case: &str, model: &M) {
    let request = small_request(model.card(), Options::default());
    let conditioning = &conditioning(model, &request)[0];
    let mut cache = BlockCache::new(0.0);
    let mut generator = TorchGenerator::new(3);
    let latents = model.initial_latents(&request, &mut generator).unwrap();
    // The same input again and again: nothing could be more alike.
    for timestep in [900.0, 900.0, 450.5, 450.5] {
        let row = || [DenoiseRow { latents: &latents, timestep, conditioning, request: &request }];
        let plain = model.predict(FIRST_EXPERT, &row()).unwrap();
        let cached = model.cached_prediction().unwrap();
        let cached = cached.predict_cached(FIRST_EXPERT, &row(), &mut [&mut cache]).unwrap();
        assert_eq!(values(&plain[0]), values(&cached[0]), "{case} at {timestep}");
    }
    assert_eq!(cache.skipped(), 0);
}

/// Sessions of other seeds, step counts, prompts, thresholds and intervals in shared passes, each deciding for itself.
#[test]
fn accelerated_sessions_of_a_batch_give_the_pictures_of_lone_ones() {
    let run = &runs().into_iter().find(|run| !run["scaled"].is_null()).unwrap();
    let checkpoint = Checkpoint::of(run);
    let (card, mut runner) = load(&checkpoint.path, 4);
    let variants: Vec<DiffusionRequest> = (0..5)
        .map(|i| {
            let guided = i % 2 == 1;
            let options = Options::default()
                .with(&PROMPT, format!("A boat and {i} more"))
                .with(&NEGATIVE_PROMPT, guided.then(|| "Rain".to_owned()))
                .with(&TRUE_CFG_SCALE, guided.then_some(2.0))
                .with(&GUIDANCE_INTERVAL, (i == 3).then_some([0.0, 0.5]))
                .with(&ACCELERATION, [Acceleration::Safe, Acceleration::Fast, Acceleration::None][i % 3])
                .with(&SEED, 100 + i as u64)
                .with(&NUM_INFERENCE_STEPS, 14 + 2 * i);
            small_request(&card, options)
        })
        .collect();
    let alone: Vec<Answer> =
        variants.iter().map(|request| answers(&mut *runner, std::slice::from_ref(request)).remove(0)).collect();
    for (i, (together, alone)) in answers(&mut *runner, &variants).iter().zip(&alone).enumerate() {
        let found = psnr(&together.pixels, &alone.pixels);
        assert!(found >= MIN_PSNR_OF_CACHE, "session {i}: {found:.1} dB against itself alone");
        assert_eq!(together.skipped_passes, alone.skipped_passes, "session {i}");
        assert_eq!(alone.skipped_passes > 0, variants[i].acceleration != Acceleration::None, "session {i}");
    }
}

/// A skipped pass does the work of its first block and of what stands around the blocks.
#[test]
fn work_is_what_a_pass_has_done_and_memory_what_the_caches_keep() {
    let run =
        &runs().into_iter().find(|run| run["skips"]["cond"].as_str().is_some_and(|s| s.contains("---x"))).unwrap();
    let checkpoint = Checkpoint::of(run);
    let (card, mut runner) = load(&checkpoint.path, 4);
    let request = request(run, &card);
    runner.submit(SessionId(1), Request::Diffusion(request.clone())).unwrap();
    let mut works = Vec::new();
    while let Some(plan) = runner.next() {
        let (_, counted) = count(|| runner.step(&mut Events::default()).unwrap());
        if plan.phase == Phase::Denoise {
            works.push(counted.total());
        }
    }
    let (whole, first) = (works[0], works[1]);
    assert!(first.flops < 0.6 * whole.flops && first.bytes < 0.6 * whole.bytes, "{first:?} of {whole:?}");
    let pattern = &patterns(run)[0];
    for (step, (work, pass)) in works.iter().zip(pattern.chars()).enumerate() {
        assert_eq!(*work, if pass == 'x' { whole } else { first }, "step {step} of {pattern}");
    }
    let plain = DiffusionRequest { acceleration: Acceleration::None, ..request.clone() };
    let bytes = |request: DiffusionRequest| {
        let plan = runner.plan(&Request::Diffusion(request));
        plan.phases().iter().find(|phase| phase.phase == Phase::Denoise).unwrap().bytes
    };
    // Three vectors of 36 values for each of 4 x 3 tokens.
    assert_eq!(bytes(request) - bytes(plain), 3 * 36 * 12 * 4);
}

#[test]
fn where_nothing_can_be_skipped_acceleration_is_refused() {
    let (card, _) = load(&case_dir("sdxl-a").join("checkpoint"), 1);
    let options = Options::default().with(&PROMPT, "x".to_owned()).with(&ACCELERATION, Acceleration::Safe);
    let refused = card.resolve(&options, 0).unwrap_err().to_string();
    assert!(refused.starts_with("acceleration: ") && refused.contains("allowed: none"), "{refused}");
}

fn runs() -> Vec<Value> {
    golden_json("guidance")["runs"].as_array().unwrap().clone()
}

/// Of the positive branch, then the negative one.
fn patterns(run: &Value) -> Vec<String> {
    let branches = ["cond", "uncond"].iter().filter_map(|branch| run["skips"][*branch].as_str());
    branches.map(str::to_owned).collect()
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
        .with(&ACCELERATION, run["acceleration"].as_str().map(|name| Acceleration::named(name).unwrap()))
        .with(&CFG_ZERO_STAR, run["cfg_zero_star"].as_bool())
        .with(&ZERO_INIT_STEPS, size("zero_init_steps"))
        .with(&SEED, run["seed"].as_u64())
        .with(&MAX_SEQUENCE_LENGTH, size("max_sequence_length"));
    card.resolve(&options, 0).unwrap()
}

fn small_request(card: &DiffusionCard, options: Options) -> DiffusionRequest {
    let (width, height, max_sequence_length) = (Some(64), Some(32), Some(16));
    let num_frames = card.canvas.frames.map(|_| 5);
    card.resolve(
        &options
            .with(&WIDTH, width)
            .with(&HEIGHT, height)
            .with(&NUM_FRAMES, num_frames)
            .with(&MAX_SEQUENCE_LENGTH, max_sequence_length),
        0,
    )
    .unwrap()
}

/// A committed checkpoint, or a copy of it with some tensors of the transformer scaled.
struct Checkpoint {
    path: PathBuf,
    _dir: Option<TempDir>,
}

impl Checkpoint {
    fn of(run: &Value) -> Self {
        let path = case_dir(run["checkpoint"].as_str().unwrap()).join("checkpoint");
        let Some(scaled) = run["scaled"].as_object() else { return Self { path, _dir: None } };
        let dir = tempfile::tempdir().unwrap();
        copy_folder(&path, dir.path());
        for (tensor, factor) in scaled {
            let factor = factor.as_f64().unwrap();
            edit_tensors(&dir.path().join("transformer"), tensor, |x| (x * factor).unwrap());
        }
        Self { path: dir.path().to_owned(), _dir: Some(dir) }
    }
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

fn flux(checkpoint: &Path) -> FluxModel {
    let (manifest, placement) = (Manifest::read(checkpoint).unwrap(), placement());
    FluxModel::load(&manifest, &placement, &mut |component| manifest.component(component)?.weights(&placement)).unwrap()
}

fn wan(checkpoint: &Path) -> WanModel {
    let (manifest, placement) = (Manifest::read(checkpoint).unwrap(), placement());
    WanModel::load(&manifest, &placement, &mut |component| manifest.component(component)?.weights(&placement)).unwrap()
}

/// What came of a session.
#[derive(Default)]
struct Answer {
    /// Of all frames, in order.
    pixels: Vec<u8>,
    skipped_passes: usize,
}

/// Runs sessions to their end, each submitted one step after the one before.
fn answers(runner: &mut dyn Runner, requests: &[DiffusionRequest]) -> Vec<Answer> {
    let mut answers: HashMap<SessionId, Answer> = HashMap::new();
    run_to_end(runner, requests, |_, id, event| {
        let answer = answers.entry(id).or_default();
        match event {
            Event::Frames(frames) => answer.pixels.extend(frames.iter().flat_map(|frame| &frame.rgb)),
            Event::Finished { usage, .. } => answer.skipped_passes = usage.skipped_passes,
            _ => (),
        }
    });
    (0..requests.len()).map(|id| answers.remove(&SessionId(id as u64)).unwrap()).collect()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}
