//! HunyuanVideo from text, stage by stage.

use std::path::Path;

use candle_core::Tensor;
use tale_models::checkpoint::Manifest;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::parameters::{
    GUIDANCE_SCALE, HEIGHT, MAX_SEQUENCE_LENGTH, NEGATIVE_PROMPT, NUM_FRAMES, NUM_INFERENCE_STEPS, PROMPT, SEED,
    TRUE_CFG_SCALE, WIDTH,
};
use tale_models::diffusion::{DiffusionCard, DiffusionRequest};
use tale_models::families::hunyuan_video::HunyuanVideoModel;
use tale_models::families::hunyuan_video::pipeline::{
    HunyuanVideoConditioning, HunyuanVideoEncoded, HunyuanVideoInput,
};
use tale_models::families::hunyuan_video::text::{HunyuanVideoPrompt, HunyuanVideoText};
use tale_models::parameter::Options;
use tale_models::request::Phase;
use tale_models::runner::diffusion::DiffusionModel;
use tale_models::runner::diffusion::course::FIRST_EXPERT;

use crate::clips::{check_cancelled, check_denoising, check_frames, check_tensors, check_together, decode};
use crate::support::{assert_close, case_dir, conditioning, encode, golden_json, golden_tensors};

/// They differ in widths, depths, ratios and axes; the first embeds its guidance and attends in its VAE.
const CASES: [&str; 2] = ["hunyuan-video-a", "hunyuan-video-b"];

#[test]
fn every_stage_is_that_of_the_reference() {
    for case in CASES {
        let (model, tensors) = (open_model(case), golden_tensors(case));
        for (run, request) in requests(case, model.card()) {
            let tensor = |what: &str| &tensors[&format!("run{run}.{what}")];
            let branches = conditioning(&model, &request);
            check_prompts(&format!("{case} run {run}"), &request, &branches, &tensor);
            let latents = check_denoising(&format!("{case} run {run}"), &model, &request, &branches, &tensor);
            assert_eq!(decode(&model, &request, &latents).dims()[0], request.canvas.num_frames);
        }
    }
}

