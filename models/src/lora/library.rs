//! A folder of LoRA files for one model: found by name, checked when a request first asks for one.
//!
//! Plain data, shared by threads: what a request needs to know before the device hears of it. A name is looked for among
//! the folder's files and never becomes part of a path. Files that appear, change or go while the server runs are seen
//! at the next request; to replace one, write the new file beside it and rename it.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use serde::Deserialize;

use super::file::LoraFile;
use super::names::{LoraNames, listed};
use super::refusal::Refusal;
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::files::open_regular;

/// Most adapters of one request.
pub const MAX_LORAS: usize = 16;
/// Largest weight, either way.
pub const MAX_WEIGHT: f64 = 10.0;
/// Most files that are kept open; a process may often open no more than a thousand.
const MAX_KNOWN_FILES: usize = 128;
/// Ending of the files that are looked at.
const EXTENSION: &str = "safetensors";

/// What a client says of one adapter.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraOption {
    /// The file's name without `.safetensors`.
    pub name: String,
    /// 1 is what its author meant; 0 is nothing.
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

/// One adapter of a request, found and checked.
#[derive(Debug, Clone)]
pub struct LoraUse {
    /// As the client spells it.
    pub name: String,
    /// From -[`MAX_WEIGHT`] to [`MAX_WEIGHT`].
    pub weight: f64,
    /// Its file.
    pub file: Arc<LoraFile>,
}

impl PartialEq for LoraUse {
    fn eq(&self, other: &Self) -> bool {
        (&self.name, self.weight, self.file.id()) == (&other.name, other.weight, other.file.id())
    }
}

/// What makes two requests' adapters the same: files and weights, in their order. Those of weight 0 do nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct LoraKey(Vec<(u64, u64)>);

impl LoraKey {
    /// Of a request's adapters.
    pub fn of(loras: &[LoraUse]) -> Self {
        let used = loras.iter().filter(|lora| lora.weight != 0.0);
        Self(used.map(|lora| (lora.file.id(), lora.weight.to_bits())).collect())
    }

    /// Of one file, for tests of who shares a step.
    #[cfg(test)]
    pub(crate) fn of_file(id: u64) -> Self {
        Self(vec![(id, 1f64.to_bits())])
    }

    /// Whether there is nothing to add to any layer.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Bytes of device memory that these adapters take at most while a session uses them: their files' matrices, and once
/// more what is joined where several meet in one layer.
pub fn footprint_bytes(loras: &[LoraUse], placement: &Placement) -> usize {
    let used = loras.iter().filter(|lora| lora.weight != 0.0);
    let bytes: usize = used.clone().map(|lora| lora.file.device_bytes()).sum();
    if used.count() < 2 {
        return bytes;
    }
    // Files have two bytes a value at least, joined matrices have those of the compute dtype.
    bytes + bytes * placement.compute_dtype.size_in_bytes() / 2
}

/// Whether a model's requests may name adapters, and from where.
#[derive(Debug, Clone)]
pub enum LoraSupport {
    /// The family takes none.
    Unsupported,
    /// The family does, and no folder was configured.
    NoFolder,
    /// From this folder.
    Folder(Arc<LoraLibrary>),
}

impl LoraSupport {
    /// See [`footprint_bytes`].
    pub fn footprint_bytes(&self, loras: &[LoraUse]) -> usize {
        match self {
            Self::Folder(library) => footprint_bytes(loras, &library.placement),
            Self::Unsupported | Self::NoFolder => 0,
        }
    }

