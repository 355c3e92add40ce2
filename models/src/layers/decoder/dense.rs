//! Whole sequences side by side, with padding: the input of a pass that keeps no keys and values, as text encoders do it.

use std::ops::Range;

use candle_core::Tensor;

use crate::error::Result;

/// Rows of equal lengths, in each of which some tokens count and the others are padding before or after them.
///
/// The network gets the tokens that count first, so that their keys are the first ones of a row; each keeps the position
/// at which it was given. No token looks at padding.
#[derive(Debug, Clone)]
pub struct DenseInput {
    /// In the network's order.
    tokens: Vec<u32>,
    /// In the network's order.
    positions: Vec<u32>,
    /// Tokens of each row that count.
    counted: Vec<usize>,
    row_len: usize,
    /// Where in the network's order each token lies, in the order in which they were given; absent if that is the same.
    places: Option<Vec<u32>>,
}

impl DenseInput {
    /// Of `rows` with token ids, `counted[i]` being those of row i that an attention mask has ones for.
    ///
    /// # Panics
    ///
    /// If there are no tokens, rows of different lengths, or not one range inside of the row for each row.
    pub fn new(rows: &[&[u32]], counted: &[Range<usize>]) -> Self {
        let row_len = rows.first().map_or(0, |row| row.len());
        let is_inside = |range: &Range<usize>| range.start <= range.end && range.end <= row_len;
        assert!(row_len > 0 && rows.iter().all(|row| row.len() == row_len), "rows have one length, not 0");
        assert!(rows.len() == counted.len() && counted.iter().all(is_inside), "every row has a range inside of it");
        let mut input = Self {
            tokens: Vec::with_capacity(rows.len() * row_len),
            positions: Vec::with_capacity(rows.len() * row_len),
            counted: counted.iter().map(ExactSizeIterator::len).collect(),
            row_len,
            places: None,
        };
        for (row, counted) in rows.iter().zip(counted) {
            input.tokens.extend_from_slice(&row[counted.start..]);
            input.tokens.extend_from_slice(&row[..counted.start]);
            input.positions.extend(counted.start as u32..row_len as u32);
            input.positions.extend(0..counted.start as u32);
        }
        if counted.iter().any(|range| range.start > 0) {
            input.places = Some(places(row_len, counted));
        }
        input
    }

    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub(super) fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// Rows.
    pub(super) fn len(&self) -> usize {
        self.counted.len()
    }

    /// Keys of each row, where they are not all of them.
    pub(super) fn key_lens(&self) -> Option<&[usize]> {
        self.counted.iter().any(|counted| *counted < self.row_len).then_some(&self.counted)
    }

    /// `[b * l, n]` in the network's order to `[b, l, n]` in the order of the rows that were given.
    pub(super) fn in_given_order(&self, vectors: &Tensor) -> Result<Tensor> {
        let shape = (self.len(), self.row_len, vectors.dim(1)?);
        match &self.places {
            None => Ok(vectors.reshape(shape)?),
            Some(places) => {
                let places = Tensor::new(places.as_slice(), vectors.device())?;
                Ok(tale_kernels::embedding(&places, vectors)?.reshape(shape)?)
            }
        }
    }
}

/// Where each token lies after the padding before those that count has moved to the end of its row.
fn places(row_len: usize, counted: &[Range<usize>]) -> Vec<u32> {
    let of_a_row = |(row, counted): (usize, &Range<usize>)| {
        let (begin, moved) = (row * row_len, counted.start);
        (0..row_len).map(move |column| (begin + (column + row_len - moved) % row_len) as u32)
    };
    counted.iter().enumerate().flat_map(of_a_row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_before_the_tokens_moves_behind_them() {
        let input = DenseInput::new(&[&[9, 9, 5, 6], &[1, 2, 9, 9]], &[2..4, 0..2]);
        assert_eq!(input.tokens(), [5, 6, 9, 9, 1, 2, 9, 9]);
        assert_eq!(input.positions(), [2, 3, 0, 1, 0, 1, 2, 3]);
        assert_eq!(input.key_lens(), Some(&[2, 2][..]));
        let vectors =
            Tensor::new(&[[5f32], [6.0], [9.0], [9.0], [1.0], [2.0], [9.0], [9.0]], &candle_core::Device::Cpu);
        let given = input.in_given_order(&vectors.expect("a tensor")).expect("ordered");
        let given: Vec<f32> = given.flatten_all().and_then(|x| x.to_vec1()).expect("read");
        assert_eq!(given, [9.0, 9.0, 5.0, 6.0, 1.0, 2.0, 9.0, 9.0]);
    }

    #[test]
    fn rows_without_padding_are_left_as_they_are() {
        let input = DenseInput::new(&[&[5, 6]], std::slice::from_ref(&(0..2)));
        assert_eq!((input.tokens(), input.positions(), input.key_lens()), (&[5, 6][..], &[0, 1][..], None));
    }
}
