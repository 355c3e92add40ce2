//! Configuration of `tale serve`: what a person may write, and what it means.
//!
//! Owns: [`Settings`], the keys of the TOML file and the flags of the command line in one definition, and [`Config`],
//! the validated result. Does not know: how any of it is used.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, de};
use tale_models::ModelSource;
use tale_models::checkpoint::LoadFormat;
use tale_models::device::{DeviceSpec, WeightDtype};
use tale_models::family::{LoadOptions, TextEncoders};
use tale_models::kv::{KvCacheDtype, PrefixCache};
use tale_models::runner::text::lookup::PromptLookup;
use tale_models::tools::ToolFormat;

use crate::engine::{EngineOptions, ModelSpec};
use crate::http::{AllowedHost, ConnectionLimits, Origin, ServerOptions};
use crate::job::store::Retention;

/// Last tokens that are looked for where tokens are guessed, and nothing is said of them.
const DEFAULT_PROMPT_LOOKUP_MIN: usize = 2;
const DEFAULT_PROMPT_LOOKUP_MAX: usize = 4;

/// Where the server listens when nothing else is said: this machine only, since there is no authentication yet.
pub const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8080);
/// How long running work may go on after SIGTERM when nothing else is said.
pub const DEFAULT_DRAIN: Duration = Duration::from_secs(30);
/// Longest name of a model.
pub const MAX_MODEL_NAME_LEN: usize = 128;

