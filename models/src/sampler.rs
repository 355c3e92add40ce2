//! From logits to a token: penalties, temperature, top-k, top-p, min-p, and a random stream of the request's own.
//!
//! Owns: the order of these operations and the state of one sequence. Deliberately does not know: batches, other
//! sessions, text. A token depends on the logits, the parameters, the tokens before and the seed alone.
//!
//! The order is that of transformers' logits processors and warpers, which vLLM shares up to min-p:
//! repetition penalty over prompt and answer, frequency and presence penalty over the answer (vLLM
//! `apply_penalties`), temperature, top-k, top-p on what top-k left, min-p, and one categorical draw.

use std::collections::{BTreeMap, BTreeSet};

use crate::request::SamplingParams;

/// The sampling state of one sequence.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    penalties: Penalties,
    random: RandomStream,
}

impl Sampler {
    /// `prompt` counts for the repetition penalty.
    pub fn new(params: &SamplingParams, prompt: &[u32]) -> Self {
        let random = RandomStream::new(params.seed);
        Self { params: params.clone(), penalties: Penalties::new(params, prompt), random }
    }

    /// Chooses the next token from `logits [vocab]` and remembers it for the penalties. NaN counts as impossible; of
    /// equal logits the lower id is the more likely one, so that a temperature of 0 takes the first of them.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let token = if self.penalties.are_off() {
            self.choose(logits)
        } else {
            let mut penalised = logits.to_vec();
            self.penalties.apply(&mut penalised);
            self.choose(&penalised)
        };
        self.penalties.remember(token);
        token
    }

    fn choose(&mut self, logits: &[f32]) -> u32 {
        let best = argmax(logits);
        if self.params.temperature == 0.0 {
            return best;
        }
        let mut scaled = scale(logits, best, self.params.temperature);
        keep_top_k(&mut scaled, self.params.top_k);
        let mut candidates = weigh(&scaled);
        keep_top_p(&mut candidates, self.params.top_p);
        keep_min_p(&mut candidates, self.params.min_p);
        // Empty only where every logit is NaN or minus infinity.
        draw(&candidates, self.random.uniform()).unwrap_or(best)
    }
}

/// What repetition, presence and frequency penalty need to know. Empty while all three are off.
#[derive(Debug, Clone)]
struct Penalties {
    repetition: f32,
    presence: f32,
    frequency: f32,
    prompt: BTreeSet<u32>,
    /// Occurrences in the answer.
    answer: BTreeMap<u32, u32>,
}

impl Penalties {
    fn new(params: &SamplingParams, prompt: &[u32]) -> Self {
        let repetition = params.repetition_penalty;
        let prompt = if repetition == 1.0 { BTreeSet::new() } else { prompt.iter().copied().collect() };
        let (presence, frequency) = (params.presence_penalty, params.frequency_penalty);
        Self { repetition, presence, frequency, prompt, answer: BTreeMap::new() }
    }

    fn are_off(&self) -> bool {
        self.repetition == 1.0 && self.presence == 0.0 && self.frequency == 0.0
    }

    fn remember(&mut self, token: u32) {
        if !self.are_off() {
            *self.answer.entry(token).or_insert(0) += 1;
        }
    }

    /// A prompt may hold ids past `logits` (added tokens that the model has no row for); they have nothing to punish.
    fn apply(&self, logits: &mut [f32]) {
        let only_prompt = self.prompt.iter().filter(|id| !self.answer.contains_key(id));
        for id in only_prompt.chain(self.answer.keys()) {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit = if *logit > 0.0 { *logit / self.repetition } else { *logit * self.repetition };
            }
        }
        for (id, count) in &self.answer {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit -= self.frequency * *count as f32 + self.presence;
            }
        }
    }
}

/// Index of the largest value, the first of equals; 0 where there is none but NaN.
fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, logit) in logits.iter().enumerate() {
        if *logit > best.1 {
            best = (id, *logit);
        }
    }
    best.0 as u32
}

/// A token by how likely it is.
#[derive(Debug, Clone, Copy)]
struct Scaled {
    id: u32,
    /// Logit below the largest one, over the temperature: 0 for the most likely token.
    logit: f32,
}

impl Scaled {
    fn more_likely_first(a: &Self, b: &Self) -> std::cmp::Ordering {
        b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
    }
}

