//! UniPC: a multistep predictor and corrector (Zhao et al. 2023, <https://arxiv.org/abs/2302.04867>), for flow matching
//! and for discrete noise schedules.
//!
//! Owns: the flow sigmas and timesteps, the coefficients, the history of predictions. Does not know: models, guidance.
//! Of diffusers' `UniPCMultistepScheduler` this is what predicts pictures (`predict_x0`); the rest is refused when the
//! configuration is read.
//! Source: diffusers `schedulers/scheduling_unipc_multistep.py`. Coefficients are computed here in f64, there in f32.

use std::collections::VecDeque;

use candle_core::{DType, Tensor};
use serde::Deserialize;

use crate::error::Result;
use crate::rng::TorchGenerator;
use crate::solver::config::SchedulerConfig;
use crate::solver::history::Update;
use crate::solver::noise_schedule::{Defaults, Grid, Level, NoiseSchedule};
use crate::solver::{Memory, Solver};

/// Highest `solver_order` that is held against the reference.
const MAX_ORDER: usize = 3;
/// The first sigma stays this far below 1, where the log of alpha is infinite.
const FIRST_SIGMA_GAP: f64 = 1e-6;

/// What decides about the steps, from `scheduler_config.json`.
#[derive(Debug, Clone)]
pub struct UniPcConfig {
    schedule: Schedule,
    solver_order: usize,
    solver_type: SolverType,
    disable_corrector: Vec<usize>,
}

#[derive(Debug, Clone)]
enum Schedule {
    Flow {
        num_train_timesteps: usize,
        shift: f64,
    },
    Noise {
        schedule: NoiseSchedule,
        /// Whether the last step leads to the least noise instead of none.
        ends_in_sigma_min: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum SolverType {
    /// `B(h) = h`.
    Bh1,
    /// `B(h) = e^h - 1`. diffusers reads the names of other solvers as this one.
    #[serde(alias = "midpoint", alias = "heun", alias = "logrho")]
    Bh2,
}

/// The fields of the file, with diffusers' defaults.
#[derive(Deserialize)]
#[serde(default)]
struct File {
    num_train_timesteps: usize,
    solver_order: usize,
    solver_type: SolverType,
    disable_corrector: Vec<usize>,
    flow_shift: f64,
    lower_order_final: bool,
    prediction_type: String,
    final_sigmas_type: String,
    predict_x0: bool,
    use_flow_sigmas: bool,
    thresholding: bool,
    use_karras_sigmas: bool,
    use_exponential_sigmas: bool,
    use_beta_sigmas: bool,
    use_dynamic_shifting: bool,
    solver_p: Option<serde_json::Value>,
    shift_terminal: Option<f64>,
}

impl Default for File {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            solver_order: 2,
            solver_type: SolverType::Bh2,
            disable_corrector: Vec::new(),
            flow_shift: 1.0,
            lower_order_final: true,
            prediction_type: "epsilon".to_owned(),
            final_sigmas_type: "zero".to_owned(),
            predict_x0: true,
            use_flow_sigmas: false,
            thresholding: false,
            use_karras_sigmas: false,
            use_exponential_sigmas: false,
            use_beta_sigmas: false,
            use_dynamic_shifting: false,
            solver_p: None,
            shift_terminal: None,
        }
    }
}

impl UniPcConfig {
    /// From the fields of the file; the error names the field that is not supported.
    pub fn new(config: &SchedulerConfig) -> Result<Self> {
        let file: File = config.fields()?;
        let is_flow_model = file.prediction_type == "flow_prediction";
        config.refuse(&[
            ("use_flow_sigmas", is_flow_model && !file.use_flow_sigmas, "only true is supported of a flow model"),
            ("prediction_type", file.use_flow_sigmas && !is_flow_model, "only \"flow_prediction\" has flow sigmas"),
            ("predict_x0", !file.predict_x0, "only true is supported"),
            ("solver_order", !(1..=MAX_ORDER).contains(&file.solver_order), "supported are 1, 2 and 3"),
            // A last step to sigma 0 divides by an infinite distance when its order is above 1: NaN in the reference.
            ("lower_order_final", !file.lower_order_final && file.solver_order > 1, "only true is supported"),
            ("thresholding", file.thresholding, "only false is supported"),
            ("use_dynamic_shifting", file.use_dynamic_shifting, "only false is supported"),
            ("solver_p", file.solver_p.is_some(), "only null is supported"),
            ("shift_terminal", file.shift_terminal.is_some(), "only null is supported"),
        ])?;
        let schedule = if is_flow_model {
            file.flow_schedule(config)?
        } else {
            let schedule = NoiseSchedule::new(config, Defaults::SIGMAS)?;
            Schedule::Noise { schedule, ends_in_sigma_min: file.final_sigmas_type == "sigma_min" }
        };
        Ok(Self {
            schedule,
            solver_order: file.solver_order,
            solver_type: file.solver_type,
            disable_corrector: file.disable_corrector,
        })
    }

