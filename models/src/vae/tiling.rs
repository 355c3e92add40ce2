//! A picture in overlapping tiles, so that a VAE never holds more than one of them.
//!
//! Owns: where tiles lie, and how their results are blended where they overlap. Does not know: what is computed of a
//! tile. Group norms and attention then see a tile and not the picture, so that the result is near to that of the
//! untiled computation and not equal to it. Source: diffusers `models/autoencoders/autoencoder_kl.py`, `tiled_decode`,
//! `_tiled_encode`, `blend_v`, `blend_h`.

use std::collections::VecDeque;

use candle_core::Tensor;

use crate::error::Result;

/// A tile along one side of a picture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TileSide {
    /// In pixels.
    pub pixels: usize,
    /// In latents.
    pub latents: usize,
    /// Share of it that the next tile covers again (`tile_overlap_factor`).
    pub overlap: f64,
}

impl TileSide {
    /// So many pixels, `scale` of which are a latent. The next tile covers a quarter again.
    pub fn quartered(pixels: usize, scale: usize) -> Self {
        Self { pixels, latents: pixels / scale, overlap: 0.25 }
    }
}

/// A VAE that can work in tiles.
pub trait InTiles {
    /// Height and width of a tile.
    fn tile_sides(&self) -> [TileSide; 2];

    /// Whether the sizes of this VAE allow tiles.
    fn has_tiles(&self) -> bool {
        Tiling::of_latents(self.tile_sides()).is_some()
    }

    /// The tiles of latents of this height and width, where there are to be any; `None` where these are decoded as a whole.
    fn tiles(&self, (height, width): (usize, usize), tiled: bool) -> Option<Tiling> {
        Tiling::of_latents(self.tile_sides()).filter(|tiling| tiled && tiling.splits(height, width))
    }

    /// The tiles of a picture, or of frames, of this height and width, where there are to be any; `None` where it is encoded as a
    /// whole.
    fn picture_tiles(&self, (height, width): (usize, usize), tiled: bool) -> Option<Tiling> {
        Tiling::of_pixels(self.tile_sides()).filter(|tiling| tiled && tiling.splits(height, width))
    }
}

/// How a picture is cut. Pictures are what goes in (latents, when they are decoded), results what comes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    rows: Cut,
    columns: Cut,
}

/// How one side of a picture is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    /// Of a tile, in the picture.
    side: usize,
    /// From one tile to the next, in the picture.
    stride: usize,
    /// Blended with the tile before, in the result.
    blend: usize,
    /// What a tile gives of the whole result.
    keep: usize,
}

/// A tile's place in the picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Window {
    pub top: usize,
    pub left: usize,
    pub height: usize,
    pub width: usize,
}

impl Window {
    /// All of a picture of this size.
    pub fn whole(height: usize, width: usize) -> Self {
        Self { top: 0, left: 0, height, width }
    }
}

impl Tiling {
    /// Tiles of latents, each of which becomes a tile of pixels; height and width of one. `None` where the overlaps of latents
    /// and of pixels would not be the same places.
    pub fn of_latents([height, width]: [TileSide; 2]) -> Option<Self> {
        Some(Self { rows: Cut::of_latents(height)?, columns: Cut::of_latents(width)? })
    }

    /// The tiles of the way back: of pixels, each of which becomes a tile of latents.
    pub fn of_pixels([height, width]: [TileSide; 2]) -> Option<Self> {
        Some(Self { rows: Cut::of_pixels(height)?, columns: Cut::of_pixels(width)? })
    }

    /// Whether a picture of this size is more than one tile.
    pub fn splits(&self, height: usize, width: usize) -> bool {
        height > self.rows.side || width > self.columns.side
    }

    /// Tiles of a picture of this size.
    pub fn count(&self, height: usize, width: usize) -> usize {
        self.rows.count(height) * self.columns.count(width)
    }

    /// Tile number `index`, row by row.
    pub fn window(&self, height: usize, width: usize, index: usize) -> Window {
        let columns = self.columns.count(width);
        let (top, height) = self.rows.place(height, index / columns);
        let (left, width) = self.columns.place(width, index % columns);
        Window { top, left, height, width }
    }

    /// The largest tile of a picture of this size.
    pub fn largest(&self, height: usize, width: usize) -> (usize, usize) {
        (self.rows.side.min(height), self.columns.side.min(width))
    }

    /// Places of the result, of each channel, that are kept to be blended: of a picture of this width, `scale` times as wide in the
    /// result.
    pub fn edge_places(&self, width: usize, scale: usize) -> usize {
        let blended_columns = self.columns.count(width) * self.columns.side * scale;
        self.rows.blend * blended_columns + self.columns.blend * self.rows.side * scale
    }
}

