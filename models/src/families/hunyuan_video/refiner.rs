//! The text on its way into the transformer of HunyuanVideo: tokens that look at each other, told of the timestep and of
//! their mean.
//!
//! Owns: the token refiner. Does not know: where the text comes from, the video. Source: diffusers
//! `models/transformers/transformer_hunyuan_video.py`, `HunyuanVideoTokenRefiner`.

use candle_core::{DType, Tensor};
use tale_kernels::{AttentionOptions, attention, gated_sum, silu};

use super::config::{HunyuanVideoConfig, REFINER_MLP_RATIO, TIME_CHANNELS};
use crate::error::Result;
use crate::layers::joint::NORM_EPS;
use crate::layers::timesteps::{ConditionEmbedder, sinusoidal};
use crate::layers::{LayerNorm, Linear};
use crate::weights::Weights;

/// `HunyuanVideoTokenRefiner`.
pub(super) struct TokenRefiner {
    timestep_embedder: ConditionEmbedder,
    text_embedder: ConditionEmbedder,
    proj_in: Linear,
    refiner_blocks: Vec<Block>,
}

impl TokenRefiner {
    pub(super) fn load(weights: &Weights, config: &HunyuanVideoConfig) -> Result<Self> {
        let (dim, text_dim) = (config.dim(), config.text_embed_dim);
        let embed = weights.pp("time_text_embed");
        let blocks = weights.pp("token_refiner").pp("refiner_blocks");
        let mut refiner_blocks = Vec::with_capacity(config.num_refiner_layers);
        for layer in 0..config.num_refiner_layers {
            refiner_blocks.push(Block::load(&blocks.pp(layer), config)?);
        }
        Ok(Self {
            timestep_embedder: ConditionEmbedder::load(&embed.pp("timestep_embedder"), TIME_CHANNELS, dim)?,
            text_embedder: ConditionEmbedder::load(&embed.pp("text_embedder"), text_dim, dim)?,
            proj_in: Linear::load(&weights.pp("proj_in"), text_dim, dim)?,
            refiner_blocks,
        })
    }

    /// `text [n, lt, text_embed_dim]`, of which the first `lens[i]` tokens of row i count, to `[n, lt, dim]`. Nobody may
    /// look at what becomes of the others.
    pub(super) fn forward(&self, text: &Tensor, lens: &[usize], timesteps: &[f32]) -> Result<Tensor> {
        let time = self.timestep_embedder.forward(&sinusoidal(timesteps, TIME_CHANNELS, text.device())?)?;
        let condition = silu(&(time + self.text_embedder.forward(&means(text, lens)?)?)?)?; // [n, dim]
        let text_len = text.dim(1)?;
        let key_lens = lens.iter().any(|len| *len < text_len).then_some(lens);
        let mut x = self.proj_in.forward(text)?;
        for block in &self.refiner_blocks {
            x = block.forward(&x, &condition, key_lens)?;
        }
        Ok(x)
    }
}

/// The mean of the first `lens[i]` tokens of each row `[n, width]`, summed in f32.
fn means(text: &Tensor, lens: &[usize]) -> Result<Tensor> {
    let mut means = Vec::with_capacity(lens.len());
    for (row, len) in lens.iter().enumerate() {
        let counted = text.narrow(0, row, 1)?.narrow(1, 0, *len)?.to_dtype(DType::F32)?;
        means.push((counted.sum(1)? / *len as f64)?.to_dtype(text.dtype())?);
    }
    Ok(Tensor::cat(&means, 0)?)
}

/// `HunyuanVideoIndividualTokenRefinerBlock`: only its gates know the condition.
struct Block {
    norm1: LayerNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    norm2: LayerNorm,
    /// With a SiLU between them.
    ff: [Linear; 2],
    /// From the condition to both gates.
    gates: Linear,
    num_heads: usize,
}

impl Block {
    fn load(weights: &Weights, config: &HunyuanVideoConfig) -> Result<Self> {
        let (dim, attn, net) = (config.dim(), weights.pp("attn"), weights.pp("ff").pp("net"));
        let projection = |name: &str| Linear::load(&attn.pp(name), dim, dim);
        Ok(Self {
            norm1: LayerNorm::load(&weights.pp("norm1"), dim, NORM_EPS)?,
            to_q: projection("to_q")?,
            to_k: projection("to_k")?,
            to_v: projection("to_v")?,
            to_out: projection("to_out.0")?,
            norm2: LayerNorm::load(&weights.pp("norm2"), dim, NORM_EPS)?,
            ff: [
                Linear::load(&net.pp("0.proj"), dim, REFINER_MLP_RATIO * dim)?,
                Linear::load(&net.pp(2), REFINER_MLP_RATIO * dim, dim)?,
            ],
            gates: Linear::load(&weights.pp("norm_out").pp("linear"), dim, 2 * dim)?,
            num_heads: config.num_attention_heads,
        })
    }

    /// `x [n, lt, dim]` to the same; `condition [n, dim]`, activated.
    fn forward(&self, x: &Tensor, condition: &Tensor, key_lens: Option<&[usize]>) -> Result<Tensor> {
        let gates = self.gates.forward(condition)?.unsqueeze(1)?.chunk(2, 2)?; // each [n, 1, dim]
        let x = gated_sum(x, &gates[0], &self.attention(&self.norm1.forward(x)?, key_lens)?)?;
        let y = silu(&self.ff[0].forward(&self.norm2.forward(&x)?)?)?;
        Ok(gated_sum(&x, &gates[1], &self.ff[1].forward(&y)?)?)
    }

    fn attention(&self, x: &Tensor, key_lens: Option<&[usize]>) -> Result<Tensor> {
        let (n, l, _) = x.dims3()?;
        let heads = |x: Tensor| x.reshape((n, l, self.num_heads, ()));
        let (q, k, v) = (heads(self.to_q.forward(x)?)?, heads(self.to_k.forward(x)?)?, heads(self.to_v.forward(x)?)?);
        let options = AttentionOptions { key_lens, ..Default::default() };
        self.to_out.forward(&attention(&q, &k, &v, &options)?.flatten_from(2)?)
    }
}
