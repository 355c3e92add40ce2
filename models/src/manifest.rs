//! What a checkpoint is: the layout in which it was published and its components.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config::read_json;
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::single_file::SingleFile;
use crate::source::ModelSource;
use crate::weights::Weights;

/// A checkpoint, recognised but not loaded.
#[derive(Debug, Clone)]
pub struct Manifest {
    /// The folder; of a single file its base.
    pub root: PathBuf,
    /// How it is laid out.
    pub layout: Layout,
    /// The file whose weights take the place of those in the folder.
    pub single_file: Option<SingleFile>,
}

/// The layouts in which open weights are published.
#[derive(Debug, Clone)]
pub enum Layout {
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
    /// Recognises the layout of a checkpoint.
    pub fn read(source: impl Into<ModelSource>) -> Result<Self> {
        let source = source.into();
        let path = source.path.as_path();
        if path.is_file() {
            return Self::read_file(path, source.base);
        }
        if source.base.is_some() {
            return Err(Error::checkpoint(path, "is not a file; a base goes with a single file"));
        }
        if !path.is_dir() {
            return Err(Error::checkpoint(
                path,
                "is neither a folder nor a file; a checkpoint is a folder with config.json or model_index.json, or one file",
            ));
        }
        let root = path.to_path_buf();
        let index = path.join("model_index.json");
        if index.exists() {
            return Ok(Self { root, layout: read_model_index(&index)?, single_file: None });
        }
        let config = path.join("config.json");
        if config.exists() {
            let layout = Layout::Transformers { config: read_json(&config)? };
            return Ok(Self { root, layout, single_file: None });
        }
        Err(Error::checkpoint(path, "has neither config.json nor model_index.json"))
    }

    /// Of the single file at `path`, with the pipeline of its base.
    fn read_file(path: &Path, base: Option<PathBuf>) -> Result<Self> {
        let file = SingleFile::open(path)?;
        let root = file.base(base)?;
        let layout = read_model_index(&root.join("model_index.json"))?;
        let manifest = Self { root, layout, single_file: Some(file.clone()) };
        file.check_base(&manifest.root, manifest.architecture())?;
        Ok(manifest)
    }

    /// What the checkpoint says it is: the pipeline class, or the first of `architectures`, or `model_type`.
    pub fn architecture(&self) -> &str {
        match &self.layout {
            Layout::Diffusers { class_name, .. } => class_name,
            Layout::Transformers { config } => config["architectures"][0]
                .as_str()
                .or_else(|| config["model_type"].as_str())
                .unwrap_or("(config.json has neither architectures nor model_type)"),
        }
    }

    /// Whether the folder holds one model of this `model_type`, by which transformers knows it, or of this architecture.
    pub fn is_model(&self, model_type: &str, architecture: &str) -> bool {
        match &self.layout {
            Layout::Diffusers { .. } => false,
            Layout::Transformers { config } => {
                config["model_type"].as_str() == Some(model_type) || self.architecture() == architecture
            }
        }
    }

    /// The component in the folder `name` of a pipeline.
    pub fn component(&self, name: &str) -> Result<Component> {
        let dir = self.root.join(name);
        if !dir.is_dir() {
            return Err(Error::checkpoint(dir, "the pipeline's component folder is missing"));
        }
        Ok(Component { dir })
    }

    /// The model itself, for a folder that holds just one.
    pub fn whole(&self) -> Component {
        Component { dir: self.root.clone() }
    }
}

fn read_model_index(path: &Path) -> Result<Layout> {
    let index: BTreeMap<String, Value> = read_json(path)?;
    let class_name = index
        .get("_class_name")
        .and_then(Value::as_str)
        .ok_or_else(|| Error::checkpoint(path, "has no `_class_name`"))?
        .to_owned();
    let components =
        index.iter().filter_map(|(name, entry)| Some((name.clone(), entry.get(1)?.as_str()?.to_owned()))).collect();
    Ok(Layout::Diffusers { class_name, components })
}

/// One folder with a configuration and, for models, weights.
#[derive(Debug, Clone)]
pub struct Component {
    /// The folder.
    pub dir: PathBuf,
}

impl Component {
    /// Where its `config.json` is.
    pub fn config_path(&self) -> PathBuf {
        self.dir.join("config.json")
    }

    /// Parses `config.json` of the component.
    pub fn config<T: DeserializeOwned>(&self) -> Result<T> {
        read_json(&self.config_path())
    }

    /// Parses another JSON file of the component, such as `scheduler_config.json`.
    pub fn json<T: DeserializeOwned>(&self, file_name: &str) -> Result<T> {
        read_json(&self.dir.join(file_name))
    }

    /// Maps the component's safetensors files.
    pub fn weights(&self, placement: &Placement) -> Result<Weights> {
        Weights::open(&self.dir, placement)
    }
}
