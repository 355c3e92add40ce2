//! Opening the weights of a model's components as it is built.
//!
//! Owns: which components are for the device and which are dry, where their weights come from, a record of what was opened.
//! Does not know: what is built of them.

use std::path::Path;

use super::LoadFormat;
use super::reread::{LentParts, Reread};
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::manifest::Manifest;
use crate::source::ModelSource;
use crate::weights::{Weights, WeightsReport};

/// Why a model is built.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// To run.
    Load,
    /// To see what its files lack, and what it would take.
    Inspect,
}

/// Which components are for the device; the others are dry: not even their shapes are made there.
#[derive(Clone, Copy)]
pub(crate) enum Parts<'a> {
    All,
    /// These alone.
    Only(&'a [&'a str]),
    /// All but these.
    Without(&'a [&'a str]),
}

impl Parts<'_> {
    fn contains(self, component: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(names) => names.contains(&component),
            Self::Without(names) => !names.contains(&component),
        }
    }
}

/// What makes a model of the weights that are opened for it.
pub type Build<M> = fn(&Manifest, &mut OpenWeights<'_>) -> Result<M>;

/// Opens a component's weights by folder name and reports progress; remembers them for reports.
pub struct OpenWeights<'a> {
    source: &'a ModelSource,
    placement: &'a Placement,
    parts: Parts<'a>,
    mode: Mode,
    format: LoadFormat,
    on_component: &'a mut dyn FnMut(&str),
    opened: Vec<(String, Weights)>,
}

impl<'a> OpenWeights<'a> {
    /// For all components of the model at `source`. `on_component` hears the name of each before it is read.
    pub(crate) fn new(
        source: &'a ModelSource,
        placement: &'a Placement,
        mode: Mode,
        format: LoadFormat,
        on_component: &'a mut dyn FnMut(&str),
    ) -> Self {
        Self { source, placement, parts: Parts::All, mode, format, on_component, opened: Vec::new() }
    }

    /// Only these are for the device.
    pub(crate) fn restricted_to(self, parts: Parts<'a>) -> Self {
        Self { parts, ..self }
    }

    /// The weights of the component in folder `name`; the empty name is the checkpoint folder itself.
    pub fn component(&mut self, manifest: &Manifest, name: &str) -> Result<Weights> {
        let component = if name.is_empty() { manifest.whole() } else { manifest.component(name)? };
        let (mode, placement) = self.how(name);
        let weights = match self.of_single_file(manifest, name, mode, &placement) {
            Some(weights) => weights,
            None => self.of_folder(&component.dir, mode, &placement)?,
        };
        self.opened.push((name.to_owned(), weights.clone()));
        Ok(weights)
    }

    /// The weights in a folder or file that goes with the checkpoint, by the name under which they are reported.
    pub fn beside(&mut self, name: &str, path: &Path) -> Result<Weights> {
        if self.format == LoadFormat::Dummy {
            return Err(Error::checkpoint(path, "goes with the files of a checkpoint, not with random weights"));
        }
        let (mode, placement) = self.how(name);
        let weights = match mode {
            Mode::Load => Weights::open(path, &placement)?,
            Mode::Inspect => Weights::open_dry(path, &placement)?,
        };
        self.opened.push((name.to_owned(), weights.clone()));
        Ok(weights)
    }

    /// Where the model lies, and what goes with it.
    pub fn source(&self) -> &ModelSource {
        self.source
    }

    /// Where tensors will live.
    pub fn placement(&self) -> &Placement {
        self.placement
    }

    /// Whether this is an inspection: tensors take no memory, so nothing large may be computed from them.
    pub fn is_dry(&self) -> bool {
        self.mode != Mode::Load
    }

    fn of_single_file(&self, manifest: &Manifest, name: &str, mode: Mode, placement: &Placement) -> Option<Weights> {
        let file = manifest.single_file.as_ref().filter(|_| self.format == LoadFormat::Auto)?;
        file.weights(name, placement, mode == Mode::Inspect)
    }

    fn of_folder(&self, dir: &Path, mode: Mode, placement: &Placement) -> Result<Weights> {
        match (self.format, mode) {
            (LoadFormat::Auto, Mode::Load) => Weights::open(dir, placement),
            (LoadFormat::Auto, Mode::Inspect) => Weights::open_dry(dir, placement),
            (LoadFormat::Dummy, Mode::Load) => Weights::dummy(dir, placement),
            (LoadFormat::Dummy, Mode::Inspect) => Weights::dummy_dry(dir, placement),
        }
    }

    /// How the component of this name is opened.
    fn how(&mut self, name: &str) -> (Mode, Placement) {
        match self.parts.contains(name) {
            true => {
                (self.on_component)(name);
                (self.mode, self.placement.clone())
            }
            false => (Mode::Inspect, self.placement.in_memory_of_the_host()),
        }
    }

    /// Whether the networks took all of the files that must fit them.
    pub(crate) fn check_fit(&self, manifest: &Manifest) -> Result<()> {
        let config = |component: &str| manifest.root.join(component).join("config.json");
        self.opened.iter().try_for_each(|(component, weights)| weights.check_fit(&config(component)))
    }

    /// Bytes that the opened components take on the device.
    pub(crate) fn resident_bytes(&self) -> usize {
        self.bytes(|name| self.parts.contains(name))
    }

    /// Bytes that the opened components that are kept elsewhere take on the device while they are there.
    pub(crate) fn lent_bytes(&self) -> usize {
        self.bytes(|name| !self.parts.contains(name))
    }

    fn bytes(&self, which: impl Fn(&str) -> bool) -> usize {
        let opened = self.opened.iter().filter(|(name, _)| which(name));
        opened.map(|(_, weights)| weights.report().resident_bytes).sum()
    }

    /// What is to be said of each component that was opened.
    pub(crate) fn reports(&self) -> Vec<(String, WeightsReport)> {
        self.opened.iter().map(|(name, weights)| (name.clone(), weights.report())).collect()
    }

    /// The components that are not kept on the device, for whoever reads them when they are needed; `None` where all are
    /// kept. Asked when all have been opened.
    pub fn lent(&self) -> Option<LentParts> {
        let Parts::Without(components) = self.parts else { return None };
        let components = components.iter().map(|name| (*name).to_owned()).collect();
        Some(LentParts::new(components, self.lent_bytes(), self.reread()))
    }

    /// For whoever may want to read parts of the model once more.
    pub fn reread(&self) -> Reread {
        Reread::new(self.source.clone(), self.placement.clone(), self.format)
    }
}
