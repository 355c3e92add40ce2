//! From logits to a token: penalties, temperature, top-k, top-p, min-p, and a random stream of the request's own.

use crate::request::SamplingParams;

/// The sampling state of one sequence.
#[derive(Debug, Clone)]
pub struct Sampler {}

impl Sampler {
    /// `prompt` counts for the repetition penalty.
    pub fn new(_params: &SamplingParams, _prompt: &[u32]) -> Self {
        todo!()
    }

    /// Chooses the next token from `logits [vocab]` and remembers it for the penalties.
    pub fn sample(&mut self, _logits: &[f32]) -> u32 {
        todo!()
    }
}
