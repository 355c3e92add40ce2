//! `tale bench step`: what the steps of one model take, beside what they would take at the roofs of the device.
//!
//! A model is driven through its runner as the engine does it; there is no second way to compute. What a step does is
//! counted by its operations ([`tale_kernels::work`]); what the device can do is measured in the same run. Peak memory is
//! measured too.

use crate::diffusion::DiffusionRequest;
use crate::diffusion::acceleration::CacheMethod;
use crate::diffusion::guidance::GuidanceKind;
use crate::diffusion::parameters::{
    CACHE_COEFFICIENTS, CACHE_INTERVAL, CACHE_MAX_SKIPS, CACHE_METHOD, CACHE_RATIOS, CACHE_THRESHOLD, GUIDANCE_SCALE,
    HEIGHT, MAX_SEQUENCE_LENGTH, NUM_FRAMES, NUM_INFERENCE_STEPS, PROMPT, WIDTH,
};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tale_kernels::work::{Work, count};

use super::Roofs;
use super::memory::{forget_peak, peak_bytes};
use crate::card::ModelCard;
use crate::checkpoint::LoadFormat;
use crate::device::{DeviceSpec, Placement, WeightDtype, keep_freed_memory};
use crate::error::{Error, Result};
use crate::family::{LoadOptions, LoadedModel};
use crate::kv::{BLOCK_SIZE, PrefixCache, blocks_for};
use crate::loading;
use crate::parameter::Options;
use crate::request::{Event, Events, Phase, Request, SessionId};
use crate::text_parameters::{IGNORE_EOS, MAX_TOKENS, TEMPERATURE};

/// Tokens of a language model's prompt when nothing is said, and so about the context in which it decodes.
const DEFAULT_PROMPT_TOKENS: usize = 512;
/// Sequences that decode together when nothing is said.
const DEFAULT_TEXT_BATCHES: [usize; 3] = [1, 8, 64];
/// Decoding steps whose median counts; the one before them warms up.
const DECODE_STEPS: usize = 8;
/// Tokens of one step of a language model, if its prompts are not longer: as much as a server computes in one.
const MIN_STEP_TOKENS: usize = 512;
/// No further round begins after so much time.
const ENOUGH: Duration = Duration::from_secs(10);
/// Denoising steps of one round.
const DENOISE_STEPS: usize = 2;
/// The same where every second step skips blocks.
const CACHED_STEPS: usize = 8;
/// Beyond every change of an input, so that blocks are skipped wherever they may be.
const ANY_CHANGE: f64 = 100.0;

/// What to measure. Absent sizes are the model's own.
#[derive(Debug, Clone)]
pub struct StepOptions {
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// Tokens of a prompt; of a diffusion model, tokens that the T5-class encoder's prompt has.
    pub prompt_tokens: Option<usize>,
    /// Sequences that decode together, or pictures and clips that are denoised together; empty is the model's default.
    pub batches: Vec<usize>,
    /// Pixels.
    pub width: Option<usize>,
    /// Pixels.
    pub height: Option<usize>,
    /// Frames of a clip.
    pub num_frames: Option<usize>,
    /// By which method every second denoising step skips blocks, if any does.
    pub cache: Option<CacheMethod>,
    /// Most rounds whose median counts, at least 1; fewer where they take long.
    pub repeat: usize,
}

/// A bench that has been checked against the model's configurations; nothing is loaded yet.
pub struct StepBench {
    path: PathBuf,
    /// Of the family.
    pub family: &'static str,
    /// What each request asks for.
    request: Sizes,
    batches: Vec<usize>,
    repeat: usize,
    load: LoadOptions,
    /// Bytes of the weights on the device.
    pub weight_bytes: usize,
    /// Bytes of weights, caches and the largest batch of requests.
    pub needed_bytes: usize,
}

/// A request of the size that is measured.
enum Sizes {
    Text { prompt_tokens: usize },
    Diffusion(Box<DiffusionRequest>),
}

