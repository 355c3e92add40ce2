//! Where a refiner takes the latents over.

/// Which steps a model makes and which its refiner, by the schedules of both.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Refinement {
    /// As in diffusers: the share of the noise schedule that the model denoises.
    pub denoising_end: f64,
    /// Steps of the model, at least 1.
    pub steps_before: usize,
    /// The step of its own schedule that the refiner begins at, not the end.
    pub first_step_after: usize,
}
