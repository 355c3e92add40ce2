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
use tale_kernels::Mask;

use crate::error::{Error, Result};
use crate::grammar::Matching;
use crate::kv::{BLOCK_SIZE, BlockPool, BlockTable, KvCaches, PrefixCache};
use crate::layers::decoder::DecoderInput;
use crate::memory::MemoryPlan;
use crate::request::{ClientId, Event, Events, FinishReason, Phase, Request, SessionId, TextRequest};
use crate::runner::text::batcher::{Batcher, Chunk, Limits, Plan};
use crate::runner::text::lookup::PromptLookup;
use crate::runner::text::masks::Masks;
use crate::runner::text::model::{CausalLm, LanguageModel};
use crate::runner::text::prompts::PromptStates;
use crate::runner::text::recorded::DecodeRecordings;
use crate::runner::text::session::{Accepted, End, Sampled, Session};
use crate::runner::{Runner, RunnerStatus, StepPlan};
use crate::sampler::{self, Turn};

pub mod batcher;
pub mod logprobs;
pub mod lookup;
pub mod masks;
pub mod model;
mod prompts;
pub mod recorded;
mod session;

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
    options: RunnerOptions,
    batcher: Batcher,
    sessions: HashMap<SessionId, Session>,
    /// What was asked for by those of them that have had no step.
    not_begun: HashMap<SessionId, TextRequest>,
    /// Sessions of the step that is being computed; what is left of them after a failure is evicted.
    in_step: Vec<SessionId>,
    /// The step whose first half is done.
    launched: Option<Launched>,
    /// Whether a forward pass returns before the device is done with it.
    is_asynchronous: bool,
}

/// A step between its halves.
#[derive(Debug)]
struct Launched {
    plan: Plan,
    drafts: Drafts,
    masks: Masks,
    /// What comes of the forward pass that the device is at; `None` where it has not begun.
    computed: Option<Computed>,
}

/// How sessions are driven.
#[derive(Debug, Clone, Copy, Default)]
pub struct RunnerOptions {
    /// Which prompts share what the caches have of them.
    pub prefix_cache: PrefixCache,
    /// How tokens are guessed, if they are.
    pub prompt_lookup: Option<PromptLookup>,
}

/// A session whose next token is sampled.
#[derive(Clone, Copy)]
struct Place<'a> {
    session: SessionId,
    /// Of the step's logits.
    row: usize,
    /// Guesses of that token and those behind it, each with the logits of the next row.
    drafts: &'a [u32],
}

/// Guesses by session, as many as were computed.
type Drafts = HashMap<SessionId, Vec<u32>>;

/// What came of a forward pass.
#[derive(Debug)]
struct Computed {
    /// `[rows, vocab]` of the rows that sample and of the guesses behind them; `None` when none does.
    logits: Option<Tensor>,
    prompts: Option<PromptStates>,
}

