//! The fields of videos that are no parameters of the model: how long, and as what file.
//!
//! Owns: their declarations, and what they make of a request. Does not know: what an encoding can do, which `media` says.

use tale_models::ModelCard;
use tale_models::diffusion::canvas::{CanvasSupport, FrameSupport, MAX_FPS};
use tale_models::diffusion::parameters::{FPS, NUM_FRAMES};
use tale_models::diffusion::{Canvas, DiffusionCard};
use tale_models::parameter::{Declaration, Options, Parameter};

use crate::http::cold_start::ALLOW_COLD_START;
use crate::http::diffusion::{MODEL, SIZE};
use crate::http::error::ApiError;
use crate::job::Job;
use crate::media::{BadEncoding, ClipFormat, ClipSettings, ClipText, Codec, Encoding, Quality};

/// Longest title.
const MAX_TITLE_BYTES: usize = 1024;

pub(super) static SECONDS: Parameter<f64> = Parameter::seconds(
    "seconds",
    "Length instead of `num_frames`: the first frame and as many groups of frames as fit in the time.",
);

static OUTPUT_FORMAT: Parameter<String> = Parameter::choice(
    "output_format",
    &["mp4", "webm", "gif"],
    "Format of the file; when absent the one that `codec` is at home in, or mp4.",
);

static CODEC: Parameter<String> = Parameter::choice(
    "codec",
    Codec::NAMES,
    "How the file is compressed: in mp4 h264 (when absent), h265 or av1, in webm vp9 (when absent) or av1.",
);

static QUALITY: Parameter<String> =
    Parameter::choice("quality", Quality::NAMES, "How little the file may lose of the frames; high when absent.");

static OUTPUT_FPS: Parameter<usize> = Parameter::integer(
    "output_fps",
    1,
    MAX_FPS,
    "Frames per second of the file where they are not `fps`: the video lasts as long, its frames are shown again or left out.",
);

static METADATA: Parameter<bool> = Parameter::boolean(
    "metadata",
    "Whether the comment in an mp4 or webm says how it was made; true when absent, and impossible for gif.",
);

static TITLE: Parameter<String> =
    Parameter::text("title", MAX_TITLE_BYTES, "Title that players show of an mp4 or webm; none when absent.");

static POSTER: Parameter<bool> = Parameter::boolean(
    "poster",
    "Whether an mp4 has its first frame, at most 512 pixels on a side, as the picture that players show of it; false when \
     absent, and impossible for others.",
);

/// All of them.
pub(in crate::http) static OWN: &[&Declaration] = &[
    super::terms::FIELDS[0],
    super::terms::FIELDS[1],
    super::terms::FIELDS[2],
    &MODEL.declaration,
    &SIZE.declaration,
    &SECONDS.declaration,
    &OUTPUT_FORMAT.declaration,
    &CODEC.declaration,
    &QUALITY.declaration,
    &OUTPUT_FPS.declaration,
    &METADATA.declaration,
    &TITLE.declaration,
    &POSTER.declaration,
    &ALLOW_COLD_START.declaration,
];

/// What they say of the file.
#[derive(Debug)]
pub(super) struct FileFields {
    encoding: Encoding,
    output_fps: Option<usize>,
    pub(super) has_comment: bool,
    title: Option<String>,
    has_poster: bool,
}

impl FileFields {
    pub(super) fn new(options: &Options) -> Result<Self, ApiError> {
        let format = options.get(&OUTPUT_FORMAT).and_then(|name| ClipFormat::from_extension(&name));
        let codec = options.get(&CODEC).and_then(|name| Codec::named(&name));
        let quality = options.get(&QUALITY).and_then(|name| Quality::named(&name));
        let encoding = Encoding::choose(format, codec, quality).map_err(refused)?;
        let metadata = options.get(&METADATA);
        // Asked for and impossible is an error; absent, it is what the format can do.
        if metadata == Some(true) && !encoding.holds_text() {
            return Err(ApiError::field("metadata", "a gif holds no parameters; leave it out"));
        }
        let has_comment = metadata.unwrap_or(encoding.holds_text());
        let (output_fps, title) = (options.get(&OUTPUT_FPS), options.get(&TITLE));
        let has_poster = options.get(&POSTER).unwrap_or(false);
        Ok(Self { encoding, output_fps, has_comment, title, has_poster })
    }

    /// A video of this canvas as a file, or as the end of one that has `frames_before` already.
    pub(super) fn settings(self, canvas: &Canvas, frames_before: Option<usize>) -> Result<ClipSettings, ApiError> {
        let (encoding, fps, output_fps) = (self.encoding, canvas.fps, self.output_fps);
        let text = ClipText { title: self.title, comment: None };
        let (has_poster, num_before) = (self.has_poster, frames_before.unwrap_or(0));
        let settings = ClipSettings { encoding, fps, output_fps, frames_before: num_before, text, has_poster };
        // What goes on begins with a frame that is there already.
        let new_frames = canvas.num_frames - usize::from(frames_before.is_some());
        if new_frames == 0 {
            return Err(ApiError::field("num_frames", "is 1, the frame that the video before ends with; ask for more"));
        }
        settings.check((canvas.width, canvas.height), new_frames).map_err(refused)?;
        Ok(settings)
    }
}

/// Whether a field decides what the frames of a file are coded as.
pub(super) fn is_of_encoding(declaration: &Declaration) -> bool {
    let of = [&OUTPUT_FORMAT.declaration, &CODEC.declaration, &QUALITY.declaration, &OUTPUT_FPS.declaration];
    of.iter().any(|of| of.name == declaration.name)
}

/// `options`, and where they say nothing of the file what that of `source` is. What belongs to a format or a codec goes with it.
pub(super) fn file_options_over(options: Options, source: &Job) -> Options {
    let settings = &source.spec.file;
    let mut base = Options::default()
        .with(&OUTPUT_FPS, settings.output_fps)
        .with(&METADATA, source.spec.has_comment)
        .with(&TITLE, settings.text.title.clone())
        .with(&POSTER, settings.has_poster)
        .with(&QUALITY, settings.encoding.quality().map(|quality| quality.as_str().to_owned()))
        .with(&CODEC, settings.encoding.codec().map(|codec| codec.as_str().to_owned()))
        .with(&OUTPUT_FORMAT, settings.encoding.format().as_str().to_owned());
    if options.has(&OUTPUT_FORMAT) || options.has(&CODEC) {
        base = Options::default().with(&OUTPUT_FPS, settings.output_fps);
    }
    options.or(base)
}

fn refused(BadEncoding { field, problem }: BadEncoding) -> ApiError {
    ApiError::field(field, problem)
}

/// `num_frames`, or the frames of `seconds`.
pub(super) fn frames(options: &Options, card: &ModelCard) -> Result<Option<usize>, ApiError> {
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
pub(super) fn duration(num_frames: usize, fps: usize) -> f64 {
    num_frames as f64 / fps.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAMES: FrameSupport = FrameSupport {
        default_num_frames: 81,
        default_fps: 16,
        multiple: 4,
        max_frames: 401,
        trained_frames: 401,
        has_one_length: false,
    };

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
