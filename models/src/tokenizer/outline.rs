//! A `tokenizer.json` in outline: how many tokens, merges and rules it has and how long they are, read before the library
//! reads the file.
//!
//! Owns: bounds on vocabularies in every form. The library has none: it keeps pieces in a tree whose depth is that of the
//! longest, which it leaves by recursion, and believes the lengths that a character map states. Does not know: what a
//! rule does; that is tried out when the tokenizer is built.

use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::character_map;
use crate::config::bounds::MAX_VOCABULARY;
use crate::error::{Error, Result};
use crate::files::Limit;

/// Most merges; Gemma 3 has 514,906.
pub(super) const MAX_MERGES: usize = 1 << 22;
/// Most bytes of one token; published have 128 to 256 (spaces, hyphens).
pub(super) const MAX_PIECE_BYTES: usize = 1 << 10;
/// Most tokens that are added to a vocabulary; published models of speech have 65,536.
pub(super) const MAX_ADDED_TOKENS: usize = 1 << 18;
/// Most rules of one stage (normalisers, splits and the like); published have some ten.
const MAX_RULES: usize = 256;
/// Most bytes of a regular expression or another text in a rule; published have 2,000.
const MAX_RULE_BYTES: usize = 1 << 14;
/// Most bytes that a rule writes in place of what it finds; published have some ten.
const MAX_REPLACEMENT_BYTES: usize = 1 << 8;

/// What a vocabulary comes to, in whatever form it is published.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Extent {
    /// Tokens that are not added ones.
    pub num_tokens: usize,
    /// Bytes of the longest.
    pub longest: usize,
    /// Of any of them.
    pub highest_id: u32,
}

impl Extent {
    /// With one more token.
    pub(super) fn and(self, bytes: usize, id: u32) -> Self {
        Self { num_tokens: self.num_tokens + 1, longest: self.longest.max(bytes), highest_id: self.highest_id.max(id) }
    }

    /// Of tokens whose ids are their places.
    pub(super) fn of_list<'a>(tokens: impl Iterator<Item = &'a str>) -> Self {
        tokens.zip(0..).fold(Self::default(), |extent, (token, id)| extent.and(token.len(), id))
    }

    /// What is wrong with it.
    pub(super) fn problem(&self) -> Option<String> {
        if self.num_tokens as u64 > MAX_VOCABULARY {
            return Some(format!("has {} tokens; at most {MAX_VOCABULARY}", self.num_tokens));
        }
        piece_problem(self.longest)
    }
}

/// What is wrong with a token of so many bytes.
pub(super) fn piece_problem(bytes: usize) -> Option<String> {
    (bytes > MAX_PIECE_BYTES).then(|| format!("has a token of {bytes} bytes; at most {MAX_PIECE_BYTES}"))
}

/// What is wrong with so many merges, or added tokens.
pub(super) fn count_problem(what: &str, count: usize, max: usize) -> Option<String> {
    (count > max).then(|| format!("has {count} {what}; at most {max}"))
}

