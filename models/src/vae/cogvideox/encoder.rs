//! Encoder of the CogVideoX video VAE: a picture, or the first frames of a clip, to what their latents may be.
//!
//! Owns: the causal 3-D encoder, over one chunk of frames. Does not know: who draws from the answer.
//! Source: diffusers `models/autoencoders/autoencoder_kl_cogvideox.py` (`CogVideoXEncoder3D`,
//! `AutoencoderKLCogVideoX._encode`, `tiled_encode`), `models/downsampling.py` (`CogVideoXDownsample3D`).

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::{ActivatedNorm, CogVideoXVaeConfig, MID_BLOCKS, NORM_EPS, ResnetBlock, causal, load_resnets};
use crate::error::Result;
use crate::layers::{CausalConv3d, Conv2d, GroupNorm};
use crate::request::Frame;
use crate::vae::Posterior;
use crate::vae::causal::Past;
use crate::vae::picture_tiles::{self, PictureEncoding};
use crate::vae::tiling::InTiles;
use crate::weights::Weights;

impl CogVideoXVaeConfig {
    /// Steps of an encoding of a picture of this height and width, in tiles or not.
    pub fn num_encode_steps(&self, (height, width): (usize, usize), tiled: bool) -> usize {
        picture_tiles::num_steps(self.picture_tiles((height, width), tiled), height, width)
    }

    /// Bytes that encoding a picture of this height and width holds at its peak, in tiles or not.
    pub fn peak_encode_bytes(&self, (height, width): (usize, usize), tiled: bool, dtype: DType) -> usize {
        let tiles = self.picture_tiles((height, width), tiled);
        let (tile_height, tile_width) = tiles.map_or((height, width), |tiling| tiling.largest(height, width));
        // Of the pixels before and after they are on the device, and of the moments of all, before and after they are joined.
        let pixels = 2 * 3 * tile_height * tile_width * size_of::<f32>();
        let latents = height * width / self.spatial().pow(2);
        let moments = 3 * 2 * self.latent_channels * latents * size_of::<f32>();
        pixels + moments + self.encode_peak_values(tile_height, tile_width) * dtype.size_in_bytes()
    }

    /// Most values of the compute dtype that encoding one frame of this height and width, in pixels, holds at a time. The
    /// frame itself and the answer are not counted.
    fn encode_peak_values(&self, height: usize, width: usize) -> usize {
        let mut pixels = height * width;
        let mut in_channels = self.block_out_channels[0];
        let mut working = 0;
        for (level, channels) in self.block_out_channels.iter().copied().enumerate() {
            // As in the decoder, but that nothing is remembered.
            working = working.max(in_channels.max(channels) * pixels * 4);
            if self.resampling(level).is_some() {
                pixels = pixels.div_ceil(4);
            }
            in_channels = channels;
        }
        working
    }
}

/// The encoder half of `AutoencoderKLCogVideoX`.
pub struct CogVideoXVaeEncoder {
    compute_dtype: DType,
    device: Device,
    conv_in: CausalConv3d,
    levels: Vec<Level>,
    mid_block: Vec<ResnetBlock<GroupNorm>>,
    norm_out: GroupNorm,
    conv_out: CausalConv3d,
    config: CogVideoXVaeConfig,
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
            device: weights.placement().device.clone(),
            conv_in: causal(&encoder.pp("conv_in"), config.in_channels, channels[0])?,
            levels,
            mid_block: load_resnets(&encoder.pp("mid_block").pp("resnets"), MID_BLOCKS, [last; 2], norm)?,
            norm_out: GroupNorm::load(&encoder.pp("norm_out"), groups, last, NORM_EPS)?,
            conv_out: causal(&encoder.pp("conv_out"), last, 2 * config.latent_channels)?,
            config: config.clone(),
        })
    }

    /// Begins to encode a picture; `tiled`: in tiles, where it is larger than one.
    pub fn begin(&self, picture: Arc<Frame>, tiled: bool) -> PictureEncoding {
        let tiles = self.config.picture_tiles((picture.height, picture.width), tiled);
        PictureEncoding::new(picture, tiles)
    }

    /// The whole picture, or its next tile; what its latents `[1, latent_channels, 1, h, w]` may be once that was the last.
    pub fn encode_next(&self, encoding: &mut PictureEncoding) -> Result<Option<Posterior>> {
        let moments = encoding.next(&self.device, |pixels| Ok(self.moments(pixels.unsqueeze(2)?)?.squeeze(2)?))?;
        moments.map(|moments| Posterior::of_moments(&moments.unsqueeze(2)?)).transpose()
    }

    /// Mean and logarithm of the variance of the latents of frames before which there are none, side by side: f32 `[1, 3,
    /// frames, height, width]` in -1..=1 to f32 `[1, 2 latent_channels, f, h, w]`. A picture is one frame; of a clip the
    /// reference takes its first eight, and one that is left over.
    pub fn moments(&self, frames: Tensor) -> Result<Tensor> {
        let past = &mut Past::of_one_chunk();
        let mut x = past.convolve(&self.conv_in, &frames.to_dtype(self.compute_dtype)?)?;
        // They are gone before the first block.
        drop(frames);
        for level in &self.levels {
            x = level.forward(x, past)?;
        }
        for resnet in &self.mid_block {
            x = resnet.forward(x, &(), past)?;
        }
        let x = past.convolve(&self.conv_out, &self.norm_out.activated(&x)?)?;
        Ok(x.to_dtype(DType::F32)?)
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
