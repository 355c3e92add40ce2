//! Wan2.1 text-to-video and its solver, stage by stage.

use std::path::Path;
use tale_models::diffusion::parameters::{
    GUIDANCE_SCALE, HEIGHT, MAX_SEQUENCE_LENGTH, NEGATIVE_PROMPT, NUM_FRAMES, NUM_INFERENCE_STEPS, PROMPT, SEED, WIDTH,
};
use tale_models::parameter::Options;

use candle_core::Tensor;

use tale_models::checkpoint::Manifest;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::DiffusionCard;
use tale_models::diffusion::DiffusionRequest;
use tale_models::families::wan::WanModel;
use tale_models::families::wan::pipeline::{WanEncoded, WanInput};
use tale_models::request::{Event, Events, Phase, Request, SessionId};
use tale_models::rng::TorchGenerator;
use tale_models::runner::diffusion::{DiffusionModel, DiffusionRunner};
use tale_models::runner::{Runner, RunnerStatus};
use tale_models::solver::Solver;
use tale_models::solver::config::SchedulerConfig;
use tale_models::solver::flow_match_euler::{FlowMatchEuler, FlowMatchEulerConfig};
use tale_models::solver::unipc::{UniPc, UniPcConfig};

use crate::clips::{check_denoising, check_frames, check_tensors, check_together, decode, row};
use crate::support::{assert_close, case_dir, conditioning, encode, golden_json, golden_tensors};

/// Coefficients are f64 here and f32 in the reference, whose third-order terms cancel to a few digits over 50 steps.
const THIRD_ORDER_TOLERANCE: f64 = 5e-5;

#[test]
fn unipc_takes_the_steps_of_the_reference() {
    let golden = golden_json("solvers");
    let tensors = golden_tensors("solvers");
    let mut checked = 0;
    for case in golden["cases"].as_array().unwrap() {
        if case["class"] != "UniPCMultistepScheduler" {
            continue;
        }
        let file = case["config"].to_string().into_bytes();
        let file = SchedulerConfig::parse(Path::new("scheduler_config.json"), file).unwrap();
        let num_steps = case["num_inference_steps"].as_u64().unwrap() as usize;
        let mut solver = UniPc::new(&UniPcConfig::new(&file).unwrap(), num_steps);
        let tolerance = if case["config"]["solver_order"] == 3 { THIRD_ORDER_TOLERANCE } else { 1e-5 };
        let name = case["name"].as_str().unwrap();
        let tensor = |what: &str| &tensors[&format!("{name}.{what}")];

        assert_close(&format!("{name} timesteps"), &row(solver.timesteps()), tensor("timesteps"), 0.0);
        assert_close(&format!("{name} sigmas"), &row(solver.sigmas()), tensor("sigmas"), 1e-7);
        let mut sample = tensor("sample").clone();
        let mut generator = TorchGenerator::new(0);
        // With `bh1` the reference ends in NaN (infinity times zero), so that its last step is not recorded.
        for step in 0..tensor("samples").dim(0).unwrap() {
            sample = solver.step(step, &tensor("outputs").get(step).unwrap(), &sample, &mut generator).unwrap();
            assert_close(&format!("{name} step {step}"), &sample, &tensor("samples").get(step).unwrap(), tolerance);
        }
        checked += 1;
    }
    assert!(checked > 0, "the golden has cases of this solver");
}

