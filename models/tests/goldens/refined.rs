//! Pictures that SDXL begins and its refiner finishes, within one session.

use std::collections::HashMap;
use tale_models::diffusion::parameters::{
    DENOISING_END, GUIDANCE_SCALE, HEIGHT, IMAGE, NEGATIVE_PROMPT, NUM_INFERENCE_STEPS, PROMPT, SCHEDULER, SEED, WIDTH,
};
use tale_models::parameter::Options;

use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::DiffusionCard;
use tale_models::diffusion::DiffusionRequest;
use tale_models::family::LoadOptions;
use tale_models::loading;
use tale_models::request::{Frame, Phase};
use tale_models::runner::Runner;
use tale_models::{Event, ModelCard, ModelSource, Request, SessionId};

use crate::gpu::emulated;
use crate::support::{case_dir, copy_folder, edit_tensors, golden_json, golden_tensors, pictures_and, psnr};

const CASE: &str = "sdxl-refined";
const BASE: &str = "sdxl-a";
const REFINER: &str = "edits/sdxl-refiner";
const MIN_PSNR: f64 = 50.0;

fn source(case: &str, refiner: &str) -> ModelSource {
    let checkpoint = |case: &str| case_dir(case).join("checkpoint");
    ModelSource { refiner: Some(checkpoint(refiner)), ..ModelSource::at(checkpoint(case)) }
}

fn load_runner(source: ModelSource, max_denoise_rows: usize) -> (DiffusionCard, Box<dyn Runner>) {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let options = LoadOptions { max_denoise_rows, ..Default::default() };
    let loaded = tale_models::load(source, &placement, &options, &mut |_| ()).unwrap();
    let ModelCard::Diffusion(card) = loaded.card else { panic!("SDXL makes pictures") };
    (card, loaded.runner)
}

/// Pictures of sessions that are submitted one step after the one before, and the greatest number of sessions in a
/// denoising step.
fn pictures(runner: &mut dyn Runner, requests: &[DiffusionRequest]) -> (Vec<Frame>, usize) {
    let mut steps: HashMap<SessionId, usize> = HashMap::new();
    let mut most = 0;
    let frames = pictures_and(runner, requests, |step, id, event| {
        if step.phase == Phase::Denoise {
            most = most.max(step.sessions);
        }
        if let Event::Progress { phase: Phase::Denoise, done, total } = event {
            let before = steps.insert(id, done).unwrap_or(0);
            assert_eq!((before + 1, total), (done, requests[id.0 as usize].steps_made()), "steps are counted through");
        }
    });
    (frames, most)
}

#[test]
fn pictures_are_those_of_both_pipelines() {
    let (facts, tensors) = (golden_json(CASE), golden_tensors(CASE));
    let (card, mut runner) = load_runner(source(BASE, REFINER), 4);
    for (i, facts) in facts["runs"].as_array().unwrap().iter().enumerate() {
        let size = |field: &str| facts[field].as_u64().map(|value| value as usize);
        let options = Options::default()
            .with(&PROMPT, facts["prompt"].as_str().unwrap().to_owned())
            .with(&NEGATIVE_PROMPT, facts["negative_prompt"].as_str().map(str::to_owned))
            .with(&WIDTH, size("width"))
            .with(&HEIGHT, size("height"))
            .with(&NUM_INFERENCE_STEPS, size("num_inference_steps"))
            .with(&GUIDANCE_SCALE, facts["guidance_scale"].as_f64())
            .with(&SCHEDULER, facts["scheduler"].as_str().map(str::to_owned))
            .with(&DENOISING_END, facts["denoising_end"].as_f64())
            .with(&SEED, facts["seed"].as_u64());
        let found = pictures(&mut *runner, &[card.resolve(&options, 0).unwrap()]).0.remove(0);
        let expected: Vec<u8> = tensors[&format!("run{i}.image")].flatten_all().unwrap().to_vec1().unwrap();
        let found = psnr(&found.rgb, &expected);
        println!("run {i}: {found:.1} dB");
        assert!(found >= MIN_PSNR, "run {i}: {found:.1} dB");
    }
}

fn options() -> Options {
    Options::default()
        .with(&PROMPT, "A boat".to_owned())
        .with(&WIDTH, 64)
        .with(&HEIGHT, 64)
        .with(&NUM_INFERENCE_STEPS, 5)
        .with(&GUIDANCE_SCALE, 3.0)
}

/// Some of which stay with the base, and others are handed over after other numbers of steps.
#[test]
fn refined_pictures_in_a_batch_are_those_made_alone() {
    let (card, mut runner) = load_runner(source(BASE, REFINER), 8);
    let ends = [Some(0.3), None, Some(0.6), Some(0.6)];
    let variants: Vec<DiffusionRequest> = ends
        .into_iter()
        .enumerate()
        .map(|(i, denoising_end)| card.resolve(&options().with(&DENOISING_END, denoising_end), 70 + i as u64).unwrap())
        .collect();
    let alone: Vec<Frame> =
        variants.iter().map(|request| pictures(&mut *runner, std::slice::from_ref(request)).0.remove(0)).collect();
    let (together, most) = pictures(&mut *runner, &variants);
    assert!(most > 1, "no step is shared");
    for (i, (together, alone)) in together.iter().zip(&alone).enumerate() {
        let found = psnr(&together.rgb, &alone.rgb);
        assert!(found >= MIN_PSNR, "session {i}: {found:.1} dB against itself alone");
    }
    // A refiner that is loaded and not asked for does nothing.
    let (plain, mut runner) = load_runner(ModelSource { refiner: None, ..source(BASE, REFINER) }, 8);
    let request = plain.resolve(&options(), 71).unwrap();
    assert_eq!(pictures(&mut *runner, &[request]).0[0].rgb, alone[1].rgb);
}

