//! Norms of pictures and clips, whose channels are planes: over groups of channels, and over all channels of a position.
//! Both come with SiLU as their last operation, because nearly every convolution of a VAE wants just that.

use candle_core::{Result, Tensor, bail};

use crate::activation::Silu;
#[cfg(gpu)]
use crate::gpu;
use crate::parallel::{Shared, for_each, with_scratch};
use crate::row::{self, Function, Function2};
use crate::simd::{Op, Simd, dispatch};
use crate::view::{View, tensor, vector};

mod boxes;
#[cfg(gpu)]
mod launch;
mod spatial;

pub use spatial::{SpatialNorm, spatial_norm_silu};

/// What happens to a normed value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Nothing,
    Silu,
}

/// Group norm of `x [batch, channels, ...]`: statistics over each group of `channels / num_groups` channels and all
/// positions; `weight [channels]`, `bias [channels]`.
pub fn group_norm(x: &Tensor, num_groups: usize, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    norm_groups(x, num_groups, [weight, bias], eps, Then::Nothing)
}

/// `silu` of [`group_norm`].
pub fn group_norm_silu(x: &Tensor, num_groups: usize, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    norm_groups(x, num_groups, [weight, bias], eps, Then::Silu)
}

/// `x / max(||x||₂, 1e-12) * sqrt(channels) * weight` over dimension 1 of `x [batch, channels, ...]`; `weight
/// [channels]` (diffusers `WanRMS_norm`, `torch.nn.functional.normalize`).
pub fn rms_norm_channels(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    norm_channels(x, weight, Then::Nothing)
}

/// `silu` of [`rms_norm_channels`].
pub fn rms_norm_channels_silu(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    norm_channels(x, weight, Then::Silu)
}

/// The sizes that matter here of `[batch, channels, ...]`.
#[derive(Clone, Copy)]
struct Planes {
    batch: usize,
    channels: usize,
    positions: usize,
}

impl Planes {
    fn of(op: &str, x: &Tensor) -> Result<Self> {
        match x.dims() {
            [batch, channels, positions @ ..] => {
                Ok(Self { batch: *batch, channels: *channels, positions: positions.iter().product() })
            }
            _ => bail!("{op}: x must be [batch, channels, ...], got {:?}", x.shape()),
        }
    }
}

fn norm_groups(x: &Tensor, num_groups: usize, affine: [&Tensor; 2], eps: f64, then: Then) -> Result<Tensor> {
    let planes = Planes::of("group_norm", x)?;
    if num_groups == 0 || planes.channels % num_groups != 0 {
        bail!("group_norm: {num_groups} groups do not divide the channels of {:?}", x.shape());
    }
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        return launch::group_norm(x, planes, num_groups, affine, (eps, then));
    }
    let weight = vector("group_norm", "weight", affine[0], planes.channels)?;
    let bias = vector("group_norm", "bias", affine[1], planes.channels)?;
    let x = x.contiguous()?;
    let views = (
        View::contiguous("group_norm", &x)?,
        View::contiguous("group_norm", &weight)?,
        View::contiguous("group_norm", &bias)?,
    );
    let (from, weight, bias) = (views.0.f32()?, views.1.f32()?, views.2.f32()?);
    let mut y = vec![0f32; from.len()];
    let per_group = planes.channels / num_groups;
    let shared = Shared::new(&mut y);
    let len = if planes.positions == 0 { 0 } else { planes.batch * num_groups };
    for_each(len, from.len() * 4, |task| {
        let (size, first) = (per_group * planes.positions, task % num_groups * per_group);
        // SAFETY: every task has its own group.
        let to = unsafe { shared.slice(task * size, size) };
        dispatch(NormGroup {
            from: &from[task * size..(task + 1) * size],
            to,
            weight: &weight[first..first + per_group],
            bias: &bias[first..first + per_group],
            eps,
            then,
        });
    });
    tensor(y, x.shape().clone())
}

/// One group of channels, each with its factor and term.
struct NormGroup<'a> {
    from: &'a [f32],
    to: &'a mut [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f64,
    then: Then,
}

impl Op for NormGroup<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let positions = self.from.len() / self.weight.len();
        let (mean, factor) = statistics(s, self.from, positions, self.eps);
        for (channel, from) in self.from.chunks_exact(positions).enumerate() {
            let to = &mut self.to[channel * positions..(channel + 1) * positions];
            let scale = (factor * f64::from(self.weight[channel])) as f32;
            let line = Line { mean, scale, shift: self.bias[channel] };
            match self.then {
                Then::Nothing => row::map(s, line, from, to),
                Then::Silu => row::map(s, SiluOf(line), from, to),
            }
        }
    }
}

