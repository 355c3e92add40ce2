//! The table of all parameters of images and videos, each of which stands with its capability.

use crate::parameter::Declaration;

pub use super::acceleration::ACCELERATION;
pub use super::canvas::{FPS, HEIGHT, NUM_FRAMES, WIDTH};
pub use super::edit::{IMAGE, MASK, STRENGTH};
pub use super::guidance::{GUIDANCE_INTERVAL, GUIDANCE_SCALE, NEGATIVE_PROMPT, TRUE_CFG_SCALE};
pub use super::loras::LORAS;
pub use super::previews::PARTIAL_IMAGES;
pub use super::prompt::{MAX_SEQUENCE_LENGTH, PROMPT};
pub use super::references::{IP_ADAPTER_SCALE, REFERENCE_IMAGES};
pub use super::refinement::DENOISING_END;
pub use super::sampling::{ETA, NUM_INFERENCE_STEPS, SCHEDULER, SEED, TIMESTEP_SPACING};
pub use super::tiling::VAE_TILING;

/// Every parameter of images and videos, in the order in which documentation and answers have them.
pub static PARAMETERS: &[&Declaration] = &[
    &PROMPT.declaration,
    &NEGATIVE_PROMPT.declaration,
    &WIDTH.declaration,
    &HEIGHT.declaration,
    &NUM_FRAMES.declaration,
    &FPS.declaration,
    &NUM_INFERENCE_STEPS.declaration,
    &GUIDANCE_SCALE.declaration,
    &TRUE_CFG_SCALE.declaration,
    &GUIDANCE_INTERVAL.declaration,
    &ACCELERATION.declaration,
    &SCHEDULER.declaration,
    &TIMESTEP_SPACING.declaration,
    &ETA.declaration,
    &MAX_SEQUENCE_LENGTH.declaration,
    &VAE_TILING.declaration,
    &IMAGE.declaration,
    &MASK.declaration,
    &STRENGTH.declaration,
    &REFERENCE_IMAGES.declaration,
    &IP_ADAPTER_SCALE.declaration,
    &DENOISING_END.declaration,
    &SEED.declaration,
    &LORAS.declaration,
    &PARTIAL_IMAGES.declaration,
];
