//! Pixels as a VAE gives them, as the bytes of frames.
//!
//! Owns: rounding, the order of bytes, what is not finite. Does not know: where pixels come from.

use candle_core::{DType, Tensor};

use crate::diffusion::DiffusionRequest;
use crate::error::Result;
use crate::request::Frame;

/// `pixels [frames, 3, height, width]` as bytes, rounded as diffusers' `VaeImageProcessor` does; `None` when a value is
/// not finite.
pub(super) fn to_frames(pixels: &Tensor, request: &DiffusionRequest) -> Result<Option<Vec<Frame>>> {
    let (width, height) = (request.canvas.width, request.canvas.height);
    let (_, channels, found_height, found_width) = pixels.dims4()?;
    assert_eq!((channels, found_height, found_width), (3, height, width), "pixels fit the request: this is a bug");
    // Channels are gathered here and not by `permute`, which would take the pixels' memory once more.
    let values = pixels.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    if values.iter().any(|value| !value.is_finite()) {
        return Ok(None);
    }
    let plane = height * width;
    let frames = values.chunks_exact(3 * plane).map(|frame| {
        let pixel = |at: usize| [frame[at], frame[plane + at], frame[2 * plane + at]].map(to_byte);
        Frame { width, height, rgb: (0..plane).flat_map(pixel).collect() }
    });
    Ok(Some(frames.collect()))
}

/// `numpy.round` rounds halves to even.
pub(crate) fn to_byte(value: f32) -> u8 {
    ((value * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8
}
