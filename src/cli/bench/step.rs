//! `tale bench step`.

use std::fmt::{self, Display};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use tale_models::bench::step::{Bound, LoadedBench, MeasuredStep, StepBench, StepOptions};
use tale_models::checkpoint::LoadFormat;
use tale_models::device::{Placement, on_threads_of};
use tale_models::diffusion::acceleration::CacheMethod;
use tale_models::presets::{Configurations, PRESETS, Preset};

use super::{DeviceArgs, flops_unit, print_line, roofs_in_words};
use crate::cli::{CliError, progress};
use crate::config::ByteSize;
use crate::engine;

#[derive(Debug, Args)]
pub struct StepArgs {
    #[command(flatten)]
    model: Model,

    /// Where weights of --model come from: auto (its files), or dummy (random values in the shapes of its
    /// configurations) [default: auto]; those of a preset are always random
    #[arg(long, value_name = "FORMAT")]
    load_format: Option<LoadFormat>,

    #[command(flatten)]
    place: DeviceArgs,

    /// Keep at most N layers of each kind in each network; random weights only
    #[arg(long, value_name = "N")]
    layers: Option<NonZeroUsize>,

    /// Tokens of a prompt; for pictures and clips those that the T5-class encoder sees [default: 512, or the model's own]
    #[arg(long, value_name = "N")]
    prompt_tokens: Option<usize>,

    /// Sequences that decode together, or pictures and clips that are denoised together [default: 1,8,64 for text, else 1]
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    batch: Vec<usize>,

    /// Pixels [default: the model's own]
    #[arg(long, value_name = "N")]
    width: Option<usize>,

    /// Pixels [default: the model's own]
    #[arg(long, value_name = "N")]
    height: Option<usize>,

    /// Frames of a clip [default: the model's own]
    #[arg(long, visible_alias = "frames", value_name = "N")]
    num_frames: Option<usize>,

    /// Every second denoising step skips blocks by this method: what such a step takes, whatever it does to the result
    #[arg(long, value_name = "METHOD", value_parser = parse_cache)]
    cache: Option<CacheMethod>,

    /// Most rounds whose median counts; none begins after ten seconds
    #[arg(long, value_name = "N", default_value = "3")]
    repeat: NonZeroUsize,

    /// Print one JSON object per line instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Model {
    /// A published configuration by name, with random weights
    #[arg(long, value_name = "NAME", value_parser = parse_preset, long_help = preset_help())]
    preset: Option<&'static Preset>,

    /// A checkpoint: a folder or a single file
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
}

/// Only the names that are known, without the field, which the caller names.
pub fn parse_preset(name: &str) -> Result<&'static Preset, String> {
    name.parse().map_err(|error| match error {
        tale_models::Error::InvalidRequest { problem, .. } => problem,
        other => other.to_string(),
    })
}

fn parse_cache(name: &str) -> Result<CacheMethod, String> {
    CacheMethod::named(name).ok_or_else(|| format!("is none of {}", CacheMethod::NAMES.join(", ")))
}

fn preset_help() -> String {
    let names: Vec<_> = PRESETS.iter().map(|preset| preset.name).collect();
    format!("A published configuration by name, with random weights: {}", names.join(", "))
}

pub fn run(args: &StepArgs) -> Result<(), CliError> {
    on_threads_of(args.place.device, || measure(args))?
}

fn measure(args: &StepArgs) -> Result<(), CliError> {
    let format = load_format(args)?;
    // Also what is read only: the folder must live until the model is loaded.
    let folder = configurations(args, format)?;
    let path = folder.as_ref().map_or_else(|| args.model.model.clone().unwrap_or_default(), |f| f.path().to_owned());
    let DeviceArgs { device, dtype, .. } = args.place;
    let plan = StepBench::plan(&path, device, dtype, &args.options(format))?;
    let placement = Placement::open(device, dtype)?;
    let free_bytes = engine::capacity_bytes(&args.place.engine_options(), args.place.device, placement.memory()?)?;
    let bar = progress::loading();
    bar.set_message(args.model_name());
    let loaded = plan.load(&placement, free_bytes);
    bar.finish_and_clear();
    let mut loaded = loaded?;
    drop(folder);

    let context = Context::new(args, &loaded, free_bytes);
    let mut printed = context.print_begin(args.json);
    loaded.run(&mut |step| {
        if printed.is_ok() {
            printed = context.print(&step, args.json);
        }
    })?;
    printed
}

/// Presets have no files, and files have the layers that they have.
fn load_format(args: &StepArgs) -> Result<LoadFormat, CliError> {
    let format = match (args.model.preset, args.load_format) {
        (Some(_), Some(LoadFormat::Auto)) => {
            return Err(CliError::Argument("--load-format: a preset has no files; leave it out".into()));
        }
        (Some(_), _) => LoadFormat::Dummy,
        (None, format) => format.unwrap_or_default(),
    };
    if args.layers.is_some() && format != LoadFormat::Dummy {
        return Err(CliError::Argument("--layers: weight files have their layers; add --load-format dummy".into()));
    }
    Ok(format)
}

/// A folder of our own where the configurations do not lie in the one of --model as they are to be.
fn configurations(args: &StepArgs, format: LoadFormat) -> Result<Option<Configurations>, CliError> {
    let folder = match (args.model.preset, &args.model.model, format) {
        (Some(preset), ..) => Configurations::of_preset(preset)?,
        (None, Some(path), LoadFormat::Dummy) => Configurations::of_folder(path)?,
        (None, ..) => return Ok(None),
    };
    if let Some(layers) = args.layers {
        folder.keep_layers(layers.get())?;
    }
    Ok(Some(folder))
}

