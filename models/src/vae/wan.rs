//! Decoder of the Wan2.1 video VAE: latents to frames, one latent frame at a time.
//!
//! Owns: the causal 3-D decoder and the past frames that its convolutions remember between two calls. Does not know:
//! the transformer, RGB bytes. The encoder is in `encoder`; the decoder knows its tensors and does not load them.
//! Source: diffusers `models/autoencoders/autoencoder_kl_wan.py` (`WanDecoder3d`), without its padding bookkeeping: a
//! causal convolution sees zeros before the first frame, so an absent past and a past of zeros are the same.

use std::path::Path;

use candle_core::{DType, Tensor};
use serde::Deserialize;
use tale_kernels::{AttentionOptions, CausalPadding, attention, rms_norm_channels, rms_norm_channels_silu};

use crate::config::bounds::{MAX_BLOCKS, MAX_CHANNELS, MAX_LEVELS, MAX_SCALE, check_product};
use crate::config::{Bound, Bounded};
use crate::diffusion::tiling::VaeTiling;
use crate::error::{Error, Result};
use crate::layers::{CausalConv3d, Conv2d, Conv3d};
use crate::vae::causal::Past;
use crate::vae::clip_tiles::{self, ClipDecoder, ClipDecoding};
use crate::vae::preview::{ClipRgb, RoughPicture};
use crate::vae::tiling::{InTiles, TileSide};
use crate::weights::Weights;

pub mod encoder;
pub mod original;

/// Pixels on each side of a tile (`tile_sample_min_height`, `tile_sample_min_width`).
pub const TILE_SIDE: usize = 256;
/// Frames of the past that a causal convolution over time needs: its kernel spans three.
const HISTORY: usize = 2;

/// `config.json` of `AutoencoderKLWan`; what decides about the decoder. Defaults are those of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct WanVaeConfig {
    pub base_dim: usize,
    pub decoder_base_dim: Option<usize>,
    pub z_dim: usize,
    pub dim_mult: Vec<usize>,
    pub num_res_blocks: usize,
    /// Spelled as in the reference.
    pub temperal_downsample: Vec<bool>,
    pub latents_mean: Vec<f32>,
    pub latents_std: Vec<f32>,
    pub is_residual: bool,
    pub patch_size: Option<usize>,
    pub out_channels: usize,
    pub scale_factor_temporal: usize,
    pub scale_factor_spatial: usize,
}

impl Default for WanVaeConfig {
    fn default() -> Self {
        Self {
            base_dim: 96,
            decoder_base_dim: None,
            z_dim: 16,
            dim_mult: vec![1, 2, 4, 4],
            num_res_blocks: 2,
            temperal_downsample: vec![false, true, true],
            latents_mean: LATENTS_MEAN.to_vec(),
            latents_std: LATENTS_STD.to_vec(),
            is_residual: false,
            patch_size: None,
            out_channels: 3,
            scale_factor_temporal: 4,
            scale_factor_spatial: 8,
        }
    }
}

/// Of the latents of Wan2.1, by channel.
const LATENTS_MEAN: [f32; 16] = [
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922,
    -0.9497, 0.2503, -0.2921,
];
const LATENTS_STD: [f32; 16] = [
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
    2.8251, 1.9160,
];

impl Bounded for WanVaeConfig {
    const BOUNDS: &'static [Bound] = &[
        Bound::size("base_dim", MAX_CHANNELS),
        Bound::size("decoder_base_dim", MAX_CHANNELS),
        Bound::size("z_dim", MAX_CHANNELS),
        Bound::size("dim_mult", MAX_CHANNELS).entries(MAX_LEVELS),
        Bound::size("num_res_blocks", MAX_BLOCKS),
        Bound::list("temperal_downsample", MAX_LEVELS),
        Bound::number("latents_mean", -MAX_SCALE, MAX_SCALE).entries(MAX_CHANNELS as usize),
        Bound::scale("latents_std").entries(MAX_CHANNELS as usize),
        Bound::size("out_channels", MAX_CHANNELS),
        Bound::size("scale_factor_temporal", 1 << MAX_LEVELS),
        Bound::size("scale_factor_spatial", 1 << MAX_LEVELS),
    ];
}