/// What a person may set; every field may be left out. Keys of the TOML file are the fields, flags are the same words
/// in kebab-case; flags win.
#[derive(Debug, Clone, Default, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// A checkpoint (a folder or a single file) and the name that clients use for it; may be given several times. What
    /// goes with it follows after a comma: base=DIR, the diffusers folder with what a single file lacks; loras=DIR, the
    /// folder of LoRA files that requests may name; ip_adapter=PATH and image_encoder=DIR, for reference pictures;
    /// refiner=DIR, the refiner that takes over from SDXL where a request says so
    #[arg(long = "model", value_name = "NAME=PATH[,KEY=PATH]", value_parser = parse_model)]
    #[serde(deserialize_with = "models_of_table")]
    pub models: Vec<ModelSpec>,

    /// Address and port to listen on [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<SocketAddr>,

    /// A second address and port, for /livez, /readyz and /metrics alone, served by a thread of its own [default: none]
    #[arg(long, value_name = "ADDR")]
    pub health_listen: Option<SocketAddr>,

    /// Most connections; for one more an idle one is closed, and when none is, it is refused with 503 [default: 8192, or
    /// what the limit of open files allows]
    #[arg(long, value_name = "N")]
    pub max_connections: Option<NonZeroUsize>,

    /// Most connections of one client address, in the same way [default: three quarters of max_connections]
    #[arg(long, value_name = "N")]
    pub max_connections_per_address: Option<NonZeroUsize>,

    /// Seconds in which the head of a request has to arrive, and a new connection's first one to begin [default: 10]
    #[arg(long, value_name = "SECONDS")]
    pub header_seconds: Option<NonZeroU32>,

    /// Seconds that a connection stays open between an answer and the next request [default: 75]
    #[arg(long, value_name = "SECONDS")]
    pub idle_seconds: Option<NonZeroU32>,

    /// Seconds after which a client that takes nothing of its answer is given up [default: 300]
    #[arg(long, value_name = "SECONDS")]
    pub send_seconds: Option<NonZeroU32>,

    /// Device that computes: cpu, or cuda:N for an NVIDIA GPU [default: cpu]
    #[arg(long, value_name = "NAME")]
    #[serde(deserialize_with = "parsed")]
    pub device: Option<DeviceSpec>,

    /// Dtype of weight matrices, on a GPU also of what is computed: auto (as published, on a GPU bf16), f32, bf16, f16
    /// [default: auto]
    #[arg(long, value_name = "DTYPE")]
    #[serde(deserialize_with = "parsed")]
    pub dtype: Option<WeightDtype>,

    /// Where weights come from: auto (the checkpoint's files), or dummy (random values in the shapes of its
    /// configurations, for load tests) [default: auto]
    #[arg(long, value_name = "FORMAT")]
    #[serde(deserialize_with = "parsed")]
    pub load_format: Option<LoadFormat>,

    /// Memory for weights, caches and running work together, such as 24GiB [default: most of what the device has]
    #[arg(long, value_name = "SIZE")]
    #[serde(deserialize_with = "parsed")]
    pub memory: Option<ByteSize>,

    /// Key/value cache of each language model, such as 4GiB [default: 1GiB]
    #[arg(long, value_name = "SIZE")]
    #[serde(deserialize_with = "parsed")]
    pub kv_cache: Option<ByteSize>,

    /// How the key/value cache is kept: auto (as it is computed), f32, bf16 or f16 (on the CPU), int8 or fp8 (half of 16 bits)
    /// [default: auto]
    #[arg(long, value_name = "DTYPE")]
    #[serde(deserialize_with = "parsed")]
    pub kv_cache_dtype: Option<KvCacheDtype>,

    /// Whose prompts share what the key/value cache holds of a common beginning: off (nobody's), per-client (those of each
    /// client), or shared (all) [default: per-client]
    #[arg(long, value_name = "WHOSE")]
    pub prefix_cache: Option<PrefixCacheScope>,

    /// Most tokens of a language model that are guessed from what came before and checked together; 0 guesses none. Answers
    /// stay the same [default: 0]
    #[arg(long, value_name = "N")]
    pub num_speculative_tokens: Option<usize>,

    /// Fewest last tokens of a text that have to stand in it once more for a guess [default: 2]
    #[arg(long, value_name = "N")]
    pub prompt_lookup_min: Option<NonZeroUsize>,

    /// Most last tokens of a text that are looked for in it [default: 4]
    #[arg(long, value_name = "N")]
    pub prompt_lookup_max: Option<NonZeroUsize>,

    /// Most tokens, prompt and answer together, of one step of a language model [default: 512]
    #[arg(long, value_name = "N")]
    pub max_batch_tokens: Option<NonZeroUsize>,

    /// Most sequences of one step of a language model [default: 64]
    #[arg(long, value_name = "N")]
    pub max_batch_sequences: Option<NonZeroUsize>,

    /// Most rows (pictures or clips times guidance branches) of one denoising step [default: 4]
    #[arg(long, value_name = "N")]
    pub max_denoise_rows: Option<NonZeroUsize>,

    /// Memory for LoRA files that no request uses, of each model with a folder of them, such as 4GiB [default: 1GiB]
    #[arg(long, value_name = "SIZE")]
    #[serde(deserialize_with = "parsed")]
    pub lora_cache: Option<ByteSize>,

    /// Text encoders of pictures' and clips' models: resident (on the device), on-demand (there while prompts are encoded), or
    /// auto [default: auto, which is resident where everything fits]
    #[arg(long, value_name = "WHERE")]
    pub text_encoders: Option<TextEncoderPlace>,

    /// How language models write calls of tools: hermes, llama3-json, or auto [default: auto, which is as their chat templates
    /// write them]
    #[arg(long, value_name = "FORMAT")]
    pub tool_call_parser: Option<ToolCallParser>,

    /// Most requests that may wait for one model; more are refused with 429 [default: 256]
    #[arg(long, value_name = "N")]
    pub max_queued: Option<NonZeroUsize>,

    /// Most requests that generate at once, over all models; more are refused with 429 [default: 1024]
    #[arg(long, value_name = "N")]
    pub max_requests: Option<NonZeroUsize>,

    /// Most memory that the bodies of requests, and the pictures in them, take together; more are refused with 503
    /// [default: 1GiB]
    #[arg(long, value_name = "SIZE")]
    #[serde(deserialize_with = "parsed")]
    pub max_body_memory: Option<ByteSize>,

    /// Threads that compute for requests (JSON, templates, tokens, pictures), two at least [default: one per core]
    #[arg(long, value_name = "N")]
    pub compute_threads: Option<NonZeroUsize>,

    /// Seconds that running work may go on after SIGTERM, SIGINT or SIGHUP [default: 30]
    #[arg(long, value_name = "SECONDS")]
    pub drain_seconds: Option<u32>,

    /// Most clips that wait or are being made; more are refused with 429 [default: 256]
    #[arg(long, value_name = "N")]
    pub max_active_jobs: Option<NonZeroUsize>,

    /// Most finished clips that are kept; the oldest goes first [default: 1000]
    #[arg(long, value_name = "N")]
    pub max_ended_jobs: Option<NonZeroUsize>,

    /// Most disk that finished clips take, such as 20GiB; the oldest goes first [default: 10GiB]
    #[arg(long, value_name = "SIZE")]
    #[serde(deserialize_with = "parsed")]
    pub max_clip_storage: Option<ByteSize>,

    /// Disk that must be free for another clip to be taken, such as 2GiB [default: 256MiB]
    #[arg(long, value_name = "SIZE")]
    #[serde(deserialize_with = "parsed")]
    pub min_free_disk: Option<ByteSize>,

    /// Folder for finished clips [default: a fresh one under the system's temporary folder]
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,

    /// Web pages that may call the server from a browser, such as `https://studio.example`; may be given several times; * is
    /// every page [default: none]
    #[arg(long = "cors-origin", value_name = "ORIGIN")]
    #[serde(deserialize_with = "parsed_list")]
    pub cors_origins: Vec<Origin>,

    /// A name by which the server may be asked, besides addresses, loopback names and names without a dot, such as
    /// `tale.example`; `.example` is every name below; may be given several times; * is every name [default: none]
    #[arg(long = "allowed-host", value_name = "NAME")]
    #[serde(deserialize_with = "parsed_list")]
    pub allowed_hosts: Vec<AllowedHost>,

    /// Let libraries log what RUST_LOG asks for: the tokenizer's finest lines are every character of a prompt
    #[arg(long)]
    pub unsafe_log_prompts: bool,

    /// Let the system write core dumps, and debuggers attach: prompts and answers are in the memory
    #[arg(long)]
    pub allow_core_dumps: bool,

    /// Form of the log lines on stderr [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// Where text encoders are while no prompt is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum TextEncoderPlace {
    /// On the device where everything fits; else some come and go.
    #[default]
    Auto,
    /// On the device.
    Resident,
    /// Read for each encoding, and gone after it.
    OnDemand,
}

