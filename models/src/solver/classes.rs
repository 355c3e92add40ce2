//! The scheduler classes of diffusers by what their configurations describe, whether or not there is a solver for them.
//!
//! Owns: the table of classes without a solver. Does not know: any solver, any field. A file of a class without a solver
//! can be read for another class of its kind, as diffusers does where a scheduler is exchanged (`from_config`).

/// What a class's fields describe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Betas over discrete timesteps of training.
    Betas,
    /// Betas, or flow matching where `prediction_type` says so (`use_flow_sigmas`, `flow_shift`).
    Either,
    /// Flow matching alone, its shift called `shift`.
    FlowMatch,
    /// Betas whose signal-to-noise ratio is shifted (CogVideoX).
    ShiftedBetas,
}

/// Classes of diffusers without a solver here. Those whose models have another noise schedule (EDM), and those that are
/// not for pictures and clips, are not among them.
const WITHOUT_SOLVER: [(&str, Kind); 17] = [
    ("DDIMInverseScheduler", Kind::Betas),
    ("DDIMParallelScheduler", Kind::Betas),
    ("DDPMParallelScheduler", Kind::Betas),
    ("DDPMScheduler", Kind::Betas),
    ("DEISMultistepScheduler", Kind::Either),
    ("DPMSolverMultistepInverseScheduler", Kind::Either),
    ("DPMSolverSDEScheduler", Kind::Betas),
    ("DPMSolverSinglestepScheduler", Kind::Either),
    ("HeunDiscreteScheduler", Kind::Betas),
    ("KDPM2AncestralDiscreteScheduler", Kind::Betas),
    ("KDPM2DiscreteScheduler", Kind::Betas),
    ("LMSDiscreteScheduler", Kind::Betas),
    ("PNDMScheduler", Kind::Betas),
    ("SASolverScheduler", Kind::Either),
    ("FlowMapEulerDiscreteScheduler", Kind::FlowMatch),
    ("FlowMatchHeunDiscreteScheduler", Kind::FlowMatch),
    ("FlowMatchLCMScheduler", Kind::FlowMatch),
];

/// Of a class without a solver; `None` of one that is not known.
pub fn kind_without_solver(class_name: &str) -> Option<Kind> {
    WITHOUT_SOLVER.iter().find(|(name, _)| *name == class_name).map(|(_, kind)| *kind)
}
