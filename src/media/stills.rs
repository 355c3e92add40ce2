//! Pictures of a clip that lie beside its file: a thumbnail, a sheet of its frames, and both of its ends as they were made.
//!
//! Owns: which frames they show, in which sizes and formats. They are made of the frames while those go to the encoder, so
//! that nothing has to be decoded again, and the ends have lost nothing. Does not know: jobs, requests.

use std::path::Path;

use tale_models::request::Frame;

use super::partial::{PartialFile, Readers};
use super::picture::{PictureFormat, encode_picture, resized};
use super::{MediaError, Result};

/// Longest side of a thumbnail.
pub const THUMBNAIL_SIDE: usize = 512;
/// Longest side of a frame in a sheet.
const TILE_SIDE: usize = 256;
/// Frames in a row of a sheet, and most rows.
const SHEET_COLUMNS: usize = 4;
/// Most frames of a sheet.
const SHEET_TILES: usize = SHEET_COLUMNS * SHEET_COLUMNS;
/// Of both lossy formats.
const COMPRESSION: u8 = 85;

/// Kinds of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Still {
    /// The first frame, at most 512 pixels on a side, as WebP.
    Thumbnail,
    /// Up to 16 frames from the first to the last, evenly spread, four in a row, each at most 256 pixels on a side, as JPEG.
    Spritesheet,
    /// The first frame as it was made, as PNG.
    First,
    /// The last frame as it was made, as PNG.
    Last,
}

impl Still {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Thumbnail, Self::Spritesheet, Self::First, Self::Last];

    /// What its file's name has in place of the clip's extension.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Thumbnail => "thumbnail.webp",
            Self::Spritesheet => "spritesheet.jpg",
            Self::First => "first.png",
            Self::Last => "last.png",
        }
    }

    /// Media type for HTTP.
    pub fn media_type(self) -> &'static str {
        self.format().media_type()
    }

    fn format(self) -> PictureFormat {
        match self {
            Self::Thumbnail => PictureFormat::Webp,
            Self::Spritesheet => PictureFormat::Jpeg,
            Self::First | Self::Last => PictureFormat::Png,
        }
    }
}

/// What is kept of the frames of a clip under way.
#[derive(Debug)]
pub struct Stills {
    /// Frames that will come.
    num_frames: usize,
    num_pushed: usize,
    first: Option<Frame>,
    last: Option<Frame>,
    /// Small already.
    tiles: Vec<Frame>,
}

impl Stills {
    /// Of a clip that will have so many frames.
    pub fn of(num_frames: usize) -> Self {
        Self { num_frames, num_pushed: 0, first: None, last: None, tiles: Vec::new() }
    }

    /// Numbers of the frames that it shows, in ascending order.
    pub fn wanted(&self) -> Vec<usize> {
        (0..self.num_frames).filter(|index| is_tile(*index, self.num_frames)).collect()
    }

    /// The next frames, up to number `index`, are shown by none.
    pub fn skip_to(&mut self, index: usize) {
        self.num_pushed = self.num_pushed.max(index);
    }

    /// Takes the next frame.
    pub fn push(&mut self, frame: Frame) -> Result<()> {
        if is_tile(self.num_pushed, self.num_frames) {
            self.tiles.push(within(&frame, TILE_SIDE)?);
        }
        self.num_pushed += 1;
        if self.first.is_none() {
            self.first = Some(frame.clone());
        }
        self.last = Some(frame);
        Ok(())
    }

    /// The files' contents; fails where no frame has come.
    pub fn finish(self) -> Result<[(Still, Vec<u8>); 4]> {
        let (Some(first), Some(last)) = (&self.first, &self.last) else { return Err(MediaError::Empty) };
        let lossy = |frame: &Frame, still: Still| encode_picture(frame, still.format(), Some(COMPRESSION), None);
        let whole = |frame: &Frame, still: Still| encode_picture(frame, still.format(), None, None);
        Ok([
            (Still::Thumbnail, lossy(&within(first, THUMBNAIL_SIDE)?, Still::Thumbnail)?),
            (Still::Spritesheet, lossy(&sheet(&self.tiles), Still::Spritesheet)?),
            (Still::First, whole(first, Still::First)?),
            (Still::Last, whole(last, Still::Last)?),
        ])
    }
}

