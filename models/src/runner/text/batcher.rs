//! The pure half of the text runner: which sequence contributes how many tokens to the next step, which one gets
//! blocks, which one has to give them back.
//!
//! Owns the block pool and, per sequence, counts of tokens and a block table. Deliberately does not know: tensors, token
//! ids, sampling, when a sequence is done.
//!
//! The rules, from which everything else follows:
//! - Sequences are served in the order of their arrival: those that run are older than those that wait.
//! - A step takes one token of every running sequence whose prompt is in the cache (decode), then fills its budget with
//!   prompt chunks, oldest first, then admits waiting sequences while blocks for all their tokens are free.
//! - When decode finds no free block, the youngest running sequence gives back all of its own, and its tokens are
//!   computed again later. The oldest never does, and advances in every step: nobody waits for ever.

use std::collections::VecDeque;

use crate::kv::{BlockPool, BlockTable, blocks_for};
use crate::request::{Phase, SessionId};

/// Bounds of one step.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most tokens of one step, decode and prefill together; at least one.
    pub max_batch_tokens: usize,
    /// Most sequences that run at a time; at least one.
    pub max_batch_sequences: usize,
}

/// Tokens of one sequence in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Whose.
    pub session: SessionId,
    /// Position of the first one; keys and values of those before it are in the cache.
    pub start: usize,
    /// How many, at least one.
    pub num_tokens: usize,
    /// Whether the chunk reaches the end of the sequence, so that its last row gives the next token.
    pub samples: bool,
}

/// What one step does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// At most one per sequence.
    pub chunks: Vec<Chunk>,
    /// How many of the youngest running sequences give back their blocks first.
    preempted: usize,
    /// How many of the oldest waiting sequences start to run.
    admitted: usize,
}

impl Plan {
    /// Decode when every sequence gets its next token from one row, prefill otherwise.
    pub fn phase(&self) -> Phase {
        let is_decode = |chunk: &Chunk| chunk.samples && chunk.num_tokens == 1;
        if self.chunks.iter().all(is_decode) { Phase::Decode } else { Phase::Prefill }
    }
}

/// One sequence in counts.
#[derive(Debug)]
struct Sequence {
    session: SessionId,
    /// Tokens known: the prompt and what was sampled.
    num_tokens: usize,
    /// How many of them are in the cache; always fewer than are known.
    num_computed: usize,
    table: BlockTable,
}

impl Sequence {
    fn pending(&self) -> usize {
        self.num_tokens - self.num_computed
    }

    /// The next `num_tokens` tokens as a chunk.
    fn chunk(&self, num_tokens: usize) -> Chunk {
        let samples = num_tokens == self.pending();
        Chunk { session: self.session, start: self.num_computed, num_tokens, samples }
    }
}

/// All sequences of a runner.
#[derive(Debug)]
pub struct Batcher {
    limits: Limits,
    pool: BlockPool,
    /// By age. Each has blocks for all its tokens but, maybe, the last one.
    running: Vec<Sequence>,
    /// By age, all younger than the running ones. None has blocks.
    waiting: VecDeque<Sequence>,
}

/// A plan in the making, with what it leaves.
struct Draft {
    chunks: Vec<Chunk>,
    /// Tokens that still fit the step.
    budget: usize,
    /// Blocks that would be free.
    free: usize,
    /// How many of the oldest running sequences keep running.
    kept: usize,
}

impl Draft {
    fn add(&mut self, chunk: Chunk) {
        self.budget -= chunk.num_tokens;
        self.chunks.push(chunk);
    }
}

impl Batcher {
    /// An idle batcher over a pool of free blocks.
    pub fn new(limits: Limits, pool: BlockPool) -> Self {
        // Each running sequence takes at least one token of every step.
        let max_batch_tokens = limits.max_batch_tokens.max(1);
        let max_batch_sequences = limits.max_batch_sequences.clamp(1, max_batch_tokens);
        let limits = Limits { max_batch_tokens, max_batch_sequences };
        Self { limits, pool, running: Vec::new(), waiting: VecDeque::new() }
    }

    /// Puts a sequence of `num_tokens` tokens behind all others. The caller sees to it that the sequence, grown to its
    /// end, fits the pool alone.
    pub fn submit(&mut self, session: SessionId, num_tokens: usize) {
        self.waiting.push_back(Sequence { session, num_tokens, num_computed: 0, table: BlockTable::default() });
    }

    /// Forgets a sequence and takes back its blocks; unknown ids are ignored.
    pub fn remove(&mut self, session: SessionId) {
        if let Some(index) = self.running.iter().position(|sequence| sequence.session == session) {
            self.pool.release(self.running.remove(index).table);
        }
        self.waiting.retain(|sequence| sequence.session != session);
    }

