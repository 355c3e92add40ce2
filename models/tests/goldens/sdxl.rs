//! SDXL, stage by stage and as a whole.

use std::collections::HashMap;
use tale_models::diffusion::parameters::{
    GUIDANCE_SCALE, HEIGHT, MAX_SEQUENCE_LENGTH, NEGATIVE_PROMPT, NUM_INFERENCE_STEPS, PROMPT, SEED, WIDTH,
};
use tale_models::parameter::Options;

use candle_core::{Device, Tensor};
use serde_json::json;
use tale_models::ModelCard;

use tale_models::checkpoint::Manifest;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::DiffusionCard;
use tale_models::diffusion::DiffusionRequest;
use tale_models::families::sdxl::SdxlModel;
use tale_models::families::sdxl::pipeline::{SdxlConditioning, SdxlEncoded, SdxlInput};
use tale_models::family::LoadOptions;
use tale_models::request::Frame;
use tale_models::rng::TorchGenerator;
use tale_models::runner::Runner;
use tale_models::runner::diffusion::course::FIRST_EXPERT;
use tale_models::runner::diffusion::{DenoiseRow, DiffusionModel};
use tale_models::vae::kl::{KlConfig, KlDecoder};
use tale_models::weights::Weights;

use crate::support::{
    assert_close, case_dir, conditioning, copy_folder, encode, golden_json, golden_tensors, pictures, psnr,
};

const CASES: [&str; 2] = ["sdxl-a", "sdxl-b"];
/// f32 on both sides, other orders of summation.
const TOLERANCE: f64 = 1e-4;
const TEXT_TOLERANCE: f64 = 1e-5;
const MIN_PSNR: f64 = 50.0;

#[test]
fn every_stage_is_the_reference_one() {
    for case in CASES {
        let (model, tensors) = (open_model(case), golden_tensors(case));
        for (run, request) in requests(case, model.card()).into_iter().enumerate() {
            let golden = Golden { name: format!("{case} run {run}"), run, tensors: &tensors };
            let branches = conditioning(&model, &request);
            golden.check("prompt_embeds", &branches[0].text.prompt_embeds, TEXT_TOLERANCE);
            golden.check("pooled_prompt_embeds", &branches[0].text.pooled_prompt_embeds, TEXT_TOLERANCE);
            assert_eq!(branches.len(), if request.guidance.guidance_scale > 1.0 { 2 } else { 1 });
            if let Some(negative) = branches.get(1) {
                golden.check("negative_prompt_embeds", &negative.text.prompt_embeds, TEXT_TOLERANCE);
                golden.check("negative_pooled_prompt_embeds", &negative.text.pooled_prompt_embeds, TEXT_TOLERANCE);
            }
            let noise = model.initial_latents(&request, &mut TorchGenerator::new(request.sampling.seed)).unwrap();
            golden.check("noise", &noise, 1e-6);
            check_denoising(&model, &golden, &request, &branches);
            check_pixels(&model, &golden, &request);
        }
    }
}

/// Each step from what the reference had before it, so that errors do not add up.
fn check_denoising(model: &SdxlModel, golden: &Golden<'_>, request: &DiffusionRequest, branches: &[SdxlConditioning]) {
    let mut solver = model.course(request).unwrap().solver;
    let mut generator = TorchGenerator::new(request.sampling.seed);
    golden.check("timesteps", &row(solver.timesteps()), 1e-7);
    let mut latents = (golden.get("noise") * solver.init_noise_sigma()).unwrap();
    for step in 0..request.sampling.num_inference_steps {
        let input = solver.scale_model_input(step, &latents).unwrap();
        let timestep = solver.timesteps()[step];
        let row = |conditioning| DenoiseRow { latents: &input, timestep, conditioning, request };
        let predictions = model.predict(FIRST_EXPERT, &branches.iter().map(row).collect::<Vec<_>>()).unwrap();
        if step == 0 {
            golden.check("prediction0", &predictions[0], TOLERANCE);
        }
        let prediction = match &predictions[..] {
            [positive, negative] => {
                (negative + ((positive - negative).unwrap() * request.guidance.guidance_scale).unwrap()).unwrap()
            }
            _ => predictions[0].clone(),
        };
        let found = solver.step(step, &prediction, &latents, &mut generator).unwrap();
        golden.check(&format!("latents{step}"), &found, TOLERANCE);
        latents = golden.get(&format!("latents{step}")).clone();
    }
}

