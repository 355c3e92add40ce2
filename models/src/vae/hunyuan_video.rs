//! `AutoencoderKLHunyuanVideo`: latents of a clip to its frames, and what the encoder shares with that.
//!
//! Owns: the configuration, the decoder, the overlapping stretches of time in which a clip is decoded, and the tiles of each. Does
//! not know: the transformer, RGB bytes. The norms see all frames of a stretch at once, so that a clip is decoded stretch by stretch
//! and two of them are blended where they overlap. Source: diffusers `models/autoencoders/autoencoder_kl_hunyuan_video.py`
//! (`_decode`, `_temporal_tiled_decode`, which is on by default, `tiled_decode`, which is not).

use std::collections::VecDeque;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde::Deserialize;

use self::blocks::{MidBlock, Resnet, UpBlock};
use crate::config::bounds::{MAX_BLOCKS, MAX_CHANNELS, MAX_LEVELS};
use crate::config::{Bound, Bounded};
use crate::diffusion::tiling::VaeTiling;
use crate::error::{Error, Result};
use crate::layers::{CausalConv3d, Conv3d, GroupNorm};
use crate::vae::Pixels;
use crate::vae::clip_tiles::cut;
use crate::vae::preview::{ClipRgb, RoughPicture};
use crate::vae::tiling::{InTiles, Seams, TileSide};
use crate::weights::Weights;
use tale_kernels::CausalPadding;

mod blocks;
pub mod encoder;

/// Of every group norm; the class does not configure it.
const NORM_EPS: f64 = 1e-6;
/// Frames of pixels that a stretch begins after the one before, and its own without its first one
/// (`tile_sample_stride_num_frames`, `tile_sample_min_num_frames`).
const STRIDE_FRAMES: usize = 12;
const STRETCH_FRAMES: usize = 16;
/// Pixels on each side of a tile (`tile_sample_min_height`, `tile_sample_min_width`), a quarter of which the next one covers
/// again (`tile_sample_stride_height`, `_width`).
const TILE_SIDE: usize = 256;
/// The only ratio that the class makes a decoder for.
const TEMPORAL_RATIO: usize = 4;
/// Two names of one function.
const SILU: [&str; 2] = ["silu", "swish"];
const DOWN_BLOCK: &str = "HunyuanVideoDownBlock3D";
const UP_BLOCK: &str = "HunyuanVideoUpBlock3D";

/// `config.json` of an `AutoencoderKLHunyuanVideo`. Defaults are those of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct HunyuanVaeConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    pub latent_channels: usize,
    pub down_block_types: Vec<String>,
    pub up_block_types: Vec<String>,
    pub block_out_channels: Vec<usize>,
    pub layers_per_block: usize,
    pub act_fn: String,
    pub norm_num_groups: usize,
    pub scaling_factor: f64,
    pub spatial_compression_ratio: usize,
    pub temporal_compression_ratio: usize,
    pub mid_block_add_attention: bool,
}

impl Default for HunyuanVaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            latent_channels: 16,
            down_block_types: vec![DOWN_BLOCK.to_owned(); 4],
            up_block_types: vec![UP_BLOCK.to_owned(); 4],
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            act_fn: SILU[0].to_owned(),
            norm_num_groups: 32,
            scaling_factor: 0.476986,
            spatial_compression_ratio: 8,
            temporal_compression_ratio: TEMPORAL_RATIO,
            mid_block_add_attention: true,
        }
    }
}

impl Bounded for HunyuanVaeConfig {
    const BOUNDS: &'static [Bound] = &[
        Bound::size("in_channels", MAX_CHANNELS),
        Bound::size("out_channels", MAX_CHANNELS),
        Bound::size("latent_channels", MAX_CHANNELS),
        Bound::list("down_block_types", MAX_LEVELS),
        Bound::list("up_block_types", MAX_LEVELS),
        Bound::size("block_out_channels", MAX_CHANNELS).entries(MAX_LEVELS),
        Bound::size("layers_per_block", MAX_BLOCKS),
        Bound::size("norm_num_groups", MAX_CHANNELS),
        Bound::scale("scaling_factor"),
        Bound::size("spatial_compression_ratio", 1 << MAX_LEVELS),
        Bound::size("temporal_compression_ratio", 1 << MAX_LEVELS),
    ];
}

