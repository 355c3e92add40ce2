//! Tensors of mapped files: where they lie, and copying them out.
//!
//! Owns: parts of tensors, conversion of dtypes, dropping of pages that were read. Does not know: names that are not those
//! of the files, what a network makes of a tensor.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use memmap2::{Mmap, UncheckedAdvice};
use safetensors::Dtype;
use sha2::{Digest as _, Sha256};
use tale_kernels::QuantisedMatrix;

use super::float8::Float8;
use super::names::Extent;
use super::stored::Stored;
use crate::error::{Error, Result};

/// Bytes at either end of a tensor that tell it from others.
const SAMPLE_BYTES: usize = 64;

/// Bytes of a tensor that are converted at a time; whole elements of every dtype.
const PIECE_BYTES: usize = 4 << 20;

/// The weight files of a folder, or a component's part of a single file.
pub(super) struct Files {
    pub(super) files: Arc<Vec<(PathBuf, Mmap)>>,
    pub(super) tensors: BTreeMap<String, Located>,
    /// What all names of the component begin with.
    pub(super) beginning: String,
    /// Whether every tensor below `beginning` must have its place in the network.
    pub(super) must_fit: bool,
}

#[derive(Clone)]
pub(super) struct Located {
    pub(super) file: usize,
    pub(super) stored: Stored,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Range<usize>,
}

/// Values of a file's tensor that are a tensor of the network: pieces of the file one after the other.
pub(super) struct Slice {
    pub(super) file: usize,
    pub(super) stored: Stored,
    pieces: Vec<Range<usize>>,
    /// Whether a piece begins or ends within a block.
    cuts_blocks: bool,
}

/// Shape of the file's tensor of which a tensor of this shape is the part.
pub(super) fn whole_shape(part: Extent, shape: &[usize]) -> Vec<usize> {
    let mut whole = shape.to_vec();
    match (part, whole.first_mut()) {
        (Extent::Rows(rows), Some(first)) => *first = first.saturating_mul(rows.of) / rows.count,
        (Extent::Batched { dims }, _) => drop(whole.splice(0..0, std::iter::repeat_n(1, dims))),
        _ => {}
    }
    whole
}

/// Which values of a tensor of this shape are the part, in its order.
fn values_of(part: Extent, shape: &[usize]) -> Vec<Range<usize>> {
    let all = elements(shape);
    let whole = 0..all;
    match part {
        Extent::Whole | Extent::Batched { .. } => vec![whole],
        Extent::Rows(rows) => {
            let share = all / rows.of;
            let these = rows.first * share..(rows.first + rows.count) * share;
            vec![these]
        }
        Extent::SwappedHalves => vec![all / 2..all, 0..all / 2],
        Extent::AlternatingHalves { heads } => {
            let num_rows = shape.first().copied().unwrap_or(0);
            let row = all / num_rows.max(1);
            let half = num_rows / heads / 2;
            let of_half = |head: usize, second: usize| (0..half).map(move |i| 2 * (head * half + i) + second);
            let order = (0..heads).flat_map(|head| of_half(head, 0).chain(of_half(head, 1)));
            order.map(|at| at * row..(at + 1) * row).collect()
        }
    }
}

impl Slice {
    /// `located` has been checked to have the shape of the whole, so that its rows divide as `part` says.
    pub(super) fn new(located: &Located, part: Extent) -> Self {
        let (block_values, block_bytes) = located.stored.block();
        let values = values_of(part, &located.shape);
        let cuts_blocks = values
            .iter()
            .any(|piece| !piece.start.is_multiple_of(block_values) || !piece.end.is_multiple_of(block_values));
        let at = |value: usize| located.bytes.start + value / block_values * block_bytes;
        let pieces = match part {
            // A dtype with several values in a byte has no place for each of them.
            Extent::Whole | Extent::Batched { .. } => vec![located.bytes.clone()],
            _ => values.into_iter().map(|piece| at(piece.start)..at(piece.end)).collect(),
        };
        Self { file: located.file, stored: located.stored, pieces, cuts_blocks }
    }

