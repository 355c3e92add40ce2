//! A server on a free port over scripted models, and a client that shows everything.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::HeaderMap;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tale::engine::{Engine, EngineOptions, ModelStatus};
use tale::http::{AppState, ConnectionLimits, DEFAULT_MAX_BODY_MEMORY, ServerOptions, serve};
use tale_models::diffusion::keyframes::KeyframeSupport;
use tale_models::testing::{Script, clip_model, clip_model_from_pictures, picture_model, text_model};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// A text that must come back in no error.
pub const SECRET: &str = "s3cret-prompt";

/// A running server with the models `words`, `pictures`, `clips`, and of clips from pictures `shots` and `between`.
pub struct Server {
    pub address: SocketAddr,
    pub engine: Engine,
    /// Bytes that the models themselves hold.
    pub fixed_bytes: usize,
    pub stop: Option<oneshot::Sender<()>>,
    pub served: JoinHandle<std::io::Result<()>>,
    /// While set, every step waits.
    pub hold: Arc<AtomicBool>,
    /// While set, every step fails.
    pub fail: Arc<AtomicBool>,
}

/// How a test wants its server.
#[derive(Clone)]
pub struct Setup {
    pub max_queued_sessions: usize,
    pub max_requests: usize,
    pub drain: Duration,
    /// Sessions of one step.
    pub max_batch: usize,
    pub clip_bytes: usize,
    pub cors_origins: Vec<&'static str>,
    pub allowed_hosts: Vec<&'static str>,
    pub connections: ConnectionLimits,
    pub max_body_memory: usize,
    pub output_dir: Option<PathBuf>,
    pub min_free_disk_bytes: u64,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            max_queued_sessions: 64,
            max_requests: 64,
            drain: Duration::from_secs(10),
            max_batch: 16,
            clip_bytes: 0,
            cors_origins: Vec::new(),
            allowed_hosts: Vec::new(),
            connections: ConnectionLimits::default(),
            max_body_memory: DEFAULT_MAX_BODY_MEMORY,
            output_dir: None,
            min_free_disk_bytes: 0,
        }
    }
}

pub async fn server() -> Server {
    start(Setup::default()).await
}

pub async fn start(setup: Setup) -> Server {
    let (hold, fail) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let script = |footprint_bytes| {
        let (hold, fail) = (hold.clone(), fail.clone());
        let on_step = move |_, _: &[_]| {
            // In short steps, so that a held server still hears of cancellations between two of them.
            let step_ends = Instant::now() + Duration::from_millis(20);
            while hold.load(Relaxed) && Instant::now() < step_ends {
                std::thread::sleep(Duration::from_millis(1));
            }
            if fail.load(Relaxed) { Err(tale_models::Error::NotFinite { phase: "script" }) } else { Ok(()) }
        };
        Script { max_batch: setup.max_batch, footprint_bytes, on_step: Box::new(on_step), ..Script::default() }
    };
    let models = vec![
        ("words".to_owned(), text_model(script(0)).expect("the tokenizer is sound")),
        ("pictures".to_owned(), picture_model(script(0))),
        ("clips".to_owned(), clip_model(script(setup.clip_bytes))),
        ("shots".to_owned(), clip_model_from_pictures(script(setup.clip_bytes), KeyframeSupport::First)),
        ("between".to_owned(), clip_model_from_pictures(script(setup.clip_bytes), KeyframeSupport::FirstAndLast)),
    ];
    let options = EngineOptions {
        max_queued_sessions: setup.max_queued_sessions,
        memory_bytes: Some(1 << 20),
        ..EngineOptions::default()
    };
    let engine = Engine::start(models, options).expect("starts");
    let cors_origins = setup.cors_origins.iter().map(|origin| origin.parse().expect("an origin")).collect();
    let allowed_hosts = setup.allowed_hosts.iter().map(|name| name.parse().expect("a name")).collect();
    let options = ServerOptions {
        max_requests: setup.max_requests,
        cors_origins,
        allowed_hosts,
        connections: setup.connections,
        max_body_memory: setup.max_body_memory,
        output_dir: setup.output_dir,
        min_free_disk_bytes: setup.min_free_disk_bytes,
        ..ServerOptions::default()
    };
    let state = AppState::new(options);
    let state = state.expect("a temporary folder can be made");
    state.set_engine(engine.clone());
    let (address, stop, served) = listen(state, setup.drain).await;
    Server { address, engine, fixed_bytes: 0, stop: Some(stop), served, hold, fail }
}

pub async fn listen(
    state: AppState,
    drain: Duration,
) -> (SocketAddr, oneshot::Sender<()>, JoinHandle<std::io::Result<()>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let (stop, stopped) = oneshot::channel();
    let shutdown = async {
        let _ = stopped.await;
    };
    (address, stop, tokio::spawn(serve(listener, state, shutdown, drain)))
}

/// An answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("text")
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("ASCII"))
    }

    /// The JSON of each `data:` line, `[DONE]` as a string.
    pub fn events(&self) -> Vec<Value> {
        let data = self.text().lines().filter_map(|line| line.strip_prefix("data: "));
        data.map(|data| serde_json::from_str(data).unwrap_or_else(|_| Value::from(data))).collect()
    }

    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{self:?}");
        self
    }
}

impl Server {
    /// Sends a request on a connection of its own; the connection closes when the response is dropped.
    pub async fn send(&self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        send(self.address, request).await
    }

    pub async fn call(&self, method: &str, path: &str, content_type: &str, body: impl Into<Bytes>) -> Answer {
        read(self.send(request(method, path, content_type, body)).await).await
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.call("GET", path, "", "").await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.call("DELETE", path, "", "").await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.call("POST", path, "application/json", body.to_string()).await
    }

    pub fn live_sessions(&self) -> usize {
        self.engine.status().models.iter().map(|model| model.live).sum()
    }

    /// Waits until the engine holds nothing but its models: no session, no block, no byte.
    pub async fn wait_until_empty(&self) {
        let begun = Instant::now();
        loop {
            let status = self.engine.status();
            let held =
                |m: &ModelStatus| m.live + m.queued + m.runner.running + m.runner.waiting + m.runner.kv_blocks_used;
            if status.models.iter().all(|model| held(model) == 0) && status.ledger_used_bytes() == self.fixed_bytes {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(5), "{status:?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub async fn wait_for_live(&self, sessions: usize) {
        let begun = Instant::now();
        while self.live_sessions() != sessions {
            assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", self.engine.status());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

pub fn request(method: &str, path: &str, content_type: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    let mut builder = Request::builder().method(method).uri(path).header("host", "localhost");
    if !content_type.is_empty() {
        builder = builder.header("content-type", content_type);
    }
    builder.body(Full::new(body.into())).expect("a sound request")
}

pub async fn send(address: SocketAddr, request: Request<Full<Bytes>>) -> Response<Incoming> {
    let stream = TcpStream::connect(address).await.expect("the server listens");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP/1");
    tokio::spawn(connection);
    sender.send_request(request).await.expect("an answer")
}

pub async fn read(response: Response<Incoming>) -> Answer {
    let (parts, body) = response.into_parts();
    let body = body.collect().await.expect("a whole body").to_bytes();
    Answer { status: parts.status, headers: parts.headers, body }
}
