//! What an answer is held to, as bodies say it: OpenAI's `response_format` or `text.format`, and vLLM's `structured_outputs` with the older
//! `guided_json`, `guided_regex`, `guided_choice` and `guided_grammar`.
//!
//! Owns: these fields. Does not know: what a schema or a grammar may hold (`tale_models::grammar`).

use tale_models::grammar::{Asked, Form, MAX_CHOICES};

use crate::http::body::value::{Object, Room, Value};
use crate::http::error::ApiError;

/// OpenAI's field, also for completions.
pub(in crate::http) const RESPONSE_FORMAT: &str = "response_format";
/// The same of a response.
const TEXT_FORMAT: &str = "text.format";
/// vLLM's field.
pub(in crate::http) const STRUCTURED_OUTPUTS: &str = "structured_outputs";
/// The forms that the object of [`STRUCTURED_OUTPUTS`] has, and under which names the body itself may have them.
const FORMS: &[(&str, &str)] =
    &[("json", "guided_json"), ("regex", "guided_regex"), ("choice", "guided_choice"), ("grammar", "guided_grammar")];
/// A schema has at most so many values.
const MAX_SCHEMA_VALUES: usize = 16 << 10;

/// How much each of these fields may hold.
pub(super) const ROOM: Room =
    Room { max_items: MAX_CHOICES, max_numbers: MAX_SCHEMA_VALUES, max_values: MAX_SCHEMA_VALUES };

/// The names of all these fields.
pub(in crate::http) fn names() -> impl Iterator<Item = &'static str> {
    [RESPONSE_FORMAT, STRUCTURED_OUTPUTS].into_iter().chain(FORMS.iter().map(|(_, guided)| *guided))
}

/// How much such a field may hold; `None` for other fields.
pub(super) fn room_in(name: &str) -> Option<Room> {
    names().any(|of| of == name).then_some(ROOM)
}

/// Takes these fields out of a body: what they ask for, at most one thing.
pub(super) fn take(body: &mut Object) -> Result<Option<Asked>, ApiError> {
    let format = given(body, RESPONSE_FORMAT).map(response_format).transpose()?.flatten();
    take_extensions(body, format)
}

/// The same of a response, which has OpenAI's part of it in [`TEXT_FORMAT`].
pub(super) fn take_of_response(body: &mut Object, format: Option<Value>) -> Result<Option<Asked>, ApiError> {
    if body.contains_key(RESPONSE_FORMAT) {
        let problem = format!("is of chats; here it is {TEXT_FORMAT}");
        return Err(ApiError::field_code(RESPONSE_FORMAT, "unknown_parameter", problem));
    }
    let format = format.map(text_format).transpose()?.flatten();
    take_extensions(body, format)
}

/// Takes vLLM's fields, beside what OpenAI's asked for.
fn take_extensions(body: &mut Object, asked: Option<Asked>) -> Result<Option<Asked>, ApiError> {
    let mut asked: Vec<Asked> = asked.into_iter().collect();
    if let Some(value) = given(body, STRUCTURED_OUTPUTS) {
        asked.extend(structured_outputs(value)?);
    }
    for (form, guided) in FORMS {
        if let Some(value) = given(body, guided) {
            asked.push(of_form((*guided).to_owned(), form, value)?);
        }
    }
    match asked.get(1) {
        Some(second) => {
            let problem = format!("is one thing more that the answer is held to, after {}", asked[0].field);
            Err(ApiError::field(second.field.as_str(), problem))
        }
        None => Ok(asked.pop()),
    }
}

/// Whether OpenAI's field at this path asks for something, which is about texts and not about calls of tools.
pub(super) fn is_of_texts(path: &str) -> bool {
    path.starts_with(RESPONSE_FORMAT) || path.starts_with(TEXT_FORMAT)
}

/// Takes a field out that is there and not null.
pub(super) fn given(fields: &mut Object, name: &str) -> Option<Value> {
    fields.shift_remove(name).filter(|value| *value != Value::Null)
}

/// `{"type": "text"}` asks for nothing.
fn response_format(value: Value) -> Result<Option<Asked>, ApiError> {
    let mut fields = object(RESPONSE_FORMAT, value)?;
    let path = |name: &str| format!("{RESPONSE_FORMAT}.{name}");
    let kind = required(&path("type"), given(&mut fields, "type"))?;
    let schema = given(&mut fields, "json_schema");
    no_others(RESPONSE_FORMAT, &fields, &["type", "json_schema"])?;
    match (kind.text(), schema) {
        (Some("json_schema"), schema) => {
            let path = path("json_schema");
            Ok(Some(json_schema(&path, required(&path, schema)?)?))
        }
        (Some(_), Some(_)) => Err(ApiError::field(path("json_schema"), "is for the type json_schema alone")),
        (Some("text"), None) => Ok(None),
        (Some("json_object"), None) => Ok(Some(Asked::json_object(RESPONSE_FORMAT))),
        _ => Err(ApiError::field(path("type"), "must be text, json_object or json_schema")),
    }
}

