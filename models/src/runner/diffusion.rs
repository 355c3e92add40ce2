//! The diffusion runner: text encoding, batched denoising, chunked VAE decoding, for any [`DiffusionModel`].
//!
//! Owns: sessions, batching by shape, the denoising loop, guidance, conversion to RGB bytes. Does not know: any
//! architecture, solver or VAE.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::card::DiffusionCard;
use crate::error::{Error, Result};
use crate::request::{DiffusionRequest, Event, Events, FinishReason, Frame, Phase, Request, SessionId, Usage};
use crate::rng::TorchGenerator;
use crate::runner::{Runner, RunnerStatus, StepPlan};
use crate::solver::Solver;
use crate::work::StepWork;

pub mod batcher;
#[cfg(test)]
mod tests;

use batcher::{Batcher, ShapeKey, StepKey};

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

    /// Bytes that one session needs at its peak beside the weights (latents, conditioning, activations, decode).
    fn footprint_bytes(&self, request: &DiffusionRequest) -> usize;

    /// Encodes one prompt: the positive or the negative one. Of the request only `max_sequence_length` may matter,
    /// since sessions that agree in both share the result.
    fn encode(&self, prompt: &str, request: &DiffusionRequest) -> Result<Self::Conditioning>;

    /// What stands for a negative prompt that the client did not give; the empty text unless a family says otherwise.
    fn encode_absent(&self, request: &DiffusionRequest) -> Result<Self::Conditioning> {
        self.encode("", request)
    }

    /// Least work of [`DiffusionModel::encode`].
    fn encode_work(&self, prompt: &str, request: &DiffusionRequest) -> StepWork;

    /// Least work of [`DiffusionModel::encode_absent`].
    fn encode_absent_work(&self, request: &DiffusionRequest) -> StepWork {
        self.encode_work("", request)
    }

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

    /// Begins to turn final latents into pixels.
    fn begin_decode(&self, latents: &Tensor, request: &DiffusionRequest) -> Result<Self::Decoding>;

    /// How many calls of [`DiffusionModel::decode_next`] a request takes.
    fn num_decode_steps(&self, request: &DiffusionRequest) -> usize;

    /// The next chunk: f32 pixels `[frames, 3, height, width]` in -1..=1 (not yet clamped).
    fn decode_next(&self, decoding: &mut Self::Decoding) -> Result<Tensor>;
}

/// One row of a denoising batch.
pub struct DenoiseRow<'a, C> {
    /// `[1, ...]` f32, scaled as the solver wants the model to see them.
    pub latents: &'a Tensor,
    /// In the solver's unit (0..1000 for the flow-matching families).
    pub timestep: f64,
    /// Of this row's prompt.
    pub conditioning: &'a C,
    /// Of this row's session.
    pub request: &'a DiffusionRequest,
}

/// Drives the sessions of one diffusion model: one encoding per prompt, one batched prediction per denoising step, one
/// chunk of pixels per decoding step.
pub struct DiffusionRunner<M: DiffusionModel> {
    model: M,
    max_rows: usize,
    batcher: Batcher,
    sessions: HashMap<SessionId, Session<M>>,
    /// Members of the step under way; left standing when it fails, so that they can be evicted.
    in_step: Vec<SessionId>,
}

struct Session<M: DiffusionModel> {
    request: DiffusionRequest,
    started: bool,
    stage: Stage<M>,
}

enum Stage<M: DiffusionModel> {
    /// Conditioning of the prompts encoded so far: the positive one, then the negative one.
    Encode(Vec<Arc<M::Conditioning>>),
    Denoise(Denoising<M>),
    /// Final latents; decoding has not begun.
    Latents(Tensor),
    Decode {
        decoding: M::Decoding,
        done: usize,
    },
}

