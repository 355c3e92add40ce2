//! Llama and Qwen2 against transformers, and the promise of the text runner: the same tokens alone, in a batch, in any
//! chunking, after preemption, beside sessions that are cancelled.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use tale_models::cancel::CancelToken;
use tale_models::chat_template::ChatMessage;
use tale_models::checkpoint::Manifest;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::families::causal_lm::DecoderLm;
use tale_models::families::{llama, qwen2};
use tale_models::family::{LoadOptions, LoadedModel};
use tale_models::kv::{BLOCK_SIZE, BlockPool, BlockTable, KvCaches, KvFormat, blocks_for};
use tale_models::layers::decoder::DecoderInput;
use tale_models::loading;
use tale_models::request::{
    ClientId, Event, Events, FinishReason, PlacedLogprobs, Request, SessionId, TextRequest, TokenLogprobs, Usage,
};
use tale_models::runner::RunnerStatus;
use tale_models::runner::text::model::CausalLm;
use tale_models::{Encoding, Error, ModelCard, TextCard};

use crate::support::{assert_close, case_dir, golden_json, golden_tensors};

pub const CASES: [&str; 4] = ["llama-tied", "llama-untied", "qwen2", "qwen2-yarn"];
const GREEDY_TOKENS: usize = 48;
/// That of `qwen2-yarn`: its `factor` times its original context.
const SMALLEST_CONTEXT: usize = 192;
const TOLERANCE: f64 = 1e-4;

#[test]
fn logits_equal_the_reference() {
    for case in CASES {
        let model = network(case);
        let golden = golden_tensors(case);
        for (index, prompt) in prompts(case).iter().enumerate() {
            let logits = Sequence::new(prompt.clone()).logits(&model, prompt.len());
            assert_close(&format!("{case} logits.{index}"), &logits, &golden[&format!("logits.{index}")], TOLERANCE);
        }
    }
}

#[test]
fn logits_have_the_same_bits_in_any_chunking() {
    for case in CASES {
        let model = network(case);
        for prompt in prompts(case) {
            let whole = bits(&Sequence::new(prompt.clone()).logits(&model, prompt.len()));
            for chunk in [1, 7, 64] {
                let chunked = bits(&Sequence::new(prompt.clone()).logits(&model, chunk));
                assert!(chunked == whole, "{case}: chunks of {chunk} tokens give other bits");
            }
        }
    }
}

#[test]
fn logits_have_the_same_bits_in_a_batch() {
    for case in CASES {
        let model = network(case);
        let prompts = prompts(case);
        let alone: Vec<u32> = prompts
            .iter()
            .flat_map(|prompt| bits(&Sequence::new(prompt.clone()).logits(&model, prompt.len())))
            .collect();
        let mut shared = SharedCaches::new(&model, prompts.iter().map(Vec::len).sum::<usize>() + 8 * BLOCK_SIZE);
        let mut input = DecoderInput::default();
        for prompt in &prompts {
            input.push(prompt, 0, &shared.table(prompt.len()));
        }
        input.want_all_logits();
        let batched = model.forward(&input, &shared.caches).expect("computed").expect("logits were asked for");
        assert!(bits(&batched) == alone, "{case}: a batch gives other bits");
    }
}

#[test]
fn greedy_tokens_and_text_equal_the_reference() {
    for case in CASES {
        let mut server = Server::load(case, LoadOptions::default());
        let texts = golden_json(case)["greedy_text"].as_array().expect("a list").clone();
        for (index, prompt) in prompts(case).into_iter().enumerate() {
            let request = greedy(prompt);
            let prompt_tokens = request.prompt.len();
            let answer = server.answer_alone(request);
            let expected = golden_ids(case, &format!("greedy.{index}"));
            assert_eq!(expected.len(), GREEDY_TOKENS);
            assert_eq!(answer.tokens, expected, "{case} greedy.{index}");
            assert_eq!(Some(answer.text.as_str()), texts[index].as_str(), "{case} greedy_text {index}");
            let usage = Usage { prompt_tokens, completion_tokens: GREEDY_TOKENS, ..Usage::default() };
            assert_eq!(answer.end, Some((FinishReason::Length, usage)));
        }
    }
}

