//! Memory for bodies: a budget of bytes that all requests share, taken as bytes arrive and given back when they are dropped.
//!
//! Does not know: what the bytes are. Files that were decompressed or decoded count like those that arrived.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::http::error::ApiError;

/// What may be taken of the reserve: enough for a conversation of some pages. So those go on while large bodies have
/// taken the rest.
const MAX_RESERVE_BYTES: usize = 64 << 10;
/// Part of the budget that is the reserve.
const RESERVE_SHARE: usize = 8;

/// The budget. Cheap to clone.
#[derive(Debug, Clone)]
pub(in crate::http) struct BodyMemory(Arc<Budget>);

#[derive(Debug)]
struct Budget {
    total: usize,
    left: AtomicUsize,
}

impl BodyMemory {
    /// A budget of so many bytes.
    pub(in crate::http) fn new(total: usize) -> Self {
        Self(Arc::new(Budget { total, left: AtomicUsize::new(total) }))
    }

    /// Nothing yet, for one request.
    pub(in crate::http) fn hold(&self) -> Held {
        Held { budget: self.0.clone(), bytes: 0 }
    }
}

/// What one request holds of the budget; given back when dropped.
#[derive(Debug)]
pub(in crate::http) struct Held {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Held {
    /// Takes so many bytes more; refused when they are not there.
    pub(in crate::http) fn add(&mut self, bytes: usize) -> Result<(), ApiError> {
        let Budget { total, left } = &*self.budget;
        let reserve = if self.bytes + bytes > MAX_RESERVE_BYTES { total / RESERVE_SHARE } else { 0 };
        let take = |left: usize| left.checked_sub(bytes).filter(|rest| *rest >= reserve);
        left.fetch_update(Relaxed, Relaxed, take).map_err(|_| ApiError::no_body_memory(*total))?;
        self.bytes += bytes;
        Ok(())
    }

    /// Gives back what is more than `bytes`.
    pub(in crate::http) fn shrink_to(&mut self, bytes: usize) {
        self.give_back(self.bytes.saturating_sub(bytes));
    }

    /// Gives back so many bytes, or all.
    pub(in crate::http) fn give_back(&mut self, bytes: usize) {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        self.budget.left.fetch_add(bytes, Relaxed);
    }

    /// Bytes that are held.
    #[cfg(test)]
    pub(in crate::http) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_bounded_and_comes_back() {
        let memory = BodyMemory::new(1 << 20);
        let mut large = memory.hold();
        large.add(800 << 10).expect("there");
        assert!(large.add(200 << 10).is_err(), "that is the reserve");
        let mut small = memory.hold();
        small.add(MAX_RESERVE_BYTES).expect("of the reserve");
        assert!(small.add(1 << 10).is_ok(), "the rest is there still");
        assert!(memory.hold().add(300 << 10).is_err());
        large.shrink_to(100 << 10);
        assert_eq!(large.bytes(), 100 << 10);
        memory.hold().add(500 << 10).expect("given back");
        drop((large, small));
        assert_eq!(memory.0.left.load(Relaxed), 1 << 20);
    }
}
