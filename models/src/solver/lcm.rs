//! Steps of latent consistency models (Luo et al. 2023, <https://arxiv.org/abs/2310.04378>): jump to the picture, add fresh
//! noise of the next timestep.
//!
//! Owns: the timesteps among those of the distillation, the boundary condition, the step. Does not know: models,
//! guidance. Source: diffusers `schedulers/scheduling_lcm.py`, `LCMScheduler`.

use candle_core::{DType, Tensor};
use serde::Deserialize;

use crate::error::Result;
use crate::rng::TorchGenerator;
use crate::solver::config::SchedulerConfig;
use crate::solver::ddim::clipped;
use crate::solver::noise_schedule::{Defaults, Level, NoiseSchedule};
use crate::solver::{Solver, noise_like};

/// Standard deviation that the boundary condition takes the pictures to have.
const SIGMA_DATA: f64 = 0.5;

/// What decides about the steps, from `scheduler_config.json`.
#[derive(Debug, Clone)]
pub struct LcmConfig {
    schedule: NoiseSchedule,
    original_inference_steps: usize,
    timestep_scaling: f64,
    /// Predicted pictures are cut to `-range..=range`.
    clip: Option<f64>,
}

/// The fields that are not of the noise schedule, with diffusers' defaults.
#[derive(Deserialize)]
#[serde(default)]
struct Fields {
    original_inference_steps: usize,
    timestep_scaling: f64,
    clip_sample: bool,
    clip_sample_range: f64,
    thresholding: bool,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            original_inference_steps: 50,
            timestep_scaling: 10.0,
            clip_sample: false,
            clip_sample_range: 1.0,
            thresholding: false,
        }
    }
}

impl LcmConfig {
    /// From the fields of the file; the error names the field that is not supported.
    pub fn new(file: &SchedulerConfig) -> Result<Self> {
        let fields: Fields = file.fields()?;
        let schedule = NoiseSchedule::new(file, Defaults::CONSISTENCY)?;
        let original = fields.original_inference_steps;
        let fits = (1..=schedule.num_train_timesteps()).contains(&original);
        file.refuse(&[
            ("thresholding", fields.thresholding, "only false is supported"),
            ("original_inference_steps", !fits, "must be from 1 to num_train_timesteps"),
        ])?;
        Ok(Self {
            schedule,
            original_inference_steps: original,
            timestep_scaling: fields.timestep_scaling,
            clip: fields.clip_sample.then_some(fields.clip_sample_range),
        })
    }

    /// Most steps of a loop.
    pub fn max_steps(&self) -> usize {
        self.original_inference_steps
    }
}

/// `n` of the `original` timesteps on which the model was distilled, falling, evenly spaced by index.
pub(super) fn distilled_timesteps(num_train_timesteps: usize, original: usize, n: usize) -> Vec<usize> {
    let (stride, step) = (num_train_timesteps / original, original as f64 / n as f64);
    (0..n).map(|i| (original - (i as f64 * step).floor() as usize) * stride - 1).collect()
}

/// One session's way from noise to sample. It has no state between steps.
#[derive(Debug, Clone)]
pub struct Lcm {
    config: LcmConfig,
    timesteps: Vec<f64>,
}

impl Lcm {
    /// The loop over `num_inference_steps` steps, from 1 to [`LcmConfig::max_steps`].
    pub fn new(config: &LcmConfig, num_inference_steps: usize) -> Self {
        let (train, original) = (config.schedule.num_train_timesteps(), config.original_inference_steps);
        let timesteps = distilled_timesteps(train, original, num_inference_steps);
        Self { config: config.clone(), timesteps: timesteps.into_iter().map(|timestep| timestep as f64).collect() }
    }

    fn level(&self, index: usize) -> Level {
        self.config.schedule.level(self.timesteps[index] as usize)
    }

    /// How much of the sample and of the predicted picture makes the answer: all of the sample at timestep 0.
    fn boundary(&self, index: usize) -> (f64, f64) {
        let scaled = self.timesteps[index] * self.config.timestep_scaling;
        let sum = scaled * scaled + SIGMA_DATA * SIGMA_DATA;
        (SIGMA_DATA * SIGMA_DATA / sum, scaled / sum.sqrt())
    }
}

impl Solver for Lcm {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn add_noise(&self, index: usize, sample: &Tensor, noise: &Tensor) -> Result<Tensor> {
        self.level(index).mix(sample, noise)
    }

    fn predict_clean(&self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        self.config.schedule.prediction().x0(model_output, sample, self.level(index))
    }

    fn step(
        &mut self,
        index: usize,
        model_output: &Tensor,
        sample: &Tensor,
        generator: &mut TorchGenerator,
    ) -> Result<Tensor> {
        let sample = sample.to_dtype(DType::F32)?;
        let x0 = self.predict_clean(index, model_output, &sample)?;
        let (skip, out) = self.boundary(index);
        let denoised = ((clipped(x0, self.config.clip)? * out)? + (&sample * skip)?)?;
        if index + 1 == self.timesteps.len() {
            return Ok(denoised);
        }
        self.level(index + 1).mix(&denoised, &noise_like(&sample, generator)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solver::config::tests::read;

    #[test]
    fn the_distillations_timesteps_are_visited_from_the_last_on() {
        assert_eq!(distilled_timesteps(1000, 50, 4), [999, 759, 499, 259]);
        assert_eq!(distilled_timesteps(1000, 50, 1), [999]);
        assert_eq!(distilled_timesteps(1000, 4, 4), [999, 749, 499, 249]);
        let all = distilled_timesteps(1000, 50, 50);
        assert_eq!((all[0], all[49]), (999, 19));
    }

    #[test]
    fn impossible_configurations_are_refused_by_name() {
        for (json, field) in [
            (r#"{"original_inference_steps": 0}"#, "`original_inference_steps`"),
            (r#"{"original_inference_steps": 1001}"#, "`original_inference_steps`"),
            (r#"{"thresholding": true}"#, "`thresholding`"),
        ] {
            let error = LcmConfig::new(&read(json).expect("known")).expect_err(json).to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
