//! What the next step holds: who gives back its blocks, who starts, whose tokens are computed. Reads the batcher and
//! changes nothing of it.

use super::{Batcher, Chunk, ENTITLED_SHARE, Plan, Sequence};
use crate::kv::{BLOCK_SIZE, Forecast};
use crate::request::{ClientId, SessionId};
use crate::runner::fair_queue::Turns;

/// A plan in the making, with what it leaves.
#[derive(Clone)]
pub(super) struct Draft<'a> {
    batcher: &'a Batcher,
    /// Running sequences that keep running, by age.
    kept: Vec<&'a Sequence>,
    /// Waiting sequences that start before prompts are read on.
    starting: Vec<Progress<'a>>,
    /// How many sequences each client has among those two.
    held: Vec<(ClientId, usize)>,
    preempted: Vec<SessionId>,
    /// Whose those are.
    gave: Vec<ClientId>,
    admitted: Vec<ClientId>,
    chunks: Vec<Chunk>,
    /// Tokens that still fit the step.
    budget: usize,
    /// The blocks as they would be.
    pool: Forecast<'a>,
}

/// How far a sequence has come.
#[derive(Clone, Copy)]
struct Progress<'a> {
    sequence: &'a Sequence,
    num_computed: usize,
}

impl Progress<'_> {
    fn pending(&self) -> usize {
        self.sequence.num_tokens - self.num_computed
    }

    /// The next `num_tokens` tokens as a chunk.
    fn chunk(&self, num_tokens: usize) -> Chunk {
        let samples = num_tokens == self.pending();
        Chunk { session: self.sequence.session, start: self.num_computed, num_tokens, samples, num_drafts: 0 }
    }
}

impl<'a> Draft<'a> {
    pub(super) fn new(batcher: &'a Batcher) -> Self {
        let mut draft = Self {
            batcher,
            kept: batcher.running.iter().collect(),
            starting: Vec::new(),
            held: Vec::new(),
            preempted: Vec::new(),
            gave: Vec::new(),
            admitted: Vec::new(),
            chunks: Vec::with_capacity(batcher.running.len()),
            budget: batcher.limits.max_batch_tokens,
            pool: Forecast::of(&batcher.pool),
        };
        batcher.running.iter().for_each(|sequence| *draft.held_mut(sequence.client) += 1);
        draft
    }

    /// How many sequences of a client run.
    pub(super) fn held(&self, client: ClientId) -> usize {
        self.held.iter().find(|(holder, _)| *holder == client).map_or(0, |(_, held)| *held)
    }

    fn held_mut(&mut self, client: ClientId) -> &mut usize {
        let index = self.held.iter().position(|(holder, _)| *holder == client).unwrap_or_else(|| {
            self.held.push((client, 0));
            self.held.len() - 1
        });
        &mut self.held[index].1
    }

    /// Whether running sequences give back their blocks.
    pub(super) fn preempts(&self) -> bool {
        !self.preempted.is_empty()
    }

    /// Whether somebody waits beside others.
    pub(super) fn has_several_clients(&self) -> bool {
        let running = self.held.first().map(|(client, _)| *client);
        self.held.len() > 1 || self.batcher.waiting.clients().any(|client| running.is_some_and(|other| other != client))
    }

    /// Gets the blocks that the next tokens of running sequences need, at the cost of the youngest.
    pub(super) fn make_room(&mut self) {
        let mut missing: usize = self.kept.iter().map(|sequence| missing_of(sequence)).sum();
        while missing > self.pool.num_free() {
            let index = self.victim(0).expect("a sequence grown to its end fits the pool alone: this is a bug");
            missing -= missing_of(self.kept[index]);
            self.preempt(index);
        }
        self.pool.take(missing);
    }

    /// The youngest kept sequence of the client that runs the most, if those are at least `least_held`; never the oldest
    /// of all, nor one of a client of which a younger one starts.
    fn victim(&self, least_held: usize) -> Option<usize> {
        let client = |index: &usize| self.kept[*index].client;
        let may_give =
            |index: &usize| self.held(client(index)) >= least_held && !self.admitted.contains(&client(index));
        (1..self.kept.len()).filter(may_give).max_by_key(|index| (self.held(client(index)), *index))
    }

    fn preempt(&mut self, index: usize) {
        let sequence = self.kept.remove(index);
        self.pool.release(&sequence.table);
        *self.held_mut(sequence.client) -= 1;
        self.preempted.push(sequence.session);
        self.gave.push(sequence.client);
    }

    /// Starts sequences of clients that run fewer than others, before prompts of those others are read on.
    pub(super) fn admit_newcomers(&mut self, turns: &mut Turns<'a, Sequence>) {
        let entitled = (self.batcher.limits.max_batch_sequences / ENTITLED_SHARE).max(1);
        while let Some((client, sequence)) = turns.peek() {
            let held = self.held(client);
            let most = self.held.iter().map(|(_, held)| *held).max().unwrap_or(0);
            // What a client has given back goes before whatever of it waits.
            if held >= most || self.spare_tokens() == 0 || self.gave.contains(&client) {
                return;
            }
            if !self.fits(sequence) && (held >= entitled || !self.make_room_for(sequence, held)) {
                return;
            }
            turns.advance();
            let started = self.start(sequence);
            self.starting.push(started);
        }
    }

