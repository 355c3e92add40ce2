//! How likely tokens were, echoes, and the best of several choices.

use serde_json::{Value, json};
use tale_models::testing::ANSWER;

use crate::support::{Answer, Server, server};

const COMPLETIONS: &str = "/v1/completions";
const CHATS: &str = "/v1/chat/completions";

fn completion(extra: Value) -> Value {
    with(json!({"model": "words", "prompt": "ab", "max_tokens": 3, "seed": 0}), extra)
}

fn chat(extra: Value) -> Value {
    with(
        json!({"model": "words", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "seed": 0}),
        extra,
    )
}

fn with(mut body: Value, extra: Value) -> Value {
    for (name, value) in extra.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body
}

async fn choices(server: &Server, path: &str, body: &Value) -> Value {
    server.post(path, body).await.expect(200).json()["choices"].clone()
}

/// Of the only choice of a stream: its texts joined, and the elements of its lists of logprobs.
fn joined(answer: &Answer) -> (String, Value) {
    let mut text = String::new();
    let mut lists: serde_json::Map<String, Value> = serde_json::Map::new();
    for event in answer.events() {
        let Some(choice) = event["choices"].get(0) else { continue };
        text += choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
        for (name, list) in choice["logprobs"].as_object().into_iter().flatten() {
            let elements = list.as_array().into_iter().flatten().cloned();
            let all = lists.entry(name).or_insert_with(|| json!([]));
            all.as_array_mut().expect("a list").extend(elements);
        }
    }
    (text, lists.into())
}

async fn streamed(server: &Server, path: &str, body: &Value) -> (String, Value) {
    joined(&server.post(path, &with(body.clone(), json!({"stream": true}))).await.expect(200))
}

#[tokio::test]
async fn a_completion_tells_of_its_prompt_and_its_answer() {
    let server = server().await;
    let body = completion(json!({"echo": true, "logprobs": 2}));
    let choice = &choices(&server, COMPLETIONS, &body).await[0];
    let alternatives = |token: &str, next: &str| json!({token: -0.125, next: -1.125});
    let expected = json!({
        "tokens": ["a", "b", "a", " ", "b"],
        "token_logprobs": [null, -0.125, -0.125, -0.125, -0.125],
        "top_logprobs": [
            null, alternatives("b", "c"), alternatives("a", "b"), alternatives(" ", "!"), alternatives("b", "c")
        ],
        "text_offset": [0, 1, 2, 3, 4],
    });
    assert_eq!((&choice["text"], &choice["logprobs"]), (&json!("aba b"), &expected));
    assert_eq!(streamed(&server, COMPLETIONS, &body).await, ("aba b".to_owned(), expected));
    // Of no others in its place; the token itself is there all the same.
    let choice = &choices(&server, COMPLETIONS, &completion(json!({"logprobs": 0, "max_tokens": 1}))).await[0];
    let expected = json!({
        "tokens": ["a"], "token_logprobs": [-0.125], "top_logprobs": [{"a": -0.125}], "text_offset": [0]
    });
    assert_eq!((&choice["text"], &choice["logprobs"]), (&json!("a"), &expected));
}

#[tokio::test]
async fn an_echo_alone_tells_nothing() {
    let server = server().await;
    // A prompt of tokens is echoed as their text.
    for prompt in [json!("ab"), json!([97, 98])] {
        let body = completion(json!({"prompt": prompt, "echo": true}));
        let choice = &choices(&server, COMPLETIONS, &body).await[0];
        assert_eq!((&choice["text"], &choice["logprobs"]), (&json!("aba b"), &Value::Null));
        assert_eq!(streamed(&server, COMPLETIONS, &body).await, ("aba b".to_owned(), json!({})));
    }
    let body = completion(json!({"echo": true, "max_tokens": 0, "prompt": ["ab", "c"], "n": 2}));
    let answer = server.post(COMPLETIONS, &body).await.expect(200).json();
    let texts: Vec<&Value> =
        answer["choices"].as_array().expect("a list").iter().map(|choice| &choice["text"]).collect();
    assert_eq!(texts, ["ab", "ab", "c", "c"]);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!((&answer["usage"]["prompt_tokens"], &answer["usage"]["completion_tokens"]), (&json!(3), &json!(0)));
}

#[tokio::test]
async fn places_are_in_characters_and_parts_of_them_in_bytes() {
    let server = server().await;
    let body = completion(json!({"prompt": "\u{e9}b", "echo": true, "logprobs": 0, "max_tokens": 1}));
    let choice = &choices(&server, COMPLETIONS, &body).await[0];
    assert_eq!(choice["text"], "\u{e9}ba");
    assert_eq!(choice["logprobs"]["tokens"], json!([r"bytes:\xc3", r"bytes:\xa9", "b", "a"]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 0, 1, 2]));
}