/// All logits but NaN, in order of id. The largest is subtracted before the division, so that a tiny temperature gives
/// the most likely token and no infinities.
fn scale(logits: &[f32], best: u32, temperature: f32) -> Vec<Scaled> {
    let Some(largest) = logits.get(best as usize).map(|x| x.min(f32::MAX)) else { return Vec::new() };
    let scaled = |(id, logit): (usize, &f32)| {
        let logit = if logit.is_nan() { *logit } else { (logit.min(f32::MAX) - largest) / temperature };
        Scaled { id: id as u32, logit }
    };
    let mut all = Vec::with_capacity(logits.len());
    all.extend(logits.iter().enumerate().map(scaled).filter(|scaled| !scaled.logit.is_nan()));
    all
}

/// Keeps the `k` most likely tokens; 0 keeps all.
fn keep_top_k(scaled: &mut Vec<Scaled>, k: usize) {
    if k > 0 && k < scaled.len() {
        scaled.select_nth_unstable_by(k - 1, Scaled::more_likely_first);
        scaled.truncate(k);
        // The draw walks the candidates: their order must not depend on the selection algorithm.
        scaled.sort_unstable_by(Scaled::more_likely_first);
    }
}

/// A token that may be drawn.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    scaled: Scaled,
    /// Probability up to a common factor: 1 for the most likely token.
    weight: f32,
}

/// Tokens with their weights; those that round to nothing are no candidates.
fn weigh(scaled: &[Scaled]) -> Vec<Candidate> {
    let weighed = scaled.iter().map(|scaled| Candidate { scaled: *scaled, weight: scaled.logit.exp() });
    let mut candidates = Vec::with_capacity(scaled.len());
    candidates.extend(weighed.filter(|candidate| candidate.weight > 0.0));
    candidates
}

fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|c| f64::from(c.weight)).sum()
}

/// Keeps the fewest most likely candidates whose probabilities reach `top_p` of the whole, at least one.
///
/// Sorts little of a vocabulary of 128 thousand: the many unlikely candidates that together weigh less than what may be
/// dropped go first, and of the rest one piece after the other is sorted until the sum is reached.
fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f32) {
    const FIRST_PIECE: usize = 256;
    if top_p >= 1.0 || candidates.is_empty() {
        return;
    }
    let order = |a: &Candidate, b: &Candidate| Scaled::more_likely_first(&a.scaled, &b.scaled);
    let total = total(candidates);
    let wanted = f64::from(top_p) * total;
    // Half of the fair share, so that rounding cannot drop one too many.
    let negligible = 0.5 * (total - wanted) / candidates.len() as f64;
    candidates.retain(|c| f64::from(c.weight) >= negligible);
    let (mut sorted, mut piece, mut mass) = (0, FIRST_PIECE, 0.0);
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        if piece < rest.len() {
            rest.select_nth_unstable_by(piece - 1, order);
        }
        let taken = piece.min(rest.len());
        rest[..taken].sort_unstable_by(order);
        for (i, candidate) in rest[..taken].iter().enumerate() {
            mass += f64::from(candidate.weight);
            if mass >= wanted {
                candidates.truncate(sorted + i + 1);
                return;
            }
        }
        sorted += taken;
        piece *= 4;
    }
}

/// Keeps candidates at least `min_p` times as likely as the most likely one, whose weight is 1.
fn keep_min_p(candidates: &mut Vec<Candidate>, min_p: f32) {
    if min_p > 0.0 {
        candidates.retain(|c| c.weight >= min_p.min(1.0));
    }
}

/// One of the candidates with a chance proportional to its weight, by the inverse of the cumulative distribution.
fn draw(candidates: &[Candidate], uniform: f64) -> Option<u32> {
    let mut left = uniform * total(candidates);
    for candidate in candidates {
        left -= f64::from(candidate.weight);
        if left < 0.0 {
            return Some(candidate.scaled.id);
        }
    }
    candidates.last().map(|c| c.scaled.id) // rounding left a crumb
}

/// SplitMix64 (Steele, Lea, Flood 2014): a counter through a mixing function. One draw per token needs no more.
#[derive(Debug, Clone)]
struct RandomStream(u64);

impl RandomStream {
    /// The seed is mixed once, so that streams of neighbouring seeds do not start one draw apart.
    fn new(seed: u64) -> Self {
        Self(Self::mix(seed))
    }