/// Refuses the content of the `tokenizer.json` at `path` where it is beyond a bound.
pub(super) fn check(path: &Path, json: &[u8]) -> Result<Extent> {
    let refuse = |problem: String| Err(Error::checkpoint(path, problem));
    if let Some(problem) = Limit::TOKENIZER.problem(json) {
        return refuse(problem);
    }
    let outline: Outline = serde_json::from_slice(json).map_err(|error| Error::checkpoint(path, error))?;
    if let Some(problem) = outline.problem() {
        return refuse(problem);
    }
    if let Some(prefix) = outline.model.prefix()
        && !all_begin_with(prefix, json).map_err(|error| Error::checkpoint(path, error))?
    {
        return refuse("a merge's second token does not begin with continuing_subword_prefix".to_owned());
    }
    Ok(outline.model.vocab)
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Outline {
    added_tokens: Vec<AddedOutline>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: ModelOutline,
}

#[derive(Deserialize)]
struct AddedOutline {
    content: Length,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ModelOutline {
    #[serde(deserialize_with = "extent_of_vocabulary")]
    vocab: Extent,
    merges: Option<Vec<MergeLength>>,
    continuing_subword_prefix: Option<String>,
}

impl Outline {
    fn problem(&self) -> Option<String> {
        let longest_added = self.added_tokens.iter().map(|token| token.content.0).max().unwrap_or(0);
        self.model
            .problem()
            .or_else(|| count_problem("added tokens", self.added_tokens.len(), MAX_ADDED_TOKENS))
            .or_else(|| piece_problem(longest_added))
            .or_else(|| self.rules_problem())
    }

    fn rules_problem(&self) -> Option<String> {
        let stages = [
            ("normalizer", &self.normalizer),
            ("pre_tokenizer", &self.pre_tokenizer),
            ("post_processor", &self.post_processor),
            ("decoder", &self.decoder),
        ];
        stages.into_iter().find_map(|(name, stage)| {
            let problem = Rules::default().problem("", stage);
            problem.map(|problem| format!("{name}: {problem}"))
        })
    }
}

impl ModelOutline {
    fn merges(&self) -> &[MergeLength] {
        self.merges.as_deref().unwrap_or_default()
    }

    fn problem(&self) -> Option<String> {
        let longest = self.merges().iter().map(|merge| merge.0).max().unwrap_or(0);
        self.vocab
            .problem()
            .or_else(|| count_problem("merges", self.merges().len(), MAX_MERGES))
            .or_else(|| piece_problem(longest))
    }

    /// The prefix that the library cuts off every merge's second token, whatever that begins with.
    fn prefix(&self) -> Option<&str> {
        self.continuing_subword_prefix.as_deref().filter(|prefix| !prefix.is_empty() && !self.merges().is_empty())
    }
}

/// Whether the second token of every merge begins so.
fn all_begin_with(prefix: &str, json: &[u8]) -> serde_json::Result<bool> {
    #[derive(Deserialize)]
    struct Merges {
        model: Model,
    }
    #[derive(Deserialize)]
    struct Model {
        merges: Vec<Merge>,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Merge {
        Pair([String; 2]),
        Joined(String),
    }
    let Merges { model: Model { merges } } = serde_json::from_slice(json)?;
    Ok(merges.iter().all(|merge| match merge {
        Merge::Pair([_, second]) => second.starts_with(prefix),
        Merge::Joined(text) => text.split_once(' ').is_some_and(|(_, second)| second.starts_with(prefix)),
    }))
}

/// Rules of one stage, counted as they are walked through.
#[derive(Default)]
struct Rules {
    seen: usize,
}

impl Rules {
    fn problem(&mut self, key: &str, value: &Value) -> Option<String> {
        match value {
            Value::Object(fields) => {
                self.seen += 1;
                if self.seen > MAX_RULES {
                    return Some(format!("has more than {MAX_RULES} rules"));
                }
                fields.iter().find_map(|(key, value)| self.problem(key, value))
            }
            Value::Array(values) => values.iter().find_map(|value| self.problem(key, value)),
            Value::String(text) if key == "precompiled_charsmap" => character_map::problem_of_base64(text),
            Value::String(text) => {
                let max = if matches!(key, "content" | "prepend") { MAX_REPLACEMENT_BYTES } else { MAX_RULE_BYTES };
                (text.len() > max).then(|| format!("{key} has {} bytes; at most {max}", text.len()))
            }
            _ => None,
        }
    }
}

/// Bytes of a text.
struct Length(usize);

impl<'de> Deserialize<'de> for Length {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct OfText;
        impl Visitor<'_> for OfText {
            type Value = Length;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }

            fn visit_str<E>(self, text: &str) -> std::result::Result<Length, E> {
                Ok(Length(text.len()))
            }
        }
        deserializer.deserialize_str(OfText)
    }
}

/// Bytes of a merge, which is a text with a space or two texts.
struct MergeLength(usize);

impl<'de> Deserialize<'de> for MergeLength {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct OfMerge;
        impl<'de> Visitor<'de> for OfMerge {
            type Value = MergeLength;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("two tokens")
            }

            fn visit_str<E>(self, text: &str) -> std::result::Result<MergeLength, E> {
                Ok(MergeLength(text.len()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut tokens: A) -> std::result::Result<MergeLength, A::Error> {
                let mut bytes = 0;
                while let Some(Length(more)) = tokens.next_element()? {
                    bytes += more;
                }
                Ok(MergeLength(bytes))
            }
        }
        deserializer.deserialize_any(OfMerge)
    }
}

