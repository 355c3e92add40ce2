//! What a request may say about its solver: the names of schedulers, spacings, and the loop that these ask for.
//!
//! Owns: the table of names and what each sets. Plain data: what they mean for a checkpoint, and any solver's steps, are
//! known to `schedulers.rs` and the files beside it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::solver::classes::Kind;

/// A name by which a request chooses its solver.
#[derive(Debug, PartialEq, Eq)]
pub struct Scheduler {
    /// As requests and answers spell it.
    pub name: &'static str,
    pub(super) class: Class,
    /// What the name sets whatever the checkpoint's configuration says.
    settings: &'static [(&'static str, Setting)],
}

/// A value of `scheduler_config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Setting {
    Flag(bool),
    Count(usize),
    Word(&'static str),
}

/// Every name: short ones, and diffusers' class names, which take the checkpoint's configuration as it is.
pub static SCHEDULERS: [Scheduler; 23] = [
    Scheduler { name: "euler", class: Class::Euler, settings: &[] },
    Scheduler { name: "euler_a", class: Class::EulerAncestral, settings: &[] },
    Scheduler { name: "ddim", class: Class::Ddim, settings: &[] },
    Scheduler { name: "dpmpp_2m", class: Class::Dpm, settings: &dpmpp_2m("dpmsolver++", false) },
    Scheduler { name: "dpmpp_2m_karras", class: Class::Dpm, settings: &dpmpp_2m("dpmsolver++", true) },
    Scheduler { name: "dpmpp_2m_sde", class: Class::Dpm, settings: &dpmpp_2m("sde-dpmsolver++", false) },
    Scheduler { name: "dpmpp_2m_sde_karras", class: Class::Dpm, settings: &dpmpp_2m("sde-dpmsolver++", true) },
    Scheduler { name: "unipc", class: Class::UniPc, settings: &[] },
    Scheduler { name: "lcm", class: Class::Lcm, settings: &[] },
    Scheduler { name: "tcd", class: Class::Tcd, settings: &[] },
    Scheduler { name: "flow_euler", class: Class::FlowMatchEuler, settings: &[] },
    Scheduler { name: "cogvideox_ddim", class: Class::CogVideoXDdim, settings: &[] },
    Scheduler { name: "cogvideox_dpm", class: Class::CogVideoXDpm, settings: &[] },
    Scheduler { name: "EulerDiscreteScheduler", class: Class::Euler, settings: &[] },
    Scheduler { name: "EulerAncestralDiscreteScheduler", class: Class::EulerAncestral, settings: &[] },
    Scheduler { name: "DDIMScheduler", class: Class::Ddim, settings: &[] },
    Scheduler { name: "DPMSolverMultistepScheduler", class: Class::Dpm, settings: &[] },
    Scheduler { name: "UniPCMultistepScheduler", class: Class::UniPc, settings: &[] },
    Scheduler { name: "LCMScheduler", class: Class::Lcm, settings: &[] },
    Scheduler { name: "TCDScheduler", class: Class::Tcd, settings: &[] },
    Scheduler { name: "FlowMatchEulerDiscreteScheduler", class: Class::FlowMatchEuler, settings: &[] },
    Scheduler { name: "CogVideoXDDIMScheduler", class: Class::CogVideoXDdim, settings: &[] },
    Scheduler { name: "CogVideoXDPMScheduler", class: Class::CogVideoXDpm, settings: &[] },
];

/// The names of [`SCHEDULERS`].
pub static SCHEDULER_NAMES: [&str; SCHEDULERS.len()] = {
    let mut names = [""; SCHEDULERS.len()];
    let mut i = 0;
    while i < names.len() {
        names[i] = SCHEDULERS[i].name;
        i += 1;
    }
    names
};

const fn dpmpp_2m(algorithm_type: &'static str, karras: bool) -> [(&'static str, Setting); 3] {
    [
        ("algorithm_type", Setting::Word(algorithm_type)),
        ("solver_order", Setting::Count(2)),
        ("use_karras_sigmas", Setting::Flag(karras)),
    ]
}

