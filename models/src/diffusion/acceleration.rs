//! How much of the denoising may be left out.
//!
//! Owns: `acceleration`, and the thresholds that its words mean for a model. Does not know: how blocks are skipped
//! ([`BlockCache`](crate::runner::diffusion::block_cache::BlockCache)).

use crate::error::{Error, Result};
use crate::parameter::{Declaration, Options, Parameter, ParameterType, Value};

/// See [`Acceleration`].
pub static ACCELERATION: Parameter<Acceleration> = Parameter::choice(
    "acceleration",
    &Acceleration::NAMES,
    "How much of the denoising may be left out where it hardly changes the result; none when absent.",
);

/// The parameters of this capability.
pub(super) static PARAMETERS: &[&Declaration] = &[&ACCELERATION.declaration];

/// How much of the denoising may be left out. What it means is the model's affair ([`CacheThresholds`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Acceleration {
    /// Everything is computed.
    #[default]
    None,
    /// Where hardly anybody sees it.
    Safe,
    /// Where it shows in details.
    Fast,
}

impl Acceleration {
    const ALL: [Self; 3] = [Self::None, Self::Safe, Self::Fast];
    const NAMES: [&'static str; 3] = ["none", "safe", "fast"];

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|acceleration| acceleration.as_str() == name)
    }

    /// Its name in requests and answers.
    pub fn as_str(self) -> &'static str {
        Self::NAMES[self as usize]
    }
}

impl ParameterType for Acceleration {
    fn from_value(value: &Value) -> Option<Self> {
        Self::named(&String::from_value(value)?)
    }

    fn into_value(self) -> Value {
        Value::Text(self.as_str().to_owned())
    }
}

/// Of a first-block cache: how much of what the first block adds may be new in a pass whose other blocks are skipped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CacheThresholds {
    /// Of [`Acceleration::Safe`].
    pub safe: f64,
    /// Of [`Acceleration::Fast`].
    pub fast: f64,
}

impl CacheThresholds {
    /// Of the cache of each of a request's branches, if it has one.
    pub fn threshold(&self, acceleration: Acceleration) -> Option<f64> {
        match acceleration {
            Acceleration::None => None,
            Acceleration::Safe => Some(self.safe),
            Acceleration::Fast => Some(self.fast),
        }
    }
}

/// `support` is `None` for models that can skip nothing.
pub(super) fn resolve(support: Option<&CacheThresholds>, options: &Options) -> Result<Acceleration> {
    let asked = options.get(&ACCELERATION).unwrap_or_default();
    if asked != Acceleration::None && support.is_none() {
        return Err(Error::invalid(
            "acceleration",
            "no figure says what a first-block cache does to this model; allowed: none",
        ));
    }
    Ok(asked)
}
