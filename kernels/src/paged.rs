//! Attention over a paged KV cache: sequences of any length, decode and prefill chunks in one call.
//!
//! Owns: writing into blocks, reading them through block tables, how rows are dealt out. The arithmetic is
//! [`crate::flash`]. Keys are read where they lie; a task takes one key head of one sequence with all query heads that
//! share it, so every block is read once per tile of rows. A row has the same bits in a decode step, in a chunk of any
//! length and in any batch.

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Tensor, bail};
use half::{bf16, f16};

use crate::flash::{Flash, Keys, MAX_ROWS, QueryRow, scratch_len};
use crate::parallel::{Shared, for_each, with_scratch};
use crate::simd::{Element, dispatch};
use crate::view::{Values, View, tensor};

/// Which rows of `q` belong to which sequence and where that sequence's keys lie.
#[derive(Debug, Clone)]
pub struct PagedBatch {
    /// Start of each sequence's rows in `q`, and the total: `sequences + 1` entries.
    pub cu_seqlens_q: Vec<usize>,
    /// Keys of each sequence, the new ones included. Query row i of a sequence with n rows sees keys up to
    /// `context_len - n + i`.
    pub context_lens: Vec<usize>,
    /// Blocks of each sequence, in order.
    pub block_tables: Vec<Vec<u32>>,
}

/// Writes `k` and `v` `[l, kv_heads, d]` into the caches `[num_blocks, block_size, kv_heads, d]` (f32, bf16 or f16,
/// contiguous) in place, row i at `slot_mapping[i] = block * block_size + offset`.
pub fn write_kv(k: &Tensor, v: &Tensor, k_cache: &Tensor, v_cache: &Tensor, slot_mapping: &[u32]) -> Result<()> {
    for (new, cache) in [(k, k_cache), (v, v_cache)] {
        let (num_blocks, block_size, kv_heads, d) = cache.dims4()?;
        if new.dims() != [slot_mapping.len(), kv_heads, d] {
            let (new, cache) = (new.shape(), cache.shape());
            bail!("write_kv: rows {new:?} at {} slots do not fit the cache {cache:?}", slot_mapping.len());
        }
        if let Some(slot) = slot_mapping.iter().find(|slot| **slot as usize >= num_blocks * block_size) {
            bail!("write_kv: slot {slot} lies outside the cache {:?}", cache.shape());
        }
        let new = new.to_dtype(DType::F32)?.contiguous()?;
        let rows = View::contiguous("write_kv", &new)?;
        cache.inplace_op1(&WriteRows { rows: rows.f32()?, len: kv_heads * d, slots: slot_mapping })?;
    }
    Ok(())
}

/// Rows of `len` values into the slots of a cache.
struct WriteRows<'a> {
    rows: &'a [f32],
    len: usize,
    slots: &'a [u32],
}

impl InplaceOp1 for WriteRows<'_> {
    fn name(&self) -> &'static str {
        "write_kv"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("write_kv: the cache {:?} must be contiguous", layout.shape())
        };
        match storage {
            CpuStorage::F32(cache) => self.write(&mut cache[start..end], |value| value),
            CpuStorage::BF16(cache) => self.write(&mut cache[start..end], bf16::from_f32),
            CpuStorage::F16(cache) => self.write(&mut cache[start..end], f16::from_f32),
            _ => bail!("write_kv: a cache is f32, bf16 or f16"),
        }
        Ok(())
    }
}

impl WriteRows<'_> {
    fn write<T>(&self, cache: &mut [T], round: impl Fn(f32) -> T) {
        for (row, slot) in self.rows.chunks_exact(self.len.max(1)).zip(self.slots) {
            let to = &mut cache[*slot as usize * self.len..][..self.len];
            for (to, value) in to.iter_mut().zip(row) {
                *to = round(*value);
            }
        }
    }
}

/// Causal attention of `q [l, heads, d]` (f32) over the paged caches `[num_blocks, block_size, kv_heads, d]` (f32, bf16
/// or f16): `[l, heads, d]`.
pub fn paged_attention(
    q: &Tensor,
    k_cache: &Tensor,
    v_cache: &Tensor,
    batch: &PagedBatch,
    scale: f64,
) -> Result<Tensor> {
    let shape = Shape::new(q, k_cache, v_cache, batch)?;
    let q = q.contiguous()?;
    let views = (
        View::contiguous("paged_attention", &q)?,
        View::contiguous("paged_attention", k_cache)?,
        View::contiguous("paged_attention", v_cache)?,
    );
    let (q, scale) = (views.0.f32()?, scale as f32);
    let out = match (views.1.values()?, views.2.values()?) {
        (Values::F32(k), Values::F32(v)) => Paged { shape, q, k, v, batch, scale }.compute(),
        (Values::Bf16(k), Values::Bf16(v)) => Paged { shape, q, k, v, batch, scale }.compute(),
        (Values::F16(k), Values::F16(v)) => Paged { shape, q, k, v, batch, scale }.compute(),
        _ => bail!("paged_attention: caches of two dtypes, {:?} and {:?}", k_cache.dtype(), v_cache.dtype()),
    };
    tensor(out, (shape.len, shape.heads, shape.d))
}

