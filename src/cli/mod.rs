//! The command line: `tale serve`, `tale generate`, `tale inspect`, `tale bench`, `tale openapi`, `tale pull`.
//!
//! Owns: arguments, what goes to stdout and stderr, exit codes. Does not know: how anything is computed. stdout carries
//! the answer and nothing else; progress, notes, logs and errors go to stderr.

mod bench;
mod generate;
mod inspect;
mod logs;
mod openapi;
mod parameters;
mod plan;
mod privacy;
mod progress;
mod prompt;
#[cfg(feature = "pull")]
mod pull;
mod serve;
mod state;
mod threads;
mod watch;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tale_models::diffusion::parameters::PARAMETERS;

use crate::config::ConfigError;
use crate::engine::EngineError;
use crate::media::MediaError;

/// Text, pictures and clips from open weights, in one native process.
#[derive(Debug, Parser)]
#[command(name = "tale", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve models over HTTP, in OpenAI's shapes
    Serve(serve::ServeArgs),
    /// Generate text, a picture or a clip, without a server
    Generate(generate::GenerateArgs),
    /// Say what a checkpoint is, what it needs, and what is missing or unused
    Inspect(inspect::InspectArgs),
    /// Measure the steps of a model, or single operations, beside the limits of the device
    Bench(bench::BenchArgs),
    /// Print the OpenAPI document of the server
    Openapi,
    /// Download a checkpoint from the Hugging Face hub
    #[cfg(feature = "pull")]
    Pull(pull::PullArgs),
}

/// Why a command ended early. The text is one line; the user sees it behind `error: `.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Engine(Box<EngineError>),
    #[error(transparent)]
    Model(Box<tale_models::Error>),
    #[error(transparent)]
    Media(#[from] MediaError),
    #[cfg(feature = "pull")]
    #[error(transparent)]
    Pull(#[from] pull::PullError),
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    /// An argument is fine by itself and wrong for this model or this machine.
    #[error("{0}")]
    Argument(String),
    /// Jobs have no place to live.
    #[error("{0}")]
    State(String),
    #[error("the device thread ended before the answer was whole")]
    EngineGone,
    /// The report on stdout has said everything.
    #[error("")]
    Reported,
    /// SIGINT or SIGTERM, by number.
    #[error("")]
    Signal(i32),
    /// Whoever read stdout has gone, as in `tale ... | head`.
    #[error("")]
    BrokenPipe,
}

impl CliError {
    fn stdout(source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::BrokenPipe => Self::BrokenPipe,
            _ => Self::Io { what: "stdout".into(), source },
        }
    }

    /// As a shell reports it: 128 and the signal's number for an end by signal.
    fn exit_code(&self) -> u8 {
        match self {
            Self::Signal(number) => 128 + *number as u8,
            Self::BrokenPipe => 128 + 13,
            Self::Config(_) | Self::Argument(_) => 2,
            _ => 1,
        }
    }
}

impl From<EngineError> for CliError {
    fn from(error: EngineError) -> Self {
        Self::Engine(Box::new(error))
    }
}

impl From<tale_models::Error> for CliError {
    /// Request fields are flags here.
    fn from(error: tale_models::Error) -> Self {
        match error {
            tale_models::Error::InvalidRequest { field, problem } => {
                Self::Argument(format!("--{}: {problem}", flag_of(&field)))
            }
            other => Self::Model(Box::new(other)),
        }
    }
}

/// The flag of a request's field, or of the list that has it: `--lora` of `loras[0].name`.
fn flag_of(field: &str) -> String {
    let name = field.split(['[', '.']).next().unwrap_or(field);
    let declaration = PARAMETERS.iter().find(|declaration| declaration.name == name);
    declaration.map_or_else(|| name.replace('_', "-"), |declaration| declaration.flag())
}

/// Runs the command that the process's arguments name.
pub fn run() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(args) => serve::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Bench(args) => bench::run(args),
        Command::Openapi => openapi::run(),
        #[cfg(feature = "pull")]
        Command::Pull(args) => pull::run(&args),
    };
    let Err(error) = result else { return ExitCode::SUCCESS };
    let message = error.to_string();
    if !message.is_empty() {
        // One line, whatever a library put into its message.
        // A stderr that takes nothing is no reason to panic.
        let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
        let _ = writeln!(io::stderr(), "error: {line}");
    }
    ExitCode::from(error.exit_code())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
