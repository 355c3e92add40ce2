//! `POST /v1/responses`, without anything stored.
//!
//! Owns: the endpoint's wire shapes. Its bodies become orders of conversations as chats do ([`super::placed_chat`]). Does not
//! know: how a conversation becomes tokens, how calls are written.
//! The reference is the `openai` package's `types/responses/`, version 3.57.

use axum::extract::{Request, State};
use axum::response::Response;

use self::answer::Head;
use super::{placed_chat, text, text_card};
use crate::http::AppState;
use crate::http::admission::with_place;
use crate::http::body::{self, Format, MAX_BODY_BYTES};
use crate::http::error::ApiError;

mod answer;
mod input;
mod output;
pub(in crate::http) mod wire;

/// `POST /v1/responses`.
pub(in crate::http) async fn create(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let received = body::receive(&state, request, Format::Json, MAX_BODY_BYTES).await?;
    with_place(&state, received.client, async |admitted| {
        let ((order, repeated), mut held) = received.read(state.compute(), wire::room_in, wire::response).await?;
        let card = text_card(admitted, &order.model, &order.options).await?;
        let head = Head::new(&order.model, repeated, &text(&card)?.sampling(&order.options, 0)?);
        let placed = placed_chat(&state, admitted, order).await;
        held.shrink_to(head.num_bytes());
        let renamed = |error: ApiError| {
            let error = error.renamed("max_tokens", "max_output_tokens");
            error.renamed("prompt", "input").renamed("messages", "input")
        };
        answer::answer(&state, head, placed.map_err(renamed)?, held).await
    })
    .await
}

/// `GET` and `DELETE /v1/responses/{id}`.
pub(in crate::http) async fn retrieve() -> ApiError {
    ApiError::no_stored_response()
}
