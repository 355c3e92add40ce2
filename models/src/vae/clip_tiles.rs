//! A clip that is decoded portion by portion in the order of time, as a whole or in overlapping tiles.
//!
//! Owns: the order of tiles and portions, and the edges of tiles, which are kept until their neighbours come. A tile is decoded from
//! its first frame to its last, so that a decoder remembers past frames of one tile only: those of one place are twelve times as
//! large as all bytes that it has in a clip of 129 frames. With each portion of the last tile whole frames are there. Does not know: any
//! decoder, who joins frames.
//! Source: diffusers `models/autoencoders/autoencoder_kl_wan.py` and `autoencoder_kl_cogvideox.py`, `tiled_decode`.

use candle_core::Tensor;

use super::Pixels;
use super::tiling::{Seams, Tiling, Window};
use crate::error::Result;

/// Copies of a tile's pixels that are alive while a portion of it is blended: it, its seams and what they make of it.
const TILE_COPIES: usize = 4;

/// A decoder that makes a clip portion by portion in the order of time.
pub trait ClipDecoder {
    /// State between two portions.
    type Decoding;

    /// Begins to decode f32 latents `[1, z, frames, height, width]`.
    fn begin_clip(&self, latents: &Tensor) -> Result<Self::Decoding>;

    /// The next portion: f32 pixels `[frames, 3, height, width]`, of which those beyond -1 and 1 are cut by whoever rounds
    /// them, so that what is not finite is still seen there. Fails when all are decoded.
    fn next_portion(&self, decoding: &mut Self::Decoding) -> Result<Tensor>;
}

/// A decode between two steps. Dropping it frees all that it remembers.
pub enum ClipDecoding<D> {
    /// Of whole frames, of which so many are there.
    Whole(D, usize),
    /// Tile by tile.
    Tiles(Box<TiledDecoding<D>>),
}

impl<D> ClipDecoding<D> {
    /// Begins to decode `latents [1, z, frames, height, width]`, which come in so many portions.
    pub fn begin(
        decoder: &impl ClipDecoder<Decoding = D>,
        latents: &Tensor,
        tiling: Option<Tiling>,
        portions: usize,
    ) -> Result<Self> {
        Ok(match tiling {
            None => Self::Whole(decoder.begin_clip(latents)?, 0),
            Some(tiling) => Self::Tiles(Box::new(TiledDecoding::new(latents.clone(), tiling, portions)?)),
        })
    }

    /// The next portion, or what the next one of a tile gives of it. Fails when all are decoded.
    pub fn next(&mut self, decoder: &impl ClipDecoder<Decoding = D>) -> Result<Pixels> {
        match self {
            Self::Whole(decoding, num_frames) => {
                let pixels = Pixels::of_whole_frames(decoder.next_portion(decoding)?, *num_frames)?;
                *num_frames += pixels.values.dim(0)?;
                Ok(pixels)
            }
            Self::Tiles(decoding) => decoding.next(decoder),
        }
    }
}

/// A decode in tiles between two steps.
pub struct TiledDecoding<D> {
    latents: Tensor,
    /// Of each portion; their tiles come in the same order.
    seams: Vec<Seams>,
    /// The portion that comes next, and number of its first frame.
    portion: usize,
    first_frame: usize,
    /// Of the tile under way.
    decoding: Option<D>,
}

/// Calls of [`ClipDecoding::next`] for latents of this height and width that are decoded in so many portions.
pub fn num_steps(tiling: Option<Tiling>, (height, width): (usize, usize), portions: usize) -> usize {
    portions * tiling.map_or(1, |tiling| tiling.count(height, width))
}

/// Frames of which some pixels are there and others are not, at most, where the clip has `frames` of them and a portion
/// `portion_frames`.
pub fn frames_under_way(tiling: Option<Tiling>, [frames, portion_frames]: [usize; 2]) -> usize {
    tiling.map_or(portion_frames, |_| frames)
}

