//! Language models in the formats of quantised checkpoints, beside transformers with the numbers that their codes stand for.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use tale_models::checkpoint::{LoadFormat, Manifest};
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::families::causal_lm::DecoderLm;
use tale_models::family::LoadOptions;
use tale_models::layers::decoder::DecoderInput;
use tale_models::loading;
use tale_models::runner::text::model::CausalLm;

use crate::files::{assert_clean, cpu, inspect, write_file};
use crate::support::{assert_close, case_dir, copy_folder, golden_json, golden_tensors};
use crate::text::{SharedCaches, network_of};

pub const CASE: &str = "quantised";
const TOLERANCE: f64 = 1e-4;

/// By name, with their families.
pub fn variants() -> Vec<(String, String)> {
    let golden = golden_json(CASE);
    let variants = golden["variants"].as_object().unwrap().iter();
    variants.map(|(name, facts)| (name.clone(), facts["family"].as_str().unwrap().to_owned())).collect()
}

/// The checkpoint of a variant: what it has in common with others, its own tensors, and its field in the configuration.
pub fn checkpoint(name: &str) -> tempfile::TempDir {
    let facts = &golden_json(CASE)["variants"][name];
    let (family, tokenizer) = (facts["family"].as_str().unwrap(), facts["tokenizer"].as_str().unwrap());
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&case_dir(tokenizer).join("checkpoint"), folder.path());
    crate::files::remove_weights(folder.path());
    let own = case_dir(CASE);
    let read = |path: String| candle_core::safetensors::load(own.join(path), &Device::Cpu).unwrap();
    let mut config: Value = json(&own.join(format!("base-{family}.json")));
    config["quantization_config"] = json(&own.join(format!("{name}.json")));
    // Those of the tokenizer's own checkpoint name tokens that these have too.
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    // Codes of formats that candle does not know are in a file of their own, as they are.
    let mut base = read(format!("base-{family}.safetensors"));
    let names = std::fs::read(own.join(format!("{name}.safetensors"))).unwrap();
    let quantised = safetensors::SafeTensors::deserialize(&names).unwrap();
    base.retain(|tensor, _| quantised.tensor(tensor).is_err());
    write_file(&folder.path().join("model-00001-of-00002.safetensors"), base.clone());
    std::fs::copy(own.join(format!("{name}.safetensors")), folder.path().join("model-00002-of-00002.safetensors"))
        .unwrap();
    let place = |file: &'static str| move |tensor: &str| (tensor.to_owned(), json!(file));
    let first = base.keys().map(|name| place("model-00001-of-00002.safetensors")(name));
    let second = quantised.names().into_iter().map(place("model-00002-of-00002.safetensors"));
    let weight_map: serde_json::Map<String, Value> = first.chain(second).collect();
    let index = json!({"weight_map": weight_map}).to_string();
    std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    folder
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub fn network(name: &str, family: &str, placement: &Placement) -> DecoderLm {
    network_of(family, &Manifest::read(checkpoint(name).path()).unwrap(), placement)
}

pub fn prompt(golden: &HashMap<String, Tensor>, name: &str) -> Vec<u32> {
    golden[&format!("{name}.prompt")].to_dtype(DType::U32).unwrap().to_vec1().unwrap()
}

