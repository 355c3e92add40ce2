//! The denoising of one session, from the first timestep to the last.
//!
//! Owns: the rows of a step, guidance, the way from one step to the next and from one expert to the next. Does not know:
//! other sessions, and who predicts.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use super::block_cache::BlockCache;
use super::course::{Course, Expert, Stretch};
use super::model::DiffusionModel;
use super::previews::due_preview;
use super::row::DenoiseRow;
use super::start::{Repaint, Start, start};
use crate::diffusion::{Cache, DiffusionRequest};
use crate::error::Result;
use crate::rng::TorchGenerator;
use crate::session_checkpoint::Refusal;
use crate::session_checkpoint::fields::{Reader, Writer};
use crate::solver::{Memory, Solver};

/// State of a session between its first and its last denoising step. `C` is the family's conditioning.
pub(super) struct Denoising<C> {
    pub(super) latents: Tensor,
    /// The latents as the solver wants the model to see them.
    model_input: Tensor,
    solver: Box<dyn Solver>,
    /// One per guidance branch; none where everything is computed.
    pub(super) caches: Vec<BlockCache>,
    /// The request's own: the solver goes on where the initial noise left off.
    generator: TorchGenerator,
    /// Where the loop is in the solver's timesteps.
    index: usize,
    done: usize,
    /// Steps in all.
    total: usize,
    repaint: Option<Repaint>,
    stretch: Conditioned<C>,
    /// What comes after this stretch.
    later: VecDeque<Conditioned<C>>,
}

/// A stretch of the course, and what its expert denoises with.
struct Conditioned<C> {
    expert: Expert,
    steps: Range<usize>,
    solver: Option<Box<dyn Solver>>,
    /// One per guidance branch, the positive one first.
    conditioning: Vec<C>,
}

/// What a step leads to.
pub(super) enum Advanced {
    ToTheNext,
    /// With the final latents.
    ToTheEnd(Tensor),
}

impl<C> Denoising<C> {
    pub(super) fn begin<M: DiffusionModel<Conditioning = C>>(
        model: &M,
        request: &DiffusionRequest,
        encoded: &[Arc<M::Encoded>],
    ) -> Result<Self> {
        let mut generator = TorchGenerator::new(request.sampling.seed);
        let first_step = request.edit.as_ref().map_or(0, |edit| edit.first_step);
        let course = model.course(request)?.starting_at(first_step);
        let total = course.num_steps();
        let Course { solver, stretches } = course;
        let noise = |generator: &mut TorchGenerator| model.initial_latents(request, generator);
        let Start { latents, repaint } = start(model.image_start(), request, encoded, &*solver, &mut generator, noise)?;
        let latents = match model.picture_start() {
            Some(family) => family.begin(latents, encoded)?,
            None => latents,
        };
        let conditioned = |Stretch { expert, steps, solver }| -> Result<Conditioned<C>> {
            Ok(Conditioned { expert, steps, solver, conditioning: model.conditioning(expert, encoded, request)? })
        };
        let mut later = stretches.into_iter().map(conditioned).collect::<Result<VecDeque<_>>>()?;
        let stretch = later.pop_front().expect("a course has a step: this is a bug of the family");
        let branches = 0..stretch.conditioning.len();
        let cache = |rule: &Arc<Cache>| branches.map(|branch| BlockCache::new(rule.clone(), branch)).collect();
        let caches = request.cache.as_ref().map_or(Vec::new(), cache);
        Ok(Self {
            model_input: solver.scale_model_input(stretch.steps.start, &latents)?,
            latents,
            solver,
            caches,
            generator,
            index: stretch.steps.start,
            done: 0,
            total,
            repaint,
            stretch,
            later,
        })
    }

    /// Who predicts in the coming step.
    pub(super) fn expert(&self) -> Expert {
        self.stretch.expert
    }

    /// Of the coming step, one per guidance branch, the positive one first.
    pub(super) fn conditioning(&self) -> &[C] {
        &self.stretch.conditioning
    }

    /// Where the coming step is in the schedule, counted from 0.
    pub(super) fn step(&self) -> usize {
        self.index
    }

    /// Steps done, and steps in all.
    pub(super) fn progress(&self) -> (usize, usize) {
        (self.done, self.total)
    }

    /// Predictions that came from caches so far.
    pub(super) fn skipped_passes(&self) -> usize {
        self.caches.iter().map(BlockCache::skipped).sum()
    }

    /// Rows of the coming step: one, and one more where it is guided; none where its prediction is zero.
    pub(super) fn num_rows(&self, request: &DiffusionRequest) -> usize {
        request.guidance.num_predictions_at(self.done, self.total)
    }

    /// Rows of the coming step: the positive branch, then the negative one if the step is guided.
    pub(super) fn rows<'a>(&'a self, request: &'a DiffusionRequest) -> impl Iterator<Item = DenoiseRow<'a, C>> {
        let timestep = self.solver.timesteps()[self.index];
        let branches = self.conditioning().iter().take(self.num_rows(request));
        let latents = &self.model_input;
        branches.map(move |conditioning| DenoiseRow { latents, timestep, conditioning, request })
    }

    /// Takes this session's predictions and merges them: `negative + scale * (positive - negative)`, with CFG-Zero* of a
    /// negative one that is scaled before.
    pub(super) fn guided(
        &self,
        predictions: &mut impl Iterator<Item = Tensor>,
        request: &DiffusionRequest,
    ) -> Result<Tensor> {
        let num_rows = self.num_rows(request);
        if num_rows == 0 {
            return Ok(self.latents.zeros_like()?);
        }
        let mut next = || predictions.next().expect("one prediction per row: this is a bug");
        let positive = next();
        if num_rows == 1 {
            return Ok(positive);
        }
        let negative = match request.guidance.zero_star {
            Some(_) => closest_to(&positive, &next())?,
            None => next(),
        };
        let timestep = self.solver.timesteps()[self.index];
        let scale = request.guidance.cfg_scale_at(timestep, request.sampling.num_inference_steps);
        Ok((&negative + ((positive - &negative)? * scale)?)?)
    }

