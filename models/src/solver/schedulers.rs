//! What the names of schedulers mean for a checkpoint, and which of them it can have.
//!
//! Owns: the step from a name and a `scheduler_config.json` to a solver. Does not know: any solver's steps, which pipeline
//! asks, requests. A name means what diffusers gives for `Class.from_config(pipe.scheduler.config,
//! **settings)`, `settings` being the name's own.

use serde_json::{Value, json};

use crate::checkpoint::{MODEL_INDEX, Manifest};
use crate::error::{Error, Result};
use crate::solver::Solver;
use crate::solver::classes::{Kind, kind_without_solver};
use crate::solver::cogvideox::{CogVideoXConfig, CogVideoXDdim, CogVideoXDpm};
use crate::solver::config::SchedulerConfig;
use crate::solver::ddim::{Ddim, DdimConfig};
use crate::solver::dpm::{Dpm, DpmConfig};
use crate::solver::euler::{Euler, EulerConfig};
use crate::solver::euler_ancestral::{EulerAncestral, EulerAncestralConfig};
use crate::solver::flow_match_euler::{FlowMatchEuler, FlowMatchEulerConfig, falling_sigmas, linear_sigmas};
use crate::solver::lcm::{Lcm, LcmConfig};
use crate::solver::names::{Class, Given, Loop, SCHEDULERS, Scheduler, Spacing};
use crate::solver::noise_schedule::NoiseSchedule;
use crate::solver::tcd::{Tcd, TcdConfig};
use crate::solver::unipc::{UniPc, UniPcConfig};

/// What a family's pipeline asks of its solvers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Training {
    /// The model was trained on discrete timesteps (SDXL).
    Discrete,
    /// Flow matching; the solver starts from sigmas of its own (Wan).
    Flow,
    /// Flow matching; the pipeline hands over evenly spaced sigmas (HunyuanVideo).
    FlowLinear,
    /// Flow matching; the pipeline hands over evenly spaced sigmas, and `mu` by the picture's size (FLUX.1).
    FlowWithMu,
    /// Discrete timesteps whose signal-to-noise ratio is shifted (CogVideoX), of which only its own solvers know.
    Shifted,
}

impl Training {
    fn classes(self) -> &'static [Class] {
        match self {
            Self::Discrete => {
                &[Class::Euler, Class::EulerAncestral, Class::Ddim, Class::Dpm, Class::UniPc, Class::Lcm, Class::Tcd]
            }
            Self::Flow => &[Class::UniPc, Class::FlowMatchEuler],
            Self::FlowLinear | Self::FlowWithMu => &[Class::FlowMatchEuler],
            Self::Shifted => &[Class::CogVideoXDdim, Class::CogVideoXDpm],
        }
    }

    /// Whether a class of this kind can describe the noise of this family's models.
    fn takes(self, kind: Kind) -> bool {
        match self {
            Self::Discrete => matches!(kind, Kind::Betas | Kind::Either),
            Self::Flow | Self::FlowLinear | Self::FlowWithMu => matches!(kind, Kind::FlowMatch | Kind::Either),
            Self::Shifted => kind == Kind::ShiftedBetas,
        }
    }

    /// Refuses a file whose fields do not describe the noise of this family's models.
    fn check(self, kind: Kind, class_name: &str, file: &SchedulerConfig) -> Result<()> {
        let is_flow = kind == Kind::FlowMatch || file.get("prediction_type") == Some(&json!("flow_prediction"));
        let is_other_kind = is_flow == (self == Self::Discrete);
        let problem = format!("is not that of this family's models, and the scheduler is {class_name}");
        file.refuse(&[("prediction_type", is_other_kind, &problem)])
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
    EulerAncestral(EulerAncestralConfig),
    Ddim(DdimConfig),
    Dpm(DpmConfig),
    UniPc(UniPcConfig),
    Lcm(LcmConfig),
    Tcd(TcdConfig),
    FlowMatchEuler(FlowMatchEulerConfig),
    CogVideoXDdim(CogVideoXConfig),
    CogVideoXDpm(CogVideoXConfig),
}

