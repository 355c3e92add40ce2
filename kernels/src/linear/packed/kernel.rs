//! Packed matrices on the CPU: codes widened in registers.
//!
//! Owns: how codes become values, and the sums of one row with rows of tiles. Does not know: tensors, where a code lies
//! ([`super::tiles`]).

use std::marker::PhantomData;

use super::tiles::{COLUMNS, LOWER, NIBBLES, PLANE_WORDS, ROW_WORDS, ROWS, ROWS_APART};
use crate::dot::K_BLOCK;
use crate::linear::panels::Weights;
use crate::simd::{Element, Op, Simd, dispatch};

/// How a code is widened.
pub(super) trait Format: Copy + Send + Sync + 'static {
    /// Planes of nibbles of a tile.
    const PLANES: usize;
    /// What [`Format::codes`] are for a code of 0.
    const BIAS: f32;
    /// What codes with one zero and one scale are widened by.
    type Values<S: Simd>: Copy;

    /// Of a zero and a scale in every lane.
    fn values<S: Simd>(s: S, zero: S::V, scale: S::V) -> Self::Values<S>;

    /// `(code - zero) * scale` of the codes at `LANES` words from `words` on, `shift` bits from their lowest.
    ///
    /// # Safety
    /// `LANES` words must be readable in each plane.
    unsafe fn widen<S: Simd>(s: S, values: Self::Values<S>, words: *const u32, shift: u32) -> S::V;

    /// The codes themselves, and [`Format::BIAS`].
    ///
    /// # Safety
    /// As for [`Format::widen`].
    unsafe fn codes<S: Simd>(s: S, words: *const u32, shift: u32) -> S::V;
}

/// See [`super::Code`].
#[derive(Clone, Copy)]
pub(super) struct Int4;
#[derive(Clone, Copy)]
pub(super) struct Int8;
#[derive(Clone, Copy)]
pub(super) struct E4m3;

impl Format for Int4 {
    const PLANES: usize = 1;
    const BIAS: f32 = 0.0;
    type Values<S: Simd> = S::Codebook;

    #[inline(always)]
    fn values<S: Simd>(s: S, zero: S::V, scale: S::V) -> S::Codebook {
        s.codebook(zero, scale, s.splat(-0.0))
    }

    #[inline(always)]
    unsafe fn widen<S: Simd>(s: S, values: S::Codebook, words: *const u32, shift: u32) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { s.nibbles_of_words(values, words, shift) }
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(s: S, words: *const u32, shift: u32) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { s.nibbles_of_words(Self::values(s, s.splat(0.0), s.splat(1.0)), words, shift) }
    }
}

/// Formats of two planes: a zero with the bias, and a scale.
macro_rules! two_planes {
    ($format:ident, $bias:expr, $codes:ident) => {
        impl Format for $format {
            const PLANES: usize = 2;
            const BIAS: f32 = $bias;
            type Values<S: Simd> = (S::V, S::V);

            #[inline(always)]
            fn values<S: Simd>(s: S, zero: S::V, scale: S::V) -> (S::V, S::V) {
                (s.add(zero, s.splat(Self::BIAS)), scale)
            }

            #[inline(always)]
            unsafe fn widen<S: Simd>(s: S, (zero, scale): (S::V, S::V), words: *const u32, shift: u32) -> S::V {
                // SAFETY: passed on to the caller.
                s.mul(s.sub(unsafe { Self::codes(s, words, shift) }, zero), scale)
            }

            #[inline(always)]
            unsafe fn codes<S: Simd>(s: S, words: *const u32, shift: u32) -> S::V {
                // SAFETY: passed on to the caller.
                unsafe { s.$codes(words, words.add(PLANE_WORDS), shift) }
            }
        }
    };
}

two_planes!(Int8, 8_388_608.0, nibble_pairs);
two_planes!(E4m3, 0.0, nibbles_e4m3);

