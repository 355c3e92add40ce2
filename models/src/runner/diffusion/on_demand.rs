//! Text encoders that are on the device only while prompts are encoded.
//!
//! Owns: a second model that has them and nothing else, for as long as it is needed. Does not know: when that is, or where
//! it is read from.

use super::loading::{Coming, Loading};
use crate::checkpoint::{Build, LentComponents};
use crate::device::give_back_freed_memory;
use crate::error::Result;

/// Begins to read the encoders.
pub type Begin<M> = Box<dyn Fn() -> Result<Box<dyn Loading<M>>> + Send>;

/// Text encoders that come and go.
pub struct OnDemand<M> {
    components: Vec<String>,
    /// What they take on the device while they are there.
    bytes: usize,
    begin: Begin<M>,
    /// `None` while they are away.
    model: Option<Coming<M>>,
}

impl<M> OnDemand<M> {
    /// Those of a checkpoint.
    pub fn new(parts: LentComponents, build: Build<M>) -> Self
    where
        M: Send + 'static,
    {
        let components = parts.names().to_vec();
        let bytes = parts.bytes();
        Self::reading(components, bytes, Box::new(move || Ok(Box::new(parts.read(build)?))))
    }

    /// These components, which take so many bytes on the device once `begin` has read them.
    pub fn reading(components: Vec<String>, bytes: usize, begin: Begin<M>) -> Self {
        Self { components, bytes, begin, model: None }
    }

    /// What they take on the device while they are there.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether the networks of these components are among them.
    pub fn has(&self, components: &[&str]) -> bool {
        self.components.iter().any(|own| components.contains(&own.as_str()))
    }

    /// The model that has them, while it is there.
    pub fn model(&self) -> Option<&M> {
        self.model.as_ref().and_then(Coming::model)
    }

    /// The next step of reading them, which are not there yet: steps done, and steps in all.
    pub fn load_on(&mut self) -> Result<(usize, usize)> {
        let coming = match self.model.take() {
            Some(coming) => coming,
            None => Coming::new((self.begin)()?),
        };
        // What cannot be read on is not kept.
        let progress = self.model.insert(coming).advance();
        if progress.is_err() {
            self.model = None;
        }
        progress
    }

    /// Frees them, or as many as were read.
    pub fn release(&mut self) {
        if self.model.take().is_some() {
            give_back_freed_memory();
        }
    }
}
