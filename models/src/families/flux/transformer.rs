//! The FLUX.1 transformer: image and text tokens side by side, first in two streams, then in one.
//!
//! Source: diffusers `models/transformers/transformer_flux.py` and `models/normalization.py`, whose tensor names are
//! the ones read here. Shapes: `b` rows, `lt` text tokens, `li` image tokens, `l = lt + li` in this order.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use tale_kernels::{gated_sum, gelu_tanh, silu};

use crate::config::bounds::{MAX_CHANNELS, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_PATCH, MAX_WIDTH, check_product};
use crate::config::{Bound, Bounded};
use crate::diffusion::acceleration::published::{FLUX_1_DEV, Published};
use crate::error::{Error, Result};
use crate::layers::Linear;
use crate::layers::joint::{ADDED, FeedForward, Modulation, OWN, Projections, Rotations, joint_attention, modulated};
use crate::layers::timesteps::{ConditionEmbedder, sinusoidal};
use crate::runner::diffusion::block_cache::{Blocks, RowCache, select, through_blocks};
use crate::weights::Weights;

const ROPE_THETA: f64 = 10_000.0;
/// Width of the sinusoids of timestep and guidance.
const TIME_CHANNELS: usize = 256;
pub(super) const MLP_RATIO: usize = 4;
/// Side of the square of latent positions that one image token holds.
pub(super) const PACK: usize = 2;

/// `config.json` of a `FluxTransformer2DModel`. Defaults are those of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct FluxTransformerConfig {
    pub patch_size: usize,
    pub in_channels: usize,
    pub out_channels: Option<usize>,
    pub num_layers: usize,
    pub num_single_layers: usize,
    pub attention_head_dim: usize,
    pub num_attention_heads: usize,
    pub joint_attention_dim: usize,
    pub pooled_projection_dim: usize,
    pub guidance_embeds: bool,
    pub axes_dims_rope: [usize; 3],
}

impl Default for FluxTransformerConfig {
    fn default() -> Self {
        Self {
            patch_size: 1,
            in_channels: 64,
            out_channels: None,
            num_layers: 19,
            num_single_layers: 38,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            pooled_projection_dim: 768,
            guidance_embeds: false,
            axes_dims_rope: [16, 56, 56],
        }
    }
}

impl Bounded for FluxTransformerConfig {
    const BOUNDS: &'static [Bound] = &[
        Bound::size("patch_size", MAX_PATCH),
        Bound::size("in_channels", MAX_CHANNELS),
        Bound::size("out_channels", MAX_CHANNELS),
        Bound::whole("num_layers", 0, MAX_LAYERS),
        Bound::whole("num_single_layers", 0, MAX_LAYERS),
        Bound::size("attention_head_dim", MAX_HEAD_DIM),
        Bound::size("num_attention_heads", MAX_HEADS),
        Bound::size("joint_attention_dim", MAX_WIDTH),
        Bound::size("pooled_projection_dim", MAX_WIDTH),
        Bound::size("axes_dims_rope", MAX_HEAD_DIM),
    ];
}

impl FluxTransformerConfig {
    /// Width of the streams.
    pub fn inner_dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Whether there is a first block of two streams, and another one that could be skipped.
    pub fn can_skip_blocks(&self) -> bool {
        self.num_layers > 0 && self.num_layers + self.num_single_layers > 1
    }

