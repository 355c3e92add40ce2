//! Launches of `activation.cu`.

use candle_core::{Result, Tensor, bail};

use crate::gpu::{Launch, MAX_WAVES_BLOCKS, address, by_dtype, module, output};

module!(ACTIVATION, "activation");

const THREADS: usize = 256;

/// Numbers as the kernels know them.
#[derive(Debug, Clone, Copy)]
pub(super) enum Function {
    Silu = 0,
    GeluTanh = 1,
    GeluErf = 2,
    QuickGelu = 3,
    /// x as it is.
    Copy = 4,
}

pub(super) fn unary(function: Function, x: &Tensor) -> Result<Tensor> {
    // A fresh tensor is aligned; a view may begin anywhere.
    let x = if address(x)? % 16 == 0 { x.contiguous()? } else { x.force_contiguous()? };
    let y = output(x.shape(), x.dtype(), &x)?;
    launch_unary(function, &x, &y)?;
    Ok(y)
}

/// Contiguous tensors of one shape and dtype.
pub(crate) fn copy_into(from: &Tensor, to: &Tensor) -> Result<()> {
    if address(from)? % 16 != 0 || address(to)? % 16 != 0 {
        bail!("copy_into: tensors must begin at a multiple of 16 bytes");
    }
    launch_unary(Function::Copy, from, to)
}

fn launch_unary(function: Function, x: &Tensor, y: &Tensor) -> Result<()> {
    let len = x.elem_count();
    let blocks = (len * x.dtype().size_in_bytes()).div_ceil(16 * THREADS).min(MAX_WAVES_BLOCKS);
    Launch::new(&ACTIVATION, by_dtype!("unary", x.dtype()), [blocks, 1, 1], THREADS)?
        .tensor(x)?
        .tensor(y)?
        .i64(len)
        .i32(function as i32)
        .run(x)
}

/// `function(gate) * value`, of the same shape; the last dimension may be part of a wider row.
pub(super) fn gated(op: &str, function: Function, gate: &Tensor, value: &Tensor) -> Result<Tensor> {
    if gate.dtype() != value.dtype() {
        bail!("{op}: operands of two dtypes, {:?} and {:?}", gate.dtype(), value.dtype());
    }
    let (gate, value) = (rows_apart(gate)?, rows_apart(value)?);
    let dim = gate.tensor.dims().last().copied().unwrap_or(1);
    let rows = gate.tensor.elem_count().checked_div(dim).unwrap_or(0);
    let y = output(gate.tensor.shape(), gate.tensor.dtype(), &gate.tensor)?;
    let pack = 16 / y.dtype().size_in_bytes();
    let is_vector = [gate.stride, value.stride, dim].iter().all(|distance| distance % pack == 0)
        && address(&gate.tensor)? % 16 == 0
        && address(&value.tensor)? % 16 == 0;
    let blocks = (rows * dim.div_ceil(pack)).div_ceil(THREADS).min(MAX_WAVES_BLOCKS);
    Launch::new(&ACTIVATION, by_dtype!("gated", y.dtype()), [blocks, 1, 1], THREADS)?
        .tensor(&gate.tensor)?
        .tensor(&value.tensor)?
        .tensor(&y)?
        .i64(rows)
        .i64(dim)
        .i64(gate.stride)
        .i64(value.stride)
        .i32(function as i32)
        .i32(i32::from(is_vector))
        .run(&y)?;
    Ok(y)
}

struct Rows {
    tensor: Tensor,
    /// Values from one row to the next.
    stride: usize,
}

/// The tensor as rows of equal distance: as it is if its leading dimensions lie so, else copied.
fn rows_apart(tensor: &Tensor) -> Result<Rows> {
    let (dims, strides) = (tensor.dims(), tensor.stride());
    let rank = dims.len();
    if rank >= 2 && strides[rank - 1] == 1 {
        let nested = (0..rank - 2).all(|i| strides[i] == strides[i + 1] * dims[i + 1]);
        if nested {
            return Ok(Rows { tensor: tensor.clone(), stride: strides[rank - 2] });
        }
    }
    let tensor = tensor.contiguous()?;
    let stride = dims.last().copied().unwrap_or(1);
    Ok(Rows { tensor, stride })
}
