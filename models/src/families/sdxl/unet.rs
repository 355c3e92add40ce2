//! The UNet of SDXL: latents, a timestep and text to a prediction of the noise.
//!
//! Owns: the network as its `config.json` describes it, whatever its widths and depths. Does not know: prompts, solvers,
//! guidance. Source: diffusers `models/unets/{unet_2d_condition,unet_2d_blocks}.py`, `models/resnet.py`,
//! `models/transformers/transformer_2d.py`, `models/attention.py` (`BasicTransformerBlock`), whose tensor names are the
//! ones read here. Shapes: `b` rows, `c` channels, `h` and `w` latents, `l` tokens of text.

use std::path::Path;

use candle_core::{DType, Tensor};
use tale_kernels::{
    AttentionOptions, Gelu, attention, cat, gated_sum, geglu, silu, sum, sum_channels, transpose, upsample_nearest2d,
};

use crate::error::{Error, Result};
use crate::layers::timesteps::{ConditionEmbedder, sinusoidal};
use crate::layers::{Conv2d, GroupNorm, LayerNorm, Linear};
use crate::weights::Weights;

use super::config::TransformerShape;
pub use super::config::UNetConfig;

/// Of a transformer's group norm, which the class does not configure.
const TRANSFORMER_NORM_EPS: f64 = 1e-6;
/// Of a transformer's layer norms, likewise.
const LAYER_NORM_EPS: f64 = 1e-5;
/// The feed-forward network is this many times as wide as its block.
const FEED_FORWARD_RATIO: usize = 4;

/// One forward pass over `b` rows.
pub struct UNetInput<'a> {
    /// `[b, in_channels, h, w]` f32, scaled for the model as the solver says.
    pub latents: &'a Tensor,
    /// One per row.
    pub timesteps: &'a [f32],
    /// `[b, l, cross_attention_dim]`.
    pub prompt_embeds: &'a Tensor,
    /// `[b, p]`.
    pub pooled_prompt_embeds: &'a Tensor,
    /// Original height and width, top and left of the crop, target height and width, in pixels, or an aesthetic score in
    /// place of the last two; one list per row.
    pub time_ids: &'a [Vec<f32>],
    /// Of a network with image attention, where the rows have reference pictures.
    pub references: Option<ReferenceInput<'a>>,
}

/// What image attention looks at.
#[derive(Clone, Copy)]
pub struct ReferenceInput<'a> {
    /// Tokens of the reference pictures, `[b, m, cross_attention_dim]`.
    pub tokens: &'a Tensor,
    /// How much of what is seen in them is added; one per row.
    pub scales: &'a [f32],
}

