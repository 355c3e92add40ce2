//! Elementwise activations: one pass, all cores when it is worth it.

use candle_core::{Result, Tensor, bail};

#[cfg(gpu)]
use crate::gpu;
use crate::math::{normal_tail, sigmoid};
use crate::parallel::{Shared, for_each, tasks_for};
use crate::row::{Function, Function2, map, zip};
use crate::simd::{Op, Simd, dispatch};
use crate::view::{View, tensor};

#[cfg(gpu)]
mod launch;
#[cfg(gpu)]
pub(crate) use launch::copy_into;

/// `x * sigmoid(x)`.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        return launch::unary(launch::Function::Silu, x);
    }
    unary("silu", Silu, x)
}

/// `silu(gate) * up`, same shapes.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.dims() != up.dims() {
        bail!("silu_mul: gate {:?} does not fit up {:?}", gate.shape(), up.shape());
    }
    #[cfg(gpu)]
    if gpu::runs_here(gate) {
        return launch::gated("silu_mul", launch::Function::Silu, gate, up);
    }
    binary("silu_mul", Gate(Silu), gate, up)
}

/// Which approximation of GELU, named as in torch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gelu {
    /// `approximate="none"`.
    Erf,
    /// `approximate="tanh"`.
    Tanh,
}

/// `hidden * gelu(gate)` of `x [..., 2 d]`, whose last dimension holds first hidden, then gate: `[..., d]` (diffusers
/// `GEGLU`).
pub fn geglu(x: &Tensor, gelu: Gelu) -> Result<Tensor> {
    let last = x.rank().saturating_sub(1);
    let d = match x.dims().last() {
        Some(wide) if wide % 2 == 0 => wide / 2,
        _ => bail!("geglu: the last dimension of {:?} cannot be halved", x.shape()),
    };
    let (hidden, gate) = (x.narrow(last, 0, d)?, x.narrow(last, d, d)?);
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        let function = match gelu {
            Gelu::Erf => launch::Function::GeluErf,
            Gelu::Tanh => launch::Function::GeluTanh,
        };
        return launch::gated("geglu", function, &gate, &hidden);
    }
    match gelu {
        Gelu::Erf => binary("geglu", Gate(GeluErf), &gate, &hidden),
        Gelu::Tanh => binary("geglu", Gate(GeluTanh), &gate, &hidden),
    }
}

/// GELU, tanh approximation (torch `approximate="tanh"`).
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        return launch::unary(launch::Function::GeluTanh, x);
    }
    unary("gelu_tanh", GeluTanh, x)
}

/// GELU, exact (torch `approximate="none"`).
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        return launch::unary(launch::Function::GeluErf, x);
    }
    unary("gelu_erf", GeluErf, x)
}

/// `x * sigmoid(1.702 x)` (OpenAI CLIP).
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        return launch::unary(launch::Function::QuickGelu, x);
    }
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

fn binary<F: Function2>(op: &'static str, f: F, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let views = (View::contiguous(op, &a)?, View::contiguous(op, &b)?);
    let (from_a, from_b) = (views.0.f32()?, views.1.f32()?);
    let mut y = vec![0f32; from_a.len()];
    in_parts(&mut y, |start, part| {
        let range = start..start + part.len();
        dispatch(Zip { f, a: &from_a[range.clone()], b: &from_b[range], to: part });
    });
    tensor(y, a.shape().clone())
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
pub(crate) struct Silu;

impl Function for Silu {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        s.mul(x, sigmoid(s, x))
    }
}

/// `f(gate) * value`.
#[derive(Clone, Copy)]
struct Gate<F>(F);

impl<F: Function> Function2 for Gate<F> {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, gate: S::V, value: S::V) -> S::V {
        s.mul(self.0.apply(s, gate), value)
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
    use crate::testing::{On, assert_close, bits, for_each_device, random, threads, values};

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

    type Activation = fn(&Tensor) -> Result<Tensor>;

    for_each_device!(activations_are_those_of_the_cpu, |on: &On| {
        for activation in [silu as Activation, gelu_tanh, gelu_erf, quick_gelu] {
            for len in [1, 15, 4099] {
                let x = (random(&[len + 1], 1) * 9.0).unwrap();
                let expected = activation(&on.rounded(&x).narrow(0, 1, len).unwrap()).unwrap();
                // A view that begins between two packs.
                let x = on.tensor(&x).narrow(0, 1, len).unwrap();
                on.assert_close(&on.run(|| activation(&x)), &expected, 16);
            }
        }
    });

    for_each_device!(gates_read_halves_where_they_lie, |on: &On| {
        for d in [1, 9, 64, 520] {
            let wide = (random(&[2, 5, 2 * d], 1) * 4.0).unwrap();
            let half = |of: &Tensor, i: usize| of.narrow(2, i * d, d).unwrap();
            let (wide32, wide) = (on.rounded(&wide), on.tensor(&wide));
            for (gelu, activation) in [(Gelu::Erf, gelu_erf as Activation), (Gelu::Tanh, gelu_tanh)] {
                let expected = (half(&wide32, 0) * activation(&half(&wide32, 1)).unwrap()).unwrap();
                on.assert_close(&on.run(|| geglu(&wide, gelu)), &expected, 16);
            }
            let expected = (silu(&half(&wide32, 0)).unwrap() * half(&wide32, 1)).unwrap();
            on.assert_close(&on.run(|| silu_mul(&half(&wide, 0), &half(&wide, 1))), &expected, 16);
        }
    });

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