    /// Some of its values, in the order of the ranges.
    pub(super) fn values(&self, ranges: &[Range<usize>]) -> Self {
        let (block_values, block_bytes) = self.stored.block();
        let at = |value: usize| value / block_values * block_bytes;
        let is_whole = |range: &Range<usize>| [range.start, range.end].iter().all(|at| at.is_multiple_of(block_values));
        let cuts_blocks = self.cuts_blocks || !ranges.iter().all(is_whole);
        let pieces = ranges.iter().flat_map(|range| self.range(at(range.start)..at(range.end)).pieces).collect();
        Self { file: self.file, stored: self.stored, pieces, cuts_blocks }
    }

    /// The values in this range of its bytes.
    pub(super) fn range(&self, bytes: Range<usize>) -> Self {
        let mut pieces = Vec::with_capacity(self.pieces.len());
        let mut before = 0;
        for piece in &self.pieces {
            let start = bytes.start.clamp(before, before + piece.len()) - before;
            let end = bytes.end.clamp(before, before + piece.len()) - before;
            if start < end {
                pieces.push(piece.start + start..piece.start + end);
            }
            before += piece.len();
        }
        Self { file: self.file, stored: self.stored, pieces, cuts_blocks: self.cuts_blocks }
    }

    /// Bytes.
    pub(super) fn len(&self) -> usize {
        self.pieces.iter().map(Range::len).sum()
    }
}

impl Files {
    /// Names, types and shapes of all tensors, and the first and last bytes of each.
    pub(super) fn add_to(&self, digest: &mut Sha256) {
        for (name, Located { file, stored, shape, bytes }) in &self.tensors {
            let values = &self.files[*file].1[bytes.clone()];
            let sample = values.len().min(SAMPLE_BYTES);
            digest.update(format!("{name} {stored:?} {shape:?}\n"));
            digest.update(&values[..sample]);
            digest.update(&values[values.len() - sample..]);
        }
    }

    pub(super) fn check_shape(&self, name: &str, located: &Located, shape: &[usize]) -> Result<()> {
        if located.shape == shape {
            return Ok(());
        }
        Err(Error::TensorShape {
            path: self.files[located.file].0.clone(),
            tensor: name.to_owned(),
            found: located.shape.clone(),
            expected: shape.to_vec(),
        })
    }

    /// Refuses values that are no numbers to compute with as they lie there, such as integers.
    pub(super) fn check_is_read(&self, name: &str, slice: &Slice) -> Result<()> {
        match slice.stored {
            Stored::Plain(Dtype::F32 | Dtype::F16 | Dtype::BF16) | Stored::Float8(_) | Stored::Blocks(_) => Ok(()),
            Stored::Plain(other) => {
                let problem =
                    format!("tensor `{name}` has dtype {other:?}; read are F32, F16, BF16, F8_E4M3 and F8_E5M2");
                Err(Error::checkpoint(&self.files[slice.file].0, problem))
            }
        }
    }

    /// Refuses a part of a tensor that ends within a block. Rows of a file's tensor may: its shape need not be the one in
    /// which it was quantised.
    pub(super) fn check_is_whole(&self, name: &str, slice: &Slice) -> Result<()> {
        if !slice.cuts_blocks {
            return Ok(());
        }
        let problem = format!("tensor `{name}`: a part of it ends within a block of {}", slice.stored);
        Err(Error::checkpoint(&self.files[slice.file].0, problem))
    }

