//! Language models that several devices share say what one device says: the same tokens, greedy or sampled, alone, batched, in
//! chunks, preempted, cached, guessed and held to a grammar; logits beside those of one device and the reference's.

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use tale_models::checkpoint::Manifest;
use tale_models::device::DeviceSpec;
use tale_models::families::causal_lm::DecoderLm;
use tale_models::families::{llama, qwen2};
use tale_models::family::LoadOptions;
use tale_models::grammar::{Asked, Form};
use tale_models::kv::{BlockPool, BlockTable, KvCaches, KvFormat, blocks_for};
use tale_models::layers::decoder::DecoderInput;
use tale_models::loading;
use tale_models::parallel::{Exchange, MemoryLink, Rank};
use tale_models::parameter::Options;
use tale_models::request::{ClientId, TextRequest};
use tale_models::runner::text::lookup::PromptLookup;
use tale_models::runner::text::model::CausalLm;

use crate::support::{assert_close, case_dir, golden_tensors};
use crate::text::{Answer, Copy, Server, cpu, greedy, mixed_requests, prompts, with_blocks};
use crate::{language_gguf, quantised};

/// Checkpoints and numbers of devices: one of plain heads, and one with biases whose heads of keys are fewer than four devices.
const CASES: [(&str, usize); 3] = [("llama-tied", 2), ("qwen2-yarn", 2), ("qwen2-yarn", 4)];
/// Of f32 beside f32 that is added up in another order.
const TOLERANCE: f64 = 1e-5;

fn shared(options: LoadOptions, of: usize) -> LoadOptions {
    let tensor_parallel = (0..of).map(|part| DeviceSpec::CpuPart { part, of }).collect();
    LoadOptions { tensor_parallel, ..options }
}

/// A rank of a network, or the whole.
fn part(manifest: &Manifest, family: &str, rank: Option<&Rank>) -> DecoderLm {
    let config = match family.starts_with("llama") || family == "smollm" {
        true => llama::decoder_config(manifest),
        false => qwen2::decoder_config(manifest),
    };
    let weights = manifest.whole().weights(&cpu()).expect("weights");
    DecoderLm::load_part(&weights, config.expect("a config"), rank).expect("a network")
}

/// Logits of all positions of a prompt, some tokens at a time.
fn logits(network: &DecoderLm, prompt: &[u32], chunk: usize) -> Vec<f32> {
    let num_blocks = blocks_for(prompt.len());
    let caches = KvCaches::new(network.kv_shape(), KvFormat::computed(&cpu()), num_blocks, &cpu()).expect("allocated");
    let mut table = BlockTable::default();
    assert!(BlockPool::new(num_blocks).grow(&mut table, prompt.len()));
    let mut logits = Vec::new();
    for (index, tokens) in prompt.chunks(chunk).enumerate() {
        let mut input = DecoderInput::default();
        input.push(tokens, index * chunk, &table);
        input.want_all_logits();
        let of_chunk = network.forward(&input, &caches).expect("computed").expect("logits were asked for");
        logits.extend(of_chunk.flatten_all().expect("flat").to_vec1::<f32>().expect("f32"));
    }
    logits
}

/// The same of so many ranks, each on a thread of its own; all say the same.
fn shared_logits(manifest: &Manifest, family: &str, of: usize, prompt: &[u32], chunk: usize) -> Vec<f32> {
    let exchange = Exchange::new(of);
    let mut found: Vec<Vec<f32>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..of)
            .map(|index| {
                let rank = Rank::new(index, of, Arc::new(MemoryLink::new(&exchange, index)));
                scope.spawn(move || logits(&part(manifest, family, Some(&rank)), prompt, chunk))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("computed")).collect()
    });
    assert!(found.iter().all(|logits| logits == &found[0]), "{family}: ranks differ");
    found.swap_remove(0)
}

fn rows(logits: Vec<f32>, num_rows: usize) -> Tensor {
    let columns = logits.len() / num_rows;
    Tensor::from_vec(logits, (num_rows, columns), &Device::Cpu).expect("whole rows")
}

