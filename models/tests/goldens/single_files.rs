//! Checkpoints as single files: SDXL and FLUX.1 in the layouts of their original implementations, and GGUF files.
//!
//! The files are made here from the folders of the other cases, as `single-files/*.names` says, which diffusers has read
//! to the same tensors. `published-files/*.txt` are names and shapes of the files that everybody downloads.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use tale_models::diffusion::parameters::{
    GUIDANCE_SCALE, HEIGHT, MAX_SEQUENCE_LENGTH, NEGATIVE_PROMPT, NUM_INFERENCE_STEPS, PROMPT, SEED, WIDTH,
};
use tale_models::parameter::Options;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::DiffusionCard;
use tale_models::diffusion::DiffusionRequest;
use tale_models::families::flux::original::FluxNames;
use tale_models::families::flux::transformer::{FluxTransformer, FluxTransformerConfig};
use tale_models::family::{LoadOptions, LoadedModel};
use tale_models::loading;
use tale_models::presets::{Configurations, Preset};
use tale_models::request::{Event, Events, Frame, Request, SessionId};
use tale_models::single_file::SingleFile;
use tale_models::vae::kl::{KlConfig, KlDecoder, KlEncoder};
use tale_models::vae::original::KlNames;
use tale_models::weights::single::WeightFile;
use tale_models::{ModelCard, ModelSource};

use crate::files::{
    assembled, assert_clean, check_refused, checkpoint, cpu, inspect, load, published, read_component, remove_weights,
    write_empty, write_file, write_file_saying,
};
use crate::support::{case_dir, copy_folder, golden_json, golden_tensors, psnr};
use crate::{flux, sdxl};

const MIN_PSNR: f64 = 50.0;

/// The file at `path`.
fn recognised(path: &Path) -> SingleFile {
    SingleFile::recognised(WeightFile::open(path).unwrap(), std::iter::empty()).unwrap()
}

// --- published files -------------------------------------------------------------------------------------------------

/// Every tensor of `sd_xl_base_1.0.safetensors` has its place in the networks of the published configurations, and the
/// networks ask for no other.
#[test]
fn the_published_sdxl_file_fits_the_published_configurations() {
    let (dir, base) = (tempfile::tempdir().unwrap(), preset("sdxl"));
    let path = dir.path().join("anything.safetensors");
    write_empty(&path, &published("sd_xl_base_1.0"));
    let inspection = inspect(&path, Some(base.path()));
    assert_clean(&inspection);
    let parameters: BTreeMap<&str, usize> =
        inspection.components.iter().map(|(name, report)| (name.as_str(), report.num_parameters)).collect();
    assert_eq!(parameters["unet"], 2_567_463_684);
    // Beside its parameters CLIP's file has 77 positions, OpenCLIP's the scale of its logits.
    assert_eq!(parameters["text_encoder"], 123_060_480 + 77);
    assert_eq!(parameters["text_encoder_2"], 694_659_840 + 1);
    assert_eq!(parameters["vae"], 83_653_863);
}

/// The same of `flux1-dev.safetensors` and the `ae.safetensors` beside it.
#[test]
fn the_published_flux_files_fit_the_published_configurations() {
    let (dir, base) = (tempfile::tempdir().unwrap(), preset("flux.1-dev"));
    let path = dir.path().join("anything.safetensors");
    write_empty(&path, &published("flux1-dev"));
    write_empty(&dir.path().join("ae.safetensors"), &published("ae"));
    let file = recognised(&path);
    let weights = |component| file.weights(component, &cpu(), true).expect("is there");

    let transformer = weights("transformer").or_named(FluxNames);
    let config: FluxTransformerConfig = read_config(base.path(), "transformer");
    FluxTransformer::load(&transformer, config).unwrap();
    let report = transformer.report();
    assert!(report.problems.is_empty() && report.unused.is_empty(), "{:?} {:?}", report.problems, report.unused);
    assert_eq!(report.num_parameters, 11_901_408_320);
    transformer.check_fit(base.path()).unwrap();

    let config: KlConfig = read_config(base.path(), "vae");
    let vae = weights("vae").or_named(KlNames::new(config.block_out_channels.len()));
    KlDecoder::load(&vae, &config).unwrap();
    KlEncoder::load(&vae, &config).unwrap();
    let report = vae.report();
    assert!(report.problems.is_empty() && report.unused.is_empty(), "{:?} {:?}", report.problems, report.unused);
    assert!(file.weights("text_encoder", &cpu(), true).is_none());
}

