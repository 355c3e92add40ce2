//! From logits to tokens: biases, penalties, temperature, top-k, top-p, min-p, and one categorical draw.
//!
//! Owns: the order of these operations and what each of them means. Does not know: requests, where random numbers come
//! from, which tokens an answer holds. A row's token depends on its logits and its [`Draw`] alone.
//!
//! The order is that of transformers' logits processors and warpers, which vLLM shares up to min-p: biases, repetition
//! penalty over prompt and answer, frequency and presence penalty over the answer (vLLM `apply_penalties`), temperature, top-k,
//! top-p on what top-k left, min-p, and one draw.
//!
//! Tokens that a row's mask forbids are as good as minus infinity from the start, so that every cut is made among those
//! that are allowed, and the draw is exactly the distribution of the allowed ones.
//!
//! Everything that decides is an integer, made by operations that round the same everywhere, so that neither the order
//! of a sum nor the device changes a token: how far a logit lies below the largest is counted in steps of 2^-27 nats,
//! the probability relative to the most likely token in units of 2^-40, and the draw is a 64-bit number.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor, bail};

#[cfg(gpu)]
use crate::gpu;
use crate::parallel::{Shared, for_each};
use crate::view::View;
use crate::work::is_dry;

#[cfg(gpu)]
mod launch;

/// Largest vocabulary: sums of that many weights fit into 64 bits, and ids into two digits of a histogram.
const MAX_VOCAB: usize = 1 << 22;

/// How the token of one row is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Draw {
    /// 0 takes the largest logit, of equals the first.
    pub temperature: f32,
    /// Keep the k most likely tokens, of equals the first; 0 keeps all.
    pub top_k: usize,
    /// Keep the fewest most likely tokens whose probabilities reach this share of what top-k left; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this times the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Uniform over all 64-bit numbers; unused at temperature 0.
    pub random: u64,
    /// Added to the logits of these tokens, each once, before anything else; minus infinity forbids one. Ids past the
    /// vocabulary have nothing to add to.
    pub biases: Arc<[(u32, f32)]>,
    /// Changes to logits after that.
    pub penalties: Option<Penalties>,
    /// The only tokens that may be chosen; all when absent.
    pub allowed: Option<Mask>,
}

/// A set of tokens, one bit each: that of a token is bit `id % 32` of word `id / 32`. Ids past the end are not in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask(Vec<u32>);

impl Mask {
    /// Of these words.
    pub fn new(words: Vec<u32>) -> Self {
        Self(words)
    }

