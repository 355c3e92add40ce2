//! Checkpoints whose files are damaged one thing at a time: each is refused by file when it is inspected, before anything
//! as large as it says is made, and nothing panics.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::family::LoadOptions;
use tale_models::loading;

use crate::support::{case_dir, copy_folder};

/// One of each family, with every kind of component.
const CASES: [&str; 7] =
    ["llama-untied", "qwen2-yarn", "sdxl-a", "flux-dev", "wan-a", "hunyuan-video-a", "cogvideox-a"];

/// Numbers that no network here is made or computed with.
const UNREAD: [&str; 19] = [
    "_num_layers",
    "addition_embed_type_num_heads",
    "attention_dropout",
    "bos_token_id",
    "classifier_dropout",
    "decoder_start_token_id",
    "dropout",
    "dropout_rate",
    "dynamic_thresholding_ratio",
    "initializer_factor",
    "initializer_range",
    "logit_scale_init_value",
    "model_max_length",
    "num_decoder_layers",
    "pad_token_id",
    "pretraining_tp",
    "resnet_out_scale_factor",
    "sample_max_value",
    "use_linear_projection",
];

/// A copy of a golden's checkpoint whose files are changed and put back.
struct Copy {
    dir: tempfile::TempDir,
    placement: Placement,
}

impl Copy {
    fn of(case: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy_folder(&case_dir(case).join("checkpoint"), dir.path());
        Self { dir, placement: Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap() }
    }

    /// What an inspection says with this content of a file, which has its own again afterwards.
    fn problem_with(&self, file: &Path, content: &[u8]) -> Option<String> {
        let own = std::fs::read(file).unwrap();
        std::fs::write(file, content).unwrap();
        let problem = self.problem();
        std::fs::write(file, own).unwrap();
        problem
    }

    fn problem(&self) -> Option<String> {
        match loading::inspect(self.dir.path(), &self.placement, &LoadOptions::default()) {
            Ok(inspection) => inspection.into_problem().map(|problem| problem.to_string()),
            Err(error) => Some(error.to_string()),
        }
    }

    /// All JSON files but vocabularies and indices.
    fn configs(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.dir.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap();
                let is_config = name.ends_with("config.json") && name != "tokenizer_config.json";
                match path.is_dir() {
                    true => folders.push(path),
                    false if is_config => found.push(path),
                    false => (),
                }
            }
        }
        found.sort();
        found
    }
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Pointers to all numbers of a value.
fn numbers(value: &Value, pointer: &str, found: &mut Vec<String>) {
    match value {
        Value::Number(_) => found.push(pointer.to_owned()),
        Value::Array(values) => {
            for (i, value) in values.iter().enumerate() {
                numbers(value, &format!("{pointer}/{i}"), found);
            }
        }
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| numbers(value, &format!("{pointer}/{name}"), found))
        }
        _ => (),
    }
}

fn is_read(file: &Path, field: &str) -> bool {
    let config = read(file);
    let is_said_elsewhere = file.ends_with("config.json") && file.with_file_name("generation_config.json").exists();
    match field {
        // T5 has no use for it, and where there are two files, one of them counts.
        "eos_token_id" => {
            let is_read = !config["model_type"].as_str().is_some_and(|kind| kind.ends_with("t5"));
            // Nor has a language model that says nothing.
            is_read && !is_said_elsewhere && config["architectures"][0] != "LlamaModel"
        }
        // Flow matching knows none.
        "beta_start" | "beta_end" => config["prediction_type"] != "flow_prediction",
        _ => !UNREAD.contains(&field),
    }
}

#[test]
fn every_number_of_every_configuration_has_bounds() {
    for case in CASES {
        let copy = Copy::of(case);
        assert_eq!(copy.problem(), None, "{case}");
        for file in copy.configs() {
            let config = read(&file);
            let mut pointers = Vec::new();
            numbers(&config, "", &mut pointers);
            for pointer in pointers {
                let field = pointer.split('/').find(|part| !part.is_empty() && part.parse::<usize>().is_err()).unwrap();
                let field = if field == "rope_parameters" { pointer.rsplit('/').next().unwrap() } else { field };
                if !is_read(&file, field) {
                    continue;
                }
                for value in [json!(1u64 << 53), json!(-1e300)] {
                    let mut changed = config.clone();
                    *changed.pointer_mut(&pointer).unwrap() = value.clone();
                    let problem = copy.problem_with(&file, changed.to_string().as_bytes());
                    let problem = problem.unwrap_or_else(|| panic!("{case} {}{pointer} {value} loads", file.display()));
                    let name = file.strip_prefix(copy.dir.path()).unwrap().to_str().unwrap();
                    assert!(problem.contains(name) && problem.contains(field), "{pointer} {value}: {problem}");
                }
            }
        }
    }
}

#[test]
fn a_configuration_may_be_anything_and_nothing_panics() {
    for case in CASES {
        let copy = Copy::of(case);
        for file in copy.configs() {
            for content in ["", "{", "[]", "null", "3", "\u{feff}{}", "{\"a\": 1e999}", "\"", "[[[[", "{}{}"] {
                let problem = copy.problem_with(&file, content.as_bytes());
                // An absent or null generation_config.json says nothing.
                let problem = problem.unwrap_or_else(|| panic!("{case} {} {content} loads", file.display()));
                assert!(problem.contains(file.file_name().unwrap().to_str().unwrap()), "{content}: {problem}");
            }
            let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
            assert!(copy.problem_with(&file, deep.as_bytes()).is_some());
        }
    }
}
