//! A body as a tree of values, before anybody says what they should be.
//!
//! Owns: the tree, and reading JSON into it. Does not know: which fields there are (see [`super::reader`]).

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde::{Deserializer, de};
use serde_json::error::Category;

use crate::http::error::ApiError;

/// Most values of a body: more than a text body can hold, and a bound on what a body of many empty lists takes in memory.
pub(super) const MAX_VALUES: usize = 1 << 22;
/// 2^64, the first whole number that no field can take.
const TWO_TO_64: f64 = 18_446_744_073_709_551_616.0;
/// 2^63.
const TWO_TO_63: f64 = 9_223_372_036_854_775_808.0;

/// A value of JSON, or a part of a form.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::http) enum Value {
    /// `null`, which is as good as absent.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number, however it is written: `16` or `16.0`.
    Unsigned(u64),
    /// A whole number below 0.
    Negative(i64),
    /// A number that is not whole, or a whole one that 64 bits cannot hold.
    Float(f64),
    /// A string.
    Text(String),
    /// The text of a form's part, which may stand for a number, a list or anything else that JSON can spell.
    Part(String),
    /// A form's file.
    File(Vec<u8>),
    /// A list.
    List(Vec<Value>),
    /// An object; no key is there twice.
    Object(Object),
}

/// The fields of an object.
pub(in crate::http) type Object = BTreeMap<String, Value>;

impl Value {
    /// What it is, for errors: never what it says.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Unsigned(_) | Self::Negative(_) | Self::Float(_) => "a number",
            Self::Text(_) => "a string",
            Self::Part(_) => "text",
            Self::File(_) => "a file",
            Self::List(_) => "a list",
            Self::Object(_) => "an object",
        }
    }

    /// The text of a string or of a form's part.
    pub(in crate::http) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) | Self::Part(text) => Some(text),
            _ => None,
        }
    }

    /// The fields of a body.
    pub(in crate::http) fn into_object(self) -> Result<Object, ApiError> {
        match self {
            Self::Object(fields) => Ok(fields),
            other => Err(ApiError::field("body", format!("must be an object; found {}", other.kind()))),
        }
    }

    /// A number as JSON or a form has it.
    fn number(number: f64) -> Self {
        match number {
            whole if whole.fract() != 0.0 => Self::Float(number),
            whole if (0.0..TWO_TO_64).contains(&whole) => Self::Unsigned(whole as u64),
            whole if (-TWO_TO_63..0.0).contains(&whole) => Self::Negative(whole as i64),
            _ => Self::Float(number),
        }
    }

    /// Reads a JSON text.
    pub(in crate::http) fn from_json(json: &[u8]) -> Result<Self, ApiError> {
        let mut progress = Progress { path: Vec::new(), values_left: MAX_VALUES, problem: None };
        let mut deserializer = serde_json::Deserializer::from_slice(json);
        let value = Builder(&mut progress).deserialize(&mut deserializer).and_then(|value| {
            deserializer.end()?;
            Ok(value)
        });
        value.map_err(|error| progress.error(&error))
    }
}

/// A step from a value to one that it holds.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Step {
    Key(String),
    Index(usize),
}

/// `messages[0].content`.
pub(super) fn path<'a>(steps: impl IntoIterator<Item = &'a Step>) -> String {
    let mut path = String::new();
    for step in steps {
        match step {
            Step::Key(key) if path.is_empty() => path.push_str(key),
            Step::Key(key) => path.extend([".", key]),
            Step::Index(index) => write!(path, "[{index}]").expect("memory can be written: this is a bug"),
        }
    }
    path
}

/// Where a reader of JSON is.
struct Progress {
    /// To the value that is being read; after an error, to the one at fault.
    path: Vec<Step>,
    values_left: usize,
    /// What is wrong there, unless it is the JSON itself.
    problem: Option<&'static str>,
}

impl Progress {
    fn refuse<E: de::Error>(&mut self, problem: &'static str) -> E {
        self.problem = Some(problem);
        E::custom(problem)
    }

