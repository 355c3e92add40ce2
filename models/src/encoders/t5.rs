//! T5 and UMT5 encoders: token ids to hidden states.
//!
//! Owns: the encoder stack and its relative position bias (one table for all layers in T5, one per layer in UMT5). Does
//! not know: tokenizers, decoders, padding (a masked key changes nothing for the other tokens, so callers pass the tokens
//! that count and no more; rows of one pass may have different lengths).
//! Source: transformers `models/t5/modeling_t5.py`, `models/umt5/modeling_umt5.py`.

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use tale_kernels::{AttentionOptions, attention, gelu_tanh, silu_mul};

use crate::config::bounds::{
    MAX_HEAD_DIM, MAX_HEADS, MAX_INNER_WIDTH, MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, MAX_WIDTH, check_product,
};
use crate::config::{Bound, Fields};
use crate::device::Placement;
use crate::encoders::rows_of;
use crate::error::Result;
use crate::layers::{Embedding, Linear, RmsNorm};
use crate::weights::{Tie, Weights};

mod elsewhere;

use elsewhere::{GgufNames, WanNames};

/// `config.json` of a T5 or UMT5 checkpoint; what decides about the encoder.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct T5Config {
    pub kind: T5Kind,
    pub vocab_size: usize,
    pub d_model: usize,
    pub d_kv: usize,
    pub d_ff: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub feed_forward_proj: FeedForwardKind,
    pub relative_attention_num_buckets: usize,
    pub relative_attention_max_distance: usize,
    pub layer_norm_epsilon: f64,
}

/// Most buckets of relative positions; every published model has 32.
const MAX_BUCKETS: u64 = 1 << 12;
const BOUNDS: &[Bound] = &[
    Bound::size("vocab_size", MAX_VOCABULARY),
    Bound::size("d_model", MAX_WIDTH),
    Bound::size("d_kv", MAX_HEAD_DIM),
    Bound::size("d_ff", MAX_INNER_WIDTH),
    Bound::size("num_layers", MAX_LAYERS),
    Bound::size("num_heads", MAX_HEADS),
    Bound::size("relative_attention_num_buckets", MAX_BUCKETS),
    Bound::size("relative_attention_max_distance", MAX_POSITIONS),
    Bound::eps("layer_norm_epsilon"),
];

impl T5Config {
    /// Reads the file at `path` as transformers' class for `kind` does, which is the one that a pipeline names, whatever
    /// the file says of itself. Errors name the file and the field.
    pub fn read(fields: &Fields, kind: T5Kind) -> Result<Self> {
        fields.check_bounds(BOUNDS)?;
        let default_feed_forward = kind.choose(FeedForwardKind::Relu, FeedForwardKind::GatedGelu);
        let config = Self {
            kind,
            vocab_size: fields.or("vocab_size", kind.choose(32_128, 250_112))?,
            d_model: fields.or("d_model", 512)?,
            d_kv: fields.or("d_kv", 64)?,
            d_ff: fields.or("d_ff", kind.choose(2048, 1024))?,
            num_layers: fields.or("num_layers", kind.choose(6, 8))?,
            num_heads: fields.or("num_heads", kind.choose(8, 6))?,
            feed_forward_proj: fields.or("feed_forward_proj", default_feed_forward)?,
            relative_attention_num_buckets: fields.or("relative_attention_num_buckets", 32)?,
            relative_attention_max_distance: fields.or("relative_attention_max_distance", 128)?,
            layer_norm_epsilon: fields.or("layer_norm_epsilon", 1e-6)?,
        };
        config.check_buckets(fields)?;
        check_product(fields.path(), ("num_heads", config.num_heads), ("d_kv", config.d_kv), MAX_WIDTH)?;
        Ok(config)
    }

    /// Half of the buckets are for each direction, and half of these for near distances; the others reach farther.
    fn check_buckets(&self, fields: &Fields) -> Result<()> {
        let (buckets, distance) = (self.relative_attention_num_buckets, self.relative_attention_max_distance);
        if buckets < 4 || !buckets.is_multiple_of(2) {
            return Err(fields.error("relative_attention_num_buckets", format!("is {buckets}; allowed: even, from 4")));
        }
        if distance <= buckets / 4 {
            let problem = format!("is {distance}; it must be above {} with {buckets} buckets", buckets / 4);
            return Err(fields.error("relative_attention_max_distance", problem));
        }
        Ok(())
    }

