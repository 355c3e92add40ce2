//! Configuration of `tale serve`: what a person may write, and what it means.
//!
//! Owns: [`Settings`], the keys of the TOML file and the flags of the command line in one definition, and [`Config`],
//! the validated result (`models` reads models, `devices` where they lie, `lifetime` when they come and go, `guesses` what is said of guessed tokens, `choices`
//! has words, `byte_size` sizes). Does not know: how any of it is used.

use std::fmt::Display;
use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, de};
use tale_models::checkpoint::LoadFormat;
use tale_models::device::WeightDtype;
use tale_models::family::LoadOptions;
use tale_models::kv::KvCacheDtype;
use tale_models::runner::text::lookup::PromptLookup;

use self::devices::{DeviceName, Whereabouts, one_or_more};
use self::guesses::{Guesses, TooFewLookedFor};
use self::lifetime::LoadTime;
use self::models::{ModelEntry, models_of_table, parse_model};
use crate::engine::{DEFAULT_DRAIN, EngineOptions, ModelSpec};
use crate::http::{AllowedHost, ConnectionLimits, ModelManagement, Origin, ServerOptions};
use crate::job::store::Retention;

mod byte_size;
mod choices;
mod devices;
mod guesses;
mod lifetime;
mod models;
mod state;

pub use self::byte_size::ByteSize;
pub use self::choices::{LogFormat, PrefixCacheScope, TextEncoderPlace, ToolCallParser};
pub use self::models::MAX_MODEL_NAME_LEN;
pub use self::state::{DatabaseUrl, JobsConfig, StateDir};

/// Where the server listens when nothing else is said: this machine only, since there is no authentication yet.
pub const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8080);

