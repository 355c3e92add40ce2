//! `/v1/responses`. The scripted model says its answer, or the shortest text that it may.

use std::sync::atomic::Ordering::Relaxed;

use http_body_util::BodyExt;
use serde_json::{Value, json};
use tale_models::testing::ANSWER;

use crate::support::{Server, Setup, read, request, server, start};

const PATH: &str = "/v1/responses";

fn asked(extra: Value) -> Value {
    let mut body = json!({"model": "words", "input": "hello", "seed": 0});
    for (name, value) in extra.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body
}

fn streamed(extra: Value) -> Value {
    let mut body = asked(extra);
    body["stream"] = true.into();
    body
}

fn weather() -> Value {
    json!({"type": "function", "name": "weather", "description": "Of a place.", "parameters": {
        "type": "object", "properties": {"place": {"enum": ["here"]}, "days": {"type": "integer", "minimum": 0}},
        "required": ["place", "days"], "additionalProperties": false}})
}

const ARGUMENTS: &str = r#"{"place":"here","days":0}"#;

async fn whole(server: &Server, extra: Value) -> Value {
    server.post(PATH, &asked(extra)).await.expect(200).json()
}

/// Events of a stream, whose numbers and names are as they should be.
async fn events(server: &Server, extra: Value) -> Vec<Value> {
    let answer = server.post(PATH, &streamed(extra)).await.expect(200);
    assert_eq!(answer.header("content-type"), "text/event-stream; charset=utf-8");
    let events = answer.events();
    let names: Vec<&str> = answer.text().lines().filter_map(|line| line.strip_prefix("event: ")).collect();
    assert_eq!(names.len(), events.len(), "{events:?}");
    for (number, (event, name)) in events.iter().zip(names).enumerate() {
        assert_eq!((&event["sequence_number"], &event["type"]), (&json!(number), &json!(name)), "{event}");
    }
    events
}

/// Without what is another one each time.
fn without_ids(mut response: Value) -> Value {
    for name in ["id", "created_at", "completed_at"] {
        response[name] = Value::Null;
    }
    for item in response["output"].as_array_mut().expect("a list") {
        item["id"] = Value::Null;
        if item["type"] == "function_call" {
            item["call_id"] = Value::Null;
        }
    }
    response
}

/// The types of events, in which those that follow one another count once.
fn types(events: &[Value]) -> Vec<&str> {
    let mut types: Vec<&str> = events.iter().map(|event| event["type"].as_str().expect("a type")).collect();
    types.dedup();
    types.into_iter().map(|name| name.strip_prefix("response.").expect("begins so")).collect()
}

