//! `logprobs` and `echo` of answers, in the two shapes of OpenAI's API.
//!
//! Owns: what of a choice's tokens is written with which text, and how. Does not know: how likely anything is
//! ([`TokenLogprobs`]).

use std::collections::VecDeque;
use std::sync::Arc;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use tale_models::TextCard;
use tale_models::request::{PlacedLogprobs, TextRequest, TokenLogprobs};
use tale_models::text_parameters::MAX_LOGPROBS;
use tale_models::tokenizer::Tokenizer;

use super::Shape;
use crate::http::error::ApiError;

/// OpenAI's number for what is less likely than any other.
const LEAST_LOGPROB: f32 = -9999.0;
/// Tokens that are written at a time.
const MAX_PART_TOKENS: usize = 64;

/// Refuses what could become more than [`MAX_LOGPROBS`]; `count` requests are as this one.
pub(super) fn check_count(request: &TextRequest, count: usize) -> Result<(), ApiError> {
    let of_answer = request.logprobs.map_or(0, |top| request.max_tokens.saturating_mul(1 + top));
    let of_prompt = request.prompt_logprobs.map_or(0, |top| request.prompt.len().saturating_mul(1 + top));
    let all = of_answer.saturating_add(of_prompt).saturating_mul(count);
    if all <= MAX_LOGPROBS {
        return Ok(());
    }
    let problem = format!(
        "are up to {all} numbers with answers as long as they may become; at most {MAX_LOGPROBS}: give max_tokens, or ask for fewer"
    );
    Err(ApiError::field("logprobs", problem))
}

/// A prompt that its answers begin with.
#[derive(Debug)]
pub(super) struct Echo {
    pub(super) text: String,
    tokens: Vec<u32>,
    /// Of each token in the text.
    places: Vec<usize>,
}

impl Echo {
    /// `text` is what the client gave, if it gave a text and all of it became these tokens.
    pub(super) fn new(card: &TextCard, tokens: &[u32], text: Option<String>) -> tale_models::Result<Self> {
        let text = text.map_or_else(|| card.tokenizer.decode_all(tokens), Ok)?;
        let places = card.tokenizer.places(tokens, &text);
        Ok(Self { text, tokens: tokens.to_vec(), places })
    }

    /// Its tokens; nothing is told of the first one.
    pub(super) fn told(&self, of_others: Vec<TokenLogprobs>) -> impl Iterator<Item = Told> {
        let first = Told { token: self.tokens[0], offset: self.places[0], logprob: None, top: Box::default() };
        let others = of_others.into_iter().zip(&self.places[1..]).map(|(of, place)| Told::new(of, *place));
        std::iter::once(first).chain(others)
    }
}

/// What is told of one token.
#[derive(Debug)]
pub(super) struct Told {
    token: u32,
    /// Characters of the choice's text before it.
    pub(super) offset: usize,
    logprob: Option<f32>,
    top: Box<[(u32, f32)]>,
}

impl Told {
    fn new(of: TokenLogprobs, offset: usize) -> Self {
        let TokenLogprobs { token, logprob, top } = of;
        Self { token, offset, logprob: Some(logprob), top }
    }

    /// A token of an answer in a text where so many characters come before.
    pub(super) fn behind(before: usize, placed: PlacedLogprobs) -> Self {
        Self::new(placed.logprobs, before + placed.offset)
    }

    /// Bytes of JSON, more or less.
    pub(super) fn num_bytes(&self) -> usize {
        64 * (1 + self.top.len())
    }
}

/// Text and the tokens that begin in it.
#[derive(Debug, Default)]
pub(super) struct Part {
    pub(super) text: String,
    pub(super) told: Vec<Told>,
}

