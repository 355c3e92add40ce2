//! Attention over a paged KV cache: sequences of any length, decode and prefill chunks in one call.
//!
//! Owns: writing into blocks, reading them through block tables, how rows are dealt out. The arithmetic on the CPU is
//! [`crate::flash`]. Keys are read where they lie; a task takes one key head of one sequence with all query heads that
//! share it, so every block is read once per tile of rows. On the CPU a row has the same bits in a decode step, in a
//! chunk of any length and in any batch; on a GPU the keys of a decode row are summed in as many shares as fill the
//! device, which depends on the batch.

use std::borrow::Cow;

use candle_core::{Result, Tensor, bail};

pub use self::cache::{ByteFormat, PagedCache};
use crate::e4m3::E4m3;
use crate::flash::{Flash, KeyScales, Keys, MAX_ROWS, QueryRow, scratch_len};
#[cfg(gpu)]
use crate::gpu;
use crate::parallel::{Shared, for_each, with_scratch};
use crate::simd::{Element, dispatch};
use crate::view::{Values, View, tensor};
use crate::work::{self, Work};

mod cache;
#[cfg(gpu)]
mod launch;
#[cfg(gpu)]
mod plan;

/// The rows of one step: to which sequence each belongs, where that sequence's keys lie, and where its own go.
#[derive(Debug, Clone)]
pub struct PagedBatch {
    /// Start of each sequence's rows in `q`, and the total: `sequences + 1` entries.
    pub cu_seqlens_q: Vec<usize>,
    /// Keys of each sequence, the new ones included. Query row i of a sequence with n rows sees keys up to
    /// `context_len - n + i`.
    pub context_lens: Vec<usize>,
    /// Blocks of each sequence, in order.
    pub block_tables: Vec<Vec<u32>>,
    /// Where each row's key and value go: `block * block_size + offset`.
    pub slot_mapping: Vec<u32>,
}

/// No rows of no sequence.
impl Default for PagedBatch {
    fn default() -> Self {
        Self { cu_seqlens_q: vec![0], context_lens: vec![], block_tables: vec![], slot_mapping: vec![] }
    }
}

impl PagedBatch {
    /// Checks the batch against caches shaped as `cache` and queries of `heads` heads, and takes it to the device of the cache:
    /// once for all layers of a step.
    pub fn prepare(&self, heads: usize, cache: &PagedCache) -> Result<PreparedBatch<'_>> {
        let (num_blocks, block_size, kv_heads, d) = cache.k.dims4()?;
        let sizes = [heads, kv_heads, d, block_size];
        if sizes.contains(&0) || !heads.is_multiple_of(kv_heads) {
            bail!("paged_attention: {heads} query heads do not fit a cache of shape {:?}", cache.k.shape());
        }
        let shape = Shape { len: self.slot_mapping.len(), heads, kv_heads, d, num_blocks, block_size };
        shape.check(self)?;
        #[cfg(gpu)]
        let device = if gpu::runs_here(&cache.k) { Some(launch::DeviceBatch::new(self, shape, cache)?) } else { None };
        Ok(PreparedBatch {
            batch: Cow::Borrowed(self),
            shape,
            #[cfg(gpu)]
            device,
        })
    }
}

/// A [`PagedBatch`] that was found right, on its device.
#[derive(Debug)]
pub struct PreparedBatch<'a> {
    batch: Cow<'a, PagedBatch>,
    shape: Shape,
    #[cfg(gpu)]
    device: Option<launch::DeviceBatch>,
}

impl PreparedBatch<'_> {
    /// The same, on its own: for a recording that outlasts its first step.
    pub fn into_owned(self) -> PreparedBatch<'static> {
        PreparedBatch {
            batch: Cow::Owned(self.batch.into_owned()),
            shape: self.shape,
            #[cfg(gpu)]
            device: self.device,
        }
    }

    /// Whether operations launch the very same kernels for both batches, so that a recording made with one serves the
    /// other once its arrays are there ([`PreparedBatch::refill`]). Never on the CPU.
    pub fn launches_as(&self, other: &PreparedBatch<'_>) -> bool {
        #[cfg(gpu)]
        if let (Some(ours), Some(theirs)) = (&self.device, &other.device) {
            return ours.launches_as(theirs);
        }
        let _ = other;
        false
    }

    /// Writes the arrays of another batch into the memory of this one's; [`PreparedBatch::launches_as`] holds.
    pub fn refill(&self, with: &PreparedBatch<'_>) -> Result<()> {
        #[cfg(gpu)]
        if let (Some(ours), Some(theirs)) = (&self.device, &with.device) {
            return ours.refill(theirs);
        }
        bail!("paged_attention: a batch of {} rows is not recorded", with.shape.len)
    }

    /// Refuses caches of another shape or device than the batch was prepared for.
    fn check_cache(&self, op: &str, rows: &Tensor, cache: &PagedCache) -> Result<()> {
        for (cache, expected) in cache.parts(self.shape.cache()) {
            // Dry ones hold nothing.
            let is_readable = cache.is_contiguous() || work::is_dry();
            if cache.dims() != expected || !is_readable {
                let cache = cache.layout();
                bail!("{op}: a cache must be contiguous with the shape {expected:?} of the batch, got {cache:?}");
            }
            if !cache.device().same_device(rows.device()) {
                bail!("{op}: rows on {:?}, a cache on {:?}", rows.device(), cache.device());
            }
        }
        Ok(())
    }
}