    /// Bytes that a forward pass over so many rows of `l` tokens keeps at its peak: the position bias, once more while it is
    /// put in order, and in the feed-forward the residual, its normed copy and three inner vectors per token.
    pub fn forward_bytes(&self, rows: usize, l: usize, placement: &Placement) -> usize {
        let bias = 2 * self.num_heads * l * l;
        let values = bias + rows * l * (2 * self.d_model + 3 * self.d_ff.max(self.num_heads * self.d_kv));
        values * own_dtype(placement.compute_dtype).size_in_bytes()
    }
}

/// The dtype in which the encoder computes where its neighbours compute in `compute_dtype`.
///
/// Not f16: the published models were trained in bf16, and their residuals and inner vectors exceed the 65,504 that f16
/// holds. transformers clamps them there and keeps `wo`, and with it the residual, in f32, which changes what diffusers'
/// pictures show; bf16 has the range of f32 in the same bytes.
fn own_dtype(compute_dtype: DType) -> DType {
    match compute_dtype {
        DType::F16 => DType::BF16,
        other => other,
    }
}

/// Which of the two architectures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum T5Kind {
    /// The position bias lies in layer 0 and serves all layers.
    T5,
    /// Every layer has its own position bias.
    Umt5,
}

impl T5Kind {
    fn choose<T>(self, t5: T, umt5: T) -> T {
        match self {
            Self::T5 => t5,
            Self::Umt5 => umt5,
        }
    }
}

/// `feed_forward_proj`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FeedForwardKind {
    /// `wo(relu(wi x))`.
    Relu,
    /// `wo(gelu_new(wi_0 x) * wi_1 x)`; `gelu_new` is the tanh approximation.
    #[serde(alias = "gated-gelu_new", alias = "gated-gelu_pytorch_tanh")]
    GatedGelu,
    /// `wo(silu(wi_0 x) * wi_1 x)`.
    #[serde(alias = "gated-swish")]
    GatedSilu,
}

/// The encoder half of T5 or UMT5.
#[derive(Debug, Clone)]
pub struct T5Encoder {
    shared: Embedding,
    block: Vec<Block>,
    final_layer_norm: RmsNorm,
    buckets: Buckets,
    /// Of the networks that read the hidden states.
    compute_dtype: DType,
    /// Bytes that the largest of its quantised matrices takes for a moment.
    dequantised_bytes: usize,
}

impl T5Encoder {
    /// Tensors `encoder.*` and `shared.weight`, which `encoder.embed_tokens.weight` is another name of. Either may be
    /// absent; where both are there and differ, the encoder's own is what it reads. Files may have the names of llama.cpp or
    /// of Wan2.1's original.
    pub fn load(weights: &Weights, config: &T5Config) -> Result<Self> {
        let compute_dtype = weights.placement().compute_dtype;
        let weights = weights.computing_in(own_dtype(compute_dtype)).or_named(GgufNames).or_named(WanNames);
        let encoder = weights.pp("encoder");
        let table = match weights.tie("shared.weight", "encoder.embed_tokens.weight")? {
            Tie::One => weights.pp("shared"),
            Tie::OneUnderSecond => encoder.pp("embed_tokens"),
            Tie::Two => {
                weights.ignore("shared.weight");
                encoder.pp("embed_tokens")
            }
        };
        let mut block = Vec::with_capacity(config.num_layers);
        for layer in 0..config.num_layers {
            let has_bias = layer == 0 || config.kind == T5Kind::Umt5;
            block.push(Block::load(&encoder.pp("block").pp(layer).pp("layer"), config, has_bias)?);
        }
        Ok(Self {
            shared: Embedding::load(&table, config.vocab_size, config.d_model)?,
            block,
            final_layer_norm: RmsNorm::load(
                &encoder.pp("final_layer_norm"),
                config.d_model,
                config.layer_norm_epsilon,
            )?,
            buckets: Buckets {
                num_buckets: config.relative_attention_num_buckets,
                max_distance: config.relative_attention_max_distance,
            },
            compute_dtype,
            dequantised_bytes: weights.dequantised_bytes(),
        })
    }

