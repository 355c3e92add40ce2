//! Which sessions take the next diffusion step together. Pure: ids and keys, no tensors, no clock.
//!
//! One queue for all phases. The session at its front leads the next step and is joined by later ones with an equal
//! [`StepKey`], as far as the rows go; all of them go to the back when the step is done. So among n sessions nobody
//! waits for more than n - 1 steps between two of its own, whatever the others are doing.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::lora::LoraKey;
use crate::request::{Frame, Mask, Phase, SessionId};

/// Most texts of one encoding step: more wait for the next one, so that a step stays bounded.
pub const MAX_ENCODE_ROWS: usize = 8;

/// What decides about who may share a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepKey {
    /// Inputs to encode: prompts of several sessions in one pass, equal ones once; a picture for those that wait for it.
    Encode(Input),
    /// One prediction per row, at timesteps that may differ.
    Denoise(ShapeKey),
    /// One chunk of pixels; a session decodes alone.
    VaeDecode(SessionId),
}

/// What a session encodes before it denoises, in a step of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// For the text encoders.
    Prompts(Prompts),
    /// For the VAE.
    Picture(PictureInput),
    /// For the vision encoder.
    References(ReferenceInput),
}

/// Whose networks do a session's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// The model's own.
    Base,
    /// Those of the refiner that takes over from it.
    Refiner,
}

/// All reference pictures of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferenceInput {
    /// In any sizes.
    pub pictures: Vec<Arc<Frame>>,
    /// Whether there is a negative branch.
    pub guided: bool,
}

/// All texts of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompts {
    /// The prompt, then the negative one where there is guidance; `None` where the client gave none and that is not the
    /// same as the empty text.
    pub texts: Vec<Option<String>>,
    /// Tokens that they are padded or cut to.
    pub max_sequence_length: usize,
    /// What is added to the text encoders' layers.
    pub loras: LoraKey,
    /// Whose text encoders.
    pub network: Network,
}

/// Each text once, in the order in which they first come.
pub fn distinct_texts<'a>(prompts: impl IntoIterator<Item = &'a Prompts>) -> Vec<&'a str> {
    let mut distinct = Vec::new();
    for text in prompts.into_iter().flat_map(|prompts| prompts.texts.iter().flatten()) {
        if !distinct.contains(&text.as_str()) {
            distinct.push(text);
        }
    }
    distinct
}

/// A picture for the VAE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PictureInput {
    /// In the size of the request.
    pub picture: Arc<Frame>,
    /// What is blanked before.
    pub blanked: Option<Arc<Mask>>,
    /// Whether the VAE works on it in tiles, where it is larger than one.
    pub tiled: bool,
}

impl Input {
    /// Kind of the step that encodes it.
    pub fn phase(&self) -> Phase {
        match self {
            Input::Prompts(_) | Input::References(_) => Phase::Encode,
            Input::Picture(_) => Phase::VaeEncode,
        }
    }
}

/// What the rows of one denoising batch have in common, so that their tensors stack and one network serves them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShapeKey {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Frames of a clip; 1 for a picture.
    pub num_frames: usize,
    /// Tokens of the prompt.
    pub max_sequence_length: usize,
    /// Whether each row has a first-block cache.
    pub is_cached: bool,
    /// Reference pictures of each row.
    pub num_references: usize,
    /// What is added to the network's layers.
    pub loras: LoraKey,
    /// Whose network.
    pub network: Network,
}

impl StepKey {
    /// Kind of the step.
    pub fn phase(&self) -> Phase {
        match self {
            StepKey::Encode(input) => input.phase(),
            StepKey::Denoise(_) => Phase::Denoise,
            StepKey::VaeDecode(_) => Phase::VaeDecode,
        }
    }

    /// Whether a session with this key may take a step that one with the key `leader` leads.
    fn joins(&self, leader: &StepKey) -> bool {
        match (self, leader) {
            (StepKey::Encode(Input::Prompts(own)), StepKey::Encode(Input::Prompts(leader))) => {
                let key = |prompts: &Prompts| (prompts.max_sequence_length, prompts.network);
                key(own) == key(leader) && own.loras == leader.loras
            }
            _ => self == leader,
        }
    }

