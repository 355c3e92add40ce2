//! What may be, in a simulated schedule: held against each answer of a store.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

/// What is known of a job.
#[derive(Debug, Default)]
pub struct Known {
    epoch: u64,
    /// The epoch of who has it.
    holder: Option<u64>,
    lease_until: i64,
    run_at: i64,
    deadline: Option<i64>,
    patience: Option<i64>,
    pub attempts: u32,
    pub crashes: u32,
    pub change: u64,
    wants_end: bool,
    /// Its state's name.
    pub state: &'static str,
    pub ends: u32,
    retries: u32,
}

/// All that is known.
#[derive(Debug, Default)]
pub struct Books {
    /// Microseconds since 1970.
    pub now: i64,
    pub jobs: BTreeMap<JobId, Known>,
    pub removed: BTreeSet<JobId>,
    /// Ends of all jobs, removed ones too.
    pub ends: usize,
    /// Names of messages that were taken.
    pub told: BTreeSet<String>,
    /// The client orders nothing more.
    pub all_ordered: bool,
}

fn micros(time: Duration) -> i64 {
    time.as_micros() as i64
}

impl Known {
    fn is_active(&self) -> bool {
        matches!(self.state, "queued" | "in_progress")
    }

    fn is_claimable(&self, now: i64, is_free: bool) -> bool {
        self.state == "queued"
            && self.run_at <= now
            && self.deadline.is_none_or(|at| at > now)
            && (is_free || self.crashes < 2)
    }

    fn has_lapsed(&self, now: i64) -> bool {
        self.is_active()
            && (self.deadline.is_some_and(|at| at <= now) || self.holder.is_some() && self.lease_until <= now)
    }

    fn end(&mut self, state: &'static str) {
        self.holder = None;
        self.state = state;
        self.change += 1;
        self.ends += 1;
        assert_eq!(self.ends, 1 + self.retries, "it ends once for each time that it was ordered");
    }

    fn wait_again(&mut self) {
        self.holder = None;
        if self.wants_end {
            return self.end("cancelled");
        }
        self.state = "queued";
        self.change += 1;
    }
}

impl Books {
    /// All has ended, and been told.
    pub fn is_done(&self) -> bool {
        self.all_ordered && self.num_active() == 0 && self.told.len() == self.ends
    }

    /// Jobs that have not ended.
    pub fn num_active(&self) -> usize {
        self.jobs.values().filter(|job| job.is_active()).count()
    }

    fn end(&mut self, id: JobId, state: &'static str) {
        self.jobs.get_mut(&id).expect("known").end(state);
        self.ends += 1;
    }

    pub fn ordered(&mut self, order: &NewJob, answer: &Result<Submitted, StoreError>) {
        match answer {
            Ok(Submitted::New(record)) => {
                assert_eq!(record.id, order.id);
                assert!(!self.jobs.contains_key(&order.id), "an order is new once");
                let patience = order.deadline.map(micros);
                let job = Known {
                    run_at: self.now + micros(order.wait),
                    deadline: patience.map(|patience| self.now + patience),
                    patience,
                    state: "queued",
                    ..Known::default()
                };
                self.jobs.insert(order.id, job);
            }
            Ok(Submitted::Known(record)) => {
                assert_eq!(record.id, order.id);
                assert!(self.jobs.contains_key(&order.id));
            }
            Err(StoreError::Full(_)) => assert!(self.num_active() >= 3, "there are places"),
            Err(error) => panic!("{error}"),
        }
    }

