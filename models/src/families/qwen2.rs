//! Qwen 2.5 (`Qwen2ForCausalLM`): the Llama block with biases on queries, keys and values. Source: transformers
//! `models/qwen2`.

use crate::checkpoint::{CONFIG, Manifest, OpenWeights};
use crate::error::Result;
use crate::families::causal_lm;
use crate::family::{Family, LoadOptions, LoadedModel};
use crate::layers::decoder::{Biases, ConfigClass, DecoderConfig, GgufRows};

/// Qwen 2.5.
pub struct Qwen2;

/// transformers' `Qwen2Config`.
const CLASS: ConfigClass = ConfigClass {
    vocab_size: 151_936,
    hidden_size: 4096,
    intermediate_size: 22_016,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: Some(32),
    max_position_embeddings: 32_768,
    eos_token_id: None,
    biases: Biases::QueriesKeysValues,
    knows_windows: true,
    gguf_rows: GgufRows::AsPublished,
};

impl Family for Qwen2 {
    fn name(&self) -> &'static str {
        "qwen2"
    }

    fn makes(&self) -> &'static str {
        "text"
    }

    fn detects(&self, manifest: &Manifest) -> bool {
        manifest.is_model("qwen2", "Qwen2ForCausalLM")
    }

    fn load(&self, manifest: &Manifest, open: &mut OpenWeights<'_>, options: &LoadOptions) -> Result<LoadedModel> {
        causal_lm::load(self.name(), &CLASS, manifest, open, options)
    }
}

/// Sizes and switches of the checkpoint's decoder. Errors name `config.json` and the field.
pub fn decoder_config(manifest: &Manifest) -> Result<DecoderConfig> {
    DecoderConfig::read(&manifest.whole().fields(CONFIG)?, &CLASS)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::layers::decoder::testing::{parse, refused};

    /// `Qwen2Config()` of transformers 5.24.
    #[test]
    fn absent_fields_take_the_classs_defaults() {
        let config = parse(&CLASS, json!({})).expect("all have defaults");
        let sizes = [config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers];
        assert_eq!(sizes, [151_936, 4096, 22_016, 32]);
        let heads = [config.num_attention_heads, config.num_key_value_heads, config.head_dim];
        assert_eq!((heads, config.max_position_embeddings), ([32, 32, 128], 32_768));
        assert_eq!([config.qkv_bias, config.o_bias, config.mlp_bias], [true, false, false]);
        // Absent is 32 here, and null as many as there are query heads.
        refused(&CLASS, "num_key_value_heads", json!(5));
        let null = parse(&CLASS, json!({"num_key_value_heads": null, "num_attention_heads": 16})).expect("null is");
        assert_eq!(null.num_key_value_heads, 16);
    }

    #[test]
    fn a_window_is_refused_only_where_it_is_used() {
        let window = |fields: serde_json::Value| parse(&CLASS, fields).map(|_| ());
        window(json!({"use_sliding_window": true, "max_window_layers": 32})).expect("no layer has it");
        window(json!({"use_sliding_window": true, "sliding_window": null, "max_window_layers": 0})).expect("none");
        refused(&CLASS, "use_sliding_window", json!(true));
    }
}
