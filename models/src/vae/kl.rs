//! `AutoencoderKL`: the decoder, from latents of a picture to its pixels, and what the [`encoder`] shares with it.
//!
//! Owns: the configuration, the decoder, the latents' scale. Does not know: packing, samplers, bytes.
//! Source: diffusers `models/autoencoders/{autoencoder_kl,vae}.py`, `models/unets/unet_2d_blocks.py`.

use std::path::Path;
use std::sync::OnceLock;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Deserializer};
use tale_kernels::{AttentionOptions, attention};

use crate::config::bounds::{MAX_BLOCKS, MAX_CHANNELS, MAX_LEVELS, MAX_SCALE, MAX_SIDE};
use crate::config::{Bound, Bounded};
use crate::diffusion::tiling::VaeTiling;
use crate::error::{Error, Result};
use crate::layers::{Conv2d, GroupNorm, Linear};
use crate::vae::preview::{FIT_SIDE, LatentRgb, RoughPicture};
use crate::vae::tiling::{InTiles, Seams, TileSide};
use crate::vae::{Pixels, load_projection};
use crate::weights::Weights;

pub mod encoder;

pub use encoder::KlEncoder;

/// Of every group norm; the class does not configure it.
const NORM_EPS: f64 = 1e-6;

/// `config.json` of an `AutoencoderKL`. Defaults are those of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct KlConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    pub latent_channels: usize,
    pub block_out_channels: Vec<usize>,
    pub down_block_types: Vec<String>,
    pub up_block_types: Vec<String>,
    pub layers_per_block: usize,
    pub norm_num_groups: usize,
    pub act_fn: String,
    /// Pixels on each side of the pictures that it was made for, and of a tile; of a list the first, as in diffusers.
    #[serde(deserialize_with = "one_or_first")]
    pub sample_size: usize,
    pub scaling_factor: f64,
    pub shift_factor: Option<f64>,
    /// Of each channel of the latents; with `latents_std` in place of `shift_factor`.
    pub latents_mean: Option<Vec<f64>>,
    pub latents_std: Option<Vec<f64>>,
    /// Whether activations exceed what f16 holds.
    pub force_upcast: bool,
    pub use_quant_conv: bool,
    pub use_post_quant_conv: bool,
    pub mid_block_add_attention: bool,
}

impl Default for KlConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            latent_channels: 4,
            block_out_channels: vec![64],
            down_block_types: vec![DOWN_BLOCK.to_owned()],
            up_block_types: vec![UP_BLOCK.to_owned()],
            layers_per_block: 1,
            norm_num_groups: 32,
            act_fn: "silu".to_owned(),
            sample_size: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            latents_mean: None,
            latents_std: None,
            force_upcast: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

fn one_or_first<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Sides {
        One(usize),
        Each(Vec<usize>),
    }
    match Sides::deserialize(deserializer)? {
        Sides::One(side) => Ok(side),
        Sides::Each(sides) => {
            sides.first().copied().ok_or_else(|| serde::de::Error::custom("`sample_size` is an empty list"))
        }
    }
}

/// Two names of one function.
const SILU: [&str; 2] = ["silu", "swish"];
const DOWN_BLOCK: &str = "DownEncoderBlock2D";
const UP_BLOCK: &str = "UpDecoderBlock2D";

impl Bounded for KlConfig {
    const BOUNDS: &'static [Bound] = &[
        Bound::size("in_channels", MAX_CHANNELS),
        Bound::size("out_channels", MAX_CHANNELS),
        Bound::size("latent_channels", MAX_CHANNELS),
        Bound::size("block_out_channels", MAX_CHANNELS).entries(MAX_LEVELS),
        Bound::list("down_block_types", MAX_LEVELS),
        Bound::list("up_block_types", MAX_LEVELS),
        Bound::size("layers_per_block", MAX_BLOCKS),
        Bound::size("norm_num_groups", MAX_CHANNELS),
        Bound::size("sample_size", MAX_SIDE),
        Bound::scale("scaling_factor"),
        Bound::number("shift_factor", -MAX_SCALE, MAX_SCALE),
        Bound::number("latents_mean", -MAX_SCALE, MAX_SCALE).entries(MAX_CHANNELS as usize),
        Bound::scale("latents_std").entries(MAX_CHANNELS as usize),
    ];
}

