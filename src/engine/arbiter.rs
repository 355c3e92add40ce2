//! Which runner of a device takes the next step. A pure state machine: time comes in as the measured cost of steps.
//!
//! Two rules. *Fair share*: among runners that have work, the one that has had the least device time for its weight goes
//! next; a runner that was idle starts level with the others and hoards no credit. *Token streams do not wait*: once
//! other work has run since the last text step, a step that would make the wait longer than [`MAX_TEXT_GAP`] gives way
//! to text. A text stream therefore waits for one heavy step at most, and a heavy runner still gets one step between two
//! text steps whenever its share is due. Does not know: sessions, memory, what a step computes.

use std::collections::BTreeMap;
use std::time::Duration;

use tale_models::request::Phase;
use tale_models::runner::StepPlan;

/// How long token streams may wait behind several light steps of other runners; one heavy step may be longer.
pub const MAX_TEXT_GAP: Duration = Duration::from_millis(50);

const HAS_ENTERED: &str = "a candidate has entered: this is a bug";

/// Weight of the newest measurement in the learned cost of a phase.
const COST_SMOOTHING: f64 = 0.2;

/// By which a runner of a device is known for as long as it is there; none has the key of one before it.
pub type RunnerKey = usize;

/// A runner that has work.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// The runner, which has entered.
    pub runner: RunnerKey,
    /// What its next step would be.
    pub plan: StepPlan,
}

/// Shares of device time, and what steps have cost so far.
#[derive(Debug, Default)]
pub struct Arbiter {
    lanes: BTreeMap<RunnerKey, Lane>,
    /// Least `virtual_seconds` among the candidates of the last pick; never falls.
    floor: f64,
    /// Device time of other work since the last text step; `None` while text has no work.
    text_waits: Option<Duration>,
}

#[derive(Debug)]
struct Lane {
    weight: f64,
    /// Device seconds divided by weight.
    virtual_seconds: f64,
    cost_seconds: BTreeMap<Phase, f64>,
}

impl Arbiter {
    /// One runner per weight, whose keys are their positions; a runner of weight 2 gets twice the device time of a runner of
    /// weight 1.
    pub fn new(weights: &[f64]) -> Self {
        let mut arbiter = Self::default();
        weights.iter().enumerate().for_each(|(runner, weight)| arbiter.enter(runner, *weight));
        arbiter
    }

    /// A runner more, level with the others.
    pub fn enter(&mut self, runner: RunnerKey, weight: f64) {
        let lane = Lane { weight, virtual_seconds: self.floor, cost_seconds: BTreeMap::new() };
        let previous = self.lanes.insert(runner, lane);
        assert!(previous.is_none(), "a runner enters once: this is a bug");
    }

    /// A runner is gone.
    pub fn leave(&mut self, runner: RunnerKey) {
        self.lanes.remove(&runner);
    }

    /// The one of `candidates` that steps next, `None` when there are none.
    pub fn pick(&mut self, candidates: &[Candidate]) -> Option<Candidate> {
        self.level(candidates);
        let fair = self.least_served(candidates.iter().copied())?;
        let text = self.least_served(candidates.iter().copied().filter(|c| is_text(c.plan.phase)));
        let Some(text) = text else {
            self.text_waits = None;
            return Some(fair);
        };
        let waited = *self.text_waits.get_or_insert(Duration::ZERO);
        let would_wait = waited.saturating_add(self.estimate(fair.runner, fair.plan.phase));
        let must_give_way = !is_text(fair.plan.phase) && !waited.is_zero() && would_wait > MAX_TEXT_GAP;
        Some(if must_give_way { text } else { fair })
    }

