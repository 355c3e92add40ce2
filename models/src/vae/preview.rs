//! Rough pictures of latents without a decoder: one RGB value for each latent position, a linear map of its channels.
//!
//! Owns: the map, fitted to a VAE by decoding a little and solving least squares, so that any checkpoint has its own; of a
//! clip, which latent frame is shown. Does not know: how the VAE decodes. That latents of a good VAE are nearly linear in colour is what people found who
//! published such maps for single checkpoints (ComfyUI, `comfy/latent_formats.py`, `latent_rgb_factors`).

use std::sync::OnceLock;

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};
use crate::rng::TorchGenerator;

/// Side of the latents that are decoded for the fit: 128 pixels where a position has 8.
pub const FIT_SIDE: usize = 16;
/// Positions on each side of a patch of one colour, as pictures have them: a single position says little of itself.
const PATCH: usize = 2;
/// Keeps the solution of a nearly singular system small, relative to the number of samples.
const RIDGE: f64 = 1e-6;

/// Latent frames that are decoded for the fit of a clip's VAE, all alike: decoders look back, and the last of these has before it
/// what most frames of a clip have.
const FIT_FRAMES: usize = 5;

/// Width, height and RGB in about -1..=1.
pub type RoughPicture = (usize, usize, Vec<f32>);

/// The map of a clip's VAE, fitted when the first preview is asked for.
#[derive(Debug, Default)]
pub struct ClipRgb(OnceLock<LatentRgb>);

impl ClipRgb {
    /// A rough picture of the middle frame of `latents [1, channels, frames, h, w]`, one value for each position. `decode` makes
    /// f32 pixels `[frames, 3, H, W]` in about -1..=1 of such latents, the first of which is one frame.
    pub fn preview(&self, latents: &Tensor, decode: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<RoughPicture> {
        let (_, channels, frames, _, _) = latents.dims5()?;
        let fitted = match self.0.get() {
            Some(fitted) => fitted,
            None => {
                let still = LatentRgb::samples(channels, latents.device())?;
                let pixels = decode(&still.unsqueeze(2)?.repeat((1, 1, FIT_FRAMES, 1, 1))?)?;
                // The first latent frame stands for one frame.
                let frames = pixels.dim(0)?;
                let of_last = (frames - 1) / (FIT_FRAMES - 1);
                let colours = pixels.narrow(0, frames - of_last, of_last)?.mean_keepdim(0)?;
                let fitted = LatentRgb::fit(&still, &colours)?;
                self.0.get_or_init(|| fitted)
            }
        };
        fitted.colours(&latents.narrow(2, frames / 2, 1)?.squeeze(2)?)
    }

    /// Sizes of the latents that are decoded for the fit.
    pub const FIT_SIZES: [usize; 3] = [FIT_FRAMES, FIT_SIDE, FIT_SIDE];

    /// Bytes that the fit holds beside the work of its decode, where a latent value stands for `spatial` pixels on a side and
    /// `temporal` frames: latents, and the pixels as they come and joined.
    pub fn fit_bytes(channels: usize, spatial: usize, temporal: usize) -> usize {
        let positions = FIT_FRAMES * FIT_SIDE * FIT_SIDE;
        let pixels = positions * spatial * spatial * temporal;
        (2 * channels * positions + 2 * 3 * pixels) * size_of::<f32>()
    }
}

/// Colour of a latent position: for each of R, G, B a factor per channel and a constant.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentRgb {
    /// `[3][channels + 1]`.
    factors: [Vec<f64>; 3],
}

