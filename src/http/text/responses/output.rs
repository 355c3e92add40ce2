//! The items of an answer, as its text comes.
//!
//! Owns: which items there are, how each begins, grows and ends. Does not know: events, HTTP.

use serde::Serialize;
use tale_models::request::FinishReason;
use tale_models::tools::{CallReader, Said, ToolFormat};
use uuid::Uuid;

use super::super::answer::call_id;

/// What became of an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    InProgress,
    Completed,
    /// The answer was cut within it.
    Incomplete,
}

/// A message, or a call of a tool.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Item {
    Message { id: String, role: &'static str, status: Status, content: Vec<Part> },
    FunctionCall { id: String, call_id: String, name: String, arguments: String, status: Status },
}

/// The text of a message.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(tag = "type", rename = "output_text")]
pub(super) struct Part {
    pub(super) text: String,
    annotations: [(); 0],
    logprobs: [(); 0],
}

impl Item {
    fn message() -> Self {
        Self::Message {
            id: format!("msg_{}", Uuid::now_v7().simple()),
            role: "assistant",
            status: Status::InProgress,
            content: vec![Part::default()],
        }
    }

    fn call(name: String) -> Self {
        let id = format!("fc_{}", Uuid::now_v7().simple());
        Self::FunctionCall { id, call_id: call_id(), name, arguments: String::new(), status: Status::InProgress }
    }

    pub(super) fn id(&self) -> &str {
        match self {
            Self::Message { id, .. } | Self::FunctionCall { id, .. } => id,
        }
    }

    /// As it was when it began.
    pub(super) fn begun(&self) -> Self {
        let status = Status::InProgress;
        match self {
            Self::Message { id, role, .. } => Self::Message { id: id.clone(), role, status, content: Vec::new() },
            Self::FunctionCall { id, call_id, name, .. } => Self::FunctionCall {
                id: id.clone(),
                call_id: call_id.clone(),
                name: name.clone(),
                arguments: String::new(),
                status,
            },
        }
    }

    /// The text of a message or of a call's arguments.
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Message { content, .. } => content.first().map_or("", |part| &part.text),
            Self::FunctionCall { arguments, .. } => arguments,
        }
    }

    fn status_mut(&mut self) -> &mut Status {
        match self {
            Self::Message { status, .. } | Self::FunctionCall { status, .. } => status,
        }
    }

    fn push(&mut self, text: &str) {
        match self {
            Self::Message { content, .. } => content.iter_mut().for_each(|part| part.text.push_str(text)),
            Self::FunctionCall { arguments, .. } => arguments.push_str(text),
        }
    }
}

/// What happened to an item.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    Began,
    /// It has this text more.
    Grew(String),
    Ended,
}

/// A change, and the place of the item.
pub(super) type Changed = (usize, Change);

/// An answer, as far as it came.
#[derive(Debug)]
pub(super) struct Output {
    items: Vec<Item>,
    reader: Option<CallReader>,
    /// Whether the last item may grow.
    is_open: bool,
}

impl Output {
    /// Before the first token; calls may come where it is known how they are written.
    pub(super) fn new(tool_format: Option<ToolFormat>) -> Self {
        Self { items: Vec::new(), reader: tool_format.map(CallReader::new), is_open: false }
    }

    pub(super) fn items(&self) -> &[Item] {
        &self.items
    }

    /// Bytes of its texts.
    pub(super) fn num_bytes(&self) -> usize {
        self.items.iter().map(|item| item.text().len()).sum()
    }

    /// What `text` changes.
    pub(super) fn push(&mut self, text: String) -> Vec<Changed> {
        let mut changes = Vec::new();
        match &mut self.reader {
            None if text.is_empty() => (),
            None => self.say(text, &mut changes),
            Some(reader) => {
                let said = reader.push(&text);
                said.into_iter().for_each(|said| self.add(said, &mut changes));
            }
        }
        changes
    }

    /// What its end changes. An answer that says nothing is an empty message.
    pub(super) fn finish(&mut self, reason: FinishReason) -> Vec<Changed> {
        let mut changes = Vec::new();
        let rest = self.reader.as_mut().map_or(Vec::new(), CallReader::finish);
        rest.into_iter().for_each(|said| self.add(said, &mut changes));
        if self.items.is_empty() {
            self.begin(Item::message(), &mut changes);
        }
        self.end(if reason == FinishReason::Length { Status::Incomplete } else { Status::Completed }, &mut changes);
        changes
    }