impl SolverConfig {
    fn new(class: Class, file: &SchedulerConfig, training: Training) -> Result<Self> {
        Ok(match class {
            Class::Euler => Self::Euler(EulerConfig::new(file)?),
            Class::EulerAncestral => Self::EulerAncestral(EulerAncestralConfig::new(file)?),
            Class::Ddim => Self::Ddim(DdimConfig::new(file)?),
            Class::Dpm => Self::Dpm(DpmConfig::new(file)?),
            Class::Lcm => Self::Lcm(LcmConfig::new(file)?),
            Class::Tcd => Self::Tcd(TcdConfig::new(file)?),
            Class::CogVideoXDdim => Self::CogVideoXDdim(CogVideoXConfig::new(file)?),
            Class::CogVideoXDpm => Self::CogVideoXDpm(CogVideoXConfig::new(file)?),
            Class::UniPc => {
                let config = UniPcConfig::new(file)?;
                let is_other_kind = config.is_flow() == (training == Training::Discrete);
                file.refuse(&[("prediction_type", is_other_kind, "is not that of this family's models")])?;
                Self::UniPc(config)
            }
            Class::FlowMatchEuler => {
                let config = FlowMatchEulerConfig::new(file)?;
                let lacks_mu = config.use_dynamic_shifting && training != Training::FlowWithMu;
                // The pipeline gives the scheduler no `mu`, so that the reference fails too.
                file.refuse(&[("use_dynamic_shifting", lacks_mu, "only false is supported")])?;
                Self::FlowMatchEuler(config)
            }
        })
    }

    /// The schedule whose spacing decides about the timesteps. That of Karras sigmas over all of training decides nothing,
    /// and distilled models have timesteps of their own.
    fn spaced(&mut self) -> Option<&mut NoiseSchedule> {
        match self {
            Self::Euler(config) => Some(&mut config.schedule),
            Self::EulerAncestral(config) => Some(&mut config.schedule),
            Self::Ddim(config) => Some(&mut config.schedule),
            Self::Dpm(config) => Some(&mut config.schedule).filter(|schedule| !schedule.is_karras()),
            Self::CogVideoXDdim(config) | Self::CogVideoXDpm(config) => Some(&mut config.schedule),
            Self::UniPc(config) => config.schedule_mut().filter(|schedule| !schedule.is_karras()),
            Self::Lcm(_) | Self::Tcd(_) | Self::FlowMatchEuler(_) => None,
        }
    }

    /// Most steps of a loop.
    fn max_steps(&self) -> usize {
        match self {
            Self::Ddim(config) => config.max_steps(),
            Self::Dpm(config) => config.max_steps(),
            Self::UniPc(config) => config.max_steps(),
            Self::Lcm(config) => config.max_steps(),
            Self::Tcd(config) => config.max_steps(),
            Self::CogVideoXDdim(config) | Self::CogVideoXDpm(config) => config.max_steps(),
            Self::Euler(_) | Self::EulerAncestral(_) | Self::FlowMatchEuler(_) => usize::MAX,
        }
    }
}

/// The fields as an instance of the class keeps them: diffusers replaces names of another class's solvers when it makes one,
/// and what is made from that one reads the replacement.
fn as_kept(class_name: &str, file: &SchedulerConfig) -> SchedulerConfig {
    let replaced = |field: &str, names: &[&str], by: &'static str| {
        let found = file.get(field).and_then(Value::as_str).is_some_and(|name| names.contains(&name));
        found.then(|| json!(by))
    };
    let solver_type = match class_name {
        "DPMSolverMultistepScheduler" | "DPMSolverMultistepInverseScheduler" | "DPMSolverSinglestepScheduler" => {
            replaced("solver_type", &["logrho", "bh1", "bh2"], "midpoint")
        }
        "UniPCMultistepScheduler" => replaced("solver_type", &["midpoint", "heun", "logrho"], "bh2"),
        "DEISMultistepScheduler" => replaced("solver_type", &["midpoint", "heun", "bh1", "bh2"], "logrho"),
        _ => None,
    };
    file.with(solver_type.map(|solver_type| ("solver_type", solver_type)))
}

/// What a request has chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chosen {
    /// The solver.
    pub scheduler: &'static Scheduler,
    /// Where it decides about the timesteps.
    pub timestep_spacing: Option<Spacing>,
    /// Where it shifts flow-matching sigmas by a constant.
    pub flow_shift: Option<f64>,
    /// Steps of the loop, where the request gives them one by one.
    pub given_steps: Option<usize>,
    /// Most steps of a loop.
    pub max_steps: usize,
}

/// Of every class.
const DEFAULT_TRAIN_TIMESTEPS: usize = 1000;

