//! Softmax attention of some query rows over one head's keys, a tile of keys at a time.
//!
//! Owns: the online softmax that dense and paged attention share. Does not know: tensors, batches, how rows are dealt
//! out. For every tile of [`KEYS`] keys: scores `q kᵀ` into scratch, exponentials against the largest score so far,
//! `o = o · correction + p v`. Tiles start at multiples of [`KEYS`] and every row is computed by itself, so a row has
//! the same bits whichever rows share its tile and whatever comes after the keys that it sees. A row with a score that is
//! NaN or infinite is NaN as in torch, one whose keys are all hidden is zero.
//!
//! Scratch: queries, outputs and scores of the rows, one tile of keys (transposed) and values: under 500 KiB for a
//! head of 128.

use crate::dot::Rows;
use crate::math::exp;
use crate::outer::{Outer, Start};
use crate::row;
use crate::simd::{Element, MAX_LANES, Op, Simd};

/// Keys of a tile.
pub(crate) const KEYS: usize = 128;

/// Most rows that one task takes: enough to hide what it costs to transpose keys.
pub(crate) const MAX_ROWS: usize = 192;

/// A query row: places count in values from the start of their slices.
#[derive(Clone, Copy)]
pub(crate) struct QueryRow {
    /// Where its `d` values lie in `q`.
    pub(crate) q: usize,
    /// Where its result goes in the output.
    pub(crate) out: usize,
    /// It sees keys `0..visible`.
    pub(crate) visible: usize,
    /// Where its biases, one per key, lie.
    pub(crate) bias: usize,
}

/// Keys and values of one head.
#[derive(Clone, Copy)]
pub(crate) struct Keys<'a, T> {
    pub(crate) k: &'a [T],
    pub(crate) v: &'a [T],
    /// Distances between keys, and between values.
    pub(crate) strides: (usize, usize),
    /// Block numbers and keys per block, if keys lie in blocks.
    pub(crate) blocks: Option<(&'a [u32], usize)>,
    /// What `k` and `v` are multiplied with, if they are numbers of 8 bits.
    pub(crate) scales: Option<KeyScales<'a>>,
}

/// One scale for each key and each value.
#[derive(Clone, Copy)]
pub(crate) struct KeyScales<'a> {
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    /// Distance between keys, and between values.
    pub(crate) stride: usize,
}

impl<T> Keys<'_, T> {
    /// Position of a key in rows of `k` and `v`.
    #[inline(always)]
    fn row(&self, key: usize) -> usize {
        match self.blocks {
            Some((table, size)) => table[key / size] as usize * size + key % size,
            None => key,
        }
    }
}

/// Attention of `rows` over `keys`.
pub(crate) struct Flash<'a, T> {
    pub(crate) q: &'a [f32],
    pub(crate) rows: &'a [QueryRow],
    pub(crate) keys: Keys<'a, T>,
    pub(crate) bias: Option<&'a [f32]>,
    /// Values of a head.
    pub(crate) d: usize,
    pub(crate) scale: f32,
    pub(crate) scratch: &'a mut [f32],
    /// Written at each row's `out`; a row that sees no key becomes zero.
    pub(crate) out: *mut f32,
}

/// Values of scratch that [`Flash`] needs.
pub(crate) fn scratch_len(rows: usize, d: usize) -> usize {
    let d = d.next_multiple_of(MAX_LANES);
    rows * (2 * d + KEYS + 2) + 2 * KEYS * d + 8 * d
}

/// The parts of the scratch memory.
struct Parts<'a> {
    /// `[rows, d]`, scaled.
    q: &'a mut [f32],
    /// `[rows, d]`, not yet divided by `sum`.
    o: &'a mut [f32],
    /// `[rows, KEYS]`: scores, then their exponentials.
    p: &'a mut [f32],
    /// `[d, KEYS]`.
    k: &'a mut [f32],
    /// `[KEYS, d]`.
    v: &'a mut [f32],
    /// `[8, d]`: keys on their way to `k`.
    few: &'a mut [f32],
    /// Largest score so far, per row.
    max: &'a mut [f32],
    /// Sum of exponentials so far, per row.
    sum: &'a mut [f32],
    /// Where the rows of `k` and `v` start.
    k_rows: Vec<usize>,
    v_rows: Vec<usize>,
}

