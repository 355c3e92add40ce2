//! Latents to pixels, and pixels to latents.

use candle_core::Tensor;

use crate::error::Result;
use crate::layers::Linear;
use crate::request::Frame;
use crate::rng::TorchGenerator;
use crate::weights::Weights;
use tiling::{Part, Window};

pub mod causal;
pub mod clip_tiles;
pub mod cogvideox;
pub mod hunyuan_video;
pub mod kl;
pub mod original;
pub mod picture_tiles;
pub mod preview;
pub mod tiling;
pub mod wan;

/// Decoded pixels of a picture, or of a part of some frames of a clip, which are not computed any further.
#[derive(Debug)]
pub struct Pixels {
    /// f32 `[frames, 3, height, width]`. Those beyond -1 and 1 are cut by whoever rounds them, so that what is not finite is
    /// still seen there.
    pub values: Tensor,
    /// Number of the first of these frames.
    pub first_frame: usize,
    /// The part of each frame.
    pub window: Window,
}

impl Pixels {
    /// Of whole frames, or of a picture: `[frames, 3, height, width]`.
    pub fn of_whole_frames(values: Tensor, first_frame: usize) -> Result<Self> {
        let (_, _, height, width) = values.dims4()?;
        Ok(Self { values, first_frame, window: Window::whole(height, width) })
    }

    /// What a tile gives of frames.
    pub fn of_part(part: Part, first_frame: usize) -> Self {
        Self { values: part.values, first_frame, window: part.window }
    }
}

/// Bounds of the logarithm of a variance.
const LOG_VARIANCE: std::ops::RangeInclusive<f64> = -30.0..=20.0;

/// What a VAE says of a picture or a clip: a normal distribution of each value of its latents. Source: diffusers
/// `models/autoencoders/vae.py`, `DiagonalGaussianDistribution`.
#[derive(Debug, Clone)]
pub struct Posterior {
    /// f32 `[1, latent_channels, h, w]`, of a clip `[1, latent_channels, f, h, w]`.
    pub mean: Tensor,
    /// Standard deviations, of the same shape.
    pub std: Tensor,
}

impl Posterior {
    /// Of an encoder's answer, `[1, 2 latent_channels, ...]` in f32: means, and logarithms of variances.
    fn of_moments(moments: &Tensor) -> Result<Self> {
        let halves = moments.chunk(2, 1)?;
        // Zero times what is not finite is NaN, which the kernels of a GPU take for the lower limit.
        let log_variance = (halves[1].clamp(*LOG_VARIANCE.start(), *LOG_VARIANCE.end())? + (&halves[1] * 0.0)?)?;
        Ok(Self { mean: halves[0].contiguous()?, std: (log_variance * 0.5)?.exp()? })
    }

    /// One of the latents that the picture may have; draws as many normals as it has values.
    pub fn sample(&self, generator: &mut TorchGenerator) -> Result<Tensor> {
        let noise = Tensor::from_vec(generator.randn(self.mean.elem_count()), self.mean.dims(), self.mean.device())?;
        Ok((&self.mean + (&self.std * noise)?)?)
    }
}

/// A `[c, c]` projection of an attention, which files of original names keep as the kernel of a convolution: `[c, c, 1, 1]` of
/// pictures, `[c, c, 1, 1, 1]` of clips.
fn load_projection(weights: &Weights, channels: usize) -> Result<Linear> {
    let shape: &[usize] = match weights.rank("weight") {
        Some(4) => &[channels, channels, 1, 1],
        Some(5) => &[channels, channels, 1, 1, 1],
        _ => return Linear::load(weights, channels, channels),
    };
    let kernel = weights.get(shape, "weight")?;
    Ok(Linear::new(kernel.reshape((channels, channels))?, Some(weights.get(&[channels], "bias")?)))
}

/// Of a part of an image, channel by channel, in -1..=1.
pub(crate) fn pixels(image: &Frame, window: Window) -> Vec<f32> {
    let mut pixels = Vec::with_capacity(3 * window.height * window.width);
    for channel in 0..3 {
        for row in window.top..window.top + window.height {
            let first = row * image.width + window.left;
            let places = first..first + window.width;
            pixels.extend(places.map(|i| 2.0 * (f32::from(image.rgb[3 * i + channel]) / 255.0) - 1.0));
        }
    }
    pixels
}
