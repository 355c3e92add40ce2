//! ggml's blocks widened to f32 in vector registers: small integers with scales that a group of them shares.
//!
//! Owns: the layouts, each by what its parts share ([`Format::head`]) and by a part's values, which whoever asked is given vector
//! by vector ([`Sink`]). Does not know: matrices. Source: ggml `ggml-quants.c`, `dequantize_row_*`; the values have the bits that these give. Products of
//! scales and integers are exact in f32, so that it does not matter whether they are rounded before a minimum is taken off.

use crate::simd::{Field, Simd};

/// Values of a K-block, and of any other.
const K_VALUES: usize = 256;
const VALUES: usize = 32;

/// What is done with values.
pub(super) trait Sink<S: Simd> {
    /// `values` are those from the one at `at` on, counted from where the sink begins.
    ///
    /// # Safety
    /// The place must be one that the sink has.
    unsafe fn take(&mut self, s: S, at: usize, values: S::V);
}

/// A layout of blocks. A block is widened in parts, so that several rows can be added side by side, after what all parts need
/// of it has been computed once.
pub(super) trait Format: Copy + Send + Sync + 'static {
    /// Values of a block.
    const VALUES: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// Values of a part.
    const PART: usize;
    /// What all parts need.
    type Head: Copy;

    /// # Safety
    /// A whole block must be readable.
    unsafe fn head<S: Simd>(s: S, block: *const u8) -> Self::Head;

    /// Gives the values of a part to `sink` in their order.
    ///
    /// # Safety
    /// As for [`Format::head`]; the part must be one of the block's, and the sink have a place for each of its values.
    unsafe fn part<S: Simd, K: Sink<S>>(s: S, block: *const u8, head: &Self::Head, part: usize, sink: &mut K);
}

/// Calls `$body` with `$format` as the layout of a type that [`super::QuantisedMatrix::takes`].
macro_rules! with_format {
    ([$($name:ident)*] $dtype:expr, $format:ident => $body:expr) => {{
        use candle_core::quantized::GgmlDType;
        use $crate::linear::blocks;
        match $dtype {
            $(GgmlDType::$name => {
                type $format = blocks::$name;
                $body
            })*
            other => unreachable!("`QuantisedMatrix::new` refuses {other:?}: this is a bug"),
        }
    }};
    ($dtype:expr, $format:ident => $body:expr) => {
        with_format!([Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2K Q3K Q4K Q5K Q6K] $dtype, $format => $body)
    };
}
pub(super) use with_format;

/// Changes no value that it is added to.
const NOTHING: f32 = -0.0;

/// A scale, 16 values in the low halves of 16 bytes, 16 in the high ones, from -8 on.
#[derive(Clone, Copy)]
pub(super) struct Q4_0;

impl Format for Q4_0 {
    const VALUES: usize = VALUES;
    const BYTES: usize = 18;
    const PART: usize = VALUES;
    type Head = ();

    #[inline(always)]
    unsafe fn head<S: Simd>(_: S, _: *const u8) {}

    #[inline(always)]
    unsafe fn part<S: Simd, K: Sink<S>>(s: S, block: *const u8, (): &(), _: usize, sink: &mut K) {
        // SAFETY: a scale of two bytes, then 16 more.
        unsafe {
            let book = s.codebook(s.splat(8.0), s.splat_f16(block), s.splat(NOTHING));
            nibbles(s, [book, book], block.add(2), 16, sink);
        }
    }
}

/// A scale and a minimum, and the values from 0 on.
#[derive(Clone, Copy)]
pub(super) struct Q4_1;

impl Format for Q4_1 {
    const VALUES: usize = VALUES;
    const BYTES: usize = 20;
    const PART: usize = VALUES;
    type Head = ();

    #[inline(always)]
    unsafe fn head<S: Simd>(_: S, _: *const u8) {}

