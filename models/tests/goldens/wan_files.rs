//! Wan2.1 in other files than diffusers': single files and components under the original names, eight bits, GGUF.
//!
//! Files are made here from the folders of the other cases, as `wan-files/*.names` says, from which diffusers has read the
//! same tensors. `published-files/*.txt` are names and shapes of the files that everybody downloads.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use tale_models::checkpoint::LoadFormat;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::parameters::{
    GUIDANCE_SCALE, HEIGHT, MAX_SEQUENCE_LENGTH, NEGATIVE_PROMPT, NUM_FRAMES, NUM_INFERENCE_STEPS, PROMPT, SEED, WIDTH,
};
use tale_models::diffusion::{DiffusionCard, DiffusionRequest};
use tale_models::family::{LoadOptions, LoadedModel};
use tale_models::loading;
use tale_models::parameter::Options;
use tale_models::presets::{Configurations, Preset};
use tale_models::request::{Frame, Phase, Request};
use tale_models::{ModelCard, ModelSource};

use crate::files::{
    assembled, assert_clean, check_refused, checkpoint, cpu, inspect, load, published, remove_weights, write_empty,
    write_file,
};
use crate::support::{case_dir, clips, copy_folder, golden_json, golden_tensors, psnr};
use crate::{wan, wan_pictures};

const CASE: &str = "wan-files";
const CASES: [&str; 4] = ["wan-a", "wan-b", "wan-i2v", "wan-flf2v"];
const MIN_PSNR: f64 = 50.0;

// --- published files -------------------------------------------------------------------------------------------------

/// Every tensor of the published files has its place in the networks of the published configurations, and the networks ask
/// for no other: the transformer as a single file, the other networks alone in the folders of its base.
#[test]
fn published_files_fit_the_published_configurations() {
    for (preset, file, parameters) in [
        ("wan2.1-t2v-1.3b", "wan2.1_t2v_1.3B", 1_418_996_800),
        ("wan2.1-t2v-14b", "wan2.1_t2v_14B", 14_288_491_584),
        ("wan2.1-i2v-14b", "wan2.1_i2v_14B", 16_394_878_784),
        ("wan2.1-flf2v-14b", "wan2.1_flf2v_14B", 16_395_536_704),
    ] {
        let base = Configurations::of_preset(preset.parse::<&Preset>().unwrap()).unwrap();
        let components = [
            ("text_encoder", "models_t5_umt5-xxl-enc"),
            ("vae", "Wan2.1_VAE"),
            ("image_encoder", "open-clip-xlm-roberta-large-vit-huge-14_visual"),
        ];
        for (component, name) in components {
            let folder = base.path().join(component);
            if folder.exists() {
                write_empty(&folder.join(format!("{name}.safetensors")), &published(name));
            }
        }
        let path = base.path().join("anything.safetensors");
        write_empty(&path, &published(file));
        let inspection = inspect(&path, None);
        assert_eq!(inspection.components.len(), if preset.contains("t2v") { 3 } else { 4 });
        assert_clean(&inspection);
        let (_, transformer) = inspection.components.iter().find(|(name, _)| name == "transformer").unwrap();
        assert_eq!(transformer.num_parameters, parameters, "{preset}");
    }
}

// --- original names --------------------------------------------------------------------------------------------------

#[test]
fn files_of_original_names_make_the_clips_of_their_folders() {
    for (case, beginning) in CASES.into_iter().zip(["", "model.diffusion_model.", "model.diffusion_model.", ""]) {
        let base = originals(case);
        let path = base.path().join("model.safetensors");
        let tensors = assembled(case, &format!("{CASE}/{case}"));
        write_file(&path, tensors.into_iter().map(|(name, tensor)| (format!("{beginning}{name}"), tensor)).collect());
        assert_clean(&inspect(&path, None));
        check_clips(case, load(&path, None, WeightDtype::Auto));
    }
}

/// The transformer too may be such a file in its own folder, with whatever the names begin.
#[test]
fn a_folder_may_have_any_component_under_original_names() {
    for (case, beginning) in [("wan-a", "model.diffusion_model."), ("wan-flf2v", "")] {
        let base = originals(case);
        let tensors = assembled(case, &format!("{CASE}/{case}"));
        let tensors = tensors.into_iter().map(|(name, tensor)| (format!("{beginning}{name}"), tensor)).collect();
        write_file(&base.path().join("transformer/wan2.1_fp32.safetensors"), tensors);
        assert_clean(&inspect(base.path(), None));
        check_clips(case, load(base.path(), None, WeightDtype::Auto));
    }
}

