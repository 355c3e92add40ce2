//! KV caches in fewer bits than are computed: how far logits move, and that a sequence's tokens still depend on nothing but
//! itself.

use candle_core::{DType, Tensor};
use tale_models::family::LoadOptions;
use tale_models::kv::{BlockPool, BlockTable, KvCacheDtype, KvCaches, KvFormat, blocks_for};
use tale_models::layers::decoder::DecoderInput;
use tale_models::request::ClientId;
use tale_models::runner::text::model::CausalLm;

use crate::text::{Answer, CASES, Server, cpu, greedy, mixed_requests, network, prompts};

/// Logits of all positions of a prompt, computed in chunks of so many tokens.
fn logits(case: &str, prompt: &[u32], format: KvFormat, chunk: usize) -> Tensor {
    let network = network(case);
    let num_blocks = blocks_for(prompt.len());
    let caches = KvCaches::new(network.kv_shape(), format, num_blocks, &cpu()).expect("allocated");
    let mut table = BlockTable::default();
    assert!(BlockPool::new(num_blocks).grow(&mut table, prompt.len()));
    let mut logits = Vec::new();
    for (index, tokens) in prompt.chunks(chunk).enumerate() {
        let mut input = DecoderInput::default();
        input.push(tokens, index * chunk, &table);
        input.want_all_logits();
        logits.push(network.forward(&input, &caches).expect("computed").expect("logits were asked for"));
    }
    Tensor::cat(&logits, 0).expect("equal widths")
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().expect("flat").to_vec1().expect("f32")
}

/// The largest difference, relative to the largest logit.
fn moved(found: &Tensor, exact: &Tensor) -> f32 {
    let (found, exact) = (values(found), values(exact));
    let largest = exact.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    found.iter().zip(&exact).map(|(found, exact)| (found - exact).abs()).fold(0f32, f32::max) / largest
}

/// By format, how far logits may move: twice what they do.
const BOUNDS: [(KvFormat, f32); 4] = [
    (KvFormat::Floats(DType::F16), 5e-3),
    (KvFormat::Floats(DType::BF16), 3e-2),
    (KvFormat::INT8, 8e-2),
    (KvFormat::FP8, 5e-1),
];

#[test]
fn fewer_bits_move_logits_a_little_and_the_same_in_any_chunking() {
    for (format, bound) in BOUNDS {
        let mut furthest = 0f32;
        for case in CASES {
            for prompt in prompts(case) {
                let exact = logits(case, &prompt, KvFormat::Floats(DType::F32), prompt.len());
                let whole = logits(case, &prompt, format, prompt.len());
                furthest = furthest.max(moved(&whole, &exact));
                for chunk in [1, 7, 64] {
                    let chunked = logits(case, &prompt, format, chunk);
                    let same = values(&chunked).iter().zip(values(&whole)).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{case}: {format} in chunks of {chunk} gives other bits");
                }
            }
        }
        println!("{format}: logits move by {furthest:.1e} of the largest");
        assert!(furthest > 0.0 && furthest < bound, "{format} moves logits by {furthest}");
    }
}

#[test]
fn over_8_bits_tokens_are_the_same_alone_and_batched_preempted_and_cached() {
    let formats = [(KvCacheDtype::Int8, KvFormat::INT8), (KvCacheDtype::Fp8, KvFormat::FP8)];
    for (case, (kv_cache_dtype, format)) in CASES.into_iter().flat_map(|case| formats.map(|format| (case, format))) {
        let block_bytes = network(case).kv_shape().block_bytes(format);
        let options = |num_blocks: usize| LoadOptions {
            kv_cache_dtype,
            kv_cache_bytes: num_blocks * block_bytes,
            ..LoadOptions::default()
        };
        let requests = mixed_requests(case);
        let mut roomy = Server::load(case, options(200));
        let alone: Vec<Answer> = requests.iter().map(|request| roomy.answer_alone(request.clone())).collect();
        assert_eq!(roomy.answer_all(&requests), alone, "{case}: together, with what is in the cache");
        let mut narrow = Server::load(case, LoadOptions { max_batch_tokens: 16, ..options(8) });
        assert_eq!(narrow.answer_all(&requests), alone, "{case}: preempted");
        assert!(narrow.saw_preemption, "{case}");
        let prompt: Vec<u32> = prompts(case)[0].iter().copied().cycle().take(70).collect();
        let [first, second] = [1, 1].map(|client| {
            let id = roomy.submit_for(ClientId(client), greedy(prompt.clone()));
            roomy.run();
            (roomy.cached_tokens(id), roomy.answer(id).clone())
        });
        assert_eq!((first.0, second.0, &first.1), (Some(0), Some(64), &second.1), "{case}");
    }
}