/// Writes `k` and `v` `[l, kv_heads, d]` into a cache in place, row i at `slot_mapping[i]`.
pub fn write_kv(k: &Tensor, v: &Tensor, cache: &PagedCache, batch: &PreparedBatch<'_>) -> Result<()> {
    batch.check_cache("write_kv", k, cache)?;
    let Shape { len, kv_heads, d, .. } = batch.shape;
    for new in [k, v] {
        if new.dims() != [len, kv_heads, d] {
            let (new, cache) = (new.shape(), cache.k.shape());
            bail!("write_kv: rows {new:?} at {len} slots do not fit the cache {cache:?}");
        }
    }
    if work::is_dry() {
        return Ok(());
    }
    #[cfg(gpu)]
    if let Some(device) = &batch.device {
        return device.write_kv(k, v, cache);
    }
    cache.write(k, v, &batch.batch.slot_mapping)
}

/// Causal attention of `q [l, heads, d]` over a paged cache of heads of d values: `[l, heads, d]`. On the CPU `q` is f32 and
/// the cache f32, bf16, f16 or of 8 bits; on a GPU all have one dtype, but for a cache of 8 bits.
pub fn paged_attention(q: &Tensor, cache: &PagedCache, batch: &PreparedBatch<'_>, scale: f64) -> Result<Tensor> {
    batch.check_cache("paged_attention", q, cache)?;
    let shape = batch.shape;
    if q.dims() != [shape.len, shape.heads, shape.d] {
        let expected = [shape.len, shape.heads, shape.d];
        bail!("paged_attention: q {:?} does not fit the batch, which has {expected:?}", q.shape());
    }
    work::add_paged(|| shape.work(&batch.batch, PagedCache::head_bytes(shape.d, cache.k.dtype())));
    if work::is_dry() {
        return work::zeros(q.shape(), q);
    }
    #[cfg(gpu)]
    if let Some(device) = &batch.device {
        return device.attention(q, cache, scale);
    }
    let q = q.contiguous()?;
    let view = |tensor| View::contiguous("paged_attention", tensor);
    let (q, k, v) = (view(&q)?, view(&cache.k)?, view(&cache.v)?);
    let (q, batch, scale) = (q.f32()?, batch.batch.as_ref(), scale as f32);
    let out = match &cache.scales {
        Some(scales) => {
            let (k_scales, v_scales) = (view(&scales.k)?, view(&scales.v)?);
            let of_heads = Some((k_scales.f32()?, v_scales.f32()?));
            match scales.format {
                ByteFormat::Int8 => {
                    Paged { shape, q, k: k.i8()?, v: v.i8()?, scales: of_heads, batch, scale }.compute()
                }
                ByteFormat::E4m3 => {
                    let (k, v) = (E4m3::of_codes(k.u8()?), E4m3::of_codes(v.u8()?));
                    Paged { shape, q, k, v, scales: of_heads, batch, scale }.compute()
                }
            }
        }
        None => match (k.values()?, v.values()?) {
            (Values::F32(k), Values::F32(v)) => Paged { shape, q, k, v, scales: None, batch, scale }.compute(),
            (Values::Bf16(k), Values::Bf16(v)) => Paged { shape, q, k, v, scales: None, batch, scale }.compute(),
            (Values::F16(k), Values::F16(v)) => Paged { shape, q, k, v, scales: None, batch, scale }.compute(),
            _ => bail!("paged_attention: caches of two dtypes, {:?} and {:?}", cache.k.dtype(), cache.v.dtype()),
        },
    };
    tensor(out, (shape.len, shape.heads, shape.d))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    /// Rows of the step.
    len: usize,
    heads: usize,
    kv_heads: usize,
    d: usize,
    num_blocks: usize,
    block_size: usize,
}

impl Shape {
    fn cache(&self) -> [usize; 4] {
        [self.num_blocks, self.block_size, self.kv_heads, self.d]
    }

    /// Of attention over a cache whose heads have so many bytes: every row with its context, and each context's keys and
    /// values once.
    fn work(&self, batch: &PagedBatch, head_bytes: usize) -> Work {
        let rows = batch.cu_seqlens_q.windows(2).map(|starts| starts[1] - starts[0]);
        let pairs = rows.zip(&batch.context_lens).map(|(rows, context)| work::causal_pairs(rows, context - rows)).sum();
        let positions: usize = batch.context_lens.iter().sum();
        let bytes = positions * 2 * self.kv_heads * head_bytes;
        Work { flops: work::attention_flops(pairs, self.heads * self.d), bytes: bytes as f64 }
    }

