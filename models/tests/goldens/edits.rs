//! Pictures made from pictures, stage by stage and as a whole, and resizing as PIL does it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use tale_models::diffusion::parameters::{
    GUIDANCE_SCALE, HEIGHT, IMAGE, MASK, MAX_SEQUENCE_LENGTH, NEGATIVE_PROMPT, NUM_INFERENCE_STEPS, PROMPT, SCHEDULER,
    SEED, STRENGTH, WIDTH,
};
use tale_models::parameter::Options;

use candle_core::{DType, Tensor};
use tale_models::ModelCard;

use tale_models::checkpoint::Manifest;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::DiffusionCard;
use tale_models::diffusion::DiffusionRequest;
use tale_models::family::LoadOptions;
use tale_models::request::{Frame, Mask};
use tale_models::resample::Filter;
use tale_models::runner::Runner;
use tale_models::vae::kl::{KlConfig, KlEncoder};

use crate::support::{assert_close, case_dir, golden_json, golden_tensors, pictures, psnr};

/// Of the checkpoints with these names, and one that only edits pictures.
const CASES: [&str; 5] = ["sdxl-a", "sdxl-b", "flux-dev", "flux-schnell", REFINER];
const REFINER: &str = "sdxl-refiner";
/// f32 on both sides, other orders of summation.
const TOLERANCE: f64 = 1e-4;
const MIN_PSNR: f64 = 50.0;

/// One run of a case.
struct Run {
    name: String,
    number: usize,
    facts: serde_json::Value,
    tensors: Arc<HashMap<String, Tensor>>,
}

impl Run {
    fn all(case: &str) -> Vec<Self> {
        let (facts, tensors) = (golden_json(&format!("edits/{case}")), golden_tensors(&format!("edits/{case}")));
        let tensors = Arc::new(tensors);
        let run = |(number, facts): (usize, &serde_json::Value)| Self {
            name: format!("edits {case} run {number}"),
            number,
            facts: facts.clone(),
            tensors: tensors.clone(),
        };
        facts["runs"].as_array().unwrap().iter().enumerate().map(run).collect()
    }

    fn get(&self, what: &str) -> Option<&Tensor> {
        self.tensors.get(&format!("run{}.{what}", self.number))
    }

    fn bytes(&self, what: &str) -> Option<(Vec<usize>, Vec<u8>)> {
        self.get(what).map(bytes)
    }

    fn picture(&self) -> Arc<Frame> {
        Arc::new(frame(self.get("input").unwrap()))
    }

    fn mask(&self) -> Option<Arc<Mask>> {
        self.bytes("mask").map(|(dims, grey)| Arc::new(Mask { width: dims[1], height: dims[0], grey }))
    }

    fn request(&self, card: &DiffusionCard) -> DiffusionRequest {
        let facts = &self.facts;
        let size = |field: &str| facts[field].as_u64().map(|value| value as usize);
        let options = Options::default()
            .with(&PROMPT, facts["prompt"].as_str().unwrap().to_owned())
            .with(&NEGATIVE_PROMPT, facts["negative_prompt"].as_str().map(str::to_owned))
            .with(&WIDTH, size("width"))
            .with(&HEIGHT, size("height"))
            .with(&NUM_INFERENCE_STEPS, size("num_inference_steps"))
            .with(&GUIDANCE_SCALE, facts["guidance_scale"].as_f64())
            .with(&SCHEDULER, facts["scheduler"].as_str().map(str::to_owned))
            .with(&SEED, facts["seed"].as_u64())
            .with(&MAX_SEQUENCE_LENGTH, size("max_sequence_length"))
            .with(&STRENGTH, facts["strength"].as_f64())
            .with(&IMAGE, self.picture())
            .with(&MASK, self.mask());
        card.resolve(&options, 0).unwrap()
    }
}

fn bytes(tensor: &Tensor) -> (Vec<usize>, Vec<u8>) {
    (tensor.dims().to_vec(), tensor.flatten_all().unwrap().to_vec1().unwrap())
}

fn frame(tensor: &Tensor) -> Frame {
    let (dims, rgb) = bytes(tensor);
    Frame { width: dims[1], height: dims[0], rgb }
}

fn checkpoint(case: &str) -> PathBuf {
    let case = if case == REFINER { format!("edits/{case}") } else { case.to_owned() };
    case_dir(&case).join("checkpoint")
}

fn load_runner(case: &str, max_denoise_rows: usize) -> (DiffusionCard, Box<dyn Runner>) {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let options = LoadOptions { max_denoise_rows, ..Default::default() };
    let loaded = tale_models::load(checkpoint(case).as_path(), &placement, &options, &mut |_| ()).unwrap();
    let ModelCard::Diffusion(card) = loaded.card else { panic!("{case} makes pictures") };
    (card, loaded.runner)
}

