//! Where jobs live. In memory for now; a durable store takes the same place.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use super::feed::{JobEvent, JobFeed};
use super::{Change, Job, JobId, JobState};
use crate::places::{self, NoPlace};

/// Keeps jobs and the files of completed ones. Calls are short; a store that has to wait for a disk or a network
/// does so on a thread of its own.
pub trait JobStore: Send + Sync + std::fmt::Debug {
    /// Adds a new job.
    fn insert(&self, job: Job) -> Result<(), StoreFull>;

    /// The job as it stands.
    fn get(&self, id: JobId) -> Option<Job>;

    /// Applies a change and tells the feed; `None` when the job is gone or the change cannot happen any more.
    fn apply(&self, id: JobId, change: Change) -> Option<Job>;

    /// Takes a job out and removes its files.
    fn remove(&self, id: JobId) -> Option<Job>;

    /// What happened to a job and what will.
    fn feed(&self, id: JobId) -> Option<Arc<JobFeed>>;

    /// A page of the list; `None` when `page.after` names no job.
    fn list(&self, page: &Page) -> Option<Listing>;

    /// Jobs that have not ended.
    fn num_active(&self) -> usize;
}

/// Too many jobs have not ended, in all or of this client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("jobs are waiting or running: {0}")]
pub struct StoreFull(pub NoPlace);

/// Which part of the list.
#[derive(Debug, Clone, Copy)]
pub struct Page {
    /// The job before the first.
    pub after: Option<JobId>,
    /// Most jobs.
    pub limit: usize,
    /// By time of order.
    pub order: Order,
}

/// By time of order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Oldest first.
    Ascending,
    /// Newest first.
    Descending,
}

/// Part of the list.
#[derive(Debug)]
pub struct Listing {
    /// In the order asked for.
    pub jobs: Vec<Job>,
    /// There are more behind.
    pub has_more: bool,
}

/// How much a [`MemoryStore`] keeps.
#[derive(Debug, Clone, Copy)]
pub struct Retention {
    /// Most jobs that have not ended; clients share them.
    pub max_active_jobs: usize,
    /// Most jobs that have; the oldest goes first, and its file with it.
    pub max_ended_jobs: usize,
    /// Most bytes of finished files; the oldest goes first.
    pub max_file_bytes: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self { max_active_jobs: 256, max_ended_jobs: 1000, max_file_bytes: 10 << 30 }
    }
}

/// Jobs in memory: gone when the process ends.
#[derive(Debug, Default)]
pub struct MemoryStore {
    retention: Retention,
    jobs: Mutex<BTreeMap<JobId, Entry>>,
}

#[derive(Debug)]
struct Entry {
    job: Job,
    feed: Arc<JobFeed>,
}

