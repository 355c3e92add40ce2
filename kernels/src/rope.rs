//! Rotary position embeddings, in the two layouts that checkpoints use.
//!
//! Every head of a position turns by the same angles; a task takes some positions. `x` is read by its strides, so that
//! the parts of a fused projection need no copy.

use candle_core::{Result, Tensor, bail};

#[cfg(gpu)]
use crate::gpu;
use crate::norm::rms_norm;
use crate::parallel::{Shared, for_each, tasks_for};
use crate::simd::{Op, Simd, dispatch};
use crate::view::{View, tensor};

#[cfg(gpu)]
mod launch;

/// Half-split layout (Llama, Qwen): pairs are (i, i + d/2). `x [l, heads, d]`, `cos` and `sin` `[l, d/2]`.
pub fn rope_half(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (l, heads, d) = x.dims3()?;
    norm_rope(&x.unsqueeze(0)?, None, cos, sin, Layout::Half)?.reshape((l, heads, d))
}

/// Interleaved layout (FLUX, Wan): pairs are (2i, 2i + 1). `x [b, l, heads, d]`, `cos` and `sin` `[l, d/2]`.
pub fn rope_interleaved(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    norm_rope(x, None, cos, sin, Layout::Interleaved)
}

/// The root-mean-square norm of queries or keys: over each head if `weight` is `[d]`, over all heads of a position
/// together if it is `[heads * d]` (of one head both are the same).
#[derive(Debug, Clone, Copy)]
pub struct Norm<'a> {
    /// Factors.
    pub weight: &'a Tensor,
    /// Added to the mean square.
    pub eps: f64,
}

impl Norm<'_> {
    fn is_across_heads(&self, d: usize) -> bool {
        self.weight.elem_count() != d
    }
}

/// `x [b, l, heads, d]` normed if asked for, then rotated by `cos` and `sin` `[l, d/2]` (f32).
pub fn norm_rope(x: &Tensor, norm: Option<&Norm<'_>>, cos: &Tensor, sin: &Tensor, layout: Layout) -> Result<Tensor> {
    let (_, l, heads, d) = x.dims4()?;
    if d % 2 != 0 || cos.dims() != [l, d / 2] || sin.dims() != cos.dims() {
        bail!("rope: x {:?} does not fit cos {:?} and sin {:?}", x.shape(), cos.shape(), sin.shape());
    }
    if let Some(norm) = norm
        && norm.weight.dims() != [d]
        && norm.weight.dims() != [heads * d]
    {
        bail!("rope: x {:?} does not fit norm weights {:?}", x.shape(), norm.weight.shape());
    }
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        return launch::rotate(x, norm, cos, sin, layout);
    }
    let normed = norm.map(|norm| {
        let rows = if norm.is_across_heads(d) { x.flatten_from(2)? } else { x.clone() };
        rms_norm(&rows, norm.weight, norm.eps)?.reshape(x.shape())
    });
    rotate("rope", normed.transpose()?.as_ref().unwrap_or(x), cos, sin, layout)
}

/// Where the two values of a pair lie in a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Pair i is (i, i + d/2).
    Half,
    /// Pair i is (2i, 2i + 1).
    Interleaved,
}

