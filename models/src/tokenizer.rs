//! Tokenizers exactly as published.
//!
//! Owns: finding a tokenizer in a folder, text to ids and back, the length that an encoder wants, the memory and time that
//! a long text may take. The submodules build what folders without `tokenizer.json`, and GGUF files, only imply. Deliberately does not
//! know: chat templates, models, streaming.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use tokenizers::{AddedToken, DecoderWrapper, Encoding, ModelWrapper, PostProcessor, TruncationDirection};

use crate::cancel::CancelToken;
use crate::error::{Error, Result};
use crate::files::{self, Limit, is_present};
use crate::unpanicked::unpanicked;

pub mod bytes;
mod character_map;
pub(crate) mod config;
pub(crate) mod ggml;
mod least;
mod outline;
mod pieces;
mod places;
mod sentencepiece;
mod spelling;
mod vocab_merges;

use config::TokenizerConfig;
use ggml::Vocabulary;
use least::LeastTokens;
use pieces::Cutter;
use spelling::Spelling;

/// Bytes of text after which a long text is cut, where it can be: between two pieces it is seen whether the limit of tokens
/// is reached and whether anybody waits.
const PIECE_BYTES: usize = 32 << 10;
/// Longest stretch of text that is tokenised at once: a whole text of a tokenizer for which no places to cut are known, and
/// otherwise text without a single space or line feed between other characters.
pub const MAX_STRETCH_BYTES: usize = 512 << 10;
/// Bytes of memory that tokenising takes at its peak for each byte that is tokenised at once: 255 are measured for the text that
/// takes most (digits, each a split, a word and a token of its own), and an allocator keeps as much again meanwhile.
pub const MEMORY_PER_BYTE: usize = 512;

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
    /// Of tokens within a text, where that is known.
    spelling: Option<Spelling>,
    pad_token_id: Option<u32>,
    eos_token_id: Option<u32>,
    /// Of its model; added tokens may have higher ones.
    highest_model_id: u32,
    /// Of the tokens that it puts around every text.
    highest_special_id: u32,
    /// Made when first asked for: prompts of pictures are short and do without.
    for_long_texts: OnceLock<ForLongTexts>,
}

/// What is known of a tokenizer beyond its tokens.
struct ForLongTexts {
    least: Option<LeastTokens>,
    cutting: Option<Cutting>,
}

/// How a text is tokenised in pieces.
struct Cutting {
    cutter: Cutter,
    /// Special tokens before and behind a text.
    before: Vec<u32>,
    behind: Vec<u32>,
}

/// Text that every tokenizer must be able to take: spaces of some kinds, letters with and without marks, other scripts, a
/// picture, characters that most vocabularies lack.
const TRIAL: &str = "Hello, w\u{f6}rld!  12\t\n e\u{301} \u{fdfa} \u{6f22}\u{5b57} \u{1f642}\u{200d}\u{10ffff} <s>";
/// Most tokens of each of its bytes: rules that write more are there to take memory. Published are 2 at most.
const MAX_TOKENS_PER_BYTE: usize = 8;
/// Most tokens around a text; published are 4 at most.
const MAX_SPECIAL_TOKENS: usize = 64;