#[test]
fn prompts_and_chats_are_encoded_as_the_reference_does() {
    for case in CASES {
        let server = Server::load(case, LoadOptions::default());
        let golden = golden_json(case);
        for (index, prompt) in golden["prompts"].as_array().expect("a list").iter().enumerate() {
            let ids = server
                .card()
                .encode(prompt.as_str().expect("text"), Encoding::PROMPT, &CancelToken::default())
                .expect("encoded");
            assert_eq!(ids, golden_ids(case, &format!("prompt.{index}")), "{case} prompt.{index}");
        }
        for chat in golden["chats"].as_array().expect("a list") {
            let messages: Vec<ChatMessage> = serde_json::from_value(chat["messages"].clone()).expect("messages");
            let conversation = messages.into();
            let template = server.card().chat_template.as_ref().expect("the case has a chat template");
            assert_eq!(
                Some(template.render(&conversation).expect("rendered").as_str()),
                chat["text"].as_str(),
                "{case}"
            );
            let ids: Vec<u32> = serde_json::from_value(chat["ids"].clone()).expect("ids");
            assert_eq!(
                server.card().encode_chat(&conversation, Encoding::CHAT, &CancelToken::default()).expect("encoded"),
                ids,
                "{case}"
            );
        }
    }
}

#[test]
fn batched_equals_alone() {
    for case in CASES {
        let mut server = Server::load(case, LoadOptions::default());
        let requests = mixed_requests(case);
        let alone: Vec<Answer> = requests.iter().map(|request| server.answer_alone(request.clone())).collect();
        let batched = server.answer_all(&requests);
        assert_eq!(batched, alone, "{case}");
    }
}

#[test]
fn chunk_sizes_change_nothing() {
    for case in CASES {
        let requests = mixed_requests(case);
        let whole = Server::load(case, LoadOptions::default()).answer_all(&requests);
        for max_batch_tokens in [1, 7, 64] {
            let options = LoadOptions { max_batch_tokens, ..LoadOptions::default() };
            let chunked = Server::load(case, options).answer_all(&requests);
            assert_eq!(chunked, whole, "{case}: chunks of {max_batch_tokens}");
        }
    }
}

#[test]
fn preemption_changes_nothing() {
    for case in CASES {
        let requests = mixed_requests(case);
        let whole = Server::load(case, LoadOptions::default()).answer_all(&requests);
        // So few blocks that the longest session takes most of them.
        let longest = requests.iter().map(|request| request.prompt.len() + request.max_tokens).max().expect("some");
        let mut server = Server::load(case, with_blocks(case, blocks_for(longest) + 2));
        let answers = server.answer_all(&requests);
        assert_eq!(answers, whole, "{case}");
        assert!(server.saw_preemption, "{case}: the pool was never dry, so nothing was tested");
    }
}

#[test]
fn sessions_cancelled_midway_change_nothing_for_the_others() {
    for case in CASES {
        let requests = mixed_requests(case);
        let whole = Server::load(case, LoadOptions::default()).answer_all(&requests);
        let mut server = Server::load(case, LoadOptions { max_batch_tokens: 16, ..LoadOptions::default() });
        let kept = server.submit_all(&requests);
        let doomed = server.submit_all(&requests);
        for id in doomed {
            server.step();
            server.model.runner.cancel(id);
        }
        server.run();
        let answers: Vec<Answer> = kept.iter().map(|id| server.answers[id].clone()).collect();
        assert_eq!(answers, whole, "{case}");
    }
}

#[test]
fn cancel_at_any_step_leaves_nothing() {
    for case in CASES {
        let options = LoadOptions { max_batch_tokens: 8, max_batch_sequences: 2, ..LoadOptions::default() };
        let mut server = Server::load(case, options);
        let idle = server.model.runner.status();
        assert_eq!(idle, RunnerStatus { kv_blocks_total: idle.kv_blocks_total, ..RunnerStatus::default() });
        let requests = mixed_requests(case);
        for steps in 0..30 {
            let ids = server.submit_all(&requests);
            for _ in 0..steps {
                server.step();
            }
            for id in ids {
                server.model.runner.cancel(id);
            }
            assert_eq!(server.model.runner.status(), idle, "{case}: after {steps} steps");
            assert!(server.model.runner.next().is_none());
        }
    }
}

