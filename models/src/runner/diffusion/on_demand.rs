//! Text encoders that are on the device only while prompts are encoded.
//!
//! Owns: a second model that has them and nothing else, for as long as it is needed. Does not know: when that is, or where
//! it is read from.

use crate::device::give_back_freed_memory;
use crate::error::Result;

/// Reads a model whose text encoders are on the device, and which has nothing else there.
pub type ReadTextEncoders<M> = Box<dyn Fn() -> Result<M> + Send>;

/// Text encoders that come and go.
pub struct OnDemand<M> {
    /// What they take on the device.
    bytes: usize,
    read: ReadTextEncoders<M>,
    model: Option<M>,
}

impl<M> OnDemand<M> {
    /// Not there yet; `bytes` is what they take once they are.
    pub fn new(bytes: usize, read: ReadTextEncoders<M>) -> Self {
        Self { bytes, read, model: None }
    }

    /// What they take on the device while they are there.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Has them there.
    pub fn fetch(&mut self) -> Result<()> {
        if self.model.is_none() {
            self.model = Some((self.read)()?);
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
