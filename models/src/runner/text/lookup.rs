//! What comes next, guessed from what came before: the tokens behind the last place where a sequence said what it has just said.
//! A model need not be asked for that, and where an answer repeats its prompt (a text rewritten, code changed) it is often right.
//!
//! Owns: the search. Does not know: who asks, and what becomes of a guess.
//!
//! Prompt lookup decoding (Saxena 2023); as vLLM's method `ngram`.

/// How guesses are made; the names are vLLM's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptLookup {
    /// Most tokens of a guess, at least one.
    pub num_speculative_tokens: usize,
    /// Fewest last tokens that have to be found again, at least one.
    pub prompt_lookup_min: usize,
    /// Most last tokens that are looked for.
    pub prompt_lookup_max: usize,
}

impl PromptLookup {
    /// The tokens that may follow `tokens`, none where nothing is found: those behind the longest end of `tokens` that stands
    /// in them once more, and of several the last.
    pub fn guess<'a>(&self, tokens: &'a [u32]) -> &'a [u32] {
        let Some((last, before)) = tokens.split_last() else { return &[] };
        let mut best = (0, 0);
        for end in (0..before.len()).rev().filter(|end| before[*end] == *last) {
            let pairs = tokens[..=end].iter().rev().zip(tokens.iter().rev());
            let found = pairs.take(self.prompt_lookup_max).take_while(|(a, b)| a == b).count();
            if found > best.0 {
                best = (found, end + 1);
            }
            if found == self.prompt_lookup_max {
                break;
            }
        }
        let (found, next) = best;
        match found >= self.prompt_lookup_min.max(1) {
            true => &tokens[next..tokens.len().min(next + self.num_speculative_tokens)],
            false => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOKUP: PromptLookup = PromptLookup { num_speculative_tokens: 3, prompt_lookup_min: 2, prompt_lookup_max: 4 };

    fn check(tokens: &[u32], expected: &[u32]) {
        assert_eq!(LOOKUP.guess(tokens), expected, "{tokens:?}");
    }

    #[test]
    fn what_followed_the_same_words_is_guessed() {
        check(&[1, 2, 3, 4, 5, 6, 1, 2], &[3, 4, 5]);
        // What is left of the text.
        check(&[1, 2, 3, 1, 2], &[3, 1, 2]);
        check(&[7, 7, 7], &[7]);
    }

    #[test]
    fn the_longest_end_counts_and_of_equal_ones_the_last() {
        check(&[1, 2, 3, 8, 9, 2, 3, 5, 9, 1, 2, 3], &[8, 9, 2]);
        check(&[2, 3, 8, 2, 3, 9, 2, 3], &[9, 2, 3]);
        // Not more of it than is looked for.
        check(&[1, 2, 3, 4, 5, 8, 2, 3, 4, 5, 9, 1, 2, 3, 4, 5], &[9, 1, 2]);
    }

    #[test]
    fn nothing_is_guessed_where_too_little_is_found() {
        check(&[], &[]);
        check(&[1], &[]);
        check(&[1, 2, 3, 4], &[]);
        check(&[1, 2, 9, 2], &[]);
    }
}
