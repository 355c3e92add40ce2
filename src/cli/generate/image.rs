//! `tale generate image`.

use std::path::{Path, PathBuf};

use clap::Args;
use tale_models::Request;
use tale_models::diffusion::{Canvas, Medium, Sampling};
use tale_models::parameter::Options;
use tale_models::request::Frame;

use super::diffusion::{card_for, follow};
use super::{CliError, Generator, ModelArgs, random_seed};
use crate::cli::parameters::{Images, ParameterArgs, SUBJECT, subject};
use crate::engine::{EngineOptions, Session};
use crate::media::{ClipFormat, PictureFormat, encode_picture, read_clip_comment, read_png_text};
use crate::parameters::{self, EffectiveParameters};

#[derive(Debug, Args)]
#[command(group = subject())]
pub struct ImageArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Quality of jpeg and webp, 0 to 100 [default: 95 for jpeg, lossless webp]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=100))]
    output_compression: Option<u8>,

    /// File to write: .png, .jpg or .webp
    #[arg(long, value_name = "FILE")]
    output: PathBuf,

    /// Leave out of a .png how it was made, the prompt included
    #[arg(long)]
    no_metadata: bool,

    /// Make the picture of this .png again: what tale wrote into it counts where no option says otherwise
    #[arg(long, value_name = "FILE", group = SUBJECT)]
    parameters_from: Option<PathBuf>,

    /// Pictures to make, with seeds that count up from --seed; more than one are called FILE-0, FILE-1, ...
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=MAX_PICTURES))]
    n: u8,

    // Last: its heading goes on to whatever follows.
    #[command(flatten)]
    parameters: ParameterArgs<Images>,
}

/// Most pictures of one command.
const MAX_PICTURES: i64 = 64;

pub fn run(args: ImageArgs) -> Result<(), CliError> {
    let format = format_of(&args.output)?;
    if format == PictureFormat::Png && args.output_compression.is_some_and(|quality| quality < 100) {
        return Err(CliError::Argument("--output-compression: png is lossless; leave it out".into()));
    }
    check_folder(&args.output)?;
    let base = match &args.parameters_from {
        Some(path) => read_parameters(path)?.into_options(),
        None => Options::default(),
    };
    let options = args.parameters.options_over(base)?;
    let mut generator = Generator::load(&args.model, EngineOptions::default())?;
    let card = generator.card.clone();
    let request = card_for(Medium::Image, &card)?.resolve(&options, random_seed())?;
    let parameters = EffectiveParameters::new(&folder_name(&args.model.model), &request);
    generator.note(|| {
        let Canvas { width, height, .. } = request.canvas;
        let Sampling { num_inference_steps, scheduler, seed, .. } = request.sampling;
        let guidance_scale = request.guidance.guidance_scale;
        let name = scheduler.name;
        format!("{width}x{height}, {num_inference_steps} steps of {name}, guidance {guidance_scale}, seed {seed}")
    });

    // All at once, so that they share steps.
    let seeds: Vec<u64> = (0..u64::from(args.n)).map(|i| request.sampling.seed.wrapping_add(i)).collect();
    let with_seed = |seed| Request::Diffusion(request.with_seed(seed));
    let sessions: Vec<Session> =
        seeds.iter().map(|seed| generator.submit(with_seed(*seed))).collect::<Result<_, _>>()?;
    for (i, (session, seed)) in sessions.into_iter().zip(seeds).enumerate() {
        let mut picture: Option<Frame> = None;
        follow(&mut generator, session, |frames| {
            picture = frames.into_iter().next_back();
            Ok(())
        })?;
        let picture = picture.ok_or(CliError::EngineGone)?;
        let text = (!args.no_metadata).then(|| (parameters::KEYWORD, parameters.with_seed(seed).to_json()));
        let bytes = encode_picture(&picture, format, args.output_compression, text)?;
        write(&numbered(&args.output, i, args.n), &bytes)?;
    }
    Ok(())
}

/// The file of picture `i` of `n`.
fn numbered(path: &Path, i: usize, n: u8) -> PathBuf {
    if n == 1 {
        return path.to_owned();
    }
    let part = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
    path.with_file_name(format!("{}-{i}.{}", part(path.file_stem()), part(path.extension())))
}

/// What the parameters of a picture call a model that nobody has named.
pub(super) fn folder_name(model: &Path) -> String {
    let path = std::path::absolute(model).unwrap_or_else(|_| model.to_path_buf());
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The parameters that tale wrote into a picture or a clip.
pub fn read_parameters(path: &Path) -> Result<EffectiveParameters, CliError> {
    let refuse = |problem: String| CliError::Argument(format!("{}: {problem}", path.display()));
    let is_clip = path.extension().and_then(|extension| ClipFormat::from_extension(extension.to_str()?)).is_some();
    let text = match is_clip {
        true => read_clip_comment(path).map_err(|error| refuse(error.to_string()))?,
        false => {
            let bytes = std::fs::read(path).map_err(|source| CliError::File { path: path.into(), source })?;
            read_png_text(&bytes, parameters::KEYWORD).map_err(|error| refuse(error.to_string()))?
        }
    };
    let text = text.ok_or_else(|| refuse("says nothing of how it was made".to_owned()))?;
    EffectiveParameters::from_json(&text)
        .map_err(|problem| refuse(format!("its parameters are not those of tale: {problem}")))
}

fn format_of(path: &Path) -> Result<PictureFormat, CliError> {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    PictureFormat::from_extension(extension).ok_or_else(|| {
        CliError::Argument(format!("--output: {} should end in .png, .jpg, .jpeg or .webp", path.display()))
    })
}

/// Found out before the work, not after it.
fn check_folder(path: &Path) -> Result<(), CliError> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    if folder.is_dir() {
        return Ok(());
    }
    Err(CliError::Argument(format!("--output: there is no folder {}", folder.display())))
}

/// Whole or not at all.
fn write(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written = std::fs::write(&partial, bytes).and_then(|()| std::fs::rename(&partial, path));
    written.map_err(|source| {
        // It may not even exist; the reason for that is being told.
        let _ = std::fs::remove_file(&partial);
        CliError::File { path: path.into(), source }
    })
}
