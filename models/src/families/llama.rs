//! Llama 3.x.

use crate::error::Result;
use crate::family::{Family, LoadOptions, LoadedModel, OpenWeights};
use crate::manifest::Manifest;

/// Llama 3.x.
pub struct Llama;

impl Family for Llama {
    fn name(&self) -> &'static str {
        "llama"
    }

    fn makes(&self) -> &'static str {
        "text"
    }

    fn detects(&self, manifest: &Manifest) -> bool {
        manifest.architecture() == "LlamaForCausalLM"
    }

    fn load(&self, _manifest: &Manifest, _open: &mut OpenWeights<'_>, _options: &LoadOptions) -> Result<LoadedModel> {
        todo!()
    }
}
