//! Llama 3.x (and everything published as `LlamaForCausalLM`). Source: transformers `models/llama`.

use crate::checkpoint::{CONFIG, Manifest, OpenWeights};
use crate::config::Fields;
use crate::error::Result;
use crate::families::causal_lm;
use crate::family::{Family, LoadOptions, LoadedModel};
use crate::layers::decoder::{Biases, ConfigClass, DecoderConfig, GgufRows};
use crate::quantisation;

/// Llama 3.x.
pub struct Llama;

/// transformers' `LlamaConfig`.
const CLASS: ConfigClass = ConfigClass {
    vocab_size: 32_000,
    hidden_size: 4096,
    intermediate_size: 11_008,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: None,
    max_position_embeddings: 2048,
    eos_token_id: Some(2),
    biases: Biases::AsStated,
    knows_windows: false,
    gguf_rows: GgufRows::AlternatingHalves,
};

impl Family for Llama {
    fn name(&self) -> &'static str {
        "llama"
    }

    fn makes(&self) -> &'static str {
        "text"
    }

    fn detects(&self, manifest: &Manifest) -> bool {
        manifest.is_model("llama", "LlamaForCausalLM")
    }

    fn load(&self, manifest: &Manifest, open: &mut OpenWeights<'_>, options: &LoadOptions) -> Result<LoadedModel> {
        causal_lm::load(self.name(), &CLASS, manifest, open, options)
    }
}

/// Sizes and switches of the checkpoint's decoder. Errors name `config.json` and the field.
pub fn decoder_config(manifest: &Manifest) -> Result<DecoderConfig> {
    DecoderConfig::read(&manifest.whole().fields(CONFIG)?, &CLASS)
}

/// Likewise of a decoder whose `config.json` has these fields.
pub fn config_of(fields: &Fields) -> Result<DecoderConfig> {
    let config = DecoderConfig::read(fields, &CLASS)?;
    match config.quantisation {
        None => Ok(config),
        Some(_) => {
            Err(fields.error(quantisation::FIELD, "of a text encoder is not read; GGUF and eight-bit single files are"))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::layers::decoder::testing::{parse, refused};

    /// `LlamaConfig()` of transformers 5.24.
    #[test]
    fn absent_fields_take_the_classs_defaults() {
        let config = parse(&CLASS, json!({})).expect("all have defaults");
        let sizes = [config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers];
        assert_eq!(sizes, [32_000, 4096, 11_008, 32]);
        let heads = [config.num_attention_heads, config.num_key_value_heads, config.head_dim];
        assert_eq!((heads, config.max_position_embeddings), ([32, 32, 128], 2048));
        assert_eq!((config.rms_norm_eps, config.tie_word_embeddings), (1e-6, false));
        assert_eq!([config.qkv_bias, config.o_bias, config.mlp_bias], [false; 3]);
        let grouped = parse(&CLASS, json!({"num_key_value_heads": null, "num_attention_heads": 16})).expect("null is");
        assert_eq!((grouped.num_key_value_heads, grouped.head_dim), (16, 256));
    }

    #[test]
    fn fields_are_read_as_leniently_as_the_reference_does() {
        let config = json!({"hidden_act": "swish", "hidden_size": 64.0, "num_attention_heads": 4, "head_dim": null,
            "tie_word_embeddings": null, "attention_bias": true, "mlp_bias": null, "quantization_config": null,
            "use_sliding_window": true, "rope_scaling": null, "a_field_of_tomorrow": {"x": 1}});
        let config = parse(&CLASS, config).expect("the reference takes it");
        assert_eq!((config.hidden_size, config.head_dim, config.tie_word_embeddings), (64, 16, false));
        assert_eq!([config.qkv_bias, config.o_bias, config.mlp_bias], [true, true, false]);
    }

    #[test]
    fn what_cannot_be_computed_with_is_refused_by_field() {
        for field in ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"] {
            for value in [json!(0), json!(-1), json!(1.5), json!("8"), json!(null), json!(1u64 << 40)] {
                refused(&CLASS, field, value);
            }
        }
        for value in [json!(0), json!(3), json!(64)] {
            refused(&CLASS, "num_key_value_heads", value);
        }
        for value in [json!(0), json!(7), json!(-2)] {
            refused(&CLASS, "head_dim", value);
        }
        for value in [json!(-1e-6), json!(2.0), json!("small"), json!(null)] {
            refused(&CLASS, "rms_norm_eps", value);
        }
        refused(&CLASS, "num_attention_heads", json!(24));
        refused(&CLASS, "max_position_embeddings", json!(0));
        refused(&CLASS, "hidden_act", json!("gelu"));
        refused(&CLASS, "tie_word_embeddings", json!("yes"));
        refused(&CLASS, "rope_scaling.factor", json!({"type": "linear", "factor": "2"}));
    }
}
