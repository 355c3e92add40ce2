//! The diffusion runner: text encoding, batched denoising, chunked VAE decoding, for any [`DiffusionModel`].
//!
//! Owns: which sessions share a step, and the step: encoding, prediction, decoding, what is done once more. A session's own
//! way is in `session`. Does not know: any architecture, solver or VAE.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::Tensor;

use crate::device::give_back_freed_memory;
use crate::diffusion::DiffusionRequest;
use crate::error::{Error, Result};
use crate::memory::MemoryPlan;
use crate::request::{Event, Events, FinishReason, Phase, Request, SessionId, Usage};
use crate::runner::{Runner, RunnerStatus, StepPlan};
use crate::vae::Posterior;

pub mod batcher;
pub mod block_cache;
mod model;
pub mod on_demand;
mod pixels;
pub mod previews;
pub mod references;
pub mod retry;
mod session;
pub mod start;
#[cfg(test)]
mod tests;

use batcher::{Batcher, Input, MAX_ENCODE_ROWS, Network, Prompts, ReferenceInput, StepKey, distinct_texts};
use block_cache::BlockCache;
pub use model::{DenoiseRow, DiffusionModel, PictureModel};
use on_demand::OnDemand;
pub(crate) use pixels::to_byte;
use pixels::to_frames;
use references::ReferenceTokens;
use retry::{InF32, are_finite};
use session::{Session, Stage};

/// Most sessions that one runner holds, whatever memory there is.
pub const MAX_SESSIONS: usize = 256;

/// Drives the sessions of one diffusion model: one encoding of all prompts that wait, one batched prediction per
/// denoising step, one chunk of pixels per decoding step.
pub struct DiffusionRunner<M: DiffusionModel> {
    model: M,
    /// Where its text encoders are, if not on the device all the time.
    text_encoders: Option<OnDemand<M>>,
    /// Reads a second one where this one is too narrow.
    in_f32: Option<InF32<M>>,
    /// The same for its refiner.
    refiner_in_f32: Option<InF32<M>>,
    max_rows: usize,
    batcher: Batcher,
    sessions: HashMap<SessionId, Session<M>>,
    /// Members of the step under way; left standing when it fails, so that they can be evicted.
    in_step: Vec<SessionId>,
}

/// Whose networks these are.
fn model_of<M: DiffusionModel>(model: &M, network: Network) -> &M {
    match network {
        Network::Base => model,
        Network::Refiner => {
            model.refiner().expect("a request for a refiner was refused where there is none: this is a bug")
        }
    }
}

