//! The way from noise to latents: steps, scheduler, seed.
//!
//! Owns: `num_inference_steps`, `sigmas` and `timesteps` in its place, `scheduler`, `timestep_spacing`, `eta` and `seed`. Does
//! not know: what a scheduler computes.

use crate::error::{Error, Result};
use crate::parameter::{Declaration, IMAGES, Options, Parameter, ParameterType, VIDEOS, Value, check_range};
use crate::solver::names::{Given, Loop, SCHEDULER_NAMES, Scheduler, Spacing};
use crate::solver::schedulers::{Asked, Chosen, Schedulers};

/// Most denoising steps of one request.
pub const MAX_INFERENCE_STEPS: usize = 1000;
/// What diffusers' pipelines hand to steps that have an `eta`.
const DEFAULT_ETA: f64 = 0.0;

/// See [`Sampling::num_inference_steps`].
pub static NUM_INFERENCE_STEPS: Parameter<usize> = Parameter::integer(
    "num_inference_steps",
    1,
    MAX_INFERENCE_STEPS,
    "Denoising steps; the model's own default when absent.",
)
.narrowed_by_models();

/// Largest sigma of a request: models of discrete timesteps end at some 15, of zero SNR at some 4,500.
const MAX_SIGMA: f64 = 1e4;
/// Largest timestep of a request, before the model's own is known.
const MAX_TIMESTEP: f64 = 1e5;

/// See [`Sampling::given`].
pub static SIGMAS: Parameter<Vec<f64>> = Parameter::numbers(
    "sigmas",
    MAX_INFERENCE_STEPS + 1,
    0.0,
    MAX_SIGMA,
    "Noise levels of the steps instead of their number, as diffusers' `sigmas`: falling; of flow matching in (0, 1], before \
     the shift; of Euler for SDXL with the one in which the loop ends.",
);

/// See [`Sampling::given`].
pub static TIMESTEPS: Parameter<Vec<f64>> = Parameter::numbers(
    "timesteps",
    MAX_INFERENCE_STEPS,
    0.0,
    MAX_TIMESTEP,
    "Timesteps of training of the steps instead of their number, as diffusers' `timesteps`: falling; for Euler and SDXL.",
)
.only_for(IMAGES);

/// See [`Sampling::scheduler`].
pub static SCHEDULER: Parameter<String> =
    Parameter::name("scheduler", &SCHEDULER_NAMES, "How the latents are sampled; the checkpoint's own when absent.");

/// See [`Sampling::timestep_spacing`].
pub static TIMESTEP_SPACING: Parameter<Spacing> = Parameter::choice(
    "timestep_spacing",
    Spacing::NAMES,
    "Which timesteps of training the scheduler visits, where that is its choice; the checkpoint's own when absent.",
);

/// See [`Sampling::eta`].
pub static ETA: Parameter<f64> =
    Parameter::number("eta", 0.0, 1.0, "Share of fresh noise in the steps of DDIM and TCD; 0 when absent.")
        .only_for(IMAGES);

/// See [`Sampling::flow_shift`].
pub static FLOW_SHIFT: Parameter<f64> = Parameter::number(
    "flow_shift",
    0.01,
    100.0,
    "Shift of the sigmas of flow matching, as diffusers' `flow_shift`; Wan2.1 wants 3 at 480p, 5 at 720p, and \
     16 between two pictures. The checkpoint's own when absent.",
)
.only_for(VIDEOS);

/// See [`Sampling::seed`].
pub static SEED: Parameter<u64> = Parameter::seed(
    "seed",
    "Seed of torch.Generator(\"cpu\"): the same seed gives the same result; drawn at random and echoed when absent.",
);

/// The parameters of this capability.
pub(super) static PARAMETERS: &[&Declaration] = &[
    &NUM_INFERENCE_STEPS.declaration,
    &SIGMAS.declaration,
    &TIMESTEPS.declaration,
    &SCHEDULER.declaration,
    &TIMESTEP_SPACING.declaration,
    &ETA.declaration,
    &FLOW_SHIFT.declaration,
    &SEED.declaration,
];

impl ParameterType for Spacing {
    fn from_value(value: &Value) -> Option<Self> {
        String::from_value(value)?.parse().ok()
    }

    fn into_value(self) -> Value {
        Value::Text(self.as_str().to_owned())
    }
}

/// How the latents are sampled.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Denoising steps.
    pub num_inference_steps: usize,
    /// The steps one by one, where the request says so.
    pub given: Option<Given>,
    /// How the latents move from one timestep to the next.
    pub scheduler: &'static Scheduler,
    /// Which timesteps of training the scheduler visits, where that is its choice.
    pub timestep_spacing: Option<Spacing>,
    /// Share of fresh noise in the steps of DDIM and TCD, 0 to 1; `None` for the other schedulers.
    pub eta: Option<f64>,
    /// Shift of the sigmas, where the scheduler is of flow matching with a constant one.
    pub flow_shift: Option<f64>,
    /// Seed of `torch.Generator("cpu")`.
    pub seed: u64,
}

