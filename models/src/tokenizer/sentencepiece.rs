//! Unigram tokenizers published as a SentencePiece model (`spiece.model`) alone: T5 and UMT5.
//!
//! Owns: the few fields of `sentencepiece_model.proto` that matter, read without a protobuf library (four kinds of
//! fields and three messages do not pay for one), and what transformers' `T5Tokenizer` adds to them. SentencePiece
//! models of other classes are refused: their rules about spaces and special tokens differ.

use std::path::PathBuf;

use serde_json::Value;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::Precompiled;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use super::outline::Extent;
use super::{Loaded, SpecialTokens, TokenizerConfig, character_map};
use crate::config::bounds::MAX_VOCABULARY;
use crate::error::{Error, Result};
use crate::files::{self, Limit};

/// Special tokens of `T5Tokenizer` where the configuration is silent.
const T5_TOKENS: &[(&str, &str)] = &[("eos_token", "</s>"), ("unk_token", "<unk>"), ("pad_token", "<pad>")];
/// Sentinels `<extra_id_N>` of `T5Tokenizer` where the configuration is silent.
const EXTRA_IDS: u64 = 100;
/// More than any checkpoint has; a damaged file must not take the memory.
const MAX_EXTRA_IDS: u64 = 100_000;
/// Stands for a space inside pieces.
const SPACE: char = '\u{2581}';

/// The tokenizer of one `.model` file.
pub(super) fn load(path: PathBuf, config: &TokenizerConfig) -> Result<Loaded> {
    let problem = |problem: String| Error::checkpoint(&path, problem);
    if let Some(class) = config.class().filter(|class| *class != "T5Tokenizer") {
        return Err(problem(format!("tokenizer_class {class} needs a tokenizer.json; T5Tokenizer does without")));
    }
    let bytes = files::read(&path, &Limit::TOKENIZER)?;
    let model = parse_model(&bytes).ok_or_else(|| problem("is not a whole SentencePiece model".into()))?;
    if model.kind != UNIGRAM {
        return Err(problem(format!("is of model_type {}; only unigram (1) is supported", model.kind)));
    }
    let extent = Extent::of_list(model.pieces.iter().map(|piece| piece.text.as_str()));
    if let Some(found) = extent.problem().or_else(|| model.problem()) {
        return Err(problem(found));
    }
    let extra_ids = num_sentinels(config).map_err(problem)?;
    let special = config.special_tokens(T5_TOKENS);
    let tokenizer = build(&model, extra_ids, &special).map_err(|e| problem(e.to_string()))?;
    let highest_model_id = extent.highest_id + extra_ids as u32;
    Ok(Loaded { tokenizer, special, path, highest_model_id })
}

/// How many sentinels follow the pieces: `extra_ids`, else as many as the configuration lists. Both must agree, because
/// the ids of all sentinels depend on their number.
fn num_sentinels(config: &TokenizerConfig) -> Result<u64, String> {
    let is_sentinel = |token: &Value| {
        let spelling = token.as_str().or_else(|| token.get("content")?.as_str());
        spelling.is_some_and(|spelling| spelling.contains("<extra_id_"))
    };
    let listed = config.additional().filter(|token| is_sentinel(token)).count() as u64;
    match config.get("extra_ids").map(|count| count.as_u64().filter(|count| *count <= MAX_EXTRA_IDS)) {
        None if listed > 0 => Ok(listed),
        None => Ok(EXTRA_IDS),
        Some(None) => Err(format!("needs `extra_ids` of at most {MAX_EXTRA_IDS} in tokenizer_config.json")),
        Some(Some(count)) if count > 0 && listed > 0 && count != listed => {
            Err(format!("tokenizer_config.json has `extra_ids` {count} and lists {listed} sentinels"))
        }
        Some(Some(count)) => Ok(count),
    }
}

