//! DPM-Solver++ (Lu et al. 2022, <https://arxiv.org/abs/2211.01095>): multistep, and its stochastic variant.
//!
//! Owns: the schedule in sigmas, the coefficients, the history of predictions. Does not know: models, guidance.
//! Source: diffusers `schedulers/scheduling_dpmsolver_multistep.py`, `DPMSolverMultistepScheduler` with algorithms
//! `dpmsolver++` and `sde-dpmsolver++`. Coefficients are computed here in f64, there in f32.

use std::collections::VecDeque;

use candle_core::{DType, Tensor};
use serde::Deserialize;

use crate::error::Result;
use crate::rng::TorchGenerator;
use crate::solver::config::SchedulerConfig;
use crate::solver::history::Update;
use crate::solver::noise_schedule::{Defaults, Grid, Level, NoiseSchedule};
use crate::solver::{Memory, Solver, noise_like};

/// Highest `solver_order` of the reference.
const MAX_ORDER: usize = 3;
/// Loops shorter than this end in steps of lower order.
const SHORT_LOOP: usize = 15;

/// What decides about the steps, from `scheduler_config.json`.
#[derive(Debug, Clone)]
pub struct DpmConfig {
    pub(super) schedule: NoiseSchedule,
    solver_order: usize,
    solver_type: SolverType,
    is_stochastic: bool,
    lower_order_final: bool,
    euler_at_final: bool,
}

/// How a step of second order weighs the difference of the last two predictions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum SolverType {
    /// diffusers reads the names of other solvers as this one.
    #[serde(alias = "logrho", alias = "bh1", alias = "bh2")]
    Midpoint,
    Heun,
}

/// The fields that are not of the noise schedule, with diffusers' defaults.
#[derive(Deserialize)]
#[serde(default)]
struct Fields {
    solver_order: usize,
    solver_type: SolverType,
    algorithm_type: String,
    lower_order_final: bool,
    euler_at_final: bool,
    thresholding: bool,
    use_lu_lambdas: bool,
    use_flow_sigmas: bool,
    lambda_min_clipped: Option<f64>,
    variance_type: Option<String>,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            solver_order: 2,
            solver_type: SolverType::Midpoint,
            algorithm_type: "dpmsolver++".to_owned(),
            lower_order_final: true,
            euler_at_final: false,
            thresholding: false,
            use_lu_lambdas: false,
            use_flow_sigmas: false,
            lambda_min_clipped: None,
            variance_type: None,
        }
    }
}

impl DpmConfig {
    /// From the fields of the file; the error names the field that is not supported.
    pub fn new(file: &SchedulerConfig) -> Result<Self> {
        let fields: Fields = file.fields()?;
        let is_stochastic = match fields.algorithm_type.as_str() {
            "dpmsolver++" => Some(false),
            "sde-dpmsolver++" => Some(true),
            _ => None,
        };
        file.refuse(&[
            ("algorithm_type", is_stochastic.is_none(), "supported are \"dpmsolver++\" and \"sde-dpmsolver++\""),
            ("solver_order", !(1..=MAX_ORDER).contains(&fields.solver_order), "supported are 1, 2 and 3"),
            ("thresholding", fields.thresholding, "only false is supported"),
            ("use_lu_lambdas", fields.use_lu_lambdas, "only false is supported"),
            ("use_flow_sigmas", fields.use_flow_sigmas, "only false is supported"),
            ("lambda_min_clipped", fields.lambda_min_clipped.is_some(), "only -Infinity is supported"),
            ("variance_type", fields.variance_type.is_some(), "only null is supported"),
        ])?;
        Ok(Self {
            schedule: NoiseSchedule::new(file, Defaults::SIGMAS)?,
            solver_order: fields.solver_order,
            solver_type: fields.solver_type,
            is_stochastic: is_stochastic.expect("refused above"),
            lower_order_final: fields.lower_order_final,
            euler_at_final: fields.euler_at_final,
        })
    }

    /// Most steps of a loop: two equal sigmas would be no distance to divide by.
    pub fn max_steps(&self) -> usize {
        if self.schedule.is_karras() { usize::MAX } else { self.schedule.max_steps(Grid::Intervals) }
    }
}