impl Tokenizer {
    /// From a folder with `tokenizer.json`, or `vocab.json` + `merges.txt`, or `spiece.model`/`tokenizer.model`; the
    /// first of these that is there. `tokenizer_config.json` and `special_tokens_map.json` add their tokens.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let config = TokenizerConfig::read(dir)?;
        let loaded = unpanicked(|| {
            let mut loaded = load(dir, &config)?;
            config.add_tokens_to(&mut loaded.tokenizer, &loaded.special)?;
            Ok(loaded)
        });
        let loaded = loaded.unwrap_or_else(|said| Err(damaged(dir, said)))?;
        let splits_special = config.get("split_special_tokens").and_then(serde_json::Value::as_bool);
        Self::of(loaded, splits_special.unwrap_or(false))
    }

    /// From the vocabulary inside the GGUF file at `path`.
    pub(crate) fn from_vocabulary(path: &Path, vocabulary: &Vocabulary) -> Result<Self> {
        let loaded = unpanicked(|| ggml::load(path, vocabulary));
        Self::of(loaded.unwrap_or_else(|said| Err(damaged(path, said)))?, false)
    }

    /// `splits_special`: whether special tokens in text are text like any other.
    fn of(loaded: Loaded, splits_special: bool) -> Result<Self> {
        let Loaded { mut tokenizer, special, path, highest_model_id } = loaded;
        tokenizer.set_encode_special_tokens(splits_special);
        // Some published files cut and pad by themselves; here lengths belong to the caller.
        let own_pad_id = tokenizer.get_padding().map(|padding| padding.pad_id);
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| Error::checkpoint(&path, e))?;
        let id = |name| special.get(name).and_then(|token| tokenizer.token_to_id(&token.content));
        let (pad_token_id, eos_token_id) = (id("pad_token").or(own_pad_id), id("eos_token"));
        let word_suffix = word_suffix(&tokenizer);
        let byte_level = matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) && word_suffix.is_none();
        let spelling = Spelling::of(tokenizer.get_decoder()).filter(|_| word_suffix.is_none());
        let highest_special_id = try_out(&tokenizer).map_err(|problem| damaged(&path, problem))?;
        Ok(Self(Arc::new(Inner {
            tokenizer,
            word_suffix,
            byte_level,
            spelling,
            pad_token_id,
            eos_token_id,
            highest_model_id,
            highest_special_id,
            for_long_texts: OnceLock::new(),
        })))
    }

    /// An id that is not among the `vocab_size` for which a network has embeddings, if there is one. That of the padding
    /// may be, where nothing is padded: fine-tuned language models are published with one.
    pub fn id_beyond(&self, vocab_size: usize, is_padding_used: bool) -> Option<u32> {
        let unused = self.pad_token_id().filter(|_| !is_padding_used);
        let added = self.0.tokenizer.get_added_vocabulary().get_added_tokens_decoder().keys().copied();
        let ids = added.chain([self.0.highest_model_id, self.0.highest_special_id]);
        ids.filter(|id| Some(*id) != unused && *id as usize >= vocab_size).max()
    }

    /// Token ids of `text`; special tokens (BOS, EOS) are added as the tokenizer's post-processor says when asked.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        Ok(self.encoding(text, add_special_tokens)?.get_ids().to_vec())
    }

    /// As [`Tokenizer::encode`], of texts of any length, for a model that takes `limit` tokens. What cannot fit is refused
    /// before it is tokenised where the vocabulary bounds the bytes of a token, and otherwise as soon as there are too many
    /// tokens; the whole text is never tokenised at once if it can be cut. Whether a text that was tokenised to its end
    /// fits is left to the caller.
    ///
    /// # Errors
    ///
    /// [`Error::ContextLength`] as said; [`Error::InvalidRequest`] for a stretch over [`MAX_STRETCH_BYTES`];
    /// [`Error::Cancelled`] when nobody waits any longer.
    pub fn encode_within(
        &self,
        text: &str,
        add_special_tokens: bool,
        limit: usize,
        cancelled: &CancelToken,
    ) -> Result<Vec<u32>> {
        self.encode_in_pieces(text, add_special_tokens, limit, cancelled, PIECE_BYTES)
    }

    fn encode_in_pieces(
        &self,
        text: &str,
        add_special_tokens: bool,
        limit: usize,
        cancelled: &CancelToken,
        piece_bytes: usize,
    ) -> Result<Vec<u32>> {
        if text.len() <= piece_bytes {
            return self.encode(text, add_special_tokens);
        }
        self.check_least(text, limit)?;
        let cutting = self.for_long_texts().cutting.as_ref();
        let Some(Cutting { cutter, before, behind }) = cutting else {
            check_stretch(text)?;
            return self.encode(text, add_special_tokens);
        };
        let mut ids = if add_special_tokens { before.clone() } else { Vec::new() };
        let mut rest = text;
        while !rest.is_empty() {
            if cancelled.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let end = cutter.place(rest, piece_bytes).unwrap_or(rest.len());
            let (piece, others) = rest.split_at(end);
            check_stretch(piece)?;
            ids.extend(self.encode(piece, false)?);
            if ids.len() > limit && !others.is_empty() {
                return Err(Error::ContextLength { prompt_tokens: ids.len(), is_exact: false, limit });
            }
            rest = others;
        }
        ids.extend(if add_special_tokens { behind.as_slice() } else { &[] });
        Ok(ids)
    }

    /// Refuses texts whose bytes show that they have more than `limit` tokens.
    pub(crate) fn check_least(&self, text: &str, limit: usize) -> Result<()> {
        let least = self.least_tokens(text);
        if least > limit {
            return Err(Error::ContextLength { prompt_tokens: least, is_exact: false, limit });
        }
        Ok(())
    }

    /// Tokens that a text has at least, known without tokenising it; 0 where nothing bounds the bytes of a token.
    pub(crate) fn least_tokens(&self, text: &str) -> usize {
        self.for_long_texts().least.as_ref().map_or(0, |least| least.in_text(text))
    }

    /// Finds out what long texts need, which takes a look at the whole vocabulary: at load, and not at the first request.
    pub(crate) fn prepare_for_long_texts(&self) {
        self.for_long_texts();
    }

    fn for_long_texts(&self) -> &ForLongTexts {
        self.0
            .for_long_texts
            .get_or_init(|| ForLongTexts { least: LeastTokens::of(&self.0.tokenizer), cutting: self.cutting() })
    }

    fn cutting(&self) -> Option<Cutting> {
        /// Stands for the text between special tokens; no vocabulary is as large.
        const TEXT: u32 = u32::MAX;
        let cutter = Cutter::of(&self.0.tokenizer)?;
        let text = tokenizers::Token::new(TEXT, String::new(), (0, 0));
        let encoding = Encoding::from_tokens(vec![text], 0);
        let ids = self.0.tokenizer.post_process(encoding, None, true).ok()?.get_ids().to_vec();
        let place = ids.iter().position(|id| *id == TEXT)?;
        let (before, behind) = (ids[..place].to_vec(), ids[place + 1..].to_vec());
        (!behind.contains(&TEXT)).then_some(Cutting { cutter, before, behind })
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

    /// Text of `ids`, special tokens as they are spelled. Ids outside the vocabulary have no text.
    pub fn decode_all(&self, ids: &[u32]) -> Result<String> {
        self.0.tokenizer.decode(ids, false).map_err(|e| Error::invalid("tokens", e))
    }

    /// The spelling of a token in the vocabulary, in which other characters may stand for bytes and spaces.
    pub fn token(&self, id: u32) -> Option<String> {
        self.0.tokenizer.id_to_token(id)
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

    /// Bytes of one token of a byte-level tokenizer: none for ids outside the vocabulary, and for special tokens where they
    /// are skipped.
    pub(crate) fn token_bytes(&self, id: u32, skips_special: bool) -> Vec<u8> {
        let token = self.0.tokenizer.id_to_token(id).filter(|_| self.has_text(id, skips_special)).unwrap_or_default();
        Spelling::ByteLevel.bytes(&token)
    }

    /// Whether the bytes of tokens within a text are known.
    pub(crate) fn has_bytes(&self) -> bool {
        self.0.spelling.is_some()
    }

    /// Bytes that a token which has text adds to one that has begun; none for ids outside the vocabulary.
    pub(crate) fn bytes_within_text(&self, id: u32) -> Vec<u8> {
        let token = self.0.tokenizer.id_to_token(id);
        self.0.spelling.iter().zip(token).map(|(spelling, token)| spelling.bytes(&token)).next().unwrap_or_default()
    }

    /// Bytes of a token within a text, special ones as they are spelled; they may be a part of a character. None for ids outside
    /// the vocabulary.
    pub fn bytes_of(&self, id: u32) -> Vec<u8> {
        match self.has_bytes() {
            true => self.bytes_within_text(id),
            false => self.decode_all(&[id]).unwrap_or_default().into_bytes(),
        }
    }

    /// How the vocabulary writes a token.
    pub(crate) fn spelling(&self, id: u32) -> Option<String> {
        self.0.tokenizer.id_to_token(id)
    }

    /// Whether `id` is in the vocabulary, and no special token where those are skipped.
    pub(crate) fn has_text(&self, id: u32, skips_special: bool) -> bool {
        let is_special = |token: &str| self.0.tokenizer.get_added_vocabulary().is_special_token(token);
        self.0.tokenizer.id_to_token(id).is_some_and(|token| !(skips_special && is_special(&token)))
    }

    fn encoding(&self, text: &str, add_special_tokens: bool) -> Result<Encoding> {
        // The regular expression engine panics on text that makes it try too long, such as megabytes of white space. It
        // leaves nothing half done in a tokenizer.
        let encoding = unpanicked(|| self.0.tokenizer.encode_fast(text, add_special_tokens));
        encoding.map_err(|_| unencodable("too intricate"))?.map_err(unencodable)
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

/// Special tokens by the names that `tokenizer_config.json` gives them (`eos_token`, `pad_token`, ...).
type SpecialTokens = std::collections::BTreeMap<String, AddedToken>;

/// What the files of a folder give.
struct Loaded {
    tokenizer: tokenizers::Tokenizer,
    special: SpecialTokens,
    /// Where it lies.
    path: PathBuf,
    highest_model_id: u32,
}

fn load(dir: &Path, config: &TokenizerConfig) -> Result<Loaded> {
    let path = dir.join("tokenizer.json");
    if is_present(&path) {
        let bytes = files::read(&path, &Limit::TOKENIZER)?;
        let highest_model_id = outline::check(&path, &bytes)?.highest_id;
        let tokenizer = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| Error::checkpoint(&path, e))?;
        return Ok(Loaded { tokenizer, special: config.special_tokens(&[]), path, highest_model_id });
    }
    if is_present(&dir.join("vocab.json")) && is_present(&dir.join("merges.txt")) {
        return vocab_merges::load(dir, config);
    }
    match ["spiece.model", "tokenizer.model"].map(|name| dir.join(name)).into_iter().find(|path| is_present(path)) {
        Some(path) => sentencepiece::load(path, config),
        None => Err(Error::checkpoint(dir, "no tokenizer.json, no vocab.json with merges.txt, no spiece.model")),
    }
}

/// Encodes and decodes a text, since the library finds many faults of a file no sooner; gives the highest id of the tokens
/// around a text.
fn try_out(tokenizer: &tokenizers::Tokenizer) -> std::result::Result<u32, String> {
    let ids = |text: &str, around: bool| -> tokenizers::Result<Vec<u32>> {
        Ok(tokenizer.encode_fast(text, around)?.get_ids().to_vec())
    };
    let tried = unpanicked(|| {
        let (around, inner) = (ids("", true)?, ids(TRIAL, false)?);
        tokenizer.decode(&inner, true)?;
        Ok((around, inner.len()))
    });
    let (around, len) = tried?.map_err(|error: tokenizers::Error| error.to_string())?;
    if around.len() > MAX_SPECIAL_TOKENS {
        return Err(format!("it puts {} tokens around every text; at most {MAX_SPECIAL_TOKENS}", around.len()));
    }
    if len > TRIAL.len() * MAX_TOKENS_PER_BYTE {
        return Err(format!("it makes {len} tokens of {} bytes; at most {MAX_TOKENS_PER_BYTE} of each", TRIAL.len()));
    }
    Ok(around.into_iter().max().unwrap_or(0))
}

fn damaged(path: &Path, problem: String) -> Error {
    Error::checkpoint(path, format!("is no tokenizer that works: {problem}"))
}

fn word_suffix(tokenizer: &tokenizers::Tokenizer) -> Option<String> {
    match tokenizer.get_model() {
        ModelWrapper::BPE(bpe) => bpe.end_of_word_suffix.clone().filter(|suffix| !suffix.is_empty()),
        _ => None,
    }
}

fn check_stretch(text: &str) -> Result<()> {
    if text.len() <= MAX_STRETCH_BYTES {
        return Ok(());
    }
    let problem = format!(
        "has {} bytes without a place to cut it (a single space or line feed between other characters, where the model's \
         tokenizer allows it); at most {MAX_STRETCH_BYTES} are tokenized at once",
        text.len()
    );
    Err(Error::invalid("prompt", problem))
}

/// Whether some engine of regular expressions takes a character for white space. Such engines know different versions of
/// Unicode, in which a few others were.
fn may_be_white_space(c: char) -> bool {
    c.is_whitespace() || c.is_control() || matches!(c, '\u{180e}' | '\u{200b}')
}

/// A part of a tokenizer as `tokenizer.json` has it, in which all of its fields can be read.
fn json_of(part: Option<&impl serde::Serialize>) -> serde_json::Value {
    // What cannot be written is known as little as what is not there to be read.
    let unknown = || serde_json::Value::Bool(false);
    part.map_or(serde_json::Value::Null, |part| serde_json::to_value(part).unwrap_or_else(|_| unknown()))
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
