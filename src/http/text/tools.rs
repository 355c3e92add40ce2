//! Tools as bodies of chats say them: `tools`, `tool_choice`, `parallel_tool_calls`; and calls and results in messages.
//!
//! Owns: these fields. Does not know: how a model writes a call (`tale_models::tools`), what a schema may hold.

use serde_json::json;
use tale_models::TextCard;
use tale_models::grammar::{Asked, Form};
use tale_models::tools::{Calls, MAX_TOOLS, Otherwise, Tool, ToolFormat};

use super::structured::{RESPONSE_FORMAT, check_name, no_others, object, required};
use crate::http::body::value::{Object, Room, Value};
use crate::http::error::ApiError;

/// The fields that are taken here.
pub(in crate::http) const TOOLS: &str = "tools";
/// See [`TOOLS`].
pub(in crate::http) const TOOL_CHOICE: &str = "tool_choice";
/// See [`TOOLS`].
pub(in crate::http) const PARALLEL: &str = "parallel_tool_calls";
/// The tools of a request have at most so many values.
const MAX_TOOL_VALUES: usize = 32 << 10;

/// What a chat says of tools.
#[derive(Debug)]
pub(super) struct Tools {
    tools: Vec<Tool>,
    choice: Choice,
    is_parallel: bool,
}

#[derive(Debug, PartialEq)]
enum Choice {
    Auto,
    Required,
    /// The tool at this place.
    One(usize),
}

/// How much `tools` may hold; `None` for other fields.
pub(super) fn room_in(name: &str) -> Option<Room> {
    const ROOM: Room = Room { max_items: MAX_TOOLS, max_numbers: MAX_TOOL_VALUES, max_values: MAX_TOOL_VALUES };
    (name == TOOLS).then_some(ROOM)
}

/// Takes these fields out of a body; `None` where no tool may be called.
pub(super) fn take(body: &mut Object) -> Result<Option<Tools>, ApiError> {
    let mut given = |name: &str| body.shift_remove(name).filter(|value| *value != Value::Null);
    let (tools, choice, parallel) = (given(TOOLS), given(TOOL_CHOICE), given(PARALLEL));
    let is_parallel = match parallel {
        None => true,
        Some(Value::Bool(value)) => value,
        Some(_) => return Err(ApiError::field(PARALLEL, "must be true or false")),
    };
    let tools = match tools {
        None => Vec::new(),
        Some(Value::List(tools)) => {
            let numbered = tools.into_iter().enumerate();
            numbered.map(|(index, of)| tool(&format!("{TOOLS}[{index}]"), of)).collect::<Result<Vec<_>, _>>()?
        }
        Some(_) => return Err(ApiError::field(TOOLS, "must be a list")),
    };
    for (index, tool) in tools.iter().enumerate() {
        if tools[..index].iter().any(|other| other.name == tool.name) {
            let path = format!("{TOOLS}[{index}].function.name");
            return Err(ApiError::field(path, "is the name of another tool, too"));
        }
    }
    let Some(choice) = tool_choice(choice, &tools)? else { return Ok(None) };
    Ok((!tools.is_empty()).then_some(Tools { tools, choice, is_parallel }))
}

fn tool(path: &str, value: Value) -> Result<Tool, ApiError> {
    let mut fields = object(path, value)?;
    check_kind(path, &mut fields)?;
    let path_of_function = format!("{path}.function");
    let function = required(&path_of_function, given(&mut fields, "function"))?;
    no_others(path, &fields, &["type", "function"])?;
    function_of(&path_of_function, function)
}

fn function_of(path: &str, value: Value) -> Result<Tool, ApiError> {
    let mut fields = object(path, value)?;
    let name_path = format!("{path}.name");
    let name = check_name(&name_path, &required(&name_path, given(&mut fields, "name"))?)?;
    let description = match given(&mut fields, "description") {
        None => None,
        Some(Value::Text(text)) => Some(text),
        Some(_) => return Err(ApiError::field(format!("{path}.description"), "must be a string")),
    };
    // Arguments are held to their schema, strict or not.
    if given(&mut fields, "strict").is_some_and(|strict| !matches!(strict, Value::Bool(_))) {
        return Err(ApiError::field(format!("{path}.strict"), "must be true or false"));
    }
    let field = format!("{path}.parameters");
    let parameters = match given(&mut fields, "parameters") {
        None => json!({"type": "object", "properties": {}, "additionalProperties": false}),
        Some(Value::Object(schema)) => arguments(&field, schema)?,
        Some(_) => return Err(ApiError::field(field, "must be a schema of an object")),
    };
    no_others(path, &fields, &["name", "description", "parameters", "strict"])?;
    Ok(Tool { name, description, parameters, field })
}