#[tokio::test]
async fn a_chat_tells_of_its_content() {
    let server = server().await;
    let token = |token: &str, next: &str| {
        let of = |token: &str, logprob: f64| json!({"token": token, "logprob": logprob, "bytes": token.as_bytes()});
        with(of(token, -0.125), json!({"top_logprobs": [of(token, -0.125), of(next, -1.125)]}))
    };
    let expected = json!({"content": [token("a", "b"), token(" ", "!"), token("b", "c")], "refusal": null});
    let body = chat(json!({"logprobs": true, "top_logprobs": 2}));
    let choice = &choices(&server, CHATS, &body).await[0];
    assert_eq!((&choice["message"]["content"], &choice["logprobs"]), (&json!("a b"), &expected));
    let (text, told) = streamed(&server, CHATS, &body).await;
    assert_eq!((text.as_str(), &told["content"]), ("a b", &expected["content"]));
    let choice = &choices(&server, CHATS, &chat(json!({"logprobs": true}))).await[0];
    assert_eq!(choice["logprobs"]["content"][0]["top_logprobs"], json!([]));
    let choice = &choices(&server, CHATS, &chat(json!({"logprobs": false, "top_logprobs": 0}))).await[0];
    assert_eq!(choice["logprobs"], Value::Null);
}

/// The scripted model finds the tokens of each seed less likely than those of the one before, up to a multiple of eight.
#[tokio::test]
async fn the_best_choices_are_those_whose_tokens_are_likely() {
    let server = server().await;
    let body = completion(json!({"n": 2, "best_of": 4, "seed": 5}));
    let answer = server.post(COMPLETIONS, &body).await.expect(200).json();
    let text = |seed: usize| ANSWER.chars().cycle().skip(seed).take(3).collect::<String>();
    let choice = |index: usize, seed: usize| json!({"index": index, "text": text(seed), "logprobs": null, "finish_reason": "length"});
    assert_eq!(answer["choices"], json!([choice(0, 8), choice(1, 5)]));
    assert_eq!((&answer["usage"]["prompt_tokens"], &answer["usage"]["completion_tokens"]), (&json!(2), &json!(12)));
    let both = completion(json!({"prompt": ["a", "b"], "best_of": 4, "seed": 5, "logprobs": 0}));
    let choices = choices(&server, COMPLETIONS, &both).await;
    assert_eq!(choices.as_array().map(Vec::len), Some(2));
    assert!(choices.as_array().into_iter().flatten().all(|choice| choice["logprobs"]["token_logprobs"][0] == -0.125));
}

#[tokio::test]
async fn what_contradicts_itself_is_refused_by_name() {
    let server = server().await;
    let refused = async |path: &str, body: Value, param: &str, words: &str| {
        let error = &server.post(path, &body).await.expect(400).json()["error"];
        assert_eq!(error["param"], param, "{error}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains(words)), "{error}");
    };
    refused(CHATS, chat(json!({"top_logprobs": 2})), "top_logprobs", "needs logprobs").await;
    refused(CHATS, chat(json!({"logprobs": true, "top_logprobs": 21})), "top_logprobs", "0 to 20").await;
    refused(CHATS, chat(json!({"logprobs": 2})), "logprobs", "true or false").await;
    refused(CHATS, chat(json!({"echo": true})), "echo", "not known").await;
    refused(CHATS, chat(json!({"max_tokens": 0})), "max_tokens", "1 to").await;
    refused(COMPLETIONS, completion(json!({"logprobs": 21})), "logprobs", "0 to 20").await;
    refused(COMPLETIONS, completion(json!({"logprobs": true})), "logprobs", "").await;
    refused(COMPLETIONS, completion(json!({"top_logprobs": 1})), "top_logprobs", "not known").await;
    refused(COMPLETIONS, completion(json!({"max_tokens": 0})), "max_tokens", "1 to").await;
    refused(COMPLETIONS, completion(json!({"max_tokens": 0, "echo": false})), "max_tokens", "1 to").await;
    refused(COMPLETIONS, completion(json!({"best_of": 1, "n": 2})), "best_of", "fewer than n").await;
    refused(COMPLETIONS, completion(json!({"best_of": 2, "stream": true})), "best_of", "stream").await;
    refused(COMPLETIONS, completion(json!({"best_of": 65})), "best_of", "1 to 64").await;
    let prompts = vec!["a"; 9];
    refused(COMPLETIONS, completion(json!({"best_of": 8, "prompt": prompts})), "prompt", "best_of").await;
    let many = completion(json!({"logprobs": 20, "n": 64, "max_tokens": 4000}));
    refused(COMPLETIONS, many, "logprobs", "at most").await;
}
