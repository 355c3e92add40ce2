//! A schedule whose signal-to-noise ratio is shifted by a constant, and rescaled after that.
//!
//! Source: diffusers `schedulers/scheduling_ddim_cogvideox.py`, `CogVideoXDDIMScheduler.__init__`, which computes in f64
//! what comes of scaled-linear betas, and in f32 what comes of others.

use super::{BetaSchedule, Defaults, NoiseScheduleConfig, betas};
use crate::linspace::numpy_linspace;

/// What becomes of the result of one operation on numbers of the kind that the reference computes in. A sum, product, quotient
/// or root of two f32 that is computed in f64 and then rounded is the one computed in f32.
type Rounding = fn(f64) -> f64;

/// Share of the signal's variance that is left at each timestep of training, the ratio of signal to noise divided by
/// `scale` (Esser et al. 2024, <https://arxiv.org/abs/2403.03206>, of larger pictures).
pub(super) fn alphas_cumprod(config: &NoiseScheduleConfig, defaults: Defaults, scale: f64) -> Vec<f64> {
    let (betas, rounded): (Vec<f64>, Rounding) = match config.beta_schedule.unwrap_or(defaults.beta_schedule) {
        BetaSchedule::ScaledLinear => {
            let start = config.beta_start.unwrap_or(defaults.beta_start);
            let end = config.beta_end.unwrap_or(defaults.beta_end);
            let roots = numpy_linspace(start.sqrt(), end.sqrt(), config.num_train_timesteps);
            (roots.iter().map(|root| root * root).collect(), |value| value)
        }
        BetaSchedule::Linear | BetaSchedule::SquaredCosine => {
            (betas(config, defaults).into_iter().map(f64::from).collect(), |value| f64::from(value as f32))
        }
    };
    // `torch.cumprod` multiplies in f64 and rounds what it stores.
    let product = |product: &mut f64, beta: f64| {
        *product *= rounded(1.0 - beta);
        Some(rounded(*product))
    };
    let mut alphas: Vec<f64> = betas.into_iter().scan(1.0, product).collect();
    for alpha in &mut alphas {
        let divisor = rounded(rounded(scale) + rounded(rounded(1.0 - scale) * *alpha));
        *alpha = rounded(*alpha / divisor);
    }
    if config.rescale_betas_zero_snr {
        rescale(&mut alphas, rounded);
    }
    alphas
}

/// Nothing of the signal is left at the last timestep, and as much as before at the first (Lin et al. 2023,
/// <https://arxiv.org/abs/2305.08891>, algorithm 1).
fn rescale(alphas: &mut [f64], rounded: Rounding) {
    let root = |alpha: f64| rounded(alpha.sqrt());
    let (first, last) = (root(alphas[0]), root(alphas[alphas.len() - 1]));
    let factor = rounded(first / rounded(first - last));
    for alpha in alphas {
        let root = rounded(rounded(root(*alpha) - last) * factor);
        *alpha = rounded(root * root);
    }
}