impl WanVaeConfig {
    /// Refuses what this decoder cannot do; `path` is the file, for the message.
    pub fn check(&self, path: &Path) -> Result<()> {
        let levels = self.dim_mult.len();
        let base_dim = self.decoder_base_dim.unwrap_or(self.base_dim);
        for multiple in &self.dim_mult {
            check_product(path, ("base_dim", base_dim), ("dim_mult", *multiple), MAX_CHANNELS)?;
        }
        let spatial = 1 << levels.saturating_sub(1);
        let temporal = 1 << self.temperal_downsample.iter().filter(|down| **down).count();
        let problem = if self.is_residual {
            "`is_residual`: only false is supported (Wan2.1)".to_owned()
        } else if self.patch_size.is_some() {
            "`patch_size`: only null is supported (Wan2.1)".to_owned()
        } else if self.out_channels != 3 {
            format!("`out_channels` is {}; only 3 is supported", self.out_channels)
        } else if levels == 0 || self.temperal_downsample.len() + 1 != levels {
            format!("`temperal_downsample` has {} entries for {levels} of `dim_mult`", self.temperal_downsample.len())
        } else if self.latents_mean.len() != self.z_dim || self.latents_std.len() != self.z_dim {
            format!("`latents_mean` and `latents_std` need {} entries each", self.z_dim)
        } else if self.scale_factor_spatial != spatial {
            format!("`scale_factor_spatial` is {}, the layers give {spatial}", self.scale_factor_spatial)
        } else if self.scale_factor_temporal != temporal {
            format!("`scale_factor_temporal` is {}, the layers give {temporal}", self.scale_factor_temporal)
        } else {
            return Ok(());
        };
        Err(Error::checkpoint(path, problem))
    }

    /// When decoding works in tiles, which takes more than encoding.
    pub fn vae_tiling(&self, dtype: DType) -> Option<VaeTiling> {
        if !self.has_tiles() {
            return None;
        }
        let latent_pixels = self.scale_factor_spatial.pow(2);
        let bytes_per_pixel = (self.peak_values(1, 1) * dtype.size_in_bytes()).div_ceil(latent_pixels);
        Some(VaeTiling::new([TILE_SIDE; 2], bytes_per_pixel, self.scale_factor_temporal))
    }

    /// Steps of a [`WanDecoding`] for so many latent frames of this height and width, in tiles or not.
    pub fn num_decode_steps(&self, frames: usize, latents: (usize, usize), tiled: bool) -> usize {
        clip_tiles::num_steps(self.tiles(latents, tiled), latents, frames)
    }

    /// Bytes that decoding so many latent frames of this height and width holds at its peak beside the latents, in tiles or
    /// not.
    pub fn peak_decode_bytes(&self, frames: usize, latents: (usize, usize), tiled: bool, dtype: DType) -> usize {
        let bytes = |(height, width)| self.peak_values(height, width) * dtype.size_in_bytes();
        let Some(tiling) = self.tiles(latents, tiled) else { return bytes(latents) };
        let work = bytes(tiling.largest(latents.0, latents.1));
        clip_tiles::peak_bytes(&tiling, latents, self.scale_factor_spatial, self.clip_frames(frames), work)
    }

    /// Frames of which some pixels are there and others are not, at most, of so many latent frames of this height and width, in
    /// tiles or not.
    pub fn frames_under_way(&self, frames: usize, latents: (usize, usize), tiled: bool) -> usize {
        clip_tiles::frames_under_way(self.tiles(latents, tiled), self.clip_frames(frames))
    }

