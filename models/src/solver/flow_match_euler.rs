//! Euler steps along a flow-matching path (FLUX.1).
//!
//! Owns: the shifted sigmas and the step. Does not know: where the model gets `mu` from.
//! Source: diffusers `schedulers/scheduling_flow_match_euler_discrete.py`, `FlowMatchEulerDiscreteScheduler`; sigmas are
//! rounded to f32 at every operation, as numpy does there.

use candle_core::{DType, Tensor};
use serde::Deserialize;

use crate::config::bounds::MAX_SHIFT;
use crate::error::Result;
use crate::linspace::numpy_linspace;
use crate::rng::TorchGenerator;
use crate::solver::Solver;
use crate::solver::config::SchedulerConfig;
use crate::solver::noise_schedule::Level;

/// `scheduler_config.json`, defaults as in diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct FlowMatchEulerConfig {
    pub num_train_timesteps: usize,
    pub shift: f32,
    pub use_dynamic_shifting: bool,
    pub base_shift: Option<f64>,
    pub max_shift: Option<f64>,
    pub base_image_seq_len: usize,
    pub max_image_seq_len: usize,
    pub shift_terminal: Option<f32>,
    pub time_shift_type: TimeShift,
    pub invert_sigmas: bool,
    pub use_karras_sigmas: bool,
    pub use_exponential_sigmas: bool,
    pub use_beta_sigmas: bool,
    pub stochastic_sampling: bool,
}

/// Tokens of the largest picture, four times as many as any model here makes.
const LARGEST_IMAGE_SEQ_LEN: usize = 1 << 16;
/// Largest `mu`, either way: `e^64` still fits 32 bits. FLUX.1 has 0.4 to 3.3.
const MAX_MU: f64 = 64.0;

/// How `mu` bends the sigmas when shifting is dynamic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimeShift {
    /// By `e^mu`.
    Exponential,
    /// By `mu`.
    Linear,
}

impl Default for FlowMatchEulerConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            shift: 1.0,
            use_dynamic_shifting: false,
            base_shift: Some(0.5),
            max_shift: Some(1.15),
            base_image_seq_len: 256,
            max_image_seq_len: 4096,
            shift_terminal: None,
            time_shift_type: TimeShift::Exponential,
            invert_sigmas: false,
            use_karras_sigmas: false,
            use_exponential_sigmas: false,
            use_beta_sigmas: false,
            stochastic_sampling: false,
        }
    }
}

impl FlowMatchEulerConfig {
    /// From the fields of the file; schedules that this solver does not compute are refused by name.
    pub fn new(file: &SchedulerConfig) -> Result<Self> {
        let config: Self = file.fields()?;
        let only_false = |field: &'static str, wanted: bool| (field, wanted, "only false is supported");
        let (base, max) = (config.base_image_seq_len, config.max_image_seq_len);
        file.refuse(&[
            (
                "shift_terminal",
                config.shift_terminal.is_some_and(|last| !(0.0..1.0).contains(&last)),
                "must be below 1",
            ),
            ("max_image_seq_len", config.use_dynamic_shifting && base == max, "must not be base_image_seq_len"),
            ("max_shift", config.use_dynamic_shifting && !config.has_shifts(), "gives sigmas that are no numbers"),
            only_false("invert_sigmas", config.invert_sigmas),
            only_false("use_karras_sigmas", config.use_karras_sigmas),
            only_false("use_exponential_sigmas", config.use_exponential_sigmas),
            only_false("use_beta_sigmas", config.use_beta_sigmas),
            only_false("stochastic_sampling", config.stochastic_sampling),
        ])?;
        Ok(config)
    }

    /// Whether pictures of every size have a shift that can be computed with; the line has its extremes at its ends.
    fn has_shifts(&self) -> bool {
        let lowest = match self.time_shift_type {
            TimeShift::Exponential => -MAX_MU,
            TimeShift::Linear => 1.0 / MAX_SHIFT,
        };
        [1, LARGEST_IMAGE_SEQ_LEN].into_iter().all(|tokens| (lowest..=MAX_MU).contains(&self.mu(tokens)))
    }

    /// `mu` for an image of `image_seq_len` tokens: a line through (`base_image_seq_len`, `base_shift`) and
    /// (`max_image_seq_len`, `max_shift`) (`calculate_shift` of `pipeline_flux.py`).
    pub fn mu(&self, image_seq_len: usize) -> f64 {
        let (base_shift, max_shift) = (self.base_shift.unwrap_or(0.5), self.max_shift.unwrap_or(1.15));
        let slope = (max_shift - base_shift) / (self.max_image_seq_len as f64 - self.base_image_seq_len as f64);
        image_seq_len as f64 * slope + (base_shift - slope * self.base_image_seq_len as f64)
    }

