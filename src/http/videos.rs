//! `/v1/videos`: clips are ordered, looked at, fetched and deleted.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::response::Response;
use serde::Serialize;
use tale_models::diffusion::parameters::{INPUT_REFERENCE, NUM_FRAMES, PARAMETERS};
use tale_models::diffusion::{DiffusionRequest, Medium};
use tale_models::parameter::{Options, Task};
use tale_models::{ClientId, ModelCard};

use self::fields::{FileFields, SECONDS};
use self::wire::answer;
use super::AppState;
use super::admission::with_place;
use super::body::memory::Held;
use super::body::value::Value;
use super::body::{self, Format};
use super::diffusion::{self, MODEL, SizeField};
use super::error::ApiError;
use super::files::FileWork;
use super::parameters::{Given, room_in};
use super::path::Id;
use crate::compute::Compute;
use crate::job::node::{Order, Terms};
use crate::job::output::OutputDir;
use crate::job::spec::{ClipSpec, Origin};
use crate::job::{Job, JobId, JobKind, JobState, UnknownJob};

mod again;
mod content;
mod fields;
mod list;
mod terms;
mod wire;

pub(super) use again::{Again, extend, extend_of, remix};
pub(super) use content::{CONTENT_QUERY, content};
pub(super) use fields::OWN;
pub(super) use list::{LIST_QUERY, list};
pub(super) use wire::{POLL_HEADER, WireFailure};

/// Another name of `input_reference`.
const IMAGE_ALIAS: &str = "image";
/// Says that an answer is that of an earlier request with the same `Idempotency-Key`.
const REPLAYED_HEADER: &str = "idempotency-replayed";
/// What a device is taken to do while nothing is known of it, in pixels of all frames, branches and steps: only the turns of clients are made
/// by it.
const NOMINAL_AMOUNT_PER_SECOND: f64 = 1e7;
/// Most orders for which the disk is looked at at a time.
const MAX_DISK_CHECKS: usize = 8;
static DISK_CHECKS: FileWork = FileWork::new(MAX_DISK_CHECKS);

async fn resolve(compute: &Compute, options: Options, card: Arc<ModelCard>) -> Result<DiffusionRequest, ApiError> {
    let has_seconds = options.has(&SECONDS);
    let of_card = card.clone();
    let resolved = diffusion::resolve(compute, options, card, |options| {
        let size = SizeField::take(options)?;
        let num_frames = fields::frames(options, &of_card)?;
        options.set(&NUM_FRAMES, num_frames);
        Ok(size)
    });
    resolved.await.map_err(|error| if has_seconds { error.within("num_frames", "seconds") } else { error })
}

/// `POST /v1/videos`.
pub(super) async fn create(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let headers = request.headers().clone();
    let received = body::receive(&state, request, Format::JsonOrForm, body::MAX_PICTURE_BODY_BYTES).await?;
    let room_of = |name: &str| room_in(&PARAMETERS, name);
    let read = |body: Value| {
        let hash = body.hash();
        let (body, spelling) = Spelling::of(body)?;
        let given = super::parameters::read(body, OWN, Task::Video).map_err(|error| spelling.restored(error))?;
        Ok((given, spelling, hash))
    };
    with_place(&state, received.client, async |admitted| {
        let ((given, spelling, hash), held) = received.read(state.compute(), room_of, read).await?;
        let ordered = async {
            let (options, _held, inputs) = decoded(&state, given, held).await?;
            let terms = terms::terms(&options, &headers, hash)?;
            order(&state, admitted.client(), Ordered { options, inputs, origin: None, terms }).await
        };
        ordered.await.map_err(|error| spelling.restored(error))
    })
    .await
}

/// The options of a body with its pictures decoded, which shows that they can be; their files, which are kept for the job; and the memory of
/// both.
async fn decoded(
    state: &AppState,
    mut given: Given,
    mut held: Held,
) -> Result<(Options, Held, Vec<(String, Bytes)>), ApiError> {
    diffusion::fetch_frames(state, &mut given, &mut held).await?;
    let files = given.files();
    let num_bytes: usize = files.iter().map(|(_, file)| file.len()).sum();
    let (options, mut held) = diffusion::decoded(state, given, held).await?;
    held.add(num_bytes)?;
    Ok((options, held, files))
}

