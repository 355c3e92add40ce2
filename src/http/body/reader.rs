//! From a tree of values to a type: what is wrong is said with the path of the field, in words for clients.
//!
//! Types are described by serde. Its own errors are English made for programmers (`expected u64`, `expected struct
//! LoraParameter`), so each kind of value is checked here, before serde sees one that is not of the kind.

use std::fmt::{self, Display};
use std::vec;

use indexmap::map;
use serde::Deserializer;
use serde::de::value::StrDeserializer;
use serde::de::{DeserializeOwned, DeserializeSeed, Error, Expected, IntoDeserializer, MapAccess, SeqAccess};
use serde::de::{Unexpected, Visitor};

use super::value::{Step, Value, path};
use crate::http::error::ApiError;

/// The body that `value` is.
pub(in crate::http) fn read<T: DeserializeOwned>(value: Value) -> Result<T, ApiError> {
    Ok(T::deserialize(Value::Object(value.into_object()?))?)
}

/// What `read` makes of the value of the field called `name`.
pub(in crate::http) fn of_field<T>(
    name: &str,
    value: Value,
    read: impl FnOnce(Value) -> Result<T, ReadError>,
) -> Result<T, ApiError> {
    read(value).map_err(|error| error.within(Step::Key(name.to_owned())).into())
}

/// What is wrong, and where.
#[derive(Debug)]
pub(in crate::http) struct ReadError {
    /// The innermost step comes first.
    path: Vec<Step>,
    problem: Problem,
}

#[derive(Debug)]
enum Problem {
    Missing,
    /// Nobody knows this field.
    Unknown {
        known: &'static [&'static str],
    },
    Wrong(String),
}

impl ReadError {
    fn wrong(problem: impl Into<String>) -> Self {
        Self { path: Vec::new(), problem: Problem::Wrong(problem.into()) }
    }

    fn kind(expected: impl Display, found: &Value) -> Self {
        Self::wrong(format!("must be {expected}; found {}", found.kind()))
    }

    fn within(mut self, step: Step) -> Self {
        self.path.push(step);
        self
    }
}

impl Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.problem {
            Problem::Missing => f.write_str("is missing"),
            Problem::Unknown { known } => write!(f, "is not known here; known: {}", known.join(", ")),
            Problem::Wrong(problem) => f.write_str(problem),
        }
    }
}

impl std::error::Error for ReadError {}

impl From<ReadError> for ApiError {
    fn from(error: ReadError) -> Self {
        let path = path(error.path.iter().rev());
        let code = match error.problem {
            Problem::Missing => "missing_required_parameter",
            Problem::Unknown { .. } => "unknown_parameter",
            Problem::Wrong(_) => "invalid_value",
        };
        ApiError::field_code(if path.is_empty() { "body".to_owned() } else { path }, code, &error)
    }
}

/// What the visitors of serde and of our own types say.
impl Error for ReadError {
    fn custom<T: Display>(problem: T) -> Self {
        Self::wrong(problem.to_string())
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::wrong(format!("must be {expected}; found {}", kind(found)))
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(found, expected)
    }

    fn invalid_length(found: usize, expected: &dyn Expected) -> Self {
        Self::wrong(format!("must be {expected}; found {found}"))
    }

    fn unknown_variant(_: &str, known: &'static [&'static str]) -> Self {
        Self::wrong(format!("must be {}", any_of(known)))
    }

    fn unknown_field(_: &str, known: &'static [&'static str]) -> Self {
        Self { path: Vec::new(), problem: Problem::Unknown { known } }
    }

    fn missing_field(field: &'static str) -> Self {
        Self { path: vec![Step::Key(field.to_owned())], problem: Problem::Missing }
    }
}

