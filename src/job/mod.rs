//! A client's order that outlives its HTTP request: identity, state machine, progress.
//!
//! A job is queued, then in progress, then exactly one of completed, failed and cancelled; [`Job::apply`] is the only way
//! from one state to the next. Where jobs live is a [`board::JobStore`]'s business, how one is worked off is [`drive`]'s.
//! Does not know: HTTP, wire types.

use std::time::{Duration, SystemTime};

use tale_models::ClientId;
use tale_models::diffusion::keyframes::Fitting;
use tale_models::diffusion::{DiffusionRequest, Keyframes};
use tale_models::request::Phase;
use uuid::Uuid;

use self::failure::Failure;
use self::files::ClipFiles;
use self::preview::Preview;
use crate::media::ClipSettings;

pub mod board;
pub mod drive;
pub mod encoder;
pub mod failure;
pub mod feed;
pub mod files;
pub mod output;
pub mod preview;
pub mod store;

/// What a job makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum JobKind {
    /// A clip.
    Video,
    /// Pictures.
    Image,
}

impl JobKind {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Video, Self::Image];

    /// What names of its jobs begin with, before `_`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Video => "video",
            Self::Image => "image",
        }
    }
}

/// Name of a job: its kind, `_`, and a UUID of version 7, so that names sort by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId {
    uuid: Uuid,
    kind: JobKind,
}

impl JobId {
    /// A new name, later than all before in this process.
    pub fn generate(kind: JobKind) -> Self {
        Self { uuid: Uuid::now_v7(), kind }
    }

    /// What the job makes.
    pub fn kind(self) -> JobKind {
        self.kind
    }
}

impl std::fmt::Display for JobId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}_{}", self.kind.as_str(), self.uuid.simple())
    }
}

impl std::str::FromStr for JobId {
    type Err = UnknownJob;

    fn from_str(text: &str) -> Result<Self, UnknownJob> {
        let (prefix, uuid) = text.split_once('_').ok_or(UnknownJob)?;
        let kind = JobKind::ALL.into_iter().find(|kind| kind.as_str() == prefix).ok_or(UnknownJob)?;
        let uuid = Uuid::try_parse(uuid).map_err(|_| UnknownJob)?;
        Ok(Self { uuid, kind })
    }
}

/// No job has this name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there is no such job")]
pub struct UnknownJob;

/// The clip that another one was made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It was made anew with other parameters.
    Remix(JobId),
    /// It goes on, and is the beginning of the new one's file.
    Extension {
        /// The clip.
        of: JobId,
        /// Frames that it has.
        num_frames: usize,
    },
}

/// A clip that is ordered.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its name.
    pub id: JobId,
    /// Who ordered it.
    pub client: ClientId,
    /// The model that makes it.
    pub model: String,
    /// The clip that it was made from.
    pub origin: Option<Origin>,
    /// Effective parameters; of an extension those of what is new.
    pub request: DiffusionRequest,
    /// How the pictures that it was given came to its size; they themselves are not kept.
    pub fittings: Vec<Fitting>,
    /// What becomes of its frames. The comment is written by the encoder, if there is one.
    pub file: ClipSettings,
    /// Whether the file says how it was made.
    pub has_comment: bool,
    /// When it was ordered.
    pub created: SystemTime,
    /// When the device began.
    pub started: Option<SystemTime>,
    /// When the state became terminal.
    pub ended: Option<SystemTime>,
    /// Where it stands.
    pub state: JobState,
    /// How far it is.
    pub progress: Progress,
    /// Predictions that a cache took from ones before them, in all of its parts that are done.
    pub skipped_passes: usize,
}

/// Where a job stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobState {
    /// Nothing is computed yet.
    Queued,
    /// The device works on it, or its file is being written.
    InProgress,
    /// The files are whole.
    Completed(ClipFiles),
    /// It ended without a file.
    Failed(Failure),
    /// Its owner did not want it any more.
    Cancelled,
}

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Progress {
    /// What the device did last.
    pub phase: Option<Phase>,
    /// Steps done of that phase, in all parts.
    pub done: usize,
    /// Steps of that phase in all parts.
    pub total: usize,
    /// Of the whole job, 0 to 100.
    pub percent: u8,
    /// What is left of the phase, in all parts, at its pace so far; `None` until two of its steps are done.
    pub eta: Option<Duration>,
}

