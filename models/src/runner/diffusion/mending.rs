//! The steps of the runner whose results are not finite in fewer than 32 bits: they are done once more in f32.
//!
//! Owns: what is done once more, and for whom. Does not know: how a network is read in f32 (`retry`).

use candle_core::Tensor;

use super::block_cache::BlockCache;
use super::course::Expert;
use super::model::DiffusionModel;
use super::narrow::are_finite;
use super::pixels::to_frames;
use super::session::Session;
use super::{DiffusionRunner, predict_in_passes};
use crate::device::give_back_freed_memory;
use crate::diffusion::DiffusionRequest;
use crate::error::{Error, Result};
use crate::request::{Event, Events, Phase, SessionId};

impl<M: DiffusionModel> DiffusionRunner<M> {
    /// Predictions that are not finite are made once more in f32; where that does not help either, they are the errors of
    /// their sessions, and of those alone.
    pub(super) fn mended(&mut self, ids: &[SessionId], predictions: Vec<Tensor>) -> Result<Vec<Result<Tensor>>> {
        let finite = are_finite(&predictions)?;
        let broken: Vec<SessionId> =
            ids.iter().zip(&finite).filter(|(_, finite)| !**finite).map(|(id, _)| *id).collect();
        let again = self.predict_in_f32(&broken);
        if !broken.is_empty() {
            give_back_freed_memory();
        }
        let mut again = again.into_iter();
        let mended = predictions.into_iter().zip(finite).map(|(prediction, finite)| match finite {
            true => Ok(prediction),
            false => again.next().expect("one for each that is broken: this is a bug"),
        });
        Ok(mended.collect())
    }

    fn predict_in_f32(&mut self, ids: &[SessionId]) -> Vec<Result<Tensor>> {
        // The one with the most rows needs the most memory.
        let Some(largest) = ids.iter().max_by_key(|id| self.session(**id).num_rows()) else { return Vec::new() };
        let request = &self.session(*largest).request;
        let expert = self.session(*largest).denoising().expert();
        let model = self.read_in_f32(expert, Phase::Denoise, request).and_then(|model| {
            // The members of a step have the same ones.
            if let Some(adapters) = model.adapters() {
                adapters.activate(adapters.prepare(&request.loras)?.as_ref());
            }
            Ok(model)
        });
        let model = match model {
            Ok(model) => model,
            Err(error) => return ids.iter().map(|_| Err(error.restate())).collect(),
        };
        ids.iter()
            .map(|id| {
                // What is kept may be what is not finite.
                self.session_mut(*id).denoising_mut().caches.iter_mut().for_each(BlockCache::forget);
                predict_alone(self.session(*id), &model, self.max_rows)
            })
            .collect()
    }

    /// A model whose networks of `phase` compute in f32; an error where this one's do so already.
    fn read_in_f32(&self, expert: Expert, phase: Phase, request: &DiffusionRequest) -> Result<M> {
        let narrow = self.model.narrow_networks();
        let components = narrow.map_or(&[][..], |networks| networks.components(phase, expert));
        match &self.in_f32 {
            Some(read) if !components.is_empty() => {
                tracing::warn!(phase = phase.as_str(), "a value is not finite; computing once more in f32");
                read(components, phase, request)
            }
            _ => Err(Error::NotFinite { phase: phase.as_str() }),
        }
    }

    /// All pixels once more, in f32 and at once: a chunk depends on those before it, which were narrow too. Frames of the
    /// first `told` chunks are out already.
    pub(super) fn decode_in_f32(&self, id: SessionId, told: usize, events: &mut Events) -> Result<()> {
        let session = self.session(id);
        let latents = session.latents();
        let model = self.read_in_f32(latents.expert, Phase::VaeDecode, &session.request)?;
        let mut decoding = model.begin_decode(latents.expert, &latents.values, &session.request)?;
        let total = model.num_decode_steps(latents.expert, &session.request);
        for done in 1..=total {
            let pixels = model.decode_next(&mut decoding)?;
            if done <= told {
                continue;
            }
            if let Some(pixels) = pixels {
                let frames = to_frames(&pixels, &session.request)?;
                let frames = frames.ok_or(Error::NotFinite { phase: Phase::VaeDecode.as_str() })?;
                events.emit(id, Event::Frames(frames));
            }
            events.emit(id, Event::Progress { phase: Phase::VaeDecode, done, total });
        }
        Ok(())
    }
}

/// The guided prediction of one session by another model, if it is finite.
fn predict_alone<M: DiffusionModel>(session: &Session<M>, model: &M, max_rows: usize) -> Result<Tensor> {
    let denoising = session.denoising();
    let rows: Vec<_> = denoising.rows(&session.request).collect();
    let predictions = predict_in_passes(model, denoising.expert(), &rows, max_rows, &mut [])?;
    let prediction = denoising.guided(&mut predictions.into_iter(), &session.request)?;
    match are_finite(std::slice::from_ref(&prediction))?[..] {
        [true] => Ok(prediction),
        _ => Err(Error::NotFinite { phase: Phase::Denoise.as_str() }),
    }
}