#[test]
fn logits_are_those_of_one_device_and_the_reference() {
    for (case, of) in CASES {
        let manifest = Manifest::read(&case_dir(case).join("checkpoint")).expect("a checkpoint");
        let golden = golden_tensors(case);
        for (index, prompt) in prompts(case).iter().enumerate() {
            let found = shared_logits(&manifest, case, of, prompt, prompt.len());
            let alone = rows(logits(&part(&manifest, case, None), prompt, prompt.len()), prompt.len());
            for chunk in [1, 7] {
                let chunked = shared_logits(&manifest, case, of, prompt, chunk);
                assert!(chunked == found, "{case} on {of}: chunks of {chunk} give other bits");
            }
            let found = rows(found, prompt.len());
            assert_close(&format!("{case} on {of}, prompt {index}"), &found, &alone, TOLERANCE);
            assert_close(&format!("{case} on {of}: golden"), &found, &golden[&format!("logits.{index}")], 1e-4);
        }
    }
}

/// Blocks of GGUF files and codes with scales, where shares fall between them.
#[test]
fn quantised_logits_are_those_of_one_device() {
    let mut compared = 0;
    let mut check = |what: &str, path: &Path, family: &str, prompt: &[u32]| {
        let options = shared(LoadOptions { kv_cache_bytes: 1 << 20, ..LoadOptions::default() }, 2);
        if let Err(problem) = loading::load(path, &cpu(), &options, &mut |_| ()) {
            let problem = problem.to_string();
            println!("{what}: {problem}");
            let is_named = problem.contains("tensor `") || problem.contains("num_attention_heads: ");
            assert!(is_named, "{what}: {problem}");
            assert!(problem.contains("ends within a block") || problem.contains("cannot share"), "{what}: {problem}");
            return;
        }
        println!("{what}: shared out");
        let manifest = Manifest::read(path).expect("a checkpoint");
        let alone = rows(logits(&part(&manifest, family, None), prompt, prompt.len()), prompt.len());
        let found = rows(shared_logits(&manifest, family, 2, prompt, prompt.len()), prompt.len());
        assert_close(what, &found, &alone, TOLERANCE);
        compared += 1;
    };
    let golden = golden_tensors(quantised::CASE);
    for (name, family) in quantised::variants() {
        check(&name, quantised::checkpoint(&name).path(), &family, &quantised::prompt(&golden, &name));
    }
    for case in language_gguf::CASES {
        let path = language_gguf::file(case);
        check(case, &path, case, &language_gguf::prompts(case)[0]);
    }
    assert!(compared >= 8, "only {compared} were compared");
}

#[test]
fn tokens_are_those_of_one_device_alone_batched_in_chunks_and_preempted() {
    for (case, of) in CASES {
        let requests = mixed_requests(case);
        let expected = Server::load(case, LoadOptions::default()).answer_all(&requests);
        let mut server = Server::load(case, shared(LoadOptions::default(), of));
        let alone: Vec<Answer> = requests.iter().map(|request| server.answer_alone(request.clone())).collect();
        assert_eq!(alone, expected, "{case} on {of}: alone");
        assert_eq!(server.answer_all(&requests), expected, "{case} on {of}: together");
        let chunked = LoadOptions { max_batch_tokens: 7, ..LoadOptions::default() };
        assert_eq!(
            Server::load(case, shared(chunked, of)).answer_all(&requests),
            expected,
            "{case} on {of}: in chunks"
        );
        let longest = requests.iter().map(|request| request.prompt.len() + request.max_tokens).max().expect("some");
        let whole = with_blocks(case, blocks_for(longest) + 2);
        // Each device has one head of the keys of both.
        let few = LoadOptions { kv_cache_bytes: whole.kv_cache_bytes / 2, ..whole };
        let mut narrow = Server::load(case, shared(few, of));
        assert_eq!(narrow.answer_all(&requests), expected, "{case} on {of}: preempted");
        assert!(narrow.saw_preemption, "{case}");
    }
}