    /// Whether the token is in it.
    pub fn allows(&self, id: u32) -> bool {
        self.0.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    /// The words.
    pub fn words(&self) -> &[u32] {
        &self.0
    }

    fn apply(&self, logits: &mut [f32]) {
        for (id, logit) in logits.iter_mut().enumerate() {
            if !self.allows(id as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// Changes to the logits of tokens that were there before.
#[derive(Debug, Clone, PartialEq)]
pub struct Penalties {
    /// Divides positive and multiplies negative logits of all listed tokens.
    pub repetition: f32,
    /// Subtracted once from tokens of the answer.
    pub presence: f32,
    /// Subtracted once per occurrence in the answer.
    pub frequency: f32,
    /// Tokens of prompt and answer, each once, with their occurrences in the answer. Ids past the vocabulary (added
    /// tokens that the model has no row for) have nothing to punish.
    pub counts: Vec<(u32, u32)>,
}

/// What came of a row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Choice {
    /// Never one that is forbidden or whose logit is NaN or minus infinity, unless all are: then 0.
    pub token: u32,
    /// Whether all logits of the row were, those of forbidden tokens too.
    pub is_finite: bool,
}

/// The next token of each row of `logits [rows, vocab]` (f32, f16 or bf16). On a GPU only the choices leave the device.
pub fn sample(logits: &Tensor, draws: &[Draw]) -> Result<Vec<Choice>> {
    let (rows, vocab) = logits.dims2()?;
    if rows != draws.len() || vocab > MAX_VOCAB {
        let (logits, draws) = (logits.shape(), draws.len());
        bail!("sample: logits {logits:?} for {draws} draws; a row each is needed, of at most {MAX_VOCAB} values");
    }
    if is_dry() {
        return Ok(vec![Choice { token: 0, is_finite: true }; rows]);
    }
    #[cfg(gpu)]
    if gpu::runs_here(logits) {
        return launch::sample(logits, draws);
    }
    let logits = logits.to_dtype(DType::F32)?.contiguous()?;
    let view = View::contiguous("sample", &logits)?;
    let values = view.f32()?;
    let mut choices = vec![Choice::default(); rows];
    let shared = Shared::new(&mut choices);
    for_each(rows, values.len(), |row| {
        // SAFETY: every task has its own row.
        let choice = unsafe { shared.slice(row, 1) };
        choice[0] = choose_row(&values[row * vocab..(row + 1) * vocab], &draws[row]);
    });
    Ok(choices)
}

fn choose_row(logits: &[f32], draw: &Draw) -> Choice {
    let is_finite = logits.iter().all(|logit| logit.is_finite());
    if !draw.adjusts() {
        return Choice { token: choose(logits, draw), is_finite };
    }
    let mut adjusted = logits.to_vec();
    draw.adjust(&mut adjusted);
    Choice { token: choose(&adjusted, draw), is_finite }
}

impl Draw {
    /// Whether it changes logits before it chooses.
    fn adjusts(&self) -> bool {
        !self.biases.is_empty() || self.penalties.is_some() || self.allowed.is_some()
    }

    fn adjust(&self, logits: &mut [f32]) {
        for (id, bias) in self.biases.iter() {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit += bias;
            }
        }
        if let Some(penalties) = &self.penalties {
            penalties.apply(logits);
        }
        if let Some(allowed) = &self.allowed {
            allowed.apply(logits);
        }
    }
}

fn choose(logits: &[f32], draw: &Draw) -> u32 {
    let best = argmax(logits);
    if draw.temperature == 0.0 {
        return best;
    }
    let mut ranks = rank(logits, best, draw.temperature);
    keep_top_k(&mut ranks, draw.top_k);
    let mut candidates: Vec<Candidate> = ranks.into_iter().map(Candidate::of).collect();
    keep_top_p(&mut candidates, draw.top_p);
    keep_min_p(&mut candidates, draw.min_p);
    // Empty only where every logit is NaN or minus infinity.
    pick(candidates, draw.random).unwrap_or(best)
}

impl Penalties {
    fn apply(&self, logits: &mut [f32]) {
        for (id, count) in &self.counts {
            let Some(logit) = logits.get_mut(*id as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / self.repetition } else { *logit * self.repetition };
            if *count > 0 {
                *logit -= self.frequency * *count as f32 + self.presence;
            }
        }
    }
}

/// Index of the largest value, the first of equals; 0 where there is none but NaN and minus infinity.
fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, logit) in logits.iter().enumerate() {
        if *logit > best.1 {
            best = (id, *logit);
        }
    }
    best.0 as u32
}

/// Tokens further below the most likely one (1 in 5 * 10^11) are never drawn.
const MAX_NATS: f32 = 27.0;
/// A power of two: multiplying with it is exact.
const STEPS_PER_NAT: f32 = (1u32 << 27) as f32;
/// The weight of the most likely token.
const FULL_WEIGHT: u64 = 1 << 40;

/// How likely a token is: the smaller, the more. Steps below the largest logit, then the id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    steps: u32,
    id: u32,
}

/// The tokens that may be drawn at all, in order of id. The largest logit is subtracted before the division, so that a
/// tiny temperature gives the most likely token and no infinities.
fn rank(logits: &[f32], best: u32, temperature: f32) -> Vec<Rank> {
    let Some(largest) = logits.get(best as usize).map(|logit| logit.min(f32::MAX)) else { return Vec::new() };
    let mut ranks = Vec::with_capacity(logits.len());
    for (id, logit) in logits.iter().enumerate() {
        let nats = (largest - logit.min(f32::MAX)) / temperature;
        if !logit.is_nan() && nats <= MAX_NATS {
            // Rounded up, so that only equals of the largest have 0.
            ranks.push(Rank { steps: (nats * STEPS_PER_NAT).ceil() as u32, id: id as u32 });
        }
    }
    ranks
}

/// Keeps the `k` most likely tokens; 0 keeps all.
fn keep_top_k(ranks: &mut Vec<Rank>, k: usize) {
    if k > 0 && k < ranks.len() {
        ranks.select_nth_unstable(k - 1);
        ranks.truncate(k);
    }
}

