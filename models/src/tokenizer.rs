//! Tokenizers exactly as published.
//!
//! Owns: finding a tokenizer in a folder, text to ids and back, the length that an encoder wants. The submodules build
//! what folders without `tokenizer.json` only imply. Deliberately does not know: chat templates, models, streaming.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use tokenizers::{AddedToken, DecoderWrapper, Encoding, ModelWrapper, PostProcessor, TruncationDirection};

use crate::config::read_bytes;
use crate::error::{Error, Result};

pub mod bytes;
pub(crate) mod config;
mod sentencepiece;
mod vocab_merges;

use config::TokenizerConfig;

/// A prompt at the length that an encoder wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Padded {
    /// Exactly `max_length` ids.
    pub ids: Vec<u32>,
    /// How many of them, from the front, are not padding.
    pub num_tokens: usize,
}

/// Text to tokens and back. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    tokenizer: tokenizers::Tokenizer,
    /// What the end of a word is spelled with inside tokens (`</w>` for CLIP); a space in text.
    word_suffix: Option<String>,
    byte_level: bool,
    pad_token_id: Option<u32>,
    eos_token_id: Option<u32>,
}

impl Tokenizer {
    /// From a folder with `tokenizer.json`, or `vocab.json` + `merges.txt`, or `spiece.model`/`tokenizer.model`; the
    /// first of these that is there. `tokenizer_config.json` and `special_tokens_map.json` add their tokens.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let config = TokenizerConfig::read(dir)?;
        let loaded = unpanicked(|| {
            let (mut tokenizer, special) = load(dir, &config)?;
            config.add_tokens_to(&mut tokenizer, &special)?;
            Ok((tokenizer, special))
        });
        let (mut tokenizer, special) = loaded.unwrap_or_else(|| Err(Error::checkpoint(dir, "a damaged tokenizer")))?;
        let splits_special = config.get("split_special_tokens").and_then(serde_json::Value::as_bool);
        tokenizer.set_encode_special_tokens(splits_special.unwrap_or(false));
        // Some published files cut and pad by themselves; here lengths belong to the caller.
        let own_pad_id = tokenizer.get_padding().map(|padding| padding.pad_id);
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| Error::checkpoint(dir, e))?;
        let id = |name| special.get(name).and_then(|token| tokenizer.token_to_id(&token.content));
        let (pad_token_id, eos_token_id) = (id("pad_token").or(own_pad_id), id("eos_token"));
        let word_suffix = word_suffix(&tokenizer);
        let byte_level = matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) && word_suffix.is_none();
        Ok(Self(Arc::new(Inner { tokenizer, word_suffix, byte_level, pad_token_id, eos_token_id })))
    }

    /// Token ids of `text`; special tokens (BOS, EOS) are added as the tokenizer's post-processor says when asked.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        Ok(self.encoding(text, add_special_tokens)?.get_ids().to_vec())
    }

    /// `text` with its special tokens, cut or padded to `max_length`; a cut keeps the closing special token (EOS) last.
    pub fn encode_padded(&self, text: &str, max_length: usize) -> Result<Padded> {
        let processor = self.0.tokenizer.get_post_processor();
        let num_special = processor.map_or(0, |p| p.added_tokens(false));
        let Some(room) = max_length.checked_sub(num_special) else {
            return Err(Error::invalid("max_sequence_length", format!("the special tokens alone are {num_special}")));
        };
        let mut encoding = self.encoding(text, false)?;
        encoding.truncate(room, 0, TruncationDirection::Right);
        let encoding = self.0.tokenizer.post_process(encoding, None, true).map_err(unencodable)?;
        let mut ids = encoding.get_ids().to_vec();
        let num_tokens = ids.len();
        if num_tokens < max_length {
            let pad = self.0.pad_token_id;
            let pad = pad.ok_or_else(|| Error::invalid("prompt", "the model's tokenizer names no padding token"))?;
            ids.resize(max_length, pad);
        }
        Ok(Padded { ids, num_tokens })
    }

    /// The ids of [`Tokenizer::encode_padded`] for each of `texts`.
    pub fn encode_padded_rows(&self, texts: &[&str], max_length: usize) -> Result<Vec<Vec<u32>>> {
        texts.iter().map(|text| Ok(self.encode_padded(text, max_length)?.ids)).collect()
    }

    /// Text of `ids`, special tokens left out. Ids outside the vocabulary have no text.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let text = self.0.tokenizer.decode(ids, true).map_err(|e| Error::invalid("tokens", e))?;
        Ok(match &self.0.word_suffix {
            Some(suffix) => text.replace(suffix.as_str(), " ").trim().to_string(),
            None => text,
        })
    }

    /// Id of a token given by its exact spelling.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.0.tokenizer.token_to_id(token)
    }

    /// Id of the padding token that the folder's configuration, or the padding in `tokenizer.json`, names.
    pub fn pad_token_id(&self) -> Option<u32> {
        self.0.pad_token_id
    }

    /// Id of the end-of-sequence token that the folder's configuration names.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.0.eos_token_id
    }

    /// Tokens in the vocabulary, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.0.tokenizer.get_vocab_size(true)
    }

    /// Whether the text of tokens is the concatenation of their bytes, whatever stands beside them.
    pub(crate) fn is_byte_level(&self) -> bool {
        self.0.byte_level
    }

    /// Bytes of one token of a byte-level tokenizer: none for special tokens and ids outside the vocabulary.
    pub(crate) fn token_bytes(&self, id: u32) -> Vec<u8> {
        let token = self.0.tokenizer.id_to_token(id).filter(|_| self.has_text(id)).unwrap_or_default();
        // Added tokens are spelled as they are and may hold characters that stand for no byte.
        token.chars().map(byte_of_char).collect::<Option<_>>().unwrap_or_else(|| token.into_bytes())
    }

    /// Whether `id` is in the vocabulary and not a special token.
    pub(crate) fn has_text(&self, id: u32) -> bool {
        let token = self.0.tokenizer.id_to_token(id);
        token.is_some_and(|token| !self.0.tokenizer.get_added_vocabulary().is_special_token(&token))
    }

    fn encoding(&self, text: &str, add_special_tokens: bool) -> Result<Encoding> {
        let encoding = unpanicked(|| self.0.tokenizer.encode_fast(text, add_special_tokens));
        encoding.ok_or_else(|| unencodable("too intricate"))?.map_err(unencodable)
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

/// Special tokens by the names that `tokenizer_config.json` gives them (`eos_token`, `pad_token`, ...).
type SpecialTokens = std::collections::BTreeMap<String, AddedToken>;

fn load(dir: &Path, config: &TokenizerConfig) -> Result<(tokenizers::Tokenizer, SpecialTokens)> {
    let whole = dir.join("tokenizer.json");
    if whole.is_file() {
        let bytes = read_bytes(&whole)?;
        let tokenizer = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| Error::checkpoint(whole, e))?;
        return Ok((tokenizer, config.special_tokens(&[])));
    }
    if dir.join("vocab.json").is_file() && dir.join("merges.txt").is_file() {
        return vocab_merges::load(dir, config);
    }
    match ["spiece.model", "tokenizer.model"].map(|name| dir.join(name)).into_iter().find(|path| path.is_file()) {
        Some(path) => sentencepiece::load(&path, config),
        None => Err(Error::checkpoint(dir, "no tokenizer.json, no vocab.json with merges.txt, no spiece.model")),
    }
}

/// `None` where `work` panicked. The regular expression engine does on text that makes it try too long, such as
/// megabytes of white space, and so does a damaged character map; it leaves nothing half done in a tokenizer.
fn unpanicked<T>(work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).ok()
}

fn word_suffix(tokenizer: &tokenizers::Tokenizer) -> Option<String> {
    match tokenizer.get_model() {
        ModelWrapper::BPE(bpe) => bpe.end_of_word_suffix.clone().filter(|suffix| !suffix.is_empty()),
        _ => None,
    }
}

fn unencodable(problem: impl fmt::Display) -> Error {
    Error::invalid("prompt", format!("cannot be tokenized: {problem}"))
}

/// The byte that a character of a byte-level vocabulary stands for. Printable Latin-1 characters stand for themselves,
/// the other 68 bytes are moved to U+0100 and following (`bytes_to_unicode` of GPT-2's `encoder.py`).
fn byte_of_char(c: char) -> Option<u8> {
    let code = u32::from(c);
    let byte = match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    Some(byte as u8)
}

#[cfg(test)]
pub(crate) mod tests;