/// Logits of all positions, some tokens at a time.
fn logits(model: &DecoderLm, prompt: &[u32], chunk: usize) -> Tensor {
    let mut shared = SharedCaches::new(model, prompt.len());
    let table = shared.table(prompt.len());
    let chunks = prompt.chunks(chunk).enumerate().map(|(index, tokens)| {
        let mut input = DecoderInput::default();
        input.push(tokens, index * chunk, &table);
        input.want_all_logits();
        model.forward(&input, shared.caches()).unwrap().unwrap()
    });
    Tensor::cat(&chunks.collect::<Vec<_>>(), 0).unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn logits_are_those_of_the_dequantised_weights_in_any_chunking() {
    let golden = golden_tensors(CASE);
    for (name, family) in variants() {
        let model = network(&name, &family, &cpu());
        let prompt = prompt(&golden, &name);
        let whole = logits(&model, &prompt, prompt.len());
        let expected = &golden[&format!("{name}.logits")];
        let kept = expected.dim(0).unwrap();
        assert_close(&name, &whole.narrow(0, prompt.len() - kept, kept).unwrap(), expected, TOLERANCE);
        for chunk in [1, 5] {
            assert!(bits(&logits(&model, &prompt, chunk)) == bits(&whole), "{name}: chunks of {chunk}");
        }
    }
}

#[test]
fn greedy_tokens_are_those_of_the_reference() {
    let golden = golden_tensors(CASE);
    for (name, family) in variants() {
        let model = network(&name, &family, &cpu());
        let expected: Vec<u32> = golden[&format!("{name}.greedy")].to_dtype(DType::U32).unwrap().to_vec1().unwrap();
        let mut tokens = prompt(&golden, &name);
        let start = tokens.len();
        for _ in &expected {
            let last = logits(&model, &tokens, tokens.len()).get(tokens.len() - 1).unwrap();
            tokens.push(last.argmax(0).unwrap().to_scalar().unwrap());
        }
        assert_eq!(tokens[start..], expected, "{name}");
    }
}

/// The format with its settings, and how many values are kept so.
#[test]
fn inspection_says_bits_and_groups_and_what_is_kept() {
    for (name, expected) in [
        ("gptq-4-sym", "GPTQ 4 bits, groups of 32"),
        ("gptq-4-v2-rows", "GPTQ 4 bits, whole rows"),
        ("gptq-8-v2-act", "GPTQ 8 bits, groups of 32"),
        ("awq", "AWQ 4 bits, groups of 32"),
        ("ct-4-asym", "compressed-tensors 4 bits, groups of 16"),
        ("ct-int8", "compressed-tensors 8 bits, whole rows"),
        ("ct-fp8-block", "compressed-tensors fp8, blocks of 48x40"),
        ("fp8-static", "fp8, whole matrices"),
        ("fp8-block", "fp8, blocks of 40x48"),
        ("fp8-rows", "fp8, whole rows"),
    ] {
        let folder = checkpoint(name);
        let inspection = inspect(folder.path(), None);
        assert_clean(&inspection);
        let (_, report) = &inspection.components[0];
        assert!(report.dtypes.contains_key(expected), "{name}: {:?}", report.dtypes);
        assert!(!report.dtypes.contains_key("I32"), "{name}: codes are no parameters: {:?}", report.dtypes);
        // Two tables of 492 x 64, matrices of two layers, norms.
        let layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64;
        if variants().iter().any(|(of, family)| of == name && family == "llama") {
            assert_eq!(report.num_parameters, 2 * 492 * 64 + 2 * layer + 64, "{name}");
        }
    }
    for (name, _) in variants() {
        let folder = checkpoint(&name);
        let inspection = inspect(folder.path(), None);
        assert_clean(&inspection);
        let loaded = loading::load(folder.path(), &cpu(), &LoadOptions::default(), &mut |_| ()).unwrap();
        assert_eq!(loaded.resident_bytes, inspection.resident_bytes(), "{name}");
    }
}

/// Without files too.
#[test]
fn made_up_weights_take_what_the_format_takes() {
    for name in ["gptq-4-sym", "awq", "ct-4-sym", "ct-fp8-channel", "fp8-block"] {
        let folder = checkpoint(name);
        let options = LoadOptions { load_format: LoadFormat::Dummy, ..LoadOptions::default() };
        let dummy = loading::inspect(folder.path(), &cpu(), &options).unwrap();
        assert_clean(&dummy);
        let (_, made_up) = &dummy.components[0];
        let files = inspect(folder.path(), None);
        let (_, read) = &files.components[0];
        assert_eq!(made_up.num_parameters, read.num_parameters, "{name}");
        // Tables and norms are made up in bf16 as they are published in f16; scales of floats in f16.
        let (made_up, read) = (made_up.resident_bytes as f64, read.resident_bytes as f64);
        assert!((0.95..1.05).contains(&(made_up / read)), "{name}: {made_up} and {read}");
        loading::load(folder.path(), &cpu(), &options, &mut |_| ()).unwrap();
    }
}

/// Changes of the configuration, and what is said of them.
#[test]
fn a_configuration_that_does_not_fit_its_tensors_is_refused_by_name() {
    for (name, changes, expected) in [
        ("gptq-4-sym", json!({"bits": 8}), "q_proj.qzeros"),
        ("gptq-4-sym", json!({"group_size": 16}), "q_proj.scales"),
        ("gptq-4-sym", json!({"quant_method": "awq"}), "q_proj.qweight"),
        ("gptq-4-uneven", json!({"group_size": 32}), "q_proj.scales"),
        ("gptq-4-asym-act", json!({"group_size": 32}), "q_proj.scales"),
        ("gptq-4-some", json!({"modules_in_block_to_quantize": null}), "o_proj.weight` is plain"),
        ("gptq-4-sym", json!({"lm_head": true}), "lm_head.weight` is plain"),
        ("awq", json!({"group_size": 64}), "q_proj.scales"),
        ("awq", json!({"modules_to_not_convert": ["q_proj"]}), "q_proj.qweight` is of a quantised matrix"),
        ("awq", json!({"quant_method": "compressed-tensors"}), "config_groups: is absent"),
        ("ct-4-sym", json!({"ignore": []}), "lm_head.weight` is plain"),
        ("ct-4-sym", json!({"ignore": ["re:.*"]}), "q_proj.weight_packed` is of a quantised matrix"),
        ("ct-fp8-channel", json!({"ignore": ["re:.*"]}), "q_proj.weight_scale` is of a quantised matrix"),
        ("fp8-block", json!({"weight_block_size": [64, 64]}), "q_proj.weight_scale_inv"),
        ("fp8-static", json!({"modules_to_not_convert": ["q_proj"]}), "q_proj.weight_scale` is of a quantised matrix"),
    ] {
        let folder = checkpoint(name);
        let path = folder.path().join("config.json");
        let mut config = json(&path);
        for (field, value) in changes.as_object().unwrap() {
            config["quantization_config"][field] = value.clone();
        }
        std::fs::write(path, config.to_string()).unwrap();
        check_refused(&folder, &format!("{name} with {changes}"), expected);
    }
    // Without the field: the matrices are missing.
    let folder = checkpoint("gptq-4-sym");
    let mut config = json(&folder.path().join("config.json"));
    config["quantization_config"] = Value::Null;
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    check_refused(&folder, "no field", "q_proj.qweight` is of a quantised matrix");
}

/// Tensors of a checkpoint that lie.
#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    let i32s = |values: &[i32]| Tensor::new(values, &Device::Cpu).unwrap();
    let layer = "model.layers.0.self_attn.q_proj";
    for (name, tensor, value, expected) in [
        ("gptq-4-asym-act", "g_idx", i32s(&[0; 64]), "g_idx` names other groups than 4 of 16 columns each"),
        ("gptq-4-asym-act", "g_idx", i32s(&[9; 64]), "g_idx` names other groups"),
        ("gptq-4-asym-act", "g_idx", i32s(&[0; 63]), "g_idx"),
        (
            "gptq-4-sym",
            "scales",
            Tensor::full(f32::INFINITY, (2, 64), &Device::Cpu).unwrap(),
            "scales` holds scales that are not finite",
        ),
        (
            "gptq-4-sym",
            "qzeros",
            Tensor::zeros((2, 8), DType::F32, &Device::Cpu).unwrap(),
            "qzeros` is of F32; read is I32",
        ),
        (
            "gptq-4-sym",
            "qweight",
            Tensor::zeros((8, 64), DType::F32, &Device::Cpu).unwrap(),
            "qweight` is of F32; read is I32",
        ),
        ("ct-4-sym", "weight_shape", Tensor::new(&[64i64, 60], &Device::Cpu).unwrap(), "weight_shape` is [64, 60]"),
        (
            "fp8-static",
            "weight",
            Tensor::zeros((64, 64), DType::F16, &Device::Cpu).unwrap(),
            "weight` is of F16; read is F8_E4M3",
        ),
    ] {
        let folder = checkpoint(name);
        let path = folder.path().join("model-00002-of-00002.safetensors");
        replace(&path, &format!("{layer}.{tensor}"), &value);
        check_refused(&folder, &format!("{name} {tensor}"), expected);
    }
}

