//! Rotary position embeddings, in the two layouts that checkpoints use.

use candle_core::{Result, Tensor};

/// Half-split layout (Llama, Qwen): pairs are (i, i + d/2). `x [l, heads, d]`, `cos` and `sin` `[l, d/2]`.
pub fn rope_half(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.dim(2)? / 2;
    let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], 2)
}

/// Interleaved layout (FLUX, Wan): pairs are (2i, 2i + 1). `x [b, l, heads, d]`, `cos` and `sin` `[l, d/2]`.
pub fn rope_interleaved(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (b, l, heads, d) = x.dims4()?;
    let pairs = x.reshape((b, l, heads, d / 2, 2))?;
    let (re, im) = (pairs.narrow(4, 0, 1)?, pairs.narrow(4, 1, 1)?);
    let (cos, sin) = (cos.reshape((1, l, 1, d / 2, 1))?, sin.reshape((1, l, 1, d / 2, 1))?);
    let first = (re.broadcast_mul(&cos)? - im.broadcast_mul(&sin)?)?;
    let second = (re.broadcast_mul(&sin)? + im.broadcast_mul(&cos)?)?;
    Tensor::cat(&[first, second], 4)?.reshape((b, l, heads, d))
}
