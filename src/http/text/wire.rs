//! The bodies of `/v1/chat/completions` and `/v1/completions`.
//!
//! A field that is not here is refused by name: nothing that a client asks for is silently ignored.

use std::sync::Arc;

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use tale_models::cancel::CancelToken;
use tale_models::chat_template::{ChatMessage, Conversation, Ending, ToolCall};
use tale_models::grammar::Asked;
use tale_models::parameter::{Declaration, Options, Parameter, TEXT, Task};
use tale_models::text_parameters::{
    CHAT_LOGPROBS, ECHO, LOGPROBS, MAX_TOKENS, TEXT_PARAMETERS, TOP_LOGPROBS, settle_logprobs,
};
use tale_models::{Encoding, TextCard};

use super::logprobs::Echo;
use super::structured;
use super::tools::{self, Spelling, Tools};
use crate::http::body::value::{Object, Room, Value};
use crate::http::cold_start::ALLOW_COLD_START;
use crate::http::diffusion::MODEL;
use crate::http::error::ApiError;
use crate::http::{body, openai, parameters};

/// Most sessions of one request: prompts times `n`.
pub const MAX_CHOICES: usize = 64;
/// Most messages of a conversation.
pub const MAX_MESSAGES: usize = 8192;
/// Most values in all messages together: their fields, and the parts of their contents.
pub(super) const MAX_MESSAGE_VALUES: usize = 16 * MAX_MESSAGES;

static N: Parameter<usize> = Parameter::integer(
    "n",
    1,
    MAX_CHOICES,
    "Choices for each prompt, at most 64 in all; choice i has seed + i. 1 when absent.",
)
.only_for(&[Task::Chat, Task::Completion]);

static BEST_OF: Parameter<usize> = Parameter::integer(
    "best_of",
    1,
    MAX_CHOICES,
    "Make so many choices for each prompt, at most 64 in all, and give the `n` whose tokens are the most likely ones on \
     average, best first. As many as `n` when absent.",
)
.only_for(&[Task::Completion]);

pub(super) static STREAM: Parameter<bool> =
    Parameter::boolean("stream", "Answer with server-sent events, as the text comes.").only_for(TEXT);

static MAX_COMPLETION_TOKENS: Parameter<usize> =
    Parameter::at_least("max_completion_tokens", 1, "OpenAI's newer name of `max_tokens`.")
        .only_for(&[Task::Chat])
        .narrowed_by_models();

pub(super) static ADD_GENERATION_PROMPT: Parameter<bool> = Parameter::boolean(
    "add_generation_prompt",
    "Whether the text of the conversation ends where the assistant begins to speak. True when absent, but for \
     `continue_final_message`.",
)
.only_for(&[Task::Chat]);

pub(super) static CONTINUE_FINAL_MESSAGE: Parameter<bool> = Parameter::boolean(
    "continue_final_message",
    "Go on with the last message instead of beginning a new one. The answer is what is added. False when absent.",
)
.only_for(&[Task::Chat]);

pub(super) static ADD_SPECIAL_TOKENS: Parameter<bool> = Parameter::boolean(
    "add_special_tokens",
    "Whether the tokenizer puts its special tokens around a text. True when absent; of chats false, since templates \
     write them.",
)
.only_for(TEXT);

pub(super) static TRUNCATE_PROMPT_TOKENS: Parameter<usize> = Parameter::at_least(
    "truncate_prompt_tokens",
    1,
    "Take so many tokens of a longer prompt, from its end. The text may have four times the model's context.",
)
.only_for(TEXT);

/// The fields of a chat that are no parameters of the model, but for its messages, `chat_template_kwargs` and
/// `stream_options`.
pub(in crate::http) static CHAT: &[&Declaration] = &[
    &MODEL.declaration,
    &N.declaration,
    &STREAM.declaration,
    &MAX_COMPLETION_TOKENS.declaration,
    &ADD_GENERATION_PROMPT.declaration,
    &CONTINUE_FINAL_MESSAGE.declaration,
    &ADD_SPECIAL_TOKENS.declaration,
    &TRUNCATE_PROMPT_TOKENS.declaration,
    &CHAT_LOGPROBS.declaration,
    &TOP_LOGPROBS.declaration,
    &ALLOW_COLD_START.declaration,
];

