//! Where a session's denoising begins: from noise, or from a picture that is taken back to noise.
//!
//! Owns: the order in which noise is drawn, the first step, what keeps the unmasked part of a picture. Does not know:
//! how a family packs its latents. Source: diffusers, `prepare_latents` and `prepare_mask_latents` of the pipelines for
//! text to image, image to image and inpainting.

use std::sync::Arc;

use candle_core::Tensor;

use crate::diffusion::{DiffusionRequest, Edit};
use crate::error::Result;
use crate::request::Mask;
use crate::rng::TorchGenerator;
use crate::solver::Solver;
use crate::vae::Posterior;

/// What a family adds whose loop may begin from an image. Requests with an [`Edit`] are for it alone.
pub trait ImageStart<E> {
    /// What the VAE says of the image, among all that the request has encoded.
    fn posterior<'a>(&self, encoded: &'a [Arc<E>]) -> &'a Posterior;

    /// A sample of a posterior as `predict` takes latents: scaled, and packed where the family packs.
    fn image_latents(&self, sample: &Tensor, request: &DiffusionRequest) -> Result<Tensor>;

    /// The mask, for each value of the latents that `predict` takes: 1 where it is made anew, else 0.
    fn mask_latents(&self, mask: &Mask, request: &DiffusionRequest) -> Result<Tensor>;
}

/// What a family adds whose videos begin with a picture that is part of what the loop begins from.
pub trait PictureStart<E> {
    /// What the loop begins from: the initial noise, and what the request has encoded of the picture.
    fn begin(&self, noise: Tensor, encoded: &[Arc<E>]) -> Result<Tensor>;
}

/// What the loop begins from.
pub struct Start {
    /// At the first timestep that is not left out.
    pub latents: Tensor,
    /// What happens to the latents after each step, where a part of a picture is kept.
    pub repaint: Option<Repaint>,
}

/// Keeps what is outside of a mask: after each step it is the picture again, with as much noise as the loop then has.
pub struct Repaint {
    /// 1 where the loop's own latents stay, 0 where the picture comes back.
    mask: Tensor,
    image: Tensor,
    noise: Tensor,
}

impl Repaint {
    /// The latents that the loop goes on with at `timesteps()[next]`; after the last step the picture has no noise.
    pub fn blend(&self, latents: &Tensor, next: usize, solver: &dyn Solver) -> Result<Tensor> {
        let image = match next < solver.timesteps().len() {
            true => solver.add_noise(next, &self.image, &self.noise)?,
            false => self.image.clone(),
        };
        let kept = (self.mask.affine(-1.0, 1.0)? * image)?;
        Ok((kept + (&self.mask * latents)?)?)
    }
}

/// Draws what the session begins from. Later draws of its steps go on with the same `generator`. `noise` draws the initial
/// noise in the shape of the latents.
pub fn start<E>(
    family: Option<&dyn ImageStart<E>>,
    request: &DiffusionRequest,
    encoded: &[Arc<E>],
    solver: &dyn Solver,
    generator: &mut TorchGenerator,
    noise: impl FnOnce(&mut TorchGenerator) -> Result<Tensor>,
) -> Result<Start> {
    let (Some(edit), Some(family)) = (&request.edit, family) else {
        let latents = (noise(generator)? * solver.init_noise_sigma())?;
        return Ok(Start { latents, repaint: None });
    };
    let image = family.image_latents(&family.posterior(encoded).sample(generator)?, request)?;
    let noise = noise(generator)?;
    let latents = match begins_from_noise(edit) {
        true => (&noise * solver.init_noise_sigma())?,
        false => solver.add_noise(edit.first_step, &image, &noise)?,
    };
    let repaint = match &edit.mask {
        None => None,
        Some(mask) => {
            // The reference also draws latents of the image without its masked part, which it then has no use for.
            generator.randn(image.elem_count());
            Some(Repaint { mask: family.mask_latents(mask, request)?, image, noise })
        }
    };
    Ok(Start { latents, repaint })
}

/// A masked part at full strength keeps nothing of the picture, not even what the last bit of signal at the first
/// timestep would.
fn begins_from_noise(edit: &Edit) -> bool {
    edit.mask.is_some() && edit.strength == 1.0
}
