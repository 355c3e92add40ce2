//! What real clients send without asking for anything, and what browsers and compressing clients send.

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use http_body_util::Full;
use hyper::Request;
use hyper::body::Bytes;
use serde_json::{Value, json};
use tale_models::testing::ANSWER;

use crate::support::{Answer, Server, Setup, read, server, start};

fn with(base: &Value, extra: &Value) -> Value {
    let mut body = base.clone();
    for (name, value) in extra.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body
}

/// A chat as an SDK sends it whose user passes every argument as `None`, and fills in some.
#[tokio::test]
async fn a_chat_that_asks_for_nothing_in_many_words_is_the_plain_chat() {
    let server = server().await;
    let plain = json!({"model": "words", "messages": [{"role": "user", "content": "hello"}], "seed": 0});
    let expected = server.post("/v1/chat/completions", &plain).await.expect(200).json()["choices"].clone();
    let nulls: serde_json::Map<String, Value> = [
        "audio",
        "frequency_penalty",
        "function_call",
        "functions",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "metadata",
        "modalities",
        "moderation",
        "n",
        "parallel_tool_calls",
        "prediction",
        "presence_penalty",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "service_tier",
        "stop",
        "store",
        "stream",
        "stream_options",
        "temperature",
        "tool_choice",
        "tools",
        "top_logprobs",
        "top_p",
        "user",
        "verbosity",
        "web_search_options",
        "top_k",
        "min_p",
        "repetition_penalty",
        "ignore_eos",
    ]
    .into_iter()
    .map(|name| (name.to_owned(), Value::Null))
    .collect();
    let whole = json!({"role": "user", "content": [{"type": "text", "text": "hello"}], "refusal": null, "annotations": [],
        "audio": null, "function_call": null, "tool_calls": null, "name": null});
    for extra in [
        Value::Object(nulls),
        json!({"user": "u1", "metadata": {"conversation": "c1"}, "store": false, "service_tier": "auto"}),
        json!({"tools": [], "tool_choice": "auto", "parallel_tool_calls": true, "response_format": {"type": "text"}}),
        json!({"logit_bias": {}, "logprobs": false, "modalities": ["text"], "stream_options": {}, "stream": false}),
        json!({"messages": [whole]}),
        json!({"n": 1.0, "seed": 0.0, "max_tokens": 64.0}),
    ] {
        let answer = server.post("/v1/chat/completions", &with(&plain, &extra)).await.expect(200).json();
        assert_eq!(answer["choices"], expected, "{extra}");
    }
}

#[tokio::test]
async fn an_answer_may_be_sent_back_whole() {
    let server = server().await;
    let messages = |assistant: Value| json!([{"role": "user", "content": "hello", "name": "ann"}, assistant, {"role": "user", "content": "and?"}]);
    for assistant in [
        json!({"role": "assistant", "content": ANSWER, "refusal": null, "annotations": [], "audio": null,
            "function_call": null, "tool_calls": null}),
        json!({"role": "assistant", "content": null, "tool_calls": []}),
        // As the SDK has it that read the answer into types.
        json!({"role": "assistant", "content": "{}", "parsed": {"a": [1]}, "tool_calls": [{"id": "c1", "type": "function",
            "function": {"name": "f", "arguments": "{}", "parsed_arguments": {"a": [1]}}}]}),
        json!({"role": "assistant", "content": []}),
    ] {
        let body = json!({"model": "words", "messages": messages(assistant)});
        server.post("/v1/chat/completions", &body).await.expect(200);
    }
}

