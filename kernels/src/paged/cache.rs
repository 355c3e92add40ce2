//! Keys and values of one layer in blocks: as they are computed, or in 8 bits.
//!
//! Owns: the forms, and writing rows on the CPU. In 8 bits a head of a key or a value is `d` numbers and one scale. As integers
//! the scale is its largest magnitude over 127, and no value is further from what was written than half of that scale. As floats
//! of e4m3 it is the largest magnitude over 448, and no value is further from what was written than a sixteenth of itself, or
//! 2^-10 of the scale where that is more. A head with a value that is not finite has a scale of NaN, so that what is read is NaN
//! as well. Does not know: which slots rows get.

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Tensor, bail};
use half::{bf16, f16};

use crate::e4m3::{self, E4m3};
use crate::view::View;

/// A head of smaller values is zero: the inverse of its scale may not be finite. `SMALLEST` of `paged.cu`.
const SMALLEST: f32 = 1e-30;

/// Keys and values of one layer, written in place.
#[derive(Debug, Clone)]
pub struct PagedCache {
    pub(super) k: Tensor,
    pub(super) v: Tensor,
    pub(super) scales: Option<Scales>,
    dtype: DType,
}

/// What a byte of a cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByteFormat {
    /// An integer with a sign.
    Int8,
    /// A float with four bits of exponent and three of the fraction (`torch.float8_e4m3fn`).
    E4m3,
}

impl ByteFormat {
    /// The largest number of a head.
    fn largest(self) -> f32 {
        match self {
            Self::Int8 => 127.0,
            Self::E4m3 => e4m3::LARGEST,
        }
    }

    /// The nearest number that a byte can be.
    fn round(self, value: f32) -> u8 {
        match self {
            Self::Int8 => (value.round_ties_even() as i8).cast_unsigned(),
            Self::E4m3 => E4m3::round(value).code(),
        }
    }
}

/// What the bytes of a cache are, and what they are multiplied with.
#[derive(Debug, Clone)]
pub(super) struct Scales {
    pub(super) format: ByteFormat,
    pub(super) k: Tensor,
    pub(super) v: Tensor,
}

impl PagedCache {
    /// `k` and `v` are f32, bf16 or f16 `[num_blocks, block_size, kv_heads, d]`.
    pub fn new(k: Tensor, v: Tensor) -> Self {
        let dtype = k.dtype();
        Self { k, v, scales: None, dtype }
    }

    /// Numbers of this format in tensors of u8 `[num_blocks, block_size, kv_heads, d]`, and their scales, f32
    /// `[num_blocks, block_size, kv_heads]`, of keys and of values. On a GPU rows and queries have `dtype`.
    pub fn bytes(format: ByteFormat, [k, v]: [Tensor; 2], [k_scales, v_scales]: [Tensor; 2], dtype: DType) -> Self {
        Self { k, v, scales: Some(Scales { format, k: k_scales, v: v_scales }), dtype }
    }

    /// Bytes of one head of one key, or of one value.
    pub fn head_bytes(d: usize, dtype: DType) -> usize {
        match dtype {
            DType::U8 => d + DType::F32.size_in_bytes(),
            dtype => d * dtype.size_in_bytes(),
        }
    }

    /// Keys.
    pub fn k(&self) -> &Tensor {
        &self.k
    }

    /// Values.
    pub fn v(&self) -> &Tensor {
        &self.v
    }

    /// Dtype of queries, and of rows that are written, on a GPU.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// All tensors, each with the shape it should have in a cache of `[num_blocks, block_size, kv_heads, d]`.
    pub(super) fn parts(&self, [num_blocks, block_size, kv_heads, d]: [usize; 4]) -> Vec<(&Tensor, Vec<usize>)> {
        let mut parts: Vec<_> = [&self.k, &self.v].map(|part| (part, vec![num_blocks, block_size, kv_heads, d])).into();
        if let Some(Scales { k, v, .. }) = &self.scales {
            parts.extend([k, v].map(|part| (part, vec![num_blocks, block_size, kv_heads])));
        }
        parts
    }

