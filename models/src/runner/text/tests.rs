//! Sessions of a network without weights.

use candle_core::{DType, Device};

use super::*;
use crate::device::{DeviceSpec, Placement, WeightDtype};
use crate::kv::{KvFormat, KvShape};
use crate::layers::decoder::PreparedInput;
use crate::tokenizer::Tokenizer;

/// A network without weights: after every token comes the next one of the vocabulary.
struct Counter;

const VOCAB_SIZE: usize = 500;

impl CausalLm for Counter {
    fn vocab_size(&self) -> usize {
        VOCAB_SIZE
    }

    fn context_len(&self) -> usize {
        256
    }

    fn kv_shape(&self) -> KvShape {
        KvShape { num_layers: 1, num_key_value_heads: 1, head_dim: 2 }
    }

    fn prepare<'a>(&self, input: &'a DecoderInput, caches: &KvCaches) -> Result<PreparedInput<'a>> {
        let angles = Tensor::zeros((input.len(), 1), DType::F32, &Device::Cpu)?;
        PreparedInput::new(input, (angles.clone(), angles), 1, caches)
    }

    /// The logits themselves.
    fn states(&self, input: &PreparedInput<'_>, _caches: &KvCaches) -> Result<Option<Tensor>> {
        let mut logits = Vec::new();
        for token in input.tokens().to_vec1::<u32>()? {
            let mut row = vec![0f32; VOCAB_SIZE];
            let next = token as usize + 1;
            *row.get_mut(next).ok_or_else(|| Error::Device(format!("no token {next}")))? = 1.0;
            logits.push(row);
        }
        input.asked_for(&Tensor::new(logits, &Device::Cpu)?)
    }

    fn head(&self, states: &Tensor) -> Result<Tensor> {
        Ok(states.clone())
    }
}

fn runner(max_batch_sequences: usize) -> TextRunner<Counter> {
    let dir = crate::testing::repository().join("tests/goldens/qwen2-yarn/checkpoint");
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("a CPU");
    let format = KvFormat::computed(&placement);
    let caches = KvCaches::new(Counter.kv_shape(), format, 16, &placement).expect("allocated");
    let tokenizer = Tokenizer::from_dir(&dir).expect("a tokenizer");
    let model = LanguageModel { network: Counter, tokenizer, eos_token_ids: Vec::new() };
    TextRunner::new(model, caches, Limits { max_batch_tokens: 64, max_batch_sequences }, RunnerOptions::default())
}

fn request(prompt: Vec<u32>) -> Request {
    Request::Text(TextRequest { ignore_eos: true, ..TextRequest::greedy(prompt, 4) })
}

/// Runs until idle and gives the tokens of `id`.
fn tokens_of(runner: &mut TextRunner<Counter>, id: SessionId) -> Vec<u32> {
    let mut events = Events::default();
    while runner.next().is_some() {
        runner.step(&mut events).expect("computed");
    }
    let mut all = Vec::new();
    for (session, event) in events.drain() {
        if let (true, Event::Text { tokens, .. }) = (session == id, event) {
            all.extend(tokens);
        }
    }
    all
}

#[test]
fn a_failed_step_takes_its_own_sessions_only() {
    for is_asynchronous in [false, true] {
        let mut runner = runner(2);
        runner.is_asynchronous = is_asynchronous;
        check_failed_step(runner);
    }
}

fn check_failed_step(mut runner: TextRunner<Counter>) {
    let (first, second, third) = (SessionId(1), SessionId(2), SessionId(3));
    runner.submit(third, request(vec![7, 8, 9])).expect("accepted");
    let expected = tokens_of(&mut runner, third);
    assert_eq!(expected, [10, 11, 12, 13]);

    for (id, prompt) in [(first, vec![1, 2]), (second, vec![3, 4, 5]), (third, vec![7, 8, 9])] {
        runner.submit(id, request(prompt)).expect("accepted");
    }
    let mut events = Events::default();
    runner.step(&mut events).expect("computed");
    // A token outside of the vocabulary makes the whole forward pass fail.
    let session = runner.sessions.get_mut(&second).expect("it runs");
    *session.tokens.last_mut().expect("it has tokens") = u32::MAX - 1;
    // Where a device computes beside the host, its first half fails.
    assert_eq!(runner.launch().is_err(), runner.is_asynchronous);
    if !runner.is_asynchronous {
        assert!(runner.collect(&mut events).is_err());
    }
    assert_eq!(runner.evict_step(), [first, second]);
    assert_eq!((runner.status().running, runner.status().waiting, runner.status().kv_blocks_used), (0, 1, 0));
    assert_eq!(runner.evict_step(), []);
    assert_eq!(tokens_of(&mut runner, third), expected);
}

