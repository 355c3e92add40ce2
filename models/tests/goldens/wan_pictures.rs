//! Wan2.1 from a picture, and between two pictures, stage by stage.

use std::sync::Arc;

use candle_core::Tensor;
use tale_models::Error;
use tale_models::diffusion::parameters::{
    GUIDANCE_SCALE, HEIGHT, INPUT_REFERENCE, LAST_IMAGE, NEGATIVE_PROMPT, NUM_FRAMES, NUM_INFERENCE_STEPS, PROMPT,
    SEED, WIDTH,
};
use tale_models::diffusion::{DiffusionCard, DiffusionRequest};
use tale_models::parameter::Options;
use tale_models::request::{Frame, Phase};
use tale_models::runner::diffusion::DiffusionModel;

use crate::clips::{check_cancelled, check_denoising, check_frames, check_tensors, check_together};
use crate::support::{assert_close, conditioning, golden_json, golden_tensors};
use crate::wan::open_model;

/// The first takes one picture and the second two. They differ in vision encoders, widths, and in which VAE levels halve
/// frames.
const CASES: [&str; 2] = ["wan-i2v", "wan-flf2v"];

#[test]
fn every_stage_is_that_of_the_reference() {
    for case in CASES {
        let (model, tensors) = (open_model(case), golden_tensors(case));
        for (run, request) in requests(case, model.card()) {
            let tensor = |what: &str| &tensors[&format!("run{run}.{what}")];
            let close = |what: &str, found: &Tensor, tolerance: f64| {
                assert_close(&format!("{case} run {run} {what}"), found, tensor(what), tolerance);
            };
            let branches = conditioning(&model, &request);
            assert_eq!(branches.len(), 1 + usize::from(request.guidance.negative_prompt.is_some()));
            for branch in &branches {
                let seen = branch.pictures.as_ref().expect("it takes pictures");
                let (_, tokens, width) = seen.dims3().expect("[1, tokens, width]");
                let expected = tensor("image_embeds").reshape((1, tokens, width)).expect("picture after picture");
                assert_close(&format!("{case} run {run} image_embeds"), seen, &expected, 1e-4);
                close("condition", branch.frames.as_ref().expect("it takes pictures"), 1e-4);
            }
            check_denoising(&format!("{case} run {run}"), &model, &request, &branches, &tensor);
        }
    }
}

#[test]
fn every_frame_is_that_of_the_reference() {
    for case in CASES {
        let model = open_model(case);
        let requests = requests(case, model.card());
        check_frames(case, model, requests);
    }
}

/// Two requests of one shape share steps; their pictures do not mix.
#[test]
fn videos_made_together_are_those_made_alone() {
    for case in CASES {
        let model = open_model(case);
        let card = model.card().clone();
        let (_, first) = requests(case, &card).remove(0);
        let options = options(case, 0).with(&INPUT_REFERENCE, picture(case, 2)).with(&SEED, 3);
        let second = card.resolve(&options, 0).expect("a valid request");
        check_together(case, model, [first, second]);
    }
}

#[test]
fn whatever_is_cancelled_leaves_nothing() {
    for case in CASES {
        let model = open_model(case);
        let (_, request) = requests(case, model.card()).remove(0);
        let phases = [Phase::Encode, Phase::VaeEncode, Phase::Denoise, Phase::VaeDecode];
        check_cancelled(case, model, &request, &phases);
    }
}

#[test]
fn every_tensor_of_a_checkpoint_is_known() {
    for case in CASES {
        check_tensors(case, "wan", 4);
    }
}

#[test]
fn what_the_pictures_contradict_is_refused_by_name() {
    let refused = |case: &str, field: &str, change: fn(Options) -> Options| {
        let error = open_model(case).card().resolve(&change(options(case, 0)), 0).expect_err(field);
        assert!(
            matches!(&error, Error::InvalidRequest { field: found, .. } if found == field),
            "{case} {field}: {error}"
        );
    };
    refused("wan-i2v", "last_image", |options| {
        let picture = options.get(&INPUT_REFERENCE);
        options.with(&LAST_IMAGE, picture)
    });
    refused("wan-i2v", "input_reference", |options| options.with(&INPUT_REFERENCE, None));
    refused("wan-flf2v", "last_image", |options| options.with(&LAST_IMAGE, None));
    refused("wan-flf2v", "num_frames", |options| options.with(&NUM_FRAMES, 1));
    refused("wan-i2v", "num_frames", |options| options.with(&NUM_FRAMES, 8));
}

/// The runs of a case, through the card as a client's would go.
pub fn requests(case: &str, card: &DiffusionCard) -> Vec<(usize, DiffusionRequest)> {
    let count = golden_json(case)["runs"].as_array().expect("runs").len();
    (0..count).map(|run| (run, card.resolve(&options(case, run), 0).expect("a valid request"))).collect()
}

fn options(case: &str, run: usize) -> Options {
    let run = &golden_json(case)["runs"][run];
    let number = |field: &str| run[field].as_u64().map(|value| value as usize);
    let pictures = run["pictures"].as_array().expect("pictures");
    let picture = |place: usize| Some(picture(case, pictures.get(place)?.as_u64()? as usize));
    Options::default()
        .with(&PROMPT, run["prompt"].as_str().expect("a prompt").to_owned())
        .with(&NEGATIVE_PROMPT, run["negative_prompt"].as_str().map(str::to_owned))
        .with(&INPUT_REFERENCE, picture(0))
        .with(&LAST_IMAGE, picture(1))
        .with(&WIDTH, number("width"))
        .with(&HEIGHT, number("height"))
        .with(&NUM_FRAMES, number("num_frames"))
        .with(&NUM_INFERENCE_STEPS, number("num_inference_steps"))
        .with(&GUIDANCE_SCALE, run["guidance_scale"].as_f64())
        .with(&SEED, run["seed"].as_u64())
}

fn picture(case: &str, index: usize) -> Arc<Frame> {
    let pixels = &golden_tensors(case)[&format!("picture{index}")];
    let (height, width, _) = pixels.dims3().expect("[height, width, 3]");
    Arc::new(Frame { width, height, rgb: pixels.flatten_all().unwrap().to_vec1().unwrap() })
}
