//! The names of a decoder's tensors in GGUF files, and the order of rows there.
//!
//! Owns: which names and rows a decoder's tensors have where llama.cpp's converter wrote them. Does not know: how a GGUF file
//! is read, its metadata. Source: llama.cpp `gguf-py/gguf/constants.py` (`MODEL_ARCH.LLAMA`, `MODEL_ARCH.QWEN2`),
//! `conversion/llama.py` (`LlamaModel.permute`).

use super::DecoderConfig;
use crate::weights::Weights;
use crate::weights::names::{Extent, Names, Place, split_index};

/// In which order a GGUF file has the rows of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgufRows {
    /// As transformers has them (architecture `qwen2`).
    AsPublished,
    /// For a rotation in pairs of neighbours (architecture `llama`): the rows alternate between the two halves of a head that
    /// are a pair here.
    AlternatingHalves,
}

/// Of files of the architectures `llama` and `qwen2`.
#[derive(Debug, Clone, Copy)]
pub struct LlamaGgufNames {
    rows: GgufRows,
    num_attention_heads: usize,
    num_key_value_heads: usize,
}

impl LlamaGgufNames {
    /// Of the decoder with this configuration.
    pub fn new(config: &DecoderConfig) -> Self {
        let DecoderConfig { gguf_rows: rows, num_attention_heads, num_key_value_heads, .. } = *config;
        Self { rows, num_attention_heads, num_key_value_heads }
    }

    /// Of a Llama's trunk the tensors as transformers' `LlamaModel` names them, from files that have those names, those of
    /// the model with its head, or llama.cpp's. The head is known and not wanted.
    pub fn trunk(weights: &Weights, config: &DecoderConfig) -> Weights {
        let weights = weights.clone().or_named(Self::new(config));
        weights.ignore_below("lm_head");
        // Of a head in a GGUF file; the factors of long positions are in the configuration too.
        weights.ignore("lm_head.weight");
        weights.ignore("rope_freqs.weight");
        if weights.contains_below("model") { weights.pp("model") } else { weights }
    }
}

impl Names for LlamaGgufNames {
    fn below(&self, beginning: &str) -> Option<String> {
        match beginning.strip_prefix("model.").unwrap_or(beginning) {
            "norm." => Some("output_norm.".to_owned()),
            layer => Some(format!("blk.{}", layer.strip_prefix("layers.")?)),
        }
    }

    fn mark(&self) -> &'static str {
        "blk.0.attn_q.weight"
    }

    fn place(&self, name: &str) -> Option<Place> {
        let (layer, leaf) = name.strip_prefix("model.").unwrap_or(name).rsplit_once('.')?;
        let Some((block, layer)) = layer.strip_prefix("layers.").and_then(split_index) else {
            let layer = match layer {
                "embed_tokens" => "token_embd",
                "norm" => "output_norm",
                "lm_head" => "output",
                _ => return None,
            };
            return Some(Place::whole(format!("{layer}.{leaf}")));
        };
        let halves = |heads| match self.rows {
            GgufRows::AsPublished => Extent::Whole,
            GgufRows::AlternatingHalves => Extent::AlternatingHalves { heads },
        };
        let (layer, part) = match layer {
            "input_layernorm" => ("attn_norm", Extent::Whole),
            "self_attn.q_proj" => ("attn_q", halves(self.num_attention_heads)),
            "self_attn.k_proj" => ("attn_k", halves(self.num_key_value_heads)),
            "self_attn.v_proj" => ("attn_v", Extent::Whole),
            "self_attn.o_proj" => ("attn_output", Extent::Whole),
            "post_attention_layernorm" => ("ffn_norm", Extent::Whole),
            "mlp.gate_proj" => ("ffn_gate", Extent::Whole),
            "mlp.up_proj" => ("ffn_up", Extent::Whole),
            "mlp.down_proj" => ("ffn_down", Extent::Whole),
            _ => return None,
        };
        Some(Place { name: format!("blk.{block}.{layer}.{leaf}"), part })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: LlamaGgufNames =
        LlamaGgufNames { rows: GgufRows::AlternatingHalves, num_attention_heads: 32, num_key_value_heads: 8 };

    #[test]
    fn names_are_those_of_llama_cpp() {
        for (name, there) in [
            ("embed_tokens.weight", "token_embd.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("lm_head.weight", "output.weight"),
            ("layers.31.input_layernorm.weight", "blk.31.attn_norm.weight"),
            ("model.layers.3.self_attn.o_proj.bias", "blk.3.attn_output.bias"),
            ("layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
            ("layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ] {
            assert_eq!(NAMES.place(name), Some(Place::whole(there)), "{name}");
        }
        for (name, there, heads) in [
            ("layers.7.self_attn.q_proj.weight", "blk.7.attn_q.weight", 32),
            ("model.layers.7.self_attn.k_proj.bias", "blk.7.attn_k.bias", 8),
        ] {
            let part = Extent::AlternatingHalves { heads };
            assert_eq!(NAMES.place(name), Some(Place { name: there.to_owned(), part }), "{name}");
        }
        let as_published = LlamaGgufNames { rows: GgufRows::AsPublished, ..NAMES };
        let place = as_published.place("layers.7.self_attn.q_proj.bias");
        assert_eq!(place, Some(Place::whole("blk.7.attn_q.bias")));
        for (beginning, there) in [
            ("layers.30.", Some("blk.30.")),
            ("model.layers.3.", Some("blk.3.")),
            ("norm.", Some("output_norm.")),
            ("model.", None),
        ] {
            assert_eq!(NAMES.below(beginning).as_deref(), there, "{beginning}");
        }
        for unknown in ["layers.x.self_attn.q_proj.weight", "layers.0.self_attn.r_proj.weight", "norm", ""] {
            assert_eq!(NAMES.place(unknown), None, "{unknown}");
        }
    }
}
