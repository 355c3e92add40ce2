//! `tale generate video`.

use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::PossibleValuesParser;
use tale_models::diffusion::{Canvas, DiffusionRequest, Medium, Sampling};
use tale_models::parameter::Options;
use tale_models::request::Frame;

use super::diffusion::{card_for, make};
use super::image::{folder_name, read_parameters};
use super::{CliError, Generator, ModelArgs, random_seed};
use crate::cli::parameters::{ParameterArgs, SUBJECT, Videos, subject};
use crate::engine::EngineOptions;
use crate::media::{
    self, BadEncoding, ClipEncoder, ClipFormat, ClipSettings, ClipText, Codec, Encoding, FrameFolder, Quality,
};
use crate::parameters::EffectiveParameters;

#[derive(Debug, Args)]
#[command(group = subject())]
pub struct VideoArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// File to write: .mp4, .webm or .gif; or a folder for lossless frame_0000.png, frame_0001.png, ...
    #[arg(long, value_name = "FILE|DIR/")]
    output: PathBuf,

    #[command(flatten)]
    file: FileArgs,

    /// Make the clip of this .mp4 or .webm again: what tale wrote into it counts where no option says otherwise
    #[arg(long, value_name = "FILE", group = SUBJECT)]
    parameters_from: Option<PathBuf>,

    // Last: its heading goes on to whatever follows.
    #[command(flatten)]
    parameters: ParameterArgs<Videos>,
}

/// What becomes of the frames.
#[derive(Debug, Args)]
struct FileArgs {
    /// How the file is compressed: in .mp4 h264, h265 or av1, in .webm vp9 or av1 [default: the first]
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(Codec::NAMES))]
    codec: Option<String>,

    /// How little the file may lose of the frames [default: high]
    #[arg(long, value_name = "HOW", value_parser = PossibleValuesParser::new(Quality::NAMES))]
    quality: Option<String>,

    /// Frames per second of the file where they are not --fps: frames are shown again or left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=120))]
    output_fps: Option<u8>,

    /// Title that players show
    #[arg(long, value_name = "TEXT")]
    title: Option<String>,

    /// Put the first frame, small, into an .mp4 as the picture that players show of it
    #[arg(long)]
    poster: bool,

    /// Leave out of the file how it was made, the prompt included
    #[arg(long)]
    no_metadata: bool,
}

pub fn run(args: VideoArgs) -> Result<(), CliError> {
    let target = Target::of(&args.output, &args.file)?;
    let base = match &args.parameters_from {
        Some(path) => read_parameters(path)?.into_options(),
        None => Options::default(),
    };
    let options = args.parameters.options_over(base)?;
    let mut generator = Generator::load(&args.model, EngineOptions::default())?;
    let card = generator.card.clone();
    let request = card_for(Medium::Video, &card)?.resolve(&options, random_seed())?;
    for warning in request.warnings() {
        eprintln!("warning: {warning}");
    }
    generator.note(|| {
        let Canvas { width, height, num_frames, fps } = request.canvas;
        let Sampling { num_inference_steps, scheduler, seed, .. } = request.sampling;
        let scheduler = scheduler.name;
        let guidance_scale = request.guidance.guidance_scale;
        format!(
            "{width}x{height}, {num_frames} frames at {fps}/s, {num_inference_steps} steps of {scheduler}, guidance \
             {guidance_scale}, seed {seed}"
        )
    });

    let parameters = EffectiveParameters::new(&folder_name(&args.model.model), &request);
    let mut output = Output::create(&args.output, target, &args.file, &request, &parameters)?;
    make(&mut generator, request, |frames| frames.iter().try_for_each(|frame| Ok(output.push(frame)?)))?;
    Ok(output.finish()?)
}

/// What the path after `--output` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    File(Encoding),
    Folder,
}

impl Target {
    fn of(path: &Path, file: &FileArgs) -> Result<Self, CliError> {
        let names_folder = path.as_os_str().as_encoded_bytes().ends_with(b"/") || path.is_dir();
        let Some(extension) = path.extension().filter(|_| !names_folder) else {
            return match file.said() {
                None => Ok(Self::Folder),
                Some(flag) => Err(CliError::Argument(format!("--{flag}: a folder holds the frames as they are"))),
            };
        };
        let format = extension.to_str().and_then(ClipFormat::from_extension).ok_or_else(|| {
            let path = path.display();
            CliError::Argument(format!(
                "--output: {path} should end in .mp4, .webm or .gif, or in / for a folder of frames"
            ))
        })?;
        file.encoding(format).map(Self::File)
    }
}

impl FileArgs {
    fn encoding(&self, format: ClipFormat) -> Result<Encoding, CliError> {
        let codec = self.codec.as_deref().and_then(Codec::named);
        let quality = self.quality.as_deref().and_then(Quality::named);
        Encoding::choose(Some(format), codec, quality).map_err(refused)
    }

