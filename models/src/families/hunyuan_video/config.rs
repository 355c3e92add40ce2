//! `transformer/config.json` of HunyuanVideo: what it says, and what of it is computed.
//!
//! Owns: sizes and switches of the transformer, with the defaults of diffusers. Does not know: the network, the pipeline.
//! Source: diffusers `models/transformers/transformer_hunyuan_video.py`, `HunyuanVideoTransformer3DModel`.

use std::path::Path;

use candle_core::DType;
use serde::Deserialize;

use crate::config::bounds::{MAX_CHANNELS, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_PATCH, MAX_WIDTH, check_product};
use crate::config::{Bound, Bounded};
use crate::error::{Error, Result};
use crate::layers::packed_values;

/// Width of a feed-forward network over that of the stream. Published is 4.
const MAX_MLP_RATIO: f64 = 64.0;
/// Base of the rotary frequencies. Published is 256.
const MAX_THETA: f64 = 1e9;
/// The only value of `qk_norm` that is computed.
const QK_NORM: &str = "rms_norm";
/// Width of the sinusoids of timestep and guidance; the class does not configure it.
pub(super) const TIME_CHANNELS: usize = 256;
/// Feed-forward width of a refiner's block over that of the stream; the class does not configure it.
pub(super) const REFINER_MLP_RATIO: usize = 4;

/// `config.json` of a `HunyuanVideoTransformer3DModel`. Defaults are those of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct HunyuanVideoConfig {
    pub in_channels: usize,
    pub out_channels: Option<usize>,
    pub num_attention_heads: usize,
    pub attention_head_dim: usize,
    /// Of two streams.
    pub num_layers: usize,
    /// Of one.
    pub num_single_layers: usize,
    pub num_refiner_layers: usize,
    pub mlp_ratio: f64,
    /// Rows and columns of latents.
    pub patch_size: usize,
    /// Frames of latents.
    pub patch_size_t: usize,
    pub qk_norm: Option<String>,
    pub guidance_embeds: bool,
    pub text_embed_dim: usize,
    pub pooled_projection_dim: usize,
    pub rope_theta: f64,
    pub rope_axes_dim: [usize; 3],
    pub image_condition_type: Option<String>,
}

impl Default for HunyuanVideoConfig {
    fn default() -> Self {
        Self {
            in_channels: 16,
            out_channels: Some(16),
            num_attention_heads: 24,
            attention_head_dim: 128,
            num_layers: 20,
            num_single_layers: 40,
            num_refiner_layers: 2,
            mlp_ratio: 4.0,
            patch_size: 2,
            patch_size_t: 1,
            qk_norm: Some(QK_NORM.to_owned()),
            guidance_embeds: true,
            text_embed_dim: 4096,
            pooled_projection_dim: 768,
            rope_theta: 256.0,
            rope_axes_dim: [16, 56, 56],
            image_condition_type: None,
        }
    }
}

impl Bounded for HunyuanVideoConfig {
    const BOUNDS: &'static [Bound] = &[
        Bound::size("in_channels", MAX_CHANNELS),
        Bound::whole("out_channels", 0, MAX_CHANNELS),
        Bound::size("num_attention_heads", MAX_HEADS),
        Bound::size("attention_head_dim", MAX_HEAD_DIM),
        Bound::whole("num_layers", 0, MAX_LAYERS),
        Bound::whole("num_single_layers", 0, MAX_LAYERS),
        Bound::whole("num_refiner_layers", 0, MAX_LAYERS),
        Bound::number("mlp_ratio", 1.0 / MAX_MLP_RATIO, MAX_MLP_RATIO),
        Bound::size("patch_size", MAX_PATCH),
        Bound::size("patch_size_t", MAX_PATCH),
        Bound::size("text_embed_dim", MAX_WIDTH),
        Bound::size("pooled_projection_dim", MAX_WIDTH),
        Bound::number("rope_theta", 1.0, MAX_THETA),
        Bound::size("rope_axes_dim", MAX_HEAD_DIM),
    ];
}

