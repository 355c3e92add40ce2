//! What pictures and clips share: the prompt's arguments, and following a session to its frames.

use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use clap::{ArgGroup, Args, ValueEnum};
use tale_models::card::{DiffusionCard, DiffusionOptions, Medium};
use tale_models::diffusion::Acceleration;
use tale_models::request::Frame;
use tale_models::solver::names::Spacing;
use tale_models::{Event, ModelCard};

use super::{CliError, Generator, wrong_medium};
use crate::cli::progress::Phases;
use crate::engine::Session;

/// The group of arguments that say what to show.
pub const SUBJECT: &str = "subject";

/// At least one of them is needed.
pub fn subject() -> ArgGroup {
    ArgGroup::new(SUBJECT).required(true).multiple(true)
}

/// Absent ones take the model's own defaults.
#[derive(Debug, Args)]
#[command(next_help_heading = "Generation")]
pub struct DiffusionArgs {
    /// What to show
    #[arg(long, value_name = "TEXT", group = SUBJECT)]
    prompt: Option<String>,

    /// What to steer away from; needs classifier-free guidance: a guidance scale, or of FLUX.1 a true CFG scale, above 1
    #[arg(long, value_name = "TEXT")]
    negative_prompt: Option<String>,

    /// Pixels
    #[arg(long, value_name = "N")]
    width: Option<usize>,

    /// Pixels
    #[arg(long, value_name = "N")]
    height: Option<usize>,

    /// Denoising steps
    #[arg(long, value_name = "N")]
    num_inference_steps: Option<usize>,

    /// How strongly the prompt steers
    #[arg(long, value_name = "X")]
    guidance_scale: Option<f64>,

    /// Solver: euler, dpmpp_2m_karras, ..., or diffusers' class name [default: the checkpoint's own]
    #[arg(long, value_name = "NAME")]
    scheduler: Option<String>,

    /// Which timesteps of training the scheduler visits: leading, trailing or linspace [default: as the checkpoint says]
    #[arg(long, value_name = "HOW", value_parser = PossibleValuesParser::new(["leading", "trailing", "linspace"]).try_map(|name| name.parse::<Spacing>()))]
    timestep_spacing: Option<Spacing>,

    /// Share of fresh noise in the steps of ddim and tcd, 0 to 1 [default: 0]
    #[arg(long, value_name = "X")]
    eta: Option<f64>,
    /// FLUX.1: how strongly the prompt steers away from the negative one; 1 is off
    #[arg(long, value_name = "X")]
    true_cfg_scale: Option<f64>,

    /// The part of the steps in which the negative prompt is heard, such as 0,0.4 [default: 0,1]
    #[arg(long, value_name = "START,END", value_parser = interval)]
    guidance_interval: Option<[f64; 2]>,

    /// Let steps that hardly differ from ones before them skip most of the network: none, safe or fast [default: none]
    #[arg(long, value_name = "HOW", value_parser = PossibleValuesParser::new(["none", "safe", "fast"]).try_map(|name| name.parse::<Acceleration>()))]
    acceleration: Option<Acceleration>,

    /// As for torch.Generator("cpu"): the same seed gives the picture that diffusers gives [default: drawn]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Tokens of the prompt that a T5-class text encoder sees
    #[arg(long, value_name = "N")]
    max_sequence_length: Option<usize>,

    /// SDXL with a refiner: the share of the noise schedule after which the refiner takes over, above 0 and below 1
    #[arg(long, value_name = "X")]
    denoising_end: Option<f64>,

    /// Whether the VAE works on tiles of the picture [default: auto, where memory is too short for the whole]
    #[arg(long, value_name = "WHEN")]
    vae_tiling: Option<VaeTiling>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum VaeTiling {
    Auto,
    True,
    False,
}

impl VaeTiling {
    fn asked(self) -> Option<bool> {
        match self {
            Self::Auto => None,
            Self::True => Some(true),
            Self::False => Some(false),
        }
    }
}

impl DiffusionArgs {
    /// What was said, and `base` for the rest.
    pub fn options_over(self, base: DiffusionOptions) -> DiffusionOptions {
        // A length belongs to its prompts: it would cut longer ones.
        let has_base_prompts = self.prompt.is_none() && self.negative_prompt.is_none();
        let base_length = base.max_sequence_length.filter(|_| has_base_prompts);
        DiffusionOptions {
            prompt: self.prompt.unwrap_or(base.prompt),
            negative_prompt: self.negative_prompt.or(base.negative_prompt),
            width: self.width.or(base.width),
            height: self.height.or(base.height),
            num_frames: base.num_frames,
            fps: base.fps,
            num_inference_steps: self.num_inference_steps.or(base.num_inference_steps),
            guidance_scale: self.guidance_scale.or(base.guidance_scale),
            // Spacing and `eta` belong to their scheduler.
            timestep_spacing: self.timestep_spacing.or(base.timestep_spacing.filter(|_| self.scheduler.is_none())),
            eta: self.eta.or(base.eta.filter(|_| self.scheduler.is_none())),
            true_cfg_scale: self.true_cfg_scale.or(base.true_cfg_scale),
            guidance_interval: self.guidance_interval.or(base.guidance_interval),
            acceleration: self.acceleration.or(base.acceleration),
            scheduler: self.scheduler.or(base.scheduler),
            seed: self.seed.or(base.seed),
            max_sequence_length: self.max_sequence_length.or(base_length),
            vae_tiling: self.vae_tiling.map_or(base.vae_tiling, VaeTiling::asked),
            reference_images: base.reference_images,
            ip_adapter_scale: base.ip_adapter_scale,
            loras: base.loras,
            // Nobody would see them.
            partial_images: None,
            image: base.image,
            mask: base.mask,
            strength: base.strength,
            denoising_end: self.denoising_end.or(base.denoising_end),
        }
    }
}

fn interval(text: &str) -> Result<[f64; 2], String> {
    let ends =
        text.split_once(',').and_then(|(start, end)| Some([start.trim().parse().ok()?, end.trim().parse().ok()?]));
    ends.ok_or_else(|| "expected two numbers, such as 0,0.4".to_owned())
}

/// The card of a model that makes `medium`.
pub fn card_for(medium: Medium, card: &ModelCard) -> Result<&DiffusionCard, CliError> {
    match card {
        ModelCard::Diffusion(card) if card.medium == medium => Ok(card),
        other => Err(wrong_medium(other)),
    }
}

/// Follows a session to its end and hands over the frames as they come.
pub fn follow(
    generator: &mut Generator,
    session: Session,
    mut on_frames: impl FnMut(Vec<Frame>) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let mut phases = Phases::new();
    let mut running = generator.run(session);
    loop {
        match running.next()? {
            Event::Progress { phase, done, total } => phases.update(phase, done, total),
            Event::Frames(frames) => on_frames(frames)?,
            Event::Finished { .. } => return Ok(()),
            _ => {}
        }
    }
}
