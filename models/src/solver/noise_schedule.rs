//! The noise schedule of models that were trained on discrete timesteps (SDXL and what is made from it): betas, noise
//! levels, which timesteps an inference visits, and how a prediction is read.
//!
//! Owns: everything that the solvers of such models share. Does not know: any solver's update.
//! Source: diffusers `schedulers/scheduling_euler_discrete.py`, whose copies in the other schedulers agree with it
//! except where noted. Betas and noise levels are rounded to f32 where torch rounds them; schedules are computed in
//! f64, as numpy does there.

use candle_core::{DType, Tensor};
use serde::Deserialize;

use crate::error::Result;
use crate::linspace::{numpy_linspace, torch_linspace};
use crate::solver::config::SchedulerConfig;
use crate::solver::names::Spacing;

mod snr_shift;

/// `alphas_cumprod` of the last training timestep after rescaling to zero SNR, where a solver divides by it.
const LAST_ALPHA: f32 = 1.0 / (1 << 24) as f32;
/// Exponent of the schedule of Karras et al. 2022 (<https://arxiv.org/abs/2206.00364>).
const KARRAS_RHO: f64 = 7.0;

/// The fields that the solvers of discrete models share. Where the classes of diffusers have different defaults,
/// absence is kept.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct NoiseScheduleConfig {
    num_train_timesteps: usize,
    beta_start: Option<f64>,
    beta_end: Option<f64>,
    beta_schedule: Option<BetaSchedule>,
    trained_betas: Option<serde_json::Value>,
    prediction_type: PredictionType,
    rescale_betas_zero_snr: bool,
    timestep_spacing: Option<Spacing>,
    steps_offset: usize,
    use_karras_sigmas: Option<bool>,
    use_exponential_sigmas: Option<bool>,
    use_beta_sigmas: Option<bool>,
    sigma_min: Option<f64>,
    sigma_max: Option<f64>,
    final_sigmas_type: FinalSigma,
    snr_shift_scale: Option<f64>,
}

impl Default for NoiseScheduleConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: None,
            beta_end: None,
            beta_schedule: None,
            trained_betas: None,
            prediction_type: PredictionType::Epsilon,
            rescale_betas_zero_snr: false,
            timestep_spacing: None,
            steps_offset: 0,
            use_karras_sigmas: None,
            use_exponential_sigmas: None,
            use_beta_sigmas: None,
            sigma_min: None,
            sigma_max: None,
            final_sigmas_type: FinalSigma::Zero,
            snr_shift_scale: None,
        }
    }
}

/// How the betas rise over training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum BetaSchedule {
    /// Evenly.
    Linear,
    /// Their roots evenly.
    ScaledLinear,
    /// From a squared cosine (Nichol and Dhariwal 2021), each at most 0.999.
    #[serde(rename = "squaredcos_cap_v2")]
    SquaredCosine,
}

/// What the model predicts of `alpha x0 + sigma noise`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise.
    Epsilon,
    /// `alpha noise - sigma x0`.
    VPrediction,
    /// `x0`.
    Sample,
    /// `noise - x0`: a flow-matching model, which has no discrete noise schedule.
    FlowPrediction,
}

/// Where the last step leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinalSigma {
    /// To no noise.
    Zero,
    /// To the least noise of training.
    SigmaMin,
}

/// Whether a beta takes all of the signal's variance, or adds to it.
fn is_no_share(beta: Option<f64>) -> bool {
    beta.is_some_and(|beta| !(beta > 0.0 && beta < 1.0))
}

/// What `n` steps mean to a solver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grid {
    /// `n` timesteps, the last being the first of training.
    Points,
    /// `n + 1` timesteps, the last of which is only arrived at.
    Intervals,
}