impl<'a> Parts<'a> {
    /// For heads of `used` values.
    fn new(scratch: &'a mut [f32], rows: usize, used: usize) -> Self {
        let d = used.next_multiple_of(MAX_LANES);
        let (k, rest) = scratch.split_at_mut(KEYS * d);
        let (v, rest) = rest.split_at_mut(KEYS * d);
        let (few, rest) = rest.split_at_mut(8 * d);
        let (q, rest) = rest.split_at_mut(rows * d);
        let (o, rest) = rest.split_at_mut(rows * d);
        let (p, rest) = rest.split_at_mut(rows * KEYS);
        let (max, rest) = rest.split_at_mut(rows);
        let k_rows = (0..used * KEYS).step_by(KEYS).collect();
        let v_rows = (0..KEYS * d).step_by(d).collect();
        Self { q, o, p, k, v, few, max, sum: &mut rest[..rows], k_rows, v_rows }
    }
}

impl<T: Element> Op for Flash<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let scratch = std::mem::take(&mut self.scratch);
        let mut parts = Parts::new(scratch, self.rows.len(), self.d);
        self.start(s, &mut parts);
        let mut visible = 0;
        for row in self.rows {
            visible = visible.max(row.visible);
        }
        let mut first = 0;
        while first < visible {
            let len = KEYS.min(visible - first);
            self.load_keys(s, &mut parts, (first, len), visible);
            self.scores(s, &mut parts, len);
            for row in 0..self.rows.len() {
                self.softmax(s, &mut parts, row, (first, len));
            }
            self.add_values(s, &mut parts, len);
            first += KEYS;
        }
        self.finish(s, &parts);
    }
}

