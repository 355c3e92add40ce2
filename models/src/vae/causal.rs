//! What convolutions over time remember of a clip that comes in chunks.
//!
//! Owns: the order in which they find it again. Does not know: any convolution.

use candle_core::Tensor;

/// What the convolutions of a network remember between two chunks, in the order in which the network calls them, which is
/// the same for every chunk. Dropping it frees it all.
#[derive(Debug, Default)]
pub struct Past {
    remembered: Vec<Option<Tensor>>,
    /// Of the convolution that is called next.
    next: usize,
}

impl Past {
    /// What the convolution that is called next remembers; nothing before the first chunk.
    pub fn next_layer(&mut self) -> &mut Option<Tensor> {
        if self.next == self.remembered.len() {
            self.remembered.push(None);
        }
        self.next += 1;
        &mut self.remembered[self.next - 1]
    }

    /// The chunk is through: the first convolution comes next.
    pub fn end_chunk(&mut self) {
        self.next = 0;
    }
}
