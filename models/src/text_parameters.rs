//! Parameters of text, each declared once.
//!
//! Owns: what requests may say of how text is continued, within which bounds. A model's own defaults may lie outside of
//! these. Names are those of OpenAI's API and of vLLM. Does not know: how a token is chosen
//! ([`sampler`](crate::sampler)).

use crate::error::{Error, Result};
use crate::parameter::{Declaration, Options, Parameter, TEXT, Task};

/// Most tokens to generate.
pub static MAX_TOKENS: Parameter<usize> = Parameter::at_least(
    "max_tokens",
    0,
    "Most tokens to generate, 0 only beside `echo`; what is left of the model's context when absent.",
)
.only_for(&[Task::Chat, Task::Completion])
.narrowed_by_models();

/// See [`SamplingParams::temperature`](crate::request::SamplingParams::temperature).
pub static TEMPERATURE: Parameter<f32> = Parameter::number_f32(
    "temperature",
    0.0,
    2.0,
    "How far less likely tokens are chosen; 0 is greedy. The model's own default, or 1, when absent.",
)
.only_for(TEXT);

/// See [`SamplingParams::top_p`](crate::request::SamplingParams::top_p).
pub static TOP_P: Parameter<f32> = Parameter::number_f32(
    "top_p",
    0.0,
    1.0,
    "Keep the smallest set of tokens whose probability reaches this; 0 is the most likely token. The model's own \
     default, or 1, when absent.",
)
.only_for(TEXT);

/// See [`SamplingParams::top_k`](crate::request::SamplingParams::top_k).
pub static TOP_K: Parameter<usize> = Parameter::at_least(
    "top_k",
    0,
    "Keep so many of the most likely tokens; 0 keeps all. The model's own default, or 0, when absent.",
)
.only_for(TEXT);

/// See [`SamplingParams::min_p`](crate::request::SamplingParams::min_p).
pub static MIN_P: Parameter<f32> = Parameter::number_f32(
    "min_p",
    0.0,
    1.0,
    "Drop tokens less likely than this times the most likely one. The model's own default, or 0, when absent.",
)
.only_for(TEXT);

/// See [`SamplingParams::presence_penalty`](crate::request::SamplingParams::presence_penalty).
pub static PRESENCE_PENALTY: Parameter<f32> = Parameter::number_f32(
    "presence_penalty",
    -2.0,
    2.0,
    "Subtracted once from the logit of each token that was generated; 0 when absent.",
)
.only_for(TEXT);

/// See [`SamplingParams::frequency_penalty`](crate::request::SamplingParams::frequency_penalty).
pub static FREQUENCY_PENALTY: Parameter<f32> = Parameter::number_f32(
    "frequency_penalty",
    -2.0,
    2.0,
    "Subtracted from the logit of a token for every time that it was generated; 0 when absent.",
)
.only_for(TEXT);

/// See [`SamplingParams::repetition_penalty`](crate::request::SamplingParams::repetition_penalty).
pub static REPETITION_PENALTY: Parameter<f32> = Parameter::number_above(
    "repetition_penalty",
    0.0,
    2.0,
    "Weakens tokens of prompt and answer when above 1. The model's own default, or 1, when absent.",
)
.only_for(TEXT);

/// See [`SamplingParams::seed`](crate::request::SamplingParams::seed).
pub static SEED: Parameter<u64> = Parameter::seed(
    "seed",
    "The same seed gives the same tokens, whatever else is running; drawn at random when absent.",
)
.only_for(TEXT);

/// Most stop strings of one request.
const MAX_STOP_STRINGS: usize = 16;
/// Longest stop string.
const MAX_STOP_BYTES: usize = 1024;
/// Most bytes of all stop strings of one request: what is looked for in every new piece of text.
const MAX_STOP_TOTAL_BYTES: usize = 4096;

/// See [`TextRequest::stop`](crate::request::TextRequest::stop).
pub static STOP: Parameter<Vec<String>> = Parameter::strings(
    "stop",
    MAX_STOP_STRINGS,
    MAX_STOP_BYTES,
    MAX_STOP_TOTAL_BYTES,
    "The text ends before the first of these that appears in it.",
)
.only_for(TEXT);

/// See [`TextRequest::ignore_eos`](crate::request::TextRequest::ignore_eos).
pub static IGNORE_EOS: Parameter<bool> =
    Parameter::boolean("ignore_eos", "Go on past end-of-sequence tokens, up to `max_tokens`.").only_for(TEXT);

/// Longest salt.
const MAX_SALT_BYTES: usize = 256;

/// See [`TextRequest::cache_salt`](crate::request::TextRequest::cache_salt).
pub static CACHE_SALT: Parameter<String> = Parameter::text(
    "cache_salt",
    MAX_SALT_BYTES,
    "A secret: what is kept of prompts that begin alike serves requests with the same one only; without one, those without \
     one.",
)
.only_for(TEXT);

/// Most tokens of `stop_token_ids`.
const MAX_STOP_TOKENS: usize = 64;
/// Most tokens of `logit_bias`; OpenAI's own limit.
const MAX_BIASES: usize = 1024;

