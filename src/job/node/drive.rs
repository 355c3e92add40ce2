//! Makes one job that this node has: follows the sessions of its parts, shows their previews, feeds frames to the encoder while later
//! ones are decoded, writes the end.
//!
//! Owns: the way from a claim to an end, and what of it is told to whom. Does not know: which job is next, when a lease ends.

use std::sync::Arc;
use std::time::Duration;

use tale_models::diffusion::DiffusionRequest;
use tale_models::diffusion::shots::assembly::Assembly;
use tale_models::request::{Frame, Phase};
use tale_models::session_checkpoint::SessionCheckpoint;
use tale_models::{ClientId, Event};
use tokio::sync::watch;
use tokio::time::Instant;

use super::prepare::{Prepared, Unprepared, prepare};
use super::saved::{Found, SaveError, Saving};
use super::{Control, Shared, client_of};
use crate::engine::{Engine, EngineError, MayBegin, Session, SubmitOptions};
use crate::job::encoder::{Encoder, FinishedClip};
use crate::job::failure::{Failure, INSUFFICIENT_STORAGE};
use crate::job::feed::{JobEvent, JobFeed};
use crate::job::preview::Preview;
use crate::job::result::ClipResult;
use crate::job::store::{JobRecord, Lease, Outcome, RecordState, Return, StoreError};
use crate::job::{Job, Progress};

/// How often a job's row hears how far it is.
const REPORT: Duration = Duration::from_millis(250);
/// Between two tries to write an end that the store did not take.
const AGAIN: Duration = Duration::from_millis(500);
/// Attempts at a job whose device or disk fails; others may do better.
const MAX_ATTEMPTS: u32 = 3;
/// How long a step may still take whose checkpoint is waited for when this process ends.
const LAST_CHECKPOINT: Duration = Duration::from_secs(5);
/// Until the next attempt.
const BACKOFF: Duration = Duration::from_secs(5);

/// How the work on a job ends.
enum End {
    Completed(FinishedClip, usize),
    Failed(Failure),
    Cancelled,
    /// Another node, or this one later, may do it.
    Returned(Return),
    /// It is no longer this node's.
    Lost,
    /// A session does not go on from its checkpoint; the job can begin anew.
    NotResumable,
}

/// A job that this node has, and what it is made with.
pub(super) struct Claim {
    pub(super) shared: Arc<Shared>,
    pub(super) engine: Engine,
    pub(super) lease: Lease,
    /// What the node is told of it.
    pub(super) told: watch::Receiver<Control>,
}

/// Makes the job of a claim, until its end or until the node is told otherwise.
pub(super) async fn drive(claim: Claim, record: JobRecord) {
    let (id, attempts) = (record.id, record.attempts);
    let checkpoint = record.checkpoint.clone();
    let job = match Job::of(record, &claim.shared.outputs) {
        Ok(job) => job,
        Err(error) => {
            tracing::error!(job = %id, %error, "a job cannot be made");
            let outcome = Outcome::Failed { code: "internal_error".into(), message: error.to_string() };
            return drop(claim.finish(outcome).await);
        }
    };
    let feed = claim.shared.feed(&job);
    let mut told = claim.told.clone();
    // A session that has begun is left with a checkpoint; what waits for its turn, its model or its pictures is left at once.
    let is_over = |control: &Control| match control {
        Control::Run => false,
        Control::HandOver => !claim.shared.is_begun(&claim.lease),
        Control::Cancel | Control::Lost => true,
    };
    let stopped = async {
        let _ = told.wait_for(is_over).await;
        *told.borrow()
    };
    let begun = Instant::now();
    let end = tokio::select! {
        // Dropping the work stops the device and the encoder.
        control = stopped => match control {
            Control::Cancel => End::Cancelled,
            Control::HandOver => End::Returned(Return::HandOver),
            Control::Run | Control::Lost => End::Lost,
        },
        end = claim.make(&job, &feed, checkpoint.as_deref()) => end,
    };
    let end = match end {
        End::Failed(failure) if claim.may_try_again(&failure, attempts) => {
            tracing::warn!(job = %id, attempts, code = %failure.code, "a job is tried again");
            End::Returned(Return::Retry(BACKOFF))
        }
        end => end,
    };
    claim.conclude(&feed, end, begun).await;
}