/// The transformer's own file of a diffusers folder, over a base of the same pipeline.
#[test]
fn a_transformer_alone_may_have_its_names_of_today() {
    for case in ["wan-b", "wan-i2v"] {
        let dir = tempfile::tempdir().unwrap();
        let base = tempfile::tempdir().unwrap();
        copy_folder(&checkpoint(case), base.path());
        remove_weights(&base.path().join("transformer"));
        let path = dir.path().join("transformer.safetensors");
        write_file(&path, crate::files::read_component(&checkpoint(case).join("transformer")));
        assert_clean(&inspect(&path, Some(base.path())));
        check_clips(case, load(&path, Some(base.path()), WeightDtype::Auto));
    }
}

/// A folder whose networks but the transformer are files under the original names.
fn originals(case: &str) -> Configurations {
    let base = Configurations::of_folder(&checkpoint(case)).unwrap();
    // An index of shards names files that are not there.
    for component in ["text_encoder", "transformer"] {
        remove_weights(&base.path().join(component));
    }
    write_file(&base.path().join("vae/wan_2.1_vae.safetensors"), assembled(case, &format!("{CASE}/{case}-vae")));
    let encoder = assembled(case, &format!("{CASE}/{case}-umt5"));
    write_file(&base.path().join("text_encoder/umt5-xxl-enc.safetensors"), encoder);
    if base.path().join("image_encoder").exists() {
        let mut visual = assembled(case, &format!("{CASE}/{case}-visual"));
        for (name, shape) in [("visual.cls_embedding", vec![1, 1]), ("visual.pos_embedding", vec![1])] {
            let tensor = visual.get_mut(name).unwrap();
            *tensor = tensor.reshape([&shape, tensor.dims()].concat()).unwrap();
        }
        write_file(&base.path().join("image_encoder/clip_visual.safetensors"), visual);
    }
    base
}

/// The first clips of a case.
#[track_caller]
fn check_clips(case: &str, mut model: LoadedModel) {
    let requests = match case {
        "wan-a" | "wan-b" => wan::requests(case, card(&model)),
        _ => wan_pictures::requests(case, card(&model)),
    };
    let (_, request) = requests.into_iter().next().unwrap();
    let found = clips(&mut *model.runner, &[request]).remove(0);
    check_frames(case, &found, &golden_tensors(case)["run0.frames"]);
}

#[track_caller]
fn check_frames(what: &str, found: &[Frame], expected: &Tensor) {
    assert_eq!(expected.dim(0).unwrap(), found.len());
    for (at, frame) in found.iter().enumerate() {
        let expected: Vec<u8> = expected.get(at).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let found = psnr(&frame.rgb, &expected);
        println!("{what} frame {at}: {found:.1} dB");
        assert!(found >= MIN_PSNR, "{what} frame {at}: {found:.1} dB");
    }
}

// --- eight bits ------------------------------------------------------------------------------------------------------

/// diffusers computes with the bytes' numbers times their scales.
#[test]
fn eight_bits_make_the_clips_of_their_numbers() {
    for (format, dtype) in [("e4m3", "F8_E4M3"), ("e5m2", "F8_E5M2")] {
        let path = case_dir(CASE).join(format!("transformer-{format}.safetensors"));
        let inspection = inspect(&path, Some(&checkpoint("wan-a")));
        assert_clean(&inspection);
        let (_, report) = inspection.components.iter().find(|(name, _)| name == "transformer").unwrap();
        assert!(report.dtypes.contains_key(dtype), "{:?}", report.dtypes);
        let mut model = load(&path, Some(&checkpoint("wan-a")), WeightDtype::Auto);
        assert_eq!(model.resident_bytes, inspection.resident_bytes());
        let request = request(card(&model));
        let found = clips(&mut *model.runner, &[request]).remove(0);
        check_frames(format, &found, &golden_tensors(CASE)[&format!("{format}.frames")]);
    }
}

/// Bytes without a scale are numbers of 16 bits, those with one of 32; a GPU has them in its own dtype.
#[test]
fn eight_bits_are_widened_to_the_narrowest_dtype_that_has_their_values() {
    let bytes = |format: &str, placement: &Placement| {
        let path = case_dir(CASE).join(format!("transformer-{format}.safetensors"));
        let source = ModelSource { base: Some(checkpoint("wan-a")), ..ModelSource::at(path) };
        let inspection = loading::inspect(source, placement, &LoadOptions::default()).unwrap();
        let (_, report) = inspection.components.into_iter().find(|(name, _)| name == "transformer").unwrap();
        let narrow: usize = report.dtypes.iter().filter(|(dtype, _)| dtype.starts_with("F8")).map(|(_, n)| n).sum();
        (report.resident_bytes, report.num_parameters, narrow)
    };
    let (found, all, narrow) = bytes("e4m3", &cpu());
    assert_eq!(found, 4 * all);
    let (found_without_scales, ..) = bytes("e5m2", &cpu());
    assert_eq!(found_without_scales, 4 * (all - narrow) + 2 * narrow);
    let on_gpu = Placement::in_host_memory(DeviceSpec::Cuda(0), WeightDtype::Auto);
    assert_eq!(bytes("e4m3", &on_gpu).0, 2 * all);
}

