//! `tale generate video`.

use std::path::{Path, PathBuf};

use clap::Args;
use tale_models::Request;
use tale_models::diffusion::{Canvas, DiffusionRequest, Medium, Sampling};
use tale_models::parameter::Options;
use tale_models::request::Frame;

use super::diffusion::{card_for, follow};
use super::{CliError, Generator, ModelArgs, random_seed};
use crate::cli::parameters::{ParameterArgs, Videos, subject};
use crate::engine::EngineOptions;
use crate::media::{self, ClipEncoder, ClipFormat, FrameFolder};

#[derive(Debug, Args)]
#[command(group = subject())]
pub struct VideoArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// File to write: .mp4, .webm or .gif; or a folder for lossless frame_0000.png, frame_0001.png, ...
    #[arg(long, value_name = "FILE|DIR/")]
    output: PathBuf,

    // Last: its heading goes on to whatever follows.
    #[command(flatten)]
    parameters: ParameterArgs<Videos>,
}

pub fn run(args: VideoArgs) -> Result<(), CliError> {
    let target = Target::of(&args.output)?;
    let options = args.parameters.options_over(Options::default())?;
    let mut generator = Generator::load(&args.model, EngineOptions::default())?;
    let card = generator.card.clone();
    let request = card_for(Medium::Video, &card)?.resolve(&options, random_seed())?;
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

    let mut output = Output::create(&args.output, target, &request)?;
    let session = generator.submit(Request::Diffusion(request))?;
    follow(&mut generator, session, |frames| frames.iter().try_for_each(|frame| Ok(output.push(frame)?)))?;
    Ok(output.finish()?)
}

/// What the path after `--output` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    File(ClipFormat),
    Folder,
}

impl Target {
    fn of(path: &Path) -> Result<Self, CliError> {
        let names_folder = path.as_os_str().as_encoded_bytes().ends_with(b"/") || path.is_dir();
        let Some(extension) = path.extension().filter(|_| !names_folder) else { return Ok(Self::Folder) };
        let format = extension.to_str().and_then(ClipFormat::from_extension);
        format.map(Self::File).ok_or_else(|| {
            let path = path.display();
            CliError::Argument(format!(
                "--output: {path} should end in .mp4, .webm or .gif, or in / for a folder of frames"
            ))
        })
    }
}

/// Dropped before `finish`, it leaves nothing behind.
enum Output {
    File(Box<ClipEncoder>),
    Folder(FrameFolder),
}

impl Output {
    fn create(path: &Path, target: Target, request: &DiffusionRequest) -> media::Result<Self> {
        match target {
            Target::File(format) => {
                ClipEncoder::create(path, format, request.canvas.width, request.canvas.height, request.canvas.fps)
                    .map(|clip| Self::File(Box::new(clip)))
            }
            Target::Folder => FrameFolder::create(path).map(Self::Folder),
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
            ("a.mp4", Target::File(ClipFormat::Mp4)),
            ("b/c.WEBM", Target::File(ClipFormat::Webm)),
            ("d.gif", Target::File(ClipFormat::Gif)),
            ("frames/", Target::Folder),
            ("frames.mp4/", Target::Folder),
            ("frames", Target::Folder),
            (existing.to_str().unwrap(), Target::Folder),
        ] {
            assert_eq!(Target::of(Path::new(path)).unwrap(), expected, "{path}");
        }
        assert!(Target::of(Path::new("a.mov")).is_err());
    }
}
