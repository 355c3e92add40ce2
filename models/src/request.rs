//! What goes into a runner and what comes out of it: ids, validated requests, events. Plain data, no tensors.

use crate::diffusion::DiffusionRequest;
use crate::error::Error;
pub use crate::frame::{Frame, MASK_THRESHOLD, Mask};
use crate::grammar::Grammar;
pub use crate::phase::Phase;
use crate::session_checkpoint::SessionCheckpoint;
use std::sync::Arc;

/// Names one running generation inside one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// Whose sessions they are: clients share a runner's places and take turns. What makes a client is decided above; the
/// default is this process itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct ClientId(pub u64);

/// A request that has been validated against the model's card.
#[derive(Debug, Clone)]
// There are few at a time, and each is moved a few times in all.
#[allow(clippy::large_enum_variant)]
pub enum Request {
    /// Continue a sequence of tokens.
    Text(TextRequest),
    /// Make a picture or a clip.
    Diffusion(DiffusionRequest),
}

/// Continue `prompt` by at most `max_tokens` tokens. Made by [`crate::TextCard::resolve`].
#[derive(Debug, Clone)]
pub struct TextRequest {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Most tokens to generate; with none the session ends with the prompt.
    pub max_tokens: usize,
    /// How the next token is chosen.
    pub sampling: SamplingParams,
    /// Generation ends before the first of these that appears in the text.
    pub stop: Vec<String>,
    /// Generation ends with any of these tokens.
    pub stop_token_ids: Vec<u32>,
    /// Whether the string of `stop` or the token of `stop_token_ids` that ends the answer is part of it.
    pub include_stop: bool,
    /// Before so many tokens the answer has no end but `max_tokens` and its grammar's.
    pub min_tokens: usize,
    /// Go on past end-of-sequence tokens until `max_tokens`.
    pub ignore_eos: bool,
    /// Whether special tokens of the answer have no text.
    pub skip_special_tokens: bool,
    /// What the prompt's beginning is shared with: only with that of requests that have the same one. See
    /// [`PrefixCache`](crate::kv::PrefixCache).
    pub cache_salt: Option<String>,
    /// What the answer is held to; it ends where nothing but its end could follow.
    pub grammar: Option<Grammar>,
    /// Whether it is told how likely each token of the answer was, and for how many others in its place.
    pub logprobs: Option<usize>,
    /// The same of the prompt.
    pub prompt_logprobs: Option<usize>,
}

impl TextRequest {
    /// The most likely tokens, up to the model's own end.
    pub fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            prompt,
            max_tokens,
            sampling: SamplingParams::greedy(),
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop: false,
            min_tokens: 0,
            ignore_eos: false,
            skip_special_tokens: true,
            cache_salt: None,
            grammar: None,
            logprobs: None,
            prompt_logprobs: None,
        }
    }

    /// The same, whose answer is held to a grammar, or to none.
    pub fn held_to(self, grammar: Option<Grammar>) -> Self {
        Self { grammar, ..self }
    }
}

/// How the next token is chosen from the logits. Field names as in the OpenAI API and vLLM.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Drop tokens less likely than this times the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Subtracted once from each token that was generated.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence in the generated text.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt and answer; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens, each once, before anything else.
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed gives the same tokens, whatever else is running.
    pub seed: u64,
}

impl SamplingParams {
    /// The most likely token each time, nothing penalised.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// Why a session ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence token, a stop string, or the end of the request's grammar.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// The picture or clip is whole.
    Complete,
}

/// What a session used, and what it did not need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them whose keys and values were there already; `None` where nothing is kept for that.
    pub cached_tokens: Option<usize>,
    /// Tokens generated, the end-of-sequence token included.
    pub completion_tokens: usize,
    /// Tokens that were guessed before they were sampled, and how many of the guesses were right.
    pub draft_tokens: usize,
    /// See there.
    pub accepted_draft_tokens: usize,
    /// Of a picture or clip: predictions that the acceleration took from ones before them.
    pub skipped_passes: usize,
}

/// How likely one token was in its place: by the model's own logits, before biases, penalties, the temperature and what a grammar
/// forbids.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Which.
    pub token: u32,
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// The most likely tokens in its place with theirs, the most likely first; of equal ones the lowest id.
    pub top: Box<[(u32, f32)]>,
}

/// A token of an answer in its text.
#[derive(Debug, Clone, PartialEq)]
pub struct PlacedLogprobs {
    /// Characters of the answer before the one that the token begins or goes on with.
    pub offset: usize,
    /// How likely it was.
    pub logprobs: TokenLogprobs,
}

/// What a session tells the world, in order. After `Finished` or `Failed` nothing follows.
#[derive(Debug)]
pub enum Event {
    /// The first step of the session begins.
    Started,
    /// How likely the tokens of the prompt were, from the second one on. Said once, before any text, where it was asked for.
    Prompt(Vec<TokenLogprobs>),
    /// Tokens were sampled; `text` is what became certain with them (possibly nothing yet, or the tail held back for
    /// stop strings with no new token).
    Text {
        /// New token ids.
        tokens: Vec<u32>,
        /// New text, valid UTF-8.
        text: String,
        /// Where it was asked for: of the tokens whose text begins in this one, and with the last of the answer, if that does
        /// not end at a stop string, of those that have none.
        logprobs: Vec<PlacedLogprobs>,
    },
    /// A diffusion phase moved on: `done` of `total` steps of that phase.
    Progress {
        /// Which phase.
        phase: Phase,
        /// Steps done.
        done: usize,
        /// Steps in all.
        total: usize,
    },
    /// How far a picture or a clip has come: a rough, small version of it, or of the clip's middle. At most
    /// [`MAX_PREVIEWS`](crate::runner::diffusion::previews::MAX_PREVIEWS) of one session.
    Preview {
        /// From 0.
        index: usize,
        /// Smaller than the picture or the clip will be.
        frame: Frame,
    },
    /// Decoded frames, in order of time; a picture is one frame.
    Frames(Vec<Frame>),
    /// What the session needs to go on elsewhere. All frames that it says are out were told before; one that nobody has taken
    /// is replaced by the next. Said by whoever drives the runner, not by the runner.
    Checkpoint(Arc<SessionCheckpoint>),
    /// The session ended well and is gone from the runner.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Tokens used, or passes skipped.
        usage: Usage,
    },
    /// The session failed and is gone from the runner.
    Failed(Error),
}

impl Event {
    /// Whether nothing follows this event.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Event::Finished { .. } | Event::Failed(_))
    }
}

/// Events of one step, collected by the runner, published by whoever called `step`.
#[derive(Debug, Default)]
pub struct Events(Vec<(SessionId, Event)>);

impl Events {
    /// Adds one event.
    pub fn emit(&mut self, session: SessionId, event: Event) {
        self.0.push((session, event));
    }

    /// Takes all events, in order.
    pub fn drain(&mut self) -> impl Iterator<Item = (SessionId, Event)> + '_ {
        self.0.drain(..)
    }
}
