//! The names of an `AutoencoderKL` in the files of its original implementation (`first_stage_model.*` of an SDXL file,
//! `ae.safetensors` of FLUX.1), found from diffusers' names. ComfyUI gives HunyuanVideo's VAE the same names.
//!
//! Source: diffusers `loaders/single_file_utils.py`, `convert_ldm_vae_checkpoint`; ComfyUI `comfy/diffusers_convert.py`,
//! `convert_vae_state_dict`. Levels of the decoder are counted from the other end there. What a causal convolution calls its
//! own (`conv1.conv.weight`) stays.

use crate::weights::names::{Names, Place, split_index};

/// Of a VAE of some depth.
#[derive(Debug, Clone)]
pub struct KlNames {
    levels: usize,
}

impl KlNames {
    /// Of a VAE with so many levels, which `block_out_channels` of its configuration lists.
    pub fn new(levels: usize) -> Self {
        Self { levels }
    }

    /// What follows `encoder.` or `decoder.`.
    fn of_half(&self, name: &str) -> Option<String> {
        let (first, rest) = name.split_once('.')?;
        match first {
            "conv_in" | "conv_out" => Some(name.to_owned()),
            "conv_norm_out" => Some(format!("norm_out.{rest}")),
            "mid_block" => of_mid_block(rest),
            "down_blocks" => {
                let (level, rest) = split_index(rest)?;
                of_level(rest).map(|rest| format!("down.{level}.{rest}"))
            }
            "up_blocks" => {
                let (block, rest) = split_index(rest)?;
                let level = self.levels.checked_sub(1 + block)?;
                of_level(rest).map(|rest| format!("up.{level}.{rest}"))
            }
            _ => None,
        }
    }
}

impl Names for KlNames {
    fn mark(&self) -> &'static str {
        "decoder.mid.block_1.norm1.weight"
    }

    fn place(&self, name: &str) -> Option<Place> {
        let (first, rest) = name.split_once('.')?;
        match first {
            "encoder" | "decoder" => self.of_half(rest).map(|rest| Place::whole(format!("{first}.{rest}"))),
            "quant_conv" | "post_quant_conv" => Some(Place::whole(name)),
            _ => None,
        }
    }

    fn below(&self, beginning: &str) -> Option<String> {
        matches!(beginning, "encoder." | "decoder." | "quant_conv." | "post_quant_conv.").then(|| beginning.to_owned())
    }
}

fn of_mid_block(name: &str) -> Option<String> {
    let (kind, rest) = name.split_once('.')?;
    let (index, rest) = split_index(rest)?;
    match kind {
        "resnets" => Some(format!("mid.block_{}.{}", index + 1, of_resnet(rest))),
        "attentions" => {
            let (layer, leaf) = rest.rsplit_once('.')?;
            let layer = match layer {
                "group_norm" => "norm",
                "to_q" => "q",
                "to_k" => "k",
                "to_v" => "v",
                "to_out.0" => "proj_out",
                _ => return None,
            };
            Some(format!("mid.attn_{}.{layer}.{leaf}", index + 1))
        }
        _ => None,
    }
}

/// What follows the number of a level.
fn of_level(name: &str) -> Option<String> {
    let (kind, rest) = name.split_once('.')?;
    match kind {
        "resnets" => {
            let (index, rest) = split_index(rest)?;
            Some(format!("block.{index}.{}", of_resnet(rest)))
        }
        "downsamplers" => Some(format!("downsample.{}", rest.strip_prefix("0.")?)),
        "upsamplers" => Some(format!("upsample.{}", rest.strip_prefix("0.")?)),
        _ => None,
    }
}

fn of_resnet(name: &str) -> String {
    match name.strip_prefix("conv_shortcut.") {
        Some(leaf) => format!("nin_shortcut.{leaf}"),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_original_ones() {
        let names = KlNames::new(4);
        for (name, original) in [
            ("encoder.down_blocks.2.downsamplers.0.conv.weight", Some("encoder.down.2.downsample.conv.weight")),
            ("encoder.mid_block.resnets.1.conv1.bias", Some("encoder.mid.block_2.conv1.bias")),
            ("decoder.up_blocks.0.resnets.2.norm1.weight", Some("decoder.up.3.block.2.norm1.weight")),
            ("decoder.up_blocks.2.resnets.0.conv_shortcut.bias", Some("decoder.up.1.block.0.nin_shortcut.bias")),
            ("decoder.up_blocks.1.upsamplers.0.conv.bias", Some("decoder.up.2.upsample.conv.bias")),
            ("decoder.mid_block.attentions.0.to_out.0.weight", Some("decoder.mid.attn_1.proj_out.weight")),
            // HunyuanVideo's.
            ("decoder.conv_in.conv.weight", Some("decoder.conv_in.conv.weight")),
            ("encoder.down_blocks.1.resnets.0.conv2.conv.bias", Some("encoder.down.1.block.0.conv2.conv.bias")),
            ("decoder.up_blocks.0.upsamplers.0.conv.conv.weight", Some("decoder.up.3.upsample.conv.conv.weight")),
            (
                "decoder.up_blocks.3.resnets.0.conv_shortcut.conv.bias",
                Some("decoder.up.0.block.0.nin_shortcut.conv.bias"),
            ),
            ("decoder.mid_block.attentions.0.query.weight", None),
            ("decoder.conv_norm_out.bias", Some("decoder.norm_out.bias")),
            ("post_quant_conv.weight", Some("post_quant_conv.weight")),
            ("decoder.up_blocks.4.resnets.0.norm1.weight", None),
        ] {
            assert_eq!(names.place(name), original.map(Place::whole), "{name}");
        }
        assert_eq!(names.below("quant_conv.").as_deref(), Some("quant_conv."));
    }
}
