//! `tale inspect`: what a checkpoint is, without loading it.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::io::{Write, stdout};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use tale_models::checkpoint::LoadFormat;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::family::{LoadOptions, LoadedModel, TextEncoders};
use tale_models::kv::{KvFormat, KvShape};
use tale_models::loading::{self, Inspection};
use tale_models::presets::{Configurations, Preset};
use tale_models::{ModelCard, ModelSource, Request};
use tracing_subscriber::filter::LevelFilter;

use super::bench::parse_preset;
use super::generate::image::read_parameters;
use super::logs::{self, Libraries};
use super::{CliError, plan};
use crate::config::{ByteSize, LogFormat};
use crate::engine::{self, EngineError, EngineOptions, ModelSpec};

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The checkpoint (a folder or a single file), or a .png, .mp4 or .webm that tale made, whose parameters are printed as
    /// JSON
    #[arg(required_unless_present_any = ["preset", "plan"])]
    path: Option<PathBuf>,

    /// Instead of a checkpoint a file of `tale serve --config`: which of its models lie on which devices, and what they take there
    #[arg(long, value_name = "FILE", conflicts_with_all = ["path", "preset", "base", "ip_adapter", "refiner", "image_encoder"])]
    plan: Option<PathBuf>,

    /// Instead of a checkpoint a published configuration by name, without weights
    #[arg(long, value_name = "NAME", value_parser = parse_preset, conflicts_with_all = ["path", "base", "load_format"])]
    preset: Option<&'static Preset>,

    /// Of a single file: the diffusers folder with what it lacks [default: the file's folder]
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,

    /// For reference pictures: an IP-Adapter's .safetensors file, or a folder that holds just one
    #[arg(long, value_name = "PATH")]
    ip_adapter: Option<PathBuf>,

    /// The folder of the refiner that takes over where a request says so
    #[arg(long, value_name = "DIR")]
    refiner: Option<PathBuf>,

    /// The IP-Adapter's vision encoder [default: image_encoder beside the adapter's file]
    #[arg(long, value_name = "DIR", requires = "ip_adapter")]
    image_encoder: Option<PathBuf>,

    /// Print one JSON object, with every unused tensor
    #[arg(long)]
    json: bool,

    /// Device that the memory is computed for: cpu or cuda:N; it is not opened and need not exist
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    device: DeviceSpec,

    /// Of a language model: how many devices of this kind share it; what is said is then of each of them
    #[arg(long, value_name = "N", conflicts_with = "plan")]
    tensor_parallel: Option<NonZeroUsize>,

    /// Dtype that the memory is computed for: auto (as published, on a GPU bf16), f32, bf16, f16
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    dtype: WeightDtype,

    /// Where weights would come from: auto (the checkpoint's files), or dummy (nowhere: what the configurations ask for)
    #[arg(long, value_name = "FORMAT", default_value = "auto")]
    load_format: LoadFormat,

    /// Memory that the model and its requests may take, such as 24GiB: says how a request is then worked on, and if it fits; of a
    /// language model, how many tokens fit [default: that of a card of 80GiB]
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
}

