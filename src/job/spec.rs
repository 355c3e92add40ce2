//! What a job asks for, as its row keeps it: enough to make it on any node that serves its model, and to show it on one that does not.
//!
//! Owns: the text of a row's `spec`, its version. Pictures lie beside it ([`super::objects`]). Does not know: who keeps it.

use serde::{Deserialize, Serialize};
use tale_models::diffusion::DiffusionRequest;
use tale_models::diffusion::canvas::Canvas;
use tale_models::diffusion::keyframes::{Fitting, Keyframes};
use tale_models::diffusion::parameters::{FPS, HEIGHT, NUM_FRAMES, PARAMETERS, WIDTH};
use tale_models::parameter::Options;

use super::JobId;
use crate::media::{BadEncoding, ClipFormat, ClipSettings, ClipText, Codec, Encoding, Quality};
use crate::parameters::EffectiveParameters;

/// Version of the text. Newer ones are refused, so that an older node leaves such jobs to others.
const VERSION: u32 = 1;

/// A clip that is ordered.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipSpec {
    /// Everything that decides what the frames look like, but pictures: a body that asks for the same clip.
    pub parameters: EffectiveParameters,
    /// Previews of each part.
    pub partial_images: usize,
    /// Whether predictions may be skipped.
    pub has_cache: bool,
    /// What whoever asked should know.
    pub warnings: Vec<String>,
    /// How the pictures that it was given came to its size.
    pub fittings: Vec<Fitting>,
    /// What becomes of the frames. The comment is written by the encoder, if there is one.
    pub file: ClipSettings,
    /// Whether the file says how it was made.
    pub has_comment: bool,
    /// The clip that it was made from.
    pub origin: Option<Origin>,
    /// The pictures that it was given, in the order of their objects.
    pub inputs: Vec<InputSpec>,
    /// Device time that it was expected to take in seconds, where that was known.
    pub predicted_seconds: Option<f64>,
}

/// The clip that another one was made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It was made anew with other parameters.
    Remix(JobId),
    /// It goes on, and is the beginning of the new one's file.
    Extension {
        /// The clip.
        of: JobId,
        /// Frames that it has.
        num_frames: usize,
    },
}

/// A picture file beside a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputSpec {
    /// The parameter that it belongs to.
    pub field: String,
    /// Its size.
    pub bytes: u64,
}

/// Why a row's text cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadSpec {
    /// A newer version wrote it.
    #[error("the job was ordered from a newer version of tale")]
    Newer,
    /// It makes no sense.
    #[error("the job's row is damaged: {0}")]
    Damaged(String),
}

impl ClipSpec {
    /// Of a validated request; its pictures are `inputs`.
    pub fn new(model: &str, request: &DiffusionRequest, file: ClipSettings, has_comment: bool) -> Self {
        Self {
            parameters: EffectiveParameters::new(model, request),
            partial_images: request.partial_images,
            has_cache: request.cache.is_some(),
            warnings: request.warnings(),
            fittings: request.keyframes.as_ref().map_or(Vec::new(), Keyframes::fittings),
            file,
            has_comment,
            origin: None,
            inputs: Vec::new(),
            predicted_seconds: None,
        }
    }

    /// Size and length; of an extension those of what is new.
    pub fn canvas(&self) -> Canvas {
        canvas_of(self.parameters.options())
    }

    /// Frames of its whole file, before any conversion of their rate. An extension begins with the last frame of the clip
    /// before, which is there once.
    pub fn num_frames(&self) -> usize {
        let own = self.canvas().num_frames;
        match self.origin {
            Some(Origin::Extension { num_frames, .. }) => num_frames + own - 1,
            Some(Origin::Remix(_)) | None => own,
        }
    }

    /// The text of a row.
    pub fn to_text(&self) -> String {
        let text = SpecText {
            version: VERSION,
            parameters: serde_json::to_value(&self.parameters).unwrap_or_default(),
            partial_images: self.partial_images,
            has_cache: self.has_cache,
            warnings: self.warnings.clone(),
            fittings: self.fittings.iter().map(FittingText::from).collect(),
            file: FileText::of(&self.file, self.has_comment),
            origin: self.origin.map(OriginText::from),
            inputs: self.inputs.clone(),
            predicted_seconds: self.predicted_seconds,
        };
        serde_json::to_string(&text).expect("numbers and text are always JSON: this is a bug")
    }

    /// Reads the text of a row.
    pub fn from_text(text: &str) -> Result<Self, BadSpec> {
        let damaged = |problem: String| BadSpec::Damaged(problem);
        let Version { version } = serde_json::from_str(text).map_err(|error| damaged(error.to_string()))?;
        if version > VERSION {
            return Err(BadSpec::Newer);
        }
        let text: SpecText = serde_json::from_str(text).map_err(|error| damaged(error.to_string()))?;
        let parameters = EffectiveParameters::from_json(&text.parameters.to_string()).map_err(damaged)?;
        let canvas = canvas_of(parameters.options());
        let (file, has_comment) = text.file.settings(canvas.fps).map_err(damaged)?;
        let fittings = text.fittings.into_iter().map(FittingText::fitting).collect::<Option<_>>();
        let origin = text.origin.map(OriginText::origin).transpose();
        Ok(Self {
            parameters,
            partial_images: text.partial_images,
            has_cache: text.has_cache,
            warnings: text.warnings,
            fittings: fittings.ok_or_else(|| damaged("a picture of an unknown field".into()))?,
            file,
            has_comment,
            origin: origin.map_err(|error| damaged(error.to_string()))?,
            inputs: text.inputs,
            predicted_seconds: text.predicted_seconds,
        })
    }
}

