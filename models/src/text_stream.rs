//! From tokens to text as it becomes certain: incremental detokenisation and stop strings.
//!
//! Owns: what of an answer may be shown already. Text is held back while a character is incomplete or while a stop
//! string may be coming. Deliberately does not know: where tokens come from, end-of-sequence ids, HTTP.
//!
//! All pieces joined are the text of all tokens, cut where the first stop string begins: however the text falls into
//! tokens, and whichever stop string is complete first.

use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// What is done with the tokens and the end of an answer.
#[derive(Debug, Clone, Default)]
pub struct StreamOptions {
    /// The text ends at the first of these.
    pub stop: Vec<String>,
    /// Behind it, and not before it.
    pub include_stop: bool,
    /// Special tokens have text, as they are spelled.
    pub spells_special: bool,
}

/// Turns the tokens of one answer into text pieces.
#[derive(Debug)]
pub struct TextStream {
    detokenizer: Detokenizer,
    stops: StopMatcher,
}

/// Text that became certain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Piece {
    /// New text, valid UTF-8; may be empty while a character or a possible stop string is incomplete.
    pub text: String,
    /// A stop string was reached; the text ends there and nothing more may be pushed.
    pub stopped: bool,
}

impl TextStream {
    /// `prompt` gives context to tokenizers whose first token depends on what is before it.
    pub fn new(tokenizer: Tokenizer, prompt: &[u32], options: StreamOptions) -> Self {
        let StreamOptions { stop, include_stop, spells_special } = options;
        let detokenizer = Detokenizer::new(tokenizer, prompt, !spells_special);
        Self { detokenizer, stops: StopMatcher::new(stop, include_stop) }
    }

    /// Adds one token.
    pub fn push(&mut self, token: u32) -> Result<Piece> {
        let text = self.detokenizer.push(token)?;
        Ok(self.stops.push(&text))
    }

    /// Adds one token that comes before any that are looked through for stop strings.
    pub fn push_early(&mut self, token: u32) -> Result<Piece> {
        Ok(Piece { text: self.detokenizer.push(token)?, stopped: false })
    }

    /// Characters that are held back, since a stop string may be coming.
    pub fn num_held(&self) -> usize {
        self.stops.held.chars().count()
    }

    /// The text that was held back (incomplete characters as U+FFFD), when the answer ends without a stop string.
    pub fn finish(mut self) -> Result<String> {
        let last = self.detokenizer.finish()?;
        let mut text = self.stops.push(&last).text;
        text.push_str(&self.stops.finish());
        Ok(text)
    }
}

/// Two kinds of vocabulary: where a token is a run of bytes, and where its text depends on its neighbours.
#[derive(Debug)]
enum Detokenizer {
    Bytes { tokenizer: Tokenizer, skips_special: bool, decoder: Utf8Decoder },
    Window(WindowDecoder),
}

impl Detokenizer {
    fn new(tokenizer: Tokenizer, prompt: &[u32], skips_special: bool) -> Self {
        if tokenizer.is_byte_level() {
            Self::Bytes { tokenizer, skips_special, decoder: Utf8Decoder::default() }
        } else {
            Self::Window(WindowDecoder::new(tokenizer, prompt, skips_special))
        }
    }

    fn push(&mut self, token: u32) -> Result<String> {
        match self {
            Self::Bytes { tokenizer, skips_special, decoder } => {
                Ok(decoder.push(&tokenizer.token_bytes(token, *skips_special)))
            }
            Self::Window(window) => window.push(token),
        }
    }

    fn finish(&mut self) -> Result<String> {
        match self {
            Self::Bytes { decoder, .. } => Ok(decoder.finish()),
            Self::Window(window) => window.finish(),
        }
    }
}

/// Bytes to text as `String::from_utf8_lossy` would do with all of them at once.
#[derive(Debug, Default)]
struct Utf8Decoder {
    /// The beginning of a character, at most three bytes between calls.
    pending: Vec<u8>,
}

impl Utf8Decoder {
    fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut incomplete = 0;
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let is_last = chunks.peek().is_none();
            if is_last && may_become_a_character(chunk.invalid()) {
                incomplete = chunk.invalid().len();
            } else if !chunk.invalid().is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - incomplete);
        text
    }

    fn finish(&mut self) -> String {
        let is_empty = std::mem::take(&mut self.pending).is_empty();
        if is_empty { String::new() } else { char::REPLACEMENT_CHARACTER.into() }
    }
}

/// Whether invalid bytes at the end are only the first part of a character.
fn may_become_a_character(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|e| e.error_len().is_none())
}

/// For vocabularies with spaces and bytes as pieces (SentencePiece): decodes a short window of tokens before and after
/// each token, and takes the difference. As vLLM's `detokenize_incrementally`.
#[derive(Debug)]
struct WindowDecoder {
    tokenizer: Tokenizer,
    skips_special: bool,
    window: Vec<u32>,
    /// Tokens at the front of `window` whose text was given out.
    num_given: usize,
}

impl WindowDecoder {
    /// Tokens of the prompt that stand before the first one: enough for the space before a word.
    const CONTEXT: usize = 6;
    /// A character is at most this many tokens; a text that still ends in U+FFFD then is not UTF-8.
    const CHARACTER: usize = 4;

    fn new(tokenizer: Tokenizer, prompt: &[u32], skips_special: bool) -> Self {
        let with_text = prompt.iter().rev().filter(|token| tokenizer.has_text(**token, skips_special));
        let mut window: Vec<u32> = with_text.take(Self::CONTEXT).copied().collect();
        window.reverse();
        Self { tokenizer, skips_special, num_given: window.len(), window }
    }

