//! Decoder of the CogVideoX video VAE: latents to frames, a few latent frames at a time.
//!
//! Owns: the configuration, the causal 3-D decoder, which latent frames make a chunk, how large tiles are. Does not know: the
//! transformer, RGB bytes. The encoder is in `encoder`; the decoder knows its tensors and does not load them.
//! Source: diffusers `models/autoencoders/autoencoder_kl_cogvideox.py` (`CogVideoXDecoder3D`, `AutoencoderKLCogVideoX._decode`,
//! `tiled_decode`). Group norms see a whole chunk, so that its length is part of what the model computes.

use std::path::Path;

use candle_core::{DType, Tensor};
use serde::Deserialize;
use tale_kernels::{CausalPadding, SpatialNorm, spatial_norm_silu};

use super::causal::Past;
use super::clip_tiles::{self, ClipDecoder, ClipDecoding};
use super::preview::{ClipRgb, RoughPicture};
use super::tiling::{InTiles, TileSide};
use crate::config::bounds::{MAX_BLOCKS, MAX_CHANNELS, MAX_LEVELS, MAX_SIDE};
use crate::config::{Bound, Bounded};
use crate::diffusion::tiling::VaeTiling;
use crate::error::{Error, Result};
use crate::layers::{CausalConv3d, Conv2d, Conv3d};
use crate::weights::Weights;

pub mod encoder;

/// Latent frames of a chunk; one that is left over belongs to the first chunk (`num_latent_frames_batch_size`).
const CHUNK: usize = 2;
/// Red, green and blue.
const CHANNELS: usize = 3;
/// Of norms whose `eps` the class does not configure.
const NORM_EPS: f64 = 1e-6;
/// Frames of the past that a causal convolution needs: its kernel spans three.
const HISTORY: usize = 2;
/// A tile is so many times shorter than what the model was made for, on each side (`tile_sample_min_height`, `_width`).
const TILES_PER_SIDE: usize = 2;
/// Shares of a tile's height and width that the next one covers again (`tile_overlap_factor_height`, `_width`).
const TILE_OVERLAPS: [f64; 2] = [1.0 / 6.0, 1.0 / 5.0];
/// Residual blocks in the middle of either half.
const MID_BLOCKS: usize = 2;

/// `config.json` of `AutoencoderKLCogVideoX`. Defaults are those of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct CogVideoXVaeConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    pub down_block_types: Vec<String>,
    pub up_block_types: Vec<String>,
    pub block_out_channels: Vec<usize>,
    pub latent_channels: usize,
    pub layers_per_block: usize,
    pub act_fn: String,
    pub norm_eps: f64,
    pub norm_num_groups: usize,
    pub temporal_compression_ratio: f64,
    pub sample_height: usize,
    pub sample_width: usize,
    pub scaling_factor: f64,
    pub use_quant_conv: bool,
    pub use_post_quant_conv: bool,
    pub invert_scale_latents: bool,
}

/// The only kinds of blocks that the class knows.
const DOWN_BLOCK: &str = "CogVideoXDownBlock3D";
const UP_BLOCK: &str = "CogVideoXUpBlock3D";

impl Default for CogVideoXVaeConfig {
    fn default() -> Self {
        Self {
            in_channels: CHANNELS,
            out_channels: CHANNELS,
            down_block_types: vec![DOWN_BLOCK.to_owned(); 4],
            up_block_types: vec![UP_BLOCK.to_owned(); 4],
            block_out_channels: vec![128, 256, 256, 512],
            latent_channels: 16,
            layers_per_block: 3,
            act_fn: "silu".to_owned(),
            norm_eps: 1e-6,
            norm_num_groups: 32,
            temporal_compression_ratio: 4.0,
            sample_height: 480,
            sample_width: 720,
            scaling_factor: 1.152_584_26,
            use_quant_conv: false,
            use_post_quant_conv: false,
            invert_scale_latents: false,
        }
    }
}

