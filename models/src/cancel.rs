//! The word that nobody waits any longer, for work that is not a step of a session.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Shared by whoever waits and whoever works.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Says that nobody waits any longer.
    pub fn cancel(&self) {
        self.0.store(true, Relaxed);
    }

    /// Whether nobody waits any longer.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Relaxed)
    }

    /// Cancels when it is dropped: who waits keeps it for as long.
    pub fn cancel_on_drop(&self) -> CancelOnDrop {
        CancelOnDrop(self.clone())
    }
}

/// See [`CancelToken::cancel_on_drop`].
#[derive(Debug)]
pub struct CancelOnDrop(CancelToken);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}
