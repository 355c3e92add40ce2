//! `POST /v1/chat/completions` and `POST /v1/completions`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use tale_models::cancel::CancelToken;
use tale_models::parameter::Options;
use tale_models::request::TextRequest;
use tale_models::text_parameters::SEED;
use tale_models::{ModelCard, TextCard};

use self::answer::{Head, Shape};
use self::wire::{MAX_CHOICES, Prompt, TextBody};
use super::admission::{Admitted, with_place};
use super::body::{self, Format, MAX_BODY_BYTES};
use super::error::ApiError;
use super::{AppState, random_seed, sse};
use crate::compute::Compute;

mod answer;
pub mod wire;

/// Prompts of more bytes are turned into tokens on a thread that computes; for shorter ones the way there is longer than
/// the work.
const MAX_INLINE_PROMPT_BYTES: usize = 4096;
/// Bytes of a body that are read in the time in which one byte of a prompt becomes tokens.
const TOKENISING_COST: usize = 16;

/// `POST /v1/chat/completions`.
pub(super) async fn chat(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let received = body::receive(&state, request, Format::Json, MAX_BODY_BYTES).await?;
    with_place(&state, received.client, async |admitted| {
        let (mut body, held) = received.read(state.compute(), wire::room_in_chat, wire::chat).await?;
        let card = text_card(&state, &body.model)?;
        let max_tokens_name = body.settle_max_tokens()?;
        let TextBody { model, options, answer, prompt: messages } = body;
        let num_bytes = messages.iter().map(|message| message.content.len()).sum();
        let encode = move |card: &TextCard, cancelled: &CancelToken| card.encode_chat(&messages, cancelled);
        // Never here: a template is a stranger's program, and takes its time.
        let prompt = encoded(state.compute(), num_bytes, card.clone(), encode).await?;
        drop(held);
        let order = Order { shape: Shape::Chat, model: &model, options, answer };
        let renamed = |error: ApiError| error.renamed("max_tokens", max_tokens_name).renamed("prompt", "messages");
        order.answer(&state, admitted, text(&card)?, vec![prompt]).await.map_err(renamed)
    })
    .await
}

/// `POST /v1/completions`.
pub(super) async fn completion(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let received = body::receive(&state, request, Format::Json, MAX_BODY_BYTES).await?;
    with_place(&state, received.client, async |admitted| {
        let max_tokens = largest_context(&state)?;
        let room_of = move |name: &str| wire::room_in_completion(name, max_tokens);
        let (body, held) = received.read(state.compute(), room_of, wire::completion).await?;
        let TextBody { model, options, answer, prompt: texts } = body;
        let card = text_card(&state, &model)?;
        if texts.len() * answer.n > MAX_CHOICES {
            let problem = format!("has {} prompts; prompts times n may be {MAX_CHOICES} at most", texts.len());
            return Err(ApiError::field("prompt", problem));
        }
        let num_bytes = texts.iter().map(Prompt::num_bytes).sum();
        let encode = move |card: &TextCard, cancelled: &CancelToken| -> tale_models::Result<Vec<_>> {
            texts.into_iter().map(|prompt| prompt.encode(card, cancelled)).collect()
        };
        let prompts = match num_bytes <= MAX_INLINE_PROMPT_BYTES {
            true => encode(text(&card)?, &CancelToken::default())?,
            false => encoded(state.compute(), num_bytes, card.clone(), encode).await?,
        };
        drop(held);
        let order = Order { shape: Shape::Completion, model: &model, options, answer };
        order.answer(&state, admitted, text(&card)?, prompts).await
    })
    .await
}

/// Tokens of the largest context of any model.
fn largest_context(state: &AppState) -> Result<usize, ApiError> {
    let contexts = state.engine()?.models().iter().map(|model| match &*model.card {
        ModelCard::Text(card) => card.max_context,
        ModelCard::Diffusion(_) => 0,
    });
    Ok(contexts.max().unwrap_or(0))
}

/// What a client ordered, apart from the prompts.
struct Order<'a> {
    shape: Shape,
    model: &'a str,
    options: Options,
    answer: wire::AnswerOptions,
}

impl Order<'_> {
    async fn answer(
        self,
        state: &AppState,
        admitted: &Admitted,
        card: &TextCard,
        prompts: Vec<Vec<u32>>,
    ) -> Result<Response, ApiError> {
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        let seed = self.options.get(&SEED).unwrap_or_else(random_seed);
        let mut sessions = Vec::with_capacity(prompts.len() * self.answer.n);
        for prompt in prompts {
            let request = card.resolve(prompt, &self.options, seed)?;
            for choice in 0..self.answer.n {
                sessions.push(admitted.submit(self.model, with_seed(&request, seed, choice))?);
            }
        }
        let head = Head::new(self.shape, self.model);
        if !self.answer.stream {
            return answer::whole(state.compute(), head, sessions, prompt_tokens).await;
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

/// What `encode` makes of so many bytes of text, on a thread that computes.
async fn encoded<T: Send + 'static>(
    compute: &Compute,
    num_bytes: usize,
    card: Arc<ModelCard>,
    encode: impl FnOnce(&TextCard, &CancelToken) -> tale_models::Result<T> + Send + 'static,
) -> Result<T, ApiError> {
    let cost = num_bytes.saturating_mul(TOKENISING_COST);
    compute.run(cost, move |cancelled| text(&card).and_then(|card| Ok(encode(card, cancelled)?))).await?
}
