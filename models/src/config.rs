//! Reading the small files of a checkpoint (JSON, templates, vocabularies), with errors that name the file.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::lfs;

/// Reads a file; the error names it, and says so where it is only a Git LFS pointer.
pub fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(path).map_err(|e| Error::checkpoint(path, e))?;
    lfs::refuse_pointer(path, &bytes)?;
    Ok(bytes)
}

/// As [`read_bytes`], for text in UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    String::from_utf8(read_bytes(path)?).map_err(|e| Error::checkpoint(path, format!("is not text in UTF-8: {e}")))
}

/// Parses a JSON file; the error names the file and, for wrong types, the field.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_slice(&read_bytes(path)?).map_err(|e| Error::checkpoint(path, e))
}

/// As [`read_json`]; `None` when there is no such file.
pub fn read_json_if_present<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if path.exists() { read_json(path).map(Some) } else { Ok(None) }
}
