//! `scheduler_config.json`: read once, then asked for the fields of whichever solver is wanted.
//!
//! Owns: the file, its spelling, warnings and refusals that name the field. Does not know: what any solver does with its fields.
//! Source: diffusers `configuration_utils.py`, `ConfigMixin.extract_init_dict`: a solver takes from the file what it
//! knows by name and its own defaults for the rest, whichever class the file was written for.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::config::bounds::{MAX_POSITIONS, MAX_SCALE, MAX_SHIFT, MAX_TRAIN_TIMESTEPS};
use crate::config::{Bound, bounds, from_value, text_of};
use crate::error::{Error, Result};
use crate::files::Limit;

/// The fields of a `scheduler_config.json` as they stand there. By default none: every class takes its own defaults.
#[derive(Debug, Clone, Default)]
pub struct SchedulerConfig {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl SchedulerConfig {
    /// The content of the file at `path`. Fields that no solver here knows are ignored with a warning, as in diffusers.
    pub fn parse(path: &Path, content: Vec<u8>) -> Result<Self> {
        if let Some(problem) = Limit::CONFIG.problem(&content) {
            return Err(Error::checkpoint(path, problem));
        }
        let text = without_infinities(&text_of(path, content)?);
        let fields: Map<String, Value> = serde_json::from_str(&text).map_err(|e| Error::checkpoint(path, e))?;
        bounds::check(path, &fields, BOUNDS)?;
        // Names that begin with an underscore are diffusers' own notes (`_class_name`, `_diffusers_version`).
        let is_strange = |name: &&str| !name.starts_with('_') && !KNOWN_FIELDS.contains(name);
        let strange: Vec<&str> = fields.keys().map(String::as_str).filter(is_strange).collect();
        if !strange.is_empty() {
            let (path, fields) = (path.display(), strange.join(", "));
            tracing::warn!("{path}: no scheduler has the fields {fields}; they are ignored");
        }
        Ok(Self { path: path.to_owned(), fields })
    }

    /// The fields that `T` knows, its defaults for those that the file does not give.
    pub fn fields<T: DeserializeOwned>(&self) -> Result<T> {
        from_value(&self.path, Value::Object(self.fields.clone()))
    }

    /// A field as it stands there.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field)
    }

    /// The file with these fields set, as keyword arguments of diffusers' `from_config` set them.
    pub fn with<'a>(&self, settings: impl IntoIterator<Item = (&'a str, Value)>) -> Self {
        let mut changed = self.clone();
        changed.fields.extend(settings.into_iter().map(|(field, value)| (field.to_owned(), value)));
        changed
    }

    /// Refuses the file if any of `checks` holds: field, whether it has an unsupported value, what is allowed.
    pub fn refuse(&self, checks: &[(&str, bool, &str)]) -> Result<()> {
        match checks.iter().find(|(_, found, _)| *found) {
            Some((field, _, allowed)) => Err(Error::checkpoint(&self.path, format!("`{field}`: {allowed}"))),
            None => Ok(()),
        }
    }
}

/// Of all classes: a field means the same in each of them. Those that are missing here have their bounds where they are
/// read, or are of classes without a solver.
const BOUNDS: &[Bound] = &[
    Bound::size("num_train_timesteps", MAX_TRAIN_TIMESTEPS),
    Bound::whole("steps_offset", 0, MAX_TRAIN_TIMESTEPS),
    Bound::whole("original_inference_steps", 0, MAX_TRAIN_TIMESTEPS),
    Bound::whole("disable_corrector", 0, MAX_TRAIN_TIMESTEPS).entries(MAX_TRAIN_TIMESTEPS as usize),
    Bound::scale("timestep_scaling"),
    Bound::scale("clip_sample_range"),
    Bound::scale("sigma_min"),
    Bound::scale("sigma_max"),
    Bound::scale("snr_shift_scale"),
    Bound::number("shift", 1.0 / MAX_SHIFT, MAX_SHIFT),
    Bound::number("flow_shift", 1.0 / MAX_SHIFT, MAX_SHIFT),
    Bound::number("base_shift", -MAX_SCALE, MAX_SCALE),
    Bound::number("max_shift", -MAX_SCALE, MAX_SCALE),
    Bound::whole("base_image_seq_len", 0, MAX_POSITIONS),
    Bound::whole("max_image_seq_len", 0, MAX_POSITIONS),
];

