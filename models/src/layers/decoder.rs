//! The trunk of the decoder-only transformers that Llama and Qwen2 share: RMS norms before each half, grouped-query
//! attention with rotary positions, a gated SiLU feed-forward. Keys and values lie in a paged cache (a text runner's
//! steps), or a pass has whole sequences and keeps none (text encoders).
//!
//! The published blocks of these families are the same but for which projections have biases, so there is one block
//! here and one reading of `config.json`, to which a family states how its class differs ([`ConfigClass`]). Deliberately
//! does not know: which family it computes, what is made of its hidden states, sessions. Activations are
//! `[l, hidden_size]`: the rows of all sequences, one after the other, without a batch dimension.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use tale_kernels::{AttentionOptions, PagedCache, PreparedBatch};

use crate::error::Result;
use crate::kv::{KvCaches, KvShape};
use crate::layers::{Embedding, Linear, RmsNorm};
use crate::parallel::Rank;
use crate::weights::Weights;

mod config;
mod dense;
mod gguf;
mod rows;
mod split;

#[cfg(test)]
pub(crate) use config::testing;
pub use config::{Biases, ConfigClass, DecoderConfig};
pub use dense::DenseInput;
pub use gguf::{GgufRows, LlamaGgufNames};
pub use rows::{DecoderInput, PreparedInput};
use split::{Split, Summed};

/// The layers between tokens and a head: embedding, blocks, final norm.
#[derive(Debug)]
pub struct Decoder {
    config: DecoderConfig,
    embed_tokens: Embedding,
    layers: Vec<DecoderLayer>,
    /// Absent where layers above are.
    norm: Option<RmsNorm>,
    device: Device,
    /// Where it is a part of one that several devices share.
    rank: Option<Rank>,
}

impl Decoder {
    /// Tensors `embed_tokens.weight`, `layers.*` and `norm.weight`.
    pub fn load(weights: &Weights, config: DecoderConfig) -> Result<Self> {
        Self::load_with_table(weights, &weights.pp("embed_tokens"), config, None)
    }

    /// As [`Decoder::load`], where the tokens' vectors are the `weight` of `table`; of a rank its part, of a configuration that
    /// [`DecoderConfig::check_split`] has found right.
    pub fn load_with_table(
        weights: &Weights,
        table: &Weights,
        config: DecoderConfig,
        rank: Option<&Rank>,
    ) -> Result<Self> {
        let mut decoder = Self::load_layers(weights, table, config.num_hidden_layers, config, rank)?;
        let DecoderConfig { hidden_size, rms_norm_eps, .. } = decoder.config;
        decoder.norm = Some(RmsNorm::load(&weights.pp("norm"), hidden_size, rms_norm_eps)?);
        Ok(decoder)
    }

    /// The lowest `num_layers` of a decoder whose states above theirs nobody wants: the layers above and the final norm stay on
    /// disk, and need not be there.
    pub fn load_lowest(weights: &Weights, num_layers: usize, config: DecoderConfig) -> Result<Self> {
        for index in num_layers..config.num_hidden_layers {
            weights.pp("layers").ignore_below(&index.to_string());
        }
        weights.ignore_below("norm");
        Self::load_layers(weights, &weights.pp("embed_tokens"), num_layers, config, None)
    }

    fn load_layers(
        weights: &Weights,
        table: &Weights,
        num_layers: usize,
        config: DecoderConfig,
        rank: Option<&Rank>,
    ) -> Result<Self> {
        let split = Split(rank);
        let embed_tokens = Embedding::load(&split.outputs(table.clone()), config.vocab_size, config.hidden_size)?;
        let mut layers = Vec::with_capacity(num_layers);
        for index in 0..num_layers {
            layers.push(DecoderLayer::load(&weights.pp("layers").pp(index), &config, split)?);
        }
        let device = weights.placement().device.clone();
        Ok(Self { config, embed_tokens, layers, norm: None, device, rank: rank.cloned() })
    }

    /// The sizes of the whole.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// What the KV cache of one token consists of here.
    pub fn kv_shape(&self) -> KvShape {
        self.config.kv_shape_of(self.split().of())
    }

