//! What a JSON schema may hold.
//!
//! Owns: the keywords that answers are held to, those that say nothing of answers, and a path to whatever is neither, or has
//! a value that means nothing. A keyword of neither kind is refused, since it would be ignored. Does not know: how a schema
//! becomes a grammar.
//! Source: JSON Schema, draft 2020-12 (core and validation); what llguidance implements of it (`json/schema.rs`).

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// Between values: nothing, one space, or a new line and what it is indented by. A model that may write any white space
/// may write nothing else.
const WHITE_SPACE: &str = r"[ ]|\n[ \t]{0,64}";
/// Longest list, string and number of properties that a bound may ask for: items are counted by states.
const MAX_COUNT: u64 = 100_000;

/// What the value of a keyword is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A schema.
    Schema,
    /// A schema, or in older drafts a list of them.
    SchemaOrList,
    /// At least one schema.
    List,
    /// Schemas by names.
    Named,
    /// The same, by names that are regular expressions.
    ByPattern,
    /// A whole number.
    Count,
    /// A number.
    Number,
    /// A number, or in older drafts whether the bound beside it is exclusive.
    NumberOrFlag,
    /// A number above 0.
    Positive,
    /// A regular expression.
    Pattern,
    /// One of [`FORMATS`].
    Format,
    /// One of [`TYPES`], or some of them.
    Type,
    /// Names.
    Names,
    /// Any value, in a list.
    Values,
    /// Any value.
    Value,
    /// A path into the schema itself.
    Reference,
    /// `false`, which is as good as absent.
    False,
    /// Says nothing of answers.
    Annotation,
}

/// The keywords that there are, each once.
const KEYWORDS: &[(&str, Kind)] = &[
    ("type", Kind::Type),
    ("properties", Kind::Named),
    ("required", Kind::Names),
    ("additionalProperties", Kind::Schema),
    ("patternProperties", Kind::ByPattern),
    ("minProperties", Kind::Count),
    ("maxProperties", Kind::Count),
    ("items", Kind::SchemaOrList),
    ("prefixItems", Kind::List),
    ("additionalItems", Kind::Schema),
    ("minItems", Kind::Count),
    ("maxItems", Kind::Count),
    ("uniqueItems", Kind::False),
    ("minLength", Kind::Count),
    ("maxLength", Kind::Count),
    ("pattern", Kind::Pattern),
    ("format", Kind::Format),
    ("minimum", Kind::Number),
    ("maximum", Kind::Number),
    ("exclusiveMinimum", Kind::NumberOrFlag),
    ("exclusiveMaximum", Kind::NumberOrFlag),
    ("multipleOf", Kind::Positive),
    ("const", Kind::Value),
    ("enum", Kind::Values),
    ("anyOf", Kind::List),
    ("oneOf", Kind::List),
    ("allOf", Kind::List),
    ("$ref", Kind::Reference),
    ("$defs", Kind::Named),
    ("definitions", Kind::Named),
    ("title", Kind::Annotation),
    ("description", Kind::Annotation),
    ("default", Kind::Annotation),
    ("examples", Kind::Annotation),
    ("example", Kind::Annotation),
    ("deprecated", Kind::Annotation),
    ("readOnly", Kind::Annotation),
    ("writeOnly", Kind::Annotation),
    ("discriminator", Kind::Annotation),
    ("contentMediaType", Kind::Annotation),
    ("contentEncoding", Kind::Annotation),
    ("$comment", Kind::Annotation),
    ("$schema", Kind::Annotation),
];

const TYPES: &[&str] = &["null", "boolean", "number", "integer", "string", "array", "object"];

const FORMATS: &[&str] = &["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];

/// Refuses what a schema may not hold, by its path from `field` on.
pub(super) fn check(field: &str, schema: &Value) -> Result<()> {
    Checker { root: schema }.schema(field, schema)
}

/// The schema as the library takes it: by the newest draft, whatever it says of itself, and with our white space.
pub(super) fn prepared(schema: &Value) -> Value {
    let mut fields = match schema {
        Value::Object(fields) => Preparer { root: schema }.without_annotations(fields),
        // `true`, of which every value is one, and `false`.
        other => Map::from_iter([("allOf".to_owned(), json!([other]))]),
    };
    fields.insert("x-guidance".to_owned(), json!({"whitespace_pattern": WHITE_SPACE}));
    Value::Object(fields)
}

struct Preparer<'a> {
    root: &'a Value,
}

