//! Every block is somewhere, once.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::kv::{BlockHasher, BlockNames, PrefixCache};
use crate::request::ClientId;

impl BlockPool {
    /// Panics where these are not all tables, or a block is lost or has more places than one.
    pub(crate) fn check<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) {
        let mut owners = vec![0; self.blocks.len()];
        for table in tables {
            let distinct: BTreeSet<&u32> = table.blocks.iter().collect();
            assert_eq!(distinct.len(), table.blocks.len(), "a table has a block twice");
            table.blocks.iter().for_each(|block| owners[*block as usize] += 1);
        }
        let mut free: BTreeSet<u32> = self.empty.iter().copied().collect();
        free.extend(self.idle.values());
        assert_eq!(free.len(), self.num_free(), "a block is free twice");
        for (number, (block, owners)) in self.blocks.iter().zip(owners).enumerate() {
            let number = number as u32;
            assert_eq!(block.owners, owners, "owners of block {number}");
            assert_eq!(free.contains(&number), owners == 0, "block {number} is free while nobody owns it");
            match block.name {
                Some(name) => assert_eq!(self.named.get(&name), Some(&number)),
                None => assert!(owners > 0 || self.empty.contains(&number)),
            }
        }
        assert_eq!(self.named.len(), self.blocks.iter().filter(|block| block.name.is_some()).count());
    }

    /// Whether a table may write this block.
    pub(crate) fn is_writable(&self, block: u32) -> bool {
        let block = &self.blocks[block as usize];
        block.owners == 1 && block.name.is_none()
    }
}

/// Names of the blocks of `0..num_blocks * BLOCK_SIZE`, each of the same tokens in every call with `hasher`.
fn names(hasher: &BlockHasher, num_blocks: usize) -> Vec<BlockHash> {
    let scope = PrefixCache::Shared.scope(ClientId(0), None).expect("shared");
    let tokens: Vec<u32> = (0..(num_blocks * BLOCK_SIZE) as u32).collect();
    BlockNames::new(hasher, scope, &tokens).names().to_vec()
}

/// A table of whole blocks with these names.
fn named(pool: &mut BlockPool, names: &[BlockHash]) -> BlockTable {
    let mut table = BlockTable::default();
    assert!(pool.grow(&mut table, names.len() * BLOCK_SIZE));
    for (block, name) in table.blocks.iter().zip(names) {
        pool.name(*block, *name);
    }
    table
}

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

#[test]
fn what_was_used_longest_ago_is_given_out_first_and_the_end_of_a_sequence_before_its_beginning() {
    let hasher = BlockHasher::default();
    let names = names(&hasher, 5);
    let mut pool = BlockPool::new(5);
    let (first, second) = (named(&mut pool, &names[..3]), named(&mut pool, &[names[4]]));
    pool.release(first);
    pool.release(second);
    assert_eq!(pool.num_free(), 5);
    let found = |pool: &BlockPool| (pool.find(&names[..3]).count(), pool.find(&names[4..]).count());
    assert_eq!(found(&pool), (3, 1));
    // One block has never been used.
    let mut other = BlockTable::default();
    assert!(pool.grow(&mut other, BLOCK_SIZE));
    assert_eq!(found(&pool), (3, 1));
    assert!(pool.grow(&mut other, 2 * BLOCK_SIZE));
    assert_eq!(found(&pool), (2, 1));
    // Whoever reads it now keeps it, and has used it last afterwards.
    let mut reader = BlockTable::default();
    pool.share(&mut reader, &names);
    assert_eq!(reader.blocks().len(), 2);
    assert!(!pool.grow(&mut other, 5 * BLOCK_SIZE));
    pool.release(reader);
    assert!(pool.grow(&mut other, 3 * BLOCK_SIZE));
    assert_eq!(found(&pool), (2, 0));
    pool.check([&other].into_iter());
}

#[test]
fn the_first_of_two_equal_blocks_is_shared() {
    let hasher = BlockHasher::default();
    let names = names(&hasher, 2);
    let mut pool = BlockPool::new(5);
    let (first, second) = (named(&mut pool, &names), named(&mut pool, &names));
    let mut reader = BlockTable::default();
    pool.share(&mut reader, &names);
    assert_eq!(reader.blocks(), first.blocks());
    pool.check([&first, &second, &reader].into_iter());
    pool.release(second);
    pool.release(first);
    pool.check([&reader].into_iter());
    assert_eq!(pool.num_free(), 3);
}

#[test]
fn what_is_forgotten_is_not_found() {
    let hasher = BlockHasher::default();
    let names = names(&hasher, 2);
    let mut pool = BlockPool::new(2);
    let table = named(&mut pool, &names);
    pool.forget(&table);
    assert_eq!(pool.find(&names).count(), 0);
    pool.release(table);
    pool.check(std::iter::empty());
    assert_eq!(pool.num_free(), 2);
}

#[derive(Debug, Clone)]
enum Action {
    Grow {
        tokens: usize,
    },
    Name,
    Release,
    Forget,
    /// What a sequence that begins with so many blocks of a text would find.
    Share {
        blocks: usize,
    },
}

fn actions() -> impl Strategy<Value = (usize, Action)> {
    let action = prop_oneof![
        3 => (0usize..400).prop_map(|tokens| Action::Grow { tokens }),
        3 => Just(Action::Name),
        3 => Just(Action::Release),
        1 => Just(Action::Forget),
        3 => (0usize..12).prop_map(|blocks| Action::Share { blocks }),
    ];
    (0usize..6, action)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Every block is free or owned, by as many as have it in their tables, in whichever order those grow, share, are named and
    /// given back; and what a forecast says comes true. 60,000 actions.
    #[test]
    fn owners_are_counted(num_blocks in 0usize..40, actions in prop::collection::vec(actions(), 200)) {
        let hasher = BlockHasher::default();
        let names = names(&hasher, 16);
        let mut pool = BlockPool::new(num_blocks);
        let mut tables: Vec<BlockTable> = (0..6).map(|_| BlockTable::default()).collect();
        for (index, action) in actions {
            let table = &mut tables[index];
            match action {
                Action::Grow { tokens } => {
                    let fits = table.missing_for(tokens) <= pool.num_free();
                    prop_assert_eq!(pool.grow(table, tokens), fits);
                }
                Action::Name => {
                    table.blocks.iter().zip(&names).for_each(|(block, name)| {
                        // A block keeps its name: what is in it stays.
                        if pool.blocks[*block as usize].name.is_none() {
                            pool.name(*block, *name);
                        }
                    });
                }
                Action::Release => {
                    let mut forecast = Forecast::of(&pool);
                    forecast.release(table);
                    let expected = forecast.num_free();
                    pool.release(std::mem::take(table));
                    prop_assert_eq!(pool.num_free(), expected);
                }
                Action::Forget => pool.forget(table),
                Action::Share { blocks } => {
                    pool.release(std::mem::take(table));
                    let tokens = (blocks + 1) * BLOCK_SIZE;
                    let mut forecast = Forecast::of(&pool);
                    if forecast.cost(&names[..blocks], tokens) <= forecast.num_free() {
                        let (num_shared, num_free) = (forecast.begin(&names[..blocks], tokens), forecast.num_free());
                        pool.share(table, &names[..blocks]);
                        prop_assert_eq!(table.blocks.len(), num_shared);
                        prop_assert!(pool.grow(table, tokens));
                        prop_assert_eq!(pool.num_free(), num_free);
                    }
                }
            }
            pool.check(tables.iter());
        }
    }
}
