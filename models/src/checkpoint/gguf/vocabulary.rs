//! The vocabulary of a language model from the metadata of its GGUF file.
//!
//! Owns: the keys, what absent ones mean, which tokens end an answer. Does not know: how text becomes tokens. Source:
//! llama.cpp `src/llama-vocab.cpp` (`llama_vocab::impl::load`).

use std::collections::BTreeSet;

use super::keys::{Keys, number};
use crate::error::Result;
use crate::tokenizer::ggml::{Token, TokenKind, Vocabulary, VocabularyKind};
use crate::weights::MetadataValue;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
const ADDS_SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
const REMOVES_WHITE_SPACE: &str = "tokenizer.ggml.remove_extra_whitespaces";

/// Ids in SentencePiece models where a file does not say.
const UNKNOWN_ID: u32 = 0;
const BOS_ID: u32 = 1;
const EOS_ID: u32 = 2;

/// Spellings of control tokens that end a turn or a message, of which a file need not say so.
const ENDS: [&str; 11] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<EOT>",
    "_<EOT>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "<end_of_utterance>",
];

/// The vocabulary of the file.
pub(super) fn read(keys: &Keys<'_>) -> Result<Vocabulary> {
    let model = keys.required(MODEL, keys.text(MODEL)?)?;
    let tokens = tokens(keys)?;
    let kind = match model {
        "gpt2" => byte_level(keys)?,
        "llama" => sentence_piece(keys)?,
        other => return Err(keys.error(MODEL, format!("is `{other}`, which is not read; read are gpt2 and llama"))),
    };
    if keys.flag(REMOVES_WHITE_SPACE)? == Some(true) {
        return Err(keys.error(REMOVES_WHITE_SPACE, "is true, which is not supported"));
    }
    let of_model = |id: u32| matches!(kind, VocabularyKind::SentencePiece { .. }).then_some(id);
    let id = |name: &str| keys.id(&format!("tokenizer.ggml.{name}_token_id"));
    Ok(Vocabulary {
        bos: id("bos")?.or(of_model(BOS_ID)),
        eos: id("eos")?.or(of_model(EOS_ID)),
        unknown: id("unknown")?.or(of_model(UNKNOWN_ID)),
        padding: id("padding")?,
        adds_bos: keys.flag("tokenizer.ggml.add_bos_token")?,
        adds_eos: keys.flag("tokenizer.ggml.add_eos_token")?,
        tokens,
        kind,
    })
}

/// The tokens that end an answer: those that the file names, and control tokens that are spelled so.
pub(super) fn ends(keys: &Keys<'_>, vocabulary: &Vocabulary) -> Result<Vec<u32>> {
    let mut ends: BTreeSet<u32> = vocabulary.eos.into_iter().collect();
    for name in ["eot", "eom"] {
        ends.extend(keys.id(&format!("tokenizer.ggml.{name}_token_id"))?);
    }
    let is_end = |token: &Token| token.kind == TokenKind::Control && ENDS.contains(&token.text.as_str());
    ends.extend(vocabulary.tokens.iter().zip(0..).filter(|(token, _)| is_end(token)).map(|(_, id)| id));
    Ok(ends.into_iter().collect())
}

fn tokens(keys: &Keys<'_>) -> Result<Vec<Token>> {
    let texts = keys.required(TOKENS, keys.list(TOKENS, "text", MetadataValue::as_text)?)?;
    let kind = |value: &MetadataValue| value.as_integer().and_then(TokenKind::of);
    let kinds = keys.list(TOKEN_TYPES, "type of a token", kind)?;
    let kinds = kinds.unwrap_or_else(|| vec![TokenKind::Normal; texts.len()]);
    if kinds.len() != texts.len() {
        return Err(keys.error(TOKEN_TYPES, format!("has {} values, `{TOKENS}` {}", kinds.len(), texts.len())));
    }
    Ok(texts.into_iter().zip(kinds).map(|(text, kind)| Token { text: text.to_owned(), kind }).collect())
}

fn byte_level(keys: &Keys<'_>) -> Result<VocabularyKind> {
    let pre = keys.required(PRE, keys.text(PRE)?)?.to_owned();
    // A token may begin with a space.
    let pair = |value: &MetadataValue| {
        let merge = value.as_text()?;
        let (at, _) = merge.char_indices().skip(1).find(|(_, c)| *c == ' ')?;
        Some((merge[..at].to_owned(), merge[at + 1..].to_owned()))
    };
    let merges = keys.required(MERGES, keys.list(MERGES, "pair of tokens", pair)?)?;
    if keys.flag(ADDS_SPACE_PREFIX)? == Some(true) {
        return Err(keys.error(ADDS_SPACE_PREFIX, format!("is true, which is not supported where `{MODEL}` is gpt2")));
    }
    Ok(VocabularyKind::ByteLevel { pre, merges })
}

fn sentence_piece(keys: &Keys<'_>) -> Result<VocabularyKind> {
    let scores = keys.required(SCORES, keys.list(SCORES, "number", number)?)?;
    let scores = scores.into_iter().map(|score| score as f32).collect();
    Ok(VocabularyKind::SentencePiece { scores, adds_space_prefix: keys.flag(ADDS_SPACE_PREFIX)?.unwrap_or(true) })
}