    /// The schedule of a model that was trained on discrete timesteps.
    pub(super) fn schedule_mut(&mut self) -> Option<&mut NoiseSchedule> {
        match &mut self.schedule {
            Schedule::Noise { schedule, .. } => Some(schedule),
            Schedule::Flow { .. } => None,
        }
    }

    /// Whether it is for a flow-matching model.
    pub fn is_flow(&self) -> bool {
        matches!(self.schedule, Schedule::Flow { .. })
    }

    /// Most steps of a loop: two equal sigmas would be no distance to divide by.
    pub fn max_steps(&self) -> usize {
        match &self.schedule {
            Schedule::Noise { schedule, .. } if !schedule.is_karras() => schedule.max_steps(Grid::Intervals),
            _ => usize::MAX,
        }
    }
}

impl File {
    fn flow_schedule(&self, config: &SchedulerConfig) -> Result<Schedule> {
        config.refuse(&[
            ("final_sigmas_type", self.final_sigmas_type != "zero", "only \"zero\" is supported"),
            ("use_karras_sigmas", self.use_karras_sigmas, "only false is supported"),
            ("use_exponential_sigmas", self.use_exponential_sigmas, "only false is supported"),
            ("use_beta_sigmas", self.use_beta_sigmas, "only false is supported"),
        ])?;
        Ok(Schedule::Flow { num_train_timesteps: self.num_train_timesteps, shift: self.flow_shift })
    }
}

impl Schedule {
    /// Whole timesteps of the steps and their sigmas, with the one that the last step leads to. Rounded to f32, as the
    /// reference keeps them. `given`: sigmas of flow matching before the shift, instead of evenly spaced ones.
    fn steps(&self, n: usize, given: Option<&[f64]>) -> (Vec<f64>, Vec<f64>) {
        let (timesteps, mut sigmas): (Vec<f64>, Vec<f64>) = match self {
            Self::Flow { num_train_timesteps, shift } => {
                let even = || even_sigmas(*num_train_timesteps, n);
                let sigmas = shifted(*shift, given.map_or_else(even, <[f64]>::to_vec));
                // Timesteps are rounded down: with many steps two of them can be equal.
                (sigmas.iter().map(|sigma| (sigma * *num_train_timesteps as f64).trunc()).collect(), sigmas)
            }
            Self::Noise { schedule, .. } => {
                let (timesteps, sigmas) = schedule.intervals(n);
                (timesteps.into_iter().map(f64::round_ties_even).collect(), sigmas)
            }
        };
        sigmas.push(match self {
            // Unlike the other solvers, UniPC takes the last Karras sigma for the least.
            Self::Noise { schedule, ends_in_sigma_min: true } if schedule.is_karras() => sigmas[n - 1],
            Self::Noise { schedule, .. } => f64::from(schedule.final_sigma()),
            Self::Flow { .. } => 0.0,
        });
        (timesteps, sigmas.into_iter().map(|sigma| f64::from(sigma as f32)).collect())
    }

    /// Signal and noise at a sigma: of flow matching they add up to 1, otherwise their squares do.
    fn level(&self, sigma: f64) -> Level {
        match self {
            Self::Flow { .. } => Level { alpha: 1.0 - sigma, sigma },
            Self::Noise { .. } => Level::from_ratio(sigma),
        }
    }

    fn x0(&self, output: &Tensor, sample: &Tensor, level: Level) -> Result<Tensor> {
        match self {
            Self::Flow { .. } => Ok((sample - (output.to_dtype(DType::F32)? * level.sigma)?)?),
            Self::Noise { schedule, .. } => schedule.prediction().x0(output, sample, level),
        }
    }
}