#[test]
fn an_end_of_sequence_token_ends_the_answer() {
    // Whatever the model says first is declared an end, beside another id.
    let prompt = prompts("llama-untied").swap_remove(0);
    let first = golden_ids("llama-untied", "greedy.0")[0];
    let other = first % 400 + 1;
    let copy = Copy::of("llama-untied");
    copy.write_json("generation_config.json", &json!({"eos_token_id": [other, first]}));
    let mut server = Server::open(copy.path(), LoadOptions::default());
    let request = TextRequest { ignore_eos: false, ..greedy(prompt.clone()) };
    let answer = server.answer_alone(request);
    assert_eq!((answer.tokens, answer.text.as_str()), (vec![first], ""));
    let usage = Usage { prompt_tokens: prompt.len(), completion_tokens: 1, ..Usage::default() };
    assert_eq!(answer.end, Some((FinishReason::Stop, usage)));

    let answer = server.answer_alone(greedy(prompt));
    assert_eq!(answer.tokens.len(), GREEDY_TOKENS, "ignore_eos goes on");
}

#[test]
fn a_stop_string_cuts_the_answer() {
    for case in CASES {
        let mut server = Server::load(case, LoadOptions::default());
        let whole = server.answer_alone(greedy(prompts(case).swap_remove(0)));
        let middle: Vec<char> = whole.text.chars().skip(whole.text.chars().count() / 2).take(2).collect();
        let stop: String = middle.into_iter().collect();
        let before = &whole.text[..whole.text.find(&stop).expect("it was taken from there")];
        let request = TextRequest { stop: vec![stop.clone()], ..greedy(prompts(case).swap_remove(0)) };
        let answer = server.answer_alone(request);
        assert_eq!(answer.text, before, "{case}: stop {stop:?}");
        assert_eq!(answer.end.map(|(reason, _)| reason), Some(FinishReason::Stop), "{case}");
        assert!(whole.tokens.starts_with(&answer.tokens) && answer.tokens.len() < whole.tokens.len(), "{case}");
    }
}

#[test]
fn an_answer_ends_as_its_request_says() {
    let case = "llama-untied";
    let mut server = Server::load(case, LoadOptions::default());
    let prompt = prompts(case).swap_remove(0);
    let whole = server.answer_alone(greedy(prompt.clone()));
    let tokenizer = &server.card().tokenizer;
    let has_text = |token: &&u32| tokenizer.decode(&[**token]).expect("decodes").chars().any(char::is_alphanumeric);
    let last = *whole.tokens[4..].iter().find(has_text).expect("some are letters");
    let length = 1 + whole.tokens.iter().position(|token| *token == last).expect("it is there");
    let mut ask = |change: &dyn Fn(&mut TextRequest)| {
        let mut request = TextRequest { stop_token_ids: vec![last], ..greedy(prompt.clone()) };
        change(&mut request);
        let answer = server.answer_alone(request);
        (answer.tokens, answer.text, answer.end.map(|(reason, _)| reason))
    };
    let stop = Some(FinishReason::Stop);
    let (tokens, text, reason) = ask(&|_| ());
    assert_eq!((tokens.as_slice(), reason), (&whole.tokens[..length], stop));
    let (tokens, longer, reason) = ask(&|request| request.include_stop = true);
    assert_eq!((tokens.as_slice(), reason), (&whole.tokens[..length], stop));
    assert!(
        whole.text.starts_with(&text) && longer.starts_with(&text) && longer.len() > text.len(),
        "{text:?} {longer:?}"
    );
    // Forbidden as long as it may not come, whatever else it would have been followed by.
    let (tokens, ..) = ask(&|request| request.min_tokens = length + 3);
    assert!(tokens.len() > length + 3 || tokens.len() == GREEDY_TOKENS, "{tokens:?}");
    assert!(!tokens[..length + 3].contains(&last), "{tokens:?}");
    // A bias does the same for the whole answer.
    let (tokens, ..) = ask(&|request| request.sampling.logit_bias = vec![(last, -100.0)]);
    assert!(tokens.len() == GREEDY_TOKENS && !tokens.contains(&last), "{tokens:?}");
}

