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
use tale_models::tools::{CallReader, Said, ToolFormat};
use uuid::Uuid;

use super::wire::AnswerOptions;
use crate::compute::Compute;
use crate::engine::Session;
use crate::http::error::{ApiError, ErrorEnvelope};
use crate::http::sse::{self, KeepAlive};
use crate::http::{random_seed, unix_seconds};

/// Bytes of events that are joined into one write when a stream runs behind.
pub(super) const MAX_WRITE_BYTES: usize = 16 << 10;

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
    /// How calls of tools are written, where there may be some.
    tool_format: Option<ToolFormat>,
}

impl Head {
    pub(super) fn new(shape: Shape, model: &str, tool_format: Option<ToolFormat>) -> Self {
        let prefix = match shape {
            Shape::Chat => "chatcmpl",
            Shape::Completion => "cmpl",
        };
        let id = format!("{prefix}-{}", Uuid::now_v7().simple());
        let created = unix_seconds(std::time::SystemTime::now());
        Self { shape, id, created, model: model.to_owned(), tool_format }
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

/// Random characters that fill a part of an answer up to a multiple of [`EVENT_BYTES`].
pub(super) fn filling(part: &impl Serialize) -> String {
    let bytes = serde_json::to_vec(part).map_or(0, |json| json.len());
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
    /// Null where the assistant only calls tools.
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<Option<&'a str>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<WireCall<'a>>,
}

/// A call of a tool, or in a stream a part of one, which has a place among the others.
#[derive(Serialize, Default)]
struct WireCall<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: WireFunction<'a>,
}

#[derive(Serialize, Default)]
struct WireFunction<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

impl<'a> Choice<'a> {
    fn whole(shape: Shape, index: usize, reply: &'a Reply) -> Self {
        let Reply { text, calls, reason, .. } = reply;
        let empty = Self { index, message: None, delta: None, text: None, logprobs: None, finish_reason: Some(reason) };
        let call = |call: &'a Call| WireCall {
            index: None,
            id: Some(&call.id),
            kind: Some("function"),
            function: WireFunction { name: Some(&call.name), arguments: &call.arguments },
        };
        let content = if text.is_empty() && !calls.is_empty() { None } else { Some(text.as_str()) };
        let speech =
            Speech { role: Some("assistant"), content: Some(content), tool_calls: calls.iter().map(call).collect() };
        match shape {
            Shape::Chat => Self { message: Some(speech), ..empty },
            Shape::Completion => Self { text: Some(text), ..empty },
        }
    }

    /// A part of a call.
    fn call(index: usize, call: WireCall<'a>) -> Self {
        let speech = Speech { tool_calls: vec![call], ..Speech::default() };
        Self { index, message: None, delta: Some(speech), text: None, logprobs: None, finish_reason: None }
    }

    /// `text` is new text; the last part has a reason and no text.
    fn part(shape: Shape, index: usize, text: Option<&'a str>, finish_reason: Option<&'static str>) -> Self {
        let empty = Self { index, message: None, delta: None, text: None, logprobs: None, finish_reason };
        match shape {
            Shape::Chat => Self { delta: Some(Speech { content: text.map(Some), ..Speech::default() }), ..empty },
            Shape::Completion => Self { text: Some(text.unwrap_or_default()), ..empty },
        }
    }

    /// The first part of a chat answer says who speaks.
    fn opening(index: usize) -> Self {
        let speech = Speech { role: Some("assistant"), content: Some(Some("")), tool_calls: Vec::new() };
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
        let Usage { prompt_tokens, cached_tokens, completion_tokens, .. } = usage;
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
pub(super) fn cut_off() -> ApiError {
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
        answers.push(collect(&mut session, head.tool_format).await?);
    }
    let num_bytes = answers.iter().map(Reply::num_bytes).sum();
    Ok(compute.run_sized(num_bytes, move |_| joined(&head, &answers, prompt_tokens, n)).await?)
}

/// One answer of the texts, reasons and usages of all sessions.
fn joined(head: &Head, answers: &[Reply], prompt_tokens: usize, n: usize) -> Response {
    let mut usage = Usage { prompt_tokens, ..Usage::default() };
    answers.iter().enumerate().for_each(|(index, reply)| count(&mut usage, index, reply.usage, n));
    let choices = answers.iter().enumerate();
    let choices: Vec<_> = choices.map(|(index, reply)| Choice::whole(head.shape, index, reply)).collect();
    Json(head.envelope(false, choices, Some(Some(usage.into())))).into_response()
}

/// Adds what the session of choice `index` used; each prompt is that of `n` choices, and counts as the first one found it.
fn count(total: &mut Usage, index: usize, choice: Usage, n: usize) {
    total.completion_tokens += choice.completion_tokens;
    if index.is_multiple_of(n) {
        *total.cached_tokens.get_or_insert_default() += choice.cached_tokens.unwrap_or(0);
    }
}

/// What one session said.
#[derive(Debug, Default)]
struct Reply {
    text: String,
    calls: Vec<Call>,
    reason: &'static str,
    usage: Usage,
}

/// A call of a tool.
#[derive(Debug)]
struct Call {
    id: String,
    name: String,
    arguments: String,
}

impl Reply {
    fn num_bytes(&self) -> usize {
        self.text.len() + self.calls.iter().map(|call| call.arguments.len()).sum::<usize>()
    }

