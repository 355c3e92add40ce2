//! Work that waits for files, on the runtime's threads for that; each kind has a bound of its own.
//!
//! Does not know: what is read. A file system that hangs holds up its own kind of work and nothing else.

use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use super::error::ApiError;

/// One kind of work with files.
pub(super) struct FileWork(Semaphore);

impl FileWork {
    /// At most so many pieces of it at a time; others wait.
    pub(super) const fn new(max_running: usize) -> Self {
        Self(Semaphore::const_new(max_running))
    }

    /// The result of `work`.
    pub(super) async fn run<T: Send + 'static>(
        &'static self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let permit = self.0.acquire().await.map_err(|_| ApiError::internal("work with files has ended"))?;
        // Held by the work and not by the request: what has begun goes on when the client has gone. It comes back with the
        // result, when the thread is free for the next.
        let done = spawn_blocking(move || (work(), permit));
        done.await.map(|(result, _)| result).map_err(|_| ApiError::internal("work with a file panicked"))
    }
}
