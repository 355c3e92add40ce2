//! Previews of an image on its way.
//!
//! Owns: `partial_images`. When previews are due, and what they show, is the runner's and the families' affair.

use crate::parameter::{Declaration, IMAGES, Parameter};
pub use crate::runner::diffusion::previews::MAX_PREVIEWS;

/// Most previews that a streamed answer shows.
pub static PARTIAL_IMAGES: Parameter<usize> = Parameter::integer(
    "partial_images",
    0,
    MAX_PREVIEWS,
    "Previews on the way, spread evenly over the steps; they change nothing in the image. Needs `stream`.",
)
.only_for(IMAGES);

/// The parameters of this capability.
pub(super) static PARAMETERS: &[&Declaration] = &[&PARTIAL_IMAGES.declaration];
