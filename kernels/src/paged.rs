//! Attention over a paged KV cache: sequences of any length, decode and prefill chunks in one call.

use candle_core::{Result, Tensor};

use crate::attention::{AttentionOptions, attention};

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

/// Writes `k` and `v` `[l, kv_heads, d]` into the caches `[num_blocks, block_size, kv_heads, d]` in place, row i at
/// `slot_mapping[i] = block * block_size + offset`.
pub fn write_kv(k: &Tensor, v: &Tensor, k_cache: &Tensor, v_cache: &Tensor, slot_mapping: &[u32]) -> Result<()> {
    let (num_blocks, block_size, kv_heads, d) = k_cache.dims4()?;
    for (new, cache) in [(k, k_cache), (v, v_cache)] {
        let cache = cache.reshape((num_blocks * block_size, kv_heads, d))?;
        for (row, slot) in slot_mapping.iter().enumerate() {
            cache.slice_set(&new.narrow(0, row, 1)?.contiguous()?, 0, *slot as usize)?;
        }
    }
    Ok(())
}

/// Causal attention of `q [l, heads, d]` over the paged caches `[num_blocks, block_size, kv_heads, d]`: `[l, heads, d]`.
pub fn paged_attention(
    q: &Tensor,
    k_cache: &Tensor,
    v_cache: &Tensor,
    batch: &PagedBatch,
    scale: f64,
) -> Result<Tensor> {
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
            let one = attention(
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