/// Defaults that differ between the classes of diffusers.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    beta_start: f64,
    beta_end: f64,
    beta_schedule: BetaSchedule,
    spacing: Spacing,
    /// Whether the class has fields for other spacings of sigmas (Karras and its like) and for the last one. One that
    /// has none ignores what another class left in the file.
    spaces_sigmas: bool,
    /// Of classes that shift the signal-to-noise ratio of training: by how much.
    snr_shift_scale: Option<f64>,
}

impl Defaults {
    /// Of Euler, DPM-Solver and UniPC.
    pub const SIGMAS: Self = Self {
        beta_start: 0.0001,
        beta_end: 0.02,
        beta_schedule: BetaSchedule::Linear,
        spacing: Spacing::Linspace,
        spaces_sigmas: true,
        snr_shift_scale: None,
    };
    /// Of Euler ancestral.
    pub const EULER_ANCESTRAL: Self = Self { spaces_sigmas: false, ..Self::SIGMAS };
    /// Of DDIM.
    pub const DDIM: Self = Self { spacing: Spacing::Leading, ..Self::EULER_ANCESTRAL };
    /// Of LCM and TCD.
    pub const CONSISTENCY: Self =
        Self { beta_start: 0.00085, beta_end: 0.012, beta_schedule: BetaSchedule::ScaledLinear, ..Self::DDIM };
    /// Of both solvers of CogVideoX.
    pub const COGVIDEOX: Self = Self { snr_shift_scale: Some(3.0), ..Self::CONSISTENCY };
}

/// Noise levels of training and the rules by which an inference walks through them.
#[derive(Debug, Clone)]
pub struct NoiseSchedule {
    num_train_timesteps: usize,
    prediction: Prediction,
    spacing: Spacing,
    steps_offset: usize,
    final_sigma: FinalSigma,
    /// Limits of the Karras schedule when the file gives them: least and most noise.
    karras: Option<(Option<f64>, Option<f64>)>,
    zero_terminal_snr: bool,
    /// Whether betas follow a squared cosine.
    is_cosine: bool,
    /// Share of the signal's variance that is left at each timestep of training: an f32, but for shifted ones.
    alphas_cumprod: Vec<f64>,
}

impl NoiseSchedule {
    /// The schedule that the file describes; a value that is not computed here is refused by the field's name.
    pub fn new(file: &SchedulerConfig, defaults: Defaults) -> Result<Self> {
        let mut config: NoiseScheduleConfig = file.fields()?;
        if !defaults.spaces_sigmas {
            (config.use_karras_sigmas, config.use_exponential_sigmas, config.use_beta_sigmas) = (None, None, None);
            config.final_sigmas_type = FinalSigma::Zero;
        }
        let prediction = Prediction::of(config.prediction_type);
        file.refuse(&[
            ("prediction_type", prediction.is_none(), "this solver is not for flow-matching models"),
            ("trained_betas", config.trained_betas.is_some(), "only null is supported"),
            ("use_exponential_sigmas", config.use_exponential_sigmas == Some(true), "only false is supported"),
            ("use_beta_sigmas", config.use_beta_sigmas == Some(true), "only false is supported"),
            ("num_train_timesteps", config.num_train_timesteps < 2, "must be 2 or more"),
            ("beta_start", is_no_share(config.beta_start), "must be above 0 and below 1"),
            ("beta_end", is_no_share(config.beta_end), "must be above 0 and below 1"),
            (
                "sigma_min",
                config.sigma_min.zip(config.sigma_max).is_some_and(|(min, max)| min >= max),
                "must be below sigma_max",
            ),
        ])?;
        let schedule = Self {
            num_train_timesteps: config.num_train_timesteps,
            prediction: prediction.expect("refused above"),
            spacing: config.timestep_spacing.unwrap_or(defaults.spacing),
            steps_offset: config.steps_offset,
            final_sigma: config.final_sigmas_type,
            karras: (config.use_karras_sigmas == Some(true)).then_some((config.sigma_min, config.sigma_max)),
            zero_terminal_snr: config.rescale_betas_zero_snr,
            is_cosine: config.beta_schedule.unwrap_or(defaults.beta_schedule) == BetaSchedule::SquaredCosine,
            alphas_cumprod: match defaults.snr_shift_scale {
                Some(scale) => snr_shift::alphas_cumprod(&config, defaults, config.snr_shift_scale.unwrap_or(scale)),
                None => alphas_cumprod(&config, defaults),
            },
        };
        let is_level = |sigma: &f32| *sigma > 0.0 && sigma.is_finite();
        let is_wrong = !schedule.training_sigmas().iter().all(is_level);
        file.refuse(&[("beta_end", is_wrong, "gives, with beta_start, timesteps without noise or without signal")])?;
        Ok(schedule)
    }

