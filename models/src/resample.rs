//! Pictures in another size, with the bits that PIL gives them.
//!
//! Owns: the filters and the fixed-point sums. Does not know: who needs which size. Source: Pillow `src/libImaging/Resample.c`:
//! every result is a weighted sum of a window of pixels, across and down, rounded to bytes after each; when a
//! picture shrinks the window grows with it.

use std::ops::Range;

use crate::request::{Frame, Mask};

/// How a window of pixels is weighted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// `Image.Resampling.BICUBIC`: Catmull-Rom, two pixels to each side.
    Bicubic,
    /// `Image.Resampling.LANCZOS`: a windowed sinc, three pixels to each side.
    Lanczos,
}

/// Bits after the point of a weight: eight are for the pixel, two for sums that go beyond it.
const PRECISION_BITS: u32 = 32 - 8 - 2;

impl Filter {
    /// Pixels to each side.
    fn support(self) -> f64 {
        match self {
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        match self {
            Self::Bicubic => cubic(x.abs()),
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Lanczos => 0.0,
        }
    }
}

fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    if x < 1.0 {
        return ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    }
    if x < 2.0 { (((x - 5.0) * x + 8.0) * x - 4.0) * A } else { 0.0 }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let x = x * std::f64::consts::PI;
    x.sin() / x
}

impl Frame {
    /// `Image.resize((width, height), filter)`.
    pub fn resized(&self, width: usize, height: usize, filter: Filter) -> Self {
        self.resized_part((width, 0..width), (height, 0..height), filter)
    }

    /// Of the picture that [`Frame::resized`] would make the pixels in these columns and rows: no others are computed.
    /// Each is the number of all of them and those that are wanted.
    pub fn resized_part(
        &self,
        (width, columns): (usize, Range<usize>),
        (height, rows): (usize, Range<usize>),
        filter: Filter,
    ) -> Self {
        let columns = Axis { from: self.width, to: width, wanted: columns };
        let rows = Axis { from: self.height, to: height, wanted: rows };
        let rgb = resize::<3>(&self.rgb, &columns, &rows, filter);
        Self { width: columns.wanted.len(), height: rows.wanted.len(), rgb }
    }
}

impl Mask {
    /// `Image.resize((width, height), filter)` in mode L.
    pub fn resized(&self, width: usize, height: usize, filter: Filter) -> Self {
        let columns = Axis { from: self.width, to: width, wanted: 0..width };
        let rows = Axis { from: self.height, to: height, wanted: 0..height };
        Self { width, height, grey: resize::<1>(&self.grey, &columns, &rows, filter) }
    }
}

/// What becomes of a width or a height.
struct Axis {
    /// Pixels before.
    from: usize,
    /// Pixels after.
    to: usize,
    /// Those of them that are computed.
    wanted: Range<usize>,
}

impl Axis {
    fn lost(&self) -> i64 {
        self.from as i64 - self.to as i64
    }
}

/// `pixels` of `CHANNELS` bytes, from one size to another. Each pass rounds, so that their order shows: Pillow goes down
/// first (since version 13) where that costs a picture more than twice as many rows as going across costs it columns.
fn resize<const CHANNELS: usize>(pixels: &[u8], columns: &Axis, rows: &Axis, filter: Filter) -> Vec<u8> {
    let (across_windows, mut down_windows) = (windows(columns, filter), windows(rows, filter));
    let stride = CHANNELS * columns.from;
    if rows.lost() > 0 && rows.lost() > 2 * columns.lost() {
        return across::<CHANNELS>(&down(pixels, stride, &down_windows), columns.from, &across_windows);
    }
    // The first pass leaves out the rows that no result of the second one sees.
    let first = down_windows.iter().map(|window| window.first).min().unwrap_or(0);
    let end = down_windows.iter().map(|window| window.first + window.weights.len()).max().unwrap_or(first);
    down_windows.iter_mut().for_each(|window| window.first -= first);
    let narrow = across::<CHANNELS>(&pixels[stride * first..stride * end], columns.from, &across_windows);
    down(&narrow, CHANNELS * columns.wanted.len(), &down_windows)
}

/// One result: the first pixel of its window, and a weight for each pixel of it.
struct Window {
    first: usize,
    weights: Vec<i32>,
}