impl HunyuanVaeConfig {
    /// Refuses what is not computed here; `path` is the file, for the message.
    pub fn check(&self, path: &Path) -> Result<()> {
        let levels = self.block_out_channels.len();
        let (groups, ratio) = (self.norm_num_groups, self.spatial_compression_ratio);
        let other =
            |blocks: &[String], known: &str| blocks.len() != levels || blocks.iter().any(|block| block != known);
        let problem = if !SILU.contains(&self.act_fn.as_str()) {
            format!("act_fn `{}` is not supported; supported: {}", self.act_fn, SILU.join(", "))
        } else if levels == 0 {
            format!("block_out_channels needs 1 to {MAX_LEVELS} levels")
        } else if other(&self.down_block_types, DOWN_BLOCK) {
            format!("down_block_types: only {DOWN_BLOCK} is supported, once for each of block_out_channels")
        } else if other(&self.up_block_types, UP_BLOCK) {
            format!("up_block_types: only {UP_BLOCK} is supported, once for each of block_out_channels")
        } else if self.block_out_channels.iter().any(|channels| !channels.is_multiple_of(groups)) {
            format!("block_out_channels must be multiples of norm_num_groups ({groups})")
        } else if [self.in_channels, self.out_channels] != [3, 3] {
            format!("in_channels and out_channels are {} and {}; supported: 3", self.in_channels, self.out_channels)
        } else if self.temporal_compression_ratio != TEMPORAL_RATIO {
            format!("temporal_compression_ratio is {}; supported: {TEMPORAL_RATIO}", self.temporal_compression_ratio)
        } else if self.factors().iter().map(|factor| factor.time).product::<usize>() != TEMPORAL_RATIO {
            format!("block_out_channels has {levels} levels, which do not shorten time by {TEMPORAL_RATIO}")
        } else if self.factors().iter().map(|factor| factor.space).product::<usize>() != ratio {
            format!("spatial_compression_ratio is {ratio}, the {levels} levels of block_out_channels give another")
        } else {
            return Ok(());
        };
        Err(Error::checkpoint(path, problem))
    }

    /// What each level of the decoder ends with, from the latents' size on.
    fn factors(&self) -> Vec<Factor> {
        let levels = self.block_out_channels.len();
        let in_space = self.spatial_compression_ratio.ilog2() as usize;
        let in_time = self.temporal_compression_ratio.ilog2() as usize;
        let factor = |level: usize| Factor {
            space: 1 + usize::from(level < in_space),
            time: 1 + usize::from(level + 1 + in_time >= levels && level + 1 < levels),
        };
        (0..levels).map(factor).collect()
    }

    /// Latent frames of a clip.
    pub fn latent_frames(&self, num_frames: usize) -> usize {
        (num_frames - 1) / self.temporal_compression_ratio + 1
    }

    /// When decoding works in tiles, which takes more than encoding, of clips of at most so many latent frames, which a session
    /// meanwhile holds so many times; `None` where the sizes of this VAE do not allow tiles.
    pub fn vae_tiling(&self, dtype: DType, latent_frames: usize, latent_copies: usize) -> Option<VaeTiling> {
        if !self.has_tiles() {
            return None;
        }
        let held = latent_copies * latent_frames * self.latent_channels * size_of::<f32>();
        let bytes = self.peak_decode_bytes([latent_frames, 1, 1], false, dtype) + held;
        let bytes_per_pixel = bytes.div_ceil(self.spatial_compression_ratio.pow(2));
        let frames_under_way = self.frames_under_way(latent_frames);
        Some(VaeTiling::new([TILE_SIDE; 2], bytes_per_pixel, frames_under_way))
    }

