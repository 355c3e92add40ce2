//! Making weight files of other layouts from the goldens' checkpoints, and loading or inspecting them.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use tale_models::ModelSource;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::family::{LoadOptions, LoadedModel};
use tale_models::loading::{self, Inspection};

use crate::support::case_dir;

/// Names and shapes of a published file: one line each, or one for several whose names count, as in `a.{0-18}.b 64x64`.
pub fn published(name: &str) -> BTreeMap<String, Vec<usize>> {
    let text = std::fs::read_to_string(case_dir("published-files").join(format!("{name}.txt"))).unwrap();
    let mut tensors = BTreeMap::new();
    for line in text.lines() {
        let (names, shape) = line.split_once(' ').unwrap();
        let shape: Vec<usize> =
            shape.split('x').filter(|dim| *dim != "scalar").map(|dim| dim.parse().unwrap()).collect();
        for name in counted(names) {
            assert!(tensors.insert(name, shape.clone()).is_none(), "{line}: a name is there twice");
        }
    }
    tensors
}

pub fn counted(names: &str) -> Vec<String> {
    let Some((before, rest)) = names.split_once('{') else { return vec![names.to_owned()] };
    let (range, after) = rest.split_once('}').unwrap();
    let (first, last) = range.split_once('-').unwrap();
    let numbers: Range<usize> = first.parse().unwrap()..last.parse::<usize>().unwrap() + 1;
    let after = counted(after);
    numbers.flat_map(|number| after.iter().map(move |after| format!("{before}{number}{after}"))).collect()
}

/// A file with this header and a hole where its data would be.
pub fn write_empty(path: &Path, tensors: &BTreeMap<String, Vec<usize>>) {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "F16", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = Value::Object(header).to_string();
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();
}

/// By the inspection, or by its report; and by the load in the same words.
#[track_caller]
pub fn check_refused(path: &Path, base: Option<&Path>, expected: &[&str]) {
    let source = ModelSource { base: base.map(Path::to_owned), ..ModelSource::at(path) };
    let inspected = match loading::inspect(&source, &cpu(), &LoadOptions::default()) {
        Err(error) => error.to_string(),
        Ok(inspection) => {
            let of_components = inspection.components.iter().flat_map(|(_, report)| &report.problems);
            let problems: Vec<String> = of_components.chain(&inspection.problem).map(ToString::to_string).collect();
            problems.join("\n")
        }
    };
    let loaded = tale_models::load(&source, &cpu(), &LoadOptions::default(), &mut |_| ());
    let loaded = loaded.err().expect("is refused").to_string();
    for part in expected {
        assert!(inspected.contains(part), "inspected: expected `{part}` in: {inspected}");
        assert!(loaded.contains(part), "loaded: expected `{part}` in: {loaded}");
    }
}

pub fn checkpoint(case: &str) -> PathBuf {
    case_dir(case).join("checkpoint")
}

/// The tensors of a file from those of a case's folder, as the list `names` (a path below the goldens) says.
pub fn assembled(case: &str, names: &str) -> HashMap<String, Tensor> {
    let mut components: HashMap<String, HashMap<String, Tensor>> = HashMap::new();
    let text = std::fs::read_to_string(case_dir(&format!("{names}.names"))).unwrap();
    let mut tensors = HashMap::new();
    for line in text.lines() {
        let (name, expression) = line.split_once(" = ").unwrap();
        let (change, parts) = match expression.split_once(' ') {
            Some((change @ ("transposed" | "swapped" | "kernel"), part)) => (change, part),
            _ => ("", expression),
        };
        let parts: Vec<Tensor> = parts
            .split(" + ")
            .map(|part| {
                let (component, tensor) = part.split_once('/').unwrap();
                let read = || read_component(&checkpoint(case).join(component));
                components.entry(component.to_owned()).or_insert_with(read)[tensor].clone()
            })
            .collect();
        let tensor = Tensor::cat(&parts, 0).unwrap();
        let tensor = match change {
            "transposed" => tensor.t().unwrap().contiguous().unwrap(),
            "kernel" => {
                let (rows, columns) = tensor.dims2().unwrap();
                tensor.reshape((rows, columns, 1, 1, 1)).unwrap()
            }
            "swapped" => {
                let half = tensor.dim(0).unwrap() / 2;
                Tensor::cat(&[tensor.narrow(0, half, half).unwrap(), tensor.narrow(0, 0, half).unwrap()], 0).unwrap()
            }
            _ => tensor,
        };
        tensors.insert(name.to_owned(), tensor);
    }
    tensors
}

pub fn read_component(folder: &Path) -> HashMap<String, Tensor> {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    files.flat_map(|file| candle_core::safetensors::load(file, &Device::Cpu).unwrap()).collect()
}

pub fn write_file(path: &Path, tensors: HashMap<String, Tensor>) {
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// With `modelspec.prediction_type` in its metadata.
pub fn write_file_saying(path: &Path, tensors: HashMap<String, Tensor>, prediction_type: &str) {
    let metadata = HashMap::from([("modelspec.prediction_type".to_owned(), prediction_type.to_owned())]);
    safetensors::serialize_to_file(tensors, Some(metadata), path).unwrap();
}

pub fn remove_weights(folder: &Path) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.to_string_lossy().contains(".safetensors") {
            std::fs::remove_file(path).unwrap();
        }
    }
}

pub fn cpu() -> Placement {
    Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap()
}

pub fn inspect(path: &Path, base: Option<&Path>) -> Inspection {
    let source = ModelSource { base: base.map(Path::to_owned), ..ModelSource::at(path) };
    loading::inspect(source, &cpu(), &LoadOptions::default()).unwrap()
}

#[track_caller]
pub fn assert_clean(inspection: &Inspection) {
    assert!(inspection.problem.is_none(), "{:?}", inspection.problem);
    for (component, report) in &inspection.components {
        assert!(report.problems.is_empty(), "{component}: {:?}", report.problems);
        assert!(report.unused.is_empty(), "{component}: unused {:?}", report.unused);
    }
}

pub fn load(path: &Path, base: Option<&Path>, dtype: WeightDtype) -> LoadedModel {
    let source = ModelSource { base: base.map(Path::to_owned), ..ModelSource::at(path) };
    let placement = Placement::open(DeviceSpec::Cpu, dtype).unwrap();
    tale_models::load(source, &placement, &LoadOptions::default(), &mut |_| ()).unwrap()
}
