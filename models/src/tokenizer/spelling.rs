//! Of which bytes of a text a token is, where it stands between others.
//!
//! Owns: reading that from a tokenizer's decoder. Does not know: which tokens are special, what decoders do at the ends of
//! a text.

use serde_json::Value;
use tokenizers::DecoderWrapper;

/// How tokens are spelled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Spelling {
    /// Each character stands for a byte.
    ByteLevel,
    /// Characters are themselves, but for the one that stands for a space.
    Pieces {
        /// Stands for a space.
        space: Option<char>,
        /// Whether `<0x0A>` is a byte.
        has_bytes: bool,
    },
}

impl Spelling {
    /// Of a decoder that does no more than what is known here.
    pub(super) fn of(decoder: Option<&DecoderWrapper>) -> Option<Self> {
        if let Some(DecoderWrapper::ByteLevel(_)) = decoder {
            return Some(Self::ByteLevel);
        }
        let decoder = serde_json::to_value(decoder?).ok()?;
        let steps = match decoder.get("decoders").and_then(Value::as_array) {
            Some(steps) => steps.as_slice(),
            None => std::slice::from_ref(&decoder),
        };
        let (mut space, mut has_bytes) = (None, false);
        for step in steps {
            match text(step, "type")? {
                "Metaspace" => space = only_char(text(step, "replacement")?),
                "Replace" if text(step, "content") == Some(" ") => {
                    space = Some(only_char(step.pointer("/pattern/String")?.as_str()?)?);
                }
                "ByteFallback" => has_bytes = true,
                "Fuse" | "Strip" => (),
                _ => return None,
            }
        }
        Some(Self::Pieces { space, has_bytes })
    }

    /// Bytes of a token.
    pub(super) fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel => {
                // Added tokens are spelled as they are and may hold characters that stand for no byte.
                let bytes = token.chars().map(super::byte_of_char).collect::<Option<_>>();
                bytes.unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Self::Pieces { space, has_bytes } => {
                let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).filter(|_| *has_bytes);
                match byte.filter(|digits| digits.len() == 2).map(|digits| u8::from_str_radix(digits, 16)) {
                    Some(Ok(byte)) => vec![byte],
                    _ => {
                        token.chars().map(|c| if Some(c) == *space { ' ' } else { c }).collect::<String>().into_bytes()
                    }
                }
            }
        }
    }
}

fn text<'a>(step: &'a Value, name: &str) -> Option<&'a str> {
    step.get(name)?.as_str()
}

fn only_char(text: &str) -> Option<char> {
    let mut chars = text.chars();
    chars.next().filter(|_| chars.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_tokens_are_those_that_a_decoder_makes_of_them() {
        let llama = r#"{"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}"#;
        let check = |decoder: &str, token: &str, bytes: &[u8]| {
            let decoder: DecoderWrapper = serde_json::from_str(decoder).expect("a decoder");
            let spelling = Spelling::of(Some(&decoder)).expect("known");
            assert_eq!(spelling.bytes(token), bytes, "{token}");
        };
        check(llama, "▁a▁b", b" a b");
        check(llama, "<0x0A>", b"\n");
        check(llama, "<0xFF>", b"\xff");
        check(llama, "<0x>", b"<0x>");
        let byte_level = r#"{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}"#;
        check(byte_level, "\u{120}a\u{10a}", b" a\n");
        let unknown: DecoderWrapper =
            serde_json::from_str(r#"{"type": "WordPiece", "prefix": "x", "cleanup": true}"#).expect("one");
        assert_eq!(Spelling::of(Some(&unknown)), None);
    }
}