impl Bounded for CogVideoXVaeConfig {
    const BOUNDS: &'static [Bound] = &[
        Bound::size("in_channels", MAX_CHANNELS),
        Bound::size("out_channels", MAX_CHANNELS),
        Bound::list("down_block_types", MAX_LEVELS),
        Bound::list("up_block_types", MAX_LEVELS),
        Bound::size("block_out_channels", MAX_CHANNELS).entries(MAX_LEVELS),
        Bound::size("latent_channels", MAX_CHANNELS),
        Bound::size("layers_per_block", MAX_BLOCKS),
        Bound::eps("norm_eps"),
        Bound::size("norm_num_groups", MAX_CHANNELS),
        Bound::number("temporal_compression_ratio", 1.0, (1 << MAX_LEVELS) as f64),
        Bound::scale("scaling_factor"),
        Bound::size("sample_height", MAX_SIDE),
        Bound::size("sample_width", MAX_SIDE),
    ];
}

impl CogVideoXVaeConfig {
    /// Refuses what this VAE cannot do; `path` is the file, for the message.
    pub fn check(&self, path: &Path) -> Result<()> {
        let levels = self.block_out_channels.len();
        let are_all = |types: &[String], kind: &str| types.len() == levels && types.iter().all(|found| found == kind);
        let ratio = self.temporal_compression_ratio;
        let groups = self.norm_num_groups;
        let problem = if levels == 0 {
            "`block_out_channels` is empty".to_owned()
        } else if !are_all(&self.down_block_types, DOWN_BLOCK) {
            format!("`down_block_types` is {:?}; supported are {levels} of {DOWN_BLOCK:?}", self.down_block_types)
        } else if !are_all(&self.up_block_types, UP_BLOCK) {
            format!("`up_block_types` is {:?}; supported are {levels} of {UP_BLOCK:?}", self.up_block_types)
        } else if [self.in_channels, self.out_channels] != [CHANNELS; 2] {
            let (inner, out) = (self.in_channels, self.out_channels);
            format!("`in_channels` is {inner} and `out_channels` {out}; only {CHANNELS} is supported")
        } else if self.act_fn != "silu" && self.act_fn != "swish" {
            format!("`act_fn` is {:?}; only \"silu\" is supported", self.act_fn)
        } else if self.use_quant_conv || self.use_post_quant_conv {
            "`use_quant_conv`, `use_post_quant_conv`: only false is supported".to_owned()
        } else if ratio.fract() != 0.0 || !(ratio as usize).is_power_of_two() || self.temporal() != ratio as usize {
            format!("`temporal_compression_ratio` is {ratio}; with {levels} levels it is a power of two up to {}", {
                1 << (levels - 1)
            })
        } else if let Some(channels) = self.block_out_channels.iter().find(|channels| !channels.is_multiple_of(groups))
        {
            format!("`norm_num_groups` is {groups}, which does not divide {channels} of `block_out_channels`")
        } else {
            return Ok(());
        };
        Err(Error::checkpoint(path, problem))
    }