/// The column of the scales for each position of the tiles.
#[derive(Debug)]
pub(super) struct Groups {
    of_position: Vec<u32>,
    /// [`SEVERAL`] where it is not the same for all positions of a tile.
    of_tile: Vec<u32>,
    /// Whether it is the same for positions that are four apart.
    of_steps: bool,
}

const SEVERAL: u32 = u32::MAX;

impl Groups {
    pub(super) fn new(columns: usize, group_size: usize) -> Self {
        let position = |at: usize| at / COLUMNS * COLUMNS + super::tiles::column(at % COLUMNS);
        let group = |at: usize| (position(at).min(columns - 1) / group_size) as u32;
        let of_position: Vec<u32> = (0..columns.next_multiple_of(COLUMNS)).map(group).collect();
        let of_tile = |tile: &[u32]| if tile.iter().all(|group| *group == tile[0]) { tile[0] } else { SEVERAL };
        Self {
            of_tile: of_position.chunks_exact(COLUMNS).map(of_tile).collect(),
            of_steps: of_position.chunks_exact(COLUMNS).all(|tile| tile.chunks_exact(4).all(|four| four == &tile[..4])),
            of_position,
        }
    }
}

/// A packed matrix in host memory, whose scales are `T`.
#[derive(Clone, Copy)]
pub(super) struct Tiles<'a, T, F> {
    pub(super) words: &'a [u32],
    pub(super) scales: &'a [T],
    pub(super) zeros: Option<&'a [u8]>,
    pub(super) groups: &'a Groups,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) group_size: usize,
    pub(super) rows_per_scale: usize,
    pub(super) format: PhantomData<F>,
}

impl<'a, T: Element, F> Tiles<'a, T, F> {
    /// The same words as codes of another format.
    pub(super) fn of<G: Format>(self) -> Tiles<'a, T, G> {
        let Self { words, scales, zeros, groups, rows, columns, group_size, rows_per_scale, .. } = self;
        Tiles { words, scales, zeros, groups, rows, columns, group_size, rows_per_scale, format: PhantomData }
    }

    fn column_tiles(&self) -> usize {
        self.columns.div_ceil(COLUMNS)
    }

    pub(super) fn padded_columns(&self) -> usize {
        self.column_tiles() * COLUMNS
    }

    /// Where the scales of a row begin, which may lie past the end.
    #[inline(always)]
    fn first_scale(&self, row: usize) -> usize {
        row.min(self.rows - 1) / self.rows_per_scale * self.columns.div_ceil(self.group_size)
    }

    #[inline(always)]
    fn zero(&self, at: usize) -> f32 {
        match self.zeros {
            Some(zeros) => f32::from(zeros[at]),
            None => 0.0,
        }
    }
}

impl<T: Element, F: Format> Tiles<'_, T, F> {
    fn words_of(&self, row_tile: usize, column_tile: usize) -> &[u32] {
        let tile_words = F::PLANES * PLANE_WORDS;
        &self.words[(row_tile * self.column_tiles() + column_tile) * tile_words..][..tile_words]
    }

    /// Zeros, with the bias, and scales at all positions of a tile, of a row whose scales begin at `first_scale`.
    #[inline(always)]
    fn spread(&self, first_scale: usize, column_tile: usize) -> Spread {
        let groups = &self.groups.of_position[column_tile * COLUMNS..][..COLUMNS];
        let mut spread = Spread { zeros: [0.0; COLUMNS], scales: [0.0; COLUMNS] };
        let distinct = if self.groups.of_steps { 4 } else { COLUMNS };
        for position in 0..distinct {
            let at = first_scale + groups[position] as usize;
            (spread.zeros[position], spread.scales[position]) = (F::BIAS + self.zero(at), self.scales[at].widen());
        }
        if distinct < COLUMNS {
            let (zeros, scales) = (spread.zeros, spread.scales);
            for position in 0..COLUMNS {
                (spread.zeros[position], spread.scales[position]) = (zeros[position % 4], scales[position % 4]);
            }
        }
        spread
    }
}

