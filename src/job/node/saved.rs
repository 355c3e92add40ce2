//! What a clip under way has so far, kept beside its row: the last checkpoint of the session that makes its part, and the frames that were there
//! before it.
//!
//! Owns: the objects and the text of a row's checkpoint, how often one is written, and the reading of all that again. Frames are kept as they came from
//! sessions, since an encoder cannot be kept: whoever goes on encodes them once more. Does not know: how a session goes on.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use tale_models::request::Frame;
use tale_models::session_checkpoint::SessionCheckpoint;
use tokio::time::Instant;

use super::Shared;
use crate::job::JobId;
use crate::job::store::{Lease, StoreError};

/// Version of the text. Another one is refused, and the job begins anew.
const VERSION: u32 = 1;
/// Least time between two checkpoints of a job.
const LEAST_INTERVAL: Duration = Duration::from_secs(2);
/// Writing checkpoints takes one part in so many of the time at most.
const SHARE: u32 = 50;

/// The text of a row.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
struct Text {
    version: u32,
    /// The part that is being made.
    part: usize,
    /// The object of its session, if that has come so far.
    session: Option<String>,
    /// The objects of frames, in their order.
    frames: Vec<FramesText>,
    /// Predictions that were skipped in the parts before.
    skipped_passes: usize,
    /// Previews that were shown.
    num_previews: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct FramesText {
    part: usize,
    name: String,
    count: usize,
}

/// Where a job goes on from.
pub(super) struct Found {
    /// The part that is to be made.
    pub(super) part: usize,
    /// Of its session.
    pub(super) session: Option<Arc<SessionCheckpoint>>,
    /// Frames of this part and those before it, each batch with its part.
    pub(super) frames: Vec<(usize, Vec<Frame>)>,
    /// Predictions that were skipped in the parts before.
    pub(super) skipped_passes: usize,
    /// Previews that were shown.
    pub(super) num_previews: usize,
}

/// Keeps what there is of a job.
pub(super) struct Saving {
    shared: Arc<Shared>,
    lease: Lease,
    text: Text,
    /// Objects of this claim so far: names of two claims differ.
    num_objects: usize,
    last: Option<(Instant, Duration)>,
}

impl Saving {
    /// Of the job of `lease`, from what its row says on; and what there is, if anything.
    pub(super) async fn begin(shared: &Arc<Shared>, lease: &Lease, text: Option<&str>) -> (Self, Option<Found>) {
        let fresh =
            || Self { shared: shared.clone(), lease: lease.clone(), text: Text::default(), num_objects: 0, last: None };
        let Some(text) = text else { return (fresh(), None) };
        let read = async {
            let text: Text = serde_json::from_str(text).map_err(io::Error::other)?;
            if text.version != VERSION {
                return Err(io::Error::other("it is of another version"));
            }
            let found = read(shared, lease.id, &text).await?;
            Ok((text, found))
        };
        match read.await {
            Ok((text, found)) => (Self { text, ..fresh() }, Some(found)),
            Err(error) => {
                tracing::warn!(job = %lease.id, %error, "the checkpoint of a job cannot be used; it begins anew");
                (fresh(), None)
            }
        }
    }

    /// What was there is of no use: the job begins anew.
    pub(super) fn begin_anew(&mut self) {
        self.text = Text::default();
    }

    /// Keeps frames of the part that is made, before they are encoded.
    pub(super) async fn frames(&mut self, frames: &[Frame]) -> io::Result<()> {
        let name = self.next_name("frames");
        self.shared.objects.put(self.lease.id, &name, write_frames(frames)?).await?;
        self.text.frames.push(FramesText { part: self.text.part, name, count: frames.len() });
        Ok(())
    }

    /// Whether another checkpoint would take too much of the time.
    pub(super) fn is_too_soon(&self) -> bool {
        let since = |(at, cost): (Instant, Duration)| at.elapsed() < LEAST_INTERVAL.max(cost.saturating_mul(SHARE));
        self.last.is_some_and(since)
    }

    /// Keeps a checkpoint of the session, all of whose frames so far were kept.
    pub(super) async fn session(
        &mut self,
        checkpoint: &SessionCheckpoint,
        skipped_passes: usize,
        num_previews: usize,
    ) -> Result<(), SaveError> {
        let begun = Instant::now();
        let name = self.next_name("session");
        let bytes = Bytes::copy_from_slice(checkpoint.as_bytes());
        self.shared.objects.put(self.lease.id, &name, bytes).await?;
        let before = self.text.session.replace(name);
        self.write(skipped_passes, num_previews).await?;
        self.forget(before).await;
        self.last = Some((Instant::now(), begun.elapsed()));
        Ok(())
    }