/// One measured kind of step.
#[derive(Debug, Clone)]
pub struct MeasuredStep {
    /// Phase of the runner.
    pub phase: Phase,
    /// Sizes that decide about the time, for people.
    pub shape: String,
    /// Median.
    pub seconds: f64,
    /// What its operations do.
    pub work: Work,
    /// Tokens that enter a prefill, or that a decoding step gives; 0 for diffusion.
    pub tokens: usize,
    /// Measured in the same run; on the CPU, whose neighbours come and go, before and after the step.
    pub roofs: Roofs,
    /// The most memory that was taken: see `docs/benchmarks.md`.
    pub peak_memory_bytes: usize,
}

/// The limit of the device that a step meets first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Reading weights and caches.
    Bytes,
    /// Multiplying and adding.
    Flops,
}

impl MeasuredStep {
    /// Which limit the least work would meet first.
    pub fn bound(&self) -> Bound {
        let seconds_of_bytes = self.work.bytes / self.roofs.bytes_per_second;
        let seconds_of_flops = self.work.flops / self.roofs.flops_per_second;
        if seconds_of_bytes > seconds_of_flops { Bound::Bytes } else { Bound::Flops }
    }

    /// Bytes or operations per second, whichever is bound.
    pub fn rate(&self) -> f64 {
        match self.bound() {
            Bound::Bytes => self.work.bytes / self.seconds,
            Bound::Flops => self.work.flops / self.seconds,
        }
    }

    /// The limit in the unit of [`MeasuredStep::rate`].
    pub fn roof(&self) -> f64 {
        match self.bound() {
            Bound::Bytes => self.roofs.bytes_per_second,
            Bound::Flops => self.roofs.flops_per_second,
        }
    }
}

impl StepBench {
    /// Reads the configurations of the checkpoint at `path` and checks the sizes against them.
    pub fn plan(path: &Path, device: DeviceSpec, dtype: WeightDtype, options: &StepOptions) -> Result<Self> {
        let dry = Placement::in_host_memory(device, dtype);
        let load = LoadOptions { load_format: options.load_format, ..LoadOptions::default() };
        let (_, model) = plan_model(path, &dry, &load)?;
        let batches = batches(&model.card, options)?;
        let load = load_options(&model.card, options, &batches, load);
        let (weight_bytes, model) = plan_model(path, &dry, &load)?;
        let request = Sizes::new(&model.card, options)?;
        let of_largest = request.request(&model.card, 0, request.answer_tokens(largest(&batches)))?;
        let footprint = model.runner.plan(&of_largest).peak_bytes();
        Ok(Self {
            path: path.to_owned(),
            family: match &model.card {
                ModelCard::Text(card) => card.family,
                ModelCard::Diffusion(card) => card.family,
            },
            weight_bytes,
            needed_bytes: weight_bytes + model.resident_bytes + footprint.saturating_mul(largest(&batches)),
            request,
            batches,
            repeat: options.repeat.max(1),
            load,
        })
    }

    /// Measures the roofs of the device, then loads the model there. Refused, before either, where it needs more than
    /// `free_bytes`.
    pub fn load(self, placement: &Placement, free_bytes: usize) -> Result<LoadedBench> {
        let needed_bytes = self.needed_bytes;
        if needed_bytes > free_bytes {
            return Err(Error::OutOfMemory { phase: None, needed_bytes, free_bytes });
        }
        // First, so that what it takes on a GPU is free again for the model.
        let roofs = roofs(placement)?;
        forget_peak(placement);
        let begin = Instant::now();
        let model = loading::load(&self.path, placement, &self.load, &mut |_| ())?;
        placement.synchronize()?;
        let load_seconds = begin.elapsed().as_secs_f64();
        let load_peak_bytes = peak_bytes(placement)?;
        keep_freed_memory();
        let (placement, events) = (placement.clone(), Events::default());
        Ok(LoadedBench { plan: self, placement, model, roofs, load_seconds, load_peak_bytes, events, next: 0 })
    }
}

