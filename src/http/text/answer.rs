//! The answers of `/v1/chat/completions` and `/v1/completions`: whole, or as server-sent events.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::Json;
use axum::body::{Body, Bytes};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde::Serialize;
use tale_models::Event;
use tale_models::request::{FinishReason, Usage};
use uuid::Uuid;

use super::wire::AnswerOptions;
use crate::compute::Compute;
use crate::engine::Session;
use crate::http::error::{ApiError, ErrorEnvelope};
use crate::http::sse::{self, KeepAlive};
use crate::http::{random_seed, unix_seconds};

/// Bytes of events that are joined into one write when a stream runs behind.
const MAX_WRITE_BYTES: usize = 16 << 10;

/// Sizes of choices of a stream with obfuscation are multiples of this: longer than what most events say.
const EVENT_BYTES: usize = 64;

/// Which endpoint's shape an answer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

/// What all parts of an answer share.
#[derive(Debug)]
pub(super) struct Head {
    shape: Shape,
    id: String,
    created: u64,
    model: String,
}

impl Head {
    pub(super) fn new(shape: Shape, model: &str) -> Self {
        let prefix = match shape {
            Shape::Chat => "chatcmpl",
            Shape::Completion => "cmpl",
        };
        let id = format!("{prefix}-{}", Uuid::now_v7().simple());
        Self { shape, id, created: unix_seconds(std::time::SystemTime::now()), model: model.to_owned() }
    }

    fn object(&self, is_chunk: bool) -> &'static str {
        match (self.shape, is_chunk) {
            (Shape::Chat, false) => "chat.completion",
            (Shape::Chat, true) => "chat.completion.chunk",
            (Shape::Completion, _) => "text_completion",
        }
    }

    fn envelope<C>(&self, is_chunk: bool, choices: C, usage: Option<Option<WireUsage>>) -> Envelope<'_, C> {
        let Head { id, created, model, .. } = self;
        Envelope { id, object: self.object(is_chunk), created: *created, model, choices, usage, obfuscation: None }
    }
}

#[derive(Serialize)]
struct Envelope<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: C,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<WireUsage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    obfuscation: Option<String>,
}

/// Random characters that fill a choice up to a multiple of [`EVENT_BYTES`].
fn filling(choice: &Choice<'_>) -> String {
    let bytes = serde_json::to_vec(choice).map_or(0, |json| json.len());
    let mut filling = String::with_capacity(2 * EVENT_BYTES);
    while filling.len() < EVENT_BYTES {
        filling.push_str(&format!("{:013x}", random_seed()));
    }
    filling.truncate(EVENT_BYTES - bytes % EVENT_BYTES);
    filling
}

/// A choice in any of its four forms: chat or completion, whole or part.
#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Speech<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Speech<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    logprobs: Option<()>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize, Default)]
struct Speech<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

impl<'a> Choice<'a> {
    fn whole(shape: Shape, index: usize, text: &'a str, finish_reason: &'static str) -> Self {
        let empty =
            Self { index, message: None, delta: None, text: None, logprobs: None, finish_reason: Some(finish_reason) };
        match shape {
            Shape::Chat => Self { message: Some(Speech { role: Some("assistant"), content: Some(text) }), ..empty },
            Shape::Completion => Self { text: Some(text), ..empty },
        }
    }

    /// `text` is new text; the last part has a reason and no text.
    fn part(shape: Shape, index: usize, text: Option<&'a str>, finish_reason: Option<&'static str>) -> Self {
        let empty = Self { index, message: None, delta: None, text: None, logprobs: None, finish_reason };
        match shape {
            Shape::Chat => Self { delta: Some(Speech { role: None, content: text }), ..empty },
            Shape::Completion => Self { text: Some(text.unwrap_or_default()), ..empty },
        }
    }

    /// The first part of a chat answer says who speaks.
    fn opening(index: usize) -> Self {
        let speech = Speech { role: Some("assistant"), content: Some("") };
        Self { index, message: None, delta: Some(speech), text: None, logprobs: None, finish_reason: None }
    }
}

#[derive(Serialize, Clone, Copy, Debug)]
struct WireUsage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptTokensDetails,
}

/// Of the tokens of prompts.
#[derive(Serialize, Clone, Copy, Debug)]
struct PromptTokensDetails {
    /// Those that were not computed for this request, since the cache had them.
    cached_tokens: usize,
}

impl From<Usage> for WireUsage {
    fn from(usage: Usage) -> Self {
        let Usage { prompt_tokens, cached_tokens, completion_tokens, skipped_passes: _ } = usage;
        let prompt_tokens_details = PromptTokensDetails { cached_tokens: cached_tokens.unwrap_or(0) };
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details,
        }
    }
}

fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        FinishReason::Stop | FinishReason::Complete => "stop",
    }
}

/// Why a session has no more events before its end.
fn cut_off() -> ApiError {
    ApiError::unready("shutting_down", "the server shut down before the answer was whole")
}

/// The whole answer, once every session has ended. `prompt_tokens` counts each prompt once, of which `n` sessions in a row
/// are the choices.
pub(super) async fn whole(
    compute: &Compute,
    head: Head,
    sessions: Vec<Session>,
    prompt_tokens: usize,
    n: usize,
) -> Result<Response, ApiError> {
    let mut answers = Vec::with_capacity(sessions.len());
    for mut session in sessions {
        answers.push(collect(&mut session).await?);
    }
    let num_bytes = answers.iter().map(|(text, _, _)| text.len()).sum();
    Ok(compute.run_sized(num_bytes, move |_| joined(&head, &answers, prompt_tokens, n)).await?)
}