/// The state of one denoising loop.
///
/// Names as in the paper: at a noise level the sample is `alpha x0 + sigma noise`, and `lambda = ln(alpha / sigma)`.
pub struct UniPc {
    config: UniPcConfig,
    timesteps: Vec<f64>,
    /// One more than timesteps.
    sigmas: Vec<f64>,
    levels: Vec<Level>,
    /// Predicted `x0` of the last steps, newest first; at most `solver_order`.
    predictions: VecDeque<Tensor>,
    /// Sample from which the last prediction step set out, and that step's order.
    last: Option<(Tensor, usize)>,
}

impl UniPc {
    /// The loop over `num_inference_steps` steps, from 1 to [`UniPcConfig::max_steps`].
    pub fn new(config: &UniPcConfig, num_inference_steps: usize) -> Self {
        Self::through(config, config.schedule.steps(num_inference_steps, None))
    }

    /// The loop of a flow-matching model over sigmas that are given, before the shift and without the final 0.
    pub fn over(config: &UniPcConfig, sigmas: &[f64]) -> Self {
        Self::through(config, config.schedule.steps(sigmas.len(), Some(sigmas)))
    }

    fn through(config: &UniPcConfig, (timesteps, sigmas): (Vec<f64>, Vec<f64>)) -> Self {
        let levels = sigmas.iter().map(|sigma| config.schedule.level(*sigma)).collect();
        Self { config: config.clone(), timesteps, sigmas, levels, predictions: VecDeque::new(), last: None }
    }

    /// Noise levels from the first step's to the final 0, one more than there are timesteps.
    pub fn sigmas(&self) -> &[f64] {
        &self.sigmas
    }

    /// The sample at `index` once more, from the step before it, now that its prediction is known.
    fn correct(&self, index: usize, x0: &Tensor) -> Result<Option<Tensor>> {
        let Some((last_sample, order)) = &self.last else { return Ok(None) };
        if self.config.disable_corrector.contains(&(index - 1)) {
            return Ok(None);
        }
        let interval = self.interval(index - 1, *order);
        let rhos = if *order == 1 { vec![0.5] } else { interval.rhos(*order) };
        let mut update = interval.update(&rhos[..order - 1]);
        let newest = -interval.alpha_b_h * rhos[order - 1];
        update.predictions[0] -= newest;
        Ok(Some((update.apply(last_sample, &self.predictions)? + (x0 * newest)?)?))
    }

    /// From the sample at `index` to the next noise level.
    fn predict(&self, index: usize, sample: &Tensor, order: usize) -> Result<Tensor> {
        let interval = self.interval(index, order);
        let rhos = match order {
            1 => Vec::new(),
            // The reference takes the limit of small steps here instead of solving.
            2 => vec![0.5],
            _ => interval.rhos(order - 1),
        };
        interval.update(&rhos).apply(sample, &self.predictions)
    }

    /// The step from `anchor` to the noise level after it, seen by an update of `order`.
    fn interval(&self, anchor: usize, order: usize) -> Interval {
        let lambda = |index: usize| self.levels[index].lambda();
        let (from, to) = (self.levels[anchor], self.levels[anchor + 1]);
        let h = lambda(anchor + 1) - lambda(anchor);
        let phi_1 = (-h).exp_m1();
        let b_h = match self.config.solver_type {
            SolverType::Bh1 => -h,
            SolverType::Bh2 => phi_1,
        };
        Interval {
            ratio: to.sigma / from.sigma,
            alpha_phi_1: to.alpha * phi_1,
            alpha_b_h: to.alpha * b_h,
            distances: (1..order).map(|back| (lambda(anchor - back) - lambda(anchor)) / h).collect(),
            moments: moments(-h, b_h, order),
        }
    }
}

impl Solver for UniPc {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn add_noise(&self, index: usize, sample: &Tensor, noise: &Tensor) -> Result<Tensor> {
        self.levels[index].mix(sample, noise)
    }

