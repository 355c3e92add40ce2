//! What the text runner knows of one session: its tokens, its sampler, its text and where it ends.
//!
//! Does not know: other sessions, steps, KV blocks.

use std::ops::Range;

use tale_kernels::Choice;

use crate::error::{Error, Result};
use crate::grammar::Matching;
use crate::request::{PlacedLogprobs, TextRequest, TokenLogprobs, Usage};
use crate::runner::text::logprobs::{AnswerLogprobs, PromptLogprobs};
use crate::sampler::Sampler;
use crate::text_stream::{StreamOptions, TextStream};
use crate::tokenizer::Tokenizer;

#[derive(Debug)]
pub(super) struct Session {
    /// The prompt and what was sampled.
    pub(super) tokens: Vec<u32>,
    pub(super) num_prompt_tokens: usize,
    /// Of the prompt, those that were in the cache when its first step began; `None` where nothing is shared.
    pub(super) num_cached_tokens: Option<usize>,
    /// Guesses that were computed, and those that were right.
    pub(super) num_drafts: usize,
    pub(super) num_accepted_drafts: usize,
    pub(super) max_tokens: usize,
    pub(super) min_tokens: usize,
    pub(super) ignore_eos: bool,
    pub(super) stop_token_ids: Vec<u32>,
    /// Whether the token of `stop_token_ids` that ends the answer has text.
    pub(super) include_stop: bool,
    pub(super) sampler: Sampler,
    pub(super) stream: TextStream,
    /// Where the answer is in its grammar; away while its mask is computed.
    pub(super) matching: Option<Matching>,
    pub(super) started: bool,
    /// What is told of tokens, where it was asked for.
    pub(super) answer_logprobs: Option<AnswerLogprobs>,
    /// Of the prompt, until it is told.
    pub(super) prompt_logprobs: Option<PromptLogprobs>,
}

/// A token that was sampled.
pub(super) struct Sampled {
    pub(super) choice: Choice,
    /// Those from which it came, where the session tells of its tokens.
    pub(super) logits: Option<Vec<f32>>,
}

/// What a new token does to a session.
pub(super) struct Accepted {
    pub(super) token: u32,
    /// What became certain with it.
    pub(super) text: String,
    /// Of the tokens whose text that begins.
    pub(super) logprobs: Vec<PlacedLogprobs>,
    pub(super) end: Option<End>,
}

/// How an answer ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// With an end-of-sequence token, or one of the request's own.
    Token,
    /// At a stop string; the text that the stream still holds is not part of the answer.
    StopString,
    /// Where its grammar ends.
    Grammar,
    /// With the last token that was asked for.
    Length,
}

impl Session {
    pub(super) fn new(request: TextRequest, tokenizer: &Tokenizer, eos_token_ids: &[u32]) -> Self {
        let eos = eos_token_ids.iter().filter(|_| !request.ignore_eos);
        let ends = eos.chain(&request.stop_token_ids).copied();
        let include_stop = request.include_stop;
        let text = StreamOptions { stop: request.stop, include_stop, spells_special: !request.skip_special_tokens };
        Self {
            sampler: Sampler::new(&request.sampling, &request.prompt).ends_no_sooner(request.min_tokens, ends),
            stream: TextStream::new(tokenizer.clone(), &request.prompt, text),
            min_tokens: request.min_tokens,
            stop_token_ids: request.stop_token_ids,
            include_stop,
            matching: request.grammar.map(|grammar| grammar.begin()),
            num_prompt_tokens: request.prompt.len(),
            num_cached_tokens: None,
            num_drafts: 0,
            num_accepted_drafts: 0,
            max_tokens: request.max_tokens,
            ignore_eos: request.ignore_eos,
            tokens: request.prompt,
            started: false,
            answer_logprobs: request.logprobs.map(AnswerLogprobs::new),
            prompt_logprobs: request.prompt_logprobs.map(PromptLogprobs::new),
        }
    }

    /// Tokens that may still come; while it runs at least one, unless it ends with its prompt.
    pub(super) fn num_tokens_left(&self) -> usize {
        self.max_tokens - (self.tokens.len() - self.num_prompt_tokens)
    }