/// The mean of a group, whose channels have so many positions, and what makes its deviation 1.
#[inline(always)]
fn statistics<S: Simd>(s: S, group: &[f32], positions: usize, eps: f64) -> (f32, f64) {
    let count = group.len() as f64;
    // A group may have millions of values: lanes are added up channel by channel, channels in f64.
    let mut sum = 0f64;
    for channel in group.chunks_exact(positions) {
        sum += row::long_sum(s, channel);
    }
    let mean = (sum / count) as f32;
    let mut squares = 0f64;
    for channel in group.chunks_exact(positions) {
        squares += row::long_sum_of_squares(s, channel, mean);
    }
    (mean, 1.0 / (squares / count + eps).sqrt())
}

/// `(x - mean) * scale + shift`.
#[derive(Clone, Copy)]
struct Line {
    mean: f32,
    scale: f32,
    shift: f32,
}

impl Function for Line {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        s.fma(s.sub(x, s.splat(self.mean)), s.splat(self.scale), s.splat(self.shift))
    }
}

/// `silu(f(..))`.
#[derive(Clone, Copy)]
struct SiluOf<F>(F);

impl<F: Function> Function for SiluOf<F> {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        Silu.apply(s, self.0.apply(s, x))
    }
}

impl<F: Function2> Function2 for SiluOf<F> {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, a: S::V, b: S::V) -> S::V {
        Silu.apply(s, self.0.apply(s, a, b))
    }
}

fn norm_channels(x: &Tensor, weight: &Tensor, then: Then) -> Result<Tensor> {
    /// Positions that a task takes: what the caches hold for all channels of a VAE.
    const PART: usize = 512;
    let planes = Planes::of("rms_norm_channels", x)?;
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        return launch::rms_norm_channels(x, planes, weight, then);
    }
    let Planes { batch, channels, positions } = planes;
    let weight = vector("rms_norm_channels", "weight", weight, channels)?;
    let x = x.contiguous()?;
    let views = (View::contiguous("rms_norm_channels", &x)?, View::contiguous("rms_norm_channels", &weight)?);
    let (from, weight) = (views.0.f32()?, views.1.f32()?);
    let mut y = vec![0f32; from.len()];
    let parts = positions.div_ceil(PART);
    let shared = Shared::new(&mut y);
    for_each(batch * parts, from.len() * 4, |task| {
        let start = task % parts * PART;
        let place = task / parts * channels * positions + start;
        let len = PART.min(positions - start);
        with_scratch(PART, |norms| {
            let norms = &mut norms[..len];
            norms.fill(0.0);
            dispatch(NormColumns { from, weight, place, positions, norms, then, to: &shared });
        });
    });
    tensor(y, x.shape().clone())
}

/// Some positions of all channels: channel c lies at `place + c * positions`.
struct NormColumns<'a> {
    from: &'a [f32],
    weight: &'a [f32],
    place: usize,
    positions: usize,
    /// One per position, zero at first.
    norms: &'a mut [f32],
    then: Then,
    to: &'a Shared<'a, f32>,
}

impl Op for NormColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let len = self.norms.len();
        for channel in 0..self.weight.len() {
            let start = self.place + channel * self.positions;
            row::add_squares(s, self.norms, &self.from[start..start + len]);
        }
        let root = (self.weight.len() as f32).sqrt();
        for norm in self.norms.iter_mut() {
            let length = norm.sqrt();
            // Not `max`, which takes a number rather than NaN.
            *norm = root / if length < 1e-12 { 1e-12 } else { length };
        }
        for (channel, weight) in self.weight.iter().enumerate() {
            let start = self.place + channel * self.positions;
            // SAFETY: every task has its own positions.
            let to = unsafe { self.to.slice(start, len) };
            let (product, from) = (ScaledProduct(*weight), &self.from[start..start + len]);
            match self.then {
                Then::Nothing => row::zip(s, product, from, self.norms, to),
                Then::Silu => row::zip(s, SiluOf(product), from, self.norms, to),
            }
        }
    }
}

/// `a * b * scale`.
#[derive(Clone, Copy)]
struct ScaledProduct(f32);

impl Function2 for ScaledProduct {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, a: S::V, b: S::V) -> S::V {
        s.mul(s.mul(a, b), s.splat(self.0))
    }
}

#[cfg(test)]
mod tests {
    //! The specifications, in candle's own operations, and the kernels held against them.

    use candle_core::{D, DType};
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{On, assert_close, for_each_device, random};

    mod oracle {
        use super::*;

