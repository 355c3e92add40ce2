//! Latents to pixels.

pub mod kl;
pub mod original;
pub mod wan;
