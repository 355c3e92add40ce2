//! Answers as they come, as server-sent events.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::response::Response;
use futures_core::Stream;
use tale_models::Event;
use tale_models::request::Usage;
use tale_models::tools::{CallReader, Said, ToolFormat};

use super::{
    Choice, Envelope, Head, MAX_WRITE_BYTES, WireCall, WireFunction, call_id, count, cut_off, filling,
    reason_with_calls,
};
use crate::engine::Session;
use crate::http::error::{ApiError, ErrorEnvelope};
use crate::http::sse::{self, KeepAlive};
use crate::http::text::Shape;
use crate::http::text::logprobs::{Echo, Part, Telling, WireLogprobs};
use crate::http::text::wire::AnswerOptions;

/// The answer as it comes. Dropping the stream drops its sessions, which stops their work.
pub(in crate::http::text) fn stream(
    head: Head,
    sessions: Vec<Session>,
    echoes: Vec<Option<Arc<Echo>>>,
    prompt_tokens: usize,
    options: AnswerOptions,
) -> Response {
    let is_chat = head.shape == Shape::Chat;
    let readers = sessions.iter().map(|_| head.tool_format.map(Reading::new)).collect();
    let mut stream = AnswerStream {
        head,
        readers,
        tellings: echoes.into_iter().map(|echo| Telling::new(echo, options.logprobs)).collect(),
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
    /// Of each choice.
    tellings: Vec<Telling>,
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
            Event::Prompt(of_prompt) => self.tellings[index].add_prompt(of_prompt),
            Event::Text { text, logprobs, .. } => {
                self.tellings[index].add_tokens(logprobs);
                match &mut self.readers[index] {
                    None => self.tellings[index].add_text(text),
                    Some(reading) => {
                        let said = reading.reader.push(&text);
                        said.into_iter().for_each(|said| self.write_said(index, said));
                    }
                }
            }
            Event::Finished { reason, usage } => {
                count(&mut self.usage, index, usage, self.options.best_of);
                self.open[index] = None;
                let num_calls = self.readers[index].as_ref().map_or(0, |reading| reading.reader.num_calls());
                let rest = self.readers[index].as_mut().map_or(Vec::new(), |reading| reading.reader.finish());
                rest.into_iter().for_each(|said| self.write_said(index, said));
                while self.write_part(index) {}
                // Tokens without text end a completion, and are no content of a message.
                let rest = self.tellings[index].rest();
                let told = Some(rest).filter(|told| shape == Shape::Completion && !told.is_empty());
                let part = Part { text: String::new(), told: told.unwrap_or_default() };
                self.write(index, &part, Some(reason_with_calls(reason, num_calls)));
            }
            Event::Failed(error) => self.write_error(&error.into()),
            // Nothing that a reader of text would see.
            Event::Started
            | Event::Progress { .. }
            | Event::Preview { .. }
            | Event::Frames(_)
            | Event::Checkpoint(_) => (),
        }
    }

    /// Writes the next text of a choice and what is told of its tokens; false when there is none.
    fn write_part(&mut self, index: usize) -> bool {
        let Some(part) = self.tellings[index].next_part() else { return false };
        self.write(index, &part, None);
        true
    }

    /// Writes text, or the reason of the end, with the tokens.
    fn write(&mut self, index: usize, part: &Part, reason: Option<&'static str>) {
        let shape = self.head.shape;
        let tokenizer = self.head.tokenizer.clone();
        let told = self.options.logprobs.then_some(&part.told).filter(|told| reason.is_none() || !told.is_empty());
        let logprobs = told.map(|told| WireLogprobs { shape, told: Some(told), tokenizer: &tokenizer });
        let text = reason.is_none().then_some(part.text.as_str());
        self.write_choice(Choice::part(shape, index, text, logprobs, reason));
    }

    /// What a choice with tools says. A call begins with its id and name; its arguments follow as they come.
    fn write_said(&mut self, index: usize, said: Said) {
        let begun = self.readers[index].as_ref().map_or(0, |reading| reading.begun);
        match said {
            Said::Text(text) => self.tellings[index].add_text(text),
            Said::Call(name) => {
                while self.write_part(index) {}
                self.tellings[index].end();
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

    /// Writes what is ready, up to a bound.
    fn write_ready(&mut self, context: &mut Context<'_>) {
        for index in 0..self.open.len() {
            while self.buffer.len() < MAX_WRITE_BYTES {
                if self.write_part(index) {
                    continue;
                }
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
