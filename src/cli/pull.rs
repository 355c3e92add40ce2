//! `tale pull`: the only part of Tale that reaches out to a network.
//!
//! Owns: which files of a repository are fetched and where they go. Does not know: the hub's protocol (hf-hub does).

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write, stdout};
use std::path::{Component, Path, PathBuf};

use clap::Args;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Repo, RepoType};
use tracing_subscriber::filter::LevelFilter;

use super::logs::{self, Libraries};
use super::{CliError, progress, threads};
use crate::config::LogFormat;

/// What a checkpoint may consist of. Pickles (`.bin`, `.pt`, `.ckpt`) run code when they are read: never fetched.
const EXTENSIONS: [&str; 5] = ["safetensors", "json", "txt", "model", "jinja"];
/// Precision variants beside the plain weights, which are enough.
const VARIANTS: [&str; 2] = [".fp16", ".bf16"];
/// Folder inside the output that holds what is not whole yet; a second `tale pull` goes on from there.
const PARTIAL_DIR: &str = ".tale-pull";
/// Times that a broken download is taken up again.
const MAX_RETRIES: usize = 5;
/// Where models are fetched from unless `HF_ENDPOINT` says otherwise.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

#[derive(Debug, Args)]
pub struct PullArgs {
    /// The repository, such as Qwen/Qwen2.5-0.5B-Instruct
    #[arg(value_name = "REPO")]
    repo: String,

    /// Branch, tag or commit
    #[arg(long, value_name = "NAME", default_value = "main")]
    revision: String,

    /// Folder to put the checkpoint into [default: the last part of the repository's name]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

/// Why a checkpoint was not fetched.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// Not `OWNER/NAME`.
    #[error("`{repo}` is not a repository; expected OWNER/NAME, such as Qwen/Qwen2.5-0.5B-Instruct")]
    BadRepo {
        /// What was given.
        repo: String,
    },
    /// The hub's answer, or that there was none.
    #[error("{endpoint}: {what}: {problem}")]
    Hub {
        /// Where.
        endpoint: String,
        /// The repository or file.
        what: String,
        /// Why, with what can be done about it.
        problem: String,
    },
    /// The repository has no file that a checkpoint could consist of.
    #[error("{repo} has no safetensors files; pickles (.bin, .pt, .ckpt) are not fetched")]
    NoWeights {
        /// The repository.
        repo: String,
    },
    /// A file name that leads out of the folder.
    #[error("{repo} names a file `{file}`, which leads out of the folder; nothing was fetched")]
    UnsafeName {
        /// The repository.
        repo: String,
        /// The name.
        file: String,
    },
}

/// Fetches the checkpoint and prints the folder's path.
pub fn run(args: &PullArgs) -> Result<(), CliError> {
    logs::init(LogFormat::Text, LevelFilter::WARN, Libraries::Quiet);
    threads::check()?;
    let name = check_repo(&args.repo)?;
    let output = args.output.clone().unwrap_or_else(|| name.into());
    let hub = Hub::connect(args, &output.join(PARTIAL_DIR))?;
    for file in &hub.files {
        let target = output.join(file);
        if !target.exists() {
            put(&hub.fetch(file)?, &target)?;
        }
    }
    let partial = output.join(PARTIAL_DIR);
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(|source| CliError::File { path: partial, source })?;
    }
    writeln!(stdout(), "{}", output.display()).map_err(CliError::stdout)
}

/// One repository at one commit, and its files that we want.
struct Hub {
    endpoint: String,
    repo: ApiRepo,
    files: Vec<String>,
}

impl Hub {
    fn connect(args: &PullArgs, cache: &Path) -> Result<Self, CliError> {
        let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| DEFAULT_ENDPOINT.into());
        let failed = |error| hub_error(&endpoint, &args.repo, &error);
        let mut builder = ApiBuilder::from_env()
            .with_endpoint(endpoint.clone())
            .with_cache_dir(absolute(cache)?)
            .with_progress(progress::is_watched())
            .with_retries(MAX_RETRIES)
            .with_user_agent("tale", env!("CARGO_PKG_VERSION"));
        if let Ok(token) = std::env::var("HF_TOKEN") {
            builder = builder.with_token(Some(token));
        }
        let api = builder.build().map_err(failed)?;
        let revision = Repo::with_revision(args.repo.clone(), RepoType::Model, args.revision.clone());
        let info = api.repo(revision).info().map_err(failed)?;
        let names = info.siblings.into_iter().map(|file| file.rfilename).collect();
        let files = wanted_files(&args.repo, names)?;
        // Pinned: a push to the branch in the middle must not mix two versions.
        let repo = api.repo(Repo::with_revision(args.repo.clone(), RepoType::Model, info.sha));
        Ok(Self { endpoint, repo, files })
    }

    /// Path of the fetched file in the partial folder.
    fn fetch(&self, file: &str) -> Result<PathBuf, CliError> {
        Ok(self.repo.get(file).map_err(|error| hub_error(&self.endpoint, file, &error))?)
    }
}

/// hf-hub links files relative to each other and wants absolute paths for that.
fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    std::path::absolute(path).map_err(|source| CliError::File { path: path.into(), source })
}

