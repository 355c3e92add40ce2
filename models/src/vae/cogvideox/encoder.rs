//! Encoder of the CogVideoX video VAE: frames to what their latents may be.
//!
//! Owns: the causal 3-D encoder, and what it remembers of the frames before. Does not know: who draws from the answer.
//! Source: diffusers `models/autoencoders/autoencoder_kl_cogvideox.py` (`CogVideoXEncoder3D`,
//! `AutoencoderKLCogVideoX._encode`), `models/downsampling.py` (`CogVideoXDownsample3D`).

use candle_core::{DType, Tensor};

use super::{
    ActivatedNorm, CHANNELS, CogVideoXVaeConfig, HISTORY, MID_BLOCKS, NORM_EPS, ResnetBlock, causal, load_resnets,
};
use crate::error::Result;
use crate::layers::{CausalConv3d, Conv2d, GroupNorm};
use crate::vae::Posterior;
use crate::vae::causal::Past;
use crate::weights::Weights;

impl CogVideoXVaeConfig {
    /// Most values of the compute dtype that encoding one frame of this height and width, in pixels, holds at a time. The
    /// frame itself and the answer are not counted.
    pub fn encode_peak_values(&self, height: usize, width: usize) -> usize {
        let mut pixels = height * width;
        let mut in_channels = self.block_out_channels[0];
        let mut remembered = pixels * CHANNELS;
        let mut working = 0;
        for (level, channels) in self.block_out_channels.iter().copied().enumerate() {
            remembered += pixels * (in_channels + (2 * self.layers_per_block - 1) * channels);
            // As in the decoder.
            working = working.max(in_channels.max(channels) * pixels * (4 + HISTORY));
            if self.resampling(level).is_some() {
                pixels = pixels.div_ceil(4);
            }
            in_channels = channels;
        }
        remembered + pixels * in_channels * (2 * MID_BLOCKS + 1) + working
    }
}

/// The encoder half of `AutoencoderKLCogVideoX`.
pub struct CogVideoXVaeEncoder {
    compute_dtype: DType,
    conv_in: CausalConv3d,
    levels: Vec<Level>,
    mid_block: Vec<ResnetBlock<GroupNorm>>,
    norm_out: GroupNorm,
    conv_out: CausalConv3d,
}

/// An encoding between two chunks. Dropping it frees all that it remembers.
#[derive(Debug, Default)]
pub struct CogVideoXEncoding {
    past: Past,
    /// f32 `[1, 2 latent_channels, f, h, w]` each.
    moments: Vec<Tensor>,
}

struct Level {
    resnets: Vec<ResnetBlock<GroupNorm>>,
    downsampler: Option<Downsampler>,
}

impl CogVideoXVaeEncoder {
    /// Tensors `encoder.*`.
    pub fn load(weights: &Weights, config: &CogVideoXVaeConfig) -> Result<Self> {
        let encoder = weights.pp("encoder");
        let groups = config.norm_num_groups;
        let norm = |weights: &Weights, channels: usize| GroupNorm::load(weights, groups, channels, config.norm_eps);
        let channels = &config.block_out_channels;
        let last = channels[channels.len() - 1];
        let mut levels = Vec::with_capacity(channels.len());
        let mut in_channels = channels[0];
        for (level, channels) in channels.iter().copied().enumerate() {
            let weights = encoder.pp("down_blocks").pp(level);
            let resnets = &weights.pp("resnets");
            levels.push(Level {
                resnets: load_resnets(resnets, config.layers_per_block, [in_channels, channels], norm)?,
                downsampler: match config.resampling(level) {
                    Some(in_time) => Some(Downsampler::load(&weights.pp("downsamplers").pp(0), channels, in_time)?),
                    None => None,
                },
            });
            in_channels = channels;
        }
        Ok(Self {
            compute_dtype: weights.placement().compute_dtype,
            conv_in: causal(&encoder.pp("conv_in"), config.in_channels, channels[0])?,
            levels,
            mid_block: load_resnets(&encoder.pp("mid_block").pp("resnets"), MID_BLOCKS, [last; 2], norm)?,
            norm_out: GroupNorm::load(&encoder.pp("norm_out"), groups, last, NORM_EPS)?,
            conv_out: causal(&encoder.pp("conv_out"), last, 2 * config.latent_channels)?,
        })
    }

    /// Encodes the next chunk of frames, f32 `[1, 3, frames, height, width]` in -1..=1. The reference takes eight frames at
    /// a time, and one that is left over with the first eight; a picture is a chunk of one.
    pub fn encode_next(&self, encoding: &mut CogVideoXEncoding, frames: &Tensor) -> Result<()> {
        let CogVideoXEncoding { past, moments } = encoding;
        let mut x = self.conv_in.forward(&frames.to_dtype(self.compute_dtype)?, past.next_layer())?;
        for level in &self.levels {
            x = level.forward(x, past)?;
        }
        for resnet in &self.mid_block {
            x = resnet.forward(x, &(), past)?;
        }
        let x = self.conv_out.forward(&self.norm_out.activated(&x)?, past.next_layer())?;
        past.end_chunk();
        moments.push(x.to_dtype(DType::F32)?);
        Ok(())
    }
}

impl CogVideoXEncoding {
    /// Of all frames so far: `[1, latent_channels, f, h, w]`.
    pub fn posterior(&self) -> Result<Posterior> {
        Posterior::of_moments(&Tensor::cat(&self.moments, 2)?)
    }
}

impl ActivatedNorm for GroupNorm {
    type Told = ();

    fn activated(&self, x: &Tensor, (): &()) -> Result<Tensor> {
        GroupNorm::activated(self, x)
    }
}

impl Level {
    fn forward(&self, mut x: Tensor, past: &mut Past) -> Result<Tensor> {
        for resnet in &self.resnets {
            x = resnet.forward(x, &(), past)?;
        }
        match &self.downsampler {
            Some(downsampler) => downsampler.forward(x),
            None => Ok(x),
        }
    }
}

/// Halves height and width, with zeros after the last row and column, and frames where `in_time`.
struct Downsampler {
    conv: Conv2d,
    in_time: bool,
}

impl Downsampler {
    fn load(weights: &Weights, channels: usize, in_time: bool) -> Result<Self> {
        let conv = Conv2d::load(&weights.pp("conv"), channels, channels, 3, 0)?.halving().padded_after(1);
        Ok(Self { conv, in_time })
    }

    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let x = if self.in_time { paired(&x)? } else { x };
        self.conv.forward_frames(&x)
    }
}

/// `[1, c, t, h, w]`, two frames each become their mean; of an odd number the first stays.
fn paired(x: &Tensor) -> Result<Tensor> {
    let (b, c, t, h, w) = x.dims5()?;
    let lead = t % 2;
    if t == lead {
        return Ok(x.clone());
    }
    let pairs = x.narrow(2, lead, t - lead)?.contiguous()?.reshape(vec![b, c, t / 2, 2, h, w])?;
    let means = pairs.mean(3)?;
    match lead {
        0 => Ok(means),
        _ => Ok(Tensor::cat(&[&x.narrow(2, 0, 1)?, &means], 2)?),
    }
}
