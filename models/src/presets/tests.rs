//! Presets held against what is published of them.

use super::*;
use crate::checkpoint::LoadFormat;
use crate::device::{DeviceSpec, Placement, WeightDtype};
use crate::family::LoadOptions;
use crate::loading::{self, Inspection};

fn inspect(folder: &Configurations) -> Inspection {
    let placement = Placement::in_host_memory(DeviceSpec::Cpu, WeightDtype::Auto);
    let options = LoadOptions { load_format: LoadFormat::Dummy, ..LoadOptions::default() };
    let inspection = loading::inspect(folder.path(), &placement, &options).expect("a known family");
    assert!(inspection.problem.is_none(), "{:?}", inspection.problem);
    inspection
}

fn preset(name: &str) -> Configurations {
    let preset: &Preset = name.parse().expect("is in the table");
    Configurations::of_preset(preset).expect("can be written")
}

/// Billions of parameters of a component.
#[track_caller]
fn check(name: &str, component: &str, published: f64) {
    let inspection = inspect(&preset(name));
    let found = inspection.components.iter().find(|(found, _)| found == component);
    let (_, report) = found.expect("the component is there");
    let billions = report.num_parameters as f64 / 1e9;
    assert!((billions / published - 1.0).abs() < 1e-3, "{name} {component}: {billions}, published {published}");
}

#[test]
fn parameters_are_those_published() {
    check("llama-3.1-8b", "", 8.030);
    check("llama-3.1-70b", "", 70.55);
    check("qwen2.5-7b", "", 7.616);
    check("qwen2.5-72b", "", 72.71);
    check("llama-3.1-70b-awq-int4", "", 70.55);
    check("llama-3.3-70b-w4a16", "", 70.55);
    // Rows of the feed-forward layers are filled up, so that groups can be shared out among cards.
    check("qwen2.5-72b-awq", "", 72.96);
    check("qwen2.5-72b-gptq-int4", "", 72.96);
    check("tinyllama-1.1b", "", 1.100);
    for (name, transformer) in [("flux.1-dev", 11.901), ("flux.1-schnell", 11.891)] {
        check(name, "transformer", transformer);
        check(name, "text_encoder", 0.1231);
        check(name, "text_encoder_2", 4.762);
        check(name, "vae", 0.0838);
    }
    check("sdxl", "unet", 2.5675);
    check("sdxl", "text_encoder", 0.1231);
    check("sdxl", "text_encoder_2", 0.6947);
    check("sdxl", "vae", 0.0837);
    for (name, transformer) in [
        ("wan2.1-t2v-1.3b", 1.419),
        ("wan2.1-t2v-14b", 14.288),
        ("wan2.1-i2v-14b", 16.395),
        ("wan2.1-flf2v-14b", 16.396),
    ] {
        check(name, "transformer", transformer);
        check(name, "text_encoder", 5.681);
    }
    // Learned positions (0.055) are counted; of the VAE its decoder alone is read where nothing begins from a picture.
    for (name, transformer, vae) in [
        ("cogvideox-2b", 1.6938, 0.1234),
        ("cogvideox-5b", 5.5703, 0.1234),
        ("cogvideox-5b-i2v", 5.6251, 0.2156),
        ("cogvideox1.5-5b", 5.5707, 0.1234),
        ("cogvideox1.5-5b-i2v", 5.5716, 0.2156),
    ] {
        check(name, "transformer", transformer);
        check(name, "text_encoder", 4.762);
        check(name, "vae", vae);
    }
}

#[test]
fn hunyuanvideo_has_the_parameters_of_its_size() {
    // Counted by torch from the classes; of the VAE the decoder. Two layers of the language model (0.4362) are not read.
    check("hunyuanvideo", "transformer", 12.821);
    check("hunyuanvideo", "text_encoder", 7.0690);
    check("hunyuanvideo", "text_encoder_2", 0.1231);
    check("hunyuanvideo", "vae", 0.14614);
    // Of the vision encoder's 24 layers the last is not read, nor is the language model's head.
    check("hunyuanvideo-i2v", "transformer", 12.821);
    check("hunyuanvideo-i2v", "text_encoder", 7.0690 + 0.2909 + 0.02098);
    check("hunyuanvideo-i2v", "text_encoder_2", 0.1231);
    check("hunyuanvideo-i2v", "vae", 0.24648);
}

