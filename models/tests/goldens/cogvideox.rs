//! CogVideoX text-to-video and its solvers, stage by stage.

use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::json;
use tale_models::Error;
use tale_models::checkpoint::Manifest;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::parameters::{
    GUIDANCE_SCALE, HEIGHT, MAX_SEQUENCE_LENGTH, NEGATIVE_PROMPT, NUM_FRAMES, NUM_INFERENCE_STEPS, PROMPT, SCHEDULER,
    SEED, TIMESTEP_SPACING, USE_DYNAMIC_CFG, WIDTH,
};
use tale_models::diffusion::{DiffusionCard, DiffusionRequest};
use tale_models::families::cogvideox::CogVideoXModel;
use tale_models::parameter::Options;
use tale_models::request::Phase;
use tale_models::rng::TorchGenerator;
use tale_models::runner::diffusion::DiffusionModel;
use tale_models::solver::Solver;
use tale_models::solver::cogvideox::{CogVideoXConfig, CogVideoXDdim, CogVideoXDpm};
use tale_models::solver::config::SchedulerConfig;

use crate::clips::{check_cancelled, check_denoising, check_frames, check_tensors, check_together, decode, row};
use crate::support::{assert_close, case_dir, conditioning, copy_folder, golden_json, golden_tensors};

/// f32 on both sides; coefficients are f64 on both.
const SOLVER_TOLERANCE: f64 = 1e-5;

