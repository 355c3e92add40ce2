//! Metadata of a GGUF file by key: what there is, of the type that is wanted, or an error that names the key.

use std::path::Path;

use crate::error::{Error, Result};
use crate::weights::single::WeightFile;
use crate::weights::{Metadata, MetadataValue};

/// The metadata of one file.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    path: &'a Path,
    metadata: &'a Metadata,
}

impl<'a> Keys<'a> {
    pub(super) fn new(file: &'a WeightFile) -> Self {
        Self { path: file.path(), metadata: file.all_metadata() }
    }

    /// Where the file lies.
    pub(super) fn path(&self) -> &'a Path {
        self.path
    }

    /// Whatever stands under the key.
    pub(super) fn get(&self, key: &str) -> Option<&'a MetadataValue> {
        self.metadata.get(key)
    }

    /// All of it.
    pub(super) fn all(&self) -> impl Iterator<Item = (&'a str, &'a MetadataValue)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "text", MetadataValue::as_text)
    }

    pub(super) fn integer(&self, key: &str) -> Result<Option<i128>> {
        self.typed(key, "whole number", MetadataValue::as_integer)
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", |value| match value {
            MetadataValue::Flag(flag) => Some(*flag),
            _ => None,
        })
    }

    /// Of any kind.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "number", number)
    }

    /// A token's id.
    pub(super) fn id(&self, key: &str) -> Result<Option<u32>> {
        let Some(id) = self.integer(key)? else { return Ok(None) };
        // Python's -1 is no token.
        match id {
            -1 => Ok(None),
            _ => u32::try_from(id).map(Some).map_err(|_| self.error(key, format!("is {id}, which is no token"))),
        }
    }

    /// What `read` makes of each value of a list; `None` where there is no such key.
    pub(super) fn list<T>(
        &self,
        key: &str,
        what: &str,
        read: impl Fn(&'a MetadataValue) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let Some(values) = self.typed(key, "list", MetadataValue::as_list)? else { return Ok(None) };
        let each = values
            .iter()
            .enumerate()
            .map(|(i, value)| read(value).ok_or_else(|| self.error(key, format!("entry {i} is no {what}"))));
        each.collect::<Result<_>>().map(Some)
    }

    /// What must be there.
    pub(super) fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(key, "is missing"))
    }

    pub(super) fn error(&self, key: &str, problem: impl std::fmt::Display) -> Error {
        Error::checkpoint(self.path, format!("`{key}` {problem}"))
    }

    fn typed<T>(&self, key: &str, what: &str, read: impl Fn(&'a MetadataValue) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.error(key, format!("is no {what}")))
    }
}

/// The number that a value is, if it is one to compute with.
pub(super) fn number(value: &MetadataValue) -> Option<f64> {
    match value {
        MetadataValue::Integer(value) => Some(*value as f64),
        MetadataValue::Float(value) => Some(*value).filter(|value| value.is_finite()),
        _ => None,
    }
}
