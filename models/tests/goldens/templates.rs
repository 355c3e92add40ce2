//! Snippets of chat templates held against what Jinja2, as transformers sets it up, renders.

use serde_json::Value;
use tale_models::chat_template::{ChatMessage, ChatTemplates};
use tale_models::error::Error;

use crate::support::golden_json;

/// The template of a folder with the golden's special tokens.
fn load(golden: &Value, source: &str) -> Result<ChatTemplates, Error> {
    let dir = tempfile::tempdir().expect("temp dir");
    let variables = &golden["variables"];
    let tokens = serde_json::json!({"bos_token": variables["bos_token"], "eos_token": variables["eos_token"]});
    std::fs::write(dir.path().join("tokenizer_config.json"), tokens.to_string()).expect("write");
    std::fs::write(dir.path().join("chat_template.jinja"), source).expect("write");
    ChatTemplates::from_dir(dir.path()).map(|template| template.expect("there is one"))
}

fn render(golden: &Value, case: &Value) -> Result<String, Error> {
    let messages: Vec<ChatMessage> =
        serde_json::from_value(golden["variables"]["messages"].clone()).expect("messages of a conversation");
    load(golden, case["source"].as_str().expect("source"))?.render(&messages.into())
}

#[test]
fn templates_render_as_in_python() {
    let golden = golden_json("templates");
    let cases = golden["rendered"].as_array().expect("cases");
    let mut wrong = Vec::new();
    for case in cases {
        match render(&golden, case) {
            Ok(text) if text == case["text"].as_str().expect("text") => {}
            other => wrong.push(format!("{}\n  expected {}\n  found {other:?}", case["source"], case["text"])),
        }
    }
    assert!(cases.len() > 500 && wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

/// Whether when they are loaded or when they are rendered: what Python does not answer is not answered.
#[test]
fn templates_that_fail_in_python_fail() {
    let golden = golden_json("templates");
    for case in golden["failing"].as_array().expect("cases") {
        let answer = render(&golden, case);
        assert!(answer.is_err(), "{}: {} in Python, found {answer:?}", case["source"], case["error"]);
    }
}

#[test]
fn what_is_not_supported_is_refused_when_it_is_loaded() {
    let golden = golden_json("templates");
    for source in golden["unsupported"].as_array().expect("cases") {
        let error = load(&golden, source.as_str().expect("source")).expect_err("refused").to_string();
        assert!(error.contains("chat_template.jinja") && error.contains("line "), "{source}: {error}");
    }
}
