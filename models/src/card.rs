//! What a loaded model tells the server about itself: limits, defaults, tokenizer. Shared, immutable, no tensors.
//!
//! A card turns what a client asked for (all fields optional) into a validated request; everything that a client can
//! get wrong is found here, before the device thread hears of it.

use serde::Deserialize;

use crate::chat_template::{ChatMessage, ChatTemplate};
use crate::error::{Error, Result};
use crate::memory::VaeTiling;
use crate::request::{DiffusionRequest, NegativePrompt, SamplingParams, TextRequest};
use crate::solver::schedulers::Schedulers;
use crate::tokenizer::Tokenizer;

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

/// The sampling fields of `generation_config.json`. `do_sample: false` means greedy, as in transformers.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct SamplingDefaults {
    /// Whether the model's author samples at all.
    pub do_sample: Option<bool>,
    /// See [`SamplingParams`].
    pub temperature: Option<f32>,
    /// See [`SamplingParams`].
    pub top_p: Option<f32>,
    /// See [`SamplingParams`].
    pub top_k: Option<usize>,
    /// See [`SamplingParams`].
    pub min_p: Option<f32>,
    /// See [`SamplingParams`].
    pub repetition_penalty: Option<f32>,
}

/// What a client may say about a text generation; absent fields take the model's defaults.
#[derive(Debug, Clone, Default)]
pub struct TextOptions {
    /// Most tokens to generate; the rest of the context when absent.
    pub max_tokens: Option<usize>,
    /// 0 to 2.
    pub temperature: Option<f32>,
    /// Above 0, at most 1.
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
        let defaults = &self.defaults;
        // `do_sample: false` makes greedy the default, as in transformers; a client's own temperature still samples.
        let greedy_by_default = defaults.do_sample == Some(false);
        let default_temperature = if greedy_by_default { 0.0 } else { defaults.temperature.unwrap_or(1.0) };
        let sampling = SamplingParams {
            temperature: options.temperature.unwrap_or(default_temperature),
            top_p: options.top_p.or(defaults.top_p).unwrap_or(1.0),
            top_k: options.top_k.or(defaults.top_k).unwrap_or(0),
            min_p: options.min_p.or(defaults.min_p).unwrap_or(0.0),
            presence_penalty: options.presence_penalty.unwrap_or(0.0),
            frequency_penalty: options.frequency_penalty.unwrap_or(0.0),
            repetition_penalty: options.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
            seed: options.seed.unwrap_or(fallback_seed),
        };
        check_range("temperature", sampling.temperature, 0.0, 2.0)?;
        check_range("top_p", sampling.top_p, f32::MIN_POSITIVE, 1.0)?;
        check_range("min_p", sampling.min_p, 0.0, 1.0)?;
        check_range("presence_penalty", sampling.presence_penalty, -2.0, 2.0)?;
        check_range("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)?;
        check_range("repetition_penalty", sampling.repetition_penalty, f32::MIN_POSITIVE, 2.0)?;
        Ok(sampling)
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
    /// How guidance enters.
    pub guidance: Guidance,
    /// The solvers that the checkpoint can be sampled with.
    pub schedulers: Schedulers,
    /// When the VAE works in tiles; `None` where it has none.
    pub vae_tiling: Option<VaeTiling>,
    /// Bytes that the device has for work beside all weights; no bound until whoever loads the models says so.
    pub room_bytes: usize,
}

/// What a diffusion model makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    /// One frame.
    Picture,
    /// Frames in time.
    Clip,
}

/// How `guidance_scale` enters a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guidance {
    /// Not at all (timestep-distilled models): only 0 is accepted, no negative prompt.
    None,
    /// As an input of the transformer; no negative prompt.
    Embedded,
    /// By a second, negative prediction when the scale is above 1.
    ClassifierFree,
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
    pub seed: Option<u64>,
    pub max_sequence_length: Option<usize>,
    /// Whether the VAE works in tiles; absent: where the memory plan needs them.
    pub vae_tiling: Option<bool>,
}

