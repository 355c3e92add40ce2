//! Tensors of a checkpoint component by name: memory-mapped safetensors files, checked before use, copied once.
//!
//! Owns: finding single and sharded files, header checks, dtype conversion, and the record of which tensors were used.
//! Does not know: any architecture. A *dry* view answers every request with a tensor that takes no memory and records
//! what is missing, so that `tale inspect` runs the very code that loads.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Tensor};
use half::{bf16, f16};
use memmap2::{Mmap, UncheckedAdvice};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::config::read_json;
use crate::device::Placement;
use crate::error::{Error, Result};

/// Base names of weight files, in the order in which they are looked for.
const STEMS: [&str; 2] = ["model", "diffusion_pytorch_model"];
/// Precision variants of a file name; the plain one first.
const VARIANTS: [&str; 3] = ["", ".fp16", ".bf16"];

/// A view of a component's tensors under a name prefix. Cheap to clone.
#[derive(Clone)]
pub struct Weights {
    source: Arc<Source>,
    prefix: String,
}

struct Source {
    root: PathBuf,
    files: Vec<(PathBuf, Mmap)>,
    tensors: BTreeMap<String, Located>,
    placement: Placement,
    dry: bool,
    record: Mutex<Record>,
}

struct Located {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

#[derive(Default)]
struct Record {
    used: BTreeSet<String>,
    problems: Vec<Error>,
    resident_bytes: usize,
}

/// What loading a component used, and what it would have needed.
#[derive(Debug)]
pub struct WeightsReport {
    /// Elements of all tensors in the files.
    pub num_parameters: usize,
    /// Elements by published dtype.
    pub dtypes: BTreeMap<String, usize>,
    /// Bytes that the used tensors take once loaded.
    pub resident_bytes: usize,
    /// Missing tensors and wrong shapes.
    pub problems: Vec<Error>,
    /// Tensors in the files that the architecture did not ask for.
    pub unused: Vec<String>,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Weights").field("root", &self.source.root).field("prefix", &self.prefix).finish()
    }
}

impl Weights {
    /// Maps all weight files of the folder `dir` and checks their headers.
    ///
    /// Errors name the file: no safetensors file at all (pickles are refused), a shard that the index names and the
    /// folder lacks, a header that is truncated or lies about sizes and offsets, a tensor that the index places in a
    /// shard that does not hold it.
    pub fn open(dir: &Path, placement: &Placement) -> Result<Self> {
        Self::open_as(dir, placement, false)
    }

    /// As [`Weights::open`], but tensors take no memory and missing ones are recorded instead of failing.
    pub fn open_dry(dir: &Path, placement: &Placement) -> Result<Self> {
        Self::open_as(dir, placement, true)
    }

    fn open_as(dir: &Path, placement: &Placement, dry: bool) -> Result<Self> {
        let (paths, index) = find_files(dir)?;
        let mut files = Vec::with_capacity(paths.len());
        let mut tensors = BTreeMap::new();
        for (position, path) in paths.into_iter().enumerate() {
            let mmap = map_file(&path)?;
            for (name, located) in read_header(&path, &mmap, position)? {
                if tensors.insert(name.clone(), located).is_some() {
                    return Err(Error::checkpoint(path, format!("tensor `{name}` is in two files")));
                }
            }
            files.push((path, mmap));
        }
        for (tensor, shard) in index {
            let found = tensors.get(&tensor).is_some_and(|t| files[t.file].0.ends_with(&shard));
            if !found {
                return Err(Error::MissingTensor { path: dir.join(shard), tensor });
            }
        }
        let source = Source {
            root: dir.to_path_buf(),
            files,
            tensors,
            placement: placement.clone(),
            dry,
            record: Mutex::new(Record::default()),
        };
        Ok(Self { source: Arc::new(source), prefix: String::new() })
    }

    /// The view one level down: names get `prefix.segment.` in front.
    pub fn pp(&self, segment: impl std::fmt::Display) -> Self {
        Self { source: self.source.clone(), prefix: format!("{}{segment}.", self.prefix) }
    }

    /// Where the tensors will live and in which dtypes.
    pub fn placement(&self) -> &Placement {
        &self.source.placement
    }

    /// Whether the files hold a tensor of this name under the prefix.
    pub fn contains(&self, name: &str) -> bool {
        self.source.tensors.contains_key(&self.full_name(name))
    }

    /// Whether the files hold any tensor below `segment.`.
    pub fn contains_below(&self, segment: &str) -> bool {
        let below = format!("{}{segment}.", self.prefix);
        self.source.tensors.range(below.clone()..).next().is_some_and(|(name, _)| name.starts_with(&below))
    }