    fn split(&self) -> Split<'_> {
        Split(self.rank.as_ref())
    }

    /// The output projection onto a table of tokens that is not that of their vectors; of a rank onto its tokens.
    pub fn load_head(&self, weights: &Weights) -> Result<Linear> {
        let head = self.split().outputs(weights.clone());
        Linear::load_no_bias(&head, self.config.hidden_size, self.config.vocab_size)
    }

    /// The table of the tokens' vectors as an output projection (tied embeddings); of a rank onto its tokens.
    pub fn tied_head(&self) -> Linear {
        self.embed_tokens.as_linear()
    }

    /// Checks a step of a text runner and takes it to the device.
    pub fn prepare<'a>(&self, input: &'a DecoderInput, caches: &KvCaches) -> Result<PreparedInput<'a>> {
        if self.rank.is_some() {
            split::check_tokens(input.tokens(), self.config.vocab_size)?;
        }
        let rotation = self.config.rope.cos_sin(input.positions(), &self.device)?;
        PreparedInput::new(input, rotation, self.config.num_attention_heads / self.split().of(), caches)
    }

    /// Writes the new rows' keys and values into `caches`. Returns the last hidden states `[rows, hidden_size]` of the
    /// rows that were asked for, in the order of asking; `None` when none were. Nothing but launches, so that it can be
    /// recorded.
    pub fn paged(&self, input: &PreparedInput<'_>, caches: &KvCaches) -> Result<Option<Tensor>> {
        let mut stream = match &self.rank {
            None => self.embed(&input.tokens)?,
            Some(rank) => {
                let tokens = input.input().tokens();
                let vocab_size = self.config.vocab_size;
                let hidden = split::embed(&self.embed_tokens, tokens, vocab_size, rank, &self.device)?;
                Stream { hidden, pending: None }
            }
        };
        for (layer, cache) in self.layers.iter().zip(caches.layers()) {
            let context = Context::Paged { batch: &input.paged, cache };
            let step = AttentionStep { cos: &input.cos, sin: &input.sin, context };
            stream = layer.forward(stream, &step)?;
        }
        let Some(asked_for) = stream.asked_for(input)? else { return Ok(None) };
        let norm = self.norm.as_ref().expect("only a whole decoder is asked for tokens: this is a bug");
        let (_, normed) = asked_for.normed_sum(norm)?;
        Ok(Some(normed))
    }

    /// Hidden states `[b, l, hidden_size]` of whole sequences, in the compute dtype, numbered as transformers'
    /// `output_hidden_states` numbers them: 0 are the embedded tokens, i is what layer i leaves, and the last one,
    /// `num_hidden_layers`, is normed. Layers above the highest number of `wanted` are not computed. What stands at
    /// padding before the tokens has no meaning.
    ///
    /// # Panics
    ///
    /// If there is no state of a number.
    pub fn hidden_states(&self, input: &DenseInput, wanted: &[usize]) -> Result<Vec<Tensor>> {
        self.states_of(self.embed(&Tensor::new(input.tokens(), &self.device)?)?, input, wanted)
    }

    /// As [`Decoder::hidden_states`], where `vectors [b * l, hidden_size]` stand in place of the embedded tokens, whose padding
    /// is behind those that count.
    pub fn hidden_states_of(&self, vectors: Tensor, input: &DenseInput, wanted: &[usize]) -> Result<Vec<Tensor>> {
        self.states_of(Stream { hidden: vectors, pending: None }, input, wanted)
    }

    /// Vectors of tokens, `[l, hidden_size]`.
    pub fn embedded(&self, tokens: &[u32]) -> Result<Tensor> {
        self.embed_tokens.forward(&Tensor::new(tokens, &self.device)?)
    }

    fn states_of(&self, mut stream: Stream, input: &DenseInput, wanted: &[usize]) -> Result<Vec<Tensor>> {
        let (cos, sin) = self.config.rope.cos_sin(input.positions(), &self.device)?;
        let context = Context::Dense { rows: input.len(), key_lens: input.key_lens() };
        let step = AttentionStep { cos: &cos, sin: &sin, context };
        let mut states = BTreeMap::new();
        let last = wanted.iter().copied().max().unwrap_or(0);
        for number in 0..=last {
            if number > 0 {
                stream = self.layers[number - 1].forward(stream, &step)?;
            }
            if wanted.contains(&number) {
                states.insert(number, input.in_given_order(&self.state(&stream, number)?)?);
            }
        }
        Ok(wanted.iter().map(|number| states[number].clone()).collect())
    }

    /// The hidden state of this number, from the stream that the layers below leave.
    fn state(&self, stream: &Stream, number: usize) -> Result<Tensor> {
        match (&self.norm, &stream.pending) {
            (Some(norm), _) if number == self.layers.len() => Ok(stream.clone().normed_sum(norm)?.1),
            (_, Some(pending)) => Ok((&stream.hidden + pending)?),
            (_, None) => Ok(stream.hidden.clone()),
        }
    }

    fn embed(&self, tokens: &Tensor) -> Result<Stream> {
        Ok(Stream { hidden: self.embed_tokens.forward(tokens)?, pending: None })
    }
}

