//! Layers shared by families: weights in, one kernel call out. All take and give the compute dtype.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use tale_kernels::{CausalOptions, CausalPadding, ConvOptions, QkNorm, RopeLayout, conv_weight};

use crate::error::Result;
use crate::lora::{LayerShape, Slot};
use crate::weights::{Axis, Share, Weights};

pub mod decoder;
pub mod joint;
mod projection;
pub mod rope;
pub mod timesteps;

use projection::{Dense, Projection};

/// Values that a product of many rows on the CPU holds beside each row of so many values: the row once more, in blocks.
pub fn packed_values(columns: usize) -> usize {
    const BLOCK: usize = 512;
    const BLOCK_STRIDE: usize = 528;
    columns.div_ceil(BLOCK) * BLOCK_STRIDE
}

/// `y = x Wᵀ + b`, and the term of an adapter where one is active.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Arc<dyn Projection>,
    bias: Option<Tensor>,
    slot: Option<Arc<Slot>>,
}

impl Linear {
    /// As [`Linear::load_no_bias`], with the tensor `bias [out]`: of inputs that are shared out the first share adds it.
    pub fn load(weights: &Weights, in_features: usize, out_features: usize) -> Result<Self> {
        let bias = match weights.share() {
            Some(Share { axis: Axis::Columns, index: 0, .. }) => Some(weights.shared_out(None)),
            Some(Share { axis: Axis::Columns, .. }) => {
                weights.ignore("bias");
                None
            }
            _ => Some(weights.clone()),
        };
        let bias = bias.map(|weights| weights.get(&[out_features], "bias")).transpose()?;
        Ok(Self { bias, ..Self::load_no_bias(weights, in_features, out_features)? })
    }

    /// The matrix of this view, `[out, in]`, in whichever format the files keep it; of a view that is shared out its share, whose
    /// sizes are those of the whole.
    pub fn load_no_bias(weights: &Weights, in_features: usize, out_features: usize) -> Result<Self> {
        let weight = projection::load(weights, out_features, in_features)?;
        let slot = weights.slot(LayerShape::Linear { in_features, out_features });
        Ok(Self { weight, bias: None, slot })
    }

    /// From tensors at hand: `weight [out, in]`, `bias [out]`. No adapter reaches it.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight: Arc::new(Dense(weight)), bias, slot: None }
    }

    /// As [`Linear::new`]; adapters reach it by the name of this view.
    pub fn named(weight: Tensor, bias: Option<Tensor>, weights: &Weights) -> Result<Self> {
        let (out_features, in_features) = weight.dims2()?;
        Ok(Self::reached(weight, bias, weights, LayerShape::Linear { in_features, out_features }))
    }

    /// As [`Linear::named`], where files have the weight in another shape.
    pub fn reached(weight: Tensor, bias: Option<Tensor>, weights: &Weights, shape: LayerShape) -> Self {
        Self { slot: weights.slot(shape), ..Self::new(weight, bias) }
    }

    /// `[..., in]` to `[..., out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.weight.forward(x, self.bias.as_ref())?;
        match &self.slot {
            Some(slot) => slot.add_linear(y, x),
            None => Ok(y),
        }
    }
}

/// A table of vectors, one per id.
#[derive(Debug, Clone)]
pub struct Embedding {
    vectors: Vectors,
    compute_dtype: DType,
}

#[derive(Debug, Clone)]
enum Vectors {
    Dense(Tensor),
    /// As a file has them: on the CPU, which widens the rows that are asked for.
    Blocks(Arc<projection::Blocks>),
}

impl Embedding {
    /// Tensor `weight [num, dim]`.
    pub fn load(weights: &Weights, num: usize, dim: usize) -> Result<Self> {
        let blocks = match weights.placement().is_gpu() {
            true => None,
            false => projection::Blocks::load(weights, num, dim)?,
        };
        let vectors = match blocks {
            Some(blocks) => Vectors::Blocks(Arc::new(blocks)),
            None => Vectors::Dense(weights.matrix(num, dim, "weight")?),
        };
        Ok(Self { vectors, compute_dtype: weights.placement().compute_dtype })
    }

