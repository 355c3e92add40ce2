//! One file that holds a network or several: opened once, and given away component by component.
//!
//! Owns: what kind of file it is, its checked header, the part of each component. Does not know: which components there
//! are; `single_file.rs` recognises them by their names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::mapped::{Files, Located};
use super::metadata::{Metadata, MetadataValue};
use super::qweights::take_blocks;
use super::scales::take_scales;
use super::{Origin, Source, Weights, files, gguf};
use crate::device::Placement;
use crate::error::{Error, Result};

/// A safetensors or GGUF file, mapped and checked. Cheap to clone.
#[derive(Clone)]
pub struct WeightFile {
    path: PathBuf,
    files: Arc<Vec<(PathBuf, Mmap)>>,
    tensors: Arc<BTreeMap<String, Located>>,
    format: Format,
    metadata: Arc<Metadata>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Safetensors,
    Gguf,
}

/// Which tensors of a file are a component's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartOfFile {
    /// What their names begin with.
    pub beginning: String,
    /// Whether every one of them must have its place in the network.
    pub must_fit: bool,
}

impl std::fmt::Debug for WeightFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WeightFile").field("path", &self.path).finish_non_exhaustive()
    }
}

impl WeightFile {
    /// Maps the file and checks its header. What kind of file it is is told by its content.
    pub fn open(path: &Path) -> Result<Self> {
        let mmap = crate::files::map(path)?;
        let (format, tensors, metadata) = if mmap.starts_with(gguf::MAGIC) {
            let header = gguf::read_header(path, &mmap)?;
            (Format::Gguf, header.tensors, header.metadata)
        } else if looks_like_safetensors(&mmap) {
            (Format::Safetensors, files::read_header(path, &mmap, 0)?, files::read_metadata(&mmap))
        } else if looks_like_pickle(&mmap) {
            let problem =
                "is a pickle (.ckpt, .pt, .bin), which can run code when read; only safetensors and GGUF files are";
            return Err(Error::checkpoint(path, problem));
        } else {
            return Err(Error::checkpoint(path, "is not a checkpoint: neither a safetensors nor a GGUF file"));
        };
        let files = vec![(path.to_owned(), mmap)];
        let mut tensors = tensors.into_iter().collect();
        take_blocks(&files, &mut tensors)?;
        take_scales(&files, &mut tensors)?;
        Ok(Self {
            path: path.to_owned(),
            files: Arc::new(files),
            tensors: Arc::new(tensors),
            format,
            metadata: Arc::new(metadata),
        })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `general.architecture` of a GGUF file.
    pub fn architecture(&self) -> Option<&str> {
        let is_gguf = self.format == Format::Gguf;
        self.metadata.get("general.architecture").filter(|_| is_gguf).and_then(MetadataValue::as_text)
    }

    /// What the header says under this key, of a safetensors file in its `__metadata__`.
    pub fn metadata(&self, key: &str) -> Option<&MetadataValue> {
        self.metadata.get(key)
    }

    /// Whether it holds a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names of all tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether the name of any tensor begins so.
    pub fn contains_below(&self, beginning: &str) -> bool {
        let next = self.tensors.range(beginning.to_owned()..).next();
        next.is_some_and(|(name, _)| name.starts_with(beginning))
    }

    /// The weights of one component: the tensors that `belongs` says are its own.
    pub fn weights(
        &self,
        part: &PartOfFile,
        belongs: impl Fn(&str) -> bool,
        placement: &Placement,
        dry: bool,
    ) -> Weights {
        let mine = self.tensors.iter().filter(|(name, _)| belongs(name));
        let files = Files {
            files: self.files.clone(),
            tensors: mine.map(|(name, located)| (name.clone(), located.clone())).collect(),
            beginning: part.beginning.clone(),
            must_fit: part.must_fit,
        };
        Weights::over(Source::new(&self.path, Origin::Files(files), dry), placement)
    }
}

/// Eight bytes of length, then JSON. Whether the length is right is for the reader of the header to say.
fn looks_like_safetensors(bytes: &[u8]) -> bool {
    bytes.get(8) == Some(&b'{')
}

/// What `torch.save` writes: a zip archive, or a bare pickle of one of the protocols that are in use.
fn looks_like_pickle(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04") || matches!(bytes, [0x80, 2..=5, ..])
}
