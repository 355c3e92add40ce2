//! Bad input gets a clear answer in the API's error shape, and what the client wrote is not repeated.

use serde_json::{Value, json};

use crate::support::{Answer, SECRET, Server, Setup, server, start};

/// Status, `param` and `code` of a refusal, whose shape and discretion are checked on the way.
#[track_caller]
fn refusal(answer: &Answer) -> (u16, String, String) {
    let body = answer.json();
    let error = body["error"].as_object().unwrap_or_else(|| panic!("{answer:?}"));
    assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
    assert!(!answer.text().contains(SECRET), "repeats the client: {answer:?}");
    let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
    (answer.status.as_u16(), text("param"), text("code"))
}

async fn check(server: &Server, path: &str, body: Value, expected: (u16, &str, &str)) {
    let answer = server.post(path, &body).await;
    let (status, param, code) = refusal(&answer);
    assert_eq!((status, param.as_str(), code.as_str()), expected, "{body}: {answer:?}");
}

fn with(base: &Value, extra: Value) -> Value {
    let mut body = base.clone();
    for (name, value) in extra.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body
}

/// A picture of one pixel.
const PICTURE: &str = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP43yAAAAQRAZD55t7yAAAAAElFTkSuQmCC";

fn function(name: &str) -> Value {
    json!({"type": "function", "function": {"name": name}})
}

#[tokio::test]
async fn wrong_fields_of_a_chat_are_named() {
    let server = server().await;
    let base = json!({"model": "words", "messages": [{"role": "user", "content": SECRET}]});
    let invalid = "invalid_value";
    let cases = [
        (json!({"no_such_field": SECRET}), (400, "no_such_field", "unknown_parameter")),
        (json!({"messages": []}), (400, "messages", invalid)),
        (json!({"messages": SECRET}), (400, "messages", invalid)),
        (json!({"messages": [{"role": "user"}]}), (400, "messages[0].content", "missing_required_parameter")),
        (json!({"messages": [{"role": SECRET, "content": "x"}]}), (400, "messages[0].role", invalid)),
        (json!({"messages": [{"role": "user", "content": 5}]}), (400, "messages[0].content", invalid)),
        (json!({"messages": [[SECRET, "x"]]}), (400, "messages[0]", invalid)),
        (json!({"max_tokens": 0}), (400, "max_tokens", invalid)),
        (json!({"max_tokens": -1}), (400, "max_tokens", invalid)),
        (json!({"max_tokens": 1e300}), (400, "max_tokens", invalid)),
        (json!({"max_tokens": u64::MAX}), (400, "max_tokens", invalid)),
        (json!({"max_completion_tokens": 1_000_000}), (400, "max_completion_tokens", invalid)),
        (json!({"max_tokens": 1, "max_completion_tokens": 2}), (400, "max_completion_tokens", invalid)),
        (json!({"temperature": 2.1}), (400, "temperature", invalid)),
        (json!({"temperature": SECRET}), (400, "temperature", invalid)),
        (json!({"temperature": 1e300}), (400, "temperature", invalid)),
        (json!({"top_p": -0.1}), (400, "top_p", invalid)),
        (json!({"top_p": 1.1}), (400, "top_p", invalid)),
        (json!({"min_p": 1.5}), (400, "min_p", invalid)),
        (json!({"presence_penalty": 3}), (400, "presence_penalty", invalid)),
        (json!({"frequency_penalty": -3}), (400, "frequency_penalty", invalid)),
        (json!({"repetition_penalty": 0}), (400, "repetition_penalty", invalid)),
        (json!({"seed": 0.5}), (400, "seed", invalid)),
        (json!({"seed": 18_446_744_073_709_551_616.0}), (400, "seed", invalid)),
        (json!({"seed": -9_223_372_036_854_777_856.0}), (400, "seed", invalid)),
        (json!({"n": 1.5}), (400, "n", invalid)),
        (json!({"n": 0}), (400, "n", invalid)),
        (json!({"n": 65}), (400, "n", invalid)),
        (json!({"stop": [""]}), (400, "stop", invalid)),
        (json!({"stop": vec!["x"; 17]}), (400, "stop", invalid)),
        (
            json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}),
            (400, "tools[0].function.name", invalid),
        ),
        (json!({"tools": [{"type": SECRET}]}), (400, "tools[0].type", "unsupported_value")),
        (json!({"tools": [function("f"), function("f")]}), (400, "tools[1].function.name", invalid)),
        (json!({"tool_choice": "required"}), (400, "tool_choice", invalid)),
        (json!({"tools": [function("f")], "tool_choice": SECRET}), (400, "tool_choice", invalid)),
        (
            json!({"tools": [function("f")], "tool_choice": {"type": "function", "function": {"name": SECRET}}}),
            (400, "tool_choice.function.name", invalid),
        ),
        (json!({"tools": [function("f")], "guided_regex": "a"}), (400, "guided_regex", invalid)),
        (json!({"tools": [function("f")], "parallel_tool_calls": 1}), (400, "parallel_tool_calls", invalid)),
        (
            json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}]}),
            (400, "tools[0].function.parameters.properties.a.not", invalid),
        ),
        (
            json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]}),
            (400, "tools[0].function.parameters.type", invalid),
        ),
        (json!({"response_format": {"type": SECRET}}), (400, "response_format.type", invalid)),
        (json!({"guided_json": {"type": "object", "if": {}}}), (400, "guided_json.if", invalid)),
        (json!({"guided_regex": format!("({SECRET}")}), (400, "guided_regex", invalid)),
        (json!({"guided_grammar": format!("start: {SECRET}")}), (400, "guided_grammar", invalid)),
        (
            json!({"guided_json": {"const": SECRET, "pattern": SECRET, "format": SECRET}}),
            (400, "guided_json.format", invalid),
        ),
        (json!({"guided_choice": ["a"], "ignore_eos": true}), (400, "ignore_eos", invalid)),
        (json!({"top_logprobs": 2}), (400, "top_logprobs", invalid)),
        (json!({"store": true}), (400, "store", "unsupported_value")),
        (json!({"messages": [{"role": "function", "content": "x"}]}), (400, "messages[0].role", "unsupported_value")),
        (
            json!({"messages": [{"role": "tool", "content": "x"}]}),
            (400, "messages[0].tool_call_id", "missing_required_parameter"),
        ),
        (
            json!({"messages": [{"role": "tool", "content": "x", "tool_call_id": SECRET}]}),
            (400, "messages[0].tool_call_id", invalid),
        ),
        (json!({"stream": SECRET}), (400, "stream", invalid)),
        (json!({"stream_options": {"include_usage": true}}), (400, "stream_options", invalid)),
        (json!({"stream": true, "stream_options": {"x": 1}}), (400, "stream_options.x", "unknown_parameter")),
        (json!({"model": SECRET}), (404, "model", "model_not_found")),
        (json!({"model": "pictures"}), (400, "model", invalid)),
    ];
    for (extra, expected) in cases {
        check(&server, "/v1/chat/completions", with(&base, extra), expected).await;
    }
    check(&server, "/v1/chat/completions", json!({}), (400, "model", "missing_required_parameter")).await;
    let unknown = server.post("/v1/chat/completions", &with(&base, json!({"model": "none"}))).await;
    assert!(unknown.text().contains("words, pictures, clips"), "{unknown:?}");
    server.wait_until_empty().await;
}

