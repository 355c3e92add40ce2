//! What other processes of this user may see of the memory of a server, in which prompts and answers are.

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

use super::CliError;

/// From now on the system writes no core dump of this process, and no process without privileges may trace it or read its
/// memory.
pub fn close_memory() -> Result<(), CliError> {
    let failed = |source: rustix::io::Errno| CliError::Io {
        what: "cannot forbid core dumps (--allow-core-dumps leaves them)".into(),
        source: source.into(),
    };
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).map_err(failed)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed)
}
