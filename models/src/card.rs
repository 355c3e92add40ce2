//! What a loaded model tells the server about itself: limits, defaults, tokenizer. Shared, immutable, no tensors.
//!
//! A card turns what a client asked for (all fields optional) into a validated request; everything that a client can
//! get wrong is found here, before the device thread hears of it.

use std::sync::Arc;

use crate::chat_template::{ChatMessage, ChatTemplate};
use crate::diffusion::{self, Canvas, Prompt, Sampling};
use crate::diffusion::{
    Acceleration, DiffusionRequest, Edit, NegativePrompt, References, Refinement, guidance::WHOLE_INTERVAL,
};
use crate::encoders::clip_chunks::ChunkRule;
use crate::error::{Error, Result};
use crate::lora::{LoraOption, LoraSupport};
use crate::memory::VaeTiling;
use crate::prompt::plain_text;
use crate::request::{Frame, Mask, SamplingParams, TextRequest};
use crate::resample::Filter;
use crate::runner::diffusion::previews::MAX_PREVIEWS;
use crate::solver::names::{Scheduler, Spacing};
use crate::solver::schedulers::{Chosen, Schedulers};
use crate::tokenizer::Tokenizer;

mod sampling_defaults;
#[cfg(test)]
mod tests;

pub use sampling_defaults::SamplingDefaults;

/// Card of a loaded model.
#[derive(Debug)]
// One per model, shared behind a pointer: its size does not matter.
#[allow(clippy::large_enum_variant)]
pub enum ModelCard {
    /// A language model.
    Text(TextCard),
    /// A picture or clip model.
    Diffusion(DiffusionCard),
}

impl ModelCard {
    /// The card of a model on a device that has so many bytes for work beside all weights.
    pub fn with_room(self, room_bytes: usize) -> Self {
        match self {
            Self::Text(card) => Self::Text(card),
            Self::Diffusion(card) => Self::Diffusion(DiffusionCard { room_bytes, ..card }),
        }
    }

    /// Whether a request that says no more than it must is valid: whether the model's own defaults are.
    pub fn check_defaults(&self) -> Result<()> {
        match self {
            Self::Text(card) => card.resolve(vec![0], TextOptions::default(), 0).map(|_| ()),
            Self::Diffusion(card) if card.edits.is_needed => Ok(()),
            Self::Diffusion(card) => card.resolve(card.plainest(), 0).map(|_| ()),
        }
    }
}

/// Card of a language model.
#[derive(Debug)]
pub struct TextCard {
    /// Family name, as in the table of families.
    pub family: &'static str,
    /// Most tokens of prompt and answer together.
    pub max_context: usize,
    /// Bytes that one token takes in the KV cache.
    pub kv_bytes_per_token: usize,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Messages to text; base models have none.
    pub chat_template: Option<ChatTemplate>,
    /// Sampling defaults of `generation_config.json`.
    pub defaults: SamplingDefaults,
}

/// What a client may say about a text generation; absent fields take the model's defaults.
#[derive(Debug, Clone, Default)]
pub struct TextOptions {
    /// Most tokens to generate; the rest of the context when absent.
    pub max_tokens: Option<usize>,
    /// 0 to 2.
    pub temperature: Option<f32>,
    /// 0 to 1; 0 is the most likely token.
    pub top_p: Option<f32>,
    /// 0 is off.
    pub top_k: Option<usize>,
    /// 0 to 1.
    pub min_p: Option<f32>,
    /// -2 to 2.
    pub presence_penalty: Option<f32>,
    /// -2 to 2.
    pub frequency_penalty: Option<f32>,
    /// Above 0, at most 2.
    pub repetition_penalty: Option<f32>,
    /// Any; drawn by the caller when absent.
    pub seed: Option<u64>,
    /// At most [`MAX_STOP_STRINGS`], none empty.
    pub stop: Vec<String>,
    /// Go on past end-of-sequence tokens.
    pub ignore_eos: bool,
}

/// Most stop strings of one request.
pub const MAX_STOP_STRINGS: usize = 16;

