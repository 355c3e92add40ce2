//! CogVideoX from a picture, and CogVideoX 1.5, stage by stage.

use std::sync::Arc;

use tale_models::Error;
use tale_models::checkpoint::Manifest;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::parameters::{
    HEIGHT, INPUT_REFERENCE, LAST_IMAGE, MAX_SEQUENCE_LENGTH, NUM_FRAMES, SEED, WIDTH,
};
use tale_models::diffusion::{DiffusionCard, DiffusionRequest};
use tale_models::parameter::Options;
use tale_models::request::{Frame, Phase};
use tale_models::runner::diffusion::DiffusionModel;
use tale_models::vae::cogvideox::CogVideoXVaeConfig;
use tale_models::vae::cogvideox::encoder::CogVideoXVaeEncoder;

use crate::clips::{check_cancelled, check_denoising, check_frames, check_tensors, check_together, decode};
use crate::cogvideox::{open_model, options};
use crate::support::{assert_close, case_dir, conditioning, golden_json, golden_tensors};

/// Learned positions beside rotations; patches over time; those with an embedding of offsets and divided latents.
const CASES: [&str; 3] = ["cogvideox-i2v", "cogvideox-1.5", "cogvideox-1.5-i2v"];
/// Those that begin from a picture.
const FROM_A_PICTURE: [&str; 2] = ["cogvideox-i2v", "cogvideox-1.5-i2v"];

#[test]
fn every_stage_is_that_of_the_reference() {
    for case in CASES {
        let (model, tensors) = (open_model(case), golden_tensors(case));
        for (run, request) in requests(case, model.card()) {
            let tensor = |what: &str| &tensors[&format!("run{run}.{what}")];
            let branches = conditioning(&model, &request);
            assert_eq!(branches.len(), 1 + usize::from(request.guidance.negative_prompt.is_some()));
            for (branch, what) in branches.iter().zip(["prompt_embeds", "negative_prompt_embeds"]) {
                assert_close(&format!("{case} run {run} {what}"), &branch.text, tensor(what), 1e-4);
                assert_eq!(branch.picture.is_some(), FROM_A_PICTURE.contains(&case));
                if let Some(picture) = &branch.picture {
                    let expected = tensor("condition").narrow(0, 0, 1).unwrap();
                    assert_close(&format!("{case} run {run} condition"), picture, &expected, 1e-4);
                }
            }
            let latents = check_denoising(&format!("{case} run {run}"), &model, &request, &branches, &tensor);
            assert_eq!(decode(&model, &request, &latents).dims()[0], request.canvas.num_frames);
        }
    }
}

