//! `/v1/videos`: clips are ordered, looked at, fetched and deleted.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::Response;
use serde::Serialize;
use tale_models::ModelCard;
use tale_models::diffusion::parameters::{INPUT_REFERENCE, NUM_FRAMES, PARAMETERS};
use tale_models::diffusion::shots::assembly::Assembly;
use tale_models::diffusion::{DiffusionRequest, Medium};
use tale_models::parameter::{Options, Task};

use self::fields::{FileFields, SECONDS};
use self::wire::answer;
use super::AppState;
use super::admission::{Admitted, Further, with_place};
use super::body::memory::Held;
use super::body::value::Value;
use super::body::{self, Format};
use super::diffusion::{self, MODEL, SizeField};
use super::error::ApiError;
use super::files::FileWork;
use super::parameters::room_in;
use super::path::Id;
use crate::compute::Compute;
use crate::engine::MayBegin;
use crate::job::drive::{BeginPart, Means, Order, drive};
use crate::job::encoder::Before;
use crate::job::failure::Failure;
use crate::job::output::OutputDir;
use crate::job::{Change, Job, JobId, Origin, UnknownJob};

mod again;
mod content;
mod fields;
mod list;
mod wire;

pub(super) use again::{Again, extend, extend_of, remix};
pub(super) use content::{CONTENT_QUERY, content};
pub(super) use fields::OWN;
pub(super) use list::{LIST_QUERY, list};
pub(super) use wire::{POLL_HEADER, WireFailure};

/// Another name of `input_reference`.
const IMAGE_ALIAS: &str = "image";
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
    let received = body::receive(&state, request, Format::JsonOrForm, body::MAX_PICTURE_BODY_BYTES).await?;
    let room_of = |name: &str| room_in(&PARAMETERS, name);
    let read = |body| {
        let (body, spelling) = Spelling::of(body)?;
        let given = super::parameters::read(body, OWN, Task::Video).map_err(|error| spelling.restored(error))?;
        Ok((given, spelling))
    };
    with_place(&state, received.client, async |admitted| {
        let ((given, spelling), held) = received.read(state.compute(), room_of, read).await?;
        let ordered = async {
            let (options, held) = diffusion::decoded(&state, given, held).await?;
            order(&state, admitted, Ordered { options, held, origin: None, before: None }).await
        };
        ordered.await.map_err(|error| spelling.restored(error))
    })
    .await
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
    /// The memory of the pictures, for as long as the video is made.
    held: Held,
    /// The video that it is made from.
    origin: Option<Origin>,
    /// The clip that its file begins with.
    before: Option<Before>,
}

async fn order(state: &AppState, admitted: &Admitted, ordered: Ordered) -> Result<Response, ApiError> {
    let Ordered { options, held, origin, before } = ordered;
    let model = options.get(&MODEL).unwrap_or_default();
    let card = diffusion::card(state, &model, Medium::Video)?;
    let file = FileFields::new(&options)?;
    let request = resolve(state.compute(), options, card).await?;
    let has_comment = file.has_comment;
    let frames_before = before.as_ref().map(|before| before.num_frames);
    let file = file.settings(&request.canvas, frames_before)?;
    let outputs = state.outputs();
    check_disk(outputs.clone()).await?;
    let assembly = match before {
        Some(_) => Assembly::going_on(request.clone()),
        None => Assembly::new(request.clone()),
    };
    let first = tale_models::Request::Diffusion(assembly.part_request());
    let session = admitted.submit_if(&model, first, while_disk(outputs))?;
    let begin = begin_parts(admitted.further(), model.clone(), outputs.clone());
    let job = Job { origin, ..Job::new(admitted.client(), model, request, file, has_comment) };
    state.jobs().insert(job.clone())?;
    let response = answer(&job);
    // The job goes on when the client does not: only DELETE ends it.
    let means = Means { outputs: outputs.clone(), store: state.jobs().clone(), compute: state.compute().clone() };
    let driven = drive(Order { job, before, assembly, begin }, session, means);
    tokio::spawn(async move {
        driven.await;
        drop(held);
    });
    Ok(response)
}

/// Begins the parts of a video after its first.
fn begin_parts(further: Further, model: String, outputs: Arc<OutputDir>) -> Box<BeginPart> {
    Box::new(move |request| {
        let part = tale_models::Request::Diffusion(request);
        further.submit_if(&model, part, while_disk(&outputs)).map_err(|error| Failure::of_engine(&error))
    })
}

/// Refuses a clip that could not be written.
async fn check_disk(outputs: Arc<OutputDir>) -> Result<(), ApiError> {
    Ok(DISK_CHECKS.run(move || outputs.probe()).await??)
}

/// A job that has waited begins only if its clip can still be written.
fn while_disk(outputs: &Arc<OutputDir>) -> MayBegin {
    let outputs = outputs.clone();
    MayBegin::when(move || outputs.problem().is_none())
}

/// `GET /v1/videos/{id}`.
pub(super) async fn retrieve(State(state): State<AppState>, Id(id): Id) -> Result<Response, ApiError> {
    Ok(answer(&job(&state, &id)?))
}

/// The job with this name.
pub(super) fn job(state: &AppState, id: &str) -> Result<Job, ApiError> {
    Ok(state.jobs().get(id.parse()?).ok_or(UnknownJob)?)
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
    // Refused for a job that has ended, which is then only removed. Followers and the driver hear of it by the feed.
    let _ = state.jobs().apply(id, Change::Cancelled);
    state.jobs().remove(id).ok_or(UnknownJob)?;
    Ok(Json(Deleted { id: id.to_string(), object: "video.deleted", deleted: true }))
}