    /// A vector, norm weight, bias, convolution kernel or table, in the compute dtype.
    pub fn get(&self, shape: &[usize], name: &str) -> Result<Tensor> {
        self.load(shape, name, |placement, _| placement.compute_dtype)
    }

    /// A weight matrix in the dtype in which [`Placement`] keeps matrices.
    pub fn matrix(&self, rows: usize, cols: usize, name: &str) -> Result<Tensor> {
        self.load(&[rows, cols], name, Placement::matrix_dtype)
    }

    /// Marks a tensor as known and deliberately not loaded, so that it is not reported as unused.
    pub fn ignore(&self, name: &str) {
        self.record().used.insert(self.full_name(name));
    }

    /// What was used so far, and what is left over.
    pub fn report(&self) -> WeightsReport {
        let source = &self.source;
        let mut record = self.record();
        let mut dtypes = BTreeMap::new();
        for tensor in source.tensors.values() {
            *dtypes.entry(format!("{:?}", tensor.dtype)).or_insert(0) += tensor.shape.iter().product::<usize>();
        }
        WeightsReport {
            num_parameters: dtypes.values().sum(),
            dtypes,
            resident_bytes: record.resident_bytes,
            problems: std::mem::take(&mut record.problems),
            unused: source.tensors.keys().filter(|name| !record.used.contains(*name)).cloned().collect(),
        }
    }

    fn load(&self, shape: &[usize], name: &str, dtype: impl Fn(&Placement, DType) -> DType) -> Result<Tensor> {
        let full_name = self.full_name(name);
        let source = &*self.source;
        match source.checked(&full_name, shape) {
            Ok(located) => {
                let dtype = dtype(&source.placement, candle_dtype(located.dtype));
                self.note_use(&full_name, shape, dtype);
                if source.dry { source.placeholder(shape, dtype) } else { source.read(located, &full_name, dtype) }
            }
            Err(problem) if source.dry => {
                self.record().problems.push(problem);
                self.record().used.insert(full_name);
                source.placeholder(shape, dtype(&source.placement, DType::F32))
            }
            Err(problem) => Err(problem),
        }
    }

    fn note_use(&self, full_name: &str, shape: &[usize], dtype: DType) {
        let mut record = self.record();
        if record.used.insert(full_name.to_owned()) {
            record.resident_bytes += shape.iter().product::<usize>() * dtype.size_in_bytes();
        }
    }

    fn record(&self) -> std::sync::MutexGuard<'_, Record> {
        self.source.record.lock().expect("no code panics while it holds the record: this is a bug")
    }

    fn full_name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