/// A schema of objects alone, which arguments are. `{}` is that of a function without any.
fn arguments(field: &str, schema: Object) -> Result<serde_json::Value, ApiError> {
    let is_object = matches!(schema.get("type"), None | Some(Value::Null)) || schema["type"].text() == Some("object");
    if !is_object {
        return Err(ApiError::field(format!("{field}.type"), "must be object: arguments have names"));
    }
    let is_empty = schema.is_empty();
    let mut schema = Value::Object(schema).into_json();
    schema["type"] = "object".into();
    if is_empty {
        schema["additionalProperties"] = false.into();
    }
    Ok(schema)
}

fn given(fields: &mut Object, name: &str) -> Option<Value> {
    fields.shift_remove(name).filter(|value| *value != Value::Null)
}

fn check_kind(path: &str, fields: &mut Object) -> Result<(), ApiError> {
    let path = format!("{path}.type");
    match required(&path, given(fields, "type"))?.text() {
        Some("function") => Ok(()),
        _ => Err(ApiError::field_code(path, "unsupported_value", "only function is supported")),
    }
}

/// `None` is no call.
fn tool_choice(value: Option<Value>, tools: &[Tool]) -> Result<Option<Choice>, ApiError> {
    let needs_tools = |choice: Choice| match tools.is_empty() {
        true => Err(ApiError::field(TOOL_CHOICE, "asks for a call, and there are no tools")),
        false => Ok(Some(choice)),
    };
    let value = match value {
        None => return Ok(Some(Choice::Auto)),
        Some(value) => value,
    };
    match value.text() {
        Some("none") => return Ok(None),
        Some("auto") => return Ok(Some(Choice::Auto)),
        Some("required") => return needs_tools(Choice::Required),
        Some(_) => return Err(ApiError::field(TOOL_CHOICE, "must be none, auto, required or a function")),
        None => (),
    }
    let mut fields = object(TOOL_CHOICE, value)?;
    check_kind(TOOL_CHOICE, &mut fields)?;
    let path = format!("{TOOL_CHOICE}.function");
    let mut function = object(&path, required(&path, given(&mut fields, "function"))?)?;
    no_others(TOOL_CHOICE, &fields, &["type", "function"])?;
    let name_path = format!("{path}.name");
    let name = required(&name_path, given(&mut function, "name"))?;
    no_others(&path, &function, &["name"])?;
    match tools.iter().position(|tool| Some(tool.name.as_str()) == name.text()) {
        Some(place) => needs_tools(Choice::One(place)),
        None => Err(ApiError::field(name_path, "is the name of no tool")),
    }
}

impl Tools {
    /// The tools, for the model's template.
    pub(super) fn all(&self) -> &[Tool] {
        &self.tools
    }

    /// What answers of the model of this card are held to, and how their calls are written. `asked` is what they are held to
    /// where there is no call.
    pub(super) fn held_to(self, card: &TextCard, asked: Option<Asked>) -> Result<(Asked, ToolFormat), ApiError> {
        let format = card.tool_format(TOOLS)?;
        let otherwise = match (&self.choice, asked) {
            (Choice::Auto, None) => Otherwise::Text,
            (Choice::Auto, Some(Asked { field, form: Form::Schema(schema) })) if format == ToolFormat::Hermes => {
                Otherwise::Value { schema, field }
            }
            (Choice::Auto, Some(Asked { field, .. })) => {
                let problem =
                    "cannot stand beside tools that may be called, of this model or of any; let tool_choice decide";
                return Err(ApiError::field(field, problem));
            }
            (Choice::Required | Choice::One(_), None) => Otherwise::Nothing,
            // OpenAI's field is about texts, which there are none.
            (Choice::Required | Choice::One(_), Some(Asked { field, .. })) if field.starts_with(RESPONSE_FORMAT) => {
                Otherwise::Nothing
            }
            (Choice::Required | Choice::One(_), Some(Asked { field, .. })) => {
                return Err(ApiError::field(field, "contradicts tool_choice, by which the answer is a call"));
            }
        };
        let Self { mut tools, choice, is_parallel } = self;
        if let Choice::One(place) = choice {
            tools = vec![tools.swap_remove(place)];
        }
        // A named tool is called once.
        let is_parallel = is_parallel && !matches!(choice, Choice::One(_));
        let calls = Calls { format, tools, is_parallel, otherwise };
        Ok((Asked { field: TOOLS.to_owned(), form: Form::Calls(calls) }, format))
    }
}
