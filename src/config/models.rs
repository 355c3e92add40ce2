//! The models of a configuration: on the command line and in the table of a file.
//!
//! Owns: how a model is written, and which names it may have. Does not know: whether its paths are there.

use std::collections::BTreeMap;
use std::fmt;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, de};
use tale_models::ModelSource;
use tale_models::device::DeviceSpec;

use super::devices::{Whereabouts, one_or_more};
use super::guesses::Guesses;
use super::lifetime::{Lifetime, LoadTime};

/// Longest name of a model.
pub const MAX_MODEL_NAME_LEN: usize = 128;

/// A model as it is written.
#[derive(Debug, Clone)]
pub struct ModelEntry {
    /// `model` of the API.
    pub name: String,
    /// Where it lies.
    pub source: ModelSource,
    /// How its tokens are guessed, as far as it has a way of its own.
    pub guesses: Guesses,
    /// The devices that it lies on, as far as that is said.
    pub whereabouts: Whereabouts,
    /// When it comes and goes, as far as that is said.
    pub lifetime: Lifetime,
}

/// `NAME=PATH`, or `NAME=PATH,KEY=VALUE` with the keys of [`ModelSource::extras`], [`Guesses::KEYS`],
/// [`Whereabouts::KEYS`] and [`Lifetime::KEYS`].
pub(super) fn parse_model(argument: &str) -> Result<ModelEntry, String> {
    let (name, parts) = argument.split_once('=').ok_or("expected NAME=PATH")?;
    let mut parts = parts.split(',');
    let mut source = ModelSource::at(parts.next().unwrap_or_default());
    let (mut guesses, mut whereabouts) = (Guesses::default(), Whereabouts::default());
    let mut lifetime = Lifetime::default();
    if source.path.as_os_str().is_empty() {
        return Err("the path is empty; expected NAME=PATH".into());
    }
    for part in parts {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        if let Some((_, set)) = Whereabouts::KEYS.iter().find(|(known, _)| *known == key) {
            if !set(&mut whereabouts, value) {
                return Err(format!(
                    "`{key}={value}`: expected a device, each once, or one number of replicas or of devices that share it"
                ));
            }
            continue;
        }
        if let Some((_, set)) = Lifetime::KEYS.iter().find(|(known, _)| *known == key) {
            if !set(&mut lifetime, value) {
                return Err(format!(
                    "`{key}={value}`: expected load=start, load=on-demand or a number of seconds above 0, each once"
                ));
            }
            continue;
        }
        match Guesses::KEYS.iter().find(|(known, _)| *known == key) {
            Some((_, set)) if value.parse().is_ok_and(|tokens| set(&mut guesses, tokens)) => (),
            Some(_) => return Err(format!("`{key}` needs one number of tokens, once")),
            None => set_extra(&mut source, key, value)?,
        }
    }
    checked_model(name, Entry { source, guesses, whereabouts, lifetime })
}

/// One `KEY=PATH` after a model's own path.
fn set_extra(source: &mut ModelSource, key: &str, path: &str) -> Result<(), String> {
    let mut extras = source.extras();
    let Some((_, extra)) = extras.iter_mut().find(|(known, _)| *known == key) else {
        let paths = extras.iter().map(|(known, _)| format!("{known}=PATH"));
        let numbers = Guesses::KEYS.iter().map(|(known, _)| format!("{known}=N"));
        let others = ["device=NAME", "replicas=N", "tensor_parallel=N", "guidance_devices=2", "load=WHEN"];
        let others = others.into_iter().chain(["idle_unload_seconds=N"]).map(str::to_owned);
        let known = paths.chain(numbers).chain(others).collect::<Vec<_>>().join(", ");
        return Err(format!("`{key}` is not one of {known}; a path with a comma goes into the file of --config"));
    };
    if path.is_empty() || extra.is_some() {
        return Err(format!("`{key}` needs one path, once"));
    }
    **extra = Some(path.into());
    Ok(())
}