/// The same of a completion, but for its prompts.
pub(in crate::http) static COMPLETION: &[&Declaration] = &[
    &MODEL.declaration,
    &N.declaration,
    &STREAM.declaration,
    &ADD_SPECIAL_TOKENS.declaration,
    &TRUNCATE_PROMPT_TOKENS.declaration,
    &LOGPROBS.declaration,
    &ECHO.declaration,
    &BEST_OF.declaration,
    &ALLOW_COLD_START.declaration,
];

/// What the body of either endpoint says; `prompt` is what it says of the prompts.
#[derive(Debug)]
pub(super) struct TextBody<T> {
    pub(super) model: String,
    pub(super) options: Options,
    pub(super) answer: AnswerOptions,
    /// What the answer is held to.
    pub(super) asked: Option<Asked>,
    /// Tools that it may call.
    pub(super) tools: Option<Tools>,
    pub(super) prompt: T,
}

/// The fields of a body that are not declared: they are no plain values.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChatFields {
    messages: Vec<WireMessage>,
    chat_template_kwargs: Option<serde_json::Map<String, serde_json::Value>>,
    stream_options: Option<StreamOptions>,
}

/// The same of a completion.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CompletionFields {
    prompt: Prompts,
    stream_options: Option<StreamOptions>,
}

/// How much a field of a chat may hold.
pub(super) fn room_in_chat(name: &str) -> Room {
    match name {
        "messages" => Room { max_items: MAX_MESSAGES, max_values: MAX_MESSAGE_VALUES, ..Room::SMALL },
        name => {
            let known = structured::room_in(name).or_else(|| tools::room_in(name));
            known.unwrap_or_else(|| parameters::room_in(TEXT_PARAMETERS, name))
        }
    }
}

/// The same of a completion; no model has a larger context than `max_tokens`.
pub(super) fn room_in_completion(name: &str, max_tokens: usize) -> Room {
    match name {
        "prompt" => {
            let max_values = MAX_CHOICES.saturating_mul(max_tokens.saturating_add(1));
            Room { max_items: MAX_CHOICES, max_numbers: max_tokens, max_values }
        }
        name => structured::room_in(name).unwrap_or_else(|| parameters::room_in(TEXT_PARAMETERS, name)),
    }
}

/// Body of `POST /v1/chat/completions`.
pub(super) fn chat(body: Value) -> Result<TextBody<Conversation>, ApiError> {
    let mut body = settled(body, openai::CHAT)?;
    let asked = structured::take(&mut body)?;
    let tools = tools::take(&mut body, Spelling::Nested)?;
    let mut options = take(&mut body, CHAT, Task::Chat, &["messages", "chat_template_kwargs", "stream_options"])?;
    settle_logprobs(&mut options)?;
    let ChatFields { messages, chat_template_kwargs, stream_options } = body::read(Value::Object(body))?;
    let conversation = conversation(messages, chat_template_kwargs, &options)?;
    let body = TextBody::new(options, stream_options.as_ref(), asked, conversation)?;
    Ok(TextBody { tools, ..body })
}

/// Body of `POST /v1/completions`.
pub(super) fn completion(body: Value) -> Result<TextBody<Vec<Prompt>>, ApiError> {
    let mut body = settled(body, openai::COMPLETION)?;
    let asked = structured::take(&mut body)?;
    let options = take(&mut body, COMPLETION, Task::Completion, &["prompt", "stream_options"])?;
    let CompletionFields { prompt, stream_options } = body::read(Value::Object(body))?;
    TextBody::new(options, stream_options.as_ref(), asked, prompt.0)
}

/// The fields of a body, without those of OpenAI's `fields` that ask for nothing.
pub(super) fn settled(mut body: Value, fields: &[&[openai::Field]]) -> Result<Object, ApiError> {
    openai::settle(fields, &mut body)?;
    body.into_object()
}

