//! Who owns which block: a pure allocator.
//!
//! A block belongs to the pool or to exactly one [`BlockTable`]. Tables cannot be copied and are given back by value, so
//! that a block with two owners cannot be written down.

use crate::kv::{BLOCK_SIZE, blocks_for};

/// The blocks that nobody owns.
#[derive(Debug)]
pub struct BlockPool {
    /// The one used last is given first: its pages are in memory already.
    free: Vec<u32>,
    num_blocks: usize,
}

impl BlockPool {
    /// A pool of the blocks `0..num_blocks`, all free.
    pub fn new(num_blocks: usize) -> Self {
        Self { free: (0..num_blocks as u32).rev().collect(), num_blocks }
    }

    /// Blocks in all.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Blocks that nobody owns.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Gives `table` what it lacks to hold `num_tokens` tokens. False, and nothing changed, when too few are free.
    #[must_use]
    pub fn grow(&mut self, table: &mut BlockTable, num_tokens: usize) -> bool {
        let missing = table.missing_for(num_tokens);
        if missing > self.free.len() {
            return false;
        }
        let from = self.free.len() - missing;
        table.blocks.extend(self.free.drain(from..).rev());
        true
    }

    /// Takes back all blocks of a table.
    pub fn release(&mut self, table: BlockTable) {
        self.free.extend(table.blocks.into_iter().rev());
    }
}

/// The blocks of one sequence, in the order of its tokens.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<u32>,
}

impl BlockTable {
    /// Of one block that no pool gives out.
    pub fn outside_of_pools(block: u32) -> Self {
        Self { blocks: vec![block] }
    }

    /// Block numbers, in order.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Blocks to add until `num_tokens` tokens fit.
    pub fn missing_for(&self, num_tokens: usize) -> usize {
        blocks_for(num_tokens).saturating_sub(self.blocks.len())
    }

    /// Where the token at `position` lies in the caches, counted in tokens. Panics if the table is too short.
    pub fn slot(&self, position: usize) -> u32 {
        self.blocks[position / BLOCK_SIZE] * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn slots_follow_the_blocks() {
        let mut pool = BlockPool::new(4);
        let mut table = BlockTable::default();
        assert!(pool.grow(&mut table, BLOCK_SIZE + 1));
        assert_eq!(table.blocks(), [0, 1]);
        assert_eq!((table.slot(0), table.slot(BLOCK_SIZE + 3)), (0, BLOCK_SIZE as u32 + 3));
    }

    #[test]
    fn growing_is_all_or_nothing() {
        let mut pool = BlockPool::new(2);
        let mut table = BlockTable::default();
        assert!(!pool.grow(&mut table, 2 * BLOCK_SIZE + 1));
        assert_eq!((pool.num_free(), table.blocks().len()), (2, 0));
    }

    proptest! {
        /// Every block has exactly one owner, whatever is grown and given back in which order.
        #[test]
        fn blocks_have_one_owner(
            num_blocks in 0usize..40,
            actions in prop::collection::vec((0usize..6, 0usize..400, any::<bool>()), 0..200),
        ) {
            let mut pool = BlockPool::new(num_blocks);
            let mut tables: Vec<BlockTable> = (0..6).map(|_| BlockTable::default()).collect();
            for (index, num_tokens, release) in actions {
                if release {
                    pool.release(std::mem::take(&mut tables[index]));
                } else {
                    let missing = tables[index].missing_for(num_tokens);
                    let fits = missing <= pool.num_free();
                    prop_assert_eq!(pool.grow(&mut tables[index], num_tokens), fits);
                }
                let owned: Vec<u32> = tables.iter().flat_map(|t| t.blocks().to_vec()).chain(pool.free.clone()).collect();
                let distinct: BTreeSet<u32> = owned.iter().copied().collect();
                prop_assert_eq!(owned.len(), num_blocks);
                prop_assert_eq!(distinct.len(), num_blocks);
                prop_assert!(distinct.iter().all(|block| (*block as usize) < num_blocks));
            }
        }
    }
}