/// As langchain's `OpenAI()` sends it.
#[tokio::test]
async fn a_completion_that_asks_for_nothing_in_many_words_is_the_plain_completion() {
    let server = server().await;
    let plain = json!({"model": "words", "prompt": ["hello"], "seed": 0, "max_tokens": 8});
    let expected = server.post("/v1/completions", &plain).await.expect(200).json()["choices"].clone();
    for extra in [
        json!({"best_of": 1, "echo": false, "suffix": null, "logprobs": null, "n": 1, "logit_bias": {}, "user": "u1"}),
        json!({"frequency_penalty": 0, "presence_penalty": 0, "temperature": 0.7, "top_p": 1, "stop": null, "stream": null}),
        json!({"best_of": null, "echo": null, "logit_bias": null, "n": null, "stream_options": null, "top_p": 0}),
    ] {
        let answer = server.post("/v1/completions", &with(&plain, &extra)).await.expect(200).json();
        assert_eq!(answer["choices"], expected, "{extra}");
    }
}

/// As SDKs and chat frontends send an image.
#[tokio::test]
async fn an_image_that_asks_for_nothing_in_many_words_is_the_plain_image() {
    let server = server().await;
    let plain = json!({"model": "pictures", "prompt": "", "seed": -1, "num_inference_steps": 2.0});
    let expected = server.post("/v1/images/generations", &plain).await.expect(200).json();
    assert_eq!(expected["seed"], u64::MAX);
    for extra in [
        json!({"user": "u1", "quality": "auto", "background": "opaque", "moderation": "low", "style": null}),
        json!({"quality": "standard", "background": "auto", "safety_identifier": "u1", "input_fidelity": null}),
        json!({"user": null, "quality": null, "n": null, "size": null, "stream": null, "output_format": null, "svg": null}),
    ] {
        let answer = server.post("/v1/images/generations", &with(&plain, &extra)).await.expect(200).json();
        assert_eq!(answer["data"], expected["data"], "{extra}");
    }
    for (extra, param) in [
        (json!({"quality": "high"}), "quality"),
        (json!({"background": "transparent"}), "background"),
        (json!({"style": "vivid"}), "style"),
    ] {
        let refusal = server.post("/v1/images/generations", &with(&plain, &extra)).await.expect(400).json();
        assert_eq!(
            (&refusal["error"]["param"], &refusal["error"]["code"]),
            (&json!(param), &json!("unsupported_value"))
        );
    }
}

#[tokio::test]
async fn a_job_says_how_long_its_file_plays_and_takes_that_back() {
    let server = server().await;
    for num_frames in [1, 5, 33] {
        let body = json!({"model": "clips", "prompt": "", "num_frames": num_frames, "fps": 8, "user": "u1"});
        let job = server.post("/v1/videos", &body).await.expect(200).json();
        assert_eq!(job["seconds"], (f64::from(num_frames) / 8.0).to_string());
        let again = json!({"model": "clips", "prompt": "", "seconds": job["seconds"], "fps": 8});
        assert_eq!(server.post("/v1/videos", &again).await.expect(200).json()["num_frames"], num_frames);
    }
}

/// The scripted model begins its answer where the seed says.
#[tokio::test]
async fn a_seed_is_any_number_of_64_bits() {
    let server = server().await;
    let text = async |seed: Value| {
        let body = json!({"model": "words", "prompt": "hello", "max_tokens": 6, "seed": seed});
        server.post("/v1/completions", &body).await.expect(200).json()["choices"][0]["text"].clone()
    };
    assert_eq!(text(json!(-1)).await, text(json!(u64::MAX)).await);
    assert_eq!(text(json!(i64::MIN)).await, text(json!(1_u64 << 63)).await);
    assert_ne!(text(json!(-1)).await, text(json!(1)).await);
}

#[tokio::test]
async fn events_may_be_filled_up_to_sizes_that_say_little() {
    let server = server().await;
    let body = |obfuscated: bool| {
        json!({"model": "words", "messages": [{"role": "user", "content": "hello"}], "seed": 0, "stream": true,
            "stream_options": {"include_obfuscation": obfuscated}})
    };
    let plain = server.post("/v1/chat/completions", &body(false)).await.expect(200);
    assert!(!plain.text().contains("obfuscation"), "{plain:?}");
    let filled = server.post("/v1/chat/completions", &body(true)).await.expect(200);
    let mut events = filled.events();
    assert_eq!(events.pop(), Some("[DONE]".into()));
    for event in events {
        let filling = event["obfuscation"].as_str().expect("text").len();
        assert!(filling > 0 && (event["choices"][0].to_string().len() + filling).is_multiple_of(64), "{event}");
    }
}

