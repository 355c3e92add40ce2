//! Llama 3.x (and everything published as `LlamaForCausalLM`). Source: transformers `models/llama`.

use crate::checkpoint::OpenWeights;
use crate::error::Result;
use crate::families::causal_lm;
use crate::family::{Family, LoadOptions, LoadedModel};
use crate::layers::decoder::{Biases, ConfigClass, DecoderConfig};
use crate::manifest::Manifest;

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
    biases: Biases::AsStated,
    knows_windows: false,
};

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
    DecoderConfig::read(&manifest.whole().dir.join("config.json"), &CLASS)
}
