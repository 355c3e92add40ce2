//! Products of many rows: panels of weights, widened into memory that the cache holds, under tiles of six rows by four outputs.
//!
//! Owns: how such a product is cut into tasks and panels. Does not know: how weights are kept ([`Weights`]).

use crate::dot::{K_BLOCK, PACKED_STRIDE, Pack, Rows, TILE_OUTS, TILE_ROWS, block_sums};
use crate::parallel::{Shared, for_each, tasks_for, with_scratch};
use crate::simd::{Op, Simd, dispatch};

/// Rows of weights in any form that can be widened to f32.
pub(super) trait Weights: Sync {
    /// Columns `first..first + len` of a row, then zeros up to the next whole vector. `first` is a multiple of [`K_BLOCK`], and
    /// products of many rows ask for at most that many columns; [`Dense`](super::Dense) takes no more, blocks and tiles a whole row.
    fn widen<S: Simd>(&self, s: S, row: usize, first: usize, len: usize, to: &mut [f32]);
}

/// Up to this many rows, widening is a good part of the work, and what was widened has to be there when it is added.
const FEW_ROWS: usize = 64;

/// Outputs of a wide panel.
const PANEL_OUTS: usize = 64;

/// How a product of many rows is cut into tasks and panels.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    /// Rows of `x` and `w`, and their length.
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    /// Outputs of a task, one panel after the other.
    task_outs: usize,
    /// Outputs of a panel.
    panel_outs: usize,
    /// Rows of `x` that one task takes, a multiple of [`TILE_ROWS`].
    task_rows: usize,
}

impl Cut {
    /// Few rows: a panel is one tile of outputs, which stays in the nearest cache from being widened until it has been added.
    /// Many rows: wide panels, which are used often enough to hide how they are read.
    pub(super) fn new((m, n, k): (usize, usize, usize)) -> Self {
        let task_rows = m.next_multiple_of(TILE_ROWS).min(192);
        let (task_outs, panel_outs) = if m <= FEW_ROWS {
            (n.div_ceil(tasks_for(n * k)).next_multiple_of(TILE_OUTS), TILE_OUTS)
        } else {
            (PANEL_OUTS, PANEL_OUTS)
        };
        Self { m, n, k, task_outs, panel_outs, task_rows }
    }

    fn k_blocks(&self) -> usize {
        self.k.div_ceil(K_BLOCK)
    }

    pub(super) fn padded_rows(&self) -> usize {
        self.m.next_multiple_of(TILE_ROWS)
    }

    fn panel_values(&self) -> usize {
        self.panel_outs * PACKED_STRIDE
    }
}

/// `y [m, n] = x [m, k] · wᵀ` by panels.
pub(super) fn many_rows<W: Weights>(x: &[f32], w: &W, dims: (usize, usize, usize), y: &mut [f32]) {
    let cut = Cut::new(dims);
    let packed = pack_rows(x, &cut);
    let Cut { m, n, k, .. } = cut;
    let (out_tasks, row_tasks) = (n.div_ceil(cut.task_outs), m.div_ceil(cut.task_rows));
    let y = Shared::new(y);
    for_each(out_tasks * row_tasks, m * n * k, |task| {
        let (out_task, row_task) = (task / row_tasks, task % row_tasks);
        with_scratch(cut.panel_values(), |scratch| {
            let first_row = row_task * cut.task_rows;
            dispatch(PanelTask {
                cut,
                x: &packed,
                w,
                rows: (first_row, cut.task_rows.min(m - first_row)),
                outs: (out_task * cut.task_outs, cut.task_outs.min(n - out_task * cut.task_outs)),
                panel: scratch,
                y: y.as_ptr(),
            });
        });
    });
}

/// What [`pack_rows`] makes: f32 from the start of a cache line on, so that no vector lies in two.
pub(super) struct Packed(Vec<Line>);

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

impl std::ops::Deref for Packed {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: lines are f32 without anything between them.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), 16 * self.0.len()) }
    }
}

impl std::ops::DerefMut for Packed {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), 16 * self.0.len()) }
    }
}

/// `x [m, k]` as `[k_blocks, padded_rows, PACKED_STRIDE]`; rows past `m` are zero.
pub(super) fn pack_rows(x: &[f32], cut: &Cut) -> Packed {
    let block = cut.padded_rows() * PACKED_STRIDE;
    let mut packed = Packed(vec![Line([0.0; 16]); (cut.k_blocks() * block).div_ceil(16)]);
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
        let mut first = 0;
        while first < self.outs.1 {
            let outs = (self.outs.0 + first, self.cut.panel_outs.min(self.outs.1 - first));
            let mut column = 0;
            while column < self.cut.k {
                self.widen(s, outs, column);
                if S::LANES == 16 && self.rows.1 > TILE_ROWS / 2 {
                    self.add::<S, TILE_ROWS>(s, outs, column);
                } else {
                    self.add::<S, { TILE_ROWS / 2 }>(s, outs, column);
                }
                column += K_BLOCK;
            }
            first += self.cut.panel_outs;
        }
    }
}

impl<W: Weights> PanelTask<'_, W> {
    /// The panel that starts at `column`: `[panel_outs, PACKED_STRIDE]`.
    #[inline(always)]
    fn widen<S: Simd>(&mut self, s: S, outs: (usize, usize), column: usize) {
        let len = K_BLOCK.min(self.cut.k - column);
        for (out, to) in self.panel.chunks_exact_mut(PACKED_STRIDE).take(outs.1).enumerate() {
            self.w.widen(s, outs.0 + out, column, len, to);
        }
    }

    /// Adds the panel's block of K to its outputs of all rows. Rows and outputs past the end are computed from what the
    /// memory holds and thrown away.
    #[inline(always)]
    fn add<S: Simd, const MR: usize>(&self, s: S, outs: (usize, usize), column: usize) {
        let x = &self.x[column / K_BLOCK * self.cut.padded_rows() * PACKED_STRIDE..];
        let len = K_BLOCK.min(self.cut.k - column).next_multiple_of(S::LANES);
        let mut row = 0;
        while row < self.rows.1 {
            let x = Rows { start: x[(self.rows.0 + row) * PACKED_STRIDE..].as_ptr(), stride: PACKED_STRIDE };
            let mut out = 0;
            while out < outs.1 {
                let w = Rows { start: self.panel[out * PACKED_STRIDE..].as_ptr(), stride: PACKED_STRIDE };
                // SAFETY: `x` is padded to whole tiles of rows and the panel to whole tiles of outputs.
                let sums = unsafe { block_sums::<S, f32, MR>(s, x, w, len, None) };
                let rows = (self.rows.0 + row, MR.min(self.rows.1 - row));
                let outs = (outs.0 + out, TILE_OUTS.min(outs.1 - out));
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
