//! Functions of a vector: exp, sigmoid, the normal distribution.
//!
//! Owns: approximations and their errors. Does not know: memory.

use crate::simd::Simd;

/// `e^x`, relative error below 1e-7; 0 below -87.3 (where f32 turns subnormal), e^88.37 above 88.37, NaN for NaN.
///
/// `x = n ln 2 + r` with |r| <= ln 2 / 2; the Taylor series of `e^r` to r^7 is exact to 6e-9 there.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // The limit comes first: min and max return their second operand if one is NaN.
    let clamped = s.min(s.splat(88.37), s.max(s.splat(-87.33), x));
    let n = s.round(s.mul(clamped, s.splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts: n times the first is exact.
    let r = s.fma(n, s.splat(-0.693_359_4), clamped);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut series = s.splat(1.0 / 5040.0);
    series = s.fma(series, r, s.splat(1.0 / 720.0));
    series = s.fma(series, r, s.splat(1.0 / 120.0));
    series = s.fma(series, r, s.splat(1.0 / 24.0));
    series = s.fma(series, r, s.splat(1.0 / 6.0));
    series = s.fma(series, r, s.splat(0.5));
    let less_one = s.fma(s.mul(r, r), series, r);
    let e = s.mul(s.add(less_one, s.splat(1.0)), s.exp2_integral(n));
    s.select_less(x, s.splat(-87.33), s.splat(0.0), e)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}
