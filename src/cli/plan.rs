//! `tale inspect --plan FILE`: which models of a configuration lie on which devices, and what they take there.
//!
//! Owns: the report. Does not know: how that is decided (`engine::plan`).

use std::fmt;
use std::path::Path;

use serde::Serialize;

use super::CliError;
use crate::config::{ByteSize, Config, Settings};
use crate::engine::{self, EngineError, Planned};

/// The report, as text or as one JSON object.
pub fn report(file: &Path, memory: Option<ByteSize>, json: bool) -> Result<String, CliError> {
    let flags = Settings { memory, ..Settings::default() };
    let config = Config::resolve(Some(file), flags)?;
    let (on_demand, at_start): (Vec<_>, Vec<_>) = config.models.into_iter().partition(|model| model.on_demand);
    let devices = engine::plan(&at_start, &config.engine).map_err(|error| match error {
        EngineError::Load { source, .. } => CliError::from(*source),
        other => CliError::from(other),
    })?;
    let on_demand = on_demand.into_iter().map(|model| model.name).collect();
    let report = Report { devices: devices.into_iter().map(Device::from).collect(), on_demand };
    Ok(match json {
        true => serde_json::to_string_pretty(&report).expect("numbers and text are always JSON: this is a bug") + "\n",
        false => report.to_string(),
    })
}

