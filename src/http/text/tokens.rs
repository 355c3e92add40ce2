//! `POST /tokenize` and `POST /detokenize`, in the shapes of vLLM (`entrypoints/openai/protocol.py`), and the refusal of
//! `POST /v1/embeddings`.

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tale_models::cancel::CancelToken;
use tale_models::chat_template::Conversation;
use tale_models::parameter::{Declaration, Options, Parameter, TEXT};
use tale_models::{Encoding, ModelCard, TextCard};

use super::wire::{self, ADD_GENERATION_PROMPT, ADD_SPECIAL_TOKENS, CONTINUE_FINAL_MESSAGE};
use super::{TOKENISING_COST, largest_context, text, text_card};
use crate::http::admission::with_place;
use crate::http::body::value::{Room, Value};
use crate::http::body::{self, Format, MAX_BODY_BYTES};
use crate::http::cold_start::ALLOW_COLD_START;
use crate::http::diffusion::MODEL;
use crate::http::error::ApiError;
use crate::http::{AppState, parameters, wrong_endpoint};

static RETURN_TOKEN_STRS: Parameter<bool> =
    Parameter::boolean("return_token_strs", "Also give the tokens as the vocabulary spells them. False when absent.")
        .only_for(TEXT);

/// The declared fields of `/tokenize`.
pub(in crate::http) static TOKENIZE: &[&Declaration] = &[
    &MODEL.declaration,
    &ADD_GENERATION_PROMPT.declaration,
    &CONTINUE_FINAL_MESSAGE.declaration,
    &ADD_SPECIAL_TOKENS.declaration,
    &RETURN_TOKEN_STRS.declaration,
    &ALLOW_COLD_START.declaration,
];

/// The same of `/detokenize`.
pub(in crate::http) static DETOKENIZE: &[&Declaration] = &[&MODEL.declaration, &ALLOW_COLD_START.declaration];

/// What is to be tokenised.
enum Input {
    Text(String),
    Chat(Conversation),
}

