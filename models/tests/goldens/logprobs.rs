//! How likely tokens are said to be: against transformers' logits, and the same alone, in a batch, in any chunks, after
//! preemption, beside prompts that are cached and guesses.

use candle_core::DType;
use tale_models::Error;
use tale_models::family::LoadOptions;
use tale_models::kv::PrefixCache;
use tale_models::parameter::Options;
use tale_models::request::{FinishReason, PlacedLogprobs, TextRequest, TokenLogprobs};
use tale_models::runner::text::logprobs::MAX_PROMPT_ROWS;
use tale_models::runner::text::lookup::PromptLookup;
use tale_models::text_parameters::{ECHO, LOGPROBS, MAX_TOKENS};

use crate::support::golden_tensors;
use crate::text::{CASES, Copy, Server, greedy, mixed_requests, prompts, with_blocks};

pub const TOLERANCE: f64 = 1e-4;
const TOP: usize = 5;

/// The log-softmax of the reference's logits, position by position.
fn reference(case: &str, prompt: usize) -> Vec<Vec<f64>> {
    let logits = golden_tensors(case)[&format!("logits.{prompt}")].to_dtype(DType::F64).expect("numbers");
    let (rows, vocab) = (logits.dim(0).expect("rows"), logits.dim(logits.rank() - 1).expect("columns"));
    let logits: Vec<f64> = logits.flatten_all().expect("flat").to_vec1().expect("f64");
    assert_eq!(logits.len(), rows * vocab);
    let log_softmax = |row: &[f64]| {
        let greatest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|logit| (logit - greatest).exp()).sum();
        row.iter().map(|logit| logit - greatest - sum.ln()).collect()
    };
    logits.chunks(vocab).map(log_softmax).collect()
}

/// The greatest difference from the reference: of the token, and of the most likely ones in its place.
fn error(told: &TokenLogprobs, expected: &[f64]) -> f64 {
    let mut sorted = expected.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let own = (f64::from(told.logprob) - expected[told.token as usize]).abs();
    let top = told.top.iter().zip(&sorted).flat_map(|((id, logprob), best)| {
        [(f64::from(*logprob) - best).abs(), (f64::from(*logprob) - expected[*id as usize]).abs()]
    });
    top.fold(own, f64::max)
}

/// The greatest difference of all tokens of a prompt, and of the one behind it.
pub fn greatest_error(case: &str, prompt: usize, told: &[TokenLogprobs]) -> f64 {
    let expected = reference(case, prompt);
    assert_eq!(told.len(), expected.len(), "{case}");
    told.iter().zip(&expected).map(|(told, expected)| error(told, expected)).fold(0.0, f64::max)
}

fn told(request: TextRequest) -> TextRequest {
    TextRequest { logprobs: Some(TOP), prompt_logprobs: Some(TOP), ..request }
}

#[test]
fn prompts_are_as_likely_as_the_reference_says() {
    for case in CASES {
        let mut server = Server::load(case, LoadOptions::default());
        let mut greatest = 0f64;
        for (index, prompt) in prompts(case).into_iter().enumerate() {
            let answer = server.answer_alone(told(TextRequest { max_tokens: 1, ..greedy(prompt.clone()) }));
            let mut all = answer.prompt.expect("it was asked for");
            assert_eq!(all.iter().map(|told| told.token).collect::<Vec<_>>(), prompt[1..], "{case}");
            all.extend(answer.logprobs.into_iter().map(|placed| placed.logprobs));
            assert!(all.iter().all(|told| told.top.len() == TOP), "{case}");
            greatest = greatest.max(greatest_error(case, index, &all));
        }
        println!("{case}: at most {greatest:.1e} from the reference");
        assert!(greatest < TOLERANCE, "{case}: {greatest:.1e}");
    }
}

/// Biases, penalties and temperatures change what is chosen, and not how likely the model finds it.
#[test]
fn answers_are_as_likely_as_the_same_tokens_in_a_prompt() {
    for case in CASES {
        let mut server = Server::load(case, LoadOptions::default());
        for mut request in mixed_requests(case) {
            request.sampling.logit_bias = vec![(7, 3.0)];
            let answer = server.answer_alone(told(request.clone()));
            let logprobs: Vec<_> = answer.logprobs.into_iter().map(|placed| placed.logprobs).collect();
            assert_eq!(logprobs.iter().map(|told| told.token).collect::<Vec<_>>(), answer.tokens, "{case}");
            let both = [request.prompt.clone(), answer.tokens].concat();
            let again = server.answer_alone(told(TextRequest { max_tokens: 0, ..greedy(both) }));
            assert_eq!(again.prompt.expect("told")[request.prompt.len() - 1..], logprobs, "{case}");
            assert_eq!((again.tokens.len(), again.text.as_str()), (0, ""), "{case}");
            assert_eq!(again.end.map(|(reason, _)| reason), Some(FinishReason::Length), "{case}");
        }
    }
}

#[test]
fn greedy_tokens_are_the_most_likely_ones() {
    let mut server = Server::load("qwen2", LoadOptions::default());
    let answer = server.answer_alone(told(greedy(prompts("qwen2").remove(0))));
    for PlacedLogprobs { logprobs, .. } in &answer.logprobs {
        assert_eq!(logprobs.top[0], (logprobs.token, logprobs.logprob));
        assert!(logprobs.top.is_sorted_by(|(_, a), (_, b)| a >= b));
    }
}