/// A dry model and the bytes of its weights.
fn plan_model(path: &Path, dry: &Placement, options: &LoadOptions) -> Result<(usize, LoadedModel)> {
    let (inspection, model) = loading::plan(path, dry, options)?;
    let weight_bytes = inspection.resident_bytes() - inspection.cache_bytes;
    match (model, inspection.problem) {
        (Some(model), _) => Ok((weight_bytes, model)),
        (None, Some(problem)) => Err(problem),
        (None, None) => unreachable!("without a problem there is a model: this is a bug"),
    }
}

fn batches(card: &ModelCard, options: &StepOptions) -> Result<Vec<usize>> {
    if options.batches.contains(&0) {
        return Err(Error::invalid("batch", "is 0; at least one request is measured"));
    }
    Ok(match (options.batches.is_empty(), card) {
        (false, _) => options.batches.clone(),
        (true, ModelCard::Text(_)) => DEFAULT_TEXT_BATCHES.to_vec(),
        (true, ModelCard::Diffusion(_)) => vec![1],
    })
}

fn largest(batches: &[usize]) -> usize {
    batches.iter().copied().max().unwrap_or(1)
}

/// Most tokens that a sequence of such a batch has at the end: while the last prompt is computed the first sequence
/// decodes already, by one token in each step, and every step computes [`MIN_STEP_TOKENS`] of prompts or a whole one.
fn sequence_tokens(batch: usize, prompt_tokens: usize) -> usize {
    let prompt_steps = batch.saturating_mul(prompt_tokens).div_ceil(prompt_tokens.max(MIN_STEP_TOKENS));
    prompt_tokens.saturating_add(prompt_steps + DECODE_STEPS + 2)
}

/// A prompt in one step, no more KV blocks than the largest batch fills, and no smaller denoising batches than asked for.
fn load_options(card: &ModelCard, options: &StepOptions, batches: &[usize], load: LoadOptions) -> LoadOptions {
    let (batch, prompt_tokens) = (largest(batches), options.prompt_tokens.unwrap_or(DEFAULT_PROMPT_TOKENS));
    match card {
        ModelCard::Text(card) => LoadOptions {
            // One block more: recorded steps of a GPU keep one for themselves.
            kv_cache_bytes: batch
                .saturating_mul(blocks_for(sequence_tokens(batch, prompt_tokens)))
                .saturating_add(1)
                .saturating_mul(BLOCK_SIZE * card.kv_bytes_per_token),
            // Beside a whole prompt, a token of everybody else.
            max_batch_tokens: prompt_tokens.max(MIN_STEP_TOKENS).saturating_add(batch),
            max_batch_sequences: batch,
            // Every round has the same prompts.
            prefix_cache: PrefixCache::Off,
            prompt_lookup: None,
            ..load
        },
        ModelCard::Diffusion(_) => LoadOptions { max_denoise_rows: batch, ..load },
    }
}

impl Sizes {
    /// Sizes that the card does not allow, or that the model does not have, are refused with the field's name.
    fn new(card: &ModelCard, options: &StepOptions) -> Result<Self> {
        match card {
            ModelCard::Text(_) => {
                let cache = options.cache.map(|_| 1);
                let sizes = [
                    ("width", options.width),
                    ("height", options.height),
                    ("frames", options.num_frames),
                    ("cache", cache),
                ];
                if let Some((field, _)) = sizes.iter().find(|(_, size)| size.is_some()) {
                    return Err(Error::invalid(*field, "this is a language model; leave it out"));
                }
                Ok(Self::Text { prompt_tokens: options.prompt_tokens.unwrap_or(DEFAULT_PROMPT_TOKENS) })
            }
            ModelCard::Diffusion(card) => {
                // More text than the encoder looks at, so that the prompt has all the tokens that it may have.
                const CHARACTERS_PER_TOKEN: usize = 16;
                let sentence = "a lighthouse in the fog, and waves below it; ";
                let tokens = options.prompt_tokens.unwrap_or(card.prompts.default_length());
                if tokens == 0 || tokens > card.prompts.max_length() {
                    let problem = format!("is {tokens}; allowed: 1 to {}", card.prompts.max_length());
                    return Err(Error::invalid("prompt_tokens", problem));
                }
                let characters = tokens * CHARACTERS_PER_TOKEN;
                // One prediction per row: a guided one is two of them.
                let one_prediction = (card.guidance.kind == GuidanceKind::ClassifierFree).then_some(1.0);
                let asked = card
                    .plainest()
                    .with(&PROMPT, sentence.repeat(characters.div_ceil(sentence.len())))
                    .with(&WIDTH, options.width)
                    .with(&HEIGHT, options.height)
                    .with(&NUM_FRAMES, options.num_frames)
                    .with(&MAX_SEQUENCE_LENGTH, tokens)
                    .with(&NUM_INFERENCE_STEPS, DENOISE_STEPS)
                    .with(&GUIDANCE_SCALE, one_prediction);
                let asked = match options.cache {
                    Some(method) => skipping(asked, method),
                    None => asked,
                };
                Ok(Self::Diffusion(Box::new(card.resolve(&asked, 0)?)))
            }
        }
    }