impl TextCard {
    /// Tokens of a conversation, ready for the model's answer.
    pub fn encode_chat(&self, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        if messages.is_empty() {
            return Err(Error::invalid("messages", "is empty; at least one message is needed"));
        }
        let template = self
            .chat_template
            .as_ref()
            .ok_or_else(|| Error::invalid("messages", "this model has no chat template; use /v1/completions"))?;
        // The template writes the special tokens itself.
        self.tokenizer.encode(&template.render(messages)?, false)
    }

    /// Tokens of a plain prompt, with the special tokens that the tokenizer adds.
    pub fn encode_prompt(&self, prompt: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(prompt, true)
    }

    /// Validates everything and fills in defaults. `fallback_seed` is used when the client gave none.
    pub fn resolve(&self, prompt: Vec<u32>, options: TextOptions, fallback_seed: u64) -> Result<TextRequest> {
        if prompt.is_empty() {
            return Err(Error::invalid("prompt", "has no tokens"));
        }
        if let Some(token) = prompt.iter().find(|token| **token as usize >= self.vocab_size) {
            let problem = format!("holds token {token}; this model's vocabulary ends at {}", self.vocab_size - 1);
            return Err(Error::invalid("prompt", problem));
        }
        if prompt.len() >= self.max_context {
            return Err(Error::ContextLength { prompt_tokens: prompt.len(), limit: self.max_context - 1 });
        }
        if options.stop.len() > MAX_STOP_STRINGS || options.stop.iter().any(String::is_empty) {
            return Err(Error::invalid("stop", format!("takes at most {MAX_STOP_STRINGS} strings, none empty")));
        }
        let room = self.max_context - prompt.len();
        let max_tokens = options.max_tokens.unwrap_or(room);
        if max_tokens == 0 || max_tokens > room {
            let problem = format!("is {max_tokens}; allowed: 1 to {room} with this prompt of {} tokens", prompt.len());
            return Err(Error::invalid("max_tokens", problem));
        }
        Ok(TextRequest {
            prompt,
            max_tokens,
            sampling: self.sampling(&options, fallback_seed)?,
            stop: options.stop,
            ignore_eos: options.ignore_eos,
        })
    }

    fn sampling(&self, options: &TextOptions, fallback_seed: u64) -> Result<SamplingParams> {
        options.check()?;
        let defaults = &self.defaults;
        // `do_sample: false` makes greedy the default, as in transformers; a client's own temperature still samples.
        let greedy_by_default = defaults.do_sample == Some(false);
        let default_temperature = if greedy_by_default { 0.0 } else { defaults.temperature.unwrap_or(1.0) };
        Ok(SamplingParams {
            temperature: options.temperature.unwrap_or(default_temperature),
            top_p: options.top_p.or(defaults.top_p).unwrap_or(1.0),
            top_k: options.top_k.or(defaults.top_k).unwrap_or(0),
            min_p: options.min_p.or(defaults.min_p).unwrap_or(0.0),
            presence_penalty: options.presence_penalty.unwrap_or(0.0),
            frequency_penalty: options.frequency_penalty.unwrap_or(0.0),
            repetition_penalty: options.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
            seed: options.seed.unwrap_or(fallback_seed),
        })
    }
}

impl TextOptions {
    /// Refuses numbers outside of the ranges of requests. A model's own defaults may lie outside of these.
    fn check(&self) -> Result<()> {
        let ranges = [
            ("temperature", self.temperature, 0.0, 2.0),
            // 0 is the most likely token alone, as 0 of OpenAI's range.
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
        ];
        for (field, value, least, most) in ranges {
            if let Some(value) = value {
                check_range(field, value, least, most)?;
            }
        }
        match self.repetition_penalty {
            Some(penalty) => check_above("repetition_penalty", penalty, 0.0, 2.0),
            None => Ok(()),
        }
    }
}

