//! HunyuanVideo in other files than diffusers': single files and components under the original names and ComfyUI's, eight
//! bits, GGUF.
//!
//! Files are made here from the folders of the other cases, as `hunyuan-files/*.names` says, from which diffusers has read the
//! same tensors. `published-files/*.txt` are names and shapes of the files that everybody downloads.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use tale_models::checkpoint::LoadFormat;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::{DiffusionCard, DiffusionRequest};
use tale_models::family::{LoadOptions, LoadedModel, TextEncoders};
use tale_models::loading;
use tale_models::presets::{Configurations, Preset};
use tale_models::request::{Frame, Phase, Request};
use tale_models::{ModelCard, ModelSource};

use crate::files::{
    assembled, assert_clean, check_refused, checkpoint, cpu, inspect, load, published, read_component, remove_weights,
    write_empty, write_file,
};
use crate::support::{case_dir, clips, copy_folder, golden_json, golden_tensors, psnr};
use crate::{hunyuan_video, hunyuan_video_pictures};

const CASE: &str = "hunyuan-files";
const CASES: [&str; 4] = ["hunyuan-video-a", "hunyuan-video-b", "hunyuan-video-i2v", "hunyuan-video-i2v-33ch"];
/// Half of one matrix moves the clips to 54 dB at the least.
const MIN_PSNR: f64 = 60.0;

// --- published files -------------------------------------------------------------------------------------------------

/// Every tensor of the published files has its place in the networks of the published configurations, and the networks ask
/// for no other: the transformer as a single file, the other networks alone in the folders of its base.
#[test]
fn published_files_fit_the_published_configurations() {
    for language_model in ["llava_llama3", "llava-llama-3-8b-v1_1-gguf"] {
        let base = Configurations::of_preset("hunyuanvideo".parse::<&Preset>().unwrap()).unwrap();
        check_published(&base, language_model, "hunyuan_video_720_cfgdistill", 12_821_012_544);
        let base = Configurations::of_preset("hunyuanvideo-i2v".parse::<&Preset>().unwrap()).unwrap();
        let sight = base.path().join("image_encoder");
        std::fs::create_dir(&sight).unwrap();
        write_empty(&sight.join("llava_llama3_vision.safetensors"), &published("llava_llama3_vision"));
        // The transformer whose first frame is the picture has the tensors of the one from text.
        check_published(&base, language_model, "hunyuan_video_720_cfgdistill", 12_821_012_544);
        let config = base.path().join("transformer/config.json");
        let mut fields: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        fields["in_channels"] = json!(33);
        fields["guidance_embeds"] = json!(false);
        fields["image_condition_type"] = json!("latent_concat");
        std::fs::write(config, fields.to_string()).unwrap();
        check_published(&base, language_model, "hunyuan_video_I2V_720", 12_810_991_680);
    }
}

#[track_caller]
fn check_published(base: &Configurations, language_model: &str, transformer: &str, parameters: usize) {
    let vae = if language_model == "llava_llama3" { "hunyuan_video_vae" } else { "hunyuan_video_vae_bf16" };
    for (component, name) in [("text_encoder", language_model), ("text_encoder_2", "clip_l"), ("vae", vae)] {
        remove_weights(&base.path().join(component));
        write_empty(&base.path().join(component).join(format!("{name}.safetensors")), &published(name));
    }
    for beginning in ["", "model.diffusion_model."] {
        let path = base.path().join("anything.safetensors");
        let tensors = published(transformer).into_iter().map(|(name, shape)| (format!("{beginning}{name}"), shape));
        write_empty(&path, &tensors.collect());
        let inspection = inspect(&path, None);
        assert_clean(&inspection);
        let report = |name: &str| &inspection.components.iter().find(|(component, _)| component == name).unwrap().1;
        assert_eq!(report("transformer").num_parameters, parameters);
    }
}

// --- other names -----------------------------------------------------------------------------------------------------

#[test]
fn files_of_other_names_make_the_clips_of_their_folders() {
    let files = [("", ""), ("", "model.diffusion_model."), ("-comfy", "model.model."), ("-comfy", "model.")];
    for (case, (names, beginning)) in CASES.into_iter().zip(files) {
        let base = others(case);
        let path = base.path().join("model.safetensors");
        let mut tensors = assembled(case, &format!("{CASE}/{case}{names}"));
        if beginning == "model." {
            tensors = tensors.into_iter().map(|(name, tensor)| (as_saved_today(&name), tensor)).collect();
        }
        write_file(&path, below(beginning, tensors));
        assert_clean(&inspect(&path, None));
        check_clips(case, load(&path, None, WeightDtype::Auto));
    }
}

