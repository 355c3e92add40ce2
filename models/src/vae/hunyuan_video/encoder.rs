//! The encoder half of `AutoencoderKLHunyuanVideo`, of a single picture: what a clip begins with.
//!
//! Owns: the encoder. Does not know: who fits the picture. Source: diffusers
//! `models/autoencoders/autoencoder_kl_hunyuan_video.py` (`HunyuanVideoEncoder3D`, `tiled_encode`); the pipeline takes the mean of the
//! posterior (`retrieve_latents`, `argmax`).

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use tale_kernels::CausalPadding;

use super::blocks::{MidBlock, Resnet};
use super::{Factor, HunyuanVaeConfig, LIVE_COPIES, NORM_EPS, load_conv};
use crate::error::Result;
use crate::layers::{CausalConv3d, Conv3d, GroupNorm};
use crate::request::Frame;
use crate::vae::picture_tiles::{self, PictureEncoding};
use crate::vae::tiling::InTiles;
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
    config: HunyuanVaeConfig,
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
            config: config.clone(),
        })
    }

    /// Begins to encode a picture; `tiled`: in tiles, where it is larger than one.
    pub fn begin(&self, picture: Arc<Frame>, tiled: bool) -> PictureEncoding {
        let tiles = self.config.picture_tiles((picture.height, picture.width), tiled);
        PictureEncoding::new(picture, tiles)
    }

    /// The whole picture, or its next tile; once that was the last, its latents as the transformer knows them, f32 `[1, z, 1,
    /// h, w]`.
    pub fn encode_next(&self, encoding: &mut PictureEncoding) -> Result<Option<Tensor>> {
        let means = encoding.next(&self.device, |pixels| Ok(self.mean(pixels.unsqueeze(2)?)?.squeeze(2)?))?;
        means.map(|mean| Ok((mean.unsqueeze(2)? * self.config.scaling_factor)?)).transpose()
    }

    /// Means of latents, f32 `[1, z, 1, h, w]`, of pixels `[1, 3, 1, height, width]`.
    fn mean(&self, pixels: Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward_whole(&pixels.to_dtype(self.compute_dtype)?)?;
        // They are gone before the first block.
        drop(pixels);
        for block in &self.down_blocks {
            x = block.forward(x)?;
        }
        x = self.mid_block.forward(x)?;
        x = self.conv_out.forward_whole(&self.conv_norm_out.activated(&x)?)?;
        let moments = self.quant_conv.forward(&x)?.to_dtype(DType::F32)?;
        Ok(moments.narrow(1, 0, moments.dim(1)? / 2)?.contiguous()?)
    }
}

impl HunyuanVaeConfig {
    /// Steps of an encoding of a picture of this height and width, in tiles or not.
    pub fn num_encode_steps(&self, (height, width): (usize, usize), tiled: bool) -> usize {
        picture_tiles::num_steps(self.picture_tiles((height, width), tiled), height, width)
    }

    /// Bytes that encoding a picture of this height and width holds at its peak beside its latents, in tiles or not.
    pub fn peak_encode_bytes(&self, (height, width): (usize, usize), tiled: bool, dtype: DType) -> usize {
        let tiles = self.picture_tiles((height, width), tiled);
        let (tile_height, tile_width) = tiles.map_or((height, width), |tiling| tiling.largest(height, width));
        // Of the pixels before and after they are on the device; of the latents of all tiles, before and after they are joined.
        let pixels = 2 * 3 * tile_height * tile_width * size_of::<f32>();
        let latents = height * width / self.spatial_compression_ratio.pow(2);
        let means = tiles.map_or(0, |_| 3 * self.latent_channels * latents * size_of::<f32>());
        pixels + means + self.peak_encode_values(tile_height, tile_width) * dtype.size_in_bytes()
    }

    /// Most values of the compute dtype that encoding a picture of this height and width holds at a time.
    fn peak_encode_values(&self, height: usize, width: usize) -> usize {
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