/// Writes the file again with another tensor.
fn replace(path: &Path, name: &str, value: &Tensor) {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let scratch = tempfile::NamedTempFile::new().unwrap();
    candle_core::safetensors::save(&HashMap::from([(name.to_owned(), value.clone())]), scratch.path()).unwrap();
    let new = std::fs::read(scratch.path()).unwrap();
    let new = safetensors::SafeTensors::deserialize(&new).unwrap();
    let tensors = file.tensors().into_iter().map(|(of, view)| match of == name {
        true => (of, new.tensor(name).unwrap()),
        false => (of, view),
    });
    safetensors::serialize_to_file(tensors, None, path).unwrap();
}

#[track_caller]
fn check_refused(folder: &tempfile::TempDir, what: &str, expected: &str) {
    let error = loading::load(folder.path(), &cpu(), &LoadOptions::default(), &mut |_| ()).err();
    let error = error.unwrap_or_else(|| panic!("{what}: is loaded")).to_string();
    assert!(error.contains(expected), "{what}: expected `{expected}` in: {error}");
}

/// A GPU gets the matrices in 16 bits for a moment.
#[test]
fn a_gpu_has_room_for_the_largest_dequantised_matrix() {
    let folder = checkpoint("gptq-4-sym");
    let on_gpu = Placement::in_host_memory(DeviceSpec::Cuda(0), WeightDtype::Auto);
    let manifest = Manifest::read(folder.path()).unwrap();
    let weights = manifest.whole().weights(&on_gpu).unwrap();
    let config = tale_models::families::llama::decoder_config(&manifest).unwrap();
    DecoderLm::load(&weights, config).unwrap();
    let widened = 64 * 96 * 2;
    assert_eq!(weights.dequantised_bytes(), widened);

    let options = LoadOptions { kv_cache_bytes: 1 << 18, ..LoadOptions::default() };
    let loaded = tale_models::load(folder.path(), &on_gpu, &options, &mut |_| ()).unwrap();
    let inspection = tale_models::loading::inspect(folder.path(), &on_gpu, &options).unwrap();
    assert_eq!((loaded.widened_bytes, inspection.widened_bytes), (widened, widened));
    let weight_bytes: usize = inspection.components.iter().map(|(_, report)| report.resident_bytes).sum();
    assert_eq!(loaded.resident_bytes, weight_bytes + inspection.cache_bytes + widened);
    assert_eq!(inspection.resident_bytes(), loaded.resident_bytes);
    // The CPU widens rows that its caches hold.
    let on_cpu = Placement::in_host_memory(DeviceSpec::Cpu, WeightDtype::Auto);
    assert_eq!(tale_models::loading::inspect(folder.path(), &on_cpu, &options).unwrap().widened_bytes, 0);
}

