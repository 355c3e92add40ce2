//! Where a session's denoising begins: from noise, or from a picture that is taken back to noise.
//!
//! Owns: the order in which noise is drawn, the first step, what keeps the unmasked part of a picture. Does not know:
//! how a family packs its latents. Source: diffusers, `prepare_latents` and `prepare_mask_latents` of the pipelines for
//! text to image, image to image and inpainting.

use std::sync::Arc;

use candle_core::Tensor;

use super::DiffusionModel;
use super::references::ReferenceTokens;
use crate::diffusion::{DiffusionRequest, Edit};
use crate::error::Result;
use crate::rng::TorchGenerator;
use crate::solver::Solver;
use crate::vae::Posterior;

/// What a session has encoded.
pub struct Encoded<C> {
    /// One per guidance branch, the positive one first.
    pub prompts: Vec<Arc<C>>,
    /// The same for the refiner, where it takes over.
    pub refiner_prompts: Vec<Arc<C>>,
    /// As listed by [`super::PictureModel::pictures`].
    pub pictures: Vec<Arc<Posterior>>,
    /// Of the reference pictures, where there are some.
    pub references: Option<Arc<ReferenceTokens>>,
}

/// What the loop begins from.
pub struct Start {
    /// At `timesteps()[first_step]` of the solver.
    pub latents: Tensor,
    /// Steps of the schedule that are left out.
    pub first_step: usize,
    /// What happens to the latents after each step, where a part of a picture is kept.
    pub repaint: Option<Repaint>,
}

/// Keeps what is outside of a mask: after each step it is the picture again, with as much noise as the loop then has.
pub struct Repaint {
    /// 1 where the loop's own latents stay, 0 where the picture comes back.
    mask: Tensor,
    picture: Tensor,
    noise: Tensor,
}

impl Repaint {
    /// The latents that the loop goes on with at `timesteps()[next]`; after the last step the picture has no noise.
    pub fn blend(&self, latents: &Tensor, next: usize, solver: &dyn Solver) -> Result<Tensor> {
        let picture = match next < solver.timesteps().len() {
            true => solver.add_noise(next, &self.picture, &self.noise)?,
            false => self.picture.clone(),
        };
        let kept = (self.mask.affine(-1.0, 1.0)? * picture)?;
        Ok((kept + (&self.mask * latents)?)?)
    }
}

/// Draws what the session begins from. Later draws of its steps go on with the same `generator`.
pub fn start<M: DiffusionModel>(
    model: &M,
    request: &DiffusionRequest,
    pictures: &[Arc<Posterior>],
    solver: &dyn Solver,
    generator: &mut TorchGenerator,
) -> Result<Start> {
    let (Some(edit), Some(family), [posterior]) = (&request.edit, model.picture_model(), pictures) else {
        let latents = (model.initial_latents(request, generator)? * solver.init_noise_sigma())?;
        return Ok(Start { latents, first_step: 0, repaint: None });
    };
    let picture = family.picture_latents(&posterior.sample(generator)?, request)?;
    let noise = model.initial_latents(request, generator)?;
    let latents = match begins_from_noise(edit) {
        true => (&noise * solver.init_noise_sigma())?,
        false => solver.add_noise(edit.first_step, &picture, &noise)?,
    };
    let repaint = match &edit.mask {
        None => None,
        Some(mask) => {
            // The reference also draws latents of the picture without its masked part, which it then has no use for.
            generator.randn(picture.elem_count());
            Some(Repaint { mask: family.mask_latents(mask, request)?, picture, noise })
        }
    };
    Ok(Start { latents, first_step: edit.first_step, repaint })
}

/// A masked part at full strength keeps nothing of the picture, not even what the last bit of signal at the first
/// timestep would.
fn begins_from_noise(edit: &Edit) -> bool {
    edit.mask.is_some() && edit.strength == 1.0
}
