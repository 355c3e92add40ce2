//! Euler steps along the probability flow of a discrete model (SDXL's own solver): Karras et al. 2022, algorithm 2
//! without churn, <https://arxiv.org/abs/2206.00364>.
//!
//! Owns: the schedule in sigmas, the scaling of noise and model input, the step. Does not know: models, guidance.
//! Source: diffusers `schedulers/scheduling_euler_discrete.py`, `EulerDiscreteScheduler`. Samples are `x0 + sigma
//! noise`; the model is given them with variance 1.

use candle_core::{DType, Tensor};
use serde::Deserialize;

use crate::error::Result;
use crate::rng::TorchGenerator;
use crate::solver::Solver;
use crate::solver::config::SchedulerConfig;
use crate::solver::names::{Given, Spacing};
use crate::solver::noise_schedule::{Defaults, Grid, Level, NoiseSchedule, Prediction};

/// What decides about the steps, from `scheduler_config.json`.
#[derive(Debug, Clone)]
pub struct EulerConfig {
    pub(super) schedule: NoiseSchedule,
}

/// The fields that only this class has.
#[derive(Deserialize)]
#[serde(default)]
struct Fields {
    interpolation_type: String,
    timestep_type: String,
}

impl Default for Fields {
    fn default() -> Self {
        Self { interpolation_type: "linear".to_owned(), timestep_type: "discrete".to_owned() }
    }
}

impl EulerConfig {
    /// From the fields of the file; the error names the field that is not supported.
    pub fn new(file: &SchedulerConfig) -> Result<Self> {
        let fields: Fields = file.fields()?;
        file.refuse(&[
            ("interpolation_type", fields.interpolation_type != "linear", "only \"linear\" is supported"),
            ("timestep_type", fields.timestep_type != "discrete", "only \"discrete\" is supported"),
        ])?;
        Ok(Self { schedule: NoiseSchedule::new(file, Defaults::SIGMAS)? })
    }
}

/// One session's way from noise to sample. It has no state between steps.
#[derive(Debug, Clone)]
pub struct Euler {
    prediction: Prediction,
    ladder: Ladder,
}

impl Euler {
    /// The loop over `num_inference_steps` (at least 1) steps.
    pub fn new(config: &EulerConfig, num_inference_steps: usize) -> Self {
        let ladder = Ladder::new(&config.schedule, num_inference_steps);
        Self { prediction: config.schedule.prediction(), ladder }
    }

    /// The loop over steps that are given.
    pub fn over(config: &EulerConfig, given: &Given) -> Self {
        Self { prediction: config.schedule.prediction(), ladder: Ladder::over(&config.schedule, given) }
    }

    /// One per timestep, and the one that the last step leads to.
    pub fn sigmas(&self) -> &[f32] {
        &self.ladder.sigmas
    }
}

impl Solver for Euler {
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

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, _: &mut TorchGenerator) -> Result<Tensor> {
        let sample = sample.to_dtype(DType::F32)?;
        let slope = self.ladder.slope(index, self.prediction, model_output, &sample)?;
        let dt = f64::from(self.ladder.sigmas[index + 1] - self.ladder.sigmas[index]);
        Ok((sample + (slope * dt)?)?)
    }
}

/// Timesteps and sigmas of samples whose signal keeps its size while noise is taken away.
#[derive(Debug, Clone)]
pub(super) struct Ladder {
    pub(super) timesteps: Vec<f64>,
    /// One more than timesteps.
    pub(super) sigmas: Vec<f32>,
    pub(super) init_noise_sigma: f64,
}

impl Ladder {
    pub(super) fn new(schedule: &NoiseSchedule, num_inference_steps: usize) -> Self {
        let rounded = |values: Vec<f64>| values.into_iter().map(|value| f64::from(value as f32)).collect::<Vec<_>>();
        let mut timesteps = rounded(schedule.timesteps(num_inference_steps, Grid::Points));
        let mut sigmas = schedule.sigmas_at(&timesteps);
        if schedule.is_karras() {
            sigmas = schedule.karras_sigmas(&sigmas, num_inference_steps);
            let training = schedule.log_training_sigmas();
            timesteps = rounded(sigmas.iter().map(|sigma| schedule.timestep_of(*sigma, &training)).collect());
        }
        let mut sigmas: Vec<f32> = sigmas.into_iter().map(|sigma| sigma as f32).collect();
        sigmas.push(schedule.final_sigma());
        Self::of(schedule, timesteps, sigmas)
    }

    /// Through the timesteps or sigmas that are given. Timesteps without Karras sigmas.
    fn over(schedule: &NoiseSchedule, given: &Given) -> Self {
        let rounded = |values: &[f64]| values.iter().map(|value| *value as f32).collect::<Vec<_>>();
        let widened = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
        match given {
            Given::Timesteps(timesteps) => {
                let timesteps = widened(rounded(timesteps));
                let mut sigmas = rounded(&schedule.sigmas_at(&timesteps));
                sigmas.push(schedule.final_sigma());
                Self::of(schedule, timesteps, sigmas)
            }
            Given::Sigmas(sigmas) => {
                let sigmas = rounded(sigmas);
                let training = schedule.log_training_sigmas();
                let timesteps = sigmas[..sigmas.len() - 1].iter();
                let timesteps = timesteps.map(|sigma| schedule.timestep_of(f64::from(*sigma), &training));
                let timesteps = widened(rounded(&timesteps.collect::<Vec<_>>()));
                Self::of(schedule, timesteps, sigmas)
            }
        }
    }

    fn of(schedule: &NoiseSchedule, timesteps: Vec<f64>, sigmas: Vec<f32>) -> Self {
        let most = f64::from(sigmas.iter().copied().fold(0.0, f32::max));
        let init_noise_sigma = match schedule.spacing() {
            Spacing::Linspace | Spacing::Trailing => most,
            Spacing::Leading => (most * most + 1.0).sqrt(),
        };
        Self { timesteps, sigmas, init_noise_sigma }
    }

    pub(super) fn sigma(&self, index: usize) -> f64 {
        f64::from(self.sigmas[index])
    }

    /// `sample` with variance 1.
    pub(super) fn scale_model_input(&self, index: usize, sample: &Tensor) -> Result<Tensor> {
        Ok((sample * Level::from_ratio(self.sigma(index)).alpha)?)
    }

    pub(super) fn add_noise(&self, index: usize, sample: &Tensor, noise: &Tensor) -> Result<Tensor> {
        Level { alpha: 1.0, sigma: self.sigma(index) }.mix(sample, noise)
    }

    /// Where the slope leads at sigma 0.
    pub(super) fn predict_clean(
        &self,
        index: usize,
        prediction: Prediction,
        output: &Tensor,
        sample: &Tensor,
    ) -> Result<Tensor> {
        let sample = sample.to_dtype(DType::F32)?;
        let slope = self.slope(index, prediction, output, &sample)?;
        Ok((sample - (slope * self.sigma(index))?)?)
    }

    /// How the sample changes with sigma: the predicted noise.
    pub(super) fn slope(
        &self,
        index: usize,
        prediction: Prediction,
        output: &Tensor,
        sample: &Tensor,
    ) -> Result<Tensor> {
        let output = output.to_dtype(DType::F32)?;
        if prediction == Prediction::Epsilon {
            return Ok(output);
        }
        let sigma = self.sigma(index);
        let x0 = prediction.x0(&output, &self.scale_model_input(index, sample)?, Level::from_ratio(sigma))?;
        Ok(((sample - x0)? / sigma)?)
    }
}