/// Bytes that a decode in tiles holds at its peak beside the latents, where the work on a tile takes `work_bytes`: of `frames`
/// frames, at most `portion_frames` of them in a portion, whose latents have this height and width, each of them `scale` pixels
/// wide.
pub fn peak_bytes(
    tiling: &Tiling,
    (height, width): (usize, usize),
    scale: usize,
    [frames, portion_frames]: [usize; 2],
    work_bytes: usize,
) -> usize {
    let (tile_height, tile_width) = tiling.largest(height, width);
    let bytes = |pixels: usize| 3 * pixels * size_of::<f32>();
    let kept = frames * tiling.edge_places(width, scale);
    // The work on a portion is done before it is blended.
    let blended = TILE_COPIES * portion_frames * tile_height * tile_width * scale * scale;
    bytes(kept) + work_bytes.max(bytes(blended))
}

impl<D> TiledDecoding<D> {
    /// Before the first tile of `latents [1, z, frames, height, width]`, which are decoded in so many portions.
    fn new(latents: Tensor, tiling: Tiling, portions: usize) -> Result<Self> {
        let (_, _, _, height, width) = latents.dims5()?;
        let seams = (0..portions).map(|_| Seams::new(tiling, height, width)).collect();
        Ok(Self { latents, seams, portion: 0, first_frame: 0, decoding: None })
    }

    /// Decodes one portion of one tile.
    fn next(&mut self, decoder: &impl ClipDecoder<Decoding = D>) -> Result<Pixels> {
        let Self { portion, first_frame, .. } = *self;
        let mut decoding = match self.decoding.take() {
            Some(decoding) => decoding,
            None => decoder.begin_clip(&cut(&self.latents, self.seams[portion].next_window())?)?,
        };
        let tile = decoder.next_portion(&mut decoding)?;
        self.portion = (portion + 1) % self.seams.len();
        self.first_frame = if self.portion > 0 { first_frame + tile.dim(0)? } else { 0 };
        // What the decoder remembers of the tile goes before its last portion is blended.
        self.decoding = (self.portion > 0).then_some(decoding);
        Ok(Pixels::of_part(self.seams[portion].blend(tile)?, first_frame))
    }
}

/// The part of `latents [1, z, frames, height, width]` within `window`.
pub(super) fn cut(latents: &Tensor, window: Window) -> Result<Tensor> {
    let rows = latents.narrow(3, window.top, window.height)?;
    Ok(rows.narrow(4, window.left, window.width)?.contiguous()?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::vae::tiling::TileSide;

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

    /// Each step of tiles has what whole frames have in that place, and all places come once.
    #[test]
    fn a_clip_in_tiles_has_the_pixels_of_the_whole() {
        let tiling = Tiling::of_latents([TileSide::quartered(8, 2); 2]).expect("fits");
        for (height, width) in [(4, 9), (7, 5)] {
            let values = Tensor::arange(0f32, (3 * 3 * height * width) as f32, &Device::Cpu).expect("values");
            let latents = values.reshape((1, 3, 3, height, width)).expect("a shape");
            let mut whole = ClipDecoding::begin(&Doubling, &latents, None, 3).expect("begins");
            let frames: Vec<Pixels> = (0..3).map(|_| whole.next(&Doubling).expect("a portion")).collect();
            assert_eq!(frames.iter().map(|portion| portion.first_frame).collect::<Vec<_>>(), [0, 1, 3]);
            let frames: Vec<Tensor> = frames.into_iter().map(|portion| portion.values).collect();
            let frames = Tensor::cat(&frames, 0).expect("frames of one size");

            let mut tiled = ClipDecoding::begin(&Doubling, &latents, Some(tiling), 3).expect("begins");
            let tiles = tiling.count(height, width);
            assert_eq!(num_steps(Some(tiling), (height, width), 3), 3 * tiles);
            assert_eq!(num_steps(None, (height, width), 3), 3);
            let mut places = 0;
            for step in 0..3 * tiles {
                let Pixels { values, first_frame, window } = tiled.next(&Doubling).expect("a step");
                assert_eq!(first_frame, [0, 1, 3][step % 3], "step {step}");
                let there = frames
                    .narrow(0, first_frame, values.dim(0).expect("frames"))
                    .and_then(|there| there.narrow(2, window.top, window.height)?.narrow(3, window.left, window.width))
                    .expect("inside");
                assert_eq!(values.dims(), there.dims());
                let error = (&values - there).and_then(|d| d.abs()?.max_all()?.to_scalar::<f32>());
                assert!(error.expect("a number") < 1e-3, "{height}x{width}");
                places += values.elem_count();
            }
            assert_eq!(places, frames.elem_count());
        }
    }
}
