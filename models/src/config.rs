//! Reading the small files of a checkpoint (JSON, templates, vocabularies), with errors that name the file and, in JSON,
//! the field.
//!
//! Owns: parsing, and holding fields against their bounds ([`bounds`]). Does not know: how files are opened
//! ([`files`]), what any field means.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::files::{self, Limit};

pub mod bounds;

pub use bounds::{Bound, Bounded};

/// Reads a text file in UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    read_text_within(path, &Limit::CONFIG)
}

/// As [`read_text`], of a file of another kind than configurations.
pub fn read_text_within(path: &Path, limit: &Limit) -> Result<String> {
    text_of(path, files::read(path, limit)?)
}

/// As [`read_text`], of the content of the file at `path`.
pub fn text_of(path: &Path, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| Error::checkpoint(path, format!("is not text in UTF-8: {e}")))
}

/// Parses a JSON file; the error names the file and, for wrong types, the field.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    read_json_within(path, &Limit::CONFIG)
}

/// As [`read_json`], of a file of another kind than configurations.
pub fn read_json_within<T: DeserializeOwned>(path: &Path, limit: &Limit) -> Result<T> {
    parse_json_within(path, &files::read(path, limit)?, limit)
}

/// As [`read_json`]; `None` when there is no such file.
pub fn read_json_if_present<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let bytes = files::read_if_present(path, &Limit::CONFIG)?;
    bytes.map(|bytes| parse_json(path, &bytes)).transpose()
}

/// As [`read_json`], of a file's content at hand.
pub fn parse_json<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    parse_json_within(path, bytes, &Limit::CONFIG)
}

fn parse_json_within<T: DeserializeOwned>(path: &Path, bytes: &[u8], limit: &Limit) -> Result<T> {
    if let Some(problem) = limit.problem(bytes) {
        return Err(Error::checkpoint(path, problem));
    }
    let value: Value = serde_json::from_slice(bytes).map_err(|e| Error::checkpoint(path, e))?;
    from_value(path, value)
}

/// As [`read_json`], of a value that was read from the file at `path`.
///
/// A whole number may be written as a float (`50.0`), as Python's writers do: it is one.
pub fn from_value<T: DeserializeOwned>(path: &Path, mut value: Value) -> Result<T> {
    make_whole(&mut value);
    serde_path_to_error::deserialize(value).map_err(|error| {
        let field = error.path().to_string();
        let problem = error.into_inner();
        match field.as_str() {
            "." | "?" => Error::checkpoint(path, problem),
            _ => Error::checkpoint(path, format!("{field}: {problem}")),
        }
    })
}

/// Turns whole floats into integers; a field that wants a float takes these too.
fn make_whole(value: &mut Value) {
    /// The largest number below which every whole number is a float.
    const MAX_EXACT: f64 = 9_007_199_254_740_992.0;
    match value {
        Value::Number(number) if number.is_f64() => {
            let float = number.as_f64().filter(|float| float.fract() == 0.0 && float.abs() < MAX_EXACT);
            if let Some(float) = float {
                *value = Value::from(float as i64);
            }
        }
        Value::Array(values) => values.iter_mut().for_each(make_whole),
        Value::Object(fields) => fields.values_mut().for_each(make_whole),
        _ => (),
    }
}

/// The fields of one JSON file, where what an absent field means depends on who reads it.
#[derive(Debug, Clone)]
pub struct Fields {
    path: PathBuf,
    /// The object that has them, with a dot; nothing for the file itself.
    prefix: String,
    fields: Map<String, Value>,
}

impl Fields {
    /// Those of the content of the file at `path`.
    pub fn of(path: PathBuf, content: &[u8]) -> Result<Self> {
        Ok(Self { fields: parse_json(&path, content)?, prefix: String::new(), path })
    }

    /// Where the file lies, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The fields of the object in `field`, where there is one; else these.
    pub fn below(mut self, field: &str) -> Result<Self> {
        match self.fields.get_mut(field).map(Value::take) {
            None | Some(Value::Null) => Ok(self),
            Some(Value::Object(fields)) => Ok(Self { fields, ..self }),
            Some(_) => Err(self.error(field, "is no object")),
        }
    }

    /// The fields of the object in `field`; `None` where it is absent or null.
    pub fn object(&self, field: &str) -> Result<Option<Self>> {
        match self.fields.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(fields)) => {
                let (path, prefix) = (self.path.clone(), format!("{}{field}.", self.prefix));
                Ok(Some(Self { path, prefix, fields: fields.clone() }))
            }
            Some(_) => Err(self.error(field, "is no object")),
        }
    }

    /// The names of all fields.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.fields.keys().map(String::as_str)
    }

    /// A field as it stands there.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field)
    }

    /// A field that cannot be null.
    pub fn or<T: DeserializeOwned>(&self, field: &str, default: T) -> Result<T> {
        match self.fields.get(field) {
            None => Ok(default),
            Some(value) => self.parse(field, value),
        }
    }

    /// A field that may be null, which means something else than that it is absent.
    pub fn nullable_or<T: DeserializeOwned>(&self, field: &str, default: Option<T>) -> Result<Option<T>> {
        match self.fields.get(field) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(value) => self.parse(field, value).map(Some),
        }
    }

    /// A switch; null is off, as for Python.
    pub fn flag(&self, field: &str, default: bool) -> Result<bool> {
        Ok(self.nullable_or(field, Some(default))?.unwrap_or(false))
    }

    /// All fields that `T` knows, within its bounds.
    pub fn all<T: Bounded>(&self) -> Result<T> {
        self.check_bounds(T::BOUNDS)?;
        from_value(&self.path, Value::Object(self.fields.clone()))
    }

    /// Refuses a field that is not within its bounds.
    pub fn check_bounds(&self, bounds: &[Bound]) -> Result<()> {
        bounds::check(&self.path, &self.fields, bounds)
    }

    /// Says what is wrong with a field.
    pub fn error(&self, field: &str, problem: impl Display) -> Error {
        Error::checkpoint(&self.path, format!("{}{field}: {problem}", self.prefix))
    }

    fn parse<T: DeserializeOwned>(&self, field: &str, value: &Value) -> Result<T> {
        serde_path_to_error::deserialize(value).map_err(|error| {
            let below = error.path().to_string();
            let problem = error.into_inner();
            match below.as_str() {
                "." | "?" => self.error(field, problem),
                _ => self.error(&format!("{field}.{below}"), problem),
            }
        })
    }
}
