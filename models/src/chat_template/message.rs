//! What a conversation is made of, and how templates see it.
//!
//! Owns: messages, and calls of tools in them. Does not know: templates.

use minijinja::value::Value;
use serde_json::Map;

/// One message of a conversation.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, or what the template knows.
    pub role: String,
    /// Text.
    pub content: String,
    /// Who speaks, among several of one role; absent from what the template sees where nobody said it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Tools that the assistant called; a message with calls and without text has no content for the template.
    #[serde(skip)]
    pub tool_calls: Vec<ToolCall>,
    /// Of a message with a tool's result: the call that it is the result of.
    #[serde(skip)]
    pub tool_call_id: Option<String>,
}

/// A call of a tool in a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    /// By which its result refers to it.
    pub id: String,
    /// The tool.
    pub name: String,
    /// An object, as templates want it and not as a text.
    pub arguments: Map<String, serde_json::Value>,
}

impl ChatMessage {
    /// One that says this.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.to_owned(), content: content.into(), ..Self::default() }
    }

    /// Bytes of its texts.
    pub fn num_bytes(&self) -> usize {
        let calls = self.tool_calls.iter().map(|call| call.name.len() + call.arguments_json().len());
        self.role.len() + self.content.len() + self.name.as_ref().map_or(0, String::len) + calls.sum::<usize>()
    }

    /// In the order in which `tojson` shows it.
    pub(super) fn for_template(&self) -> Value {
        let has_content = self.tool_calls.is_empty() || !self.content.is_empty();
        let content = if has_content { Value::from(&self.content) } else { Value::from(()) };
        let calls = self.tool_calls.iter().map(ToolCall::for_template).collect::<Vec<_>>();
        let said = [
            ("role", Some(Value::from(&self.role))),
            ("content", Some(content)),
            ("name", self.name.as_ref().map(Value::from)),
            ("tool_calls", (!calls.is_empty()).then(|| Value::from(calls))),
            ("tool_call_id", self.tool_call_id.as_ref().map(Value::from)),
        ];
        Value::from_pairs(said.into_iter().filter_map(|(key, value)| Some((key, value?))))
    }
}

impl ToolCall {
    /// The arguments as a text.
    pub fn arguments_json(&self) -> String {
        serde_json::Value::from(self.arguments.clone()).to_string()
    }

    fn for_template(&self) -> Value {
        let arguments = object(&self.arguments);
        let function = Value::from_pairs([("name", Value::from(&self.name)), ("arguments", arguments)]);
        Value::from_pairs([("id", Value::from(&self.id)), ("type", Value::from("function")), ("function", function)])
    }
}

/// JSON as a template sees it, in its order.
pub(super) fn value_of(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(*value),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => Value::from(whole),
            (None, Some(whole)) => Value::from(whole),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::from(text),
        serde_json::Value::Array(values) => Value::from(values.iter().map(value_of).collect::<Vec<_>>()),
        serde_json::Value::Object(fields) => object(fields),
    }
}

fn object(fields: &Map<String, serde_json::Value>) -> Value {
    Value::from_pairs(fields.iter().map(|(name, value)| (name.as_str(), value_of(value))))
}
