//! The diffusion runner: text encoding, batched denoising, chunked VAE decoding, for any [`DiffusionModel`].
//!
//! Owns: which sessions share a step, and the step: prediction and decoding; encoding is in `encoding`, what is done once
//! more in `mending`. A session's own way is in `session`. Does not know: any architecture, solver or VAE.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::Tensor;

use crate::diffusion::DiffusionRequest;
use crate::error::{Error, Result};
use crate::memory::MemoryPlan;
use crate::request::{ClientId, Event, Events, FinishReason, Phase, Request, SessionId, Usage};
use crate::runner::{Runner, RunnerStatus, StepPlan};
use crate::session_checkpoint::{Identity, SessionCheckpoint};

pub mod adapting;
pub mod batcher;
pub mod beside;
pub mod block_cache;
pub mod course;
mod denoising;
mod encoding;
pub mod inputs;
pub mod loading;
mod mending;
mod model;
pub mod narrow;
pub mod on_demand;
mod passes;
mod pixels;
pub mod previews;
pub mod retry;
mod row;
mod saving;
mod session;
mod skipping;
pub mod start;
#[cfg(test)]
mod tests;

use batcher::{Batch, Batcher, Layers, Load, MendKey, StepKey};
use beside::{DeviceBeside, RowBeside};
use block_cache::{BlockCache, RowCache};
use course::Expert;
use mending::Wide;
pub use model::DiffusionModel;
use narrow::are_finite;
use on_demand::OnDemand;
use passes::Passes;
pub(crate) use pixels::to_byte;
use retry::InF32;
pub use row::DenoiseRow;
use session::Session;

/// Most sessions that one runner holds, whatever memory there is.
pub const MAX_SESSIONS: usize = 256;

/// Drives the sessions of one diffusion model: one encoding of all prompts that wait, one batched prediction per
/// denoising step, one chunk of pixels per decoding step.
pub struct DiffusionRunner<M: DiffusionModel> {
    model: M,
    /// Where its text encoders are, if not on the device all the time.
    text_encoders: Option<OnDemand<M>>,
    /// A second device, which predicts negative branches while this one predicts positive ones.
    beside: Option<DeviceBeside>,
    /// Reads a second one where this one is too narrow.
    in_f32: Option<InF32<M>>,
    /// What was read or is being read in f32.
    wide: BTreeMap<MendKey, Wide<M>>,
    /// What it computes with; without it there are no checkpoints.
    identity: Option<Identity>,
    max_rows: usize,
    /// Whether frames are in its plans.
    keeps_frames: bool,
    /// Bytes that the device has for work beside all weights; `None` where nobody bounds them.
    room_bytes: Option<usize>,
    batcher: Batcher<M::Input>,
    passes: Passes<M>,
    sessions: HashMap<SessionId, Session<M>>,
    /// Members of the step under way; left standing when it fails, so that they can be evicted.
    in_step: Vec<SessionId>,
}

/// What becomes of a session after a step.
enum Outcome {
    GoesOn,
    Complete,
    Failed(Error),
}

impl<M: DiffusionModel> DiffusionRunner<M> {
    /// `max_denoise_rows`: most rows (sessions times guidance branches) of one prediction, at least 1.
    pub fn new(model: M, max_denoise_rows: usize) -> Self {
        let max_rows = max_denoise_rows.max(1);
        Self {
            model,
            text_encoders: None,
            beside: None,
            in_f32: None,
            wide: BTreeMap::new(),
            identity: None,
            max_rows,
            keeps_frames: false,
            room_bytes: None,
            batcher: Batcher::new(max_rows),
            passes: Passes::new(),
            sessions: HashMap::new(),
            in_step: Vec::new(),
        }
    }

    /// With the text encoders of another model, if they are not this one's.
    pub fn with_text_encoders(self, text_encoders: Option<OnDemand<M>>) -> Self {
        Self { text_encoders, ..self }
    }

    /// With a second device for guidance branches.
    pub fn with_device_beside(self, beside: Option<DeviceBeside>) -> Self {
        Self { beside, ..self }
    }

    /// Work that is not finite is done once more by the model that `in_f32` reads.
    pub fn retrying(self, in_f32: InF32<M>) -> Self {
        Self { in_f32: Some(in_f32), ..self }
    }

    /// Sessions can go on in another runner of the same identity.
    pub fn identified_as(self, identity: Option<Identity>) -> Self {
        Self { identity, ..self }
    }