/// Percent that denoising ends at; the rest is turning latents into a file.
const DENOISE_PERCENT: usize = 90;
/// Percent that VAE decoding ends at; the last one is for the file to be whole.
const DECODE_PERCENT: usize = 99;

impl Progress {
    /// Progress after `done` of `total` steps of `phase`, the first of which ended `since_first` ago.
    pub fn new(phase: Phase, done: usize, total: usize, since_first: Option<(usize, Duration)>) -> Self {
        let part = |from: usize, to: usize| from + (to - from) * done / total.max(1);
        let percent = match phase {
            Phase::Denoise => part(0, DENOISE_PERCENT),
            Phase::VaeDecode => part(DENOISE_PERCENT, DECODE_PERCENT),
            _ => 0,
        };
        let pace =
            since_first.and_then(|(first, time)| Some(time / u32::try_from(done.checked_sub(first)?).ok()?.max(1)));
        let eta = pace.filter(|pace| !pace.is_zero()).map(|pace| pace * (total - done.min(total)) as u32);
        Self { phase: Some(phase), done, total, percent: percent as u8, eta }
    }

    /// The progress of a whole of `count` equal parts, of which this is that of part `index`, from 0.
    pub fn of_part(self, (index, count): (usize, usize)) -> Self {
        let count = count.max(1);
        let later = count - 1 - index.min(count - 1);
        // The rest of the part at its pace, and as long as all of it would take for each of the parts that follow.
        let left = self.total - self.done.min(self.total);
        let steps_left = left + later * self.total;
        let eta = self.eta.filter(|_| left > 0).map(|eta| eta.mul_f64(steps_left as f64 / left as f64));
        Self {
            done: index * self.total + self.done,
            total: count * self.total,
            percent: ((index * 100 + usize::from(self.percent)) / count) as u8,
            eta,
            ..self
        }
    }
}

/// What can happen to a job.
#[derive(Debug, Clone)]
pub enum Change {
    /// The device began.
    Started,
    /// The device moved on.
    Progressed(Progress),
    /// There is something to see of it.
    Previewed(Preview),
    /// A part is done of which so many predictions were skipped.
    Skipped(usize),
    /// The files are whole.
    Completed(ClipFiles),
    /// It cannot be made.
    Failed(Failure),
    /// Its owner does not want it any more.
    Cancelled,
}

impl JobState {
    /// Its name, as the API has it.
    pub fn as_str(&self) -> &'static str {
        match self {
            JobState::Queued => "queued",
            JobState::InProgress => "in_progress",
            JobState::Completed(_) => "completed",
            JobState::Failed(_) => "failed",
            JobState::Cancelled => "cancelled",
        }
    }

    /// Whether nothing can follow.
    pub fn is_terminal(&self) -> bool {
        matches!(self, JobState::Completed(_) | JobState::Failed(_) | JobState::Cancelled)
    }
}

impl Job {
    /// A job that waits for the device, which is given the pictures of `request`; the job goes without them.
    pub fn new(
        client: ClientId,
        model: String,
        request: DiffusionRequest,
        file: ClipSettings,
        has_comment: bool,
    ) -> Self {
        Self {
            id: JobId::generate(JobKind::Video),
            client,
            model,
            origin: None,
            fittings: request.keyframes.as_ref().map_or(Vec::new(), Keyframes::fittings),
            request: request.without_pictures(),
            file,
            has_comment,
            created: SystemTime::now(),
            started: None,
            ended: None,
            state: JobState::Queued,
            progress: Progress::default(),
            skipped_passes: 0,
        }
    }

    /// Frames of its whole file, before any conversion of their rate. An extension begins with the last frame of the clip
    /// before, which is there once.
    pub fn num_frames(&self) -> usize {
        let own = self.request.canvas.num_frames;
        match self.origin {
            Some(Origin::Extension { num_frames, .. }) => num_frames + own - 1,
            Some(Origin::Remix(_)) | None => own,
        }
    }

