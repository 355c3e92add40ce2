//! How the rows of a step are dealt out to blocks of `paged.cu`. Pure: from lengths to lists.
//!
//! Everything that a launch's grid depends on is rounded up to a bucket, so that steps of about the same size have the
//! same launches: what a captured graph of a decode step needs.

use candle_core::DType;

use super::{PagedBatch, Shape};

/// Marks what only fills a bucket: `NOTHING` of the kernels.
pub(super) const NOTHING: u32 = u32::MAX;

/// Rows of the kernels for few rows and of the exact one, and of the tensor cores' kernel for many.
pub(super) const FEW_ROWS: usize = 16;
pub(super) const MANY_ROWS: usize = 64;

/// Blocks that a launch should have: six for each SM of the largest GPU served, so that a last wave that is not full
/// costs little.
const WANTED_BLOCKS: usize = 6 * 132;
/// Keys that a split should have at least, and most splits: what is handed over stays small beside what is read.
const MIN_SPLIT_KEYS: usize = 128;
const MAX_SPLITS: usize = 64;

/// Which kernels compute a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// 16-bit queries with heads of 64 or 128 and blocks of a power of two.
    TensorCores,
    /// Everything else.
    Exact,
}

/// A tile of packed rows: a sequence, and which of its rows comes first. Row r is query head `r % group` of the group
/// at position `r / group`.
pub(super) type Task = [u32; 2];

/// Who computes what.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub path: Path,
    /// Tiles of sequences with few rows, filled up to a bucket. Their keys are split.
    pub few: Vec<Task>,
    /// Shares of the keys of each of them.
    pub splits: usize,
    /// Tiles of the other sequences.
    pub many: Vec<Task>,
    /// Entries of each row of the block tables.
    pub table_len: usize,
}

impl Plan {
    pub(super) fn new(shape: &Shape, dtype: DType, batch: &PagedBatch) -> Self {
        let path = Path::of(shape, dtype);
        let group = shape.heads / shape.kv_heads;
        let many_rows = if path == Path::TensorCores { MANY_ROWS } else { FEW_ROWS };
        let (mut few, mut many) = (Vec::new(), Vec::new());
        for (sequence, ends) in batch.cu_seqlens_q.windows(2).enumerate() {
            let positions = ends[1] - ends[0];
            let rows = positions * group;
            let tiles = |tile_rows| (0..rows).step_by(tile_rows).map(move |row| [sequence as u32, row as u32]);
            if positions == 1 || rows <= FEW_ROWS { few.extend(tiles(FEW_ROWS)) } else { many.extend(tiles(many_rows)) }
        }
        // The tiles with most keys begin first, so that none is left alone at the end.
        let seen = |[sequence, row]: &Task| {
            let sequence = *sequence as usize;
            batch.context_lens[sequence] - (batch.cu_seqlens_q[sequence + 1] - batch.cu_seqlens_q[sequence])
                + *row as usize / group
        };
        many.sort_by_key(|task| std::cmp::Reverse(seen(task)));
        few.resize(bucket(few.len()), [NOTHING; 2]);
        let longest = batch.block_tables.iter().map(Vec::len).max().unwrap_or(0);
        let table_len = longest.next_power_of_two();
        let splits = splits(few.len() * shape.kv_heads, table_len * shape.block_size);
        Self { path, few, splits, many, table_len }
    }
}

impl Path {
    fn of(shape: &Shape, dtype: DType) -> Self {
        let half = matches!(dtype, DType::F16 | DType::BF16);
        let fits = matches!(shape.d, 64 | 128) && shape.block_size.is_power_of_two();
        if half && fits { Self::TensorCores } else { Self::Exact }
    }
}

/// The next size that lists are filled up to.
pub(super) fn bucket(len: usize) -> usize {
    if len <= 16 { len.next_power_of_two() } else { len.next_multiple_of(16) }
}

fn splits(blocks: usize, max_context: usize) -> usize {
    let wanted = WANTED_BLOCKS.div_ceil(blocks.max(1));
    wanted.min(max_context / MIN_SPLIT_KEYS).clamp(1, MAX_SPLITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(dtype: DType, group: usize, sequences: &[(usize, usize)]) -> Plan {
        let mut batch = PagedBatch::default();
        for (rows, context) in sequences {
            batch.cu_seqlens_q.push(batch.cu_seqlens_q[batch.cu_seqlens_q.len() - 1] + rows);
            batch.context_lens.push(*context);
            batch.block_tables.push(vec![0; context.div_ceil(32)]);
        }
        let len = batch.cu_seqlens_q[sequences.len()];
        let shape = Shape { len, heads: 8 * group, kv_heads: 8, d: 128, num_blocks: 1, block_size: 32 };
        Plan::new(&shape, dtype, &batch)
    }

    #[test]
    fn decode_rows_split_their_keys_and_chunks_do_not() {
        let plan = plan(DType::BF16, 4, &[(1, 4000), (100, 300), (4, 9), (1, 1)]);
        assert_eq!(plan.few, [[0, 0], [2, 0], [3, 0], [NOTHING; 2]]);
        assert_eq!(plan.many, [384, 320, 256, 192, 128, 64, 0].map(|row| [1, row]));
        assert_eq!((plan.path, plan.table_len, plan.splits), (Path::TensorCores, 128, 25));
    }

    #[test]
    fn a_group_wider_than_a_tile_takes_several() {
        assert_eq!(plan(DType::F16, 32, &[(1, 10)]).few, [[0, 0], [0, 16]]);
    }

    #[test]
    fn f32_is_computed_exactly_in_small_tiles() {
        let plan = plan(DType::F32, 4, &[(5, 5)]);
        assert_eq!((plan.path, plan.many.len(), plan.few.len()), (Path::Exact, 2, 1));
        assert_eq!(plan.few, [[NOTHING; 2]]);
    }

    #[test]
    fn launches_are_the_same_while_a_context_grows_within_its_bucket() {
        let launches = |context| {
            let plan = plan(DType::BF16, 4, &[(1, context), (1, 7)]);
            (plan.few.len(), plan.splits, plan.table_len)
        };
        assert_eq!(launches(1025), launches(2048));
        assert_ne!(launches(1024), launches(1025));
    }

    #[test]
    fn splits_fill_the_largest_gpu_and_stay_bounded() {
        assert_eq!(splits(16 * 8, 4096), 7);
        assert_eq!(splits(8, 4096), 32);
        assert_eq!(splits(8, 1 << 20), MAX_SPLITS);
        assert_eq!(splits(8 * 512, 4096), 1);
        assert_eq!(splits(0, 0), 1);
    }
}