#[tokio::test]
async fn a_response_has_the_shape_of_the_api() {
    let server = server().await;
    let response =
        whole(&server, json!({"temperature": 0.5, "metadata": {"chapter": "one"}, "instructions": "Be brief."})).await;
    let begins = |value: &Value, prefix: &str| value.as_str().is_some_and(|text| text.starts_with(prefix));
    assert!(begins(&response["id"], "resp_") && begins(&response["output"][0]["id"], "msg_"), "{response}");
    let part = json!({"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []});
    let message = json!({"type": "message", "id": null, "role": "assistant", "status": "completed", "content": [part]});
    let expected = json!({"id": null, "object": "response", "created_at": null, "completed_at": null, "status": "completed",
        "error": null, "incomplete_details": null, "output": [message], "usage": response["usage"], "model": "words",
        "temperature": 0.5, "top_p": 1.0, "instructions": "Be brief.", "max_output_tokens": null,
        "metadata": {"chapter": "one"}, "parallel_tool_calls": true,
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "tool_choice": "auto", "tools": [],
        "background": false, "max_tool_calls": null, "previous_response_id": null,
        "reasoning": {"effort": null, "summary": null}, "service_tier": "default", "store": false, "top_logprobs": 0,
        "truncation": "disabled"});
    assert_eq!(without_ids(response.clone()), expected);
    let usage = &response["usage"];
    let [input, output] = ["input_tokens", "output_tokens"].map(|name| usage[name].as_u64().expect("a number"));
    assert_eq!(output, ANSWER.len() as u64);
    assert_eq!(usage["total_tokens"], input + output);
    assert_eq!(usage["input_tokens_details"], json!({"cached_tokens": 0, "cache_write_tokens": 0}));
    assert_eq!(usage["output_tokens_details"], json!({"reasoning_tokens": 0}));
}

#[tokio::test]
async fn a_stream_says_the_same_in_typed_events() {
    let server = server().await;
    let expected = whole(&server, json!({})).await;
    let events = events(&server, json!({})).await;
    let of_message = [
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
    ];
    assert_eq!(types(&events), [&["created", "in_progress"][..], &of_message, &["completed"]].concat());
    for begin in &events[..2] {
        let response = &begin["response"];
        assert_eq!(
            (&response["status"], &response["output"], &response["usage"], &response["completed_at"]),
            (&json!("in_progress"), &json!([]), &Value::Null, &Value::Null)
        );
    }
    let deltas: Vec<&str> = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(deltas.concat(), ANSWER);
    let last = &events.last().expect("some")["response"];
    assert_eq!(without_ids(last.clone()), without_ids(expected));
    assert_eq!(last["id"], events[0]["response"]["id"]);
    let item = &last["output"][0];
    let added = events.iter().find(|event| event["type"] == "response.output_item.added").expect("one");
    assert_eq!((&added["item"]["id"], &added["item"]["content"]), (&item["id"], &json!([])));
    assert_eq!(added["item"]["status"], "in_progress");
    let done = events.iter().find(|event| event["type"] == "response.output_item.done").expect("one");
    assert_eq!(done["item"], *item);
    for event in events.iter().filter(|event| event.get("item_id").is_some()) {
        let place = (&event["item_id"], &event["output_index"], &event["content_index"]);
        assert_eq!(place, (&item["id"], &json!(0), &json!(0)), "{event}");
    }
    let filled = self::events(&server, json!({"stream_options": {"include_obfuscation": true}})).await;
    let is_delta = |event: &&Value| event["type"] == "response.output_text.delta";
    assert!(filled.iter().filter(is_delta).all(|event| event["obfuscation"].is_string()), "{filled:?}");
}

/// The scripted model is given the same tokens for a list of items as for the chat that says the same.
#[tokio::test]
async fn items_are_the_messages_of_a_chat() {
    let server = server().await;
    let call = json!({"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}});
    let chat = json!({"model": "words", "seed": 0, "messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "I ask.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"}]});
    let chat = server.post("/v1/chat/completions", &chat).await.expect(200).json();
    let said = json!([
        {"role": "user", "content": [{"type": "input_text", "text": "hel"}, {"type": "input_text", "text": "lo"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "I ask.", "annotations": [], "logprobs": []}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "x"},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": ARGUMENTS, "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"}]);
    let response = whole(&server, json!({"instructions": "Be brief.", "input": said})).await;
    assert_eq!(response["usage"]["input_tokens"], chat["usage"]["prompt_tokens"]);
    assert_eq!(response["output"][0]["content"][0]["text"], chat["choices"][0]["message"]["content"]);
    assert_eq!(response["instructions"], "Be brief.");
}

#[tokio::test]
async fn a_call_is_an_item_and_may_be_sent_back_whole() {
    let server = server().await;
    let tools = json!({"tools": [weather()], "tool_choice": "required", "parallel_tool_calls": false});
    let response = whole(&server, tools.clone()).await;
    let item = &response["output"][0];
    let expected = json!({"type": "function_call", "id": item["id"], "call_id": item["call_id"], "name": "weather",
        "arguments": ARGUMENTS, "status": "completed"});
    assert_eq!((item, response["output"].as_array().map(Vec::len)), (&expected, Some(1)));
    let begins = |name: &str, prefix: &str| item[name].as_str().is_some_and(|id| id.starts_with(prefix));
    assert!(begins("id", "fc_") && begins("call_id", "call_"), "{item}");
    let mut repeated = weather();
    repeated["strict"] = true.into();
    assert_eq!(response["tools"], json!([repeated]));
    assert_eq!((&response["tool_choice"], &response["parallel_tool_calls"]), (&json!("required"), &json!(false)));

    let events = events(&server, tools).await;
    let of_call =
        ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"];
    assert_eq!(types(&events), [&["created", "in_progress"][..], &of_call, &["completed"]].concat());
    let added = &events[2]["item"];
    assert_eq!((&added["name"], &added["arguments"]), (&json!("weather"), &json!("")));
    let deltas: Vec<&str> = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(deltas.concat(), ARGUMENTS);
    assert_eq!(events[events.len() - 3]["arguments"], ARGUMENTS);
    let last = &events.last().expect("some")["response"];
    assert_eq!(without_ids(last.clone()), without_ids(response.clone()));

    let mut input = vec![json!({"role": "user", "content": "hello"})];
    input.extend(response["output"].as_array().expect("a list").iter().cloned());
    input.push(json!({"type": "function_call_output", "call_id": item["call_id"], "output": "rain"}));
    let again = whole(&server, json!({"input": input, "tools": [weather()], "tool_choice": "none"})).await;
    assert_eq!(again["output"][0]["content"][0]["text"], ANSWER);
    server.wait_until_empty().await;
}

#[tokio::test]
async fn tools_may_be_named_and_allowed() {
    let server = server().await;
    let others = json!([weather(), {"type": "function", "name": "other"}, {"type": "function", "name": "third"}]);
    let named = |name: &str| json!({"type": "function", "name": name});
    for (choice, name) in [
        (named("other"), "other"),
        (json!({"type": "allowed_tools", "mode": "required", "tools": [named("third")]}), "third"),
    ] {
        let response =
            whole(&server, json!({"tools": others, "tool_choice": choice, "parallel_tool_calls": false})).await;
        let item = &response["output"][0];
        assert_eq!((&item["name"], &item["arguments"]), (&json!(name), &json!("{}")), "{response}");
        assert_eq!(response["tool_choice"], choice);
    }
    let auto = json!({"type": "allowed_tools", "mode": "auto", "tools": [named("third")]});
    let response = whole(&server, json!({"tools": others, "tool_choice": auto})).await;
    assert_eq!(response["output"][0]["content"][0]["text"], "", "the shortest answer is none: {response}");

    // Chats have the same in another object.
    let nested = |name: &str| json!({"type": "function", "function": {"name": name}});
    let allowed = json!({"mode": "required", "tools": [nested("third")]});
    let chat = json!({"model": "words", "messages": [{"role": "user", "content": "hello"}], "parallel_tool_calls": false,
        "tools": [nested("other"), nested("third")], "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}});
    let chat = server.post("/v1/chat/completions", &chat).await.expect(200).json();
    assert_eq!(chat["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "third");
}

#[tokio::test]
async fn an_answer_is_held_to_the_format_of_its_text() {
    let server = server().await;
    let schema = json!({"type": "object", "properties": {"b": {"type": "integer", "minimum": 0}, "a": {"enum": ["x"]}},
        "required": ["b", "a"], "additionalProperties": false});
    let strict = json!({"type": "json_schema", "name": "n", "strict": true, "schema": schema});
    for (format, expected) in [(strict, r#"{"b":0,"a":"x"}"#), (json!({"type": "json_object"}), "{}")] {
        let response = whole(&server, json!({"text": {"format": format}})).await;
        assert_eq!(response["output"][0]["content"][0]["text"], expected, "{format}");
        assert_eq!(response["text"]["format"], format);
    }
    let response = whole(&server, json!({"guided_choice": ["blue", "azure"]})).await;
    assert_eq!(response["output"][0]["content"][0]["text"], "azure");
}

#[tokio::test]
async fn an_answer_that_is_cut_is_incomplete() {
    let server = server().await;
    let response = whole(&server, json!({"max_output_tokens": 3})).await;
    assert_eq!(
        (
            &response["status"],
            &response["incomplete_details"],
            &response["completed_at"],
            &response["max_output_tokens"]
        ),
        (&json!("incomplete"), &json!({"reason": "max_output_tokens"}), &Value::Null, &json!(3))
    );
    assert_eq!(response["output"][0]["status"], "incomplete");
    assert_eq!(response["output"][0]["content"][0]["text"], ANSWER[..3]);
    let cut = json!({"max_output_tokens": 50, "tools": [weather()], "tool_choice": "required"});
    let call = &whole(&server, cut).await["output"][0];
    assert_eq!((&call["type"], &call["status"]), (&json!("function_call"), &json!("incomplete")), "{call}");
    let events = events(&server, json!({"max_output_tokens": 3})).await;
    assert_eq!(types(&events).last(), Some(&"incomplete"));
    assert_eq!(without_ids(events.last().expect("some")["response"].clone()), without_ids(response));
}

/// As SDKs send it whose users pass every argument as `None`, and agents that fill in some.
#[tokio::test]
async fn what_asks_for_nothing_in_many_words_is_the_plain_response() {
    let server = server().await;
    let expected = without_ids(whole(&server, json!({})).await);
    let names = [
        "background",
        "context_management",
        "conversation",
        "include",
        "instructions",
        "max_output_tokens",
        "max_tool_calls",
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "previous_response_id",
        "prompt",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning",
        "safety_identifier",
        "service_tier",
        "store",
        "stream",
        "stream_options",
        "temperature",
        "text",
        "tool_choice",
        "tools",
        "top_logprobs",
        "top_p",
        "truncation",
        "user",
    ];
    let nulls: serde_json::Map<String, Value> = names.into_iter().map(|name| (name.to_owned(), Value::Null)).collect();
    for extra in [
        Value::Object(nulls),
        json!({"store": false, "truncation": "disabled", "service_tier": "auto", "background": false, "include": []}),
        json!({"include": ["reasoning.encrypted_content"], "reasoning": {"effort": null}, "text": {"verbosity": "medium"}}),
        json!({"text": {"format": {"type": "text"}}, "tools": [], "tool_choice": "auto", "user": "u1", "top_logprobs": 0}),
        json!({"input": [{"role": "user", "content": "hello", "type": "message"}], "prompt_cache_key": "k"}),
    ] {
        assert_eq!(without_ids(whole(&server, extra.clone()).await), expected, "{extra}");
    }
}

#[tokio::test]
async fn what_is_not_done_is_refused_by_name() {
    let server = server().await;
    let (invalid, unsupported, unknown) = ("invalid_value", "unsupported_value", "unknown_parameter");
    let pairs: serde_json::Map<String, Value> = (0..17).map(|number| (format!("a{number}"), "b".into())).collect();
    for (extra, param, code) in [
        (json!({"store": true}), "store", unsupported),
        (json!({"previous_response_id": "resp_1"}), "previous_response_id", unsupported),
        (json!({"conversation": "conv_1"}), "conversation", unsupported),
        (json!({"background": true}), "background", unsupported),
        (json!({"truncation": "auto"}), "truncation", unsupported),
        (json!({"reasoning": {"effort": "high"}}), "reasoning.effort", unsupported),
        (json!({"text": {"verbosity": "low"}}), "text.verbosity", unsupported),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type", unsupported),
        (json!({"tools": [weather(), weather()]}), "tools[1].name", invalid),
        (
            json!({"tools": [{"type": "function", "function": {"name": "a"}}]}),
            "tools[0].name",
            "missing_required_parameter",
        ),
        (json!({"tool_choice": "required"}), "tool_choice", invalid),
        (json!({"tools": [weather()], "tool_choice": {"type": "file_search"}}), "tool_choice.type", unsupported),
        (json!({"tools": [weather()], "tool_choice": {"type": "function", "name": "a"}}), "tool_choice.name", invalid),
        (
            json!({"tools": [weather()], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}),
            "tool_choice.tools",
            invalid,
        ),
        (json!({"response_format": {"type": "json_object"}}), "response_format", unknown),
        (
            json!({"text": {"format": {"type": "json_schema", "name": "a"}}}),
            "text.format.schema",
            "missing_required_parameter",
        ),
        (
            json!({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"format": "x", "type": "string"}}}}),
            "text.format.schema.format",
            invalid,
        ),
        (json!({"text": {"format": {"type": "xml"}}}), "text.format.type", invalid),
        (json!({"text": {"other": 1}}), "text.other", unknown),
        (json!({"metadata": pairs}), "metadata", invalid),
        (json!({"metadata": {"a": 1}}), "metadata", invalid),
        (json!({"metadata": {"a": "b".repeat(513)}}), "metadata", invalid),
        (json!({"max_tokens": 5}), "max_tokens", unknown),
        (json!({"n": 2}), "n", unknown),
        (json!({"max_output_tokens": 100_000}), "max_output_tokens", invalid),
        (json!({"input": null}), "input", "missing_required_parameter"),
        (json!({"input": []}), "input", invalid),
        (json!({"input": [{"type": "item_reference", "id": "msg_1"}]}), "input[0].type", unsupported),
        (json!({"stream_options": {"include_obfuscation": true}}), "stream_options", invalid),
        (json!({"model": "pictures"}), "model", invalid),
    ] {
        let error = server.post(PATH, &asked(extra.clone())).await.expect(400).json()["error"].clone();
        assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!(code)), "{extra}: {error}");
    }
    server.post(PATH, &asked(json!({"model": "none"}))).await.expect(404);
    for answer in [server.get("/v1/responses/resp_1").await, server.delete("/v1/responses/resp_1").await] {
        let error = answer.expect(404).json()["error"].clone();
        assert!(error["message"].as_str().is_some_and(|message| message.contains("not stored")), "{error}");
    }
    server.wait_until_empty().await;
}

#[tokio::test]
async fn a_stream_that_fails_ends_with_the_failure() {
    let server = server().await;
    server.hold.store(true, Relaxed);
    let response = server.send(request("POST", PATH, "application/json", streamed(json!({})).to_string())).await;
    server.wait_for_live(1).await;
    server.fail.store(true, Relaxed);
    let events = read(response).await.expect(200).events();
    let last = events.last().expect("some");
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.failed"), &json!("failed")), "{last}");
    assert_eq!(last["response"]["error"]["code"], "server_error");
    assert!(last["response"]["error"]["message"].as_str().is_some_and(|message| !message.is_empty()), "{last}");
    server.hold.store(false, Relaxed);
    server.post(PATH, &asked(json!({}))).await.expect(500);
}

#[tokio::test]
async fn a_client_that_goes_away_stops_its_work() {
    let server = server().await;
    server.hold.store(true, Relaxed);
    let long = json!({"ignore_eos": true});
    let mut response = server.send(request("POST", PATH, "application/json", streamed(long.clone()).to_string())).await;
    let first = response.body_mut().frame().await.expect("some").expect("sound");
    assert!(first.data_ref().is_some_and(|data| data.starts_with(b"event: response.created\n")));
    server.wait_for_live(1).await;
    drop(response);
    server.wait_until_empty().await;
    let body = asked(long).to_string();
    let waiting = tokio::spawn(crate::support::send(server.address, request("POST", PATH, "application/json", body)));
    server.wait_for_live(1).await;
    waiting.abort();
    server.wait_until_empty().await;
}

/// What an answer repeats counts among the memory of bodies until it is sent.
#[tokio::test]
async fn what_answers_repeat_is_bounded_together() {
    let server = start(Setup { max_body_memory: 14 << 20, ..Setup::default() }).await;
    let mut tool = weather();
    tool["description"] = "a".repeat(5 << 20).into();
    let body = streamed(json!({"tools": [tool], "tool_choice": "none", "ignore_eos": true})).to_string();
    let post = async || server.send(request("POST", PATH, "application/json", body.clone())).await;
    server.hold.store(true, Relaxed);
    let first = post().await;
    assert_eq!(first.status(), 200);
    server.wait_for_live(1).await;
    let second = read(post().await).await.expect(503);
    assert_eq!(second.json()["error"]["code"], "body_memory_full");
    drop(first);
    server.wait_until_empty().await;
    let third = post().await;
    assert_eq!(third.status(), 200);
}
