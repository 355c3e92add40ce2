//! How a pipeline of pictures or clips becomes a loaded model, whatever its family.
//!
//! Owns: its runner, its folder of LoRA files, its text encoders on demand, its second try in f32. Does not know: any
//! pipeline.

use crate::card::ModelCard;
use crate::checkpoint::{Build, Manifest, Mode, OpenWeights};
use crate::device::DeviceSpec;
use crate::diffusion::DiffusionCard;
use crate::diffusion::tiling::VaeTiling;
use crate::error::{Error, Result};
use crate::family::{LoadOptions, LoadedModel};
use crate::lora::Adapters;
use crate::parallel::{Followers, Seat, check_devices};
use crate::quietly::quietly;
use crate::runner::diffusion::beside::{self, Ask, DeviceBeside};
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
    let beside = match options.guidance_devices.as_slice() {
        [] => None,
        devices => {
            check_two(devices)?;
            (!open.is_dry()).then(|| begin_beside(build, devices, open, options)).transpose()?
        }
    };
    let mut model = build(manifest, open)?;
    let Parts { card, adapters, fixed_bytes } = parts(&mut model);
    card.loras = adapters.open_folder(open.source().loras.as_deref(), options.lora_cache_bytes)?;
    let resident_bytes = fixed_bytes + adapters.cache_bytes();
    let keeps_frames = open.placement().device.is_cpu();
    card.tiling = card.tiling.map(|tiling| VaeTiling { keeps_frames, ..tiling });
    let card = card.clone();
    let beside = beside.map(|followers| followers.ready().map(|()| DeviceBeside::new(followers))).transpose()?;
    let mut identity = open.identity(manifest)?;
    if let (Some(identity), true) = (&mut identity, beside.is_some()) {
        // Rows of two passes may be rounded otherwise than those of one.
        identity.device.push_str(", guidance on two");
    }
    let runner = DiffusionRunner::new(model, options.max_denoise_rows)
        .with_device_beside(beside)
        .keeping_frames(keeps_frames)
        .identified_as(identity)
        .with_text_encoders(open.lent().map(|parts| OnDemand::new(parts, build)))
        .retrying(reread_in_f32(open.reread(), build));
    // What is widened in a step is in the plan of its session.
    Ok(LoadedModel { card: ModelCard::Diffusion(card), resident_bytes, widened_bytes: 0, runner: Box::new(runner) })
}

/// There are two branches.
fn check_two(devices: &[DeviceSpec]) -> Result<()> {
    check_devices(devices)?;
    match devices.len() {
        2 => Ok(()),
        count => Err(Error::Device(format!("guidance has two branches, which {count} devices cannot share"))),
    }
}

/// Begins to load the whole model on the second of these devices, on a thread of its own.
fn begin_beside<M: DiffusionModel + 'static>(
    build: Build<M>,
    devices: &[DeviceSpec],
    open: &OpenWeights<'_>,
    options: &LoadOptions,
) -> Result<Followers<Ask>> {
    let (source, format) = (open.source().clone(), options.load_format);
    let dtypes = open.placement().in_memory_of_the_host();
    let make = move |seat: Seat| {
        let placement = dtypes.opened_on(seat.spec())?;
        let on_component = &mut |_: &str| ();
        let mut open = OpenWeights::new(&source, &placement, Mode::Load, format, on_component);
        // Its warnings are given by the first device.
        let model = quietly(|| build(&Manifest::read(&source)?.in_format(format), &mut open))?;
        Ok(beside::follow(model, placement.device.clone()))
    };
    Ok(Followers::start(devices, make)?.1)
}
