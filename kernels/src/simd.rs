//! Vectors of f32 in three widths: AVX-512, AVX2 and portable Rust.
//!
//! Owns: the vector operations that the kernels are written in, the choice of instruction set. Does not know: tensors,
//! threads. A kernel is written once as an [`Op`], generic over [`Simd`], and [`dispatch`] compiles it for every
//! instruction set and runs the widest that the processor has.
//!
//! Everything generic over [`Simd`] must be `#[inline(always)]` and free of closures: only code inlined into the
//! functions with `#[target_feature]` of `x86.rs` may use their instructions.
//!
//! `TALE_KERNELS_ISA=portable|avx2|avx512` in the environment takes a narrower set than the processor has (results of
//! different sets differ in the last bits).

use std::sync::OnceLock;

use half::{bf16, f16};

/// Widest vector of all instruction sets, in f32 lanes. Scratch rows are padded to it.
pub(crate) const MAX_LANES: usize = 16;

/// f32 vectors of one instruction set. A value of an implementing type is the proof that the processor has it.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// f32 values in a vector.
    const LANES: usize;
    /// The vector.
    type V: Copy;
    /// See [`Simd::codebook`].
    type Codebook: Copy;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::V;
    /// # Safety
    /// `LANES` values at `from` must be readable.
    unsafe fn load(self, from: *const f32) -> Self::V;
    /// # Safety
    /// `LANES` values at `from` must be readable.
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V;
    /// # Safety
    /// `LANES` values at `from` must be readable.
    unsafe fn load_f16(self, from: *const f16) -> Self::V;
    /// # Safety
    /// `LANES` values at `from` must be readable.
    unsafe fn load_i8(self, from: *const i8) -> Self::V;
    /// # Safety
    /// `LANES` values at `to` must be writable.
    unsafe fn store(self, to: *mut f32, v: Self::V);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the processor can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Nearest integers.
    fn round(self, v: Self::V) -> Self::V;
    /// `2^n` for integral n in -126..=127.
    fn exp2_integral(self, n: Self::V) -> Self::V;
    /// `below` where `x < limit`, else `above`.
    fn select_less(self, x: Self::V, limit: Self::V, below: Self::V, above: Self::V) -> Self::V;
    /// The sum of each vector's lanes; every one is added in the same order, whatever the others hold.
    fn reduce4(self, v: [Self::V; 4]) -> [f32; 4];
    /// Asks for the cache line at `from`, which may be any address; nothing happens where there is no such instruction.
    fn prefetch<T>(self, from: *const T);
    /// Eight rows of eight values, `from_stride` apart, become eight rows `to_stride` apart of the transposed square.
    /// # Safety
    /// Eight values of each row at `from` must be readable, eight at each row of `to` writable.
    unsafe fn transpose8(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize);
    /// The f16 whose two bytes, the lower one first, are at `from`, in every lane.
    /// # Safety
    /// Two bytes at `from` must be readable.
    unsafe fn splat_f16(self, from: *const u8) -> Self::V;
    /// What the numbers of four bits stand for: `(number - zero) * scale + offset`. The product must be exact, or `offset` -0, which
    /// changes no value: it may or may not be rounded before the sum.
    fn codebook(self, zero: Self::V, scale: Self::V, offset: Self::V) -> Self::Codebook;
    /// What the four bits of each byte at `shift`, 0 or 4, stand for.
    /// # Safety
    /// `LANES` bytes at `from` must be readable.
    unsafe fn nibbles_of_bytes(self, book: Self::Codebook, from: *const u8, shift: u32) -> Self::V;
    /// What the four bits of each word at `shift` stand for.
    /// # Safety
    /// `LANES` words at `from` must be readable.
    unsafe fn nibbles_of_words(self, book: Self::Codebook, from: *const u32, shift: u32) -> Self::V;
    /// Numbers whose lower bits are one field of bytes, and those from `at` on another.
    /// # Safety
    /// `LANES` bytes of each must be readable.
    unsafe fn fields(self, low: Field, high: Field, at: u32) -> Self::V;
    /// `LANES` of sixteen bytes without a sign from the one at `first` on, the lowest of a word first. (From registers: bytes that
    /// were just written one by one could not be loaded together before they are in the cache.)
    fn bytes_of(self, words: [u32; 4], first: usize) -> Self::V;
    /// Numbers of five bits: four of each byte at `shift`, 0 or 4, and for lane i bit i of `word`.
    /// # Safety
    /// `LANES` bytes at `from` must be readable.
    unsafe fn nibbles_and_bits(self, from: *const u8, shift: u32, word: u32) -> Self::V;
    /// 2^23 and the eight bits of which those at `low` are the lower four.
    /// # Safety
    /// `LANES` words at `low` and `high` must be readable.
    unsafe fn nibble_pairs(self, low: *const u32, high: *const u32, shift: u32) -> Self::V;
    /// Likewise the float of which these are the bits (`torch.float8_e4m3fn`); NaN is 480.
    /// # Safety
    /// As for [`Simd::nibble_pairs`].
    unsafe fn nibbles_e4m3(self, low: *const u32, high: *const u32, shift: u32) -> Self::V;

    /// The first lane.
    #[inline(always)]
    fn first(self, v: Self::V) -> f32 {
        let mut lanes = [0f32; MAX_LANES];
        // SAFETY: `lanes` holds a whole vector.
        unsafe { self.store(lanes.as_mut_ptr(), v) };
        lanes[0]
    }

    /// `n < LANES` values, zero in the other lanes.
    /// # Safety
    /// `n` values at `from` must be readable.
    #[inline(always)]
    unsafe fn load_partial(self, from: *const f32, n: usize) -> Self::V {
        let mut lanes = [0f32; MAX_LANES];
        // SAFETY: the caller vouches for `n` values; `lanes` holds a whole vector.
        unsafe {
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n);
            self.load(lanes.as_ptr())
        }
    }

    /// Stores the first `n <= LANES` lanes.
    /// # Safety
    /// `n` values at `to` must be writable.
    #[inline(always)]
    unsafe fn store_partial(self, to: *mut f32, v: Self::V, n: usize) {
        let mut lanes = [0f32; MAX_LANES];
        // SAFETY: the caller vouches for `n` values; `lanes` holds a whole vector.
        unsafe {
            self.store(lanes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n);
        }
    }

    /// The sum of the lanes, added in the order of [`Simd::reduce4`].
    #[inline(always)]
    fn reduce(self, v: Self::V) -> f32 {
        let zero = self.splat(0.0);
        self.reduce4([v, zero, zero, zero])[0]
    }

    /// The largest lane.
    #[inline(always)]
    fn reduce_max(self, v: Self::V) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; MAX_LANES];
        // SAFETY: `lanes` holds a whole vector.
        unsafe { self.store(lanes.as_mut_ptr(), v) };
        let mut max = lanes[0];
        let mut lane = 1;
        while lane < Self::LANES {
            max = if lanes[lane] > max { lanes[lane] } else { max };
            lane += 1;
        }
        max
    }
}

