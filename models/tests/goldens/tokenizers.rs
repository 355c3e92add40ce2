//! Tokenizers held against what transformers answers on the same folders.

use serde_json::Value;
use tale_models::tokenizer::Tokenizer;

use crate::support::{case_dir, golden_json};

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("a list of ids")
}

/// Every case of a tokenizer folder: ids with and without special tokens, and the way back.
fn check(name: &str) {
    let case = format!("tokenizers/{name}");
    let golden = golden_json(&case);
    let tokenizer = Tokenizer::from_dir(&case_dir(&case)).expect("the folder is a tokenizer");
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
