//! Qwen 2.5.

use crate::error::Result;
use crate::family::{Family, LoadOptions, LoadedModel, OpenWeights};
use crate::manifest::Manifest;

/// Qwen 2.5.
pub struct Qwen2;

impl Family for Qwen2 {
    fn name(&self) -> &'static str {
        "qwen2"
    }

    fn makes(&self) -> &'static str {
        "text"
    }

    fn detects(&self, manifest: &Manifest) -> bool {
        manifest.architecture() == "Qwen2ForCausalLM"
    }

    fn load(&self, _manifest: &Manifest, _open: &mut OpenWeights<'_>, _options: &LoadOptions) -> Result<LoadedModel> {
        todo!()
    }
}
