//! The text runner: continuous batching over paged KV.
//!
//! Owns the sessions of one language model: their tokens, samplers and text streams, and the KV caches. One step is one
//! forward pass over what the [`batcher`] planned: decode tokens of all running sessions and chunks of prompts. What
//! grammars allow is computed beside it ([`masks`]).
//! Deliberately does not know: which network it drives, how the plan is made, how logits become a token, how tokens
//! become text.

use std::collections::HashMap;

use candle_core::Tensor;
use rayon::prelude::*;
use tale_kernels::Choice;

use crate::error::{Error, Result};
use crate::grammar::Matching;
use crate::kv::{BLOCK_SIZE, BlockPool, BlockTable, KvCaches, PrefixCache};
use crate::layers::decoder::DecoderInput;
use crate::memory::MemoryPlan;
use crate::request::{ClientId, Event, Events, FinishReason, Phase, Request, SessionId, TextRequest, Usage};
use crate::runner::text::batcher::{Batcher, Chunk, Limits, Plan};
use crate::runner::text::masks::Masks;
use crate::runner::text::model::{CausalLm, LanguageModel};
use crate::runner::text::recorded::DecodeRecordings;
use crate::runner::{Runner, RunnerStatus, StepPlan};
use crate::sampler::{self, Sampler, Turn};
use crate::text_stream::TextStream;
use crate::tokenizer::Tokenizer;

pub mod batcher;
pub mod masks;
pub mod model;
pub mod recorded;

/// Most sessions of one runner, running and waiting.
pub const MAX_SESSIONS: usize = 1024;

/// Drives the sessions of one language model.
#[derive(Debug)]
pub struct TextRunner<M> {
    model: LanguageModel<M>,
    caches: KvCaches,
    /// Where steps are launched on a GPU.
    recordings: Option<DecodeRecordings>,
    max_context: usize,
    prefix_cache: PrefixCache,
    batcher: Batcher,
    sessions: HashMap<SessionId, Session>,
    /// Sessions of the step that is being computed; what is left of them after a failure is evicted.
    in_step: Vec<SessionId>,
}

#[derive(Debug)]
struct Session {
    /// The prompt and what was sampled.
    tokens: Vec<u32>,
    num_prompt_tokens: usize,
    /// Of the prompt, those that were in the cache when its first step began; `None` where nothing is shared.
    num_cached_tokens: Option<usize>,
    max_tokens: usize,
    ignore_eos: bool,
    sampler: Sampler,
    stream: TextStream,
    /// Where the answer is in its grammar; away while its mask is computed.
    matching: Option<Matching>,
    started: bool,
}

/// What a new token does to a session.
struct Accepted {
    token: u32,
    /// What became certain with it.
    text: String,
    end: Option<End>,
}

/// How an answer ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// With an end-of-sequence token.
    EosToken,
    /// Before a stop string; the text that the stream still holds is not part of the answer.
    StopString,
    /// Where its grammar ends.
    Grammar,
    /// With the last token that was asked for.
    Length,
}

impl<M: CausalLm> TextRunner<M> {
    /// An idle runner whose sessions share `caches`, and prompts in them as `prefix_cache` says.
    pub fn new(model: LanguageModel<M>, caches: KvCaches, limits: Limits, prefix_cache: PrefixCache) -> Self {
        let recordings = recordings(&caches).filter(|_| model.network.is_recordable());
        // The last block fills recorded steps up.
        let num_blocks = caches.num_blocks() - usize::from(recordings.is_some());
        let max_context = model.network.context_len().min(num_blocks * BLOCK_SIZE);
        let batcher = Batcher::new(limits, BlockPool::new(num_blocks));
        let sessions = HashMap::new();
        Self { model, caches, recordings, max_context, prefix_cache, batcher, sessions, in_step: Vec::new() }
    }

    /// Most tokens of prompt and answer together: what the model's positions and the whole pool can hold.
    pub fn max_context(&self) -> usize {
        self.max_context
    }

    fn check(&self, request: &TextRequest) -> Result<()> {
        let prompt_tokens = request.prompt.len();
        if prompt_tokens == 0 {
            return Err(Error::invalid("prompt", "has no tokens"));
        }
        if request.max_tokens == 0 {
            return Err(Error::invalid("max_tokens", "is 0; at least one token is generated"));
        }
        if prompt_tokens.saturating_add(request.max_tokens) > self.max_context {
            let limit = self.max_context.saturating_sub(1);
            return Err(Error::ContextLength { prompt_tokens, is_exact: true, limit });
        }
        let vocab_size = self.model.network.vocab_size();
        match request.prompt.iter().find(|token| **token as usize >= vocab_size) {
            Some(token) => Err(Error::invalid("prompt", format!("token {token} is outside of the vocabulary"))),
            None => Ok(()),
        }
    }