#[test]
fn a_handover_that_cannot_be_is_refused_by_its_field() {
    let (card, mut runner) = load_runner(source(BASE, REFINER), 4);
    let (plain, mut unrefined) = load_runner(ModelSource { refiner: None, ..source(BASE, REFINER) }, 4);
    let image = std::sync::Arc::new(Frame { width: 64, height: 64, rgb: vec![90; 64 * 64 * 3] });
    let at = |denoising_end| options().with(&DENOISING_END, denoising_end);
    let cases = [
        (&plain, at(0.5), "without a refiner"),
        (&card, at(0.0), "above 0 and below 1"),
        (&card, at(1.0), "above 0 and below 1"),
        (&card, at(f64::NAN), "above 0 and below 1"),
        (&card, at(0.001), "leaves the model no step of 5"),
        (&card, at(0.9999), "leaves the refiner no step of 5"),
        (&card, at(0.5).with(&IMAGE, image), "leave it or image out"),
    ];
    for (card, options, problem) in cases {
        let error = card.resolve(&options, 0).expect_err(problem).to_string();
        assert!(error.starts_with("denoising_end: ") && error.contains(problem), "{error}");
    }
    let request = card.resolve(&at(0.5), 0).unwrap();
    assert!(unrefined.submit(SessionId(0), Request::Diffusion(request.clone())).is_err());
    // Both networks' conditioning is planned for.
    let bytes = |runner: &dyn Runner, request: &DiffusionRequest| runner.plan(&Request::Diffusion(request.clone()));
    let base = DiffusionRequest { refinement: None, ..request.clone() };
    for (refined, base) in bytes(&*runner, &request).phases().iter().zip(bytes(&*runner, &base).phases()) {
        assert!(refined.bytes > base.bytes, "{:?}", refined.phase);
    }
    runner.cancel(SessionId(0));
}

#[test]
fn what_is_no_refiner_of_a_model_is_refused() {
    let placement = Placement::in_host_memory(DeviceSpec::Cpu, WeightDtype::Auto);
    let cases = [
        (source(BASE, "sdxl-b"), "is no refiner of this model: pixels of the VAE per latent"),
        (source(BASE, "flux-schnell"), "is no folder of a StableDiffusionXLImg2ImgPipeline"),
        (source("flux-schnell", REFINER), "models of family flux take no refiner"),
    ];
    for (source, problem) in cases {
        let found = loading::inspect(source, &placement, &LoadOptions::default()).unwrap().problem;
        let error = found.expect(problem).to_string();
        assert!(error.contains(problem), "{error}");
    }
    let inspection = loading::inspect(source(BASE, REFINER), &placement, &LoadOptions::default()).unwrap();
    assert!(inspection.problem.is_none(), "{:?}", inspection.problem);
    let names: Vec<&str> = inspection.components.iter().map(|(name, _)| name.as_str()).collect();
    assert!(names.contains(&"refiner/unet") && !names.contains(&"refiner/text_encoder"), "{names:?}");
    let left: usize = inspection.components.iter().map(|(_, report)| report.unused.len()).sum();
    assert_eq!(left, 0, "tensors that nothing uses");
}

/// Norms divide by what this multiplies, so that f32 makes nearly the same picture of it; f16 ends at 65504.
#[test]
fn a_refiner_that_overflows_f16_computes_once_more_in_f32() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&case_dir(REFINER).join("checkpoint"), dir.path());
    edit_tensors(&dir.path().join("unet"), "conv_in.", |x| (x * 32768.0).unwrap());
    let source = ModelSource { refiner: Some(dir.path().to_path_buf()), ..source(BASE, REFINER) };
    let picture = |placement: &Placement| {
        let loaded = tale_models::load(&source, placement, &LoadOptions::default(), &mut |_| ()).unwrap();
        let ModelCard::Diffusion(card) = loaded.card else { panic!("SDXL makes pictures") };
        let (mut runner, options) = (loaded.runner, options().with(&DENOISING_END, 0.5));
        pictures(&mut *runner, &[card.resolve(&options, 7).unwrap()]).0.remove(0)
    };
    let expected = picture(&Placement::open(DeviceSpec::Cpu, WeightDtype::F32).unwrap());
    let check = |placement: &Placement| {
        let found = psnr(&picture(placement).rgb, &expected.rgb);
        assert!(found >= 30.0, "{found:.1} dB from the picture of f32");
    };
    let (spec, dtype) = (DeviceSpec::Cuda(0), WeightDtype::F16);
    if cfg!(feature = "emulator") {
        emulated(|| check(&Placement::in_host_memory(spec, dtype)));
    }
    match Placement::open(spec, dtype) {
        Ok(placement) => check(&placement),
        Err(problem) => eprintln!("NOT RUN on a GPU: {problem}"),
    }
}
