//! Sessions that have not begun go to other devices of their model.
//!
//! Owns: when they do, and out of which books. Does not know: how they get there ([`crate::engine::peers`]).

use tale_models::{Error, Request, SessionId};

use super::slot::Slot;
use super::{Clock, DeviceWorker, Live, guarded};
use crate::engine::arbiter::RunnerKey;
use crate::engine::command::Order;
use crate::engine::peers::Peer;
use crate::engine::shapes::Shape;

impl<C: Clock> DeviceWorker<C> {
    /// The device will not work again: what has not begun goes to others, and the rest ends.
    pub(super) fn quarantine(&mut self, problem: &Error) {
        tracing::error!(%problem, "the device has failed and is given no more work");
        self.gauges.fail(problem.to_string());
        self.publish_events();
        let waiting: Vec<SessionId> =
            self.sessions.iter().filter(|(_, live)| live.place.is_some()).map(|(id, _)| *id).collect();
        for id in waiting {
            if let Some(request) = self.take_back(id) {
                self.give_away(id, request);
            }
        }
        let begun: Vec<SessionId> = self.sessions.keys().copied().collect();
        begun.into_iter().for_each(|id| self.fail(id, problem.restate()));
        self.stop_loading(problem);
    }

    /// Gives sessions that had to wait behind this step to devices that have nothing to do.
    pub(super) fn offer(&mut self) {
        let with_peers = |(runner, slot): (&RunnerKey, &Slot)| {
            let has_both = !slot.peers.is_empty() && slot.has_waiting();
            has_both.then(|| (*runner, slot.peers.clone()))
        };
        let waiting: Vec<_> = self.slots.iter().filter_map(with_peers).collect();
        for (runner, peers) in waiting {
            for peer in peers {
                if !peer.take_idleness() {
                    continue;
                }
                let Some((id, request)) = self.take_next(runner) else {
                    peer.give_idleness_back();
                    break;
                };
                self.give(id, request, &peer);
            }
        }
    }

    /// Takes a session that has not begun out of the queue of a runner, or out of the runner, the one that came last.
    fn take_next(&mut self, runner: RunnerKey) -> Option<(SessionId, Request)> {
        if let Some((_, waiting)) = self.slot(runner).queue.next() {
            let id = waiting.id;
            return self.take_back(id).map(|request| (id, request));
        }
        let of_runner = self.sessions.iter().filter(|(_, live)| live.model == runner && live.place.is_some());
        let mut ids: Vec<SessionId> = of_runner.map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids.into_iter().rev().find_map(|id| self.take_back(id).map(|request| (id, request)))
    }

    /// The request of a session that has not begun, which is then in the books alone; `None` where it has.
    fn take_back(&mut self, id: SessionId) -> Option<Request> {
        let Live { model, is_handed_over, .. } = *self.sessions.get(&id)?;
        let Slot { runner, queue, .. } = self.slot_mut(model);
        if is_handed_over {
            return guarded(|| Ok(runner.take_back(id))).ok().flatten();
        }
        queue.waiting.take_where(|waiting| waiting.id == id).map(|waiting| waiting.request)
    }

    /// Sends a session that has not begun to any other device of its model, or ends it.
    pub(super) fn give_away(&mut self, id: SessionId, request: Request) {
        let Some(live) = self.sessions.get(&id) else { return };
        let peers = self.slot(live.model).peers.clone();
        match peers
            .iter()
            .filter(|peer| peer.is_alive())
            .min_by(|a, b| a.backlog_seconds().total_cmp(&b.backlog_seconds()))
        {
            Some(peer) => self.give(id, request, peer),
            None => {
                let problem = self.gauges.problem().unwrap_or_else(|| "the device has failed".into());
                self.fail(id, Error::Device(problem));
            }
        }
    }

    /// Sends a session that has not begun to another device; it stays where that has gone.
    fn give(&mut self, id: SessionId, request: Request, peer: &Peer) {
        let Some(Live { client, model, mailbox, place: Some(place), options, predicted_seconds, .. }) = self.unbook(id)
        else {
            return;
        };
        let order = Order { id, client, model, request, mailbox, place, options, predicted_seconds };
        if let Err(order) = peer.give(order) {
            self.slot(model).gauges.enter(Shape::of(&order.request), predicted_seconds);
            self.submit(Order { model, ..*order });
        }
    }
}