impl Preparer<'_> {
    /// A schema and those in it, without what says nothing of answers: the library knows fewer such words.
    fn without_annotations(&self, schema: &Map<String, Value>) -> Map<String, Value> {
        let kept = schema.iter().filter_map(|(keyword, value)| {
            let kind = kind(keyword)?;
            // The library does not look behind references for what tells cases apart.
            let is_union = keyword == "oneOf" && !schema.contains_key("anyOf") && self.are_disjoint(value);
            let keyword = if is_union { "anyOf" } else { keyword };
            let value = match (kind, value) {
                (Kind::Annotation | Kind::False, _) => return None,
                (Kind::Named | Kind::ByPattern, Value::Object(named)) => {
                    Value::Object(named.iter().map(|(name, schema)| (name.clone(), self.plain(schema))).collect())
                }
                (Kind::Schema | Kind::SchemaOrList | Kind::List, Value::Array(schemas)) => {
                    Value::Array(schemas.iter().map(|schema| self.plain(schema)).collect())
                }
                (Kind::Schema | Kind::SchemaOrList, schema) => self.plain(schema),
                (_, value) => value.clone(),
            };
            Some((keyword.to_owned(), value))
        });
        kept.collect()
    }

    fn plain(&self, schema: &Value) -> Value {
        match schema {
            Value::Object(fields) => Value::Object(self.without_annotations(fields)),
            other => other.clone(),
        }
    }

    /// Whether no two of these schemas can hold at once.
    fn are_disjoint(&self, schemas: &Value) -> bool {
        let Some(schemas) = schemas.as_array().filter(|schemas| schemas.len() <= MAX_CASES) else { return false };
        let pairs =
            schemas.iter().enumerate().flat_map(|(at, one)| schemas[at + 1..].iter().map(move |other| (one, other)));
        pairs.into_iter().all(|(one, other)| self.disjoint(one, other, MAX_DEPTH))
    }

    /// By their types, their constants, or those of a property that both must have.
    fn disjoint(&self, one: &Value, other: &Value, depth: usize) -> bool {
        let (one, other) = (self.resolved(one), self.resolved(other));
        let are_apart = |a: Option<Vec<Value>>, b: Option<Vec<Value>>| matches!((a, b), (Some(a), Some(b)) if a.iter().all(|value| !b.contains(value)));
        if are_apart(types(one), types(other)) || are_apart(values(one), values(other)) {
            return true;
        }
        let required = |schema: &Value, name: &str| {
            schema["required"].as_array().is_some_and(|names| names.iter().any(|of| of.as_str() == Some(name)))
        };
        let is_object = |schema: &Value| schema["type"] == "object";
        let Some(properties) =
            one["properties"].as_object().filter(|_| depth > 0 && is_object(one) && is_object(other))
        else {
            return false;
        };
        properties.iter().any(|(name, property)| {
            let in_other = &other["properties"][name];
            required(one, name)
                && required(other, name)
                && !in_other.is_null()
                && self.disjoint(property, in_other, depth - 1)
        })
    }

    /// The schema to which a reference leads that says nothing more.
    fn resolved<'v>(&'v self, schema: &'v Value) -> &'v Value {
        let mut schema = schema;
        for _ in 0..MAX_HOPS {
            let Some(path) = schema["$ref"].as_str().and_then(|path| path.strip_prefix('#')) else { break };
            let Some(target) = self.root.pointer(path) else { break };
            schema = target;
        }
        schema
    }
}

/// Of a union that is looked at for what tells its cases apart: most cases, and how far properties lie within others.
const MAX_CASES: usize = 64;
const MAX_DEPTH: usize = 2;
/// References that lead to references.
const MAX_HOPS: usize = 8;

/// The types of its values, where it says them; an integer is a number.
fn types(schema: &Value) -> Option<Vec<Value>> {
    let as_number = |name: &Value| if name == "integer" { "number".into() } else { name.clone() };
    match &schema["type"] {
        Value::String(name) => Some(vec![as_number(&name.as_str().into())]),
        Value::Array(names) => Some(names.iter().map(as_number).collect()),
        _ => None,
    }
}

/// Its values, where it lists them, and they are texts: numbers have several spellings.
fn values(schema: &Value) -> Option<Vec<Value>> {
    let values = match (schema.get("const"), &schema["enum"]) {
        (Some(value), _) => vec![value.clone()],
        (None, Value::Array(values)) => values.clone(),
        _ => return None,
    };
    values.iter().all(Value::is_string).then_some(values)
}

fn kind(keyword: &str) -> Option<Kind> {
    KEYWORDS.iter().find(|(known, _)| *known == keyword).map(|(_, kind)| *kind)
}

