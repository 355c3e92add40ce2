//! The encoding of one clip beside the device: a thread takes frames as they come and leaves files.
//!
//! Owns: the thread, how many frames may wait for it and how many clips may be encoded, and that nothing stays of a clip that nobody
//! owns. Does not know: sessions, the store of jobs.

use std::path::{Path, PathBuf};

use tale_models::request::Frame;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot};

use super::Job;
use super::failure::Failure;
use super::files::{ClipFiles, StoredFile};
use crate::media::{ClipEncoder, ClipSettings, MediaError, OpenClip, Readers, Stills, join, write_still};

/// Batches of frames, those of one step each, that may wait for the encoder; more stay in the session's mailbox.
const MAX_WAITING_BATCHES: usize = 1;

/// Most clips that are encoded at a time, each on a thread of its own; frames of others wait. A clip whose next part has not
/// begun is none of them: else all could wait for the memory of a session that waits for one of them to end.
const MAX_ENCODERS: usize = 32;
static ENCODERS: Semaphore = Semaphore::const_new(MAX_ENCODERS);

/// The encoding of one clip on a thread of its own, which begins with the first frame. Dropped before its end, nothing of
/// the clip stays.
pub(super) struct Encoder {
    frames: mpsc::Sender<Batch>,
    clip: oneshot::Receiver<Result<Option<FinishedClip>, MediaError>>,
    /// What the thread will do; `None` once it does.
    waiting: Option<Box<dyn FnOnce() + Send>>,
    /// Among those that are encoded, while frames come.
    place: Option<SemaphorePermit<'static>>,
}

/// A finished clip that another one goes on from.
#[derive(Debug)]
pub struct Before {
    /// Its file.
    pub clip: OpenClip,
    /// Its first frame, as it was made.
    pub first: Frame,
    /// Frames that it has.
    pub num_frames: usize,
}

enum Batch {
    Frames(Vec<Frame>),
    /// The last frame has come.
    End,
}

/// A whole file; removed when dropped unless a job in the store has come to own it.
pub(super) struct FinishedClip {
    pub(super) files: ClipFiles,
    pub(super) is_claimed: bool,
}

impl Drop for FinishedClip {
    fn drop(&mut self) {
        if self.is_claimed {
            return;
        }
        if let Err(error) = self.files.remove() {
            tracing::warn!(path = %self.files.clip.path.display(), %error, "the clip of a cancelled job stays");
        }
    }
}

impl Encoder {
    /// Of the frames of `job`, behind those of `before`.
    pub(super) fn new(job: &Job, path: PathBuf, before: Option<Before>) -> Self {
        let (frames, batches) = mpsc::channel(MAX_WAITING_BATCHES);
        let (sender, clip) = oneshot::channel();
        let mut settings = job.spec.file.clone();
        let parameters = job.spec.has_comment.then(|| job.spec.parameters.clone());
        let num_frames = job.spec.num_frames();
        let work = move || {
            settings.text.comment = parameters.map(|parameters| parameters.to_json());
            // A receiver that is gone drops the clip, and the file with it.
            drop(sender.send(encode(&path, batches, &settings, num_frames, before.as_ref())));
        };
        Self { frames, clip, waiting: Some(Box::new(work)), place: None }
    }

    /// Takes a place, once fewer than [`MAX_ENCODERS`] are taken, and starts the thread where there is none yet.
    async fn begin(&mut self) {
        if self.place.is_none() {
            // The semaphore does not close.
            self.place = ENCODERS.acquire().await.ok();
        }
        let Some(work) = self.waiting.take() else { return };
        // Where there is no thread, the receiver hears nothing but the end.
        if let Err(error) = std::thread::Builder::new().name("tale-clip".into()).spawn(work) {
            tracing::error!(%error, "a clip has no thread to be encoded on");
        }
    }

    /// No frames come for a while: others may take the place.
    pub(super) fn rest(&mut self) {
        self.place = None;
    }