/// What became of the inputs of a step, shared by the sessions that waited for them.
enum EncodedInputs<C> {
    /// By text.
    Prompts(HashMap<Option<String>, Arc<C>>),
    Picture(Arc<Posterior>),
    References(Arc<ReferenceTokens>),
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
            in_f32: None,
            refiner_in_f32: None,
            max_rows,
            batcher: Batcher::new(max_rows),
            sessions: HashMap::new(),
            in_step: Vec::new(),
        }
    }

    /// With the text encoders of another model, if they are not this one's.
    pub fn with_text_encoders(self, text_encoders: Option<OnDemand<M>>) -> Self {
        Self { text_encoders, ..self }
    }

    /// Work that is not finite is done once more by the model that `in_f32` reads.
    pub fn retrying(self, in_f32: InF32<M>) -> Self {
        Self { in_f32: Some(in_f32), ..self }
    }

    /// The same for work of the refiner.
    pub fn retrying_refiner(self, in_f32: InF32<M>) -> Self {
        Self { refiner_in_f32: Some(in_f32), ..self }
    }

    /// The model that is driven.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The texts of all members in one pass, or a picture for all that wait for it.
    fn encode(&mut self, input: &Input, ids: &[SessionId], events: &mut Events) -> Result<()> {
        let results = match input {
            Input::Prompts(prompts) => {
                match &mut self.text_encoders {
                    None => self.activate(ids)?,
                    Some(text_encoders) => {
                        text_encoders.fetch()?;
                        self.activate_in_text_encoders(ids)?;
                    }
                }
                EncodedInputs::Prompts(self.encode_prompts(prompts.network, ids)?)
            }
            // The VAE takes no adapters, and sessions with other ones may share its work.
            Input::Picture(input) => {
                let family = self.model.picture_model().expect(PICTURES_ARE_TAKEN);
                EncodedInputs::Picture(Arc::new(family.encode_picture(input)?))
            }
            Input::References(ReferenceInput { pictures, guided }) => {
                let family = self.model.reference_model().expect(PICTURES_ARE_TAKEN);
                EncodedInputs::References(Arc::new(family.encode(pictures, *guided)?))
            }
        };
        for id in ids {
            let session = self.sessions.get_mut(id).expect(MEMBERS_EXIST);
            let (done, total) = session.take_encoded(&results);
            if session.next_input().is_none() {
                session.begin_denoising(&self.model)?;
            }
            events.emit(*id, Event::Progress { phase: input.phase(), done, total });
            self.settle(*id, Outcome::GoesOn, events);
        }
        self.release_text_encoders();
        Ok(())
    }

    /// What the members' texts become, each of them once.
    fn encode_prompts(
        &self,
        network: Network,
        ids: &[SessionId],
    ) -> Result<HashMap<Option<String>, Arc<M::Conditioning>>> {
        let encoding = self.text_encoders.as_ref().map_or(&self.model, OnDemand::model);
        let (model, request) = (model_of(encoding, network), &self.session(ids[0]).request);
        let texts = distinct_texts(self.prompts(ids));
        let mut found = HashMap::new();
        // A lone session may have more of them than a pass takes.
        for pass in texts.chunks(MAX_ENCODE_ROWS) {
            let encoded = model.encode(pass, request)?;
            assert_eq!(encoded.len(), pass.len(), "one answer per text: this is a bug of the family");
            found.extend(pass.iter().map(|text| Some((*text).to_owned())).zip(encoded.into_iter().map(Arc::new)));
        }
        if self.prompts(ids).any(|prompts| prompts.texts.contains(&None)) {
            found.insert(None, Arc::new(model_of(&self.model, network).encode_absent(request)?));
        }
        Ok(found)
    }

    /// The texts that these sessions wait for.
    fn prompts(&self, ids: &[SessionId]) -> impl Iterator<Item = &Prompts> {
        ids.iter().filter_map(|id| match self.session(*id).next_input() {
            Some(Input::Prompts(prompts)) => Some(prompts),
            _ => None,
        })
    }

    /// One denoising step of every member.
    fn denoise(&mut self, ids: &[SessionId], events: &mut Events) -> Result<()> {
        self.activate(ids)?;
        let predictions = self.predict(ids)?;
        let predictions = self.mended(ids, predictions)?;
        for (id, prediction) in ids.iter().zip(predictions) {
            let outcome = match prediction {
                Err(error) => Outcome::Failed(error),
                Ok(prediction) => {
                    let session = self.session_mut(*id);
                    let preview = match session.due_preview() {
                        Some(index) => Some((index, session.predict_clean(&prediction)?)),
                        None => None,
                    };
                    let (done, total) = session.advance(&prediction)?;
                    events.emit(*id, Event::Progress { phase: Phase::Denoise, done, total });
                    if let Some(preview) = preview {
                        self.show(*id, preview, events);
                    }
                    Outcome::GoesOn
                }
            };
            self.settle(*id, outcome, events);
        }
        Ok(())
    }

    /// Puts the terms of these sessions into the model's layers: the members of a step have the same ones.
    fn activate(&mut self, ids: &[SessionId]) -> Result<()> {
        let Some(adapters) = self.model.adapters() else { return Ok(()) };
        let set = adapters.prepare(&self.session(ids[0]).request.loras)?;
        adapters.activate(set.as_ref());
        for id in ids {
            self.sessions.get_mut(id).expect(MEMBERS_EXIST).adapters.clone_from(&set);
        }
        Ok(())
    }

    /// The same for text encoders that come and go, whose layers are not the model's.
    fn activate_in_text_encoders(&self, ids: &[SessionId]) -> Result<()> {
        let adapters = self.text_encoders.as_ref().and_then(|encoders| encoders.model().adapters());
        if let Some(adapters) = adapters {
            adapters.activate(adapters.prepare(&self.session(ids[0]).request.loras)?.as_ref());
        }
        Ok(())
    }

    /// Lets text encoders go that nobody waits for: whoever does has their bytes reserved.
    fn release_text_encoders(&mut self) {
        let is_awaited = |session: &Session<M>| matches!(session.next_input(), Some(Input::Prompts(_)));
        if let Some(text_encoders) = &mut self.text_encoders
            && !self.sessions.values().any(is_awaited)
        {
            text_encoders.release();
        }
    }

    /// Forgets a session; what it alone held is free afterwards.
    fn forget(&mut self, id: SessionId) -> bool {
        let was_there = self.sessions.remove(&id).is_some();
        self.release_text_encoders();
        if let Some(adapters) = self.model.adapters() {
            adapters.release_unused();
        }
        was_there
    }

    /// Predictions that are not finite are made once more in f32; where that does not help either, they are the errors of
    /// their sessions, and of those alone.
    fn mended(&mut self, ids: &[SessionId], predictions: Vec<Tensor>) -> Result<Vec<Result<Tensor>>> {
        let finite = are_finite(&predictions)?;
        let broken: Vec<SessionId> =
            ids.iter().zip(&finite).filter(|(_, finite)| !**finite).map(|(id, _)| *id).collect();
        let again = self.predict_in_f32(&broken);
        if !broken.is_empty() {
            give_back_freed_memory();
        }
        let mut again = again.into_iter();
        let mended = predictions.into_iter().zip(finite).map(|(prediction, finite)| match finite {
            true => Ok(prediction),
            false => again.next().expect("one for each that is broken: this is a bug"),
        });
        Ok(mended.collect())
    }

    fn predict_in_f32(&mut self, ids: &[SessionId]) -> Vec<Result<Tensor>> {
        // The one with the most rows needs the most memory.
        let Some(largest) = ids.iter().max_by_key(|id| self.session(**id).num_rows()) else { return Vec::new() };
        let request = &self.session(*largest).request;
        let network = self.session(*largest).network();
        let model = self.read_in_f32(network, Phase::Denoise, request).and_then(|model| {
            // The members of a step have the same ones.
            if let Some(adapters) = model.adapters().filter(|_| network == Network::Base) {
                adapters.activate(adapters.prepare(&request.loras)?.as_ref());
            }
            Ok(model)
        });
        let model = match model {
            Ok(model) => model,
            Err(error) => return ids.iter().map(|_| Err(error.restate())).collect(),
        };
        ids.iter()
            .map(|id| {
                // What is kept may be what is not finite.
                self.session_mut(*id).denoising_mut().caches.iter_mut().for_each(BlockCache::forget);
                self.session(*id).predict_alone(&model, self.max_rows)
            })
            .collect()
    }

    /// A model whose networks of `phase` compute in f32; an error where this one's do so already.
    fn read_in_f32(&self, network: Network, phase: Phase, request: &DiffusionRequest) -> Result<M> {
        let components = model_of(&self.model, network).narrow_components(phase);
        let in_f32 = match network {
            Network::Base => &self.in_f32,
            Network::Refiner => &self.refiner_in_f32,
        };
        match in_f32 {
            Some(read) if !components.is_empty() => {
                tracing::warn!(phase = phase.as_str(), "a value is not finite; computing once more in f32");
                read(components, phase, request)
            }
            _ => Err(Error::NotFinite { phase: phase.as_str() }),
        }
    }

    /// A preview by its number and the latents that it is of. The picture does not depend on it: a preview that cannot be
    /// made is left out.
    fn show(&self, id: SessionId, (index, latents): (usize, Tensor), events: &mut Events) {
        match self.model.preview(&latents, &self.session(id).request) {
            Ok(Some(frame)) => events.emit(id, Event::Preview { index, frame }),
            Ok(None) => (),
            Err(error) => tracing::warn!(%error, "a preview could not be made"),
        }
    }

    /// The guided prediction of each session. More rows than fit one forward pass (a guided session where one row is
    /// allowed) are computed one pass after the other.
    fn predict(&mut self, ids: &[SessionId]) -> Result<Vec<Tensor>> {
        // The members of a step have the same one.
        let network = self.session(ids[0]).network();
        let mut caches: Vec<_> = ids.iter().map(|id| self.take_caches(*id)).collect();
        let sessions: Vec<&Session<M>> = ids.iter().map(|id| self.session(*id)).collect();
        let rows: Vec<_> = sessions.iter().flat_map(|session| session.rows()).collect();
        let of_rows =
            sessions.iter().zip(&mut caches).map(|(session, caches)| caches.iter_mut().take(session.num_rows()));
        let mut caches_of_rows: Vec<&mut BlockCache> = of_rows.flatten().collect();
        let mut caches_of_passes = caches_of_rows.chunks_mut(self.max_rows);
        let mut predictions = Vec::with_capacity(rows.len());
        for pass in rows.chunks(self.max_rows) {
            let found = match caches_of_passes.next() {
                None => model_of(&self.model, network).predict(pass)?,
                Some(caches) => model_of(&self.model, network).predict_cached(pass, caches)?,
            };
            assert_eq!(found.len(), pass.len(), "one prediction per row: this is a bug of the family");
            predictions.extend(found);
        }
        let mut predictions = predictions.into_iter();
        let guided = sessions.iter().map(|session| session.guided(&mut predictions)).collect();
        for (id, caches) in ids.iter().zip(caches) {
            self.session_mut(*id).denoising_mut().caches = caches;
        }
        guided
    }

    /// The caches of a session, which it gets back after its step: rows are read while caches are written.
    fn take_caches(&mut self, id: SessionId) -> Vec<BlockCache> {
        std::mem::take(&mut self.session_mut(id).denoising_mut().caches)
    }

    /// The next chunk of pixels of one session.
    fn decode(&mut self, id: SessionId, events: &mut Events) -> Result<()> {
        let session = self.sessions.get_mut(&id).expect(MEMBERS_EXIST);
        let model = model_of(&self.model, session.network());
        let (pixels, done) = session.decode_next(model)?;
        let total = model.num_decode_steps(&session.request);
        if let Some(pixels) = pixels {
            let Some(frames) = to_frames(&pixels, &session.request)? else {
                let outcome =
                    self.decode_in_f32(id, done - 1, events).map_or_else(Outcome::Failed, |()| Outcome::Complete);
                give_back_freed_memory();
                self.settle(id, outcome, events);
                return Ok(());
            };
            events.emit(id, Event::Frames(frames));
        }
        events.emit(id, Event::Progress { phase: Phase::VaeDecode, done, total });
        self.settle(id, if done < total { Outcome::GoesOn } else { Outcome::Complete }, events);
        Ok(())
    }

    /// All pixels once more, in f32 and at once: a chunk depends on those before it, which were narrow too. Frames of the
    /// first `told` chunks are out already.
    fn decode_in_f32(&self, id: SessionId, told: usize, events: &mut Events) -> Result<()> {
        let session = self.session(id);
        let Stage::Decode { latents, .. } = &session.stage else { unreachable!("{STAGE_FITS}") };
        let model = self.read_in_f32(session.network(), Phase::VaeDecode, &session.request)?;
        let mut decoding = model.begin_decode(latents, &session.request)?;
        let total = model.num_decode_steps(&session.request);
        for done in 1..=total {
            let pixels = model.decode_next(&mut decoding)?;
            if done <= told {
                continue;
            }
            if let Some(pixels) = pixels {
                let frames = to_frames(&pixels, &session.request)?;
                let frames = frames.ok_or(Error::NotFinite { phase: Phase::VaeDecode.as_str() })?;
                events.emit(id, Event::Frames(frames));
            }
            events.emit(id, Event::Progress { phase: Phase::VaeDecode, done, total });
        }
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
        let session = self.session(id);
        let (key, rows) = (session.step_key(id), session.num_rows());
        self.batcher.enqueue(id, key, rows);
    }

    fn announce(&mut self, events: &mut Events) {
        for id in &self.in_step {
            let session = self.sessions.get_mut(id).expect(MEMBERS_EXIST);
            if !std::mem::replace(&mut session.started, true) {
                events.emit(*id, Event::Started);
            }
        }
    }

    fn session(&self, id: SessionId) -> &Session<M> {
        self.sessions.get(&id).expect(MEMBERS_EXIST)
    }

    fn session_mut(&mut self, id: SessionId) -> &mut Session<M> {
        self.sessions.get_mut(&id).expect(MEMBERS_EXIST)
    }
}

