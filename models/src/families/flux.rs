//! FLUX.1.

use crate::error::Result;
use crate::family::{Family, LoadOptions, LoadedModel, OpenWeights};
use crate::manifest::Manifest;

/// FLUX.1.
pub struct Flux;

impl Family for Flux {
    fn name(&self) -> &'static str {
        "flux"
    }

    fn makes(&self) -> &'static str {
        "image"
    }

    fn detects(&self, manifest: &Manifest) -> bool {
        manifest.architecture() == "FluxPipeline"
    }

    fn load(&self, _manifest: &Manifest, _open: &mut OpenWeights<'_>, _options: &LoadOptions) -> Result<LoadedModel> {
        todo!()
    }
}
