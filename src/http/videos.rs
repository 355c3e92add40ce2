//! `/v1/videos`: clips are ordered, looked at, fetched and deleted.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, Uri};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Deserializer, Serialize};
use tale_models::card::{DiffusionOptions, Medium};
use tale_models::diffusion::{Acceleration, DiffusionRequest};
use tale_models::{DiffusionCard, ModelCard};

use super::diffusion::{self, Interval, Size, saturate};
use super::error::ApiError;
use super::{AppState, body, unix_seconds};
use crate::job::drive::drive;
use crate::job::store::{Order, Page};
use crate::job::{Change, Failure, Job, JobId, JobState, UnknownJob};
use crate::media::{ClipFormat, MAX_GIF_FPS};

mod content;

pub(super) use content::content;

/// Jobs of a page when the client does not say.
const DEFAULT_PAGE: usize = 20;
/// Most jobs of a page.
const MAX_PAGE: usize = 100;
/// Bounds of the time after which a client is told to look again.
const POLL_MS: std::ops::RangeInclusive<u128> = 200..=5000;
/// When nothing is known about the pace.
const DEFAULT_POLL_MS: u128 = 1000;
/// Tells the client of OpenAI when to look again.
pub(super) const POLL_HEADER: &str = "openai-poll-after-ms";

/// The body, as JSON or as a form.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct VideoBody {
    model: String,
    prompt: String,
    size: Option<String>,
    width: Option<u64>,
    height: Option<u64>,
    seconds: Option<Seconds>,
    num_frames: Option<u64>,
    fps: Option<u64>,
    output_format: Option<OutputFormat>,
    negative_prompt: Option<String>,
    num_inference_steps: Option<u64>,
    guidance_scale: Option<f64>,
    scheduler: Option<String>,
    guidance_interval: Option<Interval>,
    acceleration: Option<Acceleration>,
    seed: Option<u64>,
    max_sequence_length: Option<u64>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum OutputFormat {
    Mp4,
    Webm,
    Gif,
}

impl From<OutputFormat> for ClipFormat {
    fn from(format: OutputFormat) -> Self {
        match format {
            OutputFormat::Mp4 => ClipFormat::Mp4,
            OutputFormat::Webm => ClipFormat::Webm,
            OutputFormat::Gif => ClipFormat::Gif,
        }
    }
}

/// A number, which OpenAI's client sends as a string.
#[derive(Debug, Clone, Copy)]
struct Seconds(f64);

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SecondsVisitor;

        impl serde::de::Visitor<'_> for SecondsVisitor {
            type Value = Seconds;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a number of seconds")
            }

            fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Seconds, E> {
                if value.is_finite() && value > 0.0 {
                    return Ok(Seconds(value));
                }
                Err(E::custom("must be more than 0"))
            }

            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Seconds, E> {
                self.visit_f64(value as f64)
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Seconds, E> {
                let value = text.trim().parse().map_err(|_| E::custom("must be a number of seconds"))?;
                self.visit_f64(value)
            }
        }

        deserializer.deserialize_any(SecondsVisitor)
    }
}

impl VideoBody {
    fn resolve(self, card: &ModelCard) -> Result<DiffusionRequest, ApiError> {
        let size = Size::new(self.size.as_deref(), self.width, self.height)?;
        let is_by_seconds = self.seconds.is_some();
        let options = DiffusionOptions {
            num_frames: self.frames(card)?,
            prompt: self.prompt,
            negative_prompt: self.negative_prompt,
            width: size.width,
            height: size.height,
            fps: self.fps.map(saturate),
            num_inference_steps: self.num_inference_steps.map(saturate),
            guidance_scale: self.guidance_scale,
            scheduler: self.scheduler,
            // No scheduler of a clip model has these.
            timestep_spacing: None,
            eta: None,
            true_cfg_scale: None,
            guidance_interval: self.guidance_interval.map(|Interval(interval)| interval),
            acceleration: self.acceleration,
            seed: self.seed,
            max_sequence_length: self.max_sequence_length.map(saturate),
            vae_tiling: None,
            reference_images: Vec::new(),
            ip_adapter_scale: None,
            loras: Vec::new(),
            partial_images: None,
            image: None,
            mask: None,
            strength: None,
            denoising_end: None,
        };
        let resolved = diffusion::resolve(card, options, size);
        resolved.map_err(|error| if is_by_seconds { error.within("num_frames", "seconds") } else { error })
    }

    /// `num_frames`, or the frames of `seconds`.
    fn frames(&self, card: &ModelCard) -> Result<Option<usize>, ApiError> {
        let num_frames = self.num_frames.map(saturate);
        let (Some(Seconds(seconds)), ModelCard::Diffusion(card)) = (self.seconds, card) else { return Ok(num_frames) };
        let of_seconds = frames_of(seconds, self.fps.map_or(card.defaults.fps, saturate), card);
        match num_frames {
            Some(num_frames) if num_frames != of_seconds => {
                let problem = format!("is {of_seconds} frames, which contradicts num_frames; give one of them");
                Err(ApiError::field("seconds", problem))
            }
            _ => Ok(Some(of_seconds)),
        }
    }
}

/// Frames of a clip of `seconds`: the first frame, and as many groups of `frames_multiple` frames as fit in the time. 5
/// seconds at 16 frames per second are 81 frames for a model that makes 4k+1.
fn frames_of(seconds: f64, fps: usize, card: &DiffusionCard) -> usize {
    let multiple = card.frames_multiple.max(1);
    // A billionth of a frame more, so that 0.3 * 10 is 3.
    let groups = (seconds * fps as f64 / multiple as f64 + 1e-9).floor();
    (groups as usize).saturating_mul(multiple).saturating_add(1)
}

