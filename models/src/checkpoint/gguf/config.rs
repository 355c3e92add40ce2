//! The configuration of a language model from the metadata of its GGUF file, in the words of transformers.
//!
//! Owns: which key is which field, and which keys change the network so that it is none that is computed. Does not know:
//! what a decoder makes of a field. Source: llama.cpp `src/llama-model.cpp` (`load_hparams`), `conversion/llama.py`,
//! `conversion/qwen.py`.

use serde_json::{Map, Value, json};

use super::keys::{Keys, number};
use crate::config::Bound;
use crate::config::bounds::{
    self, MAX_HEAD_DIM, MAX_HEADS, MAX_INNER_WIDTH, MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, MAX_WIDTH,
};
use crate::error::Result;
use crate::weights::MetadataValue;
use crate::weights::single::WeightFile;

const BLOCK_COUNT: &str = "block_count";
const CONTEXT_LENGTH: &str = "context_length";
const EMBEDDING_LENGTH: &str = "embedding_length";
const FEED_FORWARD_LENGTH: &str = "feed_forward_length";
const HEAD_COUNT: &str = "attention.head_count";
const HEAD_COUNT_KV: &str = "attention.head_count_kv";
const KEY_LENGTH: &str = "attention.key_length";
const VALUE_LENGTH: &str = "attention.value_length";
const RMS_EPSILON: &str = "attention.layer_norm_rms_epsilon";
const SLIDING_WINDOW: &str = "attention.sliding_window";
const VOCAB_SIZE: &str = "vocab_size";
const ROPE_DIMENSIONS: &str = "rope.dimension_count";
const ROPE_BASE: &str = "rope.freq_base";
const ROPE_SCALING: &str = "rope.scaling.type";
const ROPE_FACTOR: &str = "rope.scaling.factor";
/// The oldest spelling of a linear factor.
const ROPE_SCALE_LINEAR: &str = "rope.scale_linear";
const ROPE_ORIGINAL_CONTEXT: &str = "rope.scaling.original_context_length";
const YARN_BETA_FAST: &str = "rope.scaling.yarn_beta_fast";
const YARN_BETA_SLOW: &str = "rope.scaling.yarn_beta_slow";

/// Of the keys without their architecture.
const BOUNDS: &[Bound] = &[
    Bound::size(BLOCK_COUNT, MAX_LAYERS),
    Bound::size(CONTEXT_LENGTH, MAX_POSITIONS),
    Bound::size(EMBEDDING_LENGTH, MAX_WIDTH),
    Bound::size(FEED_FORWARD_LENGTH, MAX_INNER_WIDTH),
    Bound::size(HEAD_COUNT, MAX_HEADS),
    Bound::size(HEAD_COUNT_KV, MAX_HEADS),
    Bound::size(KEY_LENGTH, MAX_HEAD_DIM),
    Bound::size(VALUE_LENGTH, MAX_HEAD_DIM),
    Bound::size(VOCAB_SIZE, MAX_VOCABULARY),
    Bound::eps(RMS_EPSILON),
];