/// Some bits of each of `LANES` bytes.
#[derive(Clone, Copy)]
pub(crate) struct Field {
    /// The first byte.
    pub(crate) from: *const u8,
    /// Bits below.
    pub(crate) shift: u32,
    /// Of the field, after the shift.
    pub(crate) mask: u32,
}

/// A value that matrices are stored in, widened to f32 as it is read.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// # Safety
    /// `S::LANES` values at `from` must be readable.
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V;

    /// One value.
    fn widen(self) -> f32;

    /// One value in every lane.
    #[inline(always)]
    fn splat<S: Simd>(self, s: S) -> S::V {
        s.splat(self.widen())
    }

    /// `n <= LANES` values, zero in the other lanes.
    /// # Safety
    /// `n` values at `from` must be readable.
    #[inline(always)]
    unsafe fn load_partial<S: Simd>(s: S, from: *const Self, n: usize) -> S::V {
        let mut lanes = [0f32; MAX_LANES];
        let mut lane = 0;
        while lane < n {
            // SAFETY: `lane < n`, and the caller vouches for `n` values.
            lanes[lane] = unsafe { *from.add(lane) }.widen();
            lane += 1;
        }
        // SAFETY: `lanes` holds a whole vector.
        unsafe { s.load(lanes.as_ptr()) }
    }
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { s.load(from) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { s.load_bf16(from) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Element for i8 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { s.load_i8(from) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { s.load_f16(from) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn splat<S: Simd>(self, s: S) -> S::V {
        // SAFETY: two bytes.
        unsafe { s.splat_f16(self.to_le_bytes().as_ptr()) }
    }
}

/// A kernel for one thread, generic over the instruction set. `run` must be `#[inline(always)]`.
pub(crate) trait Op {
    /// What it returns.
    type Output;
    /// The kernel.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Instruction sets, narrow to wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, 8 lanes that the compiler maps to what the target has.
    Portable,
    /// AVX2 with FMA and F16C, 8 lanes.
    Avx2,
    /// AVX-512 F and VL, 16 lanes.
    Avx512,
}

/// The instruction set that the kernels use: the widest of the processor, or a narrower one by `TALE_KERNELS_ISA`.
pub fn isa() -> Isa {
    static CHOSEN: OnceLock<Isa> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let widest = detect();
        match std::env::var("TALE_KERNELS_ISA").as_deref() {
            Ok("portable") => Isa::Portable,
            Ok("avx2") => widest.min(Isa::Avx2),
            _ => widest,
        }
    })
}

fn detect() -> Isa {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
        // VL is not called for by name: without it half of the 32 registers could not hold what is later halved.
        let wide = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl");
        return if wide { Isa::Avx512 } else { Isa::Avx2 };
    }
    Isa::Portable
}

