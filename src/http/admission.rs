//! What every request goes through: its measurement, and a bound on how many generate.
//!
//! A handler that generates is admitted once the body of its request is there, and works within that: only an [`Admitted`]
//! request can submit work to the engine. Its place travels with the response body and is given back when that is sent or
//! dropped, so that a stream counts for as long as it lasts. Clients share the places: one alone cannot take all. Identity,
//! once there is one, is checked here first and makes the clients.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use http_body::{Frame, SizeHint};
use tale_models::diffusion::DiffusionRequest;
use tale_models::parameter::Options;
use tale_models::{ClientId, ModelCard};

use super::AppState;
use super::cold_start::ALLOW_COLD_START;
use super::error::ApiError;
use crate::engine::{Begun, Engine, EngineError, EngineStatus, ModelReport, ServedModel, Session, Wish};
use crate::places::{Place, Places};
use crate::telemetry;

/// The engine, for everything but work: that takes a request that is [`Admitted`].
#[derive(Debug, Clone)]
pub(super) struct Served(Engine);

impl Served {
    pub(super) fn new(engine: Engine) -> Self {
        Self(engine)
    }

    pub(super) fn models(&self) -> Vec<ModelReport> {
        self.0.models()
    }

    /// What is known of the model with this name.
    pub(super) fn report(&self, name: &str) -> Result<ModelReport, ApiError> {
        Ok(self.0.report(name)?)
    }

    /// The cards of the models that are there.
    pub(super) fn cards(&self) -> Vec<Arc<ModelCard>> {
        self.0.cards()
    }

    /// The model with this name, if it is there, or the error that names those there are; one that comes on demand begins to come.
    pub(super) fn model(&self, name: &str) -> Result<Arc<ServedModel>, ApiError> {
        Ok(self.0.ask(name)?)
    }

    /// Device time that a request is expected to take in seconds, where that is known.
    pub(super) fn predicted_seconds(&self, model: &str, request: &DiffusionRequest) -> Option<f64> {
        self.0.predicted_seconds(model, request)
    }

    /// Whether a device lives.
    pub(super) fn is_alive(&self) -> bool {
        self.0.is_alive()
    }

    /// What is wrong, if no device is left for some model.
    pub(super) fn problem(&self) -> Option<EngineError> {
        self.0.problem()
    }

    /// Begins to load a model; what is returned tells whether it has begun.
    pub(super) fn load_model(&self, name: &str, wish: Wish) -> Result<Begun, ApiError> {
        Ok(self.0.load_model(name, wish)?)
    }

    /// Begins to unload a model.
    pub(super) fn unload_model(&self, name: &str, drain: Option<Duration>) -> Result<(), ApiError> {
        Ok(self.0.unload_model(name, drain)?)
    }

    /// Waits until a model is there that comes on demand.
    pub(super) async fn wait_for_model(&self, name: &str, client: ClientId) -> Result<Arc<ServedModel>, ApiError> {
        Ok(self.0.ask_and_wait(name, client).await?)
    }

    /// Begins to unload what nobody has used for long.
    pub(super) fn unload_idle(&self) {
        self.0.unload_idle();
    }

    pub(super) fn status(&self) -> EngineStatus {
        self.0.status()
    }

    /// Stops the device thread, after at most `drain`. Waits for the step that runs.
    pub(super) fn shutdown(&self, drain: Duration) {
        self.0.shutdown(drain);
    }
}

/// Counts requests in flight and bounds those that generate.
#[derive(Debug)]
pub(super) struct Admission {
    places: Arc<Places>,
    in_flight: Arc<AtomicUsize>,
}

impl Admission {
    pub(super) fn new(max_requests: usize) -> Self {
        Self { places: Places::new(max_requests), in_flight: Arc::default() }
    }

    /// Requests whose answer is not sent yet.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Relaxed)
    }

    /// Refuses a client for whom there is no place, without taking one.
    pub(super) fn check(&self, client: ClientId) -> Result<(), ApiError> {
        self.place(client).map(drop)
    }

    fn place(&self, client: ClientId) -> Result<Place, ApiError> {
        self.places.take(client).map_err(|reason| ApiError::busy(format!("requests are in flight: {reason}")))
    }
}

