//! Who holds how many bytes of a device's memory. Pure bookkeeping: allocates nothing, knows no device.

use std::collections::BTreeMap;

use tale_models::SessionId;

use super::arbiter::RunnerKey;

/// What a reservation belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// Weights and fixed caches of the model of this runner.
    Model(RunnerKey),
    /// Weights and fixed caches of parts of models that other devices lead; held until the process ends.
    Parts,
    /// Everything that a running generation needs beside them.
    Session(SessionId),
    /// What the model of this runner needs for a while beside its weights and its sessions' plans.
    Borrowed(RunnerKey),
}

/// A reservation that does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    /// Bytes asked for.
    pub needed_bytes: usize,
    /// Bytes that are free.
    pub free_bytes: usize,
}

/// Reservations by owner; their sum never exceeds the capacity.
#[derive(Debug)]
pub struct Ledger {
    capacity_bytes: usize,
    used_bytes: usize,
    reservations: BTreeMap<Owner, usize>,
}

impl Ledger {
    /// An empty ledger over `capacity_bytes`.
    pub fn new(capacity_bytes: usize) -> Self {
        Self { capacity_bytes, used_bytes: 0, reservations: BTreeMap::new() }
    }

    /// Reserves `bytes` for an owner that holds nothing yet, or changes nothing.
    pub fn reserve(&mut self, owner: Owner, bytes: usize) -> Result<(), Shortage> {
        assert!(!self.reservations.contains_key(&owner), "{owner:?} reserves twice: this is a bug");
        if bytes > self.free_bytes() {
            return Err(Shortage { needed_bytes: bytes, free_bytes: self.free_bytes() });
        }
        self.used_bytes += bytes;
        self.reservations.insert(owner, bytes);
        Ok(())
    }

    /// Makes what an owner holds more or less, or changes nothing.
    pub fn resize(&mut self, owner: Owner, bytes: usize) -> Result<(), Shortage> {
        let free_bytes = self.free_bytes() + self.held_bytes(owner);
        if bytes > free_bytes {
            return Err(Shortage { needed_bytes: bytes, free_bytes });
        }
        self.release(owner);
        if bytes > 0 { self.reserve(owner, bytes) } else { Ok(()) }
    }

    /// Gives back what the owner holds; nothing happens when it holds nothing.
    pub fn release(&mut self, owner: Owner) {
        self.used_bytes -= self.reservations.remove(&owner).unwrap_or(0);
    }

    /// Bytes that sessions can have at most: everything but the models.
    pub fn session_capacity_bytes(&self) -> usize {
        let models = self.reservations.iter().filter(|(owner, _)| matches!(owner, Owner::Model(_) | Owner::Parts));
        self.capacity_bytes - models.map(|(_, bytes)| bytes).sum::<usize>()
    }

    /// Bytes that nobody holds.
    pub fn free_bytes(&self) -> usize {
        self.capacity_bytes - self.used_bytes
    }

    /// Bytes that one owner holds.
    pub fn held_bytes(&self, owner: Owner) -> usize {
        self.reservations.get(&owner).copied().unwrap_or(0)
    }

    /// Bytes that somebody holds.
    pub fn used_bytes(&self) -> usize {
        self.used_bytes
    }

    /// Bytes in all.
    pub fn capacity_bytes(&self) -> usize {
        self.capacity_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_shortage_says_what_is_needed_and_free_and_changes_nothing() {
        let mut ledger = Ledger::new(100);
        ledger.reserve(Owner::Model(0), 70).expect("fits");
        let shortage = ledger.reserve(Owner::Session(SessionId(1)), 31).expect_err("does not fit");
        assert_eq!(shortage, Shortage { needed_bytes: 31, free_bytes: 30 });
        assert_eq!((ledger.used_bytes(), ledger.session_capacity_bytes()), (70, 30));
        ledger.reserve(Owner::Session(SessionId(1)), 30).expect("fits exactly");
    }

    #[test]
    fn what_is_borrowed_may_grow_and_shrink() {
        let mut ledger = Ledger::new(100);
        let owner = Owner::Borrowed(0);
        ledger.reserve(Owner::Model(0), 70).expect("fits");
        ledger.resize(owner, 10).expect("fits");
        ledger.resize(owner, 30).expect("fits exactly");
        let shortage = ledger.resize(owner, 31).expect_err("does not fit");
        assert_eq!(shortage, Shortage { needed_bytes: 31, free_bytes: 30 });
        assert_eq!((ledger.used_bytes(), ledger.session_capacity_bytes()), (100, 30));
        ledger.resize(owner, 0).expect("fits");
        assert_eq!(ledger.used_bytes(), 70);
    }

    proptest! {
        #[test]
        fn the_sum_is_exact_and_never_over_capacity(
            moves in prop::collection::vec((0u64..20, 0usize..60, any::<bool>()), 1..400)
        ) {
            let mut ledger = Ledger::new(200);
            let mut held = BTreeMap::new();
            for (id, bytes, reserve) in moves {
                let owner = Owner::Session(SessionId(id));
                if reserve && !held.contains_key(&id) {
                    if ledger.reserve(owner, bytes).is_ok() {
                        held.insert(id, bytes);
                    }
                } else {
                    ledger.release(owner);
                    held.remove(&id);
                }
                prop_assert_eq!(ledger.used_bytes(), held.values().sum::<usize>());
                prop_assert!(ledger.used_bytes() <= ledger.capacity_bytes());
            }
            for id in held.into_keys() {
                ledger.release(Owner::Session(SessionId(id)));
            }
            prop_assert_eq!(ledger.used_bytes(), 0);
        }
    }
}
