//! ggml's blocks: the values of a row in groups with common scales, as GGUF files have them.

use std::sync::Arc;

use candle_core::Tensor;
use tale_kernels::QuantisedMatrix;

use super::{Dense, Projection};
use crate::error::Result;
use crate::weights::{Stored, Weights};

/// Tensor `weight [out, in]` where its rows come in blocks.
pub(super) fn load(weights: &Weights, out_features: usize, in_features: usize) -> Result<Option<Arc<dyn Projection>>> {
    let blocks = Blocks::load(weights, out_features, in_features)?;
    Ok(blocks.map(|blocks| Arc::new(blocks) as Arc<dyn Projection>))
}

/// A matrix in blocks, or what stands for it where weights are dry.
#[derive(Debug)]
pub(in crate::layers) enum Blocks {
    Read(QuantisedMatrix),
    Dry(Dense),
}

impl Blocks {
    /// Tensor `weight [rows, columns]`, or the view's share of it; `None` where its rows are no whole blocks.
    pub(in crate::layers) fn load(weights: &Weights, rows: usize, columns: usize) -> Result<Option<Self>> {
        let Some(Stored::Blocks(dtype)) = weights.stored("weight") else { return Ok(None) };
        if !columns.is_multiple_of(dtype.block_size()) {
            return Ok(None);
        }
        let own = weights.own_shape(&[rows, columns], "weight")?;
        let own_dims = (own[0], own[1]);
        let placement = weights.placement();
        weights.note_dequantised(placement.dequantised_bytes(own_dims.0.saturating_mul(own_dims.1)));
        let matrix = weights.packed(&[rows, columns], "weight", move |bytes, device| {
            Ok(QuantisedMatrix::new(bytes, dtype, own_dims, device)?)
        })?;
        Ok(Some(match matrix {
            Some(matrix) => Self::Read(matrix),
            None => Self::Dry(Dense(weights.placeholder(&own)?)),
        }))
    }

    /// The rows of these ids, `[l, columns]` in f32. Of a matrix in host memory.
    pub(in crate::layers) fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Read(matrix) => tale_kernels::embedding_quantised(ids, matrix)?,
            Self::Dry(Dense(table)) => tale_kernels::embedding(ids, table)?,
        })
    }
}

impl Projection for Blocks {
    fn forward(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Read(matrix) => Ok(tale_kernels::linear_quantised(x, matrix, bias)?),
            Self::Dry(dense) => dense.forward(x, bias),
        }
    }
}
