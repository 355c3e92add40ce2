//! Chat and completions.

use serde_json::{Value, json};
use tale_models::testing::ANSWER;

use crate::support::{Answer, server};

fn chat(extra: Value) -> Value {
    let mut body = json!({"model": "words", "messages": [{"role": "user", "content": "hello"}], "seed": 0});
    for (name, value) in extra.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body
}

/// What the scripted model says from this seed on.
fn answer_from(seed: usize, length: usize) -> String {
    ANSWER.chars().cycle().skip(seed % ANSWER.len()).take(length).collect()
}

#[tokio::test]
async fn a_chat_answer_has_the_shape_of_the_api() {
    let server = server().await;
    let answer = server.post("/v1/chat/completions", &chat(json!({}))).await.expect(200).json();
    assert!(answer["id"].as_str().is_some_and(|id| id.starts_with("chatcmpl-")), "{answer}");
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "words");
    let message = json!({"role": "assistant", "content": ANSWER});
    let choice = json!({"index": 0, "message": message, "logprobs": null, "finish_reason": "stop"});
    assert_eq!(answer["choices"], json!([choice]));
    let usage = &answer["usage"];
    assert_eq!(usage["completion_tokens"], ANSWER.len());
    let prompt_tokens = usage["prompt_tokens"].as_u64().expect("a number");
    assert!(prompt_tokens > 5);
    assert_eq!(usage["total_tokens"], prompt_tokens + ANSWER.len() as u64);
    assert_eq!(usage["prompt_tokens_details"], json!({"cached_tokens": 0}));
}

/// The scripted model says of a prompt with a salt that all of it but a token was there.
#[tokio::test]
async fn usage_says_what_of_each_prompt_was_in_the_cache() {
    let server = server().await;
    let body = json!({"model": "words", "prompt": ["abc", "abcdef"], "max_tokens": 2, "n": 2, "cache_salt": "secret"});
    let usage = server.post("/v1/completions", &body).await.expect(200).json()["usage"].clone();
    let prompt_tokens = usage["prompt_tokens"].as_u64().expect("a number");
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], prompt_tokens - 2, "{usage}");
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let events = server.post("/v1/completions", &streamed).await.expect(200).events();
    assert_eq!(events.iter().map(|event| event["usage"].clone()).find(|usage| !usage.is_null()), Some(usage));
    let metrics = server.get("/metrics").await.expect(200).text().to_owned();
    for name in ["tale_prefix_cache_queries_total", "vllm:prefix_cache_hits_total"] {
        assert!(metrics.contains(&format!("{name}{{model_name=\"words\"}}")), "{name} is not in\n{metrics}");
    }
}

/// The threads of the server render short conversations where they arrive; other threads, as those of the other tests, have
/// all of them rendered elsewhere.
#[test]
fn a_conversation_has_the_same_tokens_wherever_it_is_rendered() {
    let heard = async || {
        let server = server().await;
        let mut heard = Vec::new();
        for content in ["hello".to_owned(), "long ".repeat(600), "too long ".repeat(600)] {
            let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]);
            let answer = server.post("/v1/chat/completions", &chat(json!({"messages": messages}))).await;
            heard.push((answer.status.as_u16(), answer.json()["usage"].clone()));
        }
        let answer = server.post("/v1/chat/completions", &chat(json!({"messages": []}))).await;
        heard.push((answer.status.as_u16(), answer.json()["error"].clone()));
        heard
    };
    let own = tale::http::runtime().expect("starts").block_on(heard());
    assert_eq!(own.iter().map(|(status, _)| *status).collect::<Vec<_>>(), [200, 200, 400, 400]);
    let usual = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("starts");
    assert_eq!(own, usual.block_on(heard()));
}

/// Joins the deltas of a chat stream, or the texts of a completion stream, by choice.
fn joined(answer: &Answer, choices: usize) -> Vec<String> {
    let mut texts = vec![String::new(); choices];
    for event in answer.events() {
        for choice in event["choices"].as_array().into_iter().flatten() {
            let text = choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
            texts[choice["index"].as_u64().expect("a number") as usize].push_str(text);
        }
    }
    texts
}

