//! Tokenizers exactly as published.

use std::path::Path;

use crate::error::Result;

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
