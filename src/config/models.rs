//! The models of a configuration: on the command line and in the table of a file.
//!
//! Owns: how a model is written, and which names it may have. Does not know: whether its paths are there.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, de};
use tale_models::ModelSource;

use crate::engine::ModelSpec;

/// Longest name of a model.
pub const MAX_MODEL_NAME_LEN: usize = 128;

/// `NAME=PATH`, or `NAME=PATH,KEY=PATH` with the keys of [`ModelSource::extras`].
pub(super) fn parse_model(argument: &str) -> Result<ModelSpec, String> {
    let (name, paths) = argument.split_once('=').ok_or("expected NAME=PATH")?;
    let mut paths = paths.split(',');
    let mut source = ModelSource::at(paths.next().unwrap_or_default());
    if source.path.as_os_str().is_empty() {
        return Err("the path is empty; expected NAME=PATH".into());
    }
    for part in paths {
        set_extra(&mut source, part)?;
    }
    checked_model(name, source)
}

/// One `KEY=PATH` after a model's own path.
fn set_extra(source: &mut ModelSource, part: &str) -> Result<(), String> {
    let (key, path) = part.split_once('=').unwrap_or((part, ""));
    let mut extras = source.extras();
    let Some((_, extra)) = extras.iter_mut().find(|(known, _)| *known == key) else {
        let known = extras.map(|(known, _)| format!("{known}=PATH")).join(", ");
        return Err(format!("`{part}` is not one of {known}; a path with a comma goes into the file of --config"));
    };
    if path.is_empty() || extra.is_some() {
        return Err(format!("`{key}` needs one path, once"));
    }
    **extra = Some(path.into());
    Ok(())
}

/// Names go into URLs, JSON, log lines and metric labels.
fn checked_model(name: &str, source: ModelSource) -> Result<ModelSpec, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_./:".contains(c);
    if name.is_empty() || name.len() > MAX_MODEL_NAME_LEN || !name.chars().all(fits) {
        return Err(format!(
            "`{name}` is not a model name; allowed: 1 to {MAX_MODEL_NAME_LEN} letters, digits and any of - _ . / :"
        ));
    }
    Ok(ModelSpec { name: name.to_owned(), source })
}

pub(super) fn models_of_table<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ModelSpec>, D::Error> {
    let table = BTreeMap::<String, SourceEntry>::deserialize(deserializer)?;
    table.into_iter().map(|(name, entry)| checked_model(&name, entry.0).map_err(de::Error::custom)).collect()
}

/// `"PATH"`, or a table with `path` and what goes with it.
struct SourceEntry(ModelSource);

impl<'de> Deserialize<'de> for SourceEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SourceVisitor)
    }
}

struct SourceVisitor;

impl<'de> de::Visitor<'de> for SourceVisitor {
    type Value = SourceEntry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a path, or a table with `path`")
    }

    fn visit_str<E: de::Error>(self, path: &str) -> Result<SourceEntry, E> {
        Ok(SourceEntry(ModelSource::at(path)))
    }

    fn visit_map<A: de::MapAccess<'de>>(self, table: A) -> Result<SourceEntry, A::Error> {
        ModelSource::deserialize(de::value::MapAccessDeserializer::new(table)).map(SourceEntry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_arguments_are_checked() {
        assert!(parse_model("a=/x=y").is_ok_and(|model| model.source == ModelSource::at("/x=y")));
        let based = parse_model("a=/x.safetensors,base=/y").unwrap().source;
        assert_eq!((based.path, based.base), ("/x.safetensors".into(), Some("/y".into())));
        for wrong in [
            "/models/a",
            "=x",
            "a=",
            "a b=/x",
            "\u{e9}=/x",
            "a=,base=/y",
            "a=/x,/y",
            "a=/x,bass=/y",
            "a=/x,base=",
            "a=/x,base=/y,base=/z",
        ] {
            assert!(parse_model(wrong).is_err(), "{wrong}");
        }
    }
}