#[derive(Clone, Copy)]
struct Shape {
    /// Rows of `q`.
    len: usize,
    heads: usize,
    kv_heads: usize,
    d: usize,
    block_size: usize,
}

impl Shape {
    fn new(q: &Tensor, k_cache: &Tensor, v_cache: &Tensor, batch: &PagedBatch) -> Result<Self> {
        let (len, heads, d) = q.dims3()?;
        let (num_blocks, block_size, kv_heads, _) = k_cache.dims4()?;
        let fits = k_cache.dims() == [num_blocks, block_size, kv_heads, d] && v_cache.dims() == k_cache.dims();
        if !fits || d == 0 || block_size == 0 || kv_heads == 0 || heads % kv_heads != 0 {
            let (q, k, v) = (q.shape(), k_cache.shape(), v_cache.shape());
            bail!("paged_attention: q {q:?} does not fit the caches {k:?} and {v:?}");
        }
        let shape = Self { len, heads, kv_heads, d, block_size };
        shape.check(batch, num_blocks)?;
        Ok(shape)
    }

    fn check(&self, batch: &PagedBatch, num_blocks: usize) -> Result<()> {
        let sequences = batch.context_lens.len();
        let starts = &batch.cu_seqlens_q;
        let covers = starts.len() == sequences + 1 && starts[0] == 0 && starts[sequences] == self.len;
        if !covers || batch.block_tables.len() != sequences || !starts.is_sorted() {
            let tables = batch.block_tables.len();
            bail!(
                "paged_attention: {sequences} sequences, {tables} block tables and row starts {starts:?} do not cover {} rows",
                self.len
            );
        }
        for sequence in 0..sequences {
            let (context, table) = (batch.context_lens[sequence], &batch.block_tables[sequence]);
            let rows = starts[sequence + 1] - starts[sequence];
            if rows > context || context > table.len() * self.block_size {
                bail!(
                    "paged_attention: sequence {sequence} has {rows} rows, context {context} and {} blocks of {}",
                    table.len(),
                    self.block_size
                );
            }
            if let Some(block) = table.iter().find(|block| **block as usize >= num_blocks) {
                bail!("paged_attention: block {block} of sequence {sequence} lies outside the cache of {num_blocks}");
            }
        }
        Ok(())
    }
}

struct Paged<'a, T> {
    shape: Shape,
    q: &'a [f32],
    k: &'a [T],
    v: &'a [T],
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
    use proptest::prelude::*;

    use super::*;
    use crate::attention::{AttentionOptions, tests::oracle as dense};
    use crate::testing::{assert_close, bits, random, threads};

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

    fn batch(rows: &[usize], contexts: &[usize], tables: Vec<Vec<u32>>) -> PagedBatch {
        let mut cu_seqlens_q = vec![0];
        cu_seqlens_q.extend(rows.iter().scan(0, |sum, rows| {
            *sum += rows;
            Some(*sum)
        }));
        PagedBatch { cu_seqlens_q, context_lens: contexts.to_vec(), block_tables: tables }
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
            let found = paged_attention(&q, &k, &v, &batch, 0.3).unwrap();
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
            threads(count, || paged_attention(q, &k, &v, &batch, 0.125).unwrap())
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
    fn what_lies_behind_the_context_does_not_matter() {
        let (k, v, tables) = caches(&[20], 1, 8);
        let batch = batch(&[1], &[20], tables.clone());
        let q = random(&[1, 2, 8], 1);
        let expected = paged_attention(&q, &k, &v, &batch, 1.0).unwrap();
        let nan = Tensor::full(f32::NAN, (12, 1, 8), k.device()).unwrap();
        let slots: Vec<u32> = (4..16).map(|offset| tables[0][1] * BLOCK as u32 + offset).collect();
        write_kv(&nan, &nan, &k, &v, &slots).unwrap();
        assert_eq!(bits(&paged_attention(&q, &k, &v, &batch, 1.0).unwrap()), bits(&expected));
    }

    #[test]
    fn rows_are_written_where_the_slots_say() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let (k_cache, v_cache) = (random(&[3, 4, 2, 5], 1), random(&[3, 4, 2, 5], 2));
            let (k_cache, v_cache) = (k_cache.to_dtype(dtype).unwrap(), v_cache.to_dtype(dtype).unwrap());
            let before = k_cache.copy().unwrap();
            let (k, v) = (random(&[2, 3, 5], 3).transpose(0, 1).unwrap(), random(&[3, 2, 5], 4));
            write_kv(&k, &v, &k_cache, &v_cache, &[7, 0, 11]).unwrap();
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
    fn a_table_that_lies_is_refused() {
        let (k, v, mut tables) = caches(&[20], 1, 8);
        let q = random(&[1, 2, 8], 1);
        tables[0][1] = 99;
        let error = paged_attention(&q, &k, &v, &batch(&[1], &[20], tables.clone()), 1.0).unwrap_err().to_string();
        assert!(error.contains("paged_attention") && error.contains("99"), "{error}");
        let error = paged_attention(&q, &k, &v, &batch(&[1], &[40], tables), 1.0).unwrap_err().to_string();
        assert!(error.contains("context 40"), "{error}");
        let error = write_kv(&q, &q, &k, &v, &[0]).unwrap_err().to_string();
        assert!(error.contains("write_kv") && error.contains("[1, 2, 8]"), "{error}");
    }
}