/// One answer of the texts, reasons and usages of all sessions.
fn joined(head: &Head, answers: &[(String, &'static str, Usage)], prompt_tokens: usize, n: usize) -> Response {
    let mut usage = Usage { prompt_tokens, ..Usage::default() };
    answers.iter().enumerate().for_each(|(index, (_, _, choice))| count(&mut usage, index, *choice, n));
    let choices = answers.iter().enumerate();
    let choices: Vec<_> =
        choices.map(|(index, (text, reason, _))| Choice::whole(head.shape, index, text, reason)).collect();
    Json(head.envelope(false, choices, Some(Some(usage.into())))).into_response()
}

/// Adds what the session of choice `index` used; each prompt is that of `n` choices, and counts as the first one found it.
fn count(total: &mut Usage, index: usize, choice: Usage, n: usize) {
    total.completion_tokens += choice.completion_tokens;
    if index.is_multiple_of(n) {
        *total.cached_tokens.get_or_insert_default() += choice.cached_tokens.unwrap_or(0);
    }
}

/// Text, reason and usage of one session.
async fn collect(session: &mut Session) -> Result<(String, &'static str, Usage), ApiError> {
    let mut answer = String::new();
    loop {
        match session.recv().await {
            Some(Event::Text { text, .. }) => answer.push_str(&text),
            Some(Event::Finished { reason, usage }) => return Ok((answer, reason_name(reason), usage)),
            Some(Event::Failed(error)) => return Err(error.into()),
            Some(Event::Started | Event::Progress { .. } | Event::Preview { .. } | Event::Frames(_)) => (),
            None => return Err(cut_off()),
        }
    }
}

/// The answer as it comes. Dropping the stream drops its sessions, which stops their work.
pub(super) fn stream(head: Head, sessions: Vec<Session>, prompt_tokens: usize, options: AnswerOptions) -> Response {
    let is_chat = head.shape == Shape::Chat;
    let mut stream = AnswerStream {
        head,
        open: sessions.into_iter().map(Some).collect(),
        usage: Usage { prompt_tokens, ..Usage::default() },
        options,
        buffer: Vec::new(),
        keep_alive: KeepAlive::default(),
        is_done: false,
    };
    for index in 0..if is_chat { stream.open.len() } else { 0 } {
        stream.write_choice(Choice::opening(index));
    }
    sse::response(Body::from_stream(stream))
}

struct AnswerStream {
    head: Head,
    /// One per choice; `None` once it has ended.
    open: Vec<Option<Session>>,
    usage: Usage,
    options: AnswerOptions,
    buffer: Vec<u8>,
    keep_alive: KeepAlive,
    is_done: bool,
}

impl AnswerStream {
    fn write_choice(&mut self, choice: Choice<'_>) {
        let usage = self.options.include_usage.then_some(None);
        let obfuscation = self.options.include_obfuscation.then(|| filling(&choice));
        let envelope = Envelope { obfuscation, ..self.head.envelope(true, [choice], usage) };
        sse::write_data(&mut self.buffer, &envelope);
    }

    fn write_event(&mut self, index: usize, event: Event) {
        let shape = self.head.shape;
        match event {
            Event::Text { text, .. } if !text.is_empty() => {
                self.write_choice(Choice::part(shape, index, Some(&text), None));
            }
            Event::Finished { reason, usage } => {
                count(&mut self.usage, index, usage, self.options.n);
                self.open[index] = None;
                self.write_choice(Choice::part(shape, index, None, Some(reason_name(reason))));
            }
            Event::Failed(error) => self.write_error(&error.into()),
            // Nothing that a reader of text would see.
            Event::Started | Event::Text { .. } | Event::Progress { .. } => (),
            Event::Preview { .. } | Event::Frames(_) => (),
        }
    }

    /// The status has been sent: the error is the last event, and `[DONE]` does not follow.
    fn write_error(&mut self, error: &ApiError) {
        sse::write_data(&mut self.buffer, &ErrorEnvelope { error: error.body() });
        self.open.clear();
        self.is_done = true;
    }

    fn write_end(&mut self) {
        if self.options.include_usage {
            let no_choices: [(); 0] = [];
            let envelope = self.head.envelope(true, no_choices, Some(Some(self.usage.into())));
            sse::write_data(&mut self.buffer, &envelope);
        }
        self.buffer.extend_from_slice(sse::DONE);
        self.is_done = true;
    }

    /// Writes what is ready, up to a bound; false when some session has more to say later.
    fn write_ready(&mut self, context: &mut Context<'_>) {
        for index in 0..self.open.len() {
            while self.buffer.len() < MAX_WRITE_BYTES {
                let Some(Some(session)) = self.open.get_mut(index) else { break };
                match session.poll_recv(context) {
                    Poll::Ready(Some(event)) => self.write_event(index, event),
                    Poll::Ready(None) => self.write_error(&cut_off()),
                    Poll::Pending => break,
                }
            }
        }
        if !self.is_done && self.open.iter().all(Option::is_none) {
            self.write_end();
        }
    }
}

impl Stream for AnswerStream {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if !self.is_done {
            self.write_ready(context);
        }
        if !self.buffer.is_empty() {
            self.keep_alive.reset();
            return Poll::Ready(Some(Ok(std::mem::take(&mut self.buffer).into())));
        }
        if self.is_done {
            return Poll::Ready(None);
        }
        self.keep_alive.poll(context).map(|comment| Some(Ok(comment)))
    }
}