impl KlConfig {
    /// Refuses what is not computed here. `path` is named in the error.
    pub fn check(&self, path: &Path) -> Result<()> {
        let refuse = |problem: String| Err(Error::checkpoint(path, problem));
        if !SILU.contains(&self.act_fn.as_str()) {
            return refuse(format!("act_fn `{}` is not supported; supported: {}", self.act_fn, SILU.join(", ")));
        }
        for (field, blocks, known) in
            [("down", &self.down_block_types, DOWN_BLOCK), ("up", &self.up_block_types, UP_BLOCK)]
        {
            if let Some(other) = blocks.iter().find(|block| *block != known) {
                return refuse(format!("{field} block `{other}` is not supported; supported: {known}"));
            }
            if blocks.len() != self.block_out_channels.len() {
                return refuse(format!("{field}_block_types needs one entry per level of block_out_channels"));
            }
        }
        if self.block_out_channels.is_empty() {
            return refuse(format!("block_out_channels needs 1 to {MAX_LEVELS} levels"));
        }
        let groups = self.norm_num_groups;
        if self.block_out_channels.iter().any(|channels| !channels.is_multiple_of(groups)) {
            return refuse(format!("block_out_channels must be multiples of norm_num_groups ({groups})"));
        }
        for (field, values) in [("latents_mean", &self.latents_mean), ("latents_std", &self.latents_std)] {
            if values.as_ref().is_some_and(|values| values.len() != self.latent_channels) {
                return refuse(format!("`{field}` needs one value per latent channel ({})", self.latent_channels));
            }
        }
        for (field, channels) in [("in_channels", self.in_channels), ("out_channels", self.out_channels)] {
            if channels != 3 {
                return refuse(format!("{field} is {channels}; supported: 3"));
            }
        }
        Ok(())
    }

    /// Pixels per latent on each side.
    pub fn vae_scale_factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    /// The dtype in which the VAE computes where its neighbours compute in `dtype`: the published VAE of SDXL makes
    /// black pictures in f16 (diffusers takes it to f32 too, and issue 4325 there says why).
    pub fn own_dtype(&self, dtype: DType) -> DType {
        if self.force_upcast && dtype == DType::F16 { DType::F32 } else { dtype }
    }

    /// Bytes that encoding a picture of this height and width needs at its peak, in tiles or not, where its neighbours
    /// compute in `dtype`.
    pub fn peak_encode_bytes(&self, (height, width): (usize, usize), tiled: bool, dtype: DType) -> usize {
        let Some(tiling) = self.picture_tiles((height, width), tiled) else {
            return self.encode_bytes(height * width, dtype);
        };
        let (tile_height, tile_width) = tiling.largest(height, width);
        // Beside the tile: the moments kept so far, and once more when they are joined.
        let moments = 2 * self.latent_channels * size_of::<f32>();
        let latents = height * width / self.vae_scale_factor().pow(2);
        self.encode_bytes(tile_height * tile_width, dtype) + 2 * latents * moments
    }

    /// Bytes that encoding one picture of `pixels` needs where its neighbours compute in `dtype`, at its peak: as of
    /// decoding, since the levels are the same, but for a block's first half, which has the channels of the level before.
    fn encode_bytes(&self, pixels: usize, dtype: DType) -> usize {
        let widest =
            self.block_out_channels.iter().enumerate().map(|(level, channels)| (pixels >> (2 * level)) * channels);
        LIVE_COPIES * widest.max().unwrap_or(0) * self.own_dtype(dtype).size_in_bytes()
    }

    /// When the VAE works in tiles, where neighbours compute in `dtype` and a session meanwhile holds its latents at most so
    /// many times. Decoding says it, which takes more than encoding.
    pub fn vae_tiling(&self, dtype: DType, latent_copies: usize) -> Option<VaeTiling> {
        if !self.has_tiles() {
            return None;
        }
        // Whole squares of latents, so that no level is rounded.
        let square = self.vae_scale_factor().pow(2);
        let held = latent_copies * self.latent_channels * size_of::<f32>();
        let bytes_per_pixel = (self.decode_bytes(square, dtype) + held).div_ceil(square);
        Some(VaeTiling::new([self.sample_size; 2], bytes_per_pixel, 1))
    }

    /// Calls of [`KlDecoder::decode_next`] for latents of this height and width, in tiles or not.
    pub fn num_decode_steps(&self, latents: (usize, usize), tiled: bool) -> usize {
        self.tiles(latents, tiled).map_or(1, |tiling| tiling.count(latents.0, latents.1))
    }

