//! Packed matrices on the CPU: codes widened in registers.

use std::marker::PhantomData;

use super::tiles::{COLUMNS, LOWER, NIBBLES, PLANE_WORDS, ROW_WORDS, ROWS, ROWS_APART};
use crate::dot::K_BLOCK;
use crate::simd::{Element, Op, Simd, dispatch};

/// How a code is widened.
pub(super) trait Format: Copy + Send + Sync + 'static {
    /// Planes of nibbles of a tile.
    const PLANES: usize;
    /// What comes out where a code is 0.
    const BIAS: f32;

    /// The codes at `LANES` words from `words` on, `shift` bits from their lowest, and [`Format::BIAS`].
    ///
    /// # Safety
    /// `LANES` words must be readable in each plane.
    unsafe fn widen<S: Simd>(s: S, words: *const u32, shift: u32) -> S::V;
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
    const BIAS: f32 = 8_388_608.0;

    #[inline(always)]
    unsafe fn widen<S: Simd>(s: S, words: *const u32, shift: u32) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { s.nibbles(words, shift) }
    }
}

impl Format for Int8 {
    const PLANES: usize = 2;
    const BIAS: f32 = Int4::BIAS;

    #[inline(always)]
    unsafe fn widen<S: Simd>(s: S, words: *const u32, shift: u32) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { s.nibble_pairs(words, words.add(PLANE_WORDS), shift) }
    }
}

impl Format for E4m3 {
    const PLANES: usize = 2;
    const BIAS: f32 = 0.0;

    #[inline(always)]
    unsafe fn widen<S: Simd>(s: S, words: *const u32, shift: u32) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { s.nibbles_e4m3(words, words.add(PLANE_WORDS), shift) }
    }
}

/// A packed matrix in host memory, whose scales are `T`.
#[derive(Clone, Copy)]
pub(super) struct Tiles<'a, T, F> {
    pub(super) words: &'a [u32],
    pub(super) scales: &'a [T],
    pub(super) zeros: Option<&'a [u8]>,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) group_size: usize,
    pub(super) rows_per_scale: usize,
    pub(super) format: PhantomData<F>,
}

impl<'a, T: Element, F> Tiles<'a, T, F> {
    /// The same words as codes of another format.
    pub(super) fn of<G: Format>(self) -> Tiles<'a, T, G> {
        let Self { words, scales, zeros, rows, columns, group_size, rows_per_scale, .. } = self;
        Tiles { words, scales, zeros, rows, columns, group_size, rows_per_scale, format: PhantomData }
    }

    fn column_tiles(&self) -> usize {
        self.columns.div_ceil(COLUMNS)
    }

    pub(super) fn padded_columns(&self) -> usize {
        self.column_tiles() * COLUMNS
    }

    /// Of a row, which may lie past the end, and a column: what is taken from the widened code, and what that is multiplied
    /// with.
    #[inline(always)]
    fn zero_and_scale(&self, row: usize, column: usize, bias: f32) -> (f32, f32) {
        let (row, column) = (row.min(self.rows - 1), column.min(self.columns - 1));
        let at = row / self.rows_per_scale * self.columns.div_ceil(self.group_size) + column / self.group_size;
        let zero = match self.zeros {
            Some(zeros) => f32::from(zeros[at]),
            None => 0.0,
        };
        (bias + zero, self.scales[at].widen())
    }
}

impl<T: Element, F: Format> Tiles<'_, T, F> {
    fn words_of(&self, row_tile: usize, column_tile: usize) -> &[u32] {
        let tile_words = F::PLANES * PLANE_WORDS;
        &self.words[(row_tile * self.column_tiles() + column_tile) * tile_words..][..tile_words]
    }

    /// Zeros and scales of a row at all positions of a tile.
    #[inline(always)]
    fn spread(&self, row: usize, column_tile: usize) -> Spread {
        let first = column_tile * COLUMNS;
        let last = (first + COLUMNS).min(self.columns) - 1;
        if first / self.group_size == last / self.group_size {
            let (zero, scale) = self.zero_and_scale(row, first, F::BIAS);
            return Spread { zeros: [zero; COLUMNS], scales: [scale; COLUMNS] };
        }
        let mut spread = Spread { zeros: [0.0; COLUMNS], scales: [0.0; COLUMNS] };
        let mut position = 0;
        while position < COLUMNS {
            let column = first + super::tiles::column(position);
            (spread.zeros[position], spread.scales[position]) = self.zero_and_scale(row, column, F::BIAS);
            position += 1;
        }
        spread
    }

    /// Whether all columns of a tile have one scale in a row.
    #[inline(always)]
    fn is_one_group(&self, column_tile: usize) -> bool {
        let first = column_tile * COLUMNS;
        let last = (first + COLUMNS).min(self.columns) - 1;
        first / self.group_size == last / self.group_size
    }
}

/// See [`Tiles::spread`].
struct Spread {
    zeros: [f32; COLUMNS],
    scales: [f32; COLUMNS],
}

