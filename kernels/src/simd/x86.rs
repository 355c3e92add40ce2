//! The two vector types of x86-64, and how they are entered. Owns: intrinsics. Does not know: kernels. `Avx2` and `Avx512` are made only in `run_avx2` and `run_avx512`, whose callers
//! have asked the processor: that is why the calls of intrinsics in their methods are sound.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{E4M3_TO_F32, Field, INTEGER, Op, Simd};

/// # Safety
/// The processor must have AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run_avx2<O: Op>(op: O) -> O::Output {
    op.run(Avx2(()))
}

/// # Safety
/// The processor must have AVX-512 F and VL, AVX2, FMA and F16C.
#[target_feature(enable = "avx512f,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn run_avx512<O: Op>(op: O) -> O::Output {
    op.run(Avx512(()))
}

/// Eight lanes.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// Sixteen lanes.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

/// Methods that are one intrinsic each.
macro_rules! intrinsics {
    ($($name:ident($($arg:ident),*) = $intrinsic:ident;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: Self::V),*) -> Self::V {
            // SAFETY: `self` exists only where the processor has the instruction.
            unsafe { $intrinsic($($arg),*) }
        }
    )*};
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    type V = __m256;
    type Codebook = [__m256; 3];

    intrinsics! {
        add(a, b) = _mm256_add_ps;
        sub(a, b) = _mm256_sub_ps;
        mul(a, b) = _mm256_mul_ps;
        div(a, b) = _mm256_div_ps;
        max(a, b) = _mm256_max_ps;
        min(a, b) = _mm256_min_ps;
        fma(a, b, c) = _mm256_fmadd_ps;
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: `self` exists only where the processor has AVX2.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m256 {
        // SAFETY: the caller vouches for 8 values.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m256 {
        // SAFETY: the caller vouches for 8 values. A bf16 is the upper half of an f32.
        unsafe {
            let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m256 {
        // SAFETY: the caller vouches for 8 values.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> __m256 {
        // SAFETY: the caller vouches for 8 values.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: __m256) {
        // SAFETY: the caller vouches for 8 values.
        unsafe { _mm256_storeu_ps(to, v) }
    }
    #[inline(always)]
    fn round(self, v: __m256) -> __m256 {
        // SAFETY: `self` exists only where the processor has AVX2.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v) }
    }
    #[inline(always)]
    fn exp2_integral(self, n: __m256) -> __m256 {
        // SAFETY: `self` exists only where the processor has AVX2.
        unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        }
    }
    #[inline(always)]
    fn select_less(self, x: __m256, limit: __m256, below: __m256, above: __m256) -> __m256 {
        // SAFETY: `self` exists only where the processor has AVX2.
        unsafe { _mm256_blendv_ps(above, below, _mm256_cmp_ps::<_CMP_LT_OQ>(x, limit)) }
    }
    #[inline(always)]
    fn reduce4(self, v: [__m256; 4]) -> [f32; 4] {
        // SAFETY: `self` exists only where the processor has AVX2.
        unsafe { sum_columns(fold256(v[0]), fold256(v[1]), fold256(v[2]), fold256(v[3])) }
    }
    #[inline(always)]
    fn prefetch<T>(self, from: *const T) {
        // SAFETY: a prefetch reads nothing, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
    #[inline(always)]
    unsafe fn transpose8(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: passed on to the caller; `self` exists only where the processor has AVX2.
        unsafe { transpose8(from, from_stride, to, to_stride) }
    }
    #[inline(always)]
    unsafe fn splat_f16(self, from: *const u8) -> __m256 {
        // SAFETY: the caller vouches for two bytes; `self` exists only where the processor has AVX2 and F16C.
        unsafe { _mm256_cvtph_ps(_mm_set1_epi16(from.cast::<i16>().read_unaligned())) }
    }
    #[inline(always)]
    fn codebook(self, zero: __m256, scale: __m256, offset: __m256) -> [__m256; 3] {
        [zero, scale, offset]
    }
    #[inline(always)]
    unsafe fn nibbles_of_bytes(self, book: [__m256; 3], from: *const u8, shift: u32) -> __m256 {
        // SAFETY: the caller vouches for 8 bytes.
        let codes = unsafe { _mm256_cvtepi32_ps(field256(Field { from, shift, mask: 15 })) };
        self.fma(self.sub(codes, book[0]), book[1], book[2])
    }
    #[inline(always)]
    unsafe fn nibbles_of_words(self, book: [__m256; 3], from: *const u32, shift: u32) -> __m256 {
        // SAFETY: the caller vouches for 8 words.
        let codes = unsafe { _mm256_cvtepi32_ps(nibbles256(from, shift)) };
        self.fma(self.sub(codes, book[0]), book[1], book[2])
    }
    #[inline(always)]
    unsafe fn fields(self, low: Field, high: Field, at: u32) -> __m256 {
        // SAFETY: the caller vouches for 8 bytes of each.
        unsafe {
            let high = _mm256_sll_epi32(field256(high), _mm_cvtsi32_si128(at as i32));
            _mm256_cvtepi32_ps(_mm256_or_si256(field256(low), high))
        }
    }
    #[inline(always)]
    fn bytes_of(self, words: [u32; 4], first: usize) -> __m256 {
        // SAFETY: `self` exists only where the processor has AVX2.
        unsafe {
            let bytes = _mm_set_epi32(0, 0, words[first / 4 + 1] as i32, words[first / 4] as i32);
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))
        }
    }
    #[inline(always)]
    unsafe fn nibbles_and_bits(self, from: *const u8, shift: u32, word: u32) -> __m256 {
        // SAFETY: the caller vouches for 8 bytes.
        unsafe {
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let bits = _mm256_srlv_epi32(_mm256_set1_epi32(word as i32), lanes);
            let bits = _mm256_and_si256(_mm256_slli_epi32::<4>(bits), _mm256_set1_epi32(16));
            _mm256_cvtepi32_ps(_mm256_or_si256(field256(Field { from, shift, mask: 15 }), bits))
        }
    }
    #[inline(always)]
    unsafe fn nibble_pairs(self, low: *const u32, high: *const u32, shift: u32) -> __m256 {
        // SAFETY: the caller vouches for 8 words each.
        unsafe { _mm256_castsi256_ps(_mm256_or_si256(pairs256(low, high, shift), _mm256_set1_epi32(INTEGER as i32))) }
    }
    #[inline(always)]
    unsafe fn nibbles_e4m3(self, low: *const u32, high: *const u32, shift: u32) -> __m256 {
        // SAFETY: the caller vouches for 8 words each.
        unsafe {
            let codes = pairs256(low, high, shift);
            let sign = _mm256_slli_epi32::<24>(_mm256_and_si256(codes, _mm256_set1_epi32(0x80)));
            let magnitude = _mm256_slli_epi32::<20>(_mm256_and_si256(codes, _mm256_set1_epi32(0x7f)));
            _mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(sign, magnitude)), _mm256_set1_ps(E4M3_TO_F32))
        }
    }
}

