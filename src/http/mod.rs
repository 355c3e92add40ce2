//! HTTP: the OpenAI shapes over the engine and the jobs.
//!
//! Owns: routes, wire types, errors and their statuses, admission, drain. This is the only place that knows axum, status
//! codes and wire JSON. Does not know: how a request is worked off.

use std::future::Future;
use std::io;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodRouter, get, post};
use tale_models::DiffusionCard;
use tale_models::chat_template::threads::{LITTLE_STACK_BYTES, render_little_on_this_thread};
use tale_models::diffusion::Medium;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;

use self::admission::{Admission, Served};
use self::body::memory::BodyMemory;
use self::connections::Routes;
use self::error::ApiError;
use crate::compute::Compute;
use crate::engine::Engine;
use crate::job::node::{Node, NodeOptions};
use crate::job::objects::Objects;
use crate::job::output::{DEFAULT_MIN_FREE_BYTES, OutputDir};
use crate::job::store::{MemoryStore, Retention};
use crate::telemetry;

mod admission;
mod body;
mod browsers;
mod client;
mod cold_start;
mod connections;
mod cors;
mod diffusion;
mod error;
mod files;
mod health;
mod images;
mod jobs;
mod models;
mod openai;
pub mod openapi;
mod pages;
mod parameters;
mod path;
mod peer;
mod sse;
mod stored;
mod text;
mod videos;

pub use body::{DEFAULT_MAX_BODY_MEMORY, MAX_BODY_BYTES, MAX_PICTURE_BODY_BYTES};
pub use browsers::AllowedHost;
pub use connections::{ConnectionLimits, DEFAULT_MAX_CONNECTIONS, listen};
pub use cors::Origin;
pub use images::MAX_IMAGES;
pub use models::ModelManagement;
pub use peer::Peer;
pub use text::wire::MAX_CHOICES;

/// Requests that may generate at once when nothing else is configured.
pub const DEFAULT_MAX_REQUESTS: usize = 1024;
/// Pieces of work that may wait for a thread that computes, beside one of each request that generates.
const MAX_WAITING_WORK: usize = 256;
/// How often a drain looks whether the last answer is sent.
const DRAIN_POLL: Duration = Duration::from_millis(10);
/// How often the disk of finished clips is looked at.
const DISK_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is looked whether models are idle.
const IDLE_INTERVAL: Duration = Duration::from_secs(1);
/// Bounds of the health listener, which a few probes ask.
const HEALTH_CONNECTIONS: ConnectionLimits = ConnectionLimits {
    max_connections: Some(32),
    max_per_address: Some(32),
    header: Duration::from_secs(10),
    idle: Duration::from_secs(75),
    send: Duration::from_secs(10),
};
/// After the drain, connections get this long to hear the end of their answers.
const CLOSE_GRACE: Duration = Duration::from_secs(2);

/// What the server is configured with.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Most requests that generate at once; clients share them.
    pub max_requests: usize,
    /// Most memory of bodies, and of the pictures in them, of all requests together.
    pub max_body_memory: usize,
    /// Threads that compute for requests, beside those that wait for connections; two at least.
    pub compute_threads: usize,
    /// Where finished clips lie; a folder of this process alone, removed at its end, when absent.
    pub output_dir: Option<PathBuf>,
    /// Bytes that must be free on its disk for a clip to be taken.
    pub min_free_disk_bytes: u64,
    /// How many jobs are kept.
    pub retention: Retention,
    /// Web pages that may call the server from a browser.
    pub cors_origins: Vec<Origin>,
    /// Names by which the server may be asked, besides addresses, loopback names and names without a dot.
    pub allowed_hosts: Vec<AllowedHost>,
    /// How many connections there may be, and how long they may wait.
    pub connections: ConnectionLimits,
    /// Whether clients may load and unload models, and which.
    pub model_management: Option<ModelManagement>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            max_requests: DEFAULT_MAX_REQUESTS,
            max_body_memory: DEFAULT_MAX_BODY_MEMORY,
            compute_threads: std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
            output_dir: None,
            min_free_disk_bytes: DEFAULT_MIN_FREE_BYTES,
            retention: Retention::default(),
            cors_origins: Vec::new(),
            allowed_hosts: Vec::new(),
            connections: ConnectionLimits::default(),
            model_management: None,
        }
    }
}

/// What all handlers share. Cheap to clone.
#[derive(Debug, Clone)]
pub struct AppState(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Set once the models are loaded.
    engine: OnceLock<Served>,
    jobs: Node,
    outputs: Arc<OutputDir>,
    admission: Admission,
    body_memory: BodyMemory,
    compute: Compute,
    cors_origins: Vec<Origin>,
    allowed_hosts: Vec<AllowedHost>,
    connections: ConnectionLimits,
    model_management: Option<ModelManagement>,
    draining: AtomicBool,
}

