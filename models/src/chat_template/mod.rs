//! Chat templates: from messages to the text that a model was trained on.
//!
//! Owns: finding the template and the special tokens that it may name, and rendering with what transformers offers to
//! templates (`transformers/utils/chat_template_utils.py`). Does not know: tokenizers; tools and documents, which are
//! passed as none.

use std::collections::BTreeMap;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, UndefinedBehavior, context};
use serde::Deserialize;

use crate::config::{read_json_if_present, read_text};
use crate::error::{Error, Result};

mod functions;

/// Instructions that one rendering may execute; a long conversation needs some hundred thousand.
const MAX_FUEL: u64 = 50_000_000;
/// Name of the one template of an environment.
const TEMPLATE: &str = "chat_template";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, or what the template knows.
    pub role: String,
    /// Text.
    pub content: String,
    /// Who speaks, among several of one role; absent from what the template sees where nobody said it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A compiled Jinja template with the special tokens that it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token`, ... by the name under which a template asks for them.
    special_tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// From `chat_template.jinja`, `chat_template.json` or `tokenizer_config.json` in `dir`, the first that has one;
    /// `None` when the model has none. A template that does not compile is an error that names the file and the line.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>> {
        let config: Option<TokenizerConfig> = read_json_if_present(&dir.join("tokenizer_config.json"))?;
        let map: Option<BTreeMap<String, SpecialToken>> = read_json_if_present(&dir.join("special_tokens_map.json"))?;
        let config = config.unwrap_or_default();
        let mut special_tokens = named_tokens(map.unwrap_or_default());
        special_tokens.extend(named_tokens(config.others));

        let jinja = dir.join("chat_template.jinja");
        if jinja.exists() {
            let source = read_text(&jinja)?;
            return Self::compile(&source, special_tokens).map(Some).map_err(|e| Error::checkpoint(jinja, e));
        }
        let json = dir.join("chat_template.json");
        let (path, source) = match read_json_if_present::<TemplateFile>(&json)? {
            Some(file) => (json, Some(file.chat_template)),
            None => (dir.join("tokenizer_config.json"), config.chat_template),
        };
        let Some(source) =
            source.map(TemplateSource::default_one).transpose().map_err(|e| Error::checkpoint(&path, e))?
        else {
            return Ok(None);
        };
        Self::compile(&source, special_tokens).map(Some).map_err(|e| Error::checkpoint(path, e))
    }

    fn compile(source: &str, special_tokens: BTreeMap<String, String>) -> Result<Self, minijinja::Error> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(MAX_FUEL));
        functions::add_to(&mut environment);
        environment.add_template_owned(TEMPLATE, without_generation_marks(source))?;
        Ok(Self { environment, special_tokens })
    }

    /// The conversation as text, ending where the assistant begins to speak.
    ///
    /// Errors name `messages`: what the template itself refuses (`raise_exception`), or what it cannot render.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String> {
        // In this order: `tojson` shows it.
        let message = |m: &ChatMessage| match &m.name {
            None => context! { role => m.role.as_str(), content => m.content.as_str() },
            Some(name) => context! { role => m.role.as_str(), content => m.content.as_str(), name => name.as_str() },
        };
        let mut context: BTreeMap<&str, Value> =
            self.special_tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token))).collect();
        context.insert("messages", messages.iter().map(message).collect());
        context.insert("add_generation_prompt", Value::from(true));
        context.insert("tools", Value::from(()));
        context.insert("documents", Value::from(()));
        let template = self.environment.get_template(TEMPLATE).expect("was added when it was compiled: this is a bug");
        template.render(Value::from(context)).map_err(|error| Error::invalid("messages", refusal(&error)))
    }
}

/// What a client may know of a failed rendering: the template's own words where it spoke.
fn refusal(error: &minijinja::Error) -> String {
    let words = functions::raised(error).map(str::to_owned);
    words.unwrap_or_else(|| match error.kind() {
        ErrorKind::OutOfFuel => "the model's chat template takes too long with these messages".to_owned(),
        _ => format!("the model's chat template cannot render these messages: {error}"),
    })
}

/// `{% generation %}` marks what the assistant said, for training; blocks that always hold render the same.
fn without_generation_marks(source: &str) -> String {
    let mut rest = source;
    let mut plain = String::with_capacity(source.len());
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start..].find("%}").map(|end| end + 2) else { break };
        let tag = &rest[start..start + len];
        plain.push_str(&rest[..start]);
        plain.push_str(&match tag[2..len - 2].trim_matches(['-', '+']).trim() {
            "generation" => tag.replace("generation", "if true"),
            "endgeneration" => tag.replace("endgeneration", "endif"),
            _ => tag.to_owned(),
        });
        rest = &rest[start + len..];
    }
    plain + rest
}

/// The part of `tokenizer_config.json` that concerns templates.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<TemplateSource>,
    #[serde(flatten)]
    others: BTreeMap<String, SpecialToken>,
}

#[derive(Deserialize)]
struct TemplateFile {
    chat_template: TemplateSource,
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
    /// As transformers: of several templates, the one called `default`.
    fn default_one(self) -> Result<String, &'static str> {
        match self {
            Self::One(template) => Ok(template),
            Self::Named(templates) => templates
                .into_iter()
                .find(|named| named.name == "default")
                .map(|named| named.template)
                .ok_or("has several chat templates and none of them is called `default`"),
        }
    }
}

/// A value of `tokenizer_config.json` or `special_tokens_map.json`, of which tokens are one kind.
#[derive(Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Added { content: String },
    Other(serde::de::IgnoredAny),
}

fn named_tokens(entries: BTreeMap<String, SpecialToken>) -> BTreeMap<String, String> {
    let token = |(name, entry): (String, SpecialToken)| match entry {
        SpecialToken::Text(content) | SpecialToken::Added { content } if name.ends_with("_token") => {
            Some((name, content))
        }
        _ => None,
    };
    entries.into_iter().filter_map(token).collect()
}

#[cfg(test)]
mod tests;