impl TextEncoderPlace {
    /// `None` leaves it to the engine.
    pub fn chosen(self) -> Option<TextEncoders> {
        match self {
            Self::Auto => None,
            Self::Resident => Some(TextEncoders::Resident),
            Self::OnDemand => Some(TextEncoders::OnDemand),
        }
    }
}

/// Whose prompts share what the key/value cache holds of a common beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PrefixCacheScope {
    /// Nobody's.
    Off,
    /// Those of each client.
    PerClient,
    /// All.
    Shared,
}

impl PrefixCacheScope {
    fn chosen(self) -> PrefixCache {
        match self {
            Self::Off => PrefixCache::Off,
            Self::PerClient => PrefixCache::PerClient,
            Self::Shared => PrefixCache::Shared,
        }
    }
}

/// How language models write calls of tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ToolCallParser {
    /// As their chat templates write them.
    #[default]
    Auto,
    /// Between `<tool_call>` and `</tool_call>`, as Qwen 2.5 does.
    Hermes,
    /// As JSON with `parameters`, as Llama 3.1 does.
    Llama3Json,
}

impl ToolCallParser {
    /// `None` leaves it to the template.
    pub fn chosen(self) -> Option<ToolFormat> {
        match self {
            Self::Auto => None,
            Self::Hermes => Some(ToolFormat::Hermes),
            Self::Llama3Json => Some(ToolFormat::Llama3),
        }
    }
}

/// Form of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// What the server does, validated.
#[derive(Debug, Clone)]
pub struct Config {
    /// Address to listen on.
    pub listen: SocketAddr,
    /// Address of liveness, readiness and metrics alone.
    pub health_listen: Option<SocketAddr>,
    /// What to serve; at least one, names unique.
    pub models: Vec<ModelSpec>,
    /// Device, dtypes, sizes.
    pub engine: EngineOptions,
    /// How long running work may go on after SIGTERM.
    pub drain: Duration,
    /// Bounds of HTTP and jobs, and where finished clips lie.
    pub server: ServerOptions,
    /// Whether libraries may log prompts.
    pub unsafe_log_prompts: bool,
    /// Whether the process's memory may be seen by others.
    pub allow_core_dumps: bool,
    /// Form of the log lines.
    pub log_format: LogFormat,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, or a key is unknown or has a wrong value.
    #[error("{}:{line}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// The key and what is wrong with it.
        problem: String,
    },
    /// Nothing to serve.
    #[error("no model to serve; give --model NAME=PATH, or a [models] table in the file of --config")]
    NoModels,
    /// No end of a text has so few tokens as are looked for.
    #[error("prompt_lookup_min is {min}; allowed: 1 to {max}, which is prompt_lookup_max")]
    PromptLookup {
        /// Fewest tokens that have to be found.
        min: usize,
        /// Most that are looked for.
        max: usize,
    },
    /// Two `--model` flags have one name.
    #[error("--model: `{name}` is given twice")]
    DuplicateModel {
        /// The name.
        name: String,
    },
}

impl Config {
    /// Reads the file, if there is one, puts the flags over it, and fills in the defaults.
    pub fn resolve(file: Option<&Path>, flags: Settings) -> Result<Self, ConfigError> {
        let mut names = std::collections::BTreeSet::new();
        if let Some(twice) = flags.models.iter().find(|model| !names.insert(model.name.as_str())) {
            return Err(ConfigError::DuplicateModel { name: twice.name.clone() });
        }
        let settings = match file {
            Some(path) => flags.over(read_file(path)?),
            None => flags,
        };
        if settings.models.is_empty() {
            return Err(ConfigError::NoModels);
        }
        let min = or(settings.prompt_lookup_min, DEFAULT_PROMPT_LOOKUP_MIN);
        let max = or(settings.prompt_lookup_max, DEFAULT_PROMPT_LOOKUP_MAX);
        if min > max {
            return Err(ConfigError::PromptLookup { min, max });
        }
        Ok(Self {
            listen: settings.listen.unwrap_or(DEFAULT_LISTEN),
            health_listen: settings.health_listen,
            engine: settings.engine_options(),
            drain: settings.drain_seconds.map_or(DEFAULT_DRAIN, |seconds| Duration::from_secs(seconds.into())),
            server: settings.server_options(),
            unsafe_log_prompts: settings.unsafe_log_prompts,
            allow_core_dumps: settings.allow_core_dumps,
            log_format: settings.log_format.unwrap_or_default(),
            models: settings.models,
        })
    }
}