/// Fails, after the report, when the checkpoint cannot be loaded.
pub fn run(args: &InspectArgs) -> Result<(), CliError> {
    logs::init(LogFormat::Text, LevelFilter::ERROR, Libraries::Quiet);
    if let Some(file) = &args.plan {
        return print(&plan::report(file, args.memory, args.json)?);
    }
    let configurations = args.preset.map(Configurations::of_preset).transpose()?;
    let path = configurations.as_ref().map(Configurations::path).or(args.path.as_deref());
    let path = path.expect("the command line has a path or a preset: this is a bug");
    if ["png", "mp4", "webm"].iter().any(|made| path.extension().is_some_and(|of| of.eq_ignore_ascii_case(made))) {
        return print_parameters(path);
    }
    let placement = Placement::in_host_memory(args.device, args.dtype);
    let (ip_adapter, image_encoder) = (args.ip_adapter.clone(), args.image_encoder.clone());
    let (base, refiner) = (args.base.clone(), args.refiner.clone());
    let source = ModelSource { base, ip_adapter, image_encoder, refiner, ..ModelSource::at(path) };
    let load_format = if configurations.is_some() { LoadFormat::Dummy } else { args.load_format };
    let tensor_parallel = args.tensor_parallel.map(|count| devices_like(args.device, count.get())).unwrap_or_default();
    let mut options = LoadOptions { load_format, tensor_parallel, ..LoadOptions::default() };
    if let Some(ByteSize(capacity_bytes)) = args.memory {
        options.text_encoders = placed_text_encoders(args, &source, &options, capacity_bytes)?;
    }
    let (inspection, model) = loading::plan(source, &placement, &options)?;
    let context = model.as_ref().and_then(|model| ContextReport::new(args, &inspection, model, &placement));
    let cache_tokens = model.as_ref().map(|model| cache_tokens(model, &inspection, &placement)).unwrap_or_default();
    let request = model.map(|model| RequestReport::new(args, &inspection, model)).transpose()?.flatten();
    let called = args.preset.map_or_else(|| path.to_owned(), |preset| preset.name.into());
    let mut report = Report::new(called, inspection, cache_tokens, context, request);
    report.tensor_parallel = args.tensor_parallel;
    let text = if args.json {
        serde_json::to_string_pretty(&report).expect("numbers and text are always JSON: this is a bug") + "\n"
    } else {
        report.to_string()
    };
    print(&text)?;
    if report.loads { Ok(()) } else { Err(CliError::Reported) }
}

/// So many devices of a kind.
fn devices_like(device: DeviceSpec, count: usize) -> Vec<DeviceSpec> {
    let number = |part: usize| match device {
        DeviceSpec::Cuda(_) => DeviceSpec::Cuda(part),
        DeviceSpec::Cpu | DeviceSpec::CpuPart { .. } => DeviceSpec::CpuPart { part, of: count },
    };
    (0..count).map(number).collect()
}

/// Where a server with this model alone and so much memory would have its text encoders.
fn placed_text_encoders(
    args: &InspectArgs,
    source: &ModelSource,
    load: &LoadOptions,
    capacity_bytes: usize,
) -> Result<TextEncoders, CliError> {
    let (device, weight_dtype, load) = (args.device, args.dtype, load.clone());
    let options = EngineOptions { devices: vec![device], weight_dtype, load, ..EngineOptions::default() };
    let model = ModelSpec::new(source.path.display().to_string(), source.clone());
    let placed =
        engine::place_text_encoders(&[&model], device, &options, capacity_bytes).map_err(|error| match error {
            EngineError::Load { source, .. } => CliError::from(*source),
            other => CliError::from(other),
        })?;
    Ok(placed[0])
}

/// Tokens that the default KV cache of a language model would hold in each format.
fn cache_tokens(model: &LoadedModel, inspection: &Inspection, placement: &Placement) -> BTreeMap<String, usize> {
    let ModelCard::Text(card) = &model.card else { return BTreeMap::new() };
    tokens_by_format(card.kv_shape, inspection.cache_bytes, placement)
}

/// Tokens that so many bytes hold in each format.
fn tokens_by_format(shape: KvShape, bytes: usize, placement: &Placement) -> BTreeMap<String, usize> {
    let tokens = |format: KvFormat| (format.to_string(), bytes / shape.token_bytes(format));
    [KvFormat::computed(placement), KvFormat::INT8, KvFormat::FP8].map(tokens).into()
}

/// Tokens by format in words.
fn tokens_in_words(tokens: &BTreeMap<String, usize>) -> String {
    tokens.iter().map(|(format, tokens)| format!("{tokens} in {format}")).collect::<Vec<_>>().join(", ")
}

/// How a picture was made.
fn print_parameters(path: &Path) -> Result<(), CliError> {
    let parameters = read_parameters(path)?;
    print(&(serde_json::to_string_pretty(&parameters).expect("numbers and text are always JSON: this is a bug") + "\n"))
}

fn print(text: &str) -> Result<(), CliError> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(CliError::stdout)
}

