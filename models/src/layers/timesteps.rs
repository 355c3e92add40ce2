//! Sinusoidal embeddings of timesteps and the small network that follows them in every diffusion transformer.
//!
//! Source: diffusers `models/embeddings.py`: `get_timestep_embedding` with `flip_sin_to_cos=True` and
//! `downscale_freq_shift=0`, and `TimestepEmbedding`.

use candle_core::{Device, Tensor};
use tale_kernels::silu;

use crate::error::Result;
use crate::layers::Linear;
use crate::weights::Weights;

/// Longest period of the sinusoids.
const MAX_PERIOD: f32 = 10_000.0;

/// `[timesteps, dim]` f32: cosines, then sines, of each timestep at `dim / 2` frequencies (`dim` even). In f32 all
/// along, as in the reference: at timestep 1000 the rounding of the angle shows.
pub fn sinusoidal(timesteps: &[f64], dim: usize, device: &Device) -> Result<Tensor> {
    let half = dim / 2;
    let mut values = Vec::with_capacity(timesteps.len() * dim);
    for timestep in timesteps {
        let angle = |i: usize| *timestep as f32 * (-MAX_PERIOD.ln() * i as f32 / half as f32).exp();
        values.extend((0..half).map(|i| angle(i).cos()));
        values.extend((0..half).map(|i| angle(i).sin()));
    }
    Ok(Tensor::from_vec(values, (timesteps.len(), half * 2), device)?)
}

/// `linear_2(silu(linear_1(x)))`.
#[derive(Debug, Clone)]
pub struct TimestepEmbedding {
    linear_1: Linear,
    linear_2: Linear,
}

impl TimestepEmbedding {
    /// Tensors `linear_1.*` (`in_dim` to `dim`) and `linear_2.*` (`dim` to `dim`).
    pub fn load(weights: &Weights, in_dim: usize, dim: usize) -> Result<Self> {
        let linear_1 = Linear::load(&weights.pp("linear_1"), in_dim, dim)?;
        Ok(Self { linear_1, linear_2: Linear::load(&weights.pp("linear_2"), dim, dim)? })
    }

    /// `[..., in_dim]` to `[..., dim]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.linear_2.forward(&silu(&self.linear_1.forward(x)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Recorded from diffusers.
    #[test]
    fn sinusoids_are_those_of_the_reference() {
        let found = sinusoidal(&[999.0, 0.5], 6, &Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
        let expected = [
            [0.9996498, -0.7286733, -0.5492647, -0.0264608, 0.6848614, 0.8356485],
            [0.8775826, 0.9997307, 0.9999994, 0.4794255, 0.0232059, 0.0010772],
        ];
        for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
            assert!((found - expected).abs() < 2e-5, "{found} is not {expected}");
        }
    }
}
