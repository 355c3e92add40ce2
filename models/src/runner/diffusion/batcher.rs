//! Which sessions take the next diffusion step together. Pure: ids and keys, no tensors, no clock.
//!
//! One queue for all phases, in which clients take turns ([`FairQueue`]). The session whose turn it is leads the next step
//! and is joined by others with an equal [`StepKey`], as far as the rows go; all of them go to the back when the step is
//! done. So among n sessions of one client nobody waits for more than n - 1 steps between two of its own, whatever the
//! others are doing, and a client with one session leads every second step beside a client with many.

use super::course::Expert;
use super::inputs::{Inputs, distinct};
use super::passes::PassId;
use crate::diffusion::Canvas;
use crate::diffusion::acceleration::CacheMethod;
use crate::lora::LoraKey;
use crate::request::{ClientId, Phase, SessionId};
use crate::runner::fair_queue::FairQueue;

/// What decides about who may share a step. `I` is what a family has encoded.
#[derive(Debug, Clone, PartialEq)]
pub enum StepKey<I> {
    /// A bounded part of what these sessions wait for.
    Load(Load),
    /// The first step of a pass over inputs of several sessions, equal ones once.
    Encode(Inputs<I>),
    /// The next step of a pass that is under way.
    GoOnEncoding(PassId, Phase),
    /// One prediction per row, at timesteps that may differ.
    Denoise(ShapeKey),
    /// The last prediction of a session once more, in f32; alone.
    Mend(SessionId),
    /// One chunk of pixels; a session decodes alone.
    VaeDecode(SessionId),
}

/// What is not on the device all the time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Load {
    /// The text encoders.
    TextEncoders,
    /// Those of an expert for a phase, in f32.
    InF32(MendKey),
    /// What these requests add to layers.
    Adapters(Layers, LoraKey),
}

/// Whose layers a set of terms is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layers {
    /// Those of the model itself.
    Own,
    /// Those of text encoders that come and go.
    OfLentEncoders,
    /// Those of networks in f32.
    InF32(MendKey),
}

/// Whose work is done once more in f32, and which.
pub type MendKey = (Expert, Phase);

/// What the rows of one denoising batch have in common, so that their tensors stack and one network serves them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShapeKey {
    /// Of the latents.
    pub canvas: CanvasKey,
    /// Of the conditioning, as its family says.
    pub conditioning: Vec<usize>,
    /// What the cache of each row looks at, where they have one.
    pub cache: Option<CacheMethod>,
    /// What is added to the network's layers.
    pub loras: LoraKey,
    /// Whose network.
    pub expert: Expert,
}

/// Width, height and frames.
pub type CanvasKey = [usize; 3];

/// What latents of this canvas must agree in.
pub fn canvas_key(canvas: &Canvas) -> CanvasKey {
    [canvas.width, canvas.height, canvas.num_frames]
}

impl<I: PartialEq> StepKey<I> {
    /// Kind of the step.
    pub fn phase(&self) -> Phase {
        match self {
            StepKey::Load(_) => Phase::Load,
            StepKey::Encode(inputs) => inputs.pass.phase,
            StepKey::GoOnEncoding(_, phase) => *phase,
            StepKey::Denoise(_) | StepKey::Mend(_) => Phase::Denoise,
            StepKey::VaeDecode(_) => Phase::VaeDecode,
        }
    }

    /// Whether a session with this key may take a step that one with the key `leader` leads.
    fn joins(&self, leader: &Self) -> bool {
        match (self, leader) {
            (StepKey::Encode(own), StepKey::Encode(leader)) => own.pass == leader.pass,
            _ => self == leader,
        }
    }

    fn inputs(&self) -> Option<&Inputs<I>> {
        match self {
            StepKey::Encode(inputs) => Some(inputs),
            _ => None,
        }
    }
}

/// Sessions that take one step together, in the order in which they waited.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch<I> {
    /// Of the first member, which the others join.
    pub key: StepKey<I>,
    /// At least one.
    pub sessions: Vec<SessionId>,
}

/// The queue of sessions that wait for their next step.
#[derive(Debug)]
pub struct Batcher<I> {
    queue: FairQueue<Waiting<I>>,
    max_rows: usize,
}

#[derive(Debug)]
struct Waiting<I> {
    session: SessionId,
    client: ClientId,
    key: StepKey<I>,
    rows: usize,
}

impl<I: Clone + PartialEq> Batcher<I> {
    /// `max_rows`: most rows of one denoising step. A session that alone has more rows than a step may have still gets its
    /// step (alone); the runner then computes its rows one after the other.
    pub fn new(max_rows: usize) -> Self {
        Self { queue: FairQueue::default(), max_rows }
    }

