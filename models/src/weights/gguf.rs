//! The header of a GGUF file: its metadata; names, types and places of its tensors. Nothing in it is believed: counts,
//! lengths, offsets and sizes are held against the file before anything is taken from them.
//!
//! Owns: the order of a header, and that its tensors lie apart (`reader` has numbers and texts, `claim` single tensors). Does not
//! know: what metadata mean.
//!
//! Source of the format: ggml `docs/gguf.md` (versions 2 and 3, little-endian). Dimensions are listed from the innermost
//! on, the other way round than everywhere else. ComfyUI-GGUF goes beyond it in two ways, which are read too: kernels of
//! three-dimensional convolutions have five dimensions (`tools/fix_5d_tensors.py`), and a tensor whose rows are no whole
//! blocks lies as rows of 256 values, its shape in the metadata (`tools/convert.py`, `get_orig_shape` of `loader.py`).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use self::claim::{Claim, MAX_DIMENSIONS, ORIGINAL_SHAPE};
use self::reader::{Checked, Reader};
use super::mapped::Located;
use super::metadata::{Metadata, MetadataValue};
use crate::error::{Error, Result};

mod claim;
mod reader;

pub(super) const MAGIC: &[u8] = b"GGUF";
const DEFAULT_ALIGNMENT: usize = 32;
/// Most tensors; the largest published files have some thousand.
pub(super) const MAX_TENSORS: usize = 1 << 20;
/// Least bytes of a metadata entry (length of its key, type, a value), and of a tensor's (length of its name, number of
/// dimensions, type, offset).
const MIN_ENTRY_BYTES: usize = 13;
const MIN_TENSOR_BYTES: usize = 24;

/// What a header says.
pub(super) struct Header {
    pub metadata: Metadata,
    pub tensors: Vec<(String, Located)>,
}

/// Reads and checks the header of the file at `path`, which is mapped as `bytes`; `file` is its position among the
/// component's files.
pub(super) fn read_header(path: &Path, bytes: &[u8], file: usize) -> Result<Header> {
    let unsound = |problem| Error::checkpoint(path, format!("is not a sound GGUF file: {problem}"));
    let mut header = read(bytes).map_err(unsound)?;
    header.tensors.iter_mut().for_each(|(_, located)| located.file = file);
    Ok(header)
}

fn read(bytes: &[u8]) -> Checked<Header> {
    let mut reader = Reader::new(bytes, MAGIC.len());
    match reader.u32()? {
        2 | 3 => {}
        version if matches!(version.swap_bytes(), 1..=3) => return Err("it is big-endian".to_owned()),
        version => return Err(format!("its version is {version}; read are 2 and 3")),
    }
    let num_tensors = reader.count(MIN_TENSOR_BYTES, "tensors")?;
    if num_tensors > MAX_TENSORS {
        return Err(format!("it claims {num_tensors} tensors; at most {MAX_TENSORS}"));
    }
    let num_entries = reader.count(MIN_ENTRY_BYTES, "metadata entries")?;
    let mut metadata = Metadata::new();
    for _ in 0..num_entries {
        let key = reader.string()?.to_owned();
        if metadata.contains_key(&key) {
            return Err(format!("its metadata has `{key}` twice"));
        }
        let value = reader.value()?;
        metadata.insert(key, value);
    }
    let alignment = metadata.get("general.alignment").and_then(MetadataValue::as_integer);
    let alignment = alignment.map_or(DEFAULT_ALIGNMENT, |bytes| usize::try_from(bytes).unwrap_or(0));
    if !alignment.is_power_of_two() || alignment < 8 {
        return Err(format!("general.alignment is {alignment}; it must be a power of two from 8 on"));
    }
    let claims: Vec<Claim<'_>> = (0..num_tensors).map(|_| Claim::read(&mut reader)).collect::<Checked<_>>()?;
    let data = reader.at().checked_next_multiple_of(alignment).ok_or("its header never ends")?;
    let original_shapes = original_shapes(&metadata)?;
    let mut tensors = Vec::with_capacity(claims.len());
    for claim in &claims {
        let (name, mut located) = claim.locate(data, alignment, bytes.len())?;
        if let Some(shape) = original_shapes.get(claim.name) {
            located.shape = claim.reshaped(shape)?;
        }
        tensors.push((name, located));
    }
    check_apart(&tensors)?;
    Ok(Header { metadata, tensors })
}

/// Shapes by the names of their tensors, outermost dimension first.
fn original_shapes(metadata: &Metadata) -> Checked<BTreeMap<&str, Vec<usize>>> {
    let mut shapes = BTreeMap::new();
    for (key, value) in metadata {
        if let Some(tensor) = key.strip_prefix(ORIGINAL_SHAPE) {
            shapes.insert(tensor, shape_of(value).map_err(|problem| format!("`{key}` {problem}"))?);
        }
    }
    Ok(shapes)
}

fn shape_of(value: &MetadataValue) -> Checked<Vec<usize>> {
    let list = value.as_list().ok_or("is no list")?;
    if list.len() > MAX_DIMENSIONS as usize {
        return Err(format!("has {} dimensions; at most {MAX_DIMENSIONS} are possible", list.len()));
    }
    let dimension = |value: &MetadataValue| {
        let dimension = value.as_integer().ok_or("is no list of whole numbers")?;
        usize::try_from(dimension).map_err(|_| "has a negative dimension".to_owned())
    };
    list.iter().map(dimension).collect()
}

/// No name twice, no byte in two tensors.
fn check_apart(tensors: &[(String, Located)]) -> Checked<()> {
    let mut names = BTreeSet::new();
    if let Some((twice, _)) = tensors.iter().find(|(name, _)| !names.insert(name)) {
        return Err(format!("tensor `{twice}` is there twice"));
    }
    let mut spans: Vec<(&Range<usize>, &str)> = tensors
        .iter()
        .map(|(name, located)| (&located.bytes, name.as_str()))
        .filter(|(span, _)| !span.is_empty())
        .collect();
    spans.sort_unstable_by_key(|(span, _)| span.start);
    match spans.windows(2).find(|pair| pair[0].0.end > pair[1].0.start) {
        Some(pair) => Err(format!("tensors `{}` and `{}` overlap", pair[0].1, pair[1].1)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
