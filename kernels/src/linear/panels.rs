//! Products of many rows: panels of weights, widened into memory that the cache holds, under tiles of six rows by four outputs.
//!
//! Owns: how such a product is cut into tasks and panels. Does not know: how weights are kept ([`Weights`]).

use crate::dot::{K_BLOCK, PACKED_STRIDE, Pack, Rows, TILE_OUTS, TILE_ROWS, block_sums};
use crate::parallel::{Shared, for_each, with_scratch};
use crate::simd::{Op, Simd, dispatch};

/// Rows of weights in any form that can be widened to f32.
pub(super) trait Weights: Sync {
    /// Columns `first..first + len` of a row, then zeros up to the next whole vector. `first` is a multiple of [`K_BLOCK`] and
    /// `len` at most that.
    fn widen<S: Simd>(&self, s: S, row: usize, first: usize, len: usize, to: &mut [f32]);
}

/// How a product of many rows is cut into tasks and panels.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    /// Rows of `x` and `w`, and their length.
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    /// Outputs of a panel.
    panel_outs: usize,
    /// Columns of a panel, a multiple of [`K_BLOCK`].
    panel_columns: usize,
    /// Rows of `x` that one task takes, a multiple of [`TILE_ROWS`].
    task_rows: usize,
}

impl Cut {
    /// Few rows: panels are whole rows of weights, so that memory is read in one go. Many rows: square panels, which
    /// are used often enough to hide how they are read.
    pub(super) fn new((m, n, k): (usize, usize, usize)) -> Self {
        const PANEL_VALUES: usize = 1 << 16;
        let task_rows = m.next_multiple_of(TILE_ROWS).min(192);
        let (panel_outs, panel_columns) = if m <= 64 {
            ((PANEL_VALUES / k) / TILE_OUTS * TILE_OUTS, k.next_multiple_of(K_BLOCK))
        } else {
            (64, K_BLOCK)
        };
        Self { m, n, k, panel_outs: panel_outs.clamp(TILE_OUTS, 64), panel_columns, task_rows }
    }

    fn k_blocks(&self) -> usize {
        self.k.div_ceil(K_BLOCK)
    }

    pub(super) fn padded_rows(&self) -> usize {
        self.m.next_multiple_of(TILE_ROWS)
    }

    fn panel_values(&self) -> usize {
        self.panel_columns / K_BLOCK * self.panel_outs * PACKED_STRIDE
    }
}

/// `y [m, n] = x [m, k] · wᵀ` by panels.
pub(super) fn many_rows<W: Weights>(x: &[f32], w: &W, dims: (usize, usize, usize), y: &mut [f32]) {
    let cut = Cut::new(dims);
    let packed = pack_rows(x, &cut);
    let Cut { m, n, k, .. } = cut;
    let (panels, row_tasks) = (n.div_ceil(cut.panel_outs), m.div_ceil(cut.task_rows));
    let y = Shared::new(y);
    for_each(panels * row_tasks, m * n * k, |task| {
        let (panel, row_task) = (task / row_tasks, task % row_tasks);
        with_scratch(cut.panel_values(), |scratch| {
            let first_row = row_task * cut.task_rows;
            dispatch(PanelTask {
                cut,
                x: &packed,
                w,
                rows: (first_row, cut.task_rows.min(m - first_row)),
                outs: (panel * cut.panel_outs, cut.panel_outs.min(n - panel * cut.panel_outs)),
                panel: scratch,
                y: y.as_ptr(),
            });
        });
    });
}

/// `x [m, k]` as `[k_blocks, padded_rows, PACKED_STRIDE]`; rows past `m` are zero.
pub(super) fn pack_rows(x: &[f32], cut: &Cut) -> Vec<f32> {
    let block = cut.padded_rows() * PACKED_STRIDE;
    let mut packed = vec![0f32; cut.k_blocks() * block];
    let to = Shared::new(&mut packed);
    for_each(cut.k_blocks(), cut.m * cut.k, |index| {
        let column = index * K_BLOCK;
        // SAFETY: every task has its own block.
        let to = unsafe { to.slice(index * block, block) };
        dispatch(PackRows { x, k: cut.k, column, to });
    });
    packed
}

struct PackRows<'a> {
    x: &'a [f32],
    k: usize,
    column: usize,
    to: &'a mut [f32],
}