    /// Steps in which latents of these sizes are decoded, in tiles or not: stretches, of each tile.
    pub fn num_decode_steps(&self, [frames, height, width]: [usize; 3], tiled: bool) -> usize {
        let tiles = self.tiles((height, width), tiled).map_or(1, |tiling| tiling.count(height, width));
        Stretches::of(frames, self.temporal_compression_ratio).count * tiles
    }

    /// Bytes that decoding latents of these sizes holds at its peak beside them, in tiles or not.
    pub fn peak_decode_bytes(&self, [frames, height, width]: [usize; 3], tiled: bool, dtype: DType) -> usize {
        let scale = self.spatial_compression_ratio;
        let bytes = |pixels: usize| pixels * self.out_channels * size_of::<f32>();
        let work = |height, width| self.peak_decode_values([frames, height, width]) * dtype.size_in_bytes();
        let (stretch, overlap) = (self.stretch_frames(frames), STRETCH_FRAMES - STRIDE_FRAMES);
        let whole = height * width * scale * scale;
        let decoded = match self.tiles((height, width), tiled) {
            // The stretch and what is blended of it; the overlaps, and what they are blended of. The pixels change places
            // after the work.
            None => work(height, width).max(bytes((2 * stretch + 3 * overlap) * whole)),
            Some(tiling) => {
                let (tile_height, tile_width) = tiling.largest(height, width);
                let tile = tile_height * tile_width * scale * scale;
                let blended = bytes((TILE_COPIES * stretch + overlap) * tile);
                bytes(stretch * tiling.edge_places(width, scale)) + work(tile_height, tile_width).max(blended)
            }
        };
        // The end of the stretch before.
        decoded + bytes(overlap * whole)
    }

    /// Frames of which some pixels are there and others are not, at most.
    pub fn frames_under_way(&self, latent_frames: usize) -> usize {
        self.stretch_frames(latent_frames)
    }

    /// Bytes that the first preview of a model needs at its peak.
    pub fn preview_bytes(&self, dtype: DType) -> usize {
        ClipRgb::fit_bytes(self.latent_channels, self.spatial_compression_ratio, self.temporal_compression_ratio)
            + self.peak_decode_bytes(ClipRgb::FIT_SIZES, false, dtype)
    }

    /// Frames of the longest stretch of so many latent frames.
    fn stretch_frames(&self, latent_frames: usize) -> usize {
        let stretch = Stretches::of(latent_frames, self.temporal_compression_ratio).longest(latent_frames);
        (stretch - 1) * self.temporal_compression_ratio + 1
    }

    /// Most values of the compute dtype that decoding latents of these sizes holds at a time.
    fn peak_decode_values(&self, [frames, height, width]: [usize; 3]) -> usize {
        let stretch = Stretches::of(frames, self.temporal_compression_ratio).longest(frames);
        let mut positions = [stretch, height, width];
        let mut previous = *self.block_out_channels.last().unwrap_or(&0);
        let mut widest = 0;
        for (factor, channels) in self.factors().iter().zip(self.block_out_channels.iter().rev()) {
            let values = positions.iter().product::<usize>();
            // A level's first block still has the channels of the level before.
            widest = widest.max(LIVE_COPIES * values * previous.max(*channels));
            previous = *channels;
            // The input, its frames twice, and the result of the convolution that doubles the size.
            let doubled = (positions[0] - 1) * factor.time + 1;
            let before = positions[1] * positions[2] * (positions[0] + doubled);
            positions = [doubled, positions[1] * factor.space, positions[2] * factor.space];
            widest = widest.max((before + positions.iter().product::<usize>()) * channels);
        }
        // The last norm and the pixels, which become f32 and change places.
        widest.max(positions.iter().product::<usize>() * (2 * previous).max(6 * self.out_channels))
    }
}

impl InTiles for HunyuanVaeConfig {
    fn tile_sides(&self) -> [TileSide; 2] {
        [TileSide::quartered(TILE_SIDE, self.spatial_compression_ratio); 2]
    }
}

