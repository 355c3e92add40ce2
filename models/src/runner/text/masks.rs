//! What grammars allow next, computed beside a device step.
//!
//! Owns: the threads' way there and back. A step takes a device milliseconds and a mask a thread microseconds, so that masks
//! are there before the logits. Does not know: what a grammar is.

use std::collections::HashMap;
use std::sync::mpsc::{self, Receiver, TryRecvError};

use rayon::Yield;
use tale_kernels::Mask;

use crate::error::Result;
use crate::grammar::Matching;
use crate::request::SessionId;

/// The masks of one step, as they are computed.
#[derive(Debug)]
pub struct Masks(Receiver<Computed>);

type Computed = (SessionId, Matching, Result<Mask>);

impl Masks {
    /// Begins to compute those of some sessions.
    pub fn begin(matchings: impl Iterator<Item = (SessionId, Matching)>) -> Self {
        let (sender, receiver) = mpsc::channel();
        for (id, mut matching) in matchings {
            let sender = sender.clone();
            rayon::spawn(move || {
                let mask = matching.mask();
                // Nobody waits where the step failed.
                let _ = sender.send((id, matching, mask));
            });
        }
        Self(receiver)
    }

    /// Waits for the last one: each comes back, with a mask or with what is wrong.
    pub fn finish(self) -> HashMap<SessionId, (Matching, Result<Mask>)> {
        let mut finished = HashMap::new();
        loop {
            let computed = match self.0.try_recv() {
                Err(TryRecvError::Empty) => match rayon::yield_now() {
                    // The caller is one of the threads that compute, maybe the only one: it has computed instead of waiting.
                    Some(Yield::Executed) => continue,
                    // Others are at what is left.
                    Some(Yield::Idle) | None => self.0.recv().ok(),
                },
                received => received.ok(),
            };
            let Some((id, matching, mask)) = computed else { return finished };
            finished.insert(id, (matching, mask));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::card::ModelCard;
    use crate::grammar::Asked;
    use crate::testing::{Script, text_model};

    /// There the threads that compute masks are those that wait for them.
    #[test]
    fn a_thread_that_computes_can_wait_for_masks() {
        let ModelCard::Text(card) = text_model(Script::default()).expect("made").card else {
            panic!("a language model")
        };
        let grammar = card.grammars.compile(Asked::json_object("f")).expect("compiles");
        for threads in [1, 2] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            let matchings = (0..5).map(|id| (SessionId(id), grammar.begin()));
            let masks = pool.install(|| Masks::begin(matchings).finish());
            assert_eq!(masks.len(), 5);
            assert!(masks.values().all(|(_, mask)| mask.is_ok()));
        }
    }
}
