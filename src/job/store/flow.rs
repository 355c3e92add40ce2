//! Whose turn it is. Pure.
//!
//! Owns: the virtual time of *flows*, and the order of a queue that follows from it. The jobs of one owner and one priority are a
//! flow. Does not know: where flows are kept.
//!
//! A flow has a time, and a claim of one of its jobs moves it on by the job's cost, the slower the greater the weight of its
//! priority. The job that is claimed next is the oldest of the flow with the least time. So flows that always have jobs waiting share
//! the device time by their weights (start-time fair queueing; Goyal, Vin and Cheng, 1996), however many jobs each of them has.
//!
//! A flow in which nothing waits or runs does not save up turns: when a job comes, its time is brought up to the *turn* of the job's
//! model, which is the time of the flow that was served last. Turns are kept for each model, because a flow whose model no node
//! serves stands still, and nobody's time is measured by it.
//!
//! Times are whole numbers, so that sums of them are the same in each store and in any order.

use std::collections::HashMap;
use std::hash::Hash;

use super::Priority;

/// Shares of device time. A class has four times that of the next one, so that whoever looks at a screen feels no batch; and with all
/// three waiting a batch still has one part in 21, so that none waits for ever.
pub fn weight(priority: Priority) -> i64 {
    match priority {
        Priority::Interactive => 16,
        Priority::Standard => 4,
        Priority::Batch => 1,
    }
}

/// The greatest weight.
const MAX_WEIGHT: i64 = 16;

/// The greatest cost of a job that is counted, a year: sums of ten thousand jobs stay whole numbers of 64 bits.
const MAX_COST_SECONDS: f64 = 365.0 * 86400.0;

/// How far a job moves its flow's time on: microseconds of the device at the greatest weight. At least 1, so that a flow's jobs have
/// an order; what is not a number counts as nothing.
pub fn charge(cost_seconds: f64, priority: Priority) -> i64 {
    let cost_us = (cost_seconds.clamp(0.0, MAX_COST_SECONDS) * 1e6).round() as i64;
    (cost_us * (MAX_WEIGHT / weight(priority))).max(1)
}

/// The time of a flow in which a job of a model comes to wait while nothing else of it waits or runs.
pub fn roused(own: Option<i64>, turn: Option<i64>) -> i64 {
    own.unwrap_or(0).max(turn.unwrap_or(0))
}

/// A job that waits.
#[derive(Debug, Clone, Copy)]
pub struct Waiting<F> {
    /// Its flow.
    pub flow: F,
    /// Place by time of order, in the whole store.
    pub seq: i64,
    /// Its [`charge`].
    pub charge: i64,
}

/// The jobs in the order in which they are claimed while none comes or goes, by their `seq`. `time` is that of a flow now.
pub fn order<F: Copy + Eq + Hash>(jobs: &[Waiting<F>], time: impl Fn(F) -> i64) -> Vec<i64> {
    let mut jobs = jobs.to_vec();
    jobs.sort_by_key(|job| job.seq);
    let mut times = HashMap::new();
    let mut turns: Vec<_> = jobs
        .iter()
        .map(|job| {
            let at = times.entry(job.flow).or_insert_with(|| time(job.flow));
            let turn = (*at, job.seq);
            *at += job.charge;
            turn
        })
        .collect();
    turns.sort();
    turns.into_iter().map(|(_, seq)| seq).collect()
}

/// The job that is claimed next, by its `seq`.
pub fn next<F: Copy>(jobs: impl Iterator<Item = Waiting<F>>, time: impl Fn(F) -> i64) -> Option<i64> {
    jobs.map(|job| (time(job.flow), job.seq)).min().map(|(_, seq)| seq)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_class_has_four_times_the_next_and_none_waits_for_ever() {
        let classes = Priority::ALL;
        let mut times = HashMap::from(classes.map(|class| (class, 0)));
        let mut served = HashMap::from(classes.map(|class| (class, 0)));
        for _ in 0..2100 {
            let heads = classes.map(|flow| Waiting { flow, seq: flow as i64, charge: charge(1.0, flow) });
            let seq = next(heads.into_iter(), |class| times[&class]).expect("one waits");
            let class = classes[seq as usize];
            *times.get_mut(&class).expect("a class") += charge(1.0, class);
            *served.get_mut(&class).expect("a class") += 1;
        }
        assert_eq!(classes.map(|class| served[&class]), [1600, 400, 100]);
    }

    #[test]
    fn odd_costs_count_as_little_or_as_a_year() {
        let of = |cost| charge(cost, Priority::Interactive);
        assert_eq!([of(0.0), of(-5.0), of(f64::NAN), of(1e-9)], [1; 4]);
        assert_eq!(of(f64::INFINITY), of(MAX_COST_SECONDS));
        assert_eq!(charge(2.5, Priority::Batch), 40_000_000);
    }

    #[test]
    fn who_comes_back_has_saved_nothing() {
        assert_eq!(roused(None, None), 0);
        assert_eq!(roused(Some(3), Some(70)), 70);
        assert_eq!(roused(Some(90), Some(70)), 90);
    }

    proptest! {
        #[test]
        fn the_order_is_that_of_one_claim_after_the_other(
            jobs in prop::collection::vec((0usize..4, 1i64..50), 0..40),
            start in prop::array::uniform4(0i64..100),
        ) {
            let mut waiting: Vec<_> = jobs.iter().enumerate()
                .map(|(seq, (flow, charge))| Waiting { flow: *flow, seq: seq as i64, charge: *charge }).collect();
            let whole = order(&waiting, |flow| start[flow]);
            let mut times = start;
            let mut claimed = Vec::new();
            while let Some(seq) = next(waiting.iter().copied(), |flow| times[flow]) {
                let at = waiting.iter().position(|job| job.seq == seq).expect("it was one of them");
                let job = waiting.remove(at);
                times[job.flow] += job.charge;
                claimed.push(seq);
            }
            prop_assert_eq!(whole, claimed);
        }
    }
}