/// Tensors of the widest level that are alive at once: residual, first convolution, its norm, second convolution.
const LIVE_COPIES: usize = 4;
/// Copies of a tile's pixels that are alive while it is blended: it, its seam or edges, and what they make of it.
const TILE_COPIES: usize = 4;

/// By how much a level of the decoder enlarges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Factor {
    /// 1 or 2; the first frame stays one.
    time: usize,
    /// 1 or 2.
    space: usize,
}

impl Factor {
    /// Whether it changes anything.
    fn enlarges(self) -> bool {
        self.time * self.space > 1
    }
}

/// The stretches of a clip's latent frames that are decoded at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretches {
    count: usize,
    /// Latent frames from the first of one to the first of the next.
    stride: usize,
    /// Latent frames of one that is not cut short by the end of the clip.
    len: usize,
}

impl Stretches {
    /// A clip that is not longer than one stretch without its first frame is decoded as a whole. The last stretch would
    /// often have one frame, of which nothing is kept: it is left out.
    fn of(frames: usize, temporal_ratio: usize) -> Self {
        let (stride, min) = (STRIDE_FRAMES / temporal_ratio, STRETCH_FRAMES / temporal_ratio);
        match frames > min {
            true => Self { count: (frames - 1).div_ceil(stride), stride, len: min + 1 },
            false => Self { count: 1, stride, len: frames },
        }
    }

    /// First latent frame of a stretch, and how many it has.
    fn window(&self, index: usize, frames: usize) -> (usize, usize) {
        let start = index * self.stride;
        (start, self.len.min(frames - start))
    }

    /// Latent frames of the longest.
    fn longest(&self, frames: usize) -> usize {
        self.len.min(frames)
    }
}

/// The decoder half of `AutoencoderKLHunyuanVideo`.
pub struct HunyuanVaeDecoder {
    post_quant_conv: Conv3d,
    conv_in: CausalConv3d,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: CausalConv3d,
    compute_dtype: DType,
    config: HunyuanVaeConfig,
    rgb: ClipRgb,
}

/// A decode between two steps. Dropping it frees all that it holds.
pub struct HunyuanVaeDecoding {
    /// Latents of the VAE, f32 `[1, z, f, h, w]`.
    latents: Tensor,
    stretches: Stretches,
    /// The stretch that comes next, or of which some tiles are done.
    next: usize,
    /// Of that stretch; `None` where it is decoded as a whole.
    tiles: Option<Seams>,
    /// Frames at the beginning that nobody wants.
    skipped: usize,
    /// Number of the first frame of that stretch.
    first_frame: usize,
    /// The last frames of the stretch before, f32 `[frames, 3, height, width]`: of each tile to come, then of those of the next
    /// stretch.
    tails: VecDeque<Tensor>,
}

impl HunyuanVaeDecoder {
    /// Tensors `post_quant_conv.*` and `decoder.*`.
    pub fn load(weights: &Weights, config: &HunyuanVaeConfig) -> Result<Self> {
        let decoder = weights.pp("decoder");
        let (latent, groups) = (config.latent_channels, config.norm_num_groups);
        let (first, last) =
            (config.block_out_channels[0], config.block_out_channels[config.block_out_channels.len() - 1]);
        let blocks = decoder.pp("up_blocks");
        let mut up_blocks = Vec::with_capacity(config.block_out_channels.len());
        let mut previous = last;
        for (level, channels) in config.block_out_channels.iter().copied().rev().enumerate() {
            let weights = blocks.pp(level);
            let mut resnets = Vec::with_capacity(config.layers_per_block + 1);
            for i in 0..=config.layers_per_block {
                let in_channels = if i == 0 { previous } else { channels };
                resnets.push(Resnet::load(&weights.pp("resnets").pp(i), in_channels, channels, groups)?);
            }
            up_blocks.push(UpBlock::load(&weights, resnets, channels, config.factors()[level])?);
            previous = channels;
        }
        Ok(Self {
            post_quant_conv: Conv3d::load(&weights.pp("post_quant_conv"), latent, latent, [1, 1, 1], 0)?,
            conv_in: load_conv(&decoder.pp("conv_in"), latent, last)?,
            mid_block: MidBlock::load(&decoder.pp("mid_block"), last, groups, config.mid_block_add_attention)?,
            up_blocks,
            conv_norm_out: GroupNorm::load(&decoder.pp("conv_norm_out"), groups, first, NORM_EPS)?,
            conv_out: load_conv(&decoder.pp("conv_out"), first, config.out_channels)?,
            compute_dtype: weights.placement().compute_dtype,
            config: config.clone(),
            rgb: ClipRgb::default(),
        })
    }

