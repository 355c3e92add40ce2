//! The answers of `/v1/responses`: whole, or as typed events.
//!
//! Owns: the `response` object and the events. Does not know: which items an answer has (`output.rs`).

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::SystemTime;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde::Serialize;
use serde_json::{Value, json};
use tale_models::Event;
use tale_models::request::{FinishReason, SamplingParams, Usage};
use uuid::Uuid;

use super::super::answer::{MAX_WRITE_BYTES, cut_off, filling};
use super::super::{Order, Placed};
use super::output::{Change, Changed, Item, Output, Part};
use super::wire::Repeated;
use crate::engine::Session;
use crate::http::body::memory::Held;
use crate::http::error::ApiError;
use crate::http::sse::{self, KeepAlive};
use crate::http::{AppState, unix_seconds};

/// What stays the same in a `response` object from its first event to its last.
#[derive(Debug)]
pub(super) struct Head {
    id: String,
    created_at: u64,
    /// Its fields as JSON, without the brace before them: they may be as long as the request, and are written once.
    fields: String,
}

/// See [`Head::fields`].
#[derive(Serialize)]
struct Constant<'a> {
    model: &'a str,
    temperature: f32,
    top_p: f32,
    #[serde(flatten)]
    repeated: Repeated,
    background: bool,
    max_tool_calls: Option<usize>,
    previous_response_id: Option<&'a str>,
    reasoning: Value,
    service_tier: &'a str,
    store: bool,
    top_logprobs: usize,
    truncation: &'a str,
}

/// What changes.
#[derive(Serialize)]
struct Changing<'a> {
    id: &'a str,
    object: &'static str,
    created_at: u64,
    completed_at: Option<u64>,
    status: &'static str,
    error: Option<Failure<'a>>,
    incomplete_details: Option<Value>,
    output: &'a [Item],
    usage: Option<WireUsage>,
}

#[derive(Serialize)]
struct Failure<'a> {
    code: &'static str,
    message: &'a str,
}

#[derive(Serialize)]
struct WireUsage {
    input_tokens: usize,
    input_tokens_details: InputTokens,
    output_tokens: usize,
    output_tokens_details: OutputTokens,
    total_tokens: usize,
}

#[derive(Serialize)]
struct InputTokens {
    /// Those that were not computed for this request, since the cache had them.
    cached_tokens: usize,
    /// Those that the client asked to have written there, which it cannot.
    cache_write_tokens: usize,
}

#[derive(Serialize)]
struct OutputTokens {
    reasoning_tokens: usize,
}

impl From<Usage> for WireUsage {
    fn from(usage: Usage) -> Self {
        let Usage { prompt_tokens, cached_tokens, completion_tokens, .. } = usage;
        Self {
            input_tokens: prompt_tokens,
            input_tokens_details: InputTokens { cached_tokens: cached_tokens.unwrap_or(0), cache_write_tokens: 0 },
            output_tokens: completion_tokens,
            output_tokens_details: OutputTokens { reasoning_tokens: 0 },
            total_tokens: prompt_tokens + completion_tokens,
        }
    }
}

/// How far an answer is.
enum State<'a> {
    InProgress,
    Finished(FinishReason, Usage),
    Failed(&'a ApiError),
}

impl Head {
    pub(super) fn new(model: &str, repeated: Repeated, sampling: &SamplingParams) -> Self {
        let constant = Constant {
            model,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            repeated,
            background: false,
            max_tool_calls: None,
            previous_response_id: None,
            reasoning: json!({"effort": null, "summary": null}),
            service_tier: "default",
            store: false,
            top_logprobs: 0,
            truncation: "disabled",
        };
        let mut fields = serde_json::to_string(&constant).expect("our types serialize into memory: this is a bug");
        fields.remove(0);
        fields.shrink_to_fit();
        Self { id: format!("resp_{}", Uuid::now_v7().simple()), created_at: now(), fields }
    }

    /// Bytes that it takes.
    pub(super) fn num_bytes(&self) -> usize {
        self.fields.len()
    }

    /// Writes the object.
    fn write(&self, buffer: &mut Vec<u8>, state: State<'_>, output: &[Item]) {
        let (id, object, created_at) = (self.id.as_str(), "response", self.created_at);
        let (status, completed_at, error, usage) = match state {
            State::InProgress => ("in_progress", None, None, None),
            State::Finished(FinishReason::Length, usage) => ("incomplete", None, None, Some(usage.into())),
            State::Finished(FinishReason::Stop | FinishReason::Complete, usage) => {
                ("completed", Some(now()), None, Some(usage.into()))
            }
            State::Failed(error) => {
                ("failed", None, Some(Failure { code: "server_error", message: error.message() }), None)
            }
        };
        let incomplete_details = (status == "incomplete").then(|| json!({"reason": "max_output_tokens"}));
        let changing =
            Changing { id, object, created_at, completed_at, status, error, incomplete_details, output, usage };
        write_json(buffer, &changing);
        buffer.pop();
        buffer.push(b',');
        buffer.extend_from_slice(self.fields.as_bytes());
    }
}

