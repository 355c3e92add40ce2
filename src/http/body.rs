//! From the bytes of a request to a typed body: bounded, timed, and with the path of the field that is wrong.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{FromRequest, Multipart, Request};
use axum::http::{HeaderMap, header};
use serde::de::value::{MapAccessDeserializer, MapDeserializer};
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::error::ApiError;
use super::form::FormValue;

/// Most bytes of a body: a prompt of a million tokens has about half of them.
pub const MAX_BODY_BYTES: usize = 8 << 20;
/// Most bytes of a body with pictures in it.
pub const MAX_PICTURE_BODY_BYTES: usize = 32 << 20;
/// Bytes that are read and thrown away after that, so that a client that only then looks for an answer gets it.
const MAX_DISCARDED_BYTES: usize = 64 << 20;
/// In this time a body has to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// The JSON body of a request.
pub(super) async fn json<T: DeserializeOwned>(request: Request) -> Result<T, ApiError> {
    json_of_at_most(request, MAX_BODY_BYTES).await
}

async fn json_of_at_most<T: DeserializeOwned>(request: Request, max_bytes: usize) -> Result<T, ApiError> {
    if !has_media_type(request.headers(), "application/json") {
        return Err(ApiError::media_type("application/json"));
    }
    parse_json(&read(request.into_body(), max_bytes).await?)
}

/// As [`json`], for bodies that may hold pictures.
pub(super) async fn json_with_pictures<T: DeserializeOwned>(request: Request) -> Result<T, ApiError> {
    json_of_at_most(request, MAX_PICTURE_BODY_BYTES).await
}

/// A body of at most `max_bytes` that is JSON, or a form whose fields mean the same.
pub(super) async fn json_or_form<T: DeserializeOwned>(request: Request, max_bytes: usize) -> Result<T, ApiError> {
    let (is_json, is_form) = (
        has_media_type(request.headers(), "application/json"),
        has_media_type(request.headers(), "multipart/form-data"),
    );
    if !is_json && !is_form {
        return Err(ApiError::media_type("application/json or multipart/form-data"));
    }
    let (parts, body) = request.into_parts();
    let body = read(body, max_bytes).await?;
    if is_json {
        return parse_json(&body);
    }
    let fields = form_fields(Request::from_parts(parts, Body::from(body))).await?;
    let fields: MapDeserializer<'_, _, serde_json::Error> = MapDeserializer::new(fields.into_iter());
    serde_path_to_error::deserialize(fields).map_err(|error| data_error(&error))
}

/// Parts by their names; `name[]` are the members of a list called `name`.
async fn form_fields(request: Request) -> Result<BTreeMap<String, FormValue>, ApiError> {
    let mut form =
        Multipart::from_request(request, &()).await.map_err(|_| ApiError::malformed("the form has no boundary"))?;
    let mut fields = BTreeMap::new();
    let unreadable = |_| ApiError::malformed("the form cannot be read");
    while let Some(part) = form.next_field().await.map_err(unreadable)? {
        let Some(name) = part.name().map(str::to_owned) else {
            return Err(ApiError::malformed("a part of the form has no name"));
        };
        let is_file = part.file_name().is_some();
        let bytes = part.bytes().await.map_err(unreadable)?;
        let value = match (is_file, std::str::from_utf8(&bytes)) {
            (true, _) => FormValue::File(bytes),
            (false, Ok(text)) => FormValue::Text(text.to_owned()),
            (false, Err(_)) => return Err(ApiError::field(&name, "is not UTF-8 text")),
        };
        let Some(list) = name.strip_suffix("[]") else {
            if fields.insert(name.clone(), value).is_some() {
                return Err(ApiError::field(&name, "is given twice"));
            }
            continue;
        };
        match fields.entry(list.to_owned()).or_insert_with(|| FormValue::List(Vec::new())) {
            FormValue::List(values) => values.push(value),
            _ => return Err(ApiError::field(list, "is given twice")),
        }
    }
    Ok(fields)
}

fn has_media_type(headers: &HeaderMap, expected: &str) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().is_some_and(|media_type| media_type.trim().eq_ignore_ascii_case(expected))
}

async fn read(body: Body, max_bytes: usize) -> Result<Bytes, ApiError> {
    tokio::time::timeout(BODY_TIMEOUT, collect(body, max_bytes)).await.map_err(|_| ApiError::body_timeout())?
}

async fn collect(mut body: Body, max_bytes: usize) -> Result<Bytes, ApiError> {
    let announced = body.size_hint().lower();
    if announced <= max_bytes as u64 {
        let mut collected = Vec::with_capacity(announced as usize);
        loop {
            match next_data(&mut body).await? {
                None => return Ok(collected.into()),
                Some(data) if collected.len() + data.len() > max_bytes => break,
                Some(data) => collected.extend_from_slice(&data),
            }
        }
    }
    let mut discarded = 0;
    while let Some(data) = next_data(&mut body).await? {
        discarded += data.len();
        if discarded > MAX_DISCARDED_BYTES {
            break;
        }
    }
    Err(ApiError::too_large(max_bytes))
}

