//! Where the tokens of a text begin in it.
//!
//! Does not know: how the text became tokens.

use super::Tokenizer;

impl Tokenizer {
    /// For each of the `tokens` that were made of `text` how many of its characters stand before the one that the token begins
    /// or goes on with. Special tokens that were put around a text have no place of their own. Exact as far as the bytes of the
    /// tokens are those of the text; where a tokenizer changed it (its first space, Unicode's normal forms), near that.
    pub fn places(&self, tokens: &[u32], text: &str) -> Vec<usize> {
        let text = text.as_bytes();
        let mut end = 0;
        // Characters of which a byte stands before `end`, and whether the last one is whole.
        let mut begun = 0;
        tokens
            .iter()
            .map(|token| {
                let is_within = text.get(end).is_some_and(|byte| !is_first(*byte));
                let place = if is_within { begun - 1 } else { begun };
                let next = (end + self.num_bytes_at(*token, &text[end..], end == 0)).min(text.len());
                begun += text[end..next].iter().filter(|byte| is_first(**byte)).count();
                end = next;
                place
            })
            .collect()
    }

    /// Bytes of what is left of a text that are a token's.
    fn num_bytes_at(&self, token: u32, rest: &[u8], is_first: bool) -> usize {
        let bytes = self.bytes_of(token);
        if rest.starts_with(&bytes) {
            return bytes.len();
        }
        // SentencePiece puts a space before a text.
        match bytes.strip_prefix(b" ").filter(|_| is_first) {
            Some(without) if rest.starts_with(without) => without.len(),
            _ if self.has_text(token, true) => bytes.len(),
            _ => 0,
        }
    }
}

/// Whether a byte of UTF-8 begins a character.
fn is_first(byte: u8) -> bool {
    byte & 0b1100_0000 != 0b1000_0000
}

#[cfg(test)]
mod tests {
    use super::super::bytes;
    use super::*;

    #[test]
    fn tokens_have_the_places_of_their_characters() {
        let folder = tempfile::tempdir().expect("a folder");
        bytes::write(folder.path(), bytes::Around::Nothing).expect("written");
        let tokenizer = Tokenizer::from_dir(folder.path()).expect("a tokenizer");
        let places = |text: &str| tokenizer.places(&tokenizer.encode(text, false).expect("tokens"), text);
        assert_eq!(places("ab c"), [0, 1, 2, 3]);
        // Two and four bytes, a token each.
        assert_eq!(places("a\u{e9}\u{1f642}b"), [0, 1, 1, 2, 2, 2, 2, 3]);
        // A token around the text has no characters of it; one within it does.
        let end = tokenizer.eos_token_id().expect("one");
        assert_eq!(tokenizer.places(&[end, 97, end], "a"), [0, 0, 1]);
        assert_eq!(tokenizer.places(&[97, 98], ""), [0, 0]);
    }
}