/// Writes one beside the clip at `path`, whole or not at all.
pub fn write_still(path: &Path, still: Still, bytes: &[u8], readers: Readers) -> Result<()> {
    let mut file = PartialFile::create(&path.with_extension(still.extension()), readers)?;
    file.write(bytes)?;
    file.keep()
}

/// Whether frame `index` of `num_frames` is in the sheet: tile t shows frame t (n - 1) / (tiles - 1), rounded down.
fn is_tile(index: usize, num_frames: usize) -> bool {
    let tiles = num_frames.min(SHEET_TILES);
    match tiles {
        0 | 1 => index == 0,
        _ => (0..tiles).any(|tile| tile * (num_frames - 1) / (tiles - 1) == index),
    }
}

/// The frame with no side longer than `side`; one that is smaller stays as it is.
pub fn within(frame: &Frame, side: usize) -> Result<Frame> {
    match size_within((frame.width, frame.height), side) {
        size if size == (frame.width, frame.height) => Ok(frame.clone()),
        (width, height) => resized(frame, width, height),
    }
}

/// The size of such a frame.
pub fn size_within((width, height): (usize, usize), side: usize) -> (usize, usize) {
    let longest = width.max(height);
    if longest <= side {
        return (width, height);
    }
    let scaled = |pixels: usize| (pixels * side / longest).max(1);
    (scaled(width), scaled(height))
}

/// The tiles from left to right and from top to bottom, black behind the last. All have the size of the first.
fn sheet(tiles: &[Frame]) -> Frame {
    let (width, height) = tiles.first().map_or((1, 1), |tile| (tile.width, tile.height));
    let columns = tiles.len().clamp(1, SHEET_COLUMNS);
    let rows = tiles.len().div_ceil(columns).max(1);
    let mut sheet = Frame::black(columns * width, rows * height);
    for (index, tile) in tiles.iter().enumerate() {
        let (left, top) = (index % columns * width, index / columns * height);
        for (y, row) in tile.rgb.chunks_exact(3 * width).enumerate() {
            let at = 3 * ((top + y) * sheet.width + left);
            sheet.rgb[at..at + row.len()].copy_from_slice(row);
        }
    }
    sheet
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::decode_picture;

    /// Every frame another grey.
    fn stills(count: usize, (width, height): (usize, usize)) -> Vec<Frame> {
        let mut stills = Stills::of(count);
        for index in 0..count {
            let grey = (index * 255 / count.max(2)) as u8;
            stills.push(Frame { width, height, rgb: vec![grey; 3 * width * height] }).unwrap();
        }
        let files = stills.finish().unwrap();
        files.iter().map(|(_, bytes)| decode_picture(bytes).unwrap().frame).collect()
    }

    #[test]
    fn a_sheet_has_sixteen_frames_from_the_first_to_the_last() {
        let found = stills(31, (64, 32));
        assert_eq!((found[1].width, found[1].height), (4 * 64, 4 * 32));
        for tile in 0..16 {
            let at = 3 * ((tile / 4 * 32 + 16) * found[1].width + tile % 4 * 64 + 32);
            let expected = (2 * tile * 255 / 31) as u8;
            assert!(found[1].rgb[at].abs_diff(expected) <= 2, "tile {tile}: {} for {expected}", found[1].rgb[at]);
        }
        assert_eq!(found[2].rgb[0], 0);
        assert_eq!(found[3].rgb[0], (30 * 255 / 31) as u8);
    }

    #[test]
    fn few_frames_make_a_small_sheet_and_large_ones_small_pictures() {
        for (count, columns, rows) in [(1, 1, 1), (3, 3, 1), (5, 4, 2), (16, 4, 4)] {
            let sheet = &stills(count, (32, 16))[1];
            assert_eq!((sheet.width, sheet.height), (columns * 32, rows * 16), "{count} frames");
        }
        let found = stills(2, (1280, 720));
        let sizes: Vec<_> = found.iter().map(|still| (still.width, still.height)).collect();
        assert_eq!(sizes, [(512, 288), (512, 144), (1280, 720), (1280, 720)]);
        assert!(matches!(Stills::of(4).finish(), Err(MediaError::Empty)));
    }
}