fn hub_error(endpoint: &str, what: &str, error: &ApiError) -> PullError {
    let problem = match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(401 | 403) => {
                "access denied; accept the model's licence on the hub and set HF_TOKEN".to_owned()
            }
            ureq::Error::StatusCode(404) => "not found; private repositories need HF_TOKEN".to_owned(),
            _ => format!("{error}; without the network, copy the checkpoint folder by hand"),
        },
        error => error.to_string(),
    };
    PullError::Hub { endpoint: endpoint.into(), what: what.into(), problem }
}

/// The repository's own name, which becomes the folder.
fn check_repo(repo: &str) -> Result<&str, PullError> {
    let bad = || PullError::BadRepo { repo: repo.into() };
    let fits = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let (owner, name) = repo.split_once('/').ok_or_else(bad)?;
    if fits(owner) && fits(name) { Ok(name) } else { Err(bad()) }
}

/// The files of a checkpoint, without the copies of the same weights that many repositories also hold.
fn wanted_files(repo: &str, names: Vec<String>) -> Result<Vec<String>, PullError> {
    let is_pipeline = names.iter().any(|name| name == "model_index.json");
    let mut wanted: BTreeSet<String> = names.into_iter().filter(|name| has_wanted_extension(name)).collect();
    if is_pipeline {
        // A pipeline's weights lie in its component folders; at the root lies the same in another layout.
        wanted.retain(|name| name.contains('/') || !is_weights(name));
    }
    let plain: BTreeSet<PathBuf> =
        wanted.iter().filter(|name| is_weights(name) && !is_variant(name)).map(|name| folder_of(name)).collect();
    wanted.retain(|name| !is_variant(name) || !plain.contains(&folder_of(name)));

    if let Some(file) = wanted.iter().find(|name| !is_safe(name)) {
        return Err(PullError::UnsafeName { repo: repo.into(), file: file.clone() });
    }
    if !wanted.iter().any(|name| is_weights(name)) {
        return Err(PullError::NoWeights { repo: repo.into() });
    }
    Ok(wanted.into_iter().collect())
}

fn has_wanted_extension(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| EXTENSIONS.iter().any(|wanted| extension == *wanted))
}

fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors")
}

/// Whether these are weights, or their index, of a precision variant.
fn is_variant(name: &str) -> bool {
    (is_weights(name) || name.ends_with(".json")) && VARIANTS.iter().any(|variant| name.contains(variant))
}

fn folder_of(name: &str) -> PathBuf {
    Path::new(name).parent().unwrap_or(Path::new("")).to_owned()
}

/// The name comes from the network: it must stay inside the folder.
fn is_safe(name: &str) -> bool {
    Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Moves a fetched file (hf-hub hands out a link to it) to its place.
fn put(fetched: &Path, target: &Path) -> Result<(), CliError> {
    let moved = || -> io::Result<()> {
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::rename(fs::canonicalize(fetched)?, target)
    };
    moved().map_err(|source| CliError::File { path: target.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(names: &[&str]) -> Result<Vec<String>, PullError> {
        wanted_files("a/b", names.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_language_model_comes_without_pickles_and_pictures() {
        let names = [
            "README.md",
            "config.json",
            "generation_config.json",
            "merges.txt",
            "chat_template.jinja",
            "tokenizer.model",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "original/consolidated.00.pth",
            "logo.png",
        ];
        let mut expected = names[1..9].to_vec();
        expected.sort_unstable();
        assert_eq!(wanted(&names).unwrap(), expected);
    }

    #[test]
    fn a_pipeline_comes_without_a_second_copy_of_its_weights() {
        let names = [
            "model_index.json",
            "flux1-dev.safetensors",
            "ae.safetensors",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model.safetensors",
            "transformer/diffusion_pytorch_model.fp16.safetensors",
            "text_encoder/model.fp16.safetensors",
            "tokenizer_2/spiece.model",
        ];
        let expected = [
            "model_index.json",
            "text_encoder/model.fp16.safetensors",
            "tokenizer_2/spiece.model",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model.safetensors",
        ];
        assert_eq!(wanted(&names).unwrap(), expected);
    }

    #[test]
    fn names_that_lead_out_of_the_folder_are_refused() {
        for name in ["../x.json", "/etc/x.json", "a/../../x.json"] {
            assert!(matches!(wanted(&["m.safetensors", name]), Err(PullError::UnsafeName { .. })), "{name}");
        }
    }

    #[test]
    fn a_repository_of_pickles_is_refused() {
        assert!(matches!(wanted(&["config.json", "pytorch_model.bin"]), Err(PullError::NoWeights { .. })));
    }

    #[test]
    fn repositories_have_an_owner_and_a_name() {
        assert_eq!(check_repo("Qwen/Qwen2.5-0.5B").unwrap(), "Qwen2.5-0.5B");
        for wrong in ["", "gpt2", "a/b/c", "../x", "a/..", "a b/c", "/c", "a/"] {
            assert!(check_repo(wrong).is_err(), "{wrong}");
        }
    }
}