/// The text and the tokens of a choice as they come.
#[derive(Debug, Default)]
pub(super) struct Telling {
    /// Before any other text.
    echo: Option<Arc<Echo>>,
    /// Its characters.
    before: usize,
    /// Characters that are in parts.
    given: usize,
    waiting: VecDeque<Told>,
    parts: VecDeque<Part>,
    /// What comes is told no more.
    is_over: bool,
}

impl Telling {
    /// `tells` whether there are tokens beside texts.
    pub(super) fn new(echo: Option<Arc<Echo>>, tells: bool) -> Self {
        let before = echo.as_ref().map_or(0, |echo| echo.text.chars().count());
        let mut telling = Self { echo, before, ..Self::default() };
        if !tells {
            telling.echo_text();
        }
        telling
    }

    fn echo_text(&mut self) {
        if let Some(echo) = self.echo.take() {
            self.add_text(echo.text.clone());
        }
    }

    /// The tokens of the prompt, with its text.
    pub(super) fn add_prompt(&mut self, of_others: Vec<TokenLogprobs>) {
        if let Some(echo) = &self.echo {
            self.waiting.extend(echo.told(of_others));
        }
        self.echo_text();
    }

    /// Tokens that come with the next text or later ones.
    pub(super) fn add_tokens(&mut self, placed: Vec<PlacedLogprobs>) {
        let before = self.before;
        let told = placed.into_iter().map(|placed| Told::behind(before, placed));
        self.waiting.extend(told.filter(|_| !self.is_over));
    }

    /// Text, in parts of not too many tokens each.
    pub(super) fn add_text(&mut self, mut text: String) {
        let mut begin = self.given;
        self.given += text.chars().count();
        let end = self.waiting.partition_point(|told| told.offset < self.given);
        let mut told: Vec<Told> = self.waiting.drain(..end).collect();
        while told.len() > MAX_PART_TOKENS {
            let others = told.split_off(MAX_PART_TOKENS);
            let place = text.char_indices().nth(others[0].offset.saturating_sub(begin));
            let rest = text.split_off(place.map_or(text.len(), |(byte, _)| byte));
            begin = begin.max(others[0].offset);
            self.parts.push_back(Part {
                text: std::mem::replace(&mut text, rest),
                told: std::mem::replace(&mut told, others),
            });
        }
        if !(text.is_empty() && told.is_empty()) {
            self.parts.push_back(Part { text, told });
        }
    }

    /// What comes from here on is no content.
    pub(super) fn end(&mut self) {
        self.is_over = true;
        self.waiting.clear();
    }

    /// Tokens without text at the end.
    pub(super) fn rest(&mut self) -> Vec<Told> {
        std::mem::take(&mut self.waiting).into()
    }

    /// The next part to write.
    pub(super) fn next_part(&mut self) -> Option<Part> {
        self.parts.pop_front()
    }
}

/// `logprobs` of a choice.
pub(super) struct WireLogprobs<'a> {
    pub(super) shape: Shape,
    /// `None` where a message has no content.
    pub(super) told: Option<&'a [Told]>,
    pub(super) tokenizer: &'a Tokenizer,
}

impl Serialize for WireLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { shape, told, tokenizer } = *self;
        match shape {
            Shape::Chat => {
                let content = told.map(|told| Listed(told, ContentToken::new, tokenizer));
                Content { content, refusal: None }.serialize(serializer)
            }
            Shape::Completion => {
                let told = told.unwrap_or_default();
                CompletionLogprobs {
                    tokens: Listed(told, |told, tokenizer| spelled(&tokenizer.bytes_of(told.token)), tokenizer),
                    token_logprobs: Listed(told, |told, _| told.logprob.map(at_least), tokenizer),
                    top_logprobs: Listed(told, Alternatives::of, tokenizer),
                    text_offset: Listed(told, |told, _| told.offset, tokenizer),
                }
                .serialize(serializer)
            }
        }
    }
}

/// A list of what is made of each token while it is written.
struct Listed<'a, T>(&'a [Told], fn(&'a Told, &'a Tokenizer) -> T, &'a Tokenizer);

