//! Finding, mapping and checking the weight files of a folder. Nothing of a header is used before it is checked.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::Deserialize;

use super::gguf;
use super::mapped::{Files, Located};
use super::metadata::{Metadata, MetadataValue};
use super::qweights::take_blocks;
use super::scales::take_scales;
use super::stored::Stored;
use crate::config::read_json;
use crate::error::{Error, Result};
use crate::files::{self, Limit, is_present};

/// Base names of weight files, in the order in which they are looked for.
const STEMS: [&str; 2] = ["model", "diffusion_pytorch_model"];
/// Precision variants of a file name; the plain one first.
const VARIANTS: [&str; 3] = ["", ".fp16", ".bf16"];
/// Of files that are read.
const EXTENSIONS: [&str; 2] = ["safetensors", "gguf"];
/// What all names of some files of a denoiser or a VAE alone begin with.
const BEGINNINGS: [&str; 4] = ["model.diffusion_model.", "model.model.", "first_stage_model.", "vae."];
/// Files that hold the same weights as pickles.
const PICKLES: [&str; 6] = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "model.pt",
    "consolidated.00.pth",
];

/// Most files of one component; Llama 3.1 405B has 191.
const MAX_SHARDS: usize = 1 << 10;

/// Tensor name to the name of the shard that holds it, as `*.safetensors.index.json` says.
type WeightMap = BTreeMap<String, String>;

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: WeightMap,
}

/// Maps all weight files of the folder `dir`, or the file of this name, and checks their headers and their index. A file
/// alone in its folder may have any name, and be one of another layout or format: the network's maps of names say which.
pub(super) fn open(dir: &Path) -> Result<Files> {
    let (paths, index) = find(dir)?;
    let mut mapped: Vec<(PathBuf, Mmap)> = Vec::with_capacity(paths.len());
    let mut tensors = BTreeMap::new();
    for (position, path) in paths.into_iter().enumerate() {
        let mmap = files::map(&path)?;
        for (name, located) in read_tensors(&path, &mmap, position)? {
            if tensors.insert(name.clone(), located).is_some() {
                return Err(Error::checkpoint(path, format!("tensor `{name}` is in two files")));
            }
        }
        mapped.push((path, mmap));
    }
    for (tensor, shard) in index {
        let found = tensors.get(&tensor).is_some_and(|t| mapped[t.file].0.ends_with(&shard));
        if !found {
            let problem = format!("tensor `{tensor}` is missing, although the index places it here");
            return Err(Error::checkpoint(dir.join(shard), problem));
        }
    }
    take_blocks(&mapped, &mut tensors)?;
    take_scales(&mapped, &mut tensors)?;
    let is_common = |beginning: &&&str| tensors.keys().all(|name| name.starts_with(**beginning));
    let beginning = BEGINNINGS.iter().filter(|_| !tensors.is_empty()).find(is_common);
    let beginning = beginning.copied().unwrap_or_default().to_owned();
    Ok(Files { files: Arc::new(mapped), tensors, beginning, must_fit: false })
}

/// Tensors of a file of either format; `file` is its position among the component's files.
fn read_tensors(path: &Path, mmap: &Mmap, file: usize) -> Result<Vec<(String, Located)>> {
    if !mmap.starts_with(gguf::MAGIC) {
        return read_header(path, mmap, file);
    }
    Ok(gguf::read_header(path, mmap, file)?.tensors)
}

/// The weight files of a folder and, for a sharded set, its index (else empty); a file is its own.
fn find(dir: &Path) -> Result<(Vec<PathBuf>, WeightMap)> {
    if dir.is_file() {
        return Ok((vec![dir.to_path_buf()], WeightMap::new()));
    }
    for stem in STEMS {
        for variant in VARIANTS {
            let single = dir.join(format!("{stem}{variant}.safetensors"));
            if is_present(&single) {
                return Ok((vec![single], WeightMap::new()));
            }
            let index_path = dir.join(format!("{stem}.safetensors.index{variant}.json"));
            if is_present(&index_path) {
                return find_shards(dir, &index_path);
            }
        }
    }
    let pickle = PICKLES.iter().map(|name| dir.join(name)).find(|path| path.exists());
    let lone = if pickle.is_some() { Vec::new() } else { lone_files(dir)? };
    if let [file] = &lone[..] {
        return Ok((vec![file.clone()], WeightMap::new()));
    }
    match pickle {
        Some(pickle) => {
            let problem = "is a pickle, which can run code when read; only safetensors and GGUF files are read";
            Err(Error::checkpoint(pickle, problem))
        }
        None => Err(Error::checkpoint(
            dir,
            match lone.len() {
                0 => "holds no weights (model.safetensors, diffusion_pytorch_model.safetensors, an index of shards, or one \
                      .safetensors or .gguf file of another name)"
                    .to_owned(),
                several => format!("holds {several} weight files of other names than published ones; leave one of them"),
            },
        )),
    }
}