impl AppState {
    /// A server without an engine: it answers, and is not ready. Its jobs end with it.
    pub fn new(options: ServerOptions) -> io::Result<Self> {
        let node = NodeOptions {
            name: "this process".into(),
            store: Arc::new(MemoryStore::new(options.retention)),
            objects: Objects::in_memory(),
            is_durable: false,
            is_shared: false,
        };
        Self::with_jobs(options, node)
    }

    /// The same, whose jobs live where `node` says.
    pub fn with_jobs(options: ServerOptions, node: NodeOptions) -> io::Result<Self> {
        // Before the first request and the first step, so that none goes uncounted.
        telemetry::metrics_handle();
        let outputs = match &options.output_dir {
            Some(path) => OutputDir::at(path, options.min_free_disk_bytes),
            None => OutputDir::temporary(options.min_free_disk_bytes),
        };
        let outputs = Arc::new(outputs.map_err(io::Error::other)?);
        let compute = Compute::new(options.compute_threads, options.max_requests.saturating_add(MAX_WAITING_WORK))?;
        Ok(Self(Arc::new(Shared {
            engine: OnceLock::new(),
            jobs: Node::new(node, outputs.clone(), compute.clone()),
            outputs,
            admission: Admission::new(options.max_requests),
            body_memory: BodyMemory::new(options.max_body_memory),
            compute,
            cors_origins: options.cors_origins,
            allowed_hosts: options.allowed_hosts,
            connections: options.connections,
            model_management: options.model_management,
            draining: AtomicBool::new(false),
        })))
    }

    /// The models are loaded: work is taken from now on, and jobs are made on the runtime that this is called on. Only the first call counts.
    pub fn set_engine(&self, engine: Engine) {
        if self.0.engine.set(Served::new(engine.clone())).is_err() {
            return tracing::warn!("the engine was set already");
        }
        self.0.jobs.work(engine);
    }

    /// Removes the folder of finished clips if it is this process's alone; for an end that waits for nothing.
    pub fn remove_temporary_files(&self) {
        self.0.outputs.remove_temporary();
    }

    /// The engine, or why there is none for new work.
    fn engine(&self) -> Result<&Served, ApiError> {
        if self.0.draining.load(Relaxed) {
            return Err(ApiError::unready("shutting_down", "the server is shutting down"));
        }
        let engine = self.0.engine.get().ok_or_else(|| ApiError::unready("loading", "the models are being loaded"))?;
        if !engine.is_alive() {
            let problem = engine.problem().map_or_else(|| "no device is left".into(), |problem| problem.to_string());
            return Err(ApiError::unready("device_lost", &problem));
        }
        Ok(engine)
    }

    fn loaded_engine(&self) -> Option<&Served> {
        self.0.engine.get()
    }

    fn model_management(&self) -> Option<&ModelManagement> {
        self.0.model_management.as_ref()
    }

    fn jobs(&self) -> &Node {
        &self.0.jobs
    }

    fn outputs(&self) -> &Arc<OutputDir> {
        &self.0.outputs
    }

    fn admission(&self) -> &Admission {
        &self.0.admission
    }

    fn body_memory(&self) -> &BodyMemory {
        &self.0.body_memory
    }

    fn compute(&self) -> &Compute {
        &self.0.compute
    }

    async fn is_idle(&self) -> bool {
        self.0.admission.in_flight() == 0 && self.0.jobs.is_idle().await
    }
}

/// The threads that wait for sockets, one per core. They render short conversations themselves.
pub fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_stack_size(LITTLE_STACK_BYTES)
        .on_thread_start(render_little_on_this_thread)
        .build()
}

/// Every path, and what answers there.
fn routes() -> Vec<(&'static str, MethodRouter<AppState>)> {
    vec![
        ("/v1/chat/completions", post(text::chat)),
        ("/v1/completions", post(text::completion)),
        ("/v1/responses", post(text::responses::create)),
        ("/v1/responses/{id}", get(text::responses::retrieve).delete(text::responses::retrieve)),
        ("/v1/embeddings", post(text::tokens::embeddings)),
        ("/tokenize", post(text::tokens::tokenize)),
        ("/detokenize", post(text::tokens::detokenize)),
        ("/v1/images/generations", post(images::generate)),
        ("/v1/images/edits", post(images::edit)),
        ("/v1/videos", post(videos::create).get(videos::list)),
        ("/v1/videos/extensions", post(videos::extend)),
        ("/v1/videos/{id}/extend", post(videos::extend_of)),
        ("/v1/videos/{id}/remix", post(videos::remix)),
        ("/v1/videos/{id}", get(videos::retrieve).delete(videos::delete)),
        ("/v1/videos/{id}/content", get(videos::content)),
        ("/v1/jobs", get(jobs::list)),
        ("/v1/jobs/{id}", get(jobs::retrieve)),
        ("/v1/jobs/{id}/cancel", post(jobs::cancel)),
        ("/v1/jobs/{id}/retry", post(jobs::retry)),
        ("/v1/jobs/{id}/priority", post(jobs::prioritise)),
        ("/v1/jobs/{id}/events", get(jobs::events)),
        ("/v1/models", get(models::list)),
        ("/v1/models/{*id}", get(models::retrieve).post(models::manage)),
        ("/livez", get(health::live)),
        ("/readyz", get(health::ready)),
        ("/metrics", get(health::metrics)),
        ("/openapi.json", get(openapi::serve)),
    ]
}