/// Card of a picture or clip model.
#[derive(Debug, Clone)]
pub struct DiffusionCard {
    /// Family name, as in the table of families.
    pub family: &'static str,
    /// What it makes.
    pub medium: Medium,
    /// The model's own defaults.
    pub defaults: DiffusionDefaults,
    /// Width and height must be multiples of this.
    pub size_multiple: usize,
    /// Largest width and height.
    pub max_side: usize,
    /// Most pixels of one frame.
    pub max_pixels: usize,
    /// Most frames of a clip; `num_frames` must be `frames_multiple * k + 1`.
    pub max_frames: usize,
    /// See `max_frames`; 1 for pictures.
    pub frames_multiple: usize,
    /// Largest `max_sequence_length`.
    pub max_sequence_length: usize,
    /// What the text encoders make of prompts.
    pub prompts: Prompts,
    /// How guidance enters.
    pub guidance: Guidance,
    /// Which LoRAs there are to choose from.
    pub loras: LoraSupport,
    /// The solvers that the checkpoint can be sampled with.
    pub schedulers: Schedulers,
    /// When the VAE works in tiles; `None` where it has none.
    pub vae_tiling: Option<VaeTiling>,
    /// Whether it follows reference pictures.
    pub has_ip_adapter: bool,
    /// Bytes that the device has for work beside all weights; no bound until whoever loads the models says so.
    pub room_bytes: usize,
    /// What `acceleration` means; `None` where nothing can be skipped.
    pub acceleration: Option<CacheThresholds>,
    /// How it makes pictures from pictures.
    pub edits: Edits,
    /// The solvers of its refiner, where it is served with one.
    pub refiner: Option<Schedulers>,
}

/// Of a first-block cache: how much of what the first block adds may be new in a pass whose other blocks are skipped
/// ([`BlockCache`](crate::runner::diffusion::block_cache::BlockCache)).
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub struct CacheThresholds {
    pub safe: f64,
    pub fast: f64,
}

/// How a model makes pictures from pictures; by default not at all.
#[derive(Debug, Clone, Copy, Default)]
pub struct Edits {
    /// From a whole picture.
    pub image_to_image: Option<EditDefaults>,
    /// From a picture and a mask.
    pub inpainting: Option<EditDefaults>,
    /// How a share of the steps becomes a number of steps.
    pub rounding: StepRounding,
    /// Whether it makes nothing without a picture.
    pub is_needed: bool,
}

/// What takes the place of a model's defaults where a picture is given. Units as in [`DiffusionRequest`].
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct EditDefaults {
    pub strength: f64,
    pub guidance_scale: f64,
}

/// How `strength` times the steps becomes a number of steps: the pipelines of diffusers differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StepRounding {
    /// The steps that are taken are cut to a whole number (SDXL).
    #[default]
    Taken,
    /// The steps that are left out are (FLUX.1).
    LeftOut,
}

impl StepRounding {
    /// Of `steps`, how many are left out.
    fn first_step(self, steps: usize, strength: f64) -> usize {
        let taken = (steps as f64 * strength).min(steps as f64);
        match self {
            Self::Taken => steps - taken as usize,
            Self::LeftOut => (steps as f64 - taken) as usize,
        }
    }
}

/// What a diffusion model makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    /// One frame.
    Picture,
    /// Frames in time.
    Clip,
}

/// What a model's text encoders make of prompts.
#[derive(Debug, Clone)]
pub enum Prompts {
    /// Text, padded or cut to `max_sequence_length`; weights are refused.
    Plain,
    /// Text with weights, in as many chunks as it fills where the client gave no `max_sequence_length`.
    Chunked(ChunkRule),
}

/// How `guidance_scale` enters a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guidance {
    /// Not at all (timestep-distilled models): only 0 is accepted. A negative prompt is heard at `true_cfg_scale`.
    None,
    /// As an input of the transformer. A negative prompt is heard at `true_cfg_scale`.
    Embedded,
    /// By a second, negative prediction when the scale is above 1.
    ClassifierFree,
}

impl Guidance {
    /// The field that scales the negative prediction.
    fn cfg_field(self) -> &'static str {
        match self {
            Self::None | Self::Embedded => "true_cfg_scale",
            Self::ClassifierFree => "guidance_scale",
        }
    }
}

