//! From tokens to text as it becomes certain: incremental detokenisation and stop strings.

use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// Turns the tokens of one answer into text pieces.
#[derive(Debug)]
pub struct TextStream {}

/// Text that became certain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Piece {
    /// New text, valid UTF-8; may be empty while a character or a possible stop string is incomplete.
    pub text: String,
    /// A stop string was reached; the text ends before it and nothing more may be pushed.
    pub stopped: bool,
}

impl TextStream {
    /// `prompt` gives context to tokenizers whose first token depends on what is before it.
    pub fn new(_tokenizer: Tokenizer, _prompt: &[u32], _stop: Vec<String>) -> Self {
        todo!()
    }

    /// Adds one token.
    pub fn push(&mut self, _token: u32) -> Result<Piece> {
        todo!()
    }

    /// The text that was held back (incomplete characters as U+FFFD), when the answer ends without a stop string.
    pub fn finish(self) -> Result<String> {
        todo!()
    }
}
