//! Matrix products by cuBLAS, and launches of `linear.cu`.

use candle_core::{DType, Result, Tensor, bail};

use crate::gpu::{Gemm, Launch, MAX_WAVES_BLOCKS, address, by_dtype, module, output};

module!(LINEAR, "linear");

const THREADS: usize = 256;

/// `shape` is that of the result; the caller has checked that x fits the weight.
pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, shape: Vec<usize>) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    if x.dtype() != weight.dtype() {
        bail!("linear: x is {:?} and the weight {:?}; on a GPU both have one dtype", x.dtype(), weight.dtype());
    }
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let y = output(shape, x.dtype(), &x)?;
    let rows = y.elem_count().checked_div(out).unwrap_or(0);
    let product = Gemm {
        m: rows,
        n: out,
        k: inner,
        lda: inner,
        ldb: inner,
        b_transposed: true,
        ldc: out,
        accumulate: false,
        dtype: x.dtype(),
    };
    product.run(address(&x)?, address(&weight)?, address(&y)?, &x)?;
    if let Some(bias) = bias {
        add_bias(&y, bias, rows, out)?;
    }
    Ok(y)
}

fn add_bias(y: &Tensor, bias: &Tensor, rows: usize, dim: usize) -> Result<()> {
    if bias.dims() != [dim] {
        bail!("linear: bias must have shape [{dim}], got {:?}", bias.shape());
    }
    let bias = bias.to_dtype(y.dtype())?.contiguous()?;
    let pack = 16 / y.dtype().size_in_bytes();
    let is_vector = dim.is_multiple_of(pack) && address(&bias)? % 16 == 0;
    let items = rows * if is_vector { dim / pack } else { dim };
    let blocks = items.div_ceil(THREADS).min(MAX_WAVES_BLOCKS);
    Launch::new(&LINEAR, by_dtype!("add_bias", y.dtype()), [blocks, 1, 1], THREADS)?
        .tensor(y)?
        .tensor(&bias)?
        .i64(rows)
        .i64(dim)
        .i32(i32::from(is_vector))
        .run(y)
}

/// Ids are on the device and are not looked at here: one outside of the table gives a row of NaN.
pub(super) fn embedding(ids: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let ((num, dim), len) = (weight.dims2()?, ids.dims1()?);
    if ids.dtype() != DType::U32 {
        bail!("embedding: ids are u32, got {:?}", ids.dtype());
    }
    let (ids, weight) = (ids.contiguous()?, weight.contiguous()?);
    let y = output((len, dim), weight.dtype(), &weight)?;
    let pack = 16 / weight.dtype().size_in_bytes();
    let is_vector = dim.is_multiple_of(pack) && address(&weight)? % 16 == 0;
    let threads = dim.div_ceil(pack).next_multiple_of(32).clamp(32, THREADS);
    Launch::new(&LINEAR, by_dtype!("embedding", weight.dtype()), [len, 1, 1], threads)?
        .tensor(&ids)?
        .tensor(&weight)?
        .tensor(&y)?
        .i64(num)
        .i64(dim)
        .i32(i32::from(is_vector))
        .run(&weight)?;
    Ok(y)
}