    /// Books the cost of the step that was picked.
    pub fn report(&mut self, step: Candidate, cost: Duration) {
        // A clock too coarse to see a step must not make it free: nothing would ever be owed to the others.
        let cost = cost.max(Duration::from_micros(1));
        let seconds = cost.as_secs_f64();
        let lane = self.lanes.get_mut(&step.runner).expect(HAS_ENTERED);
        lane.virtual_seconds += seconds / lane.weight;
        let learned = lane.cost_seconds.entry(step.plan.phase).or_insert(seconds);
        *learned += COST_SMOOTHING * (seconds - *learned);
        if is_text(step.plan.phase) {
            self.text_waits = None;
        } else if let Some(waited) = &mut self.text_waits {
            *waited += cost;
        }
    }

    /// What the next step of a phase will cost, from those before; longer than any gap while nothing is known.
    pub fn estimate(&self, runner: RunnerKey, phase: Phase) -> Duration {
        match self.lanes[&runner].cost_seconds.get(&phase) {
            Some(&seconds) => Duration::from_secs_f64(seconds),
            None => Duration::MAX,
        }
    }

    /// Lifts runners that come back from idleness to the floor, so that they do not catch up on time they did not use.
    fn level(&mut self, candidates: &[Candidate]) {
        for candidate in candidates {
            let lane = self.lanes.get_mut(&candidate.runner).expect(HAS_ENTERED);
            lane.virtual_seconds = lane.virtual_seconds.max(self.floor);
        }
        let least = candidates.iter().map(|c| self.lanes[&c.runner].virtual_seconds).fold(f64::INFINITY, f64::min);
        if least.is_finite() {
            self.floor = self.floor.max(least);
        }
    }

    fn least_served(&self, candidates: impl Iterator<Item = Candidate>) -> Option<Candidate> {
        let served = |c: &Candidate| self.lanes[&c.runner].virtual_seconds;
        candidates.min_by(|a, b| served(a).total_cmp(&served(b)))
    }
}

