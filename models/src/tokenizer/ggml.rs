//! Tokenizers that lie inside GGUF files.
//!
//! Owns: what llama.cpp's names for ways of splitting text mean, and building a tokenizer that gives the ids of the
//! `tokenizer.json` from which such a vocabulary was made. Does not know: metadata and their keys.
//!
//! Source: llama.cpp `src/llama-vocab.cpp` (`llama_vocab::impl::load`), `conversion/base.py`; for what a published
//! `tokenizer.json` has of which only a name is left, transformers `convert_slow_tokenizer.py` (`LlamaConverter`,
//! `Qwen2Converter`, `generate_merges`).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

use super::outline::{Extent, MAX_ADDED_TOKENS, MAX_MERGES, count_problem, piece_problem};
use super::pieces::LLAMA3_WORDS;
use super::vocab_merges::QWEN2_WORDS;
use super::{Loaded, SpecialTokens};
use crate::error::{Error, Result};

/// Mistral's Tekken splits by letters' cases too.
const TEKKEN_WORDS: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Stands for a space inside the tokens of a SentencePiece model.
const SPACE: &str = "\u{2581}";
/// Most bytes of all tokens of a SentencePiece model, each of which is tried as the end of a merge. Gemma 3's have 2 MB.
const MAX_PIECES_BYTES: usize = 16 << 20;

/// A vocabulary as a GGUF file has it.
#[derive(Debug, Default)]
pub(crate) struct Vocabulary {
    /// In the order of their ids.
    pub tokens: Vec<Token>,
    pub kind: VocabularyKind,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unknown: Option<u32>,
    pub padding: Option<u32>,
    /// Whether a text begins with `bos` and ends with `eos`; what that is where the file does not say depends on the kind.
    pub adds_bos: Option<bool>,
    pub adds_eos: Option<bool>,
}

/// `tokenizer.ggml.model`.
#[derive(Debug)]
pub(crate) enum VocabularyKind {
    /// `gpt2`: pairs of bytes.
    ByteLevel {
        /// `tokenizer.ggml.pre`.
        pre: String,
        /// By priority.
        merges: Vec<(String, String)>,
    },
    /// `llama`: SentencePiece's pairs of characters, merged by the scores of what they become.
    SentencePiece {
        /// Of each token.
        scores: Vec<f32>,
        /// Whether a space is put before a text.
        adds_space_prefix: bool,
    },
}

impl Default for VocabularyKind {
    fn default() -> Self {
        Self::SentencePiece { scores: Vec::new(), adds_space_prefix: true }
    }
}

/// A token and what it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Token {
    pub text: String,
    pub kind: TokenKind,
}

/// `llama_token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl TokenKind {
    /// By the number in `tokenizer.ggml.token_type`.
    pub(crate) fn of(number: i128) -> Option<Self> {
        Some(match number {
            // 0 is of tokens of whose kind nothing is known.
            0 | 1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }

    /// How it is found in text before the model looks, if it is.
    fn added(self, text: &str) -> Option<AddedToken> {
        match self {
            Self::Control | Self::Unknown => Some(AddedToken::from(text, true).normalized(false)),
            Self::UserDefined => Some(AddedToken::from(text, false).normalized(false)),
            Self::Normal | Self::Unused | Self::Byte => None,
        }
    }
}

/// What one of llama.cpp's names for a way of splitting means.
struct Pre {
    names: &'static [&'static str],
    words: Words,
    /// Whether text is composed first.
    composes: bool,
    /// Whether a word that is a token is taken whole, whatever the merges say.
    takes_words_whole: bool,
    /// Whether a text begins with `bos` where the file does not say.
    adds_bos: bool,
}

