//! Reading some components of a model in bounded steps.
//!
//! Owns: the two builds of a model, over weights that note what is asked for and over those that are ready, and the steps
//! between them. Does not know: when a step is taken, or why the components are read.

use std::sync::Arc;

use super::Build;
use super::reread::Reread;
use crate::device::Placement;
use crate::error::Result;
use crate::weights::Ahead;

/// Most bytes of files that one step reads.
pub const STEP_BYTES: usize = 128 << 20;

/// A model of which some components are being read; it has no others.
pub struct Reading<M> {
    reread: Arc<Reread>,
    placement: Placement,
    components: Vec<String>,
    build: Build<M>,
    ahead: Arc<Ahead>,
    num_steps: usize,
    is_read: bool,
}

/// The same model wholly dry, which knows what its requests need.
pub struct DryModel<M> {
    /// Nothing may be computed from it.
    pub model: M,
    /// What the components take once they are read.
    pub weight_bytes: usize,
}

impl<M> Reading<M> {
    /// Of these components, for networks that compute at `placement`. Reads headers and no tensors.
    pub(super) fn begin(
        reread: &Arc<Reread>,
        placement: Placement,
        components: Vec<String>,
        build: Build<M>,
    ) -> Result<(Self, DryModel<M>)> {
        let ahead = Arc::new(Ahead::new(&placement.device));
        let (model, weight_bytes) = reread.noted(&placement, &components, build, &ahead)?;
        // The last step builds.
        let num_steps = ahead.num_steps(STEP_BYTES) + 1;
        let is_read = ahead.bytes_left() == 0;
        let reading = Self { reread: reread.clone(), placement, components, build, ahead, num_steps, is_read };
        Ok((reading, DryModel { model, weight_bytes }))
    }

    /// Calls of [`Reading::advance`] in all.
    pub fn num_steps(&self) -> usize {
        self.num_steps
    }

    /// Reads at most [`STEP_BYTES`]; with the last step the model.
    pub fn advance(&mut self) -> Result<Option<M>> {
        if self.is_read {
            return self.reread.built_of(&self.placement, &self.components, self.build, &self.ahead).map(Some);
        }
        self.is_read = !self.ahead.advance(STEP_BYTES)?;
        Ok(None)
    }
}
