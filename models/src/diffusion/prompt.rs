//! The text that says what to show.

/// What to show, and how much of it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// As the client wrote it.
    pub text: String,
    /// Tokens that prompts are padded or cut to; with CLIP encoders alone a multiple of their positions where it is more.
    pub max_sequence_length: usize,
}
