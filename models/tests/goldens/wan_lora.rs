//! LoRA of Wan2.1 in every dialect, from text and from pictures, against diffusers' clips with the same files at the same
//! weights; differences that diffusers drops, against its clips with weights that were changed by hand.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::parameters::{
    GUIDANCE_SCALE, HEIGHT, INPUT_REFERENCE, LORAS, NEGATIVE_PROMPT, NUM_FRAMES, NUM_INFERENCE_STEPS, PROMPT, SEED,
    WIDTH,
};
use tale_models::diffusion::{DiffusionCard, DiffusionRequest};
use tale_models::family::LoadOptions;
use tale_models::lora::LoraOption;
use tale_models::parameter::Options;
use tale_models::request::{Frame, Request};
use tale_models::runner::Runner;
use tale_models::{ModelCard, ModelSource};

use crate::support::{case_dir, clips, golden_json, golden_tensors, psnr};

const CASE: &str = "wan-lora";
const MIN_PSNR: f64 = 50.0;
/// What a file changes is more than this, in dB.
const MOVED: f64 = 35.0;

#[test]
fn clips_are_the_reference_ones() {
    let tensors = golden_tensors(CASE);
    let mut models: HashMap<String, Loaded> = HashMap::new();
    for (index, run) in runs().iter().enumerate() {
        let model = models.entry(run.checkpoint.clone()).or_insert_with(|| Loaded::new(&run.checkpoint, &run.files));
        let request = model.card.resolve(&run.options(), 0).expect("a valid request");
        let frames = clips(&mut *model.runner, &[request]).remove(0);
        let expected = &tensors[&format!("run{index}.frames")];
        assert_eq!(expected.dim(0).unwrap(), frames.len());
        for (at, frame) in frames.iter().enumerate() {
            let expected: Vec<u8> = expected.get(at).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let found = psnr(&frame.rgb, &expected);
            println!("{} {:?} frame {at}: {found:.1} dB", run.files, run.loras);
            assert!(found >= MIN_PSNR, "{} {:?} frame {at}: {found:.1} dB", run.files, run.loras);
        }
    }
}

/// Sessions with other files, other weights and none, all under way at once: each has its own clip.
#[test]
fn sessions_with_different_files_do_not_mix() {
    for (checkpoint, files) in [("wan-a", "t2v"), ("wan-i2v", "i2v")] {
        let mut model = Loaded::new(checkpoint, files);
        let run = runs().into_iter().find(|run| run.files == files).expect("there is one");
        let other = if files == "t2v" { "differences" } else { "patches-of-text" };
        let sets: [&[(&str, f64)]; 6] = [
            &[("original", 1.0)],
            &[],
            &[(other, 1.0)],
            &[("original", 1.0)],
            &[("original", 0.5), (other, -0.5)],
            &[(other, 0.0)],
        ];
        let requests: Vec<DiffusionRequest> = sets
            .iter()
            .map(|set| model.card.resolve(&run.options().with(&LORAS, options_of(set)), 0).expect("a valid request"))
            .collect();
        let alone: Vec<Vec<Frame>> =
            requests.iter().map(|request| clips(&mut *model.runner, std::slice::from_ref(request)).remove(0)).collect();
        let together = clips(&mut *model.runner, &requests);
        assert!(together == alone, "{checkpoint}: a clip depends on its company");
        assert!(alone[1] == alone[5], "{checkpoint}: a weight of 0 is nothing");
        assert!(alone[0] == alone[3]);
        for changed in [0, 2, 4] {
            let distance = psnr(&bytes(&alone[changed]), &bytes(&alone[1]));
            assert!(distance < MOVED, "{checkpoint}: files of session {changed} change {distance:.1} dB");
        }
        // Nothing is left in the layers.
        assert!(
            clips(&mut *model.runner, &requests[1..2])[0] == alone[1],
            "{checkpoint}: another clip after the others"
        );
    }
}

#[test]
fn files_of_other_models_are_refused_by_name() {
    let refused = |model: &Loaded, name: &str| {
        let options = Options::default().with(&PROMPT, "x".to_owned()).with(&LORAS, options_of(&[(name, 1.0)]));
        model.card.resolve(&options, 0).expect_err(name).to_string()
    };
    let of_flux = Loaded::from(ModelSource {
        loras: Some(case_dir("lora").join("flux")),
        ..ModelSource::at(case_dir("wan-a").join("checkpoint"))
    });
    for name in ["peft", "kohya", "original"] {
        let error = refused(&of_flux, name);
        assert!(error.contains(&format!("`{name}` is not for this model")), "{error}");
        assert!(error.contains("tensors belong to no layer of this model"), "{error}");
    }
    // A model that makes clips from text has no layers for what is said of pictures.
    let of_pictures = Loaded::from(ModelSource {
        loras: Some(case_dir(CASE).join("i2v")),
        ..ModelSource::at(case_dir("wan-a").join("checkpoint"))
    });
    let error = refused(&of_pictures, "original");
    assert!(error.contains("belong to no layer") && error.contains("k_img"), "{error}");

    let dir = tempfile::tempdir().expect("a temporary folder");
    let save = |name: &str, tensor: &str, dims: &[usize]| {
        let tensors = HashMap::from([(tensor, Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap())]);
        candle_core::safetensors::save(&tensors, dir.path().join(format!("{name}.safetensors"))).unwrap();
    };
    save("root", "diffusion_model.blocks.0.self_attn.norm_q.diff_b", &[36]);
    save("table", "diffusion_model.blocks.0.diff_m", &[1, 2, 36]);
    save("deep", "diffusion_model.blocks.7.diff_m", &[1, 6, 36]);
    let source =
        ModelSource { loras: Some(dir.path().into()), ..ModelSource::at(case_dir("wan-a").join("checkpoint")) };
    let model = Loaded::from(source);
    for (name, expected) in [
        ("root", ["norm_q.diff_b", "attn1.norm_q", "has no bias"]),
        ("table", ["blocks.0.diff_m", "[1, 2, 36]", "[1, 6, 36]"]),
        ("deep", ["1 of its 1 tensors", "blocks.7.diff_m", "belong to no layer"]),
    ] {
        let error = refused(&model, name);
        assert!(expected.iter().all(|part| error.contains(part)), "{expected:?} in: {error}");
    }
}