/// How a picture enters the transformer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageCondition {
    /// Its latents are the first frame, whose tokens are told that they have no noise.
    TokenReplace,
    /// Its latents and a mask lie behind the channels of the first frame, which is no part of the clip.
    LatentConcat,
}

impl HunyuanVideoConfig {
    /// What `image_condition_type` says; `None` where it takes no picture. Refuses what is not known.
    pub fn image_condition(&self, path: &Path) -> Result<Option<ImageCondition>> {
        match self.image_condition_type.as_deref() {
            None => Ok(None),
            Some("token_replace") => Ok(Some(ImageCondition::TokenReplace)),
            Some("latent_concat") => Ok(Some(ImageCondition::LatentConcat)),
            Some(kind) => {
                let problem = format!("`image_condition_type` is {kind:?}; supported: token_replace, latent_concat");
                Err(Error::checkpoint(path, problem))
            }
        }
    }

    /// Width of the streams.
    pub fn dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Width inside of a feed-forward network.
    pub fn inner(&self) -> usize {
        (self.dim() as f64 * self.mlp_ratio) as usize
    }

    /// Channels of the predicted flow.
    pub fn predicted_channels(&self) -> usize {
        self.out_channels.filter(|channels| *channels > 0).unwrap_or(self.in_channels)
    }

    /// Video tokens of so many latent positions.
    pub(super) fn num_tokens(&self, positions: usize) -> usize {
        positions / (self.patch_size_t * self.patch_size * self.patch_size)
    }

    /// Refuses configurations that contradict themselves, or that nothing here computes. `path` is named in the error.
    pub fn check(&self, path: &Path) -> Result<()> {
        let (heads, head_dim) = (self.num_attention_heads, self.attention_head_dim);
        check_product(path, ("num_attention_heads", heads), ("attention_head_dim", head_dim), MAX_WIDTH)?;
        let axes = self.rope_axes_dim;
        let problem = if axes.iter().sum::<usize>() != head_dim || axes.iter().any(|axis| axis % 2 != 0) {
            format!("`rope_axes_dim` {axes:?} must be even and add up to attention_head_dim, {head_dim}")
        } else if self.qk_norm.as_deref() != Some(QK_NORM) {
            format!("`qk_norm` is {:?}; only {QK_NORM:?} is supported", self.qk_norm)
        } else if self.patch_size_t != 1 {
            format!("`patch_size_t` is {}; patches over time are not supported", self.patch_size_t)
        } else if self.inner() == 0 {
            format!("`mlp_ratio` is {}, which leaves nothing of {}", self.mlp_ratio, self.dim())
        } else {
            return Ok(());
        };
        Err(Error::checkpoint(path, problem))
    }

    /// Activations of one row of one forward pass over so many latent positions and text tokens, at their peak.
    ///
    /// When a single block joins what is attended with the inner vectors: the stream, its normed copy, what is attended, the
    /// inner vectors, both side by side and once more in the blocks in which a CPU multiplies them, the product. The
    /// feed-forward of a dual block has as much. Or when a dual block attends: the streams, queries, keys and values before
    /// and after they are joined, what is attended.
    pub(super) fn peak_bytes_of_row(&self, positions: usize, text: usize, dtype: DType) -> usize {
        let tokens = self.num_tokens(positions) + text;
        let (dim, inner) = (self.dim(), self.inner());
        let of_token = (10 * dim).max(5 * dim + 2 * inner + packed_values(dim + inner));
        // The refined text between its layers.
        let refined = text * (3 * dim + 2 * REFINER_MLP_RATIO * dim + self.text_embed_dim);
        (tokens * of_token + refined) * dtype.size_in_bytes()
    }

    /// The video's tokens of one row once, as they go from block to block.
    pub(super) fn stream_bytes_of_row(&self, positions: usize, dtype: DType) -> usize {
        self.num_tokens(positions) * self.dim() * dtype.size_in_bytes()
    }

    /// What a session keeps of where tokens stand.
    pub(super) fn rotation_bytes(&self, positions: usize, text: usize) -> usize {
        (self.num_tokens(positions) + text) * self.attention_head_dim * size_of::<f32>()
    }
}