        pub(super) fn group_norm(
            x: &Tensor,
            num_groups: usize,
            weight: &Tensor,
            bias: &Tensor,
            eps: f64,
        ) -> Result<Tensor> {
            let dims = x.dims().to_vec();
            let (batch, channels) = (dims[0], dims[1]);
            let mut per_channel = vec![1; dims.len()];
            per_channel[1] = channels;
            let grouped = x.contiguous()?.reshape((batch, num_groups, ()))?;
            let centred = grouped.broadcast_sub(&grouped.mean_keepdim(D::Minus1)?)?;
            let scale = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
            let y = centred.broadcast_div(&scale)?.reshape(dims)?;
            y.broadcast_mul(&weight.reshape(per_channel.clone())?)?.broadcast_add(&bias.reshape(per_channel)?)
        }

        pub(super) fn rms_norm_channels(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
            let channels = x.dim(1)?;
            let mut per_channel = vec![1; x.rank()];
            per_channel[1] = channels;
            let norm = x.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(1e-12)?;
            x.broadcast_div(&norm)?.broadcast_mul(&(weight.reshape(per_channel)? * (channels as f64).sqrt())?)
        }

        pub(super) fn silu(x: &Tensor) -> Tensor {
            (x / ((x.neg().unwrap().exp().unwrap() + 1.0).unwrap())).unwrap()
        }
    }

    /// Groups, channels of each, and the positions of pictures and clips: of one value, of odd sizes, of packs that span
    /// channels, of more than a block takes at a time.
    const GROUPS: [(usize, usize, &[usize]); 6] = [
        (1, 1, &[1, 1]),
        (3, 2, &[5, 7]),
        (2, 3, &[2, 6]),
        (4, 1, &[3, 8, 8]),
        (2, 2, &[130, 80]),
        (2, 1, &[3, 67, 61]),
    ];

    for_each_device!(group_norms_equal_their_specification, |on: &On| {
        for (groups, per_group, positions) in GROUPS {
            let channels = groups * per_group;
            let dims = [&[2, channels], positions].concat();
            let (x, weight, bias) = (spread(&dims), random(&[channels], 2), random(&[channels], 3));
            let (x32, weight32, bias32) = (on.rounded(&x), on.rounded(&weight), on.rounded(&bias));
            let (x, weight, bias) = (on.tensor(&x), on.tensor(&weight), on.tensor(&bias));
            let expected = oracle::group_norm(&x32, groups, &weight32, &bias32, 1e-5).unwrap();
            let terms = x.elem_count() / groups;
            on.assert_close(&on.run(|| group_norm(&x, groups, &weight, &bias, 1e-5)), &expected, terms);
            let found = on.run(|| group_norm_silu(&x, groups, &weight, &bias, 1e-5));
            on.assert_close(&found, &oracle::silu(&expected), terms);
        }
    });

    for_each_device!(channel_norms_equal_their_specification, |on: &On| {
        // More channels than registers hold at the end.
        for dims in [&[1, 1, 1, 1][..], &[2, 3, 5, 7], &[1, 33, 3, 8, 8], &[2, 96, 2, 5, 20], &[1, 401, 70]] {
            let (x, weight) = (spread(dims), random(&[dims[1]], 2));
            let (x32, weight32) = (on.rounded(&x), on.rounded(&weight));
            let (x, weight) = (on.tensor(&x), on.tensor(&weight));
            let expected = oracle::rms_norm_channels(&x32, &weight32).unwrap();
            on.assert_close(&on.run(|| rms_norm_channels(&x, &weight)), &expected, dims[1]);
            let found = on.run(|| rms_norm_channels_silu(&x, &weight));
            on.assert_close(&found, &oracle::silu(&expected), dims[1]);
        }
    });

    for_each_device!(nan_makes_everything_nan_that_shares_a_norm_with_it, |on: &On| {
        for dims in [[2, 4, 1], [2, 6, 35], [2, 402, 70]] {
            let (channels, positions) = (dims[1], dims[2]);
            let mut x = crate::testing::values(&spread(&dims));
            // The last value of the first channel.
            x[positions - 1] = f32::NAN;
            let x = on.tensor(&Tensor::from_vec(x, &dims, &candle_core::Device::Cpu).unwrap());
            let weight = on.tensor(&random(&[channels], 2));
            let are_nan = |x: Tensor| crate::testing::values(&x).into_iter().map(f32::is_nan).collect::<Vec<_>>();
            let of_groups = are_nan(on.run(|| group_norm(&x, 2, &weight, &weight, 1e-5)));
            let of_channels = are_nan(on.run(|| rms_norm_channels(&x, &weight)));
            for at in 0..dims.iter().product() {
                assert_eq!(of_groups[at], at < channels / 2 * positions, "group_norm of {dims:?} at {at}");
                let is_same_position = at < channels * positions && at % positions == positions - 1;
                assert_eq!(of_channels[at], is_same_position, "rms_norm_channels of {dims:?} at {at}");
            }
        }
    });