/// What is printed; the fields are those of `--json`.
#[derive(Debug, Serialize)]
struct Report {
    path: PathBuf,
    family: &'static str,
    makes: &'static str,
    /// What is out of the ordinary in the licence of the family's published weights.
    licence_note: Option<&'static str>,
    /// Devices that share it, of each of which the bytes and tokens are.
    tensor_parallel: Option<NonZeroUsize>,
    /// Whether the checkpoint can be loaded.
    loads: bool,
    parameters: usize,
    /// Of the weights, once loaded.
    memory_bytes: usize,
    /// Of the KV cache of a language model with the default options.
    cache_bytes: usize,
    /// What a product of a language model widens for a moment of its largest quantised matrix.
    widened_bytes: usize,
    /// Tokens that so many bytes hold, by the dtype in which they are kept: as they are computed, and in 8 bits.
    cache_tokens: BTreeMap<String, usize>,
    components: Vec<ComponentReport>,
    /// Of a language model.
    context: Option<ContextReport>,
    /// Of a model that makes pictures or clips.
    request: Option<RequestReport>,
    problems: Vec<String>,
}

/// What the tokens of a language model take.
#[derive(Debug, Serialize)]
struct ContextReport {
    /// Of the KV cache.
    bytes_per_token: usize,
    /// Most of one request.
    max_tokens: usize,
    /// `--memory`, or that of a large card.
    memory_bytes: usize,
    /// What the weights leave of it.
    free_bytes: usize,
    /// Whose keys and values fit there, by the dtype in which they are kept.
    tokens_beside_weights: BTreeMap<String, usize>,
}

/// For which memory the tokens of a language model are counted where nothing is said: one card of 80 GB.
const LARGE_CARD: ByteSize = ByteSize(80 << 30);

impl ContextReport {
    fn new(args: &InspectArgs, inspection: &Inspection, model: &LoadedModel, placement: &Placement) -> Option<Self> {
        let ModelCard::Text(card) = &model.card else { return None };
        let ByteSize(memory_bytes) = args.memory.unwrap_or(LARGE_CARD);
        let held_bytes = inspection.resident_bytes() - inspection.cache_bytes;
        let free_bytes = memory_bytes.saturating_sub(held_bytes);
        Some(Self {
            bytes_per_token: card.kv_bytes_per_token,
            max_tokens: card.max_context,
            memory_bytes,
            free_bytes,
            tokens_beside_weights: tokens_by_format(card.kv_shape, free_bytes, placement),
        })
    }
}

/// What a request with the model's own sizes needs beside the weights.
#[derive(Debug, Serialize)]
struct RequestReport {
    width: usize,
    height: usize,
    num_frames: usize,
    /// The checkpoint's own, which samples it unless a request names another one. If it is not among `schedulers`, a
    /// request has to.
    scheduler: String,
    /// All that a request may name.
    schedulers: Vec<&'static str>,
    /// Whether the VAE works in tiles.
    vae_tiling: bool,
    /// Guidance branches, and how many of them go through the denoiser in one pass.
    branches: usize,
    branches_at_once: usize,
    /// Of text encoders that are on the device only while a prompt is encoded; among the bytes of that phase.
    on_demand_bytes: usize,
    phases: Vec<PhaseReport>,
    /// Of the greediest phase.
    memory_bytes: usize,
    /// What `--memory` leaves beside the weights.
    free_bytes: Option<usize>,
}

#[derive(Debug, Serialize)]
struct PhaseReport {
    phase: &'static str,
    memory_bytes: usize,
}

impl RequestReport {
    fn new(args: &InspectArgs, inspection: &Inspection, mut model: LoadedModel) -> Result<Option<Self>, CliError> {
        let free_bytes = args.memory.map(|memory| memory.0.saturating_sub(inspection.resident_bytes()));
        let room_bytes = free_bytes.unwrap_or(usize::MAX);
        model.runner.set_room(room_bytes);
        let ModelCard::Diffusion(card) = model.card.with_room(room_bytes) else {
            return Ok(None);
        };
        if card.edits.is_some_and(|edits| edits.is_needed) {
            // What a request with a picture needs depends on the picture.
            return Ok(None);
        }
        let request = card.resolve(&card.plainest(), 0)?;
        let (width, height, num_frames) = (request.canvas.width, request.canvas.height, request.canvas.num_frames);
        let vae_tiling = request.vae_tiling;
        let branches = request.guidance.num_branches();
        let plan = model.runner.plan(&Request::Diffusion(request));
        let phases = plan.phases().iter();
        Ok(Some(Self {
            width,
            height,
            num_frames,
            scheduler: card.sampling.schedulers.own_name().to_owned(),
            schedulers: card.sampling.schedulers.iter().map(|scheduler| scheduler.name).collect(),
            vae_tiling,
            branches,
            branches_at_once: plan.branches_at_once().unwrap_or(branches),
            on_demand_bytes: inspection.on_demand_bytes,
            phases: phases.map(|of| PhaseReport { phase: of.phase.as_str(), memory_bytes: of.bytes }).collect(),
            memory_bytes: plan.peak_bytes(),
            free_bytes,
        }))
    }
}