    /// False when the encoder has ended already.
    pub(super) async fn push(&mut self, frames: Vec<Frame>) -> bool {
        self.begin().await;
        self.frames.send(Batch::Frames(frames)).await.is_ok()
    }

    pub(super) async fn finish(&mut self) -> Result<FinishedClip, Failure> {
        self.begin().await;
        let _ = self.frames.send(Batch::End).await;
        match (&mut self.clip).await {
            Ok(Ok(Some(clip))) => Ok(clip),
            Ok(Ok(None)) => Err(Failure::internal("the clip ended before its last frame")),
            Ok(Err(error)) if error.is_of_storage() => {
                tracing::error!(%error, "a clip could not be written");
                Err(Failure::insufficient_storage("the disk took no more of the clip"))
            }
            Ok(Err(error)) => Err(Failure::internal(&error.to_string())),
            Err(_) => Err(Failure::internal("the encoder panicked")),
        }
    }
}

/// Encodes until the end; `None` when the sender goes away before it.
fn encode(
    path: &Path,
    mut batches: mpsc::Receiver<Batch>,
    settings: &ClipSettings,
    num_frames: usize,
    before: Option<&Before>,
) -> Result<Option<FinishedClip>, MediaError> {
    let mut encoder: Option<ClipEncoder> = None;
    let mut stills = Stills::of(num_frames);
    if let Some(before) = before {
        before.show(settings, &mut stills)?;
    }
    loop {
        match batches.blocking_recv() {
            None => return Ok(None),
            Some(Batch::Frames(frames)) => {
                for frame in frames {
                    let mut open = match encoder.take() {
                        Some(open) => open,
                        None => {
                            let size = (frame.width, frame.height);
                            ClipEncoder::create_for(Readers::Owner, path, settings, size)?
                        }
                    };
                    open.push(&frame)?;
                    encoder = Some(open);
                    stills.push(frame)?;
                }
            }
            Some(Batch::End) => {
                encoder.ok_or(MediaError::Empty)?.finish()?;
                return finished(path, stills, |path| match before {
                    Some(before) => join(&before.clip, &before.first, path, settings, Readers::Owner),
                    None => Ok(()),
                })
                .map(Some);
            }
        }
    }
}

impl Before {
    /// Shows `stills` the frames that they want of this clip: the first as it was made, the others as they are in its file.
    fn show(&self, settings: &ClipSettings, stills: &mut Stills) -> Result<(), MediaError> {
        let wanted: Vec<usize> =
            stills.wanted().into_iter().filter(|number| (1..self.num_frames).contains(number)).collect();
        let in_file: Vec<usize> = wanted.iter().map(|number| settings.file_frame(*number)).collect();
        let shown = self.clip.frames(&in_file, (self.first.width, self.first.height))?;
        stills.push(self.first.clone())?;
        for (number, frame) in wanted.into_iter().zip(shown) {
            stills.skip_to(number);
            stills.push(frame)?;
        }
        stills.skip_to(self.num_frames);
        Ok(())
    }
}

/// The clip at `path`, completed by `complete`, with its stills beside it.
fn finished(
    path: &Path,
    stills: Stills,
    complete: impl FnOnce(&Path) -> Result<(), MediaError>,
) -> Result<FinishedClip, MediaError> {
    let failed = |source| MediaError::Io { path: path.into(), source };
    // From here on whatever is there goes again, should something fail.
    let files = ClipFiles::new(StoredFile { path: path.into(), bytes: 0 });
    let mut clip = FinishedClip { files, is_claimed: false };
    complete(path)?;
    clip.files.clip = StoredFile::at(path).map_err(failed)?;
    for (still, bytes) in stills.finish()? {
        write_still(path, still, &bytes, Readers::Owner)?;
        clip.files.add(still).map_err(failed)?;
    }
    Ok(clip)
}
