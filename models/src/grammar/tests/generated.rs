//! Schemas that nobody wrote, and a validator that shares nothing with what makes answers.

use serde_json::{Map, Value, json};

use super::super::*;
use super::{Random, answer, asked, card};

/// A schema whose answers are short.
fn schema(random: &mut Random, depth: usize) -> Value {
    match random.below(if depth == 0 { 7 } else { 11 }) {
        0 => json!({"type": "boolean"}),
        1 => json!({"type": "null"}),
        2 => {
            let minimum = random.below(200) as i64 - 100;
            json!({"type": "integer", "minimum": minimum, "maximum": minimum + random.below(5000) as i64})
        }
        3 => json!({"type": "number", "exclusiveMinimum": 0, "maximum": 10 + random.below(90)}),
        4 => {
            let minimum = random.below(4);
            json!({"type": "string", "minLength": minimum, "maxLength": minimum + random.below(12)})
        }
        5 => json!({"enum": ["red", 3, null, {"a": [true]}, "gr\u{fc}n \"x\"", 1.5]}),
        6 => json!({"const": ["x", {"y": random.below(100)}]}),
        7 | 8 => object(random, depth),
        9 => {
            let minimum = random.below(3);
            let items = schema(random, depth - 1);
            json!({"type": "array", "items": items, "minItems": minimum, "maxItems": minimum + random.below(3)})
        }
        _ => json!({"anyOf": [schema(random, depth - 1), schema(random, depth - 1)]}),
    }
}

fn object(random: &mut Random, depth: usize) -> Value {
    let names = ["title", "a b", "caf\u{e9}", "q\"q", "n\\n", "shots"];
    let properties: Map<String, Value> =
        (0..1 + random.below(4)).map(|at| (names[at].to_owned(), schema(random, depth - 1))).collect();
    let required: Vec<&String> = properties.keys().filter(|_| random.below(3) > 0).collect();
    json!({"type": "object", "required": required, "additionalProperties": false, "properties": properties})
}

fn length(value: &Value) -> Option<u64> {
    match value {
        Value::String(text) => Some(text.chars().count() as u64),
        Value::Array(list) => Some(list.len() as u64),
        _ => None,
    }
}

/// Whether the schema is true of the value.
fn holds(schema: &Value, value: &Value) -> bool {
    let fields = schema.as_object().expect("an object");
    fields.iter().all(|(keyword, says)| match (keyword.as_str(), value) {
        ("type", value) => match says.as_str().expect("one") {
            "boolean" => value.is_boolean(),
            "null" => value.is_null(),
            "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
            "number" => value.is_number(),
            "string" => value.is_string(),
            "array" => value.is_array(),
            "object" => value.is_object(),
            other => panic!("{other}"),
        },
        ("minimum", value) => value.as_f64() >= says.as_f64(),
        ("maximum", value) => value.as_f64() <= says.as_f64(),
        ("exclusiveMinimum", value) => value.as_f64() > says.as_f64(),
        ("minLength" | "minItems", value) => length(value) >= says.as_u64(),
        ("maxLength" | "maxItems", value) => length(value) <= says.as_u64(),
        ("enum", value) => says.as_array().expect("a list").iter().any(|one| equal(one, value)),
        ("const", value) => equal(says, value),
        ("items", Value::Array(list)) => list.iter().all(|item| holds(says, item)),
        ("anyOf", value) => says.as_array().expect("a list").iter().any(|one| holds(one, value)),
        ("required", Value::Object(given)) => {
            says.as_array().expect("a list").iter().all(|name| given.contains_key(name.as_str().expect("a name")))
        }
        ("properties", Value::Object(given)) => given.iter().all(|(name, value)| holds(&says[name], value)),
        ("additionalProperties", Value::Object(given)) => {
            given.keys().all(|name| !schema["properties"][name].is_null())
        }
        (other, value) => panic!("{other}: {value}"),
    })
}

/// 1.5e0 is 1.5.
fn equal(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| equal(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(name, a)| b.get(name).is_some_and(|b| equal(a, b)))
        }
        (a, b) => a == b,
    }
}

#[test]
fn every_answer_to_200_schemas_parses_and_validates() {
    let card = card();
    let mut finished = 0;
    for seed in 0..200 {
        let mut random = Random(seed);
        let schema = object(&mut random, 3);
        let grammar = card
            .grammars
            .compile(asked(Form::Schema(schema.clone())))
            .unwrap_or_else(|error| panic!("{schema}: {error}"));
        for _ in 0..3 {
            let Some(text) = answer(&card, &grammar, &mut random, 3000) else { continue };
            finished += 1;
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{schema}: {text}: {error}"));
            assert!(holds(&schema, &value), "{schema}: {text}");
        }
    }
    assert!(finished > 500, "{finished} of 600 ended");
}