/// The windows of the wanted results. Where the size stays, each is the pixel itself.
fn windows(axis: &Axis, filter: Filter) -> Vec<Window> {
    let scale = axis.from as f64 / axis.to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let window = |i: usize| {
        if axis.from == axis.to {
            return Window { first: i, weights: vec![1 << PRECISION_BITS] };
        }
        let center = (i as f64 + 0.5) * scale;
        // Conversions to integers go towards zero and stop at it.
        let first = (center - support + 0.5) as usize;
        let end = ((center + support + 0.5) as usize).min(axis.from);
        let reciprocal = 1.0 / stretch;
        let mut weights: Vec<f64> =
            (first..end).map(|x| filter.weight((x as f64 - center + 0.5) * reciprocal)).collect();
        let sum: f64 = weights.iter().sum();
        if sum != 0.0 {
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
        Window { first, weights: weights.into_iter().map(fixed_point).collect() }
    };
    axis.wanted.clone().map(window).collect()
}

fn fixed_point(weight: f64) -> i32 {
    let scaled = weight * f64::from(1 << PRECISION_BITS);
    (if weight < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
}

/// A sum of weighted bytes as a byte; it begins with one half.
fn to_byte(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// Rows of `width` pixels.
fn across<const CHANNELS: usize>(pixels: &[u8], width: usize, windows: &[Window]) -> Vec<u8> {
    let mut resized = Vec::with_capacity(pixels.len() / width * windows.len());
    for row in pixels.chunks_exact(width * CHANNELS) {
        for Window { first, weights } in windows {
            let mut sums = [HALF; CHANNELS];
            for (pixel, weight) in row[first * CHANNELS..].chunks_exact(CHANNELS).zip(weights) {
                for (sum, value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(*value) * weight;
                }
            }
            resized.extend(sums.map(to_byte));
        }
    }
    resized
}

/// Rows of `stride` bytes.
fn down(pixels: &[u8], stride: usize, windows: &[Window]) -> Vec<u8> {
    let mut resized = Vec::with_capacity(stride * windows.len());
    let mut sums = vec![HALF; stride];
    for Window { first, weights } in windows {
        sums.fill(HALF);
        for (row, weight) in pixels[first * stride..].chunks_exact(stride).zip(weights) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += i32::from(*value) * weight;
            }
        }
        resized.extend(sums.iter().copied().map(to_byte));
    }
    resized
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pixels that no two neighbours share; the formula is that of `scripts/goldenlib/edit_cases.py`.
    fn pattern(width: usize, height: usize) -> Frame {
        let value = |i: usize| ((i * 7919 + i * i % 251 * 13) % 256) as u8;
        Frame { width, height, rgb: (0..width * height * 3).map(value).collect() }
    }

    #[test]
    fn the_same_size_is_the_same_picture() {
        let picture = pattern(7, 5);
        assert_eq!(picture.resized(7, 5, Filter::Lanczos), picture);
    }

    /// Whatever the order of the passes.
    #[test]
    fn a_part_is_that_part_of_the_whole() {
        for (width, height) in [(20, 9), (9, 40), (60, 6), (4, 4), (13, 31)] {
            let picture = pattern(13, 31);
            let whole = picture.resized(width, height, Filter::Bicubic);
            let part = picture.resized_part((width, 1..width - 2), (height, 2..height - 1), Filter::Bicubic);
            let rows = whole.rgb.chunks_exact(3 * width).skip(2).take(height - 3);
            let expected: Vec<u8> = rows.flat_map(|row| &row[3..3 * (width - 2)]).copied().collect();
            assert_eq!(part, Frame { width: width - 3, height: height - 3, rgb: expected }, "{width}x{height}");
        }
    }

    #[test]
    fn a_flat_picture_stays_flat() {
        for filter in [Filter::Bicubic, Filter::Lanczos] {
            let flat = Mask { width: 9, height: 4, grey: vec![201; 36] };
            for (width, height) in [(1, 1), (3, 40), (100, 2)] {
                assert_eq!(flat.resized(width, height, filter).grey, vec![201; width * height], "{filter:?}");
            }
        }
    }

    /// Sums that leave the bytes at either end are cut there.
    #[test]
    fn ringing_is_cut_at_black_and_white() {
        let edge = Mask { width: 8, height: 1, grey: vec![0, 0, 0, 0, 255, 255, 255, 255] };
        let resized = edge.resized(64, 1, Filter::Lanczos);
        assert!(resized.grey.contains(&0) && resized.grey.contains(&255));
        assert!(resized.grey[..28].iter().all(|value| *value < 40), "{resized:?}");
    }
}