/// See [`Tiles::spread`].
struct Spread {
    zeros: [f32; COLUMNS],
    scales: [f32; COLUMNS],
}

/// Where a vector of a row lies: words from the first of the row's on, and bits from their lowest. `lower` is whether the row is
/// the lower one of those that share the words.
#[inline(always)]
fn place<S: Simd>(vector: usize, lower: bool) -> (usize, u32) {
    // A vector does not reach into the words of another row, since its lanes divide them.
    let first = vector * S::LANES;
    (first % ROW_WORDS, NIBBLES[first / ROW_WORDS].0 + if lower { LOWER } else { 0 })
}

impl<T: Element, F: Format> Weights for Tiles<'_, T, F> {
    /// In the order of positions.
    #[inline(always)]
    fn widen<S: Simd>(&self, s: S, row: usize, first: usize, len: usize, to: &mut [f32]) {
        let (row_tile, lower) = (row / ROWS, row % ROWS >= ROWS_APART);
        let first_scale = self.first_scale(row);
        for (index, to) in to[..len].chunks_exact_mut(COLUMNS).enumerate() {
            let column_tile = first / COLUMNS + index;
            let words = &self.words_of(row_tile, column_tile)[row % ROWS_APART * ROW_WORDS..];
            let group = self.groups.of_tile[column_tile];
            if group == SEVERAL {
                let spread = self.spread(first_scale, column_tile);
                for vector in 0..COLUMNS / S::LANES {
                    let (word, shift) = place::<S>(vector, lower);
                    let at = vector * S::LANES;
                    // SAFETY: the words are those of the row; `spread` and `to` have whole vectors at `at`.
                    unsafe {
                        let code = F::codes(s, words.as_ptr().add(word), shift);
                        let value = s.sub(code, s.load(spread.zeros[at..].as_ptr()));
                        s.store(to[at..].as_mut_ptr(), s.mul(value, s.load(spread.scales[at..].as_ptr())));
                    }
                }
            } else {
                let at = first_scale + group as usize;
                let values = F::values(s, s.splat(self.zero(at)), self.scales[at].splat(s));
                for vector in 0..COLUMNS / S::LANES {
                    let (word, shift) = place::<S>(vector, lower);
                    // SAFETY: as above.
                    unsafe {
                        let value = F::widen(s, values, words.as_ptr().add(word), shift);
                        s.store(to[vector * S::LANES..].as_mut_ptr(), value);
                    }
                }
            }
        }
    }
}

/// A row in the order of positions: `to [padded columns]`.
pub(super) fn widen_row<T: Element, F: Format>(tiles: &Tiles<'_, T, F>, row: usize, to: &mut [f32]) {
    dispatch(WidenRow { tiles, row, to });
}

struct WidenRow<'a, T, F> {
    tiles: &'a Tiles<'a, T, F>,
    row: usize,
    to: &'a mut [f32],
}

impl<T: Element, F: Format> Op for WidenRow<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.tiles.widen(s, self.row, 0, self.tiles.padded_columns(), self.to);
    }
}

/// `y` from the first row of a row of tiles on: those rows times `x [padded columns]`, in the order of positions.
pub(super) fn multiply_row<T: Element, F: Format>(
    tiles: &Tiles<'_, T, F>,
    x: &[f32],
    first_tile: usize,
    y: &mut [f32],
) {
    dispatch(MultiplyRow { sums: Sums { tiles, x }, first_tile, y });
}

struct MultiplyRow<'a, T, F> {
    sums: Sums<'a, T, F>,
    first_tile: usize,
    y: &'a mut [f32],
}

/// Of rows of the tiles with `x`.
struct Sums<'a, T, F> {
    tiles: &'a Tiles<'a, T, F>,
    x: &'a [f32],
}

impl<T: Element, F: Format> Op for MultiplyRow<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { sums, first_tile, y } = self;
        assert_eq!(sums.x.len(), sums.tiles.padded_columns(), "a factor for every column: this is a bug");
        for (index, y) in y.chunks_mut(ROWS).enumerate() {
            let sums = sums.of_tiles(s, first_tile + index);
            y.copy_from_slice(&sums[..y.len()]);
        }
    }
}

