//! A client's order that outlives its HTTP request: identity, what it asks for, how far it is.
//!
//! A job is queued, then in progress, then exactly one of completed, failed and cancelled. Where jobs live, and who may write them when, is
//! a [`store::JobStore`]'s business; a [`node::Node`] works them off.
//! Does not know: HTTP, wire types.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tale_models::request::Phase;
use uuid::Uuid;

use self::failure::Failure;
use self::files::ClipFiles;
use self::output::OutputDir;
use self::result::ClipResult;
use self::spec::{BadSpec, ClipSpec};
use self::store::{JobRecord, Priority, RecordState};

pub mod encoder;
pub mod failure;
pub mod feed;
pub mod files;
pub mod node;
pub mod objects;
pub mod output;
pub mod preview;
mod result;
pub mod spec;
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

    /// When the name was made, by the clock of the machine that made it.
    pub fn made(self) -> Option<SystemTime> {
        let (seconds, nanoseconds) = self.uuid.get_timestamp()?.to_unix();
        SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds))
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

/// A clip that is ordered, as it stands.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its name.
    pub id: JobId,
    /// Whose it is.
    pub owner: String,
    /// The model that makes it.
    pub model: String,
    /// How urgent.
    pub priority: Priority,
    /// What was asked for.
    pub spec: Arc<ClipSpec>,
    /// When it was ordered.
    pub created: SystemTime,
    /// When the device began.
    pub started: Option<SystemTime>,
    /// When the state became terminal.
    pub ended: Option<SystemTime>,
    /// When it fails if it has not ended.
    pub deadline: Option<SystemTime>,
    /// How often it was begun anew.
    pub attempts: u32,
    /// Where it stands.
    pub state: JobState,
    /// How far it is.
    pub progress: Progress,
    /// Predictions that a cache took from ones before them, in all of its parts; once it is completed.
    pub skipped_passes: usize,
}

/// Where a job stands.
#[derive(Debug, Clone, PartialEq)]
pub enum JobState {
    /// Nothing is computed yet.
    Queued,
    /// A device works on it, or its file is being written.
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

#[derive(Serialize, Deserialize)]
struct ProgressText {
    phase: Option<String>,
    done: usize,
    total: usize,
    percent: u8,
    eta_seconds: Option<f64>,
}

impl Progress {
    /// The text of a row.
    pub fn to_text(&self) -> String {
        let Self { phase, done, total, percent, eta } = *self;
        let phase = phase.map(|phase| phase.as_str().to_owned());
        let text = ProgressText { phase, done, total, percent, eta_seconds: eta.map(|eta| eta.as_secs_f64()) };
        serde_json::to_string(&text).expect("numbers and text are always JSON: this is a bug")
    }

    /// Reads the text of a row. A phase that is not known is none.
    pub fn from_text(text: &str) -> serde_json::Result<Self> {
        let ProgressText { phase, done, total, percent, eta_seconds } = serde_json::from_str(text)?;
        let phase = phase.and_then(|name| Phase::ALL.into_iter().find(|phase| phase.as_str() == name));
        let eta = eta_seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        Ok(Self { phase, done, total, percent, eta })
    }

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
    /// What a row says; files lie in `outputs`.
    pub fn of(record: JobRecord, outputs: &OutputDir) -> Result<Self, BadSpec> {
        let damaged = |error: serde_json::Error| BadSpec::Damaged(error.to_string());
        let spec = ClipSpec::from_text(&record.spec)?;
        let progress = record.progress.as_deref().map(Progress::from_text).transpose().map_err(damaged)?;
        let mut progress = progress.unwrap_or_default();
        let mut skipped_passes = 0;
        let state = match record.state {
            // A node that has it may not have begun.
            RecordState::Running { .. } if record.started.is_none() => JobState::Queued,
            RecordState::Queued if record.started.is_none() => JobState::Queued,
            // It goes from one node to another.
            RecordState::Running { .. } | RecordState::Queued => JobState::InProgress,
            RecordState::Completed { result, .. } => {
                let result = ClipResult::from_text(&result).map_err(damaged)?;
                skipped_passes = result.skipped_passes;
                JobState::Completed(result.files(outputs))
            }
            RecordState::Failed { code, message } => {
                JobState::Failed(Failure { code: code.into(), message, is_of_device: false })
            }
            RecordState::Cancelled => JobState::Cancelled,
        };
        if state.is_terminal() {
            progress.eta = None;
        }
        if matches!(state, JobState::Completed(_)) {
            progress.percent = 100;
        }
        Ok(Self {
            id: record.id,
            owner: record.owner,
            model: record.model,
            priority: record.priority,
            spec: Arc::new(spec),
            created: record.created,
            started: record.started,
            ended: record.ended,
            deadline: record.deadline,
            attempts: record.attempts,
            state,
            progress,
            skipped_passes,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use tale_models::diffusion::{Canvas, DiffusionRequest, Prompt, Sampling};
    use tale_models::solver::names::Scheduler;

    use crate::job::preview::Preview;
    use crate::media::{ClipFormat, ClipSettings, Encoding};

    pub(crate) fn spec() -> ClipSpec {
        let request = request();
        let file = ClipSettings::new(Encoding::usual(ClipFormat::Mp4), request.canvas.fps);
        ClipSpec::new("clips", &request, file, true)
    }

    pub(crate) fn request() -> DiffusionRequest {
        let prompt = Prompt { text: "a boat".into(), max_sequence_length: 8 };
        let canvas = Canvas { width: 32, height: 32, num_frames: 9, fps: 8 };
        let scheduler = Scheduler::named("flow_euler").unwrap();
        DiffusionRequest::new(prompt, canvas, Sampling::new(scheduler, 4, 0))
    }

    pub(crate) fn preview(bytes: usize) -> Preview {
        Preview { index: 0, progress: Progress::default(), size: (1, 1), bytes: vec![0; bytes].into() }
    }

    #[test]
    fn names_can_be_read_back_and_sort_by_time() {
        let (a, b) = (JobId::generate(JobKind::Video), JobId::generate(JobKind::Image));
        assert!(a < b);
        let made = a.made().expect("names have a time");
        assert!(SystemTime::now().duration_since(made).is_ok_and(|age| age < Duration::from_secs(60)));
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

    #[test]
    fn progress_of_a_row_is_what_was_said() {
        let said = Progress::new(Phase::Denoise, 3, 10, Some((1, Duration::from_secs(4))));
        assert_eq!(Progress::from_text(&said.to_text()).expect("our own"), said);
        assert_eq!(Progress::from_text(&Progress::default().to_text()).expect("our own"), Progress::default());
    }
}
