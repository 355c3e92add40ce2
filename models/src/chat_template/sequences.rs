//! The filters of Jinja2 that work on sequences and differ in minijinja: what they print, how arguments are given.
//!
//! Source: `jinja2/filters.py`. The work is minijinja's wherever it is the same.

use minijinja::value::{Kwargs, Tuple, Value, from_args};
use minijinja::{Environment, Error, State, filters};

use super::budget::{self, charge, charge_items};
use super::python::{self, Args, Given, fail, to_str};
use super::weight::{charge_result, weigh};

type Result<T, E = Error> = std::result::Result<T, E>;

/// Filters that [`add_to`] adds.
pub(super) const NAMES: &[&str] = &["batch", "format", "groupby", "map", "max", "min", "slice", "sort"];

/// Makes [`NAMES`] known.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.add_filter("batch", |state: &mut State, given: Given| {
        let args = Args::bind("batch", &["value", "linecount", "fill_with"], &python::values(given))?;
        let items = Value::from(python::methods::items(args.required(0)?)?);
        charge_items(args.width(1, 0)?)?;
        filters::batch(state, items, args.width(1, 0)?, args.some(2).cloned())
    });
    environment.add_filter("slice", |state: &mut State, given: Given| {
        let args = Args::bind("slice", &["value", "slices", "fill_with"], &python::values(given))?;
        let items = Value::from(python::methods::items(args.required(0)?)?);
        charge_items(args.width(1, 0)?.saturating_mul(2))?;
        filters::slice(state, items, args.width(1, 0)?, args.some(2).cloned())
    });
    environment.add_filter("sort", |state: &mut State, given: Given| {
        let names = &["value", "reverse", "case_sensitive", "attribute"];
        let args = Args::bind("sort", names, &python::values(given))?;
        weigh(args.required(0)?)?;
        filters::sort(state, args.required(0)?.clone(), keywords(&args, names))
    });
    environment.add_filter("min", |state: &mut State, given: Given| {
        let args = Args::bind("min", EXTREME, &python::values(given))?;
        weigh(args.required(0)?)?;
        filters::min(state, args.required(0)?.clone(), keywords(&args, EXTREME))
    });
    environment.add_filter("max", |state: &mut State, given: Given| {
        let args = Args::bind("max", EXTREME, &python::values(given))?;
        weigh(args.required(0)?)?;
        filters::max(state, args.required(0)?.clone(), keywords(&args, EXTREME))
    });
    environment.add_filter("groupby", |given: Given| {
        let names = &["value", "attribute", "default", "case_sensitive"];
        let args = Args::bind("groupby", names, &python::values(given))?;
        weigh(args.required(0)?)?;
        let items = python::methods::items(args.required(0)?)?;
        filters::groupby(Value::from(items), None, keywords(&args, names))
    });
    environment.add_filter("format", format);
    environment.add_filter("map", map);
}

const EXTREME: &[&str] = &["value", "case_sensitive", "attribute"];

