//! Decode steps as recordings: on a GPU a small step takes the host longer to launch, kernel by kernel, than the GPU to
//! compute.
//!
//! Owns: recordings by the shape of their launches, and filling a step up to such a shape. Does not know: sessions.

use std::collections::VecDeque;

use candle_core::Tensor;
use tale_kernels::work::{self, Counted, Work};
use tale_kernels::{Recording, copy_into};

use super::model::CausalLm;
use crate::error::{Error, Result};
use crate::kv::{BlockTable, KvCaches};
use crate::layers::decoder::{DecoderInput, PreparedInput};

/// Most recordings of one model; the one used longest ago goes first. There is one for each bucket of rows and of block
/// table lengths.
const MAX_RECORDINGS: usize = 32;
/// Steps of more rows keep the GPU busy for longer than their launches take.
const MAX_ROWS: usize = 64;

/// The recorded decode steps of one network over one set of caches.
#[derive(Debug)]
pub struct DecodeRecordings {
    /// The one used last comes last.
    recordings: VecDeque<Recorded>,
    /// A block that belongs to no sequence: rows that only fill a bucket write there.
    filler: BlockTable,
}

#[derive(Debug)]
struct Recorded {
    /// Its tensors have the addresses that were recorded.
    input: PreparedInput<'static>,
    size: Size,
    logits: Tensor,
    recording: Recording,
}

impl DecodeRecordings {
    /// `filler` has one block, of which nobody else knows.
    pub fn new(filler: BlockTable) -> Self {
        Self { recordings: VecDeque::new(), filler }
    }

    /// Whether a step is of the kind that is recorded: few sequences of one token each, all of whose logits are wanted.
    pub fn takes(input: &DecoderInput) -> bool {
        (1..=MAX_ROWS).contains(&input.len()) && input.is_decode()
    }

    /// As [`CausalLm::forward`], for a step that is taken. The logits are overwritten by the next step. Counted is what the
    /// step itself does, without the rows that only fill it up.
    pub fn forward<M: CausalLm>(&mut self, network: &M, input: DecoderInput, caches: &KvCaches) -> Result<Tensor> {
        let size = Size::of(&input);
        let (recorded, counted) = work::count(|| self.filled_up(network, input, caches));
        let recorded = recorded?;
        work::add(recorded.size.counted_of(size, counted));
        let logits = recorded.logits.narrow(0, 0, size.rows)?;
        if self.recordings.len() == MAX_RECORDINGS {
            self.recordings.pop_front();
        }
        self.recordings.push_back(recorded);
        Ok(logits)
    }

    /// The recording, new or repeated, that has computed this step.
    fn filled_up<M: CausalLm>(&mut self, network: &M, mut input: DecoderInput, caches: &KvCaches) -> Result<Recorded> {
        let rows = input.len();
        for _ in rows..bucket(rows) {
            input.push(&[0], 0, &self.filler);
            input.want_logits_of_last_row();
        }
        let prepared = network.prepare(&input, caches)?;
        match self.take(&prepared) {
            Some(recorded) => {
                recorded.input.refill(&prepared)?;
                recorded.recording.replay()?;
                Ok(recorded)
            }
            None => Recorded::new(network, prepared.into_owned(), Size::of(&input), caches),
        }
    }

    fn take(&mut self, input: &PreparedInput<'_>) -> Option<Recorded> {
        let place = self.recordings.iter().position(|recorded| recorded.input.launches_as(input))?;
        self.recordings.remove(place)
    }

    /// How many steps are recorded.
    pub fn len(&self) -> usize {
        self.recordings.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.recordings.is_empty()
    }
}

impl Recorded {
    /// Computes the step, which loads every kernel that it needs, and records it for the next ones.
    fn new<M: CausalLm>(network: &M, input: PreparedInput<'static>, size: Size, caches: &KvCaches) -> Result<Self> {
        let compute = || {
            let logits = network.logits(&input, caches)?;
            Ok(logits.expect("a step that is taken wants logits: this is a bug"))
        };
        let logits = compute()?.copy()?;
        let recording = Recording::of(&logits, || {
            let again = compute().map_err(|error: Error| candle_core::Error::wrap(error))?;
            copy_into(&again, &logits)
        })?;
        Ok(Self { input, size, logits, recording })
    }
}

/// What decides about the work of a decode step.
#[derive(Debug, Clone, Copy)]
struct Size {
    /// Sequences, of one token each.
    rows: usize,
    /// Positions of all of them, the new ones included.
    context: usize,
}

impl Size {
    fn of(input: &DecoderInput) -> Self {
        Self { rows: input.len(), context: input.context() }
    }

    /// What a step of size `step` does, if one of this size with the same launches does what was `counted`: products
    /// grow with the rows, attention with the contexts, and weights are read once whatever the size.
    fn counted_of(self, step: Self, counted: Counted) -> Counted {
        let rows = step.rows as f64 / self.rows as f64;
        let context = step.context as f64 / self.context as f64;
        let Counted { dense, paged } = counted;
        Counted {
            dense: Work { flops: dense.flops * rows, ..dense },
            paged: Work { flops: paged.flops * context, bytes: paged.bytes * context },
        }
    }
}

/// Rows that a step is filled up to.
fn bucket(rows: usize) -> usize {
    if rows <= 16 { rows.next_power_of_two() } else { rows.next_multiple_of(16) }
}