/// The file with the fields of the checkpoint's own class.
const FILE_NAME: &str = "scheduler_config.json";

/// The class that a checkpoint's configuration was written for.
#[derive(Debug, Clone)]
enum Own {
    /// It has a solver, which samples requests that name none.
    Solved(&'static Scheduler),
    /// It has none: requests have to name another one.
    Unsolved(String),
}

/// The schedulers that a checkpoint can be sampled with.
#[derive(Debug, Clone)]
pub struct Schedulers {
    own: Own,
    choices: Vec<Choice>,
    num_train_timesteps: usize,
    training: Training,
}

/// A name that a checkpoint can be sampled under.
#[derive(Debug, Clone)]
struct Choice {
    scheduler: &'static Scheduler,
    /// The checkpoint's fields with what the name sets.
    file: SchedulerConfig,
    config: SolverConfig,
}

impl Choice {
    /// Where the class has the shift of flow-matching sigmas, if it has a constant one.
    fn shift_field(&self) -> Option<&'static str> {
        match &self.config {
            SolverConfig::UniPc(config) if config.is_flow() => Some("flow_shift"),
            SolverConfig::FlowMatchEuler(config) if !config.use_dynamic_shifting => Some("shift"),
            _ => None,
        }
    }

    /// As diffusers' `from_config(config, flow_shift=shift)`.
    fn shifted(&self, shift: f64, training: Training) -> Result<SolverConfig> {
        let field = self.shift_field();
        let field = field.ok_or_else(|| self.has_no_effect("flow_shift"))?;
        SolverConfig::new(self.scheduler.class, &self.file.with([(field, json!(shift))]), training)
    }

    /// The shift of the checkpoint; of every class 1 where the file has none.
    fn own_shift(&self) -> Option<f64> {
        let field = self.shift_field()?;
        Some(self.file.get(field).and_then(Value::as_f64).unwrap_or(1.0))
    }

    /// Steps of a loop over what is given, which this scheduler can take, as diffusers' `set_timesteps` does.
    fn num_steps(&self, given: &Given) -> Option<usize> {
        let is_flow = self.is_flow();
        match (given, &self.config) {
            (Given::Sigmas(sigmas), _) if is_flow => Some(sigmas.len()),
            (Given::Sigmas(sigmas), SolverConfig::Euler(_)) => Some(sigmas.len() - 1),
            (Given::Timesteps(timesteps), SolverConfig::Euler(config)) if !config.schedule.is_karras() => {
                Some(timesteps.len())
            }
            _ => None,
        }
    }

    fn is_flow(&self) -> bool {
        match &self.config {
            SolverConfig::UniPc(config) => config.is_flow(),
            SolverConfig::FlowMatchEuler(_) => true,
            _ => false,
        }
    }

    /// Refuses steps that this scheduler cannot take.
    fn check_given(&self, given: &Given, num_train_timesteps: usize) -> Result<()> {
        let (field, values) = (given.field(), given.values());
        let steps = self.num_steps(given).ok_or_else(|| self.has_no_effect(field))?;
        if steps == 0 {
            return Err(Error::invalid(field, "has one sigma; the last one is that in which the loop ends"));
        }
        if let Some(at) = values.windows(2).position(|pair| pair[0] <= pair[1]) {
            let problem = format!("is {}, which is not below the one before it", values[at + 1]);
            return Err(Error::invalid(format!("{field}[{}]", at + 1), problem));
        }
        let (first, last) = (values[0], values[values.len() - 1]);
        let most = if let Given::Timesteps(_) = given { num_train_timesteps as f64 - 1.0 } else { 1.0 };
        if (self.is_flow() || field == "timesteps") && first > most {
            return Err(Error::invalid(format!("{field}[0]"), format!("is {first}; allowed: at most {most}")));
        }
        if self.is_flow() && last <= 0.0 {
            let problem = format!("is {last}; allowed: above 0 (the loop ends in 0 without being told)");
            return Err(Error::invalid(format!("{field}[{}]", values.len() - 1), problem));
        }
        Ok(())
    }

    fn has_no_effect(&self, field: &str) -> Error {
        Error::invalid(field, format!("has no effect with scheduler {}; leave it out", self.scheduler.name))
    }
}

