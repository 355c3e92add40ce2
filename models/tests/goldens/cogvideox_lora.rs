//! LoRA of CogVideoX, from text and from a picture, against diffusers' clips with the same files at the same weights.

use std::collections::HashMap;

use serde_json::Value;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::parameters::{INPUT_REFERENCE, LORAS};
use tale_models::diffusion::{DiffusionCard, DiffusionRequest};
use tale_models::family::LoadOptions;
use tale_models::lora::LoraOption;
use tale_models::request::{Event, Frame};
use tale_models::runner::Runner;
use tale_models::{ModelCard, ModelSource};

use crate::cogvideox::options_of;
use crate::cogvideox_pictures::picture;
use crate::support::{case_dir, golden_json, golden_tensors, psnr, run_to_end};

const CASE: &str = "cogvideox-lora";
const MIN_PSNR: f64 = 50.0;

#[test]
fn clips_are_the_reference_ones() {
    let (golden, tensors) = (golden_json(CASE), golden_tensors(CASE));
    for (index, run) in golden["runs"].as_array().expect("runs").iter().enumerate() {
        let (card, mut runner) = load(run);
        let request = request(&card, run, true);
        let frames = clips(&mut *runner, &[request]).remove(0);
        let expected = &tensors[&format!("run{index}.frames")];
        assert_eq!(expected.dim(0).unwrap(), frames.len());
        for (at, frame) in frames.iter().enumerate() {
            let expected: Vec<u8> = expected.get(at).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let found = psnr(&frame.rgb, &expected);
            assert!(found >= MIN_PSNR, "run {index} frame {at}: {found:.1} dB");
        }
    }
}

/// Sessions with files and without, under way at once: each has its own clip, and nothing is left in the layers.
#[test]
fn sessions_with_and_without_files_do_not_mix() {
    for run in golden_json(CASE)["runs"].as_array().expect("runs") {
        let (card, mut runner) = load(run);
        let requests = [request(&card, run, true), request(&card, run, false)];
        let together = clips(&mut *runner, &requests);
        let mut alone = |request: &DiffusionRequest| clips(&mut *runner, std::slice::from_ref(request)).remove(0);
        let alone = [alone(&requests[0]), alone(&requests[1])];
        assert!(together == alone, "a clip depends on its company");
        assert!(alone[0] != alone[1], "the files change something");
    }
}

fn load(run: &Value) -> (DiffusionCard, Box<dyn Runner>) {
    let text = |field: &str| run[field].as_str().expect("a text");
    let source = ModelSource {
        loras: Some(case_dir(CASE).join(text("files"))),
        ..ModelSource::at(case_dir(text("checkpoint")).join("checkpoint"))
    };
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("the CPU");
    let loaded = tale_models::load(&source, &placement, &LoadOptions::default(), &mut |_| ()).expect("loads");
    let ModelCard::Diffusion(card) = loaded.card else { panic!("makes clips") };
    (card, loaded.runner)
}

fn request(card: &DiffusionCard, run: &Value, with_files: bool) -> DiffusionRequest {
    let loras = run["loras"].as_array().expect("files").iter().map(|lora| LoraOption {
        name: lora["name"].as_str().expect("a name").to_owned(),
        weight: lora["weight"].as_f64().expect("a weight"),
    });
    let index = run["picture"].as_u64();
    let options = options_of(run).with(&LORAS, with_files.then(|| loras.collect::<Vec<_>>())).with(
        &INPUT_REFERENCE,
        index.map(|index| picture(run["checkpoint"].as_str().expect("a case"), index as usize)),
    );
    card.resolve(&options, 0).expect("a valid request")
}

/// All frames of each request.
fn clips(runner: &mut dyn Runner, requests: &[DiffusionRequest]) -> Vec<Vec<Frame>> {
    let mut frames: HashMap<u64, Vec<Frame>> = HashMap::new();
    run_to_end(runner, requests, |_, id, event| {
        if let Event::Frames(new) = event {
            frames.entry(id.0).or_default().extend(new);
        }
    });
    (0..requests.len() as u64).map(|id| frames.remove(&id).expect("frames")).collect()
}
