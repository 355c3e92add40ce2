//! One session of the runner: its request, what it has become so far, and what its next step is.
//!
//! Owns: the stages and the way from one to the next, the rows of a denoising step, guidance. Does not know: other
//! sessions, and when its steps are taken.

use std::collections::VecDeque;
use std::sync::Arc;

use candle_core::Tensor;

use super::batcher::{Input, Network, Prompts, ReferenceInput, ShapeKey, StepKey};
use super::block_cache::BlockCache;
use super::previews::due_preview;
use super::references::ReferenceTokens;
use super::retry::are_finite;
use super::start::{Encoded, Repaint, Start, start};
use super::{DenoiseRow, DiffusionModel, EncodedInputs, STAGE_FITS, model_of};
use crate::diffusion::{Acceleration, DiffusionRequest};
use crate::error::{Error, Result};
use crate::lora::{AdapterSet, LoraKey};
use crate::request::{Phase, SessionId};
use crate::rng::TorchGenerator;
use crate::solver::Solver;

pub(super) struct Session<M: DiffusionModel> {
    pub(super) request: DiffusionRequest,
    pub(super) started: bool,
    /// Predictions that came from caches, once denoising is done.
    pub(super) skipped_passes: usize,
    /// The terms of its request, on the device from its first step on; `None` before that, and where it has none.
    pub(super) adapters: Option<Arc<AdapterSet>>,
    pub(super) stage: Stage<M>,
}

pub(super) enum Stage<M: DiffusionModel> {
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

pub(super) struct Denoising<M: DiffusionModel> {
    /// One per guidance branch, the positive one first.
    pub(super) conditioning: Vec<Arc<M::Conditioning>>,
    pub(super) references: Option<Arc<ReferenceTokens>>,
    pub(super) latents: Tensor,
    /// The latents as the solver wants the model to see them.
    pub(super) model_input: Tensor,
    pub(super) solver: Box<dyn Solver>,
    /// One per guidance branch; none without acceleration.
    pub(super) caches: Vec<BlockCache>,
    /// The request's own: the solver goes on where the initial noise left off.
    pub(super) generator: TorchGenerator,
    /// Where the loop is in the solver's timesteps.
    pub(super) index: usize,
    /// Where it leaves them.
    pub(super) end: usize,
    pub(super) done: usize,
    /// Steps in all, the refiner's too.
    pub(super) total: usize,
    pub(super) repaint: Option<Repaint>,
    pub(super) network: Network,
    /// What goes on after this model's steps.
    pub(super) refiner: Option<Handover<M::Conditioning>>,
}

/// What the refiner denoises with.
pub(super) struct Handover<C> {
    pub(super) conditioning: Vec<Arc<C>>,
    pub(super) solver: Box<dyn Solver>,
    pub(super) first_step: usize,
}

impl<M: DiffusionModel> Session<M> {
    pub(super) fn new(request: DiffusionRequest, model: &M) -> Self {
        let prompts_of = |network| {
            let mut texts = vec![Some(request.prompt.text.clone())];
            texts.extend(request.guidance.negative_prompt.as_ref().map(|negative| match negative.text() {
                None if model_of(model, network).absent_is_empty() => Some(String::new()),
                text => text.map(str::to_owned),
            }));
            let (max_sequence_length, loras) = (request.prompt.max_sequence_length, LoraKey::of(&request.loras));
            Input::Prompts(Prompts { texts, max_sequence_length, loras, network })
        };
        let prompts = [prompts_of(Network::Base)].into_iter();
        let prompts = prompts.chain(request.refinement.map(|_| prompts_of(Network::Refiner)));
        let pictures = model.picture_model().map_or_else(Vec::new, |family| family.pictures(&request));
        let references = request.references.as_ref().map(|references| {
            let (pictures, guided) = (references.images.clone(), request.guidance.negative_prompt.is_some());
            Input::References(ReferenceInput { pictures, guided })
        });
        let inputs = prompts.chain(references).chain(pictures.into_iter().map(Input::Picture)).collect();
        let encoded =
            Encoded { prompts: Vec::new(), refiner_prompts: Vec::new(), pictures: Vec::new(), references: None };
        let stage = Stage::Encode { inputs, encoded };
        Self { request, started: false, adapters: None, skipped_passes: 0, stage }
    }