impl StepArgs {
    fn options(&self, load_format: LoadFormat) -> StepOptions {
        StepOptions {
            load_format,
            prompt_tokens: self.prompt_tokens,
            batches: self.batch.clone(),
            width: self.width,
            height: self.height,
            num_frames: self.num_frames,
            cache: self.cache,
            repeat: self.repeat.get(),
        }
    }

    fn model_name(&self) -> String {
        let path = self.model.model.as_ref().map(|path| path.display().to_string());
        self.model.preset.map_or_else(|| path.unwrap_or_default(), |preset| preset.name.to_owned())
    }
}

/// What all lines of one run share.
#[derive(Debug, Serialize)]
struct Context {
    model: String,
    family: &'static str,
    device: String,
    dtype: String,
    /// Of `--layers`.
    max_layers: Option<NonZeroUsize>,
    #[serde(skip)]
    load: Load,
}

/// The first line.
#[derive(Debug, Serialize)]
struct Load {
    seconds: f64,
    weight_bytes: usize,
    needed_bytes: usize,
    free_bytes: usize,
    peak_memory_bytes: usize,
    roof_bytes_per_second: f64,
    roof_flops_per_second: f64,
}

/// A line of `--json`.
#[derive(Debug, Serialize)]
struct Line<'a, T> {
    step: &'static str,
    #[serde(flatten)]
    context: &'a Context,
    #[serde(flatten)]
    measured: T,
}

#[derive(Debug, Serialize)]
struct StepFields<'a> {
    shape: &'a str,
    seconds: f64,
    /// Multiplications and additions, and bytes read.
    flops: f64,
    bytes: f64,
    /// Which of the two the device's limit for is met first: `flops` or `bytes`.
    bound: &'static str,
    /// Of that.
    rate_per_second: f64,
    roof_per_second: f64,
    percent_of_roof: f64,
    tokens_per_second: Option<f64>,
    peak_memory_bytes: usize,
}

impl Context {
    fn new(args: &StepArgs, loaded: &LoadedBench, free_bytes: usize) -> Self {
        Self {
            model: args.model_name(),
            family: loaded.plan.family,
            device: args.place.device.to_string(),
            dtype: args.place.dtype.to_string(),
            max_layers: args.layers,
            load: Load {
                seconds: loaded.load_seconds,
                weight_bytes: loaded.plan.weight_bytes,
                needed_bytes: loaded.plan.needed_bytes,
                free_bytes,
                peak_memory_bytes: loaded.load_peak_bytes,
                roof_bytes_per_second: loaded.roofs.bytes_per_second,
                roof_flops_per_second: loaded.roofs.flops_per_second,
            },
        }
    }

    fn print_begin(&self, json: bool) -> Result<(), CliError> {
        let load = &self.load;
        if json {
            return print_json(&Line { step: "load", context: self, measured: load });
        }
        let layers = self.max_layers.map_or(String::new(), |layers| format!(", --layers {layers}"));
        print_line(format_args!("{} ({}), {}, dtype {}{layers}", self.model, self.family, self.device, self.dtype))?;
        let (weights, seconds, peak) = (ByteSize(load.weight_bytes), load.seconds, ByteSize(load.peak_memory_bytes));
        let (needed, free) = (ByteSize(load.needed_bytes), ByteSize(load.free_bytes));
        print_line(format_args!(
            "weights {weights}, loaded in {seconds:.1} s, peak memory {peak}; needs {needed} of {free}"
        ))?;
        print_line(roofs_in_words(load.roof_bytes_per_second, load.roof_flops_per_second))?;
        print_line(format_args!(
            "{:<10} {:<40} {:>12} {:>17} {:>6} {:>16} {:>11} {:>12}",
            "step", "shape", "time", "rate", "", "of roof", "tokens/s", "peak memory"
        ))
    }

    fn print(&self, step: &MeasuredStep, json: bool) -> Result<(), CliError> {
        if !json {
            return print_line(Row(step));
        }
        let measured = StepFields {
            shape: &step.shape,
            seconds: step.seconds,
            flops: step.work.flops,
            bytes: step.work.bytes,
            bound: if step.bound() == Bound::Bytes { "bytes" } else { "flops" },
            rate_per_second: step.rate(),
            roof_per_second: step.roof(),
            percent_of_roof: 100.0 * step.rate() / step.roof(),
            tokens_per_second: tokens_per_second(step),
            peak_memory_bytes: step.peak_memory_bytes,
        };
        print_json(&Line { step: step.phase.as_str(), context: self, measured })
    }
}

fn print_json(line: &impl Serialize) -> Result<(), CliError> {
    print_line(serde_json::to_string(line).expect("numbers and text are always JSON: this is a bug"))
}

fn tokens_per_second(step: &MeasuredStep) -> Option<f64> {
    (step.tokens > 0).then(|| step.tokens as f64 / step.seconds)
}

/// A line of the table.
struct Row<'a>(&'a MeasuredStep);

impl Display for Row<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let step = self.0;
        let (unit, scale) = match step.bound() {
            Bound::Bytes => ("GB/s", 1e9),
            Bound::Flops => flops_unit(step.roof()),
        };
        let time = format!("{:.1} ms", step.seconds * 1e3);
        let rate = format!("{:.1} {unit}", step.rate() / scale);
        let percent = format!("{:.0} %", 100.0 * step.rate() / step.roof());
        let roof = format!("of {:.1} {unit}", step.roof() / scale);
        let tokens = tokens_per_second(step).map_or(String::new(), |rate| format!("{rate:.1}"));
        let (name, peak) = (step.phase.as_str(), ByteSize(step.peak_memory_bytes).to_string());
        write!(f, "{name:<10} {:<40} {time:>12} {rate:>17} {percent:>6} {roof:>16} {tokens:>11} {peak:>12}", step.shape)
    }
}
