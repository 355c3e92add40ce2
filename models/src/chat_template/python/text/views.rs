//! Objects of Python that minijinja has no like of: views of dictionaries, and `range`.

use std::fmt;
use std::sync::Arc;

use minijinja::value::{Enumerator, Object, ObjectRepr, Value};

use super::repr;
use crate::chat_template::budget::charge_items;

/// `dict.keys()`, `.values()` and `.items()`: they print under their own names and have no index.
#[derive(Debug)]
pub struct View {
    name: &'static str,
    items: Vec<Value>,
}

impl View {
    /// `name` is that of Python's type (`dict_keys`, ...).
    pub fn value(name: &'static str, items: Vec<Value>) -> Value {
        Value::from_object(Self { name, items })
    }

    /// A view of the same kind.
    pub fn with(&self, items: Vec<Value>) -> Value {
        Self::value(self.name, items)
    }
}

impl Object for View {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        match charge_items(self.items.len()) {
            Ok(()) => Enumerator::Values(self.items.clone()),
            Err(_) => Enumerator::Empty,
        }
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({})", self.name, repr(&Value::from(self.items.clone())))
    }
}

/// `range(start, stop, step)`.
#[derive(Debug)]
pub struct Range {
    start: i64,
    stop: i64,
    step: i64,
    len: usize,
}

impl Range {
    /// A range of `len` numbers; `stop` is for printing only.
    pub fn value(start: i64, stop: i64, step: i64, len: usize) -> Value {
        Value::from_object(Self { start, stop, step, len })
    }

    fn at(&self, index: usize) -> Value {
        Value::from(self.start + index as i64 * self.step)
    }
}

impl Object for Range {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        key.as_usize().filter(|index| *index < self.len).map(|index| self.at(index))
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.len)
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.step {
            1 => write!(f, "range({}, {})", self.start, self.stop),
            step => write!(f, "range({}, {}, {step})", self.start, self.stop),
        }
    }
}