/// Every third request tells of the answer, of both, of nothing.
fn requests(case: &str) -> Vec<TextRequest> {
    let mut requests = mixed_requests(case);
    for prompt in prompts(case) {
        // Longer than what is there of a prompt at a time.
        let repeated: Vec<u32> = prompt.into_iter().cycle().take(2 * MAX_PROMPT_ROWS + 20).collect();
        requests.push(TextRequest { max_tokens: 30, ..greedy(repeated.clone()) });
        requests.push(TextRequest { max_tokens: 0, ..greedy(repeated) });
    }
    for (index, request) in requests.iter_mut().enumerate() {
        request.logprobs = [Some(2), Some(0), None][index % 3];
        request.prompt_logprobs = [None, Some(3), Some(0), None][index % 4];
    }
    requests
}

#[test]
fn the_same_is_told_whatever_runs_beside() {
    for case in CASES {
        let requests = requests(case);
        let off = LoadOptions { prefix_cache: PrefixCache::Off, ..LoadOptions::default() };
        let mut plain = Server::load(case, off);
        let expected: Vec<_> = requests.iter().map(|request| plain.answer_alone(request.clone())).collect();
        for (request, answer) in requests.iter().zip(&expected) {
            let asked = request.logprobs.map_or(0, |_| answer.tokens.len());
            assert_eq!(answer.logprobs.len(), asked, "{case}");
            let of_prompt = answer.prompt.as_ref().map(|told| told.len() + 1);
            assert_eq!(of_prompt, request.prompt_logprobs.map(|_| request.prompt.len()), "{case}");
        }
        assert_eq!(plain.answer_all(&requests), expected, "{case} together");
        let lookup = PromptLookup { num_speculative_tokens: 5, prompt_lookup_min: 1, prompt_lookup_max: 3 };
        for prompt_lookup in [None, Some(lookup)] {
            let mut server = Server::load(case, LoadOptions { prompt_lookup, ..LoadOptions::default() });
            // The second time the cache has the prompts.
            for time in ["first", "second"] {
                assert_eq!(server.answer_all(&requests), expected, "{case} {prompt_lookup:?} {time}");
            }
            assert_eq!(server.drafts.1 > 0, prompt_lookup.is_some(), "{case}");
            let few = LoadOptions { max_batch_tokens: 24, max_batch_sequences: 5, ..with_blocks(case, 8) };
            let mut narrow = Server::load(case, LoadOptions { prompt_lookup, ..few });
            assert_eq!(narrow.answer_all(&requests), expected, "{case} {prompt_lookup:?} preempted");
            assert!(narrow.saw_preemption, "{case}");
        }
    }
}

#[test]
fn tokens_are_told_with_their_text() {
    for case in CASES {
        let mut server = Server::load(case, LoadOptions::default());
        let request = told(greedy(prompts(case).swap_remove(0)));
        let whole = server.answer_alone(request.clone());
        let places = |answer: &[PlacedLogprobs]| answer.iter().map(|placed| placed.offset).collect::<Vec<_>>();
        assert!(places(&whole.logprobs).is_sorted(), "{case}");
        // Tokens that begin behind the stop string's begin are cut off with the text.
        let text: Vec<char> = whole.text.chars().collect();
        let begin = text.len() / 2;
        let stop: String = text[begin..begin + 2].iter().collect();
        let cut = server.answer_alone(TextRequest { stop: vec![stop], ..request.clone() });
        let length = cut.text.chars().count();
        let kept = whole.logprobs.iter().take_while(|placed| placed.offset < length).count();
        assert_eq!(cut.logprobs, whole.logprobs[..kept], "{case}");
        assert!(cut.tokens.len() > kept, "{case}: the stop string has tokens of its own");
        // The token that ends an answer has no text, and is told at its end.
        let last = whole.tokens[3];
        let ended = server.answer_alone(TextRequest { stop_token_ids: vec![last], ..request });
        assert_eq!(ended.logprobs.len(), ended.tokens.len(), "{case}");
        let end = ended.logprobs.last().expect("one");
        assert_eq!((end.logprobs.token, end.offset), (last, ended.text.chars().count()), "{case}");
    }
}

#[test]
fn a_prompt_whose_logits_are_not_finite_fails_alone() {
    let prompts = prompts("llama-untied");
    let poison = *prompts[0].iter().find(|token| !prompts[1].contains(token)).expect("the prompts differ");
    let copy = Copy::of("llama-untied");
    copy.edit_tensor("model.embed_tokens.weight", |rows| rows[poison as usize].fill(f32::NAN));
    let mut server = Server::open(copy.path(), LoadOptions::default());
    let asked = |index: usize| told(TextRequest { max_tokens: 4 * index, ..greedy(prompts[index].clone()) });
    let answers = server.answer_all(&[asked(0), asked(1)]);
    assert!(answers[0].failure.as_deref().is_some_and(|failure| failure.contains("not finite")), "{:?}", answers[0]);
    assert!(answers[0].prompt.is_none());
    assert_eq!((answers[1].logprobs.len(), answers[1].prompt.as_ref().map(Vec::len)), (4, Some(prompts[1].len() - 1)));
}

#[test]
fn an_answer_without_tokens_is_an_echo() {
    let server = Server::load("qwen2", LoadOptions::default());
    let resolve = |options: &Options| server.card().resolve(vec![1, 2], options, 0);
    let none = Options::default().with(&MAX_TOKENS, 0);
    assert!(matches!(resolve(&none), Err(Error::InvalidRequest { .. })));
    let none = none.with(&ECHO, true);
    let request = resolve(&none).expect("an echo");
    assert_eq!((request.max_tokens, request.logprobs, request.prompt_logprobs), (0, None, None));
    let request = resolve(&none.with(&LOGPROBS, 2)).expect("an echo");
    assert_eq!((request.max_tokens, request.logprobs, request.prompt_logprobs), (0, Some(2), Some(2)));
}
