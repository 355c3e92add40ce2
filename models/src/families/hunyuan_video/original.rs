//! The names of HunyuanVideo's transformer in the files of its original implementation, found from diffusers' names.
//!
//! Source: diffusers `loaders/single_file_utils.py`, `convert_hunyuan_video_transformer_to_diffusers`. Projections of the same
//! input are one matrix there, and the last modulation has its shift before its scale.

use super::config::HunyuanVideoConfig;
use crate::weights::names::{Extent, Names, Place, Rows, split_index};

/// Of a transformer of any depth and width.
#[derive(Debug, Clone, Copy)]
pub struct HunyuanVideoNames {
    /// How many times as wide as the stream its feed-forward is; `None` where that is no whole number, so that its rows in
    /// the joined matrices of single blocks cannot be told by counting parts.
    mlp_ratio: Option<usize>,
}

impl HunyuanVideoNames {
    /// Of the network with this configuration.
    pub fn new(config: &HunyuanVideoConfig) -> Self {
        Self { mlp_ratio: (config.mlp_ratio.fract() == 0.0).then_some(config.mlp_ratio as usize) }
    }
}

impl Names for HunyuanVideoNames {
    fn mark(&self) -> &'static str {
        "img_in.proj.weight"
    }

    fn place(&self, name: &str) -> Option<Place> {
        let (first, rest) = name.split_once('.')?;
        match first {
            "transformer_blocks" => in_block("double_blocks", rest, dual_block),
            "single_transformer_blocks" => in_block("single_blocks", rest, |layer| single_block(layer, self.mlp_ratio)),
            "x_embedder" => Some(Place::whole(format!("img_in.{rest}"))),
            "proj_out" => Some(Place::whole(format!("final_layer.linear.{rest}"))),
            "time_text_embed" => of_embedders(rest),
            "context_embedder" => of_refiner(rest),
            "norm_out" => {
                let leaf = rest.strip_prefix("linear.")?;
                let name = format!("final_layer.adaLN_modulation.1.{leaf}");
                Some(Place { name, part: Extent::SwappedHalves })
            }
            _ => None,
        }
    }
}

fn of_embedders(name: &str) -> Option<Place> {
    let (layer, leaf) = name.rsplit_once('.')?;
    let layer = match layer {
        "timestep_embedder.linear_1" => "time_in.mlp.0",
        "timestep_embedder.linear_2" => "time_in.mlp.2",
        "guidance_embedder.linear_1" => "guidance_in.mlp.0",
        "guidance_embedder.linear_2" => "guidance_in.mlp.2",
        "text_embedder.linear_1" => "vector_in.in_layer",
        "text_embedder.linear_2" => "vector_in.out_layer",
        _ => return None,
    };
    Some(Place::whole(format!("{layer}.{leaf}")))
}

/// Of the token refiner.
fn of_refiner(name: &str) -> Option<Place> {
    if let Some(block) = name.strip_prefix("token_refiner.refiner_blocks.") {
        return in_block("txt_in.individual_token_refiner.blocks", block, refiner_block);
    }
    let (layer, leaf) = name.rsplit_once('.')?;
    let layer = match layer {
        "time_text_embed.timestep_embedder.linear_1" => "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2" => "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1" => "c_embedder.linear_1",
        "time_text_embed.text_embedder.linear_2" => "c_embedder.linear_2",
        "proj_in" => "input_embedder",
        _ => return None,
    };
    Some(Place::whole(format!("txt_in.{layer}.{leaf}")))
}

