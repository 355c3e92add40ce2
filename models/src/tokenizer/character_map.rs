//! The character map of a SentencePiece normaliser (`precompiled_charsmap`): the bytes of a trie after their count, then
//! the replacements, each ended by a zero.
//!
//! Owns: what is wrong with one. The library trusts the count, and the trie when it first meets a character; here both are
//! tried first. Does not know: how text is normalised.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tokenizers::normalizers::Precompiled;

use crate::unpanicked::unpanicked;

/// Most bytes of a map; published have 330,000.
const MAX_MAP_BYTES: usize = 4 << 20;
/// Most bytes in place of one character; the longest ligature of Unicode becomes 33.
const MAX_REPLACEMENT_BYTES: usize = 1 << 8;
/// Beyond these characters there are none that anybody normalises.
const CHARACTERS: std::ops::Range<u32> = 1..0x3_0000;

/// As [`problem`], of a map as `tokenizer.json` has it.
pub(super) fn problem_of_base64(text: &str) -> Option<String> {
    if text.len() / 4 * 3 > MAX_MAP_BYTES {
        return Some(too_long(text.len() / 4 * 3));
    }
    match STANDARD.decode(text) {
        Ok(bytes) => problem(&bytes),
        Err(error) => Some(format!("precompiled_charsmap is no base64: {error}")),
    }
}

/// What is wrong with a map, if anything is.
pub(super) fn problem(bytes: &[u8]) -> Option<String> {
    if bytes.len() > MAX_MAP_BYTES {
        return Some(too_long(bytes.len()));
    }
    let Some((count, rest)) = bytes.split_first_chunk::<4>() else {
        return Some("precompiled_charsmap is cut".to_owned());
    };
    let count = u32::from_le_bytes(*count) as usize;
    if count < 4 || count > rest.len() {
        return Some("precompiled_charsmap is not as long as it says".to_owned());
    }
    let replacements = &rest[count / 4 * 4..];
    let longest = replacements.split(|byte| *byte == 0).map(<[u8]>::len).max().unwrap_or(0);
    if longest > MAX_REPLACEMENT_BYTES {
        return Some(format!(
            "precompiled_charsmap has a replacement of {longest} bytes; at most {MAX_REPLACEMENT_BYTES}"
        ));
    }
    let map = match Precompiled::from(bytes) {
        Ok(map) => map,
        Err(error) => return Some(format!("precompiled_charsmap: {error}")),
    };
    let characters = CHARACTERS.filter_map(char::from_u32);
    let replaced = unpanicked(|| {
        characters.filter_map(|c| map.transform(c.encode_utf8(&mut [0; 4])).map(str::len)).sum::<usize>()
    });
    replaced.err().map(|said| format!("precompiled_charsmap points outside itself: {said}"))
}

fn too_long(bytes: usize) -> String {
    format!("precompiled_charsmap has {bytes} bytes; at most {MAX_MAP_BYTES}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A trie whose root leads nowhere, and these replacements.
    fn map(replacements: &[u8]) -> Vec<u8> {
        let trie = [0u8; 1024];
        [&(trie.len() as u32).to_le_bytes()[..], &trie, replacements].concat()
    }

    #[track_caller]
    fn check_refused(bytes: &[u8], words: &str) {
        let found = problem(bytes).expect("is refused");
        assert!(found.contains(words), "{found}");
        assert_eq!(problem_of_base64(&STANDARD.encode(bytes)), Some(found));
    }

    #[test]
    fn what_the_library_would_trip_over_is_refused() {
        assert_eq!(problem(&map(b"ab\0cd\0")), None);
        check_refused(&[1, 0, 0], "is cut");
        check_refused(&[0, 0, 0, 0, 1], "not as long as it says");
        check_refused(&[2, 0, 0, 0, 1, 2], "not as long as it says");
        check_refused(&[0xfc, 0xff, 0xff, 0xff, 1], "not as long as it says");
        check_refused(&map(&[0xff]), "Cannot parse");
        check_refused(&map(&[b'a'; 257]), "a replacement of 257 bytes; at most 256");
        assert!(problem(&map(&[0; 5 << 20])).is_some_and(|problem| problem.contains("at most 4194304")));
        assert!(problem_of_base64(&"AAAA".repeat(2 << 20)).is_some_and(|problem| problem.contains("at most 4194304")));
        let mut outside = map(b"ab\0");
        outside[4..404].fill(0xfe);
        check_refused(&outside, "points outside itself");
        assert!(problem_of_base64("*").is_some_and(|problem| problem.contains("no base64")));
    }
}