    /// Pixels on one side of what a latent value stands for.
    pub fn spatial(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    /// Frames that a latent frame stands for, but for the first.
    pub fn temporal(&self) -> usize {
        1 << self.temporal_levels().min(self.block_out_channels.len() - 1)
    }

    /// Levels that halve or double frames: the first ones of either half.
    fn temporal_levels(&self) -> usize {
        self.temporal_compression_ratio.log2() as usize
    }

    /// Chunks of a decode of so many latent frames.
    pub fn num_chunks(&self, latent_frames: usize) -> usize {
        (latent_frames / CHUNK).max(1)
    }

    /// Most latent frames of a chunk of so many, the first one: so many of them, and frames of them.
    fn longest_chunk(&self, latent_frames: usize) -> [usize; 2] {
        let latents = latent_frames.min(CHUNK + latent_frames % CHUNK);
        let doubled = |frames: usize| 2 * frames - frames % 2;
        let levels = self.temporal().ilog2();
        [latents, (0..levels).fold(latents, |frames, _| doubled(frames))]
    }

    /// When decoding works in tiles, which takes more than encoding, where a session meanwhile holds so many bytes for each
    /// pixel; `None` where `sample_height` and `sample_width` have no tiles whose overlaps are the same places in latents and
    /// pixels, where diffusers' results are of another size than the video.
    pub fn vae_tiling(&self, dtype: DType, held_bytes_per_pixel: usize) -> Option<VaeTiling> {
        if !self.has_tiles() {
            return None;
        }
        let bytes = self.peak_values(CHUNK + 1, 1, 1) * dtype.size_in_bytes();
        let bytes_per_pixel = bytes.div_ceil(self.spatial().pow(2)) + held_bytes_per_pixel;
        let [_, portion] = self.longest_chunk(CHUNK + 1);
        Some(VaeTiling::new(self.tile_sides().map(|side| side.pixels), bytes_per_pixel, portion))
    }

    /// Steps of a decode of so many latent frames of this height and width, in tiles or not.
    pub fn num_decode_steps(&self, latent_frames: usize, latents: (usize, usize), tiled: bool) -> usize {
        clip_tiles::num_steps(self.tiles(latents, tiled), latents, self.num_chunks(latent_frames))
    }

    /// Bytes that decoding so many latent frames of this height and width holds at its peak beside the latents, in tiles or
    /// not.
    pub fn peak_decode_bytes(&self, latent_frames: usize, latents: (usize, usize), tiled: bool, dtype: DType) -> usize {
        let bytes = |(height, width)| self.peak_values(latent_frames, height, width) * dtype.size_in_bytes();
        let Some(tiling) = self.tiles(latents, tiled) else { return bytes(latents) };
        let work = bytes(tiling.largest(latents.0, latents.1));
        clip_tiles::peak_bytes(&tiling, latents, self.spatial(), self.clip_frames(latent_frames), work)
    }

    /// Frames of which some pixels are there and others are not, at most, of so many latent frames of this height and width, in
    /// tiles or not.
    pub fn frames_under_way(&self, latent_frames: usize, latents: (usize, usize), tiled: bool) -> usize {
        clip_tiles::frames_under_way(self.tiles(latents, tiled), self.clip_frames(latent_frames))
    }

    /// Frames of so many latent frames, and the most of one chunk.
    fn clip_frames(&self, latent_frames: usize) -> [usize; 2] {
        let [_, of_chunk] = self.longest_chunk(latent_frames);
        [(latent_frames - 1) * self.temporal() + 1, of_chunk]
    }

    /// Bytes that the first preview of a model needs at its peak.
    pub fn preview_bytes(&self, dtype: DType) -> usize {
        let [frames, height, width] = ClipRgb::FIT_SIZES;
        ClipRgb::fit_bytes(self.latent_channels, self.spatial(), self.temporal())
            + self.peak_decode_bytes(frames, (height, width), false, dtype)
    }

    /// Channels of the decoder's levels, from the latents' size to the pixels'.
    fn decoder_channels(&self) -> impl Iterator<Item = usize> {
        self.block_out_channels.iter().rev().copied()
    }

    /// How level `level` of either half ends: `None` at the last one, else whether frames are halved or doubled with the
    /// size.
    fn resampling(&self, level: usize) -> Option<bool> {
        (level + 1 < self.block_out_channels.len()).then_some(level < self.temporal_levels())
    }

    /// Most values of the compute dtype that decoding so many latent frames of this height and width holds at a time.
    pub fn peak_values(&self, latent_frames: usize, height: usize, width: usize) -> usize {
        let (latent_pixels, latent) = (height * width, self.latent_channels);
        let [mut frames, _] = self.longest_chunk(latent_frames);
        let (latent_chunk, mut pixels) = (frames * latent_pixels, latent_pixels);
        let mut in_channels = self.block_out_channels[self.block_out_channels.len() - 1];
        // What convolutions remember: of the first one and of those in the middle.
        let mut remembered = HISTORY * pixels * (latent + 2 * MID_BLOCKS * in_channels);
        let mut working = 0;
        for (level, channels) in self.decoder_channels().enumerate() {
            remembered += HISTORY * pixels * (in_channels + (2 * self.layers_per_block + 1) * channels);
            // A block's input, the first convolution's answer, its norm and the second one's answer, or instead of the
            // norm the shortcut and the sum; what a norm is told, at the latents' size; what a convolution remembers of this
            // chunk and still of the last one.
            let widest = in_channels.max(channels);
            working = working.max(widest * (4 * pixels * frames + 2 * latent_chunk + HISTORY * pixels));
            if let Some(in_time) = self.resampling(level) {
                // The input and the answer, four times as large, and that with doubled frames.
                let doubled = if in_time { 2 * frames - frames % 2 } else { frames };
                working = working.max(channels * pixels * (frames + 4 * frames + 4 * usize::from(in_time) * doubled));
                frames = doubled;
                pixels *= 4;
            }
            in_channels = channels;
        }
        // The last norm and the pixels, which become f32 and change places.
        working = working.max(pixels * frames * (2 * in_channels + 6 * CHANNELS));
        remembered + HISTORY * pixels * in_channels + working
    }
}

impl InTiles for CogVideoXVaeConfig {
    fn tile_sides(&self) -> [TileSide; 2] {
        let sides = [self.sample_height, self.sample_width].map(|side| side / TILES_PER_SIDE);
        [0, 1].map(|axis| TileSide {
            pixels: sides[axis],
            latents: sides[axis] / self.spatial(),
            overlap: TILE_OVERLAPS[axis],
        })
    }
}

/// The decoder half of `AutoencoderKLCogVideoX`.
pub struct CogVideoXVaeDecoder {
    compute_dtype: DType,
    scaling_factor: f64,
    conv_in: CausalConv3d,
    mid_block: Vec<ResnetBlock<LatentNorm>>,
    up_blocks: Vec<UpBlock>,
    norm_out: LatentNorm,
    conv_out: CausalConv3d,
    config: CogVideoXVaeConfig,
    rgb: ClipRgb,
}

/// A decode between two steps. Dropping it frees all that it remembers.
pub type CogVideoXDecoding = ClipDecoding<ChunksDecoding>;

/// A decode of frames, whole ones or those of a tile.
pub struct ChunksDecoding {
    /// Without the model's scale, f32 `[1, latent_channels, f, h, w]`.
    latents: Tensor,
    /// Latent frame that comes next.
    next: usize,
    past: Past,
}

impl CogVideoXVaeDecoder {
    /// Tensors `decoder.*`; `encoder.*` stay on disk.
    pub fn load(weights: &Weights, config: &CogVideoXVaeConfig) -> Result<Self> {
        weights.ignore_below("encoder");
        let decoder = weights.pp("decoder");
        let channels: Vec<usize> = config.decoder_channels().collect();
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let norm = |weights: &Weights, channels: usize| LatentNorm::load(weights, channels, config);
        let mut up_blocks = Vec::with_capacity(channels.len());
        let mut in_channels = first;
        for (level, channels) in channels.iter().copied().enumerate() {
            let weights = decoder.pp("up_blocks").pp(level);
            let resnets = &weights.pp("resnets");
            up_blocks.push(UpBlock {
                resnets: load_resnets(resnets, config.layers_per_block + 1, [in_channels, channels], norm)?,
                upsampler: match config.resampling(level) {
                    Some(in_time) => Some(Upsampler::load(&weights.pp("upsamplers").pp(0), channels, in_time)?),
                    None => None,
                },
            });
            in_channels = channels;
        }
        Ok(Self {
            compute_dtype: weights.placement().compute_dtype,
            scaling_factor: config.scaling_factor,
            conv_in: causal(&decoder.pp("conv_in"), config.latent_channels, first)?,
            mid_block: load_resnets(&decoder.pp("mid_block").pp("resnets"), MID_BLOCKS, [first; 2], norm)?,
            up_blocks,
            norm_out: LatentNorm::load(&decoder.pp("norm_out"), last, config)?,
            conv_out: causal(&decoder.pp("conv_out"), last, config.out_channels)?,
            config: config.clone(),
            rgb: ClipRgb::default(),
        })
    }

