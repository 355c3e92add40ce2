//! `POST /v1/chat/completions`, `POST /v1/completions` and, in a room of its own, `POST /v1/responses`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use tale_models::cancel::CancelToken;
use tale_models::chat_template::Conversation;
use tale_models::grammar::Asked;
use tale_models::parameter::Options;
use tale_models::request::TextRequest;
use tale_models::text_parameters::SEED;
use tale_models::tokenizer::Tokenizer;
use tale_models::tools::ToolFormat;
use tale_models::{Encoding, ModelCard, TextCard};

use self::answer::Head;
use self::logprobs::Echo;
use self::wire::{Encoded, MAX_CHOICES, TextBody};
use super::admission::{Admitted, with_place};
use super::body::{self, Format, MAX_BODY_BYTES};
use super::error::ApiError;
use super::{AppState, random_seed, sse};
use crate::engine::Session;

mod answer;
mod logprobs;
pub(super) mod responses;
pub mod structured;
pub(super) mod tokens;
pub mod tools;
pub mod wire;

/// Which endpoint's shape an answer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

/// Prompts of more bytes are turned into tokens on a thread that computes; for shorter ones the way there is longer than
/// the work.
const MAX_INLINE_PROMPT_BYTES: usize = 4096;
/// Bytes of a body that are read in the time in which one byte of a prompt becomes tokens.
const TOKENISING_COST: usize = 16;
/// Bytes of a body that are read in the time in which a grammar is compiled, which makes it long work.
const GRAMMAR_COST: usize = 1 << 20;

/// `POST /v1/chat/completions`.
pub(super) async fn chat(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let received = body::receive(&state, request, Format::Json, MAX_BODY_BYTES).await?;
    with_place(&state, received.client, async |admitted| {
        let (mut body, held) = received.read(state.compute(), wire::room_in_chat, wire::chat).await?;
        let max_tokens_name = body.settle_max_tokens()?;
        let placed = placed_chat(&state, admitted, body).await;
        drop(held);
        let renamed = |error: ApiError| error.renamed("max_tokens", max_tokens_name).renamed("prompt", "messages");
        placed.map_err(renamed)?.answer(&state, Shape::Chat).await
    })
    .await
}

/// The order for the next message of a conversation, placed. Errors are about `prompt` and `max_tokens`.
async fn placed_chat(state: &AppState, admitted: &Admitted, body: TextBody<Conversation>) -> Result<Placed, ApiError> {
    let card = text_card(admitted, &body.model, &body.options).await?;
    let TextBody { model, options, answer, asked, tools, prompt: mut conversation } = body;
    let encoding = wire::encoding(&options, Encoding::CHAT);
    let is_plain = asked.is_none() && tools.is_none();
    let short = if is_plain { text(&card)?.encode_short_chat(&conversation, encoding) } else { None };
    conversation.tools = tools.as_ref().map_or(Vec::new(), |tools| tools.all().to_vec());
    let (asked, tool_format) = match tools {
        Some(tools) => tools.held_to(text(&card)?, asked).map(|(asked, format)| (Some(asked), Some(format)))?,
        None => (asked, None),
    };
    let order = Order { model, options, answer, asked, tool_format };
    match short {
        Some(prompt) => order.place(admitted, text(&card)?, vec![prompt?.into()]),
        // A template is a stranger's program, and may take its time, as a grammar does.
        None => {
            let num_bytes = conversation.num_bytes();
            let encode = move |card: &TextCard, cancelled: &CancelToken| {
                Ok(vec![card.encode_chat(&conversation, encoding, cancelled)?.into()])
            };
            placed(state, admitted, num_bytes, card, order, encode).await
        }
    }
}

/// `POST /v1/completions`.
pub(super) async fn completion(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let received = body::receive(&state, request, Format::Json, MAX_BODY_BYTES).await?;
    with_place(&state, received.client, async |admitted| {
        let max_tokens = largest_context(&state)?;
        let room_of = move |name: &str| wire::room_in_completion(name, max_tokens);
        let (body, held) = received.read(state.compute(), room_of, wire::completion).await?;
        let TextBody { model, options, answer, asked, prompt: texts, .. } = body;
        let card = text_card(admitted, &model, &options).await?;
        if texts.len() * answer.best_of > MAX_CHOICES {
            let times = if answer.best_of > answer.n { "best_of" } else { "n" };
            let problem = format!("has {} prompts; prompts times {times} may be {MAX_CHOICES} at most", texts.len());
            return Err(ApiError::field("prompt", problem));
        }
        let echoes = answer.echo;
        let num_bytes = texts.iter().map(|prompt| prompt.num_bytes(echoes)).sum();
        let encoding = wire::encoding(&options, Encoding::PROMPT);
        let encode = move |card: &TextCard, cancelled: &CancelToken| -> tale_models::Result<Vec<_>> {
            texts.into_iter().map(|prompt| prompt.encode(card, encoding, echoes, cancelled)).collect()
        };
        let is_little = num_bytes <= MAX_INLINE_PROMPT_BYTES && asked.is_none();
        let order = Order { model, options, answer, asked, tool_format: None };
        let placed = match is_little {
            true => {
                let card = text(&card)?;
                order.place(admitted, card, encode(card, &CancelToken::default())?)?
            }
            false => placed(&state, admitted, num_bytes, card, order, encode).await?,
        };
        drop(held);
        placed.answer(&state, Shape::Completion).await
    })
    .await
}