    /// A part has ended, all of whose frames were kept: the next one is made.
    pub(super) async fn next_part(&mut self, skipped_passes: usize, num_previews: usize) -> Result<(), SaveError> {
        self.text.part += 1;
        let before = self.text.session.take();
        self.write(skipped_passes, num_previews).await?;
        self.forget(before).await;
        Ok(())
    }

    async fn write(&mut self, skipped_passes: usize, num_previews: usize) -> Result<(), SaveError> {
        self.text = Text { version: VERSION, skipped_passes, num_previews, ..std::mem::take(&mut self.text) };
        let text = serde_json::to_string(&self.text).map_err(io::Error::other)?;
        self.shared.store.checkpoint(&self.lease, &text).await?;
        Ok(())
    }

    /// An object that no row refers to any more.
    async fn forget(&self, name: Option<String>) {
        let Some(name) = name else { return };
        if let Err(error) = self.shared.objects.remove(self.lease.id, &name).await {
            tracing::warn!(job = %self.lease.id, %error, "an old checkpoint stays");
        }
    }

    fn next_name(&mut self, kind: &str) -> String {
        self.num_objects += 1;
        format!("{kind}-{}-{}", self.lease.epoch, self.num_objects)
    }
}

/// Why a checkpoint was not kept.
#[derive(Debug, thiserror::Error)]
pub(super) enum SaveError {
    /// Its objects.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Its row.
    #[error(transparent)]
    Store(#[from] StoreError),
}

async fn read(shared: &Shared, job: JobId, text: &Text) -> io::Result<Found> {
    let mut frames = Vec::with_capacity(text.frames.len());
    let mut frames_of_part = 0;
    for FramesText { part, name, count } in &text.frames {
        let read = read_frames(shared.objects.get(job, name).await?)?;
        if read.len() != *count || *part > text.part {
            return Err(io::Error::other("its frames are not those that it names"));
        }
        frames_of_part += if *part == text.part { *count } else { 0 };
        frames.push((*part, read));
    }
    let session = match &text.session {
        None if frames_of_part > 0 => return Err(io::Error::other("it has frames of a part without a session")),
        None => None,
        Some(name) => {
            let bytes = shared.objects.get(job, name).await?.to_vec();
            let session = SessionCheckpoint::from_bytes(bytes).map_err(io::Error::other)?;
            if session.frames_done() != frames_of_part {
                return Err(io::Error::other("it has other frames than its session has given out"));
            }
            Some(Arc::new(session))
        }
    };
    let Text { part, skipped_passes, num_previews, .. } = *text;
    Ok(Found { part, session, frames, skipped_passes, num_previews })
}

/// Width, height, and all pixels.
fn write_frames(frames: &[Frame]) -> io::Result<Bytes> {
    let (width, height) = frames.first().map_or((0, 0), |frame| (frame.width, frame.height));
    let side = |side: usize| u32::try_from(side).map_err(io::Error::other);
    let mut bytes = BytesMut::with_capacity(8 + frames.len() * 3 * width * height);
    bytes.put_u32_le(side(width)?);
    bytes.put_u32_le(side(height)?);
    for frame in frames {
        if (frame.width, frame.height) != (width, height) {
            return Err(io::Error::other("frames of one clip differ in size"));
        }
        bytes.put_slice(&frame.rgb);
    }
    Ok(bytes.freeze())
}

fn read_frames(bytes: Bytes) -> io::Result<Vec<Frame>> {
    let damaged = || io::Error::other("its frames are damaged");
    let (head, pixels) = bytes.split_first_chunk::<8>().ok_or_else(damaged)?;
    let side = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]) as usize;
    let (width, height) = (side(0), side(4));
    let frame_bytes = width.checked_mul(height).and_then(|pixels| pixels.checked_mul(3)).ok_or_else(damaged)?;
    if frame_bytes == 0 || pixels.len() % frame_bytes != 0 {
        return if pixels.is_empty() { Ok(Vec::new()) } else { Err(damaged()) };
    }
    Ok(pixels.chunks_exact(frame_bytes).map(|rgb| Frame { width, height, rgb: rgb.to_vec() }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_they_were_kept_and_nothing_else_is() {
        let frame = |value: u8| Frame { width: 3, height: 2, rgb: vec![value; 18] };
        let frames = vec![frame(1), frame(2), frame(3)];
        let bytes = write_frames(&frames).expect("of one size");
        assert_eq!(read_frames(bytes.clone()).expect("our own"), frames);
        assert!(read_frames(write_frames(&[]).expect("nothing")).expect("nothing").is_empty());
        for end in [0, 7, 9, bytes.len() - 1] {
            read_frames(bytes.slice(..end)).expect_err("cut");
        }
        let mut huge = bytes.to_vec();
        huge[..8].fill(0xFF);
        read_frames(huge.into()).expect_err("a size that overflows");
        write_frames(&[frame(1), Frame { width: 2, height: 3, rgb: vec![0; 18] }]).expect_err("two sizes");
    }
}