/// Most denoising steps of one request.
pub const MAX_INFERENCE_STEPS: usize = 1000;
/// Largest guidance scale.
pub const MAX_GUIDANCE_SCALE: f64 = 100.0;
/// Highest frame rate.
pub const MAX_FPS: usize = 120;

impl DiffusionCard {
    /// Validates everything and fills in defaults. `fallback_seed` is used when the client gave none.
    pub fn resolve(&self, options: DiffusionOptions, fallback_seed: u64) -> Result<DiffusionRequest> {
        let defaults = &self.defaults;
        let request = DiffusionRequest {
            width: options.width.unwrap_or(defaults.width),
            height: options.height.unwrap_or(defaults.height),
            num_frames: options.num_frames.unwrap_or(defaults.num_frames),
            fps: options.fps.unwrap_or(defaults.fps),
            num_inference_steps: options.num_inference_steps.unwrap_or(defaults.num_inference_steps),
            guidance_scale: options.guidance_scale.unwrap_or(defaults.guidance_scale),
            scheduler: self.schedulers.choose(options.scheduler.as_deref())?,
            seed: options.seed.unwrap_or(fallback_seed),
            max_sequence_length: options.max_sequence_length.unwrap_or(defaults.max_sequence_length),
            prompt: options.prompt,
            negative_prompt: options.negative_prompt.map(NegativePrompt::Text),
            edit: None,
            vae_tiling: false,
        };
        self.check_size(&request)?;
        self.check_time(&request)?;
        check_range("num_inference_steps", request.num_inference_steps, 1, MAX_INFERENCE_STEPS)?;
        check_range("max_sequence_length", request.max_sequence_length, 1, self.max_sequence_length)?;
        let vae_tiling = self.vae_tiling(options.vae_tiling, &request)?;
        self.with_checked_guidance(DiffusionRequest { vae_tiling, ..request })
    }

    fn check_size(&self, request: &DiffusionRequest) -> Result<()> {
        for (field, pixels) in [("width", request.width), ("height", request.height)] {
            if pixels == 0 || pixels % self.size_multiple != 0 || pixels > self.max_side {
                let (multiple, max) = (self.size_multiple, self.max_side);
                let problem = format!("is {pixels}; allowed: multiples of {multiple} from {multiple} to {max}");
                return Err(Error::invalid(field, problem));
            }
        }
        let pixels = request.width * request.height;
        if pixels > self.max_pixels {
            let problem =
                format!("{}x{} has {pixels} pixels; at most {}", request.width, request.height, self.max_pixels);
            return Err(Error::invalid("size", problem));
        }
        Ok(())
    }

    /// What is asked for, or what the memory plan needs.
    fn vae_tiling(&self, asked: Option<bool>, request: &DiffusionRequest) -> Result<bool> {
        match (asked, &self.vae_tiling) {
            (Some(asked), Some(_)) => Ok(asked),
            (None, Some(tiling)) => Ok(tiling.is_needed(request.width, request.height, self.room_bytes)),
            (Some(true), None) => Err(Error::invalid("vae_tiling", "this model's VAE has no tiles; leave it out")),
            (Some(false) | None, None) => Ok(false),
        }
    }

    fn check_time(&self, request: &DiffusionRequest) -> Result<()> {
        if self.medium == Medium::Picture {
            if request.num_frames != 1 {
                return Err(Error::invalid("num_frames", "this model makes pictures; leave it out"));
            }
            if request.fps != 0 {
                return Err(Error::invalid("fps", "this model makes pictures; leave it out"));
            }
            return Ok(());
        }
        let (frames, multiple) = (request.num_frames, self.frames_multiple);
        if frames == 0 || frames % multiple != 1 % multiple || frames > self.max_frames {
            let problem = format!("is {frames}; allowed: {multiple}k+1 from 1 to {}", self.max_frames);
            return Err(Error::invalid("num_frames", problem));
        }
        check_range("fps", request.fps, 1, MAX_FPS)
    }

