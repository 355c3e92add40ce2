//! A runner that follows a script instead of a model, for tests and benches of everything above the runner boundary.
//!
//! It keeps the contract of [`Runner`] to the letter (bounded steps, batches, progress, eviction) and computes nothing:
//! text answers spell [`ANSWER`] or the shortest text of their grammar, probabilities follow from
//! seeds, frames are plain gradients. What a step costs, and whether it fails, is the script's.

use crate::diffusion::acceleration::CacheSupport;
use crate::diffusion::canvas::{CanvasSupport, FrameSupport, SizeRule};
use crate::diffusion::edit::{EditDefaults, EditSupport, StepRounding};
use crate::diffusion::guidance::{GuidanceKind, GuidanceSupport};
use crate::diffusion::keyframes::KeyframeSupport;
use crate::diffusion::prompt::Prompts;
use crate::diffusion::sampling::SamplingSupport;
use crate::diffusion::{DiffusionCard, DiffusionRequest, Medium};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::card::{ModelCard, SamplingDefaults, TextCard};
use crate::chat_template::ChatTemplates;
use crate::checkpoint::STEP_BYTES;
use crate::error::{Error, Result};
use crate::family::LoadedModel;
use crate::grammar::{Grammars, Matching};
use crate::kv::KvShape;
use crate::memory::MemoryPlan;
use crate::request::{
    ClientId, Event, Events, FinishReason, Frame, Phase, PlacedLogprobs, Request, SessionId, TextRequest,
    TokenLogprobs, Usage,
};
use crate::runner::diffusion::previews::due_preview;
use crate::runner::{Runner, RunnerStatus, StepPlan};
use crate::session_checkpoint::fields::Writer;
use crate::session_checkpoint::{Identity, Refusal, SessionCheckpoint, digest_of};
use crate::solver::config::SchedulerConfig;
use crate::solver::names::Scheduler;
use crate::solver::schedulers::{Schedulers, Training};
use crate::tokenizer::{Tokenizer, bytes};

/// The root of the repository, for what tests read from it. Asked when a test runs and not when it is compiled:
/// `scripts/gpu-check` runs test binaries beside a copy of their files, on a machine without cargo.
///
/// # Panics
///
/// Where neither cargo nor `scripts/gpu-check` started the test.
pub fn repository() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR for tests");
    Path::new(&package).join("..")
}

/// What scripted text models say, one byte per token, from the byte at `seed % len` on and then around; without
/// `ignore_eos` they stop after one round.
pub const ANSWER: &str = "a boat sails to the quiet island; ";
/// Frames of one scripted VAE step.
pub const FRAMES_PER_DECODE: usize = 4;
/// Context of the scripted text model.
pub const MAX_CONTEXT: usize = 4096;

/// Called in each step before its events are emitted, with the plan and the sessions: may wait, fail or panic.
pub type OnStep = Box<dyn FnMut(StepPlan, &[SessionId]) -> Result<()> + Send>;

/// What a scripted model costs.
pub struct Script {
    /// Most sessions of one step.
    pub max_batch: usize,
    /// Most sessions that it holds.
    pub max_sessions: usize,
    /// Bytes that each session reserves.
    pub footprint_bytes: usize,
    /// Bytes of text encoders on demand, read by each image and video in steps of at most [`STEP_BYTES`]; 0 where they are
    /// there.
    pub encoder_bytes: usize,
    /// Names the weights that its checkpoints are of.
    pub weights: u8,
    /// Bytes that its denoising steps borrow.
    pub borrowed_bytes: usize,
    /// What the first half of a step does.
    pub on_launch: Box<dyn FnMut() + Send>,
    /// See [`OnStep`].
    pub on_step: OnStep,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            max_batch: 64,
            max_sessions: 1024,
            footprint_bytes: 0,
            encoder_bytes: 0,
            weights: 0,
            borrowed_bytes: 0,
            on_launch: Box::new(|| ()),
            on_step: Box::new(|_, _| Ok(())),
        }
    }
}

