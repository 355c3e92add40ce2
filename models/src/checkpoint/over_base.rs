//! A single file over its base: the weights of the file, and from the folder everything that it lacks.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::gguf::GgufModel;
use super::{Checkpoint, Folder, Mode};
use crate::chat_template::ChatTemplates;
use crate::device::Placement;
use crate::error::Result;
use crate::single_file::SingleFile;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;
use crate::weights::single::WeightFile;

/// A file with some components' weights, and a folder in diffusers' layout.
#[derive(Debug)]
pub(super) struct OverBase {
    file: SingleFile,
    base: Folder,
}

impl OverBase {
    /// The file over `base`, or the folder that it lies in.
    pub(super) fn new(file: WeightFile, base: Option<PathBuf>) -> Result<Self> {
        let file = SingleFile::recognised(file, GgufModel::architectures())?;
        let base = Folder::new(file.base(base)?);
        Ok(Self { file, base })
    }

    /// Refuses a base of another pipeline.
    pub(super) fn check_base(&self, class_name: &str) -> Result<()> {
        self.file.check_base(self.base.root(), class_name)
    }
}

impl Checkpoint for OverBase {
    fn root(&self) -> &Path {
        self.base.root()
    }

    fn has_component(&self, component: &str) -> bool {
        self.base.has_component(component)
    }

    fn path(&self, component: &str, file: &str) -> PathBuf {
        self.base.path(component, file)
    }

    fn file(&self, component: &str, file: &str) -> Result<Option<Vec<u8>>> {
        self.base.file(component, file)
    }

    fn tokenizer(&self, component: &str) -> Result<Tokenizer> {
        self.base.tokenizer(component)
    }

    fn chat_template(&self, component: &str) -> Result<Option<ChatTemplates>> {
        self.base.chat_template(component)
    }

    fn weights(&self, component: &str, mode: Mode, placement: &Placement) -> Result<Weights> {
        match self.file.weights(component, placement, mode == Mode::Inspect) {
            Some(weights) => Ok(weights),
            None => self.base.weights(component, mode, placement),
        }
    }

    fn schedule_settings(&self) -> Vec<(&'static str, Value)> {
        self.file.schedule_settings()
    }
}