async fn next_data(body: &mut Body) -> Result<Option<Bytes>, ApiError> {
    loop {
        let frame = std::future::poll_fn(|context| std::pin::Pin::new(&mut *body).poll_frame(context)).await;
        match frame {
            None => return Ok(None),
            Some(Err(_)) => return Err(ApiError::malformed("the body ended early")),
            // Trailers say nothing here.
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let parsed: Result<Object<T>, _> = serde_path_to_error::deserialize(&mut deserializer);
    let object = parsed.map_err(|error| match error.inner().classify() {
        serde_json::error::Category::Data => data_error(&error),
        _ => syntax_error(error.inner()),
    })?;
    deserializer.end().map_err(|error| syntax_error(&error))?;
    Ok(object.0)
}

/// A JSON object and nothing else: serde's derived structs would also take a list of their fields' values.
#[derive(Debug)]
pub(super) struct Object<T>(pub(super) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(fields)).map(Object)
            }
        }

        deserializer.deserialize_map(ObjectVisitor(PhantomData))
    }
}

fn syntax_error(error: &serde_json::Error) -> ApiError {
    ApiError::malformed(format!("the body is not valid JSON: {error}"))
}

/// A value of the wrong kind, a field that is missing or not known.
fn data_error(error: &serde_path_to_error::Error<serde_json::Error>) -> ApiError {
    let message = error.inner().to_string();
    let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(text, _)| text);
    let path = error.path().to_string();
    let path = if path == "." { String::new() } else { path };
    if let Some(field) = message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
        let path = if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") };
        return ApiError::field_code(path, "missing_required_parameter", "is missing");
    }
    if let Some((_, known)) = message.strip_prefix("unknown field `").and_then(|rest| rest.split_once("`, ")) {
        let known = known.replace('`', "");
        return ApiError::field_code(path, "unknown_parameter", format!("is not known here; {known}"));
    }
    let path = if path.is_empty() { "body".to_owned() } else { path };
    ApiError::field(path, without_values(message))
}

/// serde's message without the value that the client sent: `invalid type: string "...", expected u64` and its like.
fn without_values(message: &str) -> String {
    let Some((found, expected)) = message.rsplit_once(", expected ") else { return message.to_owned() };
    let expected = match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "f32" | "f64" => "a number",
        other => other,
    };
    let expected = expected.replace('`', "");
    let kind = found.strip_prefix("invalid type: ").or_else(|| found.strip_prefix("invalid value: "));
    match kind.and_then(|kind| kind.split(['`', '"']).next()) {
        Some(kind) => format!("must be {expected}; found {}", kind.trim()),
        None => format!("must be {expected}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::response::IntoResponse;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Outer {
        inner: Vec<Object<Inner>>,
        #[serde(default)]
        seed: u64,
    }

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Inner {
        role: Role,
        text: String,
    }

    #[derive(Debug, serde::Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Role {
        User,
    }

    fn check(body: &str, param: Option<&str>, message: &str) {
        let error = parse_json::<Outer>(body.as_bytes()).expect_err("wrong");
        let found = serde_json::to_value(error.body()).expect("serializes");
        assert_eq!((found["param"].as_str(), found["message"].as_str()), (param, Some(message)), "{body}");
        assert_eq!(error.into_response().status(), 400);
    }

    #[test]
    fn an_error_names_the_path_and_never_the_value() {
        check(
            r#"{"inner": [{"role": "user", "text": "x"}, {"role": "user", "text": ["secret"]}]}"#,
            Some("inner[1].text"),
            "inner[1].text: must be a string; found sequence",
        );
        check(r#"{"inner": "secret"}"#, Some("inner"), "inner: must be a sequence; found string");
        check(r#"{"inner": [{"role": "user"}]}"#, Some("inner[0].text"), "inner[0].text: is missing");
        check(r#"{}"#, Some("inner"), "inner: is missing");
        check(
            r#"{"inner": [], "secret, expected": 1}"#,
            Some("secret, expected"),
            "secret, expected: is not known here; expected inner or seed",
        );
        check(r#"{"inner": [{"role": "secret", "text": ""}]}"#, Some("inner[0].role"), "inner[0].role: must be user");
        check(r#"{"inner": [], "seed": -1}"#, Some("seed"), "seed: must be a whole number, 0 or more; found integer");
        check(
            r#"{"inner": [], "seed": 1e300}"#,
            Some("seed"),
            "seed: must be a whole number, 0 or more; found floating point",
        );
        check("[[], 1]", Some("body"), "body: must be an object; found sequence");
        check(r#"{"inner": [["user", "x"]]}"#, Some("inner[0]"), "inner[0]: must be an object; found sequence");
    }

    #[test]
    fn broken_json_is_named_as_such() {
        for body in ["", "{", "nonsense", "{\"inner\": []} x", "{\"inner\": [{\"text\": \"\\ud800\"}]}"] {
            let error = parse_json::<Outer>(body.as_bytes()).expect_err("wrong");
            let found = serde_json::to_value(error.body()).expect("serializes");
            assert_eq!(found["code"], "invalid_body", "{body}: {found}");
        }
        let invalid_utf8 = b"{\"inner\": [{\"role\": \"user\", \"text\": \"\xff\"}]}";
        assert!(parse_json::<Outer>(invalid_utf8).is_err());
    }
}
