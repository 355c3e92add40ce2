//! One LoRA file: its header, checked against a model, and its tensors, read when they are needed.
//!
//! A file is read by position and never mapped: its folder is written to while the server runs, and a map of a file that
//! somebody cuts short ends the process.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use sha2::{Digest as _, Sha256};

use super::metadata::{AdapterMetadata, Header, unheeded_alpha};
use super::names::{Addend, LoraNames, Pair, Term};
use super::refusal::{Mismatch, Refusal};
use super::sites::LayerShape;
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::files::Limit;
use crate::lfs;

/// Most by which a term is multiplied beside the request's weight. Published are 1/64 to 8.
const MAX_SCALE: f64 = 1e4;
/// Largest rank. Published are 1,024 at most.
const MAX_RANK: usize = 1 << 14;
/// Bytes of a tensor that are looked through at a time; whole numbers of every dtype.
const PIECE_BYTES: usize = 1 << 20;

/// A file whose tensors all belong to layers of one model, in shapes that fit.
pub struct LoraFile {
    /// Unlike that of every other file that this process has opened.
    id: u64,
    path: PathBuf,
    file: File,
    tensors: BTreeMap<String, Located>,
    terms: Vec<ScaledTerm>,
    device_bytes: usize,
    /// Of what it adds to which layers.
    digest: [u8; 32],
}

#[derive(Debug, Clone)]
struct Located {
    dtype: DType,
    shape: Vec<usize>,
    start: u64,
    len: usize,
}

/// A term, and what its file multiplies it with.
#[derive(Debug)]
pub(super) struct ScaledTerm {
    pub(super) term: Term,
    pub(super) scale: f64,
}

impl std::fmt::Debug for LoraFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoraFile").field("id", &self.id).field("path", &self.path).finish_non_exhaustive()
    }
}

