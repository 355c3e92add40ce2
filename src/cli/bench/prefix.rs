//! `tale bench prefix`: how long a second question behind one system prompt waits for its first token.
//!
//! Through the engine that serves, without HTTP. The second question differs from the first, as those of two conversations do.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use tale_models::checkpoint::LoadFormat;
use tale_models::parameter::Options;
use tale_models::presets::{Configurations, Preset};
use tale_models::text_parameters::{IGNORE_EOS, MAX_TOKENS, TEMPERATURE};
use tale_models::{ClientId, Event, ModelCard, Request, TextCard};

use super::step::parse_preset;
use super::{DeviceArgs, print_line};
use crate::cli::{CliError, progress};
use crate::engine::{Engine, ModelSpec};

/// The model's name in the engine.
const MODEL: &str = "text";

#[derive(Debug, Args)]
pub struct PrefixArgs {
    /// A language model, by the name of its published configuration, with random weights
    #[arg(long, value_name = "NAME", default_value = "tinyllama-1.1b", value_parser = parse_preset)]
    preset: &'static Preset,

    /// A checkpoint, a folder or a GGUF file, instead of --preset
    #[arg(long, value_name = "PATH", conflicts_with = "preset")]
    model: Option<PathBuf>,

    /// Keep at most N layers; of a preset only
    #[arg(long, value_name = "N", conflicts_with = "model")]
    layers: Option<NonZeroUsize>,

    #[command(flatten)]
    place: DeviceArgs,

    /// Tokens of the system prompt
    #[arg(long, value_name = "N", default_value = "1500")]
    prompt_tokens: NonZeroUsize,

    /// Tokens of each question behind it
    #[arg(long, value_name = "N", default_value = "24")]
    question_tokens: NonZeroUsize,
}

pub fn run(args: &PrefixArgs) -> Result<(), CliError> {
    let engine = load(args)?;
    let card = engine.card(MODEL).expect("it was just loaded under this name: this is a bug");
    let ModelCard::Text(card) = &*card else {
        return Err(CliError::Argument("--model: is no language model".into()));
    };
    // Loads what a first step loads; its prompt is another one.
    ask(&engine, card, vec![0])?;
    let first = ask(&engine, card, prompt(args, card, 1))?;
    let second = ask(&engine, card, prompt(args, card, 2))?;
    for (name, asked) in [("first", &first), ("second", &second)] {
        let Asked { first_token, prompt_tokens, cached_tokens } = asked;
        let ms = first_token.as_secs_f64() * 1e3;
        print_line(format!(
            "{name:<7} first token after {ms:.1} ms, {cached_tokens} of {prompt_tokens} tokens of the prompt cached"
        ))?;
    }
    print_line(format!("{:.1} times sooner", first.first_token.as_secs_f64() / second.first_token.as_secs_f64()))
}

fn load(args: &PrefixArgs) -> Result<Engine, CliError> {
    let mut options = args.place.engine_options();
    let folder = match &args.model {
        Some(_) => None,
        None => {
            options.load.load_format = LoadFormat::Dummy;
            let folder = Configurations::of_preset(args.preset)?;
            if let Some(layers) = args.layers {
                folder.keep_layers(layers.get())?;
            }
            Some(folder)
        }
    };
    let path = folder.as_ref().map_or_else(|| args.model.clone().unwrap_or_default(), |f| f.path().to_owned());
    let model = ModelSpec::new(MODEL, path.as_path());
    let bar = progress::loading();
    let told = bar.clone();
    let engine = Engine::load(vec![model], options, move |model, component| {
        told.set_message(format!("{model} {component}"));
    });
    bar.finish_and_clear();
    Ok(engine?)
}

/// The system prompt, and question `number` behind it.
fn prompt(args: &PrefixArgs, card: &TextCard, number: usize) -> Vec<u32> {
    let system = (0..args.prompt_tokens.get()).map(|place| place * 7);
    let question = (0..args.question_tokens.get()).map(|place| number * 13 + place * 5);
    system.chain(question).map(|token| (token % card.vocab_size) as u32).collect()
}

struct Asked {
    first_token: Duration,
    prompt_tokens: usize,
    cached_tokens: usize,
}

/// How long a request waits for its only token.
fn ask(engine: &Engine, card: &TextCard, prompt: Vec<u32>) -> Result<Asked, CliError> {
    let options = Options::default().with(&MAX_TOKENS, 1).with(&TEMPERATURE, 0.0).with(&IGNORE_EOS, true);
    let request = card.resolve(prompt, &options, 0)?;
    let begun = Instant::now();
    let mut first_token = None;
    let mut session = engine.submit(MODEL, ClientId::default(), Request::Text(request))?;
    loop {
        match session.blocking_recv() {
            Some(Event::Text { .. }) => {
                first_token.get_or_insert(begun.elapsed());
            }
            Some(Event::Finished { usage, .. }) => {
                return Ok(Asked {
                    first_token: first_token.unwrap_or_else(|| begun.elapsed()),
                    prompt_tokens: usage.prompt_tokens,
                    cached_tokens: usage.cached_tokens.unwrap_or(0),
                });
            }
            Some(Event::Failed(error)) => return Err(error.into()),
            Some(_) => (),
            None => return Err(CliError::EngineGone),
        }
    }
}