// --- GGUF ------------------------------------------------------------------------------------------------------------

/// diffusers computes with what gguf dequantises from the same files.
#[test]
fn gguf_files_make_the_clip_of_their_dequantised_weights() {
    let base = gguf_base();
    let path = case_dir(CASE).join("transformer.gguf");
    assert_clean(&inspect(&path, Some(base.path())));
    let mut model = load(&path, Some(base.path()), WeightDtype::Auto);
    let request = request(card(&model));
    let found = clips(&mut *model.runner, std::slice::from_ref(&request)).remove(0);
    check_frames("gguf", &found, &golden_tensors(CASE)["gguf.frames"]);

    // In a batch as alone.
    let others = [1, 2].map(|seed| request.with_seed(seed));
    let alone = others.clone().map(|other| clips(&mut *model.runner, &[other]).remove(0));
    assert!(alone[0] != alone[1]);
    for (together, alone) in clips(&mut *model.runner, &others).iter().zip(&alone) {
        let distance = psnr(&together[0].rgb, &alone[0].rgb);
        assert!(distance >= MIN_PSNR, "{distance:.1} dB");
    }

    // In the folder of its component.
    std::fs::copy(&path, base.path().join("transformer/wan2.1-Q4_K_M.gguf")).unwrap();
    let mut model = load(base.path(), None, WeightDtype::Auto);
    let found = clips(&mut *model.runner, &[request]).remove(0);
    check_frames("gguf in its folder", &found, &golden_tensors(CASE)["gguf.frames"]);
}

#[test]
fn gguf_weights_stay_quantised_and_the_largest_is_dequantised_for_a_moment() {
    let (base, path) = (gguf_base(), case_dir(CASE).join("transformer.gguf"));
    let inspection = inspect(&path, Some(base.path()));
    let report = |name: &str| &inspection.components.iter().find(|(component, _)| component == name).unwrap().1;
    for (component, file, dtypes) in [
        ("transformer", "transformer.gguf", &["Q4_0", "Q4_K", "Q5_0", "Q6_K", "Q8_0", "F16", "BF16", "F32"][..]),
        ("text_encoder", "text_encoder.gguf", &["Q8_0", "Q5_1", "F16", "F32"]),
    ] {
        let on_disk = std::fs::metadata(case_dir(CASE).join(file)).unwrap().len() as usize;
        for dtype in dtypes {
            assert!(report(component).dtypes.contains_key(*dtype), "{component} {dtype}");
        }
        // The table of embeddings too, which is looked up and not multiplied with. Not all of an encoder is read.
        let resident = report(component).resident_bytes;
        assert!(resident <= on_disk && resident > on_disk * 2 / 5, "{component}: {resident} of {on_disk}");
    }
    // On a GPU a product has its whole matrix in 16 bits for a moment, on the way in f16. The plan counts the largest that
    // comes in blocks, which random weights do not.
    let on_gpu = Placement::in_host_memory(DeviceSpec::Cuda(0), WeightDtype::Auto);
    let phase = |phase: Phase, load_format: LoadFormat| {
        let source = ModelSource { base: Some(base.path().to_owned()), ..ModelSource::at(&path) };
        let options = LoadOptions { load_format, ..LoadOptions::default() };
        let (_, model) = loading::plan(source, &on_gpu, &options).unwrap();
        let model = model.expect("can be built");
        let plan = model.runner.plan(&Request::Diffusion(request(card(&model))));
        plan.phases().iter().find(|of| of.phase == phase).expect("has this phase").bytes
    };
    for (of, values) in [(Phase::Denoise, 256 * 64), (Phase::Encode, 44 * 32)] {
        assert_eq!(phase(of, LoadFormat::Auto) - phase(of, LoadFormat::Dummy), values * (2 + 2), "{of:?}");
    }
}

/// `wan-a` with the configurations of another transformer and another text encoder, whose file lies in its folder.
fn gguf_base() -> tempfile::TempDir {
    let base = tempfile::tempdir().unwrap();
    copy_folder(&checkpoint("wan-a"), base.path());
    for component in ["transformer", "text_encoder"] {
        remove_weights(&base.path().join(component));
        let config = case_dir(CASE).join(format!("gguf-{component}/config.json"));
        std::fs::copy(config, base.path().join(component).join("config.json")).unwrap();
    }
    let encoder = case_dir(CASE).join("text_encoder.gguf");
    std::fs::copy(encoder, base.path().join("text_encoder/umt5-xxl-encoder-Q8_0.gguf")).unwrap();
    base
}

