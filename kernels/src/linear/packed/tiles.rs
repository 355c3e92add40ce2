//! Where a packed matrix keeps the code of a row and a column.
//!
//! A tile has 16 rows and 64 columns: what a warp's `mma.m16n8k16` takes of a weight in four steps of 16 columns. Thread l of
//! the warp has four words one after the other, one for each step; the nibbles of a word are its eight values of that step, in
//! such an order that `(word >> 4 i) & 0x000f000f` is its i-th pair. Codes of eight bits have their upper halves in a second
//! plane of 128 words behind the first. Tiles follow one another along the columns, then along the rows.
//!
//! A row's values of a tile lie in 16 words, which are also those of the row that is eight further: whoever adds along a row
//! takes 16 words at a time, a nibble of each. The columns then come in another order, and that of `x` has to be the same.

/// Rows and columns of a tile.
pub(super) const ROWS: usize = 16;
pub(super) const COLUMNS: usize = 64;
/// Words of a plane of a tile.
pub(super) const PLANE_WORDS: usize = ROWS * COLUMNS / 8;
/// Words that hold a row, and the one that is [`ROWS_APART`] further.
pub(super) const ROW_WORDS: usize = 16;
/// Between the two rows that share words.
pub(super) const ROWS_APART: usize = 8;
/// Of the nibbles of the upper of both rows, each with its neighbours in 15 other words: how far its bits are from the lowest, and
/// how far its column is from the first of its word. The lower row's nibbles follow.
pub(super) const NIBBLES: [(u32, usize); 4] = [(0, 0), (16, 1), (8, 8), (24, 9)];
/// Bits from a nibble of the upper row to that of the lower one.
pub(super) const LOWER: u32 = 4;

/// The word of a plane, and the lowest bit in it, of a row and a column of a tile.
pub(super) fn place(row: usize, column: usize) -> (usize, u32) {
    let (step, column) = (column / 16, column % 16);
    let thread = row % ROWS_APART * 4 + column % 8 / 2;
    let pair = row / ROWS_APART + column / 8 * 2;
    let nibble = pair + column % 2 * 4;
    (thread * 4 + step, 4 * nibble as u32)
}

/// Column of the tile that stands at a position, in the order in which a row's values are taken.
pub(super) fn column(position: usize) -> usize {
    let word = position % ROW_WORDS;
    word % 4 * 16 + word / 4 * 2 + NIBBLES[position / ROW_WORDS].1
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_value_has_a_place_of_its_own() {
        let all = (0..ROWS).flat_map(|row| (0..COLUMNS).map(move |column| place(row, column)));
        let places: BTreeSet<(usize, u32)> = all.collect();
        assert_eq!(places.len(), ROWS * COLUMNS);
        assert!(places.iter().all(|(word, bit)| *word < PLANE_WORDS && bit % 4 == 0 && *bit < 32));
    }

    /// PTX ISA, fragments of matrix A of `mma.m16n8k16`: registers of a thread in group `thread / 4`.
    #[test]
    fn pairs_are_the_registers_of_a_product() {
        for thread in 0..32 {
            let (group, first) = (thread / 4, thread % 4 * 2);
            for step in 0..4 {
                for (pair, (row, column)) in [(group, 0), (group + 8, 0), (group, 8), (group + 8, 8)].iter().enumerate()
                {
                    for upper in 0..2 {
                        let found = place(*row, 16 * step + column + first + upper);
                        assert_eq!(found, (4 * thread + step, 4 * pair as u32 + 16 * upper as u32));
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_is_taken_from_its_words() {
        for row in 0..ROWS {
            for position in 0..COLUMNS {
                let (word, bit) = place(row, column(position));
                let lower = if row < ROWS_APART { 0 } else { LOWER };
                assert_eq!(word, row % ROWS_APART * ROW_WORDS + position % ROW_WORDS);
                assert_eq!(bit, NIBBLES[position / ROW_WORDS].0 + lower);
            }
        }
    }
}