    /// Whether frames lie in the memory that plans are of, which they do where the device is the CPU.
    pub fn keeping_frames(self, keeps_frames: bool) -> Self {
        Self { keeps_frames, ..self }
    }

    /// What a request takes with so many guidance branches in one pass.
    fn plan_of(&self, request: &DiffusionRequest, branches_at_once: usize) -> MemoryPlan {
        let adapters = self.model.adapters().map_or(0, |adapters| adapters.footprint_bytes(&request.loras));
        let frames = match self.keeps_frames {
            true => request.canvas.kept_frame_bytes(self.model.frames_under_way(request)),
            false => 0,
        };
        let plan = self.model.plan(request, branches_at_once).holding(adapters).holding_in(Phase::VaeDecode, frames);
        let plan = plan.of_branches_at_once(branches_at_once);
        match self.text_encoders.as_ref().map(OnDemand::bytes) {
            Some(encoders) => plan.holding_in(Phase::Encode, encoders).after(Phase::Load, encoders),
            None => plan,
        }
    }

    /// What a request takes: with all guidance branches in one pass, or one after the other where those do not fit and that
    /// is what they lack.
    fn plan_for(&self, request: &DiffusionRequest) -> MemoryPlan {
        let together = request.guidance.num_branches().min(self.max_rows);
        let plan = self.plan_of(request, together);
        let is_short = self.room_bytes.is_some_and(|room_bytes| plan.peak_bytes() > room_bytes);
        let apart = (is_short && together > 1).then(|| self.plan_of(request, 1));
        apart.filter(|apart| apart.peak_bytes() < plan.peak_bytes()).unwrap_or(plan)
    }

    /// A session of this request before its first step.
    fn begun(&self, client: ClientId, request: Request) -> Result<Session<M>> {
        let Request::Diffusion(request) = request else {
            return Err(Error::invalid("model", "makes pictures or clips, not text"));
        };
        if self.sessions.len() >= MAX_SESSIONS {
            return Err(Error::TooManySessions { limit: MAX_SESSIONS });
        }
        check(&self.model, &request)?;
        let branches_at_once = self.plan_for(&request).branches_at_once().expect(IS_PLANNED);
        Ok(Session::new(client, request, branches_at_once, &self.model))
    }

    fn take_in(&mut self, id: SessionId, session: Session<M>) {
        let previous = self.sessions.insert(id, session);
        assert!(previous.is_none(), "session ids are unique: this is a bug");
        self.enqueue(id);
    }

    /// The model that is driven.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// One denoising step of every member.
    fn denoise(&mut self, ids: &[SessionId], events: &mut Events) -> Result<()> {
        self.activate(Layers::Own, ids);
        let predictions = self.predict(ids)?;
        let finite = are_finite(&predictions)?;
        for ((id, prediction), is_finite) in ids.iter().zip(predictions).zip(finite) {
            let outcome = match is_finite {
                true => {
                    self.advance(*id, &prediction, events)?;
                    Outcome::GoesOn
                }
                // Whoever shares the step hears nothing of it.
                false => self.begin_mending(*id, Phase::Denoise),
            };
            self.settle(*id, outcome, events);
        }
        Ok(())
    }

    /// Takes a prediction one step on.
    fn advance(&mut self, id: SessionId, prediction: &Tensor, events: &mut Events) -> Result<()> {
        let session = self.session_mut(id);
        let preview = match session.denoising().due_preview(&session.request) {
            Some(index) => Some((index, session.denoising().predict_clean(prediction)?)),
            None => None,
        };
        let (done, total) = session.advance(prediction)?;
        events.emit(id, Event::Progress { phase: Phase::Denoise, done, total });
        if let Some((index, latents)) = preview {
            self.show(id, index, &latents, events);
        }
        Ok(())
    }

    /// Forgets a session; what it alone held is free afterwards.
    fn forget(&mut self, id: SessionId) -> bool {
        let was_there = self.sessions.remove(&id).is_some();
        if let Some(beside) = &mut self.beside {
            beside.forget(id);
        }
        self.release_passes();
        self.release_wide();
        self.release_text_encoders();
        self.release_adapters();
        was_there
    }

    /// A preview of latents. The image does not depend on it: a preview that cannot be made is left out.
    fn show(&self, id: SessionId, index: usize, latents: &Tensor, events: &mut Events) {
        let Some(previews) = self.model.previews() else { return };
        match previews.preview(latents, &self.session(id).request) {
            Ok(frame) => events.emit(id, Event::Preview { index, frame }),
            Err(error) => tracing::warn!(%error, "a preview could not be made"),
        }
    }

