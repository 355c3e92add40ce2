//! Llama 3.x (and everything published as `LlamaForCausalLM`). Source: transformers `models/llama`.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::checkpoint::OpenWeights;
use crate::error::Result;
use crate::families::causal_lm;
use crate::family::{Family, LoadOptions, LoadedModel};
use crate::layers::decoder::{DecoderConfig, check_plain};
use crate::layers::rope::{Rope, RopeFields};
use crate::manifest::Manifest;

/// Llama 3.x.
pub struct Llama;

impl Family for Llama {
    fn name(&self) -> &'static str {
        "llama"
    }

    fn makes(&self) -> &'static str {
        "text"
    }

    fn detects(&self, manifest: &Manifest) -> bool {
        manifest.architecture() == "LlamaForCausalLM"
    }

    fn load(&self, manifest: &Manifest, open: &mut OpenWeights<'_>, options: &LoadOptions) -> Result<LoadedModel> {
        causal_lm::load(self.name(), decoder_config(manifest)?, manifest, open, options)
    }
}

/// Sizes and switches of the checkpoint's decoder. Errors name `config.json` and the field.
pub fn decoder_config(manifest: &Manifest) -> Result<DecoderConfig> {
    let component = manifest.whole();
    let config: Config = component.config()?;
    config.decoder(&component.dir.join("config.json"))
}

/// `config.json`; absent fields as in transformers' `LlamaConfig`.
#[derive(Deserialize)]
struct Config {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "silu")]
    hidden_act: String,
    max_position_embeddings: usize,
    #[serde(default = "rms_norm_eps")]
    rms_norm_eps: f64,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    quantization_config: Option<Value>,
    #[serde(flatten)]
    rope: RopeFields,
}

fn silu() -> String {
    "silu".to_owned()
}

fn rms_norm_eps() -> f64 {
    1e-6
}

impl Config {
    /// `path` is the file's, for messages.
    fn decoder(&self, path: &Path) -> Result<DecoderConfig> {
        check_plain(path, &self.hidden_act, self.quantization_config.as_ref())?;
        let head_dim = self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1));
        let config = DecoderConfig {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim,
            rms_norm_eps: self.rms_norm_eps,
            max_position_embeddings: self.max_position_embeddings,
            tie_word_embeddings: self.tie_word_embeddings,
            qkv_bias: self.attention_bias,
            o_bias: self.attention_bias,
            mlp_bias: self.mlp_bias,
            rope: Rope::from_config(path, &self.rope, head_dim, self.max_position_embeddings)?,
        };
        config.check(path)?;
        Ok(config)
    }
}
