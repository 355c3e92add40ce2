//! Dense attention for encoders and diffusion transformers.
//!
//! Owns: how query rows are dealt out to tasks. The arithmetic is [`crate::flash`]. A task takes up to
//! [`crate::flash::MAX_ROWS`] query rows of one batch row and one key head (all query heads that share it), reads
//! `q`, `k` and `v` by their strides and never holds more scores than its rows times one tile of keys.

use candle_core::{Result, Tensor, bail};

use crate::flash::{Flash, Keys, MAX_ROWS, QueryRow, scratch_len};
#[cfg(gpu)]
use crate::gpu;
use crate::parallel::{Shared, for_each, with_scratch};
use crate::simd::dispatch;
use crate::view::{View, tensor};
use crate::work::{self, Work};

#[cfg(gpu)]
mod chunks;
#[cfg(gpu)]
mod flash_attn;
#[cfg(gpu)]
mod launch;

/// How scores are formed and masked.
#[derive(Debug, Clone, Copy, Default)]
pub struct AttentionOptions<'a> {
    /// Multiplies `q·k`; `None` is `1/sqrt(d)`.
    pub scale: Option<f64>,
    /// Query i sees keys 0..=i only (needs equal lengths).
    pub causal: bool,
    /// Added to the scores: `[heads, lq, lk]`, shared by the batch.
    pub bias: Option<&'a Tensor>,
    /// Keys that count, per batch row; the rest are masked. `None`: all. A batch row with 0 keys becomes zero.
    pub key_lens: Option<&'a [usize]>,
}

/// Softmax attention. `q [b, lq, heads, d]`, `k` and `v` `[b, lk, kv_heads, d]` with `heads` a multiple of `kv_heads`:
/// `[b, lq, heads, d]`. Scores are never materialised as a whole. A row with a score that is NaN or infinite is NaN, and
/// so is one whose scores all come out as minus infinity; one whose keys are all masked, by a bias too, is zero. Kernels take d up to 512.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions<'_>) -> Result<Tensor> {
    let shape = Shape::new(q, k, v, options)?;
    work::add_dense(|| shape.work(options));
    if work::is_dry() {
        return work::zeros((shape.b, shape.lq, shape.heads, shape.d), q);
    }
    #[cfg(gpu)]
    if gpu::runs_here(q) {
        return launch::attention(q, k, v, options, shape);
    }
    let (q, k, v) = (rows_of_heads(q)?, rows_of_heads(k)?, rows_of_heads(v)?);
    let bias = options.bias.map(Tensor::contiguous).transpose()?;
    let bias = bias.as_ref().map(|bias| View::contiguous("attention", bias)).transpose()?;
    let views = (View::strided("attention", &q), View::strided("attention", &k), View::strided("attention", &v));
    let dense = Dense {
        shape,
        q: (views.0.f32()?, Strides::of(&q)),
        k: (views.1.f32()?, Strides::of(&k)),
        v: (views.2.f32()?, Strides::of(&v)),
        bias: bias.as_ref().map(View::f32).transpose()?,
        options,
    };
    tensor(dense.compute(), (shape.b, shape.lq, shape.heads, shape.d))
}

/// Heads must be contiguous inside; everything else may be strided.
fn rows_of_heads(x: &Tensor) -> Result<Tensor> {
    if x.stride()[3] == 1 { Ok(x.clone()) } else { x.contiguous() }
}

/// Distances in values between batch rows, positions and heads.
#[derive(Clone, Copy)]
struct Strides {
    batch: usize,
    position: usize,
    head: usize,
}

impl Strides {
    fn of(x: &Tensor) -> Self {
        let stride = x.stride();
        Self { batch: stride[0], position: stride[1], head: stride[2] }
    }
}

#[derive(Clone, Copy)]
struct Shape {
    b: usize,
    lq: usize,
    lk: usize,
    heads: usize,
    kv_heads: usize,
    d: usize,
}