    /// Begins to decode the final f32 latents of one clip, `[1, latent_channels, f, h, w]`, in tiles if asked and if there is more
    /// than one.
    pub fn begin(&self, latents: &Tensor, tiled: bool) -> Result<CogVideoXDecoding> {
        let (_, _, frames, height, width) = latents.dims5()?;
        let tiles = self.config.tiles((height, width), tiled);
        ClipDecoding::begin(self, latents, tiles, self.config.num_chunks(frames))
    }

    /// A rough picture of the middle of f32 `latents [1, latent_channels, f, h, w]`, one value for each position. The first one
    /// decodes a few random latents to learn their colours.
    pub fn preview(&self, latents: &Tensor) -> Result<RoughPicture> {
        self.rgb.preview(latents, |latents| {
            let mut decoding = self.begin_clip(latents)?;
            let chunks = (0..self.config.num_chunks(latents.dim(2)?)).map(|_| self.next_portion(&mut decoding));
            Ok(Tensor::cat(&chunks.collect::<Result<Vec<_>>>()?, 0)?)
        })
    }
}

/// A portion is a chunk.
impl ClipDecoder for CogVideoXVaeDecoder {
    type Decoding = ChunksDecoding;

    fn begin_clip(&self, latents: &Tensor) -> Result<ChunksDecoding> {
        let latents = (latents * (1.0 / self.scaling_factor))?;
        Ok(ChunksDecoding { latents, next: 0, past: Past::of_chunks() })
    }

