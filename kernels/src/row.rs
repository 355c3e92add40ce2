//! Passes over one row of f32.
//!
//! Owns: loops by whole vectors with a partial one at the end. Sums are added lane by lane, in an order that depends on
//! the length alone. Does not know: which operation the row belongs to.

use crate::math;
use crate::simd::{Element, Simd};

/// A function of one value, on vectors.
pub(crate) trait Function: Copy + Sync {
    /// The values for `x`.
    fn apply<S: Simd>(self, s: S, x: S::V) -> S::V;
}

/// `to[i] = f(from[i])`.
#[inline(always)]
pub(crate) fn map<S: Simd, F: Function>(s: S, f: F, from: &[f32], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "rows of one length: this is a bug");
    let mut i = 0;
    // SAFETY: `i + LANES <= len` in the loop, `len - i` values are left after it.
    unsafe {
        while i + S::LANES <= to.len() {
            s.store(to.as_mut_ptr().add(i), f.apply(s, s.load(from.as_ptr().add(i))));
            i += S::LANES;
        }
        let rest = to.len() - i;
        if rest > 0 {
            let value = f.apply(s, s.load_partial(from.as_ptr().add(i), rest));
            s.store_partial(to.as_mut_ptr().add(i), value, rest);
        }
    }
}

/// `to[i] = f(a[i], b[i])` for a function of two values.
#[inline(always)]
pub(crate) fn zip<S: Simd, F: Function2>(s: S, f: F, a: &[f32], b: &[f32], to: &mut [f32]) {
    assert!(a.len() == to.len() && b.len() == to.len(), "rows of one length: this is a bug");
    let mut i = 0;
    // SAFETY: `i + LANES <= len` in the loop, `len - i` values are left after it.
    unsafe {
        while i + S::LANES <= to.len() {
            let value = f.apply(s, s.load(a.as_ptr().add(i)), s.load(b.as_ptr().add(i)));
            s.store(to.as_mut_ptr().add(i), value);
            i += S::LANES;
        }
        let rest = to.len() - i;
        if rest > 0 {
            let (a, b) = (s.load_partial(a.as_ptr().add(i), rest), s.load_partial(b.as_ptr().add(i), rest));
            s.store_partial(to.as_mut_ptr().add(i), f.apply(s, a, b), rest);
        }
    }
}

/// A function of two values, on vectors.
pub(crate) trait Function2: Copy + Sync {
    /// The values for `a` and `b`.
    fn apply<S: Simd>(self, s: S, a: S::V, b: S::V) -> S::V;
}

/// Copies as f32; the rest of `to` becomes zero.
#[inline(always)]
pub(crate) fn widen<S: Simd, T: Element>(s: S, from: &[T], to: &mut [f32]) {
    assert!(from.len() <= to.len(), "the row fits: this is a bug");
    let mut i = 0;
    // SAFETY: `i + LANES <= len` in the loop, `len - i` values are left after it.
    unsafe {
        while i + S::LANES <= from.len() {
            s.store(to.as_mut_ptr().add(i), T::load(s, from.as_ptr().add(i)));
            i += S::LANES;
        }
        let rest = from.len() - i;
        if rest > 0 {
            s.store_partial(to.as_mut_ptr().add(i), T::load_partial(s, from.as_ptr().add(i), rest), rest);
        }
    }
    to[from.len()..].fill(0.0);
}

/// `to[i] += other[i]`.
#[inline(always)]
pub(crate) fn add<S: Simd>(s: S, to: &mut [f32], other: &[f32]) {
    assert_eq!(to.len(), other.len(), "rows of one length: this is a bug");
    let mut i = 0;
    // SAFETY: `i + LANES <= len` in the loop, `len - i` values are left after it.
    unsafe {
        while i + S::LANES <= to.len() {
            let to = to.as_mut_ptr().add(i);
            s.store(to, s.add(s.load(to), s.load(other.as_ptr().add(i))));
            i += S::LANES;
        }
        let (rest, to) = (to.len() - i, to.as_mut_ptr().add(i));
        if rest > 0 {
            let sum = s.add(s.load_partial(to, rest), s.load_partial(other.as_ptr().add(i), rest));
            s.store_partial(to, sum, rest);
        }
    }
}

/// `to[i] *= factor`, for rows of whole vectors.
#[inline(always)]
pub(crate) fn scale<S: Simd>(s: S, to: &mut [f32], factor: f32) {
    assert!(to.len().is_multiple_of(S::LANES), "whole vectors: this is a bug");
    let factor = s.splat(factor);
    let mut i = 0;
    while i < to.len() {
        // SAFETY: whole vectors.
        unsafe { s.store(to.as_mut_ptr().add(i), s.mul(s.load(to.as_ptr().add(i)), factor)) };
        i += S::LANES;
    }
}

/// The largest value of a row of whole vectors.
#[inline(always)]
pub(crate) fn max<S: Simd>(s: S, row: &[f32]) -> f32 {
    assert!(row.len().is_multiple_of(S::LANES), "whole vectors: this is a bug");
    let mut max = s.splat(f32::NEG_INFINITY);
    let mut i = 0;
    while i < row.len() {
        // SAFETY: whole vectors.
        max = s.max(max, unsafe { s.load(row.as_ptr().add(i)) });
        i += S::LANES;
    }
    s.reduce_max(max)
}

