//! `input` and `instructions`: what was said before, as messages.
//!
//! Owns: the items of `input`. Does not know: what a template makes of messages.

use std::collections::HashSet;

use serde::Deserialize;
use tale_models::chat_template::{ChatMessage, ToolCall};

use super::super::structured::{given, no_others, object, required};
use crate::http::body::of_field;
use crate::http::body::value::{Object, Value};
use crate::http::error::ApiError;

/// The messages of a conversation that `instructions` stand before.
pub(super) fn messages(instructions: Option<&str>, input: Value) -> Result<Vec<ChatMessage>, ApiError> {
    let mut said = Said::default();
    said.messages.extend(instructions.map(|text| ChatMessage::new("system", text)));
    match input {
        Value::Text(text) => said.messages.push(ChatMessage::new("user", text)),
        Value::List(items) => {
            for (index, item) in items.into_iter().enumerate() {
                said.add(&format!("input[{index}]"), item)?;
            }
        }
        _ => return Err(ApiError::field("input", "must be a string or a list of items")),
    }
    Ok(said.messages)
}

/// What the items so far say.
#[derive(Default)]
struct Said {
    messages: Vec<ChatMessage>,
    /// Ids of all calls.
    calls: HashSet<String>,
}

/// An item of the type `message`, or without a type.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Message {
    role: Role,
    #[serde(rename = "id")]
    _id: Option<String>,
    #[serde(rename = "status")]
    _status: Option<Status>,
    #[serde(rename = "phase")]
    _phase: Option<Phase>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    System,
    /// OpenAI's newer name of `system`; chat templates know the older one.
    Developer,
    User,
    Assistant,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    InProgress,
    Completed,
    Incomplete,
}

/// What a message of an answer was for.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Phase {
    Commentary,
    FinalAnswer,
}

/// A call that the assistant made.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FunctionCall {
    call_id: String,
    name: String,
    arguments: String,
    #[serde(rename = "id")]
    _id: Option<String>,
    #[serde(rename = "status")]
    _status: Option<Status>,
}

/// The result of a call.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FunctionCallOutput {
    call_id: String,
    #[serde(rename = "name")]
    _name: Option<String>,
    #[serde(rename = "id")]
    _id: Option<String>,
    #[serde(rename = "status")]
    _status: Option<Status>,
}

/// What a model thought, of another server.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Reasoning {
    #[serde(rename = "id")]
    _id: Option<String>,
    #[serde(rename = "summary")]
    _summary: Option<Vec<serde_json::Value>>,
    #[serde(rename = "content")]
    _content: Option<Vec<serde_json::Value>>,
    #[serde(rename = "encrypted_content")]
    _encrypted_content: Option<String>,
    #[serde(rename = "status")]
    _status: Option<Status>,
}

impl Said {
    /// Adds the item at `path`.
    fn add(&mut self, path: &str, item: Value) -> Result<(), ApiError> {
        let mut fields = object(path, item)?;
        let kind_path = format!("{path}.type");
        let kind = match given(&mut fields, "type") {
            None if fields.contains_key("role") => return self.add_message(path, fields),
            kind => required(&kind_path, kind)?,
        };
        match kind.text() {
            Some("message") => self.add_message(path, fields),
            Some("function_call") => self.add_call(path, fields),
            Some("function_call_output") => self.add_result(path, fields),
            // No model here makes any, and templates show none of earlier turns: what was thought is not part of what was said.
            Some("reasoning") => of_field(path, Value::Object(fields), Reasoning::deserialize).map(drop),
            Some("item_reference") => {
                let problem = "item_reference is not supported: no items are stored here; send the item itself, as clients do \
                               that set store to false";
                Err(ApiError::field_code(kind_path, "unsupported_value", problem))
            }
            _ => {
                let problem = "only message, function_call, function_call_output and reasoning are supported";
                Err(ApiError::field_code(kind_path, "unsupported_value", problem))
            }
        }
    }

