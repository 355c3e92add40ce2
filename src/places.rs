//! Places that clients share: for requests in flight, for sessions that wait, for jobs. Pure counting.
//!
//! A client may take a place while it holds fewer than [`SHARE`] times the free ones. So a client alone gets three quarters
//! of them, a second one three quarters of the rest, and there is a place for whoever comes next.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tale_models::ClientId;

/// How many places a client may hold for each free one.
pub const SHARE: usize = 3;

/// Whether a client that holds `held` places may take one of `free` ones.
pub fn may_take(held: usize, free: usize) -> bool {
    held < SHARE.saturating_mul(free)
}

/// Refuses where, of `limit` places, so many are taken, `held` of them by the client that wants one more.
pub fn check(limit: usize, taken: usize, held: usize) -> Result<(), NoPlace> {
    match limit.saturating_sub(taken) {
        0 => Err(NoPlace::Full { limit }),
        free if !may_take(held, free) => Err(NoPlace::Share { limit, held }),
        _ => Ok(()),
    }
}

/// A bounded number of places, and who holds them.
#[derive(Debug)]
pub struct Places {
    limit: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    /// No client stands here with none.
    by_client: HashMap<ClientId, usize>,
}

/// There is no place for this client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    /// All are taken.
    #[error("all {limit} places are taken")]
    Full {
        /// Places in all.
        limit: usize,
    },
    /// The client has its share.
    #[error("{held} of {limit} places are this client's; the rest is for others")]
    Share {
        /// Places in all.
        limit: usize,
        /// What the client holds.
        held: usize,
    },
}

impl Places {
    /// So many free places.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, taken: Mutex::default() })
    }

    /// Takes a place until what is returned is dropped.
    pub fn take(self: &Arc<Self>, client: ClientId) -> Result<Place, NoPlace> {
        let mut taken = self.lock();
        let held = taken.by_client.get(&client).copied().unwrap_or(0);
        check(self.limit, taken.all, held)?;
        taken.all += 1;
        taken.by_client.insert(client, held + 1);
        drop(taken);
        Ok(Place { places: self.clone(), client })
    }

    /// Takes a place for a client whose work was admitted before and goes on, even where there is none left. Whoever calls it
    /// bounds that work.
    pub fn take_further(self: &Arc<Self>, client: ClientId) -> Place {
        let mut taken = self.lock();
        taken.all += 1;
        *taken.by_client.entry(client).or_default() += 1;
        drop(taken);
        Place { places: self.clone(), client }
    }

    /// How many are taken.
    pub fn taken(&self) -> usize {
        self.lock().all
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().expect("no code panics while it counts places: this is a bug")
    }
}

/// A place that is taken; free again when dropped.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    client: ClientId,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.all -= 1;
        let held = taken.by_client.get(&self.client).copied().unwrap_or(1) - 1;
        match held {
            0 => taken.by_client.remove(&self.client),
            held => taken.by_client.insert(self.client, held),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// How many places each client gets that takes all it can, one client after the other.
    fn check(limit: usize, expected: &[usize]) {
        let places = Places::new(limit);
        let mut taken = Vec::new();
        for (client, expected) in expected.iter().enumerate() {
            let before = taken.len();
            while let Ok(place) = places.take(ClientId(client as u64)) {
                taken.push(place);
            }
            assert_eq!(taken.len() - before, *expected, "client {client} of {limit}");
        }
        taken.clear();
        assert_eq!((places.taken(), places.lock().by_client.len()), (0, 0));
    }

    #[test]
    fn who_comes_later_finds_places() {
        check(1, &[1, 0]);
        check(2, &[2, 0]);
        check(4, &[3, 1, 0]);
        check(256, &[192, 48, 12, 3, 1, 0]);
        check(1024, &[768, 192, 48, 12, 3, 1, 0]);
    }

    #[test]
    fn the_error_says_whose_bound_it_is() {
        let places = Places::new(4);
        let _held: Vec<_> = (0..3).map(|_| places.take(ClientId(1)).expect("free")).collect();
        assert_eq!(places.take(ClientId(1)).expect_err("its share"), NoPlace::Share { limit: 4, held: 3 });
        let _last = places.take(ClientId(2)).expect("free");
        assert_eq!(places.take(ClientId(3)).expect_err("full"), NoPlace::Full { limit: 4 });
    }

    proptest! {
        #[test]
        fn the_books_are_exact(moves in prop::collection::vec((0u64..5, any::<usize>(), any::<bool>()), 1..400)) {
            let places = Places::new(20);
            let mut held = Vec::new();
            for (client, nth, take) in moves {
                if take {
                    held.extend(places.take(ClientId(client)));
                } else if !held.is_empty() {
                    held.swap_remove(nth % held.len());
                }
                prop_assert_eq!(places.taken(), held.len());
                prop_assert!(held.len() <= 20);
            }
        }
    }
}