struct TokenizeBody {
    options: Options,
    input: Input,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenizeFields {
    prompt: Option<String>,
    messages: Option<Vec<wire::WireMessage>>,
    chat_template_kwargs: Option<serde_json::Map<String, serde_json::Value>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DetokenizeFields {
    tokens: Vec<u32>,
}

#[derive(Serialize)]
struct Tokens {
    count: usize,
    max_model_len: usize,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize)]
struct Text {
    prompt: String,
}

/// `POST /tokenize`.
pub(in crate::http) async fn tokenize(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let received = body::receive(&state, request, Format::Json, MAX_BODY_BYTES).await?;
    with_place(&state, received.client, async |admitted| {
        let (TokenizeBody { options, input }, held) =
            received.read(state.compute(), wire::room_in_chat, tokenize_body).await?;
        let card = text_card(admitted, &options.get(&MODEL).unwrap_or_default(), &options).await?;
        let cost = input.num_bytes().saturating_mul(TOKENISING_COST);
        let answer = move |cancelled: &CancelToken| {
            let card = text(&card)?;
            let tokens = input.encode(card, &options, cancelled)?;
            let spelled = options.get(&RETURN_TOKEN_STRS).unwrap_or(false);
            let spell =
                |tokens: &[u32]| tokens.iter().map(|id| card.tokenizer.token(*id).unwrap_or_default()).collect();
            let token_strs = spelled.then(|| spell(&tokens));
            let max_model_len = card.max_context;
            Ok(Json(Tokens { count: tokens.len(), max_model_len, tokens, token_strs }).into_response())
        };
        let answer = state.compute().run(cost, answer).await?;
        drop(held);
        answer
    })
    .await
}

/// `POST /detokenize`.
pub(in crate::http) async fn detokenize(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let received = body::receive(&state, request, Format::Json, MAX_BODY_BYTES).await?;
    with_place(&state, received.client, async |admitted| {
        let max_tokens = largest_context(&state)?;
        let room_of = move |name: &str| match name {
            "tokens" => Room { max_numbers: max_tokens, max_values: max_tokens.saturating_add(1), ..Room::SMALL },
            name => parameters::room_in(DETOKENIZE, name),
        };
        let ((options, tokens), held) = received.read(state.compute(), room_of, detokenize_body).await?;
        let card = text_card(admitted, &options.get(&MODEL).unwrap_or_default(), &options).await?;
        let num_tokens = tokens.len();
        let answer = move |_: &CancelToken| {
            let card = text(&card)?;
            if let Some(at) = tokens.iter().position(|token| *token as usize >= card.vocab_size) {
                let problem = format!("is {}; this model's vocabulary ends at {}", tokens[at], card.vocab_size - 1);
                return Err(ApiError::field(format!("tokens[{at}]"), problem));
            }
            Ok(Json(Text { prompt: card.tokenizer.decode_all(&tokens)? }).into_response())
        };
        let answer = state.compute().run(num_tokens, answer).await?;
        drop(held);
        answer
    })
    .await
}

/// `POST /v1/embeddings`: no model that is served makes any.
pub(in crate::http) async fn embeddings(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let received = body::receive(&state, request, Format::Json, MAX_BODY_BYTES).await?;
    let max_tokens = largest_context(&state)?;
    let room_of = move |name: &str| match name {
        "input" => wire::room_in_completion("prompt", max_tokens),
        name => wire::room_in_completion(name, max_tokens),
    };
    let model = |body: Value| match body.into_object()?.swap_remove(MODEL.declaration.name) {
        Some(Value::Text(model)) => Ok(model),
        _ => Err(ApiError::field_code(MODEL.declaration.name, "missing_required_parameter", "is missing")),
    };
    let (model, _) = received.read(state.compute(), room_of, model).await?;
    Err(match &*state.engine()?.model(&model)?.card() {
        ModelCard::Text(_) => ApiError::field("model", "is a language model; it makes no embeddings"),
        ModelCard::Diffusion(card) => wrong_endpoint(card),
    })
}

fn tokenize_body(body: Value) -> Result<TokenizeBody, ApiError> {
    let mut body = body.into_object()?;
    let others = ["prompt", "messages", "chat_template_kwargs"];
    let options = parameters::take(&mut body, TOKENIZE, &others)?.options;
    let TokenizeFields { prompt, messages, chat_template_kwargs } = body::read(Value::Object(body))?;
    let is_of_chats = options.has(&ADD_GENERATION_PROMPT) || options.has(&CONTINUE_FINAL_MESSAGE);
    let input = match (prompt, messages) {
        (Some(_), Some(_)) => return Err(ApiError::field("messages", "stands beside prompt; give one of them")),
        (None, None) => return Err(ApiError::field_code("prompt", "missing_required_parameter", "is missing")),
        (Some(_), None) if chat_template_kwargs.is_some() || is_of_chats => {
            return Err(ApiError::field("prompt", "is no conversation; the fields of chats need messages"));
        }
        (Some(prompt), None) => Input::Text(prompt),
        (None, Some(messages)) => Input::Chat(wire::conversation(messages, chat_template_kwargs, &options)?),
    };
    Ok(TokenizeBody { options, input })
}

fn detokenize_body(body: Value) -> Result<(Options, Vec<u32>), ApiError> {
    let mut body = body.into_object()?;
    let options = parameters::take(&mut body, DETOKENIZE, &["tokens"])?.options;
    let DetokenizeFields { tokens } = body::read(Value::Object(body))?;
    Ok((options, tokens))
}

impl Input {
    fn num_bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Chat(conversation) => conversation.num_bytes(),
        }
    }

    fn encode(&self, card: &TextCard, options: &Options, cancelled: &CancelToken) -> tale_models::Result<Vec<u32>> {
        match self {
            Self::Text(text) => card.encode(text, wire::encoding(options, Encoding::PROMPT), cancelled),
            Self::Chat(chat) => card.encode_chat(chat, wire::encoding(options, Encoding::CHAT), cancelled),
        }
    }
}
