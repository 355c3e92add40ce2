//! What a checkpoint says it is: the layout in which it was published and its components.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::gguf::GgufModel;
use super::over_base::OverBase;
use super::random::RandomWeights;
use super::remembered::{Remembered, Tokenizers};
use super::{CONFIG, Checkpoint, Component, Folder, LoadFormat, MODEL_INDEX};
use crate::error::{Error, Result};
use crate::source::ModelSource;
use crate::weights::single::WeightFile;

/// A checkpoint, recognised but not loaded. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Manifest {
    checkpoint: Arc<dyn Checkpoint>,
    layout: Arc<Layout>,
}

/// The layouts in which open weights are published.
#[derive(Debug)]
enum Layout {
    /// One model: `config.json` beside its weights (transformers).
    Transformers {
        /// The parsed `config.json`.
        config: Value,
    },
    /// A pipeline: `model_index.json` and a folder per component (diffusers).
    Diffusers {
        /// `_class_name` of the pipeline.
        class_name: String,
        /// Component name to its class name; components that are null in the index are left out.
        components: BTreeMap<String, String>,
    },
}

impl Manifest {
    /// Recognises the checkpoint of a model.
    pub fn read(source: impl Into<ModelSource>) -> Result<Self> {
        let ModelSource { path, base, .. } = source.into();
        if path.is_file() {
            return Self::read_file(&path, base);
        }
        if base.is_some() {
            return Err(Error::checkpoint(path, "is not a file; a base goes with a single file"));
        }
        if !path.is_dir() {
            return Err(Error::checkpoint(
                path,
                "is neither a folder nor a file; a checkpoint is a folder with config.json or model_index.json, or one file",
            ));
        }
        Self::of(Arc::new(Folder::new(path)))
    }

    /// Of the single file at `path`: a whole language model, or some of a pipeline, with the rest from its base.
    fn read_file(path: &Path, base: Option<PathBuf>) -> Result<Self> {
        let file = WeightFile::open(path)?;
        if GgufModel::is_one(&file) {
            return match base {
                Some(base) => {
                    Err(Error::checkpoint(base, format!("is no base: {} has all of a model", path.display())))
                }
                None => Self::of(Arc::new(GgufModel::new(file)?)),
            };
        }
        let over_base = Arc::new(OverBase::new(file, base)?);
        let manifest = Self { layout: Arc::new(read_model_index(&*over_base)?), checkpoint: over_base.clone() };
        over_base.check_base(manifest.architecture())?;
        Ok(manifest)
    }

    fn of(checkpoint: Arc<dyn Checkpoint>) -> Result<Self> {
        let has = |file: &str| Ok::<_, Error>(checkpoint.file("", file)?.is_some());
        let layout = if has(MODEL_INDEX)? {
            read_model_index(&*checkpoint)?
        } else if has(CONFIG)? {
            Layout::Transformers { config: Component::new(&*checkpoint, "").json(CONFIG)? }
        } else {
            return Err(Error::checkpoint(checkpoint.root(), "has neither config.json nor model_index.json"));
        };
        Ok(Self { checkpoint, layout: Arc::new(layout) })
    }

    /// The same with weights of this format.
    pub(crate) fn in_format(self, format: LoadFormat) -> Self {
        match format {
            LoadFormat::Auto => self,
            LoadFormat::Dummy => Self { checkpoint: Arc::new(RandomWeights(self.checkpoint)), ..self },
        }
    }

    /// The same with these tokenizers, where they were read before; others are added to them.
    pub(super) fn remembering(self, tokenizers: &Tokenizers) -> Self {
        let remembered = Remembered { checkpoint: self.checkpoint, tokenizers: tokenizers.clone() };
        Self { checkpoint: Arc::new(remembered), ..self }
    }

    /// The folder, or of a single file its base.
    pub fn root(&self) -> &Path {
        self.checkpoint.root()
    }

    /// What the checkpoint says it is: the pipeline class, or the first of `architectures`, or `model_type`.
    pub fn architecture(&self) -> &str {
        match &*self.layout {
            Layout::Diffusers { class_name, .. } => class_name,
            Layout::Transformers { config } => config["architectures"][0]
                .as_str()
                .or_else(|| config["model_type"].as_str())
                .unwrap_or("(config.json has neither architectures nor model_type)"),
        }
    }

    /// Whether the folder holds one model of this `model_type`, by which transformers knows it, or of this architecture.
    pub fn is_model(&self, model_type: &str, architecture: &str) -> bool {
        match &*self.layout {
            Layout::Diffusers { .. } => false,
            Layout::Transformers { config } => {
                config["model_type"].as_str() == Some(model_type) || self.architecture() == architecture
            }
        }
    }

    /// Class of a component of a pipeline, as `model_index.json` names it, if the pipeline has it.
    pub fn class_of(&self, component: &str) -> Option<&str> {
        match &*self.layout {
            Layout::Diffusers { components, .. } => components.get(component).map(String::as_str),
            Layout::Transformers { .. } => None,
        }
    }

    /// The component of this name; the empty name is the whole.
    pub fn component<'a>(&'a self, name: &'a str) -> Result<Component<'a>> {
        if !self.checkpoint.has_component(name) {
            let folder = self.root().join(name);
            return Err(Error::checkpoint(folder, "the pipeline's component folder is missing"));
        }
        Ok(Component::new(&*self.checkpoint, name))
    }

    /// The model itself where it has no components, or what a pipeline has beside them.
    pub fn whole(&self) -> Component<'_> {
        Component::new(&*self.checkpoint, "")
    }

    /// Where a file of a component lies, for messages.
    pub fn path(&self, component: &str, file: &str) -> PathBuf {
        self.checkpoint.path(component, file)
    }

    /// Whether there is a component of this name. It need not be one that the pipeline names.
    pub fn has_component(&self, name: &str) -> bool {
        self.checkpoint.has_component(name)
    }

    /// See [`Checkpoint::file`]; `None` where there is no such component either.
    pub(super) fn file(&self, component: &str, file: &str) -> Result<Option<Vec<u8>>> {
        match component.is_empty() || self.has_component(component) {
            true => self.checkpoint.file(component, file),
            false => Ok(None),
        }
    }

    /// See [`Checkpoint::schedule_settings`].
    pub fn schedule_settings(&self) -> Vec<(&'static str, Value)> {
        self.checkpoint.schedule_settings()
    }
}

fn read_model_index(checkpoint: &dyn Checkpoint) -> Result<Layout> {
    let whole = Component::new(checkpoint, "");
    let index: BTreeMap<String, Value> = whole.json(MODEL_INDEX)?;
    let class_name = index
        .get("_class_name")
        .and_then(Value::as_str)
        .ok_or_else(|| Error::checkpoint(whole.path(MODEL_INDEX), "has no `_class_name`"))?
        .to_owned();
    let components =
        index.iter().filter_map(|(name, entry)| Some((name.clone(), entry.get(1)?.as_str()?.to_owned()))).collect();
    Ok(Layout::Diffusers { class_name, components })
}
