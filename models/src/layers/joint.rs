//! Parts of diffusion transformers whose image and text tokens attend to each other (FLUX.1, HunyuanVideo).
//!
//! Owns: modulation by a condition, projections with normed and turned queries and keys, the joint attention, the
//! feed-forward layers. Does not know: how a network makes blocks of them, or where its tokens stand. Source: diffusers
//! `models/normalization.py`, `models/attention.py`, whose tensor names are the ones read here.

use candle_core::Tensor;
use tale_kernels::{AttentionOptions, RopeLayout, attention, gelu_tanh, modulated_layer_norm};

use crate::error::Result;
use crate::layers::{Linear, RmsNorm};
use crate::weights::Weights;

/// Of every norm; the classes do not configure it.
pub const NORM_EPS: f64 = 1e-6;

/// Shifts, scales and gates of a block, from the condition: `linear(condition)` in N parts `[b, 1, dim]`.
#[derive(Debug, Clone)]
pub struct Modulation<const N: usize> {
    linear: Linear,
}

impl<const N: usize> Modulation<N> {
    /// Tensors `linear.*`.
    pub fn load(weights: &Weights, dim: usize) -> Result<Self> {
        Ok(Self { linear: Linear::load(&weights.pp("linear"), dim, N * dim)? })
    }

    /// `condition [b, dim]`, activated already.
    pub fn forward(&self, condition: &Tensor) -> Result<[Tensor; N]> {
        let parts = self.linear.forward(condition)?.unsqueeze(1)?.chunk(N, 2)?;
        Ok(parts.try_into().expect("N times dim splits into N parts: this is a bug"))
    }
}

/// `norm(x) * (1 + scale) + shift`; `x [b, l, dim]`, the others `[b, 1, dim]`.
pub fn modulated(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    Ok(modulated_layer_norm(x, shift, scale, NORM_EPS)?)
}

/// Queries, keys and values of one stream; queries and keys normed per head.
#[derive(Debug, Clone)]
pub struct Projections {
    q: Linear,
    k: Linear,
    v: Linear,
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    num_heads: usize,
}

/// Names of a stream's tensors: query, key and value projection, query and key norm.
pub type ProjectionNames = [&'static str; 5];
/// Of the stream that an attention has first.
pub const OWN: ProjectionNames = ["to_q", "to_k", "to_v", "norm_q", "norm_k"];
/// Of the other one.
pub const ADDED: ProjectionNames = ["add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"];

impl Projections {
    /// Of so many heads of so many values.
    pub fn load(weights: &Weights, num_heads: usize, head_dim: usize, names: ProjectionNames) -> Result<Self> {
        let dim = num_heads * head_dim;
        let [q, k, v, norm_q, norm_k] = names.map(|name| weights.pp(name));
        Ok(Self {
            q: Linear::load(&q, dim, dim)?,
            k: Linear::load(&k, dim, dim)?,
            v: Linear::load(&v, dim, dim)?,
            norm_q: RmsNorm::load(&norm_q, head_dim, NORM_EPS)?,
            norm_k: RmsNorm::load(&norm_k, head_dim, NORM_EPS)?,
            num_heads,
        })
    }

    /// `x [b, l, dim]` to q, k, v `[b, l, heads, head_dim]`, queries and keys turned by `rotations`, which are those of these
    /// tokens.
    pub fn forward(&self, x: &Tensor, rotations: &Rotations) -> Result<[Tensor; 3]> {
        let (b, l, dim) = x.dims3()?;
        let heads = |x: Tensor| x.reshape((b, l, self.num_heads, dim / self.num_heads));
        let q = rotations.rotate(&heads(self.q.forward(x)?)?, &self.norm_q)?;
        let k = rotations.rotate(&heads(self.k.forward(x)?)?, &self.norm_k)?;
        Ok([q, k, heads(self.v.forward(x)?)?])
    }
}

/// Attention of all tokens with all tokens, or with the first `key_lens` of each row: `[b, l, dim]`.
pub fn joint_attention([q, k, v]: &[Tensor; 3], key_lens: Option<&[usize]>) -> Result<Tensor> {
    Ok(attention(q, k, v, &AttentionOptions { key_lens, ..Default::default() })?.flatten_from(2)?)
}

/// By how much the heads of each token are turned. A token with cosines of 1 and sines of 0 is left as it is, bit for bit.
#[derive(Debug)]
pub struct Rotations {
    /// f32 `[l, head_dim / 2]`.
    pub cos: Tensor,
    /// f32 `[l, head_dim / 2]`.
    pub sin: Tensor,
}

impl Rotations {
    /// Of some of the tokens.
    pub fn narrow(&self, start: usize, len: usize) -> Result<Self> {
        Ok(Self { cos: self.cos.narrow(0, start, len)?, sin: self.sin.narrow(0, start, len)? })
    }

    /// `x [b, l, heads, head_dim]`, each head normed and then turned.
    fn rotate(&self, x: &Tensor, norm: &RmsNorm) -> Result<Tensor> {
        norm.rotated(x, &self.cos, &self.sin, RopeLayout::Interleaved)
    }
}

/// `net.2(gelu(net.0.proj x))`.
#[derive(Debug, Clone)]
pub struct FeedForward {
    proj: Linear,
    out: Linear,
}

impl FeedForward {
    /// `inner`: width between the layers.
    pub fn load(weights: &Weights, dim: usize, inner: usize) -> Result<Self> {
        let net = weights.pp("net");
        Ok(Self { proj: Linear::load(&net.pp("0.proj"), dim, inner)?, out: Linear::load(&net.pp(2), inner, dim)? })
    }

    /// `[b, l, dim]` to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.out.forward(&gelu_tanh(&self.proj.forward(x)?)?)
    }
}