    /// Begins to decode the final f32 latents of one clip, `[1, z, f, h, w]`, whose first `skipped` frames, fewer than those of
    /// a latent frame more, are left out; each stretch in tiles if asked and if there is more than one.
    pub fn begin(&self, latents: &Tensor, skipped: usize, tiled: bool) -> Result<HunyuanVaeDecoding> {
        let (_, _, frames, height, width) = latents.dims5()?;
        let stretches = Stretches::of(frames, self.config.temporal_compression_ratio);
        let latents = (latents / self.config.scaling_factor)?;
        let tiles = self.config.tiles((height, width), tiled).map(|tiling| Seams::new(tiling, height, width));
        Ok(HunyuanVaeDecoding { latents, stretches, next: 0, tiles, skipped, first_frame: 0, tails: VecDeque::new() })
    }

    /// Decodes the next stretch, or its next tile: what it gives of the clip. Fails when all are decoded.
    pub fn decode_next(&self, decoding: &mut HunyuanVaeDecoding) -> Result<Pixels> {
        let HunyuanVaeDecoding { latents, stretches, next, tiles, .. } = &mut *decoding;
        let (start, len) = stretches.window(*next, latents.dim(2)?);
        let stretch = latents.narrow(2, start, len)?;
        let decoded = match tiles {
            None => Pixels::of_whole_frames(self.decode(&stretch.contiguous()?)?, 0)?,
            Some(tiles) => Pixels::of_part(tiles.blend(self.decode(&cut(&stretch, tiles.next_window())?)?)?, 0),
        };
        let values = decoding.join(decoded.values)?;
        let pixels = Pixels { values, first_frame: decoding.first_frame, ..decoded };
        if decoding.tiles.as_ref().is_none_or(Seams::is_at_start) {
            decoding.next += 1;
            decoding.first_frame += pixels.values.dim(0)?;
        }
        Ok(pixels)
    }

    /// A rough picture of the middle of f32 `latents [1, z, f, h, w]`, one value for each position. The first one decodes a few
    /// random latents to learn their colours.
    pub fn preview(&self, latents: &Tensor) -> Result<RoughPicture> {
        self.rgb.preview(latents, |latents| self.decode(&(latents / self.config.scaling_factor)?))
    }

    /// Latents of the VAE `[1, z, f, h, w]` to f32 pixels `[frames, 3, height, width]`.
    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let mut x =
            self.conv_in.forward_whole(&self.post_quant_conv.forward(&latents.to_dtype(self.compute_dtype)?)?)?;
        x = self.mid_block.forward(x)?;
        for block in &self.up_blocks {
            x = block.forward(x)?;
        }
        x = self.conv_norm_out.activated(&x)?;
        x = self.conv_out.forward_whole(&x)?; // [1, 3, frames, H, W]
        Ok(x.to_dtype(DType::F32)?.squeeze(0)?.transpose(0, 1)?.contiguous()?)
    }
}