    /// Applies what happened. `false`, and nothing changes, when it cannot happen in this state: after the end nothing
    /// can, and nothing progresses or completes before it has started.
    #[must_use]
    pub fn apply(&mut self, change: &Change, now: SystemTime) -> bool {
        let next = match (&self.state, change) {
            (JobState::Queued, Change::Started) => JobState::InProgress,
            (JobState::InProgress, Change::Progressed(progress)) => {
                self.progress = *progress;
                JobState::InProgress
            }
            (JobState::InProgress, Change::Previewed(_)) => JobState::InProgress,
            (JobState::InProgress, Change::Skipped(passes)) => {
                self.skipped_passes += passes;
                JobState::InProgress
            }
            (JobState::InProgress, Change::Completed(file)) => JobState::Completed(file.clone()),
            (JobState::Queued | JobState::InProgress, Change::Failed(failure)) => JobState::Failed(failure.clone()),
            (JobState::Queued | JobState::InProgress, Change::Cancelled) => JobState::Cancelled,
            _ => return false,
        };
        if matches!(change, Change::Started) {
            self.started = Some(now);
        }
        if next.is_terminal() {
            self.ended = Some(now);
            self.progress.eta = None;
        }
        if matches!(next, JobState::Completed(_)) {
            self.progress.percent = 100;
        }
        self.state = next;
        true
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use tale_models::diffusion::{Canvas, Prompt, Sampling};
    use tale_models::solver::names::Scheduler;

    use crate::job::files::StoredFile;
    use crate::media::{ClipFormat, Encoding};

    pub(crate) fn job() -> Job {
        let prompt = Prompt { text: "a boat".into(), max_sequence_length: 8 };
        let canvas = Canvas { width: 32, height: 32, num_frames: 9, fps: 8 };
        let scheduler = Scheduler::named("flow_euler").unwrap();
        let request = DiffusionRequest::new(prompt, canvas, Sampling::new(scheduler, 4, 0));
        let file = ClipSettings::new(Encoding::usual(ClipFormat::Mp4), canvas.fps);
        Job::new(ClientId::default(), "clips".into(), request, file, true)
    }

    pub(crate) fn preview(bytes: usize) -> Preview {
        Preview { index: 0, progress: Progress::default(), size: (1, 1), bytes: vec![0; bytes].into() }
    }

    pub(crate) fn file() -> ClipFiles {
        ClipFiles::new(StoredFile { path: "/nowhere/clip.mp4".into(), bytes: 10 })
    }

    #[test]
    fn names_can_be_read_back_and_sort_by_time() {
        let (a, b) = (JobId::generate(JobKind::Video), JobId::generate(JobKind::Image));
        assert!(a < b);
        assert_eq!(a.to_string().parse(), Ok(a));
        assert_eq!("video_nonsense".parse::<JobId>(), Err(UnknownJob));
    }

    #[test]
    fn progress_counts_the_whole_job_and_tells_the_rest_once_there_is_a_pace() {
        let first = Progress::new(Phase::Denoise, 1, 10, Some((1, Duration::ZERO)));
        assert_eq!((first.percent, first.eta), (9, None));
        let third = Progress::new(Phase::Denoise, 3, 10, Some((1, Duration::from_secs(4))));
        assert_eq!((third.percent, third.eta), (27, Some(Duration::from_secs(14))));
        assert_eq!(Progress::new(Phase::VaeDecode, 3, 3, None).percent, 99);
        let third = third.of_part((1, 3));
        assert_eq!((third.done, third.total, third.percent), (13, 30, 42));
        assert_eq!(third.eta, Some(Duration::from_secs(34)), "17 steps at 2 seconds");
        let last = Progress::new(Phase::VaeDecode, 3, 3, None).of_part((2, 3));
        assert_eq!((last.done, last.total, last.percent), (9, 9, 99));
    }

    proptest! {
        #[test]
        fn a_job_ends_once_whatever_happens_to_it(changes in prop::collection::vec(0usize..7, 0..40)) {
            let mut job = job();
            let mut ends = 0;
            for change in changes {
                let change = match change {
                    0 => Change::Started,
                    1 => Change::Progressed(Progress::new(Phase::Denoise, 1, 2, None)),
                    2 => Change::Completed(file()),
                    3 => Change::Failed(Failure { code: "x", message: String::new() }),
                    4 => Change::Skipped(3),
                    5 => Change::Previewed(preview(1)),
                    _ => Change::Cancelled,
                };
                let was_terminal = job.state.is_terminal();
                let applied = job.apply(&change, SystemTime::now());
                prop_assert!(!(applied && was_terminal), "{:?} after the end", change);
                ends += usize::from(applied && job.state.is_terminal());
                prop_assert_eq!(job.ended.is_some(), job.state.is_terminal());
            }
            prop_assert_eq!(ends, usize::from(job.state.is_terminal()));
        }
    }
}