    #[inline(always)]
    unsafe fn part<S: Simd, K: Sink<S>>(s: S, block: *const u8, (): &(), _: usize, sink: &mut K) {
        // SAFETY: two numbers of two bytes, then 16 more.
        unsafe {
            let book = s.codebook(s.splat(0.0), s.splat_f16(block), s.splat_f16(block.add(2)));
            nibbles(s, [book, book], block.add(4), 16, sink);
        }
    }
}

/// [`Q4_0`] with a fifth bit of each value, from -16 on: 32 of them follow the scale.
#[derive(Clone, Copy)]
pub(super) struct Q5_0;

impl Format for Q5_0 {
    const VALUES: usize = VALUES;
    const BYTES: usize = 22;
    const PART: usize = VALUES;
    type Head = ();

    #[inline(always)]
    unsafe fn head<S: Simd>(_: S, _: *const u8) {}

    #[inline(always)]
    unsafe fn part<S: Simd, K: Sink<S>>(s: S, block: *const u8, (): &(), _: usize, sink: &mut K) {
        // SAFETY: a scale of two bytes, then 20 more.
        unsafe {
            let scale = s.splat_f16(block);
            let scaled = Scaled { scale, zero: s.splat(16.0), offset: s.splat(NOTHING) };
            five_bits(s, scaled, block.add(2), sink);
        }
    }
}

/// [`Q4_1`] with a fifth bit of each value: 32 of them follow the minimum.
#[derive(Clone, Copy)]
pub(super) struct Q5_1;

impl Format for Q5_1 {
    const VALUES: usize = VALUES;
    const BYTES: usize = 24;
    const PART: usize = VALUES;
    type Head = ();

    #[inline(always)]
    unsafe fn head<S: Simd>(_: S, _: *const u8) {}

    #[inline(always)]
    unsafe fn part<S: Simd, K: Sink<S>>(s: S, block: *const u8, (): &(), _: usize, sink: &mut K) {
        // SAFETY: two numbers of two bytes, then 20 more.
        unsafe {
            let (scale, offset) = (s.splat_f16(block), s.splat_f16(block.add(2)));
            five_bits(s, Scaled { scale, zero: s.splat(0.0), offset }, block.add(4), sink);
        }
    }
}

/// A scale and 32 bytes with a sign.
#[derive(Clone, Copy)]
pub(super) struct Q8_0;

impl Format for Q8_0 {
    const VALUES: usize = VALUES;
    const BYTES: usize = 34;
    const PART: usize = VALUES;
    type Head = ();

    #[inline(always)]
    unsafe fn head<S: Simd>(_: S, _: *const u8) {}

    #[inline(always)]
    unsafe fn part<S: Simd, K: Sink<S>>(s: S, block: *const u8, (): &(), _: usize, sink: &mut K) {
        // SAFETY: a scale of two bytes, then 32 more.
        unsafe {
            let scale = s.splat_f16(block);
            let mut at = 0;
            while at < VALUES {
                sink.take(s, at, s.mul(s.load_i8(block.add(2 + at).cast()), scale));
                at += S::LANES;
            }
        }
    }
}

/// Sixteen bytes of scales and minima, four bits each, of groups of 16, two bits a value, then the scale of scales and the one of
/// minima. Each half of a block has its values in the same 32 bytes, four groups of 32 one above the other.
#[derive(Clone, Copy)]
pub(super) struct Q2K;

impl Format for Q2K {
    const VALUES: usize = K_VALUES;
    const BYTES: usize = 84;
    const PART: usize = VALUES;
    /// Scales, and minima with the other sign.
    type Head = [f32; 32];

    #[inline(always)]
    unsafe fn head<S: Simd>(s: S, block: *const u8) -> [f32; 32] {
        // SAFETY: 16 bytes of scales; the two numbers are the last four.
        unsafe {
            let (mut scales, mut minima) = ([0i8; 16], [0i8; 16]);
            for i in 0..16 {
                let both = *block.add(i);
                (scales[i], minima[i]) = ((both & 15) as i8, (both >> 4) as i8);
            }
            let mut head = [0f32; 32];
            store_scaled(s, s.splat_f16(block.add(80)), &scales, head[..16].as_mut_ptr());
            store_scaled(s, negative(s, s.splat_f16(block.add(82))), &minima, head[16..].as_mut_ptr());
            head
        }
    }