    /// Most bytes that a pass takes for a moment to multiply with a quantised matrix.
    pub fn dequantised_bytes(&self) -> usize {
        self.dequantised_bytes
    }

    /// Hidden states `[1, l, d_model]` of each row's l tokens, in the compute dtype; every token sees every other one of
    /// its row.
    ///
    /// A reference that pads and masks gives the same states for the tokens before the padding.
    pub fn forward(&self, rows: &[&[u32]]) -> Result<Vec<Tensor>> {
        let lens: Vec<usize> = rows.iter().map(|ids| ids.len()).collect();
        let (b, l) = (rows.len(), lens.iter().copied().max().unwrap_or(0));
        // What stands in the place of absent tokens does not matter: nobody looks at it.
        let padded = rows.iter().flat_map(|ids| ids.iter().copied().chain(std::iter::repeat(0)).take(l));
        let ids = Tensor::from_vec(padded.collect(), b * l, self.device())?;
        let mut x = self.shared.forward(&ids)?.reshape((b, l, ()))?; // [b, l, d_model]
        let key_lens = lens.iter().any(|len| *len < l).then_some(&lens[..]);
        let mut bias = None;
        for block in &self.block {
            if let Some(table) = &block.relative_attention_bias {
                bias = Some(self.buckets.bias(table, l)?);
            }
            x = block.forward(&x, bias.as_ref(), key_lens)?;
        }
        let x = self.final_layer_norm.forward(&x)?.to_dtype(self.compute_dtype)?;
        rows_of(&x)?.iter().zip(&lens).map(|(row, len)| Ok(row.narrow(1, 0, *len)?.contiguous()?)).collect()
    }

    fn device(&self) -> &Device {
        self.final_layer_norm.device()
    }
}

#[derive(Debug, Clone)]
struct Block {
    attention_norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    /// `[num_buckets, heads]`, in the layers that have one.
    relative_attention_bias: Option<Tensor>,
    num_heads: usize,
    feed_forward_norm: RmsNorm,
    feed_forward: FeedForward,
}

impl Block {
    fn load(layer: &Weights, config: &T5Config, has_bias: bool) -> Result<Self> {
        let (d_model, inner, eps) = (config.d_model, config.num_heads * config.d_kv, config.layer_norm_epsilon);
        let attention = layer.pp(0).pp("SelfAttention");
        let table = |weights: &Weights| {
            let shape = [config.relative_attention_num_buckets, config.num_heads];
            weights.get(&shape, "relative_attention_bias.weight")
        };
        Ok(Self {
            attention_norm: RmsNorm::load(&layer.pp(0).pp("layer_norm"), d_model, eps)?,
            q: Linear::load_no_bias(&attention.pp("q"), d_model, inner)?,
            k: Linear::load_no_bias(&attention.pp("k"), d_model, inner)?,
            v: Linear::load_no_bias(&attention.pp("v"), d_model, inner)?,
            o: Linear::load_no_bias(&attention.pp("o"), inner, d_model)?,
            relative_attention_bias: has_bias.then(|| table(&attention)).transpose()?,
            num_heads: config.num_heads,
            feed_forward_norm: RmsNorm::load(&layer.pp(1).pp("layer_norm"), d_model, eps)?,
            feed_forward: FeedForward::load(&layer.pp(1).pp("DenseReluDense"), config)?,
        })
    }

    /// `x [b, l, d_model]`, `bias [heads, l, l]`, `key_lens` the tokens of each row where they are not all l.
    fn forward(&self, x: &Tensor, bias: Option<&Tensor>, key_lens: Option<&[usize]>) -> Result<Tensor> {
        let x = (x + self.attend(&self.attention_norm.forward(x)?, bias, key_lens)?)?;
        let y = self.feed_forward.forward(&self.feed_forward_norm.forward(&x)?)?;
        Ok((x + y)?)
    }

