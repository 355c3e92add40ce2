//! A queue in which clients take turns. Pure: it knows neither time nor what waits.
//!
//! Items of one client keep their order. The next turn is that of the client that holds least of what is handed out, and
//! among equals of the one whose last turn is longest ago. A client that comes new, or comes back, stands behind those that
//! wait already. With one client this is first come first served.

use std::collections::VecDeque;
use std::collections::vec_deque::Iter;

use crate::request::ClientId;

/// What waits, by client.
#[derive(Debug)]
pub struct FairQueue<T> {
    /// Clients with items, the one whose last turn is longest ago first; none is empty.
    lanes: VecDeque<Lane<T>>,
}

#[derive(Debug)]
struct Lane<T> {
    client: ClientId,
    /// At least one.
    items: VecDeque<T>,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self { lanes: VecDeque::new() }
    }
}

impl<T> FairQueue<T> {
    /// Puts an item behind all others of its client.
    pub fn push_back(&mut self, client: ClientId, item: T) {
        self.lane_mut(client).push_back(item);
    }

    /// Puts an item before all others of its client, as for one that gave back what it had.
    pub fn push_front(&mut self, client: ClientId, item: T) {
        self.lane_mut(client).push_front(item);
    }

    fn lane_mut(&mut self, client: ClientId) -> &mut VecDeque<T> {
        let index = self.lanes.iter().position(|lane| lane.client == client).unwrap_or_else(|| {
            self.lanes.push_back(Lane { client, items: VecDeque::new() });
            self.lanes.len() - 1
        });
        &mut self.lanes[index].items
    }

    /// The turns that would follow, where each client holds `held` of what is handed out. Changes nothing.
    pub fn turns(&self, held: impl Fn(ClientId) -> usize) -> Turns<'_, T> {
        let turn = |lane: &Lane<T>| (lane.client, held(lane.client));
        Turns { lanes: self.lanes.iter().map(|lane| (turn(lane), lane.items.iter())).collect() }
    }

    /// Takes the oldest item of a client, which has had its turn.
    pub fn take(&mut self, client: ClientId) -> Option<T> {
        let index = self.lanes.iter().position(|lane| lane.client == client)?;
        let mut lane = self.lanes.remove(index)?;
        let item = lane.items.pop_front();
        if !lane.items.is_empty() {
            self.lanes.push_back(lane);
        }
        item
    }

    /// Takes an item that fulfils a condition, the first of them client by client; no turn is had for it.
    pub fn take_where(&mut self, mut wanted: impl FnMut(&T) -> bool) -> Option<T> {
        let index = self.lanes.iter().position(|lane| lane.items.iter().any(&mut wanted))?;
        let items = &mut self.lanes[index].items;
        let item = items.iter().position(&mut wanted).and_then(|position| items.remove(position));
        if items.is_empty() {
            self.lanes.remove(index);
        }
        item
    }

    /// Keeps the items that fulfil a condition.
    pub fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        self.lanes.iter_mut().for_each(|lane| lane.items.retain(&mut keep));
        self.lanes.retain(|lane| !lane.items.is_empty());
    }

    /// All items, client by client.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.lanes.iter().flat_map(|lane| &lane.items)
    }

    /// All items, client by client.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.lanes.iter_mut().flat_map(|lane| &mut lane.items)
    }

    /// The clients that wait.
    pub fn clients(&self) -> impl Iterator<Item = ClientId> {
        self.lanes.iter().map(|lane| lane.client)
    }

    /// How many items wait.
    pub fn len(&self) -> usize {
        self.lanes.iter().map(|lane| lane.items.len()).sum()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }
}

/// Turns that would follow.
#[derive(Debug)]
pub struct Turns<'a, T> {
    /// Client, what it holds, and what it still waits for, in the order of the lanes.
    lanes: Vec<((ClientId, usize), Iter<'a, T>)>,
}

impl<'a, T> Turns<'a, T> {
    /// Whose turn is next, and the item.
    pub fn peek(&self) -> Option<(ClientId, &'a T)> {
        let ((client, _), items) = &self.lanes[self.next_lane()?];
        items.clone().next().map(|item| (*client, item))
    }

    /// As if the next turn had been taken: its client holds one more.
    pub fn advance(&mut self) {
        let Some(index) = self.next_lane() else { return };
        let ((client, held), mut items) = self.lanes.remove(index);
        items.next();
        if items.len() > 0 {
            self.lanes.push(((client, held + 1), items));
        }
    }

