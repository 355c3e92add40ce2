//! Works off one job: follows its session, feeds frames to the encoder while later ones are decoded, books the end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tale_models::request::{Frame, Phase};
use tale_models::{Error, Event};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::output::OutputDir;
use super::store::JobStore;
use super::{Change, ClipFile, Failure, Job, Progress};
use crate::engine::Session;
use crate::media::{ClipEncoder, ClipFormat, MediaError, Readers};

/// Code of a failure for want of a disk that takes the clip.
pub const INSUFFICIENT_STORAGE: &str = "insufficient_storage";

/// Batches of frames that may wait for the encoder; more stay, joined, in the session's mailbox.
const MAX_WAITING_BATCHES: usize = 2;

/// Most clips that are encoded at a time, each on a thread of its own; frames of others wait.
const MAX_ENCODERS: usize = 32;
static ENCODERS: Semaphore = Semaphore::const_new(MAX_ENCODERS);

/// Follows `session` until the job's end. Stops the device work when the job ends by another hand (it was cancelled).
pub async fn drive(job: Job, mut session: Session, outputs: Arc<OutputDir>, store: Arc<dyn JobStore>) {
    let Some(feed) = store.feed(job.id) else { return };
    let encoder = Encoder::new(&job, outputs.file(job.id, job.format));
    let mut work = Work { encoder, pace: Pace::default(), outputs, store: store.clone(), job };
    let id = work.job.id;
    let outcome = tokio::select! {
        // Dropping the session and the encoder stops both.
        () = feed.ended() => return,
        outcome = work.follow(&mut session) => outcome,
    };
    match outcome {
        Ok(mut clip) => {
            let completed = store.apply(id, Change::Completed(clip.file.clone()));
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
                Some(Event::Failed(error)) => return Err(failure(&error)),
                // A clip has none.
                Some(Event::Preview { .. }) => (),
                Some(Event::Text { .. }) => return Err(internal("a clip model answered with text")),
                None => return Err(self.cut_off()),
            }
        }
    }

    /// Why a session ends without an end: its turn found no room for the clip, or there are no turns any more.
    fn cut_off(&self) -> Failure {
        match self.outputs.problem() {
            Some(problem) => insufficient_storage(&problem),
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

/// The encoding of one clip on a thread of its own, which begins with the first frame. Dropped before its end, nothing of
/// the clip stays.
struct Encoder {
    frames: mpsc::Sender<Batch>,
    clip: oneshot::Receiver<Result<Option<FinishedClip>, MediaError>>,
    /// What the thread will do; `None` once it does.
    waiting: Option<Box<dyn FnOnce() + Send>>,
}

enum Batch {
    Frames(Vec<Frame>),
    /// The last frame has come.
    End,
}

/// A whole file; removed when dropped unless a job in the store has come to own it.
struct FinishedClip {
    file: ClipFile,
    is_claimed: bool,
}

impl Drop for FinishedClip {
    fn drop(&mut self) {
        if self.is_claimed {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.file.path) {
            tracing::warn!(path = %self.file.path.display(), %error, "the clip of a cancelled job stays");
        }
    }
}

impl Encoder {
    fn new(job: &Job, path: PathBuf) -> Self {
        let (frames, batches) = mpsc::channel(MAX_WAITING_BATCHES);
        let (sender, clip) = oneshot::channel();
        let (format, fps) = (job.format, job.request.canvas.fps);
        // A receiver that is gone drops the clip, and the file with it.
        let work = move || drop(sender.send(encode(&path, batches, format, fps)));
        Self { frames, clip, waiting: Some(Box::new(work)) }
    }

    /// Starts the thread, once there are fewer than [`MAX_ENCODERS`].
    async fn begin(&mut self) {
        let Some(work) = self.waiting.take() else { return };
        // Neither the semaphore closes nor, where there is no thread, does the receiver hear anything but the end.
        let Ok(permit) = ENCODERS.acquire().await else { return };
        let work = move || {
            let _permit = permit;
            work();
        };
        if let Err(error) = std::thread::Builder::new().name("tale-clip".into()).spawn(work) {
            tracing::error!(%error, "a clip has no thread to be encoded on");
        }
    }

    /// False when the encoder has ended already.
    async fn push(&mut self, frames: Vec<Frame>) -> bool {
        self.begin().await;
        self.frames.send(Batch::Frames(frames)).await.is_ok()
    }

    async fn finish(&mut self) -> Result<FinishedClip, Failure> {
        self.begin().await;
        let _ = self.frames.send(Batch::End).await;
        match (&mut self.clip).await {
            Ok(Ok(Some(clip))) => Ok(clip),
            Ok(Ok(None)) => Err(internal("the clip ended before its last frame")),
            Ok(Err(error)) if error.is_of_storage() => {
                tracing::error!(%error, "a clip could not be written");
                Err(insufficient_storage("the disk took no more of the clip"))
            }
            Ok(Err(error)) => Err(internal(&error.to_string())),
            Err(_) => Err(internal("the encoder panicked")),
        }
    }
}

/// Encodes until the end; `None` when the sender goes away before it.
fn encode(
    path: &Path,
    mut batches: mpsc::Receiver<Batch>,
    format: ClipFormat,
    fps: usize,
) -> Result<Option<FinishedClip>, MediaError> {
    let mut encoder: Option<ClipEncoder> = None;
    loop {
        match batches.blocking_recv() {
            None => return Ok(None),
            Some(Batch::Frames(frames)) => {
                for frame in &frames {
                    let mut open = match encoder.take() {
                        Some(open) => open,
                        None => {
                            let size = (frame.width, frame.height);
                            ClipEncoder::create_for(Readers::Owner, path, format, size, fps)?
                        }
                    };
                    open.push(frame)?;
                    encoder = Some(open);
                }
            }
            Some(Batch::End) => {
                encoder.ok_or(MediaError::Empty)?.finish()?;
                let metadata =
                    std::fs::metadata(path).map_err(|source| MediaError::Io { path: path.into(), source })?;
                let file = ClipFile { path: path.to_path_buf(), bytes: metadata.len() };
                return Ok(Some(FinishedClip { file, is_claimed: false }));
            }
        }
    }
}

fn insufficient_storage(problem: impl ToString) -> Failure {
    Failure { code: INSUFFICIENT_STORAGE, message: problem.to_string() }
}

fn internal(message: &str) -> Failure {
    tracing::error!(message, "a clip could not be made");
    Failure { code: "internal_error", message: "the clip could not be encoded".into() }
}

/// What the owner of a failed job is told.
pub fn failure(error: &Error) -> Failure {
    let code = match error {
        Error::OutOfMemory { .. } => "out_of_memory",
        Error::TooManySessions { .. } => "queue_full",
        Error::InvalidRequest { .. } => "invalid_request",
        Error::NotFinite { .. } => "not_finite",
        _ => "internal_error",
    };
    let message = match error {
        Error::OutOfMemory { .. }
        | Error::TooManySessions { .. }
        | Error::InvalidRequest { .. }
        | Error::NotFinite { .. } => error.to_string(),
        _ => "the device failed while it worked on this clip".into(),
    };
    Failure { code, message }
}
