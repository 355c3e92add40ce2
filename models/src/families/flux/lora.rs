//! What LoRA files call the layers of FLUX.1 beside diffusers' and the original names.

use std::sync::Arc;

use crate::lora::{Alias, LoraNames, NetworkNames, Part, Sites};

use super::original::FluxNames;

/// Names of the transformer's and of CLIP's layers. T5 takes none, as in diffusers.
pub fn names(transformer: &Arc<Sites>, text_encoder: &Arc<Sites>) -> LoraNames {
    LoraNames::new(vec![
        NetworkNames::denoiser(transformer, &FluxNames, of_xlabs(transformer)),
        NetworkNames::first_text_encoder(text_encoder),
    ])
}

/// XLabs trained attention processors of the original: `double_blocks.0.processor.qkv_lora1` is query, key and value of
/// the image, 2 is the text. Source: diffusers `_convert_xlabs_flux_lora_to_diffusers`.
fn of_xlabs(transformer: &Sites) -> Vec<Alias> {
    let layers: std::collections::BTreeMap<_, _> = transformer.layers().into_iter().collect();
    let alias = |name: String, block: &str, members: &[&str]| -> Option<Alias> {
        let mut parts = Vec::with_capacity(members.len());
        let mut start = 0;
        for member in members {
            let layer = format!("{block}.{member}");
            let end = start + layers.get(&layer)?.outputs();
            parts.push(Part { layer, rows: start..end, swap_halves: false });
            start = end;
        }
        Some(Alias { name, parts })
    };
    let mut aliases = Vec::new();
    for index in 0.. {
        let block = format!("transformer_blocks.{index}");
        let processor = |name: &str| format!("double_blocks.{index}.processor.{name}");
        let Some(first) = alias(processor("qkv_lora1"), &block, &["attn.to_q", "attn.to_k", "attn.to_v"]) else {
            break;
        };
        let text = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"];
        aliases.push(first);
        aliases.extend(alias(processor("proj_lora1"), &block, &["attn.to_out.0"]));
        aliases.extend(alias(processor("qkv_lora2"), &block, &text));
        aliases.extend(alias(processor("proj_lora2"), &block, &["attn.to_add_out"]));
    }
    for index in 0.. {
        let block = format!("single_transformer_blocks.{index}");
        let processor = |name: &str| format!("single_blocks.{index}.processor.{name}");
        let Some(first) = alias(processor("qkv_lora"), &block, &["attn.to_q", "attn.to_k", "attn.to_v"]) else { break };
        aliases.push(first);
        aliases.extend(alias(processor("proj_lora"), &block, &["proj_out"]));
    }
    aliases
}
