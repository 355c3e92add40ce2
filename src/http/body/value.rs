//! A body as a tree of values, before anybody says what they should be.
//!
//! Owns: the tree, and reading JSON into it within bounds. Does not know: which fields there are (see [`super::reader`]), nor
//! what they may hold (see [`Room`]).

use std::fmt::{self, Write as _};

use indexmap::map::Entry;
use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde::{Deserializer, de};
use serde_json::error::Category;
use sha2::{Digest, Sha256};

use super::memory::Held;
use crate::http::error::ApiError;

mod object;

pub(in crate::http) use object::Object;

/// Most fields of a body.
pub(super) const MAX_FIELDS: usize = 256;
/// Most values of a field that says no more of itself.
pub(super) const MAX_FIELD_VALUES: usize = 1024;
/// Longest name of a field, of those inside others too, and of a form's part.
pub(super) const MAX_NAME_BYTES: usize = 128;
/// What a value takes in memory: itself, and the room that its list has for one more.
const VALUE_BYTES: usize = 2 * size_of::<Value>();
/// Memory of values is taken in pieces of this size; a smaller body pays with the bytes that arrived.
const CHARGE_BYTES: usize = 64 << 10;
/// 2^64, the first whole number that no field can take.
const TWO_TO_64: f64 = 18_446_744_073_709_551_616.0;
/// 2^63.
const TWO_TO_63: f64 = 9_223_372_036_854_775_808.0;

/// A value of JSON, or a part of a form.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::http) enum Value {
    /// `null`, which is as good as absent.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number, however it is written: `16` or `16.0`.
    Unsigned(u64),
    /// A whole number below 0.
    Negative(i64),
    /// A number that is not whole, or a whole one that 64 bits cannot hold.
    Float(f64),
    /// A string.
    Text(String),
    /// The text of a form's part, which may stand for a number, a list or anything else that JSON can spell.
    Part(String),
    /// A form's file.
    File(Vec<u8>),
    /// A list.
    List(Vec<Value>),
    /// An object; no key is there twice.
    Object(Object),
}