impl Settings {
    /// These settings, with `file` for what they leave out. A model of the same name replaces the file's.
    fn over(self, file: Self) -> Self {
        let mut models = file.models;
        for model in self.models {
            match models.iter_mut().find(|other| other.name == model.name) {
                Some(other) => *other = model,
                None => models.push(model),
            }
        }
        Self {
            models,
            listen: self.listen.or(file.listen),
            health_listen: self.health_listen.or(file.health_listen),
            max_connections: self.max_connections.or(file.max_connections),
            max_connections_per_address: self.max_connections_per_address.or(file.max_connections_per_address),
            header_seconds: self.header_seconds.or(file.header_seconds),
            idle_seconds: self.idle_seconds.or(file.idle_seconds),
            send_seconds: self.send_seconds.or(file.send_seconds),
            device: self.device.or(file.device),
            dtype: self.dtype.or(file.dtype),
            load_format: self.load_format.or(file.load_format),
            memory: self.memory.or(file.memory),
            kv_cache: self.kv_cache.or(file.kv_cache),
            kv_cache_dtype: self.kv_cache_dtype.or(file.kv_cache_dtype),
            prefix_cache: self.prefix_cache.or(file.prefix_cache),
            num_speculative_tokens: self.num_speculative_tokens.or(file.num_speculative_tokens),
            prompt_lookup_min: self.prompt_lookup_min.or(file.prompt_lookup_min),
            prompt_lookup_max: self.prompt_lookup_max.or(file.prompt_lookup_max),
            max_batch_tokens: self.max_batch_tokens.or(file.max_batch_tokens),
            max_batch_sequences: self.max_batch_sequences.or(file.max_batch_sequences),
            max_denoise_rows: self.max_denoise_rows.or(file.max_denoise_rows),
            lora_cache: self.lora_cache.or(file.lora_cache),
            text_encoders: self.text_encoders.or(file.text_encoders),
            tool_call_parser: self.tool_call_parser.or(file.tool_call_parser),
            max_queued: self.max_queued.or(file.max_queued),
            max_requests: self.max_requests.or(file.max_requests),
            max_body_memory: self.max_body_memory.or(file.max_body_memory),
            compute_threads: self.compute_threads.or(file.compute_threads),
            max_active_jobs: self.max_active_jobs.or(file.max_active_jobs),
            max_ended_jobs: self.max_ended_jobs.or(file.max_ended_jobs),
            max_clip_storage: self.max_clip_storage.or(file.max_clip_storage),
            drain_seconds: self.drain_seconds.or(file.drain_seconds),
            min_free_disk: self.min_free_disk.or(file.min_free_disk),
            output_dir: self.output_dir.or(file.output_dir),
            cors_origins: if self.cors_origins.is_empty() { file.cors_origins } else { self.cors_origins },
            allowed_hosts: if self.allowed_hosts.is_empty() { file.allowed_hosts } else { self.allowed_hosts },
            unsafe_log_prompts: self.unsafe_log_prompts || file.unsafe_log_prompts,
            allow_core_dumps: self.allow_core_dumps || file.allow_core_dumps,
            log_format: self.log_format.or(file.log_format),
        }
    }

    fn engine_options(&self) -> EngineOptions {
        let (engine, load) = (EngineOptions::default(), LoadOptions::default());
        EngineOptions {
            device: self.device.unwrap_or_default(),
            weight_dtype: self.dtype.unwrap_or_default(),
            load: LoadOptions {
                load_format: self.load_format.unwrap_or_default(),
                kv_cache_bytes: self.kv_cache.map_or(load.kv_cache_bytes, |size| size.0),
                kv_cache_dtype: self.kv_cache_dtype.unwrap_or_default(),
                prefix_cache: self.prefix_cache.map_or(load.prefix_cache, PrefixCacheScope::chosen),
                prompt_lookup: self.prompt_lookup(),
                max_batch_tokens: or(self.max_batch_tokens, load.max_batch_tokens),
                max_batch_sequences: or(self.max_batch_sequences, load.max_batch_sequences),
                max_denoise_rows: or(self.max_denoise_rows, load.max_denoise_rows),
                lora_cache_bytes: self.lora_cache.map_or(load.lora_cache_bytes, |size| size.0),
                text_encoders: load.text_encoders,
                tool_call_parser: self.tool_call_parser.unwrap_or_default().chosen(),
            },
            text_encoders: self.text_encoders.unwrap_or_default().chosen(),
            memory_bytes: self.memory.map(|size| size.0).or(engine.memory_bytes),
            max_queued_sessions: or(self.max_queued, engine.max_queued_sessions),
        }
    }

    /// How tokens are guessed; `None` where they are not.
    fn prompt_lookup(&self) -> Option<PromptLookup> {
        let num_speculative_tokens = self.num_speculative_tokens.filter(|tokens| *tokens > 0)?;
        let prompt_lookup_min = or(self.prompt_lookup_min, DEFAULT_PROMPT_LOOKUP_MIN);
        let prompt_lookup_max = or(self.prompt_lookup_max, DEFAULT_PROMPT_LOOKUP_MAX);
        Some(PromptLookup { num_speculative_tokens, prompt_lookup_min, prompt_lookup_max })
    }

