//! The functions that templates find: Jinja2's own and those of transformers.

use std::sync::Arc;

use minijinja::value::{Kwargs, Object, ObjectRepr, Value, from_args};
use minijinja::{Environment, Error, ErrorKind, State};

use super::budget;
use super::kept;
use super::objects::{Cycler, Joiner};
use super::python::text::views;
use super::python::{self, Args, Given, fail, strftime, to_str};

/// Longest `range`, as in Jinja2's sandbox.
const MAX_RANGE: i64 = 100_000;

/// Longest text of `raise_exception` that a client is told; what is longer is cut.
const MAX_RAISED_BYTES: usize = 1000;

/// What a template said with `raise_exception`.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// The words of `raise_exception`, if it is what ended the rendering.
pub(super) fn raised(error: &Error) -> Option<&str> {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(Raised(words)) = cause.downcast_ref() {
            return Some(words);
        }
        source = cause.source();
    }
    None
}

/// Makes the functions known, and no others.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.remove_global("debug");
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_function("range", range);
    environment.add_function("cycler", cycler);
    environment.add_function("joiner", joiner);
    environment.add_global("dict", Value::from_object(Dict));
    // minijinja's namespaces can be assigned to; Jinja2's take the arguments of `dict`.
    let made = environment.globals().find(|(name, _)| *name == "namespace").map(|(_, function)| function);
    let made = made.expect("minijinja has namespaces: this is a bug");
    environment.add_function("namespace", move |state: &mut State, given: Given| {
        let mut entries = entries(&python::values(given))?;
        for (_, value) in &mut entries {
            *value = kept::by_changeable(value)?;
        }
        made.call(state, &[Value::from_pairs(entries)])
    });
}

fn raise_exception(words: &Value) -> Result<Value, Error> {
    let mut words = to_str(words);
    budget::check()?;
    words.truncate(words.floor_char_boundary(MAX_RAISED_BYTES));
    Err(fail("raised by the template").with_source(Raised(words)))
}

/// The time now in the machine's zone, in a format of `strftime`.
fn strftime_now(format: &str) -> Result<String, Error> {
    let now = jiff::Zoned::now();
    strftime::strftime(format, now.datetime(), Some(now.timestamp().as_second()))
}

fn range(given: Given) -> Result<Value, Error> {
    let given = python::values(given);
    let args = Args::bind("range", &["start", "stop", "step"], &given)?;
    let first = args.integer(0, 0)?;
    args.required(0)?;
    let (start, stop) = if given.len() == 1 { (0, first) } else { (first, args.integer(1, 0)?) };
    let step = args.integer(2, 1)?;
    if step == 0 {
        return Err(fail("range() arg 3 must not be zero"));
    }
    let distance = if step > 0 { stop.saturating_sub(start) } else { start.saturating_sub(stop) };
    let len = distance.max(0).unsigned_abs().div_ceil(step.unsigned_abs());
    if len > MAX_RANGE.unsigned_abs() {
        return Err(fail(format!("Range too big. The sandbox blocks ranges larger than MAX_RANGE ({MAX_RANGE}).")));
    }
    Ok(views::Range::value(start, stop, step, len as usize))
}

/// `dict`, which makes dictionaries and can be asked for `fromkeys`.
#[derive(Debug)]
struct Dict;

impl Object for Dict {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, _: &mut State<'_, '_>, given: &[Value]) -> Result<Value, Error> {
        entries(given).map(Value::from_pairs)
    }

    fn call_method(self: &Arc<Self>, _: &mut State<'_, '_>, method: &str, given: &[Value]) -> Result<Value, Error> {
        if method != "fromkeys" {
            return Err(Error::from(ErrorKind::UnknownMethod));
        }
        let args = Args::bind("fromkeys", &["iterable", "value"], given)?;
        let value = args.get(1).cloned().unwrap_or_else(|| Value::from(()));
        let keys = python::methods::items(args.required(0)?)?;
        Ok(Value::from_pairs(keys.into_iter().map(|key| (key, value.clone()))))
    }
}

/// Entries from one dictionary or list of pairs, and from keyword arguments.
fn entries(given: &[Value]) -> Result<Vec<(Value, Value)>, Error> {
    let (positional, keywords): (&[Value], Kwargs) = from_args(given)?;
    let mut entries = match positional {
        [] => Vec::new(),
        [map] if map.kind() == minijinja::value::ValueKind::Map => python::methods::pairs(map)?,
        [pairs] => {
            let pair = |pair: Value| Ok((pair.get_item_by_index(0)?, pair.get_item_by_index(1)?));
            python::methods::items(pairs)?.into_iter().map(pair).collect::<Result<_, Error>>()?
        }
        _ => return Err(fail("dict expected at most 1 argument")),
    };
    for name in keywords.args() {
        entries.push((Value::from(name), keywords.get(name)?));
    }
    Ok(entries)
}

fn cycler(given: Given) -> Result<Value, Error> {
    let items = python::values(given);
    if items.is_empty() {
        return Err(fail("at least one item has to be provided"));
    }
    let items = items.iter().map(kept::by_variable).collect::<Result<_, Error>>()?;
    Ok(Cycler::value(items))
}

fn joiner(given: Given) -> Result<Value, Error> {
    let args = Args::bind("joiner", &["sep"], &python::values(given))?;
    let separator = args.get(0).map_or_else(|| Ok(Value::from(", ")), kept::by_variable)?;
    Ok(Joiner::value(separator))
}
