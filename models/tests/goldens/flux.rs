//! FLUX.1 and its solver, stage by stage.

use std::collections::HashMap;
use tale_models::diffusion::parameters::{
    GUIDANCE_SCALE, HEIGHT, MAX_SEQUENCE_LENGTH, NUM_INFERENCE_STEPS, PROMPT, SEED, WIDTH,
};
use tale_models::parameter::Options;

use candle_core::{Device, Tensor};
use serde_json::json;

use tale_models::checkpoint::Manifest;

use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::DiffusionRequest;
use tale_models::families::flux::pipeline::{FluxEncoded, FluxInput};
use tale_models::families::flux::{FluxConditioning, FluxModel};
use tale_models::family::LoadOptions;
use tale_models::request::{Frame, Phase};
use tale_models::rng::TorchGenerator;
use tale_models::runner::diffusion::course::FIRST_EXPERT;
use tale_models::runner::diffusion::{DenoiseRow, DiffusionModel};
use tale_models::runner::{Runner, RunnerStatus};
use tale_models::solver::Solver;
use tale_models::solver::flow_match_euler::{FlowMatchEuler, FlowMatchEulerConfig, linear_sigmas};
use tale_models::vae::kl::{KlConfig, KlDecoder};
use tale_models::weights::Weights;
use tale_models::{Event, Events, ModelCard, Request, SessionId};

use crate::support::{assert_close, case_dir, conditioning, encode, golden_json, golden_tensors, pictures_and, psnr};

const CASES: [&str; 2] = ["flux-dev", "flux-schnell"];
/// f32 on both sides, other orders of summation.
const TOLERANCE: f64 = 1e-4;
const TEXT_TOLERANCE: f64 = 1e-5;
const MIN_PSNR: f64 = 50.0;

#[test]
fn flow_match_euler_takes_the_steps_of_the_reference() {
    let golden = golden_json("solvers");
    let tensors = golden_tensors("solvers");
    let mut checked = 0;
    for case in golden["cases"].as_array().unwrap() {
        // The pipelines of this class give the sigmas; the scheduler's own are not used.
        if case["class"] != "FlowMatchEulerDiscreteScheduler" || case["sigmas_arg"].is_null() {
            continue;
        }
        let name = case["name"].as_str().unwrap();
        let config: FlowMatchEulerConfig = serde_json::from_value(case["config"].clone()).unwrap();
        let sigmas = linear_sigmas(case["num_inference_steps"].as_u64().unwrap() as usize);
        let recorded: Vec<f64> = serde_json::from_value(case["sigmas_arg"].clone()).unwrap();
        assert_eq!(sigmas.len(), recorded.len(), "{name}");
        // The JSON parser may be one unit in the last place off.
        assert!(sigmas.iter().zip(recorded).all(|(a, b)| (a - b).abs() < 1e-15), "{name}");
        let mut solver = FlowMatchEuler::new(&config, &sigmas, case["mu"].as_f64().unwrap_or(f64::NAN));

        let tensor = |what: &str| &tensors[&format!("{name}.{what}")];
        assert_close(&format!("{name} timesteps"), &row(solver.timesteps()), tensor("timesteps"), 1e-7);
        let found = Tensor::new(solver.sigmas(), &Device::Cpu).unwrap();
        assert_close(&format!("{name} sigmas"), &found, tensor("sigmas"), 1e-7);
        let mut sample = tensor("sample").clone();
        let mut generator = TorchGenerator::new(0);
        for step in 0..solver.timesteps().len() {
            sample = solver.step(step, &tensor("outputs").get(step).unwrap(), &sample, &mut generator).unwrap();
            assert_close(&format!("{name} step {step}"), &sample, &tensor("samples").get(step).unwrap(), 1e-6);
        }
        checked += 1;
    }
    assert!(checked > 0, "the golden has cases of this solver");
}