/// The transformer too may be such a file in its own folder, with whatever the names begin.
#[test]
fn a_folder_may_have_any_component_under_other_names() {
    for (case, names, beginning) in
        [("hunyuan-video-a", "-comfy", "model.model."), ("hunyuan-video-i2v-33ch", "", "model.diffusion_model.")]
    {
        let base = others(case);
        let tensors = below(beginning, assembled(case, &format!("{CASE}/{case}{names}")));
        write_file(&base.path().join("transformer/hunyuan_video_bf16.safetensors"), tensors);
        assert_clean(&inspect(base.path(), None));
        check_clips(case, load(base.path(), None, WeightDtype::Auto));
        check_clips(case, load_without_encoders(base.path()));
    }
}

/// The transformer's own file of a diffusers folder, over a base of the same pipeline; and one file with all networks.
#[test]
fn a_file_may_have_todays_names_or_all_networks() {
    let dir = tempfile::tempdir().unwrap();
    for case in ["hunyuan-video-b", "hunyuan-video-i2v"] {
        let base = tempfile::tempdir().unwrap();
        copy_folder(&checkpoint(case), base.path());
        remove_weights(&base.path().join("transformer"));
        let path = dir.path().join("transformer.safetensors");
        write_file(&path, read_component(&checkpoint(case).join("transformer")));
        assert_clean(&inspect(&path, Some(base.path())));
        check_clips(case, load(&path, Some(base.path()), WeightDtype::Auto));
    }
    let case = "hunyuan-video-a";
    let base = Configurations::of_folder(&checkpoint(case)).unwrap();
    for component in ["text_encoder", "transformer"] {
        remove_weights(&base.path().join(component));
    }
    let mut all = below("model.diffusion_model.", assembled(case, &format!("{CASE}/{case}")));
    all.extend(below("text_encoders.llama.transformer.", assembled(case, &format!("{CASE}/{case}-llama"))));
    let clip = read_component(&checkpoint(case).join("text_encoder_2"));
    all.extend(below("text_encoders.clip_l.transformer.", clip));
    all.extend(below("vae.", assembled(case, &format!("{CASE}/{case}-vae"))));
    let path = base.path().join("all.safetensors");
    write_file(&path, all);
    assert_clean(&inspect(&path, None));
    check_clips(case, load(&path, None, WeightDtype::Auto));
}

/// A folder whose networks but the transformer are files as ComfyUI has them: the language model by itself, what sees
/// pictures in a folder of its own.
fn others(case: &str) -> Configurations {
    let base = Configurations::of_folder(&checkpoint(case)).unwrap();
    // An index of shards names files that are not there.
    remove_weights(&base.path().join("transformer"));
    let language_model = assembled(case, &format!("{CASE}/{case}-llama"));
    write_file(&base.path().join("text_encoder/llava_llama3.safetensors"), language_model);
    if case_dir(CASE).join(format!("{case}-sight.names")).exists() {
        let sight = base.path().join("image_encoder");
        std::fs::create_dir(&sight).unwrap();
        write_file(&sight.join("llava_llama3_vision.safetensors"), assembled(case, &format!("{CASE}/{case}-sight")));
    }
    let clip = read_component(&checkpoint(case).join("text_encoder_2"));
    write_file(&base.path().join("text_encoder_2/clip_l.safetensors"), clip);
    // ComfyUI's names, or the original ones, which are diffusers' and may have a beginning.
    let vae = match case {
        "hunyuan-video-a" | "hunyuan-video-i2v" => assembled(case, &format!("{CASE}/{case}-vae")),
        _ => below("vae.", read_component(&checkpoint(case).join("vae"))),
    };
    write_file(&base.path().join("vae/hunyuan_video_vae_bf16.safetensors"), vae);
    base
}

/// ComfyUI's names since its norms have weights.
fn as_saved_today(name: &str) -> String {
    name.strip_suffix("_norm.scale").map_or_else(|| name.to_owned(), |layer| format!("{layer}_norm.weight"))
}

fn below(beginning: &str, tensors: HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    tensors.into_iter().map(|(name, tensor)| (format!("{beginning}{name}"), tensor)).collect()
}

