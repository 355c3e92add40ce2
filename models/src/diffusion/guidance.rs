//! How far the prompt is followed, what is steered away from, and in which steps.
//!
//! Owns: `guidance_scale`, `true_cfg_scale`, `guidance_interval`, `use_dynamic_cfg`, `cfg_zero_star`, `zero_init_steps` and
//! `negative_prompt`, and how they depend on each other. Does not know: how predictions are merged (`runner::diffusion`).

use crate::error::{Error, Result};
use crate::parameter::{Declaration, Options, Parameter, VIDEOS};

use super::prompt::NEGATIVE_PROMPT;
use super::sampling::MAX_INFERENCE_STEPS;

/// Largest guidance scale.
pub const MAX_GUIDANCE_SCALE: f64 = 100.0;
/// Every step is guided.
pub const WHOLE_INTERVAL: [f64; 2] = [0.0, 1.0];

/// See [`Guidance::guidance_scale`].
pub static GUIDANCE_SCALE: Parameter<f64> = Parameter::number(
    "guidance_scale",
    0.0,
    MAX_GUIDANCE_SCALE,
    "How closely the prompt is followed, as in diffusers; the model's own default when absent.",
);

/// See [`Guidance::true_cfg_scale`].
pub static TRUE_CFG_SCALE: Parameter<f64> = Parameter::number(
    "true_cfg_scale",
    1.0,
    MAX_GUIDANCE_SCALE,
    "Scale of a second, negative prediction for models whose guidance_scale is another thing (FLUX.1, HunyuanVideo); 1 is off.",
);

/// See [`Guidance::interval`].
pub static GUIDANCE_INTERVAL: Parameter<[f64; 2]> = Parameter::interval(
    "guidance_interval",
    "Part of the steps that make the negative prediction: step i of n does where start <= i/n < end.",
);

/// See [`Guidance::use_dynamic_cfg`].
pub static USE_DYNAMIC_CFG: Parameter<bool> = Parameter::boolean(
    "use_dynamic_cfg",
    "Whether the guidance scale changes from step to step, as in diffusers' pipelines of CogVideoX; false when absent.",
)
.only_for(VIDEOS);

/// See [`Guidance::zero_star`].
pub static CFG_ZERO_STAR: Parameter<bool> = Parameter::boolean(
    "cfg_zero_star",
    "CFG-Zero*, for models of flow matching: the negative prediction is scaled to fit the other one; false when absent.",
);

/// See [`ZeroStar::zero_init_steps`].
pub static ZERO_INIT_STEPS: Parameter<usize> = Parameter::integer(
    "zero_init_steps",
    0,
    MAX_INFERENCE_STEPS,
    "First steps that `cfg_zero_star` leaves out, latents and all; 1 when absent, as in diffusers.",
);

/// The parameters of this capability.
pub(super) static PARAMETERS: &[&Declaration] = &[
    &NEGATIVE_PROMPT.declaration,
    &GUIDANCE_SCALE.declaration,
    &TRUE_CFG_SCALE.declaration,
    &GUIDANCE_INTERVAL.declaration,
    &USE_DYNAMIC_CFG.declaration,
    &CFG_ZERO_STAR.declaration,
    &ZERO_INIT_STEPS.declaration,
];

/// Guidance of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Guidance {
    /// As in diffusers: embedded guidance (FLUX.1-dev, HunyuanVideo) or classifier-free guidance (SDXL, Wan).
    pub guidance_scale: f64,
    /// Of models whose `guidance_scale` is not that of classifier-free guidance (FLUX.1, HunyuanVideo), as in diffusers: the
    /// scale of a second, negative prediction.
    pub true_cfg_scale: Option<f64>,
    /// Fractions of the steps between which the negative prediction is made; see [`Guidance::is_guided_at`].
    pub interval: [f64; 2],
    /// Whether the scale of a step is made of its timestep; `None` of models that have no such scale. See
    /// [`Guidance::cfg_scale_at`].
    pub use_dynamic_cfg: Option<bool>,
    /// Where the two predictions are merged as CFG-Zero* does it.
    pub zero_star: Option<ZeroStar>,
    /// What to steer away from; `None` where the model or the guidance scale uses none.
    pub negative_prompt: Option<NegativePrompt>,
}

/// Zero-star guidance. Source: arXiv 2503.18886; diffusers `guiders/classifier_free_zero_star_guidance.py`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZeroStar {
    /// First steps whose prediction is zero: the latents stay as they are, and no network is asked.
    pub zero_init_steps: usize,
}

/// That of diffusers' guider.
const DEFAULT_ZERO_INIT_STEPS: usize = 1;

impl Guidance {
    /// One prediction a step, at a scale of 1.
    pub fn none() -> Self {
        Self {
            guidance_scale: 1.0,
            true_cfg_scale: None,
            interval: WHOLE_INTERVAL,
            use_dynamic_cfg: None,
            zero_star: None,
            negative_prompt: None,
        }
    }

