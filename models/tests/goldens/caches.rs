//! Skipped blocks: the first-block cache, MagCache and TeaCache, on the checkpoints of the families.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde_json::Value;
use tale_kernels::work::count;
use tale_models::checkpoint::Manifest;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::acceleration::{CacheMethod, DEFAULT_MAX_SKIPS};
use tale_models::diffusion::parameters::{
    ACCELERATION, CACHE_COEFFICIENTS, CACHE_INTERVAL, CACHE_MAX_SKIPS, CACHE_METHOD, CACHE_RATIOS, CACHE_THRESHOLD,
    GUIDANCE_INTERVAL, GUIDANCE_SCALE, HEIGHT, MAX_SEQUENCE_LENGTH, NEGATIVE_PROMPT, NUM_FRAMES, NUM_INFERENCE_STEPS,
    PROMPT, SEED, TRUE_CFG_SCALE, WIDTH,
};
use tale_models::diffusion::{Acceleration, DiffusionRequest};
use tale_models::families::cogvideox::CogVideoXModel;
use tale_models::families::flux::FluxModel;
use tale_models::families::hunyuan_video::HunyuanVideoModel;
use tale_models::families::wan::WanModel;
use tale_models::family::LoadOptions;
use tale_models::parameter::{Options, ParameterType, Value as Given};
use tale_models::request::{Event, Events, Phase, Request, SessionId};
use tale_models::rng::TorchGenerator;
use tale_models::runner::Runner;
use tale_models::runner::diffusion::block_cache::{BlockCache, RowCache};
use tale_models::runner::diffusion::course::FIRST_EXPERT;
use tale_models::runner::diffusion::{DenoiseRow, DiffusionModel};
use tale_models::{DiffusionCard, ModelCard};
use tempfile::TempDir;

use crate::support::{
    case_dir, conditioning, copy_folder, edit_tensors, golden_json, golden_tensors, psnr, run_to_end,
};

/// What is skipped costs 17 to 57 dB: a wrong answer must not pass for a right one.
const MIN_PSNR: f64 = 65.0;

/// Through the runner, from the request to the bytes.
#[test]
fn pictures_and_clips_are_the_reference_ones() {
    let tensors = golden_tensors("caches");
    for (i, run) in runs().iter().enumerate() {
        let name = format!("run {i} ({}, {})", run["checkpoint"], run["cache_method"]);
        let checkpoint = Checkpoint::of(run);
        let (card, mut runner) = load(&checkpoint.path, 4);
        let answer = &answers(&mut *runner, &[request(run, &card)])[0];
        let expected: Vec<u8> = tensors[&format!("run{i}.pixels")].flatten_all().unwrap().to_vec1().unwrap();
        let found = psnr(&answer.pixels, &expected);
        println!("{name}: {found:.1} dB");
        assert!(found >= MIN_PSNR, "{name}: {found:.1} dB");
        let skips: usize = patterns(run).iter().map(|pattern| pattern.matches('-').count()).sum();
        assert_eq!(answer.skipped_passes, skips, "{name}: passes skipped");
    }
}

#[test]
fn the_passes_that_are_skipped_are_those_of_the_reference() {
    assert_eq!(golden_json("caches")["max_skips"], DEFAULT_MAX_SKIPS);
    let mut checked = HashMap::new();
    for run in runs() {
        let checkpoint = Checkpoint::of(&run);
        let family = run["checkpoint"].as_str().unwrap().split('-').next().unwrap().to_owned();
        let found = match family.as_str() {
            "flux" => skips(&flux(&checkpoint.path), &run),
            "wan" => skips(&wan(&checkpoint.path), &run),
            "cogvideox" => skips(&cogvideox(&checkpoint.path), &run),
            _ => skips(&hunyuan_video(&checkpoint.path), &run),
        };
        assert_eq!(found, patterns(&run), "{run}");
        *checked.entry((family, run["cache_method"].as_str().unwrap().to_owned())).or_insert(0) += 1;
    }
    assert_eq!(checked.len(), 4 * 3, "each method in each family: {checked:?}");
}

