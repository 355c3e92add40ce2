//! `tale serve`: from a configuration to a server that answers until it is told to stop.

use std::io::{Write, stdout};
use std::path::PathBuf;
use std::process::exit;
use std::time::Duration;

use clap::Args;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::filter::LevelFilter;

use super::{CliError, logs, progress, threads};
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
    logs::init(config.log_format, LevelFilter::INFO);
    threads::check()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|source| CliError::Io { what: "cannot start threads".into(), source })?;
    let result = runtime.block_on(serve(config));
    runtime.shutdown_timeout(LAST_GRACE);
    result
}

/// Listens at once, so that liveness is answered and a busy address is told before minutes of loading; work is refused
/// until the models are there.
async fn serve(config: Config) -> Result<(), CliError> {
    let stop = stop_signal()?;
    let failed = |source| CliError::Io { what: format!("cannot serve on {}", config.listen), source };
    let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let state = AppState::new(config.server.clone())
        .map_err(|source| CliError::Io { what: "cannot make the folder for finished clips".into(), source })?;
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

/// Resolves at the first SIGTERM or SIGINT. The second one ends the process at once.
fn stop_signal() -> Result<impl Future<Output = ()> + Send, CliError> {
    let failed = |source| CliError::Io { what: "cannot listen for signals".into(), source };
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    Ok(async move {
        let number = either(&mut interrupt, &mut terminate).await;
        tracing::info!(signal = number, "stopping; the same signal again ends at once");
        tokio::spawn(async move { exit(128 + either(&mut interrupt, &mut terminate).await) });
    })
}

/// The number of the signal that came.
async fn either(interrupt: &mut Signal, terminate: &mut Signal) -> i32 {
    tokio::select! {
        _ = interrupt.recv() => SignalKind::interrupt().as_raw_value(),
        _ = terminate.recv() => SignalKind::terminate().as_raw_value(),
    }
}
