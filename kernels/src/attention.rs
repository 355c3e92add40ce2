//! Dense attention for encoders and diffusion transformers.

use candle_core::{D, DType, Result, Tensor};

/// How scores are formed and masked.
#[derive(Debug, Clone, Copy, Default)]
pub struct AttentionOptions<'a> {
    /// Multiplies `q·k`; `None` is `1/sqrt(d)`.
    pub scale: Option<f64>,
    /// Query i sees keys 0..=i only (needs equal lengths).
    pub causal: bool,
    /// Added to the scores: `[heads, lq, lk]`, shared by the batch.
    pub bias: Option<&'a Tensor>,
    /// Keys that count, per batch row; the rest are masked. `None`: all.
    pub key_lens: Option<&'a [usize]>,
}

/// Softmax attention. `q [b, lq, heads, d]`, `k` and `v` `[b, lk, kv_heads, d]` with `heads` a multiple of `kv_heads`:
/// `[b, lq, heads, d]`. Scores are never materialised as a whole.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions<'_>) -> Result<Tensor> {
    let (b, lq, heads, d) = q.dims4()?;
    let (_, lk, kv_heads, _) = k.dims4()?;
    let scale = options.scale.unwrap_or(1.0 / (d as f64).sqrt());
    let group = heads / kv_heads;
    let repeat = |x: &Tensor| -> Result<Tensor> {
        let x = x.unsqueeze(3)?.broadcast_as((b, lk, kv_heads, group, d))?.contiguous()?.reshape((b, lk, heads, d))?;
        x.transpose(1, 2)?.contiguous()
    };
    let q = q.transpose(1, 2)?.contiguous()?;
    let mut scores = (q.matmul(&repeat(k)?.t()?)? * scale)?;
    if let Some(bias) = options.bias {
        scores = scores.broadcast_add(bias)?;
    }
    let mut mask = vec![0f32; b * lq * lk];
    for (row, cells) in mask.chunks_mut(lq * lk).enumerate() {
        let visible = options.key_lens.map_or(lk, |lens| lens[row]);
        for (i, line) in cells.chunks_mut(lk).enumerate() {
            let last = if options.causal { visible.min(i + 1) } else { visible };
            line[last..].fill(f32::NEG_INFINITY);
        }
    }
    let mask = Tensor::from_vec(mask, (b, 1, lq, lk), q.device())?.to_dtype(DType::F32)?;
    let scores = scores.broadcast_add(&mask)?;
    let max = scores.max_keepdim(D::Minus1)?;
    let weights = scores.broadcast_sub(&max)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    weights.matmul(&repeat(v)?)?.transpose(1, 2)?.contiguous()
}