    fn check(&self, batch: &PagedBatch) -> Result<()> {
        let sequences = batch.context_lens.len();
        let starts = &batch.cu_seqlens_q;
        let covers = starts.len() == sequences + 1 && starts[0] == 0 && starts[sequences] == self.len;
        if !covers || batch.block_tables.len() != sequences || !starts.is_sorted() {
            let tables = batch.block_tables.len();
            bail!(
                "paged_attention: {sequences} sequences, {tables} block tables and row starts {starts:?} do not cover \
                 the {} rows that have slots",
                self.len
            );
        }
        for sequence in 0..sequences {
            self.check_sequence(batch, sequence)?;
        }
        match batch.slot_mapping.iter().find(|slot| **slot as usize >= self.num_blocks * self.block_size) {
            Some(slot) => bail!("write_kv: slot {slot} lies outside the cache {:?}", self.cache()),
            None => Ok(()),
        }
    }

    fn check_sequence(&self, batch: &PagedBatch, sequence: usize) -> Result<()> {
        let (context, table) = (batch.context_lens[sequence], &batch.block_tables[sequence]);
        let rows = batch.cu_seqlens_q[sequence + 1] - batch.cu_seqlens_q[sequence];
        // The kernels count keys and rows in 31 bits.
        if rows > context || context > table.len() * self.block_size || context > i32::MAX as usize / self.heads {
            bail!(
                "paged_attention: sequence {sequence} has {rows} rows, context {context} and {} blocks of {}",
                table.len(),
                self.block_size
            );
        }
        match table.iter().find(|block| **block as usize >= self.num_blocks) {
            Some(block) => {
                let num_blocks = self.num_blocks;
                bail!("paged_attention: block {block} of sequence {sequence} lies outside the cache of {num_blocks}")
            }
            None => Ok(()),
        }
    }
}

struct Paged<'a, T> {
    shape: Shape,
    q: &'a [f32],
    k: &'a [T],
    v: &'a [T],
    /// `[num_blocks, block_size, kv_heads]` of keys and of values.
    scales: Option<(&'a [f32], &'a [f32])>,
    batch: &'a PagedBatch,
    scale: f32,
}

/// Some rows of one sequence, for one key head.
struct Task {
    sequence: usize,
    kv_head: usize,
    /// Rows count query heads of the group within positions.
    rows: std::ops::Range<usize>,
}