fn check_pixels(model: &SdxlModel, golden: &Golden<'_>, request: &DiffusionRequest) {
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
            println!("{}: {found:.1} dB", golden.name);
            assert!(found >= MIN_PSNR, "{}: {found:.1} dB", golden.name);
        }
    }
}

/// Sessions of other seeds, step counts, prompts, negative prompts and guidance scales in shared forward passes.
#[test]
fn batched_sessions_give_the_pictures_of_lone_ones() {
    for case in CASES {
        let (card, mut runner) = load_runner(case, 3);
        let variants: Vec<DiffusionRequest> = (0..4)
            .map(|i| {
                let options = Options::default()
                    .with(&PROMPT, format!("A boat {i}"))
                    .with(
                        &NEGATIVE_PROMPT,
                        [None, Some(String::new()), Some("rain".to_owned())].get(i).cloned().flatten(),
                    )
                    .with(&WIDTH, 72)
                    .with(&HEIGHT, 40)
                    .with(&NUM_INFERENCE_STEPS, 2 + i)
                    .with(&GUIDANCE_SCALE, if i == 3 { 1.0 } else { 2.0 + i as f64 });
                card.resolve(&options, 100 + i as u64).unwrap()
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

#[test]
fn no_negative_prompt_is_not_the_empty_one_where_the_checkpoint_says_zeros() {
    let picture = |case: &str, negative_prompt: Option<&str>| {
        let (card, mut runner) = load_runner(case, 4);
        let options = Options::default()
            .with(&PROMPT, "A boat".to_owned())
            .with(&NEGATIVE_PROMPT, negative_prompt.map(str::to_owned))
            .with(&WIDTH, 64)
            .with(&HEIGHT, 64)
            .with(&NUM_INFERENCE_STEPS, 2);
        pictures(&mut *runner, &[card.resolve(&options, 1).unwrap()]).remove(0).rgb
    };
    assert!(psnr(&picture("sdxl-a", None), &picture("sdxl-a", Some(""))) < 45.0);
    assert_eq!(picture("sdxl-b", None), picture("sdxl-b", Some("")));
}

#[test]
fn card_carries_the_pipelines_defaults_and_limits() {
    let a = open_model("sdxl-a").card().clone();
    assert_eq!((a.canvas.default_width, a.sampling.default_steps, a.guidance.default_scale), (128, 50, 5.0));
    assert_eq!((a.canvas.size_multiple, a.prompts.default_length(), a.prompts.max_length()), (8, 77, 4 * 77));
    // Three levels of the VAE, 12 latents to a side.
    let b = open_model("sdxl-b").card().clone();
    assert_eq!((b.canvas.default_width, b.canvas.size_multiple), (48, 4));
}

/// f16 cannot hold what the published VAE computes: with `force_upcast` it computes in f32 beside an f16 UNet.
#[test]
fn the_vae_does_not_compute_in_f16_where_that_overflows() {
    let folder = case_dir("sdxl-b").join("checkpoint/vae");
    let config: KlConfig = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let decode = |placement: &Placement| {
        let weights = Weights::open(&folder, placement).unwrap();
        let latents = Tensor::from_vec(TorchGenerator::new(3).randn(4 * 6 * 4), (1, 4, 6, 4), &Device::Cpu).unwrap();
        KlDecoder::load(&weights, &config).unwrap().decode(&latents).unwrap()
    };
    let half = Placement::in_host_memory(DeviceSpec::Cuda(0), WeightDtype::F16);
    let single = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    assert_close("pixels", &decode(&half), &decode(&single), 0.0);
}

#[test]
fn parts_that_do_not_fit_are_refused_by_name() {
    for (file, field, value, expected) in [
        ("unet/config.json", "cross_attention_dim", json!(99), "cross_attention_dim is 99"),
        ("unet/config.json", "in_channels", json!(9), "in_channels is 9"),
        ("unet/config.json", "projection_class_embeddings_input_dim", json!(80), "projection_dim (20)"),
        ("unet/config.json", "class_embed_type", json!("timestep"), "class_embed_type"),
        ("vae/config.json", "latents_mean", json!([1.0]), "latents_mean"),
        ("text_encoder_2/config.json", "hidden_act", json!("relu"), "relu"),
        ("text_encoder/config.json", "num_hidden_layers", json!(0), "num_hidden_layers"),
        ("model_index.json", "scheduler", json!(["diffusers", "KarrasVeScheduler"]), "KarrasVeScheduler"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        copy_folder(&case_dir("sdxl-b").join("checkpoint"), dir.path());
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

    fn image(&self) -> Vec<u8> {
        self.get("image").flatten_all().unwrap().to_vec1().unwrap()
    }
}

pub fn open_model(case: &str) -> SdxlModel {
    let manifest = Manifest::read(&case_dir(case).join("checkpoint")).unwrap();
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    SdxlModel::load(&manifest, &placement, &mut |component| manifest.component(component)?.weights(&placement)).unwrap()
}

pub fn load_runner(case: &str, max_denoise_rows: usize) -> (DiffusionCard, Box<dyn Runner>) {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let options = LoadOptions { max_denoise_rows, ..Default::default() };
    let loaded = tale_models::load(&case_dir(case).join("checkpoint"), &placement, &options, &mut |_| ()).unwrap();
    let ModelCard::Diffusion(card) = loaded.card else { panic!("{case} makes pictures") };
    (card, loaded.runner)
}

/// The runs of a case as the server would resolve them.
pub fn requests(case: &str, card: &DiffusionCard) -> Vec<DiffusionRequest> {
    let golden = golden_json(case);
    let size = |value: &serde_json::Value| value.as_u64().map(|value| value as usize);
    let request = |run: &serde_json::Value| {
        let options = Options::default()
            .with(&PROMPT, run["prompt"].as_str().unwrap().to_owned())
            .with(&NEGATIVE_PROMPT, run["negative_prompt"].as_str().map(str::to_owned))
            .with(&WIDTH, size(&run["width"]))
            .with(&HEIGHT, size(&run["height"]))
            .with(&NUM_INFERENCE_STEPS, size(&run["num_inference_steps"]))
            .with(&GUIDANCE_SCALE, run["guidance_scale"].as_f64())
            .with(&SEED, run["seed"].as_u64())
            .with(&MAX_SEQUENCE_LENGTH, card.prompts.default_length());
        card.resolve(&options, 0).unwrap()
    };
    golden["runs"].as_array().unwrap().iter().map(request).collect()
}

fn row(values: &[f64]) -> Tensor {
    let values: Vec<f32> = values.iter().map(|value| *value as f32).collect();
    Tensor::new(values, &Device::Cpu).unwrap()
}

/// Prompts of several sessions go through the encoders as rows of one pass.
#[test]
fn prompts_encoded_together_have_the_bits_of_lone_ones() {
    for case in CASES {
        let model = open_model(case);
        let request = model.card().resolve(&Options::default(), 0).unwrap();
        let prompts = ["A boat", "", "Seven ships in a harbour under the evening sun", "A boat"];
        let inputs = prompts.map(|prompt| SdxlInput::Text(FIRST_EXPERT, prompt.to_owned()));
        let pass = &model.inputs(&request)[0].pass;
        let together = encode(&model, pass, &inputs.each_ref());
        for ((prompt, input), together) in prompts.iter().zip(&inputs).zip(&together) {
            let alone = encode(&model, pass, &[input]).remove(0);
            let (SdxlEncoded::Text(_, together), SdxlEncoded::Text(_, alone)) = (together, &alone) else {
                panic!("texts")
            };
            assert_close(prompt, &together.prompt_embeds, &alone.prompt_embeds, 0.0);
            assert_close(prompt, &together.pooled_prompt_embeds, &alone.pooled_prompt_embeds, 0.0);
        }
    }
}