/// See [`TextRequest::stop_token_ids`](crate::request::TextRequest::stop_token_ids).
pub static STOP_TOKEN_IDS: Parameter<Vec<u32>> = Parameter::tokens(
    "stop_token_ids",
    MAX_STOP_TOKENS,
    "The text ends before the first of these tokens, as it does before the model's own end-of-sequence tokens.",
)
.only_for(TEXT);

/// See [`TextRequest::include_stop`](crate::request::TextRequest::include_stop).
pub static INCLUDE_STOP_STR_IN_OUTPUT: Parameter<bool> = Parameter::boolean(
    "include_stop_str_in_output",
    "Whether the text that ends the answer is part of it: the string of `stop`, or the token of `stop_token_ids`. False \
     when absent.",
)
.only_for(TEXT);

/// See [`TextRequest::min_tokens`](crate::request::TextRequest::min_tokens).
pub static MIN_TOKENS: Parameter<usize> = Parameter::at_least(
    "min_tokens",
    0,
    "Before so many tokens are generated there is no end-of-sequence token, none of `stop_token_ids`, and no end at a \
     string of `stop`; 0 when absent.",
)
.only_for(TEXT);

/// See [`TextRequest::skip_special_tokens`](crate::request::TextRequest::skip_special_tokens).
pub static SKIP_SPECIAL_TOKENS: Parameter<bool> = Parameter::boolean(
    "skip_special_tokens",
    "Whether special tokens of the answer have no text; false spells them out. True when absent.",
)
.only_for(TEXT);

/// See [`SamplingParams::logit_bias`](crate::request::SamplingParams::logit_bias).
pub static LOGIT_BIAS: Parameter<Vec<(u32, f64)>> = Parameter::biases(
    "logit_bias",
    MAX_BIASES,
    -100.0,
    100.0,
    "Added to the logits of these tokens before anything else.",
)
.only_for(TEXT);

/// Most tokens in the place of each token of which it is told how likely they were.
const MAX_TOP_LOGPROBS: usize = 20;
/// Most logarithms in one answer, of tokens and of those in their places: what they take of memory is bounded.
pub const MAX_LOGPROBS: usize = 4 << 20;

/// See [`TextRequest::logprobs`](crate::request::TextRequest::logprobs). OpenAI's field of completions.
pub static LOGPROBS: Parameter<usize> = Parameter::integer(
    "logprobs",
    0,
    MAX_TOP_LOGPROBS,
    "Tell of each token how likely it was, and of so many of the most likely tokens in its place.",
)
.only_for(&[Task::Completion]);

/// OpenAI's field of chats; [`settle_logprobs`] makes [`LOGPROBS`] of it.
pub static CHAT_LOGPROBS: Parameter<bool> =
    Parameter::boolean("logprobs", "Tell of each token of the content how likely it was. False when absent.")
        .only_for(&[Task::Chat]);

/// The same.
pub static TOP_LOGPROBS: Parameter<usize> = Parameter::integer(
    "top_logprobs",
    0,
    MAX_TOP_LOGPROBS,
    "With `logprobs`: tell that of so many of the most likely tokens in its place, too. 0 when absent.",
)
.only_for(&[Task::Chat]);

/// Whether the answer begins with the prompt; then [`LOGPROBS`] is about the prompt, too
/// ([`TextRequest::prompt_logprobs`](crate::request::TextRequest::prompt_logprobs)).
pub static ECHO: Parameter<bool> = Parameter::boolean(
    "echo",
    "Begin the answer with the prompt; `logprobs` is about its tokens, too, but for the first. False when absent.",
)
.only_for(&[Task::Completion]);

/// What the fields of a chat say of logprobs, as those of a completion say it.
///
/// # Errors
///
/// Those in the place of a token, and not of the token itself.
pub fn settle_logprobs(options: &mut Options) -> Result<()> {
    let is_told = options.get(&CHAT_LOGPROBS).unwrap_or(false);
    let top = options.get(&TOP_LOGPROBS).unwrap_or(0);
    if top > 0 && !is_told {
        return Err(Error::invalid(TOP_LOGPROBS.declaration.name, "needs logprobs to be true"));
    }
    options.remove(&CHAT_LOGPROBS.declaration);
    options.set(&LOGPROBS, is_told.then_some(top));
    Ok(())
}

/// Every parameter of text, in the order of the documentation.
pub static TEXT_PARAMETERS: &[&Declaration] = &[
    &MAX_TOKENS.declaration,
    &TEMPERATURE.declaration,
    &TOP_P.declaration,
    &TOP_K.declaration,
    &MIN_P.declaration,
    &PRESENCE_PENALTY.declaration,
    &FREQUENCY_PENALTY.declaration,
    &REPETITION_PENALTY.declaration,
    &SEED.declaration,
    &STOP.declaration,
    &STOP_TOKEN_IDS.declaration,
    &INCLUDE_STOP_STR_IN_OUTPUT.declaration,
    &MIN_TOKENS.declaration,
    &IGNORE_EOS.declaration,
    &SKIP_SPECIAL_TOKENS.declaration,
    &LOGIT_BIAS.declaration,
    &CACHE_SALT.declaration,
];
