//! `POST /v1/chat/completions` and `POST /v1/completions`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use tale_models::cancel::CancelToken;
use tale_models::parameter::Options;
use tale_models::request::TextRequest;
use tale_models::text_parameters::SEED;
use tale_models::{ClientId, ModelCard, TextCard};
use tokio::task::spawn_blocking;

use self::answer::{Head, Shape};
use self::wire::{MAX_CHOICES, Prompt, TextBody};
use super::error::ApiError;
use super::{AppState, body, client, openai, random_seed, sse};
use crate::engine::Engine;

mod answer;
pub mod wire;

/// Prompts of more bytes are turned into tokens on a thread that may block; for shorter ones the way there is longer
/// than the work.
const MAX_INLINE_PROMPT_BYTES: usize = 4096;

/// `POST /v1/chat/completions`.
pub(super) async fn chat(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let client = client::of(&request);
    let mut body = wire::chat(body::json(request, openai::CHAT).await?)?;
    let (engine, card) = (state.engine()?, text_card(&state, &body.model)?);
    let max_tokens_name = body.settle_max_tokens()?;
    let TextBody { model, options, answer, prompt: messages } = body;
    let messages = wire::conversation(messages)?;
    let num_bytes = messages.iter().map(|message| message.content.len()).sum();
    let prompt = tokens(num_bytes, card.clone(), move |card, cancelled| card.encode_chat(&messages, cancelled)).await?;
    let order = Order { shape: Shape::Chat, client, model: &model, options, answer };
    let renamed = |error: ApiError| error.renamed("max_tokens", max_tokens_name).renamed("prompt", "messages");
    order.answer(engine, text(&card)?, vec![prompt]).await.map_err(renamed)
}

/// `POST /v1/completions`.
pub(super) async fn completion(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let client = client::of(&request);
    let body = body::json(request, openai::COMPLETION).await?;
    let TextBody { model, options, answer, prompt: texts } = wire::completion(body)?;
    let (engine, card) = (state.engine()?, text_card(&state, &model)?);
    if texts.len() * answer.n > MAX_CHOICES {
        let problem = format!("has {} prompts; prompts times n may be {MAX_CHOICES} at most", texts.len());
        return Err(ApiError::field("prompt", problem));
    }
    let mut prompts = Vec::with_capacity(texts.len());
    for prompt in texts {
        prompts.push(match prompt {
            Prompt::Tokens(tokens) => tokens,
            Prompt::Text(text) => {
                tokens(text.len(), card.clone(), move |card, cancelled| card.encode_prompt(&text, cancelled)).await?
            }
        });
    }
    let order = Order { shape: Shape::Completion, client, model: &model, options, answer };
    order.answer(engine, text(&card)?, prompts).await
}

/// What a client ordered, apart from the prompts.
struct Order<'a> {
    shape: Shape,
    client: ClientId,
    model: &'a str,
    options: Options,
    answer: wire::AnswerOptions,
}

impl Order<'_> {
    async fn answer(self, engine: &Engine, card: &TextCard, prompts: Vec<Vec<u32>>) -> Result<Response, ApiError> {
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        let seed = self.options.get(&SEED).unwrap_or_else(random_seed);
        let mut sessions = Vec::with_capacity(prompts.len() * self.answer.n);
        for prompt in prompts {
            let request = card.resolve(prompt, &self.options, seed)?;
            for choice in 0..self.answer.n {
                sessions.push(engine.submit(self.model, self.client, with_seed(&request, seed, choice))?);
            }
        }
        let head = Head::new(self.shape, self.model);
        if !self.answer.stream {
            return answer::whole(head, sessions, prompt_tokens).await;
        }
        if let Some(first) = sessions.first_mut() {
            sse::first_event(first).await?;
        }
        Ok(answer::stream(head, sessions, prompt_tokens, self.answer))
    }
}

/// Choice i of a request has the request's seed plus i, so that each can be had again alone.
fn with_seed(request: &TextRequest, seed: u64, choice: usize) -> tale_models::Request {
    let mut request = request.clone();
    request.sampling.seed = seed.wrapping_add(choice as u64);
    tale_models::Request::Text(request)
}

fn text_card(state: &AppState, model: &str) -> Result<Arc<ModelCard>, ApiError> {
    let card = state.engine()?.model(model)?.card.clone();
    text(&card).map(|_| card.clone())
}

fn text(card: &ModelCard) -> Result<&TextCard, ApiError> {
    match card {
        ModelCard::Text(card) => Ok(card),
        ModelCard::Diffusion(card) => Err(super::wrong_endpoint(card)),
    }
}

/// Runs the tokenizer where it does not hold up others.
async fn tokens(
    num_bytes: usize,
    card: Arc<ModelCard>,
    encode: impl FnOnce(&TextCard, &CancelToken) -> tale_models::Result<Vec<u32>> + Send + 'static,
) -> Result<Vec<u32>, ApiError> {
    let cancelled = CancelToken::default();
    if num_bytes <= MAX_INLINE_PROMPT_BYTES {
        return Ok(encode(text(&card)?, &cancelled)?);
    }
    // The client's leaving drops this function.
    let _waits = cancelled.cancel_on_drop();
    let encoded = spawn_blocking(move || text(&card).and_then(|card| Ok(encode(card, &cancelled)?))).await;
    encoded.map_err(|_| ApiError::internal("the tokenizer panicked"))?
}