fn preset(name: &str) -> Configurations {
    Configurations::of_preset(name.parse::<&Preset>().unwrap()).unwrap()
}

fn read_config<T: serde::de::DeserializeOwned>(base: &Path, component: &str) -> T {
    serde_json::from_slice(&std::fs::read(base.join(component).join("config.json")).unwrap()).unwrap()
}

// --- SDXL ------------------------------------------------------------------------------------------------------------

#[test]
fn sdxl_files_make_the_pictures_of_their_folders() {
    for case in ["sdxl-a", "sdxl-b"] {
        let dir = tempfile::tempdir().unwrap();
        // The base has no weights: all are in the file.
        let base = Configurations::of_folder(&checkpoint(case)).unwrap();
        let path = dir.path().join("finetune.safetensors");
        write_file(&path, assemble(case, case));
        assert_clean(&inspect(&path, Some(base.path())));
        let mut model = load(&path, Some(base.path()), WeightDtype::Auto);
        let golden = golden_tensors(case);
        for (run, request) in sdxl::requests(case, card(&model)).into_iter().enumerate() {
            assert_picture(
                &format!("{case} run {run}"),
                &picture(&mut model, request),
                &golden[&format!("run{run}.image")],
            );
        }
    }
}

/// Beside the file's own tensors other files often lack some, and have some that are nobody's.
#[test]
fn what_an_sdxl_file_lacks_comes_from_its_base() {
    for lacks in ["conditioner.", "first_stage_model."] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let mut tensors = assemble("sdxl-b", "sdxl-b");
        tensors.retain(|name, _| !name.starts_with(lacks));
        tensors.insert("model_ema.decay".to_owned(), Tensor::new(&[0.5f32], &Device::Cpu).unwrap());
        write_file(&path, tensors);
        let inspection = inspect(&path, Some(&checkpoint("sdxl-b")));
        assert!(inspection.problem.is_none() && inspection.components.len() == 4, "{:?}", inspection.problem);
        let unused: Vec<_> = inspection.components.iter().flat_map(|(_, report)| &report.unused).collect();
        assert_eq!(unused, ["model_ema.decay"]);
        let mut model = load(&path, Some(&checkpoint("sdxl-b")), WeightDtype::Auto);
        let request = sdxl::requests("sdxl-b", card(&model)).remove(0);
        assert_picture(lacks, &picture(&mut model, request), &golden_tensors("sdxl-b")["run0.image"]);
    }
}

/// Velocity models say so by tensors that hold nothing.
#[test]
fn markers_choose_what_the_network_predicts() {
    let golden = golden_tensors("single-files");
    for (markers, expected) in
        [(&["v_pred", "ztsnr"][..], "v_prediction.image"), (&["v_pred"][..], "v_prediction_alone.image")]
    {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let mut tensors = assemble("sdxl-b", "sdxl-b");
        for marker in markers {
            tensors.insert((*marker).to_owned(), Tensor::zeros(0, DType::F32, &Device::Cpu).unwrap());
        }
        write_file(&path, tensors);
        assert_clean(&inspect(&path, Some(&checkpoint("sdxl-b"))));
        let mut model = load(&path, Some(&checkpoint("sdxl-b")), WeightDtype::Auto);
        let request = request("v_prediction", card(&model));
        assert_picture(expected, &picture(&mut model, request), &golden[expected]);
    }
}