#[derive(Debug, Serialize)]
struct ComponentReport {
    /// Folder; empty for a model that is one folder.
    name: String,
    parameters: usize,
    /// Parameters by published dtype.
    dtypes: BTreeMap<String, usize>,
    memory_bytes: usize,
    unused_tensors: Vec<String>,
}

impl Report {
    fn new(
        path: PathBuf,
        inspection: Inspection,
        cache_tokens: BTreeMap<String, usize>,
        context: Option<ContextReport>,
        request: Option<RequestReport>,
    ) -> Self {
        let of_weights = inspection.components.iter().flat_map(|(_, weights)| &weights.problems);
        let problems: Vec<_> = of_weights.chain(&inspection.problem).map(ToString::to_string).collect();
        let components: Vec<_> = inspection
            .components
            .into_iter()
            .map(|(name, weights)| ComponentReport {
                name,
                parameters: weights.num_parameters,
                dtypes: weights.dtypes,
                memory_bytes: weights.resident_bytes,
                unused_tensors: weights.unused,
            })
            .collect();
        Self {
            path,
            family: inspection.family,
            makes: inspection.makes,
            licence_note: inspection.licence_note,
            tensor_parallel: None,
            loads: problems.is_empty(),
            parameters: components.iter().map(|component| component.parameters).sum(),
            memory_bytes: components.iter().map(|component| component.memory_bytes).sum(),
            cache_bytes: inspection.cache_bytes,
            widened_bytes: inspection.widened_bytes,
            cache_tokens,
            components,
            context,
            request,
            problems,
        }
    }
}

/// Unused tensors that are named before the rest is only counted.
const SHOWN_UNUSED: usize = 5;

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}, makes {}", self.path.display(), self.family, self.makes)?;
        if let Some(count) = self.tensor_parallel {
            writeln!(f, "Shared by {count} devices; bytes and tokens are those of each of them.")?;
        }
        writeln!(f)?;
        writeln!(f, "{:<20} {:>12} {:>12}  dtypes", "component", "parameters", "memory")?;
        for component in &self.components {
            let name = if component.name.is_empty() { "(whole folder)" } else { &component.name };
            let dtypes: Vec<_> =
                component.dtypes.iter().map(|(dtype, count)| format!("{dtype} {}", Count(*count))).collect();
            write_row(f, name, component.parameters, component.memory_bytes, &dtypes.join(", "))?;
        }
        if self.components.len() > 1 {
            write_row(f, "total", self.parameters, self.memory_bytes, "")?;
        }
        if self.cache_bytes > 0 {
            writeln!(
                f,
                "\nBeside the weights: a KV cache of {} unless configured otherwise; it holds so many tokens: {}.",
                ByteSize(self.cache_bytes),
                tokens_in_words(&self.cache_tokens)
            )?;
        }
        if self.widened_bytes > 0 {
            let bytes = ByteSize(self.widened_bytes);
            writeln!(f, "A product widens a quantised matrix for a moment, for which {bytes} are kept free.")?;
        }
        if let Some(context) = &self.context {
            write!(f, "{context}")?;
        }
        match &self.request {
            Some(request) => write!(f, "{request}")?,
            None => writeln!(f, "\nWhat a request needs while it runs comes on top.")?,
        }
        for component in self.components.iter().filter(|component| !component.unused_tensors.is_empty()) {
            write_unused(f, component)?;
        }
        if let Some(note) = self.licence_note {
            writeln!(f, "\nNote: {note}.")?;
        }
        if self.loads {
            return writeln!(f, "\nThe checkpoint can be loaded.");
        }
        writeln!(f, "\nThe checkpoint cannot be loaded:")?;
        self.problems.iter().try_for_each(|problem| writeln!(f, "  {problem}"))
    }
}

