//! The transformer of CogVideoX: noisy latents and text, in one stream whose two parts are modulated apart, to a
//! prediction.
//!
//! Owns: the network and its patches. Does not know: checkpoints, requests, the denoising loop; where tokens stand
//! (`positions`). Source: diffusers `models/transformers/cogvideox_transformer_3d.py`, `models/normalization.py`
//! (`CogVideoXLayerNormZero`, `AdaLayerNorm`).

use candle_core::{DType, Device, Tensor};
use tale_kernels::{AttentionOptions, attention, gated_sum, gelu_tanh, modulated_layer_norm, rope_interleaved, silu};

use super::config::{CogVideoXConfig, MLP_RATIO};
use super::positions::{Positions, Rotations};
use crate::error::Result;
use crate::layers::timesteps::{ConditionEmbedder, sinusoidal};
use crate::layers::{LayerNorm, Linear};
use crate::runner::diffusion::block_cache::{Blocks, RowCache, select, through_blocks};
use crate::weights::Weights;

/// Of the norms of queries and keys; the class does not configure it.
const QK_NORM_EPS: f64 = 1e-6;
/// What the embedding of offsets is told, always (`CogVideoXImageToVideoPipeline.__call__`).
const OFS: f32 = 2.0;

/// What the transformer sees in one pass over `n` rows.
pub struct CogVideoXInput<'a> {
    /// f32 `[n, frames, in_channels, height, width]`: the latents, and behind their channels those of a picture where there
    /// is one.
    pub latents: &'a Tensor,
    /// 0..1000, one per row.
    pub timesteps: &'a [f32],
    /// `[n, s, text_embed_dim]` in the compute dtype.
    pub text: &'a Tensor,
    /// Of all tokens, where any are turned: [`CogVideoXTransformer::rotations`].
    pub rotations: Option<&'a Rotations>,
}

/// `CogVideoXTransformer3DModel`.
pub struct CogVideoXTransformer {
    patch_proj: Linear,
    text_proj: Linear,
    positions: Positions,
    time_embedding: ConditionEmbedder,
    ofs_embedding: Option<ConditionEmbedder>,
    blocks: Vec<Block>,
    norm_final: FinalNorm,
    norm_out: Modulation,
    proj_out: Linear,
    compute_dtype: DType,
    device: Device,
    config: CogVideoXConfig,
}

impl CogVideoXTransformer {
    /// Tensors as diffusers names them.
    pub fn load(weights: &Weights, config: &CogVideoXConfig) -> Result<Self> {
        let dim = config.dim();
        let patch_embed = weights.pp("patch_embed");
        let time_dim = config.time_embed_dim;
        let mut blocks = Vec::with_capacity(config.num_layers);
        for layer in 0..config.num_layers {
            blocks.push(Block::load(&weights.pp("transformer_blocks").pp(layer), config)?);
        }
        let ofs = |width: usize| ConditionEmbedder::load(&weights.pp("ofs_embedding"), width, width);
        Ok(Self {
            patch_proj: load_patch_proj(&patch_embed.pp("proj"), config)?,
            text_proj: Linear::load(&patch_embed.pp("text_proj"), config.text_embed_dim, dim)?,
            positions: Positions::load(&patch_embed, config)?,
            time_embedding: ConditionEmbedder::load(&weights.pp("time_embedding"), dim, time_dim)?,
            ofs_embedding: config.ofs_embed_dim.map(ofs).transpose()?,
            blocks,
            norm_final: FinalNorm::load(&weights.pp("norm_final"), config)?,
            norm_out: Modulation::load(&weights.pp("norm_out"), config, OUT_PARTS)?,
            proj_out: Linear::load(&weights.pp("proj_out"), dim, config.out_channels * config.patch_values())?,
            compute_dtype: weights.placement().compute_dtype,
            device: weights.placement().device.clone(),
            config: config.clone(),
        })
    }

    /// By how much tokens are turned, of latents of so many frames, rows and columns behind so many tokens of text. The same in
    /// all steps.
    pub fn rotations(&self, latents: [usize; 3], text: usize) -> Result<Option<Rotations>> {
        self.positions.rotations(self.config.grid(latents), text, &self.config, &self.device)
    }

    /// The prediction, f32 `[n, frames, out_channels, height, width]`.
    pub fn forward(&self, input: &CogVideoXInput<'_>) -> Result<Tensor> {
        self.forward_through(input, None)
    }