    /// Whether nothing comes after the prompt.
    pub(super) fn ends_with_prompt(&self) -> bool {
        self.max_tokens == 0
    }

    /// Positions of a chunk whose logits are to be told of.
    pub(super) fn wanted_of_prompt(&self, chunk: Range<usize>) -> Option<Range<usize>> {
        let wanted = self.prompt_logprobs.as_ref()?.wanted(chunk, self.num_prompt_tokens);
        (!wanted.is_empty()).then_some(wanted)
    }

    /// Notes the logits of these positions of the prompt.
    pub(super) fn note_prompt(
        &mut self,
        positions: Range<usize>,
        logits: &[Vec<f32>],
        phase: &'static str,
    ) -> Result<()> {
        let Some(told) = &mut self.prompt_logprobs else { return Ok(()) };
        // Those at a position are of the token at the next one.
        let tokens = &self.tokens[positions.start + 1..positions.end + 1];
        if told.note(tokens, logits) { Ok(()) } else { Err(Error::NotFinite { phase }) }
    }

    /// How likely the tokens of the prompt were, once, when the last one is known.
    pub(super) fn take_prompt_logprobs(&mut self) -> Option<Vec<TokenLogprobs>> {
        let whole = self.prompt_logprobs.take_if(|told| told.is_whole(self.num_prompt_tokens))?;
        Some(whole.into_told())
    }

    /// `drafts` are what was guessed of the token and of those behind it.
    pub(super) fn accept(
        &mut self,
        sampled: Sampled,
        drafts: &[u32],
        phase: &'static str,
        eos_token_ids: &[u32],
    ) -> Result<Accepted> {
        let Sampled { choice: Choice { token, is_finite }, logits } = sampled;
        if !is_finite {
            return Err(Error::NotFinite { phase });
        }
        if let (Some(told), Some(logits)) = (&mut self.answer_logprobs, logits) {
            told.note(token, &logits, self.stream.num_held());
        }
        let is_silent = self.is_silent_end(token, eos_token_ids);
        let (text, end) = self.push(token, drafts, is_silent)?;
        let logprobs = self.answer_logprobs.as_mut().map_or(Vec::new(), |told| told.with_text(&text, is_silent));
        Ok(Accepted { token, text, logprobs, end })
    }

    /// Whether a token ends the answer and is no part of its text.
    fn is_silent_end(&self, token: u32, eos_token_ids: &[u32]) -> bool {
        let is_eos = !self.ignore_eos && eos_token_ids.contains(&token);
        is_eos || (!self.include_stop && self.stop_token_ids.contains(&token))
    }

    /// The text that becomes certain with a token, and how the answer ends with it, if it does; `is_silent` ones do.
    fn push(&mut self, token: u32, drafts: &[u32], is_silent: bool) -> Result<(String, Option<End>)> {
        self.tokens.push(token);
        if let Some(draft) = drafts.first() {
            self.num_drafts += 1;
            self.num_accepted_drafts += usize::from(*draft == token);
        }
        if is_silent {
            return Ok((String::new(), Some(End::Token)));
        }
        let is_complete = self.matching.as_mut().map_or(Ok(false), |matching| matching.accept(token))?;
        let num_tokens = self.usage().completion_tokens;
        let is_early = num_tokens <= self.min_tokens;
        let piece = if is_early { self.stream.push_early(token)? } else { self.stream.push(token)? };
        if self.stop_token_ids.contains(&token) && !piece.stopped {
            return Ok((piece.text, Some(End::Token)));
        }
        let is_last = num_tokens == self.max_tokens;
        let end = match (piece.stopped, is_complete, is_last) {
            (true, ..) => Some(End::StopString),
            (false, true, _) => Some(End::Grammar),
            (false, false, true) => Some(End::Length),
            (false, false, false) => None,
        };
        Ok((piece.text, end))
    }

    pub(super) fn usage(&self) -> Usage {
        let prompt_tokens = self.num_prompt_tokens;
        let completion_tokens = self.tokens.len() - prompt_tokens;
        Usage {
            prompt_tokens,
            cached_tokens: self.num_cached_tokens,
            completion_tokens,
            draft_tokens: self.num_drafts,
            accepted_draft_tokens: self.num_accepted_drafts,
            ..Usage::default()
        }
    }
}
