//! Loading a model in bounded steps, beside others that work.
//!
//! Owns: the two builds of a whole model, over dry weights that note what is asked for and over those that are read, and the steps
//! between them. Does not know: when a step is taken, or what else works on the device.

use std::sync::Arc;

use super::{Inspection, inspected, load_with, on_device, say_what_is_left_over};
use crate::checkpoint::{Manifest, Mode, OpenWeights, STEP_BYTES, WeightFiles};
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::families::detect;
use crate::family::{Family, LoadOptions, LoadedModel};
use crate::quietly::quietly;
use crate::source::ModelSource;
use crate::weights::Ahead;

/// What a model asks for, noted by a build over dry weights. It may go to the thread of the device that will have the model.
pub struct Noted {
    source: ModelSource,
    options: LoadOptions,
    family: &'static dyn Family,
    /// Remembers what was read of it: tokenizers take longer than a step may.
    manifest: Manifest,
    files: WeightFiles,
    ahead: Arc<Ahead>,
}

impl Noted {
    /// Of a checkpoint, for networks with the dtypes of `placement`, which is in the host's memory: reads headers and no tensors,
    /// and may take seconds. With it the model over tensors that take no memory; no model, and nothing to load, where the
    /// inspection names a problem.
    pub fn of(
        source: &ModelSource,
        placement: &Placement,
        options: &LoadOptions,
    ) -> Result<(Inspection, Option<(Self, LoadedModel)>)> {
        quietly(|| Self::read(source, placement, options))
    }

    fn read(
        source: &ModelSource,
        placement: &Placement,
        options: &LoadOptions,
    ) -> Result<(Inspection, Option<(Self, LoadedModel)>)> {
        let files = WeightFiles::of(source);
        let manifest = Manifest::read(source)?.in_format(options.load_format);
        let family = detect(&manifest)?;
        let ahead = Arc::new(Ahead::new(&placement.device));
        let on_component = &mut |_: &str| ();
        let open = OpenWeights::new(source, placement, Mode::Inspect, options.load_format, on_component);
        let mut open = open.restricted_to(on_device(family, options)).with_ahead(Some(&ahead));
        let manifest = open.remembering(manifest);
        let built = load_with(family, &manifest, &mut open, options);
        let (inspection, model) = inspected(family, &open, built);
        let noted = Self { source: source.clone(), options: options.clone(), family, manifest, files, ahead };
        let is_sound =
            inspection.problem.is_none() && inspection.components.iter().all(|(_, report)| report.problems.is_empty());
        Ok((inspection, model.filter(|_| is_sound).map(|model| (noted, model))))
    }

    /// Begins to load it at `placement`, on the thread of that device.
    pub fn begin(self, placement: &Placement) -> Loading {
        self.ahead.will_live_on(&placement.device);
        let total_bytes = self.ahead.bytes_left();
        Loading { noted: self, placement: placement.clone(), total_bytes, is_read: total_bytes == 0 }
    }
}

/// A model that is being read.
pub struct Loading {
    noted: Noted,
    placement: Placement,
    total_bytes: usize,
    is_read: bool,
}

impl Loading {
    /// Bytes of files that are read, and those that are to be read in all.
    pub fn bytes(&self) -> (usize, usize) {
        (self.total_bytes - self.noted.ahead.bytes_left(), self.total_bytes)
    }

    /// Reads at most [`STEP_BYTES`]; the model with the last step, which reads nothing and makes its caches.
    pub fn advance(&mut self) -> Result<Option<LoadedModel>> {
        if !self.is_read {
            self.is_read = !self.noted.ahead.advance(STEP_BYTES)?;
            return Ok(None);
        }
        let Noted { source, options, family, manifest, files, ahead } = &self.noted;
        if WeightFiles::of(source) != *files {
            return Err(Error::checkpoint(&source.path, "has changed while the model was being loaded"));
        }
        if let Some(note) = family.licence_note() {
            tracing::warn!("{}: {note}", manifest.root().display());
        }
        let on_component = &mut |_: &str| ();
        let open = OpenWeights::new(source, &self.placement, Mode::Load, options.load_format, on_component);
        let mut open = open.restricted_to(on_device(*family, options)).with_ahead(Some(ahead));
        let mut model = load_with(*family, manifest, &mut open, options)?;
        model.resident_bytes += open.resident_bytes();
        say_what_is_left_over(&open);
        Ok(Some(model))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{DeviceSpec, WeightDtype};
    use crate::testing::repository;

    /// Of each family's kind of checkpoint one: folders, pipelines, GGUF and quantised files.
    #[test]
    fn what_is_read_in_steps_is_the_model_that_is_read_at_once() {
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("cpu");
        let dry = Placement::in_host_memory(DeviceSpec::Cpu, WeightDtype::Auto);
        let options = LoadOptions { kv_cache_bytes: 1 << 22, ..LoadOptions::default() };
        for case in ["llama-tied", "qwen2", "sdxl-a", "flux-dev", "wan-a"] {
            let source = ModelSource::at(repository().join("tests/goldens").join(case).join("checkpoint"));
            let whole = super::super::load(&source, &placement, &options, &mut |_| ()).expect(case);
            let (inspection, noted) = Noted::of(&source, &dry, &options).expect(case);
            let (noted, _) = noted.expect(case);
            let mut loading = noted.begin(&placement);
            let (done, total) = loading.bytes();
            assert!(done == 0 && total > 0, "{case}: {done} of {total}");
            let mut steps = 0;
            let model = loop {
                steps += 1;
                if let Some(model) = loading.advance().expect(case) {
                    break model;
                }
            };
            assert_eq!(loading.bytes(), (total, total), "{case}");
            assert_eq!(steps, 2, "{case}: one step reads all of a small one");
            assert_eq!(model.resident_bytes, whole.resident_bytes, "{case}");
            assert_eq!(model.resident_bytes, inspection.resident_bytes(), "{case}");
        }
    }

    #[test]
    fn a_checkpoint_that_changes_meanwhile_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let golden = repository().join("tests/goldens/llama-tied/checkpoint");
        for entry in std::fs::read_dir(golden).expect("it is there") {
            let path = entry.expect("readable").path();
            std::fs::copy(&path, dir.path().join(path.file_name().expect("a name"))).expect("copied");
        }
        let dry = Placement::in_host_memory(DeviceSpec::Cpu, WeightDtype::Auto);
        let options = LoadOptions { kv_cache_bytes: 1 << 22, ..LoadOptions::default() };
        let (_, noted) = Noted::of(&ModelSource::at(dir.path()), &dry, &options).expect("sound");
        let mut loading =
            noted.expect("sound").0.begin(&Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("cpu"));
        assert!(loading.advance().expect("read").is_none());
        let config = dir.path().join("config.json");
        let mut text = std::fs::read_to_string(&config).expect("readable");
        text.push('\n');
        std::fs::write(&config, text).expect("written");
        let error = loading.advance().err().expect("refused").to_string();
        assert!(error.contains("has changed while the model was being loaded"), "{error}");
    }
}
