//! The names of SDXL's networks in the single files of its original implementation, found from diffusers' names.
//!
//! Owns: the UNet and the second text encoder; the first one is called alike in both, the VAE has `vae/original.rs`. Block
//! numbers follow from the configuration, whatever its depths. Source: diffusers `loaders/single_file_utils.py`,
//! `convert_ldm_unet_checkpoint` and `convert_open_clip_checkpoint`.

use super::config::UNetConfig;
use crate::weights::names::{Extent, Names, Place, Rows, split_index};

/// Of a UNet: all blocks of the way down are one list, `input_blocks`, and so are those of the way up, `output_blocks`.
#[derive(Debug, Clone)]
pub struct UNetNames {
    /// Residual blocks of each level on the way down; there is one more on the way up.
    layers: Vec<usize>,
    /// Whether the last layer of each block on the way up, which are counted from the smallest pictures, has a transformer.
    up_transformers: Vec<bool>,
}

impl UNetNames {
    /// Of the UNet that the configuration describes. `config` has been checked.
    pub fn new(config: &UNetConfig) -> Self {
        let layers: Vec<usize> = (0..config.levels()).map(|level| config.layers(level)).collect();
        let up_transformers = layers
            .iter()
            .rev()
            .enumerate()
            .map(|(block, last)| config.up_transformer(block, *last).is_some())
            .collect();
        Self { layers, up_transformers }
    }

    /// What follows `down_blocks.`. Block 0 of the list is `conv_in`.
    fn down(&self, name: &str) -> Option<String> {
        let (level, rest) = split_index(name)?;
        let layers = *self.layers.get(level)?;
        let first = 1 + self.layers[..level].iter().map(|layers| layers + 1).sum::<usize>();
        if let Some(leaf) = rest.strip_prefix("downsamplers.0.conv.") {
            return Some(format!("input_blocks.{}.0.op.{leaf}", first + layers));
        }
        let (layer, rest) = of_layer(rest)?;
        (layer < layers).then(|| format!("input_blocks.{}.{rest}", first + layer))
    }

    /// What follows `up_blocks.`.
    fn up(&self, name: &str) -> Option<String> {
        let (block, rest) = split_index(name)?;
        let level = self.layers.len().checked_sub(1 + block)?;
        let (layers, first) =
            (self.layers[level], self.layers[level + 1..].iter().map(|layers| layers + 1).sum::<usize>());
        if let Some(leaf) = rest.strip_prefix("upsamplers.0.conv.") {
            let place = 1 + usize::from(self.up_transformers[block]);
            return Some(format!("output_blocks.{}.{place}.conv.{leaf}", first + layers));
        }
        let (layer, rest) = of_layer(rest)?;
        (layer <= layers).then(|| format!("output_blocks.{}.{rest}", first + layer))
    }
}

impl Names for UNetNames {
    fn mark(&self) -> &'static str {
        "input_blocks.0.0.weight"
    }

    fn place(&self, name: &str) -> Option<Place> {
        let (first, rest) = name.split_once('.')?;
        let name = match first {
            "conv_in" => format!("input_blocks.0.0.{rest}"),
            "conv_norm_out" => format!("out.0.{rest}"),
            "conv_out" => format!("out.2.{rest}"),
            "time_embedding" => format!("time_embed.{}", of_embedder(rest)?),
            "add_embedding" => format!("label_emb.0.{}", of_embedder(rest)?),
            "down_blocks" => self.down(rest)?,
            "mid_block" => of_mid_block(rest)?,
            "up_blocks" => self.up(rest)?,
            _ => return None,
        };
        Some(Place::whole(name))
    }
}

/// The two linear layers of an embedder, between which there is an activation.
fn of_embedder(name: &str) -> Option<String> {
    let (layer, leaf) = name.split_once('.')?;
    match layer {
        "linear_1" => Some(format!("0.{leaf}")),
        "linear_2" => Some(format!("2.{leaf}")),
        _ => None,
    }
}

/// What follows the number of a block: the number of the layer, and what follows that in the original.
fn of_layer(name: &str) -> Option<(usize, String)> {
    let (kind, rest) = name.split_once('.')?;
    let (layer, rest) = split_index(rest)?;
    match kind {
        "resnets" => Some((layer, format!("0.{}", of_resnet(rest)?))),
        "attentions" => Some((layer, format!("1.{rest}"))),
        _ => None,
    }
}

fn of_mid_block(name: &str) -> Option<String> {
    match name.split_once('.')? {
        ("resnets", rest) => {
            let (layer, rest) = split_index(rest)?;
            Some(format!("middle_block.{}.{}", 2 * layer, of_resnet(rest)?))
        }
        ("attentions", rest) => Some(format!("middle_block.1.{}", rest.strip_prefix("0.")?)),
        _ => None,
    }
}

fn of_resnet(name: &str) -> Option<String> {
    let (layer, leaf) = name.split_once('.')?;
    let layer = match layer {
        "norm1" => "in_layers.0",
        "conv1" => "in_layers.2",
        "time_emb_proj" => "emb_layers.1",
        "norm2" => "out_layers.0",
        "conv2" => "out_layers.3",
        "conv_shortcut" => "skip_connection",
        _ => return None,
    };
    Some(format!("{layer}.{leaf}"))
}

