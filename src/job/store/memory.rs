//! Jobs in memory: gone when the process ends. For tests, and where nothing is to be written down.
//!
//! Owns: rows in maps, behind one lock, which is never held while anything is awaited. Does not know: what happens to jobs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Mutex, MutexGuard};

use super::clock::{Clock, News};
use super::flow::{self, Waiting};
use super::row::{Ended, Moment, Row, micros};
use super::transaction::{Executor, FlowName, Transaction, Work};
use super::{Claimer, Filter, Listing, Message, Order, Page, RecordState, Retention, StoreError};
use crate::job::JobId;

/// Jobs in memory.
#[derive(Debug, Default)]
pub struct MemoryStore {
    retention: Retention,
    clock: Clock,
    news: News,
    tables: Mutex<Tables>,
}

#[derive(Debug, Default)]
struct Tables {
    last_seq: i64,
    /// By time of order.
    jobs: BTreeMap<i64, Row>,
    seqs: HashMap<JobId, i64>,
    flows: BTreeMap<FlowName, i64>,
    turns: BTreeMap<String, i64>,
    /// By name, with the time at which they are due.
    messages: BTreeMap<String, (i64, Message)>,
}

impl MemoryStore {
    /// An empty store.
    pub fn new(retention: Retention) -> Self {
        Self { retention, ..Self::default() }
    }

    /// What tests turn its clock with.
    #[cfg(test)]
    pub fn hand(&self) -> &super::clock::Hand {
        self.clock.hand()
    }
}

#[async_trait]
impl Executor for MemoryStore {
    fn retention(&self) -> Retention {
        self.retention
    }

    async fn write<W: Work>(&self, work: W) -> Result<W::Answer, StoreError> {
        let tables = self.tables.lock().await;
        let mut transaction = MemoryTransaction { tables, now: self.clock.now(), has_news: false };
        let answer = work.perform(&mut transaction).await;
        if transaction.has_news {
            self.news.announce();
        }
        answer
    }

    async fn read<W: Work>(&self, work: W) -> Result<W::Answer, StoreError> {
        self.write(work).await
    }

    async fn wait(&self, at_most: Duration) {
        self.news.wait(at_most).await;
    }
}

struct MemoryTransaction<'a> {
    tables: MutexGuard<'a, Tables>,
    now: Moment,
    has_news: bool,
}

impl Tables {
    fn row(&self, id: JobId) -> Option<&Row> {
        self.jobs.get(self.seqs.get(&id)?)
    }

    fn remove(&mut self, id: JobId) -> Option<Row> {
        let seq = self.seqs.remove(&id)?;
        self.jobs.remove(&seq)
    }

    fn active(&self) -> impl Iterator<Item = &Row> {
        self.jobs.values().filter(|row| !row.record.state.is_terminal())
    }

    fn waiting<'a>(rows: impl Iterator<Item = &'a Row>) -> impl Iterator<Item = Waiting<(&'a str, super::Priority)>> {
        rows.map(|row| Waiting {
            flow: (row.record.owner.as_str(), row.record.priority),
            seq: row.seq,
            charge: row.charge(),
        })
    }

    fn time(&self, (owner, priority): (&str, super::Priority)) -> i64 {
        self.flows.get(&FlowName { owner: owner.to_owned(), priority }).copied().unwrap_or(0)
    }
}

