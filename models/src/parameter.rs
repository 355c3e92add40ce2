//! Parameters of requests, each declared once: name, kind, bounds, what it is for, and one sentence of documentation.
//!
//! Owns: what a declaration says, the values that clients give, and the check of a value against its declaration. The
//! JSON body, the form, the command-line flag, the echo, the documentation and the OpenAPI schema are all made from
//! declarations. Does not know: which parameters there are (each stands with its capability), what models allow, HTTP.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Arc;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use self::value::{Biases, FlagOrAuto, Seconds, Strings, seed};
pub use self::value::{ParameterType, Value};
use crate::error::{Error, Result};
use crate::frame::{Frame, Mask};
use crate::lora::LoraOption;

mod value;

/// What a client asks for with a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// The next message of a conversation.
    Chat,
    /// The continuation of a text.
    Completion,
    /// The answer to a list of items: messages, calls of tools, results.
    Response,
    /// An image from text.
    ImageGeneration,
    /// An image from an image.
    ImageEdit,
    /// A video.
    Video,
}

/// Text.
pub const TEXT: &[Task] = &[Task::Chat, Task::Completion, Task::Response];
/// Images, from text or from an image.
pub const IMAGES: &[Task] = &[Task::ImageGeneration, Task::ImageEdit];
/// Images from an image.
pub const EDITS: &[Task] = &[Task::ImageEdit];
/// Videos.
pub const VIDEOS: &[Task] = &[Task::Video];
/// Images and videos.
pub const IMAGES_AND_VIDEOS: &[Task] = &[Task::ImageGeneration, Task::ImageEdit, Task::Video];

/// What values a parameter takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Text of at most so many bytes.
    Text {
        /// Inclusive.
        max_bytes: usize,
    },
    /// `true` or `false`.
    Flag,
    /// `true`, `false`, or `"auto"`, which is as good as absent.
    FlagOrAuto,
    /// A whole number. Models may narrow the bounds.
    Integer {
        /// Inclusive.
        min: u64,
        /// Inclusive.
        max: u64,
    },
    /// A whole number of 64 bits. A negative one stands for the same bits without a sign, as in `torch.manual_seed`.
    Seed,
    /// A number. Models may narrow the bounds.
    Number {
        /// Inclusive.
        min: f64,
        /// Inclusive.
        max: f64,
    },
    /// A number, as [`Kind::Number`] but for `min` itself.
    NumberAbove {
        /// Exclusive.
        min: f64,
        /// Inclusive.
        max: f64,
    },
    /// A time above 0 in seconds, which clients also send as text.
    Seconds,
    /// `[start, end]` with `0 <= start < end <= 1`.
    Interval,
    /// A list of at least one and at most so many numbers, each within the bounds. Models may narrow them.
    Numbers {
        /// Inclusive.
        max_len: usize,
        /// Inclusive.
        min: f64,
        /// Inclusive.
        max: f64,
    },
    /// One of these words.
    Choice(&'static [&'static str]),
    /// One of these names; which of them a request may use is the model's affair.
    Name(&'static [&'static str]),
    /// A string, or a list of at most so many, none of them empty.
    Strings {
        /// Inclusive.
        max: usize,
        /// Of each, inclusive.
        max_bytes: usize,
        /// Of all together, inclusive.
        max_total_bytes: usize,
    },
    /// A list of at most so many token ids.
    Tokens {
        /// Inclusive.
        max: usize,
    },
    /// An object of at most so many numbers by token id.
    Biases {
        /// Inclusive.
        max_len: usize,
        /// Of the numbers, inclusive.
        min: f64,
        /// Inclusive.
        max: f64,
    },
    /// A list of LoRA files by name, each with a weight.
    Loras,
    /// An image file.
    Image,
    /// At most so many image files.
    Images {
        /// Inclusive.
        max: usize,
    },
    /// An image file that says where another image is made anew.
    Mask,
}

/// All that is said of one parameter.
#[derive(Debug, PartialEq)]
pub struct Declaration {
    /// As in JSON bodies, forms and answers.
    pub name: &'static str,
    /// One sentence, for the documentation, the OpenAPI schema and the command line's help.
    pub doc: &'static str,
    /// What values it takes.
    pub kind: Kind,
    /// What it is for.
    pub tasks: &'static [Task],
    /// Whether a request has to have it.
    pub is_required: bool,
    /// Whether every model checks it against narrower bounds of its own, which then are the ones to name.
    is_narrowed: bool,
    /// The command-line flag, where that is not the name with dashes.
    flag: Option<&'static str>,
}