impl<T: Element> Paged<'_, T> {
    fn compute(&self) -> Vec<f32> {
        let mut out = vec![0f32; self.shape.len * self.shape.heads * self.shape.d];
        let (tasks, work) = self.tasks();
        let shared = Shared::new(&mut out);
        for_each(tasks.len(), work, |task| self.task(&tasks[task], shared.as_ptr()));
        out
    }

    /// All tasks and the multiply-adds in them.
    fn tasks(&self) -> (Vec<Task>, usize) {
        let Shape { heads, kv_heads, d, .. } = self.shape;
        let (mut tasks, mut work) = (Vec::new(), 0);
        for sequence in 0..self.batch.context_lens.len() {
            let positions = self.batch.cu_seqlens_q[sequence + 1] - self.batch.cu_seqlens_q[sequence];
            let rows = positions * (heads / kv_heads);
            work += 2 * positions * heads * d * self.batch.context_lens[sequence];
            for kv_head in 0..kv_heads {
                let starts = (0..rows).step_by(MAX_ROWS);
                tasks.extend(starts.map(|row| Task { sequence, kv_head, rows: row..rows.min(row + MAX_ROWS) }));
            }
        }
        (tasks, work)
    }

    fn task(&self, task: &Task, out: *mut f32) {
        let Shape { kv_heads, d, block_size, .. } = self.shape;
        let rows: Vec<_> = task.rows.clone().map(|row| self.row(task, row)).collect();
        let keys = Keys {
            k: &self.k[task.kv_head * d..],
            v: &self.v[task.kv_head * d..],
            strides: (kv_heads * d, kv_heads * d),
            blocks: Some((&self.batch.block_tables[task.sequence][..], block_size)),
            scales: self.scales.map(|(k, v)| KeyScales {
                k: &k[task.kv_head..],
                v: &v[task.kv_head..],
                stride: kv_heads,
            }),
        };
        let (q, scale) = (self.q, self.scale);
        with_scratch(scratch_len(rows.len(), d), |scratch| {
            dispatch(Flash { q, rows: &rows, keys, bias: None, d, scale, scratch, out });
        });
    }

    fn row(&self, task: &Task, row: usize) -> QueryRow {
        let Shape { heads, kv_heads, d, .. } = self.shape;
        let group = heads / kv_heads;
        let (start, end) = (self.batch.cu_seqlens_q[task.sequence], self.batch.cu_seqlens_q[task.sequence + 1]);
        let position = start + row / group;
        let place = (position * heads + task.kv_head * group + row % group) * d;
        let visible = self.batch.context_lens[task.sequence] - (end - position) + 1;
        QueryRow { q: place, out: place, visible, bias: 0 }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use proptest::prelude::*;

    use super::*;
    use crate::attention::{AttentionOptions, tests::oracle as dense};
    use crate::testing::{On, assert_close, bits, for_each_device, random, threads};

    /// The specification: gathers every sequence and computes row by row.
    fn oracle(q: &Tensor, k_cache: &Tensor, v_cache: &Tensor, batch: &PagedBatch, scale: f64) -> Result<Tensor> {
        let (_, block_size, kv_heads, d) = k_cache.dims4()?;
        let mut outputs = Vec::with_capacity(batch.context_lens.len());
        for (sequence, blocks) in batch.block_tables.iter().enumerate() {
            let (start, end) = (batch.cu_seqlens_q[sequence], batch.cu_seqlens_q[sequence + 1]);
            let context = batch.context_lens[sequence];
            let blocks = Tensor::from_slice(blocks, blocks.len(), q.device())?;
            let gather = |cache: &Tensor| -> Result<Tensor> {
                let rows = cache.index_select(&blocks, 0)?.reshape((blocks.dim(0)? * block_size, kv_heads, d))?;
                rows.narrow(0, 0, context)
            };
            let (k, v) = (gather(k_cache)?, gather(v_cache)?);
            for row in start..end {
                let visible = context - (end - row) + 1;
                let one = dense(
                    &q.narrow(0, row, 1)?.unsqueeze(0)?,
                    &k.narrow(0, 0, visible)?.unsqueeze(0)?,
                    &v.narrow(0, 0, visible)?.unsqueeze(0)?,
                    &AttentionOptions { scale: Some(scale), ..Default::default() },
                )?;
                outputs.push(one.squeeze(0)?);
            }
        }
        Tensor::cat(&outputs, 0)
    }

    const BLOCK: usize = 16;

    /// Caches of `blocks` blocks, and blocks dealt to sequences of the given contexts in a scattered order.
    fn caches(contexts: &[usize], kv_heads: usize, d: usize) -> (Tensor, Tensor, Vec<Vec<u32>>) {
        let counts: Vec<usize> = contexts.iter().map(|context| context.div_ceil(BLOCK)).collect();
        let blocks = counts.iter().sum::<usize>() + 3;
        let mut free = (0..blocks as u32).map(|block| (block * 7 + 3) % blocks as u32).collect::<Vec<_>>();
        free.sort_by_key(|block| (block * 5 + 1) % 11);
        let tables = counts.iter().map(|count| free.drain(..count).collect()).collect();
        (random(&[blocks, BLOCK, kv_heads, d], 2), random(&[blocks, BLOCK, kv_heads, d], 3), tables)
    }

    /// Rows at the ends of their sequences, and the slots that follow from the tables.
    fn batch(rows: &[usize], contexts: &[usize], tables: Vec<Vec<u32>>) -> PagedBatch {
        let mut batch = PagedBatch { context_lens: contexts.to_vec(), ..PagedBatch::default() };
        for ((rows, context), table) in rows.iter().zip(contexts).zip(&tables) {
            let slot = |position: usize| table[position / BLOCK] * BLOCK as u32 + (position % BLOCK) as u32;
            batch.slot_mapping.extend((context - rows..*context).map(slot));
            batch.cu_seqlens_q.push(batch.slot_mapping.len());
        }
        batch.block_tables = tables;
        batch
    }

    /// One call on the CPU, prepared for it alone.
    fn attend(q: &Tensor, k_cache: &Tensor, v_cache: &Tensor, batch: &PagedBatch, scale: f64) -> Result<Tensor> {
        attend_over(&plain(k_cache, v_cache), q, batch, scale)
    }

    fn attend_over(cache: &PagedCache, q: &Tensor, batch: &PagedBatch, scale: f64) -> Result<Tensor> {
        paged_attention(q, cache, &batch.prepare(q.dim(1)?, cache)?, scale)
    }

    fn plain(k: &Tensor, v: &Tensor) -> PagedCache {
        PagedCache::new(k.clone(), v.clone())
    }

    /// Sequences of `(rows, context)` whose keys of all positions are in the cache before.
    fn check_on(on: &On, sequences: &[(usize, usize)], heads: usize, kv_heads: usize, d: usize) {
        let (rows, contexts): (Vec<_>, Vec<_>) = sequences.iter().copied().unzip();
        let (k, v, tables) = caches(&contexts, kv_heads, d);
        let batch = batch(&rows, &contexts, tables);
        // A larger spread than the random numbers have: weights that differ.
        let q = (random(&[batch.slot_mapping.len(), heads, d], 1) * 3.0).unwrap();
        let expected = oracle(&on.rounded(&q), &on.rounded(&k), &on.rounded(&v), &batch, 0.3).unwrap();
        let (q, k, v) = (on.tensor(&q), on.tensor(&k), on.tensor(&v));
        let found = on.run(|| attend(&q, &k, &v, &batch, 0.3));
        on.assert_close(&found, &expected, 4 * d + contexts.iter().max().unwrap());
    }

    for_each_device!(decode_rows_see_their_whole_context, |on: &On| {
        // One key, an odd number, a block's worth, more than a split; groups of 1, 4 and 7.
        let sequences = [(1, 1), (1, 67), (1, 16), (1, 300), (1, 129)];
        for (heads, kv_heads, d) in [(2, 2, 64), (4, 1, 128), (14, 2, 64)] {
            check_on(on, &sequences, heads, kv_heads, d);
        }
    });

    for_each_device!(chunks_see_what_comes_before_them, |on: &On| {
        // A whole prompt, a chunk of one with a context before it, tiles that are not full.
        check_on(on, &[(33, 33), (20, 150), (5, 200)], 4, 1, 128);
        check_on(on, &[(70, 71)], 3, 1, 64);
    });

    for_each_device!(decode_rows_and_chunks_share_a_call, |on: &On| {
        check_on(on, &[(1, 40), (25, 60), (1, 260), (2, 2), (40, 40)], 8, 2, 64);
    });

    for_each_device!(heads_of_any_size_and_wide_groups_are_computed, |on: &On| {
        for (heads, kv_heads, d) in [(2, 1, 1), (3, 1, 20), (2, 2, 80), (2, 1, 256), (24, 1, 64), (20, 1, 33)] {
            check_on(on, &[(1, 150), (3, 40), (19, 19)], heads, kv_heads, d);
        }
    });

    for_each_device!(views_are_read_where_they_lie, |on: &On| {
        // Queries from the middle of a tensor; keys and values as parts of one projection, a value apart from alignment.
        for d in [64, 9] {
            let (k, v, tables) = caches(&[21, 40], 2, d);
            let batch = batch(&[1, 30], &[21, 40], tables);
            let (wide, q) = (random(&[31, 4 * d + 1], 5), random(&[40, 4, d], 6));
            let (k_cache, v_cache) = (on.tensor(&k.copy().unwrap()), on.tensor(&v.copy().unwrap()));
            let (wide_on, q_on) = (on.tensor(&wide), on.tensor(&q).narrow(0, 9, 31).unwrap());
            let part =
                |wide: &Tensor, i: usize| wide.narrow(1, 1 + i * 2 * d, 2 * d).unwrap().reshape((31, 2, d)).unwrap();
            let found = on.run(|| {
                let cache = plain(&k_cache, &v_cache);
                let prepared = batch.prepare(4, &cache)?;
                write_kv(&part(&wide_on, 0), &part(&wide_on, 1), &cache, &prepared)?;
                paged_attention(&q_on, &cache, &prepared, 0.3)
            });
            let (k, v, wide) = (on.rounded(&k), on.rounded(&v), on.rounded(&wide));
            let cache = plain(&k, &v);
            let write = || write_kv(&part(&wide, 0), &part(&wide, 1), &cache, &batch.prepare(4, &cache)?);
            write().unwrap();
            assert_eq!(bits(&k_cache.to_device(k.device()).unwrap()), bits(&k));
            assert_eq!(bits(&v_cache.to_device(v.device()).unwrap()), bits(&v));
            let expected = oracle(&on.rounded(&q).narrow(0, 9, 31).unwrap(), &k, &v, &batch, 0.3).unwrap();
            on.assert_close(&found, &expected, 4 * d);
        }
    });

    // Decode rows whose keys are dealt to several blocks of a GPU, and chunks.
    for_each_device!(nan_in_a_query_or_key_makes_the_rows_nan_that_see_it, |on: &On| {
        for d in [64, 128, 20] {
            let (rows, contexts) = ([1, 1, 20], [300, 300, 150]);
            let (k, v, tables) = caches(&contexts, 1, d);
            let slots = batch(&contexts, &contexts, tables.clone());
            let batch = batch(&rows, &contexts, tables);
            let q = random(&[22, 2, d], 1);
            let (there_k, there_v) = (on.tensor(&k), on.tensor(&v));
            let nan_rows = |q: &Tensor| -> Vec<usize> {
                let q = on.tensor(q);
                let found = crate::testing::values(&on.run(|| attend(&q, &there_k, &there_v, &batch, 1.0)));
                let is_nan = |row: &[f32]| row.iter().all(|value| value.is_nan());
                assert!(found.chunks(2 * d).all(|row| is_nan(row) || row.iter().all(|value| value.is_finite())));
                found.chunks(2 * d).enumerate().filter(|(_, row)| is_nan(row)).map(|(index, _)| index).collect()
            };
            let nan_query = |row: usize| {
                let nan = Tensor::full(f32::NAN, (1, 2, d), q.device()).unwrap();
                Tensor::cat(&[&q.narrow(0, 0, row).unwrap(), &nan, &q.narrow(0, row + 1, 21 - row).unwrap()], 0)
                    .unwrap()
            };
            assert!(nan_rows(&q).is_empty());
            let infinite = q.affine(f64::INFINITY, 0.0).unwrap();
            assert_eq!(nan_rows(&infinite).len(), 22);
            for row in [0, 2, 21] {
                assert_eq!(nan_rows(&nan_query(row)), [row], "d {d}");
            }
            // The first key of the first sequence, then all of the second one's.
            let nan = |count: usize| on.tensor(&Tensor::full(f32::NAN, (count, 1, d), q.device()).unwrap());
            let spoil = |first: usize, count: usize| {
                let slot_mapping = slots.slot_mapping[first..first + count].to_vec();
                let len = slot_mapping.len();
                let table = slots.block_tables[if first < 300 { 0 } else { 1 }].clone();
                let rows = PagedBatch {
                    cu_seqlens_q: vec![0, len],
                    context_lens: vec![len],
                    block_tables: vec![table],
                    slot_mapping,
                };
                let old = there_v.copy().unwrap();
                let cache = plain(&there_k, &old);
                on.run(|| write_kv(&nan(len), &nan(len), &cache, &rows.prepare(2, &cache)?));
            };
            spoil(0, 1);
            assert_eq!(nan_rows(&q), [0], "d {d}");
            spoil(300, 300);
            assert_eq!(nan_rows(&q), [0, 1], "d {d}");
        }
    });

    for_each_device!(what_lies_behind_the_context_does_not_matter, |on: &On| {
        for d in [64, 8] {
            let (k, v, tables) = caches(&[20, 45], 1, d);
            let (ends, all) = (batch(&[1, 12], &[20, 45], tables.clone()), batch(&[12, 3], &[32, 48], tables));
            let q = on.tensor(&random(&[13, 2, d], 1));
            let (k, v) = (on.tensor(&k), on.tensor(&v));
            let expected = on.run(|| attend(&q, &k, &v, &ends, 1.0));
            // Positions 20..32 and 45..48.
            let nan = on.tensor(&Tensor::full(f32::NAN, (15, 1, d), &candle_core::Device::Cpu).unwrap());
            let cache = plain(&k, &v);
            on.run(|| write_kv(&nan, &nan, &cache, &all.prepare(2, &cache)?));
            let found = on.run(|| attend(&q, &k, &v, &ends, 1.0));
            let host = |tensor: Tensor| bits(&tensor.to_device(&candle_core::Device::Cpu).unwrap());
            assert_eq!(host(found), host(expected));
        }
    });

    const FORMATS: [ByteFormat; 2] = [ByteFormat::Int8, ByteFormat::E4m3];

    /// An empty cache of 8 bits in the shape of `k`.
    fn of_bytes(format: ByteFormat, on: &On, k: &Tensor) -> PagedCache {
        let (num_blocks, block_size, kv_heads, _) = k.dims4().unwrap();
        let values = || on.as_is(&Tensor::zeros(k.shape(), DType::U8, &Device::Cpu).unwrap());
        let scales = || on.as_is(&Tensor::zeros((num_blocks, block_size, kv_heads), DType::F32, &Device::Cpu).unwrap());
        PagedCache::bytes(format, [values(), values()], [scales(), scales()], on.dtype)
    }

    /// Keys and values that such a cache stands for, f32 on the CPU.
    fn read_again(cache: &PagedCache) -> [Tensor; 2] {
        let scales = cache.scales.as_ref().unwrap();
        [(&cache.k, &scales.k), (&cache.v, &scales.v)].map(|(values, scales)| {
            let values = values.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<u8>().unwrap();
            let values: Vec<f32> = match cache.scales.as_ref().unwrap().format {
                ByteFormat::Int8 => values.into_iter().map(|byte| f32::from(byte.cast_signed())).collect(),
                ByteFormat::E4m3 => E4m3::of_codes(&values).iter().map(|value| value.widen()).collect(),
            };
            let values = Tensor::from_vec(values, cache.k.shape(), &Device::Cpu).unwrap();
            values.broadcast_mul(&scales.to_device(&Device::Cpu).unwrap().unsqueeze(3).unwrap()).unwrap()
        })
    }

    // Decode rows whose keys are dealt to several blocks, chunks, heads of all kernels.
    for_each_device!(caches_of_8_bits_are_written_and_read, |on: &On| {
        let shapes = [(4, 2, 64), (4, 1, 128), (3, 1, 20), (2, 2, 33), (24, 12, 16)];
        let cases = FORMATS.into_iter().flat_map(|format| shapes.map(|shape| (format, shape)));
        for (format, (heads, kv_heads, d)) in cases {
            let (rows, contexts) = ([1, 1, 20, 70], [300, 7, 150, 70]);
            let (k, v, tables) = caches(&contexts, kv_heads, d);
            let all = batch(&contexts, &contexts, tables.clone());
            let batch = batch(&rows, &contexts, tables);
            let len = all.slot_mapping.len();
            // Heads of very different sizes.
            let sizes = Tensor::arange(0u32, kv_heads as u32, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
            let sizes = sizes.affine(1.0 / kv_heads as f64, 0.1).unwrap().reshape((1, kv_heads, 1)).unwrap();
            let new = |seed| random(&[len, kv_heads, d], seed).broadcast_mul(&sizes).unwrap();
            let (new_k, new_v) = (new(7), new(8));
            let q = (random(&[batch.slot_mapping.len(), heads, d], 1) * 3.0).unwrap();

            let (there, twin) = (of_bytes(format, on, &k), of_bytes(format, &On::cpu(), &v));
            let write = |cache: &PagedCache, k: &Tensor, v: &Tensor| write_kv(k, v, cache, &all.prepare(heads, cache)?);
            on.run(|| write(&there, &on.tensor(&new_k), &on.tensor(&new_v)));
            write(&twin, &on.rounded(&new_k), &on.rounded(&new_v)).unwrap();
            let (found, expected) = (read_again(&there), read_again(&twin));
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(bits(found), bits(expected), "{format:?} d {d}");
            }

            let q_there = on.tensor(&q);
            let attended = on.run(|| attend_over(&there, &q_there, &batch, 0.3));
            // Tensor cores multiply what is rounded to 16 bits.
            let [k, v] = expected.map(|part| if matches!(d, 64 | 128) { on.rounded(&part) } else { part });
            let of_bytes = oracle(&on.rounded(&q), &k, &v, &batch, 0.3).unwrap();
            on.assert_close(&attended, &of_bytes, 4 * d + 300);

            // What 8 bits cost: the weights move a little, and each value by half a step, or a sixteenth of itself, at most.
            let (exact_k, exact_v) = (k.zeros_like().unwrap(), v.zeros_like().unwrap());
            let exact = plain(&exact_k, &exact_v);
            write(&exact, &on.rounded(&new_k), &on.rounded(&new_v)).unwrap();
            let exact = attend_over(&exact, &on.rounded(&q), &batch, 0.3).unwrap();
            let difference = (exact - of_bytes).unwrap().abs().unwrap().flatten_all().unwrap();
            let worst = difference.max(0).unwrap().to_scalar::<f32>().unwrap();
            let largest = new_v.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            let bound = if format == ByteFormat::Int8 { 0.05 } else { 0.15 };
            assert!(worst < bound * largest, "{format:?} d {d}: 8 bits move a value by {worst}, of {largest}");
        }
    });

    for_each_device!(a_cache_of_8_bits_hides_no_nan, |on: &On| {
        for (format, d) in FORMATS.into_iter().flat_map(|format| [64, 20].map(|d| (format, d))) {
            let (k, _, tables) = caches(&[40], 1, d);
            let (all, cache) = (batch(&[40], &[40], tables.clone()), of_bytes(format, on, &k));
            // The rows before the spoiled key, and those that see it.
            let [before, after] =
                [(30, 30), (10, 40)].map(|(rows, context)| batch(&[rows], &[context], tables.clone()));
            for value in [f32::NAN, f32::INFINITY] {
                let new = random(&[40, 1, d], 3);
                let row = Tensor::full(value, (1, 1, d), &Device::Cpu).unwrap();
                let new =
                    Tensor::cat(&[&new.narrow(0, 0, 30).unwrap(), &row, &new.narrow(0, 31, 9).unwrap()], 0).unwrap();
                let new = on.tensor(&new);
                on.run(|| write_kv(&new, &new, &cache, &all.prepare(1, &cache)?));
                let attended = |batch: &PagedBatch| {
                    let q = on.tensor(&random(&[batch.slot_mapping.len(), 1, d], 1));
                    crate::testing::values(&on.run(|| attend_over(&cache, &q, batch, 1.0)))
                };
                assert!(attended(&before).iter().all(|value| value.is_finite()), "d {d}, {value}");
                assert!(attended(&after).iter().all(|value| value.is_nan()), "d {d}, {value}");
            }
        }
    });

    #[test]
    fn chunks_over_8_bits_give_the_same_bits_in_any_length() {
        for format in FORMATS {
            let (k, _, tables) = caches(&[171], 2, 64);
            let cache = of_bytes(format, &On::cpu(), &k);
            let all = batch(&[171], &[171], tables.clone());
            let new = random(&[171, 2, 64], 3);
            write_kv(&new, &new, &cache, &all.prepare(8, &cache).unwrap()).unwrap();
            let q = random(&[171, 8, 64], 1);
            let whole = attend_over(&cache, &q, &all, 0.125).unwrap();
            for (start, len) in [(0, 1), (17, 110), (127, 2), (170, 1)] {
                let part = batch(&[len], &[start + len], tables.clone());
                let part = attend_over(&cache, &q.narrow(0, start, len).unwrap(), &part, 0.125).unwrap();
                let whole = whole.narrow(0, start, len).unwrap();
                assert_eq!(bits(&whole), bits(&part), "{format:?}: {len} rows from {start}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn equals_dense_attention_over_the_gathered_keys(
            sequences in prop::collection::vec((1usize..40, 0usize..200), 1..4),
            kv_heads in 1usize..3, group in 1usize..5, d in prop_oneof![Just(8usize), Just(20), Just(64)],
            dtype in prop_oneof![Just(DType::F32), Just(DType::BF16), Just(DType::F16)],
        ) {
            let rows: Vec<_> = sequences.iter().map(|sequence| sequence.0).collect();
            let contexts: Vec<_> = sequences.iter().map(|(rows, before)| rows + before).collect();
            let (k, v, tables) = caches(&contexts, kv_heads, d);
            let (k, v) = (k.to_dtype(dtype).unwrap(), v.to_dtype(dtype).unwrap());
            let batch = batch(&rows, &contexts, tables);
            let q = random(&[rows.iter().sum(), kv_heads * group, d], 1);
            let found = attend(&q, &k, &v, &batch, 0.3).unwrap();
            let (k, v) = (k.to_dtype(DType::F32).unwrap(), v.to_dtype(DType::F32).unwrap());
            assert_close(&found, &oracle(&q, &k, &v, &batch, 0.3).unwrap(), 1e-5);
        }
    }

    #[test]
    fn chunks_of_any_length_alone_or_together_give_the_same_bits() {
        let contexts = [300, 171];
        let (k, v, tables) = caches(&contexts, 2, 64);
        let q = random(&[471, 8, 64], 1);
        let run = |rows: &[usize], contexts: &[usize], tables: &[Vec<u32>], q: &Tensor, count| {
            let batch = batch(rows, contexts, tables.to_vec());
            threads(count, || attend(q, &k, &v, &batch, 0.125).unwrap())
        };
        let whole = run(&contexts, &contexts, &tables, &q, 2);
        for (start, len) in [(0, 1), (0, 17), (17, 110), (127, 2), (129, 1), (130, 170)] {
            let rows = q.narrow(0, start, len).unwrap();
            let part = run(&[len], &[start + len], &tables[..1], &rows, 1);
            assert_eq!(bits(&whole.narrow(0, start, len).unwrap()), bits(&part), "{len} rows from {start}");
        }
        let last = Tensor::cat(&[q.narrow(0, 299, 1).unwrap(), q.narrow(0, 470, 1).unwrap()], 0).unwrap();
        let decode = run(&[1, 1], &contexts, &tables, &last, 2);
        let expected = Tensor::cat(&[whole.narrow(0, 299, 1).unwrap(), whole.narrow(0, 470, 1).unwrap()], 0).unwrap();
        assert_eq!(bits(&decode), bits(&expected));
    }

    #[test]
    fn rows_are_written_where_the_slots_say() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let (k_cache, v_cache) = (random(&[3, 4, 2, 5], 1), random(&[3, 4, 2, 5], 2));
            let (k_cache, v_cache) = (k_cache.to_dtype(dtype).unwrap(), v_cache.to_dtype(dtype).unwrap());
            let before = k_cache.copy().unwrap();
            let (k, v) = (random(&[2, 3, 5], 3).transpose(0, 1).unwrap(), random(&[3, 2, 5], 4));
            let batch = PagedBatch {
                cu_seqlens_q: vec![0, 3],
                context_lens: vec![3],
                block_tables: vec![vec![0]],
                slot_mapping: vec![7, 0, 11],
            };
            let cache = plain(&k_cache, &v_cache);
            write_kv(&k, &v, &cache, &batch.prepare(2, &cache).unwrap()).unwrap();
            for (new, cache) in [(&k, &k_cache), (&v, &v_cache)] {
                let slots = cache.reshape((12, 2, 5)).unwrap();
                for (row, slot) in [7, 0, 11].into_iter().enumerate() {
                    let expected = new.get(row).unwrap().to_dtype(dtype).unwrap();
                    assert_eq!(bits(&slots.get(slot).unwrap()), bits(&expected));
                }
            }
            let untouched = |cache: &Tensor| bits(&cache.reshape((12, 2, 5)).unwrap().narrow(0, 1, 6).unwrap());
            assert_eq!(untouched(&k_cache), untouched(&before));
        }
    }

    #[test]
    fn a_batch_that_lies_is_refused() {
        let (k, v, tables) = caches(&[20], 1, 8);
        let cache = plain(&k, &v);
        let refused = |change: fn(&mut PagedBatch)| {
            let mut batch = batch(&[1], &[20], tables.clone());
            change(&mut batch);
            batch.prepare(2, &cache).unwrap_err().to_string()
        };
        let error = refused(|batch| batch.block_tables[0][1] = 99);
        assert!(error.contains("paged_attention") && error.contains("99"), "{error}");
        let error = refused(|batch| batch.context_lens[0] = 40);
        assert!(error.contains("context 40"), "{error}");
        let error = refused(|batch| batch.slot_mapping[0] = 5 * BLOCK as u32);
        assert!(error.contains("write_kv") && error.contains("slot 80"), "{error}");
        let error = refused(|batch| batch.slot_mapping.push(0));
        assert!(error.contains("do not cover the 2 rows"), "{error}");
        assert!(batch(&[1], &[20], tables.clone()).prepare(0, &cache).is_err());
    }

    #[test]
    fn tensors_that_do_not_fit_the_batch_are_refused() {
        let (k, v, tables) = caches(&[20], 1, 8);
        let batch = batch(&[1], &[20], tables);
        let cache = plain(&k, &v);
        let prepared = batch.prepare(2, &cache).unwrap();
        let error = write_kv(&random(&[1, 2, 8], 1), &v, &cache, &prepared).unwrap_err().to_string();
        assert!(error.contains("write_kv") && error.contains("[1, 2, 8]"), "{error}");
        let error = paged_attention(&random(&[1, 4, 8], 1), &cache, &prepared, 1.0).unwrap_err().to_string();
        assert!(error.contains("paged_attention") && error.contains("[1, 4, 8]"), "{error}");
        let half = k.narrow(0, 0, 2).unwrap();
        let half = plain(&half, &half);
        let error = paged_attention(&random(&[1, 2, 8], 1), &half, &prepared, 1.0).unwrap_err().to_string();
        assert!(error.contains("[2, 16, 1, 8]"), "{error}");
    }
}
