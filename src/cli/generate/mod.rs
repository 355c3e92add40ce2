//! `tale generate`: one request through the engine that serves, without HTTP.

mod diffusion;
pub(super) mod image;
mod text;
mod video;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Subcommand};
use tale_models::checkpoint::LoadFormat;
use tale_models::device::{DeviceSpec, WeightDtype};
use tale_models::{ClientId, Event, ModelCard, ModelSource, Request};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::filter::LevelFilter;

use super::logs::{self, Libraries};
use super::{CliError, progress, threads};
use crate::config::LogFormat;
use crate::engine::{Engine, EngineError, EngineOptions, ModelSpec, Session};

#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(subcommand)]
    medium: Medium,
}

#[derive(Debug, Subcommand)]
enum Medium {
    /// Continue a prompt or answer a conversation; the text goes to stdout as it comes
    Text(text::TextArgs),
    /// Make a picture
    Image(Box<image::ImageArgs>),
    /// Make a clip
    Video(video::VideoArgs),
}

/// What all three take.
#[derive(Debug, Args)]
struct ModelArgs {
    /// The checkpoint: a folder or a single file
    #[arg(long, value_name = "PATH")]
    model: PathBuf,

    /// Of a single file: the diffusers folder with what it lacks [default: the file's folder]
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,

    /// Folder of LoRA files for --lora
    #[arg(long, value_name = "DIR")]
    loras: Option<PathBuf>,

    /// For reference pictures: an IP-Adapter's .safetensors file, or a folder that holds just one
    #[arg(long, value_name = "PATH")]
    ip_adapter: Option<PathBuf>,

    /// The folder of the refiner that takes over at --denoising-end
    #[arg(long, value_name = "DIR")]
    refiner: Option<PathBuf>,

    /// The IP-Adapter's vision encoder [default: image_encoder beside the adapter's file]
    #[arg(long, value_name = "DIR", requires = "ip_adapter")]
    image_encoder: Option<PathBuf>,

    /// Device that computes: cpu, cpu:PART/PARTS for a share of its cores, or cuda:N for an NVIDIA GPU
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    device: DeviceSpec,

    /// Dtype of weight matrices, on a GPU also of what is computed: auto (as published, on a GPU bf16), f32, bf16, f16
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    dtype: WeightDtype,

    /// Where weights come from: auto (the checkpoint's files), or dummy (random values in the shapes of its
    /// configurations: what it makes is noise)
    #[arg(long, value_name = "FORMAT", default_value = "auto")]
    load_format: LoadFormat,

    /// Say on stderr what is used (seed, sizes, tokens per second), also when nobody watches
    #[arg(long, short)]
    verbose: bool,
}

impl ModelArgs {
    fn source(&self) -> ModelSource {
        let (ip_adapter, image_encoder) = (self.ip_adapter.clone(), self.image_encoder.clone());
        let (base, loras, refiner) = (self.base.clone(), self.loras.clone(), self.refiner.clone());
        ModelSource { path: self.model.clone(), base, loras, ip_adapter, image_encoder, refiner }
    }
}

pub fn run(args: GenerateArgs) -> Result<(), CliError> {
    logs::init(LogFormat::Text, LevelFilter::WARN, Libraries::Quiet);
    threads::check()?;
    match args.medium {
        Medium::Text(args) => text::run(args),
        Medium::Image(args) => image::run(*args),
        Medium::Video(args) => video::run(args),
    }
}

/// The one model's name inside the engine; nobody sees it.
const MODEL: &str = "model";

/// A loaded model and the signals that end its work.
struct Generator {
    engine: Engine,
    card: Arc<ModelCard>,
    signals: Signals,
    /// Whether notes go to stderr.
    talks: bool,
}

impl Generator {
    fn load(args: &ModelArgs, mut options: EngineOptions) -> Result<Self, CliError> {
        options.load.load_format = args.load_format;
        // There is no second request to keep anything for.
        options.load.lora_cache_bytes = 0;
        let options = EngineOptions { devices: vec![args.device], weight_dtype: args.dtype, ..options };
        let bar = progress::loading();
        let told = bar.clone();
        let model = ModelSpec::new(MODEL, args.source());
        let engine = Engine::load(vec![model], options, move |_, component| told.set_message(component.to_owned()));
        bar.finish_and_clear();
        let engine = engine.map_err(|error| match error {
            EngineError::Load { source, .. } => CliError::from(*source),
            other => CliError::from(other),
        })?;
        let card = engine.card(MODEL).expect("it was just loaded under this name: this is a bug");
        Ok(Self { engine, card, signals: Signals::new()?, talks: args.verbose || progress::is_watched() })
    }

    /// A line on stderr for whoever watches or asked for it.
    fn note(&self, line: impl FnOnce() -> String) {
        if self.talks {
            eprintln!("{}", line());
        }
    }

    /// Begins the work. Dropping what comes back ends it within one step.
    fn submit(&self, request: Request) -> Result<Session, CliError> {
        Ok(self.engine.submit(MODEL, ClientId::default(), request)?)
    }

    /// The session, with the signals that end it.
    fn run(&mut self, session: Session) -> Running<'_> {
        Running { session, signals: &mut self.signals }
    }
}

/// One session and the signals that end it.
struct Running<'a> {
    session: Session,
    signals: &'a mut Signals,
}

impl Running<'_> {
    /// The next event that is not a failure; waits for it.
    fn next(&mut self) -> Result<Event, CliError> {
        let Signals { runtime, interrupt, terminate } = self.signals;
        let event = runtime.block_on(async {
            tokio::select! {
                biased;
                _ = interrupt.recv() => Err(CliError::Signal(SignalKind::interrupt().as_raw_value())),
                _ = terminate.recv() => Err(CliError::Signal(SignalKind::terminate().as_raw_value())),
                event = self.session.recv() => event.ok_or(CliError::EngineGone),
            }
        })?;
        match event {
            Event::Failed(error) => Err(error.into()),
            event => Ok(event),
        }
    }
}

/// Ctrl-C and SIGTERM, caught so that partial output is removed.
struct Signals {
    runtime: tokio::runtime::Runtime,
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> Result<Self, CliError> {
        let failed = |source| CliError::Io { what: "cannot listen for signals".into(), source };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(failed)?;
        // A handler belongs to the runtime that is entered when it is made.
        let entered = runtime.enter();
        let interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let terminate = signal(SignalKind::terminate()).map_err(failed)?;
        drop(entered);
        Ok(Self { runtime, interrupt, terminate })
    }
}

/// The error for a model that makes something else, naming the command for it.
fn wrong_medium(card: &ModelCard) -> CliError {
    let command = match card {
        ModelCard::Text(_) => "text",
        ModelCard::Diffusion(card) if card.medium() == tale_models::diffusion::Medium::Image => "image",
        ModelCard::Diffusion(_) => "video",
    };
    CliError::Argument(format!("--model: this checkpoint is for `tale generate {command}`"))
}

/// A seed that nobody chose; 32 bits, which people can retype and which are all that torch's CPU generator uses.
fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish() >> 32
}