impl HunyuanVaeDecoding {
    /// What is handed out of a part of the stretch under way, `[frames, 3, height, width]`, the first frames of which pass over
    /// from the stretch before.
    fn join(&mut self, decoded: Tensor) -> Result<Tensor> {
        let is_first = self.next == 0;
        let skipped = if is_first { self.skipped } else { 0 };
        if self.stretches.count == 1 {
            return Ok(decoded.narrow(0, skipped, decoded.dim(0)? - skipped)?);
        }
        // All but the first begin with a frame that only helps to decode the others.
        let decoded = if is_first { decoded } else { decoded.narrow(0, 1, decoded.dim(0)? - 1)? };
        let blended = match is_first {
            true => decoded,
            false => blend(&self.tails.pop_front().expect("the stretch before left its end: this is a bug"), &decoded)?,
        };
        let (frames, kept) = (blended.dim(0)?, STRIDE_FRAMES + usize::from(is_first));
        if self.next + 1 < self.stretches.count {
            let overlap = (STRETCH_FRAMES - STRIDE_FRAMES).min(frames);
            self.tails.push_back(blended.narrow(0, frames - overlap, overlap)?.force_contiguous()?);
        }
        Ok(blended.narrow(0, skipped, kept.min(frames) - skipped)?)
    }
}

/// The frames of `stretch [frames, ...]`, the first of which pass over from the `tail` of the stretch before. Source:
/// `blend_t`.
fn blend(tail: &Tensor, stretch: &Tensor) -> Result<Tensor> {
    let (tail_len, len) = (tail.dim(0)?, stretch.dim(0)?);
    let extent = tail_len.min(len).min(STRETCH_FRAMES - STRIDE_FRAMES);
    if extent == 0 {
        return Ok(stretch.clone());
    }
    let shares = |share: fn(f64) -> f64| {
        let values: Vec<f32> = (0..extent).map(|i| share(i as f64 / extent as f64) as f32).collect();
        Tensor::from_vec(values, (extent, 1, 1, 1), stretch.device())
    };
    let old = tail.narrow(0, tail_len - extent, extent)?.broadcast_mul(&shares(|share| 1.0 - share)?)?;
    let new = stretch.narrow(0, 0, extent)?.broadcast_mul(&shares(|share| share)?)?;
    Ok(Tensor::cat(&[(old + new)?, stretch.narrow(0, extent, len - extent)?], 0)?)
}

/// A convolution over three frames and three values on each side: tensors `conv.*`.
fn load_conv(weights: &Weights, in_channels: usize, out_channels: usize) -> Result<CausalConv3d> {
    CausalConv3d::load(&weights.pp("conv"), in_channels, out_channels, [3, 3, 3], CausalPadding::Replicate)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `range(0, num_frames, 3)` with windows of five, less those that give no frame.
    #[test]
    fn stretches_are_those_of_the_reference() {
        let windows = |frames: usize| -> Vec<(usize, usize)> {
            let stretches = Stretches::of(frames, 4);
            (0..stretches.count).map(|index| stretches.window(index, frames)).collect()
        };
        assert_eq!(windows(1), [(0, 1)]);
        assert_eq!(windows(4), [(0, 4)]);
        assert_eq!(windows(5), [(0, 5), (3, 2)]);
        assert_eq!(windows(6), [(0, 5), (3, 3)]);
        assert_eq!(windows(7), [(0, 5), (3, 4)]);
        assert_eq!(windows(8), [(0, 5), (3, 5), (6, 2)]);
        assert_eq!(windows(33).len(), 11);
        assert_eq!(windows(33)[10], (30, 3));
    }

    #[test]
    fn levels_enlarge_as_in_the_reference() {
        let factors = |levels: usize, spatial: usize| -> Vec<(usize, usize)> {
            let config = HunyuanVaeConfig {
                block_out_channels: vec![32; levels],
                spatial_compression_ratio: spatial,
                ..Default::default()
            };
            config.factors().iter().map(|factor| (factor.time, factor.space)).collect()
        };
        assert_eq!(factors(4, 8), [(1, 2), (2, 2), (2, 2), (1, 1)]);
        assert_eq!(factors(3, 8), [(2, 2), (2, 2), (1, 2)]);
        assert_eq!(factors(4, 4), [(1, 2), (2, 2), (2, 1), (1, 1)]);
        assert_eq!(factors(2, 8), [(2, 2), (1, 2)]);
    }
}