/// Tokens with their ids (BPE, WordPiece), or with their scores in the order of their ids (unigram).
fn extent_of_vocabulary<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Extent, D::Error> {
    struct OfVocabulary;
    impl<'de> Visitor<'de> for OfVocabulary {
        type Value = Extent;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("tokens with their ids, or with their scores")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut tokens: A) -> std::result::Result<Extent, A::Error> {
            let mut extent = Extent::default();
            while let Some((Length(bytes), id)) = tokens.next_entry()? {
                extent = extent.and(bytes, id);
            }
            Ok(extent)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut tokens: A) -> std::result::Result<Extent, A::Error> {
            let mut extent = Extent::default();
            while let Some((Length(bytes), _)) = tokens.next_element::<(Length, f64)>()? {
                let id = u32::try_from(extent.num_tokens).map_err(|_| A::Error::custom("too many tokens"))?;
                extent = extent.and(bytes, id);
            }
            Ok(extent)
        }
    }
    deserializer.deserialize_any(OfVocabulary)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn problem(json: &Value) -> Option<String> {
        check(Path::new("tokenizer.json"), json.to_string().as_bytes()).err().map(|error| error.to_string())
    }

    #[track_caller]
    fn check_refused(json: Value, words: &str) {
        let problem = problem(&json).expect("is refused");
        assert!(problem.starts_with("tokenizer.json: ") && problem.contains(words), "{problem}");
    }

    #[test]
    fn a_vocabulary_has_its_extent_in_every_form() {
        let extent = |json: Value| check(Path::new("tokenizer.json"), json.to_string().as_bytes()).expect("sound");
        let expected = Extent { num_tokens: 3, longest: 4, highest_id: 7 };
        assert_eq!(
            extent(json!({"model": {"vocab": {"a": 7, "é": 0, "long": 1}, "merges": ["a b", ["a", "b"]]}})),
            expected
        );
        let unigram = json!({"model": {"vocab": [["a", 0], ["é", -1.5], ["long", 2]], "merges": null}});
        assert_eq!(extent(unigram), Extent { highest_id: 2, ..expected });
        assert_eq!(extent(json!({"normalizer": null, "added_tokens": []})), Extent::default());
    }

    #[test]
    fn lengths_and_counts_are_bounded_wherever_they_stand() {
        let (long, most) = ("x".repeat(MAX_PIECE_BYTES + 1), "x".repeat(MAX_PIECE_BYTES));
        assert_eq!(problem(&json!({"model": {"vocab": {most: 1}}})), None);
        check_refused(json!({"model": {"vocab": {long.clone(): 1}}}), "a token of 1025 bytes; at most 1024");
        check_refused(json!({"model": {"vocab": [[long, 0]]}}), "a token of 1025 bytes");
        check_refused(json!({"model": {"merges": [["a", long]]}}), "a token of 1026 bytes");
        check_refused(json!({"model": {"merges": [format!("a {long}")]}}), "a token of 1027 bytes");
        check_refused(json!({"added_tokens": [{"id": 0, "content": long}]}), "a token of 1025 bytes");
        let replace = |content: &str| json!({"type": "Replace", "pattern": {"String": "a"}, "content": content});
        assert_eq!(problem(&json!({"normalizer": replace("bc")})), None);
        check_refused(json!({"decoder": replace(&"x".repeat(257))}), "decoder: content has 257 bytes; at most 256");
        check_refused(
            json!({"normalizer": {"type": "Prepend", "prepend": long}}),
            "normalizer: prepend has 1025 bytes",
        );
        check_refused(json!({"pre_tokenizer": {"pattern": {"Regex": "x".repeat(16_385)}}}), "Regex has 16385 bytes");
        let many = vec![replace(""); MAX_RULES + 1];
        check_refused(json!({"normalizer": {"type": "Sequence", "normalizers": many}}), "more than 256 rules");
        let extent = Extent { num_tokens: MAX_VOCABULARY as usize + 1, ..Extent::default() };
        assert_eq!(extent.problem().as_deref(), Some("has 2097153 tokens; at most 2097152"));
        assert_eq!(count_problem("merges", 5, 4).as_deref(), Some("has 5 merges; at most 4"));
    }

    #[test]
    fn what_cannot_be_a_vocabulary_is_refused() {
        check_refused(json!({"model": {"vocab": {"a": -1}}}), "-1");
        check_refused(json!({"model": {"vocab": {"a": 1u64 << 32}}}), "4294967296");
        check_refused(json!({"model": {"vocab": [["a"]]}}), "length");
        check_refused(json!({"model": {"vocab": 3}}), "tokens with their ids");
        check_refused(json!({"model": {"merges": [3]}}), "two tokens");
        check_refused(json!({"added_tokens": [{"id": 0}]}), "content");
    }

    #[test]
    fn merges_have_the_prefix_that_is_cut_off_them() {
        let model = |merges: Value| json!({"model": {"continuing_subword_prefix": "##", "merges": merges}});
        assert_eq!(problem(&model(json!([["a", "##b"]]))), None);
        assert_eq!(problem(&model(json!(["a ##b"]))), None);
        assert_eq!(problem(&model(json!(null))), None, "WordPiece has a prefix and no merges");
        check_refused(model(json!([["a", "##b"], ["a", "é"]])), "continuing_subword_prefix");
        check_refused(model(json!(["a b"])), "continuing_subword_prefix");
    }
}
