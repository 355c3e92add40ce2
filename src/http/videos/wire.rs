//! A video as the API shows it.
//!
//! Owns: the answer's fields. Does not know: how a job comes to its state.

use std::borrow::Cow;

use axum::Json;
use axum::http::HeaderValue;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tale_models::diffusion::Canvas;
use tale_models::diffusion::keyframes::Fitting;

use super::fields::duration;
use crate::http::unix_seconds;
use crate::job::failure::Failure;
use crate::job::node::QueuePlace;
use crate::job::spec::Origin;
use crate::job::{Job, JobState};
use crate::media::{Codec, Quality};
use crate::parameters::EffectiveParameters;

/// Bounds of the time after which a client is told to look again.
const POLL_MS: std::ops::RangeInclusive<u128> = 200..=5000;
/// When nothing is known about the pace.
const DEFAULT_POLL_MS: u128 = 1000;
/// Tells the client of OpenAI when to look again.
pub(in crate::http) const POLL_HEADER: &str = "openai-poll-after-ms";

/// OpenAI's fields, and the effective parameters beside them.
#[derive(Debug, Serialize)]
pub(super) struct WireVideo {
    pub(super) id: String,
    object: &'static str,
    status: &'static str,
    progress: u8,
    created_at: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    completed_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<WireFailure>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remixed_from_video_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extended_from_video_id: Option<String>,
    size: String,
    seconds: String,
    #[serde(flatten)]
    parameters: EffectiveParameters,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    fitted_images: Vec<WireFitting>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    skipped_passes: Option<usize>,
    /// Previews that its events show of each part, where any were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    partial_images: Option<usize>,
    priority: &'static str,
    /// Videos that are made before it, while it waits.
    #[serde(skip_serializing_if = "Option::is_none")]
    queue_position: Option<usize>,
    /// Until it is whole, while it waits and that can be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    eta_seconds: Option<u64>,
    #[serde(flatten)]
    file: WireFile,
}

/// How a picture came to the size of the video.
#[derive(Debug, Serialize)]
struct WireFitting {
    field: &'static str,
    size: String,
    fit: &'static str,
}

impl From<&Fitting> for WireFitting {
    fn from(fitting: &Fitting) -> Self {
        let Fitting { field, size: (width, height), is_stretched } = fitting;
        Self { field, size: format!("{width}x{height}"), fit: if *is_stretched { "stretched" } else { "exact" } }
    }
}

/// What becomes of the frames.
#[derive(Debug, Serialize)]
struct WireFile {
    output_format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    codec: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quality: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    output_fps: Option<usize>,
    metadata: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    title: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    poster: bool,
}

impl From<&Job> for WireFile {
    fn from(job: &Job) -> Self {
        let settings = &job.spec.file;
        Self {
            output_format: settings.encoding.format().as_str(),
            codec: settings.encoding.codec().map(Codec::as_str),
            quality: settings.encoding.quality().map(Quality::as_str),
            output_fps: settings.output_fps,
            metadata: job.spec.has_comment,
            title: settings.text.title.clone(),
            poster: settings.has_poster,
        }
    }
}

/// Why a job failed.
#[derive(Debug, Serialize)]
pub(in crate::http) struct WireFailure {
    code: Cow<'static, str>,
    message: String,
}

impl From<&Failure> for WireFailure {
    fn from(failure: &Failure) -> Self {
        Self { code: failure.code.clone(), message: failure.message.clone() }
    }
}

impl From<&Job> for WireVideo {
    fn from(job: &Job) -> Self {
        let Canvas { width, height, fps, .. } = job.spec.canvas();
        let (remixed_from, extended_from) = match job.spec.origin {
            Some(Origin::Remix(of)) => (Some(of.to_string()), None),
            Some(Origin::Extension { of, .. }) => (None, Some(of.to_string())),
            None => (None, None),
        };
        let is_completed = matches!(job.state, JobState::Completed(_));
        Self {
            id: job.id.to_string(),
            object: "video",
            status: job.state.as_str(),
            progress: job.progress.percent,
            created_at: unix_seconds(job.created),
            completed_at: job.ended.filter(|_| is_completed).map(unix_seconds),
            error: if let JobState::Failed(failure) = &job.state { Some(failure.into()) } else { None },
            remixed_from_video_id: remixed_from,
            extended_from_video_id: extended_from,
            size: format!("{width}x{height}"),
            seconds: duration(job.spec.num_frames(), fps).to_string(),
            parameters: job.spec.parameters.clone(),
            fitted_images: job.spec.fittings.iter().map(WireFitting::from).collect(),
            warnings: job.spec.warnings.clone(),
            skipped_passes: (is_completed && job.spec.has_cache).then_some(job.skipped_passes),
            partial_images: Some(job.spec.partial_images).filter(|previews| *previews > 0),
            priority: job.priority.as_str(),
            queue_position: None,
            eta_seconds: None,
            file: job.into(),
        }
    }
}

/// The answer, with the place in the queue where there is one, and when to look again.
pub(super) fn answer(job: &Job, place: Option<QueuePlace>) -> Response {
    let mut video = WireVideo::from(job);
    video.queue_position = place.map(|place| place.position);
    video.eta_seconds = place.and_then(|place| place.eta_seconds).map(|seconds| seconds.ceil() as u64);
    let mut response = Json(video).into_response();
    if !job.state.is_terminal() {
        let half = job.progress.eta.map_or(DEFAULT_POLL_MS, |eta| eta.as_millis() / 2);
        let poll_ms = half.clamp(*POLL_MS.start(), *POLL_MS.end()) as u64;
        response.headers_mut().insert(POLL_HEADER, HeaderValue::from(poll_ms));
    }
    response
}
