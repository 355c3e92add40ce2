//! What a language model supplies to the runner.
//!
//! Owns: the trait of networks, and one with the tokens around it. Does not know: any architecture, sessions, steps.

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::kv::{KvCaches, KvShape};
use crate::layers::decoder::{DecoderInput, PreparedInput};
use crate::tokenizer::Tokenizer;

/// A network that gives the logits of the token after each row of a step; the runner does the rest.
///
/// A row's logits have the same bits whatever other rows its step has, and in whichever chunks its sequence came.
pub trait CausalLm: Send {
    /// Tokens of the vocabulary.
    fn vocab_size(&self) -> usize;

    /// Most tokens of prompt and answer together.
    fn context_len(&self) -> usize;

    /// What the KV cache of one token consists of.
    fn kv_shape(&self) -> KvShape;

    /// Whether [`CausalLm::logits`] are computed by nothing but launches of our own, so that a decode step can be recorded.
    fn is_recordable(&self) -> bool {
        true
    }

    /// Why nothing more can be computed, if so: a part of the network is gone.
    fn problem(&self) -> Option<Error> {
        None
    }

    /// Checks a step and takes it to the device.
    fn prepare<'a>(&self, input: &'a DecoderInput, caches: &KvCaches) -> Result<PreparedInput<'a>>;

    /// Writes the new rows' keys and values into `caches` and computes the last hidden states `[rows, n]` of the rows that
    /// were asked for, in the order of asking; `None` when none were. Nothing but launches where it says that it can be
    /// recorded.
    fn states(&self, input: &PreparedInput<'_>, caches: &KvCaches) -> Result<Option<Tensor>>;

    /// Logits `[rows, vocab_size]` of such states, in the compute dtype. Nothing but launches, too.
    fn head(&self, states: &Tensor) -> Result<Tensor>;

    /// Logits `[rows, vocab_size]` of the rows that were asked for: [`CausalLm::head`] of [`CausalLm::states`].
    fn logits(&self, input: &PreparedInput<'_>, caches: &KvCaches) -> Result<Option<Tensor>> {
        self.states(input, caches)?.map(|states| self.head(&states)).transpose()
    }

    /// [`CausalLm::logits`] of a step that is not recorded.
    fn forward(&self, input: &DecoderInput, caches: &KvCaches) -> Result<Option<Tensor>> {
        self.logits(&self.prepare(input, caches)?, caches)
    }
}

/// A language model with the tokens at which its answers end.
#[derive(Debug)]
pub struct LanguageModel<M> {
    /// Tokens to logits.
    pub network: M,
    /// Tokens to text.
    pub tokenizer: Tokenizer,
    /// An answer ends with any of these.
    pub eos_token_ids: Vec<u32>,
}