/// What follows the name of a list of blocks; `place` says it of a layer in a block.
fn in_block(list: &str, name: &str, place: impl Fn(&str) -> Option<(&'static str, Extent)>) -> Option<Place> {
    let (block, rest) = split_index(name)?;
    let (layer, leaf) = rest.rsplit_once('.')?;
    let (layer, part) = place(layer)?;
    Some(Place { name: format!("{list}.{block}.{layer}.{leaf}"), part })
}

fn third(first: usize) -> Extent {
    Extent::Rows(Rows { first, count: 1, of: 3 })
}

fn dual_block(layer: &str) -> Option<(&'static str, Extent)> {
    Some(match layer {
        "norm1.linear" => ("img_mod.linear", Extent::Whole),
        "attn.to_q" => ("img_attn_qkv", third(0)),
        "attn.to_k" => ("img_attn_qkv", third(1)),
        "attn.to_v" => ("img_attn_qkv", third(2)),
        "attn.norm_q" => ("img_attn_q_norm", Extent::Whole),
        "attn.norm_k" => ("img_attn_k_norm", Extent::Whole),
        "attn.to_out.0" => ("img_attn_proj", Extent::Whole),
        "ff.net.0.proj" => ("img_mlp.fc1", Extent::Whole),
        "ff.net.2" => ("img_mlp.fc2", Extent::Whole),
        "norm1_context.linear" => ("txt_mod.linear", Extent::Whole),
        "attn.add_q_proj" => ("txt_attn_qkv", third(0)),
        "attn.add_k_proj" => ("txt_attn_qkv", third(1)),
        "attn.add_v_proj" => ("txt_attn_qkv", third(2)),
        "attn.norm_added_q" => ("txt_attn_q_norm", Extent::Whole),
        "attn.norm_added_k" => ("txt_attn_k_norm", Extent::Whole),
        "attn.to_add_out" => ("txt_attn_proj", Extent::Whole),
        "ff_context.net.0.proj" => ("txt_mlp.fc1", Extent::Whole),
        "ff_context.net.2" => ("txt_mlp.fc2", Extent::Whole),
        _ => return None,
    })
}

/// `linear1` is query, key, value and the feed-forward's way in.
fn single_block(layer: &str, mlp_ratio: Option<usize>) -> Option<(&'static str, Extent)> {
    let of_linear1 = |first, count| Some(("linear1", Extent::Rows(Rows { first, count, of: 3 + mlp_ratio? })));
    Some(match layer {
        "norm.linear" => ("modulation.linear", Extent::Whole),
        "attn.to_q" => of_linear1(0, 1)?,
        "attn.to_k" => of_linear1(1, 1)?,
        "attn.to_v" => of_linear1(2, 1)?,
        "proj_mlp" => of_linear1(3, mlp_ratio?)?,
        "attn.norm_q" => ("q_norm", Extent::Whole),
        "attn.norm_k" => ("k_norm", Extent::Whole),
        "proj_out" => ("linear2", Extent::Whole),
        _ => return None,
    })
}

fn refiner_block(layer: &str) -> Option<(&'static str, Extent)> {
    Some(match layer {
        "norm1" => ("norm1", Extent::Whole),
        "attn.to_q" => ("self_attn_qkv", third(0)),
        "attn.to_k" => ("self_attn_qkv", third(1)),
        "attn.to_v" => ("self_attn_qkv", third(2)),
        "attn.to_out.0" => ("self_attn_proj", Extent::Whole),
        "norm2" => ("norm2", Extent::Whole),
        "ff.net.0.proj" => ("mlp.fc1", Extent::Whole),
        "ff.net.2" => ("mlp.fc2", Extent::Whole),
        "norm_out.linear" => ("adaLN_modulation.1", Extent::Whole),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::repository;

    const NAMES: HunyuanVideoNames = HunyuanVideoNames { mlp_ratio: Some(4) };

    #[track_caller]
    fn check(name: &str, original: &str, part: Extent) {
        assert_eq!(NAMES.place(name), Some(Place { name: original.to_owned(), part }), "{name}");
    }

    #[test]
    fn names_are_the_original_ones() {
        let rows = |first, count, of| Extent::Rows(Rows { first, count, of });
        check("x_embedder.proj.weight", "img_in.proj.weight", Extent::Whole);
        check("time_text_embed.text_embedder.linear_2.bias", "vector_in.out_layer.bias", Extent::Whole);
        check("transformer_blocks.7.attn.add_k_proj.bias", "double_blocks.7.txt_attn_qkv.bias", rows(1, 1, 3));
        check("transformer_blocks.0.attn.norm_q.weight", "double_blocks.0.img_attn_q_norm.weight", Extent::Whole);
        check("single_transformer_blocks.37.proj_mlp.weight", "single_blocks.37.linear1.weight", rows(3, 4, 7));
        check("norm_out.linear.weight", "final_layer.adaLN_modulation.1.weight", Extent::SwappedHalves);
        check(
            "context_embedder.token_refiner.refiner_blocks.1.ff.net.0.proj.weight",
            "txt_in.individual_token_refiner.blocks.1.mlp.fc1.weight",
            Extent::Whole,
        );
        for unknown in ["transformer_blocks.x.attn.to_q.weight", "transformer_blocks.0.attn.to_r.weight", "x", ""] {
            assert_eq!(NAMES.place(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn a_feed_forward_of_no_whole_width_has_no_rows_to_count() {
        let names = HunyuanVideoNames::new(&HunyuanVideoConfig { mlp_ratio: 2.5, ..Default::default() });
        assert_eq!(names.place("single_transformer_blocks.0.proj_mlp.weight"), None);
        assert!(names.place("single_transformer_blocks.0.proj_out.weight").is_some());
    }

    #[test]
    fn every_tensor_of_the_network_has_a_place() {
        let folder = repository().join("tests/goldens/hunyuan-video-a/checkpoint/transformer");
        let index = folder.join("diffusion_pytorch_model.safetensors.index.json");
        let index: serde_json::Value = crate::config::read_json(&index).expect("an index");
        let names = index["weight_map"].as_object().expect("names");
        for name in names.keys() {
            assert!(NAMES.place(name).is_some(), "{name}");
        }
    }
}
