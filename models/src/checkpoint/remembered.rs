//! A checkpoint whose tokenizers are read once: a large one takes longer than a step may, and parts of a model are read
//! again and again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::{Checkpoint, Mode};
use crate::chat_template::ChatTemplates;
use crate::device::Placement;
use crate::error::Result;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// Tokenizers that were read, by component. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Tokenizers(Arc<Mutex<BTreeMap<String, Tokenizer>>>);

/// Another checkpoint in all but what was read of it before.
pub(super) struct Remembered {
    pub(super) checkpoint: Arc<dyn Checkpoint>,
    pub(super) tokenizers: Tokenizers,
}

impl std::fmt::Debug for Remembered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.checkpoint.fmt(f)
    }
}

impl Checkpoint for Remembered {
    fn root(&self) -> &Path {
        self.checkpoint.root()
    }

    fn has_component(&self, component: &str) -> bool {
        self.checkpoint.has_component(component)
    }

    fn path(&self, component: &str, file: &str) -> PathBuf {
        self.checkpoint.path(component, file)
    }

    fn file(&self, component: &str, file: &str) -> Result<Option<Vec<u8>>> {
        self.checkpoint.file(component, file)
    }

    fn tokenizer(&self, component: &str) -> Result<Tokenizer> {
        let mut known = self.tokenizers.0.lock().expect("no code panics while it holds the tokenizers: this is a bug");
        if let Some(tokenizer) = known.get(component) {
            return Ok(tokenizer.clone());
        }
        let tokenizer = self.checkpoint.tokenizer(component)?;
        known.insert(component.to_owned(), tokenizer.clone());
        Ok(tokenizer)
    }

    fn chat_template(&self, component: &str) -> Result<Option<ChatTemplates>> {
        self.checkpoint.chat_template(component)
    }

    fn weights(&self, component: &str, mode: Mode, placement: &Placement) -> Result<Weights> {
        self.checkpoint.weights(component, mode, placement)
    }

    fn schedule_settings(&self) -> Vec<(&'static str, Value)> {
        self.checkpoint.schedule_settings()
    }
}