    /// The guided prediction of each session.
    fn predict(&mut self, ids: &[SessionId]) -> Result<Vec<Tensor>> {
        let mut caches: Vec<_> = ids.iter().map(|id| self.take_caches(*id)).collect();
        ids.iter().try_for_each(|id| self.begin_beside(*id))?;
        let sessions: Vec<&Session<M>> = ids.iter().map(|id| self.session(*id)).collect();
        // The members of a step have the same one.
        let expert = sessions[0].denoising().expert();
        let (mut rows, mut rows_beside, mut goes_beside) = (Vec::new(), Vec::new(), Vec::new());
        for (id, session) in ids.iter().zip(&sessions) {
            let is_shared = self.beside.is_some() && DeviceBeside::takes(&session.request);
            for (branch, row) in session.denoising().rows(&session.request).enumerate() {
                goes_beside.push(is_shared && branch > 0);
                match is_shared && branch > 0 {
                    true => rows_beside.push(RowBeside { session: *id, branch, row }),
                    false => rows.push(row),
                }
            }
        }
        let of_rows = sessions.iter().zip(&mut caches).flat_map(|(session, caches)| {
            let step = session.denoising().step();
            caches.iter_mut().take(session.num_rows()).map(move |cache| RowCache { cache, step })
        });
        let mut caches_of_rows: Vec<RowCache<'_>> = of_rows.collect();
        // Each session has reserved the work of as many rows as it has branches at once.
        let reserved: usize = sessions.iter().map(|session| session.branches_at_once).sum();
        let rows_at_once = reserved.min(self.max_rows);
        let beside = self.beside.as_ref().filter(|_| !rows_beside.is_empty());
        let coming = beside.map(|beside| beside.ask(expert, &rows_beside, rows_at_once)).transpose()?;
        let own = predict_in_passes(&self.model, expert, &rows, rows_at_once, &mut caches_of_rows)?;
        let others = match (beside, coming) {
            (Some(beside), Some(coming)) => beside.take(coming, rows_beside[0].row.latents.device())?,
            _ => Vec::new(),
        };
        let (mut own, mut others) = (own.into_iter(), others.into_iter());
        let mut predictions =
            goes_beside.into_iter().filter_map(|is_other| if is_other { others.next() } else { own.next() });
        let guided =
            sessions.iter().map(|session| session.denoising().guided(&mut predictions, &session.request)).collect();
        for (id, caches) in ids.iter().zip(caches) {
            self.session_mut(*id).denoising_mut().caches = caches;
        }
        guided
    }

    /// Lets the second device know of a session.
    fn begin_beside(&mut self, id: SessionId) -> Result<()> {
        let Self { beside: Some(beside), sessions, .. } = self else { return Ok(()) };
        beside.begin(id, &sessions.get(&id).expect(MEMBERS_EXIST).request)
    }

    /// The caches of a session, which it gets back after its step: rows are read while caches are written.
    fn take_caches(&mut self, id: SessionId) -> Vec<BlockCache> {
        std::mem::take(&mut self.session_mut(id).denoising_mut().caches)
    }

    /// The next chunk of pixels of one session. A chunk that is not finite sends it back to the first, in f32; frames that
    /// are out already are not sent again.
    fn decode(&mut self, id: SessionId, events: &mut Events) -> Result<()> {
        let session = self.sessions.get_mut(&id).expect(MEMBERS_EXIST);
        let wide = session.mend_key().and_then(|key| self.wide.get(&key)).and_then(Wide::model);
        let (frames, done) = session.decode_next(wide.unwrap_or(&self.model))?;
        let total = self.model.num_decode_steps(session.expert(), &session.request);
        let is_told = done <= session.told;
        let Some(frames) = frames else {
            let outcome = self.begin_mending(id, Phase::VaeDecode);
            self.settle(id, outcome, events);
            return Ok(());
        };
        if !is_told {
            if !frames.is_empty() {
                self.session_mut(id).frames_done += frames.len();
                events.emit(id, Event::Frames(frames));
            }
            events.emit(id, Event::Progress { phase: Phase::VaeDecode, done, total });
        }
        self.settle(id, if done < total { Outcome::GoesOn } else { Outcome::Complete }, events);
        Ok(())
    }

