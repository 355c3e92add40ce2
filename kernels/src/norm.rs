//! Normalisations, statistics in f32: sums run in as many lanes as the processor has, which keeps their error that of
//! pairwise summation.

use candle_core::{Result, Tensor, bail};

#[cfg(gpu)]
use crate::gpu;
use crate::parallel::{Shared, for_each, tasks_for};
use crate::row;
use crate::simd::{Op, Simd, dispatch};
use crate::view::{View, tensor, vector};

#[cfg(gpu)]
mod launch;

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension of `x [..., dim]`; `weight [dim]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        return launch::rms_norm(x, weight, eps);
    }
    let weight = vector("rms_norm", "weight", weight, last_dim("rms_norm", x)?)?;
    let weight = View::contiguous("rms_norm", &weight)?;
    let affine = [Affine { weight: Some(weight.f32()?), bias: None }];
    normalise("rms_norm", x, &affine, Norm { centred: false, eps })
}

/// `sum = x + residual` and its [`rms_norm`], `x` and `residual` `[..., dim]`: `(sum, norm)`.
pub fn add_rms_norm(x: &Tensor, residual: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    if x.dims() != residual.dims() {
        bail!("add_rms_norm: x {:?} does not fit the residual {:?}", x.shape(), residual.shape());
    }
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        return launch::add_rms_norm(x, residual, weight, eps);
    }
    let sum = (x + residual)?;
    let norm = rms_norm(&sum, weight, eps)?;
    Ok((sum, norm))
}

/// `(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension of `x [..., dim]`; absent weight is 1,
/// absent bias is 0.
pub fn layer_norm(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        return launch::layer_norm(x, weight, bias, eps);
    }
    let dim = last_dim("layer_norm", x)?;
    let weight = weight.map(|weight| vector("layer_norm", "weight", weight, dim)).transpose()?;
    let bias = bias.map(|bias| vector("layer_norm", "bias", bias, dim)).transpose()?;
    let weight = weight.as_ref().map(|weight| View::contiguous("layer_norm", weight)).transpose()?;
    let bias = bias.as_ref().map(|bias| View::contiguous("layer_norm", bias)).transpose()?;
    let affine =
        Affine { weight: weight.as_ref().map(View::f32).transpose()?, bias: bias.as_ref().map(View::f32).transpose()? };
    normalise("layer_norm", x, &[affine], Norm { centred: true, eps })
}

/// Layer norm without weights, then `* (1 + scale) + shift`, each batch row with its own: `x [b, l, dim]`, `shift` and
/// `scale` `[b, 1, dim]` (adaptive layer norm of diffusion transformers, diffusers `AdaLayerNormZero`).
pub fn modulated_layer_norm(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    let (b, _, dim) = x.dims3()?;
    if shift.dims() != [b, 1, dim] || scale.dims() != shift.dims() {
        let (x, shift, scale) = (x.shape(), shift.shape(), scale.shape());
        bail!("modulated_layer_norm: x {x:?} does not fit shift {shift:?} and scale {scale:?}");
    }
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        return launch::modulated_layer_norm(x, shift, scale, eps);
    }
    let (factor, shift) = ((scale + 1.0)?.contiguous()?, shift.contiguous()?);
    let views = (View::contiguous("modulated_layer_norm", &factor)?, View::contiguous("modulated_layer_norm", &shift)?);
    let rows = views.0.f32()?.chunks_exact(dim.max(1)).zip(views.1.f32()?.chunks_exact(dim.max(1)));
    let affines: Vec<_> = rows.map(|(weight, bias)| Affine { weight: Some(weight), bias: Some(bias) }).collect();
    normalise("modulated_layer_norm", x, &affines, Norm { centred: true, eps })
}

/// `x + gate * y`, each batch row with its own gate: `x` and `y` `[b, l, dim]`, `gate [b, 1, dim]`.
pub fn gated_sum(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (b, _, dim) = x.dims3()?;
    if y.dims() != x.dims() || gate.dims() != [b, 1, dim] {
        bail!("gated_sum: x {:?} does not fit gate {:?} and y {:?}", x.shape(), gate.shape(), y.shape());
    }
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        return launch::gated_sum(x, gate, y);
    }
    x + y.broadcast_mul(gate)?
}

fn last_dim(op: &str, x: &Tensor) -> Result<usize> {
    match x.dims().last() {
        Some(dim) => Ok(*dim),
        None => bail!("{op}: x must have a last dimension"),
    }
}

/// Factors and terms of a row, 1 and 0 if absent.
#[derive(Clone, Copy)]
struct Affine<'a> {
    weight: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
}

/// Which statistics divide a row.
#[derive(Clone, Copy)]
struct Norm {
    /// Whether the mean is subtracted.
    centred: bool,
    eps: f64,
}

