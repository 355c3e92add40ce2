//! The names of HunyuanVideo's transformer in other files than diffusers', found from diffusers' names: those of its original
//! implementation (single files, GGUF files, most LoRA files), and those under which ComfyUI saves it.
//!
//! Source: diffusers `loaders/single_file_utils.py`, `convert_hunyuan_video_transformer_to_diffusers`; ComfyUI
//! `comfy/supported_models.py`, `HunyuanVideo.process_unet_state_dict`. Projections of the same input are one matrix in both,
//! and the last modulation has its shift before its scale.

use super::config::HunyuanVideoConfig;
use crate::families::lcm;
use crate::weights::names::{Extent, Names, Place, Rows, split_index};

/// The original names, of a transformer of any depth and width.
#[derive(Debug, Clone, Copy)]
pub struct HunyuanVideoNames {
    /// Widths of the stream and of a feed-forward in it, by their greatest common divisor: of so many parts are the rows of
    /// the joined matrices of single blocks.
    stream: usize,
    inner: usize,
}

impl HunyuanVideoNames {
    /// Of the network with this configuration.
    pub fn new(config: &HunyuanVideoConfig) -> Self {
        let multiple = lcm(config.dim(), config.inner());
        Self { stream: multiple / config.inner(), inner: multiple / config.dim() }
    }

    /// `linear1` is query, key, value and the feed-forward's way in.
    fn of_linear1(self, member: usize) -> (&'static str, Extent) {
        let count = if member < 3 { self.stream } else { self.inner };
        let rows = Rows { first: member * self.stream, count, of: 3 * self.stream + self.inner };
        ("linear1", Extent::Rows(rows))
    }

    fn single_block(self, layer: &str) -> Option<(&'static str, Extent)> {
        Some(match layer {
            "norm.linear" => ("modulation.linear", Extent::Whole),
            "attn.to_q" => self.of_linear1(0),
            "attn.to_k" => self.of_linear1(1),
            "attn.to_v" => self.of_linear1(2),
            "proj_mlp" => self.of_linear1(3),
            "attn.norm_q" => ("q_norm", Extent::Whole),
            "attn.norm_k" => ("k_norm", Extent::Whole),
            "proj_out" => ("linear2", Extent::Whole),
            _ => return None,
        })
    }
}

