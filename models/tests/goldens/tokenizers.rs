//! Tokenizers held against what transformers answers on the same folders.

use std::path::Path;

use serde_json::Value;
use tale_models::Error;
use tale_models::chat_template::{ChatTemplates, Conversation};
use tale_models::tokenizer::{Padded, Tokenizer};

use crate::support::{case_dir, golden_json};

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("a list of ids")
}

/// Every case of a tokenizer folder: ids with and without special tokens, and the way back.
fn check(name: &str) {
    check_folder(name, &case_dir(&format!("tokenizers/{name}")));
}

/// As [`check`], on another folder with the same tokenizer.
fn check_folder(name: &str, dir: &Path) {
    let golden = golden_json(&format!("tokenizers/{name}"));
    let tokenizer = Tokenizer::from_dir(dir).expect("the folder is a tokenizer");
    assert_eq!(tokenizer.vocab_size() as u64, golden["vocab_size"]);
    let cases = golden["cases"].as_array().expect("cases");
    assert!(cases.len() > 20, "{name}: only {} cases", cases.len());
    for case in cases {
        let text = case["text"].as_str().expect("text");
        let encode = |special| tokenizer.encode(text, special).expect("encodes");
        assert_eq!(encode(true), ids(&case["ids"]), "{name}: {text:?}");
        assert_eq!(encode(false), ids(&case["ids_no_special"]), "{name}: {text:?}");
        let decoded = tokenizer.decode(&ids(&case["ids"])).expect("decodes");
        assert_eq!(decoded, case["decoded"].as_str().expect("decoded"), "{name}: {text:?}");
    }
}

/// At every length, a text encoder's prompt is the golden's ids with padding after them, or cut before the closing token.
fn check_lengths(name: &str, num_special: usize, pad: &str) {
    let golden = golden_json(&format!("tokenizers/{name}"));
    let tokenizer = Tokenizer::from_dir(&case_dir(&format!("tokenizers/{name}"))).expect("the folder is a tokenizer");
    let pad = tokenizer.token_id(pad).expect("the padding token");
    for case in golden["cases"].as_array().expect("cases") {
        let whole = ids(&case["ids"]);
        for max_length in num_special..whole.len() + 3 {
            let text = case["text"].as_str().expect("text");
            let padded = tokenizer.encode_padded(text, max_length).expect("encodes");
            let num_tokens = whole.len().min(max_length);
            let mut expected = whole[..num_tokens].to_vec();
            expected[num_tokens - 1] = whole[whole.len() - 1];
            expected.resize(max_length, pad);
            assert_eq!(padded, Padded { ids: expected, num_tokens }, "{name} at {max_length}: {text:?}");
        }
    }
}

/// Folders whose files disagree about special tokens: ids, and the spellings that a chat template finds.
#[test]
fn the_file_that_decides_about_special_tokens_is_transformers() {
    let golden = golden_json("tokenizers/special-tokens");
    let backend = std::fs::read(case_dir("tokenizers/llama").join("tokenizer.json")).expect("tokenizer.json");
    for folder in golden["folders"].as_array().expect("folders") {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::write(dir.path().join("tokenizer.json"), &backend).expect("write");
        for (name, file) in folder["files"].as_object().expect("files") {
            std::fs::write(dir.path().join(name), file.to_string()).expect("write");
        }
        let name = &folder["name"];
        let tokenizer = Tokenizer::from_dir(dir.path()).expect("the folder is a tokenizer");
        assert_eq!(tokenizer.vocab_size() as u64, folder["vocab_size"].as_u64().expect("a count"), "{name}");
        assert_eq!(tokenizer.eos_token_id().map(u64::from), folder["eos_token_id"].as_u64(), "{name}");
        for case in folder["cases"].as_array().expect("cases") {
            let text = case["text"].as_str().expect("text");
            let found = tokenizer.encode(text, true).expect("encodes");
            assert_eq!(found, ids(&case["ids"]), "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&found).expect("decodes"), case["decoded"], "{name}: {text:?}");
        }
        check_spellings(dir.path(), &folder["special_tokens"]);
    }
}

fn check_spellings(dir: &Path, expected: &Value) {
    let names = ["bos_token", "eos_token", "unk_token", "pad_token", "image_token"];
    let source: String = names.iter().map(|name| format!("{{{{ {name} }}}}|")).collect();
    std::fs::write(dir.join("chat_template.jinja"), source).expect("write");
    let template = ChatTemplates::from_dir(dir).expect("reads").expect("there is one");
    let expected: String =
        names.iter().map(|name| format!("{}|", expected[name].as_str().unwrap_or_default())).collect();
    assert_eq!(template.render(&Conversation::default()).expect("renders"), expected);
}

#[test]
fn clip_from_vocab_and_merges() {
    check("clip");
}

#[test]
fn t5_from_the_sentencepiece_model() {
    check("t5");
}

#[test]
fn umt5_from_the_sentencepiece_model() {
    check("umt5");
}

#[test]
fn llama_from_tokenizer_json() {
    check("llama");
}

#[test]
fn qwen2_from_tokenizer_json() {
    check("qwen2");
}

#[test]
fn checkpoints_hold_the_same_tokenizers_in_other_layouts() {
    check_folder("clip", &case_dir("flux-dev/checkpoint/tokenizer"));
    check_folder("t5", &case_dir("flux-dev/checkpoint/tokenizer_2")); // spiece.model
    check_folder("t5", &case_dir("flux-schnell/checkpoint/tokenizer_2")); // tokenizer.json
    check_folder("umt5", &case_dir("wan-a/checkpoint/tokenizer")); // spiece.model
    check_folder("umt5", &case_dir("wan-b/checkpoint/tokenizer")); // tokenizer.json
    check_folder("llama", &case_dir("llama-untied/checkpoint"));
    check_folder("qwen2", &case_dir("qwen2-yarn/checkpoint"));
}

#[test]
fn prompts_have_the_length_that_an_encoder_wants() {
    check_lengths("clip", 2, "<|endoftext|>");
    check_lengths("t5", 1, "<pad>");
    check_lengths("umt5", 1, "<pad>");
}

/// A few kinds of long text through every layout; refusing is allowed, falling over is not.
#[test]
fn long_and_strange_texts_do_no_harm() {
    let long = |unit: &str| unit.repeat((1 << 16) / unit.len());
    let texts = ["a", " ", "e\u{301}", "\u{301}", "\0", "\u{fdfa}", "👩\u{200d}", "<|endoftext|>", "</s>\n"].map(long);
    for name in ["clip", "t5", "umt5", "llama", "qwen2"] {
        let tokenizer =
            Tokenizer::from_dir(&case_dir(&format!("tokenizers/{name}"))).expect("the folder is a tokenizer");
        for text in &texts {
            let start: String = text.chars().take(3).collect();
            match tokenizer.encode(text, true) {
                Ok(ids) => assert!(!ids.is_empty(), "{name}: {start:?}"),
                Err(error) => assert!(matches!(error, Error::InvalidRequest { .. }), "{name}: {start:?}: {error}"),
            }
        }
    }
}