#[derive(Clone, Copy)]
enum Words {
    /// The expression of GPT-2, which the `tokenizers` crate has built in.
    Gpt2,
    /// Digits one by one, and then as GPT-2.
    DigitsThenGpt2,
    Expression(&'static str),
}

const PRES: &[Pre] = &[
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3"],
        words: Words::Expression(LLAMA3_WORDS),
        composes: false,
        takes_words_whole: true,
        adds_bos: true,
    },
    Pre {
        names: &["smaug-bpe"],
        words: Words::Expression(LLAMA3_WORDS),
        composes: false,
        takes_words_whole: false,
        adds_bos: false,
    },
    Pre {
        names: &["qwen2", "deepseek-r1-qwen", "megrez"],
        words: Words::Expression(QWEN2_WORDS),
        composes: true,
        takes_words_whole: false,
        adds_bos: false,
    },
    Pre {
        names: &["smollm", "starcoder", "refact"],
        words: Words::DigitsThenGpt2,
        composes: false,
        takes_words_whole: false,
        adds_bos: false,
    },
    Pre { names: &["gpt-2"], words: Words::Gpt2, composes: false, takes_words_whole: false, adds_bos: false },
    Pre {
        names: &["tekken"],
        words: Words::Expression(TEKKEN_WORDS),
        composes: false,
        takes_words_whole: true,
        adds_bos: true,
    },
];

/// The tokenizer of the GGUF file at `path`.
pub(super) fn load(path: &Path, vocabulary: &Vocabulary) -> Result<Loaded> {
    let refused = |problem: String| Error::checkpoint(path, problem);
    if let Some(problem) = vocabulary.problem() {
        return Err(refused(problem));
    }
    let (tokenizer, adds_bos) = match &vocabulary.kind {
        VocabularyKind::ByteLevel { pre, merges } => {
            let known = PRES.iter().find(|known| known.names.contains(&pre.as_str()));
            let pre = known.ok_or_else(|| refused(unknown_pre(pre)))?;
            (byte_level(vocabulary, merges.clone(), pre), pre.adds_bos)
        }
        VocabularyKind::SentencePiece { scores, adds_space_prefix } => {
            let merges = merges_by_score(vocabulary, scores).map_err(refused)?;
            (sentence_piece(vocabulary, merges, *adds_space_prefix), true)
        }
    };
    let mut tokenizer = tokenizer.map_err(|error| refused(format!("its vocabulary: {error}")))?;
    vocabulary.add_special(&mut tokenizer, adds_bos).map_err(refused)?;
    Ok(Loaded {
        tokenizer,
        special: vocabulary.special_tokens(),
        path: path.to_owned(),
        highest_model_id: vocabulary.tokens.len().saturating_sub(1) as u32,
    })
}

fn unknown_pre(pre: &str) -> String {
    let known = PRES.iter().flat_map(|pre| pre.names).copied().collect::<Vec<_>>().join(", ");
    format!("`tokenizer.ggml.pre` is `{pre}`, a way of splitting text that is not known; known are {known}")
}

impl Vocabulary {
    /// The spelling of a token.
    fn text(&self, id: Option<u32>) -> Option<&str> {
        self.tokens.get(id? as usize).map(|token| token.text.as_str())
    }

