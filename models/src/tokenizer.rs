//! Tokenizers exactly as published.

use std::path::Path;

use crate::error::Result;

/// A prompt at the length that an encoder wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Padded {
    /// Exactly `max_length` ids.
    pub ids: Vec<u32>,
    /// How many of them, from the front, are not padding.
    pub num_tokens: usize,
}

/// Text to tokens and back.
#[derive(Debug, Clone)]
pub struct Tokenizer {}

impl Tokenizer {
    /// From a folder with `tokenizer.json`, or `vocab.json` + `merges.txt`, or `spiece.model`/`tokenizer.model`.
    pub fn from_dir(_dir: &Path) -> Result<Self> {
        todo!()
    }

    /// Token ids of `text`; special tokens (BOS, EOS) are added as the tokenizer's post-processor says when asked.
    pub fn encode(&self, _text: &str, _add_special_tokens: bool) -> Result<Vec<u32>> {
        todo!()
    }

    /// `text` with its special tokens, cut or padded to `max_length`; a cut keeps the closing special token (EOS) last.
    pub fn encode_padded(&self, _text: &str, _max_length: usize) -> Result<Padded> {
        todo!()
    }

    /// Text of `ids`, special tokens left out.
    pub fn decode(&self, _ids: &[u32]) -> Result<String> {
        todo!()
    }

    /// Id of a token given by its exact spelling.
    pub fn token_id(&self, _token: &str) -> Option<u32> {
        todo!()
    }

    /// Tokens in the vocabulary, added ones included.
    pub fn vocab_size(&self) -> usize {
        todo!()
    }
}