impl Cut {
    fn of_latents(TileSide { pixels, latents, overlap }: TileSide) -> Option<Self> {
        let blend = share(pixels, overlap);
        let cut = Self { side: latents, stride: share(latents, 1.0 - overlap), blend, keep: pixels - blend };
        let scale = pixels.checked_div(latents)?;
        (cut.stride > 0 && latents * scale == pixels && cut.stride * scale == cut.keep).then_some(cut)
    }

    fn of_pixels(side: TileSide) -> Option<Self> {
        let there = Self::of_latents(side)?;
        let TileSide { pixels, latents, overlap } = side;
        let blend = share(latents, overlap);
        let cut = Self { side: pixels, stride: share(pixels, 1.0 - overlap), blend, keep: latents - blend };
        // Each place is where the decoder's tiles have it.
        (cut.stride == there.keep && cut.keep == there.stride).then_some(cut)
    }

    /// Tiles along a side of this length.
    fn count(&self, len: usize) -> usize {
        len.div_ceil(self.stride)
    }

    /// Where tile number `index` begins along a side of this length, and how long it is.
    fn place(&self, len: usize, index: usize) -> (usize, usize) {
        let start = index * self.stride;
        (start, self.side.min(len - start))
    }
}

/// `int(size * factor)`.
fn share(size: usize, factor: f64) -> usize {
    (size as f64 * factor) as usize
}

/// What a tile gives of the whole result.
#[derive(Debug)]
pub struct Part {
    /// `[b, c, h, w]`, blended with what lies above and to the left; may be a view of the tile.
    pub values: Tensor,
    /// Its place in the result.
    pub window: Window,
}

/// The results of tiles, blended with their neighbours in their order.
#[derive(Debug)]
pub struct Seams {
    tiling: Tiling,
    /// Of the picture.
    height: usize,
    width: usize,
    /// Tiles of a row, and rows.
    columns: usize,
    rows: usize,
    /// Number of the tile whose result comes next.
    next: usize,
    /// Lower edges of the last tiles: of those above the ones to come, then of those to the left.
    lower_edges: VecDeque<Tensor>,
    /// Right edge of the tile before, in the same row.
    right_edge: Option<Tensor>,
}

impl Seams {
    /// Of a picture of this size.
    pub fn new(tiling: Tiling, height: usize, width: usize) -> Self {
        let (rows, columns) = (tiling.rows.count(height), tiling.columns.count(width));
        let lower_edges = VecDeque::with_capacity(columns + 1);
        Self { tiling, height, width, columns, rows, next: 0, lower_edges, right_edge: None }
    }

    /// Where the tile lies whose result comes next.
    pub fn next_window(&self) -> Window {
        self.tiling.window(self.height, self.width, self.next)
    }

    /// Whether all tiles of a picture are through, or none is, so that the first one comes next.
    pub fn is_at_start(&self) -> bool {
        self.next == 0
    }

    /// Takes the result `[b, c, h, w]` of the next tile. After the last one comes the first of another picture.
    pub fn blend(&mut self, tile: Tensor) -> Result<Part> {
        let Tiling { rows, columns } = self.tiling;
        let (row, column) = (self.next / self.columns, self.next % self.columns);
        let mut tile = tile;
        // The edges of neighbours are those of blended tiles: diffusers blends in place.
        if row > 0 {
            let above = self.lower_edges.pop_front().expect("a tile above left its edge: this is a bug");
            tile = blended(&above, &tile, 2, rows.blend)?;
        }
        if let Some(left) = self.right_edge.take() {
            tile = blended(&left, &tile, 3, columns.blend)?;
        }
        if row + 1 < self.rows {
            self.lower_edges.push_back(edge(&tile, 2, rows.blend)?);
        }
        if column + 1 < self.columns {
            self.right_edge = Some(edge(&tile, 3, columns.blend)?);
        }
        self.next = (self.next + 1) % (self.rows * self.columns);
        let (height, width) = (tile.dim(2)?.min(rows.keep), tile.dim(3)?.min(columns.keep));
        let values = tile.narrow(2, 0, height)?.narrow(3, 0, width)?;
        Ok(Part { values, window: Window { top: row * rows.keep, left: column * columns.keep, height, width } })
    }
}

/// The results of tiles, blended and joined in their order.
#[derive(Debug)]
pub struct Mosaic {
    seams: Seams,
    /// What the row under way gives.
    row: Vec<Tensor>,
    /// Whole rows.
    joined: Vec<Tensor>,
}

impl Mosaic {
    /// Of a picture of this size.
    pub fn new(tiling: Tiling, height: usize, width: usize) -> Self {
        Self { seams: Seams::new(tiling, height, width), row: Vec::new(), joined: Vec::new() }
    }

