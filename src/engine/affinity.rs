//! Which devices have read a beginning of a prompt lately, so that requests with one beginning find what is kept of it.
//!
//! Owns: names of beginnings. Does not know: what a device really keeps; a wrong guess costs time and nothing else. Pure.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use tale_models::ClientId;
use tale_models::kv::PrefixCache;
use tale_models::request::TextRequest;

/// Beginnings are known by multiples of so many tokens.
const STRIDE: usize = 64;
/// No longer ones than so many strides.
const MAX_STRIDES: usize = 256;
/// Names of one generation.
const MAX_NAMES: usize = 1 << 16;
/// Devices that can be told apart.
const MAX_DEVICES: usize = u64::BITS as usize;

/// Of one model.
#[derive(Debug, Default)]
pub struct Affinity {
    /// The devices of a beginning, as bits. Two generations: when the young one is full it takes the place of the old one.
    young: HashMap<u64, u64>,
    old: HashMap<u64, u64>,
}

/// The beginnings of one prompt, from the shortest.
#[derive(Debug, Default)]
pub struct Beginnings(Vec<u64>);

impl Beginnings {
    /// Of a client's request; none where nothing is shared.
    pub fn of(request: &TextRequest, client: ClientId, prefix_cache: PrefixCache) -> Self {
        let mut hasher = DefaultHasher::new();
        request.cache_salt.hash(&mut hasher);
        match prefix_cache {
            PrefixCache::Off => return Self(Vec::new()),
            PrefixCache::PerClient => client.hash(&mut hasher),
            PrefixCache::Shared => (),
        }
        let strides = request.prompt.chunks_exact(STRIDE).take(MAX_STRIDES);
        let named = strides.map(|tokens| {
            tokens.hash(&mut hasher);
            hasher.finish()
        });
        Self(named.collect())
    }
}

impl Affinity {
    /// Tokens of the longest beginning that `device` has read.
    pub fn cached_tokens(&self, beginnings: &Beginnings, device: usize) -> usize {
        let is_there = |name: &&u64| device < MAX_DEVICES && self.devices(**name) & (1 << device) != 0;
        STRIDE * beginnings.0.iter().take_while(is_there).count()
    }

    /// `device` is about to read them.
    pub fn note(&mut self, beginnings: &Beginnings, device: usize) {
        if device >= MAX_DEVICES {
            return;
        }
        for name in &beginnings.0 {
            let devices = self.devices(*name) | (1 << device);
            self.young.insert(*name, devices);
        }
        if self.young.len() >= MAX_NAMES {
            self.old = std::mem::take(&mut self.young);
        }
    }

    fn devices(&self, name: u64) -> u64 {
        self.young.get(&name).or_else(|| self.old.get(&name)).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beginnings(prompt: Vec<u32>, client: u64) -> Beginnings {
        Beginnings::of(&TextRequest::greedy(prompt, 1), ClientId(client), PrefixCache::PerClient)
    }

    #[test]
    fn the_longest_beginning_counts_for_its_own_device_and_client() {
        let mut affinity = Affinity::default();
        let system: Vec<u32> = (0..200).collect();
        affinity.note(&beginnings(system.clone(), 1), 3);
        let question: Vec<u32> = system.iter().copied().chain([7; 100]).collect();
        let found = |client, device| affinity.cached_tokens(&beginnings(question.clone(), client), device);
        assert_eq!([found(1, 3), found(1, 2), found(2, 3)], [192, 0, 0]);
        let other: Vec<u32> = [9].into_iter().chain(system).collect();
        assert_eq!(affinity.cached_tokens(&beginnings(other, 1), 3), 0);
    }

    #[test]
    fn nothing_grows_without_bound_and_the_last_are_known() {
        let mut affinity = Affinity::default();
        for prompt in 0..3 * MAX_NAMES as u32 {
            affinity.note(&beginnings(vec![prompt; STRIDE], 1), 0);
        }
        assert!(affinity.young.len() + affinity.old.len() <= 2 * MAX_NAMES);
        let last = beginnings(vec![3 * MAX_NAMES as u32 - 1; STRIDE], 1);
        assert_eq!(affinity.cached_tokens(&last, 0), STRIDE);
    }
}