impl Op for PackRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let from = Rows { start: self.x[self.column..].as_ptr(), stride: self.k };
        let len = K_BLOCK.min(self.k - self.column);
        // SAFETY: `x` holds `x.len() / k` rows of k values, of which the block takes `len` from `column` on.
        unsafe { Pack { from, rows: self.x.len() / self.k, len, to: self.to }.run(s) };
    }
}

/// Outputs `outs` of rows `rows`, each given as (first, number).
struct PanelTask<'a, W> {
    cut: Cut,
    /// What [`pack_rows`] made.
    x: &'a [f32],
    w: &'a W,
    rows: (usize, usize),
    outs: (usize, usize),
    panel: &'a mut [f32],
    y: *mut f32,
}

impl<W: Weights> Op for PanelTask<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let mut column = 0;
        while column < self.cut.k {
            self.pack_panel(s, column);
            let blocks = (self.cut.k - column).min(self.cut.panel_columns).div_ceil(K_BLOCK);
            for block in 0..blocks {
                if S::LANES == 16 {
                    self.block::<S, TILE_ROWS>(s, column + block * K_BLOCK, block);
                } else {
                    self.block::<S, { TILE_ROWS / 2 }>(s, column + block * K_BLOCK, block);
                }
            }
            column += self.cut.panel_columns;
        }
    }
}

impl<W: Weights> PanelTask<'_, W> {
    /// Widens the panel that starts at `column` into scratch: `[blocks, panel_outs, PACKED_STRIDE]`.
    #[inline(always)]
    fn pack_panel<S: Simd>(&mut self, s: S, column: usize) {
        let Cut { k, panel_columns, panel_outs, .. } = self.cut;
        for out in 0..self.outs.1 {
            let mut first = column;
            while first < k.min(column + panel_columns) {
                let to = &mut self.panel[((first - column) / K_BLOCK * panel_outs + out) * PACKED_STRIDE..];
                self.w.widen(s, self.outs.0 + out, first, K_BLOCK.min(k - first), &mut to[..PACKED_STRIDE]);
                first += K_BLOCK;
            }
        }
    }

    /// Adds one block of K to every output of the task. Rows and outputs past the end are computed from what the
    /// scratch memory holds and thrown away.
    #[inline(always)]
    fn block<S: Simd, const MR: usize>(&self, s: S, column: usize, block: usize) {
        let x = &self.x[column / K_BLOCK * self.cut.padded_rows() * PACKED_STRIDE..];
        let w = &self.panel[block * self.cut.panel_outs * PACKED_STRIDE..];
        let len = K_BLOCK.min(self.cut.k - column).next_multiple_of(S::LANES);
        let mut row = 0;
        while row < self.rows.1 {
            let x = Rows { start: x[(self.rows.0 + row) * PACKED_STRIDE..].as_ptr(), stride: PACKED_STRIDE };
            let mut out = 0;
            while out < self.outs.1 {
                let w = Rows { start: w[out * PACKED_STRIDE..].as_ptr(), stride: PACKED_STRIDE };
                // SAFETY: `x` is padded to whole tiles of rows and the panel to whole tiles of outputs.
                let sums = unsafe { block_sums::<S, f32, MR>(s, x, w, len, None) };
                let rows = (self.rows.0 + row, MR.min(self.rows.1 - row));
                let outs = (self.outs.0 + out, TILE_OUTS.min(self.outs.1 - out));
                // SAFETY: inside `y`, and no other task has this pair of rows and outputs.
                unsafe { store(self.y, self.cut.n, &sums, rows, outs, column == 0) };
                out += TILE_OUTS;
            }
            row += MR;
        }
    }
}

/// Writes the sums of the first block to `y [m, n]`, adds those of the others; rows and outputs are (first, number).
///
/// # Safety
/// Rows and outputs must lie inside `y`, and nobody else may touch them meanwhile.
#[inline(always)]
pub(super) unsafe fn store<const MR: usize>(
    y: *mut f32,
    n: usize,
    sums: &[[f32; TILE_OUTS]; MR],
    rows: (usize, usize),
    outs: (usize, usize),
    first_block: bool,
) {
    for m in 0..rows.1 {
        // SAFETY: passed on to the caller.
        unsafe {
            let y = y.add((rows.0 + m) * n + outs.0);
            for out in 0..outs.1 {
                *y.add(out) = if first_block { sums[m][out] } else { *y.add(out) + sums[m][out] };
            }
        }
    }
}
