//! Chat templates: from messages to the text that a model was trained on.

use std::path::Path;

use crate::error::Result;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, or what the template knows.
    pub role: String,
    /// Text.
    pub content: String,
}

/// A compiled Jinja template with the special tokens that it may name.
#[derive(Debug)]
pub struct ChatTemplate {}

impl ChatTemplate {
    /// From `chat_template.jinja` or `tokenizer_config.json` in `dir`; `None` when the model has none.
    pub fn from_dir(_dir: &Path) -> Result<Option<Self>> {
        todo!()
    }

    /// The conversation as text, ending where the assistant begins to speak.
    pub fn render(&self, _messages: &[ChatMessage]) -> Result<String> {
        todo!()
    }
}