impl Source {
    fn checked(&self, name: &str, shape: &[usize]) -> Result<&Located> {
        let located = self
            .tensors
            .get(name)
            .ok_or_else(|| Error::MissingTensor { path: self.root.clone(), tensor: name.to_owned() })?;
        let path = &self.files[located.file].0;
        if located.shape != shape {
            return Err(Error::TensorShape {
                path: path.clone(),
                tensor: name.to_owned(),
                found: located.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        if !matches!(located.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            let problem = format!("tensor `{name}` has dtype {:?}; read are F32, F16 and BF16", located.dtype);
            return Err(Error::checkpoint(path, problem));
        }
        Ok(located)
    }

    /// Copies the tensor out of the map, then lets the kernel drop the pages, so that the peak stays near the weights.
    fn read(&self, located: &Located, name: &str, dtype: DType) -> Result<Tensor> {
        let (path, mmap) = &self.files[located.file];
        let bytes = &mmap[located.bytes.clone()];
        let device = &self.placement.device;
        let shape = located.shape.as_slice();
        let tensor = match dtype {
            DType::F32 => Tensor::from_vec(to_f32(located.dtype, bytes), shape, device)?,
            DType::BF16 => Tensor::from_vec(to_bf16(located.dtype, bytes), shape, device)?,
            DType::F16 => Tensor::from_vec(to_f16(located.dtype, bytes), shape, device)?,
            other => return Err(Error::checkpoint(path, format!("tensor `{name}` cannot be kept as {other:?}"))),
        };
        // SAFETY: the map is private, read-only and file-backed; dropped pages are read again from the file if touched.
        let advised =
            unsafe { mmap.unchecked_advise_range(UncheckedAdvice::DontNeed, located.bytes.start, located.bytes.len()) };
        if let Err(error) = advised {
            tracing::debug!(path = %path.display(), %error, "the kernel keeps the pages of a loaded tensor");
        }
        Ok(tensor)
    }

    fn placeholder(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        Ok(Tensor::zeros((), dtype, &self.placement.device)?.broadcast_as(shape)?)
    }
}

/// The weight files of a folder and, for a sharded set, which tensor lies in which of them.
fn find_files(dir: &Path) -> Result<(Vec<PathBuf>, BTreeMap<String, String>)> {
    for stem in STEMS {
        for variant in VARIANTS {
            let single = dir.join(format!("{stem}{variant}.safetensors"));
            if single.exists() {
                return Ok((vec![single], BTreeMap::new()));
            }
            let index_path = dir.join(format!("{stem}.safetensors.index{variant}.json"));
            if index_path.exists() {
                return find_shards(dir, &index_path);
            }
        }
    }
    let pickles = ["pytorch_model.bin", "diffusion_pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt"];
    match pickles.iter().map(|name| dir.join(name)).find(|path| path.exists()) {
        Some(pickle) => {
            Err(Error::checkpoint(pickle, "is a pickle, which can run code when read; only safetensors files are read"))
        }
        None => Err(Error::checkpoint(
            dir,
            "holds no safetensors file (model.safetensors, diffusion_pytorch_model.safetensors or an index of shards)",
        )),
    }
}

fn find_shards(dir: &Path, index_path: &Path) -> Result<(Vec<PathBuf>, BTreeMap<String, String>)> {
    let index: ShardIndex = read_json(index_path)?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    let mut paths = Vec::with_capacity(names.len());
    for name in names {
        let path = dir.join(name);
        if Path::new(name).components().count() != 1 || name.contains("..") {
            return Err(Error::checkpoint(index_path, format!("names a shard outside its folder: `{name}`")));
        }
        if !path.exists() {
            return Err(Error::checkpoint(path, format!("this shard is missing; {} names it", index_path.display())));
        }
        paths.push(path);
    }
    Ok((paths, index.weight_map))
}

fn map_file(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|e| Error::checkpoint(path, e))?;
    // SAFETY: checkpoints are immutable while they are served; the map is dropped once the weights are copied.
    unsafe { Mmap::map(&file) }.map_err(|e| Error::checkpoint(path, e))
}

fn read_header(path: &Path, mmap: &Mmap, file: usize) -> Result<Vec<(String, Located)>> {
    // `deserialize` checks the header's length, every offset and size against the file, and that nothing overlaps.
    let header = SafeTensors::deserialize(mmap).map_err(|e| {
        Error::checkpoint(path, format!("is not a sound safetensors file: {e} (file of {} bytes)", mmap.len()))
    })?;
    let base = mmap.as_ptr() as usize;
    let located = |view: &safetensors::tensor::TensorView| {
        let start = view.data().as_ptr() as usize - base;
        Located { file, dtype: view.dtype(), shape: view.shape().to_vec(), bytes: start..start + view.data().len() }
    };
    Ok(header.iter().map(|(name, view)| (name.to_owned(), located(&view))).collect())
}

fn candle_dtype(dtype: Dtype) -> DType {
    match dtype {
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        _ => DType::F32,
    }
}

fn to_f32(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F16 => halves(bytes).map(|b| f16::from_bits(b).to_f32()).collect(),
        Dtype::BF16 => halves(bytes).map(|b| bf16::from_bits(b).to_f32()).collect(),
        _ => floats(bytes).collect(),
    }
}

fn to_bf16(dtype: Dtype, bytes: &[u8]) -> Vec<bf16> {
    match dtype {
        Dtype::BF16 => halves(bytes).map(bf16::from_bits).collect(),
        _ => to_f32_iter(dtype, bytes).map(bf16::from_f32).collect(),
    }
}

fn to_f16(dtype: Dtype, bytes: &[u8]) -> Vec<f16> {
    match dtype {
        Dtype::F16 => halves(bytes).map(f16::from_bits).collect(),
        _ => to_f32_iter(dtype, bytes).map(f16::from_f32).collect(),
    }
}

fn to_f32_iter(dtype: Dtype, bytes: &[u8]) -> Box<dyn Iterator<Item = f32> + '_> {
    match dtype {
        Dtype::F16 => Box::new(halves(bytes).map(|b| f16::from_bits(b).to_f32())),
        Dtype::BF16 => Box::new(halves(bytes).map(|b| bf16::from_bits(b).to_f32())),
        _ => Box::new(floats(bytes)),
    }
}

fn halves(bytes: &[u8]) -> impl Iterator<Item = u16> + '_ {
    bytes.as_chunks().0.iter().map(|b| u16::from_le_bytes(*b))
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))
}