/// `row[i] = e^(row[i] - max)` for a row of whole vectors; returns the sum.
#[inline(always)]
pub(crate) fn exp_and_sum<S: Simd>(s: S, row: &mut [f32], max: f32) -> f32 {
    assert!(row.len().is_multiple_of(S::LANES), "whole vectors: this is a bug");
    let (max, mut sum) = (s.splat(max), s.splat(0.0));
    let mut i = 0;
    while i < row.len() {
        // SAFETY: whole vectors.
        unsafe {
            let value = math::exp(s, s.sub(s.load(row.as_ptr().add(i)), max));
            s.store(row.as_mut_ptr().add(i), value);
            sum = s.add(sum, value);
        }
        i += S::LANES;
    }
    s.reduce(sum)
}

/// `to[i] = (from[i] - mean) * factor`.
#[inline(always)]
pub(crate) fn affine<S: Simd>(s: S, from: &[f32], to: &mut [f32], (mean, factor): (f32, f32)) {
    map(s, Centred { mean, factor }, from, to);
}

#[derive(Clone, Copy)]
struct Centred {
    mean: f32,
    factor: f32,
}

impl Function for Centred {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        s.mul(s.sub(x, s.splat(self.mean)), s.splat(self.factor))
    }
}

/// `to[i] *= other[i]`.
#[inline(always)]
pub(crate) fn multiply<S: Simd>(s: S, to: &mut [f32], other: &[f32]) {
    assert_eq!(to.len(), other.len(), "rows of one length: this is a bug");
    let mut i = 0;
    // SAFETY: `i + LANES <= len` in the loop, `len - i` values are left after it.
    unsafe {
        while i + S::LANES <= to.len() {
            let to = to.as_mut_ptr().add(i);
            s.store(to, s.mul(s.load(to), s.load(other.as_ptr().add(i))));
            i += S::LANES;
        }
        let (rest, to) = (to.len() - i, to.as_mut_ptr().add(i));
        if rest > 0 {
            let product = s.mul(s.load_partial(to, rest), s.load_partial(other.as_ptr().add(i), rest));
            s.store_partial(to, product, rest);
        }
    }
}

/// `to[i] += other[i]²`.
#[inline(always)]
pub(crate) fn add_squares<S: Simd>(s: S, to: &mut [f32], other: &[f32]) {
    assert_eq!(to.len(), other.len(), "rows of one length: this is a bug");
    let mut i = 0;
    // SAFETY: `i + LANES <= len` in the loop, `len - i` values are left after it.
    unsafe {
        while i + S::LANES <= to.len() {
            let (to, value) = (to.as_mut_ptr().add(i), s.load(other.as_ptr().add(i)));
            s.store(to, s.fma(value, value, s.load(to)));
            i += S::LANES;
        }
        let (rest, to) = (to.len() - i, to.as_mut_ptr().add(i));
        if rest > 0 {
            let value = s.load_partial(other.as_ptr().add(i), rest);
            s.store_partial(to, s.fma(value, value, s.load_partial(to, rest)), rest);
        }
    }
}

/// `Σ row[i]`.
#[inline(always)]
pub(crate) fn sum<S: Simd>(s: S, row: &[f32]) -> f32 {
    let mut sums = [s.splat(0.0); 4];
    let mut i = 0;
    // SAFETY: every load lies inside the row.
    unsafe {
        while i + 4 * S::LANES <= row.len() {
            for chain in 0..4 {
                sums[chain] = s.add(sums[chain], s.load(row.as_ptr().add(i + chain * S::LANES)));
            }
            i += 4 * S::LANES;
        }
        while i < row.len() {
            let rest = S::LANES.min(row.len() - i);
            sums[0] = s.add(sums[0], s.load_partial(row.as_ptr().add(i), rest));
            i += S::LANES;
        }
    }
    s.reduce(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}

/// `Σ (row[i] - mean)²`.
#[inline(always)]
pub(crate) fn sum_of_squares<S: Simd>(s: S, row: &[f32], mean: f32) -> f32 {
    let mut sums = [s.splat(0.0); 4];
    let centre = s.splat(mean);
    let mut i = 0;
    // SAFETY: every load lies inside the row.
    unsafe {
        while i + 4 * S::LANES <= row.len() {
            for chain in 0..4 {
                let value = s.sub(s.load(row.as_ptr().add(i + chain * S::LANES)), centre);
                sums[chain] = s.fma(value, value, sums[chain]);
            }
            i += 4 * S::LANES;
        }
    }
    let mut total = s.reduce(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])));
    while i < row.len() {
        total += (row[i] - mean) * (row[i] - mean);
        i += 1;
    }
    total
}

/// Values that are added up in f32 before the sum goes on in f64.
const LONG_PART: usize = 4096;

/// `Σ row[i]` of a long row.
#[inline(always)]
pub(crate) fn long_sum<S: Simd>(s: S, row: &[f32]) -> f64 {
    let mut total = 0f64;
    for part in row.chunks(LONG_PART) {
        total += f64::from(sum(s, part));
    }
    total
}

/// `Σ (row[i] - mean)²` of a long row.
#[inline(always)]
pub(crate) fn long_sum_of_squares<S: Simd>(s: S, row: &[f32], mean: f32) -> f64 {
    let mut total = 0f64;
    for part in row.chunks(LONG_PART) {
        total += f64::from(sum_of_squares(s, part, mean));
    }
    total
}