/// `UNet2DConditionModel` with `text_time` conditioning.
#[derive(Debug, Clone)]
pub struct UNet {
    config: UNetConfig,
    compute_dtype: DType,
    conv_in: Conv2d,
    time_embedding: ConditionEmbedder,
    add_embedding: ConditionEmbedder,
    down_blocks: Vec<DownBlock>,
    mid_block: Option<MidBlock>,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl UNet {
    /// Tensors as diffusers names them. `config` has been checked.
    pub fn load(weights: &Weights, config: UNetConfig) -> Result<Self> {
        let (first, time_dim) = (config.block_out_channels[0], config.time_embed_dim());
        let (kernel_in, kernel_out) = (config.conv_in_kernel, config.conv_out_kernel);
        let conv_in = weights.pp("conv_in");
        let conv_out = weights.pp("conv_out");
        Ok(Self {
            compute_dtype: weights.placement().compute_dtype,
            conv_in: Conv2d::load(&conv_in, config.in_channels, first, kernel_in, kernel_in / 2)?,
            time_embedding: ConditionEmbedder::load(&weights.pp("time_embedding"), first, time_dim)?,
            add_embedding: ConditionEmbedder::load(
                &weights.pp("add_embedding"),
                config.projection_class_embeddings_input_dim,
                time_dim,
            )?,
            down_blocks: load_down_blocks(weights, &config)?,
            mid_block: MidBlock::load(&weights.pp("mid_block"), &config)?,
            up_blocks: load_up_blocks(weights, &config)?,
            conv_norm_out: GroupNorm::load(
                &weights.pp("conv_norm_out"),
                config.norm_num_groups,
                first,
                config.norm_eps,
            )?,
            conv_out: Conv2d::load(&conv_out, first, config.out_channels, kernel_out, kernel_out / 2)?,
            config,
        })
    }

    /// With image attention beside each attention over the text: tensors `{index}.to_k_ip.weight`, `{index}.to_v_ip.weight`
    /// of an IP-Adapter. The index counts all attentions, every second of which is one over the text, in the order of
    /// `UNet2DConditionModel.attn_processors`, which has the middle last. `path` is named in the error.
    pub fn with_image_attention(mut self, weights: &Weights, path: &Path) -> Result<Self> {
        let text_dim = self.config.text_dim();
        let mut index = 1;
        for attention in self.attentions_over_text() {
            attention.image = Some(ImageAttention::load(&weights.pp(index), text_dim, attention.channels)?);
            index += 2;
        }
        if weights.contains_below(&index.to_string()) {
            let problem =
                format!("is for a UNet with more than the {} attentions over the text of this one", index / 2);
            return Err(Error::checkpoint(path, problem));
        }
        Ok(self)
    }

    fn attentions_over_text(&mut self) -> impl Iterator<Item = &mut Attention> {
        let down = self.down_blocks.iter_mut().flat_map(|block| &mut block.layers);
        let up = self.up_blocks.iter_mut().flat_map(|block| &mut block.layers);
        let layers = down.chain(up).chain(self.mid_block.as_mut().map(|block| &mut block.before));
        layers.filter_map(|layer| layer.transformer.as_mut()).flat_map(|x| &mut x.blocks).map(|block| &mut block.attn2)
    }

    /// The configuration.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// The prediction `[b, out_channels, h, w]`, f32.
    pub fn forward(&self, input: &UNetInput<'_>) -> Result<Tensor> {
        Ok(self.compute(&self.prepare(input)?)?.to_dtype(DType::F32)?)
    }

    /// Takes everything to the device, in the compute dtype.
    pub(super) fn prepare(&self, input: &UNetInput<'_>) -> Result<PreparedInput> {
        let device = input.latents.device();
        let sizes: Vec<f32> = input.time_ids.iter().flatten().copied().collect();
        let sizes = sinusoidal(&sizes, self.config.addition_time_embed_dim, device)?; // [6 b, dim]
        let sizes = sizes.reshape((input.time_ids.len(), ()))?;
        let added = Tensor::cat(&[&input.pooled_prompt_embeds.to_dtype(DType::F32)?, &sizes], 1)?;
        let time = sinusoidal(input.timesteps, self.config.block_out_channels[0], device)?;
        let dtype = self.compute_dtype;
        Ok(PreparedInput {
            latents: input.latents.to_dtype(dtype)?.contiguous()?,
            time: time.to_dtype(dtype)?,
            added: added.to_dtype(dtype)?,
            text: input.prompt_embeds.to_dtype(dtype)?.contiguous()?,
            references: input.references.map(|references| self.prepare_references(&references)).transpose()?,
        })
    }

    fn prepare_references(&self, references: &ReferenceInput<'_>) -> Result<PreparedReferences> {
        let (tokens, rows) = (references.tokens.to_dtype(self.compute_dtype)?.contiguous()?, references.scales.len());
        let scales = Tensor::from_slice(references.scales, (rows, 1, 1), tokens.device())?.to_dtype(tokens.dtype())?;
        let mut widths = self.config.block_out_channels.clone();
        widths.sort_unstable();
        widths.dedup();
        let gate = |width| Ok(scales.broadcast_as((rows, 1, width))?.contiguous()?);
        Ok(PreparedReferences { gates: widths.into_iter().map(gate).collect::<Result<_>>()?, tokens })
    }

    /// The prediction `[b, out_channels, h, w]` in the compute dtype, from what is on the device: nothing but launches, so
    /// that they can be recorded.
    pub(super) fn compute(&self, input: &PreparedInput) -> Result<Tensor> {
        // The timestep, and the pooled prompt with the sizes of the picture: [b, time_embed_dim].
        let time = sum(&self.time_embedding.forward(&input.time)?, &self.add_embedding.forward(&input.added)?)?;
        let context = Context { time: &silu(&time)?, text: &input.text, references: input.references.as_ref() };
        let mut x = self.conv_in.forward(&input.latents)?;
        let mut skips = vec![x.clone()];
        for block in &self.down_blocks {
            x = block.forward(x, &context, &mut skips)?;
        }
        if let Some(block) = &self.mid_block {
            x = block.forward(&x, &context)?;
        }
        for block in &self.up_blocks {
            x = block.forward(x, &context, &mut skips)?;
        }
        self.conv_out.forward(&self.conv_norm_out.activated(&x)?)
    }
}

/// A [`UNetInput`] on its device, in the compute dtype, contiguous.
#[derive(Debug)]
pub(super) struct PreparedInput {
    /// `[b, in_channels, h, w]`.
    latents: Tensor,
    /// Sinusoids of the timesteps, `[b, block_out_channels[0]]`.
    time: Tensor,
    /// Pooled prompt and sinusoids of the sizes, `[b, projection_class_embeddings_input_dim]`.
    added: Tensor,
    /// `[b, l, cross_attention_dim]`.
    text: Tensor,
    references: Option<PreparedReferences>,
}

/// A [`ReferenceInput`] likewise.
#[derive(Debug)]
struct PreparedReferences {
    /// `[b, m, cross_attention_dim]`.
    tokens: Tensor,
    /// The scales of the rows in every width of the network, `[b, 1, c]`.
    gates: Vec<Tensor>,
}

impl PreparedReferences {
    fn gate(&self, channels: usize) -> &Tensor {
        let gate = self.gates.iter().find(|gate| gate.dims()[2] == channels);
        gate.expect("there is a gate for every width of the network: this is a bug")
    }
}

impl PreparedInput {
    /// The same in memory of its own.
    pub(super) fn copy(&self) -> Result<Self> {
        let references = |references: &PreparedReferences| -> Result<_> {
            let gates = references.gates.iter().map(Tensor::copy).collect::<candle_core::Result<_>>()?;
            Ok(PreparedReferences { gates, tokens: references.tokens.copy()? })
        };
        Ok(Self {
            latents: self.latents.copy()?,
            time: self.time.copy()?,
            added: self.added.copy()?,
            text: self.text.copy()?,
            references: self.references.as_ref().map(references).transpose()?,
        })
    }