/// Defaults of a diffusion model. Units as in [`DiffusionRequest`].
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct DiffusionDefaults {
    pub width: usize,
    pub height: usize,
    pub num_frames: usize,
    pub fps: usize,
    pub num_inference_steps: usize,
    pub guidance_scale: f64,
    pub max_sequence_length: usize,
}

/// What a client may say about a picture or clip; absent fields take the model's defaults.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)]
pub struct DiffusionOptions {
    pub prompt: String,
    pub negative_prompt: Option<String>,
    pub width: Option<usize>,
    pub height: Option<usize>,
    pub num_frames: Option<usize>,
    pub fps: Option<usize>,
    pub num_inference_steps: Option<usize>,
    pub guidance_scale: Option<f64>,
    pub scheduler: Option<String>,
    pub timestep_spacing: Option<Spacing>,
    pub eta: Option<f64>,
    pub true_cfg_scale: Option<f64>,
    pub guidance_interval: Option<[f64; 2]>,
    pub acceleration: Option<Acceleration>,
    pub seed: Option<u64>,
    pub max_sequence_length: Option<usize>,
    pub partial_images: Option<usize>,
    /// Whether the VAE works in tiles; absent: where the memory plan needs them.
    pub vae_tiling: Option<bool>,
    /// Pictures whose look is followed, in any sizes.
    pub reference_images: Vec<Arc<Frame>>,
    pub ip_adapter_scale: Option<f64>,
    pub loras: Vec<LoraOption>,
    /// In any size.
    pub image: Option<Arc<Frame>>,
    /// In the size of `image`.
    pub mask: Option<Arc<Mask>>,
    pub strength: Option<f64>,
    /// Where the refiner takes over.
    pub denoising_end: Option<f64>,
}

/// Most denoising steps of one request.
pub const MAX_INFERENCE_STEPS: usize = 1000;
/// Largest guidance scale.
pub const MAX_GUIDANCE_SCALE: f64 = 100.0;
/// Most reference pictures of one request.
pub const MAX_REFERENCE_IMAGES: usize = 8;
/// Most pixels of all of them together.
pub const MAX_REFERENCE_PIXELS: usize = 1 << 25;
/// As diffusers loads an adapter.
pub const DEFAULT_IP_ADAPTER_SCALE: f64 = 1.0;
/// Longest prompt or negative prompt: far more than any text encoder hears, and little enough to be read in no time.
pub const MAX_PROMPT_BYTES: usize = 64 << 10;
/// Highest frame rate.
pub const MAX_FPS: usize = 120;

impl DiffusionCard {
    /// What the plainest request asks for: nothing, but a scheduler where the model has none of its own.
    pub fn plainest(&self) -> DiffusionOptions {
        let first = || self.schedulers.iter().next().map(|scheduler| scheduler.name.to_owned());
        let scheduler = if self.schedulers.own().is_none() { first() } else { None };
        DiffusionOptions { scheduler, ..DiffusionOptions::default() }
    }

