//! What Wan is told of the pictures that a video begins and ends with: by a vision encoder, and by the VAE.
//!
//! Owns: the frames that the VAE encodes, the mask beside their latents, the steps of both encoders. Does not know: texts,
//! the transformer. Source: diffusers `pipelines/wan/pipeline_wan_i2v.py` (`encode_image`, `prepare_latents`).

use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::checkpoint::Manifest;
use crate::diffusion::{DiffusionRequest, Keyframes};
use crate::encoders::clip_vision::ClipVisionEncoder;
use crate::encoders::image_processor::ClipImageProcessor;
use crate::error::Result;
use crate::request::Frame;
use crate::vae;
use crate::vae::tiling::{InTiles, Mosaic, Tiling, Window};
use crate::vae::wan::WanVaeConfig;
use crate::vae::wan::encoder::{WanEncoding, WanVaeEncoder};
use crate::weights::Weights;

/// The encoders of a model that takes pictures.
pub(super) struct Pictures {
    processor: ClipImageProcessor,
    vision: ClipVisionEncoder,
    vae: WanVaeEncoder,
    device: Device,
}

/// The frames that the VAE sees: pictures at the ends and grey between them.
#[derive(Debug, Clone, PartialEq)]
pub struct KnownFrames {
    first: Arc<Frame>,
    last: Option<Arc<Frame>>,
    num_frames: usize,
    /// Whether they are encoded in tiles, where they are larger than one.
    tiled: bool,
}

/// Pictures on their way through the vision encoder.
#[derive(Debug)]
pub struct VisionEncoding {
    pictures: Vec<Arc<Frame>>,
    /// Of those that are done.
    hidden: Vec<Tensor>,
}

/// Frames on their way through the VAE.
pub struct FramesEncoding {
    frames: KnownFrames,
    /// Of the whole, or of the tile under way.
    encoding: WanEncoding,
    /// `None` where they are encoded as a whole.
    tiles: Option<Mosaic>,
}

impl KnownFrames {
    /// Those of a request that has `keyframes`.
    pub(super) fn new(keyframes: &Keyframes, request: &DiffusionRequest) -> Self {
        let last = keyframes.last.as_ref().map(|last| last.fitted.clone());
        let (num_frames, tiled) = (request.canvas.num_frames, request.vae_tiling);
        Self { first: keyframes.first.fitted.clone(), last, num_frames, tiled }
    }

    fn tiling(&self, vae: &WanVaeConfig) -> Option<Tiling> {
        vae.picture_tiles((self.first.height, self.first.width), self.tiled)
    }

    /// Latent frames, of each tile.
    pub(super) fn num_encode_steps(&self, vae: &WanVaeConfig) -> usize {
        let tiles = self.tiling(vae).map_or(1, |tiling| tiling.count(self.first.height, self.first.width));
        tiles * self.num_latent_frames(vae.scale_factor_temporal)
    }

    /// Latent frames, of which each but the first stands for `temporal` frames.
    fn num_latent_frames(&self, temporal: usize) -> usize {
        (self.num_frames - 1) / temporal + 1
    }

    /// What is known of frame `index`.
    fn picture(&self, index: usize) -> Option<&Frame> {
        match index {
            0 => Some(&self.first),
            _ if index + 1 == self.num_frames => self.last.as_deref(),
            _ => None,
        }
    }

    /// The frames of a latent frame within `window`, f32 `[1, 3, frames, height, width]` in -1..=1.
    fn pixels(&self, latent_frame: usize, temporal: usize, window: Window, device: &Device) -> Result<Tensor> {
        let indices = match latent_frame {
            0 => 0..1,
            _ => (latent_frame - 1) * temporal + 1..latent_frame * temporal + 1,
        };
        let (count, area) = (indices.len(), window.height * window.width);
        let mut values = vec![0f32; 3 * count * area];
        for (frame, index) in indices.enumerate() {
            let Some(picture) = self.picture(index) else { continue };
            for (channel, plane) in vae::pixels(picture, window).chunks_exact(area).enumerate() {
                values[(channel * count + frame) * area..][..area].copy_from_slice(plane);
            }
        }
        Ok(Tensor::from_vec(values, (1, 3, count, window.height, window.width), device)?)
    }

    /// All of a frame.
    fn whole(&self) -> Window {
        Window::whole(self.first.height, self.first.width)
    }

    /// Which frames are known, one channel for each of those that a latent frame stands for: f32 `[1, temporal, f, h, w]`.
    /// The first frame fills all channels of its latent frame.
    fn mask(&self, temporal: usize, [height, width]: [usize; 2], device: &Device) -> Result<Tensor> {
        let frames = self.num_latent_frames(temporal);
        let is_known = |channel: usize, frame: usize| match frame {
            0 => true,
            _ => self.picture((frame - 1) * temporal + 1 + channel).is_some(),
        };
        let places = (0..temporal).flat_map(|channel| (0..frames).map(move |frame| (channel, frame)));
        let known: Vec<f32> = places.map(|(channel, frame)| f32::from(u8::from(is_known(channel, frame)))).collect();
        let known = Tensor::from_vec(known, (1, temporal, frames, 1, 1), device)?;
        Ok(known.broadcast_as((1, temporal, frames, height, width))?.contiguous()?)
    }
}

