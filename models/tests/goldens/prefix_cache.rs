//! Prompts that begin alike share what the cache has of them, and nobody can tell but by the time: the same tokens, whoever
//! runs beside, is cancelled or preempted.

use tale_models::family::LoadOptions;
use tale_models::kv::{BLOCK_SIZE, PrefixCache};
use tale_models::request::{ClientId, SessionId, TextRequest};

use crate::text::{CASES, Copy, Server, greedy, prompts, with_blocks};

/// A generator of test cases: xorshift.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % sides as u64) as usize
    }
}

/// So many tokens that repeat those of a prompt of the case.
fn system_prompt(case: &str, num_tokens: usize) -> Vec<u32> {
    prompts(case)[1].iter().copied().cycle().take(num_tokens).collect()
}

#[test]
fn a_second_question_finds_what_the_first_one_left() {
    for case in CASES {
        let mut server = Server::load(case, LoadOptions::default());
        let ask = |server: &mut Server, client: u64, salt: Option<&str>, prompt: Vec<u32>| {
            let request = TextRequest { cache_salt: salt.map(str::to_owned), max_tokens: 40, ..greedy(prompt) };
            let id = server.submit_for(ClientId(client), request);
            server.run();
            (server.cached_tokens(id), server.answer(id).tokens.clone())
        };
        let first = system_prompt(case, 2 * BLOCK_SIZE + 7);
        let (cached, answer) = ask(&mut server, 1, None, first.clone());
        assert_eq!(cached, Some(0), "{case}");
        assert_eq!(ask(&mut server, 1, None, first.clone()), (Some(2 * BLOCK_SIZE), answer.clone()), "{case}");
        // The answer, whose last token is not in the cache, and another question behind it.
        let second = [first.clone(), answer.clone(), vec![5, 6, 7]].concat();
        let (cached, _) = ask(&mut server, 1, None, second);
        assert_eq!(cached, Some(3 * BLOCK_SIZE), "{case}");
        for (client, salt) in [(2, None), (1, Some("salt")), (2, Some("salt"))] {
            assert_eq!(ask(&mut server, client, salt, first.clone()), (Some(0), answer.clone()), "{case}");
            assert_eq!(ask(&mut server, client, salt, first.clone()).0, Some(2 * BLOCK_SIZE), "{case}");
        }
    }
}

#[test]
fn who_shares_is_a_setting() {
    let case = CASES[0];
    for (prefix_cache, expected) in
        [(PrefixCache::Off, None), (PrefixCache::PerClient, Some(0)), (PrefixCache::Shared, Some(BLOCK_SIZE))]
    {
        let mut server = Server::load(case, LoadOptions { prefix_cache, ..LoadOptions::default() });
        let prompt = system_prompt(case, BLOCK_SIZE + 1);
        let found = [1, 2].map(|client| {
            let id = server.submit_for(ClientId(client), greedy(prompt.clone()));
            server.run();
            server.cached_tokens(id)
        });
        assert_eq!(found[1], expected, "{prefix_cache:?}");
    }
}

/// Requests that begin as ones before them did, greedy and sampled.
fn random_request(case: &str, dice: &mut Dice, asked: &[TextRequest]) -> TextRequest {
    let mut prompt = match asked.is_empty() || dice.roll(2) == 0 {
        true => system_prompt(case, 1 + dice.roll(3 * BLOCK_SIZE)),
        false => asked[dice.roll(asked.len())].prompt.clone(),
    };
    prompt.truncate(BLOCK_SIZE + dice.roll(2 * BLOCK_SIZE));
    prompt.extend((0..dice.roll(BLOCK_SIZE)).map(|_| dice.roll(300) as u32));
    let mut request = TextRequest { max_tokens: 1 + dice.roll(40), ..greedy(prompt) };
    if dice.roll(2) == 0 {
        request.sampling.temperature = 1.0;
        request.sampling.repetition_penalty = 1.1;
        request.sampling.seed = dice.roll(1000) as u64;
    }
    if dice.roll(4) == 0 {
        request.cache_salt = Some("salt".to_owned());
    }
    request
}

#[test]
fn tokens_are_the_same_with_and_without_it() {
    for (index, case) in CASES.iter().enumerate() {
        let mut dice = Dice(0x9E37_79B9_7F4A_7C15 + index as u64);
        let mut alone = Server::load(case, LoadOptions { prefix_cache: PrefixCache::Off, ..LoadOptions::default() });
        let few_blocks = LoadOptions { max_batch_tokens: 48, max_batch_sequences: 6, ..with_blocks(case, 8) };
        let mut server = Server::load(case, few_blocks);
        let mut asked: Vec<TextRequest> = Vec::new();
        let mut open: Vec<(SessionId, TextRequest)> = Vec::new();
        let mut ids: Vec<(SessionId, TextRequest)> = Vec::new();
        for _ in 0..150 {
            let request = random_request(case, &mut dice, &asked);
            let id = server.submit_for(ClientId(dice.roll(2) as u64), request.clone());
            asked.push(request.clone());
            open.push((id, request));
            for _ in 0..dice.roll(8) {
                if server.has_work() {
                    server.step();
                }
            }
            if dice.roll(6) == 0 {
                let (id, _) = open.swap_remove(dice.roll(open.len()));
                server.cancel(id);
            }
            let (ended, rest) = open.into_iter().partition(|(id, _)| server.answer(*id).end.is_some());
            open = rest;
            ids.extend::<Vec<_>>(ended);
        }
        server.run();
        ids.extend(open);
        assert!(server.saw_preemption, "{case}");
        let cached: usize = ids.iter().filter_map(|(id, _)| server.cached_tokens(*id)).sum();
        assert!(cached > 10 * BLOCK_SIZE, "{case}: {cached} tokens were in the cache");
        for (id, request) in ids {
            let expected = alone.answer_alone(request);
            assert_eq!(*server.answer(id), expected, "{case}");
        }
    }
}

#[test]
fn a_session_that_fails_leaves_nothing_to_share() {
    let case = "llama-untied";
    let healthy = system_prompt(case, 2 * BLOCK_SIZE);
    let poison = (0..).find(|token| !healthy.contains(token)).expect("there are more tokens");
    let copy = Copy::of(case);
    copy.edit_tensor("model.embed_tokens.weight", |rows| rows[poison as usize].fill(f32::NAN));
    let mut server = Server::open(copy.path(), LoadOptions::default());
    let request = |last: &[u32]| TextRequest { max_tokens: 4, ..greedy([&healthy, last].concat()) };
    let failed = server.answer_alone(request(&[poison]));
    assert!(failed.failure.is_some_and(|failure| failure.contains("not finite")));
    for cached in [0, 2 * BLOCK_SIZE] {
        let id = server.submit_for(ClientId::default(), request(&[healthy[0]]));
        server.run();
        assert_eq!(server.cached_tokens(id), Some(cached));
    }
}