    /// The published checkpoint that has these sizes and figures.
    pub fn published(&self) -> Option<&'static Published> {
        let sizes = (self.num_layers, self.num_single_layers, self.inner_dim(), self.in_channels);
        (sizes == (19, 38, 3072, 64) && self.guidance_embeds).then_some(&FLUX_1_DEV)
    }

    /// Channels of the latents before packing.
    pub fn latent_channels(&self) -> usize {
        self.in_channels / (PACK * PACK)
    }

    /// Channels of one token of the prediction.
    fn predicted_channels(&self) -> usize {
        self.patch_size * self.patch_size * self.out_channels.unwrap_or(self.in_channels)
    }

    /// Refuses configurations that contradict themselves or belong to another pipeline. `path` is named in the error.
    pub fn check(&self, path: &Path) -> Result<()> {
        let refuse = |problem: String| Err(Error::checkpoint(path, problem));
        let axes = self.axes_dims_rope;
        let (heads, head_dim) = (self.num_attention_heads, self.attention_head_dim);
        check_product(path, ("num_attention_heads", heads), ("attention_head_dim", head_dim), MAX_WIDTH)?;
        if axes.iter().sum::<usize>() != self.attention_head_dim || axes.iter().any(|axis| axis % 2 != 0) {
            return refuse(format!("axes_dims_rope {axes:?} must be even and add up to attention_head_dim {head_dim}"));
        }
        if !self.in_channels.is_multiple_of(PACK * PACK) {
            return refuse(format!("in_channels {} must be a multiple of {}", self.in_channels, PACK * PACK));
        }
        if self.predicted_channels() != self.in_channels {
            let predicted = self.predicted_channels();
            return refuse(format!("takes {} channels and predicts {predicted}: not text-to-image", self.in_channels));
        }
        Ok(())
    }
}

/// One forward pass: rows that share a shape.
#[derive(Debug)]
pub struct TransformerInput<'a> {
    /// Packed, f32 `[b, li, in_channels]`.
    pub latents: &'a Tensor,
    /// `[b, lt, joint_attention_dim]` in the compute dtype.
    pub prompt_embeds: &'a Tensor,
    /// `[b, pooled_projection_dim]` in the compute dtype.
    pub pooled_prompt_embeds: &'a Tensor,
    /// One per row, 0..1000.
    pub timesteps: &'a [f32],
    /// One per row; read where the model embeds it.
    pub guidance_scales: &'a [f32],
    /// Rows and columns of image tokens; their product is `li`.
    pub grid: (usize, usize),
}

/// The network.
#[derive(Debug, Clone)]
pub struct FluxTransformer {
    config: FluxTransformerConfig,
    x_embedder: Linear,
    context_embedder: Linear,
    time_text_embed: TimeTextEmbed,
    transformer_blocks: Vec<DoubleBlock>,
    single_transformer_blocks: Vec<SingleBlock>,
    norm_out: Modulation<2>,
    proj_out: Linear,
    compute_dtype: DType,
    /// Bytes that the largest of its quantised matrices takes for a moment.
    dequantised_bytes: usize,
}

impl FluxTransformer {
    /// Tensors as diffusers names them.
    pub fn load(weights: &Weights, config: FluxTransformerConfig) -> Result<Self> {
        let dim = config.inner_dim();
        let double = weights.pp("transformer_blocks");
        let single = weights.pp("single_transformer_blocks");
        let transformer_blocks =
            (0..config.num_layers).map(|i| DoubleBlock::load(&double.pp(i), &config)).collect::<Result<_>>()?;
        let single_transformer_blocks =
            (0..config.num_single_layers).map(|i| SingleBlock::load(&single.pp(i), &config)).collect::<Result<_>>()?;
        Ok(Self {
            transformer_blocks,
            single_transformer_blocks,
            x_embedder: Linear::load(&weights.pp("x_embedder"), config.in_channels, dim)?,
            context_embedder: Linear::load(&weights.pp("context_embedder"), config.joint_attention_dim, dim)?,
            time_text_embed: TimeTextEmbed::load(&weights.pp("time_text_embed"), &config)?,
            norm_out: Modulation::load(&weights.pp("norm_out"), dim)?,
            proj_out: Linear::load(&weights.pp("proj_out"), dim, config.predicted_channels())?,
            compute_dtype: weights.placement().compute_dtype,
            dequantised_bytes: weights.dequantised_bytes(),
            config,
        })
    }

    /// Most bytes that a forward pass takes for a moment to multiply with a quantised matrix.
    pub fn dequantised_bytes(&self) -> usize {
        self.dequantised_bytes
    }

    /// The configuration.
    pub fn config(&self) -> &FluxTransformerConfig {
        &self.config
    }

