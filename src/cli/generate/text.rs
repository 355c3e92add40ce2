//! `tale generate text`.

use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde::Serialize;
use tale_models::cancel::CancelToken;
use tale_models::card::{Encoding, TextCard};
use tale_models::chat_template::{ChatMessage, Conversation};
use tale_models::parameter::Options;
use tale_models::request::Usage;
use tale_models::{Event, ModelCard, Request};

use super::{CliError, Generator, ModelArgs, random_seed, wrong_medium};
use crate::cli::parameters::{ParameterArgs, Text};
use crate::cli::prompt::{self, Source};
use crate::config::ByteSize;
use crate::engine::EngineOptions;

#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub struct TextArgs {
    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    input: Input,

    /// Print one JSON object at the end: prompt_tokens, tokens, text
    #[arg(long)]
    json: bool,

    /// Key/value cache, such as 4GiB
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    kv_cache: ByteSize,

    // Last: its heading goes on to whatever follows.
    #[command(flatten)]
    sampling: ParameterArgs<Text>,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Input {
    /// Plain text to continue; - reads it from standard input. What stands on a command line, others can see
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,

    /// A file with plain text to continue
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,

    /// A JSON file with a conversation: [{"role": "user", "content": "..."}, ...]
    #[arg(long, value_name = "FILE")]
    messages: Option<PathBuf>,
}

impl Input {
    /// The text to continue; empty where a conversation is given.
    fn text(&self) -> Result<String, CliError> {
        match (&self.prompt, &self.prompt_file) {
            (Some(text), _) if text == prompt::STDIN => Source::Stdin.read("--prompt"),
            (Some(text), _) => Ok(text.clone()),
            (None, Some(path)) => Source::File(path.clone()).read("--prompt-file"),
            (None, None) => Ok(String::new()),
        }
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Answer<'a> {
    prompt_tokens: &'a [u32],
    tokens: Vec<u32>,
    text: String,
}

pub fn run(args: TextArgs) -> Result<(), CliError> {
    let messages = args.input.messages.as_deref().map(read_messages).transpose()?;
    let text = args.input.text()?;
    let mut options = EngineOptions::default();
    options.load.kv_cache_bytes = args.kv_cache.0;
    let mut generator = Generator::load(&args.model, options)?;
    let card = generator.card.clone();
    let ModelCard::Text(card) = &*card else { return Err(wrong_medium(&card)) };

    let prompt = match messages {
        Some(messages) => encode_chat(card, &messages.into())?,
        None => card.encode(&text, Encoding::PROMPT, &CancelToken::default())?,
    };
    let request = card.resolve(prompt, &args.sampling.options_over(Options::default())?, random_seed())?;
    let prompt_tokens = request.prompt.clone();
    generator.note(|| format!("{} prompt tokens, seed {}", prompt_tokens.len(), request.sampling.seed));

    let began = Instant::now();
    let mut answer = Answer { prompt_tokens: &prompt_tokens, tokens: Vec::new(), text: String::new() };
    let usage = follow(&mut generator, Request::Text(request), |tokens, text| {
        answer.tokens.extend(tokens);
        answer.text.push_str(text);
        if args.json { Ok(()) } else { print(text) }
    })?;
    if args.json {
        print(&serde_json::to_string(&answer).expect("numbers and text are always JSON: this is a bug"))?;
    }
    print("\n")?;
    let seconds = began.elapsed().as_secs_f64();
    generator.note(|| format!("{} tokens in {seconds:.2} s", usage.completion_tokens));
    Ok(())
}

fn follow(
    generator: &mut Generator,
    request: Request,
    mut on_text: impl FnMut(&[u32], &str) -> Result<(), CliError>,
) -> Result<Usage, CliError> {
    let session = generator.submit(request)?;
    let mut running = generator.run(session);
    loop {
        match running.next()? {
            Event::Text { tokens, text, .. } => on_text(&tokens, &text)?,
            Event::Finished { usage, .. } => return Ok(usage),
            _ => {}
        }
    }
}

fn print(text: &str) -> Result<(), CliError> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(CliError::stdout)
}

fn read_messages(path: &Path) -> Result<Vec<ChatMessage>, CliError> {
    let text = std::fs::read(path).map_err(|source| CliError::File { path: path.into(), source })?;
    let mut json = serde_json::Deserializer::from_slice(&text);
    let messages: Vec<ChatMessage> = serde_path_to_error::deserialize(&mut json)
        .map_err(|error| CliError::Argument(format!("--messages: {}: {error}", path.display())))?;
    json.end().map_err(|error| CliError::Argument(format!("--messages: {}: {error}", path.display())))?;
    Ok(messages)
}

fn encode_chat(card: &TextCard, conversation: &Conversation) -> Result<Vec<u32>, CliError> {
    if card.chat_template.is_none() {
        return Err(CliError::Argument("--messages: this model has no chat template; use --prompt".into()));
    }
    Ok(card.encode_chat(conversation, Encoding::CHAT, &CancelToken::default())?)
}
