//! Normalisations, statistics in f32.

use candle_core::{D, Result, Tensor};

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension of `x [..., dim]`; `weight [dim]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&scale)?.broadcast_mul(weight)
}

/// `(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension of `x [..., dim]`; absent weight is 1,
/// absent bias is 0.
pub fn layer_norm(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let scale = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    let mut y = centred.broadcast_div(&scale)?;
    if let Some(weight) = weight {
        y = y.broadcast_mul(weight)?;
    }
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    Ok(y)
}

/// Group norm of `x [batch, channels, ...]`: statistics over each group of `channels / num_groups` channels and all
/// positions; `weight [channels]`, `bias [channels]`.
pub fn group_norm(x: &Tensor, num_groups: usize, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let dims = x.dims().to_vec();
    let (batch, channels) = (dims[0], dims[1]);
    let mut per_channel = vec![1; dims.len()];
    per_channel[1] = channels;
    let grouped = x.contiguous()?.reshape((batch, num_groups, ()))?;
    let y = layer_norm(&grouped, None, None, eps)?.reshape(dims)?;
    y.broadcast_mul(&weight.reshape(per_channel.clone())?)?.broadcast_add(&bias.reshape(per_channel)?)
}

/// `x / max(||x||₂, 1e-12) * sqrt(channels) * weight` over dimension 1 of `x [batch, channels, ...]`; `weight
/// [channels]` (diffusers `WanRMS_norm`, `torch.nn.functional.normalize`).
pub fn rms_norm_channels(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let channels = x.dim(1)?;
    let mut per_channel = vec![1; x.rank()];
    per_channel[1] = channels;
    let norm = x.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(1e-12)?;
    x.broadcast_div(&norm)?.broadcast_mul(&(weight.reshape(per_channel)? * (channels as f64).sqrt())?)
}