impl<M: CausalLm> TextRunner<M> {
    /// An idle runner whose sessions share `caches`.
    pub fn new(model: LanguageModel<M>, caches: KvCaches, limits: Limits, options: RunnerOptions) -> Self {
        let recordings = recordings(&caches).filter(|_| model.network.is_recordable());
        // The last block fills recorded steps up.
        let num_blocks = caches.num_blocks() - usize::from(recordings.is_some());
        let max_context = model.network.context_len().min(num_blocks * BLOCK_SIZE);
        let batcher = Batcher::new(limits, BlockPool::new(num_blocks));
        let is_asynchronous = caches.layers().first().is_some_and(|cache| tale_kernels::can_record(cache.k()));
        Self {
            model,
            caches,
            recordings,
            max_context,
            options,
            batcher,
            sessions: HashMap::new(),
            not_begun: HashMap::new(),
            in_step: Vec::new(),
            launched: None,
            is_asynchronous,
        }
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

    /// What the next step does. A sequence that ends with its prompt gets no next token.
    fn plan(&self) -> Option<Plan> {
        let mut plan = self.batcher.plan()?;
        for chunk in plan.chunks.iter_mut().filter(|chunk| chunk.samples) {
            chunk.samples = !self.sessions[&chunk.session].ends_with_prompt();
        }
        Some(plan)
    }

    fn announce(&mut self, events: &mut Events) {
        for id in &self.in_step {
            let session = self.sessions.get_mut(id).expect("only live sessions are planned: this is a bug");
            if !session.started {
                session.started = true;
                self.not_begun.remove(id);
                if self.options.prefix_cache != PrefixCache::Off {
                    session.num_cached_tokens = Some(self.batcher.num_computed(*id));
                }
                events.emit(*id, Event::Started);
            }
        }
    }

    /// Guesses for the sessions that decode, as many as the step has room for.
    fn draft(&self, plan: &mut Plan) -> Drafts {
        let Some(lookup) = self.options.prompt_lookup else { return Drafts::new() };
        let guess = |id: SessionId| {
            let session = &self.sessions[&id];
            if session.matching.is_some() {
                // A grammar says what may come one token at a time.
                return &[][..];
            }
            let guess = lookup.guess(&session.tokens);
            // The last token that was asked for has none behind it.
            &guess[..guess.len().min(session.num_tokens_left() - 1)]
        };
        self.batcher.add_drafts(plan, |id| guess(id).len());
        let drafted = plan.chunks.iter().filter(|chunk| chunk.num_drafts > 0);
        drafted.map(|chunk| (chunk.session, guess(chunk.session)[..chunk.num_drafts].to_vec())).collect()
    }

    fn forward(&mut self, plan: &Plan, drafts: &Drafts) -> Result<Computed> {
        let mut input = DecoderInput::default();
        let (mut of_prompts, mut prompt_rows) = (Vec::new(), Vec::new());
        for Chunk { session, start, num_tokens, samples, num_drafts } in plan.chunks.iter().copied() {
            let table = self.batcher.table(session);
            if let Some(positions) = self.sessions[&session].wanted_of_prompt(start..start + num_tokens) {
                let row = |position: usize| input.len() + position - start;
                prompt_rows.push(row(positions.start)..row(positions.end));
                of_prompts.push((session, positions));
            }
            let tokens = &self.sessions[&session].tokens[start..start + num_tokens];
            match drafts.get(&session) {
                Some(drafts) => input.push(&[tokens, drafts].concat(), start, table),
                None => input.push(tokens, start, table),
            }
            if samples {
                input.want_logits_of_last_rows(1 + num_drafts);
            }
        }
        if !of_prompts.is_empty() {
            return self.forward_with_prompts(input, prompt_rows, of_prompts);
        }
        let logits = match &mut self.recordings {
            Some(recordings) if DecodeRecordings::takes(&input) => {
                Some(recordings.forward(&self.model.network, input, &self.caches)?)
            }
            _ => self.model.network.forward(&input, &self.caches)?,
        };
        Ok(Computed { logits, prompts: None })
    }

    /// Begins to compute what the grammars of sessions whose chunks sample allow next.
    fn begin_masks(&mut self, plan: &Plan) -> Masks {
        let sampling = plan.chunks.iter().filter(|chunk| chunk.samples).map(|chunk| chunk.session);
        let matching = |id| Some((id, self.sessions.get_mut(&id)?.matching.take()?));
        Masks::begin(sampling.filter_map(matching))
    }

    /// Samples the next token of each session whose chunk asked for one, and where that is what was guessed the one behind it,
    /// and so on: a guess changes no token, since each is drawn from the logits behind the tokens that are there.
    fn sample(
        &mut self,
        plan: &Plan,
        drafts: &Drafts,
        logits: &Tensor,
        masks: Masks,
        events: &mut Events,
    ) -> Result<()> {
        let mut masks = masks.finish();
        let phase = plan.phase().as_str();
        let mut row = 0;
        let mut places = Vec::with_capacity(plan.chunks.len());
        for chunk in plan.chunks.iter().filter(|chunk| chunk.samples) {
            let drafts = drafts.get(&chunk.session).map_or(&[][..], Vec::as_slice);
            places.push(Place { session: chunk.session, row, drafts });
            row += 1 + drafts.len();
        }
        while !places.is_empty() {
            let mut going_on = Vec::new();
            for (place, accepted) in self.sample_at(places, phase, logits, &mut masks)? {
                let token = accepted.as_ref().map(|accepted| accepted.token).ok();
                let goes_on = self.report(place.session, accepted, events);
                match place.drafts.split_first() {
                    Some((draft, drafts)) if goes_on && token == Some(*draft) => {
                        self.batcher.accept_draft(place.session);
                        going_on.push(Place { row: place.row + 1, drafts, ..place });
                    }
                    _ => (),
                }
            }
            places = going_on;
        }
        Ok(())
    }

    /// Samples a token at each place, all in one call where the logits are, and makes text of them side by side; in order of
    /// ids.
    fn sample_at<'a>(
        &mut self,
        places: Vec<Place<'a>>,
        phase: &'static str,
        logits: &Tensor,
        masks: &mut HashMap<SessionId, (Matching, Result<Mask>)>,
    ) -> Result<Vec<(Place<'a>, Result<Accepted>)>> {
        let eos_token_ids = self.model.eos_token_ids.as_slice();
        let by_session: HashMap<SessionId, Place<'_>> =
            places.into_iter().map(|place| (place.session, place)).collect();
        let at_a_place = |(id, session)| by_session.get(id).map(|place| (*place, session));
        let mut turns: Vec<(Place<'_>, &mut Session)> = self.sessions.iter_mut().filter_map(at_a_place).collect();
        turns.sort_by_key(|(place, _)| place.row);
        let rows: Vec<u32> = turns.iter().map(|(place, _)| place.row as u32).collect();
        let logits = match rows.len() == logits.dim(0)? {
            true => logits.clone(),
            false => tale_kernels::embedding(&Tensor::new(rows, logits.device())?, logits)?,
        };
        let mut without_mask: HashMap<SessionId, Error> = HashMap::new();
        let draws = turns.iter_mut().map(|(place, session)| {
            let allowed = masks.remove(&place.session).and_then(|(matching, mask)| {
                session.matching = Some(matching);
                mask.map_err(|error| without_mask.insert(place.session, error)).ok()
            });
            Turn { sampler: &mut session.sampler, allowed }
        });
        let choices = sampler::sample(&logits, draws.collect())?;
        let tells: Vec<bool> = turns.iter().map(|(_, session)| session.answer_logprobs.is_some()).collect();
        let rows = logprobs::rows_on_host(&logits, &tells)?;
        let sampled = choices.into_iter().zip(rows).map(|(choice, logits)| Sampled { choice, logits });
        let mut accepted: Vec<_> = turns
            .into_par_iter()
            .zip(sampled.collect::<Vec<_>>())
            .map(|((place, session), sampled)| (place, session.accept(sampled, place.drafts, phase, eos_token_ids)))
            .collect();
        accepted.sort_by_key(|(place, _)| place.session);
        for (place, accepted) in &mut accepted {
            if let Some(error) = without_mask.remove(&place.session) {
                *accepted = Err(error);
            }
        }
        Ok(accepted)
    }

    /// Tells what came of a sample, and ends the session if that was its last token. Whether it goes on.
    fn report(&mut self, id: SessionId, accepted: Result<Accepted>, events: &mut Events) -> bool {
        match accepted {
            Ok(Accepted { token, text, logprobs, end }) => {
                events.emit(id, Event::Text { tokens: vec![token], text, logprobs });
                match end {
                    Some(end) => self.finish(id, end, events),
                    None => self.batcher.push(id, token),
                }
                end.is_none()
            }
            Err(error) => {
                self.discard(id);
                events.emit(id, Event::Failed(error));
                false
            }
        }
    }

    fn finish(&mut self, id: SessionId, end: End, events: &mut Events) {
        let Some(session) = self.forget(id) else { return };
        let usage = session.usage();
        if end != End::StopString {
            let text = match session.stream.finish() {
                Ok(text) => text,
                Err(error) => return events.emit(id, Event::Failed(error)),
            };
            let logprobs = session.answer_logprobs.map_or(Vec::new(), |told| told.rest(&text));
            if !(text.is_empty() && logprobs.is_empty()) {
                events.emit(id, Event::Text { tokens: Vec::new(), text, logprobs });
            }
        }
        let reason = if end == End::Length { FinishReason::Length } else { FinishReason::Stop };
        events.emit(id, Event::Finished { reason, usage });
    }

    fn forget(&mut self, id: SessionId) -> Option<Session> {
        self.batcher.remove(id);
        self.not_begun.remove(&id);
        self.sessions.remove(&id)
    }

    /// As [`Self::forget`], of a session that failed: what it left in the cache serves no other.
    fn discard(&mut self, id: SessionId) -> Option<Session> {
        self.batcher.discard(id);
        self.not_begun.remove(&id);
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
        // What is told of a prompt has to be computed.
        let shares = request.prompt_logprobs.is_none();
        let scope = self.options.prefix_cache.scope(client, request.cache_salt.as_deref()).filter(|_| shares);
        self.batcher.submit(id, client, &request.prompt, scope);
        self.not_begun.insert(id, request.clone());
        self.sessions.insert(id, Session::new(request, &self.model.tokenizer, &self.model.eos_token_ids));
        Ok(())
    }

    fn max_sessions(&self) -> usize {
        MAX_SESSIONS
    }

    fn cancel(&mut self, id: SessionId) {
        self.forget(id);
    }

    fn take_back(&mut self, id: SessionId) -> Option<Request> {
        let request = self.not_begun.remove(&id)?;
        self.forget(id);
        Some(Request::Text(request))
    }

    fn next(&self) -> Option<StepPlan> {
        self.plan().map(|plan| summary(&plan))
    }

    fn borrowed_bytes(&self) -> usize {
        0
    }

    /// Nothing is borrowed for it.
    fn evict_next(&mut self) -> Vec<SessionId> {
        Vec::new()
    }

    fn launch(&mut self) -> Result<()> {
        let Some(mut plan) = self.plan() else { return Ok(()) };
        let drafts = self.draft(&mut plan);
        self.in_step = plan.chunks.iter().map(|chunk| chunk.session).collect();
        self.batcher.begin(&plan);
        let masks = self.begin_masks(&plan);
        let computed = if self.is_asynchronous { Some(self.forward(&plan, &drafts)?) } else { None };
        self.launched = Some(Launched { plan, drafts, masks, computed });
        Ok(())
    }

    fn collect(&mut self, events: &mut Events) -> Result<StepPlan> {
        let Some(Launched { plan, drafts, masks, computed }) = self.launched.take() else {
            return Ok(StepPlan { phase: Phase::Decode, sessions: 0, amount: 0.0 });
        };
        self.announce(events);
        let Computed { logits, prompts } = match computed {
            Some(computed) => computed,
            None => self.forward(&plan, &drafts)?,
        };
        self.batcher.complete(&plan);
        self.tell_prompts(&plan, prompts, events)?;
        if let Some(logits) = logits {
            self.sample(&plan, &drafts, &logits, masks, events)?;
        }
        self.in_step.clear();
        Ok(summary(&plan))
    }

    fn evict_step(&mut self) -> Vec<SessionId> {
        self.launched = None;
        let mut evicted = std::mem::take(&mut self.in_step);
        evicted.retain(|id| self.discard(*id).is_some());
        evicted
    }

    fn problem(&self) -> Option<Error> {
        self.model.network.problem()
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
    let amount = plan.chunks.iter().map(|chunk| chunk.num_tokens).sum::<usize>() as f64;
    StepPlan { phase: plan.phase(), sessions: plan.chunks.len(), amount }
}

#[cfg(test)]
mod tests;