    fn connection_limits(&self) -> ConnectionLimits {
        let default = ConnectionLimits::default();
        ConnectionLimits {
            max_connections: self.max_connections.map(NonZeroUsize::get),
            max_per_address: self.max_connections_per_address.map(NonZeroUsize::get),
            header: seconds_or(self.header_seconds, default.header),
            idle: seconds_or(self.idle_seconds, default.idle),
            send: seconds_or(self.send_seconds, default.send),
        }
    }

    fn server_options(&self) -> ServerOptions {
        let server = ServerOptions::default();
        ServerOptions {
            max_requests: or(self.max_requests, server.max_requests),
            max_body_memory: self.max_body_memory.map_or(server.max_body_memory, |size| size.0),
            compute_threads: or(self.compute_threads, server.compute_threads),
            output_dir: self.output_dir.clone(),
            min_free_disk_bytes: self.min_free_disk.map_or(server.min_free_disk_bytes, |size| size.0 as u64),
            cors_origins: self.cors_origins.clone(),
            allowed_hosts: self.allowed_hosts.clone(),
            connections: self.connection_limits(),
            retention: Retention {
                max_active_jobs: or(self.max_active_jobs, server.retention.max_active_jobs),
                max_ended_jobs: or(self.max_ended_jobs, server.retention.max_ended_jobs),
                max_file_bytes: self.max_clip_storage.map_or(server.retention.max_file_bytes, |size| size.0 as u64),
            },
        }
    }
}

fn seconds_or(set: Option<NonZeroU32>, default: Duration) -> Duration {
    set.map_or(default, |seconds| Duration::from_secs(seconds.get().into()))
}

fn or(set: Option<NonZeroUsize>, default: usize) -> usize {
    set.map_or(default, NonZeroUsize::get)
}

fn read_file(path: &Path) -> Result<Settings, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let mut settings = parse_toml(&text).map_err(|(span, problem)| {
        let before = text.get(..span.start).unwrap_or(&text);
        ConfigError::File { path: path.to_owned(), line: 1 + before.matches('\n').count(), problem }
    })?;
    let folder = path.parent().unwrap_or(Path::new("."));
    for model in &mut settings.models {
        model.source = std::mem::take(&mut model.source).relative_to(folder);
    }
    settings.output_dir = settings.output_dir.map(|dir| folder.join(dir));
    Ok(settings)
}

/// The error is the place in the text and what is wrong there, with the key in front.
fn parse_toml(text: &str) -> Result<Settings, (std::ops::Range<usize>, String)> {
    let problem = |error: &toml::de::Error, key: &str| {
        // The parser's own messages may go over lines; ours are one line.
        let message = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
        let key = if key == "." { String::new() } else { format!("`{key}`: ") };
        (error.span().unwrap_or(0..0), format!("{key}{message}"))
    };
    let document = toml::Deserializer::parse(text).map_err(|error| problem(&error, "."))?;
    serde_path_to_error::deserialize(document).map_err(|error| problem(error.inner(), &error.path().to_string()))
}

/// `NAME=PATH`, or `NAME=PATH,KEY=PATH` with the keys of [`ModelSource::extras`].
fn parse_model(argument: &str) -> Result<ModelSpec, String> {
    let (name, paths) = argument.split_once('=').ok_or("expected NAME=PATH")?;
    let mut paths = paths.split(',');
    let mut source = ModelSource::at(paths.next().unwrap_or_default());
    if source.path.as_os_str().is_empty() {
        return Err("the path is empty; expected NAME=PATH".into());
    }
    for part in paths {
        set_extra(&mut source, part)?;
    }
    checked_model(name, source)
}

/// One `KEY=PATH` after a model's own path.
fn set_extra(source: &mut ModelSource, part: &str) -> Result<(), String> {
    let (key, path) = part.split_once('=').unwrap_or((part, ""));
    let mut extras = source.extras();
    let Some((_, extra)) = extras.iter_mut().find(|(known, _)| *known == key) else {
        let known = extras.map(|(known, _)| format!("{known}=PATH")).join(", ");
        return Err(format!("`{part}` is not one of {known}; a path with a comma goes into the file of --config"));
    };
    if path.is_empty() || extra.is_some() {
        return Err(format!("`{key}` needs one path, once"));
    }
    **extra = Some(path.into());
    Ok(())
}

/// Names go into URLs, JSON, log lines and metric labels.
fn checked_model(name: &str, source: ModelSource) -> Result<ModelSpec, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_./:".contains(c);
    if name.is_empty() || name.len() > MAX_MODEL_NAME_LEN || !name.chars().all(fits) {
        return Err(format!(
            "`{name}` is not a model name; allowed: 1 to {MAX_MODEL_NAME_LEN} letters, digits and any of - _ . / :"
        ));
    }
    Ok(ModelSpec { name: name.to_owned(), source })
}

fn models_of_table<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ModelSpec>, D::Error> {
    let table = BTreeMap::<String, SourceEntry>::deserialize(deserializer)?;
    table.into_iter().map(|(name, entry)| checked_model(&name, entry.0).map_err(de::Error::custom)).collect()
}