/// Normalises every row of the last dimension; each affine belongs to an equal share of the rows, in order.
fn normalise(op: &'static str, x: &Tensor, affines: &[Affine<'_>], norm: Norm) -> Result<Tensor> {
    let x = x.contiguous()?;
    let view = View::contiguous(op, &x)?;
    let from = view.f32()?;
    let dim = last_dim(op, &x)?.max(1);
    let mut y = vec![0f32; from.len()];
    let (rows, work) = (from.len() / dim, from.len() * 4);
    let rows_per_affine = rows.div_ceil(affines.len().max(1)).max(1);
    let part = rows.div_ceil(tasks_for(work)).max(1) * dim;
    let (len, shared) = (y.len(), Shared::new(&mut y));
    for_each(len.div_ceil(part), work, |task| {
        let range = task * part..len.min((task + 1) * part);
        // SAFETY: every task has its own rows.
        let to = unsafe { shared.slice(range.start, range.len()) };
        let first_row = range.start / dim;
        dispatch(NormRows { from: &from[range], to, dim, first_row, affines, rows_per_affine, norm });
    });
    tensor(y, x.shape().clone())
}

struct NormRows<'a> {
    from: &'a [f32],
    to: &'a mut [f32],
    dim: usize,
    first_row: usize,
    affines: &'a [Affine<'a>],
    rows_per_affine: usize,
    norm: Norm,
}

impl Op for NormRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.from.chunks_exact(self.dim).zip(self.to.chunks_exact_mut(self.dim));
        for (row, (from, to)) in rows.enumerate() {
            let (mean, factor) = statistics(s, self.norm, from);
            row::affine(s, from, to, (mean, factor));
            let affine = self.affines[(self.first_row + row) / self.rows_per_affine];
            if let Some(weight) = affine.weight {
                row::multiply(s, to, weight);
            }
            if let Some(bias) = affine.bias {
                row::add(s, to, bias);
            }
        }
    }
}

/// What to subtract from a row, and what to multiply it with then.
#[inline(always)]
fn statistics<S: Simd>(s: S, norm: Norm, row: &[f32]) -> (f32, f32) {
    let count = row.len() as f64;
    let mean = if norm.centred { (f64::from(row::sum(s, row)) / count) as f32 } else { 0.0 };
    let variance = f64::from(row::sum_of_squares(s, row, mean)) / count;
    (mean, (1.0 / (variance + norm.eps).sqrt()) as f32)
}

#[cfg(test)]
mod tests {
    //! The specifications, in candle's own operations, and the kernels held against them.

    use candle_core::{D, DType};
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{On, assert_close, bits, for_each_device, random, threads};

    mod oracle {
        use super::*;

        pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
            let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
            x.broadcast_div(&scale)?.broadcast_mul(weight)
        }