#[test]
fn every_stage_is_the_reference_one() {
    for case in CASES {
        let model = load_model(case);
        let tensors = golden_tensors(case);
        for (run, request) in requests(case, model.card()).into_iter().enumerate() {
            let golden = Golden { name: format!("{case} run {run}"), run, tensors: &tensors };
            let conditioning = conditioning(&model, &request).remove(0);
            golden.check("pooled_prompt_embeds", &conditioning.pooled_prompt_embeds, TEXT_TOLERANCE);
            golden.check("prompt_embeds", &conditioning.prompt_embeds, TEXT_TOLERANCE);

            let noise = model.initial_latents(&request, &mut TorchGenerator::new(request.sampling.seed)).unwrap();
            golden.check("noise", &noise, 1e-6);
            let solver = model.course(&request).unwrap().solver;
            golden.check("timesteps", &row(solver.timesteps()), 1e-7);

            let prediction = predict_one(&model, &noise, solver.timesteps()[0], &conditioning, &request);
            golden.check("prediction0", &prediction, TOLERANCE);
            check_denoising(&model, &golden, &request);
            check_pixels(&model, &golden, &request);
        }
    }
}

/// Each step from what the reference had before it, so that errors do not add up.
fn check_denoising(model: &FluxModel, golden: &Golden<'_>, request: &DiffusionRequest) {
    let conditioning = golden.conditioning();
    let mut solver = model.course(request).unwrap().solver;
    let mut generator = TorchGenerator::new(request.sampling.seed);
    let mut latents = golden.get("noise").clone();
    for step in 0..request.sampling.num_inference_steps {
        let prediction = predict_one(model, &latents, solver.timesteps()[step], &conditioning, request);
        latents = solver.step(step, &prediction, &latents, &mut generator).unwrap();
        golden.check(&format!("latents{step}"), &latents, TOLERANCE);
        latents = golden.get(&format!("latents{step}")).clone();
    }
}

fn check_pixels(model: &FluxModel, golden: &Golden<'_>, request: &DiffusionRequest) {
    let last = golden.get(&format!("latents{}", request.sampling.num_inference_steps - 1));
    let mut decoding = model.begin_decode(FIRST_EXPERT, last, request).unwrap();
    let pixels = model.decode_next(&mut decoding).unwrap().values;
    assert_eq!(pixels.dims(), [1, 3, request.canvas.height, request.canvas.width]);
    let bytes = ((pixels.clamp(-1f32, 1f32).unwrap() + 1.0).unwrap() * 127.5).unwrap().round().unwrap();
    let bytes: Vec<f32> = bytes.permute((0, 2, 3, 1)).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let bytes: Vec<u8> = bytes.into_iter().map(|value| value as u8).collect();
    let found = psnr(&bytes, &golden.image());
    assert!(found >= MIN_PSNR, "{}: the decoder alone is at {found:.1} dB", golden.name);
}

/// The whole way through the runner, from the request to the bytes.
#[test]
fn pictures_are_the_reference_ones() {
    for case in CASES {
        let (card, mut runner) = load_runner(case, 4);
        let tensors = golden_tensors(case);
        for (run, request) in requests(case, &card).into_iter().enumerate() {
            let golden = Golden { name: format!("{case} run {run}"), run, tensors: &tensors };
            let picture = &pictures(&mut *runner, &[request])[0];
            let found = psnr(&picture.rgb, &golden.image());
            assert!(found >= MIN_PSNR, "{}: {found:.1} dB", golden.name);
        }
    }
}

