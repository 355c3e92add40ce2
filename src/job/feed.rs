//! What has happened to one job, for anybody who wants to follow it: late followers get the past first.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::watch;

use super::failure::Failure;
use super::files::ClipFiles;
use super::preview::Preview;
use super::{Job, JobId, JobState, Progress};

/// Most events that a feed remembers. A job that reports more forgets the progress in the middle, never its ends.
pub const MAX_FEED_EVENTS: usize = 2048;

/// Most bytes of previews that a feed remembers; the newest stays whatever its size.
pub const MAX_FEED_PREVIEW_BYTES: usize = 128 << 10;

/// One thing that happened to a job.
#[derive(Debug, Clone)]
pub enum JobEvent {
    /// It was ordered.
    Queued,
    /// The device began.
    Started,
    /// The device moved on.
    Progress(Progress),
    /// Something is to be seen of it.
    Preview(Preview),
    /// The files are whole.
    Finished(ClipFiles),
    /// It ended without a file.
    Failed(Failure),
    /// Its owner did not want it any more.
    Cancelled,
}

impl JobEvent {
    /// Whether nothing follows.
    pub fn is_terminal(&self) -> bool {
        matches!(self, JobEvent::Finished(_) | JobEvent::Failed(_) | JobEvent::Cancelled)
    }
}

/// The events of one job on this node, with their numbers. Outlives the job's place in the store, so that followers hear of the end.
#[derive(Debug)]
pub struct JobFeed {
    events: Mutex<Vec<(usize, JobEvent)>>,
    /// Number of the next event, and whether the last one was terminal.
    news: watch::Sender<(usize, bool)>,
    /// Tells the numbers of this feed from those of other nodes.
    tag: u32,
}

impl Default for JobFeed {
    fn default() -> Self {
        let tag = RandomState::new().hash_one(0) as u32;
        Self { events: Mutex::new(vec![(0, JobEvent::Queued)]), news: watch::Sender::new((1, false)), tag }
    }
}

impl JobFeed {
    /// What is known of a job whose events nobody here has seen.
    pub fn of(job: &Job) -> Self {
        let feed = Self::default();
        feed.catch_up(job);
        feed
    }

    /// Adds what `job` has come to since the last event. The steps in between are nobody's to tell.
    pub fn catch_up(&self, job: &Job) {
        let has_started = self.has(|event| matches!(event, JobEvent::Started));
        if job.started.is_some() && !has_started {
            self.push(JobEvent::Started);
        }
        let last = self.progress().unwrap_or_default();
        // A row is behind what was told here, where the job is made here.
        let is_news =
            job.progress.percent >= last.percent && (job.progress.phase, job.progress.done) != (last.phase, last.done);
        if job.progress.phase.is_some() && is_news && !job.state.is_terminal() {
            self.push(JobEvent::Progress(job.progress));
        }
        match &job.state {
            JobState::Queued | JobState::InProgress => (),
            JobState::Completed(files) => self.push(JobEvent::Finished(files.clone())),
            JobState::Failed(failure) => self.push(JobEvent::Failed(failure.clone())),
            JobState::Cancelled => self.push(JobEvent::Cancelled),
        }
    }

    /// Adds an event and tells the followers; nothing follows a terminal one.
    pub fn push(&self, event: JobEvent) {
        let is_terminal = event.is_terminal();
        let mut events = self.lock();
        let (number, has_ended) = *self.news.borrow();
        if has_ended {
            return;
        }
        if events.len() == MAX_FEED_EVENTS {
            // The oldest of what is between: positions 0 and 1 are `Queued` and `Started`.
            events.remove(2);
        }
        if let JobEvent::Preview(preview) = &event {
            make_room(&mut events, preview.bytes.len());
        }
        events.push((number, event));
        self.news.send_replace((number + 1, is_terminal));
    }

    /// The last progress.
    pub fn progress(&self) -> Option<Progress> {
        self.lock().iter().rev().find_map(|(_, event)| match event {
            JobEvent::Progress(progress) => Some(*progress),
            _ => None,
        })
    }

    /// Whether the device has begun.
    pub fn has_started(&self) -> bool {
        self.has(|event| matches!(event, JobEvent::Started))
    }

    fn has(&self, is_it: impl Fn(&JobEvent) -> bool) -> bool {
        self.lock().iter().any(|(_, event)| is_it(event))
    }

    /// Whether the last event was terminal.
    pub fn has_ended(&self) -> bool {
        self.news.borrow().1
    }

    /// The name of an event for a follower that may come back, to this node or another.
    pub fn name(&self, number: usize) -> String {
        format!("{number}-{:08x}", self.tag)
    }

    /// Number of the event behind the one of this name; the first, if it is another feed's.
    pub fn number_after(&self, name: &str) -> usize {
        let (number, tag) = name.split_once('-').map_or((name, None), |(number, tag)| (number, Some(tag)));
        let is_ours = tag.is_none_or(|tag| u32::from_str_radix(tag, 16).is_ok_and(|tag| tag == self.tag));
        let number = number.parse::<usize>().ok().filter(|_| is_ours);
        number.map_or(0, |number| number.saturating_add(1))
    }