    /// Sequences that have blocks.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that have none: new ones and preempted ones.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The blocks.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// The blocks of a running sequence.
    pub fn table(&self, session: SessionId) -> &BlockTable {
        let running = self.running.iter().find(|sequence| sequence.session == session);
        &running.expect("only chunks of running sequences are planned: this is a bug").table
    }

    /// What the next step would do; `None` when there is no sequence at all.
    pub fn plan(&self) -> Option<Plan> {
        if self.running.is_empty() && self.waiting.is_empty() {
            return None;
        }
        let (budget, free) = (self.limits.max_batch_tokens, self.pool.num_free());
        let mut draft = Draft { chunks: Vec::new(), budget, free, kept: self.running.len() };
        self.plan_decodes(&mut draft);
        self.plan_prefills(&mut draft);
        let preempted = self.running.len() - draft.kept;
        // Whoever was preempted would be the first to come back, into the blocks that it was to give.
        let admitted = if preempted == 0 { self.plan_admissions(&mut draft) } else { 0 };
        Some(Plan { chunks: draft.chunks, preempted, admitted })
    }

    fn plan_decodes(&self, draft: &mut Draft) {
        let mut index = 0;
        while index < draft.kept {
            let sequence = &self.running[index];
            if sequence.pending() == 1 && self.make_room(draft, index) {
                draft.add(sequence.chunk(1));
            }
            index += 1;
        }
    }

    /// Gets the block that the next token of a running sequence may need, at the cost of the youngest. False when the
    /// sequence itself is the youngest and is preempted.
    fn make_room(&self, draft: &mut Draft, index: usize) -> bool {
        let sequence = &self.running[index];
        let missing = sequence.table.missing_for(sequence.num_tokens);
        while draft.free < missing && draft.kept > index {
            draft.kept -= 1;
            draft.free += self.running[draft.kept].table.blocks().len();
        }
        if draft.kept == index {
            return false;
        }
        draft.free -= missing;
        true
    }

    fn plan_prefills(&self, draft: &mut Draft) {
        for sequence in self.running[..draft.kept].iter().filter(|sequence| sequence.pending() > 1) {
            if draft.budget == 0 {
                return;
            }
            draft.add(sequence.chunk(sequence.pending().min(draft.budget)));
        }
    }

    fn plan_admissions(&self, draft: &mut Draft) -> usize {
        let mut admitted = 0;
        for sequence in &self.waiting {
            let blocks = blocks_for(sequence.num_tokens + 1);
            let is_full = draft.kept + admitted == self.limits.max_batch_sequences;
            if is_full || draft.budget == 0 || blocks > draft.free {
                break;
            }
            draft.free -= blocks;
            draft.add(sequence.chunk(sequence.pending().min(draft.budget)));
            admitted += 1;
        }
        admitted
    }

    /// Moves blocks and sequences as `plan`, which was made of this very state, says.
    pub fn begin(&mut self, plan: &Plan) {
        for _ in 0..plan.preempted {
            self.preempt_youngest();
        }
        for _ in 0..plan.admitted {
            self.admit_oldest();
        }
        for chunk in &plan.chunks {
            let end = chunk.start + chunk.num_tokens;
            let sequence = find(&mut self.running, chunk.session);
            assert!(self.pool.grow(&mut sequence.table, end), "the plan counted the free blocks: this is a bug");
        }
    }

    fn preempt_youngest(&mut self) {
        let youngest = self.running.pop().expect("the plan counted the running sequences: this is a bug");
        self.pool.release(youngest.table);
        self.waiting.push_front(Sequence { num_computed: 0, table: BlockTable::default(), ..youngest });
    }

    fn admit_oldest(&mut self) {
        let mut oldest = self.waiting.pop_front().expect("the plan counted the waiting sequences: this is a bug");
        let grown = self.pool.grow(&mut oldest.table, oldest.num_tokens + 1);
        assert!(grown, "the plan counted the free blocks: this is a bug");
        self.running.push(oldest);
    }

    /// Notes that the step of `plan` was computed; sequences that sampled are one token longer.
    pub fn complete(&mut self, plan: &Plan) {
        for chunk in &plan.chunks {
            let sequence = find(&mut self.running, chunk.session);
            sequence.num_computed += chunk.num_tokens;
            sequence.num_tokens += usize::from(chunk.samples);
        }
    }
}

