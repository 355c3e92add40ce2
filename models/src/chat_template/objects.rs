//! The objects of Jinja2 that remember how often they were asked.
//!
//! Owns: what they hold and answer. Does not know: who makes them, and within which bounds.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::value::{DynObject, Object, ObjectRepr, Value, from_args};
use minijinja::{Error, ErrorKind, State};

/// The values that one of our own objects holds.
pub(super) fn held_by(object: &DynObject) -> Option<&[Value]> {
    let of_cycler = object.downcast_ref::<Cycler>().map(|cycler| cycler.items.as_slice());
    of_cycler.or_else(|| Some(std::slice::from_ref(&object.downcast_ref::<Joiner>()?.separator)))
}

/// `cycler(...)`: its items in turn, again and again.
#[derive(Debug)]
pub(super) struct Cycler {
    items: Vec<Value>,
    place: AtomicUsize,
}

impl Cycler {
    /// One over at least one item.
    pub(super) fn value(items: Vec<Value>) -> Value {
        Value::from_object(Self { items, place: AtomicUsize::new(0) })
    }
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let is_current = key.as_str() == Some("current");
        is_current.then(|| self.items[self.place.load(Ordering::Relaxed)].clone())
    }

    fn call_method(self: &Arc<Self>, _: &mut State<'_, '_>, method: &str, given: &[Value]) -> Result<Value, Error> {
        let () = from_args(given)?;
        let place = self.place.load(Ordering::Relaxed);
        match method {
            "next" => {
                self.place.store((place + 1) % self.items.len(), Ordering::Relaxed);
                Ok(self.items[place].clone())
            }
            "reset" => {
                self.place.store(0, Ordering::Relaxed);
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}

/// `joiner(sep)`: nothing when it is called first, then the separator.
#[derive(Debug)]
pub(super) struct Joiner {
    separator: Value,
    calls: AtomicUsize,
}

impl Joiner {
    pub(super) fn value(separator: Value) -> Value {
        Value::from_object(Self { separator, calls: AtomicUsize::new(0) })
    }
}

impl Object for Joiner {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, _: &mut State<'_, '_>, given: &[Value]) -> Result<Value, Error> {
        let () = from_args(given)?;
        let is_first = self.calls.fetch_add(1, Ordering::Relaxed) == 0;
        Ok(if is_first { Value::from("") } else { self.separator.clone() })
    }
}
