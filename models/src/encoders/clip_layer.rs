//! One layer of CLIP's transformers, the same for texts and pictures.
//!
//! Owns: attention and feed-forward network between their norms. Does not know: what its vectors stand for. Source:
//! transformers `models/clip/modeling_clip.py`, `CLIPEncoderLayer`.

use std::path::Path;

use candle_core::{DType, Tensor};
use serde::Deserialize;
use tale_kernels::{AttentionOptions, attention, gelu_erf, quick_gelu};

use crate::error::{Error, Result};
use crate::layers::{LayerNorm, Linear};
use crate::weights::Weights;

/// `hidden_act`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClipActivation {
    /// `x * sigmoid(1.702 x)`, OpenAI's CLIP.
    #[default]
    QuickGelu,
    /// The exact one, OpenCLIP.
    Gelu,
}

/// What decides about a layer; names as in `config.json`.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct ClipLayerConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_attention_heads: usize,
    pub hidden_act: ClipActivation,
    pub layer_norm_eps: f64,
    /// Whether a vector looks only at those before it and at itself, as in texts.
    pub causal: bool,
}

impl ClipLayerConfig {
    /// Refuses sizes that contradict each other. `path` is named in the error.
    pub fn check(&self, path: &Path) -> Result<()> {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        if heads == 0 || hidden == 0 || !hidden.is_multiple_of(heads) {
            return Err(Error::checkpoint(path, format!("hidden_size {hidden} is no multiple of {heads} heads")));
        }
        Ok(())
    }

    /// Bytes that `l` vectors need at their peak in `dtype`: what the heads or the inner vectors take, and the residual
    /// with its normed copy.
    pub fn forward_bytes(&self, l: usize, dtype: DType) -> usize {
        let inner = (2 * self.intermediate_size).max(5 * self.hidden_size);
        l * (3 * self.hidden_size + inner) * dtype.size_in_bytes()
    }
}

/// `CLIPEncoderLayer`.
#[derive(Debug, Clone)]
pub struct ClipLayer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    config: ClipLayerConfig,
}

impl ClipLayer {
    /// Tensors `layer_norm{1,2}.*`, `self_attn.{q,k,v,out}_proj.*`, `mlp.fc{1,2}.*`.
    pub fn load(weights: &Weights, config: &ClipLayerConfig) -> Result<Self> {
        let (hidden, inner, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let (attention, mlp) = (weights.pp("self_attn"), weights.pp("mlp"));
        let projection = |name: &str| Linear::load(&attention.pp(name), hidden, hidden);
        Ok(Self {
            layer_norm1: LayerNorm::load(&weights.pp("layer_norm1"), hidden, eps)?,
            q_proj: projection("q_proj")?,
            k_proj: projection("k_proj")?,
            v_proj: projection("v_proj")?,
            out_proj: projection("out_proj")?,
            layer_norm2: LayerNorm::load(&weights.pp("layer_norm2"), hidden, eps)?,
            fc1: Linear::load(&mlp.pp("fc1"), hidden, inner)?,
            fc2: Linear::load(&mlp.pp("fc2"), inner, hidden)?,
            config: *config,
        })
    }

    /// `x [b, l, hidden_size]` to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = (x + self.attention(&self.layer_norm1.forward(x)?)?)?;
        let inner = self.fc1.forward(&self.layer_norm2.forward(&x)?)?;
        let inner = match self.config.hidden_act {
            ClipActivation::QuickGelu => quick_gelu(&inner)?,
            ClipActivation::Gelu => gelu_erf(&inner)?,
        };
        Ok((x + self.fc2.forward(&inner)?)?)
    }

    fn attention(&self, x: &Tensor) -> Result<Tensor> {
        let (b, l, hidden) = x.dims3()?;
        let num_heads = self.config.num_attention_heads;
        let heads = |x: Tensor| x.reshape((b, l, num_heads, hidden / num_heads));
        let (q, k, v) =
            (heads(self.q_proj.forward(x)?)?, heads(self.k_proj.forward(x)?)?, heads(self.v_proj.forward(x)?)?);
        let y = attention(&q, &k, &v, &AttentionOptions { causal: self.config.causal, ..Default::default() })?;
        self.out_proj.forward(&y.reshape((b, l, hidden))?)
    }
}
