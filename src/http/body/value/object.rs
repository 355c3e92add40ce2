//! The fields of an object of a body.
//!
//! Owns: their order, which is that of the body: the answer to a schema keeps it, and a tool's schema is shown to the model in
//! it. As small as a pointer, since every value is as large as this. Does not know: what the fields are.

use std::ops::{Deref, DerefMut};

use indexmap::{IndexMap, map};

use super::Value;

/// Fields by their names, in order; no name is there twice.
#[derive(Debug, Clone, PartialEq, Default)]
pub(in crate::http) struct Object(Box<IndexMap<String, Value>>);

impl Object {
    /// What one takes in memory beside its fields: itself, and room for some fields at once.
    pub(super) const BYTES: usize = size_of::<IndexMap<String, Value>>() + 4 * (Self::FIELD_BYTES + size_of::<Value>());
    /// What a field takes beside its value: its name and place in the map, and the room that it has for one more.
    pub(super) const FIELD_BYTES: usize = 2 * (size_of::<String>() + 3 * size_of::<usize>());

    /// Without fields.
    pub(in crate::http) fn new() -> Self {
        Self::default()
    }
}

impl Deref for Object {
    type Target = IndexMap<String, Value>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Object {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl<const N: usize> From<[(String, Value); N]> for Object {
    fn from(fields: [(String, Value); N]) -> Self {
        Self(Box::new(fields.into()))
    }
}

impl IntoIterator for Object {
    type Item = (String, Value);
    type IntoIter = map::IntoIter<String, Value>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}
