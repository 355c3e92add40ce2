//! What a loaded model tells the server about itself: limits, defaults, tokenizer. Shared, immutable, no tensors.
//!
//! A card turns what a client asked for (all fields optional) into a validated request; everything that a client can
//! get wrong is found here, before the device thread hears of it.

use crate::cancel::CancelToken;
use crate::chat_template::{ChatTemplates, Conversation};
use crate::diffusion::DiffusionCard;
use crate::error::{Error, Result};
use crate::grammar::{Asked, Grammar, Grammars};
use crate::kv::KvShape;
use crate::parameter::{Options, Parameter, ParameterType};
use crate::request::{SamplingParams, TextRequest};
use crate::text_parameters::{
    CACHE_SALT, ECHO, FREQUENCY_PENALTY, IGNORE_EOS, INCLUDE_STOP_STR_IN_OUTPUT, LOGIT_BIAS, LOGPROBS, MAX_TOKENS,
    MIN_P, MIN_TOKENS, PRESENCE_PENALTY, REPETITION_PENALTY, SEED, SKIP_SPECIAL_TOKENS, STOP, STOP_TOKEN_IDS,
    TEMPERATURE, TEXT_PARAMETERS, TOP_K, TOP_P,
};
use crate::tokenizer::Tokenizer;
use crate::tools::ToolFormat;

/// Bytes of a conversation that becomes tokens at once, at most, before and after its template, and its messages.
const MAX_SHORT_BYTES: usize = 2 << 10;
const MAX_SHORT_MESSAGES: usize = 32;
/// How many contexts a text may fill of which only the end is taken.
const MAX_CONTEXTS: usize = 4;

mod sampling_defaults;

pub use sampling_defaults::SamplingDefaults;

/// How a text becomes the tokens of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoding {
    /// Whether the tokenizer puts its special tokens around it.
    pub add_special_tokens: bool,
    /// So many tokens are taken, from its end; all where it is `None`.
    pub truncate: Option<usize>,
}

impl Encoding {
    /// Of a plain prompt.
    pub const PROMPT: Self = Self { add_special_tokens: true, truncate: None };
    /// Of a conversation, whose template writes the special tokens itself.
    pub const CHAT: Self = Self { add_special_tokens: false, truncate: None };

    /// What is taken of these tokens.
    pub fn cut(self, mut tokens: Vec<u32>) -> Vec<u32> {
        if let Some(most) = self.truncate {
            tokens.drain(..tokens.len().saturating_sub(most));
        }
        tokens
    }
}

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
            Self::Text(card) => card.resolve(vec![0], &Options::default(), 0).map(|_| ()),
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
    /// What that is made of.
    pub kv_shape: KvShape,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Messages to text; base models have none.
    pub chat_template: Option<ChatTemplates>,
    /// Sampling defaults of `generation_config.json`.
    pub defaults: SamplingDefaults,
    /// What answers may be held to.
    pub grammars: Grammars,
    /// How calls of tools are written, where a configuration says it and the template does not have to.
    pub tool_format: Option<ToolFormat>,
}

impl TextCard {
    /// Tokens of a conversation, ready for the model's answer. Takes long for long ones, so that it stops when nobody
    /// waits any longer; memory as [`Tokenizer::encode_within`], and the template's.
    pub fn encode_chat(
        &self,
        conversation: &Conversation,
        encoding: Encoding,
        cancelled: &CancelToken,
    ) -> Result<Vec<u32>> {
        let text = self.template_for(conversation, encoding)?.render(conversation)?;
        self.encode(&text, encoding, cancelled)
    }

    /// How this model calls tools; `field` is the one that asks for them.
    pub fn tool_format(&self, field: &str) -> Result<ToolFormat> {
        let template = self.chat_template.as_ref().and_then(ChatTemplates::tools);
        let Some(support) = template else {
            return Err(Error::invalid(field, "this model's chat template has no tools"));
        };
        let unknown = "how this model writes calls is not known; tool_call_parser of the configuration says it";
        self.tool_format.or(support.format).ok_or_else(|| Error::invalid(field, unknown))
    }

    /// As [`TextCard::encode_chat`], here and at once; `None` where that would take long: of conversations that are not short,
    /// as they are or once they are rendered, and of templates that do much ([`ChatTemplates::render_little`]).
    pub fn encode_short_chat(&self, conversation: &Conversation, encoding: Encoding) -> Option<Result<Vec<u32>>> {
        if conversation.num_bytes() > MAX_SHORT_BYTES || conversation.messages.len() > MAX_SHORT_MESSAGES {
            return None;
        }
        let rendered = match self.template_for(conversation, encoding) {
            Ok(template) => template.render_little(conversation)?,
            Err(error) => Err(error),
        };
        match rendered {
            Ok(text) if text.len() > MAX_SHORT_BYTES => None,
            Ok(text) => Some(self.encode(&text, encoding, &CancelToken::default())),
            Err(error) => Some(Err(error)),
        }
    }