#[tokio::test]
async fn prompts_that_do_not_fit_are_refused_by_their_length() {
    let server = server().await;
    let long = json!({"model": "words", "prompt": SECRET.repeat(1000)});
    check(&server, "/v1/completions", long, (400, "", "context_length_exceeded")).await;
    let huge = json!({"model": "words", "prompt": SECRET.repeat(10_000_000 / SECRET.len())});
    check(&server, "/v1/completions", huge.clone(), (413, "", "request_too_large")).await;
    let chat = json!({"model": "words", "messages": [{"role": "user", "content": huge["prompt"]}]});
    check(&server, "/v1/chat/completions", chat, (413, "", "request_too_large")).await;
    check(&server, "/v1/completions", json!({"model": "words", "prompt": []}), (400, "prompt", "invalid_value")).await;
    let unknown_token = json!({"model": "words", "prompt": [100_000]});
    check(&server, "/v1/completions", unknown_token, (400, "prompt", "invalid_value")).await;
    let many = json!({"model": "words", "prompt": vec!["x"; 10], "n": 10});
    check(&server, "/v1/completions", many, (400, "prompt", "invalid_value")).await;
}

#[tokio::test]
async fn wrong_fields_of_a_picture_are_named() {
    let server = server().await;
    let base = json!({"model": "pictures", "prompt": SECRET});
    let invalid = "invalid_value";
    let cases = [
        (json!({"num_frames": 5}), (400, "num_frames", "unknown_parameter")),
        (json!({"n": 11}), (400, "n", invalid)),
        (json!({"size": "big"}), (400, "size", invalid)),
        (json!({"size": "100x64"}), (400, "size", invalid)),
        (json!({"size": "512x512"}), (400, "size", invalid)),
        (json!({"size": "64x64", "width": 64}), (400, "size", invalid)),
        (json!({"width": 65}), (400, "width", invalid)),
        (json!({"height": u64::MAX}), (400, "height", invalid)),
        (json!({"response_format": "url"}), (400, "response_format", invalid)),
        (json!({"output_format": "bmp"}), (400, "output_format", invalid)),
        (json!({"output_compression": 50}), (400, "output_compression", invalid)),
        (json!({"output_format": "jpeg", "output_compression": 101}), (400, "output_compression", invalid)),
        (json!({"output_format": "webp", "metadata": true}), (400, "metadata", invalid)),
        (json!({"partial_images": 1}), (400, "partial_images", invalid)),
        (json!({"stream": true, "partial_images": 4}), (400, "partial_images", invalid)),
        (json!({"stream": true, "n": 2}), (400, "n", invalid)),
        (json!({"num_inference_steps": 0}), (400, "num_inference_steps", invalid)),
        (json!({"guidance_scale": 3.5}), (400, "guidance_scale", invalid)),
        (json!({"scheduler": SECRET}), (400, "scheduler", invalid)),
        (json!({"scheduler": "flow_euler"}), (400, "scheduler", invalid)),
        (json!({"scheduler": 2}), (400, "scheduler", invalid)),
        (json!({"scheduler": "lcm", "num_inference_steps": 51}), (400, "num_inference_steps", invalid)),
        (json!({"timestep_spacing": SECRET}), (400, "timestep_spacing", invalid)),
        (json!({"scheduler": "lcm", "timestep_spacing": "trailing"}), (400, "timestep_spacing", invalid)),
        (json!({"eta": 0.5}), (400, "eta", invalid)),
        (json!({"scheduler": "ddim", "eta": 1.01}), (400, "eta", invalid)),
        (json!({"negative_prompt": SECRET}), (400, "negative_prompt", invalid)),
        (json!({"true_cfg_scale": 4}), (400, "true_cfg_scale", invalid)),
        (json!({"true_cfg_scale": 0.5, "negative_prompt": SECRET}), (400, "true_cfg_scale", invalid)),
        (json!({"guidance_interval": [0, 0.5]}), (400, "guidance_interval", invalid)),
        (json!({"guidance_interval": [0]}), (400, "guidance_interval", invalid)),
        (json!({"guidance_interval": [0, 0.5, 1]}), (400, "guidance_interval", invalid)),
        (json!({"guidance_interval": SECRET}), (400, "guidance_interval", invalid)),
        (json!({"acceleration": SECRET}), (400, "acceleration", invalid)),
        (json!({"max_sequence_length": 129}), (400, "max_sequence_length", invalid)),
        (json!({"model": "words"}), (400, "model", invalid)),
        (json!({"model": "clips"}), (400, "model", invalid)),
    ];
    for (extra, expected) in cases {
        check(&server, "/v1/images/generations", with(&base, extra), expected).await;
    }
    let size = server.post("/v1/images/generations", &with(&base, json!({"size": "100x64"}))).await;
    assert!(size.text().contains("width is 100; allowed: multiples of 16 from 16 to 512"), "{size:?}");
}