    /// Where the tile lies whose result comes next.
    pub fn next_window(&self) -> Window {
        self.seams.next_window()
    }

    /// Takes the result `[b, c, h, w]` of the next tile; the whole result once it was the last, after which the first tile of
    /// another picture comes next.
    pub fn push(&mut self, tile: Tensor) -> Result<Option<Tensor>> {
        // A copy: a view would keep the tile alive.
        self.row.push(self.seams.blend(tile)?.values.force_contiguous()?);
        if self.row.len() < self.seams.columns {
            return Ok(None);
        }
        self.joined.push(Tensor::cat(&std::mem::take(&mut self.row), 3)?);
        if !self.seams.is_at_start() {
            return Ok(None);
        }
        Ok(Some(Tensor::cat(&std::mem::take(&mut self.joined), 2)?))
    }
}

/// The last `extent` rows (`dim` 2) or columns (3) of a tile. A copy: a view would keep the tile alive.
fn edge(tile: &Tensor, dim: usize, extent: usize) -> Result<Tensor> {
    let (len, extent) = (tile.dim(dim)?, extent.min(tile.dim(dim)?));
    Ok(tile.narrow(dim, len - extent, extent)?.force_contiguous()?)
}

/// `tile`, whose first rows (`dim` 2) or columns (3) pass over from the last ones of `before`.
fn blended(before: &Tensor, tile: &Tensor, dim: usize, extent: usize) -> Result<Tensor> {
    let (before_len, len) = (before.dim(dim)?, tile.dim(dim)?);
    let extent = extent.min(before_len).min(len);
    if extent == 0 {
        return Ok(tile.clone());
    }
    let mut shape = [1; 4];
    shape[dim] = extent;
    let weights = |weight: fn(f64) -> f64| {
        let values: Vec<f32> = (0..extent).map(|i| weight(i as f64 / extent as f64) as f32).collect();
        Tensor::from_vec(values, &shape[..], tile.device())
    };
    let old = before.narrow(dim, before_len - extent, extent)?.broadcast_mul(&weights(|share| 1.0 - share)?)?;
    let new = tile.narrow(dim, 0, extent)?.broadcast_mul(&weights(|share| share)?)?;
    Ok(Tensor::cat(&[(old + new)?, tile.narrow(dim, extent, len - extent)?], dim)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    const SIZES: [(usize, usize); 6] = [(8, 9), (9, 8), (20, 13), (13, 20), (12, 12), (25, 31)];

    fn square(latents: usize, pixels: usize) -> [TileSide; 2] {
        [TileSide { pixels, latents, overlap: 0.25 }; 2]
    }

    /// `tile_sample_min_size` 512 and 8 pixels per latent: the numbers that the reference names in its comments.
    #[test]
    fn tiles_are_those_of_the_reference() {
        let tiling = Tiling::of_latents(square(64, 512)).expect("fits");
        let cut = Cut { side: 64, stride: 48, blend: 128, keep: 384 };
        assert_eq!(tiling, Tiling { rows: cut, columns: cut });
        assert!(!tiling.splits(64, 64) && tiling.splits(64, 65) && tiling.splits(65, 1));
        assert_eq!(tiling.count(128, 97), 3 * 3);
        assert_eq!(tiling.window(128, 97, 0), Window { top: 0, left: 0, height: 64, width: 64 });
        assert_eq!(tiling.window(128, 97, 4), Window { top: 48, left: 48, height: 64, width: 49 });
        assert_eq!(tiling.window(128, 97, 8), Window { top: 96, left: 96, height: 32, width: 1 });
        assert_eq!(tiling.largest(128, 32), (64, 32));
        let back = Tiling::of_pixels(square(64, 512)).expect("fits");
        let cut = Cut { side: 512, stride: 384, blend: 16, keep: 48 };
        assert_eq!(back, Tiling { rows: cut, columns: cut });
        assert_eq!(back.count(1024, 776), tiling.count(128, 97));
    }

    /// Those of CogVideoX, whose overlaps are a sixth and a fifth.
    #[test]
    fn tiles_may_be_wider_than_high() {
        let sides = [
            TileSide { pixels: 240, latents: 30, overlap: 1.0 / 6.0 },
            TileSide { pixels: 360, latents: 45, overlap: 1.0 / 5.0 },
        ];
        let tiling = Tiling::of_latents(sides).expect("fits");
        assert_eq!(tiling.rows, Cut { side: 30, stride: 25, blend: 40, keep: 200 });
        assert_eq!(tiling.columns, Cut { side: 45, stride: 36, blend: 72, keep: 288 });
        assert!(!tiling.splits(30, 45) && tiling.splits(31, 45) && tiling.splits(30, 46));
        assert_eq!(tiling.count(96, 170), 4 * 5);
        assert_eq!(tiling.window(96, 170, 19), Window { top: 75, left: 144, height: 21, width: 26 });
        assert_eq!(tiling.largest(96, 40), (30, 40));
        assert_eq!(tiling.edge_places(170, 8), 40 * 5 * 360 + 72 * 240);
        let back = Tiling::of_pixels(sides).expect("fits");
        assert_eq!(back.rows, Cut { side: 240, stride: 200, blend: 5, keep: 25 });
        assert_eq!(back.columns, Cut { side: 360, stride: 288, blend: 9, keep: 36 });
        // In one direction the overlaps of latents and pixels are not the same places.
        assert_eq!(Tiling::of_latents([sides[0], TileSide { pixels: 32, latents: 8, overlap: 0.2 }]), None);
    }

    #[test]
    fn sizes_whose_overlaps_do_not_meet_have_no_tiles() {
        for (latents, pixels) in [(125, 1000), (1, 8), (0, 8), (12, 100), (6, 48)] {
            assert_eq!(Tiling::of_latents(square(latents, pixels)), None, "{latents} latents, {pixels} pixels");
            assert_eq!(Tiling::of_pixels(square(latents, pixels)), None, "{pixels} pixels, {latents} latents");
        }
        assert!(Tiling::of_latents(square(4, 32)).is_some());
    }

    /// Tiles cut from one picture blend to that picture again, whatever its size.
    #[test]
    fn tiles_of_one_picture_join_to_it() {
        let wide = [8, 10].map(|side| TileSide { pixels: side, latents: side, overlap: 2.0 / side as f64 });
        let tilings = [square(8, 8), wide].map(|sides| Tiling::of_latents(sides).expect("fits"));
        for (tiling, (height, width)) in tilings.into_iter().flat_map(|tiling| SIZES.map(|size| (tiling, size))) {
            let picture = Tensor::rand(-1f32, 1f32, (1, 2, height, width), &Device::Cpu).expect("a picture");
            let mut mosaic = Mosaic::new(tiling, height, width);
            let mut seams = Seams::new(tiling, height, width);
            let count = tiling.count(height, width);
            // A picture after another.
            for index in (0..count).chain(0..count) {
                let window = mosaic.next_window();
                assert_eq!(window, tiling.window(height, width, index));
                let tile = picture
                    .narrow(2, window.top, window.height)
                    .and_then(|rows| rows.narrow(3, window.left, window.width));
                let tile = tile.expect("inside");
                check_part(&picture, seams.blend(tile.clone()).expect("blended"));
                assert_eq!(seams.is_at_start(), index + 1 == count);
                let whole = mosaic.push(tile).expect("joined");
                assert_eq!(whole.is_some(), index + 1 == count);
                let Some(whole) = whole else { continue };
                assert_eq!(whole.dims(), picture.dims());
                assert!(largest_error(&whole, &picture) < 1e-6, "{height}x{width}");
            }
        }
    }

    /// A part of a result that is as large as the picture has what the picture has there.
    fn check_part(picture: &Tensor, Part { values, window }: Part) {
        let Window { top, left, height, width } = window;
        let there = picture.narrow(2, top, height).and_then(|rows| rows.narrow(3, left, width)).expect("inside");
        assert_eq!(values.dims(), there.dims());
        assert!(largest_error(&values, &there) < 1e-6, "{window:?}");
    }

    fn largest_error(found: &Tensor, expected: &Tensor) -> f32 {
        (found - expected).and_then(|d| d.abs()?.max_all()?.to_scalar::<f32>()).expect("a number")
    }

    /// Two tiles of one value each: the seam passes from the first to the second in steps of a blended row.
    #[test]
    fn a_seam_passes_over_evenly() {
        let tiling = Tiling::of_latents(square(8, 16)).expect("fits");
        let mut mosaic = Mosaic::new(tiling, 9, 6);
        let tile = |value: f32, height: usize| Tensor::full(value, (1, 1, height, 12), &Device::Cpu).expect("a tile");
        assert!(mosaic.push(tile(0.0, 16)).expect("joined").is_none());
        let whole = mosaic.push(tile(8.0, 6)).expect("joined").expect("the last tile");
        let column: Vec<f32> = whole.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("values");
        let column: Vec<f32> = column.chunks(12).map(|row| row[5]).collect();
        // 12 rows of the first tile; then its last four are blended with the first four of the second, which has six.
        assert_eq!(column, [[0.0; 12].as_slice(), &[0.0, 2.0, 4.0, 6.0, 8.0, 8.0]].concat());
    }
}