    fn add(&mut self, said: Said, changes: &mut Vec<Changed>) {
        match said {
            Said::Text(text) => self.say(text, changes),
            Said::Call(name) => self.begin(Item::call(name), changes),
            Said::Arguments(text) => self.grow(text, changes),
            Said::End => self.end(Status::Completed, changes),
        }
    }

    fn say(&mut self, text: String, changes: &mut Vec<Changed>) {
        let is_message = matches!(self.items.last(), Some(Item::Message { .. }));
        if !(self.is_open && is_message) {
            self.begin(Item::message(), changes);
        }
        self.grow(text, changes);
    }

    fn begin(&mut self, item: Item, changes: &mut Vec<Changed>) {
        self.end(Status::Completed, changes);
        changes.push((self.items.len(), Change::Began));
        self.items.push(item);
        self.is_open = true;
    }

    fn grow(&mut self, text: String, changes: &mut Vec<Changed>) {
        let place = self.items.len().saturating_sub(1);
        let Some(item) = self.items.last_mut() else { return };
        item.push(&text);
        changes.push((place, Change::Grew(text)));
    }

    /// Ends the last item, if it is still open.
    fn end(&mut self, status: Status, changes: &mut Vec<Changed>) {
        let place = self.items.len().saturating_sub(1);
        let Some(item) = self.items.last_mut().filter(|_| self.is_open) else { return };
        *item.status_mut() = status;
        self.is_open = false;
        changes.push((place, Change::Ended));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Items as `kind status text`, of an answer that comes in pieces of `size` bytes; also checks that what is told of the
    /// changes makes the same texts.
    fn told(text: &str, size: usize, reason: FinishReason, format: Option<ToolFormat>) -> Vec<String> {
        let mut output = Output::new(format);
        let mut changes = Vec::new();
        for piece in text.as_bytes().chunks(size) {
            changes.extend(output.push(String::from_utf8(piece.to_vec()).expect("ASCII")));
        }
        changes.extend(output.finish(reason));
        let mut grown: Vec<String> = Vec::new();
        let mut open = None;
        for (place, change) in changes {
            match change {
                Change::Began => {
                    assert_eq!((open, place), (None, grown.len()));
                    grown.push(String::new());
                    open = Some(place);
                }
                Change::Grew(text) => {
                    assert_eq!(open, Some(place));
                    grown[place].push_str(&text);
                }
                Change::Ended => assert_eq!(open.take(), Some(place)),
            }
        }
        assert_eq!(open, None);
        assert_eq!(grown, output.items().iter().map(Item::text).collect::<Vec<_>>());
        let line = |item: &Item| match item {
            Item::Message { status, .. } => format!("message {status:?} {}", item.text()),
            Item::FunctionCall { status, name, .. } => format!("{name} {status:?} {}", item.text()),
        };
        output.items().iter().map(line).collect()
    }

    #[test]
    fn texts_and_calls_are_items_in_their_order() {
        let hermes = Some(ToolFormat::Hermes);
        let call =
            |name: &str| format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {{\"a\": 1}}}}\n</tool_call>");
        let both = format!("I ask.\n{}\n{}", call("f"), call("g"));
        for size in [1, 3, 1000] {
            let expected = ["message Completed I ask.", "f Completed {\"a\": 1}", "g Completed {\"a\": 1}"];
            assert_eq!(told(&both, size, FinishReason::Stop, hermes), expected);
            assert_eq!(told("hello", size, FinishReason::Stop, None), ["message Completed hello"]);
            assert_eq!(told("hello", size, FinishReason::Length, hermes), ["message Incomplete hello"]);
            assert_eq!(told("", size, FinishReason::Stop, hermes), ["message Completed "]);
            let cut = &both[..both.rfind(": 1").expect("there")];
            let expected = ["message Completed I ask.", "f Completed {\"a\": 1}", "g Incomplete {\"a\""];
            assert_eq!(told(cut, size, FinishReason::Length, hermes), expected);
        }
    }
}
