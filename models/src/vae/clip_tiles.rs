//! A clip in overlapping tiles, each of which is decoded from its first frame to its last.
//!
//! Owns: the order of tiles and frames, and the pixels until the last tile is done; then they are handed out in the portions
//! in which a decoder makes them. So a decoder remembers past frames of one tile only. Does not know: any decoder.
//! Source: diffusers `models/autoencoders/autoencoder_kl_wan.py`, `tiled_decode`.

use candle_core::Tensor;

use super::tiling::{Mosaic, Tiling};
use crate::error::Result;

/// Copies of a tile's pixels that are alive while it is blended: its portions, it, its seams and what they make of it.
const TILE_COPIES: usize = 4;
/// Copies of the whole clip's pixels: the rows of tiles, and what they are joined to.
const CLIP_COPIES: usize = 2;

/// A decoder that makes a clip portion by portion in the order of time.
pub trait ClipDecoder {
    /// State between two portions.
    type Decoding;

    /// Begins to decode f32 latents `[1, z, frames, height, width]`.
    fn begin_clip(&self, latents: &Tensor) -> Result<Self::Decoding>;

    /// The next portion: f32 pixels `[frames, 3, height, width]`.
    fn next_portion(&self, decoding: &mut Self::Decoding) -> Result<Tensor>;
}

/// A decode in tiles between two steps.
pub struct TiledDecoding<D> {
    latents: Tensor,
    tiling: Tiling,
    /// Portions of each tile.
    portions: usize,
    /// The tile under way.
    tile: usize,
    decoding: Option<D>,
    /// What is done of it.
    done: Vec<Tensor>,
    mosaic: Mosaic,
    finished: Option<Finished>,
}

/// All pixels, of which some were handed out.
struct Finished {
    pixels: Tensor,
    /// Frames of each portion that is still there, the next one last.
    portions: Vec<usize>,
    handed_out: usize,
}

/// Calls of [`TiledDecoding::next`] for latents of this height and width that are decoded in so many portions.
pub fn num_steps(tiling: &Tiling, (height, width): (usize, usize), portions: usize) -> usize {
    // With the last portion of the last tile the first one of the clip is there.
    tiling.count(height, width) * portions + portions - 1
}

/// Bytes of pixels that a decode in tiles holds beside the decoder's work on one tile, for `frames` frames of so many pixels,
/// of which a tile has `tile_pixels`.
pub fn pixel_bytes(frames: usize, pixels: usize, tile_pixels: usize) -> usize {
    3 * frames * (CLIP_COPIES * pixels + TILE_COPIES * tile_pixels) * size_of::<f32>()
}

impl<D> TiledDecoding<D> {
    /// Before the first tile of `latents [1, z, frames, height, width]`, which are decoded in so many portions.
    pub fn new(latents: Tensor, tiling: Tiling, portions: usize) -> Result<Self> {
        let (_, _, _, height, width) = latents.dims5()?;
        let mosaic = Mosaic::new(tiling, height, width);
        Ok(Self { latents, tiling, portions, tile: 0, decoding: None, done: Vec::new(), mosaic, finished: None })
    }

    /// Decodes one portion of one tile, or hands out a portion of all: `None` until the last tile is done.
    pub fn next(&mut self, decoder: &impl ClipDecoder<Decoding = D>) -> Result<Option<Tensor>> {
        if let Some(finished) = &mut self.finished {
            return finished.next().map(Some);
        }
        let mut decoding = match self.decoding.take() {
            Some(decoding) => decoding,
            None => decoder.begin_clip(&self.latents_of_tile()?)?,
        };
        self.done.push(decoder.next_portion(&mut decoding)?);
        if self.done.len() < self.portions {
            self.decoding = Some(decoding);
            return Ok(None);
        }
        // What the decoder remembers of the tile goes before the tile is blended.
        drop(decoding);
        self.tile += 1;
        let tile = std::mem::take(&mut self.done);
        let mut portions = tile.iter().map(|portion| portion.dim(0)).collect::<candle_core::Result<Vec<usize>>>()?;
        let Some(pixels) = self.mosaic.push(Tensor::cat(&tile, 0)?)? else { return Ok(None) };
        portions.reverse();
        self.finished.insert(Finished { pixels, portions, handed_out: 0 }).next().map(Some)
    }

    fn latents_of_tile(&self) -> Result<Tensor> {
        let (_, _, _, height, width) = self.latents.dims5()?;
        let window = self.tiling.window(height, width, self.tile);
        let rows = self.latents.narrow(3, window.top, window.height)?;
        Ok(rows.narrow(4, window.left, window.width)?.contiguous()?)
    }
}

impl Finished {
    fn next(&mut self) -> Result<Tensor> {
        let frames = self.portions.pop().expect("a clip is asked for no more portions than it has: this is a bug");
        let portion = self.pixels.narrow(0, self.handed_out, frames)?;
        self.handed_out += frames;
        Ok(portion)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    /// Makes of each latent frame one frame (the first) or two, of twice the size, whose channels are those of the latents.
    struct Doubling;

    impl ClipDecoder for Doubling {
        type Decoding = (Tensor, usize);

        fn begin_clip(&self, latents: &Tensor) -> Result<(Tensor, usize)> {
            Ok((latents.clone(), 0))
        }

        fn next_portion(&self, (latents, next): &mut (Tensor, usize)) -> Result<Tensor> {
            let frame = latents.narrow(2, *next, 1)?.squeeze(2)?;
            let (_, _, height, width) = frame.dims4()?;
            let frame = frame.upsample_nearest2d(2 * height, 2 * width)?;
            *next += 1;
            Ok(if *next == 1 { frame } else { Tensor::cat(&[&frame, &frame], 0)? })
        }
    }

    #[test]
    fn a_clip_in_tiles_comes_in_the_portions_of_the_whole() {
        let tiling = Tiling::of_latents(4, 8).expect("fits");
        for (height, width) in [(4, 9), (7, 5)] {
            let values = Tensor::arange(0f32, (3 * 3 * height * width) as f32, &Device::Cpu).expect("values");
            let latents = values.reshape((1, 3, 3, height, width)).expect("a shape");
            let mut whole = Doubling.begin_clip(&latents).expect("begins");
            let mut tiled = TiledDecoding::new(latents, tiling, 3).expect("begins");
            let steps = num_steps(&tiling, (height, width), 3);
            let tiles = tiling.count(height, width);
            assert_eq!(steps, 3 * tiles + 2);
            for step in 1..=steps {
                let portion = tiled.next(&Doubling).expect("a step");
                assert_eq!(portion.is_some(), step >= 3 * tiles, "step {step} of {steps}");
                let Some(portion) = portion else { continue };
                let expected = Doubling.next_portion(&mut whole).expect("a portion");
                assert_eq!(portion.dims(), expected.dims());
                let error =
                    (portion - expected).and_then(|d| d.abs()?.max_all()?.to_dtype(DType::F32)?.to_scalar::<f32>());
                assert!(error.expect("a number") < 1e-3, "{height}x{width}");
            }
        }
    }
}
