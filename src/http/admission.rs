//! What every request goes through: a bound on how many are in flight, and their measurement.
//!
//! The pass that a request gets travels with its response body and is given back when that is sent or dropped, so that
//! a stream counts for as long as it lasts. Clients share the passes: one alone cannot take all. Identity, once there is
//! one, is checked here first and makes the clients.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body::{Frame, SizeHint};
use tale_models::ClientId;

use super::AppState;
use super::client;
use super::error::ApiError;
use crate::places::{Place, Places};
use crate::telemetry;

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

    fn place(&self, client: ClientId) -> Result<Place, ApiError> {
        self.places.take(client).map_err(|reason| ApiError::busy(format!("requests are in flight: {reason}")))
    }
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

/// Refuses work that the server is not ready for, or has no place for.
pub(super) async fn admit(State(state): State<AppState>, request: Request, next: Next) -> Response {
    match state.engine().and_then(|_| state.admission().place(client::of(&request))) {
        Ok(place) => next.run(request).await.map(|body| carry(body, place)),
        Err(error) => error.into_response(),
    }
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