/// What a request says of its scheduler.
#[derive(Debug, Clone, Copy, Default)]
pub struct Asked<'a> {
    /// The checkpoint's own without one.
    pub scheduler: Option<&'a str>,
    /// The file's own without one.
    pub timestep_spacing: Option<Spacing>,
    /// The file's own without one.
    pub flow_shift: Option<f64>,
    /// Steps one by one.
    pub given: Option<&'a Given>,
}

impl Schedulers {
    /// What the folder of a pipeline says: the class in `model_index.json`, its fields in
    /// `scheduler/scheduler_config.json`.
    pub fn read(manifest: &Manifest, training: Training) -> Result<Self> {
        let class_name = manifest.class_of("scheduler").unwrap_or("absent");
        let solved = SCHEDULERS.iter().find(|scheduler| scheduler.is_class_name() && scheduler.name == class_name);
        let kind = solved.map(|solved| solved.class.kind()).or_else(|| kind_without_solver(class_name));
        let Some(kind) = kind.filter(|kind| training.takes(*kind)) else {
            let supported = SCHEDULERS.iter().filter(|s| s.is_class_name() && training.classes().contains(&s.class));
            let supported: Vec<&str> = supported.map(|scheduler| scheduler.name).collect();
            let problem = format!("`scheduler` is {class_name}; supported: {}", supported.join(", "));
            return Err(Error::checkpoint(manifest.path("", MODEL_INDEX), problem));
        };
        let scheduler = manifest.component("scheduler")?;
        let file = SchedulerConfig::parse(&scheduler.path(FILE_NAME), scheduler.bytes(FILE_NAME)?)?;
        let settings = manifest.schedule_settings();
        for (field, value) in settings.iter().filter(|(field, value)| file.get(field) != Some(value)) {
            tracing::info!(
                "`{field}` is {value}, as the single file says, whatever {} says",
                manifest.root().display()
            );
        }
        let file = file.with(settings);
        match solved.filter(|solved| training.classes().contains(&solved.class)) {
            Some(own) => Self::new(own, &file, training),
            None => Self::without_own(class_name, kind, &file, training),
        }
    }

    /// All names under which `file`, written for the class of `own`, makes sense. An error where it makes none under its
    /// own.
    pub fn new(own: &'static Scheduler, file: &SchedulerConfig, training: Training) -> Result<Self> {
        let file = as_kept(own.name, file);
        let mut choices = Vec::new();
        for (scheduler, choice) in candidates(own.class, &file, training) {
            match choice {
                Ok(choice) => choices.push(choice),
                Err(error) if scheduler == own => return Err(error),
                Err(_) => (),
            }
        }
        Ok(Self { own: Own::Solved(own), choices, num_train_timesteps: num_train_timesteps(&file), training })
    }

    /// As [`Schedulers::new`] for a file that was written for a class without a solver for this family. An error where it
    /// makes sense under no name.
    fn without_own(class_name: &str, kind: Kind, file: &SchedulerConfig, training: Training) -> Result<Self> {
        training.check(kind, class_name, file)?;
        let file = &as_kept(class_name, file);
        // Of a flow-matching model the file spells the shift as one of these two does.
        let from = if kind == Kind::FlowMatch { Class::FlowMatchEuler } else { Class::UniPc };
        let (mut choices, mut problem) = (Vec::new(), None);
        for (_, choice) in candidates(from, file, training) {
            match choice {
                Ok(choice) => choices.push(choice),
                Err(error) => problem = problem.or(Some(error)),
            }
        }
        if let (true, Some(problem)) = (choices.is_empty(), problem) {
            return Err(problem);
        }
        tracing::warn!(
            "{class_name}, the model's own scheduler, has no solver: requests have to name another scheduler"
        );
        Ok(Self {
            own: Own::Unsolved(class_name.to_owned()),
            choices,
            num_train_timesteps: num_train_timesteps(file),
            training,
        })
    }

