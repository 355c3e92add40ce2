//! Fields of a form as the values that a body's type asks for.
//!
//! A form's parts are text or files. Which of them is a number is not the form's to say but the body's: a field that
//! wants a number, a list or an object reads its text as JSON, and bytes come as they are.

use axum::body::Bytes;
use serde::Deserializer;
use serde::de::value::SeqDeserializer;
use serde::de::{Error as _, IntoDeserializer, Unexpected, Visitor};
use serde_json::{Error, Value};

/// What a form says of one field.
#[derive(Debug)]
pub(super) enum FormValue {
    /// A plain part.
    Text(String),
    /// A part with a file's name.
    File(Bytes),
    /// The parts called `name[]`, in their order.
    List(Vec<FormValue>),
}

impl FormValue {
    /// The text as JSON, if it is of the kind that is wanted; what is not is told without being repeated.
    fn json<'de, V: Visitor<'de>>(&self, is_wanted: fn(&Value) -> bool, visitor: &V) -> Result<Value, Error> {
        let found = match self {
            Self::Text(text) => match serde_json::from_str(text.trim()) {
                Ok(value) if is_wanted(&value) => return Ok(value),
                _ => "text",
            },
            Self::File(_) => "file",
            Self::List(_) => "sequence",
        };
        Err(Error::invalid_type(Unexpected::Other(found), visitor))
    }
}

impl IntoDeserializer<'_, Error> for FormValue {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// Methods for types that text cannot be without being read first.
macro_rules! read_json {
    ($($method:ident)*, $is_wanted:expr) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            self.json($is_wanted, &visitor)?.$method(visitor)
        })*
    };
}

impl<'de> Deserializer<'de> for FormValue {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Self::Text(text) => visitor.visit_string(text),
            Self::File(bytes) => visitor.visit_byte_buf(bytes.into()),
            Self::List(values) => visitor.visit_seq(SeqDeserializer::new(values.into_iter())),
        }
    }

    read_json!(
        deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_u8 deserialize_u16 deserialize_u32
        deserialize_u64 deserialize_f32 deserialize_f64,
        Value::is_number
    );
    read_json!(deserialize_bool, Value::is_boolean);
    read_json!(deserialize_map, Value::is_object);

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Self::List(_) => self.deserialize_any(visitor),
            other => other.json(Value::is_array, &visitor)?.deserialize_seq(visitor),
        }
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.json(Value::is_object, &visitor)?.deserialize_struct(name, fields, visitor)
    }

    /// A field that is there has a value.
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self {
            Self::Text(text) => Value::String(text).deserialize_enum(name, variants, visitor),
            _ => Err(Error::invalid_type(Unexpected::Other("file"), &visitor)),
        }
    }

    serde::forward_to_deserialize_any! {
        i128 u128 char str string bytes byte_buf unit unit_struct tuple_struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde::de::DeserializeOwned;

    use super::*;

    fn read<T: DeserializeOwned>(text: &str) -> Result<T, String> {
        T::deserialize(FormValue::Text(text.to_owned())).map_err(|error| error.to_string())
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Kind {
        Png,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Weighted {
        name: String,
        weight: f64,
    }

    #[test]
    fn text_is_read_as_what_is_wanted() {
        assert_eq!(read::<String>("12"), Ok("12".to_owned()));
        assert_eq!(read::<u64>(" 12 "), Ok(12));
        assert_eq!(read::<Option<f64>>("12"), Ok(Some(12.0)));
        assert_eq!(read::<bool>("true"), Ok(true));
        assert_eq!(read::<Kind>("png"), Ok(Kind::Png));
        let list = vec![Weighted { name: "a".to_owned(), weight: 0.5 }];
        assert_eq!(read::<Vec<Weighted>>(r#"[{"name": "a", "weight": 0.5}]"#), Ok(list));
        assert_eq!(read::<Vec<f64>>("[0, 0.5]"), Ok(vec![0.0, 0.5]));
        assert_eq!(read::<[f64; 2]>("[0, 0.5]"), Ok([0.0, 0.5]));
    }

    #[test]
    fn text_of_another_kind_is_refused_and_not_repeated() {
        for text in ["s3cret", "\"s3cret\"", "1.5.2", "", "-1", "{}"] {
            let error = read::<u64>(text).expect_err(text);
            assert!(error.contains("expected u64") && !error.contains("s3cret"), "{error}");
        }
        for error in [
            read::<bool>("yes").expect_err("not JSON's"),
            read::<Vec<f64>>("5").expect_err("no list"),
            read::<Weighted>("[]").expect_err("no object"),
        ] {
            assert!(error.starts_with("invalid type: text, expected"), "{error}");
        }
    }

    #[test]
    fn files_are_bytes_and_nothing_else() {
        let file = || FormValue::File(Bytes::from_static(b"PNG"));
        assert!(u64::deserialize(file()).is_err() && Vec::<f64>::deserialize(file()).is_err());
        assert!(String::deserialize(FormValue::File(Bytes::from_static(b"\xff"))).is_err());
    }
}