impl Value {
    /// What it is, for errors: never what it says.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Unsigned(_) | Self::Negative(_) | Self::Float(_) => "a number",
            Self::Text(_) => "a string",
            Self::Part(_) => "text",
            Self::File(_) => "a file",
            Self::List(_) => "a list",
            Self::Object(_) => "an object",
        }
    }

    /// Whether it is a number, of JSON and not of a form.
    pub(super) fn is_number(&self) -> bool {
        matches!(self, Self::Unsigned(_) | Self::Negative(_) | Self::Float(_))
    }

    /// The text of a string or of a form's part.
    pub(in crate::http) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) | Self::Part(text) => Some(text),
            _ => None,
        }
    }

    /// The fields of a body.
    pub(in crate::http) fn into_object(self) -> Result<Object, ApiError> {
        match self {
            Self::Object(fields) => Ok(fields),
            other => Err(ApiError::field("body", format!("must be an object; found {}", other.kind()))),
        }
    }

    /// The same as JSON, in the order in which it came; a file is `null`, which JSON bodies never have.
    pub(in crate::http) fn into_json(self) -> serde_json::Value {
        match self {
            Self::Null | Self::File(_) => serde_json::Value::Null,
            Self::Bool(value) => value.into(),
            Self::Unsigned(number) => number.into(),
            Self::Negative(number) => number.into(),
            Self::Float(number) => number.into(),
            Self::Text(text) | Self::Part(text) => text.into(),
            Self::List(values) => values.into_iter().map(Self::into_json).collect(),
            Self::Object(fields) => fields.into_iter().map(|(name, value)| (name, value.into_json())).collect(),
        }
    }

    /// A hash (SHA-256) of all that it says, in the order in which it came, however it was spelled.
    pub(in crate::http) fn hash(&self) -> [u8; 32] {
        let mut hasher = Sha256::new();
        self.hash_into(&mut hasher);
        hasher.finalize().into()
    }

    fn hash_into(&self, hasher: &mut Sha256) {
        let mut bytes = |kind: u8, bytes: &[u8]| {
            hasher.update([kind]);
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        match self {
            Self::Null => bytes(0, &[]),
            Self::Bool(value) => bytes(1, &[u8::from(*value)]),
            Self::Unsigned(number) => bytes(2, &number.to_le_bytes()),
            Self::Negative(number) => bytes(3, &number.to_le_bytes()),
            Self::Float(number) => bytes(4, &number.to_bits().to_le_bytes()),
            Self::Text(text) | Self::Part(text) => bytes(5, text.as_bytes()),
            Self::File(file) => bytes(6, file),
            Self::List(values) => {
                bytes(7, &(values.len() as u64).to_le_bytes());
                values.iter().for_each(|value| value.hash_into(hasher));
            }
            Self::Object(fields) => {
                bytes(8, &(fields.len() as u64).to_le_bytes());
                for (name, value) in fields.iter() {
                    hasher.update((name.len() as u64).to_le_bytes());
                    hasher.update(name.as_bytes());
                    value.hash_into(hasher);
                }
            }
        }
    }

    /// A number as JSON or a form has it.
    fn number(number: f64) -> Self {
        match number {
            whole if whole.fract() != 0.0 => Self::Float(number),
            whole if (0.0..TWO_TO_64).contains(&whole) => Self::Unsigned(whole as u64),
            whole if (-TWO_TO_63..0.0).contains(&whole) => Self::Negative(whole as i64),
            _ => Self::Float(number),
        }
    }

    /// Reads a JSON text that is no body: a part of a form.
    pub(in crate::http) fn from_json(json: &[u8]) -> Result<Self, ApiError> {
        read(json, &|_| Room::SMALL, None)
    }

    /// Reads the JSON text of a body, whose fields have the room that `room_of` says. The memory of what is read is taken
    /// from `held` as it is.
    pub(in crate::http) fn of_body(
        json: &[u8],
        room_of: &dyn Fn(&str) -> Room,
        held: &mut Held,
    ) -> Result<Self, ApiError> {
        read(json, room_of, Some(held))
    }
}

/// How much a field may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::http) struct Room {
    /// Most elements of its list, but for numbers.
    pub(in crate::http) max_items: usize,
    /// Most numbers of its list, or of one in it.
    pub(in crate::http) max_numbers: usize,
    /// Most values in all, the elements of lists in lists and the fields of objects among them.
    pub(in crate::http) max_values: usize,
}

impl Room {
    /// For a field that says no more of itself.
    pub(in crate::http) const SMALL: Self =
        Self { max_items: MAX_FIELD_VALUES, max_numbers: MAX_FIELD_VALUES, max_values: MAX_FIELD_VALUES };

    /// For a list of at most so many elements, none of which has more than a few fields.
    pub(in crate::http) const fn items(max_items: usize) -> Self {
        Self { max_items, ..Self::SMALL }
    }
}

fn read(json: &[u8], room_of: &dyn Fn(&str) -> Room, held: Option<&mut Held>) -> Result<Value, ApiError> {
    let mut progress = Progress {
        path: Vec::new(),
        room_of,
        room: Room::SMALL,
        values_left: MAX_FIELD_VALUES,
        held,
        owed_bytes: 0,
        refusal: None,
    };
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let value = Builder { progress: &mut progress, depth: 0 }.deserialize(&mut deserializer).and_then(|value| {
        deserializer.end()?;
        Ok(value)
    });
    value.map_err(|error| progress.error(&error))
}

/// A step from a value to one that it holds.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Step {
    Key(String),
    Index(usize),
}

/// `messages[0].content`.
pub(super) fn path<'a>(steps: impl IntoIterator<Item = &'a Step>) -> String {
    let mut path = String::new();
    for step in steps {
        match step {
            Step::Key(key) if path.is_empty() => path.push_str(key),
            Step::Key(key) => path.extend([".", key]),
            Step::Index(index) => write!(path, "[{index}]").expect("memory can be written: this is a bug"),
        }
    }
    path
}

