//! The way from noise to latents: steps, scheduler, seed.

use crate::solver::names::{Loop, Scheduler, Spacing};

/// How the latents are sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Denoising steps.
    pub num_inference_steps: usize,
    /// How the latents move from one timestep to the next.
    pub scheduler: &'static Scheduler,
    /// Which timesteps of training the scheduler visits, where that is its choice.
    pub timestep_spacing: Option<Spacing>,
    /// Share of fresh noise in the steps of DDIM and TCD, 0 to 1; `None` for the other schedulers.
    pub eta: Option<f64>,
    /// Seed of `torch.Generator("cpu")`.
    pub seed: u64,
}

impl Sampling {
    /// So many steps of a scheduler that takes no further settings.
    pub fn new(scheduler: &'static Scheduler, num_inference_steps: usize, seed: u64) -> Self {
        Self { num_inference_steps, scheduler, timestep_spacing: None, eta: None, seed }
    }

    /// The loop of the scheduler. `image_seq_len`: tokens of the image, of families whose sigmas depend on it.
    pub fn denoising_loop(&self, image_seq_len: Option<usize>) -> Loop {
        let Self { num_inference_steps: steps, timestep_spacing, eta, .. } = *self;
        Loop { steps, timestep_spacing, eta, image_seq_len }
    }
}
