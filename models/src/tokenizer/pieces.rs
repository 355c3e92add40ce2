//! Where a text can be cut so that its pieces, tokenised one by one, give the tokens of the whole.
//!
//! Owns: for which tokenizers that is proven, and the places. Deliberately does not know: limits, what a piece costs.
//!
//! The places are before a single space and behind a single line feed, each between two characters that are no white space.
//! The proof, for the expressions of [`SPLITS`]: no alternative matches such a space together with what is before it, nor
//! such a line feed with what is behind it, so that a match ends there; none looks back; and the one that looks ahead
//! begins with white space, of which the left piece has none at its end but a line feed, matched alone either way.
//! Normalisers on the list change no character across the place, no added token holds white space, and models see only
//! what is between splits.

use serde_json::Value;
use tokenizers::Tokenizer;

use super::vocab_merges::{CLIP_WORDS, QWEN2_WORDS};
use super::{json_of, may_be_white_space};

/// Llama 3's splits; Qwen2's take digits one by one.
pub(super) const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Expressions that can be cut, beside the one of GPT-2, which the `tokenizers` crate has built in.
const SPLITS: [&str; 2] = [LLAMA3_WORDS, QWEN2_WORDS];

/// The rule for the places of one tokenizer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cutter {
    /// Also behind line feeds.
    at_line_feeds: bool,
    /// Only between characters of ASCII: others may become white space.
    ascii_only: bool,
    /// Last characters of added tokens that take the white space behind them, first ones of those that take it before.
    takes_behind: Vec<char>,
    takes_before: Vec<char>,
}

/// What a normaliser or a splitter leaves of the places.
#[derive(Debug, Clone, Copy)]
struct Places {
    at_line_feeds: bool,
    ascii_only: bool,
    /// Whether this part ends a match at each place.
    are_boundaries: bool,
}

const ALL: Places = Places { at_line_feeds: true, ascii_only: false, are_boundaries: false };

impl Places {
    fn and(self, other: Self) -> Self {
        Self {
            at_line_feeds: self.at_line_feeds && other.at_line_feeds,
            ascii_only: self.ascii_only || other.ascii_only,
            are_boundaries: self.are_boundaries || other.are_boundaries,
        }
    }
}

impl Cutter {
    /// `None` where no place is known to be safe.
    pub(super) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let normalizer = normalizing(&json_of(tokenizer.get_normalizer()))?;
        let places = normalizer.and(splitting(&json_of(tokenizer.get_pre_tokenizer()), true)?);
        if !places.are_boundaries {
            return None;
        }
        let Places { at_line_feeds, ascii_only, .. } = places;
        let mut cutter = Self { at_line_feeds, ascii_only, takes_behind: Vec::new(), takes_before: Vec::new() };
        let added = tokenizer.get_added_vocabulary();
        for (id, token) in added.get_added_tokens_decoder() {
            let normalized = added.simple_id_to_token(*id).unwrap_or_default();
            if [&token.content, &normalized].into_iter().any(|text| text.contains(char::is_whitespace)) {
                return None;
            }
            for text in [&token.content, &normalized] {
                cutter.takes_behind.extend(text.chars().next_back().filter(|_| token.rstrip));
                cutter.takes_before.extend(text.chars().next().filter(|_| token.lstrip));
            }
        }
        Some(cutter)
    }

    /// The first place to cut `text` at or behind `from` bytes.
    pub(super) fn place(&self, text: &str, from: usize) -> Option<usize> {
        let bytes = text.as_bytes();
        let candidates = (from.max(1)..bytes.len()).filter(|at| matches!(bytes[*at], b' ' | b'\n'));
        candidates.into_iter().find_map(|at| self.at(text, at))
    }

    /// Where to cut at the space or line feed that lies at `at`, if there.
    fn at(&self, text: &str, at: usize) -> Option<usize> {
        let (before, after) = (text[..at].chars().next_back()?, text[at + 1..].chars().next()?);
        let is_in_the_way = |c: char| may_be_white_space(c) || (self.ascii_only && !c.is_ascii());
        if is_in_the_way(before) || is_in_the_way(after) {
            return None;
        }
        match text.as_bytes()[at] {
            b' ' => (!self.takes_behind.contains(&before)).then_some(at),
            _ => (self.at_line_feeds && !self.takes_before.contains(&after)).then_some(at + 1),
        }
    }
}

/// A line feed stays one, or is not cut at.
fn normalizing(normalizer: &Value) -> Option<Places> {
    match normalizer["type"].as_str() {
        None if normalizer.is_null() => Some(ALL),
        Some("NFC" | "NFD" | "Lowercase") => Some(ALL),
        // A compatibility form may begin with a space.
        Some("NFKC" | "NFKD") => Some(Places { ascii_only: true, ..ALL }),
        Some("Replace") if normalizer["pattern"]["Regex"] == r"\s+" && normalizer["content"] == " " => {
            Some(Places { at_line_feeds: false, ..ALL })
        }
        Some("Sequence") => {
            normalizer["normalizers"].as_array()?.iter().try_fold(ALL, |all, part| Some(all.and(normalizing(part)?)))
        }
        _ => None,
    }
}

/// `is_first`: whether the part sees the pieces themselves, and not what others have split.
fn splitting(part: &Value, is_first: bool) -> Option<Places> {
    let boundaries = Some(Places { are_boundaries: true, ..ALL });
    match part["type"].as_str()? {
        "ByteLevel" => {
            // It puts a space before what begins with none, a piece as well as a text.
            let at_line_feeds = !(is_first && part["add_prefix_space"] == true);
            // Absent is true.
            Some(Places { at_line_feeds, are_boundaries: part["use_regex"] != false, ..ALL })
        }
        // Digits alone, of which no place is one; what lies between them is split as if they were not there.
        "Digits" => Some(ALL),
        "Split" => {
            let expression = part["pattern"]["Regex"].as_str()?;
            let is_plain = part["behavior"] == "Isolated" && part["invert"] == false;
            let is_clip = expression == CLIP_WORDS && part["behavior"] == "Removed" && part["invert"] == true;
            if is_clip || (is_plain && SPLITS.contains(&expression)) { boundaries } else { None }
        }
        "Sequence" => {
            let parts = part["pretokenizers"].as_array()?.iter().enumerate();
            parts.into_iter().try_fold(ALL, |all, (i, part)| Some(all.and(splitting(part, is_first && i == 0)?)))
        }
        _ => None,
    }
}