/// Python writes infinite numbers by name, which JSON does not know; diffusers' DPM-Solver saves
/// `"lambda_min_clipped": -Infinity`. They become null, which here means "as by default".
fn without_infinities(text: &str) -> String {
    let mut parts = text.split('"').map(str::to_owned).collect::<Vec<_>>();
    // Every other part is within quotes; the names and words of this file hold no escaped quotes.
    for part in parts.iter_mut().step_by(2) {
        *part = part.replace("-Infinity", "null");
    }
    parts.join("\"")
}

/// Arguments of diffusers' scheduler classes for pictures or clips, but for those that only a class without a solver here
/// has. Files hold fields of more than one class, because a scheduler keeps what it was made from.
const KNOWN_FIELDS: [&str; 69] = [
    "algorithm_type",
    "base_image_seq_len",
    "base_shift",
    "beta_end",
    "beta_schedule",
    "beta_start",
    "clip_sample",
    "clip_sample_range",
    "corrector_order",
    "correct_steps",
    "disable_corrector",
    "dynamic_thresholding_ratio",
    "eta",
    "euler_at_final",
    "final_sigmas_type",
    "flow_shift",
    "gamma",
    "interpolation_type",
    "invert_sigmas",
    "lambda_min_clipped",
    "lower_order_final",
    "max_image_seq_len",
    "max_shift",
    "noise_mode",
    "num_inference_steps",
    "num_train_timesteps",
    "original_inference_steps",
    "predict_x0",
    "prediction_type",
    "predictor_order",
    "rescale_betas_zero_snr",
    "rho",
    "s_churn",
    "s_max",
    "s_min",
    "s_noise",
    "sample_max_value",
    "scaler",
    "set_alpha_to_one",
    "shift",
    "shift_terminal",
    "sigma_data",
    "sigma_max",
    "sigma_min",
    "sigma_schedule",
    "skip_prk_steps",
    "snr",
    "snr_shift_scale",
    "solver_order",
    "solver_p",
    "solver_type",
    "steps_offset",
    "stochastic_sampling",
    "tau_func",
    "thresholding",
    "time_shift_type",
    "timestep_scaling",
    "timestep_spacing",
    "timestep_type",
    "trained_betas",
    "upscale_mode",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_flow_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
    "variance_type",
    "clip_denoised",
];

#[cfg(test)]
pub(crate) mod tests {
    use serde::Deserialize;

    use super::*;

    /// A file with this text, read.
    pub(crate) fn read(json: &str) -> Result<SchedulerConfig> {
        SchedulerConfig::parse(Path::new("scheduler_config.json"), json.into())
    }

    #[derive(Debug, Deserialize)]
    #[serde(default)]
    struct Shift {
        shift: f64,
    }

    impl Default for Shift {
        fn default() -> Self {
            Self { shift: 1.0 }
        }
    }

    #[test]
    fn fields_of_other_classes_and_unknown_ones_are_left_alone() {
        let config = read(r#"{"_class_name": "X", "skip_prk_steps": true, "shift": 3.0}"#).expect("known fields");
        assert_eq!(config.fields::<Shift>().expect("shift").shift, 3.0);
        assert_eq!(read("{}").expect("empty").fields::<Shift>().expect("default").shift, 1.0);
        let strange = read(r#"{"noise_sampler_seed": null, "shifft": 3.0}"#).expect("as in diffusers");
        assert_eq!(strange.fields::<Shift>().expect("default").shift, 1.0);
        let error = read(r#"{"shift": "much"}"#).expect("known").fields::<Shift>().expect_err("a word").to_string();
        assert!(error.contains("scheduler_config.json") && error.contains("much"), "{error}");
    }

    #[test]
    fn infinities_as_python_writes_them_are_read() {
        let config = read(r#"{"lambda_min_clipped": -Infinity, "_note": "-Infinity", "shift": 2.0}"#).expect("read");
        assert_eq!(config.fields["lambda_min_clipped"], Value::Null);
        assert_eq!(config.fields["_note"], "-Infinity");
    }
}