/// A text model with a byte tokenizer, a small chat template and a context of [`MAX_CONTEXT`].
pub fn text_model(script: Script) -> Result<LoadedModel> {
    let folder = tempfile::tempdir().map_err(|error| Error::checkpoint(std::env::temp_dir(), error))?;
    bytes::write(folder.path(), bytes::Around::Nothing)?;
    let tokenizer = Tokenizer::from_dir(folder.path())?;
    let end = tokenizer.eos_token_id();
    let card = TextCard {
        family: "scripted",
        kv_bytes_per_token: 0,
        kv_shape: KvShape { num_layers: 0, num_key_value_heads: 0, head_dim: 0 },
        max_context: MAX_CONTEXT,
        vocab_size: bytes::VOCAB_SIZE,
        grammars: Grammars::new(tokenizer.clone(), bytes::VOCAB_SIZE, end.as_slice()),
        tokenizer,
        chat_template: ChatTemplates::from_dir(folder.path())?,
        defaults: SamplingDefaults::default(),
        tool_format: None,
    };
    Ok(loaded(ModelCard::Text(card), script))
}

/// A picture model: 64x64 by default, four steps, no guidance, also from pictures.
pub fn picture_model(script: Script) -> LoadedModel {
    loaded(ModelCard::Diffusion(diffusion_card(Medium::Image)), script)
}

/// A clip model: 64x64, nine frames at 8 per second by default, four steps, classifier-free guidance.
pub fn clip_model(script: Script) -> LoadedModel {
    loaded(ModelCard::Diffusion(diffusion_card(Medium::Video)), script)
}

/// A clip model as [`clip_model`] that goes from pictures: its clips begin, and where it says so end, with theirs.
pub fn clip_model_from_pictures(script: Script, keyframes: KeyframeSupport) -> LoadedModel {
    let card = DiffusionCard { keyframes: Some(keyframes), ..diffusion_card(Medium::Video) };
    loaded(ModelCard::Diffusion(card), script)
}

fn loaded(card: ModelCard, script: Script) -> LoadedModel {
    LoadedModel { card, runner: Box::new(ScriptedRunner::new(script)), resident_bytes: 0, widened_bytes: 0 }
}

fn diffusion_card(medium: Medium) -> DiffusionCard {
    let prompts = Prompts::Plain { default_length: 64, max_length: 128 };
    let frames = FrameSupport {
        default_num_frames: 9,
        default_fps: 8,
        multiple: 4,
        max_frames: 81,
        trained_frames: 33,
        has_one_length: false,
    };
    let canvas = CanvasSupport {
        default_width: 64,
        default_height: 64,
        size_multiple: 16,
        max_side: 512,
        max_pixels: 256 * 256,
        sizes: SizeRule::AspectOfPicture,
        frames: (medium == Medium::Video).then_some(frames),
    };
    let (schedulers, kind, default_scale) = match medium {
        Medium::Image => (discrete_schedulers(), GuidanceKind::None, 0.0),
        Medium::Video => (flow_schedulers(), GuidanceKind::ClassifierFree, 5.0),
    };
    let sampling = SamplingSupport { default_steps: 4, schedulers };
    let guidance = GuidanceSupport::constant(kind, default_scale).of_flow();
    let card = DiffusionCard::new("scripted", prompts, canvas, sampling, guidance);
    let card = DiffusionCard { acceleration: Some(CacheSupport { published: None }), ..card };
    match medium {
        Medium::Image => {
            DiffusionCard { edits: Some(EDITS), has_ip_adapter: true, refiner: Some(discrete_schedulers()), ..card }
        }
        Medium::Video => card,
    }
}

/// Both kinds, with half of the steps.
const EDITS: EditSupport = {
    let defaults = EditDefaults { strength: 0.5, guidance_scale: 0.0 };
    EditSupport {
        image_to_image: Some(defaults),
        inpainting: Some(defaults),
        rounding: StepRounding::Taken,
        is_needed: false,
    }
};

