//! Who owns which block: a pure allocator.
//!
//! A block is written by the one [`BlockTable`] that got it from [`BlockPool::grow`]. Once it is whole and has a name, other
//! tables may own it as well, to read. A block that nobody owns is free; one with a name keeps its content until it is given
//! out again, those that were used longest ago first. Tables cannot be copied and are given back by value.

use std::collections::{BTreeMap, HashMap};

use crate::kv::{BLOCK_SIZE, BlockHash, blocks_for};

/// All blocks, and who owns them.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    /// Free blocks without a name. The one used last is given first: its pages are in memory already.
    empty: Vec<u32>,
    /// Free blocks with a name, by the time when their last owner left.
    idle: BTreeMap<u64, u32>,
    named: HashMap<BlockHash, u32>,
    /// Blocks that have become idle so far.
    clock: u64,
}

#[derive(Debug, Clone, Default)]
struct Block {
    owners: u32,
    name: Option<BlockHash>,
    /// Key in `idle` while it is there.
    idle_since: u64,
}

impl BlockPool {
    /// A pool of the blocks `0..num_blocks`, all free.
    pub fn new(num_blocks: usize) -> Self {
        Self {
            blocks: vec![Block::default(); num_blocks],
            empty: (0..num_blocks as u32).rev().collect(),
            idle: BTreeMap::new(),
            named: HashMap::new(),
            clock: 0,
        }
    }

    /// Blocks in all.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody owns.
    pub fn num_free(&self) -> usize {
        self.empty.len() + self.idle.len()
    }

    /// Gives `table` what it lacks to hold `num_tokens` tokens. False, and nothing changed, when too few are free.
    #[must_use]
    pub fn grow(&mut self, table: &mut BlockTable, num_tokens: usize) -> bool {
        let missing = table.missing_for(num_tokens);
        if missing > self.num_free() {
            return false;
        }
        for _ in 0..missing {
            let block = self.empty.pop().unwrap_or_else(|| self.evict());
            self.blocks[block as usize].owners = 1;
            table.blocks.push(block);
        }
        true
    }

    /// Takes the name of the block that has been idle for longest.
    fn evict(&mut self) -> u32 {
        let (_, block) = self.idle.pop_first().expect("the free blocks were counted: this is a bug");
        let name = self.blocks[block as usize].name.take().expect("idle blocks have names: this is a bug");
        self.named.remove(&name);
        block
    }

    /// The blocks that have the first of these names, up to the first one that nothing has.
    pub fn find<'a>(&'a self, names: &'a [BlockHash]) -> impl Iterator<Item = u32> + 'a {
        names.iter().map_while(|name| self.named.get(name).copied())
    }

    /// Makes an empty table an owner of the blocks that [`BlockPool::find`] finds.
    pub fn share(&mut self, table: &mut BlockTable, names: &[BlockHash]) {
        assert!(table.blocks.is_empty(), "blocks are shared from the first on: this is a bug");
        table.blocks.extend(names.iter().map_while(|name| self.named.get(name)));
        for block in &table.blocks {
            let block = &mut self.blocks[*block as usize];
            if block.owners == 0 {
                self.idle.remove(&block.idle_since);
            }
            block.owners += 1;
        }
    }

    /// Gives a block of a table its name: from now on it is read only. Nothing changes where another block has the name.
    pub fn name(&mut self, block: u32, name: BlockHash) {
        let named = self.named.entry(name).or_insert(block);
        if *named == block {
            self.blocks[block as usize].name = Some(name);
        }
    }

    /// Takes a table back. Of its blocks that nobody else owns the last ones are the first to lose their content.
    pub fn release(&mut self, table: BlockTable) {
        for number in table.blocks.into_iter().rev() {
            let block = &mut self.blocks[number as usize];
            block.owners -= 1;
            match (block.owners, block.name) {
                (0, None) => self.empty.push(number),
                (0, Some(_)) => {
                    block.idle_since = self.clock;
                    self.idle.insert(self.clock, number);
                    self.clock += 1;
                }
                _ => (),
            }
        }
    }

    /// Takes the names of a table's blocks: whoever comes does not share them.
    pub fn forget(&mut self, table: &BlockTable) {
        for number in &table.blocks {
            if let Some(name) = self.blocks[*number as usize].name.take() {
                self.named.remove(&name);
            }
        }
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

/// How many blocks of a pool would be free after tables were given back and others begun, none of which happens.
#[derive(Debug, Clone)]
pub struct Forecast<'a> {
    pool: &'a BlockPool,
    num_free: usize,
    /// Owners of the blocks that would have more or fewer than they have.
    owners: HashMap<u32, u32>,
}

impl<'a> Forecast<'a> {
    /// The pool as it is.
    pub fn of(pool: &'a BlockPool) -> Self {
        Self { pool, num_free: pool.num_free(), owners: HashMap::new() }
    }

    /// Blocks that nobody would own.
    pub fn num_free(&self) -> usize {
        self.num_free
    }

    fn owners(&self, block: u32) -> u32 {
        self.owners.get(&block).copied().unwrap_or(self.pool.blocks[block as usize].owners)
    }

    /// As [`BlockPool::release`].
    pub fn release(&mut self, table: &BlockTable) {
        for block in &table.blocks {
            let owners = self.owners(*block) - 1;
            self.owners.insert(*block, owners);
            self.num_free += usize::from(owners == 0);
        }
    }

    /// Free blocks that a sequence of `num_tokens` tokens takes which shares what has these names.
    pub fn cost(&self, names: &[BlockHash], num_tokens: usize) -> usize {
        let owned = self.pool.find(names).filter(|block| self.owners(*block) > 0).count();
        blocks_for(num_tokens) - owned
    }

    /// As [`BlockPool::share`] for such a sequence, and [`BlockPool::grow`], where so many are free. Returns how many blocks
    /// are shared.
    pub fn begin(&mut self, names: &[BlockHash], num_tokens: usize) -> usize {
        self.num_free -= self.cost(names, num_tokens);
        let mut num_shared = 0;
        for block in self.pool.find(names) {
            self.owners.insert(block, self.owners(block) + 1);
            num_shared += 1;
        }
        num_shared
    }

    /// As [`BlockPool::grow`] by so many blocks, where so many are free.
    pub fn take(&mut self, num_blocks: usize) {
        self.num_free -= num_blocks;
    }

    /// Undoes [`Forecast::take`].
    pub fn untake(&mut self, num_blocks: usize) {
        self.num_free += num_blocks;
    }
}

#[cfg(test)]
mod tests;