    fn next_portion(&self, decoding: &mut ChunksDecoding) -> Result<Tensor> {
        let ChunksDecoding { latents, next, past } = decoding;
        let frames = latents.dim(2)?;
        let len = if *next == 0 { frames.min(CHUNK + frames % CHUNK) } else { CHUNK };
        let z = latents.narrow(2, *next, len)?.to_dtype(self.compute_dtype)?.contiguous()?;
        *next += len;
        let mut x = past.convolve(&self.conv_in, &z)?;
        for resnet in &self.mid_block {
            x = resnet.forward(x, &z, past)?;
        }
        for block in &self.up_blocks {
            x = block.forward(x, &z, past)?;
        }
        x = self.norm_out.activated(&x, &z)?;
        x = past.convolve(&self.conv_out, &x)?; // [1, 3, frames, H, W]
        past.end_chunk();
        Ok(x.to_dtype(DType::F32)?.squeeze(0)?.transpose(0, 1)?.contiguous()?)
    }
}

/// A causal convolution of three frames, rows and columns. Source: `CogVideoXCausalConv3d`.
fn causal(weights: &Weights, in_channels: usize, out_channels: usize) -> Result<CausalConv3d> {
    CausalConv3d::load(&weights.pp("conv"), in_channels, out_channels, [3; 3], CausalPadding::FirstFrame)
}

/// A norm with SiLU after it.
trait ActivatedNorm {
    /// What it is told beside its input.
    type Told: ?Sized;

    /// `[1, channels, t, h, w]` to the same shape.
    fn activated(&self, x: &Tensor, told: &Self::Told) -> Result<Tensor>;
}

/// Group norm with a factor and a term of each value, which the latents give. Source: `CogVideoXSpatialNorm3D`.
struct LatentNorm {
    num_groups: usize,
    weight: Tensor,
    bias: Tensor,
    conv_y: Conv3d,
    conv_b: Conv3d,
}

impl LatentNorm {
    fn load(weights: &Weights, channels: usize, config: &CogVideoXVaeConfig) -> Result<Self> {
        let norm = weights.pp("norm_layer");
        let conv = |name: &str| Conv3d::load(&weights.pp(name).pp("conv"), config.latent_channels, channels, [1; 3], 0);
        Ok(Self {
            num_groups: config.norm_num_groups,
            weight: norm.get(&[channels], "weight")?,
            bias: norm.get(&[channels], "bias")?,
            conv_y: conv("conv_y")?,
            conv_b: conv("conv_b")?,
        })
    }
}

impl ActivatedNorm for LatentNorm {
    /// The latents of the chunk, `[1, latent_channels, t', h', w']`.
    type Told = Tensor;

