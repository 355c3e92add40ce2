//! What goes into a runner and what comes out of it: ids, validated requests, events. Plain data, no tensors.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::lora::LoraUse;
pub use crate::phase::Phase;
use crate::solver::names::{Loop, Scheduler, Spacing};

/// Names one running generation inside one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// A request that has been validated against the model's card.
#[derive(Debug, Clone)]
pub enum Request {
    /// Continue a sequence of tokens.
    Text(TextRequest),
    /// Make a picture or a clip.
    Diffusion(DiffusionRequest),
}

/// Continue `prompt` by at most `max_tokens` tokens. Made by [`crate::TextCard::resolve`].
#[derive(Debug, Clone)]
pub struct TextRequest {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Most tokens to generate, at least one.
    pub max_tokens: usize,
    /// How the next token is chosen.
    pub sampling: SamplingParams,
    /// Generation ends before the first of these that appears in the text; never part of the answer.
    pub stop: Vec<String>,
    /// Go on past end-of-sequence tokens until `max_tokens`.
    pub ignore_eos: bool,
}

/// How the next token is chosen from the logits. Field names as in the OpenAI API and vLLM.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Drop tokens less likely than this times the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Subtracted once from each token that was generated.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence in the generated text.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt and answer; 1 is off.
    pub repetition_penalty: f32,
    /// The same seed gives the same tokens, whatever else is running.
    pub seed: u64,
}

impl SamplingParams {
    /// The most likely token each time, nothing penalised.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

/// Effective parameters of a picture or clip, as they are echoed. Made by [`crate::DiffusionCard::resolve`].
#[derive(Debug, Clone, PartialEq)]
pub struct DiffusionRequest {
    /// What to show.
    pub prompt: String,
    /// What to steer away from; `None` where the model or the guidance scale uses none.
    pub negative_prompt: Option<NegativePrompt>,
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Frames of a clip; 1 for a picture.
    pub num_frames: usize,
    /// Frames per second of a clip; 0 for a picture.
    pub fps: usize,
    /// Denoising steps.
    pub num_inference_steps: usize,
    /// As in diffusers: embedded guidance (FLUX.1-dev) or classifier-free guidance (SDXL, Wan).
    pub guidance_scale: f64,
    /// How the latents move from one timestep to the next.
    pub scheduler: &'static Scheduler,
    /// Which timesteps of training the scheduler visits, where that is its choice.
    pub timestep_spacing: Option<Spacing>,
    /// Share of fresh noise in the steps of DDIM and TCD, 0 to 1; `None` for the other schedulers.
    pub eta: Option<f64>,
    /// Of models whose `guidance_scale` is not that of classifier-free guidance (FLUX.1), as in diffusers: the scale of a
    /// second, negative prediction.
    pub true_cfg_scale: Option<f64>,
    /// Fractions of the steps between which the negative prediction is made; see [`DiffusionRequest::is_guided_at`].
    pub guidance_interval: [f64; 2],
    /// Whether steps may take the place of ones before them.
    pub acceleration: Acceleration,
    /// Seed of `torch.Generator("cpu")`.
    pub seed: u64,
    /// Tokens that prompts are padded or cut to; with CLIP encoders alone a multiple of their positions where it is more.
    pub max_sequence_length: usize,
    /// Low-rank terms that are added to the model's layers for this request alone.
    pub loras: Vec<LoraUse>,
    /// Whether the VAE works on tiles of the picture, where that is larger than one.
    pub vae_tiling: bool,
    /// Previews on the way; they change nothing in the picture.
    pub partial_images: usize,
    /// The picture to begin from; without it the loop begins from noise alone.
    pub edit: Option<Edit>,
    /// Pictures whose look is followed.
    pub references: Option<References>,
    /// Where the model's refiner takes the latents over; without it the model makes all steps.
    pub refinement: Option<Refinement>,
}

/// Which steps a model makes and which its refiner, by the schedules of both.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Refinement {
    /// As in diffusers: the share of the noise schedule that the model denoises.
    pub denoising_end: f64,
    /// Steps of the model, at least 1.
    pub steps_before: usize,
    /// The step of its own schedule that the refiner begins at, not the end.
    pub first_step_after: usize,
}

/// Pictures that an IP-Adapter follows.
#[derive(Debug, Clone, PartialEq)]
pub struct References {
    /// In any sizes, at least one.
    pub images: Vec<Arc<Frame>>,
    /// How much of them is followed: diffusers' scale of the adapter.
    pub scale: f64,
}

/// A picture that is made into another one.
#[derive(Debug, Clone, PartialEq)]
pub struct Edit {
    /// The picture, in the width and height of the request.
    pub image: Arc<Frame>,
    /// What is made anew, in the width and height of the request; without it everything is.
    pub mask: Option<Arc<Mask>>,
    /// How far the picture is taken back to noise: 1 all the way.
    pub strength: f64,
    /// Steps of the schedule that are left out, as follows from `strength`; fewer than there are.
    pub first_step: usize,
}

/// How much of the denoising may be left out. What it means is the card's affair
/// ([`CacheThresholds`](crate::card::CacheThresholds)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Acceleration {
    /// Everything is computed.
    #[default]
    None,
    /// Where hardly anybody sees it.
    Safe,
    /// Where it shows in details.
    Fast,
}

