//! Launches of `upsample.cu`.

use candle_core::{Result, Tensor};

use crate::gpu::{Launch, MAX_WAVES_BLOCKS, address, by_dtype, module, output};

module!(UPSAMPLE, "upsample");

const THREADS: usize = 256;

pub(super) fn upsample_nearest2d(x: &Tensor) -> Result<Tensor> {
    let ((b, c, h, w), x) = (x.dims4()?, x.contiguous()?);
    let y = output((b, c, 2 * h, 2 * w), x.dtype(), &x)?;
    let pack = 16 / x.dtype().size_in_bytes();
    let is_vector = w % pack == 0 && address(&x)? % 16 == 0;
    let rows = b * c * h;
    let blocks = (rows * w.div_ceil(pack)).div_ceil(THREADS).min(MAX_WAVES_BLOCKS);
    Launch::new(&UPSAMPLE, by_dtype!("upsample_nearest2d", x.dtype()), [blocks, 1, 1], THREADS)?
        .tensor(&x)?
        .tensor(&y)?
        .i64(rows)
        .i64(w)
        .i32(i32::from(is_vector))
        .run(&x)?;
    Ok(y)
}
