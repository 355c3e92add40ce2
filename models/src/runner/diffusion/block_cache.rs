//! The first-block cache: a step whose first block says nothing new takes what the other blocks added last time.
//!
//! Owns: the decision of each row, what is kept of it, how long it may be believed. Does not know: any network, sessions.
//! Source: diffusers `hooks/first_block_cache.py`, which has no bound on skips in a row. A cache belongs to one guidance
//! branch of one session and lives as long as that.

use candle_core::Tensor;
use tale_kernels::relative_l1;

use super::course::Expert;
use super::row::DenoiseRow;
use crate::error::Result;

/// Most passes in a row that are answered from what was kept; then one is computed whatever the first block says, so that
/// a long loop of small steps cannot drift on one old answer.
pub const MAX_CONSECUTIVE_SKIPS: usize = 3;

/// What a family adds that can skip blocks.
pub trait CachedPrediction<C> {
    /// As [`predict`](super::DiffusionModel::predict), with the cache of each row.
    fn predict_cached(
        &self,
        expert: Expert,
        rows: &[DenoiseRow<'_, C>],
        caches: &mut [&mut BlockCache],
    ) -> Result<Vec<Tensor>>;
}

/// What one row remembers from pass to pass.
#[derive(Debug)]
pub struct BlockCache {
    threshold: f64,
    kept: Option<Kept>,
    consecutive: usize,
    skipped: usize,
}

/// Of the last pass that was computed, each `[1, tokens, dim]`.
#[derive(Debug)]
struct Kept {
    /// What the first block added.
    first: Tensor,
    /// What all the others added.
    others: Tensor,
}

impl BlockCache {
    /// A pass is skipped when what the first block adds has changed by less than `threshold` (mean absolute difference
    /// over mean absolute value) since the last computed pass; 0 skips none.
    pub fn new(threshold: f64) -> Self {
        Self { threshold, kept: None, consecutive: 0, skipped: 0 }
    }

    /// Passes answered from what was kept.
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// Whether the next pass may be skipped, if its first block allows.
    fn may_skip(&self) -> bool {
        self.threshold > 0.0 && self.kept.is_some() && self.consecutive < MAX_CONSECUTIVE_SKIPS
    }

    /// Makes the next pass a computed one.
    pub fn forget(&mut self) {
        self.kept = None;
        self.consecutive = 0;
    }