impl Acceleration {
    /// Its name on the wire and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Safe => "safe",
            Self::Fast => "fast",
        }
    }
}

impl std::str::FromStr for Acceleration {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        [Self::None, Self::Safe, Self::Fast]
            .into_iter()
            .find(|acceleration| acceleration.as_str() == name)
            .ok_or_else(|| Error::invalid("acceleration", "is not known; allowed: none, safe, fast"))
    }
}

/// Every step is guided.
pub const WHOLE_INTERVAL: [f64; 2] = [0.0, 1.0];

impl DiffusionRequest {
    /// Denoising steps that are made: those of the schedule but for the ones that a picture to begin from leaves out; with
    /// a refiner those of both.
    pub fn steps_made(&self) -> usize {
        if let Some(Refinement { steps_before, first_step_after, .. }) = self.refinement {
            return steps_before + self.num_inference_steps - first_step_after;
        }
        self.num_inference_steps - self.edit.as_ref().map_or(0, |edit| edit.first_step)
    }

    /// The loop of its scheduler. `image_seq_len`: tokens of the picture, of families whose sigmas depend on it.
    pub fn denoising_loop(&self, image_seq_len: Option<usize>) -> Loop {
        Loop { steps: self.num_inference_steps, timestep_spacing: self.timestep_spacing, eta: self.eta, image_seq_len }
    }

    /// How far the negative prediction, where there is one, is left behind.
    pub fn cfg_scale(&self) -> f64 {
        self.true_cfg_scale.unwrap_or(self.guidance_scale)
    }

    /// Whether step `index` (from 0 on) of `steps` makes a negative prediction: those with `start <= index / steps < end`.
    /// The others take the prediction for the prompt as it is, as a pipeline of diffusers does whose callback has
    /// switched guidance off.
    pub fn is_guided_at(&self, index: usize, steps: usize) -> bool {
        let [start, end] = self.guidance_interval;
        let fraction = index as f64 / steps as f64;
        self.negative_prompt.is_some() && start <= fraction && fraction < end
    }
}

/// What the second branch of classifier-free guidance is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NegativePrompt {
    /// The client said nothing: what that means is the family's affair (for SDXL not the same as the empty text).
    Absent,
    /// This text, possibly the empty one.
    Text(String),
}

impl NegativePrompt {
    /// What the client said, if anything.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Absent => None,
            Self::Text(text) => Some(text),
        }
    }
}

/// Why a session ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence token or a stop string.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// The picture or clip is whole.
    Complete,
}

/// What a session used, and what it did not need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated, the end-of-sequence token included.
    pub completion_tokens: usize,
    /// Of a picture or clip: predictions that the acceleration took from ones before them.
    pub skipped_passes: usize,
}

/// One picture, or one frame of a clip: 8-bit RGB, rows top to bottom, no padding.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// `height * width * 3` bytes.
    pub rgb: Vec<u8>,
}

/// From this value on a pixel of a mask is made anew (diffusers: not under one half).
pub const MASK_THRESHOLD: u8 = 128;

/// Which pixels of a picture are made anew: those of [`MASK_THRESHOLD`] and more. Rows top to bottom, no padding.
#[derive(Clone, PartialEq, Eq)]
pub struct Mask {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// `height * width` bytes.
    pub grey: Vec<u8>,
}

// Requests are printed; their pictures are not.
impl std::fmt::Debug for Frame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Frame({}x{}, {} bytes)", self.width, self.height, self.rgb.len())
    }
}

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mask({}x{}, {} bytes)", self.width, self.height, self.grey.len())
    }
}

/// What a session tells the world, in order. After `Finished` or `Failed` nothing follows.
#[derive(Debug)]
pub enum Event {
    /// The first step of the session begins.
    Started,
    /// Tokens were sampled; `text` is what became certain with them (possibly nothing yet, or the tail held back for
    /// stop strings with no new token).
    Text {
        /// New token ids.
        tokens: Vec<u32>,
        /// New text, valid UTF-8.
        text: String,
    },
    /// A diffusion phase moved on: `done` of `total` steps of that phase.
    Progress {
        /// Which phase.
        phase: Phase,
        /// Steps done.
        done: usize,
        /// Steps in all.
        total: usize,
    },
    /// How far a picture has come: a rough, small version of it. At most
    /// [`MAX_PREVIEWS`](crate::runner::diffusion::previews::MAX_PREVIEWS) of one session.
    Preview {
        /// From 0.
        index: usize,
        /// Smaller than the picture will be.
        frame: Frame,
    },
    /// Decoded frames, in order of time; a picture is one frame.
    Frames(Vec<Frame>),
    /// The session ended well and is gone from the runner.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Tokens used, or passes skipped.
        usage: Usage,
    },
    /// The session failed and is gone from the runner.
    Failed(Error),
}

impl Event {
    /// Whether nothing follows this event.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Event::Finished { .. } | Event::Failed(_))
    }
}

/// Events of one step, collected by the runner, published by whoever called `step`.
#[derive(Debug, Default)]
pub struct Events(Vec<(SessionId, Event)>);

impl Events {
    /// Adds one event.
    pub fn emit(&mut self, session: SessionId, event: Event) {
        self.0.push((session, event));
    }

    /// Takes all events, in order.
    pub fn drain(&mut self) -> impl Iterator<Item = (SessionId, Event)> + '_ {
        self.0.drain(..)
    }
}