    /// As [`CogVideoXTransformer::forward`], where the rows that their caches answer skip blocks.
    pub fn forward_cached(&self, input: &CogVideoXInput<'_>, caches: &mut [RowCache<'_>]) -> Result<Tensor> {
        self.forward_through(input, Some(caches))
    }

    fn forward_through(&self, input: &CogVideoXInput<'_>, caches: Option<&mut [RowCache<'_>]>) -> Result<Tensor> {
        let (_, frames, _, height, width) = input.latents.dims5()?;
        let grid = self.config.grid([frames, height, width]);
        let time = self.condition(input.timesteps)?; // [n, time_embed_dim]
        let condition = silu(&time)?;
        let mut text = self.text_proj.forward(input.text)?; // [n, s, dim]
        let patches = |latents: &Tensor| self.patches(&latents.to_dtype(self.compute_dtype)?, grid);
        let mut video = self.patch_proj.forward(&patches(input.latents)?)?; // [n, l, dim]
        if let Some(table) = self.positions.table(grid, &self.config, &self.device)? {
            video = video.broadcast_add(&table.video.to_dtype(self.compute_dtype)?)?;
            if let Some(of_text) = &table.text {
                text = text.broadcast_add(of_text)?;
            }
        }
        let rotations = input.rotations;
        video = match caches {
            None => all_through(&self.blocks, text, video, &condition, rotations)?,
            Some(caches) => {
                let streams =
                    Streams { blocks: &self.blocks, text, video, time, condition: condition.clone(), rotations };
                through_blocks(caches, streams)?
            }
        };
        video = self.norm_final.forward(&video)?;
        let parts = self.norm_out.forward(&condition)?;
        video = self.norm_out.modulated(&video, &parts, 0)?;
        self.unpatched(&self.proj_out.forward(&video)?.to_dtype(DType::F32)?, grid)
    }

    /// What all blocks are told of the timesteps, before its activation: `[n, time_embed_dim]`.
    fn condition(&self, timesteps: &[f32]) -> Result<Tensor> {
        let time = self.time_embedding.forward(&sinusoidal(timesteps, self.config.dim(), &self.device)?)?;
        match (&self.ofs_embedding, self.config.ofs_embed_dim) {
            (Some(embedding), Some(width)) => {
                let ofs = embedding.forward(&sinusoidal(&[OFS], width, &self.device)?)?; // [1, time_embed_dim]
                Ok(time.broadcast_add(&ofs)?)
            }
            _ => Ok(time),
        }
    }

    /// `[n, frames, channels, height, width]` to `[n, l, channels * pt * p * p]`, tokens in the order frame, row, column.
    fn patches(&self, x: &Tensor, [frames, rows, columns]: [usize; 3]) -> Result<Tensor> {
        let (n, channels, p, pt) = (x.dim(0)?, x.dim(2)?, self.config.patch_size, self.config.patch_frames());
        let x = x.reshape(vec![n, frames, pt, channels, rows, p, columns, p])?;
        let x = x.permute(vec![0, 1, 4, 6, 3, 2, 5, 7])?.contiguous()?; // [n, frames, rows, columns, channels, pt, p, p]
        Ok(x.reshape((n, frames * rows * columns, channels * pt * p * p))?)
    }

    /// `[n, l, channels * pt * p * p]` to `[n, frames, channels, height, width]`.
    fn unpatched(&self, x: &Tensor, [frames, rows, columns]: [usize; 3]) -> Result<Tensor> {
        let (n, p, pt) = (x.dim(0)?, self.config.patch_size, self.config.patch_frames());
        let channels = self.config.out_channels;
        let x = x.reshape(vec![n, frames, rows, columns, channels, pt, p, p])?;
        let x = x.permute(vec![0, 1, 5, 4, 2, 6, 3, 7])?.contiguous()?; // [n, frames, pt, channels, rows, p, columns, p]
        Ok(x.reshape((n, frames * pt, channels, rows * p, columns * p))?)
    }
}

/// Both parts of the stream through these blocks: the video, `[n, l, dim]`.
fn all_through(
    blocks: &[Block],
    mut text: Tensor,
    mut video: Tensor,
    condition: &Tensor,
    rotations: Option<&Rotations>,
) -> Result<Tensor> {
    for block in blocks {
        (text, video) = block.forward(text, video, condition, rotations)?;
    }
    Ok(video)
}

/// Tokens of some rows before the blocks that are ahead of them.
struct Streams<'a> {
    blocks: &'a [Block],
    text: Tensor,
    video: Tensor,
    /// `[n, time_embed_dim]`, before its activation and after it.
    time: Tensor,
    condition: Tensor,
    rotations: Option<&'a Rotations>,
}

