//! Tools: functions that a model asks its client to call.
//!
//! Owns: what a tool is, how models of a kind write calls (`format.rs`), and reading calls from their text as it comes
//! (`reading.rs`). Does not know: how a grammar is compiled, HTTP, how a conversation becomes text.

use serde_json::{Value, json};

mod format;
mod reading;

pub use format::ToolFormat;
pub(crate) use format::quoted;
pub use reading::{CallReader, Said};

/// Most tools of one request.
pub const MAX_TOOLS: usize = 128;

/// A function that a model may ask for.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// 1 to 64 letters, digits, underscores and dashes.
    pub name: String,
    /// What it is for.
    pub description: Option<String>,
    /// A schema of its arguments, which are an object.
    pub parameters: Value,
    /// Path of that schema in the request, for errors.
    pub field: String,
}

impl Tool {
    /// What a chat template is given, as transformers gives it.
    pub fn to_json(&self) -> Value {
        let Self { name, description, parameters, .. } = self;
        let function = match description {
            Some(description) => json!({"name": name, "description": description, "parameters": parameters}),
            None => json!({"name": name, "parameters": parameters}),
        };
        json!({"type": "function", "function": function})
    }
}

/// What an answer may be where there are tools.
#[derive(Debug, Clone, PartialEq)]
pub struct Calls {
    /// How this model writes a call.
    pub format: ToolFormat,
    /// Those that may be called, at least one.
    pub tools: Vec<Tool>,
    /// Whether one answer may have several calls.
    pub is_parallel: bool,
    /// What an answer without a call may be.
    pub otherwise: Otherwise,
}

/// See [`Calls::otherwise`].
#[derive(Debug, Clone, PartialEq)]
pub enum Otherwise {
    /// Nothing: there is a call.
    Nothing,
    /// Any text.
    Text,
    /// A value of this schema, which stands at this path of the request.
    Value {
        /// The schema.
        schema: Value,
        /// Its path.
        field: String,
    },
}
