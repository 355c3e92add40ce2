//! The names of Wan's VAE in the files of its original implementation (`Wan2.1_VAE`, `wan_2.1_vae.safetensors`), found from
//! diffusers' names.
//!
//! Source: diffusers `loaders/single_file_utils.py`, `convert_wan_vae_to_diffusers`, which knows the published depth alone;
//! Wan2.1 `wan/modules/vae.py` for others. The decoder's blocks and upsamplers are one flat list there.

use super::WanVaeConfig;
use crate::weights::names::{Names, Place, split_index};

/// Of a VAE of some depth.
#[derive(Debug, Clone, Copy)]
pub struct WanVaeNames {
    /// Members of the decoder's list that are one of diffusers' blocks: residual blocks, and an upsampler.
    per_block: usize,
}

impl WanVaeNames {
    /// Of the VAE that the configuration describes.
    pub fn new(config: &WanVaeConfig) -> Self {
        Self { per_block: config.num_res_blocks + 2 }
    }

    /// What follows `encoder.` or `decoder.`.
    fn of_half(self, name: &str) -> Option<String> {
        let (first, rest) = name.split_once('.')?;
        match first {
            "conv_in" => Some(format!("conv1.{rest}")),
            "norm_out" => Some(format!("head.0.{rest}")),
            "conv_out" => Some(format!("head.2.{rest}")),
            "mid_block" => of_mid_block(rest),
            "down_blocks" => {
                let (place, rest) = split_index(rest)?;
                Some(format!("downsamples.{place}.{}", of_member(rest)))
            }
            "up_blocks" => {
                let (block, rest) = split_index(rest)?;
                let (kind, rest) = rest.split_once('.')?;
                let (index, rest) = split_index(rest)?;
                let index = match kind {
                    "resnets" => index,
                    "upsamplers" if index == 0 => self.per_block - 1,
                    _ => return None,
                };
                let place = block.checked_mul(self.per_block)?.checked_add(index)?;
                Some(format!("upsamples.{place}.{}", of_member(rest)))
            }
            _ => None,
        }
    }
}

impl Names for WanVaeNames {
    fn mark(&self) -> &'static str {
        "decoder.middle.0.residual.0.gamma"
    }

    fn place(&self, name: &str) -> Option<Place> {
        let (first, rest) = name.split_once('.')?;
        Some(Place::whole(match first {
            "encoder" | "decoder" => format!("{first}.{}", self.of_half(rest)?),
            "quant_conv" => format!("conv1.{rest}"),
            "post_quant_conv" => format!("conv2.{rest}"),
            _ => return None,
        }))
    }

    fn below(&self, beginning: &str) -> Option<String> {
        match beginning {
            "encoder." | "decoder." => Some(beginning.to_owned()),
            "quant_conv." => Some("conv1.".to_owned()),
            "post_quant_conv." => Some("conv2.".to_owned()),
            _ => None,
        }
    }
}

fn of_mid_block(name: &str) -> Option<String> {
    let (kind, rest) = name.split_once('.')?;
    let (index, rest) = split_index(rest)?;
    match (kind, index) {
        ("resnets", 0 | 1) => Some(format!("middle.{}.{}", 2 * index, of_member(rest))),
        ("attentions", 0) => Some(format!("middle.1.{rest}")),
        _ => None,
    }
}

/// Of a residual block; resamplers have the same names in both.
fn of_member(name: &str) -> String {
    const LAYERS: [(&str, &str); 5] = [
        ("norm1.", "residual.0."),
        ("conv1.", "residual.2."),
        ("norm2.", "residual.3."),
        ("conv2.", "residual.6."),
        ("conv_shortcut.", "shortcut."),
    ];
    let found = LAYERS.iter().find_map(|(own, original)| Some(format!("{original}{}", name.strip_prefix(own)?)));
    found.unwrap_or_else(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_original_ones() {
        let names = WanVaeNames { per_block: 4 };
        for (name, original) in [
            ("encoder.conv_in.weight", "encoder.conv1.weight"),
            ("encoder.down_blocks.5.conv_shortcut.bias", "encoder.downsamples.5.shortcut.bias"),
            ("encoder.down_blocks.2.resample.1.weight", "encoder.downsamples.2.resample.1.weight"),
            ("encoder.mid_block.resnets.1.conv2.bias", "encoder.middle.2.residual.6.bias"),
            ("decoder.mid_block.attentions.0.to_qkv.weight", "decoder.middle.1.to_qkv.weight"),
            ("decoder.up_blocks.0.upsamplers.0.time_conv.bias", "decoder.upsamples.3.time_conv.bias"),
            ("decoder.up_blocks.3.resnets.2.norm2.gamma", "decoder.upsamples.14.residual.3.gamma"),
            ("decoder.norm_out.gamma", "decoder.head.0.gamma"),
            ("quant_conv.weight", "conv1.weight"),
            ("post_quant_conv.bias", "conv2.bias"),
        ] {
            assert_eq!(names.place(name), Some(Place::whole(original)), "{name}");
        }
        for unknown in ["decoder.up_blocks.0.upsamplers.1.x", "decoder.mid_block.resnets.2.conv1.bias", "x.y", ""] {
            assert_eq!(names.place(unknown), None, "{unknown}");
        }
    }
}
