//! The blocks of HunyuanVideo's VAE: residual ones, the middle one, and levels that end with larger frames.
//!
//! Owns: the blocks, over all frames that they are given. Does not know: which stretch of a clip that is. Source: diffusers
//! `models/autoencoders/autoencoder_kl_hunyuan_video.py`.

use candle_core::Tensor;
use tale_kernels::{AttentionOptions, CausalPadding, attention};

use super::{Factor, NORM_EPS, load_conv};
use crate::error::Result;
use crate::layers::{CausalConv3d, GroupNorm, Linear};
use crate::vae::load_projection;
use crate::weights::Weights;

/// `HunyuanVideoResnetBlockCausal3D`.
pub(super) struct Resnet {
    norm1: GroupNorm,
    conv1: CausalConv3d,
    norm2: GroupNorm,
    conv2: CausalConv3d,
    conv_shortcut: Option<CausalConv3d>,
}

impl Resnet {
    pub(super) fn load(weights: &Weights, in_channels: usize, out_channels: usize, groups: usize) -> Result<Self> {
        let shortcut = || {
            let weights = weights.pp("conv_shortcut").pp("conv");
            CausalConv3d::load(&weights, in_channels, out_channels, [1, 1, 1], CausalPadding::Replicate)
        };
        Ok(Self {
            norm1: GroupNorm::load(&weights.pp("norm1"), groups, in_channels, NORM_EPS)?,
            conv1: load_conv(&weights.pp("conv1"), in_channels, out_channels)?,
            norm2: GroupNorm::load(&weights.pp("norm2"), groups, out_channels, NORM_EPS)?,
            conv2: load_conv(&weights.pp("conv2"), out_channels, out_channels)?,
            conv_shortcut: (in_channels != out_channels).then(shortcut).transpose()?,
        })
    }

    /// `[1, in, t, h, w]` to `[1, out, t, h, w]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.conv1.forward_whole(&self.norm1.activated(x)?)?;
        let y = self.conv2.forward_whole(&self.norm2.activated(&y)?)?;
        match &self.conv_shortcut {
            Some(conv) => Ok((conv.forward_whole(x)? + y)?),
            None => Ok((x + y)?),
        }
    }
}

/// `HunyuanVideoMidBlock3D`.
pub(super) struct MidBlock {
    first: Resnet,
    attention: Option<Attention>,
    second: Resnet,
}

impl MidBlock {
    pub(super) fn load(weights: &Weights, channels: usize, groups: usize, has_attention: bool) -> Result<Self> {
        let resnet = |i: usize| Resnet::load(&weights.pp("resnets").pp(i), channels, channels, groups);
        let attention = || Attention::load(&weights.pp("attentions").pp(0), channels, groups);
        Ok(Self { first: resnet(0)?, attention: has_attention.then(attention).transpose()?, second: resnet(1)? })
    }

    /// `[1, channels, t, h, w]` to the same shape.
    pub(super) fn forward(&self, x: Tensor) -> Result<Tensor> {
        let mut x = self.first.forward(&x)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.second.forward(&x)
    }
}

/// Every position looks at those of its frame and of the frames before, in one head.
struct Attention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Attention {
    fn load(weights: &Weights, channels: usize, groups: usize) -> Result<Self> {
        let projection = |name: &str| load_projection(&weights.pp(name), channels);
        Ok(Self {
            group_norm: GroupNorm::load(&weights.pp("group_norm"), groups, channels, NORM_EPS)?,
            to_q: projection("to_q")?,
            to_k: projection("to_k")?,
            to_v: projection("to_v")?,
            to_out: projection("to_out.0")?,
        })
    }

    /// `[1, channels, t, h, w]` to the same shape.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, channels, frames, height, width) = x.dims5()?;
        let area = height * width;
        let tokens = self.group_norm.forward(x)?.flatten_from(2)?.transpose(1, 2)?.contiguous()?; // [b, t * area, channels]
        let one_head = |x: Tensor| x.reshape((b, frames * area, 1, channels));
        let (q, k, v) = (
            one_head(self.to_q.forward(&tokens)?)?,
            one_head(self.to_k.forward(&tokens)?)?,
            one_head(self.to_v.forward(&tokens)?)?,
        );
        drop(tokens);
        // Frame by frame, so that no mask of all positions by all positions is made.
        let mut attended = Vec::with_capacity(frames);
        for frame in 0..frames {
            let q = q.narrow(1, frame * area, area)?;
            let (k, v) = (k.narrow(1, 0, (frame + 1) * area)?, v.narrow(1, 0, (frame + 1) * area)?);
            attended.push(attention(&q, &k, &v, &AttentionOptions::default())?);
        }
        let y = Tensor::cat(&attended, 1)?.reshape((b, frames * area, channels))?;
        let y = self.to_out.forward(&y)?.transpose(1, 2)?.reshape(x.shape())?;
        Ok((x + y)?)
    }
}

/// One level of the decoder: residual blocks, then more frames and larger ones, where it ends so.
pub(super) struct UpBlock {
    resnets: Vec<Resnet>,
    upsampler: Option<Upsampler>,
}

impl UpBlock {
    pub(super) fn load(weights: &Weights, resnets: Vec<Resnet>, channels: usize, factor: Factor) -> Result<Self> {
        let upsampler = || Upsampler::load(&weights.pp("upsamplers").pp(0), channels, factor);
        Ok(Self { resnets, upsampler: factor.enlarges().then(upsampler).transpose()? })
    }

    /// `[1, in, t, h, w]` to `[1, out, t', h', w']`.
    pub(super) fn forward(&self, mut x: Tensor) -> Result<Tensor> {
        for resnet in &self.resnets {
            x = resnet.forward(&x)?;
        }
        match &self.upsampler {
            Some(upsampler) => upsampler.forward(x),
            None => Ok(x),
        }
    }
}

/// `HunyuanVideoUpsampleCausal3D`: every value again, then a convolution. The first frame stays one.
struct Upsampler {
    conv: CausalConv3d,
    time: usize,
}

impl Upsampler {
    fn load(weights: &Weights, channels: usize, factor: Factor) -> Result<Self> {
        let conv = load_conv(&weights.pp("conv"), channels, channels)?;
        let conv = if factor.space == 2 { conv.upsampling() } else { conv };
        Ok(Self { conv, time: factor.time })
    }

    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let frames = x.dim(2)?;
        let x = match self.time {
            1 => x,
            // The convolution repeats rows and columns as it reads them. Frames are repeated here, where they are smallest.
            times => {
                let others = (1..frames as u32).flat_map(|frame| std::iter::repeat_n(frame, times));
                let repeated: Vec<u32> = std::iter::once(0).chain(others).collect();
                x.index_select(&Tensor::new(repeated, x.device())?, 2)?
            }
        };
        self.conv.forward_whole(&x)
    }
}