    #[inline(always)]
    unsafe fn part<S: Simd, K: Sink<S>>(s: S, block: *const u8, head: &[f32; 32], part: usize, sink: &mut K) {
        // SAFETY: of 64 bytes, 32 for each half of the block; scales and minima of 16 groups.
        unsafe {
            let bytes = block.add(16 + 32 * (part / 4));
            let shift = 2 * (part % 4) as u32;
            let mut at = 0;
            while at < VALUES {
                let group = 2 * part + at / 16;
                let (scale, offset) = (*head.get_unchecked(group), *head.get_unchecked(16 + group));
                let low = Field { from: bytes.add(at), shift, mask: 3 };
                let code = s.fields(low, Field { mask: 0, ..low }, 0);
                sink.take(s, at, s.fma(code, s.splat(scale), s.splat(offset)));
                at += S::LANES;
            }
        }
    }
}

/// 32 bytes of third bits, two bits a value as in [`Q2K`], sixteen scales of six bits from -32 on, and a scale of scales; a value
/// is from -4 on.
#[derive(Clone, Copy)]
pub(super) struct Q3K;

impl Format for Q3K {
    const VALUES: usize = K_VALUES;
    const BYTES: usize = 110;
    const PART: usize = VALUES;
    type Head = [f32; 16];

    #[inline(always)]
    unsafe fn head<S: Simd>(s: S, block: *const u8) -> [f32; 16] {
        // SAFETY: twelve bytes of scales before the last two.
        unsafe {
            let packed = block.add(96);
            let mut scales = [0i8; 16];
            for i in 0..16 {
                let low = *packed.add(i % 8) >> (4 * (i / 8)) & 15;
                let high = *packed.add(8 + i % 4) >> (2 * (i / 4)) & 3;
                scales[i] = (low | high << 4) as i8 - 32;
            }
            let mut head = [0f32; 16];
            store_scaled(s, s.splat_f16(block.add(108)), &scales, head.as_mut_ptr());
            head
        }
    }

    #[inline(always)]
    unsafe fn part<S: Simd, K: Sink<S>>(s: S, block: *const u8, head: &[f32; 16], part: usize, sink: &mut K) {
        // SAFETY: 32 bytes of third bits, then 64 bytes as in `Q2K`; 16 scales.
        unsafe {
            let bytes = block.add(32 + 32 * (part / 4));
            let mut at = 0;
            while at < VALUES {
                let scale = s.splat(*head.get_unchecked(2 * part + at / 16));
                let low = Field { from: bytes.add(at), shift: 2 * (part % 4) as u32, mask: 3 };
                let high = Field { from: block.add(at), shift: part as u32, mask: 1 };
                sink.take(s, at, s.mul(s.sub(s.fields(low, high, 2), s.splat(4.0)), scale));
                at += S::LANES;
            }
        }
    }
}

/// A scale of scales and one of minima, twelve bytes of both for eight groups of 32, and four bits a value: the low halves of 32
/// bytes are one group, the high ones the next.
#[derive(Clone, Copy)]
pub(super) struct Q4K;

impl Format for Q4K {
    const VALUES: usize = K_VALUES;
    const BYTES: usize = 144;
    const PART: usize = 2 * VALUES;
    type Head = [f32; 16];

    #[inline(always)]
    unsafe fn head<S: Simd>(s: S, block: *const u8) -> [f32; 16] {
        // SAFETY: 16 bytes.
        unsafe { scales_and_minima(s, block) }
    }