    fn add(&mut self, said: Said) {
        match (said, self.calls.last_mut()) {
            (Said::Text(text), _) => self.text.push_str(&text),
            (Said::Call(name), _) => self.calls.push(Call { id: call_id(), name, arguments: String::new() }),
            (Said::Arguments(more), Some(call)) => call.arguments.push_str(&more),
            (Said::Arguments(_) | Said::End, _) => (),
        }
    }
}

/// By which a tool's result refers to its call.
pub(super) fn call_id() -> String {
    format!("call_{}", Uuid::now_v7().simple())
}

/// Why an answer with so many whole calls ended.
fn reason_with_calls(reason: FinishReason, num_calls: usize) -> &'static str {
    match reason_name(reason) {
        "stop" if num_calls > 0 => "tool_calls",
        name => name,
    }
}

/// Text, calls, reason and usage of one session.
async fn collect(session: &mut Session, tool_format: Option<ToolFormat>) -> Result<Reply, ApiError> {
    let mut reply = Reply::default();
    let mut reader = tool_format.map(CallReader::new);
    loop {
        match session.recv().await {
            Some(Event::Text { text, .. }) => match &mut reader {
                Some(reader) => reader.push(&text).into_iter().for_each(|said| reply.add(said)),
                None => reply.text.push_str(&text),
            },
            Some(Event::Finished { reason, usage }) => {
                let num_calls = reader.as_ref().map_or(0, CallReader::num_calls);
                reader.into_iter().flat_map(|mut reader| reader.finish()).for_each(|said| reply.add(said));
                reply.reason = reason_with_calls(reason, num_calls);
                reply.usage = usage;
                return Ok(reply);
            }
            Some(Event::Failed(error)) => return Err(error.into()),
            Some(Event::Started | Event::Prompt(_) | Event::Progress { .. }) => (),
            Some(Event::Preview { .. } | Event::Frames(_)) => (),
            None => return Err(cut_off()),
        }
    }
}

/// The answer as it comes. Dropping the stream drops its sessions, which stops their work.
pub(super) fn stream(head: Head, sessions: Vec<Session>, prompt_tokens: usize, options: AnswerOptions) -> Response {
    let is_chat = head.shape == Shape::Chat;
    let readers = sessions.iter().map(|_| head.tool_format.map(Reading::new)).collect();
    let mut stream = AnswerStream {
        head,
        readers,
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
    /// Of each choice that may have calls.
    readers: Vec<Option<Reading>>,
    usage: Usage,
    options: AnswerOptions,
    buffer: Vec<u8>,
    keep_alive: KeepAlive,
    is_done: bool,
}

/// The calls of a choice, as they come.
struct Reading {
    reader: CallReader,
    /// Calls that have begun.
    begun: usize,
}

impl Reading {
    fn new(format: ToolFormat) -> Self {
        Self { reader: CallReader::new(format), begun: 0 }
    }
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
            Event::Text { text, .. } if !text.is_empty() => match &mut self.readers[index] {
                None => self.write_choice(Choice::part(shape, index, Some(&text), None)),
                Some(reading) => {
                    let said = reading.reader.push(&text);
                    said.into_iter().for_each(|said| self.write_said(index, said));
                }
            },
            Event::Finished { reason, usage } => {
                count(&mut self.usage, index, usage, self.options.n);
                self.open[index] = None;
                let num_calls = self.readers[index].as_ref().map_or(0, |reading| reading.reader.num_calls());
                let rest = self.readers[index].as_mut().map_or(Vec::new(), |reading| reading.reader.finish());
                rest.into_iter().for_each(|said| self.write_said(index, said));
                let reason = reason_with_calls(reason, num_calls);
                self.write_choice(Choice::part(shape, index, None, Some(reason)));
            }
            Event::Failed(error) => self.write_error(&error.into()),
            // Nothing that a reader of text would see.
            Event::Started | Event::Prompt(_) | Event::Text { .. } | Event::Progress { .. } => (),
            Event::Preview { .. } | Event::Frames(_) => (),
        }
    }

    /// What a choice with tools says. A call begins with its id and name; its arguments follow as they come.
    fn write_said(&mut self, index: usize, said: Said) {
        let begun = self.readers[index].as_ref().map_or(0, |reading| reading.begun);
        match said {
            Said::Text(text) => self.write_choice(Choice::part(self.head.shape, index, Some(&text), None)),
            Said::Call(name) => {
                if let Some(reading) = &mut self.readers[index] {
                    reading.begun += 1;
                }
                let id = call_id();
                let function = WireFunction { name: Some(&name), arguments: "" };
                let call = WireCall { index: Some(begun), id: Some(&id), kind: Some("function"), function };
                self.write_choice(Choice::call(index, call));
            }
            Said::Arguments(arguments) => {
                let function = WireFunction { name: None, arguments: &arguments };
                let call = WireCall { index: Some(begun.saturating_sub(1)), function, ..WireCall::default() };
                self.write_choice(Choice::call(index, call));
            }
            Said::End => (),
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