    /// Guidance branches: the prompt's, and the negative one's where there is one.
    pub fn num_branches(&self) -> usize {
        1 + usize::from(self.negative_prompt.is_some())
    }

    /// How far the negative prediction, where there is one, is left behind.
    pub fn cfg_scale(&self) -> f64 {
        self.true_cfg_scale.unwrap_or(self.guidance_scale)
    }

    /// That of the step at `timestep`, of `steps` in all. Source: `CogVideoXPipeline.__call__`, which takes the timestep of
    /// training (0 to 999) for the number of a step, so that a dynamic scale jumps between 1 and `1 + guidance_scale`.
    pub fn cfg_scale_at(&self, timestep: f64, steps: usize) -> f64 {
        match self.use_dynamic_cfg {
            Some(true) => {
                let progress = (steps as f64 - timestep) / steps as f64;
                let angle = std::f64::consts::PI * progress.powf(5.0);
                1.0 + self.cfg_scale() * ((1.0 - angle.cos()) / 2.0)
            }
            Some(false) | None => self.cfg_scale(),
        }
    }

    /// Whether the prediction of step `index` is zero, and nobody makes it.
    pub fn is_zero_at(&self, index: usize) -> bool {
        self.zero_star.is_some_and(|zero_star| index < zero_star.zero_init_steps)
    }

    /// Predictions that step `index` (from 0 on) of `steps` makes.
    pub fn num_predictions_at(&self, index: usize, steps: usize) -> usize {
        match self.is_zero_at(index) {
            true => 0,
            false => 1 + usize::from(self.is_guided_at(index, steps)),
        }
    }

    /// Whether step `index` (from 0 on) of `steps` makes a negative prediction: those with `start <= index / steps < end`
    /// whose prediction is not zero anyway. The others take the prediction for the prompt as it is, as a pipeline of diffusers does whose callback has
    /// switched guidance off.
    pub fn is_guided_at(&self, index: usize, steps: usize) -> bool {
        let [start, end] = self.interval;
        let fraction = index as f64 / steps as f64;
        self.negative_prompt.is_some() && !self.is_zero_at(index) && start <= fraction && fraction < end
    }

    pub(super) fn echo(&self, options: &mut Options) {
        options.set(&GUIDANCE_SCALE, self.guidance_scale);
        options.set(&TRUE_CFG_SCALE, self.true_cfg_scale);
        // Without a negative prediction the interval has no meaning.
        options.set(&GUIDANCE_INTERVAL, self.negative_prompt.as_ref().map(|_| self.interval));
        options.set(&USE_DYNAMIC_CFG, self.use_dynamic_cfg);
        options.set(&CFG_ZERO_STAR, self.zero_star.map(|_| true));
        options.set(&ZERO_INIT_STEPS, self.zero_star.map(|zero_star| zero_star.zero_init_steps));
        let negative = self.negative_prompt.as_ref().and_then(NegativePrompt::text);
        options.set(&NEGATIVE_PROMPT, negative.map(str::to_owned));
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

/// How `guidance_scale` enters a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuidanceKind {
    /// Not at all (timestep-distilled models): only 0 is accepted. A negative prompt is used at `true_cfg_scale`.
    None,
    /// As an input of the transformer. A negative prompt is used at `true_cfg_scale`.
    Embedded,
    /// By a second, negative prediction when the scale is above 1.
    ClassifierFree,
}

/// How a model is guided.
#[derive(Debug, Clone, Copy)]
pub struct GuidanceSupport {
    /// How the scale enters.
    pub kind: GuidanceKind,
    /// Where the client gives no `guidance_scale`.
    pub default_scale: f64,
    /// Whether the scale may be made of the timestep.
    pub has_dynamic_cfg: bool,
    /// Whether what the model predicts is a flow, so that CFG-Zero* is for it.
    pub has_zero_star: bool,
}

impl GuidanceSupport {
    /// A scale that is the same in all steps.
    pub fn constant(kind: GuidanceKind, default_scale: f64) -> Self {
        Self { kind, default_scale, has_dynamic_cfg: false, has_zero_star: false }
    }

    /// The same for a model that predicts a flow.
    pub fn of_flow(self) -> Self {
        Self { has_zero_star: true, ..self }
    }

    /// `edit_scale` is the default of a request that begins from an image.
    pub(super) fn resolve(&self, options: &Options, edit_scale: Option<f64>) -> Result<Guidance> {
        let default_scale = edit_scale.unwrap_or(self.default_scale);
        let guidance = Guidance {
            guidance_scale: options.get(&GUIDANCE_SCALE).unwrap_or(default_scale),
            true_cfg_scale: self.true_cfg_scale(options.get(&TRUE_CFG_SCALE))?,
            interval: options.get(&GUIDANCE_INTERVAL).unwrap_or(WHOLE_INTERVAL),
            use_dynamic_cfg: self.dynamic_cfg(options.get(&USE_DYNAMIC_CFG))?,
            zero_star: self.zero_star(options)?,
            negative_prompt: options.get(&NEGATIVE_PROMPT).map(NegativePrompt::Text),
        };
        if self.kind == GuidanceKind::None && guidance.guidance_scale != 0.0 {
            let problem = "this model was distilled without guidance; only 0 is allowed";
            return Err(Error::invalid("guidance_scale", problem));
        }
        let guidance = self.with_negative_prompt(guidance)?;
        let of_two = [
            ("use_dynamic_cfg", guidance.use_dynamic_cfg == Some(true)),
            ("cfg_zero_star", guidance.zero_star.is_some()),
        ];
        match of_two.into_iter().find(|(_, is_asked)| *is_asked && guidance.negative_prompt.is_none()) {
            Some((field, _)) => {
                let problem = format!("has no effect unless {} is above 1; leave it out", self.cfg_field());
                Err(Error::invalid(field, problem))
            }
            None => Ok(guidance),
        }
    }

