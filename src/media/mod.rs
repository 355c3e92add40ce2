//! Pictures and clips as files.
//!
//! Owns: encoding of RGB frames to PNG, JPEG, WebP, MP4, WebM, GIF and to folders of PNG frames, colour conversion
//! included; decoding of pictures that clients send. Does not know: who made the frames or who asks for them. Everything here is CPU work that blocks: call it
//! on a thread that may wait.

mod clip;
mod ffmpeg;
mod frames;
mod input;
mod join;
mod jpeg;
mod partial;
mod picture;
mod stills;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use tale_models::request::Frame;

pub use clip::{BadEncoding, ClipEncoder, ClipFormat, ClipSettings, ClipText, Codec, Encoding, MAX_GIF_FPS, Quality};
pub use frames::{FrameFolder, MAX_FOLDER_FRAMES, write_frames};
pub use input::{InputError, InputPicture, MAX_INPUT_PIXELS, MAX_INPUT_SIDE, decode_picture, decode_picture_within};
pub use join::{OpenClip, join, read_clip_comment};
pub use partial::{PARTIAL_EXTENSION, Readers, is_abandoned};
pub use picture::{PictureFormat, encode_picture, read_png_text, resized};
pub use stills::{Still, Stills, within, write_still};

/// Who made a file, in those that say how they were made.
const SOFTWARE: &str = concat!("Tale ", env!("CARGO_PKG_VERSION"));

/// What can go wrong between frames and a file.
#[derive(Debug, thiserror::Error)]
pub enum MediaError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// FFmpeg refused.
    #[error("FFmpeg could not {action}: {source}")]
    Ffmpeg {
        /// What it should have done.
        action: &'static str,
        /// Its reason.
        source: ffmpeg_next::Error,
    },
    /// This machine's FFmpeg was built without an encoder or filter that is needed.
    #[error("this machine's FFmpeg has no `{name}`; Debian's libavcodec and libavfilter have it")]
    MissingInFfmpeg {
        /// FFmpeg's name of it.
        name: &'static str,
    },
    /// A picture format's encoder refused.
    #[error("cannot encode {}x{} as {format}: {source}", size.0, size.1)]
    Picture {
        /// The format.
        format: PictureFormat,
        /// Width and height in pixels.
        size: (usize, usize),
        /// Its reason.
        source: image::ImageError,
    },
    /// Bytes that should be a PNG file are none, or a damaged one.
    #[error("not a PNG file, or a damaged one: {source}")]
    NotPng {
        /// Why.
        source: png::DecodingError,
    },
    /// The codec takes no frames of this size.
    #[error("{problem}")]
    BadSize {
        /// Which are taken.
        problem: String,
    },
    /// A frame's bytes do not match its size, or a size is zero or beyond what the format can hold.
    #[error("a frame of {width}x{height} pixels with {bytes} bytes of RGB cannot be encoded")]
    BadFrame {
        /// Pixels.
        width: usize,
        /// Pixels.
        height: usize,
        /// Bytes that came with it.
        bytes: usize,
    },
    /// A frame has another size than the clip.
    #[error("a frame of {}x{} cannot join a clip of {}x{}", found.0, found.1, expected.0, expected.1)]
    FrameSize {
        /// Width and height of the clip.
        expected: (usize, usize),
        /// Width and height of the frame.
        found: (usize, usize),
    },
    /// The clip that another goes on from was made by other settings, or by another FFmpeg.
    #[error("the two parts of a clip have different headers")]
    OtherHeader,
    /// The frame rate is zero.
    #[error("a clip needs at least one frame per second")]
    NoFrameRate,
    /// A clip was finished before its first frame.
    #[error("a clip needs at least one frame")]
    Empty,
    /// More frames than a folder's four-digit names can count.
    #[error("a folder of frames holds at most {MAX_FOLDER_FRAMES}")]
    TooManyFrames,
    /// `compression` is not 0 to 100, or asks a lossless format to lose something.
    #[error("compression {compression} is not possible for {format}; {allowed}")]
    Compression {
        /// The format.
        format: PictureFormat,
        /// What was asked for.
        compression: u8,
        /// What would have been right.
        allowed: &'static str,
    },
    /// FFmpeg takes paths as UTF-8 text.
    #[error("{}: the path of a clip must be UTF-8", path.display())]
    PathEncoding {
        /// The path.
        path: PathBuf,
    },
    /// The encoder lost or invented frames: a bug of this module or of FFmpeg, never of the caller.
    #[error("{pushed} frames went into the encoder and {encoded} came out")]
    FrameCount {
        /// Frames in.
        pushed: usize,
        /// Frames out.
        encoded: usize,
    },
}

/// Result of this module.
pub type Result<T, E = MediaError> = std::result::Result<T, E>;

impl MediaError {
    /// Whether the file could not be written for want of a disk that takes it.
    pub fn is_of_storage(&self) -> bool {
        use std::io::ErrorKind::{NotFound, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
        let kind = match self {
            Self::Io { source, .. } => source.kind(),
            // The system's own number of the error.
            Self::Ffmpeg { source: ffmpeg_next::Error::Other { errno }, .. } => {
                std::io::Error::from_raw_os_error(*errno).kind()
            }
            _ => return false,
        };
        matches!(kind, NotFound | PermissionDenied | QuotaExceeded | ReadOnlyFilesystem | StorageFull)
    }

    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        |source| Self::Io { path, source }
    }

    fn ffmpeg(action: &'static str) -> impl FnOnce(ffmpeg_next::Error) -> Self {
        move |source| Self::Ffmpeg { action, source }
    }
}

/// Refuses a frame whose bytes are not `width * height` RGB triples.
fn check_frame(frame: &Frame) -> Result<()> {
    let Frame { width, height, rgb } = frame;
    let pixels = width.checked_mul(*height).filter(|pixels| *pixels > 0);
    if pixels.and_then(|pixels| pixels.checked_mul(3)) == Some(rgb.len()) {
        return Ok(());
    }
    Err(MediaError::BadFrame { width: *width, height: *height, bytes: rgb.len() })
}
