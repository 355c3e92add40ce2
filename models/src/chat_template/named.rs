//! The chat templates of a model: one, or several that have names.
//!
//! Owns: finding them, and which of them a conversation gets: the one called `tool_use` where there are tools, else the one
//! called `default`. Does not know: how a template is rendered; templates of other names, which nobody can ask for.
//! Source: transformers `tokenization_utils_base.py` (`get_chat_template`, `from_pretrained`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{ChatTemplate, Conversation, Served, ToolSupport};
use crate::config::{read_json_if_present, read_text};
use crate::error::{Error, Result};
use crate::tokenizer::config::TokenizerConfig;

/// Names of templates.
pub(crate) const DEFAULT: &str = "default";
pub(crate) const TOOL_USE: &str = "tool_use";

/// The folder with templates beside `chat_template.jinja`, each in a file of its name.
const ADDITIONAL: &str = "additional_chat_templates";
/// Most entries of that folder that are looked at.
const MAX_ADDITIONAL: usize = 1 << 10;

/// The templates of a model; at least one.
#[derive(Debug)]
pub struct ChatTemplates {
    default: Option<ChatTemplate>,
    tool_use: Option<ChatTemplate>,
}

/// A template's source, and the file that has it.
pub(crate) type Source = (PathBuf, String);

/// The sources of a model's templates by the names of these.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    pub(crate) default: Option<Source>,
    pub(crate) tool_use: Option<Source>,
}

impl ChatTemplates {
    /// From `chat_template.jinja` and the files of `additional_chat_templates`, or else `chat_template.json` or
    /// `tokenizer_config.json` in `dir`, the first that has one; `None` when the model has none. A template that can never be
    /// rendered is an error that names the file, the line and what is missing.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>> {
        let sources = Sources::find(dir)?;
        let spellings = || Ok(TokenizerConfig::read(dir)?.spellings());
        Self::of_sources(sources, spellings)
    }

    /// The templates of these sources, with the spellings of the special tokens that they may name.
    pub(crate) fn of_sources(
        Sources { default, tool_use }: Sources,
        spellings: impl FnOnce() -> Result<BTreeMap<String, String>>,
    ) -> Result<Option<Self>> {
        if default.is_none() && tool_use.is_none() {
            return Ok(None);
        }
        let special_tokens = spellings()?;
        let load = |source: Option<Source>, served: Served| {
            let Some((path, source)) = source else { return Ok(None) };
            ChatTemplate::of_source(&path, &source, special_tokens.clone(), served).map(Some)
        };
        Ok(Some(Self { default: load(default, Served::All)?, tool_use: load(tool_use, Served::WithTools)? }))
    }

    /// What the template of conversations with tools does with them; `None` where it shows the model none.
    pub fn tools(&self) -> Option<ToolSupport> {
        self.tool_use.as_ref().or(self.default.as_ref()).and_then(ChatTemplate::tools)
    }

    /// As [`ChatTemplate::render`], with the template for this conversation.
    pub fn render(&self, conversation: &Conversation) -> Result<String> {
        self.template_for(conversation)?.render(conversation)
    }

    /// As [`ChatTemplate::render_little`], with the template for this conversation.
    pub fn render_little(&self, conversation: &Conversation) -> Option<Result<String>> {
        match self.template_for(conversation) {
            Ok(template) => template.render_little(conversation),
            Err(error) => Some(Err(error)),
        }
    }

    fn template_for(&self, conversation: &Conversation) -> Result<&ChatTemplate> {
        let of_tools = self.tool_use.as_ref().filter(|_| !conversation.tools.is_empty());
        of_tools.or(self.default.as_ref()).ok_or_else(|| {
            let problem = "this model's only chat template is for conversations with tools (`tool_use`, no `default`)";
            Error::invalid("messages", problem)
        })
    }
}

impl Sources {
    fn find(dir: &Path) -> Result<Self> {
        let single = Some(dir.join("chat_template.jinja")).filter(|path| path.exists());
        let additional = dir.join(ADDITIONAL);
        if single.is_some() || has_templates(&additional) {
            // A file of the folder goes before the one beside it, as it does there.
            let of_folder = |name: &str| Some(additional.join(format!("{name}.jinja"))).filter(|path| path.exists());
            let [default, tool_use] = [of_folder(DEFAULT).or(single), of_folder(TOOL_USE)];
            return Ok(Self { default: read(default)?, tool_use: read(tool_use)? });
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let path = dir.join(name);
            let template = read_json_if_present::<TemplateFile>(&path)?.and_then(|file| file.chat_template);
            if let Some(template) = template {
                return Ok(template.sources(&path));
            }
        }
        Ok(Self::default())
    }
}

fn read(path: Option<PathBuf>) -> Result<Option<Source>> {
    let Some(path) = path else { return Ok(None) };
    let source = read_text(&path)?;
    Ok(Some((path, source)))
}

/// Whether the folder has a template of whatever name: then no other file's count.
fn has_templates(folder: &Path) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().take(MAX_ADDITIONAL);
    let mut paths = entries.map(|entry| entry.path());
    paths.any(|path| path.extension().is_some_and(|extension| extension == "jinja"))
}

/// The part of a file that concerns templates.
#[derive(Deserialize)]
struct TemplateFile {
    chat_template: Option<TemplateSource>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TemplateSource {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl TemplateSource {
    fn sources(self, path: &Path) -> Sources {
        let named = match self {
            Self::One(template) => return Sources { default: Some((path.to_owned(), template)), tool_use: None },
            Self::Named(named) => named,
        };
        // Of two with one name the last, as in a dictionary.
        let mut by_name: BTreeMap<String, String> =
            named.into_iter().map(|NamedTemplate { name, template }| (name, template)).collect();
        let mut source = |name: &str| by_name.remove(name).map(|template| (path.to_owned(), template));
        let sources = Sources { default: source(DEFAULT), tool_use: source(TOOL_USE) };
        if sources.default.is_none() {
            tracing::warn!(path = %path.display(), "no chat template is called `default`; chats without tools are refused");
        }
        sources
    }
}