/// What the attention of one layer needs beside the hidden states.
struct AttentionStep<'a> {
    cos: &'a Tensor,
    sin: &'a Tensor,
    context: Context<'a>,
}

/// Where the keys and values are that a row looks at: those of its sequence up to its own.
enum Context<'a> {
    /// In the cache, to which the new rows' are written.
    Paged { batch: &'a PreparedBatch<'a>, cache: &'a PagedCache },
    /// Among the new rows, which are sequences of one length; of each the first `key_lens` count, or all.
    Dense { rows: usize, key_lens: Option<&'a [usize]> },
}

impl Context<'_> {
    /// `q [l, heads, d]`, `k` and `v` `[l, kv_heads, d]`, rotated, to as many values as `q` has, in its order.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        match *self {
            Self::Paged { batch, cache } => {
                tale_kernels::write_kv(k, v, cache, batch)?;
                let scale = 1.0 / (q.dim(2)? as f64).sqrt();
                Ok(tale_kernels::paged_attention(q, cache, batch, scale)?)
            }
            Self::Dense { rows, key_lens } => {
                // [b * l, heads, d] to [b, l, heads, d]
                let by_row = |x: &Tensor| x.reshape((rows, (), x.dim(1)?, x.dim(2)?));
                let options = AttentionOptions { causal: true, key_lens, ..Default::default() };
                Ok(tale_kernels::attention(&by_row(q)?, &by_row(k)?, &by_row(v)?, &options)?)
            }
        }
    }
}

#[derive(Debug)]
struct DecoderLayer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

impl DecoderLayer {
    fn load(weights: &Weights, config: &DecoderConfig, split: Split<'_>) -> Result<Self> {
        let norm = |name: &str| RmsNorm::load(&weights.pp(name), config.hidden_size, config.rms_norm_eps);
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::load(&weights.pp("self_attn"), config, split)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: Mlp::load(&weights.pp("mlp"), config, split)?,
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
#[derive(Clone)]
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

    /// The rows of which a step wants something; `None` when it wants nothing.
    fn asked_for(self, input: &PreparedInput<'_>) -> Result<Option<Self>> {
        let Some(hidden) = input.asked_for(&self.hidden)? else { return Ok(None) };
        let pending = match &self.pending {
            Some(pending) => input.asked_for(pending)?,
            None => None,
        };
        Ok(Some(Self { hidden, pending }))
    }
}

#[derive(Debug)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Summed,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
}

impl Attention {
    fn load(weights: &Weights, config: &DecoderConfig, split: Split<'_>) -> Result<Self> {
        let hidden_size = config.hidden_size;
        let kv_heads = config.num_key_value_heads;
        let q_size = config.num_attention_heads * config.head_dim;
        let kv_size = kv_heads * config.head_dim;
        // Left over in early Llama checkpoints; the configuration says the same.
        weights.ignore("rotary_emb.inv_freq");
        let keys_or_values = |name: &str| {
            let weights = split.kv_heads(weights.pp(name), kv_heads);
            load_linear(&weights, hidden_size, kv_size, config.qkv_bias)
        };
        let to_output = split.inputs(weights.pp("o_proj"));
        Ok(Self {
            q_proj: load_linear(&split.outputs(weights.pp("q_proj")), hidden_size, q_size, config.qkv_bias)?,
            k_proj: keys_or_values("k_proj")?,
            v_proj: keys_or_values("v_proj")?,
            o_proj: Summed::new(load_linear(&to_output, q_size, hidden_size, config.o_bias)?, split),
            num_attention_heads: config.num_attention_heads / split.of(),
            num_key_value_heads: config.kv_shape_of(split.of()).num_key_value_heads,
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
        let out = step.context.attend(&q, &k, &v)?;
        // [l, heads, head_dim] to [l, heads * head_dim]
        self.o_proj.forward(&out.reshape((l, self.num_attention_heads * self.head_dim))?)
    }
}

#[derive(Debug)]
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Summed,
}

impl Mlp {
    fn load(weights: &Weights, config: &DecoderConfig, split: Split<'_>) -> Result<Self> {
        let (hidden_size, intermediate_size, bias) = (config.hidden_size, config.intermediate_size, config.mlp_bias);
        let inner = |name: &str| load_linear(&split.outputs(weights.pp(name)), hidden_size, intermediate_size, bias);
        let down = split.inputs(weights.pp("down_proj"));
        Ok(Self {
            gate_proj: inner("gate_proj")?,
            up_proj: inner("up_proj")?,
            down_proj: Summed::new(load_linear(&down, intermediate_size, hidden_size, bias)?, split),
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