impl LoraFile {
    /// Reads the header of an opened file and takes its names for layers of the model; its matrices are looked through for
    /// values that are not finite. `placement` is where the model computes.
    pub fn read(path: &Path, file: File, names: &LoraNames, placement: &Placement) -> Result<Self, Refusal> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let (tensors, header) = read_header(&file).map_err(Refusal::Unreadable)?;
        let shapes = tensors.iter().map(|(name, located)| (name.clone(), located.shape.clone())).collect();
        let terms = names.terms(&shapes).map_err(Refusal::Mismatch)?;
        let mut lora = Self {
            id: NEXT_ID.fetch_add(1, Relaxed),
            path: path.to_owned(),
            file,
            tensors,
            terms: Vec::new(),
            device_bytes: 0,
            digest: [0; 32],
        };
        let mut digest = Sha256::new();
        for name in terms.iter().flat_map(|term| term.addend.tensors()).collect::<BTreeSet<_>>() {
            lora.check_finite(name, &mut digest).map_err(Refusal::Unreadable)?;
        }
        let metadata = AdapterMetadata::of(&header)?;
        for term in terms {
            let scale = match term.addend.pair() {
                Some(pair) => lora.scale(&term, pair, &metadata, names)?,
                None => 1.0,
            };
            lora.device_bytes += lora.bytes(&term, placement);
            lora.terms.push(ScaledTerm { term, scale });
        }
        digest.update(format!("{:?}", lora.terms));
        lora.digest = digest.finalize().into();
        let alone =
            |of: &ScaledTerm| of.term.addend.pair().filter(|pair| pair.alpha.is_none() && of.scale == 1.0).cloned();
        let ranks: Vec<usize> = lora.terms.iter().filter_map(alone).map(|pair| pair.rank).collect();
        if let Some((key, alpha)) = unheeded_alpha(&header, &ranks) {
            let path = path.display();
            tracing::warn!(
                "{path}: its header says {key} = {alpha}, but it holds no alpha tensors: its terms count once, as in diffusers"
            );
        }
        Ok(lora)
    }

    /// Names the file among all that were opened.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Names its content: the same for the same file in every process.
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// Bytes of its tensors on the model's device; those that several layers share count for each.
    pub fn device_bytes(&self) -> usize {
        self.device_bytes
    }

    pub(super) fn terms(&self) -> &[ScaledTerm] {
        &self.terms
    }

    /// Bytes of a tensor in the file.
    pub(super) fn len_of(&self, name: &str) -> usize {
        self.tensors[name].len
    }

    /// A tensor as it is in the file.
    pub(super) fn values(&self, name: &str) -> Result<Tensor> {
        let located = &self.tensors[name];
        Ok(Tensor::from_raw_buffer(&self.bytes_of(located)?, located.dtype, &located.shape, &Device::Cpu)?)
    }

    /// Refuses a tensor that holds NaN or infinity, which would spoil every picture. What is looked through goes into
    /// the digest.
    fn check_finite(&self, name: &str, digest: &mut Sha256) -> Result<(), String> {
        let Located { dtype, start, len, .. } = self.tensors[name];
        digest.update(format!("{name} {dtype:?} {:?}", self.tensors[name].shape));
        let mut piece = vec![0; len.min(PIECE_BYTES)];
        for at in (0..len).step_by(PIECE_BYTES) {
            let piece = &mut piece[..PIECE_BYTES.min(len - at)];
            let read = self.file.read_exact_at(piece, start + at as u64);
            read.map_err(|error| format!("tensor `{name}` cannot be read: {error}"))?;
            digest.update(&*piece);
            if !are_finite(piece, dtype) {
                return Err(format!("tensor `{name}` holds a value that is not finite"));
            }
        }
        Ok(())
    }

    fn bytes_of(&self, located: &Located) -> Result<Vec<u8>> {
        let mut bytes = vec![0; located.len];
        let read = self.file.read_exact_at(&mut bytes, located.start);
        read.map_err(|error| Error::checkpoint(&self.path, format!("cannot be read any more: {error}")))?;
        Ok(bytes)
    }

    /// `alpha / rank`.
    fn scale(&self, term: &Term, pair: &Pair, metadata: &AdapterMetadata, names: &LoraNames) -> Result<f64, Refusal> {
        let refuse = |problem: String| Err(Refusal::Mismatch(Mismatch(problem)));
        let Pair { down, rank, .. } = pair;
        if !(1..=MAX_RANK).contains(rank) {
            return refuse(format!("`{down}` has rank {rank}; allowed: 1 to {MAX_RANK}"));
        }
        let scale = match &pair.alpha {
            Some(alpha) => self.alpha(alpha)? / *rank as f64,
            None => metadata.scale(term, *rank, names),
        };
        if !(-MAX_SCALE..=MAX_SCALE).contains(&scale) {
            return refuse(format!("`{down}` is scaled by {scale:e}; allowed: -{MAX_SCALE} to {MAX_SCALE}"));
        }
        Ok(scale)
    }

    /// The one number of a tensor.
    fn alpha(&self, name: &str) -> Result<f64, Refusal> {
        let located = &self.tensors[name];
        if located.shape.iter().product::<usize>() != 1 {
            let shape = &located.shape;
            return Err(Refusal::Mismatch(Mismatch(format!("`{name}` has shape {shape:?} and should be one number"))));
        }
        let number = || -> Result<f64> {
            let value = Tensor::from_raw_buffer(&self.bytes_of(located)?, located.dtype, &[], &Device::Cpu)?;
            Ok(value.to_dtype(DType::F64)?.to_scalar::<f64>()?)
        };
        let value = number().map_err(|error| Refusal::Unreadable(error.to_string()))?;
        match value.is_finite() {
            true => Ok(value),
            false => Err(Refusal::Mismatch(Mismatch(format!("`{name}` is not a finite number")))),
        }
    }

    /// Of a term's tensors where the model computes.
    fn bytes(&self, term: &Term, placement: &Placement) -> usize {
        let (shape, rows) = (term.shape, term.part.rows.len());
        let inner = |name: &str| match shape {
            // Channels that the file has not are filled up.
            LayerShape::Patches { .. } => shape.inputs(),
            _ => self.tensors[name].shape[1..].iter().product(),
        };
        let (values, name) = match &term.addend {
            Addend::LowRank(Pair { down, rank, .. }) => (rank * inner(down) + rows * rank, down),
            Addend::Weight(tensor) => (rows * inner(tensor), tensor),
            Addend::Bias { tensor, .. } => (rows, tensor),
        };
        values * term.dtype(self.tensors[name].dtype, placement).size_in_bytes()
    }
}