    /// All of them, in one order.
    pub(super) fn tensors(&self) -> Vec<&Tensor> {
        let always = [&self.latents, &self.time, &self.added, &self.text];
        let references =
            self.references.iter().flat_map(|references| references.gates.iter().chain([&references.tokens]));
        always.into_iter().chain(references).collect()
    }
}

/// What every block sees beside its picture.
struct Context<'a> {
    /// `[b, time_embed_dim]`, activated.
    time: &'a Tensor,
    /// `[b, l, cross_attention_dim]`.
    text: &'a Tensor,
    references: Option<&'a PreparedReferences>,
}

/// Residual blocks, each with its transformer where the block has them.
#[derive(Debug, Clone)]
struct Layer {
    resnet: Resnet,
    transformer: Option<Transformer>,
}

impl Layer {
    fn forward(&self, x: &Tensor, context: &Context<'_>) -> Result<Tensor> {
        let x = self.resnet.forward(x, context.time)?;
        match &self.transformer {
            Some(transformer) => transformer.forward(&x, context),
            None => Ok(x),
        }
    }
}

/// `DownBlock2D` or `CrossAttnDownBlock2D`: every layer's result is a skip, and so is the halved picture.
#[derive(Debug, Clone)]
struct DownBlock {
    layers: Vec<Layer>,
    downsampler: Option<Conv2d>,
}

fn load_down_blocks(weights: &Weights, config: &UNetConfig) -> Result<Vec<DownBlock>> {
    let mut blocks = Vec::with_capacity(config.levels());
    for level in 0..config.levels() {
        let weights = weights.pp("down_blocks").pp(level);
        let channels = config.block_out_channels[level];
        let mut layers = Vec::new();
        for layer in 0..config.layers(level) {
            let in_channels = if layer > 0 { channels } else { config.block_out_channels[level.saturating_sub(1)] };
            let transformer = config.down_transformer(level, layer);
            layers.push(load_layer(&weights, layer, (in_channels, channels), transformer, config)?);
        }
        let downsampler = match level + 1 < config.levels() {
            true => Some(Conv2d::load(&weights.pp("downsamplers.0.conv"), channels, channels, 3, 1)?.halving()),
            false => None,
        };
        blocks.push(DownBlock { layers, downsampler });
    }
    Ok(blocks)
}