#[test]
fn a_value_that_is_not_finite_fails_its_own_session_only() {
    let prompts = prompts("llama-untied");
    let poison = *prompts[0].iter().find(|token| !prompts[1].contains(token)).expect("the prompts differ");
    let copy = Copy::of("llama-untied");
    copy.edit_tensor("model.embed_tokens.weight", |rows| rows[poison as usize].fill(f32::NAN));
    let mut server = Server::open(copy.path(), LoadOptions::default());
    let healthy = TextRequest { max_tokens: 4, ..greedy(prompts[1].clone()) };
    let poisoned = TextRequest { max_tokens: 4, ..greedy(prompts[0].clone()) };
    let answers = server.answer_all(&[poisoned, healthy]);
    assert!(answers[0].failure.as_deref().is_some_and(|failure| failure.contains("not finite")), "{:?}", answers[0]);
    assert_eq!(answers[1].tokens, golden_ids("llama-untied", "greedy.1")[..4]);
    assert_eq!(server.model.runner.status().kv_blocks_used, 0);
}

#[test]
fn requests_that_do_not_fit_are_refused() {
    let mut server = Server::load("qwen2-yarn", LoadOptions::default());
    let max_context = server.card().max_context;
    assert_eq!(max_context, SMALLEST_CONTEXT, "factor times the original context");
    let refused = |server: &mut Server, prompt: Vec<u32>, max_tokens: usize| {
        let request = TextRequest { max_tokens, ..greedy(prompt) };
        server.model.runner.submit(SessionId(9), Request::Text(request)).expect_err("must be refused")
    };
    assert!(matches!(refused(&mut server, vec![], 1), Error::InvalidRequest { .. }));
    assert!(matches!(refused(&mut server, vec![100_000], 1), Error::InvalidRequest { .. }));
    assert!(matches!(refused(&mut server, vec![1; 100], SMALLEST_CONTEXT - 99), Error::ContextLength { .. }));
    assert_eq!(server.model.runner.status().waiting, 0);
    // Exactly to the end of the context is fine.
    let answer = server.answer_alone(TextRequest { max_tokens: SMALLEST_CONTEXT - 100, ..greedy(vec![1; 100]) });
    assert_eq!(answer.tokens.len(), SMALLEST_CONTEXT - 100);
}

#[test]
fn the_pool_bounds_the_context() {
    let server = Server::load("qwen2-yarn", with_blocks("qwen2-yarn", 2));
    assert_eq!(server.card().max_context, 2 * BLOCK_SIZE);
    assert_eq!(server.model.runner.status().kv_blocks_total, 2);
    let options = LoadOptions { kv_cache_bytes: 10, ..LoadOptions::default() };
    let refused = loading::load(&case_dir("qwen2-yarn").join("checkpoint"), &cpu(), &options, &mut |_| ());
    assert!(matches!(refused.err(), Some(Error::OutOfMemory { .. })));
}

#[test]
fn damaged_checkpoints_are_refused_with_file_and_name() {
    let check = |field: &str, value: Value, words: &[&str]| {
        let copy = Copy::of("llama-untied");
        copy.set_config(field, value);
        let error = copy.load().err().expect("must be refused").to_string();
        for word in words {
            assert!(error.contains(word), "`{error}` does not say `{word}`");
        }
    };
    check("num_hidden_layers", json!(4), &["model.layers.3.input_layernorm.weight", "missing"]);
    check("vocab_size", json!(500), &["model.safetensors", "model.embed_tokens.weight", "[492, 80]", "[500, 80]"]);
    check("mlp_bias", json!(true), &["model.layers.0.mlp.gate_proj.bias", "missing"]);
    let rope = json!({"rope_type": "dynamic", "factor": 2.0});
    check("rope_parameters", rope, &["config.json", "rope_parameters.rope_type", "dynamic"]);
    check("hidden_act", json!("gelu"), &["config.json", "hidden_act"]);
    check("num_key_value_heads", json!(3), &["config.json", "num_key_value_heads"]);
    check("head_dim", json!(0), &["config.json", "head_dim"]);
    check("quantization_config", json!({"quant_method": "hqq"}), &["config.json", "quantization_config"]);
    check("quantization_config", json!({"quant_method": "gptq"}), &["q_proj.weight` is plain", "quantization_config"]);
}

