//! The text that says what to show.
//!
//! Owns: `prompt` and `max_sequence_length`, and at how many tokens prompts are encoded. Does not know: the encoders.

use crate::encoders::clip_chunks::ChunkRule;
use crate::error::Result;
use crate::parameter::{Declaration, Options, Parameter, check_range};
use crate::prompt::plain_text;

/// Longest prompt or negative prompt: far more than any text encoder reads.
pub const MAX_PROMPT_BYTES: usize = 64 << 10;
/// Longest sequence of any text encoder.
const MAX_TOKENS: usize = 4096;

/// See [`Prompt::text`].
pub static PROMPT: Parameter<String> =
    Parameter::text("prompt", MAX_PROMPT_BYTES, "What to show; may be empty, as in diffusers.").required();

/// See [`Guidance::negative_prompt`](super::guidance::Guidance::negative_prompt).
pub static NEGATIVE_PROMPT: Parameter<String> = Parameter::text(
    "negative_prompt",
    MAX_PROMPT_BYTES,
    "What to steer away from; needs a guidance scale above 1. Absent is not the same as empty for SDXL.",
);

/// See [`Prompt::max_sequence_length`].
pub static MAX_SEQUENCE_LENGTH: Parameter<usize> = Parameter::integer(
    "max_sequence_length",
    1,
    MAX_TOKENS,
    "Tokens that prompts are padded or cut to; the model's own default when absent.",
)
.narrowed_by_models();

/// The parameters of this capability.
pub(super) static PARAMETERS: &[&Declaration] = &[&PROMPT.declaration, &MAX_SEQUENCE_LENGTH.declaration];

/// What to show, and how much of it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// As the client wrote it.
    pub text: String,
    /// Tokens that prompts are padded or cut to; with CLIP encoders alone a multiple of their positions where it is more.
    pub max_sequence_length: usize,
}

impl Prompt {
    pub(super) fn echo(&self, options: &mut Options) {
        options.set(&PROMPT, self.text.clone());
        options.set(&MAX_SEQUENCE_LENGTH, self.max_sequence_length);
    }
}

/// What a model's text encoders make of prompts.
#[derive(Debug, Clone)]
pub enum Prompts {
    /// Text, padded or cut to `max_sequence_length`; weights are refused.
    Plain {
        /// Where the client gives no `max_sequence_length`.
        default_length: usize,
        /// Largest `max_sequence_length`.
        max_length: usize,
    },
    /// Text, padded or cut to this length, the only one that the model has positions for; weights are refused.
    Fixed {
        /// Tokens.
        length: usize,
    },
    /// Text with weights, in as many chunks as it fills where the client gives no `max_sequence_length`.
    Chunked(ChunkRule),
}

impl Prompts {
    /// `max_sequence_length` of a short prompt where the client gives none.
    pub fn default_length(&self) -> usize {
        match self {
            Self::Plain { default_length, .. } => *default_length,
            Self::Fixed { length } => *length,
            Self::Chunked(rule) => rule.positions,
        }
    }

    /// Largest `max_sequence_length`.
    pub fn max_length(&self) -> usize {
        match self {
            Self::Plain { max_length, .. } => *max_length,
            Self::Fixed { length } => *length,
            Self::Chunked(rule) => rule.max_length(),
        }
    }

    /// Reads the prompts, and decides at how many tokens they are encoded.
    pub(super) fn resolve(&self, options: &Options) -> Result<Prompt> {
        let text = options.get(&PROMPT).unwrap_or_default();
        let negative = options.get(&NEGATIVE_PROMPT);
        let asked = options.get(&MAX_SEQUENCE_LENGTH);
        let negative = negative.as_deref().map(|text| ("negative_prompt", text));
        let prompts = std::iter::once(("prompt", text.as_str())).chain(negative);
        let max_sequence_length = match self {
            Self::Chunked(rule) => rule.length(asked, prompts)?,
            Self::Plain { .. } | Self::Fixed { .. } => {
                for (field, text) in prompts {
                    plain_text(field, text)?;
                }
                asked.unwrap_or(self.default_length())
            }
        };
        let min_length = if let Self::Fixed { length } = self { *length } else { 1 };
        check_range("max_sequence_length", max_sequence_length, min_length, self.max_length())?;
        Ok(Prompt { text, max_sequence_length })
    }
}
