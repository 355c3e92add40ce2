//! The decoder-only transformer that Llama and Qwen2 share: RMS norms before each half, grouped-query attention with
//! rotary positions over a paged KV cache, a gated SiLU feed-forward.
//!
//! The published blocks of these families are the same but for which projections have biases, so there is one block
//! here and a [`DecoderConfig`] that each family fills from its own `config.json`. Deliberately does not know: which
//! family it computes, sessions, sampling. Activations are `[l, hidden_size]`: the rows of all sequences of a step, one
//! after the other, without a batch dimension.

use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::Value;
use tale_kernels::{PagedBatch, PreparedBatch};

use crate::error::{Error, Result};
use crate::kv::{BLOCK_SIZE, BlockTable, KvCaches, KvShape, LayerCache};
use crate::layers::rope::Rope;
use crate::layers::{Embedding, Linear, RmsNorm};
use crate::weights::Weights;
use crate::work::{StepWork, attention_flops, linear_flops};

mod recorded;

pub use recorded::DecodeRecordings;

/// Sizes and switches, named as in `config.json`.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct DecoderConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases in the feed-forward.
    pub mlp_bias: bool,
    pub rope: Rope,
}

/// Bounds on what a configuration may claim, so that products of sizes do not overflow.
const MAX_SIZE: usize = 1 << 22;
const MAX_LAYERS: usize = 1 << 12;
const MAX_POSITIONS: usize = 1 << 28;

/// Refuses what changes the block itself: another activation, quantised matrices. `path` is the `config.json`'s.
pub fn check_plain(path: &Path, hidden_act: &str, quantization_config: Option<&Value>) -> Result<()> {
    if hidden_act != "silu" {
        return Err(Error::checkpoint(path, format!("hidden_act: `{hidden_act}` is not supported; known: silu")));
    }
    match quantization_config {
        None | Some(Value::Null) => Ok(()),
        Some(_) => Err(Error::checkpoint(path, "quantization_config: quantised checkpoints are not read")),
    }
}

impl DecoderConfig {
    /// Refuses sizes that cannot be computed with, naming the field; `path` is the `config.json`'s.
    pub fn check(&self, path: &Path) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size, MAX_SIZE),
            ("hidden_size", self.hidden_size, MAX_SIZE),
            ("intermediate_size", self.intermediate_size, MAX_SIZE),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MAX_SIZE),
            ("num_key_value_heads", self.num_key_value_heads, MAX_SIZE),
            ("head_dim", self.head_dim, MAX_SIZE),
            ("max_position_embeddings", self.max_position_embeddings, MAX_POSITIONS),
        ];
        for (field, size, max) in sizes {
            if size == 0 || size > max {
                return Err(Error::checkpoint(path, format!("{field}: is {size}; allowed: 1 to {max}")));
            }
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            let problem = format!("num_key_value_heads: {kv_heads} does not divide num_attention_heads, {heads}");
            return Err(Error::checkpoint(path, problem));
        }
        if !self.head_dim.is_multiple_of(2) {
            let problem = format!("head_dim: {} is odd and cannot be rotated in pairs", self.head_dim);
            return Err(Error::checkpoint(path, problem));
        }
        Ok(())
    }

    /// Most tokens of prompt and answer together.
    pub fn context_len(&self) -> usize {
        self.rope.context_len(self.max_position_embeddings).min(MAX_POSITIONS)
    }

    /// Operations of a step.
    pub fn flops(&self, sizes: &StepSizes) -> f64 {
        let (hidden, attention) = (self.hidden_size, self.num_attention_heads * self.head_dim);
        let kv = self.num_key_value_heads * self.head_dim;
        let matrices = hidden * (2 * attention + 2 * kv + 3 * self.intermediate_size);
        let layer = linear_flops(sizes.rows, matrices) + attention_flops(sizes.attended as f64, attention);
        self.num_hidden_layers as f64 * layer + linear_flops(sizes.logit_rows, self.vocab_size * hidden)
    }

    /// What the KV cache of one token consists of.
    pub fn kv_shape(&self) -> KvShape {
        KvShape {
            num_layers: self.num_hidden_layers,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
        }
    }
}

/// The rows of one step: pieces of sequences, one after the other.
#[derive(Debug, Clone, Default)]
pub struct DecoderInput {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    paged: PagedBatch,
    logit_rows: Vec<u32>,
}

