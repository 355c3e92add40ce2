//! Whether the system lets this process have threads.
//!
//! The runtimes and pools that commands use panic where a thread cannot be made, or, worse, wait for one that never comes.
//! So a command asks first, while nothing is lost: it makes as many as it will, at once, and lets them go.

use std::sync::{Arc, RwLock};
use std::thread::{Builder, JoinHandle, available_parallelism};

use super::CliError;

/// Threads beside one per core of the runtime and one per core of the kernels' pool: the device, the watch, blocking work.
const OTHERS: usize = 8;
/// They do nothing.
const STACK_BYTES: usize = 64 << 10;

/// Fails when the threads of a command cannot be made.
pub fn check() -> Result<(), CliError> {
    make_at_once(2 * available_parallelism().map_or(1, usize::from) + OTHERS)
}

fn make_at_once(count: usize) -> Result<(), CliError> {
    let gate = Arc::new(RwLock::new(()));
    let closed = gate.write();
    let made: Result<Vec<JoinHandle<()>>, _> = (0..count)
        .map(|_| {
            let gate = gate.clone();
            Builder::new().name("rehearsal".into()).stack_size(STACK_BYTES).spawn(move || drop(gate.read()))
        })
        .collect();
    drop(closed);
    let failed = |source| CliError::Io { what: format!("{count} threads cannot be started"), source };
    for thread in made.map_err(failed)? {
        // Nothing in it panics, and nothing depends on it.
        let _ = thread.join();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_can_be_made_are_let_go() {
        let count = || std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
        let before = count();
        make_at_once(64).expect("a test may have threads");
        // Other tests come and go.
        assert!(count() < before + 64);
    }
}