fn now() -> u64 {
    unix_seconds(SystemTime::now())
}

fn write_json(buffer: &mut Vec<u8>, value: &impl Serialize) {
    serde_json::to_writer(buffer, value).expect("our types serialize into memory: this is a bug");
}

/// The answer to an order. `held` is the memory of what it repeats.
pub(super) async fn answer(state: &AppState, head: Head, placed: Placed, held: Held) -> Result<Response, ApiError> {
    let Placed { order: Order { answer, tool_format, .. }, mut sessions, .. } = placed;
    let mut session = sessions.pop().expect("a conversation has one session: this is a bug");
    let output = Output::new(tool_format);
    if answer.stream {
        sse::first_event(&mut session).await?;
        let obfuscates = answer.include_obfuscation;
        return Ok(sse::response(Body::from_stream(AnswerStream::new(head, session, output, obfuscates, held))));
    }
    whole(state, head, session, output, held).await
}

async fn whole(
    state: &AppState,
    head: Head,
    mut session: Session,
    mut output: Output,
    held: Held,
) -> Result<Response, ApiError> {
    let (reason, usage) = loop {
        match session.recv().await {
            Some(Event::Text { text, .. }) => drop(output.push(text)),
            Some(Event::Finished { reason, usage }) => break (reason, usage),
            Some(Event::Failed(error)) => return Err(error.into()),
            Some(
                Event::Started
                | Event::Prompt(_)
                | Event::Progress { .. }
                | Event::Preview { .. }
                | Event::Frames(_)
                | Event::Checkpoint(_),
            ) => (),
            None => return Err(cut_off()),
        }
    };
    output.finish(reason);
    let num_bytes = output.num_bytes() + head.num_bytes();
    let write = move |_: &_| {
        let mut json = Vec::with_capacity(num_bytes + 1024);
        head.write(&mut json, State::Finished(reason, usage), output.items());
        drop(held);
        json
    };
    let json = state.compute().run_sized(num_bytes, write).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], json).into_response())
}

/// The answer as it comes. Dropping it drops its session, which stops the work.
struct AnswerStream {
    head: Head,
    /// `None` once it has ended.
    session: Option<Session>,
    output: Output,
    /// Events so far.
    number: usize,
    /// Whether pieces of text are filled up, so that their sizes say little about them.
    obfuscates: bool,
    buffer: Vec<u8>,
    keep_alive: KeepAlive,
    _held: Held,
}

/// What is said of an item, at its place.
#[derive(Serialize)]
struct OfItem<'a, T> {
    item_id: &'a str,
    output_index: usize,
    #[serde(flatten)]
    said: T,
}

#[derive(Serialize)]
struct WholeItem<'a> {
    output_index: usize,
    item: &'a Item,
}

#[derive(Serialize)]
struct OfPart<'a> {
    content_index: usize,
    part: &'a Part,
}

/// Of the text of a message.
#[derive(Serialize)]
struct TextDelta<'a> {
    content_index: usize,
    delta: &'a str,
    logprobs: [(); 0],
}

#[derive(Serialize)]
struct TextDone<'a> {
    content_index: usize,
    text: &'a str,
    logprobs: [(); 0],
}

#[derive(Serialize)]
struct ArgumentsDelta<'a> {
    delta: &'a str,
}

#[derive(Serialize)]
struct ArgumentsDone<'a> {
    name: &'a str,
    arguments: &'a str,
}

#[derive(Serialize)]
struct WireEvent<'a, T> {
    #[serde(rename = "type")]
    name: &'a str,
    sequence_number: usize,
    #[serde(flatten)]
    said: T,
    #[serde(skip_serializing_if = "Option::is_none")]
    obfuscation: Option<String>,
}

impl AnswerStream {
    fn new(head: Head, session: Session, output: Output, obfuscates: bool, held: Held) -> Self {
        let mut stream = Self {
            head,
            session: Some(session),
            output,
            number: 0,
            obfuscates,
            buffer: Vec::new(),
            keep_alive: KeepAlive::default(),
            _held: held,
        };
        stream.write_response("response.created", State::InProgress);
        stream.write_response("response.in_progress", State::InProgress);
        stream
    }

    fn write<T: Serialize>(&mut self, name: &str, said: T) {
        let event = WireEvent { name, sequence_number: self.number, said, obfuscation: None };
        sse::write_named(&mut self.buffer, name, &event);
        self.number += 1;
    }