    /// `ids [l]` (u32) to `[l, dim]` in the compute dtype, whatever the table's is.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let vectors = match &self.vectors {
            Vectors::Dense(table) => tale_kernels::embedding(ids, table)?,
            Vectors::Blocks(table) => table.rows(ids)?,
        };
        Ok(vectors.to_dtype(self.compute_dtype)?)
    }

    /// The output projection that shares this table (tied embeddings).
    pub fn as_linear(&self) -> Linear {
        match &self.vectors {
            Vectors::Dense(table) => Linear::new(table.clone(), None),
            Vectors::Blocks(table) => Linear { weight: table.clone(), bias: None, slot: None },
        }
    }
}

/// Root-mean-square norm over the last dimension.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Adaptable,
    eps: f64,
}

impl RmsNorm {
    /// Tensor `weight [dim]`.
    pub fn load(weights: &Weights, dim: usize, eps: f64) -> Result<Self> {
        let slot = weights.slot(LayerShape::Norm { dim, has_bias: false });
        Ok(Self { weight: Adaptable { own: weights.get(&[dim], "weight")?, slot }, eps })
    }

    /// `[..., dim]` to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(tale_kernels::rms_norm(x, &self.weight.weight()?, self.eps)?)
    }

    /// `sum = x + residual` and its norm.
    pub fn forward_sum(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok(tale_kernels::add_rms_norm(x, residual, &self.weight.weight()?, self.eps)?)
    }

    /// Queries or keys `x [b, l, heads, d]`, normed and then rotated by `cos` and `sin` `[l, d/2]` (f32): over each head or
    /// over all heads of a position together, as many values as the norm has.
    pub fn rotated(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, layout: RopeLayout) -> Result<Tensor> {
        let norm = QkNorm { weight: &self.weight.weight()?, eps: self.eps };
        Ok(tale_kernels::norm_rope(x, Some(&norm), cos, sin, layout)?)
    }

    /// Where the layer lives.
    pub fn device(&self) -> &candle_core::Device {
        self.weight.own.device()
    }
}

/// A tensor of a network, and what adapters add to it.
#[derive(Debug, Clone)]
struct Adaptable {
    own: Tensor,
    slot: Option<Arc<Slot>>,
}

impl Adaptable {
    /// As a weight.
    fn weight(&self) -> Result<Tensor> {
        match &self.slot {
            Some(slot) => slot.weight(&self.own),
            None => Ok(self.own.clone()),
        }
    }

    /// As a bias.
    fn bias(&self) -> Result<Tensor> {
        match &self.slot {
            Some(slot) => slot.bias(&self.own),
            None => Ok(self.own.clone()),
        }
    }
}

/// A learned tensor that a network adds to something: modulation.
#[derive(Debug, Clone)]
pub struct Table(Adaptable);

impl Table {
    /// The tensor of this view's own name.
    pub fn load(weights: &Weights, dims: [usize; 3], name: &str) -> Result<Self> {
        let slot = weights.pp(name).slot(LayerShape::Table { dims });
        Ok(Self(Adaptable { own: weights.get(&dims, name)?, slot }))
    }

    /// In the shape in which it was loaded.
    pub fn values(&self) -> Result<Tensor> {
        self.0.weight()
    }

    /// Where it lives.
    pub fn device(&self) -> &candle_core::Device {
        self.0.own.device()
    }
}

/// Layer norm over the last dimension.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Adaptable,
    bias: Adaptable,
    eps: f64,
}

impl LayerNorm {
    /// Tensors `weight [dim]` and `bias [dim]`.
    pub fn load(weights: &Weights, dim: usize, eps: f64) -> Result<Self> {
        let slot = weights.slot(LayerShape::Norm { dim, has_bias: true });
        let part = |name: &str| {
            Ok::<_, crate::error::Error>(Adaptable { own: weights.get(&[dim], name)?, slot: slot.clone() })
        };
        Ok(Self { weight: part("weight")?, bias: part("bias")?, eps })
    }

    /// `[..., dim]` to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (self.weight.weight()?, self.bias.bias()?);
        Ok(tale_kernels::layer_norm(x, Some(&weight), Some(&bias), self.eps)?)
    }
}

