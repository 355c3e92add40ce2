//! torch's CPU random number generator, so that a seed gives the picture that it gives in diffusers.

/// `torch.Generator("cpu")`: MT19937 and torch's normal distribution.
#[derive(Debug, Clone)]
pub struct TorchGenerator {}

impl TorchGenerator {
    /// `torch.Generator("cpu").manual_seed(seed)`.
    pub fn new(_seed: u64) -> Self {
        todo!()
    }

    /// `torch.randn(len, generator=self)` in f32.
    pub fn randn(&mut self, _len: usize) -> Vec<f32> {
        todo!()
    }
}
