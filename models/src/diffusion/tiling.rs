//! Whether the VAE works on tiles of the image, or of the frames.
//!
//! Owns: `vae_tiling`, and the rule by which tiles are chosen where nobody asks. Does not know: how tiles are blended, nor
//! what is free at the moment: the choice depends on the request, the model and the room that the device has for work, and
//! on nothing else, so that the same request gives the same image whatever else is running.

use crate::error::{Error, Result};
use crate::parameter::{Declaration, Options, Parameter};

use super::Canvas;

/// Whether the VAE works in tiles.
pub static VAE_TILING: Parameter<bool> = Parameter::flag_or_auto(
    "vae_tiling",
    "Whether the VAE works on tiles of the image or of the frames, as diffusers' enable_vae_tiling; \"auto\" tiles where memory \
     is short.",
);

/// The parameters of this capability.
pub(super) static PARAMETERS: &[&Declaration] = &[&VAE_TILING.declaration];

/// When a model's VAE works on tiles of an image, or of a clip's frames, instead of the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VaeTiling {
    /// Height and width of a tile in pixels.
    pub tile: [usize; 2],
    /// Bytes that the VAE needs for each pixel of an untiled image, or of the untiled frames of a clip of any length.
    pub bytes_per_pixel: usize,
    /// Frames of which some pixels are there and others are not while the whole is decoded.
    pub frames_under_way: usize,
    /// Whether frames lie where the VAE works.
    pub keeps_frames: bool,
    /// Bytes that the device has for work beside all weights; `None` where nobody bounds them.
    pub room_bytes: Option<usize>,
}

impl VaeTiling {
    /// Of a VAE that works elsewhere than where frames lie, as long as nobody says how much room it has.
    pub fn new(tile: [usize; 2], bytes_per_pixel: usize, frames_under_way: usize) -> Self {
        Self { tile, bytes_per_pixel, frames_under_way, keeps_frames: false, room_bytes: None }
    }

    /// `held_bytes` of the room are taken by what else the request holds.
    pub(super) fn resolve(
        support: Option<&Self>,
        options: &Options,
        canvas: &Canvas,
        held_bytes: usize,
    ) -> Result<bool> {
        match (options.get(&VAE_TILING), support) {
            (Some(asked), Some(_)) => Ok(asked),
            (None, Some(tiling)) => Ok(tiling.is_needed(canvas, held_bytes)),
            (Some(true), None) => Err(Error::invalid("vae_tiling", "this model's VAE has no tiles; leave it out")),
            (Some(false) | None, None) => Ok(false),
        }
    }

    /// Whether an image is worked on in tiles when nobody has asked: where it is larger than one tile, and as a whole
    /// would need more than the device has for work.
    fn is_needed(&self, canvas: &Canvas, held_bytes: usize) -> bool {
        let Canvas { width, height, .. } = *canvas;
        let frames = if self.keeps_frames { canvas.kept_frame_bytes(self.frames_under_way) } else { 0 };
        let held_bytes = held_bytes.saturating_add(frames);
        let is_larger = height > self.tile[0] || width > self.tile[1];
        let needed_bytes = width.saturating_mul(height).saturating_mul(self.bytes_per_pixel);
        let has_room = |room_bytes: usize| needed_bytes <= room_bytes.saturating_sub(held_bytes);
        is_larger && !self.room_bytes.is_none_or(has_room)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_for_images_that_do_not_fit_as_a_whole() {
        let is_needed = |(width, height), room_bytes, held_bytes| {
            let tiling = VaeTiling { room_bytes, ..VaeTiling::new([64, 64], 10, 1) };
            tiling.is_needed(&Canvas { width, height, num_frames: 1, fps: 0 }, held_bytes)
        };
        assert!(!is_needed((64, 64), Some(0), 0), "one tile is the whole image");
        assert!(!is_needed((128, 64), Some(128 * 64 * 10), 0));
        assert!(is_needed((128, 64), Some(128 * 64 * 10 - 1), 0));
        assert!(is_needed((128, 64), Some(128 * 64 * 10), 1));
        assert!(is_needed((64, 65), Some(0), 0));
        assert!(!is_needed((64, 65), None, 0));
        let wide = VaeTiling { room_bytes: Some(0), ..VaeTiling::new([48, 64], 10, 1) };
        let is_needed = |width, height| wide.is_needed(&Canvas { width, height, num_frames: 9, fps: 8 }, 0);
        assert!(!is_needed(64, 48) && is_needed(48, 64) && is_needed(65, 48));
    }

    /// All of nine: four that are made, the four before them, and those that wait.
    #[test]
    fn frames_take_room_where_they_lie_beside_the_work() {
        let canvas = Canvas { width: 2048, height: 2048, num_frames: 9, fps: 8 };
        let frames = 9 * 3 * 2048 * 2048;
        let work = 10 * 2048 * 2048;
        for (keeps_frames, room_bytes, is_needed) in
            [(false, work, false), (true, work, true), (true, work + frames, false), (true, work + frames - 1, true)]
        {
            let tiling = VaeTiling { keeps_frames, room_bytes: Some(room_bytes), ..VaeTiling::new([64, 64], 10, 4) };
            assert_eq!(tiling.is_needed(&canvas, 0), is_needed, "{keeps_frames} {room_bytes}");
        }
    }
}
