//! Which connections there are, and which one goes when there are too many.
//!
//! A connection that does nothing yields to a new one: first those over
//! which no request ever came, those of the address
//! with most connections before others, the oldest first. One that is worked for is never closed for another; when all
//! are, the new one is refused. So silent connections, however many, cost their own kind.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

use super::refusal::Refusal;
use super::wire::{Idleness, Wire};
use crate::http::Peer;

/// A connection that was asked to close has this long before the next one is asked.
const YIELD_TIME: Duration = Duration::from_millis(100);
/// Rounds of asking for one new connection, at most.
const MAX_ROUNDS: usize = 8;
/// Connections of a round, at most.
const MAX_ASKED_AT_ONCE: usize = 16;

/// The connections of one listener.
#[derive(Debug)]
pub(super) struct Register {
    max_connections: usize,
    max_per_address: usize,
    connections: Mutex<Connections>,
    /// One has closed.
    freed: Notify,
}

#[derive(Debug, Default)]
struct Connections {
    next: u64,
    wires: HashMap<u64, Arc<Wire>>,
    per_address: HashMap<Peer, usize>,
}

/// A connection's entry, which goes with it.
#[derive(Debug)]
pub(super) struct Place {
    register: Arc<Register>,
    number: u64,
    peer: Peer,
}

impl Register {
    pub(super) fn new((max_connections, max_per_address): (usize, usize)) -> Arc<Self> {
        let (connections, freed) = (Mutex::default(), Notify::new());
        Arc::new(Self { max_connections, max_per_address, connections, freed })
    }

    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a connection.
    pub(super) fn enter(self: &Arc<Self>, wire: Arc<Wire>) -> Place {
        let peer = wire.peer();
        let mut connections = self.connections();
        let number = connections.next;
        connections.next += 1;
        connections.wires.insert(number, wire);
        *connections.per_address.entry(peer).or_default() += 1;
        Place { register: self.clone(), number, peer }
    }

    /// Waits until there is room for a connection of `peer`, which idle ones make. `Err` when all are busy.
    pub(super) async fn make_room(&self, peer: Peer) -> Result<(), Refusal> {
        for _ in 0..MAX_ROUNDS {
            // Hears of what closes from here on.
            let freed = self.freed.notified();
            let Some(limit) = self.limit(peer) else { return Ok(()) };
            if !self.kick_idle(matches!(limit, Refusal::TooManyOfAddress(_)).then_some(peer)) {
                return Err(limit);
            }
            // A wait that was too long is followed by the next question.
            let _ = timeout(YIELD_TIME, freed).await;
        }
        self.limit(peer).map_or(Ok(()), Err)
    }

    /// Asks the idlest connection to close, of this address or of all; false when none is idle. Of those over which no
    /// request ever came several are asked, so that a flood of them costs one wait for many.
    pub(super) fn kick_idle(&self, peer: Option<Peer>) -> bool {
        let connections = self.connections();
        let candidates = connections.wires.values().filter(|wire| peer.is_none_or(|peer| wire.peer() == peer));
        let mut idle: Vec<_> = candidates
            .filter_map(|wire| {
                let of_address = connections.per_address.get(&wire.peer()).copied().unwrap_or_default();
                Some((wire.idleness()?, of_address, wire))
            })
            .collect();
        idle.sort_by_key(|(idleness, of_address, _)| order(*idleness, *of_address));
        let unused = idle.iter().take_while(|(idleness, ..)| !matches!(idleness, Idleness::Idle(_))).count();
        // The oldest of them only: the others have not had the time to ask.
        let asked = (unused / 8).clamp(1, MAX_ASKED_AT_ONCE);
        idle.iter().take(asked).for_each(|(_, _, wire)| wire.kick());
        !idle.is_empty()
    }

    /// The bound that one more connection of `peer` would break.
    fn limit(&self, peer: Peer) -> Option<Refusal> {
        let connections = self.connections();
        let of_address = connections.per_address.get(&peer).copied().unwrap_or_default();
        if connections.wires.len() >= self.max_connections {
            Some(Refusal::TooManyConnections(self.max_connections))
        } else if of_address >= self.max_per_address {
            Some(Refusal::TooManyOfAddress(self.max_per_address))
        } else {
            None
        }
    }
}

/// What goes first is least.
fn order(idleness: Idleness, of_address: usize) -> impl Ord {
    let kind = match idleness {
        Idleness::Over(_) => 0,
        Idleness::Silent(_) => 1,
        Idleness::Idle(_) => 2,
    };
    (kind, std::cmp::Reverse(of_address), idleness)
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut connections = self.register.connections();
        connections.wires.remove(&self.number);
        if let Some(count) = connections.per_address.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                connections.per_address.remove(&self.peer);
            }
        }
        drop(connections);
        self.register.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn silent_connections_of_the_busiest_address_go_first() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let expected = [
            (Idleness::Over(later), 1),
            (Idleness::Silent(now), 900),
            (Idleness::Silent(later), 900),
            (Idleness::Silent(now), 1),
            (Idleness::Idle(later), 900),
            (Idleness::Idle(now), 1),
            (Idleness::Idle(later), 1),
        ];
        let mut sorted = expected;
        sorted.reverse();
        sorted.sort_by_key(|(idleness, of_address)| order(*idleness, *of_address));
        assert_eq!(sorted, expected);
    }
}
