//! What `transformer/config.json` of CogVideoX says, and what follows from it: grids of patches, bytes of a forward pass.
//!
//! Owns: the configuration. Does not know: weights, requests.

use std::path::Path;

use candle_core::DType;
use serde::Deserialize;

use super::SEQUENCE_LENGTH;
use crate::config::bounds::{
    MAX_CHANNELS, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_LEARNED_POSITIONS, MAX_PATCH, MAX_SCALE, MAX_SIDE,
    MAX_WIDTH, check_product,
};
use crate::config::{Bound, Bounded};
use crate::error::{Error, Result};
use crate::layers::packed_values;

/// How much wider than the stream the feed-forward layers are.
pub(super) const MLP_RATIO: usize = 4;

/// `transformer/config.json`. Defaults are those of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct CogVideoXConfig {
    pub num_attention_heads: usize,
    pub attention_head_dim: usize,
    pub in_channels: usize,
    pub out_channels: usize,
    pub flip_sin_to_cos: bool,
    pub freq_shift: f64,
    pub time_embed_dim: usize,
    pub ofs_embed_dim: Option<usize>,
    pub text_embed_dim: usize,
    pub num_layers: usize,
    pub attention_bias: bool,
    pub sample_width: usize,
    pub sample_height: usize,
    pub sample_frames: usize,
    pub patch_size: usize,
    pub patch_size_t: Option<usize>,
    pub temporal_compression_ratio: usize,
    pub max_text_seq_length: usize,
    pub activation_fn: String,
    pub timestep_activation_fn: String,
    pub norm_elementwise_affine: bool,
    pub norm_eps: f64,
    pub spatial_interpolation_scale: f64,
    pub temporal_interpolation_scale: f64,
    pub use_rotary_positional_embeddings: bool,
    pub use_learned_positional_embeddings: bool,
    pub patch_bias: bool,
}

impl Default for CogVideoXConfig {
    fn default() -> Self {
        Self {
            num_attention_heads: 30,
            attention_head_dim: 64,
            in_channels: 16,
            out_channels: 16,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            time_embed_dim: 512,
            ofs_embed_dim: None,
            text_embed_dim: 4096,
            num_layers: 30,
            attention_bias: true,
            sample_width: 90,
            sample_height: 60,
            sample_frames: 49,
            patch_size: 2,
            patch_size_t: None,
            temporal_compression_ratio: 4,
            max_text_seq_length: SEQUENCE_LENGTH,
            activation_fn: "gelu-approximate".to_owned(),
            timestep_activation_fn: "silu".to_owned(),
            norm_elementwise_affine: true,
            norm_eps: 1e-5,
            spatial_interpolation_scale: 1.875,
            temporal_interpolation_scale: 1.0,
            use_rotary_positional_embeddings: false,
            use_learned_positional_embeddings: false,
            patch_bias: true,
        }
    }
}

impl Bounded for CogVideoXConfig {
    const BOUNDS: &'static [Bound] = &[
        Bound::size("num_attention_heads", MAX_HEADS),
        Bound::size("attention_head_dim", MAX_HEAD_DIM),
        Bound::size("in_channels", MAX_CHANNELS),
        Bound::size("out_channels", MAX_CHANNELS),
        Bound::number("freq_shift", -MAX_SCALE, MAX_SCALE),
        Bound::size("time_embed_dim", MAX_WIDTH),
        Bound::whole("ofs_embed_dim", 0, MAX_WIDTH),
        Bound::size("text_embed_dim", MAX_WIDTH),
        Bound::size("num_layers", MAX_LAYERS),
        Bound::size("sample_width", MAX_SIDE),
        Bound::size("sample_height", MAX_SIDE),
        Bound::size("sample_frames", MAX_LEARNED_POSITIONS),
        Bound::size("patch_size", MAX_PATCH),
        Bound::size("patch_size_t", MAX_PATCH),
        Bound::size("temporal_compression_ratio", MAX_PATCH),
        Bound::size("max_text_seq_length", MAX_LEARNED_POSITIONS),
        Bound::eps("norm_eps"),
        Bound::scale("spatial_interpolation_scale"),
        Bound::scale("temporal_interpolation_scale"),
    ];
}

impl CogVideoXConfig {
    /// Width of the transformer.
    pub(super) fn dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Latent frames of a patch.
    pub(super) fn patch_frames(&self) -> usize {
        self.patch_size_t.unwrap_or(1)
    }

    /// Latent values of one channel in a patch.
    pub(super) fn patch_values(&self) -> usize {
        self.patch_frames() * self.patch_size * self.patch_size
    }

    /// Whether tokens have vectors of their own, which is for prompts of one length and patches of one frame.
    pub(super) fn has_positions(&self) -> bool {
        !self.use_rotary_positional_embeddings || self.use_learned_positional_embeddings
    }

