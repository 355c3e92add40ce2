//! What operations do, counted as they are called; and dry runs, which call them without computing.
//!
//! Operations count themselves where they have checked their shapes, on the thread that calls them and before they choose
//! between CPU and GPU. Counted are the multiplications and additions of matrix products, convolutions and attention:
//! norms, activations and rotations are left out, being some per cent at most. Counted bytes are those of weights and
//! biases at each product and convolution, and of the keys and values that paged attention looks at; activations are left
//! out, since a good kernel keeps most of them from memory, and so are norms' weights and looked-up rows of tables, which
//! are too few to matter.
//!
//! Owns: the counter of each thread, the formulas. Does not know: models, or how much of the work a caller needed.

use std::cell::Cell;
use std::iter::Sum;
use std::ops::Add;

use candle_core::{Result, Shape, Tensor};

/// Work of any number of operations.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Work {
    /// Multiplications and additions, each counted.
    pub flops: f64,
    /// Bytes read from the device's memory.
    pub bytes: f64,
}

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { flops: self.flops + other.flops, bytes: self.bytes + other.bytes }
    }
}

impl Sum for Work {
    fn sum<I: Iterator<Item = Self>>(works: I) -> Self {
        works.fold(Self::default(), Add::add)
    }
}

/// What was counted in one scope.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Counted {
    /// Products, convolutions and dense attention, and the weights that they read. Follows from the shapes of tensors.
    pub dense: Work,
    /// Paged attention, and the keys and values that it reads. Follows from the contexts of sequences.
    pub paged: Work,
}

impl Counted {
    /// All of it.
    pub fn total(&self) -> Work {
        self.dense + self.paged
    }
}

impl Add for Counted {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { dense: self.dense + other.dense, paged: self.paged + other.paged }
    }
}

thread_local! {
    /// `None` while nobody counts.
    static COUNTER: Cell<Option<Counted>> = const { Cell::new(None) };
    static IS_DRY: Cell<bool> = const { Cell::new(false) };
}

/// Gives a thread's cell its former value back, also after a panic.
struct Restore<T: Copy + 'static>(&'static std::thread::LocalKey<Cell<T>>, T);

impl<T: Copy + 'static> Drop for Restore<T> {
    fn drop(&mut self) {
        self.0.set(self.1);
    }
}

/// Runs `body` and says what the operations do that this thread calls within. A scope within another one keeps what it
/// counts to itself; [`add`] passes it on.
pub fn count<T>(body: impl FnOnce() -> T) -> (T, Counted) {
    let _restore = Restore(&COUNTER, COUNTER.replace(Some(Counted::default())));
    let value = body();
    (value, COUNTER.get().expect("inner scopes restore what they found: this is a bug"))
}

/// Adds to what this thread counts; nothing if nobody does.
pub fn add(counted: Counted) {
    if let Some(before) = COUNTER.get() {
        COUNTER.set(Some(before + counted));
    }
}

/// Runs `body` with every operation that this thread calls on tensors in host memory dry: it checks its shapes, counts
/// itself, and gives zeros that take no memory until somebody writes to them. Weights may be tensors of one value that is
/// broadcast. Operations of candle compute as ever.
pub fn dry<T>(body: impl FnOnce() -> T) -> T {
    let _restore = Restore(&IS_DRY, IS_DRY.replace(true));
    body()
}

/// Whether operations of this thread are dry.
pub(crate) fn is_dry() -> bool {
    IS_DRY.get()
}

/// The result of a dry operation on `x`.
pub(crate) fn zeros(shape: impl Into<Shape>, x: &Tensor) -> Result<Tensor> {
    Tensor::zeros(shape, x.dtype(), x.device())
}

/// Counts what `work` says, which is not asked while nobody counts.
pub(crate) fn add_dense(work: impl FnOnce() -> Work) {
    if COUNTER.get().is_some() {
        add(Counted { dense: work(), ..Counted::default() });
    }
}

/// As [`add_dense`], of paged attention.
pub(crate) fn add_paged(work: impl FnOnce() -> Work) {
    if COUNTER.get().is_some() {
        add(Counted { paged: work(), ..Counted::default() });
    }
}

/// Of `rows` vectors times a matrix of so many elements.
pub(crate) fn product_flops(rows: usize, elements: usize) -> f64 {
    2.0 * rows as f64 * elements as f64
}

/// Of `pairs` of a query and a key that it looks at, over all heads together `width` wide: the score and the sum.
pub(crate) fn attention_flops(pairs: usize, width: usize) -> f64 {
    4.0 * pairs as f64 * width as f64
}

/// Pairs of the last `queries` of a sequence and the keys that each of them sees: its own and all `before`.
pub(crate) fn causal_pairs(queries: usize, before: usize) -> usize {
    queries * before + queries * (queries + 1) / 2
}