/// Group norm over `[batch, channels, ...]`.
#[derive(Debug, Clone)]
pub struct GroupNorm {
    num_groups: usize,
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl GroupNorm {
    /// Tensors `weight [channels]` and `bias [channels]`.
    pub fn load(weights: &Weights, num_groups: usize, channels: usize, eps: f64) -> Result<Self> {
        let (weight, bias) = (weights.get(&[channels], "weight")?, weights.get(&[channels], "bias")?);
        Ok(Self { num_groups, weight, bias, eps })
    }

    /// `[batch, channels, ...]` to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(tale_kernels::group_norm(x, self.num_groups, &self.weight, &self.bias, self.eps)?)
    }

    /// `silu(norm(x))`.
    pub fn activated(&self, x: &Tensor) -> Result<Tensor> {
        Ok(tale_kernels::group_norm_silu(x, self.num_groups, &self.weight, &self.bias, self.eps)?)
    }
}

/// 2-D convolution with zeros on all four sides, and the term of an adapter where one is active.
#[derive(Debug, Clone)]
pub struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    options: ConvOptions,
    slot: Option<Arc<Slot>>,
}

impl Conv2d {
    /// Tensors `weight [out, in, kernel, kernel]` and `bias [out]`.
    pub fn load(
        weights: &Weights,
        in_channels: usize,
        out_channels: usize,
        kernel: usize,
        padding: usize,
    ) -> Result<Self> {
        let weight = conv_weight(&weights.get(&[out_channels, in_channels, kernel, kernel], "weight")?)?;
        Ok(Self {
            weight,
            bias: weights.get(&[out_channels], "bias")?,
            options: ConvOptions::padded(padding),
            slot: weights.slot(LayerShape::Conv2d { in_channels, out_channels, kernel }),
        })
    }

    /// The convolution of pictures that are first upsampled by 2, to the nearest value.
    pub fn upsampling(mut self) -> Self {
        self.options.upsample = 2;
        self
    }

    /// The convolution at every second row and column.
    pub fn halving(mut self) -> Self {
        self.options.stride = 2;
        self
    }

    /// With zeros after the last row and column, and none before the first ones.
    pub fn padded_after(mut self, padding: usize) -> Self {
        self.options.padding = [0, padding];
        self
    }

    /// `[b, in, h, w]` to `[b, out, h', w']`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = tale_kernels::conv2d(x, &self.weight, Some(&self.bias), self.options)?;
        match &self.slot {
            Some(slot) => slot.add_conv2d(y, x, self.options),
            None => Ok(y),
        }
    }

    /// Each frame by itself: `[b, in, t, h, w]` to `[b, out, t, h', w']`. Only decoders of clips do this, which adapters
    /// do not reach.
    pub fn forward_frames(&self, x: &Tensor) -> Result<Tensor> {
        Ok(tale_kernels::conv3d(x, &self.weight.unsqueeze(2)?, Some(&self.bias), self.options)?)
    }
}

/// 3-D convolution over the frames that it is given, with zeros on all four sides of each.
#[derive(Debug, Clone)]
pub struct Conv3d {
    weight: Tensor,
    bias: Tensor,
    options: ConvOptions,
}

impl Conv3d {
    /// Tensors `weight [out, in, kt, kh, kw]` and `bias [out]`; `kernel` is `[kt, kh, kw]`.
    pub fn load(
        weights: &Weights,
        in_channels: usize,
        out_channels: usize,
        kernel: [usize; 3],
        padding: usize,
    ) -> Result<Self> {
        let [weight, bias] = load_conv3d(weights, in_channels, out_channels, kernel)?;
        Ok(Self { weight, bias, options: ConvOptions::padded(padding) })
    }

    /// `[b, in, t, h, w]` to `[b, out, t - kt + 1, h', w']`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(tale_kernels::conv3d(x, &self.weight, Some(&self.bias), self.options)?)
    }
}

fn load_conv3d(weights: &Weights, inner: usize, out: usize, [kt, kh, kw]: [usize; 3]) -> Result<[Tensor; 2]> {
    let weight = conv_weight(&weights.get(&[out, inner, kt, kh, kw], "weight")?)?;
    Ok([weight, weights.get(&[out], "bias")?])
}