/// Runs `op` with the instruction set of [`isa`].
pub(crate) fn dispatch<O: Op>(op: O) -> O::Output {
    match isa() {
        // SAFETY: `isa` is never wider than what the processor was found to have.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::run_avx512(op) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::run_avx2(op) },
        _ => op.run(Portable),
    }
}

/// Eight lanes in plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// Applies an expression lane by lane.
macro_rules! lanes {
    (|$lane:ident| $value:expr) => {{
        let mut v = [0f32; 8];
        let mut $lane = 0;
        while $lane < 8 {
            v[$lane] = $value;
            $lane += 1;
        }
        v
    }};
}

/// Bits of 2^23, whose last bit is worth 1.
const INTEGER: u32 = 0x4b00_0000;
/// From the exponent's bias of `float8_e4m3fn` to that of f32: 2^120. Numbers without an exponent come out right too.
const E4M3_TO_F32: f32 = f32::from_bits(247 << 23);

/// A float of e4m3 by its code. Exact: as an f32 of these bits it is 2^120 times too small.
#[inline(always)]
pub(crate) fn e4m3_to_f32(code: u32) -> f32 {
    f32::from_bits((code & 0x80) << 24 | (code & 0x7f) << 20) * E4M3_TO_F32
}

/// Four bits of two words as one number.
#[inline(always)]
fn pair_of_nibbles(low: u32, high: u32, shift: u32) -> u32 {
    low >> shift & 15 | (high >> shift & 15) << 4
}