    /// Validates everything and fills in defaults. `fallback_seed` is used when the client gave none. Resizes an input
    /// picture, which takes time.
    pub fn resolve(&self, options: DiffusionOptions, fallback_seed: u64) -> Result<DiffusionRequest> {
        check_bytes("prompt", &options.prompt)?;
        check_bytes("negative_prompt", options.negative_prompt.as_deref().unwrap_or_default())?;
        let max_sequence_length = self.prompt_length(&options)?;
        let edit_defaults = self.edit_defaults(&options)?;
        let mut defaults = self.defaults;
        if let (Some(edit), Some(image)) = (edit_defaults, &options.image) {
            // As diffusers: the picture's own size, down to what the model can do.
            defaults.width = image.width - image.width % self.size_multiple;
            defaults.height = image.height - image.height % self.size_multiple;
            defaults.guidance_scale = edit.guidance_scale;
        }
        let (image, mask, is_own_size) =
            (options.image, options.mask, options.width.is_none() && options.height.is_none());
        let Chosen { scheduler, timestep_spacing, max_steps } =
            self.schedulers.choose(options.scheduler.as_deref(), options.timestep_spacing)?;
        let mut request = DiffusionRequest {
            prompt: Prompt { text: options.prompt, max_sequence_length },
            canvas: Canvas {
                width: options.width.unwrap_or(defaults.width),
                height: options.height.unwrap_or(defaults.height),
                num_frames: options.num_frames.unwrap_or(defaults.num_frames),
                fps: options.fps.unwrap_or(defaults.fps),
            },
            sampling: Sampling {
                num_inference_steps: options.num_inference_steps.unwrap_or(defaults.num_inference_steps.min(max_steps)),
                scheduler,
                timestep_spacing,
                eta: eta(scheduler, options.eta)?,
                seed: options.seed.unwrap_or(fallback_seed),
            },
            guidance: diffusion::Guidance {
                guidance_scale: options.guidance_scale.unwrap_or(defaults.guidance_scale),
                true_cfg_scale: self.true_cfg_scale(options.true_cfg_scale)?,
                interval: options.guidance_interval.unwrap_or(WHOLE_INTERVAL),
                negative_prompt: options.negative_prompt.map(NegativePrompt::Text),
            },
            acceleration: options.acceleration.unwrap_or_default(),
            loras: self.loras.resolve(&options.loras)?,
            edit: None,
            refinement: None,
            references: self.references(options.reference_images, options.ip_adapter_scale)?,
            vae_tiling: false,
            partial_images: self.partial_images(options.partial_images)?,
        };
        self.check_size(&request).map_err(|error| match &image {
            Some(image) if is_own_size => {
                let problem = format!("is {}x{}, a size that this model does not make", image.width, image.height);
                Error::invalid("image", format!("{problem} ({error}); give width and height"))
            }
            _ => error,
        })?;
        self.check_time(&request)?;
        check_range(
            "num_inference_steps",
            request.sampling.num_inference_steps,
            1,
            max_steps.min(MAX_INFERENCE_STEPS),
        )?;
        check_range("max_sequence_length", request.prompt.max_sequence_length, 1, self.max_sequence_length)?;
        if request.acceleration != Acceleration::None && self.acceleration.is_none() {
            return Err(Error::invalid("acceleration", "this model has no first-block cache; allowed: none"));
        }
        if let (Some(edit), Some(image)) = (edit_defaults, image) {
            let strength = options.strength.unwrap_or(edit.strength);
            request.edit = Some(self.edit(&request, &image, mask.as_deref(), strength)?);
        }
        request.refinement = self.refinement(options.denoising_end, &request)?;
        request.vae_tiling = self.vae_tiling(options.vae_tiling, &request)?;
        self.with_checked_guidance(request)
    }

    /// The defaults for what is done with the picture of a request, if it has one.
    fn edit_defaults(&self, options: &DiffusionOptions) -> Result<Option<EditDefaults>> {
        let Some(image) = &options.image else {
            if self.edits.is_needed {
                return Err(Error::invalid("image", "is missing; this model only makes pictures from pictures"));
            }
            let of_picture = [("mask", options.mask.is_some()), ("strength", options.strength.is_some())];
            return match of_picture.iter().find(|(_, is_given)| *is_given) {
                Some((field, _)) => Err(Error::invalid(*field, "has no effect without image; leave it out")),
                None => Ok(None),
            };
        };
        let Edits { image_to_image, inpainting, .. } = self.edits;
        let refuse = |field, problem: &str| Err(Error::invalid(field, problem));
        match (&options.mask, image_to_image, inpainting) {
            (_, None, None) => refuse("image", "this model does not begin from a picture; leave it out"),
            (None, None, Some(_)) => refuse("mask", "is missing; this model only fills in parts of a picture"),
            (Some(_), _, None) => refuse("mask", "this model does not fill in parts of a picture; leave it out"),
            (Some(mask), _, Some(_)) if (mask.width, mask.height) != (image.width, image.height) => {
                let of_mask = format!("is {}x{}", mask.width, mask.height);
                refuse("mask", &format!("{of_mask}, but image is {}x{}; they must be equal", image.width, image.height))
            }
            (Some(_), _, edit) | (None, edit, _) => Ok(edit),
        }
    }

