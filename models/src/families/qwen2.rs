//! Qwen 2.5 (`Qwen2ForCausalLM`): the Llama block with biases on queries, keys and values. Source: transformers
//! `models/qwen2`.

use crate::checkpoint::OpenWeights;
use crate::error::Result;
use crate::families::causal_lm;
use crate::family::{Family, LoadOptions, LoadedModel};
use crate::layers::decoder::{Biases, ConfigClass, DecoderConfig};
use crate::manifest::Manifest;

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
    biases: Biases::QueriesKeysValues,
    knows_windows: true,
};

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
    DecoderConfig::read(&manifest.whole().dir.join("config.json"), &CLASS)
}