/// A request that has a place, and the only way to the engine's work. There is one only within [`with_place`], and clones of it
/// share its place, which is given back with the last.
#[derive(Debug, Clone)]
pub(super) struct Admitted {
    engine: Served,
    client: ClientId,
    /// The weights that it works with, from when it has asked for them: those that take their place are for requests after it.
    model: Arc<OnceLock<Arc<ServedModel>>>,
    _place: Arc<Place>,
}

impl Admitted {
    /// Whose request it is.
    pub(super) fn client(&self) -> ClientId {
        self.client
    }

    /// The card of the model that it works with from now on; one that is not there is waited for where `options` allow it.
    pub(super) async fn card(&self, model: &str, options: &Options) -> Result<Arc<ModelCard>, ApiError> {
        if let Some(served) = self.model.get().filter(|served| served.name == model) {
            return Ok(served.card());
        }
        let served = match options.get(&ALLOW_COLD_START) {
            Some(true) => self.engine.wait_for_model(model, self.client).await?,
            _ => self.engine.model(model)?,
        };
        let card = served.card();
        // A request has one model; another one is had by its name.
        let _ = self.model.set(served);
        Ok(card)
    }

    /// Gives work to the engine.
    pub(super) fn submit(&self, model: &str, request: tale_models::Request) -> Result<Session, ApiError> {
        match self.model.get().filter(|served| served.name == model) {
            Some(served) => Ok(self.engine.0.submit_to(served, self.client, request, None)?),
            None => Ok(self.engine.0.submit(model, self.client, request)?),
        }
    }
}

/// What `work` answers to a request of `client`, in a place that is taken now and kept until the answer is sent. Refused
/// while the server is not ready for work, or has no place.
pub(super) async fn with_place(
    state: &AppState,
    client: ClientId,
    work: impl AsyncFnOnce(&Admitted) -> Result<Response, ApiError>,
) -> Result<Response, ApiError> {
    let place = Arc::new(state.admission().place(client)?);
    let admitted = Admitted { engine: state.engine()?.clone(), client, model: Arc::default(), _place: place };
    let response = work(&admitted).await?;
    Ok(response.map(|body| carry(body, admitted)))
}

/// Measures every request.
pub(super) async fn measure(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let admission = state.admission();
    admission.in_flight.fetch_add(1, Relaxed);
    let route = request.extensions().get::<MatchedPath>().cloned();
    let mut pass = Measurement {
        in_flight: admission.in_flight.clone(),
        route,
        method: known_method(request.method()),
        status: None,
        begun: Instant::now(),
    };
    let response = next.run(request).await;
    pass.status = Some(response.status().as_u16());
    response.map(|body| carry(body, pass))
}

/// Books a request when dropped.
struct Measurement {
    in_flight: Arc<AtomicUsize>,
    route: Option<MatchedPath>,
    method: &'static str,
    /// `None` when the client went away before there was one.
    status: Option<u16>,
    begun: Instant,
}

impl Drop for Measurement {
    fn drop(&mut self) {
        self.in_flight.fetch_sub(1, Relaxed);
        // 499 as nginx has it: the client closed the request.
        let (status, seconds) = (self.status.unwrap_or(499), self.begun.elapsed());
        let route = self.route.as_ref().map_or("(none)", MatchedPath::as_str);
        telemetry::record_request(route, self.method, status, seconds);
        tracing::debug!(method = self.method, route, status, ms = seconds.as_secs_f64() * 1e3, "answered");
    }
}

/// Clients may invent methods; a label may not have their number of values.
fn known_method(method: &Method) -> &'static str {
    let known = ["GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"];
    known.into_iter().find(|known| method == known).unwrap_or("OTHER")
}

fn carry<T: Send + Unpin + 'static>(body: Body, pass: T) -> Body {
    Body::new(Carrying { body, _pass: pass })
}

/// A body that holds something until it is sent or dropped.
struct Carrying<T> {
    body: Body,
    _pass: T,
}

impl<T: Unpin> HttpBody for Carrying<T> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