/// The declared fields of a body for `task`, which has `others` beside them.
pub(super) fn take(
    body: &mut Object,
    own: &[&'static Declaration],
    task: Task,
    others: &[&str],
) -> Result<Options, ApiError> {
    let parameters = TEXT_PARAMETERS.iter().filter(|declaration| declaration.is_for(task));
    let declarations: Vec<_> = own.iter().chain(parameters).copied().collect();
    Ok(parameters::take(body, &declarations, others)?.options)
}

/// How texts become tokens: as `usual` where the client does not say.
pub(super) fn encoding(options: &Options, usual: Encoding) -> Encoding {
    Encoding {
        add_special_tokens: options.get(&ADD_SPECIAL_TOKENS).unwrap_or(usual.add_special_tokens),
        truncate: options.get(&TRUNCATE_PROMPT_TOKENS).or(usual.truncate),
    }
}

impl<T> TextBody<T> {
    pub(super) fn new(
        options: Options,
        stream_options: Option<&StreamOptions>,
        asked: Option<Asked>,
        prompt: T,
    ) -> Result<Self, ApiError> {
        let model = options.get(&MODEL).unwrap_or_default();
        let answer = AnswerOptions::new(&options, stream_options)?;
        Ok(Self { model, options, answer, asked, tools: None, prompt })
    }

    /// The name under which the client gave the most tokens, for errors.
    pub(super) fn settle_max_tokens(&mut self) -> Result<&'static str, ApiError> {
        match (self.options.get(&MAX_TOKENS), self.options.get(&MAX_COMPLETION_TOKENS)) {
            (Some(old), Some(new)) if old != new => {
                Err(ApiError::field("max_completion_tokens", "contradicts max_tokens; give one of them"))
            }
            (_, Some(new)) => {
                self.options.set(&MAX_TOKENS, new);
                Ok("max_completion_tokens")
            }
            _ => Ok("max_tokens"),
        }
    }
}

/// What has been said so far, and how the template is to show it.
pub(super) fn conversation(
    messages: Vec<WireMessage>,
    variables: Option<serde_json::Map<String, serde_json::Value>>,
    options: &Options,
) -> Result<Conversation, ApiError> {
    let numbered = messages.into_iter().enumerate();
    let messages: Vec<ChatMessage> = numbered.map(|(index, of)| of.into_message(index)).collect::<Result<_, _>>()?;
    for (index, message) in messages.iter().enumerate() {
        let mut calls = messages[..index].iter().flat_map(|earlier| &earlier.tool_calls);
        if message.tool_call_id.as_ref().is_some_and(|id| !calls.any(|call| call.id == *id)) {
            let path = format!("messages[{index}].tool_call_id");
            return Err(ApiError::field(path, "is the id of no call before it"));
        }
    }
    let ending = match (options.get(&ADD_GENERATION_PROMPT), options.get(&CONTINUE_FINAL_MESSAGE).unwrap_or(false)) {
        (Some(true), true) => {
            return Err(ApiError::field(
                "continue_final_message",
                "contradicts add_generation_prompt; give one of them",
            ));
        }
        (_, true) => Ending::FinalMessage,
        (Some(false), false) => Ending::Messages,
        (_, false) => Ending::Answer,
    };
    Ok(Conversation { messages, tools: Vec::new(), ending, variables: variables.unwrap_or_default() })
}

/// How the answer is wanted.
#[derive(Debug, Clone, Copy)]
pub(super) struct AnswerOptions {
    pub(super) n: usize,
    /// Choices of which those are the best.
    pub(super) best_of: usize,
    pub(super) stream: bool,
    /// Whether it begins with the prompt.
    pub(super) echo: bool,
    /// Whether it tells how likely its tokens were.
    pub(super) logprobs: bool,
    pub(super) include_usage: bool,
    /// Whether events are filled up, so that their sizes say little about their texts.
    pub(super) include_obfuscation: bool,
}

impl AnswerOptions {
    fn new(given: &Options, options: Option<&StreamOptions>) -> Result<Self, ApiError> {
        let n = given.get(&N).unwrap_or(1);
        let best_of = given.get(&BEST_OF).unwrap_or(n);
        let stream = given.get(&STREAM).unwrap_or(false);
        if best_of < n {
            return Err(ApiError::field("best_of", format!("is {best_of}, fewer than n, {n}")));
        }
        if stream && best_of > n {
            return Err(ApiError::field(
                "best_of",
                "is known when all choices are whole; leave out stream, or best_of",
            ));
        }
        let asked = |option: fn(&StreamOptions) -> Option<bool>| options.and_then(option).unwrap_or(false);
        let include_usage = asked(|options| options.include_usage);
        let include_obfuscation = asked(|options| options.include_obfuscation);
        if !stream && (include_usage || include_obfuscation) {
            return Err(ApiError::field("stream_options", "has no effect without stream; leave it out"));
        }
        let echo = given.get(&ECHO).unwrap_or(false);
        let logprobs = given.has(&LOGPROBS);
        Ok(Self { n, best_of, stream, echo, logprobs, include_usage, include_obfuscation })
    }
}

/// `stream_options`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StreamOptions {
    include_usage: Option<bool>,
    include_obfuscation: Option<bool>,
}

/// One of `messages`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WireMessage {
    role: Role,
    content: Option<Content>,
    name: Option<String>,
    tool_calls: Option<Vec<WireCall>>,
    tool_call_id: Option<String>,
}