    /// Frames of so many latent frames, and the most of one of these.
    fn clip_frames(&self, latent_frames: usize) -> [usize; 2] {
        [(latent_frames - 1) * self.scale_factor_temporal + 1, self.scale_factor_temporal]
    }

    /// Bytes that the first preview of a model needs at its peak.
    pub fn preview_bytes(&self, dtype: DType) -> usize {
        let [frames, height, width] = ClipRgb::FIT_SIZES;
        ClipRgb::fit_bytes(self.z_dim, self.scale_factor_spatial, self.scale_factor_temporal)
            + self.peak_decode_bytes(frames, (height, width), false, dtype)
    }

    /// Channels of the decoder's levels, from the latents' size to the pixels'.
    fn level_dims(&self) -> Vec<usize> {
        let base = self.decoder_base_dim.unwrap_or(self.base_dim);
        self.dim_mult.iter().rev().map(|multiple| base * multiple).collect()
    }

    /// How the decoder's level `i` ends: `None` at the last one, else whether frames are doubled with the size.
    fn upsampling(&self, level: usize) -> Option<bool> {
        self.temperal_downsample.iter().rev().nth(level).copied()
    }

    /// Most values of the compute dtype that decoding latents of this height and width holds at a time.
    pub fn peak_values(&self, height: usize, width: usize) -> usize {
        let dims = self.level_dims();
        let (mut frames, mut pixels) = (1, height * width);
        // What convolutions remember: of the first one and of the four in the middle.
        let mut remembered = HISTORY * pixels * (self.z_dim + 4 * dims[0]);
        let mut working = 0;
        for (level, dim) in dims.iter().copied().enumerate() {
            remembered += HISTORY * pixels * dim * 2 * (self.num_res_blocks + 1);
            // The block's input, the first convolution's answer, its norm and the second one's answer, or instead of the
            // norm the shortcut and the sum; and what a convolution remembers, of this chunk and still of the last one.
            // Convolutions take no memory beyond 1.5 MB per thread on the CPU, and none on a GPU.
            working = working.max(pixels * dim * (5 * frames + HISTORY));
            if let Some(in_time) = self.upsampling(level) {
                remembered += HISTORY * pixels * dim * usize::from(in_time);
                frames *= 1 + usize::from(in_time);
                // The input, or half of it until its frames are doubled, and the answer: four times the pixels, half the
                // channels.
                working = working.max(pixels * dim * (frames + 2 * frames + HISTORY));
                pixels *= 4;
            }
        }
        remembered + HISTORY * pixels * dims[dims.len() - 1] + working
    }
}

impl InTiles for WanVaeConfig {
    fn tile_sides(&self) -> [TileSide; 2] {
        [TileSide::quartered(TILE_SIDE, self.scale_factor_spatial); 2]
    }
}

/// The decoder half of `AutoencoderKLWan`.
pub struct WanVaeDecoder {
    compute_dtype: DType,
    /// `[1, z, 1, 1, 1]`, f32.
    latents_mean: Tensor,
    latents_std: Tensor,
    post_quant_conv: Conv3d,
    conv_in: CausalConv3d,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    norm_out: Norm,
    conv_out: CausalConv3d,
    config: WanVaeConfig,
    rgb: ClipRgb,
}

/// A decode between two steps. Dropping it frees all that it remembers.
pub type WanDecoding = ClipDecoding<FramesDecoding>;

/// A decode of frames, whole ones or those of a tile.
pub struct FramesDecoding {
    /// Latents with the model's mean and scale, f32 `[1, z, f, h, w]`.
    latents: Tensor,
    /// Latent frame that comes next.
    next: usize,
    past: Past,
}

