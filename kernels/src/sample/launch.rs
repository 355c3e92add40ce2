//! Launches of `sample.cu`; shapes are checked by the caller.

use std::ops::Range;

use candle_core::{DType, Result, Tensor};

use super::{Choice, Draw, Mask, min_weight};
use crate::gpu::{Launch, by_dtype, module, output};

module!(SAMPLE, "sample");

/// `THREADS` of the file.
const MAX_THREADS: usize = 1024;
/// Words of a row's parameters, and of an adjusted row's, in the kernels.
const ROW_WORDS: usize = 8;
const ADJUSTMENT_WORDS: usize = 10;
/// Of a row that is not adjusted, and of one without a mask.
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
    let adjusted = if words.adjusted > 0 { Some(adjust(&logits, &words, &all, threads)?) } else { None };
    let chosen = output((2, draws.len()), DType::U32, &logits)?;
    Launch::new(&SAMPLE, by_dtype!("sample", logits.dtype()), [draws.len(), 1, 1], threads)?
        .tensor(&logits)?
        .optional(adjusted.as_ref())?
        .tensor(&all)?
        .tensor(&chosen)?
        .i64(vocab)
        .run(&logits)?;
    let chosen: Vec<u32> = chosen.flatten_all()?.to_vec1()?;
    let (tokens, finite) = chosen.split_at(draws.len());
    Ok(tokens.iter().zip(finite).map(|(token, finite)| Choice { token: *token, is_finite: *finite != 0 }).collect())
}

/// Rows with biases, penalties or masks, changed, in f32.
fn adjust(logits: &Tensor, words: &Words, all: &Tensor, threads: usize) -> Result<Tensor> {
    let vocab = logits.dim(1)?;
    let adjusted = output((words.adjusted, vocab), DType::F32, logits)?;
    let part = |start: usize| all.narrow(0, start, all.elem_count() - start);
    Launch::new(&SAMPLE, by_dtype!("adjust", logits.dtype()), [words.adjusted, 1, 1], threads)?
        .tensor(logits)?
        .tensor(&adjusted)?
        .tensor(&part(words.adjustments)?)?
        .tensor(&part(words.entries)?)?
        .tensor(&part(words.biases)?)?
        .tensor(&part(words.masks)?)?
        .i64(vocab)
        .run(logits)?;
    Ok(adjusted)
}

/// Everything that the kernels read beside logits: parameters of all rows, adjustments of those that have any, their
/// tokens with their counts, those with their biases, and their masks.
struct Words {
    all: Vec<u32>,
    /// Rows with biases, penalties or masks.
    adjusted: usize,
    /// Where adjustments begin, and entries, and biases, and masks.
    adjustments: usize,
    entries: usize,
    biases: usize,
    masks: usize,
}

impl Words {
    fn of(draws: &[Draw]) -> Self {
        let adjusted: Vec<(usize, &Draw)> = draws.iter().enumerate().filter(|(_, draw)| draw.adjusts()).collect();
        let adjustments = draws.len() * ROW_WORDS;
        let entries = adjustments + adjusted.len() * ADJUSTMENT_WORDS;
        let counts = |draw: &Draw| draw.penalties.as_ref().map_or(0, |penalties| penalties.counts.len());
        let biases = entries + 2 * adjusted.iter().map(|(_, draw)| counts(draw)).sum::<usize>();
        let masks = biases + 2 * adjusted.iter().map(|(_, draw)| draw.biases.len()).sum::<usize>();
        let mut all = Vec::with_capacity(masks + 1);
        let mut next = 0;
        for draw in draws {
            let row = draw.adjusts().then_some(next);
            next += u32::from(row.is_some());
            all.extend(row_words(draw, row));
        }
        let (mut entry, mut bias, mut mask) = (0, 0, 0);
        for (row, draw) in &adjusted {
            let (num_entries, num_biases) = (counts(draw) as u32, draw.biases.len() as u32);
            all.extend(adjustment_words(*row, entry..entry + num_entries, bias..bias + num_biases, mask, draw));
            entry += num_entries;
            bias += num_biases;
            mask += draw.allowed.as_ref().map_or(0, |allowed| allowed.words().len() as u32);
        }
        let lists = adjusted.iter().filter_map(|(_, draw)| draw.penalties.as_ref());
        all.extend(lists.flat_map(|list| list.counts.iter().flat_map(|(id, count)| [*id, *count])));
        let biased = adjusted.iter().flat_map(|(_, draw)| draw.biases.iter());
        all.extend(biased.flat_map(|(id, bias)| [*id, bias.to_bits()]));
        let allowed = adjusted.iter().filter_map(|(_, draw)| draw.allowed.as_ref());
        all.extend(allowed.flat_map(|mask| mask.words()));
        // Lists without tokens and masks without words still have an address.
        all.push(0);
        Self { all, adjusted: adjusted.len(), adjustments, entries, biases, masks }
    }
}

/// `Parameters` of the file.
fn row_words(draw: &Draw, adjusted_row: Option<u32>) -> [u32; ROW_WORDS] {
    let halves = |word: u64| [word as u32, (word >> 32) as u32];
    let (min_weight, random) = (halves(min_weight(draw.min_p)), halves(draw.random));
    // Larger than any vocabulary keeps all, as 0 does.
    let top_k = u32::try_from(draw.top_k).unwrap_or(0);
    let row = adjusted_row.unwrap_or(NOTHING);
    let [min_low, min_high] = min_weight;
    [draw.temperature.to_bits(), draw.top_p.to_bits(), top_k, row, min_low, min_high, random[0], random[1]]
}

/// Of one adjusted row; penalties that change nothing where it has only a mask, which begins at `mask` of all masks.
fn adjustment_words(
    row: usize,
    entries: Range<u32>,
    biases: Range<u32>,
    mask: u32,
    draw: &Draw,
) -> [u32; ADJUSTMENT_WORDS] {
    let (repetition, presence, frequency) =
        draw.penalties.as_ref().map_or((1.0, 0.0, 0.0), |of| (of.repetition, of.presence, of.frequency));
    let num_mask_words = draw.allowed.as_ref().map(|mask: &Mask| mask.words().len() as u32);
    let (mask, mask_words) = num_mask_words.map_or((NOTHING, 0), |words| (mask, words));
    let [repetition, presence, frequency] = [repetition, presence, frequency].map(f32::to_bits);
    let (Range { start, end }, bias) = (entries, biases);
    [row as u32, start, end, repetition, presence, frequency, mask, mask_words, bias.start, bias.end]
}
