//! Chat templates: from messages to the text that a model was trained on.
//!
//! Owns: what a template is rendered with, and telling its failures apart (`named.rs` finds a model's templates). What a template asks for that
//! is not there is found when it is loaded (`program.rs`, and conversations that are tried); what it refuses is the
//! client's to mend; what else goes wrong is ours. A template is a program from a stranger: it is compiled and rendered on
//! a thread with a stack of its own (`threads.rs`), which bounds of source (`nesting.rs`) and values (`kept.rs`) suffice for,
//! with fuel (`program.rs`), bounded memory and until a deadline (`budget.rs`). Does not know: tokenizers, but for the
//! spellings of special tokens; how calls of tools are read (`tools`); documents, which are passed as none.
//! Source: transformers `utils/chat_template_utils.py`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use minijinja::value::Value;
use minijinja::{Error as TemplateError, ErrorKind};

use crate::error::{Error, Result};
use crate::files::Limit;
use crate::tools::{Tool, ToolFormat};

mod budget;
mod conversation;
mod filters;
mod globals;
mod kept;
mod message;
mod named;
mod nesting;
mod objects;
mod operators;
mod program;
mod python;
mod sequences;
pub mod threads;
mod weight;

pub use conversation::{Conversation, Ending};
pub use message::{ChatMessage, ToolCall};
pub use named::ChatTemplates;
pub(crate) use named::{DEFAULT, Sources, TOOL_USE};
use program::Program;
use threads::{Failure, Overdue};

/// What a rendering gets beside its own deadline until it is given up: for code that does not look at the clock.
const GRACE: Duration = Duration::from_secs(1);

/// A template with the special tokens that it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    program: Arc<Program>,
    overdue: Overdue,
    /// `bos_token`, `eos_token`, ... by the name under which a template asks for them.
    special_tokens: BTreeMap<String, String>,
    /// What it does with tools; none where it shows the model none.
    tools: Option<ToolSupport>,
}

/// What a template does with tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToolSupport {
    /// How it writes calls, if in a way that is known.
    pub format: Option<ToolFormat>,
}

/// Which conversations a template is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Served {
    /// All of them.
    All,
    /// Those with tools: it need not bear that there are none.
    WithTools,
}

/// The tool that templates are tried with.
const TRIED_TOOL: &str = "look_up_the_weather";

fn tool_to_try() -> Tool {
    let parameters = serde_json::json!({"type": "object", "properties": {}});
    Tool { name: TRIED_TOOL.to_owned(), description: Some(String::new()), parameters, field: String::new() }
}

impl ChatTemplate {
    /// The template `source` of the file at `path`, with the spellings of the special tokens that it may name.
    fn of_source(path: &Path, source: &str, special_tokens: BTreeMap<String, String>, served: Served) -> Result<Self> {
        let limit = Limit::CONFIG.bytes();
        if source.len() as u64 > limit {
            let problem = format!("its chat template has {} bytes; at most {limit}", source.len());
            return Err(Error::checkpoint(path, problem));
        }
        Self::load(source, special_tokens, served).map_err(|problem| Error::checkpoint(path, problem))
    }

    fn load(source: &str, special_tokens: BTreeMap<String, String>, served: Served) -> Result<Self, String> {
        let overdue = Overdue::default();
        let source = source.to_owned();
        let compiled = overdue.run(budget::MAX_TIME + GRACE, move || {
            let program = Program::new(&source).map_err(|error| format!("the chat template: {error}"))?;
            let unsupported = program.unsupported().map_err(|error| error.to_string())?;
            Ok((program, unsupported))
        });
        let (program, unsupported) = compiled.unwrap_or_else(|failure| Err(format!("the chat template: {failure}")))?;
        if !unsupported.is_empty() {
            let all: Vec<String> = unsupported.iter().map(ToString::to_string).collect();
            return Err(format!("the chat template uses what is not supported: {}", all.join("; ")));
        }
        let mut template = Self { program: Arc::new(program), overdue, special_tokens, tools: None };
        let tools = match served {
            Served::All => Vec::new(),
            Served::WithTools => vec![tool_to_try()],
        };
        let tried = template.try_conversations(&tools);
        tried.map_err(|error| format!("the chat template cannot be rendered: {error}"))?;
        template.tools = template.try_tools(tools);
        Ok(template)
    }

    /// Renders small conversations of usual shapes. A feature that is missing at run time is an error, and so is a
    /// template that fails at all of them; one that refuses a shape with `raise_exception` is not.
    fn try_conversations(&self, tools: &[Tool]) -> Result<(), RenderError> {
        const SHAPES: [&[&str]; 4] =
            [&["user"], &["system", "user"], &["user", "assistant", "user"], &["system", "user", "assistant", "user"]];
        let mut failure = None;
        let mut answers = 0;
        for roles in SHAPES {
            let messages: Vec<ChatMessage> = roles.iter().map(|role| ChatMessage::new(role, "Hello there.")).collect();
            match self.text(&Conversation { tools: tools.to_vec(), ..messages.into() }) {
                Err(error) if error.is_hopeless() => return Err(error),
                Err(error) if error.refusal().is_none() => failure = Some(error),
                _ => answers += 1,
            }
        }
        failure.filter(|_| answers == 0).map_or(Ok(()), Err)
    }