    /// Tokens that have names, by which chat templates ask for them too.
    fn named(&self) -> [(&'static str, Option<u32>); 4] {
        [("bos_token", self.bos), ("eos_token", self.eos), ("unk_token", self.unknown), ("pad_token", self.padding)]
    }

    fn special_tokens(&self) -> SpecialTokens {
        let token = |(name, id): (&str, Option<u32>)| Some((name.to_owned(), AddedToken::from(self.text(id)?, true)));
        self.named().into_iter().filter_map(token).collect()
    }

    /// Spellings of the special tokens by the names under which chat templates find them.
    pub(crate) fn spellings(&self) -> BTreeMap<String, String> {
        self.special_tokens().into_iter().map(|(name, token)| (name, token.content)).collect()
    }

    /// What is wrong with it, whatever is built of it.
    fn problem(&self) -> Option<String> {
        let texts = || self.tokens.iter().map(|token| token.text.as_str());
        if let Some(problem) = Extent::of_list(texts()).problem() {
            return Some(format!("`tokenizer.ggml.tokens` {problem}"));
        }
        if self.tokens.is_empty() {
            return Some("`tokenizer.ggml.tokens` is empty".to_owned());
        }
        let mut seen = BTreeSet::new();
        let has_text = |token: &&Token| token.kind != TokenKind::Unused && !token.text.is_empty();
        if let Some(twice) = self.tokens.iter().filter(has_text).find(|token| !seen.insert(token.text.as_str())) {
            return Some(format!("`tokenizer.ggml.tokens` has {:?} twice", twice.text));
        }
        let beyond = |(_, id): &(&str, Option<u32>)| id.is_some_and(|id| id as usize >= self.tokens.len());
        if let Some((name, id)) = self.named().into_iter().find(beyond) {
            let id = id.unwrap_or_default();
            return Some(format!("{name} is {id}; `tokenizer.ggml.tokens` has {}", self.tokens.len()));
        }
        let added = self.tokens.iter().filter(|token| token.kind.added(&token.text).is_some()).count();
        let merges = match &self.kind {
            VocabularyKind::ByteLevel { merges, .. } => merges.as_slice(),
            VocabularyKind::SentencePiece { .. } => &[],
        };
        let longest = merges.iter().map(|(start, end)| start.len() + end.len()).max().unwrap_or(0);
        count_problem("special tokens", added, MAX_ADDED_TOKENS)
            .or_else(|| count_problem("merges", merges.len(), MAX_MERGES))
            .or_else(|| piece_problem(longest))
    }

    /// Tokens by their spelling; those that are never made have none.
    fn by_text(&self) -> Vocab {
        let tokens = self.tokens.iter().zip(0..);
        let used = tokens.filter(|(token, _)| token.kind != TokenKind::Unused && !token.text.is_empty());
        used.map(|(token, id)| (token.text.clone(), id)).collect()
    }

    /// The tokens that are found in text before the model looks, and those around every text.
    fn add_special(&self, tokenizer: &mut Tokenizer, adds_bos: bool) -> std::result::Result<(), String> {
        let added: Vec<AddedToken> = self.tokens.iter().filter_map(|token| token.kind.added(&token.text)).collect();
        if !added.is_empty() {
            tokenizer.add_tokens(added).map_err(|error| error.to_string())?;
        }
        let bos = self.around("bos", self.bos, self.adds_bos, adds_bos)?;
        let eos = self.around("eos", self.eos, self.adds_eos, false)?;
        let special: Vec<SpecialToken> = bos.iter().chain(&eos).cloned().collect();
        if special.is_empty() {
            return Ok(());
        }
        let names = [bos.map(|_| "bos"), Some("$A"), eos.map(|_| "eos")].into_iter().flatten();
        let names: Vec<String> = names.map(str::to_owned).collect();
        let mut template = TemplateProcessing::builder();
        template.try_single(names).map_err(|error| error.to_string())?;
        let template = template.special_tokens(special).build().map_err(|error| error.to_string())?;
        tokenizer.with_post_processor(Some(template));
        Ok(())
    }

    /// The token `name` of a text's beginning or end, if there is one: as the file says, or else as the kind of vocabulary
    /// does.
    fn around(
        &self,
        name: &str,
        id: Option<u32>,
        said: Option<bool>,
        of_kind: bool,
    ) -> std::result::Result<Option<SpecialToken>, String> {
        match (id, said) {
            (None, Some(true)) => Err(format!(
                "`tokenizer.ggml.add_{name}_token` is true and `tokenizer.ggml.{name}_token_id` is missing"
            )),
            (Some(id), said) if said.unwrap_or(of_kind) => {
                let text = self.text(Some(id)).unwrap_or_default().to_owned();
                SpecialToken::new(name.to_owned(), vec![id], vec![text]).map(Some).map_err(|error| error.to_string())
            }
            _ => Ok(None),
        }
    }
}

/// Byte-level pairs as published by `tokenizers`.
fn byte_level(vocabulary: &Vocabulary, merges: Merges, pre: &Pre) -> tokenizers::Result<Tokenizer> {
    let pairs = BPE::builder().vocab_and_merges(vocabulary.by_text(), merges);
    let mut tokenizer = Tokenizer::new(pairs.ignore_merges(pre.takes_words_whole).build()?);
    if pre.composes {
        tokenizer.with_normalizer(Some(NFC))?;
    }
    let bytes = |splits| PreTokenizerWrapper::from(ByteLevel::new(false, true, splits));
    let parts = match pre.words {
        Words::Gpt2 => vec![bytes(true)],
        Words::DigitsThenGpt2 => vec![Digits::new(true).into(), bytes(true)],
        Words::Expression(words) => {
            let pattern = SplitPattern::Regex(words.into());
            vec![Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into(), bytes(false)]
        }
    };
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(parts)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok(tokenizer)
}

/// Pairs of characters with bytes for those that have no token, as `LlamaConverter` makes them of a SentencePiece model.
fn sentence_piece(vocabulary: &Vocabulary, merges: Merges, adds_space_prefix: bool) -> tokenizers::Result<Tokenizer> {
    let vocab = vocabulary.by_text();
    let has_bytes = (0..=255u8).all(|byte| vocab.contains_key(format!("<0x{byte:02X}>").as_str()));
    let mut pairs = BPE::builder().vocab_and_merges(vocab, merges).fuse_unk(true).byte_fallback(has_bytes);
    if let Some(unknown) = vocabulary.text(vocabulary.unknown) {
        pairs = pairs.unk_token(unknown.to_owned());
    }
    let mut tokenizer = Tokenizer::new(pairs.build()?);
    let prefix = adds_space_prefix.then(|| Prepend::new(SPACE.to_owned()).into());
    let spaces = Replace::new(" ", SPACE)?.into();
    tokenizer.with_normalizer(Some(Normalizers::new(prefix.into_iter().chain([spaces]).collect())))?;
    let mut decoders = vec![Replace::new(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if adds_space_prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    Ok(tokenizer)
}

/// Pairs that make a token, by the token's score.
fn merges_by_score(vocabulary: &Vocabulary, scores: &[f32]) -> std::result::Result<Merges, String> {
    let tokens = &vocabulary.tokens;
    if scores.len() != tokens.len() {
        let (scores, tokens) = (scores.len(), tokens.len());
        return Err(format!("`tokenizer.ggml.scores` has {scores} values, `tokenizer.ggml.tokens` {tokens}"));
    }
    if scores.iter().any(|score| !score.is_finite()) {
        return Err("`tokenizer.ggml.scores` has a value that is no number".to_owned());
    }
    let num_bytes: usize = tokens.iter().map(|token| token.text.len()).sum();
    if num_bytes > MAX_PIECES_BYTES {
        return Err(format!("`tokenizer.ggml.tokens` has {num_bytes} bytes; at most {MAX_PIECES_BYTES}"));
    }
    let ids: HashMap<&str, usize> = tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.text.as_str(), id))
        .filter(|(text, _)| !text.is_empty())
        .collect();
    let mut found = Vec::new();
    for (token, score) in tokens.iter().zip(scores).filter(|(token, _)| token.kind == TokenKind::Normal) {
        let cuts = token.text.char_indices().skip(1).map(|(at, _)| token.text.split_at(at));
        let pairs = cuts.filter_map(|(start, end)| Some(((*ids.get(start)?, *ids.get(end)?), (start, end))));
        let mut of_token: Vec<_> = pairs.collect();
        of_token.sort_by_key(|(ids, _)| *ids);
        found.extend(of_token.into_iter().map(|(_, pair)| (*score, pair)));
        if let Some(problem) = count_problem("merges", found.len(), MAX_MERGES) {
            return Err(format!("`tokenizer.ggml.tokens` {problem}"));
        }
    }
    // The highest score first; of one score the longest tokens, and otherwise the order that they have.
    let lengths = |(start, end): (&str, &str)| (start.chars().count(), end.chars().count());
    found.sort_by(|(a, one), (b, two)| b.total_cmp(a).then_with(|| lengths(*two).cmp(&lengths(*one))));
    Ok(found.into_iter().map(|(_, (start, end))| (start.to_owned(), end.to_owned())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocabulary(tokens: &[(&str, TokenKind)], merges: &[(&str, &str)]) -> Vocabulary {
        let token = |(text, kind): &(&str, TokenKind)| Token { text: (*text).to_owned(), kind: *kind };
        let merges = merges.iter().map(|(start, end)| ((*start).to_owned(), (*end).to_owned())).collect();
        Vocabulary {
            tokens: tokens.iter().map(token).collect(),
            kind: VocabularyKind::ByteLevel { pre: "gpt-2".to_owned(), merges },
            ..Vocabulary::default()
        }
    }

    fn built(vocabulary: &Vocabulary) -> Result<super::super::Tokenizer> {
        super::super::Tokenizer::from_vocabulary(Path::new("model.gguf"), vocabulary)
    }

    #[track_caller]
    fn check_refused(vocabulary: &Vocabulary, words: &str) {
        let error = built(vocabulary).expect_err("refused").to_string();
        assert!(error.starts_with("model.gguf: ") && error.contains(words), "{error}");
    }

    const NORMAL: TokenKind = TokenKind::Normal;

    #[test]
    fn tokens_that_are_never_made_may_be_spelled_alike() {
        let unused = TokenKind::Unused;
        let tokens =
            [("a", NORMAL), ("b", NORMAL), ("ab", NORMAL), ("x", unused), ("x", unused), ("", NORMAL), ("", NORMAL)];
        let tokenizer = built(&vocabulary(&tokens, &[("a", "b")])).expect("sound");
        assert_eq!(tokenizer.encode("abb", true).expect("encodes"), [2, 1]);
        assert_eq!(tokenizer.decode(&[2, 3, 4, 5, 1]).expect("decodes"), "abb");
    }

    #[test]
    fn vocabularies_that_contradict_themselves_are_refused() {
        check_refused(&vocabulary(&[], &[]), "`tokenizer.ggml.tokens` is empty");
        check_refused(&vocabulary(&[("a", NORMAL), ("a", TokenKind::Control)], &[]), "has \"a\" twice");
        check_refused(&vocabulary(&[("a", NORMAL)], &[("a", "b")]), "its vocabulary: ");
        let long = "x".repeat(2000);
        check_refused(&vocabulary(&[(&long, NORMAL)], &[]), "has a token of 2000 bytes");
        let beyond = Vocabulary { padding: Some(7), ..vocabulary(&[("a", NORMAL)], &[]) };
        check_refused(&beyond, "pad_token is 7; `tokenizer.ggml.tokens` has 1");
        let nameless = Vocabulary { adds_eos: Some(true), ..vocabulary(&[("a", NORMAL)], &[]) };
        check_refused(&nameless, "`tokenizer.ggml.eos_token_id` is missing");
        let scores = |scores: Vec<f32>| Vocabulary {
            kind: VocabularyKind::SentencePiece { scores, adds_space_prefix: false },
            ..vocabulary(&[("a", NORMAL), ("b", NORMAL)], &[])
        };
        check_refused(&scores(vec![0.0]), "`tokenizer.ggml.scores` has 1 values, `tokenizer.ggml.tokens` 2");
        check_refused(&scores(vec![0.0, f32::NAN]), "a value that is no number");
    }

    #[test]
    fn texts_begin_and_end_as_is_said() {
        let tokens = [("a", NORMAL), ("<s>", TokenKind::Control), ("</s>", TokenKind::Control)];
        let ids = |adds_bos, adds_eos| {
            let ends = Vocabulary { bos: Some(1), eos: Some(2), adds_bos, adds_eos, ..vocabulary(&tokens, &[]) };
            built(&ends).expect("sound").encode("a</s>a", true).expect("encodes")
        };
        assert_eq!(ids(None, None), [0, 2, 0]);
        assert_eq!(ids(Some(true), None), [1, 0, 2, 0]);
        assert_eq!(ids(Some(true), Some(true)), [1, 0, 2, 0, 2]);
    }

    /// The pair of the highest score goes first, the leftmost of equal ones.
    #[test]
    fn pairs_of_a_sentencepiece_model_merge_by_score() {
        let texts = ["<unk>", "a", "b", "c", "ab", "bc", "abc"];
        let kind = |text: &str| if text == "<unk>" { TokenKind::Unknown } else { NORMAL };
        let tokens: Vec<(&str, TokenKind)> = texts.iter().map(|text| (*text, kind(text))).collect();
        let scored = |scores: [f32; 7]| {
            let kind = VocabularyKind::SentencePiece { scores: scores.to_vec(), adds_space_prefix: false };
            let tokenizer = built(&Vocabulary { kind, unknown: Some(0), ..vocabulary(&tokens, &[]) }).expect("sound");
            tokenizer.encode("abcbcx", true).expect("encodes")
        };
        assert_eq!(scored([0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0]), [6, 5, 0]);
        assert_eq!(scored([0.0, 0.0, 0.0, 0.0, -2.0, -1.0, -3.0]), [6, 5, 0]);
    }
}
