//! Models that are read while others work: in steps, each of a bounded part.

use crate::checkpoint::Reading;
use crate::error::Result;

/// A model on its way.
pub trait Loading<M>: Send {
    /// Steps in all.
    fn num_steps(&self) -> usize;

    /// The next step, of a bounded number of bytes; the model with the last one.
    fn advance(&mut self) -> Result<Option<M>>;
}

impl<M> Loading<M> for Reading<M> {
    fn num_steps(&self) -> usize {
        Reading::num_steps(self)
    }

    fn advance(&mut self) -> Result<Option<M>> {
        Reading::advance(self)
    }
}

/// A model that comes and goes.
pub(super) enum Coming<M> {
    /// So many steps of its loading are done.
    Loading(Box<dyn Loading<M>>, usize),
    /// It is there.
    There(M),
}

impl<M> Coming<M> {
    pub(super) fn new(loading: Box<dyn Loading<M>>) -> Self {
        Self::Loading(loading, 0)
    }

    pub(super) fn model(&self) -> Option<&M> {
        match self {
            Self::There(model) => Some(model),
            Self::Loading(..) => None,
        }
    }

    /// The next step: steps done, and steps in all. Not called when it is there.
    pub(super) fn advance(&mut self) -> Result<(usize, usize)> {
        let Self::Loading(loading, done) = self else { unreachable!("what is there is not loaded: this is a bug") };
        let total = loading.num_steps();
        *done += 1;
        let progress = (*done, total);
        if let Some(model) = loading.advance()? {
            *self = Self::There(model);
        }
        Ok(progress)
    }
}
