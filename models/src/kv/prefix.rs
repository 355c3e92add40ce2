//! What the content of a block is called, so that sequences that begin alike find each other's blocks.
//!
//! A block's keys and values follow from its tokens and all tokens before them. So a whole block is named by a hash of its
//! tokens and of the name of the block before it; the first one's goes on from the [`Scope`], so that readers of different
//! scopes have no block in common. The hashes are keyed by random numbers of this process and leave it nowhere: a client
//! cannot look for two texts of one name, and by chance there are none in 128 bits.
//!
//! Does not know: which blocks there are, and who has them ([`BlockPool`](super::BlockPool)).

use std::hash::{BuildHasher, Hash, RandomState};

use super::BLOCK_SIZE;
use crate::request::ClientId;

/// Who shares the blocks of prompts that begin alike. That a prompt is found tells its sender that somebody sent one like it,
/// by the time of the answer and by `cached_tokens`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PrefixCache {
    /// Nobody: each sequence computes all of its tokens.
    Off,
    /// The requests of each client, with the same `cache_salt` if any.
    #[default]
    PerClient,
    /// The requests of all clients, with the same `cache_salt` if any.
    Shared,
}

/// Whose blocks a sequence may read: those of sequences of an equal scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Scope<'a> {
    client: Option<ClientId>,
    salt: Option<&'a str>,
}

impl PrefixCache {
    /// The scope of a request of `client` that came with `salt`; `None` where nothing is shared.
    pub fn scope(self, client: ClientId, salt: Option<&str>) -> Option<Scope<'_>> {
        match self {
            Self::Off => None,
            Self::PerClient => Some(Scope { client: Some(client), salt }),
            Self::Shared => Some(Scope { client: None, salt }),
        }
    }
}

/// The name of a whole block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash([u64; 2]);

/// Makes names.
#[derive(Debug, Default)]
pub struct BlockHasher([RandomState; 2]);

impl BlockHasher {
    fn hash(&self, value: impl Hash) -> BlockHash {
        BlockHash([self.0[0].hash_one(&value), self.0[1].hash_one(&value)])
    }
}

/// The names of one sequence's whole blocks, in order.
#[derive(Debug)]
pub struct BlockNames {
    names: Vec<BlockHash>,
    /// What the name of the next block goes on from.
    last: BlockHash,
    /// Tokens behind the last whole block.
    tail: Vec<u32>,
}

impl BlockNames {
    /// Of a sequence that begins with `tokens`.
    pub fn new(hasher: &BlockHasher, scope: Scope<'_>, tokens: &[u32]) -> Self {
        let mut names = Self {
            names: Vec::with_capacity(tokens.len() / BLOCK_SIZE),
            last: hasher.hash(scope),
            tail: Vec::with_capacity(BLOCK_SIZE),
        };
        tokens.iter().for_each(|token| names.push(hasher, *token));
        names
    }

    /// Adds the next token.
    pub fn push(&mut self, hasher: &BlockHasher, token: u32) {
        self.tail.push(token);
        if self.tail.len() == BLOCK_SIZE {
            self.last = hasher.hash((self.last, self.tail.as_slice()));
            self.names.push(self.last);
            self.tail.clear();
        }
    }

    /// One per whole block.
    pub fn names(&self) -> &[BlockHash] {
        &self.names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: ClientId = ClientId(1);

    #[test]
    fn a_name_stands_for_all_tokens_up_to_the_end_of_its_block() {
        let hasher = BlockHasher::default();
        let scope = PrefixCache::PerClient.scope(CLIENT, None).expect("shared");
        let names = |tokens: &[u32]| BlockNames::new(&hasher, scope, tokens).names().to_vec();
        let tokens: Vec<u32> = (0..3 * BLOCK_SIZE as u32 + 5).collect();
        let whole = names(&tokens);
        assert_eq!(whole.len(), 3);
        assert_eq!(names(&tokens[..3 * BLOCK_SIZE - 1]), whole[..2]);
        let mut grown = BlockNames::new(&hasher, scope, &tokens[..10]);
        tokens[10..].iter().for_each(|token| grown.push(&hasher, *token));
        assert_eq!(grown.names(), whole);
        for (changed, equal) in [(0, 0), (BLOCK_SIZE, 1), (3 * BLOCK_SIZE - 1, 2), (3 * BLOCK_SIZE, 3)] {
            let mut other = tokens.clone();
            other[changed] = 1000;
            let alike = names(&other).iter().zip(&whole).take_while(|(a, b)| a == b).count();
            assert_eq!(alike, equal, "another token at {changed}");
            assert!(names(&other)[equal..].iter().all(|name| !whole.contains(name)));
        }
        // The same tokens in another place are another block.
        let twice = names(&[&tokens[..BLOCK_SIZE], &tokens[..BLOCK_SIZE]].concat());
        assert_ne!(twice[0], twice[1]);
    }

    #[test]
    fn scopes_have_no_block_in_common() {
        let hasher = BlockHasher::default();
        let name = |mode: PrefixCache, client: u64, salt: Option<&str>| {
            let scope = mode.scope(ClientId(client), salt)?;
            Some(BlockNames::new(&hasher, scope, &[7; BLOCK_SIZE]).names()[0])
        };
        use PrefixCache::{Off, PerClient, Shared};
        assert_eq!(name(Off, 1, None), None);
        assert_eq!(name(PerClient, 1, None), name(PerClient, 1, None));
        assert_eq!(name(Shared, 1, Some("a")), name(Shared, 2, Some("a")));
        let different = [
            name(PerClient, 1, None),
            name(PerClient, 2, None),
            name(PerClient, 1, Some("a")),
            name(PerClient, 2, Some("a")),
            name(PerClient, 1, Some("b")),
            name(Shared, 1, None),
            name(Shared, 1, Some("a")),
        ];
        for (index, one) in different.iter().enumerate() {
            assert!(different[..index].iter().all(|other| other != one), "{index}");
        }
    }
}