    /// In `[0, 1)`, 53 bits.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (Self::mix(self.0) >> 11) as f64 * 2f64.powi(-53)
    }

    fn mix(mut z: u64) -> u64 {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn drawing(seed: u64) -> SamplingParams {
        SamplingParams { temperature: 1.0, seed, ..SamplingParams::greedy() }
    }

    /// How often each of `N` tokens comes in `draws` draws from the same logits.
    fn frequencies<const N: usize>(params: &SamplingParams, logits: [f32; N], draws: usize) -> [f64; N] {
        let mut sampler = Sampler::new(params, &[]);
        let mut counts = [0.0; N];
        (0..draws).for_each(|_| counts[sampler.sample(&logits) as usize] += 1.0 / draws as f64);
        counts
    }

    fn kept(params: &SamplingParams, logits: &[f32]) -> BTreeSet<u32> {
        let mut sampler = Sampler::new(params, &[]);
        (0..400).map(|_| sampler.sample(logits)).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_equal_logits() {
        assert_eq!(Sampler::new(&SamplingParams::greedy(), &[]).sample(&[1.0, 3.0, 3.0, 2.0]), 1);
    }

    #[test]
    fn not_a_number_is_never_chosen() {
        let logits = [f32::NAN, 1.0, f32::NAN, 2.0];
        assert_eq!(Sampler::new(&SamplingParams::greedy(), &[]).sample(&logits), 3);
        assert_eq!(kept(&drawing(1), &logits), BTreeSet::from([1, 3]));
        assert_eq!(kept(&SamplingParams { top_k: 3, top_p: 0.9, ..drawing(1) }, &logits), BTreeSet::from([1, 3]));
    }

    #[test]
    fn hopeless_and_infinite_logits_do_not_panic() {
        for params in
            [SamplingParams::greedy(), drawing(3), SamplingParams { top_k: 2, top_p: 0.5, min_p: 0.5, ..drawing(3) }]
        {
            let mut sampler = Sampler::new(&params, &[]);
            assert_eq!(sampler.sample(&[f32::NAN; 3]), 0);
            assert_eq!(sampler.sample(&[f32::NEG_INFINITY; 3]), 0);
            assert_eq!(sampler.sample(&[0.0, f32::INFINITY, f32::NEG_INFINITY]), 1);
            assert_eq!(sampler.sample(&[]), 0);
        }
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.0, 1.0, 2.0, -1.0];
        let found = frequencies(&SamplingParams { temperature: 0.7, ..drawing(11) }, logits, 100_000);
        let weights = logits.map(|x| f64::from(x / 0.7).exp());
        for (found, weight) in found.iter().zip(weights) {
            let expected = weight / weights.iter().sum::<f64>();
            // Five standard deviations of a binomial share.
            let bound = 5.0 * (expected * (1.0 - expected) / 100_000.0).sqrt();
            assert!((found - expected).abs() < bound, "{found} is not {expected} +- {bound}");
        }
    }

    #[test]
    fn what_is_kept_is_drawn_in_proportion() {
        // Probabilities .5 .25 .125 .125: top-p .7 keeps the first two.
        let logits = [0.5f32, 0.25, 0.125, 0.125].map(f32::ln);
        let [a, b, c, d] = frequencies(&SamplingParams { top_p: 0.7, ..drawing(5) }, logits, 50_000);
        assert!((a - 2.0 / 3.0).abs() < 0.01 && (b - 1.0 / 3.0).abs() < 0.01 && c + d == 0.0);
    }

    #[test]
    fn top_p_works_on_what_top_k_left() {
        // Of .4 .3 .2 .1, top-k 2 leaves 4/7 and 3/7: then 4/7 reaches a top-p of .5, which .4 alone would not.
        let logits = [0.4f32, 0.3, 0.2, 0.1].map(f32::ln);
        assert_eq!(kept(&SamplingParams { top_p: 0.5, ..drawing(2) }, &logits), BTreeSet::from([0, 1]));
        assert_eq!(kept(&SamplingParams { top_p: 0.5, top_k: 2, ..drawing(2) }, &logits), BTreeSet::from([0]));
    }

    #[test]
    fn min_p_is_relative_to_the_most_likely() {
        let logits = [0.4f32, 0.3, 0.2, 0.1].map(f32::ln);
        assert_eq!(kept(&SamplingParams { min_p: 0.45, ..drawing(2) }, &logits), BTreeSet::from([0, 1, 2]));
        assert_eq!(kept(&SamplingParams { min_p: 1.0, ..drawing(2) }, &logits), BTreeSet::from([0]));
    }

    #[test]
    fn repetition_penalty_counts_the_prompt_and_presence_does_not() {
        let logits = [2.0, 1.9, -1.0];
        let sample = |params: &SamplingParams| Sampler::new(params, &[0, 0, 900]).sample(&logits);
        assert_eq!(sample(&SamplingParams { repetition_penalty: 1.5, ..SamplingParams::greedy() }), 1);
        assert_eq!(
            sample(&SamplingParams { presence_penalty: 1.5, frequency_penalty: 1.5, ..SamplingParams::greedy() }),
            0
        );
    }

    #[test]
    fn repetition_penalty_pushes_negative_logits_down() {
        let mut sampler = Sampler::new(&SamplingParams { repetition_penalty: 2.0, ..SamplingParams::greedy() }, &[0]);
        assert_eq!(sampler.sample(&[-1.0, -1.5]), 1);
    }

    #[test]
    fn frequency_penalty_grows_and_presence_penalty_does_not() {
        let take = |params: SamplingParams| -> Vec<u32> {
            let mut sampler = Sampler::new(&params, &[]);
            (0..6).map(|_| sampler.sample(&[1.0, 0.0])).collect()
        };
        assert_eq!(take(SamplingParams { frequency_penalty: 0.6, ..SamplingParams::greedy() }), [0, 0, 1, 0, 1, 0]);
        assert_eq!(take(SamplingParams { presence_penalty: 0.6, ..SamplingParams::greedy() }), [0, 0, 0, 0, 0, 0]);
        assert_eq!(take(SamplingParams { presence_penalty: 1.5, ..SamplingParams::greedy() }), [0, 1, 0, 0, 0, 0]);
    }

    #[test]
    fn a_tiny_temperature_is_greedy() {
        let params = SamplingParams { temperature: 1e-38, ..drawing(1) };
        assert_eq!(kept(&params, &[50.0, 50.1, -3e38]), BTreeSet::from([1]));
    }

    #[test]
    fn seeds_are_different_streams() {
        let take = |seed| -> Vec<u32> {
            let mut sampler = Sampler::new(&drawing(seed), &[]);
            (0..64).map(|_| sampler.sample(&[0.0; 16])).collect()
        };
        assert_eq!(take(1), take(1));
        assert_ne!(take(1), take(2));
        assert_ne!(take(0), take(u64::MAX));
    }

    /// The kept set by a full sort, as the documentation says it.
    fn kept_by_full_sort(logits: &[f32], top_k: usize, top_p: f32) -> BTreeSet<u32> {
        let mut all = scale(logits, argmax(logits), 1.0);
        all.sort_by(Scaled::more_likely_first);
        all.truncate(if top_k == 0 { usize::MAX } else { top_k });
        let all = weigh(&all);
        let total = total(&all);
        let mut before = 0.0;
        let reached = all.iter().position(|c| {
            before += f64::from(c.weight);
            before >= f64::from(top_p) * total
        });
        let num_kept = if top_p >= 1.0 { all.len() } else { reached.map_or(all.len(), |i| i + 1) };
        all[..num_kept].iter().map(|c| c.scaled.id).collect()
    }

    proptest! {
        #[test]
        fn partial_selection_keeps_what_a_full_sort_keeps(
            logits in prop::collection::vec((-40i8..40).prop_map(|x| f32::from(x) / 8.0), 1..3000),
            top_k in prop_oneof![Just(0), 1usize..4000],
            top_p in prop_oneof![Just(1.0), 0.0f32..1.0],
        ) {
            let mut found = scale(&logits, argmax(&logits), 1.0);
            keep_top_k(&mut found, top_k);
            let mut found = weigh(&found);
            keep_top_p(&mut found, top_p);
            prop_assert!(!found.is_empty());
            let found: BTreeSet<u32> = found.iter().map(|c| c.scaled.id).collect();
            prop_assert_eq!(found, kept_by_full_sort(&logits, top_k, top_p));
        }
    }
}
