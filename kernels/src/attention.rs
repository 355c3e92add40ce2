//! Dense attention for encoders and diffusion transformers.
//!
//! Owns: how query rows are dealt out to tasks. The arithmetic is [`crate::flash`]. A task takes up to
//! [`crate::flash::MAX_ROWS`] query rows of one batch row and one key head (all query heads that share it), reads
//! `q`, `k` and `v` by their strides and never holds more scores than its rows times one tile of keys.

use candle_core::{Result, Tensor, bail};

use crate::flash::{Flash, Keys, MAX_ROWS, QueryRow, scratch_len};
use crate::parallel::{Shared, for_each, with_scratch};
use crate::simd::dispatch;
use crate::view::{View, tensor};

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
/// `[b, lq, heads, d]`. Scores are never materialised as a whole.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions<'_>) -> Result<Tensor> {
    let shape = Shape::new(q, k, v, options)?;
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
    use candle_core::{D, DType};
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{assert_close, bits, random, threads};

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
