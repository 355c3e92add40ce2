//! Tokens that are guessed from what came before change nothing of an answer: greedy or sampled, penalised, stopped, preempted,
//! cached, at its last token.

use tale_models::family::LoadOptions;
use tale_models::kv::PrefixCache;
use tale_models::request::{ClientId, TextRequest};
use tale_models::runner::text::lookup::PromptLookup;

use crate::text::{CASES, Server, greedy, mixed_requests, prompts, with_blocks};

fn lookups() -> [PromptLookup; 2] {
    [(7, 1, 3), (2, 2, 4)].map(|(num_speculative_tokens, prompt_lookup_min, prompt_lookup_max)| PromptLookup {
        num_speculative_tokens,
        prompt_lookup_min,
        prompt_lookup_max,
    })
}

/// Requests whose prompts and answers repeat themselves, and others.
fn requests(case: &str) -> Vec<TextRequest> {
    let mut requests = mixed_requests(case);
    for prompt in prompts(case) {
        let repeated: Vec<u32> = prompt.iter().copied().cycle().take(60).collect();
        for (index, request) in [greedy(repeated.clone()), greedy(repeated)].into_iter().enumerate() {
            let mut request = TextRequest { max_tokens: 30 + index, ..request };
            // Sampled from few tokens: some guesses are right.
            request.sampling.temperature = 0.7 * index as f32;
            request.sampling.top_k = 2;
            request.sampling.presence_penalty = 0.5 * index as f32;
            request.sampling.seed = 3;
            requests.push(request);
        }
    }
    requests
}

#[test]
fn guesses_change_no_token() {
    for case in CASES {
        let off = LoadOptions { prefix_cache: PrefixCache::Off, ..LoadOptions::default() };
        let mut plain = Server::load(case, off);
        let mut requests = requests(case);
        let alone: Vec<_> = requests.iter().map(|request| plain.answer_alone(request.clone())).collect();
        // One more, that is stopped by something in the middle of what it says.
        let text: String = alone[0].text().chars().skip(9).take(2).collect();
        requests.push(TextRequest { stop: vec![text], ..requests[0].clone() });
        let expected: Vec<_> = requests.iter().map(|request| plain.answer_alone(request.clone())).collect();
        for lookup in lookups() {
            let guessing = |options: LoadOptions| LoadOptions { prompt_lookup: Some(lookup), ..options };
            let mut server = Server::load(case, guessing(LoadOptions::default()));
            let apart: Vec<_> = requests.iter().map(|request| server.answer_alone(request.clone())).collect();
            assert_eq!(apart, expected, "{case} {lookup:?}");
            assert_eq!(server.answer_all(&requests), expected, "{case} {lookup:?} together");
            let (drafts, accepted) = server.drafts;
            println!("{case} {lookup:?}: {accepted} of {drafts} guesses were right");
            assert!(accepted > 0 && accepted < drafts, "{case} {lookup:?}: {accepted} of {drafts}");

            let few = LoadOptions { max_batch_tokens: 24, max_batch_sequences: 5, ..with_blocks(case, 8) };
            let mut narrow = Server::load(case, guessing(few));
            assert_eq!(narrow.answer_all(&requests), expected, "{case} {lookup:?} preempted");
            assert!(narrow.saw_preemption, "{case}");
        }
    }
}

#[test]
fn sessions_cancelled_between_guesses_leave_nothing() {
    for case in CASES {
        let mut server =
            Server::load(case, LoadOptions { prompt_lookup: Some(lookups()[0]), ..LoadOptions::default() });
        for steps in 0..20 {
            let ids: Vec<_> =
                requests(case).into_iter().map(|request| server.submit_for(ClientId(1), request)).collect();
            for _ in 0..steps {
                server.step();
            }
            ids.into_iter().for_each(|id| server.cancel(id));
            assert!(!server.has_work());
            server.run();
        }
    }
}