    fn predict_clean(&self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        self.config.schedule.x0(model_output, &sample.to_dtype(DType::F32)?, self.levels[index])
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, _: &mut TorchGenerator) -> Result<Tensor> {
        let sample = sample.to_dtype(DType::F32)?;
        // From the sample as it was predicted, not as it is corrected below.
        let x0 = self.config.schedule.x0(model_output, &sample, self.levels[index])?;
        let sample = self.correct(index, &x0)?.unwrap_or(sample);
        self.predictions.truncate(self.config.solver_order - 1);
        self.predictions.push_front(x0);
        let steps_left = self.timesteps.len() - index;
        // The predictions and not the index say how far back the history goes: a loop may begin in the middle.
        let order = self.config.solver_order.min(steps_left).min(self.predictions.len());
        let next = self.predict(index, &sample, order)?;
        self.last = Some((sample, order));
        Ok(next)
    }

    /// The predictions, and with the order of the last step the sample that it set out from.
    fn memory(&self) -> Memory {
        let last = self.last.iter();
        Memory {
            tensors: self.predictions.iter().chain(last.clone().map(|(sample, _)| sample)).cloned().collect(),
            numbers: last.map(|(_, order)| *order).collect(),
        }
    }

    fn remember(&mut self, Memory { mut tensors, numbers }: Memory, steps: usize) -> bool {
        let predictions = steps.min(self.config.solver_order);
        let last = match (steps, &numbers[..]) {
            (0, []) => None,
            (1.., &[order]) if (1..=predictions).contains(&order) => tensors.pop().map(|sample| (sample, order)),
            _ => return false,
        };
        let fits = tensors.len() == predictions && last.is_some() == (steps > 0);
        (self.predictions, self.last) = (tensors.into(), last);
        fits
    }
}

/// Sigmas from 1 down, before the shift and without the final 0.
fn even_sigmas(num_train_timesteps: usize, num_inference_steps: usize) -> Vec<f64> {
    let last = 1.0 / num_train_timesteps as f64;
    let stride = (last - 1.0) / num_inference_steps as f64;
    (0..num_inference_steps).map(|step| step as f64 * stride + 1.0).collect()
}

/// Sigmas of the steps in f64, without the final 0.
fn shifted(shift: f64, mut sigmas: Vec<f64>) -> Vec<f64> {
    sigmas.iter_mut().for_each(|sigma| *sigma = shift * *sigma / (1.0 + (shift - 1.0) * *sigma));
    if (sigmas[0] - 1.0).abs() < FIRST_SIGMA_GAP {
        sigmas[0] -= FIRST_SIGMA_GAP;
    }
    sigmas
}

/// Right-hand sides of the order conditions: `k! phi_{k+1}(hh) hh / B(h)` for k = 1..=order.
fn moments(hh: f64, b_h: f64, order: usize) -> Vec<f64> {
    let mut phi = hh.exp_m1() / hh - 1.0;
    let mut factorial = 1.0;
    let mut moments = Vec::with_capacity(order);
    for k in 1..=order {
        moments.push(phi * factorial / b_h);
        factorial *= (k + 1) as f64;
        phi = phi / hh - 1.0 / factorial;
    }
    moments
}

/// Constants of the way from one noise level to the next.
struct Interval {
    /// `sigma_t / sigma_s`.
    ratio: f64,
    alpha_phi_1: f64,
    alpha_b_h: f64,
    /// Lambda of earlier steps relative to the anchor, in units of this step.
    distances: Vec<f64>,
    moments: Vec<f64>,
}

impl Interval {
    /// Solves the first `count` order conditions; the unknowns belong to the earlier predictions and, when `count` is
    /// one more than there are, to the one at the far end of the step.
    fn rhos(&self, count: usize) -> Vec<f64> {
        let nodes: Vec<f64> = self.distances.iter().copied().chain([1.0]).take(count).collect();
        let rows = (0..count).map(|power| nodes.iter().map(|node| node.powi(power as i32)).collect()).collect();
        solve(rows, self.moments[..count].to_vec())
    }

    /// The update that weighs the difference of each earlier prediction from the newest one by `rhos`.
    fn update(&self, rhos: &[f64]) -> Update {
        let mut predictions = vec![-self.alpha_phi_1];
        for (rho, distance) in rhos.iter().zip(&self.distances) {
            let weight = -self.alpha_b_h * rho / distance;
            predictions[0] -= weight;
            predictions.push(weight);
        }
        Update { sample: self.ratio, predictions }
    }
}

