//! The answers of `/v1/chat/completions` and `/v1/completions`: whole, or as server-sent events.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tale_models::Event;
use tale_models::request::{FinishReason, PlacedLogprobs, Usage};
use tale_models::tokenizer::Tokenizer;
use tale_models::tools::{CallReader, Said, ToolFormat};
use uuid::Uuid;

use super::Shape;
use super::logprobs::{Echo, Told, WireLogprobs};
use super::wire::AnswerOptions;
use crate::compute::Compute;
use crate::engine::Session;
use crate::http::error::ApiError;
use crate::http::{random_seed, unix_seconds};

mod stream;

pub(super) use self::stream::stream;

/// Bytes of events that are joined into one write when a stream runs behind.
pub(super) const MAX_WRITE_BYTES: usize = 16 << 10;

/// Sizes of choices of a stream with obfuscation are multiples of this: longer than what most events say.
const EVENT_BYTES: usize = 64;

/// What all parts of an answer share.
#[derive(Debug)]
pub(super) struct Head {
    shape: Shape,
    id: String,
    created: u64,
    model: String,
    /// How calls of tools are written, where there may be some.
    tool_format: Option<ToolFormat>,
    /// That of the model, which spells tokens.
    tokenizer: Tokenizer,
}

impl Head {
    pub(super) fn new(shape: Shape, model: &str, tool_format: Option<ToolFormat>, tokenizer: Tokenizer) -> Self {
        let prefix = match shape {
            Shape::Chat => "chatcmpl",
            Shape::Completion => "cmpl",
        };
        let id = format!("{prefix}-{}", Uuid::now_v7().simple());
        let created = unix_seconds(std::time::SystemTime::now());
        Self { shape, id, created, model: model.to_owned(), tool_format, tokenizer }
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
    logprobs: Option<WireLogprobs<'a>>,
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
    fn whole(head: &'a Head, index: usize, reply: &'a Reply) -> Self {
        let Head { shape, tokenizer, .. } = head;
        let Reply { text, calls, reason, .. } = reply;
        let call = |call: &'a Call| WireCall {
            index: None,
            id: Some(&call.id),
            kind: Some("function"),
            function: WireFunction { name: Some(&call.name), arguments: &call.arguments },
        };
        let content = if text.is_empty() && !calls.is_empty() { None } else { Some(text.as_str()) };
        let told = |told: &'a Vec<Told>| WireLogprobs { shape: *shape, told: content.map(|_| &told[..]), tokenizer };
        let logprobs = reply.told.as_ref().map(told);
        let empty = Self { index, message: None, delta: None, text: None, logprobs, finish_reason: Some(reason) };
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
    fn part(
        shape: Shape,
        index: usize,
        text: Option<&'a str>,
        logprobs: Option<WireLogprobs<'a>>,
        finish_reason: Option<&'static str>,
    ) -> Self {
        let empty = Self { index, message: None, delta: None, text: None, logprobs, finish_reason };
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

/// The whole answer, once every session has ended. `prompt_tokens` counts each prompt once, of which `best_of` sessions in a
/// row are the choices; `echoes` are those of the sessions.
pub(super) async fn whole(
    compute: &Compute,
    head: Head,
    sessions: Vec<Session>,
    echoes: Vec<Option<Arc<Echo>>>,
    prompt_tokens: usize,
    options: AnswerOptions,
) -> Result<Response, ApiError> {
    let AnswerOptions { n, best_of, logprobs, .. } = options;
    let mut usage = Usage { prompt_tokens, ..Usage::default() };
    let mut answers = Vec::with_capacity(sessions.len());
    for (index, (mut session, echo)) in sessions.into_iter().zip(echoes).enumerate() {
        let reply = collect(&mut session, &head, echo, logprobs).await?;
        count(&mut usage, index, reply.usage, best_of);
        answers.push(reply);
    }
    let answers = if best_of > n { best(answers, n, best_of) } else { answers };
    let num_bytes = answers.iter().map(Reply::num_bytes).sum();
    Ok(compute.run_sized(num_bytes, move |_| joined(&head, &answers, usage)).await?)
}

/// Of each prompt's `best_of` answers the `n` whose tokens are the most likely ones on average, best first.
fn best(answers: Vec<Reply>, n: usize, best_of: usize) -> Vec<Reply> {
    let mut answers = answers.into_iter();
    let mut chosen = Vec::new();
    while answers.len() > 0 {
        let mut of_prompt: Vec<Reply> = answers.by_ref().take(best_of).collect();
        of_prompt.sort_by(|a, b| b.likelihood.mean().total_cmp(&a.likelihood.mean()));
        of_prompt.truncate(n);
        chosen.extend(of_prompt);
    }
    chosen
}

/// One answer of the texts and reasons of all choices.
fn joined(head: &Head, answers: &[Reply], usage: Usage) -> Response {
    let choices = answers.iter().enumerate();
    let choices: Vec<_> = choices.map(|(index, reply)| Choice::whole(head, index, reply)).collect();
    Json(head.envelope(false, choices, Some(Some(usage.into())))).into_response()
}

/// Adds what session `index` used; each prompt is that of `of_prompt` sessions, and counts as the first one found it.
fn count(total: &mut Usage, index: usize, choice: Usage, of_prompt: usize) {
    total.completion_tokens += choice.completion_tokens;
    if index.is_multiple_of(of_prompt) {
        *total.cached_tokens.get_or_insert_default() += choice.cached_tokens.unwrap_or(0);
    }
}

/// What one session said.
#[derive(Debug, Default)]
struct Reply {
    text: String,
    calls: Vec<Call>,
    /// Characters of the text before the first one.
    calls_begin: Option<usize>,
    reason: &'static str,
    usage: Usage,
    /// What is told of its tokens, where that was asked for.
    told: Option<Vec<Told>>,
    likelihood: Likelihood,
}

/// Of the tokens of an answer.
#[derive(Debug, Default)]
struct Likelihood {
    logprobs: f64,
    tokens: usize,
}

impl Likelihood {
    fn add(&mut self, placed: &[PlacedLogprobs]) {
        self.tokens += placed.len();
        self.logprobs += placed.iter().map(|placed| f64::from(placed.logprobs.logprob)).sum::<f64>();
    }

    /// The logarithm of the mean probability of a token, the geometric one.
    fn mean(&self) -> f64 {
        if self.tokens == 0 { f64::NEG_INFINITY } else { self.logprobs / self.tokens as f64 }
    }
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
        let told: usize = self.told.iter().flatten().map(Told::num_bytes).sum();
        self.text.len() + self.calls.iter().map(|call| call.arguments.len()).sum::<usize>() + told
    }

    /// Forgets the tokens that are no content of a message: those of calls, and those that end it.
    fn keep_content(&mut self) {
        let end = self.calls_begin.unwrap_or_else(|| self.text.chars().count());
        self.told.iter_mut().for_each(|told| told.retain(|told| told.offset < end));
    }

    fn add(&mut self, said: Said) {
        match (said, self.calls.last_mut()) {
            (Said::Text(text), _) => self.text.push_str(&text),
            (Said::Call(name), _) => {
                self.calls_begin.get_or_insert_with(|| self.text.chars().count());
                self.calls.push(Call { id: call_id(), name, arguments: String::new() });
            }
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

/// Text, calls, reason and usage of one session, and where `tells` what is told of its tokens.
async fn collect(session: &mut Session, head: &Head, echo: Option<Arc<Echo>>, tells: bool) -> Result<Reply, ApiError> {
    let text = echo.as_ref().map_or(String::new(), |echo| echo.text.clone());
    let before = text.chars().count();
    let mut reply = Reply { text, told: tells.then(Vec::new), ..Reply::default() };
    let mut reader = head.tool_format.map(CallReader::new);
    loop {
        match session.recv().await {
            Some(Event::Prompt(of_prompt)) => {
                if let (Some(told), Some(echo)) = (&mut reply.told, &echo) {
                    told.extend(echo.told(of_prompt));
                }
            }
            Some(Event::Text { text, logprobs, .. }) => {
                reply.likelihood.add(&logprobs);
                if let Some(told) = &mut reply.told {
                    told.extend(logprobs.into_iter().map(|placed| Told::behind(before, placed)));
                }
                match &mut reader {
                    Some(reader) => reader.push(&text).into_iter().for_each(|said| reply.add(said)),
                    None => reply.text.push_str(&text),
                }
            }
            Some(Event::Finished { reason, usage }) => {
                let num_calls = reader.as_ref().map_or(0, CallReader::num_calls);
                reader.into_iter().flat_map(|mut reader| reader.finish()).for_each(|said| reply.add(said));
                reply.reason = reason_with_calls(reason, num_calls);
                reply.usage = usage;
                if head.shape == Shape::Chat {
                    reply.keep_content();
                }
                return Ok(reply);
            }
            Some(Event::Failed(error)) => return Err(error.into()),
            Some(
                Event::Started
                | Event::Progress { .. }
                | Event::Preview { .. }
                | Event::Frames(_)
                | Event::Checkpoint(_),
            ) => (),
            None => return Err(cut_off()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tale_models::request::TokenLogprobs;

    use super::*;

    fn check(said: Vec<Said>, text: &str, content: &[usize]) {
        let logprobs = TokenLogprobs { token: 0, logprob: -1.0, top: Box::default() };
        let told = (0..9).map(|offset| Told::behind(0, PlacedLogprobs { offset, logprobs: logprobs.clone() }));
        let mut reply = Reply { told: Some(told.collect()), ..Reply::default() };
        said.into_iter().for_each(|said| reply.add(said));
        reply.keep_content();
        let kept: Vec<usize> = reply.told.iter().flatten().map(|told| told.offset).collect();
        assert_eq!((reply.text.as_str(), kept.as_slice()), (text, content));
    }

    #[test]
    fn tokens_of_calls_and_ends_are_no_content() {
        let text = |text: &str| Said::Text(text.to_owned());
        let call = || [Said::Call("f".to_owned()), Said::Arguments("{}".to_owned()), Said::End];
        check(vec![text("a"), text("bc")], "abc", &[0, 1, 2]);
        check([vec![text("ab")], call().into(), vec![text("cd")]].concat(), "abcd", &[0, 1]);
        check(call().into(), "", &[]);
    }
}
