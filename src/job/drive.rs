//! Works off one job: follows its session, feeds frames to the encoder while later ones are decoded, books the end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tale_models::Event;
use tale_models::request::Phase;

use super::encoder::{Encoder, FinishedClip};
use super::failure::Failure;
use super::output::OutputDir;
use super::store::JobStore;
use super::{Change, Job, Progress};
use crate::engine::Session;

/// Follows `session` until the job's end. Stops the device work when the job ends by another hand (it was cancelled).
pub async fn drive(job: Job, mut session: Session, outputs: Arc<OutputDir>, store: Arc<dyn JobStore>) {
    let Some(feed) = store.feed(job.id) else { return };
    let encoder = Encoder::new(&job, outputs.file(job.id, job.file.encoding.format()));
    let mut work = Work { encoder, pace: Pace::default(), outputs, store: store.clone(), job };
    let id = work.job.id;
    let outcome = tokio::select! {
        // Dropping the session and the encoder stops both.
        () = feed.ended() => return,
        outcome = work.follow(&mut session) => outcome,
    };
    match outcome {
        Ok(mut clip) => {
            let completed = store.apply(id, Change::Completed(clip.files.clone()));
            // Refused only when somebody cancelled in this very moment; then the file has no owner and goes.
            clip.is_claimed = completed.is_some();
        }
        Err(failure) => drop(store.apply(id, Change::Failed(failure))),
    }
}

struct Work {
    job: Job,
    encoder: Encoder,
    pace: Pace,
    outputs: Arc<OutputDir>,
    store: Arc<dyn JobStore>,
}

impl Work {
    async fn follow(&mut self, session: &mut Session) -> Result<FinishedClip, Failure> {
        loop {
            match session.recv().await {
                Some(Event::Started) => self.apply(Change::Started),
                Some(Event::Progress { phase, done, total }) => {
                    let progress = self.pace.progress(phase, done, total, Instant::now());
                    self.apply(Change::Progressed(progress));
                }
                Some(Event::Frames(frames)) => {
                    // An encoder that has failed takes no more; `finish` hears why, and the device need not go on.
                    if !self.encoder.push(frames).await {
                        return self.encoder.finish().await;
                    }
                }
                Some(Event::Finished { .. }) => return self.encoder.finish().await,
                Some(Event::Failed(error)) => return Err(Failure::of(&error)),
                // A clip has none.
                Some(Event::Preview { .. }) => (),
                Some(Event::Text { .. }) => return Err(Failure::internal("a clip model answered with text")),
                None => return Err(self.cut_off()),
            }
        }
    }

    /// Why a session ends without an end: its turn found no room for the clip, or there are no turns any more.
    fn cut_off(&self) -> Failure {
        match self.outputs.problem() {
            Some(problem) => Failure::insufficient_storage(&problem),
            None => Failure { code: "shutdown", message: "the server was shut down".into() },
        }
    }

    fn apply(&self, change: Change) {
        // Refused after a cancellation, of which `drive` hears by the feed.
        let _ = self.store.apply(self.job.id, change);
    }
}

/// When the first step of the current phase ended.
#[derive(Default)]
struct Pace(Option<(Phase, usize, Instant)>);

impl Pace {
    fn progress(&mut self, phase: Phase, done: usize, total: usize, now: Instant) -> Progress {
        match self.0 {
            Some((current, first, since)) if current == phase => {
                Progress::new(phase, done, total, Some((first, now - since)))
            }
            _ => {
                self.0 = Some((phase, done, now));
                Progress::new(phase, done, total, Some((done, Duration::ZERO)))
            }
        }
    }
}
