//! What a request needs in bytes, phase by phase, said before its first step.
//!
//! Owns: the plan. Does not know: what is free at the moment; a plan
//! depends on the request, the model and the room that the device has for work, and on nothing else, so that the same
//! request gives the same picture whatever else is running.

use crate::phase::Phase;

/// Most bytes of the frames of one session that nobody has taken: where there are as many, its next chunk waits. The frames of
/// the chunk that made them so many come on top.
pub const MAX_UNREAD_FRAME_BYTES: usize = 32 << 20;

/// Most bytes that one session keeps alive in each of its phases, beside the weights.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemoryPlan {
    phases: Vec<PhaseBytes>,
    branches_at_once: Option<usize>,
}

/// What one phase needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PhaseBytes {
    /// Which.
    pub phase: Phase,
    /// With all that the session holds meanwhile.
    pub bytes: usize,
}

impl MemoryPlan {
    /// Phases in their order; none for sessions that need nothing of their own.
    pub fn new(phases: impl IntoIterator<Item = (Phase, usize)>) -> Self {
        let phases = phases.into_iter().map(|(phase, bytes)| PhaseBytes { phase, bytes }).collect();
        Self { phases, branches_at_once: None }
    }

    /// The same, said to be for so many guidance branches in one pass through the denoiser.
    pub fn of_branches_at_once(self, branches_at_once: usize) -> Self {
        Self { branches_at_once: Some(branches_at_once), ..self }
    }

    /// Guidance branches that go through the denoiser in one pass; `None` of what has no denoiser.
    pub fn branches_at_once(&self) -> Option<usize> {
        self.branches_at_once
    }

    /// The same with so many bytes more in every phase, for what a session holds all along.
    pub fn holding(mut self, bytes: usize) -> Self {
        self.phases.iter_mut().for_each(|phase| phase.bytes += bytes);
        self
    }

    /// The same with so many bytes more in one phase, if there is such a phase.
    pub fn holding_in(mut self, phase: Phase, bytes: usize) -> Self {
        self.phases.iter_mut().filter(|of| of.phase == phase).for_each(|of| of.bytes += bytes);
        self
    }

    /// The same with a phase before all others.
    pub fn after(mut self, phase: Phase, bytes: usize) -> Self {
        self.phases.insert(0, PhaseBytes { phase, bytes });
        self
    }

    /// What either of two plans needs, one of the same phases.
    pub fn or(mut self, other: &Self) -> Self {
        for phase in &mut self.phases {
            let of_other = other.phases.iter().filter(|of| of.phase == phase.phase).map(|of| of.bytes);
            phase.bytes = of_other.fold(phase.bytes, usize::max);
        }
        self
    }

    /// Phases in their order.
    pub fn phases(&self) -> &[PhaseBytes] {
        &self.phases
    }

    /// The greediest phase, the first of equals.
    pub fn peak(&self) -> Option<PhaseBytes> {
        self.phases.iter().copied().rev().max_by_key(|phase| phase.bytes)
    }

    /// What the whole session needs reserved.
    pub fn peak_bytes(&self) -> usize {
        self.peak().map_or(0, |phase| phase.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_the_first_of_the_greediest_phases() {
        assert_eq!(MemoryPlan::default().peak(), None);
        assert_eq!(MemoryPlan::default().peak_bytes(), 0);
        let plan = MemoryPlan::new([(Phase::Encode, 5), (Phase::Denoise, 7), (Phase::VaeDecode, 7)]);
        assert_eq!(plan.peak(), Some(PhaseBytes { phase: Phase::Denoise, bytes: 7 }));
        assert_eq!(plan.phases().len(), 3);
        assert_eq!(plan.clone().holding(3).peak_bytes(), 10);
        assert_eq!(
            plan.clone().holding_in(Phase::Encode, 9).peak(),
            Some(PhaseBytes { phase: Phase::Encode, bytes: 14 })
        );
        assert_eq!(plan.clone().holding_in(Phase::VaeEncode, 9), plan);
    }
}