    /// How this model's output is read.
    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// See [`Spacing`].
    pub fn spacing(&self) -> Spacing {
        self.spacing
    }

    /// The same with another spacing.
    pub fn set_spacing(&mut self, spacing: Spacing) {
        self.spacing = spacing;
    }

    /// Whether the sigmas of an inference are spaced by the rule of Karras et al.
    pub fn is_karras(&self) -> bool {
        self.karras.is_some()
    }

    /// Whether betas follow a squared cosine.
    pub fn is_cosine(&self) -> bool {
        self.is_cosine
    }

    /// Timesteps of training.
    pub fn num_train_timesteps(&self) -> usize {
        self.num_train_timesteps
    }

    /// Share of the signal's variance that is left at a timestep of training: 0 at the last one with zero SNR.
    pub fn alpha_cumprod(&self, timestep: usize) -> f64 {
        self.alphas_cumprod[timestep]
    }

    /// Signal and noise at a timestep of training.
    pub fn level(&self, timestep: usize) -> Level {
        Level::from_variance(self.alpha_cumprod(timestep))
    }

    /// Noise relative to signal at each timestep of training, never infinite.
    pub fn training_sigmas(&self) -> Vec<f32> {
        let mut alphas: Vec<f32> = self.alphas_cumprod.iter().map(|alpha| *alpha as f32).collect();
        if self.zero_terminal_snr {
            *alphas.last_mut().expect("there are timesteps: checked above") = LAST_ALPHA;
        }
        alphas.iter().map(|alpha| ((1.0 - alpha) / alpha).sqrt()).collect()
    }

    /// The timesteps of `n` steps, falling; fractions where `linspace` makes them.
    ///
    /// `numpy.arange` gives the `trailing` timesteps of some counts (61 is the first) one more, -1, from a rounding
    /// error; here `n` steps are `n` steps.
    pub fn timesteps(&self, n: usize, grid: Grid) -> Vec<f64> {
        let train = self.num_train_timesteps;
        let points = n + usize::from(grid == Grid::Intervals);
        let skipped = points - n;
        match self.spacing {
            Spacing::Linspace => numpy_linspace(0.0, (train - 1) as f64, points).into_iter().rev().take(n).collect(),
            Spacing::Leading => {
                let stride = train / points;
                (skipped..points).rev().map(|k| (k * stride + self.steps_offset) as f64).collect()
            }
            Spacing::Trailing => {
                let (start, stride) = (train as f64, train as f64 / n as f64);
                // numpy adds the difference of the first two values, not the stride itself.
                let difference = (start - stride) - start;
                (0..n).map(|k| (start + k as f64 * difference).round_ties_even() - 1.0).collect()
            }
        }
    }

    /// Most steps for which all timesteps are different ones of training.
    pub fn max_steps(&self, grid: Grid) -> usize {
        let train = self.num_train_timesteps;
        let points = |n: usize| n + usize::from(grid == Grid::Intervals);
        let highest = |n: usize| match self.spacing {
            Spacing::Leading => (points(n) - 1) * (train / points(n)) + self.steps_offset,
            Spacing::Linspace | Spacing::Trailing => train - 1,
        };
        let distinct = |n: usize| if self.spacing == Spacing::Trailing { n <= train } else { points(n) <= train };
        (1..=train).take_while(|n| distinct(*n) && highest(*n) < train).count()
    }

