//! Launches of `sample.cu`; shapes are checked by the caller.

use candle_core::{DType, Result, Tensor};

use super::{Choice, Draw, Penalties, min_weight};
use crate::gpu::{Launch, by_dtype, module, output};

module!(SAMPLE, "sample");

/// `THREADS` of the file.
const MAX_THREADS: usize = 1024;
/// Words of a row's parameters, and of a penalised row's, in the kernels.
const ROW_WORDS: usize = 8;
const PENALTY_WORDS: usize = 6;
/// Of a row without penalties.
const NOTHING: u32 = u32::MAX;

/// One copy to the device, one or two launches, one copy of two words per row back.
pub(super) fn sample(logits: &Tensor, draws: &[Draw]) -> Result<Vec<Choice>> {
    if draws.is_empty() {
        return Ok(Vec::new());
    }
    let (logits, vocab) = (logits.contiguous()?, logits.dim(1)?);
    let words = Words::of(draws);
    let threads = vocab.div_ceil(16 / logits.dtype().size_in_bytes()).next_multiple_of(32).clamp(32, MAX_THREADS);
    let all = Tensor::from_slice(&words.all, words.all.len(), logits.device())?;
    let penalised = if words.penalised > 0 { Some(penalise(&logits, &words, &all, threads)?) } else { None };
    let chosen = output((2, draws.len()), DType::U32, &logits)?;
    Launch::new(&SAMPLE, by_dtype!("sample", logits.dtype()), [draws.len(), 1, 1], threads)?
        .tensor(&logits)?
        .optional(penalised.as_ref())?
        .tensor(&all)?
        .tensor(&chosen)?
        .i64(vocab)
        .run(&logits)?;
    let chosen: Vec<u32> = chosen.flatten_all()?.to_vec1()?;
    let (tokens, finite) = chosen.split_at(draws.len());
    Ok(tokens.iter().zip(finite).map(|(token, finite)| Choice { token: *token, is_finite: *finite != 0 }).collect())
}

/// Rows with penalties, changed, in f32.
fn penalise(logits: &Tensor, words: &Words, all: &Tensor, threads: usize) -> Result<Tensor> {
    let vocab = logits.dim(1)?;
    let penalised = output((words.penalised, vocab), DType::F32, logits)?;
    let part = |start: usize| all.narrow(0, start, all.elem_count() - start);
    Launch::new(&SAMPLE, by_dtype!("penalise", logits.dtype()), [words.penalised, 1, 1], threads)?
        .tensor(logits)?
        .tensor(&penalised)?
        .tensor(&part(words.penalties)?)?
        .tensor(&part(words.entries)?)?
        .i64(vocab)
        .run(logits)?;
    Ok(penalised)
}

/// Everything that the kernels read beside logits: parameters of all rows, penalties of those that have any, and their
/// tokens with their counts.
struct Words {
    all: Vec<u32>,
    /// Rows with penalties.
    penalised: usize,
    /// Where penalties begin, and entries.
    penalties: usize,
    entries: usize,
}

impl Words {
    fn of(draws: &[Draw]) -> Self {
        let penalised = draws.iter().filter(|draw| draw.penalties.is_some()).count();
        let penalties = draws.len() * ROW_WORDS;
        let entries = penalties + penalised * PENALTY_WORDS;
        let mut all = Vec::with_capacity(entries);
        let with_penalties = draws.iter().scan(0, |next, draw| {
            let row = draw.penalties.as_ref().map(|_| *next);
            *next += u32::from(row.is_some());
            Some((draw, row))
        });
        all.extend(with_penalties.flat_map(|(draw, row)| row_words(draw, row)));
        let lists = || draws.iter().enumerate().filter_map(|(row, draw)| Some((row, draw.penalties.as_ref()?)));
        let mut begin = 0;
        for (row, list) in lists() {
            let end = begin + list.counts.len() as u32;
            all.extend(penalty_words(row, begin..end, list));
            begin = end;
        }
        all.extend(lists().flat_map(|(_, list)| list.counts.iter().flat_map(|(id, count)| [*id, *count])));
        // A list without tokens still has an address.
        all.push(0);
        Self { all, penalised, penalties, entries }
    }
}

/// `Parameters` of the file.
fn row_words(draw: &Draw, penalised_row: Option<u32>) -> [u32; ROW_WORDS] {
    let halves = |word: u64| [word as u32, (word >> 32) as u32];
    let (min_weight, random) = (halves(min_weight(draw.min_p)), halves(draw.random));
    // Larger than any vocabulary keeps all, as 0 does.
    let top_k = u32::try_from(draw.top_k).unwrap_or(0);
    let row = penalised_row.unwrap_or(NOTHING);
    let [min_low, min_high] = min_weight;
    [draw.temperature.to_bits(), draw.top_p.to_bits(), top_k, row, min_low, min_high, random[0], random[1]]
}

fn penalty_words(row: usize, entries: std::ops::Range<u32>, penalties: &Penalties) -> [u32; PENALTY_WORDS] {
    let Penalties { repetition, presence, frequency, .. } = penalties;
    [row as u32, entries.start, entries.end, repetition.to_bits(), presence.to_bits(), frequency.to_bits()]
}
