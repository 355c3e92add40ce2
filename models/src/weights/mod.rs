//! Tensors of a checkpoint component by name: memory-mapped files, checked before use, copied once.
//!
//! Owns: the view by name, dtype conversion, and the record of which tensors were used (`files` finds and checks
//! safetensors files, `gguf` checks GGUF files, `single` gives components of a file that holds several, `dummy` makes
//! random tensors where there are no files). Does not know: any architecture. A *dry* view answers every request with a
//! tensor that takes no memory and records what is missing, so that `tale inspect` runs the very code that loads.
//!
//! A network asks for tensors by diffusers' names. Where a file has those of the original implementation, a map
//! (`names`) says where in the file a tensor lies, which may be some rows of one that is larger.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use memmap2::{Mmap, UncheckedAdvice};
use safetensors::Dtype;
use tale_kernels::QuantisedMatrix;

use self::names::{Names, Part, Place};
use self::stored::Stored;
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::lora::{LayerShape, Sites, Slot};

mod dummy;
mod files;
mod gguf;
pub mod names;
pub mod single;
mod stored;

/// Bytes of a tensor that are converted at a time; whole elements of every dtype.
const PIECE_BYTES: usize = 4 << 20;

/// A view of a component's tensors under a name prefix. Cheap to clone.
#[derive(Clone)]
pub struct Weights {
    source: Arc<Source>,
    placement: Placement,
    prefix: String,
    /// Where tensors lie, if the files do not have the network's names.
    names: Option<Arc<dyn Names>>,
    /// Where layers note that they take adapters, if they do.
    sites: Option<Arc<Sites>>,
}

struct Source {
    root: PathBuf,
    origin: Origin,
    dry: bool,
    record: Mutex<Record>,
}

/// A weight matrix as it is kept.
#[derive(Debug, Clone)]
pub enum Matrix {
    /// One number per value, `[rows, columns]`.
    Dense(Tensor),
    /// Blocks of a row's values.
    Quantised(QuantisedMatrix),
}

/// Where tensors come from.
enum Origin {
    Files(Files),
    /// Random values: whatever is asked for is there, as if published in this dtype.
    Dummy(DType),
}

/// The weight files of a folder, or a component's part of a single file.
struct Files {
    files: Arc<Vec<(PathBuf, Mmap)>>,
    tensors: BTreeMap<String, Located>,
    /// What all names of the component begin with.
    beginning: String,
    /// Whether the names are those of the original implementation.
    are_original: bool,
    /// Whether every tensor below `beginning` must have its place in the network.
    must_fit: bool,
}

#[derive(Clone)]
struct Located {
    file: usize,
    stored: Stored,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// Values of a file's tensor that are a tensor of the network: pieces of the file one after the other.
struct Slice {
    file: usize,
    stored: Stored,
    pieces: Vec<Range<usize>>,
}

#[derive(Default)]
struct Record {
    /// By the network's names.
    loaded: BTreeSet<String>,
    /// By the names in the files.
    used: BTreeSet<String>,
    problems: Vec<Error>,
    /// Elements of the used tensors.
    used_elements: usize,
    resident_bytes: usize,
    /// Of these, bytes of tables.
    table_bytes: usize,
    /// Most bytes that a product with one of the matrices takes for a moment.
    dequantised_bytes: usize,
}

/// What loading a component used, and what it would have needed.
#[derive(Debug)]
pub struct WeightsReport {
    /// Elements of all tensors in the files; of dummy weights, of all that were asked for.
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

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Weights").field("root", &self.source.root).field("prefix", &self.prefix).finish()
    }
}

impl Weights {
    /// Maps all weight files of the folder `dir`, or the file of this name, and checks their headers.
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

    /// Random weights for the folder `dir`, of which only the configuration is read: every tensor that is asked for is
    /// made where it will live.
    pub fn dummy(dir: &Path, placement: &Placement) -> Result<Self> {
        Self::dummy_as(dir, placement, false)
    }

    /// As [`Weights::dummy`], but tensors take no memory.
    pub fn dummy_dry(dir: &Path, placement: &Placement) -> Result<Self> {
        Self::dummy_as(dir, placement, true)
    }