/// As `T5Tokenizer` of transformers: the file's own character map, words at white space, a space before each, EOS
/// after. The sentinels follow the pieces, the highest number first.
fn build(model: &Model, extra_ids: u64, special: &SpecialTokens) -> tokenizers::Result<Tokenizer> {
    let sentinels: Vec<String> = (0..extra_ids).rev().map(|i| format!("<extra_id_{i}>")).collect();
    let mut vocab: Vec<(String, f64)> = model.pieces.iter().map(|p| (p.text.clone(), f64::from(p.score))).collect();
    vocab.extend(sentinels.iter().map(|sentinel| (sentinel.clone(), 0.0)));
    let unknown = model.pieces.iter().position(|piece| piece.kind == UNKNOWN).ok_or("has no unknown piece")?;
    let mut tokenizer = Tokenizer::new(Unigram::from(vocab, Some(unknown), false)?);
    if !model.character_map.is_empty() {
        tokenizer.with_normalizer(Some(Precompiled::from(&model.character_map)?))?;
    }
    let spaces = Metaspace::new(SPACE, PrependScheme::Always, true);
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![WhitespaceSplit.into(), spaces.clone().into()])));
    tokenizer.with_decoder(Some(spaces));
    tokenizer.add_tokens(model.pieces.iter().filter_map(Piece::added_token))?;
    tokenizer.add_tokens(sentinels.iter().map(|sentinel| AddedToken::from(sentinel, true)))?;
    let end = special.get("eos_token").map(|token| token.content.clone()).ok_or("eos_token is not named")?;
    let end_id = tokenizer.token_to_id(&end).ok_or_else(|| format!("eos_token {end:?} is no piece"))?;
    let template = TemplateProcessing::builder()
        .try_single(vec!["$A".to_string(), end.clone()])?
        .special_tokens(vec![(end, end_id)])
        .build()?;
    tokenizer.with_post_processor(Some(template));
    Ok(tokenizer)
}

/// `TrainerSpec.ModelType`.
const UNIGRAM: u64 = 1;
/// `SentencePiece.Type`.
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// `ModelProto`.
struct Model {
    pieces: Vec<Piece>,
    /// `trainer_spec.model_type`.
    kind: u64,
    /// `normalizer_spec.precompiled_charsmap`.
    character_map: Vec<u8>,
}

/// `ModelProto.SentencePiece`.
struct Piece {
    text: String,
    score: f32,
    kind: u64,
}

impl Piece {
    /// Control pieces are special tokens, pieces that the trainer was given are tokens found before the model looks.
    fn added_token(&self) -> Option<AddedToken> {
        let is_added = matches!(self.kind, CONTROL | USER_DEFINED);
        is_added.then(|| AddedToken::from(&self.text, self.kind == CONTROL).normalized(false))
    }
}

impl Model {
    fn problem(&self) -> Option<String> {
        if self.pieces.iter().any(|piece| !piece.score.is_finite()) {
            return Some("has a score that is no number".to_owned());
        }
        character_map::problem(&self.character_map)
            .filter(|_| !self.character_map.is_empty())
            .map(|problem| format!("its {problem}"))
    }
}

/// All of a model, or the first pieces of one that has too many.
fn parse_model(bytes: &[u8]) -> Option<Model> {
    let mut model = Model { pieces: Vec::new(), kind: UNIGRAM, character_map: Vec::new() };
    for field in Fields(bytes) {
        match field? {
            // A piece of two bytes takes forty once it is read.
            (1, Field::Bytes(_)) if model.pieces.len() as u64 > MAX_VOCABULARY => break,
            (1, Field::Bytes(piece)) => model.pieces.push(parse_piece(piece)?),
            (2, Field::Bytes(trainer)) => model.kind = varint_field(trainer, 3)?.unwrap_or(UNIGRAM),
            (3, Field::Bytes(normalizer)) => model.character_map = bytes_field(normalizer, 2)?.unwrap_or(&[]).to_vec(),
            _ => {}
        }
    }
    Some(model)
}

fn parse_piece(bytes: &[u8]) -> Option<Piece> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: NORMAL };
    for field in Fields(bytes) {
        match field? {
            (1, Field::Bytes(text)) => piece.text = String::from_utf8(text.to_vec()).ok()?,
            (2, Field::Fixed32(bits)) => piece.score = f32::from_bits(bits),
            (3, Field::Varint(kind)) => piece.kind = kind,
            _ => {}
        }
    }
    Some(piece)
}

fn varint_field(message: &[u8], number: u64) -> Option<Option<u64>> {
    let mut found = None;
    for field in Fields(message) {
        if let (n, Field::Varint(value)) = field?
            && n == number
        {
            found = Some(value);
        }
    }
    Some(found)
}

