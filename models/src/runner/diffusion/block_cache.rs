//! The block cache: a pass that would add what the last one has added is answered with that.
//!
//! Owns: what is kept of each row, how its change is measured, the way of a batch in which some rows skip and some do not.
//! Does not know: any network, sessions, when a pass is skipped (`Skipping`). A cache belongs to one guidance branch of one
//! session and lives as long as that.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use tale_kernels::relative_l1;

use super::course::Expert;
use super::row::DenoiseRow;
use super::skipping::Skipping;
use crate::diffusion::acceleration::{Cache, CacheMethod};
use crate::error::Result;
use crate::session_checkpoint::fields::{Reader, Writer};

/// What a family adds that can skip blocks.
pub trait CachedPrediction<C> {
    /// As [`predict`](super::DiffusionModel::predict), with the cache of each row. The caches of one batch have one method.
    fn predict_cached(
        &self,
        expert: Expert,
        rows: &[DenoiseRow<'_, C>],
        caches: &mut [RowCache<'_>],
    ) -> Result<Vec<Tensor>>;
}

/// The blocks of a network and what goes through them in one pass of `n` rows. It stands before the first block until
/// [`Blocks::pass_first`], and behind it from then on.
pub trait Blocks {
    /// What goes into the first block and is carried through all of them, `[n, tokens, dim]`.
    fn entered(&self) -> &Tensor;

    /// What TeaCache compares from step to step, `[n, ...]`.
    fn signal(&self) -> Result<Tensor>;

    /// Goes through the first block: what has become of the tokens, `[n, tokens, dim]`.
    fn pass_first(&mut self) -> Result<Tensor>;

    /// The rows with these numbers (at least one) through all blocks from where it stands, `[rows, tokens, dim]`.
    fn pass_rest(self, rows: &[usize]) -> Result<Tensor>;
}

/// The cache of one row of a pass.
pub struct RowCache<'a> {
    /// Of the row's guidance branch and session.
    pub cache: &'a mut BlockCache,
    /// Where the session is in its schedule, counted from 0.
    pub step: usize,
}

/// What one row remembers from pass to pass.
#[derive(Debug)]
pub struct BlockCache {
    skipping: Skipping,
    /// What is compared, `[1, ...]`: of the last computed pass what the first block added, or the signal of the last pass.
    signal: Option<Tensor>,
    /// What the blocks added in the last computed pass, `[1, tokens, dim]`; without the first one where that is looked at.
    added: Option<Tensor>,
    skipped: usize,
}

impl BlockCache {
    /// Of guidance branch `branch`, by this rule.
    pub fn new(cache: Arc<Cache>, branch: usize) -> Self {
        Self { skipping: Skipping::new(cache, branch), signal: None, added: None, skipped: 0 }
    }

    /// Passes answered from what was kept.
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// Makes the next pass a computed one.
    pub fn forget(&mut self) {
        self.signal = None;
        self.added = None;
        self.skipping.begin_anew();
    }

    /// All that decides about later passes and answers them.
    pub fn save(&self, into: &mut Writer) -> Result<()> {
        let (in_a_row, sum, ratio) = self.skipping.state();
        into.count(in_a_row);
        into.number(sum);
        into.number(ratio);
        into.count(self.skipped);
        into.option(self.signal.as_ref(), Writer::tensor)?;
        into.option(self.added.as_ref(), Writer::tensor)
    }

    /// Goes on as the one of the same rule and branch that was saved.
    pub fn go_on_from(&mut self, from: &mut Reader<'_>, device: &Device) -> Result<()> {
        self.skipping.go_on_from((from.count()?, from.number()?, from.number()?));
        self.skipped = from.count()?;
        self.signal = from.option(|from| from.tensor(device))?;
        self.added = from.option(|from| from.tensor(device))?;
        Ok(())
    }

    fn method(&self) -> CacheMethod {
        self.skipping.cache().method()
    }

    /// Whether a change is worth to be measured.
    fn measures(&self, step: usize) -> Option<&Tensor> {
        let may_skip = self.added.is_some() && self.skipping.may_skip(step);
        self.signal.as_ref().filter(|_| may_skip)
    }

    /// What is kept, where that answers the pass; otherwise it is freed before the blocks are computed that make the next one.
    fn answer(&mut self, step: usize, change: Option<f32>) -> Option<&Tensor> {
        let skips = match self.added {
            Some(_) => self.skipping.skips(step, change.map(f64::from)),
            None => false,
        };
        match skips {
            true => self.skipped += 1,
            false => self.forget(),
        }
        self.added.as_ref()
    }