/// One of a message's `tool_calls`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireCall {
    id: String,
    #[serde(rename = "type")]
    _kind: CallKind,
    function: WireFunction,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum CallKind {
    Function,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireFunction {
    name: String,
    arguments: String,
}

impl WireCall {
    /// Of the one at `path`.
    fn into_call(self, path: &str) -> Result<ToolCall, ApiError> {
        let Self { id, function: WireFunction { name, arguments }, .. } = self;
        match serde_json::from_str(&arguments) {
            Ok(arguments) => Ok(ToolCall { id, name, arguments }),
            Err(_) => {
                let path = format!("{path}.function.arguments");
                Err(ApiError::field(path, "must be the text of a JSON object"))
            }
        }
    }
}

/// Who speaks.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    System,
    /// OpenAI's newer name of `system`; chat templates know the older one.
    Developer,
    User,
    Assistant,
    Tool,
    /// Known to be refused by its name.
    Function,
}

impl WireMessage {
    /// What the chat template is given of this message, the one at `index`.
    fn into_message(self, index: usize) -> Result<ChatMessage, ApiError> {
        let role = match self.role {
            Role::System | Role::Developer => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
            Role::Function => {
                let problem = "is OpenAI's older name of tool, which is another kind of message; must be tool";
                return Err(ApiError::field_code(format!("messages[{index}].role"), "unsupported_value", problem));
            }
        };
        let calls = self.tool_calls.unwrap_or_default();
        if !calls.is_empty() && role != "assistant" {
            return Err(ApiError::field(format!("messages[{index}].tool_calls"), "are the assistant's alone"));
        }
        let numbered = calls.into_iter().enumerate();
        let call = |(place, call): (usize, WireCall)| call.into_call(&format!("messages[{index}].tool_calls[{place}]"));
        let tool_calls = numbered.map(call).collect::<Result<Vec<_>, _>>()?;
        let id_path = format!("messages[{index}].tool_call_id");
        match (&self.tool_call_id, role) {
            (None, "tool") => return Err(ApiError::field_code(id_path, "missing_required_parameter", "is missing")),
            (Some(_), "tool") | (None, _) => (),
            (Some(_), _) => return Err(ApiError::field(id_path, "is of messages of the role tool alone")),
        }
        let content = match (self.content, self.role) {
            (Some(Content(content)), _) => content,
            // OpenAI's clients have no content to send back where the assistant only called tools.
            (None, Role::Assistant) => String::new(),
            (None, _) => {
                let path = format!("messages[{index}].content");
                return Err(ApiError::field_code(path, "missing_required_parameter", "is missing"));
            }
        };
        let tool_call_id = self.tool_call_id;
        Ok(ChatMessage { role: role.into(), content, name: self.name, tool_calls, tool_call_id })
    }
}

/// Text, or a list of text parts, which are joined.
#[derive(Debug)]
struct Content(String);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Part {
    #[serde(rename = "type")]
    _kind: PartKind,
    text: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum PartKind {
    Text,
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContentVisitor;

        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string or a list of text parts")
            }

            fn visit_str<E>(self, text: &str) -> Result<Content, E> {
                Ok(Content(text.to_owned()))
            }

            fn visit_string<E>(self, text: String) -> Result<Content, E> {
                Ok(Content(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Content, A::Error> {
                let mut text = String::new();
                while let Some(part) = parts.next_element::<Part>()? {
                    text.push_str(&part.text);
                }
                Ok(Content(text))
            }
        }

        deserializer.deserialize_any(ContentVisitor)
    }
}

/// `prompt`: a text, tokens, or a list of either.
#[derive(Debug)]
pub(super) struct Prompts(pub(super) Vec<Prompt>);

/// A prompt as a model is given it.
#[derive(Debug)]
pub(super) struct Encoded {
    pub(super) tokens: Vec<u32>,
    pub(super) echo: Option<Arc<Echo>>,
}

impl From<Vec<u32>> for Encoded {
    fn from(tokens: Vec<u32>) -> Self {
        Self { tokens, echo: None }
    }
}

/// One prompt.
#[derive(Debug)]
pub(super) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

impl Prompt {
    /// Bytes that a tokenizer has to read, or to write where the prompt is to be echoed.
    pub(super) fn num_bytes(&self, echoes: bool) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Tokens(tokens) if echoes => size_of_val(tokens.as_slice()),
            Self::Tokens(_) => 0,
        }
    }

    /// The tokens that the model of this card is given, and what is echoed of them.
    pub(super) fn encode(
        self,
        card: &TextCard,
        encoding: Encoding,
        echoes: bool,
        cancelled: &CancelToken,
    ) -> tale_models::Result<Encoded> {
        let (tokens, text) = match self {
            Self::Text(text) => {
                let tokens = card.encode(&text, encoding, cancelled)?;
                // Its beginning may be cut off.
                let is_whole = encoding.truncate.is_none_or(|most| tokens.len() < most);
                (tokens, Some(text).filter(|_| is_whole))
            }
            Self::Tokens(tokens) => (encoding.cut(tokens), None),
        };
        let echo = echoes && !tokens.is_empty();
        let echo = echo.then(|| Echo::new(card, &tokens, text)).transpose()?;
        Ok(Encoded { tokens, echo: echo.map(Arc::new) })
    }
}