impl Shape {
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions<'_>) -> Result<Self> {
        let (b, lq, heads, d) = q.dims4()?;
        let (_, lk, kv_heads, _) = k.dims4()?;
        let fits = k.dims() == [b, lk, kv_heads, d] && v.dims() == k.dims() && kv_heads > 0 && heads % kv_heads == 0;
        if !fits || d == 0 {
            bail!("attention: q {:?} does not fit k {:?} and v {:?}", q.shape(), k.shape(), v.shape());
        }
        if options.causal && lq != lk {
            bail!("attention: causal needs equal lengths, got q {:?} and k {:?}", q.shape(), k.shape());
        }
        if let Some(bias) = options.bias
            && bias.dims() != [heads, lq, lk]
        {
            bail!("attention: bias must be [{heads}, {lq}, {lk}], got {:?}", bias.shape());
        }
        if let Some(lens) = options.key_lens
            && (lens.len() != b || lens.iter().any(|len| *len > lk))
        {
            bail!("attention: key_lens must be {b} lengths of at most {lk}, got {lens:?}");
        }
        Ok(Self { b, lq, lk, heads, kv_heads, d })
    }

    /// Every query with the keys that it sees.
    fn work(&self, options: &AttentionOptions<'_>) -> Work {
        let pairs_of_row = |len: usize| match options.causal {
            // Queries past the last key see all of them.
            true => work::causal_pairs(len, 0) + (self.lq - len) * len,
            false => self.lq * len,
        };
        let pairs = (0..self.b).map(|row| pairs_of_row(options.key_lens.map_or(self.lk, |lens| lens[row]))).sum();
        Work { flops: work::attention_flops(pairs, self.heads * self.d), bytes: 0.0 }
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

struct Dense<'a> {
    shape: Shape,
    q: (&'a [f32], Strides),
    k: (&'a [f32], Strides),
    v: (&'a [f32], Strides),
    bias: Option<&'a [f32]>,
    options: &'a AttentionOptions<'a>,
}

impl Dense<'_> {
    fn compute(&self) -> Vec<f32> {
        let Shape { b, lq, lk, heads, kv_heads, d } = self.shape;
        let mut out = vec![0f32; b * lq * heads * d];
        if out.is_empty() {
            return out;
        }
        let rows = lq * self.shape.group();
        let tiles = rows.div_ceil(self.rows_per_task(rows));
        let per_tile = rows.div_ceil(tiles);
        let shared = Shared::new(&mut out);
        for_each(b * kv_heads * tiles, 2 * b * heads * lq * lk * d, |task| {
            let (tile, head) = (task % tiles, task / tiles);
            let rows = tile * per_tile..rows.min((tile + 1) * per_tile);
            self.task(head / kv_heads, head % kv_heads, rows, shared.as_ptr());
        });
        out
    }

    /// Full tiles where they keep every core busy, smaller ones otherwise.
    fn rows_per_task(&self, rows: usize) -> usize {
        let tasks = self.shape.b * self.shape.kv_heads;
        let wanted = (4 * rayon::current_num_threads()).div_ceil(tasks);
        rows.div_ceil(wanted).clamp(32, MAX_ROWS)
    }

    fn task(&self, batch: usize, kv_head: usize, rows: std::ops::Range<usize>, out: *mut f32) {
        let rows: Vec<_> = rows.map(|row| self.row(batch, kv_head, row)).collect();
        let keys = Keys {
            k: &self.k.0[batch * self.k.1.batch + kv_head * self.k.1.head..],
            v: &self.v.0[batch * self.v.1.batch + kv_head * self.v.1.head..],
            strides: (self.k.1.position, self.v.1.position),
            blocks: None,
            scales: None,
        };
        let (d, q, bias) = (self.shape.d, self.q.0, self.bias);
        let scale = self.options.scale.unwrap_or(1.0 / (d as f64).sqrt()) as f32;
        with_scratch(scratch_len(rows.len(), d), |scratch| {
            dispatch(Flash { q, rows: &rows, keys, bias, d, scale, scratch, out });
        });
    }

    /// Row `row` of those that share a key head: position by position, its query heads side by side.
    fn row(&self, batch: usize, kv_head: usize, row: usize) -> QueryRow {
        let Shape { lq, lk, heads, d, .. } = self.shape;
        let group = self.shape.group();
        let (position, head) = (row / group, kv_head * group + row % group);
        let len = self.options.key_lens.map_or(lk, |lens| lens[batch]);
        let strides = self.q.1;
        QueryRow {
            q: batch * strides.batch + position * strides.position + head * strides.head,
            out: ((batch * lq + position) * heads + head) * d,
            visible: if self.options.causal { len.min(position + 1) } else { len },
            bias: (head * lq + position) * lk,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use candle_core::{D, DType, Device};
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{On, assert_close, bits, for_each_device, random, threads, values};

    /// The specification: every score at once.
    pub(crate) fn oracle(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions<'_>) -> Result<Tensor> {
        let (b, lq, heads, d) = q.dims4()?;
        let (_, lk, kv_heads, _) = k.dims4()?;
        let scale = options.scale.unwrap_or(1.0 / (d as f64).sqrt());
        let group = heads / kv_heads;
        let repeat = |x: &Tensor| -> Result<Tensor> {
            let x =
                x.unsqueeze(3)?.broadcast_as((b, lk, kv_heads, group, d))?.contiguous()?.reshape((b, lk, heads, d))?;
            x.transpose(1, 2)?.contiguous()
        };
        let q = q.transpose(1, 2)?.contiguous()?;
        let mut scores = (q.matmul(&repeat(k)?.t()?)? * scale)?;
        if let Some(bias) = options.bias {
            scores = scores.broadcast_add(bias)?;
        }
        let mut mask = vec![0f32; b * lq * lk];
        for (row, cells) in mask.chunks_mut(lq * lk).enumerate() {
            let visible = options.key_lens.map_or(lk, |lens| lens[row]);
            for (i, line) in cells.chunks_mut(lk).enumerate() {
                let last = if options.causal { visible.min(i + 1) } else { visible };
                line[last..].fill(f32::NEG_INFINITY);
            }
        }
        let mask = Tensor::from_vec(mask, (b, 1, lq, lk), q.device())?.to_dtype(DType::F32)?;
        let scores = scores.broadcast_add(&mask)?;
        let max = scores.max_keepdim(D::Minus1)?;
        let weights = scores.broadcast_sub(&max)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        weights.matmul(&repeat(v)?)?.transpose(1, 2)?.contiguous()
    }

    /// Attention of tensors on a device against the oracle's of the same rounded values.
    ///
    /// Kernels for 16 bits round each weight to 16 bits, by half a unit at most. Values are at most 1, so a weighted mean
    /// of them moves by half a unit, and the rounding of the result by another half: within what [`On::assert_close`]
    /// allows for any result. Scores of a standard deviation of 2 and more let single keys decide a row, so that a key
    /// too many or too few shows.
    #[track_caller]
    fn check(on: &On, [q, k, v]: [&Tensor; 3], options: &AttentionOptions<'_>) {
        let (bias32, bias) = (options.bias.map(|bias| on.rounded(bias)), options.bias.map(|bias| on.tensor(bias)));
        let options32 = AttentionOptions { bias: bias32.as_ref(), ..*options };
        let expected = oracle(&on.rounded(q), &on.rounded(k), &on.rounded(v), &options32).unwrap();
        let (q, k, v) = (on.tensor(q), on.tensor(k), on.tensor(v));
        let options = AttentionOptions { bias: bias.as_ref(), ..*options };
        let found = on.run(|| attention(&q, &k, &v, &options));
        on.assert_close(&found, &expected, TERMS);
    }

    /// A case sums up to 512 products and 200 weights. But a score of 100, as the largest of these are, is uncertain by
    /// some 2^-18 itself, and so is its exponential: as if there were more terms.
    const TERMS: usize = 20_000;

    const PEAKED: AttentionOptions<'static> =
        AttentionOptions { scale: Some(0.7), causal: false, bias: None, key_lens: None };

    /// q `[b, lq, 2, d]`, k and v `[b, lk, 2, d]`.
    fn inputs(b: usize, lq: usize, lk: usize, d: usize) -> [Tensor; 3] {
        [random(&[b, lq, 2, d], 1), random(&[b, lk, 2, d], 2), random(&[b, lk, 2, d], 3)]
    }

    /// One query, a tile of queries or keys less one, whole, and one more, two tiles and one, none of these.
    const LENGTHS: [(usize, usize); 8] =
        [(1, 200), (200, 1), (63, 65), (64, 64), (65, 63), (129, 129), (128, 64), (3, 7)];

    for_each_device!(lengths_need_not_be_whole_tiles, |on: &On| {
        for (lq, lk) in LENGTHS {
            for d in [64, 128] {
                let [q, k, v] = inputs(1, lq, lk, d);
                check(on, [&q, &k, &v], &PEAKED);
            }
        }
    });

    // Less than a pack; packs that are no whole tile; the tiles; slices, the last one whole or not.
    for_each_device!(heads_may_have_any_size, |on: &On| {
        for d in [1, 8, 20, 33, 40, 80, 96, 160, 384, 512] {
            let [q, k, v] = inputs(1, 70, 67, d);
            check(on, [&q, &k, &v], &PEAKED);
        }
    });

    for_each_device!(causal_rows_see_nothing_behind_them, |on: &On| {
        for (length, d) in [(1, 64), (65, 128), (129, 40), (200, 64), (70, 160), (66, 20)] {
            let [q, k, v] = inputs(2, length, length, d);
            check(on, [&q, &k, &v], &AttentionOptions { causal: true, ..PEAKED });
            let key_lens = [length.div_ceil(2), length];
            check(on, [&q, &k, &v], &AttentionOptions { causal: true, key_lens: Some(&key_lens), ..PEAKED });
        }
    });

    for_each_device!(biases_are_those_of_their_head_and_pair, |on: &On| {
        for (lq, lk, d) in [(1, 65, 64), (65, 130, 64), (70, 3, 40), (67, 67, 128), (5, 70, 160), (66, 65, 20)] {
            let [q, k, v] = inputs(2, lq, lk, d);
            // As a table of positions gives it: heads last.
            let bias = (random(&[lq, lk, 2], 4) * 3.0).unwrap().permute((2, 0, 1)).unwrap();
            check(on, [&q, &k, &v], &AttentionOptions { bias: Some(&bias), ..PEAKED });
            let key_lens = [lk, lk.div_ceil(2)];
            check(on, [&q, &k, &v], &AttentionOptions { bias: Some(&bias), key_lens: Some(&key_lens), ..PEAKED });
        }
        let [q, k, v] = inputs(1, 65, 65, 64);
        let bias = random(&[2, 65, 65], 5);
        check(on, [&q, &k, &v], &AttentionOptions { bias: Some(&bias), causal: true, ..PEAKED });
    });

    for_each_device!(a_bias_of_minus_infinity_hides_a_key, |on: &On| {
        let (hidden, seen) =
            (Tensor::full(f32::NEG_INFINITY, (2, 20, 70), &Device::Cpu).unwrap(), random(&[2, 20, 9], 6));
        let bias = Tensor::cat(&[&hidden, &seen], 2).unwrap();
        let [q, k, v] = inputs(1, 20, 79, 64);
        check(on, [&q, &k, &v], &AttentionOptions { bias: Some(&bias), ..PEAKED });
    });

    /// Queries, keys and the size of a head: one of each, a tile and some, several tiles of keys; every kernel.
    const SPOILED: [(usize, usize, usize); 5] = [(1, 1, 64), (65, 65, 64), (3, 130, 128), (3, 70, 160), (3, 70, 20)];

    /// `x` with this value in the first column of one position of the first batch row, all heads.
    fn spoil(x: &Tensor, position: usize, value: f32) -> Tensor {
        let (_, positions, heads, d) = x.dims4().unwrap();
        let mut values = values(x);
        (0..heads).for_each(|head| values[(position * heads + head) * d] = value);
        assert!(position < positions);
        Tensor::from_vec(values, x.dims(), &Device::Cpu).unwrap()
    }

    /// Whether each row of a head is NaN; no row is half.
    #[track_caller]
    fn nan_rows(x: &Tensor) -> Vec<bool> {
        let d = x.dim(D::Minus1).unwrap();
        let is_nan = |row: &[f32]| {
            let count = row.iter().filter(|value| value.is_nan()).count();
            assert!(count == 0 || count == d, "{count} of {d} values are NaN");
            assert!(row.iter().all(|value| value.is_nan() || value.is_finite()));
            count == d
        };
        values(x).chunks(d).map(is_nan).collect()
    }

    for_each_device!(a_query_that_is_nan_makes_its_row_nan, |on: &On| {
        for (lq, lk, d) in SPOILED {
            let [q, k, v] = inputs(2, lq, lk, d);
            let position = lq / 2;
            let (q, k, v) = (on.tensor(&spoil(&q, position, f32::NAN)), on.tensor(&k), on.tensor(&v));
            let options = AttentionOptions { causal: lq == lk, ..PEAKED };
            let found = nan_rows(&on.run(|| attention(&q, &k, &v, &options)));
            // Two heads; the second batch row is as ever.
            let expected: Vec<bool> = (0..2 * 2 * lq).map(|row| row / 2 == position).collect();
            assert_eq!(found, expected, "query {position} of {lq} over {lk} keys, d {d}");
        }
    });

    for_each_device!(a_key_that_is_nan_makes_the_rows_nan_that_see_it, |on: &On| {
        for (lq, lk, d) in SPOILED {
            let [q, k, v] = inputs(2, lq, lk, d);
            let (q, v) = (on.tensor(&q), on.tensor(&v));
            let expected: Vec<bool> = (0..2 * 2 * lq).map(|row| row < 2 * lq).collect();
            for key in [0, lk - 1] {
                let k = on.tensor(&spoil(&k, key, f32::NAN));
                let found = nan_rows(&on.run(|| attention(&q, &k, &v, &PEAKED)));
                assert_eq!(found, expected, "key {key} of {lk}, {lq} queries, d {d}");
            }
            // All keys; the second batch row sees none of its own and stays zero.
            let k = on.tensor(&k.affine(0.0, f64::NAN).unwrap());
            let options = AttentionOptions { key_lens: Some(&[lk, 0]), ..PEAKED };
            let found = on.run(|| attention(&q, &k, &v, &options));
            assert_eq!(nan_rows(&found), expected, "all of {lk} keys, {lq} queries, d {d}");
            assert!(values(&found.narrow(0, 1, 1).unwrap()).iter().all(|value| *value == 0.0));
        }
    });

    for_each_device!(infinite_scores_make_a_row_nan_and_a_masked_row_is_zero, |on: &On| {
        for (lq, lk, d) in SPOILED {
            let [q, k, v] = inputs(1, lq, lk, d).map(|x| on.tensor(&x));
            let with_bias = |bias: Tensor| {
                let bias = on.tensor(&bias);
                on.run(|| attention(&q, &k, &v, &AttentionOptions { bias: Some(&bias), ..PEAKED }))
            };
            // The last key for the second head only.
            let mut bias = vec![0f32; 2 * lq * lk];
            (0..lq).for_each(|row| bias[(lq + row) * lk + lk - 1] = f32::INFINITY);
            let found = with_bias(Tensor::from_vec(bias, (2, lq, lk), &Device::Cpu).unwrap());
            let expected: Vec<bool> = (0..2 * lq).map(|row| row % 2 == 1).collect();
            assert_eq!(nan_rows(&found), expected, "{lk} keys, {lq} queries, d {d}");
            let masked = with_bias(Tensor::full(f32::NEG_INFINITY, (2, lq, lk), &Device::Cpu).unwrap());
            assert!(values(&masked).iter().all(|value| *value == 0.0), "{lq} queries, {lk} keys, d {d}");
            // Products that are all below what f32 holds.
            let full = |value: f32, len| on.tensor(&Tensor::full(value, (1, len, 2, d), &Device::Cpu).unwrap());
            let (q, k) = (full(2f32.powi(15), lq), full(-2f32.powi(15), lk));
            let options = AttentionOptions { scale: Some(1e38), ..AttentionOptions::default() };
            let found = on.run(|| attention(&q, &k, &v, &options));
            assert_eq!(nan_rows(&found), vec![true; 2 * lq], "{lq} queries, {lk} keys, d {d}");
        }
    });

    for_each_device!(keys_past_a_row_s_length_do_not_count, |on: &On| {
        for d in [20, 64, 128, 160] {
            for key_lens in [[0, 130], [65, 64], [0, 0], [1, 1]] {
                let [q, k, v] = inputs(2, 67, 130, d);
                let spoil = |x: &Tensor| {
                    let rows: Vec<_> = key_lens
                        .iter()
                        .enumerate()
                        .map(|(row, len)| {
                            let x = x.narrow(0, row, 1)?;
                            let nan = Tensor::full(f32::NAN, (1, 130 - len, 2, d), &Device::Cpu)?;
                            Tensor::cat(&[&x.narrow(1, 0, *len)?, &nan], 1)
                        })
                        .collect::<Result<_>>()
                        .unwrap();
                    on.tensor(&Tensor::cat(&rows, 0).unwrap())
                };
                let options = AttentionOptions { key_lens: Some(&key_lens), ..PEAKED };
                let (spoiled_k, spoiled_v, there) = (spoil(&k), spoil(&v), on.tensor(&q));
                let found = on.run(|| attention(&there, &spoiled_k, &spoiled_v, &options));
                for (row, len) in key_lens.into_iter().enumerate() {
                    let part = |x: &Tensor| x.narrow(0, row, 1).unwrap();
                    let found = part(&found);
                    if len == 0 {
                        assert!(values(&found).iter().all(|value| *value == 0.0), "a row without keys is zero");
                        continue;
                    }
                    let kept = |x: &Tensor| on.rounded(&part(x)).narrow(1, 0, len).unwrap();
                    let expected = oracle(&on.rounded(&part(&q)), &kept(&k), &kept(&v), &PEAKED).unwrap();
                    on.assert_close(&found, &expected, TERMS);
                }
            }
        }
    });

    for_each_device!(query_heads_may_share_keys, |on: &On| {
        for d in [64, 128, 160] {
            let (q, k, v) = (random(&[2, 66, 6, d], 1), random(&[2, 70, 2, d], 2), random(&[2, 70, 2, d], 3));
            check(on, [&q, &k, &v], &PEAKED);
        }
    });

    for_each_device!(inputs_are_read_by_their_strides, |on: &On| {
        for d in [20, 64, 72, 128, 160] {
            // Parts of a fused projection, one of them head by head, one value by value; then all of them one position
            // and one value further, where no 16 bytes begin.
            let qkv = random(&[2, 68, 3, 3, d + 1], 1);
            let there = on.tensor(&qkv);
            let part = |x: &Tensor, i: usize, shift: usize| {
                x.narrow(2, i, 1)
                    .unwrap()
                    .squeeze(2)
                    .unwrap()
                    .narrow(1, shift, 67)
                    .unwrap()
                    .narrow(3, shift, d)
                    .unwrap()
            };
            let turned = |x: Tensor, a: usize, b: usize| {
                x.transpose(a, b).unwrap().contiguous().unwrap().transpose(a, b).unwrap()
            };
            for shift in [0, 1] {
                let (q, k, v) = (part(&there, 0, shift), part(&there, 1, shift), part(&there, 2, shift));
                let (k, v) = (turned(k, 1, 2), turned(v, 1, 3));
                let found = on.run(|| attention(&q, &k, &v, &PEAKED));
                let [q, k, v] = [0, 1, 2].map(|i| on.rounded(&part(&qkv, i, shift)));
                on.assert_close(&found, &oracle(&q, &k, &v, &PEAKED).unwrap(), TERMS);
            }
            let qkv = random(&[2, 68, 3, 3, d], 1);
            let there = on.tensor(&qkv);
            let [q, k, v] =
                [0, 1, 2].map(|i| there.narrow(2, i, 1).unwrap().squeeze(2).unwrap().narrow(1, 1, 67).unwrap());
            let found = on.run(|| attention(&q, &k, &v, &PEAKED));
            let [q, k, v] = [0, 1, 2]
                .map(|i| on.rounded(&qkv).narrow(2, i, 1).unwrap().squeeze(2).unwrap().narrow(1, 1, 67).unwrap());
            on.assert_close(&found, &oracle(&q, &k, &v, &PEAKED).unwrap(), TERMS);
        }
    });

    for_each_device!(any_scale_will_do, |on: &On| {
        for d in [64, 160] {
            let [q, k, v] = inputs(1, 66, 130, d);
            // One key of each row decides at 8, and the reference of a row moves from tile to tile.
            for scale in [None, Some(0.0), Some(-0.7), Some(8.0)] {
                check(on, [&q, &k, &v], &AttentionOptions { scale, ..AttentionOptions::default() });
            }
            let ramp: Vec<f32> = (0..130).map(|key| key as f32 / 65.0 - 1.0).collect();
            let ramp = Tensor::from_vec(ramp, (1, 130, 1, 1), &Device::Cpu).unwrap();
            let rising = k.zeros_like().unwrap().broadcast_add(&ramp).unwrap();
            check(on, [&q.abs().unwrap(), &rising, &v], &PEAKED);
            check(on, [&q.abs().unwrap(), &rising.neg().unwrap(), &v], &PEAKED);
        }
    });

    for_each_device!(a_row_has_the_same_bits_in_any_batch, |on: &On| {
        for d in [20, 64, 128, 160] {
            let [q, k, v] = inputs(2, 130, 70, d).map(|x| on.tensor(&x));
            let whole = on.run(|| attention(&q, &k, &v, &PEAKED));
            for (start, len) in [(0, 1), (129, 1), (65, 40)] {
                let part = |x: &Tensor| x.narrow(0, 1, 1).unwrap();
                let rows = |x: &Tensor| part(x).narrow(1, start, len).unwrap();
                let alone = on.run(|| attention(&rows(&q), &part(&k), &part(&v), &PEAKED));
                assert_eq!(bits(&rows(&whole)), bits(&alone), "{len} rows from {start}, d {d}");
            }
        }
    });

    #[cfg(feature = "emulator")]
    #[test]
    fn kernels_refuse_what_they_cannot_compute() {
        let (x, wide) = (random(&[1, 2, 1, 16], 1), random(&[1, 2, 1, 520], 1));
        let run = |q: &Tensor, k: &Tensor| {
            crate::emulated(|| attention(q, k, k, &AttentionOptions::default())).unwrap_err().to_string()
        };
        assert!(run(&wide, &wide).contains("attention: heads of 520 values"), "{}", run(&wide, &wide));
        let half = x.to_dtype(DType::F16).unwrap();
        assert!(run(&x, &half).contains("F32, F16 and F16"), "{}", run(&x, &half));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn equals_softmax_of_all_scores(
            b in 1usize..3, lq in 1usize..70, lk in 1usize..300, kv_heads in 1usize..3, group in 1usize..4,
            d in prop_oneof![Just(8usize), Just(24), Just(64), Just(1), Just(40), Just(128)],
            causal: bool, biased: bool, masked: bool,
        ) {
            let lk = if causal { lq } else { lk };
            let heads = kv_heads * group;
            let (q, k, v) = (random(&[b, lq, heads, d], 1), random(&[b, lk, kv_heads, d], 2), random(&[b, lk, kv_heads, d], 3));
            let bias = random(&[heads, lq, lk], 4);
            let lens: Vec<_> = (0..b).map(|row| 1 + (lk * 7 / 10 + row * 13) % lk).collect();
            let options = AttentionOptions {
                scale: (b == 1).then_some(0.7),
                causal,
                bias: biased.then_some(&bias),
                key_lens: masked.then_some(&lens[..]),
            };
            assert_close(&attention(&q, &k, &v, &options).unwrap(), &oracle(&q, &k, &v, &options).unwrap(), 1e-5);
        }
    }

    #[test]
    fn parts_of_a_fused_projection_are_read_where_they_lie() {
        let qkv = random(&[2, 150, 3, 4, 32], 1);
        let part = |i| qkv.narrow(2, i, 1).unwrap().squeeze(2).unwrap();
        let (q, k, v) =
            (part(0), part(1), part(2).transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap());
        let options = AttentionOptions::default();
        assert_close(&attention(&q, &k, &v, &options).unwrap(), &oracle(&q, &k, &v, &options).unwrap(), 1e-5);
        let turned = q.transpose(2, 3).unwrap().contiguous().unwrap().transpose(2, 3).unwrap();
        assert_eq!(
            bits(&attention(&turned, &k, &v, &options).unwrap()),
            bits(&attention(&q, &k, &v, &options).unwrap())
        );
    }

    #[test]
    fn a_batch_row_without_keys_is_zero_and_leaves_the_others_alone() {
        let (q, k, v) = (random(&[2, 5, 2, 16], 1), random(&[2, 9, 2, 16], 2), random(&[2, 9, 2, 16], 3));
        let y = attention(&q, &k, &v, &AttentionOptions { key_lens: Some(&[0, 9]), ..Default::default() }).unwrap();
        assert!(y.get(0).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|value| *value == 0.0));
        let alone = attention(
            &q.narrow(0, 1, 1).unwrap(),
            &k.narrow(0, 1, 1).unwrap(),
            &v.narrow(0, 1, 1).unwrap(),
            &AttentionOptions::default(),
        );
        assert_eq!(bits(&y.narrow(0, 1, 1).unwrap()), bits(&alone.unwrap()));
    }

    #[test]
    fn what_masked_keys_hold_does_not_matter() {
        let (q, k, v) = (random(&[1, 5, 2, 16], 1), random(&[1, 40, 2, 16], 2), random(&[1, 40, 2, 16], 3));
        let nan = Tensor::full(f32::NAN, (1, 10, 2, 16), q.device()).unwrap();
        let spoil = |x: &Tensor| Tensor::cat(&[&x.narrow(1, 0, 30).unwrap(), &nan], 1).unwrap();
        let options = AttentionOptions { key_lens: Some(&[30]), ..Default::default() };
        let y = attention(&q, &spoil(&k), &spoil(&v), &options).unwrap();
        assert_eq!(bits(&y), bits(&attention(&q, &k, &v, &options).unwrap()));
    }

    #[test]
    fn a_row_has_the_same_bits_whatever_comes_with_it() {
        let (q, k, v) = (random(&[1, 500, 4, 64], 1), random(&[1, 333, 2, 64], 2), random(&[1, 333, 2, 64], 3));
        let options = AttentionOptions::default();
        let whole = threads(2, || attention(&q, &k, &v, &options).unwrap());
        for (start, len) in [(0, 1), (131, 1), (200, 17), (100, 300)] {
            let part = threads(1, || attention(&q.narrow(1, start, len).unwrap(), &k, &v, &options).unwrap());
            assert_eq!(bits(&whole.narrow(1, start, len).unwrap()), bits(&part), "{len} rows from {start}");
        }
    }

    #[test]
    fn misfits_name_the_operation_and_the_shapes() {
        let (q, k) = (random(&[1, 5, 3, 16], 1), random(&[1, 9, 2, 16], 2));
        let error = attention(&q, &k, &k, &AttentionOptions::default()).unwrap_err().to_string();
        assert!(
            error.contains("attention") && error.contains("[1, 5, 3, 16]") && error.contains("[1, 9, 2, 16]"),
            "{error}"
        );
    }
}