impl Scheduler {
    /// The scheduler with this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        SCHEDULERS.iter().find(|scheduler| scheduler.name == name)
    }

    /// Whether it is diffusers' name of the class, as in `model_index.json`.
    pub(super) fn is_class_name(&self) -> bool {
        self.name.ends_with("Scheduler")
    }

    /// Whether the scheduler with this name is of the same class.
    pub fn is_class_of(&self, name: &str) -> bool {
        Self::named(name).is_some_and(|other| other.class == self.class)
    }

    /// Whether its steps have an `eta`.
    pub fn takes_eta(&self) -> bool {
        matches!(self.class, Class::Ddim | Class::Tcd)
    }

    pub(super) fn settings(&self) -> impl Iterator<Item = (&'static str, Value)> {
        let value = |setting: &Setting| match *setting {
            Setting::Flag(flag) => json!(flag),
            Setting::Count(count) => json!(count),
            Setting::Word(word) => json!(word),
        };
        self.settings.iter().map(move |(field, setting)| (*field, value(setting)))
    }
}

/// A scheduler class of diffusers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    Euler,
    EulerAncestral,
    Ddim,
    Dpm,
    UniPc,
    Lcm,
    Tcd,
    FlowMatchEuler,
    CogVideoXDdim,
    CogVideoXDpm,
}

impl Class {
    /// What its fields describe.
    pub(super) fn kind(self) -> Kind {
        match self {
            Self::FlowMatchEuler => Kind::FlowMatch,
            Self::Dpm | Self::UniPc => Kind::Either,
            Self::CogVideoXDdim | Self::CogVideoXDpm => Kind::ShiftedBetas,
            Self::Euler | Self::EulerAncestral | Self::Ddim | Self::Lcm | Self::Tcd => Kind::Betas,
        }
    }
}

/// Which timesteps of training an inference visits (Lin et al. 2023, <https://arxiv.org/abs/2305.08891>, table 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spacing {
    /// Evenly from the last to the first.
    Linspace,
    /// Every k-th, counted from the first.
    Leading,
    /// Every k-th, counted from the last.
    Trailing,
}

impl Spacing {
    /// All names, as [`Spacing::as_str`] gives them.
    pub const NAMES: &[&str] = &["linspace", "leading", "trailing"];

    /// Its name in files, on the wire and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Linspace => "linspace",
            Self::Leading => "leading",
            Self::Trailing => "trailing",
        }
    }
}

impl std::str::FromStr for Spacing {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = [Self::Linspace, Self::Leading, Self::Trailing];
        known
            .into_iter()
            .find(|spacing| spacing.as_str() == name)
            .ok_or_else(|| Error::invalid("timestep_spacing", "is not known; allowed: linspace, leading, trailing"))
    }
}

/// The steps of a loop one by one, instead of their number.
#[derive(Debug, Clone, PartialEq)]
pub enum Given {
    /// Of flow matching those before the shift, without the 0 at the end; of the models of discrete timesteps those of
    /// `Class::Euler`, with the one in which the loop ends. They fall.
    Sigmas(Arc<[f64]>),
    /// Of training. They fall.
    Timesteps(Arc<[f64]>),
}

impl Given {
    /// The numbers.
    pub fn values(&self) -> &[f64] {
        match self {
            Self::Sigmas(values) | Self::Timesteps(values) => values,
        }
    }

    /// The field in which a request has them.
    pub fn field(&self) -> &'static str {
        match self {
            Self::Sigmas(_) => "sigmas",
            Self::Timesteps(_) => "timesteps",
        }
    }
}

/// What a loop needs to know beside its scheduler.
#[derive(Debug, Clone, Default)]
pub struct Loop {
    /// At least 1.
    pub steps: usize,
    /// As many steps as `steps` says.
    pub given: Option<Given>,
    /// Another than the checkpoint's.
    pub timestep_spacing: Option<Spacing>,
    /// Of DDIM and TCD.
    pub eta: Option<f64>,
    /// Another shift of the sigmas than the checkpoint's, of flow-matching models without `mu`.
    pub flow_shift: Option<f64>,
    /// Tokens of the picture, where the pipeline hands over sigmas and `mu` (FLUX.1).
    pub image_seq_len: Option<usize>,
}
