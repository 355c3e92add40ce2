//! What a network sees of one guidance branch of one session.

use candle_core::Tensor;

use crate::diffusion::DiffusionRequest;

/// One row of a denoising batch.
pub struct DenoiseRow<'a, C> {
    /// `[1, ...]` f32, scaled as the solver wants the model to see them.
    pub latents: &'a Tensor,
    /// In the solver's unit (0..1000 for the flow-matching families).
    pub timestep: f64,
    /// Of this row's guidance branch.
    pub conditioning: &'a C,
    /// Of this row's session.
    pub request: &'a DiffusionRequest,
}
