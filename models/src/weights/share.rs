//! What one of several ranks has of a layer's tensors.
//!
//! Owns: which rows or columns a share is, and how a view gives them in place of the whole. Does not know: which layer is shared out
//! in which way, packed codes (`layers/projection/packed.rs` takes its share of those).

use std::ops::Range;

use super::Weights;
use crate::error::{Error, Result};

/// A share of a matrix `[rows, columns]`, that is `[outputs, inputs]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// What is shared out.
    pub axis: Axis,
    /// Which of the shares, from 0.
    pub index: usize,
    /// Number of shares, all of one size.
    pub of: usize,
}

/// See [`Share`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Outputs of a layer, and its bias; tokens of a table.
    Rows,
    /// Inputs of a layer. Its bias is added once, by the first rank.
    Columns,
}

impl Share {
    /// Those of `size` rows or columns that are its own; `None` where they cannot be shared out.
    pub fn range(self, size: usize) -> Option<Range<usize>> {
        let own = size / self.of;
        size.is_multiple_of(self.of).then_some(self.index * own..(self.index + 1) * own)
    }

    /// The dimension that is shared out, of tensors with so many: matrices, tables and biases.
    pub(super) fn dimension(self, rank: usize) -> Option<usize> {
        match (self.axis, rank) {
            (Axis::Rows, 1 | 2) => Some(0),
            (Axis::Columns, 2) => Some(1),
            _ => None,
        }
    }

    /// Values of a tensor of this shape that are its own, in order.
    pub(super) fn values_of(self, shape: &[usize]) -> Option<Vec<Range<usize>>> {
        let dimension = self.dimension(shape.len())?;
        let own = self.range(shape[dimension])?;
        match *shape {
            [_, columns] if dimension == 0 => {
                let side_by_side = own.start * columns..own.end * columns;
                Some(vec![side_by_side])
            }
            [rows, columns] => Some((0..rows).map(|row| row * columns + own.start..row * columns + own.end).collect()),
            _ => Some(vec![own]),
        }
    }
}

impl Weights {
    /// The same view, whose tensors are asked for in their whole shapes and given as this share of them. Shares are read when they
    /// are asked for, and not ahead.
    pub fn shared_out(&self, share: Option<Share>) -> Self {
        let ahead = self.ahead.clone().filter(|_| share.is_none());
        Self { share, ahead, ..self.clone() }
    }

    /// The share that tensors are given as, where it is not the whole.
    pub fn share(&self) -> Option<Share> {
        self.share
    }

    /// The share's shape of a tensor of this shape.
    pub fn own_shape(&self, shape: &[usize], name: &str) -> Result<Vec<usize>> {
        let mut own = shape.to_vec();
        let Some(share) = self.share else { return Ok(own) };
        let dimension = share.dimension(shape.len());
        let range = dimension.and_then(|dimension| Some((dimension, share.range(shape[dimension])?)));
        let (dimension, range) = range.ok_or_else(|| self.cannot_share(name, shape, share))?;
        own[dimension] = range.len();
        Ok(own)
    }

    fn cannot_share(&self, name: &str, shape: &[usize], share: Share) -> Error {
        let what = if share.axis == Axis::Rows { "rows" } else { "columns" };
        self.error(name, format!("of shape {shape:?} cannot be shared out by its {what} among {} ranks", share.of))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_rows_or_columns() {
        let share = |axis, index, of| Share { axis, index, of };
        let check = |share: Share, shape: &[usize], expected: &[(usize, usize)]| {
            let found = share.values_of(shape).expect("it can be shared out");
            assert_eq!(found.iter().map(|range| (range.start, range.end)).collect::<Vec<_>>(), expected);
        };
        check(share(Axis::Rows, 1, 2), &[4, 3], &[(6, 12)]);
        check(share(Axis::Columns, 1, 2), &[2, 4], &[(2, 4), (6, 8)]);
        check(share(Axis::Rows, 0, 4), &[8], &[(0, 2)]);
        for (axis, shape) in
            [(Axis::Rows, &[3, 4][..]), (Axis::Columns, &[4, 3]), (Axis::Columns, &[4]), (Axis::Rows, &[])]
        {
            assert_eq!(share(axis, 0, 2).values_of(shape), None, "{axis:?} {shape:?}");
        }
    }
}
