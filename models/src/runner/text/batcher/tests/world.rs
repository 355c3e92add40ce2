//! Random sequences over a virtual cache: what is read is what would have been computed.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};

use proptest::prelude::*;

use super::*;

/// What happens to the virtual runner between two steps.
#[derive(Debug, Clone)]
enum Arrival {
    Submit { client: u64, text: u32, prompt: usize, max_tokens: usize },
    Cancel { nth: usize },
    Fail { nth: usize },
    Nothing,
}

fn arrivals() -> impl Strategy<Value = Arrival> {
    prop_oneof![
        4 => (0..4u64, 0..3u32, 1usize..120, 1usize..80)
            .prop_map(|(client, text, prompt, max_tokens)| Arrival::Submit { client, text, prompt, max_tokens }),
        2 => (0usize..20).prop_map(|nth| Arrival::Cancel { nth }),
        1 => (0usize..20).prop_map(|nth| Arrival::Fail { nth }),
        12 => Just(Arrival::Nothing),
    ]
}

/// Token `position` of a text; all texts begin alike.
fn token(text: u32, position: usize) -> u32 {
    if position < 50 { 0 } else { text }
}

/// Whether the guess of a session's token at `position` is right.
fn is_guessed(session: SessionId, position: usize) -> bool {
    !(session.0 as usize + position).is_multiple_of(3)
}

/// What a session should look like, kept beside the batcher.
#[derive(Debug, Clone)]
struct Expected {
    text: u32,
    num_computed: usize,
    last_token: usize,
    /// What the cache has to hold for each of its tokens: something that follows from its scope and all tokens up to it.
    values: Vec<u64>,
}

impl Expected {
    fn new(text: u32, scope: u64, num_tokens: usize, last_token: usize) -> Self {
        let mut expected = Self { text, num_computed: 0, last_token, values: Vec::new() };
        while expected.num_tokens() < num_tokens {
            expected.push(scope);
        }
        expected
    }

    fn num_tokens(&self) -> usize {
        self.values.len()
    }

    /// Adds the next token.
    fn push(&mut self, scope: u64) -> u32 {
        let token = token(self.text, self.num_tokens());
        let mut hasher = DefaultHasher::new();
        (self.values.last().copied().unwrap_or(scope), token).hash(&mut hasher);
        self.values.push(hasher.finish());
        token
    }
}

struct World {
    batcher: Batcher,
    prefix_cache: PrefixCache,
    /// By slot.
    cache: Vec<u64>,
    capacity: usize,
    num_clients: u64,
    live: BTreeMap<SessionId, Expected>,
    ended: BTreeSet<SessionId>,
    num_submitted: u64,
    steps: usize,
}

impl World {
    fn arrive(&mut self, arrival: Arrival) {
        match arrival {
            Arrival::Submit { client, text, prompt, max_tokens } => {
                let prompt = prompt.min(self.capacity - 1);
                let last_token = (prompt + max_tokens).min(self.capacity);
                let session = SessionId(self.num_submitted);
                self.num_submitted += 1;
                let client = ClientId(client % self.num_clients);
                let tokens: Vec<u32> = (0..prompt).map(|position| token(text, position)).collect();
                self.batcher.submit(session, client, &tokens, self.prefix_cache.scope(client, None));
                let expected = Expected::new(text, self.scope(session, client), prompt, last_token);
                self.live.insert(session, expected);
            }
            Arrival::Cancel { nth } => {
                if let Some(session) = self.live.keys().nth(nth).copied() {
                    self.end(session);
                }
            }
            Arrival::Fail { nth } => {
                if let Some(session) = self.live.keys().nth(nth).copied() {
                    self.batcher.discard(session);
                    self.end(session);
                }
            }
            Arrival::Nothing => (),
        }
    }

    /// Different for sessions that must not share.
    fn scope(&self, session: SessionId, client: ClientId) -> u64 {
        match self.prefix_cache {
            PrefixCache::Off => session.0,
            PrefixCache::PerClient => client.0,
            PrefixCache::Shared => 0,
        }
    }

