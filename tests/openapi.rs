//! The OpenAPI document says what the server does.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::support::{Answer, Server, server};

const METHODS: [&str; 5] = ["get", "post", "put", "patch", "delete"];

async fn document(server: &Server) -> Value {
    server.get("/openapi.json").await.expect(200).json()
}

#[tokio::test]
async fn the_server_and_the_command_line_give_the_same_document() {
    let printed = Command::new(env!("CARGO_BIN_EXE_tale")).arg("openapi").output().expect("it runs");
    assert!(printed.status.success() && printed.stderr.is_empty(), "{printed:?}");
    let printed: Value = serde_json::from_slice(&printed.stdout).expect("JSON");
    assert_eq!(printed, document(&server().await).await);
    assert_eq!(printed["openapi"], "3.1.0");
}

#[tokio::test]
async fn every_path_takes_the_documented_methods_and_no_others() {
    let server = server().await;
    for (path, methods) in document(&server).await["paths"].as_object().expect("paths") {
        for method in METHODS {
            let answer = server.call(&method.to_uppercase(), &path.replace("{id}", "x"), "", "").await;
            assert_eq!(answer.status != 405, methods.get(method).is_some(), "{method} {path}: {answer:?}");
        }
    }
}

/// Checks values against schemas of a document, as far as the answers of the server need it. A field that no schema of a
/// value has is wrong, too.
struct Checker(Value);

impl Checker {
    fn resolve<'a>(&'a self, schema: &'a Value) -> &'a Value {
        match schema["$ref"].as_str() {
            Some(reference) => self.0.pointer(reference.trim_start_matches('#')).expect("leads somewhere"),
            None => schema,
        }
    }

    /// The fields of an object, and those that it must have.
    fn fields(&self, schema: &Value) -> (Map<String, Value>, Vec<String>) {
        let schema = self.resolve(schema);
        let mut properties = schema["properties"].as_object().cloned().unwrap_or_default();
        let required = schema["required"].as_array().into_iter().flatten();
        let mut required: Vec<String> = required.map(|name| name.as_str().expect("a name").to_owned()).collect();
        for part in schema["allOf"].as_array().into_iter().flatten() {
            let (of_part, required_of_part) = self.fields(part);
            properties.extend(of_part);
            required.extend(required_of_part);
        }
        (properties, required)
    }

    fn check(&self, schema: &Value, value: &Value) -> Result<(), String> {
        let schema = self.resolve(schema);
        if let Some(choices) = schema["anyOf"].as_array() {
            let problems: Result<Vec<String>, ()> =
                choices.iter().map(|choice| self.check(choice, value).err().ok_or(())).collect();
            return problems.map_or(Ok(()), |problems| Err(problems.join(" | ")));
        }
        let refuse = |problem: &str| Err(format!("{value}: {problem} of {schema}"));
        if let Some(constant) = schema.get("const").filter(|constant| *constant != value) {
            return refuse(&constant.to_string());
        }
        if schema["enum"].as_array().is_some_and(|values| !values.contains(value)) {
            return refuse("enum");
        }
        if schema.get("type").is_some_and(|types| !has_type(types, value)) {
            return refuse("type");
        }
        if schema["minimum"].as_f64().is_some_and(|min| value.as_f64().is_some_and(|value| value < min)) {
            return refuse("minimum");
        }
        for element in value.as_array().into_iter().flatten() {
            self.check(&schema["items"], element)?;
        }
        let (properties, required) = self.fields(schema);
        // The fields of an object that may be null instead.
        if value.is_null() && schema["type"].is_array() {
            return Ok(());
        }
        if let Some(missing) = required.iter().find(|name| value.get(name).is_none()) {
            return refuse(&format!("required {missing}"));
        }
        for (name, field) in value.as_object().into_iter().flatten() {
            let others = schema.get("additionalProperties").filter(|others| others.is_object());
            let Some(schema) = properties.get(name).or(others) else { return refuse(&format!("no {name}")) };
            self.check(schema, field).map_err(|problem| format!("{name}: {problem}"))?;
        }
        Ok(())
    }

    /// Checks a whole answer against the schema of its operation, each event of a stream alone.
    #[track_caller]
    fn answer(&self, method: &str, path: &str, answer: &Answer) {
        let responses = &self.0["paths"][path][method]["responses"];
        let response = responses.get(answer.status.as_str()).unwrap_or(&responses["default"]);
        let media_type = answer.header("content-type").split(';').next().expect("a first part");
        let schema = &self.resolve(response)["content"][media_type]["schema"];
        assert!(schema.is_object(), "{method} {path}: {media_type} is not documented");
        let bodies = if media_type == "text/event-stream" { answer.events() } else { vec![answer.json()] };
        assert!(!bodies.is_empty(), "{answer:?}");
        for body in bodies.iter().filter(|body| **body != "[DONE]") {
            self.check(schema, body).unwrap_or_else(|problem| panic!("{method} {path}: {problem}"));
        }
    }
}

