//! What happens when a network of fewer than 32 bits overflows: its part of the work is done once more in f32.
//!
//! Owns: reading the networks of one phase in f32, for as long as that work takes. Does not know:
//! sessions, what is computed. The second model is freed after the step that needed it, so that what a session has reserved
//! is what it holds between steps; the bytes that it takes in the step are asked of the device beforehand.

use super::model::DiffusionModel;
use crate::checkpoint::{Build, Reread};
use crate::diffusion::DiffusionRequest;
use crate::error::{Error, Result};
use crate::request::Phase;

/// Reads a model whose components with these names compute in f32, and which has no others, for a phase of a request.
pub type InF32<M> = Box<dyn Fn(&[&str], Phase, &DiffusionRequest) -> Result<M> + Send>;

/// Reads from where the model was read, if the device has the bytes for the weights and the work.
pub fn reread_in_f32<M: DiffusionModel + 'static>(reread: Reread, build: Build<M>) -> InF32<M> {
    Box::new(move |components, phase, request| {
        let (model, weight_bytes) = reread.dry_in_f32(components, build)?;
        let plan = model.plan(request);
        let work_bytes = plan.phases().iter().find(|of| of.phase == phase).map_or(0, |of| of.bytes);
        let lora_bytes = model.adapters().map_or(0, |adapters| adapters.footprint_bytes(&request.loras));
        check_room(phase, weight_bytes + work_bytes + lora_bytes, reread.spare_bytes()?)?;
        reread.in_f32(components, build)
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