impl Simd for Portable {
    const LANES: usize = 8;
    type V = [f32; 8];
    type Codebook = [[f32; 8]; 3];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::V {
        // SAFETY: the caller vouches for 8 values; the read does not ask for alignment.
        unsafe { from.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V {
        // SAFETY: the caller vouches for 8 values.
        lanes!(|i| unsafe { *from.add(i) }.to_f32())
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> Self::V {
        // SAFETY: the caller vouches for 8 values.
        lanes!(|i| unsafe { *from.add(i) }.to_f32())
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> Self::V {
        // SAFETY: the caller vouches for 8 values.
        lanes!(|i| f32::from(unsafe { *from.add(i) }))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: Self::V) {
        // SAFETY: the caller vouches for 8 values; the write does not ask for alignment.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(v) }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        lanes!(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        lanes!(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        lanes!(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        lanes!(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        lanes!(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        lanes!(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Without an FMA instruction `mul_add` is a slow library call.
        if cfg!(target_arch = "aarch64") {
            lanes!(|i| a[i].mul_add(b[i], c[i]))
        } else {
            lanes!(|i| a[i] * b[i] + c[i])
        }
    }
    #[inline(always)]
    fn round(self, v: Self::V) -> Self::V {
        // Adding and subtracting 1.5 * 2^23 rounds to nearest; larger values are integral already.
        const MAGIC: f32 = 12_582_912.0;
        lanes!(|i| if v[i].abs() < 4_194_304.0 { (v[i] + MAGIC) - MAGIC } else { v[i] })
    }
    #[inline(always)]
    fn exp2_integral(self, n: Self::V) -> Self::V {
        lanes!(|i| f32::from_bits(((n[i] as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    fn select_less(self, x: Self::V, limit: Self::V, below: Self::V, above: Self::V) -> Self::V {
        lanes!(|i| if x[i] < limit[i] { below[i] } else { above[i] })
    }
    #[inline(always)]
    fn reduce4(self, v: [Self::V; 4]) -> [f32; 4] {
        let mut sums = [0f32; 4];
        let mut i = 0;
        while i < 4 {
            let v = v[i];
            sums[i] = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
            i += 1;
        }
        sums
    }
    #[inline(always)]
    fn prefetch<T>(self, _from: *const T) {}
    #[inline(always)]
    unsafe fn transpose8(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        for row in 0..8 {
            for column in 0..8 {
                // SAFETY: inside the two squares that the caller vouches for.
                unsafe { *to.add(column * to_stride + row) = *from.add(row * from_stride + column) };
            }
        }
    }
    #[inline(always)]
    unsafe fn splat_f16(self, from: *const u8) -> Self::V {
        /// 2^112, by which the exponents of f32 and f16 are apart.
        const EXPONENTS: f32 = f32::from_bits(0x7780_0000);
        const INFINITE: u16 = 0x7c00;
        // SAFETY: the caller vouches for two bytes.
        let bits = u16::from_le_bytes(unsafe { from.cast::<[u8; 2]>().read() });
        if bits & INFINITE == INFINITE {
            return [f16::from_bits(bits).to_f32(); 8];
        }
        // By integers, since a call for each would take longer than what is done with it.
        let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * EXPONENTS;
        [f32::from_bits(magnitude.to_bits() | u32::from(bits & 0x8000) << 16); 8]
    }
    #[inline(always)]
    fn codebook(self, zero: Self::V, scale: Self::V, offset: Self::V) -> Self::Codebook {
        [zero, scale, offset]
    }
    #[inline(always)]
    unsafe fn nibbles_of_bytes(self, book: Self::Codebook, from: *const u8, shift: u32) -> Self::V {
        // SAFETY: the caller vouches for 8 bytes.
        let codes = lanes!(|i| i32::from(unsafe { *from.add(i) } >> shift & 15) as f32);
        self.fma(self.sub(codes, book[0]), book[1], book[2])
    }
    #[inline(always)]
    unsafe fn nibbles_of_words(self, book: Self::Codebook, from: *const u32, shift: u32) -> Self::V {
        // SAFETY: the caller vouches for 8 words.
        let codes = lanes!(|i| (unsafe { *from.add(i) } >> shift & 15) as i32 as f32);
        self.fma(self.sub(codes, book[0]), book[1], book[2])
    }
    #[inline(always)]
    unsafe fn fields(self, low: Field, high: Field, at: u32) -> Self::V {
        // SAFETY: the caller vouches for 8 bytes of each.
        lanes!(|i| unsafe {
            let low = u32::from(*low.from.add(i)) >> low.shift & low.mask;
            let high = u32::from(*high.from.add(i)) >> high.shift & high.mask;
            (low | high << at) as i32 as f32
        })
    }
    #[inline(always)]
    fn bytes_of(self, words: [u32; 4], first: usize) -> Self::V {
        lanes!(|i| (words[(first + i) / 4] >> (8 * (i % 4)) & 255) as i32 as f32)
    }
    #[inline(always)]
    unsafe fn nibbles_and_bits(self, from: *const u8, shift: u32, word: u32) -> Self::V {
        // SAFETY: the caller vouches for 8 bytes.
        lanes!(|i| (u32::from(unsafe { *from.add(i) } >> shift & 15) | (word >> i & 1) << 4) as i32 as f32)
    }
    #[inline(always)]
    unsafe fn nibble_pairs(self, low: *const u32, high: *const u32, shift: u32) -> Self::V {
        // SAFETY: the caller vouches for 8 words each.
        lanes!(|i| f32::from_bits(INTEGER | pair_of_nibbles(unsafe { *low.add(i) }, unsafe { *high.add(i) }, shift)))
    }
    #[inline(always)]
    unsafe fn nibbles_e4m3(self, low: *const u32, high: *const u32, shift: u32) -> Self::V {
        // SAFETY: the caller vouches for 8 words each.
        lanes!(|i| e4m3_to_f32(pair_of_nibbles(unsafe { *low.add(i) }, unsafe { *high.add(i) }, shift)))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests {
    use super::*;

    struct SplatF16(u16);

    impl Op for SplatF16 {
        type Output = f32;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> f32 {
            // SAFETY: two bytes.
            s.first(unsafe { s.splat_f16(self.0.to_le_bytes().as_ptr()) })
        }
    }

    #[test]
    fn every_number_of_16_bits_is_widened() {
        for bits in 0..=u16::MAX {
            let (found, expected) = (dispatch(SplatF16(bits)), f16::from_bits(bits).to_f32());
            assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{bits:#x}: {found}");
        }
    }

    /// The processor of the test has one widest set; the others are run by this binary itself, started anew.
    #[test]
    fn every_instruction_set_passes_the_suite() {
        const NAME: &str = "every_instruction_set_passes_the_suite";
        if std::env::var_os("TALE_KERNELS_ISA").is_some() {
            return println!("not run: TALE_KERNELS_ISA has chosen one instruction set");
        }
        for isa in ["portable", "avx2"] {
            let suite = std::env::current_exe().expect("the path of the test binary");
            let run = std::process::Command::new(suite).env("TALE_KERNELS_ISA", isa).args(["--skip", NAME]).output();
            let run = run.expect("the test binary starts");
            assert!(run.status.success(), "{isa}: {}", String::from_utf8_lossy(&run.stdout));
        }
    }
}