    fn activated(&self, x: &Tensor, z: &Tensor) -> Result<Tensor> {
        let Self { num_groups, weight, bias, conv_y, conv_b } = self;
        let (factor, term) = (&conv_y.forward(z)?, &conv_b.forward(z)?);
        let norm = SpatialNorm { num_groups: *num_groups, weight, bias, eps: NORM_EPS, factor, term };
        Ok(spatial_norm_silu(x, &norm)?)
    }
}

/// Source: `CogVideoXResnetBlock3D`.
struct ResnetBlock<N> {
    norm1: N,
    conv1: CausalConv3d,
    norm2: N,
    conv2: CausalConv3d,
    conv_shortcut: Option<Conv3d>,
}

/// So many blocks one after the other, `[in, out]` channels in all.
fn load_resnets<N: ActivatedNorm>(
    weights: &Weights,
    count: usize,
    [mut in_channels, out_channels]: [usize; 2],
    norm: impl Fn(&Weights, usize) -> Result<N>,
) -> Result<Vec<ResnetBlock<N>>> {
    let mut resnets = Vec::with_capacity(count);
    for i in 0..count {
        let weights = weights.pp(i);
        let shortcut = || Conv3d::load(&weights.pp("conv_shortcut"), in_channels, out_channels, [1; 3], 0);
        resnets.push(ResnetBlock {
            norm1: norm(&weights.pp("norm1"), in_channels)?,
            conv1: causal(&weights.pp("conv1"), in_channels, out_channels)?,
            norm2: norm(&weights.pp("norm2"), out_channels)?,
            conv2: causal(&weights.pp("conv2"), out_channels, out_channels)?,
            conv_shortcut: (in_channels != out_channels).then(shortcut).transpose()?,
        });
        in_channels = out_channels;
    }
    Ok(resnets)
}

impl<N: ActivatedNorm> ResnetBlock<N> {
    fn forward(&self, x: Tensor, told: &N::Told, past: &mut Past) -> Result<Tensor> {
        // One name, so that each is freed when the next is there.
        let mut y = self.norm1.activated(&x, told)?;
        y = past.convolve(&self.conv1, &y)?;
        y = self.norm2.activated(&y, told)?;
        y = past.convolve(&self.conv2, &y)?;
        let shortcut = match &self.conv_shortcut {
            Some(conv) => conv.forward(&x)?,
            None => x,
        };
        Ok((shortcut + y)?)
    }
}

struct UpBlock {
    resnets: Vec<ResnetBlock<LatentNorm>>,
    upsampler: Option<Upsampler>,
}

impl UpBlock {
    fn forward(&self, mut x: Tensor, z: &Tensor, past: &mut Past) -> Result<Tensor> {
        for resnet in &self.resnets {
            x = resnet.forward(x, z, past)?;
        }
        match &self.upsampler {
            Some(upsampler) => upsampler.forward(&x),
            None => Ok(x),
        }
    }
}

/// Doubles height and width, and frames where `in_time`. Source: `CogVideoXUpsample3D`, whose convolution is of single
/// frames: what it makes of a repeated frame is here repeated after it.
struct Upsampler {
    conv: Conv2d,
    in_time: bool,
}

impl Upsampler {
    fn load(weights: &Weights, channels: usize, in_time: bool) -> Result<Self> {
        Ok(Self { conv: Conv2d::load(&weights.pp("conv"), channels, channels, 3, 1)?.upsampling(), in_time })
    }

    /// `[1, c, t, h, w]` to `[1, c, t', 2h, 2w]`; of an odd number of frames the first stays one.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.conv.forward_frames(x)?;
        let frames = x.dim(2)?;
        if !self.in_time || frames == 1 {
            return Ok(x);
        }
        let twice = (frames % 2..frames).flat_map(|frame| [frame as u32; 2]);
        let indices: Vec<u32> = (0..(frames % 2) as u32).chain(twice).collect();
        Ok(x.index_select(&Tensor::new(indices, x.device())?, 2)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_and_tiles_are_those_of_the_reference() {
        let config = CogVideoXVaeConfig::default();
        // 49 frames: nine, then eight at a time; 161 of latents that fill patches; pictures.
        assert_eq!([13, 41, 4, 1].map(|latents| config.longest_chunk(latents)), [[3, 9], [3, 9], [2, 8], [1, 1]]);
        assert_eq!([13, 41, 4, 1].map(|latents| config.num_chunks(latents)), [6, 20, 2, 1]);
        assert_eq!(config.num_decode_steps(13, (60, 90), false), 6);
        assert_eq!(config.num_decode_steps(13, (60, 90), true), 6 * 3 * 3);
        assert_eq!(config.num_decode_steps(13, (30, 45), true), 6);
        let tiling = config.vae_tiling(DType::BF16, 0).expect("fits");
        assert_eq!(tiling.tile, [240, 360]);
        // A fifth of 32 pixels and of eight latents are other places.
        let odd = CogVideoXVaeConfig { sample_height: 96, sample_width: 128, ..config };
        assert_eq!(odd.vae_tiling(DType::BF16, 0), None);
        assert_eq!(odd.num_decode_steps(13, (60, 90), true), 6);
    }
}