/// What a person may set; every field may be left out. Keys of the TOML file are the fields, flags are the same words
/// in kebab-case; flags win.
#[derive(Debug, Clone, Default, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// A checkpoint (a folder or a single file) and the name that clients use for it; may be given several times. What
    /// goes with it follows after a comma: base=DIR, the diffusers folder with what a single file lacks; loras=DIR, the
    /// folder of LoRA files that requests may name; ip_adapter=PATH and image_encoder=DIR, for reference pictures;
    /// refiner=DIR, the refiner that takes over from SDXL where a request says so; num_speculative_tokens=N,
    /// prompt_lookup_min=N, prompt_lookup_max=N and idle_unload_seconds=N, which go before the settings of all models; device=NAME,
    /// once for each, and replicas=N, tensor_parallel=N or guidance_devices=2, where it lies; load=on-demand, to load it with the first
    /// request for it
    #[arg(long = "model", value_name = "NAME=PATH[,KEY=VALUE]", value_parser = parse_model)]
    #[serde(deserialize_with = "models_of_table")]
    pub models: Vec<ModelEntry>,

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

    /// Device that computes: cpu, cpu:PART/PARTS for a share of its cores, cuda:N for an NVIDIA GPU, or cuda:* for all; several
    /// with commas between them [default: cpu]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_more")]
    pub device: Vec<DeviceName>,

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

    /// Seconds without a request after which a model is unloaded; the next request loads it again [default: none]
    #[arg(long, value_name = "SECONDS")]
    pub idle_unload_seconds: Option<NonZeroU32>,

    /// Let clients load and unload models: POST /v1/models/NAME/load and unload
    #[arg(long)]
    pub model_management: bool,

    /// Folder below which lie the checkpoints that may be loaded so, besides those that are configured [default: none]
    #[arg(long, value_name = "DIR")]
    pub models_dir: Option<PathBuf>,

    /// Seconds that running work may go on after SIGTERM, SIGINT or SIGHUP, and that of a model when it is unloaded [default: 30]
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

    /// Folder for finished clips [default: `clips` in the folder of the state; without one a fresh folder under the system's
    /// temporary folder]
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,

    /// Folder of jobs and of what clips under way have so far, so that they go on after a restart; none for jobs that end with
    /// the process [default: tale in $XDG_STATE_HOME or ~/.local/state]
    #[arg(long, value_name = "DIR")]
    #[serde(deserialize_with = "parsed")]
    pub state_dir: Option<StateDir>,

    /// Database of jobs for several nodes, such as postgres://USER@HOST/DATABASE; they share the state's folder too [default:
    /// none, which is a file in the state's folder for this process alone]
    #[arg(long, value_name = "URL", conflicts_with = "database_url_file")]
    #[serde(deserialize_with = "parsed")]
    pub database_url: Option<DatabaseUrl>,

    /// File that holds the address of the database, for one with a password in it [default: none]
    #[arg(long, value_name = "FILE")]
    pub database_url_file: Option<PathBuf>,

    /// Name of this node among those of the database; no other may have it [default: the host's name and a random number]
    #[arg(long, value_name = "NAME")]
    pub node_name: Option<String>,

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
    /// Where jobs live.
    pub jobs: JobsConfig,
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
    /// The devices of a name are not known.
    #[error(transparent)]
    Devices(tale_models::Error),
    /// Nothing to serve.
    #[error("no model to serve; give --model NAME=PATH, or a [models] table in the file of --config")]
    NoModels,
    /// The settings of all models for guesses do not fit each other.
    #[error(transparent)]
    Guesses(#[from] TooFewLookedFor),
    /// Those of one model do not, with what is said of all models for what it leaves out.
    #[error("models.{model}: {source}")]
    GuessesOfModel {
        /// Its name.
        model: String,
        /// Why.
        source: TooFewLookedFor,
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
        let guesses = settings.guesses();
        let prompt_lookup = guesses.chosen()?;
        let devices = devices::named(&settings.device).map_err(ConfigError::Devices)?;
        let spec = |ModelEntry { name, source, guesses: own, whereabouts, lifetime }: &ModelEntry| {
            let of_model = match own == &Guesses::default() {
                true => None,
                false => Some(own.over(guesses).chosen().map_err(|source| {
                    let model = name.clone();
                    ConfigError::GuessesOfModel { model, source }
                })?),
            };
            let Whereabouts { devices, replicas, tensor_parallel, guidance_devices } = whereabouts.clone();
            // What devices share stays, whatever is said of all models.
            let is_shared = tensor_parallel.is_some() || guidance_devices.is_some();
            let of_all = settings.idle_unload_seconds.filter(|_| !is_shared);
            let idle_unload = lifetime.idle_unload_seconds.or(of_all);
            let idle_unload = idle_unload.map(|seconds| Duration::from_secs(seconds.get().into()));
            let on_demand = lifetime.load == Some(LoadTime::OnDemand);
            let spec = ModelSpec::new(name, source.clone());
            let spec = ModelSpec { devices, replicas, tensor_parallel, guidance_devices, ..spec };
            Ok(ModelSpec { prompt_lookup: of_model, on_demand, idle_unload, ..spec })
        };
        let models = settings.models.iter().map(spec).collect::<Result<_, ConfigError>>()?;
        Ok(Self {
            listen: settings.listen.unwrap_or(DEFAULT_LISTEN),
            health_listen: settings.health_listen,
            engine: EngineOptions { devices, ..settings.engine_options(prompt_lookup) },
            drain: settings.drain(),
            server: settings.server_options(),
            jobs: settings.jobs()?,
            unsafe_log_prompts: settings.unsafe_log_prompts,
            allow_core_dumps: settings.allow_core_dumps,
            log_format: settings.log_format.unwrap_or_default(),
            models,
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
            device: if self.device.is_empty() { file.device } else { self.device },
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
            idle_unload_seconds: self.idle_unload_seconds.or(file.idle_unload_seconds),
            model_management: self.model_management || file.model_management,
            models_dir: self.models_dir.or(file.models_dir),
            min_free_disk: self.min_free_disk.or(file.min_free_disk),
            output_dir: self.output_dir.or(file.output_dir),
            state_dir: self.state_dir.or(file.state_dir),
            database_url: self.database_url.or(file.database_url.filter(|_| self.database_url_file.is_none())),
            database_url_file: self.database_url_file.or(file.database_url_file),
            node_name: self.node_name.or(file.node_name),
            cors_origins: if self.cors_origins.is_empty() { file.cors_origins } else { self.cors_origins },
            allowed_hosts: if self.allowed_hosts.is_empty() { file.allowed_hosts } else { self.allowed_hosts },
            unsafe_log_prompts: self.unsafe_log_prompts || file.unsafe_log_prompts,
            allow_core_dumps: self.allow_core_dumps || file.allow_core_dumps,
            log_format: self.log_format.or(file.log_format),
        }
    }

    fn drain(&self) -> Duration {
        self.drain_seconds.map_or(DEFAULT_DRAIN, |seconds| Duration::from_secs(seconds.into()))
    }

    fn engine_options(&self, prompt_lookup: Option<PromptLookup>) -> EngineOptions {
        let (engine, load) = (EngineOptions::default(), LoadOptions::default());
        EngineOptions {
            weight_dtype: self.dtype.unwrap_or_default(),
            load: LoadOptions {
                load_format: self.load_format.unwrap_or_default(),
                kv_cache_bytes: self.kv_cache.map_or(load.kv_cache_bytes, |size| size.0),
                kv_cache_dtype: self.kv_cache_dtype.unwrap_or_default(),
                prefix_cache: self.prefix_cache.map_or(load.prefix_cache, PrefixCacheScope::chosen),
                prompt_lookup,
                max_batch_tokens: or(self.max_batch_tokens, load.max_batch_tokens),
                max_batch_sequences: or(self.max_batch_sequences, load.max_batch_sequences),
                max_denoise_rows: or(self.max_denoise_rows, load.max_denoise_rows),
                lora_cache_bytes: self.lora_cache.map_or(load.lora_cache_bytes, |size| size.0),
                text_encoders: load.text_encoders,
                tool_call_parser: self.tool_call_parser.unwrap_or_default().chosen(),
                tensor_parallel: load.tensor_parallel,
                guidance_devices: load.guidance_devices,
            },
            text_encoders: self.text_encoders.unwrap_or_default().chosen(),
            memory_bytes: self.memory.map(|size| size.0).or(engine.memory_bytes),
            max_queued_sessions: or(self.max_queued, engine.max_queued_sessions),
            drain: self.drain(),
            devices: engine.devices,
        }
    }

    /// What is said of guesses of all models.
    fn guesses(&self) -> Guesses {
        let Self { num_speculative_tokens, prompt_lookup_min, prompt_lookup_max, .. } = *self;
        Guesses { num_speculative_tokens, prompt_lookup_min, prompt_lookup_max }
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

    fn jobs(&self) -> Result<JobsConfig, ConfigError> {
        let read = |path: &PathBuf| {
            let text = std::fs::read_to_string(path);
            let text = text.map_err(|source| ConfigError::Read { path: path.clone(), source })?;
            let bad = |problem| ConfigError::File { path: path.clone(), line: 1, problem };
            text.trim().parse::<DatabaseUrl>().map_err(bad)
        };
        let database_url = match (&self.database_url, &self.database_url_file) {
            (Some(url), _) => Some(url.clone()),
            (None, Some(file)) => Some(read(file)?),
            (None, None) => None,
        };
        let state_dir = self.state_dir.clone().or_else(|| StateDir::usual(|name| std::env::var_os(name)));
        Ok(JobsConfig { state_dir, database_url, node_name: self.node_name.clone() })
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
            model_management: self.model_management.then(|| ModelManagement {
                models_dir: self.models_dir.clone(),
                configured: self.models.iter().map(|model| model.source.path.clone()).collect(),
            }),
            retention: Retention {
                max_active_jobs: or(self.max_active_jobs, server.retention.max_active_jobs),
                max_ended_jobs: or(self.max_ended_jobs, server.retention.max_ended_jobs),
                max_file_bytes: self.max_clip_storage.map_or(server.retention.max_file_bytes, |size| size.0 as u64),
                max_age: server.retention.max_age,
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
    settings.state_dir = settings.state_dir.map(|dir| dir.relative_to(folder));
    settings.database_url_file = settings.database_url_file.map(|file| folder.join(file));
    settings.models_dir = settings.models_dir.map(|dir| folder.join(dir));
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

#[cfg(test)]
mod tests;