/// Other velocity models say so in their metadata, as trainers write it.
#[test]
fn metadata_chooses_what_the_network_predicts() {
    let golden = golden_tensors("single-files");
    for (said, expected) in [("v", "v_prediction_alone.image"), ("v-zsnr", "v_prediction.image")] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        write_file_saying(&path, assemble("sdxl-b", "sdxl-b"), said);
        assert_clean(&inspect(&path, Some(&checkpoint("sdxl-b"))));
        let mut model = load(&path, Some(&checkpoint("sdxl-b")), WeightDtype::Auto);
        let request = request("v_prediction", card(&model));
        assert_picture(expected, &picture(&mut model, request), &golden[expected]);
    }
}

#[test]
fn metadata_counts_where_no_tensor_says_something_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let settings = |markers: &[&str], said: &str| {
        let mut tensors = assemble("sdxl-b", "sdxl-b");
        for marker in markers {
            tensors.insert((*marker).to_owned(), Tensor::zeros(0, DType::F32, &Device::Cpu).unwrap());
        }
        write_file_saying(&path, tensors, said);
        recognised(&path).schedule_settings()
    };
    let (velocity, zero_snr) = (("prediction_type", json!("v_prediction")), ("rescale_betas_zero_snr", json!(true)));
    for said in ["v", "V_Prediction", "v-prediction", " v_pred "] {
        assert_eq!(settings(&[], said), std::slice::from_ref(&velocity), "{said}");
    }
    for said in ["epsilon", "eps"] {
        assert_eq!(settings(&[], said), [("prediction_type", json!("epsilon"))], "{said}");
        assert_eq!(settings(&["v_pred"], said), std::slice::from_ref(&velocity), "a tensor counts more than {said}");
    }
    assert_eq!(settings(&["v_pred"], "v-zsnr"), [velocity.clone(), zero_snr.clone()]);
    assert_eq!(settings(&["v_pred", "ztsnr"], "v"), [velocity, zero_snr]);
    assert_eq!(settings(&[], "riddle"), [], "is not known");
}

// --- FLUX.1 ----------------------------------------------------------------------------------------------------------

/// As published: the transformer and the VAE in two files, here inside the folder of their base and elsewhere.
#[test]
fn flux_files_make_the_pictures_of_their_folder() {
    let golden = golden_tensors("flux-dev");
    for prefix in ["", "model.diffusion_model."] {
        let base = tempfile::tempdir().unwrap();
        copy_folder(&checkpoint("flux-dev"), base.path());
        for component in ["transformer", "vae"] {
            remove_weights(&base.path().join(component));
        }
        let path = base.path().join("flux1-dev.safetensors");
        let tensors = assemble("flux-dev", "flux-dev");
        write_file(&path, tensors.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)).collect());
        write_file(&base.path().join("ae.safetensors"), assemble("flux-dev", "flux-dev-ae"));
        assert_clean(&inspect(&path, None));
        let mut model = load(&path, None, WeightDtype::Auto);
        for (run, request) in flux::requests("flux-dev", card(&model)).into_iter().enumerate() {
            let found = picture(&mut model, request);
            assert_picture(&format!("flux-dev {prefix} run {run}"), &found, &golden[&format!("run{run}.image")]);
        }
    }
}

/// Some files hold everything, each network below a name of its own; the base then needs no weights.
#[test]
fn a_flux_file_may_hold_everything() {
    let dir = tempfile::tempdir().unwrap();
    let base = Configurations::of_folder(&checkpoint("flux-dev")).unwrap();
    let path = dir.path().join("all.safetensors");
    let parts = [
        ("model.diffusion_model.", assemble("flux-dev", "flux-dev")),
        ("vae.", assemble("flux-dev", "flux-dev-ae")),
        ("text_encoders.clip_l.transformer.", read_component(&checkpoint("flux-dev").join("text_encoder"))),
        ("text_encoders.t5xxl.transformer.", read_component(&checkpoint("flux-dev").join("text_encoder_2"))),
    ];
    let below = |(beginning, tensors): (&str, HashMap<String, Tensor>)| -> Vec<(String, Tensor)> {
        tensors.into_iter().map(|(name, tensor)| (format!("{beginning}{name}"), tensor)).collect()
    };
    write_file(&path, parts.into_iter().flat_map(below).collect());
    assert_clean(&inspect(&path, Some(base.path())));
    let mut model = load(&path, Some(base.path()), WeightDtype::Auto);
    let request = flux::requests("flux-dev", card(&model)).remove(0);
    assert_picture("flux-dev", &picture(&mut model, request), &golden_tensors("flux-dev")["run0.image"]);
}