impl Declaration {
    /// The command-line flag, without the two dashes before it.
    pub fn flag(&self) -> String {
        self.flag.map_or_else(|| self.name.replace('_', "-"), str::to_owned)
    }

    /// Whether requests for `task` may have it.
    pub fn is_for(&self, task: Task) -> bool {
        self.tasks.contains(&task)
    }

    /// Reads a value from JSON, or from what spells it as JSON does; `None` where it is as good as absent. Images are
    /// for the caller to read.
    pub fn read<'de, D: Deserializer<'de>>(&self, deserializer: D) -> std::result::Result<Option<Value>, D::Error> {
        Ok(Some(match self.kind {
            Kind::Text { .. } | Kind::Choice(_) | Kind::Name(_) => Value::Text(String::deserialize(deserializer)?),
            Kind::Flag => Value::Flag(bool::deserialize(deserializer)?),
            Kind::FlagOrAuto => return deserializer.deserialize_any(FlagOrAuto),
            Kind::Integer { .. } => Value::Integer(u64::deserialize(deserializer)?),
            Kind::Seed => Value::Integer(seed(i128::deserialize(deserializer)?)),
            Kind::Number { .. } | Kind::NumberAbove { .. } => Value::Number(f64::deserialize(deserializer)?),
            Kind::Seconds => Value::Number(deserializer.deserialize_any(Seconds)?),
            Kind::Interval => Value::Interval(<[f64; 2]>::deserialize(deserializer)?),
            Kind::Numbers { .. } => Value::Numbers(Vec::deserialize(deserializer)?),
            Kind::Strings { .. } => Value::Strings(deserializer.deserialize_any(Strings)?),
            Kind::Tokens { .. } => Value::Tokens(Vec::deserialize(deserializer)?),
            Kind::Biases { .. } => Value::Biases(deserializer.deserialize_map(Biases)?),
            Kind::Loras => Value::Loras(Vec::deserialize(deserializer)?),
            Kind::Image | Kind::Images { .. } | Kind::Mask => return Err(D::Error::custom("is an image")),
        }))
    }