/// Those of a clip model without a configuration of its own.
pub fn flow_schedulers() -> Schedulers {
    schedulers("FlowMatchEulerDiscreteScheduler", Training::Flow)
}

/// Those of a picture model on a discrete noise schedule without a configuration of its own.
pub fn discrete_schedulers() -> Schedulers {
    schedulers("EulerDiscreteScheduler", Training::Discrete)
}

/// Those of a model on a schedule with a shifted signal-to-noise ratio, without a configuration of its own.
pub fn shifted_schedulers() -> Schedulers {
    schedulers("CogVideoXDDIMScheduler", Training::Shifted)
}

fn schedulers(class_name: &str, training: Training) -> Schedulers {
    let own = Scheduler::named(class_name).expect("a class of the table");
    Schedulers::new(own, &SchedulerConfig::default(), training).expect("diffusers' defaults are supported")
}

/// A checkpoint of nothing but this, for tests of what carries it.
pub fn checkpoint_of(frames_done: usize) -> SessionCheckpoint {
    SessionCheckpoint::seal(&identity(0), [0; 32], frames_done, &Writer::default())
}

fn identity(weights: u8) -> Identity {
    Identity { weights: [weights; 32], device: "a script".to_owned() }
}

/// Predictions that a scripted session says to have skipped where it may.
pub const SKIPPED_PASSES: usize = 2;

/// Follows a [`Script`].
pub struct ScriptedRunner {
    script: Script,
    sessions: BTreeMap<SessionId, Scripted>,
    /// The sessions of the step that is being taken, or that failed.
    stepping: Vec<SessionId>,
}

struct Scripted {
    request: Request,
    matching: Option<Matching>,
    phase: Phase,
    /// Steps done of `phase`; for decode, tokens.
    done: usize,
    begun: bool,
    is_paused: bool,
}

impl ScriptedRunner {
    /// A runner without sessions.
    pub fn new(script: Script) -> Self {
        Self { script, sessions: BTreeMap::new(), stepping: Vec::new() }
    }

    /// The next batch: the phase of the session that has come least far, and those that share it.
    fn batch(&self) -> Option<(Phase, Vec<SessionId>)> {
        let ready = self.sessions.iter().filter(|(_, session)| !session.is_paused);
        let phase = ready.clone().map(|(_, session)| session.phase).min()?;
        let same = ready.filter(|(_, session)| session.phase == phase);
        Some((phase, same.map(|(id, _)| *id).take(self.script.max_batch).collect()))
    }

    fn step_of(&self, phase: Phase, sessions: &[SessionId]) -> StepPlan {
        let amount = |id: &SessionId| match &self.sessions[id].request {
            Request::Text(request) if phase == Phase::Prefill => request.prompt.len() as f64,
            Request::Text(_) => 1.0,
            Request::Diffusion(request) if phase == Phase::Denoise => request.step_amount(),
            Request::Diffusion(_) => 0.0,
        };
        StepPlan { phase, sessions: sessions.len(), amount: sessions.iter().map(amount).sum() }
    }
}

impl Runner for ScriptedRunner {
    fn plan(&self, request: &Request) -> MemoryPlan {
        let phase = match request {
            Request::Text(_) => Phase::Prefill,
            Request::Diffusion(_) => Phase::Denoise,
        };
        MemoryPlan::new([(phase, self.script.footprint_bytes)])
    }

    fn submit_for(&mut self, _client: ClientId, session: SessionId, request: Request) -> Result<()> {
        let phase = match request {
            Request::Text(_) => Phase::Prefill,
            Request::Diffusion(_) if self.script.encoder_bytes > 0 => Phase::Load,
            Request::Diffusion(_) => Phase::Encode,
        };
        let matching = match &request {
            Request::Text(request) => request.grammar.as_ref().map(|grammar| grammar.begin()),
            Request::Diffusion(_) => None,
        };
        self.sessions.insert(session, Scripted { request, matching, phase, done: 0, begun: false, is_paused: false });
        Ok(())
    }

    fn max_sessions(&self) -> usize {
        self.script.max_sessions
    }