struct Denoising<M: DiffusionModel> {
    /// One per guidance branch, the positive one first.
    conditioning: Vec<Arc<M::Conditioning>>,
    latents: Tensor,
    /// The latents as the solver wants the model to see them.
    model_input: Tensor,
    solver: Box<dyn Solver>,
    /// The request's own: the solver goes on where the initial noise left off.
    generator: TorchGenerator,
    /// Steps done.
    done: usize,
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
        Self { model, max_rows, batcher: Batcher::new(max_rows), sessions: HashMap::new(), in_step: Vec::new() }
    }

    /// The model that is driven.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// One text, for all sessions that wait for it.
    fn encode(&mut self, ids: &[SessionId], events: &mut Events) -> Result<()> {
        let first = self.session(ids[0]);
        let conditioning = Arc::new(match first.next_prompt() {
            Some(prompt) => self.model.encode(prompt, &first.request)?,
            None => self.model.encode_absent(&first.request)?,
        });
        for id in ids {
            let session = self.sessions.get_mut(id).expect(MEMBERS_EXIST);
            let (done, total) = session.take_encoded(conditioning.clone());
            if done == total {
                session.begin_denoising(&self.model)?;
            }
            events.emit(*id, Event::Progress { phase: Phase::Encode, done, total });
            self.settle(*id, Outcome::GoesOn, events);
        }
        Ok(())
    }

    /// One denoising step of every member.
    fn denoise(&mut self, ids: &[SessionId], events: &mut Events) -> Result<()> {
        let predictions = self.predict(ids)?;
        for (id, prediction) in ids.iter().zip(predictions) {
            let session = self.sessions.get_mut(id).expect(MEMBERS_EXIST);
            let (done, total) = session.advance(&prediction)?;
            let outcome = match session.latents_are_finite()? {
                true => Outcome::GoesOn,
                false => Outcome::Failed(Error::NotFinite { phase: Phase::Denoise.as_str() }),
            };
            if matches!(outcome, Outcome::GoesOn) {
                events.emit(*id, Event::Progress { phase: Phase::Denoise, done, total });
            }
            self.settle(*id, outcome, events);
        }
        Ok(())
    }

    /// The guided prediction of each session. More rows than fit one forward pass (a guided session where one row is
    /// allowed) are computed one pass after the other.
    fn predict(&self, ids: &[SessionId]) -> Result<Vec<Tensor>> {
        let sessions: Vec<&Session<M>> = ids.iter().map(|id| self.session(*id)).collect();
        let rows: Vec<_> = sessions.iter().flat_map(|session| session.rows()).collect();
        let mut predictions = Vec::with_capacity(rows.len());
        for pass in rows.chunks(self.max_rows) {
            let found = self.model.predict(pass)?;
            assert_eq!(found.len(), pass.len(), "one prediction per row: this is a bug of the family");
            predictions.extend(found);
        }
        let mut predictions = predictions.into_iter();
        sessions.iter().map(|session| session.guided(&mut predictions)).collect()
    }

    /// The next chunk of pixels of one session.
    fn decode(&mut self, id: SessionId, events: &mut Events) -> Result<()> {
        let session = self.sessions.get_mut(&id).expect(MEMBERS_EXIST);
        let (pixels, done) = session.decode_next(&self.model)?;
        let total = self.model.num_decode_steps(&session.request);
        let outcome = match to_frames(&pixels, &session.request)? {
            None => Outcome::Failed(Error::NotFinite { phase: Phase::VaeDecode.as_str() }),
            Some(frames) => {
                events.emit(id, Event::Frames(frames));
                events.emit(id, Event::Progress { phase: Phase::VaeDecode, done, total });
                if done < total { Outcome::GoesOn } else { Outcome::Complete }
            }
        };
        self.settle(id, outcome, events);
        Ok(())
    }

    /// Queues a session for its next step, or lets it go with its last event.
    fn settle(&mut self, id: SessionId, outcome: Outcome, events: &mut Events) {
        let last = match outcome {
            Outcome::GoesOn => return self.batcher.enqueue(id, self.session(id).step_key(id)),
            Outcome::Complete => Event::Finished { reason: FinishReason::Complete, usage: Usage::default() },
            Outcome::Failed(error) => Event::Failed(error),
        };
        self.sessions.remove(&id);
        events.emit(id, last);
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
}

const MEMBERS_EXIST: &str = "a queued session is a known session: this is a bug";
const STAGE_FITS: &str = "a session is in the stage that its step key names: this is a bug";

impl<M: DiffusionModel> Runner for DiffusionRunner<M> {
    fn footprint_bytes(&self, request: &Request) -> usize {
        match request {
            Request::Diffusion(request) => self.model.footprint_bytes(request),
            Request::Text(_) => 0,
        }
    }