    /// Copies the tensor out of the map.
    pub(super) fn read(&self, slice: &Slice, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let published = match slice.stored {
            Stored::Plain(published) => published,
            Stored::Float8(float8) => return self.widen(slice, float8, shape, dtype, device),
            Stored::Blocks(blocks) => return self.dequantise(slice, blocks, shape, dtype, device),
        };
        match dtype {
            DType::BF16 => self.read_as(slice, published, shape, to_bf16, device),
            DType::F16 => self.read_as(slice, published, shape, to_f16, device),
            DType::F32 => self.read_as(slice, published, shape, to_f32, device),
            other => Err(Error::Device(format!("nothing is computed in {other:?}"))),
        }
    }

    /// A tensor of eight bits per value.
    fn widen(&self, slice: &Slice, float8: Float8, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let values = float8.values();
        match dtype {
            DType::BF16 => self.look_up(slice, &values.map(bf16::from_f32), shape, device),
            DType::F16 => self.look_up(slice, &values.map(f16::from_f32), shape, device),
            DType::F32 => self.look_up(slice, &values, shape, device),
            other => Err(Error::Device(format!("nothing is computed in {other:?}"))),
        }
    }

    /// The value of each byte, piece by piece as [`Files::convert`].
    fn look_up<T: WithDType>(
        &self,
        slice: &Slice,
        values: &[T; 256],
        shape: &[usize],
        device: &Device,
    ) -> Result<Tensor> {
        let mmap = &self.files[slice.file].1;
        let mut elements = Vec::with_capacity(slice.len());
        for whole in &slice.pieces {
            for start in whole.clone().step_by(PIECE_BYTES) {
                let piece = start..whole.end.min(start + PIECE_BYTES);
                elements.extend(mmap[piece.clone()].iter().map(|byte| values[usize::from(*byte)]));
                self.drop_pages_of(slice.file, piece);
            }
        }
        Ok(Tensor::from_vec(elements, shape, device)?)
    }

    /// A quantised tensor that is not only multiplied with, block by block: its rows need not be whole blocks.
    fn dequantise(
        &self,
        slice: &Slice,
        blocks: GgmlDType,
        shape: &[usize],
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let columns = blocks.block_size();
        let rows = elements(shape) / columns;
        let matrix = QuantisedMatrix::new(&self.bytes(slice), blocks, (rows, columns), &Device::Cpu)?;
        self.drop_pages(slice);
        Ok(matrix.dequantise(dtype)?.reshape(shape)?.to_device(device)?)
    }

    /// The bytes of a slice as one.
    pub(super) fn bytes(&self, slice: &Slice) -> Cow<'_, [u8]> {
        let mmap = &self.files[slice.file].1;
        match &slice.pieces[..] {
            [piece] => Cow::Borrowed(&mmap[piece.clone()]),
            pieces => Cow::Owned(pieces.iter().map(|piece| &mmap[piece.clone()]).collect::<Vec<_>>().concat()),
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

    pub(super) fn drop_pages(&self, slice: &Slice) {
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
pub(super) fn elements(shape: &[usize]) -> usize {
    shape.iter().fold(1, |product, dim| product.saturating_mul(*dim))
}

/// From bytes of a published dtype to values.
type Convert<T> = fn(Dtype, &[u8]) -> Vec<T>;

/// The values that lie in `bytes` as the machine has them in memory; `None` where they are not aligned (a file may put
/// them anywhere) or in another byte order. The caller knows that they are of this dtype.
pub(super) fn as_values<T: WithDType>(bytes: &[u8]) -> Option<&[T]> {
    if cfg!(target_endian = "big") {
        return None;
    }
    // SAFETY: the dtypes that are read are plain numbers, for which all bits are valid.
    let (before, values, after) = unsafe { bytes.align_to::<T>() };
    (before.is_empty() && after.is_empty()).then_some(values)
}

fn to_f32(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F16 => halves(bytes).map(|b| f16::from_bits(b).to_f32()).collect(),
        Dtype::BF16 => halves(bytes).map(|b| bf16::from_bits(b).to_f32()).collect(),
        _ => floats(bytes).collect(),
    }
}

pub(super) fn to_bf16(dtype: Dtype, bytes: &[u8]) -> Vec<bf16> {
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