    fn end(&mut self, session: SessionId) {
        self.batcher.remove(session);
        self.live.remove(&session);
        assert!(self.ended.insert(session), "a session ended twice");
    }

    fn step(&mut self) {
        let Some(mut plan) = self.batcher.plan() else {
            assert!(self.live.is_empty(), "sessions are left and nothing is planned");
            return;
        };
        self.steps += 1;
        self.check_plan(&plan);
        self.guess(&mut plan);
        self.batcher.begin(&plan);
        self.check_blocks();
        plan.chunks.iter().for_each(|chunk| self.write(chunk));
        plan.chunks.iter().for_each(|chunk| self.read(chunk));
        self.batcher.complete(&plan);
        for chunk in &plan.chunks {
            let expected = self.live.get_mut(&chunk.session).expect("only live sessions are planned");
            expected.num_computed = chunk.start + chunk.num_tokens;
            if chunk.samples {
                // The scope went into the first value.
                let token = expected.push(0);
                self.batcher.push(chunk.session, token);
            }
            for position in chunk.start + chunk.num_tokens..chunk.start + chunk.num_tokens + chunk.num_drafts {
                if !is_guessed(chunk.session, position) {
                    break;
                }
                self.batcher.accept_draft(chunk.session);
                expected.num_computed += 1;
                let token = expected.push(0);
                self.batcher.push(chunk.session, token);
            }
            if expected.num_tokens() == expected.last_token {
                self.end(chunk.session);
            }
        }
        self.check_blocks();
    }

    /// Adds guesses, of which some are wrong.
    fn guess(&self, plan: &mut Plan) {
        let without: Vec<usize> = plan.chunks.iter().map(|chunk| chunk.num_tokens).collect();
        self.batcher.add_drafts(plan, |session| {
            let expected = &self.live[&session];
            // The last token has none behind it.
            let left = expected.last_token - expected.num_tokens() - 1;
            left.min((session.0 as usize + self.steps) % 5)
        });
        assert!(plan.chunks.iter().map(|chunk| chunk.num_tokens).eq(without));
        let drafts: usize = plan.chunks.iter().map(|chunk| chunk.num_drafts).sum();
        let tokens: usize = plan.chunks.iter().map(|chunk| chunk.num_tokens).sum();
        assert!(tokens + drafts <= self.batcher.limits.max_batch_tokens);
    }

    fn write(&mut self, chunk: &Chunk) {
        let table = self.batcher.table(chunk.session);
        let mut expected = self.live[&chunk.session].clone();
        let end = chunk.start + chunk.num_tokens;
        for position in chunk.start..end + chunk.num_drafts {
            assert!(
                self.batcher.pool.is_writable(table.blocks()[position / BLOCK_SIZE]),
                "others read what is written"
            );
            let value = match position < end {
                true => expected.values[position],
                false => {
                    expected.push(0);
                    // Behind a wrong guess all is wrong.
                    let is_right = (end..=position).all(|position| is_guessed(chunk.session, position));
                    if is_right { expected.values[position] } else { 0 }
                }
            };
            self.cache[table.slot(position) as usize] = value;
        }
    }

    fn read(&self, chunk: &Chunk) {
        let table = self.batcher.table(chunk.session);
        let values = &self.live[&chunk.session].values[..chunk.start + chunk.num_tokens];
        for (position, value) in values.iter().enumerate() {
            assert_eq!(self.cache[table.slot(position) as usize], *value, "another sequence's tokens");
        }
    }

