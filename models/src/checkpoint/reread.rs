//! Reading parts of a model once more, after it was loaded: in f32, or those that are away from the device in between.
//!
//! Owns: where the model came from, and whether its files are still the same. Does not know: in which steps more is read
//! (`reading`), or why.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::remembered::Tokenizers;
use super::{Build, LoadFormat, Manifest, Mode, OnDevice, OpenWeights};
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::quietly::quietly;
use crate::source::ModelSource;
use crate::weights::Ahead;

/// Where a model was read from, to read parts of it in f32 later. No file is kept open or mapped meanwhile: whoever
/// overwrites it must not end the process.
pub struct Reread {
    source: ModelSource,
    /// As they were when the model was read.
    files: WeightFiles,
    placement: Placement,
    format: LoadFormat,
    tokenizers: Tokenizers,
}

impl Reread {
    /// Of the model at `source`, whose files are now as they were when it was read.
    pub(super) fn new(source: ModelSource, placement: Placement, format: LoadFormat, tokenizers: Tokenizers) -> Self {
        let files = WeightFiles::of(&source);
        Self { source, files, placement, format, tokenizers }
    }

    /// The model that has these components and no others, wholly dry, and the bytes that they take. What it asks for is
    /// noted in `ahead`.
    pub(super) fn noted<M>(
        &self,
        placement: &Placement,
        components: &[String],
        build: Build<M>,
        ahead: &Arc<Ahead>,
    ) -> Result<(M, usize)> {
        self.built(&placement.in_memory_of_the_host(), Mode::Inspect, components, build, ahead)
    }

    /// The model that has these components and no others, of what is ready in `ahead`.
    pub(super) fn built_of<M>(
        &self,
        placement: &Placement,
        components: &[String],
        build: Build<M>,
        ahead: &Arc<Ahead>,
    ) -> Result<M> {
        Ok(self.built(placement, Mode::Load, components, build, ahead)?.0)
    }

    /// Where the model's tensors live.
    pub(super) fn placement(&self) -> &Placement {
        &self.placement
    }

    /// See [`Placement::spare_bytes`].
    pub fn spare_bytes(&self) -> Result<Option<usize>> {
        self.placement.spare_bytes()
    }

    /// A model that has these components and no others, and the bytes that they take.
    fn built<M>(
        &self,
        placement: &Placement,
        mode: Mode,
        components: &[String],
        build: Build<M>,
        ahead: &Arc<Ahead>,
    ) -> Result<(M, usize)> {
        let components: Vec<&str> = components.iter().map(String::as_str).collect();
        if WeightFiles::of(&self.source) != self.files {
            let problem = "has changed since the model was loaded, so that nothing more can be read from it; restart";
            return Err(Error::checkpoint(&self.source.path, problem));
        }
        let on_component = &mut |_: &str| ();
        let open = OpenWeights::new(&self.source, placement, mode, self.format, on_component);
        let mut open = open.restricted_to(OnDevice::Only(&components)).with_ahead(Some(ahead));
        // Its warnings were given when the model was loaded.
        let model = quietly(|| {
            let manifest = Manifest::read(&self.source)?.in_format(self.format).remembering(&self.tokenizers);
            build(&manifest, &mut open)
        })?;
        Ok((model, open.resident_bytes()))
    }
}

/// Length and time of change of the files that a model is made of, by which one can tell that they are the same.
#[derive(PartialEq, Eq)]
pub(crate) struct WeightFiles(BTreeMap<PathBuf, (u64, SystemTime)>);

impl WeightFiles {
    /// Of a checkpoint's folder and those in it, or of a file and its base. LoRA files may come and go.
    pub(crate) fn of(source: &ModelSource) -> Self {
        let mut found = Self(BTreeMap::new());
        let own = || source.path.parent().filter(|folder| folder.join("model_index.json").exists());
        let base = source.base.as_deref().or_else(|| own().filter(|_| source.path.is_file()));
        for path in std::iter::once(source.path.as_path())
            .chain(base)
            .chain(source.ip_adapter.as_deref())
            .chain(source.refiner.as_deref())
        {
            found.add(path, source.loras.as_deref(), 1);
        }
        found
    }

    fn add(&mut self, path: &Path, left_out: Option<&Path>, depth: usize) {
        if Some(path) == left_out {
            return;
        }
        let Ok(metadata) = path.metadata() else { return };
        if metadata.is_file() {
            let changed = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            self.0.insert(path.to_owned(), (metadata.len(), changed));
            return;
        }
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_file() || depth > 0 {
                self.add(&path, left_out, depth.saturating_sub(1));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_changed_are_told_from_those_that_were_loaded() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("created");
            std::fs::write(path, text).expect("written");
        };
        write("unet/model.safetensors", "old");
        let source = ModelSource { loras: Some(dir.path().join("loras")), ..ModelSource::at(dir.path()) };
        let loaded = WeightFiles::of(&source);
        write("loras/new.safetensors", "any");
        assert!(WeightFiles::of(&source) == loaded, "LoRA files come and go");
        write("unet/model.safetensors", "longer");
        assert!(WeightFiles::of(&source) != loaded);
    }
}