    /// A piece of text, filled up where that is wanted.
    fn write_delta<T: Serialize>(&mut self, name: &str, said: T) {
        let obfuscation = self.obfuscates.then(|| filling(&said));
        let event = WireEvent { name, sequence_number: self.number, said, obfuscation };
        sse::write_named(&mut self.buffer, name, &event);
        self.number += 1;
    }

    fn write_response(&mut self, name: &str, state: State<'_>) {
        let output = if matches!(state, State::InProgress) { &[] } else { self.output.items() };
        let number = self.number;
        let begin = format!("event: {name}\ndata: {{\"type\":\"{name}\",\"sequence_number\":{number},\"response\":");
        self.buffer.extend_from_slice(begin.as_bytes());
        self.head.write(&mut self.buffer, state, output);
        self.buffer.extend_from_slice(b"}\n\n");
        self.number += 1;
    }

    fn write_changes(&mut self, changes: Vec<Changed>) {
        // The items are borrowed while events about them are written.
        let output = std::mem::replace(&mut self.output, Output::new(None));
        for (place, change) in changes {
            self.write_change(place, &output.items()[place], change);
        }
        self.output = output;
    }

    fn write_change(&mut self, output_index: usize, item: &Item, change: Change) {
        let (item_id, content_index, logprobs) = (item.id(), 0, []);
        match (change, item) {
            (Change::Began, Item::Message { .. }) => {
                self.write("response.output_item.added", WholeItem { output_index, item: &item.begun() });
                let said = OfPart { content_index, part: &Part::default() };
                self.write("response.content_part.added", OfItem { item_id, output_index, said });
            }
            (Change::Began, Item::FunctionCall { .. }) => {
                self.write("response.output_item.added", WholeItem { output_index, item: &item.begun() });
            }
            (Change::Grew(delta), Item::Message { .. }) => {
                let said = TextDelta { content_index, delta: &delta, logprobs };
                self.write_delta("response.output_text.delta", OfItem { item_id, output_index, said });
            }
            (Change::Grew(delta), Item::FunctionCall { .. }) => {
                let said = ArgumentsDelta { delta: &delta };
                self.write_delta("response.function_call_arguments.delta", OfItem { item_id, output_index, said });
            }
            (Change::Ended, Item::Message { content, .. }) => {
                let said = TextDone { content_index, text: item.text(), logprobs };
                self.write("response.output_text.done", OfItem { item_id, output_index, said });
                for part in content {
                    let said = OfPart { content_index, part };
                    self.write("response.content_part.done", OfItem { item_id, output_index, said });
                }
                self.write("response.output_item.done", WholeItem { output_index, item });
            }
            (Change::Ended, Item::FunctionCall { name, .. }) => {
                let said = ArgumentsDone { name, arguments: item.text() };
                self.write("response.function_call_arguments.done", OfItem { item_id, output_index, said });
                self.write("response.output_item.done", WholeItem { output_index, item });
            }
        }
    }

    fn write_event(&mut self, event: Event) {
        match event {
            Event::Text { text, .. } => {
                let changes = self.output.push(text);
                self.write_changes(changes);
            }
            Event::Finished { reason, usage } => {
                let changes = self.output.finish(reason);
                self.write_changes(changes);
                let is_cut = reason == FinishReason::Length;
                let name = if is_cut { "response.incomplete" } else { "response.completed" };
                self.write_response(name, State::Finished(reason, usage));
                self.session = None;
            }
            Event::Failed(error) => self.write_failure(&error.into()),
            // Nothing that a reader of text would see.
            Event::Started
            | Event::Prompt(_)
            | Event::Progress { .. }
            | Event::Preview { .. }
            | Event::Frames(_)
            | Event::Checkpoint(_) => (),
        }
    }

    /// The status has been sent: the failure is the last event.
    fn write_failure(&mut self, error: &ApiError) {
        self.write_response("response.failed", State::Failed(error));
        self.session = None;
    }

    /// Writes what is ready, up to a bound.
    fn write_ready(&mut self, context: &mut Context<'_>) {
        while self.buffer.len() < MAX_WRITE_BYTES {
            let Some(session) = &mut self.session else { return };
            match session.poll_recv(context) {
                Poll::Ready(Some(event)) => self.write_event(event),
                Poll::Ready(None) => self.write_failure(&cut_off()),
                Poll::Pending => return,
            }
        }
    }
}

impl Stream for AnswerStream {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.write_ready(context);
        if !self.buffer.is_empty() {
            self.keep_alive.reset();
            return Poll::Ready(Some(Ok(std::mem::take(&mut self.buffer).into())));
        }
        if self.session.is_none() {
            return Poll::Ready(None);
        }
        self.keep_alive.poll(context).map(|comment| Some(Ok(comment)))
    }
}
