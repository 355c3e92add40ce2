//! The image that is made into another one.
//!
//! Owns: `image`, `mask` and `strength`, and how many steps an edit leaves out. Does not know: latents.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::frame::{Frame, Mask};
use crate::parameter::{Declaration, EDITS, Options, Parameter};
use crate::resample::Filter;

use super::Canvas;

/// See [`Edit::image`].
pub static IMAGE: Parameter<Arc<Frame>> =
    Parameter::image("image", "Image to begin from: PNG, JPEG or WebP.").only_for(EDITS).required();

/// See [`Edit::mask`].
pub static MASK: Parameter<Arc<Mask>> = Parameter::mask(
    "mask",
    "What to make anew of `image`: where this image is transparent, or white if it has no alpha. Transparent parts of \
     `image` are the mask when absent.",
)
.only_for(EDITS);

/// See [`Edit::strength`].
pub static STRENGTH: Parameter<f64> = Parameter::number(
    "strength",
    0.0,
    1.0,
    "How far `image` is taken back to noise: 1 all the way; the default of diffusers' pipeline when absent.",
)
.only_for(EDITS);

/// The parameters of this capability.
pub(super) static PARAMETERS: &[&Declaration] = &[&IMAGE.declaration, &MASK.declaration, &STRENGTH.declaration];

/// An image that is made into another one.
#[derive(Debug, Clone, PartialEq)]
pub struct Edit {
    /// The image, in the width and height of the request.
    pub image: Arc<Frame>,
    /// What is made anew, in the width and height of the request; without it everything is.
    pub mask: Option<Arc<Mask>>,
    /// How far the image is taken back to noise: 1 all the way.
    pub strength: f64,
    /// Steps of the schedule that are left out, as follows from `strength`; fewer than there are.
    pub first_step: usize,
}

impl Edit {
    /// The image itself is not echoed.
    pub(super) fn echo(&self, options: &mut Options) {
        options.set(&STRENGTH, self.strength);
    }
}

/// How a model makes images from images.
#[derive(Debug, Clone, Copy)]
pub struct EditSupport {
    /// From a whole image.
    pub image_to_image: Option<EditDefaults>,
    /// From an image and a mask.
    pub inpainting: Option<EditDefaults>,
    /// How a share of the steps becomes a number of steps.
    pub rounding: StepRounding,
    /// Whether it makes nothing without an image.
    pub is_needed: bool,
}

/// What takes the place of a model's defaults where an image is given.
#[derive(Debug, Clone, Copy)]
pub struct EditDefaults {
    /// See [`Edit::strength`].
    pub strength: f64,
    /// See [`Guidance`](super::Guidance).
    pub guidance_scale: f64,
}

/// How `strength` times the steps becomes a number of steps: the pipelines of diffusers differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StepRounding {
    /// The steps that are taken are cut to a whole number (SDXL).
    #[default]
    Taken,
    /// The steps that are left out are (FLUX.1).
    LeftOut,
}

impl StepRounding {
    /// Of `steps`, how many are left out.
    fn first_step(self, steps: usize, strength: f64) -> usize {
        let taken = (steps as f64 * strength).min(steps as f64);
        match self {
            Self::Taken => steps - taken as usize,
            Self::LeftOut => (steps as f64 - taken) as usize,
        }
    }
}

/// An edit that a request asks for, before its size and its steps are known.
pub(super) struct Asked {
    image: Arc<Frame>,
    mask: Option<Arc<Mask>>,
    strength: f64,
    /// Default of the request.
    pub(super) guidance_scale: f64,
    rounding: StepRounding,
}

/// What the options ask for; `support` is `None` for models that begin from noise alone.
pub(super) fn asked(support: Option<&EditSupport>, options: &Options) -> Result<Option<Asked>> {
    let refuse = |field: &str, problem: &str| Err(Error::invalid(field, problem));
    let Some(image) = options.get(&IMAGE) else {
        if support.is_some_and(|support| support.is_needed) {
            return refuse("image", "is missing; this model only makes images from images");
        }
        let of_image = [("mask", options.has(&MASK)), ("strength", options.has(&STRENGTH))];
        return match of_image.iter().find(|(_, is_given)| *is_given) {
            Some((field, _)) => refuse(field, "has no effect without image; leave it out"),
            None => Ok(None),
        };
    };
    let Some(support) = support else {
        return refuse("image", "this model does not begin from an image; leave it out");
    };
    let mask = options.get(&MASK);
    let defaults = support.defaults(&image, mask.as_deref())?;
    Ok(Some(Asked {
        image,
        mask,
        strength: options.get(&STRENGTH).unwrap_or(defaults.strength),
        guidance_scale: defaults.guidance_scale,
        rounding: support.rounding,
    }))
}

impl EditSupport {
    fn defaults(&self, image: &Frame, mask: Option<&Mask>) -> Result<EditDefaults> {
        let refuse = |problem: String| Err(Error::invalid("mask", problem));
        match mask {
            None => self
                .image_to_image
                .map_or_else(|| refuse("is missing; this model only fills in parts of an image".to_owned()), Ok),
            Some(mask) if self.inpainting.is_some() && (mask.width, mask.height) != (image.width, image.height) => {
                let of_mask = format!("is {}x{}", mask.width, mask.height);
                refuse(format!("{of_mask}, but image is {}x{}; they must be equal", image.width, image.height))
            }
            Some(_) => self
                .inpainting
                .map_or_else(|| refuse("this model does not fill in parts of an image; leave it out".to_owned()), Ok),
        }
    }
}

impl Asked {
    /// Width and height in pixels.
    pub(super) fn image_size(&self) -> (usize, usize) {
        (self.image.width, self.image.height)
    }

    /// The edit on this canvas, in so many steps. Resizes the image and the mask, which takes time.
    pub(super) fn resolve(self, canvas: &Canvas, steps: usize) -> Result<Edit> {
        let Self { image, mask, strength, .. } = self;
        let first_step = self.rounding.first_step(steps, strength);
        if first_step >= steps {
            let problem = format!("is {strength}, which leaves no step of num_inference_steps ({steps})");
            return Err(Error::invalid("strength", problem));
        }
        let Canvas { width, height, .. } = *canvas;
        Ok(Edit {
            image: Arc::new(image.resized(width, height, Filter::Lanczos)),
            mask: mask.map(|mask| Arc::new(mask.resized(width, height, Filter::Lanczos))),
            strength,
            first_step,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// diffusers: `int(4 * 0.6)` steps are taken, or `int(4 - 4 * 0.6)` are left out.
    #[test]
    fn strength_is_a_share_of_the_steps() {
        for (rounding, steps, strength, expected) in [
            (StepRounding::Taken, 4, 0.6, 2),
            (StepRounding::LeftOut, 4, 0.6, 1),
            (StepRounding::Taken, 10, 1.0, 0),
            (StepRounding::LeftOut, 10, 1.0, 0),
            // 0.7 * 10 is not quite 7 as a product of doubles, nor is 0.29 * 100.
            (StepRounding::Taken, 100, 0.29, 72),
            (StepRounding::LeftOut, 1, 0.01, 0),
        ] {
            assert_eq!(rounding.first_step(steps, strength), expected, "{rounding:?} {steps} {strength}");
        }
    }
}
