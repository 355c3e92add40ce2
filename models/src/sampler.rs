//! What a sequence brings to the choice of its next token: its parameters, the tokens that were there before, and a
//! random stream of its own.
//!
//! Owns: the state of one sequence. Deliberately does not know: batches, text, nor what temperature, top-k or a penalty
//! mean ([`tale_kernels::sample`] does, on the device of the logits). A token depends on the logits, the parameters, the
//! tokens before and the seed alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::Tensor;
use tale_kernels::{Choice, Draw, Mask, Penalties};

use crate::error::Result;
use crate::request::SamplingParams;

/// The sampling state of one sequence.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    biases: Arc<[(u32, f32)]>,
    early: Early,
    seen: Seen,
    random: RandomStream,
}

/// The turn of one sequence to choose its next token.
pub struct Turn<'a> {
    /// Its own.
    pub sampler: &'a mut Sampler,
    /// The only tokens that may come; all when absent.
    pub allowed: Option<Mask>,
}

/// Chooses the next token of each turn from its row of `logits [rows, vocab]`, which may be on any device; each sampler
/// remembers its own for the penalties.
pub fn sample(logits: &Tensor, turns: Vec<Turn<'_>>) -> Result<Vec<Choice>> {
    let (mut samplers, mut draws) = (Vec::with_capacity(turns.len()), Vec::with_capacity(turns.len()));
    for Turn { sampler, allowed } in turns {
        draws.push(Draw { allowed, ..sampler.draw() });
        samplers.push(sampler);
    }
    let choices = tale_kernels::sample(logits, &draws)?;
    for (sampler, choice) in samplers.iter_mut().zip(&choices) {
        sampler.seen.remember(choice.token);
    }
    Ok(choices)
}

impl Sampler {
    /// `prompt` counts for the repetition penalty.
    pub fn new(params: &SamplingParams, prompt: &[u32]) -> Self {
        let random = RandomStream::new(params.seed);
        let biases: Arc<[(u32, f32)]> = params.logit_bias.as_slice().into();
        let seen = Seen::new(params, prompt);
        Self { params: params.clone(), biases, early: Early::default(), seen, random }
    }

    /// The first `min_tokens` tokens are none of `ends`.
    pub fn ends_no_sooner(mut self, min_tokens: usize, ends: impl Iterator<Item = u32>) -> Self {
        let ends: BTreeSet<u32> = ends.collect();
        let others = self.biases.iter().copied().filter(|(id, _)| !ends.contains(id));
        let forbidden = ends.iter().map(|id| (*id, f32::NEG_INFINITY));
        self.early = Early { biases: others.chain(forbidden).collect(), tokens: min_tokens };
        self
    }

    /// How the next token is chosen. Takes one number from the stream unless the choice is greedy.
    fn draw(&mut self) -> Draw {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = self.params;
        let random = if temperature == 0.0 { 0 } else { self.random.next() };
        let penalties = self.seen.counts_if_punished().map(|counts| Penalties {
            repetition: self.params.repetition_penalty,
            presence: self.params.presence_penalty,
            frequency: self.params.frequency_penalty,
            counts,
        });
        let biases = if self.early.tokens > 0 { self.early.biases.clone() } else { self.biases.clone() };
        self.early.tokens = self.early.tokens.saturating_sub(1);
        Draw { temperature, top_k, top_p, min_p, random, biases, penalties, allowed: None }
    }
}

/// The first tokens of an answer, which do not end it.
#[derive(Debug, Clone, Default)]
struct Early {
    /// Those of the request, and what is forbidden.
    biases: Arc<[(u32, f32)]>,
    /// How many are left.
    tokens: usize,
}

/// The tokens that penalties are about. Empty while all are off.
#[derive(Debug, Clone)]
struct Seen {
    is_punished: bool,
    prompt: BTreeSet<u32>,
    /// Occurrences in the answer.
    answer: BTreeMap<u32, u32>,
}