    fn cancel(&mut self, session: SessionId) {
        self.sessions.remove(&session);
    }

    fn take_back(&mut self, session: SessionId) -> Option<Request> {
        match self.sessions.get(&session)?.begun {
            true => None,
            false => self.sessions.remove(&session).map(|session| session.request),
        }
    }

    fn pause(&mut self, session: SessionId) {
        self.sessions.entry(session).and_modify(|session| session.is_paused = true);
    }

    fn unpause(&mut self, session: SessionId) {
        self.sessions.entry(session).and_modify(|session| session.is_paused = false);
    }

    fn checkpoint(&mut self, session: SessionId) -> Result<Option<Arc<SessionCheckpoint>>> {
        let Some(Scripted { request: Request::Diffusion(request), phase, done, .. }) = self.sessions.get(&session)
        else {
            return Ok(None);
        };
        let frames_done = match phase {
            Phase::Denoise => 0,
            Phase::VaeDecode => (done * FRAMES_PER_DECODE).min(request.canvas.num_frames),
            _ => return Ok(None),
        };
        let mut state = Writer::default();
        state.flag(*phase == Phase::VaeDecode);
        state.count(*done);
        let identity = identity(self.script.weights);
        Ok(Some(Arc::new(SessionCheckpoint::seal(&identity, digest_of(request), frames_done, &state))))
    }

    fn resume_for(
        &mut self,
        client: ClientId,
        session: SessionId,
        request: Request,
        checkpoint: Arc<SessionCheckpoint>,
    ) -> Result<()> {
        let Request::Diffusion(diffusion) = &request else { return Err(Refusal::Unsupported.into()) };
        let mut state = checkpoint.state_for(&identity(self.script.weights), digest_of(diffusion))?;
        let phase = if state.flag()? { Phase::VaeDecode } else { Phase::Denoise };
        let done = state.count()?;
        state.end()?;
        let (total, _) = steps_of(phase, diffusion, 0);
        if done >= total {
            return Err(Refusal::State("more steps than there are").into());
        }
        self.submit_for(client, session, request)?;
        self.sessions.entry(session).and_modify(|session| (session.phase, session.done) = (phase, done));
        Ok(())
    }

    fn next(&self) -> Option<StepPlan> {
        self.batch().map(|(phase, sessions)| self.step_of(phase, &sessions))
    }

    fn borrowed_bytes(&self) -> usize {
        match self.batch() {
            Some((Phase::Denoise, _)) => self.script.borrowed_bytes,
            _ => 0,
        }
    }

    fn evict_next(&mut self) -> Vec<SessionId> {
        self.stepping = self.batch().map_or(Vec::new(), |(_, batch)| batch);
        self.evict_step()
    }

    fn launch(&mut self) -> Result<()> {
        (self.script.on_launch)();
        Ok(())
    }

    fn collect(&mut self, events: &mut Events) -> Result<StepPlan> {
        let (phase, batch) = self.batch().ok_or_else(|| Error::Device("a step without work".into()))?;
        let plan = self.step_of(phase, &batch);
        self.stepping = batch;
        (self.script.on_step)(plan, &self.stepping)?;
        for id in std::mem::take(&mut self.stepping) {
            let Some(session) = self.sessions.get_mut(&id) else { continue };
            if session.advance(id, self.script.encoder_bytes, events) {
                self.sessions.remove(&id);
            }
        }
        Ok(plan)
    }

    fn evict_step(&mut self) -> Vec<SessionId> {
        let evicted = std::mem::take(&mut self.stepping);
        evicted.iter().for_each(|id| drop(self.sessions.remove(id)));
        evicted
    }

    fn status(&self) -> RunnerStatus {
        let running = self.sessions.values().filter(|session| session.begun).count();
        RunnerStatus { running, waiting: self.sessions.len() - running, ..RunnerStatus::default() }
    }
}