    fn prompts(&self) -> Option<&Prompts> {
        match self {
            StepKey::Encode(Input::Prompts(prompts)) => Some(prompts),
            _ => None,
        }
    }
}

/// Sessions that take one step together, in the order in which they waited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Of the first member, which the others join.
    pub key: StepKey,
    /// At least one.
    pub sessions: Vec<SessionId>,
}

/// The queue of sessions that wait for their next step.
#[derive(Debug)]
pub struct Batcher {
    queue: VecDeque<Waiting>,
    max_rows: usize,
}

#[derive(Debug)]
struct Waiting {
    session: SessionId,
    key: StepKey,
    rows: usize,
}

impl Batcher {
    /// `max_rows`: most rows of one denoising step. A session that alone has more rows than a step may have still gets its
    /// step (alone); the runner then computes its rows one after the other.
    pub fn new(max_rows: usize) -> Self {
        Self { queue: VecDeque::new(), max_rows }
    }

    /// Puts a session that is not in the queue at its back. `rows` is what it adds to a denoising batch: one, and one more
    /// where its next step is guided; other steps do the same work for one session as for many and add none.
    pub fn enqueue(&mut self, session: SessionId, key: StepKey, rows: usize) {
        self.queue.push_back(Waiting { session, key, rows });
    }

    /// Takes a session out, wherever it stands.
    pub fn remove(&mut self, session: SessionId) {
        self.queue.retain(|waiting| waiting.session != session);
    }

    /// What [`Batcher::take`] would give.
    pub fn peek(&self) -> Option<Batch> {
        let front = self.queue.front()?;
        let mut batch = vec![front];
        for waiting in self.queue.iter().skip(1).filter(|waiting| waiting.key.joins(&front.key)) {
            // One of two rows that does not fit leaves its place to one of one row behind it.
            batch.push(waiting);
            if !self.fits(&batch) {
                batch.pop();
            }
        }
        Some(Batch { key: front.key.clone(), sessions: batch.iter().map(|waiting| waiting.session).collect() })
    }

    /// Whether so many rows may take one step; other steps than encoding and denoising have none.
    fn fits(&self, batch: &[&Waiting]) -> bool {
        let texts = distinct_texts(batch.iter().filter_map(|waiting| waiting.key.prompts()));
        let rows: usize = batch.iter().map(|waiting| waiting.rows).sum();
        texts.len() <= MAX_ENCODE_ROWS && rows <= self.max_rows
    }