    fn check_plan(&self, plan: &Plan) {
        let limits = self.batcher.limits;
        let sessions: BTreeSet<SessionId> = plan.chunks.iter().map(|chunk| chunk.session).collect();
        assert_eq!(sessions.len(), plan.chunks.len(), "a sequence is in a step twice");
        assert!(plan.chunks.iter().map(|chunk| chunk.num_tokens).sum::<usize>() <= limits.max_batch_tokens);
        assert!(sessions.len() <= limits.max_batch_sequences);
        let running = self.batcher.running.iter().map(|sequence| sequence.session);
        let oldest = match self.num_clients {
            1 => self.live.keys().next().copied(),
            _ => running.clone().next(),
        };
        assert!(oldest.is_none_or(|oldest| sessions.contains(&oldest)), "the oldest session does not advance");
        let kept = self.batcher.running.iter().filter(|sequence| !plan.preempted.contains(&sequence.session));
        for sequence in kept.filter(|sequence| sequence.decodes()) {
            assert!(sessions.contains(&sequence.session), "a decoding sequence does not advance");
        }
        assert!(!plan.chunks.is_empty(), "a step without work");
        for chunk in &plan.chunks {
            let expected = self.live.get(&chunk.session).expect("only live sessions are planned");
            // Either it goes on where it was, or it begins (again), behind what it shares.
            let may_share = self.prefix_cache != PrefixCache::Off;
            let begins = chunk.start == 0 || may_share && chunk.start.is_multiple_of(BLOCK_SIZE);
            assert!(chunk.start == expected.num_computed || begins);
            assert!(chunk.num_tokens >= 1);
            let end = chunk.start + chunk.num_tokens;
            assert!(end <= expected.num_tokens());
            assert_eq!(chunk.samples, end == expected.num_tokens());
        }
    }

    fn check_blocks(&self) {
        let batcher = &self.batcher;
        batcher.pool.check(batcher.running.iter().map(|sequence| &sequence.table));
        assert!(batcher.waiting.iter().all(|sequence| sequence.table.blocks().is_empty()));
        let of = |client: u64| {
            let all = batcher.running.iter().chain(batcher.waiting.iter());
            all.filter(move |sequence| sequence.client == ClientId(client)).map(|sequence| sequence.session.0)
        };
        for client in 0..self.num_clients {
            let by_age: Vec<u64> = of(client).collect();
            assert!(by_age.is_sorted(), "order of arrival is lost: {by_age:?}");
        }
        assert!(batcher.running.is_sorted_by_key(|sequence| sequence.age));
        assert_eq!((0..self.num_clients).flat_map(of).count(), self.live.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// 400 worlds of 250 random steps and their drains: over 100,000 virtual steps.
    #[test]
    fn any_order_of_arrivals_ends_well(
        (max_batch_tokens, max_batch_sequences, num_blocks) in (1usize..100, 1usize..12, 1usize..24),
        num_clients in 1u64..4,
        prefix_cache in prop_oneof![
            1 => Just(PrefixCache::Off),
            3 => Just(PrefixCache::PerClient),
            3 => Just(PrefixCache::Shared),
        ],
        arrivals in prop::collection::vec(arrivals(), 250),
    ) {
        let mut world = World {
            batcher: batcher(max_batch_tokens, max_batch_sequences, num_blocks),
            prefix_cache,
            cache: vec![0; num_blocks * BLOCK_SIZE],
            capacity: num_blocks * BLOCK_SIZE,
            num_clients,
            live: BTreeMap::new(),
            ended: BTreeSet::new(),
            num_submitted: 0,
            steps: 0,
        };
        for arrival in arrivals {
            world.arrive(arrival);
            world.step();
        }
        // The oldest running session advances by a token in every step, so this many are enough for all of them.
        let bound: usize = world.live.values().map(|expected| expected.last_token).sum();
        let before = world.steps;
        while !world.live.is_empty() {
            world.step();
            prop_assert!(world.steps - before <= bound, "sessions starve");
        }
        prop_assert_eq!(world.ended.len() as u64, world.num_submitted);
        prop_assert_eq!(world.batcher.pool().num_free(), num_blocks);
        prop_assert!(world.batcher.plan().is_none());
    }
}