#[test]
fn solvers_take_the_steps_of_the_reference() {
    let (golden, tensors) = (golden_json("cogvideox-solvers"), golden_tensors("cogvideox-solvers"));
    let mut checked = Vec::new();
    for case in golden["cases"].as_array().unwrap() {
        let file = case["config"].to_string().into_bytes();
        let file = SchedulerConfig::parse(Path::new("scheduler_config.json"), file).unwrap();
        let config = CogVideoXConfig::new(&file).unwrap();
        let number = |field: &str| case[field].as_u64().unwrap();
        let (steps, seed) = (number("num_inference_steps") as usize, number("seed"));
        let class = case["class"].as_str().unwrap();
        let mut solver: Box<dyn Solver> = match class {
            "CogVideoXDDIMScheduler" => Box::new(CogVideoXDdim::new(&config, steps)),
            _ => Box::new(CogVideoXDpm::new(&config, steps)),
        };
        let name = format!("{class} {} in {steps}", case["config"]);
        let expected = |what: &str| &tensors[&format!("{}.{what}", case["name"].as_str().unwrap())];
        assert_close(&format!("{name} timesteps"), &row(solver.timesteps()), expected("timesteps"), 0.0);

        let (samples, mut generator) = (expected("samples"), TorchGenerator::new(seed));
        let size = samples.dim(1).unwrap();
        let rows = |values: Vec<f32>| Tensor::from_vec(values, ((), size), &Device::Cpu).unwrap();
        let start = rows(generator.randn(size));
        assert_close(&format!("{name} start"), &start, &samples.narrow(0, 0, 1).unwrap(), 0.0);
        let model = rows(TorchGenerator::new(seed + 1000).randn(steps * size));
        for step in 0..steps {
            let sample = samples.narrow(0, step, 1).unwrap();
            let output = ((&sample * 0.3).unwrap() + model.narrow(0, step, 1).unwrap()).unwrap();
            let next = solver.step(step, &output, &sample, &mut generator).unwrap();
            let expected = samples.narrow(0, step + 1, 1).unwrap();
            assert_close(&format!("{name} step {step}"), &next, &expected, SOLVER_TOLERANCE);
        }
        checked.push(class.to_owned());
    }
    checked.dedup();
    assert_eq!(checked, ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"]);
}

/// The first is made as the 2B model, the second as the 5B model: positions, solvers, biases; they differ in widths, depths
/// and levels, and in how they are laid out.
const CASES: [&str; 2] = ["cogvideox-a", "cogvideox-b"];

#[test]
fn every_stage_is_that_of_the_reference() {
    for case in CASES {
        let (model, tensors) = (open_model(case), golden_tensors(case));
        for (run, request) in requests(case, model.card()) {
            let tensor = |what: &str| &tensors[&format!("run{run}.{what}")];
            let branches = conditioning(&model, &request);
            assert_eq!(branches.len(), 1 + usize::from(request.guidance.negative_prompt.is_some()));
            for (branch, what) in branches.iter().zip(["prompt_embeds", "negative_prompt_embeds"]) {
                assert_close(&format!("{case} run {run} {what}"), &branch.text, tensor(what), 1e-4);
            }
            let latents = check_denoising(&format!("{case} run {run}"), &model, &request, &branches, &tensor);
            assert_eq!(decode(&model, &request, &latents).dims()[0], request.canvas.num_frames);
        }
    }
}

#[test]
fn every_frame_is_that_of_the_reference() {
    for case in CASES {
        let model = open_model(case);
        let requests = requests(case, model.card());
        check_frames(case, model, requests);
    }
}

#[test]
fn videos_made_together_are_those_made_alone() {
    for case in CASES {
        let model = open_model(case);
        let (_, first) = requests(case, model.card()).remove(1);
        let mut second = first.with_seed(3);
        second.prompt.text = "Another prompt altogether".into();
        check_together(case, model, [first, second]);
    }
}

#[test]
fn whatever_is_cancelled_leaves_nothing() {
    for case in CASES {
        let model = open_model(case);
        let (_, request) = requests(case, model.card()).remove(1);
        check_cancelled(case, model, &request, &[Phase::Encode, Phase::Denoise, Phase::VaeDecode]);
    }
}

#[test]
fn every_tensor_of_a_checkpoint_is_known() {
    for case in CASES {
        check_tensors(case, "cogvideox", 3);
    }
}

#[test]
fn what_a_request_may_ask_for_depends_on_the_positions() {
    let (a, b) = (open_model("cogvideox-a"), open_model("cogvideox-b"));
    let defaults = |model: &CogVideoXModel| {
        let request = model.card().resolve(&Options::default(), 0).expect("defaults are valid");
        let canvas = request.canvas;
        (canvas.width, canvas.height, canvas.num_frames, canvas.fps, request.prompt.max_sequence_length)
    };
    assert_eq!(defaults(&a), (80, 48, 9, 8, 24));
    assert_eq!(defaults(&b), (48, 32, 25, 8, 226));
    let refused = |model: &CogVideoXModel, field: &str, options: Options, allowed: &str| {
        let error = model.card().resolve(&options, 0).expect_err(field);
        let Error::InvalidRequest { field: found, problem } = &error else { panic!("{field}: {error}") };
        assert!(found == field && problem.contains(allowed), "{field}: {error}");
    };
    let options = Options::default;
    refused(&a, "max_sequence_length", options().with(&MAX_SEQUENCE_LENGTH, 23), "24 to 24");
    refused(&b, "max_sequence_length", options().with(&MAX_SEQUENCE_LENGTH, 227), "1 to 226");
    refused(&a, "num_frames", options().with(&NUM_FRAMES, 13), "8k+1 from 1 to 161");
    refused(&b, "num_frames", options().with(&NUM_FRAMES, 169), "8k+1 from 1 to 161");
    refused(&a, "width", options().with(&WIDTH, 72), "multiples of 16");
    refused(&b, "height", options().with(&HEIGHT, 36), "multiples of 8");
    refused(&b, "use_dynamic_cfg", options().with(&USE_DYNAMIC_CFG, true).with(&GUIDANCE_SCALE, 1.0), "above 1");
    refused(&b, "scheduler", options().with(&SCHEDULER, "ddim".to_owned()), "cogvideox_ddim, cogvideox_dpm");
    let spaced = options().with(&SCHEDULER, "cogvideox_ddim".to_owned());
    let spaced = spaced.with(&TIMESTEP_SPACING, "leading".parse::<tale_models::solver::names::Spacing>().unwrap());
    assert!(b.card().resolve(&spaced, 0).is_ok());
}

#[test]
fn checkpoints_that_are_not_computed_are_refused_by_name() {
    let refused = |case: &str, file: &str, field: &str, value: serde_json::Value| {
        let copy = tempfile::tempdir().expect("a temporary folder");
        copy_folder(&case_dir(case).join("checkpoint"), copy.path());
        let path = copy.path().join(file);
        let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        json[field] = value;
        std::fs::write(&path, json.to_string()).unwrap();
        let error = try_open(copy.path()).err().unwrap_or_else(|| panic!("{file} with {field} is refused"));
        let message = error.to_string();
        assert!(message.contains(field) && message.contains(file), "{file} {field}: {message}");
    };
    refused("cogvideox-b", "model_index.json", "transformer", json!(["diffusers", "WanTransformer3DModel"]));
    let transformer = "transformer/config.json";
    refused("cogvideox-a", transformer, "use_learned_positional_embeddings", true.into());
    refused("cogvideox-a", transformer, "patch_size_t", 2.into());
    refused("cogvideox-a", transformer, "attention_head_dim", 2.into());
    refused("cogvideox-a", transformer, "temporal_compression_ratio", 8.into());
    refused("cogvideox-b", transformer, "attention_head_dim", 8.into());
    refused("cogvideox-b", transformer, "ofs_embed_dim", 20.into());
    refused("cogvideox-b", transformer, "in_channels", 12.into());
    refused("cogvideox-b", transformer, "flip_sin_to_cos", false.into());
    refused("cogvideox-b", transformer, "activation_fn", "geglu".into());
    refused("cogvideox-b", transformer, "timestep_activation_fn", "gelu".into());
    refused("cogvideox-b", "vae/config.json", "use_post_quant_conv", true.into());
    refused("cogvideox-b", "vae/config.json", "temporal_compression_ratio", 8.into());
    refused("cogvideox-b", "vae/config.json", "norm_num_groups", 2.into());
    refused("cogvideox-b", "vae/config.json", "up_block_types", json!(["CogVideoXUpBlock3D"]));
    refused("cogvideox-b", "scheduler/scheduler_config.json", "prediction_type", "flow_prediction".into());
}

pub fn try_open(dir: &Path) -> tale_models::Result<CogVideoXModel> {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto)?;
    let manifest = Manifest::read(dir)?;
    CogVideoXModel::load(&manifest, &placement, &mut |component| manifest.component(component)?.weights(&placement))
}

