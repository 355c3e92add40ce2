//! Tools as bodies of chats and responses say them: `tools`, `tool_choice`, `parallel_tool_calls`.
//!
//! Owns: these fields, in both spellings. Does not know: how a model writes a call (`tale_models::tools`), what a schema may
//! hold, calls and results in what was said before.

use serde_json::json;
use tale_models::TextCard;
use tale_models::grammar::{Asked, Form};
use tale_models::tools::{Calls, MAX_TOOLS, Otherwise, Tool, ToolFormat};

use super::structured::{check_name, given, is_of_texts, no_others, object, required};
use crate::http::body::value::{Object, Room, Value};
use crate::http::error::ApiError;

/// The fields that are taken here.
pub(in crate::http) const TOOLS: &str = "tools";
/// See [`TOOLS`].
pub(in crate::http) const TOOL_CHOICE: &str = "tool_choice";
/// See [`TOOLS`].
pub(in crate::http) const PARALLEL: &str = "parallel_tool_calls";
/// The kind of choice that names several.
const ALLOWED: &str = "allowed_tools";
/// The tools of a request have at most so many values.
const MAX_TOOL_VALUES: usize = 32 << 10;

/// How an endpoint spells a function, in lists of tools and where one is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// In a field `function`, as chats do.
    Nested,
    /// Beside its `type`, as responses do.
    Flat,
}

/// Tools of OpenAI's own, which a request does not describe but only names.
const BUILT_IN: &[&str] = &[
    "apply_patch",
    "code_interpreter",
    "computer",
    "computer_use_preview",
    "custom",
    "file_search",
    "image_generation",
    "local_shell",
    "mcp",
    "namespace",
    "programmatic_tool_calling",
    "shell",
    "tool_search",
    "web_search",
    "web_search_preview",
];

/// What a request says of tools.
#[derive(Debug)]
pub(super) struct Tools {
    tools: Vec<Tool>,
    /// Places of those that may be called.
    callable: Vec<usize>,
    /// Whether there is a call in any case.
    is_required: bool,
    is_parallel: bool,
}

/// What a request says of the calls.
#[derive(Debug, PartialEq)]
enum Choice {
    Never,
    Auto,
    Required,
    /// One call of the tool at this place.
    One(usize),
    /// Calls of the tools at these places alone.
    Allowed {
        places: Vec<usize>,
        is_required: bool,
    },
}

/// How much `tools` may hold; `None` for other fields.
pub(super) fn room_in(name: &str) -> Option<Room> {
    const ROOM: Room = Room { max_items: MAX_TOOLS, max_numbers: MAX_TOOL_VALUES, max_values: MAX_TOOL_VALUES };
    (name == TOOLS).then_some(ROOM)
}

/// Takes these fields out of a body; `None` where no tool may be called.
pub(super) fn take(body: &mut Object, spelling: Spelling) -> Result<Option<Tools>, ApiError> {
    let (tools, choice, parallel) = (given(body, TOOLS), given(body, TOOL_CHOICE), given(body, PARALLEL));
    let is_parallel = match parallel {
        None => true,
        Some(Value::Bool(value)) => value,
        Some(_) => return Err(ApiError::field(PARALLEL, "must be true or false")),
    };
    let tools = match tools {
        None => Vec::new(),
        Some(Value::List(tools)) => {
            let numbered = tools.into_iter().enumerate();
            let tool = |(index, value)| tool(&format!("{TOOLS}[{index}]"), value, spelling);
            numbered.map(tool).collect::<Result<Vec<_>, _>>()?
        }
        Some(_) => return Err(ApiError::field(TOOLS, "must be a list")),
    };
    for (index, tool) in tools.iter().enumerate() {
        if tools[..index].iter().any(|other| other.name == tool.name) {
            let function = if spelling == Spelling::Nested { ".function" } else { "" };
            let path = format!("{TOOLS}[{index}]{function}.name");
            return Err(ApiError::field(path, "is the name of another tool, too"));
        }
    }
    let choice = choice.map_or(Ok(Choice::Auto), |choice| tool_choice(choice, &tools, spelling))?;
    let all = || (0..tools.len()).collect();
    let (callable, is_required, is_parallel) = match choice {
        Choice::Never => return Ok(None),
        Choice::Auto => (all(), false, is_parallel),
        Choice::Required => (all(), true, is_parallel),
        Choice::One(place) => (vec![place], true, false),
        Choice::Allowed { places, is_required } => (places, is_required, is_parallel),
    };
    if tools.is_empty() && is_required {
        return Err(ApiError::field(TOOL_CHOICE, "asks for a call, and there are no tools"));
    }
    Ok((!tools.is_empty()).then_some(Tools { tools, callable, is_required, is_parallel }))
}

fn tool(path: &str, value: Value, spelling: Spelling) -> Result<Tool, ApiError> {
    let mut fields = object(path, value)?;
    check_kind(path, &mut fields)?;
    let (path, function) = function(path, fields, spelling)?;
    function_of(&path, function)
}

