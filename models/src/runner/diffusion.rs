//! The diffusion runner: text encoding, batched denoising, chunked VAE decoding, for any [`DiffusionModel`].
//!
//! Owns: sessions, what they encode first, batching by shape, the denoising loop, guidance, conversion to RGB bytes. Does
//! not know: any architecture, solver or VAE.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::card::DiffusionCard;
use crate::device::give_back_freed_memory;
use crate::error::{Error, Result};
use crate::lora::{AdapterSet, Adapters, LoraKey};
use crate::memory::MemoryPlan;
use crate::request::{
    Acceleration, DiffusionRequest, Event, Events, FinishReason, Frame, Mask, Phase, Request, SessionId, Usage,
};
use crate::rng::TorchGenerator;
use crate::runner::{Runner, RunnerStatus, StepPlan};
use crate::solver::Solver;
use crate::vae::Posterior;
use crate::work::StepWork;

pub mod batcher;
pub mod block_cache;
pub mod on_demand;
pub mod previews;
pub mod references;
pub mod retry;
pub mod start;
#[cfg(test)]
mod tests;

use batcher::{
    Batcher, Input, MAX_ENCODE_ROWS, Network, PictureInput, Prompts, ReferenceInput, ShapeKey, StepKey, distinct_texts,
};
use block_cache::BlockCache;
use on_demand::OnDemand;
use previews::due_preview;
use references::{ReferenceModel, ReferenceTokens};
use retry::{InF32, are_finite};
use start::{Encoded, Repaint, Start, start};

/// Most sessions that one runner holds, whatever memory there is.
pub const MAX_SESSIONS: usize = 256;

/// What a picture or video family supplies; the runner does the rest.
pub trait DiffusionModel: Send {
    /// What the transformer needs of one prompt (one guidance branch). Sessions with the same prompt share it.
    type Conditioning: Send + Sync;
    /// State of a decode between two chunks.
    type Decoding: Send;

    /// Limits and defaults.
    fn card(&self) -> &DiffusionCard;

    /// The layers that take LoRA, where the family has any. The runner activates those of a step before it, and counts
    /// their bytes.
    fn adapters(&self) -> Option<&Adapters> {
        None
    }

    /// Bytes that one session needs beside the weights in each phase (latents, conditioning, activations, pixels).
    fn plan(&self, request: &DiffusionRequest) -> MemoryPlan;

    /// Encodes prompts, positive or negative ones of several sessions, in one forward pass whose rows know nothing of each
    /// other. Of the request only `max_sequence_length` may matter, since sessions that agree in it share the pass.
    fn encode(&self, prompts: &[&str], request: &DiffusionRequest) -> Result<Vec<Self::Conditioning>>;

    /// Whether a negative prompt that the client did not give is the empty text.
    fn absent_is_empty(&self) -> bool {
        true
    }

    /// What stands for an absent negative prompt where that is not the empty text; computes next to nothing.
    fn encode_absent(&self, _request: &DiffusionRequest) -> Result<Self::Conditioning> {
        unreachable!("the family says that an absent prompt is the empty one: this is a bug")
    }

    /// Least work of [`DiffusionModel::encode`].
    fn encode_work(&self, prompts: &[&str], request: &DiffusionRequest) -> StepWork;

    /// Least work of [`DiffusionModel::predict`] over so many rows.
    fn predict_work(&self, request: &DiffusionRequest, rows: usize) -> StepWork;

    /// Least work of the call of [`DiffusionModel::decode_next`] with this number, from 0 on.
    fn decode_work(&self, request: &DiffusionRequest, step: usize) -> StepWork;

    /// Standard normal noise `[1, ...]` in f32, drawn in the order in which the diffusers pipeline draws it, already in the
    /// shape that `predict` takes.
    fn initial_latents(&self, request: &DiffusionRequest, generator: &mut TorchGenerator) -> Result<Tensor>;

    /// The solver of one session, its timesteps set.
    fn solver(&self, request: &DiffusionRequest) -> Result<Box<dyn Solver>>;

