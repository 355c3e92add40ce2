//! The rules, on counts.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::kv::BLOCK_SIZE;

const ALONE: ClientId = ClientId(0);

fn batcher(max_batch_tokens: usize, max_batch_sequences: usize, num_blocks: usize) -> Batcher {
    Batcher::new(Limits { max_batch_tokens, max_batch_sequences }, BlockPool::new(num_blocks))
}

/// Runs one step and gives what it did as (session, start, tokens, samples).
fn step(batcher: &mut Batcher) -> Vec<(u64, usize, usize, bool)> {
    let plan = batcher.plan().expect("there is work");
    batcher.begin(&plan);
    batcher.complete(&plan);
    plan.chunks.iter().map(|chunk| (chunk.session.0, chunk.start, chunk.num_tokens, chunk.samples)).collect()
}

#[test]
fn decode_goes_first_and_prefill_fills_the_budget() {
    let mut batcher = batcher(8, 4, 100);
    batcher.submit(SessionId(1), ALONE, 3);
    assert_eq!(step(&mut batcher), [(1, 0, 3, true)]);
    batcher.submit(SessionId(2), ALONE, 10);
    batcher.submit(SessionId(3), ALONE, 4);
    assert_eq!(step(&mut batcher), [(1, 3, 1, true), (2, 0, 7, false)]);
    assert_eq!(step(&mut batcher), [(1, 4, 1, true), (2, 7, 3, true), (3, 0, 4, true)]);
    assert_eq!(step(&mut batcher), [(1, 5, 1, true), (2, 10, 1, true), (3, 4, 1, true)]);
}

#[test]
fn phase_says_whether_prompts_are_read() {
    let mut batcher = batcher(8, 4, 100);
    batcher.submit(SessionId(1), ALONE, 3);
    assert_eq!(batcher.plan().expect("there is work").phase(), Phase::Prefill);
    step(&mut batcher);
    assert_eq!(batcher.plan().expect("there is work").phase(), Phase::Decode);
}

#[test]
fn admission_waits_for_blocks_in_order_of_arrival() {
    let mut batcher = batcher(1000, 8, 3);
    batcher.submit(SessionId(1), ALONE, BLOCK_SIZE);
    batcher.submit(SessionId(2), ALONE, 2 * BLOCK_SIZE);
    batcher.submit(SessionId(3), ALONE, 1);
    // The first takes two blocks (one more token is coming); the third would fit, but is not its turn.
    assert_eq!(step(&mut batcher), [(1, 0, BLOCK_SIZE, true)]);
    batcher.remove(SessionId(1));
    assert_eq!(step(&mut batcher), [(2, 0, 2 * BLOCK_SIZE, true)]);
}

#[test]
fn the_youngest_is_preempted_and_computes_all_its_tokens_again() {
    let mut batcher = batcher(1000, 8, 2);
    batcher.submit(SessionId(1), ALONE, BLOCK_SIZE - 1);
    batcher.submit(SessionId(2), ALONE, BLOCK_SIZE - 1);
    step(&mut batcher);
    step(&mut batcher);
    assert_eq!((batcher.num_running(), batcher.pool().num_free()), (2, 0));
    // Both need a second block now.
    assert_eq!(step(&mut batcher), [(1, BLOCK_SIZE, 1, true)]);
    assert_eq!((batcher.num_running(), batcher.num_waiting()), (1, 1));
    batcher.remove(SessionId(1));
    assert_eq!(step(&mut batcher), [(2, 0, BLOCK_SIZE + 1, true)]);
}

const GREEDY: ClientId = ClientId(1);
const NEIGHBOUR: ClientId = ClientId(2);

/// A batcher whose places are all taken by one client, of whose sessions more wait.
fn crowded(max_batch_tokens: usize, places: u64, num_blocks: usize) -> Batcher {
    let mut batcher = batcher(max_batch_tokens, places as usize, num_blocks);
    (0..2 * places).for_each(|id| batcher.submit(SessionId(id), GREEDY, 1));
    step(&mut batcher);
    assert_eq!(batcher.num_running(), places as usize);
    batcher
}

#[test]
fn a_newcomer_starts_at_once_in_place_of_the_youngest_of_who_runs_the_most() {
    let mut batcher = crowded(64, 16, 1000);
    batcher.submit(SessionId(100), NEIGHBOUR, 4);
    let stepped = step(&mut batcher);
    assert_eq!(stepped.iter().map(|chunk| chunk.0).collect::<Vec<_>>(), (0..15).chain([100]).collect::<Vec<_>>());
    assert!(stepped.contains(&(100, 0, 4, true)));
    // The place that it leaves is that of the one that gave way, before those that have not begun.
    batcher.remove(SessionId(100));
    assert!(step(&mut batcher).contains(&(15, 0, 2, true)));
}

#[test]
fn beyond_its_entitlement_a_client_gets_the_places_that_become_free() {
    let mut batcher = crowded(64, 16, 1000);
    (100..110).for_each(|id| batcher.submit(SessionId(id), NEIGHBOUR, 1));
    let of_the_neighbour = |batcher: &mut Batcher| step(batcher).iter().filter(|chunk| chunk.0 >= 100).count();
    assert_eq!(of_the_neighbour(&mut batcher), 16 / ENTITLED_SHARE);
    assert_eq!(of_the_neighbour(&mut batcher), 16 / ENTITLED_SHARE);
    batcher.remove(SessionId(0));
    assert_eq!(of_the_neighbour(&mut batcher), 16 / ENTITLED_SHARE + 1);
}

