//! Memory for bodies: a budget of bytes that all requests share, taken as bytes arrive and given back when they are dropped.
//! One client alone gets three quarters of it, as of places.
//!
//! Does not know: what the bytes are. Files that were decompressed or decoded count like those that arrived.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tale_models::ClientId;

use crate::http::error::ApiError;
use crate::places::SHARE;

/// What may be taken of the reserve, and beyond a client's share: enough for a conversation of some pages. So those go on
/// while large bodies have taken the rest.
const MAX_RESERVE_BYTES: usize = 64 << 10;
/// Part of the budget that is the reserve.
const RESERVE_SHARE: usize = 8;

/// The budget. Cheap to clone.
#[derive(Debug, Clone)]
pub(in crate::http) struct BodyMemory(Arc<Budget>);

#[derive(Debug)]
struct Budget {
    total: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    bytes: usize,
    /// No client stands here with none.
    by_client: HashMap<ClientId, usize>,
}

impl BodyMemory {
    /// A budget of so many bytes.
    pub(in crate::http) fn new(total: usize) -> Self {
        Self(Arc::new(Budget { total, taken: Mutex::default() }))
    }

    /// Nothing yet, for one request of `client`.
    pub(in crate::http) fn hold(&self, client: ClientId) -> Held {
        Held { budget: self.0.clone(), client, bytes: 0 }
    }
}

impl Budget {
    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().expect("no code panics while it counts bytes: this is a bug")
    }

    /// Takes `bytes` for a request of `client` that holds `held`; false when they are not there for it.
    fn take(&self, client: ClientId, held: usize, bytes: usize) -> bool {
        let mut taken = self.lock();
        let of_client = taken.by_client.get(&client).copied().unwrap_or(0);
        let Some(rest) = self.total.checked_sub(taken.bytes).and_then(|left| left.checked_sub(bytes)) else {
            return false;
        };
        let is_large = held + bytes > MAX_RESERVE_BYTES;
        if is_large && (rest < self.total / RESERVE_SHARE || of_client + bytes > SHARE * rest) {
            return false;
        }
        if bytes > 0 {
            taken.bytes += bytes;
            taken.by_client.insert(client, of_client + bytes);
        }
        true
    }

    fn give_back(&self, client: ClientId, bytes: usize) {
        let mut taken = self.lock();
        taken.bytes -= bytes;
        match taken.by_client.get(&client).copied().unwrap_or(0).saturating_sub(bytes) {
            0 => taken.by_client.remove(&client),
            rest => taken.by_client.insert(client, rest),
        };
    }
}

/// What one request holds of the budget; given back when dropped.
#[derive(Debug)]
pub(in crate::http) struct Held {
    budget: Arc<Budget>,
    client: ClientId,
    bytes: usize,
}

impl Held {
    /// Whose it is.
    pub(in crate::http) fn client(&self) -> ClientId {
        self.client
    }

    /// Takes so many bytes more; refused when they are not there.
    pub(in crate::http) fn add(&mut self, bytes: usize) -> Result<(), ApiError> {
        if !self.budget.take(self.client, self.bytes, bytes) {
            return Err(ApiError::no_body_memory(self.budget.total));
        }
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
        self.budget.give_back(self.client, bytes);
    }

    /// Bytes that are held.
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
        let [one, other] = [1, 2].map(ClientId);
        let mut large = memory.hold(one);
        large.add(700 << 10).expect("there");
        let mut second = memory.hold(other);
        second.add(180 << 10).expect("there");
        assert!(second.add(100 << 10).is_err(), "that is the reserve");
        let mut small = memory.hold(one);
        small.add(MAX_RESERVE_BYTES).expect("of the reserve");
        assert!(small.add(1 << 10).is_err(), "it is large now");
        assert!(memory.hold(other).add(100 << 10).is_err());
        large.shrink_to(100 << 10);
        assert_eq!(large.bytes(), 100 << 10);
        memory.hold(other).add(300 << 10).expect("given back");
        drop((large, small, second));
        let taken = memory.0.lock();
        assert!(taken.bytes == 0 && taken.by_client.is_empty());
    }

    #[test]
    fn one_client_leaves_a_quarter_to_others() {
        let memory = BodyMemory::new(16 << 20);
        let [one, other] = [1, 2].map(ClientId);
        let held: Vec<Held> = std::iter::from_fn(|| {
            let mut held = memory.hold(one);
            held.add(1 << 20).ok().map(|()| held)
        })
        .collect();
        assert_eq!(held.len(), 12);
        assert!(memory.hold(one).add(MAX_RESERVE_BYTES).is_ok(), "conversations go on");
        assert!(memory.hold(other).add(2 << 20).is_ok());
    }
}