impl LatentRgb {
    /// Standard normal latents `[1, channels, FIT_SIDE, FIT_SIDE]` in patches, always the same.
    pub fn samples(channels: usize, device: &Device) -> Result<Tensor> {
        let patches = FIT_SIDE / PATCH;
        let values = TorchGenerator::new(0).randn(channels * patches * patches);
        let at = |c: usize, y: usize, x: usize| values[(c * patches + y / PATCH) * patches + x / PATCH];
        let positions = (0..channels)
            .flat_map(|c| (0..FIT_SIDE).flat_map(move |y| (0..FIT_SIDE).map(move |x| (c, y, x))))
            .map(|(c, y, x)| at(c, y, x));
        Ok(Tensor::from_iter(positions, device)?.reshape((1, channels, FIT_SIDE, FIT_SIDE))?)
    }

    /// The map that comes closest to `pixels [1, 3, h * s, w * s]` of `latents [1, channels, h, w]`.
    pub fn fit(latents: &Tensor, pixels: &Tensor) -> Result<Self> {
        let (_, channels, height, width) = latents.dims4()?;
        let scale = pixels.dim(2)? / height;
        let rows = rows(latents)?;
        // The mean colour of each position.
        let colours =
            pixels.reshape((3, height, scale, width, scale))?.mean((2, 4))?.flatten_all()?.to_vec1::<f32>()?;
        let n = channels + 1;
        let mut normal = vec![vec![0.0; n + 3]; n];
        for (position, row) in rows.chunks_exact(n).enumerate() {
            for i in 0..n {
                (0..n).for_each(|j| normal[i][j] += row[i] * row[j]);
                (0..3).for_each(|c| normal[i][n + c] += row[i] * f64::from(colours[c * height * width + position]));
            }
        }
        (0..n).for_each(|i| normal[i][i] += RIDGE * (height * width) as f64);
        let solution = solve(normal);
        let factors = [0, 1, 2].map(|c| solution.iter().map(|row| row[c]).collect::<Vec<f64>>());
        // A decoder that gives NaN here would paint previews black.
        match factors.iter().flatten().all(|factor| factor.is_finite()) {
            true => Ok(Self { factors }),
            false => Err(Error::NotFinite { phase: "preview" }),
        }
    }

    /// Width, height and RGB of `latents [1, channels, h, w]`, in about -1..=1.
    pub fn colours(&self, latents: &Tensor) -> Result<RoughPicture> {
        let (_, channels, height, width) = latents.dims4()?;
        let rows = rows(latents)?;
        let colour = |row: &[f64], c: usize| row.iter().zip(&self.factors[c]).map(|(a, b)| a * b).sum::<f64>() as f32;
        let rgb = rows.chunks_exact(channels + 1).flat_map(|row| [0, 1, 2].map(|c| colour(row, c))).collect();
        Ok((width, height, rgb))
    }
}

/// Position by position its channels and a 1, on the host.
fn rows(latents: &Tensor) -> Result<Vec<f64>> {
    let (_, channels, height, width) = latents.dims4()?;
    let values = latents.permute((0, 2, 3, 1))?.flatten_all()?.to_vec1::<f32>()?;
    let mut rows = Vec::with_capacity(height * width * (channels + 1));
    for position in values.chunks_exact(channels) {
        rows.extend(position.iter().map(|value| f64::from(*value)));
        rows.push(1.0);
    }
    Ok(rows)
}