    /// Timesteps of `n` steps between `n + 1` points, and their sigmas without the one that the last step leads to. With
    /// Karras sigmas the timesteps are fractions; how they are rounded is the solver's affair.
    pub fn intervals(&self, n: usize) -> (Vec<f64>, Vec<f64>) {
        if self.is_karras() {
            let falling: Vec<f64> = self.training_sigmas().iter().rev().map(|sigma| f64::from(*sigma)).collect();
            let (sigmas, logs) = (self.karras_sigmas(&falling, n), self.log_training_sigmas());
            return (sigmas.iter().map(|sigma| self.timestep_of(*sigma, &logs)).collect(), sigmas);
        }
        let timesteps = self.timesteps(n, Grid::Intervals).into_iter().map(f64::round_ties_even).collect::<Vec<_>>();
        let sigmas = self.sigmas_at(&timesteps);
        (timesteps, sigmas)
    }

    /// The sigmas of `timesteps`, between those of training.
    pub fn sigmas_at(&self, timesteps: &[f64]) -> Vec<f64> {
        let training = self.training_sigmas();
        timesteps.iter().map(|timestep| interpolate(&training, *timestep)).collect()
    }

    /// `n` sigmas spaced evenly in their seventh root between the first and the last of `sigmas`, which fall.
    pub fn karras_sigmas(&self, sigmas: &[f64], n: usize) -> Vec<f64> {
        let (least, most) = self.karras.unwrap_or_default();
        let root = |sigma: f64| sigma.powf(1.0 / KARRAS_RHO);
        let first = root(most.unwrap_or(sigmas[0]));
        let last = root(least.unwrap_or(sigmas[sigmas.len() - 1]));
        numpy_linspace(0.0, 1.0, n).iter().map(|ramp| (first + ramp * (last - first)).powf(KARRAS_RHO)).collect()
    }

    /// The timestep, a fraction, at which training has `sigma`: linear between the logarithms of its neighbours.
    pub fn timestep_of(&self, sigma: f64, log_training_sigmas: &[f32]) -> f64 {
        let log_sigma = sigma.max(1e-10).ln();
        let below = log_training_sigmas.iter().rposition(|level| log_sigma >= f64::from(*level)).unwrap_or(0);
        let below = below.min(log_training_sigmas.len() - 2);
        let (low, high) = (log_training_sigmas[below], log_training_sigmas[below + 1]);
        let weight = ((f64::from(low) - log_sigma) / f64::from(low - high)).clamp(0.0, 1.0);
        (1.0 - weight) * below as f64 + weight * (below + 1) as f64
    }

    /// Natural logarithms of [`NoiseSchedule::training_sigmas`].
    pub fn log_training_sigmas(&self) -> Vec<f32> {
        self.training_sigmas().iter().map(|sigma| sigma.ln()).collect()
    }

    /// What the last step leads to.
    pub fn final_sigma(&self) -> f32 {
        match self.final_sigma {
            FinalSigma::Zero => 0.0,
            FinalSigma::SigmaMin => self.training_sigmas()[0],
        }
    }
}

/// Of a schedule that is computed in f32.
fn alphas_cumprod(config: &NoiseScheduleConfig, defaults: Defaults) -> Vec<f64> {
    let mut betas = betas(config, defaults);
    if config.rescale_betas_zero_snr {
        rescale_zero_terminal_snr(&mut betas);
    }
    cumulative_product(betas.iter().map(|beta| 1.0 - beta)).into_iter().map(f64::from).collect()
}