/// The transformer's own file of a diffusers folder, alone.
#[test]
fn a_transformer_alone_may_have_its_names_of_today() {
    let source = ModelSource {
        base: Some(checkpoint("flux-schnell")),
        ..ModelSource::at(checkpoint("flux-schnell").join("transformer/diffusion_pytorch_model.safetensors"))
    };
    let mut model = tale_models::load(source, &cpu(), &LoadOptions::default(), &mut |_| ()).unwrap();
    let request = flux::requests("flux-schnell", card(&model)).remove(0);
    assert_picture("flux-schnell", &picture(&mut model, request), &golden_tensors("flux-schnell")["run0.image"]);
}

// --- GGUF ------------------------------------------------------------------------------------------------------------

/// diffusers computes with what gguf dequantises from the same file.
#[test]
fn gguf_files_make_the_pictures_of_their_dequantised_weights() {
    let base = gguf_base();
    assert_clean(&inspect(&gguf_file(), Some(base.path())));
    let mut model = load(&gguf_file(), Some(base.path()), WeightDtype::Auto);
    let request = request("gguf", card(&model));
    let expected = &golden_tensors("single-files")["gguf.image"];
    assert_picture("gguf", &picture(&mut model, request.clone()), expected);

    // In a batch as alone.
    let others = [1, 2].map(|seed| request.with_seed(seed));
    let alone: Vec<Frame> = others.iter().map(|other| picture(&mut model, other.clone())).collect();
    assert!(psnr(&alone[0].rgb, &alone[1].rgb) < 35.0, "the sessions are the same picture");
    for (together, alone) in pictures(&mut model, &others).iter().zip(&alone) {
        assert!(psnr(&together.rgb, &alone.rgb) >= MIN_PSNR);
    }
}

#[test]
fn gguf_weights_stay_quantised() {
    let base = gguf_base();
    let inspection = inspect(&gguf_file(), Some(base.path()));
    let (_, report) = inspection.components.iter().find(|(name, _)| name == "transformer").unwrap();
    let on_disk = std::fs::metadata(gguf_file()).unwrap().len() as usize;
    assert!(report.resident_bytes <= on_disk && report.resident_bytes > on_disk / 2, "{}", report.resident_bytes);
    for dtype in ["Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16", "F32"] {
        assert!(report.dtypes.contains_key(dtype), "{dtype}: {:?}", report.dtypes);
    }
    for dtype in [WeightDtype::Auto, WeightDtype::F32] {
        let source = ModelSource { base: Some(base.path().to_owned()), ..ModelSource::at(gguf_file()) };
        let placement = Placement::open(DeviceSpec::Cpu, dtype).unwrap();
        let inspected = loading::inspect(&source, &placement, &LoadOptions::default()).unwrap().resident_bytes();
        assert_eq!(load(&gguf_file(), Some(base.path()), dtype).resident_bytes, inspected);
    }
}

/// On a GPU a matrix is dequantised for the moment of its product, which the plan of a request counts.
#[test]
fn the_largest_matrix_is_dequantised_for_a_moment() {
    let (base, file) = (gguf_base(), recognised(&gguf_file()));
    for (dtype, bytes_per_value) in [(WeightDtype::Auto, 2 + 2), (WeightDtype::F32, 4)] {
        let on_gpu = Placement::in_host_memory(DeviceSpec::Cuda(0), dtype);
        let weights = file.weights("transformer", &on_gpu, true).unwrap().or_named(FluxNames);
        let transformer = FluxTransformer::load(&weights, read_config(base.path(), "transformer")).unwrap();
        // A modulation of a double block, [6 * 64, 64]; 16 bits come by way of f16.
        assert_eq!(transformer.dequantised_bytes(), 6 * 64 * 64 * bytes_per_value);
    }
}

