//! What is done with jobs, the same in all stores.
//!
//! Owns: the transactions behind [`JobStore`]'s methods. Does not know: how rows are kept.

use std::time::Duration;

use async_trait::async_trait;

use super::row::{Correction, Row, surplus};
use super::transaction::{Executor, FlowName, Transaction, Work};
use super::{
    Claimed, Claimer, Filter, JobRecord, JobStore, Lease, Listing, Message, NewJob, Outcome, Page, Priority, Renewed,
    Retention, Return, StoreError, Submitted, flow,
};
use crate::job::JobId;
use crate::places;

#[async_trait]
impl<E: Executor> JobStore for E {
    async fn submit(&self, job: NewJob) -> Result<Submitted, StoreError> {
        self.write(Submit { job, max_active_jobs: self.retention().max_active_jobs }).await
    }

    async fn get(&self, id: JobId) -> Result<JobRecord, StoreError> {
        self.read(Get(id)).await
    }

    async fn list(&self, filter: &Filter, page: &Page) -> Result<Listing, StoreError> {
        self.read(List(filter.clone(), *page)).await
    }

    async fn claim(&self, claimer: &Claimer) -> Result<Option<Claimed>, StoreError> {
        self.write(Claim(claimer.clone())).await
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewed>, StoreError> {
        if leases.is_empty() {
            return Ok(Vec::new());
        }
        self.write(Renew { leases: leases.to_vec(), lease }).await
    }

    async fn start(&self, lease: &Lease) -> Result<(), StoreError> {
        self.write(Start(lease.clone())).await
    }

    async fn progress(&self, lease: &Lease, progress: &str) -> Result<(), StoreError> {
        self.write(Progress(lease.clone(), progress.to_owned())).await
    }

    async fn checkpoint(&self, lease: &Lease, checkpoint: &str) -> Result<Option<String>, StoreError> {
        self.write(Checkpoint(lease.clone(), checkpoint.to_owned())).await
    }

    async fn finish(&self, lease: &Lease, outcome: Outcome) -> Result<JobRecord, StoreError> {
        self.write(Finish(lease.clone(), outcome)).await
    }

    async fn give_back(&self, lease: &Lease, why: Return) -> Result<(), StoreError> {
        self.write(GiveBack(lease.clone(), why)).await
    }

    async fn cancel(&self, id: JobId) -> Result<JobRecord, StoreError> {
        self.write(Cancel(id)).await
    }

    async fn retry(&self, id: JobId) -> Result<JobRecord, StoreError> {
        self.write(Retry { id, max_active_jobs: self.retention().max_active_jobs }).await
    }

    async fn prioritise(&self, id: JobId, priority: Priority) -> Result<JobRecord, StoreError> {
        self.write(Prioritise(id, priority)).await
    }

    async fn remove(&self, id: JobId) -> Result<JobRecord, StoreError> {
        self.write(Remove(id)).await
    }

    async fn reap(&self) -> Result<Vec<JobRecord>, StoreError> {
        self.write(Reap).await
    }

    async fn retain(&self) -> Result<Vec<JobRecord>, StoreError> {
        self.write(Retain(self.retention())).await
    }

    async fn queue(&self, limit: usize) -> Result<Vec<JobRecord>, StoreError> {
        self.read(Queue(limit)).await
    }

    async fn num_active(&self) -> Result<usize, StoreError> {
        self.read(NumActive).await
    }

    async fn messages(&self, limit: usize, lease: Duration) -> Result<Vec<Message>, StoreError> {
        self.write(Messages(limit, lease)).await
    }

    async fn settle(&self, message: &str, again: Option<Duration>) -> Result<(), StoreError> {
        self.write(Settle(message.to_owned(), again)).await
    }

    async fn news(&self, at_most: Duration) {
        self.wait(at_most).await;
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.write(Check).await
    }
}

/// The row, which its holder may write.
async fn leased(transaction: &mut dyn Transaction, lease: &Lease) -> Result<Row, StoreError> {
    let row = transaction.hold(lease.id).await?.ok_or(StoreError::Fenced)?;
    row.check(lease)?;
    Ok(row)
}

/// The row, which anybody may write.
async fn held(transaction: &mut dyn Transaction, id: JobId) -> Result<Row, StoreError> {
    transaction.hold(id).await?.ok_or(StoreError::Unknown)
}

/// Refuses a job more of an owner where there is no place; nobody else takes one until the transaction's end.
async fn check_places(transaction: &mut dyn Transaction, owner: &str, limit: usize) -> Result<(), StoreError> {
    let (all, own) = transaction.num_active(owner).await?;
    places::check(limit, all, own).map_err(StoreError::Full)
}

/// A job comes to wait in its flow, in which it is not yet.
async fn rouse(transaction: &mut dyn Transaction, row: &Row) -> Result<(), StoreError> {
    let name = FlowName::of(row);
    let own = transaction.time(&name).await?;
    let sleeps = own.is_none() || row.is_rousing() && !transaction.is_awake(&name).await?;
    if sleeps {
        let turn = transaction.turn(&row.record.model).await?;
        transaction.set_time(&name, flow::roused(own, turn)).await?;
    }
    Ok(())
}

async fn correct(transaction: &mut dyn Transaction, row: &Row, correction: Correction) -> Result<(), StoreError> {
    if correction == Correction(0) {
        return Ok(());
    }
    let name = FlowName::of(row);
    let time = transaction.time(&name).await?.unwrap_or(0);
    transaction.set_time(&name, time.saturating_add(correction.0)).await
}

/// Keeps a job that may have ended or come to wait again: who wants to hear of an end is told, who waits for work is woken.
async fn keep(transaction: &mut dyn Transaction, row: &Row) -> Result<(), StoreError> {
    transaction.update(row).await?;
    if !row.record.state.is_terminal() {
        return transaction.announce().await;
    }
    match row.message() {
        Some(message) => transaction.post(&message).await,
        None => Ok(()),
    }
}

#[derive(Debug)]
struct Submit {
    job: NewJob,
    max_active_jobs: usize,
}

#[async_trait]
impl Work for Submit {
    type Answer = Submitted;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<Submitted, StoreError> {
        let job = &self.job;
        transaction.hold_places().await?;
        if let Some(idempotency) = &job.idempotency
            && let Some(known) = transaction.ordered(&job.owner, &idempotency.key).await?
        {
            let is_same = known.idempotency.as_ref() == Some(idempotency);
            return if is_same { Ok(Submitted::Known(known.record)) } else { Err(StoreError::KeyReused) };
        }
        // The answer to the first attempt was lost.
        if let Some(known) = transaction.look(job.id).await? {
            return Ok(Submitted::Known(known.record));
        }
        check_places(transaction, &job.owner, self.max_active_jobs).await?;
        let mut row = Row::new(job.clone(), transaction.now().await?);
        rouse(transaction, &row).await?;
        transaction.insert(&mut row).await?;
        transaction.announce().await?;
        Ok(Submitted::New(row.record))
    }
}

#[derive(Debug)]
struct Get(JobId);

#[async_trait]
impl Work for Get {
    type Answer = JobRecord;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<JobRecord, StoreError> {
        Ok(transaction.look(self.0).await?.ok_or(StoreError::Unknown)?.record)
    }
}

#[derive(Debug)]
struct List(Filter, Page);

#[async_trait]
impl Work for List {
    type Answer = Listing;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<Listing, StoreError> {
        transaction.page(&self.0, &self.1).await?.ok_or(StoreError::Unknown)
    }
}

#[derive(Debug)]
struct Claim(Claimer);

#[async_trait]
impl Work for Claim {
    type Answer = Option<Claimed>;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<Option<Claimed>, StoreError> {
        let Some(mut row) = transaction.next(&self.0).await? else { return Ok(None) };
        let name = FlowName::of(&row);
        let own = transaction.time(&name).await?;
        // Its flow may have slept while it waited for its time to come.
        let turn = if row.is_deferred { transaction.turn(&row.record.model).await? } else { None };
        let start = flow::roused(own, turn);
        let claimed = row.claim(&self.0, transaction.now().await?);
        transaction.update(&row).await?;
        transaction.set_time(&name, start.saturating_add(row.charged)).await?;
        transaction.set_turn(&row.record.model, start).await?;
        Ok(Some(claimed))
    }
}

#[derive(Debug)]
struct Renew {
    leases: Vec<Lease>,
    lease: Duration,
}

#[async_trait]
impl Work for Renew {
    type Answer = Vec<Renewed>;
    // A lease that ends early is no harm but for the work.
    const IS_DURABLE: bool = false;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<Vec<Renewed>, StoreError> {
        let until = transaction.now().await?.steady + super::row::micros(self.lease);
        let mut sorted: Vec<_> = self.leases.iter().enumerate().collect();
        sorted.sort_by_key(|(_, lease)| lease.id);
        let mut answers = vec![Renewed::Lost; self.leases.len()];
        for (index, lease) in sorted {
            let mut row = match leased(transaction, lease).await {
                Ok(row) => row,
                Err(StoreError::Fenced) => continue,
                Err(error) => return Err(error),
            };
            row.lease_until = Some(until);
            transaction.update(&row).await?;
            answers[index] = if row.record.is_cancelled { Renewed::Cancelled } else { Renewed::Held };
        }
        Ok(answers)
    }
}

#[derive(Debug)]
struct Start(Lease);

#[async_trait]
impl Work for Start {
    type Answer = ();

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<(), StoreError> {
        let mut row = leased(transaction, &self.0).await?;
        if row.record.started.is_some() {
            return Ok(());
        }
        row.record.started = Some(super::row::system_time(transaction.now().await?.wall));
        transaction.update(&row).await
    }
}

#[derive(Debug)]
struct Progress(Lease, String);

#[async_trait]
impl Work for Progress {
    type Answer = ();
    const IS_DURABLE: bool = false;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<(), StoreError> {
        let mut row = leased(transaction, &self.0).await?;
        row.progress(&self.1);
        transaction.update(&row).await
    }
}

#[derive(Debug)]
struct Checkpoint(Lease, String);

#[async_trait]
impl Work for Checkpoint {
    type Answer = Option<String>;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<Option<String>, StoreError> {
        let mut row = leased(transaction, &self.0).await?;
        let before = row.checkpoint(&self.1);
        transaction.update(&row).await?;
        Ok(before)
    }
}

#[derive(Debug)]
struct Finish(Lease, Outcome);

#[async_trait]
impl Work for Finish {
    type Answer = JobRecord;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<JobRecord, StoreError> {
        let mut row = leased(transaction, &self.0).await?;
        let correction = row.finish(self.1.clone(), transaction.now().await?);
        keep(transaction, &row).await?;
        correct(transaction, &row, correction).await?;
        Ok(row.record)
    }
}

#[derive(Debug)]
struct GiveBack(Lease, Return);

#[async_trait]
impl Work for GiveBack {
    type Answer = ();

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<(), StoreError> {
        let mut row = leased(transaction, &self.0).await?;
        let correction = row.give_back(self.1, transaction.now().await?);
        keep(transaction, &row).await?;
        correct(transaction, &row, correction).await
    }
}

#[derive(Debug)]
struct Cancel(JobId);

#[async_trait]
impl Work for Cancel {
    type Answer = JobRecord;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<JobRecord, StoreError> {
        let mut row = held(transaction, self.0).await?;
        row.cancel(transaction.now().await?)?;
        keep(transaction, &row).await?;
        Ok(row.record)
    }
}

#[derive(Debug)]
struct Retry {
    id: JobId,
    max_active_jobs: usize,
}

#[async_trait]
impl Work for Retry {
    type Answer = JobRecord;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<JobRecord, StoreError> {
        transaction.hold_places().await?;
        let mut row = held(transaction, self.id).await?;
        row.check_retry()?;
        check_places(transaction, &row.record.owner, self.max_active_jobs).await?;
        row.retry(transaction.now().await?);
        rouse(transaction, &row).await?;
        keep(transaction, &row).await?;
        Ok(row.record)
    }
}

#[derive(Debug)]
struct Prioritise(JobId, Priority);

#[async_trait]
impl Work for Prioritise {
    type Answer = JobRecord;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<JobRecord, StoreError> {
        let mut row = held(transaction, self.0).await?;
        row.check_waiting()?;
        if row.record.priority != self.1 {
            row.record.priority = self.1;
            rouse(transaction, &row).await?;
            keep(transaction, &row).await?;
        }
        Ok(row.record)
    }
}

#[derive(Debug)]
struct Remove(JobId);

#[async_trait]
impl Work for Remove {
    type Answer = JobRecord;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<JobRecord, StoreError> {
        let row = held(transaction, self.0).await?;
        transaction.delete(self.0).await?;
        transaction.announce().await?;
        Ok(row.record)
    }
}

#[derive(Debug)]
struct Reap;

#[async_trait]
impl Work for Reap {
    type Answer = Vec<JobRecord>;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<Vec<JobRecord>, StoreError> {
        let now = transaction.now().await?;
        let mut changed = Vec::new();
        for mut row in transaction.lapsed().await? {
            let correction = row.reap(now);
            keep(transaction, &row).await?;
            correct(transaction, &row, correction).await?;
            changed.push(row.record);
        }
        Ok(changed)
    }
}

/// All running jobs were those of a process that has ended: the store is opened by the only one that there is now.
#[derive(Debug)]
pub(super) struct Recover;

#[async_trait]
impl Work for Recover {
    type Answer = usize;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<usize, StoreError> {
        let now = transaction.now().await?;
        let running = transaction.queue(usize::MAX).await?.into_iter().filter(|row| row.lease_until.is_some());
        let mut num_lost = 0;
        for mut row in running {
            let correction = row.crash(now);
            keep(transaction, &row).await?;
            correct(transaction, &row, correction).await?;
            num_lost += 1;
        }
        Ok(num_lost)
    }
}

#[derive(Debug)]
struct Retain(Retention);

#[async_trait]
impl Work for Retain {
    type Answer = Vec<JobRecord>;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<Vec<JobRecord>, StoreError> {
        let now = transaction.now().await?;
        let ended = transaction.ended().await?;
        let mut gone = Vec::new();
        for seq in surplus(ended, &self.0, now) {
            gone.extend(transaction.take_ended(seq).await?.map(|row| row.record));
        }
        transaction.forget_flows().await?;
        Ok(gone)
    }
}

#[derive(Debug)]
struct Queue(usize);

#[async_trait]
impl Work for Queue {
    type Answer = Vec<JobRecord>;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<Vec<JobRecord>, StoreError> {
        Ok(transaction.queue(self.0).await?.into_iter().map(|row| row.record).collect())
    }
}

#[derive(Debug)]
struct NumActive;

#[async_trait]
impl Work for NumActive {
    type Answer = usize;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<usize, StoreError> {
        Ok(transaction.num_active("").await?.0)
    }
}

#[derive(Debug)]
struct Messages(usize, Duration);

#[async_trait]
impl Work for Messages {
    type Answer = Vec<Message>;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<Vec<Message>, StoreError> {
        transaction.due(self.0, self.1).await
    }
}

#[derive(Debug)]
struct Settle(String, Option<Duration>);

#[async_trait]
impl Work for Settle {
    type Answer = ();

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<(), StoreError> {
        transaction.settle(&self.0, self.1).await
    }
}

#[derive(Debug)]
struct Check;

#[async_trait]
impl Work for Check {
    type Answer = ();
    const IS_DURABLE: bool = false;

    async fn perform(&self, transaction: &mut dyn Transaction) -> Result<(), StoreError> {
        transaction.touch().await
    }
}
