//! Compiled grammars, the ones used last.
//!
//! Owns: how many are kept. Does not know: how they are made.

use std::collections::VecDeque;

use super::{Form, Grammar};

/// Most grammars of one model.
const MAX_GRAMMARS: usize = 64;
/// Bytes of all of them, beyond which the one used longest ago goes; sessions that use it keep it until they end.
const MAX_BYTES: usize = 128 << 20;

/// The one used last comes last.
#[derive(Debug, Default)]
pub(super) struct Cache(VecDeque<Grammar>);

impl Cache {
    pub(super) fn find(&mut self, form: &Form) -> Option<Grammar> {
        let place = self.0.iter().position(|grammar| grammar.form() == form)?;
        let found = self.0.remove(place)?;
        self.0.push_back(found.clone());
        Some(found)
    }

    pub(super) fn keep(&mut self, grammar: Grammar) {
        self.0.push_back(grammar);
        // Automata grow while they are used, so that all are asked.
        let mut bytes: usize = self.0.iter().map(Grammar::num_bytes).sum();
        while self.0.len() > MAX_GRAMMARS || (bytes > MAX_BYTES && self.0.len() > 1) {
            let Some(oldest) = self.0.pop_front() else { return };
            bytes -= oldest.num_bytes().min(bytes);
        }
    }
}