#[test]
fn sliding_windows_are_refused_only_where_they_matter() {
    let load = |window: usize, first_layer: usize| {
        let copy = Copy::of("qwen2-yarn");
        copy.set_config("use_sliding_window", json!(true));
        copy.set_config("sliding_window", json!(window));
        copy.set_config("max_window_layers", json!(first_layer));
        copy.load().map(|_| ())
    };
    let error = load(64, 1).expect_err("must be refused").to_string();
    assert!(error.contains("config.json") && error.contains("use_sliding_window"), "{error}");
    load(SMALLEST_CONTEXT, 1).expect("as wide as the context");
    load(64, 28).expect("no layer has it");
}

#[test]
fn a_tied_checkpoint_may_store_its_head_too() {
    let copy = Copy::of("qwen2-yarn");
    copy.edit_tensors(|tensors| {
        tensors.insert("lm_head.weight".to_owned(), tensors["model.embed_tokens.weight"].clone());
    });
    let inspection = loading::inspect(copy.path(), &cpu(), &LoadOptions::default()).expect("inspected");
    assert!(inspection.problem.is_none(), "{:?}", inspection.problem);
    let (_, report) = &inspection.components[0];
    assert!(report.unused.is_empty() && report.problems.is_empty(), "{report:?}");
    let answer =
        Server::open(copy.path(), LoadOptions::default()).answer_alone(greedy(prompts("qwen2-yarn").remove(0)));
    assert_eq!(answer.tokens, golden_ids("qwen2-yarn", "greedy.0"));
}

#[test]
fn the_kv_pool_is_part_of_what_a_model_takes() {
    let blocks = |count| Server::load("llama-tied", with_blocks("llama-tied", count)).model.resident_bytes;
    let block_bytes = network("llama-tied").kv_shape().block_bytes(KvFormat::Floats(DType::F32));
    assert_eq!(blocks(5) - blocks(2), 3 * block_bytes);
}

pub fn cpu() -> Placement {
    Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("a CPU")
}

pub fn network(case: &str) -> DecoderLm {
    network_at(case, &cpu())
}

pub fn network_at(case: &str, placement: &Placement) -> DecoderLm {
    network_of(case, &Manifest::read(&case_dir(case).join("checkpoint")).expect("a checkpoint"), placement)
}

/// Of a checkpoint that is read as that of the case is.
pub fn network_of(case: &str, manifest: &Manifest, placement: &Placement) -> DecoderLm {
    let config = match case.starts_with("llama") {
        true => llama::decoder_config(manifest),
        false => qwen2::decoder_config(manifest),
    };
    let weights = manifest.whole().weights(placement).expect("weights");
    DecoderLm::load(&weights, config.expect("a config")).expect("a network")
}

pub struct SharedCaches {
    caches: KvCaches,
    pool: BlockPool,
}

impl SharedCaches {
    pub fn new(model: &DecoderLm, num_tokens: usize) -> Self {
        let num_blocks = blocks_for(num_tokens);
        let caches = KvCaches::new(model.kv_shape(), KvFormat::computed(&cpu()), num_blocks, &cpu());
        Self { caches: caches.expect("allocated"), pool: BlockPool::new(num_blocks) }
    }

    pub fn caches(&self) -> &KvCaches {
        &self.caches
    }

    pub fn table(&mut self, num_tokens: usize) -> BlockTable {
        let mut table = BlockTable::default();
        assert!(self.pool.grow(&mut table, num_tokens));
        table
    }
}

struct Sequence {
    tokens: Vec<u32>,
}

impl Sequence {
    fn new(tokens: Vec<u32>) -> Self {
        Self { tokens }
    }

    /// Logits of all positions, computed `chunk` tokens at a time.
    fn logits(&self, model: &DecoderLm, chunk: usize) -> Tensor {
        let mut shared = SharedCaches::new(model, self.tokens.len());
        let table = shared.table(self.tokens.len());
        let mut logits = Vec::new();
        for (index, tokens) in self.tokens.chunks(chunk).enumerate() {
            let mut input = DecoderInput::default();
            input.push(tokens, index * chunk, &table);
            input.want_all_logits();
            logits.push(model.forward(&input, &shared.caches).expect("computed").expect("logits were asked for"));
        }
        Tensor::cat(&logits, 0).expect("equal widths")
    }
}

fn bits(x: &Tensor) -> Vec<u32> {
    let flat: Vec<f32> = x.flatten_all().expect("flatten").to_vec1().expect("f32");
    flat.into_iter().map(f32::to_bits).collect()
}