fn has_type(types: &Value, value: &Value) -> bool {
    let is = |name: &Value| match name.as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("number") => value.is_number(),
        Some("integer") => value.is_u64() || value.is_i64(),
        Some("null") => value.is_null(),
        _ => false,
    };
    types.as_array().map_or_else(|| is(types), |types| types.iter().any(is))
}

#[tokio::test]
async fn answers_with_text_and_images_are_as_documented() {
    let server = server().await;
    let checker = Checker(document(&server).await);
    let chat = json!({"model": "words", "messages": [{"role": "user", "content": "hello"}]});
    let text = json!({"model": "words", "prompt": "hello"});
    let (mut told_chat, mut told_text) = (chat.clone(), text.clone());
    (told_chat["logprobs"], told_chat["top_logprobs"]) = (true.into(), 2.into());
    (told_text["logprobs"], told_text["echo"]) = (2.into(), true.into());
    let image = json!({"model": "pictures", "prompt": "a boat", "negative_prompt": "a car", "guidance_scale": 2});
    for (path, body) in [
        ("/v1/chat/completions", chat),
        ("/v1/completions", text),
        ("/v1/chat/completions", told_chat),
        ("/v1/completions", told_text),
        ("/v1/responses", json!({"model": "words", "input": "hello"})),
        ("/v1/images/generations", image),
        ("/v1/images/edits", json!({})),
    ] {
        let mut stream = body.clone();
        stream["stream"] = true.into();
        if path.contains("completions") || path.contains("responses") {
            stream["stream_options"] = json!({"include_usage": true, "include_obfuscation": true});
        }
        for body in [body, stream, json!({"model": "none"})] {
            checker.answer("post", path, &server.post(path, &body).await);
        }
    }
    let call = json!({"model": "words", "input": "hello", "tools": [{"type": "function", "name": "f"}],
        "tool_choice": "required", "parallel_tool_calls": false});
    let mut streamed = call.clone();
    streamed["stream"] = true.into();
    for body in [call, streamed] {
        checker.answer("post", "/v1/responses", &server.post("/v1/responses", &body).await);
    }
    checker.answer("get", "/v1/responses/{id}", &server.get("/v1/responses/resp_1").await);
    checker.answer("get", "/v1/models", &server.get("/v1/models").await);
    checker.answer("get", "/v1/models/{id}", &server.get("/v1/models/words").await);
    checker.answer("get", "/v1/models/{id}", &server.get("/v1/models/none").await);
    checker.answer("post", "/v1/models/{id}", &server.post("/v1/models/words/unload", &json!({})).await.expect(403));
}

#[tokio::test]
async fn answers_about_videos_are_as_documented() {
    let server = server().await;
    let checker = Checker(document(&server).await);
    let body = json!({"model": "clips", "prompt": "a boat", "guidance_interval": [0, 0.5], "partial_images": 1});
    let created = server.post("/v1/videos", &body).await.expect(200);
    checker.answer("post", "/v1/videos", &created);
    let id = created.json()["id"].as_str().expect("a name").to_owned();
    let events = server.get(&format!("/v1/jobs/{id}/events")).await;
    checker.answer("get", "/v1/jobs/{id}/events", &events);
    let begun = Instant::now();
    let path = format!("/v1/videos/{id}");
    let video = loop {
        let video = server.get(&path).await;
        if video.json()["status"] == "completed" {
            break video;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{video:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    checker.answer("get", "/v1/videos/{id}", &video);
    checker.answer("get", "/v1/videos", &server.get("/v1/videos?limit=1").await);
    checker.answer("get", "/v1/videos", &server.get("/v1/videos?limit=0").await);
    checker.answer("delete", "/v1/videos/{id}", &server.delete(&path).await);
    checker.answer("get", "/v1/videos/{id}/content", &server.get(&format!("{path}/content")).await);
}

/// Without this, a checker that accepts everything would do.
#[tokio::test]
async fn an_answer_that_is_not_as_documented_is_found() {
    let checker = Checker(document(&server().await).await);
    let check = |value: Value| checker.check(&json!({"$ref": "#/components/schemas/Model"}), &value);
    let model =
        json!({"id": "a", "object": "model", "created": 1, "owned_by": "tale", "state": "ready", "devices": ["cpu"]});
    assert_eq!(check(model.clone()), Ok(()));
    for (name, wrong) in [("object", json!("video")), ("created", json!(-1)), ("id", json!(5)), ("other", json!(1))] {
        let mut model = model.clone();
        model[name] = wrong;
        assert!(check(model).is_err(), "{name}");
    }
    assert!(check(json!({"id": "a"})).is_err());
}
