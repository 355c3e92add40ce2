//! A clip that is decoded portion by portion in the order of time, as a whole or in overlapping tiles.
//!
//! Owns: the order of tiles and portions, and the pixels of all tiles but the last. A tile is decoded from its first frame to its
//! last, so that a decoder remembers past frames of one tile only; with each portion of the last tile whole frames are there. Does
//! not know: any decoder.
//! Source: diffusers `models/autoencoders/autoencoder_kl_wan.py` and `autoencoder_kl_cogvideox.py`, `tiled_decode`.

use candle_core::Tensor;

use super::tiling::{Mosaic, Tiling, Window};
use crate::error::Result;

/// Copies of a tile's pixels that are alive while a portion of it is blended: it, its seams and what they make of it.
const TILE_COPIES: usize = 4;
/// Copies of whole frames of a portion beside its tiles: their rows, and what these are joined to.
const PORTION_COPIES: usize = 2;

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
    /// Of whole frames.
    Whole(D),
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
            None => Self::Whole(decoder.begin_clip(latents)?),
            Some(tiling) => Self::Tiles(Box::new(TiledDecoding::new(latents.clone(), tiling, portions)?)),
        })
    }

    /// The next portion, or the next one of a tile: `None` where that is not the last tile. Fails when all are decoded.
    pub fn next(&mut self, decoder: &impl ClipDecoder<Decoding = D>) -> Result<Option<Tensor>> {
        match self {
            Self::Whole(decoding) => decoder.next_portion(decoding).map(Some),
            Self::Tiles(decoding) => decoding.next(decoder),
        }
    }
}

/// A decode in tiles between two steps.
pub struct TiledDecoding<D> {
    latents: Tensor,
    /// Of each portion; their tiles come in the same order.
    mosaics: Vec<Mosaic>,
    /// The portion that comes next.
    portion: usize,
    /// Of the tile under way.
    decoding: Option<D>,
}

/// Calls of [`ClipDecoding::next`] for latents of this height and width that are decoded in so many portions.
pub fn num_steps(tiling: Option<Tiling>, (height, width): (usize, usize), portions: usize) -> usize {
    portions * tiling.map_or(1, |tiling| tiling.count(height, width))
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
    let pixels = |(height, width): (usize, usize)| height * width * scale * scale;
    let (whole, tile) = (pixels((height, width)), pixels(tiling.largest(height, width)));
    let bytes = |pixels: usize| 3 * pixels * size_of::<f32>();
    let kept = frames * (whole + tiling.edge_places(width, scale));
    // The work on a portion is done before it is blended.
    let blended = portion_frames * (PORTION_COPIES * whole + TILE_COPIES * tile);
    bytes(kept) + work_bytes.max(bytes(blended))
}

impl<D> TiledDecoding<D> {
    /// Before the first tile of `latents [1, z, frames, height, width]`, which are decoded in so many portions.
    fn new(latents: Tensor, tiling: Tiling, portions: usize) -> Result<Self> {
        let (_, _, _, height, width) = latents.dims5()?;
        let mosaics = (0..portions).map(|_| Mosaic::new(tiling, height, width)).collect();
        Ok(Self { latents, mosaics, portion: 0, decoding: None })
    }

    /// Decodes one portion of one tile: of the last tile, the portion of whole frames.
    fn next(&mut self, decoder: &impl ClipDecoder<Decoding = D>) -> Result<Option<Tensor>> {
        let portion = self.portion;
        let mut decoding = match self.decoding.take() {
            Some(decoding) => decoding,
            None => decoder.begin_clip(&cut(&self.latents, self.mosaics[portion].next_window())?)?,
        };
        let pixels = decoder.next_portion(&mut decoding)?;
        self.portion = (portion + 1) % self.mosaics.len();
        // What the decoder remembers of the tile goes before its last portion is blended.
        self.decoding = (self.portion > 0).then_some(decoding);
        self.mosaics[portion].push(pixels)
    }
}

/// The part of `latents [1, z, frames, height, width]` within `window`.
pub(super) fn cut(latents: &Tensor, window: Window) -> Result<Tensor> {
    let rows = latents.narrow(3, window.top, window.height)?;
    Ok(rows.narrow(4, window.left, window.width)?.contiguous()?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

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

    #[test]
    fn a_clip_in_tiles_comes_in_the_portions_of_the_whole() {
        let tiling = Tiling::of_latents([TileSide::quartered(8, 2); 2]).expect("fits");
        for (height, width) in [(4, 9), (7, 5)] {
            let values = Tensor::arange(0f32, (3 * 3 * height * width) as f32, &Device::Cpu).expect("values");
            let latents = values.reshape((1, 3, 3, height, width)).expect("a shape");
            let mut whole = ClipDecoding::begin(&Doubling, &latents, None, 3).expect("begins");
            let mut tiled = ClipDecoding::begin(&Doubling, &latents, Some(tiling), 3).expect("begins");
            let steps = num_steps(Some(tiling), (height, width), 3);
            let tiles = tiling.count(height, width);
            assert_eq!((steps, num_steps(None, (height, width), 3)), (3 * tiles, 3));
            for step in 1..=steps {
                let portion = tiled.next(&Doubling).expect("a step");
                assert_eq!(portion.is_some(), step > 3 * (tiles - 1), "step {step} of {steps}");
                let Some(portion) = portion else { continue };
                let expected = whole.next(&Doubling).expect("a step").expect("a portion");
                assert_eq!(portion.dims(), expected.dims());
                let error =
                    (portion - expected).and_then(|d| d.abs()?.max_all()?.to_dtype(DType::F32)?.to_scalar::<f32>());
                assert!(error.expect("a number") < 1e-3, "{height}x{width}");
            }
        }
    }
}
