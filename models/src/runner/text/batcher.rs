//! The pure half of the text runner: which sequence contributes how many tokens to the next step, which one gets
//! blocks, which one has to give them back.
//!
//! Owns the block pool and, per sequence, counts of tokens, a block table and the names of its whole blocks. Deliberately does
//! not know: tensors, sampling, when a sequence is done, who may share with whom.
//!
//! The rules, from which everything else follows:
//! - A step takes one token of every running sequence whose prompt is in the cache (decode), then fills its budget with
//!   prompt chunks, oldest first, then admits waiting sequences while blocks for all their tokens are free.
//! - Clients take turns: the next place is that of the client with the fewest running sequences ([`FairQueue`]). Where
//!   prompts of several clients are read, each client has an equal share of the budget.
//! - A client that holds less than its *entitlement* does not wait for places to become free: the client that runs the most
//!   gives back its youngest sequence for it, whose tokens are computed again later.
//! - When decode finds no free block, the youngest running sequence of the client that runs the most gives back all of its
//!   own. The oldest running sequence never gives anything back, and advances in every step: nobody waits for ever.
//! - With one client all this is the order of arrival.
//! - A sequence that starts takes over the blocks that hold its first tokens already: of sequences that run, and of those that
//!   have ended or were preempted, until their blocks are given out again. At least its last token is computed.

use crate::kv::{BLOCK_SIZE, BlockHash, BlockHasher, BlockNames, BlockPool, BlockTable, Scope, blocks_for};
use crate::request::{ClientId, Phase, SessionId};
use crate::runner::fair_queue::FairQueue;

mod planning;
#[cfg(test)]
mod tests;

use planning::Draft;

/// A client that runs fewer sequences than one in this many of [`Limits::max_batch_sequences`], and at least one, need not
/// wait for others to end. Above that it gets places as they become free: what is preempted is computed twice.
pub const ENTITLED_SHARE: usize = 8;

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
    /// Guesses of the tokens behind it that are computed too ([`Batcher::add_drafts`]).
    pub num_drafts: usize,
}

/// What one step does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// At most one per sequence.
    pub chunks: Vec<Chunk>,
    /// Running sequences that give back their blocks first, the youngest before the older.
    preempted: Vec<SessionId>,
    /// Whose oldest waiting sequence starts to run, in the order of their turns.
    admitted: Vec<ClientId>,
    /// Tokens that the step could hold beside those of its chunks.
    spare_tokens: usize,
    /// Blocks that would be free after it.
    spare_blocks: usize,
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
    client: ClientId,
    /// Order of arrival.
    age: u64,
    /// Tokens known: the prompt and what was sampled.
    num_tokens: usize,
    /// How many of them are in the cache; always fewer than are known between two steps.
    num_computed: usize,
    table: BlockTable,
    /// Of its whole blocks; `None` where it shares nothing.
    names: Option<BlockNames>,
}

impl Sequence {
    fn pending(&self) -> usize {
        self.num_tokens - self.num_computed
    }

    /// Whether the next step gives it a token, rather than a part of its prompt.
    fn decodes(&self) -> bool {
        self.pending() == 1
    }

    /// Names of the blocks that it may share: all whole ones but for that of its last token, which is computed.
    fn shareable(&self) -> &[BlockHash] {
        let names = self.names.as_ref().map_or(&[][..], BlockNames::names);
        &names[..names.len().min((self.num_tokens - 1) / BLOCK_SIZE)]
    }
}

/// All sequences of a runner.
#[derive(Debug)]
pub struct Batcher {
    limits: Limits,
    pool: BlockPool,
    /// By age. Each has blocks for all its tokens but, maybe, the last one.
    running: Vec<Sequence>,
    /// By client and age; those of a client are younger than its running ones. None has blocks.
    waiting: FairQueue<Sequence>,
    num_submitted: u64,
    hasher: BlockHasher,
}

impl Batcher {
    /// An idle batcher over a pool of free blocks.
    pub fn new(limits: Limits, pool: BlockPool) -> Self {
        // Each running sequence takes at least one token of every step.
        let max_batch_tokens = limits.max_batch_tokens.max(1);
        let max_batch_sequences = limits.max_batch_sequences.clamp(1, max_batch_tokens);
        let limits = Limits { max_batch_tokens, max_batch_sequences };
        Self {
            limits,
            pool,
            running: Vec::new(),
            waiting: FairQueue::default(),
            num_submitted: 0,
            hasher: BlockHasher::default(),
        }
    }

    /// Puts a sequence of these tokens behind all others of its client. It shares blocks with those of an equal scope, or with
    /// none. The caller sees to it that the sequence, grown to its end, fits the pool alone.
    pub fn submit(&mut self, session: SessionId, client: ClientId, tokens: &[u32], scope: Option<Scope<'_>>) {
        let age = self.num_submitted;
        self.num_submitted += 1;
        let names = scope.map(|scope| BlockNames::new(&self.hasher, scope, tokens));
        let num_tokens = tokens.len();
        let sequence =
            Sequence { session, client, age, num_tokens, num_computed: 0, table: BlockTable::default(), names };
        self.waiting.push_back(client, sequence);
    }

    /// Forgets a sequence and takes back its blocks; unknown ids are ignored.
    pub fn remove(&mut self, session: SessionId) {
        if let Some(index) = self.running.iter().position(|sequence| sequence.session == session) {
            self.pool.release(self.running.remove(index).table);
        }
        self.waiting.retain(|sequence| sequence.session != session);
    }

    /// As [`Batcher::remove`], of a sequence whose keys and values may be wrong: nobody who comes shares them.
    pub fn discard(&mut self, session: SessionId) {
        if let Some(sequence) = self.running.iter().find(|sequence| sequence.session == session) {
            self.pool.forget(&sequence.table);
        }
        self.remove(session);
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
        &self.running(session).table
    }

