//! The encoder half of `AutoencoderKL`: a picture to what its latents may be.
//!
//! Owns: the encoder, and pictures as its input. Does not know: who draws from the answer. Source: diffusers
//! `models/autoencoders/{autoencoder_kl,vae}.py`, `models/downsampling.py`; `image_processor.py` for the input.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::{Attention, KlConfig, LatentScale, NORM_EPS, Resnet};
use crate::error::Result;
use crate::layers::{Conv2d, GroupNorm};
use crate::request::{Frame, MASK_THRESHOLD, Mask};
use crate::vae::Posterior;
use crate::vae::picture_tiles::{self, PictureEncoding};
use crate::vae::tiling::InTiles;
use crate::weights::Weights;

/// Pixels to latents.
#[derive(Debug, Clone)]
pub struct KlEncoder {
    scale: LatentScale,
    dtype: DType,
    device: Device,
    conv_in: Conv2d,
    down_blocks: Vec<DownBlock>,
    mid_resnets: [Resnet; 2],
    mid_attention: Option<Attention>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    quant_conv: Option<Conv2d>,
    config: KlConfig,
}

impl KlEncoder {
    /// Tensors `encoder.*` and `quant_conv.*`.
    pub fn load(weights: &Weights, config: &KlConfig) -> Result<Self> {
        let weights = &weights.computing_in(config.own_dtype(weights.placement().compute_dtype));
        let encoder = weights.pp("encoder");
        let groups = config.norm_num_groups;
        let moments = 2 * config.latent_channels;
        let (first, last) =
            (config.block_out_channels[0], config.block_out_channels[config.block_out_channels.len() - 1]);
        let mid = encoder.pp("mid_block");
        let mid_resnet = |i: usize| Resnet::load(&mid.pp("resnets").pp(i), last, last, groups);
        Ok(Self {
            scale: LatentScale::new(config, weights)?,
            dtype: weights.placement().compute_dtype,
            device: weights.placement().device.clone(),
            conv_in: Conv2d::load(&encoder.pp("conv_in"), config.in_channels, first, 3, 1)?,
            down_blocks: load_down_blocks(&encoder.pp("down_blocks"), config)?,
            mid_resnets: [mid_resnet(0)?, mid_resnet(1)?],
            mid_attention: match config.mid_block_add_attention {
                true => Some(Attention::load(&mid.pp("attentions").pp(0), last, groups)?),
                false => None,
            },
            conv_norm_out: GroupNorm::load(&encoder.pp("conv_norm_out"), groups, last, NORM_EPS)?,
            conv_out: Conv2d::load(&encoder.pp("conv_out"), last, moments, 3, 1)?,
            quant_conv: match config.use_quant_conv {
                true => Some(Conv2d::load(&weights.pp("quant_conv"), moments, moments, 1, 0)?),
                false => None,
            },
            config: config.clone(),
        })
    }

    /// Steps that an image of this height and width takes, in tiles or not.
    pub fn num_encode_steps(&self, (height, width): (usize, usize), tiled: bool) -> usize {
        picture_tiles::num_steps(self.config.picture_tiles((height, width), tiled), height, width)
    }

    /// Begins to encode an image; `tiled`: in tiles, where it is larger than one.
    pub fn begin(&self, image: Arc<Frame>, tiled: bool) -> PictureEncoding {
        let tiling = self.config.picture_tiles((image.height, image.width), tiled);
        PictureEncoding::new(image, tiling)
    }

    /// The whole image, or its next tile; what its latents may be once that was the last.
    pub fn encode_next(&self, encoding: &mut PictureEncoding) -> Result<Option<Posterior>> {
        let moments = encoding.next(&self.device, |pixels| self.moments(pixels))?;
        moments.map(|moments| Posterior::of_moments(&moments)).transpose()
    }

    /// Mean and logarithm of the variance of the latents of these pixels, side by side in f32.
    fn moments(&self, pixels: Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(&pixels.to_dtype(self.dtype)?)?;
        // They are gone before the first block.
        drop(pixels);
        for block in &self.down_blocks {
            x = block.forward(x)?;
        }
        x = self.mid_resnets[0].forward(&x)?;
        if let Some(attention) = &self.mid_attention {
            x = attention.forward(&x)?;
        }
        x = self.conv_norm_out.activated(&self.mid_resnets[1].forward(&x)?)?;
        x = self.conv_out.forward(&x)?;
        if let Some(conv) = &self.quant_conv {
            x = conv.forward(&x)?;
        }
        Ok(x.to_dtype(DType::F32)?)
    }

    /// Latents of the VAE as the denoising network knows them.
    pub fn scaled(&self, latents: &Tensor) -> Result<Tensor> {
        self.scale.apply(latents)
    }

    /// A mask of pixels for the latents `[1, 1, h, w]`: of each square of pixels the first one decides, 1 where it is
    /// set (diffusers: binarised, then `interpolate` to the nearest).
    pub fn latent_mask(&self, mask: &Mask) -> Result<Tensor> {
        let side = self.config.vae_scale_factor();
        let (height, width) = (mask.height / side, mask.width / side);
        let set = |i: usize| mask.grey[(i / width * mask.width + i % width) * side] >= MASK_THRESHOLD;
        let values = (0..height * width).map(|i| f32::from(u8::from(set(i)))).collect();
        Ok(Tensor::from_vec(values, (1, 1, height, width), &self.device)?)
    }
}

/// One level: residual blocks, then half the size (but for the last).
#[derive(Debug, Clone)]
struct DownBlock {
    resnets: Vec<Resnet>,
    downsampler: Option<Conv2d>,
}

/// Levels from the largest.
fn load_down_blocks(weights: &Weights, config: &KlConfig) -> Result<Vec<DownBlock>> {
    let levels = config.block_out_channels.len();
    let mut previous = config.block_out_channels[0];
    let mut blocks = Vec::with_capacity(levels);
    for (level, channels) in config.block_out_channels.iter().copied().enumerate() {
        let weights = weights.pp(level);
        let mut resnets = Vec::with_capacity(config.layers_per_block);
        for i in 0..config.layers_per_block {
            let in_channels = if i == 0 { previous } else { channels };
            resnets.push(Resnet::load(&weights.pp("resnets").pp(i), in_channels, channels, config.norm_num_groups)?);
        }
        let downsampler = match level + 1 < levels {
            true => Some(load_downsampler(&weights.pp("downsamplers").pp(0).pp("conv"), channels)?),
            false => None,
        };
        blocks.push(DownBlock { resnets, downsampler });
        previous = channels;
    }
    Ok(blocks)
}

/// It looks to the right and down: zeros stand after the last row and column only.
fn load_downsampler(weights: &Weights, channels: usize) -> Result<Conv2d> {
    Ok(Conv2d::load(weights, channels, channels, 3, 0)?.halving().padded_after(1))
}

impl DownBlock {
    fn forward(&self, mut x: Tensor) -> Result<Tensor> {
        for resnet in &self.resnets {
            x = resnet.forward(&x)?;
        }
        match &self.downsampler {
            Some(conv) => conv.forward(&x),
            None => Ok(x),
        }
    }
}