/// The loop of the runner, one row at a time: for each branch `x` where a pass was computed and `-` where it was skipped.
fn skips<M: DiffusionModel>(model: &M, run: &Value) -> Vec<String> {
    let request = request(run, model.card());
    let branches = conditioning(model, &request);
    let mut caches = caches(&request, branches.len());
    let mut found = vec![String::new(); branches.len()];
    let mut generator = TorchGenerator::new(request.sampling.seed);
    let mut latents = model.initial_latents(&request, &mut generator).unwrap();
    let mut solver = model.course(&request).unwrap().solver;
    let steps = request.sampling.num_inference_steps;
    for step in 0..steps {
        let timestep = solver.timesteps()[step];
        let input = solver.scale_model_input(step, &latents).unwrap();
        let guided = request.guidance.is_guided_at(step, steps);
        let mut predict = |branch: usize| {
            let (conditioning, cache) = (&branches[branch], &mut caches[branch]);
            let row = DenoiseRow { latents: &input, timestep, conditioning, request: &request };
            let before = cache.skipped();
            let cached = model.cached_prediction().unwrap();
            let mut rows = [RowCache { cache, step }];
            let prediction = cached.predict_cached(FIRST_EXPERT, &[row], &mut rows).unwrap().remove(0);
            found[branch].push(if caches[branch].skipped() > before { '-' } else { 'x' });
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

fn caches(request: &DiffusionRequest, branches: usize) -> Vec<BlockCache> {
    let rule = request.cache.as_ref().expect("a cache");
    (0..branches).map(|branch| BlockCache::new(rule.clone(), branch)).collect()
}

#[test]
fn at_threshold_0_the_cache_changes_no_bit() {
    let path = |case: &str| case_dir(case).join("checkpoint");
    for method in METHODS {
        for case in ["flux-dev", "flux-schnell"] {
            check_threshold_0(case, method, &flux(&path(case)));
        }
        for case in ["wan-a", "wan-b"] {
            check_threshold_0(case, method, &wan(&path(case)));
        }
        for case in ["cogvideox-a", "cogvideox-b", "cogvideox-1.5"] {
            check_threshold_0(case, method, &cogvideox(&path(case)));
        }
        for case in ["hunyuan-video-a", "hunyuan-video-b"] {
            check_threshold_0(case, method, &hunyuan_video(&path(case)));
        }
    }
}

fn check_threshold_0<M: DiffusionModel>(case: &str, method: CacheMethod, model: &M) {
    if model.card().acceleration.is_none() {
        return;
    }
    let request = small_request(model.card(), of_method(method, 0.0));
    let conditioning = &conditioning(model, &request)[0];
    let mut cache = caches(&request, 1).remove(0);
    let mut generator = TorchGenerator::new(3);
    let latents = model.initial_latents(&request, &mut generator).unwrap();
    // The same input again and again: nothing could be more alike.
    for (step, timestep) in [900.0, 900.0, 450.5, 450.5].into_iter().enumerate() {
        let row = || [DenoiseRow { latents: &latents, timestep, conditioning, request: &request }];
        let plain = model.predict(FIRST_EXPERT, &row()).unwrap();
        let cached = model.cached_prediction().unwrap();
        let mut rows = [RowCache { cache: &mut cache, step }];
        let cached = cached.predict_cached(FIRST_EXPERT, &row(), &mut rows).unwrap();
        assert_eq!(values(&plain[0]), values(&cached[0]), "{case} at {timestep}");
    }
    assert_eq!(cache.skipped(), 0);
}

/// Sessions of other seeds, step counts, prompts, thresholds, methods and intervals in shared passes, each deciding for
/// itself.
#[test]
fn sessions_of_a_batch_give_what_lone_ones_give() {
    for case in ["flux-dev", "wan-b", "wan-i2v", "cogvideox-b", "hunyuan-video-a"] {
        let run = runs().into_iter().find(|run| run["checkpoint"] == case && !run["scaled"].is_null());
        let checkpoint = run.map_or_else(|| Checkpoint::plain(case), |run| Checkpoint::of(&run));
        let (card, mut runner) = load(&checkpoint.path, 4);
        let variants: Vec<DiffusionRequest> = (0..6).map(|i| variant(&card, i)).collect();
        let alone: Vec<Answer> =
            variants.iter().map(|request| answers(&mut *runner, std::slice::from_ref(request)).remove(0)).collect();
        for (i, (together, alone)) in answers(&mut *runner, &variants).iter().zip(&alone).enumerate() {
            let found = psnr(&together.pixels, &alone.pixels);
            assert!(found >= MIN_PSNR, "{case}, session {i}: {found:.1} dB against itself alone");
            assert_eq!(together.skipped_passes, alone.skipped_passes, "{case}, session {i}");
            assert_eq!(alone.skipped_passes > 0, variants[i].cache.is_some(), "{case}, session {i}");
        }
    }
}

/// The first three of one method, so that they share passes; then one of each other and one without.
fn variant(card: &DiffusionCard, i: usize) -> DiffusionRequest {
    let options = match i {
        0..=2 => of_method(CacheMethod::MagCache, [0.5, 0.05, 0.3][i]),
        3 => of_method(CacheMethod::TeaCache, 10.0),
        4 => of_method(CacheMethod::FirstBlock, 10.0),
        _ => Options::default(),
    };
    let guided = i % 2 == 1;
    let is_true = card.guidance.kind != tale_models::diffusion::guidance::GuidanceKind::ClassifierFree;
    let scale = if guided { 3.0 } else { 1.0 };
    let options = options
        .with(&PROMPT, format!("A boat and {i} more"))
        .with(&NEGATIVE_PROMPT, guided.then(|| "Rain".to_owned()))
        .with(&TRUE_CFG_SCALE, (is_true && guided).then_some(scale))
        .with(&GUIDANCE_SCALE, (!is_true).then_some(scale))
        .with(&GUIDANCE_INTERVAL, (i == 3).then_some([0.0, 0.5]))
        .with(&SEED, 100 + i as u64)
        .with(&NUM_INFERENCE_STEPS, 6 + i);
    small_request(card, options)
}

/// What is skipped costs no work: with the first-block cache all blocks but one, with the others all of them.
#[test]
fn work_is_what_a_pass_has_done_and_memory_what_the_caches_keep() {
    for (method, copies) in [("first_block", 3), ("magcache", 2), ("teacache", 4)] {
        let of_method = |run: &&Value| run["checkpoint"] == "flux-dev" && run["cache_method"] == method;
        let run = &runs().iter().find(of_method).unwrap().clone();
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
        let pattern = &patterns(run)[0];
        let (whole, skipped) = (works[0], works[pattern.find('-').unwrap()]);
        let most = if method == "first_block" { 0.6 } else { 0.2 };
        assert!(skipped.flops < most * whole.flops && skipped.bytes < 0.6 * whole.bytes, "{skipped:?} of {whole:?}");
        for (step, (work, pass)) in works.iter().zip(pattern.chars()).enumerate() {
            assert_eq!(*work, if pass == 'x' { whole } else { skipped }, "{method}: step {step} of {pattern}");
        }
        let plain = DiffusionRequest { cache: None, ..request.clone() };
        let bytes = |request: DiffusionRequest| {
            let plan = runner.plan(&Request::Diffusion(request));
            plan.phases().iter().find(|phase| phase.phase == Phase::Denoise).unwrap().bytes
        };
        // Vectors of 36 values for each of 4 x 3 tokens.
        assert_eq!(bytes(request) - bytes(plain), copies * 36 * 12 * 4, "{method}");
    }
}

/// Words are for published checkpoints; SDXL has no blocks to skip.
#[test]
fn what_no_figure_supports_is_refused() {
    for (case, reason) in [
        ("sdxl-a", "can skip no blocks"),
        ("flux-dev", "nothing is published"),
        ("wan-a", "nothing is published"),
        ("wan-flf2v", "nothing is published"),
        ("cogvideox-1.5-i2v", "nothing is published"),
        ("hunyuan-video-a", "nothing is published"),
    ] {
        let (card, _) = load(&case_dir(case).join("checkpoint"), 1);
        let options = card.plainest().with(&PROMPT, "x".to_owned()).with(&ACCELERATION, Acceleration::Safe);
        let refused = card.resolve(&options, 0).unwrap_err().to_string();
        assert!(refused.starts_with("acceleration: ") && refused.contains(reason), "{case}: {refused}");
        assert!(refused.contains("allowed: none"), "{case}: {refused}");
    }
}

/// All branches of a session turn by one table, which its steps only read.
#[test]
fn rotations_are_made_once_for_a_session() {
    let guided = |card: &DiffusionCard, scale| {
        let options = Options::default().with(&NEGATIVE_PROMPT, "Rain".to_owned());
        small_request(card, options.with(scale, 3.0))
    };
    let model = wan(&case_dir("wan-b").join("checkpoint"));
    let branches = conditioning(&model, &guided(model.card(), &GUIDANCE_SCALE));
    assert!(std::sync::Arc::ptr_eq(&branches[0].rope, &branches[1].rope));
    let model = cogvideox(&case_dir("cogvideox-b").join("checkpoint"));
    let branches = conditioning(&model, &guided(model.card(), &GUIDANCE_SCALE));
    let tables: Vec<_> = branches.iter().map(|branch| branch.rotations.as_ref().expect("turned")).collect();
    assert!(std::sync::Arc::ptr_eq(tables[0], tables[1]));
    let model = hunyuan_video(&case_dir("hunyuan-video-a").join("checkpoint"));
    let branches = conditioning(&model, &guided(model.card(), &TRUE_CFG_SCALE));
    assert!(std::sync::Arc::ptr_eq(&branches[0].rotations, &branches[1].rotations));
}

const METHODS: [CacheMethod; 3] = [CacheMethod::FirstBlock, CacheMethod::MagCache, CacheMethod::TeaCache];

/// With what it needs beside a threshold.
fn of_method(method: CacheMethod, threshold: f64) -> Options {
    Options::default()
        .with(&CACHE_METHOD, method)
        .with(&CACHE_THRESHOLD, threshold)
        .with(&CACHE_RATIOS, (method == CacheMethod::MagCache).then(|| vec![1.0, 1.02, 0.97]))
        .with(&CACHE_COEFFICIENTS, (method == CacheMethod::TeaCache).then(|| vec![1.0, 0.01]))
}

fn runs() -> Vec<Value> {
    golden_json("caches")["runs"].as_array().unwrap().clone()
}

/// Of the positive branch, then the negative one.
fn patterns(run: &Value) -> Vec<String> {
    let branches = ["cond", "uncond"].iter().filter_map(|branch| run["skips"][*branch].as_str());
    branches.map(str::to_owned).collect()
}

fn request(run: &Value, card: &DiffusionCard) -> DiffusionRequest {
    let size = |field: &str| run[field].as_u64().map(|value| value as usize);
    let numbers = |field: &str| {
        run[field].as_array().map(|values| values.iter().map(|value| value.as_f64().unwrap()).collect::<Vec<f64>>())
    };
    let interval = |field: &str| numbers(field).map(|values| [values[0], values[1]]);
    let method = CacheMethod::from_value(&Given::Text(run["cache_method"].as_str().unwrap().to_owned()));
    let options = Options::default()
        .with(&PROMPT, run["prompt"].as_str().unwrap().to_owned())
        .with(&NEGATIVE_PROMPT, run["negative_prompt"].as_str().map(str::to_owned))
        .with(&WIDTH, size("width"))
        .with(&HEIGHT, size("height"))
        .with(&NUM_FRAMES, size("num_frames"))
        .with(&NUM_INFERENCE_STEPS, size("steps"))
        .with(&GUIDANCE_SCALE, run["guidance_scale"].as_f64())
        .with(&TRUE_CFG_SCALE, run["true_cfg_scale"].as_f64())
        .with(&GUIDANCE_INTERVAL, interval("guidance_interval"))
        .with(&CACHE_METHOD, method)
        .with(&CACHE_THRESHOLD, run["cache_threshold"].as_f64())
        .with(&CACHE_MAX_SKIPS, size("cache_max_skips"))
        .with(&CACHE_INTERVAL, interval("cache_interval"))
        .with(&CACHE_RATIOS, numbers("cache_ratios"))
        .with(&CACHE_COEFFICIENTS, numbers("cache_coefficients"))
        .with(&SEED, run["seed"].as_u64())
        .with(&MAX_SEQUENCE_LENGTH, size("max_sequence_length"));
    card.resolve(&options, 0).unwrap()
}

/// The plainest of a model at a small size, with these options.
fn small_request(card: &DiffusionCard, options: Options) -> DiffusionRequest {
    let num_frames = card.canvas.frames.map(|frames| frames.multiple + 1);
    let options = options.with(&WIDTH, 64).with(&HEIGHT, 32).with(&NUM_FRAMES, num_frames);
    card.resolve(&options.or(card.plainest()), 0).unwrap()
}

/// A committed checkpoint, or a copy of it with some tensors of the transformer scaled.
struct Checkpoint {
    path: PathBuf,
    _dir: Option<TempDir>,
}

impl Checkpoint {
    fn plain(case: &str) -> Self {
        Self { path: case_dir(case).join("checkpoint"), _dir: None }
    }

    fn of(run: &Value) -> Self {
        let plain = Self::plain(run["checkpoint"].as_str().unwrap());
        let Some(scaled) = run["scaled"].as_object() else { return plain };
        let dir = tempfile::tempdir().unwrap();
        copy_folder(&plain.path, dir.path());
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

/// The model of a family in a folder.
macro_rules! loader {
    ($name:ident, $model:ty) => {
        fn $name(checkpoint: &Path) -> $model {
            let (manifest, placement) = (Manifest::read(checkpoint).unwrap(), placement());
            <$model>::load(&manifest, &placement, &mut |component| manifest.component(component)?.weights(&placement))
                .unwrap()
        }
    };
}

loader!(flux, FluxModel);
loader!(wan, WanModel);
loader!(cogvideox, CogVideoXModel);
loader!(hunyuan_video, HunyuanVideoModel);

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
