//! Git LFS pointers in the place of a checkpoint's files: whichever it is, the error names the file and what it is.

use std::path::{Path, PathBuf};

use tale_models::ModelSource;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::family::LoadOptions;
use tale_models::loading;

use crate::support::case_dir;

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\n\
                       oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n\
                       size 4976698672\n";

/// Shards and their index, tokenizers of every kind, configurations, schedulers.
#[test]
fn every_file_of_a_checkpoint_may_be_one() {
    for case in ["llama-tied", "llama-untied", "sdxl-b", "flux-dev", "wan-a", "wan-b"] {
        let folder = tempfile::tempdir().unwrap();
        let mut files = Vec::new();
        copy_folder(&case_dir(case).join("checkpoint"), folder.path(), &mut files);
        for file in files {
            let content = std::fs::read(&file).unwrap();
            std::fs::write(&file, POINTER).unwrap();
            check(folder.path(), &file);
            std::fs::write(&file, content).unwrap();
        }
    }
}

#[test]
fn a_template_and_a_single_file_may_be_one() {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&case_dir("llama-tied").join("checkpoint"), folder.path(), &mut Vec::new());
    let template = folder.path().join("chat_template.jinja");
    std::fs::write(&template, POINTER).unwrap();
    check(folder.path(), &template);
    for name in ["model.safetensors", "model.gguf"] {
        let file = folder.path().join(name);
        std::fs::write(&file, POINTER).unwrap();
        check(&file, &file);
    }
}

#[track_caller]
fn check(checkpoint: &Path, pointer: &Path) {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let loaded = tale_models::load(ModelSource::at(checkpoint), &placement, &LoadOptions::default(), &mut |_| ());
    let loaded = loaded.err().unwrap_or_else(|| panic!("{}: loads", pointer.display())).to_string();
    let inspected = match loading::inspect(ModelSource::at(checkpoint), &placement, &LoadOptions::default()) {
        Ok(inspection) => inspection.problem.expect("a problem").to_string(),
        Err(error) => error.to_string(),
    };
    for error in [loaded, inspected] {
        assert!(error.starts_with(&format!("{}: is a Git LFS pointer", pointer.display())), "{error}");
        assert!(error.contains("4976698672 bytes") && error.contains("git lfs pull"), "{error}");
    }
}

fn copy_folder(from: &Path, to: &Path, files: &mut Vec<PathBuf>) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target, files);
        } else {
            std::fs::copy(entry.path(), &target).unwrap();
            files.push(target);
        }
    }
}
