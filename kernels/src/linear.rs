//! Matrix products with weights as published (`[out, in]`), and table look-ups.

use candle_core::{DType, Result, Tensor};

/// `x [..., in]` (f32) times `weight [out, in]` (f32, bf16 or f16) transposed, plus `bias [out]`: `[..., out]`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    let last = shape.pop().unwrap_or(0);
    if last != inner {
        candle_core::bail!("linear: x {:?} does not fit weight {:?}", x.shape(), weight.shape());
    }
    shape.push(out);
    let y = x.contiguous()?.reshape(((), inner))?.matmul(&weight.to_dtype(x.dtype())?.t()?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    y.reshape(shape)
}

/// Rows of `weight [num, dim]` at `ids [l]` (u32): `[l, dim]` in f32.
pub fn embedding(ids: &Tensor, weight: &Tensor) -> Result<Tensor> {
    weight.index_select(ids, 0)?.to_dtype(DType::F32)
}