    fn error(&self, error: &serde_json::Error) -> ApiError {
        let path = path(&self.path);
        let path = if path.is_empty() { "body".to_owned() } else { path };
        match self.problem {
            Some(problem) => ApiError::field(path, problem),
            // It has no kind of its own.
            None if error.to_string().starts_with("number out of range") => {
                ApiError::field(path, "is a number out of range")
            }
            None => {
                debug_assert_ne!(error.classify(), Category::Data, "{error}");
                ApiError::malformed(format!("the body is not valid JSON: {error}"))
            }
        }
    }
}

/// Makes one value of what comes next.
struct Builder<'a>(&'a mut Progress);

impl<'de> DeserializeSeed<'de> for Builder<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        match self.0.values_left.checked_sub(1) {
            Some(left) => self.0.values_left = left,
            None => {
                self.0.path.clear();
                return Err(self.0.refuse("holds more values than are taken"));
            }
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Builder<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
        Ok(Value::Unsigned(number))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        Ok(u64::try_from(number).map_or(Value::Negative(number), Value::Unsigned))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
        Ok(Value::number(number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(Value::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        loop {
            self.0.path.push(Step::Index(values.len()));
            let Some(value) = list.next_element_seed(Builder(self.0))? else { break };
            values.push(value);
            self.0.path.pop();
        }
        self.0.path.pop();
        Ok(Value::List(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut object = Object::new();
        while let Some(key) = fields.next_key::<String>()? {
            self.0.path.push(Step::Key(key.clone()));
            if object.contains_key(&key) {
                return Err(self.0.refuse("is given twice"));
            }
            let value = fields.next_value_seed(Builder(self.0))?;
            object.insert(key, value);
            self.0.path.pop();
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(json: &str) -> (Option<String>, String) {
        let error = Value::from_json(json.as_bytes()).expect_err(json);
        let body = serde_json::to_value(error.body()).expect("serializes");
        (body["param"].as_str().map(str::to_owned), body["message"].as_str().unwrap_or_default().to_owned())
    }

    #[test]
    fn whole_numbers_are_whole_however_they_are_written() {
        for (json, value) in [
            ("16", Value::Unsigned(16)),
            ("16.0", Value::Unsigned(16)),
            ("1.6e1", Value::Unsigned(16)),
            ("-1", Value::Negative(-1)),
            ("-1.0", Value::Negative(-1)),
            ("-0.0", Value::Unsigned(0)),
            ("18446744073709551615", Value::Unsigned(u64::MAX)),
            ("-9223372036854775808", Value::Negative(i64::MIN)),
            ("18446744073709551616", Value::Float(TWO_TO_64)),
            ("-9223372036854777856", Value::Float(-9_223_372_036_854_777_856.0)),
            ("0.5", Value::Float(0.5)),
        ] {
            assert_eq!(Value::from_json(json.as_bytes()).expect(json), value, "{json}");
        }
    }

    #[test]
    fn an_error_of_the_text_says_where() {
        assert_eq!(problem(r#"{"a": [{"b": 1, "b": 2}]}"#), (Some("a[0].b".into()), "a[0].b: is given twice".into()));
        let huge = format!(r#"{{"a": {{"seed": {}}}}}"#, "9".repeat(400));
        assert_eq!(problem(&huge), (Some("a.seed".into()), "a.seed: is a number out of range".into()));
        assert_eq!(
            problem("{"),
            (None, "the body is not valid JSON: EOF while parsing an object at line 1 column 1".into())
        );
        for broken in ["", "nonsense", "{} x", "[1", "{\"a\": \"\\ud800\"}", &"[".repeat(1000)] {
            assert!(problem(broken).1.starts_with("the body is not valid JSON"), "{broken}");
        }
        assert!(Value::from_json(b"\"\xff\"").is_err());
    }

    #[test]
    fn the_number_of_values_is_bounded() {
        let many = format!("[{}0]", "0,".repeat(MAX_VALUES));
        assert_eq!(problem(&many), (Some("body".into()), "body: holds more values than are taken".into()));
    }
}
