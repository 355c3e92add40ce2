//! The thread that watches while others work: it hears signals and answers the health listener.
//!
//! It has a runtime of its own, so that neither waits for what the rest of the process does.

use std::io;
use std::net::TcpListener;
use std::process::exit;
use std::sync::{Arc, OnceLock};

use tokio::runtime::{Builder, Handle};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use super::CliError;
use crate::http::{self, AppState};

/// Number of SIGHUP, in masks of `/proc/self/status` the lowest bit.
const SIGHUP_BIT: u64 = 1;

/// The watching thread.
pub struct Watch {
    runtime: Handle,
    state: Arc<OnceLock<AppState>>,
    stop: oneshot::Receiver<()>,
}

impl Watch {
    /// Hears signals from now on.
    pub fn start() -> Result<Self, CliError> {
        let failed = |source| CliError::Io { what: "cannot listen for signals".into(), source };
        let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let handle = runtime.handle().clone();
        let signals = {
            let _entered = handle.enter();
            Signals::new().map_err(failed)?
        };
        let (told, stop) = oneshot::channel();
        let state = Arc::new(OnceLock::new());
        let of_thread = state.clone();
        std::thread::Builder::new()
            .name("watch".into())
            .spawn(move || runtime.block_on(hear(signals, told, of_thread)))
            .map_err(failed)?;
        Ok(Self { runtime: handle, state, stop })
    }

    /// Answers for this server: what it leaves behind is removed at an end that waits for nothing, and its health is told on
    /// `listener`. Resolves when it should stop.
    pub fn over(self, state: AppState, listener: Option<TcpListener>) -> impl Future<Output = ()> + Send {
        if let Some(listener) = listener {
            let state = state.clone();
            self.runtime.spawn(async move {
                match listener.set_nonblocking(true).and_then(|()| tokio::net::TcpListener::from_std(listener)) {
                    Ok(listener) => {
                        if let Ok(address) = listener.local_addr() {
                            tracing::info!(%address, "health is answered");
                        }
                        http::serve_health(listener, state).await;
                    }
                    Err(error) => tracing::error!(%error, "the health listener cannot be used"),
                }
            });
        }
        let _ = self.state.set(state);
        let stop = self.stop;
        async move {
            // The thread ends with the process.
            let _ = stop.await;
        }
    }
}

/// The first signal tells the server, the second one ends the process.
async fn hear(mut signals: Signals, told: oneshot::Sender<()>, state: Arc<OnceLock<AppState>>) {
    let number = signals.next().await;
    tracing::info!(signal = number, "stopping; a signal again ends at once");
    let _ = told.send(());
    let number = signals.next().await;
    if let Some(state) = state.get() {
        state.remove_temporary_files();
    }
    exit(128 + number)
}

/// What asks a server to stop.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// `None` where it is ignored, as under `nohup`.
    hangup: Option<Signal>,
}

impl Signals {
    fn new() -> io::Result<Self> {
        let hangup = SignalKind::hangup();
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: if ignores_hangup() { None } else { Some(signal(hangup)?) },
        })
    }

    /// The number of the signal that came.
    async fn next(&mut self) -> i32 {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        let kind = tokio::select! {
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.terminate.recv() => SignalKind::terminate(),
            _ = hangup => SignalKind::hangup(),
        };
        kind.as_raw_value()
    }
}

/// Whether whoever started this process wants it to outlive a terminal.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & SIGHUP_BIT != 0)
}
