//! Wan2.1 text-to-video.

use crate::error::Result;
use crate::family::{Family, LoadOptions, LoadedModel, OpenWeights};
use crate::manifest::Manifest;

/// Wan2.1 text-to-video.
pub struct Wan;

impl Family for Wan {
    fn name(&self) -> &'static str {
        "wan"
    }

    fn makes(&self) -> &'static str {
        "video"
    }

    fn detects(&self, manifest: &Manifest) -> bool {
        manifest.architecture() == "WanPipeline"
    }

    fn load(&self, _manifest: &Manifest, _open: &mut OpenWeights<'_>, _options: &LoadOptions) -> Result<LoadedModel> {
        todo!()
    }
}
