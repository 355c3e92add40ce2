//! Encoder of the Wan2.1 video VAE: frames to latents, one latent frame at a time.
//!
//! Owns: the causal 3-D encoder, and what it remembers of the frames before. Does not know: which of the frames a request
//! gave. Source: diffusers `models/autoencoders/autoencoder_kl_wan.py` (`WanEncoder3d`, `AutoencoderKLWan._encode`); the
//! mean of the posterior is what its pipelines take.

use candle_core::{DType, Tensor};

use super::{HISTORY, MidBlock, Norm, ResidualBlock, WanVaeConfig, causal};
use crate::error::Result;
use crate::layers::{CausalConv3d, Conv2d, Conv3d};
use crate::vae::causal::Past;
use crate::vae::tiling::InTiles;
use crate::weights::Weights;

/// Frames of pixels that the encoder sees: red, green and blue.
const CHANNELS: usize = 3;

impl WanVaeConfig {
    /// Channels of the encoder's levels, from the pixels' size to the latents'.
    fn encoder_dims(&self) -> Vec<usize> {
        self.dim_mult.iter().map(|multiple| self.base_dim * multiple).collect()
    }

    /// Bytes that encoding frames of this height and width, in pixels, holds at its peak, in tiles or not. The frames
    /// themselves and the latents are not counted.
    pub fn peak_encode_bytes(&self, height: usize, width: usize, tiled: bool, dtype: DType) -> usize {
        let tiles = self.picture_tiles((height, width), tiled);
        let (height, width) = tiles.map_or((height, width), |tiling| tiling.largest(height, width));
        self.encode_peak_values(height, width) * dtype.size_in_bytes()
    }

    /// Most values of the compute dtype that encoding frames of this height and width, in pixels, holds at a time. The
    /// frames themselves and the latents are not counted.
    fn encode_peak_values(&self, height: usize, width: usize) -> usize {
        let (mut frames, mut pixels) = (self.scale_factor_temporal, height * width);
        let mut remembered = HISTORY * pixels * CHANNELS;
        let mut working = 0;
        let mut in_dim = self.base_dim;
        for (level, dim) in self.encoder_dims().into_iter().enumerate() {
            remembered += HISTORY * pixels * (in_dim + dim * (2 * self.num_res_blocks - 1));
            // As in the decoder: the block's input, answers, norms and shortcut, and what a convolution remembers.
            working = working.max(pixels * in_dim.max(dim) * (5 * frames + HISTORY));
            if let Some(in_time) = self.temperal_downsample.get(level) {
                pixels = pixels.div_ceil(4);
                remembered += pixels * dim * usize::from(*in_time);
                frames = if *in_time { frames.div_ceil(2) } else { frames };
            }
            in_dim = dim;
        }
        remembered + HISTORY * pixels * 5 * in_dim + working
    }
}

/// The encoder half of `AutoencoderKLWan`.
pub struct WanVaeEncoder {
    compute_dtype: DType,
    /// `[1, z, 1, 1, 1]`, f32.
    latents_mean: Tensor,
    latents_std: Tensor,
    conv_in: CausalConv3d,
    levels: Vec<Level>,
    mid_block: MidBlock,
    norm_out: Norm,
    conv_out: CausalConv3d,
    quant_conv: Conv3d,
    z_dim: usize,
}

/// An encoding between two latent frames. Dropping it frees all that it remembers.
pub struct WanEncoding {
    past: Past,
    /// f32 `[1, z, 1, h, w]` each.
    latents: Vec<Tensor>,
}

impl WanVaeEncoder {
    /// Tensors `encoder.*` and `quant_conv.*`.
    pub fn load(weights: &Weights, config: &WanVaeConfig) -> Result<Self> {
        let (encoder, z_dim) = (weights.pp("encoder"), config.z_dim);
        let device = &weights.placement().device;
        let per_channel = |values: &[f32]| Tensor::from_slice(values, (1, z_dim, 1, 1, 1), device);
        let conv_in = causal(&encoder.pp("conv_in"), CHANNELS, config.base_dim, [3, 3, 3])?;
        let mut levels = Vec::with_capacity(config.dim_mult.len());
        // The blocks of all levels are counted through.
        let mut block = 0;
        let mut in_dim = config.base_dim;
        for (level, out_dim) in config.encoder_dims().into_iter().enumerate() {
            let downsample = config.temperal_downsample.get(level).copied();
            let shape = LevelShape { in_dim, out_dim, num_resnets: config.num_res_blocks, downsample };
            levels.push(Level::load(&encoder.pp("down_blocks"), &mut block, &shape)?);
            in_dim = out_dim;
        }
        Ok(Self {
            compute_dtype: weights.placement().compute_dtype,
            latents_mean: per_channel(&config.latents_mean)?,
            latents_std: per_channel(&config.latents_std)?,
            conv_in,
            levels,
            mid_block: MidBlock::load(&encoder.pp("mid_block"), in_dim)?,
            norm_out: Norm::load(&encoder.pp("norm_out"), &[in_dim, 1, 1, 1])?,
            conv_out: causal(&encoder.pp("conv_out"), in_dim, 2 * z_dim, [3, 3, 3])?,
            quant_conv: Conv3d::load(&weights.pp("quant_conv"), 2 * z_dim, 2 * z_dim, [1, 1, 1], 0)?,
            z_dim,
        })
    }

