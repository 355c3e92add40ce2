//! The rules, on counts.

use super::*;
use crate::kv::{BLOCK_SIZE, PrefixCache};

mod world;

const ALONE: ClientId = ClientId(0);

fn batcher(max_batch_tokens: usize, max_batch_sequences: usize, num_blocks: usize) -> Batcher {
    Batcher::new(Limits { max_batch_tokens, max_batch_sequences }, BlockPool::new(num_blocks))
}

/// So many of one text.
fn tokens(num_tokens: usize) -> Vec<u32> {
    (0..num_tokens as u32).collect()
}

/// Runs one step, which goes on with that text, and gives what it did as (session, start, tokens, samples).
fn step(batcher: &mut Batcher) -> Vec<(u64, usize, usize, bool)> {
    let plan = batcher.plan().expect("there is work");
    batcher.begin(&plan);
    batcher.complete(&plan);
    for chunk in plan.chunks.iter().filter(|chunk| chunk.samples) {
        batcher.push(chunk.session, (chunk.start + chunk.num_tokens) as u32);
    }
    plan.chunks.iter().map(|chunk| (chunk.session.0, chunk.start, chunk.num_tokens, chunk.samples)).collect()
}

#[test]
fn decode_goes_first_and_prefill_fills_the_budget() {
    let mut batcher = batcher(8, 4, 100);
    batcher.submit(SessionId(1), ALONE, &tokens(3), None);
    assert_eq!(step(&mut batcher), [(1, 0, 3, true)]);
    batcher.submit(SessionId(2), ALONE, &tokens(10), None);
    batcher.submit(SessionId(3), ALONE, &tokens(4), None);
    assert_eq!(step(&mut batcher), [(1, 3, 1, true), (2, 0, 7, false)]);
    assert_eq!(step(&mut batcher), [(1, 4, 1, true), (2, 7, 3, true), (3, 0, 4, true)]);
    assert_eq!(step(&mut batcher), [(1, 5, 1, true), (2, 10, 1, true), (3, 4, 1, true)]);
}

#[test]
fn phase_says_whether_prompts_are_read() {
    let mut batcher = batcher(8, 4, 100);
    batcher.submit(SessionId(1), ALONE, &tokens(3), None);
    assert_eq!(batcher.plan().expect("there is work").phase(), Phase::Prefill);
    step(&mut batcher);
    assert_eq!(batcher.plan().expect("there is work").phase(), Phase::Decode);
}

#[test]
fn admission_waits_for_blocks_in_order_of_arrival() {
    let mut batcher = batcher(1000, 8, 3);
    batcher.submit(SessionId(1), ALONE, &tokens(BLOCK_SIZE), None);
    batcher.submit(SessionId(2), ALONE, &tokens(2 * BLOCK_SIZE), None);
    batcher.submit(SessionId(3), ALONE, &tokens(1), None);
    // The first takes two blocks (one more token is coming); the third would fit, but is not its turn.
    assert_eq!(step(&mut batcher), [(1, 0, BLOCK_SIZE, true)]);
    batcher.remove(SessionId(1));
    assert_eq!(step(&mut batcher), [(2, 0, 2 * BLOCK_SIZE, true)]);
}

#[test]
fn the_youngest_is_preempted_and_computes_all_its_tokens_again() {
    let mut batcher = batcher(1000, 8, 2);
    batcher.submit(SessionId(1), ALONE, &tokens(BLOCK_SIZE - 1), None);
    batcher.submit(SessionId(2), ALONE, &tokens(BLOCK_SIZE - 1), None);
    step(&mut batcher);
    step(&mut batcher);
    assert_eq!((batcher.num_running(), batcher.pool().num_free()), (2, 0));
    // Both need a second block now.
    assert_eq!(step(&mut batcher), [(1, BLOCK_SIZE, 1, true)]);
    assert_eq!((batcher.num_running(), batcher.num_waiting()), (1, 1));
    batcher.remove(SessionId(1));
    assert_eq!(step(&mut batcher), [(2, 0, BLOCK_SIZE + 1, true)]);
}

const GREEDY: ClientId = ClientId(1);
const NEIGHBOUR: ClientId = ClientId(2);