/// Solves `rows x = right` by elimination with row exchange; the systems are at most 3x3 and regular, because noise
/// levels differ.
fn solve(mut rows: Vec<Vec<f64>>, mut right: Vec<f64>) -> Vec<f64> {
    let n = right.len();
    for column in 0..n {
        let pivot = (column..n)
            .max_by(|a, b| rows[*a][column].abs().total_cmp(&rows[*b][column].abs()))
            .expect("the range is not empty: this is a bug");
        rows.swap(column, pivot);
        right.swap(column, pivot);
        for row in column + 1..n {
            let pivot = rows[column].clone();
            let factor = rows[row][column] / pivot[column];
            for (entry, above) in rows[row].iter_mut().zip(&pivot) {
                *entry -= factor * above;
            }
            right[row] -= factor * right[column];
        }
    }
    for row in (0..n).rev() {
        let known: f64 = (row + 1..n).map(|k| rows[row][k] * right[k]).sum();
        right[row] = (right[row] - known) / rows[row][row];
    }
    right
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn read(json: &str) -> Result<UniPcConfig> {
        UniPcConfig::new(&crate::solver::config::tests::read(json)?)
    }

    fn flow(extra: &str) -> Result<UniPcConfig> {
        read(&format!(r#"{{"use_flow_sigmas": true, "prediction_type": "flow_prediction"{extra}}}"#))
    }

    #[test]
    fn unsupported_configurations_name_the_field() {
        for (json, field) in [
            (r#"{"prediction_type": "flow_prediction"}"#, "`use_flow_sigmas`"),
            (r#"{"use_flow_sigmas": true}"#, "`prediction_type`"),
        ] {
            assert!(read(json).unwrap_err().to_string().contains(field), "{json}");
        }
        for (extra, field) in [
            (r#", "predict_x0": false"#, "`predict_x0`"),
            (r#", "final_sigmas_type": "sigma_min""#, "`final_sigmas_type`"),
            (r#", "solver_order": 4"#, "`solver_order`"),
            (r#", "solver_order": 0"#, "`solver_order`"),
            (r#", "lower_order_final": false"#, "`lower_order_final`"),
            (r#", "thresholding": true"#, "`thresholding`"),
            (r#", "use_karras_sigmas": true"#, "`use_karras_sigmas`"),
            (r#", "use_dynamic_shifting": true"#, "`use_dynamic_shifting`"),
            (r#", "solver_p": {}"#, "`solver_p`"),
            (r#", "shift_terminal": 0.1"#, "`shift_terminal`"),
            (r#", "solver_type": "bh3""#, "bh3"),
        ] {
            let message = flow(extra).unwrap_err().to_string();
            assert!(message.contains(field) && message.contains("scheduler_config.json"), "{extra}: {message}");
        }
        assert!(flow(r#", "solver_type": "midpoint""#).is_ok());
    }

    /// A model that knows the answer predicts `noise - x0` everywhere: any order must arrive at `x0`.
    #[test]
    fn a_straight_flow_arrives_whatever_the_order() {
        let x0 = Tensor::new(&[1.5f32, -0.25, 0.75], &Device::Cpu).unwrap();
        let noise = Tensor::new(&[-0.5f32, 2.0, 0.125], &Device::Cpu).unwrap();
        let velocity = (&noise - &x0).unwrap();
        for order in 1..=MAX_ORDER {
            for kind in ["bh1", "bh2"] {
                let config = flow(&format!(r#", "solver_order": {order}, "solver_type": "{kind}", "flow_shift": 3.0"#));
                let mut solver = UniPc::new(&config.unwrap(), 7);
                let mut sample = noise.clone();
                for index in 0..7 {
                    sample = solver.step(index, &velocity, &sample, &mut TorchGenerator::new(0)).unwrap();
                }
                let error = (&sample - &x0).unwrap().abs().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
                assert!(error < 1e-5, "order {order} {kind}: {error}");
            }
        }
    }

    #[test]
    fn small_systems_are_solved() {
        let x = solve(vec![vec![0.0, 1.0, 2.0], vec![1.0, 1.0, 1.0], vec![4.0, -2.0, 1.0]], vec![8.0, 6.0, 3.0]);
        for (found, expected) in x.iter().zip([1.0, 2.0, 3.0]) {
            assert!((found - expected).abs() < 1e-12);
        }
    }
}
