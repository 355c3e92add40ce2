//! What minijinja compares, adds and turns into text without paying for it.
//!
//! Owns: the filters and tests of minijinja whose arguments have to be weighed first, and dictionaries, whose keys have to be.
//! What they compute is minijinja's.

use minijinja::value::{Kwargs, Rest, Value};
use minijinja::{Environment, State, filters, tests};

use super::budget::{self, charge_items};
use super::filters::is_test;
use super::python::{self, Args, Given, fail, methods, to_str};
use super::sequences::attribute_of;
use super::weight::weigh;

type Result<T, E = minijinja::Error> = std::result::Result<T, E>;

/// A dictionary of keys and values in turn.
pub(super) fn dictionary(Rest(given): Rest<Value>) -> Result<Value> {
    let mut entries = Vec::with_capacity(given.len() / 2);
    for entry in given.chunks_exact(2) {
        weigh(&entry[0])?;
        entries.push((entry[0].clone(), entry[1].clone()));
    }
    Ok(Value::from_pairs(entries))
}

type Comparison = fn(&Value, &Value) -> bool;

/// Tests that compare, under all their names.
const COMPARISONS: &[(&[&str], Comparison)] = &[
    (&["eq", "==", "equalto"], tests::is_eq),
    (&["ne", "!="], tests::is_ne),
    (&["lt", "<", "lessthan"], tests::is_lt),
    (&["le", "<="], tests::is_le),
    (&["gt", ">", "greaterthan"], tests::is_gt),
    (&["ge", ">="], tests::is_ge),
];

/// Makes the filters and tests known.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    for (names, compare) in COMPARISONS {
        for name in *names {
            environment.add_test(*name, move |left: &Value, right: &Value| -> Result<bool> {
                weigh(left)?;
                weigh(right)?;
                Ok(compare(left, right))
            });
        }
    }
    environment.add_test("in", |state: &State, value: &Value, container: &Value| -> Result<bool> {
        weigh(value)?;
        weigh(container)?;
        tests::is_in(state, value, container)
    });
    environment.add_filter("attr", |value: &Value, key: &Value| -> Result<Value> {
        weigh(key)?;
        filters::attr(value, key)
    });
    environment.add_filter("safe", |value: &Value| -> Result<Value> {
        let text = to_str(value);
        budget::check()?;
        Ok(Value::from_safe_string(text))
    });
    environment.add_filter("sum", sum);
    environment.add_filter("select", |state: &mut State, value: Value, Rest(given): Given| {
        let (test, arguments) = tested(given)?;
        filters::select(state, value, test.map(Into::into), arguments)
    });
    environment.add_filter("reject", |state: &mut State, value: Value, Rest(given): Given| {
        let (test, arguments) = tested(given)?;
        filters::reject(state, value, test.map(Into::into), arguments)
    });
    environment.add_filter("selectattr", |state: &mut State, value: Value, attribute: &Value, Rest(given): Given| {
        let (test, arguments) = tested(given)?;
        filters::selectattr(state, value, attribute_name(attribute)?.into(), test.map(Into::into), arguments)
    });
    environment.add_filter("rejectattr", |state: &mut State, value: Value, attribute: &Value, Rest(given): Given| {
        let (test, arguments) = tested(given)?;
        filters::rejectattr(state, value, attribute_name(attribute)?.into(), test.map(Into::into), arguments)
    });
}

fn attribute_name(attribute: &Value) -> Result<String> {
    let name = to_str(attribute);
    budget::check()?;
    Ok(name)
}

/// The name of a test, of those that templates may use, and its arguments.
fn tested(mut given: Vec<minijinja::value::ValueOrKwargs>) -> Result<(Option<String>, Given)> {
    if given.is_empty() {
        return Ok((None, Rest(given)));
    }
    let name = given.remove(0).into_value();
    match name.as_str() {
        None if name.is_none() || name.is_undefined() => Ok((None, Rest(given))),
        Some(name) if is_test(name) => Ok((Some(name.to_owned()), Rest(given))),
        _ => Err(minijinja::Error::new(minijinja::ErrorKind::UnknownTest, "no test of this name")),
    }
}

/// As minijinja's. Sums of lists and tuples are paid for: each is longer than the last.
fn sum(state: &State, value: Value, given: Given) -> Result<Value> {
    let args =
        Args::bind("sum", &["iterable", "attribute", "start"], &[&[value][..], &python::values(given)].concat())?;
    let mut items = methods::items(args.required(0)?)?;
    if let Some(attribute) = args.some(1) {
        for item in &mut items {
            *item = attribute_of(item, attribute)?;
        }
    }
    let start = args.some(2).cloned();
    let mut len = start.as_ref().and_then(Value::len).unwrap_or(0);
    for item in items.iter().filter(|item| item.as_object().is_some()) {
        len += item.len().ok_or_else(|| fail("sum: a list without a length"))?;
        charge_items(len)?;
    }
    filters::sum(state, Value::from(items), None, start, Kwargs::from_iter::<[(&str, Value); 0]>([]))
}