/// `"PATH"`, or a table with `path` and what goes with it.
struct SourceEntry(ModelSource);

impl<'de> Deserialize<'de> for SourceEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SourceVisitor)
    }
}

struct SourceVisitor;

impl<'de> de::Visitor<'de> for SourceVisitor {
    type Value = SourceEntry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a path, or a table with `path`")
    }

    fn visit_str<E: de::Error>(self, path: &str) -> Result<SourceEntry, E> {
        Ok(SourceEntry(ModelSource::at(path)))
    }

    fn visit_map<A: de::MapAccess<'de>>(self, table: A) -> Result<SourceEntry, A::Error> {
        ModelSource::deserialize(de::value::MapAccessDeserializer::new(table)).map(SourceEntry)
    }
}

/// A TOML string in the spelling of the flag.
fn parsed<'de, D: Deserializer<'de>, T: FromStr<Err: Display>>(deserializer: D) -> Result<Option<T>, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map(Some).map_err(de::Error::custom)
}

/// TOML strings in the spelling of a flag that may be given several times.
fn parsed_list<'de, D: Deserializer<'de>, T: FromStr<Err: Display>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts.iter().map(|text| text.parse().map_err(de::Error::custom)).collect()
}

/// A number of bytes, written `4GiB`, `512MiB`, `1.5GB`, or plain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub usize);

/// Units, longest first, so that `iB` is not read as `B`.
const BYTE_UNITS: [(&str, f64); 10] = [
    ("KiB", 1024.0),
    ("MiB", 1_048_576.0),
    ("GiB", 1_073_741_824.0),
    ("TiB", 1_099_511_627_776.0),
    ("KB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("TB", 1e12),
    ("B", 1.0),
    ("", 1.0),
];

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let problem = || format!("`{text}` is not a size; expected a number and a unit, such as 4GiB or 512MiB");
        let (number, factor) = BYTE_UNITS
            .iter()
            .find_map(|(unit, factor)| Some((text.strip_suffix(unit)?.trim_end(), factor)))
            .ok_or_else(problem)?;
        let number: f64 = number.parse().map_err(|_| problem())?;
        let bytes = number * factor;
        // Exact up to 2^53, more than any machine has.
        if (1.0..9e15).contains(&bytes) { Ok(Self(bytes as usize)) } else { Err(problem()) }
    }
}

