//! The encoder half of `AutoencoderKLHunyuanVideo`, of a single picture: what a clip begins with.
//!
//! Owns: the encoder. Does not know: who fits the picture. Source: diffusers
//! `models/autoencoders/autoencoder_kl_hunyuan_video.py` (`HunyuanVideoEncoder3D`); the pipeline takes the mean of the
//! posterior (`retrieve_latents`, `argmax`).

use candle_core::{DType, Device, Tensor};
use tale_kernels::CausalPadding;

use super::blocks::{MidBlock, Resnet};
use super::{Factor, HunyuanVaeConfig, LIVE_COPIES, NORM_EPS, load_conv};
use crate::error::Result;
use crate::layers::{CausalConv3d, Conv3d, GroupNorm};
use crate::request::Frame;
use crate::vae::tiling::Window;
use crate::weights::Weights;

/// A picture to latents.
pub struct HunyuanVaeEncoder {
    conv_in: CausalConv3d,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: CausalConv3d,
    quant_conv: Conv3d,
    compute_dtype: DType,
    device: Device,
    scaling_factor: f64,
}

impl HunyuanVaeEncoder {
    /// Tensors `encoder.*` and `quant_conv.*`.
    pub fn load(weights: &Weights, config: &HunyuanVaeConfig) -> Result<Self> {
        let encoder = weights.pp("encoder");
        let (groups, moments) = (config.norm_num_groups, 2 * config.latent_channels);
        let first = config.block_out_channels[0];
        let blocks = encoder.pp("down_blocks");
        let mut down_blocks = Vec::with_capacity(config.block_out_channels.len());
        let mut previous = first;
        for (level, channels) in config.block_out_channels.iter().copied().enumerate() {
            let weights = blocks.pp(level);
            let mut resnets = Vec::with_capacity(config.layers_per_block);
            for i in 0..config.layers_per_block {
                let in_channels = if i == 0 { previous } else { channels };
                resnets.push(Resnet::load(&weights.pp("resnets").pp(i), in_channels, channels, groups)?);
            }
            down_blocks.push(DownBlock::load(&weights, resnets, channels, config.factors()[level])?);
            previous = channels;
        }
        Ok(Self {
            conv_in: load_conv(&encoder.pp("conv_in"), config.in_channels, first)?,
            down_blocks,
            mid_block: MidBlock::load(&encoder.pp("mid_block"), previous, groups, config.mid_block_add_attention)?,
            conv_norm_out: GroupNorm::load(&encoder.pp("conv_norm_out"), groups, previous, NORM_EPS)?,
            conv_out: load_conv(&encoder.pp("conv_out"), previous, moments)?,
            quant_conv: Conv3d::load(&weights.pp("quant_conv"), moments, moments, [1, 1, 1], 0)?,
            compute_dtype: weights.placement().compute_dtype,
            device: weights.placement().device.clone(),
            scaling_factor: config.scaling_factor,
        })
    }

    /// Latents of a picture as the transformer knows them, f32 `[1, z, 1, h, w]`.
    pub fn encode(&self, picture: &Frame) -> Result<Tensor> {
        // The pixels are gone before the first block.
        let mut x = self.conv_in.forward_whole(&pixels(picture, &self.device)?.to_dtype(self.compute_dtype)?)?;
        for block in &self.down_blocks {
            x = block.forward(x)?;
        }
        x = self.mid_block.forward(x)?;
        x = self.conv_out.forward_whole(&self.conv_norm_out.activated(&x)?)?;
        let moments = self.quant_conv.forward(&x)?.to_dtype(DType::F32)?;
        let mean = moments.narrow(1, 0, moments.dim(1)? / 2)?;
        Ok((mean * self.scaling_factor)?)
    }
}

/// f32 `[1, 3, 1, height, width]` in -1..=1.
fn pixels(picture: &Frame, device: &Device) -> Result<Tensor> {
    let Frame { height, width, .. } = *picture;
    let values = crate::vae::pixels(picture, Window { top: 0, left: 0, height, width });
    Ok(Tensor::from_vec(values, (1, 3, 1, height, width), device)?)
}

impl HunyuanVaeConfig {
    /// Most values of the compute dtype that encoding a picture of this height and width holds at a time.
    pub fn peak_encode_values(&self, height: usize, width: usize) -> usize {
        let (mut area, mut previous, mut widest) = (height * width, self.block_out_channels[0], 0);
        for (factor, channels) in self.factors().iter().zip(&self.block_out_channels) {
            widest = widest.max(LIVE_COPIES * area * previous.max(*channels));
            previous = *channels;
            area /= factor.space * factor.space;
        }
        widest
    }
}

/// One level: residual blocks, then fewer frames and smaller ones, where it ends so.
struct DownBlock {
    resnets: Vec<Resnet>,
    downsampler: Option<CausalConv3d>,
}

impl DownBlock {
    fn load(weights: &Weights, resnets: Vec<Resnet>, channels: usize, factor: Factor) -> Result<Self> {
        let downsampler = || -> Result<CausalConv3d> {
            let weights = weights.pp("downsamplers").pp(0).pp("conv").pp("conv");
            let conv = CausalConv3d::load(&weights, channels, channels, [3, 3, 3], CausalPadding::Replicate)?;
            Ok(conv.strided([factor.time, factor.space]))
        };
        Ok(Self { resnets, downsampler: factor.enlarges().then(downsampler).transpose()? })
    }

    fn forward(&self, mut x: Tensor) -> Result<Tensor> {
        for resnet in &self.resnets {
            x = resnet.forward(&x)?;
        }
        match &self.downsampler {
            Some(conv) => conv.forward_whole(&x),
            None => Ok(x),
        }
    }
}