    #[inline(always)]
    unsafe fn part<S: Simd, K: Sink<S>>(s: S, block: *const u8, head: &[f32; 16], part: usize, sink: &mut K) {
        // SAFETY: 32 bytes for each of four pairs of groups; eight scales and minima.
        unsafe {
            let mut books = [s.codebook(s.splat(0.0), s.splat(0.0), s.splat(0.0)); 2];
            for half in 0..2 {
                let group = 2 * part + half;
                let (scale, offset) = (*head.get_unchecked(group), *head.get_unchecked(8 + group));
                books[half] = s.codebook(s.splat(0.0), s.splat(scale), s.splat(offset));
            }
            nibbles(s, books, block.add(16 + 32 * part), 32, sink);
        }
    }
}

/// [`Q4K`] with a fifth bit of each value: 32 bytes after the scales have one for each group.
#[derive(Clone, Copy)]
pub(super) struct Q5K;

impl Format for Q5K {
    const VALUES: usize = K_VALUES;
    const BYTES: usize = 176;
    const PART: usize = VALUES;
    type Head = [f32; 16];

    #[inline(always)]
    unsafe fn head<S: Simd>(s: S, block: *const u8) -> [f32; 16] {
        // SAFETY: 16 bytes.
        unsafe { scales_and_minima(s, block) }
    }

    #[inline(always)]
    unsafe fn part<S: Simd, K: Sink<S>>(s: S, block: *const u8, head: &[f32; 16], part: usize, sink: &mut K) {
        // SAFETY: 32 bytes of fifth bits, then 32 for each of four pairs of groups; eight scales and minima.
        unsafe {
            let (scale, offset) = (s.splat(*head.get_unchecked(part)), s.splat(*head.get_unchecked(8 + part)));
            let bytes = block.add(48 + 32 * (part / 2));
            let mut at = 0;
            while at < VALUES {
                let low = Field { from: bytes.add(at), shift: 4 * (part % 2) as u32, mask: 15 };
                let high = Field { from: block.add(16 + at), shift: part as u32, mask: 1 };
                sink.take(s, at, s.fma(s.fields(low, high, 4), scale, offset));
                at += S::LANES;
            }
        }
    }
}

/// Four low bits of each value, two high ones, sixteen scales with a sign, and a scale of scales; a value is from -32 on. Each
/// half of a block is four groups of 32.
#[derive(Clone, Copy)]
pub(super) struct Q6K;

impl Format for Q6K {
    const VALUES: usize = K_VALUES;
    const BYTES: usize = 210;
    const PART: usize = VALUES;
    type Head = [f32; 16];

    #[inline(always)]
    unsafe fn head<S: Simd>(s: S, block: *const u8) -> [f32; 16] {
        // SAFETY: 16 bytes of scales before the last two.
        unsafe {
            let mut head = [0f32; 16];
            let scales = block.add(192).cast::<[i8; 16]>().read();
            store_scaled(s, s.splat_f16(block.add(208)), &scales, head.as_mut_ptr());
            head
        }
    }

    #[inline(always)]
    unsafe fn part<S: Simd, K: Sink<S>>(s: S, block: *const u8, head: &[f32; 16], part: usize, sink: &mut K) {
        // SAFETY: 64 bytes of low bits for each half, then 32 of high ones; 16 scales.
        unsafe {
            let (half, group) = (part / 4, part % 4);
            let (low, high) = (block.add(64 * half + 32 * (group % 2)), block.add(128 + 32 * half));
            let mut at = 0;
            while at < VALUES {
                let scale = s.splat(*head.get_unchecked(2 * part + at / 16));
                let low = Field { from: low.add(at), shift: 4 * (group / 2) as u32, mask: 15 };
                let high = Field { from: high.add(at), shift: 2 * group as u32, mask: 3 };
                sink.take(s, at, s.mul(s.sub(s.fields(low, high, 4), s.splat(32.0)), scale));
                at += S::LANES;
            }
        }
    }
}