fn canvas_of(options: &Options) -> Canvas {
    let number = |parameter| options.get(parameter).unwrap_or_default();
    Canvas { width: number(&WIDTH), height: number(&HEIGHT), num_frames: number(&NUM_FRAMES), fps: number(&FPS) }
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Serialize, Deserialize)]
struct SpecText {
    version: u32,
    parameters: serde_json::Value,
    partial_images: usize,
    has_cache: bool,
    warnings: Vec<String>,
    fittings: Vec<FittingText>,
    file: FileText,
    origin: Option<OriginText>,
    inputs: Vec<InputSpec>,
    predicted_seconds: Option<f64>,
}

#[derive(Serialize, Deserialize)]
struct FittingText {
    field: String,
    width: usize,
    height: usize,
    is_stretched: bool,
}

impl From<&Fitting> for FittingText {
    fn from(fitting: &Fitting) -> Self {
        let Fitting { field, size: (width, height), is_stretched } = *fitting;
        Self { field: field.to_owned(), width, height, is_stretched }
    }
}

impl FittingText {
    fn fitting(self) -> Option<Fitting> {
        let field = PARAMETERS.iter().find(|declaration| declaration.name == self.field)?.name;
        Some(Fitting { field, size: (self.width, self.height), is_stretched: self.is_stretched })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum OriginText {
    Remix { of: String },
    Extension { of: String, num_frames: usize },
}

impl From<Origin> for OriginText {
    fn from(origin: Origin) -> Self {
        match origin {
            Origin::Remix(of) => Self::Remix { of: of.to_string() },
            Origin::Extension { of, num_frames } => Self::Extension { of: of.to_string(), num_frames },
        }
    }
}

impl OriginText {
    fn origin(self) -> Result<Origin, super::UnknownJob> {
        Ok(match self {
            Self::Remix { of } => Origin::Remix(of.parse()?),
            Self::Extension { of, num_frames } => Origin::Extension { of: of.parse()?, num_frames },
        })
    }
}

#[derive(Serialize, Deserialize)]
struct FileText {
    format: String,
    codec: Option<String>,
    quality: Option<String>,
    output_fps: Option<usize>,
    frames_before: usize,
    title: Option<String>,
    has_poster: bool,
    has_comment: bool,
}

impl FileText {
    fn of(settings: &ClipSettings, has_comment: bool) -> Self {
        let ClipSettings { encoding, fps: _, output_fps, frames_before, text, has_poster } = settings;
        Self {
            format: encoding.format().as_str().to_owned(),
            codec: encoding.codec().map(|codec| codec.as_str().to_owned()),
            quality: encoding.quality().map(|quality| quality.as_str().to_owned()),
            output_fps: *output_fps,
            frames_before: *frames_before,
            title: text.title.clone(),
            has_poster: *has_poster,
            has_comment,
        }
    }

    /// Of frames at `fps`, and whether the file says how it was made.
    fn settings(self, fps: usize) -> Result<(ClipSettings, bool), String> {
        let unknown = |what: &str| format!("`{what}` is not known");
        let format = ClipFormat::from_extension(&self.format).ok_or_else(|| unknown(&self.format))?;
        let codec = self.codec.map(|name| Codec::named(&name).ok_or_else(|| unknown(&name))).transpose()?;
        let quality = self.quality.map(|name| Quality::named(&name).ok_or_else(|| unknown(&name))).transpose()?;
        let encoding = Encoding::of_file(format, codec, quality)
            .map_err(|BadEncoding { field, problem }| format!("{field} {problem}"))?;
        let text = ClipText { title: self.title, comment: None };
        let (output_fps, frames_before, has_poster) = (self.output_fps, self.frames_before, self.has_poster);
        Ok((ClipSettings { encoding, fps, output_fps, frames_before, text, has_poster }, self.has_comment))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::JobKind;
    use crate::job::tests::spec;

    #[test]
    fn a_row_says_the_same_when_it_is_read() {
        let mut spec = spec();
        spec.origin = Some(Origin::Extension { of: JobId::generate(JobKind::Video), num_frames: 9 });
        spec.fittings = vec![Fitting { field: "input_reference", size: (640, 480), is_stretched: true }];
        spec.inputs = vec![InputSpec { field: "input_reference".into(), bytes: 70 }];
        spec.predicted_seconds = Some(1.5);
        for encoding in [(ClipFormat::Gif, None), (ClipFormat::Webm, Some(Codec::Av1)), (ClipFormat::Mp4, None)] {
            spec.file.encoding = Encoding::choose(Some(encoding.0), encoding.1, None).expect("known");
            let read = ClipSpec::from_text(&spec.to_text()).expect("our own");
            assert_eq!(read, spec);
            assert_eq!(read.num_frames(), 9 + 9 - 1);
        }
    }

    #[test]
    fn what_cannot_be_read_is_told_apart_from_what_is_too_new() {
        let newer = spec().to_text().replacen("\"version\":1", "\"version\":2", 1);
        assert_eq!(ClipSpec::from_text(&newer), Err(BadSpec::Newer));
        for damaged in ["", "{}", "{\"version\":1}", &spec().to_text().replace("\"mp4\"", "\"avi\"")] {
            assert!(matches!(ClipSpec::from_text(damaged), Err(BadSpec::Damaged(_))), "{damaged}");
        }
    }
}