    /// The template, for a conversation that it may be rendered with.
    fn template_for(&self, conversation: &Conversation, encoding: Encoding) -> Result<&ChatTemplates> {
        if conversation.messages.is_empty() {
            return Err(Error::invalid("messages", "is empty; at least one message is needed"));
        }
        let template = self
            .chat_template
            .as_ref()
            .ok_or_else(|| Error::invalid("messages", "this model has no chat template; use /v1/completions"))?;
        self.check_conversation(conversation, encoding)?;
        Ok(template)
    }

    /// Tokens of a plain prompt. Stops as [`TextCard::encode_chat`] does.
    pub fn encode(&self, text: &str, encoding: Encoding, cancelled: &CancelToken) -> Result<Vec<u32>> {
        let limit = self.most_tokens(encoding);
        let tokens = self.tokenizer.encode_within(text, encoding.add_special_tokens, limit, cancelled)?;
        Ok(encoding.cut(tokens))
    }

    /// Most tokens of a prompt: one is left for the answer.
    fn most_prompt_tokens(&self) -> usize {
        self.max_context.saturating_sub(1)
    }

    /// Most tokens that are made of a text.
    fn most_tokens(&self, encoding: Encoding) -> usize {
        let times = if encoding.truncate.is_some() { MAX_CONTEXTS } else { 1 };
        self.most_prompt_tokens().saturating_mul(times)
    }

    /// Refuses conversations that are too long for the context by their bytes, each message counting as a token at least,
    /// before any of them is rendered. A template may drop parts of a conversation, but no model was made for ones that
    /// could not be longer by far.
    fn check_conversation(&self, conversation: &Conversation, encoding: Encoding) -> Result<()> {
        let Conversation { messages, tools, .. } = conversation;
        let limit = self.most_tokens(encoding);
        let mut least = messages.len();
        // Not begun where the messages alone are too many.
        for message in messages.iter().take_while(|_| messages.len() <= limit) {
            least += self.tokenizer.least_tokens(&message.role) + self.tokenizer.least_tokens(&message.content);
        }
        for tool in tools {
            least += self.tokenizer.least_tokens(&tool.to_json().to_string());
        }
        if least > limit {
            return Err(Error::ContextLength { prompt_tokens: least, is_exact: false, limit });
        }
        Ok(())
    }

    /// What an answer is held to, ready for [`TextCard::resolve`]; see [`Grammars::compile`] for what that takes.
    pub fn grammar(&self, asked: Asked, options: &Options) -> Result<Grammar> {
        let contradicts =
            |field| Err(Error::invalid(field, format!("contradicts {}, with which an answer ends", asked.field)));
        if options.get(&IGNORE_EOS) == Some(true) {
            return contradicts("ignore_eos");
        }
        if options.get(&MIN_TOKENS).is_some_and(|tokens| tokens > 0) {
            return contradicts("min_tokens");
        }
        self.grammars.compile(asked)
    }

