//! A checkpoint as it is published: a folder, with a folder for each component where it is a pipeline.

use std::path::{Path, PathBuf};

use super::{Checkpoint, Component, Mode};
use crate::chat_template::ChatTemplates;
use crate::device::Placement;
use crate::error::Result;
use crate::files::{self, Limit};
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// A folder in the layout of transformers or diffusers.
#[derive(Debug, Clone)]
pub struct Folder {
    root: PathBuf,
}

impl Folder {
    /// The folder `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// All of it as one component.
    pub fn whole(&self) -> Component<'_> {
        Component::new(self, "")
    }

    fn dir(&self, component: &str) -> PathBuf {
        match component {
            "" => self.root.clone(),
            _ => self.root.join(component),
        }
    }
}

impl Checkpoint for Folder {
    fn root(&self) -> &Path {
        &self.root
    }

    fn has_component(&self, component: &str) -> bool {
        self.dir(component).is_dir()
    }

    fn path(&self, component: &str, file: &str) -> PathBuf {
        self.dir(component).join(file)
    }

    fn file(&self, component: &str, file: &str) -> Result<Option<Vec<u8>>> {
        files::read_if_present(&self.path(component, file), &Limit::CONFIG)
    }

    fn tokenizer(&self, component: &str) -> Result<Tokenizer> {
        Tokenizer::from_dir(&self.dir(component))
    }

    fn chat_template(&self, component: &str) -> Result<Option<ChatTemplates>> {
        ChatTemplates::from_dir(&self.dir(component))
    }

    fn weights(&self, component: &str, mode: Mode, placement: &Placement) -> Result<Weights> {
        let dir = self.dir(component);
        match mode {
            Mode::Load => Weights::open(&dir, placement),
            Mode::Inspect => Weights::open_dry(&dir, placement),
        }
    }
}
