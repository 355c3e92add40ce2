//! Elementwise activations: one pass, all cores when it is worth it.

use candle_core::{Result, Tensor, bail};

use crate::math::{normal_tail, sigmoid};
use crate::parallel::{Shared, for_each, tasks_for};
use crate::row::{Function, Function2, map, zip};
use crate::simd::{Op, Simd, dispatch};
use crate::view::{View, tensor};

/// `x * sigmoid(x)`.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    unary("silu", Silu, x)
}

/// `silu(gate) * up`, same shapes.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.dims() != up.dims() {
        bail!("silu_mul: gate {:?} does not fit up {:?}", gate.shape(), up.shape());
    }
    let (gate, up) = (gate.contiguous()?, up.contiguous()?);
    let views = (View::contiguous("silu_mul", &gate)?, View::contiguous("silu_mul", &up)?);
    let (a, b) = (views.0.f32()?, views.1.f32()?);
    let mut y = vec![0f32; a.len()];
    in_parts(&mut y, |start, part| {
        let range = start..start + part.len();
        dispatch(Zip { f: SiluMul, a: &a[range.clone()], b: &b[range], to: part });
    });
    tensor(y, gate.shape().clone())
}

/// GELU, tanh approximation (torch `approximate="tanh"`).
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    unary("gelu_tanh", GeluTanh, x)
}

/// GELU, exact (torch `approximate="none"`).
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    unary("gelu_erf", GeluErf, x)
}

/// `x * sigmoid(1.702 x)` (OpenAI CLIP).
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    unary("quick_gelu", QuickGelu, x)
}

fn unary<F: Function>(op: &'static str, f: F, x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    let view = View::contiguous(op, &x)?;
    let from = view.f32()?;
    let mut y = vec![0f32; from.len()];
    in_parts(&mut y, |start, part| dispatch(Map { f, from: &from[start..start + part.len()], to: part }));
    tensor(y, x.shape().clone())
}

/// Calls `task(start, part)` for parts of `y`, on all cores if there is enough of it. A value costs about 16
/// multiply-adds.
fn in_parts(y: &mut [f32], task: impl Fn(usize, &mut [f32]) + Sync) {
    let work = y.len() * 16;
    // Parts end between vectors, so that a value's bits do not depend on the number of parts.
    let part = y.len().div_ceil(tasks_for(work)).next_multiple_of(64);
    let (len, shared) = (y.len(), Shared::new(y));
    for_each(len.div_ceil(part.max(1)), work, |index| {
        let start = index * part;
        // SAFETY: every task has its own part.
        task(start, unsafe { shared.slice(start, part.min(len - start)) });
    });
}

struct Map<'a, F> {
    f: F,
    from: &'a [f32],
    to: &'a mut [f32],
}

impl<F: Function> Op for Map<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        map(s, self.f, self.from, self.to);
    }
}

struct Zip<'a, F> {
    f: F,
    a: &'a [f32],
    b: &'a [f32],
    to: &'a mut [f32],
}

impl<F: Function2> Op for Zip<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        zip(s, self.f, self.a, self.b, self.to);
    }
}

#[derive(Clone, Copy)]
struct Silu;

impl Function for Silu {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        s.mul(x, sigmoid(s, x))
    }
}

#[derive(Clone, Copy)]
struct SiluMul;

impl Function2 for SiluMul {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, gate: S::V, up: S::V) -> S::V {
        s.mul(Silu.apply(s, gate), up)
    }
}

#[derive(Clone, Copy)]
struct GeluTanh;

impl Function for GeluTanh {
    /// `(1 + tanh u) / 2` is the sigmoid of 2u.
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        const TWO_SQRT_2_OVER_PI: f32 = std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::SQRT_2;
        let cubic = s.fma(s.mul(s.mul(x, x), s.splat(0.044715)), x, x);
        s.mul(x, sigmoid(s, s.mul(cubic, s.splat(TWO_SQRT_2_OVER_PI))))
    }
}