/// The same as responses spell it: what is of a schema stands beside the type.
fn text_format(value: Value) -> Result<Option<Asked>, ApiError> {
    let mut fields = object(TEXT_FORMAT, value)?;
    let path = format!("{TEXT_FORMAT}.type");
    match required(&path, given(&mut fields, "type"))?.text() {
        Some("json_schema") => json_schema(TEXT_FORMAT, Value::Object(fields)).map(Some),
        Some("text") => no_others(TEXT_FORMAT, &fields, &["type"]).map(|()| None),
        Some("json_object") => {
            no_others(TEXT_FORMAT, &fields, &["type"]).map(|()| Some(Asked::json_object(TEXT_FORMAT)))
        }
        _ => Err(ApiError::field(path, "must be text, json_object or json_schema")),
    }
}

/// `name`, `description` and `strict` say nothing more of the answer: it is always held to the whole schema.
fn json_schema(path: &str, value: Value) -> Result<Asked, ApiError> {
    let mut fields = object(path, value)?;
    let name = format!("{path}.name");
    check_name(&name, &required(&name, given(&mut fields, "name"))?)?;
    let description = given(&mut fields, "description");
    if description.is_some_and(|text| text.text().is_none()) {
        return Err(ApiError::field(format!("{path}.description"), "must be a string"));
    }
    let strict = given(&mut fields, "strict");
    if strict.is_some_and(|strict| !matches!(strict, Value::Bool(_))) {
        return Err(ApiError::field(format!("{path}.strict"), "must be true or false"));
    }
    let schema = format!("{path}.schema");
    let value = required(&schema, given(&mut fields, "schema"))?;
    no_others(path, &fields, &["name", "description", "strict", "schema"])?;
    Ok(Asked { field: schema, form: Form::Schema(value.into_json()) })
}

/// As OpenAI has it for names of schemas and of functions.
pub(super) fn check_name(path: &str, name: &Value) -> Result<String, ApiError> {
    const MAX_BYTES: usize = 64;
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    match name.text() {
        Some(name) if (1..=MAX_BYTES).contains(&name.len()) && name.bytes().all(is_allowed) => Ok(name.to_owned()),
        _ => Err(ApiError::field(path, "must be 1 to 64 letters, digits, underscores and dashes")),
    }
}

fn structured_outputs(value: Value) -> Result<Vec<Asked>, ApiError> {
    let mut fields = object(STRUCTURED_OUTPUTS, value)?;
    let path = |name: &str| format!("{STRUCTURED_OUTPUTS}.{name}");
    let mut asked = Vec::new();
    for (form, _) in FORMS {
        if let Some(value) = given(&mut fields, form) {
            asked.push(of_form(path(form), form, value)?);
        }
    }
    match given(&mut fields, "json_object") {
        None | Some(Value::Bool(false)) => (),
        Some(Value::Bool(true)) => asked.push(Asked::json_object(path("json_object"))),
        Some(_) => return Err(ApiError::field(path("json_object"), "must be true or false")),
    }
    no_others(STRUCTURED_OUTPUTS, &fields, &["json", "regex", "choice", "grammar", "json_object"])?;
    Ok(asked)
}

fn of_form(path: String, form: &str, value: Value) -> Result<Asked, ApiError> {
    let form = match (form, value) {
        // As vLLM takes it: written, or as it is.
        ("json", Value::Text(json)) => Form::Schema(
            Value::from_json(json.as_bytes())
                .map_err(|_| ApiError::field(path.as_str(), "is a string that is no JSON"))?
                .into_json(),
        ),
        ("json", schema) => Form::Schema(schema.into_json()),
        ("choice", Value::List(choices)) => Form::Choice(texts(&path, choices)?),
        ("choice", _) => return Err(ApiError::field(path, "must be a list of strings")),
        ("regex", Value::Text(regex)) => Form::Regex(regex),
        ("grammar", Value::Text(grammar)) => Form::Lark(grammar),
        _ => return Err(ApiError::field(path, "must be a string")),
    };
    Ok(Asked { field: path, form })
}

fn texts(path: &str, values: Vec<Value>) -> Result<Vec<String>, ApiError> {
    let text = |(index, value)| match value {
        Value::Text(text) => Ok(text),
        _ => Err(ApiError::field(format!("{path}[{index}]"), "must be a string")),
    };
    values.into_iter().enumerate().map(text).collect()
}

pub(super) fn object(path: &str, value: Value) -> Result<Object, ApiError> {
    match value {
        Value::Object(fields) => Ok(fields),
        _ => Err(ApiError::field(path, "must be an object")),
    }
}

pub(super) fn required(path: &str, value: Option<Value>) -> Result<Value, ApiError> {
    value.ok_or_else(|| ApiError::field_code(path, "missing_required_parameter", "is missing"))
}