/// Solves a symmetric positive system, each row with its three right sides behind it, by elimination.
fn solve(mut rows: Vec<Vec<f64>>) -> Vec<[f64; 3]> {
    let n = rows.len();
    for pivot in 0..n {
        let (done, rest) = rows.split_at_mut(pivot + 1);
        let pivot_row = &done[pivot];
        for row in rest {
            let factor = row[pivot] / pivot_row[pivot];
            row.iter_mut().zip(pivot_row).skip(pivot).for_each(|(value, above)| *value -= factor * above);
        }
    }
    let mut solution = vec![[0.0; 3]; n];
    for i in (0..n).rev() {
        for c in 0..3 {
            let known: f64 = (i + 1..n).map(|j| rows[i][j] * solution[j][c]).sum();
            solution[i][c] = (rows[i][n + c] - known) / rows[i][i];
        }
    }
    solution
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pixels that are linear in the latents, each position as large as `scale` pixels on a side.
    fn linear_pixels(latents: &Tensor, factors: &[[f32; 3]], bias: [f32; 3], scale: usize) -> Result<Tensor> {
        let weight = Tensor::from_vec(factors.concat(), (factors.len(), 3), &Device::Cpu)?.t()?; // [3, c]
        let (_, c, h, w) = latents.dims4()?;
        let flat = weight.matmul(&latents.reshape((c, h * w))?)?;
        let bias = Tensor::new(&bias, &Device::Cpu)?.reshape((3, 1))?;
        let small = flat.broadcast_add(&bias)?.reshape((1, 3, h, w))?;
        Ok(small.upsample_nearest2d(h * scale, w * scale)?)
    }

    #[test]
    fn a_linear_decoder_is_found_exactly() -> Result<()> {
        let factors = [[0.2, -0.1, 0.3], [0.0, 0.4, -0.2], [-0.3, 0.1, 0.1], [0.15, 0.2, -0.25], [0.0, 0.0, 0.0]];
        let bias = [0.1, -0.2, 0.05];
        let samples = LatentRgb::samples(5, &Device::Cpu)?;
        let fitted = LatentRgb::fit(&samples, &linear_pixels(&samples, &factors, bias, 4)?)?;
        let other = Tensor::from_vec(TorchGenerator::new(9).randn(5 * 3 * 7), (1, 5, 3, 7), &Device::Cpu)?;
        let (width, height, found) = fitted.colours(&other)?;
        assert_eq!((width, height), (7, 3));
        let expected = linear_pixels(&other, &factors, bias, 1)?.permute((0, 2, 3, 1))?.flatten_all()?;
        for (found, expected) in found.iter().zip(&expected.to_vec1::<f32>()?) {
            assert!((found - expected).abs() < 1e-4, "{found} for {expected}");
        }
        Ok(())
    }

    /// A decoder that makes one dark frame of the first, whatever it is, and two frames of every later one.
    #[test]
    fn a_clip_is_shown_by_its_middle_frame_in_the_colours_of_later_frames() -> Result<()> {
        let factors = [[0.2, -0.1, 0.3], [0.0, 0.4, -0.2]];
        let bias = [0.1, -0.2, 0.05];
        let decode = |latents: &Tensor| {
            let frame = |index| linear_pixels(&latents.narrow(2, index, 1)?.squeeze(2)?, &factors, bias, 4);
            let mut frames = vec![(frame(0)?.zeros_like()? - 1.0)?];
            for index in 1..latents.dim(2)? {
                frames.extend([frame(index)?, frame(index)?]);
            }
            Ok(Tensor::cat(&frames, 0)?)
        };
        let clip = Tensor::from_vec(TorchGenerator::new(9).randn(2 * 5 * 3 * 7), (1, 2, 5, 3, 7), &Device::Cpu)?;
        let rgb = ClipRgb::default();
        let (width, height, found) = rgb.preview(&clip, decode)?;
        assert_eq!((width, height), (7, 3));
        let middle = clip.narrow(2, 2, 1)?.squeeze(2)?;
        let expected = linear_pixels(&middle, &factors, bias, 1)?.permute((0, 2, 3, 1))?.flatten_all()?;
        for (found, expected) in found.iter().zip(&expected.to_vec1::<f32>()?) {
            assert!((found - expected).abs() < 1e-4, "{found} for {expected}");
        }
        rgb.preview(&clip, |_| panic!("it is fitted once"))?;
        Ok(())
    }

    #[test]
    fn a_decoder_that_breaks_is_an_error() {
        let samples = LatentRgb::samples(2, &Device::Cpu).expect("samples");
        let broken = Tensor::full(f32::NAN, (1, 3, FIT_SIDE, FIT_SIDE), &Device::Cpu).expect("NaN");
        assert!(matches!(LatentRgb::fit(&samples, &broken), Err(Error::NotFinite { .. })));
    }
}