/// A batcher whose places are all taken by one client, of whose sessions more wait.
fn crowded(max_batch_tokens: usize, places: u64, num_blocks: usize) -> Batcher {
    let mut batcher = batcher(max_batch_tokens, places as usize, num_blocks);
    (0..2 * places).for_each(|id| batcher.submit(SessionId(id), GREEDY, &tokens(1), None));
    step(&mut batcher);
    assert_eq!(batcher.num_running(), places as usize);
    batcher
}

#[test]
fn a_newcomer_starts_at_once_in_place_of_the_youngest_of_who_runs_the_most() {
    let mut batcher = crowded(64, 16, 1000);
    batcher.submit(SessionId(100), NEIGHBOUR, &tokens(4), None);
    let stepped = step(&mut batcher);
    assert_eq!(stepped.iter().map(|chunk| chunk.0).collect::<Vec<_>>(), (0..15).chain([100]).collect::<Vec<_>>());
    assert!(stepped.contains(&(100, 0, 4, true)));
    // The place that it leaves is that of the one that gave way, before those that have not begun.
    batcher.remove(SessionId(100));
    assert!(step(&mut batcher).contains(&(15, 0, 2, true)));
}

#[test]
fn beyond_its_entitlement_a_client_gets_the_places_that_become_free() {
    let mut batcher = crowded(64, 16, 1000);
    (100..110).for_each(|id| batcher.submit(SessionId(id), NEIGHBOUR, &tokens(1), None));
    let of_the_neighbour = |batcher: &mut Batcher| step(batcher).iter().filter(|chunk| chunk.0 >= 100).count();
    assert_eq!(of_the_neighbour(&mut batcher), 16 / ENTITLED_SHARE);
    assert_eq!(of_the_neighbour(&mut batcher), 16 / ENTITLED_SHARE);
    batcher.remove(SessionId(0));
    assert_eq!(of_the_neighbour(&mut batcher), 16 / ENTITLED_SHARE + 1);
}

#[test]
fn a_newcomer_reads_its_prompt_beside_a_longer_one_that_came_before() {
    let mut batcher = batcher(100, 8, 1000);
    batcher.submit(SessionId(1), GREEDY, &tokens(10_000), None);
    batcher.submit(SessionId(2), GREEDY, &tokens(10_000), None);
    assert_eq!(step(&mut batcher), [(1, 0, 100, false)]);
    batcher.submit(SessionId(3), NEIGHBOUR, &tokens(60), None);
    assert_eq!(step(&mut batcher), [(3, 0, 50, false), (1, 100, 50, false)]);
    assert_eq!(step(&mut batcher), [(3, 50, 10, true), (1, 150, 90, false)], "what it leaves is the other's");
}

#[test]
fn a_newcomer_gets_blocks_from_who_has_the_most_sequences_and_never_from_the_oldest() {
    let mut batcher = batcher(1000, 8, 4);
    // Two blocks each.
    (0..3).for_each(|id| batcher.submit(SessionId(id), GREEDY, &tokens(BLOCK_SIZE), None));
    step(&mut batcher);
    assert_eq!((batcher.num_running(), batcher.pool().num_free()), (2, 0));
    batcher.submit(SessionId(10), NEIGHBOUR, &tokens(1), None);
    assert_eq!(step(&mut batcher), [(0, BLOCK_SIZE, 1, true), (10, 0, 1, true)]);
    // Now both run one: nobody holds more than another.
    batcher.submit(SessionId(11), NEIGHBOUR, &tokens(2 * BLOCK_SIZE), None);
    assert_eq!(step(&mut batcher), [(0, BLOCK_SIZE + 1, 1, true), (10, 1, 1, true)]);
}

#[test]
fn decode_takes_blocks_from_who_runs_the_most() {
    let mut batcher = batcher(1000, 8, 4);
    (0..3).for_each(|id| batcher.submit(SessionId(id), GREEDY, &tokens(BLOCK_SIZE - 1), None));
    step(&mut batcher);
    batcher.submit(SessionId(10), NEIGHBOUR, &tokens(1), None);
    step(&mut batcher);
    assert_eq!((batcher.num_running(), batcher.pool().num_free()), (4, 0));
    // The greedy client's sequences need a second block each; the youngest sequence of all is the neighbour's.
    let stepped: Vec<u64> = step(&mut batcher).iter().map(|chunk| chunk.0).collect();
    assert_eq!(stepped, [0, 10]);
}

