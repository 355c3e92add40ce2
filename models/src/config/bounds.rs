//! Bounds on what a configuration may say.
//!
//! Owns: how large each kind of number may be, one table of bounds for each configuration ([`Bounded`]), the check, which
//! comes before anything is allocated or repeated as often as a field says. Does not know: what any field means, or whether
//! two of them contradict each other.
//!
//! Every bound is at least four times what any published model has, and low enough that sizes can be multiplied: the
//! largest tensor that a configuration within bounds asks for has less than 2^45 bytes, all of a model less than 2^62.

use std::fmt::Display;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Layers of a transformer. Llama 3.1 405B has 126.
pub const MAX_LAYERS: u64 = 1 << 10;
/// Values of one token or image patch between layers, and of all heads together. Llama 3.1 405B has 16,384.
pub const MAX_WIDTH: u64 = 1 << 17;
/// Values of one token inside a feed-forward network. T5-11B has 65,536.
pub const MAX_INNER_WIDTH: u64 = 1 << 20;
/// Heads of one attention. Llama 3.1 405B has 128.
pub const MAX_HEADS: u64 = 1 << 12;
/// Values of one head. DeepSeek-V3 has 576.
pub const MAX_HEAD_DIM: u64 = 1 << 12;
/// Tokens of a vocabulary. Gemma 3 has 262,208.
pub const MAX_VOCABULARY: u64 = 1 << 21;
/// Positions of a text. Llama 4 Scout has 10,485,760.
pub const MAX_POSITIONS: u64 = 1 << 28;
/// Positions that have each an embedding of their own, or one on one side of a picture. LongCLIP has 248, Wan 1024.
pub const MAX_LEARNED_POSITIONS: u64 = 1 << 14;
/// Channels of a picture or of latents in a network of convolutions. SDXL's UNet has 1280, its joined skips 2560.
pub const MAX_CHANNELS: u64 = 1 << 14;
/// Sizes of pictures in such a network, each half of the one before. Published are 8 at most (DC-AE).
pub const MAX_LEVELS: usize = 12;
/// Residual blocks of one size of pictures. Published are 10 at most.
pub const MAX_BLOCKS: u64 = 64;
/// Pixels on one side. FLUX.1's VAE has 1024.
pub const MAX_SIDE: u64 = 1 << 13;
/// Values on one side of a patch or kernel. CLIP has patches of 32 pixels.
pub const MAX_PATCH: u64 = 1 << 8;
/// Timesteps of training. Every published model has 1000.
pub const MAX_TRAIN_TIMESTEPS: u64 = 1 << 16;
/// What a norm adds to a variance. Published are 1e-3 at most.
pub const MAX_EPS: f64 = 1.0;
/// What latents are multiplied with, divided by or moved by. Published are 0.1 to 40.
pub const MAX_SCALE: f64 = 1e6;
/// By how much a schedule of flow matching is shifted. Published are 17 at most.
pub const MAX_SHIFT: f64 = 1e4;
/// Entries of a list, where its own bound says nothing else.
const MAX_ENTRIES: usize = 64;

/// A configuration with bounds for its fields. There is no other way to read one.
pub trait Bounded: DeserializeOwned {
    /// Of every field that says how large something is, or that is computed with.
    const BOUNDS: &'static [Bound];
}

/// What a field may be, where it is a number, a list of numbers or a list of such lists. What else it may be is for the
/// type to say into which it is read.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    field: &'static str,
    numbers: Numbers,
    max_entries: usize,
}

#[derive(Debug, Clone, Copy)]
enum Numbers {
    Whole { min: u64, max: u64 },
    Any { min: f64, max: f64 },
}

impl Bound {
    /// A size or count from 1 to `max`.
    pub const fn size(field: &'static str, max: u64) -> Self {
        Self::whole(field, 1, max)
    }

    /// A whole number.
    pub const fn whole(field: &'static str, min: u64, max: u64) -> Self {
        Self { field, numbers: Numbers::Whole { min, max }, max_entries: MAX_ENTRIES }
    }

    /// Any number.
    pub const fn number(field: &'static str, min: f64, max: f64) -> Self {
        Self { field, numbers: Numbers::Any { min, max }, max_entries: MAX_ENTRIES }
    }

    /// What a norm adds to a variance.
    pub const fn eps(field: &'static str) -> Self {
        Self::number(field, 0.0, MAX_EPS)
    }

    /// What is divided by as well as multiplied with.
    pub const fn scale(field: &'static str) -> Self {
        Self::number(field, 1.0 / MAX_SCALE, MAX_SCALE)
    }

    /// Of words or switches, at most so many.
    pub const fn list(field: &'static str, max_entries: usize) -> Self {
        Self::number(field, f64::MIN, f64::MAX).entries(max_entries)
    }