#[async_trait]
impl Transaction for MemoryTransaction<'_> {
    async fn now(&mut self) -> Result<Moment, StoreError> {
        Ok(self.now)
    }

    async fn hold_places(&mut self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn num_active(&mut self, owner: &str) -> Result<(usize, usize), StoreError> {
        let own = self.tables.active().filter(|row| row.record.owner == owner).count();
        Ok((self.tables.active().count(), own))
    }

    async fn look(&mut self, id: JobId) -> Result<Option<Row>, StoreError> {
        Ok(self.tables.row(id).cloned())
    }

    async fn hold(&mut self, id: JobId) -> Result<Option<Row>, StoreError> {
        self.look(id).await
    }

    async fn ordered(&mut self, owner: &str, key: &str) -> Result<Option<Row>, StoreError> {
        let has_key = |row: &&Row| row.idempotency.as_ref().is_some_and(|known| known.key == key);
        Ok(self.tables.jobs.values().filter(|row| row.record.owner == owner).find(has_key).cloned())
    }

    async fn insert(&mut self, row: &mut Row) -> Result<(), StoreError> {
        self.tables.last_seq += 1;
        row.seq = self.tables.last_seq;
        self.tables.seqs.insert(row.record.id, row.seq);
        self.tables.jobs.insert(row.seq, row.clone());
        Ok(())
    }

    async fn update(&mut self, row: &Row) -> Result<(), StoreError> {
        self.tables.jobs.insert(row.seq, row.clone());
        Ok(())
    }

    async fn delete(&mut self, id: JobId) -> Result<(), StoreError> {
        self.tables.remove(id);
        Ok(())
    }

    async fn next(&mut self, claimer: &Claimer) -> Result<Option<Row>, StoreError> {
        let tables = &self.tables;
        let open = tables.jobs.values().filter(|row| row.is_for(claimer, self.now));
        let seq = flow::next(Tables::waiting(open), |flow| tables.time(flow));
        Ok(seq.and_then(|seq| tables.jobs.get(&seq)).cloned())
    }

    async fn lapsed(&mut self) -> Result<Vec<Row>, StoreError> {
        let mut rows: Vec<_> = self.tables.active().filter(|row| row.has_lapsed(self.now)).cloned().collect();
        rows.sort_by_key(|row| (FlowName::of(row), row.seq));
        Ok(rows)
    }

    async fn ended(&mut self) -> Result<Vec<Ended>, StoreError> {
        let ended = self.tables.jobs.values().filter_map(|row| {
            let file_bytes = match row.record.state {
                RecordState::Completed { file_bytes, .. } => file_bytes,
                _ => 0,
            };
            Some(Ended { seq: row.seq, ended: row.ended?, file_bytes })
        });
        Ok(ended.collect())
    }

    async fn take_ended(&mut self, seq: i64) -> Result<Option<Row>, StoreError> {
        let id = self.tables.jobs.get(&seq).filter(|row| row.ended.is_some()).map(|row| row.record.id);
        Ok(id.and_then(|id| self.tables.remove(id)))
    }

    async fn page(&mut self, filter: &Filter, page: &Page) -> Result<Option<Listing>, StoreError> {
        let after = match page.after {
            None => None,
            Some(id) => match self.tables.seqs.get(&id) {
                None => return Ok(None),
                seq => seq.copied(),
            },
        };
        let is_behind = |row: &&Row| match (after, page.order) {
            (None, _) => true,
            (Some(after), Order::Ascending) => row.seq > after,
            (Some(after), Order::Descending) => row.seq < after,
        };
        let passes = |row: &&Row| {
            let record = &row.record;
            filter.owner.as_ref().is_none_or(|owner| *owner == record.owner)
                && filter.kind.is_none_or(|kind| kind == record.id.kind())
                && filter.state.is_none_or(|state| state == record.state.as_str())
                && filter.model.as_ref().is_none_or(|model| *model == record.model)
        };
        let rows: Box<dyn Iterator<Item = &Row> + Send> = match page.order {
            Order::Ascending => Box::new(self.tables.jobs.values()),
            Order::Descending => Box::new(self.tables.jobs.values().rev()),
        };
        let mut rest = rows.filter(is_behind).filter(passes);
        let jobs = rest.by_ref().take(page.limit).map(|row| row.record.clone()).collect();
        Ok(Some(Listing { jobs, has_more: rest.next().is_some() }))
    }

    async fn queue(&mut self, limit: usize) -> Result<Vec<Row>, StoreError> {
        let tables = &self.tables;
        let (waiting, running): (Vec<_>, Vec<_>) =
            tables.active().partition(|row| row.record.state == RecordState::Queued);
        let (open, mut later): (Vec<&Row>, Vec<_>) = waiting.into_iter().partition(|row| row.run_at <= self.now.steady);
        later.sort_by_key(|row| (row.run_at, row.seq));
        let open: Vec<_> = Tables::waiting(open.into_iter()).collect();
        let order = flow::order(&open, |flow| tables.time(flow));
        let open = order.into_iter().filter_map(|seq| tables.jobs.get(&seq));
        Ok(running.into_iter().chain(open).chain(later).take(limit).cloned().collect())
    }

    async fn time(&mut self, flow: &FlowName) -> Result<Option<i64>, StoreError> {
        Ok(self.tables.flows.get(flow).copied())
    }

    async fn set_time(&mut self, flow: &FlowName, time: i64) -> Result<(), StoreError> {
        self.tables.flows.insert(flow.clone(), time);
        Ok(())
    }

    async fn is_awake(&mut self, flow: &FlowName) -> Result<bool, StoreError> {
        Ok(self.tables.active().any(|row| row.is_rousing() && FlowName::of(row) == *flow))
    }

    async fn turn(&mut self, model: &str) -> Result<Option<i64>, StoreError> {
        Ok(self.tables.turns.get(model).copied())
    }

    async fn set_turn(&mut self, model: &str, turn: i64) -> Result<(), StoreError> {
        self.tables.turns.insert(model.to_owned(), turn);
        Ok(())
    }

    async fn forget_flows(&mut self) -> Result<(), StoreError> {
        let tables = &mut *self.tables;
        let flows: BTreeSet<_> = tables.jobs.values().map(FlowName::of).collect();
        let models: BTreeSet<_> = tables.jobs.values().map(|row| row.record.model.clone()).collect();
        let last_turn = tables.turns.values().copied().max().unwrap_or(i64::MIN);
        tables.flows.retain(|flow, time| *time > last_turn || flows.contains(flow));
        if tables.flows.is_empty() {
            tables.turns.retain(|model, _| models.contains(model));
        }
        Ok(())
    }

    async fn post(&mut self, message: &Message) -> Result<(), StoreError> {
        let due = self.now.steady;
        self.tables.messages.insert(message.id.clone(), (due, message.clone()));
        Ok(())
    }

    async fn due(&mut self, limit: usize, lease: Duration) -> Result<Vec<Message>, StoreError> {
        let now = self.now.steady;
        let mut due: Vec<_> = self.tables.messages.values_mut().filter(|(due, _)| *due <= now).collect();
        due.sort_by(|(a, one), (b, other)| (a, &one.id).cmp(&(b, &other.id)));
        let leased = due.into_iter().take(limit).map(|(due, message)| {
            let answer = message.clone();
            message.attempts += 1;
            *due = now + micros(lease);
            answer
        });
        Ok(leased.collect())
    }

    async fn settle(&mut self, message: &str, again: Option<Duration>) -> Result<(), StoreError> {
        match again {
            None => {
                self.tables.messages.remove(message);
            }
            Some(wait) => {
                let at = self.now.steady + micros(wait);
                if let Some((due, _)) = self.tables.messages.get_mut(message) {
                    *due = at;
                }
            }
        }
        Ok(())
    }

    async fn touch(&mut self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn announce(&mut self) -> Result<(), StoreError> {
        self.has_news = true;
        Ok(())
    }
}
