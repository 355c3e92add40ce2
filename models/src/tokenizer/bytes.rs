//! A tokenizer of single bytes, for models that have none: presets and scripted models.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// Tokens in all: the bytes, each being the token of its own value, and two special ones, with which turns begin and
/// answers end.
pub const VOCAB_SIZE: usize = 258;

/// Whether a text gets special tokens around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Around {
    /// None: a text has as many tokens as bytes.
    Nothing,
    /// One before it.
    Start,
    /// One before and one after it, as the text encoders of pictures want.
    StartAndEnd,
}

/// What texts are filled up with where there is a token of this name.
pub const PAD: &str = "<pad>";
const START: &str = "<|turn|>";
const END: &str = "<|end|>";

/// Turns, with tools and calls of them as Hermes writes these.
const TEMPLATE: &str = concat!(
    "{% if tools %}<|turn|>tools: {{ tools | tojson }}\n{% endif %}",
    "{% for m in messages %}<|turn|>{{ m.role }}: {% if m.content is not none %}{{ m.content }}{% endif %}",
    "{% for call in m.tool_calls or [] %}<tool_call>\n{\"name\": \"{{ call.function.name }}\", ",
    "\"arguments\": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}\n{% endfor %}<|turn|>assistant: "
);

/// Writes the published files of such a tokenizer, with a small chat template, into the folder `dir`.
pub fn write(dir: &Path, around: Around) -> Result<()> {
    write_with(dir, around, &[])
}

/// As [`write()`], of a tokenizer that knows these special tokens too, by their numbers.
pub fn write_with(dir: &Path, around: Around, tokens: &[(u32, &str)]) -> Result<()> {
    let pad = if tokens.iter().any(|(_, token)| *token == PAD) { PAD } else { END };
    let files = [
        ("tokenizer.json", tokenizer(around, tokens).to_string()),
        ("tokenizer_config.json", json!({"eos_token": END, "pad_token": pad}).to_string()),
        ("chat_template.jinja", TEMPLATE.to_owned()),
    ];
    for (name, text) in files {
        let path = dir.join(name);
        std::fs::write(&path, text).map_err(|error| Error::checkpoint(path, error))?;
    }
    Ok(())
}

/// `tokenizer.json` of byte-level BPE without merges.
fn tokenizer(around: Around, tokens: &[(u32, &str)]) -> Value {
    let bytes = byte_characters().into_iter().zip(0..).map(|(c, id)| (c, id.into()));
    // Where added tokens stand in the vocabulary they have the numbers that they have there.
    let vocab: Map<_, _> = bytes.chain(tokens.iter().map(|(id, token)| ((*token).to_owned(), (*id).into()))).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let own = [(256, START), (257, END)];
    let added: Vec<Value> = own.iter().chain(tokens).map(|(id, token)| special(*id, token)).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": specials(around),
        "added_tokens": added,
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}

/// What puts special tokens around a text.
fn specials(around: Around) -> Value {
    if around == Around::Nothing {
        return Value::Null;
    }
    let special = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let sequence = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
    let token = |id: usize, name: &str| json!({"id": name, "ids": [id], "tokens": [name]});
    let end = (around == Around::StartAndEnd).then(|| special(END));
    let single: Vec<Value> = [special(START), sequence("A")].into_iter().chain(end).collect();
    json!({
        "type": "TemplateProcessing",
        "single": single,
        "pair": [sequence("A"), sequence("B")],
        "special_tokens": {START: token(256, START), END: token(257, END)},
    })
}

/// The printable character that stands for each byte in byte-level BPE (GPT-2's table).
fn byte_characters() -> Vec<String> {
    let is_printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut replacements = (256..).filter_map(char::from_u32);
    (0..256u32)
        .map(|byte| if is_printable(byte) { char::from_u32(byte) } else { replacements.next() })
        .map(|character| character.expect("both ranges are characters: this is a bug").to_string())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::Tokenizer;

    #[test]
    fn a_token_is_a_byte() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        write(dir.path(), Around::Nothing).expect("written");
        let tokenizer = Tokenizer::from_dir(dir.path()).expect("sound");
        let ids = tokenizer.encode("aé\n", true).expect("encoded");
        assert_eq!(ids, [97, 0xc3, 0xa9, 10]);
        assert_eq!(tokenizer.decode(&ids).expect("decoded"), "aé\n");
        assert_eq!((tokenizer.vocab_size(), tokenizer.eos_token_id()), (VOCAB_SIZE, Some(257)));
        let padded = tokenizer.encode_padded("ab", 4).expect("padded");
        assert_eq!((padded.ids, padded.num_tokens), (vec![97, 98, 257, 257], 2));
    }

    #[test]
    fn special_tokens_stand_around_a_text_where_encoders_want_them() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        write(dir.path(), Around::StartAndEnd).expect("written");
        let tokenizer = Tokenizer::from_dir(dir.path()).expect("sound");
        assert_eq!(tokenizer.encode("ab", true).expect("encoded"), [256, 97, 98, 257]);
        assert_eq!(tokenizer.encode("ab", false).expect("encoded"), [97, 98]);
    }
}