    /// One forward pass over a batch of rows that share a shape but nothing else: row i has latents `[1, ...]`, its own
    /// timestep (in the solver's unit), its own conditioning and request. Returns the prediction of each row, f32.
    fn predict(&self, rows: &[DenoiseRow<'_, Self::Conditioning>]) -> Result<Vec<Tensor>>;

    /// As [`DiffusionModel::predict`], with the first-block cache of each row. Asked only of models whose card has
    /// thresholds for it.
    fn predict_cached(
        &self,
        _rows: &[DenoiseRow<'_, Self::Conditioning>],
        _caches: &mut [&mut BlockCache],
    ) -> Result<Vec<Tensor>> {
        unreachable!("the card allows no acceleration: this is a bug")
    }

    /// Least work of [`DiffusionModel::predict_cached`] over `computed` rows that go through all blocks and `skipping` ones
    /// that may leave out all but the first.
    fn predict_cached_work(&self, _request: &DiffusionRequest, _computed: usize, _skipping: usize) -> StepWork {
        unreachable!("the card allows no acceleration: this is a bug")
    }

    /// From now on nothing is kept that only later steps would profit from: this model lives for one.
    fn record_nothing(&mut self) {}

    /// Components of the checkpoint whose networks do the work of `phase` in fewer than 32 bits, so that f32 may help where
    /// it is not finite; none where it computes in f32 anyway.
    fn narrow_components(&self, _phase: Phase) -> &'static [&'static str] {
        &[]
    }

    /// A rough picture of latents on their way, cheap beside a step and as small as it likes; `None` where a family knows
    /// none, as for clips.
    fn preview(&self, _latents: &Tensor, _request: &DiffusionRequest) -> Result<Option<Frame>> {
        Ok(None)
    }

    /// Begins to turn final latents into pixels.
    fn begin_decode(&self, latents: &Tensor, request: &DiffusionRequest) -> Result<Self::Decoding>;

    /// How many calls of [`DiffusionModel::decode_next`] a request takes.
    fn num_decode_steps(&self, request: &DiffusionRequest) -> usize;

    /// The next chunk: f32 pixels `[frames, 3, height, width]` in -1..=1 (not yet clamped); `None` where whole frames need
    /// further calls, as a tile of a picture does.
    fn decode_next(&self, decoding: &mut Self::Decoding) -> Result<Option<Tensor>>;

    /// What it adds to begin from pictures, if it does.
    fn picture_model(&self) -> Option<&dyn PictureModel> {
        None
    }

    /// The model that takes the latents over from it where a request says so, if it has one: that has conditioning,
    /// solver and VAE of its own, and shares the shape of latents and the lengths of prompts.
    fn refiner(&self) -> Option<&Self> {
        None
    }

    /// What it adds to follow reference pictures, if it does.
    fn reference_model(&self) -> Option<&dyn ReferenceModel> {
        None
    }
}

/// What a family adds whose loop may begin from a picture. Requests with an [`crate::request::Edit`] are for it alone.
pub trait PictureModel {
    /// The pictures that a request has encoded, in this order.
    fn pictures(&self, request: &DiffusionRequest) -> Vec<PictureInput> {
        let tiled = request.vae_tiling;
        let pictures = request.edit.iter().map(|edit| edit.image.clone());
        pictures.map(|picture| PictureInput { picture, blanked: None, tiled }).collect()
    }

    /// What the VAE says of one of them.
    fn encode_picture(&self, input: &PictureInput) -> Result<Posterior>;

    /// Least work of [`PictureModel::encode_picture`].
    fn encode_picture_work(&self, input: &PictureInput) -> StepWork;

    /// A sample of a posterior as `predict` takes latents: scaled, and packed where the family packs.
    fn picture_latents(&self, sample: &Tensor, request: &DiffusionRequest) -> Result<Tensor>;

    /// The mask, for each value of the latents that `predict` takes: 1 where it is made anew, else 0.
    fn mask_latents(&self, mask: &Mask, request: &DiffusionRequest) -> Result<Tensor>;
}

/// One row of a denoising batch.
pub struct DenoiseRow<'a, C> {
    /// `[1, ...]` f32, scaled as the solver wants the model to see them.
    pub latents: &'a Tensor,
    /// In the solver's unit (0..1000 for the flow-matching families).
    pub timestep: f64,
    /// Of this row's prompt.
    pub conditioning: &'a C,
    /// Whether that is the negative one.
    pub is_negative: bool,
    /// What this row sees of the session's reference pictures, `[1, tokens, width]`; rows of one batch have equally many.
    pub references: Option<&'a Tensor>,
    /// Of this row's session.
    pub request: &'a DiffusionRequest,
}

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

struct Session<M: DiffusionModel> {
    request: DiffusionRequest,
    started: bool,
    /// Predictions that came from caches, once denoising is done.
    skipped_passes: usize,
    /// The terms of its request, on the device from its first step on; `None` before that, and where it has none.
    adapters: Option<Arc<AdapterSet>>,
    stage: Stage<M>,
}

enum Stage<M: DiffusionModel> {
    Encode {
        /// Not yet encoded, at least one: the prompts, then the reference pictures, then pictures to begin from.
        inputs: VecDeque<Input>,
        encoded: Encoded<M::Conditioning>,
    },
    Denoise(Denoising<M>),
    /// Final latents; decoding has not begun.
    Latents(Tensor),
    Decode {
        /// Final ones.
        latents: Tensor,
        decoding: M::Decoding,
        done: usize,
    },
}

struct Denoising<M: DiffusionModel> {
    /// One per guidance branch, the positive one first.
    conditioning: Vec<Arc<M::Conditioning>>,
    references: Option<Arc<ReferenceTokens>>,
    latents: Tensor,
    /// The latents as the solver wants the model to see them.
    model_input: Tensor,
    solver: Box<dyn Solver>,
    /// One per guidance branch; none without acceleration.
    caches: Vec<BlockCache>,
    /// The request's own: the solver goes on where the initial noise left off.
    generator: TorchGenerator,
    /// Where the loop is in the solver's timesteps.
    index: usize,
    /// Where it leaves them.
    end: usize,
    done: usize,
    /// Steps in all, the refiner's too.
    total: usize,
    repaint: Option<Repaint>,
    network: Network,
    /// What goes on after this model's steps.
    refiner: Option<Handover<M::Conditioning>>,
}

/// What the refiner denoises with.
struct Handover<C> {
    conditioning: Vec<Arc<C>>,
    solver: Box<dyn Solver>,
    first_step: usize,
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

