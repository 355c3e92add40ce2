//! `GET /v1/models`, `GET /v1/models/{id}`, and `POST /v1/models/{id}/load` and `/unload` where they are allowed.
//!
//! Owns: what a model looks like on the wire, and which checkpoints may be loaded. Does not know: how one is loaded.

use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::Json;
use axum::body::HttpBody;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tale_models::device::DeviceSpec;
use tale_models::parameter::{Declaration, Options, Parameter};

use super::body::value::Value;
use super::body::{self, Format};
use super::error::{ApiError, WireProgress};
use super::files::FileWork;
use super::parameters::{self, room_in};
use super::path::Id;
use super::{AppState, unix_seconds};
use crate::engine::{ModelReport, When, Wish};

/// Longest path that may be loaded, as Linux has it.
const MAX_PATH_BYTES: usize = 4096;
/// Most devices of one model.
const MAX_DEVICES: usize = 64;
/// Longest name of a device.
const MAX_DEVICE_BYTES: usize = 32;
/// Longest time in which requests may end that work with a model that goes: a day.
const MAX_DRAIN_SECONDS: usize = 86_400;
/// Largest body of an order to load or unload.
const MAX_ORDER_BYTES: usize = 16 << 10;
/// Most orders whose checkpoints are looked at at a time.
const MAX_ORDERS: usize = 8;
static ORDERS: FileWork = FileWork::new(MAX_ORDERS);

const PATH: &str = "path";

static FROM: Parameter<String> = Parameter::text(
    PATH,
    MAX_PATH_BYTES,
    "Checkpoint to load: one that is configured, or below `models_dir`, to which it may be relative. As configured when absent.",
);
static DEVICES: Parameter<Vec<String>> = Parameter::strings(
    "devices",
    MAX_DEVICES,
    MAX_DEVICE_BYTES,
    MAX_DEVICES * MAX_DEVICE_BYTES,
    "Devices to load it on. As configured when absent, else where there is room.",
);
static WHEN: Parameter<String> = Parameter::choice(
    "when",
    &["beside", "after"],
    "Whether new weights are loaded beside those that are there, or after these are gone. Beside where there is room when absent.",
);
static DRAIN_SECONDS: Parameter<usize> = Parameter::integer(
    "drain_seconds",
    0,
    MAX_DRAIN_SECONDS,
    "Seconds that requests may take to end that work with weights which go; after that they are ended. `drain_seconds` of the \
     configuration when absent, and no limit where the new weights are beside the old ones.",
);

/// The fields of an order to load.
pub(super) static LOAD: &[&Declaration] =
    &[&FROM.declaration, &DEVICES.declaration, &WHEN.declaration, &DRAIN_SECONDS.declaration];
/// The fields of an order to unload.
static UNLOAD: &[&Declaration] = &[&DRAIN_SECONDS.declaration];

/// What clients may do with models, where they may do anything.
#[derive(Debug, Clone, Default)]
pub struct ModelManagement {
    /// The folder below which lie the checkpoints that may be loaded.
    pub models_dir: Option<PathBuf>,
    /// Checkpoints that may be loaded wherever they lie.
    pub configured: Vec<PathBuf>,
}

impl ModelManagement {
    /// The checkpoint that a client means; none outside of what is allowed, and no word of what is there.
    fn allowed(&self, path: &str) -> Result<PathBuf, ApiError> {
        let refused = || {
            let problem = match self.models_dir {
                Some(_) => "is neither a configured checkpoint nor there below models_dir",
                None => "is no configured checkpoint; others need models_dir in the server's configuration",
            };
            ApiError::field_code(PATH, "path_not_allowed", problem)
        };
        if self.configured.iter().any(|configured| configured == Path::new(path)) {
            return Ok(path.into());
        }
        let root = self.models_dir.as_ref().ok_or_else(refused)?;
        let root = root.canonicalize().map_err(|error| {
            tracing::error!(path = %root.display(), %error, "models_dir cannot be read");
            refused()
        })?;
        // Links are followed first: what counts is where it lies.
        let found = root.join(path).canonicalize().map_err(|_| refused())?;
        if found.starts_with(&root) && found != root { Ok(found) } else { Err(refused()) }
    }
}