    /// Queues a session for its next step, or lets it go with its last event.
    fn settle(&mut self, id: SessionId, outcome: Outcome, events: &mut Events) {
        let last = match outcome {
            Outcome::GoesOn => return self.enqueue(id),
            Outcome::Complete => {
                let skipped_passes = self.session(id).skipped_passes;
                let usage = Usage { skipped_passes, ..Usage::default() };
                Event::Finished { reason: FinishReason::Complete, usage }
            }
            Outcome::Failed(error) => Event::Failed(error),
        };
        self.forget(id);
        events.emit(id, last);
    }

    fn enqueue(&mut self, id: SessionId) {
        self.share_adapters(id);
        let session = self.session(id);
        let key = self.step_key(id, session);
        // What is mended is done alone.
        let rows = if session.mending.is_some() { 0 } else { session.num_rows() };
        self.batcher.enqueue(id, session.client, key, rows);
    }

    /// What a session does next: wait for what is away, or what its stage says.
    fn step_key(&self, id: SessionId, session: &Session<M>) -> StepKey<M::Input> {
        if let Some(load) = self.missing(session) {
            return StepKey::Load(load);
        }
        match session.mend_key() {
            Some((_, Phase::Denoise)) => StepKey::Mend(id),
            _ => session.step_key(id, &self.model),
        }
    }

    /// What a session's next step needs and what is away: networks first, since terms are added to their layers.
    fn missing(&self, session: &Session<M>) -> Option<Load> {
        match session.mend_key() {
            Some(key) if self.wide_model(key).is_none() => Some(Load::InF32(key)),
            None if self.waits_for_encoders(session) => Some(Load::TextEncoders),
            _ => self.missing_adapters(session),
        }
    }

    fn announce(&mut self, events: &mut Events) {
        for id in &self.in_step {
            let session = self.sessions.get_mut(id).expect(MEMBERS_EXIST);
            if !std::mem::replace(&mut session.started, true) {
                events.emit(*id, Event::Started);
                if let Some(beside) = &mut self.beside {
                    // It encodes meanwhile. Where it has ended the first denoising step says so.
                    let _ = beside.begin(*id, &session.request);
                }
            }
        }
    }

    fn step_of(&self, batch: &Batch<M::Input>) -> StepPlan {
        let phase = batch.key.phase();
        let amount = match phase {
            Phase::Denoise => batch.sessions.iter().map(|id| self.session(*id).request.step_amount()).sum(),
            _ => 0.0,
        };
        StepPlan { phase, sessions: batch.sessions.len(), amount }
    }

    fn session(&self, id: SessionId) -> &Session<M> {
        self.sessions.get(&id).expect(MEMBERS_EXIST)
    }

    fn session_mut(&mut self, id: SessionId) -> &mut Session<M> {
        self.sessions.get_mut(&id).expect(MEMBERS_EXIST)
    }
}

const IS_PLANNED: &str = "the plan of a picture or clip says how many branches go at once: this is a bug";
const MEMBERS_EXIST: &str = "a queued session is a known session: this is a bug";