/// What a reader of JSON has read, and what it may still read.
struct Progress<'a> {
    /// To the value at fault, after an error. The innermost step comes first.
    path: Vec<Step>,
    room_of: &'a dyn Fn(&str) -> Room,
    /// Of the body's field that is being read.
    room: Room,
    values_left: usize,
    held: Option<&'a mut Held>,
    /// Memory that is taken and not counted yet.
    owed_bytes: usize,
    /// What is wrong, unless it is the JSON itself.
    refusal: Option<Refusal>,
}

enum Refusal {
    /// Of the value at the end of the path.
    Value(String),
    /// Of the whole field of the body.
    Field(String),
    NoMemory(ApiError),
}

impl Progress<'_> {
    fn refuse<E: de::Error>(&mut self, refusal: Refusal) -> E {
        self.refusal = Some(refusal);
        // Nobody reads it.
        E::custom("refused")
    }

    /// Counts one value more.
    fn count<E: de::Error>(&mut self) -> Result<(), E> {
        match self.values_left.checked_sub(1) {
            Some(left) => self.values_left = left,
            None => {
                let problem = format!("holds more than {} values", self.room.max_values);
                return Err(self.refuse(Refusal::Field(problem)));
            }
        }
        self.charge(VALUE_BYTES)
    }

    fn charge<E: de::Error>(&mut self, bytes: usize) -> Result<(), E> {
        self.owed_bytes += bytes;
        if self.owed_bytes < CHARGE_BYTES {
            return Ok(());
        }
        let owed = std::mem::take(&mut self.owed_bytes);
        match self.held.as_mut().map(|held| held.add(owed)) {
            None | Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(self.refuse(Refusal::NoMemory(error))),
        }
    }

    /// An error of a value that the one being read holds, which is found by `step`.
    fn within<E>(&mut self, step: Step, error: E) -> E {
        self.path.push(step);
        error
    }

    fn error(self, error: &serde_json::Error) -> ApiError {
        let named = |path: String| if path.is_empty() { "body".to_owned() } else { path };
        let whole = named(path(self.path.iter().rev()));
        match self.refusal {
            Some(Refusal::NoMemory(error)) => error,
            Some(Refusal::Value(problem)) => ApiError::field(whole, problem),
            Some(Refusal::Field(problem)) => ApiError::field(named(path(self.path.last())), problem),
            // It has no kind of its own.
            None if error.to_string().starts_with("number out of range") => {
                ApiError::field(whole, "is a number out of range")
            }
            None => {
                debug_assert_ne!(error.classify(), Category::Data, "{error}");
                ApiError::malformed(format!("the body is not valid JSON: {error}"))
            }
        }
    }
}

/// Makes one value of what comes next.
struct Builder<'a, 'p> {
    progress: &'a mut Progress<'p>,
    /// Of the value: 0 is the body, 1 a field of it.
    depth: usize,
}