    /// The first flag that says how a file is made.
    fn said(&self) -> Option<&'static str> {
        let said = [
            ("codec", self.codec.is_some()),
            ("quality", self.quality.is_some()),
            ("output-fps", self.output_fps.is_some()),
            ("title", self.title.is_some()),
            ("poster", self.poster),
        ];
        said.into_iter().find_map(|(flag, is_said)| is_said.then_some(flag))
    }

    fn settings(
        &self,
        encoding: Encoding,
        canvas: &Canvas,
        parameters: &EffectiveParameters,
    ) -> Result<ClipSettings, CliError> {
        let has_comment = encoding.holds_text() && !self.no_metadata;
        let text = ClipText { title: self.title.clone(), comment: has_comment.then(|| parameters.to_json()) };
        let output_fps = self.output_fps.map(usize::from);
        let settings =
            ClipSettings { encoding, fps: canvas.fps, output_fps, frames_before: 0, text, has_poster: self.poster };
        settings.check((canvas.width, canvas.height), canvas.num_frames).map_err(refused)?;
        Ok(settings)
    }
}

fn refused(BadEncoding { field, problem }: BadEncoding) -> CliError {
    CliError::Argument(format!("--{}: {problem}", field.replace('_', "-")))
}

/// Dropped before `finish`, it leaves nothing behind.
enum Output {
    File(Box<ClipEncoder>),
    Folder(FrameFolder),
}

impl Output {
    fn create(
        path: &Path,
        target: Target,
        file: &FileArgs,
        request: &DiffusionRequest,
        parameters: &EffectiveParameters,
    ) -> Result<Self, CliError> {
        let Canvas { width, height, .. } = request.canvas;
        match target {
            Target::File(encoding) => {
                let settings = file.settings(encoding, &request.canvas, parameters)?;
                Ok(Self::File(Box::new(ClipEncoder::create(path, &settings, width, height)?)))
            }
            Target::Folder => Ok(Self::Folder(FrameFolder::create(path)?)),
        }
    }

    fn push(&mut self, frame: &Frame) -> media::Result<()> {
        match self {
            Self::File(clip) => clip.push(frame),
            Self::Folder(folder) => folder.push(frame),
        }
    }

    fn finish(self) -> media::Result<()> {
        match self {
            Self::File(clip) => clip.finish(),
            Self::Folder(folder) => folder.finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_path_says_what_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let existing = dir.path().join("existing.mp4");
        std::fs::create_dir(&existing).unwrap();
        for (path, expected) in [
            ("a.mp4", Target::File(Encoding::usual(ClipFormat::Mp4))),
            ("b/c.WEBM", Target::File(Encoding::usual(ClipFormat::Webm))),
            ("d.gif", Target::File(Encoding::usual(ClipFormat::Gif))),
            ("frames/", Target::Folder),
            ("frames.mp4/", Target::Folder),
            ("frames", Target::Folder),
            (existing.to_str().unwrap(), Target::Folder),
        ] {
            assert_eq!(Target::of(Path::new(path), &plain()).unwrap(), expected, "{path}");
        }
        assert!(Target::of(Path::new("a.mov"), &plain()).is_err());
    }

    #[test]
    fn what_the_output_cannot_have_is_refused_by_its_flag() {
        let refusal = |path: &str, file| Target::of(Path::new(path), &file).unwrap_err().to_string();
        let codec = |name: &str| FileArgs { codec: Some(name.into()), ..plain() };
        assert!(refusal("a.webm", codec("h264")).starts_with("--codec: webm does not hold h264"));
        assert!(refusal("frames/", codec("h264")).starts_with("--codec: a folder"));
        let canvas = Canvas { width: 64, height: 64, num_frames: 9, fps: 16 };
        let refused = |path: &str, file: FileArgs| {
            let Ok(Target::File(encoding)) = Target::of(Path::new(path), &file) else { panic!("{path} is a file") };
            let parameters = EffectiveParameters::new("clips", &crate::job::tests::request());
            file.settings(encoding, &canvas, &parameters).unwrap_err().to_string()
        };
        let titled = || FileArgs { title: Some("x".into()), ..plain() };
        assert!(refused("a.gif", titled()).starts_with("--title: a gif"));
        assert!(refused("a.webm", FileArgs { poster: true, ..plain() }).starts_with("--poster: only an mp4"));
        assert!(refused("a.gif", FileArgs { output_fps: Some(100), ..plain() }).starts_with("--output-fps: is 100"));
        assert!(refused("a.mp4", FileArgs { title: Some("\0".into()), ..plain() }).starts_with("--title: has"));
        assert!(refusal("frames/", FileArgs { output_fps: Some(8), ..plain() }).starts_with("--output-fps: a folder"));
        assert!(Target::of(Path::new("a.mp4"), &titled()).is_ok());
    }

    fn plain() -> FileArgs {
        FileArgs { codec: None, quality: None, output_fps: None, title: None, poster: false, no_metadata: false }
    }
}