    /// Tokens of the step that are left when every running sequence decodes and every client that reads prompts has one.
    fn spare_tokens(&self) -> usize {
        let decoding = self.kept.iter().filter(|sequence| sequence.decodes()).count();
        self.budget.saturating_sub(decoding + clients(self.reading()).len())
    }

    /// Preempts sequences of clients that run more, and will still run as many as the one that comes, until `sequence`
    /// fits. False, and nothing changed, when it cannot be made to.
    fn make_room_for(&mut self, sequence: &Sequence, held: usize) -> bool {
        let mut tried = self.clone();
        while !tried.fits(sequence) {
            let Some(index) = tried.victim(held + 2) else { return false };
            // Blocks were set aside for its next token.
            tried.pool.untake(missing_of(tried.kept[index]));
            tried.preempt(index);
        }
        *self = tried;
        true
    }

    /// Whether a place and blocks for all its tokens and the next one are free.
    fn fits(&self, sequence: &Sequence) -> bool {
        let is_full = self.kept.len() + self.admitted.len() >= self.batcher.limits.max_batch_sequences;
        !is_full && self.pool.cost(sequence.shareable(), sequence.num_tokens + 1) <= self.pool.num_free()
    }

    fn start(&mut self, sequence: &'a Sequence) -> Progress<'a> {
        let num_shared = self.pool.begin(sequence.shareable(), sequence.num_tokens + 1);
        self.admitted.push(sequence.client);
        *self.held_mut(sequence.client) += 1;
        Progress { sequence, num_computed: num_shared * BLOCK_SIZE }
    }

    /// A token of each running sequence whose prompt is in the cache.
    pub(super) fn decode(&mut self) {
        let decoding = self.kept.iter().filter(|sequence| sequence.decodes());
        self.chunks = decoding.map(|sequence| progress(sequence).chunk(1)).collect();
        self.budget -= self.chunks.len();
    }

    /// Sequences whose prompts are read: running ones, then those that start.
    fn reading(&self) -> impl Iterator<Item = Progress<'a>> {
        let running = self.kept.iter().filter(|sequence| !sequence.decodes());
        running.map(|sequence| progress(sequence)).chain(self.starting.iter().copied())
    }

    /// Chunks of prompts: an equal share of the budget for each client, within it the oldest first.
    pub(super) fn read_prompts(&mut self) {
        let reading: Vec<Progress<'_>> = self.reading().collect();
        let clients = clients(reading.iter().copied());
        if clients.len() <= 1 || self.budget < clients.len() {
            return self.read(&reading, usize::MAX);
        }
        let of = |client: ClientId| reading.iter().copied().filter(move |reader| reader.sequence.client == client);
        let mut shares: Vec<(usize, ClientId)> =
            clients.iter().map(|client| (of(*client).map(|reader| reader.pending()).sum(), *client)).collect();
        // What those with little to read leave is the others'.
        shares.sort();
        let num_clients = shares.len();
        for (index, (_, client)) in shares.into_iter().enumerate() {
            let share = self.budget / (num_clients - index);
            self.read(&of(client).collect::<Vec<_>>(), share);
        }
    }

    /// Adds chunks of `readers` in their order, of at most `share` tokens together.
    fn read(&mut self, readers: &[Progress<'_>], share: usize) {
        let mut left = share.min(self.budget);
        for reader in readers {
            if left == 0 {
                return;
            }
            let chunk = reader.chunk(reader.pending().min(left));
            left -= chunk.num_tokens;
            self.add(chunk);
        }
    }

    fn add(&mut self, chunk: Chunk) {
        self.budget -= chunk.num_tokens;
        self.chunks.push(chunk);
    }

    /// Starts sequences in the order of turns while there are places, blocks and tokens.
    pub(super) fn admit(&mut self, turns: &mut Turns<'a, Sequence>) {
        while let Some((_, sequence)) = turns.peek() {
            if self.budget == 0 || !self.fits(sequence) {
                return;
            }
            turns.advance();
            let started = self.start(sequence);
            self.add(started.chunk(started.pending().min(self.budget)));
        }
    }

    pub(super) fn finish(self) -> Plan {
        Plan {
            chunks: self.chunks,
            preempted: self.preempted,
            admitted: self.admitted,
            spare_tokens: self.budget,
            spare_blocks: self.pool.num_free(),
        }
    }
}

/// Blocks that a running sequence's next token needs beside those it has; what reads its prompt has them all.
fn missing_of(sequence: &Sequence) -> usize {
    if sequence.decodes() { sequence.table.missing_for(sequence.num_tokens) } else { 0 }
}

/// A running sequence.
fn progress(sequence: &Sequence) -> Progress<'_> {
    Progress { sequence, num_computed: sequence.num_computed }
}

/// Each client once, in order.
fn clients<'a>(readers: impl Iterator<Item = Progress<'a>>) -> Vec<ClientId> {
    let mut clients = Vec::new();
    for Progress { sequence, .. } in readers {
        if !clients.contains(&sequence.client) {
            clients.push(sequence.client);
        }
    }
    clients
}
