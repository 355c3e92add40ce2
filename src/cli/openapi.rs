//! `tale openapi`.

use std::io::{Write, stdout};

use super::CliError;
use crate::http::openapi;

pub fn run() -> Result<(), CliError> {
    let mut document = serde_json::to_string_pretty(openapi::document()).expect("JSON is JSON: this is a bug");
    document.push('\n');
    stdout().lock().write_all(document.as_bytes()).map_err(CliError::stdout)
}
