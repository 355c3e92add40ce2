//! Dot products of rows: the micro-kernel of `x Wᵀ`.
//!
//! `sum[m][n] = Σ_k x[m][k] · w[n][k]` with both operands row-major, so that weights are read as published. One
//! definition of the sum serves one row and five hundred: K is cut into blocks of [`K_BLOCK`]; within a block, lane j
//! adds up the products of k ≡ j (mod lanes) in order; the lanes are added by [`Simd::reduce4`]; blocks are added in
//! order. The bits of a sum therefore depend on its two rows alone, not on the tile that computed it.
//!
//! A tile of MR x NR sums does MR·NR multiply-adds for MR + NR loads. Six by four fills the 32 registers of AVX-512
//! (24 sums, 4 weights, 1 activation), three by four the 16 of AVX2.

use crate::simd::{Element, MAX_LANES, Op, Simd};

/// Length of the blocks of K that are summed by themselves. Longer blocks spend less time on adding up lanes, shorter
/// ones keep a tile's rows in the first-level cache.
pub(crate) const K_BLOCK: usize = 512;

/// Rows of `x` in a packed tile; a multiple of what every instruction set takes at a time.
pub(crate) const TILE_ROWS: usize = 6;

/// Rows of `w` in a tile.
pub(crate) const TILE_OUTS: usize = 4;

/// Distance between rows of packed blocks: one cache line more than the block, so that rows do not fall into the same
/// cache sets.
pub(crate) const PACKED_STRIDE: usize = K_BLOCK + MAX_LANES;

/// A matrix in row-major order, by its first value and the distance between rows.
#[derive(Clone, Copy)]
pub(crate) struct Rows<T> {
    pub(crate) start: *const T,
    pub(crate) stride: usize,
}

impl<T> Rows<T> {
    /// The rows from `row`, starting at column `column`.
    ///
    /// # Safety
    /// The place must lie inside the matrix.
    #[inline(always)]
    pub(crate) unsafe fn at(self, row: usize, column: usize) -> Self {
        // SAFETY: passed on to the caller.
        Self { start: unsafe { self.start.add(row * self.stride + column) }, stride: self.stride }
    }
}

/// Sums of one block of K, `len <= K_BLOCK`, for MR rows of `x` and four of `w`. `ahead` is the block of `w` that
/// comes next, if it must come from memory: it is asked for while this one is computed.
///
/// # Safety
/// MR rows of `x` and four rows of `w` must be readable for `len` values.
#[inline(always)]
pub(crate) unsafe fn block_sums<S: Simd, T: Element, const MR: usize>(
    s: S,
    x: Rows<f32>,
    w: Rows<T>,
    len: usize,
    ahead: Option<*const T>,
) -> [[f32; TILE_OUTS]; MR] {
    let mut lanes = [[s.splat(0.0); TILE_OUTS]; MR];
    let mut k = 0;
    // SAFETY: `k + LANES <= len` in the loop; after it `len - k` values are left.
    unsafe {
        while k + S::LANES <= len {
            if let Some(ahead) = ahead {
                for n in 0..TILE_OUTS {
                    s.prefetch(ahead.wrapping_add(n * w.stride + k));
                }
            }
            step(s, x.at(0, k), w.at(0, k), &mut lanes);
            k += S::LANES;
        }
        if k < len {
            last_step(s, x.at(0, k), w.at(0, k), len - k, &mut lanes);
        }
    }
    let mut sums = [[0f32; TILE_OUTS]; MR];
    for m in 0..MR {
        sums[m] = s.reduce4(lanes[m]);
    }
    sums
}

/// Adds the products of one vector of K. Loops over `lanes` must unroll wholly, here and above: an index known only at
/// run time would keep the sums in memory instead of registers.
///
/// # Safety
/// MR rows of `x` and four rows of `w` must be readable for `LANES` values.
#[inline(always)]
unsafe fn step<S: Simd, T: Element, const MR: usize>(
    s: S,
    x: Rows<f32>,
    w: Rows<T>,
    lanes: &mut [[S::V; TILE_OUTS]; MR],
) {
    let mut weights = [s.splat(0.0); TILE_OUTS];
    // SAFETY: passed on to the caller.
    unsafe {
        for n in 0..TILE_OUTS {
            weights[n] = T::load(s, w.at(n, 0).start);
        }
        for m in 0..MR {
            let value = s.load(x.at(m, 0).start);
            for n in 0..TILE_OUTS {
                lanes[m][n] = s.fma(value, weights[n], lanes[m][n]);
            }
        }
    }
}

