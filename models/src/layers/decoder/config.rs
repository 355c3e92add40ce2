//! `config.json` of a decoder: what each class of transformers takes absent fields for, and what can be computed with.
//!
//! Owns: the sizes and switches of the trunk, one reading for all classes. Does not know: which folder holds the file.
//! Source: transformers `configuration_llama.py`, `configuration_qwen2.py`.

use std::sync::Arc;

use candle_core::DType;

use super::gguf::GgufRows;
use crate::config::bounds::{
    self, MAX_HEAD_DIM, MAX_HEADS, MAX_INNER_WIDTH, MAX_LAYERS, MAX_VOCABULARY, MAX_WIDTH, check_product,
};
use crate::config::{Bound, Fields};
use crate::error::{Error, Result};
use crate::kv::KvShape;
use crate::layers::packed_values;
use crate::layers::rope::Rope;
use crate::quantisation::Quantisation;

/// Of all classes.
const BOUNDS: &[Bound] = &[
    Bound::size("vocab_size", MAX_VOCABULARY),
    Bound::size("hidden_size", MAX_WIDTH),
    Bound::size("intermediate_size", MAX_INNER_WIDTH),
    Bound::size("num_hidden_layers", MAX_LAYERS),
    Bound::size("num_attention_heads", MAX_HEADS),
    Bound::size("num_key_value_heads", MAX_HEADS),
    Bound::size("head_dim", MAX_HEAD_DIM),
    Bound::size("max_position_embeddings", bounds::MAX_POSITIONS),
    Bound::eps("rms_norm_eps"),
    Bound::size("sliding_window", bounds::MAX_POSITIONS),
    Bound::whole("max_window_layers", 0, MAX_LAYERS),
];
const MAX_POSITIONS: usize = bounds::MAX_POSITIONS as usize;

/// What `hidden_act` may say: two names of one function in transformers.
const SILU: [&str; 2] = ["silu", "swish"];

/// How the configurations of one class differ from the others': fields that the file does not have, and biases, which
/// not every class lets the file decide.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct ConfigClass {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// As many as there are query heads if `None`, which is also what null in the file means.
    pub num_key_value_heads: Option<usize>,
    pub max_position_embeddings: usize,
    pub eos_token_id: Option<u32>,
    pub biases: Biases,
    /// Whether the class knows `use_sliding_window`.
    pub knows_windows: bool,
    pub gguf_rows: GgufRows,
}

/// Which projections have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Biases {
    /// Those that `attention_bias` (all four of the attention) and `mlp_bias` name; none if absent.
    AsStated,
    /// Queries, keys and values, whatever the file says.
    QueriesKeysValues,
}

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
    /// Of GGUF files of the class.
    pub gguf_rows: GgufRows,
    /// In which format matrices are kept, if they are not plain.
    pub quantisation: Option<Arc<Quantisation>>,
}

impl DecoderConfig {
    /// Reads the fields of a `config.json` as `class` does. Errors name the file and the field.
    pub fn read(fields: &Fields, class: &ConfigClass) -> Result<Self> {
        check_plain(fields)?;
        fields.check_bounds(BOUNDS)?;
        let hidden_size = fields.or("hidden_size", class.hidden_size)?;
        let heads = Heads::read(fields, class, hidden_size)?;
        let max_position_embeddings = fields.or("max_position_embeddings", class.max_position_embeddings)?;
        let stated = |field| Ok::<bool, Error>(class.biases == Biases::AsStated && fields.flag(field, false)?);
        let attention_bias = stated("attention_bias")?;
        let config = Self {
            vocab_size: fields.or("vocab_size", class.vocab_size)?,
            hidden_size,
            intermediate_size: fields.or("intermediate_size", class.intermediate_size)?,
            num_hidden_layers: fields.or("num_hidden_layers", class.num_hidden_layers)?,
            num_attention_heads: heads.num_attention_heads,
            num_key_value_heads: heads.num_key_value_heads,
            head_dim: heads.head_dim,
            rms_norm_eps: fields.or("rms_norm_eps", 1e-6)?,
            max_position_embeddings,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            qkv_bias: attention_bias || class.biases == Biases::QueriesKeysValues,
            o_bias: attention_bias,
            mlp_bias: stated("mlp_bias")?,
            rope: Rope::from_config(fields.path(), &fields.all()?, heads.head_dim, max_position_embeddings)?,
            gguf_rows: class.gguf_rows,
            quantisation: Quantisation::read(fields)?.map(Arc::new),
        };
        if class.knows_windows {
            config.check_windows(fields)?;
        }
        Ok(config)
    }