    /// Writes rows `[l, kv_heads, d]` of keys and values at `slots`, on the CPU.
    pub(super) fn write(&self, k: &Tensor, v: &Tensor, slots: &[u32]) -> Result<()> {
        let scales = |of: fn(&Scales) -> &Tensor| self.scales.as_ref().map(|scales| (scales.format, of(scales)));
        let [k_scales, v_scales] = [scales(|scales| &scales.k), scales(|scales| &scales.v)];
        for (new, values, scales) in [(k, &self.k, k_scales), (v, &self.v, v_scales)] {
            let (_, kv_heads, d) = new.dims3()?;
            let new = new.to_dtype(DType::F32)?.contiguous()?;
            let view = View::contiguous("write_kv", &new)?;
            let rows = view.f32()?;
            match scales {
                None => values.inplace_op1(&WriteRows { rows, len: kv_heads * d, slots })?,
                Some((format, scales)) => {
                    let (bytes, factors) = quantised(rows, d, format);
                    values.inplace_op1(&WriteBytes { rows: &bytes, len: kv_heads * d, slots })?;
                    scales.inplace_op1(&WriteRows { rows: &factors, len: kv_heads, slots })?;
                }
            }
        }
        Ok(())
    }
}

/// Heads of `d` values in bytes, each with its scale.
fn quantised(values: &[f32], d: usize, format: ByteFormat) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = vec![0; values.len()];
    let heads = values.chunks_exact(d).zip(bytes.chunks_exact_mut(d));
    let scales = heads.map(|(head, to)| quantise(head, to, format)).collect();
    (bytes, scales)
}

/// The scale of a head whose bytes go into `to`, which is zero before.
fn quantise(head: &[f32], to: &mut [u8], format: ByteFormat) -> f32 {
    let mut largest = 0f32;
    let mut is_finite = true;
    for value in head {
        is_finite &= value.is_finite();
        largest = largest.max(value.abs());
    }
    if !is_finite {
        return f32::NAN;
    }
    if largest < SMALLEST {
        return 0.0;
    }
    let inverse = format.largest() / largest;
    for (to, value) in to.iter_mut().zip(head) {
        *to = format.round(value * inverse);
    }
    largest / format.largest()
}

/// Rows of `len` values into the slots of a cache.
struct WriteRows<'a> {
    rows: &'a [f32],
    len: usize,
    slots: &'a [u32],
}

impl InplaceOp1 for WriteRows<'_> {
    fn name(&self) -> &'static str {
        "write_kv"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (start, end) = contiguous(layout)?;
        match storage {
            CpuStorage::F32(cache) => write(&mut cache[start..end], self.rows, self.len, self.slots, |value| value),
            CpuStorage::BF16(cache) => write(&mut cache[start..end], self.rows, self.len, self.slots, bf16::from_f32),
            CpuStorage::F16(cache) => write(&mut cache[start..end], self.rows, self.len, self.slots, f16::from_f32),
            _ => bail!("write_kv: a cache is f32, bf16 or f16, or has scales"),
        }
        Ok(())
    }
}

/// The same of bytes.
struct WriteBytes<'a> {
    rows: &'a [u8],
    len: usize,
    slots: &'a [u32],
}

impl InplaceOp1 for WriteBytes<'_> {
    fn name(&self) -> &'static str {
        "write_kv"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (start, end) = contiguous(layout)?;
        match storage {
            CpuStorage::U8(cache) => write(&mut cache[start..end], self.rows, self.len, self.slots, |byte| byte),
            _ => bail!("write_kv: a cache with scales is in tensors of u8"),
        }
        Ok(())
    }
}

fn contiguous(layout: &Layout) -> Result<(usize, usize)> {
    let Some(range) = layout.contiguous_offsets() else {
        bail!("write_kv: the cache {:?} must be contiguous", layout.shape())
    };
    Ok(range)
}

