//! What grammars allow next, computed beside a device step.
//!
//! Owns: the threads' way there and back. A step takes a device milliseconds and a mask a thread microseconds, so that masks
//! are there before the logits. Does not know: what a grammar is.

use std::collections::HashMap;
use std::sync::mpsc::{self, Receiver};

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
        self.0.into_iter().map(|(id, matching, mask)| (id, (matching, mask))).collect()
    }
}