    /// Of a list, which may have so many entries.
    pub const fn entries(mut self, max_entries: usize) -> Self {
        self.max_entries = max_entries;
        self
    }

    fn check(&self, path: &Path, place: &str, value: &Value) -> Result<()> {
        match value {
            Value::Number(number) => match number.as_f64().filter(|number| !self.numbers.contain(*number)) {
                Some(_) => Err(self.error(path, place, format!("is {number}; allowed: {}", self.numbers))),
                None => Ok(()),
            },
            Value::Array(values) if values.len() > self.max_entries => {
                let problem = format!("has {} entries; allowed: at most {}", values.len(), self.max_entries);
                Err(self.error(path, place, problem))
            }
            Value::Array(values) => {
                let mut entries = values.iter().enumerate();
                entries.try_for_each(|(i, value)| self.check(path, &format!("{place}[{i}]"), value))
            }
            _ => Ok(()),
        }
    }

    fn error(&self, path: &Path, place: &str, problem: String) -> Error {
        Error::checkpoint(path, format!("{}{place}: {problem}", self.field))
    }
}

impl Numbers {
    fn contain(self, number: f64) -> bool {
        match self {
            Self::Whole { min, max } => number.fract() == 0.0 && (min as f64..=max as f64).contains(&number),
            Self::Any { min, max } => (min..=max).contains(&number),
        }
    }
}

impl Display for Numbers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Whole { min, max } => write!(f, "whole numbers from {min} to {max}"),
            Self::Any { min, max } => write!(f, "{min} to {max}"),
        }
    }
}

/// Refuses a field that is not within its bounds; the error names the file at `path`, the field and the bounds.
pub(crate) fn check(path: &Path, fields: &Map<String, Value>, bounds: &[Bound]) -> Result<()> {
    bounds.iter().try_for_each(|bound| match fields.get(bound.field) {
        Some(value) => bound.check(path, "", value),
        None => Ok(()),
    })
}

/// Refuses two numbers of the file at `path` whose product is too large, although neither is.
pub fn check_product(path: &Path, (one, a): (&str, usize), (two, b): (&str, usize), max: u64) -> Result<()> {
    match a.checked_mul(b) {
        Some(product) if product as u64 <= max => Ok(()),
        _ => Err(Error::checkpoint(path, format!("{one}: is {a}, {two} {b}; their product may be {max} at most"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check_refused(bound: Bound, value: Value, expected: &str) {
        let fields = json!({"size": value}).as_object().cloned().expect("an object");
        let error = check(Path::new("config.json"), &fields, &[bound]).expect_err("out of bounds").to_string();
        assert_eq!(error, format!("config.json: {expected}"));
    }

    #[track_caller]
    fn check_allowed(bound: Bound, value: Value) {
        let fields = json!({"size": value}).as_object().cloned().expect("an object");
        check(Path::new("config.json"), &fields, &[bound]).expect("within bounds");
    }

    #[test]
    fn numbers_are_held_against_their_bounds_wherever_they_stand() {
        let size = Bound::size("size", 8).entries(3);
        for value in [json!(1), json!(8), json!([1, 8]), json!([[1], 2, [3, 4]]), json!(null), json!("8"), json!({})] {
            check_allowed(size, value);
        }
        check_refused(size, json!(9), "size: is 9; allowed: whole numbers from 1 to 8");
        check_refused(size, json!(0), "size: is 0; allowed: whole numbers from 1 to 8");
        check_refused(size, json!(-1), "size: is -1; allowed: whole numbers from 1 to 8");
        check_refused(size, json!(2.5), "size: is 2.5; allowed: whole numbers from 1 to 8");
        check_refused(size, json!(u64::MAX), "size: is 18446744073709551615; allowed: whole numbers from 1 to 8");
        check_refused(size, json!([1, [2, 9]]), "size[1][1]: is 9; allowed: whole numbers from 1 to 8");
        check_refused(size, json!([1, 1, 1, 1]), "size: has 4 entries; allowed: at most 3");
        check_refused(Bound::eps("size"), json!(-1e-6), "size: is -1e-6; allowed: 0 to 1");
        check_refused(Bound::scale("size"), json!([1, 0]), "size[1]: is 0; allowed: 0.000001 to 1000000");
    }

    #[test]
    fn a_product_may_be_too_large_of_two_numbers_that_are_not() {
        let check = |a, b| check_product(Path::new("config.json"), ("heads", a), ("head_dim", b), MAX_WIDTH);
        check(128, 128).expect("as published");
        let error = check(4096, 4096).expect_err("too wide").to_string();
        assert_eq!(error, "config.json: heads: is 4096, head_dim 4096; their product may be 131072 at most");
        assert!(check(usize::MAX, 2).is_err());
    }
}
