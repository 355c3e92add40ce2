//! Sums of outer products: the micro-kernel of attention and convolutions.
//!
//! `c[m][j] (+)= Σ_k a[m][k] · b[offset[k] + j]`: `a` is read one value at a time, `b` a vector at a time. The rows of
//! `b` lie wherever `offset` says, so that keys, values and the shifted views of a padded picture serve as they are.
//! Every sum is one chain of multiply-adds in the order of k: its bits do not depend on the tile.
//!
//! A tile of six rows by four vectors does 24 multiply-adds for 10 loads and fills the 32 registers of AVX-512; six by
//! two fills the 16 of AVX2.

use crate::dot::Rows;
use crate::simd::Simd;

/// One product. `b` must be readable, `c` readable and writable, for `columns` rounded up to whole vectors.
pub(crate) struct Outer<'a> {
    pub(crate) a: Rows<f32>,
    pub(crate) rows: usize,
    pub(crate) b: *const f32,
    /// Where row k of `b` starts.
    pub(crate) offsets: &'a [usize],
    pub(crate) c: *mut f32,
    pub(crate) c_stride: usize,
    pub(crate) columns: usize,
    /// Whether to add to `c` or to overwrite it.
    pub(crate) start: Start,
}

/// Where sums start.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// From zero: `c` is overwritten.
    Zero,
    /// From what `c` holds.
    Found,
}

const ROWS: usize = 6;

impl Outer<'_> {
    /// # Safety
    /// `rows` rows of `a` of `offsets.len()` values, every row of `b` and every row of `c` must be there.
    #[inline(always)]
    pub(crate) unsafe fn run<S: Simd>(&self, s: S) {
        let wide = if S::LANES == 16 { 4 } else { 2 } * S::LANES;
        let mut column = 0;
        // SAFETY: columns stay below `columns` rounded up to whole vectors.
        unsafe {
            while column + wide <= self.columns.next_multiple_of(S::LANES) {
                if S::LANES == 16 {
                    self.all_rows::<S, 4>(s, column);
                } else {
                    self.all_rows::<S, 2>(s, column);
                }
                column += wide;
            }
            while column < self.columns {
                self.all_rows::<S, 1>(s, column);
                column += S::LANES;
            }
        }
    }

    /// # Safety
    /// As for [`Outer::run`].
    #[inline(always)]
    unsafe fn all_rows<S: Simd, const NV: usize>(&self, s: S, column: usize) {
        let mut row = 0;
        // SAFETY: a tile takes no more rows than are left.
        unsafe {
            while row + ROWS <= self.rows {
                self.tile::<S, ROWS, NV>(s, row, column);
                row += ROWS;
            }
            match self.rows - row {
                1 => self.tile::<S, 1, NV>(s, row, column),
                2 => self.tile::<S, 2, NV>(s, row, column),
                3 => self.tile::<S, 3, NV>(s, row, column),
                4 => self.tile::<S, 4, NV>(s, row, column),
                5 => self.tile::<S, 5, NV>(s, row, column),
                _ => {}
            }
        }
    }

    /// # Safety
    /// As for [`Outer::run`]; MR rows from `row` and NV vectors from `column` must be there.
    #[inline(always)]
    unsafe fn tile<S: Simd, const MR: usize, const NV: usize>(&self, s: S, row: usize, column: usize) {
        let mut sums = [[s.splat(0.0); NV]; MR];
        // SAFETY: passed on to the caller.
        unsafe {
            let (a, b) = (self.a.at(row, 0), self.b.add(column));
            let c = self.c.add(row * self.c_stride + column);
            if self.start == Start::Found {
                for m in 0..MR {
                    for n in 0..NV {
                        sums[m][n] = s.load(c.add(m * self.c_stride + n * S::LANES));
                    }
                }
            }
            let mut k = 0;
            while k < self.offsets.len() {
                let b = b.add(*self.offsets.get_unchecked(k));
                let mut vectors = [s.splat(0.0); NV];
                for n in 0..NV {
                    vectors[n] = s.load(b.add(n * S::LANES));
                }
                for m in 0..MR {
                    let value = s.splat(*a.start.add(m * a.stride + k));
                    for n in 0..NV {
                        sums[m][n] = s.fma(value, vectors[n], sums[m][n]);
                    }
                }
                k += 1;
            }
            for m in 0..MR {
                for n in 0..NV {
                    s.store(c.add(m * self.c_stride + n * S::LANES), sums[m][n]);
                }
            }
        }
    }
}
