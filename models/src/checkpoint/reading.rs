//! Reading some components of a model in bounded steps.
//!
//! Owns: the two builds of a model, over weights that note what is asked for and over those that are ready, and the steps
//! between them; the components that are away from the device until somebody needs them. Does not know: when a step is
//! taken, or why.

use std::sync::Arc;

use candle_core::DType;

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

impl Reread {
    /// Begins to read a model whose components of these names are in f32. The others are dry: they take no memory, and
    /// nothing may be computed from them.
    pub fn begin_in_f32<M>(
        self: &Arc<Self>,
        components: &[&str],
        build: Build<M>,
    ) -> Result<(Reading<M>, DryModel<M>)> {
        let components = components.iter().map(|name| (*name).to_owned()).collect();
        Reading::begin(self, self.placement().computing_in(DType::F32), components, build)
    }
}

/// Components that are away from the device until somebody needs them.
pub struct LentComponents {
    names: Vec<String>,
    /// What they take on the device while they are there.
    bytes: usize,
    reread: Arc<Reread>,
}

impl LentComponents {
    pub(super) fn new(names: Vec<String>, bytes: usize, reread: Reread) -> Self {
        Self { names, bytes, reread: Arc::new(reread) }
    }

    /// What they take on the device while they are there.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Their names.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Begins to read a model that has them on the device and nothing else there.
    pub fn read<M>(&self, build: Build<M>) -> Result<Reading<M>> {
        Ok(Reading::begin(&self.reread, self.reread.placement().clone(), self.names.clone(), build)?.0)
    }
}