/// What a session said.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Answer {
    started: usize,
    pub tokens: Vec<u32>,
    pub text: String,
    /// Of the prompt.
    pub prompt: Option<Vec<TokenLogprobs>>,
    /// Of the answer.
    pub logprobs: Vec<PlacedLogprobs>,
    pub end: Option<(FinishReason, Usage)>,
    pub failure: Option<String>,
}

pub struct Server {
    model: LoadedModel,
    answers: BTreeMap<SessionId, Answer>,
    cached_tokens: BTreeMap<SessionId, Option<usize>>,
    next_id: u64,
    pub saw_preemption: bool,
    /// Tokens guessed by all sessions that have ended, and guesses that were right.
    pub drafts: (usize, usize),
}

impl Server {
    pub fn load(case: &str, options: LoadOptions) -> Self {
        Self::open(&case_dir(case).join("checkpoint"), options)
    }

    pub fn open(path: &Path, options: LoadOptions) -> Self {
        let model = loading::load(path, &cpu(), &options, &mut |_| ()).expect("loaded");
        let (answers, cached_tokens) = (BTreeMap::new(), BTreeMap::new());
        Self { model, answers, cached_tokens, next_id: 0, saw_preemption: false, drafts: (0, 0) }
    }

    pub fn card(&self) -> &TextCard {
        match &self.model.card {
            ModelCard::Text(card) => card,
            ModelCard::Diffusion(_) => panic!("a language model was loaded"),
        }
    }

    fn submit(&mut self, request: TextRequest) -> SessionId {
        self.submit_for(ClientId::default(), request)
    }

    pub fn submit_for(&mut self, client: ClientId, request: TextRequest) -> SessionId {
        let id = SessionId(self.next_id);
        self.next_id += 1;
        self.model.runner.submit_for(client, id, Request::Text(request)).expect("accepted");
        self.answers.insert(id, Answer::default());
        id
    }

    pub fn cancel(&mut self, id: SessionId) {
        self.model.runner.cancel(id);
    }

    pub fn has_work(&self) -> bool {
        self.model.runner.next().is_some()
    }

    pub fn answer(&self, id: SessionId) -> &Answer {
        &self.answers[&id]
    }

    /// Of a session that has ended well.
    pub fn cached_tokens(&self, id: SessionId) -> Option<usize> {
        self.cached_tokens[&id]
    }

    fn submit_all(&mut self, requests: &[TextRequest]) -> Vec<SessionId> {
        requests.iter().map(|request| self.submit(request.clone())).collect()
    }

    pub fn step(&mut self) {
        let planned = self.model.runner.next();
        let running = self.model.runner.status().running;
        let mut events = Events::default();
        let done = self.model.runner.step(&mut events).expect("computed");
        if let Some(planned) = planned {
            assert_eq!(done, planned, "`next` says what `step` does");
        }
        let mut ended = 0;
        for (id, event) in events.drain() {
            ended += usize::from(event.is_terminal());
            if let Event::Finished { usage, .. } = &event {
                self.cached_tokens.insert(id, usage.cached_tokens);
                self.drafts.0 += usage.draft_tokens;
                self.drafts.1 += usage.accepted_draft_tokens;
            }
            self.answers.get_mut(&id).expect("a known session").hear(event);
        }
        self.saw_preemption |= self.model.runner.status().running + ended < running;
    }

    pub fn run(&mut self) {
        while self.has_work() {
            self.step();
        }
        let status = self.model.runner.status();
        assert_eq!((status.running, status.waiting, status.kv_blocks_used), (0, 0, 0));
    }

    pub fn answer_alone(&mut self, request: TextRequest) -> Answer {
        self.answer_all(&[request]).remove(0)
    }

    pub fn answer_all(&mut self, requests: &[TextRequest]) -> Vec<Answer> {
        let ids = self.submit_all(requests);
        self.run();
        ids.iter().map(|id| self.answers[id].clone()).collect()
    }
}

impl Answer {
    pub fn text(&self) -> &str {
        &self.text
    }