/// All arguments but the first as keywords, as minijinja's filters take them.
fn keywords(args: &Args, names: &[&'static str]) -> Kwargs {
    let argument = |place: usize| {
        let value = args.some(place)?;
        // Attributes may be numbers.
        let is_attribute = names[place] == "attribute";
        Some((names[place], if is_attribute { Value::from(to_str(value)) } else { value.clone() }))
    };
    (1..names.len()).filter_map(argument).collect()
}

/// `value % args`, or `value % kwargs`.
fn format(value: &Value, given: Given) -> Result<String> {
    let given = python::values(given);
    let (positional, named): (&[Value], Kwargs) = from_args(&given)?;
    let names: Vec<&str> = named.args().collect();
    let values = match (positional, &names[..]) {
        (positional, []) => Value::from(Tuple::from(positional.to_vec())),
        ([], names) => {
            let entry = |name: &&str| Ok((Value::from(*name), named.get::<Value>(name)?));
            Value::from_pairs(names.iter().map(entry).collect::<Result<Vec<_>>>()?)
        }
        _ => return Err(fail("can't handle positional and keyword arguments at the same time")),
    };
    let text = python::format::percent(&to_str(value), &values)?;
    budget::check()?;
    Ok(text)
}

/// `map(attribute=...)`, or a filter by its name with its arguments.
fn map(state: &mut State, value: &Value, given: Given) -> Result<Vec<Value>> {
    let items = if value.is_undefined() { Vec::new() } else { python::methods::items(value)? };
    let given = python::values(given);
    let Some(filter) = given.first().and_then(Value::as_str) else {
        let args = Args::bind("map", &["attribute", "default"], &given)?;
        let attribute = args.required(0)?;
        let default = |found: Value| if found.is_undefined() { args.get(1).cloned().unwrap_or(found) } else { found };
        return items.iter().map(|item| Ok(default(attribute_of(item, attribute)?))).collect();
    };
    if !state.perform_test("filter", &[Value::from(filter)])? {
        return Err(Error::new(
            minijinja::ErrorKind::UnknownFilter,
            format_args!("No filter named '{filter}'.").to_string(),
        ));
    }
    let call = |item: Value| {
        let result = state.apply_filter(filter, &[&[item], &given[1..]].concat())?;
        charge_result(&result)?;
        Ok(result)
    };
    items.into_iter().map(call).collect()
}

/// Items as text with a separator between them.
pub(super) fn join(args: &Args) -> Result<Value> {
    let separator = args.get(1).map(to_str).unwrap_or_default();
    let mut out = String::new();
    for (i, item) in args.required(0)?.try_iter()?.enumerate() {
        let text = match args.some(2) {
            Some(attribute) => to_str(&attribute_of(&item, attribute)?),
            None => to_str(&item),
        };
        let separator = if i > 0 { separator.as_str() } else { "" };
        charge(separator.len() + text.len())?;
        out.push_str(separator);
        out.push_str(&text);
    }
    Ok(out.into())
}

/// `item.a.b` for `a.b`; parts that are numbers are indices.
pub(super) fn attribute_of(item: &Value, attribute: &Value) -> Result<Value> {
    let mut value = item.clone();
    for part in to_str(attribute).split('.') {
        value = value.get_item(&part.parse::<usize>().map_or_else(|_| Value::from(part), Value::from))?;
    }
    Ok(value)
}

/// The first of equal items.
pub(super) fn unique(args: &Args) -> Result<Value> {
    weigh(args.required(0)?)?;
    let mut seen: Vec<Value> = Vec::new();
    let mut out = Vec::new();
    for item in args.required(0)?.try_iter()? {
        let found = args.some(2).map_or_else(|| Ok(item.clone()), |attribute| attribute_of(&item, attribute))?;
        let key = match found.as_str() {
            Some(text) if !args.flag(1, false) => Value::from(text.to_lowercase()),
            _ => found,
        };
        charge_items(1)?;
        charge(seen.len())?;
        if !seen.contains(&key) {
            seen.push(key);
            out.push(item);
        }
    }
    Ok(Value::from(out))
}

/// Entries of a dictionary, ordered by keys or values.
pub(super) fn dictsort(args: &Args) -> Result<Value> {
    let case_sensitive = args.flag(1, false);
    let by_value = match args.text_or_none(2)? {
        None | Some("key") => false,
        Some("value") => true,
        Some(_) => return Err(fail("You can only sort by either \"key\" or \"value\"")),
    };
    weigh(args.required(0)?)?;
    let mut entries = python::methods::pairs(args.required(0)?)?;
    let rank = |entry: &(Value, Value)| {
        let value = if by_value { &entry.1 } else { &entry.0 };
        match value.as_str() {
            Some(text) if !case_sensitive => Value::from(text.to_lowercase()),
            _ => value.clone(),
        }
    };
    match args.flag(3, false) {
        true => entries.sort_by_cached_key(|entry| std::cmp::Reverse(rank(entry))),
        false => entries.sort_by_cached_key(rank),
    }
    let pair = |(key, value)| Value::from(Tuple::from([key, value]));
    Ok(entries.into_iter().map(pair).collect())
}