fn bytes_field(message: &[u8], number: u64) -> Option<Option<&[u8]>> {
    let mut found = None;
    for field in Fields(message) {
        if let (n, Field::Bytes(value)) = field?
            && n == number
        {
            found = Some(value);
        }
    }
    Some(found)
}

/// The value of one field on the wire.
enum Field<'a> {
    Varint(u64),
    Fixed64,
    Bytes(&'a [u8]),
    Fixed32(u32),
}

/// Fields of one message by number; yields `None` once, at the end, when the bytes break off or make no sense.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u64, Field<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.read();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn read(&mut self) -> Option<(u64, Field<'a>)> {
        let key = self.varint()?;
        let field = match key & 7 {
            0 => Field::Varint(self.varint()?),
            1 => self.take(8).map(|_| Field::Fixed64)?,
            2 => {
                let len = usize::try_from(self.varint()?).ok()?;
                Field::Bytes(self.take(len)?)
            }
            5 => Field::Fixed32(u32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((key >> 3, field))
    }

    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const T5: &[u8] = include_bytes!("../../../tests/goldens/tokenizers/t5/spiece.model");

    /// The folder of one `spiece.model` and one configuration.
    fn load_bytes(model: &[u8], config: Value) -> Result<super::super::Tokenizer> {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::write(dir.path().join("spiece.model"), model).expect("write");
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).expect("write");
        super::super::Tokenizer::from_dir(dir.path())
    }

    #[track_caller]
    fn check_refused(model: &[u8], config: Value, words: &str) {
        let error = load_bytes(model, config).expect_err("refused");
        let text = error.to_string();
        assert!(matches!(error, Error::Checkpoint { .. }) && text.contains("spiece.model"), "{text}");
        assert!(text.contains(words), "{text}");
    }

    /// Offset of the character map in `T5`, and its length.
    fn character_map_range() -> std::ops::Range<usize> {
        let map = parse_model(T5).expect("parses").character_map;
        let start = T5.windows(map.len()).position(|window| window == map).expect("stands in the file");
        start..start + map.len()
    }

    #[test]
    fn a_character_map_that_lies_about_its_length_is_refused() {
        let mut model = T5.to_vec();
        let range = character_map_range();
        model[range.start..range.start + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        check_refused(&model, json!({}), "not as long as it says");
    }

    #[test]
    fn a_character_map_that_points_outside_itself_is_refused() {
        let mut model = T5.to_vec();
        let range = character_map_range();
        model[range.start + 4..range.start + 404].fill(0xfe);
        check_refused(&model, json!({}), "points outside itself");
    }

    #[test]
    fn the_number_of_sentinels_is_said_once_or_twice_alike() {
        let sentinels = |count: usize| (0..count).map(|i| format!("<extra_id_{i}>")).collect::<Vec<_>>();
        let pieces = parse_model(T5).expect("parses").pieces.len();
        let size = |config| load_bytes(T5, config).expect("loads").vocab_size() - pieces;
        assert_eq!(size(json!({})), 100);
        assert_eq!(size(json!({"additional_special_tokens": sentinels(300)})), 300);
        assert_eq!(size(json!({"extra_special_tokens": sentinels(3), "extra_ids": 3})), 3);
        check_refused(T5, json!({"additional_special_tokens": sentinels(300), "extra_ids": 100}), "lists 300");
        check_refused(T5, json!({"extra_ids": 1_000_000_000_000u64}), "at most");
        check_refused(T5, json!({"extra_ids": -1}), "at most");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Cut anywhere and with any byte changed, a model loads and encodes, or is refused; nothing panics.
        #[test]
        fn damaged_models_do_no_harm(cut in 0..T5.len(), place in 0..T5.len(), byte: u8) {
            let mut changed = T5.to_vec();
            changed[place] = byte;
            for model in [&T5[..cut], &changed] {
                let encoded = load_bytes(model, json!({})).and_then(|tokenizer| tokenizer.encode("Å ﬁ e\u{301}", true));
                let harmless = matches!(encoded, Ok(_) | Err(Error::Checkpoint { .. } | Error::InvalidRequest { .. }));
                prop_assert!(harmless, "{encoded:?}");
            }
        }
    }
}