    /// Finds and checks a request's adapters. Errors name the field and what there is, never what the client wrote.
    pub fn resolve(&self, options: &[LoraOption]) -> Result<Vec<LoraUse>> {
        let library = match self {
            _ if options.is_empty() => return Ok(Vec::new()),
            Self::Unsupported => return Err(Error::invalid("loras", "is not supported by this model; leave it out")),
            Self::NoFolder => {
                let problem = "no folder of LoRA files is configured for this model (loras); leave it out";
                return Err(Error::invalid("loras", problem));
            }
            Self::Folder(library) => library,
        };
        if options.len() > MAX_LORAS {
            return Err(Error::invalid("loras", format!("has {}; at most {MAX_LORAS}", options.len())));
        }
        let mut uses: Vec<LoraUse> = Vec::with_capacity(options.len());
        for (i, LoraOption { name, weight }) in options.iter().enumerate() {
            // Written so that NaN fails.
            if !(-MAX_WEIGHT..=MAX_WEIGHT).contains(weight) {
                let problem = format!("is {weight}; allowed: -{MAX_WEIGHT} to {MAX_WEIGHT}");
                return Err(Error::invalid(format!("loras[{i}].weight"), problem));
            }
            if uses.iter().any(|other| other.name == *name) {
                return Err(Error::invalid(format!("loras[{i}].name"), "is named twice; add up the weights"));
            }
            let file = library.file(name).map_err(|problem| Error::invalid(format!("loras[{i}].name"), problem))?;
            uses.push(LoraUse { name: name.clone(), weight: *weight, file });
        }
        Ok(uses)
    }
}

/// The LoRA files of one model.
#[derive(Debug)]
pub struct LoraLibrary {
    folder: PathBuf,
    names: Arc<LoraNames>,
    placement: Placement,
    known: Mutex<HashMap<PathBuf, Known>>,
}

/// A file as it was when its header was read.
#[derive(Debug)]
struct Known {
    stamp: Stamp,
    file: Arc<LoraFile>,
}

/// Changes with the file's content, as far as one can tell without reading it.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    len: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(file: &File) -> std::io::Result<Self> {
        use std::os::unix::fs::MetadataExt;
        let metadata = file.metadata()?;
        let (device, inode) = (metadata.dev(), metadata.ino());
        Ok(Self { device, inode, len: metadata.len(), modified: metadata.modified().ok() })
    }
}

impl LoraLibrary {
    /// The files of `folder`, which must be there, for a model with these names.
    pub fn open(folder: &Path, names: Arc<LoraNames>, placement: &Placement) -> Result<Self> {
        std::fs::read_dir(folder).map_err(|error| Error::checkpoint(folder, format!("LoRA folder: {error}")))?;
        let (folder, placement) = (folder.to_owned(), placement.clone());
        Ok(Self { folder, names, placement, known: Mutex::default() })
    }

    /// The file of this name; the error says what is wrong with it, or which there are.
    pub fn file(&self, name: &str) -> Result<Arc<LoraFile>, String> {
        let files = self.files().map_err(|error| format!("the folder of LoRA files cannot be read: {error}"))?;
        let Some((_, path)) = files.iter().find(|(known, _)| known == name) else {
            let known: Vec<&str> = files.iter().map(|(known, _)| known.as_str()).collect();
            return Err(match known.is_empty() {
                true => "is not known; the folder of LoRA files is empty".to_owned(),
                false => format!("is not known; there are: {}", listed(&known)),
            });
        };
        let unreadable = |problem: &dyn std::fmt::Display| format!("the file of `{name}` cannot be used: {problem}");
        let file = open_regular(path).map_err(|error| unreadable(&error))?;
        let stamp = Stamp::of(&file).map_err(|error| unreadable(&error))?;
        let lock = || self.known.lock().expect("no code panics while it holds the files: this is a bug");
        if let Some(same) = lock().get(path).filter(|known| known.stamp == stamp) {
            return Ok(same.file.clone());
        }
        // Other requests need not wait for this file. Two that read it at once do so twice.
        let file = match LoraFile::read(path, file, &self.names, &self.placement) {
            Ok(file) => Arc::new(file),
            Err(Refusal::Unreadable(problem)) => return Err(unreadable(&problem)),
            Err(Refusal::Mismatch(problem)) => return Err(format!("`{name}` is not for this model: {}", problem.0)),
        };
        let mut known = lock();
        if known.len() >= MAX_KNOWN_FILES {
            known.clear();
        }
        known.insert(path.clone(), Known { stamp, file: file.clone() });
        Ok(file)
    }

    /// LoraNames and paths of the files that are there now, in order.
    fn files(&self) -> std::io::Result<Vec<(String, PathBuf)>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let is_one = path.extension().is_some_and(|extension| extension == EXTENSION) && path.is_file();
            if let Some(name) = path.file_stem().and_then(|stem| stem.to_str()).filter(|_| is_one) {
                files.push((name.to_owned(), path.clone()));
            }
        }
        files.sort_unstable();
        Ok(files)
    }
}