/// [`step`] for the last `rest < LANES` values, the others taken as zero.
///
/// # Safety
/// MR rows of `x` and four rows of `w` must be readable for `rest` values.
#[inline(always)]
unsafe fn last_step<S: Simd, T: Element, const MR: usize>(
    s: S,
    x: Rows<f32>,
    w: Rows<T>,
    rest: usize,
    lanes: &mut [[S::V; TILE_OUTS]; MR],
) {
    let mut values = [[0f32; MAX_LANES]; MR];
    let mut weights = [[0f32; MAX_LANES]; TILE_OUTS];
    // SAFETY: `rest` values of every row (the caller's promise), from buffers of a whole vector per row.
    unsafe {
        for m in 0..MR {
            s.store(values[m].as_mut_ptr(), s.load_partial(x.at(m, 0).start, rest));
        }
        for n in 0..TILE_OUTS {
            s.store(weights[n].as_mut_ptr(), T::load_partial(s, w.at(n, 0).start, rest));
        }
        let x = Rows { start: values.as_ptr().cast(), stride: MAX_LANES };
        let w = Rows { start: weights.as_ptr().cast::<f32>(), stride: MAX_LANES };
        step(s, x, w, lanes);
    }
}

/// One row of `x` times consecutive rows of `w`: reads every weight once, straight from where it lies.
pub(crate) struct MatVec<'a, T> {
    /// `[k]`.
    pub(crate) x: &'a [f32],
    /// `[out.len(), k]`.
    pub(crate) w: &'a [T],
    /// `[out.len()]`.
    pub(crate) out: &'a mut [f32],
}

impl<T: Element> Op for MatVec<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let k = self.x.len();
        assert_eq!(self.w.len(), k * self.out.len(), "one row of weights per sum: this is a bug");
        let x = Rows { start: self.x.as_ptr(), stride: k };
        let mut row = 0;
        while row < self.out.len() {
            let rows = TILE_OUTS.min(self.out.len() - row);
            // The last rows repeat one row instead of reading past the end.
            let stride = if rows == TILE_OUTS { k } else { 0 };
            let mut first = 0;
            while first < rows {
                let w = Rows { start: self.w[(row + first) * k..].as_ptr(), stride };
                // SAFETY: four rows from `row` on, or one row four times, lie inside `w` (its length is checked above).
                let sums = unsafe { row_sums(s, x, w, k) };
                let valid = if stride == 0 { 1 } else { TILE_OUTS };
                self.out[row + first..row + first + valid].copy_from_slice(&sums[..valid]);
                first += valid;
            }
            row += rows;
        }
    }
}

/// Sums over all of K for one row of `x` and four of `w`.
///
/// # Safety
/// One row of `x` and four of `w` must be readable for `k` values.
#[inline(always)]
unsafe fn row_sums<S: Simd, T: Element>(s: S, x: Rows<f32>, w: Rows<T>, k: usize) -> [f32; TILE_OUTS] {
    let mut totals = [0f32; TILE_OUTS];
    let mut column = 0;
    while column < k {
        let len = K_BLOCK.min(k - column);
        // SAFETY: `column + len <= k`.
        let sums = unsafe {
            let block = w.at(0, column);
            block_sums::<S, T, 1>(s, x.at(0, column), block, len, Some(next_block(block, column, k)))[0]
        };
        for n in 0..TILE_OUTS {
            totals[n] = if column == 0 { sums[n] } else { totals[n] + sums[n] };
        }
        column += K_BLOCK;
    }
    totals
}

/// Where the block of four rows of `k` values after the one at `column` lies: further along them, or at the start of the next
/// four. There may be none.
#[inline(always)]
pub(crate) fn next_block<T>(block: Rows<T>, column: usize, k: usize) -> *const T {
    if column + K_BLOCK < k {
        block.start.wrapping_add(K_BLOCK)
    } else {
        block.start.wrapping_sub(column).wrapping_add(TILE_OUTS * k)
    }
}

/// Copies a block of rows, widened to f32, to `to [rows, PACKED_STRIDE]`; zero up to the next whole vector.
pub(crate) struct Pack<'a, T> {
    /// The first row, at the block's first column.
    pub(crate) from: Rows<T>,
    pub(crate) rows: usize,
    /// Columns of the block, at most [`K_BLOCK`].
    pub(crate) len: usize,
    pub(crate) to: &'a mut [f32],
}

impl<T: Element> Pack<'_, T> {
    /// # Safety
    /// `rows` rows of `from` must be readable for `len` values.
    #[inline(always)]
    pub(crate) unsafe fn run<S: Simd>(self, s: S) {
        assert!(self.len <= K_BLOCK && self.rows * PACKED_STRIDE <= self.to.len(), "the block fits: this is a bug");
        for row in 0..self.rows {
            let to = self.to[row * PACKED_STRIDE..].as_mut_ptr();
            let mut k = 0;
            // SAFETY: `k + LANES <= len`, and then `len - k` values are left; rows of `to` hold `len` rounded up to
            // whole vectors.
            unsafe {
                let from = self.from.at(row, 0).start;
                while k + S::LANES <= self.len {
                    s.store(to.add(k), T::load(s, from.add(k)));
                    k += S::LANES;
                }
                if k < self.len {
                    s.store(to.add(k), T::load_partial(s, from.add(k), self.len - k));
                }
            }
        }
    }
}
