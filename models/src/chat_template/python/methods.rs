//! Methods by name: of lists, tuples, dictionaries, bytes and numbers, and which there are at all.

use minijinja::value::{Tuple, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use super::text::views::View;
use super::{Args, Result, fail, integer, strings};
use crate::chat_template::budget::charge_items;
use crate::chat_template::weight::{charge_result, weigh};

/// A method by name, with its parameters and what it does.
type Method = (&'static str, &'static [&'static str], fn(&Value, &Args) -> Result<Value>);

const SEQUENCE: &[Method] = &[
    ("copy", &[], |list, _| Ok(Value::from(items(list)?))),
    ("count", &["value"], |list, args| {
        let wanted = args.required(0)?;
        Ok(Value::from(items(list)?.iter().filter(|item| *item == wanted).count()))
    }),
    ("index", &["value", "start", "stop"], index),
];

const MAPPING: &[Method] = &[
    ("copy", &[], |map, _| Ok(Value::from_pairs(pairs(map)?))),
    ("get", &["key", "default"], |map, args| {
        let found = map.get_item(args.required(0)?)?;
        let default = || args.get(1).cloned().unwrap_or_else(|| Value::from(()));
        Ok(if found.is_undefined() { default() } else { found })
    }),
    ("items", &[], |map, _| {
        let pair = |(key, value)| Value::from(Tuple::from([key, value]));
        Ok(View::value("dict_items", pairs(map)?.into_iter().map(pair).collect()))
    }),
    ("keys", &[], |map, _| Ok(View::value("dict_keys", items(map)?))),
    ("values", &[], |map, _| Ok(View::value("dict_values", pairs(map)?.into_iter().map(|(_, value)| value).collect()))),
];

const BYTES: &[Method] = &[
    ("decode", &["encoding", "errors"], |bytes, _| {
        let text = std::str::from_utf8(bytes.as_bytes().unwrap_or_default());
        text.map(Value::from).map_err(|error| fail(format!("'utf-8' codec can't decode: {error}")))
    }),
    ("hex", &[], |bytes, _| {
        let bytes = bytes.as_bytes().unwrap_or_default();
        Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into())
    }),
];

const NUMBER: &[Method] = &[
    ("bit_length", &[], |number, _| {
        let whole = integer(number).ok_or_else(|| fail("'float' object has no attribute 'bit_length'"))?;
        Ok(Value::from(i128::BITS - whole.unsigned_abs().leading_zeros()))
    }),
    ("conjugate", &[], |number, _| Ok(number.clone())),
    ("is_integer", &[], |number, _| {
        let is_whole = super::float(number).is_some_and(|number| number.is_finite() && number.fract() == 0.0);
        Ok(Value::from(is_whole))
    }),
];

/// Methods that change what they are called on. transformers' sandbox refuses them, when they are called.
const MUTATORS: &[&str] = &[
    "add",
    "append",
    "clear",
    "discard",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "reverse",
    "setdefault",
    "sort",
    "update",
];

/// Methods of the objects that templates are given: `loop`, cyclers, `dict`.
const OF_OBJECTS: &[&str] = &["changed", "cycle", "fromkeys", "next", "reset"];

/// Whether any value of a template has a method of this name.
pub fn is_known(method: &str) -> bool {
    let of_strings = strings::METHODS.iter().map(|method| method.0).chain(["format", "format_map"]);
    let tables = [SEQUENCE, MAPPING, BYTES, NUMBER];
    let of_values = tables.into_iter().flatten().map(|method| method.0);
    let others = MUTATORS.iter().chain(OF_OBJECTS).copied();
    of_strings.chain(of_values).chain(others).any(|known| known == method)
}

/// Calls a method that the value itself does not have in minijinja.
pub fn call(_: &mut State, value: &Value, method: &str, given: &[Value]) -> Result<Value> {
    given.iter().try_for_each(weigh)?;
    let result = call_found(value, method, given)?;
    charge_result(&result)?;
    Ok(result)
}

fn call_found(value: &Value, method: &str, given: &[Value]) -> Result<Value> {
    let unknown = || Err(Error::from(ErrorKind::UnknownMethod));
    if let Some(text) = value.as_str().filter(|_| value.kind() == ValueKind::String) {
        if let Some(result) = strings::variadic(text, method, given) {
            return result;
        }
        let Some(found) = strings::METHODS.iter().find(|known| known.0 == method) else { return unknown() };
        return found.2(text, &Args::bind(found.0, found.1, given)?);
    }
    let is_container = matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable);
    if is_container && MUTATORS.contains(&method) {
        return Err(fail(format!("access to attribute '{method}' is unsafe: templates must not change values")));
    }
    let table = match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => SEQUENCE,
        ValueKind::Map => MAPPING,
        ValueKind::Bytes => BYTES,
        ValueKind::Number | ValueKind::Bool => NUMBER,
        _ => return unknown(),
    };
    let Some(found) = table.iter().find(|known| known.0 == method) else { return unknown() };
    found.2(value, &Args::bind(found.0, found.1, given)?)
}

/// Entries of a dictionary in its order.
pub fn pairs(map: &Value) -> Result<Vec<(Value, Value)>> {
    let pair = |key: Value| {
        charge_items(2)?;
        Ok((key.clone(), map.get_item(&key)?))
    };
    map.try_iter()?.map(pair).collect()
}

/// Items of a list, or keys of a dictionary. A list that repeats another may have far more than there are values.
pub fn items(list: &Value) -> Result<Vec<Value>> {
    let item = |item: Value| {
        charge_items(1)?;
        Ok(item)
    };
    list.try_iter()?.map(item).collect()
}

fn index(list: &Value, args: &Args) -> Result<Value> {
    let wanted = args.required(0)?;
    let items = items(list)?;
    let place = |index: i64| if index < 0 { index + items.len() as i64 } else { index };
    let (start, stop) = (place(args.integer(1, 0)?), place(args.integer(2, i64::MAX)?));
    let is_there = |(i, item): &(usize, &Value)| (start..stop).contains(&(*i as i64)) && *item == wanted;
    let found = items.iter().enumerate().find(is_there);
    found.map(|(i, _)| Value::from(i)).ok_or_else(|| fail("the value is not in the list"))
}
