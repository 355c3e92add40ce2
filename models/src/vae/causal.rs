//! What convolutions over time remember of a clip that comes in chunks.
//!
//! Owns: the order in which they find it again. Does not know: any network.

use candle_core::Tensor;

use crate::error::Result;
use crate::layers::CausalConv3d;

/// What the layers of a network remember between two chunks, in the order in which the network asks for it, which is the same
/// for every chunk. Dropping it frees it all.
#[derive(Debug)]
pub struct Past {
    /// `None` where there is one chunk, so that nobody would read it.
    remembered: Option<Vec<Option<Tensor>>>,
    /// Of the layer that is asked next.
    next: usize,
    is_first: bool,
}

impl Past {
    /// Before the first of several chunks.
    pub fn of_chunks() -> Self {
        Self { remembered: Some(Vec::new()), next: 0, is_first: true }
    }

    /// Of a clip that comes in one chunk.
    pub fn of_one_chunk() -> Self {
        Self { remembered: None, next: 0, is_first: true }
    }

    /// Whether no chunk has ended yet.
    pub fn is_first_chunk(&self) -> bool {
        self.is_first
    }

    /// The next layer is `conv`, and this its part of the chunk: `[b, in, t, h, w]` to `[b, out, t', h', w']`.
    pub fn convolve(&mut self, conv: &CausalConv3d, x: &Tensor) -> Result<Tensor> {
        match self.next_layer() {
            Some(past) => conv.forward(x, past),
            None => conv.forward_whole(x),
        }
    }

    /// What the next layer remembers: nothing before the first chunk. `None` where it need not.
    pub fn next_layer(&mut self) -> Option<&mut Option<Tensor>> {
        let remembered = self.remembered.as_mut()?;
        if self.next == remembered.len() {
            remembered.push(None);
        }
        self.next += 1;
        Some(&mut remembered[self.next - 1])
    }

    /// The chunk is through: the first layer comes next.
    pub fn end_chunk(&mut self) {
        self.next = 0;
        self.is_first = false;
    }
}