#[test]
fn a_newcomer_reads_its_prompt_beside_a_longer_one_that_came_before() {
    let mut batcher = batcher(100, 8, 1000);
    batcher.submit(SessionId(1), GREEDY, 10_000);
    batcher.submit(SessionId(2), GREEDY, 10_000);
    assert_eq!(step(&mut batcher), [(1, 0, 100, false)]);
    batcher.submit(SessionId(3), NEIGHBOUR, 60);
    assert_eq!(step(&mut batcher), [(3, 0, 50, false), (1, 100, 50, false)]);
    assert_eq!(step(&mut batcher), [(3, 50, 10, true), (1, 150, 90, false)], "what it leaves is the other's");
}

#[test]
fn a_newcomer_gets_blocks_from_who_has_the_most_sequences_and_never_from_the_oldest() {
    let mut batcher = batcher(1000, 8, 4);
    // Two blocks each.
    (0..3).for_each(|id| batcher.submit(SessionId(id), GREEDY, BLOCK_SIZE));
    step(&mut batcher);
    assert_eq!((batcher.num_running(), batcher.pool().num_free()), (2, 0));
    batcher.submit(SessionId(10), NEIGHBOUR, 1);
    assert_eq!(step(&mut batcher), [(0, BLOCK_SIZE, 1, true), (10, 0, 1, true)]);
    // Now both run one: nobody holds more than another.
    batcher.submit(SessionId(11), NEIGHBOUR, 2 * BLOCK_SIZE);
    assert_eq!(step(&mut batcher), [(0, BLOCK_SIZE + 1, 1, true), (10, 1, 1, true)]);
}

#[test]
fn decode_takes_blocks_from_who_runs_the_most() {
    let mut batcher = batcher(1000, 8, 4);
    (0..3).for_each(|id| batcher.submit(SessionId(id), GREEDY, BLOCK_SIZE - 1));
    step(&mut batcher);
    batcher.submit(SessionId(10), NEIGHBOUR, 1);
    step(&mut batcher);
    assert_eq!((batcher.num_running(), batcher.pool().num_free()), (4, 0));
    // The greedy client's sequences need a second block each; the youngest sequence of all is the neighbour's.
    let stepped: Vec<u64> = step(&mut batcher).iter().map(|chunk| chunk.0).collect();
    assert_eq!(stepped, [0, 10]);
}

/// What happens to the virtual runner between two steps.
#[derive(Debug, Clone)]
enum Arrival {
    Submit { client: u64, prompt: usize, max_tokens: usize },
    Cancel { nth: usize },
    Nothing,
}

fn arrivals() -> impl Strategy<Value = Arrival> {
    prop_oneof![
        2 => (0..4u64, 1usize..120, 1usize..80)
            .prop_map(|(client, prompt, max_tokens)| Arrival::Submit { client, prompt, max_tokens }),
        1 => (0usize..20).prop_map(|nth| Arrival::Cancel { nth }),
        6 => Just(Arrival::Nothing),
    ]
}

/// What a session should look like, kept beside the batcher.
#[derive(Debug)]
struct Expected {
    num_computed: usize,
    num_tokens: usize,
    last_token: usize,
}

struct World {
    batcher: Batcher,
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
            Arrival::Submit { client, prompt, max_tokens } => {
                let prompt = prompt.min(self.capacity - 1);
                let last_token = (prompt + max_tokens).min(self.capacity);
                let session = SessionId(self.num_submitted);
                self.num_submitted += 1;
                self.batcher.submit(session, ClientId(client % self.num_clients), prompt);
                self.live.insert(session, Expected { num_computed: 0, num_tokens: prompt, last_token });
            }
            Arrival::Cancel { nth } => {
                if let Some(session) = self.live.keys().nth(nth).copied() {
                    self.end(session);
                }
            }
            Arrival::Nothing => (),
        }
    }

    fn end(&mut self, session: SessionId) {
        self.batcher.remove(session);
        self.live.remove(&session);
        assert!(self.ended.insert(session), "a session ended twice");
    }

    fn step(&mut self) {
        let Some(plan) = self.batcher.plan() else {
            assert!(self.live.is_empty(), "sessions are left and nothing is planned");
            return;
        };
        self.steps += 1;
        self.check_plan(&plan);
        self.batcher.begin(&plan);
        self.check_blocks();
        self.batcher.complete(&plan);
        for chunk in &plan.chunks {
            let expected = self.live.get_mut(&chunk.session).expect("only live sessions are planned");
            expected.num_computed = chunk.start + chunk.num_tokens;
            expected.num_tokens += usize::from(chunk.samples);
            if expected.num_tokens == expected.last_token {
                self.end(chunk.session);
            }
        }
        self.check_blocks();
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
            // Either it goes on where it was, or it was preempted and begins again.
            assert!(chunk.start == expected.num_computed || chunk.start == 0);
            assert!(chunk.num_tokens >= 1);
            let end = chunk.start + chunk.num_tokens;
            assert!(end <= expected.num_tokens);
            assert_eq!(chunk.samples, end == expected.num_tokens);
        }
    }

    fn check_blocks(&self) {
        let batcher = &self.batcher;
        let owned: usize = batcher.running.iter().map(|sequence| sequence.table.blocks().len()).sum();
        assert_eq!(owned + batcher.pool.num_free(), batcher.pool.num_blocks());
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
        arrivals in prop::collection::vec(arrivals(), 250),
    ) {
        let mut world = World {
            batcher: batcher(max_batch_tokens, max_batch_sequences, num_blocks),
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