    /// How many tokens of a running sequence are in the cache.
    pub fn num_computed(&self, session: SessionId) -> usize {
        self.running(session).num_computed
    }

    fn running(&self, session: SessionId) -> &Sequence {
        let running = self.running.iter().find(|sequence| sequence.session == session);
        running.expect("only chunks of running sequences are planned: this is a bug")
    }

    /// What the next step would do; `None` when there is no sequence at all.
    pub fn plan(&self) -> Option<Plan> {
        if self.running.is_empty() && self.waiting.is_empty() {
            return None;
        }
        let mut draft = Draft::new(self);
        draft.make_room();
        let mut turns = self.waiting.turns(|client| draft.held(client));
        // Whoever was preempted would be the first to come back, into the blocks that it was to give.
        if !draft.preempts() && draft.has_several_clients() {
            draft.admit_newcomers(&mut turns);
        }
        draft.decode();
        draft.read_prompts();
        if !draft.preempts() {
            draft.admit(&mut turns);
        }
        Some(draft.finish())
    }

    /// Adds guesses to the chunks that give a next token from one row: of `wanted` ones as many as there is room for, which no
    /// sequence loses its own for.
    pub fn add_drafts(&self, plan: &mut Plan, wanted: impl Fn(SessionId) -> usize) {
        let Plan { chunks, spare_tokens, spare_blocks, .. } = plan;
        for chunk in chunks.iter_mut().filter(|chunk| chunk.samples && chunk.num_tokens == 1) {
            let Some(sequence) = self.running.iter().find(|sequence| sequence.session == chunk.session) else {
                continue;
            };
            let end = chunk.start + chunk.num_tokens;
            // The blocks that the plan counted for it.
            let num_blocks = sequence.table.blocks().len().max(blocks_for(end));
            let room = (num_blocks + *spare_blocks) * BLOCK_SIZE - end;
            chunk.num_drafts = wanted(chunk.session).min(*spare_tokens).min(room);
            *spare_tokens -= chunk.num_drafts;
            *spare_blocks -= blocks_for(end + chunk.num_drafts).saturating_sub(num_blocks);
        }
    }

    /// Moves blocks and sequences as `plan`, which was made of this very state, says.
    pub fn begin(&mut self, plan: &Plan) {
        let preempted: Vec<Sequence> = plan.preempted.iter().map(|session| self.preempt(*session)).collect();
        // All have what they share before any takes a free block, which may be one of those.
        let admitted: Vec<SessionId> = plan.admitted.iter().map(|client| self.admit(*client)).collect();
        for session in admitted {
            let sequence = find(&mut self.running, session);
            let grown = self.pool.grow(&mut sequence.table, sequence.num_tokens + 1);
            assert!(grown, "the plan counted the free blocks: this is a bug");
        }
        for sequence in preempted {
            self.waiting.push_front(sequence.client, sequence);
        }
        for chunk in &plan.chunks {
            let end = chunk.start + chunk.num_tokens + chunk.num_drafts;
            let sequence = find(&mut self.running, chunk.session);
            assert!(self.pool.grow(&mut sequence.table, end), "the plan counted the free blocks: this is a bug");
        }
    }

    /// Takes a running sequence and its blocks back.
    fn preempt(&mut self, session: SessionId) -> Sequence {
        let index = self.running.iter().position(|sequence| sequence.session == session);
        let sequence = self.running.remove(index.expect("only running sequences are preempted: this is a bug"));
        self.pool.release(sequence.table);
        Sequence { num_computed: 0, table: BlockTable::default(), ..sequence }
    }

    /// Starts the oldest waiting sequence of a client with the blocks that it shares.
    fn admit(&mut self, client: ClientId) -> SessionId {
        let mut oldest = self.waiting.take(client).expect("the plan counted the waiting sequences: this is a bug");
        let mut table = BlockTable::default();
        self.pool.share(&mut table, oldest.shareable());
        oldest.num_computed = table.blocks().len() * BLOCK_SIZE;
        oldest.table = table;
        let session = oldest.session;
        let place = self.running.partition_point(|sequence| sequence.age < oldest.age);
        self.running.insert(place, oldest);
        session
    }

    /// Notes that the step of `plan` was computed: blocks that are whole now may be shared. To sequences that sample the
    /// caller then adds the new token ([`Batcher::push`]), or removes them.
    pub fn complete(&mut self, plan: &Plan) {
        for chunk in &plan.chunks {
            self.note_computed(chunk.session, chunk.num_tokens);
        }
    }

    /// Notes that the token added last to a sequence was a guess that its last step has computed.
    pub fn accept_draft(&mut self, session: SessionId) {
        self.note_computed(session, 1);
    }

    /// So many more tokens of a sequence are in the cache.
    fn note_computed(&mut self, session: SessionId, num_tokens: usize) {
        let sequence = find(&mut self.running, session);
        let start = sequence.num_computed;
        sequence.num_computed += num_tokens;
        let Some(names) = &sequence.names else { return };
        for index in start / BLOCK_SIZE..sequence.num_computed / BLOCK_SIZE {
            self.pool.name(sequence.table.blocks()[index], names.names()[index]);
        }
    }

    /// Adds the next token to a running sequence.
    pub fn push(&mut self, session: SessionId, token: u32) {
        let sequence = find(&mut self.running, session);
        sequence.num_tokens += 1;
        if let Some(names) = &mut sequence.names {
            names.push(&self.hasher, token);
        }
    }
}

fn find(running: &mut [Sequence], session: SessionId) -> &mut Sequence {
    let sequence = running.iter_mut().find(|sequence| sequence.session == session);
    sequence.expect("only chunks of running sequences are planned: this is a bug")
}
