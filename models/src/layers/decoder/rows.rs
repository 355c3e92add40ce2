//! The rows of a text runner's step: pieces of sequences whose keys and values lie in a paged cache.

use std::borrow::Cow;

use candle_core::Tensor;
use tale_kernels::{PagedBatch, PreparedBatch};

use crate::error::Result;
use crate::kv::{BLOCK_SIZE, BlockTable, KvCaches};

/// The rows of one step: pieces of sequences, one after the other.
#[derive(Debug, Clone, Default)]
pub struct DecoderInput {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    paged: PagedBatch,
    logit_rows: Vec<u32>,
}

impl DecoderInput {
    /// Adds `tokens` of a sequence from position `start` on; keys and values of all earlier positions are in the
    /// cache, and `table` has room for the new ones.
    pub fn push(&mut self, tokens: &[u32], start: usize, table: &BlockTable) {
        let context_len = start + tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.positions.extend(start as u32..context_len as u32);
        self.paged.slot_mapping.extend((start..context_len).map(|position| table.slot(position)));
        self.paged.cu_seqlens_q.push(self.tokens.len());
        self.paged.context_lens.push(context_len);
        self.paged.block_tables.push(table.blocks()[..context_len.div_ceil(BLOCK_SIZE)].to_vec());
    }

    /// Asks for the logits of the row pushed last.
    pub fn want_logits_of_last_row(&mut self) {
        self.want_logits_of_last_rows(1);
    }

    /// Asks for the logits of so many rows pushed last.
    pub fn want_logits_of_last_rows(&mut self, count: usize) {
        let end = self.tokens.len() as u32;
        self.logit_rows.extend(end - count as u32..end);
    }

    /// Asks for the logits of these rows, behind those that were asked for before.
    pub fn want_logits_of(&mut self, rows: std::ops::Range<usize>) {
        self.logit_rows.extend(rows.start as u32..rows.end as u32);
    }

    /// Rows that were asked for.
    pub fn num_wanted(&self) -> usize {
        self.logit_rows.len()
    }

    /// The token of each row.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Where each row stands in its sequence.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Positions that the rows' sequences have behind them, the rows included, summed over the sequences.
    pub fn context(&self) -> usize {
        self.paged.context_lens.iter().sum()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Whether every sequence has one row, all of whose logits are wanted.
    pub fn is_decode(&self) -> bool {
        self.paged.context_lens.len() == self.len() && self.logit_rows.len() == self.len()
    }

    /// Asks for the logits of all rows, as a comparison with a reference does.
    pub fn want_all_logits(&mut self) {
        self.logit_rows = (0..self.tokens.len() as u32).collect();
    }
}

/// Rows whose logits are wanted.
#[derive(Debug)]
enum LogitRows {
    None,
    All,
    /// u32.
    These(Tensor),
}

/// A [`DecoderInput`] on its device.
#[derive(Debug)]
pub struct PreparedInput<'a> {
    /// u32, `[l]`.
    pub(super) tokens: Tensor,
    /// f32, `[l, head_dim / 2]`.
    pub(super) cos: Tensor,
    pub(super) sin: Tensor,
    pub(super) paged: PreparedBatch<'a>,
    logit_rows: LogitRows,
    input: Cow<'a, DecoderInput>,
}

impl<'a> PreparedInput<'a> {
    /// Checks the step against `caches` and queries of so many heads. `rotation` has the cosines and sines
    /// `[l, head_dim / 2]` of the rows' positions.
    pub fn new(input: &'a DecoderInput, (cos, sin): (Tensor, Tensor), heads: usize, caches: &KvCaches) -> Result<Self> {
        let first = caches.layers().first().expect("a checked configuration has layers: this is a bug");
        let device = first.k().device();
        let wants_all = input.logit_rows.iter().copied().eq(0..input.tokens.len() as u32);
        let logit_rows = match input.logit_rows.as_slice() {
            [] => LogitRows::None,
            _ if wants_all => LogitRows::All,
            rows => LogitRows::These(Tensor::new(rows, device)?),
        };
        let tokens = Tensor::new(input.tokens.as_slice(), device)?;
        let paged = input.paged.prepare(heads, first)?;
        Ok(Self { tokens, cos, sin, paged, logit_rows, input: Cow::Borrowed(input) })
    }
}

impl PreparedInput<'_> {
    /// What was prepared, in memory of the host.
    pub fn input(&self) -> &DecoderInput {
        &self.input
    }

    /// Token ids, u32 `[l]`.
    pub fn tokens(&self) -> &Tensor {
        &self.tokens
    }

    /// Of vectors `[l, n]` of all rows those of the rows whose logits are wanted; `None` when none are.
    pub fn asked_for(&self, vectors: &Tensor) -> Result<Option<Tensor>> {
        match &self.logit_rows {
            LogitRows::None => Ok(None),
            LogitRows::All => Ok(Some(vectors.clone())),
            LogitRows::These(rows) => Ok(Some(tale_kernels::embedding(rows, vectors)?)),
        }
    }

    /// The same, on its own: for a recording that outlasts its first step.
    pub fn into_owned(self) -> PreparedInput<'static> {
        let Self { tokens, cos, sin, paged, logit_rows, input } = self;
        let input = Cow::Owned(input.into_owned());
        PreparedInput { tokens, cos, sin, paged: paged.into_owned(), logit_rows, input }
    }

    /// Whether a recording of this step serves the other one; both want the logits of all rows.
    pub fn launches_as(&self, other: &PreparedInput<'_>) -> bool {
        let both_want_all = matches!((&self.logit_rows, &other.logit_rows), (LogitRows::All, LogitRows::All));
        both_want_all && self.paged.launches_as(&other.paged)
    }

    /// Writes another step's values where this one's lie.
    pub fn refill(&self, with: &PreparedInput<'_>) -> Result<()> {
        self.tokens.slice_set(&with.tokens, 0, 0)?;
        self.cos.slice_set(&with.cos, 0, 0)?;
        self.sin.slice_set(&with.sin, 0, 0)?;
        Ok(self.paged.refill(&with.paged)?)
    }
}