impl<T: Element> Flash<'_, T> {
    fn padded(&self) -> usize {
        self.d.next_multiple_of(MAX_LANES)
    }

    /// Scaled queries, empty sums.
    #[inline(always)]
    fn start<S: Simd>(&self, _s: S, parts: &mut Parts<'_>) {
        let d = self.padded();
        for (row, spec) in self.rows.iter().enumerate() {
            let from = &self.q[spec.q..spec.q + self.d];
            for i in 0..self.d {
                parts.q[row * d + i] = from[i] * self.scale;
            }
        }
        parts.o.fill(0.0);
        parts.max.fill(f32::NEG_INFINITY);
        parts.sum.fill(0.0);
    }

    /// Asks for the memory of eight keys and values, one tile before they are needed: the heads of a key lie side by
    /// side, so that what one head reads is too scattered for the processor to foresee.
    #[inline(always)]
    fn ask_for_keys<S: Simd>(&self, s: S, first: usize, last: usize) {
        let line = 64 / size_of::<T>();
        let (k_stride, v_stride) = self.keys.strides;
        for key in first..last.min(first + 8) {
            let row = self.keys.row(key);
            let mut i = 0;
            while i < self.d {
                s.prefetch(self.keys.k.as_ptr().wrapping_add(row * k_stride + i));
                s.prefetch(self.keys.v.as_ptr().wrapping_add(row * v_stride + i));
                i += line;
            }
        }
    }

    /// Keys `first..first + len` as columns of `parts.k`, values as rows of `parts.v`; the last key that any row sees
    /// comes before `last`.
    #[inline(always)]
    fn load_keys<S: Simd>(&self, s: S, parts: &mut Parts<'_>, (first, len): (usize, usize), last: usize) {
        let d = self.padded();
        let (k_stride, v_stride) = self.keys.strides;
        let mut key = 0;
        while key < len {
            let count = (len - key).min(8);
            self.ask_for_keys(s, first + key + KEYS, last);
            if count < 8 {
                parts.few.fill(0.0);
            }
            for i in 0..count {
                let row = self.keys.row(first + key + i);
                row::widen(s, &self.keys.k[row * k_stride..][..self.d], &mut parts.few[i * d..(i + 1) * d]);
                row::widen(s, &self.keys.v[row * v_stride..][..self.d], &mut parts.v[(key + i) * d..(key + i + 1) * d]);
                if let Some(KeyScales { k, v, stride }) = self.keys.scales {
                    row::scale(s, &mut parts.few[i * d..(i + 1) * d], k[row * stride]);
                    row::scale(s, &mut parts.v[(key + i) * d..(key + i + 1) * d], v[row * stride]);
                }
            }
            let mut column = 0;
            while column < d {
                let to = &mut parts.k[column * KEYS + key..];
                assert!(to.len() >= 7 * KEYS + 8, "eight rows of eight keys: this is a bug");
                // SAFETY: `few` holds eight rows of d values, `to` eight rows of eight (checked).
                unsafe { s.transpose8(parts.few.as_ptr().add(column), d, to.as_mut_ptr(), KEYS) };
                column += 8;
            }
            key += 8;
        }
        // Columns past the last eight keys, up to a whole vector, are read but masked: any finite value will do.
        let end = len.next_multiple_of(8);
        if !end.is_multiple_of(MAX_LANES) {
            for column in 0..d {
                parts.k[column * KEYS + end..column * KEYS + end + 8].fill(0.0);
            }
        }
    }

    /// `p = q kᵀ`.
    #[inline(always)]
    fn scores<S: Simd>(&self, s: S, parts: &mut Parts<'_>, len: usize) {
        let d = self.padded();
        let product = Outer {
            a: Rows { start: parts.q.as_ptr(), stride: d },
            rows: self.rows.len(),
            b: parts.k.as_ptr(),
            offsets: &parts.k_rows,
            c: parts.p.as_mut_ptr(),
            c_stride: KEYS,
            columns: len,
            start: Start::Zero,
        };
        // SAFETY: `q` is `[rows, d]`, `k` is `[d, KEYS]`, `p` is `[rows, KEYS]`.
        unsafe { product.run(s) };
    }

    /// Scores of a row become exponentials; what it summed before is corrected to the new largest score.
    #[inline(always)]
    fn softmax<S: Simd>(&self, s: S, parts: &mut Parts<'_>, row: usize, (first, len): (usize, usize)) {
        let spec = self.rows[row];
        let columns = len.next_multiple_of(S::LANES);
        let p = &mut parts.p[row * KEYS..row * KEYS + columns];
        let seen = spec.visible.saturating_sub(first).min(len);
        p[seen..].fill(f32::NEG_INFINITY);
        if let Some(bias) = self.bias {
            row::add(s, &mut p[..seen], &bias[spec.bias + first..][..seen]);
        }
        // A maximum may pass NaN over. Where it finds another score, the exponentials are NaN; where it finds none, every
        // score is hidden or NaN.
        let max = parts.max[row].max(row::max(s, p));
        if max == f32::NEG_INFINITY {
            let nothing = if p[..seen].iter().any(|score| score.is_nan()) { f32::NAN } else { 0.0 };
            p.fill(nothing);
            parts.sum[row] += nothing;
            return;
        }
        let correction = s.first(exp(s, s.splat(parts.max[row] - max)));
        parts.max[row] = max;
        parts.sum[row] = parts.sum[row] * correction + row::exp_and_sum(s, p, max);
        if correction != 1.0 {
            let d = self.padded();
            row::scale(s, &mut parts.o[row * d..(row + 1) * d], correction);
        }
    }

    /// `o += p v`.
    #[inline(always)]
    fn add_values<S: Simd>(&self, s: S, parts: &mut Parts<'_>, len: usize) {
        let d = self.padded();
        let product = Outer {
            a: Rows { start: parts.p.as_ptr(), stride: KEYS },
            rows: self.rows.len(),
            b: parts.v.as_ptr(),
            offsets: &parts.v_rows[..len],
            c: parts.o.as_mut_ptr(),
            c_stride: d,
            columns: d,
            start: Start::Found,
        };
        // SAFETY: `p` is `[rows, KEYS]`, `v` is `[KEYS, d]`, `o` is `[rows, d]`, and d is whole vectors.
        unsafe { product.run(s) };
    }

    /// What a row is multiplied with that has no score above minus infinity: zero where all its keys are hidden, by a bias
    /// too, and NaN where keys have got such scores.
    fn factor_of_nothing(&self, row: &QueryRow) -> f32 {
        let is_seen = match self.bias {
            Some(bias) => bias[row.bias..][..row.visible].iter().any(|bias| *bias > f32::NEG_INFINITY),
            None => row.visible > 0,
        };
        if is_seen { f32::NAN } else { 0.0 }
    }

    /// Divides by the sums and writes the rows out.
    #[inline(always)]
    fn finish<S: Simd>(&self, _s: S, parts: &Parts<'_>) {
        let d = self.padded();
        for (row, spec) in self.rows.iter().enumerate() {
            let factor = match parts.sum[row] {
                0.0 => self.factor_of_nothing(spec),
                sum => 1.0 / sum,
            };
            // SAFETY: every row has its own place of d values in the output.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.add(spec.out), self.d) };
            for i in 0..self.d {
                out[i] = parts.o[row * d + i] * factor;
            }
        }
    }
}
