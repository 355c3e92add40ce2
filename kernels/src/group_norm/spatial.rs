//! The norm of a decoder of clips that is told its latents at every layer: group norm, then a factor and a term of each
//! value, which lie at the latents' size, then SiLU.
//!
//! Owns: the norm on the CPU. Does not know: which value of the latents' size a value goes with (`boxes`). Source: diffusers
//! `CogVideoXSpatialNorm3D`, whose convolutions over single values give the same before the clip is enlarged as after.

use candle_core::{Result, Tensor, bail};

use super::boxes::Boxes;
use super::{Planes, SiluOf, statistics};
#[cfg(gpu)]
use crate::gpu;
use crate::parallel::{Shared, for_each, with_scratch};
use crate::row::{self, Function2};
use crate::simd::{Op, Simd, dispatch};
use crate::view::{View, tensor, vector};

/// What a clip is normed with.
#[derive(Debug, Clone, Copy)]
pub struct SpatialNorm<'a> {
    /// Of the channels.
    pub num_groups: usize,
    /// `[channels]`, of the group norm.
    pub weight: &'a Tensor,
    /// `[channels]`, of the group norm.
    pub bias: &'a Tensor,
    /// Added to the variance of a group.
    pub eps: f64,
    /// `[batch, channels, t', h', w']`, by which a normed value is multiplied.
    pub factor: &'a Tensor,
    /// Of the same shape, what is added then.
    pub term: &'a Tensor,
}

/// `silu(norm(x) * factor + term)` of `x [batch, channels, t, h, w]`, where `factor` and `term` are enlarged to the nearest
/// value: of an odd number of frames the first has the first frame to itself. Every side of x is a multiple of the smaller
/// one.
pub fn spatial_norm_silu(x: &Tensor, norm: &SpatialNorm<'_>) -> Result<Tensor> {
    let planes = Planes::of("spatial_norm", x)?;
    let boxes = Boxes::new(x, norm.factor, norm.term)?;
    let SpatialNorm { num_groups, eps, .. } = *norm;
    if num_groups == 0 || planes.channels % num_groups != 0 {
        bail!("spatial_norm: {num_groups} groups do not divide the channels of {:?}", x.shape());
    }
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        return super::launch::spatial_norm(x, planes, norm, boxes);
    }
    let weight = vector("spatial_norm", "weight", norm.weight, planes.channels)?;
    let bias = vector("spatial_norm", "bias", norm.bias, planes.channels)?;
    let [x, factor, term] = [x.contiguous()?, norm.factor.contiguous()?, norm.term.contiguous()?];
    let view = |x| View::contiguous("spatial_norm", x);
    let views = (view(&x)?, view(&weight)?, view(&bias)?, view(&factor)?, view(&term)?);
    let (from, weight, bias) = (views.0.f32()?, views.1.f32()?, views.2.f32()?);
    let (factor, term) = (views.3.f32()?, views.4.f32()?);
    let mut y = vec![0f32; from.len()];
    let per_group = planes.channels / num_groups;
    let shared = Shared::new(&mut y);
    let len = if planes.positions == 0 { 0 } else { planes.batch * num_groups };
    for_each(len, from.len() * 4, |task| {
        let (size, small, first) =
            (per_group * planes.positions, per_group * boxes.small_positions(), task % num_groups * per_group);
        // SAFETY: every task has its own group.
        let to = unsafe { shared.slice(task * size, size) };
        dispatch(NormGroup {
            from: &from[task * size..(task + 1) * size],
            to,
            weight: &weight[first..first + per_group],
            bias: &bias[first..first + per_group],
            factor: &factor[task * small..(task + 1) * small],
            term: &term[task * small..(task + 1) * small],
            eps,
            boxes,
        });
    });
    tensor(y, x.shape().clone())
}

/// One group of channels.
struct NormGroup<'a> {
    from: &'a [f32],
    to: &'a mut [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    factor: &'a [f32],
    term: &'a [f32],
    eps: f64,
    boxes: Boxes,
}

impl Op for NormGroup<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Boxes { large: [frames, rows, columns], small: [_, small_rows, small_columns] } = self.boxes;
        let (positions, small) = (frames * rows * columns, self.boxes.small_positions());
        let (mean, factor) = statistics(s, self.from, positions, self.eps);
        let (box_rows, box_columns) = (rows / small_rows, columns / small_columns);
        with_scratch(3 * columns, |scratch| {
            let (factors, rest) = scratch.split_at_mut(columns);
            let (terms, products) = rest.split_at_mut(columns);
            for channel in 0..self.weight.len() {
                let scale = (factor * f64::from(self.weight[channel])) as f32;
                let shift = self.bias[channel];
                for frame in 0..frames {
                    let small_frame = channel * small + self.boxes.small_frame(frame) * small_rows * small_columns;
                    for small_row in 0..small_rows {
                        let first = small_frame + small_row * small_columns;
                        // norm * factor + term, as factor and term of what is left of x without its mean.
                        for (column, (to_factor, to_term)) in factors.iter_mut().zip(terms.iter_mut()).enumerate() {
                            let (factor, term) =
                                (self.factor[first + column / box_columns], self.term[first + column / box_columns]);
                            *to_factor = scale * factor;
                            *to_term = shift * factor + term;
                        }
                        for row in small_row * box_rows..(small_row + 1) * box_rows {
                            let start = channel * positions + (frame * rows + row) * columns;
                            let (from, to) = (&self.from[start..start + columns], &mut self.to[start..start + columns]);
                            row::zip(s, CentredProduct { mean }, from, factors, products);
                            row::zip(s, SiluOf(Sum), products, terms, to);
                        }
                    }
                }
            }
        });
    }
}

