//! What a request for an image or a video consists of, one module for each capability.
//!
//! Owns: the validated request. Each module owns its parameters, their validation, its part of the request and of the
//! model's card, and what answers echo of it. Does not know: networks, sessions, steps.

pub mod acceleration;
pub mod canvas;
pub mod card;
pub mod edit;
pub mod guidance;
pub mod keyframes;
pub mod loras;
pub mod parameters;
pub mod previews;
pub mod prompt;
pub mod references;
pub mod refinement;
pub mod sampling;
pub mod shots;
#[cfg(test)]
mod tests;
pub mod tiling;

use std::sync::Arc;

use crate::lora::LoraUse;
use crate::parameter::Options;
pub use acceleration::{Acceleration, Cache};
pub use canvas::Canvas;
pub use card::{DiffusionCard, Medium};
pub use edit::Edit;
pub use guidance::{Guidance, NegativePrompt, ZeroStar};
pub use keyframes::Keyframes;
pub use prompt::Prompt;
pub use references::References;
pub use refinement::Refinement;
pub use sampling::Sampling;
pub use shots::Shot;

/// `options`, and those of `base` where they have none. What belongs to a value that is replaced is not taken over: the
/// length to its prompts, which it would cut, spacing and `eta` to their scheduler, steps that are given to their number, the
/// way to a video's length to that, the choice of tiles to a size, the parts
/// of a rule to the rule by which blocks or guidance are skipped.
pub fn options_over(options: Options, mut base: Options) -> Options {
    if options.has(&prompt::PROMPT) || options.has(&prompt::NEGATIVE_PROMPT) {
        base.set(&prompt::MAX_SEQUENCE_LENGTH, None);
    }
    if options.has(&sampling::SCHEDULER) {
        base.set(&sampling::TIMESTEP_SPACING, None);
        base.set(&sampling::ETA, None);
    }
    let have_steps = options.has(&sampling::NUM_INFERENCE_STEPS);
    let have_given = options.has(&sampling::SIGMAS) || options.has(&sampling::TIMESTEPS);
    if have_steps || have_given || options.has(&sampling::SCHEDULER) {
        base.set(&sampling::SIGMAS, None);
        base.set(&sampling::TIMESTEPS, None);
    }
    if have_given {
        base.set(&sampling::NUM_INFERENCE_STEPS, None);
    }
    if options.has(&acceleration::ACCELERATION) || options.has(&acceleration::CACHE_METHOD) {
        acceleration::PARAMETERS.iter().for_each(|declaration| base.remove(declaration));
    }
    if options.has(&guidance::CFG_ZERO_STAR) {
        base.set(&guidance::ZERO_INIT_STEPS, None);
    }
    if options.has(&canvas::WIDTH) || options.has(&canvas::HEIGHT) || options.has(&canvas::NUM_FRAMES) {
        base.set(&tiling::VAE_TILING, None);
    }
    if options.has(&canvas::NUM_FRAMES) {
        base.set(&shots::SHOT_METHOD, None);
        base.set(&shots::OVERLAP_FRAMES, None);
    }
    options.or(base)
}

/// Effective parameters of an image or a video, as they are echoed. Made by [`DiffusionCard::resolve`].
#[derive(Debug, Clone, PartialEq)]
pub struct DiffusionRequest {
    /// What to show.
    pub prompt: Prompt,
    /// Size and length.
    pub canvas: Canvas,
    /// The way from noise to latents.
    pub sampling: Sampling,
    /// How far the prompt is followed, and what is steered away from.
    pub guidance: Guidance,
    /// Whether some steps may reuse the results of earlier ones.
    pub acceleration: Acceleration,
    /// How they do so: what `acceleration` means for this request, or what it says itself.
    pub cache: Option<Arc<Cache>>,
    /// Terms that are added to the model's layers for this request alone.
    pub loras: Vec<LoraUse>,
    /// Whether the VAE works on tiles of the image or of the frames, where they are larger than one.
    pub vae_tiling: bool,
    /// Previews on the way, of a video of each of its parts; they change nothing in the result.
    pub partial_images: usize,
    /// The image to begin from; without it the loop begins from noise alone.
    pub edit: Option<Edit>,
    /// Images whose look is followed.
    pub references: Option<References>,
    /// Pictures that a video begins and ends with.
    pub keyframes: Option<Keyframes>,
    /// The parts that a video is made of.
    pub shot: Option<Shot>,
    /// Where the model's refiner takes the latents over; without it the model makes all steps.
    pub refinement: Option<Refinement>,
}

impl DiffusionRequest {
    /// Pixels of all frames and guidance branches: what a denoising step takes is nearly a multiple of it.
    pub fn step_amount(&self) -> f64 {
        let Canvas { width, height, num_frames, .. } = self.canvas;
        [width, height, num_frames, self.guidance.num_branches()].into_iter().map(|side| side as f64).product()
    }

    /// Of all denoising steps.
    pub fn denoising_amount(&self) -> f64 {
        self.sampling.num_inference_steps as f64 * self.step_amount()
    }

    /// A request that asks for nothing beyond a prompt: no guidance, no other inputs.
    pub fn new(prompt: Prompt, canvas: Canvas, sampling: Sampling) -> Self {
        Self {
            prompt,
            canvas,
            sampling,
            guidance: Guidance::none(),
            acceleration: Acceleration::None,
            cache: None,
            loras: Vec::new(),
            vae_tiling: false,
            partial_images: 0,
            edit: None,
            references: None,
            keyframes: None,
            shot: None,
            refinement: None,
        }
    }

    /// The same request with another seed.
    pub fn with_seed(&self, seed: u64) -> Self {
        let mut request = self.clone();
        request.sampling.seed = seed;
        request
    }

    /// The same request without the pictures that it brought, which are not echoed.
    pub fn without_pictures(mut self) -> Self {
        self.keyframes = None;
        self
    }

    /// What whoever asked should know, each with the parameter that it is about.
    pub fn warnings(&self) -> Vec<String> {
        self.shot.as_ref().map_or(Vec::new(), Shot::warnings)
    }

    /// Denoising steps that are made: those of the schedule but for the ones that an image to begin from leaves out; with
    /// a refiner those of both.
    pub fn steps_made(&self) -> usize {
        let steps = self.sampling.num_inference_steps;
        if let Some(Refinement { steps_before, first_step_after, .. }) = self.refinement {
            return steps_before + steps - first_step_after;
        }
        steps - self.edit.as_ref().map_or(0, |edit| edit.first_step)
    }

    /// What a client would say to have the same result again. Images that it gave are not repeated.
    pub fn echo(&self) -> Options {
        let mut options = Options::default();
        self.prompt.echo(&mut options);
        self.canvas.echo(&mut options);
        self.sampling.echo(&mut options);
        self.guidance.echo(&mut options);
        acceleration::echo(self.acceleration, self.cache.as_deref(), &mut options);
        loras::echo(&self.loras, &mut options);
        options.set(&tiling::VAE_TILING, self.vae_tiling);
        if let Some(edit) = &self.edit {
            edit.echo(&mut options);
        }
        if let Some(references) = &self.references {
            references.echo(&mut options);
        }
        if let Some(shot) = &self.shot {
            shot.echo(&mut options);
        }
        if let Some(refinement) = &self.refinement {
            refinement.echo(&mut options);
        }
        options
    }
}