/// Layer `layer` of a block, with the tensors `resnets.{layer}` and, where it has a transformer, `attentions.{layer}`.
fn load_layer(
    weights: &Weights,
    layer: usize,
    channels: (usize, usize),
    transformer: Option<TransformerShape>,
    config: &UNetConfig,
) -> Result<Layer> {
    let resnet = Resnet::load(&weights.pp("resnets").pp(layer), channels, config)?;
    let attentions = weights.pp("attentions").pp(layer);
    let transformer = transformer.map(|shape| Transformer::load(&attentions, &shape, config)).transpose()?;
    Ok(Layer { resnet, transformer })
}

impl DownBlock {
    fn forward(&self, mut x: Tensor, context: &Context<'_>, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        for layer in &self.layers {
            x = layer.forward(&x, context)?;
            skips.push(x.clone());
        }
        if let Some(conv) = &self.downsampler {
            x = conv.forward(&x)?;
            skips.push(x.clone());
        }
        Ok(x)
    }
}

/// `UNetMidBlock2DCrossAttn`.
#[derive(Debug, Clone)]
struct MidBlock {
    before: Layer,
    after: Resnet,
}

impl MidBlock {
    fn load(weights: &Weights, config: &UNetConfig) -> Result<Option<Self>> {
        let Some(shape) = config.mid_transformer() else { return Ok(None) };
        let channels = (shape.channels, shape.channels);
        Ok(Some(Self {
            before: load_layer(weights, 0, channels, Some(shape), config)?,
            after: Resnet::load(&weights.pp("resnets").pp(1), channels, config)?,
        }))
    }

    fn forward(&self, x: &Tensor, context: &Context<'_>) -> Result<Tensor> {
        self.after.forward(&self.before.forward(x, context)?, context.time)
    }
}

/// `UpBlock2D` or `CrossAttnUpBlock2D`: every layer takes the newest skip beside its picture.
#[derive(Debug, Clone)]
struct UpBlock {
    layers: Vec<Layer>,
    upsampler: Option<Conv2d>,
}

/// Blocks in the order in which they run: from the smallest pictures, which have the last entry of
/// `block_out_channels`.
fn load_up_blocks(weights: &Weights, config: &UNetConfig) -> Result<Vec<UpBlock>> {
    let mut skips = config.skip_channels();
    let mut previous = config.block_out_channels[config.levels() - 1];
    let mut blocks = Vec::with_capacity(config.levels());
    for (block, level) in (0..config.levels()).rev().enumerate() {
        let weights = weights.pp("up_blocks").pp(block);
        let channels = config.block_out_channels[level];
        let mut layers = Vec::new();
        for layer in 0..=config.layers(level) {
            let skip = skips.pop().expect("as many skips as layers that take one: this is a bug");
            let transformer = config.up_transformer(block, layer);
            layers.push(load_layer(&weights, layer, (previous + skip, channels), transformer, config)?);
            previous = channels;
        }
        let upsampler = match level > 0 {
            true => Some(Conv2d::load(&weights.pp("upsamplers.0.conv"), channels, channels, 3, 1)?),
            false => None,
        };
        blocks.push(UpBlock { layers, upsampler });
    }
    Ok(blocks)
}

impl UpBlock {
    fn forward(&self, mut x: Tensor, context: &Context<'_>, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        for layer in &self.layers {
            let skip = skips.pop().expect("as many skips as layers that take one: this is a bug");
            x = layer.forward(&cat(&[&x, &skip], 1)?, context)?;
        }
        let (Some(conv), Some(next)) = (&self.upsampler, skips.last()) else { return Ok(x) };
        conv.forward(&upsample_to(&x, next)?)
    }
}

/// Twice the size, or a row or column less where the picture that was halved had an odd number of them: nearest
/// neighbours (`upsample_size` in `UNet2DConditionModel.forward`).
fn upsample_to(x: &Tensor, like: &Tensor) -> Result<Tensor> {
    let ((_, _, h, w), (_, _, wanted_h, wanted_w)) = (x.dims4()?, like.dims4()?);
    let x = upsample_nearest2d(x)?;
    if (wanted_h, wanted_w) == (2 * h, 2 * w) {
        return Ok(x);
    }
    let x = cat(&[&x.narrow(2, 0, wanted_h)?], 2)?;
    Ok(cat(&[&x.narrow(3, 0, wanted_w)?], 3)?)
}

