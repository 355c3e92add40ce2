//! A schedule whose signal-to-noise ratio is shifted by a constant, and rescaled after that.
//!
//! Source: diffusers `schedulers/scheduling_ddim_cogvideox.py`, `CogVideoXDDIMScheduler.__init__`, which computes in f64
//! what comes of scaled-linear betas.

use super::{BetaSchedule, Defaults, NoiseScheduleConfig, betas, linspace};

/// Share of the signal's variance that is left at each timestep of training, the ratio of signal to noise divided by
/// `scale` (Esser et al. 2024, <https://arxiv.org/abs/2403.03206>, of larger pictures).
pub(super) fn alphas_cumprod(config: &NoiseScheduleConfig, defaults: Defaults, scale: f64) -> Vec<f64> {
    let betas: Vec<f64> = match config.beta_schedule.unwrap_or(defaults.beta_schedule) {
        BetaSchedule::ScaledLinear => {
            let start = config.beta_start.unwrap_or(defaults.beta_start);
            let end = config.beta_end.unwrap_or(defaults.beta_end);
            linspace(start.sqrt(), end.sqrt(), config.num_train_timesteps).iter().map(|root| root * root).collect()
        }
        BetaSchedule::Linear | BetaSchedule::SquaredCosine => {
            betas(config, defaults).into_iter().map(f64::from).collect()
        }
    };
    let product = |product: &mut f64, beta: f64| {
        *product *= 1.0 - beta;
        Some(*product)
    };
    let mut alphas: Vec<f64> = betas.into_iter().scan(1.0, product).collect();
    alphas.iter_mut().for_each(|alpha| *alpha /= scale + (1.0 - scale) * *alpha);
    if config.rescale_betas_zero_snr {
        rescale(&mut alphas);
    }
    alphas
}

/// Nothing of the signal is left at the last timestep, and as much as before at the first (Lin et al. 2023,
/// <https://arxiv.org/abs/2305.08891>, algorithm 1).
fn rescale(alphas: &mut [f64]) {
    let (first, last) = (alphas[0].sqrt(), alphas[alphas.len() - 1].sqrt());
    let factor = first / (first - last);
    for alpha in alphas {
        let root = (alpha.sqrt() - last) * factor;
        *alpha = root * root;
    }
}