#[derive(Clone, Copy)]
struct GeluErf;

impl Function for GeluErf {
    /// `x Φ(x)`, from the tail `Q(|x|)` of the normal distribution: `Φ(x) = Q(-x)` left of zero and `1 - Q(x)` right of it.
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        let zero = s.splat(0.0);
        let size = s.max(x, s.sub(zero, x));
        let tail = normal_tail(s, size);
        let below = s.select_less(x, zero, tail, s.sub(s.splat(1.0), tail));
        s.mul(x, below)
    }
}

#[derive(Clone, Copy)]
struct QuickGelu;

impl Function for QuickGelu {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        s.mul(x, sigmoid(s, s.mul(x, s.splat(1.702))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, bits, random, threads, values};

    /// Values from -12 to 12 and beyond, an odd number of them.
    fn inputs() -> Tensor {
        let x = (random(&[100_003], 1) * 12.0).unwrap();
        let far = Tensor::new(&[0f32, -0.0, 40.0, -40.0, 1e4, -1e4, 1e-30, f32::INFINITY], x.device()).unwrap();
        Tensor::cat(&[x, far], 0).unwrap()
    }

    /// Checks `found` against a function computed in f64, absolute error within 1e-6 of max(1, |x|).
    fn check(found: impl Fn(&Tensor) -> Result<Tensor>, expected: impl Fn(f64) -> f64) {
        let x = inputs();
        let y = values(&found(&x).unwrap());
        for (x, y) in values(&x).into_iter().zip(y) {
            let expected = expected(f64::from(x)) as f32;
            assert!(y == expected || (y - expected).abs() <= 1e-6 * x.abs().max(1.0), "f({x}) = {y}, not {expected}");
        }
    }

    fn logistic(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    #[test]
    fn silu_is_x_sigmoid_x() {
        check(silu, |x| x * logistic(x));
    }

    #[test]
    fn gelu_tanh_is_torchs_approximation() {
        check(gelu_tanh, |x| {
            x * 0.5 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        });
    }

    #[test]
    fn quick_gelu_is_x_sigmoid_1_702_x() {
        check(quick_gelu, |x| x * logistic(1.702 * x));
    }

    #[test]
    fn gelu_erf_is_x_times_the_normal_distribution() {
        let x = (random(&[50_001], 1) * 8.0).unwrap();
        assert_close(&gelu_erf(&x).unwrap(), &x.gelu_erf().unwrap(), 2e-7);
        let far = Tensor::new(&[0f32, 12.0, 1e4, -1e4, f32::INFINITY], x.device()).unwrap();
        assert_eq!(values(&gelu_erf(&far).unwrap()), [0.0, 12.0, 1e4, 0.0, f32::INFINITY]);
    }

    #[test]
    fn silu_mul_multiplies_by_up_and_reads_parts_of_a_fused_projection() {
        let fused = random(&[7, 2, 2049], 1);
        let part = |i| fused.narrow(1, i, 1).unwrap().squeeze(1).unwrap();
        let expected = (part(0).silu().unwrap() * part(1)).unwrap();
        assert_close(&silu_mul(&part(0), &part(1)).unwrap(), &expected, 1e-6);
        let error = silu_mul(&part(0), &fused).unwrap_err().to_string();
        assert!(error.contains("silu_mul") && error.contains("[7, 2049]"), "{error}");
    }

    #[test]
    fn nan_stays_nan() {
        let x = Tensor::new(&[f32::NAN, 1.0], &candle_core::Device::Cpu).unwrap();
        for f in [silu, gelu_tanh, gelu_erf, quick_gelu] {
            let y = values(&f(&x).unwrap());
            assert!(y[0].is_nan() && y[1].is_finite());
        }
    }

    #[test]
    fn threads_do_not_change_bits() {
        let x = inputs();
        assert_eq!(bits(&threads(1, || silu(&x).unwrap())), bits(&threads(3, || silu(&x).unwrap())));
    }
}
