//! `/v1/videos`: clips are ordered, looked at, fetched and deleted.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Uri};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tale_models::diffusion::canvas::{CanvasSupport, FrameSupport};
use tale_models::diffusion::parameters::{FPS, INPUT_REFERENCE, NUM_FRAMES, PARAMETERS};
use tale_models::diffusion::{Canvas, DiffusionRequest, Medium};
use tale_models::parameter::{Declaration, Options, Parameter, Task};
use tale_models::{DiffusionCard, ModelCard};

use super::admission::{Admitted, with_place};
use super::body::memory::Held;
use super::body::value::Value;
use super::body::{self, Format};
use super::diffusion::{self, MODEL, SIZE, SizeField};
use super::error::ApiError;
use super::files::FileWork;
use super::parameters::room_in;
use super::path::Id;
use super::{AppState, unix_seconds};
use crate::compute::Compute;
use crate::engine::MayBegin;
use crate::job::drive::drive;
use crate::job::output::OutputDir;
use crate::job::store::{Listing, Order, Page};
use crate::job::{Change, Failure, Job, JobId, JobState, UnknownJob};
use crate::media::{ClipFormat, MAX_GIF_FPS};
use crate::parameters::EffectiveParameters;

mod content;

pub(super) use content::{CONTENT_QUERY, content};

/// Another name of `input_reference`.
const IMAGE_ALIAS: &str = "image";
/// Jobs of a page when the client does not say.
const DEFAULT_PAGE: usize = 20;
/// Most jobs of a page.
const MAX_PAGE: usize = 100;
/// Longest name of a video.
const MAX_ID_BYTES: usize = 64;
/// What a video counts for when a page of them is written.
const LISTED_BYTES: usize = 4 << 10;
/// Most orders for which the disk is looked at at a time.
const MAX_DISK_CHECKS: usize = 8;
static DISK_CHECKS: FileWork = FileWork::new(MAX_DISK_CHECKS);
/// Longest query of a request.
const MAX_QUERY_BYTES: usize = 1024;
/// Bounds of the time after which a client is told to look again.
const POLL_MS: std::ops::RangeInclusive<u128> = 200..=5000;
/// When nothing is known about the pace.
const DEFAULT_POLL_MS: u128 = 1000;
/// Tells the client of OpenAI when to look again.
pub(super) const POLL_HEADER: &str = "openai-poll-after-ms";

static SECONDS: Parameter<f64> = Parameter::seconds(
    "seconds",
    "Length instead of `num_frames`: the first frame and as many groups of frames as fit in the time.",
);

static OUTPUT_FORMAT: Parameter<String> =
    Parameter::choice("output_format", &["mp4", "webm", "gif"], "Format of the file; mp4 when absent.");

static AFTER: Parameter<String> =
    Parameter::text("after", MAX_ID_BYTES, "The video behind which the page begins; the first page when absent.");

static LIMIT: Parameter<usize> = Parameter::integer("limit", 1, MAX_PAGE, "Most videos of the page; 20 when absent.");

static ORDER: Parameter<String> =
    Parameter::choice("order", &["asc", "desc"], "By the time when they were ordered; desc when absent.");

/// The query of the list.
pub(super) static LIST_QUERY: &[&Declaration] = &[&AFTER.declaration, &LIMIT.declaration, &ORDER.declaration];

/// The fields that are no parameters of the model.
pub(super) static OWN: &[&Declaration] =
    &[&MODEL.declaration, &SIZE.declaration, &SECONDS.declaration, &OUTPUT_FORMAT.declaration];

async fn resolve(compute: &Compute, options: Options, card: Arc<ModelCard>) -> Result<DiffusionRequest, ApiError> {
    let has_seconds = options.has(&SECONDS);
    let of_card = card.clone();
    let resolved = diffusion::resolve(compute, options, card, |options| {
        let size = SizeField::take(options)?;
        let num_frames = frames(options, &of_card)?;
        options.set(&NUM_FRAMES, num_frames);
        Ok(size)
    });
    resolved.await.map_err(|error| if has_seconds { error.within("num_frames", "seconds") } else { error })
}

/// `num_frames`, or the frames of `seconds`.
fn frames(options: &Options, card: &ModelCard) -> Result<Option<usize>, ApiError> {
    let num_frames = options.get(&NUM_FRAMES);
    let ModelCard::Diffusion(DiffusionCard { canvas: CanvasSupport { frames: Some(frames), .. }, .. }) = card else {
        return Ok(num_frames);
    };
    let Some(seconds) = options.get(&SECONDS) else { return Ok(num_frames) };
    let of_seconds = frames_of(seconds, options.get(&FPS).unwrap_or(frames.default_fps), frames);
    match num_frames {
        Some(num_frames) if num_frames != of_seconds => {
            let problem = format!("is {of_seconds} frames, which contradicts num_frames; give one of them");
            Err(ApiError::field("seconds", problem))
        }
        _ => Ok(Some(of_seconds)),
    }
}

