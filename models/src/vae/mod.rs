//! Latents to pixels, and pixels to latents.

use candle_core::Tensor;

use crate::error::Result;
use crate::rng::TorchGenerator;

pub mod clip_tiles;
pub mod hunyuan_video;
pub mod kl;
pub mod original;
pub mod preview;
pub mod tiling;
pub mod wan;

/// What a VAE says of a picture: a normal distribution of each value of its latents. Source: diffusers
/// `models/autoencoders/vae.py`, `DiagonalGaussianDistribution`.
#[derive(Debug, Clone)]
pub struct Posterior {
    /// f32 `[1, latent_channels, h, w]`.
    pub mean: Tensor,
    /// Standard deviations, of the same shape.
    pub std: Tensor,
}

impl Posterior {
    /// One of the latents that the picture may have; draws as many normals as it has values.
    pub fn sample(&self, generator: &mut TorchGenerator) -> Result<Tensor> {
        let noise = Tensor::from_vec(generator.randn(self.mean.elem_count()), self.mean.dims(), self.mean.device())?;
        Ok((&self.mean + (&self.std * noise)?)?)
    }
}