/// The fields that say which function it is, and where they stand; `fields` are those beside the type.
fn function(path: &str, mut fields: Object, spelling: Spelling) -> Result<(String, Object), ApiError> {
    match spelling {
        Spelling::Flat => Ok((path.to_owned(), fields)),
        Spelling::Nested => {
            let inner = format!("{path}.function");
            let function = object(&inner, required(&inner, given(&mut fields, "function"))?)?;
            no_others(path, &fields, &["type", "function"])?;
            Ok((inner, function))
        }
    }
}

fn function_of(path: &str, mut fields: Object) -> Result<Tool, ApiError> {
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

fn check_kind(path: &str, fields: &mut Object) -> Result<(), ApiError> {
    let path = format!("{path}.type");
    let kind = required(&path, given(fields, "type"))?;
    let problem = match kind.text() {
        Some("function") => return Ok(()),
        text => match BUILT_IN.iter().find(|name| text == Some(name)) {
            Some(name) => format!("{name} is none of Tale's: only function is supported"),
            None => "only function is supported".to_owned(),
        },
    };
    Err(ApiError::field_code(path, "unsupported_value", problem))
}

fn tool_choice(value: Value, tools: &[Tool], spelling: Spelling) -> Result<Choice, ApiError> {
    match value.text() {
        Some("none") => return Ok(Choice::Never),
        Some("auto") => return Ok(Choice::Auto),
        Some("required") => return Ok(Choice::Required),
        Some(_) => return Err(ApiError::field(TOOL_CHOICE, "must be none, auto, required or a function")),
        None => (),
    }
    let mut fields = object(TOOL_CHOICE, value)?;
    if fields.get("type").and_then(Value::text) == Some(ALLOWED) {
        fields.shift_remove("type");
        return allowed(fields, tools, spelling);
    }
    Ok(Choice::One(place(TOOL_CHOICE, fields, tools, spelling)?))
}

/// `allowed_tools`, whose fields chats have in another object.
fn allowed(mut fields: Object, tools: &[Tool], spelling: Spelling) -> Result<Choice, ApiError> {
    let mut path = TOOL_CHOICE.to_owned();
    if spelling == Spelling::Nested {
        path.push_str(".allowed_tools");
        let inner = object(&path, required(&path, given(&mut fields, ALLOWED))?)?;
        no_others(TOOL_CHOICE, &fields, &["type", ALLOWED])?;
        fields = inner;
    }
    let mode_path = format!("{path}.mode");
    let is_required = match required(&mode_path, given(&mut fields, "mode"))?.text() {
        Some("auto") => false,
        Some("required") => true,
        _ => return Err(ApiError::field(mode_path, "must be auto or required")),
    };
    let list_path = format!("{path}.tools");
    let Value::List(chosen) = required(&list_path, given(&mut fields, "tools"))? else {
        return Err(ApiError::field(list_path, "must be a list"));
    };
    no_others(&path, &fields, &["type", "mode", "tools"])?;
    let mut places = Vec::with_capacity(chosen.len());
    for (index, value) in chosen.into_iter().enumerate() {
        let path = format!("{list_path}[{index}]");
        let place = place(&path, object(&path, value)?, tools, spelling)?;
        if !places.contains(&place) {
            places.push(place);
        }
    }
    match places.is_empty() {
        true => Err(ApiError::field(list_path, "names no tool; tool_choice none forbids them all")),
        false => Ok(Choice::Allowed { places, is_required }),
    }
}

/// The place of the tool that is chosen at `path`.
fn place(path: &str, mut fields: Object, tools: &[Tool], spelling: Spelling) -> Result<usize, ApiError> {
    check_kind(path, &mut fields)?;
    let (path, mut function) = function(path, fields, spelling)?;
    let name_path = format!("{path}.name");
    let name = required(&name_path, given(&mut function, "name"))?;
    no_others(&path, &function, &["name"])?;
    let place = tools.iter().position(|tool| Some(tool.name.as_str()) == name.text());
    place.ok_or_else(|| ApiError::field(name_path, "is the name of no tool"))
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
        let Self { tools, callable, is_required, is_parallel } = self;
        let otherwise = match (is_required, asked) {
            (false, None) => Otherwise::Text,
            (false, Some(Asked { field, form: Form::Schema(schema) })) if format == ToolFormat::Hermes => {
                Otherwise::Value { schema, field }
            }
            (false, Some(Asked { field, .. })) => {
                let problem =
                    "cannot stand beside tools that may be called, of this model or of any; let tool_choice decide";
                return Err(ApiError::field(field, problem));
            }
            (true, None) => Otherwise::Nothing,
            // OpenAI's fields are about texts, which there are none.
            (true, Some(Asked { field, .. })) if is_of_texts(&field) => Otherwise::Nothing,
            (true, Some(Asked { field, .. })) => {
                return Err(ApiError::field(field, "contradicts tool_choice, by which the answer is a call"));
            }
        };
        let tools = callable.into_iter().map(|place| tools[place].clone()).collect();
        let calls = Calls { format, tools, is_parallel, otherwise };
        Ok((Asked { field: TOOLS.to_owned(), form: Form::Calls(calls) }, format))
    }
}
