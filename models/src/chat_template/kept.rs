//! Values that outlive the expression that made them: what a variable or a namespace is given.
//!
//! Owns: their bounds. Only through such values can a template nest lists deeper with every turn of a loop, so that they
//! are where depth and number of values are looked at; comparing, printing and dropping one then takes a bounded
//! stack. What minijinja makes lazily (slices, joined and repeated lists) becomes a list here, as it is in Python: lazy
//! ones would form chains that no look at their items shows. Deliberately does not know: who keeps the value.

use minijinja::value::{Tuple, Value, ValueKind};

use super::budget::{Exceeded, ITEM_BYTES, MAX_DEPTH, MAX_VALUES, charge};
use super::objects::held_by;
use super::python::text::views;

type Result<T, E = minijinja::Error> = std::result::Result<T, E>;

/// The value as it may be kept by a variable.
pub(super) fn by_variable(value: &Value) -> Result<Value> {
    keep(value, Keeper::Variable)
}

/// The value as it may be kept by something that can be changed: a namespace or a loop. Since those hold none of their
/// own kind, no value holds itself, which would never be freed.
pub(super) fn by_changeable(value: &Value) -> Result<Value> {
    keep(value, Keeper::Changeable)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Keeper {
    Variable,
    Changeable,
}

fn keep(value: &Value, keeper: Keeper) -> Result<Value> {
    let changed = Look { keeper, values: 0 }.at(value, 0)?;
    Ok(changed.unwrap_or_else(|| value.clone()))
}

/// A walk through one value.
struct Look {
    keeper: Keeper,
    /// Values seen.
    values: usize,
}

impl Look {
    /// What has to stand in place of `value`, if not itself.
    fn at(&mut self, value: &Value, depth: usize) -> Result<Option<Value>> {
        let Some(object) = value.as_object() else { return Ok(None) };
        if depth > MAX_DEPTH {
            return Err(Exceeded::Depth.into());
        }
        if let Some(held) = held_by(object) {
            held.iter().try_for_each(|value| self.at(value, depth + 1).map(drop))?;
            return Ok(None);
        }
        if is_changeable(object.type_name()) {
            return match self.keeper {
                Keeper::Variable => Ok(None),
                Keeper::Changeable => {
                    let problem = "a namespace or a loop cannot be kept by a namespace or a loop";
                    Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, problem))
                }
            };
        }
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => self.at_list(value, depth),
            ValueKind::Map => self.at_map(value, depth),
            _ => Ok(None),
        }
    }

    fn at_list(&mut self, list: &Value, depth: usize) -> Result<Option<Value>> {
        // Numbers alone, and made when asked for.
        if list.downcast_object_ref::<views::Range>().is_some() {
            return Ok(None);
        }
        let is_view = list.downcast_object_ref::<views::View>().is_some();
        let mut is_changed = list.kind() == ValueKind::Iterable && !is_view;
        let mut items = Vec::new();
        for item in list.try_iter()? {
            self.count(1)?;
            let changed = self.at(&item, depth + 1)?;
            is_changed |= changed.is_some();
            items.push(changed.unwrap_or(item));
        }
        if !is_changed {
            return Ok(None);
        }
        Ok(Some(match list.downcast_object_ref::<views::View>() {
            Some(view) => view.with(items),
            None if list.is_tuple() => Value::from(Tuple::from(items)),
            None => Value::from(items),
        }))
    }

    fn at_map(&mut self, map: &Value, depth: usize) -> Result<Option<Value>> {
        let mut is_changed = false;
        let mut entries = Vec::new();
        for key in map.try_iter()? {
            self.count(2)?;
            let value = map.get_item(&key)?;
            let changed_key = self.at(&key, depth + 1)?;
            let changed = self.at(&value, depth + 1)?;
            is_changed |= changed.is_some() || changed_key.is_some();
            entries.push((changed_key.unwrap_or(key), changed.unwrap_or(value)));
        }
        Ok(is_changed.then(|| Value::from_pairs(entries)))
    }

    fn count(&mut self, values: usize) -> Result<()> {
        self.values += values;
        // A walk costs time and the list that it fills is mostly dropped, so that it is cheaper than making one.
        charge(values * ITEM_BYTES / 16)?;
        if self.values > MAX_VALUES { Err(Exceeded::Values.into()) } else { Ok(()) }
    }
}

/// Whether an object of this type, which is minijinja's own and private, can be given other values later.
fn is_changeable(type_name: &str) -> bool {
    let name = type_name.rsplit("::").next();
    type_name.starts_with("minijinja::") && matches!(name, Some("Namespace" | "Loop"))
}
