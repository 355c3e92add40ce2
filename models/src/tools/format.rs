//! How models of a kind write calls.
//!
//! Owns: the text of a call, and the grammar of answers that have some. Does not know: what becomes of either.
//! Sources: the chat templates of Qwen2.5-Instruct and NousResearch's Hermes 2 Pro; the one of Llama-3.1-Instruct, and its
//! model card.

use serde_json::Value;

use super::{Calls, Otherwise, Tool};

/// How calls are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>`, one a line, after some text or none.
    Hermes,
    /// `{"name": "f", "parameters": {}}`, joined by semicolons, and nothing else; a special token may stand before.
    Llama3,
}

/// All of them.
const FORMATS: [ToolFormat; 2] = [ToolFormat::Hermes, ToolFormat::Llama3];

/// The token of Llama 3 after which calls of its built-in tools stand, and sometimes those of others.
const PYTHON_TAG: &str = "<|python_tag|>";

/// The fixed parts of a call.
pub(super) struct Parts {
    /// What no text has: a call begins with it.
    pub(super) marker: &'static str,
    /// From there to the name.
    pub(super) before_name: &'static str,
    /// From the name to the arguments.
    pub(super) before_arguments: &'static str,
    /// Behind the arguments.
    pub(super) close: &'static str,
    /// Between two calls.
    pub(super) between: &'static str,
}

impl ToolFormat {
    pub(super) fn parts(self) -> Parts {
        match self {
            Self::Hermes => Parts {
                marker: "<tool_call>",
                before_name: "\n{\"name\": \"",
                before_arguments: "\", \"arguments\": ",
                close: "}\n</tool_call>",
                between: "\n",
            },
            Self::Llama3 => Parts {
                marker: "{\"name\"",
                before_name: ": \"",
                before_arguments: "\", \"parameters\": ",
                close: "}",
                between: "; ",
            },
        }
    }

    /// The one that a conversation's text is written in, in which the assistant calls this function: as the model's own
    /// template writes it.
    pub fn of_text(text: &str, name: &str) -> Option<Self> {
        let call = |format: Self| {
            let Parts { marker, before_name, before_arguments, .. } = format.parts();
            format!("{marker}{before_name}{name}{before_arguments}")
        };
        FORMATS.into_iter().find(|format| text.contains(&call(*format)))
    }
}

impl Calls {
    /// The grammar of answers, in llguidance's variant of Lark. `written` spells a schema as it is to be compiled, and
    /// `has_token` says whether the vocabulary has a special token.
    pub fn lark(&self, written: impl Fn(&Value) -> Value, has_token: impl Fn(&str) -> bool) -> String {
        let Parts { marker, between, .. } = self.format.parts();
        let (marker, between) = (quoted(marker), quoted(between));
        let more = |call: &str| if self.is_parallel { format!("({call})*") } else { String::new() };
        let tag = match self.format == ToolFormat::Llama3 && has_token(PYTHON_TAG) {
            true => format!("{PYTHON_TAG}? "),
            false => String::new(),
        };
        let calls = format!("{tag}call {}", more(&format!("{between} call")));
        let mut rules = match (&self.otherwise, self.format) {
            (Otherwise::Nothing, _) => format!("start: {calls}\n"),
            (Otherwise::Value { schema, .. }, _) => {
                format!("start: {calls} | value\nvalue: %json {}\n", written(schema))
            }
            // The marker ends a text as soon as it is there.
            (Otherwise::Text, ToolFormat::Hermes) => {
                let first = if self.is_parallel { "(marked rest)* TEXT" } else { "TEXT | marked rest" };
                format!("start: {first}\nmarked[lazy]: TEXT {marker}\nTEXT: /(\\n|.)*/\n")
            }
            (Otherwise::Text, ToolFormat::Llama3) => {
                format!("start: {calls} | TEXT\nTEXT: /(\\n|.)*/ & ~/\\{{\"name\"(\\n|.)*/\n")
            }
        };
        if !(self.otherwise == Otherwise::Text && self.format == ToolFormat::Hermes) {
            rules.push_str(&format!("call: {marker} rest\n"));
        }
        let names: Vec<String> = (0..self.tools.len()).map(|at| format!("call_{at}")).collect();
        rules.push_str(&format!("rest: {}\n", names.join(" | ")));
        for (at, tool) in self.tools.iter().enumerate() {
            rules.push_str(&self.rules_of(at, tool, written(&tool.parameters)));
        }
        rules
    }

    fn rules_of(&self, at: usize, tool: &Tool, parameters: Value) -> String {
        let Parts { before_name, before_arguments, close, .. } = self.format.parts();
        let head = quoted(&format!("{before_name}{}{before_arguments}", tool.name));
        format!("call_{at}: {head} arguments_{at} {}\narguments_{at}: %json {parameters}\n", quoted(close))
    }
}

/// A text as Lark spells a string: as JSON does.
pub(crate) fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
