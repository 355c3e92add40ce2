//! A conversation, as a template is given it.
//!
//! Owns: where the text of a conversation ends, and what its template sees. Does not know: templates' programs, tokens.

use minijinja::value::Value;

use super::message::{ChatMessage, value_of};
use crate::error::{Error, Result};
use crate::tools::Tool;

/// Variables that are made of other fields of a request.
pub(super) const RESERVED: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];
/// Most bytes of further variables, as JSON.
const MAX_VARIABLES_BYTES: usize = 16 << 10;
/// Behind the message that is continued while its conversation is rendered: shows where its text ends. Its space is there to
/// be trimmed, which tells whether the template trims messages.
const MARK: &str = "THE-REST-IS-WRITTEN-HERE ";

/// Where the text of a conversation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ending {
    /// Where the assistant begins to speak (`add_generation_prompt`).
    #[default]
    Answer,
    /// Behind the last message.
    Messages,
    /// In the last message, which the model goes on with (`continue_final_message`).
    FinalMessage,
}

/// What a template makes a text of.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversation {
    /// What was said.
    pub messages: Vec<ChatMessage>,
    /// Tools that the model may call.
    pub tools: Vec<Tool>,
    /// Where its text ends.
    pub ending: Ending,
    /// Further variables of the template (`chat_template_kwargs`).
    pub variables: serde_json::Map<String, serde_json::Value>,
}

impl From<Vec<ChatMessage>> for Conversation {
    /// Ends where the assistant begins to speak.
    fn from(messages: Vec<ChatMessage>) -> Self {
        Self { messages, ..Self::default() }
    }
}

impl Conversation {
    /// Bytes of what its template is given.
    pub fn num_bytes(&self) -> usize {
        let messages: usize = self.messages.iter().map(ChatMessage::num_bytes).sum();
        let tools: usize = self.tools.iter().map(|tool| tool.to_json().to_string().len()).sum();
        messages + tools + self.variables_bytes()
    }

    fn variables_bytes(&self) -> usize {
        self.variables.iter().map(|(name, value)| name.len() + value.to_string().len()).sum()
    }

    /// Refuses variables that have fields of their own, those that `is_variable` does not know, and too large ones.
    pub(super) fn check_variables(&self, is_variable: impl Fn(&str) -> bool) -> Result<()> {
        let num_bytes = self.variables_bytes();
        if num_bytes > MAX_VARIABLES_BYTES {
            let problem = format!("has {num_bytes} bytes; at most {MAX_VARIABLES_BYTES}");
            return Err(Error::invalid("chat_template_kwargs", problem));
        }
        for name in self.variables.keys() {
            let problem = match () {
                () if RESERVED.contains(&name.as_str()) => "has a field of its own",
                () if !is_variable(name) => "is no variable of this model's chat template",
                () => continue,
            };
            return Err(Error::invalid(format!("chat_template_kwargs.{name}"), problem));
        }
        Ok(())
    }

    /// What the template sees of it.
    pub(super) fn values(&self) -> Vec<(&str, Value)> {
        let mut messages: Vec<Value> = self.messages.iter().map(ChatMessage::for_template).collect();
        if let (Ending::FinalMessage, Some(message), Some(shown)) =
            (self.ending, self.messages.last(), messages.last_mut())
        {
            let marked = ChatMessage { content: format!("{}{MARK}", message.content), ..message.clone() };
            *shown = marked.for_template();
        }
        let tools: Vec<Value> = self.tools.iter().map(|tool| value_of(&tool.to_json())).collect();
        let mut values: Vec<(&str, Value)> =
            self.variables.iter().map(|(name, value)| (name.as_str(), value_of(value))).collect();
        values.push(("messages", messages.into()));
        values.push(("tools", if tools.is_empty() { Value::from(()) } else { tools.into() }));
        values.push(("add_generation_prompt", Value::from(self.ending == Ending::Answer)));
        values
    }

    /// What is left of the rendered text; `None` where a template does not show the message that is to be continued. As
    /// transformers' `render_jinja_template`.
    pub(super) fn cut(&self, mut text: String) -> Option<String> {
        if self.ending == Ending::FinalMessage {
            let place = text.rfind(MARK.trim_end())?;
            let is_trimmed = !text[place..].starts_with(MARK);
            text.truncate(place);
            if is_trimmed {
                text.truncate(text.trim_end().len());
            }
        }
        Some(text)
    }
}