/// Of a text encoder as OpenCLIP has it: query, key and value are one matrix, and the projection is kept transposed (under
/// the bare name `text_projection`, which the encoder knows).
#[derive(Debug, Clone, Copy)]
pub struct OpenClipNames;

impl Names for OpenClipNames {
    fn mark(&self) -> &'static str {
        "transformer.resblocks.0.ln_1.weight"
    }

    fn place(&self, name: &str) -> Option<Place> {
        if let Some(rest) = name.strip_prefix("encoder.layers.") {
            let (layer, rest) = split_index(rest)?;
            let place = of_text_layer(rest)?;
            return Some(Place { name: format!("transformer.resblocks.{layer}.{}", place.name), ..place });
        }
        let name = match name {
            "embeddings.token_embedding.weight" => "token_embedding.weight",
            "embeddings.position_embedding.weight" => "positional_embedding",
            "final_layer_norm.weight" => "ln_final.weight",
            "final_layer_norm.bias" => "ln_final.bias",
            "text_projection" | "text_projection.weight" => name,
            _ => return None,
        };
        Some(Place::whole(name))
    }
}

fn of_text_layer(name: &str) -> Option<Place> {
    let (layer, leaf) = name.rsplit_once('.')?;
    let third =
        |first| Place { name: format!("attn.in_proj_{leaf}"), part: Extent::Rows(Rows { first, count: 1, of: 3 }) };
    let whole = |layer: &str| Place::whole(format!("{layer}.{leaf}"));
    Some(match layer {
        "layer_norm1" => whole("ln_1"),
        "layer_norm2" => whole("ln_2"),
        "self_attn.q_proj" => third(0),
        "self_attn.k_proj" => third(1),
        "self_attn.v_proj" => third(2),
        "self_attn.out_proj" => whole("attn.out_proj"),
        "mlp.fc1" => whole("mlp.c_fc"),
        "mlp.fc2" => whole("mlp.c_proj"),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(names: &dyn Names, name: &str, original: Option<&str>) {
        assert_eq!(names.place(name), original.map(Place::whole), "{name}");
    }

    /// Of SDXL base: two layers on each of three levels, none of them with transformers on the largest.
    fn published() -> UNetNames {
        UNetNames { layers: vec![2, 2, 2], up_transformers: vec![true, true, false] }
    }

    #[test]
    fn blocks_are_counted_through() {
        let names = published();
        let cases = [
            ("conv_in.bias", "input_blocks.0.0.bias"),
            ("down_blocks.0.resnets.1.time_emb_proj.weight", "input_blocks.2.0.emb_layers.1.weight"),
            ("down_blocks.0.downsamplers.0.conv.weight", "input_blocks.3.0.op.weight"),
            ("down_blocks.2.attentions.1.proj_in.bias", "input_blocks.8.1.proj_in.bias"),
            ("mid_block.resnets.1.conv2.weight", "middle_block.2.out_layers.3.weight"),
            ("mid_block.attentions.0.norm.weight", "middle_block.1.norm.weight"),
            ("up_blocks.0.upsamplers.0.conv.bias", "output_blocks.2.2.conv.bias"),
            ("up_blocks.1.attentions.2.proj_out.bias", "output_blocks.5.1.proj_out.bias"),
            ("up_blocks.2.resnets.2.conv_shortcut.weight", "output_blocks.8.0.skip_connection.weight"),
            ("add_embedding.linear_2.weight", "label_emb.0.2.weight"),
        ];
        for (name, original) in cases {
            check(&names, name, Some(original));
        }
        for unknown in ["down_blocks.0.resnets.2.norm1.bias", "up_blocks.3.resnets.0.norm1.bias", "down_blocks.9.x.0.y"]
        {
            check(&names, unknown, None);
        }
    }

    /// Levels of their own depths, an upsampler behind a layer without a transformer.
    #[test]
    fn other_configurations_have_other_numbers() {
        let names = UNetNames { layers: vec![1, 3], up_transformers: vec![false, true] };
        check(&names, "down_blocks.1.resnets.2.norm2.bias", Some("input_blocks.5.0.out_layers.0.bias"));
        check(&names, "up_blocks.0.upsamplers.0.conv.weight", Some("output_blocks.3.1.conv.weight"));
        check(&names, "up_blocks.1.resnets.0.conv1.weight", Some("output_blocks.4.0.in_layers.2.weight"));
    }

    #[test]
    fn projections_of_a_text_layer_are_thirds_of_one() {
        let place = OpenClipNames.place("encoder.layers.31.self_attn.v_proj.bias").expect("is known");
        let part = Extent::Rows(Rows { first: 2, count: 1, of: 3 });
        assert_eq!(place, Place { name: "transformer.resblocks.31.attn.in_proj_bias".to_owned(), part });
        check(&OpenClipNames, "encoder.layers.4.mlp.fc2.bias", Some("transformer.resblocks.4.mlp.c_proj.bias"));
        check(&OpenClipNames, "embeddings.position_embedding.weight", Some("positional_embedding"));
        check(&OpenClipNames, "text_model.final_layer_norm.bias", None);
    }
}