/// Phases whose steps feed token streams.
pub fn is_text(phase: Phase) -> bool {
    matches!(phase, Phase::Prefill | Phase::Decode)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidate(runner: usize, phase: Phase) -> Candidate {
        Candidate { runner, plan: StepPlan { phase, sessions: 1, amount: 1.0 } }
    }

    /// Steps that a fixed set of always busy runners takes until `seconds` have passed: (runner, cost) in order.
    fn run(weights: &[f64], work: &[(Phase, f64)], seconds: f64) -> Vec<(usize, f64)> {
        let mut arbiter = Arbiter::new(weights);
        let candidates: Vec<_> = work.iter().enumerate().map(|(i, (phase, _))| candidate(i, *phase)).collect();
        let (mut steps, mut time) = (Vec::new(), 0.0);
        while time < seconds {
            let pick = arbiter.pick(&candidates).expect("all are busy");
            let cost = work[pick.runner].1;
            arbiter.report(pick, Duration::from_secs_f64(cost));
            steps.push((pick.runner, cost));
            time += cost;
        }
        steps
    }

    fn time_of(steps: &[(usize, f64)], runner: usize) -> f64 {
        steps.iter().filter(|(r, _)| *r == runner).map(|(_, cost)| cost).sum()
    }

    #[test]
    fn nothing_to_do_picks_nothing() {
        assert_eq!(Arbiter::new(&[1.0]).pick(&[]), None);
    }

    #[test]
    fn device_time_is_shared_by_weight() {
        let steps = run(&[1.0, 3.0], &[(Phase::Denoise, 0.4), (Phase::Denoise, 0.1)], 400.0);
        let share = time_of(&steps, 1) / time_of(&steps, 0);
        assert!((share - 3.0).abs() < 0.05, "weights 1 and 3 shared as {share}");
    }

    #[test]
    fn a_text_stream_waits_for_one_heavy_step_only() {
        let work = [(Phase::Decode, 0.02), (Phase::Denoise, 1.0), (Phase::VaeDecode, 2.0)];
        let steps = run(&[1.0; 3], &work, 300.0);
        let heavy_in_a_row = steps.windows(2).filter(|pair| pair[0].0 != 0 && pair[1].0 != 0).count();
        assert_eq!(heavy_in_a_row, 0);
        assert!(time_of(&steps, 1) > 60.0 && time_of(&steps, 2) > 60.0, "and the heavy ones still get their share");
    }

    #[test]
    fn light_steps_may_follow_each_other_within_the_gap() {
        let steps = run(&[1.0; 2], &[(Phase::Decode, 0.02), (Phase::Denoise, 0.002)], 20.0);
        let longest = steps.split(|(runner, _)| *runner == 0).map(|run| run.iter().map(|s| s.1).sum::<f64>());
        let longest = longest.fold(0.0, f64::max);
        // The first step of the run finds its cost unknown; from then on only the sum counts.
        assert!(longest <= MAX_TEXT_GAP.as_secs_f64() + 1e-9, "{longest}");
        assert!((time_of(&steps, 1) / time_of(&steps, 0) - 1.0).abs() < 0.05);
    }

    #[test]
    fn a_runner_that_comes_later_is_level_with_the_others() {
        let mut arbiter = Arbiter::new(&[1.0]);
        let (a, b) = (candidate(0, Phase::Denoise), candidate(7, Phase::Denoise));
        for _ in 0..1000 {
            let pick = arbiter.pick(&[a]).expect("busy");
            arbiter.report(pick, Duration::from_secs(1));
        }
        arbiter.enter(7, 1.0);
        let mut turns = [0, 0];
        for _ in 0..100 {
            let pick = arbiter.pick(&[a, b]).expect("busy");
            arbiter.report(pick, Duration::from_secs(1));
            turns[usize::from(pick.runner == 7)] += 1;
        }
        assert!(turns.iter().all(|turns| (49..=51).contains(turns)), "{turns:?}");
        arbiter.leave(7);
        assert_eq!(arbiter.pick(&[a]), Some(a));
    }

    #[test]
    fn a_runner_that_was_idle_hoards_no_credit() {
        let mut arbiter = Arbiter::new(&[1.0, 1.0]);
        let (a, b) = (candidate(0, Phase::Denoise), candidate(1, Phase::Denoise));
        for _ in 0..1000 {
            let pick = arbiter.pick(&[a]).expect("busy");
            arbiter.report(pick, Duration::from_secs(1));
        }
        let mut b_in_a_row = 0;
        while arbiter.pick(&[a, b]).expect("busy").runner == 1 {
            arbiter.report(b, Duration::from_secs(1));
            b_in_a_row += 1;
        }
        assert!(b_in_a_row <= 2, "b ran {b_in_a_row} steps before a had a turn");
    }

    proptest! {
        #[test]
        fn no_busy_runner_starves(
            costs in prop::collection::vec((1u32..2000, 0usize..4), 2..6),
        ) {
            let phases = [Phase::Decode, Phase::Denoise, Phase::VaeDecode, Phase::Encode, Phase::Load];
            let work: Vec<_> = costs.iter().map(|(ms, phase)| (phases[*phase], f64::from(*ms) / 1000.0)).collect();
            let slowest = work.iter().map(|w| w.1).fold(0.0, f64::max);
            let steps = run(&vec![1.0; work.len()], &work, slowest * 200.0);
            for (runner, &(_, cost)) in work.iter().enumerate() {
                let waits = steps.split(|(r, _)| *r == runner).map(<[_]>::len);
                // Each other runner may catch up on this one's last step, and before each of those comes at most one
                // step that text forces.
                let others = work.iter().enumerate().filter(|(other, _)| *other != runner);
                let bound: f64 = others.map(|(_, w)| 2.0 * ((cost + slowest) / w.1 + 2.0)).sum();
                let longest = waits.max().unwrap_or(0);
                prop_assert!(longest as f64 <= bound, "runner {} of {:?} waited {} steps", runner, work, longest);
            }
        }
    }
}