/// The values of one vector of a row: its words in a tile, which of the vectors of the tile, and whether it is the lower one of
/// the rows that share the words.
///
/// # Safety
/// `words` must be those of a row in a tile.
#[inline(always)]
unsafe fn codes<S: Simd, F: Format>(s: S, words: *const u32, vector: usize, lower: bool) -> S::V {
    let first = vector * S::LANES;
    let shift = NIBBLES[first / ROW_WORDS].0 + if lower { LOWER } else { 0 };
    // SAFETY: a vector does not reach into the words of another row, since its lanes divide them.
    unsafe { F::widen(s, words.add(first % ROW_WORDS), shift) }
}

/// The rows of a row of tiles, `[ROWS, padded columns]` in the order of positions.
pub(super) fn widen_rows<T: Element, F: Format>(tiles: &Tiles<'_, T, F>, row_tile: usize, to: &mut [f32]) {
    dispatch(WidenRows { tiles, row_tile, to });
}

struct WidenRows<'a, T, F> {
    tiles: &'a Tiles<'a, T, F>,
    row_tile: usize,
    to: &'a mut [f32],
}

impl<T: Element, F: Format> Op for WidenRows<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let padded = self.tiles.padded_columns();
        assert_eq!(self.to.len(), ROWS * padded, "a place for every value: this is a bug");
        for row in 0..ROWS {
            for column_tile in 0..self.tiles.column_tiles() {
                let words = &self.tiles.words_of(self.row_tile, column_tile)[row % ROWS_APART * ROW_WORDS..];
                let spread = self.tiles.spread(self.row_tile * ROWS + row, column_tile);
                let to = &mut self.to[row * padded + column_tile * COLUMNS..][..COLUMNS];
                for vector in 0..COLUMNS / S::LANES {
                    let at = vector * S::LANES;
                    // SAFETY: the words are those of the row; `spread` and `to` have whole vectors at `at`.
                    unsafe {
                        let codes = codes::<S, F>(s, words.as_ptr(), vector, row >= ROWS_APART);
                        let value = s.sub(codes, s.load(spread.zeros[at..].as_ptr()));
                        s.store(to[at..].as_mut_ptr(), s.mul(value, s.load(spread.scales[at..].as_ptr())));
                    }
                }
            }
        }
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
        let tiles = self.tiles.column_tiles();
        let mut first = 0;
        while first < tiles {
            let last = (first + TILES_PER_BLOCK).min(tiles);
            let mut pair = 0;
            while pair < ROWS_APART {
                let sums = self.of_block(s, row_tile, pair, (first, last));
                for (i, sum) in sums.into_iter().enumerate() {
                    let row = pair + i / 2 + i % 2 * ROWS_APART;
                    totals[row] = if first == 0 { sum } else { totals[row] + sum };
                }
                pair += 2;
            }
            first = last;
        }
        totals
    }

    /// Sums over the tiles of a block of rows `pair`, the one that shares its words, and the next two.
    #[inline(always)]
    fn of_block<S: Simd>(&self, s: S, row_tile: usize, pair: usize, (first, last): (usize, usize)) -> [f32; 4] {
        let mut lanes = [s.splat(0.0); 4];
        let row = row_tile * ROWS + pair;
        let rows = [row, row + ROWS_APART, row + 1, row + 1 + ROWS_APART];
        for column_tile in first..last {
            let words = self.tiles.words_of(row_tile, column_tile)[pair * ROW_WORDS..].as_ptr();
            let x = self.x[column_tile * COLUMNS..][..COLUMNS].as_ptr();
            if self.tiles.is_one_group(column_tile) {
                let (mut zeros, mut scales) = ([s.splat(0.0); 4], [s.splat(0.0); 4]);
                for i in 0..4 {
                    let (zero, scale) = self.tiles.zero_and_scale(rows[i], column_tile * COLUMNS, F::BIAS);
                    (zeros[i], scales[i]) = (s.splat(zero), s.splat(scale));
                }
                for vector in 0..COLUMNS / S::LANES {
                    // SAFETY: `words` are those of the first two rows, and those of the next two follow; `x` has a tile's columns.
                    unsafe {
                        let x = s.load(x.add(vector * S::LANES));
                        for i in 0..4 {
                            let codes = codes::<S, F>(s, words.add(i / 2 * ROW_WORDS), vector, i % 2 == 1);
                            lanes[i] = s.fma(x, s.mul(s.sub(codes, zeros[i]), scales[i]), lanes[i]);
                        }
                    }
                }
            } else {
                for i in 0..4 {
                    let spread = self.tiles.spread(rows[i], column_tile);
                    for vector in 0..COLUMNS / S::LANES {
                        let at = vector * S::LANES;
                        // SAFETY: as above; `spread` has whole vectors at `at`.
                        unsafe {
                            let codes = codes::<S, F>(s, words.add(i / 2 * ROW_WORDS), vector, i % 2 == 1);
                            let value = s.sub(codes, s.load(spread.zeros[at..].as_ptr()));
                            let value = s.mul(value, s.load(spread.scales[at..].as_ptr()));
                            lanes[i] = s.fma(s.load(x.add(at)), value, lanes[i]);
                        }
                    }
                }
            }
        }
        s.reduce4(lanes)
    }
}
