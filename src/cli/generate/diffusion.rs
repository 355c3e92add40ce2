//! What pictures and clips share: the prompt's arguments, and following a session to its frames.

use clap::Args;
use tale_models::card::{DiffusionCard, DiffusionOptions, Medium};
use tale_models::request::{DiffusionRequest, Frame};
use tale_models::{Event, ModelCard, Request};

use super::{CliError, Generator, wrong_medium};
use crate::cli::progress::Phases;

/// Absent ones take the model's own defaults.
#[derive(Debug, Args)]
#[command(next_help_heading = "Generation")]
pub struct DiffusionArgs {
    /// What to show
    #[arg(long, value_name = "TEXT")]
    prompt: String,

    /// What to steer away from, for models with classifier-free guidance
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

    /// As for torch.Generator("cpu"): the same seed gives the picture that diffusers gives [default: drawn]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Tokens of the prompt that a T5-class text encoder sees
    #[arg(long, value_name = "N")]
    max_sequence_length: Option<usize>,
}

impl DiffusionArgs {
    pub fn options(self) -> DiffusionOptions {
        DiffusionOptions {
            prompt: self.prompt,
            negative_prompt: self.negative_prompt,
            width: self.width,
            height: self.height,
            num_frames: None,
            fps: None,
            num_inference_steps: self.num_inference_steps,
            guidance_scale: self.guidance_scale,
            scheduler: self.scheduler,
            seed: self.seed,
            max_sequence_length: self.max_sequence_length,
        }
    }
}

/// The card of a model that makes `medium`.
pub fn card_for(medium: Medium, card: &ModelCard) -> Result<&DiffusionCard, CliError> {
    match card {
        ModelCard::Diffusion(card) if card.medium == medium => Ok(card),
        other => Err(wrong_medium(other)),
    }
}

/// Runs the request and hands over the frames as they come.
pub fn follow(
    generator: &mut Generator,
    request: DiffusionRequest,
    mut on_frames: impl FnMut(Vec<Frame>) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let mut phases = Phases::new();
    let mut running = generator.start(Request::Diffusion(request))?;
    loop {
        match running.next()? {
            Event::Progress { phase, done, total } => phases.update(phase, done, total),
            Event::Frames(frames) => on_frames(frames)?,
            Event::Finished { .. } => return Ok(()),
            _ => {}
        }
    }
}