#[test]
fn a_session_starts_once_and_ends_once() {
    let mut runner = runner(2);
    runner.submit(SessionId(1), request(vec![1; 100])).expect("accepted");
    let mut events = Events::default();
    while runner.next().is_some() {
        runner.step(&mut events).expect("computed");
    }
    let events: Vec<Event> = events.drain().map(|(_, event)| event).collect();
    assert!(matches!(events.first(), Some(Event::Started)));
    assert!(matches!(events.last(), Some(Event::Finished { reason: FinishReason::Length, .. })));
    let with_tokens =
        events.iter().filter(|event| matches!(event, Event::Text { tokens, .. } if tokens.len() == 1)).count();
    let starts = events.iter().filter(|event| matches!(event, Event::Started)).count();
    let ends = events.iter().filter(|event| event.is_terminal()).count();
    assert_eq!((with_tokens, starts, ends), (4, 1, 1));
}

#[test]
fn beside_a_thousand_streams_of_a_client_a_neighbour_has_its_token_in_the_next_step() {
    const NEIGHBOUR: SessionId = SessionId(1000);
    let mut runner = runner(4);
    let prompt = |id: u64| vec![id as u32 % 400];
    for id in 0..NEIGHBOUR.0 {
        runner.submit_for(ClientId(1), SessionId(id), request(prompt(id))).expect("accepted");
    }
    let mut events = Events::default();
    runner.step(&mut events).expect("computed");
    runner.step(&mut events).expect("computed");
    let mut tokens: HashMap<SessionId, Vec<u32>> = HashMap::new();
    let mut take = |events: &mut Events| {
        for (session, event) in events.drain() {
            if let Event::Text { tokens: new, .. } = event {
                tokens.entry(session).or_default().extend(new);
            }
        }
        tokens.clone()
    };
    take(&mut events);
    runner.submit_for(ClientId(2), NEIGHBOUR, request(prompt(NEIGHBOUR.0))).expect("accepted");
    runner.step(&mut events).expect("computed");
    assert_eq!(take(&mut events)[&NEIGHBOUR], [prompt(NEIGHBOUR.0)[0] + 1]);
    while runner.next().is_some() {
        runner.step(&mut events).expect("computed");
    }
    // Whoever gave up its place goes on as if nothing had been.
    for (session, tokens) in take(&mut events) {
        let first = prompt(session.0)[0] + 1;
        assert_eq!(tokens, (first..first + 4).collect::<Vec<_>>(), "{session:?}");
    }
}

#[test]
fn a_session_id_names_one_session() {
    let mut runner = runner(2);
    runner.submit(SessionId(1), request(vec![1])).expect("accepted");
    assert!(runner.submit(SessionId(1), request(vec![2])).is_err());
    runner.cancel(SessionId(2));
    assert_eq!(runner.status().waiting, 1);
}

#[test]
fn the_queue_has_a_bound() {
    let mut runner = runner(2);
    for id in 0..MAX_SESSIONS as u64 {
        runner.submit(SessionId(id), request(vec![1])).expect("accepted");
    }
    let refused = runner.submit(SessionId(MAX_SESSIONS as u64), request(vec![1]));
    assert!(matches!(refused, Err(Error::TooManySessions { limit: MAX_SESSIONS })));
    runner.cancel(SessionId(0));
    runner.submit(SessionId(MAX_SESSIONS as u64), request(vec![1])).expect("one has gone");
}
