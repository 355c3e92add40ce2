//! What ranks give each other through the memory of the host.
//!
//! Owns: rounds in which every rank gives numbers and gets those of all, and the failure after which nobody waits any more. Does not
//! know: what the numbers are, which threads the ranks are.

use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use candle_core::{DType, Tensor};

use super::Link;
use crate::error::{Error, Result};

/// Where the ranks of a group meet.
#[derive(Debug)]
pub struct Exchange {
    of: usize,
    state: Mutex<State>,
    changed: Condvar,
}

/// What one rank gives.
type Given = Arc<Vec<f32>>;

#[derive(Debug, Default)]
struct State {
    /// The round that is being made and the one before it, of which slow ranks still read. A rank begins a round when all have begun
    /// the one before it, so that nobody reads of the last but one.
    rounds: [Round; 2],
    /// The first cause.
    failure: Option<String>,
}

#[derive(Debug, Default)]
struct Round {
    /// From 1 on.
    number: u64,
    given: Vec<Option<Given>>,
}

impl Round {
    /// What all gave, once all did.
    fn of_all(&self) -> Option<Vec<Given>> {
        self.given.iter().cloned().collect()
    }
}

const NOTHING_PANICS: &str = "nothing panics while it holds the rounds: this is a bug";

impl Exchange {
    /// Of so many ranks.
    pub fn new(of: usize) -> Arc<Self> {
        Arc::new(Self { of, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Ends the group: whoever waits, or comes later, hears of this cause. The first one stays.
    pub fn fail(&self, cause: impl Display) {
        self.state().failure.get_or_insert_with(|| cause.to_string());
        self.changed.notify_all();
    }

    /// Why the group has ended, if it has.
    pub fn problem(&self) -> Option<Error> {
        self.state().failure.clone().map(Error::Device)
    }

    /// Waits for the cause of an end that has begun: a rank that panics lets go of what it holds before it says why.
    pub fn wait_for_problem(&self) -> Error {
        let mut state = self.state();
        loop {
            match &state.failure {
                Some(failure) => return Error::Device(failure.clone()),
                None => state = self.changed.wait(state).expect(NOTHING_PANICS),
            }
        }
    }

    /// What all ranks give in round `number` of this rank, which counts its own rounds from 1.
    fn meet(&self, index: usize, number: u64, given: Vec<f32>) -> Result<Vec<Given>> {
        let mut state = self.state();
        let at = (number % 2) as usize;
        let round = &mut state.rounds[at];
        if round.number != number {
            *round = Round { number, given: vec![None; self.of] };
        }
        round.given[index] = Some(Arc::new(given));
        self.changed.notify_all();
        loop {
            if let Some(given) = state.rounds[at].of_all() {
                return Ok(given);
            }
            if let Some(cause) = &state.failure {
                return Err(Error::Device(cause.clone()));
            }
            state = self.changed.wait(state).expect(NOTHING_PANICS);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect(NOTHING_PANICS)
    }
}

/// A rank's way to the others through the host's memory, wherever its tensors are.
#[derive(Debug)]
pub struct MemoryLink {
    exchange: Arc<Exchange>,
    index: usize,
    /// Rounds that this rank has begun.
    rounds: AtomicU64,
}

impl MemoryLink {
    /// Of rank `index`.
    pub fn new(exchange: &Arc<Exchange>, index: usize) -> Self {
        Self { exchange: exchange.clone(), index, rounds: AtomicU64::new(0) }
    }

    /// What all ranks give, in their order; an error where they do not give equally much.
    fn meet(&self, given: Vec<f32>) -> Result<Vec<Given>> {
        let number = self.rounds.fetch_add(1, Relaxed) + 1;
        self.exchange.meet(self.index, number, given)
    }

    fn of_equal_length(&self, x: &Tensor) -> Result<Vec<Given>> {
        let all = self.meet(on_host(x)?)?;
        match all.iter().find(|given| given.len() != x.elem_count()) {
            None => Ok(all),
            Some(other) => {
                let (ours, theirs) = (x.elem_count(), other.len());
                Err(Error::Device(format!("ranks do not agree: one has {ours} values, another {theirs}")))
            }
        }
    }
}

impl Link for MemoryLink {
    fn sum(&self, x: &Tensor) -> Result<Tensor> {
        let all = self.of_equal_length(x)?;
        let mut sum = all[0].to_vec();
        for given in &all[1..] {
            sum.iter_mut().zip(given.iter()).for_each(|(sum, value)| *sum += value);
        }
        like(x, sum, x.dims())
    }

    fn gather(&self, x: &Tensor) -> Result<Tensor> {
        let all = self.of_equal_length(x)?;
        let shape = [&[all.len()], x.dims()].concat();
        like(x, all.iter().flat_map(|given| given.iter().copied()).collect(), &shape)
    }

    fn of_leader(&self, x: &Tensor) -> Result<Tensor> {
        let given = if self.index == 0 { on_host(x)? } else { Vec::new() };
        let all = self.meet(given)?;
        like(x, all[0].to_vec(), x.dims())
    }
}

fn on_host(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
}

/// Values where `x` is, in its dtype.
fn like(x: &Tensor, values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape, x.device())?.to_dtype(x.dtype())?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// What `body` gives on each of so many ranks, each on a thread of its own.
    fn on_ranks<T: Send>(of: usize, body: impl Fn(usize, &MemoryLink) -> T + Sync) -> Vec<T> {
        let exchange = Exchange::new(of);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..of)
                .map(|index| {
                    let (exchange, body) = (&exchange, &body);
                    scope.spawn(move || body(index, &MemoryLink::new(exchange, index)))
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        })
    }

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).expect("a vector")
    }

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().expect("flat").to_vec1().expect("f32")
    }

    #[test]
    fn sums_are_made_in_the_order_of_ranks() {
        // In another order the small ones would count.
        let of_rank = [1e8f32, 1.0, 1.0, -1e8];
        let expected = of_rank.iter().fold(0.0, |sum, value| sum + value);
        let sums = on_ranks(4, |index, link| {
            (0..200)
                .map(|_| values(&link.sum(&tensor(&[of_rank[index], index as f32])).expect("a sum")))
                .collect::<Vec<_>>()
        });
        assert!(sums.iter().flatten().all(|sum| sum == &[expected, 6.0]), "{sums:?}");
    }

    #[test]
    fn all_get_what_all_have_and_what_the_leader_has() {
        let found = on_ranks(3, |index, link| {
            let own = tensor(&[index as f32, 10.0]);
            let all = link.gather(&own).expect("gathered");
            (all.dims().to_vec(), values(&all), values(&link.of_leader(&own).expect("heard")))
        });
        for (dims, all, of_leader) in found {
            assert_eq!((dims, all), (vec![3, 2], vec![0.0, 10.0, 1.0, 10.0, 2.0, 10.0]));
            assert_eq!(of_leader, [0.0, 10.0]);
        }
    }

    #[test]
    fn nobody_waits_for_a_rank_that_has_failed() {
        let exchange = Exchange::new(2);
        let link = MemoryLink::new(&exchange, 0);
        let waits = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| link.sum(&tensor(&[1.0])).expect_err("the other has failed").to_string());
            exchange.fail("cpu:1/2: a cause");
            exchange.fail("another");
            waiting.join().expect("no panic")
        });
        assert!(waits.contains("cpu:1/2: a cause"), "{waits}");
        assert!(link.sum(&tensor(&[1.0])).is_err() && exchange.problem().is_some());
    }

    #[test]
    fn ranks_that_disagree_hear_of_it() {
        let found = on_ranks(2, |index, link| link.sum(&tensor(&vec![0.0; 1 + index])).is_err());
        assert_eq!(found, [true, true]);
    }
}