#[test]
fn the_vae_says_of_a_picture_what_the_reference_says() {
    for case in CASES {
        let (card, _) = load_runner(case, 1);
        let manifest = Manifest::read(&checkpoint(case)).unwrap();
        let component = manifest.component("vae").unwrap();
        let config: KlConfig = component.config().unwrap();
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
        let encoder = KlEncoder::load(&component.weights(&placement).unwrap(), &config).unwrap();
        for run in Run::all(case) {
            let edit = run.request(&card).edit.unwrap();
            let posterior = encoder.encode_next(&mut encoder.begin(edit.image, false)).unwrap().unwrap();
            assert_close(&format!("{} mean", run.name), &posterior.mean, run.get("mean").unwrap(), TOLERANCE);
            assert_close(&format!("{} deviation", run.name), &posterior.std, run.get("std").unwrap(), TOLERANCE);
        }
    }
}

#[test]
fn edits_are_the_reference_ones() {
    for case in CASES {
        let (card, mut runner) = load_runner(case, 4);
        for run in Run::all(case) {
            let request = run.request(&card);
            let picture = &pictures(&mut *runner, &[request])[0];
            let (dims, expected) = run.bytes("image").unwrap();
            assert_eq!([picture.height, picture.width, 3], dims[..], "{}", run.name);
            let found = psnr(&picture.rgb, &expected);
            println!("{}: {found:.1} dB", run.name);
            assert!(found >= MIN_PSNR, "{}: {found:.1} dB", run.name);
        }
    }
}

/// Pictures from noise, from a picture and from a part of one, in shared forward passes.
#[test]
fn edits_in_a_batch_are_those_made_alone() {
    for case in ["sdxl-a", "flux-dev", REFINER] {
        let (card, mut runner) = load_runner(case, 6);
        let has_picture = |i| i > 0 || case == REFINER;
        let (picture, side) = (Run::all(case)[0].picture(), Some(48));
        let mask = Mask {
            width: picture.width,
            height: picture.height,
            grey: (0..picture.width * picture.height).map(|i| if i % picture.width < 30 { 255 } else { 0 }).collect(),
        };
        let mask = Arc::new(mask);
        let variants: Vec<DiffusionRequest> = (0..4)
            .map(|i| {
                let options = Options::default()
                    .with(&PROMPT, "A boat".to_owned())
                    .with(&WIDTH, side)
                    .with(&HEIGHT, side)
                    .with(&NUM_INFERENCE_STEPS, 3 + i)
                    .with(&GUIDANCE_SCALE, 3.0)
                    .with(&IMAGE, has_picture(i).then(|| picture.clone()))
                    .with(&MASK, (i > 1).then(|| mask.clone()))
                    .with(&STRENGTH, has_picture(i).then_some(0.4 + 0.2 * i as f64));
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
        assert!(psnr(&alone[1].rgb, &alone[2].rgb) < 35.0, "{case}: the sessions are the same picture");
    }
}

#[test]
fn a_refiner_makes_nothing_without_a_picture() {
    let (card, _) = load_runner(REFINER, 1);
    let options = Options::default().with(&PROMPT, "a boat".to_owned());
    let error = card.resolve(&options, 0).expect_err("there is no picture").to_string();
    assert!(error.starts_with("image: is missing"), "{error}");
}

/// What PIL makes of the same pixels, bit for bit.
#[test]
fn resized_pictures_are_those_of_pil() {
    let tensors = golden_tensors("edits/resample");
    let cases = golden_json("edits/resample");
    let pattern = |i: usize| ((i * 7919 + i * i % 251 * 13) % 256) as u8;
    for case in cases["cases"].as_array().unwrap() {
        let side = |end: &str, i: usize| case[end][i].as_u64().unwrap() as usize;
        let ((width, height), (to_width, to_height)) =
            ((side("from", 0), side("from", 1)), (side("to", 0), side("to", 1)));
        let name = case["filter"].as_str().unwrap();
        let filter = if name == "lanczos" { Filter::Lanczos } else { Filter::Bicubic };
        let rgb: Vec<u8> = (0..width * height * 3).map(pattern).collect();
        let grey = rgb.iter().step_by(3).copied().collect();
        let key = format!("{name}.{width}x{height}.{to_width}x{to_height}");
        let colours = Frame { width, height, rgb }.resized(to_width, to_height, filter);
        assert_eq!(colours.rgb, bytes(&tensors[&key]).1, "{key}");
        let grey = Mask { width, height, grey }.resized(to_width, to_height, filter);
        assert_eq!(grey.grey, bytes(&tensors[&format!("{key}.grey")]).1, "{key}");
    }
}

/// In f16 the encoder goes the way of the decoder: f32 where the checkpoint asks for it.
#[test]
fn the_encoder_computes_in_f32_where_f16_overflows() {
    let manifest = Manifest::read(&case_dir("sdxl-a").join("checkpoint")).unwrap();
    let component = manifest.component("vae").unwrap();
    let config: KlConfig = component.config().unwrap();
    let picture = Run::all("sdxl-a")[2].picture();
    let mean = |dtype| {
        let placement = Placement::in_host_memory(DeviceSpec::Cuda(0), dtype);
        let encoder = KlEncoder::load(&component.weights(&placement).unwrap(), &config).unwrap();
        let posterior = encoder.encode_next(&mut encoder.begin(picture.clone(), false)).unwrap().unwrap();
        assert_eq!((posterior.mean.dtype(), posterior.std.dtype()), (DType::F32, DType::F32));
        posterior.mean
    };
    assert_close("f16 with force_upcast", &mean(WeightDtype::F16), &mean(WeightDtype::F32), 5e-3);
}