    fn with_checked_guidance(&self, mut request: DiffusionRequest) -> Result<DiffusionRequest> {
        check_range("guidance_scale", request.guidance_scale, 0.0, MAX_GUIDANCE_SCALE)?;
        if self.guidance == Guidance::None && request.guidance_scale != 0.0 {
            return Err(Error::invalid(
                "guidance_scale",
                "this model was distilled without guidance; only 0 is allowed",
            ));
        }
        if self.guidance != Guidance::ClassifierFree && request.negative_prompt.is_some() {
            return Err(Error::invalid("negative_prompt", "this model has no classifier-free guidance; leave it out"));
        }
        let guided = self.guidance == Guidance::ClassifierFree && request.guidance_scale > 1.0;
        if guided {
            request.negative_prompt.get_or_insert(NegativePrompt::Absent);
        } else if request.negative_prompt.is_some() {
            return Err(Error::invalid("negative_prompt", "has no effect with guidance_scale <= 1; leave it out"));
        }
        Ok(request)
    }
}

fn check_range<T: PartialOrd + std::fmt::Display + Copy>(field: &str, value: T, min: T, max: T) -> Result<()> {
    // Written so that NaN fails.
    if value >= min && value <= max {
        return Ok(());
    }
    Err(Error::invalid(field, format!("is {value}; allowed: {min} to {max}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clip_card() -> DiffusionCard {
        DiffusionCard {
            family: "wan",
            medium: Medium::Clip,
            defaults: DiffusionDefaults {
                width: 832,
                height: 480,
                num_frames: 81,
                fps: 16,
                num_inference_steps: 50,
                guidance_scale: 5.0,
                max_sequence_length: 512,
            },
            size_multiple: 16,
            max_side: 2048,
            max_pixels: 1280 * 720,
            max_frames: 161,
            frames_multiple: 4,
            max_sequence_length: 512,
            guidance: Guidance::ClassifierFree,
            schedulers: crate::testing::flow_schedulers(),
            vae_tiling: None,
            room_bytes: usize::MAX,
        }
    }

    fn picture_card(guidance: Guidance) -> DiffusionCard {
        let defaults = DiffusionDefaults { num_frames: 1, fps: 0, guidance_scale: 0.0, ..clip_card().defaults };
        DiffusionCard { medium: Medium::Picture, frames_multiple: 1, max_frames: 1, guidance, defaults, ..clip_card() }
    }

    #[test]
    fn absent_fields_take_the_models_defaults() {
        let request = clip_card().resolve(DiffusionOptions::default(), 7).expect("defaults are valid");
        assert_eq!((request.width, request.height, request.num_frames, request.fps), (832, 480, 81, 16));
        assert_eq!((request.seed, request.negative_prompt), (7, Some(NegativePrompt::Absent)));
    }

    #[test]
    fn what_is_out_of_range_is_named_with_what_is_allowed() {
        let check = |card: DiffusionCard, options: DiffusionOptions, field: &str, allowed: &str| match card
            .resolve(options, 0)
        {
            Err(Error::InvalidRequest { field: found, problem }) => {
                assert_eq!(found, field);
                assert!(problem.contains(allowed), "expected `{allowed}` in: {problem}");
            }
            other => panic!("{field}: {other:?}"),
        };
        let options = DiffusionOptions::default;
        check(
            clip_card(),
            DiffusionOptions { width: Some(100), ..options() },
            "width",
            "multiples of 16 from 16 to 2048",
        );
        check(clip_card(), DiffusionOptions { height: Some(0), ..options() }, "height", "multiples of 16");
        let large = DiffusionOptions { width: Some(2048), height: Some(2048), ..options() };
        check(clip_card(), large, "size", "at most 921600");
        check(clip_card(), DiffusionOptions { num_frames: Some(80), ..options() }, "num_frames", "4k+1 from 1 to 161");
        check(clip_card(), DiffusionOptions { num_frames: Some(165), ..options() }, "num_frames", "4k+1 from 1 to 161");
        check(clip_card(), DiffusionOptions { fps: Some(0), ..options() }, "fps", "1 to 120");
        check(
            clip_card(),
            DiffusionOptions { num_inference_steps: Some(0), ..options() },
            "num_inference_steps",
            "1 to",
        );
        let nan = DiffusionOptions { guidance_scale: Some(f64::NAN), ..options() };
        check(clip_card(), nan, "guidance_scale", "0 to 100");
        let long = DiffusionOptions { max_sequence_length: Some(513), ..options() };
        check(clip_card(), long, "max_sequence_length", "1 to 512");
        let clip_fields = DiffusionOptions { num_frames: Some(5), ..options() };
        check(picture_card(Guidance::Embedded), clip_fields, "num_frames", "leave it out");
        check(picture_card(Guidance::Embedded), DiffusionOptions { fps: Some(8), ..options() }, "fps", "leave it out");
        let scale = DiffusionOptions { guidance_scale: Some(3.5), ..options() };
        check(picture_card(Guidance::None), scale, "guidance_scale", "only 0");
    }

    /// In tiles what is asked for, else what has no room as a whole; the same request always in the same way.
    #[test]
    fn tiles_are_chosen_by_the_room_there_is() {
        let tiling = VaeTiling { tile_side: 64, bytes_per_pixel: 10 };
        let card =
            |room_bytes| DiffusionCard { vae_tiling: Some(tiling), room_bytes, ..picture_card(Guidance::Embedded) };
        let resolved = |card: DiffusionCard, side, vae_tiling| {
            let size = Some(side);
            let options = DiffusionOptions { width: size, height: size, vae_tiling, ..DiffusionOptions::default() };
            card.resolve(options, 0).map(|request| request.vae_tiling)
        };
        for (room, side, asked, expected) in [
            (usize::MAX, 128, None, false),
            (128 * 128 * 10, 128, None, false),
            (128 * 128 * 10 - 1, 128, None, true),
            (0, 64, None, false),
            (usize::MAX, 128, Some(true), true),
            (0, 128, Some(false), false),
        ] {
            let found = resolved(card(room), side, asked).expect("valid");
            assert_eq!(found, expected, "{room} bytes, {side} pixels, {asked:?}");
        }
        let error = resolved(picture_card(Guidance::Embedded), 64, Some(true)).expect_err("refused").to_string();
        assert!(error.starts_with("vae_tiling: "), "{error}");
    }

    #[test]
    fn another_models_scheduler_is_refused_with_those_of_this_one() {
        let ask = |name: &str| DiffusionOptions { scheduler: Some(name.to_owned()), ..DiffusionOptions::default() };
        let request = clip_card().resolve(DiffusionOptions::default(), 0).expect("the checkpoint's own");
        assert_eq!(request.scheduler.name, "FlowMatchEulerDiscreteScheduler");
        assert_eq!(clip_card().resolve(ask("unipc"), 0).expect("offered").scheduler.name, "unipc");
        for name in ["euler", "EulerDiscreteScheduler", "UNIPC", "flux", ""] {
            let error = clip_card().resolve(ask(name), 0).expect_err(name).to_string();
            assert!(error.contains("scheduler") && error.contains("unipc, flow_euler"), "{error}");
        }
    }

    #[test]
    fn a_negative_prompt_without_effect_is_refused() {
        let options = || DiffusionOptions { negative_prompt: Some("blur".into()), ..DiffusionOptions::default() };
        assert!(picture_card(Guidance::Embedded).resolve(options(), 0).is_err());
        let unguided = DiffusionOptions { guidance_scale: Some(1.0), ..options() };
        assert!(clip_card().resolve(unguided, 0).is_err());
        assert!(clip_card().resolve(options(), 0).is_ok());
        let unguided = DiffusionOptions { guidance_scale: Some(1.0), ..DiffusionOptions::default() };
        assert_eq!(clip_card().resolve(unguided, 0).expect("valid").negative_prompt, None);
    }
}
