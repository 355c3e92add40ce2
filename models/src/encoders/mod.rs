//! Encoders of texts and pictures, shared by picture and video families.

use candle_core::Tensor;

use crate::error::Result;

pub mod clip;
pub mod clip_chunks;
pub mod clip_layer;
pub mod clip_vision;
pub mod image_processor;
pub mod prompt_clean;
pub mod t5;

/// Rows of ids as the encoders take them.
pub fn slices(rows: &[Vec<u32>]) -> Vec<&[u32]> {
    rows.iter().map(Vec::as_slice).collect()
}

/// The rows `[1, ...]` of a batch, each a copy: a view would keep the whole batch alive.
pub fn rows_of(batch: &Tensor) -> Result<Vec<Tensor>> {
    (0..batch.dim(0)?).map(|row| Ok(batch.narrow(0, row, 1)?.force_contiguous()?)).collect()
}
