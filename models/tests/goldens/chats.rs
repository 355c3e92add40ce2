//! Chat templates held against what transformers renders, and the ids of what they render.

use serde_json::Value;
use tale_models::chat_template::{ChatMessage, ChatTemplates};
use tale_models::tokenizer::Tokenizer;

use crate::support::{case_dir, golden_json};

fn check(name: &str) {
    let dir = case_dir(name).join("checkpoint");
    let template = ChatTemplates::from_dir(&dir).expect("reads").expect("the checkpoint has a template");
    let tokenizer = Tokenizer::from_dir(&dir).expect("the checkpoint has a tokenizer");
    let golden = golden_json(name);
    let chats = golden["chats"].as_array().expect("chats");
    assert!(!chats.is_empty(), "{name}");
    for chat in chats {
        let read = |key: &str| -> Value { chat[key].clone() };
        let messages: Vec<ChatMessage> = serde_json::from_value(read("messages")).expect("messages");
        let text = template.render(&messages.into()).expect("renders");
        assert_eq!(text, read("text").as_str().expect("text"), "{name}");
        let ids: Vec<u32> = serde_json::from_value(read("ids")).expect("ids");
        assert_eq!(tokenizer.encode(&text, false).expect("encodes"), ids, "{name}: {text}");
    }
}

#[test]
fn chats_of_llama_with_tied_embeddings() {
    check("llama-tied");
}

#[test]
fn chats_of_llama_with_untied_embeddings() {
    check("llama-untied");
}

#[test]
fn chats_of_qwen2() {
    check("qwen2");
}

#[test]
fn chats_of_qwen2_with_yarn() {
    check("qwen2-yarn");
}
