//! Where a refiner takes the latents over.
//!
//! Owns: `denoising_end`, and how it divides the steps. Does not know: the refiner's networks.

use crate::error::{Error, Result};
use crate::parameter::{Declaration, IMAGES, Options, Parameter, check_range};
use crate::solver::schedulers::Schedulers;

use super::Sampling;

/// See [`Refinement::denoising_end`].
pub static DENOISING_END: Parameter<f64> = Parameter::number(
    "denoising_end",
    0.0,
    1.0,
    "Share of the noise schedule, above 0 and below 1, that the model denoises before its refiner takes over; the refiner \
     does nothing when absent.",
)
.only_for(IMAGES)
.narrowed_by_models();

/// The parameters of this capability.
pub(super) static PARAMETERS: &[&Declaration] = &[&DENOISING_END.declaration];

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

impl Refinement {
    pub(super) fn echo(&self, options: &mut Options) {
        options.set(&DENOISING_END, self.denoising_end);
    }

    /// `own` and `refiner` are the schedulers of the model and of its refiner, if it has one.
    pub(super) fn resolve(
        options: &Options,
        sampling: &Sampling,
        own: &Schedulers,
        refiner: Option<&Schedulers>,
        is_edit: bool,
    ) -> Result<Option<Self>> {
        let refuse = |problem: String| Err(Error::invalid("denoising_end", problem));
        let Some(denoising_end) = options.get(&DENOISING_END) else { return Ok(None) };
        let Some(refiner) = refiner else {
            return refuse("this model is served without a refiner; leave it out".to_owned());
        };
        if is_edit {
            return refuse("the refiner takes over from images made of text alone; leave it or image out".to_owned());
        }
        // Written so that NaN is refused.
        if !(denoising_end > 0.0 && denoising_end < 1.0) {
            return refuse(format!("is {denoising_end}; allowed: above 0 and below 1"));
        }
        let steps = sampling.num_inference_steps;
        let of_refiner = refiner.choose(sampling.asked())?;
        check_range("num_inference_steps", steps, 1, of_refiner.max_steps)?;
        let the_loop = sampling.denoising_loop(None);
        let steps_before = own.steps_before(sampling.scheduler, &the_loop, denoising_end);
        let first_step_after = refiner.steps_before(sampling.scheduler, &the_loop, denoising_end);
        for (whose, is_idle) in [("model", steps_before == 0), ("refiner", first_step_after == steps)] {
            if is_idle {
                return refuse(format!("is {denoising_end}, which leaves the {whose} no step of {steps}"));
            }
        }
        Ok(Some(Self { denoising_end, steps_before, first_step_after }))
    }
}
