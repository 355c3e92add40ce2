//! Values of parameters: the types in which requests hold them, and how those are read that have several spellings.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};

#[cfg(doc)]
use super::Kind;
use crate::lora::LoraOption;
use crate::request::{Frame, Mask};

/// What a client said about a parameter, in the type of its [`Kind`].
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Of [`Kind::Text`], [`Kind::Choice`] and [`Kind::Name`].
    Text(String),
    /// Of [`Kind::Flag`] and [`Kind::FlagOrAuto`].
    Flag(bool),
    /// Of [`Kind::Integer`] and [`Kind::Seed`].
    Integer(u64),
    /// Of [`Kind::Number`], [`Kind::NumberAbove`] and [`Kind::Seconds`].
    Number(f64),
    /// Of [`Kind::Interval`].
    Interval([f64; 2]),
    /// Of [`Kind::Numbers`].
    Numbers(Vec<f64>),
    /// Of [`Kind::Strings`].
    Strings(Vec<String>),
    /// Of [`Kind::Tokens`].
    Tokens(Vec<u32>),
    /// Of [`Kind::Biases`], each token once.
    Biases(Vec<(u32, f64)>),
    /// Of [`Kind::Loras`].
    Loras(Vec<LoraOption>),
    /// Of [`Kind::Image`].
    Image(Arc<Frame>),
    /// Of [`Kind::Images`].
    Images(Vec<Arc<Frame>>),
    /// Of [`Kind::Mask`].
    Mask(Arc<Mask>),
}

impl Value {
    /// As JSON; `None` for images, which answers do not repeat.
    pub fn to_json(&self) -> Option<serde_json::Value> {
        Some(match self {
            Self::Text(text) => text.as_str().into(),
            Self::Flag(flag) => (*flag).into(),
            Self::Integer(number) => (*number).into(),
            Self::Number(number) => (*number).into(),
            Self::Interval(interval) => interval.to_vec().into(),
            Self::Numbers(numbers) => numbers.as_slice().into(),
            Self::Strings(strings) => strings.as_slice().into(),
            Self::Tokens(tokens) => tokens.as_slice().into(),
            Self::Biases(biases) => {
                let bias = |(token, bias): &(u32, f64)| (token.to_string(), serde_json::Value::from(*bias));
                biases.iter().map(bias).collect()
            }
            Self::Loras(loras) => {
                let loras = loras.iter().map(|lora| serde_json::json!({"name": lora.name, "weight": lora.weight}));
                loras.collect()
            }
            Self::Image(_) | Self::Images(_) | Self::Mask(_) => return None,
        })
    }
}

/// A type in which the code of a capability has the values of its parameters.
pub trait ParameterType: Sized {
    /// `None` where the value is of another kind.
    fn from_value(value: &Value) -> Option<Self>;

    /// The value that [`ParameterType::from_value`] gives back.
    fn into_value(self) -> Value;
}

/// Types that are one variant of [`Value`].
macro_rules! parameter_types {
    ($($type:ty => $variant:ident),* $(,)?) => {
        $(impl ParameterType for $type {
            fn from_value(value: &Value) -> Option<Self> {
                match value {
                    Value::$variant(value) => Some(value.clone()),
                    _ => None,
                }
            }

            fn into_value(self) -> Value {
                Value::$variant(self)
            }
        })*
    };
}

parameter_types! {
    String => Text,
    bool => Flag,
    u64 => Integer,
    f64 => Number,
    [f64; 2] => Interval,
    Vec<f64> => Numbers,
    Vec<String> => Strings,
    Vec<u32> => Tokens,
    Vec<(u32, f64)> => Biases,
    Vec<LoraOption> => Loras,
    Arc<Frame> => Image,
    Vec<Arc<Frame>> => Images,
    Arc<Mask> => Mask,
}

impl ParameterType for f32 {
    fn from_value(value: &Value) -> Option<Self> {
        f64::from_value(value).map(|value| value as f32)
    }

    fn into_value(self) -> Value {
        Value::Number(self.into())
    }
}

impl ParameterType for usize {
    /// A number that does not fit is over every limit.
    fn from_value(value: &Value) -> Option<Self> {
        u64::from_value(value).map(|value| usize::try_from(value).unwrap_or(usize::MAX))
    }

    fn into_value(self) -> Value {
        Value::Integer(self as u64)
    }
}

/// Reads [`Kind::Biases`].
pub(super) struct Biases;

impl<'de> Visitor<'de> for Biases {
    type Value = Vec<(u32, f64)>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of numbers by token id")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
        let mut biases = BTreeMap::new();
        while let Some((key, bias)) = map.next_entry::<String, f64>()? {
            let token: u32 = key.parse().map_err(|_| A::Error::custom("has a key that is no token id"))?;
            if biases.insert(token, bias).is_some() {
                return Err(A::Error::custom(format!("has the token {token} twice")));
            }
        }
        Ok(biases.into_iter().collect())
    }
}

/// A seed of 64 bits, with or without a sign.
pub(super) fn seed(number: i128) -> u64 {
    // Readers let nothing pass that has more bits.
    number as u64
}

/// Reads [`Kind::Seconds`].
pub(super) struct Seconds;

impl Visitor<'_> for Seconds {
    type Value = f64;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a number of seconds")
    }

    fn visit_f64<E: serde::de::Error>(self, seconds: f64) -> std::result::Result<f64, E> {
        Ok(seconds)
    }

    fn visit_u64<E: serde::de::Error>(self, seconds: u64) -> std::result::Result<f64, E> {
        Ok(seconds as f64)
    }

    fn visit_i64<E: serde::de::Error>(self, seconds: i64) -> std::result::Result<f64, E> {
        Ok(seconds as f64)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<f64, E> {
        text.trim().parse().map_err(|_| E::custom("must be a number of seconds"))
    }
}

/// Reads [`Kind::FlagOrAuto`], also as the text of a form.
pub(super) struct FlagOrAuto;

impl Visitor<'_> for FlagOrAuto {
    type Value = Option<Value>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("true, false or \"auto\"")
    }

    fn visit_bool<E: serde::de::Error>(self, flag: bool) -> std::result::Result<Self::Value, E> {
        Ok(Some(Value::Flag(flag)))
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<Self::Value, E> {
        match text {
            "auto" => Ok(None),
            "true" => Ok(Some(Value::Flag(true))),
            "false" => Ok(Some(Value::Flag(false))),
            _ => Err(E::custom("must be true, false or \"auto\"")),
        }
    }
}

/// Reads [`Kind::Strings`].
pub(super) struct Strings;

impl<'de> Visitor<'de> for Strings {
    type Value = Vec<String>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a string or a list of strings")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<Self::Value, E> {
        Ok(vec![text.to_owned()])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut strings: A) -> std::result::Result<Self::Value, A::Error> {
        let mut read = Vec::new();
        while let Some(text) = strings.next_element()? {
            read.push(text);
        }
        Ok(read)
    }
}