    /// `change` is NaN where something is not finite, and then the pass is computed.
    fn skips(&mut self, change: Option<f32>) -> bool {
        let skips = change.is_some_and(|change| f64::from(change) < self.threshold);
        if skips {
            self.consecutive += 1;
            self.skipped += 1;
        } else {
            // Freed before the blocks are computed that make the next ones.
            self.forget();
        }
        skips
    }
}

/// Tokens after the last block, `[rows, tokens, dim]`, from those `before` and `after` the first one. `others` computes the
/// other blocks for the rows with these numbers (at least one); the rows that skip them are left out. One number for each
/// row leaves the device.
pub fn through_blocks(
    caches: &mut [&mut BlockCache],
    before: &Tensor,
    after: &Tensor,
    others: impl FnOnce(&[usize]) -> Result<Tensor>,
) -> Result<Tensor> {
    assert_eq!(caches.len(), after.dim(0)?, "one cache per row: this is a bug of the family");
    let added = (after - before)?;
    let changes = changes(caches, &added)?;
    let mut computed = Vec::with_capacity(caches.len());
    let mut last = Vec::with_capacity(caches.len());
    for (row, (cache, change)) in caches.iter_mut().zip(changes).enumerate() {
        let skips = cache.skips(change);
        match cache.kept.as_ref().filter(|_| skips) {
            Some(kept) => last.push(Some((after.narrow(0, row, 1)? + &kept.others)?)),
            None => {
                computed.push(row);
                last.push(None);
            }
        }
    }
    if computed.is_empty() {
        return stack(last);
    }
    let tokens = others(&computed)?;
    for (place, row) in computed.into_iter().enumerate() {
        let tokens = tokens.narrow(0, place, 1)?;
        // A copy: a view would keep the whole batch alive for as long as the session.
        let first = added.narrow(0, row, 1)?.force_contiguous()?;
        caches[row].kept = Some(Kept { first, others: (&tokens - after.narrow(0, row, 1)?)? });
        last[row] = Some(tokens);
    }
    stack(last)
}

/// How much of what the first block adds to each row is new; `None` for a row that may not skip anyway.
fn changes(caches: &[&mut BlockCache], added: &Tensor) -> Result<Vec<Option<f32>>> {
    let mut rows = Vec::new();
    let mut found = Vec::new();
    for (row, cache) in caches.iter().enumerate().filter(|(_, cache)| cache.may_skip()) {
        let Some(kept) = &cache.kept else { continue };
        found.push(relative_l1(&added.narrow(0, row, 1)?, &kept.first)?);
        rows.push(row);
    }
    let mut changes = vec![None; caches.len()];
    if !found.is_empty() {
        for (row, change) in rows.into_iter().zip(Tensor::stack(&found, 0)?.to_vec1::<f32>()?) {
            changes[row] = Some(change);
        }
    }
    Ok(changes)
}

fn stack(rows: Vec<Option<Tensor>>) -> Result<Tensor> {
    let rows: Vec<Tensor> = rows.into_iter().flatten().collect();
    Ok(Tensor::cat(&rows, 0)?)
}

/// Some of the rows of `x [rows, ...]`.
pub fn select(x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    if rows.len() == x.dim(0)? {
        return Ok(x.clone());
    }
    let rows: Vec<Tensor> = rows.iter().map(|row| x.narrow(0, *row, 1)).collect::<candle_core::Result<_>>()?;
    Ok(Tensor::cat(&rows, 0)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// Rows of two tokens of two values each, all of them this one.
    fn rows(values: &[f32]) -> Tensor {
        let all: Vec<f32> = values.iter().flat_map(|value| [*value; 4]).collect();
        Tensor::from_vec(all, (values.len(), 2, 2), &Device::Cpu).expect("a tensor")
    }

    /// A network whose first block adds `added` to rows of zeros and whose others triple what they get. The rows that
    /// were computed, and the first value of each row's answer.
    fn pass(caches: &mut [&mut BlockCache], added: &[f32]) -> (Vec<usize>, Vec<f32>) {
        let (mut computed, after) = (Vec::new(), rows(added));
        let answer = through_blocks(caches, &after.zeros_like().expect("zeros"), &after, |rows| {
            computed = rows.to_vec();
            Ok((select(&after, rows)? * 3.0)?)
        });
        let answer = answer.and_then(|x| Ok(x.narrow(1, 0, 1)?.narrow(2, 0, 1)?.flatten_all()?.to_vec1::<f32>()?));
        let rounded = |value: f32| (value * 100.0).round() / 100.0;
        (computed, answer.expect("an answer").into_iter().map(rounded).collect())
    }

    #[test]
    fn each_row_decides_for_itself_against_its_last_computed_pass() {
        let (mut a, mut b) = (BlockCache::new(0.1), BlockCache::new(0.25));
        let mut both = [&mut a, &mut b];
        assert_eq!(pass(&mut both, &[1.0, 1.0]), (vec![0, 1], vec![3.0, 3.0]));
        // 20 % of change: too much for the first, not for the second, which adds the old 2.
        assert_eq!(pass(&mut both, &[1.2, 1.2]), (vec![0], vec![3.6, 3.2]));
        // The second is still held against 1, not against the pass that it skipped.
        assert_eq!(pass(&mut both, &[1.25, 1.3]), (vec![1], vec![3.65, 3.9]));
        assert_eq!(pass(&mut both, &[1.25, 1.3]), (vec![], vec![3.65, 3.9]));
        assert_eq!((a.skipped(), b.skipped()), (2, 2));
    }

    #[test]
    fn passes_in_a_row_are_skipped_up_to_the_bound() {
        let mut cache = BlockCache::new(0.1);
        let computed: Vec<bool> = (0..9).map(|_| !pass(&mut [&mut cache], &[1.0]).0.is_empty()).collect();
        assert_eq!(computed, [true, false, false, false, true, false, false, false, true]);
        assert_eq!((cache.skipped(), MAX_CONSECUTIVE_SKIPS), (6, 3));
    }

    #[test]
    fn nothing_is_skipped_at_threshold_0_after_forgetting_or_when_a_value_is_not_finite() {
        let mut cache = BlockCache::new(0.0);
        for _ in 0..3 {
            assert_eq!(pass(&mut [&mut cache], &[1.0]).0, [0]);
        }
        let mut cache = BlockCache::new(0.5);
        pass(&mut [&mut cache], &[1.0]);
        cache.forget();
        assert_eq!(pass(&mut [&mut cache], &[1.0]).0, [0]);
        assert_eq!(pass(&mut [&mut cache], &[f32::NAN]).0, [0]);
        assert_eq!(pass(&mut [&mut cache], &[1.0]).0, [0]);
        assert_eq!(pass(&mut [&mut cache], &[1.0]).0, [] as [usize; 0]);
    }
}
