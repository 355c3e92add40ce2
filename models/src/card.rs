//! What a loaded model tells the server about itself: limits, defaults, tokenizer. Shared, immutable, no tensors.
//!
//! A card turns what a client asked for (all fields optional) into a validated request; everything that a client can
//! get wrong is found here, before the device thread hears of it.

use crate::chat_template::{ChatMessage, ChatTemplate};
use crate::diffusion::DiffusionCard;
use crate::error::{Error, Result};
use crate::parameter::check_range;
use crate::request::{SamplingParams, TextRequest};
use crate::tokenizer::Tokenizer;

mod sampling_defaults;

pub use sampling_defaults::SamplingDefaults;

/// Card of a loaded model.
#[derive(Debug)]
// One per model, shared behind a pointer: its size does not matter.
#[allow(clippy::large_enum_variant)]
pub enum ModelCard {
    /// A language model.
    Text(TextCard),
    /// A picture or clip model.
    Diffusion(DiffusionCard),
}

impl ModelCard {
    /// The card of a model on a device that has so many bytes for work beside all weights.
    pub fn with_room(self, room_bytes: usize) -> Self {
        match self {
            Self::Text(card) => Self::Text(card),
            Self::Diffusion(card) => Self::Diffusion(card.with_room(room_bytes)),
        }
    }

    /// Whether a request that says no more than it must is valid: whether the model's own defaults are.
    pub fn check_defaults(&self) -> Result<()> {
        match self {
            Self::Text(card) => card.resolve(vec![0], TextOptions::default(), 0).map(|_| ()),
            Self::Diffusion(card) if card.edits.is_some_and(|edits| edits.is_needed) => Ok(()),
            Self::Diffusion(card) => card.resolve(&card.plainest(), 0).map(|_| ()),
        }
    }
}

/// Card of a language model.
#[derive(Debug)]
pub struct TextCard {
    /// Family name, as in the table of families.
    pub family: &'static str,
    /// Most tokens of prompt and answer together.
    pub max_context: usize,
    /// Bytes that one token takes in the KV cache.
    pub kv_bytes_per_token: usize,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Messages to text; base models have none.
    pub chat_template: Option<ChatTemplate>,
    /// Sampling defaults of `generation_config.json`.
    pub defaults: SamplingDefaults,
}

/// What a client may say about a text generation; absent fields take the model's defaults.
#[derive(Debug, Clone, Default)]
pub struct TextOptions {
    /// Most tokens to generate; the rest of the context when absent.
    pub max_tokens: Option<usize>,
    /// 0 to 2.
    pub temperature: Option<f32>,
    /// 0 to 1; 0 is the most likely token.
    pub top_p: Option<f32>,
    /// 0 is off.
    pub top_k: Option<usize>,
    /// 0 to 1.
    pub min_p: Option<f32>,
    /// -2 to 2.
    pub presence_penalty: Option<f32>,
    /// -2 to 2.
    pub frequency_penalty: Option<f32>,
    /// Above 0, at most 2.
    pub repetition_penalty: Option<f32>,
    /// Any; drawn by the caller when absent.
    pub seed: Option<u64>,
    /// At most [`MAX_STOP_STRINGS`], none empty.
    pub stop: Vec<String>,
    /// Go on past end-of-sequence tokens.
    pub ignore_eos: bool,
}

/// Most stop strings of one request.
pub const MAX_STOP_STRINGS: usize = 16;

impl TextCard {
    /// Tokens of a conversation, ready for the model's answer.
    pub fn encode_chat(&self, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        if messages.is_empty() {
            return Err(Error::invalid("messages", "is empty; at least one message is needed"));
        }
        let template = self
            .chat_template
            .as_ref()
            .ok_or_else(|| Error::invalid("messages", "this model has no chat template; use /v1/completions"))?;
        // The template writes the special tokens itself.
        self.tokenizer.encode(&template.render(messages)?, false)
    }

    /// Tokens of a plain prompt, with the special tokens that the tokenizer adds.
    pub fn encode_prompt(&self, prompt: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(prompt, true)
    }

    /// Validates everything and fills in defaults. `fallback_seed` is used when the client gave none.
    pub fn resolve(&self, prompt: Vec<u32>, options: TextOptions, fallback_seed: u64) -> Result<TextRequest> {
        if prompt.is_empty() {
            return Err(Error::invalid("prompt", "has no tokens"));
        }
        if let Some(token) = prompt.iter().find(|token| **token as usize >= self.vocab_size) {
            let problem = format!("holds token {token}; this model's vocabulary ends at {}", self.vocab_size - 1);
            return Err(Error::invalid("prompt", problem));
        }
        if prompt.len() >= self.max_context {
            return Err(Error::ContextLength { prompt_tokens: prompt.len(), limit: self.max_context - 1 });
        }
        if options.stop.len() > MAX_STOP_STRINGS || options.stop.iter().any(String::is_empty) {
            return Err(Error::invalid("stop", format!("takes at most {MAX_STOP_STRINGS} strings, none empty")));
        }
        let room = self.max_context - prompt.len();
        let max_tokens = options.max_tokens.unwrap_or(room);
        if max_tokens == 0 || max_tokens > room {
            let problem = format!("is {max_tokens}; allowed: 1 to {room} with this prompt of {} tokens", prompt.len());
            return Err(Error::invalid("max_tokens", problem));
        }
        Ok(TextRequest {
            prompt,
            max_tokens,
            sampling: self.sampling(&options, fallback_seed)?,
            stop: options.stop,
            ignore_eos: options.ignore_eos,
        })
    }

    fn sampling(&self, options: &TextOptions, fallback_seed: u64) -> Result<SamplingParams> {
        options.check()?;
        let defaults = &self.defaults;
        // `do_sample: false` makes greedy the default, as in transformers; a client's own temperature still samples.
        let greedy_by_default = defaults.do_sample == Some(false);
        let default_temperature = if greedy_by_default { 0.0 } else { defaults.temperature.unwrap_or(1.0) };
        Ok(SamplingParams {
            temperature: options.temperature.unwrap_or(default_temperature),
            top_p: options.top_p.or(defaults.top_p).unwrap_or(1.0),
            top_k: options.top_k.or(defaults.top_k).unwrap_or(0),
            min_p: options.min_p.or(defaults.min_p).unwrap_or(0.0),
            presence_penalty: options.presence_penalty.unwrap_or(0.0),
            frequency_penalty: options.frequency_penalty.unwrap_or(0.0),
            repetition_penalty: options.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
            seed: options.seed.unwrap_or(fallback_seed),
        })
    }
}

impl TextOptions {
    /// Refuses numbers outside of the ranges of requests. A model's own defaults may lie outside of these.
    fn check(&self) -> Result<()> {
        let ranges = [
            ("temperature", self.temperature, 0.0, 2.0),
            // 0 is the most likely token alone, as 0 of OpenAI's range.
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
        ];
        for (field, value, least, most) in ranges {
            if let Some(value) = value {
                check_range(field, value, least, most)?;
            }
        }
        match self.repetition_penalty {
            Some(penalty) => check_above("repetition_penalty", penalty, 0.0, 2.0),
            None => Ok(()),
        }
    }
}

/// As [`check_range`], without `min` itself.
fn check_above(field: &str, value: f32, min: f32, max: f32) -> Result<()> {
    if value > min && value <= max {
        return Ok(());
    }
    Err(Error::invalid(field, format!("is {value}; allowed: above {min}, at most {max}")))
}
