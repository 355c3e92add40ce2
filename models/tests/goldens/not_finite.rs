//! Checkpoints with one value that is NaN or infinite in an attention's queries or keys, in whichever network: an error, and
//! neither a picture nor text. transformers and diffusers propagate NaN.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tale_models::cancel::CancelToken;
use tale_models::diffusion::parameters::{HEIGHT, NUM_FRAMES, NUM_INFERENCE_STEPS, PROMPT, WIDTH};
use tale_models::parameter::Options;

use candle_core::{DType, Device, Tensor};
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::family::LoadOptions;
use tale_models::text_parameters::MAX_TOKENS;
use tale_models::{Encoding, Error, Event, Events, ModelCard, ModelSource, Request, SessionId};

use crate::support::{case_dir, copy_folder};

/// How queries and keys are called: llama, CLIP, T5, diffusers.
const LEAVES: [&str; 10] = [
    ".q_proj.weight",
    ".k_proj.weight",
    ".SelfAttention.q.weight",
    ".SelfAttention.k.weight",
    "attn1.to_q.weight",
    "attn1.to_k.weight",
    "attn2.to_q.weight",
    "attn2.to_k.weight",
    ".attn.to_q.weight",
    ".add_k_proj.weight",
];

#[test]
fn text_from_spoiled_attention_is_an_error() {
    for case in ["llama-untied", "qwen2"] {
        check(case);
    }
}

#[test]
fn pictures_and_clips_from_spoiled_attention_are_errors() {
    for case in ["sdxl-b", "flux-dev", "wan-b", "hunyuan-video-a"] {
        check(case);
    }
}

/// The first tensor of each kind in each network, one after the other.
fn check(case: &str) {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&case_dir(case).join("checkpoint"), dir.path());
    assert!(run(dir.path()).is_none(), "{case} fails as it is");
    let mut spoiled = 0;
    for file in weight_files(dir.path()) {
        let content = std::fs::read(&file).unwrap();
        let tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
        let tensors: BTreeMap<String, Tensor> = tensors.into_iter().collect();
        for leaf in LEAVES {
            let Some(name) = tensors.keys().find(|name| name.ends_with(leaf)) else { continue };
            for value in [f32::NAN, f32::INFINITY] {
                let mut changed: std::collections::HashMap<_, _> = tensors.clone().into_iter().collect();
                changed.insert(name.clone(), with_first(&tensors[name], value));
                candle_core::safetensors::save(&changed, &file).unwrap();
                let error = run(dir.path());
                let what = format!("{case}: {value} in {name} of {}", file.display());
                assert!(matches!(error, Some(Error::NotFinite { .. })), "{what}: {error:?}");
                spoiled += 1;
            }
        }
        std::fs::write(&file, content).unwrap();
    }
    println!("{case}: {spoiled} checkpoints");
    assert!(spoiled >= 4, "{case} has queries and keys");
}

fn weight_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(weight_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(path);
        }
    }
    files
}

fn with_first(tensor: &Tensor, value: f32) -> Tensor {
    let mut values: Vec<f32> = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    values[0] = value;
    Tensor::from_vec(values, tensor.dims(), &Device::Cpu).unwrap().to_dtype(tensor.dtype()).unwrap()
}

/// The error of a request to the checkpoint, if it has one.
fn run(checkpoint: &Path) -> Option<Error> {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let source = ModelSource::at(checkpoint);
    let mut model = tale_models::load(source, &placement, &LoadOptions::default(), &mut |_| ()).unwrap();
    let prompt = "a paper boat";
    let request = match &model.card {
        ModelCard::Text(card) => {
            let options = Options::default().with(&MAX_TOKENS, 3);
            Request::Text(
                card.resolve(card.encode(prompt, Encoding::PROMPT, &CancelToken::default()).unwrap(), &options, 0)
                    .unwrap(),
            )
        }
        ModelCard::Diffusion(card) => {
            let options = Options::default()
                .with(&PROMPT, prompt.to_owned())
                .with(&WIDTH, 64)
                .with(&HEIGHT, 64)
                .with(&NUM_FRAMES, card.canvas.frames.map(|_| 5))
                .with(&NUM_INFERENCE_STEPS, 1);
            Request::Diffusion(card.resolve(&options, 0).unwrap())
        }
    };
    model.runner.submit(SessionId(0), request).unwrap();
    let (mut events, mut failed) = (Events::default(), None);
    while failed.is_none() && model.runner.next().is_some() {
        if let Err(error) = model.runner.step(&mut events) {
            return Some(error);
        }
        failed = events.drain().find_map(|(_, event)| match event {
            Event::Failed(error) => Some(error),
            _ => None,
        });
    }
    failed
}
