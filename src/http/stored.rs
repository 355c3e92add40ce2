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
use crate::job::encoder::Before;
use crate::job::files::{ClipFiles, StoredFile};
use crate::job::{Job, JobId, JobState};
use crate::media::{OpenClip, Still, decode_picture};

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
    let id = frame.video_id.parse::<JobId>().ok();
    let job = id.and_then(|id| state.jobs().get(id)).ok_or_else(|| ApiError::field(&field, "names no video"))?;
    let files = completed(&job).map_err(|error| error.about(&field))?;
    let still = match frame.end {
        End::First => Still::First,
        End::Last => Still::Last,
    };
    let file = files.still(still).cloned().ok_or_else(|| ApiError::removed().about(&field))?;
    held.add(usize::try_from(file.bytes).unwrap_or(usize::MAX))?;
    READS.run(move || read(&file)).await?.map_err(|error| error.about(&field))
}

/// A completed video to go on from, which has `num_frames`; the memory of its first frame is added to `held`.
pub(super) async fn open(job: &Job, num_frames: usize, held: &mut Held) -> Result<Before, ApiError> {
    let files = completed(job)?;
    let (clip, first) = (files.clip.clone(), files.still(Still::First).cloned().ok_or_else(ApiError::removed)?);
    let Canvas { width, height, .. } = job.request.canvas;
    held.add(3 * width * height)?;
    let opened = READS.run(move || {
        let is_as_made = std::fs::metadata(&clip.path).is_ok_and(|found| found.len() == clip.bytes);
        let clip = OpenClip::open(&clip.path).ok().filter(|_| is_as_made).ok_or_else(ApiError::removed)?;
        let first = decode_picture(&read(&first)?).map_err(|_| ApiError::removed())?.frame;
        Ok(Before { clip, first, num_frames })
    });
    opened.await?
}

/// The bytes of a file that is as it was made.
pub(super) fn read(file: &StoredFile) -> Result<Bytes, ApiError> {
    match std::fs::read(&file.path) {
        Ok(bytes) if bytes.len() as u64 == file.bytes => Ok(bytes.into()),
        Ok(_) => Err(ApiError::removed()),
        Err(error) => {
            tracing::warn!(path = %file.path.display(), %error, "a frame of a video cannot be read");
            Err(ApiError::removed())
        }
    }
}