    /// Number `number` of a batch; of a language model, one that answers with `max_tokens`.
    fn request(&self, card: &ModelCard, number: u64, max_tokens: usize) -> Result<Request> {
        let prompt_tokens = match self {
            Self::Text { prompt_tokens } => *prompt_tokens,
            Self::Diffusion(request) => {
                return Ok(Request::Diffusion(request.with_seed(number)));
            }
        };
        let ModelCard::Text(card) = card else { unreachable!("made for this card: this is a bug") };
        let token = |place: usize| ((place * 7 + number as usize * 13) % card.vocab_size) as u32;
        let options = Options::default().with(&MAX_TOKENS, max_tokens).with(&TEMPERATURE, 0.0).with(&IGNORE_EOS, true);
        Ok(Request::Text(card.resolve((0..prompt_tokens).map(token).collect(), &options, 0)?))
    }

    /// Tokens that the sequences of a batch may answer with, so that all of them decode together for long enough.
    fn answer_tokens(&self, batch: usize) -> usize {
        match self {
            Self::Text { prompt_tokens } => sequence_tokens(batch, *prompt_tokens) - prompt_tokens,
            Self::Diffusion(_) => 0,
        }
    }
}

/// The same with blocks that every second step skips, whatever they would compute.
fn skipping(asked: Options, method: CacheMethod) -> Options {
    asked
        .with(&NUM_INFERENCE_STEPS, CACHED_STEPS)
        .with(&CACHE_METHOD, method)
        .with(&CACHE_THRESHOLD, ANY_CHANGE)
        .with(&CACHE_MAX_SKIPS, 1)
        .with(&CACHE_INTERVAL, [0.0, 1.0])
        .with(&CACHE_RATIOS, (method == CacheMethod::MagCache).then(|| vec![1.0]))
        .with(&CACHE_COEFFICIENTS, (method == CacheMethod::TeaCache).then(|| vec![1.0, 0.0]))
}

/// A loaded model, ready to be measured.
pub struct LoadedBench {
    /// What was planned.
    pub plan: StepBench,
    placement: Placement,
    model: LoadedModel,
    /// Measured before the model was loaded.
    pub roofs: Roofs,
    /// Of making or reading the weights.
    pub load_seconds: f64,
    /// The most memory that was taken while loading.
    pub load_peak_bytes: usize,
    events: Events,
    next: u64,
}

/// One step as it was.
#[derive(Clone, Copy)]
struct Sample {
    phase: Phase,
    sessions: usize,
    seconds: f64,
    work: Work,
}

impl LoadedBench {
    /// Measures every kind of step that the model has and reports each as soon as it is known.
    pub fn run(&mut self, report: &mut dyn FnMut(MeasuredStep)) -> Result<()> {
        match &self.plan.request {
            Sizes::Text { prompt_tokens } => self.text(*prompt_tokens, report),
            Sizes::Diffusion(request) => {
                let request = request.clone();
                self.diffusion(&request, report)
            }
        }
    }