    /// Bytes that decoding latents of this height and width needs at its peak, in tiles or not, where its neighbours
    /// compute in `dtype`.
    pub fn peak_decode_bytes(&self, latents: (usize, usize), tiled: bool, dtype: DType) -> usize {
        let square = self.vae_scale_factor().pow(2);
        let Some(tiling) = self.tiles(latents, tiled) else {
            return self.decode_bytes(latents.0 * latents.1 * square, dtype);
        };
        let (height, width) = tiling.largest(latents.0, latents.1);
        let pixels = self.out_channels * size_of::<f32>();
        // Beside the tile: its pixels while they are blended, and the edges of others.
        self.decode_bytes(height * width * square, dtype)
            + TILE_COPIES * height * width * square * pixels
            + tiling.edge_places(latents.1, self.vae_scale_factor()) * pixels
    }

    /// Bytes that the first preview of a model needs at its peak.
    pub fn preview_bytes(&self, dtype: DType) -> usize {
        self.peak_decode_bytes((FIT_SIDE, FIT_SIDE), false, dtype)
    }

    /// Bytes that decoding one picture of `pixels` as a whole needs where its neighbours compute in `dtype`, at its peak:
    /// in the widest level, the input of a block and its normed and convolved copies.
    fn decode_bytes(&self, pixels: usize, dtype: DType) -> usize {
        let mut widest = 0;
        let mut previous = self.block_out_channels.last().copied().unwrap_or(0);
        for (level, channels) in self.block_out_channels.iter().rev().enumerate() {
            let shrink = self.vae_scale_factor() >> level;
            // A level's first block still has the channels of the level before.
            widest = widest.max(pixels / (shrink * shrink) * previous.max(*channels));
            previous = *channels;
        }
        LIVE_COPIES * widest * self.own_dtype(dtype).size_in_bytes()
    }
}

impl InTiles for KlConfig {
    fn tile_sides(&self) -> [TileSide; 2] {
        [TileSide::quartered(self.sample_size, self.vae_scale_factor()); 2]
    }
}

/// Tensors of the widest level that are alive at once: residual, first convolution, its norm, second convolution. The
/// convolutions take no memory beyond 1.5 MB per thread on the CPU, and none on a GPU.
const LIVE_COPIES: usize = 4;
/// Copies of a tile's pixels that are alive while it is blended: it, its seam or edges, and what they make of it.
const TILE_COPIES: usize = 3;

/// Latents to pixels.
#[derive(Debug, Clone)]
pub struct KlDecoder {
    scale: LatentScale,
    compute_dtype: DType,
    post_quant_conv: Option<Conv2d>,
    conv_in: Conv2d,
    mid_resnets: [Resnet; 2],
    mid_attention: Option<Attention>,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    config: KlConfig,
    /// Fitted when the first preview is asked for.
    latent_rgb: OnceLock<LatentRgb>,
}

impl KlDecoder {
    /// Tensors `decoder.*` and `post_quant_conv.*`.
    pub fn load(weights: &Weights, config: &KlConfig) -> Result<Self> {
        let weights = &weights.computing_in(config.own_dtype(weights.placement().compute_dtype));
        let decoder = weights.pp("decoder");
        let groups = config.norm_num_groups;
        let latent = config.latent_channels;
        let (first, last) =
            (config.block_out_channels[0], config.block_out_channels[config.block_out_channels.len() - 1]);
        let mid = decoder.pp("mid_block");
        let post_quant_conv = match config.use_post_quant_conv {
            true => Some(Conv2d::load(&weights.pp("post_quant_conv"), latent, latent, 1, 0)?),
            false => None,
        };
        let mid_attention = match config.mid_block_add_attention {
            true => Some(Attention::load(&mid.pp("attentions").pp(0), last, groups)?),
            false => None,
        };
        let mid_resnet = |i: usize| Resnet::load(&mid.pp("resnets").pp(i), last, last, groups);
        Ok(Self {
            scale: LatentScale::new(config, weights)?,
            compute_dtype: weights.placement().compute_dtype,
            post_quant_conv,
            conv_in: Conv2d::load(&decoder.pp("conv_in"), latent, last, 3, 1)?,
            mid_resnets: [mid_resnet(0)?, mid_resnet(1)?],
            mid_attention,
            up_blocks: load_up_blocks(&decoder.pp("up_blocks"), config)?,
            conv_norm_out: GroupNorm::load(&decoder.pp("conv_norm_out"), groups, first, NORM_EPS)?,
            conv_out: Conv2d::load(&decoder.pp("conv_out"), first, config.out_channels, 3, 1)?,
            config: config.clone(),
            latent_rgb: OnceLock::new(),
        })
    }

