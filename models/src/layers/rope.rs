//! Rotary position embeddings of language models: the frequencies that a configuration asks for, and the angles of
//! given positions.
//!
//! Owns: both spellings of the configuration (transformers 4: `rope_theta` + `rope_scaling`; 5: `rope_parameters`) and
//! the types `default`, `linear`, `llama3`, `yarn`. Does not know: how the angles enter the attention (that is the
//! kernel's `rope_half`). Source: transformers `modeling_rope_utils.py`.

use std::collections::BTreeMap;
use std::f32::consts::PI;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::config::bounds::MAX_POSITIONS;
use crate::config::{Bound, Bounded};
use crate::error::{Error, Result};

/// What transformers assumes when no `rope_theta` is given.
const DEFAULT_THETA: f64 = 10_000.0;
/// Published are 1e11 at most.
const MAX_THETA: f64 = 1e12;
/// By how much a rotation may be stretched, and any other factor differ from 1. Published are 64 at most.
const MAX_FACTOR: f64 = 65_536.0;
/// Turns within the original context above which yarn keeps a pair's frequency, where the file does not say.
const DEFAULT_BETA_FAST: f64 = 32.0;
/// Turns below which yarn divides a pair's frequency, where the file does not say.
const DEFAULT_BETA_SLOW: f64 = 1.0;

/// The fields of `config.json` that say how positions are rotated, in both spellings. Flattened into a family's config.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct RopeFields {
    /// transformers 4.
    rope_theta: Option<f64>,
    /// transformers 4.
    rope_scaling: Option<RopeParameters>,
    /// transformers 5.
    rope_parameters: Option<RopeParameters>,
    /// Outside of the dictionary, where some checkpoints have it.
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

impl Bounded for RopeFields {
    /// Which numbers count depends on the type: see `Source::check_ranges`.
    const BOUNDS: &'static [Bound] = &[];
}

/// `rope_scaling` or `rope_parameters`.
#[derive(Debug, Clone, Default, Deserialize)]
struct RopeParameters {
    rope_type: Option<String>,
    /// The oldest spelling of `rope_type`.
    #[serde(rename = "type")]
    legacy_type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    /// Null is not the same as absent.
    #[serde(default, deserialize_with = "stated")]
    factor: Option<Option<f64>>,
    original_max_position_embeddings: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    attention_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    truncate: Option<bool>,
    /// Only looked at to find a dictionary per layer type.
    #[serde(flatten)]
    other: BTreeMap<String, Value>,
}

fn stated<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<Option<f64>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

/// Rotation of one model: frequencies and the factor on cosines and sines.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Radians per position for each of the `head_dim / 2` pairs. In f32, and computed in f32 like the reference does:
    /// at position 100,000 a frequency of more digits would turn by another angle.
    inv_freq: Vec<f32>,
    /// yarn's attention factor; 1 for the others.
    attention_factor: f32,
    /// Positions for which yarn stretches the rotations; 0 for the others.
    extended_positions: usize,
}

impl Rope {
    /// From the fields of the `config.json` at `path` (for messages), `head_dim` and `max_position_embeddings`.
    ///
    /// Errors name the field: unknown types (among them `dynamic` and `longrope`, whose frequencies change with the
    /// length of the sequence), missing parameters, numbers that cannot be computed with, partial rotation.
    pub fn from_config(
        path: &Path,
        fields: &RopeFields,
        head_dim: usize,
        max_position_embeddings: usize,
    ) -> Result<Self> {
        let source = Source::new(path, fields);
        source.check_whole_rotation()?;
        source.check_ranges()?;
        let theta = source.theta()?;
        let stated_max = fields.original_max_position_embeddings.or(source.parameters.original_max_position_embeddings);
        let original_max = stated_max.unwrap_or(max_position_embeddings as f64);
        let scaled_by = stated_max.map(|original_max| max_position_embeddings as f64 / original_max);
        match source.rope_type() {
            "default" => Ok(Self::unscaled(default_frequencies(theta, head_dim))),
            "linear" => Ok(Self::unscaled(linear(&source, theta, head_dim)?)),
            "llama3" => Ok(Self::unscaled(llama3(&source, theta, head_dim, original_max)?)),
            "yarn" => {
                let factor = source.yarn_factor(scaled_by)?;
                Ok(yarn(&source.parameters, theta, head_dim, original_max, factor))
            }
            other => {
                let problem = format!("`{other}` is not supported; known: default, linear, llama3, yarn");
                Err(source.error("rope_type", problem))
            }
        }
    }

