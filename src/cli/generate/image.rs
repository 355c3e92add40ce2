//! `tale generate image`.

use std::path::{Path, PathBuf};

use clap::Args;
use tale_models::ModelSource;
use tale_models::card::{DiffusionOptions, Medium};
use tale_models::lora::LoraOption;
use tale_models::request::{DiffusionRequest, Frame};

use super::diffusion::{DiffusionArgs, SUBJECT, card_for, follow, subject};
use super::{CliError, Generator, ModelArgs, random_seed};
use crate::engine::EngineOptions;
use crate::media::{PictureFormat, encode_picture, read_png_text};
use crate::parameters::{self, PictureParameters};

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

    /// Folder of LoRA files for --lora
    #[arg(long, value_name = "DIR")]
    loras: Option<PathBuf>,

    /// A LoRA of that folder and how much of it, such as sketch:0.8; may be given several times [default weight: 1]
    #[arg(long, value_name = "NAME[:WEIGHT]", value_parser = parse_lora)]
    lora: Vec<LoraOption>,

    // Last: its heading goes on to whatever follows.
    #[command(flatten)]
    diffusion: DiffusionArgs,
}

pub fn run(args: ImageArgs) -> Result<(), CliError> {
    let format = format_of(&args.output)?;
    if format == PictureFormat::Png && args.output_compression.is_some_and(|quality| quality < 100) {
        return Err(CliError::Argument("--output-compression: png is lossless; leave it out".into()));
    }
    check_folder(&args.output)?;
    let mut base = match &args.parameters_from {
        Some(path) => read_parameters(path)?.into_options(),
        None => DiffusionOptions::default(),
    };
    if !args.lora.is_empty() {
        base.loras = args.lora;
    }
    let mut options = EngineOptions::default();
    // There is no second request to keep anything for.
    options.load.lora_cache_bytes = 0;
    let source = ModelSource { loras: args.loras, ..args.model.source() };
    let mut generator = Generator::load_from(source, &args.model, options)?;
    let card = generator.card.clone();
    let request = card_for(Medium::Picture, &card)?.resolve(args.diffusion.options_over(base), random_seed())?;
    let parameters = PictureParameters::new(&folder_name(&args.model.model), &request);
    generator.note(|| {
        let DiffusionRequest { width, height, num_inference_steps, guidance_scale, scheduler, seed, .. } = &request;
        let name = scheduler.name;
        format!("{width}x{height}, {num_inference_steps} steps of {name}, guidance {guidance_scale}, seed {seed}")
    });

    let mut picture: Option<Frame> = None;
    follow(&mut generator, request, |frames| {
        picture = frames.into_iter().next_back();
        Ok(())
    })?;
    let picture = picture.ok_or(CliError::EngineGone)?;
    let text = (!args.no_metadata).then(|| (parameters::KEYWORD, parameters.to_json()));
    write(&args.output, &encode_picture(&picture, format, args.output_compression, text)?)
}

/// `NAME`, or `NAME:WEIGHT`.
fn parse_lora(argument: &str) -> Result<LoraOption, String> {
    let (name, weight) = argument.rsplit_once(':').unwrap_or((argument, "1"));
    let weight =
        weight.parse().map_err(|_| format!("`{weight}` is not a weight; expected NAME:WEIGHT, such as sketch:0.8"))?;
    if name.is_empty() {
        return Err("the name is empty; expected NAME:WEIGHT, such as sketch:0.8".to_owned());
    }
    Ok(LoraOption { name: name.to_owned(), weight })
}

/// What the parameters of a picture call a model that nobody has named.
fn folder_name(model: &Path) -> String {
    let path = std::path::absolute(model).unwrap_or_else(|_| model.to_path_buf());
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The parameters that tale wrote into a picture.
pub fn read_parameters(path: &Path) -> Result<PictureParameters, CliError> {
    let refuse = |problem: String| CliError::Argument(format!("{}: {problem}", path.display()));
    let bytes = std::fs::read(path).map_err(|source| CliError::File { path: path.into(), source })?;
    let text = read_png_text(&bytes, parameters::KEYWORD).map_err(|error| refuse(error.to_string()))?;
    let text = text.ok_or_else(|| refuse("says nothing of how it was made".to_owned()))?;
    serde_json::from_str(&text).map_err(|error| refuse(format!("its parameters are not those of tale: {error}")))
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