fn json_request(body: Vec<u8>, headers: &[(&str, &str)]) -> Request<Full<Bytes>> {
    let mut request = Request::builder().method("POST").uri("/v1/completions").header("host", "localhost");
    for (name, value) in [("content-type", "application/json")].iter().chain(headers) {
        request = request.header(*name, *value);
    }
    request.body(Full::new(body.into())).expect("a sound request")
}

#[tokio::test]
async fn bodies_may_be_compressed_up_to_the_bound_of_all_bodies() {
    let server = server().await;
    let gzip = |text: &[u8]| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(text).expect("into memory");
        encoder.finish().expect("into memory")
    };
    let send = async |body: Vec<u8>, encoding: &str| {
        read(server.send(json_request(body, &[("content-encoding", encoding)])).await).await
    };
    let body = json!({"model": "words", "prompt": "hello", "max_tokens": 2}).to_string();
    assert_eq!(send(gzip(body.as_bytes()), "gzip").await.expect(200).json()["usage"]["completion_tokens"], 2);
    let error = send(body.clone().into_bytes(), "gzip").await.expect(400).json();
    assert_eq!(error["error"]["message"], "the body is not valid gzip");
    let error = send(body.into_bytes(), "br").await.expect(415);
    assert!(error.text().contains("the content encoding br is not supported"), "{error:?}");
    assert_eq!(error.header("accept-encoding"), "gzip, deflate");
    send(gzip(&vec![b' '; 64 << 20]), "gzip").await.expect(413);
}

async fn options(server: &Server, headers: &[(&str, &str)]) -> Answer {
    let mut request = Request::builder().method("OPTIONS").uri("/v1/completions").header("host", "localhost");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    read(server.send(request.body(Full::default()).expect("a sound request")).await).await
}

#[tokio::test]
async fn pages_of_configured_origins_may_call_from_browsers() {
    let page = "https://studio.example";
    let server = start(Setup { cors_origins: vec![page], ..Setup::default() }).await;
    let asks =
        [("access-control-request-method", "POST"), ("access-control-request-headers", "authorization,x-stainless-os")];
    let asking = |origin| [&[("origin", origin)][..], &asks].concat();
    let answer = options(&server, &asking(page)).await.expect(200);
    assert_eq!(answer.header("access-control-allow-origin"), page);
    assert_eq!(answer.header("access-control-allow-methods"), "GET,POST,DELETE");
    assert_eq!(answer.header("access-control-allow-headers"), "authorization,x-stainless-os");
    let stranger = options(&server, &asking("https://other.example")).await;
    assert_eq!(stranger.header("access-control-allow-origin"), "");
    let body = json!({"model": "words", "prompt": "hello", "max_tokens": 2}).to_string().into_bytes();
    let answer = read(server.send(json_request(body, &[("origin", page)])).await).await.expect(200);
    assert_eq!(answer.header("access-control-allow-origin"), page);
    // What is refused must be readable too.
    let refusal = read(server.send(json_request(b"{".to_vec(), &[("origin", page)])).await).await.expect(400);
    assert_eq!(refusal.header("access-control-allow-origin"), page);
}

#[tokio::test]
async fn no_page_may_call_where_no_origin_is_configured() {
    let server = server().await;
    let answer =
        options(&server, &[("origin", "https://studio.example"), ("access-control-request-method", "POST")]).await;
    assert_eq!(answer.expect(403).header("access-control-allow-origin"), "");
    let any = start(Setup { cors_origins: vec!["*"], ..Setup::default() }).await;
    let answer =
        options(&any, &[("origin", "https://studio.example"), ("access-control-request-method", "POST")]).await;
    assert_eq!(answer.expect(200).header("access-control-allow-origin"), "*");
}