    fn unscaled(inv_freq: Vec<f32>) -> Self {
        Self { inv_freq, attention_factor: 1.0, extended_positions: 0 }
    }

    /// The same with each pair's frequency divided by a number of its own (`freq_factors` of llama.cpp's `ggml_rope_ext`). The
    /// error says which number is none to divide by.
    pub fn divided_by(mut self, divisors: &[f32]) -> std::result::Result<Self, String> {
        let allowed = 1.0 / MAX_FACTOR..=MAX_FACTOR;
        if let Some(wrong) = divisors.iter().find(|divisor| !allowed.contains(&f64::from(**divisor))) {
            return Err(format!("has the value {wrong}; allowed: 1/{MAX_FACTOR} to {MAX_FACTOR}"));
        }
        self.inv_freq.iter_mut().zip(divisors).for_each(|(frequency, divisor)| *frequency /= divisor);
        Ok(self)
    }

    /// Positions that the model is made for. Checkpoints with yarn may state the context before the extension as
    /// `max_position_embeddings` (Qwen2.5's instructions do), so theirs is `factor` times the original one if larger.
    pub fn context_len(&self, max_position_embeddings: usize) -> usize {
        max_position_embeddings.max(self.extended_positions)
    }

    /// Cosines and sines `[l, head_dim / 2]` of `positions [l]`.
    ///
    /// Computed per step instead of kept in a table: it is a few microseconds per token, once for all layers, and a
    /// table of 131,072 positions would be 64 MiB.
    pub fn cos_sin(&self, positions: &[u32], device: &Device) -> Result<(Tensor, Tensor)> {
        let mut cos = Vec::with_capacity(positions.len() * self.inv_freq.len());
        let mut sin = Vec::with_capacity(cos.capacity());
        for &position in positions {
            for &inv_freq in &self.inv_freq {
                let angle = position as f32 * inv_freq;
                cos.push(angle.cos() * self.attention_factor);
                sin.push(angle.sin() * self.attention_factor);
            }
        }
        let shape = (positions.len(), self.inv_freq.len());
        Ok((Tensor::from_vec(cos, shape, device)?, Tensor::from_vec(sin, shape, device)?))
    }
}

/// The fields with where they stand, so that errors can name them.
struct Source<'a> {
    path: &'a Path,
    fields: &'a RopeFields,
    parameters: RopeParameters,
    /// `rope_scaling` or `rope_parameters`.
    spelling: &'static str,
}

impl<'a> Source<'a> {
    fn new(path: &'a Path, fields: &'a RopeFields) -> Self {
        // As in transformers: `rope_scaling` goes before `rope_parameters`.
        let (spelling, parameters) = match (&fields.rope_scaling, &fields.rope_parameters) {
            (Some(parameters), _) => ("rope_scaling", parameters.clone()),
            (None, Some(parameters)) => ("rope_parameters", parameters.clone()),
            (None, None) => ("rope_parameters", RopeParameters::default()),
        };
        Self { path, fields, parameters, spelling }
    }

    fn rope_type(&self) -> &str {
        let parameters = &self.parameters;
        parameters.rope_type.as_deref().or(parameters.legacy_type.as_deref()).unwrap_or("default")
    }

    fn theta(&self) -> Result<f64> {
        let theta = self.parameters.rope_theta.or(self.fields.rope_theta).unwrap_or(DEFAULT_THETA);
        if theta > 1.0 && theta <= MAX_THETA {
            return Ok(theta);
        }
        Err(self.error("rope_theta", format!("is {theta}; allowed: above 1, at most {MAX_THETA}")))
    }