impl DecoderInput {
    /// Adds `tokens` of a sequence from position `start` on; keys and values of all earlier positions are in the
    /// cache, and `table` has room for the new ones.
    pub fn push(&mut self, tokens: &[u32], start: usize, table: &BlockTable) {
        let context_len = start + tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.positions.extend(start as u32..context_len as u32);
        self.paged.slot_mapping.extend((start..context_len).map(|position| table.slot(position)));
        self.paged.cu_seqlens_q.push(self.tokens.len());
        self.paged.context_lens.push(context_len);
        self.paged.block_tables.push(table.blocks()[..context_len.div_ceil(BLOCK_SIZE)].to_vec());
    }

    /// Asks for the logits of the row pushed last.
    pub fn want_logits_of_last_row(&mut self) {
        self.logit_rows.push(self.tokens.len() as u32 - 1);
    }

    /// Asks for the logits of all rows, as a comparison with a reference does.
    pub fn want_all_logits(&mut self) {
        self.logit_rows = (0..self.tokens.len() as u32).collect();
    }
}

/// Sizes of a step that decide about its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepSizes {
    /// Tokens that enter.
    pub rows: usize,
    /// Positions that they look at, summed over them: each looks at all before it and at itself.
    pub attended: usize,
    /// Positions of all sequences.
    pub context: usize,
    /// Tokens whose logits are wanted.
    pub logit_rows: usize,
}

impl StepSizes {
    /// Adds `num_tokens` of a sequence from position `start` on.
    pub fn push(&mut self, start: usize, num_tokens: usize, wants_logits: bool) {
        self.rows += num_tokens;
        self.attended += num_tokens * start + num_tokens * (num_tokens + 1) / 2;
        self.context += start + num_tokens;
        self.logit_rows += usize::from(wants_logits);
    }
}

/// The model: tokens in, logits out.
#[derive(Debug)]
pub struct Decoder {
    config: DecoderConfig,
    embed_tokens: Embedding,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    lm_head: Linear,
    /// Bytes of the layers' weights, which every step reads.
    layer_bytes: usize,
    device: Device,
}

impl Decoder {
    /// Tensors `model.*` and `lm_head.weight`, the latter only when the embeddings are not tied.
    pub fn load(weights: &Weights, config: DecoderConfig) -> Result<Self> {
        let (vocab_size, hidden_size) = (config.vocab_size, config.hidden_size);
        let model = weights.pp("model");
        let embed_tokens = Embedding::load(&model.pp("embed_tokens"), vocab_size, hidden_size)?;
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for index in 0..config.num_hidden_layers {
            layers.push(DecoderLayer::load(&model.pp("layers").pp(index), &config)?);
        }
        let layer_bytes = weights.streamed_bytes();
        let norm = RmsNorm::load(&model.pp("norm"), hidden_size, config.rms_norm_eps)?;
        let lm_head = if config.tie_word_embeddings {
            // Some tied checkpoints store the shared table twice.
            weights.ignore("lm_head.weight");
            embed_tokens.as_linear()
        } else {
            Linear::load_no_bias(&weights.pp("lm_head"), hidden_size, vocab_size)?
        };
        let device = weights.placement().device.clone();
        Ok(Self { config, embed_tokens, layers, norm, lm_head, layer_bytes, device })
    }

    /// Least work of a forward pass.
    pub fn work(&self, sizes: &StepSizes) -> StepWork {
        let head_bytes = if sizes.logit_rows > 0 { self.lm_head.weight_bytes() } else { 0 };
        let kv_bytes = self.config.kv_shape().block_bytes(self.embed_tokens.compute_dtype) / BLOCK_SIZE;
        StepWork {
            flops: self.config.flops(sizes),
            bytes: (self.layer_bytes + head_bytes + kv_bytes * sizes.context) as f64,
        }
    }

    /// Its sizes.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Writes the new rows' keys and values into `caches` and computes the logits `[rows, vocab_size]` of the rows
    /// that were asked for, in the order of asking and the compute dtype; `None` when none were.
    pub fn forward(&self, input: &DecoderInput, caches: &KvCaches) -> Result<Option<Tensor>> {
        let prepared = self.prepare(input, caches)?;
        let stream = self.layers(&prepared, caches)?;
        if input.logit_rows.is_empty() { Ok(None) } else { self.logits(&prepared, stream).map(Some) }
    }

