//! Solvers: from a model's predictions along a list of timesteps to a sample. One file each, held against diffusers.

use candle_core::Tensor;

use crate::error::Result;

pub mod flow_match_euler;
pub mod unipc;

/// The state of one session's denoising loop.
pub trait Solver: Send {
    /// Timesteps of the loop, in order, as diffusers' `scheduler.timesteps`.
    fn timesteps(&self) -> &[f64];

    /// Advances `sample` from `timesteps()[index]` to the next one. Must be called with index 0, 1, 2, ... in order.
    /// Computes and returns f32.
    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor>;
}
