//! Models on their way to a device, as its thread sees them, and where they come from.
//!
//! Owns: what a loading is asked for, its progress, and the loading of checkpoints. Does not know: which models should be where
//! (`lifecycle`), or when a step is taken (`worker`).

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use tale_models::device::{DeviceSpec, Placement};
use tale_models::family::LoadOptions;
use tale_models::loading::{self, Noted};
use tale_models::{Error, LoadedModel, ModelCard};

use super::arbiter::RunnerKey;
use super::assignment::Sizes;
use super::gauges::ModelGauges;
use super::residency::{self, Choice};
use super::{EngineOptions, ModelSpec};
use crate::places::Places;

/// A model that is being loaded, in steps of which each is bounded. Used from the thread of its device.
pub trait Loading: Send {
    /// The next step; the model with the last one. Not called after an error or the model.
    fn advance(&mut self) -> Result<Option<LoadedModel>, Error>;

    /// Bytes that are read, and those that are to be read in all.
    fn bytes(&self) -> (usize, usize);
}

/// Begins a loading on the thread of a device, which has a placement where there is a real one.
pub type Begin = Box<dyn FnOnce(Option<&Placement>) -> Result<Box<dyn Loading>, Error> + Send>;

/// A model that could be loaded.
pub struct Loadable {
    /// What it takes.
    pub sizes: Sizes,
    /// See there.
    pub begin: Begin,
}

/// Where models come from.
pub trait Loader: Send + Sync + Debug {
    /// What a model would take on a device, of whose bytes so many are for models and sessions that are not there yet, and the way
    /// to load it. Reads headers and may take seconds.
    fn loadable(&self, model: &ModelSpec, device: DeviceSpec, free_bytes: usize) -> Result<Loadable, Error>;
}

/// For a model that lies in memory: it cannot be had again.
#[derive(Debug)]
pub(super) struct NoLoader;

impl Loader for NoLoader {
    fn loadable(&self, model: &ModelSpec, _device: DeviceSpec, _free_bytes: usize) -> Result<Loadable, Error> {
        Err(Error::checkpoint(&model.source.path, "is not the checkpoint of a model that was given from memory"))
    }
}

/// Loads checkpoints.
#[derive(Debug)]
pub(super) struct Checkpoints(pub(super) EngineOptions);

impl Loader for Checkpoints {
    fn loadable(&self, model: &ModelSpec, device: DeviceSpec, free_bytes: usize) -> Result<Loadable, Error> {
        let options = &self.0;
        let dry = Placement::in_host_memory(device, options.weight_dtype);
        let prompt_lookup = model.prompt_lookup.unwrap_or(options.load.prompt_lookup);
        let load = LoadOptions { prompt_lookup, ..options.load.clone() };
        let choice = Choice::of(&model.source, &dry, &load)?;
        let text_encoders = match options.text_encoders {
            Some(text_encoders) => text_encoders,
            None => residency::choose(&[choice], free_bytes)[0],
        };
        let load = LoadOptions { text_encoders, ..load };
        let (inspection, noted) = Noted::of(&model.source, &dry, &load)?;
        let (makes, family) = (inspection.makes, inspection.family);
        let Some((noted, _)) = noted else {
            let unknown = || Error::checkpoint(&model.source.path, "cannot be loaded");
            return Err(inspection.into_problem().unwrap_or_else(unknown));
        };
        if model.prompt_lookup.is_some() && makes != "text" {
            let problem = format!("models of family {family} make no tokens that could be guessed");
            return Err(Error::checkpoint(&model.source.path, problem));
        }
        let begin: Begin = Box::new(move |placement| {
            let placement = placement.ok_or_else(|| Error::Device("a device without a placement".into()))?;
            Ok(Box::new(noted.begin(placement)) as Box<dyn Loading>)
        });
        Ok(Loadable { sizes: choice.sizes(text_encoders), begin })
    }
}

impl Loading for loading::Loading {
    fn advance(&mut self) -> Result<Option<LoadedModel>, Error> {
        loading::Loading::advance(self)
    }

    fn bytes(&self) -> (usize, usize) {
        loading::Loading::bytes(self)
    }
}

/// A model that a device is to load.
pub(super) struct Arrival {
    pub(super) name: String,
    /// In which its sessions wait.
    pub(super) queue: Arc<Places>,
    pub(super) resident_bytes: usize,
    pub(super) begin: Begin,
    pub(super) progress: Arc<Progress>,
    /// Hears whether it has begun.
    pub(super) begun: Sender<Result<(), Error>>,
    /// Hears of its end, where it has begun.
    pub(super) told: Sender<Result<Arrived, Error>>,
}

impl Debug for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrival").field("name", &self.name).field("resident_bytes", &self.resident_bytes).finish()
    }
}

/// A model that a device has loaded.
pub(super) struct Arrived {
    pub(super) card: ModelCard,
    pub(super) gauges: Arc<ModelGauges>,
}

/// Bytes of a model that are read, on all devices that load it.
#[derive(Debug, Default)]
pub(super) struct Progress(Mutex<BTreeMap<RunnerKey, (usize, usize)>>);

impl Progress {
    pub(super) fn note(&self, runner: RunnerKey, bytes: (usize, usize)) {
        self.0.lock().expect("nothing panics while it holds this: this is a bug").insert(runner, bytes);
    }

    /// Read, and to be read in all.
    pub(super) fn bytes(&self) -> (usize, usize) {
        let parts = self.0.lock().expect("nothing panics while it holds this: this is a bug");
        parts.values().fold((0, 0), |(done, total), (read, all)| (done + read, total + all))
    }
}