    /// Checks the step and takes it to the device.
    fn prepare<'a>(&self, input: &'a DecoderInput, caches: &KvCaches) -> Result<PreparedInput<'a>> {
        let first = caches.layers().first().expect("a checked configuration has layers: this is a bug");
        let (cos, sin) = self.config.rope.cos_sin(&input.positions, &self.device)?;
        let wants_all = input.logit_rows.iter().copied().eq(0..input.tokens.len() as u32);
        let rows = (!wants_all).then(|| Tensor::new(input.logit_rows.as_slice(), &self.device)).transpose()?;
        Ok(PreparedInput {
            tokens: Tensor::new(input.tokens.as_slice(), &self.device)?,
            cos,
            sin,
            paged: input.paged.prepare(self.config.num_attention_heads, &first.k)?,
            logit_rows: rows,
        })
    }

    /// The logits that were asked for, from what is on the device: nothing but launches, so that they can be recorded.
    fn compute(&self, input: &PreparedInput<'_>, caches: &KvCaches) -> Result<Tensor> {
        self.logits(input, self.layers(input, caches)?)
    }

    fn layers(&self, input: &PreparedInput<'_>, caches: &KvCaches) -> Result<Stream> {
        let mut stream = Stream { hidden: self.embed_tokens.forward(&input.tokens)?, pending: None };
        for (layer, cache) in self.layers.iter().zip(caches.layers()) {
            let step = AttentionStep { cos: &input.cos, sin: &input.sin, paged: &input.paged, cache };
            stream = layer.forward(stream, &step)?;
        }
        Ok(stream)
    }

    fn logits(&self, input: &PreparedInput<'_>, stream: Stream) -> Result<Tensor> {
        let stream = match &input.logit_rows {
            Some(rows) => stream.select(rows)?,
            None => stream,
        };
        let (_, normed) = stream.normed_sum(&self.norm)?;
        self.lm_head.forward(&normed)
    }
}

/// A [`DecoderInput`] on its device.
#[derive(Debug)]
struct PreparedInput<'a> {
    /// u32, `[l]`.
    tokens: Tensor,
    /// f32, `[l, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
    paged: PreparedBatch<'a>,
    /// u32; all rows in their order if absent.
    logit_rows: Option<Tensor>,
}

impl PreparedInput<'_> {
    fn into_owned(self) -> PreparedInput<'static> {
        let Self { tokens, cos, sin, paged, logit_rows } = self;
        PreparedInput { tokens, cos, sin, paged: paged.into_owned(), logit_rows }
    }

    /// Whether a recording of this step serves the other one; both want the logits of all rows.
    fn launches_as(&self, other: &PreparedInput<'_>) -> bool {
        self.logit_rows.is_none() && other.logit_rows.is_none() && self.paged.launches_as(&other.paged)
    }

    /// Writes another step's values where this one's lie.
    fn refill(&self, with: &PreparedInput<'_>) -> Result<()> {
        self.tokens.slice_set(&with.tokens, 0, 0)?;
        self.cos.slice_set(&with.cos, 0, 0)?;
        self.sin.slice_set(&with.sin, 0, 0)?;
        Ok(self.paged.refill(&with.paged)?)
    }
}

/// What the attention of one layer needs beside the hidden states.
struct AttentionStep<'a> {
    cos: &'a Tensor,
    sin: &'a Tensor,
    paged: &'a PreparedBatch<'a>,
    cache: &'a LayerCache,
}

#[derive(Debug)]
struct DecoderLayer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

impl DecoderLayer {
    fn load(weights: &Weights, config: &DecoderConfig) -> Result<Self> {
        let norm = |name: &str| RmsNorm::load(&weights.pp(name), config.hidden_size, config.rms_norm_eps);
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::load(&weights.pp("self_attn"), config)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: Mlp::load(&weights.pp("mlp"), config)?,
        })
    }

    /// `[l, hidden_size]` to the same shape.
    fn forward(&self, stream: Stream, step: &AttentionStep<'_>) -> Result<Stream> {
        let (hidden, normed) = stream.normed_sum(&self.input_layernorm)?;
        let attended = self.self_attn.forward(&normed, step)?;
        let (hidden, normed) = self.post_attention_layernorm.forward_sum(&hidden, &attended)?;
        Ok(Stream { hidden, pending: Some(self.mlp.forward(&normed)?) })
    }
}