impl Sampling {
    /// So many steps of a scheduler that takes no further settings.
    pub fn new(scheduler: &'static Scheduler, num_inference_steps: usize, seed: u64) -> Self {
        Self { num_inference_steps, given: None, scheduler, timestep_spacing: None, eta: None, flow_shift: None, seed }
    }

    /// The loop of the scheduler. `image_seq_len`: tokens of the image, of families whose sigmas depend on it.
    pub fn denoising_loop(&self, image_seq_len: Option<usize>) -> Loop {
        let Self { num_inference_steps: steps, timestep_spacing, eta, flow_shift, .. } = *self;
        Loop { steps, given: self.given.clone(), timestep_spacing, eta, flow_shift, image_seq_len }
    }

    /// What a request would say to have the same scheduler again.
    pub(super) fn asked(&self) -> Asked<'_> {
        let Self { scheduler, timestep_spacing, flow_shift, .. } = *self;
        Asked { scheduler: Some(scheduler.name), timestep_spacing, flow_shift, given: self.given.as_ref() }
    }

    pub(super) fn echo(&self, options: &mut Options) {
        options.set(&NUM_INFERENCE_STEPS, self.num_inference_steps);
        match &self.given {
            Some(Given::Sigmas(sigmas)) => options.set(&SIGMAS, sigmas.to_vec()),
            Some(Given::Timesteps(timesteps)) => options.set(&TIMESTEPS, timesteps.to_vec()),
            None => (),
        }
        options.set(&SCHEDULER, self.scheduler.name.to_owned());
        options.set(&TIMESTEP_SPACING, self.timestep_spacing);
        options.set(&ETA, self.eta);
        options.set(&FLOW_SHIFT, self.flow_shift);
        options.set(&SEED, self.seed);
    }
}

/// How a model can be sampled.
#[derive(Debug, Clone)]
pub struct SamplingSupport {
    /// Steps where the client gives none.
    pub default_steps: usize,
    /// The solvers that the checkpoint can be sampled with.
    pub schedulers: Schedulers,
}

impl SamplingSupport {
    /// `fallback_seed` is used where the client gives none.
    pub(super) fn resolve(&self, options: &Options, fallback_seed: u64) -> Result<Sampling> {
        let name = options.get(&SCHEDULER);
        let given = given(options)?;
        let Chosen { scheduler, timestep_spacing, flow_shift, given_steps, max_steps } =
            self.schedulers.choose(Asked {
                scheduler: name.as_deref(),
                timestep_spacing: options.get(&TIMESTEP_SPACING),
                flow_shift: options.get(&FLOW_SHIFT),
                given: given.as_ref(),
            })?;
        let asked_steps = options.get(&NUM_INFERENCE_STEPS);
        if let (Some(given), Some(steps), Some(asked)) = (&given, given_steps, asked_steps)
            && steps != asked
        {
            let problem = format!("is {asked}, but `{}` are {steps} steps; leave one of them out", given.field());
            return Err(Error::invalid("num_inference_steps", problem));
        }
        let steps = given_steps.or(asked_steps).unwrap_or(self.default_steps.min(max_steps));
        check_range("num_inference_steps", steps, 1, max_steps.min(MAX_INFERENCE_STEPS))?;
        Ok(Sampling {
            num_inference_steps: steps,
            given,
            scheduler,
            timestep_spacing,
            eta: eta(scheduler, options.get(&ETA))?,
            flow_shift,
            seed: options.get(&SEED).unwrap_or(fallback_seed),
        })
    }
}

/// The steps one by one, if the client gave them.
fn given(options: &Options) -> Result<Option<Given>> {
    match (options.get(&SIGMAS), options.get(&TIMESTEPS)) {
        (Some(_), Some(_)) => Err(Error::invalid("timesteps", "cannot be given beside sigmas; leave one of them out")),
        (Some(sigmas), None) => Ok(Some(Given::Sigmas(sigmas.into()))),
        (None, Some(timesteps)) => Ok(Some(Given::Timesteps(timesteps.into()))),
        (None, None) => Ok(None),
    }
}

fn eta(scheduler: &Scheduler, asked: Option<f64>) -> Result<Option<f64>> {
    match asked {
        Some(_) if !scheduler.takes_eta() => {
            Err(Error::invalid("eta", format!("has no effect with scheduler {}", scheduler.name)))
        }
        None if !scheduler.takes_eta() => Ok(None),
        asked => Ok(Some(asked.unwrap_or(DEFAULT_ETA))),
    }
}
