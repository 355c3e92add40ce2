//! What a session needs to go on in another runner, and how it goes on there.
//!
//! Owns: what is kept and what is made once more. Kept is what steps have left: latents, the solver's memory, the generator,
//! block caches, final latents. Made once more, with the same bits, is what cost little or is large: encoded inputs (the text
//! encoders' results are larger than most latents, and would leave prompts in the blob), and with them the beginning of the
//! loop, conditioning and what repaints a picture; LoRA terms, which the request names; and pixels. A VAE's state between two
//! chunks is larger than all the rest (gigabytes of Wan's at 1280x720, which take longer to write than to compute), so that
//! decoding begins with the first chunk and the frames that are out are not told again. Does not know: how a checkpoint is
//! checked (`session_checkpoint`), when one is made.

use std::sync::Arc;

use super::DiffusionRunner;
use super::denoising::Denoising;
use super::model::DiffusionModel;
use super::session::{Latents, Session, Stage};
use crate::error::Result;
use crate::request::{Phase, SessionId};
use crate::rng::TorchGenerator;
use crate::session_checkpoint::fields::{Reader, Writer};
use crate::session_checkpoint::{Refusal, SessionCheckpoint, digest_of};

impl<M: DiffusionModel> DiffusionRunner<M> {
    /// A session that has begun to denoise, or will go on denoising.
    pub(super) fn save(&mut self, id: SessionId) -> Result<Option<Arc<SessionCheckpoint>>> {
        let Some((identity, session)) = self.identity.as_ref().zip(self.sessions.get_mut(&id)) else {
            return Ok(None);
        };
        if let Stage::Encode(_) = &session.stage {
            return Ok(session.resumed.clone());
        }
        let mut state = Writer::default();
        session.save(&mut state)?;
        let digest = *session.digest.get_or_insert_with(|| digest_of(&session.request));
        Ok(Some(Arc::new(SessionCheckpoint::seal(identity, digest, session.frames_done, &state))))
    }

    /// A session that has not had a step, where the one was that was saved.
    pub(super) fn resumed(&self, mut session: Session<M>, checkpoint: Arc<SessionCheckpoint>) -> Result<Session<M>> {
        let identity = self.identity.as_ref().ok_or(Refusal::Unsupported)?;
        let digest = digest_of(&session.request);
        let mut state = checkpoint.state_for(identity, digest)?;
        session.digest = Some(digest);
        session.frames_done = checkpoint.frames_done();
        if session.frames_done > session.request.canvas.num_frames {
            return Err(Refusal::State("more frames than there are").into());
        }
        match Kept::read(&mut state)? {
            // The rest is read when its inputs are encoded.
            Kept { is_denoised: false, .. } => session.resumed = Some(checkpoint),
            kept => self.go_on_from_latents(&mut session, kept, &mut state)?,
        }
        Ok(session)
    }

    fn go_on_from_latents(&self, session: &mut Session<M>, kept: Kept, state: &mut Reader<'_>) -> Result<()> {
        let request = &session.request;
        let expert = self.model.course(request)?.stretches.back().map(|stretch| stretch.expert);
        let expert = expert.expect("a course has a step: this is a bug of the family");
        let noise = self.model.initial_latents(request, &mut TorchGenerator::new(request.sampling.seed))?;
        let values = state.tensor_like(&noise)?;
        state.end()?;
        if kept.told >= self.model.num_decode_steps(expert, request) {
            return Err(Refusal::State("more chunks than there are").into());
        }
        if kept.is_mended && !self.can_mend(expert, Phase::VaeDecode) {
            return Err(Refusal::State("pixels that cannot be computed once more").into());
        }
        session.skipped_passes = kept.skipped_passes;
        session.told = kept.told;
        session.mending = kept.is_mended.then_some(Phase::VaeDecode);
        session.stage = Stage::Latents(Latents { values, expert });
        Ok(())
    }
}

/// What is kept of every session.
struct Kept {
    /// Final latents follow, and else those of a loop under way.
    is_denoised: bool,
    /// Its last result is to be made once more, in f32.
    is_mended: bool,
    /// Chunks whose frames are out.
    told: usize,
    /// Of a loop that is over.
    skipped_passes: usize,
}

impl Kept {
    fn write(self, into: &mut Writer) {
        into.flag(self.is_denoised);
        into.flag(self.is_mended);
        into.count(self.told);
        into.count(self.skipped_passes);
    }

    fn read(from: &mut Reader<'_>) -> Result<Self, Refusal> {
        Ok(Self {
            is_denoised: from.flag()?,
            is_mended: from.flag()?,
            told: from.count()?,
            skipped_passes: from.count()?,
        })
    }
}

impl<M: DiffusionModel> Session<M> {
    pub(super) fn save(&self, into: &mut Writer) -> Result<()> {
        let done = match &self.stage {
            Stage::Decode { done, .. } => *done,
            _ => 0,
        };
        let kept = Kept {
            is_denoised: !matches!(self.stage, Stage::Denoise(_)),
            is_mended: self.mending.is_some(),
            told: self.told.max(done),
            skipped_passes: self.skipped_passes,
        };
        kept.write(into);
        match &self.stage {
            Stage::Encode(_) => unreachable!("nothing is kept of what is being encoded: this is a bug"),
            Stage::Denoise(denoising) => denoising.save(into),
            Stage::Latents(latents) | Stage::Decode { latents, .. } => into.tensor(&latents.values),
        }
    }

    /// A denoising that has just begun, or where the one was that it goes on from.
    pub(super) fn gone_on(&mut self, begun: Denoising<M::Conditioning>) -> Result<Denoising<M::Conditioning>> {
        let Some(checkpoint) = self.resumed.take() else { return Ok(begun) };
        let mut state = checkpoint.state();
        let kept = Kept::read(&mut state)?;
        let denoising = begun.go_on_from(&mut state)?;
        state.end()?;
        self.mending = kept.is_mended.then_some(Phase::Denoise);
        Ok(denoising)
    }
}
