//! A checkpoint with random weights in place of its own (`--load-format dummy`): only its configurations are read.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::DType;
use serde_json::Value;

use super::{CONFIG, Checkpoint, Component, Mode};
use crate::chat_template::ChatTemplates;
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// Another checkpoint in all but its weights.
#[derive(Debug)]
pub(super) struct RandomWeights(pub(super) Arc<dyn Checkpoint>);

impl Checkpoint for RandomWeights {
    fn root(&self) -> &Path {
        self.0.root()
    }

    fn has_component(&self, component: &str) -> bool {
        self.0.has_component(component)
    }

    fn path(&self, component: &str, file: &str) -> PathBuf {
        self.0.path(component, file)
    }

    fn file(&self, component: &str, file: &str) -> Result<Option<Vec<u8>>> {
        self.0.file(component, file)
    }

    fn tokenizer(&self, component: &str) -> Result<Tokenizer> {
        self.0.tokenizer(component)
    }

    fn chat_template(&self, component: &str) -> Result<Option<ChatTemplates>> {
        self.0.chat_template(component)
    }

    fn weights(&self, component: &str, mode: Mode, placement: &Placement) -> Result<Weights> {
        let published = published_dtype(Component::new(self, component))?;
        let root = self.0.root().join(component);
        Ok(match mode {
            Mode::Load => Weights::dummy(&root, published, placement),
            Mode::Inspect => Weights::dummy_dry(&root, published, placement),
        })
    }

    fn schedule_settings(&self) -> Vec<(&'static str, Value)> {
        self.0.schedule_settings()
    }
}

/// The dtype in which the weights of a component would be published: what its `config.json` names, and bf16 where that
/// names none, as those of diffusers do.
fn published_dtype(component: Component<'_>) -> Result<DType> {
    let config: Value = component.json_if_present(CONFIG)?.unwrap_or_default();
    // transformers 5 and 4.
    let name = ["dtype", "torch_dtype"].into_iter().find_map(|field| config[field].as_str());
    match name {
        None | Some("bfloat16") => Ok(DType::BF16),
        Some("float16") => Ok(DType::F16),
        Some("float32") => Ok(DType::F32),
        Some(other) => {
            let problem = format!("dtype {other} is not read; read are float32, float16, bfloat16");
            Err(Error::checkpoint(component.config_path(), problem))
        }
    }
}