impl Claim {
    /// Whether another attempt may do better than one that failed.
    fn may_try_again(&self, failure: &Failure, attempts: u32) -> bool {
        let is_transient = match self.shared.is_durable {
            true => failure.code == INSUFFICIENT_STORAGE || failure.is_of_device,
            // What is in memory has one device more only where another one has failed.
            false => failure.is_of_device && self.engine.status().devices.iter().any(|device| !device.alive),
        };
        is_transient && attempts < MAX_ATTEMPTS
    }

    /// Writes the end of the job.
    async fn conclude(&self, feed: &JobFeed, end: End, begun: Instant) {
        let Self { shared, lease, .. } = self;
        let (outcome, clip) = match end {
            End::Lost | End::NotResumable => {
                // Somebody has removed it, maybe while this node still wrote.
                if matches!(shared.store.get(lease.id).await, Err(StoreError::Unknown)) {
                    shared.forget_objects(lease.id).await;
                }
                return;
            }
            End::Returned(why) => {
                if let Err(error) = shared.store.give_back(lease, why).await {
                    tracing::warn!(job = %lease.id, %error, "a job was not given back; it is when its lease ends");
                }
                return;
            }
            End::Completed(clip, skipped_passes) => {
                let result = ClipResult::new(&clip.files, skipped_passes).to_text();
                let file_bytes = clip.files.total_bytes();
                let cost_seconds = Some(begun.elapsed().as_secs_f64());
                (Outcome::Completed { result, file_bytes, cost_seconds }, Some(clip))
            }
            End::Failed(Failure { code, message, .. }) => (Outcome::Failed { code: code.into(), message }, None),
            End::Cancelled => (Outcome::Cancelled, None),
        };
        match self.finish(outcome).await {
            Ok(record) => {
                if let Some(mut clip) = clip {
                    clip.is_claimed = true;
                }
                match &record.state {
                    RecordState::Completed { .. } => shared.forget_objects(lease.id).await,
                    RecordState::Cancelled => shared.forget_work(lease.id).await,
                    // It may be tried again from where it came to.
                    _ => (),
                }
                if let Ok(job) = Job::of(record, &shared.outputs) {
                    feed.catch_up(&job);
                }
            }
            // The file has no owner and goes.
            Err(error) => tracing::warn!(job = %lease.id, %error, "the end of a job could not be written"),
        }
    }

    /// Writes an outcome, again and again while the store does not answer and the job is this node's.
    async fn finish(&self, outcome: Outcome) -> Result<JobRecord, StoreError> {
        let Self { shared, lease, told, .. } = self;
        let mut is_unsure = false;
        loop {
            let error = match shared.store.finish(lease, outcome.clone()).await {
                Ok(record) => return Ok(record),
                Err(error) => error,
            };
            match error {
                StoreError::Unavailable(_) | StoreError::DiskFull if *told.borrow() != Control::Lost => {
                    tracing::warn!(job = %lease.id, %error, "the end of a job is written again in a moment");
                    is_unsure = true;
                    tokio::time::sleep(AGAIN).await;
                }
                // An earlier try may have been taken although its answer was lost.
                StoreError::Fenced if is_unsure => return self.written(&outcome).await.ok_or(error),
                error => return Err(error),
            }
        }
    }

    /// The row, if it says what this node wrote.
    async fn written(&self, outcome: &Outcome) -> Option<JobRecord> {
        let record = self.shared.store.get(self.lease.id).await.ok()?;
        let is_ours = match (&record.state, outcome) {
            // Names of files are of this claim alone.
            (RecordState::Completed { result: found, .. }, Outcome::Completed { result, .. }) => found == result,
            _ => false,
        };
        is_ours.then_some(record)
    }

