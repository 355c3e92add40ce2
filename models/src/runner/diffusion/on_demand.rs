//! Text encoders that are on the device only while prompts are encoded.
//!
//! Owns: a second model that has them and nothing else, for as long as it is needed. Does not know: when that is, or where
//! it is read from.

use crate::checkpoint::{Build, LentComponents};
use crate::device::give_back_freed_memory;
use crate::error::Result;

/// Text encoders that come and go.
pub struct OnDemand<M> {
    parts: LentComponents,
    build: Build<M>,
    model: Option<M>,
}

impl<M> OnDemand<M> {
    /// Not there yet.
    pub fn new(parts: LentComponents, build: Build<M>) -> Self {
        Self { parts, build, model: None }
    }

    /// What they take on the device while they are there.
    pub fn bytes(&self) -> usize {
        self.parts.bytes()
    }

    /// Whether the networks of these components are among them.
    pub fn has(&self, components: &[&str]) -> bool {
        components.iter().any(|component| self.parts.contains(component))
    }

    /// Reads them, if they are away.
    pub fn fetch(&mut self) -> Result<()> {
        if self.model.is_none() {
            self.model = Some(self.parts.read(self.build)?);
        }
        Ok(())
    }

    /// The model that has them, once they were fetched.
    pub fn model(&self) -> &M {
        self.model.as_ref().expect("text encoders are fetched before they are used: this is a bug")
    }

    /// Frees them.
    pub fn release(&mut self) {
        if self.model.take().is_some() {
            give_back_freed_memory();
        }
    }
}