#[tokio::test]
async fn wrong_fields_of_a_clip_are_named() {
    let server = server().await;
    let base = json!({"model": "clips", "prompt": SECRET});
    let invalid = "invalid_value";
    let cases = [
        (json!({"num_frames": 6}), (400, "num_frames", invalid)),
        (json!({"num_frames": 85}), (400, "num_frames", invalid)),
        (json!({"seconds": "soon"}), (400, "seconds", invalid)),
        (json!({"seconds": -1}), (400, "seconds", invalid)),
        (json!({"seconds": "1000"}), (400, "seconds", invalid)),
        (json!({"seconds": 1, "num_frames": 5}), (400, "seconds", invalid)),
        (json!({"fps": 0}), (400, "fps", invalid)),
        (json!({"fps": 60, "output_format": "gif"}), (400, "fps", invalid)),
        (json!({"output_format": "avi"}), (400, "output_format", invalid)),
        (json!({"output_format": "gif", "fps": 8, "output_fps": 51}), (400, "output_fps", invalid)),
        (json!({"output_fps": 0}), (400, "output_fps", invalid)),
        (json!({"output_format": "webm", "codec": "h264"}), (400, "codec", invalid)),
        (json!({"output_format": "gif", "codec": "vp9"}), (400, "codec", invalid)),
        (json!({"codec": "mpeg2"}), (400, "codec", invalid)),
        (json!({"quality": "ultra"}), (400, "quality", invalid)),
        (json!({"output_format": "gif", "quality": "low"}), (400, "quality", invalid)),
        (json!({"output_format": "gif", "metadata": true}), (400, "metadata", invalid)),
        (json!({"output_format": "gif", "title": SECRET}), (400, "title", invalid)),
        (json!({"title": format!("{SECRET}\0")}), (400, "title", invalid)),
        (json!({"num_frames": 45, "fps": 1, "output_fps": 120}), (400, "output_fps", invalid)),
        (json!({"input_reference": SECRET}), (400, "input_reference", invalid)),
        (json!({"input_reference": PICTURE}), (400, "input_reference", invalid)),
        (json!({"image": PICTURE, "input_reference": PICTURE}), (400, "image", invalid)),
        (json!({"last_image": PICTURE}), (400, "last_image", invalid)),
        (json!({"guidance_scale": 1.0, "negative_prompt": SECRET}), (400, "negative_prompt", invalid)),
        (json!({"true_cfg_scale": 4.0}), (400, "true_cfg_scale", invalid)),
        (json!({"guidance_interval": [0.5, 0.25]}), (400, "guidance_interval", invalid)),
        (json!({"guidance_interval": [0.1, 0.2]}), (400, "guidance_interval", invalid)),
        (json!({"use_dynamic_cfg": true}), (400, "use_dynamic_cfg", invalid)),
        (json!({"use_dynamic_cfg": SECRET}), (400, "use_dynamic_cfg", invalid)),
        (json!({"timestep_spacing": "trailing"}), (400, "timestep_spacing", invalid)),
        (json!({"model": "pictures"}), (400, "model", invalid)),
        (json!({"model": "words"}), (400, "model", invalid)),
    ];
    for (extra, expected) in cases {
        check(&server, "/v1/videos", with(&base, extra), expected).await;
    }
    assert_eq!(server.get("/v1/videos").await.expect(200).json()["data"], json!([]));
}