impl Seen {
    fn new(params: &SamplingParams, prompt: &[u32]) -> Self {
        let repetition = params.repetition_penalty != 1.0;
        let is_punished = repetition || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        let prompt = if repetition { prompt.iter().copied().collect() } else { BTreeSet::new() };
        Self { is_punished, prompt, answer: BTreeMap::new() }
    }

    fn remember(&mut self, token: u32) {
        if self.is_punished {
            *self.answer.entry(token).or_insert(0) += 1;
        }
    }

    /// All tokens with their occurrences in the answer, if there is a penalty.
    fn counts_if_punished(&self) -> Option<Vec<(u32, u32)>> {
        let only_prompt = self.prompt.iter().filter(|id| !self.answer.contains_key(id)).map(|id| (*id, 0));
        let answer = self.answer.iter().map(|(id, count)| (*id, *count));
        self.is_punished.then(|| only_prompt.chain(answer).collect())
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): a counter through a mixing function. One draw per token needs no more.
#[derive(Debug, Clone)]
struct RandomStream(u64);

impl RandomStream {
    /// The seed is mixed once, so that streams of neighbouring seeds do not start one draw apart.
    fn new(seed: u64) -> Self {
        Self(Self::mix(seed))
    }

    /// Uniform over all 64-bit numbers.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        Self::mix(self.0)
    }

    fn mix(mut z: u64) -> u64 {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    impl Sampler {
        /// From a row of one.
        fn sample(&mut self, logits: &[f32]) -> u32 {
            let logits = Tensor::from_slice(logits, (1, logits.len()), &Device::Cpu).expect("a row");
            sample(&logits, vec![self.turn()]).expect("sampled")[0].token
        }

        fn turn(&mut self) -> Turn<'_> {
            Turn { sampler: self, allowed: None }
        }
    }

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
    fn top_p_of_0_is_the_most_likely_token() {
        let logits = [1.0, 3.0, 2.0, 2.9];
        assert_eq!(kept(&SamplingParams { top_p: 0.0, ..drawing(6) }, &logits), BTreeSet::from([1]));
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
    fn a_bias_is_added_each_time() {
        let biased = |bias| SamplingParams { logit_bias: vec![(1, bias)], ..SamplingParams::greedy() };
        let take = |bias| {
            let mut sampler = Sampler::new(&biased(bias), &[]);
            (0..3).map(|_| sampler.sample(&[1.0, 0.0, 0.5])).collect::<Vec<_>>()
        };
        assert_eq!((take(0.5), take(1.5), take(-100.0)), (vec![0; 3], vec![1; 3], vec![0; 3]));
    }

    #[test]
    fn an_answer_ends_no_sooner_than_it_may() {
        let params = SamplingParams { logit_bias: vec![(2, 1.0), (0, 100.0)], ..SamplingParams::greedy() };
        let mut sampler = Sampler::new(&params, &[]).ends_no_sooner(2, [0, 7, 0].into_iter());
        let tokens: Vec<u32> = (0..4).map(|_| sampler.sample(&[9.0, 1.0, 0.5])).collect();
        assert_eq!(tokens, [2, 2, 0, 0]);
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

    #[test]
    fn rows_are_their_samplers_own() {
        let logits = Tensor::from_vec(vec![0.0f32, 1.0, 2.0, 2.0, 1.0, 0.0], (2, 3), &Device::Cpu).expect("rows");
        let mut first = Sampler::new(&SamplingParams { presence_penalty: 1.5, ..SamplingParams::greedy() }, &[]);
        let mut second = Sampler::new(&SamplingParams::greedy(), &[]);
        let mut take = || -> Vec<u32> {
            let choices = sample(&logits, vec![first.turn(), second.turn()]).expect("sampled");
            choices.iter().map(|choice| choice.token).collect()
        };
        assert_eq!((take(), take()), (vec![2, 0], vec![1, 0]));
    }
}
