//! The solvers of CogVideoX: DDIM, and a second-order one with fresh noise in every step, both over a schedule whose
//! signal-to-noise ratio is shifted.
//!
//! Owns: timesteps, coefficients, the prediction of the step before. Does not know: models, guidance.
//! Source: diffusers `schedulers/scheduling_ddim_cogvideox.py`, `scheduling_dpm_cogvideox.py` (DPM-Solver++ SDE, Lu et al.
//! 2022, <https://arxiv.org/abs/2211.01095>). Neither cuts predicted pictures, whatever `clip_sample` says. A step goes
//! `1 / n` of training back, whatever the next timestep is. At its ends the schedule has no signal and no noise, so that
//! logarithms are infinite; no coefficient is.

use candle_core::{DType, Tensor};
use serde::Deserialize;

use crate::error::Result;
use crate::rng::TorchGenerator;
use crate::solver::config::SchedulerConfig;
use crate::solver::noise_schedule::{Defaults, Grid, Level, NoiseSchedule};
use crate::solver::{Memory, Solver, noise_like};

/// What decides about the steps of either solver, from `scheduler_config.json`.
#[derive(Debug, Clone)]
pub struct CogVideoXConfig {
    pub(super) schedule: NoiseSchedule,
    set_alpha_to_one: bool,
}

/// The fields that are not of the noise schedule, with diffusers' defaults.
#[derive(Deserialize)]
#[serde(default)]
struct Fields {
    set_alpha_to_one: bool,
}

impl Default for Fields {
    fn default() -> Self {
        Self { set_alpha_to_one: true }
    }
}

impl CogVideoXConfig {
    /// From the fields of the file; the error names the field that is not supported.
    pub fn new(file: &SchedulerConfig) -> Result<Self> {
        let Fields { set_alpha_to_one } = file.fields()?;
        Ok(Self { schedule: NoiseSchedule::new(file, Defaults::COGVIDEOX)?, set_alpha_to_one })
    }

    /// Most steps of a loop.
    pub fn max_steps(&self) -> usize {
        self.schedule.max_steps(Grid::Points)
    }
}

/// Timesteps and levels of one loop.
#[derive(Debug, Clone)]
struct Walk {
    config: CogVideoXConfig,
    timesteps: Vec<f64>,
    /// Timesteps of training that a step goes back.
    stride: usize,
}

impl Walk {
    fn new(config: &CogVideoXConfig, num_inference_steps: usize) -> Self {
        let timesteps = config.schedule.timesteps(num_inference_steps, Grid::Points);
        Self {
            timesteps: timesteps.into_iter().map(f64::round_ties_even).collect(),
            stride: config.schedule.num_train_timesteps() / num_inference_steps,
            config: config.clone(),
        }
    }

    /// Where the step at `index` begins.
    fn level(&self, index: usize) -> Level {
        self.config.schedule.level(self.timesteps[index] as usize)
    }

    /// The timestep of training where the step arrives; none past the first one.
    fn next_timestep(&self, index: usize) -> Option<usize> {
        (self.timesteps[index] as usize).checked_sub(self.stride)
    }

    fn next_level(&self, index: usize) -> Level {
        match self.next_timestep(index) {
            Some(timestep) => self.config.schedule.level(timestep),
            None if self.config.set_alpha_to_one => Level { alpha: 1.0, sigma: 0.0 },
            None => self.config.schedule.level(0),
        }
    }

    fn predict_clean(&self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        self.config.schedule.prediction().x0(model_output, sample, self.level(index))
    }
}

/// `CogVideoXDDIMScheduler`. It has no state between steps.
#[derive(Debug, Clone)]
pub struct CogVideoXDdim(Walk);

impl CogVideoXDdim {
    /// The loop over `num_inference_steps` steps, from 1 to [`CogVideoXConfig::max_steps`].
    pub fn new(config: &CogVideoXConfig, num_inference_steps: usize) -> Self {
        Self(Walk::new(config, num_inference_steps))
    }
}

impl Solver for CogVideoXDdim {
    fn timesteps(&self) -> &[f64] {
        &self.0.timesteps
    }

    fn add_noise(&self, index: usize, sample: &Tensor, noise: &Tensor) -> Result<Tensor> {
        self.0.level(index).mix(sample, noise)
    }

    fn predict_clean(&self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        self.0.predict_clean(index, model_output, sample)
    }

    fn step(
        &mut self,
        index: usize,
        model_output: &Tensor,
        sample: &Tensor,
        _generator: &mut TorchGenerator,
    ) -> Result<Tensor> {
        let sample = sample.to_dtype(DType::F32)?;
        let (from, to) = (self.0.level(index), self.0.next_level(index));
        let kept = to.sigma / from.sigma;
        let x0 = self.predict_clean(index, model_output, &sample)?;
        Ok(((sample * kept)? + (x0 * (to.alpha - from.alpha * kept))?)?)
    }
}

/// `CogVideoXDPMScheduler`.
#[derive(Debug, Clone)]
pub struct CogVideoXDpm {
    walk: Walk,
    /// `x0` of the step before, and its index.
    previous: Option<(usize, Tensor)>,
}

impl CogVideoXDpm {
    /// The loop over `num_inference_steps` steps, from 1 to [`CogVideoXConfig::max_steps`].
    pub fn new(config: &CogVideoXConfig, num_inference_steps: usize) -> Self {
        Self { walk: Walk::new(config, num_inference_steps), previous: None }
    }
}

