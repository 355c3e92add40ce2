//! The names of the Wan2.1 transformer in the files of its original implementation (single files, GGUF files, most LoRA
//! files), found from diffusers' names.
//!
//! Source: diffusers `loaders/single_file_utils.py`, `convert_wan_transformer_to_diffusers`, and
//! `scripts/convert_wan_to_diffusers.py` for `pos_embed`. The norm before the cross attention is the third one there: the
//! second has no weights.

use crate::weights::names::{Names, Place, split_index};

/// Of a transformer of any depth and width, with or without pictures.
#[derive(Debug, Clone, Copy)]
pub struct WanNames;

/// Of the tables to which the modulation by time is added.
const TABLE: &str = "scale_shift_table";

impl Names for WanNames {
    fn mark(&self) -> &'static str {
        "blocks.0.self_attn.q.weight"
    }

    fn place(&self, name: &str) -> Option<Place> {
        let original = match name.split_once('.') {
            Some(("blocks", rest)) => {
                let (block, rest) = split_index(rest)?;
                format!("blocks.{block}.{}", in_block(rest)?)
            }
            Some(("condition_embedder", rest)) => of_embedders(rest)?,
            Some(("patch_embedding", leaf)) => format!("patch_embedding.{leaf}"),
            Some(("proj_out", leaf)) => format!("head.head.{leaf}"),
            None if name == TABLE => "head.modulation".to_owned(),
            _ => return None,
        };
        Some(Place::whole(original))
    }

    fn layer(&self, name: &str) -> Option<Place> {
        if name.ends_with(TABLE) {
            return self.place(name);
        }
        let place = self.place(&format!("{name}.weight"))?;
        Some(Place::whole(place.name.strip_suffix(".weight")?))
    }
}

fn in_block(name: &str) -> Option<String> {
    if name == TABLE {
        return Some("modulation".to_owned());
    }
    let (layer, leaf) = name.rsplit_once('.')?;
    let original = match layer.split_once('.') {
        Some(("attn1", layer)) => format!("self_attn.{}", in_attention(layer)?),
        Some(("attn2", layer)) => format!("cross_attn.{}", in_attention(layer)?),
        Some(("ffn", "net.0.proj")) => "ffn.0".to_owned(),
        Some(("ffn", "net.2")) => "ffn.2".to_owned(),
        None if layer == "norm2" => "norm3".to_owned(),
        _ => return None,
    };
    Some(format!("{original}.{leaf}"))
}

fn in_attention(layer: &str) -> Option<&'static str> {
    Some(match layer {
        "to_q" => "q",
        "to_k" => "k",
        "to_v" => "v",
        "to_out.0" => "o",
        "norm_q" => "norm_q",
        "norm_k" => "norm_k",
        "add_k_proj" => "k_img",
        "add_v_proj" => "v_img",
        "norm_added_k" => "norm_k_img",
        _ => return None,
    })
}

fn of_embedders(name: &str) -> Option<String> {
    if name == "image_embedder.pos_embed" {
        return Some("img_emb.emb_pos".to_owned());
    }
    let (layer, leaf) = name.rsplit_once('.')?;
    let original = match layer {
        "time_embedder.linear_1" => "time_embedding.0",
        "time_embedder.linear_2" => "time_embedding.2",
        "time_proj" => "time_projection.1",
        "text_embedder.linear_1" => "text_embedding.0",
        "text_embedder.linear_2" => "text_embedding.2",
        "image_embedder.norm1" => "img_emb.proj.0",
        "image_embedder.ff.net.0.proj" => "img_emb.proj.1",
        "image_embedder.ff.net.2" => "img_emb.proj.3",
        "image_embedder.norm2" => "img_emb.proj.4",
        _ => return None,
    };
    Some(format!("{original}.{leaf}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_original_ones() {
        for (name, original) in [
            ("patch_embedding.weight", "patch_embedding.weight"),
            ("condition_embedder.time_proj.bias", "time_projection.1.bias"),
            ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
            ("blocks.39.attn2.add_k_proj.weight", "blocks.39.cross_attn.k_img.weight"),
            ("blocks.0.attn1.to_out.0.bias", "blocks.0.self_attn.o.bias"),
            ("blocks.0.norm2.bias", "blocks.0.norm3.bias"),
            ("blocks.7.scale_shift_table", "blocks.7.modulation"),
            ("scale_shift_table", "head.modulation"),
            ("proj_out.bias", "head.head.bias"),
        ] {
            assert_eq!(WanNames.place(name), Some(Place::whole(original)), "{name}");
        }
        for unknown in ["blocks.x.attn1.to_q.weight", "blocks.0.attn1.to_r.weight", "blocks.0.norm1.weight", "x", ""] {
            assert_eq!(WanNames.place(unknown), None, "{unknown}");
        }
        for (layer, original) in [
            ("blocks.3.ffn.net.2", "blocks.3.ffn.2"),
            ("blocks.3.scale_shift_table", "blocks.3.modulation"),
            ("scale_shift_table", "head.modulation"),
        ] {
            assert_eq!(WanNames.layer(layer), Some(Place::whole(original)), "{layer}");
        }
    }
}
