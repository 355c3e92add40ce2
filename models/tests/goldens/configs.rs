//! Pipelines whose files say things in other ways, or nonsense: what loads as in diffusers and transformers, and what is
//! refused with file and field.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use tale_models::checkpoint::Folder;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::encoders::t5::{T5Config, T5Encoder, T5Kind};
use tale_models::family::LoadOptions;
use tale_models::loading;
use tale_models::weights::Weights;

use crate::support::{assert_close, case_dir, copy_folder, relative_error};

fn cpu() -> Placement {
    Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap()
}

/// A copy of a golden's checkpoint.
fn copy_of(case: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&case_dir(case).join("checkpoint"), dir.path());
    dir
}

fn change(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut config: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(path, config.to_string()).unwrap();
}

/// What an inspection, which reads all configurations, says of a checkpoint.
fn problem(root: &Path) -> Option<String> {
    match loading::inspect(root, &cpu(), &LoadOptions::default()) {
        Ok(inspection) => inspection.problem.map(|problem| problem.to_string()),
        Err(error) => Some(error.to_string()),
    }
}

#[test]
fn a_text_encoders_own_embeddings_are_used_where_they_differ_from_the_shared_ones() {
    let folder = case_dir("flux-schnell").join("checkpoint/text_encoder_2");
    let config = T5Config::read(&Folder::new(&folder).whole().fields("config.json").unwrap(), T5Kind::T5).unwrap();
    let mut tensors = HashMap::new();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            tensors.extend(candle_core::safetensors::load(path, &Device::Cpu).unwrap());
        }
    }
    let (shared, own) = ("shared.weight", "encoder.embed_tokens.weight");
    let states = |tensors: &HashMap<String, Tensor>| {
        let dir = tempfile::tempdir().unwrap();
        candle_core::safetensors::save(tensors, dir.path().join("model.safetensors")).unwrap();
        let weights = Weights::open(dir.path(), &cpu()).unwrap();
        let encoder = T5Encoder::load(&weights, &config).unwrap();
        assert!(weights.report().unused.is_empty());
        (encoder.forward(&[&[3, 5, 1]]).unwrap().remove(0), weights.report().resident_bytes)
    };
    let table = tensors[shared].to_dtype(DType::F32).unwrap();
    let other = (&table * -1.0).unwrap();
    let with = |one: Option<&Tensor>, two: Option<&Tensor>| {
        let mut changed = tensors.clone();
        for (name, table) in [(shared, one), (own, two)] {
            changed.remove(name);
            changed.extend(table.map(|table| (name.to_owned(), table.clone())));
        }
        states(&changed)
    };
    let ((expected, bytes), (changed, _)) = (with(Some(&table), None), with(None, Some(&other)));
    assert!(relative_error(&changed, &expected) > 0.1, "the embeddings matter");
    for (one, two, states) in [
        (Some(&table), Some(&table), &expected),
        (None, Some(&table), &expected),
        (Some(&table), Some(&other), &changed),
        (Some(&other), Some(&table), &expected),
    ] {
        let (found, found_bytes) = with(one, two);
        assert_close("states", &found, states, 0.0);
        assert_eq!(found_bytes, bytes, "one table is kept");
    }
}

/// Fields at the defaults of their class may be absent, and some values have two spellings.
#[test]
fn configurations_load_that_say_less_or_in_other_words() {
    let changes: [(&str, &str, &str, Option<Value>); 8] = [
        ("sdxl-b", "vae", "act_fn", Some(json!("swish"))),
        ("sdxl-b", "unet", "act_fn", Some(json!("swish"))),
        ("sdxl-b", "unet", "dual_cross_attention", Some(json!(null))),
        ("sdxl-b", "unet", "in_channels", Some(json!(4.0))),
        ("flux-dev", "text_encoder_2", "model_type", None),
        ("wan-b", "text_encoder", "model_type", None),
        ("wan-b", "transformer", "qk_norm", None),
        ("wan-b", "transformer", "patch_size", None),
    ];
    for (case, component, field, value) in changes {
        let dir = copy_of(case);
        change(&dir.path().join(component).join("config.json"), |config| match &value {
            Some(value) => config[field] = value.clone(),
            None => drop(config.as_object_mut().unwrap().remove(field)),
        });
        assert_eq!(problem(dir.path()), None, "{case} {component} {field} {value:?}");
    }
}

#[test]
fn the_configuration_of_a_whole_clip_has_that_of_its_text_encoder() {
    let dir = copy_of("sdxl-b");
    change(&dir.path().join("text_encoder/config.json"), |config| {
        *config = json!({"model_type": "clip", "projection_dim": 3, "text_config": config.take()});
    });
    assert_eq!(problem(dir.path()), None);
}

#[test]
fn values_that_mean_nothing_are_refused_with_file_and_field() {
    let changes = [
        ("sdxl-b", "vae/config.json", "scaling_factor", json!(0)),
        ("sdxl-b", "vae/config.json", "latents_std", json!([1, 1, 0, 1])),
        ("sdxl-b", "unet/config.json", "norm_eps", json!(-1)),
        ("sdxl-b", "text_encoder/config.json", "layer_norm_eps", json!(-1e-5)),
        ("sdxl-b", "text_encoder/config.json", "hidden_size", json!("wide")),
        ("sdxl-b", "scheduler/scheduler_config.json", "beta_start", json!(0)),
        ("sdxl-b", "scheduler/scheduler_config.json", "beta_end", json!(1.5)),
        ("flux-dev", "scheduler/scheduler_config.json", "shift", json!(0)),
        ("flux-dev", "scheduler/scheduler_config.json", "max_image_seq_len", json!(256)),
        ("flux-dev", "text_encoder_2/config.json", "relative_attention_num_buckets", json!(1)),
        ("wan-b", "transformer/config.json", "eps", json!(-1)),
        ("wan-b", "transformer/config.json", "num_layers", json!(0)),
        ("wan-b", "vae/config.json", "z_dim", json!(0)),
    ];
    for (case, file, field, value) in changes {
        let dir = copy_of(case);
        change(&dir.path().join(file), |config| config[field] = value.clone());
        let problem = problem(dir.path()).unwrap_or_else(|| panic!("{case} {file} {field} {value} loads"));
        assert!(problem.contains(file) && problem.contains(field), "{field} {value}: {problem}");
    }
}

/// Else the model would load, and every request without a size would be refused.
#[test]
fn a_model_whose_own_size_no_request_may_have_is_refused() {
    let dir = copy_of("sdxl-b");
    change(&dir.path().join("unet/config.json"), |config| config["sample_size"] = json!(8000));
    let problem = problem(dir.path()).expect("no picture is as large");
    assert!(problem.contains("defaults") && problem.contains("width"), "{problem}");
}