/// Tokens of the largest context of any model; of one that is not there nothing is known but that a body has a byte for each.
fn largest_context(state: &AppState) -> Result<usize, ApiError> {
    let engine = state.engine()?;
    let cards = engine.cards();
    if cards.len() < engine.models().len() {
        return Ok(MAX_BODY_BYTES);
    }
    let contexts = cards.iter().map(|card| match &**card {
        ModelCard::Text(card) => card.max_context,
        ModelCard::Diffusion(_) => 0,
    });
    Ok(contexts.max().unwrap_or(0))
}

/// What a client ordered, apart from the prompts.
struct Order {
    model: String,
    options: Options,
    answer: wire::AnswerOptions,
    asked: Option<Asked>,
    /// How the answer's calls of tools are written, if it may have some.
    tool_format: Option<ToolFormat>,
}

/// An order whose sessions the engine has.
struct Placed {
    order: Order,
    tokenizer: Tokenizer,
    /// Those of one prompt after the other.
    sessions: Vec<Session>,
    /// Of each session.
    echoes: Vec<Option<Arc<Echo>>>,
    prompt_tokens: usize,
}

impl Order {
    /// Gives the engine the sessions of these prompts.
    fn place(mut self, admitted: &Admitted, card: &TextCard, prompts: Vec<Encoded>) -> Result<Placed, ApiError> {
        let prompt_tokens = prompts.iter().map(|prompt| prompt.tokens.len()).sum();
        let seed = self.options.get(&SEED).unwrap_or_else(random_seed);
        let grammar = self.asked.take().map(|asked| card.grammar(asked, &self.options)).transpose()?;
        let wire::AnswerOptions { n, best_of, .. } = self.answer;
        let count = prompts.len() * best_of;
        let (mut sessions, mut echoes) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for Encoded { tokens, echo } in prompts {
            let mut request = card.resolve(tokens, &self.options, seed)?.held_to(grammar.clone());
            // By which the best ones are known.
            request.logprobs = request.logprobs.or((best_of > n).then_some(0));
            logprobs::check_count(&request, count)?;
            for choice in 0..best_of {
                sessions.push(admitted.submit(&self.model, with_seed(&request, seed, choice))?);
                echoes.push(echo.clone());
            }
        }
        Ok(Placed { order: self, tokenizer: card.tokenizer.clone(), sessions, echoes, prompt_tokens })
    }
}

impl Placed {
    /// The answer of the endpoint of this shape.
    async fn answer(self, state: &AppState, shape: Shape) -> Result<Response, ApiError> {
        let Self { order, tokenizer, mut sessions, echoes, prompt_tokens } = self;
        let Order { model, answer, tool_format, .. } = order;
        let head = Head::new(shape, &model, tool_format, tokenizer);
        if !answer.stream {
            return answer::whole(state.compute(), head, sessions, echoes, prompt_tokens, answer).await;
        }
        if let Some(first) = sessions.first_mut() {
            sse::first_event(first).await?;
        }
        Ok(answer::stream(head, sessions, echoes, prompt_tokens, answer))
    }
}

/// Choice i of a request has the request's seed plus i, so that each can be had again alone.
fn with_seed(request: &TextRequest, seed: u64, choice: usize) -> tale_models::Request {
    let mut request = request.clone();
    request.sampling.seed = seed.wrapping_add(choice as u64);
    tale_models::Request::Text(request)
}

async fn text_card(admitted: &Admitted, model: &str, options: &Options) -> Result<Arc<ModelCard>, ApiError> {
    let card = admitted.card(model, options).await?;
    text(&card).map(|_| card.clone())
}

fn text(card: &ModelCard) -> Result<&TextCard, ApiError> {
    match card {
        ModelCard::Text(card) => Ok(card),
        ModelCard::Diffusion(card) => Err(super::wrong_endpoint(card)),
    }
}

/// The order, placed for what `encode` makes of so many bytes of text, both on a thread that computes: the engine is nearer
/// from there than over the thread that waits.
async fn placed(
    state: &AppState,
    admitted: &Admitted,
    num_bytes: usize,
    card: Arc<ModelCard>,
    order: Order,
    encode: impl FnOnce(&TextCard, &CancelToken) -> tale_models::Result<Vec<Encoded>> + Send + 'static,
) -> Result<Placed, ApiError> {
    let grammar_bytes = if order.asked.is_some() { GRAMMAR_COST } else { 0 };
    let cost = num_bytes.saturating_mul(TOKENISING_COST).saturating_add(grammar_bytes);
    let admitted = admitted.clone();
    let place = move |cancelled: &CancelToken| {
        let card = text(&card)?;
        order.place(&admitted, card, encode(card, cancelled)?)
    };
    state.compute().run(cost, place).await?
}