    /// The scheduler that samples requests that name none; of a class without a solver there is none.
    pub fn own(&self) -> Option<&'static Scheduler> {
        match self.own {
            Own::Solved(own) => Some(own),
            Own::Unsolved(_) => None,
        }
    }

    /// Name of the class that the checkpoint's configuration was written for.
    pub fn own_name(&self) -> &str {
        match &self.own {
            Own::Solved(own) => own.name,
            Own::Unsolved(class_name) => class_name,
        }
    }

    /// The scheduler that a request asks for, or the checkpoint's own; likewise its spacing.
    pub fn choose(&self, asked: Asked<'_>) -> Result<Chosen> {
        let name = match (asked.scheduler, &self.own) {
            (Some(asked), _) => asked,
            (None, Own::Solved(own)) => own.name,
            (None, Own::Unsolved(class_name)) => {
                let names = self.names();
                let problem = format!("is needed: this model's own {class_name} is not supported; allowed: {names}");
                return Err(Error::invalid("scheduler", problem));
            }
        };
        let choice = self.choices.iter().find(|choice| choice.scheduler.name == name).ok_or_else(|| {
            Error::invalid("scheduler", format!("is none of this model's; allowed: {}", self.names()))
        })?;
        let scheduler = choice.scheduler;
        let mut config = match asked.flow_shift {
            Some(shift) => choice.shifted(shift, self.training)?,
            None => choice.config.clone(),
        };
        match (config.spaced(), asked.timestep_spacing) {
            (Some(schedule), Some(spacing)) => schedule.set_spacing(spacing),
            (None, Some(_)) => return Err(choice.has_no_effect("timestep_spacing")),
            (_, None) => (),
        }
        if let Some(given) = asked.given {
            choice.check_given(given, self.num_train_timesteps)?;
        }
        let timestep_spacing = config.spaced().map(|schedule| schedule.spacing());
        let flow_shift = asked.flow_shift.or_else(|| choice.own_shift());
        let given_steps = asked.given.and_then(|given| choice.num_steps(given));
        Ok(Chosen { scheduler, timestep_spacing, flow_shift, given_steps, max_steps: config.max_steps() })
    }

    /// All that a request may ask for.
    pub fn iter(&self) -> impl Iterator<Item = &'static Scheduler> {
        self.choices.iter().map(|choice| choice.scheduler)
    }

    fn names(&self) -> String {
        self.iter().map(|scheduler| scheduler.name).collect::<Vec<_>>().join(", ")
    }

    /// Of the steps of a loop, those that denoise the share `denoising_end` of the noise schedule: those at its timestep
    /// and before. Source: diffusers `pipeline_stable_diffusion_xl.py` (`denoising_end`) and its sibling for image to image
    /// (`get_timesteps`, `denoising_start`), whose cut this is too.
    pub fn steps_before(&self, scheduler: &Scheduler, the_loop: &Loop, denoising_end: f64) -> usize {
        let train = self.num_train_timesteps as f64;
        let cutoff = (train - denoising_end * train).round_ties_even();
        self.start(scheduler, the_loop).timesteps().iter().filter(|timestep| **timestep >= cutoff).count()
    }

    /// The solver of a loop whose steps and spacing [`Schedulers::choose`] allows.
    pub fn start(&self, scheduler: &Scheduler, the_loop: &Loop) -> Box<dyn Solver> {
        let choice = self.choices.iter().find(|choice| choice.scheduler == scheduler);
        let choice = choice.expect("the card has checked the scheduler: this is a bug");
        let shifted = the_loop.flow_shift.map(|shift| choice.shifted(shift, self.training));
        let mut config = match shifted {
            Some(config) => config.expect("the card has checked the shift: this is a bug"),
            None => choice.config.clone(),
        };
        if let (Some(schedule), Some(spacing)) = (config.spaced(), the_loop.timestep_spacing) {
            schedule.set_spacing(spacing);
        }
        let (steps, eta) = (the_loop.steps, the_loop.eta.unwrap_or_default());
        let sigmas = the_loop.given.as_ref().map(|given| given.values().to_vec());
        match (&config, &the_loop.given) {
            (SolverConfig::Euler(config), Some(given)) => return Box::new(Euler::over(config, given)),
            (SolverConfig::UniPc(config), Some(given)) => return Box::new(UniPc::over(config, given.values())),
            _ => {}
        }
        match &config {
            SolverConfig::Euler(config) => Box::new(Euler::new(config, steps)),
            SolverConfig::EulerAncestral(config) => Box::new(EulerAncestral::new(config, steps)),
            SolverConfig::Ddim(config) => Box::new(Ddim::new(config, steps, eta)),
            SolverConfig::Dpm(config) => Box::new(Dpm::new(config, steps)),
            SolverConfig::UniPc(config) => Box::new(UniPc::new(config, steps)),
            SolverConfig::Lcm(config) => Box::new(Lcm::new(config, steps)),
            SolverConfig::Tcd(config) => Box::new(Tcd::new(config, steps, eta)),
            SolverConfig::CogVideoXDdim(config) => Box::new(CogVideoXDdim::new(config, steps)),
            SolverConfig::CogVideoXDpm(config) => Box::new(CogVideoXDpm::new(config, steps)),
            SolverConfig::FlowMatchEuler(config) => Box::new(match the_loop.image_seq_len {
                Some(tokens) => {
                    let sigmas = sigmas.unwrap_or_else(|| linear_sigmas(steps));
                    FlowMatchEuler::new(config, &sigmas, config.mu(tokens))
                }
                None if self.training == Training::FlowLinear => {
                    FlowMatchEuler::new(config, &sigmas.unwrap_or_else(|| falling_sigmas(steps)), 0.0)
                }
                None => FlowMatchEuler::new(config, &sigmas.unwrap_or_else(|| config.own_sigmas(steps)), 0.0),
            }),
        }
    }
}

