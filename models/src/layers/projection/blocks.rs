//! ggml's blocks: the values of a row in groups with common scales, as GGUF files have them.

use std::sync::Arc;

use candle_core::Tensor;
use tale_kernels::QuantisedMatrix;

use super::{Dense, Projection};
use crate::error::Result;
use crate::weights::{Stored, Weights};

/// Tensor `weight [out, in]` where its rows come in blocks.
pub(super) fn load(weights: &Weights, out_features: usize, in_features: usize) -> Result<Option<Arc<dyn Projection>>> {
    let Some(Stored::Blocks(dtype)) = weights.stored("weight") else { return Ok(None) };
    if !in_features.is_multiple_of(dtype.block_size()) {
        return Ok(None);
    }
    let placement = weights.placement();
    weights.note_dequantised(placement.dequantised_bytes(out_features.saturating_mul(in_features)));
    let matrix = weights.packed(&[out_features, in_features], "weight", move |bytes, device| {
        Ok(QuantisedMatrix::new(bytes, dtype, (out_features, in_features), device)?)
    })?;
    Ok(Some(match matrix {
        Some(matrix) => Arc::new(Blocks(matrix)),
        None => Arc::new(Dense(weights.placeholder(&[out_features, in_features])?)),
    }))
}

#[derive(Debug)]
struct Blocks(QuantisedMatrix);

impl Projection for Blocks {
    fn forward(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        Ok(tale_kernels::linear_quantised(x, &self.0, bias)?)
    }
}