    /// Refuses a value that no model takes, with the allowed ones.
    pub fn check(&self, value: &Value) -> Result<()> {
        let refuse = |problem: String| Err(Error::invalid(self.name, problem));
        match (self.kind, value) {
            _ if self.is_narrowed => Ok(()),
            (Kind::Text { max_bytes }, Value::Text(text)) if text.len() > max_bytes => {
                refuse(format!("has {} bytes; at most {max_bytes}", text.len()))
            }
            (Kind::Integer { min, max }, Value::Integer(value)) if !(min..=max).contains(value) => {
                refuse(format!("is {value}; allowed: {min} to {max}"))
            }
            // `contains` is false for NaN.
            (Kind::Number { min, max }, Value::Number(value)) if !(min..=max).contains(value) => {
                refuse(format!("{}; allowed: {min} to {max}", is_not_within(*value, min, max)))
            }
            (Kind::NumberAbove { min, max }, Value::Number(value)) if !(*value > min && *value <= max) => {
                refuse(format!("{}; allowed: above {min}, at most {max}", is_not_within(*value, min, max)))
            }
            (Kind::Seconds, Value::Number(seconds)) if !(seconds.is_finite() && *seconds > 0.0) => {
                refuse("must be more than 0".to_owned())
            }
            (Kind::Interval, Value::Interval([start, end])) if !(*start >= 0.0 && start < end && *end <= 1.0) => {
                refuse(format!("is [{start}, {end}]; allowed: [start, end] with 0 <= start < end <= 1"))
            }
            (Kind::Numbers { max_len, .. }, Value::Numbers(numbers)) if !(1..=max_len).contains(&numbers.len()) => {
                refuse(format!("has {} numbers; allowed: 1 to {max_len}", numbers.len()))
            }
            (Kind::Numbers { min, max, .. }, Value::Numbers(numbers)) => {
                match numbers.iter().position(|number| !(min..=max).contains(number)) {
                    Some(at) => {
                        let problem = is_not_within(numbers[at], min, max);
                        Err(Error::invalid(
                            format!("{}[{at}]", self.name),
                            format!("{problem}; allowed: {min} to {max}"),
                        ))
                    }
                    None => Ok(()),
                }
            }
            (Kind::Choice(words), Value::Text(word)) if !words.contains(&word.as_str()) => {
                refuse(format!("is not known; allowed: {}", words.join(", ")))
            }
            (Kind::Strings { max, .. }, Value::Strings(strings))
                if strings.len() > max || strings.iter().any(String::is_empty) =>
            {
                refuse(format!("takes at most {max} strings, none empty"))
            }
            (Kind::Strings { max_bytes, .. }, Value::Strings(strings))
                if strings.iter().any(|string| string.len() > max_bytes) =>
            {
                refuse(format!("takes strings of at most {max_bytes} bytes"))
            }
            (Kind::Strings { max_total_bytes, .. }, Value::Strings(strings))
                if strings.iter().map(String::len).sum::<usize>() > max_total_bytes =>
            {
                refuse(format!("takes strings of at most {max_total_bytes} bytes in all"))
            }
            (Kind::Tokens { max }, Value::Tokens(tokens)) if tokens.len() > max => {
                refuse(format!("has {} tokens; at most {max}", tokens.len()))
            }
            (Kind::Biases { max_len, .. }, Value::Biases(biases)) if biases.len() > max_len => {
                refuse(format!("has {} tokens; at most {max_len}", biases.len()))
            }
            (Kind::Biases { min, max, .. }, Value::Biases(biases)) => {
                match biases.iter().find(|(_, bias)| !(min..=max).contains(bias)) {
                    Some((token, bias)) => {
                        let problem = format!("{}; allowed: {min} to {max}", is_not_within(*bias, min, max));
                        Err(Error::invalid(format!("{}.{token}", self.name), problem))
                    }
                    None => Ok(()),
                }
            }
            (Kind::Images { max }, Value::Images(images)) if images.len() > max => {
                refuse(format!("are {}; allowed: 1 to {max}", images.len()))
            }
            _ => Ok(()),
        }
    }
}

/// What a number is that is none of the allowed ones: itself, or in words of the bounds where its digits would fill lines.
fn is_not_within(value: f64, min: f64, max: f64) -> String {
    let is_short = value == 0.0 || value.is_nan() || (1e-6..1e9).contains(&value.abs());
    match value > max {
        _ if is_short => format!("is {value}"),
        true => format!("is above {max}"),
        false => format!("is below {min}"),
    }
}

/// A declaration, and the type in which its capability has its values.
pub struct Parameter<T> {
    /// What is said of it.
    pub declaration: Declaration,
    values: PhantomData<fn() -> T>,
}

impl<T> Parameter<T> {
    const fn new(name: &'static str, kind: Kind, doc: &'static str) -> Self {
        let declaration = Declaration {
            name,
            doc,
            kind,
            tasks: IMAGES_AND_VIDEOS,
            is_required: false,
            is_narrowed: false,
            flag: None,
        };
        Self { declaration, values: PhantomData }
    }

    /// For these tasks alone.
    pub const fn only_for(mut self, tasks: &'static [Task]) -> Self {
        self.declaration.tasks = tasks;
        self
    }

    /// A request has to have it.
    pub const fn required(mut self) -> Self {
        self.declaration.is_required = true;
        self
    }

    /// Every model has narrower bounds, which its own check names.
    pub const fn narrowed_by_models(mut self) -> Self {
        self.declaration.is_narrowed = true;
        self
    }

    /// With this command-line flag.
    pub const fn flag(mut self, flag: &'static str) -> Self {
        self.declaration.flag = Some(flag);
        self
    }
}

impl<T: ParameterType> Parameter<T> {
    /// One of `words`; `T` is made from a word.
    pub const fn choice(name: &'static str, words: &'static [&'static str], doc: &'static str) -> Self {
        Self::new(name, Kind::Choice(words), doc)
    }
}

impl Parameter<String> {
    /// Text of at most `max_bytes`.
    pub const fn text(name: &'static str, max_bytes: usize, doc: &'static str) -> Self {
        Self::new(name, Kind::Text { max_bytes }, doc)
    }