/// The kind of what a visitor was shown.
fn kind(found: Unexpected<'_>) -> &'static str {
    match found {
        Unexpected::Bool(_) => "a boolean",
        Unexpected::Unsigned(_) | Unexpected::Signed(_) | Unexpected::Float(_) => "a number",
        Unexpected::Char(_) | Unexpected::Str(_) => "a string",
        Unexpected::Bytes(_) => "a file",
        Unexpected::Unit | Unexpected::Option => "null",
        Unexpected::Seq => "a list",
        _ => "an object",
    }
}

/// `a, b or c`.
fn any_of(known: &[&str]) -> String {
    match known {
        [] => "nothing".to_owned(),
        [one] => (*one).to_owned(),
        [others @ .., last] => format!("{} or {last}", others.join(", ")),
    }
}

impl Value {
    /// What a form's part spells, if that is of the kind that is wanted.
    fn spelled(self, is_wanted: fn(&Value) -> bool) -> Value {
        match &self {
            Value::Part(text) => match Value::from_json(text.trim().as_bytes()) {
                Ok(value) if is_wanted(&value) => value,
                _ => self,
            },
            _ => self,
        }
    }

    /// A whole number from `min` to `max`, the bounds of the field's type.
    fn whole<'de, V: Visitor<'de>>(self, min: i128, max: i128, visitor: V) -> Result<V::Value, ReadError> {
        let number = match self.spelled(Value::is_number) {
            Value::Unsigned(number) => i128::from(number),
            Value::Negative(number) => i128::from(number),
            Value::Float(number) if number.fract() != 0.0 => {
                return Err(ReadError::wrong("must be a whole number; found one with a fraction"));
            }
            // Beyond 64 bits.
            Value::Float(number) if number < 0.0 => i128::MIN,
            Value::Float(_) => i128::MAX,
            other => return Err(ReadError::kind("a whole number", &other)),
        };
        match (u64::try_from(number), i64::try_from(number)) {
            _ if number < min && min == 0 => {
                Err(ReadError::wrong("must be a whole number, 0 or more; found a negative one"))
            }
            (Ok(number), _) if i128::from(number) <= max => visitor.visit_u64(number),
            (_, Ok(number)) if i128::from(number) >= min && number < 0 => visitor.visit_i64(number),
            _ => Err(ReadError::wrong(format!("is a whole number out of range; allowed: {min} to {max}"))),
        }
    }
}

/// Methods for whole numbers of a type.
macro_rules! read_whole {
    ($($method:ident: $min:expr, $max:expr;)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
            self.whole(i128::from($min), i128::from($max), visitor)
        })*
    };
}

