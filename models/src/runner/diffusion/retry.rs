//! Reading networks of fewer than 32 bits in f32, for what overflows in them.
//!
//! Owns: which bytes that takes. Does not know: sessions, what is computed.

use super::loading::Loading;
use super::model::DiffusionModel;
use crate::checkpoint::{Build, DryModel, Reread};
use crate::diffusion::DiffusionRequest;
use crate::error::{Error, Result};
use crate::request::Phase;

/// Begins to read a model whose components with these names compute in f32, and which has no others, for a phase of a
/// request.
pub type InF32<M> = Box<dyn Fn(&[&str], Phase, &DiffusionRequest) -> Result<ReadInF32<M>> + Send>;

/// A model in f32 on its way.
pub struct ReadInF32<M> {
    /// It has the networks of one phase.
    pub loading: Box<dyn Loading<M>>,
    /// What these take.
    pub weight_bytes: usize,
    /// What the work for a request takes beside them.
    pub work_bytes: WorkBytes,
}

/// Bytes for a request.
pub type WorkBytes = Box<dyn Fn(&DiffusionRequest) -> usize + Send>;

/// Reads from where the model was read, if the device has the bytes for the weights and the work.
pub fn reread_in_f32<M: DiffusionModel + 'static>(reread: Reread, build: Build<M>) -> InF32<M> {
    let reread = std::sync::Arc::new(reread);
    Box::new(move |components, phase, request| {
        let (loading, DryModel { model, weight_bytes }) = reread.begin_in_f32(components, build)?;
        let work_bytes = move |request: &DiffusionRequest| {
            // Mended row by row.
            let plan = model.plan(request, 1);
            let bytes = plan.phases().iter().find(|of| of.phase == phase).map_or(0, |of| of.bytes);
            bytes + model.adapters().map_or(0, |adapters| adapters.footprint_bytes(&request.loras))
        };
        check_room(phase, weight_bytes + work_bytes(request), reread.spare_bytes()?)?;
        Ok(ReadInF32 { loading: Box::new(loading), weight_bytes, work_bytes: Box::new(work_bytes) })
    })
}

/// `spare_bytes` is `None` where the operating system hands out memory.
fn check_room(phase: Phase, needed_bytes: usize, spare_bytes: Option<usize>) -> Result<()> {
    match spare_bytes {
        Some(free_bytes) if free_bytes < needed_bytes => {
            Err(Error::OutOfMemory { phase: Some(phase), needed_bytes, free_bytes })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_with_both_figures() {
        assert!(check_room(Phase::Denoise, 100, None).is_ok());
        assert!(check_room(Phase::Denoise, 100, Some(100)).is_ok());
        let refused = check_room(Phase::Denoise, 100, Some(99)).expect_err("one byte is missing").to_string();
        assert_eq!(refused, "not enough memory: 100 bytes needed in phase denoise, 99 free");
    }
}