    /// Refuses numbers that give no rotation. Those that the type does not use are not looked at.
    fn check_ranges(&self) -> Result<()> {
        let RopeParameters { factor, low_freq_factor, high_freq_factor, .. } = self.parameters;
        let RopeParameters { attention_factor, mscale, mscale_all_dim, beta_fast, beta_slow, .. } = self.parameters;
        let original_max = self.parameters.original_max_position_embeddings;
        if self.rope_type() != "default" {
            self.check_factor("factor", factor.flatten())?;
        }
        if matches!(self.rope_type(), "llama3" | "yarn") {
            const FIELD: &str = "original_max_position_embeddings";
            let problem_of = |max: f64| format!("is {max}; allowed: 1 to {MAX_POSITIONS}");
            let is_wrong = |max: &f64| !(1.0..=MAX_POSITIONS as f64).contains(max);
            if let Some(max) = original_max.filter(is_wrong) {
                return Err(self.error(FIELD, problem_of(max)));
            }
            if let Some(max) = self.fields.original_max_position_embeddings.filter(is_wrong) {
                return Err(Error::checkpoint(self.path, format!("{FIELD}: {}", problem_of(max))));
            }
        }
        match self.rope_type() {
            "llama3" => {
                self.check_factor("low_freq_factor", low_freq_factor)?;
                self.check_factor("high_freq_factor", high_freq_factor)?;
                self.check_order(("low_freq_factor", low_freq_factor), ("high_freq_factor", high_freq_factor))
            }
            "yarn" => {
                self.check_factor("attention_factor", attention_factor)?;
                self.check_factor("mscale", non_zero(mscale))?;
                self.check_factor("mscale_all_dim", non_zero(mscale_all_dim))?;
                let (slow, fast) = (non_zero(beta_slow), non_zero(beta_fast));
                self.check_factor("beta_slow", slow)?;
                self.check_factor("beta_fast", fast)?;
                let slow = slow.unwrap_or(DEFAULT_BETA_SLOW);
                self.check_order(("beta_slow", Some(slow)), ("beta_fast", Some(fast.unwrap_or(DEFAULT_BETA_FAST))))
            }
            _ => Ok(()),
        }
    }

    fn check_factor(&self, field: &str, value: Option<f64>) -> Result<()> {
        match value {
            Some(value) if !(1.0 / MAX_FACTOR..=MAX_FACTOR).contains(&value) => {
                Err(self.error(field, format!("is {value}; allowed: 1/{MAX_FACTOR} to {MAX_FACTOR}")))
            }
            _ => Ok(()),
        }
    }

    /// As in the reference: the key must be there. Where it is null, the two context lengths say by how much yarn
    /// stretches.
    fn yarn_factor(&self, scaled_by: Option<f64>) -> Result<f64> {
        let stated = self.required("factor", self.parameters.factor)?;
        let factor = self.required("factor", stated.or(scaled_by))?;
        self.check_factor("factor", Some(factor))?;
        Ok(factor)
    }

    /// The second must be above the first.
    fn check_order(&self, low: (&str, Option<f64>), high: (&str, Option<f64>)) -> Result<()> {
        match (low.1, high.1) {
            (Some(below), Some(above)) if above <= below => {
                Err(self.error(high.0, format!("is {above}; it must be above {}, {below}", low.0)))
            }
            _ => Ok(()),
        }
    }

    fn check_whole_rotation(&self) -> Result<()> {
        if let Some((name, _)) = self.parameters.other.iter().find(|(_, value)| value.is_object()) {
            return Err(self.error(name, "a rotation of its own per layer type is not supported"));
        }
        match self.parameters.partial_rotary_factor.or(self.fields.partial_rotary_factor) {
            None | Some(1.0) => Ok(()),
            Some(factor) => {
                Err(self.error("partial_rotary_factor", format!("is {factor}; only whole heads (1) are rotated")))
            }
        }
    }

    fn required<T>(&self, field: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(field, format!("is missing; rope type `{}` needs it", self.rope_type())))
    }

    fn error(&self, field: &str, problem: impl std::fmt::Display) -> Error {
        Error::checkpoint(self.path, format!("{}.{field}: {problem}", self.spelling))
    }
}

/// `theta^(-2i/d)` for each pair i.
fn default_frequencies(theta: f64, head_dim: usize) -> Vec<f32> {
    powers(theta, head_dim).map(|power| 1.0 / power).collect()
}

/// `theta^(2i/d)` for each pair i.
fn powers(theta: f64, head_dim: usize) -> impl Iterator<Item = f32> {
    (0..head_dim / 2).map(move |pair| (theta as f32).powf((2 * pair) as f32 / head_dim as f32))
}

/// Position interpolation: all frequencies divided by `factor`.
fn linear(source: &Source<'_>, theta: f64, head_dim: usize) -> Result<Vec<f32>> {
    let factor = source.required("factor", source.parameters.factor.flatten())? as f32;
    Ok(default_frequencies(theta, head_dim).into_iter().map(|frequency| frequency / factor).collect())
}