impl<'de> Deserializer<'de> for Value {
    type Error = ReadError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(value),
            Value::Unsigned(number) => visitor.visit_u64(number),
            Value::Negative(number) => visitor.visit_i64(number),
            Value::Float(number) => visitor.visit_f64(number),
            Value::Text(text) | Value::Part(text) => visitor.visit_string(text),
            Value::File(bytes) => visitor.visit_byte_buf(bytes),
            Value::List(values) => visitor.visit_seq(Elements { values: values.into_iter(), index: 0 }),
            Value::Object(fields) => visitor.visit_map(Fields { fields: fields.into_iter(), next: None }),
        }
    }

    read_whole! {
        deserialize_u8: u8::MIN, u8::MAX;
        deserialize_u16: u16::MIN, u16::MAX;
        deserialize_u32: u32::MIN, u32::MAX;
        deserialize_u64: u64::MIN, u64::MAX;
        deserialize_u128: u64::MIN, u64::MAX;
        deserialize_i8: i8::MIN, i8::MAX;
        deserialize_i16: i16::MIN, i16::MAX;
        deserialize_i32: i32::MIN, i32::MAX;
        deserialize_i64: i64::MIN, i64::MAX;
        // Whatever 64 bits hold, with or without a sign.
        deserialize_i128: i64::MIN, u64::MAX;
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.spelled(Value::is_number) {
            Value::Unsigned(number) => visitor.visit_f64(number as f64),
            Value::Negative(number) => visitor.visit_f64(number as f64),
            Value::Float(number) => visitor.visit_f64(number),
            other => Err(ReadError::kind("a number", &other)),
        }
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.spelled(|value| matches!(value, Value::Bool(_))) {
            Value::Bool(value) => visitor.visit_bool(value),
            other => Err(ReadError::kind("true or false", &other)),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self {
            Value::Text(text) | Value::Part(text) => visitor.visit_string(text),
            other => Err(ReadError::kind("a string", &other)),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_string(visitor)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.spelled(|value| matches!(value, Value::List(_))) {
            list @ Value::List(_) => list.deserialize_any(visitor),
            other => Err(ReadError::kind("a list", &other)),
        }
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, ReadError> {
        match self.spelled(|value| matches!(value, Value::List(_))) {
            Value::List(values) if values.len() != len => {
                Err(ReadError::wrong(format!("must be a list of {len}; found {}", values.len())))
            }
            other => other.deserialize_seq(visitor),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.spelled(|value| matches!(value, Value::Object(_))) {
            object @ Value::Object(_) => object.deserialize_any(visitor),
            other => Err(ReadError::kind("an object", &other)),
        }
    }

    /// A struct is an object and nothing else: serde would also take a list of its fields' values.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        self.deserialize_map(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self {
            Value::Null => visitor.visit_none(),
            value => visitor.visit_some(value),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, ReadError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        match self {
            Value::Text(text) | Value::Part(text) => visitor.visit_enum(text.into_deserializer()),
            other => Err(ReadError::kind(any_of(variants), &other)),
        }
    }

    serde::forward_to_deserialize_any! {
        char bytes byte_buf unit unit_struct tuple_struct identifier ignored_any
    }
}

impl IntoDeserializer<'_, ReadError> for Value {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

struct Elements {
    values: vec::IntoIter<Value>,
    index: usize,
}

impl<'de> SeqAccess<'de> for Elements {
    type Error = ReadError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, ReadError> {
        let Some(value) = self.values.next() else { return Ok(None) };
        let index = self.index;
        self.index += 1;
        seed.deserialize(value).map(Some).map_err(|error| error.within(Step::Index(index)))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.values.len())
    }
}

struct Fields {
    fields: map::IntoIter<String, Value>,
    next: Option<(String, Value)>,
}

impl<'de> MapAccess<'de> for Fields {
    type Error = ReadError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, ReadError> {
        let Some((key, value)) = self.fields.next() else { return Ok(None) };
        let deserializer: StrDeserializer<'_, ReadError> = key.as_str().into_deserializer();
        match seed.deserialize(deserializer) {
            Ok(field) => {
                self.next = Some((key, value));
                Ok(Some(field))
            }
            Err(error) => Err(error.within(Step::Key(key))),
        }
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, ReadError> {
        let (key, value) = self.next.take().expect("keys come before their values: this is a bug");
        seed.deserialize(value).map_err(|error| error.within(Step::Key(key)))
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Outer {
        inner: Vec<Inner>,
        #[serde(default)]
        seed: u64,
        signed: Option<i128>,
        scale: Option<f32>,
        interval: Option<[f64; 2]>,
        flag: Option<bool>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        role: Role,
        text: String,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Role {
        User,
        Tool,
        System,
    }

    fn parse<T: DeserializeOwned>(json: &str) -> Result<T, ApiError> {
        Value::from_json(json.as_bytes()).and_then(read)
    }

    #[track_caller]
    fn check(body: &str, param: &str, problem: &str) {
        let error = parse::<Outer>(body).expect_err("wrong");
        let found = serde_json::to_value(error.body()).expect("serializes");
        let message = format!("{param}: {problem}");
        assert_eq!((found["param"].as_str(), found["message"].as_str()), (Some(param), Some(&*message)), "{body}");
    }

    #[test]
    fn an_error_names_the_path_and_never_the_value() {
        check(
            r#"{"inner": [{"role": "user", "text": "x"}, {"role": "user", "text": ["secret"]}]}"#,
            "inner[1].text",
            "must be a string; found a list",
        );
        check(r#"{"inner": "secret"}"#, "inner", "must be a list; found a string");
        check(r#"{"inner": [{"role": "user"}]}"#, "inner[0].text", "is missing");
        check(r#"{}"#, "inner", "is missing");
        check(
            r#"{"inner": [], "secret, expected": 1}"#,
            "secret, expected",
            "is not known here; known: inner, seed, signed, scale, interval, flag",
        );
        check(r#"{"inner": [{"role": "secret", "text": ""}]}"#, "inner[0].role", "must be user, tool or system");
        check(
            r#"{"inner": [{"role": 1, "text": ""}]}"#,
            "inner[0].role",
            "must be user, tool or system; found a number",
        );
        check(r#"{"inner": [["user", "x"]]}"#, "inner[0]", "must be an object; found a list");
        check(r#"{"inner": [], "interval": [0]}"#, "interval", "must be a list of 2; found 1");
        check(r#"{"inner": [], "interval": [0, 1, 2]}"#, "interval", "must be a list of 2; found 3");
        check(r#"{"inner": [], "interval": [0, "secret"]}"#, "interval[1]", "must be a number; found a string");
        check(r#"{"inner": [], "flag": "true"}"#, "flag", "must be true or false; found a string");
        check("[[], 1]", "body", "must be an object; found a list");
    }

    #[test]
    fn whole_numbers_are_told_from_others() {
        check(r#"{"inner": [], "seed": -1}"#, "seed", "must be a whole number, 0 or more; found a negative one");
        check(r#"{"inner": [], "seed": -1e40}"#, "seed", "must be a whole number, 0 or more; found a negative one");
        check(r#"{"inner": [], "seed": 0.5}"#, "seed", "must be a whole number; found one with a fraction");
        check(r#"{"inner": [], "seed": "1"}"#, "seed", "must be a whole number; found a string");
        let out_of_range = "is a whole number out of range; allowed: 0 to 18446744073709551615";
        check(r#"{"inner": [], "seed": 18446744073709551616}"#, "seed", out_of_range);
        check(r#"{"inner": [], "seed": 1e300}"#, "seed", out_of_range);
        let out_of_range = "is a whole number out of range; allowed: -9223372036854775808 to 18446744073709551615";
        check(r#"{"inner": [], "signed": 18446744073709551616}"#, "signed", out_of_range);
        check(r#"{"inner": [], "signed": -9223372036854777856}"#, "signed", out_of_range);
        let read = |json: &str| parse::<Outer>(json).map(|outer| (outer.seed, outer.signed, outer.scale)).expect(json);
        let body = r#"{"inner": [], "seed": 16.0, "signed": -9223372036854775808, "scale": 2}"#;
        assert_eq!(read(body), (16, Some(i64::MIN.into()), Some(2.0)));
        let body = r#"{"inner": [], "seed": 18446744073709551615, "signed": 18446744073709551615, "scale": null}"#;
        assert_eq!(read(body), (u64::MAX, Some(u64::MAX.into()), None));
    }

    fn part<T: DeserializeOwned>(text: &str) -> Result<T, String> {
        T::deserialize(Value::Part(text.to_owned())).map_err(|error| error.to_string())
    }

    #[test]
    fn a_part_of_a_form_is_read_as_what_is_wanted() {
        assert_eq!(part::<String>("12"), Ok("12".to_owned()));
        assert_eq!(part::<u64>(" 12 "), Ok(12));
        assert_eq!(part::<u64>("12.0"), Ok(12));
        assert_eq!(part::<Option<f64>>("12"), Ok(Some(12.0)));
        assert_eq!(part::<bool>("true"), Ok(true));
        assert_eq!(part::<Role>("tool"), Ok(Role::Tool));
        let list = vec![Inner { role: Role::User, text: "a".to_owned() }];
        assert_eq!(part::<Vec<Inner>>(r#"[{"role": "user", "text": "a"}]"#), Ok(list));
        assert_eq!(part::<[f64; 2]>("[0, 0.5]"), Ok([0.0, 0.5]));
    }

    #[test]
    fn a_part_of_another_kind_is_refused_and_not_repeated() {
        for text in ["s3cret", "\"s3cret\"", "1.5.2", "", "{}"] {
            assert_eq!(part::<u64>(text), Err("must be a whole number; found text".to_owned()), "{text}");
        }
        assert_eq!(part::<u64>("-1"), Err("must be a whole number, 0 or more; found a negative one".to_owned()));
        assert_eq!(part::<bool>("yes"), Err("must be true or false; found text".to_owned()));
        assert_eq!(part::<Vec<f64>>("5"), Err("must be a list; found text".to_owned()));
        assert_eq!(part::<Inner>("[]"), Err("must be an object; found text".to_owned()));
        let file = || Value::File(b"\xff".to_vec());
        assert!(u64::deserialize(file()).is_err() && Vec::<f64>::deserialize(file()).is_err());
        assert!(String::deserialize(file()).is_err());
    }
}