    fn edit(&self, request: &DiffusionRequest, image: &Frame, mask: Option<&Mask>, strength: f64) -> Result<Edit> {
        check_range("strength", strength, 0.0, 1.0)?;
        let steps = request.sampling.num_inference_steps;
        let first_step = self.edits.rounding.first_step(steps, strength);
        if first_step >= steps {
            let problem = format!("is {strength}, which leaves no step of num_inference_steps ({steps})");
            return Err(Error::invalid("strength", problem));
        }
        let (width, height) = (request.canvas.width, request.canvas.height);
        Ok(Edit {
            image: Arc::new(image.resized(width, height, Filter::Lanczos)),
            mask: mask.map(|mask| Arc::new(mask.resized(width, height, Filter::Lanczos))),
            strength,
            first_step,
        })
    }

    /// Where the refiner takes over, if it is to.
    fn refinement(&self, denoising_end: Option<f64>, request: &DiffusionRequest) -> Result<Option<Refinement>> {
        let refuse = |problem: String| Err(Error::invalid("denoising_end", problem));
        let Some(denoising_end) = denoising_end else { return Ok(None) };
        let Some(refiner) = &self.refiner else {
            return refuse("this model is served without a refiner; leave it out".to_owned());
        };
        if request.edit.is_some() {
            return refuse("the refiner takes over from pictures made of text alone; leave it or image out".to_owned());
        }
        if !(denoising_end > 0.0 && denoising_end < 1.0) {
            return refuse(format!("is {denoising_end}; allowed: above 0 and below 1"));
        }
        let steps = request.sampling.num_inference_steps;
        let of_refiner = refiner.choose(Some(request.sampling.scheduler.name), request.sampling.timestep_spacing)?;
        check_range("num_inference_steps", steps, 1, of_refiner.max_steps)?;
        let the_loop = request.sampling.denoising_loop(None);
        let steps_before = self.schedulers.steps_before(request.sampling.scheduler, &the_loop, denoising_end);
        let first_step_after = refiner.steps_before(request.sampling.scheduler, &the_loop, denoising_end);
        for (whose, is_idle) in [("model", steps_before == 0), ("refiner", first_step_after == steps)] {
            if is_idle {
                return refuse(format!("is {denoising_end}, which leaves the {whose} no step of {steps}"));
            }
        }
        Ok(Some(Refinement { denoising_end, steps_before, first_step_after }))
    }

    fn partial_images(&self, asked: Option<usize>) -> Result<usize> {
        let asked = asked.unwrap_or(0);
        check_range("partial_images", asked, 0, MAX_PREVIEWS)?;
        if asked > 0 && self.medium == Medium::Clip {
            return Err(Error::invalid(
                "partial_images",
                "this model makes clips, which have no previews; leave it out",
            ));
        }
        Ok(asked)
    }

    /// Of the first-block cache of each of the request's branches, if it has one.
    pub fn cache_threshold(&self, request: &DiffusionRequest) -> Option<f64> {
        let thresholds = self.acceleration?;
        match request.acceleration {
            Acceleration::None => None,
            Acceleration::Safe => Some(thresholds.safe),
            Acceleration::Fast => Some(thresholds.fast),
        }
    }

    fn references(&self, images: Vec<Arc<Frame>>, scale: Option<f64>) -> Result<Option<References>> {
        if !self.has_ip_adapter && (!images.is_empty() || scale.is_some()) {
            let field = if images.is_empty() { "ip_adapter_scale" } else { "reference_images" };
            return Err(Error::invalid(field, "this model is served without an IP-Adapter; leave it out"));
        }
        if images.is_empty() {
            return match scale {
                None => Ok(None),
                Some(_) => {
                    Err(Error::invalid("ip_adapter_scale", "has no effect without reference_images; leave it out"))
                }
            };
        }
        if images.len() > MAX_REFERENCE_IMAGES {
            let problem = format!("are {}; allowed: 1 to {MAX_REFERENCE_IMAGES}", images.len());
            return Err(Error::invalid("reference_images", problem));
        }
        let pixels: usize = images.iter().map(|image| image.width * image.height).sum();
        if pixels > MAX_REFERENCE_PIXELS {
            let problem = format!("have {pixels} pixels together; at most {MAX_REFERENCE_PIXELS}");
            return Err(Error::invalid("reference_images", problem));
        }
        let scale = scale.unwrap_or(DEFAULT_IP_ADAPTER_SCALE);
        check_range("ip_adapter_scale", scale, 0.0, 1.0)?;
        Ok(Some(References { images, scale }))
    }