#[tokio::test]
async fn wrong_forms_are_named() {
    let server = server().await;
    let form = |fields: &str| {
        let parts = fields.split(';').map(|field| {
            let (name, value) = field.split_once('=').expect("name=value");
            format!("--b\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
        });
        parts.collect::<String>() + "--b--\r\n"
    };
    let check = async |fields: &str, expected: (u16, &str, &str)| {
        let content_type = "multipart/form-data; boundary=b";
        let answer = server.call("POST", "/v1/videos", content_type, form(fields)).await;
        let (status, param, code) = refusal(&answer);
        assert_eq!((status, param.as_str(), code.as_str()), expected, "{fields}: {answer:?}");
    };
    check("model=clips", (400, "prompt", "missing_required_parameter")).await;
    check("model=clips;prompt=x;fps=s3cret-prompt", (400, "fps", "invalid_value")).await;
    check("model=clips;prompt=x;fps=8;fps=8", (400, "fps", "invalid_value")).await;
    check("model=clips;prompt=x;colour=red", (400, "colour", "unknown_parameter")).await;
    check("model=clips;prompt=x;num_frames=6", (400, "num_frames", "invalid_value")).await;
    let broken = server.call("POST", "/v1/videos", "multipart/form-data; boundary=b", "--b\r\nnonsense").await;
    assert_eq!(refusal(&broken), (400, String::new(), "invalid_body".into()));
}

#[tokio::test]
async fn bodies_that_cannot_be_read_are_refused() {
    let server = server().await;
    let path = "/v1/chat/completions";
    let json = "application/json";
    let status = async |content_type: &str, body: &[u8]| {
        refusal(&server.call("POST", path, content_type, body.to_vec()).await).0
    };
    assert_eq!(status(json, b"").await, 400);
    assert_eq!(status(json, b"{\"model\": ").await, 400);
    assert_eq!(status(json, b"[\"words\"]").await, 400);
    assert_eq!(status(json, b"{\"model\": \"words\"} tail").await, 400);
    assert_eq!(status(json, b"{\"model\": \"\xff\"}").await, 400);
    assert_eq!(status("text/plain", b"{}").await, 415);
    assert_eq!(status("", b"{}").await, 415);
}

#[tokio::test]
async fn unknown_paths_and_methods_have_the_same_shape() {
    let server = server().await;
    assert_eq!(refusal(&server.get("/v1/nothing").await).0, 404);
    assert_eq!(refusal(&server.get("/v1/chat/completions").await).0, 405);
    assert_eq!(refusal(&server.delete("/v1/models").await).0, 405);
    assert_eq!(refusal(&server.get("/v1/videos/video_none").await).0, 404);
    assert_eq!(refusal(&server.get("/v1/jobs/video_none/events").await).0, 404);
    // Bytes that are no text name nothing.
    for path in ["/v1/models/%ff", "/v1/videos/%ff", "/v1/videos/%ff/content", "/v1/jobs/%ff/events"] {
        assert_eq!(refusal(&server.get(path).await).0, 404, "{path}");
    }
    assert_eq!(refusal(&server.delete("/v1/videos/%ff").await).0, 404);
    assert_eq!(refusal(&server.get("/v1/videos?page=2").await), (400, "page".into(), "unknown_parameter".into()));
    assert_eq!(refusal(&server.get("/v1/videos?limit=0").await), (400, "limit".into(), "invalid_value".into()));
    assert_eq!(refusal(&server.get("/v1/videos?order=up").await), (400, "order".into(), "invalid_value".into()));
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let server = start(Setup { max_queued_sessions: 2, max_batch: 1, ..Setup::default() }).await;
    server.hold.store(true, std::sync::atomic::Ordering::Relaxed);
    let body = json!({"model": "pictures", "prompt": "x", "num_inference_steps": 1000});
    let picture = || crate::support::request("POST", "/v1/images/generations", "application/json", body.to_string());
    // One runs; two wait.
    let mut waiting = Vec::new();
    for running in 1..=3 {
        waiting.push(tokio::spawn(crate::support::send(server.address, picture())));
        server.wait_for_live(running).await;
        if running == 1 {
            while server.engine.status().models[1].queued > 0 {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        }
    }
    let full = server.post("/v1/images/generations", &body).await;
    assert_eq!(refusal(&full), (429, String::new(), "queue_full".into()));
    assert_eq!(full.header("retry-after"), "1");
    // Another model's queue is its own.
    server.hold.store(false, std::sync::atomic::Ordering::Relaxed);
    let words = json!({"model": "words", "prompt": "x", "max_tokens": 1});
    server.post("/v1/completions", &words).await.expect(200);
}

#[tokio::test]
async fn the_number_of_requests_in_flight_is_bounded() {
    let server = start(Setup { max_requests: 2, ..Setup::default() }).await;
    server.hold.store(true, std::sync::atomic::Ordering::Relaxed);
    let body = json!({"model": "words", "prompt": "x", "stream": true}).to_string();
    let stream = || server.send(crate::support::request("POST", "/v1/completions", "application/json", body.clone()));
    let (first, _second) = (stream().await, stream().await);
    let third = crate::support::read(stream().await).await;
    assert_eq!(refusal(&third).0, 429);
    // The pass goes back with the body.
    drop(first);
    let begun = std::time::Instant::now();
    while stream().await.status() != 200 {
        assert!(begun.elapsed() < std::time::Duration::from_secs(5));
    }
}

#[tokio::test]
async fn what_can_never_fit_into_memory_is_refused_with_the_figures() {
    let server = start(Setup { clip_bytes: (1 << 20) + 1, ..Setup::default() }).await;
    let job = server.post("/v1/videos", &json!({"model": "clips", "prompt": SECRET})).await.expect(200).json();
    let path = format!("/v1/videos/{}", job["id"].as_str().expect("a name"));
    let begun = std::time::Instant::now();
    loop {
        let job = server.get(&path).await.expect(200).json();
        if job["status"] == "failed" {
            assert_eq!(job["error"]["code"], "out_of_memory");
            assert_eq!(
                job["error"]["message"],
                "not enough memory: 1048577 bytes needed in phase denoise, 1048576 free"
            );
            break;
        }
        assert!(begun.elapsed() < std::time::Duration::from_secs(5), "{job}");
    }
}