#[tokio::test]
async fn a_streamed_chat_says_the_same_in_pieces() {
    let server = server().await;
    let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let answer = server.post("/v1/chat/completions", &body).await.expect(200);
    assert_eq!(answer.header("content-type"), "text/event-stream; charset=utf-8");
    let events = answer.events();
    assert_eq!(events.first().expect("some")["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(joined(&answer, 1), [ANSWER]);
    let [.., last_part, usage, done] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!(last_part["choices"][0]["finish_reason"], "stop");
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], ANSWER.len());
    assert_eq!(done, "[DONE]");
    assert!(events.iter().all(|event| event == "[DONE]" || event["object"] == "chat.completion.chunk"));
}

#[tokio::test]
async fn choices_have_seeds_of_their_own() {
    let server = server().await;
    let body = json!({"model": "words", "prompt": ["a", "b"], "n": 3, "seed": 7, "max_tokens": 5});
    let answer = server.post("/v1/completions", &body).await.expect(200).json();
    let texts: Vec<_> = answer["choices"].as_array().expect("a list").iter().map(|c| c["text"].clone()).collect();
    let of_one_prompt = [7, 8, 9].map(|seed| answer_from(seed, 5));
    assert_eq!(texts, [of_one_prompt.clone(), of_one_prompt].concat());
    let details = json!({"cached_tokens": 0});
    let counts =
        json!({"prompt_tokens": 2, "completion_tokens": 30, "total_tokens": 32, "prompt_tokens_details": details});
    assert_eq!(answer["usage"], counts);
    let streamed = json!({"model": "words", "prompt": ["a", "b"], "n": 3, "seed": 7, "max_tokens": 5, "stream": true});
    assert_eq!(joined(&server.post("/v1/completions", &streamed).await.expect(200), 6), texts);
}

#[tokio::test]
async fn lengths_are_kept_under_both_names() {
    let server = server().await;
    for name in ["max_tokens", "max_completion_tokens"] {
        let answer = server.post("/v1/chat/completions", &chat(json!({name: 3}))).await.expect(200).json();
        assert_eq!(answer["choices"][0]["message"]["content"], answer_from(0, 3));
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
    }
    let long = chat(json!({"max_tokens": 100, "ignore_eos": true}));
    let answer = server.post("/v1/chat/completions", &long).await.expect(200).json();
    assert_eq!(answer["choices"][0]["message"]["content"], answer_from(0, 100));
}

#[tokio::test]
async fn prompts_come_as_text_or_tokens() {
    let server = server().await;
    for prompt in [json!("ab"), json!(["ab"]), json!([97, 98]), json!([[97, 98]])] {
        let body = json!({"model": "words", "prompt": prompt, "max_tokens": 1});
        let answer = server.post("/v1/completions", &body).await.expect(200).json();
        assert_eq!(answer["usage"]["prompt_tokens"], 2, "{prompt}");
    }
}

#[tokio::test]
async fn a_prompt_that_cannot_fit_is_refused_by_its_bytes() {
    let server = server().await;
    let digits = "1".repeat(1 << 20);
    let body = json!({"model": "words", "prompt": digits, "max_tokens": 1});
    let long_chat = chat(json!({"messages": [{"role": "user", "content": digits}]}));
    for (path, body) in [("/v1/completions", body), ("/v1/chat/completions", long_chat)] {
        let error = &server.post(path, &body).await.expect(400).json()["error"];
        assert_eq!(error["code"], "context_length_exceeded", "{error}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains("at least")), "{error}");
    }
}

#[tokio::test]
async fn a_failed_step_fails_its_own_sessions_and_the_server_lives() {
    let server = server().await;
    server.fail.store(true, std::sync::atomic::Ordering::Relaxed);
    let answer = server.post("/v1/chat/completions", &chat(json!({}))).await.expect(500).json();
    assert_eq!(answer["error"]["code"], "not_finite");
    server.fail.store(false, std::sync::atomic::Ordering::Relaxed);
    server.post("/v1/chat/completions", &chat(json!({}))).await.expect(200);
    server.wait_until_empty().await;
}

#[tokio::test]
async fn models_are_listed_and_found_by_name() {
    let server = server().await;
    let list = server.get("/v1/models").await.expect(200).json();
    let names: Vec<_> = list["data"].as_array().expect("a list").iter().map(|model| model["id"].clone()).collect();
    assert_eq!(names, ["words", "pictures", "clips", "shots", "between"]);
    assert_eq!(server.get("/v1/models/clips").await.expect(200).json()["object"], "model");
    assert_eq!(server.get("/v1/models/org/none").await.expect(404).json()["error"]["code"], "model_not_found");
}