    /// Begins to decode scaled f32 `latents [1, latent_channels, h, w]`, in tiles if asked and if there is more than one.
    pub fn begin(&self, latents: &Tensor, tiled: bool) -> Result<KlDecoding> {
        let (_, _, height, width) = latents.dims4()?;
        let tiles = self.config.tiles((height, width), tiled);
        Ok(KlDecoding { latents: latents.clone(), tiles: tiles.map(|tiling| Seams::new(tiling, height, width)) })
    }

    /// The whole picture, or what the next tile gives of it.
    pub fn decode_next(&self, decoding: &mut KlDecoding) -> Result<Pixels> {
        let KlDecoding { latents, tiles } = decoding;
        let Some(tiles) = tiles else { return Pixels::of_whole_frames(self.decode(latents)?, 0) };
        let window = tiles.next_window();
        let tile = latents.narrow(2, window.top, window.height)?.narrow(3, window.left, window.width)?;
        Ok(Pixels::of_part(tiles.blend(self.decode(&tile.contiguous()?)?)?, 0))
    }

    /// A rough picture of scaled f32 `latents [1, latent_channels, h, w]`, one value for each latent position. The first one
    /// decodes a few random latents to learn their colours.
    pub fn preview(&self, latents: &Tensor) -> Result<RoughPicture> {
        let latent_rgb = match self.latent_rgb.get() {
            Some(fitted) => fitted,
            None => {
                let samples = LatentRgb::samples(self.config.latent_channels, latents.device())?;
                let fitted = LatentRgb::fit(&samples, &self.decode(&samples)?)?;
                self.latent_rgb.get_or_init(|| fitted)
            }
        };
        latent_rgb.colours(latents)
    }

    /// Scaled f32 `latents [b, latent_channels, h, w]` (as a solver leaves them) to f32 pixels `[b, 3, H, W]` in about
    /// -1..=1, where `H` is `h` times the VAE's scale factor.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let mut x = self.scale.undo(latents)?.to_dtype(self.compute_dtype)?;
        if let Some(conv) = &self.post_quant_conv {
            x = conv.forward(&x)?;
        }
        x = self.mid_resnets[0].forward(&self.conv_in.forward(&x)?)?;
        if let Some(attention) = &self.mid_attention {
            x = attention.forward(&x)?;
        }
        x = self.mid_resnets[1].forward(&x)?;
        for block in &self.up_blocks {
            x = block.forward(x)?;
        }
        Ok(self.conv_out.forward(&self.conv_norm_out.activated(&x)?)?.to_dtype(DType::F32)?)
    }
}

/// A picture between two steps of its decoding.
#[derive(Debug)]
pub struct KlDecoding {
    latents: Tensor,
    /// Absent where the picture is decoded as a whole.
    tiles: Option<Seams>,
}

/// How the latents of the network differ from those of the VAE.
#[derive(Debug, Clone)]
enum LatentScale {
    /// `(latents - shift) * factor`.
    Shifted { factor: f64, shift: f64 },
    /// `(latents - mean) / std * factor`, with mean and deviation `[1, channels, 1, 1]` of each channel.
    Normed { factor: f64, mean: Tensor, std: Tensor },
}

impl LatentScale {
    fn new(config: &KlConfig, weights: &Weights) -> Result<Self> {
        let factor = config.scaling_factor;
        let (Some(mean), Some(std)) = (&config.latents_mean, &config.latents_std) else {
            return Ok(Self::Shifted { factor, shift: config.shift_factor.unwrap_or(0.0) });
        };
        let device = &weights.placement().device;
        let channels = |values: &[f64]| {
            let values: Vec<f32> = values.iter().map(|value| *value as f32).collect();
            Tensor::from_vec(values, (1, config.latent_channels, 1, 1), device)
        };
        Ok(Self::Normed { factor, mean: channels(mean)?, std: channels(std)? })
    }

    /// Latents of the VAE to those of the network.
    fn apply(&self, latents: &Tensor) -> Result<Tensor> {
        match self {
            Self::Shifted { factor, shift } => Ok(((latents - *shift)? * *factor)?),
            Self::Normed { factor, mean, std } => Ok((latents.broadcast_sub(mean)? * *factor)?.broadcast_div(std)?),
        }
    }

    /// Latents of the network to those of the VAE.
    fn undo(&self, latents: &Tensor) -> Result<Tensor> {
        match self {
            Self::Shifted { factor, shift } => Ok(latents.affine(1.0 / factor, *shift)?),
            Self::Normed { factor, mean, std } => Ok((latents.broadcast_mul(std)? / *factor)?.broadcast_add(mean)?),
        }
    }
}