    /// What it does with tools, found by showing it one, and a conversation with a call, for which there are `tools`.
    fn try_tools(&self, tools: Vec<Tool>) -> Option<ToolSupport> {
        let question = ChatMessage::new("user", "Hello there.");
        let asked = Conversation { tools: vec![tool_to_try()], ..vec![question.clone()].into() };
        let shown = self.text(&asked).ok()?;
        if !shown.contains(TRIED_TOOL) {
            return None;
        }
        let arguments = serde_json::Map::from_iter([("place".to_owned(), "here".into())]);
        let call = ToolCall { id: "call_1".to_owned(), name: TRIED_TOOL.to_owned(), arguments };
        let called = ChatMessage { tool_calls: vec![call], ..ChatMessage::new("assistant", "") };
        let result = ChatMessage { tool_call_id: Some("call_1".to_owned()), ..ChatMessage::new("tool", "Rain.") };
        let text = self.text(&Conversation { tools, ..vec![question, called, result].into() }).ok();
        Some(ToolSupport { format: text.and_then(|text| ToolFormat::of_text(&text, TRIED_TOOL)) })
    }

    /// What it does with tools; `None` where it shows the model none.
    pub fn tools(&self) -> Option<ToolSupport> {
        self.tools
    }

    /// The conversation as text.
    ///
    /// What the template itself refuses (`raise_exception`) is an [`Error::InvalidRequest`] that names `messages`, and so are
    /// variables that it does not have; any other failure is an [`Error::ChatTemplate`].
    pub fn render(&self, conversation: &Conversation) -> Result<String> {
        conversation.check_variables(|name| self.program.is_variable(name))?;
        let text = self.text(conversation).map_err(|error| match error.refusal() {
            Some(words) => Error::invalid("messages", words),
            None => Error::ChatTemplate(error.without_the_conversation()),
        });
        cut(conversation, text?)
    }

    /// As [`ChatTemplate::render`], here and at once, for short conversations: what their template does takes a fraction
    /// of a millisecond. `None` where it would take longer, fails for any other reason than a refusal of its own, or
    /// this thread renders nothing ([`threads::render_little_on_this_thread`]).
    pub fn render_little(&self, conversation: &Conversation) -> Option<Result<String>> {
        if let Err(error) = conversation.check_variables(|name| self.program.is_variable(name)) {
            return Some(Err(error));
        }
        let render = || budget::within(budget::LITTLE, || self.program.render_frugally(self.variables(conversation)));
        match threads::run_little(render)? {
            Ok(text) => Some(cut(conversation, text)),
            Err(error) => globals::raised(&error).map(|words| Err(Error::invalid("messages", words))),
        }
    }

    fn text(&self, conversation: &Conversation) -> Result<String, RenderError> {
        let (program, variables) = (self.program.clone(), self.variables(conversation));
        let render = move || budget::within(budget::MOST, || program.render(variables));
        Ok(self.overdue.run(budget::MAX_TIME + GRACE, render)??)
    }

    fn variables(&self, conversation: &Conversation) -> Value {
        let mut variables: BTreeMap<&str, Value> =
            self.special_tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token))).collect();
        variables.insert("documents", Value::from(()));
        variables.extend(conversation.values());
        Value::from(variables)
    }
}

fn cut(conversation: &Conversation, text: String) -> Result<String> {
    let unseen =
        || Error::invalid("continue_final_message", "the model's chat template does not show the last message");
    conversation.cut(text).ok_or_else(unseen)
}

/// Why a conversation has no text.
#[derive(Debug, thiserror::Error)]
enum RenderError {
    #[error("{}", in_own_words(.0))]
    Template(#[from] TemplateError),
    #[error("{0}")]
    Thread(#[from] Failure),
}

impl RenderError {
    /// Whether a template asked for something that is not there, or takes more than it may.
    fn is_hopeless(&self) -> bool {
        use ErrorKind::{OutOfFuel, UnknownFilter, UnknownFunction, UnknownMethod, UnknownTest};
        match self {
            Self::Thread(_) => true,
            Self::Template(error) => {
                let is_missing = matches!(error.kind(), UnknownFilter | UnknownFunction | UnknownMethod | UnknownTest);
                is_missing || error.kind() == OutOfFuel || budget::exceeded(error).is_some()
            }
        }
    }

    /// What failed and where. The rest of an error may quote a conversation (`cannot be ordered: ...`), which belongs into no
    /// log and no answer.
    fn without_the_conversation(&self) -> String {
        let Self::Template(error) = self else { return self.to_string() };
        let what = match (budget::exceeded(error), error.kind()) {
            (Some(bound), _) => bound.to_string(),
            (None, ErrorKind::OutOfFuel) => program::OUT_OF_FUEL.to_owned(),
            (None, kind) => kind.to_string(),
        };
        error.line().map_or(what.clone(), |line| format!("line {line}: {what}"))
    }

    /// The words of `raise_exception`, if that is what ended the rendering.
    fn refusal(&self) -> Option<&str> {
        match self {
            Self::Template(error) => globals::raised(error),
            Self::Thread(_) => None,
        }
    }
}

fn in_own_words(error: &TemplateError) -> String {
    match (error.kind(), error.line()) {
        (ErrorKind::OutOfFuel, Some(line)) => format!("line {line}: {}", program::OUT_OF_FUEL),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests;