/// Frames of a clip of `seconds`: the first frame, and as many groups of `frames.multiple` frames as fit in the time. 5
/// seconds at 16 frames per second are 81 frames for a model that makes 4k+1. Of a model that makes any number of frames
/// they are those that fit in the time, at least one. The [`duration`] of a clip always gives its own frames.
fn frames_of(seconds: f64, fps: usize, frames: &FrameSupport) -> usize {
    let multiple = frames.multiple;
    // A billionth of a frame more, so that 0.3 * 10 is 3.
    let groups = (seconds * fps as f64 / multiple as f64 + 1e-9).floor() as usize;
    match multiple {
        1 => groups.max(1),
        _ => groups.saturating_mul(multiple).saturating_add(1),
    }
}

/// Seconds that a file of these frames plays.
fn duration(num_frames: usize, fps: usize) -> f64 {
    num_frames as f64 / fps.max(1) as f64
}

/// A clip as the API shows it: OpenAI's fields, and the effective parameters beside them.
#[derive(Debug, Serialize)]
pub(super) struct WireVideo {
    id: String,
    object: &'static str,
    status: &'static str,
    progress: u8,
    created_at: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    completed_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<WireFailure>,
    size: String,
    seconds: String,
    #[serde(flatten)]
    parameters: EffectiveParameters,
    output_format: &'static str,
}

/// Why a job failed.
#[derive(Debug, Serialize)]
pub(super) struct WireFailure {
    code: &'static str,
    message: String,
}

impl From<&Failure> for WireFailure {
    fn from(failure: &Failure) -> Self {
        Self { code: failure.code, message: failure.message.clone() }
    }
}

/// The state's name in the API.
pub(super) fn status(state: &JobState) -> &'static str {
    match state {
        JobState::Queued => "queued",
        JobState::InProgress => "in_progress",
        JobState::Completed(_) => "completed",
        JobState::Failed(_) => "failed",
        JobState::Cancelled => "cancelled",
    }
}

impl From<&Job> for WireVideo {
    fn from(job: &Job) -> Self {
        let Canvas { width, height, num_frames, fps } = job.request.canvas;
        let is_completed = matches!(job.state, JobState::Completed(_));
        Self {
            id: job.id.to_string(),
            object: "video",
            status: status(&job.state),
            progress: job.progress.percent,
            created_at: unix_seconds(job.created),
            completed_at: job.ended.filter(|_| is_completed).map(unix_seconds),
            error: if let JobState::Failed(failure) = &job.state { Some(failure.into()) } else { None },
            size: format!("{width}x{height}"),
            seconds: duration(num_frames, fps).to_string(),
            parameters: EffectiveParameters::new(&job.model, &job.request),
            output_format: job.format.as_str(),
        }
    }
}

/// The answer, and when to look again.
fn answer(job: &Job) -> Response {
    let mut response = Json(WireVideo::from(job)).into_response();
    if !job.state.is_terminal() {
        let half = job.progress.eta.map_or(DEFAULT_POLL_MS, |eta| eta.as_millis() / 2);
        let poll_ms = half.clamp(*POLL_MS.start(), *POLL_MS.end()) as u64;
        response.headers_mut().insert(POLL_HEADER, HeaderValue::from(poll_ms));
    }
    response
}

/// `POST /v1/videos`.
pub(super) async fn create(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let received = body::receive(&state, request, Format::JsonOrForm, body::MAX_PICTURE_BODY_BYTES).await?;
    let room_of = |name: &str| room_in(&PARAMETERS, name);
    let read = |body| super::parameters::read(with_input_reference(body)?, OWN, Task::Video);
    with_place(&state, received.client, async |admitted| {
        let (given, held) = received.read(state.compute(), room_of, read).await?;
        let (options, held) = diffusion::decoded(state.compute(), given, held).await?;
        order(&state, admitted, options, held).await
    })
    .await
}

/// A body whose `image` is called `input_reference`: both names mean the picture that a video begins with.
fn with_input_reference(body: Value) -> Result<Value, ApiError> {
    let name = INPUT_REFERENCE.declaration.name;
    let mut fields = body.into_object()?;
    if let Some(image) = fields.remove(IMAGE_ALIAS)
        && fields.insert(name.to_owned(), image).is_some()
    {
        return Err(ApiError::field(IMAGE_ALIAS, format!("is another name of {name}; give one of them")));
    }
    Ok(Value::Object(fields))
}