fn gguf_file() -> PathBuf {
    case_dir("single-files").join("transformer.gguf")
}

/// `flux-schnell` with the configuration of another transformer.
fn gguf_base() -> tempfile::TempDir {
    let base = tempfile::tempdir().unwrap();
    copy_folder(&checkpoint("flux-schnell"), base.path());
    remove_weights(&base.path().join("transformer"));
    let config = case_dir("single-files").join("gguf-transformer/config.json");
    std::fs::copy(config, base.path().join("transformer/config.json")).unwrap();
    base
}

// --- refusals --------------------------------------------------------------------------------------------------------

#[test]
fn a_base_that_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    write_file(&path, assemble("sdxl-b", "sdxl-b"));
    check_refused(&path, None, &["holds SDXL and needs a base", "StableDiffusionXLPipeline"]);
    check_refused(&path, Some(&checkpoint("flux-dev")), &["is a FluxPipeline", "holds SDXL"]);
    check_refused(&path, Some(&path), &["is not a folder"]);
    // Names and shapes are those of the file.
    let wider = &["`conditioner.embedders.0.transformer.text_model.", "has shape [", "expected ["];
    check_refused(&path, Some(&checkpoint("sdxl-a")), wider);

    let path = dir.path().join("flux.safetensors");
    write_file(&path, assemble("flux-dev", "flux-dev"));
    let with = |field: &str, value: Value| {
        let base = tempfile::tempdir().unwrap();
        copy_folder(&checkpoint("flux-dev"), base.path());
        let config = base.path().join("transformer/config.json");
        let mut fields: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        fields[field] = value;
        std::fs::write(config, fields.to_string()).unwrap();
        base
    };
    let deeper = with("num_layers", json!(3));
    check_refused(
        &path,
        Some(deeper.path()),
        &["`double_blocks.2.img_mod.lin.bias` is missing, expected with shape [216]"],
    );
    let flatter = with("num_single_layers", json!(2));
    check_refused(&path, Some(flatter.path()), &["such as `single_blocks.2.linear1.bias`", "another base"]);
    let unguided = with("guidance_embeds", json!(false));
    check_refused(&path, Some(unguided.path()), &["has 4 tensors, such as `guidance_in."]);
    let narrower = with("num_attention_heads", json!(2));
    check_refused(
        &path,
        Some(narrower.path()),
        &["flux.safetensors: tensor `double_blocks.0.img_mod.lin.bias` has shape [216], expected [144]"],
    );
}

