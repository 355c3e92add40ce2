//! Checkpoints whose activations f16 does not hold: computed once more in f32, or an error, and never a black picture.

use std::collections::HashMap;
use std::path::Path;
use tale_models::diffusion::parameters::{
    HEIGHT, MAX_SEQUENCE_LENGTH, NEGATIVE_PROMPT, NUM_INFERENCE_STEPS, PROMPT, SEED, TRUE_CFG_SCALE, WIDTH,
};
use tale_models::parameter::Options;

use candle_core::Tensor;

use tale_models::checkpoint::Manifest;

use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::DiffusionRequest;
use tale_models::families::flux::FluxModel;
use tale_models::family::LoadOptions;
use tale_models::request::{Event, Events, Phase, Request, SessionId};
use tale_models::runner::Runner;
use tale_models::runner::diffusion::DiffusionRunner;
use tale_models::runner::diffusion::course::FIRST_EXPERT;
use tale_models::runner::diffusion::narrow::NarrowNetworks;
use tale_models::{DiffusionCard, ModelCard};
use tempfile::TempDir;

use crate::gpu::emulated;
use crate::support::{case_dir, copy_folder, edit_tensors, psnr};

const MIN_PSNR: f64 = 30.0;

/// Norms divide by what these factors multiply, so that f32 makes nearly the same picture of it; f16 ends at 65504.
const OVERFLOWS: [(&str, &str); 2] = [("transformer", "x_embedder."), ("vae", "decoder.conv_in.")];
const FACTOR: f64 = 32768.0;

#[test]
fn what_overflows_f16_is_the_picture_that_f32_makes() {
    for (component, layer) in OVERFLOWS {
        let checkpoint = overflowing(component, layer, |x| (x * FACTOR).unwrap());
        let expected = on_the_cpu(checkpoint.path(), &[]).expect("f32 holds it");
        on_every_gpu(|gpu| {
            let (card, mut runner) = load(checkpoint.path(), gpu);
            let found = run(&mut *runner, &[request(&card, &[])]).remove(0).expect("f32 helps");
            let distance = psnr(&found, &expected);
            println!("{component}: {distance:.1} dB");
            assert!(distance >= MIN_PSNR, "{component}: {distance:.1} dB from the picture of f32");
            // Without a second try it is an error, and the error names the phase.
            let mut narrow = DiffusionRunner::new(flux(checkpoint.path(), gpu), 4);
            let problem = run(&mut narrow, &[request(&card, &[])]).remove(0).expect_err("f16 does not hold it");
            let phase = if component == "vae" { "vae_decode" } else { "denoise" };
            assert!(problem.contains("not finite") && problem.contains(phase), "{component}: {problem}");
        });
    }
}

/// Two sessions of a batch, one of them guided: each is mended by itself.
#[test]
fn every_session_of_a_batch_is_mended() {
    let (component, layer) = OVERFLOWS[0];
    let checkpoint = overflowing(component, layer, |x| (x * FACTOR).unwrap());
    let negatives: [&[&str]; 2] = [&[], &["Rain"]];
    let expected = negatives.map(|negative| on_the_cpu(checkpoint.path(), negative).expect("f32 holds it"));
    on_every_gpu(|gpu| {
        let (card, mut runner) = load(checkpoint.path(), gpu);
        let requests = negatives.map(|negative| request(&card, negative));
        for (found, expected) in run(&mut *runner, &requests).into_iter().zip(&expected) {
            let distance = psnr(&found.expect("f32 helps"), expected);
            assert!(distance >= MIN_PSNR, "{distance:.1} dB");
        }
    });
}

#[test]
fn what_f32_does_not_hold_either_is_an_error() {
    for (component, layer, phase) in
        [("transformer", "proj_out.bias", "denoise"), ("vae", "decoder.conv_out.bias", "vae_decode")]
    {
        let checkpoint = overflowing(component, layer, |x| (x * f64::NAN).unwrap());
        let check = |problem: String| {
            assert!(problem.contains("not finite") && problem.contains(phase), "{component}: {problem}");
        };
        check(on_the_cpu(checkpoint.path(), &[]).expect_err("nothing holds NaN"));
        on_every_gpu(|gpu| {
            let (card, mut runner) = load(checkpoint.path(), gpu);
            check(run(&mut *runner, &[request(&card, &[])]).remove(0).expect_err("nothing holds NaN"));
        });
    }
}

/// What the model paints black it may paint black.
#[test]
fn a_black_picture_of_finite_values_is_a_picture() {
    let checkpoint = overflowing("vae", "decoder.conv_out.weight", |x| x.zeros_like().unwrap());
    edit_tensors(&checkpoint.path().join("vae"), "decoder.conv_out.bias", |x| x.affine(0.0, -1.0).unwrap());
    let black = on_the_cpu(checkpoint.path(), &[]).expect("finite");
    assert!(black.iter().all(|value| *value == 0));
}