/// What each branch is told of its prompt is that of the reference.
pub fn check_prompts<'a>(
    name: &str,
    request: &DiffusionRequest,
    branches: &[HunyuanVideoConditioning],
    tensor: &impl Fn(&str) -> &'a Tensor,
) {
    assert_eq!(branches.len(), 1 + usize::from(request.guidance.negative_prompt.is_some()));
    for (HunyuanVideoConditioning { text, .. }, part) in branches.iter().zip(["", "negative_"]) {
        let expected = tensor(&format!("{part}prompt_embeds"));
        assert_eq!(text.num_tokens, expected.dim(1).unwrap(), "{name} {part}tokens");
        let found = text.prompt_embeds.narrow(1, 0, text.num_tokens).unwrap();
        assert_close(&format!("{name} {part}prompt_embeds"), &found, expected, 1e-4);
        let pooled = tensor(&format!("{part}pooled_prompt_embeds"));
        assert_close(&format!("{name} {part}pooled"), &text.pooled_prompt_embeds, pooled, 1e-4);
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

/// Their prompts have different numbers of tokens.
#[test]
fn clips_made_together_are_those_made_alone() {
    for case in CASES {
        let model = open_model(case);
        for (_, first) in requests(case, model.card()) {
            let mut second = first.with_seed(3);
            second.prompt.text = "Another prompt altogether, and a longer one".into();
            check_together(case, open_model(case), [first, second]);
        }
    }
}

#[test]
fn whatever_is_cancelled_leaves_nothing() {
    for case in CASES {
        let model = open_model(case);
        let (_, request) = requests(case, model.card()).remove(0);
        let phases = [Phase::Encode, Phase::Denoise, Phase::VaeDecode];
        check_cancelled(case, model, &request, &phases);
    }
}

/// A clip of several stretches is decoded in as many steps.
#[test]
fn a_clip_is_decoded_stretch_by_stretch() {
    let model = open_model("hunyuan-video-b");
    let steps = |frames: usize| {
        let options = Options::default().with(&PROMPT, "x".to_owned()).with(&NUM_FRAMES, frames);
        model.num_decode_steps(FIRST_EXPERT, &model.card().resolve(&options, 0).expect("valid"))
    };
    assert_eq!([1, 13, 17, 25, 29, 129].map(steps), [1, 1, 2, 2, 3, 11]);
}

#[test]
fn every_tensor_of_a_checkpoint_is_known() {
    for case in CASES {
        check_tensors(case, "hunyuan_video", 4);
    }
}

/// Prompts of several sessions go through the encoders as rows of one pass.
#[test]
fn prompts_encoded_together_have_the_bits_of_lone_ones() {
    for case in CASES {
        let model = open_model(case);
        let options = Options::default().with(&MAX_SEQUENCE_LENGTH, 220);
        let request = model.card().resolve(&options, 0).unwrap();
        let prompts = ["A boat", "", "Seven ships in a harbour under the evening sun", "A boat"];
        let prompts = prompts.map(|text| {
            HunyuanVideoInput::Prompt(HunyuanVideoPrompt { text: text.to_owned(), picture: None, told_length: 220 })
        });
        let pass = &model.inputs(&request)[0].pass;
        let together = encode(&model, pass, &prompts.each_ref());
        for (prompt, together) in prompts.iter().zip(&together) {
            let alone = encode(&model, pass, &[prompt]);
            let (together, alone) = (of_prompt(together), of_prompt(&alone[0]));
            assert_eq!(together.num_tokens, alone.num_tokens);
            assert_close(&format!("{prompt:?}"), &together.prompt_embeds, &alone.prompt_embeds, 0.0);
            assert_close(&format!("{prompt:?}"), &together.pooled_prompt_embeds, &alone.pooled_prompt_embeds, 0.0);
        }
    }
}

fn of_prompt(encoded: &HunyuanVideoEncoded) -> &HunyuanVideoText {
    let HunyuanVideoEncoded::Prompt(text) = encoded else { panic!("a prompt: {encoded:?}") };
    text
}

#[test]
fn checkpoints_of_other_pipelines_are_refused_by_name() {
    let refused = |file: &str, field: &str, value: serde_json::Value| {
        let copy = tempfile::tempdir().expect("a temporary folder");
        crate::support::copy_folder(&case_dir("hunyuan-video-b").join("checkpoint"), copy.path());
        let path = copy.path().join(file);
        let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        json[field] = value;
        std::fs::write(&path, json.to_string()).unwrap();
        let error = try_open(copy.path()).err().unwrap_or_else(|| panic!("{file} with {field} is refused"));
        let message = error.to_string();
        assert!(message.contains(field) && message.contains(file), "{file} {field}: {message}");
    };
    let class = |name: &str| serde_json::json!(["transformers", name]);
    refused("model_index.json", "text_encoder", class("LlavaForConditionalGeneration"));
    refused("model_index.json", "vae", class("AutoencoderKLWan"));
    refused("transformer/config.json", "image_condition_type", "token_replace".into());
    refused("transformer/config.json", "in_channels", 33.into());
    refused("transformer/config.json", "out_channels", 4.into());
    refused("transformer/config.json", "text_embed_dim", 4096.into());
    refused("transformer/config.json", "pooled_projection_dim", 768.into());
    refused("transformer/config.json", "qk_norm", serde_json::Value::Null);
    refused("transformer/config.json", "patch_size_t", 2.into());
    refused("transformer/config.json", "rope_axes_dim", serde_json::json!([4, 4, 4]));
    refused("vae/config.json", "temporal_compression_ratio", 8.into());
    refused("vae/config.json", "spatial_compression_ratio", 16.into());
    refused("vae/config.json", "act_fn", "gelu".into());
    refused("vae/config.json", "norm_num_groups", 3.into());
    refused("vae/config.json", "up_block_types", serde_json::json!(["UpDecoderBlock2D"]));
    refused("scheduler/scheduler_config.json", "use_dynamic_shifting", true.into());
    refused("tokenizer/tokenizer_config.json", "padding_side", "left".into());
    refused("text_encoder/config.json", "num_hidden_layers", 1.into());
}

pub fn try_open(dir: &Path) -> tale_models::Result<HunyuanVideoModel> {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto)?;
    let manifest = Manifest::read(dir)?;
    HunyuanVideoModel::load(&manifest, &placement, &mut |component| manifest.component(component)?.weights(&placement))
}

pub fn open_model(case: &str) -> HunyuanVideoModel {
    try_open(&case_dir(case).join("checkpoint")).unwrap_or_else(|e| panic!("{case}: {e}"))
}

/// What a run asks for.
pub fn options(run: &serde_json::Value) -> Options {
    let number = |field: &str| run[field].as_u64().map(|value| value as usize);
    Options::default()
        .with(&PROMPT, run["prompt"].as_str().expect("a prompt").to_owned())
        .with(&NEGATIVE_PROMPT, run["negative_prompt"].as_str().map(str::to_owned))
        .with(&TRUE_CFG_SCALE, run["true_cfg_scale"].as_f64())
        .with(&WIDTH, number("width"))
        .with(&HEIGHT, number("height"))
        .with(&NUM_FRAMES, number("num_frames"))
        .with(&NUM_INFERENCE_STEPS, number("num_inference_steps"))
        .with(&GUIDANCE_SCALE, run["guidance_scale"].as_f64())
        .with(&SEED, run["seed"].as_u64())
        .with(&MAX_SEQUENCE_LENGTH, number("max_sequence_length"))
}

/// The runs of a case, through the card as a client's would go.
pub fn requests(case: &str, card: &DiffusionCard) -> Vec<(usize, DiffusionRequest)> {
    let golden = golden_json(case);
    let request = |run: &serde_json::Value| card.resolve(&options(run), 0).expect("a valid request");
    golden["runs"].as_array().expect("runs").iter().map(request).enumerate().collect()
}
