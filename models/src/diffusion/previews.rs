//! Previews of an image or a video on its way.
//!
//! Owns: `partial_images`. When previews are due, and what they show, is the runner's and the families' affair.

use crate::parameter::{Declaration, Parameter};
pub use crate::runner::diffusion::previews::MAX_PREVIEWS;

/// Most previews of an image, or of each part of a video.
pub static PARTIAL_IMAGES: Parameter<usize> = Parameter::integer(
    "partial_images",
    0,
    MAX_PREVIEWS,
    "Previews on the way, spread evenly over the steps; they change nothing in the result. Of an image they need `stream`; of \
     a video they are events of its job, so many of each part.",
);

/// The parameters of this capability.
pub(super) static PARAMETERS: &[&Declaration] = &[&PARTIAL_IMAGES.declaration];
