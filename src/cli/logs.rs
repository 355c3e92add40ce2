//! Log lines on stderr.
//!
//! Libraries may write what they work on into their finer lines: the tokenizer's are every character of a prompt. So theirs
//! are cut at [`LIBRARY_LEVEL`], whatever `RUST_LOG` says, unless [`Libraries::MayLogPrompts`].

use std::io;

use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::config::LogFormat;

/// Finest level of lines that are not our own.
const LIBRARY_LEVEL: LevelFilter = LevelFilter::INFO;

/// The crates whose lines are read before they are written: none holds a prompt, an answer, or the name of an upload.
const OWN_CRATES: [&str; 3] = ["tale", "tale_models", "tale_kernels"];

/// How much libraries may say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Libraries {
    /// Nothing finer than [`LIBRARY_LEVEL`].
    Quiet,
    /// What `RUST_LOG` says, prompts and answers among it.
    MayLogPrompts,
}

/// Starts logging at `level`, or at what `RUST_LOG` says.
pub fn init(format: LogFormat, level: LevelFilter, libraries: Libraries) {
    let filter = EnvFilter::builder().with_default_directive(level.into()).from_env_lossy();
    let lines = fmt::layer().with_writer(io::stderr);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let cut = filter_fn(move |line| libraries == Libraries::MayLogPrompts || may_log(line.target(), *line.level()));
    // A second start is a test's; the first one stays.
    let _ = tracing_subscriber::registry().with(filter).with(cut).with(lines).try_init();
}

fn may_log(target: &str, level: tracing::Level) -> bool {
    let name = target.split("::").next().unwrap_or_default();
    OWN_CRATES.contains(&name) || level <= LIBRARY_LEVEL
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn only_our_own_lines_are_finer_than_info() {
        for (target, level, may) in [
            ("tale", Level::TRACE, true),
            ("tale::http", Level::TRACE, true),
            ("tale_models::runner", Level::DEBUG, true),
            ("tokenizers::tokenizer", Level::TRACE, false),
            ("hyper::proto", Level::DEBUG, false),
            ("talented", Level::DEBUG, false),
            ("log", Level::DEBUG, false),
            ("ureq", Level::INFO, true),
            ("tokenizers", Level::WARN, true),
        ] {
            assert_eq!(may_log(target, level), may, "{target} {level}");
        }
    }
}
