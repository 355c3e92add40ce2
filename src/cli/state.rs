//! Opens what jobs live in: a file of this process, a database of several nodes, or nothing but memory.

use std::path::Path;
use std::sync::Arc;

use super::CliError;
use crate::config::{JobsConfig, StateDir};
use crate::http::ServerOptions;
use crate::job::node::NodeOptions;
use crate::job::objects::Objects;
use crate::job::store::{MemoryStore, PostgresStore, SqliteStore, StoreError};

/// Folder of finished clips within that of the state.
const CLIPS: &str = "clips";
/// Folder of what lies beside the rows of jobs.
const OBJECTS: &str = "objects";

/// Opens the store. Finished clips lie in the folder of the state unless `server` says where.
pub async fn open(jobs: &JobsConfig, server: &mut ServerOptions) -> Result<NodeOptions, CliError> {
    let dir = match (&jobs.state_dir, &jobs.database_url) {
        (Some(StateDir::Folder(dir)), _) => dir,
        (Some(StateDir::None), None) => return Ok(in_memory(server)),
        (Some(StateDir::None), Some(_)) => {
            return Err(refused("--state-dir none: a database needs a folder that its nodes share"));
        }
        (None, _) => {
            return Err(refused(
                "this user has no home: give --state-dir DIR, or none for jobs that end with the process",
            ));
        }
    };
    let name = jobs.node_name.clone().unwrap_or_else(usual_name);
    let (retention, is_shared) = (server.retention, jobs.database_url.is_some());
    let node = match &jobs.database_url {
        Some(url) => {
            let store = PostgresStore::connect(url.expose(), retention).await.map_err(unusable("--database-url"))?;
            NodeOptions { name, store: Arc::new(store), objects: objects(dir)?, is_durable: true, is_shared }
        }
        None => {
            let store = SqliteStore::open(dir, retention).await.map_err(|error| match error {
                StoreError::InUse { path } => refused(format!(
                    "--state-dir {path}: another process of tale has it; give this one a folder of its own, or none"
                )),
                error => unusable(&format!("--state-dir {}", dir.display()))(error),
            })?;
            NodeOptions { name, store: Arc::new(store), objects: objects(dir)?, is_durable: true, is_shared }
        }
    };
    server.output_dir.get_or_insert_with(|| dir.join(CLIPS));
    Ok(node)
}

fn in_memory(server: &ServerOptions) -> NodeOptions {
    NodeOptions {
        name: usual_name(),
        store: Arc::new(MemoryStore::new(server.retention)),
        objects: Objects::in_memory(),
        is_durable: false,
        is_shared: false,
    }
}

fn objects(dir: &Path) -> Result<Objects, CliError> {
    let failed = |source| CliError::Io { what: format!("--state-dir {}", dir.display()), source };
    Objects::in_folder(&dir.join(OBJECTS)).map_err(failed)
}

/// The host's name, and what tells its processes apart, those before this one too.
fn usual_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = host.trim();
    let host = if host.is_empty() { "node" } else { host };
    format!("{host}-{}", uuid::Uuid::now_v7().simple())
}

fn refused(problem: impl Into<String>) -> CliError {
    CliError::State(problem.into())
}

fn unusable(what: &str) -> impl Fn(StoreError) -> CliError {
    move |error| CliError::State(format!("{what}: {error}"))
}
