//! The names of the FLUX.1 transformer in the single files of its original implementation (`flux1-dev.safetensors`, GGUF
//! files), found from diffusers' names.
//!
//! Source: diffusers `loaders/single_file_utils.py`, `convert_flux_transformer_checkpoint_to_diffusers`. Projections of
//! the same input are one matrix there, and the last modulation has its shift before its scale.

use super::transformer::MLP_RATIO;
use crate::weights::names::{Extent, Names, Place, Rows, split_index};

/// Of a transformer of any depth and width.
#[derive(Debug, Clone, Copy)]
pub struct FluxNames;

impl Names for FluxNames {
    fn mark(&self) -> &'static str {
        "double_blocks.0.img_mod.lin.weight"
    }

    fn place(&self, name: &str) -> Option<Place> {
        let (first, rest) = name.split_once('.')?;
        match first {
            "transformer_blocks" => in_block("double_blocks", rest, double_block),
            "single_transformer_blocks" => in_block("single_blocks", rest, single_block),
            "x_embedder" => Some(Place::whole(format!("img_in.{rest}"))),
            "context_embedder" => Some(Place::whole(format!("txt_in.{rest}"))),
            "proj_out" => Some(Place::whole(format!("final_layer.linear.{rest}"))),
            "time_text_embed" => of_embedders(rest).map(Place::whole),
            "norm_out" => {
                let leaf = rest.strip_prefix("linear.")?;
                let name = format!("final_layer.adaLN_modulation.1.{leaf}");
                Some(Place { name, part: Extent::SwappedHalves })
            }
            _ => None,
        }
    }
}

fn of_embedders(name: &str) -> Option<String> {
    let mut parts = name.splitn(3, '.');
    let embedder = match parts.next()? {
        "timestep_embedder" => "time_in",
        "guidance_embedder" => "guidance_in",
        "text_embedder" => "vector_in",
        _ => return None,
    };
    let layer = match parts.next()? {
        "linear_1" => "in_layer",
        "linear_2" => "out_layer",
        _ => return None,
    };
    Some(format!("{embedder}.{layer}.{}", parts.next()?))
}

/// What follows the name of a list of blocks; `place` says it of a layer in a block.
fn in_block(list: &str, name: &str, place: fn(&str) -> Option<(&'static str, Extent)>) -> Option<Place> {
    let (block, rest) = split_index(name)?;
    let (layer, leaf) = rest.rsplit_once('.')?;
    let (layer, part) = place(layer)?;
    // What the norms of queries and keys scale by is called so.
    let leaf = if layer.ends_with("_norm") { "scale" } else { leaf };
    Some(Place { name: format!("{list}.{block}.{layer}.{leaf}"), part })
}

fn double_block(layer: &str) -> Option<(&'static str, Extent)> {
    let third = |first| Extent::Rows(Rows { first, count: 1, of: 3 });
    Some(match layer {
        "norm1.linear" => ("img_mod.lin", Extent::Whole),
        "attn.to_q" => ("img_attn.qkv", third(0)),
        "attn.to_k" => ("img_attn.qkv", third(1)),
        "attn.to_v" => ("img_attn.qkv", third(2)),
        "attn.norm_q" => ("img_attn.norm.query_norm", Extent::Whole),
        "attn.norm_k" => ("img_attn.norm.key_norm", Extent::Whole),
        "attn.to_out.0" => ("img_attn.proj", Extent::Whole),
        "ff.net.0.proj" => ("img_mlp.0", Extent::Whole),
        "ff.net.2" => ("img_mlp.2", Extent::Whole),
        "norm1_context.linear" => ("txt_mod.lin", Extent::Whole),
        "attn.add_q_proj" => ("txt_attn.qkv", third(0)),
        "attn.add_k_proj" => ("txt_attn.qkv", third(1)),
        "attn.add_v_proj" => ("txt_attn.qkv", third(2)),
        "attn.norm_added_q" => ("txt_attn.norm.query_norm", Extent::Whole),
        "attn.norm_added_k" => ("txt_attn.norm.key_norm", Extent::Whole),
        "attn.to_add_out" => ("txt_attn.proj", Extent::Whole),
        "ff_context.net.0.proj" => ("txt_mlp.0", Extent::Whole),
        "ff_context.net.2" => ("txt_mlp.2", Extent::Whole),
        _ => return None,
    })
}

/// `linear1` is query, key, value and the feed-forward's way in, which is [`MLP_RATIO`] times as wide as each of them.
fn single_block(layer: &str) -> Option<(&'static str, Extent)> {
    let of_linear1 = |first, count| ("linear1", Extent::Rows(Rows { first, count, of: 3 + MLP_RATIO }));
    Some(match layer {
        "norm.linear" => ("modulation.lin", Extent::Whole),
        "attn.to_q" => of_linear1(0, 1),
        "attn.to_k" => of_linear1(1, 1),
        "attn.to_v" => of_linear1(2, 1),
        "proj_mlp" => of_linear1(3, MLP_RATIO),
        "attn.norm_q" => ("norm.query_norm", Extent::Whole),
        "attn.norm_k" => ("norm.key_norm", Extent::Whole),
        "proj_out" => ("linear2", Extent::Whole),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(name: &str, original: &str, part: Extent) {
        assert_eq!(FluxNames.place(name), Some(Place { name: original.to_owned(), part }), "{name}");
    }

    #[test]
    fn names_are_the_original_ones() {
        let rows = |first, count, of| Extent::Rows(Rows { first, count, of });
        check("x_embedder.weight", "img_in.weight", Extent::Whole);
        check("time_text_embed.guidance_embedder.linear_2.bias", "guidance_in.out_layer.bias", Extent::Whole);
        check("transformer_blocks.7.attn.add_k_proj.bias", "double_blocks.7.txt_attn.qkv.bias", rows(1, 1, 3));
        check(
            "transformer_blocks.0.attn.norm_q.weight",
            "double_blocks.0.img_attn.norm.query_norm.scale",
            Extent::Whole,
        );
        check("single_transformer_blocks.37.proj_mlp.weight", "single_blocks.37.linear1.weight", rows(3, 4, 7));
        check("norm_out.linear.weight", "final_layer.adaLN_modulation.1.weight", Extent::SwappedHalves);
        for unknown in ["transformer_blocks.x.attn.to_q.weight", "transformer_blocks.0.attn.to_r.weight", "x", ""] {
            assert_eq!(FluxNames.place(unknown), None, "{unknown}");
        }
        let layer = FluxNames.layer("single_transformer_blocks.3.attn.to_v").expect("is known");
        assert_eq!(layer, Place { name: "single_blocks.3.linear1".to_owned(), part: rows(2, 1, 7) });
    }
}
