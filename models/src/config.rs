//! Reading the JSON files of a checkpoint, with errors that name the file.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// Parses a JSON file; the error names the file and, for wrong types, the field.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = std::fs::read(path).map_err(|e| Error::checkpoint(path, e))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::checkpoint(path, e))
}

/// As [`read_json`]; `None` when there is no such file.
pub fn read_json_if_present<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if path.exists() { read_json(path).map(Some) } else { Ok(None) }
}