/// Refuses what an object has left, unless it is null.
pub(super) fn no_others(path: &str, fields: &Object, known: &[&str]) -> Result<(), ApiError> {
    match fields.iter().find(|(_, value)| **value != Value::Null) {
        None => Ok(()),
        Some((name, _)) => {
            let problem = format!("is not known here; known: {}", known.join(", "));
            Err(ApiError::field_code(format!("{path}.{name}"), "unknown_parameter", problem))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(json: &str) -> Result<Option<Asked>, (String, String)> {
        let mut body = Value::from_json(json.as_bytes()).expect(json).into_object().expect("an object");
        take(&mut body).map_err(|error| {
            let body = serde_json::to_value(error.body()).expect("serializes");
            let text = |key: &str| body[key].as_str().unwrap_or_default().to_owned();
            (text("param"), text("message"))
        })
    }

    #[track_caller]
    fn check(json: &str, field: &str, form: Form) {
        assert_eq!(taken(json), Ok(Some(Asked { field: field.to_owned(), form })), "{json}");
    }

    #[test]
    fn every_spelling_is_taken() {
        let schema = || Form::Schema(serde_json::json!({"type": "object"}));
        for nothing in
            ["{}", r#"{"response_format": {"type": "text"}}"#, r#"{"guided_json": null, "structured_outputs": {}}"#]
        {
            assert_eq!(taken(nothing), Ok(None), "{nothing}");
        }
        check(r#"{"response_format": {"type": "json_object"}}"#, "response_format", schema());
        let strict = r#"{"response_format": {"type": "json_schema", "json_schema":
            {"name": "a", "strict": true, "description": null, "schema": {"type": "object"}}}}"#;
        check(strict, "response_format.json_schema.schema", schema());
        check(r#"{"structured_outputs": {"json": {"type": "object"}}}"#, "structured_outputs.json", schema());
        check(r#"{"structured_outputs": {"json_object": true}}"#, "structured_outputs.json_object", schema());
        check(r#"{"guided_json": "{\"type\": \"object\"}"}"#, "guided_json", schema());
        check(r#"{"guided_regex": "a+"}"#, "guided_regex", Form::Regex("a+".into()));
        check(r#"{"guided_choice": ["a", "b"]}"#, "guided_choice", Form::Choice(vec!["a".into(), "b".into()]));
        check(
            r#"{"structured_outputs": {"grammar": "start: \"a\""}}"#,
            "structured_outputs.grammar",
            Form::Lark("start: \"a\"".into()),
        );
    }

    #[test]
    fn responses_spell_it_in_the_format_of_their_text() {
        let taken = |format: &str| {
            let format = Value::from_json(format.as_bytes()).expect(format);
            take_of_response(&mut Object::new(), Some(format)).map_err(|_| ())
        };
        let asked = |field: &str, form| Ok(Some(Asked { field: field.to_owned(), form }));
        let schema = || Form::Schema(serde_json::json!({"type": "object"}));
        assert_eq!(taken(r#"{"type": "text"}"#), Ok(None));
        assert_eq!(taken(r#"{"type": "json_object"}"#), asked("text.format", schema()));
        let flat = r#"{"type": "json_schema", "name": "a", "strict": true, "schema": {"type": "object"}}"#;
        assert_eq!(taken(flat), asked("text.format.schema", schema()));
        assert_eq!(taken(r#"{"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}"#), Err(()));
    }

    #[test]
    fn properties_keep_their_order() {
        let Ok(Some(Asked { form: Form::Schema(schema), .. })) =
            taken(r#"{"guided_json": {"properties": {"z": {}, "a": {"b": 1, "a": 2}, "m": {}}}}"#)
        else {
            panic!("a schema")
        };
        assert_eq!(schema.to_string(), r#"{"properties":{"z":{},"a":{"b":1,"a":2},"m":{}}}"#);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (json, param) in [
            (r#"{"response_format": 1}"#, "response_format"),
            (r#"{"response_format": {}}"#, "response_format.type"),
            (r#"{"response_format": {"type": "xml"}}"#, "response_format.type"),
            (r#"{"response_format": {"type": "text", "x": 1}}"#, "response_format.x"),
            (r#"{"response_format": {"type": "text", "json_schema": {}}}"#, "response_format.json_schema"),
            (r#"{"response_format": {"type": "json_schema"}}"#, "response_format.json_schema"),
            (
                r#"{"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}}"#,
                "response_format.json_schema.name",
            ),
            (
                r#"{"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}"#,
                "response_format.json_schema.schema",
            ),
            (
                r#"{"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": 1}}}"#,
                "response_format.json_schema.strict",
            ),
            (r#"{"structured_outputs": {"structural_tag": {}}}"#, "structured_outputs.structural_tag"),
            (r#"{"structured_outputs": {"choice": ["a", 1]}}"#, "structured_outputs.choice[1]"),
            (r#"{"structured_outputs": {"regex": "a", "choice": ["a"]}}"#, "structured_outputs.choice"),
            (r#"{"guided_json": "{"}"#, "guided_json"),
            (r#"{"guided_regex": ["a"]}"#, "guided_regex"),
            (r#"{"guided_regex": "a", "response_format": {"type": "json_object"}}"#, "guided_regex"),
        ] {
            let found = taken(json).expect_err(json);
            assert_eq!(found.0, param, "{json}: {}", found.1);
        }
    }
}
