//! Work that logs nothing, because what it would say was said, or will be.

use tracing::subscriber::{NoSubscriber, with_default};

/// What `work` gives, of which no log line is written by this thread.
pub(crate) fn quietly<T>(work: impl FnOnce() -> T) -> T {
    with_default(NoSubscriber::default(), work)
}