/// Predicts rows of one shape, at most `max_rows` in one forward pass: a guided session where one row is allowed is
/// computed one pass after the other. `caches` are those of the rows, or none.
fn predict_in_passes<M: DiffusionModel>(
    model: &M,
    expert: Expert,
    rows: &[DenoiseRow<'_, M::Conditioning>],
    max_rows: usize,
    caches: &mut [RowCache<'_>],
) -> Result<Vec<Tensor>> {
    let mut caches = caches.chunks_mut(max_rows);
    let mut predictions = Vec::with_capacity(rows.len());
    for pass in rows.chunks(max_rows) {
        let found = match caches.next() {
            None => model.predict(expert, pass)?,
            Some(caches) => model.cached_prediction().expect(IS_CACHED).predict_cached(expert, pass, caches)?,
        };
        assert_eq!(found.len(), pass.len(), "one prediction per row: this is a bug of the family");
        predictions.extend(found);
    }
    Ok(predictions)
}

const IS_CACHED: &str = "a card lets blocks be skipped where the family can: this is a bug";

/// Refuses what this model is not made for.
fn check<M: DiffusionModel>(model: &M, request: &DiffusionRequest) -> Result<()> {
    let unmet = [
        (request.edit.is_some() && model.image_start().is_none(), "image", "this model does not begin from a picture"),
        (
            request.references.is_some() && !model.card().has_ip_adapter,
            "reference_images",
            "this model follows no reference pictures",
        ),
        (request.refinement.is_some() && model.card().refiner.is_none(), "denoising_end", "this model has no refiner"),
    ];
    match unmet.into_iter().find(|(is_unmet, ..)| *is_unmet) {
        Some((_, field, problem)) => Err(Error::invalid(field, problem)),
        None => Ok(()),
    }
}

impl<M: DiffusionModel> Runner for DiffusionRunner<M> {
    fn plan(&self, request: &Request) -> MemoryPlan {
        match request {
            Request::Diffusion(request) => self.plan_for(request),
            Request::Text(_) => MemoryPlan::default(),
        }
    }

    fn submit_for(&mut self, client: ClientId, session: SessionId, request: Request) -> Result<()> {
        let new = self.begun(client, request)?;
        self.take_in(session, new);
        Ok(())
    }

    fn set_room(&mut self, bytes: usize) {
        self.room_bytes = Some(bytes);
    }

    fn max_sessions(&self) -> usize {
        MAX_SESSIONS
    }

    fn cancel(&mut self, session: SessionId) {
        self.batcher.remove(session);
        self.forget(session);
    }

    fn take_back(&mut self, id: SessionId) -> Option<Request> {
        let session = self.sessions.get(&id).filter(|session| !session.started)?;
        let request = session.request.clone();
        self.cancel(id);
        Some(Request::Diffusion(request))
    }

    fn pause(&mut self, session: SessionId) {
        if let Some(paused) = self.sessions.get_mut(&session) {
            paused.is_paused = true;
            self.batcher.remove(session);
        }
    }

    fn unpause(&mut self, session: SessionId) {
        if self.sessions.get_mut(&session).is_some_and(|paused| std::mem::take(&mut paused.is_paused)) {
            self.enqueue(session);
        }
    }

    fn checkpoint(&mut self, session: SessionId) -> Result<Option<Arc<SessionCheckpoint>>> {
        self.save(session)
    }

    fn resume_for(
        &mut self,
        client: ClientId,
        session: SessionId,
        request: Request,
        checkpoint: Arc<SessionCheckpoint>,
    ) -> Result<()> {
        let begun = self.begun(client, request)?;
        let resumed = self.resumed(begun, checkpoint)?;
        self.take_in(session, resumed);
        Ok(())
    }

    fn next(&self) -> Option<StepPlan> {
        let batch = self.batcher.peek()?;
        Some(self.step_of(&batch))
    }

    fn borrowed_bytes(&self) -> usize {
        self.mending_bytes()
    }

    fn evict_next(&mut self) -> Vec<SessionId> {
        let members = self.batcher.take().map_or(Vec::new(), |batch| batch.sessions);
        for id in &members {
            self.forget(*id);
        }
        members
    }

    fn collect(&mut self, events: &mut Events) -> Result<StepPlan> {
        let batch = self.batcher.take().expect("step is called when there is a next one: this is a bug");
        let plan = self.step_of(&batch);
        self.in_step.clone_from(&batch.sessions);
        self.announce(events);
        match batch.key {
            StepKey::Load(Load::TextEncoders) => self.load_text_encoders(&batch.sessions, events)?,
            StepKey::Load(Load::InF32(key)) => self.load_in_f32(key, &batch.sessions, events),
            StepKey::Load(Load::Adapters(layers, _)) => self.load_adapters(layers, &batch.sessions, events)?,
            StepKey::Encode(inputs) => self.begin_pass(&inputs.pass, &batch.sessions, events)?,
            StepKey::GoOnEncoding(pass, _) => self.advance_pass(pass, &batch.sessions, events)?,
            StepKey::Denoise(_) => self.denoise(&batch.sessions, events)?,
            StepKey::Mend(session) => self.mend_prediction(session, events)?,
            StepKey::VaeDecode(session) => self.decode(session, events)?,
        }
        self.in_step.clear();
        Ok(plan)
    }

    fn evict_step(&mut self) -> Vec<SessionId> {
        let mut members = std::mem::take(&mut self.in_step);
        // Those that ended within the step before it failed have had their last event.
        members.retain(|id| self.forget(*id));
        members.iter().for_each(|id| self.batcher.remove(*id));
        members
    }

    fn problem(&self) -> Option<Error> {
        self.beside.as_ref().and_then(DeviceBeside::problem)
    }

    fn status(&self) -> RunnerStatus {
        let running = self.sessions.values().filter(|session| session.started).count();
        RunnerStatus { running, waiting: self.sessions.len() - running, kv_blocks_used: 0, kv_blocks_total: 0 }
    }
}