    fn announce(&mut self, events: &mut Events) {
        for id in &self.in_step {
            let session = self.sessions.get_mut(id).expect("only live sessions are planned: this is a bug");
            if !session.started {
                session.started = true;
                if self.prefix_cache != PrefixCache::Off {
                    session.num_cached_tokens = Some(self.batcher.num_computed(*id));
                }
                events.emit(*id, Event::Started);
            }
        }
    }

    /// Logits `[rows, vocab]` of the rows that sample; `None` when none does.
    fn forward(&mut self, plan: &Plan) -> Result<Option<Tensor>> {
        let mut input = DecoderInput::default();
        for Chunk { session, start, num_tokens, samples } in plan.chunks.iter().copied() {
            let tokens = &self.sessions[&session].tokens[start..start + num_tokens];
            input.push(tokens, start, self.batcher.table(session));
            if samples {
                input.want_logits_of_last_row();
            }
        }
        match &mut self.recordings {
            Some(recordings) if DecodeRecordings::takes(&input) => {
                recordings.forward(&self.model.network, input, &self.caches).map(Some)
            }
            _ => self.model.network.forward(&input, &self.caches),
        }
    }

    /// Begins to compute what the grammars of sessions whose chunks sample allow next.
    fn begin_masks(&mut self, plan: &Plan) -> Masks {
        let sampling = plan.chunks.iter().filter(|chunk| chunk.samples).map(|chunk| chunk.session);
        let matching = |id| Some((id, self.sessions.get_mut(&id)?.matching.take()?));
        Masks::begin(sampling.filter_map(matching))
    }

    /// Samples the next token of each session whose chunk asked for one, all in one call where the logits are, and
    /// makes text of them side by side; in order of ids.
    fn sample(&mut self, plan: &Plan, logits: &Tensor, masks: Masks) -> Result<Vec<(SessionId, Result<Accepted>)>> {
        let phase = plan.phase().as_str();
        let eos_token_ids = self.model.eos_token_ids.as_slice();
        let sampling = plan.chunks.iter().filter(|chunk| chunk.samples);
        let rows: HashMap<SessionId, usize> = sampling.enumerate().map(|(row, chunk)| (chunk.session, row)).collect();
        let of_a_row = |(id, session)| rows.get(id).map(|row| (*row, *id, session));
        let mut turns: Vec<(usize, SessionId, &mut Session)> = self.sessions.iter_mut().filter_map(of_a_row).collect();
        turns.sort_by_key(|(row, ..)| *row);
        let mut masks = masks.finish();
        let mut without_mask: HashMap<SessionId, Error> = HashMap::new();
        let draws = turns.iter_mut().map(|(_, id, session)| {
            let allowed = masks.remove(id).and_then(|(matching, mask)| {
                session.matching = Some(matching);
                mask.map_err(|error| without_mask.insert(*id, error)).ok()
            });
            Turn { sampler: &mut session.sampler, allowed }
        });
        let choices = sampler::sample(logits, draws.collect())?;
        let mut accepted: Vec<_> = turns
            .into_par_iter()
            .map(|(row, id, session)| (id, session.accept(choices[row], phase, eos_token_ids)))
            .collect();
        accepted.sort_by_key(|(id, _)| *id);
        for (id, accepted) in &mut accepted {
            if let Some(error) = without_mask.remove(id) {
                *accepted = Err(error);
            }
        }
        Ok(accepted)
    }

    /// Tells what came of a sample, and ends the session if that was its last token.
    fn report(&mut self, id: SessionId, accepted: Result<Accepted>, events: &mut Events) {
        match accepted {
            Ok(Accepted { token, text, end }) => {
                events.emit(id, Event::Text { tokens: vec![token], text });
                match end {
                    Some(end) => self.finish(id, end, events),
                    None => self.batcher.push(id, token),
                }
            }
            Err(error) => {
                self.discard(id);
                events.emit(id, Event::Failed(error));
            }
        }
    }

    fn finish(&mut self, id: SessionId, end: End, events: &mut Events) {
        let Some(session) = self.forget(id) else { return };
        let usage = session.usage();
        if end != End::StopString {
            match session.stream.finish() {
                Ok(tail) if tail.is_empty() => (),
                Ok(tail) => events.emit(id, Event::Text { tokens: Vec::new(), text: tail }),
                Err(error) => return events.emit(id, Event::Failed(error)),
            }
        }
        let reason = if end == End::Length { FinishReason::Length } else { FinishReason::Stop };
        events.emit(id, Event::Finished { reason, usage });
    }

