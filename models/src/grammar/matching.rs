//! Where one answer is in its grammar.
//!
//! Owns: the tokens that may come next, and taking the one that came. Does not know: which one is taken, and why.

use llguidance::Matcher;
use llguidance::api::StopReason;
use tale_kernels::Mask;

use super::problem;
use crate::error::{Error, Result};
use crate::unpanicked::unpanicked;

/// The state of one answer.
pub struct Matching {
    matcher: Matcher,
    field: String,
}

impl std::fmt::Debug for Matching {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Matching({})", self.field)
    }
}

impl Matching {
    pub(super) fn new(matcher: Matcher, field: String) -> Self {
        Self { matcher, field }
    }

    /// The tokens that may come next: those with which the answer can still become one of the grammar, and those that end
    /// it where it is one. Takes some tens of microseconds for JSON, milliseconds at most.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`] where the grammar takes more states or work than there may be, or the vocabulary lacks the
    /// token that it needs.
    pub fn mask(&mut self) -> Result<Mask> {
        let computed = unpanicked(|| self.matcher.compute_mask()).map_err(Some);
        let mask = computed.and_then(|computed| computed.map_err(|_| None));
        mask.map(|mask| Mask::new(mask.as_slice().to_vec())).map_err(|_| self.error())
    }

    /// Takes a token, and says whether the answer is complete with it: nothing but its end could follow.
    ///
    /// # Errors
    ///
    /// As [`Matching::mask`]; also for a token that the mask did not have.
    pub fn accept(&mut self, token: u32) -> Result<bool> {
        match unpanicked(|| self.matcher.consume_token(token)) {
            Ok(Ok(())) => Ok(self.matcher.is_stopped()),
            _ => Err(self.error()),
        }
    }

    /// In our own words: the library's repeat the answer.
    fn error(&self) -> Error {
        let problem = match self.matcher.stop_reason() {
            StopReason::LexerTooComplex | StopReason::ParserTooComplex => problem::TOO_MUCH,
            _ => problem::NO_TOKEN,
        };
        Error::invalid(&self.field, problem)
    }
}