impl Scripted {
    /// One step; true when the session has ended.
    fn advance(&mut self, id: SessionId, encoder_bytes: usize, events: &mut Events) -> bool {
        if !self.begun {
            self.begun = true;
            events.emit(id, Event::Started);
        }
        self.done += 1;
        let finished = match &self.request {
            Request::Text(request) => {
                self.phase = Phase::Decode;
                match &mut self.matching {
                    Some(matching) => advance_held(self.done, matching, request, |e| events.emit(id, e)),
                    None => advance_text(self.done, request, |e| events.emit(id, e)),
                }
            }
            Request::Diffusion(request) => {
                let loading = encoder_bytes.div_ceil(STEP_BYTES);
                advance_diffusion(&mut self.phase, &mut self.done, request, loading, |e| events.emit(id, e))
            }
        };
        if let Some((reason, usage)) = finished {
            events.emit(id, Event::Finished { reason, usage });
        }
        finished.is_some()
    }
}

/// The prompt is one step, which gives the first token; each further step gives one. A prompt with a salt is said to have been
/// there before.
fn advance_text(done: usize, request: &TextRequest, mut emit: impl FnMut(Event)) -> Option<(FinishReason, Usage)> {
    let start = request.sampling.seed as usize % ANSWER.len();
    let byte = ANSWER.as_bytes()[(start + done - 1) % ANSWER.len()];
    let prompt_tokens = request.prompt.len();
    let cached_tokens = Some(request.cache_salt.as_ref().map_or(0, |_| prompt_tokens - 1));
    if let (1, Some(top)) = (done, request.prompt_logprobs) {
        emit(Event::Prompt(request.prompt[1..].iter().map(|token| logprobs(*token, 1, top)).collect()));
    }
    if request.max_tokens == 0 {
        let usage = Usage { prompt_tokens, cached_tokens, ..Usage::default() };
        return Some((FinishReason::Length, usage));
    }
    emit(said(done, byte, request));
    let usage = Usage { prompt_tokens, cached_tokens, completion_tokens: done, ..Usage::default() };
    if done == ANSWER.len() && !request.ignore_eos {
        return Some((FinishReason::Stop, usage));
    }
    (done == request.max_tokens).then_some((FinishReason::Length, usage))
}

/// Token `done` of an answer.
fn said(done: usize, byte: u8, request: &TextRequest) -> Event {
    let token = u32::from(byte);
    let eighths = 1 + request.sampling.seed % 8;
    let told = request.logprobs.map(|top| PlacedLogprobs { offset: done - 1, logprobs: logprobs(token, eighths, top) });
    Event::Text { tokens: vec![token], text: char::from(byte).to_string(), logprobs: told.into_iter().collect() }
}

/// A token is so many eighths below certain, and what comes after it in the vocabulary is each a whole less likely.
fn logprobs(token: u32, eighths: u64, top: usize) -> TokenLogprobs {
    let logprob = -(eighths as f32) / 8.0;
    let next = |place: usize| (token + place as u32, logprob - place as f32);
    TokenLogprobs { token, logprob, top: (0..top).map(next).collect() }
}

/// The same of an answer that is held to a grammar: of the bytes that may come, the one that is nearest to its end.
fn advance_held(
    done: usize,
    matching: &mut Matching,
    request: &TextRequest,
    mut emit: impl FnMut(Event),
) -> Option<(FinishReason, Usage)> {
    let usage = Usage {
        prompt_tokens: request.prompt.len(),
        completion_tokens: done,
        cached_tokens: Some(0),
        ..Usage::default()
    };
    let allowed = matching.mask().expect("a grammar of bytes always goes on");
    let ends = (256..bytes::VOCAB_SIZE as u32).chain([b'}', b']', b'"'].map(u32::from));
    let token = ends.chain(0x21..0x7f).chain(0..256).find(|token| allowed.allows(*token)).expect("some byte may come");
    let Some(byte) = u8::try_from(token).ok() else { return Some((FinishReason::Stop, usage)) };
    emit(said(done, byte, request));
    if matching.accept(token).expect("it was allowed") {
        return Some((FinishReason::Stop, usage));
    }
    (done == request.max_tokens).then_some((FinishReason::Length, usage))
}