    /// One of `names`, of which a model may know fewer.
    pub const fn name(name: &'static str, names: &'static [&'static str], doc: &'static str) -> Self {
        Self::new(name, Kind::Name(names), doc)
    }
}

impl Parameter<bool> {
    /// `true` or `false`.
    pub const fn boolean(name: &'static str, doc: &'static str) -> Self {
        Self::new(name, Kind::Flag, doc)
    }

    /// `true`, `false`, or `"auto"`, which is as good as absent.
    pub const fn flag_or_auto(name: &'static str, doc: &'static str) -> Self {
        Self::new(name, Kind::FlagOrAuto, doc)
    }
}

impl Parameter<usize> {
    /// A whole number of `min` or more.
    pub const fn at_least(name: &'static str, min: usize, doc: &'static str) -> Self {
        Self::new(name, Kind::Integer { min: min as u64, max: u64::MAX }, doc)
    }

    /// A whole number from `min` to `max`.
    pub const fn integer(name: &'static str, min: usize, max: usize, doc: &'static str) -> Self {
        Self::new(name, Kind::Integer { min: min as u64, max: max as u64 }, doc)
    }
}

impl Parameter<u64> {
    /// Any whole number of 64 bits.
    pub const fn seed(name: &'static str, doc: &'static str) -> Self {
        Self::new(name, Kind::Seed, doc)
    }
}

impl Parameter<f64> {
    /// A number from `min` to `max`.
    pub const fn number(name: &'static str, min: f64, max: f64, doc: &'static str) -> Self {
        Self::new(name, Kind::Number { min, max }, doc)
    }

    /// A time in seconds.
    pub const fn seconds(name: &'static str, doc: &'static str) -> Self {
        Self::new(name, Kind::Seconds, doc)
    }
}

impl Parameter<f32> {
    /// A number from `min` to `max`, computed with in 32 bits.
    pub const fn number_f32(name: &'static str, min: f64, max: f64, doc: &'static str) -> Self {
        Self::new(name, Kind::Number { min, max }, doc)
    }

    /// A number above `min`, at most `max`.
    pub const fn number_above(name: &'static str, min: f64, max: f64, doc: &'static str) -> Self {
        Self::new(name, Kind::NumberAbove { min, max }, doc)
    }
}

impl Parameter<Vec<String>> {
    /// At most `max` strings, none of them empty, each of at most `max_bytes` and all of at most `max_total_bytes`.
    pub const fn strings(
        name: &'static str,
        max: usize,
        max_bytes: usize,
        max_total_bytes: usize,
        doc: &'static str,
    ) -> Self {
        Self::new(name, Kind::Strings { max, max_bytes, max_total_bytes }, doc)
    }
}

impl Parameter<[f64; 2]> {
    /// A part of the steps.
    pub const fn interval(name: &'static str, doc: &'static str) -> Self {
        Self::new(name, Kind::Interval, doc)
    }
}

impl Parameter<Vec<f64>> {
    /// A list of 1 to `max_len` numbers from `min` to `max`.
    pub const fn numbers(name: &'static str, max_len: usize, min: f64, max: f64, doc: &'static str) -> Self {
        Self::new(name, Kind::Numbers { max_len, min, max }, doc)
    }
}

impl Parameter<Vec<u32>> {
    /// A list of at most `max` token ids.
    pub const fn tokens(name: &'static str, max: usize, doc: &'static str) -> Self {
        Self::new(name, Kind::Tokens { max }, doc)
    }
}

impl Parameter<Vec<(u32, f64)>> {
    /// At most `max_len` numbers from `min` to `max` by token id.
    pub const fn biases(name: &'static str, max_len: usize, min: f64, max: f64, doc: &'static str) -> Self {
        Self::new(name, Kind::Biases { max_len, min, max }, doc)
    }
}

impl Parameter<Vec<LoraOption>> {
    /// LoRA files by name.
    pub const fn loras(name: &'static str, doc: &'static str) -> Self {
        Self::new(name, Kind::Loras, doc)
    }
}

impl Parameter<Arc<Frame>> {
    /// An image.
    pub const fn image(name: &'static str, doc: &'static str) -> Self {
        Self::new(name, Kind::Image, doc)
    }
}

impl Parameter<Vec<Arc<Frame>>> {
    /// At most `max` images.
    pub const fn images(name: &'static str, max: usize, doc: &'static str) -> Self {
        Self::new(name, Kind::Images { max }, doc)
    }
}

impl Parameter<Arc<Mask>> {
    /// A mask.
    pub const fn mask(name: &'static str, doc: &'static str) -> Self {
        Self::new(name, Kind::Mask, doc)
    }
}

/// What a client said: values by parameter. Absent ones take the model's defaults.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options(BTreeMap<&'static str, Value>);

impl Options {
    /// The value of a parameter, if the client gave one.
    pub fn get<T: ParameterType>(&self, parameter: &Parameter<T>) -> Option<T> {
        let value = self.0.get(parameter.declaration.name)?;
        Some(T::from_value(value).expect("a value is set in the type of its parameter: this is a bug"))
    }