/// The state of one denoising loop. Names as in the paper: at a level the sample is `alpha x0 + sigma noise`, and
/// `lambda = ln(alpha / sigma)`.
#[derive(Debug, Clone)]
pub struct Dpm {
    config: DpmConfig,
    timesteps: Vec<f64>,
    /// One more than timesteps.
    levels: Vec<Level>,
    /// Predicted `x0` of the last steps, newest first; at most `solver_order`.
    predictions: VecDeque<Tensor>,
}

impl Dpm {
    /// The loop over `num_inference_steps` steps, from 1 to [`DpmConfig::max_steps`].
    pub fn new(config: &DpmConfig, num_inference_steps: usize) -> Self {
        let (timesteps, sigmas) = config.schedule.intervals(num_inference_steps);
        let whole = if config.schedule.is_cosine() { f64::trunc } else { f64::round_ties_even };
        let sigmas = sigmas.into_iter().map(|sigma| sigma as f32).chain([config.schedule.final_sigma()]);
        Self {
            config: config.clone(),
            timesteps: timesteps.into_iter().map(whole).collect(),
            levels: sigmas.map(|sigma| Level::from_ratio(f64::from(sigma))).collect(),
            predictions: VecDeque::new(),
        }
    }

    /// The order of the step at `index`, whose prediction is the newest of the history.
    fn order(&self, index: usize) -> usize {
        let config = &self.config;
        let steps = self.timesteps.len();
        let ends_low = config.lower_order_final && steps < SHORT_LOOP;
        let most = match steps - index {
            1 if config.euler_at_final || ends_low || config.schedule.final_sigma() == 0.0 => 1,
            2 if ends_low => 2,
            _ => MAX_ORDER,
        };
        // The history and not the index says how far back it goes: a loop may begin in the middle.
        most.min(config.solver_order).min(self.predictions.len())
    }

    /// The step from the level at `index` to the next one without its noise, by as many predictions as `order`.
    fn update(&self, index: usize, order: usize) -> Update {
        let (from, to, h) = (self.levels[index], self.levels[index + 1], self.distance(index));
        // With fresh noise the sample loses its old noise twice as fast.
        let (kept, h) = if self.config.is_stochastic { ((-h).exp(), 2.0 * h) } else { (1.0, h) };
        let phi = (-h).exp_m1();
        let mut predictions = vec![0.0; order];
        predictions[0] = -to.alpha * phi;
        match order {
            1 => (),
            2 => {
                let slope = match self.config.solver_type {
                    SolverType::Midpoint => -to.alpha * phi / 2.0,
                    SolverType::Heun => to.alpha * (phi / h + 1.0),
                };
                differ(&mut predictions, 0, slope / self.ratio(index, 1));
            }
            _ => {
                let slope = to.alpha * (phi / h + 1.0);
                // The sign of the half is the reference's.
                let half = if self.config.is_stochastic { 0.5 } else { -0.5 };
                let bend = -to.alpha * ((phi + h) / (h * h) + half);
                let (near, far) = (self.ratio(index, 1), self.ratio(index, 2));
                let second = (slope * near + bend) / (near + far);
                differ(&mut predictions, 0, (slope + second) / near);
                differ(&mut predictions, 1, -second / far);
            }
        }
        Update { sample: to.sigma / from.sigma * kept, predictions }
    }

    /// How far the step at `index` goes in lambda.
    fn distance(&self, index: usize) -> f64 {
        self.levels[index + 1].lambda() - self.levels[index].lambda()
    }

    /// How far the step `back` steps earlier went, in units of the one at `index`.
    fn ratio(&self, index: usize, back: usize) -> f64 {
        self.distance(index - back) / self.distance(index)
    }
}

/// Adds `weight` times the difference of the prediction at `newer` from the one before it.
fn differ(predictions: &mut [f64], newer: usize, weight: f64) {
    predictions[newer] += weight;
    predictions[newer + 1] -= weight;
}

impl Solver for Dpm {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn add_noise(&self, index: usize, sample: &Tensor, noise: &Tensor) -> Result<Tensor> {
        self.levels[index].mix(sample, noise)
    }

    fn predict_clean(&self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        self.config.schedule.prediction().x0(model_output, sample, self.levels[index])
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
        self.predictions.truncate(self.config.solver_order - 1);
        self.predictions.push_front(x0);
        let next = self.update(index, self.order(index)).apply(&sample, &self.predictions)?;
        if !self.config.is_stochastic {
            return Ok(next);
        }
        let deviation = self.levels[index + 1].sigma * (-(-2.0 * self.distance(index)).exp_m1()).sqrt();
        Ok((next + (noise_like(&sample, generator)? * deviation)?)?)
    }