    /// Reads the prompts, and says at how many tokens they are encoded.
    fn prompt_length(&self, options: &DiffusionOptions) -> Result<usize> {
        let negative = options.negative_prompt.as_deref().map(|text| ("negative_prompt", text));
        let prompts = std::iter::once(("prompt", options.prompt.as_str())).chain(negative);
        match &self.prompts {
            Prompts::Chunked(rule) => rule.length(options.max_sequence_length, prompts),
            Prompts::Plain => {
                for (field, text) in prompts {
                    plain_text(field, text)?;
                }
                Ok(options.max_sequence_length.unwrap_or(self.defaults.max_sequence_length))
            }
        }
    }

    fn check_size(&self, request: &DiffusionRequest) -> Result<()> {
        for (field, pixels) in [("width", request.canvas.width), ("height", request.canvas.height)] {
            if pixels == 0 || pixels % self.size_multiple != 0 || pixels > self.max_side {
                let (multiple, max) = (self.size_multiple, self.max_side);
                let problem = format!("is {pixels}; allowed: multiples of {multiple} from {multiple} to {max}");
                return Err(Error::invalid(field, problem));
            }
        }
        let pixels = request.canvas.width * request.canvas.height;
        if pixels > self.max_pixels {
            let problem = format!(
                "{}x{} has {pixels} pixels; at most {}",
                request.canvas.width, request.canvas.height, self.max_pixels
            );
            return Err(Error::invalid("size", problem));
        }
        Ok(())
    }

    /// What is asked for, or what the memory plan needs.
    fn vae_tiling(&self, asked: Option<bool>, request: &DiffusionRequest) -> Result<bool> {
        match (asked, &self.vae_tiling) {
            (Some(asked), Some(_)) => Ok(asked),
            (None, Some(tiling)) => {
                let room = self.room_bytes.saturating_sub(self.loras.footprint_bytes(&request.loras));
                Ok(tiling.is_needed(request.canvas.width, request.canvas.height, room))
            }
            (Some(true), None) => Err(Error::invalid("vae_tiling", "this model's VAE has no tiles; leave it out")),
            (Some(false) | None, None) => Ok(false),
        }
    }

    fn check_time(&self, request: &DiffusionRequest) -> Result<()> {
        if self.medium == Medium::Picture {
            if request.canvas.num_frames != 1 {
                return Err(Error::invalid("num_frames", "this model makes pictures; leave it out"));
            }
            if request.canvas.fps != 0 {
                return Err(Error::invalid("fps", "this model makes pictures; leave it out"));
            }
            return Ok(());
        }
        let (frames, multiple) = (request.canvas.num_frames, self.frames_multiple);
        if frames == 0 || frames % multiple != 1 % multiple || frames > self.max_frames {
            let problem = format!("is {frames}; allowed: {multiple}k+1 from 1 to {}", self.max_frames);
            return Err(Error::invalid("num_frames", problem));
        }
        check_range("fps", request.canvas.fps, 1, MAX_FPS)
    }