#[derive(Debug, Serialize)]
struct Report {
    devices: Vec<Device>,
    /// Models that come with a request, where there is room then.
    on_demand: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Device {
    device: String,
    capacity_bytes: usize,
    models: Vec<Model>,
    /// Beside the models, for requests.
    free_bytes: usize,
}

#[derive(Debug, Serialize)]
struct Model {
    name: String,
    resident_bytes: usize,
    /// Of a request with the model's own defaults.
    request_bytes: usize,
}

impl From<Planned> for Device {
    fn from(planned: Planned) -> Self {
        let Planned { device, capacity_bytes, models } = planned;
        let taken: usize = models.iter().map(|(_, sizes)| sizes.resident_bytes).sum();
        let model = |(name, sizes): (String, engine::assignment::Sizes)| Model {
            name,
            resident_bytes: sizes.resident_bytes,
            request_bytes: sizes.request_bytes,
        };
        Self {
            device: device.to_string(),
            capacity_bytes,
            models: models.into_iter().map(model).collect(),
            free_bytes: capacity_bytes.saturating_sub(taken),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Device { device, capacity_bytes, models, free_bytes } in &self.devices {
            writeln!(f, "{device}: {}", ByteSize(*capacity_bytes))?;
            for Model { name, resident_bytes, request_bytes } in models {
                writeln!(f, "  {name}: {}, and {} of a request", ByteSize(*resident_bytes), ByteSize(*request_bytes))?;
            }
            writeln!(f, "  free for requests: {}", ByteSize(*free_bytes))?;
        }
        match &self.on_demand[..] {
            [] => Ok(()),
            names => writeln!(f, "on demand: {}", names.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes come from headers: two parts of the processor, and a model that must have one of them for itself.
    #[test]
    fn a_configuration_is_shared_out() {
        let golden =
            |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name).join("checkpoint");
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("serve.toml");
        let text = format!(
            "device = [\"cpu:0/2\", \"cpu:1/2\"]\nkv_cache = \"64MiB\"\nmemory = \"1GiB\"\n\n[models]\n\
             words = {{ path = {:?}, devices = [\"cpu:1/2\"] }}\npictures = {:?}\n\
             later = {{ path = \"/later\", load = \"on-demand\" }}\n",
            golden("qwen2"),
            golden("flux-schnell"),
        );
        std::fs::write(&file, text).expect("written");
        let report: serde_json::Value =
            serde_json::from_str(&report(&file, None, true).expect("it fits")).expect("JSON");
        let names = |device: usize| {
            let models = report["devices"][device]["models"].as_array().expect("a list").clone();
            models.into_iter().map(|model| model["name"].as_str().expect("a name").to_owned()).collect::<Vec<_>>()
        };
        assert_eq!([names(0), names(1)], [vec!["pictures"], vec!["pictures", "words"]]);
        assert_eq!(report["devices"][0]["device"], "cpu:0/2");
        assert_eq!(report["on_demand"], serde_json::json!(["later"]));
        let error = super::report(&file, Some(ByteSize(1 << 20)), false).expect_err("too little").to_string();
        assert!(error.contains("model `pictures` fits on no device"), "{error}");
    }
    /// A model that two devices share is on both, and nothing else is.
    #[test]
    fn devices_that_share_a_model_are_planned_alone() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/qwen2-yarn/checkpoint");
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("serve.toml");
        let report = |models: &str, memory: usize| {
            let devices =
                "device = [\"cpu:0/4\", \"cpu:1/4\", \"cpu:2/4\", \"cpu:3/4\"]\nkv_cache = \"1MiB\"\n[models]\n";
            std::fs::write(&file, format!("{devices}{}", models.replace("PATH", &format!("path = {golden:?}"))))
                .expect("written");
            let report = super::report(&file, Some(ByteSize(memory)), true).map_err(|error| error.to_string())?;
            Ok::<serde_json::Value, String>(serde_json::from_str(&report).expect("JSON"))
        };
        let both = "a = { PATH, tensor_parallel = 2, devices = [\"cpu:3/4\", \"cpu:1/4\"] }\nb = { PATH }\n";
        let planned = report(both, 1 << 30).expect("it fits");
        let models = |device: usize| planned["devices"][device]["models"].as_array().expect("a list").clone();
        let names = [0, 1, 2, 3].map(|device| models(device)[0]["name"].as_str().expect("a name").to_owned());
        assert_eq!(names, ["b", "a", "b", "a"]);
        assert!((0..4).all(|device| models(device).len() == 1), "{planned}");
        assert_eq!(models(1)[0], models(3)[0]);
        let part = models(1)[0]["resident_bytes"].as_u64().expect("a number");
        assert!(part < models(0)[0]["resident_bytes"].as_u64().expect("a number"), "{planned}");

        let error = report(both, part as usize - 1).expect_err("too little");
        assert!(error.contains("model `a`: its part on cpu:3/4 takes"), "{error}");
        let error = report("a = { PATH, tensor_parallel = 3 }\n", 1 << 30).expect_err("heads");
        assert!(error.contains("num_attention_heads: 3 ranks cannot share out 4"), "{error}");
        let error = report("a = { PATH, tensor_parallel = 2, replicas = 2 }\n", 1 << 30).expect_err("both");
        assert!(error.contains("has no replicas") && !error.contains('\n'), "{error}");
    }
    /// Two devices that predict the branches of guidance each have the whole model.
    #[test]
    fn devices_of_guidance_are_planned_alone() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/wan-b/checkpoint");
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("serve.toml");
        let devices = "device = [\"cpu:0/3\", \"cpu:1/3\", \"cpu:2/3\"]\n[models]\n";
        let models = format!("a = {{ path = {golden:?}, guidance_devices = 2 }}\nb = {golden:?}\n");
        std::fs::write(&file, format!("{devices}{models}")).expect("written");
        let report: serde_json::Value =
            serde_json::from_str(&report(&file, Some(ByteSize(1 << 30)), true).expect("it fits")).expect("JSON");
        let models = [0, 1, 2].map(|device| report["devices"][device]["models"].as_array().expect("a list").clone());
        assert!(models.iter().all(|models| models.len() == 1), "{report}");
        assert_eq!(models[0], models[1]);
        assert_eq!((&models[0][0]["name"], &models[2][0]["name"]), (&"a".into(), &"b".into()));
        assert_eq!(models[0][0]["resident_bytes"], models[2][0]["resident_bytes"]);
    }
}
