//! The OpenAPI document: `GET /openapi.json` and `tale openapi`.
//!
//! Owns: the document. Paths and answers are written down in `skeleton.json`; the fields of requests, the effective
//! parameters in answers and the parameters of queries come from their declarations. Does not know: what any of them
//! means, how a request is worked off.

use std::sync::{LazyLock, OnceLock};

use axum::body::Bytes;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use tale_models::diffusion::parameters::PARAMETERS;
use tale_models::parameter::{Declaration, Task};
use tale_models::text_parameters::TEXT_PARAMETERS;

use super::error::ApiError;
use super::videos::Again;
use super::{AppState, images, jobs, openai, text, videos};
use crate::parameters::is_echoed;

mod schema;
#[cfg(test)]
mod table;
#[cfg(test)]
mod tests;

static DOCUMENT: LazyLock<Value> = LazyLock::new(make);

/// The document, which is of OpenAPI 3.1.
pub fn document() -> &'static Value {
    &DOCUMENT
}

/// `GET /openapi.json`, which is written once.
pub(super) async fn serve(State(state): State<AppState>) -> Result<Response, ApiError> {
    static TEXT: OnceLock<Bytes> = OnceLock::new();
    let text = match TEXT.get() {
        Some(text) => text.clone(),
        None => state.compute().run(0, |_| TEXT.get_or_init(|| document().to_string().into()).clone()).await?,
    };
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

/// The fields that a body for `task` may have, as they are declared.
fn fields(task: Task) -> Vec<&'static Declaration> {
    let (own, parameters): (_, &[_]) = match task {
        Task::Chat => (text::wire::CHAT, TEXT_PARAMETERS),
        Task::Completion => (text::wire::COMPLETION, TEXT_PARAMETERS),
        Task::Response => (text::responses::wire::RESPONSE, TEXT_PARAMETERS),
        Task::ImageGeneration | Task::ImageEdit => (images::OWN, &PARAMETERS),
        Task::Video => (videos::OWN, &PARAMETERS),
    };
    own.iter().chain(parameters.iter().filter(|declaration| declaration.is_for(task))).copied().collect()
}

fn make() -> Value {
    let skeleton = include_str!("skeleton.json");
    let mut document: Value = serde_json::from_str(skeleton).expect("it is tested to be JSON: this is a bug");
    document["info"]["version"] = env!("CARGO_PKG_VERSION").into();
    let schemas = &mut document["components"]["schemas"];
    for (name, task) in [
        ("ChatRequest", Task::Chat),
        ("CompletionRequest", Task::Completion),
        ("ResponseRequest", Task::Response),
        ("ImageGenerationRequest", Task::ImageGeneration),
        ("ImageEditRequest", Task::ImageEdit),
        ("VideoRequest", Task::Video),
    ] {
        schemas[name] = request(task);
    }
    for (again, names_video, request, form) in [
        (Again::Remix, false, "VideoRemixRequest", "VideoRemixForm"),
        (Again::Extension, false, "VideoExtendRequest", "VideoExtendForm"),
        (Again::Extension, true, "VideoExtensionRequest", "VideoExtensionForm"),
    ] {
        schemas[request] = made_from_a_video(again, names_video, false);
        schemas[form] = made_from_a_video(again, names_video, true);
    }
    for (name, task) in [("ImageEditForm", Task::ImageEdit), ("VideoForm", Task::Video)] {
        schemas[name] = form(task);
    }
    for (name, task) in [
        ("ImageGenerationParameters", Task::ImageGeneration),
        ("ImageEditParameters", Task::ImageEdit),
        ("VideoParameters", Task::Video),
    ] {
        schemas[name] = effective(task);
    }
    schemas["TokenizeRequest"] = of_declared(
        text::tokens::TOKENIZE,
        vec![
            ("prompt", json!({"type": ["string", "null"], "description": "Either this or `messages`."})),
            ("messages", messages()),
            ("chat_template_kwargs", reference("ChatTemplateKwargs")),
        ],
        &[],
    );
    let tokens = json!({"type": "array", "items": {"type": "integer", "minimum": 0}});
    schemas["DetokenizeRequest"] = of_declared(text::tokens::DETOKENIZE, vec![("tokens", tokens)], &["tokens"]);
    schemas["ModelLoadRequest"] = of_declared(super::models::LOAD, Vec::new(), &[]);
    add_nested(schemas);
    add_query(&mut document["paths"]["/v1/videos"]["get"], videos::LIST_QUERY);
    add_query(&mut document["paths"]["/v1/jobs"]["get"], jobs::LIST_QUERY);
    add_query(&mut document["paths"]["/v1/videos/{id}/content"]["get"], videos::CONTENT_QUERY);
    document
}