    /// The velocity of each row, packed as the latents: f32 `[b, li, in_channels]`.
    pub fn forward(&self, input: &TransformerInput<'_>) -> Result<Tensor> {
        let Entered { text, image, condition, rope } = self.enter(input)?;
        let image = self.blocks_from(0, text, image, &condition, &rope)?;
        self.leave(&image, &condition)
    }

    /// As [`FluxTransformer::forward`], where the rows that their caches answer skip blocks.
    pub fn forward_cached(&self, input: &TransformerInput<'_>, caches: &mut [RowCache<'_>]) -> Result<Tensor> {
        let entered = self.enter(input)?;
        let condition = entered.condition.clone();
        let image = through_blocks(caches, Streams { network: self, first: 0, entered })?;
        self.leave(&image, &condition)
    }

    fn enter(&self, input: &TransformerInput<'_>) -> Result<Entered> {
        let condition = silu(&self.time_text_embed.forward(input)?)?;
        let image = self.x_embedder.forward(&input.latents.to_dtype(self.compute_dtype)?)?;
        let text = self.context_embedder.forward(input.prompt_embeds)?;
        let rope = rotations(&self.config.axes_dims_rope, text.dim(1)?, input.grid, image.device())?;
        Ok(Entered { text, image, condition, rope })
    }

    /// `text [b, lt, dim]` and `image [b, li, dim]` through the double blocks from number `first` on and all single ones:
    /// the image, `[b, li, dim]`.
    fn blocks_from(
        &self,
        first: usize,
        mut text: Tensor,
        mut image: Tensor,
        condition: &Tensor,
        rope: &Rotations,
    ) -> Result<Tensor> {
        for block in &self.transformer_blocks[first..] {
            (text, image) = block.forward(&text, &image, condition, rope)?;
        }
        let (text_len, image_len) = (text.dim(1)?, image.dim(1)?);
        let mut joint = Tensor::cat(&[text, image], 1)?; // [b, l, dim]
        for block in &self.single_transformer_blocks {
            joint = block.forward(&joint, condition, rope)?;
        }
        Ok(joint.narrow(1, text_len, image_len)?.contiguous()?)
    }

    fn leave(&self, image: &Tensor, condition: &Tensor) -> Result<Tensor> {
        // The last norm alone has its scale before its shift.
        let [scale, shift] = self.norm_out.forward(condition)?;
        Ok(self.proj_out.forward(&modulated(image, &shift, &scale)?)?.to_dtype(DType::F32)?)
    }
}

/// What the blocks get.
struct Entered {
    /// `[b, lt, dim]`.
    text: Tensor,
    /// `[b, li, dim]`.
    image: Tensor,
    /// `[b, dim]`.
    condition: Tensor,
    rope: Rotations,
}

/// Tokens of some rows before the blocks from number `first` on.
struct Streams<'a> {
    network: &'a FluxTransformer,
    first: usize,
    entered: Entered,
}

impl Blocks for Streams<'_> {
    fn entered(&self) -> &Tensor {
        &self.entered.image
    }

    /// The image as the first block sees it (TeaCache4FLUX).
    fn signal(&self) -> Result<Tensor> {
        let norm = &self.network.transformer_blocks[0].image.norm1;
        let [shift, scale, ..] = norm.forward(&self.entered.condition)?;
        modulated(&self.entered.image, &shift, &scale)
    }

    fn pass_first(&mut self) -> Result<Tensor> {
        let Entered { text, image, condition, rope } = &self.entered;
        let (text, image) = self.network.transformer_blocks[0].forward(text, image, condition, rope)?;
        (self.entered.text, self.entered.image) = (text, image);
        self.first = 1;
        Ok(self.entered.image.clone())
    }

    fn pass_rest(self, rows: &[usize]) -> Result<Tensor> {
        let Entered { text, image, condition, rope } = &self.entered;
        let (text, image, condition) = (select(text, rows)?, select(image, rows)?, select(condition, rows)?);
        self.network.blocks_from(self.first, text, image, &condition, rope)
    }
}