impl Blocks for Streams<'_> {
    fn entered(&self) -> &Tensor {
        &self.video
    }

    /// The embedded timestep (TeaCache4CogVideoX1.5).
    fn signal(&self) -> Result<Tensor> {
        Ok(self.time.clone())
    }

    fn pass_first(&mut self) -> Result<Tensor> {
        let (first, others) = self.blocks.split_first().expect("models of one block are refused: this is a bug");
        let (text, video) = (self.text.clone(), self.video.clone());
        (self.text, self.video) = first.forward(text, video, &self.condition, self.rotations)?;
        self.blocks = others;
        Ok(self.video.clone())
    }

    fn pass_rest(self, rows: &[usize]) -> Result<Tensor> {
        let Self { blocks, text, video, condition, rotations, .. } = self;
        let (text, video, condition) = (select(&text, rows)?, select(&video, rows)?, select(&condition, rows)?);
        all_through(blocks, text, video, &condition, rotations)
    }
}

/// A convolution whose stride is its kernel, or with patches over time a matrix: both are products over patches.
fn load_patch_proj(weights: &Weights, config: &CogVideoXConfig) -> Result<Linear> {
    let (dim, channels, p) = (config.dim(), config.in_channels, config.patch_size);
    let width = channels * config.patch_values();
    match config.patch_size_t {
        // It has a bias whatever `patch_bias` says.
        Some(_) => Linear::load(weights, width, dim),
        None => {
            let kernel = weights.get(&[dim, channels, p, p], "weight")?.reshape((dim, width))?;
            let bias = config.patch_bias.then(|| weights.get(&[dim], "bias")).transpose()?;
            Ok(Linear::new(kernel, bias))
        }
    }
}

/// A layer norm, which has factors and terms where the configuration says so.
struct FinalNorm {
    affine: Option<LayerNorm>,
    eps: f64,
}

impl FinalNorm {
    fn load(weights: &Weights, config: &CogVideoXConfig) -> Result<Self> {
        let load = || LayerNorm::load(weights, config.dim(), config.norm_eps);
        Ok(Self { affine: config.norm_elementwise_affine.then(load).transpose()?, eps: config.norm_eps })
    }

    /// `[n, l, dim]` to the same shape.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.affine {
            Some(norm) => norm.forward(x),
            None => Ok(tale_kernels::layer_norm(x, None, None, self.eps)?),
        }
    }
}

/// A norm, and the layer that makes its shifts and scales, and gates, of the condition.
struct Modulation {
    linear: Linear,
    /// Vectors of the layer's answer.
    parts: usize,
    /// The norm's own factors and terms, f32 `[1, 1, dim]`.
    affine: Option<[Tensor; 2]>,
    eps: f64,
}

/// Of a block: shift, scale and gate of the video, then of the text.
const BLOCK_PARTS: usize = 6;
const OF_VIDEO: usize = 0;
const OF_TEXT: usize = 3;
const GATE: usize = 2;
/// Of the last norm: shift and scale.
const OUT_PARTS: usize = 2;

impl Modulation {
    fn load(weights: &Weights, config: &CogVideoXConfig, parts: usize) -> Result<Self> {
        let dim = config.dim();
        let vector = |name: &str| -> Result<Tensor> {
            Ok(weights.pp("norm").get(&[dim], name)?.to_dtype(DType::F32)?.reshape((1, 1, dim))?)
        };
        Ok(Self {
            linear: Linear::load(&weights.pp("linear"), config.time_embed_dim, parts * dim)?,
            parts,
            affine: match config.norm_elementwise_affine {
                true => Some([vector("weight")?, vector("bias")?]),
                false => None,
            },
            eps: config.norm_eps,
        })
    }

    /// `[n, parts, dim]` in f32, of the activated condition `[n, time_embed_dim]`.
    fn forward(&self, condition: &Tensor) -> Result<Tensor> {
        let parts = self.linear.forward(condition)?.to_dtype(DType::F32)?;
        Ok(parts.reshape((condition.dim(0)?, self.parts, ()))?)
    }

    /// `norm(x) * (1 + scale) + shift` with shift and scale from `first` on of the parts `[n, parts, dim]` in f32. The
    /// norm's own factors and terms become a part of them.
    fn modulated(&self, x: &Tensor, parts: &Tensor, first: usize) -> Result<Tensor> {
        let (mut shift, mut scale) = (parts.narrow(1, first, 1)?, parts.narrow(1, first + 1, 1)?);
        if let Some([weight, bias]) = &self.affine {
            let factor = (scale + 1.0)?;
            shift = (factor.broadcast_mul(bias)? + shift)?;
            scale = (factor.broadcast_mul(weight)? - 1.0)?;
        }
        let dtype = x.dtype();
        Ok(modulated_layer_norm(x, &shift.to_dtype(dtype)?, &scale.to_dtype(dtype)?, self.eps)?)
    }
}

/// `CogVideoXBlock`.
struct Block {
    norm1: Modulation,
    attn1: Attention,
    norm2: Modulation,
    ff: [Linear; 2],
}

