//! Reading goldens and comparing with them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use tale_models::diffusion::DiffusionRequest;
use tale_models::request::Frame;
use tale_models::runner::diffusion::DiffusionModel;
use tale_models::runner::diffusion::course::FIRST_EXPERT;
use tale_models::runner::diffusion::inputs::{Inputs, Pass};
use tale_models::runner::{Runner, RunnerStatus, StepPlan};
use tale_models::testing::repository;
use tale_models::{Event, Events, Request, SessionId};

/// Folder of one golden case.
pub fn case_dir(case: &str) -> PathBuf {
    repository().join("tests/goldens").join(case)
}

/// `golden.json` of a case.
pub fn golden_json(case: &str) -> serde_json::Value {
    let path = case_dir(case).join("golden.json");
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}; scripts/goldens makes it", path.display()));
    serde_json::from_slice(&bytes).expect("golden.json is JSON")
}

/// Tensors of `golden.safetensors` of a case.
pub fn golden_tensors(case: &str) -> HashMap<String, Tensor> {
    let path = case_dir(case).join("golden.safetensors");
    candle_core::safetensors::load(&path, &Device::Cpu).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Largest absolute difference over largest absolute expected value.
pub fn relative_error(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.dims(), expected.dims(), "shapes differ");
    let flat = |x: &Tensor| -> Vec<f32> {
        let x = x.to_dtype(DType::F32).expect("cast");
        x.flatten_all().expect("flatten").to_vec1().expect("read")
    };
    let (found, expected) = (flat(found), flat(expected));
    let difference = found.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
    let scale = expected.iter().map(|b| f64::from(b.abs())).fold(1e-30, f64::max);
    assert!(found.iter().all(|a| a.is_finite()), "a value is not finite");
    difference / scale
}

/// Asserts [`relative_error`] below `tolerance`, naming what was compared.
pub fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    let error = relative_error(found, expected);
    assert!(error <= tolerance, "{what}: relative error {error:.2e} is over {tolerance:.0e}");
}

/// Peak signal-to-noise ratio in dB of two 8-bit pictures.
pub fn psnr(found: &[u8], expected: &[u8]) -> f64 {
    assert_eq!(found.len(), expected.len(), "sizes differ");
    let squares: f64 = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    let mse = squares / found.len() as f64;
    if mse == 0.0 { f64::INFINITY } else { 10.0 * (255.0f64 * 255.0 / mse).log10() }
}

/// Copies a folder with all that is in it.
pub fn copy_folder(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_folder(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// Rewrites the tensors of a component's folder whose names begin with `prefix`; there must be some.
pub fn edit_tensors(folder: &Path, prefix: &str, change: impl Fn(&Tensor) -> Tensor) {
    let mut edited = 0;
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let file = entry.expect("readable").path();
        if file.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).expect("a file of tensors");
        for (_, tensor) in tensors.iter_mut().filter(|(name, _)| name.starts_with(prefix)) {
            *tensor = change(tensor);
            edited += 1;
        }
        candle_core::safetensors::save(&tensors, &file).expect("written");
    }
    assert!(edited > 0, "{}: no tensor {prefix}", folder.display());
}

/// Runs sessions to their end, each submitted one step after the one before. `hear` is told each event, with the step that it
/// came of.
pub fn run_to_end(
    runner: &mut dyn Runner,
    requests: &[DiffusionRequest],
    mut hear: impl FnMut(StepPlan, SessionId, Event),
) {
    let mut waiting = requests.iter().cloned().enumerate();
    let mut finished = 0;
    loop {
        if let Some((id, request)) = waiting.next() {
            runner.submit(SessionId(id as u64), Request::Diffusion(request)).unwrap();
        }
        if runner.next().is_none() {
            break;
        }
        let mut events = Events::default();
        let plan = runner.step(&mut events).unwrap();
        for (id, event) in events.drain() {
            match &event {
                Event::Finished { .. } => finished += 1,
                Event::Failed(error) => panic!("session {id:?}: {error}"),
                _ => (),
            }
            hear(plan, id, event);
        }
    }
    assert_eq!(finished, requests.len());
}

/// The pictures of sessions that ran as in [`run_to_end`]; `hear` is told all other events.
pub fn pictures_and(
    runner: &mut dyn Runner,
    requests: &[DiffusionRequest],
    mut hear: impl FnMut(StepPlan, SessionId, Event),
) -> Vec<Frame> {
    let mut frames: HashMap<SessionId, Frame> = HashMap::new();
    run_to_end(runner, requests, |plan, id, event| match event {
        Event::Frames(mut new) => assert!(frames.insert(id, new.remove(0)).is_none(), "one picture each"),
        event => hear(plan, id, event),
    });
    (0..requests.len()).map(|id| frames.remove(&SessionId(id as u64)).unwrap()).collect()
}

/// The pictures of sessions that ran as in [`run_to_end`].
pub fn pictures(runner: &mut dyn Runner, requests: &[DiffusionRequest]) -> Vec<Frame> {
    pictures_and(runner, requests, |_, _, _| ())
}

/// The frames of each session, in order; sessions run as in [`run_to_end`].
pub fn clips(runner: &mut dyn Runner, requests: &[DiffusionRequest]) -> Vec<Vec<Frame>> {
    let mut clips = vec![Vec::new(); requests.len()];
    run_to_end(runner, requests, |_, session, event| {
        if let Event::Frames(frames) = event {
            clips[session.0 as usize].extend(frames);
        }
    });
    assert_eq!(runner.status(), RunnerStatus::default());
    clips
}

/// What a model makes of different inputs of one pass, in one go.
pub fn encode<M: DiffusionModel>(model: &M, pass: &Pass, rows: &[&M::Input]) -> Vec<M::Encoded> {
    let mut encoding = model.begin_encode(pass, rows).unwrap();
    loop {
        if let Some(encoded) = model.encode_next(&mut encoding).unwrap() {
            return encoded;
        }
    }
}

/// What became of all that a request has encoded. Each input has a pass of its own.
pub fn encoded<M: DiffusionModel>(model: &M, request: &DiffusionRequest) -> Vec<Arc<M::Encoded>> {
    let inputs = model.inputs(request);
    let encoded = |Inputs { pass, rows }: &Inputs<M::Input>| -> Vec<Arc<M::Encoded>> {
        rows.iter().flat_map(|row| encode(model, pass, &[row])).map(Arc::new).collect()
    };
    inputs.iter().flat_map(encoded).collect()
}

/// What the model's first expert is conditioned on, of the positive branch, and of the negative one where there is guidance.
pub fn conditioning<M: DiffusionModel>(model: &M, request: &DiffusionRequest) -> Vec<M::Conditioning> {
    model.conditioning(FIRST_EXPERT, &encoded(model, request), request).unwrap()
}