    /// Waits for events from number `next` on; empty when the feed has ended before.
    pub async fn after(&self, next: usize) -> Vec<(usize, JobEvent)> {
        let mut news = self.news.subscribe();
        // The sender lives as long as this feed, so the wait cannot fail.
        let _ = news.wait_for(|(number, ended)| *number > next || *ended).await;
        self.lock().iter().filter(|(number, _)| *number >= next).cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(usize, JobEvent)>> {
        self.events.lock().expect("no code panics while it holds a feed: this is a bug")
    }
}

/// Forgets the oldest previews until so many bytes more are within the bound.
fn make_room(events: &mut Vec<(usize, JobEvent)>, more: usize) {
    let bytes_of = |event: &JobEvent| if let JobEvent::Preview(preview) = event { preview.bytes.len() } else { 0 };
    let kept: usize = events.iter().map(|(_, event)| bytes_of(event)).sum();
    let mut surplus = (kept + more).saturating_sub(MAX_FEED_PREVIEW_BYTES);
    events.retain(|(_, event)| {
        let is_surplus = surplus > 0 && matches!(event, JobEvent::Preview(_));
        if is_surplus {
            surplus = surplus.saturating_sub(bytes_of(event));
        }
        !is_surplus
    });
}

/// The feeds of a node: of the jobs that were ordered or are made here, and of those that somebody follows here.
#[derive(Debug, Default)]
pub(super) struct Feeds(Mutex<HashMap<JobId, Entry>>);

#[derive(Debug)]
struct Entry {
    feed: Arc<JobFeed>,
    /// Somebody adds to it: the job is made here, or its row is looked at.
    has_source: bool,
}

/// Ended jobs whose past is kept.
const MAX_ENDED_FEEDS: usize = 1000;

impl Feeds {
    /// The feed of a job, as it is or as `make` has it. Those that ended longest ago are forgotten where there are too many.
    pub(super) fn of(&self, id: JobId, make: impl FnOnce() -> JobFeed) -> Arc<JobFeed> {
        let mut feeds = self.lock();
        if let Some(entry) = feeds.get(&id) {
            return entry.feed.clone();
        }
        let ended = feeds.iter().filter(|(_, entry)| entry.feed.has_ended());
        let mut ended: Vec<JobId> = ended.map(|(id, _)| *id).collect();
        if ended.len() >= MAX_ENDED_FEEDS {
            ended.sort_unstable();
            ended[..=ended.len() - MAX_ENDED_FEEDS].iter().for_each(|id| drop(feeds.remove(id)));
        }
        let feed = Arc::new(make());
        feeds.insert(id, Entry { feed: feed.clone(), has_source: false });
        feed
    }

    pub(super) fn get(&self, id: JobId) -> Option<Arc<JobFeed>> {
        self.lock().get(&id).map(|entry| entry.feed.clone())
    }

    /// Takes the right to add to a feed; `false` where somebody has it.
    pub(super) fn take_source(&self, id: JobId) -> bool {
        self.lock().get_mut(&id).is_some_and(|entry| !std::mem::replace(&mut entry.has_source, true))
    }

    /// Nobody adds to a feed any more.
    pub(super) fn give_source_back(&self, id: JobId) {
        if let Some(entry) = self.lock().get_mut(&id) {
            entry.has_source = false;
        }
    }

    /// Forgets a feed that has not ended and that nobody holds.
    pub(super) fn remove_unfollowed(&self, id: JobId) {
        let mut feeds = self.lock();
        if feeds.get(&id).is_some_and(|entry| Arc::strong_count(&entry.feed) == 1 && !entry.feed.has_ended()) {
            feeds.remove(&id);
        }
    }

    pub(super) fn remove(&self, id: JobId) {
        self.lock().remove(&id);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<JobId, Entry>> {
        self.0.lock().expect("no code panics while it holds the feeds: this is a bug")
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::preview;
    use super::*;
    use tale_models::request::Phase;

    #[tokio::test]
    async fn a_late_follower_gets_the_past_and_then_the_end() {
        let feed = JobFeed::default();
        feed.push(JobEvent::Started);
        let past = feed.after(0).await;
        assert!(matches!(past.as_slice(), [(0, JobEvent::Queued), (1, JobEvent::Started)]), "{past:?}");
        feed.push(JobEvent::Cancelled);
        let rest = feed.after(2).await;
        assert!(matches!(rest.as_slice(), [(2, JobEvent::Cancelled)]), "{rest:?}");
        assert!(feed.after(3).await.is_empty());
    }

    #[tokio::test]
    async fn the_oldest_previews_are_forgotten_and_the_newest_is_not() {
        let feed = JobFeed::default();
        feed.push(JobEvent::Started);
        let numbers = async || {
            let of_previews = |(number, event)| matches!(event, JobEvent::Preview(_)).then_some(number);
            feed.after(0).await.into_iter().filter_map(of_previews).collect::<Vec<usize>>()
        };
        for bytes in [50 << 10, 50 << 10, 28 << 10] {
            feed.push(JobEvent::Preview(preview(bytes)));
        }
        assert_eq!(numbers().await, [2, 3, 4]);
        feed.push(JobEvent::Preview(preview(1)));
        assert_eq!(numbers().await, [3, 4, 5]);
        feed.push(JobEvent::Progress(Progress::default()));
        feed.push(JobEvent::Preview(preview(2 * MAX_FEED_PREVIEW_BYTES)));
        assert_eq!(numbers().await, [7]);
        assert_eq!(feed.after(0).await.len(), 4);
    }

    #[tokio::test]
    async fn a_talkative_job_forgets_the_middle() {
        let feed = JobFeed::default();
        feed.push(JobEvent::Started);
        for done in 0..3 * MAX_FEED_EVENTS {
            feed.push(JobEvent::Progress(Progress::new(Phase::Denoise, done, 10_000, None)));
        }
        feed.push(JobEvent::Cancelled);
        let events = feed.after(0).await;
        assert_eq!(events.len(), MAX_FEED_EVENTS);
        assert!(matches!(events[..2], [(0, JobEvent::Queued), (1, JobEvent::Started)]));
        assert!(matches!(events.last(), Some((_, JobEvent::Cancelled))));
    }
}
