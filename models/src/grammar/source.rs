//! What a request says, checked and as the library wants it.
//!
//! Owns: bounds of sources, and nesting of those that are parsed recursively. Does not know: what a schema may hold
//! (`schema.rs`).

use llguidance::api::TopLevelGrammar;
use llguidance::regex_to_lark;
use serde_json::Value;

use super::{Asked, Form, MAX_CHOICE_BYTES, MAX_CHOICES, MAX_LARK_BYTES, MAX_REGEX_BYTES, MAX_SCHEMA_BYTES, schema};
use crate::error::{Error, Result};
use crate::tools::{Calls, Otherwise, quoted};

/// Most open parentheses, brackets and braces: a parser calls itself for each.
const MAX_NESTING: usize = 64;
/// Longest grammar of calls, with the schemas of all tools.
const MAX_CALLS_BYTES: usize = 1 << 20;
/// Most rules and terminals of a grammar, one a line at least: compiling one calls itself for those that it names.
const MAX_LARK_LINES: usize = 2048;

/// The source for the library, or what is wrong with it. `has_token` says whether there is a special token.
pub(super) fn checked(asked: &Asked, has_token: impl Fn(&str) -> bool) -> Result<TopLevelGrammar> {
    let Asked { field, form } = asked;
    match form {
        Form::Schema(value) => {
            check_schema(field, value)?;
            Ok(TopLevelGrammar::from_json_schema(schema::prepared(value)))
        }
        Form::Regex(expression) => {
            check_bytes(field, expression.len(), MAX_REGEX_BYTES)?;
            check_nesting(field, expression)?;
            // Digits, words and their edges are those of ASCII, as in the patterns of schemas.
            let expression = regex_to_lark(expression, "dw");
            Ok(TopLevelGrammar::from_lark(format!("start: /{expression}/")))
        }
        Form::Choice(choices) => {
            check_choices(field, choices)?;
            let quoted: Vec<String> = choices.iter().map(|choice| quoted(choice)).collect();
            Ok(TopLevelGrammar::from_lark(format!("start: {}", quoted.join(" | "))))
        }
        Form::Lark(grammar) => {
            check_bytes(field, grammar.len(), MAX_LARK_BYTES)?;
            check_nesting(field, grammar)?;
            if grammar.lines().count() > MAX_LARK_LINES {
                return Err(Error::invalid(field, format!("has more than {MAX_LARK_LINES} lines")));
            }
            check_directives(field, grammar)?;
            Ok(TopLevelGrammar::from_lark(grammar.clone()))
        }
        Form::Calls(calls) => {
            for (field, schema) in schemas_of(calls) {
                check_schema(field, schema)?;
            }
            let grammar = calls.lark(schema::prepared, has_token);
            check_bytes(field, grammar.len(), MAX_CALLS_BYTES)?;
            Ok(TopLevelGrammar::from_lark(grammar))
        }
    }
}

/// The schemas of what an answer may be where there are tools, with their paths.
pub(super) fn schemas_of(calls: &Calls) -> impl Iterator<Item = (&str, &Value)> {
    let value = match &calls.otherwise {
        Otherwise::Value { schema, field } => Some((field.as_str(), schema)),
        Otherwise::Nothing | Otherwise::Text => None,
    };
    calls.tools.iter().map(|tool| (tool.field.as_str(), &tool.parameters)).chain(value)
}

fn check_schema(field: &str, schema: &Value) -> Result<()> {
    check_bytes(field, schema.to_string().len(), MAX_SCHEMA_BYTES)?;
    schema::check(field, schema)
}

fn check_bytes(field: &str, bytes: usize, most: usize) -> Result<()> {
    match bytes {
        0 => Err(Error::invalid(field, "is empty")),
        bytes if bytes > most => Err(Error::invalid(field, format!("has {bytes} bytes; at most {most}"))),
        _ => Ok(()),
    }
}

fn check_choices(field: &str, choices: &[String]) -> Result<()> {
    let num_bytes: usize = choices.iter().map(String::len).sum();
    if choices.is_empty() || choices.len() > MAX_CHOICES {
        return Err(Error::invalid(field, format!("has {} choices; allowed: 1 to {MAX_CHOICES}", choices.len())));
    }
    if let Some(empty) = choices.iter().position(String::is_empty) {
        return Err(Error::invalid(format!("{field}[{empty}]"), "is empty"));
    }
    check_bytes(field, num_bytes, MAX_CHOICE_BYTES)
}

/// Counts brackets, those in strings and character classes too: which they are in only a parser knows.
fn check_nesting(field: &str, text: &str) -> Result<()> {
    let mut depth = 0usize;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => (),
        }
        if depth > MAX_NESTING {
            return Err(Error::invalid(field, format!("nests more than {MAX_NESTING} brackets")));
        }
    }
    Ok(())
}

/// Refuses directives that would bring in schemas that nobody checked, or options of the library.
fn check_directives(field: &str, grammar: &str) -> Result<()> {
    for directive in ["%json", "%llguidance", "%lark", "%regex"] {
        if grammar.contains(directive) {
            return Err(Error::invalid(field, format!("{directive} is not supported")));
        }
    }
    Ok(())
}