/// Llama 3.1: long waves are divided by `factor`, short ones kept, those between interpolated.
fn llama3(source: &Source<'_>, theta: f64, head_dim: usize, original_max: f64) -> Result<Vec<f32>> {
    let parameters = &source.parameters;
    let factor = source.required("factor", parameters.factor.flatten())? as f32;
    let low_freq_factor = source.required("low_freq_factor", parameters.low_freq_factor)? as f32;
    let high_freq_factor = source.required("high_freq_factor", parameters.high_freq_factor)? as f32;
    let original_max = original_max as f32;
    let (longest, shortest) = (original_max / low_freq_factor, original_max / high_freq_factor);
    let scale = |frequency: f32| {
        let wavelength = 2.0 * PI / frequency;
        if wavelength > longest {
            return frequency / factor;
        }
        if wavelength < shortest {
            return frequency;
        }
        let smooth = (original_max / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    };
    Ok(default_frequencies(theta, head_dim).into_iter().map(scale).collect())
}

/// YaRN (arXiv 2309.00071): interpolated frequencies for pairs that turn seldom, plain ones for pairs that turn often,
/// a ramp between, and a factor that sharpens the attention.
fn yarn(parameters: &RopeParameters, theta: f64, head_dim: usize, original_max: f64, factor: f64) -> Rope {
    let (low, high) = yarn_ramp(parameters, theta, head_dim, original_max);
    let inv_freq = powers(theta, head_dim)
        .enumerate()
        .map(|(pair, power)| {
            let ramp = ((pair as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let plain = 1.0 - ramp;
            (1.0 / (factor as f32 * power)) * (1.0 - plain) + (1.0 / power) * plain
        })
        .collect();
    let attention_factor = yarn_attention_factor(parameters, factor) as f32;
    Rope { inv_freq, attention_factor, extended_positions: (factor * original_max) as usize }
}

/// First and last pair of the ramp: those that turn `beta_fast` and `beta_slow` times within the original context.
fn yarn_ramp(parameters: &RopeParameters, theta: f64, head_dim: usize, original_max: f64) -> (f64, f64) {
    let dim = head_dim as f64;
    let pair_that_turns = |times: f64| {
        let turns = times * 2.0 * std::f64::consts::PI;
        dim * (original_max / turns).ln() / (2.0 * theta.ln())
    };
    let mut low = pair_that_turns(non_zero(parameters.beta_fast).unwrap_or(DEFAULT_BETA_FAST));
    let mut high = pair_that_turns(non_zero(parameters.beta_slow).unwrap_or(DEFAULT_BETA_SLOW));
    if parameters.truncate.unwrap_or(true) {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, high) = (low.max(0.0), high.min(dim - 1.0));
    // The reference's guard against a ramp without length.
    if low == high { (low, high + 0.001) } else { (low, high) }
}

fn yarn_attention_factor(parameters: &RopeParameters, factor: f64) -> f64 {
    let magnitude = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    match (parameters.attention_factor, non_zero(parameters.mscale), non_zero(parameters.mscale_all_dim)) {
        (Some(given), _, _) => given,
        (None, Some(mscale), Some(mscale_all_dim)) => magnitude(mscale) / magnitude(mscale_all_dim),
        _ => magnitude(1.0),
    }
}

/// The reference takes 0 for "not given" in the optional yarn parameters.
fn non_zero(value: Option<f64>) -> Option<f64> {
    value.filter(|value| *value != 0.0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const HEAD_DIM: usize = 16;
    const MAX_POSITION_EMBEDDINGS: usize = 4096;

    fn parse(config: Value) -> Result<Rope> {
        let fields: RopeFields = serde_json::from_value(config).expect("the fields parse");
        Rope::from_config(Path::new("config.json"), &fields, HEAD_DIM, MAX_POSITION_EMBEDDINGS)
    }

    /// Expected values: `LlamaRotaryEmbedding(...).inv_freq` and `.attention_scaling` of transformers, to six digits.
    fn check(config: Value, inv_freq: [f64; HEAD_DIM / 2], attention_factor: f32) {
        let rope = parse(config.clone()).expect("a supported rope");
        for (found, expected) in rope.inv_freq.iter().zip(inv_freq) {
            let error = (f64::from(*found) - expected).abs();
            assert!(error <= expected * 6e-6, "{config}: {:?} is not {inv_freq:?}", rope.inv_freq);
        }
        assert!((rope.attention_factor - attention_factor).abs() < 1e-6, "{config}: {}", rope.attention_factor);
    }

    #[test]
    fn default_type_in_all_spellings() {
        let expected = [1.0, 1.93923e-1, 3.7606e-2, 7.29267e-3, 1.41421e-3, 2.74248e-4, 5.3183e-5, 1.03134e-5];
        check(json!({"rope_theta": 500000.0}), expected, 1.0);
        check(json!({"rope_theta": 500000, "rope_scaling": null}), expected, 1.0);
        check(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}), expected, 1.0);
        check(json!({"rope_theta": 3.0, "rope_parameters": {"rope_theta": 500000.0}}), expected, 1.0);
    }

    #[test]
    fn theta_is_10000_when_absent() {
        let expected = [1.0, 3.16228e-1, 1e-1, 3.16228e-2, 1e-2, 3.16228e-3, 1e-3, 3.16228e-4];
        check(json!({}), expected, 1.0);
    }

    #[test]
    fn linear_divides_by_factor() {
        let expected = [4e-1, 1.26491e-1, 4e-2, 1.26491e-2, 4e-3, 1.26491e-3, 4e-4, 1.26491e-4];
        check(json!({"rope_scaling": {"type": "linear", "factor": 2.5}}), expected, 1.0);
        check(json!({"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}), expected, 1.0);
    }

    #[test]
    fn llama3_keeps_short_waves_and_stretches_long_ones() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256});
        let expected = [1.0, 3.44849e-1, 1.18921e-1, 1.31508e-2, 1.76777e-3, 6.09612e-4, 2.10224e-4, 7.24955e-5];
        check(json!({"rope_theta": 5000.0, "rope_scaling": scaling}), expected, 1.0);
    }

    #[test]
    fn yarn_with_defaults() {
        let expected = [1.0, 3.16228e-1, 8.125e-2, 1.97642e-2, 4.375e-3, 7.90569e-4, 2.5e-4, 7.90569e-5];
        let scaling = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024});
        check(json!({"rope_theta": 10000.0, "rope_scaling": scaling}), expected, 1.138_629_4);
        // Without a factor: the ratio of the two context lengths.
        let scaling = json!({"rope_type": "yarn", "factor": null, "original_max_position_embeddings": 1024,
            "attention_factor": 1.25});
        check(json!({"rope_parameters": scaling}), expected, 1.25);
    }

    #[test]
    fn yarn_with_every_option() {
        let expected = [1.0, 3.16228e-1, 1e-1, 1.87018e-2, 2.5e-3, 7.90569e-4, 2.5e-4, 7.90569e-5];
        let parameters = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024,
            "rope_theta": 10000.0, "beta_fast": 16, "beta_slow": 2, "truncate": false, "mscale": 0.8,
            "mscale_all_dim": 0.4});
        check(json!({"rope_parameters": parameters}), expected, 1.052_538_4);
    }

    #[test]
    fn yarn_takes_max_position_embeddings_for_the_original_context() {
        let expected = [1.0, 3.16228e-1, 1e-1, 2.76699e-2, 7.5e-3, 1.97642e-3, 5e-4, 1.58114e-4];
        check(json!({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}), expected, 1.069_314_7);
    }

    #[test]
    fn yarn_extends_the_context_by_its_factor() {
        let yarn = |original: usize| {
            let scaling = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": original});
            parse(json!({"rope_scaling": scaling})).expect("supported").context_len(MAX_POSITION_EMBEDDINGS)
        };
        assert_eq!(yarn(MAX_POSITION_EMBEDDINGS), 4 * MAX_POSITION_EMBEDDINGS);
        assert_eq!(yarn(MAX_POSITION_EMBEDDINGS / 4), MAX_POSITION_EMBEDDINGS);
        assert_eq!(parse(json!({})).expect("default").context_len(MAX_POSITION_EMBEDDINGS), MAX_POSITION_EMBEDDINGS);
    }

    #[test]
    fn yarn_whose_ramp_lies_before_the_first_pair() {
        let expected = [1.0, 3.16228e-1, 1e-1, 3.16228e-2, 1e-2, 3.16228e-3, 1e-3, 3.16228e-4];
        let parameters = json!({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024,
            "beta_fast": 4000, "beta_slow": 3000});
        check(json!({"rope_parameters": parameters}), expected, 1.069_314_7);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_field() {
        let refused = |config: Value, field: &str| {
            let error = parse(config).expect_err("must be refused").to_string();
            assert!(error.contains("config.json") && error.contains(field), "{error}");
        };
        refused(json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}), "rope_scaling.rope_type");
        refused(json!({"rope_parameters": {"rope_type": "longrope"}}), "rope_parameters.rope_type");
        refused(json!({"rope_scaling": {"type": "mrope"}}), "`mrope`");
        refused(json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor");
        refused(json!({"rope_scaling": {"type": "linear", "factor": null}}), "rope_scaling.factor");
        let without = json!({"rope_type": "yarn", "original_max_position_embeddings": 1024});
        refused(json!({"rope_scaling": without}), "rope_scaling.factor: is missing");
        refused(
            json!({"rope_parameters": {"rope_type": "yarn", "factor": null}}),
            "rope_parameters.factor: is missing",
        );
        refused(json!({"rope_scaling": {"rope_type": "llama3", "factor": 8}}), "rope_scaling.low_freq_factor");
        refused(json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor");
        refused(json!({"rope_theta": 0}), "rope_theta");
        refused(json!({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}), "full_attention");
    }

    #[test]
    fn numbers_without_a_rotation_are_refused_by_field() {
        let refused = |kind: &str, field: &str, value: Value| {
            let mut scaling = json!({"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 1024,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0});
            scaling[field] = value.clone();
            for spelling in ["rope_scaling", "rope_parameters"] {
                let error = parse(json!({spelling: scaling})).expect_err("must be refused").to_string();
                assert!(error.contains(&format!("{spelling}.{field}")), "{kind} {field} {value}: {error}");
            }
        };
        for nonsense in [json!(0), json!(0.0), json!(-2), json!(-0.5), json!(1e300)] {
            for kind in ["linear", "llama3", "yarn"] {
                refused(kind, "factor", nonsense.clone());
            }
            for kind in ["llama3", "yarn"] {
                refused(kind, "original_max_position_embeddings", nonsense.clone());
            }
            refused("llama3", "low_freq_factor", nonsense.clone());
            refused("llama3", "high_freq_factor", nonsense.clone());
            refused("yarn", "attention_factor", nonsense);
        }
        for negative in [json!(-1), json!(-0.1)] {
            for field in ["beta_fast", "beta_slow", "mscale", "mscale_all_dim"] {
                refused("yarn", field, negative.clone());
            }
        }
        refused("llama3", "high_freq_factor", json!(1.0));
        refused("yarn", "beta_fast", json!(0.5));
        for tiny in [json!(1e-30), json!(1e30)] {
            refused("linear", "factor", tiny.clone());
            refused("llama3", "low_freq_factor", tiny.clone());
            refused("yarn", "beta_slow", tiny);
        }
        let error = parse(json!({"original_max_position_embeddings": 0, "rope_scaling": {"type": "yarn"}}));
        let error = error.expect_err("must be refused").to_string();
        assert!(error.contains("original_max_position_embeddings"), "{error}");
    }

    #[test]
    fn numbers_that_the_type_does_not_use_are_not_looked_at() {
        let plain = parse(json!({})).expect("default");
        let unused = json!({"rope_type": "default", "factor": 0, "beta_fast": -1, "low_freq_factor": -1});
        assert_eq!(parse(json!({"rope_scaling": unused})).expect("default"), plain);
        parse(json!({"rope_scaling": {"type": "linear", "factor": 0.5}})).expect("the reference takes it too");
    }

    #[test]
    fn angles_are_positions_times_frequencies() {
        let rope = parse(json!({})).expect("default");
        let (cos, sin) = rope.cos_sin(&[0, 3], &Device::Cpu).expect("computed");
        assert_eq!(cos.dims(), [2, HEAD_DIM / 2]);
        let (cos, sin) = (cos.to_vec2::<f32>().expect("read"), sin.to_vec2::<f32>().expect("read"));
        assert_eq!((cos[0][0], sin[0][0]), (1.0, 0.0));
        assert_eq!((cos[1][0], sin[1][0]), (3f32.cos(), 3f32.sin()));
    }
}