/// A clip as the API shows it: OpenAI's fields, and the effective parameters beside them.
#[derive(Debug, Serialize)]
pub(super) struct WireVideo {
    id: String,
    object: &'static str,
    model: String,
    status: &'static str,
    progress: u8,
    created_at: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    completed_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<WireFailure>,
    prompt: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    negative_prompt: Option<String>,
    size: String,
    seconds: String,
    width: usize,
    height: usize,
    num_frames: usize,
    fps: usize,
    num_inference_steps: usize,
    guidance_scale: f64,
    scheduler: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    guidance_interval: Option<[f64; 2]>,
    acceleration: Acceleration,
    seed: u64,
    max_sequence_length: usize,
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
        let request = job.request.clone();
        let guidance_interval = diffusion::interval(&request);
        let is_completed = matches!(job.state, JobState::Completed(_));
        Self {
            id: job.id.to_string(),
            object: "video",
            model: job.model.clone(),
            status: status(&job.state),
            progress: job.progress.percent,
            created_at: unix_seconds(job.created),
            completed_at: job.ended.filter(|_| is_completed).map(unix_seconds),
            error: if let JobState::Failed(failure) = &job.state { Some(failure.into()) } else { None },
            prompt: request.prompt.text,
            negative_prompt: request.guidance.negative_prompt.and_then(|negative| negative.text().map(str::to_owned)),
            size: format!("{}x{}", request.canvas.width, request.canvas.height),
            // The inverse of `frames_of`: what the first frame is followed by.
            seconds: ((request.canvas.num_frames.max(1) - 1) as f64 / request.canvas.fps.max(1) as f64).to_string(),
            width: request.canvas.width,
            height: request.canvas.height,
            num_frames: request.canvas.num_frames,
            fps: request.canvas.fps,
            num_inference_steps: request.sampling.num_inference_steps,
            guidance_scale: request.guidance.guidance_scale,
            scheduler: request.sampling.scheduler.name,
            guidance_interval,
            acceleration: request.acceleration,
            seed: request.sampling.seed,
            max_sequence_length: request.prompt.max_sequence_length,
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
    let body: VideoBody = body::json_or_form(request, body::MAX_BODY_BYTES).await?;
    let card = diffusion::card(&state, &body.model, Medium::Clip)?;
    let (model, output_format) = (body.model.clone(), body.output_format);
    let request = body.resolve(&card)?;
    let format = format(output_format, &request)?;
    let session = state.engine()?.submit(&model, tale_models::Request::Diffusion(request.clone()))?;
    let job = Job::new(model, request, format);
    state.jobs().insert(job.clone())?;
    let path = state.outputs().file(job.id, format);
    let response = answer(&job);
    // The job goes on when the client does not: only DELETE ends it.
    tokio::spawn(drive(job, session, path, state.jobs().clone()));
    Ok(response)
}

/// `GET /v1/videos`.
pub(super) async fn list(State(state): State<AppState>, uri: Uri) -> Result<Json<WireVideos>, ApiError> {
    let page = page(&uri)?;
    let listing = state.jobs().list(&page).ok_or_else(|| ApiError::field("after", "names no video"))?;
    let data: Vec<_> = listing.jobs.iter().map(WireVideo::from).collect();
    Ok(Json(WireVideos {
        object: "list",
        first_id: data.first().map(|video| video.id.clone()),
        last_id: data.last().map(|video| video.id.clone()),
        has_more: listing.has_more,
        data,
    }))
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

fn page(uri: &Uri) -> Result<Page, ApiError> {
    let query = query(uri, &["after", "limit", "order"])?;
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
fn query(uri: &Uri, known: &[&str]) -> Result<BTreeMap<String, String>, ApiError> {
    let parsed = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(uri);
    let pairs = parsed.map_err(|_| ApiError::malformed("the query cannot be read"))?.0;
    if let Some((name, _)) = pairs.iter().find(|(name, _)| !known.contains(&name.as_str())) {
        let problem = format!("is not known here; expected one of {}", known.join(", "));
        return Err(ApiError::field_code(name, "unknown_parameter", problem));
    }
    Ok(pairs.into_iter().collect())
}

/// `GET /v1/videos/{id}`.
pub(super) async fn retrieve(State(state): State<AppState>, Path(id): Path<String>) -> Result<Response, ApiError> {
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
pub(super) async fn delete(State(state): State<AppState>, Path(id): Path<String>) -> Result<Json<Deleted>, ApiError> {
    let id: JobId = id.parse()?;
    // Refused for a job that has ended, which is then only removed. Followers and the driver hear of it by the feed.
    let _ = state.jobs().apply(id, Change::Cancelled);
    state.jobs().remove(id).ok_or(UnknownJob)?;
    Ok(Json(Deleted { id: id.to_string(), object: "video.deleted", deleted: true }))
}

fn format(output_format: Option<OutputFormat>, request: &DiffusionRequest) -> Result<ClipFormat, ApiError> {
    let format = output_format.map_or(ClipFormat::Mp4, ClipFormat::from);
    if format == ClipFormat::Gif && request.canvas.fps > MAX_GIF_FPS {
        return Err(ApiError::field("fps", format!("is {}; gif plays at most {MAX_GIF_FPS}", request.canvas.fps)));
    }
    Ok(format)
}