    fn forget(&mut self, id: SessionId) -> Option<Session> {
        self.batcher.remove(id);
        self.sessions.remove(&id)
    }

    /// As [`Self::forget`], of a session that failed: what it left in the cache serves no other.
    fn discard(&mut self, id: SessionId) -> Option<Session> {
        self.batcher.discard(id);
        self.sessions.remove(&id)
    }
}

/// Recordings for caches whose operations are launches; they take the last block.
fn recordings(caches: &KvCaches) -> Option<DecodeRecordings> {
    let first = caches.layers().first()?;
    if caches.num_blocks() < 2 || !tale_kernels::can_record(first.k()) {
        return None;
    }
    Some(DecodeRecordings::new(BlockTable::outside_of_pools(caches.num_blocks() as u32 - 1)))
}

impl Session {
    fn new(request: TextRequest, tokenizer: &Tokenizer) -> Self {
        Self {
            sampler: Sampler::new(&request.sampling, &request.prompt),
            stream: TextStream::new(tokenizer.clone(), &request.prompt, request.stop),
            matching: request.grammar.map(|grammar| grammar.begin()),
            num_prompt_tokens: request.prompt.len(),
            num_cached_tokens: None,
            max_tokens: request.max_tokens,
            ignore_eos: request.ignore_eos,
            tokens: request.prompt,
            started: false,
        }
    }

    fn accept(&mut self, choice: Choice, phase: &'static str, eos_token_ids: &[u32]) -> Result<Accepted> {
        let Choice { token, is_finite } = choice;
        if !is_finite {
            return Err(Error::NotFinite { phase });
        }
        self.tokens.push(token);
        if !self.ignore_eos && eos_token_ids.contains(&token) {
            return Ok(Accepted { token, text: String::new(), end: Some(End::EosToken) });
        }
        let is_complete = self.matching.as_mut().map_or(Ok(false), |matching| matching.accept(token))?;
        let piece = self.stream.push(token)?;
        let is_last = self.usage().completion_tokens == self.max_tokens;
        let end = match (piece.stopped, is_complete, is_last) {
            (true, ..) => Some(End::StopString),
            (false, true, _) => Some(End::Grammar),
            (false, false, true) => Some(End::Length),
            (false, false, false) => None,
        };
        Ok(Accepted { token, text: piece.text, end })
    }

    fn usage(&self) -> Usage {
        let prompt_tokens = self.num_prompt_tokens;
        let completion_tokens = self.tokens.len() - prompt_tokens;
        Usage { prompt_tokens, cached_tokens: self.num_cached_tokens, completion_tokens, ..Usage::default() }
    }
}

impl<M: CausalLm> Runner for TextRunner<M> {
    /// Nothing: the KV pool that sessions share is taken when the model is loaded.
    fn plan(&self, _request: &Request) -> MemoryPlan {
        MemoryPlan::default()
    }

    fn submit_for(&mut self, client: ClientId, id: SessionId, request: Request) -> Result<()> {
        let Request::Text(request) = request else {
            return Err(Error::invalid("model", "is a language model; it makes no pictures"));
        };
        if self.sessions.contains_key(&id) {
            return Err(Error::invalid("session", format!("{} is in use", id.0)));
        }
        if self.sessions.len() >= MAX_SESSIONS {
            return Err(Error::TooManySessions { limit: MAX_SESSIONS });
        }
        self.check(&request)?;
        let scope = self.prefix_cache.scope(client, request.cache_salt.as_deref());
        self.batcher.submit(id, client, &request.prompt, scope);
        self.sessions.insert(id, Session::new(request, &self.model.tokenizer));
        Ok(())
    }

    fn max_sessions(&self) -> usize {
        MAX_SESSIONS
    }

    fn cancel(&mut self, id: SessionId) {
        self.forget(id);
    }

    fn next(&self) -> Option<StepPlan> {
        self.batcher.plan().map(|plan| summary(&plan))
    }

    fn borrowed_bytes(&self) -> usize {
        0
    }

    /// Nothing is borrowed for it.
    fn evict_next(&mut self) -> Vec<SessionId> {
        Vec::new()
    }

