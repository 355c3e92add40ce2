//! ggml's blocks widened to f32: small integers with scales that a group of them shares.
//!
//! Owns: the layouts of the types that published models mostly have, each a loop that the compiler makes vectors of. Does not
//! know: matrices. Source: ggml `ggml-quants.c`, `dequantize_row_*`; the values have the bits that these give.

use candle_core::quantized::GgmlDType;
use half::f16;

use crate::simd::{Op, Simd};

/// Values of a K-block, and of any other.
const K_VALUES: usize = 256;
const VALUES: usize = 32;

/// Widens whole blocks.
pub(super) struct Widen<'a> {
    pub(super) dtype: GgmlDType,
    pub(super) blocks: &'a [u8],
    /// As many as the blocks have.
    pub(super) values: &'a mut [f32],
}

impl Widen<'_> {
    /// Whether blocks of this type are widened here.
    pub(super) fn takes(dtype: GgmlDType) -> bool {
        use GgmlDType::{Q4_0, Q4_1, Q4K, Q6K, Q8_0};
        matches!(dtype, Q4_0 | Q4_1 | Q8_0 | Q4K | Q6K)
    }
}

impl Op for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        match self.dtype {
            GgmlDType::Q4_0 => q4_0(self.blocks, self.values),
            GgmlDType::Q4_1 => q4_1(self.blocks, self.values),
            GgmlDType::Q8_0 => q8_0(self.blocks, self.values),
            GgmlDType::Q4K => q4_k(self.blocks, self.values),
            GgmlDType::Q6K => q6_k(self.blocks, self.values),
            other => unreachable!("{other:?} is not taken: this is a bug"),
        }
    }
}

/// A scale, 16 values in the low halves of 16 bytes, 16 in the high ones, from -8 on.
#[inline(always)]
fn q4_0(blocks: &[u8], values: &mut [f32]) {
    for (block, values) in blocks.chunks_exact(18).zip(values.chunks_exact_mut(VALUES)) {
        let scale = number(block, 0);
        let (low, high) = values.split_at_mut(VALUES / 2);
        for ((low, high), byte) in low.iter_mut().zip(high).zip(&block[2..]) {
            *low = (i32::from(byte & 15) - 8) as f32 * scale;
            *high = (i32::from(byte >> 4) - 8) as f32 * scale;
        }
    }
}

/// A scale and a minimum, and the values from 0 on.
#[inline(always)]
fn q4_1(blocks: &[u8], values: &mut [f32]) {
    for (block, values) in blocks.chunks_exact(20).zip(values.chunks_exact_mut(VALUES)) {
        let scale = number(block, 0);
        let minimum = number(block, 2);
        let (low, high) = values.split_at_mut(VALUES / 2);
        for ((low, high), byte) in low.iter_mut().zip(high).zip(&block[4..]) {
            *low = i32::from(byte & 15) as f32 * scale + minimum;
            *high = i32::from(byte >> 4) as f32 * scale + minimum;
        }
    }
}

/// A scale and 32 bytes with a sign.
#[inline(always)]
fn q8_0(blocks: &[u8], values: &mut [f32]) {
    for (block, values) in blocks.chunks_exact(34).zip(values.chunks_exact_mut(VALUES)) {
        let scale = number(block, 0);
        for (value, byte) in values.iter_mut().zip(&block[2..]) {
            *value = i32::from(*byte as i8) as f32 * scale;
        }
    }
}

/// A scale of scales and one of minima, twelve bytes of both for eight groups of 32, and four bits a value: the low halves of 32
/// bytes are one group, the high ones the next.
#[inline(always)]
fn q4_k(blocks: &[u8], values: &mut [f32]) {
    for (block, values) in blocks.chunks_exact(144).zip(values.chunks_exact_mut(K_VALUES)) {
        let scale = number(block, 0);
        let minimum = number(block, 2);
        let groups = values.chunks_exact_mut(64).zip(block[16..].chunks_exact(32));
        for (pair, (values, bytes)) in groups.enumerate() {
            let (low_scale, low_minimum) = scale_and_minimum(&block[4..16], 2 * pair);
            let (high_scale, high_minimum) = scale_and_minimum(&block[4..16], 2 * pair + 1);
            let (low_scale, low_minimum) = (scale * low_scale, minimum * low_minimum);
            let (high_scale, high_minimum) = (scale * high_scale, minimum * high_minimum);
            let (low, high) = values.split_at_mut(VALUES);
            for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
                *low = low_scale * i32::from(byte & 15) as f32 - low_minimum;
                *high = high_scale * i32::from(byte >> 4) as f32 - high_minimum;
            }
        }
    }
}

/// Six bits each, of one group among eight.
#[inline(always)]
fn scale_and_minimum(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, minimum) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let both = packed[group + 4];
        ((both & 15) | ((packed[group - 4] >> 6) << 4), (both >> 4) | ((packed[group] >> 6) << 4))
    };
    (f32::from(scale), f32::from(minimum))
}

/// Four low bits of each value, two high ones, sixteen scales with a sign, and a scale of scales. Each half of a block is four
/// groups of 32.
#[inline(always)]
fn q6_k(blocks: &[u8], values: &mut [f32]) {
    for (block, values) in blocks.chunks_exact(210).zip(values.chunks_exact_mut(K_VALUES)) {
        let scale = number(block, 208);
        for (half, values) in values.chunks_exact_mut(128).enumerate() {
            let low = &block[64 * half..][..64];
            let high = &block[128 + 32 * half..][..32];
            let scales = &block[192 + 8 * half..][..8];
            for (group, values) in values.chunks_exact_mut(32).enumerate() {
                let low = &low[32 * (group % 2)..][..32];
                let low_shift = 4 * (group / 2);
                let high_shift = 2 * group;
                for (part, values) in values.chunks_exact_mut(16).enumerate() {
                    let scale = scale * f32::from(scales[2 * group + part] as i8);
                    let bytes = low[16 * part..][..16].iter().zip(&high[16 * part..][..16]);
                    for (value, (low, high)) in values.iter_mut().zip(bytes) {
                        let bits = ((low >> low_shift) & 15) | (((high >> high_shift) & 3) << 4);
                        *value = scale * (i32::from(bits) - 32) as f32;
                    }
                }
            }
        }
    }
}

/// The f16 at `at`. By integers: a call for each block would take longer than the block.
#[inline(always)]
fn number(block: &[u8], at: usize) -> f32 {
    /// 2^112, by which the exponents of f32 and f16 are apart.
    const EXPONENTS: f32 = f32::from_bits(0x7780_0000);
    const INFINITE: u16 = 0x7c00;
    let bits = u16::from_le_bytes([block[at], block[at + 1]]);
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let sign = u32::from(bits & 0x8000) << 16;
    if bits & INFINITE == INFINITE {
        return f16::from_bits(bits).to_f32();
    }
    f32::from_bits((f32::from_bits(magnitude) * EXPONENTS).to_bits() | sign)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_16_bits_is_widened() {
        for bits in 0..=u16::MAX {
            let expected = f16::from_bits(bits).to_f32().to_bits();
            assert_eq!(number(&bits.to_le_bytes(), 0).to_bits(), expected, "{bits:#x}");
        }
    }
}