    fn memory(&self) -> Memory {
        Memory { tensors: self.predictions.iter().cloned().collect(), numbers: Vec::new() }
    }

    fn remember(&mut self, Memory { tensors, numbers }: Memory, steps: usize) -> bool {
        let fits = tensors.len() == steps.min(self.config.solver_order) && numbers.is_empty();
        self.predictions = tensors.into();
        fits
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::solver::config::tests::read;

    fn config(json: &str) -> Result<DpmConfig> {
        DpmConfig::new(&read(json)?)
    }

    #[test]
    fn unsupported_configurations_name_the_field() {
        for (json, field) in [
            (r#"{"algorithm_type": "dpmsolver"}"#, "`algorithm_type`"),
            (r#"{"algorithm_type": "sde-dpmsolver"}"#, "`algorithm_type`"),
            (r#"{"algorithm_type": "deis"}"#, "`algorithm_type`"),
            (r#"{"solver_order": 4}"#, "`solver_order`"),
            (r#"{"solver_order": 0}"#, "`solver_order`"),
            (r#"{"solver_type": "bh3"}"#, "bh3"),
            (r#"{"thresholding": true}"#, "`thresholding`"),
            (r#"{"use_lu_lambdas": true}"#, "`use_lu_lambdas`"),
            (r#"{"use_flow_sigmas": true}"#, "`use_flow_sigmas`"),
            (r#"{"lambda_min_clipped": -5.1}"#, "`lambda_min_clipped`"),
            (r#"{"variance_type": "learned"}"#, "`variance_type`"),
        ] {
            let message = config(json).expect_err(json).to_string();
            assert!(message.contains(field) && message.contains("scheduler_config.json"), "{json}: {message}");
        }
        config(r#"{"lambda_min_clipped": -Infinity, "solver_type": "bh2"}"#).expect("read");
    }

    /// A model that knows the picture predicts it everywhere: any order must arrive there.
    #[test]
    fn a_model_that_knows_the_picture_arrives_whatever_the_order() {
        let x0 = Tensor::new(&[1.5f32, -0.25, 0.75], &Device::Cpu).expect("a tensor");
        for order in 1..=MAX_ORDER {
            for algorithm in ["dpmsolver++", "sde-dpmsolver++"] {
                let fields = format!(r#""solver_order": {order}, "algorithm_type": "{algorithm}""#);
                let config = config(&format!(r#"{{"prediction_type": "sample", {fields}}}"#)).expect("supported");
                let (mut solver, mut generator) = (Dpm::new(&config, 20), TorchGenerator::new(1));
                let mut sample = noise_like(&x0, &mut generator).expect("noise");
                for index in 0..20 {
                    sample = solver.step(index, &x0, &sample, &mut generator).expect("a step");
                }
                let error = (sample - &x0).and_then(|d| d.abs()?.max(0)?.to_scalar::<f32>()).expect("a number");
                assert!(error < 1e-5, "order {order} {algorithm}: {error}");
            }
        }
    }

    #[test]
    fn the_order_falls_at_both_ends_and_begins_anew_where_a_loop_is_entered() {
        let orders = |json: &str, steps: usize, begin: usize| -> Vec<usize> {
            let mut solver = Dpm::new(&config(json).expect("supported"), steps);
            let one = Tensor::new(&[1f32], &Device::Cpu).expect("a tensor");
            let order = |index| {
                solver.step(index, &one, &one, &mut TorchGenerator::new(0)).expect("a step");
                solver.order(index)
            };
            (begin..steps).map(order).collect()
        };
        assert_eq!(orders(r#"{"solver_order": 3}"#, 7, 0), [1, 2, 3, 3, 3, 2, 1]);
        assert_eq!(orders(r#"{"solver_order": 3}"#, 7, 3), [1, 2, 2, 1]);
        assert_eq!(orders(r#"{"solver_order": 2}"#, 5, 0), [1, 2, 2, 2, 1]);
        let to_sigma_min = r#"{"solver_order": 2, "final_sigmas_type": "sigma_min", "lower_order_final": false}"#;
        assert_eq!(orders(to_sigma_min, 4, 0), [1, 2, 2, 2]);
        assert_eq!(orders(r#"{"solver_order": 3}"#, 16, 12), [1, 2, 3, 1]);
    }
}