/// `x [b, l, heads, d]`.
fn rotate(op: &'static str, x: &Tensor, cos: &Tensor, sin: &Tensor, layout: Layout) -> Result<Tensor> {
    let (b, l, heads, d) = x.dims4()?;
    let x = if x.stride()[3] == 1 { x.clone() } else { x.contiguous()? };
    let (cos, sin) = (cos.contiguous()?, sin.contiguous()?);
    let views = (View::strided(op, &x), View::contiguous(op, &cos)?, View::contiguous(op, &sin)?);
    let (from, cos, sin) = (views.0.f32()?, views.1.f32()?, views.2.f32()?);
    let (positions, row, half) = (b * l, heads * d, d / 2);
    let mut y = vec![0f32; positions * row];
    let part = positions.div_ceil(tasks_for(2 * y.len())).max(1);
    let (work, shared) = (2 * y.len(), Shared::new(&mut y));
    for_each(positions.div_ceil(part), work, |task| {
        for position in task * part..positions.min((task + 1) * part) {
            let (stride, angle) = (x.stride(), position % l);
            // SAFETY: every task has its own positions.
            let to = unsafe { shared.slice(position * row, row) };
            dispatch(RotateHeads {
                from: &from[position / l * stride[0] + angle * stride[1]..],
                head_stride: stride[2],
                to,
                cos: &cos[angle * half..(angle + 1) * half],
                sin: &sin[angle * half..(angle + 1) * half],
                layout,
            });
        }
    });
    tensor(y, (b, l, heads, d))
}

/// All heads of one position.
struct RotateHeads<'a> {
    from: &'a [f32],
    head_stride: usize,
    /// `[heads, d]`.
    to: &'a mut [f32],
    /// `[d/2]`.
    cos: &'a [f32],
    sin: &'a [f32],
    layout: Layout,
}

impl Op for RotateHeads<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _s: S) {
        let d = 2 * self.cos.len();
        for (head, to) in self.to.chunks_exact_mut(d.max(1)).enumerate() {
            let from = &self.from[head * self.head_stride..][..d];
            match self.layout {
                Layout::Half => half(from, to, self.cos, self.sin),
                Layout::Interleaved => interleaved(from, to, self.cos, self.sin),
            }
        }
    }
}

// Plain loops: the compiler turns both into vectors of the instruction set that they are inlined into.

#[inline(always)]
fn half(from: &[f32], to: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let (from_a, from_b) = from.split_at(half);
    let (to_a, to_b) = to.split_at_mut(half);
    let (from_b, to_b, sin) = (&from_b[..half], &mut to_b[..half], &sin[..half]);
    for i in 0..half {
        to_a[i] = from_a[i] * cos[i] - from_b[i] * sin[i];
        to_b[i] = from_b[i] * cos[i] + from_a[i] * sin[i];
    }
}