impl<T: Element, F: Format> Sums<'_, T, F> {
    /// Of the rows of a row of tiles: blocks of K in order, as [`crate::dot`] adds them.
    #[inline(always)]
    fn of_tiles<S: Simd>(&self, s: S, row_tile: usize) -> [f32; ROWS] {
        const TILES_PER_BLOCK: usize = K_BLOCK / COLUMNS;
        let mut totals = [0f32; ROWS];
        let mut first_scales = [0; ROWS];
        for row in 0..ROWS {
            first_scales[row] = self.tiles.first_scale(row_tile * ROWS + row);
        }
        let tiles = self.tiles.column_tiles();
        let mut first = 0;
        while first < tiles {
            let last = (first + TILES_PER_BLOCK).min(tiles);
            let mut pair = 0;
            while pair < ROWS_APART {
                let rows = [pair, pair + ROWS_APART, pair + 1, pair + 1 + ROWS_APART];
                let mut scales = [0; 4];
                for i in 0..4 {
                    scales[i] = first_scales[rows[i]];
                }
                let sums = self.of_block(s, row_tile, pair, scales, (first, last));
                for i in 0..4 {
                    let total = &mut totals[rows[i]];
                    *total = if first == 0 { sums[i] } else { *total + sums[i] };
                }
                pair += 2;
            }
            first = last;
        }
        totals
    }

    /// Sums over the tiles of a block of rows `pair`, the one that shares its words, and the next two, whose scales begin at
    /// `first_scales`.
    #[inline(always)]
    fn of_block<S: Simd>(
        &self,
        s: S,
        row_tile: usize,
        pair: usize,
        first_scales: [usize; 4],
        (first, last): (usize, usize),
    ) -> [f32; 4] {
        let mut lanes = [s.splat(0.0); 4];
        for column_tile in first..last {
            let words = self.tiles.words_of(row_tile, column_tile)[pair * ROW_WORDS..].as_ptr();
            let x = self.x[column_tile * COLUMNS..][..COLUMNS].as_ptr();
            let group = self.tiles.groups.of_tile[column_tile];
            if group == SEVERAL {
                for i in 0..4 {
                    let spread = self.tiles.spread(first_scales[i], column_tile);
                    for vector in 0..COLUMNS / S::LANES {
                        let (word, shift) = place::<S>(vector, i % 2 == 1);
                        let at = vector * S::LANES;
                        // SAFETY: `words` are those of the first two rows, and those of the next two follow; `x` has a tile's
                        // columns, and `spread` whole vectors at `at`.
                        unsafe {
                            let code = F::codes(s, words.add(i / 2 * ROW_WORDS + word), shift);
                            let value = s.sub(code, s.load(spread.zeros[at..].as_ptr()));
                            let value = s.mul(value, s.load(spread.scales[at..].as_ptr()));
                            lanes[i] = s.fma(s.load(x.add(at)), value, lanes[i]);
                        }
                    }
                }
            } else {
                let mut values = [F::values(s, s.splat(0.0), s.splat(0.0)); 4];
                for i in 0..4 {
                    let at = first_scales[i] + group as usize;
                    values[i] = F::values(s, s.splat(self.tiles.zero(at)), self.tiles.scales[at].splat(s));
                }
                for vector in 0..COLUMNS / S::LANES {
                    // SAFETY: as above.
                    unsafe {
                        let x = s.load(x.add(vector * S::LANES));
                        for i in 0..4 {
                            let (word, shift) = place::<S>(vector, i % 2 == 1);
                            let value = F::widen(s, values[i], words.add(i / 2 * ROW_WORDS + word), shift);
                            lanes[i] = s.fma(x, value, lanes[i]);
                        }
                    }
                }
            }
        }
        s.reduce4(lanes)
    }
}
