//! How many tokens a text has at least, known from its bytes alone.
//!
//! Owns: the most bytes of text that one token of a tokenizer can stand for. Where nothing bounds them there is no answer: one
//! unknown token may stand for a whole text, and a normaliser may drop it. Deliberately does not know: contexts.
//!
//! Everything here errs to the side of too few tokens: a text is refused for its bytes only when its tokens could not fit.

use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::{Model, ModelWrapper, Tokenizer};

use super::vocab_merges::CLIP_WORDS;
use super::{byte_of_char, json_of, may_be_white_space};

/// Bytes that become one at most where each character becomes at least one other: characters have 4 bytes at most.
const PER_CHARACTER: usize = 4;
/// Bytes that become one at most where characters are decomposed and composed. Each step makes at most three of one: the
/// Kelvin sign becomes a `K`, and the parts of a composed character have at most three times its bytes (Unicode annex 15). ASCII
/// counts in full: what is joined to it makes it longer.
const COMPOSED: usize = 9;

/// What bounds the bytes per token of one tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LeastTokens {
    /// Bytes of normalised text that one token stands for at most, free white space left out.
    longest: usize,
    rule: Rule,
}

/// What normalising and splitting may take away from a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    /// Bytes of ASCII that become one at most.
    ascii: usize,
    /// Bytes of other characters that become one at most.
    other: usize,
    /// Any amount of white space may vanish.
    white_space_is_free: bool,
}

const NOTHING: Rule = Rule { ascii: 1, other: 1, white_space_is_free: false };

impl LeastTokens {
    /// `None` where one token may stand for any text.
    pub(super) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let normalizer = normalizing(&json_of(tokenizer.get_normalizer()))?;
        let pre_tokenizer = json_of(tokenizer.get_pre_tokenizer());
        let rule = normalizer.then(splitting(&pre_tokenizer)?);
        // Bytes of such a vocabulary are spelled as characters.
        let is_byte_level = has_byte_level(&pre_tokenizer) || has_byte_level(&json_of(tokenizer.get_normalizer()));
        let of_model = match tokenizer.get_model() {
            ModelWrapper::BPE(bpe) if bpe_covers(bpe, is_byte_level) => longest(bpe, is_byte_level),
            ModelWrapper::Unigram(unigram) if unigram.byte_fallback() && has_all_bytes(unigram) => {
                longest(unigram, false)
            }
            // Others give one token for a word of any length that they do not know.
            _ => return None,
        };
        let (of_added, white_space) = added_tokens(tokenizer);
        let white_space_is_free = rule.white_space_is_free || white_space;
        Some(Self { longest: of_model.max(of_added), rule: Rule { white_space_is_free, ..rule } })
    }

    /// Tokens that `text` has at least.
    pub(super) fn in_text(&self, text: &str) -> usize {
        let Rule { ascii, other, white_space_is_free } = self.rule;
        let (mut of_ascii, mut of_others) = (0, 0);
        for c in text.chars().filter(|c| !(white_space_is_free && may_be_white_space(*c))) {
            match c.is_ascii() {
                true => of_ascii += 1,
                false => of_others += c.len_utf8(),
            }
        }
        (of_ascii / ascii + of_others / other) / self.longest
    }
}

impl Rule {
    /// Of two steps, one after the other.
    fn then(self, next: Self) -> Self {
        Self {
            ascii: self.ascii.saturating_mul(next.ascii),
            other: self.other.saturating_mul(next.other),
            white_space_is_free: self.white_space_is_free || next.white_space_is_free,
        }
    }
}

/// What a normaliser may take away; `None` for anything.
fn normalizing(normalizer: &Value) -> Option<Rule> {
    let characters = |other| Some(Rule { other, ..NOTHING });
    let white_space = Some(Rule { white_space_is_free: true, ..NOTHING });
    match kind(normalizer) {
        None if normalizer.is_null() => Some(NOTHING),
        Some("Sequence") => in_turn(&normalizer["normalizers"], normalizing),
        Some("NFC") => characters(COMPOSED),
        Some("NFKC") => characters(PER_CHARACTER * COMPOSED),
        Some("NFD" | "NFKD" | "Lowercase") => characters(PER_CHARACTER),
        Some("Prepend" | "ByteLevel") => Some(NOTHING),
        Some("Strip") => white_space,
        Some("Replace") => {
            let content = normalizer["content"].as_str()?;
            match (normalizer["pattern"]["String"].as_str(), normalizer["pattern"]["Regex"].as_str()) {
                (Some(pattern), _) if pattern.chars().all(char::is_whitespace) => white_space,
                (Some(_), _) if content.is_empty() => None,
                (Some(pattern), _) => {
                    let shorter = pattern.len().div_ceil(content.len());
                    Some(Rule { ascii: shorter, other: shorter, ..NOTHING })
                }
                (None, Some(r"\s+" | " {2,}")) => white_space,
                _ => None,
            }
        }
        _ => None,
    }
}