    fn text(&mut self, prompt_tokens: usize, report: &mut dyn FnMut(MeasuredStep)) -> Result<()> {
        let prefill = self.measured(|bench| {
            let rounds = bench.rounds(|bench| bench.submit(1, 1))?;
            Ok(median(rounds.iter().map(|samples| total(samples, Phase::Prefill)).collect()))
        })?;
        report(prefill.of_tokens(prompt_tokens, format!("{prompt_tokens} tokens")));
        for batch in self.plan.batches.clone() {
            let decode = self.measured(|bench| {
                bench.submit(batch, bench.plan.request.answer_tokens(batch))?;
                let whole = bench.decode_together(batch)?;
                Ok(median(whole.into_iter().skip(1).collect()))
            })?;
            report(decode.of_tokens(batch, format!("batch {batch}, {prompt_tokens} tokens before")));
        }
        Ok(())
    }

    fn diffusion(&mut self, request: &DiffusionRequest, report: &mut dyn FnMut(MeasuredStep)) -> Result<()> {
        let (text, size) =
            (request.prompt.max_sequence_length, format!("{}x{}", request.canvas.width, request.canvas.height));
        let size =
            if request.canvas.num_frames > 1 { format!("{size}, {} frames", request.canvas.num_frames) } else { size };
        for (position, batch) in self.plan.batches.clone().into_iter().enumerate() {
            let [mut encode, mut denoise, mut decode, mut skipped] = [const { Vec::new() }; 4];
            let measured = self.measured(|bench| {
                for samples in bench.rounds(|bench| bench.submit(batch, 0))? {
                    encode.push(total(&samples, Phase::Encode));
                    decode.push(total(&samples, Phase::VaeDecode).divided_by(batch));
                    denoise.extend(samples.iter().filter(|s| s.phase == Phase::Denoise && s.sessions == batch));
                }
                let most = denoise.iter().map(|sample| sample.work.flops).fold(0.0, f64::max);
                skipped.extend(denoise.extract_if(.., |sample| sample.work.flops < most));
                Ok(median(denoise))
            })?;
            if position == 0 {
                report(measured.with(median(encode), format!("{text} tokens")));
            }
            report(measured.clone().of_tokens(0, format!("batch {batch}, {size}, {text} tokens")));
            if !skipped.is_empty() {
                report(measured.with(median(skipped), format!("batch {batch}, {size}, blocks skipped")));
            }
            if position == 0 {
                report(measured.with(median(decode), size.clone()));
            }
        }
        Ok(())
    }

    /// Adds roofs and peak memory to what `work` measures.
    fn measured(&mut self, work: impl FnOnce(&mut Self) -> Result<Sample>) -> Result<MeasuredStep> {
        let before = self.roofs_now()?;
        forget_peak(&self.placement);
        let Sample { phase, seconds, work, .. } = work(self)?;
        let peak_memory_bytes = peak_bytes(&self.placement)?;
        let after = self.roofs_now()?;
        let roofs = Roofs {
            bytes_per_second: (before.bytes_per_second + after.bytes_per_second) / 2.0,
            flops_per_second: (before.flops_per_second + after.flops_per_second) / 2.0,
        };
        Ok(MeasuredStep { phase, shape: String::new(), seconds, work, tokens: 0, roofs, peak_memory_bytes })
    }

    /// A GPU has no neighbours, and beside a model no room for the matrices of a roof.
    fn roofs_now(&self) -> Result<Roofs> {
        if self.placement.device.is_cpu() { roofs(&self.placement) } else { Ok(self.roofs) }
    }

    /// All steps of each round: what `submit` submits, until it is done.
    fn rounds(&mut self, submit: impl Fn(&mut Self) -> Result<()>) -> Result<Vec<Vec<Sample>>> {
        let (begin, mut rounds) = (Instant::now(), Vec::new());
        while rounds.is_empty() || (rounds.len() < self.plan.repeat && begin.elapsed() < ENOUGH) {
            submit(self)?;
            rounds.push(self.drain()?);
        }
        Ok(rounds)
    }

