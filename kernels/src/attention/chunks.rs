//! The layout in which kernels of a GPU read heads, our own and those of FlashAttention-2: rows of whole 16-byte chunks.

use candle_core::{DType, Result, Tensor};

use super::rows_of_heads;
use crate::gpu::address;

/// 16-bit values of one 16-byte access.
pub(super) const VALUES_PER_CHUNK: usize = 8;

/// Heads of 16-bit values are read in 16-byte chunks: a layout without them is copied.
pub(super) fn readable(x: &Tensor) -> Result<Tensor> {
    let x = rows_of_heads(x)?;
    let aligned = || -> Result<bool> {
        let rows =
            x.stride()[..3].iter().zip(x.dims()).all(|(stride, len)| *len == 1 || stride % VALUES_PER_CHUNK == 0);
        Ok(rows && address(&x)? % 16 == 0)
    };
    if x.dtype() == DType::F32 || aligned()? { Ok(x) } else { x.force_contiguous() }
}
