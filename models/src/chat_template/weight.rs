//! What it takes to go through a value: to compare it, to search it, to make text of it.
//!
//! A list that repeats lists has far more items than there are values, and minijinja goes through them without paying.
//! Deliberately does not know: who compares.

use minijinja::Error;
use minijinja::value::{Value, ValueKind};

use super::budget::{self, Exceeded, MAX_DEPTH, charge, charge_items};
use super::python::text::views;

type Result<T, E = Error> = std::result::Result<T, E>;

/// Bytes that looking at one value counts for.
const LOOK_BYTES: usize = 8;
/// Deepest nesting of what is compared: that of values that are kept, and what one expression can put around them.
const MAX_COMPARED_DEPTH: usize = 3 * MAX_DEPTH;

/// Pays for what comparing a value, searching it or making text of it can take.
pub(super) fn weigh(value: &Value) -> Result<()> {
    if value.as_object().is_some() { weigh_at(value, 0) } else { Ok(()) }
}

fn weigh_at(value: &Value, depth: usize) -> Result<()> {
    charge(LOOK_BYTES + value.as_str().map_or(0, str::len))?;
    if value.as_object().is_none() || value.downcast_object_ref::<views::Range>().is_some() {
        return Ok(());
    }
    if depth > MAX_COMPARED_DEPTH {
        return Err(Exceeded::Depth.into());
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => value.try_iter()?.try_for_each(|item| weigh_at(&item, depth + 1)),
        ValueKind::Map => value.try_iter()?.try_for_each(|key| {
            weigh_at(&key, depth + 1)?;
            weigh_at(&value.get_item(&key)?, depth + 1)
        }),
        _ => Ok(()),
    }
}

/// The value itself, weighed.
pub(super) fn weighed(value: &Value) -> Result<Value> {
    weigh(value)?;
    Ok(value.clone())
}

/// What the result of a filter or a method takes.
pub(super) fn charge_result(result: &Value) -> Result<(), Exceeded> {
    match (result.as_str(), result.downcast_object_ref::<Vec<Value>>()) {
        (Some(text), _) => charge(text.len()),
        (_, Some(list)) => charge_items(list.len()),
        _ => budget::check(),
    }
}
