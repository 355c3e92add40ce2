//! How likely tokens were: those of answers as they are sampled, those of prompts as they are read.
//!
//! Owns: the arithmetic, what a session has told and what it still holds back, which rows of a prompt are still wanted. Does
//! not know: how tokens are chosen, steps.

use std::collections::VecDeque;
use std::ops::Range;

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use crate::error::Result;
use crate::request::{PlacedLogprobs, TokenLogprobs};

/// Most rows of a prompt whose logits are there at a time, which bounds the memory that they take.
pub const MAX_PROMPT_ROWS: usize = 32;

/// Of an answer: each token is told with the text that it begins.
#[derive(Debug)]
pub(super) struct AnswerLogprobs {
    top: usize,
    /// Characters of the answer that were given out.
    given: usize,
    /// Of tokens whose text was not.
    held: VecDeque<PlacedLogprobs>,
    /// Whether the last one ends the answer and has no text.
    ends: bool,
}

impl AnswerLogprobs {
    /// Tells of `top` tokens in the place of each.
    pub(super) fn new(top: usize) -> Self {
        Self { top, given: 0, held: VecDeque::new(), ends: false }
    }

    /// Notes a token that came from these logits. So many characters that were not given out yet stand before its own.
    pub(super) fn note(&mut self, token: u32, logits: &[f32], num_held: usize) {
        let logprobs = TokenLogprobs::of(token, logits, self.top);
        self.held.push_back(PlacedLogprobs { offset: self.given + num_held, logprobs });
    }

    /// Those of the tokens whose text is there once `text` is given out; `ends` where the token noted last has none.
    pub(super) fn with_text(&mut self, text: &str, ends: bool) -> Vec<PlacedLogprobs> {
        self.given += text.chars().count();
        self.ends = ends;
        let end = self.held.partition_point(|placed| placed.offset < self.given);
        self.held.drain(..end).collect()
    }

    /// What is left when the answer is whole with this text, which was held back.
    pub(super) fn rest(mut self, text: &str) -> Vec<PlacedLogprobs> {
        if let Some(last) = self.held.back_mut().filter(|_| self.ends) {
            last.offset = self.given + text.chars().count();
        }
        self.held.into()
    }
}

/// Of a prompt: all at once, when the last one is known.
#[derive(Debug)]
pub(super) struct PromptLogprobs {
    top: usize,
    /// Those of the tokens from the second one on that were computed.
    told: Vec<TokenLogprobs>,
}

impl PromptLogprobs {
    /// Tells of `top` tokens in the place of each.
    pub(super) fn new(top: usize) -> Self {
        Self { top, told: Vec::new() }
    }

    /// Of a chunk of a prompt's positions those whose logits are of a token not told yet: a prompt that was preempted is read
    /// again, and told once.
    pub(super) fn wanted(&self, chunk: Range<usize>, num_prompt_tokens: usize) -> Range<usize> {
        let end = chunk.end.min(num_prompt_tokens - 1);
        chunk.start.max(self.told.len()).min(end)..end
    }

    /// Notes the next tokens and their logits; false where those are not finite.
    pub(super) fn note(&mut self, tokens: &[u32], logits: &[Vec<f32>]) -> bool {
        let top = self.top;
        let is_finite = logits.par_iter().all(|row| row.iter().all(|logit| logit.is_finite()));
        if is_finite {
            let told = tokens.par_iter().zip(logits).map(|(token, row)| TokenLogprobs::of(*token, row, top));
            self.told.par_extend(told);
        }
        is_finite
    }

    /// Whether all of a prompt is told.
    pub(super) fn is_whole(&self, num_prompt_tokens: usize) -> bool {
        self.told.len() + 1 == num_prompt_tokens
    }

    /// One for each token from the second one on.
    pub(super) fn into_told(self) -> Vec<TokenLogprobs> {
        self.told
    }
}

impl TokenLogprobs {
    /// From the logits of all tokens, which are finite: their log-softmax.
    fn of(token: u32, logits: &[f32], top: usize) -> Self {
        let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        // The rounding of so many small terms would add up in f32.
        let sum: f64 = logits.iter().map(|logit| f64::from((logit - greatest).exp())).sum();
        let logprob = |logit: f32| (f64::from(logit - greatest) - sum.ln()) as f32;
        let top = most_likely(logits, top).into_iter().map(|(id, logit)| (id, logprob(logit))).collect();
        Self { token, logprob: logprob(logits[token as usize]), top }
    }
}