    for_each_device!(views_are_read_by_their_strides_and_unaligned_starts, |on: &On| {
        let x = spread(&[2, 5, 9, 6, 7]).transpose(1, 2).unwrap();
        let weight = random(&[9], 2);
        let (x32, weight32) = (on.rounded(&x), on.rounded(&weight));
        let expected = oracle::group_norm(&x32, 3, &weight32, &weight32, 1e-6).unwrap();
        let (x, weight) = (on.tensor(&x), on.tensor(&weight));
        on.assert_close(&on.run(|| group_norm(&x, 3, &weight, &weight, 1e-6)), &expected, 630);
        let expected = oracle::rms_norm_channels(&x32, &weight32).unwrap();
        on.assert_close(&on.run(|| rms_norm_channels(&x, &weight)), &expected, 9);
        // The second picture of three values per channel does not start at a multiple of 16 bytes.
        let x = spread(&[2, 5, 3]);
        let (x, x32) = (on.tensor(&x).narrow(0, 1, 1).unwrap(), on.rounded(&x).narrow(0, 1, 1).unwrap());
        let (weight, weight32) = (weight.narrow(0, 1, 5).unwrap(), weight32.narrow(0, 1, 5).unwrap());
        let expected = oracle::group_norm(&x32, 5, &weight32, &weight32, 1e-6).unwrap();
        on.assert_close(&on.run(|| group_norm(&x, 5, &weight, &weight, 1e-6)), &expected, 3);
        let expected = oracle::rms_norm_channels(&x32, &weight32).unwrap();
        on.assert_close(&on.run(|| rms_norm_channels(&x, &weight)), &expected, 5);
    });

    for_each_device!(a_large_offset_does_not_drown_the_variance, |on: &On| {
        let x = on.rounded(&(random(&[1, 4, 150, 150], 1) + 1000.0).unwrap());
        let (weight, bias) = (on.rounded(&random(&[4], 2)), on.rounded(&random(&[4], 3)));
        let exact = {
            let x = x.to_dtype(DType::F64).unwrap();
            let (weight, bias) = (weight.to_dtype(DType::F64).unwrap(), bias.to_dtype(DType::F64).unwrap());
            oracle::group_norm(&x, 2, &weight, &bias, 1e-6).unwrap().to_dtype(DType::F32).unwrap()
        };
        let (x, weight, bias) = (on.tensor(&x), on.tensor(&weight), on.tensor(&bias));
        let found = on.run(|| group_norm(&x, 2, &weight, &bias, 1e-6));
        // Differences of values around 1000 are exact to 6e-5 in f32.
        on.assert_close(&found, &exact, 1 << 20);
    });

    for_each_device!(a_zero_column_stays_zero, |on: &On| {
        let (x, weight) = (on.tensor(&random(&[1, 3, 4], 1).zeros_like().unwrap()), on.tensor(&random(&[3], 2)));
        let y = on.run(|| rms_norm_channels(&x, &weight));
        on.assert_close(&y, &random(&[1, 3, 4], 1).zeros_like().unwrap(), 1);
    });

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn groups_and_channels_equal_their_specifications(
            b in 1usize..3, groups in 1usize..5, per_group in 1usize..5, h in 1usize..40, w in 1usize..40,
        ) {
            let channels = groups * per_group;
            let (x, weight, bias) = (spread(&[b, channels, h, w]), random(&[channels], 2), random(&[channels], 3));
            let expected = oracle::group_norm(&x, groups, &weight, &bias, 1e-5).unwrap();
            assert_close(&group_norm(&x, groups, &weight, &bias, 1e-5).unwrap(), &expected, 5e-6);
            let expected = oracle::rms_norm_channels(&x, &weight).unwrap();
            assert_close(&rms_norm_channels(&x, &weight).unwrap(), &expected, 2e-6);
        }
    }

    /// Values that are neither small nor centred.
    fn spread(dims: &[usize]) -> Tensor {
        ((random(dims, 1) * 3.0).unwrap() + 1.5).unwrap()
    }

    #[test]
    fn misfits_name_the_operation_and_the_shapes() {
        let error = group_norm(&random(&[2, 3, 4], 1), 2, &random(&[3], 2), &random(&[3], 2), 1e-6).unwrap_err();
        assert!(
            error.to_string().contains("group_norm: 2 groups") && error.to_string().contains("[2, 3, 4]"),
            "{error}"
        );
    }
}