impl WanVaeDecoder {
    /// Tensors `post_quant_conv.*` and `decoder.*`; `encoder.*` and `quant_conv.*` stay on disk.
    pub fn load(weights: &Weights, config: &WanVaeConfig) -> Result<Self> {
        weights.ignore_below("encoder");
        weights.ignore_below("quant_conv");
        let z_dim = config.z_dim;
        let device = &weights.placement().device;
        let per_channel = |values: &[f32]| Tensor::from_slice(values, (1, z_dim, 1, 1, 1), device);
        let decoder = weights.pp("decoder");
        let dims = config.level_dims();
        let conv_in = causal(&decoder.pp("conv_in"), z_dim, dims[0], [3, 3, 3])?;
        let mid_block = MidBlock::load(&decoder.pp("mid_block"), dims[0])?;
        let mut up_blocks = Vec::with_capacity(dims.len());
        let mut in_dim = dims[0];
        for (i, out_dim) in dims.iter().copied().enumerate() {
            let (num_resnets, upsample) = (config.num_res_blocks + 1, config.upsampling(i));
            let block = UpBlockShape { in_dim, out_dim, num_resnets, upsample };
            up_blocks.push(UpBlock::load(&decoder.pp("up_blocks").pp(i), &block)?);
            in_dim = out_dim / 2;
        }
        let last = dims[dims.len() - 1];
        Ok(Self {
            compute_dtype: weights.placement().compute_dtype,
            latents_mean: per_channel(&config.latents_mean)?,
            latents_std: per_channel(&config.latents_std)?,
            post_quant_conv: Conv3d::load(&weights.pp("post_quant_conv"), z_dim, z_dim, [1, 1, 1], 0)?,
            conv_in,
            mid_block,
            up_blocks,
            norm_out: Norm::load(&decoder.pp("norm_out"), &[last, 1, 1, 1])?,
            conv_out: causal(&decoder.pp("conv_out"), last, config.out_channels, [3, 3, 3])?,
            config: config.clone(),
            rgb: ClipRgb::default(),
        })
    }

    /// Begins to decode the final f32 latents of one clip, `[1, z, f, h, w]`, in tiles if asked and if there is more than one.
    pub fn begin(&self, latents: &Tensor, tiled: bool) -> Result<WanDecoding> {
        let (_, _, frames, height, width) = latents.dims5()?;
        ClipDecoding::begin(self, latents, self.config.tiles((height, width), tiled), frames)
    }

    /// A rough picture of the middle of f32 `latents [1, z, f, h, w]`, one value for each position. The first one decodes a few
    /// random latents to learn their colours.
    pub fn preview(&self, latents: &Tensor) -> Result<RoughPicture> {
        self.rgb.preview(latents, |latents| {
            let mut decoding = self.begin_clip(latents)?;
            let portions = (0..latents.dim(2)?).map(|_| self.next_portion(&mut decoding));
            Ok(Tensor::cat(&portions.collect::<Result<Vec<_>>>()?, 0)?)
        })
    }
}

/// A portion is a latent frame: one frame of the first, as many as the temporal scale factor says of each later one.
impl ClipDecoder for WanVaeDecoder {
    type Decoding = FramesDecoding;

    fn begin_clip(&self, latents: &Tensor) -> Result<FramesDecoding> {
        let latents = latents.broadcast_mul(&self.latents_std)?.broadcast_add(&self.latents_mean)?;
        Ok(FramesDecoding { latents, next: 0, past: Past::of_chunks() })
    }

    fn next_portion(&self, decoding: &mut FramesDecoding) -> Result<Tensor> {
        let z = decoding.latents.narrow(2, decoding.next, 1)?.contiguous()?.to_dtype(self.compute_dtype)?; // [1, z, 1, h, w]
        let past = &mut decoding.past;
        let x = past.convolve(&self.conv_in, &self.post_quant_conv.forward(&z)?)?;
        let mut x = self.mid_block.forward(x, past)?;
        for block in &self.up_blocks {
            x = block.forward(x, past)?;
        }
        let x = past.convolve(&self.conv_out, &self.norm_out.activated(&x)?)?; // [1, 3, frames, H, W]
        past.end_chunk();
        decoding.next += 1;
        Ok(x.to_dtype(DType::F32)?.squeeze(0)?.transpose(0, 1)?.contiguous()?)
    }
}