/// A JSON body.
fn request(task: Task) -> Value {
    let fields = fields(task);
    let mut properties: Map<String, Value> =
        fields.iter().map(|declaration| (declaration.name.to_owned(), schema::in_json(declaration))).collect();
    let mut required: Vec<&str> = fields.iter().filter(|of| of.is_required).map(|of| of.name).collect();
    let prompt = match task {
        Task::Chat => Some(("messages", messages())),
        Task::Completion => Some(("prompt", reference("Prompts"))),
        Task::Response => Some(("input", reference("ResponseInput"))),
        Task::ImageGeneration | Task::ImageEdit | Task::Video => None,
    };
    if let Some((name, schema)) = prompt {
        properties.insert(name.to_owned(), schema);
        properties.insert("stream_options".to_owned(), reference("StreamOptions"));
        let of_answers = text::structured::names()
            .filter(|name| task != Task::Response || *name != text::structured::RESPONSE_FORMAT);
        properties.extend(of_answers.map(|name| (name.to_owned(), reference(structured(name)))));
        required.push(name);
    }
    let tools = match task {
        Task::Chat => Some(("Tools", "ToolChoice")),
        Task::Response => Some(("ResponseTools", "ResponseToolChoice")),
        _ => None,
    };
    if let Some((tools, choice)) = tools {
        let of_tools = [
            (text::tools::TOOLS, tools),
            (text::tools::TOOL_CHOICE, choice),
            (text::tools::PARALLEL, "ParallelToolCalls"),
        ];
        properties.extend(of_tools.map(|(name, component)| (name.to_owned(), reference(component))));
        properties.insert("chat_template_kwargs".to_owned(), reference("ChatTemplateKwargs"));
    }
    if task == Task::Response {
        let instructions = "A system message before the others.";
        properties.insert("instructions".to_owned(), json!({"type": ["string", "null"], "description": instructions}));
        properties.insert("text".to_owned(), reference("ResponseText"));
        properties.insert("metadata".to_owned(), metadata());
    }
    properties.extend(unsupported(task, ""));
    object(properties, &required)
}

/// Labels that a response repeats.
fn metadata() -> Value {
    json!({
        "type": ["object", "null"],
        "maxProperties": text::responses::wire::MAX_METADATA,
        "propertyNames": {"maxLength": text::responses::wire::MAX_METADATA_NAME},
        "additionalProperties": {"type": "string", "maxLength": text::responses::wire::MAX_METADATA_VALUE},
        "description": "Labels that the answer repeats.",
    })
}

/// The component that describes a field which an answer is held to.
fn structured(name: &str) -> &'static str {
    match name {
        text::structured::RESPONSE_FORMAT => "ResponseFormat",
        text::structured::STRUCTURED_OUTPUTS => "StructuredOutputs",
        "guided_json" => "GuidedJson",
        "guided_choice" => "GuidedChoice",
        "guided_regex" => "GuidedRegex",
        _ => "GuidedGrammar",
    }
}

/// A body of a video that is made from an earlier one, which it names if that does not stand in the path.
fn made_from_a_video(again: Again, names_video: bool, is_form: bool) -> Value {
    let fields = again.fields();
    let in_json = |of: &&Declaration| (of.name.to_owned(), schema::in_json(of));
    let mut properties: Map<String, Value> = match is_form {
        true => fields.iter().map(|of| schema::in_form(of)).collect(),
        false => fields.iter().map(in_json).collect(),
    };
    properties.extend(unsupported(Task::Video, ""));
    let mut required: Vec<&str> = fields.iter().filter(|of| of.is_required).map(|of| of.name).collect();
    if names_video {
        properties.insert("video".to_owned(), reference("VideoReference"));
        required.push("video");
    }
    object(properties, &required)
}

