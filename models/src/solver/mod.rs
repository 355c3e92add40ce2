//! Solvers: from a model's predictions along a list of timesteps to a sample. One file each, held against diffusers.

use candle_core::Tensor;

use crate::error::Result;
use crate::rng::TorchGenerator;

pub mod classes;
pub mod cogvideox;
pub mod config;
pub mod ddim;
pub mod dpm;
pub mod euler;
pub mod euler_ancestral;
pub mod flow_match_euler;
mod history;
pub mod lcm;
pub mod names;
pub mod noise_schedule;
pub mod schedulers;
pub mod tcd;
pub mod unipc;

/// The state of one session's denoising loop.
///
/// The loop of a new picture: noise times [`Solver::init_noise_sigma`], then for each timestep the model's prediction
/// for [`Solver::scale_model_input`] of the sample, and [`Solver::step`]. A loop that begins from a picture (image to
/// image) enters at a later index, with [`Solver::add_noise`] of that index.
pub trait Solver: Send {
    /// Timesteps of the loop, in order, as diffusers' `scheduler.timesteps`.
    fn timesteps(&self) -> &[f64];

    /// Standard deviation of the noise that the loop begins from, as diffusers' `scheduler.init_noise_sigma`.
    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    /// What the model takes instead of `sample` at `timesteps()[index]`, as diffusers' `scheduler.scale_model_input`.
    fn scale_model_input(&self, _index: usize, sample: &Tensor) -> Result<Tensor> {
        Ok(sample.clone())
    }

    /// The clean `sample` with as much of the standard normal `noise` as a loop has when it comes to
    /// `timesteps()[index]`: diffusers' `scheduler.add_noise`, of flow matching `scheduler.scale_noise`.
    fn add_noise(&self, index: usize, sample: &Tensor, noise: &Tensor) -> Result<Tensor>;

    /// The clean sample that `model_output` means for `sample` at `timesteps()[index]`: what previews show. In f32.
    fn predict_clean(&self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor>;

    /// Advances `sample` from `timesteps()[index]` to the next one. The index rises by one from call to call; the first
    /// one may be any (diffusers' `scheduler.set_begin_index`). Noise that a step needs is drawn from the session's
    /// own `generator`, as `randn_tensor` of diffusers draws it. Computes and returns f32.
    fn step(
        &mut self,
        index: usize,
        model_output: &Tensor,
        sample: &Tensor,
        generator: &mut TorchGenerator,
    ) -> Result<Tensor>;

    /// What the steps so far have left for the next ones.
    fn memory(&self) -> Memory {
        Memory::default()
    }

    /// Takes the place of the solver that gave `memory` after so many steps. `false` where that cannot be its memory.
    fn remember(&mut self, memory: Memory, _steps: usize) -> bool {
        memory.is_empty()
    }
}

/// What a multistep solver remembers between two steps; of the others nothing.
#[derive(Debug, Default)]
pub struct Memory {
    /// Each of the sample's shape, in an order of the solver's own.
    pub tensors: Vec<Tensor>,
    /// The same.
    pub numbers: Vec<usize>,
}

impl Memory {
    /// Whether there is nothing to remember.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty() && self.numbers.is_empty()
    }
}

/// Standard normal noise in the shape of `sample`, as diffusers' `randn_tensor` draws it.
fn noise_like(sample: &Tensor, generator: &mut TorchGenerator) -> Result<Tensor> {
    Ok(Tensor::from_vec(generator.randn(sample.elem_count()), sample.shape(), sample.device())?)
}