/// Timestep, guidance and pooled text as one vector.
#[derive(Debug, Clone)]
struct TimeTextEmbed {
    timestep_embedder: ConditionEmbedder,
    guidance_embedder: Option<ConditionEmbedder>,
    text_embedder: ConditionEmbedder,
}

impl TimeTextEmbed {
    fn load(weights: &Weights, config: &FluxTransformerConfig) -> Result<Self> {
        let dim = config.inner_dim();
        let time = |name: &str| ConditionEmbedder::load(&weights.pp(name), TIME_CHANNELS, dim);
        Ok(Self {
            timestep_embedder: time("timestep_embedder")?,
            guidance_embedder: if config.guidance_embeds { Some(time("guidance_embedder")?) } else { None },
            text_embedder: ConditionEmbedder::load(&weights.pp("text_embedder"), config.pooled_projection_dim, dim)?,
        })
    }

    /// `[b, dim]`.
    fn forward(&self, input: &TransformerInput<'_>) -> Result<Tensor> {
        let device = input.latents.device();
        // The pipeline divides by 1000 and the model multiplies again; in f32 that is not quite nothing.
        let timesteps: Vec<f32> = input.timesteps.iter().map(|timestep| timestep / 1000.0 * 1000.0).collect();
        let mut condition = self.timestep_embedder.forward(&sinusoidal(&timesteps, TIME_CHANNELS, device)?)?;
        if let Some(embedder) = &self.guidance_embedder {
            let scales: Vec<f32> = input.guidance_scales.iter().map(|scale| scale * 1000.0).collect();
            condition = (condition + embedder.forward(&sinusoidal(&scales, TIME_CHANNELS, device)?)?)?;
        }
        Ok((condition + self.text_embedder.forward(input.pooled_prompt_embeds)?)?)
    }
}

/// Rotations of all tokens, three axes side by side. Text tokens stand at (0, 0, 0), the image token in row r and column c
/// at (0, r, c).
fn rotations(axes_dims: &[usize; 3], text_len: usize, grid: (usize, usize), device: &Device) -> Result<Rotations> {
    let (rows, columns) = grid;
    let half: usize = axes_dims.iter().sum::<usize>() / 2;
    let length = text_len + rows * columns;
    let text = (0..text_len).map(|_| [0, 0, 0]);
    let image = (0..rows * columns).map(|token| [0, token / columns, token % columns]);
    let mut angles = Vec::with_capacity(length * half);
    for position in text.chain(image) {
        for (axis_dim, coordinate) in axes_dims.iter().zip(position) {
            angles.extend((0..axis_dim / 2).map(|i| coordinate as f64 * frequency(i, *axis_dim)));
        }
    }
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f32> = angles.iter().map(|angle| f(*angle) as f32).collect();
        Tensor::from_vec(values, (length, half), device)
    };
    Ok(Rotations { cos: table(f64::cos)?, sin: table(f64::sin)? })
}

fn frequency(i: usize, axis_dim: usize) -> f64 {
    1.0 / ROPE_THETA.powf((2 * i) as f64 / axis_dim as f64)
}

/// One stream's half of a double block, around the attention that both share.
#[derive(Debug, Clone)]
struct Stream {
    norm1: Modulation<6>,
    projections: Projections,
    to_out: Linear,
    ff: FeedForward,
}

impl Stream {
    /// `x + gate * attended`, then the feed-forward; `modulation` is all of the stream's in published order.
    fn after_attention(&self, x: &Tensor, attended: &Tensor, modulation: &[Tensor; 6]) -> Result<Tensor> {
        let [_, _, gate_msa, shift_mlp, scale_mlp, gate_mlp] = modulation;
        let x = gated_sum(x, gate_msa, &self.to_out.forward(&attended.contiguous()?)?)?;
        let y = self.ff.forward(&modulated(&x, shift_mlp, scale_mlp)?)?;
        Ok(gated_sum(&x, gate_mlp, &y)?)
    }
}

