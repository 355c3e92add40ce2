//! Launches of `rope.cu`.

use candle_core::{DType, Result, Tensor, bail};

use super::{Layout, Norm};
use crate::gpu::{Launch, address, by_dtype, module, output};

module!(ROPE, "rope");

const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;

/// `x [b, l, heads, d]`; the caller has checked the shapes.
pub(super) fn rotate(
    x: &Tensor,
    norm: Option<&Norm<'_>>,
    cos: &Tensor,
    sin: &Tensor,
    layout: Layout,
) -> Result<Tensor> {
    let (b, l, heads, d) = x.dims4()?;
    if cos.dtype() != DType::F32 || sin.dtype() != DType::F32 {
        bail!("rope: cos and sin are f32, got {:?} and {:?}", cos.dtype(), sin.dtype());
    }
    let x = if x.stride()[3] == 1 { x.clone() } else { x.contiguous()? };
    let (cos, sin) = (cos.contiguous()?, sin.contiguous()?);
    let weight = norm.map(|norm| norm.weight.to_dtype(x.dtype())?.contiguous()).transpose()?;
    let across = norm.is_some_and(|norm| norm.is_across_heads(d));
    let y = output((b, l, heads, d), x.dtype(), &x)?;
    let positions = if heads * d == 0 { 0 } else { b * l };
    let blocks = if across { positions } else { (positions * heads).div_ceil(WARPS) };
    let kernel = match layout {
        Layout::Half => by_dtype!("norm_rope_half", x.dtype()),
        Layout::Interleaved => by_dtype!("norm_rope_interleaved", x.dtype()),
    };
    Launch::new(&ROPE, kernel, [blocks, 1, 1], THREADS)?
        .tensor(&x)?
        .optional(weight.as_ref())?
        .tensor(&cos)?
        .tensor(&sin)?
        .tensor(&y)?
        .i64(positions)
        .i64(l)
        .i64(heads)
        .i64(d)
        .i64(x.stride()[0])
        .i64(x.stride()[1])
        .i64(x.stride()[2])
        .f32(norm.map_or(0.0, |norm| norm.eps as f32))
        .i32(i32::from(across))
        .i32(i32::from(packs_are_aligned(&x, weight.as_ref(), layout)?))
        .run(&x)?;
    Ok(y)
}

/// Whether every head can be read in packs of 16 bytes.
fn packs_are_aligned(x: &Tensor, weight: Option<&Tensor>, layout: Layout) -> Result<bool> {
    let pack = 16 / x.dtype().size_in_bytes();
    let d = x.dims()[3];
    let whole = match layout {
        Layout::Half => d.is_multiple_of(2 * pack),
        Layout::Interleaved => d.is_multiple_of(pack),
    };
    let strides = x.stride()[..3].iter().all(|stride| stride % pack == 0);
    let weight = weight.map(address).transpose()?.unwrap_or(0);
    Ok(whole && strides && address(x)? % 16 == 0 && weight % 16 == 0)
}
