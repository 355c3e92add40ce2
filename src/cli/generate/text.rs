//! `tale generate text`.

use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde::Serialize;
use tale_models::card::{TextCard, TextOptions};
use tale_models::chat_template::ChatMessage;
use tale_models::request::Usage;
use tale_models::{Event, ModelCard, Request};

use super::{CliError, Generator, ModelArgs, random_seed, wrong_medium};
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
    sampling: SamplingArgs,
}

/// Absent ones take the model's own defaults.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArgs {
    /// Most tokens to generate [default: what is left of the model's context]
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,

    /// 0 is greedy, up to 2 [default: the model's own, or 1]
    #[arg(long, value_name = "X")]
    temperature: Option<f32>,

    /// Keep the smallest set of tokens whose probability reaches this [default: the model's own, or 1]
    #[arg(long, value_name = "X")]
    top_p: Option<f32>,

    /// Keep the N most likely tokens; 0 keeps all [default: the model's own, or 0]
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,

    /// Drop tokens less likely than this times the most likely one [default: the model's own, or 0]
    #[arg(long, value_name = "X")]
    min_p: Option<f32>,

    /// Subtracted once from each token that was generated, -2 to 2 [default: 0]
    #[arg(long, value_name = "X")]
    presence_penalty: Option<f32>,

    /// Subtracted for every time that a token was generated, -2 to 2 [default: 0]
    #[arg(long, value_name = "X")]
    frequency_penalty: Option<f32>,

    /// Weakens tokens of prompt and answer when above 1 [default: the model's own, or 1]
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f32>,

    /// The same seed gives the same tokens [default: drawn]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    /// Go on past end-of-sequence tokens until --max-tokens
    #[arg(long)]
    ignore_eos: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Input {
    /// Plain text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,

    /// A JSON file with a conversation: [{"role": "user", "content": "..."}, ...]
    #[arg(long, value_name = "FILE")]
    messages: Option<PathBuf>,
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
    let mut options = EngineOptions::default();
    options.load.kv_cache_bytes = args.kv_cache.0;
    let mut generator = Generator::load(&args.model, options)?;
    let card = generator.card.clone();
    let ModelCard::Text(card) = &*card else { return Err(wrong_medium(&card)) };

    let prompt = match (messages, &args.input.prompt) {
        (Some(messages), _) => encode_chat(card, &messages)?,
        (None, prompt) => card.encode_prompt(prompt.as_deref().unwrap_or_default())?,
    };
    let request = card.resolve(prompt, args.sampling.options(), random_seed())?;
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
            Event::Text { tokens, text } => on_text(&tokens, &text)?,
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

fn encode_chat(card: &TextCard, messages: &[ChatMessage]) -> Result<Vec<u32>, CliError> {
    if card.chat_template.is_none() {
        return Err(CliError::Argument("--messages: this model has no chat template; use --prompt".into()));
    }
    Ok(card.encode_chat(messages)?)
}

impl SamplingArgs {
    fn options(self) -> TextOptions {
        TextOptions {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
            stop: self.stop,
            ignore_eos: self.ignore_eos,
        }
    }
}
