//! How language models guess tokens, as far as configurations say it.
//!
//! Owns: the keys, their defaults, and that they fit each other. Does not know: how a guess is made.

use std::num::NonZeroUsize;

use tale_models::runner::text::lookup::PromptLookup;

/// Last tokens that are looked for where nothing is said of them.
pub(super) const DEFAULT_MIN: usize = 2;
pub(super) const DEFAULT_MAX: usize = 4;

/// What is said of all models, or of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Guesses {
    /// Most tokens of a guess; 0 guesses none, which is the default.
    pub num_speculative_tokens: Option<usize>,
    /// Fewest last tokens that have to stand in a text once more.
    pub prompt_lookup_min: Option<NonZeroUsize>,
    /// Most last tokens that are looked for.
    pub prompt_lookup_max: Option<NonZeroUsize>,
}

/// Takes a key's value: whether it is one, and the first.
type Set = fn(&mut Guesses, usize) -> bool;

/// Fewer tokens are looked for than have to be found.
#[derive(Debug, thiserror::Error)]
#[error("prompt_lookup_min is {min}; allowed: 1 to {max}, which is prompt_lookup_max")]
pub struct TooFewLookedFor {
    /// Fewest tokens that have to be found.
    pub min: usize,
    /// Most that are looked for.
    pub max: usize,
}

impl Guesses {
    /// The keys, as configurations and command lines name them, each with what takes its value.
    pub(super) const KEYS: [(&'static str, Set); 3] = [
        ("num_speculative_tokens", |guesses, tokens| guesses.num_speculative_tokens.replace(tokens).is_none()),
        ("prompt_lookup_min", |guesses, tokens| set(&mut guesses.prompt_lookup_min, tokens)),
        ("prompt_lookup_max", |guesses, tokens| set(&mut guesses.prompt_lookup_max, tokens)),
    ];

    /// These, with `others` for what they leave out.
    pub(super) fn over(self, others: Self) -> Self {
        Self {
            num_speculative_tokens: self.num_speculative_tokens.or(others.num_speculative_tokens),
            prompt_lookup_min: self.prompt_lookup_min.or(others.prompt_lookup_min),
            prompt_lookup_max: self.prompt_lookup_max.or(others.prompt_lookup_max),
        }
    }

    /// How tokens are guessed; `None` where they are not.
    pub(super) fn chosen(self) -> Result<Option<PromptLookup>, TooFewLookedFor> {
        let min = self.prompt_lookup_min.map_or(DEFAULT_MIN, NonZeroUsize::get);
        let max = self.prompt_lookup_max.map_or(DEFAULT_MAX, NonZeroUsize::get);
        if min > max {
            return Err(TooFewLookedFor { min, max });
        }
        let lookup = |num_speculative_tokens| PromptLookup {
            num_speculative_tokens,
            prompt_lookup_min: min,
            prompt_lookup_max: max,
        };
        Ok(self.num_speculative_tokens.filter(|tokens| *tokens > 0).map(lookup))
    }
}

/// Whether there was no value before, and this one is one.
fn set(value: &mut Option<NonZeroUsize>, tokens: usize) -> bool {
    let is_first = value.is_none();
    *value = NonZeroUsize::new(tokens);
    is_first && value.is_some()
}