/// The server.
pub fn router(state: AppState) -> Router {
    let paths = routes().into_iter();
    let routes = paths
        .fold(Router::new(), |router, (path, methods)| router.route(path, methods))
        .method_not_allowed_fallback(|| async { ApiError::no_method() })
        .fallback(|| async { ApiError::no_route() });
    let routes = match cors::layer(&state.0.cors_origins) {
        Some(cors) => routes.layer(cors),
        None => routes,
    };
    let routes = routes.layer(from_fn_with_state(state.clone(), browsers::check));
    routes.layer(from_fn_with_state(state.clone(), admission::measure)).with_state(state)
}

/// Serves until `shutdown` resolves, then refuses new work, gives what runs the time `drain` to finish, cancels the rest
/// and returns. Liveness, readiness and metrics are answered until the end.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    shutdown: impl Future<Output = ()> + Send,
    drain: Duration,
) -> io::Result<()> {
    let (stop, stopped) = watch::channel(false);
    let upkeep = tokio::spawn(async {
        loop {
            tokio::time::sleep(telemetry::UPKEEP_INTERVAL).await;
            telemetry::metrics_handle().run_upkeep();
        }
    });
    let disk_watch = tokio::spawn(watch_disk(state.outputs().clone()));
    let idle_watch = tokio::spawn(watch_idle_models(state.clone()));
    let limits = state.0.connections;
    let reserve = health::router(state.clone(), connections::crowded);
    let routes = Routes { all: router(state.clone()), reserve };
    let mut server = tokio::spawn(connections::serve(listener, routes, limits, stopped));
    tokio::select! {
        ended = &mut server => return ended.map_err(io::Error::other),
        () = shutdown => (),
    }
    drain_work(&state, drain).await;
    stop.send_replace(true);
    let closed = tokio::time::timeout(CLOSE_GRACE, &mut server).await;
    server.abort();
    upkeep.abort();
    disk_watch.abort();
    idle_watch.abort();
    match closed {
        Ok(ended) => ended.map_err(io::Error::other),
        Err(_) => {
            tracing::warn!("connections were still open at the end");
            Ok(())
        }
    }
}

/// Answers `/livez`, `/readyz` and `/metrics` on a listener of their own, for as long as it is polled: best on a runtime of
/// its own, so that nothing that the probes are about can hold them up.
pub async fn serve_health(listener: TcpListener, state: AppState) {
    let (_never, stop) = watch::channel(false);
    let router = || health::router(state.clone(), || async { ApiError::no_route() });
    let routes = Routes { all: router(), reserve: router() };
    connections::serve(listener, routes, HEALTH_CONNECTIONS, stop).await;
}

/// Looks again and again whether there are models that nobody has used for long.
async fn watch_idle_models(state: AppState) {
    loop {
        tokio::time::sleep(IDLE_INTERVAL).await;
        if let Some(engine) = state.loaded_engine() {
            engine.unload_idle();
        }
    }
}

/// Looks again and again whether clips can be written, for jobs that wait and for readiness.
async fn watch_disk(outputs: Arc<OutputDir>) {
    loop {
        tokio::time::sleep(DISK_INTERVAL).await;
        let outputs = outputs.clone();
        // What it finds is noted; a disk that does not answer holds one thread.
        if tokio::task::spawn_blocking(move || drop(outputs.check())).await.is_err() {
            tracing::error!("the check of the disk panicked");
        }
    }
}

/// Waits for what runs, up to `drain`, then stops the engine.
async fn drain_work(state: &AppState, drain: Duration) {
    state.0.draining.store(true, Relaxed);
    let deadline = tokio::time::Instant::now() + drain;
    let jobs = state.jobs().num_active().await;
    tracing::info!(in_flight = state.admission().in_flight(), jobs, "draining");
    if state.jobs().is_durable() {
        state.jobs().hand_over().await;
    }
    while !state.is_idle().await && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(DRAIN_POLL).await;
    }
    let Some(engine) = state.loaded_engine().cloned() else { return };
    // Waits for the step that runs, at most; the sessions that are left end without an end.
    if tokio::task::spawn_blocking(move || engine.shutdown(Duration::ZERO)).await.is_err() {
        tracing::error!("the engine's shutdown panicked");
    }
}

/// Seconds since 1970.
fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A seed for a request that named none: below 2^53, so that every JSON reader keeps it exactly.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0) >> 11
}

/// 400 for a model of another kind, naming where it is served.
fn wrong_endpoint(card: &DiffusionCard) -> ApiError {
    let endpoint = match card.medium() {
        Medium::Image => "makes pictures; use /v1/images/generations",
        Medium::Video => "makes clips; use /v1/videos",
    };
    ApiError::field("model", endpoint)
}
