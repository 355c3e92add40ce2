//! Opening the weights of a model's components as it is built.
//!
//! Owns: which components are for the device and which are dry, where their weights come from, a record of what was opened.
//! Does not know: what is built of them.

use std::path::Path;
use std::sync::Arc;

use super::reading::LentComponents;
use sha2::{Digest as _, Sha256};

use super::remembered::Tokenizers;
use super::reread::Reread;
use super::{CONFIG, Component, LoadFormat, MODEL_INDEX, Manifest, Mode};
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::quantisation;
use crate::session_checkpoint::Identity;
use crate::source::ModelSource;
use crate::weights::{Ahead, Weights, WeightsReport};

/// The component of a pipeline that says how noise goes, and its file.
const SCHEDULER: &str = "scheduler";
const SCHEDULER_CONFIG: &str = "scheduler_config.json";

/// Which components are for the device; the others are dry: not even their shapes are made there.
#[derive(Clone, Copy)]
pub(crate) enum OnDevice<'a> {
    All,
    /// These alone.
    Only(&'a [&'a str]),
    /// All but these.
    Without(&'a [&'a str]),
}

impl OnDevice<'_> {
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
    on_device: OnDevice<'a>,
    mode: Mode,
    format: LoadFormat,
    on_component: &'a mut dyn FnMut(&str),
    opened: Vec<(String, Weights)>,
    /// Of the model, for whoever reads parts of it once more.
    tokenizers: Tokenizers,
    /// Where tensors are noted or lie ready, if they do.
    ahead: Option<&'a Arc<Ahead>>,
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
        Self {
            source,
            placement,
            on_device: OnDevice::All,
            mode,
            format,
            on_component,
            opened: Vec::new(),
            ahead: None,
            tokenizers: Tokenizers::default(),
        }
    }

    /// Only these are for the device.
    pub(crate) fn restricted_to(self, on_device: OnDevice<'a>) -> Self {
        Self { on_device, ..self }
    }

    /// The model's manifest, whose tokenizers are remembered for whoever reads parts of the model once more.
    pub(crate) fn remembering(&self, manifest: Manifest) -> Manifest {
        manifest.remembering(&self.tokenizers)
    }

    /// What the components on the device ask for is noted in `ahead`, or is ready there.
    pub(crate) fn with_ahead(self, ahead: Option<&'a Arc<Ahead>>) -> Self {
        Self { ahead, ..self }
    }

    /// The weights of the component of this name; the empty name is the whole checkpoint.
    pub fn component(&mut self, manifest: &Manifest, name: &str) -> Result<Weights> {
        let component = manifest.component(name)?;
        if !name.is_empty() {
            check_is_plain(component)?;
        }
        let (mode, placement) = self.how(name);
        let weights = component.open(mode, &placement)?;
        Ok(self.opened_as(name, weights))
    }

    /// The weights of a component of another checkpoint, which goes with this one. `name` is that under which they are
    /// reported.
    pub fn component_beside(&mut self, name: &str, manifest: &Manifest, component: &str) -> Result<Weights> {
        let component = manifest.component(component)?;
        self.check_has_files(&component.path(""))?;
        check_is_plain(component)?;
        let (mode, placement) = self.how(name);
        let weights = component.open(mode, &placement)?;
        Ok(self.opened_as(name, weights))
    }

    /// The weights in a folder or file that goes with the checkpoint, by the name under which they are reported.
    pub fn beside(&mut self, name: &str, path: &Path) -> Result<Weights> {
        self.check_has_files(path)?;
        let (mode, placement) = self.how(name);
        let weights = match mode {
            Mode::Load => Weights::open(path, &placement)?,
            Mode::Inspect => Weights::open_dry(path, &placement)?,
        };
        Ok(self.opened_as(name, weights))
    }

    /// Where the model lies, and what goes with it.
    pub fn source(&self) -> &ModelSource {
        self.source
    }

    /// Where tensors will live.
    pub fn placement(&self) -> &Placement {
        self.placement
    }

    /// Whether the model is read for some of its components alone, to be dropped when they have done their work.
    pub fn is_partial(&self) -> bool {
        matches!(self.on_device, OnDevice::Only(_))
    }

    /// Whether this is an inspection: tensors take no memory, so nothing large may be computed from them.
    pub fn is_dry(&self) -> bool {
        self.mode != Mode::Load
    }

    /// Refuses what goes with files where there are none.
    fn check_has_files(&self, path: &Path) -> Result<()> {
        match self.format {
            LoadFormat::Auto => Ok(()),
            LoadFormat::Dummy => {
                Err(Error::checkpoint(path, "goes with the files of a checkpoint, not with random weights"))
            }
        }
    }

    fn opened_as(&mut self, name: &str, weights: Weights) -> Weights {
        self.opened.push((name.to_owned(), weights.clone()));
        match self.ahead {
            Some(ahead) if self.on_device.contains(name) => weights.with_ahead(ahead, name),
            _ => weights,
        }
    }

    /// How the component of this name is opened.
    fn how(&mut self, name: &str) -> (Mode, Placement) {
        match self.on_device.contains(name) {
            true => {
                (self.on_component)(name);
                (self.mode, self.placement.clone())
            }
            false => (Mode::Inspect, self.placement.in_memory_of_the_host()),
        }
    }

    /// Whether the networks took all of the files that must fit them.
    pub(crate) fn check_fit(&self, manifest: &Manifest) -> Result<()> {
        let config = |component: &str| manifest.path(component, CONFIG);
        self.opened.iter().try_for_each(|(component, weights)| weights.check_fit(&config(component)))
    }

    /// Bytes that the opened components take on the device.
    pub(crate) fn resident_bytes(&self) -> usize {
        self.bytes(|name| self.on_device.contains(name))
    }

    /// Bytes that the opened components that are kept elsewhere take on the device while they are there.
    pub(crate) fn lent_bytes(&self) -> usize {
        self.bytes(|name| !self.on_device.contains(name))
    }

    fn bytes(&self, which: impl Fn(&str) -> bool) -> usize {
        let opened = self.opened.iter().filter(|(name, _)| which(name));
        opened.map(|(_, weights)| weights.resident_bytes()).sum()
    }

    /// What is to be said of each component that was opened.
    pub(crate) fn reports(&self) -> Vec<(String, WeightsReport)> {
        self.opened.iter().map(|(name, weights)| (name.clone(), weights.report())).collect()
    }

    /// The components that are not kept on the device, for whoever reads them when they are needed; `None` where all are
    /// kept. Asked when all have been opened.
    pub fn lent(&self) -> Option<LentComponents> {
        let OnDevice::Without(components) = self.on_device else { return None };
        let components = components.iter().map(|name| (*name).to_owned()).collect();
        Some(LentComponents::new(components, self.lent_bytes(), self.reread()))
    }

    /// What names all that results depend on beside requests, once all components have been opened; `None` of an inspection, and
    /// of random weights on a GPU, which draws others each time.
    /// Of each tensor a few bytes are looked at: no more is read for it than a page of the file.
    pub fn identity(&self, manifest: &Manifest) -> Result<Option<Identity>> {
        let is_random = self.opened.iter().any(|(_, weights)| weights.is_dummy());
        if self.is_dry() || (is_random && self.placement.is_gpu()) {
            return Ok(None);
        }
        let mut digest = Sha256::new();
        for (name, weights) in &self.opened {
            digest.update(format!("{name}\n"));
            weights.add_to(&mut digest);
        }
        let configs = self.opened.iter().map(|(name, _)| (name.as_str(), CONFIG));
        for (component, file) in configs.chain([("", MODEL_INDEX), (SCHEDULER, SCHEDULER_CONFIG)]) {
            let content = manifest.file(component, file)?.unwrap_or_default();
            digest.update(format!("{component} {file} {}\n", content.len()));
            digest.update(content);
        }
        digest.update(format!("{:?}", manifest.schedule_settings()));
        Ok(Some(Identity { weights: digest.finalize().into(), device: self.placement.kind()? }))
    }

    /// For whoever may want to read parts of the model once more.
    pub fn reread(&self) -> Reread {
        Reread::new(self.source.clone(), self.placement.clone(), self.format, self.tokenizers.clone())
    }
}

/// Refuses a component of a pipeline whose configuration says that its matrices are quantised: such formats are read of language
/// models alone.
fn check_is_plain(component: Component<'_>) -> Result<()> {
    let Some(fields) = component.fields_if_present(CONFIG)? else { return Ok(()) };
    let Some(quantised) = fields.object(quantisation::FIELD)? else { return Ok(()) };
    let method: Option<String> = quantised.nullable_or("quant_method", None)?;
    let method = method.map_or_else(String::new, |method| format!(" (`{method}`)"));
    let problem = format!("of a pipeline's component is not read{method}; GGUF and eight-bit single files are");
    Err(fields.error(quantisation::FIELD, problem))
}