impl Display for ContextReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bytes_per_token, max_tokens, memory_bytes, free_bytes, tokens_beside_weights } = self;
        writeln!(f, "A token takes {} of the cache; a request has at most {max_tokens}.", ByteSize(*bytes_per_token))?;
        let memory = ByteSize(*memory_bytes);
        if tokens_beside_weights.values().all(|tokens| *tokens == 0) {
            return writeln!(f, "Of {memory} the weights do not leave room for a KV cache.");
        }
        let (free, tokens) = (ByteSize(*free_bytes), tokens_in_words(tokens_beside_weights));
        writeln!(f, "Of {memory} the weights leave {free} for a KV cache, which hold so many tokens: {tokens}.")
    }
}

impl Display for RequestReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { width, height, num_frames, .. } = self;
        let size = match num_frames {
            1 => format!("A picture of {width}x{height}"),
            _ => format!("A clip of {num_frames} frames of {width}x{height}"),
        };
        let tiles = if self.vae_tiling { ", its VAE in tiles," } else { "" };
        writeln!(f, "\n{size} needs beside the weights{tiles} while it runs:")?;
        for PhaseReport { phase, memory_bytes } in &self.phases {
            writeln!(f, "  {phase:<18} {:>25}", ByteSize(*memory_bytes).to_string())?;
        }
        if self.branches_at_once < self.branches {
            writeln!(f, "Its guidance branches are predicted one after the other.")?;
        }
        if self.on_demand_bytes > 0 {
            let bytes = ByteSize(self.on_demand_bytes);
            writeln!(f, "Its text encoders, {bytes}, are read for each encoding and leave the device after it.")?;
        }
        let others: Vec<_> = self.schedulers.iter().copied().filter(|name| *name != self.scheduler).collect();
        let (own, others, has_own) = (&self.scheduler, others.join(", "), others.len() < self.schedulers.len());
        if has_own {
            writeln!(f, "It is sampled by {own}, or by {others}.")?;
        } else {
            writeln!(f, "Its own scheduler, {own}, is not supported; requests have to name one of {others}.")?;
        }
        let Some(free_bytes) = self.free_bytes else { return Ok(()) };
        let fits = if self.memory_bytes <= free_bytes { "It fits" } else { "It does not fit" };
        writeln!(f, "{fits}: {} are free beside the weights.", ByteSize(free_bytes))
    }
}

fn write_row(f: &mut fmt::Formatter<'_>, name: &str, parameters: usize, bytes: usize, dtypes: &str) -> fmt::Result {
    let row = format!("{name:<20} {:>12} {:>12}  {dtypes}", Count(parameters).to_string(), ByteSize(bytes).to_string());
    writeln!(f, "{}", row.trim_end())
}

fn write_unused(f: &mut fmt::Formatter<'_>, component: &ComponentReport) -> fmt::Result {
    let (name, unused) = (&component.name, &component.unused_tensors);
    let place = if name.is_empty() { String::new() } else { format!(" in {name}") };
    writeln!(f, "\nNot used{place}: {} tensors", unused.len())?;
    for tensor in unused.iter().take(SHOWN_UNUSED) {
        writeln!(f, "  {tensor}")?;
    }
    match unused.len().saturating_sub(SHOWN_UNUSED) {
        0 => Ok(()),
        more => writeln!(f, "  and {more} more (--json names all)"),
    }
}

/// A number of parameters as people say it.
struct Count(usize);

impl Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            count @ 0..1_000 => write!(f, "{count}"),
            count @ 1_000..1_000_000 => write!(f, "{:.1} K", count as f64 / 1e3),
            count @ 1_000_000..1_000_000_000 => write!(f, "{:.1} M", count as f64 / 1e6),
            count => write!(f, "{:.2} B", count as f64 / 1e9),
        }
    }
}