/// Every name of the family's classes, with what `file` means under it.
fn candidates(
    from: Class,
    file: &SchedulerConfig,
    training: Training,
) -> impl Iterator<Item = (&'static Scheduler, Result<Choice>)> {
    let schedulers = SCHEDULERS.iter().filter(move |scheduler| training.classes().contains(&scheduler.class));
    schedulers.map(move |scheduler| {
        let settings = training.settings(from, scheduler.class, file);
        let file = file.with(settings.into_iter().chain(scheduler.settings()));
        let config = SolverConfig::new(scheduler.class, &file, training);
        (scheduler, config.map(|config| Choice { scheduler, file, config }))
    })
}

fn num_train_timesteps(file: &SchedulerConfig) -> usize {
    let found = file.get("num_train_timesteps").and_then(Value::as_u64);
    found.map_or(DEFAULT_TRAIN_TIMESTEPS, |timesteps| timesteps as usize)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    fn named(scheduler: &str) -> Asked<'_> {
        Asked { scheduler: Some(scheduler), ..Asked::default() }
    }
    use crate::rng::TorchGenerator;
    use crate::testing::{discrete_schedulers, flow_schedulers, repository, shifted_schedulers};

    #[test]
    fn names_are_told_apart_and_documented() {
        let docs = std::fs::read_to_string(repository().join("docs/http-api.md")).expect("docs/http-api.md is there");
        let first_column = |line: &str| line.split('|').nth(1).unwrap_or_default().to_owned();
        let documented: Vec<String> = docs.lines().map(first_column).collect();
        for scheduler in &SCHEDULERS {
            assert_eq!(Scheduler::named(scheduler.name), Some(scheduler), "{}", scheduler.name);
            let name = format!("`{}`", scheduler.name);
            assert!(documented.iter().any(|names| names.contains(&name)), "docs/http-api.md lacks {name}");
        }
    }

    #[test]
    fn without_a_name_the_checkpoints_own_class_is_chosen() {
        let schedulers = discrete_schedulers();
        assert_eq!(schedulers.choose(Asked::default()).expect("its own").scheduler.name, "EulerDiscreteScheduler");
        let error = schedulers.choose(named("flow_euler")).expect_err("not for this model").to_string();
        assert!(error.contains("euler, euler_a, ddim") && !error.contains("FlowMatch"), "{error}");
    }

    #[test]
    fn a_spacing_is_taken_where_it_decides_about_the_timesteps() {
        let schedulers = discrete_schedulers();
        for name in ["euler", "euler_a", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc"] {
            let own = schedulers.choose(named(name)).expect("offered");
            assert!(own.timestep_spacing.is_some(), "{name}");
            for timestep_spacing in [Spacing::Leading, Spacing::Trailing, Spacing::Linspace].map(Some) {
                let chosen = schedulers.choose(Asked { timestep_spacing, ..named(name) }).expect("taken");
                assert_eq!(chosen.timestep_spacing, timestep_spacing, "{name}");
                let solver =
                    schedulers.start(chosen.scheduler, &Loop { steps: 4, timestep_spacing, ..Loop::default() });
                let begins_last = timestep_spacing != Some(Spacing::Leading);
                assert_eq!(solver.timesteps()[0] == 999.0, begins_last, "{name} {timestep_spacing:?}");
            }
        }
        for name in ["dpmpp_2m_karras", "dpmpp_2m_sde_karras", "lcm", "tcd"] {
            assert_eq!(schedulers.choose(named(name)).expect("offered").timestep_spacing, None);
            let error = schedulers
                .choose(Asked { timestep_spacing: Some(Spacing::Trailing), ..named(name) })
                .expect_err(name)
                .to_string();
            assert!(error.contains("timestep_spacing") && error.contains("no effect"), "{error}");
        }
    }

    #[test]
    fn a_file_that_its_own_class_cannot_compute_is_refused_although_another_one_could() {
        let own = Scheduler::named("DPMSolverMultistepScheduler").expect("known");
        let file = SchedulerConfig::default().with([("algorithm_type", json!("dpmsolver"))]);
        let error = Schedulers::new(own, &file, Training::Discrete).expect_err("not computed").to_string();
        assert!(error.contains("`algorithm_type`"), "{error}");
    }

    /// A file that was written for this class, which has no solver.
    fn of_unsolved(class_name: &str, fields: &[(&'static str, Value)], training: Training) -> Result<Schedulers> {
        let file = SchedulerConfig::default().with(fields.iter().cloned());
        let solved = Scheduler::named(class_name).map(|scheduler| scheduler.class.kind());
        let kind = solved.or_else(|| kind_without_solver(class_name)).expect("is known");
        Schedulers::without_own(class_name, kind, &file, training)
    }

    #[test]
    fn requests_name_a_scheduler_where_the_checkpoints_own_has_no_solver() {
        let file = [("skip_prk_steps", json!(true)), ("steps_offset", json!(1)), ("beta_end", json!(0.012))];
        for class_name in ["PNDMScheduler", "HeunDiscreteScheduler", "DDPMScheduler", "DPMSolverSDEScheduler"] {
            let schedulers = of_unsolved(class_name, &file, Training::Discrete).expect("other names make sense");
            assert!(schedulers.own().is_none() && schedulers.own_name() == class_name);
            let error = schedulers.choose(Asked::default()).expect_err("names none").to_string();
            let parts = ["scheduler: is needed", class_name, "allowed: euler, euler_a, ddim"];
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
            let named = schedulers.choose(named("euler")).expect("has a solver").scheduler;
            let start = |schedulers: &Schedulers| {
                schedulers.start(named, &Loop { steps: 5, ..Loop::default() }).timesteps().to_vec()
            };
            let euler = Scheduler::named("EulerDiscreteScheduler").expect("known");
            let same = SchedulerConfig::default().with(file.iter().cloned());
            let same = Schedulers::new(euler, &same, Training::Discrete).expect("the same fields");
            assert_eq!(start(&schedulers), start(&same));
        }
    }

    #[test]
    fn a_class_without_a_solver_may_describe_a_flow_matching_model() {
        let shifted = |class_name: &str, fields: &[(&'static str, Value)]| {
            let schedulers = of_unsolved(class_name, fields, Training::Flow).expect("flow matching");
            let named = schedulers.choose(named("flow_euler")).expect("has a solver").scheduler;
            schedulers.start(named, &Loop { steps: 4, ..Loop::default() }).timesteps().to_vec()
        };
        let own = Scheduler::named("FlowMatchEulerDiscreteScheduler").expect("known");
        let file = SchedulerConfig::default().with([("shift", json!(3.0))]);
        let expected = Schedulers::new(own, &file, Training::Flow).expect("its own class");
        let expected = expected.start(own, &Loop { steps: 4, ..Loop::default() }).timesteps().to_vec();
        assert_eq!(shifted("FlowMatchHeunDiscreteScheduler", &[("shift", json!(3.0))]), expected);
        let flow = [
            ("prediction_type", json!("flow_prediction")),
            ("use_flow_sigmas", json!(true)),
            ("flow_shift", json!(3.0)),
        ];
        assert_eq!(shifted("DPMSolverMultistepScheduler", &flow), expected);
    }

    /// As `from_config(config, flow_shift=...)` of diffusers: what a file with that shift gives.
    #[test]
    fn a_request_may_shift_the_sigmas_otherwise() {
        let own = Scheduler::named("UniPCMultistepScheduler").expect("known");
        let file = |shift: f64| {
            let fields = [
                ("prediction_type", json!("flow_prediction")),
                ("use_flow_sigmas", json!(true)),
                ("flow_shift", json!(shift)),
            ];
            Schedulers::new(own, &SchedulerConfig::default().with(fields), Training::Flow).expect("flow matching")
        };
        let checkpoint = file(3.0);
        for name in ["unipc", "flow_euler"] {
            let asked = |flow_shift| checkpoint.choose(Asked { flow_shift, ..named(name) }).expect("has a shift");
            assert_eq!((asked(None).flow_shift, asked(Some(5.0)).flow_shift), (Some(3.0), Some(5.0)));
            let scheduler = asked(None).scheduler;
            let timesteps = |schedulers: &Schedulers, flow_shift| {
                let the_loop = Loop { steps: 5, flow_shift, ..Loop::default() };
                schedulers.start(scheduler, &the_loop).timesteps().to_vec()
            };
            assert_eq!(timesteps(&checkpoint, Some(5.0)), timesteps(&file(5.0), None));
            assert_ne!(timesteps(&checkpoint, Some(5.0)), timesteps(&checkpoint, None));
        }
        let refused = discrete_schedulers().choose(Asked { flow_shift: Some(5.0), ..named("euler") });
        assert!(refused.expect_err("has none").to_string().starts_with("flow_shift: has no effect"));
    }

    #[test]
    fn a_class_of_models_with_other_noise_is_refused() {
        let kind = |class_name| kind_without_solver(class_name).expect("is known");
        assert!(!Training::Flow.takes(kind("PNDMScheduler")));
        assert!(!Training::FlowWithMu.takes(Class::Euler.kind()));
        assert!(!Training::Discrete.takes(kind("FlowMatchLCMScheduler")));
        assert!(!Training::Discrete.takes(Class::FlowMatchEuler.kind()));
        let flow = [("prediction_type", json!("flow_prediction"))];
        for (class_name, fields, training) in [
            ("DPMSolverMultistepScheduler", &[][..], Training::Flow),
            ("DEISMultistepScheduler", &[], Training::FlowWithMu),
            ("DEISMultistepScheduler", &flow, Training::Discrete),
        ] {
            let error = of_unsolved(class_name, fields, training).expect_err("another kind").to_string();
            assert!(error.contains("`prediction_type`") && error.contains(class_name), "{error}");
        }
        let trained = [("trained_betas", json!([0.1, 0.2]))];
        let error = of_unsolved("PNDMScheduler", &trained, Training::Discrete).expect_err("makes sense nowhere");
        assert!(error.to_string().contains("`trained_betas`"), "{error}");
        assert_eq!(kind_without_solver("EDMEulerScheduler"), None);
    }

    #[test]
    fn a_flow_matching_family_refuses_a_file_of_a_model_that_predicts_noise() {
        let own = Scheduler::named("UniPCMultistepScheduler").expect("known");
        let error = Schedulers::new(own, &SchedulerConfig::default(), Training::Flow).expect_err("another kind");
        assert!(error.to_string().contains("`prediction_type`"), "{error}");
    }

    /// Of a sample with known noise and a model that knows it, every solver finds the clean sample at every step.
    #[test]
    fn what_a_right_model_predicts_is_the_clean_sample() {
        let tensor = |seed| {
            let values = TorchGenerator::new(seed).randn(8);
            Tensor::from_vec(values, (1, 8), &Device::Cpu).expect("values")
        };
        let (clean, noise) = (tensor(1), tensor(2));
        let (discrete, shifted, flow) = (discrete_schedulers(), shifted_schedulers(), flow_schedulers());
        for (schedulers, is_flow) in [(&discrete, false), (&shifted, false), (&flow, true)] {
            for scheduler in schedulers.iter() {
                let solver = schedulers.start(scheduler, &Loop { steps: 6, ..Loop::default() });
                // DDIM cuts the clean sample at 1 where it is configured so, as by default.
                let clean = match scheduler.class {
                    Class::Ddim => clean.clamp(-1f32, 1f32).expect("cut"),
                    _ => clean.clone(),
                };
                let output = if is_flow { (&noise - &clean).expect("flow") } else { noise.clone() };
                for index in 0..solver.timesteps().len() {
                    let sample = solver.add_noise(index, &clean, &noise).expect("noisy");
                    let found = solver.predict_clean(index, &output, &sample).expect("clean");
                    let error = (found - &clean).expect("difference").abs().expect("abs").max_all().expect("largest");
                    let error = error.to_scalar::<f32>().expect("a number");
                    assert!(error < 2e-3, "{} at {index}: off by {error}", scheduler.name);
                }
            }
        }
    }
}
