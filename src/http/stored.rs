//! Files of videos that are done, and the frames of them that other requests refer to: those were written losslessly when the
//! video was encoded.
//!
//! Owns: how they are found and read. Does not know: what is done with them.

use axum::body::Bytes;
use tale_models::diffusion::Canvas;

use super::AppState;
use super::body::memory::Held;
use super::body::upload::{End, FrameOf};
use super::error::ApiError;
use super::files::FileWork;
use crate::job::files::ClipFiles;
use crate::job::node::prepare::{open_before, read};
use crate::job::{Job, JobId, JobState};
use crate::media::Still;

/// Most of them that are read at a time.
const MAX_READS: usize = 8;
static READS: FileWork = FileWork::new(MAX_READS);

/// The files of a job that has some.
pub(super) fn completed(job: &Job) -> Result<&ClipFiles, ApiError> {
    match &job.state {
        JobState::Completed(files) => Ok(files),
        state => {
            let message = format!("the video is {}; its content is there once it is completed", state.as_str());
            Err(ApiError::not_completed(message))
        }
    }
}

/// The file of a frame that the field `name` refers to; its memory is added to `held`.
pub(super) async fn fetch_frame(
    state: &AppState,
    name: &str,
    frame: &FrameOf,
    held: &mut Held,
) -> Result<Bytes, ApiError> {
    let field = format!("{name}.video_id");
    let no_video = || ApiError::field(&field, "names no video");
    let id = frame.video_id.parse::<JobId>().map_err(|_| no_video())?;
    let job = state.jobs().get(id).await.map_err(|error| if error.is_unknown() { no_video() } else { error.into() })?;
    let files = completed(&job).map_err(|error| error.about(&field))?;
    let still = match frame.end {
        End::First => Still::First,
        End::Last => Still::Last,
    };
    let file = files.still(still).cloned().ok_or_else(|| ApiError::removed().about(&field))?;
    held.add(usize::try_from(file.bytes).unwrap_or(usize::MAX))?;
    READS.run(move || read(&file)).await?.ok_or_else(|| ApiError::removed().about(&field))
}

/// Refuses a completed video whose files are not there to go on from; the memory of its first frame is held meanwhile.
pub(super) async fn check_before(job: &Job, num_frames: usize, held: &mut Held) -> Result<(), ApiError> {
    let (files, canvas) = (completed(job)?.clone(), job.spec.canvas());
    let Canvas { width, height, .. } = canvas;
    held.add(3 * width * height)?;
    let opened = READS.run(move || open_before(&files, canvas, num_frames).is_some()).await;
    held.give_back(3 * width * height);
    if opened? { Ok(()) } else { Err(ApiError::removed()) }
}