    fn attend(&self, x: &Tensor, bias: Option<&Tensor>, key_lens: Option<&[usize]>) -> Result<Tensor> {
        let (b, l, _) = x.dims3()?;
        let heads = |y: Tensor| y.reshape((b, l, self.num_heads, ())); // [b, l, heads, d_kv]
        let (q, k, v) = (heads(self.q.forward(x)?)?, heads(self.k.forward(x)?)?, heads(self.v.forward(x)?)?);
        // T5 was trained without the usual 1/sqrt(d): its initialisation absorbs it.
        let options = AttentionOptions { scale: Some(1.0), bias, key_lens, ..Default::default() };
        self.o.forward(&attention(&q, &k, &v, &options)?.reshape((b, l, ()))?)
    }
}

#[derive(Debug, Clone)]
enum FeedForward {
    Relu { wi: Linear, wo: Linear },
    Gated { wi_0: Linear, wi_1: Linear, wo: Linear, kind: FeedForwardKind },
}

impl FeedForward {
    fn load(weights: &Weights, config: &T5Config) -> Result<Self> {
        let (d_model, d_ff) = (config.d_model, config.d_ff);
        let wide = |name: &str| Linear::load_no_bias(&weights.pp(name), d_model, d_ff);
        let wo = Linear::load_no_bias(&weights.pp("wo"), d_ff, d_model)?;
        match config.feed_forward_proj {
            FeedForwardKind::Relu => Ok(Self::Relu { wi: wide("wi")?, wo }),
            kind => Ok(Self::Gated { wi_0: wide("wi_0")?, wi_1: wide("wi_1")?, wo, kind }),
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Relu { wi, wo } => wo.forward(&wi.forward(x)?.relu()?),
            Self::Gated { wi_0, wi_1, wo, kind: FeedForwardKind::GatedSilu } => {
                wo.forward(&silu_mul(&wi_0.forward(x)?, &wi_1.forward(x)?)?)
            }
            Self::Gated { wi_0, wi_1, wo, .. } => wo.forward(&(gelu_tanh(&wi_0.forward(x)?)? * wi_1.forward(x)?)?),
        }
    }
}

/// Distances between tokens, binned: near ones exactly, far ones logarithmically, each direction apart.
#[derive(Debug, Clone, Copy)]
struct Buckets {
    num_buckets: usize,
    max_distance: usize,
}

impl Buckets {
    /// The bucket of a key `distance` tokens after the query (negative: before). In f32, as the reference computes it:
    /// the rounding decides on which side of an edge a distance falls.
    fn bucket(self, distance: i64) -> usize {
        let per_direction = self.num_buckets / 2;
        let offset = if distance > 0 { per_direction } else { 0 };
        let distance = distance.unsigned_abs() as usize;
        let max_exact = per_direction / 2;
        if distance < max_exact {
            return offset + distance;
        }
        let log_max = (self.max_distance as f64 / max_exact as f64).ln() as f32;
        let position = (distance as f32 / max_exact as f32).ln() / log_max * (per_direction - max_exact) as f32;
        offset + (max_exact + position as usize).min(per_direction - 1)
    }