/// A body of declared fields and others.
fn of_declared(declared: &[&Declaration], others: Vec<(&str, Value)>, required: &[&str]) -> Value {
    let declared_required = declared.iter().filter(|of| of.is_required).map(|of| of.name);
    let required: Vec<&str> = declared_required.chain(required.iter().copied()).collect();
    let declared = declared.iter().map(|of| (of.name.to_owned(), schema::in_json(of)));
    let others = others.into_iter().map(|(name, schema)| (name.to_owned(), schema));
    object(declared.chain(others).collect(), &required)
}

fn messages() -> Value {
    json!({"type": "array", "items": reference("ChatMessage"), "minItems": 1, "maxItems": text::wire::MAX_MESSAGES})
}

fn form(task: Task) -> Value {
    let fields = fields(task);
    let required: Vec<&str> = fields.iter().filter(|of| of.is_required).map(|of| of.name).collect();
    let mut properties: Map<String, Value> = fields.iter().map(|declaration| schema::in_form(declaration)).collect();
    properties.extend(unsupported(task, ""));
    object(properties, &required)
}

fn object(properties: Map<String, Value>, required: &[&str]) -> Value {
    json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
}

/// What an answer repeats.
fn effective(task: Task) -> Value {
    let model = fields(task).into_iter().filter(|of| of.name == super::diffusion::MODEL.declaration.name);
    let echoed = PARAMETERS.iter().copied().filter(|of| of.is_for(task) && is_echoed(of));
    let properties: Map<String, Value> =
        model.chain(echoed).map(|declaration| (declaration.name.to_owned(), schema::in_answer(declaration))).collect();
    json!({
        "type": "object",
        "description": "The effective parameters: a request that says the same makes the same.",
        "properties": properties,
        "required": ["model"],
    })
}

/// Fields of OpenAI's API that are taken where they ask for nothing: those of the objects at `path` of a body.
fn unsupported(task: Task, path: &str) -> Map<String, Value> {
    let of_path = openai::fields(task).iter().copied().flatten().filter_map(|field| {
        let (parent, name) = field.path.rsplit_once('.').unwrap_or(("", field.path));
        let description = format!("Of OpenAI's API; taken where it asks for nothing: {}.", field.problem);
        (parent == path).then(|| (name.to_owned(), json!({"description": description})))
    });
    of_path.collect()
}

/// The same for what is within a field.
fn add_nested(schemas: &mut Value) {
    // The one object that has no component of its own.
    let function = &mut schemas["ToolCall"]["properties"]["function"]["properties"];
    if let Some(properties) = function.as_object_mut() {
        properties.extend(unsupported(Task::Chat, "messages[].tool_calls[].function"));
    }
    for (name, task, path) in [
        ("ChatMessage", Task::Chat, "messages[]"),
        ("TextPart", Task::Chat, "messages[].content[]"),
        ("ResponseInputMessage", Task::Response, "input[]"),
        ("ResponseInputCall", Task::Response, "input[]"),
        ("ResponseInputResult", Task::Response, "input[]"),
        ("ResponseInputReasoning", Task::Response, "input[]"),
        ("ResponseInputPart", Task::Response, "input[].content[]"),
        ("ResponseText", Task::Response, "text"),
        ("ResponseTool", Task::Response, "tools[]"),
    ] {
        if let Some(properties) = schemas[name]["properties"].as_object_mut() {
            properties.extend(unsupported(task, path));
        }
    }
}

/// Adds the parameters of a query to an operation.
fn add_query(operation: &mut Value, query: &[&Declaration]) {
    let query = query.iter().map(|declaration| {
        let Declaration { name, doc, kind, .. } = declaration;
        json!({"name": name, "in": "query", "description": doc, "schema": schema::values(*kind)})
    });
    match &mut operation["parameters"] {
        Value::Array(parameters) => parameters.extend(query),
        none => *none = query.collect(),
    }
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}