    pub fn claimed(&mut self, claimer: &Claimer, answer: &Result<Option<Claimed>, StoreError>) {
        let now = self.now;
        match answer {
            Ok(Some(claimed)) => {
                let job = self.jobs.get_mut(&claimed.lease.id).expect("a removed job is nobody's");
                assert!(job.is_claimable(now, claimer.is_free), "{job:?} is not to be had");
                assert_eq!(job.holder, None, "one job has one holder");
                assert_eq!(claimed.lease.epoch, job.epoch + 1, "epochs rise by one");
                assert_eq!(claimed.is_alone, job.crashes >= 2);
                job.epoch += 1;
                job.holder = Some(job.epoch);
                job.lease_until = now + micros(claimer.lease);
                job.attempts += 1;
                job.change += 1;
                job.state = "in_progress";
                assert_eq!((claimed.record.attempts, claimed.record.crashes), (job.attempts, job.crashes));
            }
            Ok(None) => {
                let waits = self.jobs.values().find(|job| job.is_claimable(now, claimer.is_free));
                assert!(waits.is_none(), "{waits:?} was not found");
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// A write of a holder was taken or refused; gives the job if it was taken.
    pub fn written<T>(&mut self, lease: &Lease, answer: &Result<T, StoreError>) -> Option<&mut Known> {
        let job = self.jobs.get_mut(&lease.id);
        let is_held = job.as_ref().is_some_and(|job| job.holder == Some(lease.epoch));
        match answer {
            Ok(_) => {
                assert!(is_held, "a write of {lease:?} was taken: {job:?}");
                job
            }
            Err(StoreError::Fenced) => {
                assert!(!is_held, "a write of {lease:?} was refused: {job:?}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    pub fn renewed(&mut self, leases: &[Lease], lease: Duration, answer: &Result<Vec<Renewed>, StoreError>) {
        let until = self.now + micros(lease);
        let answers = answer.as_ref().expect("a renewal is answered");
        assert_eq!(answers.len(), leases.len());
        for (lease, answer) in leases.iter().zip(answers) {
            let taken = if *answer == Renewed::Lost { Err(StoreError::Fenced) } else { Ok(()) };
            if let Some(job) = self.written(lease, &taken) {
                job.lease_until = until;
                assert_eq!(*answer == Renewed::Cancelled, job.wants_end);
            }
        }
    }

    pub fn progressed(&mut self, lease: &Lease, answer: &Result<(), StoreError>) {
        if let Some(job) = self.written(lease, answer) {
            job.change += 1;
        }
    }

    pub fn kept(&mut self, lease: &Lease, answer: &Result<Option<String>, StoreError>) {
        if let Some(job) = self.written(lease, answer) {
            job.crashes = 0;
        }
    }

    pub fn finished(&mut self, lease: &Lease, answer: &Result<JobRecord, StoreError>) {
        if self.written(lease, answer).is_some() {
            let state = answer.as_ref().expect("taken").state.as_str();
            self.end(lease.id, state);
        }
    }

    pub fn given_back(&mut self, lease: &Lease, why: Return, answer: &Result<(), StoreError>) {
        let now = self.now;
        if let Some(job) = self.written(lease, answer) {
            match why {
                Return::HandOver => job.attempts -= 1,
                Return::Retry(wait) => job.run_at = now + micros(wait),
            }
            job.wait_again();
            self.ends += usize::from(!self.jobs[&lease.id].is_active());
        }
    }

    pub fn cancelled(&mut self, id: JobId, answer: &Result<JobRecord, StoreError>) {
        match (self.jobs.get_mut(&id), answer) {
            (Some(job), Ok(_)) if job.state == "queued" => self.end(id, "cancelled"),
            (Some(job), Ok(_)) if job.state == "in_progress" => job.wants_end = true,
            (Some(job), Err(StoreError::WrongState { state })) => {
                assert_eq!((*state, job.is_active()), (job.state, false))
            }
            (None, Err(StoreError::Unknown)) => {}
            (job, answer) => panic!("{job:?}: {answer:?}"),
        }
    }

    pub fn retried(&mut self, id: JobId, answer: &Result<JobRecord, StoreError>) {
        let now = self.now;
        match (self.jobs.get_mut(&id), answer) {
            (Some(job), Ok(_)) => {
                assert!(matches!(job.state, "failed" | "cancelled"));
                job.state = "queued";
                job.wants_end = false;
                job.crashes = 0;
                job.change += 1;
                job.retries += 1;
                job.run_at = now;
                job.deadline = job.patience.map(|patience| now + patience);
            }
            (Some(job), Err(StoreError::WrongState { state })) => assert_eq!(*state, job.state),
            (_, Err(StoreError::Full(_))) => assert!(self.num_active() >= 3, "there are places"),
            (None, Err(StoreError::Unknown)) => {}
            (job, answer) => panic!("{job:?}: {answer:?}"),
        }
    }

    pub fn removed(&mut self, id: JobId, answer: &Result<JobRecord, StoreError>) {
        let job = self.jobs.remove(&id);
        assert_eq!(job.is_some(), answer.is_ok());
        self.removed.insert(id);
    }

    pub fn reaped(&mut self, answer: &Result<Vec<JobRecord>, StoreError>) {
        let now = self.now;
        for record in answer.as_ref().expect("reaping is answered") {
            let job = self.jobs.get_mut(&record.id).expect("known");
            assert!(job.has_lapsed(now), "{job:?} has time");
            if job.deadline.is_some_and(|at| at <= now) {
                self.end(record.id, "failed");
            } else {
                job.crashes += 1;
                if job.crashes >= 3 && !job.wants_end {
                    self.end(record.id, "failed");
                } else {
                    job.wait_again();
                    self.ends += usize::from(!self.jobs[&record.id].is_active());
                }
            }
            assert_eq!(record.state.as_str(), self.jobs[&record.id].state);
        }
        let left = self.jobs.values().find(|job| job.has_lapsed(now));
        assert!(left.is_none(), "{left:?} was not reaped");
    }
}