    /// A batch of requests; of a language model, such that answer with `max_tokens`.
    fn submit(&mut self, batch: usize, max_tokens: usize) -> Result<()> {
        for number in 0..batch as u64 {
            let request = self.plan.request.request(&self.model.card, number, max_tokens)?;
            self.next += 1;
            self.model.runner.submit(SessionId(self.next), request)?;
        }
        Ok(())
    }

    /// The first steps in which all sequences of a batch decode. Then all are cancelled.
    fn decode_together(&mut self, batch: usize) -> Result<Vec<Sample>> {
        let mut samples = Vec::new();
        while samples.len() <= DECODE_STEPS {
            let Some(sample) = self.step()? else { break };
            if sample.phase == Phase::Decode && sample.sessions == batch {
                samples.push(sample);
            }
        }
        (0..batch as u64).for_each(|back| self.model.runner.cancel(SessionId(self.next - back)));
        Ok(samples)
    }

    /// Steps until nothing is left to do.
    fn drain(&mut self) -> Result<Vec<Sample>> {
        let mut samples = Vec::new();
        while let Some(sample) = self.step()? {
            samples.push(sample);
        }
        Ok(samples)
    }

    /// One step; `None` when there is nothing to do.
    fn step(&mut self) -> Result<Option<Sample>> {
        if self.model.runner.next().is_none() {
            return Ok(None);
        }
        let begin = Instant::now();
        let (plan, counted) = count(|| self.model.runner.step(&mut self.events));
        let plan = plan?;
        self.placement.synchronize()?;
        let seconds = begin.elapsed().as_secs_f64();
        for (_, event) in self.events.drain() {
            if let Event::Failed(error) = event {
                return Err(error);
            }
        }
        Ok(Some(Sample { phase: plan.phase, sessions: plan.sessions, seconds, work: counted.total() }))
    }
}

impl MeasuredStep {
    fn of_tokens(self, tokens: usize, shape: String) -> Self {
        Self { tokens, shape, ..self }
    }

    /// Another step of the same rounds.
    fn with(&self, Sample { phase, seconds, work, .. }: Sample, shape: String) -> Self {
        Self { phase, seconds, work, shape, ..self.clone() }
    }
}

impl Sample {
    fn divided_by(self, count: usize) -> Self {
        let work = Work { flops: self.work.flops / count as f64, bytes: self.work.bytes / count as f64 };
        Self { seconds: self.seconds / count as f64, work, ..self }
    }
}

/// All steps of one phase as one.
fn total(samples: &[Sample], phase: Phase) -> Sample {
    let of_phase = || samples.iter().filter(|sample| sample.phase == phase);
    Sample {
        phase,
        sessions: of_phase().count(),
        seconds: of_phase().map(|sample| sample.seconds).sum(),
        work: of_phase().map(|sample| sample.work).sum(),
    }
}

fn median(mut samples: Vec<Sample>) -> Sample {
    samples.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    *samples.get(samples.len() / 2).expect("every round has steps of every phase: this is a bug")
}

fn roofs(placement: &Placement) -> Result<Roofs> {
    Ok(tale_kernels::bench::roofs(&placement.device, placement.compute_dtype)?)
}