    fn push(&mut self, token: u32) -> Result<String> {
        // In a window without text the next word would lose its space as a first one does.
        if !self.tokenizer.has_text(token, self.skips_special) {
            return Ok(String::new());
        }
        self.window.push(token);
        let text = self.new_text()?;
        let num_waiting = self.window.len() - self.num_given;
        if text.ends_with(char::REPLACEMENT_CHARACTER) && num_waiting < Self::CHARACTER {
            return Ok(String::new());
        }
        self.window.drain(..self.num_given);
        self.num_given = self.window.len();
        Ok(text)
    }

    fn finish(&mut self) -> Result<String> {
        let text = self.new_text()?;
        self.num_given = self.window.len();
        Ok(text)
    }

    /// What the tokens that wait add to the text of those before them.
    fn new_text(&self) -> Result<String> {
        let before = self.decode(&self.window[..self.num_given])?;
        let whole = self.decode(&self.window)?;
        match whole.strip_prefix(&before) {
            Some(new) => Ok(new.to_string()),
            // Bytes that are no text spoil those before them, which are given out already.
            None => self.decode(&self.window[self.num_given..]),
        }
    }

    fn decode(&self, tokens: &[u32]) -> Result<String> {
        if self.skips_special { self.tokenizer.decode(tokens) } else { self.tokenizer.decode_all(tokens) }
    }
}

/// Finds stop strings in text that comes piece by piece, in time linear in the new text for each stop string.
#[derive(Debug)]
struct StopMatcher {
    stops: Vec<StopString>,
    /// Text that may be the beginning of a stop string: shorter than the longest one.
    held: String,
    /// Where the first complete stop string begins in `held`, and where it ends.
    complete: Option<(usize, usize)>,
    /// The text ends behind it and not before it.
    include_stop: bool,
    stopped: bool,
}

impl StopMatcher {
    fn new(stops: Vec<String>, include_stop: bool) -> Self {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).map(StopString::new).collect();
        Self { stops, held: String::new(), complete: None, include_stop, stopped: false }
    }

    /// A stop string that is complete still waits for one that began before it and may yet be completed: the first to
    /// begin wins, so that the cut does not depend on how the text falls into tokens.
    fn push(&mut self, text: &str) -> Piece {
        if self.stopped {
            return Piece { text: String::new(), stopped: true };
        }
        self.read(text);
        let open = self.first_open();
        self.stopped = self.complete.is_some_and(|(begin, _)| open.is_none_or(|open| begin <= open));
        let end = if self.stopped { self.end() } else { open };
        let text = self.take_until(end.unwrap_or(self.held.len()));
        Piece { text, stopped: self.stopped }
    }

    /// No more text comes: what is open will never be complete.
    fn finish(mut self) -> String {
        if self.stopped {
            return String::new();
        }
        let end = self.end().unwrap_or(self.held.len());
        self.take_until(end)
    }

    /// Where the text ends, if at a stop string.
    fn end(&self) -> Option<usize> {
        self.complete.map(|(begin, end)| if self.include_stop { end } else { begin })
    }

    /// Adds `text` to what is held.
    fn read(&mut self, text: &str) {
        let start = self.held.len();
        self.held.push_str(text);
        for stop in &mut self.stops {
            for (end, byte) in (start + 1..).zip(text.bytes()) {
                if stop.advance(byte) {
                    let found = (end - stop.text.len(), end);
                    self.complete = Some(self.complete.map_or(found, |first| first.min(found)));
                }
            }
        }
    }

    /// Where the first text begins that more text could turn into a stop string.
    fn first_open(&self) -> Option<usize> {
        let longest = self.stops.iter().map(|stop| stop.matched).max().filter(|matched| *matched > 0)?;
        Some(self.held.len() - longest)
    }

    fn take_until(&mut self, end: usize) -> String {
        self.complete = self.complete.and_then(|(begin, last)| Some((begin.checked_sub(end)?, last - end)));
        let rest = self.held.split_off(end);
        std::mem::replace(&mut self.held, rest)
    }
}

/// One stop string and how much of it the text so far ends in, after Knuth, Morris and Pratt. A beginning of it that
/// lies in valid UTF-8 begins and ends between characters.
#[derive(Debug)]
struct StopString {
    text: Box<[u8]>,
    /// For each beginning of `text`, by its length less one: the longest shorter beginning in which it ends.
    borders: Box<[u32]>,
    /// Bytes of the longest beginning of `text`, short of the whole, in which what was read ends.
    matched: usize,
}

impl StopString {
    fn new(text: String) -> Self {
        let text = text.into_bytes().into_boxed_slice();
        let mut stop = Self { borders: vec![0; text.len()].into(), text, matched: 0 };
        // The beginnings of a text in which its own parts end are found by reading it from its second byte on.
        for at in 1..stop.text.len() {
            stop.matched = stop.next(stop.text[at]);
            stop.borders[at] = stop.matched as u32;
        }
        stop.matched = 0;
        stop
    }

    /// Bytes that match once `byte` is read; of more than were known to match, at most the whole.
    fn next(&self, byte: u8) -> usize {
        let mut matched = self.matched;
        while matched > 0 && self.text[matched] != byte {
            matched = self.borders[matched - 1] as usize;
        }
        matched + usize::from(self.text[matched] == byte)
    }

    /// Reads one byte and says whether the stop string is complete with it.
    fn advance(&mut self, byte: u8) -> bool {
        self.matched = self.next(byte);
        let is_complete = self.matched == self.text.len();
        if is_complete {
            self.matched = self.borders[self.matched - 1] as usize;
        }
        is_complete
    }
}

#[cfg(test)]
mod tests;