    /// Refuses windowed attention unless the window is as wide as the context.
    fn check_windows(&self, fields: &Fields) -> Result<()> {
        /// What transformers assumes.
        const DEFAULT_WINDOW: usize = 4096;
        const DEFAULT_MAX_WINDOW_LAYERS: usize = 28;
        if !fields.flag("use_sliding_window", false)? {
            return Ok(());
        }
        let Some(window) = fields.nullable_or("sliding_window", Some(DEFAULT_WINDOW))? else { return Ok(()) };
        let has_windowed_layers = match fields.nullable_or::<Vec<String>>("layer_types", None)? {
            Some(layer_types) => layer_types.iter().any(|layer_type| layer_type != "full_attention"),
            None => fields.or("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS)? < self.num_hidden_layers,
        };
        if window < self.context_len() && has_windowed_layers {
            return Err(fields.error("use_sliding_window", "windowed attention is not supported"));
        }
        Ok(())
    }

    /// Most tokens of prompt and answer together.
    pub fn context_len(&self) -> usize {
        self.rope.context_len(self.max_position_embeddings).min(MAX_POSITIONS)
    }

    /// Bytes that a pass over so many tokens without a cache takes at its peak, in `dtype`: the states, what the last layer
    /// adds and their norm; and queries and keys before and after they are turned, values and what is attended, or the inner
    /// vectors, which are gated, or what is multiplied.
    pub fn dense_bytes(&self, tokens: usize, dtype: DType) -> usize {
        let heads = 3 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim;
        let inner = self.intermediate_size;
        let multiplied = (heads + packed_values(self.hidden_size)).max(inner + packed_values(inner));
        let values = 3 * self.hidden_size + multiplied.max(3 * inner);
        let rotation = self.head_dim * size_of::<f32>();
        tokens * (values * dtype.size_in_bytes() + rotation)
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

/// How the attention is parted.
struct Heads {
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
}

impl Heads {
    fn read(fields: &Fields, class: &ConfigClass, hidden_size: usize) -> Result<Self> {
        let heads: usize = fields.or("num_attention_heads", class.num_attention_heads)?;
        let num_key_value_heads = match fields.nullable_or("num_key_value_heads", class.num_key_value_heads)? {
            Some(given) => given,
            None => heads,
        };
        let head_dim = match fields.nullable_or("head_dim", None)? {
            Some(given) => given,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                let problem = format!("{heads} does not divide hidden_size, {hidden_size}, and head_dim is absent");
                return Err(fields.error("num_attention_heads", problem));
            }
        };
        if !heads.is_multiple_of(num_key_value_heads) {
            let problem = format!("{num_key_value_heads} does not divide num_attention_heads, {heads}");
            return Err(fields.error("num_key_value_heads", problem));
        }
        if !head_dim.is_multiple_of(2) {
            return Err(fields.error("head_dim", format!("{head_dim} is odd and cannot be rotated in pairs")));
        }
        check_product(fields.path(), ("num_attention_heads", heads), ("head_dim", head_dim), MAX_WIDTH)?;
        Ok(Self { num_attention_heads: heads, num_key_value_heads, head_dim })
    }
}

/// Refuses what changes the block itself: another activation.
fn check_plain(fields: &Fields) -> Result<()> {
    let hidden_act: String = fields.or("hidden_act", SILU[0].to_owned())?;
    if !SILU.contains(&hidden_act.as_str()) {
        let problem = format!("`{hidden_act}` is not supported; known: {}", SILU.join(", "));
        return Err(fields.error("hidden_act", problem));
    }
    Ok(())
}

/// For the tests of classes.
#[cfg(test)]
pub(crate) mod testing {
    use serde_json::{Value, json};

    use super::*;

    /// What the class makes of a file with these fields.
    pub(crate) fn parse(class: &ConfigClass, fields: Value) -> Result<DecoderConfig> {
        DecoderConfig::read(&Fields::of("config.json".into(), fields.to_string().as_bytes())?, class)
    }

    /// Asserts that a field is refused by its name, which may have a part after a dot.
    #[track_caller]
    pub(crate) fn refused(class: &ConfigClass, field: &str, value: Value) {
        let (name, _) = field.split_once('.').unwrap_or((field, ""));
        let error = parse(class, json!({name: value})).expect_err("must be refused").to_string();
        assert!(error.contains(&format!("config.json: {field}: ")), "{field} {value}: {error}");
    }
}
