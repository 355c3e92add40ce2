//! A checkpoint, whatever files it is made of, and the way to its weights.
//!
//! Owns: what can be asked of a checkpoint ([`Checkpoint`]; `folder`, `gguf`, `over_base` and `random` answer), which family's it is
//! ([`Manifest`]), opening the weights of each component as a model is built (`open`), now or once more later (`reread`).
//! Does not know: families, runners. A new kind of checkpoint is one file here, and a line in `manifest.rs` that
//! recognises it.

use std::fmt::Debug;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::chat_template::ChatTemplates;
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

mod component;
mod folder;
mod gguf;
mod manifest;
mod open;
mod over_base;
mod random;
mod reading;
mod remembered;
mod reread;

pub use component::Component;
pub use folder::Folder;
pub use manifest::Manifest;
pub(crate) use open::OnDevice;
pub use open::{Build, OpenWeights};
pub use reading::{DryModel, LentComponents, Reading, STEP_BYTES};
pub use reread::Reread;
pub(crate) use reread::WeightFiles;

/// The file with a component's configuration.
pub const CONFIG: &str = "config.json";
/// The file that says which components a pipeline has.
pub const MODEL_INDEX: &str = "model_index.json";

/// What a checkpoint has, component by component. A component is named as its folder in a pipeline; a model without such
/// folders is one component with the empty name.
pub trait Checkpoint: Debug + Send + Sync {
    /// The folder or file that messages about the whole name.
    fn root(&self) -> &Path;

    /// Whether there is a component of this name.
    fn has_component(&self, component: &str) -> bool;

    /// Where that comes from what [`Checkpoint::file`] gives for the same arguments, for messages.
    fn path(&self, component: &str, file: &str) -> PathBuf;

    /// The content of a small file of a component, under the name that it has in a folder: `config.json`,
    /// `generation_config.json`, `scheduler_config.json`. `None` where the checkpoint has nothing like it.
    fn file(&self, component: &str, file: &str) -> Result<Option<Vec<u8>>>;

    /// The tokenizer that a component is or has.
    fn tokenizer(&self, component: &str) -> Result<Tokenizer>;

    /// The chat templates of a component, if it has any.
    fn chat_template(&self, component: &str) -> Result<Option<ChatTemplates>>;

    /// The weights of a component, by the network's names or those of the original implementation.
    fn weights(&self, component: &str, mode: Mode, placement: &Placement) -> Result<Weights>;

    /// Fields of `scheduler_config.json` that the weights decide, whatever the file says.
    fn schedule_settings(&self) -> Vec<(&'static str, Value)> {
        Vec::new()
    }
}

/// Why weights are opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// To compute with.
    Load,
    /// To see what the files lack, and what a model would take: tensors take no memory.
    Inspect,
}

/// `--load-format`: where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadFormat {
    /// The checkpoint's files, in the format that they have.
    #[default]
    Auto,
    /// Nowhere: random values in the shapes that the configurations ask for, made on the device.
    Dummy,
}

impl std::str::FromStr for LoadFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "dummy" => Ok(Self::Dummy),
            _ => Err(Error::invalid("load_format", format!("`{name}` is not a load format; allowed: auto, dummy"))),
        }
    }
}