impl VisionEncoding {
    /// Nothing is done yet.
    pub(super) fn new(pictures: Vec<Arc<Frame>>) -> Self {
        Self { pictures, hidden: Vec::new() }
    }
}

impl Pictures {
    /// With the encoder half of `vae`.
    pub(super) fn load(
        manifest: &Manifest,
        vision: ClipVisionEncoder,
        vae: &Weights,
        config: &WanVaeConfig,
    ) -> Result<Self> {
        let processor = manifest.component("image_processor")?;
        Ok(Self {
            processor: ClipImageProcessor::read_or_default(processor, vision.config().image_size)?,
            vision,
            vae: WanVaeEncoder::load(vae, config)?,
            device: vae.placement().device.clone(),
        })
    }

    /// What the vision encoder says of the next picture; of all of them, `[1, tokens, image_dim]`, once that was the last.
    pub(super) fn see_next(&self, encoding: &mut VisionEncoding) -> Result<Option<Tensor>> {
        let VisionEncoding { pictures, hidden } = encoding;
        let pixel_values = self.processor.pixel_values(&pictures[hidden.len()], &self.device)?;
        hidden.push(self.vision.penultimate(&pixel_values)?);
        if hidden.len() < pictures.len() {
            return Ok(None);
        }
        Ok(Some(Tensor::cat(hidden, 1)?))
    }

    /// Before the first of the frames.
    pub(super) fn begin_frames(&self, frames: KnownFrames, vae: &WanVaeConfig) -> FramesEncoding {
        let Frame { height, width, .. } = *frames.first;
        let tiles = frames.tiling(vae).map(|tiling| Mosaic::new(tiling, height, width));
        FramesEncoding { frames, encoding: self.vae.begin(), tiles }
    }

    /// Encodes the next latent frame, of the tile under way if there are tiles. After the last one: the mask and the latents of
    /// all, f32 `[1, temporal + z, f, h, w]`.
    pub(super) fn encode_next(&self, encoding: &mut FramesEncoding, vae: &WanVaeConfig) -> Result<Option<Tensor>> {
        let FramesEncoding { frames, encoding, tiles } = encoding;
        let (temporal, device) = (vae.scale_factor_temporal, &self.device);
        let window = tiles.as_ref().map_or_else(|| frames.whole(), Mosaic::next_window);
        let pixels = frames.pixels(encoding.num_latent_frames(), temporal, window, device)?;
        self.vae.encode_next(encoding, &pixels)?;
        if encoding.num_latent_frames() < frames.num_latent_frames(temporal) {
            return Ok(None);
        }
        let mut latents = encoding.latents()?;
        if let Some(tiles) = tiles {
            *encoding = self.vae.begin();
            let Some(joined) = tiles.push(latents.squeeze(0)?.transpose(0, 1)?)? else { return Ok(None) };
            latents = joined.transpose(0, 1)?.unsqueeze(0)?.contiguous()?; // [1, z, f, h, w]
        }
        let (_, _, _, height, width) = latents.dims5()?;
        Ok(Some(Tensor::cat(&[&frames.mask(temporal, [height, width], device)?, &latents], 1)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(num_frames: usize, has_last: bool) -> KnownFrames {
        let picture = |value: u8| Arc::new(Frame { width: 2, height: 1, rgb: vec![value; 6] });
        KnownFrames { first: picture(255), last: has_last.then(|| picture(0)), num_frames, tiled: false }
    }

    #[test]
    fn the_mask_marks_the_first_latent_frame_and_the_very_last_frame() {
        let rows = |frames: KnownFrames| -> Vec<Vec<f32>> {
            let mask = frames.mask(4, [1, 1], &Device::Cpu).expect("a mask");
            mask.squeeze(0).and_then(|mask| mask.flatten_from(1)?.to_vec2()).expect("rows")
        };
        assert_eq!(rows(frames(9, false)), vec![vec![1.0, 0.0, 0.0]; 4]);
        let with_last = rows(frames(9, true));
        assert_eq!(with_last[3], [1.0, 0.0, 1.0]);
        assert_eq!(with_last[..3], vec![vec![1.0, 0.0, 0.0]; 3]);
        assert_eq!(rows(frames(1, false)), vec![vec![1.0]; 4]);
    }

    #[test]
    fn what_is_not_known_is_grey() {
        let values = |latent_frame: usize| -> Vec<f32> {
            let pixels = {
                let frames = frames(5, true);
                frames.pixels(latent_frame, 4, frames.whole(), &Device::Cpu)
            }
            .expect("pixels");
            assert_eq!(pixels.dims()[..2], [1, 3]);
            pixels.flatten_all().and_then(|pixels| pixels.to_vec1()).expect("values")
        };
        assert_eq!(values(0), [1.0; 6]);
        // Per channel three grey frames and the last picture, two pixels each.
        assert_eq!(values(1), [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, -1.0].repeat(3));
    }
}