    fn step(&mut self, events: &mut Events) -> Result<StepPlan> {
        let Some(plan) = self.batcher.plan() else {
            return Ok(StepPlan { phase: Phase::Decode, sessions: 0 });
        };
        self.in_step = plan.chunks.iter().map(|chunk| chunk.session).collect();
        self.batcher.begin(&plan);
        self.announce(events);
        let masks = self.begin_masks(&plan);
        let logits = self.forward(&plan)?;
        self.batcher.complete(&plan);
        if let Some(logits) = logits {
            for (id, accepted) in self.sample(&plan, &logits, masks)? {
                self.report(id, accepted, events);
            }
        }
        self.in_step.clear();
        Ok(summary(&plan))
    }

    fn evict_step(&mut self) -> Vec<SessionId> {
        let mut evicted = std::mem::take(&mut self.in_step);
        evicted.retain(|id| self.discard(*id).is_some());
        evicted
    }

    fn status(&self) -> RunnerStatus {
        let pool = self.batcher.pool();
        RunnerStatus {
            running: self.batcher.num_running(),
            waiting: self.batcher.num_waiting(),
            kv_blocks_used: pool.num_blocks() - pool.num_free(),
            kv_blocks_total: pool.num_blocks(),
        }
    }
}

fn summary(plan: &Plan) -> StepPlan {
    StepPlan { phase: plan.phase(), sessions: plan.chunks.len() }
}

#[cfg(test)]
mod tests {

    use candle_core::{DType, Device};

    use super::*;
    use crate::device::{DeviceSpec, Placement, WeightDtype};
    use crate::kv::{KvFormat, KvShape};
    use crate::layers::decoder::PreparedInput;
    use crate::request::SamplingParams;

    /// A network without weights: after every token comes the next one of the vocabulary.
    struct Counter;

    const VOCAB_SIZE: usize = 500;

    impl CausalLm for Counter {
        fn vocab_size(&self) -> usize {
            VOCAB_SIZE
        }

        fn context_len(&self) -> usize {
            256
        }

        fn kv_shape(&self) -> KvShape {
            KvShape { num_layers: 1, num_key_value_heads: 1, head_dim: 2 }
        }

