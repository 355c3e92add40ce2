//! FlashAttention-2 of `candle-flash-attn` in place of our own kernel, in builds with the feature `flash-attn`: dense
//! attention of 16-bit heads without bias. Its 53 files take hours of two cores, so that only images are built with it.

use candle_core::{Result, Tensor};

use super::{AttentionOptions, Shape};

/// The attended values, or nothing where it does not compute this: other dtypes, a bias, keys that count for some batch
/// rows only, a negative scale (its softmax looks for the largest score before it scales), a device that is no GPU.
#[cfg(feature = "flash-attn")]
pub(super) fn attention(
    [q, k, v]: [&Tensor; 3],
    options: &AttentionOptions<'_>,
    shape: Shape,
) -> Result<Option<Tensor>> {
    use candle_core::DType;

    /// Its heads are whole 16-byte chunks of at most this many values.
    const MAX_D: usize = 512;

    let scale = options.scale.unwrap_or(1.0 / (shape.d as f64).sqrt());
    let takes = q.device().is_cuda()
        && matches!(q.dtype(), DType::F16 | DType::BF16)
        && options.bias.is_none()
        && options.key_lens.is_none_or(|lens| lens.iter().all(|len| *len == shape.lk))
        && shape.d.is_multiple_of(8)
        && shape.d <= MAX_D
        && shape.lk > 0
        && scale > 0.0;
    if !takes {
        return Ok(None);
    }
    let [q, k, v] = [super::chunks::readable(q)?, super::chunks::readable(k)?, super::chunks::readable(v)?];
    candle_flash_attn::flash_attn(&q, &k, &v, scale as f32, options.causal).map(Some)
}

/// Nothing: this build has no FlashAttention-2.
#[cfg(not(feature = "flash-attn"))]
pub(super) fn attention(_: [&Tensor; 3], _: &AttentionOptions<'_>, _: Shape) -> Result<Option<Tensor>> {
    Ok(None)
}