#[test]
fn only_networks_of_fewer_bits_are_tried_again() {
    let checkpoint = case_dir("flux-dev").join("checkpoint");
    let components = |dtype, phase| {
        let placement = Placement::in_host_memory(DeviceSpec::Cuda(0), dtype);
        flux(&checkpoint, &placement).components(phase, FIRST_EXPERT).to_vec()
    };
    assert_eq!(components(WeightDtype::F16, Phase::Denoise), ["transformer"]);
    assert_eq!(components(WeightDtype::Bf16, Phase::VaeDecode), ["vae"]);
    // This VAE asks for f32 where its neighbours compute in f16.
    assert_eq!(components(WeightDtype::F16, Phase::VaeDecode), [] as [&str; 0]);
    assert_eq!(components(WeightDtype::F32, Phase::Denoise), [] as [&str; 0]);
}

/// A copy of a committed checkpoint with other values in some tensors, and a VAE that does not ask for f32.
fn overflowing(component: &str, layer: &str, change: impl Fn(&Tensor) -> Tensor) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&case_dir("flux-dev").join("checkpoint"), dir.path());
    let config = dir.path().join("vae/config.json");
    let mut fields: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    fields["force_upcast"] = false.into();
    std::fs::write(&config, fields.to_string()).unwrap();
    edit_tensors(&dir.path().join(component), layer, change);
    dir
}

fn request(card: &DiffusionCard, negative: &[&str]) -> DiffusionRequest {
    let options = Options::default()
        .with(&PROMPT, "A small boat".to_owned())
        .with(&NEGATIVE_PROMPT, negative.first().map(|text| (*text).to_owned()))
        .with(&TRUE_CFG_SCALE, negative.first().map(|_| 2.0))
        .with(&WIDTH, 32)
        .with(&HEIGHT, 32)
        .with(&NUM_INFERENCE_STEPS, 2)
        .with(&MAX_SEQUENCE_LENGTH, 16)
        .with(&SEED, 5);
    card.resolve(&options, 0).unwrap()
}

/// In f16 on the emulator, if this build has it, and on a GPU, if there is one.
fn on_every_gpu(body: impl Fn(&Placement)) {
    let (spec, dtype) = (DeviceSpec::Cuda(0), WeightDtype::F16);
    if cfg!(feature = "emulator") {
        emulated(|| body(&Placement::in_host_memory(spec, dtype)));
    }
    match Placement::open(spec, dtype) {
        Ok(placement) => body(&placement),
        Err(problem) => eprintln!("NOT RUN on a GPU: {problem}"),
    }
}

/// In f32.
fn on_the_cpu(checkpoint: &Path, negative: &[&str]) -> Result<Vec<u8>, String> {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::F32).unwrap();
    let (card, mut runner) = load(checkpoint, &placement);
    run(&mut *runner, &[request(&card, negative)]).remove(0)
}

fn load(checkpoint: &Path, placement: &Placement) -> (DiffusionCard, Box<dyn Runner>) {
    let loaded = tale_models::load(checkpoint, placement, &LoadOptions::default(), &mut |_| ()).unwrap();
    let ModelCard::Diffusion(card) = loaded.card else { panic!("makes pictures") };
    (card, loaded.runner)
}

fn flux(checkpoint: &Path, placement: &Placement) -> FluxModel {
    let manifest = Manifest::read(checkpoint).unwrap();
    FluxModel::load(&manifest, placement, &mut |component| manifest.component(component)?.weights(placement)).unwrap()
}

/// The pixels of each session, or why there are none.
fn run(runner: &mut dyn Runner, requests: &[DiffusionRequest]) -> Vec<Result<Vec<u8>, String>> {
    for (id, request) in requests.iter().enumerate() {
        runner.submit(SessionId(id as u64), Request::Diffusion(request.clone())).unwrap();
    }
    let mut ends: HashMap<SessionId, Result<Vec<u8>, String>> = HashMap::new();
    while runner.next().is_some() {
        let mut events = Events::default();
        runner.step(&mut events).unwrap();
        for (id, event) in events.drain() {
            match event {
                Event::Frames(frames) => drop(ends.insert(id, Ok(frames[0].rgb.clone()))),
                Event::Failed(error) => drop(ends.insert(id, Err(error.to_string()))),
                _ => (),
            }
        }
    }
    (0..requests.len()).map(|id| ends.remove(&SessionId(id as u64)).expect("an end")).collect()
}