        fn prepare<'a>(&self, input: &'a DecoderInput, caches: &KvCaches) -> Result<PreparedInput<'a>> {
            let angles = Tensor::zeros((input.len(), 1), DType::F32, &Device::Cpu)?;
            PreparedInput::new(input, (angles.clone(), angles), 1, caches)
        }

        fn logits(&self, input: &PreparedInput<'_>, _caches: &KvCaches) -> Result<Option<Tensor>> {
            let mut logits = Vec::new();
            for token in input.tokens().to_vec1::<u32>()? {
                let mut row = vec![0f32; VOCAB_SIZE];
                let next = token as usize + 1;
                *row.get_mut(next).ok_or_else(|| Error::Device(format!("no token {next}")))? = 1.0;
                logits.push(row);
            }
            input.asked_for(&Tensor::new(logits, &Device::Cpu)?)
        }
    }

    fn runner(max_batch_sequences: usize) -> TextRunner<Counter> {
        let dir = crate::testing::repository().join("tests/goldens/qwen2-yarn/checkpoint");
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("a CPU");
        let format = KvFormat::computed(&placement);
        let caches = KvCaches::new(Counter.kv_shape(), format, 16, &placement).expect("allocated");
        let tokenizer = Tokenizer::from_dir(&dir).expect("a tokenizer");
        let model = LanguageModel { network: Counter, tokenizer, eos_token_ids: Vec::new() };
        TextRunner::new(model, caches, Limits { max_batch_tokens: 64, max_batch_sequences }, PrefixCache::default())
    }

    fn request(prompt: Vec<u32>) -> Request {
        let sampling = SamplingParams::greedy();
        let stop = Vec::new();
        Request::Text(TextRequest {
            prompt,
            max_tokens: 4,
            sampling,
            stop,
            ignore_eos: true,
            cache_salt: None,
            grammar: None,
        })
    }

    /// Runs until idle and gives the tokens of `id`.
    fn tokens_of(runner: &mut TextRunner<Counter>, id: SessionId) -> Vec<u32> {
        let mut events = Events::default();
        while runner.next().is_some() {
            runner.step(&mut events).expect("computed");
        }
        let mut all = Vec::new();
        for (session, event) in events.drain() {
            if let (true, Event::Text { tokens, .. }) = (session == id, event) {
                all.extend(tokens);
            }
        }
        all
    }

    #[test]
    fn a_failed_step_takes_its_own_sessions_only() {
        let (first, second, third) = (SessionId(1), SessionId(2), SessionId(3));
        let mut runner = runner(2);
        runner.submit(third, request(vec![7, 8, 9])).expect("accepted");
        let expected = tokens_of(&mut runner, third);
        assert_eq!(expected, [10, 11, 12, 13]);

        for (id, prompt) in [(first, vec![1, 2]), (second, vec![3, 4, 5]), (third, vec![7, 8, 9])] {
            runner.submit(id, request(prompt)).expect("accepted");
        }
        let mut events = Events::default();
        runner.step(&mut events).expect("computed");
        // A token outside of the vocabulary makes the whole forward pass fail.
        let session = runner.sessions.get_mut(&second).expect("it runs");
        *session.tokens.last_mut().expect("it has tokens") = u32::MAX - 1;
        assert!(runner.step(&mut events).is_err());
        assert_eq!(runner.evict_step(), [first, second]);
        assert_eq!((runner.status().running, runner.status().waiting, runner.status().kv_blocks_used), (0, 1, 0));
        assert_eq!(runner.evict_step(), []);
        assert_eq!(tokens_of(&mut runner, third), expected);
    }

    #[test]
    fn a_session_starts_once_and_ends_once() {
        let mut runner = runner(2);
        runner.submit(SessionId(1), request(vec![1; 100])).expect("accepted");
        let mut events = Events::default();
        while runner.next().is_some() {
            runner.step(&mut events).expect("computed");
        }
        let events: Vec<Event> = events.drain().map(|(_, event)| event).collect();
        assert!(matches!(events.first(), Some(Event::Started)));
        assert!(matches!(events.last(), Some(Event::Finished { reason: FinishReason::Length, .. })));
        let with_tokens =
            events.iter().filter(|event| matches!(event, Event::Text { tokens, .. } if tokens.len() == 1)).count();
        let starts = events.iter().filter(|event| matches!(event, Event::Started)).count();
        let ends = events.iter().filter(|event| event.is_terminal()).count();
        assert_eq!((with_tokens, starts, ends), (4, 1, 1));
    }

    #[test]
    fn beside_a_thousand_streams_of_a_client_a_neighbour_has_its_token_in_the_next_step() {
        const NEIGHBOUR: SessionId = SessionId(1000);
        let mut runner = runner(4);
        let prompt = |id: u64| vec![id as u32 % 400];
        for id in 0..NEIGHBOUR.0 {
            runner.submit_for(ClientId(1), SessionId(id), request(prompt(id))).expect("accepted");
        }
        let mut events = Events::default();
        runner.step(&mut events).expect("computed");
        runner.step(&mut events).expect("computed");
        let mut tokens: HashMap<SessionId, Vec<u32>> = HashMap::new();
        let mut take = |events: &mut Events| {
            for (session, event) in events.drain() {
                if let Event::Text { tokens: new, .. } = event {
                    tokens.entry(session).or_default().extend(new);
                }
            }
            tokens.clone()
        };
        take(&mut events);
        runner.submit_for(ClientId(2), NEIGHBOUR, request(prompt(NEIGHBOUR.0))).expect("accepted");
        runner.step(&mut events).expect("computed");
        assert_eq!(take(&mut events)[&NEIGHBOUR], [prompt(NEIGHBOUR.0)[0] + 1]);
        while runner.next().is_some() {
            runner.step(&mut events).expect("computed");
        }
        // Whoever gave up its place goes on as if nothing had been.
        for (session, tokens) in take(&mut events) {
            let first = prompt(session.0)[0] + 1;
            assert_eq!(tokens, (first..first + 4).collect::<Vec<_>>(), "{session:?}");
        }
    }

    #[test]
    fn a_session_id_names_one_session() {
        let mut runner = runner(2);
        runner.submit(SessionId(1), request(vec![1])).expect("accepted");
        assert!(runner.submit(SessionId(1), request(vec![2])).is_err());
        runner.cancel(SessionId(2));
        assert_eq!(runner.status().waiting, 1);
    }

    #[test]
    fn the_queue_has_a_bound() {
        let mut runner = runner(2);
        for id in 0..MAX_SESSIONS as u64 {
            runner.submit(SessionId(id), request(vec![1])).expect("accepted");
        }
        let refused = runner.submit(SessionId(MAX_SESSIONS as u64), request(vec![1]));
        assert!(matches!(refused, Err(Error::TooManySessions { limit: MAX_SESSIONS })));
        runner.cancel(SessionId(0));
        runner.submit(SessionId(MAX_SESSIONS as u64), request(vec![1])).expect("one has gone");
    }
}