/// Matrices of the blocks are kept in codes; embeddings, head and norms are not. A group of 128 values has a scale of 16 bits and
/// a zero of 8.
#[test]
fn presets_of_four_bits_take_four_bits() {
    for (name, kept, plain, values, bits) in [
        ("llama-3.1-70b-awq-int4", "AWQ 4 bits, groups of 128", "F16", 68.451, 4.1875),
        ("llama-3.3-70b-w4a16", "compressed-tensors 4 bits, groups of 128", "BF16", 68.451, 4.1875),
        ("qwen2.5-72b-awq", "AWQ 4 bits, groups of 128", "F16", 70.464, 4.1875),
        ("qwen2.5-72b-gptq-int4", "GPTQ 4 bits, groups of 128", "F16", 70.464, 4.1875),
    ] {
        let inspection = inspect(&preset(name));
        let [(_, report)] = &inspection.components[..] else { panic!("{name} is one network") };
        assert!(report.dtypes.len() == 2, "{name}: {report:?}");
        let (coded, others) = (report.dtypes[kept] as f64, report.dtypes[plain] as f64);
        assert!((coded / 1e9 / values - 1.0).abs() < 1e-3, "{name}: {coded} values in codes, published {values}");
        let bytes = coded * bits / 8.0 + others * 2.0;
        assert!((report.resident_bytes as f64 / bytes - 1.0).abs() < 1e-3, "{name}: {report:?}");
    }
}

/// Everything that stands in the table, so that an entry cannot be added and never read.
#[test]
fn every_preset_is_of_a_known_family_and_whole() {
    for entry in PRESETS {
        let folder = Configurations::of_preset(entry).expect("can be written");
        let problems = inspect(&folder).components.into_iter().flat_map(|(_, report)| report.problems);
        assert_eq!(problems.map(|problem| problem.to_string()).collect::<Vec<_>>(), [""; 0], "{}", entry.name);
        let docs = crate::testing::repository().join("docs/benchmarks.md");
        let docs = std::fs::read_to_string(docs).expect("docs/benchmarks.md is there");
        assert!(docs.contains(&format!("`{}`", entry.name)), "docs/benchmarks.md lacks `{}`", entry.name);
    }
    let Err(error) = "llama-9".parse::<&Preset>() else { panic!("is not in the table") };
    assert!(error.to_string().contains("known: llama-3.1-8b, "), "{error}");
}

#[test]
fn layers_are_cut_in_every_component() {
    let folder = preset("flux.1-dev");
    folder.keep_layers(2).expect("cut");
    let layers = |component: &str, field: &str| {
        let config: Value = read_json(&folder.path().join(component).join("config.json")).expect("is there");
        config[field].as_u64()
    };
    assert_eq!(layers("transformer", "num_layers"), Some(2));
    assert_eq!(layers("transformer", "num_single_layers"), Some(2));
    assert_eq!(layers("text_encoder", "num_hidden_layers"), Some(2));
    assert_eq!(layers("text_encoder_2", "num_layers"), Some(2));
    assert_eq!(layers("vae", "num_layers"), None);
    inspect(&folder);
}

#[test]
fn layers_are_cut_in_the_parts_of_a_component() {
    let folder = preset("hunyuanvideo-i2v");
    folder.keep_layers(3).expect("cut");
    let config: Value = read_json(&folder.path().join("text_encoder/config.json")).expect("is there");
    for part in ["text_config", "vision_config"] {
        assert_eq!(config[part]["num_hidden_layers"], 3);
    }
    inspect(&folder);
}

#[test]
fn layers_are_cut_where_each_level_has_its_own() {
    let folder = preset("sdxl");
    folder.keep_layers(2).expect("cut");
    let config: Value = read_json(&folder.path().join("unet/config.json")).expect("is there");
    assert_eq!(config["transformer_layers_per_block"], serde_json::json!([1, 2, 2]));
    assert!(config.get("num_layers").is_none(), "nothing is added");
    inspect(&folder);
}

#[test]
fn a_copy_has_everything_but_weights() {
    let golden = crate::testing::repository().join("tests/goldens/wan-a/checkpoint");
    let folder = Configurations::of_folder(&golden).expect("copied");
    let copied = |name: &str| entries(&folder.path().join(name)).expect("a folder").len();
    assert!(copied("tokenizer") > 1 && copied("scheduler") == 1);
    assert_eq!(copied("vae"), 1, "the configuration");
    inspect(&folder);
    let path = folder.path().to_owned();
    drop(folder);
    assert!(!path.exists());
}