    /// Validates everything and fills in defaults. `fallback_seed` is used when the client gave none.
    pub fn resolve(&self, prompt: Vec<u32>, options: &Options, fallback_seed: u64) -> Result<TextRequest> {
        if prompt.is_empty() {
            return Err(Error::invalid("prompt", "has no tokens"));
        }
        if let Some(token) = prompt.iter().find(|token| **token as usize >= self.vocab_size) {
            let problem = format!("holds token {token}; this model's vocabulary ends at {}", self.vocab_size - 1);
            return Err(Error::invalid("prompt", problem));
        }
        if prompt.len() >= self.max_context {
            let limit = self.most_prompt_tokens();
            return Err(Error::ContextLength { prompt_tokens: prompt.len(), is_exact: true, limit });
        }
        options.check(TEXT_PARAMETERS.iter().copied())?;
        let room = self.max_context - prompt.len();
        let max_tokens = options.get(&MAX_TOKENS).unwrap_or(room);
        let echoes = options.get(&ECHO).unwrap_or(false);
        // The prompt is an answer, too.
        let least = usize::from(!echoes);
        if !(least..=room).contains(&max_tokens) {
            let allowed = format!("{least} to {room} with this prompt of {} tokens", prompt.len());
            return Err(Error::invalid("max_tokens", format!("is {max_tokens}; allowed: {allowed}")));
        }
        let logprobs = options.get(&LOGPROBS);
        let min_tokens = options.get(&MIN_TOKENS).unwrap_or(0);
        if min_tokens > max_tokens {
            return Err(Error::invalid("min_tokens", format!("is {min_tokens}, more than max_tokens, {max_tokens}")));
        }
        Ok(TextRequest {
            prompt,
            max_tokens,
            sampling: self.sampling(options, fallback_seed)?,
            stop: options.get(&STOP).unwrap_or_default(),
            stop_token_ids: self.in_vocabulary(&STOP_TOKEN_IDS, options, |id| *id)?,
            include_stop: options.get(&INCLUDE_STOP_STR_IN_OUTPUT).unwrap_or(false),
            min_tokens,
            ignore_eos: options.get(&IGNORE_EOS).unwrap_or(false),
            skip_special_tokens: options.get(&SKIP_SPECIAL_TOKENS).unwrap_or(true),
            cache_salt: options.get(&CACHE_SALT),
            grammar: None,
            logprobs,
            prompt_logprobs: logprobs.filter(|_| echoes),
        })
    }

    /// The values of a parameter whose tokens are in the vocabulary.
    fn in_vocabulary<T>(
        &self,
        parameter: &Parameter<Vec<T>>,
        options: &Options,
        token: impl Fn(&T) -> u32,
    ) -> Result<Vec<T>>
    where
        Vec<T>: ParameterType,
    {
        let values = options.get(parameter).unwrap_or_default();
        match values.iter().map(token).find(|token| *token as usize >= self.vocab_size) {
            Some(token) => {
                let problem = format!("names token {token}; this model's vocabulary ends at {}", self.vocab_size - 1);
                Err(Error::invalid(parameter.declaration.name, problem))
            }
            None => Ok(values),
        }
    }

    /// How tokens are chosen: what a request says, with this model's defaults.
    pub fn sampling(&self, options: &Options, fallback_seed: u64) -> Result<SamplingParams> {
        let defaults = &self.defaults;
        // `do_sample: false` makes greedy the default, as in transformers; a client's own temperature still samples.
        let greedy_by_default = defaults.do_sample == Some(false);
        let default_temperature = if greedy_by_default { 0.0 } else { defaults.temperature.unwrap_or(1.0) };
        let logit_bias = self.in_vocabulary(&LOGIT_BIAS, options, |(id, bias)| if *bias == 0.0 { 0 } else { *id })?;
        let logit_bias = logit_bias.into_iter().filter(|(_, bias)| *bias != 0.0);
        Ok(SamplingParams {
            temperature: options.get(&TEMPERATURE).unwrap_or(default_temperature),
            top_p: options.get(&TOP_P).or(defaults.top_p).unwrap_or(1.0),
            top_k: options.get(&TOP_K).or(defaults.top_k).unwrap_or(0),
            min_p: options.get(&MIN_P).or(defaults.min_p).unwrap_or(0.0),
            presence_penalty: options.get(&PRESENCE_PENALTY).unwrap_or(0.0),
            frequency_penalty: options.get(&FREQUENCY_PENALTY).unwrap_or(0.0),
            repetition_penalty: options.get(&REPETITION_PENALTY).or(defaults.repetition_penalty).unwrap_or(1.0),
            logit_bias: logit_bias.map(|(id, bias)| (id, bias as f32)).collect(),
            seed: options.get(&SEED).unwrap_or(fallback_seed),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat_template::ChatMessage;
    use crate::testing::{MAX_CONTEXT, Script, text_model};

    fn check(messages: Vec<ChatMessage>, least: usize) {
        let ModelCard::Text(card) = text_model(Script::default()).expect("sound").card else { panic!("makes text") };
        match card.encode_chat(&messages.into(), Encoding::CHAT, &CancelToken::default()) {
            Err(Error::ContextLength { prompt_tokens, is_exact: false, limit }) => {
                assert_eq!((prompt_tokens, limit), (least, MAX_CONTEXT - 1));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn conversations_that_cannot_fit_are_refused_before_they_are_rendered() {
        let message = |content: String| ChatMessage::new("user", content);
        check(vec![message(String::new()); 250_000], 250_000);
        // A token of this vocabulary stands for 8 bytes at most.
        let longest = "<|turn|>".len();
        check(vec![message("x".repeat(longest * MAX_CONTEXT)), message(String::new())], MAX_CONTEXT + 2);
    }
}