#[derive(Serialize)]
pub(super) struct WireModel {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    state: &'static str,
    devices: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<WireProgress>,
    /// Why it could not be loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

#[derive(Serialize)]
pub(super) struct WireModels {
    object: &'static str,
    data: Vec<WireModel>,
}

impl From<&ModelReport> for WireModel {
    fn from(model: &ModelReport) -> Self {
        Self {
            id: model.name.clone(),
            object: "model",
            created: unix_seconds(model.created),
            owned_by: "tale",
            state: model.state.as_str(),
            devices: model.devices.iter().map(DeviceSpec::to_string).collect(),
            progress: model.progress.map(WireProgress::from),
            problem: model.problem.clone(),
        }
    }
}

pub(super) async fn list(State(state): State<AppState>) -> Result<Json<WireModels>, ApiError> {
    let data = state.engine()?.models().iter().map(WireModel::from).collect();
    Ok(Json(WireModels { object: "list", data }))
}

/// Names may hold slashes, as those of Hugging Face do.
pub(super) async fn retrieve(State(state): State<AppState>, Id(name): Id) -> Result<Json<WireModel>, ApiError> {
    Ok(Json((&state.engine()?.report(&name)?).into()))
}

/// `POST /v1/models/{id}`, where the id ends with what is to be done: names may hold slashes, which no path allows in front of more.
pub(super) async fn manage(State(state): State<AppState>, Id(id): Id, request: Request) -> Result<Response, ApiError> {
    let (name, does) = id.rsplit_once('/').ok_or_else(ApiError::no_route)?;
    let fields = match does {
        "load" => LOAD,
        "unload" => UNLOAD,
        _ => return Err(ApiError::no_route()),
    };
    let Some(management) = state.model_management().cloned() else { return Err(ApiError::no_model_management()) };
    state.engine()?.report(name)?;
    let options = order(&state, request, fields).await?;
    let drain = options.get(&DRAIN_SECONDS).map(|seconds| Duration::from_secs(seconds as u64));
    let engine = state.engine()?.clone();
    match does {
        "unload" => engine.unload_model(name, drain)?,
        _ => {
            let (name, path) = (name.to_owned(), options.get(&FROM));
            let (devices, when) = (devices(&options)?, when(&options));
            let load = move || {
                let path = path.map(|path| management.allowed(&path)).transpose()?;
                let begun = engine.load_model(&name, Wish { path, devices, when, drain })?;
                // It is told in any case, if only by a thread that ends.
                let gone = || ApiError::internal("the loading has ended without a word");
                begun.recv().map_err(|_| gone())?.map_err(ApiError::from)
            };
            ORDERS.run(load).await??;
        }
    }
    let model = WireModel::from(&state.engine()?.report(name)?);
    Ok((StatusCode::ACCEPTED, Json(model)).into_response())
}

/// The options of a body; none where there is no body.
async fn order(
    state: &AppState,
    request: Request,
    fields: &'static [&'static Declaration],
) -> Result<Options, ApiError> {
    if request.body().is_end_stream() {
        return Ok(Options::default());
    }
    let received = body::receive(state, request, Format::Json, MAX_ORDER_BYTES).await?.not_waiting();
    let read = move |body: Value| Ok(parameters::take(&mut body.into_object()?, fields, &[])?.options);
    let (options, _) = received.read(state.compute(), move |name: &str| room_in(fields, name), read).await?;
    Ok(options)
}

fn devices(options: &Options) -> Result<Vec<DeviceSpec>, ApiError> {
    let names = options.get(&DEVICES).unwrap_or_default();
    let device = |(index, name): (usize, &String)| {
        let problem = |_| ApiError::field(format!("devices[{index}]"), "is not a device; such as cpu, cpu:0/2, cuda:0");
        name.parse().map_err(problem)
    };
    names.iter().enumerate().map(device).collect()
}

fn when(options: &Options) -> Option<When> {
    let when = options.get(&WHEN)?;
    Some(if when == "after" { When::After } else { When::Beside })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_configured_or_below_the_folder_may_be_loaded() {
        let outside = tempfile::tempdir().expect("a folder");
        let dir = tempfile::tempdir().expect("a folder");
        let root = dir.path().canonicalize().expect("it is there");
        std::fs::create_dir_all(root.join("models/a")).expect("made");
        std::os::unix::fs::symlink(outside.path(), root.join("models/link")).expect("made");
        std::os::unix::fs::symlink(root.join("models/a"), root.join("models/b")).expect("made");
        let configured = vec![outside.path().join("known")];
        let management = ModelManagement { models_dir: Some(root.join("models")), configured };
        let known = outside.path().join("known").display().to_string();
        let absolute = root.join("models/a").display().to_string();
        for (path, expected) in [
            ("a", Some(root.join("models/a"))),
            ("./a/", Some(root.join("models/a"))),
            ("b", Some(root.join("models/a"))),
            (absolute.as_str(), Some(root.join("models/a"))),
            (known.as_str(), Some(known.clone().into())),
            ("", None),
            (".", None),
            ("..", None),
            ("a/../..", None),
            ("link", None),
            ("link/known", None),
            ("none", None),
            ("/etc", None),
            ("a\0", None),
        ] {
            let found = management.allowed(path);
            assert_eq!(found.as_ref().ok(), expected.as_ref(), "{path}");
            if let Err(error) = found {
                assert!(path.is_empty() || path == "." || !error.message().contains(path), "{error:?}");
            }
        }
        let none = ModelManagement { models_dir: None, ..management };
        assert!(none.allowed("a").is_err() && none.allowed(&known).is_ok());
    }
}
