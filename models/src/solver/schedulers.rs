//! The names by which a request chooses its solver: what each means for a checkpoint, and which a checkpoint can have.
//!
//! Owns: the table of names, the step from a name and a `scheduler_config.json` to a solver. Does not know: any solver's
//! steps, which pipeline asks. A name means what diffusers gives for `Class.from_config(pipe.scheduler.config,
//! **settings)`, `settings` being the name's own.

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::manifest::{Layout, Manifest};
use crate::request::DiffusionRequest;
use crate::solver::Solver;
use crate::solver::config::SchedulerConfig;
use crate::solver::euler::{Euler, EulerConfig};
use crate::solver::flow_match_euler::{FlowMatchEuler, FlowMatchEulerConfig, linear_sigmas};
use crate::solver::unipc::{UniPc, UniPcConfig};

/// A name by which a request chooses its solver.
#[derive(Debug, PartialEq, Eq)]
pub struct Scheduler {
    /// As requests and answers spell it.
    pub name: &'static str,
    class: Class,
}

/// Every name: short ones, and diffusers' class names, which take the checkpoint's configuration as it is.
pub static SCHEDULERS: [Scheduler; 6] = [
    Scheduler { name: "euler", class: Class::Euler },
    Scheduler { name: "unipc", class: Class::UniPc },
    Scheduler { name: "flow_euler", class: Class::FlowMatchEuler },
    Scheduler { name: "EulerDiscreteScheduler", class: Class::Euler },
    Scheduler { name: "UniPCMultistepScheduler", class: Class::UniPc },
    Scheduler { name: "FlowMatchEulerDiscreteScheduler", class: Class::FlowMatchEuler },
];

impl Scheduler {
    /// The scheduler with this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        SCHEDULERS.iter().find(|scheduler| scheduler.name == name)
    }
}

/// A scheduler class of diffusers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Euler,
    UniPc,
    FlowMatchEuler,
}

/// What a family's pipeline asks of its solvers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Training {
    /// The model was trained on discrete timesteps (SDXL).
    Discrete,
    /// Flow matching; the solver starts from sigmas of its own (Wan).
    Flow,
    /// Flow matching; the pipeline hands over evenly spaced sigmas, and `mu` by the picture's size (FLUX.1).
    FlowWithMu,
}

impl Training {
    fn classes(self) -> &'static [Class] {
        match self {
            Self::Discrete => &[Class::Euler],
            Self::Flow => &[Class::UniPc, Class::FlowMatchEuler],
            Self::FlowWithMu => &[Class::FlowMatchEuler],
        }
    }

    /// Settings without which a flow-matching checkpoint's configuration would lose its meaning in another class: the two
    /// classes spell the shift differently, and UniPC takes a model to predict noise unless told otherwise.
    fn settings(self, from: Class, to: Class, file: &SchedulerConfig) -> Vec<(&'static str, Value)> {
        let shift = |field: &str| file.get(field).cloned().unwrap_or(json!(1.0));
        match (from, to) {
            (Class::FlowMatchEuler, Class::UniPc) => vec![
                ("prediction_type", json!("flow_prediction")),
                ("use_flow_sigmas", json!(true)),
                ("flow_shift", shift("shift")),
            ],
            (Class::UniPc, Class::FlowMatchEuler) => vec![("shift", shift("flow_shift"))],
            _ => Vec::new(),
        }
    }
}

/// A solver, configured for a checkpoint.
#[derive(Debug, Clone)]
enum SolverConfig {
    Euler(EulerConfig),
    UniPc(UniPcConfig),
    FlowMatchEuler(FlowMatchEulerConfig),
}

impl SolverConfig {
    fn new(class: Class, file: &SchedulerConfig, training: Training) -> Result<Self> {
        Ok(match class {
            Class::Euler => Self::Euler(EulerConfig::new(file)?),
            Class::UniPc => Self::UniPc(UniPcConfig::new(file)?),
            Class::FlowMatchEuler => {
                let config = FlowMatchEulerConfig::new(file)?;
                let lacks_mu = config.use_dynamic_shifting && training != Training::FlowWithMu;
                // The pipeline gives the scheduler no `mu`, so that the reference fails too.
                file.refuse(&[("use_dynamic_shifting", lacks_mu, "only false is supported")])?;
                Self::FlowMatchEuler(config)
            }
        })
    }
}