    /// Puts a session that is not in the queue behind those of its client. `rows` is what it adds to a denoising batch: one, and one more
    /// where its next step is guided; other steps do the same work for one session as for many and add none.
    pub fn enqueue(&mut self, session: SessionId, client: ClientId, key: StepKey<I>, rows: usize) {
        self.queue.push_back(client, Waiting { session, client, key, rows });
    }

    /// Takes a session out, wherever it stands.
    pub fn remove(&mut self, session: SessionId) {
        self.queue.retain(|waiting| waiting.session != session);
    }

    /// What [`Batcher::take`] would give.
    pub fn peek(&self) -> Option<Batch<I>> {
        // Those of the client whose turn it is come first.
        let front = self.queue.iter().next()?;
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
    fn fits(&self, batch: &[&Waiting<I>]) -> bool {
        let inputs = batch[0].key.inputs();
        let encoded = distinct(batch.iter().filter_map(|waiting| waiting.key.inputs())).len();
        let rows: usize = batch.iter().map(|waiting| waiting.rows).sum();
        inputs.is_none_or(|inputs| encoded <= inputs.pass.max_rows) && rows <= self.max_rows
    }

    /// Takes the next step's sessions out of the queue; the caller enqueues those that go on.
    pub fn take(&mut self) -> Option<Batch<I>> {
        let batch = self.peek()?;
        let client = self.queue.iter().next()?.client;
        self.queue.take(client);
        self.queue.retain(|waiting| !batch.sessions.contains(&waiting.session));
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::runner::diffusion::inputs::Pass;

    /// A key and the rows that come with it.
    type Step = (StepKey<String>, usize);

    /// Most clients of the simulation.
    const MAX_CLIENTS: u64 = 3;

    /// Most texts of a pass.
    const MAX_TEXTS: usize = 8;

    fn shape(width: usize, guided: bool) -> Step {
        of_expert(0, width, guided)
    }

    fn of_expert(expert: Expert, width: usize, guided: bool) -> Step {
        let canvas = canvas_key(&Canvas { width, height: 64, num_frames: 1, fps: 0 });
        let loras = LoraKey::default();
        let shape = ShapeKey { canvas, conditioning: vec![8], cache: None, loras, expert };
        (StepKey::Denoise(shape), 1 + usize::from(guided))
    }

    fn encode(prompt: &str) -> Step {
        prompts(&[prompt], 8)
    }

    fn prompts(texts: &[&str], sequence_length: usize) -> Step {
        let loras = Some(LoraKey::default());
        let pass =
            Pass { phase: Phase::Encode, components: &["text_encoder"], sequence_length, loras, max_rows: MAX_TEXTS };
        let rows = texts.iter().map(|text| (*text).to_owned()).collect();
        (StepKey::Encode(Inputs { pass, rows }), 0)
    }

    fn image(name: &str) -> Step {
        let pass = Pass { phase: Phase::VaeEncode, components: &["vae"], sequence_length: 0, loras: None, max_rows: 1 };
        (StepKey::Encode(Inputs { pass, rows: vec![name.to_owned()] }), 0)
    }

    fn decode(id: u64) -> Step {
        (StepKey::VaeDecode(SessionId(id)), 0)
    }

    fn check(max_rows: usize, waiting: &[Step], expected: &[u64]) {
        let mut batcher = Batcher::new(max_rows);
        for (id, (key, rows)) in waiting.iter().enumerate() {
            batcher.enqueue(SessionId(id as u64), ClientId::default(), key.clone(), *rows);
        }
        let found: Vec<u64> = batcher.peek().into_iter().flat_map(|b| b.sessions).map(|s| s.0).collect();
        assert_eq!(found, expected, "{max_rows} rows, {waiting:?}");
    }

    #[test]
    fn sessions_with_other_loras_share_no_step() {
        let with = |file: u64, (key, rows): Step| {
            let loras = LoraKey::of_file(file);
            match key {
                StepKey::Encode(Inputs { pass, rows: texts }) => {
                    let pass = Pass { loras: Some(loras), ..pass };
                    (StepKey::Encode(Inputs { pass, rows: texts }), rows)
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
        let many: Vec<String> = (0..MAX_TEXTS).map(|i| i.to_string()).collect();
        let mut keys: Vec<Step> = many.iter().map(|text| prompts(&[text, "0"], 8)).collect();
        keys.push(encode("one too many"));
        keys.push(encode("3"));
        let all_but_one: Vec<u64> = (0..keys.len() as u64).filter(|id| *id != MAX_TEXTS as u64).collect();
        check(1, &keys, &all_but_one);
    }

    #[test]
    fn a_session_with_more_texts_than_a_step_takes_has_one_alone() {
        let many: Vec<String> = (0..=MAX_TEXTS).map(|i| i.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        check(1, &[prompts(&many, 8), encode("other")], &[0]);
    }

    #[test]
    fn an_image_is_encoded_for_those_that_wait_for_it_alone() {
        check(4, &[image("a"), image("b"), encode("a"), image("a")], &[0, 3]);
    }

    #[test]
    fn those_of_one_pass_go_on_together() {
        let on = |pass: u64| (StepKey::GoOnEncoding(PassId::numbered(pass), Phase::Encode), 0);
        check(4, &[on(1), on(2), encode("a"), on(1)], &[0, 3]);
    }

    #[test]
    fn rows_of_different_experts_never_share_a_pass() {
        check(4, &[of_expert(0, 64, false), of_expert(1, 64, false), of_expert(0, 64, true)], &[0, 2]);
        check(4, &[of_expert(1, 64, false), of_expert(0, 64, false), of_expert(1, 64, false)], &[0, 2]);
    }

    #[test]
    fn a_client_with_one_session_leads_every_second_step() {
        let mut batcher = Batcher::new(4);
        let enqueue = |batcher: &mut Batcher<String>, id: u64| {
            let client = ClientId(u64::from(id == 9));
            let (key, rows) = decode(id);
            batcher.enqueue(SessionId(id), client, key, rows);
        };
        (0..10).for_each(|id| enqueue(&mut batcher, id));
        let mut leaders = Vec::new();
        for _ in 0..6 {
            let id = batcher.take().expect("there is work").sessions[0].0;
            enqueue(&mut batcher, id);
            leaders.push(id);
        }
        assert_eq!(leaders, [0, 9, 1, 9, 2, 9]);
    }

    #[test]
    fn decoding_is_done_alone() {
        check(4, &[decode(0), decode(1)], &[0]);
    }

    /// A session of the simulation: what it still has to do, and how many steps of others it may have to wait for.
    struct Simulated {
        client: u64,
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
        Submit { client: u64, guided: bool, width: usize, work: [usize; 3] },
        Cancel(usize),
        Step,
    }

    fn op() -> impl Strategy<Value = Op> {
        let work = (1..3usize, 1..6usize, 1..4usize).prop_map(|(e, d, v)| [e, d, v]);
        prop_oneof![
            1 => (0..MAX_CLIENTS, any::<bool>(), 1..3usize, work)
                .prop_map(|(client, guided, width, work)| Op::Submit { client, guided, width, work }),
            1 => (0..32usize).prop_map(Op::Cancel),
            6 => Just(Op::Step),
        ]
    }

    /// Steps for which a session may wait that stands behind those of its client: between two turns of that, every other
    /// client has one at most.
    fn patience(sessions: &BTreeMap<u64, Simulated>, num_clients: u64) -> usize {
        match num_clients {
            1 => sessions.len() - 1,
            _ => num_clients as usize * sessions.len(),
        }
    }

    /// Steps once and checks the rules that hold for every step.
    fn step(batcher: &mut Batcher<String>, max_rows: usize, num_clients: u64, sessions: &mut BTreeMap<u64, Simulated>) {
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
        let patience = patience(sessions, num_clients);
        for id in batch.sessions {
            let session = sessions.get_mut(&id.0).expect("only sessions that were not cancelled are stepped");
            assert!(session.next(id.0).is_some_and(|(key, _)| key.joins(&batch.key)));
            session.advance();
            session.patience = patience;
            match session.next(id.0) {
                Some((key, rows)) => batcher.enqueue(id, ClientId(session.client), key, rows),
                None => drop(sessions.remove(&id.0)),
            }
        }
    }

    proptest! {
        #[test]
        fn no_session_starves_and_all_end(
            max_rows in 1..6usize,
            num_clients in 1..=MAX_CLIENTS,
            ops in prop::collection::vec(op(), 1..400),
        ) {
            let mut batcher = Batcher::new(max_rows);
            let mut sessions = BTreeMap::new();
            for (id, op) in ops.into_iter().enumerate() {
                let id = id as u64;
                match op {
                    Op::Submit { client, guided, width, work } => {
                        let client = client % num_clients;
                        let session = Simulated { client, guided, width, remaining: work, patience: 0 };
                        let (key, rows) = session.next(id).expect("new sessions have work");
                        batcher.enqueue(SessionId(id), ClientId(client), key, rows);
                        sessions.insert(id, session);
                        let patience = patience(&sessions, num_clients);
                        sessions.get_mut(&id).expect("just put there").patience = patience;
                    }
                    Op::Cancel(nth) => {
                        let victim = sessions.keys().nth(nth).copied();
                        if let Some(victim) = victim {
                            sessions.remove(&victim);
                            batcher.remove(SessionId(victim));
                        }
                    }
                    Op::Step => step(&mut batcher, max_rows, num_clients, &mut sessions),
                }
            }
            let work_left: usize = sessions.values().flat_map(|session| session.remaining).sum();
            for _ in 0..work_left {
                step(&mut batcher, max_rows, num_clients, &mut sessions);
            }
            prop_assert!(sessions.is_empty());
            prop_assert_eq!(batcher.peek(), None);
        }
    }
}
