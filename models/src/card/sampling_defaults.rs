//! `generation_config.json`: how a model's author samples, in transformers' words.
//!
//! Owns: the fields, what their values mean, refusals of nonsense. Does not know: what requests may ask for. Source:
//! transformers `generation/utils.py`, `_get_logits_processor`, and `generation/logits_process.py`.

use crate::config::{Bound, Fields};
use crate::error::Result;

/// The sampling fields of `generation_config.json`. `do_sample: false` means greedy, as in transformers.
#[derive(Debug, Clone, Default)]
pub struct SamplingDefaults {
    /// Whether the model's author samples at all.
    pub do_sample: Option<bool>,
    /// See [`SamplingParams`](crate::request::SamplingParams); up to 100.
    pub temperature: Option<f32>,
    /// See [`SamplingParams`](crate::request::SamplingParams).
    pub top_p: Option<f32>,
    /// See [`SamplingParams`](crate::request::SamplingParams).
    pub top_k: Option<usize>,
    /// See [`SamplingParams`](crate::request::SamplingParams).
    pub min_p: Option<f32>,
    /// See [`SamplingParams`](crate::request::SamplingParams); from 0.01 to 100.
    pub repetition_penalty: Option<f32>,
}

/// Beyond these, tokens are drawn blindly, or no longer drawn. Published are 2 at most.
const MAX_TEMPERATURE: f64 = 100.0;
const MAX_PENALTY: f64 = 100.0;
const BOUNDS: &[Bound] = &[
    Bound::number("temperature", 0.0, MAX_TEMPERATURE),
    Bound::number("top_p", 0.0, 1.0),
    Bound::number("min_p", 0.0, 1.0),
    Bound::number("repetition_penalty", 1.0 / MAX_PENALTY, MAX_PENALTY),
];

impl SamplingDefaults {
    /// Reads the fields of a file. A value may lie outside of what requests may ask for. Errors name the file and a field
    /// whose value means nothing.
    pub fn read(fields: &Fields) -> Result<Self> {
        fields.check_bounds(BOUNDS)?;
        Ok(Self {
            do_sample: fields.nullable_or("do_sample", None)?,
            temperature: fields.nullable_or("temperature", None)?,
            top_p: fields.nullable_or("top_p", None)?,
            top_k: top_k(fields)?,
            min_p: fields.nullable_or("min_p", None)?,
            repetition_penalty: fields.nullable_or("repetition_penalty", None)?,
        })
    }
}

/// Candidates; 0 and -1 are off.
fn top_k(fields: &Fields) -> Result<Option<usize>> {
    match fields.nullable_or::<i64>("top_k", None)? {
        None => Ok(None),
        Some(-1) => Ok(Some(0)),
        Some(k) => usize::try_from(k).map(Some).map_err(|_| fields.error("top_k", format!("is {k}; 0 and -1 are off"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<SamplingDefaults> {
        SamplingDefaults::read(&Fields::of("generation_config.json".into(), json.as_bytes())?)
    }

    #[test]
    fn values_outside_of_the_range_of_requests_are_kept() {
        let defaults = read(r#"{"repetition_penalty": 2.5, "temperature": 3.0, "top_p": 0}"#).expect("read");
        assert_eq!((defaults.repetition_penalty, defaults.temperature), (Some(2.5), Some(3.0)));
        assert_eq!(defaults.top_p, Some(0.0));
    }

    #[test]
    fn what_is_off_is_off_in_every_spelling() {
        for (json, top_k) in [("-1", Some(0)), ("0", Some(0)), ("50.0", Some(50)), ("50", Some(50)), ("null", None)] {
            assert_eq!(read(&format!(r#"{{"top_k": {json}}}"#)).expect("read").top_k, top_k, "{json}");
        }
        let nulls = read(r#"{"do_sample": null, "temperature": null, "top_p": null, "min_p": null}"#).expect("read");
        assert_eq!((nulls.do_sample, nulls.temperature, nulls.top_p, nulls.min_p), (None, None, None, None));
    }

    #[test]
    fn nonsense_is_refused_by_field() {
        let nonsense = [
            ("temperature", "-0.5"),
            ("temperature", "1e39"),
            ("temperature", r#""hot""#),
            ("top_p", "-0.1"),
            ("top_p", "1.5"),
            ("top_k", "-2"),
            ("top_k", "2.5"),
            ("min_p", "1.5"),
            ("min_p", "-1"),
            ("repetition_penalty", "0"),
            ("repetition_penalty", "-1.0"),
            ("repetition_penalty", "1e-30"),
            ("repetition_penalty", "1e30"),
            ("do_sample", "3"),
        ];
        for (field, value) in nonsense {
            let error = read(&format!(r#"{{"{field}": {value}}}"#)).expect_err("must be refused").to_string();
            assert!(error.contains(&format!("generation_config.json: {field}: ")), "{error}");
        }
        assert!(read(r#"{"temperature": NaN}"#).is_err());
    }
}