/// What is said of numbers that name no token.
const NO_TOKEN: &str = "is not a token of any vocabulary";

/// An element of a list of prompts, or of tokens.
enum Element {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;

        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = Element;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string, a token or a list of tokens")
            }

            fn visit_str<E>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Text(text.to_owned()))
            }

            fn visit_u64<E: serde::de::Error>(self, token: u64) -> Result<Element, E> {
                u32::try_from(token).map(Element::Token).map_err(|_| E::custom(NO_TOKEN))
            }

            fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<Element, E> {
                Err(E::custom(NO_TOKEN))
            }

            fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<Element, E> {
                Err(E::custom(NO_TOKEN))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Element, A::Error> {
                let mut tokens = Vec::new();
                while let Some(token) = list.next_element()? {
                    tokens.push(token);
                }
                Ok(Element::Tokens(tokens))
            }
        }

        deserializer.deserialize_any(ElementVisitor)
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptsVisitor;

        impl<'de> Visitor<'de> for PromptsVisitor {
            type Value = Prompts;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string, a list of strings, a list of tokens or a list of lists of tokens")
            }

            /// OpenAI's own default: the beginning of a text.
            fn visit_unit<E>(self) -> Result<Prompts, E> {
                Ok(Prompts(vec![Prompt::Text(String::new())]))
            }

            fn visit_str<E>(self, text: &str) -> Result<Prompts, E> {
                Ok(Prompts(vec![Prompt::Text(text.to_owned())]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompts, A::Error> {
                let (mut prompts, mut tokens) = (Vec::new(), Vec::new());
                while let Some(element) = list.next_element()? {
                    match element {
                        Element::Text(text) => prompts.push(Prompt::Text(text)),
                        Element::Tokens(tokens) => prompts.push(Prompt::Tokens(tokens)),
                        Element::Token(token) => tokens.push(token),
                    }
                    if !tokens.is_empty() && !prompts.is_empty() {
                        return Err(A::Error::custom("mixes tokens with prompts"));
                    }
                }
                if prompts.is_empty() {
                    prompts.push(Prompt::Tokens(tokens));
                }
                Ok(Prompts(prompts))
            }
        }

        deserializer.deserialize_any(PromptsVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(prompt: &str, expected: &str) {
        let prompts = serde_json::from_str::<Prompts>(prompt);
        let found = prompts.map(|prompts| format!("{:?}", prompts.0)).unwrap_or_else(|error| error.to_string());
        assert!(found.starts_with(expected), "{prompt}: {found}");
    }

    #[test]
    fn a_prompt_is_text_or_tokens_or_several() {
        check("\"a\"", "[Text(\"a\")]");
        check("[\"a\", \"b\"]", "[Text(\"a\"), Text(\"b\")]");
        check("[1, 2]", "[Tokens([1, 2])]");
        check("[[1], [2, 3]]", "[Tokens([1]), Tokens([2, 3])]");
        check("[]", "[Tokens([])]");
        check("[1, \"a\"]", "mixes tokens with prompts");
        for number in ["5000000000", "-1", "0.5", "1e30"] {
            check(&format!("[{number}]"), "is not a token");
        }
        check("7", "invalid type");
    }

    #[test]
    fn content_parts_are_joined_and_other_kinds_refused() {
        let message = r#"{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}"#;
        let message =
            serde_json::from_str::<WireMessage>(message).expect("valid").into_message(0).expect("has content");
        assert_eq!(message.content, "ab");
        let picture = r#"{"role": "user", "content": [{"type": "image_url", "text": "a"}]}"#;
        assert!(serde_json::from_str::<WireMessage>(picture).is_err());
    }
}