impl Solver for CogVideoXDpm {
    fn timesteps(&self) -> &[f64] {
        &self.walk.timesteps
    }

    fn add_noise(&self, index: usize, sample: &Tensor, noise: &Tensor) -> Result<Tensor> {
        self.walk.level(index).mix(sample, noise)
    }

    fn predict_clean(&self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        self.walk.predict_clean(index, model_output, sample)
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
        let (from, to) = (self.walk.level(index), self.walk.next_level(index));
        let h = to.lambda() - from.lambda();
        let mut noise = noise_like(&sample, generator)?;
        let is_last = self.walk.next_timestep(index).is_none();
        let aim = match self.previous.take().filter(|_| !is_last) {
            None => x0.clone(),
            Some((before, previous)) => {
                let ratio = (from.lambda() - self.walk.level(before).lambda()) / h;
                // The reference has made a step of first order by then, with noise of its own.
                noise = noise_like(&sample, generator)?;
                let weight = 1.0 / (2.0 * ratio);
                ((&x0 * (1.0 + weight))? - (previous * weight)?)?
            }
        };
        self.previous = Some((index, x0));
        let kept = to.sigma / from.sigma * (-h).exp();
        let reached = -to.alpha * (-2.0 * h).exp_m1();
        let deviation = to.sigma * (1.0 - (-2.0 * h).exp()).sqrt();
        Ok((((sample * kept)? + (aim * reached)?)? + (noise * deviation)?)?)
    }

    fn memory(&self) -> Memory {
        let previous = self.previous.iter();
        Memory {
            tensors: previous.clone().map(|(_, x0)| x0.clone()).collect(),
            numbers: previous.map(|(index, _)| *index).collect(),
        }
    }

    fn remember(&mut self, Memory { mut tensors, numbers }: Memory, steps: usize) -> bool {
        self.previous = match (steps, &numbers[..], tensors.len()) {
            (0, [], 0) => None,
            (1.., &[index], 1) if index < self.walk.timesteps.len() => tensors.pop().map(|x0| (index, x0)),
            _ => return false,
        };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solver::config::tests::read;

    #[test]
    fn shifted_noise_is_more_noise_and_ends_without_signal() {
        let alphas = |text: &str| {
            let schedule = CogVideoXConfig::new(&read(text).expect("known fields")).expect("a schedule").schedule;
            [0, 500, 999].map(|timestep| schedule.alpha_cumprod(timestep))
        };
        let own = alphas(r#"{"snr_shift_scale": 1.0}"#);
        let shifted = alphas("{}");
        for (own, shifted) in own.into_iter().zip(shifted) {
            let ratio = own / (1.0 - own) / (shifted / (1.0 - shifted));
            assert!((ratio - 3.0).abs() < 1e-9, "the ratio of signal to noise is a third, not 1 / {ratio}");
        }
        let rescaled = alphas(r#"{"snr_shift_scale": 1.0, "rescale_betas_zero_snr": true}"#);
        assert!((rescaled[0] - own[0]).abs() < 1e-12 && rescaled[2] == 0.0);
    }

    /// `CogVideoXDDIMScheduler(...).alphas_cumprod` of diffusers 0.42.1, which is f32 but for scaled-linear betas. torch's
    /// vectorised root, with which schedules are rescaled, may be off by a bit.
    #[test]
    fn schedules_of_other_betas_are_rounded_as_in_the_reference() {
        const RESCALED: &str = r#", "snr_shift_scale": 1.0, "rescale_betas_zero_snr": true"#;
        for (betas, rest, tolerance, expected) in [
            ("linear", "", 0.0, [0.9974542856216431, 0.0604594387114048, 0.012048664502799511, 0.00052687554853037]),
            ("linear", RESCALED, 2.5e-7, [0.9991499781608582, 0.1425294280052185, 0.023798402398824692, 0.0]),
            (
                "squaredcos_cap_v2",
                "",
                0.0,
                [0.999876081943512, 0.24541084468364716, 0.07775366306304932, 8.095783488037966e-10],
            ),
            ("squaredcos_cap_v2", RESCALED, 2.5e-7, [0.999958872795105, 0.49382293224334717, 0.20184452831745148, 0.0]),
            (
                "scaled_linear",
                "",
                1e-12,
                [0.9974543276430068, 0.1135820813743849, 0.029108319445199673, 0.001558207103429585],
            ),
        ] {
            let file = read(&format!(r#"{{"beta_schedule": "{betas}"{rest}}}"#)).expect("known fields");
            let schedule = CogVideoXConfig::new(&file).expect("a schedule").schedule;
            for (timestep, expected) in [0, 499, 700, 999].into_iter().zip(expected) {
                let found = schedule.alpha_cumprod(timestep);
                let error = (found - expected).abs();
                assert!(error <= tolerance * expected, "{betas}{rest} at {timestep}: {found}, {expected}");
            }
        }
    }

    #[test]
    fn a_flow_matching_model_is_refused_by_name() {
        let file = read(r#"{"prediction_type": "flow_prediction"}"#).expect("known");
        let error = CogVideoXConfig::new(&file).expect_err("another kind").to_string();
        assert!(error.contains("`prediction_type`"), "{error}");
    }
}
