//! Latents to pixels.

pub mod kl;
pub mod wan;