    /// Before the first frame.
    pub fn begin(&self) -> WanEncoding {
        WanEncoding { past: Past::of_chunks(), latents: Vec::new() }
    }

    /// Encodes the frames of the next latent frame, f32 `[1, 3, frames, height, width]` in -1..=1: the first frame alone,
    /// and after it as many as the temporal scale factor says.
    pub fn encode_next(&self, encoding: &mut WanEncoding, frames: &Tensor) -> Result<()> {
        let past = &mut encoding.past;
        let mut x = past.convolve(&self.conv_in, &frames.to_dtype(self.compute_dtype)?)?;
        for level in &self.levels {
            x = level.forward(x, past)?;
        }
        let x = self.mid_block.forward(x, past)?;
        let moments = past.convolve(&self.conv_out, &self.norm_out.activated(&x)?)?; // [1, 2z, 1, h, w]
        let mean = self.quant_conv.forward(&moments)?.narrow(1, 0, self.z_dim)?.to_dtype(DType::F32)?;
        encoding.latents.push(mean.broadcast_sub(&self.latents_mean)?.broadcast_div(&self.latents_std)?);
        past.end_chunk();
        Ok(())
    }
}

impl WanEncoding {
    /// Latent frames so far.
    pub fn num_latent_frames(&self) -> usize {
        self.latents.len()
    }

    /// The latents of all frames, with mean 0 and deviation 1 as the model wants them: f32 `[1, z, f, h, w]`.
    pub fn latents(&self) -> Result<Tensor> {
        Ok(Tensor::cat(&self.latents, 2)?)
    }
}

struct LevelShape {
    in_dim: usize,
    out_dim: usize,
    num_resnets: usize,
    /// Whether the size is halved and, if so, the number of frames too.
    downsample: Option<bool>,
}

struct Level {
    resnets: Vec<ResidualBlock>,
    downsampler: Option<Downsampler>,
}

impl Level {
    /// `block` is the number of the level's first block, and becomes that of the next level's.
    fn load(weights: &Weights, block: &mut usize, shape: &LevelShape) -> Result<Self> {
        let mut next = || {
            *block += 1;
            weights.pp(*block - 1)
        };
        let mut resnets = Vec::with_capacity(shape.num_resnets);
        let mut in_dim = shape.in_dim;
        for _ in 0..shape.num_resnets {
            resnets.push(ResidualBlock::load(&next(), in_dim, shape.out_dim)?);
            in_dim = shape.out_dim;
        }
        let load = |in_time: bool| Downsampler::load(&next(), shape.out_dim, in_time);
        Ok(Self { resnets, downsampler: shape.downsample.map(load).transpose()? })
    }

    fn forward(&self, mut x: Tensor, past: &mut Past) -> Result<Tensor> {
        for resnet in &self.resnets {
            x = resnet.forward(x, past)?;
        }
        match &self.downsampler {
            Some(downsampler) => downsampler.forward(x, past),
            None => Ok(x),
        }
    }
}

/// Halves height and width; with a `time_conv` halves frames too.
struct Downsampler {
    /// `resample.1`, with `resample.0`, the zeros after the last row and column.
    conv: Conv2d,
    time_conv: Option<HalvingInTime>,
}

impl Downsampler {
    fn load(weights: &Weights, dim: usize, in_time: bool) -> Result<Self> {
        let time_conv = || HalvingInTime::load(&weights.pp("time_conv"), dim);
        Ok(Self {
            conv: Conv2d::load(&weights.pp("resample").pp(1), dim, dim, 3, 0)?.halving().padded_after(1),
            time_conv: in_time.then(time_conv).transpose()?,
        })
    }

    fn forward(&self, x: Tensor, past: &mut Past) -> Result<Tensor> {
        let x = self.conv.forward_frames(&x)?;
        match &self.time_conv {
            Some(time_conv) => time_conv.forward(x, past),
            None => Ok(x),
        }
    }
}

/// A convolution over three frames at every second one.
struct HalvingInTime {
    conv: Conv3d,
}

impl HalvingInTime {
    const KERNEL: usize = 3;

    fn load(weights: &Weights, dim: usize) -> Result<Self> {
        let conv = Conv3d::load(weights, dim, dim, [Self::KERNEL, 1, 1], 0)?;
        Ok(Self { conv })
    }

    /// `[1, c, t, h, w]` to `[1, c, t / 2, h, w]`, where the last frame of the chunk before comes first. The first frame of
    /// all stands for itself.
    fn forward(&self, x: Tensor, past: &mut Past) -> Result<Tensor> {
        let frames = x.dim(2)?;
        let last = x.narrow(2, frames - 1, 1)?.force_contiguous()?;
        let Some(before) = past.next_layer().and_then(|past| past.replace(last)) else { return Ok(x) };
        let x = Tensor::cat(&[&before, &x], 2)?;
        let windows = (0..frames / 2).map(|i| self.conv.forward(&x.narrow(2, 2 * i, Self::KERNEL)?.contiguous()?));
        Ok(Tensor::cat(&windows.collect::<Result<Vec<_>>>()?, 2)?)
    }
}