#[cfg(test)]
mod published;
#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> StepOptions {
        StepOptions {
            load_format: LoadFormat::Dummy,
            prompt_tokens: Some(24),
            batches: Vec::new(),
            width: None,
            height: None,
            num_frames: None,
            cache: None,
            repeat: 1,
        }
    }

    fn plan(case: &str, options: &StepOptions) -> Result<StepBench> {
        let golden = crate::testing::repository().join("tests/goldens").join(case).join("checkpoint");
        StepBench::plan(&golden, DeviceSpec::Cpu, WeightDtype::Auto, options)
    }

    fn cpu() -> Placement {
        Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("the CPU")
    }

    /// What was planned is what is loaded, and every step takes time, work and memory.
    fn run(case: &str, options: &StepOptions) -> Vec<MeasuredStep> {
        let mut bench = plan(case, options).expect("fits").load(&cpu(), usize::MAX).expect("loads");
        let request = &bench.plan.request;
        let largest = largest(&bench.plan.batches);
        let of_largest = request.request(&bench.model.card, 0, request.answer_tokens(largest)).expect("valid");
        let footprint = largest * bench.model.runner.plan(&of_largest).peak_bytes();
        assert_eq!(bench.plan.needed_bytes, bench.model.resident_bytes + footprint);
        let mut steps = Vec::new();
        bench.run(&mut |step| steps.push(step)).expect("runs");
        assert_eq!(bench.model.runner.status().running + bench.model.runner.status().waiting, 0);
        for step in &steps {
            assert!(step.seconds > 0.0 && step.work.flops > 0.0 && step.work.bytes > 0.0, "{step:?}");
            assert!(step.rate() > 0.0 && step.roof() > 0.0 && step.peak_memory_bytes > 0, "{step:?}");
        }
        steps
    }

    fn names(steps: &[MeasuredStep]) -> Vec<(&'static str, &str)> {
        steps.iter().map(|step| (step.phase.as_str(), step.shape.as_str())).collect()
    }

    #[test]
    fn a_language_model_prefills_and_decodes() {
        let steps = run("llama-untied", &StepOptions { batches: vec![1, 30], ..options() });
        let expected = [
            ("prefill", "24 tokens"),
            ("decode", "batch 1, 24 tokens before"),
            ("decode", "batch 30, 24 tokens before"),
        ];
        assert_eq!(names(&steps), expected);
        assert_eq!(steps.iter().map(|step| step.tokens).collect::<Vec<_>>(), [24, 1, 30]);
        // Thirty sequences read the same weights, and do thirty times the work, give or take a few tokens of context.
        let (alone, together) = (steps[1].work, steps[2].work);
        assert!((28.0..32.0).contains(&(together.flops / alone.flops)), "{alone:?} {together:?}");
        assert!((1.0..8.0).contains(&(together.bytes / alone.bytes)), "{alone:?} {together:?}");
    }

    /// What a large card has to have for one sequence of a 70B model: codes, scales, and little beside them.
    #[test]
    fn a_model_in_four_bits_is_planned_for_one_card() {
        for name in ["llama-3.1-70b-awq-int4", "llama-3.3-70b-w4a16", "qwen2.5-72b-awq", "qwen2.5-72b-gptq-int4"] {
            let preset: &crate::presets::Preset = name.parse().expect("is in the table");
            let folder = crate::presets::Configurations::of_preset(preset).expect("written");
            let options = StepOptions { batches: vec![1], ..options() };
            let planned = StepBench::plan(folder.path(), DeviceSpec::Cuda(0), WeightDtype::Auto, &options);
            let needed = planned.expect("planned").needed_bytes;
            assert!((36 << 30..48 << 30).contains(&needed), "{name}: {needed}");
        }
    }

    #[test]
    fn a_picture_is_encoded_denoised_and_decoded() {
        let sizes = StepOptions { width: Some(64), height: Some(32), batches: vec![1, 2], ..options() };
        let steps = run("flux-schnell", &sizes);
        let expected = [
            ("encode", "24 tokens"),
            ("denoise", "batch 1, 64x32, 24 tokens"),
            ("vae_decode", "64x32"),
            ("denoise", "batch 2, 64x32, 24 tokens"),
        ];
        assert_eq!(names(&steps), expected);
        assert_eq!(steps[3].work.flops, 2.0 * steps[1].work.flops);
        assert_eq!(steps[3].work.bytes, steps[1].work.bytes);
    }

    /// Every second step, which is measured on its own.
    #[test]
    fn steps_that_skip_blocks_do_less_work() {
        for method in [CacheMethod::FirstBlock, CacheMethod::MagCache, CacheMethod::TeaCache] {
            let sizes = StepOptions {
                width: Some(64),
                height: Some(64),
                num_frames: Some(5),
                cache: Some(method),
                ..options()
            };
            let steps = run("wan-a", &sizes);
            let expected = [
                ("encode", "24 tokens"),
                ("denoise", "batch 1, 64x64, 5 frames, 24 tokens"),
                ("denoise", "batch 1, 64x64, 5 frames, blocks skipped"),
                ("vae_decode", "64x64, 5 frames"),
            ];
            assert_eq!(names(&steps), expected, "{method:?}");
            // Two of three blocks at least.
            assert!(
                steps[2].work.flops < 0.6 * steps[1].work.flops,
                "{method:?}: {:?} {:?}",
                steps[1].work,
                steps[2].work
            );
        }
    }

    #[test]
    fn a_clip_is_decoded_in_chunks_that_count_together() {
        let sizes = |num_frames| StepOptions { width: Some(32), height: Some(32), num_frames, ..options() };
        let steps = run("wan-a", &sizes(Some(9)));
        assert_eq!(names(&steps)[2], ("vae_decode", "32x32, 9 frames"));
        let one_frame = run("wan-a", &sizes(Some(1)));
        assert!(steps[2].work.flops > 3.0 * one_frame[2].work.flops);
        // Weights are read for every chunk, but for the first one none of those that make two frames of one.
        let chunks = steps[2].work.bytes / one_frame[2].work.bytes;
        assert!((3.0..3.1).contains(&chunks), "weights are read {chunks} times for three chunks");
    }

    #[test]
    fn what_cannot_be_is_refused_before_anything_is_loaded() {
        let refused = |case: &str, options: StepOptions| match plan(case, &options) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("{case} accepts {options:?}"),
        };
        let text = refused("llama-tied", StepOptions { width: Some(64), ..options() });
        assert!(text.starts_with("width: this is a language model"), "{text}");
        let text = refused("llama-tied", StepOptions { cache: Some(CacheMethod::FirstBlock), ..options() });
        assert!(text.contains("cache: this is a language model"), "{text}");
        let text = refused("llama-tied", StepOptions { prompt_tokens: Some(1 << 20), ..options() });
        assert!(text.contains("tokens"), "{text}");
        let text = refused("flux-schnell", StepOptions { num_frames: Some(5), ..options() });
        assert!(text.starts_with("num_frames"), "{text}");
        let text = refused("flux-schnell", StepOptions { prompt_tokens: Some(4096), ..options() });
        assert!(text.starts_with("prompt_tokens: is 4096; allowed: 1 to"), "{text}");
        let text = refused("wan-a", StepOptions { batches: vec![1, 0], ..options() });
        assert!(text.starts_with("batch"), "{text}");
        let plan = plan("wan-a", &options()).expect("fits");
        let (needed, free) = (plan.needed_bytes, plan.needed_bytes - 1);
        match plan.load(&cpu(), free) {
            Err(Error::OutOfMemory { phase: None, needed_bytes, free_bytes }) => {
                assert_eq!((needed_bytes, free_bytes), (needed, free))
            }
            _ => panic!("was loaded"),
        }
    }

    #[test]
    fn a_step_is_held_against_the_roof_that_it_meets_first() {
        let roofs = Roofs { bytes_per_second: 10.0, flops_per_second: 1000.0 };
        let step = |flops, bytes| MeasuredStep {
            phase: Phase::Decode,
            shape: String::new(),
            seconds: 2.0,
            work: Work { flops, bytes },
            tokens: 0,
            roofs,
            peak_memory_bytes: 0,
        };
        let of_bytes = step(500.0, 10.0);
        assert_eq!((of_bytes.bound(), of_bytes.rate(), of_bytes.roof()), (Bound::Bytes, 5.0, 10.0));
        let of_flops = step(1500.0, 10.0);
        assert_eq!((of_flops.bound(), of_flops.rate(), of_flops.roof()), (Bound::Flops, 750.0, 1000.0));
    }
}
