//! How a pipeline of pictures or clips becomes a loaded model, whatever its family.
//!
//! Owns: its runner, its folder of LoRA files, its text encoders on demand, its second try in f32. Does not know: any
//! pipeline.

use crate::card::ModelCard;
use crate::checkpoint::{Build, Manifest, OpenWeights};
use crate::diffusion::DiffusionCard;
use crate::diffusion::tiling::VaeTiling;
use crate::error::Result;
use crate::family::{LoadOptions, LoadedModel};
use crate::lora::Adapters;
use crate::runner::diffusion::on_demand::OnDemand;
use crate::runner::diffusion::retry::reread_in_f32;
use crate::runner::diffusion::{DiffusionModel, DiffusionRunner};

/// Bytes that the largest quantised matrix of a network takes for a moment beside weights and activations.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dequantised {
    pub(super) text_encoder: usize,
    pub(super) transformer: usize,
}

/// What [`load`] needs of a pipeline's model.
pub(super) struct Parts<'m> {
    pub(super) card: &'m mut DiffusionCard,
    pub(super) adapters: &'m Adapters,
    /// Bytes that it takes on the device beside its weights and LoRA files.
    pub(super) fixed_bytes: usize,
}

/// The model that `build` makes of the weights that `open` gives.
pub(super) fn load<M: DiffusionModel + 'static>(
    build: Build<M>,
    manifest: &Manifest,
    open: &mut OpenWeights<'_>,
    options: &LoadOptions,
    parts: impl FnOnce(&mut M) -> Parts<'_>,
) -> Result<LoadedModel> {
    let mut model = build(manifest, open)?;
    let Parts { card, adapters, fixed_bytes } = parts(&mut model);
    card.loras = adapters.open_folder(open.source().loras.as_deref(), options.lora_cache_bytes)?;
    let resident_bytes = fixed_bytes + adapters.cache_bytes();
    let keeps_frames = open.placement().device.is_cpu();
    card.tiling = card.tiling.map(|tiling| VaeTiling { keeps_frames, ..tiling });
    let card = card.clone();
    let runner = DiffusionRunner::new(model, options.max_denoise_rows)
        .keeping_frames(keeps_frames)
        .identified_as(open.identity(manifest)?)
        .with_text_encoders(open.lent().map(|parts| OnDemand::new(parts, build)))
        .retrying(reread_in_f32(open.reread(), build));
    // What is widened in a step is in the plan of its session.
    Ok(LoadedModel { card: ModelCard::Diffusion(card), resident_bytes, widened_bytes: 0, runner: Box::new(runner) })
}
