//! What images and videos share: the model's card, and following a session to its frames.

use tale_models::diffusion::{DiffusionCard, Medium};
use tale_models::request::Frame;
use tale_models::{Event, ModelCard};

use super::{CliError, Generator, wrong_medium};
use crate::cli::progress::Phases;
use crate::engine::Session;

/// The card of a model that makes `medium`.
pub fn card_for(medium: Medium, card: &ModelCard) -> Result<&DiffusionCard, CliError> {
    match card {
        ModelCard::Diffusion(card) if card.medium() == medium => Ok(card),
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