// --- refusals --------------------------------------------------------------------------------------------------------

#[test]
fn a_base_that_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let write = |case: &str| {
        let path = dir.path().join(format!("{case}.safetensors"));
        write_file(&path, assembled(case, &format!("{CASE}/{case}")));
        path
    };
    let (text, picture, pictures) = (write("wan-a"), write("wan-i2v"), write("wan-flf2v"));
    check_refused(&text, None, &["holds Wan2.1 from text and needs a base", "WanPipeline"]);
    check_refused(&text, Some(&checkpoint("wan-i2v")), &["is a WanImageToVideoPipeline", "holds Wan2.1 from text"]);
    check_refused(&picture, Some(&checkpoint("wan-a")), &["is a WanPipeline", "holds Wan2.1 from a picture"]);
    check_refused(&pictures, Some(&checkpoint("flux-dev")), &["is a FluxPipeline", "from a first and a last picture"]);
    // Names and shapes are those of the file.
    check_refused(&text, Some(&checkpoint("wan-b")), &["`blocks.0.self_attn.q.bias`", "has shape [36]"]);
    // One picture more than the base's model takes.
    let base = tempfile::tempdir().unwrap();
    copy_folder(&checkpoint("wan-flf2v"), base.path());
    let config = base.path().join("transformer/config.json");
    let mut fields: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    fields["pos_embed_seq_len"] = Value::Null;
    std::fs::write(config, fields.to_string()).unwrap();
    check_refused(&pictures, Some(base.path()), &["such as `img_emb.emb_pos`", "another base"]);
    let mut more = assembled("wan-a", &format!("{CASE}/wan-a"));
    more.insert("vace_blocks.0.before_proj.weight".to_owned(), zeros(&[36, 36]));
    let path = dir.path().join("vace.safetensors");
    write_file(&path, more);
    check_refused(&path, Some(&checkpoint("wan-a")), &["has 1 tensors, such as `vace_blocks.0", "another base"]);
}

#[test]
fn weights_that_cannot_be_told_are_refused_by_name() {
    let refused = |base: &Path, expected: &[&str]| {
        let error = tale_models::load(ModelSource::at(base), &cpu(), &LoadOptions::default(), &mut |_| ());
        let error = error.err().expect("is refused").to_string();
        assert!(expected.iter().all(|part| error.contains(part)), "{expected:?} in: {error}");
    };
    let base = originals("wan-a");
    refused(base.path(), &["transformer", "holds no weights", "file of another name"]);
    for name in ["one.safetensors", "two.safetensors"] {
        write_file(&base.path().join("transformer").join(name), assembled("wan-a", &format!("{CASE}/wan-a")));
    }
    refused(base.path(), &["transformer", "holds 2 weight files of other names"]);

    // A scale that is no number, or more than one.
    let path = case_dir(CASE).join("transformer-e4m3.safetensors");
    let sound = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let layer = "blocks.1.self_attn.v";
    for (scale, expected) in [
        (Tensor::new(f32::NAN, &Device::Cpu).unwrap(), "F32 [] is not one finite number"),
        (zeros(&[36, 1]), "F32 [36, 1] is not one finite number"),
    ] {
        let mut tensors = sound.clone();
        tensors.insert(format!("{layer}.scale_weight"), scale);
        let base = originals("wan-a");
        write_file(&base.path().join("transformer/narrow.safetensors"), tensors);
        refused(base.path(), &["narrow.safetensors", "`blocks.1.self_attn.v.scale_weight`", expected]);
    }
}

fn zeros(dims: &[usize]) -> Tensor {
    Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap()
}

fn card(model: &LoadedModel) -> &DiffusionCard {
    match &model.card {
        ModelCard::Diffusion(card) => card,
        ModelCard::Text(_) => panic!("makes clips"),
    }
}

/// The run of `wan-files/golden.json`.
fn request(card: &DiffusionCard) -> DiffusionRequest {
    let run = &golden_json(CASE)["run"];
    let number = |field: &str| run[field].as_u64().map(|value| value as usize);
    let options = Options::default()
        .with(&PROMPT, run["prompt"].as_str().unwrap().to_owned())
        .with(&NEGATIVE_PROMPT, run["negative_prompt"].as_str().map(str::to_owned))
        .with(&WIDTH, number("width"))
        .with(&HEIGHT, number("height"))
        .with(&NUM_FRAMES, number("num_frames"))
        .with(&NUM_INFERENCE_STEPS, number("num_inference_steps"))
        .with(&GUIDANCE_SCALE, run["guidance_scale"].as_f64())
        .with(&SEED, run["seed"].as_u64())
        .with(&MAX_SEQUENCE_LENGTH, number("max_sequence_length"));
    card.resolve(&options, 0).unwrap()
}
