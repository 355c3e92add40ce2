//! Byte-pair tokenizers published as `vocab.json` and `merges.txt` alone: what their Python class adds to the two files.
//!
//! Source: transformers `CLIPTokenizer`, `GPT2Tokenizer`, `Qwen2Tokenizer`. Another class is refused by name, because
//! its way of splitting text cannot be guessed.

use std::path::Path;

use tokenizers::models::bpe::{BPE, BpeBuilder};
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::roberta::RobertaProcessing;
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use super::{SpecialTokens, TokenizerConfig};
use crate::error::{Error, Result};

const END_OF_TEXT: &str = "<|endoftext|>";
const WORD_SUFFIX: &str = "</w>";

type Defaults = &'static [(&'static str, &'static str)];

const CLIP_TOKENS: Defaults = &[
    ("bos_token", "<|startoftext|>"),
    ("eos_token", END_OF_TEXT),
    ("unk_token", END_OF_TEXT),
    ("pad_token", END_OF_TEXT),
];
const GPT2_TOKENS: Defaults = &[("bos_token", END_OF_TEXT), ("eos_token", END_OF_TEXT), ("unk_token", END_OF_TEXT)];
const QWEN2_TOKENS: Defaults = &[("eos_token", END_OF_TEXT), ("unk_token", END_OF_TEXT), ("pad_token", END_OF_TEXT)];

const CLIP_WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The tokenizer of a folder with the two files.
pub(super) fn load(dir: &Path, config: &TokenizerConfig) -> Result<(Tokenizer, SpecialTokens)> {
    let [vocab, merges] = [path_text(dir, "vocab.json")?, path_text(dir, "merges.txt")?];
    let (build, defaults): (Build, Defaults) = match config.class() {
        Some("CLIPTokenizer") => (clip, CLIP_TOKENS),
        Some("GPT2Tokenizer") => (gpt2, GPT2_TOKENS),
        Some("Qwen2Tokenizer") => (qwen2, QWEN2_TOKENS),
        None if marks_word_ends(&merges)? => (clip, CLIP_TOKENS),
        None => (gpt2, GPT2_TOKENS),
        Some(class) => {
            let problem = format!("tokenizer_class {class} needs a tokenizer.json; CLIP, GPT2 and Qwen2 do without");
            return Err(Error::checkpoint(dir, problem));
        }
    };
    let special = config.special_tokens(defaults);
    let tokenizer = build(BPE::from_file(&vocab, &merges), &special).map_err(|e| Error::checkpoint(dir, e))?;
    Ok((tokenizer, special))
}

type Build = fn(BpeBuilder, &SpecialTokens) -> tokenizers::Result<Tokenizer>;

fn path_text(dir: &Path, name: &str) -> Result<String> {
    let path = dir.join(name);
    path.to_str().map(str::to_string).ok_or_else(|| Error::checkpoint(&path, "the path is not valid UTF-8"))
}

fn marks_word_ends(merges: &str) -> Result<bool> {
    let text = std::fs::read_to_string(merges).map_err(|e| Error::checkpoint(merges, e))?;
    Ok(text.lines().any(|line| line.ends_with(WORD_SUFFIX)))
}

/// Lower case, white space as one space, letters, single digits and the rest apart, `</w>` where a word ends.
fn clip(pairs: BpeBuilder, special: &SpecialTokens) -> tokenizers::Result<Tokenizer> {
    let spelling = |name: &str| special.get(name).map(|token| token.content.clone());
    let mut bpe = pairs.continuing_subword_prefix(String::new()).end_of_word_suffix(WORD_SUFFIX.into());
    if let Some(unknown) = spelling("unk_token") {
        bpe = bpe.unk_token(unknown);
    }
    let mut tokenizer = Tokenizer::new(bpe.build()?);
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ")?;
    tokenizer.with_normalizer(Some(Normalizers::new(vec![NFC.into(), spaces.into(), Lowercase.into()])))?;
    let words = Split::new(SplitPattern::Regex(CLIP_WORDS.into()), SplitDelimiterBehavior::Removed, true)?;
    let bytes = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![words.into(), bytes.into()])));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let ends = [spelling("eos_token"), spelling("bos_token")].map(|token| {
        let token = token.ok_or("bos_token or eos_token is not named")?;
        let id = tokenizer.token_to_id(&token).ok_or_else(|| format!("{token:?} is not in vocab.json"))?;
        Ok::<_, tokenizers::Error>((token, id))
    });
    let [end, start] = ends;
    let processor = RobertaProcessing::new(end?, start?).trim_offsets(false).add_prefix_space(false);
    tokenizer.with_post_processor(Some(processor));
    Ok(tokenizer)
}

/// Bytes split by GPT-2's expression, which the `tokenizers` crate knows by itself.
fn gpt2(pairs: BpeBuilder, _special: &SpecialTokens) -> tokenizers::Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(pairs.build()?);
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok(tokenizer)
}

/// As GPT-2, with NFC and an expression of its own.
fn qwen2(pairs: BpeBuilder, _special: &SpecialTokens) -> tokenizers::Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(pairs.build()?);
    tokenizer.with_normalizer(Some(NFC))?;
    let words = Split::new(SplitPattern::Regex(QWEN2_WORDS.into()), SplitDelimiterBehavior::Isolated, false)?;
    let bytes = ByteLevel::new(false, true, false);
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![words.into(), bytes.into()])));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok(tokenizer)
}
