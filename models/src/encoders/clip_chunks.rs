//! Weighted prompts of any length as passes of a CLIP text encoder.
//!
//! Owns: cutting tokens into chunks between a start and an end token, and what a weight does to hidden states. Does not
//! know: the encoder. Source of both rules: diffusers `examples/community/lpw_stable_diffusion_xl.py`: chunks take as many
//! tokens as there are, whatever word they cut; a hidden state moves along the line from its chunk's end token. The one
//! difference: the last chunk is padded as the pipeline pads a short prompt, so that a plain prompt of one chunk is
//! encoded as diffusers encodes it.

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::prompt::Prompt;
use crate::tokenizer::Tokenizer;

/// The start and the end token of a chunk.
pub const NUM_SPECIAL: usize = 2;

/// What one pass of the encoder takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// Start token, tokens of the prompt, end token, padding.
    pub ids: Vec<u32>,
    /// One per id; special tokens and padding have 1.
    weights: Vec<f32>,
    /// Where the end token stands.
    end: usize,
}

impl Chunk {
    fn is_neutral(&self) -> bool {
        self.weights.iter().all(|weight| *weight == 1.0)
    }

    /// One row of [`weigh`].
    fn weigh(&self, hidden: &Tensor) -> Result<Tensor> {
        if self.is_neutral() {
            return Ok(hidden.clone());
        }
        let further: Vec<f32> = self.weights.iter().map(|weight| weight - 1.0).collect();
        let further = Tensor::from_vec(further, (1, self.ids.len(), 1), hidden.device())?.to_dtype(hidden.dtype())?;
        let from_end = hidden.broadcast_sub(&hidden.narrow(1, self.end, 1)?)?;
        Ok((hidden + from_end.broadcast_mul(&further)?)?)
    }
}

/// The ids of each chunk.
pub fn ids(chunks: &[Chunk]) -> Vec<&[u32]> {
    chunks.iter().map(|chunk| chunk.ids.as_slice()).collect()
}

/// `hidden [chunks, ids, width]` with each state as far from that of its chunk's end token as its weight says: 1 leaves
/// it, bit for bit, 0 makes it the end token's.
pub fn weigh(hidden: Tensor, chunks: &[Chunk]) -> Result<Tensor> {
    if chunks.iter().all(Chunk::is_neutral) {
        return Ok(hidden);
    }
    let mut rows = Vec::with_capacity(chunks.len());
    for (row, chunk) in chunks.iter().enumerate() {
        rows.push(chunk.weigh(&hidden.narrow(0, row, 1)?)?);
    }
    Ok(Tensor::cat(&rows, 0)?)
}

/// Most chunks of one prompt.
pub const MAX_CHUNKS: usize = 4;

/// How long the prompts of a model with CLIP encoders may be.
#[derive(Debug, Clone)]
pub struct ChunkRule {
    /// One per encoder.
    pub tokenizers: Vec<Tokenizer>,
    /// Ids of one chunk: `max_position_embeddings` of the encoders.
    pub positions: usize,
}

impl ChunkRule {
    /// Largest `max_sequence_length`.
    pub fn max_length(&self) -> usize {
        MAX_CHUNKS * self.positions
    }

    /// The effective `max_sequence_length` of prompts with the names of their fields: what was `asked`, up to which they
    /// are cut, or else the chunks that the longest of them fills.
    pub fn length<'a>(
        &self,
        asked: Option<usize>,
        prompts: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<usize> {
        let mut chunks = 1;
        for (field, text) in prompts {
            let prompt = Prompt::parse(field, text)?;
            if asked.is_none() {
                chunks = chunks.max(self.num_chunks(field, &prompt)?);
            }
        }
        let Some(asked) = asked else { return Ok(chunks * self.positions) };
        if asked < NUM_SPECIAL || asked > self.max_length() || (asked > self.positions && asked % self.positions != 0) {
            let (positions, max) = (self.positions, self.max_length());
            let problem =
                format!("is {asked}; allowed: {NUM_SPECIAL} to {positions}, or multiples of {positions} to {max}");
            return Err(Error::invalid("max_sequence_length", problem));
        }
        Ok(asked)
    }

    /// Chunks that a prompt fills, at least one.
    fn num_chunks(&self, field: &str, prompt: &Prompt) -> Result<usize> {
        let room = self.positions.saturating_sub(NUM_SPECIAL).max(1);
        let mut most = 1;
        for tokenizer in &self.tokenizers {
            let found = tokens(tokenizer, prompt)?.len();
            if found > MAX_CHUNKS * room {
                let problem = format!(
                    "has {found} tokens; at most {} ({MAX_CHUNKS} chunks of {room}), unless max_sequence_length says \
                     where to cut it",
                    MAX_CHUNKS * room
                );
                return Err(Error::invalid(field, problem));
            }
            most = most.max(found.div_ceil(room));
        }
        Ok(most)
    }
}

/// The prompt at `length` ids: one chunk where they fit in the encoder's `positions`, and otherwise as many whole ones.
/// What is longer is cut, what is shorter is padded, with chunks of nothing in the end.
pub fn chunks(tokenizer: &Tokenizer, prompt: &Prompt, positions: usize, length: usize) -> Result<Vec<Chunk>> {
    let [start, end] = start_and_end(tokenizer)?;
    let chunk_len = length.min(positions);
    let Some(room) = chunk_len.checked_sub(NUM_SPECIAL) else {
        return Err(Error::invalid("max_sequence_length", format!("the special tokens alone are {NUM_SPECIAL}")));
    };
    let tokens = tokens(tokenizer, prompt)?;
    let mut rest = tokens.as_slice();
    let mut chunks = Vec::with_capacity(length / chunk_len);
    for _ in 0..length / chunk_len {
        let (head, tail) = rest.split_at(room.min(rest.len()));
        rest = tail;
        let mut ids: Vec<u32> = std::iter::once(start).chain(head.iter().map(|(id, _)| *id)).collect();
        let mut weights: Vec<f32> = std::iter::once(1.0).chain(head.iter().map(|(_, weight)| *weight)).collect();
        let end_position = ids.len();
        ids.push(end);
        if ids.len() < chunk_len {
            let pad = tokenizer.pad_token_id();
            let pad = pad.ok_or_else(|| Error::invalid("prompt", "the model's tokenizer names no padding token"))?;
            ids.resize(chunk_len, pad);
        }
        weights.resize(chunk_len, 1.0);
        chunks.push(Chunk { ids, weights, end: end_position });
    }
    Ok(chunks)
}

/// Refuses a tokenizer whose prompts cannot be cut into chunks.
pub fn check(tokenizer: &Tokenizer) -> Result<()> {
    start_and_end(tokenizer).map(|_| ())
}

fn start_and_end(tokenizer: &Tokenizer) -> Result<[u32; NUM_SPECIAL]> {
    let special = tokenizer.encode("", true)?;
    special.try_into().map_err(|_| Error::invalid("prompt", "the model's tokenizer has no start and end token"))
}

/// Ids of each piece, tokenized alone, with its weight.
fn tokens(tokenizer: &Tokenizer, prompt: &Prompt) -> Result<Vec<(u32, f32)>> {
    let mut tokens = Vec::new();
    for piece in &prompt.pieces {
        tokens.extend(tokenizer.encode(&piece.text, false)?.into_iter().map(|id| (id, piece.weight)));
    }
    Ok(tokens)
}