    fn next_lane(&self) -> Option<usize> {
        (0..self.lanes.len()).min_by_key(|lane| self.lanes[*lane].0.1)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn queue(items: &[(u64, u32)]) -> FairQueue<u32> {
        let mut queue = FairQueue::default();
        items.iter().for_each(|(client, item)| queue.push_back(ClientId(*client), *item));
        queue
    }

    /// Takes all turns, where clients hold what they have taken and nothing is given back.
    fn check(items: &[(u64, u32)], expected: &[u32]) {
        let queue = queue(items);
        let mut turns = queue.turns(|_| 0);
        let taken: Vec<u32> = std::iter::from_fn(|| {
            let next = turns.peek().map(|(_, item)| *item);
            turns.advance();
            next
        })
        .collect();
        assert_eq!(taken, expected, "{items:?}");
    }

    #[test]
    fn one_client_is_first_come_first_served_and_several_take_turns() {
        check(&[(1, 10), (1, 11), (1, 12)], &[10, 11, 12]);
        check(&[(1, 10), (1, 11), (1, 12), (2, 20), (2, 21)], &[10, 20, 11, 21, 12]);
        check(&[(1, 10), (1, 11), (2, 20), (3, 30), (3, 31)], &[10, 20, 30, 11, 31]);
    }

    #[test]
    fn who_holds_less_goes_first() {
        let queue = queue(&[(1, 10), (2, 20), (2, 21), (2, 22)]);
        let mut turns = queue.turns(|client| if client == ClientId(1) { 2 } else { 0 });
        let mut taken = Vec::new();
        while let Some((_, item)) = turns.peek() {
            taken.push(*item);
            turns.advance();
        }
        assert_eq!(taken, [20, 21, 10, 22]);
    }

    #[test]
    fn what_is_given_back_comes_first_of_its_client() {
        let mut queue = queue(&[(1, 11), (2, 20)]);
        queue.push_front(ClientId(1), 10);
        assert_eq!(queue.iter().copied().collect::<Vec<_>>(), [10, 11, 20]);
        queue.retain(|item| *item != 20);
        assert_eq!((queue.len(), queue.clients().collect::<Vec<_>>()), (2, vec![ClientId(1)]));
    }

    #[derive(Debug, Clone)]
    enum Op {
        Arrive(u64),
        GiveBack(usize),
        Take,
    }

    fn op() -> impl Strategy<Value = Op> {
        // One client sends as much as all others.
        let client = prop_oneof![Just(0u64), 1..8u64];
        prop_oneof![
            3 => client.prop_map(Op::Arrive),
            2 => any::<usize>().prop_map(Op::GiveBack),
            3 => Just(Op::Take),
        ]
    }

    /// Clients and what each holds and waits for, kept beside the queue.
    #[derive(Default)]
    struct World {
        queue: FairQueue<u64>,
        held: Vec<ClientId>,
        expected: BTreeMap<ClientId, VecDeque<u64>>,
        /// Turns of other clients since a client's last one, while it waited and held no more than they did.
        passed_by: BTreeMap<ClientId, BTreeMap<ClientId, usize>>,
    }

    impl World {
        fn held(&self, client: ClientId) -> usize {
            self.held.iter().filter(|holder| **holder == client).count()
        }

        fn arrive(&mut self, client: ClientId, item: u64) {
            self.queue.push_back(client, item);
            self.expected.entry(client).or_default().push_back(item);
        }

        fn take(&mut self) {
            let next = self.queue.turns(|client| self.held(client)).peek().map(|(client, item)| (client, *item));
            assert_eq!(next.is_none(), self.expected.values().all(VecDeque::is_empty), "it conserves work");
            let Some((client, item)) = next else { return };
            let waiting = self.expected.iter().filter(|(_, items)| !items.is_empty()).map(|(client, _)| *client);
            let waiting: Vec<ClientId> = waiting.collect();
            let least = waiting.iter().map(|client| self.held(*client)).min();
            assert_eq!(Some(self.held(client)), least, "somebody holds less than {client:?}");
            let level = |other: &ClientId| *other != client && Some(self.held(*other)) == least;
            for other in waiting.iter().copied().filter(level).collect::<Vec<_>>() {
                let passed = self.passed_by.entry(other).or_default().entry(client).or_default();
                *passed += 1;
                assert!(*passed <= 1, "{client:?} had two turns while {other:?} held as little and waited");
            }
            self.passed_by.remove(&client);
            assert_eq!(self.queue.take(client), Some(item), "a turn gives what was announced");
            assert_eq!(self.expected.get_mut(&client).and_then(VecDeque::pop_front), Some(item), "in its own order");
            self.held.push(client);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

        /// 200 worlds of 500 steps: 100,000 virtual steps.
        #[test]
        fn clients_take_turns_whatever_they_send(ops in prop::collection::vec(op(), 500)) {
            let mut world = World::default();
            for (number, op) in ops.into_iter().enumerate() {
                match op {
                    Op::Arrive(client) => world.arrive(ClientId(client), number as u64),
                    Op::Take => world.take(),
                    Op::GiveBack(nth) if !world.held.is_empty() => {
                        world.held.swap_remove(nth % world.held.len());
                    }
                    Op::GiveBack(_) => (),
                }
            }
            let waiting = world.queue.len();
            for _ in 0..waiting {
                world.take();
            }
            prop_assert!(world.queue.is_empty());
        }
    }
}
