//! Qwen 2.5 (`Qwen2ForCausalLM`): the Llama block with biases on queries, keys and values. Source: transformers
//! `models/qwen2`.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::checkpoint::OpenWeights;
use crate::error::{Error, Result};
use crate::families::causal_lm;
use crate::family::{Family, LoadOptions, LoadedModel};
use crate::layers::decoder::{DecoderConfig, check_plain};
use crate::layers::rope::{Rope, RopeFields};
use crate::manifest::Manifest;

/// Qwen 2.5.
pub struct Qwen2;

impl Family for Qwen2 {
    fn name(&self) -> &'static str {
        "qwen2"
    }

    fn makes(&self) -> &'static str {
        "text"
    }

    fn detects(&self, manifest: &Manifest) -> bool {
        manifest.architecture() == "Qwen2ForCausalLM"
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

/// `config.json`; absent fields as in transformers' `Qwen2Config`.
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
    use_sliding_window: bool,
    sliding_window: Option<usize>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
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
            qkv_bias: true,
            o_bias: false,
            mlp_bias: false,
            rope: Rope::from_config(path, &self.rope, head_dim, self.max_position_embeddings)?,
        };
        config.check(path)?;
        self.check_window(path, config.context_len())?;
        Ok(config)
    }

    /// Refuses windowed attention unless the window is as wide as the context.
    fn check_window(&self, path: &Path, context_len: usize) -> Result<()> {
        /// What transformers assumes.
        const DEFAULT_WINDOW: usize = 4096;
        const DEFAULT_MAX_WINDOW_LAYERS: usize = 28;
        if !self.use_sliding_window {
            return Ok(());
        }
        let window = self.sliding_window.unwrap_or(DEFAULT_WINDOW);
        let has_windowed_layers = match &self.layer_types {
            Some(layer_types) => layer_types.iter().any(|layer_type| layer_type != "full_attention"),
            None => self.max_window_layers.unwrap_or(DEFAULT_MAX_WINDOW_LAYERS) < self.num_hidden_layers,
        };
        if window < context_len && has_windowed_layers {
            return Err(Error::checkpoint(path, "use_sliding_window: windowed attention is not supported"));
        }
        Ok(())
    }
}