/// The low halves of `len` bytes by the first codebook, then the high ones by the second.
///
/// # Safety
/// `len` bytes, whole vectors, must be readable, and the sink have a place for twice as many values.
#[inline(always)]
unsafe fn nibbles<S: Simd, K: Sink<S>>(s: S, books: [S::Codebook; 2], bytes: *const u8, len: usize, sink: &mut K) {
    for half in 0..2 {
        let mut at = 0;
        while at < len {
            // SAFETY: passed on to the caller.
            unsafe {
                sink.take(s, half * len + at, s.nibbles_of_bytes(books[half], bytes.add(at), 4 * half as u32));
            }
            at += S::LANES;
        }
    }
}

/// `(code - zero) * scale + offset`.
struct Scaled<V> {
    zero: V,
    scale: V,
    offset: V,
}

/// Four bytes of fifth bits, then 16 values in the low halves of 16 bytes and 16 in the high ones.
///
/// # Safety
/// 20 bytes must be readable, and the sink have a place for 32 values.
#[inline(always)]
unsafe fn five_bits<S: Simd, K: Sink<S>>(s: S, scaled: Scaled<S::V>, bytes: *const u8, sink: &mut K) {
    // SAFETY: passed on to the caller.
    unsafe {
        let bits = word(bytes);
        for half in 0..2 {
            let mut at = 0;
            while at < VALUES / 2 {
                let place = half * VALUES / 2 + at;
                let code = s.nibbles_and_bits(bytes.add(4 + at), 4 * half as u32, bits >> place);
                sink.take(s, place, s.fma(s.sub(code, scaled.zero), scaled.scale, scaled.offset));
                at += S::LANES;
            }
        }
    }
}

/// Of eight groups, the minima behind the scales and with the other sign.
///
/// # Safety
/// 16 bytes must be readable: the scale of scales, that of minima, six bits each of both.
#[inline(always)]
unsafe fn scales_and_minima<S: Simd>(s: S, block: *const u8) -> [f32; 16] {
    const SIX: u32 = 0x3f3f_3f3f;
    const FOUR: u32 = 0x0f0f_0f0f;
    const TWO: u32 = 0x0303_0303;
    const PLACES: [f32; 16] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];
    // SAFETY: passed on to the caller.
    unsafe {
        let (scales, minima, both) = (word(block.add(4)), word(block.add(8)), word(block.add(12)));
        let words = [
            scales & SIX,
            (both & FOUR) | (scales >> 6 & TWO) << 4,
            minima & SIX,
            (both >> 4 & FOUR) | (minima >> 6 & TWO) << 4,
        ];
        let (scale, minimum) = (s.splat_f16(block), negative(s, s.splat_f16(block.add(2))));
        let mut head = [0f32; 16];
        let mut at = 0;
        while at < 16 {
            let factor = s.select_less(s.load(PLACES[at..].as_ptr()), s.splat(8.0), scale, minimum);
            s.store(head[at..].as_mut_ptr(), s.mul(s.bytes_of(words, at), factor));
            at += S::LANES;
        }
        head
    }
}

/// # Safety
/// Four bytes must be readable.
#[inline(always)]
unsafe fn word(from: *const u8) -> u32 {
    // SAFETY: passed on to the caller.
    u32::from_le_bytes(unsafe { from.cast::<[u8; 4]>().read() })
}

/// Sixteen products with `scale`.
///
/// # Safety
/// Sixteen values at `to` must be writable.
#[inline(always)]
unsafe fn store_scaled<S: Simd>(s: S, scale: S::V, numbers: &[i8; 16], to: *mut f32) {
    let mut at = 0;
    while at < 16 {
        // SAFETY: sixteen numbers; passed on to the caller.
        unsafe { s.store(to.add(at), s.mul(s.load_i8(numbers[at..].as_ptr()), scale)) };
        at += S::LANES;
    }
}

/// Exact, zeros included.
#[inline(always)]
fn negative<S: Simd>(s: S, v: S::V) -> S::V {
    s.mul(v, s.splat(-1.0))
}