    /// Whose networks do the next step.
    pub(super) fn network(&self) -> Network {
        match &self.stage {
            Stage::Encode { .. } => Network::Base,
            Stage::Denoise(denoising) => denoising.network,
            Stage::Latents(_) | Stage::Decode { .. } if self.request.refinement.is_some() => Network::Refiner,
            Stage::Latents(_) | Stage::Decode { .. } => Network::Base,
        }
    }

    pub(super) fn step_key(&self, id: SessionId) -> StepKey {
        let request = &self.request;
        match &self.stage {
            Stage::Encode { inputs, .. } => StepKey::Encode(inputs[0].clone()),
            Stage::Denoise(_) => StepKey::Denoise(ShapeKey {
                width: request.canvas.width,
                height: request.canvas.height,
                num_frames: request.canvas.num_frames,
                max_sequence_length: request.prompt.max_sequence_length,
                is_cached: request.acceleration != Acceleration::None,
                num_references: request.references.as_ref().map_or(0, |references| references.images.len()),
                loras: LoraKey::of(&request.loras),
                network: self.network(),
            }),
            Stage::Latents(_) | Stage::Decode { .. } => StepKey::VaeDecode(id),
        }
    }

    /// The input to encode next.
    pub(super) fn next_input(&self) -> Option<&Input> {
        match &self.stage {
            Stage::Encode { inputs, .. } => inputs.front(),
            _ => None,
        }
    }

    /// What became of the next input. Inputs of its kind that are encoded, and those there are in all.
    pub(super) fn take_encoded(&mut self, results: &EncodedInputs<M::Conditioning>) -> (usize, usize) {
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

    pub(super) fn begin_denoising(&mut self, model: &M) -> Result<()> {
        let Stage::Encode { encoded, .. } = &mut self.stage else { unreachable!("{STAGE_FITS}") };
        let mut generator = TorchGenerator::new(self.request.sampling.seed);
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

    pub(super) fn denoising(&self) -> &Denoising<M> {
        let Stage::Denoise(denoising) = &self.stage else { unreachable!("{STAGE_FITS}") };
        denoising
    }

    pub(super) fn denoising_mut(&mut self) -> &mut Denoising<M> {
        let Stage::Denoise(denoising) = &mut self.stage else { unreachable!("{STAGE_FITS}") };
        denoising
    }

    /// Rows that the next step adds to a denoising batch; none where it is of another kind.
    pub(super) fn num_rows(&self) -> usize {
        let Stage::Denoise(denoising) = &self.stage else { return 0 };
        1 + usize::from(self.request.guidance.is_guided_at(denoising.done, denoising.total))
    }

    /// Rows of the next denoising step: the positive branch, then the negative one if the step is guided.
    pub(super) fn rows(&self) -> impl Iterator<Item = DenoiseRow<'_, M::Conditioning>> {
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
    pub(super) fn predict_alone(&self, model: &M, max_rows: usize) -> Result<Tensor> {
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
    pub(super) fn guided(&self, predictions: &mut impl Iterator<Item = Tensor>) -> Result<Tensor> {
        let mut next = || predictions.next().expect("one prediction per row: this is a bug");
        let positive = next();
        if self.num_rows() == 1 {
            return Ok(positive);
        }
        let negative = next();
        Ok((&negative + ((positive - &negative)? * self.request.guidance.cfg_scale())?)?)
    }

    /// Moves the latents one timestep on: steps done, and steps in all. After the last one only the latents are kept.
    pub(super) fn advance(&mut self, prediction: &Tensor) -> Result<(usize, usize)> {
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
    pub(super) fn due_preview(&self) -> Option<usize> {
        let Denoising { done, total, .. } = self.denoising();
        due_preview(done + 1, *total, self.request.partial_images)
    }

    /// The picture that the coming step heads for.
    pub(super) fn predict_clean(&self, prediction: &Tensor) -> Result<Tensor> {
        let Denoising { solver, index, latents, .. } = self.denoising();
        solver.predict_clean(*index, prediction, latents)
    }

    /// The next pixels, if frames are whole with this chunk, and how many chunks are done with it.
    pub(super) fn decode_next(&mut self, model: &M) -> Result<(Option<Tensor>, usize)> {
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