fn betas(config: &NoiseScheduleConfig, defaults: Defaults) -> Vec<f32> {
    let n = config.num_train_timesteps;
    let start = config.beta_start.unwrap_or(defaults.beta_start);
    let end = config.beta_end.unwrap_or(defaults.beta_end);
    match config.beta_schedule.unwrap_or(defaults.beta_schedule) {
        BetaSchedule::Linear => torch_linspace(start as f32, end as f32, n),
        BetaSchedule::ScaledLinear => {
            torch_linspace(start.sqrt() as f32, end.sqrt() as f32, n).iter().map(|root| root * root).collect()
        }
        BetaSchedule::SquaredCosine => {
            let alpha_bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::PI / 2.0).cos().powi(2);
            let at = |i: usize| alpha_bar(i as f64 / n as f64);
            (0..n).map(|i| (1.0 - at(i + 1) / at(i)).min(0.999) as f32).collect()
        }
    }
}

/// `torch.cumprod` in f32 on the CPU: summed up in f64, rounded when stored.
fn cumulative_product(factors: impl Iterator<Item = f32>) -> Vec<f32> {
    let step = |product: &mut f64, factor: f32| {
        *product *= f64::from(factor);
        Some(*product as f32)
    };
    factors.scan(1.0, step).collect()
}

/// Betas under which nothing of the signal is left at the last timestep, the first being kept (Lin et al. 2023,
/// algorithm 1). diffusers `scheduling_ddim.py`, `rescale_zero_terminal_snr`.
fn rescale_zero_terminal_snr(betas: &mut [f32]) {
    let mut roots: Vec<f32> =
        cumulative_product(betas.iter().map(|beta| 1.0 - beta)).iter().map(|alpha| alpha.sqrt()).collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let scale = first / (first - last);
    roots.iter_mut().for_each(|root| *root = (*root - last) * scale);
    let mut before = 1.0;
    for (beta, root) in betas.iter_mut().zip(roots) {
        let alpha = root * root;
        *beta = 1.0 - alpha / before;
        before = alpha;
    }
}

/// `numpy.interp` of values at 0, 1, 2, ...: the ends go on beyond.
fn interpolate(values: &[f32], at: f64) -> f64 {
    let last = values.len() - 1;
    if at >= last as f64 {
        return f64::from(values[last]);
    }
    let below = at.max(0.0) as usize;
    let (low, high) = (f64::from(values[below]), f64::from(values[below + 1]));
    (high - low) * (at.max(0.0) - below as f64) + low
}

/// A noise level: the sample is `alpha x0 + sigma noise`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Level {
    /// Of the signal.
    pub alpha: f64,
    /// Of the noise.
    pub sigma: f64,
}

impl Level {
    /// The level whose variance is 1 and whose noise relative to the signal is `ratio`.
    pub fn from_ratio(ratio: f64) -> Self {
        let alpha = 1.0 / (ratio * ratio + 1.0).sqrt();
        Self { alpha, sigma: ratio * alpha }
    }

    /// The level whose variance is 1 and whose signal has the variance `alpha_cumprod`.
    pub fn from_variance(alpha_cumprod: f64) -> Self {
        Self { alpha: alpha_cumprod.sqrt(), sigma: (1.0 - alpha_cumprod).sqrt() }
    }

    /// Half the logarithm of the signal-to-noise ratio; infinite without noise.
    pub fn lambda(&self) -> f64 {
        self.alpha.ln() - self.sigma.ln()
    }

    /// `x0` with this much `noise`.
    pub fn mix(&self, x0: &Tensor, noise: &Tensor) -> Result<Tensor> {
        Ok(((x0 * self.alpha)? + (noise * self.sigma)?)?)
    }
}

/// What a model on a discrete noise schedule predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Prediction {
    Epsilon,
    VPrediction,
    Sample,
}

impl Prediction {
    fn of(field: PredictionType) -> Option<Self> {
        match field {
            PredictionType::Epsilon => Some(Self::Epsilon),
            PredictionType::VPrediction => Some(Self::VPrediction),
            PredictionType::Sample => Some(Self::Sample),
            PredictionType::FlowPrediction => None,
        }
    }