impl Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes @ 0..1024 => write!(f, "{bytes} B"),
            bytes @ 1024..1_048_576 => write!(f, "{:.1} KiB", bytes as f64 / 1024.0),
            bytes @ 1_048_576..1_073_741_824 => write!(f, "{:.1} MiB", bytes as f64 / 1_048_576.0),
            bytes => write!(f, "{:.2} GiB", bytes as f64 / 1_073_741_824.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(toml: &str, flags: Settings) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tale.toml");
        std::fs::write(&path, toml).unwrap();
        let shown = |error: ConfigError| error.to_string().replace(&*dir.path().to_string_lossy(), "");
        Config::resolve(Some(&path), flags).map_err(shown)
    }

    fn check_error(toml: &str, expected: &[&str]) {
        let error = resolve(toml, Settings::default()).unwrap_err();
        assert!(!error.contains('\n'), "one line: {error}");
        for part in expected {
            assert!(error.contains(part), "`{part}` is not in `{error}`");
        }
    }

    #[test]
    fn every_key_of_the_documentation_is_read_and_means_what_it_says() {
        let document = include_str!("../docs/configuration.md");
        let example = document.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
        let config = resolve(example, Settings::default()).unwrap();
        assert_eq!(config.engine.load.load_format, LoadFormat::Auto);
        let dummy = resolve(&example.replace("load_format = \"auto\"", "load_format = \"dummy\""), Settings::default());
        assert_eq!(dummy.unwrap().engine.load.load_format, LoadFormat::Dummy);
        assert_eq!(config.listen, "10.0.0.5:8080".parse().unwrap());
        assert_eq!(config.engine.memory_bytes, Some(24 << 30));
        assert_eq!(config.engine.load.kv_cache_bytes, 4 << 30);
        assert_eq!(config.engine.load.kv_cache_dtype, KvCacheDtype::Int8);
        assert_eq!(config.engine.load.prefix_cache, PrefixCache::Shared);
        let lookup = PromptLookup { num_speculative_tokens: 8, prompt_lookup_min: 3, prompt_lookup_max: 5 };
        assert_eq!(config.engine.load.prompt_lookup, Some(lookup));
        assert_eq!(config.engine.load.max_batch_tokens, 1024);
        assert_eq!(config.engine.load.max_batch_sequences, 32);
        assert_eq!(config.engine.load.max_denoise_rows, 2);
        assert_eq!(config.engine.load.lora_cache_bytes, 2 << 30);
        assert_eq!(config.engine.load.tool_call_parser, Some(ToolFormat::Hermes));
        assert_eq!(config.engine.max_queued_sessions, 100);
        assert_eq!(config.engine.weight_dtype, WeightDtype::Bf16);
        assert_eq!(config.server.max_requests, 500);
        assert_eq!((config.server.max_body_memory, config.server.compute_threads), (2 << 30, 4));
        let Retention { max_active_jobs, max_ended_jobs, max_file_bytes } = config.server.retention;
        assert_eq!((max_active_jobs, max_ended_jobs, max_file_bytes), (64, 200, 20 << 30));
        assert_eq!(config.drain, Duration::from_secs(60));
        assert_eq!(config.server.min_free_disk_bytes, 2 << 30);
        assert_eq!(config.server.output_dir, Some("/var/lib/tale".into()));
        assert_eq!(config.server.cors_origins, ["https://studio.example".parse().unwrap()]);
        assert_eq!(config.server.allowed_hosts, [".svc.cluster.local".parse().unwrap()]);
        assert_eq!(config.health_listen, Some("10.0.0.5:8081".parse().unwrap()));
        let ConnectionLimits { max_connections, max_per_address, header, idle, send } = config.server.connections;
        assert_eq!((max_connections, max_per_address), (Some(4096), Some(1024)));
        assert_eq!([header, idle, send], [5, 60, 120].map(Duration::from_secs));
        assert!(config.unsafe_log_prompts && config.allow_core_dumps);
        assert_eq!(config.log_format, LogFormat::Json);
        assert_eq!(config.models.len(), 2);
        assert_eq!(config.models[0].name, "chat");
    }

    /// A stand-in for `tale serve` with nothing but the settings.
    #[derive(clap::Parser)]
    struct Flags {
        #[command(flatten)]
        settings: Settings,
    }

    #[test]
    fn documentation_and_help_name_the_defaults_of_the_code() {
        let document = include_str!("../docs/configuration.md");
        let help = <Flags as clap::CommandFactory>::command().render_long_help().to_string();
        let config =
            Config::resolve(None, Settings { models: vec![parse_model("a=/x").unwrap()], ..Settings::default() });
        let Config { listen, engine, drain, server, .. } = config.unwrap();
        let gib = |bytes: usize| format!("{}GiB", bytes >> 30);
        for (key, default) in [
            ("listen", listen.to_string()),
            ("device", engine.device.to_string()),
            ("load_format", "auto".to_owned()),
            ("kv_cache", gib(engine.load.kv_cache_bytes)),
            ("kv_cache_dtype", engine.load.kv_cache_dtype.to_string()),
            ("prefix_cache", "per-client".to_owned()),
            ("num_speculative_tokens", "0".to_owned()),
            ("prompt_lookup_min", DEFAULT_PROMPT_LOOKUP_MIN.to_string()),
            ("prompt_lookup_max", DEFAULT_PROMPT_LOOKUP_MAX.to_string()),
            ("max_batch_tokens", engine.load.max_batch_tokens.to_string()),
            ("max_batch_sequences", engine.load.max_batch_sequences.to_string()),
            ("max_denoise_rows", engine.load.max_denoise_rows.to_string()),
            ("lora_cache", gib(engine.load.lora_cache_bytes)),
            ("max_queued", engine.max_queued_sessions.to_string()),
            ("max_requests", server.max_requests.to_string()),
            ("max_body_memory", gib(server.max_body_memory)),
            ("max_active_jobs", server.retention.max_active_jobs.to_string()),
            ("max_ended_jobs", server.retention.max_ended_jobs.to_string()),
            ("max_clip_storage", gib(server.retention.max_file_bytes as usize)),
            ("min_free_disk", format!("{}MiB", server.min_free_disk_bytes >> 20)),
            ("drain_seconds", drain.as_secs().to_string()),
            ("header_seconds", server.connections.header.as_secs().to_string()),
            ("idle_seconds", server.connections.idle.as_secs().to_string()),
            ("send_seconds", server.connections.send.as_secs().to_string()),
        ] {
            let line = document.lines().find(|line| line.starts_with(&format!("{key} = "))).unwrap();
            let ends = |line: &str| {
                line.ends_with(&format!("default {default}")) || line.contains(&format!("default {default}:"))
            };
            assert!(ends(line), "{key} should default to {default}: {line}");
            let flag = help.split(&format!("--{} <", key.replace('_', "-"))).nth(1).unwrap();
            let flag = flag.split(" --").next().unwrap();
            assert!(flag.contains(&format!("[default: {default}]")), "--{key} should default to {default}: {flag}");
        }
    }

    #[test]
    fn flags_win_and_models_are_joined_by_name() {
        let flags = Settings {
            models: vec![parse_model("chat=/b").unwrap(), parse_model("wan=/c").unwrap()],
            max_queued: NonZeroUsize::new(7),
            ..Settings::default()
        };
        let config =
            resolve("max_queued = 5\nmax_denoise_rows = 3\n[models]\nchat = \"/a\"\nflux = \"/d\"", flags).unwrap();
        let models: Vec<_> = config.models.iter().map(|m| (m.name.as_str(), m.source.path.to_str().unwrap())).collect();
        assert_eq!(models, [("chat", "/b"), ("flux", "/d"), ("wan", "/c")]);
        assert_eq!((config.engine.max_queued_sessions, config.engine.load.max_denoise_rows), (7, 3));
    }

    #[test]
    fn paths_in_the_file_are_relative_to_the_file() {
        let config = resolve("output_dir = \"clips\"\n[models]\na = \"m/a\"", Settings::default()).unwrap();
        let folder = config.models[0].source.path.parent().unwrap().parent().unwrap();
        assert!(folder.is_absolute());
        assert_eq!(config.server.output_dir.unwrap(), folder.join("clips"));
    }

    #[test]
    fn a_model_may_be_a_table() {
        let toml = "[models]\nb = \"m/b\"\n[models.a]\npath = \"a.safetensors\"\nbase = \"m/base\"\n";
        let config = resolve(toml, Settings::default()).unwrap();
        let folder = config.models[0].source.path.parent().unwrap();
        assert_eq!(config.models[0].source.base, Some(folder.join("m/base")));
        assert_eq!(config.models[1].source, ModelSource::at(folder.join("m/b")));
    }

    #[test]
    fn errors_name_file_line_and_key() {
        check_error(
            "listen = \"127.0.0.1:1\"\nmax_batch_tokens = 0\n",
            &["/tale.toml:2: `max_batch_tokens`: ", "zero"],
        );
        check_error("\nkv_cache = \"4 GiBs\"\n", &["/tale.toml:2: `kv_cache`: ", "`4 GiBs` is not a size"]);
        check_error("dtype = \"int4\"\n", &[":1: `dtype`: ", "auto, f32, bf16, f16"]);
        check_error(
            "prompt_lookup_min = 5\n[models]\na = \"/x\"\n",
            &["prompt_lookup_min is 5; allowed: 1 to 4, which is prompt_lookup_max"],
        );
        check_error("kv_cache_dtype = \"fp8_e5m2\"\n", &[":1: `kv_cache_dtype`: ", "auto, f32, bf16, f16, int8, fp8"]);
        check_error("prefix_cache = \"on\"\n", &[":1: `prefix_cache`: ", "`off`, `per-client`, `shared`"]);
        check_error("load_format = \"gguf\"\n", &[":1: `load_format`: ", "auto, dummy"]);
        check_error("device = \"tpu\"\n", &[":1: `device`: ", "cpu"]);
        check_error("listen = \"localhost\"\n", &[":1: `listen`: ", "socket address"]);
        check_error("cors_origins = [\"https://a/b\"]\n", &[":1: `cors_origins`: ", "`https://a/b` is not an origin"]);
        check_error("allowed_hosts = [\"a:80\"]\n", &[":1: `allowed_hosts`: ", "`a:80` is not a host name"]);
        check_error("header_seconds = 0\n", &[":1: `header_seconds`: ", "zero"]);
        check_error("lissten = \"x\"\n", &[":1: ", "unknown field `lissten`", "`listen`"]);
        check_error("[models]\n\"a b\" = \"/x\"\n", &["`models`: `a b` is not a model name"]);
        check_error("[models]\na = 3\n", &[":2: `models.a`: ", "integer `3`"]);
        check_error("[models.a]\npath = \"/x\"\nbass = \"/y\"\n", &["`models.a", "unknown field `bass`", "`base`"]);
        check_error("[models.a]\nbase = \"/y\"\n", &["`models.a`: ", "missing field `path`"]);
        check_error("max_queued = \n", &[":1: "]);
        check_error("", &["no model to serve"]);
        let missing = Config::resolve(Some(Path::new("/no/such.toml")), Settings::default()).unwrap_err();
        assert!(missing.to_string().starts_with("/no/such.toml: No such file"), "{missing}");
    }

    #[test]
    fn model_arguments_are_checked() {
        assert!(parse_model("a=/x=y").is_ok_and(|model| model.source == ModelSource::at("/x=y")));
        let based = parse_model("a=/x.safetensors,base=/y").unwrap().source;
        assert_eq!((based.path, based.base), ("/x.safetensors".into(), Some("/y".into())));
        for wrong in [
            "/models/a",
            "=x",
            "a=",
            "a b=/x",
            "\u{e9}=/x",
            "a=,base=/y",
            "a=/x,/y",
            "a=/x,bass=/y",
            "a=/x,base=",
            "a=/x,base=/y,base=/z",
        ] {
            assert!(parse_model(wrong).is_err(), "{wrong}");
        }
        let twice = vec![parse_model("a=/x").unwrap(), parse_model("a=/y").unwrap()];
        let error = Config::resolve(None, Settings { models: twice, ..Settings::default() }).unwrap_err();
        assert_eq!(error.to_string(), "--model: `a` is given twice");
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("4GiB", 4 << 30), ("1.5 MiB", 3 << 19), ("2GB", 2_000_000_000), ("512", 512), ("7B", 7)]
        {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for wrong in ["", "GiB", "-1GiB", "0", "4Gi", "1e300GiB", "NaN", "inf"] {
            assert!(wrong.parse::<ByteSize>().is_err(), "{wrong}");
        }
    }
}
