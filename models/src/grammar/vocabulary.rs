//! The vocabulary of a model as a trie of bytes.
//!
//! Owns: the bytes of each token inside a text. Does not know: grammars.

use llguidance::toktrie::{INVALID_TOKEN, TokRxInfo, TokTrie};

use crate::tokenizer::Tokenizer;

/// A trie of the tokens that have text; `eos_token_ids` and special tokens have none, and grammars name them by their
/// spellings. Fails where the tokenizer does not say what bytes its tokens are.
pub(super) fn trie(tokenizer: &Tokenizer, vocab_size: usize, eos_token_ids: &[u32]) -> Result<TokTrie, String> {
    if !tokenizer.has_bytes() {
        return Err("its tokenizer does not say of which bytes a token is".to_owned());
    }
    let num_tokens = u32::try_from(vocab_size).map_err(|error| error.to_string())?;
    let words: Vec<Vec<u8>> = (0..num_tokens).map(|id| word(tokenizer, id, eos_token_ids.contains(&id))).collect();
    let ends: Vec<u32> = eos_token_ids.iter().copied().filter(|id| *id < num_tokens).collect();
    let first_end = ends.first().copied().unwrap_or(INVALID_TOKEN);
    let trie = TokTrie::from(&TokRxInfo::new(num_tokens, first_end), &words);
    Ok(if ends.is_empty() { trie } else { trie.with_eos_tokens(&ends) })
}

/// Bytes of a token; a mark that no text has before the spelling of those that stand for no text.
fn word(tokenizer: &Tokenizer, id: u32, is_end: bool) -> Vec<u8> {
    if tokenizer.has_text(id, true) && !is_end {
        let bytes = tokenizer.bytes_within_text(id);
        // The mark is a byte that no UTF-8 has.
        return if bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) { Vec::new() } else { bytes };
    }
    let spelling = tokenizer.spelling(id).unwrap_or_default();
    match spelling.is_empty() {
        true => Vec::new(),
        false => [&[TokTrie::SPECIAL_TOKEN_MARKER], spelling.as_bytes()].concat(),
    }
}
