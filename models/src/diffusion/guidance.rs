//! How far the prompt is followed, what is steered away from, and in which steps.

/// Every step is guided.
pub const WHOLE_INTERVAL: [f64; 2] = [0.0, 1.0];

/// Guidance of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Guidance {
    /// As in diffusers: embedded guidance (FLUX.1-dev) or classifier-free guidance (SDXL, Wan).
    pub guidance_scale: f64,
    /// Of models whose `guidance_scale` is not that of classifier-free guidance (FLUX.1), as in diffusers: the scale of a
    /// second, negative prediction.
    pub true_cfg_scale: Option<f64>,
    /// Fractions of the steps between which the negative prediction is made; see [`Guidance::is_guided_at`].
    pub interval: [f64; 2],
    /// What to steer away from; `None` where the model or the guidance scale uses none.
    pub negative_prompt: Option<NegativePrompt>,
}

impl Guidance {
    /// One prediction a step, at a scale of 1.
    pub fn none() -> Self {
        Self { guidance_scale: 1.0, true_cfg_scale: None, interval: WHOLE_INTERVAL, negative_prompt: None }
    }

    /// How far the negative prediction, where there is one, is left behind.
    pub fn cfg_scale(&self) -> f64 {
        self.true_cfg_scale.unwrap_or(self.guidance_scale)
    }

    /// Whether step `index` (from 0 on) of `steps` makes a negative prediction: those with `start <= index / steps < end`.
    /// The others take the prediction for the prompt as it is, as a pipeline of diffusers does whose callback has
    /// switched guidance off.
    pub fn is_guided_at(&self, index: usize, steps: usize) -> bool {
        let [start, end] = self.interval;
        let fraction = index as f64 / steps as f64;
        self.negative_prompt.is_some() && start <= fraction && fraction < end
    }
}

/// What the second branch of classifier-free guidance is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NegativePrompt {
    /// The client gave none: what that means is the family's affair (for SDXL not the same as the empty text).
    Absent,
    /// This text, possibly the empty one.
    Text(String),
}

impl NegativePrompt {
    /// What the client wrote, if anything.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Absent => None,
            Self::Text(text) => Some(text),
        }
    }
}
