//! The body of `/v1/responses`.
//!
//! Owns: its fields, but for `input`. Does not know: what of OpenAI's fields asks for nothing (`crate::http::openai`).

use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};
use tale_models::chat_template::Conversation;
use tale_models::parameter::{Declaration, Options, Parameter, Task};
use tale_models::text_parameters::MAX_TOKENS;

use super::super::structured::{self, given, object, required};
use super::super::tools::{self, Spelling, TOOLS};
use super::super::wire::{
    self, ADD_SPECIAL_TOKENS, MAX_MESSAGE_VALUES, MAX_MESSAGES, STREAM, StreamOptions, TRUNCATE_PROMPT_TOKENS, TextBody,
};
use super::input;
use crate::http::body::value::{Object, Room, Value};
use crate::http::cold_start::ALLOW_COLD_START;
use crate::http::diffusion::MODEL;
use crate::http::error::ApiError;
use crate::http::{body, openai};

static MAX_OUTPUT_TOKENS: Parameter<usize> = Parameter::at_least(
    "max_output_tokens",
    1,
    "Most tokens to generate; what is left of the model's context when absent.",
)
.only_for(&[Task::Response])
.narrowed_by_models();

/// The fields that are no parameters of the model, but for those of [`Fields`] and what answers are held to.
pub(in crate::http) static RESPONSE: &[&Declaration] = &[
    &MODEL.declaration,
    &STREAM.declaration,
    &MAX_OUTPUT_TOKENS.declaration,
    &ADD_SPECIAL_TOKENS.declaration,
    &TRUNCATE_PROMPT_TOKENS.declaration,
    &ALLOW_COLD_START.declaration,
];

/// Most pairs of `metadata`, as in OpenAI's API.
pub(in crate::http) const MAX_METADATA: usize = 16;
/// Most characters of a name there.
pub(in crate::http) const MAX_METADATA_NAME: usize = 64;
/// Most characters of a value there.
pub(in crate::http) const MAX_METADATA_VALUE: usize = 512;
/// Fields that are neither declared nor taken by other rooms.
const INPUT: &str = "input";
const TEXT: &str = "text";
const METADATA: &str = "metadata";

/// The fields of a body that are not declared.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    instructions: Option<String>,
    chat_template_kwargs: Option<serde_json::Map<String, Json>>,
    stream_options: Option<StreamOptions>,
}

/// What an answer repeats of its request.
#[derive(Debug, Serialize)]
pub(super) struct Repeated {
    instructions: Option<String>,
    max_output_tokens: Option<usize>,
    metadata: Json,
    parallel_tool_calls: bool,
    text: Json,
    tool_choice: Json,
    tools: Vec<Json>,
}

/// How much a field may hold.
pub(super) fn room_in(name: &str) -> Room {
    match name {
        INPUT => Room { max_items: MAX_MESSAGES, max_values: MAX_MESSAGE_VALUES, ..Room::SMALL },
        // A schema stands in it.
        TEXT => structured::ROOM,
        name => wire::room_in_chat(name),
    }
}

/// Body of `POST /v1/responses`: the order, and what its answer repeats.
pub(super) fn response(body: Value) -> Result<(TextBody<Conversation>, Repeated), ApiError> {
    let mut body = wire::settled(body, openai::RESPONSE)?;
    let metadata = metadata(given(&mut body, METADATA))?;
    let format = format(given(&mut body, TEXT))?;
    let mut repeated = Repeated {
        instructions: None,
        max_output_tokens: None,
        metadata,
        parallel_tool_calls: body.get(tools::PARALLEL) != Some(&Value::Bool(false)),
        text: json!({"format": copy(format.as_ref()).unwrap_or_else(|| json!({"type": "text"})), "verbosity": "medium"}),
        tool_choice: copy(body.get(tools::TOOL_CHOICE)).unwrap_or_else(|| "auto".into()),
        tools: repeated_tools(body.get(TOOLS)),
    };
    let asked = structured::take_of_response(&mut body, format)?;
    let tools = tools::take(&mut body, Spelling::Flat)?;
    let others = [INPUT, "instructions", "chat_template_kwargs", "stream_options"];
    let mut options = wire::take(&mut body, RESPONSE, Task::Response, &others)?;
    let input = required(INPUT, given(&mut body, INPUT))?;
    let Fields { instructions, chat_template_kwargs, stream_options } = body::read(Value::Object(body))?;
    let conversation = Conversation {
        messages: input::messages(instructions.as_deref(), input)?,
        variables: chat_template_kwargs.unwrap_or_default(),
        ..Conversation::default()
    };
    repeated.instructions = instructions;
    repeated.max_output_tokens = settle_max_tokens(&mut options);
    let order = TextBody::new(options, stream_options.as_ref(), asked, conversation)?;
    Ok((TextBody { tools, ..order }, repeated))
}

/// Gives the most tokens the name that all models know.
fn settle_max_tokens(options: &mut Options) -> Option<usize> {
    let most = options.get(&MAX_OUTPUT_TOKENS);
    if let Some(most) = most {
        options.set(&MAX_TOKENS, most);
    }
    most
}

fn copy(value: Option<&Value>) -> Option<Json> {
    value.filter(|value| **value != Value::Null).map(|value| value.clone().into_json())
}

/// Tools as they came. Where a request does not say so, arguments are held to their schemas all the same.
fn repeated_tools(tools: Option<&Value>) -> Vec<Json> {
    let Some(Value::List(tools)) = tools else { return Vec::new() };
    let tool = |tool: &Value| {
        let mut tool = tool.clone().into_json();
        if let Some(fields) = tool.as_object_mut() {
            for name in ["description", "parameters"] {
                fields.entry(name).or_insert(Json::Null);
            }
            let strict = fields.entry("strict").or_insert(Json::Null);
            if strict.is_null() {
                *strict = true.into();
            }
        }
        tool
    };
    tools.iter().map(tool).collect()
}

/// `format` of `text`, where it is alone: what else it may have asks for nothing and has been taken.
fn format(text: Option<Value>) -> Result<Option<Value>, ApiError> {
    let Some(text) = text else { return Ok(None) };
    let mut fields = object(TEXT, text)?;
    let format = given(&mut fields, "format");
    structured::no_others(TEXT, &fields, &["format", "verbosity"])?;
    Ok(format)
}

/// Labels that the answer repeats, within OpenAI's bounds.
fn metadata(value: Option<Value>) -> Result<Json, ApiError> {
    let pairs = match value {
        None => Object::new(),
        Some(value) => object(METADATA, value)?,
    };
    if pairs.len() > MAX_METADATA {
        return Err(ApiError::field(METADATA, format!("has {} pairs; at most {MAX_METADATA}", pairs.len())));
    }
    for (name, value) in pairs.iter() {
        let length = value.text().map(|text| text.chars().count());
        let problem = match length {
            _ if name.chars().count() > MAX_METADATA_NAME => {
                format!("has a name of more than {MAX_METADATA_NAME} characters")
            }
            None => "has a value that is no string".to_owned(),
            Some(length) if length > MAX_METADATA_VALUE => {
                format!("has a value of {length} characters; at most {MAX_METADATA_VALUE}")
            }
            Some(_) => continue,
        };
        return Err(ApiError::field(METADATA, problem));
    }
    Ok(Value::Object(pairs).into_json())
}