impl<'p> Builder<'_, 'p> {
    /// For a value that this one holds.
    fn inner(&mut self) -> Builder<'_, 'p> {
        Builder { progress: self.progress, depth: self.depth + 1 }
    }

    /// Refuses an element that is one more than its list may have.
    fn check_element<E: de::Error>(&mut self, before: &[Value], next: &Value) -> Result<(), E> {
        let Room { max_items, max_numbers, .. } = self.progress.room;
        let is_of_numbers = next.is_number() && before.first().is_none_or(Value::is_number);
        let (max, of_what) = match is_of_numbers {
            true => (max_numbers, "number"),
            // Lists in lists are bounded by their number of values.
            false if self.depth > 1 => return Ok(()),
            false => (max_items, "element"),
        };
        if before.len() < max {
            return Ok(());
        }
        let plural = if max == 1 { "" } else { "s" };
        Err(self.progress.refuse(Refusal::Value(format!("has more than {max} {of_what}{plural}"))))
    }

    /// Refuses a field that its object, which has so many, cannot have; one of the body gets its room.
    fn begin_field<E: de::Error>(&mut self, num_fields: usize, key: &str) -> Result<(), E> {
        if key.len() > MAX_NAME_BYTES {
            let problem = format!("has a field whose name is longer than {MAX_NAME_BYTES} bytes");
            return Err(self.progress.refuse(Refusal::Value(problem)));
        }
        if self.depth > 0 {
            return self.progress.charge(if num_fields == 0 { Object::BYTES } else { Object::FIELD_BYTES });
        }
        if num_fields == MAX_FIELDS {
            return Err(self.progress.refuse(Refusal::Value(format!("has more than {MAX_FIELDS} fields"))));
        }
        self.progress.room = (self.progress.room_of)(key);
        self.progress.values_left = self.progress.room.max_values;
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Builder<'_, '_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        // Fields of the body are counted apart.
        if self.depth > 1 {
            self.progress.count()?;
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Builder<'_, '_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
        Ok(Value::Unsigned(number))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        Ok(u64::try_from(number).map_or(Value::Negative(number), Value::Unsigned))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
        Ok(Value::number(number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(Value::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        loop {
            match list.next_element_seed(self.inner()) {
                Ok(Some(value)) => {
                    self.check_element(&values, &value)?;
                    values.push(value);
                }
                Ok(None) => return Ok(Value::List(values)),
                Err(error) => return Err(self.progress.within(Step::Index(values.len()), error)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut fields: A) -> Result<Value, A::Error> {
        let mut object = Object::new();
        while let Some(key) = fields.next_key::<String>()? {
            self.begin_field(object.len(), &key)?;
            let place = match object.entry(key) {
                Entry::Vacant(place) => place,
                Entry::Occupied(first) => {
                    let error = self.progress.refuse(Refusal::Value("is given twice".to_owned()));
                    return Err(self.progress.within(Step::Key(first.key().clone()), error));
                }
            };
            match fields.next_value_seed(self.inner()) {
                Ok(value) => place.insert(value),
                Err(error) => return Err(self.progress.within(Step::Key(place.into_key()), error)),
            };
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;

    use tale_models::ClientId;

    use super::super::memory::BodyMemory;
    use super::*;

    fn problem(json: &str) -> (Option<String>, String) {
        let error = Value::from_json(json.as_bytes()).expect_err(json);
        let body = serde_json::to_value(error.body()).expect("serializes");
        (body["param"].as_str().map(str::to_owned), body["message"].as_str().unwrap_or_default().to_owned())
    }

    #[test]
    fn whole_numbers_are_whole_however_they_are_written() {
        for (json, value) in [
            ("16", Value::Unsigned(16)),
            ("16.0", Value::Unsigned(16)),
            ("1.6e1", Value::Unsigned(16)),
            ("-1", Value::Negative(-1)),
            ("-1.0", Value::Negative(-1)),
            ("-0.0", Value::Unsigned(0)),
            ("18446744073709551615", Value::Unsigned(u64::MAX)),
            ("-9223372036854775808", Value::Negative(i64::MIN)),
            ("18446744073709551616", Value::Float(TWO_TO_64)),
            ("-9223372036854777856", Value::Float(-9_223_372_036_854_777_856.0)),
            ("0.5", Value::Float(0.5)),
        ] {
            assert_eq!(Value::from_json(json.as_bytes()).expect(json), value, "{json}");
        }
    }

    #[test]
    fn an_error_of_the_text_says_where() {
        assert_eq!(problem(r#"{"a": [{"b": 1, "b": 2}]}"#), (Some("a[0].b".into()), "a[0].b: is given twice".into()));
        let huge = format!(r#"{{"a": {{"seed": {}}}}}"#, "9".repeat(400));
        assert_eq!(problem(&huge), (Some("a.seed".into()), "a.seed: is a number out of range".into()));
        assert_eq!(
            problem("{"),
            (None, "the body is not valid JSON: EOF while parsing an object at line 1 column 1".into())
        );
        for broken in ["", "nonsense", "{} x", "[1", "{\"a\": \"\\ud800\"}", &"[".repeat(1000)] {
            assert!(problem(broken).1.starts_with("the body is not valid JSON"), "{broken}");
        }
        assert!(Value::from_json(b"\"\xff\"").is_err());
    }

    /// What is wrong with a body whose `list` may have 3 elements and 5 numbers, and 10 values.
    #[track_caller]
    fn check_bound(json: &str, problem: Option<&str>) {
        let room = Room { max_items: 3, max_numbers: 5, max_values: 10 };
        let room_of = |name: &str| if name == "list" { room } else { Room::SMALL };
        let read = Value::of_body(json.as_bytes(), &room_of, &mut BodyMemory::new(1 << 30).hold(ClientId(0)));
        let found = read.err().map(|error| {
            let body = serde_json::to_value(error.body()).expect("serializes");
            body["message"].as_str().unwrap_or_default().to_owned()
        });
        assert_eq!(found.as_deref(), problem, "{json:.80}");
    }

    #[test]
    fn what_a_field_holds_is_bounded_by_its_room() {
        check_bound(r#"{"list": ["", "", ""]}"#, None);
        check_bound(r#"{"list": ["", "", "", "","#, Some("list: has more than 3 elements"));
        check_bound(r#"{"list": [1, 2, 3, 4, 5]}"#, None);
        check_bound(r#"{"list": [1, 2, 3, 4, 5, 6"#, Some("list: has more than 5 numbers"));
        check_bound(r#"{"list": [1, 2, 3, "a"]}"#, Some("list: has more than 3 elements"));
        check_bound(r#"{"list": [[1], [1, 2, 3, 4, 5, 6"#, Some("list[1]: has more than 5 numbers"));
        check_bound(r#"{"list": [[1, 2, 3], [1, 2, 3], [1, 2"#, Some("list: holds more than 10 values"));
        check_bound(r#"{"list": [{"a": [[], [], [], [], [], [], [], [], []"#, Some("list: holds more than 10 values"));
        let many = |element: &str| vec![element; MAX_FIELD_VALUES + 1].join(",");
        check_bound(&format!(r#"{{"tools": [{}"#, many("[]")), Some("tools: holds more than 1024 values"));
        check_bound(&format!(r#"{{"a": {{"b": [{}"#, many("[]")), Some("a: holds more than 1024 values"));
        check_bound(&format!("[{}", many("0")), Some("body: has more than 1024 numbers"));
    }

    #[test]
    fn names_and_their_number_are_bounded() {
        let fields: Vec<String> = (0..=MAX_FIELDS).map(|number| format!(r#""f{number}": 0"#)).collect();
        check_bound(&format!("{{{}", fields.join(",")), Some("body: has more than 256 fields"));
        let long = "n".repeat(MAX_NAME_BYTES + 1);
        let problem = "has a field whose name is longer than 128 bytes";
        check_bound(&format!(r#"{{"{long}": 0"#), Some(&format!("body: {problem}")));
        check_bound(&format!(r#"{{"list": [{{"{long}": 0"#), Some(&format!("list[0]: {problem}")));
    }

    #[test]
    fn the_memory_of_values_is_taken_from_the_budget() {
        let lists = vec!["[]"; 100_000].join(",");
        let room_of = |_: &str| Room { max_items: 100_000, max_values: 100_000, ..Room::SMALL };
        let json = format!(r#"{{"messages": [{lists}]}}"#);
        let mut held = BodyMemory::new(16 << 20).hold(ClientId(0));
        Value::of_body(json.as_bytes(), &room_of, &mut held).expect("fits");
        assert!(held.bytes() > 100_000 * size_of::<Value>());
        let error = Value::of_body(json.as_bytes(), &room_of, &mut BodyMemory::new(1 << 20).hold(ClientId(0)));
        assert_eq!(error.expect_err("does not fit").into_response().status(), 503);
    }
}