/// Sessions of other seeds, step counts, prompts and guidance scales, begun at other times, in shared forward passes.
#[test]
fn batched_sessions_give_the_pictures_of_lone_ones() {
    for case in CASES {
        let (card, mut runner) = load_runner(case, 3);
        let first = requests(case, &card).remove(0);
        let variants: Vec<DiffusionRequest> = (0..4)
            .map(|i| {
                let mut variant = first.with_seed(100 + i as u64);
                variant.sampling.num_inference_steps = 2 + i;
                variant.prompt.text = format!("{} {i}", first.prompt.text);
                let is_guided = first.guidance.guidance_scale > 0.0;
                variant.guidance.guidance_scale = if is_guided { 1.0 + i as f64 } else { 0.0 };
                variant
            })
            .collect();
        let alone: Vec<Frame> =
            variants.iter().map(|request| pictures(&mut *runner, std::slice::from_ref(request)).remove(0)).collect();
        let together = pictures(&mut *runner, &variants);
        for (i, (together, alone)) in together.iter().zip(&alone).enumerate() {
            let found = psnr(&together.rgb, &alone.rgb);
            assert!(found >= MIN_PSNR, "{case} session {i}: {found:.1} dB against itself alone");
        }
        assert!(psnr(&alone[0].rgb, &alone[1].rgb) < 35.0, "{case}: the sessions are the same picture");
    }
}

/// Rows of one forward pass do not see each other.
#[test]
fn rows_of_a_batch_predict_what_they_predict_alone() {
    for case in CASES {
        let model = load_model(case);
        let tensors = golden_tensors(case);
        let golden = Golden { name: case.to_owned(), run: 0, tensors: &tensors };
        let request = requests(case, model.card()).remove(0);
        let conditioning = golden.conditioning();
        let latents = [golden.get("noise"), golden.get("latents0"), golden.get("latents1")];
        let timesteps = [1000.0, 613.25, 250.5];
        let rows: Vec<_> = latents
            .iter()
            .zip(timesteps)
            .map(|(latents, timestep)| DenoiseRow { latents, timestep, conditioning: &conditioning, request: &request })
            .collect();
        let batched = model.predict(FIRST_EXPERT, &rows).unwrap();
        for (row, batched) in rows.iter().zip(batched) {
            let alone = predict_one(&model, row.latents, row.timestep, &conditioning, &request);
            assert_close(&format!("{case} at {}", row.timestep), &batched, &alone, 1e-6);
        }
    }
}

#[test]
fn cancel_at_any_step_leaves_nothing() {
    let (card, mut runner) = load_runner("flux-schnell", 4);
    let request = requests("flux-schnell", &card).remove(0);
    for steps in 0..=request.sampling.num_inference_steps + 1 {
        runner.submit(SessionId(1), Request::Diffusion(request.clone())).unwrap();
        for _ in 0..steps {
            runner.step(&mut Events::default()).unwrap();
        }
        assert_eq!(runner.status().running + runner.status().waiting, 1);
        runner.cancel(SessionId(1));
        assert_eq!(runner.status(), RunnerStatus::default());
        assert_eq!(runner.next(), None);
    }
}

#[test]
fn card_carries_the_pipelines_defaults_and_limits() {
    let dev = load_model("flux-dev").card().clone();
    assert_eq!((dev.canvas.default_width, dev.sampling.default_steps, dev.guidance.default_scale), (1024, 28, 3.5));
    assert_eq!((dev.canvas.size_multiple, dev.prompts.max_length()), (16, 512));
    let schnell = load_model("flux-schnell").card().clone();
    // Its VAE has three levels.
    assert_eq!((schnell.canvas.default_width, schnell.sampling.default_steps), (512, 4));
    assert_eq!((schnell.canvas.size_multiple, schnell.prompts.max_length()), (8, 256));
    let guided = Options::default().with(&PROMPT, "a fox".to_owned()).with(&GUIDANCE_SCALE, 2.0);
    assert!(schnell.resolve(&guided, 0).is_err(), "schnell was distilled without guidance");
}

#[test]
fn every_tensor_of_the_checkpoints_is_used() {
    for case in CASES {
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
        let inspection =
            tale_models::loading::inspect(&case_dir(case).join("checkpoint"), &placement, &LoadOptions::default())
                .unwrap();
        assert!(inspection.problem.is_none(), "{case}: {:?}", inspection.problem);
        for (component, report) in inspection.components {
            assert!(report.problems.is_empty(), "{case} {component}: {:?}", report.problems);
            assert_eq!(report.unused, Vec::<String>::new(), "{case} {component}");
        }
    }
}

