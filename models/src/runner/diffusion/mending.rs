//! The steps of the runner whose results are not finite in fewer than 32 bits: they are done once more in f32.
//!
//! A session whose prediction or pixels are not finite is *mended*: the networks of that phase are read in f32, in steps
//! of their own, and its part of the work is done again with them. Owns: those networks, for as long as a session waits
//! for them or works with them. Does not know: how a network is read in f32 (`retry`).

use super::batcher::{Layers, MendKey};
use super::block_cache::BlockCache;
use super::course::Expert;
use super::loading::Coming;
use super::model::DiffusionModel;
use super::narrow::are_finite;
use super::retry::{ReadInF32, WorkBytes};
use super::session::Session;
use super::{DiffusionRunner, MEMBERS_EXIST, Outcome, predict_in_passes};
use crate::device::give_back_freed_memory;
use crate::error::{Error, Result};
use crate::request::{Events, Phase, SessionId};

/// The networks of one phase in f32, there or on their way.
pub(super) struct Wide<M> {
    model: Coming<M>,
    weight_bytes: usize,
    work_bytes: WorkBytes,
}

impl<M> Wide<M> {
    /// Once it is there.
    pub(super) fn model(&self) -> Option<&M> {
        self.model.model()
    }
}

impl<M: DiffusionModel> DiffusionRunner<M> {
    /// What becomes of a session whose last result is not finite.
    pub(super) fn begin_mending(&mut self, id: SessionId, phase: Phase) -> Outcome {
        let session = self.session(id);
        if session.mending.is_some() {
            return Outcome::Failed(Error::NotFinite { phase: phase.as_str() });
        }
        if !self.can_mend(session.expert(), phase) {
            return Outcome::Failed(Error::NotFinite { phase: phase.as_str() });
        }
        tracing::warn!(phase = phase.as_str(), "a value is not finite; computing once more in f32");
        self.session_mut(id).begin_mending(phase);
        Outcome::GoesOn
    }

    /// Whether there are networks of fewer than 32 bits that can be read in f32.
    pub(super) fn can_mend(&self, expert: Expert, phase: Phase) -> bool {
        let narrow = self.model.narrow_networks();
        self.in_f32.is_some() && narrow.is_some_and(|networks| !networks.components(phase, expert).is_empty())
    }

    /// The networks that a session is mended with, once they are there.
    pub(super) fn wide_model(&self, key: MendKey) -> Option<&M> {
        self.wide.get(&key).and_then(Wide::model)
    }

    /// The next step of reading networks in f32 for these sessions. Where they cannot be read, that is the error of these
    /// sessions.
    pub(super) fn load_in_f32(&mut self, key: MendKey, ids: &[SessionId], events: &mut Events) {
        let read = self.read_on_in_f32(key, ids);
        if read.is_err() {
            self.wide.remove(&key);
        }
        for id in ids {
            let outcome = match &read {
                Ok(()) => Outcome::GoesOn,
                Err(error) => Outcome::Failed(error.restate()),
            };
            self.settle(*id, outcome, events);
        }
    }

    fn read_on_in_f32(&mut self, key: MendKey, ids: &[SessionId]) -> Result<()> {
        match self.wide.get_mut(&key) {
            Some(wide) => wide.model.advance().map(|_| ()),
            None => {
                // Nothing is read before the caller has heard of its bytes.
                let wide = self.begin_in_f32(key, ids)?;
                self.wide.insert(key, wide);
                Ok(())
            }
        }
    }

    fn begin_in_f32(&self, (expert, phase): MendKey, ids: &[SessionId]) -> Result<Wide<M>> {
        let narrow = self.model.narrow_networks().expect(IS_NARROW);
        let read = self.in_f32.as_ref().expect(IS_NARROW);
        // The one with the most rows needs the most memory.
        let largest =
            ids.iter().max_by_key(|id| self.session(**id).num_rows()).expect("a step has members: this is a bug");
        let ReadInF32 { loading, weight_bytes, work_bytes } =
            read(narrow.components(phase, expert), phase, &self.session(*largest).request)?;
        Ok(Wide { model: Coming::new(loading), weight_bytes, work_bytes })
    }

    /// A prediction once more, and the step that it leads to.
    pub(super) fn mend_prediction(&mut self, id: SessionId, events: &mut Events) -> Result<()> {
        let session = self.sessions.get_mut(&id).expect(MEMBERS_EXIST);
        // What is kept may be what is not finite.
        session.denoising_mut().caches.iter_mut().for_each(BlockCache::forget);
        let key = (session.expert(), Phase::Denoise);
        self.activate(Layers::InF32(key), &[id]);
        let model = self.wide_model(key).expect("a session waits for its networks: this is a bug");
        let session = self.session(id);
        let denoising = session.denoising();
        let rows: Vec<_> = denoising.rows(&session.request).collect();
        let predictions = predict_in_passes(model, denoising.expert(), &rows, 1, &mut [])?;
        let prediction = denoising.guided(&mut predictions.into_iter(), &session.request)?;
        let outcome = match are_finite(std::slice::from_ref(&prediction))?[..] {
            [true] => {
                self.session_mut(id).end_mending();
                self.advance(id, &prediction, events)?;
                Outcome::GoesOn
            }
            _ => Outcome::Failed(Error::NotFinite { phase: Phase::Denoise.as_str() }),
        };
        self.settle(id, outcome, events);
        self.release_wide();
        Ok(())
    }

    /// Bytes of the networks in f32 and of the work with them, which no session has reserved.
    pub(super) fn mending_bytes(&self) -> usize {
        let of_one = |(key, wide): (&MendKey, &Wide<M>)| {
            let waiting = self.sessions.values().filter(|session| session.mend_key() == Some(*key));
            wide.weight_bytes + waiting.map(|session| (wide.work_bytes)(&session.request)).max().unwrap_or(0)
        };
        self.wide.iter().map(of_one).sum()
    }

    /// Lets networks in f32 go that nobody waits for or works with.
    pub(super) fn release_wide(&mut self) {
        let before = self.wide.len();
        let sessions = &self.sessions;
        let is_needed = |key: &MendKey| sessions.values().any(|session: &Session<M>| session.mend_key() == Some(*key));
        self.wide.retain(|key, _| is_needed(key));
        if self.wide.len() < before {
            give_back_freed_memory();
        }
    }
}

const IS_NARROW: &str = "only what was computed in fewer bits is mended: this is a bug";