/// Image and text with their own weights, one attention.
#[derive(Debug, Clone)]
struct DoubleBlock {
    image: Stream,
    text: Stream,
}

impl DoubleBlock {
    fn load(weights: &Weights, config: &FluxTransformerConfig) -> Result<Self> {
        let (dim, heads, head_dim) = (config.inner_dim(), config.num_attention_heads, config.attention_head_dim);
        let attn = weights.pp("attn");
        let image = Stream {
            norm1: Modulation::load(&weights.pp("norm1"), dim)?,
            projections: Projections::load(&attn, heads, head_dim, OWN)?,
            to_out: Linear::load(&attn.pp("to_out.0"), dim, dim)?,
            ff: FeedForward::load(&weights.pp("ff"), dim, MLP_RATIO * dim)?,
        };
        let text = Stream {
            norm1: Modulation::load(&weights.pp("norm1_context"), dim)?,
            projections: Projections::load(&attn, heads, head_dim, ADDED)?,
            to_out: Linear::load(&attn.pp("to_add_out"), dim, dim)?,
            ff: FeedForward::load(&weights.pp("ff_context"), dim, MLP_RATIO * dim)?,
        };
        Ok(Self { image, text })
    }

    /// `text [b, lt, dim]` and `image [b, li, dim]` to the same.
    fn forward(&self, text: &Tensor, image: &Tensor, condition: &Tensor, rope: &Rotations) -> Result<(Tensor, Tensor)> {
        let (text_len, image_len) = (text.dim(1)?, image.dim(1)?);
        let of_text = self.text.norm1.forward(condition)?;
        let of_image = self.image.norm1.forward(condition)?;
        let (text_rope, image_rope) = (rope.narrow(0, text_len)?, rope.narrow(text_len, image_len)?);
        let text_qkv = self.text.projections.forward(&modulated(text, &of_text[0], &of_text[1])?, &text_rope)?;
        let image_qkv = self.image.projections.forward(&modulated(image, &of_image[0], &of_image[1])?, &image_rope)?;
        let joint = |i: usize| Tensor::cat(&[&text_qkv[i], &image_qkv[i]], 1); // [b, l, heads, head_dim]
        let attended = joint_attention(&[joint(0)?, joint(1)?, joint(2)?], None)?;
        let text = self.text.after_attention(text, &attended.narrow(1, 0, text_len)?, &of_text)?;
        let image = self.image.after_attention(image, &attended.narrow(1, text_len, image_len)?, &of_image)?;
        Ok((text, image))
    }
}

/// All tokens in one stream; attention and feed-forward side by side.
#[derive(Debug, Clone)]
struct SingleBlock {
    norm: Modulation<3>,
    projections: Projections,
    proj_mlp: Linear,
    proj_out: Linear,
}

impl SingleBlock {
    fn load(weights: &Weights, config: &FluxTransformerConfig) -> Result<Self> {
        let (dim, heads, head_dim) = (config.inner_dim(), config.num_attention_heads, config.attention_head_dim);
        Ok(Self {
            norm: Modulation::load(&weights.pp("norm"), dim)?,
            projections: Projections::load(&weights.pp("attn"), heads, head_dim, OWN)?,
            proj_mlp: Linear::load(&weights.pp("proj_mlp"), dim, MLP_RATIO * dim)?,
            proj_out: Linear::load(&weights.pp("proj_out"), (1 + MLP_RATIO) * dim, dim)?,
        })
    }

    /// `x [b, l, dim]` to the same.
    fn forward(&self, x: &Tensor, condition: &Tensor, rope: &Rotations) -> Result<Tensor> {
        let [shift, scale, gate] = self.norm.forward(condition)?;
        let normed = modulated(x, &shift, &scale)?;
        let attended = joint_attention(&self.projections.forward(&normed, rope)?, None)?;
        let inner = gelu_tanh(&self.proj_mlp.forward(&normed)?)?;
        Ok(gated_sum(x, &gate, &self.proj_out.forward(&Tensor::cat(&[attended, inner], 2)?)?)?)
    }
}
