//! JSON Schema of declared parameters.
//!
//! Does not know: which fields a body has.

use serde_json::{Value, json};
use tale_models::lora::library::{MAX_LORAS, MAX_WEIGHT};
use tale_models::parameter::{Declaration, Kind};

use crate::parameters::is_image;

/// A field of a JSON body, where `null` is as good as absent.
pub(super) fn in_json(declaration: &Declaration) -> Value {
    let mut schema = match declaration.kind {
        Kind::Image | Kind::Mask => image(),
        Kind::Images { max } => json!({"type": "array", "items": image(), "maxItems": max}),
        kind => values(kind),
    };
    if !declaration.is_required {
        allow_null(&mut schema);
    }
    let file = if is_image(declaration) { " As base64, a data URL or a frame of a video." } else { "" };
    described(schema, format!("{}{file}", declaration.doc))
}

/// The name and the schema of a part of a form.
pub(super) fn in_form(declaration: &Declaration) -> (String, Value) {
    let file = || json!({"type": "string", "format": "binary"});
    let (name, schema) = match declaration.kind {
        Kind::Image | Kind::Mask => (declaration.name.to_owned(), file()),
        Kind::Images { max } => {
            (format!("{}[]", declaration.name), json!({"type": "array", "items": file(), "maxItems": max}))
        }
        kind @ (Kind::Interval | Kind::Numbers { .. } | Kind::Tokens { .. } | Kind::Biases { .. } | Kind::Loras) => {
            let schema =
                json!({"type": "string", "contentMediaType": "application/json", "contentSchema": values(kind)});
            (declaration.name.to_owned(), schema)
        }
        kind => (declaration.name.to_owned(), values(kind)),
    };
    (name, described(schema, declaration.doc.to_owned()))
}

/// An effective value, as answers repeat it.
pub(super) fn in_answer(declaration: &Declaration) -> Value {
    let schema = match declaration.kind {
        // What was chosen.
        Kind::FlagOrAuto => values(Kind::Flag),
        kind => values(kind),
    };
    described(schema, declaration.doc.to_owned())
}

/// The values of a kind. Lengths of text are in characters, and so a little wider than what is allowed in bytes.
pub(super) fn values(kind: Kind) -> Value {
    match kind {
        Kind::Text { max_bytes } => json!({"type": "string", "maxLength": max_bytes}),
        Kind::Flag => json!({"type": "boolean"}),
        Kind::FlagOrAuto => json!({"enum": [true, false, "auto"]}),
        Kind::Integer { min, max: u64::MAX } => json!({"type": "integer", "minimum": min}),
        Kind::Integer { min, max } => json!({"type": "integer", "minimum": min, "maximum": max}),
        Kind::Seed => json!({"type": "integer", "minimum": i64::MIN, "maximum": u64::MAX}),
        Kind::Number { min, max } => json!({"type": "number", "minimum": min, "maximum": max}),
        Kind::NumberAbove { min, max } => json!({"type": "number", "exclusiveMinimum": min, "maximum": max}),
        Kind::Seconds => json!({"type": ["number", "string"], "exclusiveMinimum": 0}),
        Kind::Interval => {
            let share = json!({"type": "number", "minimum": 0, "maximum": 1});
            json!({"type": "array", "items": share, "minItems": 2, "maxItems": 2})
        }
        Kind::Numbers { max_len, min, max } => {
            let number = json!({"type": "number", "minimum": min, "maximum": max});
            json!({"type": "array", "items": number, "minItems": 1, "maxItems": max_len})
        }
        Kind::Choice(words) | Kind::Name(words) => json!({"type": "string", "enum": words}),
        Kind::Strings { max, max_bytes, .. } => {
            let string = json!({"type": "string", "minLength": 1, "maxLength": max_bytes});
            json!({"type": ["string", "array"], "minLength": 1, "maxLength": max_bytes, "items": string, "maxItems": max})
        }
        Kind::Tokens { max } => {
            json!({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": u32::MAX}, "maxItems": max})
        }
        Kind::Biases { max_len, min, max } => json!({
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": min, "maximum": max},
            "maxProperties": max_len,
        }),
        Kind::Loras => json!({"type": "array", "items": lora(), "maxItems": MAX_LORAS}),
        Kind::Image | Kind::Mask => json!({"type": "string"}),
        Kind::Images { max } => json!({"type": "array", "items": {"type": "string"}, "maxItems": max}),
    }
}

/// An image in JSON.
fn image() -> Value {
    json!({"anyOf": [{"type": "string"}, {"$ref": "#/components/schemas/ImageReference"}]})
}

fn lora() -> Value {
    let weight = json!({"type": "number", "minimum": -MAX_WEIGHT, "maximum": MAX_WEIGHT, "default": 1});
    json!({
        "type": "object",
        "properties": {"name": {"type": "string"}, "weight": weight},
        "required": ["name"],
        "additionalProperties": false,
    })
}

/// `null` beside the values of `schema`.
fn allow_null(schema: &mut Value) {
    if let Some(words) = schema.get_mut("enum").and_then(Value::as_array_mut) {
        words.push(Value::Null);
    }
    if let Some(choices) = schema.get_mut("anyOf").and_then(Value::as_array_mut) {
        choices.push(json!({"type": "null"}));
    }
    match schema.get_mut("type") {
        Some(Value::Array(types)) => types.push("null".into()),
        Some(one) => *one = json!([one.take(), "null"]),
        // The values are listed.
        None => (),
    }
}

fn described(mut schema: Value, description: String) -> Value {
    schema["description"] = description.into();
    schema
}