/// Hidden states `[l, hidden_size]` to which the last feed-forward is yet to be added: the next norm does so on its way.
struct Stream {
    hidden: Tensor,
    pending: Option<Tensor>,
}

impl Stream {
    /// The whole states and their norm.
    fn normed_sum(self, norm: &RmsNorm) -> Result<(Tensor, Tensor)> {
        match self.pending {
            Some(pending) => norm.forward_sum(&self.hidden, &pending),
            None => {
                let normed = norm.forward(&self.hidden)?;
                Ok((self.hidden, normed))
            }
        }
    }

    /// Some of the rows.
    fn select(self, rows: &Tensor) -> Result<Self> {
        let pick = |states: &Tensor| tale_kernels::embedding(rows, states);
        Ok(Self { hidden: pick(&self.hidden)?, pending: self.pending.as_ref().map(pick).transpose()? })
    }
}

#[derive(Debug)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
}

impl Attention {
    fn load(weights: &Weights, config: &DecoderConfig) -> Result<Self> {
        let hidden_size = config.hidden_size;
        let q_size = config.num_attention_heads * config.head_dim;
        let kv_size = config.num_key_value_heads * config.head_dim;
        // Left over in early Llama checkpoints; the configuration says the same.
        weights.ignore("rotary_emb.inv_freq");
        Ok(Self {
            q_proj: load_linear(&weights.pp("q_proj"), hidden_size, q_size, config.qkv_bias)?,
            k_proj: load_linear(&weights.pp("k_proj"), hidden_size, kv_size, config.qkv_bias)?,
            v_proj: load_linear(&weights.pp("v_proj"), hidden_size, kv_size, config.qkv_bias)?,
            o_proj: load_linear(&weights.pp("o_proj"), q_size, hidden_size, config.o_bias)?,
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        })
    }

    /// `[l, hidden_size]` to the same shape.
    fn forward(&self, x: &Tensor, step: &AttentionStep<'_>) -> Result<Tensor> {
        let l = x.dim(0)?;
        let q = self.q_proj.forward(x)?.reshape((l, self.num_attention_heads, self.head_dim))?;
        let k = self.k_proj.forward(x)?.reshape((l, self.num_key_value_heads, self.head_dim))?;
        let v = self.v_proj.forward(x)?.reshape((l, self.num_key_value_heads, self.head_dim))?;
        let q = tale_kernels::rope_half(&q, step.cos, step.sin)?;
        let k = tale_kernels::rope_half(&k, step.cos, step.sin)?;
        let LayerCache { k: k_cache, v: v_cache } = step.cache;
        tale_kernels::write_kv(&k, &v, k_cache, v_cache, step.paged)?;
        let scale = 1.0 / (self.head_dim as f64).sqrt();
        let out = tale_kernels::paged_attention(&q, k_cache, v_cache, step.paged, scale)?;
        // [l, heads, head_dim] to [l, heads * head_dim]
        self.o_proj.forward(&out.reshape((l, self.num_attention_heads * self.head_dim))?)
    }
}

#[derive(Debug)]
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    fn load(weights: &Weights, config: &DecoderConfig) -> Result<Self> {
        let (hidden_size, intermediate_size) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            gate_proj: load_linear(&weights.pp("gate_proj"), hidden_size, intermediate_size, config.mlp_bias)?,
            up_proj: load_linear(&weights.pp("up_proj"), hidden_size, intermediate_size, config.mlp_bias)?,
            down_proj: load_linear(&weights.pp("down_proj"), intermediate_size, hidden_size, config.mlp_bias)?,
        })
    }

    /// `[l, hidden_size]` to the same shape.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gated = tale_kernels::silu_mul(&self.gate_proj.forward(x)?, &self.up_proj.forward(x)?)?;
        self.down_proj.forward(&gated)
    }
}

fn load_linear(weights: &Weights, in_features: usize, out_features: usize, bias: bool) -> Result<Linear> {
    if bias {
        Linear::load(weights, in_features, out_features)
    } else {
        Linear::load_no_bias(weights, in_features, out_features)
    }
}