/// Names go into URLs, JSON, log lines and metric labels.
fn checked_model(name: &str, entry: Entry) -> Result<ModelEntry, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_./:".contains(c);
    if name.is_empty() || name.len() > MAX_MODEL_NAME_LEN || !name.chars().all(fits) {
        return Err(format!(
            "`{name}` is not a model name; allowed: 1 to {MAX_MODEL_NAME_LEN} letters, digits and any of - _ . / :"
        ));
    }
    let Entry { source, guesses, whereabouts, lifetime } = entry;
    Ok(ModelEntry { name: name.to_owned(), source, guesses, whereabouts, lifetime })
}

pub(super) fn models_of_table<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ModelEntry>, D::Error> {
    let table = BTreeMap::<String, Entry>::deserialize(deserializer)?;
    let models = table.into_iter().map(|(name, entry)| checked_model(&name, entry));
    models.map(|model| model.map_err(de::Error::custom)).collect()
}

/// `"PATH"`, or a table with `path` and what goes with it.
struct Entry {
    source: ModelSource,
    guesses: Guesses,
    whereabouts: Whereabouts,
    lifetime: Lifetime,
}

/// The table: the fields of [`ModelSource`], [`Guesses`], [`Whereabouts`] and [`Lifetime`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    path: PathBuf,
    base: Option<PathBuf>,
    ip_adapter: Option<PathBuf>,
    image_encoder: Option<PathBuf>,
    loras: Option<PathBuf>,
    refiner: Option<PathBuf>,
    num_speculative_tokens: Option<usize>,
    prompt_lookup_min: Option<NonZeroUsize>,
    prompt_lookup_max: Option<NonZeroUsize>,
    #[serde(default, deserialize_with = "one_or_more")]
    devices: Vec<DeviceSpec>,
    replicas: Option<NonZeroUsize>,
    tensor_parallel: Option<NonZeroUsize>,
    guidance_devices: Option<NonZeroUsize>,
    load: Option<LoadTime>,
    idle_unload_seconds: Option<NonZeroU32>,
}

impl From<Table> for Entry {
    fn from(table: Table) -> Self {
        let Table { path, base, ip_adapter, image_encoder, loras, refiner, .. } = table;
        let Table { num_speculative_tokens, prompt_lookup_min, prompt_lookup_max, .. } = table;
        let Table { devices, replicas, tensor_parallel, guidance_devices, .. } = table;
        let Table { load, idle_unload_seconds, .. } = table;
        Self {
            source: ModelSource { path, base, ip_adapter, image_encoder, loras, refiner },
            guesses: Guesses { num_speculative_tokens, prompt_lookup_min, prompt_lookup_max },
            whereabouts: Whereabouts { devices, replicas, tensor_parallel, guidance_devices },
            lifetime: Lifetime { load, idle_unload_seconds },
        }
    }
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(EntryVisitor)
    }
}

struct EntryVisitor;

impl<'de> de::Visitor<'de> for EntryVisitor {
    type Value = Entry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a path, or a table with `path`")
    }

    fn visit_str<E: de::Error>(self, path: &str) -> Result<Entry, E> {
        let source = ModelSource::at(path);
        let (guesses, whereabouts, lifetime) = Default::default();
        Ok(Entry { source, guesses, whereabouts, lifetime })
    }

    fn visit_map<A: de::MapAccess<'de>>(self, table: A) -> Result<Entry, A::Error> {
        Table::deserialize(de::value::MapAccessDeserializer::new(table)).map(Entry::from)
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
        let guessing = parse_model("a=/x,loras=/y,num_speculative_tokens=8,prompt_lookup_max=3").unwrap();
        let Guesses { num_speculative_tokens, prompt_lookup_min, prompt_lookup_max } = guessing.guesses;
        assert_eq!(
            (num_speculative_tokens, prompt_lookup_min, prompt_lookup_max),
            (Some(8), None, NonZeroUsize::new(3))
        );
        assert_eq!(guessing.source.loras, Some("/y".into()));
        let error = parse_model("a=/x,bass=/y").unwrap_err();
        assert!(error.contains("refiner=PATH, num_speculative_tokens=N, prompt_lookup_min=N"), "{error}");
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
            "a=/x,num_speculative_tokens=",
            "a=/x,num_speculative_tokens=two",
            "a=/x,num_speculative_tokens=2,num_speculative_tokens=2",
            "a=/x,prompt_lookup_min=0",
        ] {
            assert!(parse_model(wrong).is_err(), "{wrong}");
        }
    }
}
