//! Layers shared by families: weights in, one kernel call out. All take and give the compute dtype.

use candle_core::{DType, Tensor};

use crate::error::Result;
use crate::weights::Weights;

pub mod decoder;
pub mod rope;
pub mod timesteps;

/// `y = x Wᵀ + b`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// Tensors `weight [out, in]` and `bias [out]`.
    pub fn load(weights: &Weights, in_features: usize, out_features: usize) -> Result<Self> {
        let bias = weights.get(&[out_features], "bias")?;
        Ok(Self { weight: weights.matrix(out_features, in_features, "weight")?, bias: Some(bias) })
    }

    /// Tensor `weight [out, in]`.
    pub fn load_no_bias(weights: &Weights, in_features: usize, out_features: usize) -> Result<Self> {
        Ok(Self { weight: weights.matrix(out_features, in_features, "weight")?, bias: None })
    }

    /// From tensors at hand: `weight [out, in]`, `bias [out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// Bytes of the matrix.
    pub fn weight_bytes(&self) -> usize {
        self.weight.elem_count() * self.weight.dtype().size_in_bytes()
    }

    /// `[..., in]` to `[..., out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(tale_kernels::linear(x, &self.weight, self.bias.as_ref())?)
    }
}

/// A table of vectors, one per id.
#[derive(Debug, Clone)]
pub struct Embedding {
    weight: Tensor,
    compute_dtype: DType,
}

impl Embedding {
    /// Tensor `weight [num, dim]`.
    pub fn load(weights: &Weights, num: usize, dim: usize) -> Result<Self> {
        Ok(Self { weight: weights.table(num, dim, "weight")?, compute_dtype: weights.placement().compute_dtype })
    }

    /// `ids [l]` (u32) to `[l, dim]` in the compute dtype, whatever the table's is.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(tale_kernels::embedding(ids, &self.weight)?.to_dtype(self.compute_dtype)?)
    }

    /// The output projection that shares this table (tied embeddings).
    pub fn as_linear(&self) -> Linear {
        Linear::new(self.weight.clone(), None)
    }
}

/// Root-mean-square norm over the last dimension.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Tensor `weight [dim]`.
    pub fn load(weights: &Weights, dim: usize, eps: f64) -> Result<Self> {
        Ok(Self { weight: weights.get(&[dim], "weight")?, eps })
    }

    /// `[..., dim]` to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(tale_kernels::rms_norm(x, &self.weight, self.eps)?)
    }

    /// `sum = x + residual` and its norm.
    pub fn forward_sum(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok(tale_kernels::add_rms_norm(x, residual, &self.weight, self.eps)?)
    }

    /// As part of a rotation.
    pub fn of_queries_or_keys(&self) -> tale_kernels::QkNorm<'_> {
        tale_kernels::QkNorm { weight: &self.weight, eps: self.eps }
    }

    /// Where the layer lives.
    pub fn device(&self) -> &candle_core::Device {
        self.weight.device()
    }
}

/// Layer norm over the last dimension.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    eps: f64,
}

impl LayerNorm {
    /// Tensors `weight [dim]` and `bias [dim]`.
    pub fn load(weights: &Weights, dim: usize, eps: f64) -> Result<Self> {
        let (weight, bias) = (weights.get(&[dim], "weight")?, weights.get(&[dim], "bias")?);
        Ok(Self { weight: Some(weight), bias: Some(bias), eps })
    }

    /// Without learned weight and bias.
    pub fn no_affine(eps: f64) -> Self {
        Self { weight: None, bias: None, eps }
    }

    /// `[..., dim]` to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(tale_kernels::layer_norm(x, self.weight.as_ref(), self.bias.as_ref(), self.eps)?)
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

/// 2-D convolution, stride 1 unless said otherwise, symmetric zero padding.
#[derive(Debug, Clone)]
pub struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    padding: usize,
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
        let weight = weights.get(&[out_channels, in_channels, kernel, kernel], "weight")?;
        Ok(Self { weight, bias: weights.get(&[out_channels], "bias")?, padding })
    }

    /// `[b, in, h, w]` to `[b, out, h', w']`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(tale_kernels::conv2d(x, &self.weight, Some(&self.bias), self.padding)?)
    }
}

/// 3-D convolution, stride 1, symmetric zero padding in space, none in time (the caller puts past frames in front).
#[derive(Debug, Clone)]
pub struct Conv3d {
    weight: Tensor,
    bias: Tensor,
    padding: usize,
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
        let [kt, kh, kw] = kernel;
        let weight = weights.get(&[out_channels, in_channels, kt, kh, kw], "weight")?;
        Ok(Self { weight, bias: weights.get(&[out_channels], "bias")?, padding })
    }

    /// `[b, in, t, h, w]` to `[b, out, t - kt + 1, h', w']`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(tale_kernels::conv3d(x, &self.weight, Some(&self.bias), self.padding)?)
    }
}