/// What the VAE says of the first nine of seventeen frames, which the reference encodes before the others.
#[test]
fn frames_that_come_at_once_are_encoded_as_in_the_reference() {
    for case in FROM_A_PICTURE {
        let manifest = Manifest::read(&case_dir(case).join("checkpoint")).unwrap();
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
        let component = manifest.component("vae").unwrap();
        let config: CogVideoXVaeConfig = component.config().unwrap();
        let encoder = CogVideoXVaeEncoder::load(&component.weights(&placement).unwrap(), &config).unwrap();
        let tensors = golden_tensors(case);
        let moments = encoder.moments(tensors["video"].narrow(2, 0, 9).unwrap().contiguous().unwrap()).unwrap();
        let mean = moments.narrow(1, 0, config.latent_channels).unwrap();
        let expected = tensors["video.mean"].narrow(2, 0, 3).unwrap();
        assert_close(&format!("{case} mean"), &mean, &expected, 1e-4);
        let log_variance = moments.narrow(1, config.latent_channels, config.latent_channels).unwrap();
        let std = (log_variance.clamp(-30.0, 20.0).unwrap() * 0.5).unwrap().exp().unwrap();
        let expected = tensors["video.std"].narrow(2, 0, 3).unwrap();
        assert_close(&format!("{case} std"), &std, &expected, 1e-4);
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

/// Two requests of one shape share steps; their pictures, and what is drawn of them, do not mix.
#[test]
fn videos_made_together_are_those_made_alone() {
    for case in CASES {
        let model = open_model(case);
        let card = model.card().clone();
        let (_, first) = requests(case, &card).remove(0);
        let other = FROM_A_PICTURE.contains(&case).then(|| picture(case, 3));
        let options = with_picture(case, 0).with(&INPUT_REFERENCE, other).with(&SEED, 3);
        check_together(case, model, [first, card.resolve(&options, 0).expect("a valid request")]);
    }
}

#[test]
fn whatever_is_cancelled_leaves_nothing() {
    for case in CASES {
        let model = open_model(case);
        let (_, request) = requests(case, model.card()).remove(0);
        let of_picture = FROM_A_PICTURE.contains(&case).then_some(Phase::VaeEncode);
        let phases = [Phase::Encode, Phase::Denoise, Phase::VaeDecode].into_iter().chain(of_picture);
        check_cancelled(case, model, &request, &phases.collect::<Vec<_>>());
    }
}

#[test]
fn every_tensor_of_a_checkpoint_is_known() {
    for case in CASES {
        check_tensors(case, "cogvideox", 3);
    }
}

#[test]
fn what_a_model_cannot_make_is_refused_by_name() {
    let refused = |case: &str, field: &str, allowed: &str, change: &dyn Fn(Options) -> Options| {
        let error = open_model(case).card().resolve(&change(with_picture(case, 0)), 0).expect_err(field);
        let Error::InvalidRequest { field: found, problem } = &error else { panic!("{case} {field}: {error}") };
        assert!(found == field && problem.contains(allowed), "{case} {field}: {error}");
    };
    // Positions are learned for one size, and for prompts of one length.
    refused("cogvideox-i2v", "width", "allowed: 48", &|options| options.with(&WIDTH, 56));
    refused("cogvideox-i2v", "height", "allowed: 32", &|options| options.with(&HEIGHT, 24));
    refused("cogvideox-i2v", "max_sequence_length", "20 to 20", &|options| options.with(&MAX_SEQUENCE_LENGTH, 19));
    refused("cogvideox-i2v", "num_frames", "8k+1", &|options| options.with(&NUM_FRAMES, 21));
    refused("cogvideox-i2v", "input_reference", "is missing", &|options| options.with(&INPUT_REFERENCE, None));
    let last = |options: Options| {
        let first = options.get(&INPUT_REFERENCE);
        options.with(&LAST_IMAGE, first)
    };
    refused("cogvideox-i2v", "last_image", "leave it out", &last);
    // There are no rotations beyond the rows and columns of the grid.
    refused("cogvideox-1.5", "width", "from 8 to 64", &|options| options.with(&WIDTH, 72));
    refused("cogvideox-1.5", "height", "from 8 to 56", &|options| options.with(&HEIGHT, 64));
    refused("cogvideox-1.5", "num_frames", "16k+1 from 1 to 161", &|options| options.with(&NUM_FRAMES, 25));
    refused("cogvideox-1.5", "input_reference", "from text alone", &|options| {
        options.with(&INPUT_REFERENCE, picture("cogvideox-i2v", 0))
    });
}

#[test]
fn a_video_without_a_size_has_the_models_own() {
    for (case, expected) in [("cogvideox-i2v", (48, 32, 9, 8)), ("cogvideox-1.5-i2v", (56, 56, 17, 16))] {
        let options = Options::default().with(&INPUT_REFERENCE, picture(case, 1));
        let request = open_model(case).card().resolve(&options, 0).expect("a valid request");
        let canvas = request.canvas;
        assert_eq!((canvas.width, canvas.height, canvas.num_frames, canvas.fps), expected, "{case}");
        let fitted = &request.keyframes.expect("a picture").first.fitted;
        assert_eq!((fitted.width, fitted.height), (canvas.width, canvas.height), "{case}");
    }
}

/// The runs of a case, through the card as a client's would go.
pub fn requests(case: &str, card: &DiffusionCard) -> Vec<(usize, DiffusionRequest)> {
    let count = golden_json(case)["runs"].as_array().expect("runs").len();
    (0..count).map(|run| (run, card.resolve(&with_picture(case, run), 0).expect("a valid request"))).collect()
}

fn with_picture(case: &str, run: usize) -> Options {
    let index = golden_json(case)["runs"][run]["picture"].as_u64();
    options(case, run).with(&INPUT_REFERENCE, index.map(|index| picture(case, index as usize)))
}

pub fn picture(case: &str, index: usize) -> Arc<Frame> {
    let pixels = &golden_tensors(case)[&format!("picture{index}")];
    let (height, width, _) = pixels.dims3().expect("[height, width, 3]");
    Arc::new(Frame { width, height, rgb: pixels.flatten_all().unwrap().to_vec1().unwrap() })
}