#[test]
fn what_is_no_model_is_refused_in_its_own_words() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let one = |name: &str| HashMap::from([(name.to_owned(), Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap())]);
    std::fs::write(path("zip.ckpt"), b"PK\x03\x04 and more").unwrap();
    check_refused(&path("zip.ckpt"), None, &["zip.ckpt: is a pickle"]);
    // Whatever it is called.
    std::fs::write(path("old.safetensors"), b"\x80\x02}q\x00.").unwrap();
    check_refused(&path("old.safetensors"), None, &["is a pickle"]);
    std::fs::write(path("empty.safetensors"), b"").unwrap();
    check_refused(&path("empty.safetensors"), None, &["is empty"]);
    std::fs::write(path("text.safetensors"), "not a model at all").unwrap();
    check_refused(&path("text.safetensors"), None, &["neither a safetensors nor a GGUF file"]);
    write_file(&path("lora.safetensors"), one("lora_unet_input_blocks_4_1_proj_in.lora_down.weight"));
    check_refused(&path("lora.safetensors"), None, &["is a LoRA and not a model"]);
    write_file(&path("other.safetensors"), one("model.embed_tokens.weight"));
    check_refused(&path("other.safetensors"), None, &["such as `model.embed_tokens.weight`", "FLUX.1"]);
    // A header of 0x280 bytes makes a file begin as a pickle of protocol 2 does.
    let header = format!("{:<640}", json!({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).to_string());
    std::fs::write(path("640.safetensors"), [&640u64.to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat()).unwrap();
    check_refused(&path("640.safetensors"), None, &["such as `x`, of no model that is known"]);
    let mut edm = assemble("sdxl-b", "sdxl-b");
    edm.extend(one("edm_mean"));
    write_file(&path("edm.safetensors"), edm);
    check_refused(&path("edm.safetensors"), Some(&checkpoint("sdxl-b")), &["holds `edm_mean`"]);

    let mut gguf = std::fs::read(gguf_file()).unwrap();
    let at = gguf.windows(4).position(|bytes| bytes == b"flux").unwrap();
    gguf[at..at + 4].copy_from_slice(b"qwen");
    std::fs::write(path("words.gguf"), &gguf).unwrap();
    check_refused(&path("words.gguf"), None, &["is a GGUF file of architecture `qwen`"]);
    gguf[at..at + 4].copy_from_slice(b"flux");
    gguf.truncate(gguf.len() - 100);
    std::fs::write(path("cut.gguf"), &gguf).unwrap();
    check_refused(&path("cut.gguf"), None, &["is not a sound GGUF file", "the file ends before"]);
    check_refused(&path("absent.gguf"), None, &["is neither a folder nor a file"]);
}

// --- making files and pictures ---------------------------------------------------------------------------------------

/// As `single-files/{names}.names` says.
fn assemble(case: &str, names: &str) -> HashMap<String, Tensor> {
    assembled(case, &format!("single-files/{names}"))
}

fn card(model: &LoadedModel) -> &DiffusionCard {
    match &model.card {
        ModelCard::Diffusion(card) => card,
        ModelCard::Text(_) => panic!("makes pictures"),
    }
}

/// A run of `single-files/golden.json`.
fn request(run: &str, card: &DiffusionCard) -> DiffusionRequest {
    let run = &golden_json("single-files")[run];
    let size = |field: &str| run[field].as_u64().map(|value| value as usize);
    let options = Options::default()
        .with(&PROMPT, run["prompt"].as_str().unwrap().to_owned())
        .with(&NEGATIVE_PROMPT, run["negative_prompt"].as_str().map(str::to_owned))
        .with(&WIDTH, size("width"))
        .with(&HEIGHT, size("height"))
        .with(&NUM_INFERENCE_STEPS, size("num_inference_steps"))
        .with(&GUIDANCE_SCALE, run["guidance_scale"].as_f64())
        .with(&SEED, run["seed"].as_u64())
        .with(&MAX_SEQUENCE_LENGTH, size("max_sequence_length"));
    card.resolve(&options, 0).unwrap()
}

#[track_caller]
fn assert_picture(what: &str, found: &Frame, expected: &Tensor) {
    let found = psnr(&found.rgb, &expected.flatten_all().unwrap().to_vec1::<u8>().unwrap());
    println!("{what}: {found:.1} dB");
    assert!(found >= MIN_PSNR, "{what}: {found:.1} dB");
}

fn picture(model: &mut LoadedModel, request: DiffusionRequest) -> Frame {
    pictures(model, &[request]).remove(0)
}

/// All requests at once.
fn pictures(model: &mut LoadedModel, requests: &[DiffusionRequest]) -> Vec<Frame> {
    for (id, request) in requests.iter().enumerate() {
        model.runner.submit(SessionId(id as u64), Request::Diffusion(request.clone())).unwrap();
    }
    let (mut events, mut frames) = (Events::default(), HashMap::new());
    while model.runner.next().is_some() {
        model.runner.step(&mut events).unwrap();
        for (id, event) in events.drain() {
            match event {
                Event::Frames(mut new) => drop(frames.insert(id, new.remove(0))),
                Event::Failed(error) => panic!("session {id:?}: {error}"),
                _ => (),
            }
        }
    }
    (0..requests.len()).map(|id| frames.remove(&SessionId(id as u64)).unwrap()).collect()
}