/// A causal convolution, which sees zeros before the first frame.
fn causal(weights: &Weights, in_channels: usize, out_channels: usize, kernel: [usize; 3]) -> Result<CausalConv3d> {
    CausalConv3d::load(weights, in_channels, out_channels, kernel, CausalPadding::Zeros)
}

/// RMS norm over channels.
struct Norm {
    gamma: Tensor,
}

impl Norm {
    fn load(weights: &Weights, shape: &[usize]) -> Result<Self> {
        Ok(Self { gamma: weights.get(shape, "gamma")?.flatten_all()? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(rms_norm_channels(x, &self.gamma)?)
    }

    /// `silu(norm(x))`.
    fn activated(&self, x: &Tensor) -> Result<Tensor> {
        Ok(rms_norm_channels_silu(x, &self.gamma)?)
    }
}

struct ResidualBlock {
    norm1: Norm,
    conv1: CausalConv3d,
    norm2: Norm,
    conv2: CausalConv3d,
    conv_shortcut: Option<Conv3d>,
}

impl ResidualBlock {
    fn load(weights: &Weights, in_dim: usize, out_dim: usize) -> Result<Self> {
        let shortcut = || Conv3d::load(&weights.pp("conv_shortcut"), in_dim, out_dim, [1, 1, 1], 0);
        Ok(Self {
            norm1: Norm::load(&weights.pp("norm1"), &[in_dim, 1, 1, 1])?,
            conv1: causal(&weights.pp("conv1"), in_dim, out_dim, [3, 3, 3])?,
            norm2: Norm::load(&weights.pp("norm2"), &[out_dim, 1, 1, 1])?,
            conv2: causal(&weights.pp("conv2"), out_dim, out_dim, [3, 3, 3])?,
            conv_shortcut: (in_dim != out_dim).then(shortcut).transpose()?,
        })
    }

    fn forward(&self, x: Tensor, past: &mut Past) -> Result<Tensor> {
        let y = past.convolve(&self.conv1, &self.norm1.activated(&x)?)?;
        let y = past.convolve(&self.conv2, &self.norm2.activated(&y)?)?;
        let shortcut = match &self.conv_shortcut {
            Some(conv) => conv.forward(&x)?,
            None => x,
        };
        Ok((shortcut + y)?)
    }
}

/// Attention of one head over the pixels of one frame.
struct AttentionBlock {
    norm: Norm,
    to_qkv: Conv2d,
    proj: Conv2d,
}

impl AttentionBlock {
    fn load(weights: &Weights, dim: usize) -> Result<Self> {
        Ok(Self {
            norm: Norm::load(&weights.pp("norm"), &[dim, 1, 1])?,
            to_qkv: Conv2d::load(&weights.pp("to_qkv"), dim, dim * 3, 1, 0)?,
            proj: Conv2d::load(&weights.pp("proj"), dim, dim, 1, 0)?,
        })
    }

    /// `[1, c, 1, h, w]` to the same shape.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let frame = x.squeeze(2)?; // [1, c, h, w]
        let (b, c, h, w) = frame.dims4()?;
        let qkv = self.to_qkv.forward(&self.norm.forward(&frame)?)?.reshape((b, 3, c, h * w))?;
        let part = |i: usize| qkv.narrow(1, i, 1)?.transpose(2, 3)?.transpose(1, 2)?.contiguous(); // [b, hw, 1, c]
        let y = attention(&part(0)?, &part(1)?, &part(2)?, &AttentionOptions::default())?; // [b, hw, 1, c]
        let y = y.reshape((b, h * w, c))?.transpose(1, 2)?.contiguous()?.reshape((b, c, h, w))?;
        Ok((x + self.proj.forward(&y)?.unsqueeze(2)?)?)
    }
}

struct MidBlock {
    first: ResidualBlock,
    attention: AttentionBlock,
    second: ResidualBlock,
}

impl MidBlock {
    fn load(weights: &Weights, dim: usize) -> Result<Self> {
        let resnets = weights.pp("resnets");
        Ok(Self {
            first: ResidualBlock::load(&resnets.pp(0), dim, dim)?,
            attention: AttentionBlock::load(&weights.pp("attentions").pp(0), dim)?,
            second: ResidualBlock::load(&resnets.pp(1), dim, dim)?,
        })
    }