    fn add_message(&mut self, path: &str, mut fields: Object) -> Result<(), ApiError> {
        let content_path = format!("{path}.content");
        let content = given(&mut fields, "content");
        let message = of_field(path, Value::Object(fields), Message::deserialize)?;
        let role = match message.role {
            Role::System | Role::Developer => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        self.messages.push(ChatMessage::new(role, content_text(&content_path, required(&content_path, content)?)?));
        Ok(())
    }

    /// Calls are of the assistant's message before them, if there is one: of one turn.
    fn add_call(&mut self, path: &str, fields: Object) -> Result<(), ApiError> {
        let FunctionCall { call_id, name, arguments, .. } =
            of_field(path, Value::Object(fields), FunctionCall::deserialize)?;
        let arguments = serde_json::from_str(&arguments)
            .map_err(|_| ApiError::field(format!("{path}.arguments"), "must be the text of a JSON object"))?;
        self.calls.insert(call_id.clone());
        let call = ToolCall { id: call_id, name, arguments };
        match self.messages.last_mut() {
            Some(message) if message.role == "assistant" => message.tool_calls.push(call),
            _ => self.messages.push(ChatMessage { tool_calls: vec![call], ..ChatMessage::new("assistant", "") }),
        }
        Ok(())
    }

    fn add_result(&mut self, path: &str, mut fields: Object) -> Result<(), ApiError> {
        let output_path = format!("{path}.output");
        let output = given(&mut fields, "output");
        let result = of_field(path, Value::Object(fields), FunctionCallOutput::deserialize)?;
        if !self.calls.contains(&result.call_id) {
            return Err(ApiError::field(format!("{path}.call_id"), "is the id of no call before it"));
        }
        let text = content_text(&output_path, required(&output_path, output)?)?;
        self.messages.push(ChatMessage { tool_call_id: Some(result.call_id), ..ChatMessage::new("tool", text) });
        Ok(())
    }
}

/// A text, or a list of parts, whose texts are joined.
fn content_text(path: &str, content: Value) -> Result<String, ApiError> {
    let parts = match content {
        Value::Text(text) => return Ok(text),
        Value::List(parts) => parts,
        _ => return Err(ApiError::field(path, "must be a string or a list of parts")),
    };
    let mut joined = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        let path = format!("{path}[{index}]");
        let mut fields = object(&path, part)?;
        let kind_path = format!("{path}.type");
        match required(&kind_path, given(&mut fields, "type"))?.text() {
            Some("input_text" | "output_text") => (),
            _ => {
                let problem = "is text here: only input_text and output_text are supported";
                return Err(ApiError::field_code(kind_path, "unsupported_value", problem));
            }
        }
        let text_path = format!("{path}.text");
        match required(&text_path, given(&mut fields, "text"))?.text() {
            Some(text) => joined.push_str(text),
            None => return Err(ApiError::field(text_path, "must be a string")),
        }
        no_others(&path, &fields, &["type", "text"])?;
    }
    Ok(joined)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Vec<ChatMessage>, String> {
        let input = Value::from_json(json.as_bytes()).expect(json);
        messages(Some("Be brief."), input).map_err(|error| {
            let body = serde_json::to_value(error.body()).expect("serializes");
            body["param"].as_str().unwrap_or_default().to_owned()
        })
    }

    fn call(id: &str) -> ToolCall {
        let arguments = serde_json::Map::from_iter([("a".to_owned(), 1.into())]);
        ToolCall { id: id.to_owned(), name: "f".to_owned(), arguments }
    }

    #[test]
    fn items_become_messages_and_the_calls_of_a_turn_one_message() {
        let system = ChatMessage::new("system", "Be brief.");
        assert_eq!(read(r#""hello""#), Ok(vec![system.clone(), ChatMessage::new("user", "hello")]));
        let turn = r#"[
            {"role": "developer", "content": "In English."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "phase": null,
             "content": [{"type": "output_text", "text": "I ask."}]},
            {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{\"a\": 1}", "status": "completed"},
            {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{\"a\": 1}"},
            {"type": "function_call_output", "call_id": "c1", "output": "one"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
            {"type": "function_call", "call_id": "c3", "name": "f", "arguments": "{\"a\": 1}"}]"#;
        let result =
            |id: &str, text: &str| ChatMessage { tool_call_id: Some(id.to_owned()), ..ChatMessage::new("tool", text) };
        let expected = vec![
            system,
            ChatMessage::new("system", "In English."),
            ChatMessage::new("user", "ab"),
            ChatMessage { tool_calls: vec![call("c1"), call("c2")], ..ChatMessage::new("assistant", "I ask.") },
            result("c1", "one"),
            result("c2", "two"),
            ChatMessage { tool_calls: vec![call("c3")], ..ChatMessage::new("assistant", "") },
        ];
        assert_eq!(read(turn), Ok(expected));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (json, param) in [
            ("5", "input"),
            ("[5]", "input[0]"),
            (r#"[{"content": "a"}]"#, "input[0].type"),
            (r#"[{"id": "msg_1", "type": "item_reference"}]"#, "input[0].type"),
            (r#"[{"type": "web_search_call", "id": "a"}]"#, "input[0].type"),
            (r#"[{"role": "tool", "content": "a"}]"#, "input[0].role"),
            (r#"[{"role": "user"}]"#, "input[0].content"),
            (r#"[{"role": "user", "content": 5}]"#, "input[0].content"),
            (r#"[{"role": "user", "content": "a", "name": "ann"}]"#, "input[0].name"),
            (
                r#"[{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]"#,
                "input[0].content[0].type",
            ),
            (r#"[{"role": "user", "content": [{"type": "input_text"}]}]"#, "input[0].content[0].text"),
            (
                r#"[{"role": "user", "content": [{"type": "input_text", "text": "a", "x": 1}]}]"#,
                "input[0].content[0].x",
            ),
            (r#"[{"type": "function_call", "call_id": "c", "name": "f", "arguments": "5"}]"#, "input[0].arguments"),
            (r#"[{"type": "function_call", "call_id": "c", "arguments": "{}"}]"#, "input[0].name"),
            (r#"[{"type": "function_call_output", "call_id": "c", "output": "a"}]"#, "input[0].call_id"),
            (r#"[{"type": "reasoning", "id": "a", "summary": 5}]"#, "input[0].summary"),
        ] {
            assert_eq!(read(json), Err(param.to_owned()), "{json}");
        }
    }
}