/// Formats of quantised language models are not read of a pipeline's components, its text encoders among them: what the
/// configuration says is refused by its name, and not by what a tensor lacks.
#[test]
fn quantised_components_of_pipelines_are_refused_by_name() {
    let group = json!({"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}});
    let fields = [
        json!({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true, "version": "gemm"}),
        json!({"quant_method": "gptq", "bits": 4, "group_size": 128}),
        json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}),
        json!({"quant_method": "fp8", "activation_scheme": "dynamic"}),
        json!({"quant_method": "bitsandbytes", "load_in_4bit": true}),
    ];
    for (case, component) in [
        ("flux-schnell", "text_encoder"),
        ("flux-schnell", "text_encoder_2"),
        ("flux-schnell", "transformer"),
        ("wan-a", "text_encoder"),
        ("cogvideox-a", "text_encoder"),
        ("hunyuan-video-b", "text_encoder"),
        ("sdxl-a", "text_encoder_2"),
    ] {
        for field in &fields {
            let folder = tempfile::tempdir().unwrap();
            copy_folder(&case_dir(case).join("checkpoint"), folder.path());
            let path = folder.path().join(component).join("config.json");
            let mut config: Value = json(&path);
            config["quantization_config"] = field.clone();
            std::fs::write(&path, config.to_string()).unwrap();
            let inspection = inspect(folder.path(), None);
            let problem = inspection.into_problem().expect("refused").to_string();
            let place = format!("{component}/config.json: quantization_config");
            assert!(problem.contains(&place), "{case} {field}: {problem}");
        }
    }
}
