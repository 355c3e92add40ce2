//! Works off one job: follows the sessions of its parts, feeds frames to the encoder while later ones are decoded, books
//! the end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tale_models::Event;
use tale_models::diffusion::DiffusionRequest;
use tale_models::diffusion::shots::assembly::Assembly;
use tale_models::request::Phase;

use super::encoder::{Before, Encoder, FinishedClip};
use super::failure::Failure;
use super::output::OutputDir;
use super::store::JobStore;
use super::{Change, Job, Progress};
use crate::engine::Session;

/// Begins the session of a part.
pub type BeginPart = dyn Fn(DiffusionRequest) -> Result<Session, Failure> + Send + Sync;

/// Follows `session`, which makes the first part of `assembly`, and those of the other parts, which `begin` begins, until
/// the job's end. The file begins with `before`. Stops the device work when the job ends by another hand (it was cancelled).
pub async fn drive(
    job: Job,
    before: Option<Before>,
    assembly: Assembly,
    session: Session,
    begin: Box<BeginPart>,
    outputs: Arc<OutputDir>,
    store: Arc<dyn JobStore>,
) {
    let Some(feed) = store.feed(job.id) else { return };
    let encoder = Encoder::new(&job, outputs.file(job.id, job.file.encoding.format()), before);
    let mut work = Work { encoder, assembly, begin, pace: Pace::default(), outputs, store: store.clone(), job };
    let id = work.job.id;
    let outcome = tokio::select! {
        // Dropping the session and the encoder stops both.
        () = feed.ended() => return,
        outcome = work.follow(session) => outcome,
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
    assembly: Assembly,
    begin: Box<BeginPart>,
    pace: Pace,
    outputs: Arc<OutputDir>,
    store: Arc<dyn JobStore>,
}

impl Work {
    async fn follow(&mut self, mut session: Session) -> Result<FinishedClip, Failure> {
        while self.follow_part(&mut session).await? {
            match self.assembly.next_part() {
                Some(request) => {
                    self.encoder.rest();
                    session = (self.begin)(request)?;
                }
                None => break,
            }
        }
        self.encoder.finish().await
    }

    /// Whether the part came to its end; else the encoder did.
    async fn follow_part(&mut self, session: &mut Session) -> Result<bool, Failure> {
        loop {
            match session.recv().await {
                // Later parts start while the job is in progress, which is refused.
                Some(Event::Started) => self.apply(Change::Started),
                Some(Event::Progress { phase, done, total }) => {
                    let part = self.assembly.position();
                    let progress = self.pace.progress(phase, part, done, total, Instant::now());
                    self.apply(Change::Progressed(progress));
                }
                Some(Event::Frames(frames)) => {
                    // An encoder that has failed takes no more; `finish` hears why, and the device need not go on.
                    if !self.encoder.push(self.assembly.push(frames)).await {
                        return Ok(false);
                    }
                }
                Some(Event::Finished { usage, .. }) => {
                    self.apply(Change::Skipped(usage.skipped_passes));
                    return Ok(true);
                }
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
            None => Failure::shutdown(),
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
    fn progress(&mut self, phase: Phase, part: (usize, usize), done: usize, total: usize, now: Instant) -> Progress {
        let since_first = match self.0 {
            Some((current, first, since)) if current == phase && first <= done => (first, now - since),
            _ => {
                self.0 = Some((phase, done, now));
                (done, Duration::ZERO)
            }
        };
        Progress::new(phase, done, total, Some(since_first)).of_part(part)
    }
}