    /// `x0`, from the output for `sample` at `level`, whose variance is 1. In f32.
    pub fn x0(self, output: &Tensor, sample: &Tensor, level: Level) -> Result<Tensor> {
        let (output, sample) = (output.to_dtype(DType::F32)?, sample.to_dtype(DType::F32)?);
        match self {
            Self::Epsilon => Ok(((sample - (output * level.sigma)?)? / level.alpha)?),
            Self::VPrediction => Ok(((sample * level.alpha)? - (output * level.sigma)?)?),
            Self::Sample => Ok(output),
        }
    }

    /// The noise, from the output for `sample` at `level`, whose variance is 1. In f32.
    pub fn noise(self, output: &Tensor, sample: &Tensor, level: Level) -> Result<Tensor> {
        let (output, sample) = (output.to_dtype(DType::F32)?, sample.to_dtype(DType::F32)?);
        match self {
            Self::Epsilon => Ok(output),
            Self::VPrediction => Ok(((output * level.alpha)? + (sample * level.sigma)?)?),
            Self::Sample => Ok(((sample - (output * level.alpha)?)? / level.sigma)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solver::config::tests::read;

    /// SDXL's schedule with these fields.
    fn schedule(extra: &str) -> Result<NoiseSchedule> {
        let sdxl = r#""beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear""#;
        NoiseSchedule::new(&read(&format!("{{{sdxl}{extra}}}"))?, Defaults::SIGMAS)
    }

    #[test]
    fn values_that_are_not_computed_are_refused_by_name() {
        for (extra, field) in [
            (r#", "use_beta_sigmas": true"#, "`use_beta_sigmas`"),
            (r#", "use_exponential_sigmas": true"#, "`use_exponential_sigmas`"),
            (r#", "trained_betas": [0.1, 0.2]"#, "`trained_betas`"),
            (r#", "prediction_type": "flow_prediction""#, "`prediction_type`"),
            (r#", "num_train_timesteps": 1"#, "`num_train_timesteps`"),
            (r#", "timestep_spacing": "sideways""#, "sideways"),
            (r#", "final_sigmas_type": "half""#, "half"),
        ] {
            let message = schedule(extra).expect_err(field).to_string();
            assert!(message.contains(field) && message.contains("scheduler_config.json"), "{message}");
        }
    }

    #[test]
    fn spacings_visit_what_the_paper_says() {
        // Lin et al. 2023, table 2, counted from 0.
        let visited = |spacing: &str, grid| {
            let extra = format!(r#", "timestep_spacing": "{spacing}""#);
            schedule(&extra).expect("a schedule").timesteps(10, grid)
        };
        assert_eq!(visited("linspace", Grid::Points), (0..10).rev().map(|k| f64::from(k) * 111.0).collect::<Vec<_>>());
        assert_eq!(visited("leading", Grid::Points), (0..10).rev().map(|k| f64::from(k) * 100.0).collect::<Vec<_>>());
        assert_eq!(
            visited("trailing", Grid::Points),
            (1..=10).rev().map(|k| f64::from(k) * 100.0 - 1.0).collect::<Vec<_>>()
        );
        // The eleventh timestep, 0, is only arrived at.
        assert_eq!(visited("leading", Grid::Intervals), (1..11).rev().map(|k| f64::from(k) * 90.0).collect::<Vec<_>>());
        let offset = schedule(r#", "timestep_spacing": "leading", "steps_offset": 1"#).expect("a schedule");
        assert_eq!(offset.timesteps(1, Grid::Points), [1.0]);
        assert_eq!(offset.timesteps(2, Grid::Points), [501.0, 1.0]);
    }

    #[test]
    fn more_steps_than_training_has_are_told_in_advance() {
        for (extra, points, intervals) in [
            (r#", "timestep_spacing": "linspace""#, 1000, 999),
            (r#", "timestep_spacing": "trailing""#, 1000, 1000),
            (r#", "timestep_spacing": "leading""#, 1000, 999),
            (r#", "timestep_spacing": "leading", "steps_offset": 1"#, 999, 998),
            // From 200 steps on a fifth of 1000 and the offset are past the end.
            (r#", "timestep_spacing": "leading", "steps_offset": 5"#, 199, 198),
        ] {
            let schedule = schedule(extra).expect("a schedule");
            for (grid, expected) in [(Grid::Points, points), (Grid::Intervals, intervals)] {
                assert_eq!(schedule.max_steps(grid), expected, "{extra} {grid:?}");
                for n in [1, 2, 3, 50, expected] {
                    let timesteps = schedule.timesteps(n, grid);
                    assert!(timesteps[0] <= 999.0 && timesteps.windows(2).all(|pair| pair[0] > pair[1]), "{extra} {n}");
                }
            }
        }
    }

    /// numpy's rounding gives the reference one more here.
    #[test]
    fn trailing_has_as_many_timesteps_as_are_asked_for() {
        let trailing = schedule(r#", "timestep_spacing": "trailing""#).expect("a schedule");
        for n in 1..=1000 {
            let timesteps = trailing.timesteps(n, Grid::Points);
            assert_eq!((timesteps.len(), timesteps[0]), (n, 999.0));
            assert!(timesteps[n - 1] >= 0.0, "{n}");
        }
    }

    #[test]
    fn noise_of_sdxl_runs_from_0_03_to_14_6_and_further_with_zero_snr() {
        let sigmas = schedule("").expect("a schedule").training_sigmas();
        assert!((sigmas[0] - 0.0292).abs() < 1e-4 && (sigmas[999] - 14.6146).abs() < 1e-3, "{sigmas:?}");
        assert!(sigmas.is_sorted());
        let rescaled = schedule(r#", "rescale_betas_zero_snr": true"#).expect("a schedule");
        assert_eq!(rescaled.alphas_cumprod[999], 0.0);
        assert!((rescaled.training_sigmas()[999] - 4096.0).abs() < 1e-3, "not infinite");
        assert!((rescaled.training_sigmas()[0] - sigmas[0]).abs() < 1e-6, "the least noise is kept");
    }

    #[test]
    fn timesteps_of_the_training_sigmas_are_their_indices() {
        let schedule = schedule("").expect("a schedule");
        let logs = schedule.log_training_sigmas();
        for (index, sigma) in schedule.training_sigmas().into_iter().enumerate() {
            assert!((schedule.timestep_of(f64::from(sigma), &logs) - index as f64).abs() < 1e-2, "{index}");
        }
        assert_eq!(schedule.timestep_of(1e9, &logs), 999.0);
        assert_eq!(schedule.timestep_of(0.0, &logs), 0.0);
    }

    /// Whatever the model predicts, a true prediction gives back what the sample was mixed from.
    #[test]
    fn true_predictions_give_back_the_picture_and_the_noise() {
        let row = |values: &[f32]| Tensor::new(values, &candle_core::Device::Cpu).expect("a tensor");
        let (x0, noise) = (row(&[1.0, -0.5, 0.25]), row(&[0.3, 2.0, -1.0]));
        let level = Level::from_ratio(1.75);
        let sample = level.mix(&x0, &noise).expect("a mixture");
        let velocity = Level { alpha: -level.sigma, sigma: level.alpha }.mix(&x0, &noise).expect("a velocity");
        for (prediction, output) in
            [(Prediction::Epsilon, &noise), (Prediction::VPrediction, &velocity), (Prediction::Sample, &x0)]
        {
            for (found, expected) in
                [(prediction.x0(output, &sample, level), &x0), (prediction.noise(output, &sample, level), &noise)]
            {
                let difference = (found.expect("computed") - expected).expect("one shape");
                let error = difference.abs().and_then(|d| d.max(0)?.to_scalar::<f32>()).expect("a number");
                assert!(error < 1e-6, "{prediction:?}: {error}");
            }
        }
    }
}
