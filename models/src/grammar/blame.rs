//! Which part of a schema cannot be compiled.
//!
//! Owns: finding it, by compiling the parts alone, within bounds: the library's messages have no paths. Does not know: what
//! the parts mean.

use std::time::{Duration, Instant};

use llguidance::ParserFactory;
use llguidance::api::TopLevelGrammar;
use serde_json::{Map, Value};

use super::{Asked, Form, parser, problem, schema, source};
use crate::error::Error;

/// Most parts that are tried, and for how long.
const MAX_TRIES: usize = 256;
const MAX_TIME: Duration = Duration::from_millis(200);

/// What is wrong with what was asked, of which the library said this.
pub(super) fn error(factory: &ParserFactory, asked: &Asked, said: &str) -> Error {
    let definitions = match &asked.form {
        Form::Schema(schema) => definitions(schema),
        _ => Map::new(),
    };
    let mut search = Search { factory, definitions, tries_left: MAX_TRIES, deadline: Instant::now() + MAX_TIME };
    let found = match &asked.form {
        Form::Schema(schema) if refers_to_definitions_alone(schema) => search.part(&asked.field, schema),
        Form::Calls(calls) => source::schemas_of(calls).find_map(|(field, schema)| search.whole(field, schema)),
        _ => None,
    };
    let (path, said) = found.unwrap_or_else(|| (asked.field.clone(), said.to_owned()));
    Error::invalid(path, problem::in_own_words(&said, matches!(asked.form, Form::Lark(_))))
}

/// What the references of a schema may lead to, to stand beside its parts.
fn definitions(schema: &Value) -> Map<String, Value> {
    let fields = schema.as_object().into_iter().flatten();
    let definitions = fields.filter(|(name, _)| matches!(name.as_str(), "$defs" | "definitions"));
    definitions.map(|(name, of)| (name.clone(), of.clone())).collect()
}

struct Search<'a> {
    factory: &'a ParserFactory,
    definitions: Map<String, Value>,
    tries_left: usize,
    deadline: Instant,
}

impl Search<'_> {
    /// What is said of a schema that fails alone, or of its part.
    fn whole(&mut self, path: &str, schema: &Value) -> Option<(String, String)> {
        let grammar = TopLevelGrammar::from_json_schema(schema::prepared(schema));
        let said = parser(self.factory, grammar).err()?;
        self.definitions = definitions(schema);
        let part = if refers_to_definitions_alone(schema) { self.part(path, schema) } else { None };
        Some(part.unwrap_or_else(|| (path.to_owned(), said)))
    }

    /// The innermost part that fails alone, with what is said of it.
    fn part(&mut self, path: &str, schema: &Value) -> Option<(String, String)> {
        for (path, part) in schema::parts(path, schema) {
            let said = self.try_alone(part)?;
            if let Err(said) = said {
                return Some(self.part(&path, part).unwrap_or((path, said)));
            }
        }
        None
    }

    /// What is said of a part alone; `None` when there have been enough tries.
    fn try_alone(&mut self, part: &Value) -> Option<Result<(), String>> {
        self.tries_left = self.tries_left.checked_sub(1)?;
        if Instant::now() > self.deadline {
            return None;
        }
        let Value::Object(fields) = part else { return Some(Ok(())) };
        let alone = self.definitions.iter().chain(fields).map(|(name, value)| (name.clone(), value.clone())).collect();
        let grammar = TopLevelGrammar::from_json_schema(schema::prepared(&Value::Object(alone)));
        Some(parser(self.factory, grammar).map(|_| ()))
    }
}

/// Whether parts of a schema can be compiled alone, with its definitions beside them.
fn refers_to_definitions_alone(schema: &Value) -> bool {
    let reference = schema.get("$ref").and_then(Value::as_str);
    let is_definition = |path: &str| path.starts_with("#/$defs/") || path.starts_with("#/definitions/");
    reference.is_none_or(is_definition)
        && schema::parts("", schema).iter().all(|(_, part)| refers_to_definitions_alone(part))
}