fn find(running: &mut [Sequence], session: SessionId) -> &mut Sequence {
    let sequence = running.iter_mut().find(|sequence| sequence.session == session);
    sequence.expect("only chunks of running sequences are planned: this is a bug")
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;
    use crate::kv::BLOCK_SIZE;

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
        batcher.submit(SessionId(1), 3);
        assert_eq!(step(&mut batcher), [(1, 0, 3, true)]);
        batcher.submit(SessionId(2), 10);
        batcher.submit(SessionId(3), 4);
        assert_eq!(step(&mut batcher), [(1, 3, 1, true), (2, 0, 7, false)]);
        assert_eq!(step(&mut batcher), [(1, 4, 1, true), (2, 7, 3, true), (3, 0, 4, true)]);
        assert_eq!(step(&mut batcher), [(1, 5, 1, true), (2, 10, 1, true), (3, 4, 1, true)]);
    }

    #[test]
    fn phase_says_whether_prompts_are_read() {
        let mut batcher = batcher(8, 4, 100);
        batcher.submit(SessionId(1), 3);
        assert_eq!(batcher.plan().expect("there is work").phase(), Phase::Prefill);
        step(&mut batcher);
        assert_eq!(batcher.plan().expect("there is work").phase(), Phase::Decode);
    }

    #[test]
    fn admission_waits_for_blocks_in_order_of_arrival() {
        let mut batcher = batcher(1000, 8, 3);
        batcher.submit(SessionId(1), BLOCK_SIZE);
        batcher.submit(SessionId(2), 2 * BLOCK_SIZE);
        batcher.submit(SessionId(3), 1);
        // The first takes two blocks (one more token is coming); the third would fit, but is not its turn.
        assert_eq!(step(&mut batcher), [(1, 0, BLOCK_SIZE, true)]);
        batcher.remove(SessionId(1));
        assert_eq!(step(&mut batcher), [(2, 0, 2 * BLOCK_SIZE, true)]);
    }

    #[test]
    fn the_youngest_is_preempted_and_computes_all_its_tokens_again() {
        let mut batcher = batcher(1000, 8, 2);
        batcher.submit(SessionId(1), BLOCK_SIZE - 1);
        batcher.submit(SessionId(2), BLOCK_SIZE - 1);
        step(&mut batcher);
        step(&mut batcher);
        assert_eq!((batcher.num_running(), batcher.pool().num_free()), (2, 0));
        // Both need a second block now.
        assert_eq!(step(&mut batcher), [(1, BLOCK_SIZE, 1, true)]);
        assert_eq!((batcher.num_running(), batcher.num_waiting()), (1, 1));
        batcher.remove(SessionId(1));
        assert_eq!(step(&mut batcher), [(2, 0, BLOCK_SIZE + 1, true)]);
    }

    /// What happens to the virtual runner between two steps.
    #[derive(Debug, Clone)]
    enum Arrival {
        Submit { prompt: usize, max_tokens: usize },
        Cancel { nth: usize },
        Nothing,
    }

    fn arrivals() -> impl Strategy<Value = Arrival> {
        prop_oneof![
            2 => (1usize..120, 1usize..80).prop_map(|(prompt, max_tokens)| Arrival::Submit { prompt, max_tokens }),
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
        live: BTreeMap<SessionId, Expected>,
        ended: BTreeSet<SessionId>,
        num_submitted: u64,
        steps: usize,
    }

    impl World {
        fn arrive(&mut self, arrival: Arrival) {
            match arrival {
                Arrival::Submit { prompt, max_tokens } => {
                    let prompt = prompt.min(self.capacity - 1);
                    let last_token = (prompt + max_tokens).min(self.capacity);
                    let session = SessionId(self.num_submitted);
                    self.num_submitted += 1;
                    self.batcher.submit(session, prompt);
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
            let oldest = self.live.keys().next().expect("something is planned for somebody");
            assert!(sessions.contains(oldest), "the oldest session does not advance");
            let kept = &self.batcher.running[..self.batcher.running.len() - plan.preempted];
            for sequence in kept.iter().filter(|sequence| sequence.pending() == 1) {
                assert!(sessions.contains(&sequence.session), "a decoding sequence does not advance");
            }
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
            let by_age: Vec<u64> =
                batcher.running.iter().chain(&batcher.waiting).map(|sequence| sequence.session.0).collect();
            assert!(by_age.is_sorted(), "order of arrival is lost: {by_age:?}");
            assert_eq!(by_age.len(), self.live.len());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

        /// 400 worlds of 250 random steps and their drains: over 100,000 virtual steps.
        #[test]
        fn any_order_of_arrivals_ends_well(
            (max_batch_tokens, max_batch_sequences, num_blocks) in (1usize..100, 1usize..12, 1usize..24),
            arrivals in prop::collection::vec(arrivals(), 250),
        ) {
            let mut world = World {
                batcher: batcher(max_batch_tokens, max_batch_sequences, num_blocks),
                capacity: num_blocks * BLOCK_SIZE,
                live: BTreeMap::new(),
                ended: BTreeSet::new(),
                num_submitted: 0,
                steps: 0,
            };
            for arrival in arrivals {
                world.arrive(arrival);
                world.step();
            }
            // The oldest session advances by a token in every step, so this many are enough for all of them.
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
}