    fn submit(&mut self, session: SessionId, request: Request) -> Result<()> {
        let Request::Diffusion(request) = request else {
            return Err(Error::invalid("model", "makes pictures or clips, not text"));
        };
        if self.sessions.len() >= MAX_SESSIONS {
            return Err(Error::TooManySessions { limit: MAX_SESSIONS });
        }
        let new = Session { request, started: false, stage: Stage::Encode(Vec::new()) };
        self.batcher.enqueue(session, new.step_key(session));
        let previous = self.sessions.insert(session, new);
        assert!(previous.is_none(), "session ids are unique: this is a bug");
        Ok(())
    }

    fn cancel(&mut self, session: SessionId) {
        self.batcher.remove(session);
        self.sessions.remove(&session);
    }

    fn next(&self) -> Option<StepPlan> {
        let batch = self.batcher.peek()?;
        Some(StepPlan { phase: batch.key.phase(), sessions: batch.sessions.len() })
    }

    fn next_work(&self) -> StepWork {
        let Some(batch) = self.batcher.peek() else { return StepWork::default() };
        let first = self.session(batch.sessions[0]);
        match &first.stage {
            Stage::Encode(_) => match first.next_prompt() {
                Some(prompt) => self.model.encode_work(prompt, &first.request),
                None => self.model.encode_absent_work(&first.request),
            },
            Stage::Denoise(_) => {
                let rows: usize = batch.sessions.iter().map(|id| self.session(*id).rows().count()).sum();
                let passes = (0..rows).step_by(self.max_rows).map(|start| self.max_rows.min(rows - start));
                passes.map(|rows| self.model.predict_work(&first.request, rows)).sum()
            }
            Stage::Latents(_) => self.model.decode_work(&first.request, 0),
            Stage::Decode { done, .. } => self.model.decode_work(&first.request, *done),
        }
    }

    fn step(&mut self, events: &mut Events) -> Result<StepPlan> {
        let batch = self.batcher.take().expect("step is called when there is a next one: this is a bug");
        let plan = StepPlan { phase: batch.key.phase(), sessions: batch.sessions.len() };
        self.in_step.clone_from(&batch.sessions);
        self.announce(events);
        match batch.key {
            StepKey::Encode { .. } => self.encode(&batch.sessions, events)?,
            StepKey::Denoise(_) => self.denoise(&batch.sessions, events)?,
            StepKey::VaeDecode(session) => self.decode(session, events)?,
        }
        self.in_step.clear();
        Ok(plan)
    }

    fn evict_step(&mut self) -> Vec<SessionId> {
        let mut members = std::mem::take(&mut self.in_step);
        // Those that ended within the step before it failed have had their last event.
        members.retain(|id| self.sessions.remove(id).is_some());
        members.iter().for_each(|id| self.batcher.remove(*id));
        members
    }

    fn status(&self) -> RunnerStatus {
        let running = self.sessions.values().filter(|session| session.started).count();
        RunnerStatus { running, waiting: self.sessions.len() - running, kv_blocks_used: 0, kv_blocks_total: 0 }
    }
}

impl<M: DiffusionModel> Session<M> {
    fn step_key(&self, id: SessionId) -> StepKey {
        let request = &self.request;
        match &self.stage {
            Stage::Encode(_) => StepKey::Encode {
                prompt: self.next_prompt().map(str::to_owned),
                max_sequence_length: request.max_sequence_length,
            },
            Stage::Denoise(_) => StepKey::Denoise(ShapeKey {
                width: request.width,
                height: request.height,
                num_frames: request.num_frames,
                max_sequence_length: request.max_sequence_length,
                guided: request.negative_prompt.is_some(),
            }),
            Stage::Latents(_) | Stage::Decode { .. } => StepKey::VaeDecode(id),
        }
    }

    /// The text to encode next: the prompt, then the negative prompt, `None` where that is absent.
    fn next_prompt(&self) -> Option<&str> {
        match (&self.stage, &self.request.negative_prompt) {
            (Stage::Encode(encoded), Some(negative)) if !encoded.is_empty() => negative.text(),
            _ => Some(&self.request.prompt),
        }
    }

