//! Launches of `norm.cu`; shapes of x and its partners are checked by the caller.

use candle_core::{Result, Tensor, bail};

use crate::gpu::{Launch, by_dtype, module, output};

module!(NORM, "norm");

/// `THREADS` of the file.
const MAX_THREADS: usize = 256;

pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let (x, shape) = (x.contiguous()?, RowShape::of("rms_norm", x)?);
    let y = output(x.shape(), x.dtype(), &x)?;
    launch_rms_norm(&x, None, &shape.vector("rms_norm", &x, weight)?, [&y, &y], eps, &shape)?;
    Ok(y)
}

pub(super) fn add_rms_norm(x: &Tensor, residual: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let (x, residual, shape) = (x.contiguous()?, residual.contiguous()?, RowShape::of("add_rms_norm", x)?);
    same_dtype("add_rms_norm", &x, &residual)?;
    let (sum, y) = (output(x.shape(), x.dtype(), &x)?, output(x.shape(), x.dtype(), &x)?);
    let weight = shape.vector("add_rms_norm", &x, weight)?;
    launch_rms_norm(&x, Some(&residual), &weight, [&y, &sum], eps, &shape)?;
    Ok((sum, y))
}

/// `sum` is written if there is a residual.
fn launch_rms_norm(
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: &Tensor,
    [y, sum]: [&Tensor; 2],
    eps: f64,
    shape: &RowShape,
) -> Result<()> {
    Launch::new(&NORM, by_dtype!("rms_norm", x.dtype()), [shape.rows, 1, 1], shape.threads(x))?
        .tensor(x)?
        .optional(residual)?
        .tensor(weight)?
        .tensor(y)?
        .optional(residual.map(|_| sum))?
        .i64(shape.dim)
        .f32(eps as f32)
        .run(x)
}

pub(super) fn layer_norm(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let (x, shape) = (x.contiguous()?, RowShape::of("layer_norm", x)?);
    let weight = weight.map(|weight| shape.vector("layer_norm", &x, weight)).transpose()?;
    let bias = bias.map(|bias| shape.vector("layer_norm", &x, bias)).transpose()?;
    let y = output(x.shape(), x.dtype(), &x)?;
    Launch::new(&NORM, by_dtype!("layer_norm", x.dtype()), [shape.rows, 1, 1], shape.threads(&x))?
        .tensor(&x)?
        .optional(weight.as_ref())?
        .optional(bias.as_ref())?
        .optional(None)?
        .optional(None)?
        .tensor(&y)?
        .i64(shape.dim)
        .i64(shape.rows.max(1))
        .i64(0)
        .f32(eps as f32)
        .run(&x)?;
    Ok(y)
}

pub(super) fn modulated_layer_norm(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    let (x, shape, rows_per_batch) = (x.contiguous()?, RowShape::of("modulated_layer_norm", x)?, x.dim(1)?);
    let (shift, scale) = (rows_apart(shift)?, rows_apart(scale)?);
    // One distance serves both: parts of one projection have the same.
    let (shift, scale) = if shift.stride()[0] == scale.stride()[0] {
        (shift, scale)
    } else {
        (shift.contiguous()?, scale.contiguous()?)
    };
    same_dtype("modulated_layer_norm", &x, &shift)?;
    same_dtype("modulated_layer_norm", &x, &scale)?;
    let y = output(x.shape(), x.dtype(), &x)?;
    Launch::new(&NORM, by_dtype!("layer_norm", x.dtype()), [shape.rows, 1, 1], shape.threads(&x))?
        .tensor(&x)?
        .optional(None)?
        .optional(None)?
        .tensor(&scale)?
        .tensor(&shift)?
        .tensor(&y)?
        .i64(shape.dim)
        .i64(rows_per_batch)
        .i64(shift.stride()[0])
        .f32(eps as f32)
        .run(&x)?;
    Ok(y)
}

pub(super) fn gated_sum(x: &Tensor, gate: &Tensor, z: &Tensor) -> Result<Tensor> {
    let (x, z, gate) = (x.contiguous()?, z.contiguous()?, rows_apart(gate)?);
    same_dtype("gated_sum", &x, &z)?;
    same_dtype("gated_sum", &x, &gate)?;
    let (shape, rows_per_batch) = (RowShape::of("gated_sum", &x)?, x.dim(1)?);
    let y = output(x.shape(), x.dtype(), &x)?;
    Launch::new(&NORM, by_dtype!("gated_sum", x.dtype()), [shape.rows, 1, 1], shape.threads(&x))?
        .tensor(&x)?
        .tensor(&gate)?
        .tensor(&z)?
        .tensor(&y)?
        .i64(shape.dim)
        .i64(rows_per_batch)
        .i64(gate.stride()[0])
        .run(&x)?;
    Ok(y)
}

/// A tensor as rows of its last dimension.
struct RowShape {
    rows: usize,
    dim: usize,
}

impl RowShape {
    fn of(op: &str, x: &Tensor) -> Result<Self> {
        match x.dims() {
            [rows @ .., dim] => Ok(Self { rows: if *dim == 0 { 0 } else { rows.iter().product() }, dim: *dim }),
            [] => bail!("{op}: x must have a last dimension"),
        }
    }

    /// Whole warps, at most one pack of 16 bytes per thread.
    fn threads(&self, x: &Tensor) -> usize {
        let packs = self.dim.div_ceil(16 / x.dtype().size_in_bytes());
        packs.next_multiple_of(32).clamp(32, MAX_THREADS)
    }

    /// A factor or term of the last dimension, in the dtype of x.
    fn vector(&self, op: &str, x: &Tensor, vector: &Tensor) -> Result<Tensor> {
        if vector.dims() != [self.dim] {
            bail!("{op}: weights must have shape [{}], got {:?}", self.dim, vector.shape());
        }
        vector.to_dtype(x.dtype())?.contiguous()
    }
}

/// `[b, 1, dim]` whose last dimension is contiguous.
fn rows_apart(tensor: &Tensor) -> Result<Tensor> {
    if tensor.stride()[2] == 1 { Ok(tensor.clone()) } else { tensor.contiguous() }
}

fn same_dtype(op: &str, x: &Tensor, other: &Tensor) -> Result<()> {
    if x.dtype() != other.dtype() {
        bail!("{op}: operands of two dtypes, {:?} and {:?}", x.dtype(), other.dtype());
    }
    Ok(())
}
