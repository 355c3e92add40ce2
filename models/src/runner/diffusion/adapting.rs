//! The steps of the runner that bring the LoRA terms of requests to the device, and whose layers they are for.
//!
//! A session waits for its terms before the step that needs them: they are read in bounded steps, and sessions with the
//! same ones wait together. Owns: who waits for which set, and who holds it. Does not know: files and layers
//! ([`crate::lora::adapters`]).

use super::batcher::{Layers, Load};
use super::model::DiffusionModel;
use super::session::Session;
use super::{DiffusionRunner, MEMBERS_EXIST, Outcome};
use crate::checkpoint::STEP_BYTES;
use crate::error::Result;
use crate::lora::{Adapters, LoraKey, Making};
use crate::request::{Event, Events, Phase, SessionId};

impl<M: DiffusionModel> DiffusionRunner<M> {
    /// The terms that a session's next step needs and that it does not hold yet.
    pub(super) fn missing_adapters(&self, session: &Session<M>) -> Option<Load> {
        let layers = self.layers_of_next_step(session);
        let is_held = session.adapters.iter().any(|(of, _)| *of == layers);
        let loras = LoraKey::of(&session.request.loras);
        let is_missing = !loras.is_empty() && !is_held && self.adapters(layers).is_some();
        is_missing.then_some(Load::Adapters(layers, loras))
    }

    /// Gives a session the terms of its next step where another one holds them already.
    pub(super) fn share_adapters(&mut self, id: SessionId) {
        let session = self.session(id);
        let Some(Load::Adapters(layers, _)) = self.missing_adapters(session) else { return };
        let ready = self.adapters(layers).and_then(|adapters| adapters.ready(&session.request.loras));
        self.session_mut(id).adapters.extend(ready.map(|set| (layers, set)));
    }

    /// The next step towards the terms that all members wait for.
    pub(super) fn load_adapters(&mut self, layers: Layers, ids: &[SessionId], events: &mut Events) -> Result<()> {
        let loras = &self.session(ids[0]).request.loras;
        let adapters = self.adapters(layers).expect("only layers that take terms are waited for: this is a bug");
        let making = adapters.advance(loras, STEP_BYTES)?;
        for id in ids {
            match &making {
                Making::UnderWay { done, total } => {
                    events.emit(*id, Event::Progress { phase: Phase::Load, done: *done, total: *total });
                }
                Making::Ready(set) => self.session_mut(*id).adapters.push((layers, set.clone())),
            }
            self.settle(*id, Outcome::GoesOn, events);
        }
        Ok(())
    }

    /// Puts the terms of these sessions, which are the same ones, into the layers.
    pub(super) fn activate(&self, layers: Layers, ids: &[SessionId]) {
        let session = self.sessions.get(&ids[0]).expect(MEMBERS_EXIST);
        let held = session.adapters.iter().find(|(of, _)| *of == layers);
        if let Some(adapters) = self.adapters(layers) {
            adapters.activate(held.map(|(_, set)| set));
        }
    }

    /// Lets go of terms that no session holds or waits for.
    pub(super) fn release_adapters(&mut self) {
        let Some(adapters) = self.model.adapters() else { return };
        adapters.release_unused();
        adapters
            .retain_under_way(|key| self.sessions.values().any(|session| LoraKey::of(&session.request.loras) == *key));
    }

    /// The layers that take terms; `None` where there are none.
    fn adapters(&self, layers: Layers) -> Option<&Adapters> {
        match layers {
            Layers::Own => self.model.adapters(),
            Layers::OfLentEncoders => self.lent_encoders()?.adapters(),
            Layers::InF32(key) => self.wide_model(key)?.adapters(),
        }
    }

    fn layers_of_next_step(&self, session: &Session<M>) -> Layers {
        match session.mend_key() {
            Some(key) if key.1 == Phase::Denoise => Layers::InF32(key),
            _ if self.is_encoded_by_lent(session) => Layers::OfLentEncoders,
            _ => Layers::Own,
        }
    }

    /// Whether encoders that come and go compute its next pass, with terms in their layers.
    fn is_encoded_by_lent(&self, session: &Session<M>) -> bool {
        session.next_inputs().is_some_and(|inputs| inputs.pass.loras.is_some() && self.is_lent(&inputs.pass))
    }
}