impl<T: Serialize> Serialize for Listed<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(told, make, tokenizer) = self;
        serializer.collect_seq(told.iter().map(|told| make(told, tokenizer)))
    }
}

#[derive(Serialize)]
struct Content<C> {
    content: Option<C>,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct ContentToken {
    #[serde(flatten)]
    token: WireToken,
    top_logprobs: Vec<WireToken>,
}

#[derive(Serialize)]
struct WireToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ContentToken {
    fn new(told: &Told, tokenizer: &Tokenizer) -> Self {
        let top_logprobs =
            told.top.iter().map(|(token, logprob)| WireToken::new(*token, *logprob, tokenizer)).collect();
        Self { token: WireToken::new(told.token, told.logprob.unwrap_or(0.0), tokenizer), top_logprobs }
    }
}

impl WireToken {
    fn new(token: u32, logprob: f32, tokenizer: &Tokenizer) -> Self {
        let bytes = tokenizer.bytes_of(token);
        Self { token: spelled(&bytes), logprob: at_least(logprob), bytes }
    }
}

/// One list for each of these, with an element for each token.
#[derive(Serialize)]
struct CompletionLogprobs<A, B, C, D> {
    tokens: A,
    token_logprobs: B,
    top_logprobs: C,
    text_offset: D,
}

/// The most likely tokens in the place of one and, as in OpenAI's API, the one itself if it is none of them. Of tokens that are
/// spelled alike the most likely one.
struct Alternatives<'a> {
    told: &'a Told,
    tokenizer: &'a Tokenizer,
}

impl<'a> Alternatives<'a> {
    fn of(told: &'a Told, tokenizer: &'a Tokenizer) -> Option<Self> {
        told.logprob.map(|_| Self { told, tokenizer })
    }
}

impl Serialize for Alternatives<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let own = self.told.logprob.map(|logprob| (self.told.token, logprob));
        let mut written: Vec<String> = Vec::with_capacity(1 + self.told.top.len());
        let mut map = serializer.serialize_map(None)?;
        for (token, logprob) in self.told.top.iter().copied().chain(own) {
            let token = spelled(&self.tokenizer.bytes_of(token));
            if !written.contains(&token) {
                map.serialize_entry(&token, &at_least(logprob))?;
                written.push(token);
            }
        }
        map.end()
    }
}

/// JSON has no infinities.
fn at_least(logprob: f32) -> f32 {
    logprob.max(LEAST_LOGPROB)
}

/// A token as text, and one that is a part of a character as OpenAI's API writes it: `bytes:\xe2\x80`.
fn spelled(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |spelled, byte| spelled + &format!("\\x{byte:02x}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(offset: usize) -> PlacedLogprobs {
        PlacedLogprobs { offset, logprobs: TokenLogprobs { token: 0, logprob: -1.0, top: Box::default() } }
    }

    #[test]
    fn parts_are_cut_between_tokens() {
        let mut telling = Telling::new(None, true);
        // Every second token goes on with a character that the one before began.
        let count = 2 * MAX_PART_TOKENS + 1;
        telling.add_tokens((0..count).map(|token| placed(token / 2)).collect());
        telling.add_text("é".repeat(count / 2));
        let mut parts = std::iter::from_fn(|| telling.next_part());
        for _ in 0..2 {
            let Part { text, told } = parts.next().expect("one");
            assert_eq!((text.chars().count(), told.len()), (MAX_PART_TOKENS / 2, MAX_PART_TOKENS));
        }
        assert!(parts.next().is_none());
        // The last one has no text.
        assert_eq!(telling.rest().len(), 1);
    }

    #[test]
    fn tokens_that_are_no_text_are_spelled_as_bytes() {
        assert_eq!(spelled("é".as_bytes()), "é");
        assert_eq!(spelled(&[0xe2, 0x80]), r"bytes:\xe2\x80");
    }
}