impl MemoryStore {
    /// An empty store.
    pub fn new(retention: Retention) -> Self {
        Self { retention, jobs: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<JobId, Entry>> {
        self.jobs.lock().expect("no code panics while it holds the jobs: this is a bug")
    }

    /// Forgets ended jobs, oldest first, until the bounds hold. The newest stays whatever its size.
    fn retain(&self, jobs: &mut BTreeMap<JobId, Entry>) {
        let (mut kept_jobs, mut kept_bytes) = (0, 0);
        let mut surplus = Vec::new();
        for (id, entry) in jobs.iter().rev().filter(|(_, entry)| entry.job.state.is_terminal()) {
            kept_jobs += 1;
            kept_bytes += file_bytes(&entry.job);
            let too_many = kept_jobs > self.retention.max_ended_jobs || kept_bytes > self.retention.max_file_bytes;
            if too_many && kept_jobs > 1 {
                surplus.push(*id);
            }
        }
        for id in surplus {
            jobs.remove(&id).iter().for_each(|entry| remove_files(&entry.job));
        }
    }
}

impl JobStore for MemoryStore {
    fn insert(&self, job: Job) -> Result<(), StoreFull> {
        let mut jobs = self.lock();
        let active = || jobs.values().filter(|entry| !entry.job.state.is_terminal());
        let held = active().filter(|entry| entry.job.client == job.client).count();
        places::check(self.retention.max_active_jobs, active().count(), held).map_err(StoreFull)?;
        jobs.insert(job.id, Entry { job, feed: Arc::default() });
        Ok(())
    }

    fn get(&self, id: JobId) -> Option<Job> {
        self.lock().get(&id).map(|entry| entry.job.clone())
    }

    fn apply(&self, id: JobId, change: Change) -> Option<Job> {
        let mut jobs = self.lock();
        let entry = jobs.get_mut(&id)?;
        if !entry.job.apply(&change, SystemTime::now()) {
            return None;
        }
        if let Some(event) = JobEvent::of(&change) {
            entry.feed.push(event);
        }
        let job = entry.job.clone();
        if job.state.is_terminal() {
            self.retain(&mut jobs);
        }
        Some(job)
    }

    fn remove(&self, id: JobId) -> Option<Job> {
        let entry = self.lock().remove(&id)?;
        remove_files(&entry.job);
        Some(entry.job)
    }

    fn feed(&self, id: JobId) -> Option<Arc<JobFeed>> {
        self.lock().get(&id).map(|entry| entry.feed.clone())
    }

    fn list(&self, page: &Page) -> Option<Listing> {
        let jobs = self.lock();
        if page.after.is_some_and(|after| !jobs.contains_key(&after)) {
            return None;
        }
        let all: Box<dyn Iterator<Item = &Entry>> = match page.order {
            Order::Ascending => Box::new(jobs.values()),
            Order::Descending => Box::new(jobs.values().rev()),
        };
        let behind = |entry: &&Entry| match (page.after, page.order) {
            (None, _) => true,
            (Some(after), Order::Ascending) => entry.job.id > after,
            (Some(after), Order::Descending) => entry.job.id < after,
        };
        let mut rest = all.filter(behind);
        let page = rest.by_ref().take(page.limit).map(|entry| entry.job.clone()).collect();
        Some(Listing { jobs: page, has_more: rest.next().is_some() })
    }

    fn num_active(&self) -> usize {
        num_active(&self.lock())
    }
}

fn num_active(jobs: &BTreeMap<JobId, Entry>) -> usize {
    jobs.values().filter(|entry| !entry.job.state.is_terminal()).count()
}

fn file_bytes(job: &Job) -> u64 {
    if let JobState::Completed(files) = &job.state { files.total_bytes() } else { 0 }
}

fn remove_files(job: &Job) {
    let JobState::Completed(files) = &job.state else { return };
    if let Err(error) = files.remove() {
        tracing::warn!(job = %job.id, %error, "the files of a removed job stay");
    }
}

#[cfg(test)]
mod tests {
    use tale_models::ClientId;

    use super::super::files::{ClipFiles, StoredFile};
    use super::super::tests::job;
    use super::*;
    use crate::job::JobKind;

    fn completed(store: &MemoryStore, dir: &std::path::Path, bytes: u64) -> JobId {
        let job = job();
        let id = job.id;
        let path = dir.join(id.to_string());
        std::fs::write(&path, "x").expect("writable");
        store.insert(job).expect("room");
        store.apply(id, Change::Started).expect("queued before");
        store.apply(id, Change::Completed(ClipFiles::new(StoredFile { path, bytes }))).expect("in progress before");
        id
    }

    #[test]
    fn the_oldest_ended_jobs_go_first_and_their_files_with_them() {
        let dir = tempfile::tempdir().expect("made");
        let store = MemoryStore::new(Retention { max_active_jobs: 10, max_ended_jobs: 3, max_file_bytes: 100 });
        let ids: Vec<_> = [10, 10, 10, 10, 95].map(|bytes| completed(&store, dir.path(), bytes)).into();
        let kept: Vec<_> = ids.iter().filter(|id| store.get(**id).is_some()).collect();
        assert_eq!(kept, [&ids[4]], "three by number, then one by bytes");
        assert_eq!(std::fs::read_dir(dir.path()).expect("there").count(), 1);
        assert!(store.remove(ids[4]).is_some());
        assert_eq!(std::fs::read_dir(dir.path()).expect("there").count(), 0);
    }

    #[test]
    fn active_jobs_are_bounded_and_never_forgotten() {
        let store = MemoryStore::new(Retention { max_active_jobs: 2, max_ended_jobs: 0, max_file_bytes: 0 });
        let first = job();
        store.insert(first.clone()).expect("room");
        store.insert(job()).expect("room");
        assert_eq!(store.insert(job()), Err(StoreFull(NoPlace::Full { limit: 2 })));
        assert!(store.apply(first.id, Change::Cancelled).is_some());
        assert!(store.apply(first.id, Change::Started).is_none(), "it has ended");
        store.insert(job()).expect("room again");
    }

    #[test]
    fn a_client_with_its_share_of_the_jobs_leaves_room_for_others() {
        let store = MemoryStore::new(Retention { max_active_jobs: 4, ..Retention::default() });
        let of = |client| Job { client: ClientId(client), ..job() };
        for _ in 0..3 {
            store.insert(of(1)).expect("room");
        }
        assert_eq!(store.insert(of(1)), Err(StoreFull(NoPlace::Share { limit: 4, held: 3 })));
        store.insert(of(2)).expect("room for others");
    }

    #[test]
    fn pages_join_to_the_whole_list_in_both_orders() {
        let store = MemoryStore::default();
        let ids: Vec<_> = std::iter::repeat_with(|| {
            let job = job();
            let id = job.id;
            store.insert(job).expect("room");
            id
        })
        .take(7)
        .collect();
        for order in [Order::Ascending, Order::Descending] {
            let (mut seen, mut after) = (Vec::new(), None);
            loop {
                let listing = store.list(&Page { after, limit: 3, order }).expect("`after` is a job");
                seen.extend(listing.jobs.iter().map(|job| job.id));
                after = seen.last().copied();
                if !listing.has_more {
                    break;
                }
            }
            if order == Order::Descending {
                seen.reverse();
            }
            assert_eq!(seen, ids);
        }
        assert!(
            store
                .list(&Page { after: Some(JobId::generate(JobKind::Video)), limit: 3, order: Order::Ascending })
                .is_none()
        );
    }
}
