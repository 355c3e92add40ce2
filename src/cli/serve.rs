//! `tale serve`: from a configuration to a server that answers until it is told to stop.

use std::io::{Write, stdout};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use tokio::net::TcpListener;
use tracing_subscriber::filter::LevelFilter;

use super::logs::{self, Libraries};
use super::watch::Watch;
use super::{CliError, privacy, progress, state, threads};
use crate::config::{Config, Settings};
use crate::engine::{Engine, EngineError};
use crate::http::{self, AppState};

/// At the end, threads that still load a model get this long.
const LAST_GRACE: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    settings: Settings,

    /// TOML file with any of these settings, in snake_case; flags win
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub fn run(args: ServeArgs) -> Result<(), CliError> {
    let config = Config::resolve(args.config.as_deref(), args.settings)?;
    let libraries = if config.unsafe_log_prompts { Libraries::MayLogPrompts } else { Libraries::Quiet };
    logs::init(config.log_format, LevelFilter::INFO, libraries);
    threads::check()?;
    config.server.connections.raise_file_limit();
    if !config.allow_core_dumps {
        privacy::close_memory()?;
    }
    let runtime = http::runtime().map_err(|source| CliError::Io { what: "cannot start threads".into(), source })?;
    let result = runtime.block_on(serve(config));
    runtime.shutdown_timeout(LAST_GRACE);
    result
}

/// Listens at once, so that liveness is answered and a busy address is told before minutes of loading; work is refused
/// until the models are there.
async fn serve(mut config: Config) -> Result<(), CliError> {
    let watch = Watch::start()?;
    let failed = |address| move |source| CliError::Io { what: format!("cannot serve on {address}"), source };
    // Before the other listener, which may take any port.
    let health = config.health_listen.map(|address| std::net::TcpListener::bind(address).map_err(failed(address)));
    let health = health.transpose()?;
    let listener = http::listen(config.listen).map_err(failed(config.listen))?;
    let node = state::open(&config.jobs, &mut config.server).await?;
    let state = AppState::with_jobs(config.server.clone(), node);
    let state = state.map_err(|source| CliError::Io { what: "cannot serve".into(), source })?;
    let stop = watch.over(state.clone(), health);
    let ended = answer(listener, &state, stop, config).await;
    // The watch holds on to the state until the process ends.
    state.remove_temporary_files();
    ended
}

/// Serves until `stop`; the models are loaded meanwhile.
async fn answer(
    listener: TcpListener,
    state: &AppState,
    stop: impl Future<Output = ()> + Send,
    config: Config,
) -> Result<(), CliError> {
    let failed = |source| CliError::Io { what: format!("cannot serve on {}", config.listen), source };
    let address = listener.local_addr().map_err(failed)?;
    let mut server = std::pin::pin!(http::serve(listener, state.clone(), stop, config.drain));
    let engine = tokio::select! {
        ended = &mut server => return ended.map_err(failed),
        engine = load(config.clone()) => engine?,
    };
    state.set_engine(engine);
    // The one line that scripts wait for; logs go to stderr. Nobody need read it: a closed stdout is no reason to stop.
    let _ = writeln!(stdout(), "listening on http://{address}");
    server.await.map_err(failed)
}

async fn load(config: Config) -> Result<Engine, EngineError> {
    let bar = progress::loading();
    let told = bar.clone();
    let on_component = move |model: &str, component: &str| {
        told.set_message(format!("{model} {component}"));
        tracing::info!(model, component, "loading");
    };
    let loading = tokio::task::spawn_blocking(move || Engine::load(config.models, config.engine, on_component));
    let engine = loading.await.map_err(|panic| EngineError::Thread(panic.to_string()))?;
    bar.finish_and_clear();
    engine
}