/// `ResnetBlock2D`: two convolutions with the time between them.
#[derive(Debug, Clone)]
struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Linear,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl Resnet {
    fn load(weights: &Weights, (in_channels, out_channels): (usize, usize), config: &UNetConfig) -> Result<Self> {
        let norm = |name: &str, channels: usize| {
            GroupNorm::load(&weights.pp(name), config.norm_num_groups, channels, config.norm_eps)
        };
        let conv_shortcut = match in_channels == out_channels {
            true => None,
            false => Some(Conv2d::load(&weights.pp("conv_shortcut"), in_channels, out_channels, 1, 0)?),
        };
        Ok(Self {
            norm1: norm("norm1", in_channels)?,
            conv1: Conv2d::load(&weights.pp("conv1"), in_channels, out_channels, 3, 1)?,
            time_emb_proj: Linear::load(&weights.pp("time_emb_proj"), config.time_embed_dim(), out_channels)?,
            norm2: norm("norm2", out_channels)?,
            conv2: Conv2d::load(&weights.pp("conv2"), out_channels, out_channels, 3, 1)?,
            conv_shortcut,
        })
    }

    /// `x [b, c, h, w]`, `time [b, time_embed_dim]` (activated).
    fn forward(&self, x: &Tensor, time: &Tensor) -> Result<Tensor> {
        let y = self.conv1.forward(&self.norm1.activated(x)?)?;
        let time = self.time_emb_proj.forward(time)?; // [b, c]
        let y = self.norm2.activated(&sum_channels(&y, &time)?)?;
        let y = self.conv2.forward(&y)?;
        match &self.conv_shortcut {
            Some(conv) => Ok(sum(&conv.forward(x)?, &y)?),
            None => Ok(sum(x, &y)?),
        }
    }
}

/// `Transformer2DModel`: every position of the picture is a token.
#[derive(Debug, Clone)]
struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<Block>,
    proj_out: Linear,
}

impl Transformer {
    fn load(weights: &Weights, shape: &TransformerShape, config: &UNetConfig) -> Result<Self> {
        let projection = |name: &str| match config.use_linear_projection {
            true => Linear::load(&weights.pp(name), shape.channels, shape.channels),
            false => load_pointwise(&weights.pp(name), shape.channels),
        };
        let blocks = weights.pp("transformer_blocks");
        Ok(Self {
            norm: GroupNorm::load(&weights.pp("norm"), config.norm_num_groups, shape.channels, TRANSFORMER_NORM_EPS)?,
            proj_in: projection("proj_in")?,
            blocks: (0..shape.layers).map(|layer| Block::load(&blocks.pp(layer), shape)).collect::<Result<_>>()?,
            proj_out: projection("proj_out")?,
        })
    }

    /// `x [b, c, h, w]`.
    fn forward(&self, x: &Tensor, context: &Context<'_>) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let tokens = transpose(&self.norm.forward(x)?.reshape((b, c, h * w))?)?; // [b, hw, c]
        let mut tokens = self.proj_in.forward(&tokens)?;
        for block in &self.blocks {
            tokens = block.forward(&tokens, context)?;
        }
        let y = transpose(&self.proj_out.forward(&tokens)?)?;
        Ok(sum(x, &y.reshape((b, c, h, w))?)?)
    }
}

/// A convolution of one position is a matrix: `[c, c, 1, 1]`.
fn load_pointwise(weights: &Weights, channels: usize) -> Result<Linear> {
    let kernel = weights.get(&[channels, channels, 1, 1], "weight")?;
    Linear::named(kernel.reshape((channels, channels))?, Some(weights.get(&[channels], "bias")?), weights)
}

/// `BasicTransformerBlock`: attention over the picture, over the text, and a feed-forward network.
#[derive(Debug, Clone)]
struct Block {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    /// `ff.net.0.proj`, whose results are values and gates.
    ff_in: Linear,
    /// `ff.net.2`.
    ff_out: Linear,
}