/// Old checkpoints name the VAE's attention otherwise, and some keep its matrices as convolution kernels.
#[test]
fn old_names_of_the_vae_give_the_same_pixels() {
    let folder = case_dir("flux-dev").join("checkpoint/vae");
    let config: KlConfig = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let file = "diffusion_pytorch_model.safetensors";
    let tensors = candle_core::safetensors::load(folder.join(file), &Device::Cpu).unwrap();
    let names = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")];
    let old: HashMap<String, Tensor> = tensors
        .into_iter()
        .map(|(name, tensor)| {
            let found = names.iter().find(|(new, _)| name.contains(&format!("attentions.0.{new}.")));
            match found {
                Some((new, old)) if name.ends_with("weight") => {
                    let (rows, columns) = tensor.dims2().unwrap();
                    (name.replace(new, old), tensor.reshape((rows, columns, 1, 1)).unwrap())
                }
                Some((new, old)) => (name.replace(new, old), tensor),
                None => (name, tensor),
            }
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    candle_core::safetensors::save(&old, dir.path().join(file)).unwrap();

    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let latents = Tensor::from_vec(TorchGenerator::new(3).randn(16 * 6 * 4), (1, 16, 6, 4), &Device::Cpu).unwrap();
    let decode = |dir: &std::path::Path| {
        KlDecoder::load(&Weights::open(dir, &placement).unwrap(), &config).unwrap().decode(&latents).unwrap()
    };
    assert_close("pixels", &decode(dir.path()), &decode(&folder), 0.0);
}

#[test]
fn parts_that_do_not_fit_are_refused_by_name() {
    for (file, field, value, expected) in [
        ("transformer/config.json", "pooled_projection_dim", json!(99), "pooled_projection_dim is 99"),
        ("transformer/config.json", "joint_attention_dim", json!(99), "joint_attention_dim is 99"),
        ("transformer/config.json", "axes_dims_rope", json!([4, 4, 4]), "axes_dims_rope"),
        ("transformer/config.json", "in_channels", json!(384), "in_channels / 4 is 96"),
        ("transformer/config.json", "out_channels", json!(32), "not text-to-image"),
        ("transformer/config.json", "num_layers", json!(1u64 << 60), "num_layers: is"),
        ("vae/config.json", "act_fn", json!("mish"), "act_fn"),
        ("vae/config.json", "norm_num_groups", json!(7), "norm_num_groups"),
        ("text_encoder/config.json", "num_attention_heads", json!(0), "num_attention_heads: is 0"),
        ("text_encoder/config.json", "hidden_act", json!("relu"), "relu"),
        ("scheduler/scheduler_config.json", "use_karras_sigmas", json!(true), "use_karras_sigmas"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        copy_folder(&case_dir("flux-schnell").join("checkpoint"), dir.path());
        let path = dir.path().join(file);
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config[field] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
        let refused = tale_models::load(dir.path(), &placement, &LoadOptions::default(), &mut |_| ());
        let error = refused.err().expect("the configuration is wrong").to_string();
        assert!(error.contains(expected) && error.contains(".json"), "{file} {field}: {error}");
    }
}

fn copy_folder(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// One run of a case.
struct Golden<'a> {
    name: String,
    run: usize,
    tensors: &'a HashMap<String, Tensor>,
}

impl Golden<'_> {
    fn get(&self, what: &str) -> &Tensor {
        &self.tensors[&format!("run{}.{what}", self.run)]
    }

    fn check(&self, what: &str, found: &Tensor, tolerance: f64) {
        assert_close(&format!("{} {what}", self.name), found, self.get(what), tolerance);
    }

    fn conditioning(&self) -> FluxConditioning {
        FluxConditioning {
            prompt_embeds: self.get("prompt_embeds").clone(),
            pooled_prompt_embeds: self.get("pooled_prompt_embeds").clone(),
        }
    }

    fn image(&self) -> Vec<u8> {
        self.get("image").flatten_all().unwrap().to_vec1().unwrap()
    }
}

fn load_model(case: &str) -> FluxModel {
    let manifest = Manifest::read(&case_dir(case).join("checkpoint")).unwrap();
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    FluxModel::load(&manifest, &placement, &mut |component| manifest.component(component)?.weights(&placement)).unwrap()
}

fn load_runner(case: &str, max_denoise_rows: usize) -> (tale_models::DiffusionCard, Box<dyn Runner>) {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let options = LoadOptions { max_denoise_rows, ..Default::default() };
    let loaded = tale_models::load(&case_dir(case).join("checkpoint"), &placement, &options, &mut |_| ()).unwrap();
    let ModelCard::Diffusion(card) = loaded.card else { panic!("{case} makes pictures") };
    (card, loaded.runner)
}

/// The runs of a case as the server would resolve them.
pub fn requests(case: &str, card: &tale_models::DiffusionCard) -> Vec<DiffusionRequest> {
    let golden = golden_json(case);
    let size = |value: &serde_json::Value| value.as_u64().map(|value| value as usize);
    let request = |run: &serde_json::Value| {
        let options = Options::default()
            .with(&PROMPT, run["prompt"].as_str().unwrap().to_owned())
            .with(&WIDTH, size(&run["width"]))
            .with(&HEIGHT, size(&run["height"]))
            .with(&NUM_INFERENCE_STEPS, size(&run["num_inference_steps"]))
            .with(&GUIDANCE_SCALE, run["guidance_scale"].as_f64())
            .with(&SEED, run["seed"].as_u64())
            .with(&MAX_SEQUENCE_LENGTH, size(&run["max_sequence_length"]));
        card.resolve(&options, 0).unwrap()
    };
    golden["runs"].as_array().unwrap().iter().map(request).collect()
}

fn predict_one(
    model: &FluxModel,
    latents: &Tensor,
    timestep: f64,
    conditioning: &FluxConditioning,
    request: &DiffusionRequest,
) -> Tensor {
    model.predict(FIRST_EXPERT, &[DenoiseRow { latents, timestep, conditioning, request }]).unwrap().remove(0)
}

/// Runs sessions to their end, each submitted one step after the one before, and checks what they tell.
fn pictures(runner: &mut dyn Runner, requests: &[DiffusionRequest]) -> Vec<Frame> {
    pictures_and(runner, requests, |_, id, event| {
        if let Event::Progress { phase: Phase::Denoise, total, .. } = event {
            assert_eq!(total, requests[id.0 as usize].sampling.num_inference_steps);
        }
    })
}

fn row(values: &[f64]) -> Tensor {
    let values: Vec<f32> = values.iter().map(|value| *value as f32).collect();
    Tensor::new(values, &Device::Cpu).unwrap()
}

/// Prompts of several sessions go through the encoders as rows of one pass.
#[test]
fn prompts_encoded_together_have_the_bits_of_lone_ones() {
    for case in ["flux-dev", "flux-schnell"] {
        let model = load_model(case);
        let request = model.card().resolve(&Options::default(), 0).unwrap();
        let prompts = ["A boat", "", "Seven ships in a harbour under the evening sun", "A boat"];
        let inputs = prompts.map(|prompt| FluxInput::Text(prompt.to_owned()));
        let pass = &model.inputs(&request)[0].pass;
        let together = encode(&model, pass, &inputs.each_ref());
        for ((prompt, input), together) in prompts.iter().zip(&inputs).zip(&together) {
            let alone = encode(&model, pass, &[input]).remove(0);
            let (FluxEncoded::Text(together), FluxEncoded::Text(alone)) = (together, &alone) else { panic!("texts") };
            assert_close(prompt, &together.prompt_embeds, &alone.prompt_embeds, 0.0);
            assert_close(prompt, &together.pooled_prompt_embeds, &alone.pooled_prompt_embeds, 0.0);
        }
    }
}