    fn dummy_as(dir: &Path, placement: &Placement, dry: bool) -> Result<Self> {
        Ok(Self::over(Source::new(dir, Origin::Dummy(dummy::published_dtype(dir)?), dry), placement))
    }

    fn open_as(dir: &Path, placement: &Placement, dry: bool) -> Result<Self> {
        let (paths, index) = files::find(dir)?;
        let mut files: Vec<(PathBuf, Mmap)> = Vec::with_capacity(paths.len());
        let mut tensors = BTreeMap::new();
        for (position, path) in paths.into_iter().enumerate() {
            let mmap = files::map(&path)?;
            for (name, located) in files::read_header(&path, &mmap, position)? {
                if tensors.insert(name.clone(), located).is_some() {
                    return Err(Error::checkpoint(path, format!("tensor `{name}` is in two files")));
                }
            }
            files.push((path, mmap));
        }
        for (tensor, shard) in index {
            let found = tensors.get(&tensor).is_some_and(|t| files[t.file].0.ends_with(&shard));
            if !found {
                let problem = format!("tensor `{tensor}` is missing, although the index places it here");
                return Err(Error::checkpoint(dir.join(shard), problem));
            }
        }
        let files =
            Files { files: Arc::new(files), tensors, beginning: String::new(), are_original: false, must_fit: false };
        Ok(Self::over(Source::new(dir, Origin::Files(files), dry), placement))
    }

    fn over(source: Source, placement: &Placement) -> Self {
        let (source, placement) = (Arc::new(source), placement.clone());
        Self { source, placement, prefix: String::new(), names: None, sites: None }
    }

