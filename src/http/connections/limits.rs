//! How many connections there may be, how long each may wait, and how large what it sends may be.

use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Most bytes of a head: request line and header fields.
pub(super) const MAX_HEAD_BYTES: usize = 64 << 10;
/// Most header fields of a head; hyper's own bound.
pub(super) const MAX_HEADERS: usize = 100;
/// Most bytes that one chunk of a body may announce: more than any body may have.
pub(super) const MAX_CHUNK_BYTES: u64 = 64 << 20;

/// Most connections when nothing else is configured and the process may have files enough.
pub const DEFAULT_MAX_CONNECTIONS: usize = 8192;
/// Files beside those of connections: models, logs, the reserve, the health listener's connections.
const RESERVED_FILES: u64 = 128;
/// Files that a connection may take: its socket, and the clip that it is sent.
const FILES_PER_CONNECTION: u64 = 2;
/// Fewest connections that the limit of files leaves room for, however low it is.
const MIN_CONNECTIONS: u64 = 16;

/// How long a connection may stay as it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// For a head, from its first byte or, of a new connection, from its beginning.
    pub(super) header: Duration,
    /// Without a request.
    pub(super) idle: Duration,
    /// For a client that takes nothing of its answer.
    pub(super) send: Duration,
}

/// Bounds of a listener's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Most connections at once; as many as [`DEFAULT_MAX_CONNECTIONS`] and the process's limit of files allow when absent.
    pub max_connections: Option<usize>,
    /// Most connections of one client address; three quarters of all when absent.
    pub max_per_address: Option<usize>,
    /// For the head of a request, from its first byte; of a new connection, from its beginning.
    pub header: Duration,
    /// Between an answer and the next request.
    pub idle: Duration,
    /// For a client that takes nothing of its answer.
    pub send: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            max_connections: None,
            max_per_address: None,
            header: Duration::from_secs(10),
            idle: Duration::from_secs(75),
            send: Duration::from_secs(300),
        }
    }
}

impl ConnectionLimits {
    /// Most connections, in all and per address.
    pub(super) fn most(&self) -> (usize, usize) {
        let most = self.max_connections.unwrap_or_else(|| default_for(getrlimit(Resource::Nofile).current));
        let of_address = self.max_per_address.unwrap_or(most - most / 4);
        (most, of_address.min(most))
    }

    pub(super) fn patience(&self) -> Patience {
        Patience { header: self.header, idle: self.idle, send: self.send }
    }

    /// Raises the process's soft limit of open files to what these connections need, as far as its hard limit allows.
    pub fn raise_file_limit(&self) {
        let needed = files_for(self.max_connections.unwrap_or(DEFAULT_MAX_CONNECTIONS));
        let limit = getrlimit(Resource::Nofile);
        let Some(current) = limit.current.filter(|current| *current < needed) else { return };
        let raised = limit.maximum.unwrap_or(needed).min(needed).max(current);
        if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: Some(raised), ..limit }) {
            tracing::warn!(%error, raised, "the limit of open files could not be raised");
        }
        if let Some(wanted) = self.max_connections.filter(|_| raised < needed) {
            tracing::warn!(max_connections = wanted, files = raised, needed, "fewer files may be open than this needs");
        }
    }
}

fn files_for(connections: usize) -> u64 {
    (connections as u64).saturating_mul(FILES_PER_CONNECTION).saturating_add(RESERVED_FILES)
}

/// Most connections of a process that may open this many files; `None` is without a limit.
fn default_for(max_files: Option<u64>) -> usize {
    let room = max_files.map_or(u64::MAX, |files| files.saturating_sub(RESERVED_FILES) / FILES_PER_CONNECTION);
    usize::try_from(room.max(MIN_CONNECTIONS)).unwrap_or(usize::MAX).min(DEFAULT_MAX_CONNECTIONS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_leaves_files_for_everything_else() {
        assert_eq!(default_for(Some(1024)), 448);
        assert_eq!(default_for(Some(20)), MIN_CONNECTIONS as usize);
        assert_eq!(default_for(Some(1 << 20)), DEFAULT_MAX_CONNECTIONS);
        assert_eq!(default_for(None), DEFAULT_MAX_CONNECTIONS);
        assert_eq!(default_for(Some(files_for(700))), 700);
    }
}