/// 3-D convolution that sees the current frame and those before it, for clips that come in chunks.
#[derive(Debug, Clone)]
pub struct CausalConv3d {
    weight: Tensor,
    bias: Tensor,
    options: CausalOptions,
    /// Frames before the current one that the kernel sees.
    history: usize,
}

impl CausalConv3d {
    /// Tensors `weight [out, in, kt, kh, kw]` and `bias [out]`; `kernel` is `[kt, kh, kw]`.
    pub fn load(
        weights: &Weights,
        in_channels: usize,
        out_channels: usize,
        kernel: [usize; 3],
        padding: CausalPadding,
    ) -> Result<Self> {
        let [weight, bias] = load_conv3d(weights, in_channels, out_channels, kernel)?;
        Ok(Self { weight, bias, options: CausalOptions::new(padding), history: kernel[0].saturating_sub(1) })
    }

    /// The convolution of frames that are first upsampled by 2, to the nearest value.
    pub fn upsampling(mut self) -> Self {
        self.options.upsample = 2;
        self
    }

    /// The convolution at every `time`th frame, and every `space`th row and column.
    pub fn strided(mut self, [time, space]: [usize; 2]) -> Self {
        self.options.stride = [time, space];
        self
    }

    /// A clip that has no frames before these, `[b, in, t, h, w]` to `[b, out, t', h', w']`.
    pub fn forward_whole(&self, x: &Tensor) -> Result<Tensor> {
        Ok(tale_kernels::causal_conv3d(x, None, &self.weight, Some(&self.bias), self.options)?)
    }

    /// The next chunk of a clip, `[b, in, t, h, w]` to `[b, out, t, h, w]`. `past` is absent before the first chunk, and
    /// becomes what the next one needs of this one.
    pub fn forward(&self, x: &Tensor, past: &mut Option<Tensor>) -> Result<Tensor> {
        let before = past.take();
        *past = self.remembered(before.as_ref(), x)?;
        let bias = Some(&self.bias);
        Ok(tale_kernels::causal_conv3d(x, before.as_ref(), &self.weight, bias, self.options)?)
    }

    /// The last frames of `past` and x. A copy: a view would keep the whole chunk alive until the next one.
    fn remembered(&self, past: Option<&Tensor>, x: &Tensor) -> Result<Option<Tensor>> {
        let (t, history) = (x.dim(2)?, self.history);
        if history == 0 {
            return Ok(None);
        }
        if t >= history {
            return Ok(Some(x.narrow(2, t - history, history)?.force_contiguous()?));
        }
        let Some(past) = past else { return Ok(Some(x.force_contiguous()?)) };
        let kept = (history - t).min(past.dim(2)?);
        Ok(Some(Tensor::cat(&[&past.narrow(2, past.dim(2)? - kept, kept)?, x], 2)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_causal_convolution_remembers_as_many_frames_as_its_kernel_sees() {
        let tensor = |dims: &[usize]| Tensor::rand(-1f32, 1f32, dims, &Device::Cpu).expect("a tensor");
        let (weight, bias) = (tensor(&[4, 2, 3, 3, 3]), tensor(&[4]));
        for padding in [CausalPadding::Zeros, CausalPadding::FirstFrame] {
            let (weight, bias, options) = (weight.clone(), bias.clone(), CausalOptions::new(padding));
            let conv = CausalConv3d { weight, bias, options, history: 2 };
            let clip = tensor(&[1, 2, 7, 5, 4]);
            let whole = conv.forward(&clip, &mut None).expect("a convolution");
            for chunks in [[1, 1, 5], [3, 3, 1], [2, 1, 4]] {
                let (mut past, mut first, mut found) = (None, 0, Vec::new());
                for len in chunks {
                    let chunk = clip.narrow(2, first, len).expect("frames of the clip");
                    found.push(conv.forward(&chunk, &mut past).expect("a convolution"));
                    first += len;
                    assert_eq!(past.as_ref().expect("a past").dim(2).expect("frames"), first.min(2));
                }
                let found = Tensor::cat(&found, 2).expect("frames");
                let values = |x: &Tensor| x.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("values");
                assert_eq!(values(&found), values(&whole));
            }
        }
    }
}
