//! Tokens of texts and conversations, and what of a conversation its template is given.

use serde_json::{Value, json};
use tale_models::testing::MAX_CONTEXT;

use crate::support::{Server, server};

async fn post(server: &Server, path: &str, body: Value) -> (u16, Value) {
    let answer = server.post(path, &body).await;
    (answer.status.as_u16(), answer.json())
}

fn error(answer: &(u16, Value)) -> (u16, &str) {
    (answer.0, answer.1["error"]["param"].as_str().unwrap_or_default())
}

#[tokio::test]
async fn texts_become_tokens_and_tokens_texts() {
    let server = server().await;
    let body = json!({"model": "words", "prompt": "a boat", "return_token_strs": true});
    let (status, tokens) = post(&server, "/tokenize", body).await;
    assert_eq!((status, &tokens["count"]), (200, &json!(6)), "{tokens}");
    assert_eq!(tokens["token_strs"].as_array().map(Vec::len), Some(6));
    assert!(tokens["max_model_len"].as_u64().is_some_and(|len| len > 6));
    let body = json!({"model": "words", "tokens": tokens["tokens"]});
    assert_eq!(post(&server, "/detokenize", body).await, (200, json!({"prompt": "a boat"})));
    let body = json!({"model": "words", "prompt": ""});
    assert_eq!(post(&server, "/tokenize", body).await.1["tokens"], json!([]));
}

/// As many tokens as the prompt of a chat has.
#[tokio::test]
async fn a_conversation_has_the_tokens_of_its_prompt() {
    let server = server().await;
    let messages = json!([{"role": "user", "content": "hello"}]);
    let chat = json!({"model": "words", "messages": messages, "max_tokens": 1});
    let (_, answer) = post(&server, "/v1/chat/completions", chat).await;
    let (_, tokens) = post(&server, "/tokenize", json!({"model": "words", "messages": messages})).await;
    assert_eq!(answer["usage"]["prompt_tokens"], tokens["count"], "{answer} {tokens}");
    let count = async |extra: Value| {
        let mut body = json!({"model": "words", "messages": [{"role": "assistant", "content": "once "}]});
        body.as_object_mut().expect("fields").extend(extra.as_object().expect("fields").clone());
        post(&server, "/tokenize", body).await.1["tokens"].clone()
    };
    let text = async |tokens: Value| {
        let (_, text) = post(&server, "/detokenize", json!({"model": "words", "tokens": tokens})).await;
        text["prompt"].as_str().expect("a text").to_owned()
    };
    let plain = text(count(json!({"add_generation_prompt": false})).await).await;
    let continued = text(count(json!({"continue_final_message": true})).await).await;
    assert!(continued.ends_with("once ") && continued.len() < plain.len(), "{continued:?} {plain:?}");
    assert!(plain.starts_with(&continued), "{continued:?} {plain:?}");
}

#[tokio::test]
async fn what_cannot_be_is_refused_by_name() {
    let server = server().await;
    for (path, body, expected) in [
        ("/tokenize", json!({"model": "words"}), "prompt"),
        ("/tokenize", json!({"model": "words", "prompt": "a", "messages": []}), "messages"),
        ("/tokenize", json!({"model": "words", "messages": []}), "messages"),
        ("/tokenize", json!({"model": "words", "prompt": "a", "add_generation_prompt": true}), "prompt"),
        ("/tokenize", json!({"model": "words", "prompt": "a", "stop": "b"}), "stop"),
        (
            "/tokenize",
            json!({"model": "words", "messages": [{"role": "user", "content": "a"}],
            "chat_template_kwargs": {"enable_thinking": true}}),
            "chat_template_kwargs.enable_thinking",
        ),
        (
            "/tokenize",
            json!({"model": "words", "messages": [{"role": "user", "content": "a"}],
            "chat_template_kwargs": {"messages": []}}),
            "chat_template_kwargs.messages",
        ),
        ("/detokenize", json!({"model": "words", "tokens": [0, 100_000]}), "tokens[1]"),
        ("/detokenize", json!({"model": "words"}), "tokens"),
        ("/v1/embeddings", json!({"model": "words", "input": "a"}), "model"),
        (
            "/v1/chat/completions",
            json!({"model": "words", "messages": [{"role": "user", "content": "a"}],
            "continue_final_message": true, "add_generation_prompt": true}),
            "continue_final_message",
        ),
        (
            "/v1/completions",
            json!({"model": "words", "prompt": "a", "truncate_prompt_tokens": 0}),
            "truncate_prompt_tokens",
        ),
    ] {
        let answer = post(&server, path, body.clone()).await;
        assert_eq!(error(&answer), (400, expected), "{body}: {answer:?}");
    }
    for (path, body) in [("/tokenize", json!({"model": "x", "prompt": "a"})), ("/v1/embeddings", json!({"model": "x"}))]
    {
        assert_eq!(post(&server, path, body).await.0, 404);
    }
}

#[tokio::test]
async fn of_a_longer_prompt_the_end_is_taken() {
    let server = server().await;
    for prompt in [json!("a long way"), json!([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])] {
        for (most, expected) in [(4, 4), (10, 10), (100, 10)] {
            let body = json!({"model": "words", "prompt": prompt, "max_tokens": 1, "truncate_prompt_tokens": most});
            let (status, answer) = post(&server, "/v1/completions", body).await;
            assert_eq!((status, &answer["usage"]["prompt_tokens"]), (200, &json!(expected)), "{answer}");
        }
    }
    // More than the context, of which the end fits; and more than anybody would make tokens of.
    let long = "x".repeat(MAX_CONTEXT + 100);
    let body = json!({"model": "words", "prompt": long, "max_tokens": 1, "truncate_prompt_tokens": 200});
    assert_eq!(post(&server, "/v1/completions", body).await.1["usage"]["prompt_tokens"], 200);
    let longest_token = "<|turn|>".len();
    let long = "x".repeat(4 * longest_token * MAX_CONTEXT);
    let body = json!({"model": "words", "prompt": long, "max_tokens": 1, "truncate_prompt_tokens": 200});
    assert_eq!(post(&server, "/v1/completions", body).await.1["error"]["code"], "context_length_exceeded");
}