    fn with_checked_guidance(&self, mut request: DiffusionRequest) -> Result<DiffusionRequest> {
        check_range("guidance_scale", request.guidance.guidance_scale, 0.0, MAX_GUIDANCE_SCALE)?;
        if self.guidance == Guidance::None && request.guidance.guidance_scale != 0.0 {
            return Err(Error::invalid(
                "guidance_scale",
                "this model was distilled without guidance; only 0 is allowed",
            ));
        }
        let has_text = request.guidance.negative_prompt.is_some();
        match (self.guidance, request.guidance.cfg_scale() > 1.0) {
            (guidance, false) if has_text => {
                let problem = format!("has no effect unless {} is above 1; leave it out", guidance.cfg_field());
                return Err(Error::invalid("negative_prompt", problem));
            }
            (Guidance::ClassifierFree, true) => {
                request.guidance.negative_prompt.get_or_insert(NegativePrompt::Absent);
            }
            // diffusers ignores the scale then; nothing is ignored here.
            (Guidance::None | Guidance::Embedded, true) if !has_text => {
                let problem = "has no effect without a negative_prompt; give one, possibly the empty one";
                return Err(Error::invalid("true_cfg_scale", problem));
            }
            _ => (),
        }
        self.check_interval(&request)?;
        Ok(request)
    }

    /// Off (1) where the client says nothing; `None` for models that are guided by `guidance_scale`.
    fn true_cfg_scale(&self, asked: Option<f64>) -> Result<Option<f64>> {
        match (self.guidance, asked) {
            (Guidance::ClassifierFree, None) => Ok(None),
            (Guidance::ClassifierFree, Some(_)) => {
                Err(Error::invalid("true_cfg_scale", "this model is guided by guidance_scale; leave it out"))
            }
            (Guidance::None | Guidance::Embedded, asked) => {
                let scale = asked.unwrap_or(1.0);
                check_range("true_cfg_scale", scale, 1.0, MAX_GUIDANCE_SCALE)?;
                Ok(Some(scale))
            }
        }
    }

    /// Refused where it means nothing: a negative prediction that is never made, or an interval of none.
    fn check_interval(&self, request: &DiffusionRequest) -> Result<()> {
        let (interval @ [start, end], steps) = (request.guidance.interval, request.steps_made());
        let refuse = |problem: String| Err(Error::invalid("guidance_interval", problem));
        // Written so that NaN fails.
        if !(start >= 0.0 && start < end && end <= 1.0) {
            return refuse(format!("is [{start}, {end}]; allowed: [start, end] with 0 <= start < end <= 1"));
        }
        if interval == WHOLE_INTERVAL {
            return Ok(());
        }
        if request.guidance.negative_prompt.is_none() {
            let field = self.guidance.cfg_field();
            return refuse(format!("has no effect unless {field} is above 1; leave it out"));
        }
        if !(0..steps).any(|index| request.guidance.is_guided_at(index, steps)) {
            return refuse(format!(
                "holds none of the {steps} steps, the first of which are at 0 and {}",
                1.0 / steps as f64
            ));
        }
        Ok(())
    }
}

/// What diffusers' pipelines hand to steps that have an `eta`.
const DEFAULT_ETA: f64 = 0.0;

fn eta(scheduler: &Scheduler, asked: Option<f64>) -> Result<Option<f64>> {
    if !scheduler.takes_eta() {
        return match asked {
            None => Ok(None),
            Some(_) => Err(Error::invalid("eta", format!("has no effect with scheduler {}", scheduler.name))),
        };
    }
    let eta = asked.unwrap_or(DEFAULT_ETA);
    check_range("eta", eta, 0.0, 1.0)?;
    Ok(Some(eta))
}

fn check_bytes(field: &str, text: &str) -> Result<()> {
    if text.len() > MAX_PROMPT_BYTES {
        let problem = format!("has {} bytes; at most {MAX_PROMPT_BYTES}", text.len());
        return Err(Error::invalid(field, problem));
    }
    Ok(())
}

/// As [`check_range`], without `min` itself.
fn check_above(field: &str, value: f32, min: f32, max: f32) -> Result<()> {
    if value > min && value <= max {
        return Ok(());
    }
    Err(Error::invalid(field, format!("is {value}; allowed: above {min}, at most {max}")))
}

fn check_range<T: PartialOrd + std::fmt::Display + Copy>(field: &str, value: T, min: T, max: T) -> Result<()> {
    // Written so that NaN fails.
    if value >= min && value <= max {
        return Ok(());
    }
    Err(Error::invalid(field, format!("is {value}; allowed: {min} to {max}")))
}