    /// `n` sigmas to start from where the pipeline gives none (Wan): evenly spaced between the first and the last of
    /// training, which are shifted already and will be once more, as in the reference. Without dynamic shifting.
    pub fn own_sigmas(&self, n: usize) -> Vec<f64> {
        let shifted = |sigma: f32| f64::from(self.shift * sigma / (1.0 + (self.shift - 1.0) * sigma));
        let (first, last) = (shifted(1.0), shifted(1.0 / self.num_train_timesteps as f32));
        // Spaced as timesteps.
        let train = self.num_train_timesteps as f64;
        numpy_linspace(first * train, last * train, n).into_iter().map(|timestep| timestep / train).collect()
    }

    /// What becomes of the sigma `t`.
    fn shifted(&self, t: f32, mu: f64) -> f32 {
        if !self.use_dynamic_shifting {
            return self.shift * t / (1.0 + (self.shift - 1.0) * t);
        }
        let pull = match self.time_shift_type {
            TimeShift::Exponential => mu.exp() as f32,
            TimeShift::Linear => mu as f32,
        };
        pull / (pull + (1.0 / t - 1.0))
    }
}

/// `n` sigmas from 1 down to `1/n`, evenly spaced: what the FLUX.1 pipeline starts from.
pub fn linear_sigmas(n: usize) -> Vec<f64> {
    numpy_linspace(1.0, 1.0 / n as f64, n)
}

/// `n` sigmas from 1 down, `1/n` between them: what the HunyuanVideo pipeline starts from, which leaves out the 0 at the
/// end. As [`linear_sigmas`] but for the last bit of an f64.
pub fn falling_sigmas(n: usize) -> Vec<f64> {
    let step = -1.0 / n as f64;
    (0..n).map(|i| i as f64 * step + 1.0).collect()
}

/// One session's way from noise to sample. It has no state between steps.
#[derive(Debug, Clone)]
pub struct FlowMatchEuler {
    timesteps: Vec<f64>,
    /// One per timestep, and a final 0.
    sigmas: Vec<f32>,
}

impl FlowMatchEuler {
    /// `sigmas` before shifting, falling, in (0, 1]. `mu` counts only with dynamic shifting.
    pub fn new(config: &FlowMatchEulerConfig, sigmas: &[f64], mu: f64) -> Self {
        let mut sigmas: Vec<f32> = sigmas.iter().map(|sigma| config.shifted(*sigma as f32, mu)).collect();
        if let (Some(terminal), Some(last)) = (config.shift_terminal.filter(|t| *t != 0.0), sigmas.last()) {
            let scale = (1.0 - last) / (1.0 - terminal);
            sigmas.iter_mut().for_each(|sigma| *sigma = 1.0 - (1.0 - *sigma) / scale);
        }
        let timesteps = sigmas.iter().map(|sigma| f64::from(sigma * config.num_train_timesteps as f32)).collect();
        sigmas.push(0.0);
        Self { timesteps, sigmas }
    }

    /// One per timestep, and a final 0.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }
}

impl Solver for FlowMatchEuler {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn add_noise(&self, index: usize, sample: &Tensor, noise: &Tensor) -> Result<Tensor> {
        let sigma = f64::from(self.sigmas[index]);
        Level { alpha: 1.0 - sigma, sigma }.mix(sample, noise)
    }

    fn predict_clean(&self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let noise = (model_output.to_dtype(DType::F32)? * f64::from(self.sigmas[index]))?;
        Ok((sample.to_dtype(DType::F32)? - noise)?)
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, _: &mut TorchGenerator) -> Result<Tensor> {
        let dt = self.sigmas[index + 1] - self.sigmas[index];
        Ok((sample.to_dtype(DType::F32)? + (model_output.to_dtype(DType::F32)? * f64::from(dt))?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<FlowMatchEulerConfig> {
        FlowMatchEulerConfig::new(&crate::solver::config::tests::read(json)?)
    }

    #[test]
    fn schedules_that_are_not_computed_are_refused_by_name() {
        for field in ["invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"] {
            let error = read(&format!("{{\"{field}\": true}}")).expect_err("not supported").to_string();
            assert!(error.contains(field), "{error}");
            read(&format!("{{\"{field}\": false}}")).expect("that is the default");
        }
        read("{\"time_shift_type\": \"cubic\"}").expect_err("no such shift");
    }

    #[test]
    fn sigmas_start_at_one_and_end_at_zero() {
        for steps in [1, 2, 4, 28] {
            let config = FlowMatchEulerConfig { use_dynamic_shifting: true, ..Default::default() };
            let solver = FlowMatchEuler::new(&config, &linear_sigmas(steps), config.mu(4096));
            assert_eq!(solver.timesteps().len(), steps);
            assert_eq!(solver.sigmas().first(), Some(&1.0));
            assert_eq!(solver.sigmas().last(), Some(&0.0));
            assert!(solver.sigmas().windows(2).all(|pair| pair[0] > pair[1]));
        }
    }

    #[test]
    fn terminal_sigma_is_reached() {
        let config = FlowMatchEulerConfig { shift_terminal: Some(0.1), ..Default::default() };
        let solver = FlowMatchEuler::new(&config, &linear_sigmas(8), 0.0);
        assert!((solver.sigmas()[7] - 0.1).abs() < 1e-6);
    }
}