/// What a file takes on the device is counted before the first step.
#[test]
fn the_footprint_counts_every_kind_of_term() {
    for (checkpoint, files, name) in
        [("wan-a", "t2v", "original"), ("wan-a", "t2v", "differences"), ("wan-i2v", "i2v", "patches-of-text")]
    {
        let model = Loaded::new(checkpoint, files);
        let run = runs().into_iter().find(|run| run.files == files).expect("there is one");
        let peak = |loras: &[(&str, f64)]| {
            let request = model.card.resolve(&run.options().with(&LORAS, options_of(loras)), 0).expect("valid");
            model.runner.plan(&Request::Diffusion(request)).peak_bytes()
        };
        let file = case_dir(CASE).join(files).join(format!("{name}.safetensors"));
        let tensors = candle_core::safetensors::load(file, &Device::Cpu).expect("a file");
        let is_matrix = |tensor: &Tensor| tensor.rank() == 2 || tensor.rank() == 5;
        let bytes = |(name, tensor): (&String, &Tensor)| match name.ends_with(".alpha") {
            true => 0,
            // The patches of a model with pictures among its channels are filled up.
            false if checkpoint == "wan-i2v" => tensor.elem_count() / 16 * 36 * tensor.dtype().size_in_bytes(),
            false if is_matrix(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            false => tensor.elem_count() * size_of::<f32>(),
        };
        let expected: usize = tensors.iter().map(bytes).sum();
        assert_eq!(peak(&[(name, 1.0)]) - peak(&[]), expected, "{checkpoint} {name}");
        assert_eq!(peak(&[(name, 0.0)]), peak(&[]));
    }
}

fn bytes(frames: &[Frame]) -> Vec<u8> {
    frames.iter().flat_map(|frame| frame.rgb.iter().copied()).collect()
}

/// One clip of the golden.
struct Run {
    checkpoint: String,
    files: String,
    loras: Vec<LoraOption>,
    arguments: Value,
}

fn runs() -> Vec<Run> {
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let lora =
        |lora: &Value| LoraOption { name: text(&lora["name"]), weight: lora["weight"].as_f64().expect("a number") };
    let run = |run: &Value| Run {
        checkpoint: text(&run["checkpoint"]),
        files: text(&run["files"]),
        loras: run["loras"].as_array().expect("a list").iter().map(lora).collect(),
        arguments: run.clone(),
    };
    golden_json(CASE)["runs"].as_array().expect("runs").iter().map(run).collect()
}

impl Run {
    fn options(&self) -> Options {
        let number = |name: &str| self.arguments[name].as_u64().map(|value| value as usize);
        let picture = self.arguments["picture"].as_u64().map(|index| {
            let pixels = &golden_tensors(&self.checkpoint)[&format!("picture{index}")];
            let (height, width, _) = pixels.dims3().expect("[height, width, 3]");
            Arc::new(Frame { width, height, rgb: pixels.flatten_all().unwrap().to_vec1().unwrap() })
        });
        Options::default()
            .with(&PROMPT, self.arguments["prompt"].as_str().expect("a prompt").to_owned())
            .with(&NEGATIVE_PROMPT, self.arguments["negative_prompt"].as_str().map(str::to_owned))
            .with(&INPUT_REFERENCE, picture)
            .with(&WIDTH, number("width"))
            .with(&HEIGHT, number("height"))
            .with(&NUM_FRAMES, number("num_frames"))
            .with(&NUM_INFERENCE_STEPS, number("num_inference_steps"))
            .with(&GUIDANCE_SCALE, self.arguments["guidance_scale"].as_f64())
            .with(&SEED, self.arguments["seed"].as_u64())
            .with(&LORAS, self.loras.clone())
    }
}

fn options_of(loras: &[(&str, f64)]) -> Vec<LoraOption> {
    loras.iter().map(|(name, weight)| LoraOption { name: (*name).to_owned(), weight: *weight }).collect()
}

struct Loaded {
    card: DiffusionCard,
    runner: Box<dyn Runner>,
}

impl Loaded {
    /// The checkpoint of a case with the files of a kind.
    fn new(checkpoint: &str, files: &str) -> Self {
        let loras = Some(case_dir(CASE).join(files));
        Self::from(ModelSource { loras, ..ModelSource::at(case_dir(checkpoint).join("checkpoint")) })
    }

    fn from(source: ModelSource) -> Self {
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("the CPU");
        let options = LoadOptions { max_denoise_rows: 4, ..LoadOptions::default() };
        let loaded = tale_models::load(&source, &placement, &options, &mut |_| ()).expect("loads");
        let ModelCard::Diffusion(card) = loaded.card else { panic!("makes clips") };
        Self { card, runner: loaded.runner }
    }
}