/// What the client calls the picture that a video begins with, so that errors call it the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    InputReference,
    Image,
}

impl Spelling {
    /// The body under the one name, and the name that it had.
    fn of(body: Value) -> Result<(Value, Self), ApiError> {
        let name = INPUT_REFERENCE.declaration.name;
        let mut fields = body.into_object()?;
        // A null is as good as absent.
        let image = fields.shift_remove(IMAGE_ALIAS).filter(|image| !matches!(image, Value::Null));
        let Some(image) = image else { return Ok((Value::Object(fields), Self::InputReference)) };
        if fields.insert(name.to_owned(), image).is_some() {
            return Err(ApiError::field(IMAGE_ALIAS, format!("is another name of {name}; give one of them")));
        }
        Ok((Value::Object(fields), Self::Image))
    }

    fn restored(self, error: ApiError) -> ApiError {
        match self {
            Self::InputReference => error,
            Self::Image => error.renamed(INPUT_REFERENCE.declaration.name, IMAGE_ALIAS),
        }
    }
}

/// A video that is asked for.
struct Ordered {
    options: Options,
    /// The pictures of the options, as they came.
    inputs: Vec<(String, Bytes)>,
    /// The video that it is made from.
    origin: Option<Origin>,
    terms: Terms,
}

/// Keeps an order for a device that has time. The job goes on when the client does not.
async fn order(state: &AppState, client: ClientId, ordered: Ordered) -> Result<Response, ApiError> {
    let Ordered { options, inputs, origin, terms } = ordered;
    let model = options.get(&MODEL).unwrap_or_default();
    let card = diffusion::card(state, &model, Medium::Video)?;
    let file = FileFields::new(&options)?;
    let request = resolve(state.compute(), options, card).await?;
    let has_comment = file.has_comment;
    let frames_before = match origin {
        Some(Origin::Extension { num_frames, .. }) => Some(num_frames),
        Some(Origin::Remix(_)) | None => None,
    };
    let file = file.settings(&request.canvas, frames_before)?;
    check_disk(state.outputs().clone()).await?;
    let predicted_seconds = state.engine()?.predicted_seconds(&model, &request);
    let cost_seconds = predicted_seconds.unwrap_or(request.denoising_amount() / NOMINAL_AMOUNT_PER_SECOND);
    let spec = ClipSpec { origin, predicted_seconds, ..ClipSpec::new(&model, &request, file, has_comment) };
    let (job, is_new) = state.jobs().submit(Order { client, model, spec, inputs, terms, cost_seconds }).await?;
    let mut response = answer(&job, None);
    if !is_new {
        response.headers_mut().insert(REPLAYED_HEADER, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// Refuses a clip that could not be written.
async fn check_disk(outputs: Arc<OutputDir>) -> Result<(), ApiError> {
    Ok(DISK_CHECKS.run(move || outputs.probe()).await??)
}

/// `GET /v1/videos/{id}`.
pub(super) async fn retrieve(State(state): State<AppState>, Id(id): Id) -> Result<Response, ApiError> {
    let job = job(&state, &id).await?;
    let place = if job.state == JobState::Queued { state.jobs().place(&job).await? } else { None };
    Ok(answer(&job, place))
}

/// The video with this name.
pub(super) async fn job(state: &AppState, id: &str) -> Result<Job, ApiError> {
    let id: JobId = id.parse()?;
    if id.kind() != JobKind::Video {
        return Err(UnknownJob.into());
    }
    Ok(state.jobs().get(id).await?)
}

/// The answer to a deletion.
#[derive(Debug, Serialize)]
pub(super) struct Deleted {
    id: String,
    object: &'static str,
    deleted: bool,
}

/// `DELETE /v1/videos/{id}`: stops a job that runs, removes the file of one that is done.
pub(super) async fn delete(State(state): State<AppState>, Id(id): Id) -> Result<Json<Deleted>, ApiError> {
    let id: JobId = id.parse()?;
    state.jobs().remove(id).await?;
    Ok(Json(Deleted { id: id.to_string(), object: "video.deleted", deleted: true }))
}
