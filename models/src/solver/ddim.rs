//! DDIM (Song et al. 2020, <https://arxiv.org/abs/2010.02502>), with fresh noise where `eta` asks for it.
//!
//! Owns: the timesteps, the step. Does not know: models, guidance.
//! Source: diffusers `schedulers/scheduling_ddim.py`, `DDIMScheduler`. Samples have variance 1. A step goes `1 / n` of
//! training back, whatever the next timestep is.

use candle_core::{DType, Tensor};
use serde::Deserialize;

use crate::error::Result;
use crate::rng::TorchGenerator;
use crate::solver::config::SchedulerConfig;
use crate::solver::noise_schedule::{Defaults, Grid, Level, NoiseSchedule};
use crate::solver::{Solver, noise_like};

/// What decides about the steps, from `scheduler_config.json`.
#[derive(Debug, Clone)]
pub struct DdimConfig {
    pub(super) schedule: NoiseSchedule,
    /// Predicted pictures are cut to `-range..=range`.
    clip: Option<f64>,
    set_alpha_to_one: bool,
}

/// The fields that are not of the noise schedule, with diffusers' defaults.
#[derive(Deserialize)]
#[serde(default)]
struct Fields {
    clip_sample: bool,
    clip_sample_range: f64,
    set_alpha_to_one: bool,
    thresholding: bool,
}

impl Default for Fields {
    fn default() -> Self {
        Self { clip_sample: true, clip_sample_range: 1.0, set_alpha_to_one: true, thresholding: false }
    }
}

impl DdimConfig {
    /// From the fields of the file; the error names the field that is not supported.
    pub fn new(file: &SchedulerConfig) -> Result<Self> {
        let fields: Fields = file.fields()?;
        file.refuse(&[("thresholding", fields.thresholding, "only false is supported")])?;
        Ok(Self {
            schedule: NoiseSchedule::new(file, Defaults::DDIM)?,
            clip: fields.clip_sample.then_some(fields.clip_sample_range),
            set_alpha_to_one: fields.set_alpha_to_one,
        })
    }

    /// Most steps of a loop.
    pub fn max_steps(&self) -> usize {
        self.schedule.max_steps(Grid::Points)
    }
}

/// One session's way from noise to sample. It has no state between steps.
#[derive(Debug, Clone)]
pub struct Ddim {
    config: DdimConfig,
    timesteps: Vec<f64>,
    /// Timesteps of training that a step goes back.
    stride: usize,
    /// 0 is deterministic, 1 as random as the process that the model was trained on.
    eta: f64,
}

impl Ddim {
    /// The loop over `num_inference_steps` steps, from 1 to [`DdimConfig::max_steps`]; `eta` from 0 to 1.
    pub fn new(config: &DdimConfig, num_inference_steps: usize, eta: f64) -> Self {
        let timesteps = config.schedule.timesteps(num_inference_steps, Grid::Points);
        Self {
            timesteps: timesteps.into_iter().map(f64::round_ties_even).collect(),
            stride: config.schedule.num_train_timesteps() / num_inference_steps,
            config: config.clone(),
            eta,
        }
    }

    fn level(&self, index: usize) -> Level {
        self.config.schedule.level(self.timesteps[index] as usize)
    }

    /// Share of the signal's variance where the step arrives.
    fn alpha_cumprod_after(&self, index: usize) -> f64 {
        match (self.timesteps[index] as usize).checked_sub(self.stride) {
            Some(previous) => self.config.schedule.alpha_cumprod(previous),
            None if self.config.set_alpha_to_one => 1.0,
            None => self.config.schedule.alpha_cumprod(0),
        }
    }
}

impl Solver for Ddim {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn add_noise(&self, index: usize, sample: &Tensor, noise: &Tensor) -> Result<Tensor> {
        self.level(index).mix(sample, noise)
    }

    fn predict_clean(&self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        clipped(self.config.schedule.prediction().x0(model_output, sample, self.level(index))?, self.config.clip)
    }

    fn step(
        &mut self,
        index: usize,
        model_output: &Tensor,
        sample: &Tensor,
        generator: &mut TorchGenerator,
    ) -> Result<Tensor> {
        let sample = sample.to_dtype(DType::F32)?;
        let (level, prediction) = (self.level(index), self.config.schedule.prediction());
        let x0 = self.predict_clean(index, model_output, &sample)?;
        // Of the picture before it was cut, as in the reference.
        let noise = prediction.noise(model_output, &sample, level)?;
        let (before, after) = (level.alpha * level.alpha, self.alpha_cumprod_after(index));
        let variance = (1.0 - after) / (1.0 - before) * (1.0 - before / after);
        let deviation = self.eta * variance.sqrt();
        let direction = (1.0 - after - deviation * deviation).max(0.0).sqrt();
        let next = Level { alpha: after.sqrt(), sigma: direction }.mix(&x0, &noise)?;
        if self.eta == 0.0 {
            return Ok(next);
        }
        Ok((next + (noise_like(&sample, generator)? * deviation)?)?)
    }
}

/// `x0` cut to `-range..=range`, if there is one.
pub(super) fn clipped(x0: Tensor, range: Option<f64>) -> Result<Tensor> {
    match range {
        Some(range) => Ok(x0.clamp(-range, range)?),
        None => Ok(x0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solver::config::tests::read;

    #[test]
    fn thresholding_is_refused_by_name() {
        let error = DdimConfig::new(&read(r#"{"thresholding": true}"#).expect("known")).expect_err("not computed");
        assert!(error.to_string().contains("`thresholding`"), "{error}");
    }
}