/// Keys that change the network, with the value of each that changes nothing.
const CHANGES: &[(&str, f64)] = &[
    ("expert_count", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.scale", 0.0),
    ("attention.output_scale", 0.0),
    ("attention.temperature_scale", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("embedding_scale", 1.0),
    ("residual_scale", 1.0),
    ("logit_scale", 1.0),
    ("pooling_type", 0.0),
    ("rope.scaling.attn_factor", 1.0),
    ("rope.scaling.yarn_attn_factor", 1.0),
    ("rope.scaling.yarn_ext_factor", 1.0),
    ("rope.scaling.yarn_log_multiplier", 0.0),
    ("use_parallel_residual", 0.0),
];

/// `config.json` of a model with so many tokens.
pub(super) fn read(file: &WeightFile, architecture: &str, class: &str, num_tokens: usize) -> Result<Value> {
    let model = Model { keys: Keys::new(file), architecture };
    model.check_bounds()?;
    model.check_changes()?;
    let required = |key| model.required(key, model.size(key)?);
    let heads = required(HEAD_COUNT)?;
    let context_length = required(CONTEXT_LENGTH)?;
    if let Some(window) = model.size(SLIDING_WINDOW)?.filter(|window| (1..context_length).contains(window)) {
        return Err(model.error(SLIDING_WINDOW, format!("is {window}: windowed attention is not supported")));
    }
    let embedding_length = required(EMBEDDING_LENGTH)?;
    model.check_vocabulary(file, num_tokens)?;
    let has = |tensor: &str| file.contains(tensor);
    Ok(json!({
        "architectures": [class],
        "model_type": architecture,
        "vocab_size": num_tokens,
        "hidden_size": embedding_length,
        "intermediate_size": required(FEED_FORWARD_LENGTH)?,
        "num_hidden_layers": required(BLOCK_COUNT)?,
        "num_attention_heads": heads,
        "num_key_value_heads": model.size(HEAD_COUNT_KV)?.unwrap_or(heads),
        "head_dim": model.head_dim(embedding_length, heads)?,
        "rms_norm_eps": model.required(RMS_EPSILON, model.number(RMS_EPSILON)?)?,
        "max_position_embeddings": context_length,
        "tie_word_embeddings": !has("output.weight"),
        "attention_bias": has("blk.0.attn_q.bias") || has("blk.0.attn_output.bias"),
        "mlp_bias": has("blk.0.ffn_down.bias"),
        "rope_parameters": model.rope()?,
    }))
}

/// `generation_config.json` of a model whose answers end with these tokens.
pub(super) fn generation(keys: &Keys<'_>, ends: &[u32]) -> Result<Value> {
    const SAMPLING: [(&str, &str); 5] = [
        ("general.sampling.temp", "temperature"),
        ("general.sampling.top_p", "top_p"),
        ("general.sampling.top_k", "top_k"),
        ("general.sampling.min_p", "min_p"),
        ("general.sampling.penalty_repeat", "repetition_penalty"),
    ];
    let mut fields = Map::new();
    fields.insert("eos_token_id".to_owned(), json!(ends));
    for (key, field) in SAMPLING {
        if let Some(value) = keys.number(key)? {
            fields.insert(field.to_owned(), json!(value));
        }
    }
    Ok(Value::Object(fields))
}

/// The metadata of one architecture, by keys without it.
struct Model<'a> {
    keys: Keys<'a>,
    architecture: &'a str,
}

impl Model<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn get(&self, key: &str) -> Option<&MetadataValue> {
        self.keys.get(&self.key(key))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.keys.number(&self.key(key))
    }

    /// A whole number, or a list of as many equal ones as there are layers.
    fn size(&self, key: &str) -> Result<Option<u64>> {
        let size = |value: &MetadataValue| value.as_integer().and_then(|value| u64::try_from(value).ok());
        let Some(value) = self.get(key) else { return Ok(None) };
        let sizes = match value.as_list() {
            Some(values) => values.iter().map(size).collect::<Option<Vec<_>>>(),
            None => size(value).map(|size| vec![size]),
        };
        match sizes.as_deref() {
            Some([first, others @ ..]) if others.iter().all(|other| other == first) => Ok(Some(*first)),
            Some([_, ..]) => Err(self.error(key, "differs from layer to layer, which is not supported")),
            _ => Err(self.error(key, "is no size")),
        }
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        self.keys.required(&self.key(key), value)
    }

    fn error(&self, key: &str, problem: impl std::fmt::Display) -> crate::error::Error {
        self.keys.error(&self.key(key), problem)
    }

    fn check_bounds(&self) -> Result<()> {
        let prefix = self.key("");
        let of_value = |value: &MetadataValue| match value.as_list() {
            // All are equal, or refused where they are read.
            Some(values) => values.first().and_then(number),
            None => number(value),
        };
        let numbers = self.keys.all().filter_map(|(key, value)| Some((key.strip_prefix(&prefix)?, of_value(value)?)));
        let numbers: Map<String, Value> = numbers.map(|(key, number)| (key.to_owned(), json!(number))).collect();
        bounds::check(self.keys.path(), &numbers, BOUNDS)
    }

    fn check_changes(&self) -> Result<()> {
        for (key, neutral) in CHANGES {
            let found = match self.get(key) {
                None => continue,
                Some(MetadataValue::Flag(flag)) => Some(f64::from(u8::from(*flag))),
                Some(value) => number(value),
            };
            match found {
                Some(found) if found == *neutral => {}
                Some(found) => return Err(self.error(key, format!("is {found}, which is not supported"))),
                None => return Err(self.error(key, "is not supported")),
            }
        }
        match self.keys.flag(&self.key("attention.causal"))? {
            Some(false) => Err(self.error("attention.causal", "is false, which is not supported")),
            _ => Ok(()),
        }
    }

    /// The table of the tokens' vectors has a row for each token, and as many tokens as were said.
    fn check_vocabulary(&self, file: &WeightFile, num_tokens: usize) -> Result<()> {
        if let Some(said) = self.size(VOCAB_SIZE)?.filter(|said| *said != num_tokens as u64) {
            return Err(self.error(VOCAB_SIZE, format!("is {said}; `tokenizer.ggml.tokens` has {num_tokens}")));
        }
        match file.shape("token_embd.weight") {
            Some([rows, _]) if *rows != num_tokens => {
                let problem = format!("has {num_tokens} tokens, tensor `token_embd.weight` {rows} rows");
                Err(self.keys.error("tokenizer.ggml.tokens", problem))
            }
            _ => Ok(()),
        }
    }

    /// Values of one head, all of which are rotated.
    fn head_dim(&self, embedding_length: u64, heads: u64) -> Result<u64> {
        let head_dim = match self.size(KEY_LENGTH)? {
            Some(length) => length,
            None if embedding_length.is_multiple_of(heads) => embedding_length / heads,
            None => {
                let problem = format!("is {heads}, which does not divide {EMBEDDING_LENGTH}, {embedding_length}");
                return Err(self.error(HEAD_COUNT, problem));
            }
        };
        for key in [VALUE_LENGTH, ROPE_DIMENSIONS] {
            if let Some(other) = self.size(key)?.filter(|other| *other != head_dim) {
                let problem = format!("is {other}; only that of a whole head, {head_dim}, is supported");
                return Err(self.error(key, problem));
            }
        }
        Ok(head_dim)
    }

    /// `rope_parameters`.
    fn rope(&self) -> Result<Value> {
        let mut fields = Map::new();
        fields.insert("rope_theta".to_owned(), json!(self.number(ROPE_BASE)?.unwrap_or(10_000.0)));
        let mut take = |field: &str, value: Option<f64>| {
            if let Some(value) = value {
                fields.insert(field.to_owned(), json!(value));
            }
        };
        let factor = self.number(ROPE_FACTOR)?.filter(|factor| *factor != 0.0);
        let linear = self.number(ROPE_SCALE_LINEAR)?.filter(|factor| *factor != 0.0);
        let kind = match (self.keys.text(&self.key(ROPE_SCALING))?, linear) {
            // A factor without a type is a linear one.
            (None, _) | (Some("linear"), _) => match factor.or(linear) {
                None | Some(1.0) => "default",
                factor => {
                    take("factor", factor);
                    "linear"
                }
            },
            (Some("none"), _) => "default",
            (Some("yarn"), _) => {
                take("factor", Some(self.required(ROPE_FACTOR, factor)?));
                let original = self.number(ROPE_ORIGINAL_CONTEXT)?;
                take("original_max_position_embeddings", Some(self.required(ROPE_ORIGINAL_CONTEXT, original)?));
                take("beta_fast", self.number(YARN_BETA_FAST)?);
                take("beta_slow", self.number(YARN_BETA_SLOW)?);
                "yarn"
            }
            (Some(other), _) => {
                let problem = format!("is `{other}`, which is not supported; known are none, linear, yarn");
                return Err(self.error(ROPE_SCALING, problem));
            }
        };
        fields.insert("rope_type".to_owned(), json!(kind));
        Ok(Value::Object(fields))
    }
}