    fn hear(&mut self, event: Event) {
        assert!(self.end.is_none() && self.failure.is_none(), "nothing follows the end");
        match event {
            Event::Started => self.started += 1,
            Event::Prompt(told) => {
                assert!(self.prompt.replace(told).is_none() && self.tokens.is_empty(), "told once, before any text");
            }
            Event::Text { tokens, text, logprobs } => {
                self.logprobs.extend(logprobs);
                assert_eq!(self.started, 1, "text comes after the start");
                self.tokens.extend(tokens);
                self.text.push_str(&text);
            }
            Event::Finished { reason, usage } => {
                assert_eq!(usage.completion_tokens, self.tokens.len());
                // What is said does not depend on it.
                let usage = Usage { cached_tokens: None, draft_tokens: 0, accepted_draft_tokens: 0, ..usage };
                self.end = Some((reason, usage));
            }
            Event::Failed(error) => self.failure = Some(error.to_string()),
            other => panic!("a text session does not say {other:?}"),
        }
    }
}

pub fn golden_ids(case: &str, name: &str) -> Vec<u32> {
    let ids = golden_tensors(case)[name].to_dtype(DType::U32).expect("ids");
    ids.to_vec1().expect("one dimension")
}

pub fn prompts(case: &str) -> Vec<Vec<u32>> {
    let count = golden_json(case)["prompts"].as_array().expect("a list").len();
    (0..count).map(|index| golden_ids(case, &format!("prompt.{index}"))).collect()
}

/// As many tokens as the goldens have, or as fit the smallest context of all cases (the reference does not stop there).
pub fn greedy(prompt: Vec<u32>) -> TextRequest {
    TextRequest { ignore_eos: true, ..TextRequest::greedy(prompt, GREEDY_TOKENS) }
}

/// Greedy and sampled requests of several lengths.
pub fn mixed_requests(case: &str) -> Vec<TextRequest> {
    let mut requests = Vec::new();
    for (index, prompt) in prompts(case).into_iter().enumerate() {
        requests.push(greedy(prompt.clone()));
        let mut sampled = greedy(prompt);
        sampled.max_tokens = sampled.max_tokens.min(20 + 9 * index);
        sampled.sampling.temperature = 1.0;
        sampled.sampling.top_p = 0.95;
        sampled.sampling.repetition_penalty = 1.1;
        sampled.sampling.seed = index as u64;
        requests.push(sampled);
    }
    requests
}

/// Options with a pool of exactly `num_blocks` blocks.
pub fn with_blocks(case: &str, num_blocks: usize) -> LoadOptions {
    let block_bytes = network(case).kv_shape().block_bytes(KvFormat::Floats(DType::F32));
    LoadOptions { kv_cache_bytes: num_blocks * block_bytes, ..LoadOptions::default() }
}

/// A copy of a checkpoint, to be damaged.
pub struct Copy(tempfile::TempDir);

impl Copy {
    pub fn of(case: &str) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        for entry in std::fs::read_dir(case_dir(case).join("checkpoint")).expect("a checkpoint") {
            let entry = entry.expect("an entry");
            std::fs::copy(entry.path(), dir.path().join(entry.file_name())).expect("copied");
        }
        Self(dir)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn load(&self) -> tale_models::Result<LoadedModel> {
        loading::load(self.path(), &cpu(), &LoadOptions::default(), &mut |_| ())
    }

    pub fn write_json(&self, file_name: &str, value: &Value) {
        std::fs::write(self.path().join(file_name), value.to_string()).expect("written");
    }

    pub fn set_config(&self, field: &str, value: Value) {
        self.change_config(|config| config[field] = value);
    }

    pub fn change_config(&self, change: impl FnOnce(&mut Value)) {
        let bytes = std::fs::read(self.path().join("config.json")).expect("read");
        let mut config: Value = serde_json::from_slice(&bytes).expect("JSON");
        change(&mut config);
        self.write_json("config.json", &config);
    }

    pub fn edit_tensors(&self, edit: impl FnOnce(&mut HashMap<String, Tensor>)) {
        let path = self.path().join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).expect("read");
        edit(&mut tensors);
        candle_core::safetensors::save(&tensors, &path).expect("written");
    }

    /// Edits the rows of one matrix.
    pub fn edit_tensor(&self, name: &str, edit: impl FnOnce(&mut Vec<Vec<f32>>)) {
        self.edit_tensors(|tensors| {
            let mut rows = tensors[name].to_vec2::<f32>().expect("a matrix");
            edit(&mut rows);
            tensors.insert(name.to_owned(), Tensor::new(rows, &Device::Cpu).expect("a tensor"));
        });
    }
}
