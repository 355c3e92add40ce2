//! Timesteps (and other scalars, such as an embedded guidance scale) as vectors.
//!
//! Source: diffusers `models/embeddings.py`, `get_timestep_embedding` with `flip_sin_to_cos=True` and
//! `downscale_freq_shift=0`, and `TimestepEmbedding`.

use candle_core::{DType, Device, Tensor};
use tale_kernels::silu;

use crate::error::Result;
use crate::layers::Linear;
use crate::weights::Weights;

const MAX_PERIOD: f32 = 10_000.0;

/// `[n, dim]` (f32): for each timestep `dim / 2` cosines, then as many sines, of geometrically falling frequencies.
/// Angles are rounded to f32 as the reference rounds them: at timesteps near 1000 that is visible.
pub fn sinusoidal(timesteps: &[f32], dim: usize, device: &Device) -> Result<Tensor> {
    let half = dim / 2;
    let exponent = |i: usize| -MAX_PERIOD.ln() * i as f32 / half as f32;
    let frequencies: Vec<f32> = (0..half).map(|i| f64::from(exponent(i)).exp() as f32).collect();
    let mut values = Vec::with_capacity(timesteps.len() * dim);
    for timestep in timesteps {
        let angles = frequencies.iter().map(|frequency| f64::from(timestep * frequency));
        values.extend(angles.clone().map(|angle| angle.cos() as f32));
        values.extend(angles.map(|angle| angle.sin() as f32));
    }
    Ok(Tensor::from_vec(values, (timesteps.len(), 2 * half), device)?)
}

/// `linear_2(silu(linear_1 x))`: what follows the sinusoids, and how pooled text embeddings join them.
#[derive(Debug, Clone)]
pub struct ConditionEmbedder {
    linear_1: Linear,
    linear_2: Linear,
    compute_dtype: DType,
}

impl ConditionEmbedder {
    /// Tensors `linear_1.*` (`[dim, in]`) and `linear_2.*` (`[dim, dim]`).
    pub fn load(weights: &Weights, in_features: usize, dim: usize) -> Result<Self> {
        Ok(Self {
            linear_1: Linear::load(&weights.pp("linear_1"), in_features, dim)?,
            linear_2: Linear::load(&weights.pp("linear_2"), dim, dim)?,
            compute_dtype: weights.placement().compute_dtype,
        })
    }

    /// `[n, in]`, of any dtype, to `[n, dim]` in the compute dtype.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.to_dtype(self.compute_dtype)?;
        self.linear_2.forward(&silu(&self.linear_1.forward(&x)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(timestep: f32, expected: [f32; 8]) {
        let found =
            sinusoidal(&[0.0, timestep], 8, &Device::Cpu).and_then(|x| Ok(x.to_vec2::<f32>()?)).expect("sinusoids");
        assert_eq!(found[0], [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        for (found, expected) in found[1].iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{timestep}: {found} != {expected}");
        }
    }

    /// Recorded from `get_timestep_embedding(t, 8, flip_sin_to_cos=True, downscale_freq_shift=0)`.
    #[test]
    fn sinusoids_are_the_reference_ones() {
        check(
            1.0,
            [
                0.540_302_34,
                0.995_004_2,
                0.999_95,
                0.999_999_5,
                0.841_470_96,
                0.099833414,
                0.009_999_833,
                0.000_999_999_8,
            ],
        );
        check(
            896.4213,
            [
                -0.482_386_32,
                -0.106_534_8,
                -0.895_801_7,
                0.624_409_3,
                -0.875_958_56,
                0.994_308_95,
                0.444_453_95,
                0.781_097_3,
            ],
        );
        check(
            999.5,
            [0.889_961_24, 0.835_931_8, -0.841_781_2, 0.540_723, 0.45603618, -0.548_833_4, -0.539_818_9, 0.84120065],
        );
    }
}
