//! Launches of `sum.cu`.

use candle_core::{Result, Tensor};

use crate::gpu::{Launch, MAX_WAVES_BLOCKS, address, by_dtype, module, output};

module!(SUM, "sum");

const THREADS: usize = 256;

pub(super) fn sum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a, b) = (aligned(a)?, aligned(b)?);
    let y = output(a.shape(), a.dtype(), &a)?;
    let blocks = (a.elem_count() * a.dtype().size_in_bytes()).div_ceil(16 * THREADS).min(MAX_WAVES_BLOCKS);
    Launch::new(&SUM, by_dtype!("sum", a.dtype()), [blocks, 1, 1], THREADS)?
        .tensor(&a)?
        .tensor(&b)?
        .tensor(&y)?
        .i64(a.elem_count())
        .run(&y)?;
    Ok(y)
}

pub(super) fn sum_channels(x: &Tensor, channels: &Tensor) -> Result<Tensor> {
    let ((b, c, h, w), x, channels) = (x.dims4()?, aligned(x)?, channels.contiguous()?);
    let y = output((b, c, h, w), x.dtype(), &x)?;
    let (rows, len, pack) = (b * c, h * w, 16 / x.dtype().size_in_bytes());
    let blocks = (rows * len.div_ceil(pack)).div_ceil(THREADS).min(MAX_WAVES_BLOCKS);
    Launch::new(&SUM, by_dtype!("sum_rows", x.dtype()), [blocks, 1, 1], THREADS)?
        .tensor(&x)?
        .tensor(&channels)?
        .tensor(&y)?
        .i64(rows)
        .i64(len)
        .i32(i32::from(len % pack == 0))
        .run(&y)?;
    Ok(y)
}

/// Contiguous, beginning at a multiple of 16 bytes: a fresh tensor does, a view may begin anywhere.
fn aligned(x: &Tensor) -> Result<Tensor> {
    if address(x)? % 16 == 0 { x.contiguous() } else { x.force_contiguous() }
}