    /// Whether the client gave a value.
    pub fn has<T>(&self, parameter: &Parameter<T>) -> bool {
        self.0.contains_key(parameter.declaration.name)
    }

    /// The value of a declared parameter, whatever its type.
    pub fn value(&self, declaration: &Declaration) -> Option<&Value> {
        self.0.get(declaration.name)
    }

    /// Sets a value, or none.
    pub fn set<T: ParameterType>(&mut self, parameter: &Parameter<T>, value: impl Into<Option<T>>) {
        match value.into() {
            Some(value) => self.0.insert(parameter.declaration.name, value.into_value()),
            None => self.0.remove(parameter.declaration.name),
        };
    }

    /// The same options with another value, or without one.
    pub fn with<T: ParameterType>(mut self, parameter: &Parameter<T>, value: impl Into<Option<T>>) -> Self {
        self.set(parameter, value);
        self
    }

    /// Sets the value of a declared parameter, which must be of its kind.
    pub fn insert(&mut self, declaration: &'static Declaration, value: Value) {
        self.0.insert(declaration.name, value);
    }

    /// Forgets the value of a declared parameter.
    pub fn remove(&mut self, declaration: &Declaration) {
        self.0.remove(declaration.name);
    }

    /// These options, and those of `defaults` where these have none.
    pub fn or(mut self, defaults: Self) -> Self {
        for (name, value) in defaults.0 {
            self.0.entry(name).or_insert(value);
        }
        self
    }

    /// Refuses what no model takes: values out of the bounds of their declarations.
    pub fn check<'a>(&self, declarations: impl IntoIterator<Item = &'a Declaration>) -> Result<()> {
        for declaration in declarations {
            if let Some(value) = self.0.get(declaration.name) {
                declaration.check(value)?;
            }
        }
        Ok(())
    }

    /// The values as a JSON object, in the order of `declarations`.
    pub fn to_json<'a>(
        &self,
        declarations: impl IntoIterator<Item = &'a Declaration>,
    ) -> serde_json::Map<String, serde_json::Value> {
        let value = |declaration: &Declaration| self.0.get(declaration.name)?.to_json();
        let fields = declarations.into_iter().filter_map(|of| Some((of.name.to_owned(), value(of)?)));
        fields.collect()
    }
}