#[inline(always)]
fn interleaved(from: &[f32], to: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let (from, to, sin) = (&from[..2 * half], &mut to[..2 * half], &sin[..half]);
    for i in 0..half {
        let (re, im) = (from[2 * i], from[2 * i + 1]);
        to[2 * i] = re * cos[i] - im * sin[i];
        to[2 * i + 1] = re * sin[i] + im * cos[i];
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{On, assert_close, bits, for_each_device, random, threads};

    mod oracle {
        use super::*;

        pub(super) fn rope_half(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
            let half = x.dim(2)? / 2;
            let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
            let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
            let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
            let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
            Tensor::cat(&[first, second], 2)
        }

        pub(super) fn rope_interleaved(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
            let (b, l, heads, d) = x.dims4()?;
            let pairs = x.reshape((b, l, heads, d / 2, 2))?;
            let (re, im) = (pairs.narrow(4, 0, 1)?, pairs.narrow(4, 1, 1)?);
            let (cos, sin) = (cos.reshape((1, l, 1, d / 2, 1))?, sin.reshape((1, l, 1, d / 2, 1))?);
            let first = (re.broadcast_mul(&cos)? - im.broadcast_mul(&sin)?)?;
            let second = (re.broadcast_mul(&sin)? + im.broadcast_mul(&cos)?)?;
            Tensor::cat(&[first, second], 4)?.reshape((b, l, heads, d))
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn equals_the_specification(b in 1usize..3, l in 1usize..20, heads in 1usize..5, half in 1usize..40) {
            let (cos, sin) = (random(&[l, half], 1), random(&[l, half], 2));
            let x = random(&[b, l, heads, 2 * half], 3);
            let expected = oracle::rope_interleaved(&x, &cos, &sin).unwrap();
            assert_close(&rope_interleaved(&x, &cos, &sin).unwrap(), &expected, 3e-7);
            let x = x.get(0).unwrap();
            assert_close(&rope_half(&x, &cos, &sin).unwrap(), &oracle::rope_half(&x, &cos, &sin).unwrap(), 3e-7);
        }
    }

    for_each_device!(norm_and_rotation_equal_their_specifications, |on: &On| {
        // Heads of one pair, of pairs that no pack holds, of whole packs, of the published sizes.
        for (heads, d) in [(1, 2), (3, 6), (2, 24), (3, 64), (2, 128)] {
            let (cos, sin) = (random(&[5, d / 2], 1), random(&[5, d / 2], 2));
            // The middle one of three parts of a fused projection.
            let fused = random(&[2, 5, 3, heads, d], 3);
            let part = |of: &Tensor| of.narrow(2, 1, 1).unwrap().squeeze(2).unwrap();
            let (x32, x) = (part(&on.rounded(&fused)), part(&on.tensor(&fused)));
            let (cos, sin) = (on.as_is(&cos), on.as_is(&sin));
            for weights in [None, Some(d), Some(heads * d)] {
                let weight = weights.map(|len| random(&[len], 4));
                let normed = match &weight {
                    Some(weight) if weight.elem_count() != d => {
                        let rows = x32.flatten_from(2).unwrap();
                        rms_norm(&rows, &on.rounded(weight), 1e-6).unwrap().reshape(x32.shape()).unwrap()
                    }
                    Some(weight) => rms_norm(&x32, &on.rounded(weight), 1e-6).unwrap(),
                    None => x32.clone(),
                };
                let weight = weight.map(|weight| on.tensor(&weight));
                let norm = weight.as_ref().map(|weight| Norm { weight, eps: 1e-6 });
                let (host_cos, host_sin) = (random(&[5, d / 2], 1), random(&[5, d / 2], 2));
                let found = on.run(|| norm_rope(&x, norm.as_ref(), &cos, &sin, Layout::Interleaved));
                let expected = oracle::rope_interleaved(&normed, &host_cos, &host_sin).unwrap();
                on.assert_close(&found, &expected, heads * d);
                let found = on.run(|| norm_rope(&x, norm.as_ref(), &cos, &sin, Layout::Half));
                for b in 0..2 {
                    let expected = oracle::rope_half(&normed.get(b).unwrap(), &host_cos, &host_sin).unwrap();
                    on.assert_close(&found.get(b).unwrap(), &expected, heads * d);
                }
            }
        }
    });

    #[test]
    fn parts_of_a_fused_projection_are_read_where_they_lie() {
        let qkv = random(&[2, 300, 3, 4, 16], 1);
        let (cos, sin) = (random(&[300, 8], 2), random(&[300, 8], 3));
        let k = qkv.narrow(2, 1, 1).unwrap().squeeze(2).unwrap();
        let whole = k.contiguous().unwrap();
        let expected = rope_interleaved(&whole, &cos, &sin).unwrap();
        assert_eq!(bits(&rope_interleaved(&k, &cos, &sin).unwrap()), bits(&expected));
        assert_close(&expected, &oracle::rope_interleaved(&whole, &cos, &sin).unwrap(), 3e-7);
        let turned = k.transpose(2, 3).unwrap().contiguous().unwrap().transpose(2, 3).unwrap();
        assert_eq!(bits(&threads(1, || rope_interleaved(&turned, &cos, &sin).unwrap())), bits(&expected));
    }

    #[test]
    fn misfits_name_the_operation_and_the_shapes() {
        let error =
            rope_half(&random(&[2, 3, 8], 1), &random(&[2, 3], 1), &random(&[2, 4], 1)).unwrap_err().to_string();
        assert!(error.contains("rope") && error.contains("[1, 2, 3, 8]") && error.contains("[2, 3]"), "{error}");
    }
}