    /// Patches of latents of so many frames, rows and columns.
    pub(super) fn grid(&self, [frames, height, width]: [usize; 3]) -> [usize; 3] {
        [frames / self.patch_frames(), height / self.patch_size, width / self.patch_size]
    }

    /// Patches of what the model was made for.
    pub(super) fn own_grid(&self) -> [usize; 3] {
        let frames = (self.sample_frames - 1) / self.temporal_compression_ratio + 1;
        [frames, self.sample_height / self.patch_size, self.sample_width / self.patch_size]
    }

    /// Whether learned positions are of this grid.
    pub(super) fn is_own(&self, grid: [usize; 3]) -> bool {
        grid == self.own_grid() && (grid[0] - 1) * self.temporal_compression_ratio + 1 == self.sample_frames
    }

    pub(super) fn check(&self, path: &Path) -> Result<()> {
        let (heads, head_dim) = (self.num_attention_heads, self.attention_head_dim);
        check_product(path, ("num_attention_heads", heads), ("attention_head_dim", head_dim), MAX_WIDTH)?;
        let learned = self.use_learned_positional_embeddings;
        let [_, rows, columns] = self.own_grid();
        let problem = if !self.flip_sin_to_cos || self.freq_shift != 0.0 {
            "`flip_sin_to_cos`, `freq_shift`: only true and 0 are supported".to_owned()
        } else if self.timestep_activation_fn != "silu" {
            format!("`timestep_activation_fn` is {:?}; only \"silu\" is supported", self.timestep_activation_fn)
        } else if self.activation_fn != "gelu-approximate" {
            format!("`activation_fn` is {:?}; only \"gelu-approximate\" is supported", self.activation_fn)
        } else if learned && !self.use_rotary_positional_embeddings {
            "`use_learned_positional_embeddings` needs `use_rotary_positional_embeddings`".to_owned()
        } else if self.use_rotary_positional_embeddings && !head_dim.is_multiple_of(16) {
            format!("`attention_head_dim` is {head_dim}; rotations in three directions need a multiple of 16")
        } else if self.has_positions() && !self.dim().is_multiple_of(16) {
            format!(
                "`num_attention_heads` times `attention_head_dim` is {}; positions need a multiple of 16",
                self.dim()
            )
        } else if self.has_positions() && self.patch_frames() != 1 {
            "`patch_size_t` needs `use_rotary_positional_embeddings` alone".to_owned()
        } else if self.ofs_embed_dim.is_some_and(|width| width != self.time_embed_dim) {
            format!("`ofs_embed_dim` is {:?}; `time_embed_dim` {}", self.ofs_embed_dim, self.time_embed_dim)
        } else if !self.dim().is_multiple_of(2) || self.ofs_embed_dim.is_some_and(|width| width % 2 == 1) {
            "`attention_head_dim` and `ofs_embed_dim` must be even".to_owned()
        } else if rows * columns == 0 {
            "`sample_height` and `sample_width` have no patch".to_owned()
        } else {
            return Ok(());
        };
        Err(Error::checkpoint(path, problem))
    }

    /// Activations of one row of one forward pass over latents of this size, at the widest of the places below.
    pub(super) fn peak_bytes_of_row(&self, latents: [usize; 3], text: usize, dtype: DType) -> usize {
        let video = self.grid(latents).iter().product::<usize>();
        let (tokens, dim) = (text + video, self.dim());
        // On the CPU, which computes in f32, a product has its rows once more, cut into columns that are filled up.
        let packed = |width: usize| match dtype {
            DType::F32 => packed_values(width),
            _ => 0,
        };
        let hidden = MLP_RATIO * dim;
        // The stream and its norm, q and k before and after they are turned, v, the attention's answer; the last product.
        let attention = (8 * dim).max(3 * dim + packed(dim));
        // The stream, its norm; the hidden layer before and after its activation, or one of them and what is made of it.
        let feed_forward = 2 * dim + (2 * hidden).max(hidden + packed(hidden) + dim);
        let wide = tokens * attention.max(feed_forward) * dtype.size_in_bytes();
        // The table in f32 and what it is made of, before there is anything else as wide but the stream.
        let positions = if self.has_positions() { 3 * video * dim } else { 0 };
        let narrow = (2 * tokens * dim) * dtype.size_in_bytes() + positions * size_of::<f32>();
        wide.max(narrow)
    }

    /// The video's tokens of one row once, as they go from block to block.
    pub(super) fn stream_bytes_of_row(&self, latents: [usize; 3], dtype: DType) -> usize {
        self.grid(latents).iter().product::<usize>() * self.dim() * dtype.size_in_bytes()
    }

    /// What a session keeps of where tokens stand.
    pub(super) fn rotation_bytes(&self, latents: [usize; 3], text: usize) -> usize {
        let tokens = text + self.grid(latents).iter().product::<usize>();
        usize::from(self.use_rotary_positional_embeddings) * tokens * self.attention_head_dim * size_of::<f32>()
    }
}