        pub(super) fn layer_norm(
            x: &Tensor,
            weight: Option<&Tensor>,
            bias: Option<&Tensor>,
            eps: f64,
        ) -> Result<Tensor> {
            let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
            let scale = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
            let mut y = centred.broadcast_div(&scale)?;
            if let Some(weight) = weight {
                y = y.broadcast_mul(weight)?;
            }
            if let Some(bias) = bias {
                y = y.broadcast_add(bias)?;
            }
            Ok(y)
        }
    }

    /// Rows of one value, of less than a pack, of an odd number, of a warp's packs and one more, of more than registers
    /// hold.
    const DIMS: [usize; 6] = [1, 7, 33, 256, 1031, 9001];

    for_each_device!(rms_norms_equal_their_specification, |on: &On| {
        for dim in DIMS {
            let (x, residual, weight) = (random(&[2, 3, dim], 1), random(&[2, 3, dim], 2), random(&[dim], 3));
            let (x32, residual32, weight32) = (on.rounded(&x), on.rounded(&residual), on.rounded(&weight));
            let (x, residual, weight) = (on.tensor(&x), on.tensor(&residual), on.tensor(&weight));
            let found = on.run(|| rms_norm(&x, &weight, 1e-6));
            on.assert_close(&found, &oracle::rms_norm(&x32, &weight32, 1e-6).unwrap(), dim);
            let (sum, norm) = on.run(|| add_rms_norm(&x, &residual, &weight, 1e-6));
            let expected = (x32 + residual32).unwrap();
            on.assert_close(&sum, &expected, 1);
            on.assert_close(&norm, &oracle::rms_norm(&expected, &weight32, 1e-6).unwrap(), dim);
        }
    });

    for_each_device!(layer_norms_equal_their_specification, |on: &On| {
        for dim in DIMS {
            let x = ((random(&[2, 3, dim], 4) * 3.0).unwrap() + 1.5).unwrap();
            let (weight, bias) = (random(&[dim], 5), random(&[dim], 6));
            let (x32, weight32, bias32) = (on.rounded(&x), on.rounded(&weight), on.rounded(&bias));
            // A view whose rows do not lie next to each other, and whose start is not aligned to 16 bytes.
            let wide = on.tensor(&Tensor::cat(&[&x, &x], 1).unwrap());
            let x = wide.narrow(1, 2, 3).unwrap();
            let x32 = Tensor::cat(&[&x32, &x32], 1).unwrap().narrow(1, 2, 3).unwrap();
            let (weight, bias) = (on.tensor(&weight), on.tensor(&bias));
            let found = on.run(|| layer_norm(&x, Some(&weight), Some(&bias), 1e-5));
            let expected = oracle::layer_norm(&x32, Some(&weight32), Some(&bias32), 1e-5).unwrap();
            on.assert_close(&found, &expected, dim);
            let found = on.run(|| layer_norm(&x, None, None, 1e-5));
            on.assert_close(&found, &oracle::layer_norm(&x32, None, None, 1e-5).unwrap(), dim);
        }
    });

    for_each_device!(modulation_is_that_of_each_batch_row, |on: &On| {
        for dim in DIMS {
            let (x, parts) = (random(&[2, 5, dim], 7), random(&[2, 1, 3 * dim], 8));
            let part = |of: &Tensor, i: usize| of.narrow(2, i * dim, dim).unwrap();
            let (x32, parts32) = (on.rounded(&x), on.rounded(&parts));
            let (x, parts) = (on.tensor(&x), on.tensor(&parts));
            let found = on.run(|| modulated_layer_norm(&x, &part(&parts, 0), &part(&parts, 1), 1e-6));
            let factor = (part(&parts32, 1) + 1.0).unwrap();
            let normed = oracle::layer_norm(&x32, None, None, 1e-6).unwrap();
            let expected = normed.broadcast_mul(&factor).unwrap().broadcast_add(&part(&parts32, 0)).unwrap();
            on.assert_close(&found, &expected, dim);
            let found = on.run(|| gated_sum(&x, &part(&parts, 2), &found));
            let terms = expected.broadcast_mul(&part(&parts32, 2)).unwrap();
            // The terms were rounded once more on their way here.
            on.assert_close(&found, &(x32 + terms).unwrap(), 4 * dim);
        }
    });

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn rows_equal_their_specifications(b in 1usize..4, l in 1usize..30, dim in 1usize..700, seed in 0u64..9) {
            let x = ((random(&[b, l, dim], seed) * 3.0).unwrap() + 1.5).unwrap();
            let (weight, bias) = (random(&[dim], 11), random(&[dim], 12));
            assert_close(&rms_norm(&x, &weight, 1e-6).unwrap(), &oracle::rms_norm(&x, &weight, 1e-6).unwrap(), 2e-6);
            for (weight, bias) in [(Some(&weight), Some(&bias)), (None, None), (Some(&weight), None), (None, Some(&bias))] {
                let expected = oracle::layer_norm(&x, weight, bias, 1e-5).unwrap();
                assert_close(&layer_norm(&x, weight, bias, 1e-5).unwrap(), &expected, 5e-6);
            }
        }
    }

    #[test]
    fn strided_inputs_are_read_by_their_strides() {
        let weight = random(&[5], 3);
        let x = random(&[3, 5, 4], 4).transpose(1, 2).unwrap();
        assert_close(&rms_norm(&x, &weight, 1e-6).unwrap(), &oracle::rms_norm(&x, &weight, 1e-6).unwrap(), 2e-6);
    }

    #[test]
    fn weights_may_be_published_in_16_bits() {
        let (x, weight) = (random(&[3, 40], 1), random(&[40], 2).to_dtype(DType::BF16).unwrap());
        let expected = oracle::rms_norm(&x, &weight.to_dtype(DType::F32).unwrap(), 1e-6).unwrap();
        assert_close(&rms_norm(&x, &weight, 1e-6).unwrap(), &expected, 2e-6);
    }

    #[test]
    fn a_row_has_the_same_bits_whatever_comes_with_it() {
        let (x, weight) = (random(&[300, 2048], 1), random(&[2048], 2));
        let whole = threads(2, || rms_norm(&x, &weight, 1e-5).unwrap());
        let alone = threads(1, || rms_norm(&x.narrow(0, 131, 1).unwrap(), &weight, 1e-5).unwrap());
        assert_eq!(bits(&whole.narrow(0, 131, 1).unwrap()), bits(&alone));
    }

    #[test]
    fn misfits_name_the_operation_and_the_shapes() {
        let error = rms_norm(&random(&[2, 3], 1), &random(&[4], 2), 1e-6).unwrap_err().to_string();
        assert!(error.contains("rms_norm: weight") && error.contains("[3]") && error.contains("[4]"), "{error}");
    }
}