    /// Makes the clip, from its checkpoint on where that is of use, else from its beginning.
    async fn make(&self, job: &Job, feed: &JobFeed, checkpoint: Option<&str>) -> End {
        let (mut saving, mut found) = Saving::begin(&self.shared, &self.lease, checkpoint).await;
        loop {
            match self.make_from(job, feed, &mut saving, found.take()).await {
                End::NotResumable => saving.begin_anew(),
                end => return end,
            }
        }
    }

    async fn make_from(&self, job: &Job, feed: &JobFeed, saving: &mut Saving, found: Option<Found>) -> End {
        let shared = &self.shared;
        let client = client_of(&job.owner);
        let model = match self.engine.ask_and_wait(&job.model, client).await {
            Ok(model) => model,
            Err(error) => {
                tracing::info!(job = %job.id, %error, "a job waits for its model");
                shared.rest(&job.model);
                return End::Returned(Return::HandOver);
            }
        };
        let Prepared { request, before } = match prepare(shared, model.card(), job).await {
            Ok(prepared) => prepared,
            Err(Unprepared::Failed(failure)) => return End::Failed(failure),
            Err(Unprepared::Later(reason)) => {
                tracing::warn!(job = %job.id, reason, "a job cannot be made now");
                return End::Returned(Return::Retry(BACKOFF));
            }
        };
        drop(model);
        let assembly = match before {
            Some(_) => Assembly::going_on(request),
            None => Assembly::new(request),
        };
        let path = shared.outputs.file(job.id, self.lease.epoch, job.spec.file.encoding.format());
        let encoder = Encoder::new(job, path, before);
        let (reports, reported) = watch::channel(Report { has_started: job.started.is_some(), progress: None });
        let reporter = report(shared.clone(), self.lease.clone(), reported);
        let mut work = Work {
            claim: self,
            client,
            job,
            feed,
            saving,
            encoder,
            assembly,
            reports,
            pace: Pace::default(),
            num_previews: 0,
            skipped_passes: 0,
            leaves_at: None,
        };
        tokio::select! {
            made = work.follow(found) => match made {
                Ok(clip) => End::Completed(clip, work.skipped_passes),
                Err(end) => end,
            },
            end = reporter => end,
        }
    }
}

/// What a row is to hear.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Report {
    has_started: bool,
    progress: Option<Progress>,
}

/// Writes how far a job is into its row, now and then; ends only where it is no longer this node's.
async fn report(shared: Arc<Shared>, lease: Lease, mut reports: watch::Receiver<Report>) -> End {
    let mut has_started = reports.borrow().has_started;
    let mut written = None;
    while reports.changed().await.is_ok() {
        let Report { has_started: starts, progress } = *reports.borrow_and_update();
        let wrote = async {
            if starts && !has_started {
                shared.store.start(&lease).await?;
                has_started = true;
            }
            if let Some(progress) = progress.filter(|progress| Some(*progress) != written) {
                shared.store.progress(&lease, &progress.to_text()).await?;
                written = Some(progress);
            }
            Ok(())
        };
        match wrote.await {
            Err(StoreError::Fenced) => return End::Lost,
            // The next report says more; the lease has its own watch.
            Err(error) => tracing::debug!(job = %lease.id, %error, "progress was not written"),
            Ok(()) => (),
        }
        tokio::time::sleep(REPORT).await;
    }
    // The work has ended, which says how.
    std::future::pending().await
}

struct Work<'a> {
    claim: &'a Claim,
    client: ClientId,
    job: &'a Job,
    feed: &'a JobFeed,
    saving: &'a mut Saving,
    encoder: Encoder,
    assembly: Assembly,
    reports: watch::Sender<Report>,
    pace: Pace,
    num_previews: usize,
    skipped_passes: usize,
    /// When the job is left for another node, whether there is a checkpoint of this moment or not.
    leaves_at: Option<Instant>,
}

