//! LoRA of HunyuanVideo, in PEFT's names, the original ones, ComfyUI's and musubi's, beside a checkpoint whose weights were changed by hand.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::parameters::{HEIGHT, LORAS, NUM_FRAMES, NUM_INFERENCE_STEPS, PROMPT, SEED, WIDTH};
use tale_models::family::LoadOptions;
use tale_models::lora::LoraOption;
use tale_models::parameter::Options;
use tale_models::request::Frame;
use tale_models::rng::TorchGenerator;
use tale_models::{ModelCard, ModelSource};

use crate::support::{case_dir, clips, copy_folder, edit_tensors, psnr};

const CASE: &str = "hunyuan-video-a";
/// Of the network, and of a term.
const DIM: usize = 24;
const RANK: usize = 2;
const WEIGHT: f64 = 0.75;

#[test]
fn terms_are_what_they_would_be_among_the_weights() {
    let mut generator = TorchGenerator::new(1);
    let mut matrix = |rows: usize, columns: usize| {
        let values = generator.randn(rows * columns);
        (Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap() * 0.3).unwrap()
    };
    // Of a dual block the three projections of the video, of a single one these and the feed-forward's.
    let (dual_a, dual_b) = (matrix(RANK, DIM), matrix(3 * DIM, RANK));
    let (single_a, single_b) = (matrix(RANK, DIM), matrix(7 * DIM, RANK));
    let (dual, single) = ("transformer_blocks.0", "single_transformer_blocks.1");
    let mut parts = Vec::new();
    for (block, a, b, names) in [
        (dual, &dual_a, &dual_b, &["attn.to_q", "attn.to_k", "attn.to_v"][..]),
        (single, &single_a, &single_b, &["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
    ] {
        for (index, name) in names.iter().enumerate() {
            let rows = if *name == "proj_mlp" { 4 * DIM } else { DIM };
            parts.push((format!("{block}.{name}"), a.clone(), b.narrow(0, index * DIM, rows).unwrap()));
        }
    }

    let files = tempfile::tempdir().unwrap();
    let save = |name: &str, tensors: HashMap<String, Tensor>| {
        candle_core::safetensors::save(&tensors, files.path().join(format!("{name}.safetensors"))).unwrap();
    };
    let both = |layer: &str, a: &Tensor, b: &Tensor| {
        let tensor = |kind: &str, x: &Tensor| (format!("{layer}.lora_{kind}.weight"), x.force_contiguous().unwrap());
        [tensor("A", a), tensor("B", b)]
    };
    save("peft", parts.iter().flat_map(|(layer, a, b)| both(&format!("transformer.{layer}"), a, b)).collect());
    let original = [
        both("diffusion_model.double_blocks.0.img_attn_qkv", &dual_a, &dual_b),
        both("diffusion_model.single_blocks.1.linear1", &single_a, &single_b),
    ];
    save("original", original.into_iter().flatten().collect());
    let comfy = [
        both("diffusion_model.double_blocks.0.img_attn.qkv", &dual_a, &dual_b),
        both("diffusion_model.single_blocks.1.linear1", &single_a, &single_b),
    ];
    save("comfy", comfy.into_iter().flatten().collect());
    let flat = [
        both("lora_unet_double_blocks_0_img_attn_qkv", &dual_a, &dual_b),
        both("lora_unet_single_blocks_1_linear1", &single_a, &single_b),
    ];
    save("musubi", flat.into_iter().flatten().collect());

    let own = case_dir(CASE).join("checkpoint");
    let changed = tempfile::tempdir().unwrap();
    copy_folder(&own, changed.path());
    for (layer, a, b) in &parts {
        let term = (b.matmul(a).unwrap() * WEIGHT).unwrap();
        edit_tensors(&changed.path().join("transformer"), &format!("{layer}.weight"), |x| (x + &term).unwrap());
    }
    let expected = clip(changed.path(), None, None);
    let bare = clip(&own, None, None);
    assert!(psnr(&expected, &bare) < 35.0, "the terms matter: {:.1} dB", psnr(&expected, &bare));
    let peft = clip(&own, Some(files.path()), Some("peft"));
    assert!(psnr(&peft, &expected) >= 50.0, "{:.1} dB", psnr(&peft, &expected));
    for name in ["original", "comfy", "musubi"] {
        assert!(clip(&own, Some(files.path()), Some(name)) == peft, "{name} is the clip of PEFT's names");
    }
}

/// Every layer that ComfyUI calls by another name than the original.
#[test]
fn comfyuis_names_mean_the_layers_of_the_original_ones() {
    let mut generator = TorchGenerator::new(2);
    let mut matrix = |rows: usize, columns: usize| {
        let values = generator.randn(rows * columns);
        (Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap() * 0.3).unwrap()
    };
    let files = tempfile::tempdir().unwrap();
    let (mut original, mut comfy) = (HashMap::new(), HashMap::new());
    for (name, other, inputs, outputs) in [
        ("double_blocks.0.txt_attn_qkv", "double_blocks.0.txt_attn.qkv", DIM, 3 * DIM),
        ("double_blocks.0.img_attn_proj", "double_blocks.0.img_attn.proj", DIM, DIM),
        ("double_blocks.0.img_mlp.fc1", "double_blocks.0.img_mlp.0", DIM, 4 * DIM),
        ("double_blocks.0.txt_mlp.fc2", "double_blocks.0.txt_mlp.2", 4 * DIM, DIM),
        ("double_blocks.0.img_mod.linear", "double_blocks.0.img_mod.lin", DIM, 6 * DIM),
        ("single_blocks.0.modulation.linear", "single_blocks.0.modulation.lin", DIM, 3 * DIM),
        ("time_in.mlp.2", "time_in.out_layer", DIM, DIM),
        ("txt_in.c_embedder.linear_2", "txt_in.c_embedder.out_layer", DIM, DIM),
    ] {
        for (kind, tensor) in [("A", matrix(RANK, inputs)), ("B", matrix(outputs, RANK))] {
            original.insert(format!("{name}.lora_{kind}.weight"), tensor.clone());
            comfy.insert(format!("diffusion_model.{other}.lora_{kind}.weight"), tensor);
        }
    }
    candle_core::safetensors::save(&original, files.path().join("original.safetensors")).unwrap();
    candle_core::safetensors::save(&comfy, files.path().join("comfy.safetensors")).unwrap();
    let own = case_dir(CASE).join("checkpoint");
    let expected = clip(&own, Some(files.path()), Some("original"));
    assert!(psnr(&expected, &clip(&own, None, None)) < 45.0, "the terms matter");
    assert!(clip(&own, Some(files.path()), Some("comfy")) == expected, "one clip");
}

/// Files of models whose layers have other names, or the same and other shapes.
#[test]
fn files_of_other_models_are_refused_by_name() {
    for (folder, names) in [("lora/flux", &["peft", "kohya", "original"][..]), ("wan-lora/t2v", &["original", "peft"])]
    {
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
        let source =
            ModelSource { loras: Some(case_dir(folder)), ..ModelSource::at(case_dir(CASE).join("checkpoint")) };
        let loaded = tale_models::load(&source, &placement, &LoadOptions::default(), &mut |_| ()).unwrap();
        let ModelCard::Diffusion(card) = &loaded.card else { panic!("makes clips") };
        for name in names {
            let loras = vec![LoraOption { name: (*name).to_owned(), weight: 1.0 }];
            let options = Options::default().with(&PROMPT, "x".to_owned()).with(&LORAS, Some(loras));
            let error = card.resolve(&options, 0).expect_err(name).to_string();
            assert!(error.contains(&format!("`{name}` is not for this model")), "{folder}: {error}");
        }
    }
}

/// Bytes of all frames.
fn clip(checkpoint: &Path, loras: Option<&Path>, name: Option<&str>) -> Vec<u8> {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let source = ModelSource { loras: loras.map(Path::to_owned), ..ModelSource::at(checkpoint) };
    let mut loaded = tale_models::load(&source, &placement, &LoadOptions::default(), &mut |_| ()).unwrap();
    let ModelCard::Diffusion(card) = &loaded.card else { panic!("makes clips") };
    let lora = |name: &str| vec![LoraOption { name: name.to_owned(), weight: WEIGHT }];
    let options = Options::default()
        .with(&PROMPT, "A small boat".to_owned())
        .with(&WIDTH, 48)
        .with(&HEIGHT, 32)
        .with(&NUM_FRAMES, 5)
        .with(&NUM_INFERENCE_STEPS, 2)
        .with(&SEED, 4)
        .with(&LORAS, name.map(lora));
    let request = card.resolve(&options, 0).unwrap();
    let frames: Vec<Frame> = clips(&mut *loaded.runner, &[request]).remove(0);
    frames.into_iter().flat_map(|frame| frame.rgb).collect()
}