impl Block {
    fn load(weights: &Weights, shape: &TransformerShape) -> Result<Self> {
        let channels = shape.channels;
        let inner = FEED_FORWARD_RATIO * channels;
        let norm = |name: &str| LayerNorm::load(&weights.pp(name), channels, LAYER_NORM_EPS);
        Ok(Self {
            norm1: norm("norm1")?,
            attn1: Attention::load(&weights.pp("attn1"), shape, channels)?,
            norm2: norm("norm2")?,
            attn2: Attention::load(&weights.pp("attn2"), shape, shape.cross_attention_dim)?,
            norm3: norm("norm3")?,
            ff_in: Linear::load(&weights.pp("ff.net.0.proj"), channels, 2 * inner)?,
            ff_out: Linear::load(&weights.pp("ff.net.2"), inner, channels)?,
        })
    }

    /// `x [b, hw, c]`.
    fn forward(&self, x: &Tensor, context: &Context<'_>) -> Result<Tensor> {
        let y = self.norm1.forward(x)?;
        let x = sum(x, &self.attn1.forward(&y, &y, None)?)?;
        let x = sum(&x, &self.attn2.forward(&self.norm2.forward(&x)?, context.text, context.references)?)?;
        // Two statements: the widest tensor of the block is freed before the second product.
        let inner = geglu(&self.ff_in.forward(&self.norm3.forward(&x)?)?, Gelu::Erf)?;
        Ok(sum(&x, &self.ff_out.forward(&inner)?)?)
    }
}

/// Attention of `x` over itself, or over the text and, beside it, over reference pictures.
#[derive(Debug, Clone)]
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    image: Option<ImageAttention>,
    channels: usize,
    num_heads: usize,
}

impl Attention {
    fn load(weights: &Weights, shape: &TransformerShape, context_dim: usize) -> Result<Self> {
        let channels = shape.channels;
        Ok(Self {
            to_q: Linear::load_no_bias(&weights.pp("to_q"), channels, channels)?,
            to_k: Linear::load_no_bias(&weights.pp("to_k"), context_dim, channels)?,
            to_v: Linear::load_no_bias(&weights.pp("to_v"), context_dim, channels)?,
            to_out: Linear::load(&weights.pp("to_out.0"), channels, channels)?,
            image: None,
            channels,
            num_heads: shape.heads,
        })
    }

    /// `x [b, n, c]` looks at `context [b, l, d]` and at `references`. What it sees in them is added before the output
    /// projection (`IPAdapterAttnProcessor2_0`).
    fn forward(&self, x: &Tensor, context: &Tensor, references: Option<&PreparedReferences>) -> Result<Tensor> {
        let q = self.heads(&self.to_q.forward(x)?)?;
        let mut y = self.look(&q, (&self.to_k, &self.to_v), context)?;
        if let (Some(image), Some(references)) = (&self.image, references) {
            let seen = self.look(&q, (&image.to_k_ip, &image.to_v_ip), &references.tokens)?;
            y = gated_sum(&y, references.gate(self.channels), &seen)?;
        }
        self.to_out.forward(&y)
    }

    /// `q [b, n, heads, head_dim]` looks at `context [b, m, d]`: `[b, n, c]`.
    fn look(&self, q: &Tensor, (to_k, to_v): (&Linear, &Linear), context: &Tensor) -> Result<Tensor> {
        let (k, v) = (self.heads(&to_k.forward(context)?)?, self.heads(&to_v.forward(context)?)?);
        Ok(attention(q, &k, &v, &AttentionOptions::default())?.flatten_from(2)?)
    }

    /// `[b, n, c]` to `[b, n, heads, head_dim]`.
    fn heads(&self, x: &Tensor) -> Result<Tensor> {
        let (b, n, _) = x.dims3()?;
        Ok(x.reshape((b, n, self.num_heads, ()))?)
    }
}

/// Keys and values of reference pictures, whose queries are those of the text.
#[derive(Debug, Clone)]
struct ImageAttention {
    to_k_ip: Linear,
    to_v_ip: Linear,
}

impl ImageAttention {
    fn load(weights: &Weights, context_dim: usize, channels: usize) -> Result<Self> {
        let projection = |name: &str| Linear::load_no_bias(&weights.pp(name), context_dim, channels);
        Ok(Self { to_k_ip: projection("to_k_ip")?, to_v_ip: projection("to_v_ip")? })
    }
}