    fn forward(&self, x: Tensor, past: &mut Past) -> Result<Tensor> {
        let x = self.attention.forward(&self.first.forward(x, past)?)?;
        self.second.forward(x, past)
    }
}

struct UpBlockShape {
    in_dim: usize,
    out_dim: usize,
    num_resnets: usize,
    /// Whether the size is doubled and, if so, the number of frames too.
    upsample: Option<bool>,
}

struct UpBlock {
    resnets: Vec<ResidualBlock>,
    upsampler: Option<Upsampler>,
}

impl UpBlock {
    fn load(weights: &Weights, shape: &UpBlockShape) -> Result<Self> {
        let mut resnets = Vec::with_capacity(shape.num_resnets);
        let mut in_dim = shape.in_dim;
        for i in 0..shape.num_resnets {
            resnets.push(ResidualBlock::load(&weights.pp("resnets").pp(i), in_dim, shape.out_dim)?);
            in_dim = shape.out_dim;
        }
        let upsampler = weights.pp("upsamplers").pp(0);
        let load = |in_time: bool| Upsampler::load(&upsampler, shape.out_dim, in_time);
        Ok(Self { resnets, upsampler: shape.upsample.map(load).transpose()? })
    }

    fn forward(&self, mut x: Tensor, past: &mut Past) -> Result<Tensor> {
        for resnet in &self.resnets {
            x = resnet.forward(x, past)?;
        }
        match &self.upsampler {
            Some(upsampler) => upsampler.forward(x, past),
            None => Ok(x),
        }
    }
}

/// Doubles height and width, halves channels; with a `time_conv` doubles frames too.
struct Upsampler {
    time_conv: Option<CausalConv3d>,
    /// `resample.1`, with `resample.0`, the nearest-neighbour upsampling.
    conv: Conv2d,
}

impl Upsampler {
    fn load(weights: &Weights, dim: usize, in_time: bool) -> Result<Self> {
        let time_conv = || causal(&weights.pp("time_conv"), dim, dim * 2, [3, 1, 1]);
        Ok(Self {
            time_conv: in_time.then(time_conv).transpose()?,
            conv: Conv2d::load(&weights.pp("resample").pp(1), dim, dim / 2, 3, 1)?.upsampling(),
        })
    }

    fn forward(&self, x: Tensor, past: &mut Past) -> Result<Tensor> {
        let x = match &self.time_conv {
            // The first latent frame stands for one frame: it is neither doubled nor remembered here.
            Some(_) if past.is_first_chunk() => {
                past.next_layer();
                x
            }
            Some(time_conv) => interleave(&past.convolve(time_conv, &x)?)?,
            None => x,
        };
        self.conv.forward_frames(&x)
    }
}

/// `[b, 2c, t, h, w]`, the two halves being even and odd frames, to `[b, c, 2t, h, w]`.
fn interleave(x: &Tensor) -> Result<Tensor> {
    let (b, c, t, h, w) = x.dims5()?;
    let x = x.reshape(vec![b, 2, c / 2, t, h, w])?.permute(vec![0, 2, 3, 1, 4, 5])?; // [b, c, t, 2, h, w]
    Ok(x.contiguous()?.reshape((b, c / 2, t * 2, h, w))?)
}