    /// The same view with the names that the network's tensors have in the original implementation, if it is that
    /// whose names the files have. Called before any [`Weights::pp`].
    pub fn or_original<N: Names + 'static>(self, names: impl FnOnce() -> N) -> Self {
        match &self.source.origin {
            Origin::Files(files) if files.are_original => Self { names: Some(Arc::new(names())), ..self },
            _ => self,
        }
    }

    /// The view one level down: names get `prefix.segment.` in front.
    pub fn pp(&self, segment: impl std::fmt::Display) -> Self {
        Self { prefix: format!("{}{segment}.", self.prefix), ..self.clone() }
    }

    /// The same view for a network that computes in another dtype.
    pub fn computing_in(&self, dtype: DType) -> Self {
        Self { placement: self.placement.computing_in(dtype), ..self.clone() }
    }

    /// The same view for a network whose layers take adapters: they enter themselves in `sites` as they load.
    pub fn noting(&self, sites: &Arc<Sites>) -> Self {
        Self { sites: Some(sites.clone()), ..self.clone() }
    }

    /// The place for adapters of the layer that has this view's name, where the network takes any.
    pub fn slot(&self, shape: LayerShape) -> Option<Arc<Slot>> {
        let layer = self.prefix.strip_suffix('.').unwrap_or(&self.prefix);
        self.sites.as_ref().map(|sites| sites.enter(layer, shape))
    }

    /// Where the tensors will live and in which dtypes.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Whether the files hold a tensor of this name under the prefix.
    pub fn contains(&self, name: &str) -> bool {
        self.source.published().contains_key(&self.place(&self.full_name(name)).name)
    }

    /// Whether the files hold any tensor below `segment.`.
    pub fn contains_below(&self, segment: &str) -> bool {
        let Some(below) = self.below(segment) else { return false };
        self.source.published().range(below.clone()..).next().is_some_and(|(name, _)| name.starts_with(&below))
    }

    /// Number of dimensions of a tensor, if the files hold it.
    pub fn rank(&self, name: &str) -> Option<usize> {
        self.source.published().get(&self.place(&self.full_name(name)).name).map(|located| located.shape.len())
    }

    /// Shape of a tensor, if the files hold it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.source.published().get(&self.place(&self.full_name(name)).name).map(|located| located.shape.as_slice())
    }

    /// A vector, norm weight, bias, convolution kernel or table, in the compute dtype.
    pub fn get(&self, shape: &[usize], name: &str) -> Result<Tensor> {
        self.load(shape, name, |placement, _| placement.compute_dtype)
    }

    /// A weight matrix in the dtype in which [`Placement`] keeps matrices.
    pub fn matrix(&self, rows: usize, cols: usize, name: &str) -> Result<Tensor> {
        self.load(&[rows, cols], name, Placement::matrix_dtype)
    }

    /// A weight matrix that is only multiplied with: as [`Weights::matrix`], but quantised where the file's is.
    pub fn projection(&self, rows: usize, cols: usize, name: &str) -> Result<Matrix> {
        let full_name = self.full_name(name);
        let place = self.place(&full_name);
        let Ok(Found::InFiles(files, slice)) = self.source.find(&place, &[rows, cols]) else {
            return self.matrix(rows, cols, name).map(Matrix::Dense);
        };
        let Stored::Blocks(dtype) = slice.stored else { return self.matrix(rows, cols, name).map(Matrix::Dense) };
        self.note_use(&full_name, &place.name, rows.saturating_mul(cols), slice.len());
        let dequantised = self.placement.dequantised_bytes(rows.saturating_mul(cols));
        let most = self.record().dequantised_bytes.max(dequantised);
        self.record().dequantised_bytes = most;
        let device = &self.placement.device;
        if self.source.dry {
            return placeholder(&[rows, cols], self.placement.compute_dtype, device).map(Matrix::Dense);
        }
        let matrix = QuantisedMatrix::new(&files.blocks(&slice), dtype, (rows, cols), device)?;
        files.drop_pages(&slice);
        Ok(Matrix::Quantised(matrix))
    }

    /// As [`Weights::matrix`], for a table of which a pass reads the rows that it looks up and no others.
    pub fn table(&self, rows: usize, cols: usize, name: &str) -> Result<Tensor> {
        let before = self.record().resident_bytes;
        let table = self.matrix(rows, cols, name)?;
        let mut record = self.record();
        record.table_bytes += record.resident_bytes - before;
        Ok(table)
    }

    /// Marks a tensor as known and deliberately not loaded, so that it is not reported as unused.
    pub fn ignore(&self, name: &str) {
        self.record().used.insert(self.place(&self.full_name(name)).name);
    }

    /// As [`Weights::ignore`], for all tensors below `segment.`.
    pub fn ignore_below(&self, segment: &str) {
        let Some(below) = self.below(segment) else { return };
        let names = self.source.published().range(below.clone()..).map(|(name, _)| name);
        self.record().used.extend(names.take_while(|name| name.starts_with(&below)).cloned());
    }

    /// What was used so far, and what is left over.
    pub fn report(&self) -> WeightsReport {
        let source = &self.source;
        let mut record = self.record();
        let mut dtypes = BTreeMap::new();
        for tensor in source.published().values() {
            *dtypes.entry(tensor.stored.to_string()).or_insert(0) += elements(&tensor.shape);
        }
        if let Origin::Dummy(dtype) = source.origin {
            dtypes.insert(format!("{dtype:?}"), record.used_elements);
        }
        WeightsReport {
            num_parameters: dtypes.values().sum(),
            dtypes,
            resident_bytes: record.resident_bytes,
            problems: std::mem::take(&mut record.problems),
            unused: source.published().keys().filter(|name| !record.used.contains(*name)).cloned().collect(),
        }
    }

    /// Bytes of the tensors loaded so far that every pass over the network reads: all but tables.
    pub fn streamed_bytes(&self) -> usize {
        let record = self.record();
        record.resident_bytes - record.table_bytes
    }

    /// The tensors of the files, all below the component's beginning, that have no place in the network; an error where
    /// all must have one.
    pub fn check_fit(&self, config: &Path) -> Result<()> {
        let Origin::Files(files) = &self.source.origin else { return Ok(()) };
        let record = self.record();
        let is_left = |name: &&String| name.starts_with(&files.beginning) && !record.used.contains(*name);
        let left: Vec<&String> = files.tensors.keys().filter(is_left).collect();
        match left.first() {
            Some(first) if files.must_fit => Err(Error::checkpoint(
                &self.source.root,
                format!(
                    "has {} tensors, such as `{first}`, that the network of {} has not: another base is needed",
                    left.len(),
                    config.display()
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Most bytes that a product with one of the quantised matrices takes for a moment beside weights and activations.
    pub fn dequantised_bytes(&self) -> usize {
        self.record().dequantised_bytes
    }

    fn load(&self, shape: &[usize], name: &str, dtype: impl Fn(&Placement, DType) -> DType) -> Result<Tensor> {
        let full_name = self.full_name(name);
        let place = self.place(&full_name);
        let (source, placement) = (&*self.source, &self.placement);
        let found = match source.find(&place, shape) {
            Ok(found) => found,
            Err(problem) if source.dry => {
                // Other parts of the same tensor have the same problem.
                let mut record = self.record();
                if record.used.insert(place.name) {
                    record.problems.push(problem);
                }
                return placeholder(shape, dtype(placement, DType::F32), &placement.device);
            }
            Err(problem) => return Err(problem),
        };
        let dtype = dtype(placement, found.published_dtype());
        let elements = elements(shape);
        self.note_use(&full_name, &place.name, elements, elements.saturating_mul(dtype.size_in_bytes()));
        match found {
            _ if source.dry => placeholder(shape, dtype, &placement.device),
            Found::InFiles(files, slice) => files.read(&slice, shape, dtype, &placement.device),
            Found::Dummy(_) => dummy::tensor(&full_name, shape, dtype, &placement.device),
        }
    }

    fn note_use(&self, full_name: &str, name_in_files: &str, elements: usize, bytes: usize) {
        let mut record = self.record();
        record.used.insert(name_in_files.to_owned());
        if record.loaded.insert(full_name.to_owned()) {
            record.used_elements = record.used_elements.saturating_add(elements);
            record.resident_bytes = record.resident_bytes.saturating_add(bytes);
        }
    }

    fn record(&self) -> std::sync::MutexGuard<'_, Record> {
        self.source.record.lock().expect("no code panics while it holds the record: this is a bug")
    }

    fn full_name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Where the tensor lies that the network calls `full_name`.
    fn place(&self, full_name: &str) -> Place {
        let beginning = self.source.beginning();
        let place = self.names.as_ref().and_then(|names| names.place(full_name));
        let Place { name, part } = place.unwrap_or_else(|| Place::whole(full_name));
        Place { name: format!("{beginning}{name}"), part }
    }

    /// What the names in the files begin with of all tensors below `segment.`.
    fn below(&self, segment: &str) -> Option<String> {
        let below = format!("{}{segment}.", self.prefix);
        let below = match &self.names {
            Some(names) => names.below(&below)?,
            None => below,
        };
        Some(format!("{}{below}", self.source.beginning()))
    }
}

/// A tensor that was asked for.
enum Found<'a> {
    /// It lies in a file, in the shape that was asked for.
    InFiles(&'a Files, Slice),
    /// It is made up, as if published in this dtype.
    Dummy(DType),
}

impl Found<'_> {
    fn published_dtype(&self) -> DType {
        match self {
            Self::InFiles(_, slice) => slice.stored.dtype(),
            Self::Dummy(dtype) => *dtype,
        }
    }
}

impl Source {
    fn new(dir: &Path, origin: Origin, dry: bool) -> Self {
        Self { root: dir.to_path_buf(), origin, dry, record: Mutex::new(Record::default()) }
    }

    /// The tensors of the files; none where there are no files.
    fn published(&self) -> &BTreeMap<String, Located> {
        static NONE: BTreeMap<String, Located> = BTreeMap::new();
        match &self.origin {
            Origin::Files(files) => &files.tensors,
            Origin::Dummy(_) => &NONE,
        }
    }

    fn beginning(&self) -> &str {
        match &self.origin {
            Origin::Files(files) => &files.beginning,
            Origin::Dummy(_) => "",
        }
    }

    /// The tensor of this shape at `place`; errors name the whole that it would be part of.
    fn find(&self, place: &Place, shape: &[usize]) -> Result<Found<'_>> {
        let files = match &self.origin {
            Origin::Files(files) => files,
            Origin::Dummy(dtype) => return Ok(Found::Dummy(*dtype)),
        };
        let whole = whole_shape(place.part, shape);
        let located = files.tensors.get(&place.name).ok_or_else(|| Error::MissingTensor {
            path: self.root.clone(),
            tensor: place.name.clone(),
            expected: whole.clone(),
        })?;
        files.check(&place.name, located, &whole)?;
        Ok(Found::InFiles(files, Slice::new(located, place.part)))
    }
}

/// Shape of the file's tensor of which a tensor of this shape is the part.
fn whole_shape(part: Part, shape: &[usize]) -> Vec<usize> {
    let mut whole = shape.to_vec();
    if let (Part::Rows(rows), Some(first)) = (part, whole.first_mut()) {
        *first = first.saturating_mul(rows.of) / rows.count;
    }
    whole
}

impl Slice {
    /// `located` has been checked to have the shape of the whole, so that its rows divide as `part` says.
    fn new(located: &Located, part: Part) -> Self {
        let Range { start, end } = located.bytes;
        let mut pieces = Vec::with_capacity(2);
        match part {
            Part::Whole => pieces.push(start..end),
            Part::Rows(rows) => {
                let share = (end - start) / rows.of;
                let first = start + rows.first * share;
                pieces.push(first..first + rows.count * share);
            }
            Part::SwappedHalves => {
                let middle = start + (end - start) / 2;
                pieces.extend([middle..end, start..middle]);
            }
        }
        Self { file: located.file, stored: located.stored, pieces }
    }

    /// Bytes.
    fn len(&self) -> usize {
        self.pieces.iter().map(Range::len).sum()
    }
}

impl Files {
    fn check(&self, name: &str, located: &Located, shape: &[usize]) -> Result<()> {
        let path = &self.files[located.file].0;
        if located.shape != shape {
            return Err(Error::TensorShape {
                path: path.clone(),
                tensor: name.to_owned(),
                found: located.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        match located.stored {
            Stored::Plain(Dtype::F32 | Dtype::F16 | Dtype::BF16) | Stored::Blocks(_) => Ok(()),
            Stored::Plain(other) => {
                let problem = format!("tensor `{name}` has dtype {other:?}; read are F32, F16 and BF16");
                Err(Error::checkpoint(path, problem))
            }
        }
    }

    /// Copies the tensor out of the map.
    fn read(&self, slice: &Slice, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let published = match slice.stored {
            Stored::Plain(published) => published,
            Stored::Blocks(blocks) => return self.dequantise(slice, blocks, shape, dtype, device),
        };
        match dtype {
            DType::BF16 => self.read_as(slice, published, shape, to_bf16, device),
            DType::F16 => self.read_as(slice, published, shape, to_f16, device),
            DType::F32 => self.read_as(slice, published, shape, to_f32, device),
            other => Err(Error::Device(format!("nothing is computed in {other:?}"))),
        }
    }

    /// A tensor of quantised rows that is not only multiplied with.
    fn dequantise(
        &self,
        slice: &Slice,
        blocks: GgmlDType,
        shape: &[usize],
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let columns = shape.last().copied().unwrap_or(1);
        let rows = elements(shape) / columns.max(1);
        let matrix = QuantisedMatrix::new(&self.blocks(slice), blocks, (rows, columns), &Device::Cpu)?;
        self.drop_pages(slice);
        Ok(matrix.dequantise(dtype)?.reshape(shape)?.to_device(device)?)
    }

    /// The bytes of a slice as one.
    fn blocks(&self, slice: &Slice) -> Cow<'_, [u8]> {
        let mmap = &self.files[slice.file].1;
        match &slice.pieces[..] {
            [piece] => Cow::Borrowed(&mmap[piece.clone()]),
            pieces => Cow::Owned(pieces.iter().flat_map(|piece| &mmap[piece.clone()]).copied().collect()),
        }
    }

    /// To another memory than the host's, values of the right dtype go as they lie in the file. On the host the pages
    /// of a piece are dropped before the next one is read, so that a tensor is never there twice.
    fn read_as<T: WithDType>(
        &self,
        slice: &Slice,
        published: Dtype,
        shape: &[usize],
        convert: Convert<T>,
        device: &Device,
    ) -> Result<Tensor> {
        let in_place = match &slice.pieces[..] {
            [piece] if T::DTYPE == slice.stored.dtype() && !device.is_cpu() => {
                as_values::<T>(&self.files[slice.file].1[piece.clone()])
            }
            _ => None,
        };
        let Some(values) = in_place else {
            return Ok(Tensor::from_vec(self.convert(slice, published, convert), shape, device)?);
        };
        let tensor = Tensor::from_slice(values, shape, device)?;
        self.drop_pages(slice);
        Ok(tensor)
    }

    /// Converts a tensor piece by piece and lets the kernel drop the pages of each piece: an embedding is a fifth of
    /// some models, and as a whole it would be in memory twice.
    fn convert<T>(&self, slice: &Slice, published: Dtype, convert: Convert<T>) -> Vec<T> {
        let mmap = &self.files[slice.file].1;
        let mut elements = Vec::with_capacity(slice.len() * 8 / published.bitsize());
        for whole in &slice.pieces {
            for start in whole.clone().step_by(PIECE_BYTES) {
                let piece = start..whole.end.min(start + PIECE_BYTES);
                elements.extend(convert(published, &mmap[piece.clone()]));
                self.drop_pages_of(slice.file, piece);
            }
        }
        elements
    }

    fn drop_pages(&self, slice: &Slice) {
        slice.pieces.iter().for_each(|piece| self.drop_pages_of(slice.file, piece.clone()));
    }

    fn drop_pages_of(&self, file: usize, bytes: Range<usize>) {
        let (path, mmap) = &self.files[file];
        // SAFETY: the map is private, read-only and file-backed; dropped pages are read again from the file if touched.
        let advised = unsafe { mmap.unchecked_advise_range(UncheckedAdvice::DontNeed, bytes.start, bytes.len()) };
        if let Err(error) = advised {
            tracing::debug!(path = %path.display(), %error, "the kernel keeps the pages of a loaded tensor");
        }
    }
}

/// Of a shape; an absurd configuration gives an absurd number and no overflow.
fn elements(shape: &[usize]) -> usize {
    shape.iter().fold(1, |product, dim| product.saturating_mul(*dim))
}

/// From bytes of a published dtype to values.
type Convert<T> = fn(Dtype, &[u8]) -> Vec<T>;

/// The values that lie in `bytes` as the machine has them in memory; `None` where they are not aligned (a file may put
/// them anywhere) or in another byte order. The caller knows that they are of this dtype.
fn as_values<T: WithDType>(bytes: &[u8]) -> Option<&[T]> {
    if cfg!(target_endian = "big") {
        return None;
    }
    // SAFETY: the dtypes that are read are plain numbers, for which all bits are valid.
    let (before, values, after) = unsafe { bytes.align_to::<T>() };
    (before.is_empty() && after.is_empty()).then_some(values)
}

fn placeholder(shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(Tensor::zeros((), dtype, device)?.broadcast_as(shape)?)
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

#[cfg(test)]
mod tests {
    use safetensors::serialize_to_file;
    use safetensors::tensor::TensorView;

    use std::fs::File;

    use super::*;
    use crate::device::{DeviceSpec, WeightDtype};

    fn placement(dtype: WeightDtype) -> Placement {
        Placement::open(DeviceSpec::Cpu, dtype).expect("the CPU is always there")
    }

    /// A folder with `model.safetensors` that holds `a.weight` [2, 3] in bf16 and `a.bias` [2] in f32.
    fn sound_folder() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("temp dir");
        let weight: Vec<u8> = (0..6).flat_map(|i| bf16::from_f32(i as f32 - 2.5).to_le_bytes()).collect();
        let bias: Vec<u8> = [0.1f32, -7.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let tensors = [
            ("a.weight", TensorView::new(Dtype::BF16, vec![2, 3], &weight).expect("view")),
            ("a.bias", TensorView::new(Dtype::F32, vec![2], &bias).expect("view")),
        ];
        serialize_to_file(tensors, None, &dir.path().join("model.safetensors")).expect("write");
        dir
    }

    fn error_of<T>(result: Result<T>) -> String {
        match result {
            Ok(_) => panic!("was accepted"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn matrices_keep_the_published_dtype_and_vectors_widen() {
        let dir = sound_folder();
        let weights = Weights::open(dir.path(), &placement(WeightDtype::Auto)).expect("open").pp("a");
        let matrix = weights.matrix(2, 3, "weight").expect("matrix");
        assert_eq!(matrix.dtype(), DType::BF16);
        assert_eq!(weights.get(&[2], "bias").expect("bias").to_vec1::<f32>().expect("f32"), [0.1, -7.0]);
        let widened = matrix.to_dtype(DType::F32).expect("cast").to_vec2::<f32>().expect("f32");
        assert_eq!(widened, [[-2.5, -1.5, -0.5], [0.5, 1.5, 2.5]]);
        for (dtype, expected) in [(WeightDtype::F32, DType::F32), (WeightDtype::F16, DType::F16)] {
            let weights = Weights::open(dir.path(), &placement(dtype)).expect("open").pp("a");
            assert_eq!(weights.matrix(2, 3, "weight").expect("matrix").dtype(), expected);
        }
    }

    #[test]
    fn a_network_may_compute_in_another_dtype_than_its_neighbours() {
        let dir = sound_folder();
        let on_gpu = Placement::in_host_memory(DeviceSpec::Cuda(0), WeightDtype::F16);
        let weights = Weights::open(dir.path(), &on_gpu).expect("open").pp("a");
        let dtypes = |weights: &Weights| {
            let (matrix, bias) = (weights.matrix(2, 3, "weight"), weights.get(&[2], "bias"));
            (matrix.expect("matrix").dtype(), bias.expect("bias").dtype())
        };
        assert_eq!(dtypes(&weights), (DType::F16, DType::F16));
        assert_eq!(dtypes(&weights.computing_in(DType::BF16)), (DType::BF16, DType::BF16));
    }

    /// What is copied to a GPU without a detour is what the detour gives; values that lie askew take the detour.
    #[test]
    fn values_are_seen_where_they_lie_if_they_can_be() {
        let values: Vec<u16> = (0..64).map(|i| bf16::from_f32(i as f32 - 7.5).to_bits()).collect();
        let mut buffer = vec![0u8; 2 * values.len() + 2];
        // An even address, wherever the allocator has put the buffer.
        let even = buffer.as_ptr().align_offset(2);
        for (to, value) in buffer[even..].chunks_exact_mut(2).zip(&values) {
            to.copy_from_slice(&value.to_le_bytes());
        }
        let bytes = &buffer[even..even + 2 * values.len()];
        assert_eq!(as_values::<bf16>(bytes).expect("aligned"), to_bf16(Dtype::BF16, bytes));
        assert!(as_values::<bf16>(&bytes[1..bytes.len() - 1]).is_none(), "at an odd address");
        assert!(as_values::<bf16>(&bytes[..3]).is_none(), "half a value is left");
    }

    #[test]
    fn the_report_names_what_was_not_used() {
        let dir = sound_folder();
        let weights = Weights::open(dir.path(), &placement(WeightDtype::Auto)).expect("open");
        weights.pp("a").matrix(2, 3, "weight").expect("matrix");
        let report = weights.report();
        assert_eq!(report.unused, ["a.bias"]);
        assert_eq!((report.num_parameters, report.resident_bytes), (8, 12));
        weights.ignore("a.bias");
        assert!(weights.report().unused.is_empty());
    }

    #[test]
    fn a_dry_view_records_every_problem_and_takes_no_memory() {
        let dir = sound_folder();
        let weights = Weights::open_dry(dir.path(), &placement(WeightDtype::Auto)).expect("open");
        let huge = weights.matrix(1 << 20, 1 << 20, "a.weight").expect("placeholder");
        assert_eq!(huge.dims(), [1 << 20, 1 << 20]);
        weights.get(&[1 << 40], "b").expect("placeholder");
        let problems: Vec<String> = weights.report().problems.iter().map(Error::to_string).collect();
        assert!(problems[0].contains("`a.weight` has shape [2, 3], expected [1048576, 1048576]"), "{problems:?}");
        assert!(problems[1].contains("`b` is missing"), "{problems:?}");
    }

    #[test]
    fn wrong_shapes_and_missing_tensors_name_file_and_tensor() {
        let dir = sound_folder();
        let weights = Weights::open(dir.path(), &placement(WeightDtype::Auto)).expect("open");
        let error = error_of(weights.matrix(3, 2, "a.weight"));
        assert!(error.contains("model.safetensors: tensor `a.weight` has shape [2, 3], expected [3, 2]"), "{error}");
        assert!(error_of(weights.get(&[1], "a.gain")).contains("tensor `a.gain` is missing"));
    }

    #[test]
    fn damaged_files_are_refused_with_the_reason() {
        let check = |damage: &dyn Fn(&Path), expected: &str| {
            let dir = sound_folder();
            damage(&dir.path().join("model.safetensors"));
            let error = error_of(Weights::open(dir.path(), &placement(WeightDtype::Auto)));
            assert!(error.contains(expected), "expected `{expected}` in: {error}");
        };
        let rewrite = |path: &Path, from: &str, to: &str| {
            let bytes = std::fs::read(path).expect("read");
            let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect("pattern is there");
            let mut changed = bytes.clone();
            changed[at..at + from.len()].copy_from_slice(to.as_bytes());
            std::fs::write(path, changed).expect("write");
        };
        let truncate = |path: &Path, len: u64| {
            File::options().write(true).open(path).expect("open").set_len(len).expect("truncate");
        };
        check(&|path| truncate(path, 4), "header too small");
        check(&|path| truncate(path, 40), "header length points past the end");
        let shortened = |path: &Path| truncate(path, std::fs::metadata(path).expect("stat").len() - 2);
        check(&shortened, "its tensors end at byte 20, the file has 18 bytes");
        check(
            &|path| rewrite(path, "[2,3]", "[2,4]"),
            "tensor `a.weight` of shape [2, 4] and dtype BF16 needs 16 bytes, its offsets give 12",
        );
        check(&|path| rewrite(path, "[2,3]", "[2,x]"), "invalid JSON in header");
        check(&|path| std::fs::write(path, (1u64 << 60).to_le_bytes()).expect("write"), "header too large");
    }

    #[test]
    fn pickles_and_empty_folders_are_refused() {
        let dir = tempfile::tempdir().expect("temp dir");
        let open = || error_of(Weights::open(dir.path(), &placement(WeightDtype::Auto)));
        assert!(open().contains("holds no safetensors file"));
        std::fs::write(dir.path().join("pytorch_model.bin"), b"\x80\x02").expect("write");
        assert!(open().contains("is a pickle"), "{}", open());
    }

    #[test]
    fn shards_must_all_be_there_and_hold_what_the_index_says() {
        let dir = sound_folder();
        let path = |name: &str| dir.path().join(name);
        std::fs::rename(path("model.safetensors"), path("model-00001-of-00002.safetensors")).expect("rename");
        let write_index = |map: &str| {
            std::fs::write(path("model.safetensors.index.json"), format!("{{\"weight_map\":{map}}}")).expect("write");
        };
        let open = || Weights::open(dir.path(), &placement(WeightDtype::Auto));
        let shard = "model-00001-of-00002.safetensors";
        write_index(&format!(r#"{{"a.weight":"{shard}","a.bias":"{shard}"}}"#));
        open().expect("all shards are there").get(&[2], "a.bias").expect("bias");
        write_index(&format!(r#"{{"a.weight":"{shard}","a.bias":"model-00002-of-00002.safetensors"}}"#));
        assert!(error_of(open()).contains("model-00002-of-00002.safetensors: this shard is missing"));
        write_index(&format!(r#"{{"a.gain":"{shard}"}}"#));
        assert!(error_of(open()).contains("tensor `a.gain` is missing"));
        write_index(r#"{"a.weight":"../model.safetensors"}"#);
        assert!(error_of(open()).contains("outside its folder"));
    }
}