/// A Wan checkpoint with this scheduler starts from the scheduler's own sigmas; FLUX.1 gives them.
#[test]
fn flow_match_euler_starts_from_its_own_sigmas() {
    let (golden, tensors) = (golden_json("solvers"), golden_tensors("solvers"));
    let cases = golden["cases"].as_array().unwrap().iter();
    let cases = cases.filter(|case| case["class"] == "FlowMatchEulerDiscreteScheduler" && case["sigmas_arg"].is_null());
    let mut checked = 0;
    for case in cases {
        let file = case["config"].to_string().into_bytes();
        let file = SchedulerConfig::parse(Path::new("scheduler_config.json"), file).unwrap();
        let config = FlowMatchEulerConfig::new(&file).unwrap();
        let num_steps = case["num_inference_steps"].as_u64().unwrap() as usize;
        let solver = FlowMatchEuler::new(&config, &config.own_sigmas(num_steps), 0.0);
        let name = case["name"].as_str().unwrap();
        let sigmas: Vec<f64> = solver.sigmas().iter().map(|sigma| f64::from(*sigma)).collect();
        assert_close(&format!("{name} sigmas"), &row(&sigmas), &tensors[&format!("{name}.sigmas")], 1e-6);
        let timesteps = row(solver.timesteps());
        assert_close(&format!("{name} timesteps"), &timesteps, &tensors[&format!("{name}.timesteps")], 1e-6);
        checked += 1;
    }
    assert!(checked > 0, "the golden has cases of this scheduler without given sigmas");
}

/// The two checkpoints differ in widths, depths, in which VAE levels double frames, and in how they are laid out.
const CASES: [&str; 2] = ["wan-a", "wan-b"];

