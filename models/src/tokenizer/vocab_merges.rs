//! Byte-pair tokenizers published as `vocab.json` and `merges.txt` alone: what their Python class adds to the two files.
//!
//! Source: transformers `CLIPTokenizer`, `GPT2Tokenizer`, `Qwen2Tokenizer`. Another class is refused by name, because
//! its way of splitting text cannot be guessed.

use std::collections::HashMap;
use std::path::Path;

use tokenizers::models::bpe::{BPE, BpeBuilder, Merges, Vocab};
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::roberta::RobertaProcessing;
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use super::outline::{Extent, MAX_MERGES, count_problem, piece_problem};
use super::{Loaded, SpecialTokens, TokenizerConfig};
use crate::config::{read_json_within, read_text_within};
use crate::error::{Error, Result};
use crate::files::Limit;

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

pub(super) const CLIP_WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
pub(super) const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The tokenizer of a folder with the two files.
pub(super) fn load(dir: &Path, config: &TokenizerConfig) -> Result<Loaded> {
    let merges = read_merges(&dir.join("merges.txt"))?;
    let (build, defaults): (Build, Defaults) = match config.class() {
        Some("CLIPTokenizer") => (clip, CLIP_TOKENS),
        Some("GPT2Tokenizer") => (gpt2, GPT2_TOKENS),
        Some("Qwen2Tokenizer") => (qwen2, QWEN2_TOKENS),
        None if merges.iter().any(|(_, end)| end.ends_with(WORD_SUFFIX)) => (clip, CLIP_TOKENS),
        None => (gpt2, GPT2_TOKENS),
        Some(class) => {
            let problem = format!("tokenizer_class {class} needs a tokenizer.json; CLIP, GPT2 and Qwen2 do without");
            return Err(Error::checkpoint(dir, problem));
        }
    };
    // These classes would honour them, in a way of their own each.
    for field in ["add_prefix_space", "add_bos_token", "add_eos_token"] {
        if config.get(field).and_then(serde_json::Value::as_bool) == Some(true) && defaults != CLIP_TOKENS {
            return Err(Error::checkpoint(dir, format!("`{field}` needs a tokenizer.json")));
        }
    }
    let path = dir.join("vocab.json");
    let vocab: HashMap<String, u32> = read_json_within(&path, &Limit::TOKENIZER)?;
    let extent = vocab.iter().fold(Extent::default(), |extent, (token, id)| extent.and(token.len(), *id));
    if let Some(problem) = extent.problem() {
        return Err(Error::checkpoint(path, problem));
    }
    let special = config.special_tokens(defaults);
    let pairs = BPE::builder().vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges);
    let tokenizer = build(pairs, &special).map_err(|e| Error::checkpoint(dir.join(culprit(&*e)), e))?;
    Ok(Loaded { tokenizer, special, path, highest_model_id: extent.highest_id })
}

type Build = fn(BpeBuilder, &SpecialTokens) -> tokenizers::Result<Tokenizer>;

/// Which file a failure to build comes from: the model refuses merges of tokens that the vocabulary lacks, the rest is
/// about special tokens that it lacks.
fn culprit(error: &(dyn std::error::Error + 'static)) -> &'static str {
    if error.is::<tokenizers::models::bpe::Error>() { "merges.txt" } else { "vocab.json" }
}

/// Pairs by priority: two tokens on every line after the version.
fn read_merges(path: &Path) -> Result<Merges> {
    let text = read_text_within(path, &Limit::TOKENIZER)?;
    let (count, longest) = text.lines().fold((0, 0), |(count, longest), line| (count + 1, line.len().max(longest)));
    if let Some(problem) = count_problem("merges", count, MAX_MERGES).or_else(|| piece_problem(longest)) {
        return Err(Error::checkpoint(path, problem));
    }
    let mut pairs = Merges::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.starts_with("#version")) {
        match line.split_once(' ') {
            Some((start, end)) if !end.contains(' ') => pairs.push((start.into(), end.into())),
            _ => return Err(Error::checkpoint(path, format!("line {} is not two tokens", i + 1))),
        }
    }
    Ok(pairs)
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
        let id = tokenizer.token_to_id(&token).ok_or_else(|| format!("{token:?} is not in it"))?;
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

#[cfg(test)]
mod tests {
    use super::super::Tokenizer;
    use super::*;

    const VOCAB: &str =
        r#"{"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "ab</w>": 4, "<|startoftext|>": 5, "<|endoftext|>": 6}"#;
    const MERGES: &str = "#version: 0.2\na b</w>\n";

    #[track_caller]
    fn check_refused(files: &[(&str, &str)], file: &str, words: &str) {
        let dir = tempfile::tempdir().expect("temp dir");
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).expect("write");
        }
        let error = Tokenizer::from_dir(dir.path()).expect_err("refused");
        let Error::Checkpoint { path, problem } = error else { panic!("{error}") };
        assert_eq!(path, dir.path().join(file));
        assert!(problem.contains(words), "{problem}");
    }

    #[test]
    fn damaged_files_are_refused_by_name() {
        check_refused(&[("vocab.json", VOCAB)], "", "merges.txt");
        check_refused(&[("vocab.json", "{"), ("merges.txt", MERGES)], "vocab.json", "EOF");
        check_refused(&[("vocab.json", r#"{"a": -1}"#), ("merges.txt", MERGES)], "vocab.json", "-1");
        check_refused(&[("vocab.json", VOCAB), ("merges.txt", "a b</w> c")], "merges.txt", "line 1");
        check_refused(&[("vocab.json", VOCAB), ("merges.txt", "a b</w>\n\n")], "merges.txt", "line 2");
        check_refused(&[("vocab.json", VOCAB), ("merges.txt", "b a</w>")], "merges.txt", "ba</w>");
        let class = r#"{"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": true}"#;
        let files = [("vocab.json", VOCAB), ("merges.txt", MERGES), ("tokenizer_config.json", class)];
        check_refused(&files, "", "add_prefix_space");
    }
}