/// The schedulers that a checkpoint can be sampled with.
#[derive(Debug, Clone)]
pub struct Schedulers {
    own: &'static Scheduler,
    choices: Vec<(&'static Scheduler, SolverConfig)>,
}

impl Schedulers {
    /// What the folder of a pipeline says: the class in `model_index.json`, its fields in
    /// `scheduler/scheduler_config.json`.
    pub fn read(manifest: &Manifest, training: Training) -> Result<Self> {
        let class_name = match &manifest.layout {
            Layout::Diffusers { components, .. } => components.get("scheduler").map_or("absent", String::as_str),
            Layout::Transformers { .. } => "absent",
        };
        let classes = training.classes();
        // The class names stand last.
        let own = SCHEDULERS.iter().rev().find(|s| s.name == class_name && classes.contains(&s.class));
        let own = own.ok_or_else(|| {
            let supported: Vec<_> =
                classes.iter().filter_map(|class| SCHEDULERS.iter().rfind(|s| s.class == *class)).collect();
            let supported: Vec<&str> = supported.iter().map(|scheduler| scheduler.name).collect();
            let problem = format!("`scheduler` is {class_name}; supported: {}", supported.join(", "));
            Error::checkpoint(manifest.root.join("model_index.json"), problem)
        })?;
        let file = SchedulerConfig::read(&manifest.component("scheduler")?.dir.join("scheduler_config.json"))?;
        Self::new(own, &file, training)
    }

    /// All names under which `file`, written for the class of `own`, makes sense. An error where it makes none under its
    /// own.
    pub fn new(own: &'static Scheduler, file: &SchedulerConfig, training: Training) -> Result<Self> {
        let mut choices = Vec::new();
        for scheduler in SCHEDULERS.iter().filter(|scheduler| training.classes().contains(&scheduler.class)) {
            let file = file.with(training.settings(own.class, scheduler.class, file));
            match SolverConfig::new(scheduler.class, &file, training) {
                Ok(config) => choices.push((scheduler, config)),
                Err(error) if scheduler == own => return Err(error),
                Err(_) => (),
            }
        }
        Ok(Self { own, choices })
    }

    /// The scheduler that a request asks for, or the checkpoint's own.
    pub fn choose(&self, asked: Option<&str>) -> Result<&'static Scheduler> {
        let Some(asked) = asked else { return Ok(self.own) };
        self.iter().find(|scheduler| scheduler.name == asked).ok_or_else(|| {
            let names: Vec<&str> = self.iter().map(|scheduler| scheduler.name).collect();
            Error::invalid("scheduler", format!("is none of this model's; allowed: {}", names.join(", ")))
        })
    }

    /// All that a request may ask for.
    pub fn iter(&self) -> impl Iterator<Item = &'static Scheduler> {
        self.choices.iter().map(|(scheduler, _)| *scheduler)
    }

    /// The solver of a request, its timesteps set. `image_seq_len`: tokens of the picture, where the pipeline hands over
    /// sigmas and `mu` ([`Training::FlowWithMu`]).
    pub fn solver(&self, request: &DiffusionRequest, image_seq_len: Option<usize>) -> Box<dyn Solver> {
        let choice = self.choices.iter().find(|(scheduler, _)| *scheduler == request.scheduler);
        let (_, config) = choice.expect("the card has checked the request: this is a bug");
        let steps = request.num_inference_steps;
        match config {
            SolverConfig::Euler(config) => Box::new(Euler::new(config, steps)),
            SolverConfig::UniPc(config) => Box::new(UniPc::new(config, steps)),
            SolverConfig::FlowMatchEuler(config) => Box::new(match image_seq_len {
                Some(tokens) => FlowMatchEuler::new(config, &linear_sigmas(steps), config.mu(tokens)),
                None => FlowMatchEuler::new(config, &config.own_sigmas(steps), 0.0),
            }),
        }
    }
}
