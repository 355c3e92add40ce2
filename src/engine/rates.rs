//! What work costs on a device, learned from its steps. Pure: time comes in as the measured cost of steps.
//!
//! A language model's tokens are counted by phase, since one of a prompt costs a fraction of one of an answer. What a picture or a
//! clip takes besides denoising (encoding, decoding, reading of weights) is laid upon its denoising steps, whose amount is known
//! before the first. What a denoising step costs is known for each number of sessions that share it, too: one more may cost little.
//! Does not know: which device it is, or what else runs there.

use tale_models::Request;
use tale_models::request::Phase;
use tale_models::runner::StepPlan;

/// Weight of what is known before each step: the last few hundred steps decide.
const KEPT: f64 = 0.995;

/// Sessions of one denoising step whose cost is learned by their number.
const MAX_SHARING: usize = 16;
/// A session more is never expected to take less than this part of what it takes alone: what is beside denoising it has alone.
const LEAST_SHARE: f64 = 0.1;

/// Device seconds for an amount of work of one model on one device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rates {
    prefill: Rate,
    decode: Rate,
    diffusion: Rate,
    /// Of denoising alone, for one session and more.
    denoise: [Rate; MAX_SHARING],
}

#[derive(Debug, Clone, Copy, Default)]
struct Rate {
    seconds: f64,
    amount: f64,
}

impl Rate {
    fn learn(&mut self, seconds: f64, amount: f64) {
        *self = Self { seconds: KEPT * self.seconds + seconds, amount: KEPT * self.amount + amount };
    }

    /// `None` while nothing was done.
    fn seconds_for(self, amount: f64) -> Option<f64> {
        (self.amount > 0.0).then(|| amount * self.seconds / self.amount)
    }
}

impl Rates {
    /// Books a step.
    pub fn learn(&mut self, step: &StepPlan, seconds: f64) {
        let rate = match step.phase {
            Phase::Prefill => &mut self.prefill,
            Phase::Decode => &mut self.decode,
            _ => &mut self.diffusion,
        };
        rate.learn(seconds, step.amount);
        let sharing = step.sessions.checked_sub(1).and_then(|others| self.denoise.get_mut(others));
        if let (Phase::Denoise, Some(rate)) = (step.phase, sharing) {
            rate.learn(seconds, step.amount);
        }
    }

    /// What one more picture or clip takes beside `others` of its shape, which share its steps, as a part of what it takes alone; all
    /// of it where so many have not shared steps yet, or cannot.
    pub fn share_beside(&self, others: usize) -> f64 {
        let seconds = |sessions: usize| self.denoise.get(sessions.checked_sub(1)?)?.seconds_for(sessions as f64);
        match (seconds(1), seconds(others), seconds(others + 1)) {
            (Some(alone), Some(before), Some(with_it)) if alone > 0.0 => {
                ((with_it - before) / alone).clamp(LEAST_SHARE, 1.0)
            }
            _ => 1.0,
        }
    }

    /// Device seconds of a request, of whose prompt so many tokens are there already; `None` while it is not known what such work
    /// costs.
    pub fn predict(&self, request: &Request, cached_tokens: usize) -> Option<f64> {
        match request {
            Request::Text(text) => {
                let prompt = text.prompt.len().saturating_sub(cached_tokens).max(1);
                let prefill = self.prefill.seconds_for(prompt as f64)?;
                Some(prefill + self.decode.seconds_for(text.max_tokens as f64).unwrap_or(0.0))
            }
            Request::Diffusion(request) => self.diffusion.seconds_for(request.denoising_amount()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tale_models::request::TextRequest;

    #[test]
    fn one_more_of_a_shape_takes_what_steps_have_grown_by() {
        let mut rates = Rates::default();
        let learn = |rates: &mut Rates, sessions: usize, seconds| {
            (0..50).for_each(|_| {
                rates.learn(&StepPlan { phase: Phase::Denoise, sessions, amount: 7.0 * sessions as f64 }, seconds);
            });
        };
        learn(&mut rates, 1, 1.0);
        assert_eq!([0, 1, 2].map(|others| rates.share_beside(others)), [1.0; 3]);
        // Two take as long as one and a quarter, three no longer than two, four as long as ten.
        [(2, 1.25), (3, 1.25), (4, 10.0)]
            .into_iter()
            .for_each(|(sessions, seconds)| learn(&mut rates, sessions, seconds));
        let found = [0, 1, 2, 3, 4, MAX_SHARING, usize::MAX - 1].map(|others| rates.share_beside(others));
        let expected = [1.0, 0.25, LEAST_SHARE, 1.0, 1.0, 1.0, 1.0];
        assert!(found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-9), "{found:?}");
        // What is read or decoded says nothing of denoising.
        rates.learn(&StepPlan { phase: Phase::VaeDecode, sessions: 1, amount: 0.0 }, 100.0);
        assert!((rates.share_beside(1) - 0.25).abs() < 1e-9);
    }

    #[test]
    fn what_was_measured_is_predicted() {
        let mut rates = Rates::default();
        let request = Request::Text(TextRequest::greedy(vec![1; 100], 10));
        assert_eq!(rates.predict(&request, 0), None);
        let step = |phase, amount| StepPlan { phase, sessions: 1, amount };
        for _ in 0..1000 {
            rates.learn(&step(Phase::Prefill, 512.0), 0.512);
            rates.learn(&step(Phase::Decode, 4.0), 0.04);
        }
        let close = |found: Option<f64>, expected: f64| (found.unwrap_or(0.0) - expected).abs() < 1e-9;
        assert!(close(rates.predict(&request, 0), 0.2), "{rates:?}");
        assert!(close(rates.predict(&request, 60), 0.14), "{rates:?}");
        // A device that has become slower is known to be so after some hundred steps.
        (0..1000).for_each(|_| rates.learn(&step(Phase::Prefill, 512.0), 5.12));
        let slower = rates.predict(&request, 0).unwrap_or(0.0);
        assert!((slower - 1.1).abs() < 0.01, "{slower}");
    }
}
