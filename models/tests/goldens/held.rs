//! Answers that are held to a grammar, from networks that know nothing of it: whole ones are of it, and nobody's tokens depend on
//! who runs beside, on chunks or on preemption.

use serde_json::{Value, json};
use tale_models::family::LoadOptions;
use tale_models::grammar::{Asked, Form};
use tale_models::kv::{PrefixCache, blocks_for};
use tale_models::parameter::Options;
use tale_models::request::{FinishReason, TextRequest};
use tale_models::runner::text::lookup::PromptLookup;

use crate::text::{Answer, CASES, Server, greedy, prompts, with_blocks};

/// Whether a text is what a grammar says.
type IsOne = fn(&str) -> bool;

/// What an answer may be, and whether one is it.
fn forms() -> [(Form, IsOne); 4] {
    let schema = json!({"type": "object", "properties": {"shots": {"type": "array", "minItems": 1, "maxItems": 3,
        "items": {"type": "object", "properties": {"prompt": {"type": "string", "maxLength": 8}, "seconds": {"enum": [4, 8]}},
            "required": ["prompt", "seconds"], "additionalProperties": false}}},
        "required": ["shots"], "additionalProperties": false});
    fn is_story(text: &str) -> bool {
        let value: Value = serde_json::from_str(text).unwrap_or_default();
        let shots = value["shots"].as_array();
        shots.is_some_and(|shots| (1..=3).contains(&shots.len()) && shots.iter().all(|shot| shot["prompt"].is_string()))
    }
    fn is_digits(text: &str) -> bool {
        text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_digit())
    }
    [
        (Form::Schema(schema), is_story),
        (Form::Schema(json!({"type": "integer", "minimum": 10, "maximum": 99})), |text| {
            text.parse().is_ok_and(|n: u8| n > 9)
        }),
        (Form::Regex("[0-9]{12}".to_owned()), is_digits),
        (Form::Choice(vec!["red".to_owned(), "reddish".to_owned()]), |text| text == "red" || text == "reddish"),
    ]
}

/// Greedy and sampled requests of all forms, and some that are free.
fn requests(case: &str, server: &Server) -> (Vec<TextRequest>, Vec<Option<IsOne>>) {
    let mut requests: Vec<(TextRequest, Option<IsOne>)> = Vec::new();
    for (index, prompt) in prompts(case).into_iter().enumerate() {
        let free = TextRequest { max_tokens: 30, ..greedy(prompt.clone()) };
        requests.push((free.clone(), None));
        for (form, is_one) in forms() {
            let asked = Asked { field: "f".to_owned(), form };
            let grammar = server.card().grammar(asked, &Options::default()).expect("compiles");
            let mut request = TextRequest { ignore_eos: false, max_tokens: 54, ..free.clone() }.held_to(Some(grammar));
            requests.push((request.clone(), Some(is_one)));
            request.sampling.temperature = 1.5;
            request.sampling.top_p = 0.95;
            request.sampling.seed = index as u64;
            requests.push((request, Some(is_one)));
        }
    }
    requests.into_iter().unzip()
}

#[test]
fn answers_are_of_their_grammar_alone_batched_in_chunks_and_preempted() {
    for case in CASES {
        let mut server = Server::load(case, LoadOptions::default());
        let (requests, forms) = requests(case, &server);
        let alone: Vec<Answer> = requests.iter().map(|request| server.answer_alone(request.clone())).collect();
        let mut whole = 0;
        for (answer, is_one) in alone.iter().zip(&forms) {
            assert_eq!(answer.failure, None, "{case}");
            let (reason, _) = answer.end.expect("it ended");
            if let (Some(is_one), FinishReason::Stop) = (is_one, reason) {
                assert!(is_one(&answer.text), "{case}: {}", answer.text);
                whole += 1;
            }
        }
        let num_held = forms.iter().flatten().count();
        assert!(whole * 2 > num_held, "{case}: {whole} of {num_held} answers were whole");
        assert_eq!(server.answer_all(&requests), alone, "{case}");
        let options = LoadOptions { max_batch_tokens: 7, ..LoadOptions::default() };
        assert_eq!(Server::load(case, options).answer_all(&requests), alone, "{case}: in chunks");
        let longest = requests.iter().map(|request| request.prompt.len() + request.max_tokens).max().expect("some");
        let mut short = Server::load(case, with_blocks(case, blocks_for(longest) + 2));
        assert_eq!(short.answer_all(&requests), alone, "{case}: preempted");
        assert!(short.saw_preemption, "{case}: the pool was never dry, so nothing was tested");
    }
}

/// Sessions that are held to a grammar share steps with others whose tokens are guessed: nobody's answer changes, and only of
/// those that are free tokens are guessed.
#[test]
fn held_answers_stay_the_same_beside_guesses() {
    let lookup = PromptLookup { num_speculative_tokens: 5, prompt_lookup_min: 1, prompt_lookup_max: 3 };
    for case in CASES {
        let off = LoadOptions { prefix_cache: PrefixCache::Off, ..LoadOptions::default() };
        let mut plain = Server::load(case, off);
        let (held, _) = requests(case, &plain);
        let repeated = prompts(case).into_iter().map(|prompt| {
            let prompt: Vec<u32> = prompt.into_iter().cycle().take(60).collect();
            TextRequest { max_tokens: 30, ..greedy(prompt) }
        });
        // Free ones first, last and between, so that rows of guesses stand before and behind those of held sessions.
        let mut mixed = Vec::new();
        for (index, free) in repeated.enumerate() {
            mixed.push(free);
            mixed.extend(held.iter().skip(index).step_by(prompts(case).len()).cloned());
        }
        mixed.push(mixed[0].clone());
        let expected: Vec<Answer> = mixed.iter().map(|request| plain.answer_alone(request.clone())).collect();
        let guessing = |options| LoadOptions { prompt_lookup: Some(lookup), ..options };
        let mut server = Server::load(case, guessing(LoadOptions::default()));
        assert_eq!(server.answer_all(&mixed), expected, "{case}: together");
        let (drafts, accepted) = server.drafts;
        assert!(accepted > 0 && accepted < drafts, "{case}: {accepted} of {drafts} guesses were right");
        for request in mixed.iter().filter(|request| request.grammar.is_some()) {
            server.answer_alone(request.clone());
        }
        assert_eq!(server.drafts, (drafts, accepted), "{case}: tokens of held sessions were guessed");
        let longest = mixed.iter().map(|request| request.prompt.len() + request.max_tokens).max().expect("some");
        let few = LoadOptions { max_batch_tokens: 24, ..with_blocks(case, blocks_for(longest) + 2) };
        let mut narrow = Server::load(case, guessing(few));
        assert_eq!(narrow.answer_all(&mixed), expected, "{case}: preempted");
        assert!(narrow.saw_preemption, "{case}: the pool was never dry, so nothing was tested");
    }
}
