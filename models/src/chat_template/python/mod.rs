//! What Python does with the values of a template, where minijinja does something else.
//!
//! Owns: how values print, what their methods do, `%` and `~`, formats, JSON. Deliberately does not know: templates,
//! filters, messages. Held against Python by `tests/goldens/templates`.

use minijinja::value::{Kwargs, Rest, Value, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Error, ErrorKind};

pub(super) mod format;
pub(super) mod json;
pub(super) mod methods;
pub(super) mod strftime;
pub(super) mod strings;
pub(super) mod text;

pub(super) use text::{repr, to_str};

type Result<T, E = Error> = std::result::Result<T, E>;

/// An error as Python would raise it.
pub(super) fn fail(words: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, words.into())
}

/// What minijinja hands to a function that takes any arguments.
pub(super) type Given = Rest<ValueOrKwargs>;

/// The values of all arguments; keyword arguments are the last.
pub(super) fn values(Rest(given): Given) -> Vec<Value> {
    given.into_iter().map(ValueOrKwargs::into_value).collect()
}

/// The arguments of one call, in the order of the callee's parameters.
pub(super) struct Args {
    callee: &'static str,
    parameters: &'static [&'static str],
    values: Vec<Option<Value>>,
}

impl Args {
    /// Positional and keyword arguments, bound as Python binds them.
    pub(super) fn bind(callee: &'static str, parameters: &'static [&'static str], given: &[Value]) -> Result<Self> {
        let (positional, keywords): (&[Value], Kwargs) = from_args(given)?;
        if positional.len() > parameters.len() {
            let (most, count) = (parameters.len(), positional.len());
            return Err(fail(format!("{callee}() takes at most {most} arguments ({count} given)")));
        }
        let mut values: Vec<Option<Value>> = positional.iter().cloned().map(Some).collect();
        values.resize(parameters.len(), None);
        for name in keywords.args() {
            let place = parameters.iter().position(|parameter| *parameter == name);
            let Some(value) = place.map(|place| &mut values[place]).filter(|value| value.is_none()) else {
                return Err(fail(format!("{callee}() got an unexpected or repeated argument '{name}'")));
            };
            *value = Some(keywords.get(name)?);
        }
        Ok(Self { callee, parameters, values })
    }

    /// The argument, unless it is absent.
    pub(super) fn get(&self, place: usize) -> Option<&Value> {
        self.values[place].as_ref()
    }

    /// The argument, unless it is absent or none.
    pub(super) fn some(&self, place: usize) -> Option<&Value> {
        self.get(place).filter(|value| !value.is_none())
    }

    pub(super) fn required(&self, place: usize) -> Result<&Value> {
        let missing = || fail(format!("{}() misses its argument '{}'", self.callee, self.parameters[place]));
        self.get(place).ok_or_else(missing)
    }

    pub(super) fn text(&self, place: usize) -> Result<&str> {
        let value = self.required(place)?;
        value.as_str().ok_or_else(|| self.wrong(place, value, "str"))
    }

    /// The text of an argument that may be absent or none.
    pub(super) fn text_or_none(&self, place: usize) -> Result<Option<&str>> {
        self.some(place).map(|value| value.as_str().ok_or_else(|| self.wrong(place, value, "str"))).transpose()
    }

    /// The integer of an argument that may be absent or none.
    pub(super) fn integer_or_none(&self, place: usize) -> Result<Option<i64>> {
        let integer = |value: &Value| integer(value).and_then(|n| i64::try_from(n).ok());
        self.some(place).map(|value| integer(value).ok_or_else(|| self.wrong(place, value, "int"))).transpose()
    }

    pub(super) fn integer(&self, place: usize, default: i64) -> Result<i64> {
        Ok(self.integer_or_none(place)?.unwrap_or(default))
    }

    /// A count that may be absent: negative ones are 0, absurd ones are refused.
    pub(super) fn width(&self, place: usize, default: usize) -> Result<usize> {
        self.integer_or_none(place)?.map_or(Ok(default), |width| bounded(width.max(0).unsigned_abs()))
    }

    /// Whether the argument is true, or what it is when absent.
    pub(super) fn flag(&self, place: usize, default: bool) -> bool {
        self.get(place).map_or(default, Value::is_true)
    }

    fn wrong(&self, place: usize, value: &Value, expected: &str) -> Error {
        let found = type_name(value);
        fail(format!("{}(): argument '{}' must be {expected}, not {found}", self.callee, self.parameters[place]))
    }
}

/// Widest text that padding may make: a template must not take the memory.
const MAX_WIDTH: u64 = 1 << 20;

/// A width, if it is no absurd one.
pub(super) fn bounded(width: u64) -> Result<usize> {
    if width > MAX_WIDTH {
        return Err(fail(format!("a width of {width} is over {MAX_WIDTH}")));
    }
    Ok(width as usize)
}

/// The integer that a value is; booleans are 0 and 1.
pub(super) fn integer(value: &Value) -> Option<i128> {
    match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        ValueKind::Number if value.is_integer() => i128::try_from(value.clone()).ok(),
        _ => None,
    }
}

/// The float that a number is.
pub(super) fn float(value: &Value) -> Option<f64> {
    match value.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        _ => None,
    }
}

/// Name of a value's type in Python.
pub(super) fn type_name(value: &Value) -> &'static str {
    match value.kind() {
        ValueKind::Undefined => "Undefined",
        ValueKind::None => "NoneType",
        ValueKind::Bool => "bool",
        ValueKind::Number if value.is_integer() => "int",
        ValueKind::Number => "float",
        ValueKind::String => "str",
        ValueKind::Bytes => "bytes",
        ValueKind::Seq if value.is_tuple() => "tuple",
        ValueKind::Seq => "list",
        ValueKind::Map => "dict",
        _ => "object",
    }
}

/// `left % right`: printf formatting after a string, the remainder after a number.
pub(super) fn modulo(left: &Value, right: &Value) -> Result<Value> {
    if let Some(pattern) = left.as_str() {
        return format::percent(pattern, right).map(Value::from);
    }
    let unsupported =
        || fail(format!("unsupported operand type(s) for %: '{}' and '{}'", type_name(left), type_name(right)));
    if let (Some(left), Some(right)) = (integer(left), integer(right)) {
        let remainder = left.checked_rem(right).ok_or_else(|| fail("integer modulo by zero"))?;
        let wraps = remainder != 0 && (remainder < 0) != (right < 0);
        return Ok(Value::from(if wraps { remainder + right } else { remainder }));
    }
    let (left, right) = (float(left).ok_or_else(unsupported)?, float(right).ok_or_else(unsupported)?);
    if right == 0.0 {
        return Err(fail("float modulo by zero"));
    }
    let remainder = left % right;
    let wraps = remainder != 0.0 && (remainder < 0.0) != (right < 0.0);
    Ok(Value::from(if wraps { remainder + right } else { remainder }))
}