/// What a splitter may take away; `None` for anything.
fn splitting(pre_tokenizer: &Value) -> Option<Rule> {
    let white_space = Some(Rule { white_space_is_free: true, ..NOTHING });
    let removes = pre_tokenizer["behavior"] == "Removed";
    match kind(pre_tokenizer) {
        None if pre_tokenizer.is_null() => Some(NOTHING),
        Some("Sequence") => in_turn(&pre_tokenizer["pretokenizers"], splitting),
        Some("Whitespace" | "WhitespaceSplit" | "BertPreTokenizer") => white_space,
        Some("ByteLevel" | "Metaspace" | "Digits" | "UnicodeScripts" | "FixedLength") => Some(NOTHING),
        Some("Split" | "Punctuation") if !removes => Some(NOTHING),
        // Whatever is no white space is in one of its words.
        Some("Split") if pre_tokenizer["pattern"]["Regex"] == CLIP_WORDS && pre_tokenizer["invert"] == true => {
            white_space
        }
        _ => None,
    }
}

fn kind(part: &Value) -> Option<&str> {
    part["type"].as_str()
}

fn in_turn(parts: &Value, rule: fn(&Value) -> Option<Rule>) -> Option<Rule> {
    parts.as_array()?.iter().try_fold(NOTHING, |all, part| Some(all.then(rule(part)?)))
}

fn has_byte_level(part: &Value) -> bool {
    let parts = ["normalizers", "pretokenizers"].into_iter().filter_map(|name| part[name].as_array()).flatten();
    kind(part) == Some("ByteLevel") || parts.into_iter().any(has_byte_level)
}

/// Whether no character is left out, and none is joined with others in an unknown token.
fn bpe_covers(bpe: &BPE, is_byte_level: bool) -> bool {
    let (prefix, suffix) = (bpe.continuing_subword_prefix.as_deref(), bpe.end_of_word_suffix.as_deref());
    let is_known = |c: char| {
        let prefixes = [Some(""), prefix].into_iter().flatten();
        prefixes.into_iter().all(|prefix| {
            let suffixes = [Some(""), suffix].into_iter().flatten();
            suffixes.into_iter().all(|suffix| bpe.token_to_id(&format!("{prefix}{c}{suffix}")).is_some())
        })
    };
    let mut bytes = (0..0x144).filter_map(char::from_u32).filter(|c| byte_of_char(*c).is_some());
    (is_byte_level && bytes.all(is_known))
        || (bpe.byte_fallback && has_all_bytes(bpe))
        || (bpe.unk_token.is_some() && !bpe.fuse_unk)
}

/// Whether there is a token for each byte, for characters that have none.
fn has_all_bytes(model: &impl Model) -> bool {
    (0..=255u8).all(|byte| model.token_to_id(&format!("<0x{byte:02X}>")).is_some())
}

fn longest(model: &impl Model, is_byte_level: bool) -> usize {
    let len = |token: &String| if is_byte_level { token.chars().count() } else { token.len() };
    // An unknown token may stand for one character.
    model.get_vocab().keys().map(len).max().unwrap_or(0).max(char::MAX.len_utf8())
}

/// Bytes of the longest added token, and whether one of them takes the white space beside it.
fn added_tokens(tokenizer: &Tokenizer) -> (usize, bool) {
    let added = tokenizer.get_added_vocabulary();
    let mut longest = 0;
    let mut white_space = false;
    for (id, token) in added.get_added_tokens_decoder() {
        let normalized = added.simple_id_to_token(*id).map_or(0, |text| text.len());
        longest = longest.max(token.content.len()).max(normalized);
        white_space |= token.lstrip || token.rstrip;
    }
    (longest, white_space)
}
