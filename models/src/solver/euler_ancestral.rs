//! Euler steps that go further down than asked and come back up with fresh noise (Katherine Crowson's k-diffusion,
//! `sample_euler_ancestral`).
//!
//! Owns: how far a step goes down and up. Does not know: models, guidance.
//! Source: diffusers `schedulers/scheduling_euler_ancestral_discrete.py`, `EulerAncestralDiscreteScheduler`, whose split of
//! a step is computed in f32. Timesteps, sigmas and the model's input are those of [`super::euler`].

use candle_core::{DType, Tensor};

use crate::error::Result;
use crate::rng::TorchGenerator;
use crate::solver::config::SchedulerConfig;
use crate::solver::euler::Ladder;
use crate::solver::noise_schedule::{Defaults, NoiseSchedule, Prediction};
use crate::solver::{Solver, noise_like};

/// What decides about the steps, from `scheduler_config.json`.
#[derive(Debug, Clone)]
pub struct EulerAncestralConfig {
    pub(super) schedule: NoiseSchedule,
}

impl EulerAncestralConfig {
    /// From the fields of the file; the error names the field that is not supported.
    pub fn new(file: &SchedulerConfig) -> Result<Self> {
        let schedule = NoiseSchedule::new(file, Defaults::EULER_ANCESTRAL)?;
        // Not implemented by the reference either.
        let is_sample = schedule.prediction() == Prediction::Sample;
        file.refuse(&[("prediction_type", is_sample, "\"sample\" is not supported by Euler ancestral")])?;
        Ok(Self { schedule })
    }
}

/// One session's way from noise to sample. It has no state between steps.
#[derive(Debug, Clone)]
pub struct EulerAncestral {
    prediction: Prediction,
    ladder: Ladder,
}

impl EulerAncestral {
    /// The loop over `num_inference_steps` (at least 1) steps.
    pub fn new(config: &EulerAncestralConfig, num_inference_steps: usize) -> Self {
        let ladder = Ladder::new(&config.schedule, num_inference_steps);
        Self { prediction: config.schedule.prediction(), ladder }
    }
}

impl Solver for EulerAncestral {
    fn timesteps(&self) -> &[f64] {
        &self.ladder.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        self.ladder.init_noise_sigma
    }

    fn scale_model_input(&self, index: usize, sample: &Tensor) -> Result<Tensor> {
        self.ladder.scale_model_input(index, sample)
    }

    fn add_noise(&self, index: usize, sample: &Tensor, noise: &Tensor) -> Result<Tensor> {
        self.ladder.add_noise(index, sample, noise)
    }

    fn predict_clean(&self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        self.ladder.predict_clean(index, self.prediction, model_output, sample)
    }

    fn step(
        &mut self,
        index: usize,
        model_output: &Tensor,
        sample: &Tensor,
        generator: &mut TorchGenerator,
    ) -> Result<Tensor> {
        let sample = sample.to_dtype(DType::F32)?;
        let slope = self.ladder.slope(index, self.prediction, model_output, &sample)?;
        let (from, to) = (self.ladder.sigmas[index], self.ladder.sigmas[index + 1]);
        let up = (to * to * (from * from - to * to) / (from * from)).sqrt();
        let down = (to * to - up * up).sqrt();
        let noise = noise_like(&sample, generator)?;
        Ok(((sample + (slope * f64::from(down - from))?)? + (noise * f64::from(up))?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solver::config::tests::read;

    #[test]
    fn what_the_reference_does_not_compute_is_refused_and_what_it_ignores_ignored() {
        let error = EulerAncestralConfig::new(&read(r#"{"prediction_type": "sample"}"#).expect("known"));
        assert!(error.expect_err("no sample").to_string().contains("`prediction_type`"));
        let ignored = r#"{"use_karras_sigmas": true, "use_beta_sigmas": true, "final_sigmas_type": "sigma_min"}"#;
        let [plain, ignored] = ["{}", ignored].map(|json| {
            let config = EulerAncestralConfig::new(&read(json).expect("known")).expect("supported");
            EulerAncestral::new(&config, 5).ladder.sigmas
        });
        assert_eq!(plain, ignored);
    }
}
