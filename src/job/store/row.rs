//! A job with what only the store knows of it, and what may happen to it. Pure: time is an argument.
//!
//! Owns: every change of a job, so that it is the same in all stores. Does not know: how rows are kept, whose turn it is.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{
    Claimed, Claimer, Idempotency, JobRecord, Lease, Message, NewJob, Outcome, RecordState, Return, StoreError, flow,
};

/// A job that crashes for so many times in a row fails.
pub const MAX_CRASHES: u32 = 3;
/// A job that has crashed so often in a row runs alone.
pub const CRASHES_ALONE: u32 = 2;

/// A moment on both clocks of a store, in microseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Does not step while the process runs, where that is in our hands: leases, deadlines and ages go by it.
    pub steady: i64,
    /// What people's clocks show.
    pub wall: i64,
}

/// A duration as whole microseconds; what is too long is as long as can be without an overflow of sums.
pub fn micros(duration: Duration) -> i64 {
    const LONGEST: i64 = i64::MAX / 4;
    i64::try_from(duration.as_micros()).unwrap_or(LONGEST).min(LONGEST)
}

/// The time of people's clocks for microseconds since 1970.
pub fn system_time(micros: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_micros(micros.max(0) as u64)
}

/// Microseconds since 1970.
pub fn since_1970(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, micros)
}

/// A job as the store keeps it.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Place by time of order; the store gives it.
    pub seq: i64,
    /// What others may see.
    pub record: JobRecord,
    /// Raised by each claim.
    pub epoch: u64,
    /// While it runs: when its lease ends.
    pub lease_until: Option<i64>,
    /// Nobody claims it before.
    pub run_at: i64,
    /// It was ordered for later and has not been claimed yet: it does not keep its flow awake.
    pub is_deferred: bool,
    /// When it fails.
    pub deadline: Option<i64>,
    /// How long after the order that is.
    pub patience: Option<i64>,
    /// What its flow's time was moved on by for it, while it runs.
    pub charged: i64,
    /// When it ended.
    pub ended: Option<i64>,
    /// The owner's name for the order.
    pub idempotency: Option<Idempotency>,
    /// Who hears of its end.
    pub webhook: Option<String>,
}

/// What a change of a row means for its flow's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct Correction(pub i64);

impl Row {
    /// A job that was just ordered.
    pub fn new(job: NewJob, now: Moment) -> Self {
        let patience = job.deadline.map(micros);
        let deadline = patience.map(|patience| now.steady + patience);
        let record = JobRecord {
            id: job.id,
            owner: job.owner,
            priority: job.priority,
            model: job.model,
            spec: job.spec,
            cost_seconds: job.cost_seconds,
            state: RecordState::Queued,
            created: system_time(now.wall),
            started: None,
            ended: None,
            deadline: deadline.map(system_time),
            attempts: 0,
            crashes: 0,
            progress: None,
            change: 0,
            checkpoint: None,
            is_cancelled: false,
        };
        Self {
            seq: 0,
            record,
            epoch: 0,
            lease_until: None,
            run_at: now.steady + micros(job.wait),
            is_deferred: !job.wait.is_zero(),
            deadline,
            patience,
            charged: 0,
            ended: None,
            idempotency: job.idempotency,
            webhook: job.webhook,
        }
    }

    /// How far it moves its flow's time on.
    pub fn charge(&self) -> i64 {
        flow::charge(self.record.cost_seconds, self.record.priority)
    }

    /// Whether it keeps its flow awake.
    pub fn is_rousing(&self) -> bool {
        match self.record.state {
            RecordState::Queued => !self.is_deferred,
            RecordState::Running { .. } => true,
            _ => false,
        }
    }

    /// Whether the claimer may have it.
    pub fn is_for(&self, claimer: &Claimer, now: Moment) -> bool {
        self.record.state == RecordState::Queued
            && self.run_at <= now.steady
            && self.deadline.is_none_or(|deadline| deadline > now.steady)
            && (claimer.is_free || self.record.crashes < CRASHES_ALONE)
            && claimer.models.contains(&self.record.model)
    }

    /// The node has it from now on.
    pub fn claim(&mut self, claimer: &Claimer, now: Moment) -> Claimed {
        self.set_state(RecordState::Running { node: claimer.node.clone() });
        self.record.attempts += 1;
        self.epoch += 1;
        self.lease_until = Some(now.steady + micros(claimer.lease));
        self.is_deferred = false;
        self.charged = self.charge();
        Claimed {
            lease: Lease { id: self.record.id, epoch: self.epoch },
            record: self.record.clone(),
            is_alone: self.record.crashes >= CRASHES_ALONE,
        }
    }

    /// Refuses a write of a lease that is another one.
    pub fn check(&self, lease: &Lease) -> Result<(), StoreError> {
        let is_running = matches!(self.record.state, RecordState::Running { .. });
        if is_running && self.epoch == lease.epoch { Ok(()) } else { Err(StoreError::Fenced) }
    }

    /// Its holder said how far it is.
    pub fn progress(&mut self, progress: &str) {
        self.record.progress = Some(progress.to_owned());
        self.record.change += 1;
    }

    /// It has come further; gives the place before.
    pub fn checkpoint(&mut self, checkpoint: &str) -> Option<String> {
        self.record.crashes = 0;
        self.record.checkpoint.replace(checkpoint.to_owned())
    }