impl Work<'_> {
    async fn follow(&mut self, found: Option<Found>) -> Result<FinishedClip, End> {
        let resume = match found {
            Some(found) => self.catch_up(found).await?,
            None => None,
        };
        let mut session = self.begin(self.assembly.part_request(), resume)?;
        while self.follow_part(&mut session).await? {
            let Some(request) = self.assembly.next_part() else { break };
            self.encoder.rest();
            if self.claim.shared.is_durable {
                let saved = self.saving.next_part(self.skipped_passes, self.num_previews).await;
                self.check_saved(saved)?;
            }
            session = self.begin(request, None)?;
        }
        self.encoder.finish().await.map_err(End::Failed)
    }

    /// Takes frames that were kept as if they came now, and gives the checkpoint of the session that makes the next ones.
    async fn catch_up(&mut self, found: Found) -> Result<Option<Arc<SessionCheckpoint>>, End> {
        let Found { part, session, frames, skipped_passes, num_previews } = found;
        (self.skipped_passes, self.num_previews) = (skipped_passes, num_previews);
        tracing::info!(job = %self.job.id, part, frames = frames.len(), "a job goes on from its checkpoint");
        for (of, frames) in frames {
            self.go_to(of)?;
            if !self.encoder.push(self.assembly.push(frames)).await {
                return self.encoder.finish().await.map(|_| None).map_err(End::Failed);
            }
        }
        self.go_to(part)?;
        Ok(session)
    }

    fn go_to(&mut self, part: usize) -> Result<(), End> {
        while self.assembly.position().0 < part {
            // A checkpoint of more parts than there are.
            self.assembly.next_part().ok_or(End::NotResumable)?;
        }
        Ok(())
    }

    /// Begins the session of a part. A job that has waited begins only if its clip can still be written.
    fn begin(&self, request: DiffusionRequest, resume: Option<Arc<SessionCheckpoint>>) -> Result<Session, End> {
        let outputs = self.claim.shared.outputs.clone();
        let may_begin = Some(MayBegin::when(move || outputs.problem().is_none()));
        let options = SubmitOptions { may_begin, checkpoints: self.claim.shared.is_durable, resume };
        let part = tale_models::Request::Diffusion(request);
        let session = self.claim.engine.submit_further(&self.job.model, self.client, part, options);
        session.map_err(|error| match error {
            EngineError::Draining if !self.claim.shared.is_durable => End::Failed(Failure::shutdown()),
            EngineError::Draining | EngineError::NotLoaded { .. } => End::Returned(Return::HandOver),
            error => End::Failed(Failure::of_engine(&error)),
        })
    }

    /// Whether the part came to its end; else the encoder did.
    async fn follow_part(&mut self, session: &mut Session) -> Result<bool, End> {
        let mut last_progress = Progress::default();
        loop {
            let event = tokio::select! {
                event = session.recv() => event,
                () = is_to_leave(self.claim.told.clone(), self.leaves_at) => {
                    self.leave(session)?;
                    continue;
                }
            };
            match event {
                Some(Event::Started) => self.started(),
                Some(Event::Progress { phase, done, total }) => {
                    let part = self.assembly.position();
                    let progress = self.pace.progress(phase, part, done, total, Instant::now());
                    last_progress = progress;
                    self.feed.push(JobEvent::Progress(progress));
                    self.reports.send_modify(|report| report.progress = Some(progress));
                }
                Some(Event::Frames(frames)) => {
                    if self.claim.shared.is_durable {
                        let saved = self.saving.frames(&frames).await;
                        self.check_saved(saved.map_err(SaveError::from))?;
                    }
                    // An encoder that has failed takes no more; `finish` hears why, and the device need not go on.
                    if !self.encoder.push(self.assembly.push(frames)).await {
                        return Ok(false);
                    }
                }
                Some(Event::Checkpoint(checkpoint)) => self.save(&checkpoint).await?,
                Some(Event::Finished { usage, .. }) => {
                    self.skipped_passes += usage.skipped_passes;
                    return Ok(true);
                }
                Some(Event::Failed(tale_models::Error::NotResumable(refusal))) => {
                    tracing::warn!(job = %self.job.id, %refusal, "a job begins anew");
                    return Err(End::NotResumable);
                }
                Some(Event::Failed(tale_models::Error::HandedOver)) => return Err(self.cut_off()),
                Some(Event::Failed(error)) => return Err(End::Failed(Failure::of(&error))),
                Some(Event::Preview { frame, .. }) => self.show(frame, last_progress).await,
                Some(Event::Prompt(_) | Event::Text { .. }) => {
                    return Err(End::Failed(Failure::internal("a clip model answered with text")));
                }
                None => return Err(self.cut_off()),
            }
        }
    }

    /// Asks for a last checkpoint; the second time the job is left without one.
    fn leave(&mut self, session: &Session) -> Result<(), End> {
        if self.leaves_at.is_some() {
            return Err(End::Returned(Return::HandOver));
        }
        self.leaves_at = Some(Instant::now() + LAST_CHECKPOINT);
        session.checkpoint_now();
        Ok(())
    }

    async fn save(&mut self, checkpoint: &SessionCheckpoint) -> Result<(), End> {
        if self.leaves_at.is_none() && self.saving.is_too_soon() {
            return Ok(());
        }
        let saved = self.saving.session(checkpoint, self.skipped_passes, self.num_previews).await;
        self.check_saved(saved)?;
        match self.leaves_at {
            Some(_) => Err(End::Returned(Return::HandOver)),
            None => Ok(()),
        }
    }

    /// A checkpoint that was not kept ends nothing: there is the one before, or the beginning.
    fn check_saved(&self, saved: Result<(), SaveError>) -> Result<(), End> {
        match saved {
            Ok(()) => Ok(()),
            Err(SaveError::Store(StoreError::Fenced)) => Err(End::Lost),
            Err(error) => {
                tracing::warn!(job = %self.job.id, %error, "a checkpoint was not kept");
                Ok(())
            }
        }
    }

    fn started(&self) {
        self.claim.shared.has_begun(self.job.id);
        if !self.feed.has_started() {
            self.feed.push(JobEvent::Started);
        }
        self.reports.send_modify(|report| report.has_started = true);
    }

    /// Adds a preview to the events. The clip does not depend on it: one that cannot be encoded now is left out.
    async fn show(&mut self, frame: Frame, progress: Progress) {
        // Sessions count from 0 in each part.
        let index = self.num_previews;
        let num_bytes = frame.rgb.len();
        match self.claim.shared.compute.run(num_bytes, move |_| Preview::new(index, progress, &frame)).await {
            Ok(Ok(preview)) => {
                self.num_previews += 1;
                self.feed.push(JobEvent::Preview(preview));
            }
            Ok(Err(error)) => tracing::warn!(%error, "a preview could not be encoded"),
            Err(error) => tracing::warn!(%error, "a preview was left out"),
        }
    }

    /// Why a session ends without an end: its turn found no room for the clip, or there are no turns any more.
    fn cut_off(&self) -> End {
        match self.claim.shared.outputs.problem() {
            Some(problem) => End::Failed(Failure::insufficient_storage(&problem)),
            None if self.claim.shared.is_durable => End::Returned(Return::HandOver),
            None => End::Failed(Failure::shutdown()),
        }
    }
}

/// Waits until the job is to be left for another node, and, once that has begun, until it must be.
async fn is_to_leave(mut told: watch::Receiver<Control>, leaves_at: Option<Instant>) {
    match leaves_at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => drop(told.wait_for(|control| *control == Control::HandOver).await),
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
