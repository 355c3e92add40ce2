//! Steps that a request gives one by one, as sigmas or as timesteps, against diffusers' pictures and clips.

use serde_json::Value;
use tale_models::Error;
use tale_models::ModelCard;
use tale_models::ModelSource;
use tale_models::diffusion::DiffusionCard;
use tale_models::diffusion::parameters::{
    FLOW_SHIFT, GUIDANCE_SCALE, HEIGHT, NEGATIVE_PROMPT, NUM_FRAMES, NUM_INFERENCE_STEPS, PROMPT, SCHEDULER, SEED,
    SIGMAS, TIMESTEP_SPACING, TIMESTEPS, WIDTH,
};
use tale_models::family::{LoadOptions, LoadedModel};
use tale_models::parameter::Options;

use crate::files::{checkpoint, cpu};
use crate::support::{clips, golden_json, golden_tensors, psnr};

const CASE: &str = "given-steps";
const MIN_PSNR: f64 = 50.0;

#[test]
fn pictures_and_clips_are_the_reference_ones() {
    let tensors = golden_tensors(CASE);
    for (index, run) in runs().iter().enumerate() {
        let case = run["case"].as_str().unwrap();
        let mut model = open(case);
        let request = card(&model).resolve(&options(run), 0).unwrap();
        // With the timesteps and sigmas of the reference.
        let the_loop = request.sampling.denoising_loop((case == "flux-dev").then_some(64 * 64 / 256));
        let solver = card(&model).sampling.schedulers.start(request.sampling.scheduler, &the_loop);
        let expected: Vec<f32> = tensors[&format!("run{index}.timesteps")].to_vec1().unwrap();
        assert_eq!(solver.timesteps().len(), expected.len(), "{case} {index}");
        for (found, expected) in solver.timesteps().iter().zip(&expected) {
            assert!((*found - f64::from(*expected)).abs() < 1e-2, "{case} {index}: {found}, expected {expected}");
        }
        let frames = clips(&mut *model.runner, &[request]).remove(0);
        let found: Vec<u8> = frames.iter().flat_map(|frame| frame.rgb.iter().copied()).collect();
        let expected: Vec<u8> = tensors[&format!("run{index}.pixels")].flatten_all().unwrap().to_vec1().unwrap();
        let found = psnr(&found, &expected);
        println!("{case} {index}: {found:.1} dB");
        assert!(found >= MIN_PSNR, "{case} {index}: {found:.1} dB");
    }
}

/// What is echoed asks for the same again.
#[test]
fn answers_say_which_steps_were_taken() {
    for run in runs() {
        let model = open(run["case"].as_str().unwrap());
        let request = card(&model).resolve(&options(&run), 0).unwrap();
        let echo = request.echo();
        let (sigmas, timesteps) = (echo.get(&SIGMAS), echo.get(&TIMESTEPS));
        assert_eq!((sigmas, timesteps), (numbers(&run["sigmas"]), numbers(&run["timesteps"])));
        assert_eq!(card(&model).resolve(&echo, 0).unwrap().sampling, request.sampling);
    }
}

#[test]
fn steps_that_cannot_be_taken_are_refused_by_name() {
    let refused = |case: &str, field: &str, part: &str, change: &dyn Fn(Options) -> Options| {
        let options = Options::default().with(&PROMPT, "x".to_owned());
        let error = card(&open(case)).resolve(&change(options), 0).expect_err(field);
        assert!(matches!(&error, Error::InvalidRequest { field: found, .. } if found == field), "{field}: {error}");
        assert!(error.to_string().contains(part), "{part} in: {error}");
    };
    let sigmas = |values: &'static [f64]| move |options: Options| options.with(&SIGMAS, values.to_vec());
    let timesteps = |values: &'static [f64]| {
        move |options: Options| options.with(&TIMESTEPS, values.to_vec()).with(&SCHEDULER, "euler".to_owned())
    };
    refused("wan-a", "sigmas[2]", "not below the one before", &sigmas(&[1.0, 0.5, 0.5]));
    refused("wan-a", "sigmas[0]", "at most 1", &sigmas(&[1.5, 0.5]));
    refused("wan-a", "sigmas[1]", "above 0", &sigmas(&[1.0, 0.0]));
    refused("flux-dev", "sigmas", "has 0 numbers", &sigmas(&[]));
    refused("flux-dev", "sigmas[1]", "is -0.5", &sigmas(&[1.0, -0.5]));
    refused("flux-dev", "timesteps", "has no effect", &|options| options.with(&TIMESTEPS, vec![900.0, 5.0]));
    refused("sdxl-a", "sigmas", "has one sigma", &|options| {
        options.with(&SIGMAS, vec![9.0]).with(&SCHEDULER, "euler".to_owned())
    });
    refused("sdxl-a", "timesteps[0]", "at most 999", &timesteps(&[1000.0, 5.0]));
    refused("sdxl-a", "timesteps[1]", "not below the one before", &timesteps(&[5.0, 900.0]));
    refused("sdxl-a", "timesteps", "beside sigmas", &|options| timesteps(&[9.0])(options).with(&SIGMAS, vec![1.0]));
    refused("sdxl-a", "sigmas", "has no effect with scheduler ddim", &|options| {
        options.with(&SIGMAS, vec![9.0, 1.0]).with(&SCHEDULER, "ddim".to_owned())
    });
    refused("wan-a", "num_inference_steps", "are 2 steps", &|options| {
        sigmas(&[1.0, 0.5])(options).with(&NUM_INFERENCE_STEPS, 3)
    });
}

fn runs() -> Vec<Value> {
    golden_json(CASE)["runs"].as_array().unwrap().clone()
}

fn numbers(value: &Value) -> Option<Vec<f64>> {
    Some(value.as_array()?.iter().map(|number| number.as_f64().unwrap()).collect())
}

fn options(run: &Value) -> Options {
    let size = |name: &str| run[name].as_u64().map(|value| value as usize);
    let text = |name: &str| run[name].as_str().map(str::to_owned);
    Options::default()
        .with(&PROMPT, text("prompt"))
        .with(&NEGATIVE_PROMPT, text("negative_prompt"))
        .with(&WIDTH, size("width"))
        .with(&HEIGHT, size("height"))
        .with(&NUM_FRAMES, size("num_frames"))
        .with(&GUIDANCE_SCALE, run["guidance_scale"].as_f64())
        .with(&SEED, run["seed"].as_u64())
        .with(&SCHEDULER, text("scheduler"))
        .with(&FLOW_SHIFT, run["flow_shift"].as_f64())
        .with(&TIMESTEP_SPACING, run["timestep_spacing"].as_str().map(|name| name.parse().unwrap()))
        .with(&SIGMAS, numbers(&run["sigmas"]))
        .with(&TIMESTEPS, numbers(&run["timesteps"]))
}

fn open(case: &str) -> LoadedModel {
    tale_models::load(ModelSource::at(checkpoint(case)), &cpu(), &LoadOptions::default(), &mut |_| ()).unwrap()
}

fn card(model: &LoadedModel) -> &DiffusionCard {
    match &model.card {
        ModelCard::Diffusion(card) => card,
        ModelCard::Text(_) => panic!("makes pictures"),
    }
}