    /// It ends.
    pub fn finish(&mut self, outcome: Outcome, now: Moment) -> Correction {
        let charged = self.charged;
        let (state, cost_seconds) = match outcome {
            Outcome::Completed { result, file_bytes, cost_seconds } => {
                (RecordState::Completed { result, file_bytes }, cost_seconds)
            }
            Outcome::Failed { code, message } => (RecordState::Failed { code, message }, None),
            Outcome::Cancelled => (RecordState::Cancelled, None),
        };
        self.end(state, now);
        Correction(cost_seconds.map_or(0, |real| flow::charge(real, self.record.priority) - charged))
    }

    fn end(&mut self, state: RecordState, now: Moment) {
        self.set_state(state);
        self.record.ended = Some(system_time(now.wall));
        self.ended = Some(now.steady);
        self.lease_until = None;
        self.charged = 0;
    }

    /// It waits again, or has ended where its owner wanted that; what its flow was charged is given back.
    fn give_up(&mut self, now: Moment) -> Correction {
        let correction = Correction(-self.charged);
        if self.record.is_cancelled {
            self.end(RecordState::Cancelled, now);
        } else {
            self.set_state(RecordState::Queued);
            self.lease_until = None;
            self.charged = 0;
        }
        correction
    }

    /// Its holder gives it back.
    pub fn give_back(&mut self, why: Return, now: Moment) -> Correction {
        match why {
            Return::HandOver => self.record.attempts -= 1,
            Return::Retry(wait) => self.run_at = now.steady + micros(wait),
        }
        self.give_up(now)
    }

    /// Its owner wants it to end.
    pub fn cancel(&mut self, now: Moment) -> Result<(), StoreError> {
        match self.record.state {
            RecordState::Queued => {
                self.record.is_cancelled = true;
                self.end(RecordState::Cancelled, now);
            }
            RecordState::Running { .. } => self.record.is_cancelled = true,
            _ => return Err(self.wrong_state()),
        }
        Ok(())
    }

    /// Whether it has failed or was cancelled, so that it may be tried again.
    pub fn check_retry(&self) -> Result<(), StoreError> {
        match self.record.state {
            RecordState::Failed { .. } | RecordState::Cancelled => Ok(()),
            _ => Err(self.wrong_state()),
        }
    }

    /// It waits anew, with as much time until its deadline as it had at first.
    pub fn retry(&mut self, now: Moment) {
        self.set_state(RecordState::Queued);
        self.record.is_cancelled = false;
        self.record.crashes = 0;
        self.record.progress = None;
        self.record.ended = None;
        self.ended = None;
        self.run_at = now.steady;
        self.is_deferred = false;
        self.deadline = self.patience.map(|patience| now.steady + patience);
        self.record.deadline = self.deadline.map(system_time);
    }

    /// Whether it waits, so that its priority may change.
    pub fn check_waiting(&self) -> Result<(), StoreError> {
        if self.record.state == RecordState::Queued { Ok(()) } else { Err(self.wrong_state()) }
    }

    fn wrong_state(&self) -> StoreError {
        StoreError::WrongState { state: self.record.state.as_str() }
    }

    /// Whether there is something to reap.
    pub fn has_lapsed(&self, now: Moment) -> bool {
        let is_over = |at: Option<i64>| at.is_some_and(|at| at <= now.steady);
        !self.record.state.is_terminal() && (is_over(self.deadline) || is_over(self.lease_until))
    }

    /// It has lapsed: its deadline is over, or its holder has gone silent.
    pub fn reap(&mut self, now: Moment) -> Correction {
        let correction = Correction(-self.charged);
        if self.deadline.is_some_and(|deadline| deadline <= now.steady) {
            self.fail("deadline_exceeded", "the job had not ended by its deadline", now);
            return correction;
        }
        self.crash(now)
    }

    /// Its holder has gone silent.
    pub fn crash(&mut self, now: Moment) -> Correction {
        self.record.crashes += 1;
        if self.record.crashes < MAX_CRASHES || self.record.is_cancelled {
            return self.give_up(now);
        }
        let correction = Correction(-self.charged);
        self.fail("crashed", "the nodes that worked on the job went silent, three times in a row", now);
        correction
    }

    fn fail(&mut self, code: &str, message: &str, now: Moment) {
        self.end(RecordState::Failed { code: code.to_owned(), message: message.to_owned() }, now);
    }

    fn set_state(&mut self, state: RecordState) {
        self.record.state = state;
        self.record.change += 1;
    }

    /// The message to who wants to hear of its end; its name differs for each end of a job that was tried again.
    pub fn message(&self) -> Option<Message> {
        let url = self.webhook.clone()?;
        Some(Message {
            id: format!("msg_{}_{}", self.record.id, self.record.change),
            url,
            job: self.record.id,
            state: self.record.state.as_str().to_owned(),
            ended: self.record.ended?,
            attempts: 0,
        })
    }
}

/// An ended job, as far as it matters for whether it is kept.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    /// Its place by time of order.
    pub seq: i64,
    /// When it ended.
    pub ended: i64,
    /// Bytes that are kept for it.
    pub file_bytes: u64,
}

/// Which of the ended jobs are more than is kept, oldest first, by their `seq`.
pub fn surplus(mut jobs: Vec<Ended>, retention: &super::Retention, now: Moment) -> Vec<i64> {
    jobs.sort_by_key(|job| std::cmp::Reverse((job.ended, job.seq)));
    let mut bytes = 0u64;
    let mut gone: Vec<_> = jobs
        .iter()
        .enumerate()
        .filter(|(newer, job)| {
            bytes = bytes.saturating_add(job.file_bytes);
            let is_old = retention.max_age.is_some_and(|age| job.ended <= now.steady - micros(age));
            is_old || *newer > 0 && (*newer >= retention.max_ended_jobs || bytes > retention.max_file_bytes)
        })
        .map(|(_, job)| job.seq)
        .collect();
    gone.reverse();
    gone
}