/// A token that may be drawn.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    rank: Rank,
    /// Probability up to a common factor, [`FULL_WEIGHT`] for the most likely token.
    weight: u64,
}

impl Candidate {
    fn of(rank: Rank) -> Self {
        Self { rank, weight: weight(rank.steps) }
    }
}

/// `2^40 exp(-steps / 2^27)`: multiplications and additions of f32 in this order and no other, which round the same on
/// every device. With `x = n ln 2 + r`: Taylor's series of `exp(r)` to 24 bits, shifted by n.
fn weight(steps: u32) -> u64 {
    /// Ten bits, so that products with n are exact; and what is missing of ln 2.
    const LN_2: (f32, f32) = (355.0 / 512.0, -2.121_944_4e-4);
    let x = -(steps as f32 / STEPS_PER_NAT);
    let n = (x * std::f32::consts::LOG2_E - 0.5) as i32;
    let r = x - n as f32 * LN_2.0 - n as f32 * LN_2.1;
    let mut power = 1.0 / 720.0;
    for factor in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        power = power * r + factor;
    }
    ((power * (1 << 24) as f32) as u64) << 16 >> -n
}

fn total(candidates: &[Candidate]) -> u64 {
    candidates.iter().map(|candidate| candidate.weight).sum()
}

/// Of weights that sum to `total`, how much a share is: rounded up, and more than nothing.
fn share_of(total: u64, share: f32) -> u64 {
    ((f64::from(share) * total as f64).ceil() as u64).max(1)
}

/// Keeps the fewest most likely candidates whose probabilities reach `top_p` of the whole, at least one.
///
/// Weights are summed by how likely they are, in bins of a 64th of a nat, and only the bin in which the sum is reached
/// is sorted: little of a vocabulary of 128 thousand.
fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f32) {
    const BIN_STEPS: u32 = 1 << 21;
    if top_p >= 1.0 || candidates.is_empty() {
        return;
    }
    let mut bins = [0; (MAX_NATS * STEPS_PER_NAT) as usize / BIN_STEPS as usize + 1];
    for candidate in candidates.iter() {
        bins[(candidate.rank.steps / BIN_STEPS) as usize] += candidate.weight;
    }
    let mut wanted = share_of(bins.iter().sum(), top_p);
    let Some(last_bin) = bins.iter().position(|weight| {
        let reached = *weight >= wanted;
        wanted -= if reached { 0 } else { *weight };
        reached
    }) else {
        return; // the share was rounded up to more than the whole
    };
    let mut in_last_bin: Vec<Candidate> =
        candidates.iter().filter(|c| (c.rank.steps / BIN_STEPS) as usize == last_bin).copied().collect();
    in_last_bin.sort_unstable_by_key(|candidate| candidate.rank);
    let last = in_last_bin.iter().find(|candidate| {
        let reached = candidate.weight >= wanted;
        wanted -= if reached { 0 } else { candidate.weight };
        reached
    });
    let last = last.expect("the bin's weights reach what is wanted: this is a bug").rank;
    candidates.retain(|candidate| candidate.rank <= last);
}

/// The smallest weight that min-p keeps.
fn min_weight(min_p: f32) -> u64 {
    (f64::from(min_p.min(1.0)) * FULL_WEIGHT as f64).ceil() as u64
}

/// Keeps candidates at least `min_p` times as likely as the most likely token.
fn keep_min_p(candidates: &mut Vec<Candidate>, min_p: f32) {
    candidates.retain(|candidate| candidate.weight >= min_weight(min_p));
}

