//! One number per value, in f32 or 16 bits.

use candle_core::Tensor;

use super::Projection;
use crate::error::Result;
use crate::weights::Weights;

/// `[out, in]`.
#[derive(Debug)]
pub(in crate::layers) struct Dense(pub(in crate::layers) Tensor);

impl Dense {
    /// Tensor `weight [out, in]`.
    pub(super) fn load(weights: &Weights, out_features: usize, in_features: usize) -> Result<Self> {
        Ok(Self(weights.matrix(out_features, in_features, "weight")?))
    }
}

impl Projection for Dense {
    fn forward(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        Ok(tale_kernels::linear(x, &self.0, bias)?)
    }
}
