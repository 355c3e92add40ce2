//! A language model in one GGUF file, or in its parts: everything is inside, and nothing is looked for beside it.
//!
//! Owns: which architectures such a file may have, and giving what it holds under the names that a folder has it
//! (`config` and `vocabulary` read the metadata). Does not know: the network; names and rows of its tensors are the
//! decoder's. Source: llama.cpp `gguf-py/gguf/constants.py`, `src/llama-model.cpp`, `src/llama-vocab.cpp`.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{CONFIG, Checkpoint, Mode};
use crate::chat_template::{ChatTemplates, DEFAULT, Sources, TOOL_USE};
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::ggml::Vocabulary;
use crate::weights::Weights;
use crate::weights::single::{PartOfFile, WeightFile};

mod config;
mod keys;
mod vocabulary;

use keys::Keys;

/// The file with the ways in which a model's author generates.
const GENERATION_CONFIG: &str = "generation_config.json";
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

/// Architectures and what transformers calls them: `model_type` and class.
const ARCHITECTURES: [Architecture; 2] = [
    Architecture { name: "llama", class: "LlamaForCausalLM" },
    Architecture { name: "qwen2", class: "Qwen2ForCausalLM" },
];

/// `general.architecture`, which is also the `model_type`.
#[derive(Debug, Clone, Copy)]
struct Architecture {
    name: &'static str,
    class: &'static str,
}

/// A whole language model.
#[derive(Debug)]
pub(super) struct GgufModel {
    file: WeightFile,
    architecture: Architecture,
    /// Read when the file is opened: the configuration rests on its size.
    vocabulary: Vocabulary,
    config: Value,
}

impl GgufModel {
    /// Names of the architectures that are read.
    pub(super) fn architectures() -> impl Iterator<Item = &'static str> {
        ARCHITECTURES.iter().map(|architecture| architecture.name)
    }

    /// Whether the file is a language model of an architecture that is read.
    pub(super) fn is_one(file: &WeightFile) -> bool {
        Self::architectures().any(|name| file.architecture() == Some(name))
    }

    /// The model in a file that is one.
    pub(super) fn new(file: WeightFile) -> Result<Self> {
        let known = ARCHITECTURES.into_iter().find(|known| file.architecture() == Some(known.name));
        let architecture = known.expect("the file was asked before: this is a bug");
        let vocabulary = vocabulary::read(&Keys::new(&file))?;
        let config = config::read(&file, architecture.name, architecture.class, vocabulary.tokens.len())?;
        Ok(Self { file, architecture, vocabulary, config })
    }

    /// The template under this key, with the file that has it.
    fn template(&self, key: &str) -> Result<Option<(PathBuf, String)>> {
        let source = Keys::new(&self.file).text(key)?;
        Ok(source.map(|source| (self.file.path().to_owned(), source.to_owned())))
    }

    fn generation_config(&self) -> Result<Value> {
        let keys = Keys::new(&self.file);
        let ends = vocabulary::ends(&keys, &self.vocabulary)?;
        config::generation(&keys, &ends)
    }
}

impl Checkpoint for GgufModel {
    fn root(&self) -> &Path {
        self.file.path()
    }

    fn has_component(&self, component: &str) -> bool {
        component.is_empty()
    }

    fn path(&self, _: &str, _: &str) -> PathBuf {
        self.file.path().to_owned()
    }

    fn file(&self, component: &str, file: &str) -> Result<Option<Vec<u8>>> {
        let value = match (component, file) {
            ("", CONFIG) => self.config.clone(),
            ("", GENERATION_CONFIG) => self.generation_config()?,
            _ => return Ok(None),
        };
        Ok(Some(value.to_string().into_bytes()))
    }

    fn tokenizer(&self, _: &str) -> Result<Tokenizer> {
        Tokenizer::from_vocabulary(self.file.path(), &self.vocabulary)
    }

    fn chat_template(&self, _: &str) -> Result<Option<ChatTemplates>> {
        let named = |name: &str| self.template(&format!("{CHAT_TEMPLATE}.{name}"));
        let default = match self.template(CHAT_TEMPLATE)? {
            Some(default) => Some(default),
            None => named(DEFAULT)?,
        };
        // The list of names (`tokenizer.chat_templates`) says nothing that the keys do not.
        let sources = Sources { default, tool_use: named(TOOL_USE)? };
        ChatTemplates::of_sources(sources, || Ok(self.vocabulary.spellings()))
    }

    fn weights(&self, component: &str, mode: Mode, placement: &Placement) -> Result<Weights> {
        if !component.is_empty() {
            let problem =
                format!("holds a language model of architecture `{}` and no {component}", self.architecture.name);
            return Err(Error::checkpoint(self.file.path(), problem));
        }
        let all = PartOfFile { beginning: String::new(), must_fit: true };
        Ok(self.file.weights(&all, |_| true, placement, mode == Mode::Inspect))
    }
}
