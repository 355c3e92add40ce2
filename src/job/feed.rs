//! What has happened to one job, for anybody who wants to follow it: late followers get the past first.

use std::sync::Mutex;

use tokio::sync::watch;

use super::failure::Failure;
use super::files::ClipFiles;
use super::preview::Preview;
use super::{Change, Progress};

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

impl JobEvent {
    /// What followers hear of a change, if they do.
    pub fn of(change: &Change) -> Option<Self> {
        Some(match change {
            Change::Skipped(_) => return None,
            Change::Started => JobEvent::Started,
            Change::Progressed(progress) => JobEvent::Progress(*progress),
            Change::Previewed(preview) => JobEvent::Preview(preview.clone()),
            Change::Completed(files) => JobEvent::Finished(files.clone()),
            Change::Failed(failure) => JobEvent::Failed(failure.clone()),
            Change::Cancelled => JobEvent::Cancelled,
        })
    }
}

/// The events of one job, with their numbers. Outlives the job's place in the store, so that followers hear of the end.
#[derive(Debug)]
pub struct JobFeed {
    events: Mutex<Vec<(usize, JobEvent)>>,
    /// Number of the next event, and whether the last one was terminal.
    news: watch::Sender<(usize, bool)>,
}

impl Default for JobFeed {
    fn default() -> Self {
        Self { events: Mutex::new(vec![(0, JobEvent::Queued)]), news: watch::Sender::new((1, false)) }
    }
}

impl JobFeed {
    /// Adds an event and tells the followers.
    pub fn push(&self, event: JobEvent) {
        let is_terminal = event.is_terminal();
        let mut events = self.lock();
        let number = self.news.borrow().0;
        if events.len() == MAX_FEED_EVENTS {
            // The oldest of what is between: positions 0 and 1 are `Queued` and `Started`.
            events.remove(2);
        }
        if let JobEvent::Preview(preview) = &event {
            make_room(&mut events, preview.bytes.len());
        }
        events.push((number, event));
        drop(events);
        self.news.send_replace((number + 1, is_terminal));
    }

    /// Waits for events from number `next` on; empty when the feed has ended before.
    pub async fn after(&self, next: usize) -> Vec<(usize, JobEvent)> {
        let mut news = self.news.subscribe();
        // The sender lives as long as this feed, so the wait cannot fail.
        let _ = news.wait_for(|(number, ended)| *number > next || *ended).await;
        self.lock().iter().filter(|(number, _)| *number >= next).cloned().collect()
    }

    /// Waits until the job has ended, by whatever hand.
    pub async fn ended(&self) {
        let _ = self.news.subscribe().wait_for(|(_, ended)| *ended).await;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(usize, JobEvent)>> {
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