    /// Takes the next step's sessions out of the queue; the caller enqueues those that go on.
    pub fn take(&mut self) -> Option<Batch> {
        let batch = self.peek()?;
        self.queue.retain(|waiting| !batch.sessions.contains(&waiting.session));
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// A key and the rows that come with it.
    type Step = (StepKey, usize);

    fn shape(width: usize, guided: bool) -> Step {
        let shape = ShapeKey {
            width,
            height: 64,
            num_frames: 1,
            max_sequence_length: 8,
            is_cached: false,
            num_references: 0,
            loras: LoraKey::default(),
            network: Network::Base,
        };
        (StepKey::Denoise(shape), 1 + usize::from(guided))
    }

    fn encode(prompt: &str) -> Step {
        prompts(&[prompt], 8)
    }

    fn prompts(texts: &[&str], max_sequence_length: usize) -> Step {
        let texts = texts.iter().map(|text| Some((*text).to_owned())).collect();
        (
            StepKey::Encode(Input::Prompts(Prompts {
                texts,
                max_sequence_length,
                loras: LoraKey::default(),
                network: Network::Base,
            })),
            0,
        )
    }

    fn decode(id: u64) -> Step {
        (StepKey::VaeDecode(SessionId(id)), 0)
    }

    fn check(max_rows: usize, waiting: &[Step], expected: &[u64]) {
        let mut batcher = Batcher::new(max_rows);
        for (id, (key, rows)) in waiting.iter().enumerate() {
            batcher.enqueue(SessionId(id as u64), key.clone(), *rows);
        }
        let found: Vec<u64> = batcher.peek().into_iter().flat_map(|b| b.sessions).map(|s| s.0).collect();
        assert_eq!(found, expected, "{max_rows} rows, {waiting:?}");
    }

    #[test]
    fn sessions_with_other_loras_share_no_step() {
        let with = |file: u64, (key, rows): Step| {
            let loras = LoraKey::of_file(file);
            match key {
                StepKey::Encode(Input::Prompts(prompts)) => {
                    (StepKey::Encode(Input::Prompts(Prompts { loras, ..prompts })), rows)
                }
                StepKey::Denoise(shape) => (StepKey::Denoise(ShapeKey { loras, ..shape }), rows),
                other => (other, rows),
            }
        };
        for step in [encode("a"), shape(64, false)] {
            let waiting = [with(1, step.clone()), step.clone(), with(2, step.clone()), with(1, step.clone())];
            check(4, &waiting, &[0, 3]);
            check(4, &waiting[1..], &[0]);
        }
    }

    #[test]
    fn the_front_leads_and_equal_keys_join() {
        check(4, &[], &[]);
        check(4, &[shape(64, false), shape(128, false), shape(64, false)], &[0, 2]);
        check(2, &[shape(64, false), shape(64, false), shape(64, false)], &[0, 1]);
        check(4, &[shape(64, true), shape(64, true), shape(64, true)], &[0, 1]);
        check(3, &[shape(64, true), shape(64, true)], &[0]);
    }

    #[test]
    fn guided_and_unguided_steps_share_a_pass_as_far_as_the_rows_go() {
        check(4, &[shape(64, true), shape(64, false), shape(64, false), shape(64, false)], &[0, 1, 2]);
        check(3, &[shape(64, false), shape(64, false), shape(64, true), shape(64, false)], &[0, 1, 3]);
        check(3, &[shape(64, false), shape(64, true), shape(64, false)], &[0, 1]);
    }

    #[test]
    fn guided_session_is_never_split() {
        check(1, &[shape(64, true), shape(64, true)], &[0]);
    }

    #[test]
    fn texts_of_one_length_are_encoded_together_and_equal_ones_count_once() {
        check(1, &[encode("a"), encode("b"), encode("a"), shape(64, false)], &[0, 1, 2]);
        check(1, &[encode("a"), prompts(&["b"], 9), prompts(&["c", "a"], 8)], &[0, 2]);
        let many: Vec<String> = (0..MAX_ENCODE_ROWS).map(|i| i.to_string()).collect();
        let mut keys: Vec<Step> = many.iter().map(|text| prompts(&[text, "0"], 8)).collect();
        keys.push(encode("one too many"));
        keys.push(encode("3"));
        let all_but_one: Vec<u64> = (0..keys.len() as u64).filter(|id| *id != MAX_ENCODE_ROWS as u64).collect();
        check(1, &keys, &all_but_one);
    }

    #[test]
    fn a_session_with_more_texts_than_a_step_takes_has_one_alone() {
        let many: Vec<String> = (0..=MAX_ENCODE_ROWS).map(|i| i.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        check(1, &[prompts(&many, 8), encode("other")], &[0]);
    }

    #[test]
    fn an_absent_text_takes_no_row() {
        let absent = Prompts {
            texts: vec![Some("a".into()), None],
            max_sequence_length: 8,
            loras: LoraKey::default(),
            network: Network::Base,
        };
        assert_eq!(distinct_texts([&absent, &absent]), ["a"]);
    }

    #[test]
    fn decoding_is_done_alone() {
        check(4, &[decode(0), decode(1)], &[0]);
    }

    /// A session of the simulation: what it still has to do, and how many steps of others it may have to wait for.
    struct Simulated {
        /// Guided in every step, or in every second one.
        guided: bool,
        width: usize,
        remaining: [usize; 3],
        patience: usize,
    }

    impl Simulated {
        fn next(&self, id: u64) -> Option<Step> {
            match self.remaining.iter().position(|left| *left > 0)? {
                0 => Some(encode(["a", "b"][self.remaining[0] % 2])),
                1 => Some(shape(self.width, self.guided || self.remaining[1].is_multiple_of(2))),
                _ => Some(decode(id)),
            }
        }

        fn advance(&mut self) {
            let left = self.remaining.iter_mut().find(|left| **left > 0).expect("a stepped session has work left");
            *left -= 1;
        }
    }

    #[derive(Debug, Clone)]
    enum Op {
        Submit { guided: bool, width: usize, work: [usize; 3] },
        Cancel(usize),
        Step,
    }

    fn op() -> impl Strategy<Value = Op> {
        let work = (1..3usize, 1..6usize, 1..4usize).prop_map(|(e, d, v)| [e, d, v]);
        prop_oneof![
            1 => (any::<bool>(), 1..3usize, work).prop_map(|(guided, width, work)| Op::Submit { guided, width, work }),
            1 => (0..32usize).prop_map(Op::Cancel),
            6 => Just(Op::Step),
        ]
    }

    /// Steps once and checks the rules that hold for every step.
    fn step(batcher: &mut Batcher, max_rows: usize, sessions: &mut BTreeMap<u64, Simulated>) {
        let promised = batcher.peek();
        let batch = batcher.take();
        assert_eq!(promised, batch);
        assert_eq!(batch.is_none(), sessions.is_empty(), "there is a step as long as there is a session");
        let Some(batch) = batch else { return };
        let steps = batch.sessions.iter().filter_map(|id| sessions[&id.0].next(id.0));
        let rows: usize = steps.map(|(_, rows)| rows).sum();
        assert!(rows <= max_rows || batch.sessions.len() == 1, "{rows} rows of {max_rows}");
        for (id, session) in sessions.iter_mut().filter(|(id, _)| !batch.sessions.contains(&SessionId(**id))) {
            assert!(session.patience > 0, "session {id} starves");
            session.patience -= 1;
        }
        let others = sessions.len() - 1;
        for id in batch.sessions {
            let session = sessions.get_mut(&id.0).expect("only sessions that were not cancelled are stepped");
            assert!(session.next(id.0).is_some_and(|(key, _)| key.joins(&batch.key)));
            session.advance();
            session.patience = others;
            match session.next(id.0) {
                Some((key, rows)) => batcher.enqueue(id, key, rows),
                None => drop(sessions.remove(&id.0)),
            }
        }
    }

    proptest! {
        #[test]
        fn no_session_starves_and_all_end(max_rows in 1..6usize, ops in prop::collection::vec(op(), 1..400)) {
            let mut batcher = Batcher::new(max_rows);
            let mut sessions = BTreeMap::new();
            for (id, op) in ops.into_iter().enumerate() {
                let id = id as u64;
                match op {
                    Op::Submit { guided, width, work } => {
                        let session = Simulated { guided, width, remaining: work, patience: sessions.len() };
                        let (key, rows) = session.next(id).expect("new sessions have work");
                        batcher.enqueue(SessionId(id), key, rows);
                        sessions.insert(id, session);
                    }
                    Op::Cancel(nth) => {
                        let victim = sessions.keys().nth(nth).copied();
                        if let Some(victim) = victim {
                            sessions.remove(&victim);
                            batcher.remove(SessionId(victim));
                        }
                    }
                    Op::Step => step(&mut batcher, max_rows, &mut sessions),
                }
            }
            let work_left: usize = sessions.values().flat_map(|session| session.remaining).sum();
            for _ in 0..work_left {
                step(&mut batcher, max_rows, &mut sessions);
            }
            prop_assert!(sessions.is_empty());
            prop_assert_eq!(batcher.peek(), None);
        }
    }
}
