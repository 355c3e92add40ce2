//! Works off one job: follows the sessions of its parts, shows their previews, feeds frames to the encoder while later ones
//! are decoded, books the end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tale_models::Event;
use tale_models::diffusion::DiffusionRequest;
use tale_models::diffusion::shots::assembly::Assembly;
use tale_models::request::{Frame, Phase};

use super::board::JobStore;
use super::encoder::{Before, Encoder, FinishedClip};
use super::failure::Failure;
use super::output::OutputDir;
use super::preview::Preview;
use super::{Change, Job, Progress};
use crate::compute::Compute;
use crate::engine::Session;

/// Begins the session of a part.
pub type BeginPart = dyn Fn(DiffusionRequest) -> Result<Session, Failure> + Send + Sync;

/// A job that is to be worked off.
pub struct Order {
    /// As it is in the store.
    pub job: Job,
    /// What its file begins with.
    pub before: Option<Before>,
    /// The parts of its video.
    pub assembly: Assembly,
    /// Begins those after the first.
    pub begin: Box<BeginPart>,
}

/// What all jobs are worked off with.
pub struct Means {
    /// Where files come to lie.
    pub outputs: Arc<OutputDir>,
    /// Where jobs live.
    pub store: Arc<dyn JobStore>,
    /// Encodes previews.
    pub compute: Compute,
}

/// Follows `session`, which makes the first part of the order, and those of the other parts until the job's end. Stops the
/// device work when the job ends by another hand (it was cancelled).
pub async fn drive(order: Order, session: Session, means: Means) {
    let Order { job, before, assembly, begin } = order;
    let Some(feed) = means.store.feed(job.id) else { return };
    let encoder = Encoder::new(&job, means.outputs.file(job.id, job.file.encoding.format()), before);
    let (id, store) = (job.id, means.store.clone());
    let mut work = Work { encoder, assembly, begin, pace: Pace::default(), num_previews: 0, means, job };
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
    num_previews: usize,
    means: Means,
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
        let mut last_progress = Progress::default();
        loop {
            match session.recv().await {
                // Later parts start while the job is in progress, which is refused.
                Some(Event::Started) => self.apply(Change::Started),
                Some(Event::Progress { phase, done, total }) => {
                    let part = self.assembly.position();
                    let progress = self.pace.progress(phase, part, done, total, Instant::now());
                    last_progress = progress;
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
                Some(Event::Preview { frame, .. }) => self.show(frame, last_progress).await,
                // Sessions of jobs that live in memory alone are asked for none.
                Some(Event::Checkpoint(_)) => (),
                Some(Event::Prompt(_) | Event::Text { .. }) => {
                    return Err(Failure::internal("a clip model answered with text"));
                }
                None => return Err(self.cut_off()),
            }
        }
    }

    /// Adds a preview to the events. The clip does not depend on it: one that cannot be encoded now is left out.
    async fn show(&mut self, frame: Frame, progress: Progress) {
        // Sessions count from 0 in each part.
        let index = self.num_previews;
        let num_bytes = frame.rgb.len();
        match self.means.compute.run(num_bytes, move |_| Preview::new(index, progress, &frame)).await {
            Ok(Ok(preview)) => {
                self.num_previews += 1;
                self.apply(Change::Previewed(preview));
            }
            Ok(Err(error)) => tracing::warn!(%error, "a preview could not be encoded"),
            Err(error) => tracing::warn!(%error, "a preview was left out"),
        }
    }

    /// Why a session ends without an end: its turn found no room for the clip, or there are no turns any more.
    fn cut_off(&self) -> Failure {
        match self.means.outputs.problem() {
            Some(problem) => Failure::insufficient_storage(&problem),
            None => Failure::shutdown(),
        }
    }

    fn apply(&self, change: Change) {
        // Refused after a cancellation, of which `drive` hears by the feed.
        let _ = self.means.store.apply(self.job.id, change);
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
