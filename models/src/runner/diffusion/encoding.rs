//! The encoding steps of the runner, and the steps that read the encoders before.
//!
//! Owns: whose inputs a pass takes, on which model it is computed, what becomes of its members. Does not know: what is
//! encoded.

use super::batcher::Layers;
use super::inputs::{Pass, distinct};
use super::model::DiffusionModel;
use super::on_demand::OnDemand;
use super::passes::PassId;
use super::session::Session;
use super::{DiffusionRunner, MEMBERS_EXIST, Outcome};
use crate::error::{Error, Result};
use crate::request::{Event, Events, Phase, SessionId};

impl<M: DiffusionModel> DiffusionRunner<M> {
    /// The next part of the text encoders that all members wait for.
    pub(super) fn load_text_encoders(&mut self, ids: &[SessionId], events: &mut Events) -> Result<()> {
        let text_encoders = self.text_encoders.as_mut().expect(IS_LENT);
        let (done, total) = text_encoders.load_on()?;
        for id in ids {
            events.emit(*id, Event::Progress { phase: Phase::Load, done, total });
            self.settle(*id, Outcome::GoesOn, events);
        }
        Ok(())
    }

    /// Whether a session's next pass waits for encoders that are away.
    pub(super) fn waits_for_encoders(&self, session: &Session<M>) -> bool {
        let is_away = self.text_encoders.as_ref().is_some_and(|encoders| encoders.model().is_none());
        is_away && session.next_inputs().is_some_and(|inputs| self.is_lent(&inputs.pass))
    }

    /// The first step of a pass over what all members have encoded next.
    pub(super) fn begin_pass(&mut self, pass: &Pass, ids: &[SessionId], events: &mut Events) -> Result<()> {
        let inputs = ids.iter().filter_map(|id| self.session(*id).next_inputs());
        let rows: Vec<M::Input> = distinct(inputs).into_iter().cloned().collect();
        let model = encoder(&self.model, &self.text_encoders, self.is_lent(pass));
        let id = self.passes.begin(model, pass, rows)?;
        self.advance_pass(id, ids, events)
    }

    /// The next step of a pass that is under way.
    pub(super) fn advance_pass(&mut self, pass_id: PassId, ids: &[SessionId], events: &mut Events) -> Result<()> {
        let pass = self.passes.pass(pass_id).clone();
        if pass.loras.is_some() {
            self.activate(if self.is_lent(&pass) { Layers::OfLentEncoders } else { Layers::Own }, ids);
        }
        let model = encoder(&self.model, &self.text_encoders, self.is_lent(&pass));
        let finished = self.passes.advance(model, pass_id)?;
        for id in ids {
            let session = self.sessions.get_mut(id).expect(MEMBERS_EXIST);
            let (done, total) = session.encode_mut().advance(pass_id, finished.as_ref());
            let outcome = match session.finish_encoding(&self.model) {
                Ok(()) => Outcome::GoesOn,
                // Of its own checkpoint: whoever shares the pass hears nothing of it.
                Err(error @ Error::NotResumable(_)) => Outcome::Failed(error),
                Err(error) => return Err(error),
            };
            events.emit(*id, Event::Progress { phase: pass.phase, done, total });
            self.settle(*id, outcome, events);
        }
        self.release_text_encoders();
        Ok(())
    }

    /// Encoders that come and go, while they are there.
    pub(super) fn lent_encoders(&self) -> Option<&M> {
        self.text_encoders.as_ref().and_then(OnDemand::model)
    }

    /// Whether encoders that come and go compute this pass.
    pub(super) fn is_lent(&self, pass: &Pass) -> bool {
        self.text_encoders.as_ref().is_some_and(|encoders| encoders.has(pass.components))
    }

    /// Lets text encoders go that nobody waits for: whoever does has their bytes reserved.
    pub(super) fn release_text_encoders(&mut self) {
        let is_awaited = |session: &Session<M>| session.next_inputs().is_some_and(|inputs| self.is_lent(&inputs.pass));
        if !self.sessions.values().any(is_awaited)
            && let Some(text_encoders) = &mut self.text_encoders
        {
            text_encoders.release();
        }
    }

    /// Forgets the passes that no session takes part in any more.
    pub(super) fn release_passes(&mut self) {
        let sessions = &self.sessions;
        self.passes.retain(|pass| sessions.values().any(|session| session.pass_under_way() == Some(pass)));
    }
}

/// The model that has the encoders.
fn encoder<'a, M>(model: &'a M, text_encoders: &'a Option<OnDemand<M>>, is_lent: bool) -> &'a M {
    match text_encoders {
        Some(encoders) if is_lent => {
            encoders.model().expect("a pass begins when its encoders are there: this is a bug")
        }
        _ => model,
    }
}

const IS_LENT: &str = "a pass is lent where there are encoders on demand: this is a bug";