    /// What is compared from now on. A copy: a view would keep the whole batch alive for as long as the session.
    fn compare_with(&mut self, signal: &Tensor, row: usize) -> Result<()> {
        self.signal = Some(signal.narrow(0, row, 1)?.force_contiguous()?);
        Ok(())
    }
}

/// Tokens after the last block, `[rows, tokens, dim]`; rows whose caches answer them are not computed. One number for each
/// row leaves the device, where something is compared.
pub fn through_blocks(rows: &mut [RowCache<'_>], mut blocks: impl Blocks) -> Result<Tensor> {
    let entered = blocks.entered().clone();
    assert_eq!(rows.len(), entered.dim(0)?, "one cache per row: this is a bug of the family");
    let method = rows[0].cache.method();
    let (before, signal) = match method {
        CacheMethod::FirstBlock => {
            let after = blocks.pass_first()?;
            let added = (&after - entered)?;
            (after, Some(added))
        }
        CacheMethod::MagCache => (entered, None),
        CacheMethod::TeaCache => (entered, Some(blocks.signal()?)),
    };
    let changes = changes(rows, signal.as_ref())?;
    let mut computed = Vec::with_capacity(rows.len());
    let mut last = Vec::with_capacity(rows.len());
    for (row, (RowCache { cache, step }, change)) in rows.iter_mut().zip(changes).enumerate() {
        let answer = cache.answer(*step, change).map(|added| before.narrow(0, row, 1)? + added).transpose()?;
        if answer.is_none() {
            computed.push(row);
        }
        // The first block is compared with its last computed pass, a signal with that of the pass before.
        if let Some(signal) = signal.as_ref().filter(|_| answer.is_none() || method == CacheMethod::TeaCache) {
            cache.compare_with(signal, row)?;
        }
        last.push(answer);
    }
    drop(signal);
    if computed.is_empty() {
        return stack(last);
    }
    let tokens = blocks.pass_rest(&computed)?;
    for (place, row) in computed.into_iter().enumerate() {
        let tokens = tokens.narrow(0, place, 1)?;
        rows[row].cache.added = Some((&tokens - before.narrow(0, row, 1)?)?);
        last[row] = Some(tokens);
    }
    stack(last)
}

/// How much of the signal of each row is new; `None` for a row that may not skip anyway.
fn changes(rows: &[RowCache<'_>], signal: Option<&Tensor>) -> Result<Vec<Option<f32>>> {
    let mut measured = Vec::new();
    let mut found = Vec::new();
    for (row, RowCache { cache, step }) in rows.iter().enumerate() {
        if let Some((signal, kept)) = signal.zip(cache.measures(*step)) {
            found.push(relative_l1(&signal.narrow(0, row, 1)?, kept)?);
            measured.push(row);
        }
    }
    let mut changes = vec![None; rows.len()];
    if !found.is_empty() {
        for (row, change) in measured.into_iter().zip(Tensor::stack(&found, 0)?.to_vec1::<f32>()?) {
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
    use crate::diffusion::acceleration::{DEFAULT_MAX_SKIPS, Rule};

    const STEPS: usize = 100;

    /// Rows of two tokens of two values each, all of them this one.
    fn rows(values: &[f32]) -> Tensor {
        let all: Vec<f32> = values.iter().flat_map(|value| [*value; 4]).collect();
        Tensor::from_vec(all, (values.len(), 2, 2), &Device::Cpu).expect("a tensor")
    }

    /// A network of two blocks: the first adds `added` to rows of 1, the other one triples what it gets.
    struct Two<'a> {
        stream: Tensor,
        added: Tensor,
        computed: &'a mut Vec<usize>,
        is_behind_first: bool,
    }

    impl Blocks for Two<'_> {
        fn entered(&self) -> &Tensor {
            &self.stream
        }

        fn signal(&self) -> Result<Tensor> {
            Ok(self.added.clone())
        }

        fn pass_first(&mut self) -> Result<Tensor> {
            self.is_behind_first = true;
            self.stream = (&self.stream + &self.added)?;
            Ok(self.stream.clone())
        }

        fn pass_rest(self, rows: &[usize]) -> Result<Tensor> {
            self.computed.extend_from_slice(rows);
            let x = match self.is_behind_first {
                true => self.stream.clone(),
                false => (&self.stream + &self.added)?,
            };
            Ok((select(&x, rows)? * 3.0)?)
        }
    }

    /// The rows that were computed, and the first value of each row's answer.
    fn pass(caches: &mut [&mut BlockCache], step: usize, added: &[f32]) -> (Vec<usize>, Vec<f32>) {
        let stream = rows(&vec![1.0; added.len()]);
        let mut computed = Vec::new();
        let blocks = Two { stream, added: rows(added), computed: &mut computed, is_behind_first: false };
        let mut caches: Vec<_> = caches.iter_mut().map(|cache| RowCache { cache, step }).collect();
        let answer = through_blocks(&mut caches, blocks);
        let answer = answer.and_then(|x| Ok(x.narrow(1, 0, 1)?.narrow(2, 0, 1)?.flatten_all()?.to_vec1::<f32>()?));
        let rounded = |value: f32| (value * 100.0).round() / 100.0;
        (computed, answer.expect("an answer").into_iter().map(rounded).collect())
    }

    fn cache(rule: Rule) -> BlockCache {
        BlockCache::new(Arc::new(Cache::new(rule, DEFAULT_MAX_SKIPS, 0..STEPS)), 0)
    }

    fn first_block(threshold: f64) -> BlockCache {
        cache(Rule::FirstBlock { threshold })
    }

    #[test]
    fn each_row_decides_for_itself_against_its_last_computed_pass() {
        let (mut a, mut b) = (first_block(0.1), first_block(0.25));
        let mut both = [&mut a, &mut b];
        assert_eq!(pass(&mut both, 0, &[1.0, 1.0]), (vec![0, 1], vec![6.0, 6.0]));
        // 20 % of change: too much for the first, not for the second, which adds the old 4 to what the first block gives.
        assert_eq!(pass(&mut both, 1, &[1.2, 1.2]), (vec![0], vec![6.6, 6.2]));
        // The second is still held against 1, not against the pass that it skipped.
        assert_eq!(pass(&mut both, 2, &[1.25, 1.3]), (vec![1], vec![6.65, 6.9]));
        assert_eq!(pass(&mut both, 3, &[1.25, 1.3]), (vec![], vec![6.65, 6.9]));
        assert_eq!((a.skipped(), b.skipped()), (2, 2));
    }

    #[test]
    fn passes_in_a_row_are_skipped_up_to_the_bound() {
        let mut cache = first_block(0.1);
        let computed: Vec<bool> = (0..9).map(|step| !pass(&mut [&mut cache], step, &[1.0]).0.is_empty()).collect();
        assert_eq!(computed, [true, false, false, false, true, false, false, false, true]);
        assert_eq!((cache.skipped(), DEFAULT_MAX_SKIPS), (6, 3));
    }

    #[test]
    fn ratios_skip_all_blocks_and_add_what_all_have_added() {
        let ratios = [vec![1.0; STEPS], vec![1.0; STEPS]];
        let mut cache = cache(Rule::MagCache { threshold: 0.1, ratios });
        assert_eq!(pass(&mut [&mut cache], 0, &[1.0]), (vec![0], vec![6.0]));
        assert_eq!(pass(&mut [&mut cache], 1, &[9.0]), (vec![], vec![6.0]));
    }

    /// The signal of a skipped pass is what the next one is compared with: small steps add up, and no more.
    #[test]
    fn signals_are_compared_from_pass_to_pass() {
        let rule = || Rule::TeaCache { threshold: 0.35, coefficients: vec![1.0, 0.0] };
        let mut slow = cache(rule());
        let computed: Vec<usize> =
            [1.0, 1.1, 1.21, 1.331, 1.4641].iter().map(|x| pass(&mut [&mut slow], 0, &[*x]).0.len()).collect();
        // 0.1 each: at the fourth change the sum is 0.4, and three in a row were skipped as well.
        assert_eq!(computed, [1, 0, 0, 0, 1]);
        let mut still = cache(rule());
        let computed: Vec<usize> = [1.0, 2.0, 2.0].iter().map(|x| pass(&mut [&mut still], 0, &[*x]).0.len()).collect();
        assert_eq!(computed, [1, 1, 0]);
    }

    #[test]
    fn nothing_is_skipped_at_threshold_0_after_forgetting_or_when_a_value_is_not_finite() {
        let mut cache = first_block(0.0);
        for step in 0..3 {
            assert_eq!(pass(&mut [&mut cache], step, &[1.0]).0, [0]);
        }
        let mut cache = first_block(0.5);
        pass(&mut [&mut cache], 0, &[1.0]);
        cache.forget();
        assert_eq!(pass(&mut [&mut cache], 1, &[1.0]).0, [0]);
        assert_eq!(pass(&mut [&mut cache], 2, &[f32::NAN]).0, [0]);
        assert_eq!(pass(&mut [&mut cache], 3, &[1.0]).0, [0]);
        assert_eq!(pass(&mut [&mut cache], 4, &[1.0]).0, [] as [usize; 0]);
    }
}