const MEMBERS_EXIST: &str = "a queued session is a known session: this is a bug";
const PICTURES_ARE_TAKEN: &str = "a picture was refused where the model takes none: this is a bug";
const STAGE_FITS: &str = "a session is in the stage that its step key names: this is a bug";

impl<M: DiffusionModel> Runner for DiffusionRunner<M> {
    fn plan(&self, request: &Request) -> MemoryPlan {
        match request {
            Request::Diffusion(request) => {
                let adapters = self.model.adapters().map_or(0, |adapters| adapters.footprint_bytes(&request.loras));
                let text_encoders = self.text_encoders.as_ref().map_or(0, OnDemand::bytes);
                self.model.plan(request).holding(adapters).holding_in(Phase::Encode, text_encoders)
            }
            Request::Text(_) => MemoryPlan::default(),
        }
    }

    fn submit(&mut self, session: SessionId, request: Request) -> Result<()> {
        let Request::Diffusion(request) = request else {
            return Err(Error::invalid("model", "makes pictures or clips, not text"));
        };
        if self.sessions.len() >= MAX_SESSIONS {
            return Err(Error::TooManySessions { limit: MAX_SESSIONS });
        }
        if request.edit.is_some() && self.model.picture_model().is_none() {
            return Err(Error::invalid("image", "this model does not begin from a picture"));
        }
        if request.references.is_some() && self.model.reference_model().is_none() {
            return Err(Error::invalid("reference_images", "this model follows no reference pictures"));
        }
        if request.refinement.is_some() && self.model.refiner().is_none() {
            return Err(Error::invalid("denoising_end", "this model has no refiner"));
        }
        let new = Session::new(request, &self.model);
        let previous = self.sessions.insert(session, new);
        assert!(previous.is_none(), "session ids are unique: this is a bug");
        self.enqueue(session);
        Ok(())
    }

    fn cancel(&mut self, session: SessionId) {
        self.batcher.remove(session);
        self.forget(session);
    }

    fn next(&self) -> Option<StepPlan> {
        let batch = self.batcher.peek()?;
        Some(StepPlan { phase: batch.key.phase(), sessions: batch.sessions.len() })
    }

    fn step(&mut self, events: &mut Events) -> Result<StepPlan> {
        let batch = self.batcher.take().expect("step is called when there is a next one: this is a bug");
        let plan = StepPlan { phase: batch.key.phase(), sessions: batch.sessions.len() };
        self.in_step.clone_from(&batch.sessions);
        self.announce(events);
        match batch.key {
            StepKey::Encode(input) => self.encode(&input, &batch.sessions, events)?,
            StepKey::Denoise(_) => self.denoise(&batch.sessions, events)?,
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

    fn status(&self) -> RunnerStatus {
        let running = self.sessions.values().filter(|session| session.started).count();
        RunnerStatus { running, waiting: self.sessions.len() - running, kv_blocks_used: 0, kv_blocks_total: 0 }
    }
}