impl Names for HunyuanVideoNames {
    fn mark(&self) -> &'static str {
        "time_in.mlp.0.weight"
    }

    fn place(&self, name: &str) -> Option<Place> {
        let (first, rest) = name.split_once('.')?;
        match first {
            "transformer_blocks" => in_block("double_blocks", rest, dual_block),
            "single_transformer_blocks" => in_block("single_blocks", rest, |layer| self.single_block(layer)),
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

/// The names under which ComfyUI saves the network, as its own files of HunyuanVideo have them.
#[derive(Debug, Clone, Copy)]
pub struct ComfyNames {
    original: HunyuanVideoNames,
    /// What the norms of queries and keys scale by.
    norm_leaf: &'static str,
}

impl ComfyNames {
    /// As its files of HunyuanVideo were published.
    pub fn published(original: HunyuanVideoNames) -> Self {
        Self { original, norm_leaf: "scale" }
    }

    /// As it saves the network since its norms are torch's.
    pub fn of_today(original: HunyuanVideoNames) -> Self {
        Self { original, norm_leaf: "weight" }
    }
}

/// What ComfyUI renames: the parts of original names that the first file has, by its own.
const OF_COMFY: [(&str, &str); 14] = [
    ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
    ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
    ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
    ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
    ("_in.mlp.0.", "_in.in_layer."),
    ("_in.mlp.2.", "_in.out_layer."),
    ("_attn_qkv.", "_attn.qkv."),
    ("_attn_proj.", "_attn.proj."),
    ("_attn_q_norm.", "_attn.norm.query_norm."),
    ("_attn_k_norm.", "_attn.norm.key_norm."),
    (".q_norm.", ".norm.query_norm."),
    (".k_norm.", ".norm.key_norm."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.2."),
];
/// Ends of names of layers that are the norms of queries and keys.
const NORMS: [&str; 2] = [".query_norm.", ".key_norm."];
/// As [`OF_COMFY`], of modulations.
const MODULATIONS: [(&str, &str); 2] = [("_mod.linear.", "_mod.lin."), (".modulation.linear.", ".modulation.lin.")];

impl Names for ComfyNames {
    fn mark(&self) -> &'static str {
        match self.norm_leaf {
            "scale" => "time_in.in_layer.weight",
            _ => "double_blocks.0.img_attn.norm.query_norm.weight",
        }
    }

    fn place(&self, name: &str) -> Option<Place> {
        let Place { name, part } = self.original.place(name)?;
        // Each name has one of these parts at most.
        let own = OF_COMFY.iter().chain(&MODULATIONS).find(|(original, _)| name.contains(original));
        let name = own.map_or_else(|| name.clone(), |(original, own)| name.replacen(original, own, 1));
        let of_norm = name.strip_suffix("weight").filter(|layer| NORMS.iter().any(|norm| layer.ends_with(norm)));
        let name = of_norm.map_or_else(|| name.clone(), |layer| format!("{layer}{}", self.norm_leaf));
        Some(Place { name, part })
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

    const NAMES: HunyuanVideoNames = HunyuanVideoNames { stream: 1, inner: 4 };

    #[track_caller]
    fn check(name: &str, original: &str, comfy: &str, part: Extent) {
        assert_eq!(NAMES.place(name), Some(Place { name: original.to_owned(), part }), "{name}");
        assert_eq!(ComfyNames::published(NAMES).place(name), Some(Place { name: comfy.to_owned(), part }), "{name}");
    }

    const fn rows(first: usize, count: usize, of: usize) -> Extent {
        Extent::Rows(Rows { first, count, of })
    }

    #[test]
    fn names_are_those_of_the_other_files() {
        for (name, original, comfy) in [
            ("x_embedder.proj.weight", "img_in.proj.weight", "img_in.proj.weight"),
            ("time_text_embed.text_embedder.linear_2.bias", "vector_in.out_layer.bias", "vector_in.out_layer.bias"),
            ("time_text_embed.guidance_embedder.linear_1.bias", "guidance_in.mlp.0.bias", "guidance_in.in_layer.bias"),
            (
                "transformer_blocks.0.attn.norm_q.weight",
                "double_blocks.0.img_attn_q_norm.weight",
                "double_blocks.0.img_attn.norm.query_norm.scale",
            ),
            (
                "transformer_blocks.3.norm1_context.linear.bias",
                "double_blocks.3.txt_mod.linear.bias",
                "double_blocks.3.txt_mod.lin.bias",
            ),
            (
                "transformer_blocks.3.ff_context.net.2.bias",
                "double_blocks.3.txt_mlp.fc2.bias",
                "double_blocks.3.txt_mlp.2.bias",
            ),
            (
                "single_transformer_blocks.1.attn.norm_k.weight",
                "single_blocks.1.k_norm.weight",
                "single_blocks.1.norm.key_norm.scale",
            ),
            (
                "context_embedder.time_text_embed.timestep_embedder.linear_2.bias",
                "txt_in.t_embedder.mlp.2.bias",
                "txt_in.t_embedder.out_layer.bias",
            ),
            (
                "context_embedder.time_text_embed.text_embedder.linear_1.bias",
                "txt_in.c_embedder.linear_1.bias",
                "txt_in.c_embedder.in_layer.bias",
            ),
            (
                "context_embedder.token_refiner.refiner_blocks.1.attn.to_out.0.weight",
                "txt_in.individual_token_refiner.blocks.1.self_attn_proj.weight",
                "txt_in.individual_token_refiner.blocks.1.self_attn.proj.weight",
            ),
            (
                "context_embedder.token_refiner.refiner_blocks.1.ff.net.0.proj.weight",
                "txt_in.individual_token_refiner.blocks.1.mlp.fc1.weight",
                "txt_in.individual_token_refiner.blocks.1.mlp.0.weight",
            ),
        ] {
            check(name, original, comfy, Extent::Whole);
        }
        check(
            "transformer_blocks.7.attn.add_k_proj.bias",
            "double_blocks.7.txt_attn_qkv.bias",
            "double_blocks.7.txt_attn.qkv.bias",
            rows(1, 1, 3),
        );
        let linear1 = "single_blocks.37.linear1.weight";
        check("single_transformer_blocks.37.proj_mlp.weight", linear1, linear1, rows(3, 4, 7));
        let last = "final_layer.adaLN_modulation.1.weight";
        check("norm_out.linear.weight", last, last, Extent::SwappedHalves);
        for unknown in ["transformer_blocks.x.attn.to_q.weight", "transformer_blocks.0.attn.to_r.weight", "x", ""] {
            assert_eq!(NAMES.place(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn comfys_norms_have_weights_today() {
        let norm = "single_transformer_blocks.1.attn.norm_q.weight";
        for (names, there) in [
            (ComfyNames::published(NAMES), "single_blocks.1.norm.query_norm.scale"),
            (ComfyNames::of_today(NAMES), "single_blocks.1.norm.query_norm.weight"),
        ] {
            assert_eq!(names.place(norm), Some(Place::whole(there)));
        }
    }

    /// Widths of 24 and 60 are parts of 12.
    #[test]
    fn rows_are_counted_in_parts_of_both_widths() {
        let names = HunyuanVideoNames::new(&HunyuanVideoConfig {
            num_attention_heads: 2,
            attention_head_dim: 12,
            mlp_ratio: 2.5,
            ..Default::default()
        });
        let part = |name: &str| names.place(&format!("single_transformer_blocks.0.{name}.weight")).map(|at| at.part);
        assert_eq!(part("attn.to_v"), Some(rows(4, 2, 11)));
        assert_eq!(part("proj_mlp"), Some(rows(6, 5, 11)));
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
