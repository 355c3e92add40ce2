//! What images and videos share: the model's card, and following the sessions of a request to its frames.

use tale_models::diffusion::shots::assembly::Assembly;
use tale_models::diffusion::{DiffusionCard, DiffusionRequest, Medium};
use tale_models::request::Frame;
use tale_models::{Event, ModelCard, Request};

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

/// Makes what `request` asks for, part by part, and hands over the frames as they come.
pub fn make(
    generator: &mut Generator,
    request: DiffusionRequest,
    mut on_frames: impl FnMut(Vec<Frame>) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let mut assembly = Assembly::new(request);
    let mut next = Some(assembly.part_request());
    while let Some(request) = next {
        if let (part, count @ 2..) = assembly.position() {
            generator.note(|| format!("part {} of {count}", part + 1));
        }
        let session = generator.submit(Request::Diffusion(request))?;
        follow(generator, session, |frames| on_frames(assembly.push(frames)))?;
        next = assembly.next_part();
    }
    Ok(())
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
