//! Launches of `change.cu`.

use candle_core::{DType, Result, Tensor};

use crate::gpu::{Launch, address, by_dtype, module, output};

module!(CHANGE, "change");

const THREADS: usize = 256;
/// Two blocks for every multiprocessor of the largest GPU served; the second launch reads as many sums.
const MAX_BLOCKS: usize = 264;

/// Tensors of one shape and dtype.
pub(super) fn relative_l1(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let (len, pack) = (a.elem_count(), 16 / a.dtype().size_in_bytes());
    let is_vector = address(&a)? % 16 == 0 && address(&b)? % 16 == 0;
    let blocks = len.div_ceil(pack * THREADS).clamp(1, MAX_BLOCKS);
    let partial = output((2, blocks), DType::F32, &a)?;
    Launch::new(&CHANGE, by_dtype!("partial_changes", a.dtype()), [blocks, 1, 1], THREADS)?
        .tensor(&a)?
        .tensor(&b)?
        .tensor(&partial)?
        .i64(len)
        .i32(i32::from(is_vector))
        .run(&a)?;
    let y = output((), DType::F32, &a)?;
    Launch::new(&CHANGE, "relative_change", [1, 1, 1], THREADS)?
        .tensor(&partial)?
        .tensor(&y)?
        .i32(blocks as i32)
        .run(&a)?;
    Ok(y)
}