/// The `count` tokens with the greatest logits, the greatest first; of equal ones the lowest id.
fn most_likely(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (id, logit) in (0u32..).zip(logits.iter().copied()) {
        if best.len() == count && best.last().is_none_or(|(_, least)| logit <= *least) {
            continue;
        }
        let place = best.partition_point(|(_, other)| *other >= logit);
        best.insert(place, (id, logit));
        best.truncate(count);
    }
    best
}

/// Of logits `[rows, vocab]` on any device the rows that are `wanted`, in f32 on the host.
pub(super) fn rows_on_host(logits: &Tensor, wanted: &[bool]) -> Result<Vec<Option<Vec<f32>>>> {
    let rows: Vec<u32> = (0..).zip(wanted).filter(|(_, wanted)| **wanted).map(|(row, _)| row).collect();
    if rows.is_empty() {
        return Ok(vec![None; wanted.len()]);
    }
    let of_rows = match rows.len() == wanted.len() {
        true => logits.clone(),
        false => tale_kernels::embedding(&Tensor::new(rows, logits.device())?, logits)?,
    };
    let mut on_host = on_host(&of_rows)?.into_iter();
    Ok(wanted.iter().map(|wanted| if *wanted { on_host.next() } else { None }).collect())
}

/// Logits `[rows, vocab]` row by row, in f32.
pub(super) fn on_host(logits: &Tensor) -> Result<Vec<Vec<f32>>> {
    Ok(logits.to_dtype(DType::F32)?.to_vec2()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_likely_come_first_and_of_equal_ones_the_lowest_id() {
        let logits = [1.0, 3.0, 2.0, 3.0, -1.0];
        assert_eq!(most_likely(&logits, 3), [(1, 3.0), (3, 3.0), (2, 2.0)]);
        assert_eq!(most_likely(&logits, 0), []);
        assert_eq!(most_likely(&logits, 9).len(), 5);
    }

    #[test]
    fn probabilities_sum_to_one_whatever_the_logits_are() {
        for shift in [0.0, 1e4, -1e4] {
            let logits: Vec<f32> = (0..50_000).map(|id| shift + (id % 97) as f32 / 8.0).collect();
            let TokenLogprobs { logprob, top, .. } = TokenLogprobs::of(96, &logits, 20);
            assert_eq!(top[0], (96, logprob));
            let sum: f64 = (0..97).map(|id| f64::from(TokenLogprobs::of(id, &logits, 0).logprob).exp()).sum();
            let others: f64 =
                (0..50_000 % 97).map(|id| f64::from(TokenLogprobs::of(id, &logits, 0).logprob).exp()).sum();
            assert!((sum * (50_000 / 97) as f64 + others - 1.0).abs() < 1e-5, "{shift}: {sum}");
        }
    }

    #[test]
    fn a_token_is_told_with_the_text_that_it_begins() {
        let mut answer = AnswerLogprobs::new(0);
        let offsets = |told: Vec<PlacedLogprobs>| told.iter().map(|placed| placed.offset).collect::<Vec<_>>();
        // Two tokens of one character, which comes with the second, and text that is held back behind it.
        answer.note(0, &[1.0], 0);
        assert!(answer.with_text("", false).is_empty());
        answer.note(0, &[1.0], 0);
        assert_eq!(offsets(answer.with_text("é", false)), [0, 0]);
        answer.note(0, &[1.0], 0);
        assert!(answer.with_text("", false).is_empty());
        answer.note(0, &[1.0], 2);
        assert_eq!(offsets(answer.with_text("ab", false)), [1]);
        // The end stands behind all text.
        answer.note(0, &[1.0], 0);
        assert!(answer.with_text("", true).is_empty());
        assert_eq!(offsets(answer.rest("cd")), [3, 5]);
    }

    #[test]
    fn each_position_of_a_prompt_is_wanted_once() {
        let mut prompt = PromptLogprobs::new(0);
        assert_eq!(prompt.wanted(0..4, 7), 0..4);
        assert!(prompt.note(&[0; 4], &vec![vec![0.0]; 4]));
        // Preempted, and read again in other chunks.
        assert!(prompt.wanted(0..3, 7).is_empty());
        assert_eq!(prompt.wanted(3..7, 7), 4..6);
        assert!(!prompt.note(&[0; 2], &[vec![0.0], vec![f32::NAN]]));
        assert!(!prompt.is_whole(7));
        assert!(prompt.note(&[0; 2], &[vec![0.0], vec![0.0]]));
        assert!(prompt.is_whole(7));
        assert!(prompt.wanted(7..8, 7).is_empty());
    }
}
