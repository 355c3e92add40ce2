//! Long and weighted prompts of SDXL: embeddings made by the rules from transformers' encoders, pictures by diffusers.

use serde_json::Value;
use tale_models::diffusion::DiffusionCard;
use tale_models::diffusion::DiffusionRequest;
use tale_models::diffusion::parameters::{
    GUIDANCE_SCALE, HEIGHT, MAX_SEQUENCE_LENGTH, NEGATIVE_PROMPT, NUM_INFERENCE_STEPS, PROMPT, SEED, WIDTH,
};
use tale_models::families::sdxl::pipeline::SdxlConditioning;
use tale_models::parameter::Options;
use tale_models::runner::diffusion::DiffusionModel;

use crate::sdxl::{load_runner, open_model};
use crate::support::{assert_close, conditioning, golden_json, golden_tensors, pictures, psnr};

const CASE: &str = "sdxl-prompts";
const TEXT_TOLERANCE: f64 = 1e-5;
const MIN_PSNR: f64 = 50.0;

fn options(run: &Value) -> Options {
    let size = |name: &str| run[name].as_u64().map(|value| value as usize);
    Options::default()
        .with(&PROMPT, run["prompt"].as_str().unwrap().to_owned())
        .with(&NEGATIVE_PROMPT, run["negative_prompt"].as_str().map(str::to_owned))
        .with(&WIDTH, size("width"))
        .with(&HEIGHT, size("height"))
        .with(&NUM_INFERENCE_STEPS, size("num_inference_steps"))
        .with(&GUIDANCE_SCALE, run["guidance_scale"].as_f64())
        .with(&SEED, run["seed"].as_u64())
}

fn runs() -> Vec<(usize, String, Value)> {
    let golden = golden_json(CASE);
    let runs = golden["runs"].as_array().unwrap().iter().enumerate();
    runs.map(|(i, run)| (i, run["checkpoint"].as_str().unwrap().to_owned(), run.clone())).collect()
}

/// The request, which takes as many chunks as the reference did.
fn resolve(card: &DiffusionCard, run: &Value) -> DiffusionRequest {
    let request = card.resolve(&options(run), 0).unwrap();
    assert_eq!(request.prompt.max_sequence_length as u64, run["max_sequence_length"].as_u64().unwrap());
    request
}

#[test]
fn embeddings_are_the_reference_ones() {
    let tensors = golden_tensors(CASE);
    for (i, checkpoint, run) in runs() {
        let model = open_model(&checkpoint);
        let request = resolve(model.card(), &run);
        let check = |prefix: &str, SdxlConditioning { text: found, .. }: &SdxlConditioning| {
            for (name, tensor) in
                [("prompt_embeds", &found.prompt_embeds), ("pooled_prompt_embeds", &found.pooled_prompt_embeds)]
            {
                let name = format!("run{i}.{prefix}{name}");
                assert_close(&name, tensor, &tensors[&name], TEXT_TOLERANCE);
            }
        };
        let branches = conditioning(&model, &request);
        check("", &branches[0]);
        check("negative_", &branches[1]);
    }
}

/// Through the runner, alone and beside sessions of another number of chunks.
#[test]
fn pictures_are_the_reference_ones() {
    let tensors = golden_tensors(CASE);
    for (i, checkpoint, run) in runs() {
        let (card, mut runner) = load_runner(&checkpoint, 4);
        let request = resolve(&card, &run);
        let short = card.resolve(&options(&run).with(&PROMPT, "A boat".to_owned()), 0).unwrap();
        let expected = tensors[&format!("run{i}.image")].flatten_all().unwrap().to_vec1::<u8>().unwrap();
        for together in [vec![request.clone()], vec![request.clone(), short, request]] {
            let found = psnr(&pictures(&mut *runner, &together)[0].rgb, &expected);
            println!("{CASE} run {i}, {} sessions: {found:.1} dB", together.len());
            assert!(found >= MIN_PSNR, "run {i}, {} sessions: {found:.1} dB", together.len());
        }
    }
}

#[test]
fn a_prompt_is_cut_only_where_the_client_says() {
    let card = open_model("sdxl-a").card().clone();
    let ask = |prompt: String, max_sequence_length: Option<usize>| {
        let options = Options::default()
            .with(&PROMPT, prompt)
            .with(&MAX_SEQUENCE_LENGTH, max_sequence_length)
            .with(&WIDTH, 64)
            .with(&HEIGHT, 64);
        card.resolve(&options, 0).map(|request| request.prompt.max_sequence_length).map_err(|error| error.to_string())
    };
    let words = |count: usize| vec!["x"; count].join(" ");
    for (count, length) in [(0, 77), (75, 77), (76, 154), (150, 154), (151, 231), (300, 308)] {
        assert_eq!(ask(words(count), None), Ok(length), "{count} tokens");
    }
    let refused = ask(words(301), None).unwrap_err();
    assert!(
        refused.contains("prompt") && refused.contains("301 tokens") && refused.contains("at most 300"),
        "{refused}"
    );
    for length in [2, 77, 154, 308] {
        assert_eq!(ask(words(1000), Some(length)), Ok(length));
    }
    for length in [1, 78, 153, 385] {
        let refused = ask(words(1), Some(length)).unwrap_err();
        assert!(refused.contains("max_sequence_length") && refused.contains("multiples of 77 to 308"), "{refused}");
    }
    let huge = ask("x".repeat(100_000), None).unwrap_err();
    assert!(huge.contains("bytes"), "{huge}");
    let wrong = ask("a ratio of (16:9)".to_owned(), Some(77)).unwrap_err();
    assert!(wrong.contains("character 12 ") && wrong.contains("0 to 2"), "{wrong}");
}

#[test]
fn what_is_longer_than_it_was_asked_to_be_is_cut() {
    let model = open_model("sdxl-a");
    let long = vec!["boat"; 200].join(" ");
    let cut = vec!["boat"; 75].join(" ");
    let encode = |prompt: &str| {
        let options = Options::default().with(&PROMPT, prompt.to_owned()).with(&MAX_SEQUENCE_LENGTH, 77);
        let request = model.card().resolve(&options, 0).unwrap();
        conditioning(&model, &request).remove(0).text.prompt_embeds
    };
    assert_close("cut", &encode(&long), &encode(&cut), 0.0);
}