fn advance_diffusion(
    phase: &mut Phase,
    done: &mut usize,
    request: &DiffusionRequest,
    load_steps: usize,
    mut emit: impl FnMut(Event),
) -> Option<(FinishReason, Usage)> {
    let (total, next) = steps_of(*phase, request, load_steps);
    let seed = request.sampling.seed;
    emit(Event::Progress { phase: *phase, done: *done, total });
    if *phase == Phase::Denoise {
        // An eighth of the size, as from latents.
        let size = (request.canvas.width / 8, request.canvas.height / 8);
        let index = due_preview(*done, total, request.partial_images);
        index.into_iter().for_each(|index| emit(Event::Preview { index, frame: gradient(size, seed, 0) }));
    }
    if *phase == Phase::VaeDecode {
        let first = (*done - 1) * FRAMES_PER_DECODE;
        let last = (first + FRAMES_PER_DECODE).min(request.canvas.num_frames);
        emit(Event::Frames((first..last).map(|index| frame(request, index)).collect()));
        let skipped_passes = request.cache.as_ref().map_or(0, |_| SKIPPED_PASSES);
        return (*done == total).then_some((FinishReason::Complete, Usage { skipped_passes, ..Usage::default() }));
    }
    if *done == total {
        (*phase, *done) = (next, 0);
    }
    None
}

/// Steps of a phase, and what comes after it.
fn steps_of(phase: Phase, request: &DiffusionRequest, load_steps: usize) -> (usize, Phase) {
    match phase {
        Phase::Load => (load_steps, Phase::Encode),
        Phase::Encode => (1, Phase::Denoise),
        Phase::Denoise => (request.sampling.num_inference_steps, Phase::VaeDecode),
        _ => (request.canvas.num_frames.div_ceil(FRAMES_PER_DECODE), Phase::VaeDecode),
    }
}

/// A frame of a clip: a picture that the request gives for it, or a gradient.
fn frame(request: &DiffusionRequest, index: usize) -> Frame {
    let given = request.keyframes.as_ref().and_then(|keyframes| match index {
        0 => Some(&keyframes.first),
        _ if index + 1 == request.canvas.num_frames => keyframes.last.as_ref(),
        _ => None,
    });
    match given {
        Some(keyframe) => keyframe.fitted.as_ref().clone(),
        None => gradient((request.canvas.width, request.canvas.height), request.sampling.seed, index),
    }
}

/// Red grows to the right, green downwards, blue is the seed's and moves with time.
fn gradient((width, height): (usize, usize), seed: u64, index: usize) -> Frame {
    let blue = (seed as usize + index * 8) % 256;
    let pixels = (0..height).flat_map(|y| (0..width).map(move |x| [x * 255 / width, y * 255 / height, blue]));
    Frame { width, height, rgb: pixels.flatten().map(|value| value as u8).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::parameters::PROMPT;
    use crate::parameter::Options;

    #[test]
    fn a_clip_is_encoded_denoised_decoded_and_complete() {
        let LoadedModel { card: ModelCard::Diffusion(card), mut runner, .. } = clip_model(Script::default()) else {
            panic!("the clip model has a diffusion card");
        };
        let request = card.resolve(&Options::default().with(&PROMPT, "x".to_owned()), 0).expect("valid");
        runner.submit(SessionId(1), Request::Diffusion(request)).expect("accepted");
        let mut events = Events::default();
        let (mut phases, mut frames) = (Vec::new(), 0);
        while runner.next().is_some() {
            phases.push(runner.step(&mut events).expect("the script does not fail").phase);
            for (_, event) in events.drain() {
                frames += if let Event::Frames(new) = event { new.len() } else { 0 };
            }
        }
        let (e, d, v) = (Phase::Encode, Phase::Denoise, Phase::VaeDecode);
        assert_eq!((phases, frames), (vec![e, d, d, d, d, v, v, v], 9));
        assert_eq!(runner.status(), RunnerStatus::default());
    }
}