impl Block {
    fn load(weights: &Weights, config: &CogVideoXConfig) -> Result<Self> {
        let (dim, net) = (config.dim(), weights.pp("ff").pp("net"));
        Ok(Self {
            norm1: Modulation::load(&weights.pp("norm1"), config, BLOCK_PARTS)?,
            attn1: Attention::load(&weights.pp("attn1"), config)?,
            norm2: Modulation::load(&weights.pp("norm2"), config, BLOCK_PARTS)?,
            ff: [
                Linear::load(&net.pp(0).pp("proj"), dim, MLP_RATIO * dim)?,
                Linear::load(&net.pp(2), MLP_RATIO * dim, dim)?,
            ],
        })
    }

    /// `text [n, s, dim]` and `video [n, l, dim]`; `condition [n, time_embed_dim]`.
    fn forward(
        &self,
        text: Tensor,
        video: Tensor,
        condition: &Tensor,
        rotations: Option<&Rotations>,
    ) -> Result<(Tensor, Tensor)> {
        let attend = |x: &Tensor| self.attn1.forward(x, rotations);
        let (text, video) = through(&self.norm1, text, video, condition, attend)?;
        through(&self.norm2, text, video, condition, |x| {
            // Two statements: the widest tensor of the block is freed before the second product.
            let hidden = gelu_tanh(&self.ff[0].forward(x)?)?;
            self.ff[1].forward(&hidden)
        })
    }
}

/// Both parts of the stream with what `layers` add to them, which see both as `[n, s + l, dim]`, normed and modulated.
fn through(
    modulation: &Modulation,
    text: Tensor,
    video: Tensor,
    condition: &Tensor,
    layers: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<(Tensor, Tensor)> {
    let parts = modulation.forward(condition)?;
    let (s, l) = (text.dim(1)?, video.dim(1)?);
    let mut y = {
        let text = modulation.modulated(&text, &parts, OF_TEXT)?;
        let video = modulation.modulated(&video, &parts, OF_VIDEO)?;
        Tensor::cat(&[text, video], 1)?
    };
    y = layers(&y)?;
    let gated = |x: &Tensor, of: usize, start: usize, len: usize| -> Result<Tensor> {
        let gate = parts.narrow(1, of + GATE, 1)?.to_dtype(x.dtype())?;
        Ok(gated_sum(x, &gate, &y.narrow(1, start, len)?.contiguous()?)?)
    };
    Ok((gated(&text, OF_TEXT, 0, s)?, gated(&video, OF_VIDEO, s, l)?))
}

/// Attention of all tokens with all tokens, queries and keys normed per head.
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    norm_q: LayerNorm,
    norm_k: LayerNorm,
    num_heads: usize,
}

impl Attention {
    fn load(weights: &Weights, config: &CogVideoXConfig) -> Result<Self> {
        let dim = config.dim();
        let projection = |name: &str| match config.attention_bias {
            true => Linear::load(&weights.pp(name), dim, dim),
            false => Linear::load_no_bias(&weights.pp(name), dim, dim),
        };
        let norm = |name: &str| LayerNorm::load(&weights.pp(name), config.attention_head_dim, QK_NORM_EPS);
        Ok(Self {
            to_q: projection("to_q")?,
            to_k: projection("to_k")?,
            to_v: projection("to_v")?,
            to_out: Linear::load(&weights.pp("to_out").pp(0), dim, dim)?,
            norm_q: norm("norm_q")?,
            norm_k: norm("norm_k")?,
            num_heads: config.num_attention_heads,
        })
    }

    /// `x [n, s + l, dim]`.
    fn forward(&self, x: &Tensor, rotations: Option<&Rotations>) -> Result<Tensor> {
        let q = self.normed(&self.to_q.forward(x)?, &self.norm_q, rotations)?;
        let k = self.normed(&self.to_k.forward(x)?, &self.norm_k, rotations)?;
        let v = self.heads(&self.to_v.forward(x)?)?;
        let y = attention(&q, &k, &v, &AttentionOptions::default())?.flatten_from(2)?;
        self.to_out.forward(&y)
    }

    /// `[n, l, dim]` to `[n, l, heads, head_dim]`, normed and turned.
    fn normed(&self, x: &Tensor, norm: &LayerNorm, rotations: Option<&Rotations>) -> Result<Tensor> {
        let x = norm.forward(&self.heads(x)?)?;
        match rotations {
            Some(Rotations { cos, sin }) => Ok(rope_interleaved(&x, cos, sin)?),
            None => Ok(x),
        }
    }

    /// `[n, l, dim]` to `[n, l, heads, head_dim]`.
    fn heads(&self, x: &Tensor) -> Result<Tensor> {
        let (n, l, _) = x.dims3()?;
        Ok(x.reshape((n, l, self.num_heads, ()))?)
    }
}