pub fn open_model(case: &str) -> CogVideoXModel {
    try_open(&case_dir(case).join("checkpoint")).unwrap_or_else(|e| panic!("{case}: {e}"))
}

/// The runs of a case, through the card as a client's would go.
pub fn requests(case: &str, card: &DiffusionCard) -> Vec<(usize, DiffusionRequest)> {
    let count = golden_json(case)["runs"].as_array().expect("runs").len();
    (0..count).map(|run| (run, card.resolve(&options(case, run), 0).expect("a valid request"))).collect()
}

/// What a run of a case asks for, but for pictures.
pub fn options(case: &str, run: usize) -> Options {
    options_of(&golden_json(case)["runs"][run])
}

/// As [`options`], of a run that any case has.
pub fn options_of(run: &serde_json::Value) -> Options {
    let number = |field: &str| run[field].as_u64().map(|value| value as usize);
    Options::default()
        .with(&PROMPT, run["prompt"].as_str().expect("a prompt").to_owned())
        .with(&NEGATIVE_PROMPT, run["negative_prompt"].as_str().map(str::to_owned))
        .with(&WIDTH, number("width"))
        .with(&HEIGHT, number("height"))
        .with(&NUM_FRAMES, number("num_frames"))
        .with(&NUM_INFERENCE_STEPS, number("num_inference_steps"))
        .with(&GUIDANCE_SCALE, run["guidance_scale"].as_f64())
        .with(&USE_DYNAMIC_CFG, run["use_dynamic_cfg"].as_bool())
        .with(&SEED, run["seed"].as_u64())
        .with(&MAX_SEQUENCE_LENGTH, number("max_sequence_length"))
}
