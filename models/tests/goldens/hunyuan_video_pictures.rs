//! HunyuanVideo from a picture, stage by stage.

use std::sync::Arc;

use candle_core::Tensor;
use tale_models::diffusion::parameters::{INPUT_REFERENCE, LAST_IMAGE, MAX_SEQUENCE_LENGTH, NUM_FRAMES, SEED};
use tale_models::diffusion::{DiffusionCard, DiffusionRequest};
use tale_models::parameter::Options;
use tale_models::request::{Frame, Phase};
use tale_models::rng::TorchGenerator;
use tale_models::runner::diffusion::DiffusionModel;
use tale_models::runner::diffusion::course::FIRST_EXPERT;

use crate::clips::{check_cancelled, check_frames, check_steps, check_tensors, check_together};
use crate::hunyuan_video::{check_prompts, open_model, options as options_of};
use crate::support::{assert_close, encoded, golden_json, golden_tensors};

/// The picture is the first frame of the one, and lies behind the channels of the other. They differ in the names of the text
/// encoder's tensors too.
const CASES: [&str; 2] = ["hunyuan-video-i2v", "hunyuan-video-i2v-33ch"];

#[test]
fn every_stage_is_that_of_the_reference() {
    for case in CASES {
        let (model, tensors) = (open_model(case), golden_tensors(case));
        for (run, request) in requests(case, model.card()) {
            let name = format!("{case} run {run}");
            let tensor = |what: &str| &tensors[&format!("run{run}.{what}")];
            let encoded = encoded(&model, &request);
            let branches = model.conditioning(FIRST_EXPERT, &encoded, &request).unwrap();
            check_prompts(&name, &request, &branches, &tensor);
            for behind in branches.iter().filter_map(|branch| branch.behind.as_ref()) {
                assert_close(&format!("{name} behind"), behind, tensor("behind"), 1e-4);
            }
            let mut generator = TorchGenerator::new(request.sampling.seed);
            let noise = model.initial_latents(&request, &mut generator).unwrap();
            assert_close(&format!("{name} noise"), &noise, tensor("noise"), 0.0);
            let begin = model.picture_start().expect("it takes a picture").begin(noise, &encoded).unwrap();
            assert_close(&format!("{name} begin"), &begin, tensor("begin"), 1e-4);
            check_steps(&name, &model, &request, &branches, (begin, generator), &tensor);
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
        check_tensors(case, "hunyuan_video", 4);
    }
}

#[test]
fn what_a_picture_contradicts_is_refused_by_name() {
    let case = CASES[0];
    let model = open_model(case);
    let refused = |field: &str, options: Options| {
        let error = model.card().resolve(&options, 0).expect_err(field).to_string();
        assert!(error.contains(field), "{field}: {error}");
    };
    refused("input_reference", options(case, 0).with(&INPUT_REFERENCE, None));
    refused("last_image", options(case, 0).with(&LAST_IMAGE, picture(case, 1)));
    refused("num_frames", options(case, 0).with(&NUM_FRAMES, 8));
    // The template leaves no room for its own headers.
    let request = model.card().resolve(&options(case, 0).with(&MAX_SEQUENCE_LENGTH, 1), 0).expect("known when encoded");
    let inputs = model.inputs(&request);
    let rows: Vec<_> = inputs[0].rows.iter().collect();
    let Err(error) = model.begin_encode(&inputs[0].pass, &rows) else { panic!("a prompt of one token has no headers") };
    assert!(error.to_string().starts_with("prompt: leaves no room"), "{error}");
}

/// The runs of a case, through the card as a client's would go.
pub fn requests(case: &str, card: &DiffusionCard) -> Vec<(usize, DiffusionRequest)> {
    let count = golden_json(case)["runs"].as_array().expect("runs").len();
    (0..count).map(|run| (run, card.resolve(&options(case, run), 0).expect("a valid request"))).collect()
}

fn options(case: &str, run: usize) -> Options {
    let run = &golden_json(case)["runs"][run];
    let index = run["picture"].as_u64().expect("a picture") as usize;
    options_of(run).with(&INPUT_REFERENCE, picture(case, index))
}

fn picture(case: &str, index: usize) -> Arc<Frame> {
    let pixels: &Tensor = &golden_tensors(case)[&format!("picture{index}")];
    let (height, width, _) = pixels.dims3().expect("[height, width, 3]");
    Arc::new(Frame { width, height, rgb: pixels.flatten_all().unwrap().to_vec1().unwrap() })
}