fn write<A: Copy, B>(cache: &mut [B], rows: &[A], len: usize, slots: &[u32], round: impl Fn(A) -> B) {
    for (row, slot) in rows.chunks_exact(len.max(1)).zip(slots) {
        let to = &mut cache[*slot as usize * len..][..len];
        for (to, value) in to.iter_mut().zip(row) {
            *to = round(*value);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::simd::Element;

    const FORMATS: [ByteFormat; 2] = [ByteFormat::Int8, ByteFormat::E4m3];

    /// What a head is read as.
    fn read_again(head: &[f32], format: ByteFormat) -> Vec<f32> {
        let mut bytes = vec![0; head.len()];
        let scale = quantise(head, &mut bytes, format);
        match format {
            ByteFormat::Int8 => bytes.iter().map(|byte| f32::from(byte.cast_signed()) * scale).collect(),
            ByteFormat::E4m3 => E4m3::of_codes(&bytes).iter().map(|value| value.widen() * scale).collect(),
        }
    }

    proptest! {
        #[test]
        fn no_value_moves_further_than_its_format_says(
            head in prop::collection::vec(-1f32..1.0, 1..130), exponent in -20i32..30,
        ) {
            let head: Vec<f32> = head.iter().map(|value| value * 10f32.powi(exponent)).collect();
            let largest = head.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            for format in FORMATS {
                let scale = largest / format.largest();
                for (value, found) in head.iter().zip(read_again(&head, format)) {
                    let bound = match format {
                        ByteFormat::Int8 => scale / 2.0,
                        ByteFormat::E4m3 => (value.abs() / 16.0).max(scale / 1024.0),
                    };
                    // The rest is for the rounding of f32.
                    prop_assert!((value - found).abs() <= bound * 1.0002, "{format:?}: {value} is read as {found}");
                }
            }
        }
    }

    /// Heads of 128 numbers of a normal distribution: the root of the mean square of what they move by, in parts of their own.
    #[test]
    fn integers_move_values_less_than_floats_of_as_many_bits() {
        let noise = crate::testing::random(&[4 * 128, 128], 5).to_vec2::<f32>().unwrap();
        // Sums of four uniform numbers are about normal.
        let heads: Vec<Vec<f32>> = noise
            .chunks_exact(4)
            .map(|rows| (0..128).map(|at| rows.iter().map(|row| row[at]).sum()).collect())
            .collect();
        let moved = |format| {
            let pairs = heads.iter().flat_map(|head| head.iter().copied().zip(read_again(head, format)));
            let sums = pairs.fold((0f64, 0f64), |(moved, own), (value, found)| {
                (moved + f64::from(value - found).powi(2), own + f64::from(value).powi(2))
            });
            (sums.0 / sums.1).sqrt()
        };
        let [int8, e4m3] = FORMATS.map(moved);
        println!("int8 moves values by {int8:.2e} of their size, e4m3 by {e4m3:.2e}");
        assert!((0.004..0.009).contains(&int8) && (0.02..0.03).contains(&e4m3), "{int8} {e4m3}");
    }

    #[test]
    fn extremes_are_kept_and_nothing_that_is_not_finite_is_hidden() {
        assert_eq!(read_again(&[-127.0, 63.0, 127.0], ByteFormat::Int8), [-127.0, 63.0, 127.0]);
        assert_eq!(read_again(&[-448.0, 15.0, 2.0, 448.0], ByteFormat::E4m3), [-448.0, 15.0, 2.0, 448.0]);
        for format in FORMATS {
            assert_eq!(read_again(&[0.0, -0.0], format), [0.0, 0.0]);
            assert_eq!(read_again(&[1e-38, 1e-45], format), [0.0, 0.0]);
            assert!(read_again(&[3e38, -1e38], format).iter().all(|value| value.is_finite()));
            for spoiled in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert!(read_again(&[1.0, spoiled, 2.0], format).iter().all(|value| value.is_nan()));
            }
        }
    }
}