/// The schemas that a schema holds, the definitions of others aside, with their paths from its own on.
pub(super) fn parts<'a>(path: &str, schema: &'a Value) -> Vec<(String, &'a Value)> {
    let Value::Object(fields) = schema else { return Vec::new() };
    let mut parts = Vec::new();
    for (keyword, value) in fields {
        match (kind(keyword), value) {
            (Some(Kind::Named | Kind::ByPattern), Value::Object(named)) => {
                parts.extend(named.iter().map(|(name, schema)| (format!("{path}.{keyword}.{name}"), schema)));
            }
            (Some(Kind::List | Kind::SchemaOrList), Value::Array(schemas)) => {
                let numbered = schemas.iter().enumerate();
                parts.extend(numbered.map(|(number, schema)| (format!("{path}.{keyword}[{number}]"), schema)));
            }
            (Some(Kind::Schema | Kind::SchemaOrList), schema) => parts.push((format!("{path}.{keyword}"), schema)),
            _ => (),
        }
    }
    parts
}

struct Checker<'a> {
    root: &'a Value,
}

impl Checker<'_> {
    fn schema(&self, path: &str, schema: &Value) -> Result<()> {
        let fields = match schema {
            Value::Object(fields) => fields,
            Value::Bool(_) => return Ok(()),
            _ => return Err(Error::invalid(path, "must be a schema: an object, true or false")),
        };
        for (keyword, value) in fields {
            let path = format!("{path}.{keyword}");
            match kind(keyword) {
                Some(kind) => self.keyword(&path, kind, value)?,
                // Extensions of others, which say nothing of values.
                None if keyword.starts_with("x-") && keyword != "x-guidance" => (),
                None => return Err(Error::invalid(path, "is not supported")),
            }
        }
        parts(path, schema).into_iter().try_for_each(|(path, part)| self.schema(&path, part))
    }

    /// What a keyword's value is, apart from the schemas in it.
    fn keyword(&self, path: &str, kind: Kind, value: &Value) -> Result<()> {
        let (holds, expected) = match kind {
            Kind::Schema | Kind::SchemaOrList | Kind::Value | Kind::Annotation => (true, ""),
            Kind::List => (value.as_array().is_some_and(|list| !list.is_empty()), "must be a list of schemas"),
            Kind::Named | Kind::ByPattern => (value.is_object(), "must be an object of schemas"),
            Kind::Count => (value.as_u64().is_some_and(|count| count <= MAX_COUNT), "must be 0 to 100000"),
            Kind::Number => (value.is_number(), "must be a number"),
            Kind::NumberOrFlag => (value.is_number() || value.is_boolean(), "must be a number"),
            Kind::Positive => (value.as_f64().is_some_and(|number| number > 0.0), "must be a number above 0"),
            Kind::Pattern => (value.is_string(), "must be a regular expression"),
            Kind::Format => (value.as_str().is_some_and(|name| FORMATS.contains(&name)), ""),
            Kind::Type => (is_type(value), ""),
            Kind::Names => (is_list_of(value, Value::is_string), "must be a list of names"),
            Kind::Values => (value.as_array().is_some_and(|list| !list.is_empty()), "must be a list of values"),
            Kind::Reference => (self.resolves(value), "must lead to a schema here, as in #/$defs/name"),
            Kind::False => (*value == Value::Bool(false), "is not supported; leave it out"),
        };
        match (holds, kind) {
            (true, _) => Ok(()),
            (false, Kind::Format) => Err(Error::invalid(path, format!("must be one of {}", FORMATS.join(", ")))),
            (false, Kind::Type) => Err(Error::invalid(path, format!("must be one or some of {}", TYPES.join(", ")))),
            (false, _) => Err(Error::invalid(path, expected)),
        }
    }

    /// Whether a reference leads somewhere in the schema, in plain names.
    fn resolves(&self, reference: &Value) -> bool {
        let Some(path) = reference.as_str().and_then(|reference| reference.strip_prefix('#')) else { return false };
        let is_plain = !path.contains(['~', '%']);
        is_plain && self.root.pointer(path).is_some_and(|target| target.is_object() || target.is_boolean())
    }
}

fn is_list_of(value: &Value, holds: fn(&Value) -> bool) -> bool {
    value.as_array().is_some_and(|list| list.iter().all(holds))
}

fn is_type(value: &Value) -> bool {
    let is_known = |value: &Value| value.as_str().is_some_and(|name| TYPES.contains(&name));
    is_known(value) || value.as_array().is_some_and(|list| !list.is_empty() && list.iter().all(is_known))
}
