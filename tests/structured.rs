//! Answers that are held to something, and calls of tools. The scripted model says the shortest text that it may.

use serde_json::{Value, json};

use crate::support::server;

fn chat(extra: Value) -> Value {
    let mut body = json!({"model": "words", "messages": [{"role": "user", "content": "hello"}], "seed": 0});
    for (name, value) in extra.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body
}

#[tokio::test]
async fn an_answer_is_held_to_what_the_request_says() {
    let server = server().await;
    let schema = json!({"type": "object", "properties": {"b": {"type": "integer", "minimum": 0}, "a": {"enum": ["x"]}},
        "required": ["b", "a"], "additionalProperties": false});
    let strict = json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": schema}});
    let expected = r#"{"b":0,"a":"x"}"#;
    for (extra, expected) in [
        (json!({"response_format": strict}), expected),
        (json!({"guided_json": schema.to_string()}), expected),
        (json!({"structured_outputs": {"json": schema}}), expected),
        (json!({"response_format": {"type": "json_object"}}), "{}"),
        (json!({"guided_choice": ["blue", "azure"]}), "azure"),
        (json!({"guided_regex": "[b-d]{3}"}), "bbb"),
        (json!({"structured_outputs": {"grammar": "start: \"<\" /[x-z]/ \">\""}}), "<x>"),
    ] {
        let body = chat(extra.clone());
        let choice = server.post("/v1/chat/completions", &body).await.expect(200).json()["choices"][0].clone();
        let text = choice["message"]["content"].as_str().unwrap_or_default();
        assert_eq!((text, &choice["finish_reason"]), (expected, &json!("stop")), "{extra}");
        let mut completion = body.clone();
        completion.as_object_mut().expect("fields").remove("messages");
        completion["prompt"] = json!("hello");
        completion["n"] = json!(2);
        let answer = server.post("/v1/completions", &completion).await.expect(200).json();
        assert_eq!(
            (&answer["choices"][0]["text"], &answer["choices"][1]["text"]),
            (&json!(expected), &json!(expected))
        );
        let mut streamed = body;
        streamed["stream"] = json!(true);
        let events = server.post("/v1/chat/completions", &streamed).await.expect(200).events();
        let pieces = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
        assert_eq!(pieces.collect::<String>(), expected, "{extra}");
    }
    let cut = chat(json!({"response_format": strict, "max_tokens": 4}));
    let answer = server.post("/v1/chat/completions", &cut).await.expect(200).json();
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    server.wait_until_empty().await;
}

fn weather() -> Value {
    json!({"type": "function", "function": {"name": "weather", "description": "Of a place.", "parameters": {
        "type": "object", "properties": {"place": {"enum": ["here"]}, "days": {"type": "integer", "minimum": 0}},
        "required": ["place", "days"], "additionalProperties": false}}})
}

#[tokio::test]
async fn a_call_has_the_shape_of_the_api_whole_and_streamed() {
    let server = server().await;
    let body = chat(json!({"tools": [weather()], "tool_choice": "required", "parallel_tool_calls": false}));
    let choice = server.post("/v1/chat/completions", &body).await.expect(200).json()["choices"][0].clone();
    let message = &choice["message"];
    assert_eq!((&choice["finish_reason"], &message["content"]), (&json!("tool_calls"), &Value::Null), "{choice}");
    let call = &message["tool_calls"][0];
    assert!(call["id"].as_str().is_some_and(|id| id.starts_with("call_")), "{call}");
    let arguments = r#"{"place":"here","days":0}"#;
    assert_eq!(
        (&call["type"], &call["function"]),
        (&json!("function"), &json!({"name": "weather", "arguments": arguments}))
    );

    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let events = server.post("/v1/chat/completions", &streamed).await.expect(200).events();
    let deltas: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["delta"]["tool_calls"][0]).collect();
    let named: Vec<&&Value> = deltas.iter().filter(|delta| delta["id"].is_string()).collect();
    assert_eq!(named.len(), 1);
    assert_eq!((&named[0]["index"], &named[0]["function"]), (&json!(0), &json!({"name": "weather", "arguments": ""})));
    let fragments: Vec<&str> = deltas.iter().filter_map(|delta| delta["function"]["arguments"].as_str()).collect();
    // How many there are is a matter of time: tokens that are ready at once share an event.
    assert_eq!(fragments.concat(), arguments);
    let reasons: Vec<&str> = events.iter().filter_map(|event| event["choices"][0]["finish_reason"].as_str()).collect();
    assert_eq!(reasons, ["tool_calls"]);

    // The call goes back with its result, and the template shows both.
    let again = json!({"messages": [
        {"role": "user", "content": "hello"}, message, {"role": "tool", "tool_call_id": call["id"], "content": "rain"}]});
    let answer = server.post("/v1/chat/completions", &chat(again)).await.expect(200).json();
    let longer = answer["usage"]["prompt_tokens"].as_u64().expect("a number");
    assert!(longer > 100, "{answer}");
    server.wait_until_empty().await;
}

#[tokio::test]
async fn tools_may_be_named_and_left_alone() {
    let server = server().await;
    let other = json!({"type": "function", "function": {"name": "other"}});
    let named =
        json!({"tools": [weather(), other], "tool_choice": {"type": "function", "function": {"name": "other"}}});
    let choice = server.post("/v1/chat/completions", &chat(named)).await.expect(200).json()["choices"][0].clone();
    assert_eq!(choice["message"]["tool_calls"][0]["function"], json!({"name": "other", "arguments": "{}"}), "{choice}");
    // The shortest answer of a model that may call is none; one that is held to a schema otherwise is of that.
    let auto = chat(json!({"tools": [weather()]}));
    let choice = server.post("/v1/chat/completions", &auto).await.expect(200).json()["choices"][0].clone();
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!(""), &json!("stop")));
    // What tools are not called for is not shown to the model either.
    let plain = server.post("/v1/chat/completions", &chat(json!({}))).await.expect(200).json();
    let none = chat(json!({"tools": [weather()], "tool_choice": "none"}));
    let none = server.post("/v1/chat/completions", &none).await.expect(200).json();
    assert_eq!((&none["choices"], &none["usage"]), (&plain["choices"], &plain["usage"]));
}
