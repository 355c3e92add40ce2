//! Products with matrices, in whatever form they are kept.
//!
//! Owns: what is around such a product: shapes, counted work, bias, the way to a GPU. Does not know: how rows are multiplied.

use candle_core::{DType, Result, Tensor, bail};

use super::add_to_rows;
#[cfg(gpu)]
use crate::gpu;
use crate::view::{View, tensor, vector};
use crate::work::{self, Work};

/// `x [..., in]` (f32, on a GPU in any dtype) times a matrix `[out, in]` transposed, plus `bias [out]`: `[..., out]`.
pub(super) struct Product<'a> {
    pub(super) x: &'a Tensor,
    pub(super) bias: Option<&'a Tensor>,
    /// `out` and `in`.
    pub(super) dims: (usize, usize),
    /// Of the matrix, as it is kept.
    pub(super) size_in_bytes: usize,
}

impl Product<'_> {
    /// `multiply` writes `y [m, out]` of `x [m, in]`; on a GPU the whole matrix comes from `dequantise`.
    pub(super) fn compute(
        self,
        #[cfg_attr(not(gpu), allow(unused_variables))] dequantise: impl FnOnce(DType) -> Result<Tensor>,
        multiply: impl FnOnce(&[f32], &mut [f32]) -> Result<()>,
    ) -> Result<Tensor> {
        let Self { x, bias, dims: (out, inner), size_in_bytes } = self;
        let mut shape = x.dims().to_vec();
        if shape.pop() != Some(inner) {
            bail!("linear: x {:?} does not fit weight [{out}, {inner}]", x.shape());
        }
        shape.push(out);
        work::add_dense(|| Work {
            flops: work::product_flops(shape.iter().product(), inner),
            bytes: (size_in_bytes + bias.map_or(0, |bias| work::weight_bytes(bias, None))) as f64,
        });
        if work::is_dry() {
            return work::zeros(shape, x);
        }
        #[cfg(gpu)]
        if gpu::runs_here(x) {
            return super::launch::linear(x, &dequantise(x.dtype())?, bias, shape);
        }
        let x = x.contiguous()?;
        let x = View::contiguous("linear", &x)?;
        let mut y = vec![0f32; shape.iter().product()];
        if !y.is_empty() && inner > 0 {
            multiply(x.f32()?, &mut y)?;
        }
        if let Some(bias) = bias {
            let bias = vector("linear", "bias", bias, out)?;
            add_to_rows(&mut y, View::contiguous("linear", &bias)?.f32()?);
        }
        tensor(y, shape)
    }
}