impl Simd for Avx512 {
    const LANES: usize = 16;
    type V = __m512;
    /// The sixteen values.
    type Codebook = __m512;

    intrinsics! {
        add(a, b) = _mm512_add_ps;
        sub(a, b) = _mm512_sub_ps;
        mul(a, b) = _mm512_mul_ps;
        div(a, b) = _mm512_div_ps;
        max(a, b) = _mm512_max_ps;
        min(a, b) = _mm512_min_ps;
        fma(a, b, c) = _mm512_fmadd_ps;
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` exists only where the processor has AVX-512.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        // SAFETY: the caller vouches for 16 values.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m512 {
        // SAFETY: the caller vouches for 16 values. A bf16 is the upper half of an f32.
        unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m512 {
        // SAFETY: the caller vouches for 16 values.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> __m512 {
        // SAFETY: the caller vouches for 16 values.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: __m512) {
        // SAFETY: the caller vouches for 16 values.
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    fn round(self, v: __m512) -> __m512 {
        // SAFETY: `self` exists only where the processor has AVX-512.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v) }
    }
    #[inline(always)]
    fn exp2_integral(self, n: __m512) -> __m512 {
        // SAFETY: `self` exists only where the processor has AVX-512.
        unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }
    #[inline(always)]
    fn select_less(self, x: __m512, limit: __m512, below: __m512, above: __m512) -> __m512 {
        // SAFETY: `self` exists only where the processor has AVX-512.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, limit), above, below) }
    }
    #[inline(always)]
    fn reduce4(self, v: [__m512; 4]) -> [f32; 4] {
        // SAFETY: `self` exists only where the processor has AVX-512.
        unsafe { sum_columns(fold512(v[0]), fold512(v[1]), fold512(v[2]), fold512(v[3])) }
    }
    #[inline(always)]
    fn prefetch<T>(self, from: *const T) {
        // SAFETY: a prefetch reads nothing, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
    #[inline(always)]
    unsafe fn transpose8(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: passed on to the caller; `self` exists only where the processor has AVX2.
        unsafe { transpose8(from, from_stride, to, to_stride) }
    }
    #[inline(always)]
    unsafe fn splat_f16(self, from: *const u8) -> __m512 {
        // SAFETY: the caller vouches for two bytes; `self` exists only where the processor has AVX-512.
        unsafe { _mm512_cvtph_ps(_mm256_set1_epi16(from.cast::<i16>().read_unaligned())) }
    }
    #[inline(always)]
    fn codebook(self, zero: __m512, scale: __m512, offset: __m512) -> __m512 {
        // SAFETY: `self` exists only where the processor has AVX-512.
        let codes = unsafe {
            _mm512_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0)
        };
        self.fma(self.sub(codes, zero), scale, offset)
    }
    #[inline(always)]
    unsafe fn nibbles_of_bytes(self, book: __m512, from: *const u8, shift: u32) -> __m512 {
        // SAFETY: the caller vouches for 16 bytes. Bits above the lower four of an index do not count.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            _mm512_permutexvar_ps(_mm512_srl_epi32(bytes, _mm_cvtsi32_si128(shift as i32)), book)
        }
    }
    #[inline(always)]
    unsafe fn nibbles_of_words(self, book: __m512, from: *const u32, shift: u32) -> __m512 {
        // SAFETY: the caller vouches for 16 words. Bits above the lower four of an index do not count.
        unsafe {
            let words = _mm512_loadu_si512(from.cast());
            _mm512_permutexvar_ps(_mm512_srl_epi32(words, _mm_cvtsi32_si128(shift as i32)), book)
        }
    }
    #[inline(always)]
    unsafe fn fields(self, low: Field, high: Field, at: u32) -> __m512 {
        // SAFETY: the caller vouches for 16 bytes of each.
        unsafe {
            let high = _mm512_sll_epi32(field512(high), _mm_cvtsi32_si128(at as i32));
            _mm512_cvtepi32_ps(_mm512_or_si512(field512(low), high))
        }
    }
    #[inline(always)]
    fn bytes_of(self, words: [u32; 4], _: usize) -> __m512 {
        // SAFETY: `self` exists only where the processor has AVX-512.
        unsafe {
            let bytes = _mm_set_epi32(words[3] as i32, words[2] as i32, words[1] as i32, words[0] as i32);
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))
        }
    }
    #[inline(always)]
    unsafe fn nibbles_and_bits(self, from: *const u8, shift: u32, word: u32) -> __m512 {
        // SAFETY: the caller vouches for 16 bytes.
        unsafe {
            let nibbles = field512(Field { from, shift, mask: 15 });
            _mm512_cvtepi32_ps(_mm512_mask_or_epi32(nibbles, word as u16, nibbles, _mm512_set1_epi32(16)))
        }
    }
    #[inline(always)]
    unsafe fn nibble_pairs(self, low: *const u32, high: *const u32, shift: u32) -> __m512 {
        // SAFETY: the caller vouches for 16 words each.
        unsafe { _mm512_castsi512_ps(_mm512_or_si512(pairs512(low, high, shift), _mm512_set1_epi32(INTEGER as i32))) }
    }
    #[inline(always)]
    unsafe fn nibbles_e4m3(self, low: *const u32, high: *const u32, shift: u32) -> __m512 {
        // SAFETY: the caller vouches for 16 words each.
        unsafe {
            let codes = pairs512(low, high, shift);
            let sign = _mm512_slli_epi32::<24>(_mm512_and_si512(codes, _mm512_set1_epi32(0x80)));
            let magnitude = _mm512_slli_epi32::<20>(_mm512_and_si512(codes, _mm512_set1_epi32(0x7f)));
            _mm512_mul_ps(_mm512_castsi512_ps(_mm512_or_si512(sign, magnitude)), _mm512_set1_ps(E4M3_TO_F32))
        }
    }
}

/// # Safety
/// 8 bytes must be readable; the processor must have AVX2.
#[inline(always)]
unsafe fn field256(field: Field) -> __m256i {
    // SAFETY: passed on to the caller.
    unsafe {
        let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(field.from.cast()));
        let shifted = _mm256_srl_epi32(bytes, _mm_cvtsi32_si128(field.shift as i32));
        _mm256_and_si256(shifted, _mm256_set1_epi32(field.mask as i32))
    }
}

/// # Safety
/// 16 bytes must be readable; the processor must have AVX-512 F.
#[inline(always)]
unsafe fn field512(field: Field) -> __m512i {
    // SAFETY: passed on to the caller.
    unsafe {
        let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(field.from.cast()));
        let shifted = _mm512_srl_epi32(bytes, _mm_cvtsi32_si128(field.shift as i32));
        _mm512_and_si512(shifted, _mm512_set1_epi32(field.mask as i32))
    }
}

/// The four bits of each word at `shift`.
///
/// # Safety
/// 8 words at `from` must be readable; the processor must have AVX2.
#[inline(always)]
unsafe fn nibbles256(from: *const u32, shift: u32) -> __m256i {
    // SAFETY: passed on to the caller.
    unsafe {
        let words = _mm256_loadu_si256(from.cast());
        _mm256_and_si256(_mm256_srl_epi32(words, _mm_cvtsi32_si128(shift as i32)), _mm256_set1_epi32(15))
    }
}

/// Those of two words as one number.
///
/// # Safety
/// As for [`nibbles256`], of both.
#[inline(always)]
unsafe fn pairs256(low: *const u32, high: *const u32, shift: u32) -> __m256i {
    // SAFETY: passed on to the caller.
    unsafe { _mm256_or_si256(nibbles256(low, shift), _mm256_slli_epi32::<4>(nibbles256(high, shift))) }
}

/// The four bits of each word at `shift`.
///
/// # Safety
/// 16 words at `from` must be readable; the processor must have AVX-512 F.
#[inline(always)]
unsafe fn nibbles512(from: *const u32, shift: u32) -> __m512i {
    // SAFETY: passed on to the caller.
    unsafe {
        let words = _mm512_loadu_si512(from.cast());
        _mm512_and_si512(_mm512_srl_epi32(words, _mm_cvtsi32_si128(shift as i32)), _mm512_set1_epi32(15))
    }
}

/// Those of two words as one number.
///
/// # Safety
/// As for [`nibbles512`], of both.
#[inline(always)]
unsafe fn pairs512(low: *const u32, high: *const u32, shift: u32) -> __m512i {
    // SAFETY: passed on to the caller.
    unsafe { _mm512_or_si512(nibbles512(low, shift), _mm512_slli_epi32::<4>(nibbles512(high, shift))) }
}

/// # Safety
/// The processor must have AVX-512 F.
#[inline(always)]
unsafe fn fold512(v: __m512) -> __m128 {
    // SAFETY: passed on to the caller.
    unsafe {
        let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)));
        fold256(_mm256_add_ps(_mm512_castps512_ps256(v), upper))
    }
}

/// # Safety
/// The processor must have AVX.
#[inline(always)]
unsafe fn fold256(v: __m256) -> __m128 {
    // SAFETY: passed on to the caller.
    unsafe { _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v)) }
}

/// The sums of four vectors, each as `(v0 + v2) + (v1 + v3)`.
///
/// # Safety
/// The processor must have AVX.
#[inline(always)]
unsafe fn sum_columns(a: __m128, b: __m128, c: __m128, d: __m128) -> [f32; 4] {
    // SAFETY: passed on to the caller; `sums` holds the four values stored.
    unsafe {
        let ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
        let cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
        let total = _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
        let mut sums = [0f32; 4];
        _mm_storeu_ps(sums.as_mut_ptr(), total);
        sums
    }
}

/// [`Simd::transpose8`]: pairs of rows, then pairs of pairs, then halves change places.
///
/// # Safety
/// As for [`Simd::transpose8`]; the processor must have AVX2.
#[inline(always)]
unsafe fn transpose8(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut rows = [_mm256_setzero_ps(); 8];
        for i in 0..8 {
            rows[i] = _mm256_loadu_ps(from.add(i * from_stride));
        }
        let mut pairs = [_mm256_setzero_ps(); 8];
        for i in 0..4 {
            pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
        }
        let mut quads = [_mm256_setzero_ps(); 8];
        for i in 0..2 {
            let (a, b, c, d) = (pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]);
            quads[4 * i] = _mm256_shuffle_ps::<0x44>(a, c);
            quads[4 * i + 1] = _mm256_shuffle_ps::<0xee>(a, c);
            quads[4 * i + 2] = _mm256_shuffle_ps::<0x44>(b, d);
            quads[4 * i + 3] = _mm256_shuffle_ps::<0xee>(b, d);
        }
        for i in 0..4 {
            let low = _mm256_permute2f128_ps::<0x20>(quads[i], quads[i + 4]);
            let high = _mm256_permute2f128_ps::<0x31>(quads[i], quads[i + 4]);
            _mm256_storeu_ps(to.add(i * to_stride), low);
            _mm256_storeu_ps(to.add((i + 4) * to_stride), high);
        }
    }
}