/// A scope, for sequences that share.
fn shared() -> Option<Scope<'static>> {
    PrefixCache::Shared.scope(ALONE, None)
}

#[test]
fn a_prompt_that_was_there_before_is_computed_from_its_last_block_on() {
    let mut batcher = batcher(1000, 8, 100);
    let mut ask = |id: u64, num_tokens: usize, scope: Option<Scope<'_>>| {
        batcher.submit(SessionId(id), ALONE, &tokens(num_tokens), scope);
        let steps = step(&mut batcher);
        batcher.remove(SessionId(id));
        steps[0]
    };
    assert_eq!(ask(1, 3 * BLOCK_SIZE, shared()), (1, 0, 3 * BLOCK_SIZE, true));
    assert_eq!(ask(2, 3 * BLOCK_SIZE + 5, shared()), (2, 3 * BLOCK_SIZE, 5, true));
    assert_eq!(ask(3, 3 * BLOCK_SIZE + 1, shared()), (3, 3 * BLOCK_SIZE, 1, true));
    // The last token gives the next one, so that it is computed, and its block with it.
    assert_eq!(ask(4, 3 * BLOCK_SIZE, shared()), (4, 2 * BLOCK_SIZE, BLOCK_SIZE, true));
    assert_eq!(ask(5, BLOCK_SIZE + 1, PrefixCache::Shared.scope(ALONE, Some("salt"))), (5, 0, BLOCK_SIZE + 1, true));
    assert_eq!(ask(6, BLOCK_SIZE + 1, None), (6, 0, BLOCK_SIZE + 1, true));
}

#[test]
fn an_answer_is_the_beginning_of_the_next_question() {
    let mut batcher = batcher(1000, 8, 100);
    batcher.submit(SessionId(1), ALONE, &tokens(BLOCK_SIZE - 1), shared());
    // The prompt, and of the answer so many that the second block is whole in the cache.
    (0..=BLOCK_SIZE + 1).for_each(|_| drop(step(&mut batcher)));
    batcher.submit(SessionId(2), ALONE, &tokens(3 * BLOCK_SIZE), shared());
    assert_eq!(step(&mut batcher)[1], (2, 2 * BLOCK_SIZE, BLOCK_SIZE, true));
}

#[test]
fn blocks_that_are_shared_are_there_once() {
    let mut batcher = batcher(1000, 8, 5);
    batcher.submit(SessionId(1), ALONE, &tokens(2 * BLOCK_SIZE + 1), shared());
    step(&mut batcher);
    // Each has two blocks with the first, and one of its own.
    (2..4).for_each(|id| batcher.submit(SessionId(id), ALONE, &tokens(2 * BLOCK_SIZE + 1), shared()));
    step(&mut batcher);
    assert_eq!((batcher.num_running(), batcher.pool().num_free()), (3, 0));
    batcher.remove(SessionId(1));
    assert_eq!(batcher.pool().num_free(), 1);
    batcher.remove(SessionId(2));
    batcher.remove(SessionId(3));
    assert_eq!(batcher.pool().num_free(), 5);
}

#[test]
fn a_preempted_sequence_goes_on_from_what_is_left_of_it() {
    let mut batcher = batcher(1000, 8, 4);
    batcher.submit(SessionId(1), ALONE, &tokens(BLOCK_SIZE - 1), None);
    batcher.submit(SessionId(2), ALONE, &tokens(2 * BLOCK_SIZE), shared());
    step(&mut batcher);
    assert_eq!(batcher.pool().num_free(), 0);
    step(&mut batcher);
    assert_eq!(step(&mut batcher), [(1, BLOCK_SIZE, 1, true)]);
    batcher.remove(SessionId(1));
    assert_eq!(step(&mut batcher), [(2, 2 * BLOCK_SIZE, 2, true)]);
}

#[test]
fn what_a_failed_sequence_left_is_not_shared() {
    let mut batcher = batcher(1000, 8, 100);
    batcher.submit(SessionId(1), ALONE, &tokens(2 * BLOCK_SIZE), shared());
    step(&mut batcher);
    batcher.discard(SessionId(1));
    batcher.submit(SessionId(2), ALONE, &tokens(2 * BLOCK_SIZE), shared());
    assert_eq!(step(&mut batcher), [(2, 0, 2 * BLOCK_SIZE, true)]);
}