#[test]
fn what_is_cached_guessed_told_and_held_is_the_same() {
    let lookup = PromptLookup { num_speculative_tokens: 5, prompt_lookup_min: 1, prompt_lookup_max: 3 };
    for (case, of) in CASES {
        let options = LoadOptions { prompt_lookup: Some(lookup), ..LoadOptions::default() };
        let mut one = Server::load(case, options.clone());
        let mut server = Server::load(case, shared(options, of));
        let repeated: Vec<u32> = prompts(case)[0].iter().copied().cycle().take(70).collect();
        for _ in 0..2 {
            let [expected, found] = [&mut one, &mut server].map(|server| {
                let id = server.submit_for(ClientId(1), greedy(repeated.clone()));
                server.run();
                (server.cached_tokens(id), server.answer(id).clone())
            });
            assert_eq!(found, expected, "{case} on {of}: cached");
        }
        let asked = || Asked { field: "f".to_owned(), form: Form::Regex("[0-9]{12}".to_owned()) };
        let held = |server: &Server| {
            let grammar = server.card().grammar(asked(), &Options::default()).expect("compiles");
            TextRequest { ignore_eos: false, ..greedy(prompts(case)[0].clone()) }.held_to(Some(grammar))
        };
        let expected = one.answer_alone(held(&one));
        let found = server.answer_alone(held(&server));
        assert_eq!((found.tokens, found.text), (expected.tokens, expected.text), "{case} on {of}: held");
        assert!(server.drafts.1 > 0, "{case} on {of}: no guess was right");

        let told = TextRequest { logprobs: Some(3), prompt_logprobs: Some(3), ..greedy(prompts(case)[1].clone()) };
        let [expected, found] = [&mut one, &mut server].map(|server| server.answer_alone(told.clone()));
        assert_eq!(found.tokens, expected.tokens, "{case} on {of}: told");
        let of_prompt = |answer: &Answer| answer.prompt.clone().expect("told");
        let pairs = of_prompt(&found).into_iter().zip(of_prompt(&expected));
        let furthest = pairs.map(|(a, b)| (a.logprob - b.logprob).abs()).fold(0f32, f32::max);
        assert!(furthest < 1e-4, "{case} on {of}: probabilities differ by {furthest}");
        assert_eq!(found.logprobs.len(), expected.logprobs.len());
    }
}

#[test]
fn each_device_takes_its_share() {
    for (case, of) in CASES {
        let path = case_dir(case).join("checkpoint");
        let options = LoadOptions { kv_cache_bytes: 1 << 20, ..LoadOptions::default() };
        let bytes = |options: &LoadOptions| {
            let inspection = loading::inspect(&path, &cpu(), options).expect("inspected");
            assert!(inspection.problem.is_none(), "{case}: {:?}", inspection.problem);
            (inspection.resident_bytes() - inspection.cache_bytes, inspection)
        };
        let (whole, _) = bytes(&options);
        let (own, inspection) = bytes(&shared(options.clone(), of));
        let (_, report) = &inspection.components[0];
        assert!(report.unused.is_empty() && report.problems.is_empty(), "{case}: {report:?}");
        // Norms, and heads of keys that two devices have, are not shared out.
        assert!(own * of < whole + whole / 3 && own * of > whole, "{case} on {of}: {own} bytes of {whole}");
        let loaded = loading::load(&path, &cpu(), &shared(options, of), &mut |_| ()).expect("loaded");
        assert_eq!(loaded.resident_bytes, inspection.resident_bytes(), "{case}");
    }
}

#[test]
fn what_cannot_be_shared_out_is_refused_by_name() {
    let refused = |path: &Path, of: usize, words: &[&str]| {
        let error = loading::load(path, &cpu(), &shared(LoadOptions::default(), of), &mut |_| ());
        let error = error.err().expect("must be refused").to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}: {words:?}");
    };
    let checkpoint = |case: &str| case_dir(case).join("checkpoint");
    refused(&checkpoint("llama-untied"), 2, &["config.json", "num_attention_heads: 2 ranks cannot share out 5"]);
    refused(&checkpoint("qwen2"), 2, &["config.json", "num_key_value_heads: 2 ranks cannot share out 3"]);
    refused(&checkpoint("qwen2"), 3, &["config.json", "intermediate_size: 3 ranks cannot share out 152"]);
    refused(&checkpoint("flux-schnell"), 2, &["flux", "are not shared out"]);
    refused(&checkpoint("llama-tied"), 12, &["2 to 8 devices can, these are 12"]);
    // What is missing is said by whichever rank finds it first.
    let copy = Copy::of("qwen2-yarn");
    copy.edit_tensors(|tensors| drop(tensors.remove("model.layers.1.mlp.down_proj.weight")));
    refused(copy.path(), 2, &["model.layers.1.mlp.down_proj.weight", "missing"]);
}