/// One of the candidates with a chance proportional to its weight: in order of id, the first at which the sum of
/// weights exceeds `random / 2^64` of the whole.
fn pick(mut candidates: Vec<Candidate>, random: u64) -> Option<u32> {
    candidates.sort_unstable_by_key(|candidate| candidate.rank.id);
    let mut left = ((u128::from(random) * u128::from(total(&candidates))) >> 64) as u64;
    let drawn = candidates.iter().find(|candidate| {
        let reached = left < candidate.weight;
        left -= if reached { 0 } else { candidate.weight };
        reached
    });
    drawn.map(|candidate| candidate.rank.id)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{On, for_each_device};

    /// The token as the documentation says it: everything sorted, nothing left out that need not be.
    fn specified(logits: &[f32], draw: &Draw) -> u32 {
        let mut logits = logits.to_vec();
        draw.adjust(&mut logits);
        let best = argmax(&logits);
        if draw.temperature == 0.0 {
            return best;
        }
        let mut kept = sorted_and_cut(&logits, draw);
        kept.sort_by_key(|(_, id)| *id);
        let whole: u64 = kept.iter().map(|(weight, _)| weight).sum();
        let drawn = (draw.random as f64 / 2f64.powi(64) * whole as f64) as u64;
        let exact = ((u128::from(draw.random) * u128::from(whole)) >> 64) as u64;
        assert!(drawn.abs_diff(exact) <= 1 + whole / (1 << 50), "{drawn} is far from {exact}");
        let mut sum = 0;
        let reached = kept.iter().find(|(weight, _)| {
            sum += weight;
            sum > exact
        });
        reached.map_or(best, |(_, id)| *id)
    }

    /// Weights and ids of what may be drawn, the most likely first.
    fn sorted_and_cut(logits: &[f32], draw: &Draw) -> Vec<(u64, u32)> {
        let mut all = rank(logits, argmax(logits), draw.temperature);
        all.sort();
        all.truncate(if draw.top_k == 0 { usize::MAX } else { draw.top_k });
        let mut kept: Vec<_> = all.iter().map(|rank| (weight(rank.steps), rank.id)).collect();
        if draw.top_p < 1.0 {
            let wanted = share_of(kept.iter().map(|(weight, _)| weight).sum(), draw.top_p);
            let mut sum = 0;
            let reached = kept.iter().position(|(weight, _)| {
                sum += weight;
                sum >= wanted
            });
            kept.truncate(reached.map_or(kept.len(), |place| place + 1));
        }
        kept.retain(|(weight, _)| *weight as f64 >= f64::from(draw.min_p) * FULL_WEIGHT as f64);
        kept
    }

    /// SplitMix64, as requests draw from it.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }

        fn below(&mut self, bound: usize) -> usize {
            (self.next() % bound as u64) as usize
        }

        /// Between 0 and 1.
        fn share(&mut self) -> f32 {
            (self.next() >> 40) as f32 / (1u32 << 24) as f32
        }

        /// A row of logits about as wide as those of a language model; every fourth with many ties, every eighth with
        /// values that are no numbers.
        fn logits(&mut self, vocab: usize) -> Vec<f32> {
            let kind = self.below(8);
            let mut value = || {
                let normal = (0..6).map(|_| self.share()).sum::<f32>() * 4.0 - 12.0;
                match (kind, self.below(20)) {
                    (0 | 1, _) => (normal / 2.0).round(),
                    (2, 0) => f32::NAN,
                    (2, 1) => f32::NEG_INFINITY,
                    _ => normal * 2.0,
                }
            };
            (0..vocab).map(|_| value()).collect()
        }

        fn draw(&mut self, vocab: usize) -> Draw {
            Draw {
                temperature: [0.0, 0.3, 0.7, 1.0, 1.9][self.below(5)],
                top_k: [0, 1, 2, 50, self.below(vocab + 2)][self.below(5)],
                top_p: [1.0, 0.0, 0.5, 0.95, self.share()][self.below(5)],
                min_p: [0.0, 0.0, 0.05, 1.0, self.share()][self.below(5)],
                random: self.next(),
                biases: if self.below(3) == 0 { self.biases(vocab) } else { Arc::default() },
                penalties: (self.below(3) == 0).then(|| self.penalties(vocab)),
                allowed: (self.below(3) == 0).then(|| self.mask(vocab)),
            }
        }

        /// Of some tokens, the last of which the vocabulary does not have.
        fn biases(&mut self, vocab: usize) -> Arc<[(u32, f32)]> {
            let step = 1 + self.below(vocab);
            let bias = |id| (id as u32, [1.7, -0.6, -100.0, f32::NEG_INFINITY][self.below(4)]);
            (0..=vocab).step_by(step).map(bias).collect()
        }

        /// From one token to nearly all; now and then too short for the vocabulary, or without a token.
        fn mask(&mut self, vocab: usize) -> Mask {
            let words = [vocab.div_ceil(32), vocab.div_ceil(64)][self.below(8) / 7];
            let one = self.below(vocab);
            let word = |kind: usize, random: u64, word: usize| match kind {
                0 if word == one / 32 => 1 << (one % 32),
                0 => 0,
                1 => random as u32,
                _ => random as u32 | (random >> 32) as u32,
            };
            let kind = self.below(3);
            Mask::new((0..words).map(|at| word(kind, self.next(), at)).collect())
        }

        /// Of some tokens, the last of which the vocabulary does not have.
        fn penalties(&mut self, vocab: usize) -> Penalties {
            let step = 1 + self.below(vocab);
            let counts = (0..=vocab).step_by(step).map(|id| (id as u32, self.below(4) as u32)).collect();
            Penalties {
                repetition: [1.0, 1.3][self.below(2)],
                presence: [0.0, 0.7][self.below(2)],
                frequency: [0.0, 0.4][self.below(2)],
                counts,
            }
        }
    }

    fn check_on(on: &On, seed: u64, rows: usize, vocab: usize) {
        let mut random = Random(seed);
        let logits: Vec<f32> = (0..rows).flat_map(|_| random.logits(vocab)).collect();
        let draws: Vec<Draw> = (0..rows).map(|_| random.draw(vocab)).collect();
        let logits = Tensor::from_vec(logits, (rows, vocab), &Device::Cpu).unwrap();
        let expected: Vec<Vec<f32>> = on.rounded(&logits).to_vec2().unwrap();
        let logits = on.tensor(&logits);
        let found = on.run(|| sample(&logits, &draws));
        for (row, (logits, draw)) in expected.iter().zip(&draws).enumerate() {
            let is_finite = logits.iter().all(|logit| logit.is_finite());
            let expected = Choice { token: specified(logits, draw), is_finite };
            assert_eq!(found[row], expected, "vocabulary of {vocab}, seed {seed}, row {row}: {draw:?}");
        }
    }

    for_each_device!(tokens_are_the_specified_ones, |on: &On| {
        for (vocab, rows, seeds) in [(1, 7, 3), (7, 100, 12), (1000, 64, 12), (5003, 24, 4)] {
            for seed in 0..seeds {
                check_on(on, seed, rows, vocab);
            }
        }
    });

    for_each_device!(a_vocabulary_of_one_value_many_times_is_drawn_from_evenly, |on: &On| {
        let logits = on.tensor(&Tensor::full(0.5f32, (256, 4000), &Device::Cpu).unwrap());
        let draw = |row: u64| Draw {
            temperature: 1.0,
            top_k: 3000,
            top_p: 0.5,
            min_p: 0.0,
            random: row << 56,
            biases: Arc::default(),
            penalties: None,
            allowed: None,
        };
        let draws: Vec<Draw> = (0..256).map(draw).collect();
        let tokens: Vec<u32> = on.run(|| sample(&logits, &draws)).iter().map(|choice| choice.token).collect();
        let expected: Vec<u32> = (0..256).map(|row| row * 1500 / 256).collect();
        assert_eq!(tokens, expected);
    });

    for_each_device!(rows_without_hope_choose_the_first_token, |on: &On| {
        for value in [f32::NAN, f32::NEG_INFINITY] {
            let logits = on.tensor(&Tensor::full(value, (2, 40), &Device::Cpu).unwrap());
            let mut random = Random(1);
            let draws = [random.draw(40), Draw { temperature: 0.7, top_k: 3, ..random.draw(40) }];
            let found = on.run(|| sample(&logits, &draws));
            assert_eq!(found, [Choice { token: 0, is_finite: false }; 2]);
        }
        let none = on.tensor(&Tensor::zeros((1, 0), DType::F32, &Device::Cpu).unwrap());
        let found = on.run(|| sample(&none, &[Random(2).draw(1)]));
        assert_eq!(found, [Choice { token: 0, is_finite: true }]);
    });

    for_each_device!(a_bias_comes_before_penalties, |on: &On| {
        let logits = on.tensor(&Tensor::new(&[[1f32, 4.0, 2.0]; 3], &Device::Cpu).unwrap());
        let draw = |biases: &[(u32, f32)], repetition: f32, counts: &[(u32, u32)]| {
            let penalties = Penalties { repetition, presence: 0.0, frequency: 0.0, counts: counts.to_vec() };
            let (biases, penalties) = (biases.into(), Some(penalties));
            Draw { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, random: 0, biases, penalties, allowed: None }
        };
        let draws = [
            draw(&[(1, f32::NEG_INFINITY), (9, 1.0)], 1.0, &[]),
            // Half of 1 and 4 is less than 4; 4 and half of 1 would be more.
            draw(&[(0, 4.0)], 2.0, &[(0, 0)]),
            draw(&[(0, 3.5)], 1.0, &[]),
        ];
        let tokens: Vec<u32> = on.run(|| sample(&logits, &draws)).iter().map(|choice| choice.token).collect();
        assert_eq!(tokens, [2, 1, 0]);
    });

    for_each_device!(a_forbidden_token_is_never_chosen, |on: &On| {
        // The most likely token of each row, and of all but a few, is forbidden.
        let row: Vec<f32> = (0..500).map(|id| -(id as f32) / 50.0).collect();
        let logits = on.tensor(&Tensor::from_vec(row.repeat(64), (64, 500), &Device::Cpu).unwrap());
        let allowed = [3, 33, 64, 499];
        let mut words = vec![0; 16];
        allowed.iter().for_each(|id: &usize| words[id / 32] |= 1 << (id % 32));
        let mask = Mask::new(words);
        let mut random = Random(9);
        let draws: Vec<Draw> = (0..64)
            .map(|row| Draw {
                allowed: Some(mask.clone()),
                min_p: 0.0,
                biases: Arc::default(),
                penalties: None,
                top_k: row % 3,
                ..random.draw(500)
            })
            .collect();
        let found = on.run(|| sample(&logits, &draws));
        for (choice, draw) in found.iter().zip(&draws) {
            assert!(allowed.contains(&(choice.token as usize)) && choice.is_finite, "{choice:?}: {draw:?}");
            if draw.temperature == 0.0 || draw.top_k == 1 {
                assert_eq!(choice.token, 3);
            }
        }
        assert!(found.iter().any(|choice| choice.token == 64 || choice.token == 33));
    });

    #[test]
    fn weights_are_exponentials_that_begin_at_one() {
        assert_eq!(weight(0), FULL_WEIGHT);
        for steps in (0..MAX_NATS as u32 * (1 << 27)).step_by(99_991) {
            let nats = f64::from(steps) / f64::from(STEPS_PER_NAT);
            let expected = (-nats).exp() * FULL_WEIGHT as f64;
            let difference = (weight(steps) as f64 - expected).abs();
            // Half a unit in the last place of the distance, and some of the result.
            assert!(
                difference <= 1.0 + expected * (nats * 2f64.powi(-24) + 3e-7),
                "{steps} steps: {difference} off {expected}"
            );
        }
        assert!(weight((MAX_NATS * STEPS_PER_NAT) as u32) > 0);
    }

    #[test]
    fn draws_that_do_not_fit_the_rows_are_refused() {
        let logits = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        let error = sample(&logits, &[Random(1).draw(3)]).unwrap_err().to_string();
        assert!(error.contains("sample") && error.contains("[2, 3]") && error.contains("1 draws"), "{error}");
    }

    proptest! {
        #[test]
        fn partial_selection_keeps_what_a_full_sort_keeps(
            logits in prop::collection::vec((-40i8..40).prop_map(|x| f32::from(x) / 8.0), 1..3000),
            top_k in prop_oneof![Just(0), 1usize..4000],
            top_p in prop_oneof![Just(1.0), 0.0f32..1.0],
            min_p in prop_oneof![Just(0.0), 0.0f32..1.0],
        ) {
            let draw = Draw { temperature: 1.0, top_k, top_p, min_p, random: 0, biases: Arc::default(), penalties: None, allowed: None };
            let mut found = rank(&logits, argmax(&logits), 1.0);
            keep_top_k(&mut found, top_k);
            let mut found: Vec<Candidate> = found.into_iter().map(Candidate::of).collect();
            keep_top_p(&mut found, top_p);
            keep_min_p(&mut found, min_p);
            let mut found: Vec<u32> = found.iter().map(|candidate| candidate.rank.id).collect();
            let mut expected: Vec<u32> = sorted_and_cut(&logits, &draw).iter().map(|(_, id)| *id).collect();
            prop_assert!(!found.is_empty());
            found.sort();
            expected.sort();
            prop_assert_eq!(found, expected);
        }
    }
}
