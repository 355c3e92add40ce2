//! What work costs on a device, learned from its steps. Pure: time comes in as the measured cost of steps.
//!
//! A language model's tokens are counted by phase, since one of a prompt costs a fraction of one of an answer. What a picture or a
//! clip takes besides denoising (encoding, decoding, reading of weights) is laid upon its denoising steps, whose amount is known
//! before the first. Does not know: which device it is, or what else runs there.

use tale_models::Request;
use tale_models::request::Phase;
use tale_models::runner::StepPlan;

/// Weight of what is known before each step: the last few hundred steps decide.
const KEPT: f64 = 0.995;

/// Device seconds for an amount of work of one model on one device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rates {
    prefill: Rate,
    decode: Rate,
    diffusion: Rate,
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
