//! The table of all parameters of images and videos, each of which stands with its capability.

use std::sync::LazyLock;

use super::{
    acceleration, canvas, edit, guidance, keyframes, loras, previews, prompt, references, refinement, sampling, shots,
    tiling,
};
use crate::parameter::Declaration;

pub use super::acceleration::{
    ACCELERATION, CACHE_COEFFICIENTS, CACHE_INTERVAL, CACHE_MAX_SKIPS, CACHE_METHOD, CACHE_RATIOS, CACHE_THRESHOLD,
};
pub use super::canvas::{FPS, HEIGHT, NUM_FRAMES, WIDTH};
pub use super::edit::{IMAGE, MASK, STRENGTH};
pub use super::guidance::{
    CFG_ZERO_STAR, GUIDANCE_INTERVAL, GUIDANCE_SCALE, TRUE_CFG_SCALE, USE_DYNAMIC_CFG, ZERO_INIT_STEPS,
};
pub use super::keyframes::{INPUT_REFERENCE, KEY_IMAGES, LAST_IMAGE};
pub use super::loras::LORAS;
pub use super::previews::PARTIAL_IMAGES;
pub use super::prompt::{MAX_SEQUENCE_LENGTH, NEGATIVE_PROMPT, PROMPT};
pub use super::references::{IP_ADAPTER_SCALE, REFERENCE_IMAGES};
pub use super::refinement::DENOISING_END;
pub use super::sampling::{ETA, FLOW_SHIFT, NUM_INFERENCE_STEPS, SCHEDULER, SEED, SIGMAS, TIMESTEP_SPACING, TIMESTEPS};
pub use super::shots::{OVERLAP_FRAMES, SHOT_METHOD};
pub use super::tiling::VAE_TILING;

/// Every parameter of images and videos, in the order in which documentation and answers have them.
pub static PARAMETERS: LazyLock<Vec<&'static Declaration>> = LazyLock::new(|| {
    [
        prompt::PARAMETERS,
        guidance::PARAMETERS,
        canvas::PARAMETERS,
        sampling::PARAMETERS,
        acceleration::PARAMETERS,
        edit::PARAMETERS,
        keyframes::PARAMETERS,
        shots::PARAMETERS,
        references::PARAMETERS,
        refinement::PARAMETERS,
        loras::PARAMETERS,
        tiling::PARAMETERS,
        previews::PARAMETERS,
    ]
    .concat()
});