/// The first clip of a case.
#[track_caller]
fn check_clips(case: &str, mut model: LoadedModel) {
    let requests = match case {
        "hunyuan-video-a" | "hunyuan-video-b" => hunyuan_video::requests(case, card(&model)),
        _ => hunyuan_video_pictures::requests(case, card(&model)),
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

/// diffusers computes with the bytes' numbers times their scales. The language model of the first is in eight bits too.
#[test]
fn eight_bits_make_the_clips_of_their_numbers() {
    for (format, dtype) in [("e4m3", "F8_E4M3"), ("e5m2", "F8_E5M2")] {
        let base = eight_bits_base(format);
        let path = case_dir(CASE).join(format!("transformer-{format}.safetensors"));
        let inspection = inspect(&path, Some(base.path()));
        assert_clean(&inspection);
        for component in ["transformer", "text_encoder"].into_iter().take(if format == "e4m3" { 2 } else { 1 }) {
            let (_, report) = inspection.components.iter().find(|(name, _)| name == component).unwrap();
            assert!(report.dtypes.contains_key(dtype), "{:?}", report.dtypes);
        }
        let mut model = load(&path, Some(base.path()), WeightDtype::Auto);
        assert_eq!(model.resident_bytes, inspection.resident_bytes());
        let request = request(card(&model));
        let found = clips(&mut *model.runner, &[request]).remove(0);
        check_frames(format, &found, &golden_tensors(CASE)[&format!("{format}.frames")]);
    }
}

/// With encoders that are read when prompts come.
fn load_without_encoders(path: &Path) -> LoadedModel {
    let options = LoadOptions { text_encoders: TextEncoders::OnDemand, ..LoadOptions::default() };
    tale_models::load(ModelSource::at(path), &cpu(), &options, &mut |_| ()).unwrap()
}

fn eight_bits_base(format: &str) -> tempfile::TempDir {
    let base = tempfile::tempdir().unwrap();
    copy_folder(&checkpoint("hunyuan-video-a"), base.path());
    remove_weights(&base.path().join("transformer"));
    if format == "e4m3" {
        remove_weights(&base.path().join("text_encoder"));
        let encoder = case_dir(CASE).join("text_encoder-e4m3.safetensors");
        std::fs::copy(encoder, base.path().join("text_encoder/llava_llama3_fp8_scaled.safetensors")).unwrap();
    }
    base
}

// --- GGUF ------------------------------------------------------------------------------------------------------------

/// diffusers computes with what gguf dequantises from the transformer's file, and what transformers reads from that of the
/// language model, the rows of whose queries and keys are in another order.
#[test]
fn gguf_files_make_the_clip_of_their_dequantised_weights() {
    let base = gguf_base();
    let path = case_dir(CASE).join("transformer.gguf");
    assert_clean(&inspect(&path, Some(base.path())));
    let mut model = load(&path, Some(base.path()), WeightDtype::Auto);
    let request = request(card(&model));
    let found = clips(&mut *model.runner, std::slice::from_ref(&request)).remove(0);
    check_frames("gguf", &found, &golden_tensors(CASE)["gguf.frames"]);

    // In the folder of its component, and with the language model read when prompts come.
    std::fs::copy(&path, base.path().join("transformer/hunyuan-video-t2v-720p-Q4_K_M.gguf")).unwrap();
    let mut model = load_without_encoders(base.path());
    let found = clips(&mut *model.runner, &[request]).remove(0);
    check_frames("gguf in its folder", &found, &golden_tensors(CASE)["gguf.frames"]);
}

#[test]
fn gguf_weights_stay_quantised_and_the_largest_is_dequantised_for_a_moment() {
    let (base, path) = (gguf_base(), case_dir(CASE).join("transformer.gguf"));
    let inspection = inspect(&path, Some(base.path()));
    let report = |name: &str| &inspection.components.iter().find(|(component, _)| component == name).unwrap().1;
    for (component, file, dtypes) in [
        (
            "transformer",
            "transformer.gguf",
            &["Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16", "F32"][..],
        ),
        ("text_encoder", "text_encoder.gguf", &["Q8_0", "Q4_0", "Q5_1", "F16", "F32"]),
    ] {
        let on_disk = std::fs::metadata(case_dir(CASE).join(file)).unwrap().len() as usize;
        for dtype in dtypes {
            assert!(report(component).dtypes.contains_key(*dtype), "{component} {dtype}");
        }
        // The table of embeddings too, which is looked up and not multiplied with. Not all of an encoder is read.
        let resident = report(component).resident_bytes;
        assert!(resident <= on_disk && resident > on_disk * 2 / 5, "{component}: {resident} of {on_disk}");
    }
    // On a GPU a product has its whole matrix in 16 bits for a moment, on the way in f16.
    let on_gpu = Placement::in_host_memory(DeviceSpec::Cuda(0), WeightDtype::Auto);
    let phase = |phase: Phase, load_format: LoadFormat| {
        let source = ModelSource { base: Some(base.path().to_owned()), ..ModelSource::at(&path) };
        let options = LoadOptions { load_format, ..LoadOptions::default() };
        let (_, model) = loading::plan(source, &on_gpu, &options).unwrap();
        let model = model.expect("can be built");
        let plan = model.runner.plan(&Request::Diffusion(request(card(&model))));
        plan.phases().iter().find(|of| of.phase == phase).expect("has this phase").bytes
    };
    for (of, values) in [(Phase::Denoise, 6 * 64 * 64), (Phase::Encode, 68 * 32)] {
        assert_eq!(phase(of, LoadFormat::Auto) - phase(of, LoadFormat::Dummy), values * (2 + 2), "{of:?}");
    }
}

/// `hunyuan-video-a` with the configurations of another transformer and another language model, whose file lies in its
/// folder.
fn gguf_base() -> tempfile::TempDir {
    let base = tempfile::tempdir().unwrap();
    copy_folder(&checkpoint("hunyuan-video-a"), base.path());
    for component in ["transformer", "text_encoder"] {
        remove_weights(&base.path().join(component));
        let config = case_dir(CASE).join(format!("gguf-{component}/config.json"));
        std::fs::copy(config, base.path().join(component).join("config.json")).unwrap();
    }
    let encoder = case_dir(CASE).join("text_encoder.gguf");
    std::fs::copy(encoder, base.path().join("text_encoder/llava-llama-3-8b-v1_1-Q4_K_M.gguf")).unwrap();
    base
}

// --- refusals --------------------------------------------------------------------------------------------------------

#[test]
fn a_base_that_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let write = |case: &str, names: &str| {
        let path = dir.path().join(format!("{case}{names}.safetensors"));
        write_file(&path, assembled(case, &format!("{CASE}/{case}{names}")));
        path
    };
    let (text, comfy) = (write("hunyuan-video-a", ""), write("hunyuan-video-a", "-comfy"));
    check_refused(&text, None, &["holds HunyuanVideo and needs a base", "HunyuanVideoPipeline"]);
    check_refused(&comfy, Some(&checkpoint("flux-dev")), &["is a FluxPipeline", "HunyuanVideo under ComfyUI's names"]);
    check_refused(&text, Some(&checkpoint("wan-a")), &["is a WanPipeline", "holds HunyuanVideo"]);
    // Names and shapes are those of the file.
    check_refused(&text, Some(&checkpoint("hunyuan-video-b")), &["`double_blocks.0.img_mod.linear.bias`", "[144]"]);
    check_refused(&comfy, Some(&checkpoint("hunyuan-video-b")), &["`double_blocks.0.img_mod.lin.bias`", "[144]"]);
    let behind = write("hunyuan-video-i2v-33ch", "");
    check_refused(
        &behind,
        Some(&checkpoint("hunyuan-video-i2v")),
        &["`double_blocks.1.img_mod.linear.bias` is missing"],
    );
    // FLUX.1 has blocks of the same names.
    let flux = dir.path().join("flux.safetensors");
    write_file(&flux, assembled("flux-dev", "single-files/flux-dev"));
    check_refused(&flux, Some(&checkpoint("hunyuan-video-a")), &["is a HunyuanVideoPipeline", "holds FLUX.1"]);
    // A network with more than this one.
    let mut more = assembled("hunyuan-video-a", &format!("{CASE}/hunyuan-video-a"));
    more.insert("byt5_in.fc1.weight".to_owned(), zeros(&[24, 24]));
    let path = dir.path().join("hunyuan_video_1.5.safetensors");
    write_file(&path, more);
    check_refused(&path, Some(&checkpoint("hunyuan-video-a")), &["has 1 tensors, such as `byt5_in", "another base"]);
    // What LoRA files hold.
    let lora = dir.path().join("lora.safetensors");
    write_file(&lora, HashMap::from([("double_blocks.0.img_attn_qkv.lora_A.weight".to_owned(), zeros(&[4, 24]))]));
    check_refused(&lora, Some(&checkpoint("hunyuan-video-a")), &["is a LoRA and not a model"]);
}

/// A language model by itself sees no picture.
#[test]
fn a_language_model_without_sight_is_refused_for_pictures() {
    let base = others("hunyuan-video-i2v");
    std::fs::remove_dir_all(base.path().join("image_encoder")).unwrap();
    let transformer = read_component(&checkpoint("hunyuan-video-i2v").join("transformer"));
    write_file(&base.path().join("transformer/transformer.safetensors"), transformer);
    let error = tale_models::load(ModelSource::at(base.path()), &cpu(), &LoadOptions::default(), &mut |_| ());
    let error = error.err().expect("is refused").to_string();
    assert!(error.contains("text_encoder") && error.contains("vision_tower"), "{error}");
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

/// The run of `hunyuan-files/golden.json`.
fn request(card: &DiffusionCard) -> DiffusionRequest {
    card.resolve(&hunyuan_video::options(&golden_json(CASE)["run"]), 0).unwrap()
}
