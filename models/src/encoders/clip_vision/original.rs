//! The names of the vision encoder in the file that Wan2.1's original implementation reads
//! (`models_clip_open-clip-xlm-roberta-large-vit-huge-14`, shared with its vision half alone), found from transformers'
//! names.
//!
//! Source: Wan2.1 `wan/modules/clip.py`, `VisionTransformer` below `visual.`. Queries, keys and values are one matrix there,
//! embeddings have dimensions for the batch, and the projection is a bare tensor.

use crate::weights::names::{Extent, Names, Place, Rows, split_index};

/// Of an encoder of any depth and width.
#[derive(Debug, Clone, Copy)]
pub struct VisualNames;

impl Names for VisualNames {
    fn mark(&self) -> &'static str {
        "visual.cls_embedding"
    }

    fn place(&self, name: &str) -> Option<Place> {
        let below = |name: &str, part| Some(Place { name: format!("visual.{name}"), part });
        match name {
            "embeddings.class_embedding" => return below("cls_embedding", Extent::Batched { dims: 2 }),
            "embeddings.position_embedding.weight" => return below("pos_embedding", Extent::Batched { dims: 1 }),
            "visual_projection.weight" => return below("head", Extent::Whole),
            _ => {}
        }
        let (layer, leaf) = name.rsplit_once('.')?;
        match layer {
            "embeddings.patch_embedding" => return below(&format!("patch_embedding.{leaf}"), Extent::Whole),
            "pre_layrnorm" => return below(&format!("pre_norm.{leaf}"), Extent::Whole),
            "post_layernorm" => return below(&format!("post_norm.{leaf}"), Extent::Whole),
            _ => {}
        }
        let (index, layer) = split_index(layer.strip_prefix("encoder.layers.")?)?;
        let (layer, part) = in_layer(layer)?;
        below(&format!("transformer.{index}.{layer}.{leaf}"), part)
    }

    fn below(&self, beginning: &str) -> Option<String> {
        match beginning {
            "post_layernorm." => Some("visual.post_norm.".to_owned()),
            _ => beginning.strip_prefix("encoder.layers.").map(|layer| format!("visual.transformer.{layer}")),
        }
    }
}

fn in_layer(layer: &str) -> Option<(&'static str, Extent)> {
    let third = |first| Extent::Rows(Rows { first, count: 1, of: 3 });
    Some(match layer {
        "layer_norm1" => ("norm1", Extent::Whole),
        "self_attn.q_proj" => ("attn.to_qkv", third(0)),
        "self_attn.k_proj" => ("attn.to_qkv", third(1)),
        "self_attn.v_proj" => ("attn.to_qkv", third(2)),
        "self_attn.out_proj" => ("attn.proj", Extent::Whole),
        "layer_norm2" => ("norm2", Extent::Whole),
        "mlp.fc1" => ("mlp.0", Extent::Whole),
        "mlp.fc2" => ("mlp.2", Extent::Whole),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_original_ones() {
        let third = |first| Extent::Rows(Rows { first, count: 1, of: 3 });
        for (name, original, part) in [
            ("embeddings.class_embedding", "visual.cls_embedding", Extent::Batched { dims: 2 }),
            ("embeddings.position_embedding.weight", "visual.pos_embedding", Extent::Batched { dims: 1 }),
            ("embeddings.patch_embedding.weight", "visual.patch_embedding.weight", Extent::Whole),
            ("pre_layrnorm.bias", "visual.pre_norm.bias", Extent::Whole),
            ("encoder.layers.31.self_attn.k_proj.bias", "visual.transformer.31.attn.to_qkv.bias", third(1)),
            ("encoder.layers.0.mlp.fc2.weight", "visual.transformer.0.mlp.2.weight", Extent::Whole),
        ] {
            assert_eq!(VisualNames.place(name), Some(Place { name: original.to_owned(), part }), "{name}");
        }
        assert_eq!(VisualNames.below("encoder.layers.31."), Some("visual.transformer.31.".to_owned()));
        for unknown in ["encoder.layers.0.self_attn.x.bias", "vision_model.pre_layrnorm.bias", ""] {
            assert_eq!(VisualNames.place(unknown), None, "{unknown}");
        }
    }
}