    /// Moves the latents one timestep on.
    pub(super) fn advance(&mut self, prediction: &Tensor) -> Result<Advanced> {
        self.latents = self.solver.step(self.index, prediction, &self.latents, &mut self.generator)?;
        self.index += 1;
        if let Some(repaint) = &self.repaint {
            self.latents = repaint.blend(&self.latents, self.index, &*self.solver)?;
        }
        self.done += 1;
        if self.done == self.total {
            return Ok(Advanced::ToTheEnd(self.latents.clone()));
        }
        if self.index == self.stretch.steps.end {
            self.go_on_to_the_next_expert();
        }
        self.model_input = self.solver.scale_model_input(self.index, &self.latents)?;
        Ok(Advanced::ToTheNext)
    }

    /// All that the steps so far have left, beside what a denoising that begins has as well.
    pub(super) fn save(&self, into: &mut Writer) -> Result<()> {
        into.count(self.done);
        into.tensor(&self.latents)?;
        let Memory { tensors, numbers } = self.solver.memory();
        into.count(tensors.len());
        tensors.iter().try_for_each(|tensor| into.tensor(tensor))?;
        into.count(numbers.len());
        numbers.into_iter().for_each(|number| into.count(number));
        save_generator(&self.generator, into)?;
        into.count(self.caches.len());
        self.caches.iter().try_for_each(|cache| cache.save(into))
    }

    /// One that has just begun, where the one of the same request was that was saved.
    pub(super) fn go_on_from(mut self, from: &mut Reader<'_>) -> Result<Self> {
        let done = from.count()?;
        if done >= self.total {
            return Err(Refusal::State("more steps than there are").into());
        }
        let mut steps_of_solver = 0;
        while self.done < done {
            self.done += 1;
            self.index += 1;
            steps_of_solver += 1;
            if self.index == self.stretch.steps.end && self.go_on_to_the_next_expert() {
                steps_of_solver = 0;
            }
        }
        self.latents = from.tensor_like(&self.latents)?;
        let tensors = (0..from.count_up_to(MAX_REMEMBERED)?).map(|_| from.tensor_like(&self.latents));
        let tensors = tensors.collect::<Result<_>>()?;
        let numbers = (0..from.count_up_to(MAX_REMEMBERED)?).map(|_| from.count());
        let numbers = numbers.collect::<Result<_, _>>()?;
        if !self.solver.remember(Memory { tensors, numbers }, steps_of_solver) {
            return Err(Refusal::State("its solver remembers something else").into());
        }
        self.generator = saved_generator(from)?;
        if from.count()? != self.caches.len() {
            return Err(Refusal::State("another number of branches").into());
        }
        for cache in &mut self.caches {
            cache.go_on_from(from, self.latents.device())?;
        }
        self.model_input = self.solver.scale_model_input(self.index, &self.latents)?;
        Ok(self)
    }

    /// The latents go on as they are: what is noise in them stays, and none is added. Whether another solver goes on.
    fn go_on_to_the_next_expert(&mut self) -> bool {
        self.stretch = self.later.pop_front().expect("a stretch follows before the last step: this is a bug");
        self.index = self.stretch.steps.start;
        // What is kept is another network's.
        self.caches.iter_mut().for_each(BlockCache::forget);
        match self.stretch.solver.take() {
            Some(solver) => {
                self.solver = solver;
                true
            }
            None => false,
        }
    }

    /// The number of the preview that the coming step shows, if it shows one.
    pub(super) fn due_preview(&self, request: &DiffusionRequest) -> Option<usize> {
        due_preview(self.done + 1, self.total, request.partial_images)
    }

    /// The image that the coming step heads for.
    pub(super) fn predict_clean(&self, prediction: &Tensor) -> Result<Tensor> {
        self.solver.predict_clean(self.index, prediction, &self.latents)
    }
}

/// Most that a solver remembers of each kind.
const MAX_REMEMBERED: usize = 8;

fn save_generator(generator: &TorchGenerator, into: &mut Writer) -> Result<()> {
    let (words, used, waiting) = generator.state();
    into.bytes(&words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>());
    into.count(used);
    into.option(waiting, |into, waiting| {
        into.number(waiting);
        Ok(())
    })
}

fn saved_generator(from: &mut Reader<'_>) -> Result<TorchGenerator> {
    let (words, rest) = from.bytes()?.as_chunks();
    let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let used = from.count()?;
    let waiting = from.option(|from| Ok(from.number()?))?;
    let generator = TorchGenerator::with_state(&words, used, waiting).filter(|_| rest.is_empty());
    generator.ok_or_else(|| Refusal::State("no generator has such a state").into())
}

/// Keeps the factor finite where there is no negative prediction to speak of; that of the reference.
const LEAST_SQUARE: f64 = 1e-8;

/// The multiple of the negative prediction that is closest to the positive one: `<p, n> / |n|^2` times `n`. Source: diffusers
/// `guiders/classifier_free_zero_star_guidance.py` (`cfg_zero_star_scale`).
fn closest_to(positive: &Tensor, negative: &Tensor) -> Result<Tensor> {
    let factor = ((positive * negative)?.sum_all()? / (negative.sqr()?.sum_all()? + LEAST_SQUARE)?)?;
    Ok(negative.broadcast_mul(&factor)?)
}