    fn zero_star(&self, options: &Options) -> Result<Option<ZeroStar>> {
        let zero_init_steps = options.get(&ZERO_INIT_STEPS);
        match options.get(&CFG_ZERO_STAR) {
            Some(true) if !self.has_zero_star => {
                Err(Error::invalid("cfg_zero_star", "this model predicts no flow; leave it out"))
            }
            Some(true) => Ok(Some(ZeroStar { zero_init_steps: zero_init_steps.unwrap_or(DEFAULT_ZERO_INIT_STEPS) })),
            Some(false) | None if zero_init_steps.is_some() => {
                Err(Error::invalid("zero_init_steps", "has no effect without cfg_zero_star; leave it out"))
            }
            Some(false) | None => Ok(None),
        }
    }

    /// Off where the client says nothing; `None` for models whose scale never changes.
    fn dynamic_cfg(&self, asked: Option<bool>) -> Result<Option<bool>> {
        match (self.has_dynamic_cfg, asked) {
            (true, asked) => Ok(Some(asked.unwrap_or(false))),
            (false, Some(true)) => {
                Err(Error::invalid("use_dynamic_cfg", "this model's guidance scale never changes; leave it out"))
            }
            (false, Some(false) | None) => Ok(None),
        }
    }

    /// Off (1) where the client gives none; `None` for models that are guided by `guidance_scale`.
    fn true_cfg_scale(&self, asked: Option<f64>) -> Result<Option<f64>> {
        match (self.kind, asked) {
            (GuidanceKind::ClassifierFree, None) => Ok(None),
            (GuidanceKind::ClassifierFree, Some(_)) => {
                Err(Error::invalid("true_cfg_scale", "this model is guided by guidance_scale; leave it out"))
            }
            (GuidanceKind::None | GuidanceKind::Embedded, asked) => Ok(Some(asked.unwrap_or(1.0))),
        }
    }

    /// Refuses a negative prompt without a scale and a scale without a negative prompt.
    fn with_negative_prompt(&self, mut guidance: Guidance) -> Result<Guidance> {
        let has_text = guidance.negative_prompt.is_some();
        match (self.kind, guidance.cfg_scale() > 1.0) {
            (_, false) if has_text => {
                let problem = format!("has no effect unless {} is above 1; leave it out", self.cfg_field());
                return Err(Error::invalid("negative_prompt", problem));
            }
            (GuidanceKind::ClassifierFree, true) => {
                guidance.negative_prompt.get_or_insert(NegativePrompt::Absent);
            }
            // diffusers ignores the scale then; nothing is ignored here.
            (GuidanceKind::None | GuidanceKind::Embedded, true) if !has_text => {
                let problem = "has no effect without a negative_prompt; give one, possibly the empty one";
                return Err(Error::invalid("true_cfg_scale", problem));
            }
            _ => (),
        }
        Ok(guidance)
    }

    /// Refuses what leaves none of the `steps` that are made to be guided, and an interval that changes nothing.
    pub(super) fn check_steps(&self, guidance: &Guidance, steps: usize) -> Result<()> {
        if guidance.is_zero_at(steps - 1) {
            let problem = format!("leaves none of the {steps} steps; allowed: 0 to {}", steps - 1);
            return Err(Error::invalid("zero_init_steps", problem));
        }
        self.check_interval(guidance, steps)
    }

    fn check_interval(&self, guidance: &Guidance, steps: usize) -> Result<()> {
        let refuse = |problem: String| Err(Error::invalid("guidance_interval", problem));
        if guidance.interval == WHOLE_INTERVAL {
            return Ok(());
        }
        if guidance.negative_prompt.is_none() {
            return refuse(format!("has no effect unless {} is above 1; leave it out", self.cfg_field()));
        }
        if !(0..steps).any(|index| guidance.is_guided_at(index, steps)) {
            let second = 1.0 / steps as f64;
            return refuse(format!("holds none of the {steps} steps, the first of which are at 0 and {second}"));
        }
        Ok(())
    }

    /// The field that scales the negative prediction.
    fn cfg_field(&self) -> &'static str {
        match self.kind {
            GuidanceKind::None | GuidanceKind::Embedded => "true_cfg_scale",
            GuidanceKind::ClassifierFree => "guidance_scale",
        }
    }
}
