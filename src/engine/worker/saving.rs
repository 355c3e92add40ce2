//! Checkpoints of sessions: when they are made, and the end of all work in this process.
//!
//! Owns: how often. Does not know: what is in a checkpoint, or where it is kept.

use std::time::Duration;

use tale_models::{Error, Event, SessionId};

use super::{Clock, DeviceWorker, IS_THERE, guarded};

/// Checkpoints take one part in so many of a session's time at most: 2 %.
const SHARE: u32 = 50;

/// The last checkpoint of a session.
#[derive(Debug, Clone, Copy)]
pub(super) struct Saved {
    /// When it was there.
    at: Duration,
    /// How long making it took.
    cost: Duration,
}

/// Whether it is time for the next one: the first comes with the first step after which there is one.
fn is_due(last: Option<Saved>, now: Duration) -> bool {
    last.is_none_or(|Saved { at, cost }| now.saturating_sub(at) >= cost.saturating_mul(SHARE))
}

impl<C: Clock> DeviceWorker<C> {
    /// Makes the checkpoints that are due of those that the last step has brought on. Their events of that step are in their
    /// mailboxes.
    pub(super) fn save_due(&mut self) {
        let now = self.clock.now();
        for id in std::mem::take(&mut self.moved) {
            if self.sessions.get(&id).is_some_and(|live| is_due(live.saved, now)) {
                self.save(id);
            }
        }
    }

    /// Makes a checkpoint of a session, if there is something to keep. One that cannot be made ends nothing.
    pub(super) fn save(&mut self, id: SessionId) {
        let Some(live) = self.sessions.get_mut(&id).filter(|live| live.is_handed_over) else { return };
        let before = self.clock.now();
        let slot = self.slots.get_mut(&live.model).expect(IS_THERE);
        let made = guarded(|| slot.runner.checkpoint(id));
        let at = self.clock.now();
        let cost = at.saturating_sub(before);
        match made {
            Ok(None) => return,
            Ok(Some(checkpoint)) => {
                let bytes = checkpoint.as_bytes().len();
                tracing::debug!(bytes, ?cost, frames = checkpoint.frames_done(), "a checkpoint of a session");
                slot.metrics.checkpoint(bytes, cost);
                live.mailbox.put(Event::Checkpoint(checkpoint));
                self.to_wake.push(live.mailbox.clone());
            }
            Err(error) => tracing::warn!(%error, "a checkpoint of a session could not be made"),
        }
        live.saved = Some(Saved { at, cost });
    }

    /// Ends all sessions, those whose checkpoints are wanted with one where they have come so far. Between two steps, as every
    /// command comes.
    pub(super) fn hand_over(&mut self) {
        self.is_handing_over = true;
        let mut ids: Vec<SessionId> = self.sessions.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            let Some(live) = self.sessions.get(&id) else { continue };
            let model = live.model;
            if live.options.checkpoints {
                self.save(id);
            }
            self.withdraw(id, model);
            self.fail(id, Error::HandedOver);
        }
        self.wake_readers();
        self.publish_gauges();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_take_a_fiftieth_of_the_time() {
        let seconds = Duration::from_secs_f64;
        let saved = |at, cost| Some(Saved { at: seconds(at), cost: seconds(cost) });
        for (last, now, due) in [
            (None, 0.0, true),
            (saved(10.0, 0.0), 10.0, true),
            (saved(10.0, 0.5), 34.9, false),
            (saved(10.0, 0.5), 35.0, true),
            (saved(10.0, 0.5), 9.0, false),
        ] {
            assert_eq!(is_due(last, seconds(now)), due, "{last:?} at {now}");
        }
        // Steps of a second, each checkpoint a tenth: 1 in 5 of them.
        let (mut now, mut last, mut made) = (0.0, None, 0);
        for _ in 0..1000 {
            now += 1.0;
            if is_due(last, seconds(now)) {
                now += 0.1;
                last = saved(now, 0.1);
                made += 1;
            }
        }
        assert!((0.018..=0.021).contains(&(f64::from(made) * 0.1 / now)), "{made} in {now} s");
    }
}