    /// Texts encoded, and texts in all.
    fn take_encoded(&mut self, conditioning: Arc<M::Conditioning>) -> (usize, usize) {
        let Stage::Encode(encoded) = &mut self.stage else { unreachable!("{STAGE_FITS}") };
        encoded.push(conditioning);
        (encoded.len(), 1 + usize::from(self.request.negative_prompt.is_some()))
    }

    fn begin_denoising(&mut self, model: &M) -> Result<()> {
        let Stage::Encode(conditioning) = &mut self.stage else { unreachable!("{STAGE_FITS}") };
        let mut generator = TorchGenerator::new(self.request.seed);
        let solver = model.solver(&self.request)?;
        let latents = (model.initial_latents(&self.request, &mut generator)? * solver.init_noise_sigma())?;
        self.stage = Stage::Denoise(Denoising {
            conditioning: std::mem::take(conditioning),
            model_input: solver.scale_model_input(0, &latents)?,
            latents,
            solver,
            generator,
            done: 0,
        });
        Ok(())
    }

    fn denoising(&self) -> &Denoising<M> {
        let Stage::Denoise(denoising) = &self.stage else { unreachable!("{STAGE_FITS}") };
        denoising
    }

    /// Rows of the next denoising step: the positive branch, then the negative one.
    fn rows(&self) -> impl Iterator<Item = DenoiseRow<'_, M::Conditioning>> {
        let denoising = self.denoising();
        let timestep = denoising.solver.timesteps()[denoising.done];
        denoising.conditioning.iter().map(move |conditioning| DenoiseRow {
            latents: &denoising.model_input,
            timestep,
            conditioning: &**conditioning,
            request: &self.request,
        })
    }

    /// Takes this session's predictions and merges them: `negative + scale * (positive - negative)`.
    fn guided(&self, predictions: &mut impl Iterator<Item = Tensor>) -> Result<Tensor> {
        let mut next = || predictions.next().expect("one prediction per row: this is a bug");
        let positive = next();
        if self.denoising().conditioning.len() == 1 {
            return Ok(positive);
        }
        let negative = next();
        Ok((&negative + ((positive - &negative)? * self.request.guidance_scale)?)?)
    }

    /// Moves the latents one timestep on: steps done, and steps in all. After the last one only the latents are kept.
    fn advance(&mut self, prediction: &Tensor) -> Result<(usize, usize)> {
        let Stage::Denoise(denoising) = &mut self.stage else { unreachable!("{STAGE_FITS}") };
        let Denoising { latents, model_input, solver, generator, done, .. } = denoising;
        *latents = solver.step(*done, prediction, latents, generator)?;
        *done += 1;
        let (done, total) = (*done, solver.timesteps().len());
        if done == total {
            self.stage = Stage::Latents(latents.clone());
        } else {
            *model_input = solver.scale_model_input(done, latents)?;
        }
        Ok((done, total))
    }

    fn latents_are_finite(&self) -> Result<bool> {
        let latents = match &self.stage {
            Stage::Latents(latents) => latents,
            _ => &self.denoising().latents,
        };
        // Zero times what is finite is zero, and NaN otherwise: one number leaves the device, not all of them.
        Ok(latents.affine(0.0, 0.0)?.sum_all()?.to_scalar::<f32>()? == 0.0)
    }

    /// The next pixels, and how many chunks are done with them.
    fn decode_next(&mut self, model: &M) -> Result<(Tensor, usize)> {
        if let Stage::Latents(latents) = &self.stage {
            self.stage = Stage::Decode { decoding: model.begin_decode(latents, &self.request)?, done: 0 };
        }
        let Stage::Decode { decoding, done } = &mut self.stage else { unreachable!("{STAGE_FITS}") };
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
    let values = pixels.permute((0, 2, 3, 1))?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    if values.iter().any(|value| !value.is_finite()) {
        return Ok(None);
    }
    let frames = values.chunks_exact(height * width * 3);
    Ok(Some(frames.map(|frame| Frame { width, height, rgb: frame.iter().copied().map(to_byte).collect() }).collect()))
}

/// `numpy.round` rounds halves to even.
fn to_byte(value: f32) -> u8 {
    ((value * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8
}