#[test]
fn every_stage_is_that_of_the_reference() {
    for case in CASES {
        let (model, tensors) = (open_model(case), golden_tensors(case));
        for (run, request) in requests(case, model.card()) {
            let tensor = |what: &str| &tensors[&format!("run{run}.{what}")];
            let close = |what: &str, found: &Tensor, tolerance: f64| {
                assert_close(&format!("{case} run {run} {what}"), found, tensor(what), tolerance);
            };
            let branches = conditioning(&model, &request);
            close("prompt_embeds", &branches[0].text, 1e-4);
            assert_eq!(branches.len(), 1 + usize::from(request.guidance.negative_prompt.is_some()));
            if let Some(negative) = branches.get(1) {
                close("negative_prompt_embeds", &negative.text, 1e-4);
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
fn clips_made_together_are_those_made_alone() {
    for case in CASES {
        let model = open_model(case);
        let (_, first) = requests(case, model.card()).remove(0);
        let mut second = first.with_seed(3);
        second.prompt.text = "Another prompt altogether".into();
        check_together(case, model, [first, second]);
    }
}

#[test]
fn a_clip_cancelled_while_it_is_decoded_leaves_nothing() {
    let model = open_model("wan-a");
    let (_, request) = requests("wan-a", model.card()).remove(0);
    let mut runner = DiffusionRunner::new(model, 4);
    let id = SessionId(1);
    runner.submit(id, Request::Diffusion(request)).unwrap();
    let mut events = Events::default();
    let mut chunks = 0;
    while chunks < 2 {
        runner.step(&mut events).unwrap();
        chunks += events.drain().filter(|(_, event)| matches!(event, Event::Frames(_))).count();
    }
    assert_eq!(runner.next().unwrap().phase, Phase::VaeDecode, "a third chunk is to come");
    runner.cancel(id);
    assert_eq!(runner.status(), RunnerStatus::default());
    assert!(runner.next().is_none());
}

#[test]
fn every_tensor_of_a_checkpoint_is_known() {
    for case in CASES {
        check_tensors(case, "wan", 3);
    }
}

#[test]
fn checkpoints_of_other_pipelines_are_refused_by_name() {
    let refused = |file: &str, field: &str, value: serde_json::Value| {
        let copy = copy_of_configs("wan-b");
        let path = copy.path().join(file);
        let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        json[field] = value;
        std::fs::write(&path, json.to_string()).unwrap();
        let error = try_open(copy.path()).err().unwrap_or_else(|| panic!("{file} with {field} is refused"));
        let message = error.to_string();
        assert!(message.contains(field) && message.contains(file), "{file} {field}: {message}");
    };
    refused("model_index.json", "boundary_ratio", 0.9.into());
    refused("model_index.json", "transformer_2", serde_json::json!(["diffusers", "WanTransformer3DModel"]));
    refused("model_index.json", "expand_timesteps", true.into());
    refused("transformer/config.json", "image_dim", 1280.into());
    refused("transformer/config.json", "added_kv_proj_dim", 5120.into());
    refused("transformer/config.json", "in_channels", 36.into());
    refused("transformer/config.json", "pos_embed_seq_len", 514.into());
    refused("transformer/config.json", "qk_norm", serde_json::Value::Null);
    refused("vae/config.json", "is_residual", true.into());
    refused("vae/config.json", "patch_size", 2.into());
    refused("vae/config.json", "scale_factor_spatial", 16.into());
    refused("scheduler/scheduler_config.json", "prediction_type", "epsilon".into());
}

pub fn try_open(dir: &Path) -> tale_models::Result<WanModel> {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto)?;
    let manifest = Manifest::read(dir)?;
    WanModel::load(&manifest, &placement, &mut |component| manifest.component(component)?.weights(&placement))
}

pub fn open_model(case: &str) -> WanModel {
    try_open(&case_dir(case).join("checkpoint")).unwrap_or_else(|e| panic!("{case}: {e}"))
}

/// A checkpoint of configurations and a tokenizer, without weights.
fn copy_of_configs(case: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a temporary folder");
    let checkpoint = case_dir(case).join("checkpoint");
    for folder in ["", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"] {
        std::fs::create_dir_all(copy.path().join(folder)).expect("a folder");
        for entry in std::fs::read_dir(checkpoint.join(folder)).expect("the component").flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "json") {
                std::fs::copy(entry.path(), copy.path().join(folder).join(entry.file_name())).expect("a copy");
            }
        }
    }
    copy
}

/// The runs of a case, through the card as a client's would go.
pub fn requests(case: &str, card: &DiffusionCard) -> Vec<(usize, DiffusionRequest)> {
    let golden = golden_json(case);
    let request = |run: &serde_json::Value| {
        let number = |field: &str| run[field].as_u64().map(|value| value as usize);
        let options = Options::default()
            .with(&PROMPT, run["prompt"].as_str().expect("a prompt").to_owned())
            .with(&NEGATIVE_PROMPT, run["negative_prompt"].as_str().map(str::to_owned))
            .with(&WIDTH, number("width"))
            .with(&HEIGHT, number("height"))
            .with(&NUM_FRAMES, number("num_frames"))
            .with(&NUM_INFERENCE_STEPS, number("num_inference_steps"))
            .with(&GUIDANCE_SCALE, run["guidance_scale"].as_f64())
            .with(&SEED, run["seed"].as_u64())
            .with(&MAX_SEQUENCE_LENGTH, number("max_sequence_length"));
        card.resolve(&options, 0).expect("a valid request")
    };
    golden["runs"].as_array().expect("runs").iter().map(request).enumerate().collect()
}

/// Prompts of several sessions go through the encoder as rows of one pass, cut to their own lengths.
#[test]
fn prompts_encoded_together_have_the_bits_of_lone_ones() {
    for case in ["wan-a", "wan-b"] {
        let model = open_model(case);
        let request = model.card().resolve(&Options::default(), 0).unwrap();
        let prompts = ["A boat", "", "Seven ships in a harbour under the evening sun", "A boat"];
        let prompts = prompts.map(|prompt| WanInput::Text(prompt.to_owned()));
        let pass = &model.inputs(&request)[0].pass;
        let together = encode(&model, pass, &prompts.each_ref());
        for (prompt, together) in prompts.iter().zip(&together) {
            let alone = encode(&model, pass, &[prompt]);
            assert_close(&format!("{prompt:?}"), of_text(together), of_text(&alone[0]), 0.0);
        }
    }
}

fn of_text(encoded: &WanEncoded) -> &Tensor {
    let WanEncoded::Text(text) = encoded else { panic!("a text: {encoded:?}") };
    text
}
