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
use super::source::{Origin, Source};
use super::split::Split;
use super::{Weights, files, gguf};
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::files::is_present;

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
    /// Maps the file and checks its header. What kind of file it is is told by its content. Of a GGUF file that is the first
    /// of several parts the others are opened too.
    pub fn open(path: &Path) -> Result<Self> {
        let mut parts = vec![Part::open(path, 0)?];
        let split = match parts[0].format {
            Format::Gguf => Split::of(path, &parts[0].metadata)?,
            Format::Safetensors => None,
        };
        let others = split.map_or(Ok(Vec::new()), |split| split.others(path))?;
        for (number, other) in (1..).zip(&others) {
            if !is_present(other) {
                let problem =
                    format!("this part is missing; {} says that there are {}", path.display(), others.len() + 1);
                return Err(Error::checkpoint(other, problem));
            }
            parts.push(Part::open(other, number)?);
            split.map_or(Ok(()), |split| split.check_part(number, other, &parts[number].metadata))?;
        }
        let whole = Self::of_parts(path, parts)?;
        split.map_or(Ok(()), |split| split.check_whole(path, &whole.tensors))?;
        Ok(whole)
    }

    fn of_parts(path: &Path, parts: Vec<Part>) -> Result<Self> {
        let mut metadata = None;
        let mut format = Format::Safetensors;
        let mut files = Vec::with_capacity(parts.len());
        let mut tensors = BTreeMap::new();
        for part in parts {
            for (name, located) in part.tensors {
                if tensors.contains_key(&name) {
                    return Err(Error::checkpoint(part.path, format!("tensor `{name}` is in a part before it too")));
                }
                tensors.insert(name, located);
            }
            files.push((part.path, part.mmap));
            // The first part says what the whole is.
            if metadata.is_none() {
                (metadata, format) = (Some(part.metadata), part.format);
            }
        }
        take_blocks(&files, &mut tensors)?;
        take_scales(&files, &mut tensors)?;
        Ok(Self {
            path: path.to_owned(),
            files: Arc::new(files),
            tensors: Arc::new(tensors),
            format,
            metadata: Arc::new(metadata.unwrap_or_default()),
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

    /// All that the header says beside its tensors.
    pub fn all_metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Whether it holds a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Shape of a tensor, outermost dimension first, if it holds it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|located| located.shape.as_slice())
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

/// One file, mapped and checked.
struct Part {
    path: PathBuf,
    mmap: Mmap,
    format: Format,
    tensors: Vec<(String, Located)>,
    metadata: Metadata,
}

impl Part {
    /// `number` is its place among the files of the whole.
    fn open(path: &Path, number: usize) -> Result<Self> {
        let mmap = crate::files::map(path)?;
        let (format, tensors, metadata) = if mmap.starts_with(gguf::MAGIC) {
            let header = gguf::read_header(path, &mmap, number)?;
            (Format::Gguf, header.tensors, header.metadata)
        } else if looks_like_safetensors(&mmap) {
            (Format::Safetensors, files::read_header(path, &mmap, number)?, files::read_metadata(&mmap))
        } else if looks_like_pickle(&mmap) {
            let problem =
                "is a pickle (.ckpt, .pt, .bin), which can run code when read; only safetensors and GGUF files are";
            return Err(Error::checkpoint(path, problem));
        } else {
            return Err(Error::checkpoint(path, "is not a checkpoint: neither a safetensors nor a GGUF file"));
        };
        Ok(Self { path: path.to_owned(), mmap, format, tensors, metadata })
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