/// Of a matrix or kernel and its bias.
pub(crate) fn weight_bytes(weight: &Tensor, bias: Option<&Tensor>) -> usize {
    let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
    bytes(weight) + bias.map_or(0, bytes)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::testing::{On, for_each_device, random};
    use crate::{
        AttentionOptions, CausalOptions, CausalPadding, ConvOptions, PagedBatch, PagedCache, QuantisedMatrix,
        Recording, attention, can_record, causal_conv3d, conv2d, conv3d, copy_into, embedding, linear,
        linear_quantised, paged_attention, rms_norm, silu, write_kv,
    };

    /// Runs `operation` wet and dry, holds both counts against the expected one and gives the results' common shape.
    #[track_caller]
    fn check(on: &On, flops: usize, bytes: usize, operation: impl Fn() -> Result<Tensor>) {
        let (wet, counted) = count(|| on.run(&operation));
        let expected = Work { flops: flops as f64, bytes: bytes as f64 };
        assert_eq!(counted.total(), expected);
        if !on.is_host() {
            return;
        }
        let (dry, counted) = count(|| dry(&operation).expect("is counted"));
        assert_eq!((counted.total(), dry.dims(), dry.dtype()), (expected, wet.dims(), wet.dtype()));
        assert!(dry.is_contiguous());
    }

    for_each_device!(a_product_counts_its_matrix_for_every_row, |on: &On| {
        let (x, weight) = (on.tensor(&random(&[2, 3, 40], 1)), on.tensor(&random(&[8, 40], 2)));
        let (bias, size) = (on.tensor(&random(&[8], 3)), on.dtype.size_in_bytes());
        check(on, 6 * 2 * 8 * 40, 8 * 40 * size, || linear(&x, &weight, None));
        check(on, 6 * 2 * 8 * 40, (8 * 40 + 8) * size, || linear(&x, &weight, Some(&bias)));
    });

    // Each result is `taps` products of every channel, in the padding too.
    for_each_device!(a_convolution_counts_its_kernel_for_every_result, |on: &On| {
        let size = on.dtype.size_in_bytes();
        let (x, weight) = (on.tensor(&random(&[2, 3, 9, 8], 1)), on.tensor(&random(&[5, 3, 3, 3], 2)));
        let bias = on.tensor(&random(&[5], 3));
        let halved = ConvOptions { stride: 2, ..ConvOptions::padded(1) };
        let bytes = (5 * 3 * 9 + 5) * size;
        check(on, 2 * (2 * 5 * 5 * 4) * (3 * 9), bytes, || conv2d(&x, &weight, Some(&bias), halved));
        let doubled = ConvOptions { upsample: 2, ..ConvOptions::padded(1) };
        check(on, 2 * (2 * 5 * 18 * 16) * (3 * 9), 5 * 3 * 9 * size, || conv2d(&x, &weight, None, doubled));

        let (clip, weight) = (on.tensor(&random(&[1, 4, 5, 6, 7], 1)), on.tensor(&random(&[6, 4, 3, 3, 3], 2)));
        let past = on.tensor(&random(&[1, 4, 2, 6, 7], 3));
        let bytes = 6 * 4 * 27 * size;
        check(on, 2 * (6 * 3 * 4 * 5) * (4 * 27), bytes, || conv3d(&clip, &weight, None, ConvOptions::default()));
        let options = CausalOptions::new(CausalPadding::Zeros);
        for past in [None, Some(&past)] {
            check(on, 2 * (6 * 5 * 6 * 7) * (4 * 27), bytes, || causal_conv3d(&clip, past, &weight, None, options));
        }
        let options = CausalOptions { stride: [2, 2], ..options };
        check(on, 2 * (6 * 3 * 3 * 4) * (4 * 27), bytes, || causal_conv3d(&clip, None, &weight, None, options));
    });

    for_each_device!(attention_counts_the_keys_that_each_query_sees, |on: &On| {
        let [b, lq, lk, heads, kv_heads, d] = [2, 7, 9, 6, 2, 16];
        let q = on.tensor(&random(&[b, lq, heads, d], 1));
        let k = on.tensor(&random(&[b, lk, kv_heads, d], 2));
        // A product for the score and one for the sum, over all query heads, though they share keys.
        let flops = |pairs: usize| pairs * heads * d * 2 * 2;
        check(on, flops(b * lq * lk), 0, || attention(&q, &k, &k, &AttentionOptions::default()));
        let options = AttentionOptions { key_lens: Some(&[4, 0]), ..Default::default() };
        check(on, flops(lq * 4), 0, || attention(&q, &k, &k, &options));
        let k = k.narrow(1, 0, lq).expect("a part");
        for key_lens in [None, Some(&[7, 3][..])] {
            let options = AttentionOptions { causal: true, key_lens, ..Default::default() };
            let lens = key_lens.unwrap_or(&[7, 7]);
            // Of all queries of a row, and keys up to theirs that its length allows.
            let seen = |len: usize| (0..lq).map(|query| len.min(query + 1)).sum::<usize>();
            check(on, flops(lens.iter().map(|len| seen(*len)).sum()), 0, || attention(&q, &k, &k, &options));
        }
    });

    // A sequence that decodes, and a chunk of a prompt.
    for_each_device!(paged_attention_counts_contexts, |on: &On| {
        let [heads, kv_heads, d, block_size] = [4, 2, 16, 8];
        let cache = || on.tensor(&random(&[6, block_size, kv_heads, d], 1));
        let cache = PagedCache::new(cache(), cache());
        let batch = PagedBatch {
            cu_seqlens_q: vec![0, 1, 4],
            context_lens: vec![11, 5],
            block_tables: vec![vec![2, 0], vec![5]],
            slot_mapping: vec![2, 42, 43, 44],
        };
        let (q, k) = (on.tensor(&random(&[4, heads, d], 2)), on.tensor(&random(&[4, kv_heads, d], 3)));
        let pairs = 11 + (3 + 4 + 5);
        let bytes = (11 + 5) * 2 * kv_heads * d * on.dtype.size_in_bytes();
        check(on, pairs * heads * d * 4, bytes, || {
            let batch = batch.prepare(heads, &cache)?;
            write_kv(&k, &k, &cache, &batch)?;
            paged_attention(&q, &cache, &batch, 0.25)
        });
        let batch = on.run(|| batch.prepare(heads, &cache));
        let (_, counted) = count(|| on.run(|| paged_attention(&q, &cache, &batch, 0.25)));
        assert_eq!((counted.dense, counted.paged.bytes), (Work::default(), bytes as f64));
    });

    for_each_device!(a_recording_counts_at_every_replay, |on: &On| {
        let (x, weight) = (on.tensor(&random(&[3, 40], 1)), on.tensor(&random(&[8, 40], 2)));
        let step = || linear(&x, &weight, None);
        on.run(|| {
            let (out, once) = count(step);
            let out = out?;
            if !can_record(&x) {
                return Ok(());
            }
            let (recording, counted) = count(|| Recording::of(&x, || copy_into(&step()?, &out)));
            assert_eq!(counted, Counted::default(), "nothing has run");
            let recording = recording?;
            let (replayed, twice) = count(|| recording.replay().and_then(|()| recording.replay()));
            replayed?;
            assert_eq!(twice, once + once);
            Ok(())
        });
    });

    #[test]
    fn a_quantised_matrix_counts_its_blocks() {
        let dtype = candle_core::quantized::GgmlDType::Q8_0;
        let matrix = QuantisedMatrix::new(&[0; 4 * 2 * 34], dtype, (4, 64), &Device::Cpu).expect("eight blocks");
        let x = random(&[3, 64], 1);
        crate::testing::on_cpu(|on| check(on, 3 * 2 * 4 * 64, 4 * 2 * 34, || linear_quantised(&x, &matrix, None)));
    }

    #[test]
    fn other_operations_do_not_count_and_have_their_shapes_when_dry() {
        let (x, ids) = (random(&[3, 8], 1), Tensor::new(&[1u32, 0, 1, 1], &Device::Cpu).expect("ids"));
        crate::testing::on_cpu(|on| {
            check(on, 0, 0, || silu(&x));
            check(on, 0, 0, || rms_norm(&x, &x.get(0)?, 1e-6));
            check(on, 0, 0, || embedding(&ids, &x));
        });
    }

    #[test]
    fn scopes_keep_to_themselves_and_end_with_a_panic() {
        let (x, weight) = (random(&[1, 4], 1), random(&[1, 4], 2));
        let product = || linear(&x, &weight, None).expect("fits");
        let ((inner, _), outer) = count(|| {
            product();
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| count(|| panic!("in a scope"))));
            assert!(caught.is_err());
            let (_, inner) = count(product);
            (inner, product())
        });
        assert_eq!((inner.dense.flops, outer.dense.flops), (8.0, 16.0));
        product();
        assert_eq!(count(|| add(inner)).1, inner);
        assert_eq!(count(|| ()).1, Counted::default());
    }

    /// A matrix of 64 GiB that is one value.
    #[test]
    fn dry_weights_take_no_memory() {
        let weight =
            Tensor::zeros((), DType::BF16, &Device::Cpu).and_then(|zero| zero.broadcast_as((1 << 17, 1 << 18)));
        let weight = weight.expect("one value");
        let x = Tensor::zeros((2, 1 << 18), DType::F32, &Device::Cpu).expect("zeros");
        let (y, counted) = count(|| dry(|| linear(&x, &weight, None)));
        assert_eq!(y.expect("is counted").dims(), [2, 1 << 17]);
        assert_eq!(counted.dense, Work { flops: 2f64.powi(37), bytes: 2f64.powi(36) });
    }
}