    fn encode_work(&self, input: &Input, ids: &[SessionId]) -> StepWork {
        match input {
            Input::Prompts(prompts) => {
                let (model, request) = (model_of(&self.model, prompts.network), &self.session(ids[0]).request);
                let texts = distinct_texts(self.prompts(ids));
                texts.chunks(MAX_ENCODE_ROWS).map(|pass| model.encode_work(pass, request)).sum()
            }
            Input::Picture(input) => self.model.picture_model().expect(PICTURES_ARE_TAKEN).encode_picture_work(input),
            Input::References(ReferenceInput { pictures, guided }) => {
                self.model.reference_model().expect(PICTURES_ARE_TAKEN).encode_work(pictures.len(), *guided)
            }
        }
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

    /// Least work of a denoising step of these sessions.
    fn denoise_work(&self, ids: &[SessionId]) -> StepWork {
        let rows: Vec<bool> = ids.iter().flat_map(|id| self.session(*id).rows_that_may_skip()).collect();
        let request = &self.session(ids[0]).request;
        let model = model_of(&self.model, self.session(ids[0]).network());
        let is_cached = model.card().cache_threshold(request).is_some();
        let pass = |rows: &[bool]| match rows.iter().filter(|may_skip| **may_skip).count() {
            skipping if is_cached => model.predict_cached_work(request, rows.len() - skipping, skipping),
            _ => model.predict_work(request, rows.len()),
        };
        rows.chunks(self.max_rows).map(pass).sum()
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

    fn next_work(&self) -> StepWork {
        let Some(batch) = self.batcher.peek() else { return StepWork::default() };
        let first = self.session(batch.sessions[0]);
        match &first.stage {
            Stage::Encode { inputs, .. } => self.encode_work(&inputs[0], &batch.sessions),
            Stage::Denoise(_) => self.denoise_work(&batch.sessions),
            Stage::Latents(_) => model_of(&self.model, first.network()).decode_work(&first.request, 0),
            Stage::Decode { done, .. } => model_of(&self.model, first.network()).decode_work(&first.request, *done),
        }
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

impl<M: DiffusionModel> Session<M> {
    fn new(request: DiffusionRequest, model: &M) -> Self {
        let prompts_of = |network| {
            let mut texts = vec![Some(request.prompt.clone())];
            texts.extend(request.negative_prompt.as_ref().map(|negative| match negative.text() {
                None if model_of(model, network).absent_is_empty() => Some(String::new()),
                text => text.map(str::to_owned),
            }));
            let (max_sequence_length, loras) = (request.max_sequence_length, LoraKey::of(&request.loras));
            Input::Prompts(Prompts { texts, max_sequence_length, loras, network })
        };
        let prompts = [prompts_of(Network::Base)].into_iter();
        let prompts = prompts.chain(request.refinement.map(|_| prompts_of(Network::Refiner)));
        let pictures = model.picture_model().map_or_else(Vec::new, |family| family.pictures(&request));
        let references = request.references.as_ref().map(|references| {
            let (pictures, guided) = (references.images.clone(), request.negative_prompt.is_some());
            Input::References(ReferenceInput { pictures, guided })
        });
        let inputs = prompts.chain(references).chain(pictures.into_iter().map(Input::Picture)).collect();
        let encoded =
            Encoded { prompts: Vec::new(), refiner_prompts: Vec::new(), pictures: Vec::new(), references: None };
        let stage = Stage::Encode { inputs, encoded };
        Self { request, started: false, adapters: None, skipped_passes: 0, stage }
    }

    /// Whose networks do the next step.
    fn network(&self) -> Network {
        match &self.stage {
            Stage::Encode { .. } => Network::Base,
            Stage::Denoise(denoising) => denoising.network,
            Stage::Latents(_) | Stage::Decode { .. } if self.request.refinement.is_some() => Network::Refiner,
            Stage::Latents(_) | Stage::Decode { .. } => Network::Base,
        }
    }

    fn step_key(&self, id: SessionId) -> StepKey {
        let request = &self.request;
        match &self.stage {
            Stage::Encode { inputs, .. } => StepKey::Encode(inputs[0].clone()),
            Stage::Denoise(_) => StepKey::Denoise(ShapeKey {
                width: request.width,
                height: request.height,
                num_frames: request.num_frames,
                max_sequence_length: request.max_sequence_length,
                is_cached: request.acceleration != Acceleration::None,
                num_references: request.references.as_ref().map_or(0, |references| references.images.len()),
                loras: LoraKey::of(&request.loras),
                network: self.network(),
            }),
            Stage::Latents(_) | Stage::Decode { .. } => StepKey::VaeDecode(id),
        }
    }

    /// The input to encode next.
    fn next_input(&self) -> Option<&Input> {
        match &self.stage {
            Stage::Encode { inputs, .. } => inputs.front(),
            _ => None,
        }
    }

    /// What became of the next input. Inputs of its kind that are encoded, and those there are in all.
    fn take_encoded(&mut self, results: &EncodedInputs<M::Conditioning>) -> (usize, usize) {
        let Stage::Encode { inputs, encoded } = &mut self.stage else { unreachable!("{STAGE_FITS}") };
        let input = inputs.pop_front().expect(STAGE_FITS);
        let done = match (&input, results) {
            (Input::Prompts(prompts), EncodedInputs::Prompts(by_text)) => {
                let branches = match prompts.network {
                    Network::Base => &mut encoded.prompts,
                    Network::Refiner => &mut encoded.refiner_prompts,
                };
                branches.extend(prompts.texts.iter().map(|text| by_text[text].clone()));
                1 + usize::from(prompts.network == Network::Refiner)
            }
            (Input::Picture(_), EncodedInputs::Picture(posterior)) => {
                encoded.pictures.push(posterior.clone());
                encoded.pictures.len()
            }
            (Input::References(_), EncodedInputs::References(tokens)) => {
                encoded.references = Some(tokens.clone());
                // After the prompts.
                2 + usize::from(!encoded.refiner_prompts.is_empty())
            }
            _ => unreachable!("{STAGE_FITS}"),
        };
        (done, done + inputs.iter().filter(|waiting| waiting.phase() == input.phase()).count())
    }

    fn begin_denoising(&mut self, model: &M) -> Result<()> {
        let Stage::Encode { encoded, .. } = &mut self.stage else { unreachable!("{STAGE_FITS}") };
        let mut generator = TorchGenerator::new(self.request.seed);
        let solver = model.solver(&self.request)?;
        let Start { latents, first_step, repaint } =
            start(model, &self.request, &encoded.pictures, &*solver, &mut generator)?;
        let threshold = model.card().cache_threshold(&self.request);
        let caches = threshold
            .map_or(Vec::new(), |threshold| encoded.prompts.iter().map(|_| BlockCache::new(threshold)).collect());
        let steps = solver.timesteps().len();
        let (end, mut total) =
            (self.request.refinement.map_or(steps, |refined| refined.steps_before), steps - first_step);
        let mut refiner = None;
        if let Some(refined) = self.request.refinement {
            let solver = model_of(model, Network::Refiner).solver(&self.request)?;
            let (conditioning, first_step) = (std::mem::take(&mut encoded.refiner_prompts), refined.first_step_after);
            total = end + solver.timesteps().len() - first_step;
            refiner = Some(Handover { conditioning, solver, first_step });
        }
        self.stage = Stage::Denoise(Denoising {
            conditioning: std::mem::take(&mut encoded.prompts),
            references: encoded.references.take(),
            model_input: solver.scale_model_input(first_step, &latents)?,
            latents,
            solver,
            caches,
            generator,
            index: first_step,
            end,
            done: 0,
            total,
            repaint,
            network: Network::Base,
            refiner,
        });
        Ok(())
    }

    fn denoising(&self) -> &Denoising<M> {
        let Stage::Denoise(denoising) = &self.stage else { unreachable!("{STAGE_FITS}") };
        denoising
    }

    fn denoising_mut(&mut self) -> &mut Denoising<M> {
        let Stage::Denoise(denoising) = &mut self.stage else { unreachable!("{STAGE_FITS}") };
        denoising
    }

    /// For each row of the next denoising step, whether its cache may answer.
    fn rows_that_may_skip(&self) -> impl Iterator<Item = bool> {
        let caches = &self.denoising().caches;
        (0..self.num_rows()).map(|branch| caches.get(branch).is_some_and(BlockCache::may_skip))
    }

    /// Rows that the next step adds to a denoising batch; none where it is of another kind.
    fn num_rows(&self) -> usize {
        let Stage::Denoise(denoising) = &self.stage else { return 0 };
        1 + usize::from(self.request.is_guided_at(denoising.done, denoising.total))
    }

    /// Rows of the next denoising step: the positive branch, then the negative one if the step is guided.
    fn rows(&self) -> impl Iterator<Item = DenoiseRow<'_, M::Conditioning>> {
        let denoising = self.denoising();
        let timestep = denoising.solver.timesteps()[denoising.index];
        let branches = denoising.conditioning.iter().take(self.num_rows()).enumerate();
        branches.map(move |(branch, conditioning)| DenoiseRow {
            latents: &denoising.model_input,
            timestep,
            conditioning: &**conditioning,
            is_negative: branch > 0,
            references: denoising.references.as_ref().map(|tokens| tokens.of_branch(branch)),
            request: &self.request,
        })
    }

    /// The guided prediction of this session by another model, if it is finite.
    fn predict_alone(&self, model: &M, max_rows: usize) -> Result<Tensor> {
        let rows: Vec<_> = self.rows().collect();
        let mut predictions = Vec::with_capacity(rows.len());
        for pass in rows.chunks(max_rows) {
            predictions.extend(model.predict(pass)?);
        }
        let prediction = self.guided(&mut predictions.into_iter())?;
        match are_finite(std::slice::from_ref(&prediction))?[..] {
            [true] => Ok(prediction),
            _ => Err(Error::NotFinite { phase: Phase::Denoise.as_str() }),
        }
    }

    /// Takes this session's predictions and merges them: `negative + scale * (positive - negative)`.
    fn guided(&self, predictions: &mut impl Iterator<Item = Tensor>) -> Result<Tensor> {
        let mut next = || predictions.next().expect("one prediction per row: this is a bug");
        let positive = next();
        if self.num_rows() == 1 {
            return Ok(positive);
        }
        let negative = next();
        Ok((&negative + ((positive - &negative)? * self.request.cfg_scale())?)?)
    }

    /// Moves the latents one timestep on: steps done, and steps in all. After the last one only the latents are kept.
    fn advance(&mut self, prediction: &Tensor) -> Result<(usize, usize)> {
        let Stage::Denoise(denoising) = &mut self.stage else { unreachable!("{STAGE_FITS}") };
        let Denoising { latents, model_input, solver, generator, index, repaint, caches, .. } = denoising;
        *latents = solver.step(*index, prediction, latents, generator)?;
        *index += 1;
        if let Some(repaint) = repaint {
            *latents = repaint.blend(latents, *index, &**solver)?;
        }
        denoising.done += 1;
        let (done, total) = (denoising.done, denoising.total);
        if done == total {
            self.skipped_passes = caches.iter().map(BlockCache::skipped).sum();
            self.stage = Stage::Latents(latents.clone());
            return Ok((done, total));
        }
        if let Some(refiner) = denoising.refiner.take_if(|_| *index == denoising.end) {
            // As they are: what is noise in them stays, and none is added.
            (*solver, *index) = (refiner.solver, refiner.first_step);
            denoising.conditioning = refiner.conditioning;
            (denoising.references, denoising.network) = (None, Network::Refiner);
        }
        *model_input = solver.scale_model_input(*index, latents)?;
        Ok((done, total))
    }

    /// The number of the preview that the coming step shows, if it shows one.
    fn due_preview(&self) -> Option<usize> {
        let Denoising { done, total, .. } = self.denoising();
        due_preview(done + 1, *total, self.request.partial_images)
    }

    /// The picture that the coming step heads for.
    fn predict_clean(&self, prediction: &Tensor) -> Result<Tensor> {
        let Denoising { solver, index, latents, .. } = self.denoising();
        solver.predict_clean(*index, prediction, latents)
    }

    /// The next pixels, if frames are whole with this chunk, and how many chunks are done with it.
    fn decode_next(&mut self, model: &M) -> Result<(Option<Tensor>, usize)> {
        if let Stage::Latents(latents) = &self.stage {
            let (latents, decoding) = (latents.clone(), model.begin_decode(latents, &self.request)?);
            self.stage = Stage::Decode { latents, decoding, done: 0 };
        }
        let Stage::Decode { decoding, done, .. } = &mut self.stage else { unreachable!("{STAGE_FITS}") };
        let pixels = model.decode_next(decoding)?;
        *done += 1;
        Ok((pixels, *done))
    }
}

/// `pixels [frames, 3, height, width]` as bytes, rounded as diffusers' `VaeImageProcessor` does; `None` when a value is
/// not finite.
fn to_frames(pixels: &Tensor, request: &DiffusionRequest) -> Result<Option<Vec<Frame>>> {
    let (width, height) = (request.width, request.height);
    let (_, channels, found_height, found_width) = pixels.dims4()?;
    assert_eq!((channels, found_height, found_width), (3, height, width), "pixels fit the request: this is a bug");
    // Channels are gathered here and not by `permute`, which would take the pixels' memory once more.
    let values = pixels.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    if values.iter().any(|value| !value.is_finite()) {
        return Ok(None);
    }
    let plane = height * width;
    let frames = values.chunks_exact(3 * plane).map(|frame| {
        let pixel = |at: usize| [frame[at], frame[plane + at], frame[2 * plane + at]].map(to_byte);
        Frame { width, height, rgb: (0..plane).flat_map(pixel).collect() }
    });
    Ok(Some(frames.collect()))
}

/// `numpy.round` rounds halves to even.
pub(crate) fn to_byte(value: f32) -> u8 {
    ((value * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8
}