impl Term {
    /// The dtype in which its tensors are kept, which the file has in another.
    pub(super) fn dtype(&self, in_file: DType, placement: &Placement) -> DType {
        let is_matrix = matches!(self.shape, LayerShape::Linear { .. } | LayerShape::Patches { .. })
            && !matches!(self.addend, Addend::Bias { .. });
        if is_matrix { placement.matrix_dtype(in_file) } else { placement.compute_dtype }
    }
}

/// Whether no number of this dtype in `bytes` has an exponent of ones, as infinities and NaN have.
fn are_finite(bytes: &[u8], dtype: DType) -> bool {
    let halves = |exponent: u16| bytes.as_chunks().0.iter().all(|x| u16::from_le_bytes(*x) & exponent != exponent);
    match dtype {
        DType::F16 => halves(0x7c00),
        DType::BF16 => halves(0x7f80),
        _ => bytes.as_chunks().0.iter().all(|x| f32::from_le_bytes(*x).is_finite()),
    }
}

fn refuse_pointer(file: &File) -> Result<(), String> {
    let mut first = [0; 256];
    let len = file.read_at(&mut first, 0).map_err(|error| error.to_string())?;
    lfs::pointer_problem(&first[..len]).map_or(Ok(()), Err)
}

/// Tensors by name, and what the header says beside them; the error is in words.
fn read_header(file: &File) -> Result<(BTreeMap<String, Located>, Header), String> {
    let unsound = |reason: &str| format!("is not a sound safetensors file: {reason}");
    let file_len = file.metadata().map_err(|error| error.to_string())?.len();
    let mut len = [0; 8];
    file.read_exact_at(&mut len, 0).map_err(|_| unsound("it is shorter than a header"))?;
    refuse_pointer(file)?;
    let (header_len, max) = (u64::from_le_bytes(len), Limit::HEADER.bytes());
    if header_len > file_len.saturating_sub(8) {
        return Err(unsound("its header length points past the end of the file"));
    }
    if header_len > max {
        return Err(unsound(&format!("its header has {header_len} bytes; at most {max}")));
    }
    let mut header = vec![0; header_len as usize];
    file.read_exact_at(&mut header, 8).map_err(|error| error.to_string())?;
    if let Some(problem) = Limit::HEADER.problem(&header) {
        return Err(unsound(&format!("its header {problem}")));
    }
    // Reading checks every offset and size against the others, and that nothing overlaps.
    let header: Metadata = serde_json::from_slice(&header).map_err(|error| unsound(&error.to_string()))?;
    let (data_start, data_len) = (8 + header_len, header.data_len() as u64);
    if data_start + data_len != file_len {
        let has = file_len - data_start;
        return Err(unsound(&format!("its tensors have {data_len} bytes, the file has {has} for them")));
    }
    let mut tensors = BTreeMap::new();
    for (name, info) in header.tensors() {
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F64 if info.shape.is_empty() => DType::F64,
            Dtype::I64 if info.shape.is_empty() => DType::I64,
            other => return Err(format!("tensor `{name}` has dtype {other:?}; read are F32, F16 and BF16")),
        };
        let (start, end) = info.data_offsets;
        let located = Located { dtype, shape: info.shape.clone(), start: data_start + start as u64, len: end - start };
        tensors.insert(name, located);
    }
    Ok((tensors, header.metadata().clone().unwrap_or_default()))
}
