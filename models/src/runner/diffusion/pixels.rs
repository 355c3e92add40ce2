//! Pixels as a VAE gives them, as the bytes of frames.
//!
//! Owns: rounding, the order of bytes, what is not finite, and the frames of which a part is there. What is there is kept as bytes, a
//! quarter of its values, in the memory of the host. Does not know: where pixels come from.

use std::collections::VecDeque;

use candle_core::DType;

use crate::diffusion::Canvas;
use crate::error::Result;
use crate::request::Frame;
use crate::vae::Pixels;
use crate::vae::tiling::Window;

/// The frames of a clip from the first that is not whole to the last of which a part is there.
pub(super) struct FramesUnderWay {
    canvas: Canvas,
    /// Frames before these.
    num_whole: usize,
    frames: VecDeque<Begun>,
}

/// A frame of which so many places are missing.
struct Begun {
    frame: Frame,
    places_left: usize,
}

impl FramesUnderWay {
    /// Before the first pixels of this canvas.
    pub(super) fn new(canvas: &Canvas) -> Self {
        Self { canvas: *canvas, num_whole: 0, frames: VecDeque::new() }
    }

    /// Takes pixels, rounded as diffusers' `VaeImageProcessor` does: the frames that are whole with them, in their order; `None` when
    /// a value is not finite.
    pub(super) fn take(&mut self, pixels: &Pixels) -> Result<Option<Vec<Frame>>> {
        let Window { top, left, height, width } = pixels.window;
        let (num_frames, channels, found_height, found_width) = pixels.values.dims4()?;
        assert_eq!((channels, found_height, found_width), (3, height, width), "{FITS}");
        assert!(top + height <= self.canvas.height && left + width <= self.canvas.width, "{FITS}");
        assert!(pixels.first_frame >= self.num_whole, "{FITS}");
        // Channels are gathered here and not by `permute`, which would take the pixels' memory once more.
        let values = pixels.values.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if values.iter().any(|value| !value.is_finite()) {
            return Ok(None);
        }
        let first = pixels.first_frame - self.num_whole;
        while self.frames.len() < first + num_frames {
            self.frames.push_back(Begun::new(&self.canvas));
        }
        for (begun, values) in self.frames.iter_mut().skip(first).zip(values.chunks_exact(3 * height * width)) {
            begun.fill(pixels.window, values);
        }
        let mut whole = Vec::new();
        while let Some(begun) = self.frames.pop_front_if(|begun| begun.places_left == 0) {
            whole.push(begun.frame);
        }
        self.num_whole += whole.len();
        Ok(Some(whole))
    }
}

impl Begun {
    fn new(canvas: &Canvas) -> Self {
        let Canvas { width, height, .. } = *canvas;
        let frame = Frame { width, height, rgb: vec![0; canvas.frame_bytes()] };
        Self { frame, places_left: width * height }
    }

    /// `values`: red, green and blue of the window, each row by row.
    fn fill(&mut self, Window { top, left, height, width }: Window, values: &[f32]) {
        let [red, green, blue] = [0, 1, 2].map(|channel| &values[channel * height * width..][..height * width]);
        for row in 0..height {
            let begin = 3 * ((top + row) * self.frame.width + left);
            let bytes = self.frame.rgb[begin..begin + 3 * width].chunks_exact_mut(3);
            for (place, rgb) in (row * width..).zip(bytes) {
                rgb.copy_from_slice(&[red[place], green[place], blue[place]].map(to_byte));
            }
        }
        self.places_left = self.places_left.checked_sub(height * width).expect("every place comes once: this is a bug");
    }
}

const FITS: &str = "pixels fit the request: this is a bug";

/// `numpy.round` rounds halves to even.
pub(crate) fn to_byte(value: f32) -> u8 {
    ((value * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    /// A value for each place of three frames of 2x3.
    fn value(frame: usize, channel: usize, y: usize, x: usize) -> f32 {
        (frame * 18 + channel * 6 + y * 3 + x) as f32 / 27.0 - 1.0
    }

    fn pixels(frames: std::ops::Range<usize>, window: Window) -> Pixels {
        let Window { top, left, height, width } = window;
        let first_frame = frames.start;
        let places = |frame| (0..3).flat_map(move |c| (0..height).map(move |y| (frame, c, y)));
        let rows = frames.clone().flat_map(places);
        let values: Vec<f32> =
            rows.flat_map(|(f, c, y)| (0..width).map(move |x| value(f, c, top + y, left + x))).collect();
        let values = Tensor::from_vec(values, (frames.len(), 3, height, width), &Device::Cpu).expect("a tensor");
        Pixels { values, first_frame, window }
    }

    fn expected(frame: usize) -> Vec<u8> {
        let places = (0..2).flat_map(|y| (0..3).map(move |x| (y, x)));
        places.flat_map(|(y, x)| [0, 1, 2].map(|channel| to_byte(value(frame, channel, y, x)))).collect()
    }

    fn under_way() -> FramesUnderWay {
        FramesUnderWay::new(&Canvas { width: 3, height: 2, num_frames: 3, fps: 8 })
    }

    fn take(frames: &mut FramesUnderWay, pixels: &Pixels) -> Vec<Vec<u8>> {
        frames.take(pixels).expect("pixels").expect("finite").into_iter().map(|frame| frame.rgb).collect()
    }

    #[test]
    fn parts_become_the_frames_that_whole_pixels_are() {
        let whole = Window::whole(2, 3);
        let mut at_once = under_way();
        assert_eq!(take(&mut at_once, &pixels(0..1, whole)), [expected(0)]);
        assert_eq!(take(&mut at_once, &pixels(1..3, whole)), [expected(1), expected(2)]);

        let [left, right] = [(0, 2), (2, 1)].map(|(left, width)| Window { top: 0, left, height: 2, width });
        let mut tiled = under_way();
        assert!(take(&mut tiled, &pixels(0..1, left)).is_empty());
        assert!(take(&mut tiled, &pixels(1..3, left)).is_empty());
        assert_eq!(tiled.frames.len(), 3);
        assert_eq!(take(&mut tiled, &pixels(0..1, right)), [expected(0)]);
        assert_eq!(tiled.frames.len(), 2);
        assert_eq!(take(&mut tiled, &pixels(1..3, right)), [expected(1), expected(2)]);
    }

    #[test]
    fn what_is_not_finite_is_seen_wherever_it_is() {
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut found = pixels(0..1, Window::whole(2, 3));
            let wrong = Tensor::full(wrong, (1, 3, 2, 1), &Device::Cpu).expect("a tensor");
            found.values = found.values.slice_assign(&[0..1, 0..3, 0..2, 2..3], &wrong).expect("fits");
            assert!(under_way().take(&found).expect("pixels").is_none());
        }
    }

    #[test]
    fn bytes_are_rounded_to_even_and_cut() {
        assert_eq!([-2.0, -1.0, 0.0, 1.0, 3.0].map(to_byte), [0, 0, 128, 255, 255]);
    }
}