/// `held` is the memory of the pictures, for as long as the video is made.
async fn order(state: &AppState, admitted: &Admitted, options: Options, held: Held) -> Result<Response, ApiError> {
    let model = options.get(&MODEL).unwrap_or_default();
    let card = diffusion::card(state, &model, Medium::Video)?;
    let format = options.get(&OUTPUT_FORMAT);
    let request = resolve(state.compute(), options, card).await?;
    let format = clip_format(format.as_deref(), &request)?;
    let outputs = state.outputs();
    check_disk(outputs.clone()).await?;
    let order = tale_models::Request::Diffusion(request.clone());
    let session = admitted.submit_if(&model, order, while_disk(outputs))?;
    let job = Job::new(admitted.client(), model, request.without_pictures(), format);
    state.jobs().insert(job.clone())?;
    let response = answer(&job);
    // The job goes on when the client does not: only DELETE ends it.
    let driven = drive(job, session, outputs.clone(), state.jobs().clone());
    tokio::spawn(async move {
        driven.await;
        drop(held);
    });
    Ok(response)
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

/// `GET /v1/videos`.
pub(super) async fn list(State(state): State<AppState>, uri: Uri) -> Result<Response, ApiError> {
    let page = page(&uri)?;
    let listing = state.jobs().list(&page).ok_or_else(|| ApiError::field("after", "names no video"))?;
    let num_bytes = listing.jobs.len() * LISTED_BYTES;
    Ok(state.compute().run_sized(num_bytes, move |_| Json(WireVideos::from(&listing)).into_response()).await?)
}

/// A page of the list.
#[derive(Debug, Serialize)]
pub(super) struct WireVideos {
    object: &'static str,
    data: Vec<WireVideo>,
    first_id: Option<String>,
    last_id: Option<String>,
    has_more: bool,
}

impl From<&Listing> for WireVideos {
    fn from(listing: &Listing) -> Self {
        let data: Vec<_> = listing.jobs.iter().map(WireVideo::from).collect();
        Self {
            object: "list",
            first_id: data.first().map(|video| video.id.clone()),
            last_id: data.last().map(|video| video.id.clone()),
            has_more: listing.has_more,
            data,
        }
    }
}

fn page(uri: &Uri) -> Result<Page, ApiError> {
    let query = query(uri, LIST_QUERY)?;
    let after = query.get("after").map(|after| after.parse::<JobId>());
    let after = after.transpose().map_err(|_| ApiError::field("after", "names no video"))?;
    let limit = match query.get("limit") {
        None => DEFAULT_PAGE,
        Some(limit) => match limit.parse() {
            Ok(limit @ 1..=MAX_PAGE) => limit,
            _ => return Err(ApiError::field("limit", format!("must be a whole number from 1 to {MAX_PAGE}"))),
        },
    };
    let order = match query.get("order").map(String::as_str) {
        Some("asc") => Order::Ascending,
        None | Some("desc") => Order::Descending,
        Some(_) => return Err(ApiError::field("order", "must be asc or desc")),
    };
    Ok(Page { after, limit, order })
}

/// The query of a request; a name that is not `known` is refused.
fn query(uri: &Uri, known: &[&Declaration]) -> Result<BTreeMap<String, String>, ApiError> {
    if uri.query().is_some_and(|query| query.len() > MAX_QUERY_BYTES) {
        return Err(ApiError::malformed(format!("the query is longer than {MAX_QUERY_BYTES} bytes")));
    }
    let parsed = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(uri);
    let pairs = parsed.map_err(|_| ApiError::malformed("the query cannot be read"))?.0;
    let known: Vec<&str> = known.iter().map(|declaration| declaration.name).collect();
    if let Some((name, _)) = pairs.iter().find(|(name, _)| !known.contains(&name.as_str())) {
        let problem = format!("is not known here; expected one of {}", known.join(", "));
        return Err(ApiError::field_code(name, "unknown_parameter", problem));
    }
    Ok(pairs.into_iter().collect())
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

fn clip_format(name: Option<&str>, request: &DiffusionRequest) -> Result<ClipFormat, ApiError> {
    let format = name.and_then(ClipFormat::from_extension).unwrap_or(ClipFormat::Mp4);
    if format == ClipFormat::Gif && request.canvas.fps > MAX_GIF_FPS {
        return Err(ApiError::field("fps", format!("is {}; gif plays at most {MAX_GIF_FPS}", request.canvas.fps)));
    }
    Ok(format)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAMES: FrameSupport = FrameSupport { default_num_frames: 81, default_fps: 16, multiple: 4, max_frames: 401 };

    #[test]
    fn the_duration_of_a_clip_asks_for_the_same_clip() {
        for multiple in [1, 4, 8] {
            let support = FrameSupport { multiple, ..FRAMES };
            for fps in 1..=120 {
                for num_frames in (1..=400).step_by(multiple) {
                    let seconds: f64 = duration(num_frames, fps).to_string().parse().expect("a number");
                    assert_eq!(frames_of(seconds, fps, &support), num_frames, "{seconds} s at {fps}");
                }
            }
        }
    }

    #[test]
    fn seconds_are_the_first_frame_and_groups_that_fit() {
        for (multiple, seconds, fps, num_frames) in
            [(4, 5.0, 16, 81), (4, 4.0, 8, 33), (4, 0.01, 16, 1), (8, 1.0, 24, 25), (1, 0.3, 10, 3), (1, 0.01, 10, 1)]
        {
            let support = FrameSupport { multiple, ..FRAMES };
            assert_eq!(frames_of(seconds, fps, &support), num_frames, "{seconds} s at {fps}");
        }
    }
}