    /// `[heads, l, l]` from `table [num_buckets, heads]`.
    fn bias(self, table: &Tensor, l: usize) -> Result<Tensor> {
        // The bias depends on the distance alone: per head one value for each of -(l-1)..=l-1, then one window per query.
        let reach = l as i64 - 1;
        let buckets: Vec<u32> = (-reach..=reach).map(|distance| self.bucket(distance) as u32).collect();
        let buckets = Tensor::from_vec(buckets, 2 * l - 1, table.device())?;
        let by_distance = table.t()?.contiguous()?.index_select(&buckets, 1)?; // [heads, 2l-1]
        let rows = (0..l).map(|query| by_distance.narrow(1, l - 1 - query, l)).collect::<Result<Vec<_>, _>>()?;
        Ok(Tensor::stack(&rows, 1)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(kind: T5Kind, json: &str) -> Result<T5Config> {
        T5Config::read(&Fields::of("config.json".into(), json.as_bytes())?, kind)
    }

    /// `T5Config()` and `UMT5Config()` of transformers 5.24.
    #[test]
    fn absent_fields_take_the_classs_defaults() {
        let (t5, umt5) = (parse(T5Kind::T5, "{}").unwrap(), parse(T5Kind::Umt5, "{}").unwrap());
        let sizes = |config: &T5Config| [config.vocab_size, config.d_ff, config.num_layers, config.num_heads];
        assert_eq!(sizes(&t5), [32_128, 2048, 6, 8]);
        assert_eq!(sizes(&umt5), [250_112, 1024, 8, 6]);
        assert_eq!([t5.feed_forward_proj, umt5.feed_forward_proj], [FeedForwardKind::Relu, FeedForwardKind::GatedGelu]);
        for config in [t5, umt5] {
            assert_eq!([config.d_model, config.d_kv], [512, 64]);
            assert_eq!([config.relative_attention_num_buckets, config.relative_attention_max_distance], [32, 128]);
        }
    }

    #[test]
    fn functions_have_all_their_names() {
        for (name, kind) in
            [("gated-gelu_new", FeedForwardKind::GatedGelu), ("gated-swish", FeedForwardKind::GatedSilu)]
        {
            let config = parse(T5Kind::T5, &format!(r#"{{"feed_forward_proj": "{name}"}}"#)).unwrap();
            assert_eq!(config.feed_forward_proj, kind);
        }
    }

    #[test]
    fn impossible_values_are_refused_by_field() {
        let values = [
            ("d_model", "0"),
            ("num_heads", "-1"),
            ("layer_norm_epsilon", "-1e-6"),
            ("relative_attention_num_buckets", "3"),
            ("relative_attention_max_distance", "8"),
            ("feed_forward_proj", r#""gated-mish""#),
            ("num_layers", "null"),
        ];
        for (field, value) in values {
            let error = parse(T5Kind::T5, &format!(r#"{{"{field}": {value}}}"#)).unwrap_err().to_string();
            assert!(error.contains(&format!("config.json: {field}: ")), "{error}");
        }
    }

    /// `T5Attention._relative_position_bucket` of transformers 4 and 5 at every edge between two buckets up to a distance of 600.
    #[test]
    fn buckets_are_those_of_the_reference() {
        let buckets = Buckets { num_buckets: 32, max_distance: 128 };
        for (distance, expected) in REFERENCE_32_128 {
            assert_eq!(buckets.bucket(*distance), *expected, "distance {distance}");
        }
        let buckets = Buckets { num_buckets: 8, max_distance: 20 };
        for (distance, expected) in REFERENCE_8_20 {
            assert_eq!(buckets.bucket(*distance), *expected, "distance {distance}");
        }
    }

    #[test]
    fn bias_of_a_pair_depends_on_its_distance() {
        let buckets = Buckets { num_buckets: 8, max_distance: 20 };
        let table = Tensor::arange(0f32, 16.0, &Device::Cpu).unwrap().reshape((8, 2)).unwrap();
        let bias = buckets.bias(&table, 5).unwrap().to_vec3::<f32>().unwrap();
        for (head, rows) in bias.iter().enumerate() {
            for (query, row) in rows.iter().enumerate() {
                for (key, value) in row.iter().enumerate() {
                    let bucket = buckets.bucket(key as i64 - query as i64);
                    assert_eq!(*value, (bucket * 2 + head) as f32);
                }
            }
        }
    }
    const REFERENCE_32_128: &[(i64, usize)] = &[
        (-600, 15),
        (-91, 15),
        (-90, 14),
        (-64, 14),
        (-63, 13),
        (-46, 13),
        (-45, 12),
        (-32, 12),
        (-31, 11),
        (-23, 11),
        (-22, 10),
        (-16, 10),
        (-15, 9),
        (-12, 9),
        (-11, 8),
        (-8, 8),
        (-7, 7),
        (-6, 6),
        (-5, 5),
        (-4, 4),
        (-3, 3),
        (-2, 2),
        (-1, 1),
        (0, 0),
        (1, 17),
        (2, 18),
        (3, 19),
        (4, 20),
        (5, 21),
        (6, 22),
        (7, 23),
        (8, 24),
        (11, 24),
        (12, 25),
        (15, 25),
        (16, 26),
        (22, 26),
        (23, 27),
        (31, 27),
        (32, 28),
        (45, 28),
        (46, 29),
        (63, 29),
        (64, 30),
        (90, 30),
        (91, 31),
        (600, 31),
    ];
    const REFERENCE_8_20: &[(i64, usize)] =
        &[(-600, 3), (-7, 3), (-6, 2), (-2, 2), (-1, 1), (0, 0), (1, 5), (2, 6), (6, 6), (7, 7), (600, 7)];
}