/// `(a - mean) * b`.
#[derive(Clone, Copy)]
struct CentredProduct {
    mean: f32,
}

impl Function2 for CentredProduct {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, a: S::V, b: S::V) -> S::V {
        s.mul(s.sub(a, s.splat(self.mean)), b)
    }
}

/// `a + b`.
#[derive(Clone, Copy)]
struct Sum;

impl Function2 for Sum {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, a: S::V, b: S::V) -> S::V {
        s.add(a, b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{On, for_each_device, random};

    mod oracle {
        use super::*;

        /// torch's nearest: result i has value `i * from / to`.
        fn enlarged(x: &Tensor, sides: [usize; 3]) -> Result<Tensor> {
            let mut x = x.clone();
            for (axis, to) in sides.into_iter().enumerate() {
                let from = x.dim(axis + 2)?;
                let indices: Vec<u32> = (0..to).map(|i| (i * from / to) as u32).collect();
                x = x.contiguous()?.index_select(&Tensor::new(indices, x.device())?, axis + 2)?;
            }
            Ok(x)
        }

        fn like(x: &Tensor, z: &Tensor) -> Result<Tensor> {
            let (_, _, t, h, w) = x.dims5()?;
            if t == 1 || t % 2 == 0 {
                return enlarged(z, [t, h, w]);
            }
            let (first, rest) = (z.narrow(2, 0, 1)?, z.narrow(2, 1, z.dim(2)? - 1)?);
            Tensor::cat(&[enlarged(&first, [1, h, w])?, enlarged(&rest, [t - 1, h, w])?], 2)
        }

        pub(super) fn spatial_norm_silu(x: &Tensor, norm: &SpatialNorm<'_>) -> Result<Tensor> {
            let normed = crate::group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)?;
            let y = ((normed * like(x, norm.factor)?)? + like(x, norm.term)?)?;
            &y / ((y.neg()?.exp()? + 1.0)?)
        }
    }

    /// Groups, channels of each, the clip and the smaller one.
    const SHAPES: [(usize, usize, [usize; 3], [usize; 3]); 7] = [
        (1, 1, [1, 1, 1], [1, 1, 1]),
        (2, 3, [1, 6, 10], [1, 3, 5]),
        (3, 2, [3, 5, 7], [3, 5, 7]),
        (2, 2, [9, 12, 8], [3, 3, 2]),
        (4, 1, [8, 24, 40], [2, 3, 5]),
        (2, 4, [5, 4, 6], [3, 2, 3]),
        (1, 2, [4, 66, 50], [2, 33, 25]),
    ];

    for_each_device!(a_clip_is_normed_and_told_its_latents, |on: &On| {
        for (num_groups, per_group, [t, h, w], [small_t, small_h, small_w]) in SHAPES {
            let channels = num_groups * per_group;
            let x = ((random(&[2, channels, t, h, w], 1) * 3.0).unwrap() + 1.5).unwrap();
            let small = [2, channels, small_t, small_h, small_w];
            let others = [random(&[channels], 2), random(&[channels], 3), random(&small, 4), random(&small, 5)];
            let on_host = others.each_ref().map(|other| on.rounded(other));
            let on_device = others.each_ref().map(|other| on.tensor(other));
            let norm = |[weight, bias, factor, term]: &[Tensor; 4], x: &Tensor, is_oracle: bool| {
                let norm = SpatialNorm { num_groups, weight, bias, eps: 1e-6, factor, term };
                match is_oracle {
                    true => oracle::spatial_norm_silu(x, &norm),
                    false => spatial_norm_silu(x, &norm),
                }
            };
            let expected = norm(&on_host, &on.rounded(&x), true).unwrap();
            let found = on.run(|| norm(&on_device, &on.tensor(&x), false));
            on.assert_close(&found, &expected, x.elem_count() / 2 / num_groups);
        }
    });

    #[test]
    fn a_clip_that_its_latents_do_not_divide_is_refused_with_both_shapes() {
        let channels = random(&[2], 1);
        for (large, small) in [([4, 6, 6], [3, 3, 3]), ([1, 5, 6], [1, 3, 3]), ([3, 6, 6], [1, 3, 3])] {
            let clip = |[t, h, w]: [usize; 3]| random(&[1, 2, t, h, w], 2);
            let (x, z) = (clip(large), clip(small));
            let norm =
                SpatialNorm { num_groups: 1, weight: &channels, bias: &channels, eps: 1e-6, factor: &z, term: &z };
            let error = spatial_norm_silu(&x, &norm).expect_err("it does not fit").to_string();
            assert!(
                error.contains(&format!("{:?}", x.dims())) && error.contains(&format!("{:?}", z.dims())),
                "{error}"
            );
        }
    }
}