/// One level: residual blocks, then twice the size (but for the last).
#[derive(Debug, Clone)]
struct UpBlock {
    resnets: Vec<Resnet>,
    upsampler: Option<Conv2d>,
}

/// Levels from the smallest, which has the last entry of `block_out_channels`.
fn load_up_blocks(weights: &Weights, config: &KlConfig) -> Result<Vec<UpBlock>> {
    let levels = config.block_out_channels.len();
    let mut previous = config.block_out_channels[levels - 1];
    let mut blocks = Vec::with_capacity(levels);
    for (level, channels) in config.block_out_channels.iter().copied().rev().enumerate() {
        let weights = weights.pp(level);
        let mut resnets = Vec::with_capacity(config.layers_per_block + 1);
        for i in 0..=config.layers_per_block {
            let in_channels = if i == 0 { previous } else { channels };
            resnets.push(Resnet::load(&weights.pp("resnets").pp(i), in_channels, channels, config.norm_num_groups)?);
        }
        let upsampler = match level + 1 < levels {
            true => {
                Some(Conv2d::load(&weights.pp("upsamplers").pp(0).pp("conv"), channels, channels, 3, 1)?.upsampling())
            }
            false => None,
        };
        blocks.push(UpBlock { resnets, upsampler });
        previous = channels;
    }
    Ok(blocks)
}

impl UpBlock {
    fn forward(&self, mut x: Tensor) -> Result<Tensor> {
        for resnet in &self.resnets {
            x = resnet.forward(&x)?;
        }
        match &self.upsampler {
            Some(conv) => conv.forward(&x),
            None => Ok(x),
        }
    }
}

#[derive(Debug, Clone)]
struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl Resnet {
    fn load(weights: &Weights, in_channels: usize, out_channels: usize, groups: usize) -> Result<Self> {
        let conv_shortcut = match in_channels == out_channels {
            true => None,
            false => Some(Conv2d::load(&weights.pp("conv_shortcut"), in_channels, out_channels, 1, 0)?),
        };
        Ok(Self {
            norm1: GroupNorm::load(&weights.pp("norm1"), groups, in_channels, NORM_EPS)?,
            conv1: Conv2d::load(&weights.pp("conv1"), in_channels, out_channels, 3, 1)?,
            norm2: GroupNorm::load(&weights.pp("norm2"), groups, out_channels, NORM_EPS)?,
            conv2: Conv2d::load(&weights.pp("conv2"), out_channels, out_channels, 3, 1)?,
            conv_shortcut,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.conv1.forward(&self.norm1.activated(x)?)?;
        let y = self.conv2.forward(&self.norm2.activated(&y)?)?;
        match &self.conv_shortcut {
            Some(conv) => Ok((conv.forward(x)? + y)?),
            None => Ok((x + y)?),
        }
    }
}

/// Every position attends to every other one, in one head.
#[derive(Debug, Clone)]
struct Attention {
    group_norm: GroupNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
}

impl Attention {
    /// Names of today (`to_q`, `to_k`, `to_v`, `to_out.0`) or of old checkpoints (`query`, `key`, `value`,
    /// `proj_attn`).
    fn load(weights: &Weights, channels: usize, groups: usize) -> Result<Self> {
        let old = weights.contains("query.weight");
        let projection = |new_name: &str, old_name: &str| {
            load_projection(&weights.pp(if old { old_name } else { new_name }), channels)
        };
        Ok(Self {
            group_norm: GroupNorm::load(&weights.pp("group_norm"), groups, channels, NORM_EPS)?,
            q: projection("to_q", "query")?,
            k: projection("to_k", "key")?,
            v: projection("to_v", "value")?,
            out: projection("to_out.0", "proj_attn")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let tokens = self.group_norm.forward(x)?.reshape((b, c, h * w))?.transpose(1, 2)?.contiguous()?; // [b, hw, c]
        let one_head = |x: Tensor| x.reshape((b, h * w, 1, c));
        let (q, k, v) = (self.q.forward(&tokens)?, self.k.forward(&tokens)?, self.v.forward(&tokens)?);
        let y = attention(&one_head(q)?, &one_head(k)?, &one_head(v)?, &AttentionOptions::default())?;
        let y = self.out.forward(&y.reshape((b, h * w, c))?)?;
        Ok((x + y.transpose(1, 2)?.reshape((b, c, h, w))?)?)
    }
}
