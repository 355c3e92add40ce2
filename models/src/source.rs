//! Where a model lies on disk: its checkpoint, and what belongs to it without being part of it.

use std::path::{Path, PathBuf};

/// A checkpoint and the paths that go with it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelSource {
    /// The checkpoint: a folder, or a single file.
    pub path: PathBuf,
    /// Of a single file: the diffusers folder that gives what the file lacks (configurations, tokenizers, and the
    /// components that are not in it).
    pub base: Option<PathBuf>,
    /// The IP-Adapter for reference pictures: its safetensors file, or a folder that holds just one.
    pub ip_adapter: Option<PathBuf>,
    /// The folder of the IP-Adapter's vision encoder; without it `image_encoder` beside the adapter's file.
    pub image_encoder: Option<PathBuf>,
    /// The folder of LoRA files that requests may name.
    pub loras: Option<PathBuf>,
    /// The folder of the refiner that takes the latents over where requests say so.
    pub refiner: Option<PathBuf>,
}

impl ModelSource {
    /// A checkpoint alone.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), ..Self::default() }
    }

    /// The paths beside the checkpoint, each with the key under which configurations and command lines name it.
    pub fn extras(&mut self) -> [(&'static str, &mut Option<PathBuf>); 5] {
        [
            ("base", &mut self.base),
            ("loras", &mut self.loras),
            ("ip_adapter", &mut self.ip_adapter),
            ("image_encoder", &mut self.image_encoder),
            ("refiner", &mut self.refiner),
        ]
    }

    /// Reads relative paths as relative to `folder`.
    pub fn relative_to(mut self, folder: &Path) -> Self {
        self.path = folder.join(&self.path);
        for (_, extra) in self.extras() {
            *extra = extra.take().map(|path| folder.join(path));
        }
        self
    }
}

impl From<&ModelSource> for ModelSource {
    fn from(source: &ModelSource) -> Self {
        source.clone()
    }
}

impl From<&Path> for ModelSource {
    fn from(path: &Path) -> Self {
        Self::at(path)
    }
}

impl From<&PathBuf> for ModelSource {
    fn from(path: &PathBuf) -> Self {
        Self::at(path)
    }
}