/// Files of either format in a folder, in the order of their names.
fn lone_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |error: std::io::Error| Error::checkpoint(dir, format!("cannot be read: {error}"));
    let entries = match std::fs::read_dir(dir) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        entries => entries.map_err(unreadable)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if extension.is_some_and(|extension| EXTENSIONS.contains(&extension)) && path.is_file() {
            found.push(path);
        }
    }
    found.sort_unstable();
    Ok(found)
}

fn find_shards(dir: &Path, index_path: &Path) -> Result<(Vec<PathBuf>, WeightMap)> {
    let index: ShardIndex = read_json(index_path)?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    if names.len() > MAX_SHARDS {
        let problem = format!("names {} shards; at most {MAX_SHARDS}", names.len());
        return Err(Error::checkpoint(index_path, problem));
    }
    let mut paths = Vec::with_capacity(names.len());
    for name in names {
        let path = dir.join(name);
        if Path::new(name).components().count() != 1 || name.contains("..") {
            return Err(Error::checkpoint(index_path, format!("names a shard outside its folder: `{name}`")));
        }
        if !is_present(&path) {
            return Err(Error::checkpoint(path, format!("this shard is missing; {} names it", index_path.display())));
        }
        paths.push(path);
    }
    Ok((paths, index.weight_map))
}

/// What the header of a mapped safetensors file says beside its tensors (`__metadata__`). The header has been checked.
pub(super) fn read_metadata(mmap: &[u8]) -> Metadata {
    let header = SafeTensors::read_metadata(mmap).ok();
    let metadata = header.and_then(|(_, header)| header.metadata().clone());
    metadata.unwrap_or_default().into_iter().map(|(key, text)| (key, MetadataValue::Text(text))).collect()
}

/// Tensors of a mapped file; `file` is its position among the component's files.
pub(super) fn read_header(path: &Path, mmap: &Mmap, file: usize) -> Result<Vec<(String, Located)>> {
    if let Some(problem) = header_problem(mmap) {
        return Err(Error::checkpoint(path, format!("is not a sound safetensors file: {problem}")));
    }
    // `deserialize` checks the header's length, every offset and size against the file, and that nothing overlaps.
    let header = SafeTensors::deserialize(mmap).map_err(|error| {
        let reason = explain(mmap).unwrap_or_else(|| plain_words(&error));
        Error::checkpoint(path, format!("is not a sound safetensors file: {reason}"))
    })?;
    let base = mmap.as_ptr() as usize;
    let located = |view: &TensorView| {
        let start = view.data().as_ptr() as usize - base;
        let bytes = start..start + view.data().len();
        Located { file, stored: Stored::of(view.dtype()), shape: view.shape().to_vec(), bytes }
    };
    Ok(header.iter().map(|(name, view)| (name.to_owned(), located(&view))).collect())
}

fn plain_words(error: &SafeTensorError) -> String {
    match error {
        SafeTensorError::InvalidHeaderLength => "its header length points past the end of the file".to_owned(),
        other => other.to_string(),
    }
}

/// What is wrong with a header that would take more memory than it may, whatever it says.
fn header_problem(file: &[u8]) -> Option<String> {
    Limit::HEADER.problem(header_of(file)?).map(|problem| format!("its header {problem}"))
}

/// The JSON of a header, if the file is as long as it says.
fn header_of(file: &[u8]) -> Option<&[u8]> {
    let len = u64::from_le_bytes(*file.first_chunk()?);
    file.get(8..8usize.checked_add(usize::try_from(len).ok()?)?)
}

/// What a header claims of one tensor, before anything is believed.
#[derive(Deserialize)]
struct Claim {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// Names the tensor that makes a readable header wrong, with what was found and what was expected. `None` when the
/// header cannot be read at all.
fn explain(file: &[u8]) -> Option<String> {
    let header = header_of(file)?;
    let claims: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header).ok()?;
    let mut spans = Vec::with_capacity(claims.len());
    for (name, claim) in claims.into_iter().filter(|(name, _)| name != "__metadata__") {
        let claim: Claim = serde_json::from_value(claim).ok()?;
        let (start, end) = claim.data_offsets;
        let elements = claim.shape.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim))?;
        let needed = elements.checked_mul(claim.dtype.bitsize())? / 8;
        if end.checked_sub(start) != Some(needed) {
            return Some(format!(
                "tensor `{name}` of shape {:?} and dtype {:?} needs {needed} bytes, its offsets give {}",
                claim.shape,
                claim.dtype,
                end as i128 - start as i128
            ));
        }
        spans.push((start, end, name));
    }
    spans.sort_unstable();
    let mut covered = 0;
    for (start, end, name) in spans {
        if start != covered {
            return Some(format!("tensor `{name}` starts at byte {start}, the one before it ends at {covered}"));
        }
        covered = end;
    }
    let data_len = file.len() - 8 - header.len();
    (covered != data_len).then(|| format!("its tensors end at byte {covered}, the file has {data_len} bytes for them"))
}
