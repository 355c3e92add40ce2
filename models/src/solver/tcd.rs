//! Trajectory consistency distillation (Zheng et al. 2024, <https://arxiv.org/abs/2402.19159>): jump along the trajectory,
//! past the next timestep, and come back to it with fresh noise.
//!
//! Owns: the timesteps, the step. Does not know: models, guidance.
//! Source: diffusers `schedulers/scheduling_tcd.py`, `TCDScheduler`. What the paper calls gamma is `eta` there and here.

use candle_core::{DType, Tensor};
use serde::Deserialize;

use crate::error::Result;
use crate::rng::TorchGenerator;
use crate::solver::config::SchedulerConfig;
use crate::solver::lcm::distilled_timesteps;
use crate::solver::noise_schedule::{Defaults, Level, NoiseSchedule};
use crate::solver::{Solver, noise_like};

/// What decides about the steps, from `scheduler_config.json`.
#[derive(Debug, Clone)]
pub struct TcdConfig {
    schedule: NoiseSchedule,
    original_inference_steps: usize,
}

/// The fields that are not of the noise schedule, with diffusers' defaults. The reference has fields for cutting predicted
/// pictures too, but does not cut.
#[derive(Deserialize)]
#[serde(default)]
struct Fields {
    original_inference_steps: usize,
}

impl Default for Fields {
    fn default() -> Self {
        Self { original_inference_steps: 50 }
    }
}

impl TcdConfig {
    /// From the fields of the file; the error names the field that is not supported.
    pub fn new(file: &SchedulerConfig) -> Result<Self> {
        let Fields { original_inference_steps } = file.fields()?;
        let schedule = NoiseSchedule::new(file, Defaults::CONSISTENCY)?;
        let fits = (1..=schedule.num_train_timesteps()).contains(&original_inference_steps);
        file.refuse(&[("original_inference_steps", !fits, "must be from 1 to num_train_timesteps")])?;
        Ok(Self { schedule, original_inference_steps })
    }

    /// Most steps of a loop.
    pub fn max_steps(&self) -> usize {
        self.original_inference_steps
    }
}

/// One session's way from noise to sample. It has no state between steps.
#[derive(Debug, Clone)]
pub struct Tcd {
    config: TcdConfig,
    timesteps: Vec<f64>,
    /// 0 is deterministic, 1 jumps to the picture at every step.
    eta: f64,
}

impl Tcd {
    /// The loop over `num_inference_steps` steps, from 1 to [`TcdConfig::max_steps`]; `eta` from 0 to 1.
    pub fn new(config: &TcdConfig, num_inference_steps: usize, eta: f64) -> Self {
        let (train, original) = (config.schedule.num_train_timesteps(), config.original_inference_steps);
        let timesteps = distilled_timesteps(train, original, num_inference_steps);
        Self { config: config.clone(), timesteps: timesteps.into_iter().map(|timestep| timestep as f64).collect(), eta }
    }

    /// The timestep to which the step jumps, on or past the next one, which may be the very first of training. Rounded as
    /// in the reference, which multiplies in f32.
    fn target(&self, next: f64) -> usize {
        ((1.0 - self.eta) as f32 * next as f32).floor() as usize
    }
}

impl Solver for Tcd {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn add_noise(&self, index: usize, sample: &Tensor, noise: &Tensor) -> Result<Tensor> {
        self.config.schedule.level(self.timesteps[index] as usize).mix(sample, noise)
    }

    fn predict_clean(&self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let level = self.config.schedule.level(self.timesteps[index] as usize);
        self.config.schedule.prediction().x0(model_output, sample, level)
    }

    fn step(
        &mut self,
        index: usize,
        model_output: &Tensor,
        sample: &Tensor,
        generator: &mut TorchGenerator,
    ) -> Result<Tensor> {
        let sample = sample.to_dtype(DType::F32)?;
        let (schedule, next) = (&self.config.schedule, self.timesteps.get(index + 1));
        let level = schedule.level(self.timesteps[index] as usize);
        let target = self.target(next.copied().unwrap_or(0.0));
        let x0 = schedule.prediction().x0(model_output, &sample, level)?;
        let noise = schedule.prediction().noise(model_output, &sample, level)?;
        let jumped = schedule.level(target).mix(&x0, &noise)?;
        match next {
            Some(next) if self.eta > 0.0 => {
                let kept = schedule.alpha_cumprod(*next as usize) / schedule.alpha_cumprod(target);
                Level::from_variance(kept).mix(&jumped, &noise_like(&sample, generator)?)
            }
            _ => Ok(jumped),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solver::config::tests::read;

    #[test]
    fn jumps_go_past_the_next_timestep_by_eta() {
        let config = TcdConfig::new(&read("{}").expect("known")).expect("diffusers' defaults");
        let target = |eta: f64, next: f64| Tcd::new(&config, 4, eta).target(next);
        assert_eq!((target(0.0, 759.0), target(1.0, 759.0), target(0.3, 759.0)), (759, 0, 531));
        let error = TcdConfig::new(&read(r#"{"original_inference_steps": 0}"#).expect("known")).expect_err("no steps");
        assert!(error.to_string().contains("`original_inference_steps`"), "{error}");
    }
}