/// Refuses a value out of bounds, NaN too, with the bounds.
pub(crate) fn check_range<T: PartialOrd + std::fmt::Display + Copy>(
    field: &str,
    value: T,
    min: T,
    max: T,
) -> Result<()> {
    if value >= min && value <= max {
        return Ok(());
    }
    Err(Error::invalid(field, format!("is {value}; allowed: {min} to {max}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: Parameter<usize> = Parameter::integer("steps", 1, 1000, "Steps.");
    const SCALE: Parameter<f64> = Parameter::number("scale", 0.0, 100.0, "Scale.").only_for(IMAGES);
    const PART: Parameter<[f64; 2]> = Parameter::interval("a_part", "A part.");
    const PENALTY: Parameter<f32> = Parameter::number_above("penalty", 0.0, 2.0, "A penalty.");
    const LEVELS: Parameter<Vec<f64>> = Parameter::numbers("levels", 3, 0.0, 1.0, "Levels.");
    const STOP: Parameter<Vec<String>> = Parameter::strings("stop", 2, 4, 6, "Ends.");
    const NOTE: Parameter<String> = Parameter::text("note", 3, "A note.").flag("remark");

    #[track_caller]
    fn check<T: ParameterType>(parameter: &Parameter<T>, value: T, problem: Option<&str>) {
        let found = parameter.declaration.check(&value.into_value()).err().map(|error| error.to_string());
        assert_eq!(found.as_deref(), problem);
    }

    #[test]
    fn values_out_of_bounds_are_refused_with_the_bounds() {
        check(&STEPS, 1, None);
        check(&STEPS, 1000, None);
        check(&STEPS, 0, Some("steps: is 0; allowed: 1 to 1000"));
        check(&STEPS, 1001, Some("steps: is 1001; allowed: 1 to 1000"));
        check(&SCALE, 100.0, None);
        check(&SCALE, -0.5, Some("scale: is -0.5; allowed: 0 to 100"));
        check(&SCALE, f64::NAN, Some("scale: is NaN; allowed: 0 to 100"));
        check(&SCALE, 1e300, Some("scale: is above 100; allowed: 0 to 100"));
        check(&SCALE, f64::NEG_INFINITY, Some("scale: is below 0; allowed: 0 to 100"));
        check(&SCALE, -1e-300, Some("scale: is below 0; allowed: 0 to 100"));
        check(&PART, [0.0, 1.0], None);
        check(&PART, [0.5, 0.5], Some("a_part: is [0.5, 0.5]; allowed: [start, end] with 0 <= start < end <= 1"));
        check(&PENALTY, 2.0, None);
        check(&PENALTY, 0.0, Some("penalty: is 0; allowed: above 0, at most 2"));
        check(&PENALTY, 2.5, Some("penalty: is 2.5; allowed: above 0, at most 2"));
        check(&PENALTY, f32::INFINITY, Some("penalty: is above 2; allowed: above 0, at most 2"));
        check(&LEVELS, vec![1.0, 0.5, 0.0], None);
        check(&LEVELS, vec![], Some("levels: has 0 numbers; allowed: 1 to 3"));
        check(&LEVELS, vec![0.5; 4], Some("levels: has 4 numbers; allowed: 1 to 3"));
        check(&LEVELS, vec![1.0, 1.5], Some("levels[1]: is 1.5; allowed: 0 to 1"));
        check(&LEVELS, vec![f64::NAN], Some("levels[0]: is NaN; allowed: 0 to 1"));
        check(&STOP, vec!["a".to_owned(); 2], None);
        check(&STOP, vec!["a".to_owned(); 3], Some("stop: takes at most 2 strings, none empty"));
        check(&STOP, vec![String::new()], Some("stop: takes at most 2 strings, none empty"));
        check(&STOP, vec!["abcd".to_owned(), "ab".to_owned()], None);
        check(&STOP, vec!["abcde".to_owned()], Some("stop: takes strings of at most 4 bytes"));
        check(&STOP, vec!["abcd".to_owned(); 2], Some("stop: takes strings of at most 6 bytes in all"));
        check(&NOTE, "abc".into(), None);
        check(&NOTE, "abcd".into(), Some("note: has 4 bytes; at most 3"));
    }

    #[test]
    fn options_hold_what_was_set_and_become_json_in_the_order_of_the_declarations() {
        let options = Options::default().with(&SCALE, 2.5).with(&STEPS, 7);
        assert_eq!((options.get(&STEPS), options.get(&SCALE), options.get(&NOTE)), (Some(7), Some(2.5), None));
        let declarations = [&STEPS.declaration, &SCALE.declaration, &NOTE.declaration];
        let json = serde_json::Value::from(options.to_json(declarations)).to_string();
        assert_eq!(json, r#"{"steps":7,"scale":2.5}"#);
        let defaults = Options::default().with(&STEPS, 1).with(&NOTE, "x".to_owned());
        let merged = options.clone().or(defaults);
        assert_eq!((merged.get(&STEPS), merged.get(&NOTE)), (Some(7), Some("x".to_owned())));
        assert!(!options.with(&STEPS, None).has(&STEPS));
    }

    #[test]
    fn a_flag_is_the_name_with_dashes_unless_it_is_said() {
        assert_eq!((PART.declaration.flag(), NOTE.declaration.flag()), ("a-part".into(), "remark".into()));
    }
}
