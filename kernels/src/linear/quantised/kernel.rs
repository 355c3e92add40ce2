//! Matrices of blocks on the CPU: blocks widened in registers.
//!
//! Owns: the sums of one row of `x` with rows of blocks, and the places that widened blocks are written to. Does not know: the
//! layouts.

use std::marker::PhantomData;

use crate::dot::{K_BLOCK, TILE_OUTS};
use crate::linear::blocks::{Format, Sink};
use crate::linear::panels::Weights;
use crate::simd::{Op, Simd, dispatch};

/// Rows of `k` values in blocks of one layout.
#[derive(Clone, Copy)]
pub(super) struct Blocks<'a, F> {
    bytes: &'a [u8],
    k: usize,
    /// How far behind a block lies one that is asked for while the block is added: some rows further, since what a processor
    /// guesses does not reach over the ends of short rows.
    ahead: usize,
    format: PhantomData<F>,
}

impl<'a, F: Format> Blocks<'a, F> {
    /// `bytes` are whole rows.
    pub(super) fn new(bytes: &'a [u8], k: usize) -> Self {
        const AHEAD_BYTES: usize = 4 << 10;
        let four = (TILE_OUTS * (k / F::VALUES * F::BYTES)).max(1);
        let blocks = Self { bytes, k, ahead: AHEAD_BYTES.div_ceil(four) * four, format: PhantomData };
        assert!(k.is_multiple_of(F::VALUES), "rows of whole blocks: this is a bug");
        assert!(bytes.len().is_multiple_of(blocks.row_bytes()), "whole rows: this is a bug");
        blocks
    }

    fn row_bytes(&self) -> usize {
        self.k / F::VALUES * F::BYTES
    }

    fn rows(&self) -> usize {
        self.bytes.len() / self.row_bytes()
    }

    /// Some rows of them.
    pub(super) fn rows_from(&self, first: usize, rows: usize) -> Self {
        Self { bytes: &self.bytes[first * self.row_bytes()..][..rows * self.row_bytes()], ..*self }
    }

    /// The blocks of a row from a column on, which begins one.
    #[inline(always)]
    fn at(&self, row: usize, column: usize) -> &'a [u8] {
        &self.bytes[row * self.row_bytes()..][..self.row_bytes()][column / F::VALUES * F::BYTES..]
    }
}

/// Writes values one after the other.
struct Store {
    to: *mut f32,
}

impl<S: Simd> Sink<S> for Store {
    #[inline(always)]
    unsafe fn take(&mut self, s: S, at: usize, values: S::V) {
        // SAFETY: passed on to the caller.
        unsafe { s.store(self.to.add(at), values) };
    }
}

impl<F: Format> Weights for Blocks<'_, F> {
    #[inline(always)]
    fn widen<S: Simd>(&self, s: S, row: usize, first: usize, len: usize, to: &mut [f32]) {
        let blocks = &self.at(row, first)[..len / F::VALUES * F::BYTES];
        let to = &mut to[..len];
        let ahead = self.ahead;
        for (index, block) in blocks.chunks_exact(F::BYTES).enumerate() {
            s.prefetch(block.as_ptr().wrapping_add(ahead));
            // SAFETY: a whole block, and a place for each of its values.
            unsafe {
                let head = F::head(s, block.as_ptr());
                for part in 0..F::VALUES / F::PART {
                    let to = to[index * F::VALUES + part * F::PART..].as_mut_ptr();
                    F::part(s, block.as_ptr(), &head, part, &mut Store { to });
                }
            }
        }
    }
}

/// A row of blocks as f32: `[k]`.
pub(super) fn widen_row<F: Format>(blocks: Blocks<'_, F>, row: usize, to: &mut [f32]) {
    dispatch(WidenRow { blocks, row, to });
}

struct WidenRow<'a, F> {
    blocks: Blocks<'a, F>,
    row: usize,
    to: &'a mut [f32],
}

impl<F: Format> Op for WidenRow<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.blocks.widen(s, self.row, 0, self.blocks.k, self.to);
    }
}

/// `y [rows] = x [k] · blocksᵀ`, in the order in which [`crate::dot`] adds.
pub(super) fn multiply_row<F: Format>(blocks: Blocks<'_, F>, x: &[f32], y: &mut [f32]) {
    dispatch(MultiplyRow { blocks, x, y });
}

struct MultiplyRow<'a, F> {
    blocks: Blocks<'a, F>,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl<F: Format> Op for MultiplyRow<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { blocks, x, y } = self;
        assert!(x.len() == blocks.k && y.len() == blocks.rows(), "a factor for every column: this is a bug");
        let mut row = 0;
        while row < y.len() {
            // The last rows repeat one row instead of reading past the end.
            let (valid, step) = if row + TILE_OUTS <= y.len() { (TILE_OUTS, 1) } else { (1, 0) };
            let rows = [row, row + step, row + 2 * step, row + 3 * step];
            let mut column = 0;
            while column < blocks.k {
                let x = &x[column..blocks.k.min(column + K_BLOCK)];
                let sums = blocks.block_sums(s, rows, column, x);
                for n in 0..valid {
                    y[row + n] = if column == 0 { sums[n] } else { y[row + n] + sums[n] };
                }
                column += K_BLOCK;
            }
            row += valid;
        }
    }
}

impl<F: Format> Blocks<'_, F> {
    /// Of `x`, at most [`K_BLOCK`] values, with as many of four rows from a column on.
    #[inline(always)]
    fn block_sums<S: Simd>(&self, s: S, rows: [usize; TILE_OUTS], column: usize, x: &[f32]) -> [f32; TILE_OUTS] {
        let blocks = x.len() / F::VALUES;
        let (parts, ahead) = (F::VALUES / F::PART, self.ahead);
        let mut starts = [std::ptr::null(); TILE_OUTS];
        for n in 0..TILE_OUTS {
            starts[n] = self.at(rows[n], column)[..blocks * F::BYTES].as_ptr();
        }
        let mut sums = [s.splat(0.0); TILE_OUTS];
        let mut x = x.as_ptr();
        for block in 0..blocks {
            // SAFETY: blocks of each row, and as many values of `x`.
            unsafe {
                let mut heads = [F::head(s, starts[0].add(block * F::BYTES)); TILE_OUTS];
                for n in 1..TILE_OUTS {
                    heads[n] = F::head(s, starts[n].add(block * F::BYTES));
                }
                for part in 0..parts {
                    for n in 0..TILE_OUTS {
                        let start = starts[n].add(block * F::BYTES);
                        s.prefetch(start.wrapping_add(ahead + part * F::BYTES / parts));
                        let mut products = Products { x, sum: sums[n] };
                        F::part(s, start, &heads[n], part, &mut products);
                        sums[n] = products.sum;
                    }
                    x = x.add(F::PART);
                }
            }
        }
        s.reduce4(sums)
    }
}

/// Adds products with `x` lane by lane.
struct Products<V> {
    x: *const f32,
    sum: V,
}

impl<S: Simd> Sink<S> for Products<S::V> {
    #[inline(always)]
    unsafe fn take(&mut self, s: S, at: usize, values: S::V) {
        // SAFETY: passed on to the caller.
        self.sum = s.fma(unsafe { s.load(self.x.add(at)) }, values, self.sum);
    }
}
