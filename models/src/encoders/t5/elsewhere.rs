//! The names of T5's and UMT5's encoders in other files than transformers': GGUF files, and the one that Wan2.1's original
//! implementation reads (`models_t5_umt5-xxl-enc`).
//!
//! Source: llama.cpp `gguf-py/gguf/constants.py` (`MODEL_ARCH.T5ENCODER`), as ComfyUI-GGUF `loader.py` (`T5_SD_MAP`) reads it;
//! Wan2.1 `wan/modules/t5.py`.

use crate::weights::names::{Names, Place, split_index};

/// Under llama.cpp's names.
#[derive(Debug, Clone, Copy)]
pub struct GgufNames;

/// Under those of Wan2.1's own UMT5.
#[derive(Debug, Clone, Copy)]
pub struct WanNames;

/// A layer of the encoder.
enum Layer<'a> {
    Table,
    LastNorm,
    InBlock(usize, &'a str),
}

/// What transformers calls `name`.
fn layer(name: &str) -> Option<Layer<'_>> {
    let layer = name.strip_suffix(".weight")?;
    match layer {
        "shared" => return Some(Layer::Table),
        "encoder.final_layer_norm" => return Some(Layer::LastNorm),
        _ => {}
    }
    let (block, rest) = split_index(layer.strip_prefix("encoder.block.")?)?;
    Some(Layer::InBlock(block, rest.strip_prefix("layer.")?))
}

impl Names for GgufNames {
    fn mark(&self) -> &'static str {
        "enc.blk.0.attn_q.weight"
    }

    fn place(&self, name: &str) -> Option<Place> {
        let name = match layer(name)? {
            Layer::Table => "token_embd".to_owned(),
            Layer::LastNorm => "enc.output_norm".to_owned(),
            Layer::InBlock(block, layer) => {
                let layer = match layer {
                    "0.SelfAttention.q" => "attn_q",
                    "0.SelfAttention.k" => "attn_k",
                    "0.SelfAttention.v" => "attn_v",
                    "0.SelfAttention.o" => "attn_o",
                    "0.SelfAttention.relative_attention_bias" => "attn_rel_b",
                    "0.layer_norm" => "attn_norm",
                    "1.layer_norm" => "ffn_norm",
                    "1.DenseReluDense.wi_0" => "ffn_gate",
                    "1.DenseReluDense.wi_1" | "1.DenseReluDense.wi" => "ffn_up",
                    "1.DenseReluDense.wo" => "ffn_down",
                    _ => return None,
                };
                format!("enc.blk.{block}.{layer}")
            }
        };
        Some(Place::whole(format!("{name}.weight")))
    }
}

impl Names for WanNames {
    fn mark(&self) -> &'static str {
        "blocks.0.attn.q.weight"
    }

    fn place(&self, name: &str) -> Option<Place> {
        let name = match layer(name)? {
            Layer::Table => "token_embedding".to_owned(),
            Layer::LastNorm => "norm".to_owned(),
            Layer::InBlock(block, layer) => {
                let layer = match layer {
                    "0.SelfAttention.q" => "attn.q",
                    "0.SelfAttention.k" => "attn.k",
                    "0.SelfAttention.v" => "attn.v",
                    "0.SelfAttention.o" => "attn.o",
                    "0.SelfAttention.relative_attention_bias" => "pos_embedding.embedding",
                    "0.layer_norm" => "norm1",
                    "1.layer_norm" => "norm2",
                    "1.DenseReluDense.wi_0" => "ffn.gate.0",
                    "1.DenseReluDense.wi_1" => "ffn.fc1",
                    "1.DenseReluDense.wo" => "ffn.fc2",
                    _ => return None,
                };
                format!("blocks.{block}.{layer}")
            }
        };
        Some(Place::whole(format!("{name}.weight")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_other_files() {
        for (name, gguf, wan) in [
            ("shared.weight", "token_embd.weight", "token_embedding.weight"),
            (
                "encoder.block.23.layer.0.SelfAttention.relative_attention_bias.weight",
                "enc.blk.23.attn_rel_b.weight",
                "blocks.23.pos_embedding.embedding.weight",
            ),
            (
                "encoder.block.0.layer.1.DenseReluDense.wi_1.weight",
                "enc.blk.0.ffn_up.weight",
                "blocks.0.ffn.fc1.weight",
            ),
            ("encoder.block.7.layer.1.layer_norm.weight", "enc.blk.7.ffn_norm.weight", "blocks.7.norm2.weight"),
            ("encoder.final_layer_norm.weight", "enc.output_norm.weight", "norm.weight"),
        ] {
            assert_eq!(GgufNames.place(name), Some(Place::whole(gguf)), "{name}");
            assert_eq!(WanNames.place(name), Some(Place::whole(wan)), "{name}");
        }
        for unknown in ["encoder.embed_tokens.weight", "encoder.block.x.layer.0.layer_norm.weight", "shared.bias", ""] {
            assert_eq!(GgufNames.place(unknown), None, "{unknown}");
            assert_eq!(WanNames.place(unknown), None, "{unknown}");
        }
    }
}
